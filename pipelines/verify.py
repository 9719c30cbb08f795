"""The seventh stage: every model on clean and on attacked test images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spray.correction.base import Finding
from spray.data.plant_options import Plant
from spray.data.truth import read_truth
from spray.pipelines.context import Context
from spray.pipelines.isolated import load_findings
from spray.pipelines.stage import Stage
from spray.storage import read_json, write_json
from spray.training import batches
from spray.verification import accuracy, attack_metrics, clean_metrics, relevance_inside

MEASURES = (
    "attacked_accuracy",
    "attacked_accuracy_interval",
    "attacked_to_class",
    "attacked_to_class_interval",
    "artifact_relevance",
    "artifact_relevance_interval",
    "n_attacked",
)


@dataclass(frozen=True)
class Attack:
    """Adds an artifact to test images: returns them (n, C, H, W) and where it went, (n, 1, H, W).

    They are those of other classes, or all where the artifact is no sign of any class.
    """

    class_index: int | None
    add: Callable[[Tensor, np.ndarray], tuple[Tensor, Tensor]]


def run(context: Context) -> dict[str, Any]:
    """Write `verification.json`. Here, for the first time, the truth about a planted artifact is looked at."""
    findings = load_findings(context.run_dir)
    attacks = {name: _found(finding, len(context.test), context.config.seed) for name, finding in findings}
    planted = _planted_here(context)
    models = {}
    names = ["original", *_corrected(context)]
    for name in context.progress(names, len(names), "models verified"):
        model = _load(context, name)
        logits = context.predict(model, context.test)
        clean = clean_metrics(logits, context.test.labels)
        artifacts = {key: clean | _attacked(context, model, attack) for key, attack in attacks.items()}
        first = next(iter(artifacts.values()), clean | dict.fromkeys(MEASURES))
        models[name] = first | {"artifacts": artifacts}
        if planted:
            effects = {row["id"]: clean | _effect(context, model, logits, row, plant) for row, plant in planted}
            models[name]["planted"] = next(iter(effects.values())) | {"plants": effects}
        context.log.info("%s: %s", name, _line(models[name]))
    write_json(context.run_dir / "verification.json", {"models": models})
    return {"models": names, "artifacts": list(attacks)}


def _corrected(context: Context) -> list[str]:
    """Return the corrected models that the stage before made."""
    return list(read_json(context.run_dir / "run.json")["stages"]["correct"].get("facts", {}).get("methods", []))


def _load(context: Context, name: str) -> nn.Module:
    if name == "original":
        return context.model
    return context.load_model(context.run_dir / "corrected" / f"{name}.pt")


def _found(finding: Finding, n_test: int, seed: int) -> Attack:
    """Attack with the isolated artifact, at the place that is drawn for each test image."""
    draws = np.random.default_rng([seed, 7]).integers(0, 2**31, n_test)

    def add(pixels: Tensor, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        mask, pattern = finding.artifact.placed(draws[indices])
        return pixels + mask * (pattern - pixels), mask

    return Attack(finding.class_index, add)


def _planted_here(context: Context) -> list[tuple[dict[str, Any], Plant]]:
    """Return what was planted and changed something: what is known of it, and the plant."""
    plants = {plant.name: plant for plant in context.plants}
    rows = read_truth(context.run_dir)
    return [(row, plants[row["id"]]) for row in rows if row["samples"] or row.get("left_out")]


def _effect(context: Context, model: nn.Module, logits: Tensor, row: dict[str, Any], plant: Plant) -> dict[str, Any]:
    """Return what a planted artifact, or another bias, does to a model whose logits of the test images are given."""
    if plant.is_drawn:
        return _attacked(context, model, _planted(plant))
    # There is nothing to add to an image.
    effect: dict[str, Any] = dict.fromkeys(MEASURES)
    if "test_samples" in row:
        of_kind = np.asarray(row["test_samples"], dtype=np.int64)
        effect |= accuracy("missing_accuracy", logits[of_kind], context.test.labels[of_kind])
        effect["n_missing"] = len(of_kind)
    return effect


def _planted(plant: Plant) -> Attack:
    """Attack with the true artifact."""

    def add(pixels: Tensor, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        marked, opacity = plant.mark(pixels, [f"test:{i}" for i in indices])
        return marked, opacity[:, None]

    return Attack(plant.target, add)


def _attacked(context: Context, model: nn.Module, attack: Attack) -> dict[str, Any]:
    """Attack all test images of the other classes; explain some of them."""
    labels = context.test.labels
    others = np.arange(len(labels)) if attack.class_index is None else np.flatnonzero(labels != attack.class_index)
    explained = set(others[:: max(1, -(-len(others) // context.config.verify.n_explained))].tolist())
    logits, shares = [], []
    for part in batches(len(others), context.batch_size):
        indices = others[part]
        pixels, mask = attack.add(context.test.batch(indices), indices)
        logits.append(context.predict_pixels(model, pixels))
        which = np.flatnonzero([i in explained for i in indices.tolist()])
        if len(which):
            x = context.normalizer(pixels[which], context.device)
            own = torch.from_numpy(np.asarray(labels[indices[which]], np.int64)).to(context.device)
            relevance = context.explain(model, x, own if attack.class_index is None else attack.class_index)
            shares.append(relevance_inside(relevance.cpu(), mask[which]))
    return attack_metrics(torch.cat(logits), labels[others], attack.class_index, torch.cat(shares))


def _line(record: dict[str, Any]) -> str:
    line = f"clean {record['clean_accuracy']:.3f}"
    if record["attacked_accuracy"] is not None:
        line += f", attacked {record['attacked_accuracy']:.3f}"
    if "planted" in record:
        for name, effect in record["planted"]["plants"].items():
            what = "artifact" if name == "plant" else name
            if effect["attacked_accuracy"] is not None:
                line += f", attacked with the planted {what} {effect['attacked_accuracy']:.3f}"
            elif effect.get("missing_accuracy") is not None:
                line += f", on the kind of sample that training lacks {effect['missing_accuracy']:.3f}"
    return line


STAGE = Stage(
    name="verify",
    needs=("train", "isolate", "correct"),
    settings=(
        "verify",
        "seed",
        "attribution.method",
        "attribution.composite",
        "attribution.options",
        "attribution.layer",
        "dataset.plant",
        "dataset.plants",
    ),
    outputs=("verification.json",),
    run=run,
)
