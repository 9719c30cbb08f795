"""Attention and products of two signals against slow versions of AttnLRP, and torch's own outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import close
from surrogate import half_each, lrp_0_of_surrogate
from torch import Tensor, nn

from spray import explain
from spray.errors import UserError
from spray.lrp import Composite, propagate

N, L, E, HEADS = 2, 5, 8, 2
EPSILON = 1e-6


@pytest.fixture(autouse=True)
def double() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Model(nn.Module):
    """A function of a module and an input; its output is kept."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], core: nn.Module | None = None) -> None:
        super().__init__()
        self.core, self.function = core or nn.Identity(), function
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.core, x)


def relevance(model: nn.Module, x: Tensor, R: Tensor, **options: Any) -> Tensor:
    return propagate(model, x, Composite(**options), lambda _: R)


def stabilized(z: Tensor) -> Tensor:
    return z + EPSILON * torch.where(z < 0, -1.0, 1.0)


def jacobian(function: Any, a: Tensor) -> Tensor:
    """The matrix (outputs, inputs) of a function of one sample."""
    J = torch.autograd.functional.jacobian(function, a)
    return J.reshape(-1, a.numel())


# Softmax and products


@pytest.mark.parametrize("dim", [1, -1])
def test_softmax(dim: int) -> None:
    x, R = torch.randn(2, N, 3, 4).unbind()
    result = relevance(Model(lambda _, x: x.softmax(dim)), x, R)
    s = x.softmax(dim)
    assert result.shape == x.shape
    for n in range(N):
        # Achtibat et al. 2024, eq. 13, element by element
        for i in range(3):
            for j in range(4):
                others = R[n, :, j] if dim == 1 else R[n, i]
                expected = x[n, i, j] * (R[n, i, j] - s[n, i, j] * others.sum())
                torch.testing.assert_close(result[n, i, j], expected, rtol=1e-9, atol=1e-12)


def test_masked_entries_of_a_softmax_take_no_part() -> None:
    x, R = torch.randn(N, 4), torch.randn(N, 4)
    mask = torch.tensor([False, True, False, False])
    R[:, mask] = 0
    result = relevance(Model(lambda _, x: x.masked_fill(mask, -torch.inf).softmax(-1)), x, R)
    without = relevance(Model(lambda _, x: x.softmax(-1)), x[:, ~mask], R[:, ~mask])
    assert bool((result[:, mask] == 0).all())
    close(result[:, ~mask], without)


