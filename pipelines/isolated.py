"""Isolated artifacts on disk, exactly as they were found."""

from __future__ import annotations

import csv
import io
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from torch import Tensor

from spray.correction.base import Finding
from spray.isolation.artifact import ARTIFACTS, Artifact
from spray.storage import read_json, write_bytes


def save_artifact(path: Path, artifact: Artifact) -> None:
    """Write an artifact of any kind as an `.npz` file."""
    buffer = io.BytesIO()
    values = {field.name: getattr(artifact, field.name) for field in fields(artifact)}
    arrays: dict[str, Any] = {
        name: value.numpy() if isinstance(value, Tensor) else value for name, value in values.items()
    }
    np.savez_compressed(buffer, **(arrays | {"kind": artifact.kind}))
    write_bytes(path, buffer.getvalue())


def load_artifact(path: Path) -> Artifact:
    """Read an artifact; nothing in the file can run code."""
    with np.load(path, allow_pickle=False) as file:
        kind = ARTIFACTS.get(str(file["kind"]) if "kind" in file else Artifact.kind)
        types = get_type_hints(kind)
        values: dict[str, Any] = {}
        for field in fields(kind):
            if field.name not in file and field.default is not MISSING:
                continue  # written before there was such a field
            value = file[field.name]
            values[field.name] = torch.from_numpy(value) if types[field.name] is Tensor else value.item()
        return kind(**values)


def load_scores(path: Path) -> np.ndarray:
    """Return each image's score, float64 (N,), from `scores.csv` or `test_scores.csv`."""
    with path.open(newline="") as file:
        table = csv.reader(file)
        next(table, None)
        rows = [(int(index), float(score)) for index, score in table]
    scores = np.full(len(rows), -np.inf)
    for index, score in rows:
        scores[index] = score
    return scores


def load_findings(run_dir: Path) -> list[tuple[str, Finding]]:
    """Return id and finding of each artifact that passed the causal test, best first."""
    rows: list[dict[str, Any]] = read_json(run_dir / "artifacts.json")["artifacts"]
    found = []
    for row in rows:
        if row["verdict"] in ("clever_hans", "backdoor"):
            folder = run_dir / "artifacts" / row["id"]
            known = "test_scores" in row  # not in runs of earlier versions
            finding = Finding(
                load_artifact(folder / "artifact.npz"),
                row["class_index"],
                np.array(row["samples"], dtype=np.int64),
                load_scores(folder / "scores.csv"),
                row.get("score_threshold"),
                load_scores(folder / "test_scores.csv") if known else None,
            )
            found.append((row["id"], finding))
    return found
