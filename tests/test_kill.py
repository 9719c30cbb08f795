"""The attribute stage killed for real, at random moments: it goes on, and the result has the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small

KILLING = Path(__file__).with_name("killing.py")
COMMON = ["experiment=photos_tag", "device=cpu", "model.epochs=1", "stages=[train,attribute]", "dataset.per_class=200"]
COMMON += ["attribution.batch_size=16", "compute.shard_size=32", "compute.compression=gzip", "compute.threads=1"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A run directory in which the training is done, and the bytes that the attribute stage gives in one go."""
    folder = tmp_path_factory.mktemp("prepared")
    train = [option for option in COMMON if not option.startswith("stages")]
    assert small.run(*train, "stages=[train]", f"run_dir={folder / 'train'}").code == 0
    assert small.run(*COMMON, f"run_dir={folder / 'whole'}").code == 0
    return folder / "train", (folder / "whole/attributions.h5").read_bytes()


def interrupted(prepared: Path, folder: Path, signal: str, times: int) -> list[dict]:
    """Interrupt the stage so many times; return what became of each start."""
    command = [sys.executable, str(KILLING), str(prepared), str(folder), signal, str(times), "0.5", *COMMON]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr
    events: list[dict] = json.loads(done.stdout.splitlines()[-1])
    return events


def results(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("run*/attributions.h5"))]


def test_fifty_kills_leave_no_trace(prepared: tuple[Path, bytes], tmp_path: Path) -> None:
    events = interrupted(prepared[0], tmp_path, "SIGKILL", 50)
    landed = [event for event in events if event["landed"]]
    assert len(landed) >= 50
    assert all(event["signal"] == 9 for event in landed)
    # They met the stage at different points, some of them in the middle of a file.
    assert len({event["shards"] for event in landed}) >= 8
    assert sum(event["writing"] for event in landed) >= 5
    assert events[-1]["done"]
    files = results(tmp_path)
    assert files
    assert all(data == prepared[1] for data in files)
    assert not list(tmp_path.glob("run*/shards"))
    assert not list(tmp_path.rglob(".*.tmp"))


def test_pre_emption_ends_cleanly_and_the_next_start_goes_on(prepared: tuple[Path, bytes], tmp_path: Path) -> None:
    events = interrupted(prepared[0], tmp_path, "SIGTERM", 15)
    landed = [event for event in events if event["landed"]]
    assert len(landed) >= 15
    assert {event["code"] for event in landed} == {75}
    assert not any(event["left"] for event in landed)
    assert events[-1]["done"]
    assert all(data == prepared[1] for data in results(tmp_path))


@pytest.fixture
def little_disk(tmp_path: Path):  # type: ignore[no-untyped-def]
    """A file system of 8 MB, and a function that changes its size."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(*options: str) -> bool:
        return subprocess.run(["mount", *options, "tmpfs", str(place)], capture_output=True).returncode == 0

    if not mount("-t", "tmpfs", "-o", "size=8M"):
        pytest.skip("mounting a file system takes root")
    yield place, lambda size: mount("-o", f"remount,size={size}")
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_told_and_nothing_is_lost(prepared: tuple[Path, bytes], little_disk) -> None:  # type: ignore[no-untyped-def]
    import shutil

    place, resize = little_disk
    run_dir = place / "run"
    shutil.copytree(prepared[0], run_dir)
    said = small.run(*COMMON, f"run_dir={run_dir}")
    assert said.code == 2
    assert "space" in said.err
    assert "Traceback" not in said.err
    shards = {path: path.stat().st_mtime_ns for path in run_dir.glob("shards/*/*.h5")}
    assert shards
    assert not list(run_dir.rglob(".*.tmp"))
    resize("100M")
    again = small.run(*COMMON, f"run_dir={run_dir}")
    assert again.code == 0, again.err
    assert f"{len(shards)} of 50 shards are there already" in again.out
    assert (run_dir / "attributions.h5").read_bytes() == prepared[1]
