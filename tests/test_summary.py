"""What the terminal shows at the end of a run, and that nothing but a terminal gets it; completion of options."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

from spray.pipelines.summary import MOST_CLASSES, summary

FAKES = Path(__file__).parent / "fakes.py"


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value))


def ranking(n: int = 3) -> dict[str, Any]:
    names = ["cat", "犬\u202e\n", "tree", *(f"class {i}" for i in range(3, n))]
    rows = [
        {"class_index": i, "class_name": names[i], "n": 9, "separability": 10.0 - i, "p_value": 0.1, "rank": i + 1}
        for i in range(n)
    ]
    return {"classes": rows, "clusters": []}


def artifact(name: str, c: int, verdict: str) -> dict[str, Any]:
    return {
        "id": name, "class_index": c, "verdict": verdict, "samples": [1, 2, 3], "flip_rate": 0.8123,
        "control_flip_rate": 0.0214,
    }  # fmt: skip


def test_a_finished_run(tmp_path):
    write(tmp_path, "ranking.json", ranking())
    found = [artifact("a01", 2, "clever_hans"), artifact("a02", 0, "no_effect")]
    write(tmp_path, "artifacts.json", {"artifacts": found})
    model = {"clean_accuracy": 0.875, "attacked_accuracy": 0.12, "worst_class_accuracy": 0.5}
    models = {"original": model, "a_clarc": model | {"attacked_accuracy": 0.905}, "p_clarc": {"clean_accuracy": None}}
    again = {"a01": {"class_name": "tree", "verdict": "no_effect"}}
    write(tmp_path, "verification.json", {"models": models, "chosen": {"method": "a_clarc"}, "recheck": again})
    (tmp_path / "report.html").write_text("")
    lines = summary(tmp_path)
    rows = {line.split()[0]: line for line in lines if line}
    # The finding comes first, whatever its class's rank.
    assert lines[2].startswith("tree")
    assert "a01: Clever Hans in 3 images, turns 81.2 % of other images (control 2.1 %)" in rows["tree"]
    assert "a candidate, did not pass" in rows["cat"]
    assert "no candidate" in rows["犬\\u202e\\n"]
    assert rows["Original"].split()[-6:] == ["87.5", "%", "12.0", "%", "50.0", "%"]
    assert "A-ClArC (chosen)" in rows["A-ClArC"]
    assert "90.5 %" in rows["A-ClArC"]
    assert rows["P-ClArC"].split()[1:] == ["-", "-", "-"]
    assert "the samples of a01 still form a cluster there." in lines[-3]
    assert lines[-1] == f"report: {tmp_path / 'report.html'}"


def test_a_part_of_a_run(tmp_path):
    assert summary(tmp_path) == []
    write(tmp_path, "ranking.json", ranking())
    assert all("not tested" in line for line in summary(tmp_path)[2:5])
    # What a failed stage left behind doesn't count.
    write(tmp_path, "artifacts.json", {"artifacts": [artifact("a01", 2, "clever_hans")]})
    write(tmp_path, "run.json", {"stages": {"isolate": {"status": "failed"}}})
    assert all("not tested" in line for line in summary(tmp_path)[2:5])


def test_many_classes(tmp_path):
    n = 40
    write(tmp_path, "ranking.json", ranking(n))
    write(tmp_path, "artifacts.json", {"artifacts": [artifact(f"a{c}", c, "backdoor") for c in range(20, 40)]})
    lines = summary(tmp_path)
    assert sum("backdoor" in line for line in lines) == MOST_CLASSES
    assert f"and {n - MOST_CLASSES} more classes, {20 - MOST_CLASSES} of them with a finding" in lines


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(FAKES), *arguments]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(FAKES.parent.parent)} | more


def test_only_a_terminal_gets_the_summary(tmp_path):
    import fakes

    arguments = [*fakes.ARGUMENTS, "stages=[train,attribute,analyze,rank]", "run_dir=run"]
    plain = subprocess.run(
        command(*arguments), cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True
    )
    assert "results in" in plain.stdout
    assert "first artifact" not in plain.stdout
    write(tmp_path / "run", "ranking.json", ranking())
    master, slave = pty.openpty()
    process = subprocess.Popen(command(*arguments), cwd=tmp_path, env=environment(), stdout=slave, stderr=slave)
    os.close(slave)
    shown = b""
    try:
        while part := os.read(master, 4096):
            shown += part
    except OSError:  # how Linux says that the other end is closed
        pass
    finally:
        os.close(master)
    assert process.wait() == 0
    assert "results in" in shown.decode()
    assert "first artifact" in shown.decode()


def test_options_are_completed():
    line = "spray experiment=fash"
    said = subprocess.run(
        [sys.executable, "-m", "spray.pipelines.cli", "--shell-completion", "query=bash"],
        env=os.environ | {"COMP_LINE": line, "COMP_POINT": str(len(line))},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said.stdout.split() == ["experiment=fashion_mnist_tag"]
