"""Isolated artifacts on disk, exactly as they were found."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spray.correction.base import Finding
from spray.isolation.candidate import Artifact
from spray.storage import read_json, write_bytes


def save_artifact(path: Path, artifact: Artifact) -> None:
    """Write an artifact as an `.npz` file."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        mask=artifact.mask.numpy(),
        pattern=artifact.pattern.numpy(),
        shifts=artifact.shifts.numpy(),
        scale=artifact.scale,
        radius=artifact.radius,
        constant=artifact.constant,
    )
    write_bytes(path, buffer.getvalue())


def load_artifact(path: Path) -> Artifact:
    """Read an artifact; nothing in the file can run code."""
    with np.load(path, allow_pickle=False) as file:
        return Artifact(
            mask=torch.from_numpy(file["mask"]),
            pattern=torch.from_numpy(file["pattern"]),
            shifts=torch.from_numpy(file["shifts"]),
            scale=float(file["scale"]),
            radius=int(file["radius"]),
            constant=bool(file["constant"]),
        )


def load_scores(path: Path) -> np.ndarray:
    """Return each training sample's score, float64 (N,), from `scores.csv`."""
    with path.open(newline="") as file:
        rows = [(int(row["sample_index"]), float(row["score"])) for row in csv.DictReader(file)]
    scores = np.full(len(rows), -np.inf)
    for index, score in rows:
        scores[index] = score
    return scores


def load_findings(run_dir: Path) -> list[tuple[str, Finding]]:
    """Return id and finding of each artifact that passed the causal test, best first."""
    rows: list[dict[str, Any]] = read_json(run_dir / "artifacts.json")["artifacts"]
    return [
        (
            row["id"],
            Finding(
                load_artifact(run_dir / "artifacts" / row["id"] / "artifact.npz"),
                row["class_index"],
                np.array(row["samples"], dtype=np.int64),
                load_scores(run_dir / "artifacts" / row["id"] / "scores.csv"),
            ),
        )
        for row in rows
        if row["verdict"] in ("clever_hans", "backdoor")
    ]
