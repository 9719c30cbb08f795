"""Dask workers in jobs of a Slurm cluster, which this process submits, watches and replaces."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spray.errors import UserError
from spray.pipelines.compute.base import Job, ShardResult, make_worker
from spray.pipelines.compute.dask_common import CLOSE_SECONDS, compute_on, dashboard_options, thread_variables
from spray.pipelines.compute.dask_parts import Crew, ShardsFailedError
from spray.pipelines.compute.dask_worker import Make, here
from spray.store.shards import Shard

if TYPE_CHECKING:
    from spray.pipelines.context import Context

JOB_NAME = "spray"

# What is set here, and what dask_jobqueue.SLURMCluster takes besides.
OWN_KEYS = ("jobs",)
PASSED_KEYS = (
    "queue",
    "account",
    "cores",
    "processes",
    "memory",
    "walltime",
    "job_cpu",
    "job_mem",
    "job_extra_directives",
    "job_directives_skip",
    "job_script_prologue",
    "interface",
    "scheduler_options",
    "log_directory",
    "local_directory",
    "shared_temp_directory",
    "death_timeout",
    "worker_extra_args",
    "python",
    "shebang",
    "security",
    "protocol",
)

CLOSING_SECONDS = 60
"""A worker whose lifetime is over has so long to end before its job's walltime does."""

FAILED_STARTS = 3
"""So many jobs may end before a worker of theirs joined."""


def check(context: Context) -> None:
    """Check the configuration of the jobs, and that there is a Slurm to take them.

    Raises
    ------
    UserError
        For the first mistake that is found.
    """
    if importlib.util.find_spec("dask_jobqueue") is None:
        raise UserError("compute=dask_slurm needs dask-jobqueue: pip install 'spray-xai[slurm]'")
    cluster_options(context)
    if shutil.which("sbatch") is None:
        raise UserError(
            "compute=dask_slurm finds no sbatch on the PATH; start it on a login node or in a job of a Slurm cluster, "
            "or use compute=dask_local"
        )


def job_script(context: Context) -> str:
    """Return the script that is submitted for each job of workers, to look at; nothing is submitted or written.

    Raises
    ------
    UserError
        For a mistake in `compute.slurm`.
    """
    check(context)
    options = cluster_options(context)
    folder = options["log_directory"]
    for key in ("scheduler_options", "shared_temp_directory", "security"):
        options.pop(key, None)
    # The folder of logs would be made if it weren't there.
    make_job = _jobqueue().slurm.SLURMJob
    script: str = make_job(
        "tcp://SCHEDULER:PORT", name=f"{JOB_NAME}-0", **options | {"log_directory": os.sep}
    ).job_script()
    return script.replace(f"{os.sep}/{JOB_NAME}-", f"{folder}/{JOB_NAME}-")


def device_count(context: Context) -> int:
    """Return how many workers there are in all jobs; each has its share of a job's cores, or a GPU."""
    options = context.config.compute.slurm
    return int(options.get("jobs") or 1) * int(options.get("processes") or 1)


def run(
    context: Context,
    job: Job,
    shards: Sequence[Shard],
    on_done: Callable[[ShardResult], None],
    make: Make = make_worker,
) -> None:
    """Compute the shards by workers in Slurm jobs."""
    check(context)
    options = cluster_options(context)
    processes = options["processes"]
    jobs = min(int(context.config.compute.slurm.get("jobs") or 1), math.ceil(max(1, len(shards)) / processes))
    Path(options["log_directory"]).mkdir(parents=True, exist_ok=True)
    context.log.info("submitting %d jobs; their logs: %s", jobs, options["log_directory"])
    queue = Queue(jobs, options["log_directory"], context.log)
    setting = here(threads=worker_threads(context))

    def start() -> Any:
        queue.cluster = _jobqueue().SLURMCluster(**options)
        try:
            queue.submit()
        except BaseException:
            # It complains of jobs that were never submitted.
            with suppress(Exception):
                queue.cluster.close(timeout=CLOSE_SECONDS)
            raise
        return queue.cluster

    crew = Crew(setting, options["log_directory"], heal=queue.heal)
    compute_on(start, crew, context, job, shards, on_done, make)


