"""One contract for every registered correction, on a network that cheats; A-ClArC, the control and their order."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cheating import NORMALIZER, SIDE, N, World
from torch import Tensor, nn

from spray.correction import CORRECTIONS, Projected, check_methods, load_corrected
from spray.correction.base import CONTROL, Finding
from spray.errors import UserError
from spray.pipelines.weights import save_weights
from spray.training import Batch, Objective, predict


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(params=CORRECTIONS.names())
def method(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_model_relies_on_the_artifact_before(world: World) -> None:
    assert world.to_class(world.model) > 0.8
    assert world.accuracy(world.model, world.clean) > 0.65


@pytest.fixture(scope="module")
def corrected(world: World) -> dict[str, tuple[nn.Module, dict]]:
    """Each method's model and facts, made once; what is found out about the model is shared, as in a run."""
    shared: dict = {}
    made = {}
    for name in CORRECTIONS.names():
        problem = world.problem(shared=shared)
        made[name] = CORRECTIONS.get(name)(problem), problem.facts
    return made


Corrected = dict[str, tuple[nn.Module, dict]]


def test_gives_the_same_keys_shapes_and_types_finite_in_eval_mode(
    world: World, method: str, corrected: Corrected
) -> None:
    model = corrected[method][0]
    inner = model.model if isinstance(model, Projected) else model
    before, after = world.model.state_dict(), inner.state_dict()
    assert list(before) == list(after)
    assert all(before[key].shape == after[key].shape for key in before)
    assert all(before[key].dtype == after[key].dtype for key in before)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    changed = any(not torch.equal(before[key], after[key]) for key in before)
    assert changed != isinstance(model, Projected), "a projection leaves the weights alone, all others change some"
    assert not any(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    copy.deepcopy(world.model).load_state_dict(after, strict=True)


def test_is_loaded_from_its_file_with_the_same_outputs(
    world: World, method: str, corrected: Corrected, tmp_path: Path
) -> None:
    (tmp_path / "corrected").mkdir()
    save_weights(tmp_path / "corrected" / f"{method}.pt", corrected[method][0])
    state = torch.load(tmp_path / "corrected" / f"{method}.pt", weights_only=True)
    assert all(isinstance(value, Tensor) for value in state.values())
    architecture = copy.deepcopy(world.model)
    loaded = load_corrected(tmp_path, method, architecture)
    assert not loaded.training
    assert torch.equal(
        predict(loaded, world.attacked, NORMALIZER), predict(corrected[method][0], world.attacked, NORMALIZER)
    )
    assert all(torch.equal(a, b) for a, b in zip(architecture.parameters(), world.model.parameters(), strict=True))


def test_says_what_was_tried_and_chosen_as_json(method: str, corrected: Corrected) -> None:
    facts = corrected[method][1]
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    if "tried" in facts:
        chosen = {key: facts["chosen"][key] for key in facts["tried"][0] if key in facts["chosen"]}
        mine = [trial for trial in facts["tried"] if chosen.items() <= trial.items()]
        assert len(mine) == 1
        assert mine[0]["allowed"] == facts["within_limit"]
        assert facts["within_limit"], "in this world every method has a setting that costs nothing"
        assert mine[0]["value"] == max(trial["value"] for trial in facts["tried"] if trial["allowed"])
        # Worth what it does with the artifact, less twice what it loses without.
        lost = max(0.0, facts["reference"]["clean"] - mine[0]["clean"])
        assert mine[0]["value"] == pytest.approx(mine[0]["attacked"] - 2 * lost, abs=3e-4)


def test_is_deterministic_and_leaves_random_state_and_data_alone(
    world: World, method: str, corrected: Corrected
) -> None:
    torch.manual_seed(3)
    np.random.seed(3)
    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    images = world.train.images.copy()
    first = CORRECTIONS.get(method)(world.problem()).state_dict()
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)
    np.testing.assert_array_equal(world.train.images, images)
    # Nor does it matter what other corrections have found out about the model.
    second = corrected[method][0].state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_keeps_the_clean_accuracy(world: World, method: str, corrected: Corrected) -> None:
    assert world.accuracy(corrected[method][0], world.clean) > world.accuracy(world.model, world.clean) - 0.05


