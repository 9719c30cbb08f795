"""What corrections are made of: penalties, groups, the last layer's fit, weights of features, options."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from cheating import NORMALIZER, World, tagged
from scipy.optimize import minimize
from scipy.special import logsumexp
from torch import Tensor, nn

from spray import explain
from spray.correction import CORRECTIONS, Finding, Options, check_options
from spray.correction.axes import Axes
from spray.correction.base import carriers, unmarked
from spray.correction.checks import check_model
from spray.correction.groups import FEWEST, balance
from spray.correction.guided import relevance_weights
from spray.correction.input_gradients import has_place, overlap
from spray.correction.latent import sensitivity, towards
from spray.correction.options import STRENGTHS
from spray.correction.refitting import refit
from spray.data.arrays import ArrayDataset
from spray.errors import UserError
from spray.isolation.blended import Blended
from spray.isolation.changed import Background, Changed
from spray.isolation.statistics import statistics
from spray.models.small_cnn import SmallCNN


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def axes(d: int, k: int = 1, dim: int | None = None, seed: int = 0) -> Axes:
    H = torch.linalg.qr(torch.randn(d, k, generator=torch.Generator().manual_seed(seed)).double()).Q.T
    return Axes("x", dim, H, torch.zeros(k).double(), torch.arange(1.0, k + 1).double())


# ---- penalties


def test_sensitivity_is_the_formula_in_loops() -> None:
    rng = np.random.default_rng(0)
    g, part = rng.normal(size=(5, 7)), axes(7, 2)
    H = part.directions.numpy()
    square = [sum((g[i] @ h) ** 2 for h in H) for i in range(5)]
    np.testing.assert_allclose(sensitivity(torch.from_numpy(g), part, False), square)
    cosine = [s / (g[i] @ g[i]) for i, s in enumerate(square)]
    np.testing.assert_allclose(sensitivity(torch.from_numpy(g), part, True), cosine)
    maps, of_channels = rng.normal(size=(3, 4, 2, 5)), axes(4, 1, dim=1)
    h = of_channels.directions[0].numpy()
    square = [sum((maps[i, :, y, x] @ h) ** 2 for y in range(2) for x in range(5)) for i in range(3)]
    np.testing.assert_allclose(sensitivity(torch.from_numpy(maps), of_channels, False), square)
    np.testing.assert_allclose(
        sensitivity(torch.from_numpy(maps), of_channels, True), square / (maps**2).sum((1, 2, 3))
    )
    # The cosine has no scale, and no gradient at all is no overlap.
    big = sensitivity(1e6 * torch.from_numpy(g), part, True)
    torch.testing.assert_close(big, sensitivity(torch.from_numpy(g), part, True))
    assert sensitivity(torch.zeros(2, 7, dtype=torch.float64), part, True).tolist() == [0, 0]


def test_overlap_is_the_formula_in_loops() -> None:
    rng = np.random.default_rng(0)
    g, M = rng.normal(size=(4, 3, 5, 6)), rng.random((4, 1, 5, 6))
    expected = []
    for i in range(4):
        size = np.abs(g[i]).sum(0)
        expected.append((size * M[i, 0]).sum() / np.sqrt((size**2).sum() * (M[i, 0] ** 2).sum()))
    np.testing.assert_allclose(overlap(torch.from_numpy(g), torch.from_numpy(M)), expected)
    outside = torch.zeros(1, 1, 2, 2)
    outside[..., 0, 0] = 1
    assert overlap(outside.flip(-1), outside).tolist() == [0]
    assert overlap(-3 * outside, outside).tolist() == [1]


def penalised(name: str, world: World, model: nn.Module, options: Options) -> tuple[Callable[[], Tensor], list]:
    """Catch the objective that a method trains with, and the batch of its first step."""
    caught: list = []

    def stop(*arguments: object, objective: Callable, **_: object) -> None:
        caught.append(objective)
        raise KeyboardInterrupt

    problem = world.problem(model=model, options=options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spray.correction.fine_tuning.train", stop)
        with pytest.raises(KeyboardInterrupt):
            CORRECTIONS.get(name)(problem)
    return caught[0], [problem]


def batch_of(world: World, n: int) -> object:
    from spray.training import Batch

    indices = np.concatenate([world.samples[: n // 2], np.flatnonzero(world.train.labels == 0)[: n // 2]])
    pixels = world.train.batch(indices)
    x = NORMALIZER(pixels).double()
    return Batch(x, torch.from_numpy(world.train.labels[indices]), indices, pixels)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rrr", Options(strength=5.0)),
        ("rr_clarc", Options(strength=5.0, layer="1")),
        ("rr_clarc", Options(strength=5.0, layer="1", penalty="square")),
        ("a_clarc_latent", Options(strength=0.5, layer="1")),
        ("lrp_guided", Options(strength=2.0)),
    ],
)
def test_the_gradient_of_each_loss_is_that_of_finite_differences(
    world: World, name: str, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    smooth = nn.Sequential(nn.Flatten(), nn.Linear(100, 6), nn.Softplus(), nn.Linear(6, 3)).double().eval()
    if name == "lrp_guided":  # LRP has no rule for a softplus; away from its kink a ReLU is as smooth
        smooth[2] = nn.ReLU()
        # The weights of features are constants of a step: they are held fixed.
        monkeypatch.setattr(
            "spray.correction.guided.relevance_weights", lambda *_: torch.linspace(0.5, 1.5, 6).double()
        )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for p in smooth.parameters():
            nn.init.normal_(p, std=0.3)
    single = copy.deepcopy(smooth).float()
    loss, _ = penalised(name, world, single, options)
    batch = batch_of(world, 6)

    def value(model: nn.Module) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return loss(model, batch)

    weight = smooth[3].weight
    (gradient,) = torch.autograd.grad(value(smooth), weight)
    for place in [(0, 0), (2, 5), (1, 3)]:
        ends = []
        for step in (1e-6, -1e-6):
            moved = copy.deepcopy(smooth)
            with torch.no_grad():
                moved[3].weight[place] += step
            ends.append(float(value(moved).detach()))
        assert float(gradient[place]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-7)


def test_right_reason_loss_is_cross_entropy_and_the_squared_slope_along_the_cav(world: World) -> None:
    model = copy.deepcopy(world.model)
    loss, (problem,) = penalised("rr_clarc", world, model, Options(strength=3.0, layer="2", penalty="square"))
    batch = batch_of(world, 8)
    double = copy.deepcopy(world.model).double()
    from spray.correction.axes import fit_axes

    h = fit_axes(problem, world.finding, "2", False).directions[0].double()
    with torch.random.fork_rng():
        torch.manual_seed(7)
        got = loss(double, batch)
        torch.manual_seed(7)
        signs = 2.0 * torch.randint(2, (3,)) - 1
    # Behind the ReLU there is one linear layer: the slope of m·f is Wᵀ m, for every sample.
    slope = (double[3].weight.T @ signs.double()) @ h
    expected = nn.functional.cross_entropy(double(batch.x), batch.labels) + 3 * slope**2
    assert float(got.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


def brighter() -> Changed:
    """A change of whole images; its mask is 1 everywhere."""
    ones, flat = torch.ones(10, 10), torch.zeros(1, 10, 10)
    weights = torch.zeros(statistics(flat[None]).shape[1])
    shifts = torch.zeros(1, 2, dtype=torch.int64)
    return Changed(ones, flat, shifts, 1.0, 1, True, torch.ones(1), torch.full((1,), 0.2), 0.0, 0.0, weights, 0.0)


def veil(mask: Tensor) -> Blended:
    flat = torch.zeros(1, 10, 10)
    weights = torch.zeros(statistics(flat[None]).shape[1])
    return Blended(mask, flat, torch.zeros(1, 2, dtype=torch.int64), 1.0, 1, True, flat, weights, 0.0, 0.0)


def test_which_artifacts_have_a_place_their_masks_tell(world: World) -> None:
    background = Background(**vars(brighter()))
    for artifact, expected in [
        (world.finding.artifact, True),
        (veil(torch.linspace(0.2, 0.6, 10).repeat(10, 1)), True),
        (background, True),
        (veil(torch.full((10, 10), 0.3)), False),
        (brighter(), False),
    ]:
        assert has_place(world.problem(), replace(world.finding, artifact=artifact)) == expected, artifact.kind


@pytest.mark.parametrize("options", [Options(), Options(strength=5.0)])
def test_artifacts_of_whole_images_have_no_part_in_the_penalty_on_gradients(world: World, options: Options) -> None:
    bright = Finding(brighter(), 0, np.flatnonzero(world.train.labels == 0)[:60])
    fixed, control = Options(strength=5.0), CORRECTIONS.get("fine_tuned")(world.problem()).state_dict()
    alone = CORRECTIONS.get("rrr")(world.problem(options=fixed)).state_dict()
    problem = world.problem(findings=[bright, world.finding], options=fixed)
    both = CORRECTIONS.get("rrr")(problem).state_dict()
    assert all(torch.equal(both[key], alone[key]) for key in alone)
    assert problem.facts["left_out"] == [{"artifact": 1, "class_index": 0, "kind": "global"}]
    assert "whole image" in problem.facts["left_out_because"]
    assert problem.facts["chosen"] == {"strength": 5.0}
    # If none has a place nothing is left of the penalty, and no strength of it is tried.
    problem = world.problem(findings=[bright], options=options)
    none = CORRECTIONS.get("rrr")(problem).state_dict()
    assert all(torch.equal(none[key], control[key]) for key in control)
    assert not any(torch.equal(none[key], alone[key]) for key in alone)
    assert problem.facts["chosen"] == {"strength": 0.0}
    assert len(problem.facts["left_out"]) == 1
    assert "tried" not in problem.facts
    # Where all have one nothing is said of it.
    plain = world.problem(options=fixed)
    CORRECTIONS.get("rrr")(plain)
    assert plain.facts == {"chosen": {"strength": 5.0}}


def test_only_what_comes_behind_the_layer_is_trained(world: World) -> None:
    for name in ("a_clarc_latent", "rr_clarc"):
        model = CORRECTIONS.get(name)(world.problem(options=Options(layer="2", strength=0.5), epochs=1))
        assert torch.equal(model[1].weight, world.model[1].weight)
        assert not torch.equal(model[3].weight, world.model[3].weight)
        assert all(p.requires_grad for p in model.parameters())


def test_activations_that_artifacts_are_added_to_have_the_mean_of_samples_with_them() -> None:
    rng = torch.Generator().manual_seed(0)
    part, a = axes(6, 2), torch.randn(5, 6, generator=rng).double()
    moved = towards(a, part, part.marked)
    torch.testing.assert_close(moved @ part.directions.T, part.marked.expand(5, 2))
    rest = torch.eye(6).double() - part.directions.T @ part.directions
    torch.testing.assert_close(moved @ rest, a @ rest)
    maps, of_channels = torch.randn(2, 4, 3, 3, generator=rng).double(), axes(4, 1, dim=1)
    moved = towards(maps, of_channels, of_channels.marked)
    torch.testing.assert_close(
        torch.einsum("nchw,c->nhw", moved, of_channels.directions[0]), torch.ones(2, 3, 3).double()
    )


# ---- groups


def world_of_groups(world: World, n_others: int) -> tuple[object, np.ndarray]:
    """Some of class 0's images carry the artifact too; scores tell."""
    labels = world.train.labels
    others = np.flatnonzero(labels == 0)[:n_others]
    images = tagged(world.train.images, others)
    scores = np.where(np.isin(np.arange(len(labels)), np.concatenate([world.samples, others])), 0.9, 0.1)
    finding = replace(world.finding, scores=scores)
    return world.problem(train=ArrayDataset(images, labels, ("a", "b", "c")), findings=[finding]), others