def _jobqueue() -> Any:
    """Import dask_jobqueue, with Ctrl-C as it was: that import makes it end the process with exit code 0."""
    before = signal.getsignal(signal.SIGINT)
    try:
        return importlib.import_module("dask_jobqueue")
    finally:
        # None: set by something that isn't Python, which cannot be put back.
        if before is not None and signal.getsignal(signal.SIGINT) is not before:
            signal.signal(signal.SIGINT, before)


class Queue:
    """The jobs of a run in Slurm's queue.

    Parameters
    ----------
    jobs : int
        How many are wanted at a time.
    logs : str
        Where their logs are, for messages.
    log : logging.Logger
        Where lines go.
    """

    def __init__(self, jobs: int, logs: str, log: logging.Logger) -> None:
        self.jobs, self.logs, self.log = jobs, logs, log
        self.cluster: Any = None
        self.failed_starts = 0
        self.joined: set[str] = set()

    def submit(self) -> None:
        """Submit as many jobs as are missing.

        Raises
        ------
        UserError
            If Slurm takes none.
        """
        cluster = self.cluster
        # As `scale` does, which would not tell of an error.
        while len(cluster.worker_spec) < self.jobs:
            cluster.worker_spec.update(cluster.new_worker_spec())
        try:
            cluster.sync(cluster._correct_state)
        except RuntimeError as error:
            said = re.search(r"stderr:\s*(.*\S)", str(error), re.DOTALL)
            told = " ".join((said[1] if said else str(error)).split())
            refused = [name for name, job in cluster.workers.items() if job.job_id is None]
            if len(refused) == len(cluster.workers):
                text = f"sbatch refuses the job: {told}; see compute.slurm, and plan=true shows the script"
                raise UserError(text) from error
            # Such as for the number of jobs that a user may have; they are asked for again.
            self.log.warning("sbatch refuses %d of %d jobs: %s", len(refused), self.jobs, told)
            for name in refused:
                self._drop(name)

    def heal(self, present: set[str]) -> None:
        """Replace jobs that are over, by their walltime or otherwise.

        Raises
        ------
        ShardsFailedError
            If jobs keep ending before a worker of theirs joins.
        """
        names = {name: [w for w in present if w == name or w.startswith(f"{name}-")] for name in self.cluster.workers}
        self.joined |= {name for name, workers in names.items() if workers}
        queued = queued_jobs()
        if queued is None:
            return
        for name, workers in names.items():
            job_id = str(self.cluster.workers[name].job_id)
            if workers or job_id in queued or name not in self.cluster.worker_spec:
                continue
            if name not in self.joined:
                self.failed_starts += 1
                if self.failed_starts >= FAILED_STARTS:
                    raise ShardsFailedError(
                        f"{self.failed_starts} Slurm jobs ended before a worker of theirs joined, at last {job_id}; "
                        f"their logs are in {self.logs}"
                    )
            self._drop(name)
        self.submit()

    def _drop(self, name: str) -> None:
        """Let a job be over; the one that takes its place has a name of its own."""
        self.cluster.worker_spec.pop(name, None)
        self.cluster._i += 1


