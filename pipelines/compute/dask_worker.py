"""What runs in Dask's workers: a plugin that builds model and data once, and the task that computes shards."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from distributed import WorkerPlugin, get_worker

from spray.errors import UserError

if TYPE_CHECKING:
    from spray.pipelines.compute.base import Job, ShardResult
    from spray.store.shards import Shard

PLUGIN = TOPIC = "spray"

EXIT_SECONDS = 0.5
"""From an error to the end of the process, in which the error is told."""

# Of the operating system: no other worker would fare better.
HOPELESS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class RunsShards(Protocol):
    """What is built once in each worker, such as `spray.pipelines.compute.base.ShardWorker`."""

    def run_all(self, shards: Sequence[Shard]) -> Iterator[ShardResult]:
        """Compute shards; each is told as soon as it is on disk."""


Make = Callable[["Job", int | None], RunsShards]
"""From a job and a number of threads to what computes its shards; sent by name."""


@dataclass(frozen=True)
class Setting:
    """Where a worker works.

    Attributes
    ----------
    threads : int or None
        For arithmetic; None: as many as Dask says that the worker has.
    device : str or None
        Instead of the configured one; None: the configured one, and of several GPUs one for each worker.
    log : str or None
        A file that takes what the process prints; None: it is left where it goes.
    folder : str
        The working directory, if it is there.
    """

    threads: int | None = None
    device: str | None = None
    log: str | None = None
    folder: str = ""


def here(threads: int | None = None, device: str | None = None, log: str | None = None) -> Setting:
    """Return the setting for workers that work where this process does."""
    return Setting(threads, device, log, os.getcwd())


class ShardPlugin(WorkerPlugin):
    """Gives each worker process the job; model and data are built at its first task.

    Parameters
    ----------
    job : Job
        What is to be computed.
    make : callable
        Builds what computes it.
    setting : Setting
        Where.
    """

    name = PLUGIN

    def __init__(self, job: Job, make: Make, setting: Setting) -> None:
        self.job, self.make, self.setting = job, make, setting
        self.built: RunsShards | None = None
        self.worker_name = ""
        self.threads = setting.threads

    def setup(self, worker: Any) -> None:
        """Prepare the process; nothing that could fail, since Dask would start the worker over and over."""
        setting = self.setting
        with suppress(OSError):
            os.chdir(setting.folder)
        if setting.log is not None:
            with suppress(OSError):
                file = os.open(setting.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
                for stream in (1, 2):
                    os.dup2(file, stream)
        with suppress(ValueError):
            # Ctrl-C goes to all processes of a terminal; the command's own stops the workers.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.worker_name = str(worker.name)
        self.threads = setting.threads or worker.state.nthreads

    def run(self, shards: Sequence[Shard]) -> Iterable[ShardResult]:
        """Compute shards with what was built for the first ones."""
        return self.make_once().run_all(shards)

    def make_once(self) -> RunsShards:
        """Build model and data, or return what is there."""
        if self.built is None:
            job = self.job
            try:
                device = self.setting.device or _own_device(str(job.config.get("device")), self.worker_name)
                if device is not None:
                    job = replace(job, config=job.config | {"device": device})
                self.built = self.make(job, self.threads)
            except UserError:
                raise
            except Exception as error:
                raise BuildError from error
        return self.built


class BuildError(Exception):
    """Model or data could not be built; the cause says why."""


def run_probe(start: int, stop: int, run: str, task: int) -> None:
    """Explain samples in a worker and keep nothing, to see whether the process outlives it."""
    worker = get_worker()
    can_probe = False
    # What raises is not what ends the process.
    with suppress(Exception):
        probe = getattr(_plugin(worker).make_once(), "probe", None)
        can_probe = probe is not None
        if probe is not None:
            probe(start, stop)
    worker.log_event(TOPIC, {"kind": "probed", "can_probe": can_probe, "run": run, "task": task})


def run_shards(shards: Sequence[Shard], run: str, task: int) -> None:
    """Compute shards in a worker and tell the scheduler of each that is on disk, and how it ended.

    Each message has the run's token and the task's number. Errors are told as well, not raised: what Dask makes of
    them, it can't be made to keep to itself.
    """
    worker = get_worker()

    def tell(**message: Any) -> None:
        worker.log_event(TOPIC, message | {"run": run, "task": task})

    try:
        for result in _plugin(worker).run(shards):
            tell(kind="done", result=asdict(result))
        tell(kind="ended")
    except Exception as error:
        told = error.__cause__ if isinstance(error, BuildError) and error.__cause__ is not None else error
        tell(
            kind="failed",
            error=one_line(told),
            trace="".join(traceback.format_exception(told)),
            hopeless=is_hopeless(told),
            building=isinstance(error, BuildError),
            leaves=True,
        )
        # A new process takes its place: after some errors, such as those of CUDA, nothing works any more in this one.
        threading.Timer(EXIT_SECONDS, os._exit, (1,)).start()


def _plugin(worker: Any) -> ShardPlugin:
    """Return the plugin of this worker."""
    plugin: ShardPlugin = worker.plugins[PLUGIN]
    return plugin


def is_hopeless(error: BaseException) -> bool:
    """Say whether an error would come again wherever the task ran."""
    return isinstance(error, UserError) or (isinstance(error, OSError) and error.errno in HOPELESS)


def one_line(error: BaseException) -> str:
    """Return what an error says in one line: of a user's mistake the message, else the type too."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if isinstance(error, OSError) and error.errno in HOPELESS:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror} on {socket.gethostname()}; make room or choose another run_dir"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _own_device(configured: str, name: str) -> str | None:
    """Return the GPU of a worker where several are seen by each: by the number at the end of its name."""
    number = re.search(r"(\d+)$", name)
    if configured not in ("auto", "cuda") or number is None:
        return None
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{int(number[1]) % count}" if count > 1 else None
