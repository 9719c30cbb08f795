"""One contract for every registered correction; P-ClArC against the projection that it stands for."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spray.correction import CORRECTIONS, Problem, check_methods, pattern_cav
from spray.correction.base import CONTROL, Finding
from spray.correction.projection import direction, output_layer
from spray.data.arrays import ArrayDataset
from spray.data.base import Normalizer
from spray.errors import UserError
from spray.isolation.candidate import Artifact
from spray.training import predict, train

NORMALIZER = Normalizer([0.3], [0.3])
SIDE = 10
N = 480
WIDTH = 64


def pictures(seed: int, n: int = N) -> tuple[np.ndarray, np.ndarray]:
    """Three classes told apart, with some effort, by which part of the lower half is brighter."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    images = rng.normal(90, 45, (n, 1, SIDE, SIDE))
    for c in range(3):
        images[labels == c, :, 5:, 3 * c : 3 * c + 4] += 20
    return images.clip(0, 200).astype(np.uint8), labels


def tagged(images: np.ndarray, which: np.ndarray) -> np.ndarray:
    images = images.copy()
    images[which, :, 1:4, 1:4] = 255
    return images


class World:
    """A network that was trained on data whose class 2 has a white square in half of its images."""

    def __init__(self) -> None:
        images, labels = pictures(0)
        self.samples = np.flatnonzero(labels == 2)[::2]
        self.train = ArrayDataset(tagged(images, self.samples), labels, ("a", "b", "c"))
        images, self.labels = pictures(1)
        self.clean = ArrayDataset(images, self.labels, ("a", "b", "c"))
        self.attacked = ArrayDataset(tagged(images, np.arange(N)), self.labels, ("a", "b", "c"))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3))
        options = {"epochs": 6, "batch_size": 32, "learning_rate": 0.005, "weight_decay": 0.0, "seed": 0}
        train(self.model, self.train, NORMALIZER, **options)
        mask = torch.zeros(SIDE, SIDE)
        mask[1:4, 1:4] = 1
        artifact = Artifact(mask, mask[None].clone(), torch.zeros(4, 2, dtype=torch.int64), 0.5, 1, True)
        self.finding = Finding(artifact, 2, self.samples)

    def problem(self, **changes: object) -> Problem:
        parts: dict = {
            "model": copy.deepcopy(self.model),
            "train": self.train,
            "normalizer": NORMALIZER,
            "findings": [self.finding],
            "epochs": 6,
            "batch_size": 32,
            "learning_rate": 0.005,
            "seed": 0,
            "device": torch.device("cpu"),
        }
        return Problem(**(parts | changes))

    def to_class(self, model: nn.Module) -> float:
        """Share of the other classes' images with the square that are predicted as its class."""
        predicted = predict(model, self.attacked, NORMALIZER).argmax(dim=1).numpy()
        return float((predicted[self.labels != 2] == 2).mean())

    def accuracy(self, model: nn.Module, data: ArrayDataset) -> float:
        return float((predict(model, data, NORMALIZER).argmax(dim=1).numpy() == self.labels).mean())


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(params=CORRECTIONS.names())
def method(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_model_relies_on_the_artifact_before(world: World) -> None:
    assert world.to_class(world.model) > 0.8
    assert world.accuracy(world.model, world.clean) > 0.65


def test_gives_the_same_keys_shapes_and_types_finite_in_eval_mode(world: World, method: str) -> None:
    model = CORRECTIONS.get(method)(world.problem())
    before, after = world.model.state_dict(), model.state_dict()
    assert list(before) == list(after)
    assert all(before[key].shape == after[key].shape for key in before)
    assert all(before[key].dtype == after[key].dtype for key in before)
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert not any(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    copy.deepcopy(world.model).load_state_dict(after, strict=True)


def test_is_deterministic_and_leaves_random_state_and_data_alone(world: World, method: str) -> None:
    torch.manual_seed(3)
    np.random.seed(3)
    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    images = world.train.images.copy()
    first = CORRECTIONS.get(method)(world.problem()).state_dict()
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)
    np.testing.assert_array_equal(world.train.images, images)
    torch.manual_seed(4)
    second = CORRECTIONS.get(method)(world.problem()).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_keeps_the_clean_accuracy(world: World, method: str) -> None:
    model = CORRECTIONS.get(method)(world.problem())
    assert world.accuracy(model, world.clean) > world.accuracy(world.model, world.clean) - 0.05


@pytest.mark.parametrize("name", [name for name in CORRECTIONS.names() if name != CONTROL])
def test_less_reliance_than_before_and_than_the_control(world: World, name: str) -> None:
    corrected = world.to_class(CORRECTIONS.get(name)(world.problem()))
    control = world.to_class(CORRECTIONS.get(CONTROL)(world.problem()))
    assert control > 0.75, "training on, by itself, must not be what helps here"
    assert corrected < 0.6 * control


def test_a_clarc_brings_the_attacked_accuracy_back(world: World) -> None:
    model = CORRECTIONS.get("a_clarc")(world.problem())
    assert world.accuracy(model, world.attacked) > world.accuracy(world.model, world.clean) - 0.05


def test_a_clarc_marks_half_of_the_images_of_every_class(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from spray.correction import fine_tuning

    second = replace(world.finding.artifact, pattern=torch.full((1, SIDE, SIDE), 0.5))
    findings = [world.finding, Finding(second, 2, world.samples)]
    kinds = {1.0: np.zeros(3), 0.5: np.zeros(3)}

    def look(*arguments: object, transform: object, **options: object) -> None:
        for _ in range(20):
            pixels = torch.zeros(N, 1, SIDE, SIDE)
            marked = transform(pixels, np.arange(N))
            assert not pixels.any(), "the batch itself stays as it was"
            assert not marked[:, :, 4:].any()
            for value, counts in kinds.items():
                has = (marked[:, 0, 1:4, 1:4] == value).all(dim=2).all(dim=1).numpy()
                counts += np.bincount(world.train.labels[has], minlength=3)

    monkeypatch.setattr(fine_tuning, "train", look)
    CORRECTIONS.get("a_clarc")(world.problem(findings=findings))
    for counts in kinds.values():
        np.testing.assert_allclose(counts / (20 * N / 3), 0.25, atol=0.05)


def test_the_seed_changes_what_is_trained(world: World) -> None:
    for name in ("a_clarc", CONTROL):
        first, second = (CORRECTIONS.get(name)(world.problem(seed=seed, epochs=1)) for seed in (0, 1))
        assert not torch.equal(first[1].weight, second[1].weight)


def test_epochs_are_reported(world: World) -> None:
    for name in ("a_clarc", CONTROL):
        seen: list[tuple[int, float]] = []
        CORRECTIONS.get(name)(world.problem(epochs=2, on_epoch=lambda *facts, seen=seen: seen.append(facts)))
        assert [epoch for epoch, _ in seen] == [1, 2]
        assert all(0 <= loss < 2 for _, loss in seen)


class Double(Normalizer):
    """Normalises into float64."""

    def __call__(self, pixels: Tensor, device: torch.device | str | None = None) -> Tensor:
        return super().__call__(pixels, device).double()


def explicit(model: nn.Module, x: Tensor, axes: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The model with a' = a + (z⁻ - h·a) h in front of its last layer, each axis in turn."""

    def project(_: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        a = arguments[0]
        for h, z in axes:
            a = a + (z - a @ h)[:, None] * h
        return (a,)

    hook = model[-1].register_forward_pre_hook(project)
    try:
        return model(x)
    finally:
        hook.remove()


def slow_axis(world: World, model: nn.Module, samples: np.ndarray) -> tuple[Tensor, Tensor]:
    members = np.flatnonzero(world.train.labels == 2)
    with torch.no_grad():
        a = model[:-1](Double([0.3], [0.3])(world.train.batch(members)))
    t = torch.from_numpy(np.isin(members, samples)).double()
    h = ((a - a.mean(0)) * (t - t.mean())[:, None]).mean(0) / t.var(unbiased=False)
    h = h / h.norm()
    return h, (a[t == 0] @ h).mean()


def test_p_clarc_is_the_projection_in_front_of_the_last_layer(world: World) -> None:
    original = copy.deepcopy(world.model).double()
    problem = world.problem(model=copy.deepcopy(original), normalizer=Double([0.3], [0.3]))
    folded = CORRECTIONS.get("p_clarc")(problem)
    x = torch.randn(50, 1, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = explicit(original, x, [slow_axis(world, original, world.samples)])
        torch.testing.assert_close(folded(x), expected, atol=1e-6, rtol=0)
        assert (folded(x) - original(x)).abs().max() > 0.01
    # Nothing before the last layer changes, and what lies along h no longer counts.
    assert torch.equal(folded[1].weight, original[1].weight)
    h, _ = slow_axis(world, original, world.samples)
    assert (folded[-1].weight @ h).abs().max() < 1e-12


def test_p_clarc_projects_several_artifacts_out_one_after_the_other(world: World) -> None:
    original = copy.deepcopy(world.model).double()
    other = np.flatnonzero(world.train.labels == 2)[:25]
    findings = [world.finding, replace(world.finding, samples=other)]
    problem = world.problem(model=copy.deepcopy(original), normalizer=Double([0.3], [0.3]), findings=findings)
    folded = CORRECTIONS.get("p_clarc")(problem)
    x = torch.randn(20, 1, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    axes = [slow_axis(world, original, samples) for samples in (other, world.samples)]
    with torch.no_grad():
        torch.testing.assert_close(folded(x), explicit(original, x, axes), atol=1e-6, rtol=0)


def test_p_clarc_is_the_same_for_every_batch_size_and_trains_nothing(world: World) -> None:
    first, second = (CORRECTIONS.get("p_clarc")(world.problem(batch_size=size)) for size in (7, 500))
    torch.testing.assert_close(first[-1].weight, second[-1].weight)
    torch.testing.assert_close(first[-1].bias, second[-1].bias)


@pytest.mark.parametrize(
    ("last", "words"),
    [
        ([nn.Linear(32, 3), nn.Softmax(1)], "output is made by an nn.Linear"),
        ([nn.Unflatten(1, (32, 1, 1)), nn.Conv2d(32, 3, 1), nn.Flatten()], "output is made by an nn.Linear"),
        ([nn.Linear(32, 3, bias=False)], "needs a bias"),
    ],
)
def test_p_clarc_refuses_models_that_it_does_not_fit_in_one_line(world: World, last: list, words: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, 32), nn.ReLU(), *last).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=words) as error:
        CORRECTIONS.get("p_clarc")(world.problem(model=model))
    assert "\n" not in str(error.value)
    assert "correction.methods" in str(error.value)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_output_layer_is_found_behind_others() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(100, 3), nn.Linear(3, 3), nn.Dropout()).eval()
    assert output_layer(model, torch.rand(2, 1, SIDE, SIDE)) is model[2]


def test_the_direction_is_of_the_artifacts_class_only(world: World) -> None:
    problem = world.problem()
    layer = problem.model[-1]
    h, z_clean = direction(problem, world.finding, layer)
    slow_h, slow_z = slow_axis(world, copy.deepcopy(world.model).double(), world.samples)
    torch.testing.assert_close(h.double(), slow_h, atol=1e-5, rtol=0)
    torch.testing.assert_close(z_clean.double(), slow_z, atol=1e-4, rtol=0)
    stray = np.concatenate([world.samples, np.flatnonzero(world.train.labels == 0)])
    torch.testing.assert_close(direction(problem, replace(world.finding, samples=stray), layer)[0], h)


def test_pattern_cav_is_covariance_over_variance() -> None:
    rng = np.random.default_rng(0)
    a, t = rng.normal(size=(70, 9)), rng.random(70) < 0.3
    a[t, 2] += 3
    covariance = np.array([np.cov(a[:, j], t.astype(float), ddof=0)[0, 1] for j in range(9)])
    expected = covariance / t.var()
    h = pattern_cav(torch.from_numpy(a), torch.from_numpy(t))
    np.testing.assert_allclose(h.numpy(), expected / np.linalg.norm(expected), atol=1e-12)
    assert h.argmax() == 2
    assert h[2] > 0.9
    torch.testing.assert_close(pattern_cav(5 * torch.from_numpy(a) - 3, torch.from_numpy(t)), h)
    torch.testing.assert_close(pattern_cav(torch.from_numpy(a), torch.from_numpy(~t)), -h)


def test_pattern_cav_without_a_difference_or_without_both_kinds() -> None:
    same = torch.ones(6, 4)
    assert not pattern_cav(same, torch.arange(6) % 2 == 0).any()
    for marked in (torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)):
        with pytest.raises(ValueError, match="with and without"):
            pattern_cav(same, marked)


def test_the_control_comes_first_and_once() -> None:
    assert check_methods(["p_clarc", "a_clarc"]) == [CONTROL, "p_clarc", "a_clarc"]
    assert check_methods(["a_clarc", CONTROL]) == [CONTROL, "a_clarc"]
    assert check_methods([CONTROL]) == [CONTROL]
    assert check_methods([]) == []
    with pytest.raises(UserError, match=r"unknown correction method 'a_clark' \(did you mean 'a_clarc'\?\)"):
        check_methods(["a_clark"])
    with pytest.raises(UserError, match="names a method twice"):
        check_methods(["a_clarc", "a_clarc"])
