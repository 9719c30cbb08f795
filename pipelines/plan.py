"""Says what a run would do, how much it would write and how long it would take, and does none of it."""

from __future__ import annotations

import resource
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from spray.bulk.batch_size import find_batch_size
from spray.pipelines.analysis_options import clusterings_of, projections_of
from spray.pipelines.compute import COMPUTES
from spray.pipelines.compute.base import choose_shard_size, layout_of
from spray.pipelines.project import is_project
from spray.pipelines.record import Record
from spray.pipelines.runner import decide, find_inputs
from spray.pipelines.stage import Stage
from spray.pipelines.validate import check_settings, try_out

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
    if "verify" in waiting:
        for line in further_runs(context):
            print(f"  {'':<10}{line}")
    if is_project(context.config):
        print(f"samples: {len(context.train)}, {len(context.train.classes)} classes")
        return
    train, config = context.train, context.config
    print(f"samples: {len(train)} training, {len(context.test)} test, {len(train.classes)} classes")
    model = context.build_model()
    size = choose_shard_size(context, model)
    needed = written_bytes(context, [decision.stage.name for decision in decisions], model)
    for name, n_bytes in needed.items():
        print(f"{name}: {human_bytes(n_bytes)}")
    if "attribute" in waiting:
        shards = -(-len(train) // size)
        print(f"shards: {shards} of {size} samples, each computed again as a whole if it is interrupted")
        cost = attribution_cost(context, model, size)
        devices = device_count(context)
        print(
            f"attribution: about {duration(cost.seconds / devices)} on {context.device} in batches of "
            f"{cost.batch_size} (measured on one), {config.compute.name}" + f", {devices} such devices" * (devices > 1)
        )
        print(f"peak memory: about {human_bytes(cost.memory)} in each process")
        if config.compute.name == "dask_slurm":
            from spray.pipelines.compute.dask_slurm import job_script

            print(f"job script of a worker:\n{job_script(context)}")
    free = shutil.disk_usage(existing_parent(context.run_dir)).free
    print(f"free disk: {human_bytes(free)}")
    total = sum(needed.values()) + (needed.get("attributions.h5", 0) if "attribute" in waiting else 0)
    if total > free:
        print(
            f"WARNING: {human_bytes(total)} are needed (shards and attributions.h5 are there at the same time for a "
            "while); take attribution.dtype=float16, attribution.channels=sum, attribution.pool=K or another run_dir"
        )


def looks_again(context: Context) -> int:
    """Return how often corrected models are looked at, at most."""
    correction = context.config.correction
    return correction.rounds - 1 + int(context.config.verify.recheck) if correction.methods else 0


def further_runs(context: Context) -> list[str]:
    """Return what the stage verify does beyond this run: further rounds, and a model trained on unplanted images."""
    verify, looks = context.config.verify, looks_again(context)
    lines = []
    if looks:
        kept = "verify.recheck=false leaves the last look out" if verify.recheck else "verify.recheck is off"
        lines.append(
            f"if artifacts are found: attribute to isolate again on the corrected model, up to {looks} "
            f"time{'s' * (looks > 1)}, in rounds/2" + (f" to rounds/{looks + 1}" if looks > 1 else "") + f" ({kept})"
        )
    if verify.ceiling:
        lines.append("a second model is trained, without what is planted, in ceiling/")
    return lines


def written_bytes(context: Context, stages: Sequence[str], model: nn.Module) -> dict[str, int]:
    """Return the bytes of what the stages write, by file, before compression and without what is small."""
    train, analysis = context.train, context.config.analysis
    n, image = len(train), prod(train.image_shape[1:])
    weights = sum(value.nbytes for value in model.state_dict().values())
    sizes: dict[str, int] = {}
    if "train" in stages:
        sizes["model.pt"] = weights
    if "attribute" in stages:
        sizes["attributions.h5"] = n * layout_of(context, n, model).bytes_per_row
    if "analyze" in stages:
        columns = 1 + analysis.n_components + 2 * len(projections_of(analysis)) + len(clusterings_of(analysis))
        sizes["analysis.h5"] = len(analysis.groups) * n * 4 * columns
    if "isolate" in stages:
        most = min(context.config.isolate.candidates, context.config.isolate.per_class * len(train.classes))
        sizes["artifacts/"] = most * n * 16
    if "verify" in stages:
        looks = looks_again(context)
        again = sum(sizes.get(name, 0) for name in ("model.pt", "attributions.h5", "analysis.h5", "artifacts/"))
        sizes |= {"rounds/": looks * again} if looks else {}
        sizes |= {"ceiling/": weights} if context.config.verify.ceiling else {}
    if "correct" in stages:
        sizes["corrected/"] = (1 + len(context.config.correction.methods)) * weights
    if "report" in stages:
        sizes["virelay/"] = n * 3 * image
    return sizes


@dataclass(frozen=True)
class Cost:
    """What explaining all training samples takes: seconds, bytes of memory, and in which batches."""

    seconds: float
    memory: float
    batch_size: int


def attribution_cost(context: Context, model: nn.Module, most: int) -> Cost:
    """Estimate the cost of attribution from one batch, measured after a smaller one to warm up."""
    n, device = len(context.train), context.device

    def run(size: int) -> None:
        labels = np.asarray(context.train.labels)[np.arange(size) % n]
        relevance, _ = context.attribute(model, context.trial_images(size), labels)
        relevance[""].cpu()

    wanted = context.config.attribution.batch_size
    if wanted == "auto":
        batch_size = find_batch_size(run, min(most, n), device=device)
    else:
        batch_size = min(int(wanted), n)
        run(min(batch_size, 2))
    start = time.perf_counter()
    run(batch_size)
    seconds = (time.perf_counter() - start) * n / batch_size
    if device.type == "cuda":
        return Cost(seconds, torch.cuda.max_memory_allocated(device), batch_size)
    waiting = (context.config.compute.prefetch + 4) * batch_size * prod(context.train.image_shape) * 4
    return Cost(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + waiting, batch_size)


def device_count(context: Context) -> int:
    """Return on how many devices such as this process's the backend computes; workers share the cores of a machine."""
    module = import_module(COMPUTES.get(context.config.compute.name))
    return int(module.device_count(context)) if hasattr(module, "device_count") else 1


def duration(seconds: float) -> str:
    """Return a time as people read it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


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
