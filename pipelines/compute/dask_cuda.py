"""Dask workers on the GPUs of this machine: one process for each."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from spray.errors import UserError
from spray.pipelines.compute.base import Job, ShardResult, make_worker
from spray.pipelines.compute.dask_common import compute_here, cores, dashboard_options, thread_count
from spray.pipelines.compute.dask_worker import Make
from spray.store.shards import Shard

if TYPE_CHECKING:
    from spray.pipelines.context import Context


def check(context: Context) -> None:
    """Check that there are GPUs and what it takes to share them out.

    Raises
    ------
    UserError
        If there are not, or the configuration asks for others.
    """
    import torch

    options, device = context.config.compute, context.config.device
    if device not in ("auto", "cuda"):
        raise UserError(f"device={device} does not go with compute=dask_cuda, which takes all GPUs; leave device=auto")
    count = torch.cuda.device_count()
    if not count:
        raise UserError("compute=dask_cuda finds no GPU; use compute=dask_local, or compute=dask_slurm on a cluster")
    if importlib.util.find_spec("dask_cuda") is None:
        raise UserError("compute=dask_cuda needs dask-cuda: pip install 'spray-xai[cuda]'; compute=dask_local does not")
    if options.n_workers is not None and options.n_workers > count:
        raise UserError(f"compute.n_workers={options.n_workers} is more than the {count} GPUs that there are")


def device_count(context: Context) -> int:
    """Return on how many GPUs the workers compute."""
    import torch

    return context.config.compute.n_workers or torch.cuda.device_count()


def run(
    context: Context,
    job: Job,
    shards: Sequence[Shard],
    on_done: Callable[[ShardResult], None],
    make: Make = make_worker,
) -> None:
    """Compute the shards by one process for each GPU."""
    check(context)
    from dask_cuda import LocalCUDACluster

    options = context.config.compute
    n_workers = min(device_count(context), max(1, len(shards)))
    threads = thread_count(options.threads, max(1, cores() // n_workers))
    context.log.info("starting %d workers, one for each GPU", n_workers)

    def start() -> Any:
        return LocalCUDACluster(
            n_workers=n_workers,
            threads_per_worker=1,
            scheduler_kwargs=dashboard_options(context),
            # Dask holds no data of ours, on the host or on the GPU.
            memory_limit=0,
            device_memory_limit=0,
        )

    # Each sees all GPUs, its own first.
    compute_here(start, threads, context, job, shards, on_done, make, device="cuda:0")
