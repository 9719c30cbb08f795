"""Models of whole numbers: a token's relevance is that of its embedding, which the same model gives from there on."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spray.errors import UserError
from spray.lrp import Composite, Epsilon, build_composite, propagate

N, L, V, E = 3, 4, 7, 5
COMPOSITE = Composite(Epsilon(0.01), Epsilon(0.01), stabilizer=0.01)
pytestmark = pytest.mark.usefixtures("double")


@pytest.fixture
def double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Classifier(nn.Module):
    """Takes tokens through a function to embeddings, and these to logits."""

    def __init__(self, tokens=lambda ids: ids, **options) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, E, **options)
        self.core = nn.LSTM(E, 6, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 2)
        self.tokens = tokens
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits(self.embedding(self.tokens(ids)))

    def logits(self, e: Tensor) -> Tensor:
        return self.head(self.core(e)[0].mean(1))


class FromEmbeddings(nn.Module):
    """The part of a classifier after its embeddings, whose only affine layers aren't the first."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model.eval()
        self.eval()

    def forward(self, e: Tensor) -> Tensor:
        return self.model.logits(e)


def numbers(*shape: int) -> Tensor:
    return torch.randint(1, V, shape)


def explained(model: nn.Module, x: Tensor, composite: Composite = COMPOSITE) -> Tensor:
    return propagate(model, x, composite, lambda output: output.detach())


def of_embeddings(model: Classifier, ids: Tensor) -> Tensor:
    """The relevance of tokens, from that of their embeddings."""
    return explained(FromEmbeddings(model), model.embedding(ids).detach()).sum(-1)


def close(result: Tensor, expected: Tensor) -> None:
    assert result.is_floating_point()
    assert bool((expected != 0).any())
    torch.testing.assert_close(result.double(), expected.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_tokens_get_their_embeddings_relevance(dtype):
    model, ids = Classifier(padding_idx=0), numbers(N, L).to(dtype)
    result = explained(model, ids)
    assert result.shape == ids.shape
    close(result, of_embeddings(model, ids))
    both = propagate(model, ids, COMPOSITE, lambda z: torch.stack([z.detach(), torch.ones_like(z)]))
    assert both.shape == (2, N, L)
    close(both[0], result)


def test_rules_for_pixels_are_not_for_embeddings():
    model, ids = Classifier(), numbers(N, L)
    flat = build_composite("epsilon_plus_flat", model, epsilon=0.01)
    plain = build_composite("epsilon_plus", model, epsilon=0.01)
    model.core = nn.Identity()
    model.head = nn.Linear(E, 2)
    model.logits = lambda e: model.head(e).mean(1)
    assert bool((explained(model, ids, plain).std(1) > 0).all())
    assert torch.equal(explained(model, ids, flat), explained(model, ids, plain))


# What may happen to the numbers before they are looked up, and how often a token then occurs
WAYS = {
    "view": lambda ids: ids.view(-1).view(N, L),
    "transpose": lambda ids: ids.t().contiguous().T,
    "reversed": lambda ids: ids.flip(1),
    "part": lambda ids: ids[:, 1:],
    "chosen": lambda ids: ids[:, torch.tensor([2, 0, 0])],
    "gathered": lambda ids: ids.gather(1, torch.zeros_like(ids)),
    "begun": lambda ids: torch.cat([torch.ones(len(ids), 1, dtype=ids.dtype), ids], 1),
    "padded": lambda ids: F.pad(ids, (0, 2), value=3),
    "halves": lambda ids: torch.cat(ids.chunk(2, 1)[::-1], 1),
    "twice": lambda ids: torch.cat([ids, ids], 1),
    "iterated": lambda ids: torch.stack(list(ids)),
    "sorted": lambda ids: ids.sort(1).values,
    "masked": lambda ids: ids.masked_fill(ids == 3, 0),
    "chosen by condition": lambda ids: torch.where(ids > 3, ids, torch.ones_like(ids)),
    "converted": lambda ids: ids.int().to(torch.int64).clone().detach(),
    "shifted": lambda ids: (ids + torch.arange(L)) % V,
    "clamped in place": lambda ids: ids.clone().clamp_(2, 5),
    "shifted in place": lambda ids: [c := ids.clone(), c.sub_(1)][0],
    "renumbered": lambda ids: torch.arange(V).flip(0)[ids],
    "times a mask": lambda ids: ids * (ids != 3),
}


@pytest.mark.parametrize("way", WAYS)
def test_numbers_are_followed(way):
    model, plain, ids = Classifier(WAYS[way]), Classifier(), numbers(N, L)
    plain.load_state_dict(model.state_dict())
    looked_up = WAYS[way](ids.clone())
    expected = of_embeddings(plain, looked_up)
    # Where each of them came from: the way of the positions, if the way isn't by value.
    back = torch.zeros(N, L)
    for sample in range(N):
        for place in range(expected.shape[1]):
            origin = origins(way, ids)[sample, place]
            if origin >= 0:
                back[sample, origin] += expected[sample, place]
    close(explained(model, ids), back)


def origins(way: str, ids: Tensor) -> Tensor:
    """For each number that is looked up the place in its sample where it came from, -1 for a constant."""
    places = torch.arange(L).expand(N, L)
    match way:
        case "sorted":
            return ids.sort(1).indices
        case "masked":
            return places.masked_fill(ids == 3, -1)
        case "chosen by condition":
            return torch.where(ids > 3, places, -1)
        case "begun":
            return torch.cat([torch.full((N, 1), -1), places], 1)
        case "padded":
            return F.pad(places, (0, 2), value=-1)
        case "reversed" | "part" | "chosen" | "gathered" | "halves" | "twice":
            return WAYS[way](places)
    return places


def test_change_through_a_view_is_refused():
    def change(ids: Tensor) -> Tensor:
        ids[:, 1:].clamp_(max=2)
        return ids

    with pytest.raises(UserError, match="changed in place through one of its views"):
        explained(Classifier(change), numbers(N, L))


def test_table_that_is_indexed_is_an_embedding():
    model, ids = Classifier(), numbers(N, L)
    expected = explained(model, ids)
    weight = model.embedding.weight
    lookups = {
        "index": lambda ids: weight[ids],
        "index_select": lambda ids: weight.index_select(0, ids.flatten()).view(*ids.shape, -1),
        "torch.embedding": lambda ids: torch.embedding(weight, ids),
        "one hot": lambda ids: F.one_hot(ids, V).to(weight.dtype) @ weight,
    }
    for name, look_up in lookups.items():
        model.forward = lambda ids, look_up=look_up: model.logits(look_up(ids))
        torch.testing.assert_close(
            explained(model, ids), expected, rtol=1e-3 if name == "one hot" else 1e-6, atol=0.05 * (name == "one hot")
        )


def test_masks_and_lengths_are_constants():
    class Masked(Classifier):
        def forward(self, ids: Tensor) -> Tensor:
            mask = (ids != 1).to(self.embedding.weight.dtype)
            length = (ids != 1).sum(1, keepdim=True)
            places = torch.arange(ids.shape[1]).expand_as(ids)
            assert ids.max() < V
            e = self.embedding(ids) * mask.unsqueeze(-1) + self.embedding(places)
            return self.head(self.core(e)[0].sum(1) / length)

    model, ids = Masked(), numbers(N, L)
    ids[:, 0], ids[:, -1] = 2, 1
    result = explained(model, ids)
    assert not result[ids == 1].any()
    assert bool((result[ids != 1] != 0).all())


def test_numbers_are_signals_where_they_are_computed_with():
    linear = nn.Linear(L, 2)

    class Tabular(nn.Module):
        def __init__(self, convert) -> None:
            super().__init__()
            self.linear, self.convert = linear, convert

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.convert(x))

    x = numbers(N, L)
    expected = explained(linear, x.double())
    close(explained(Tabular(lambda x: x.double()).eval(), x), expected)
    close(explained(Tabular(lambda x: x.to(linear.weight)).eval(), x), expected)
    close(explained(Tabular(lambda x: x / 1).eval(), x), expected)
    close(explained(Tabular(lambda x: 0.5 * x * 2.0).eval(), x), expected)


