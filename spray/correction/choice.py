"""Layer and strength, chosen on training images that are held back, without any truth about the artifact.

The rule (`spray.correction.guards`): of the settings that are tried, the one of the highest value among those that
cost no clean accuracy, neither of all classes nor of one; the value is the accuracy on held-back images of other
classes that the isolated artifact is added to, less twice what is lost of that on images without any artifact.
A method that trains tries its strengths from the weakest, until the first that costs clean accuracy; one that trains
and has none goes back towards the weights before, as far as it has to (`spray.correction.interpolation`). A projection
is tried as strongly as it is allowed to be, and less so only where that costs clean accuracy; for a last layer that is
fitted again, which takes seconds, every strength is tried.
The reference of a projection is the model itself; that of a method that trains is the control, fine-tuned with the
same budget on the same images (for a refitted last layer: refitted to these as they are), since training on moves the
accuracy by itself. If every setting costs clean accuracy, the one that costs least is taken and the facts say so.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from spray.correction.axes import Axes, fit_axes, joint, projected, reactive
from spray.correction.base import Finding, Problem, inputs, unmarked
from spray.correction.guards import costs, fallen, value, worst_class
from spray.correction.layers import INPUT, activations, candidates, channel_dim, output_layer
from spray.correction.options import AUTO, STRENGTHS
from spray.errors import UserError
from spray.training import predict

MOST_HELD = 512
"""Most images that choices are made on."""
LOG = logging.getLogger("spray.correction")


@dataclass(frozen=True)
class Measure:
    """What a model does on the held-back images.

    Attributes
    ----------
    right : ndarray of bool
        (n,): whether each image without an artifact is classified right.
    attacked : float
        Accuracy on images of other classes with the isolated artifact added, the mean over artifacts.
    labels : ndarray of int, optional
        (n,): the classes of the images without an artifact.
    groups : sequence of tuple
        For each artifact of images of other classes that it is added to their classes, (m,) of int, and whether each is
        classified right, (m,) of bool.
    """

    right: np.ndarray
    attacked: float
    labels: np.ndarray | None = None
    groups: Sequence[tuple[np.ndarray, np.ndarray]] = ()


@dataclass(frozen=True)
class Trial:
    """A setting that was tried."""

    setting: dict[str, Any]
    measure: Measure
    allowed: bool = True
    result: Any = field(default=None, compare=False, repr=False)


class Validation:
    """Training images that are held back: some of each class, the same for every method.

    Attributes
    ----------
    held, rest : ndarray of int
        Training images that choices are made on, and all others.
    """

    def __init__(self, problem: Problem) -> None:
        labels = np.asarray(problem.train.labels)
        rng = np.random.default_rng([problem.seed, 43])
        order = rng.permutation(len(labels))
        rank = np.empty(len(labels), dtype=np.int64)
        share = min(problem.options.validation, MOST_HELD / max(1, len(labels)))
        sizes = np.bincount(labels)
        for c in range(len(sizes)):
            members = order[labels[order] == c]
            rank[members] = np.arange(len(members))
        held = rank < np.maximum(1, np.round(share * sizes))[labels]
        self.held, self.rest = np.flatnonzero(held), np.flatnonzero(~held)
        clean = self.held[unmarked(problem)[self.held]]
        # Where all of them carry an artifact by themselves there is nothing cleaner to measure.
        self.clean = clean if len(clean) else self.held
        self.problem, self.labels = problem, labels
        self.attacks = [(f, self.clean[labels[self.clean] != f.class_index]) for f in problem.findings]
        self.draws = rng.integers(0, 2**31, len(labels))

    def measure(self, model: nn.Module) -> Measure:
        """Return what a model does on the held-back images."""
        right = self._logits(model, self.clean).argmax(dim=1).numpy() == self.labels[self.clean]
        shares, groups = [], []
        for finding, others in self.attacks:

            def add(pixels: Tensor, indices: np.ndarray, finding: Finding = finding) -> Tensor:
                return finding.artifact.insert(pixels, self.draws[indices])

            hits = self._logits(model, others, add).argmax(dim=1).numpy() == self.labels[others]
            shares.append(float(hits.mean()) if len(others) else 0.0)
            groups.append((self.labels[others], hits))
        return Measure(right, float(np.mean(shares)), self.labels[self.clean], groups)

    def _logits(
        self, model: nn.Module, indices: np.ndarray, transform: Callable[[Tensor, np.ndarray], Tensor] | None = None
    ) -> Tensor:
        p = self.problem
        return predict(
            model,
            p.train,
            p.normalizer,
            indices=indices,
            batch_size=p.batch_size,
            device=p.device,
            transform=transform,
        )


def harms(reference: Measure, measure: Measure, max_loss: float) -> bool:
    """Return whether clean accuracy falls, of all classes or of one, or that of a class with an artifact added."""
    if costs(reference.right, measure.right, max_loss, measure.labels):
        return True
    pairs = zip(reference.groups, measure.groups, strict=False)
    return any(bool(fallen(before, after, labels)) for (labels, before), (_, after) in pairs)


def choose(problem: Problem, reference: Measure, trials: Iterable[Trial], stop: bool = True) -> Trial:
    """Return the best trial by the rule above and put what was tried into the problem's facts.

    Parameters
    ----------
    problem : Problem
        Whose facts are filled.
    reference : Measure
        What clean accuracy is compared with.
    trials : iterable of Trial
        Made when asked for, the weakest first.
    stop : bool
        Whether the first trial that costs clean accuracy ends the search.

    Raises
    ------
    UserError
        If there is no trial.
    """
    made: list[Trial] = []
    for trial in trials:
        fine = not harms(reference, trial.measure, problem.options.max_loss)
        made.append(replace(trial, allowed=fine))
        if stop and not fine:
            break
    if not made:
        raise UserError("no layer of the model can be corrected; set correction.layer, or use a_clarc")
    allowed = [trial for trial in made if trial.allowed]
    before = _clean(reference)

    def worth(trial: Trial) -> float:
        return value(before, _clean(trial.measure), trial.measure.attacked)

    best = (
        max(allowed, key=worth)
        if allowed
        else max(made, key=lambda trial: (float(trial.measure.right.mean()), trial.measure.attacked))
    )
    facts = {
        "reference": _numbers(reference),
        "tried": [
            trial.setting | _numbers(trial.measure) | {"value": round(worth(trial), 4), "allowed": trial.allowed}
            for trial in made
        ],
        "chosen": best.setting,
        "why": "highest value (accuracy under the isolated artifact, less twice the clean accuracy that is lost) among "
        "those that cost no clean accuracy, of all classes or of one"
        if allowed
        else "every setting costs clean accuracy on held-back training images; this one costs least",
        "within_limit": bool(allowed),
    }
    problem.facts.update(facts)
    if not allowed:
        LOG.warning(
            "every setting tried costs clean accuracy on held-back training images; %s costs least", best.setting
        )
    return best


def _clean(measure: Measure) -> float:
    return float(measure.right.mean()) if len(measure.right) else float("nan")


def _numbers(measure: Measure) -> dict[str, float]:
    numbers = {"clean": _clean(measure), "attacked": measure.attacked}
    if measure.labels is not None and len(measure.right):
        numbers["worst_class"] = worst_class(measure.right, measure.labels)
    return {key: round(number, 4) for key, number in numbers.items()}


def validation(problem: Problem) -> Validation:
    """Return the split, the same for all corrections of a run."""
    if "validation" not in problem.shared:
        problem.shared["validation"] = Validation(problem)
    split: Validation = problem.shared["validation"]
    return split


def choose_projection(
    problem: Problem, method: str, strengths: Sequence[float] | None = None
) -> tuple[list[Axes], float]:
    """Return where to project and how strongly; nothing is trained for that.

    The layers are tried from the last one, until accuracy under the artifact is that on clean images. Where a whole
    projection costs clean accuracy, weaker ones are tried as long as they may still be better than what is found.

    Parameters
    ----------
    problem : Problem
        With the untouched model.
    method : {"p_clarc", "reactive_p_clarc"}
        Whose projection is tried.
    strengths : sequence of float, optional
        What is allowed, the strongest first; by default what the options say.
    """
    asked = problem.options.strength_of(method)
    if strengths is None:
        strengths = STRENGTHS[method][::-1] if asked is None else (asked,)
    places = list(find_places(problem))
    make = reactive if method == "reactive_p_clarc" else joint
    gate = method == "reactive_p_clarc"
    if len(places) == 1 and len(strengths) == 1:
        axes = [fit_axes(problem, finding, *places[0], gate=gate) for finding in problem.findings]
        chosen = {"layer": axes[0].name, "strength": strengths[0]}
        problem.facts.update(chosen=chosen, why="set by the options")
        return axes, strengths[0]
    split = validation(problem)
    reference = split.measure(problem.model)
    goal = float(reference.right.mean()) - problem.options.max_loss

    def tried(axes: list[Axes], strength: float) -> Trial:
        measure = split.measure(projected(problem.model, make(axes, strength), problem.device))
        fine = not harms(reference, measure, problem.options.max_loss)
        return Trial({"layer": axes[0].name, "strength": strength}, measure, fine, (axes, strength))

    def trials() -> Iterator[Trial]:
        best, costly = -1.0, []
        for layer, pool in deepest_first(places):
            trial = tried([fit_axes(problem, f, layer, pool, gate) for f in problem.findings], strengths[0])
            yield trial
            if not trial.allowed:
                costly.append(trial)
                continue
            best = max(best, trial.measure.attacked)
            if best >= goal:
                return  # as good as without an artifact
        # A weaker projection does less, in either respect.
        for trial in sorted(costly, key=lambda trial: -trial.measure.attacked):
            for strength in strengths[1:]:
                if trial.measure.attacked <= best:
                    return
                weaker = tried(trial.result[0], strength)
                yield weaker
                if weaker.allowed:
                    best = max(best, weaker.measure.attacked)
                    break

    axes, strength = choose(problem, reference, trials(), stop=False).result
    return axes, strength


def deepest_first(places: Sequence[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Return layers with and without pooling, the last layer first, in each the directions of all activations first."""
    layers = list(dict.fromkeys(layer for layer, _ in places))
    return [place for layer in reversed(layers) for place in places if place[0] == layer]


