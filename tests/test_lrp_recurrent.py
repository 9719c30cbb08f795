"""Recurrent layers and embeddings under LRP against loops over samples, steps and matrices in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from spray.errors import UserError
from spray.lrp import Composite, Epsilon, Flat, Gamma, Rule, ZPlus, build_composite, propagate
from spray.lrp import recurrent as recurrent  # registers its handlers

N, L, D, H = 3, 4, 5, 6
EPSILON = 0.01
KINDS = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn_tanh": nn.RNN,
    "rnn_relu": lambda *args, **kwargs: nn.RNN(*args, nonlinearity="relu", **kwargs),
}
CELLS = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "rnn_tanh": nn.RNNCell,
    "rnn_relu": lambda *args, **kwargs: nn.RNNCell(*args, nonlinearity="relu", **kwargs),
}
pytestmark = pytest.mark.usefixtures("double")


@pytest.fixture
def double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Model(nn.Module):
    """A recurrent layer, of whose results a function is the output."""

    def __init__(self, core: nn.Module, read=lambda result: result[0], state=None) -> None:
        super().__init__()
        self.core, self.read, self.state = core.eval(), read, state
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.output = self.read(self.core(x) if self.state is None else self.core(x, self.state))
        return self.output


def wide(core: nn.Module) -> nn.Module:
    """A layer with weights so large that its gates are neither open nor shut."""
    for parameter in core.parameters():
        nn.init.normal_(parameter, std=0.8)
    return core


def relevance(model: nn.Module, x: Tensor, R: Tensor, composite: Composite | None = None) -> Tensor:
    """The relevance of x where R is the model's output's."""
    composite = composite or Composite(Epsilon(EPSILON), Epsilon(EPSILON), stabilizer=EPSILON)
    return propagate(model, x, composite, lambda output: R)


# The oracle: Arras et al. 2017, one sample, one step, one neuron at a time


def stabilized(z: Tensor) -> Tensor:
    return z + EPSILON * torch.where(z < 0, -1.0, 1.0)


def share(rule: Rule, W: Tensor, b: Tensor, a: Tensor, R: Tensor) -> Tensor:
    """What the inputs of one layer get of its outputs' relevance, from the matrix of the contributions."""
    C = W * a
    match rule:
        case Epsilon():
            P = C / stabilized(C.sum(1) + b)[:, None]
        case ZPlus():
            P = C.clamp(min=0) / (C.clamp(min=0).sum(1) + b.clamp(min=0) + 1e-6)[:, None]
        case Gamma():
            z = C.sum(1) + b
            favoured = torch.where(z[:, None] > 0, C.clamp(min=0), C.clamp(max=0))
            bias = torch.where(z > 0, b.clamp(min=0), b.clamp(max=0))
            denominator = z + rule.gamma * (favoured.sum(1) + bias)
            P = (C + rule.gamma * favoured) / (denominator + 1e-6 * torch.where(denominator < 0, -1, 1))[:, None]
        case Flat():
            P = torch.full_like(C, 1 / C.shape[1])
    return R @ P