PRODUCTS: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...]]] = {
    "matmul": (torch.matmul, (3, 4), (4, 2)),
    "batched": (torch.matmul, (2, 3, 4), (2, 4, 2)),
    "broadcast": (torch.matmul, (2, 3, 4), (4, 2)),
    "einsum": (lambda a, b: torch.einsum("nij,nkj->nik", a, b), (3, 4), (2, 4)),
    "outer": (lambda a, b: torch.einsum("ni,nj->nij", a, b), (3,), (2,)),
    "bmm": (torch.bmm, (3, 4), (4, 2)),
    "operator": (lambda a, b: a @ b, (3, 4), (4, 2)),
    "dot": (lambda a, b: torch.stack([torch.dot(*pair) for pair in zip(a, b, strict=True)])[:, None], (4,), (4,)),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_product_of_two_signals(name: str) -> None:
    """Both factors get half of the relevance, each in proportion to its contributions (eq. 14)."""
    function, left, right = PRODUCTS[name]
    n_left, n_right = (int(torch.tensor(shape).prod()) for shape in (left, right))
    x = torch.randn(N, n_left + n_right)

    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        b = x[:, n_left:].reshape(len(x), *right)
        return x[:, :n_left].reshape(len(x), *left), b[:, None] if name == "broadcast" else b

    z = function(*parts(x))
    R = torch.randn_like(z)
    result = relevance(Model(lambda _, x: function(*parts(x))), x, R)
    for n in range(N):
        a, b = parts(x[n : n + 1])
        J_a = jacobian(lambda a, b=b: function(a, b), a)
        J_b = jacobian(lambda b, a=a: function(a, b), b)
        z_n = function(a, b).flatten()
        s = R[n].flatten() / stabilized(2 * z_n)
        expected = torch.cat([a.flatten() * (J_a.T @ s), b.flatten() * (J_b.T @ s)])
        close(result[n], expected)


def test_product_of_a_signal_with_itself() -> None:
    x, R = torch.randn(N, L, E), torch.randn(N, L, L)
    result = relevance(Model(lambda _, x: x @ x.mT), x, R)
    for n in range(N):
        z = x[n] @ x[n].T
        s = R[n] / stabilized(2 * z)
        close(result[n], x[n] * (s @ x[n]) + x[n] * (s.T @ x[n]))


# Attention


def mask_of(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


def slow_attention(q: Tensor, k: Tensor, v: Tensor, R: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """AttnLRP of one head of one sample, query by query: the relevance of q (L, d), k and v (S, d)."""
    R_q, R_k, R_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    d = q.shape[1]
    for i in range(len(q)):
        products = q[i] * k / d**0.5  # (S, d)
        raw = products.sum(1)
        scores = mask_of(raw, None if mask is None else mask[i])
        s = scores.softmax(0)
        out = s @ v
        share = R[i] / stabilized(2 * out)  # (d,)
        R_s = (s[:, None] * v * share).sum(1)
        R_v += s[:, None] * v * share
        R_scores = torch.where(scores.isinf(), 0, scores) * (R_s - s * R_s.sum())
        if mask is not None and mask.dtype != torch.bool:
            R_scores = torch.where(scores.isinf(), 0, raw / stabilized(scores)) * R_scores
        share = (torch.where(scores.isinf(), 0, R_scores) / stabilized(2 * raw))[:, None]
        R_q[i] += (products * share).sum(0)
        R_k += products * share
    return R_q, R_k, R_v


MASKS: dict[str, Callable[[], Tensor | None]] = {
    "none": lambda: None,
    "boolean": lambda: torch.rand(L, L).add(torch.eye(L)) > 0.4,
    "float": lambda: torch.randn(L, L),
    "minus infinity": lambda: torch.zeros(L, L).masked_fill(torch.rand(L, L).sub(torch.eye(L)) > 0.5, -torch.inf),
}


@pytest.mark.parametrize("mask", MASKS)
def test_attention_part_by_part(mask: str) -> None:
    attn_mask = MASKS[mask]()
    x = torch.randn(N, 3, HEADS, L, 4)
    R = torch.randn(N, HEADS, L, 4)

    def attention(_: Any, x: Tensor) -> Tensor:
        q, k, v = x.unbind(1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)

    result = relevance(Model(attention), x, R)
    for n in range(N):
        for h in range(HEADS):
            expected = torch.stack(slow_attention(*x[n, :, h], R[n, h], attn_mask))
            close(result[n, :, h], expected)


def heads(x: Tensor) -> Tensor:
    return x.view(N, L, HEADS, -1).transpose(1, 2)


BLIND = torch.ones(L, L, dtype=torch.bool).tril().index_fill(0, torch.tensor([2]), False)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"attn_mask": torch.ones(L, L, dtype=torch.bool).tril()},
        {"attn_mask": torch.linspace(-2, 2, N * HEADS * L * L, dtype=torch.float64).view(N, HEADS, L, L)},
        {"scale": 0.3},
        {"scale": 0.0},
        {"attn_mask": BLIND},
        {"attn_mask": torch.zeros(L, L, dtype=torch.float64).masked_fill(~BLIND, -torch.inf)},
        {"attn_mask": torch.zeros(L, L, dtype=torch.float64).masked_fill(~BLIND, torch.finfo(torch.float64).min)},
    ],
)
def test_attention_has_the_outputs_of_torch(options: dict[str, Any]) -> None:
    def attention(_: Any, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(heads(x), heads(x) * 2, heads(x) + 1, **options)

    compare_outputs(Model(attention))


def compare_outputs(model: nn.Module, x: Tensor | None = None) -> Tensor:
    """Assert that a model has the same outputs under the trace; return its relevance, which is finite."""
    x = torch.randn(N, L, E) if x is None else x
    expected = model(x).detach()  # with gradients: else torch may take shortcuts that leave padded tokens out
    seen: list[Tensor] = []
    result = propagate(model, x, Composite(), lambda out: seen.append(out.detach()) or out.detach())
    torch.testing.assert_close(seen[0], expected, rtol=1e-9, atol=1e-12)
    assert bool(torch.isfinite(result).all())
    assert bool(result.any())
    return result


def test_grouped_queries_and_other_lengths() -> None:
    def grouped(_: Any, x: Tensor) -> Tensor:
        q, kv = heads(x), heads(x)[:, :1]
        return F.scaled_dot_product_attention(q, kv * 2, kv + 1, enable_gqa=True)

    def repeated(_: Any, x: Tensor) -> Tensor:
        q, kv = heads(x), heads(x)[:, :1].expand(-1, HEADS, -1, -1)
        return F.scaled_dot_product_attention(q, kv * 2, kv + 1)

    x = torch.randn(N, L, E)
    close(compare_outputs(Model(grouped), x), compare_outputs(Model(repeated), x), 1e-12)
    compare_outputs(Model(lambda _, x: F.scaled_dot_product_attention(x[:, :3], x, x, None, 0.0, True)))
    with pytest.raises(UserError, match="active dropout"):
        compare_outputs(Model(lambda _, x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)))


CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * L, [False] * 3 + [True] * (L - 3)])
FLOATS = torch.linspace(-2, 2, L * L, dtype=torch.float64).view(L, L)
PER_HEAD = torch.linspace(-2, 2, N * HEADS * L * L, dtype=torch.float64).sin().view(N * HEADS, L, L)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attn_mask": CAUSAL},
        {"attn_mask": CAUSAL, "is_causal": True},
        {"attn_mask": FLOATS},
        {"attn_mask": (PER_HEAD > 0.3).masked_fill(torch.eye(L, dtype=torch.bool), False)},
        {"attn_mask": PER_HEAD},
        {"key_padding_mask": PADDING},
        {"key_padding_mask": FLOATS[:2]},
        {"attn_mask": CAUSAL, "key_padding_mask": PADDING},
        {"attn_mask": FLOATS, "key_padding_mask": PADDING},
        {"attn_mask": PER_HEAD, "key_padding_mask": FLOATS[1:3]},
    ],
)
def test_multi_head_attention_has_the_outputs_of_torch(
    options: dict[str, Any], batch_first: bool, need_weights: bool
) -> None:
    core = nn.MultiheadAttention(E, HEADS, batch_first=batch_first)
    nn.init.normal_(core.in_proj_bias)
    nn.init.normal_(core.out_proj.bias)

    def attend(core: Any, x: Tensor) -> Tensor:
        x = x if batch_first else x.transpose(0, 1)
        return core(x, x, x, need_weights=need_weights, **options)[0]

    compare_outputs(Model(attend, core))


def multi_head(**options: Any) -> nn.Module:
    return nn.MultiheadAttention(E, HEADS, batch_first=True, **options)


WIDTH3, WIDTH4 = (torch.linspace(-1, 1, E * n, dtype=torch.float64).sin().view(E, n) for n in (3, 4))
KEYS = torch.linspace(-2, 2, N * 3 * E, dtype=torch.float64).view(N, 3, E)


@pytest.mark.parametrize(
    ("options", "attend"),
    [
        ({"kdim": 3, "vdim": 4}, lambda core, x: core(x, x @ WIDTH3, x @ WIDTH4)[0]),
        ({"bias": False}, lambda core, x: core(x, x, x)[0]),
        ({}, lambda core, x: core(x, x + 1, x)[0]),
        ({}, lambda core, x: core(x[:, :2], x, x)[0]),
        ({}, lambda core, x: core(torch.ones(N, 3, E), x, x)[0]),
        ({}, lambda core, x: core(x, KEYS, KEYS)[0]),
        ({}, lambda core, x: core(PER_HEAD[:2, :, :1] + KEYS[:, :1], PER_HEAD[:2, :, :1] - KEYS[:, :1], x)[0]),
        ({}, lambda core, x: core(x, x, x)[1]),
        ({}, lambda core, x: core(x, x, x, average_attn_weights=False)[1]),
        ({}, lambda core, x: torch.stack([core(one, one, one)[0] for one in x])),
        ({}, lambda core, x: torch.stack([core(one, one, one, key_padding_mask=PADDING[1])[0] for one in x])),
        ({}, lambda core, x: torch.stack([core(one, one, one, attn_mask=PER_HEAD[:HEADS])[0] for one in x])),
    ],
)
def test_forms_of_multi_head_attention(options: dict[str, Any], attend: Any) -> None:
    compare_outputs(Model(attend, multi_head(**options)))


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_extra_keys_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="extra key or value"):
        compare_outputs(Model(lambda core, x: core(x, x, x)[0], multi_head(**options)))


