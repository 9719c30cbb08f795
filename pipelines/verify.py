"""The seventh stage: every model on clean and on attacked test images, and the best corrected one looked at again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from spray.data.plant_options import Plant
from spray.data.truth import read_truth
from spray.pipelines.ceiling import CEILING, train_ceiling
from spray.pipelines.context import Context
from spray.pipelines.isolated import load_findings
from spray.pipelines.measures import NOTHING, Attack, isolated, measure, planted
from spray.pipelines.rounds import Hits, choose, corrected, look_again
from spray.pipelines.stage import Stage
from spray.storage import read_json, write_json
from spray.verification import accuracy, clean_metrics


def run(context: Context) -> dict[str, Any]:
    """Write `verification.json`. Here, for the first time, the truth about a planted artifact is looked at."""
    attacks = {name: isolated(context, finding) for name, finding in load_findings(context.run_dir)}
    plants = _planted_here(context)
    rows: dict[str, dict[str, Any]] = {}
    hits: dict[str, Hits] = {}

    def verify(weights: Mapping[str, Path]) -> None:
        for name in context.progress(weights, len(weights), "models verified"):
            model = context.model if name == "original" else context.load_model(weights[name])
            rows[name], hits[name] = _verified(context, model, attacks, plants)
            context.log.info("%s: %s", name, _line(rows[name]))

    made = {name: corrected(context.run_dir, name) for name in _methods(context)}
    verify({"original": context.run_dir / "model.pt"} | made)
    # The choice knows nothing of the truth.
    options = context.config
    chosen = choose(context.test.labels, hits, options.seed, options.correction.max_loss) if made and attacks else None
    again = look_again(context, chosen)
    ceiling = train_ceiling(context)
    verify(again.models | ({CEILING: ceiling} if ceiling else {}))
    write_json(context.run_dir / "verification.json", {"models": rows, "chosen": chosen, **again.facts})
    return {"models": list(rows), "artifacts": list(attacks), **again.summary}


def _methods(context: Context) -> list[str]:
    """Return the corrected models that the stage before made."""
    return list(read_json(context.run_dir / "run.json")["stages"]["correct"].get("facts", {}).get("methods", []))


def _verified(
    context: Context,
    model: nn.Module,
    attacks: dict[str, Attack],
    plants: list[tuple[dict[str, Any], Plant]],
) -> tuple[dict[str, Any], Hits]:
    """Return what `verification.json` says of a model, and which test images it classifies right."""
    labels = np.asarray(context.test.labels)
    logits = context.predict(model, context.test)
    clean = clean_metrics(logits, labels)
    measured = {key: measure(context, model, logits, attack) for key, attack in attacks.items()}
    artifacts = {key: clean | facts for key, (facts, _) in measured.items()}
    attacked = [(labels != attacks[key].class_index, right) for key, (_, right) in measured.items()]
    row = next(iter(artifacts.values()), clean | NOTHING) | {"artifacts": artifacts}
    if plants:
        effects = {truth["id"]: clean | _effect(context, model, logits, truth, plant) for truth, plant in plants}
        row["planted"] = next(iter(effects.values())) | {"plants": effects}
    return row, Hits(logits.argmax(dim=1).numpy() == labels, attacked)


def _planted_here(context: Context) -> list[tuple[dict[str, Any], Plant]]:
    """Return what was planted and changed something: what is known of it, and the plant."""
    plants = {plant.name: plant for plant in context.plants}
    rows = read_truth(context.run_dir)
    return [(row, plants[row["id"]]) for row in rows if row["samples"] or row.get("left_out")]


def _effect(context: Context, model: nn.Module, logits: Tensor, row: dict[str, Any], plant: Plant) -> dict[str, Any]:
    """Return what a planted artifact, or another bias, does to a model whose logits of the test images are given."""
    if plant.is_drawn:
        attack = planted(context, plant, np.asarray(row["samples"], dtype=np.int64))
        return measure(context, model, logits, attack)[0]
    # There is nothing to add to an image.
    effect = dict(NOTHING)
    if "test_samples" in row:
        of_kind = np.asarray(row["test_samples"], dtype=np.int64)
        effect |= accuracy("missing_accuracy", logits[of_kind], context.test.labels[of_kind])
        effect["n_missing"] = len(of_kind)
    return effect


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
        "correction.rounds",
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