def choose_layer(problem: Problem) -> list[Axes]:
    """Return the artifacts' axes in the layer where projecting them out helps most, for methods that train there."""
    o = problem.options
    key = ("layer", o.layer, o.cav, o.pooling, o.directions, o.validation, o.max_loss)
    if key not in problem.shared:
        part = replace(problem, facts={})
        problem.shared[key] = choose_projection(part, "p_clarc", (1.0,))[0], part.facts
    axes, facts = problem.shared[key]
    problem.facts["layer"] = facts
    return list(axes)


def find_places(problem: Problem) -> Iterable[tuple[str, bool]]:
    """Yield the layers to try, each with whether directions are pooled, as the options say."""
    x = inputs(problem, np.arange(min(2, len(problem.train))))
    asked = problem.options.layer
    if asked == AUTO:
        layers = candidates(problem.model, x)
    elif asked == "output":
        head = output_layer(problem.model, x)
        if head is None:
            raise UserError("correction.layer=output needs a model whose output is made by an nn.Linear; name a layer")
        layers = [head + INPUT]
    else:
        layers = [asked]
    for layer in layers:
        shape = activations(problem.model, layer, x).shape
        spatial = channel_dim(problem.model, layer, shape) is not None
        for pool in {"auto": (False, True), "full": (False,), "max": (True,)}[problem.options.pooling]:
            if spatial or pool == (problem.options.pooling == "max"):
                yield layer, pool


