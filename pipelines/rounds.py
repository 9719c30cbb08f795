"""After the corrections: the best one is chosen, its model looked at again and, if artifacts are left, corrected again.

Each further round is a run of its own in `rounds/<number>/`, with the same files as the first; its `model.pt` is the
model that the round before chose. The first round's are in the run directory itself. A round that only looks has no
corrections. As every stage skips what is up to date, a run that was stopped in a round goes on there.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from spray.correction.base import CONTROL
from spray.correction.guards import costs, fallen, value, worst_class
from spray.correction.layers import INPUT
from spray.correction.wrapped import innermost
from spray.pipelines.context import Context
from spray.pipelines.isolated import load_findings
from spray.pipelines.recheck import GONE, LEFT, recheck
from spray.storage import read_json
from spray.verification import share_of

if TYPE_CHECKING:
    from spray.pipelines.config import SprayConfig

FOLDER = "rounds"
LOOK = ("train", "attribute", "analyze", "rank", "isolate")
"""Stages that look for artifacts."""
RULE = (
    "highest accuracy under the isolated artifacts, less twice the clean accuracy that is lost, on one half of the "
    "test images, among the corrections that cost no clean accuracy there, of all classes or of one"
)
LEAST = (
    "every correction costs clean accuracy, of all classes or of one, on one half of the test images; of this one "
    "clean accuracy, that of the worst class and that under the isolated artifacts are highest together"
)


@dataclass(frozen=True)
class Again:
    """What came of looking again.

    Attributes
    ----------
    facts : dict
        For `verification.json`: `recheck`, `rounds`, `final`.
    models : dict
        The weights of the models that later rounds chose, `round_2` and so on.
    summary : dict
        For the stage's facts.
    """

    facts: dict[str, Any]
    models: dict[str, Path] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Hits:
    """Which of the N test images a model classifies right.

    Attributes
    ----------
    clean : ndarray of bool
        (N,): as they are.
    attacked : sequence of tuple
        For each isolated artifact which images are of other classes, bool (N,), and which are right with it, bool (N,).
    """

    clean: np.ndarray
    attacked: Sequence[tuple[np.ndarray, np.ndarray]]

    def attacked_accuracy(self, part: np.ndarray) -> float:
        """Return the accuracy with an artifact on some of the images, bool (N,): the mean over artifacts."""
        shares = [float(right[others & part].mean()) for others, right in self.attacked if (others & part).any()]
        return float(np.mean(shares)) if shares else 0.0


def choose(labels: np.ndarray, hits: Mapping[str, Hits], seed: int, max_loss: float) -> dict[str, Any]:
    """Choose the best correction on one half of the test images, without any truth about the artifacts.

    No correction has seen a test image. The numbers of the choice are too good for the one that is chosen, so its
    accuracies on the other half are told as well.

    Parameters
    ----------
    labels : ndarray of int
        (N,), of the test images.
    hits : mapping
        What each model does, by its name: `original` and the corrections.
    seed : int
        Decides which half.
    max_loss : float
        By how much the clean accuracy may fall.

    Returns
    -------
    dict
        `method`, `why`, `within_limit`, `n` images, `tried` (each model's accuracies on them and what it is worth) and
        `other_half`, what the one that is chosen does on the others.
    """
    labels = np.asarray(labels)
    half = half_of(labels, seed)
    reference, methods = hits["original"], [name for name in hits if name != "original"]
    # The control corrects nothing; where it is all that there is, it is what the next round goes on with.
    corrections = [name for name in methods if name != CONTROL] or methods
    tried: dict[str, Any] = {
        name: {
            "clean_accuracy": float(hit.clean[half].mean()),
            "worst_class_accuracy": worst_class(hit.clean[half], labels[half]),
            "attacked_accuracy": hit.attacked_accuracy(half),
        }
        for name, hit in hits.items()
    }
    before = tried["original"]["clean_accuracy"]
    for name in methods:
        tried[name]["allowed"] = not _harms(reference, hits[name], labels, half, max_loss)
        tried[name]["value"] = value(before, tried[name]["clean_accuracy"], tried[name]["attacked_accuracy"])
    allowed = [name for name in corrections if tried[name]["allowed"]]

    def together(name: str) -> float:
        return sum(tried[name][key] for key in ("attacked_accuracy", "clean_accuracy", "worst_class_accuracy"))

    best = max(allowed, key=lambda name: tried[name]["value"]) if allowed else max(corrections, key=together)
    return {
        "method": best,
        "why": RULE if allowed else LEAST,
        "within_limit": bool(allowed),
        "n": int(half.sum()),
        "tried": tried,
        "other_half": _accuracies(hits[best], ~half),
    }


def _harms(reference: Hits, hits: Hits, labels: np.ndarray, half: np.ndarray, max_loss: float) -> bool:
    """Return whether clean accuracy falls, of all classes or of one, or that of another class with an artifact."""
    if costs(reference.clean[half], hits.clean[half], max_loss, labels[half]):
        return True
    for (others, before), (_, after) in zip(reference.attacked, hits.attacked, strict=True):
        part = half & others
        if fallen(before[part], after[part], labels[part]):
            return True
    return False


def half_of(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return one half of the images, bool (N,): half of each class, the larger one of an odd number."""
    order = np.random.default_rng([seed, 61]).permutation(len(labels))
    half = np.zeros(len(labels), dtype=bool)
    for c in np.unique(labels):
        members = order[labels[order] == c]
        half[members[: -(-len(members) // 2)]] = True
    return half


def _accuracies(hits: Hits, part: np.ndarray) -> dict[str, Any]:
    """Return accuracies with intervals on some of the images; the attacked one of all artifacts together."""
    attacked = [right[others & part] for others, right in hits.attacked]
    return share_of("clean_accuracy", hits.clean[part]) | share_of("attacked_accuracy", np.concatenate(attacked))


def look_again(context: Context, chosen: dict[str, Any] | None) -> Again:
    """Look for artifacts in the chosen corrected model and, in as many rounds as are allowed, correct what is left.

    Parameters
    ----------
    context : Context
        The run.
    chosen : dict or None
        What `choose` returned.
    """
    options = context.config
    if chosen is None:
        _remove(context.run_dir, 1)
        return Again({"recheck": {}, "rounds": [], "final": None})
    rounds = [_round(context.run_dir, context.run_dir, 1, chosen)]
    models: dict[str, Path] = {}
    final = {"round": 1, "method": chosen["method"], "within_limit": chosen["within_limit"]}
    number, here, last = 1, context, None
    while number < options.correction.rounds or options.verify.recheck:
        number += 1
        part = _round_context(context, corrected(here.run_dir, final["method"]), number)
        context.log.info("round %d: looking for artifacts in %s of round %d", number, final["method"], number - 1)
        _run(part, LOOK)
        last = part.run_dir
        rounds.append(_round(context.run_dir, last, number, None))
        if number > options.correction.rounds or not load_findings(last):
            break
        _run(part, (*LOOK, "correct", "verify"))
        next_chosen = read_json(last / "verification.json")["chosen"]
        rounds[-1] = _round(context.run_dir, last, number, next_chosen)
        if next_chosen is None or not next_chosen["within_limit"]:
            context.log.info("round %d: every correction costs clean accuracy; the model before it stays", number)
            break
        final = {"round": number, "method": next_chosen["method"], "within_limit": True}
        models[f"round_{number}"] = corrected(last, final["method"])
        here = part
    _remove(context.run_dir, number)
    checks = _checks(context, rounds, last)
    for name, row in checks.items():
        context.log.info("%s in the corrected model: %s", name, row["verdict"])
    weights = corrected(here.run_dir, final["method"]).relative_to(context.run_dir).as_posix()
    facts = {"recheck": checks, "rounds": rounds, "final": final | {"weights": weights}}
    verdicts = [row["verdict"] for row in checks.values()]
    counts = {"gone": verdicts.count(GONE), "left": verdicts.count(LEFT)} if checks else {}
    return Again(facts, models, {"chosen": chosen["method"], "rounds": len(rounds), **counts})


def corrected(run_dir: Path, method: str) -> Path:
    """Return where a round's corrected weights are."""
    return run_dir / "corrected" / f"{method}.pt"


def _round_context(context: Context, weights: Path, number: int) -> Context:
    """Return a context for a round; it goes no further by itself."""
    part = context.with_model(weights, context.run_dir / FOLDER / str(number))
    config = inside(part.config, context.load_model(weights))
    part.config = replace(
        config,
        correction=replace(config.correction, rounds=1),
        verify=replace(config.verify, recheck=False, ceiling=False),
    )
    return part


def inside(config: SprayConfig, model: nn.Module) -> SprayConfig:
    """Return a configuration whose layers have the names that they have in a corrected model.

    Where no weights stand for a correction there is a module around the model, and its layers are `model.NAME` then.

    Parameters
    ----------
    config : SprayConfig
        With the layers' names in the architecture.
    model : nn.Module
        The corrected model.
    """
    model, prefix = innermost(model)
    if not prefix:
        return config
    names = {name for name, _ in model.named_modules() if name}

    def renamed(value: Any) -> Any:
        if isinstance(value, list):
            return [renamed(each) for each in value]
        if isinstance(value, dict):
            return {renamed(key): each for key, each in value.items()}
        return prefix + value if isinstance(value, str) and value.removesuffix(INPUT) in names else value

    attribution, analysis = config.attribution, config.analysis
    return replace(
        config,
        attribution=replace(attribution, layer=renamed(attribution.layer), composite=renamed(attribution.composite)),
        analysis=replace(analysis, source=renamed(analysis.source)),
        correction=replace(config.correction, layer=renamed(config.correction.layer)),
    )


def _run(part: Context, asked: Sequence[str]) -> None:
    from spray.pipelines.runner import run_part

    run_part(part, asked)


def _round(root: Path, run_dir: Path, number: int, chosen: dict[str, Any] | None) -> dict[str, Any]:
    """Return what `verification.json` says of a round."""
    return {
        "round": number,
        "run_dir": run_dir.relative_to(root).as_posix(),
        "artifacts": [name for name, _ in load_findings(run_dir)],
        "chosen": None if chosen is None else chosen["method"],
    }


def _checks(context: Context, rounds: Sequence[dict[str, Any]], last: Path | None) -> dict[str, Any]:
    """Return what is left, in the model that was looked at last, of the artifacts of all rounds before."""
    found: dict[str, Any] = {}
    if last is None:
        return found
    for row in rounds:
        before = context.run_dir / row["run_dir"]
        if before != last:
            prefix = "" if row["round"] == 1 else f"{row['round']}/"
            found |= {prefix + name: said for name, said in recheck(before, last, len(context.train)).items()}
    return found


def _remove(run_dir: Path, last: int) -> None:
    """Remove rounds that a run with other settings left behind."""
    for folder in (run_dir / FOLDER).glob("*"):
        if folder.name.isdecimal() and int(folder.name) > last and (folder / "run.json").is_file():
            shutil.rmtree(folder)
