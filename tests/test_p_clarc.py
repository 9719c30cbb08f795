"""P-ClArC against the projection that it stands for, folded into weights and wrapped around a model; reactive too."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from cheating import NORMALIZER, SIDE, N, World
from torch import Tensor, nn

from spray import explain
from spray.correction import CORRECTIONS, Finding, Options, Projected, Projection
from spray.correction.axes import fit_axes
from spray.correction.choice import find_places
from spray.correction.layers import activations, candidates, changed, feature_layer, output_layer, upstream
from spray.data.base import Normalizer
from spray.errors import UserError
from spray.isolation.candidate import Artifact
from spray.models.small_cnn import SmallCNN


@pytest.fixture(scope="module")
def world() -> World:
    return World()


class Double(Normalizer):
    """Normalises into float64."""

    def __call__(self, pixels: Tensor, device: torch.device | str | None = None) -> Tensor:
        return super().__call__(pixels, device).double()


DOUBLE = Double([0.3], [0.3])
LAST = Options(layer="output", strength=1.0)


def project(a: Tensor, axes: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The nearest point at which all h·a' = z⁻: by Lagrange's conditions, one sample after the other."""
    H, z = torch.stack([h for h, _ in axes]), torch.stack([z for _, z in axes])
    k, d = H.shape
    system = torch.zeros(d + k, d + k, dtype=a.dtype)
    system[:d, :d], system[:d, d:], system[d:, :d] = torch.eye(d), H.T, H
    return torch.stack([torch.linalg.solve(system, torch.cat([row, z]))[:d] for row in a])


def slow_axis(a: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    h = ((a - a.mean(0)) * (t - t.mean())[:, None]).mean(0) / t.var(unbiased=False)
    h = h / h.norm()
    return h, (a[t == 0] @ h).mean()


def axis_at(world: World, model: nn.Module, samples: np.ndarray, inner: nn.Module) -> tuple[Tensor, Tensor]:
    members = np.flatnonzero(world.train.labels == 2)
    with torch.no_grad():
        a = inner(DOUBLE(world.train.batch(members)))
    return slow_axis(a, torch.from_numpy(np.isin(members, samples)).double())


def some(n: int = 20) -> Tensor:
    return torch.randn(n, 1, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_in_front_of_the_last_layer_it_is_other_weights(world: World) -> None:
    original = copy.deepcopy(world.model).double()
    problem = world.problem(model=copy.deepcopy(original), normalizer=DOUBLE, options=LAST)
    folded = CORRECTIONS.get("p_clarc")(problem)
    x = some(50)
    h, z = axis_at(world, original, world.samples, original[:-1])
    with torch.no_grad():
        a = original[:-1](x)
        expected = original[-1](a + (z - a @ h)[:, None] * h)
        torch.testing.assert_close(folded(x), expected, atol=1e-9, rtol=0)
        assert (folded(x) - original(x)).abs().max() > 0.01
    assert not isinstance(folded, Projected)
    # Nothing before the last layer changes, and what lies along h no longer counts.
    assert torch.equal(folded[1].weight, original[1].weight)
    assert (folded[-1].weight @ h).abs().max() < 1e-12


@pytest.mark.parametrize("layer", ["0", "1", "2", "3:in", "output"])
def test_several_artifacts_are_projected_out_at_once_in_any_layer(world: World, layer: str) -> None:
    original = copy.deepcopy(world.model).double()
    other = np.flatnonzero(world.train.labels == 2)[:25]
    findings = [world.finding, replace(world.finding, samples=other)]
    options = Options(layer=layer, strength=1.0)
    problem = world.problem(model=copy.deepcopy(original), normalizer=DOUBLE, findings=findings, options=options)
    corrected = CORRECTIONS.get("p_clarc")(problem)
    # What is given to a linear layer becomes weights; in front of the ReLU no weights would do.
    assert isinstance(corrected, Projected) == (layer == "1")
    n_inner = {"0": 1, "1": 2}.get(layer, 3)
    inner, rest = original[:n_inner], original[n_inner:]
    axes = [axis_at(world, original, samples, inner) for samples in (world.samples, other)]
    x = some()
    with torch.no_grad():
        projected = project(inner(x), axes)
        for h, z in axes:
            torch.testing.assert_close(projected @ h, z.expand(len(x)), atol=1e-8, rtol=0)
        torch.testing.assert_close(corrected(x), rest(projected), atol=1e-7, rtol=0)


@pytest.mark.parametrize("pooling", ["full", "max"])
def test_afterwards_the_activations_along_every_direction_are_those_of_clean_samples(pooling: str) -> None:
    model, problem = convolutional(Options(layer="features.4", pooling=pooling, directions=3, strength=1.0))
    corrected = CORRECTIONS.get("p_clarc")(problem)
    assert isinstance(corrected, Projected)
    axes = fit_axes(problem, problem.findings[0], "features.4", pooling == "max")
    assert axes.directions.shape[0] == 3
    seen: list[Tensor] = []
    # What the next module is given is what has been projected.
    with changed(corrected.model, "features.5:in", seen.append), torch.no_grad():
        corrected(torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(1)))
    a = seen[0].flatten(1) if pooling == "full" else seen[0].movedim(1, -1)
    along = a @ axes.directions.T
    torch.testing.assert_close(along, axes.clean.expand_as(along), atol=1e-4, rtol=1e-4)
    before = activations(model, "features.4", torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(1)))
    assert (before - seen[0]).abs().max() > 0.01