def queued_jobs() -> set[str] | None:
    """Return the numbers of the user's jobs that wait or run; None if Slurm does not say."""
    command = ["squeue", "--noheader", "--me", "--format=%A"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return set(said.split())


def cluster_options(context: Context) -> dict[str, Any]:
    """Return the keyword arguments of `dask_jobqueue.SLURMCluster`.

    Raises
    ------
    UserError
        For an unknown key of `compute.slurm`, or one that is missing or out of range.
    """
    given = {key: value for key, value in context.config.compute.slurm.items() if value is not None}
    for key in given:
        if key not in (*OWN_KEYS, *PASSED_KEYS):
            close = get_close_matches(str(key), (*OWN_KEYS, *PASSED_KEYS), n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            allowed = ", ".join((*OWN_KEYS, *PASSED_KEYS))
            raise UserError(f"unknown option 'compute.slurm.{key}'{hint}; allowed: {allowed}")
    for key in ("cores", "memory"):
        if key not in given:
            raise UserError(f"compute.slurm.{key} is missing: what each job asks for, such as compute.slurm.{key}=8")
    for key in ("jobs", "cores", "processes"):
        value = given.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"compute.slurm.{key}={value} is out of range; give a number of at least 1")
    for key in ("job_extra_directives", "job_directives_skip", "job_script_prologue", "worker_extra_args"):
        value = given.get(key, [])
        if not isinstance(value, list) or not all(isinstance(line, str) for line in value):
            raise UserError(f"compute.slurm.{key}={value} is no list of texts; write ['--gpus=1','--constraint=a100']")
    options = {key: value for key, value in given.items() if key in PASSED_KEYS}
    processes = options.setdefault("processes", 1)
    if processes > given["cores"]:
        raise UserError(f"compute.slurm.processes={processes} is more than the {given['cores']} cores of a job")
    walltime = options.setdefault("walltime", "01:00:00")
    if not isinstance(walltime, str):
        # YAML reads 4:00:00 as a number.
        raise UserError(f"compute.slurm.walltime={walltime} is a number; quote it in YAML: walltime: '04:00:00'")
    lifetime, stagger = lifetime_of(walltime_seconds(walltime))
    options["worker_extra_args"] = [
        *("--lifetime", f"{lifetime}s", "--lifetime-stagger", f"{stagger}s", "--no-dashboard"),
        *options.get("worker_extra_args", []),
    ]
    exports = [f"export {name}={value}" for name, value in thread_variables(worker_threads(context)).items()]
    # What is imported from elsewhere than the environment, such as a checkout, is there for workers too.
    folders = [path for path in sys.path if path and not path.startswith((sys.prefix, sys.base_prefix))]
    if folders:
        exports.append(f"export PYTHONPATH={shlex.quote(os.pathsep.join(folders))}")
    exports += [f"export DASK_DISTRIBUTED__WORKER__MEMORY__{name}=False" for name in ("TARGET", "SPILL", "PAUSE")]
    options["job_script_prologue"] = [
        *exports,
        f"cd {shlex.quote(os.getcwd())}",
        *options.get("job_script_prologue", []),
    ]
    # A job that Slurm starts again would be in the way of the one that has taken its place.
    options["job_extra_directives"] = ["--no-requeue", *options.get("job_extra_directives", [])]
    options["log_directory"] = str(Path(options.get("log_directory", Path(context.run_dir, "slurm"))).absolute())
    options.setdefault("shared_temp_directory", str(Path(context.run_dir).absolute()))
    options["job_name"] = JOB_NAME
    options["scheduler_options"] = dashboard_options(context) | options.get("scheduler_options", {})
    return options


def worker_threads(context: Context) -> int:
    """Return the threads for arithmetic in each worker process of a job."""
    options = context.config.compute
    return options.threads or max(1, int(options.slurm["cores"]) // int(options.slurm.get("processes") or 1))


def walltime_seconds(walltime: str) -> int:
    """Return the seconds of a time limit as Slurm reads it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises
    ------
    UserError
        If it is none of these, or too short for a worker to do anything.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", walltime)
    if match is None:
        raise UserError(f"compute.slurm.walltime={walltime} is no time; write hours:minutes:seconds, such as 04:00:00")
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    units = (60, 1, 0) if days is None and len(numbers) < 3 else (3600, 60, 1)
    seconds = int(days or 0) * 86400 + sum(n * unit for n, unit in zip(numbers, units, strict=False))
    if seconds < 2 * CLOSING_SECONDS:
        raise UserError(
            f"compute.slurm.walltime={walltime} is too short ({seconds} s); write hours:minutes:seconds, as 04:00:00"
        )
    return seconds


def lifetime_of(walltime: int) -> tuple[int, int]:
    """Return after how many seconds a worker ends by itself, and by how many that varies: not all at once."""
    stagger = min(300, walltime // 20)
    return walltime - CLOSING_SECONDS - stagger, stagger
