"""Says what a run would do, how much it would write and how long it would take, and does none of it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spray.pipelines.record import Record
from spray.pipelines.runner import decide, find_inputs
from spray.pipelines.stage import Stage
from spray.pipelines.validate import check_settings, find_target, try_out

if TYPE_CHECKING:
    from spray.pipelines.context import Context


def print_plan(context: Context, asked: Sequence[str], stages: Mapping[str, Stage]) -> None:
    """Print the plan of a run to standard output; nothing is written to disk.

    Raises
    ------
    UserError
        For every mistake that would stop the run.
    """
    check_settings(context, asked)
    record = Record(context.run_dir)
    decisions = decide(context, asked, stages, record, find_inputs(context))
    waiting = [decision.stage.name for decision in decisions if decision.reason is not None]
    if waiting:
        try_out(context, waiting)
    print(f"run_dir: {context.run_dir}")
    for decision in decisions:
        seconds = record.stages.get(decision.stage.name, {}).get("seconds")
        what = "up to date"
        if decision.reason is not None:
            what = f"would run: {decision.reason}" + (f" (took {seconds:.0f} s before)" if seconds else "")
        print(f"  {decision.stage.name:<10}{what}")
    train = context.train
    print(f"samples: {len(train)} training, {len(context.test)} test, {len(train.classes)} classes")
    print(f"attributions.h5: {human_bytes(attribution_bytes(context))}")
    if "attribute" in waiting:
        seconds = attribution_seconds(context)
        print(f"attribution: about {seconds / 60:.1f} min on {context.device} (measured on one batch)")
    print(f"free disk: {human_bytes(shutil.disk_usage(existing_parent(context.run_dir)).free)}")


def attribution_bytes(context: Context) -> int:
    """Return the bytes of `attributions.h5`: relevance, label and prediction of every training sample."""
    train = context.train
    relevance = prod(train.image_shape) * np.dtype(context.config.attribution.dtype).itemsize
    label, logit = 8, 4
    return len(train) * (relevance + label + len(train.classes) * logit)


def attribution_seconds(context: Context) -> float:
    """Estimate the time that attribution takes from one batch, measured after a smaller one to warm up."""
    options = context.config.attribution
    n = min(options.batch_size, len(context.train))
    target = find_target(options.target, len(context.train.classes))
    model = context.build_model()
    seconds = 0.0
    for size in (min(n, 2), n):
        start = time.perf_counter()
        images = context.normalizer(context.train.batch(np.arange(size)), context.device)
        context.explain(model, images, target if isinstance(target, int) else 0).cpu()
        seconds = time.perf_counter() - start
    return seconds * len(context.train) / n


def human_bytes(n: float) -> str:
    """Return a number of bytes as people read it."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def existing_parent(path: Path) -> Path:
    """Return the nearest folder on the way up that exists."""
    return next(parent for parent in (path, *path.parents) if parent.exists())