def choose_strength(
    problem: Problem, method: str, make: Callable[[Problem, float, np.ndarray | None], nn.Module]
) -> tuple[float, dict[str, Any]]:
    """Return the strength of a method that trains: set by the options, or chosen on held-back images.

    Parameters
    ----------
    problem : Problem
        Whose facts are filled.
    method : str
        A key of `STRENGTHS`.
    make : callable
        Trains a problem's model with a strength on some images, or on all, and returns it.
    """
    asked = problem.options.strength_of(method)
    if asked is not None:
        return asked, {"strength": asked}
    split = validation(problem)
    reference = control(problem, split)

    def trials() -> Iterable[Trial]:
        for strength in STRENGTHS[method]:
            part = replace(problem, model=copy.deepcopy(problem.model), facts={}, on_epoch=None)
            yield Trial({"strength": strength}, split.measure(make(part, strength, split.rest)))

    best = choose(problem, reference, trials())
    return float(best.setting["strength"]), best.setting


def control(problem: Problem, split: Validation) -> Measure:
    """Return what the control does that is fine-tuned without the held-back images, the same for all of a run."""
    from spray.correction.fine_tuning import fine_tune

    if "control" not in problem.shared:
        part = replace(problem, model=copy.deepcopy(problem.model), facts={}, on_epoch=None)
        problem.shared["control"] = split.measure(fine_tune(part, indices=split.rest))
    measure: Measure = problem.shared["control"]
    return measure
