"""The attribute stage killed for real, at random moments: it goes on, and the result has the same bytes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
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
    # A kill after the stage was recorded may leave its shards, or half of what is written last: the next start tidies.
    for run in tmp_path.glob("run*"):
        if (run / "shards").exists() or any(run.rglob(".*.tmp")):
            assert "attribute: up to date" in small.run(*COMMON, f"run_dir={run}").out
    assert not list(tmp_path.glob("run*/shards"))
    assert not list(tmp_path.rglob(".*.tmp"))


def test_pre_emption_ends_cleanly_and_the_next_start_goes_on(prepared: tuple[Path, bytes], tmp_path: Path) -> None:
    events = interrupted(prepared[0], tmp_path, "SIGTERM", 15)
    landed = [event for event in events if event["landed"]]
    assert len(landed) >= 15
    assert {event["code"] for event in landed} == {75}, [p.read_text()[-3000:] for p in tmp_path.glob("run*/said.txt")]
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


@pytest.mark.parametrize("years", [-20, 20])
def test_a_clock_that_jumped_between_two_starts_changes_nothing(
    prepared: tuple[Path, bytes], tmp_path: Path, years: int
) -> None:
    import shutil

    run_dir = tmp_path / "run"
    shutil.copytree(prepared[0], run_dir)
    process = subprocess.Popen(
        [sys.executable, "-m", "spray.pipelines.cli", *COMMON, f"run_dir={run_dir}"], stdout=subprocess.DEVNULL
    )
    while process.poll() is None and len(list(run_dir.glob("shards/*/*.h5"))) < 5:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9
    # What the first start wrote, and wrote down, has the time of another clock.
    seconds = years * 365 * 86400
    for path in run_dir.rglob("*"):
        os.utime(path, (path.stat().st_atime + seconds, path.stat().st_mtime + seconds))
    record = json.loads((run_dir / "run.json").read_text())
    attribute = record["stages"]["attribute"]
    assert attribute["status"] == "running"
    attribute["started"] = str(int(attribute["started"][:4]) + years) + attribute["started"][4:]
    (run_dir / "run.json").write_text(json.dumps(record))
    shards = len(list(run_dir.glob("shards/*/*.h5")))
    again = small.run(*COMMON, f"run_dir={run_dir}")
    assert again.code == 0, again.err
    assert f"{shards} of 50 shards are there already" in again.out
    assert (run_dir / "attributions.h5").read_bytes() == prepared[1]
    assert "attribute: up to date" in small.run(*COMMON, f"run_dir={run_dir}").out


SLOW = ["attribution.method=smooth_grad", "attribution.options={n_samples: 10}"]


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the processes that compute, not those that look after them."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            # A worker that is at its work has loaded torch; one that is killed before that has computed nothing yet.
            if "spawn_main" in " ".join(child.cmdline()) and child.memory_info().rss > 3e8:
                found.append(child)
        except psutil.Error:
            continue
    return found


def _age(path: Path) -> float:
    """Return the seconds since a file was changed, or many if it is gone."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 1e9


def test_killed_workers_and_a_killed_scheduler_leave_no_trace(prepared: tuple[Path, bytes], tmp_path: Path) -> None:
    import shutil

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        shutil.copytree(prepared[0], folder)
    assert small.run(*COMMON, *SLOW, f"run_dir={whole}").code == 0
    command = [sys.executable, "-m", "spray.pipelines.cli", *COMMON, *SLOW, f"run_dir={killed}"]
    command += ["compute=dask_local", "compute.n_workers=2"]
    rng = random.Random(0)
    dead = schedulers = starts = due = 0
    at_work: set[int] = set()
    while starts < 20:
        starts += 1
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        wanted = rng.randint(2, 4)
        while process.poll() is None:
            time.sleep(rng.uniform(0, 0.3))
            # In the middle of a shard; its temporary file may have been left by one that was killed, so by its age.
            writing = any(_age(path) < 0.5 for path in killed.glob("shards/*/.*.tmp"))
            done = len(list(killed.glob("shards/*/*.h5")))
            workers = workers_of(process) if writing and dead < 10 and done >= due else []
            if workers:
                at_work.add(done)
                due = done + rng.randint(0, 4)
                victim = rng.choice(workers)
                with suppress(psutil.Error):
                    victim.kill()
                    victim.wait(10)
                    dead += 1
                    wanted -= 1
            if wanted <= 0 and schedulers < 2:
                process.kill()
                process.wait()
                schedulers += 1
        said = process.communicate()[0]
        if process.returncode == 0:
            break
        assert process.returncode == -9, said
    assert process.returncode == 0
    assert dead >= 10
    assert schedulers == 2
    assert len(at_work) >= 4  # the kills met the work at different points
    assert "lost worker" in (killed / "run.log").read_text()
    assert (killed / "attributions.h5").read_bytes() == (whole / "attributions.h5").read_bytes()
    assert not list(killed.rglob(".*.tmp"))
