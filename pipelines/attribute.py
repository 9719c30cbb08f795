"""The second stage: the relevance of every training sample's pixels.

Computed in shards, each a file of its own that is there whole or not at all, by one of the backends in
`pipelines/compute`. What is on disk is the truth: only shards that are missing are computed, whoever was killed
before, and at the end they are streamed into `attributions.h5`.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from spray.csvs import csv_text
from spray.errors import UserError
from spray.pipelines.compute import backend
from spray.pipelines.compute.base import (
    FOLDER,
    KNOWN,
    Job,
    ShardResult,
    choose_shard_size,
    layout_of,
    make_job,
    stored_layers,
)
from spray.pipelines.context import Context
from spray.pipelines.record import digest, stamp
from spray.pipelines.stage import Stage
from spray.storage import read_json, sha256, write_json, write_text
from spray.store.ahead import AssemblingAhead
from spray.store.assemble import Progress, assemble
from spray.store.shards import DamagedShardError, Shard, ShardFacts, plan_shards, shard_header

RESULT, QUARANTINED = "attributions.h5", "quarantined.csv"
MOST_REPAIRS = 3
"""How often a shard that turns out damaged is computed again before the disk is given up."""


def run(context: Context) -> dict[str, Any]:
    """Write `attributions.h5`, of which row i is training sample i, and `quarantined.csv`."""
    weights = sha256(context.run_dir / "model.pt")
    # The stage's key does not tell weights apart that were trained twice, which differ on a GPU.
    key = digest({"stage": context.key, "weights": weights, "images": context.train.fingerprint})
    job = make_job(context, key, weights, 0)
    if (facts := _assembled(context, job)) is not None:
        return facts
    job = replace(job, shard_size=_planned_shard_size(context, job))
    shards = plan_shards(len(context.train), job.shard_size)
    missing = [shard for shard in shards if not _is_there(job, shard)]
    _tell(context, job, len(shards), len(missing))
    tally = Tally(context)
    with AssemblingAhead(_assembly(context, job, shards)) as assembling:
        there = {shard.number for shard in shards} - {shard.number for shard in missing}
        for number in sorted(there):
            assembling.ready(number)

        def on_done(result: ShardResult) -> None:
            tally(result)
            assembling.ready(result.number)

        if missing:
            backend(context.config.compute.name)(context, job, missing, on_done)
            if tally.empty == tally.samples - tally.quarantined:
                raise UserError("every heatmap is zero: the model does not respond to its input; check its weights")
        results = _assemble(context, job, shards, tally, assembling)
    facts = _facts(context, results)
    _write_quarantined(context, results)
    write_json(job.folder / "assembled.json", {"stamp": stamp(context.run_dir / RESULT), "facts": facts})
    return facts


def tidy(context: Context) -> None:
    """Remove the shards: `attributions.h5` was verified, and run.json knows it."""
    shutil.rmtree(context.run_dir / FOLDER, ignore_errors=True)


class Tally:
    """Counts the samples of the shards as they are done, and stops the run when too many could not be explained."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.samples = self.quarantined = self.empty = 0

    def __call__(self, result: ShardResult) -> None:
        """Take note of a finished shard."""
        self.samples += result.size
        self.quarantined += result.quarantined
        self.empty += result.empty
        check_share(self.context, self.quarantined)


def check_share(context: Context, quarantined: int) -> None:
    """Raise a UserError if so many samples that could not be explained are too many."""
    share, n = context.config.attribution.max_bad, len(context.train)
    if quarantined > share * n:
        raise UserError(
            f"{quarantined} of {n} samples could not be explained, more than attribution.max_bad={share} allows; "
            f"the first reasons stand in {context.run_dir / 'run.log'}; what is computed is kept"
        )


def _planned_shard_size(context: Context, job: Job) -> int:
    """Return the shard size that the shards on disk were cut with, or for a new run the configured one."""
    path = job.folder / "plan.json"
    if path.is_file():
        size = int(read_json(path)["shard_size"])
        wanted = context.config.compute.shard_size
        if wanted not in (None, size):
            context.log.info("shards of %d samples are there already: compute.shard_size=%d waits", size, wanted)
        return size
    size = choose_shard_size(context)
    write_json(path, {"shard_size": size, "n": len(context.train), "key": job.key})
    return size


