"""What all kinds of Dask clusters share: how they are started, quietened and closed."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask

from spray.pipelines.compute.base import Job, ShardResult, make_worker
from spray.pipelines.compute.dask_parts import Crew
from spray.pipelines.compute.dask_scheduling import Scheduling
from spray.pipelines.compute.dask_worker import Make, here
from spray.storage import remove_leftovers
from spray.store.shards import Shard

if TYPE_CHECKING:
    from spray.pipelines.context import Context

CLOSE_SECONDS = 10.0
"""Longest wait for a cluster to close."""

PATIENCE = 120.0
"""Seconds in which workers of this machine have to be there."""

QUIET = {
    # A dead worker's task is not run again by itself: this module decides.
    "distributed.scheduler.allowed-failures": 0,
    "distributed.worker.multiprocessing-method": "spawn",
    # Else a worker that dies again while its cluster waits for it to come back would be given up for good.
    "distributed.deploy.lost-worker-timeout": "24h",
    # Dask's own data are small; what models and images take is no reason to pause a worker.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
}


def compute_on(
    start: Callable[[], Any],
    crew: Crew,
    context: Context,
    job: Job,
    shards: Sequence[Shard],
    on_done: Callable[[ShardResult], None],
    make: Make = make_worker,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Start a cluster, have the shards computed and close it, whatever happens.

    Parameters
    ----------
    start : callable
        Starts the cluster.
    crew : Crew
        About its workers.
    context : Context
        Configuration and log.
    job, shards, on_done, make
        See `Scheduling`.
    settings : mapping, optional
        Of Dask, while it runs.
    """
    if not shards:
        return

    def name_of(index: int) -> str:
        return f"{index} ({context.train.names[index]})"

    with dask.config.set(QUIET | dict(settings or {})), quiet_logs(context.log):
        cluster = start()
        is_done = False
        try:
            if context.config.compute.dashboard:
                tell_dashboard(cluster, context.log)
            scheduling = Scheduling(cluster, crew, context.log, job, shards, on_done, make, name_of)
            scheduling.run()
            is_done = True
        finally:
            if not is_done:
                kill_processes(cluster)
            with suppress(Exception):
                cluster.close(timeout=CLOSE_SECONDS)
            if not is_done:
                remove_leftovers(job.folder)


def kill_processes(cluster: Any) -> None:
    """End worker processes of this machine that may be busy, without waiting for what they are at."""
    for nanny in list(getattr(cluster, "workers", {}).values()):
        if hasattr(nanny, "auto_restart"):
            nanny.auto_restart = False
            with suppress(Exception):
                os.kill(nanny.pid, signal.SIGKILL)


@contextmanager
def quiet_logs(log: logging.Logger) -> Iterator[None]:
    """Send what Dask and its libraries log to the run's file, not to the terminal."""
    files: list[logging.Handler] = [handler for handler in log.handlers if isinstance(handler, logging.FileHandler)]
    _handle_libraries(files)
    try:
        yield
    finally:
        # What they still have to say while the process ends is for nobody.
        _handle_libraries([])


def _handle_libraries(handlers: list[logging.Handler]) -> None:
    tops = {"distributed", "tornado", "asyncio", "bokeh", "dask_jobqueue"}
    below = {name for name in logging.root.manager.loggerDict if name.split(".")[0] in tops}
    for name in tops | below:
        logger = logging.getLogger(name)
        logger.handlers[:] = (handlers or [logging.NullHandler()]) if name in tops else []
        logger.propagate = name not in tops


def tell_dashboard(cluster: Any, log: logging.Logger) -> None:
    """Say where the cluster's dashboard is, or what it takes to have one."""
    if importlib.util.find_spec("bokeh") is None:
        log.info("Dask's dashboard needs bokeh: pip install bokeh")
    elif link := cluster.dashboard_link:
        log.info("dashboard: %s", link)


def dashboard_options(context: Context) -> dict[str, Any]:
    """Return the scheduler's options about its dashboard."""
    address = context.config.compute.dashboard
    # It serves pages of its state in any case; its usual port may be taken.
    return {"dashboard_address": address or "127.0.0.1:0", "dashboard": bool(address)}


def cores() -> int:
    """Return how many cores this process may use, by affinity mask and limits of its container."""
    return max(1, dask.system.cpu_count())


def thread_count(threads: int | None, cores_per_worker: int) -> int:
    """Return the threads for arithmetic in a worker: as configured, or its cores, but not above OMP_NUM_THREADS."""
    if threads is not None:
        return threads
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores_per_worker, int(limit)) if limit.isdigit() and int(limit) else cores_per_worker


def compute_here(
    start: Callable[[], Any],
    threads: int,
    context: Context,
    job: Job,
    shards: Sequence[Shard],
    on_done: Callable[[ShardResult], None],
    make: Make,
    device: str | None = None,
) -> None:
    """Have the shards computed by worker processes of this machine; see `compute_on`.

    Parameters
    ----------
    threads : int
        For arithmetic in each worker.
    device : str, optional
        What each worker computes on, if not what is configured.
    """
    # The variables have to be there before a worker's process starts.
    settings = {"distributed.nanny.pre-spawn-environ": {"MALLOC_TRIM_THRESHOLD_": "65536", **thread_variables(threads)}}
    log = Path(context.run_dir, "run.log").absolute()
    # What workers of this machine print goes into the run's log, if there is one.
    setting = here(threads=threads, device=device, log=str(log) if log.exists() else None)
    crew = Crew(setting, str(context.run_dir / "run.log"), patience=PATIENCE)
    compute_on(start, crew, context, job, shards, on_done, make, settings)


def thread_variables(threads: int) -> dict[str, str]:
    """Return environment variables that libraries of arithmetic read as they are loaded."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return dict.fromkeys(names, str(threads))
