"""What `hans_bench.py` knows of a run: one row for each planted artifact and model, from the run's files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hans_cells import Cell
from rank_cells import context_of

from spray.storage import write_text

COLUMNS: dict[str, str] = {
    "cell": "name of the run's folder",
    "dataset": "photos32, photos64 or fashion",
    "arm": "planted (on one class), clean (nothing planted), everywhere (in all classes alike) or biased (no artifact)",
    "kind": "what was planted",
    "extent": "local, framing, background or global",
    "rate": "share of the class's training images that carry it",
    "seed": "of images, training and planting",
    "class_index": "of the class that it was planted on",
    "n_carriers": "training images that carry it, have a wrong label or were left out",
    "clean_accuracy_of_others": "accuracy of the untouched model on the other classes' clean test images",
    "attacked_accuracy_of_others": "the same with the true artifact added to them",
    "attacked_ceiling": "the same, of the model trained on clean data",
    "relies": "whether the artifact costs the untouched model 5 points, and 5 more than the one trained on clean data",
    "n_candidates": "rows of artifacts.json",
    "false_alarms": "verdicts other than no_effect that are not of a planted artifact's class and samples; of a bias "
    "that is no artifact all but sample_bias",
    "class_rank": "rank of the artifact's class in ranking.json",
    "hit_at_1": "whether it is the first",
    "reciprocal_rank": "1 / class_rank",
    "detected": "whether the first row of artifacts.json is of its class with a verdict other than no_effect",
    "found": "whether the row taken for it has a verdict and most of its samples carry the artifact",
    "found_id": "the row of artifacts.json that is taken for it: of its class, a verdict first, then common samples",
    "verdict": "of that row",
    "isolated_kind": "of that row, as the isolation calls it",
    "precision": "share of its samples that carry the artifact",
    "recall": "share of those that carry it among its samples",
    "auroc": "of its scores of all training images",
    "average_precision": "of its scores of all training images",
    "auroc_in_class": "of its scores of the class's training images",
    "iou": "mean overlap of the mask where it is found and the true one, in the images that carry it (local, framing)",
    "flip_rate": "of that row, as measured by the causal test",
    "control_flip_rate": "of that row",
    "recheck": "what became of its cluster in the chosen corrected model: gone, no_effect or left",
    "chosen": "the correction that verification chose without the truth",
    "model": "original, fine_tuned, a correction, or ceiling: trained on clean data",
    "is_chosen": "whether it is the chosen one",
    "clean_accuracy": "of this model on clean test images",
    "clean_low": "its 95 % interval",
    "clean_high": "its 95 % interval",
    "attacked_accuracy": "of this model on other classes' test images with the true artifact",
    "attacked_low": "its 95 % interval",
    "attacked_high": "its 95 % interval",
    "attacked_to_class": "share of these predicted as the artifact's class",
    "attacked_accuracy_isolated": "with the isolated artifact instead",
    "worst_class_accuracy": "least accuracy of a class",
    "worst_group_accuracy": "least accuracy of a class with or without the true artifact",
    "missing_accuracy": "accuracy on the class's test images of the kind that training lacks (missing)",
    "artifact_relevance": "R_bias: share of relevance inside the true artifact",
    "tcav": "share of the class's test images whose output rises along the artifact's direction",
    "tcav_sensitivity": "mean size of that derivative",
    "seconds_corrected": "for this correction",
    "seconds": "for the whole run",
}
"""The columns of the table, in this order, and what they mean."""
VERSION = 2
"""Raised when rows are computed in another way."""
OF_TRUE_ARTIFACT = (
    "attacked_accuracy",
    "attacked_to_class",
    "worst_group_accuracy",
    "artifact_relevance",
    "missing_accuracy",
    "tcav",
    "tcav_sensitivity",
)
RELIES = 0.05
OVERLAP = 0.5
"""Least share of an artifact's samples that must carry a planted one for it not to be a false alarm."""


def cell_of(record: Mapping[str, Any]) -> Cell:
    """Return the cell that a record is of."""
    return Cell(*(record[key] for key in ("dataset", "seed", "arm", "kind", "rate")))


def rows_of(record: Mapping[str, Any], out: Path) -> list[dict[str, Any]]:
    """Return a cell's rows, computed once."""
    cell = cell_of(record)
    folder = out / cell.name
    path = folder / "rows.json"
    stamp = [VERSION, (folder / "cell.json").stat().st_mtime_ns]
    if path.is_file() and (kept := json.loads(path.read_text()))["stamp"] == stamp:
        return list(kept["rows"])
    rows = [_idle(cell, record)] if "idle" in record else _compute(cell, record, folder)
    write_text(path, json.dumps({"stamp": stamp, "rows": rows}))
    return rows


