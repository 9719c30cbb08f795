"""Which planted models rely on their artifact at all, known before anything is explained.

What a model does not rely on can't be found, and is no miss; with `hans_bench.py --relying` its cell ends here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hans_cells
import numpy as np
from hans_cells import Cell
from hans_rows import configured, relies

from spray.storage import write_text


def idle(cell: Cell, out: Path, methods: Sequence[str], more: Sequence[str]) -> dict[str, Any] | None:
    """Train a planted model; return its record if it doesn't rely on its artifact, None if it does.

    The record is what `hans_cells.make` returns, with `idle`: accuracy on the other classes' test images, the same with
    the artifact, and that of a model trained on clean data. It is kept in `cell.json`.

    Raises
    ------
    CellError
        If a training fails.
    """
    overrides = cell.overrides(out, methods, more)
    poisoned = _trained(cell, out, methods, more)
    twin = Cell(cell.dataset, cell.seed)
    clean = _up_to_date(twin, out, methods, more)
    if clean is None:
        # A clean model is trained once, whichever cell asks first; its own cell may be at it.
        with hans_cells.held(out / twin.name, wait=True):
            clean = _trained(twin, out, methods, more)
    facts = _accuracies(poisoned, clean.model)
    if relies(*facts):
        return None
    record = asdict(cell) | {"overrides": overrides, "seconds": 0.0, "idle": facts}
    write_text(out / cell.name / "cell.json", json.dumps(record, indent=1))
    return record


def _trained(cell: Cell, out: Path, methods: Sequence[str], more: Sequence[str]) -> Any:
    """Return the context of a cell whose model is trained with just this configuration."""
    context = _up_to_date(cell, out, methods, more)
    if context is None:
        overrides = cell.overrides(out, methods, more)
        hans_cells.spray([*overrides, "stages=[train]"])
        context = configured(out / cell.name, overrides)
    return context


def _up_to_date(cell: Cell, out: Path, methods: Sequence[str], more: Sequence[str]) -> Any | None:
    """Return the context of a cell whose model needs no training, None if it does.

    That is for `spray` to say: a `model.pt` may be there from other overrides. It is asked here, not by a start of the
    command, which takes seconds and the folder's lock, that the rest of a cell's run may hold.
    """
    from spray.pipelines.record import Record
    from spray.pipelines.runner import decide, find_inputs
    from spray.pipelines.stages import load

    folder = out / cell.name
    if not (folder / "model.pt").exists():
        return None
    context = configured(folder, cell.overrides(out, methods, more))
    stages = load(["train"], context.config)
    (decision,) = decide(context, ["train"], stages, Record(folder), find_inputs(context))
    return context if decision.reason is None else None


def _accuracies(context: Any, clean: Any) -> list[float]:
    """Return accuracies on other classes' test images: without the artifact, with it, and a clean model's with it."""
    from spray.data.planting import planted_truth

    truth = planted_truth(context.config.dataset.plant, context.train)
    assert truth is not None  # only planted cells are asked about
    others = np.flatnonzero(context.test.labels != truth.class_index)
    pixels = context.test.batch(others)
    marked = truth.plant.mark(pixels, [f"test:{i}" for i in others])[0]
    shown = ((context.model, pixels), (context.model, marked), (clean, marked))
    labels = context.test.labels[others]
    return [float((context.predict_pixels(model, x).argmax(dim=1).numpy() == labels).mean()) for model, x in shown]
