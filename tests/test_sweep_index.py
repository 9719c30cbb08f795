"""The page that compares the runs of a sweep: what it reads, what it says, when it is made."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_report import HOSTILE, Page

from spray.pipelines.sweeps import Ends, JobEnd, write_index
from spray.report.index import differing, read_runs, render_index
from spray.report.runs_table import runs_csv


def model(clean: float, attacked: float | None) -> dict[str, Any]:
    return {
        "clean_accuracy": clean,
        "clean_accuracy_interval": [clean - 0.02, clean + 0.02],
        "attacked_accuracy": attacked,
        "n": 100,
    }


def write_run(
    sweep: Path, name: str, overrides: list[str], *, found: bool | None = True, class_name: str = "cat", **stages: str
) -> Path:
    folder = sweep / name
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    (folder / ".hydra" / "config.yaml").write_text("seed: 0\n")
    names = ("train", "attribute", "analyze", "rank", "isolate", "correct", "verify", "report")
    entries = {stage: {"status": stages.get(stage, "done"), "seconds": 2.0} for stage in names}
    for entry in entries.values():
        if entry["status"] == "failed":
            entry["error"] = "MemoryError: <b>too</b> large"
    (folder / "run.json").write_text(json.dumps({"stages": entries}))
    rank = [{"class_index": 0, "class_name": class_name, "q_value": 0.004}]
    (folder / "ranking.json").write_text(json.dumps({"classes": rank, "clusters": []}))
    row = {
        "id": "a01",
        "class_index": 0,
        "class_name": class_name,
        "verdict": "clever_hans" if found else "no_effect",
        "flip_rate": 0.83,
        "control_flip_rate": 0.02,
        "samples": [1, 2, 3, 4],
    }
    (folder / "artifacts.json").write_text(json.dumps({"artifacts": [row]}))
    models = {"original": model(0.9, 0.2), "fine_tuned": model(0.91, 0.99), "a_clarc": model(0.88, 0.86)}
    (folder / "verification.json").write_text(json.dumps({"models": models}))
    (folder / "report.html").write_text("<!doctype html>")
    return folder


def plant(folder: Path, samples: list[int]) -> None:
    row = {"kind": "tag", "extent": "local", "class_index": 0, "class_name": "cat", "rate": 0.1, "samples": samples}
    (folder / "planted.json").write_text(json.dumps({"plants": [row]}))


def words(sweep: Path, **options: Any) -> str:
    return Page(render_index(sweep, read_runs(sweep, **options))).words().replace("\u202f", " ")


def test_runs_are_read_as_they_ended(tmp_path):
    write_run(tmp_path, "seed=0", ["seed=0", "run_dir=x"])
    write_run(tmp_path, "seed=10", ["seed=10", "run_dir=x"], found=False)
    write_run(tmp_path, "seed=2", ["seed=2", "run_dir=x"], analyze="failed", rank="pending", isolate="pending")
    write_run(tmp_path, "seed=3", ["seed=3", "run_dir=x"], isolate="pending", verify="pending")
    write_run(tmp_path, "seed=4", ["seed=4", "run_dir=x"], correct="failed", verify="pending")
    broken = write_run(tmp_path, "seed=5", ["seed=5", "run_dir=x"])
    (broken / "artifacts.json").write_text('{"artifacts": 3}')
    early = tmp_path / "seed=6" / ".hydra"
    early.mkdir(parents=True)
    (early / "config.yaml").write_text("seed: 6\n")
    (early / "overrides.yaml").write_text("- seed=6\n")
    (tmp_path / ".submitit").mkdir()
    runs = read_runs(tmp_path, {"seed=6": "spray: error: no such class"})
    # By their numbers, not by their letters.
    assert [(run.overrides["seed"], run.state) for run in runs] == [
        ("0", "found"),
        ("2", "failed"),
        ("3", "incomplete"),
        ("4", "failed"),
        ("5", "failed"),
        ("6", "failed"),
        ("10", "none"),
    ]
    first, failed, incomplete, later, damaged, mistaken, _ = runs
    assert differing(runs) == ["seed"]
    assert (first.top_class, first.findings[0].flip_rate) == (("cat", 0.004), 0.83)
    assert (first.before.attacked.value, first.after.name) == (0.2, "a_clarc"), "fine-tuning is a control"
    assert (failed.findings, failed.top_class, failed.before.name) == ((), None, "original")
    assert failed.told == "analyze: MemoryError: <b>too</b> large"
    assert "isolate" in incomplete.told
    assert later.findings, "what was found before the failure still counts"
    assert later.before is None
    assert "cannot be read" in damaged.told
    assert mistaken.told == "spray: error: no such class"


def test_page_says_how_many_found_what_and_links_the_reports(tmp_path):
    planted = write_run(tmp_path, "seed=0,a=#1?", ["seed=0", "a=x"])
    plant(planted, [1, 2, 3, 4, 5, 6, 7, 8])
    missed = write_run(tmp_path, "seed=1", ["seed=1", "a=x"], found=False)
    plant(missed, [9])
    (missed / "report.html").unlink()
    page = render_index(tmp_path, read_runs(tmp_path))
    links = [dict(attributes)["href"] for tag, attributes in Page(page).tags if tag == "a"]
    assert links == ["#runs", "seed%3D0%2Ca%3D%231%3F/report.html", "runs.csv"]
    said = words(tmp_path)
    assert "1 of 2 runs found an artifact, 1 found none." in said
    assert "An artifact was planted in 2 runs that came to a verdict; 1 found it." in said
    assert "planted tag on cat: a01, precision 100 %, recall 50 %" in said
    assert "planted tag on cat: missed" in said
    assert "20.0 % → 86.0 %" in said
    assert "Given to all: a=x" in said
    assert not re.search(r"<script|url\(|https?:| src=", page)


def test_hostile_names_are_text(tmp_path):
    name = HOSTILE.replace("/", "∕").encode("utf-8", "ignore").decode()[:60]
    write_run(tmp_path, "a", [f"dataset.plant.class={HOSTILE}"], class_name=HOSTILE)
    write_run(tmp_path, name, ["dataset.plant.class=b"], isolate="failed")
    tags = {tag for tag, _ in Page(render_index(tmp_path, read_runs(tmp_path), HOSTILE)).tags}
    assert not tags & {"script", "img"}


def test_table_of_runs_has_numbers_as_numbers_and_no_formulas(tmp_path):
    planted = write_run(tmp_path, "=1+1", ["seed=-1", "note=@SUM(1)", "=b=x"], class_name="=cmd|' /C calc'!A0")
    plant(planted, [1, 2, 3, 4, 5, 6, 7, 8])
    write_run(tmp_path, "b", ["seed=-2"], found=False)
    write_run(tmp_path, "c", ["seed=-3"], isolate="failed")
    text = runs_csv(read_runs(tmp_path))
    rows = {row["seed"]: row for row in csv.DictReader(io.StringIO(text, newline=""))}
    assert sorted(rows) == ["-1", "-2", "-3"]
    hit, none, failed = (rows[seed] for seed in ("-1", "-2", "-3"))
    assert (hit["run"], hit["note"], hit["class"]) == ("'=1+1", "'@SUM(1)", "'=cmd|' /C calc'!A0")
    numbers = {"flip_rate": 0.83, "precision": 1.0, "recall": 0.5, "clean_before": 0.9, "attacked_after": 0.86}
    assert {name: float(hit[name]) for name in numbers} == numbers
    assert (hit["state"], hit["artifacts"], hit["correction"], hit["seconds"]) == ("found", "1", "a_clarc", "16.0")
    assert (none["state"], none["artifacts"], none["first_artifact"], none["note"]) == ("none", "0", "", "")
    assert (failed["state"], failed["artifacts"]) == ("failed", "")
    assert failed["told"].startswith("isolate: MemoryError")
    for cell in (cell for row in csv.reader(io.StringIO(text, newline="")) for cell in row):
        assert cell[:1] not in ("=", "+", "@", "\t")
        assert cell[:1] != "-" or float(cell) < 0


def test_nothing_there_is_a_page_too(tmp_path):
    assert "No run is here yet." in words(tmp_path)


def test_it_is_made_once_for_each_sweep_and_never_a_failure(tmp_path, capsys):
    write_run(tmp_path, "seed=0", ["seed=0"])
    ends = Ends()
    ends.note(JobEnd(0, 0))
    assert write_index(ends) is None, "a single run is no sweep"
    ends.note(JobEnd(1, 0, "", str(tmp_path / "seed=0"), str(tmp_path)))
    assert write_index(ends) == tmp_path / "index.html"
    assert "1 of 1 run found an artifact" in Page((tmp_path / "index.html").read_text()).words()
    (row,) = csv.DictReader((tmp_path / "runs.csv").open(newline=""))
    assert (row["run"], row["seed"], row["state"]) == ("seed=0", "0", "found")
    ends.note(JobEnd(2, 0, "", "x", str(tmp_path / "gone")))
    write_index(ends)
    assert "no comparison of the runs" in capsys.readouterr().err
    ends.clear()
    assert write_index(ends) is None


FAKE = "import fakes; fakes.install(); from spray.pipelines.cli import main; main()"


@pytest.mark.slow
def test_command_makes_it_with_failed_jobs_too_and_anew(tmp_path):
    def spray(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", FAKE, "--multirun", f"run_dir={tmp_path}", *arguments]
        where = Path(__file__).parent
        return subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=120, check=False)

    said = spray("seed=0,-1")
    assert said.returncode == 2
    assert f"the runs compared: {tmp_path / 'index.html'}" in said.stdout
    first = Page((tmp_path / "index.html").read_text()).words()
    assert "seed=-1 is out of range" in first
    spray("seed=1")
    again = Page((tmp_path / "index.html").read_text()).words()
    assert len(re.findall(r"Run \d", again)) == 3, "those of the earlier command are in it as well"