def _idle(cell: Cell, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of a cell that ended with its training, since its model does not rely on its artifact."""
    clean, attacked, ceiling = record["idle"]
    return {
        "cell": cell.name,
        "dataset": cell.dataset,
        "arm": cell.arm,
        "kind": cell.kind,
        "rate": cell.rate,
        "seed": cell.seed,
        "clean_accuracy_of_others": clean,
        "attacked_accuracy_of_others": attacked,
        "attacked_ceiling": ceiling,
        "relies": False,
        "false_alarms": 0,
        "model": "original",
    }


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows as CSV with all `COLUMNS`; what is not known is empty."""
    table = io.StringIO()
    writer = csv.DictWriter(table, list(COLUMNS), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _plain(value) for key, value in row.items()} for row in rows)
    write_text(path, table.getvalue())


def _plain(value: Any) -> Any:
    return "" if value is None else round(value, 6) if isinstance(value, float) else value


def _compute(cell: Cell, record: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    from spray.data.truth import read_truth

    ranking, artifacts, said, run = (
        json.loads((folder / name).read_text())
        for name in ("ranking.json", "artifacts.json", "verification.json", "run.json")
    )
    candidates, models = artifacts["artifacts"], said["models"]
    truth = next((row for row in read_truth(folder) if row["samples"] or row.get("left_out")), None)
    chosen = (said.get("chosen") or {}).get("method")
    of_cell: dict[str, Any] = {
        "cell": cell.name,
        "dataset": cell.dataset,
        "arm": cell.arm,
        "kind": cell.kind or "none",
        "rate": cell.rate,
        "seed": cell.seed,
        "n_candidates": len(candidates),
        "false_alarms": len(false_alarms(candidates, truth if cell.arm == "planted" else None, cell.arm == "biased")),
        "chosen": chosen,
        "seconds": record["seconds"],
    }
    if truth is not None:
        of_cell |= {
            "extent": truth["extent"],
            "n_carriers": len(truth.get("left_out") or truth["samples"]),
        } | _reliance(models)
    if truth is not None and cell.arm == "planted":
        of_cell |= {"class_index": truth["class_index"], **ranked(ranking["classes"], truth["class_index"])}
        of_cell |= _detection(folder, record["overrides"], candidates, truth, said)
    spent = run["stages"]["correct"].get("facts", {}).get("seconds", {})
    return [
        of_cell
        | {"model": name, "is_chosen": name == chosen, "seconds_corrected": spent.get(name)}
        | _model(row, cell.arm)
        for name, row in models.items()
    ]


def _reliance(models: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the true artifact costs the untouched model, and one that was trained on clean data."""
    original, ceiling = models["original"]["planted"], models.get("ceiling", {}).get("planted", {})
    clean, attacked = original["unattacked_accuracy"], original["attacked_accuracy"]
    facts = {
        "clean_accuracy_of_others": clean,
        "attacked_accuracy_of_others": attacked,
        "attacked_ceiling": ceiling.get("attacked_accuracy"),
    }
    return facts | {"relies": relies(clean, attacked, facts["attacked_ceiling"])}


def relies(clean: float | None, attacked: float | None, ceiling: float | None) -> bool:
    """Return whether an artifact costs a model `RELIES`, and as much more than one that was trained on clean data."""
    if clean is None or attacked is None:
        return False
    return clean - attacked >= RELIES and (ceiling is None or ceiling - attacked >= RELIES)


def ranked(classes: Sequence[Mapping[str, Any]], class_index: int) -> dict[str, Any]:
    """Return at which place of the ranking a class is."""
    rank = next((place for place, row in enumerate(classes, 1) if row["class_index"] == class_index), None)
    return {"class_rank": rank, "hit_at_1": rank == 1, "reciprocal_rank": 0.0 if rank is None else 1 / rank}


def false_alarms(
    candidates: Sequence[Mapping[str, Any]], truth: Mapping[str, Any] | None, of_samples: bool = False
) -> list[Mapping[str, Any]]:
    """Return the rows with a verdict that are not of the planted class and, for the most part, its samples.

    Where a bias is `of_samples`, such as a kind that is missing, it is right to say so: `sample_bias`.
    """
    wrong = []
    for row in candidates:
        if row["verdict"] == "no_effect" or (of_samples and row["verdict"] == "sample_bias"):
            continue
        right = truth is not None and row["class_index"] == truth["class_index"]
        if not right or truth is None or precision_recall(row["samples"], truth["samples"])[0] < OVERLAP:
            wrong.append(row)
    return wrong


def precision_recall(found: Sequence[int], true: Sequence[int]) -> tuple[float, float]:
    """Return which share of the samples found are true ones, and which of the true ones are found."""
    both = len(set(found) & set(true))
    return both / len(found) if len(found) else 0.0, both / len(true) if len(true) else 0.0


def matching(candidates: Sequence[Mapping[str, Any]], truth: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the row that is taken for a planted artifact: of its class, one with a verdict first, then by overlap."""
    of_class = [row for row in candidates if row["class_index"] == truth["class_index"]]
    true = set(truth["samples"])

    def strength(row: Mapping[str, Any]) -> tuple[bool, float]:
        samples = set(row["samples"])
        return row["verdict"] != "no_effect", len(samples & true) / max(1, len(samples | true))

    return max(of_class, key=strength, default=None)


def _detection(
    folder: Path,
    overrides: Sequence[str],
    candidates: Sequence[Mapping[str, Any]],
    truth: Mapping[str, Any],
    said: Mapping[str, Any],
) -> dict[str, Any]:
    """Return how well the planted artifact was found and isolated."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    from spray.pipelines.isolated import load_scores

    first = candidates[0] if candidates else None
    detected = first is not None and first["class_index"] == truth["class_index"] and first["verdict"] != "no_effect"
    row = matching(candidates, truth)
    if row is None:
        return {"detected": detected, "found": False, "precision": 0.0, "recall": 0.0}
    precision, recall = precision_recall(row["samples"], truth["samples"])
    found: dict[str, Any] = {
        "detected": detected,
        "found": row["verdict"] != "no_effect" and precision >= OVERLAP,
        "found_id": row["id"],
        "verdict": row["verdict"],
        "isolated_kind": row.get("kind"),
        "precision": precision,
        "recall": recall,
        "flip_rate": row["flip_rate"],
        "control_flip_rate": row["control_flip_rate"],
        "recheck": said.get("recheck", {}).get(row["id"], {}).get("verdict"),
    }
    scores = load_scores(folder / row["scores"])
    carries = np.zeros(len(scores), dtype=bool)
    carries[truth["samples"]] = True
    dataset = images_of(folder, overrides)
    of_class = np.asarray(dataset.labels) == truth["class_index"]
    found["auroc"] = float(roc_auc_score(carries, scores))
    found["average_precision"] = float(average_precision_score(carries, scores))
    if not carries[of_class].all():
        found["auroc_in_class"] = float(roc_auc_score(carries[of_class], scores[of_class]))
    if truth["masks"] is not None and truth["extent"] in ("local", "framing"):
        found["iou"] = _iou(folder, row["id"], truth, dataset)
    return found


@dataclass(frozen=True)
class _Configured:
    """A cell as `rank_cells.context_of` takes it, with the configuration that it was run with."""

    name: str
    given: tuple[str, ...]

    def overrides(self, out: Path) -> list[str]:
        """Return the configuration."""
        return list(self.given)


def configured(folder: Path, overrides: Sequence[str]) -> Any:
    """Return the context of a cell that was run with this configuration."""
    return context_of(_Configured(folder.name, tuple(overrides)), folder.parent)


def images_of(folder: Path, overrides: Sequence[str]) -> Any:
    """Return a cell's training images, with what is planted in them."""
    return configured(folder, overrides).train


def _iou(folder: Path, name: str, truth: Mapping[str, Any], dataset: Any, most: int = 200) -> float | None:
    from spray.data.truth import read_masks
    from spray.pipelines.isolated import load_artifact

    path = folder / "artifacts" / name / "artifact.npz"
    if not path.is_file():
        return None
    indices, opacity = read_masks(folder, truth["id"])
    found = load_artifact(path).found(dataset.batch(np.asarray(indices[:most])))
    return mean_iou(found.numpy()[:, 0], np.asarray(opacity[:most], dtype=np.float32))


def mean_iou(found: np.ndarray, true: np.ndarray) -> float:
    """Return the mean intersection over union of masks (n, H, W), each where it is at least half as opaque as ever."""
    a, b = (m >= 0.5 * m.max(axis=(1, 2), keepdims=True).clip(1e-6) for m in (found, true))
    union = (a | b).sum(axis=(1, 2))
    return float(((a & b).sum(axis=(1, 2)) / np.maximum(union, 1)).mean())


def _model(row: Mapping[str, Any], arm: str) -> dict[str, Any]:
    """Return what verification says of a model, with the true artifact where there is one."""
    true = row.get("planted") or {}
    facts = {
        "clean_accuracy": row["clean_accuracy"],
        "clean_low": row["clean_accuracy_interval"][0],
        "clean_high": row["clean_accuracy_interval"][1],
        "worst_class_accuracy": row["worst_class_accuracy"],
        "attacked_accuracy_isolated": row["attacked_accuracy"],
    }
    if true.get("attacked_accuracy") is not None:
        low, high = true["attacked_accuracy_interval"]
        facts |= {"attacked_low": low, "attacked_high": high}
    return facts | {name: true.get(name) for name in OF_TRUE_ARTIFACT}