def _is_there(job: Job, shard: Shard) -> bool:
    """Return whether a shard's file is there and says that it is the right one; its bytes are checked later."""
    path = job.folder / shard.name
    try:
        header = shard_header(path)
    except DamagedShardError:
        return False
    return (header.start, header.stop, header.key) == (shard.start, shard.stop, job.key)


def _tell(context: Context, job: Job, shards: int, missing: int) -> None:
    if missing < shards:
        context.log.info("%d of %d shards are there already", shards - missing, shards)
    kept = {job.folder.name, Path(KNOWN).name}
    others = [path for path in job.folder.parent.iterdir() if path.is_dir() and path.name not in kept]
    if others:
        context.log.info(
            "%d shards of other settings are kept in %s until this run is done",
            sum(len(list(path.glob("*.h5"))) for path in others),
            job.folder.parent,
        )


def _assembly(context: Context, job: Job, shards: Sequence[Shard]) -> Callable[[Progress], list[ShardFacts]]:
    """Return what streams the shards into the final file."""
    options = context.config.attribution
    attributes = {name: str(getattr(options, name)) for name in ("method", "composite", "target", "channels")}
    layout, path = layout_of(context, job.shard_size), context.run_dir / RESULT
    return lambda progress: assemble(job.folder, shards, job.key, layout, path, attributes, progress)


def _assemble(
    context: Context, job: Job, shards: Sequence[Shard], tally: Tally, ahead: AssemblingAhead
) -> list[ShardFacts]:
    """Have the shards streamed into the final file; those that are damaged are computed again."""
    repairs: Counter[Path] = Counter()
    while True:
        try:
            if not repairs:
                return ahead.finish(len(shards), context.progress)
            return _assembly(context, job, shards)(context.progress)
        except DamagedShardError as error:
            repairs[error.path] += 1
            if repairs[error.path] > MOST_REPAIRS:
                raise UserError(f"{error}, and so it was when computed again: the disk is not to be trusted") from None
            context.log.warning("%s; it is computed again", error)
            shard = next(shard for shard in shards if shard.name == error.path.name)
            error.path.unlink(missing_ok=True)
            backend(context.config.compute.name)(context, job, [shard], tally)


def _facts(context: Context, results: Sequence[ShardFacts]) -> dict[str, Any]:
    """Return the stage's facts; say what is wrong with the heatmaps, if anything is."""
    n = len(context.train)
    quarantined = sum(len(result.quarantined) for result in results)
    empty = sum(int(result.facts["empty"]) for result in results)
    check_share(context, quarantined)
    if empty:
        context.log.warning("%d of %d heatmaps are zero; they are left out of the clusters", empty, n)
    if quarantined:
        context.log.warning("%d samples could not be explained; see %s", quarantined, QUARANTINED)
    computed: dict[str, list[str]] = {
        name: sorted({result.facts[name] for result in results}) for name in ("batch_size", "device")
    }
    layers = stored_layers(context.config)
    return {"samples": n, "empty_heatmaps": empty, "quarantined": quarantined, "layers": layers, **computed}


def _write_quarantined(context: Context, results: Sequence[ShardFacts]) -> None:
    """Write which samples could not be explained, and which files were left out from the start, with reasons."""
    rows: list[tuple[int | None, str, str]] = [
        (index, context.train.names[index], reason)
        for result in results
        for index, reason in sorted(result.quarantined.items())
    ]
    # These have no row: they were no images from the start.
    rows += [(None, name, reason) for name, reason in context.train.unreadable]
    write_text(context.run_dir / QUARANTINED, csv_text(["sample_index", "name", "reason"], rows))


def _assembled(context: Context, job: Job) -> dict[str, Any] | None:
    """Return the facts of a run that was killed between its last step and the note of it in run.json."""
    path, result = job.folder / "assembled.json", context.run_dir / RESULT
    if not path.is_file() or not result.is_file() or not (context.run_dir / QUARANTINED).is_file():
        return None
    said = read_json(path)
    return dict(said["facts"]) if said["stamp"] == list(stamp(result)) else None


STAGE = Stage(
    name="attribute",
    needs=("train",),
    settings=(
        "attribution.method",
        "attribution.composite",
        "attribution.options",
        "attribution.layer",
        "attribution.target",
        "attribution.channels",
        "attribution.pool",
        "attribution.dtype",
        "compute.compression",
    ),
    outputs=(RESULT, QUARANTINED),
    run=run,
    tidy=tidy,
)
