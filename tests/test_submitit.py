"""Sweeps whose jobs a launcher runs in processes of their own, as on a cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
pytestmark = pytest.mark.slow

COMMON = ["--multirun", "hydra/launcher=submitit_local", "model.epochs=1", "stages=[train]", "dataset.per_class=20"]


def sweep(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "spray.pipelines.cli", *COMMON, "run_dir=out", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_jobs_elsewhere_write_where_they_would_here_and_tell_how_they_ended(tmp_path: Path) -> None:
    checkpoint = tmp_path / "nowhere.pt"
    said = sweep(tmp_path, "seed=0,1")
    assert said.returncode == 0, said.stderr
    folders = sorted(path.parent for path in tmp_path.glob("out/*/model.pt"))
    assert [folder.name.rpartition("=")[2] for folder in folders] == ["0", "1"]
    assert folders[0].joinpath("model.pt").read_bytes() != folders[1].joinpath("model.pt").read_bytes()
    failed = sweep(tmp_path, "seed=2,3", f"model.checkpoint={checkpoint}")
    assert failed.returncode == 2
    assert [line for line in failed.stderr.splitlines() if "nowhere.pt cannot be read" in line] == [
        f"spray: error: job seed={seed}: model.checkpoint={checkpoint} cannot be read: No such file or directory"
        for seed in (2, 3)
    ]
    assert "Traceback" not in failed.stderr