# It is given nothing of the artifact: weighting features by their relevance strengthens what the model uses already.
BLIND = {"lrp_guided"}


@pytest.mark.parametrize("name", sorted({*CORRECTIONS.names()} - {CONTROL} - BLIND))
def test_less_reliance_than_before_and_than_the_control(world: World, name: str, corrected: Corrected) -> None:
    control = world.to_class(corrected[CONTROL][0])
    assert control > 0.75, "training on, by itself, must not be what helps here"
    assert world.to_class(corrected[name][0]) < 0.6 * control
    assert (
        world.accuracy(corrected[name][0], world.attacked) > world.accuracy(corrected[CONTROL][0], world.attacked) + 0.1
    )


@pytest.mark.parametrize("name", sorted(BLIND))
def test_what_knows_nothing_of_the_artifact_does_not_remove_it(world: World, name: str, corrected: Corrected) -> None:
    assert world.to_class(corrected[name][0]) > 0.6 * world.to_class(corrected[CONTROL][0])


def test_a_clarc_brings_the_attacked_accuracy_back(world: World) -> None:
    model = CORRECTIONS.get("a_clarc")(world.problem())
    assert world.accuracy(model, world.attacked) > world.accuracy(world.model, world.clean) - 0.05


def test_a_clarc_gives_each_artifact_the_same_weight_in_every_class(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spray.correction import fine_tuning

    # Class 2 has the white square in half of its images; a grey one is in a few of class 1, fewer than an eighth.
    second = replace(world.finding.artifact, pattern=torch.full((1, SIDE, SIDE), 0.5))
    few = np.flatnonzero(world.train.labels == 1)[:4]
    findings = [world.finding, Finding(second, 1, few)]
    weight = {"white": np.zeros(3), "grey": np.zeros(3), "none": np.zeros(3)}

    class Looking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.pixels = x * 0.3 + 0.3
            self.logits = torch.zeros(len(x), 3, requires_grad=True)
            return self.logits

    def look(*arguments: object, objective: Objective, indices: np.ndarray | None, **options: object) -> None:
        if indices is not None:
            return  # of the control or of the trial, see `spray.correction.interpolation`
        for _ in range(40):
            model, pixels = Looking(), torch.zeros(N, 1, SIDE, SIDE)
            batch = Batch(NORMALIZER(pixels, "cpu"), torch.from_numpy(world.train.labels), np.arange(N), pixels)
            objective(model, batch).backward()
            assert not pixels.any(), "the batch itself stays as it was"
            assert not model.pixels[:, :, 4:].abs().gt(1e-6).any()
            # At equal logits a row's gradient is its weight times 1/3, and less 1 for its label.
            labels, counts = model.logits.grad.argmin(dim=1), model.logits.grad.amax(dim=1)
            square = model.pixels[:, 0, 1:4, 1:4].mean(dim=(1, 2))
            kind = np.select([square > 0.9, square > 0.4], ["white", "grey"], "none")
            kind[world.samples], kind[few] = "white", "grey"
            for name, sums in weight.items():
                sums += np.bincount(labels, counts * torch.from_numpy(kind == name), minlength=3)

    monkeypatch.setattr(fine_tuning, "train", look)
    CORRECTIONS.get("a_clarc")(world.problem(findings=findings))
    np.testing.assert_allclose(weight["none"] / weight["none"].mean(), 1, atol=1e-3)
    for name in ("white", "grey"):
        np.testing.assert_allclose(weight[name] / weight["none"], 1 / 8, atol=0.01)


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


def test_the_control_comes_first_and_once() -> None:
    assert check_methods(["p_clarc", "a_clarc"]) == [CONTROL, "p_clarc", "a_clarc"]
    assert check_methods(["a_clarc", CONTROL]) == [CONTROL, "a_clarc"]
    assert check_methods([CONTROL]) == [CONTROL]
    assert check_methods([]) == []
    with pytest.raises(UserError, match=r"unknown correction method 'a_clark' \(did you mean 'a_clarc'\?\)"):
        check_methods(["a_clark"])
    with pytest.raises(UserError, match="names a method twice"):
        check_methods(["a_clarc", "a_clarc"])