@pytest.mark.parametrize("padding", [None, PADDING])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_multi_head_attention_is_linear_layers_and_attention(
    padding: Tensor | None, norm_first: bool, activation: str
) -> None:
    """The encoder layer, whose fast path must not bypass the trace, is what its parts are, written out."""
    layer = nn.TransformerEncoderLayer(E, HEADS, 16, norm_first=norm_first, activation=activation, batch_first=True)
    nn.init.normal_(layer.self_attn.in_proj_bias)
    for norm in (layer.norm1, layer.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)

    def attend(core: Any, x: Tensor) -> Tensor:
        attn = core.self_attn
        weights, biases = attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3)
        q, k, v = (heads(F.linear(x, w, b)) for w, b in zip(weights, biases, strict=True))
        scores = q / 2 @ k.transpose(2, 3)
        scores = scores if padding is None else scores.masked_fill(padding[:, None, None], -torch.inf)
        out = (scores.softmax(3) @ v).transpose(1, 2).reshape(N, L, E)
        return F.linear(out, attn.out_proj.weight, attn.out_proj.bias)

    def written_out(core: Any, x: Tensor) -> Tensor:
        act = getattr(F, activation)
        if norm_first:
            x = x + attend(core, core.norm1(x))
            return x + core.linear2(act(core.linear1(core.norm2(x))))
        x = core.norm1(x + attend(core, x))
        return core.norm2(x + core.linear2(act(core.linear1(x))))

    x = torch.randn(N, L, E)
    mask = {} if padding is None else {"src_key_padding_mask": padding}
    result = compare_outputs(Model(lambda core, x: core(x, **mask), layer), x)
    tolerance = 1e-4 if padding is not None else 1e-9  # the stabiliser counts once more where a mask is added
    close(result, compare_outputs(Model(written_out, layer), x), tolerance)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoders_and_decoders(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(E, HEADS, 16, norm_first=norm_first, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    compare_outputs(Model(lambda core, x: core(x), encoder))
    compare_outputs(Model(lambda core, x: core(x, src_key_padding_mask=PADDING), encoder))
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    compare_outputs(Model(lambda core, x: core(x, mask=mask, is_causal=True), encoder))
    whole = nn.Transformer(E, HEADS, 1, 1, 16, norm_first=norm_first, batch_first=True)
    compare_outputs(Model(lambda core, x: core(x, x[:, :3]), whole))


def test_encoder_with_lrp_0_is_gradient_x_input_of_the_surrogate() -> None:
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(E, HEADS, 16, activation="gelu", batch_first=True)
    model = Model(lambda core, x: core[1](core[0](x).mean(1)), nn.Sequential(layer, nn.Linear(E, 3)))
    x = torch.randn(N, L, E)
    close(explain(model, x, 1, composite="lrp_0"), lrp_0_of_surrogate(model, x, 1))


# Gated and bilinear layers


def test_glu_is_a_signal_with_a_gate() -> None:
    x, R = torch.randn(N, 3, E), torch.randn(N, 3, E // 2)
    result = relevance(Model(lambda _, x: F.glu(x)), x, R)
    assert torch.equal(result[..., : E // 2], R)
    assert not bool(result[..., E // 2 :].any())


def test_bilinear_layer() -> None:
    layer = nn.Bilinear(E, E, 3, bias=False)
    x = torch.randn(N, E)

    def surrogate(x: Tensor) -> Tensor:
        return half_each(layer, x, x)

    leaf = x.clone().requires_grad_()
    expected = x * torch.autograd.grad(surrogate(leaf)[:, 0].sum(), leaf)[0]
    close(explain(Model(lambda core, x: core(x, x), layer), x, 0, composite="lrp_0"), expected)
