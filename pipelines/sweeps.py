"""Jobs of a command: how each ended, also of those that a launcher runs in other processes or on other machines."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass(frozen=True)
class JobEnd:
    """How a job ended: its exit code, the line to tell if it failed; in a sweep, its folder and the sweep's."""

    number: int
    code: int
    line: str = ""
    folder: str = ""
    sweep: str = ""


@dataclass
class Ends:
    """How the jobs of this command ended; Hydra itself does not hand that on."""

    codes: dict[int, int] = field(default_factory=dict)
    jobs: list[JobEnd] = field(default_factory=list)

    def clear(self) -> None:
        """Forget the jobs of an earlier command."""
        self.codes.clear()
        self.jobs.clear()

    def note(self, end: JobEnd) -> None:
        """Keep a job's exit code and, the first time, tell its line."""
        if end.number not in self.codes and end.line:
            print(end.line, file=sys.stderr)
        self.codes[end.number] = end.code
        self.jobs.append(end)

    def worst(self) -> int:
        """Return the exit code of the command: 1 if any job failed, else the greatest."""
        return 1 if 1 in self.codes.values() else max(self.codes.values(), default=0)


ENDS = Ends()

STOP_SECONDS = 30.0
"""What the runs of a sweep have to end after an interrupt, with workers of theirs to stop."""


def write_index(ends: Ends) -> Path | None:
    """Write `index.html` and `runs.csv`, which compare the runs of a sweep, beside them; return where the page is.

    None if there was no sweep. They show all runs in the sweep's folder, also those of earlier commands. That they
    can't be written is no failure.
    """
    sweeps = {end.sweep for end in ends.jobs if end.sweep}
    written = None
    for sweep in sorted(sweeps):
        from spray.report.index import read_runs, render_index
        from spray.report.runs_table import runs_csv
        from spray.storage import write_text

        lines = {Path(end.folder).name: end.line for end in ends.jobs if end.line and end.sweep == sweep}
        try:
            runs = read_runs(Path(sweep), lines)
            write_text(Path(sweep) / "runs.csv", runs_csv(runs))
            write_text(Path(sweep) / "index.html", render_index(Path(sweep), runs))
        except Exception as error:
            print(f"spray: no comparison of the runs: {type(error).__name__}: {error}", file=sys.stderr)
        else:
            written = Path(sweep) / "index.html"
    return written


class Arrival:
    """What a job in another process returns: unpickled by the launcher in the command's process, it is noted there."""

    def __init__(self, end: JobEnd) -> None:
        self.end = end

    def __reduce__(self) -> tuple[Callable[[JobEnd], Arrival], tuple[JobEnd]]:
        return _arrive, (self.end,)


def _arrive(end: JobEnd) -> Arrival:
    ENDS.note(end)
    return Arrival(end)


class Task:
    """The function that Hydra calls with a job's configuration, here or where a launcher has sent it.

    Parameters
    ----------
    run : callable
        Runs the job; the second argument is the command line as it was typed. A function of a module, since it
        is pickled by name.
    prepare : callable
        Called with `unique` in a process that a launcher has started, before the job's configuration is resolved.
    unique : str
        The token in the names of this command's folders.
    """

    def __init__(
        self, run: Callable[[DictConfig, list[str]], JobEnd], prepare: Callable[[str], None], unique: str
    ) -> None:
        self.run, self.prepare, self.unique = run, prepare, unique
        self.typed = list(sys.argv)
        self.is_remote = False
        # Hydra reads them as it does those of a function.
        self.__name__, self.__doc__ = run.__name__, run.__doc__

    def __call__(self, config: DictConfig) -> Arrival | None:
        """Run the job; of one elsewhere return how it ended, of one here note it."""
        end = self.run(config, self.typed)
        if self.is_remote:
            if end.line:
                # For the log of the job; the command tells it as well.
                print(end.line, file=sys.stderr)
            return Arrival(end)
        ENDS.note(end)
        return None

    def __getstate__(self) -> dict[str, Any]:
        if "plan=true" in (argument.lower() for argument in self.typed):
            from spray.errors import UserError

            raise UserError("plan=true is for this machine only; add hydra/launcher=basic")
        return self.__dict__ | {"is_remote": True}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        sys.argv = list(self.typed)
        self.prepare(self.unique)


def missing_launcher(error: Exception) -> str | None:
    """Return a line about a launcher that is not installed; None for any other error."""
    from hydra.errors import MissingConfigException

    if not isinstance(error, MissingConfigException) or "launcher/submitit_" not in (error.missing_cfg_file or ""):
        return None
    return (
        "this launcher needs hydra-submitit-launcher: pip install 'spray-xai[slurm]'; without it: hydra/launcher=basic"
    )


def lost_job(error: Exception) -> str | None:
    """Return a line about a job that a launcher lost, having stopped the others; None for any other error."""
    if not type(error).__module__.startswith("submitit"):
        return None
    stop_local_jobs()
    what = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"a job of the sweep ended before it could tell how: {what}; the same command goes on from here"


def stop_local_jobs() -> None:
    """Interrupt the jobs that submitit's local launcher has started and would leave behind; wait for their end."""
    # The processes that start them would tell of the interrupt in many lines; they end when their jobs have.
    for number, seconds in ((signal.SIGINT, STOP_SECONDS), (signal.SIGKILL, 1.0)):
        jobs = _local_jobs(os.getpid())
        for job in jobs:
            with suppress(ProcessLookupError):
                os.kill(job, number)
        end = time.monotonic() + seconds
        while jobs and time.monotonic() < end:
            time.sleep(0.05)
            jobs = _local_jobs(os.getpid())
        if not jobs:
            return


def _local_jobs(parent: int) -> list[int]:
    """Return the processes below `parent` that are jobs of submitit's; none where there is no /proc to tell."""
    found = []
    for path in Path(f"/proc/{parent}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, path.read_text().split()):
                with suppress(OSError):
                    if b"submitit.core._submit" in Path(f"/proc/{child}/cmdline").read_bytes():
                        found.append(child)
                    found += _local_jobs(child)
    return found
