"""Which planted models rely on their artifact at all, known before anything is explained.

What a model does not rely on can't be found, and is no miss; with `hans_bench.py --relying` its cell ends here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

import hans_cells
import numpy as np
from hans_cells import Cell
from hans_rows import configured, relies

from spray.storage import write_text

_LOCKS: dict[str, Lock] = defaultdict(Lock)
"""A clean model is trained once, whichever cell asks first."""


def idle(cell: Cell, out: Path, methods: Sequence[str], more: Sequence[str]) -> dict[str, Any] | None:
    """Train a planted model; return its record if it doesn't rely on its artifact, None if it does.

    The record is what `hans_cells.make` returns, with `idle`: accuracy on the other classes' test images, the same with
    the artifact, and that of a model trained on clean data. It is kept in `cell.json`.
    """
    overrides = [*cell.overrides(out, methods), *more]
    record = hans_cells.read_record(out / cell.name)
    if record is not None and record["overrides"] == overrides:
        return record if "idle" in record else None
    poisoned = _trained(cell, out, methods, more)
    clean = _trained(Cell(cell.dataset, cell.seed), out, methods, more)
    facts = _accuracies(poisoned, clean.model)
    if relies(*facts):
        return None
    record = asdict(cell) | {"overrides": overrides, "seconds": 0.0, "idle": facts}
    write_text(out / cell.name / "cell.json", json.dumps(record, indent=1))
    return record


def _trained(cell: Cell, out: Path, methods: Sequence[str], more: Sequence[str]) -> Any:
    """Return the context of a cell whose model is trained."""
    overrides = [*cell.overrides(out, methods), *more]
    with _LOCKS[cell.name]:
        if not (out / cell.name / "model.pt").exists():
            command = [sys.executable, "-m", "spray.pipelines.cli", *overrides, "stages=[train]"]
            subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return configured(out / cell.name, overrides)


def _accuracies(context: Any, clean: Any) -> list[float]:
    """Return accuracies on other classes' test images: without the artifact, with it, and a clean model's with it."""
    from spray.data.planting import planted_truth

    truth = planted_truth(context.config.dataset.plant, context.train)
    others = np.flatnonzero(context.test.labels != truth.class_index)
    pixels = context.test.batch(others)
    marked = truth.plant.mark(pixels, [f"test:{i}" for i in others])[0]
    shown = ((context.model, pixels), (context.model, marked), (clean, marked))
    labels = context.test.labels[others]
    return [float((context.predict_pixels(model, x).argmax(dim=1).numpy() == labels).mean()) for model, x in shown]