def weights(core: nn.Module, suffix: str = "_l0") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    names = [f"{name}{suffix}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    W, V = (getattr(core, name).detach() for name in names[:2])
    b, d = (getattr(core, name, None) for name in names[2:])
    zero = W.new_zeros(len(W))
    return W, V, zero if b is None else b.detach(), zero if d is None else d.detach()


def oracle(
    kind: str, parameters: tuple[Tensor, ...], x: Tensor, R: Tensor, state: tuple[Tensor, ...], rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (L, H), relevance of x (L, D) and of the initial state, of one sample whose outputs have relevance R."""
    W, V, b, d = parameters
    n = V.shape[1]
    rows = [slice(k * n, (k + 1) * n) for k in range(len(W) // n)]

    def pre(k: int, x: Tensor, h: Tensor) -> Tensor:
        return W[rows[k]] @ x + b[rows[k]] + V[rows[k]] @ h + d[rows[k]]

    h, c = state[0], state[-1]
    steps, hs = [], []
    for x_t in x:
        a = torch.cat([x_t, h])
        if kind == "lstm":
            i, f, o = (torch.sigmoid(pre(k, x_t, h)) for k in (0, 1, 3))
            g = torch.tanh(pre(2, x_t, h))
            steps.append((a, i * g, f * c, torch.cat([W, V], 1)[rows[2]], (b + d)[rows[2]]))
            c = i * g + f * c
            h = o * torch.tanh(c)
        elif kind == "gru":
            r, z = (torch.sigmoid(pre(k, x_t, h)) for k in (0, 1))
            weight = torch.cat([W[rows[2]], r[:, None] * V[rows[2]]], 1)
            bias = b[rows[2]] + r * d[rows[2]]
            g = torch.tanh(weight @ a + bias)
            steps.append((a, (1 - z) * g, z * h, weight, bias))
            h = (1 - z) * g + z * h
        else:
            activation = torch.tanh if kind == "rnn_tanh" else torch.relu
            steps.append((a, None, None, torch.cat([W, V], 1), b + d))
            h = activation(pre(0, x_t, h))
        hs.append(h)
    R_x = torch.zeros_like(x)
    R_h, R_c = torch.zeros(n), torch.zeros(n)
    for t in reversed(range(len(x))):
        a, new, old, weight, bias = steps[t]
        R_h = R_h + R[t]
        if kind == "lstm":
            R_c = R_c + R_h
            R_g, R_c = R_c * new / stabilized(new + old), R_c * old / stabilized(new + old)
            kept = 0
        elif kind == "gru":
            R_g, kept = R_h * new / stabilized(new + old), R_h * old / stabilized(new + old)
        else:
            R_g, kept = R_h, 0
        R_a = share(rule, weight, bias, a, R_g)
        R_x[t], R_h = R_a[: x.shape[1]], R_a[x.shape[1] :] + kept
    return torch.stack(hs), R_x, R_h


def oracle_of_batch(kind, core, x, R, state=None, rule=None, suffix="_l0"):
    """The oracle for x (N, L, D); the state of a layer is (N, H) each."""
    state = state or (torch.zeros(len(x), core.hidden_size),) * (2 if kind == "lstm" else 1)
    parameters = weights(core, suffix)
    found = [
        oracle(kind, parameters, x[k], R[k], tuple(s[k] for s in state), rule or Epsilon(EPSILON))
        for k in range(len(x))
    ]
    return [torch.stack(parts) for parts in zip(*found, strict=True)]


@pytest.mark.parametrize("rule", [Epsilon(EPSILON), ZPlus(), Gamma(0.25)], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_relevance_is_that_of_the_loop(kind, bias, rule):
    core = wide(KINDS[kind](D, H, batch_first=True, bias=bias))
    x, R = torch.randn(N, L, D), torch.randn(N, L, H)
    model = Model(core)
    result = relevance(model, x, R, Composite(Epsilon(), rule, stabilizer=EPSILON))
    output, expected, _ = oracle_of_batch(kind, core, x, R, rule=rule)
    torch.testing.assert_close(core(x)[0], output)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_constant_initial_state_takes_its_share(kind):
    core = wide(KINDS[kind](D, H, batch_first=True))
    x, R = torch.randn(N, L, D), torch.randn(N, L, H)
    states = tuple(torch.randn(1, N, H) for _ in range(2 if kind == "lstm" else 1))
    result = relevance(Model(core, state=states if kind == "lstm" else states[0]), x, R)
    torch.testing.assert_close(result, oracle_of_batch(kind, core, x, R, tuple(s[0] for s in states))[1])


@pytest.mark.parametrize("kind", KINDS)
def test_initial_state_that_is_the_input_gets_relevance(kind):
    core = wide(KINDS[kind](D, H, batch_first=True))
    x, h, R = torch.randn(N, L, D), torch.randn(1, N, H), torch.randn(N, L, H)
    c = torch.randn(1, N, H)

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = core

        def forward(self, h: Tensor) -> Tensor:
            return self.core(x, (h, c) if kind == "lstm" else h)[0]

    result = relevance(Decoder().eval(), h, R)
    state = (h[0], c[0]) if kind == "lstm" else (h[0],)
    torch.testing.assert_close(result[0], oracle_of_batch(kind, core, x, R, state)[2])


@pytest.mark.parametrize("kind", KINDS)
def test_cell_in_a_loop_is_the_layer(kind):
    layer = wide(KINDS[kind](D, H, batch_first=True))
    cell = CELLS[kind](D, H)
    cell.load_state_dict({name.removesuffix("_l0"): t for name, t in layer.state_dict().items()})

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell

        def forward(self, x: Tensor) -> Tensor:
            state, outputs = None, []
            for t in range(x.shape[1]):
                state = self.cell(x[:, t], state)
                outputs.append(state[0] if isinstance(state, tuple) else state)
            return torch.stack(outputs, 1)

    x, R = torch.randn(N, L, D), torch.randn(N, L, H)
    torch.testing.assert_close(relevance(Loop().eval(), x, R), relevance(Model(layer), x, R))


OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "batch first": {"batch_first": True},
    "two layers, two directions": {"num_layers": 2, "bidirectional": True},
    "dropout": {"num_layers": 3, "dropout": 0.5},
    "projections": {"num_layers": 2, "bidirectional": True, "proj_size": 2, "batch_first": True},
    "projections without bias": {"proj_size": 2, "bias": False},
}


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    ("kind", "options"), [(k, o) for o in OPTIONS for k in KINDS if k == "lstm" or "projections" not in o]
)
def test_forward_is_torchs_own(kind, options, batched):
    core = wide(KINDS[kind](D, H, **OPTIONS[options])).eval()

    def read(result) -> Tensor:
        states = result[1] if isinstance(result[1], tuple) else (result[1],)
        return torch.cat([t.flatten() for t in (result[0], *states)])[None]

    model = Model(core, read)
    x = torch.randn(L, N, D) if batched else torch.randn(L, D)
    expected = model(x).detach()
    seen = []

    def initial(output: Tensor) -> Tensor:
        seen.append(output.detach().clone())
        return output.detach()

    result = propagate(model, x, Composite(), initial)
    torch.testing.assert_close(seen[0], expected)
    assert bool((result.flatten(0, -2) != 0).any(1).all())  # every step has a part in the states


@pytest.mark.parametrize("kind", KINDS)
def test_two_directions_are_two_layers(kind):
    both = wide(KINDS[kind](D, H, bidirectional=True))
    forwards, backwards = KINDS[kind](D, H), KINDS[kind](D, H)
    state = both.state_dict()
    forwards.load_state_dict({name: t for name, t in state.items() if "reverse" not in name})
    backwards.load_state_dict({name.removesuffix("_reverse"): t for name, t in state.items() if "reverse" in name})
    x, R = torch.randn(L, N, D), torch.randn(L, N, 2 * H)
    expected = relevance(Model(forwards), x, R[..., :H])
    expected += relevance(Model(backwards), x.flip(0), R[..., H:].flip(0)).flip(0)
    torch.testing.assert_close(relevance(Model(both), x, R), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_two_layers_are_one_after_the_other(kind):
    stacked = wide(KINDS[kind](D, H, num_layers=2))
    first, second = KINDS[kind](D, H), KINDS[kind](H, H)
    state = stacked.state_dict()
    first.load_state_dict({name: t for name, t in state.items() if name.endswith("0")})
    second.load_state_dict({name.replace("l1", "l0"): t for name, t in state.items() if name.endswith("1")})
    x, R = torch.randn(L, N, D), torch.randn(L, N, H)
    middle = first(x)[0].detach()
    expected = relevance(Model(first), x, relevance(Model(second), middle, R))
    torch.testing.assert_close(relevance(Model(stacked), x, R), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_last_states_are_signals(kind):
    core = wide(KINDS[kind](D, H))
    x, R = torch.randn(L, N, D), torch.randn(N, H)
    of_state = Model(core, lambda result: (result[1][0] if kind == "lstm" else result[1])[-1])
    whole = torch.zeros(L, N, H)
    whole[-1] = R
    torch.testing.assert_close(relevance(of_state, x, R), relevance(Model(core), x, whole))


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_no_gates_though_a_tanh_made_them(kind):
    core = wide(KINDS[kind](D, D))

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = core

        def forward(self, x: Tensor) -> Tensor:
            return self.core(x)[0] * x

    x, R = torch.randn(L, N, D), torch.randn(L, N, D)
    torch.testing.assert_close(relevance(Product().eval(), x, R), relevance(Model(core), x, R / 2) + R / 2)


def test_cell_state_is_an_output():
    core = wide(nn.LSTM(D, H))
    x, R = torch.randn(L, N, D), torch.randn(N, H)
    whole = torch.zeros(L, N, H)
    whole[-1] = R  # relevance that arrives at h goes to c unchanged
    result = relevance(Model(core, lambda result: result[1][1][0]), x, R)
    torch.testing.assert_close(result, relevance(Model(core), x, whole))


@pytest.mark.parametrize("kind", KINDS)
def test_relevance_is_conserved_without_biases(kind):
    core = wide(KINDS[kind](D, H, num_layers=2, bidirectional=True, bias=False))
    x = torch.randn(L, N, D)
    R = core(x)[0].detach()
    composite = Composite(Epsilon(1e-12), Epsilon(1e-12), stabilizer=1e-12)
    result = relevance(Model(core), x, R, composite)
    torch.testing.assert_close(result.sum((0, 2)), R.sum((0, 2)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_first_is_the_same_transposed(kind):
    first = wide(KINDS[kind](D, H, batch_first=True))
    last = KINDS[kind](D, H)
    last.load_state_dict(first.state_dict())
    x, R = torch.randn(N, L, D), torch.randn(N, L, H)
    result = relevance(Model(first), x, R)
    torch.testing.assert_close(relevance(Model(last), x.transpose(0, 1), R.transpose(0, 1)).transpose(0, 1), result)


@pytest.mark.parametrize("kind", KINDS)
def test_sample_alone_and_several_targets(kind):
    core = wide(KINDS[kind](D, H, batch_first=True, num_layers=2))
    x, R = torch.randn(N, L, D), torch.randn(3, N, L, H)
    result = relevance(Model(core), x, R)
    assert result.shape == (3, N, L, D)
    for target in range(3):
        torch.testing.assert_close(result[target], relevance(Model(core), x, R[target]))
    torch.testing.assert_close(result[:, 1:2], relevance(Model(core), x[1:2], R[:, 1:2]))


@pytest.mark.parametrize("kind", KINDS)
def test_rule_by_name_holds_in_every_step_and_first_in_none(kind):
    core = wide(KINDS[kind](D, H, batch_first=True))
    x, R = torch.randn(N, L, D), torch.randn(N, L, H)
    model = Model(core)
    named = build_composite({"core": Flat(), "first": ZPlus()}, model)
    named = Composite(named.convolution, named.linear, named.first, names=named.names, stabilizer=EPSILON)
    torch.testing.assert_close(relevance(model, x, R, named), oracle_of_batch(kind, core, x, R, rule=Flat())[1])
    first = Composite(Epsilon(), Epsilon(EPSILON), Flat(), last=ZPlus(), stabilizer=EPSILON)
    torch.testing.assert_close(relevance(model, x, R, first), relevance(model, x, R))


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_are_those_of_each_length(kind, enforce_sorted):
    core = wide(KINDS[kind](D, H, batch_first=True, num_layers=2, bidirectional=True)).eval()
    lengths = [4, 2, 1] if enforce_sorted else [1, 4, 2]
    h, c = torch.randn(4, N, H), torch.randn(4, N, H)

    def initial_state(*samples: slice) -> Tensor | tuple[Tensor, Tensor]:
        parts = tuple(t[:, *samples].contiguous() for t in (h, c))
        return parts if kind == "lstm" else parts[0]

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = core

        def forward(self, x: Tensor) -> Tensor:
            packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=enforce_sorted)
            output, state = self.core(packed, initial_state(slice(None)))
            state = state[0] if isinstance(state, tuple) else state
            padded, _ = pad_packed_sequence(output, batch_first=True)
            self.output = torch.cat([padded.flatten(1), state.transpose(0, 1).flatten(1)], 1)
            return self.output

    x, R = torch.randn(N, L, D), torch.randn(N, L, 2 * H)
    R_state = torch.randn(N, 4, H)
    model = Packed().eval()
    seen = []
    composite = Composite(Epsilon(EPSILON), Epsilon(EPSILON), stabilizer=EPSILON)
    start = torch.cat([R.flatten(1), R_state.flatten(1)], 1)
    result = propagate(model, x, composite, lambda output: seen.append(output.detach().clone()) or start)
    torch.testing.assert_close(seen[0], model(x))

    def read(found) -> Tensor:
        state = found[1][0] if isinstance(found[1], tuple) else found[1]
        return torch.cat([found[0].flatten(1), state.transpose(0, 1).flatten(1)], 1)

    for k, length in enumerate(lengths):
        start = torch.cat([R[k : k + 1, :length].flatten(1), R_state[k : k + 1].flatten(1)], 1)
        model = Model(core, read, initial_state(slice(k, k + 1)))
        expected = relevance(model, x[k : k + 1, :length], start)
        torch.testing.assert_close(result[k : k + 1, :length], expected)
        assert not result[k, length:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_model_is_left_untouched(kind):
    model = Model(wide(KINDS[kind](D, H, num_layers=2)))
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(L, N, D)
    relevance(model, x, torch.randn(L, N, H))
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name])
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert record_free(model)


def record_free(model: nn.Module) -> bool:
    return not any("_spray_record" in p.__dict__ for p in model.parameters())


def test_refusals():
    core = nn.LSTM(D, H, num_layers=2, dropout=0.5)
    model = Model(core)
    core.train()
    with pytest.raises(UserError, match=r"active dropout.*core"):
        relevance(model, torch.randn(L, N, D), torch.randn(L, N, H))

    class Hyper(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.rnn_tanh_cell(x, torch.zeros(len(x), D), x[0].expand(D, D), torch.eye(D))

    with pytest.raises(UserError, match="weights that depend on the input"):
        relevance(Hyper().eval(), torch.randn(N, D), torch.randn(N, D))
