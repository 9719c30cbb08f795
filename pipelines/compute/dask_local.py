"""Dask workers on this machine: a process each, with its share of the cores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from spray.pipelines.compute.base import Job, ShardResult, make_worker
from spray.pipelines.compute.dask_common import compute_here, cores, dashboard_options, thread_count, thread_variables
from spray.pipelines.compute.dask_worker import Make
from spray.store.shards import Shard

if TYPE_CHECKING:
    from spray.pipelines.context import Context


def run(
    context: Context,
    job: Job,
    shards: Sequence[Shard],
    on_done: Callable[[ShardResult], None],
    make: Make = make_worker,
) -> None:
    """Compute the shards by processes on this machine."""
    from distributed import LocalCluster

    options = context.config.compute
    n_workers = min(options.n_workers or default_workers(context), max(1, len(shards)))
    threads = thread_count(options.threads, max(1, cores() // n_workers))
    context.log.info("starting %d workers with %d threads each", n_workers, threads)

    def start() -> Any:
        return LocalCluster(
            n_workers=n_workers,
            threads_per_worker=1,
            processes=True,
            scheduler_kwargs=dashboard_options(context),
            # Shared out equally, one that needs more than the others would be killed while there is plenty.
            memory_limit=0,
            env=thread_variables(threads),
        )

    compute_here(start, threads, context, job, shards, on_done, make)


def device_count(context: Context) -> int:
    """Return on how many devices the workers compute: GPUs, or the one set of cores that they share."""
    return (context.config.compute.n_workers or default_workers(context)) if context.device.type == "cuda" else 1


def default_workers(context: Context) -> int:
    """Return how many workers there are unless configured: one for each GPU, or for each two cores."""
    if context.device.type == "cuda":
        import torch

        return 1 if context.device.index is not None else max(1, torch.cuda.device_count())
    return max(1, cores() // 2)