def test_one_stray_sample_makes_no_carriers_of_other_classes(world: World) -> None:
    problem, others = world_of_groups(world, 20)
    stray = np.flatnonzero(world.train.labels == 2)[1]
    assert stray not in world.samples
    finding = replace(problem.findings[0], samples=np.sort(np.append(world.samples, stray)))
    assert set(np.flatnonzero(carriers(problem, finding))) == {*world.samples, *others, stray}


def test_carriers_are_known_by_their_scores(world: World) -> None:
    problem, others = world_of_groups(world, 20)
    found = np.flatnonzero(carriers(problem, problem.findings[0]))
    assert set(found) == {*world.samples, *others}
    assert (unmarked(problem) == ~np.isin(np.arange(480), found)).all()
    # Without scores only the samples that were found in its own class.
    assert set(np.flatnonzero(carriers(world.problem(), world.finding))) == set(world.samples)


@pytest.mark.parametrize(("n_others", "fill"), [(20, True), (20, False), (3, True), (0, True)])
def test_drawn_samples_have_the_artifact_equally_often_in_every_class(world: World, n_others: int, fill: bool) -> None:
    problem, _ = world_of_groups(world, n_others)
    problem = replace(problem, options=Options(fill_groups=fill))
    balanced = balance(problem)
    rng = np.random.default_rng(0)
    drawn = rng.choice(480, 6000, p=balanced.weights)
    pixels = balanced.fill(problem, problem.train.batch(drawn), drawn, rng)
    has = (pixels[:, 0, 1:4, 1:4] == 1).flatten(1).all(1).numpy()
    labels = problem.train.labels[drawn]
    shares = [has[labels == c].mean() for c in range(3)]
    # Class 1 has none with it: filled, or the artifact is left out in every class.
    np.testing.assert_allclose(shares, 0.5 if fill else 0.0, atol=0.05)
    np.testing.assert_allclose(np.bincount(labels) / 6000, 1 / 3, atol=0.03)
    assert balanced.counts[:, 1].tolist() == [n_others, 0, 80]
    filled = {c for c, _ in balanced.facts()["filled"]}
    assert filled == (({1} if n_others >= FEWEST else {0, 1}) if fill else set())


