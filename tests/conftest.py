"""What the tests of the command and of the runner share."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import fakes
import pytest
from hydra.core.global_hydra import GlobalHydra
from hypothesis import settings

from spray.pipelines import cli

# What is remembered of folders is for each session of tests anew, and not the developer's own.
os.environ["SPRAY_CACHE"] = tempfile.mkdtemp(prefix="spray-cache-")
atexit.register(shutil.rmtree, os.environ["SPRAY_CACHE"], ignore_errors=True)

# The same examples each time: a new one that fails is for who looks for it (`--hypothesis-profile=default`).
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")

FAKES = Path(fakes.__file__)


@dataclass
class Result:
    code: int
    out: str
    err: str
    ran: list[str]


@pytest.fixture(autouse=True)
def _fresh_log() -> None:
    """Forget how a command in this process has set up its log, for a stream that may be closed by now."""
    log = logging.getLogger("spray")
    log.handlers.clear()
    log.setLevel(logging.NOTSET)
    log.propagate = True


@pytest.fixture
def spray(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Callable[..., Result]]:
    """The command in this process, in an empty folder, with fake stages."""
    fakes.install(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, fakes_only: bool = True) -> Result:
        fakes.ran.clear()
        monkeypatch.setattr(sys, "argv", ["spray", *(fakes.ARGUMENTS if fakes_only else []), *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return Result(int(exit_.value.code or 0), captured.out, captured.err, list(fakes.ran))

    yield run
    GlobalHydra.instance().clear()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """The command in a process of its own, in an empty folder, with fake stages."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(FAKES), *fakes.ARGUMENTS, *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(FAKES.parent.parent)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()