@pytest.mark.parametrize(
    "tokens",
    [
        lambda ids: ids.cumsum(1) % V,
        lambda ids: (ids * ids.flip(1)) % V,
        lambda ids: ids.sum(1, keepdim=True) % V,
        lambda ids: torch.bucketize(ids, torch.arange(V)),
    ],
)
def test_numbers_of_several_numbers_are_refused(tokens):
    with pytest.raises(UserError, match=r"can't follow .* of the model's integer input"):
        explained(Classifier(tokens), numbers(N, L))


@pytest.mark.parametrize("padding_idx", [None, 3, -1])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bag_is_the_sum_of_its_embeddings(mode, padding_idx):
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(V, E)
            self.head = nn.Linear(E, 2)

        def forward(self, ids: Tensor) -> Tensor:
            self.output = self.head(F.embedding_bag(ids, self.bag.weight, mode=mode, padding_idx=padding_idx))
            return self.output

    model, ids = Bag().eval(), numbers(N, L)
    ids[0, :2] = 3 if padding_idx is None else padding_idx % V
    seen = []
    R = propagate(model, ids, COMPOSITE, lambda z: seen.append(z.detach().clone()) or z.detach())
    torch.testing.assert_close(seen[0], model(ids))
    weight, head = model.bag.weight.detach(), model.head
    kept = torch.ones_like(ids) if padding_idx is None else (ids != padding_idx % V).long()
    parts = weight[ids] * kept[..., None] / (kept.sum(1)[:, None, None] if mode == "mean" else 1)
    total = parts.sum(1)
    of_total = explained(head, total)
    sign = torch.where(total < 0, -0.01, 0.01)
    close(R, (parts * (of_total / (total + sign))[:, None]).sum(-1))


def test_refusals_of_bags():
    class Bag(nn.Module):
        def __init__(self, **options) -> None:
            super().__init__()
            self.bag, self.options = nn.EmbeddingBag(V, E, mode="max"), options

        def forward(self, ids: Tensor) -> Tensor:
            return self.bag(ids)

    with pytest.raises(UserError, match=r"mode 'max'.*bag"):
        explained(Bag().eval(), numbers(N, L))
    ids, model = numbers(N * L), nn.EmbeddingBag(V, E, mode="sum").eval()
    model.forward = lambda ids: F.embedding_bag(ids, model.weight, torch.arange(0, N * L, L), mode="sum")
    with pytest.raises(UserError, match="offsets"):
        explained(model, ids)


def test_rows_of_a_signal_are_moved():
    class Graph(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.embedding(torch.tensor([1, 1, 0]), x)

    x = torch.randn(N, E)
    result = explained(Graph().eval(), x)
    torch.testing.assert_close(result, torch.stack([x[0], 2 * x[1], 0 * x[2]]))


def test_model_with_a_greatest_norm_stays_as_it_is():
    model = Classifier(max_norm=0.1)
    before = copy.deepcopy(model.state_dict())
    explained(model, numbers(N, L))
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name])


def test_input_stays_as_it_is():
    ids = numbers(N, L)
    given = ids.clone()
    explained(Classifier(lambda ids: ids.sub_(1)), ids)
    assert torch.equal(ids, given)