def test_two_artifacts_share_the_half_of_the_samples(world: World) -> None:
    second = Finding(replace(world.finding.artifact, pattern=torch.full((1, 10, 10), 0.5)), 0, np.arange(0, 60, 3))
    problem = world.problem(findings=[world.finding, second])
    balanced = balance(problem)
    rng = np.random.default_rng(0)
    drawn = rng.choice(480, 6000, p=balanced.weights)
    pixels = balanced.fill(problem, torch.zeros(6000, 1, 10, 10), drawn, rng)
    for c in range(3):
        mine = problem.train.labels[drawn] == c
        kinds = [
            ((pixels[mine, 0, 2, 2] == value).numpy() | (balanced.attribute[drawn[mine]] == k)).mean()
            for k, value in ((1, 1.0), (2, 0.5))
        ]
        np.testing.assert_allclose(kinds, 0.25, atol=0.04)


# ---- deep feature reweighting


@pytest.mark.parametrize("bias", [True, False])
def test_the_last_layer_solves_the_logistic_regression_near_the_one_before(bias: bool) -> None:
    rng = np.random.default_rng(0)
    y = np.arange(240) % 3
    a = rng.normal(size=(240, 5)) * [1, 10, 0.1, 1, 1] + 2.0
    a[np.arange(240), y] += 1.5
    a[:, 4] = 3.0  # never varies
    weights = rng.random(240) + 0.1
    before, b_before = rng.normal(size=(3, 5)), rng.normal(size=3) * bias
    given = [torch.from_numpy(part) for part in (before, b_before, a, y, weights)]
    W, b = refit(*given, 0.5, bias)
    assert torch.equal(W[:, 4], given[0][:, 4])
    # The same numbers from SciPy, of the formula with the gradient by differences.
    scale = np.where(a.std(0, ddof=1) > 1e-6, a.std(0, ddof=1), np.inf)
    center = a.mean(0) * bias

    def unpacked(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        D, d = flat[:15].reshape(3, 5) / scale, flat[15:] * bias
        return before + D, b_before + d - D @ center

    def loss(flat: np.ndarray) -> float:
        W, b = unpacked(flat)
        logits = a @ W.T + b
        each = logsumexp(logits, axis=1) - logits[np.arange(240), y]
        return float((weights * each).sum() / weights.sum() + 0.5 / 480 * (flat**2).sum())

    W_expected, b_expected = unpacked(minimize(loss, np.zeros(18), tol=1e-10).x)
    np.testing.assert_allclose(W, W_expected, atol=2e-3)
    np.testing.assert_allclose(b, b_expected, atol=5e-3)
    # Held fast, it stays what it was.
    assert (refit(*given, 1e9, bias)[0] - given[0]).abs().max() < 1e-4


def test_only_the_last_layer_is_fitted_again(world: World) -> None:
    model = CORRECTIONS.get("dfr")(world.problem())
    assert torch.equal(model[1].weight, world.model[1].weight)
    assert not torch.equal(model[3].weight, world.model[3].weight)


# ---- LRP-guided training


def test_features_are_weighted_by_their_relevance_for_the_label(world: World) -> None:
    x, labels = NORMALIZER(world.train.batch(np.arange(8))), torch.from_numpy(world.train.labels[:8])
    model = copy.deepcopy(world.model).train()
    w = relevance_weights(model, x, labels, "2")
    # Of a last linear layer LRP-0 gives a_j w_jk, in front of which the ReLU passes it on.
    R = explain(world.model, x, labels, composite="epsilon_plus_flat", layer="2")
    expected = 1 + R / R.abs().amax(1, keepdim=True)
    torch.testing.assert_close(w, expected)
    assert w.min() >= 0
    assert w.max() <= 2
    assert model.training
    assert not w.requires_grad


# ---- options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cav": "svn"}, "correction.cav=svn is unknown; allowed: pattern, svm"),
        ({"pooling": "mean"}, "auto, full, max"),
        ({"penalty": "cos"}, "cosine, square"),
        ({"layer": ""}, "correction.layer="),
        ({"directions": 0}, "from 1 to 64"),
        ({"validation": 0.0}, "correction.validation"),
        ({"max_loss": -0.1}, "correction.max_loss"),
        ({"strength": "strong"}, "auto or a number above 0"),
        ({"strength": 0}, "auto or a number above 0"),
        ({"strength": True}, "auto or a number above 0"),
        ({"strength": {"p_clarc": 1.5}}, "at most 1"),
        ({"strength": {"a_clarc": 1}}, "has no strength; allowed: p_clarc"),
        ({"strength": {"rrr": float("nan")}}, "above 0"),
    ],
)
def test_options_that_are_not_allowed_are_refused_in_one_line(options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        check_options(Options(**options))
    assert "\n" not in str(error.value)


def test_options_that_are_allowed() -> None:
    for strength in ("auto", 3, {"rr_clarc": 10, "p_clarc": "auto"}):
        check_options(Options(strength=strength))
    options = Options(strength={"rr_clarc": 10})
    assert options.strength_of("rr_clarc") == 10
    assert options.strength_of("rrr") is None
    # The weakest first: what holds DFR back is strongest where it changes least.
    assert all(list(grid) == sorted(grid, reverse=name == "dfr") for name, grid in STRENGTHS.items())


def test_a_model_is_checked_before_anything_is_computed() -> None:
    model, x = SmallCNN(1, 3, 4).eval(), torch.rand(2, 1, 16, 16)
    every = CORRECTIONS.names()
    for layer in ("auto", "output", "features.4", "classifier.1"):
        check_model(model, x, every, Options(layer=layer))
    no_linear = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    check_model(no_linear, x, ["p_clarc", "rrr"], Options())
    for methods, layer, words in [
        (["dfr"], "auto", "dfr needs"),
        (["p_clarc"], "output", "correction.layer=output needs"),
        (["p_clarc"], "features.99", "has no layer"),
        (["rr_clarc"], "3", "no weights come behind"),
        (["lrp_guided"], "2:in", "output of a module"),
    ]:
        with pytest.raises(UserError, match=words):
            check_model(no_linear, x, methods, Options(layer=layer))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
