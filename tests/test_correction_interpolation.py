"""The stop of corrections that train and have no strength: back towards the weights before, as far as has to be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from cheating import SIDE, World
from torch import Tensor, nn

from spray.correction import CORRECTIONS, Options, Problem, interpolation
from spray.correction.base import CONTROL
from spray.correction.choice import Measure, control, harms, validation
from spray.correction.interpolation import SHARES, between, stepped_back
from spray.training import train

FIRST = {"a_clarc": {"weight": 0.125}, "group_balanced": {}}
"""What is tried first, beside the share of the way."""
METHODS = tuple(FIRST)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def normed(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
        net.train()(torch.randn(8 + seed, 1, SIDE, SIDE))
    return net.eval()


def on_the_way(before: nn.Module, after: nn.Module, share: float) -> dict[str, Tensor]:
    """The formula, tensor by tensor."""
    end = after.state_dict()
    return {
        key: (1 - share) * value + share * end[key] if value.is_floating_point() else end[key]
        for key, value in before.state_dict().items()
    }


def pushed(bias: float) -> Callable[[Problem, np.ndarray | None], nn.Module]:
    """A training that makes the first class more likely and changes nothing else."""

    def make(problem: Problem, indices: np.ndarray | None) -> nn.Module:
        with torch.no_grad():
            problem.model[3].bias[0] += bias
        return problem.model

    return make


@pytest.mark.parametrize("share", [0.0, 0.25, 0.6])
def test_floats_go_a_share_of_the_way_and_integers_are_those_after(share: float) -> None:
    before, after = normed(0), normed(1)
    after.train()(torch.randn(4, 1, SIDE, SIDE))
    after.eval()
    states = [copy.deepcopy(model.state_dict()) for model in (before, after)]
    model = between(before, after, share)
    got, expected = model.state_dict(), on_the_way(before, after, share)
    assert list(got) == list(expected)
    assert [int(state["2.num_batches_tracked"]) for state in (*states, got)] == [1, 2, 2]
    assert not torch.equal(states[0]["2.running_var"], states[1]["2.running_var"])
    for key in got:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-6, atol=1e-6)
    assert not any(module.training for module in model.modules())
    # Neither of the two is touched.
    for state, kept in zip(states, (before, after), strict=True):
        assert all(torch.equal(value, kept.state_dict()[key]) for key, value in state.items())
    assert between(before, after, 1.0) is after


def test_shared_weights_move_once_and_what_is_infinite_stays() -> None:
    class Tied(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(2, 2), nn.Linear(2, 2)
            self.other.weight = self.one.weight
            nn.init.constant_(self.one.weight, value)
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

    model = between(Tied(0.0), Tied(1.0), 0.25)
    assert model.one.weight is model.other.weight
    assert model.one.weight.unique().tolist() == [0.25]
    assert model.mask.tolist() == [0.0, -torch.inf]


def test_it_goes_back_as_far_as_clean_accuracy_asks_for_and_says_so(world: World) -> None:
    problem = world.problem()
    split, before = validation(problem), copy.deepcopy(problem.model)
    reference = control(problem, split)
    whole = pushed(3.0)(replace(problem, model=copy.deepcopy(before)), None)
    fine = [not harms(reference, split.measure(between(before, whole, share)), 0.005) for share in SHARES]
    assert not fine[0], "all of the way must cost"
    assert any(fine)
    share = SHARES[fine.index(True)]
    model = stepped_back(problem, ({}, pushed(3.0)))
    moved = (model[3].bias - before[3].bias).tolist()
    assert moved == pytest.approx([3.0 * share, 0, 0], abs=1e-6)
    assert all(torch.equal(model.state_dict()[key], before.state_dict()[key]) for key in ("1.weight", "3.weight"))
    facts = problem.facts
    assert facts["chosen"] == {"share": share}
    assert facts["within_limit"]
    assert [row["share"] for row in facts["tried"]] == list(SHARES[: fine.index(True) + 1])
    assert [row["allowed"] for row in facts["tried"]] == fine[: fine.index(True) + 1]
    assert facts["why"].startswith("largest share")
    clean = [row["clean"] for row in facts["tried"]]
    assert clean == sorted(clean)
    assert clean[0] < facts["reference"]["clean"]


@pytest.mark.parametrize(
    ("clean", "attacked", "tried", "chosen"),
    [
        ((1.0,), (0.96,), 1, 0),  # as good as without the artifact, nearly
        ((1.0, 1.0), (0.6, 0.9), 2, 1),
        ((1.0, 0.99), (0.6, 0.61), 2, 0),  # not worth the clean accuracy
        ((0.8, 1.0), (0.6, 0.5), 2, 1),  # what costs is weakened, not made stronger
    ],
)
def test_a_stronger_way_is_tried_where_the_weaker_one_leaves_some_and_costs_nothing(
    world: World, clean: tuple[float, ...], attacked: tuple[float, ...], tried: int, chosen: int
) -> None:
    def measured(clean: float, attacked: float) -> Measure:
        return Measure(np.arange(200) < 200 * clean, attacked)

    problem = world.problem()
    split = validation(problem)
    problem.shared["control"] = measured(1.0, 0.1)
    measures = iter([measured(*each) for each in zip(clean, attacked, strict=True)])
    split.measure = lambda model: next(measures)
    stepped_back(problem, ({"weight": 1}, pushed(1.0)), ({"weight": 2}, pushed(2.0)))
    assert [len(problem.facts["tried"]), next(measures, None)] == [tried, None]
    assert problem.facts["chosen"] == {key: problem.facts["tried"][chosen][key] for key in ("weight", "share")}
    is_stronger = tried == 2 and clean[0] == 1
    assert problem.facts["tried"][-1]["weight"] == (2 if is_stronger else 1)


@pytest.mark.parametrize("name", METHODS)
def test_where_nothing_is_lost_the_weights_are_those_of_the_training(
    world: World, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[nn.Module, dict[str, Tensor]]] = []

    def watch(model: nn.Module, *arguments: object, **options: object) -> None:
        train(model, *arguments, **options)
        trained.append((model, copy.deepcopy(model.state_dict())))

    monkeypatch.setattr("spray.correction.fine_tuning.train", watch)
    problem = world.problem()
    model = CORRECTIONS.get(name)(problem)
    assert (problem.facts["chosen"], problem.facts["within_limit"]) == (FIRST[name] | {"share": 1.0}, True)
    assert len(problem.facts["tried"]) == 1
    assert len(trained) == 3, "the control and the method without the held-back images, then with all"
    assert trained[-1][0] is model
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in trained[-1][1].items())


@pytest.mark.parametrize("name", METHODS)
def test_if_every_share_costs_the_one_that_costs_least_is_taken(
    world: World, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = normed()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpolation, "SHARES", (1.0,))
        whole = CORRECTIONS.get(name)(world.problem(model=copy.deepcopy(before), epochs=2))
    # To lose nothing is not enough.
    problem = world.problem(model=copy.deepcopy(before), epochs=2, options=Options(max_loss=-1.0))
    # The whole way is the best of a network that has learnt nothing yet, and no test of what lies between.
    monkeypatch.setattr(interpolation, "SHARES", (0.75, 0.5))
    model = CORRECTIONS.get(name)(problem)
    facts = problem.facts
    assert not facts["within_limit"]
    assert len(facts["tried"]) == 2
    best = max(facts["tried"], key=lambda row: (row["clean"], row["attacked"]))
    assert facts["chosen"] == FIRST[name] | {"share": best["share"]}
    assert "costs least" in facts["why"]
    got, expected = model.state_dict(), on_the_way(before, whole, best["share"])
    assert all(torch.allclose(got[key], expected[key], rtol=1e-5, atol=1e-6) for key in got)
    assert got["2.num_batches_tracked"] == whole.state_dict()["2.num_batches_tracked"]
    assert not torch.equal(got["2.running_mean"], whole.state_dict()["2.running_mean"])


def test_the_control_of_a_run_is_trained_once(world: World) -> None:
    shared: dict = {}
    for name in METHODS:
        CORRECTIONS.get(name)(world.problem(epochs=1, shared=shared))
        measure = shared["control"]
        assert control(world.problem(epochs=1, shared=shared), validation(world.problem(shared=shared))) is measure
    plain = world.problem(shared=shared)
    CORRECTIONS.get(CONTROL)(plain)
    assert not plain.facts, "the control itself is not held back by anything"
