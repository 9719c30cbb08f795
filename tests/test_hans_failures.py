"""What goes wrong in the study of planted artifacts ends its cell alone, and a study that is stopped goes on."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Barrier, Event
from types import SimpleNamespace
from typing import Any

import hans
import hans_bench
import hans_cells
import hans_reliance
import pytest
import small
from hans_cells import Cell

TINY = """\
import numpy as np
from spray.data.arrays import ArrayDataset

def tiny(seed):
    images = np.random.default_rng(seed).integers(256, size=(64, 1, 32, 32), dtype=np.uint8)
    made = ArrayDataset(images, np.arange(64) % 8, [f"c{i}" for i in range(8)])
    return made, made
"""


def record_of(cell: Cell, out: Path) -> dict[str, Any]:
    """Write and return the record of a cell that ended with its training, which takes no other file for its row."""
    record = {key: getattr(cell, key) for key in ("dataset", "seed", "arm", "kind", "rate")}
    record |= {"overrides": cell.overrides(out), "seconds": 0.0, "idle": [0.8, 0.7, 0.7]}
    (out / cell.name).mkdir(parents=True, exist_ok=True)
    (out / cell.name / "cell.json").write_text(json.dumps(record))
    return record


def instead_of_spray(monkeypatch: pytest.MonkeyPatch, spray: Callable[[list[str]], small.Outcome]) -> None:
    """Have a function called where a process of `spray` would be started."""
    run = subprocess.run

    def start(command: list[str], **options: Any) -> Any:
        if command[1:4] != ["-P", "-m", "spray.pipelines.cli"]:
            return run(command, **options)
        said = spray(command[4:])
        done = subprocess.CompletedProcess(command, said.code, said.out, said.err)
        if options["check"]:
            done.check_returncode()
        return done

    monkeypatch.setattr(subprocess, "run", start)


def test_reliance_is_judged_on_a_model_that_was_trained_as_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell, trained = Cell("photos32", 0, "planted", "tag", 0.2), []

    def spray(overrides: list[str]) -> small.Outcome:
        trained.append(overrides)
        return small.run(*overrides)

    def idle(more: list[str]) -> tuple[Any, int]:
        before = len(trained)
        record = hans_reliance.idle(cell, tmp_path, ("a_clarc",), more)
        return record, len(trained) - before

    instead_of_spray(monkeypatch, spray)
    monkeypatch.setattr(hans_reliance, "relies", lambda *accuracies: False)
    (tmp_path / "data.py").write_text(TINY)
    given = [f"dataset.factory={tmp_path / 'data.py'}:tiny", "model.epochs=1"]
    first, runs = idle(given)
    assert runs == 2  # the planted and the clean one
    assert idle(given) == (first, 0)
    (tmp_path / cell.name / "cell.json").unlink()
    assert idle(given) == (first, 0)  # models that are there need no run either
    other, runs = idle([*given, "model.epochs=2"])
    assert runs == 2
    assert other["overrides"] == [*first["overrides"], "model.epochs=2"]
    for name in (cell.name, Cell("photos32", 0).name):
        entry = json.loads((tmp_path / name / "run.json").read_text())["stages"]["train"]
        assert entry["settings"]["model.epochs"] == 2


def test_a_clean_model_that_its_own_cell_is_training_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean, running = Cell("photos32", 0), list[str]()
    begun = Event()

    def spray(overrides: list[str]) -> small.Outcome:
        folder = next(each for each in overrides if each.startswith("run_dir="))
        if folder in running:
            return small.Outcome(2, "", "spray: error: another spray is using it")
        running.append(folder)
        begun.set()
        time.sleep(0.3)
        running.remove(folder)
        return small.Outcome(0, "", "")

    instead_of_spray(monkeypatch, spray)
    monkeypatch.setattr(hans_reliance, "configured", lambda folder, overrides: SimpleNamespace(model=None))
    monkeypatch.setattr(hans_reliance, "_accuracies", lambda context, clean: [0.9, 0.1, 0.9])
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(hans_bench.attempt, clean, hans_bench.Study(), tmp_path)
        assert begun.wait(10)
        # Meanwhile no other command takes the cell.
        assert hans_bench.attempt(clean, hans_bench.Study(), tmp_path) == "another process is at it"
        assert hans_reliance.idle(Cell("photos32", 0, "planted", "tag", 0.2), tmp_path, ("a_clarc",), []) is None
        assert made.result() == "0 s"


def test_a_training_that_fails_ends_its_cell_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def spray(overrides: list[str]) -> small.Outcome:
        asked.append(overrides)
        return small.Outcome(2, "", "a warning\nspray: error: no luck today\n")

    instead_of_spray(monkeypatch, spray)
    given = ("relying=true", f"out={tmp_path}", "dataset=photos32", "kind=tag,box", "rate=0.2", "seed=0")
    assert hans.run(monkeypatch, *given) == 1
    names = [Cell("photos32", 0, "planted", kind, 0.2).name for kind in ("tag", "box")]
    text = capsys.readouterr().out
    assert [f"- {name}: spray: error: no luck today" in text for name in names] == [True, True]
    assert len(asked) == 2


def test_what_goes_wrong_in_one_cell_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [Cell("photos32", seed) for seed in range(4)]
    full, damaged, without_row, good = cells

    def spray(overrides: list[str]) -> small.Outcome:
        if f"run_dir={tmp_path / full.name}" in overrides:
            raise OSError(28, "No space\nleft on device")
        return small.Outcome(0, "", "")

    instead_of_spray(monkeypatch, spray)
    for cell in (damaged, good):
        record_of(cell, tmp_path)
    (tmp_path / damaged.name / "cell.json").write_text('{"overrides": [')
    make = hans_cells.make
    monkeypatch.setattr(
        hans_cells, "make", lambda cell, *more: record_of(cell, tmp_path) if cell == good else make(cell, *more)
    )
    given = (f"out={tmp_path}", "dataset=photos32", "kind=none", "rate=0.2", "seed=0,1,2,3")
    assert hans.run(monkeypatch, *given) == 1
    text = capsys.readouterr().out
    assert f"- {full.name}: OSError: [Errno 28] No space left on device\n" in text
    assert f"- {damaged.name}: {tmp_path / damaged.name / 'cell.json'} is damaged" in text
    assert f"- {without_row.name}: FileNotFoundError: " in text
    with (tmp_path / "hans.csv").open(newline="") as file:
        assert [row["cell"] for row in csv.DictReader(file)] == [good.name]


def test_cells_that_end_together_share_one_ceiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [Cell("photos32", 0, "planted", kind, 0.2) for kind in ("tag", "box")]
    copytree, together = shutil.copytree, Barrier(2)

    def spray(overrides: list[str]) -> small.Outcome:
        folder = Path(next(each for each in overrides if each.startswith("run_dir=")).partition("=")[2])
        (folder / "ceiling").mkdir(parents=True)
        (folder / "ceiling" / "model.pt").write_text("weights")
        return small.Outcome(0, "", "")

    def copy(*given: Any, **options: Any) -> Any:
        together.wait(10)
        return copytree(*given, **options)

    instead_of_spray(monkeypatch, spray)
    monkeypatch.setattr(shutil, "copytree", copy)
    with ThreadPoolExecutor(2) as pool:
        records = [pool.submit(hans_cells.make, cell, tmp_path, ("a_clarc",)) for cell in cells]
        assert [record.result()["kind"] for record in records] == ["tag", "box"]
    assert [path.name for path in (tmp_path / "ceilings").iterdir()] == ["photos32-seed0"]
    assert (tmp_path / "ceilings/photos32-seed0/model.pt").read_text() == "weights"


def test_a_stopped_study_begins_no_further_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = []

    def make(cell: Cell, *more: Any) -> dict[str, Any]:
        begun.append(cell)
        raise KeyboardInterrupt

    monkeypatch.setattr(hans_cells, "make", make)
    given = (f"out={tmp_path}", "dataset=photos32", "kind=none", "rate=0.2", "seed=0,1,2")
    assert hans.run(monkeypatch, *given) == 130
    assert len(begun) == 1
    assert "the same command goes on from here" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_study_that_was_stopped_goes_on(tmp_path: Path, sent: signal.Signals) -> None:
    cells = [Cell("photos32", seed) for seed in (0, 1)]
    small_one = '"dataset.per_class=60","model.epochs=1","isolate.n_tested=20","isolate.candidates=1"'
    command = [sys.executable, hans_bench.__file__, f"out={tmp_path}", f"overrides=[{small_one}]"]
    command += ["dataset=photos32", "kind=none", "rate=0.2", "seed=0,1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    path = tmp_path / cells[0].name / "run.json"

    def stages() -> dict[str, Any]:
        return dict(json.loads(path.read_text())["stages"]) if path.exists() else {}

    # With a group of its own, which gets what a terminal's Ctrl-C sends.
    study = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while study.poll() is None and stages().get("attribute", {}).get("status") not in ("running", "done"):
        time.sleep(0.01)
    # A scheduler's SIGTERM comes to the study alone.
    (os.kill if sent == signal.SIGTERM else os.killpg)(study.pid, sent)
    try:
        said = study.communicate(timeout=60)[1]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(study.pid, signal.SIGKILL)
    assert study.returncode == (-9 if sent == signal.SIGKILL else 130)
    assert sent == signal.SIGKILL or "the same command goes on from here" in said
    assert not list(tmp_path.glob("*/cell.json"))
    assert not (tmp_path / cells[1].name).exists()
    trained = stages()["train"]
    assert trained["status"] == "done"
    again = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert again.returncode == 0, again.stderr
    assert stages()["train"] == trained  # not once more
    with (tmp_path / "hans.csv").open(newline="") as file:
        assert {row["cell"] for row in csv.DictReader(file)} == {cell.name for cell in cells}
