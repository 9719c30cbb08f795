"""The real attribute stage, stopped and killed with and without workers: nothing is lost, the bytes are the same."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import small
from test_runner import record, wait_for

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
MAIN = "from spray.pipelines.cli import main; main()"
SERIAL = ["compute=serial"]
DASK = ["compute=dask_local", "compute.n_workers=2", "compute.threads=1", "compute.dashboard=''"]
BOTH = pytest.mark.parametrize("compute", [pytest.param(SERIAL, id="serial"), pytest.param(DASK, id="dask_local")])


class Study:
    """A trained run to start from, and the file that an uninterrupted serial run makes of it."""

    def __init__(self, folder: Path) -> None:
        data = small.write_images(folder, {"coffee": 40, "skin": 40}, {"coffee": 8, "skin": 8})
        self.arguments = [
            "experiment=image_folder",
            *data,
            f"dataset.image_size={small.SIDE}",
            f"model.factory={small.write_model(folder)}:build",
            "model.epochs=1",
            "device=cpu",
            "compute.shard_size=4",
            "attribution.batch_size=2",
            # Some tenths of a second for a shard.
            "attribution.method=smooth_grad",
            "attribution.options={n_samples: 100}",
        ]
        self.base = folder / "base"
        assert self.command(self.base, "stages=[train]").wait(timeout=300) == 0
        whole = folder / "whole"
        shutil.copytree(self.base, whole)
        assert self.command(whole, "stages=[attribute]").wait(timeout=300) == 0
        self.whole = (whole / "attributions.h5").read_bytes()

    def command(self, run_dir: Path, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", MAIN, *self.arguments, f"run_dir={run_dir}", *arguments],
            cwd=run_dir.parent,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    return Study(tmp_path_factory.mktemp("study"))


@pytest.fixture
def begin(study, tmp_path):
    """Start the stage on a copy of the trained run; whatever is left of it is ended."""
    run_dir = tmp_path / "run"
    shutil.copytree(study.base, run_dir)
    processes: list[psutil.Process] = []

    def start(*arguments: str) -> tuple[subprocess.Popen[str], Path]:
        process = study.command(run_dir, "stages=[attribute]", *arguments)
        processes.append(psutil.Process(process.pid))
        return process, run_dir

    yield start
    for process in processes:
        if process.is_running():
            for child in [*process.children(recursive=True), process]:
                child.kill()


def shards(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("shards/*/*.h5"))


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the worker processes of a command."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


def are_gone(processes: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def finished(study: Study, begin: Callable[..., tuple[subprocess.Popen[str], Path]], compute: list[str]) -> bytes:
    process, run_dir = begin(*compute)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert shards(run_dir) == []
    return (run_dir / "attributions.h5").read_bytes()


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop(study, begin, compute, number):
    process, run_dir = begin(*compute)
    wait_for(lambda: len(shards(run_dir)) >= 2)
    helpers = workers(process)
    assert len(helpers) >= (2 if compute is DASK else 0)
    start = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    took = time.monotonic() - start
    assert process.returncode == (75 if number == signal.SIGTERM else 130)
    assert err.splitlines()[-1].endswith(f"the same command with run_dir={run_dir} goes on from here")
    assert "Traceback" not in out + err
    assert len(err.splitlines()) == 1, err
    assert took < 20
    assert list(run_dir.rglob("*.tmp")) == []
    assert not (run_dir / "attributions.h5").exists()
    wait_for(lambda: are_gone(helpers), 10)
    kept = {path: path.stat().st_mtime_ns for path in shards(run_dir)}
    assert 2 <= len(kept) < 20
    assert record(run_dir)["stages"]["attribute"]["status"] != "done"
    # What was there is not computed again.
    process, _ = begin(*compute)
    wait_for(lambda: len(shards(run_dir)) > len(kept))
    assert {path: path.stat().st_mtime_ns for path in shards(run_dir) if path in kept} == kept
    process.kill()
    process.communicate()
    assert finished(study, begin, compute) == study.whole


@pytest.mark.slow
@BOTH
def test_kill(study, begin, compute):
    process, run_dir = begin(*compute)
    wait_for(lambda: len(shards(run_dir)) >= 2)
    helpers = workers(process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (run_dir / "attributions.h5").exists()
    # Workers don't outlive the command.
    wait_for(lambda: are_gone(helpers), 30)
    assert record(run_dir)["stages"]["attribute"]["status"] == "running"
    assert finished(study, begin, compute) == study.whole


@pytest.mark.slow
def test_killed_workers(study, begin):
    process, run_dir = begin(*DASK)
    killed = []
    for wanted in (1, 7, 13):
        wait_for(lambda wanted=wanted: len(shards(run_dir)) >= wanted or process.poll() is not None)
        # The oldest is surely at a shard; one that took another's place may still be starting.
        oldest = min(workers(process), key=psutil.Process.create_time)
        oldest.kill()
        killed.append(oldest)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert are_gone(killed)
    assert len({worker.pid for worker in killed}) == 3
    assert err == ""
    assert "Traceback" not in out
    assert out.count("lost worker") == 3, out
    assert (run_dir / "attributions.h5").read_bytes() == study.whole


@pytest.mark.slow
def test_relative_paths_are_found_by_workers(study, tmp_path):
    folder = study.base.parent
    arguments = [argument.replace(f"{folder}/", "") for argument in study.arguments]
    assert not any(str(folder) in argument for argument in arguments)
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, *arguments, *DASK, "stages=[train,attribute]", f"run_dir={tmp_path / 'run'}"],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