def convolutional(options: Options) -> tuple[nn.Module, object]:
    """A convolutional network, not trained, and images of which some of class 1 have a white corner."""
    world = World.__new__(World)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 120, (60, 1, 16, 16), dtype=np.uint8)
    labels = np.arange(60) % 2
    samples = np.flatnonzero(labels == 1)[::2]
    images[samples, :, :5, :5] = 255
    from spray.data.arrays import ArrayDataset

    world.train = ArrayDataset(images, labels, ("a", "b"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        world.model = SmallCNN(1, 2, width=4).eval()
    mask = torch.zeros(16, 16)
    mask[:5, :5] = 1
    artifact = Artifact(mask, mask[None].clone(), torch.zeros(4, 2, dtype=torch.int64), 0.5, 1, True)
    world.finding = Finding(artifact, 1, samples)
    return world.model, world.problem(options=options)


def test_axes_of_channels_are_those_of_pooled_activations() -> None:
    model, problem = convolutional(Options())
    finding = problem.findings[0]
    axes = fit_axes(problem, finding, "features.4", True)
    members = np.flatnonzero(problem.train.labels == 1)
    a = activations(model, "features.4", NORMALIZER(problem.train.batch(members))).double()
    t = np.isin(members, finding.samples)
    pooled = a.amax(dim=(2, 3)).numpy()
    h = pooled[t].mean(0) - pooled[~t].mean(0)
    h /= np.linalg.norm(h)
    np.testing.assert_allclose(axes.directions[0].numpy(), h, atol=1e-5)
    everywhere = np.einsum("nchw,c->nhw", a.numpy(), h)
    np.testing.assert_allclose(axes.clean[0], everywhere[~t].mean(), atol=1e-4)
    np.testing.assert_allclose(axes.marked[0], everywhere[t].mean(), atol=1e-4)


def test_it_is_the_same_for_every_batch_size_and_trains_nothing(world: World) -> None:
    made = [CORRECTIONS.get("p_clarc")(world.problem(batch_size=size, options=LAST)) for size in (7, 500)]
    torch.testing.assert_close(made[0][-1].weight, made[1][-1].weight)
    torch.testing.assert_close(made[0][-1].bias, made[1][-1].bias)


@pytest.mark.parametrize(
    "last",
    [
        [nn.Linear(32, 3), nn.Softmax(1)],
        [nn.Unflatten(1, (32, 1, 1)), nn.Conv2d(32, 3, 1), nn.Flatten()],
        [nn.Linear(32, 3, bias=False)],
    ],
)
def test_models_without_a_last_layer_to_fold_into_are_corrected_too(world: World, last: list) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, 32), nn.ReLU(), *last).eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for p in model.parameters():
            nn.init.normal_(p, std=0.1)
    options = Options(layer="2", strength=1.0)
    corrected = CORRECTIONS.get("p_clarc")(world.problem(model=copy.deepcopy(model), options=options))
    x = some(9).float()
    axes = fit_axes(world.problem(model=model), world.finding, "2", False)
    with torch.no_grad():
        a = model[:3](x)
        a = a + (axes.clean - a @ axes.directions.T) @ axes.directions
        torch.testing.assert_close(corrected(x), model[3:](a), atol=1e-5, rtol=0)


def test_a_layer_that_is_used_twice_is_not_folded(world: World) -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(SIDE**2, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            a = self.first(x.flatten(1))
            return self.head(a + self.second(a).relu())

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Skip().eval()
    corrected = CORRECTIONS.get("p_clarc")(world.problem(model=copy.deepcopy(model), options=Options(layer="first")))
    assert isinstance(corrected, Projected)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), corrected.model.parameters(), strict=True))


def test_reactive_changes_only_samples_for_which_its_condition_fires(world: World) -> None:
    options = Options(layer="1", strength=1.0)
    corrected = CORRECTIONS.get("reactive_p_clarc")(world.problem(options=options))
    always = CORRECTIONS.get("p_clarc")(world.problem(options=options))
    clean, attacked = (NORMALIZER(data.batch(np.arange(N))) for data in (world.clean, world.attacked))
    with torch.no_grad():
        same = (corrected(clean) == world.model(clean)).all(dim=1)
        assert same.float().mean() > 0.95, "hardly any clean image has the artifact"
        changed_ = torch.isclose(corrected(attacked), always(attacked), atol=1e-5).all(dim=1)
        assert changed_.float().mean() > 0.95
        # Nothing in between: every sample gets one or the other.
        both = torch.stack([corrected(clean) - world.model(clean), corrected(clean) - always(clean)]).abs().amax(2)
        assert both.amin(0).max() < 1e-5


