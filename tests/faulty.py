"""A stand-in for what computes shards in a worker: writes small files, and fails as it is told to.

It has no model and no data, so that tests of scheduling take a moment. What goes wrong is in the job's
configuration, by the shard's number: see `Faulty.fail`.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import secrets
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from distributed import get_worker

from spray.errors import UserError
from spray.pipelines.compute.base import Job, ShardResult
from spray.pipelines.config import SprayConfig
from spray.pipelines.context import Context
from spray.storage import write_bytes
from spray.store.shards import Shard, plan_shards


class Faulty:
    """It can probe samples unless the job says `probes: False`."""

    def __init__(self, job: Job, threads: int | None) -> None:
        self.job, self.threads = job, threads
        self.faults: dict[str, Any] = job.config["faults"]
        note(job, f"build-{os.getpid()}-{threads}-{torch.get_num_threads()}-{os.environ.get('OMP_NUM_THREADS')}")
        note(job, f"device-{job.config['device']}-{os.environ.get('CUDA_VISIBLE_DEVICES', '').replace(',', '+')}")
        if not job.config.get("probes", True):
            self.probe = None  # type: ignore[assignment, method-assign]
        self.fail("build")

    def run_all(self, shards: Sequence[Shard]) -> Iterator[ShardResult]:
        for shard in shards:
            note(self.job, f"run-{shard.number}-{os.getpid()}")
            start = time.monotonic()
            if self.threads is not None:
                self.fail(f"worker {get_worker().name}")
            for index in range(shard.start, shard.stop):
                self.fail(f"sample {index}")
            if self.fail(str(shard.number)):
                continue
            time.sleep(self.job.config.get("seconds", 0))
            write_bytes(self.job.folder / shard.name, content(self.job, shard))
            yield ShardResult(shard.number, shard.size, time.monotonic() - start, 0, 0)

    def probe(self, start: int, stop: int) -> None:
        note(self.job, f"probe-{start}-{stop}-{os.getpid()}")
        for index in range(start, stop):
            self.fail(f"sample {index}")

    def fail(self, where: str) -> bool:
        """Do what is to go wrong there: "once KIND" only the first time; return whether the shard is passed over."""
        kind = str(self.faults.get(where, ""))
        if kind.startswith("once "):
            path = Path(self.job.run_dir, "notes", f"failed-{where}")
            if path.exists():
                return False
            path.touch()
            kind = kind.removeprefix("once ")
        if kind == "user":
            raise UserError("that cannot be done; do this")
        if kind == "error":
            raise ValueError("it broke\nin two lines")
        if kind == "full":
            raise OSError(errno.ENOSPC, "No space left on device", "/some/file")
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "exit":
            os._exit(3)
        if kind == "hang":
            (self.job.folder / f".{where}.h5.0123abcd.tmp").write_text("half")
            time.sleep(600)
        if kind == "unpicklable":
            raise type("Local", (Exception,), {"__init__": lambda self, a, b: None})(1, 2)
        return kind == "vanish"


def make(job: Job, threads: int | None = None) -> Faulty:
    if threads is not None:
        torch.set_num_threads(threads)
    return Faulty(job, threads)


def content(job: Job, shard: Shard) -> bytes:
    return hashlib.sha256(f"{job.key} {shard}".encode()).digest() * shard.size


def note(job: Job, what: str) -> None:
    Path(job.run_dir, "notes", f"{what}-{secrets.token_hex(4)}").touch()


def notes(job: Job, start: str) -> list[str]:
    return sorted(path.name for path in Path(job.run_dir, "notes").glob(f"{start}-*"))


def a_job(run_dir: Path, n: int = 40, shard_size: int = 4, **config: Any) -> tuple[Job, list[Shard]]:
    """Return a job and its shards; `faults` by shard, `seconds` that each takes."""
    job = Job({"device": "cpu", "faults": {}} | config, str(run_dir), "0" * 64, "images", "weights", shard_size)
    job.folder.mkdir(parents=True)
    (run_dir / "notes").mkdir()
    return job, plan_shards(n, shard_size) if n else []


def a_context(run_dir: Path, **options: Any) -> Context:
    """Return what a backend needs of a context."""
    config = SprayConfig()
    config.compute.dashboard = ""
    for name, value in options.items():
        setattr(config.compute, name, value)
    config.device = "cpu"
    log = logging.getLogger(f"spray.test.{run_dir.name}")
    log.setLevel(logging.INFO)
    return Context(config, run_dir, log)


def files(job: Job) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(job.folder.iterdir())}


def expected(job: Job, shards: Sequence[Shard]) -> dict[str, bytes]:
    return {shard.name: content(job, shard) for shard in shards}