def test_half_a_strength_goes_half_of_the_way() -> None:
    a, H = torch.randn(5, 6), torch.linalg.qr(torch.randn(6, 2)).Q.T
    z = torch.tensor([0.5, -1.0])
    whole, half = (Projection("x", H, z, strength=s)(a) for s in (1.0, 0.5))
    torch.testing.assert_close(half, (a + whole) / 2)


def test_a_wrapped_model_can_be_explained_trained_and_copied(world: World) -> None:
    corrected = CORRECTIONS.get("p_clarc")(world.problem(options=Options(layer="1")))
    x = NORMALIZER(world.attacked.batch(np.arange(6)))
    # A piecewise linear network: LRP-0 is gradient times input.
    R = explain(corrected, x, 2, composite="lrp_0")
    torch.testing.assert_close(R, explain(corrected, x, 2, "gradient_x_input"), atol=1e-4, rtol=1e-3)
    inside = [float(explain(m, x, 2).abs()[:, :, 1:4, 1:4].sum()) for m in (world.model, corrected)]
    assert inside[1] < 0.7 * inside[0]
    twin = copy.deepcopy(corrected)
    twin(x).sum().backward()
    assert all(p.grad is not None for p in twin.model.parameters())
    assert not list(twin.model[1]._forward_hooks)


def test_the_model_inside_is_left_alone_when_it_fails(world: World) -> None:
    corrected = CORRECTIONS.get("p_clarc")(world.problem(options=Options(layer="1")))
    with pytest.raises(RuntimeError):
        corrected(torch.rand(2, 1, 3, 3))
    assert not any(module._forward_hooks for module in corrected.modules())


def test_without_enough_samples_of_its_class_others_stand_in_and_one_line_says_if_there_are_none(world: World) -> None:
    everyone = np.flatnonzero(world.train.labels == 2)
    axes = fit_axes(world.problem(), replace(world.finding, samples=everyone), "2", False)
    a = activations(world.model, "2", NORMALIZER(world.train.batch(np.arange(N)))).double()
    t = torch.from_numpy(world.train.labels == 2)
    h = torch.nn.functional.normalize(a[t].mean(0) - a[~t].mean(0), dim=0)
    torch.testing.assert_close(axes.directions[0].double(), h, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="1 samples with it") as error:
        fit_axes(world.problem(), replace(world.finding, samples=everyone[:1]), "2", False)
    assert "\n" not in str(error.value)


def test_samples_of_other_classes_do_not_count(world: World) -> None:
    stray = replace(world.finding, samples=np.concatenate([world.samples, np.flatnonzero(world.train.labels == 0)]))
    first, second = (fit_axes(world.problem(), finding, "2", False) for finding in (world.finding, stray))
    torch.testing.assert_close(first.directions, second.directions)


def test_the_output_layer_is_found_behind_others() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(100, 3), nn.Linear(3, 3), nn.Dropout()).eval()
    assert output_layer(model, torch.rand(2, 1, SIDE, SIDE)) == "2"
    assert output_layer(nn.Sequential(nn.Flatten(), nn.Linear(100, 3), nn.ReLU()), torch.rand(2, 1, 10, 10)) is None


def test_layers_to_choose_among_are_in_order_and_all_different() -> None:
    model, x = SmallCNN(1, 3, 4).eval(), torch.rand(2, 1, 16, 16)
    layers = candidates(model, x)
    assert layers[-1] == "classifier.3:in"
    assert 2 <= len(layers) <= 6
    values = [activations(model, layer, x).flatten() for layer in layers]
    for i, one in enumerate(values):
        assert all(one.shape != other.shape or not torch.equal(one, other) for other in values[:i])
    assert feature_layer(model, x) in ("classifier.1", "classifier.2")
    places = list(find_places(convolutional(Options())[1]))
    assert ("features.4", True) in places
    assert ("features.4", False) in places
    assert ("classifier.3:in", True) not in places


def test_what_comes_before_a_layer() -> None:
    model, x = SmallCNN(1, 3, 4), torch.rand(2, 1, 16, 16)
    model.features[0].bias.requires_grad_(False)
    parameters, modules = upstream(model, "features.4", x)
    assert {id(p) for p in parameters} == {id(p) for i in (0, 3) for p in model.features[i].parameters()}
    assert set(modules) == set(model.features[:5])
    assert not model.features[0].bias.requires_grad
    assert model.classifier[0].weight.requires_grad


@pytest.mark.parametrize(
    ("layer", "words"), [("clasifier.3", "did you mean 'classifier.3'"), ("nothing", "named_modules"), ("", "no layer")]
)
def test_a_layer_that_does_not_exist(layer: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        activations(SmallCNN(1, 3), layer, torch.rand(1, 1, 16, 16))
