"""scripts/slurm_spray.sh with stand-ins for spray, srun and scontrol: who gets the signal, what is put back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import fakes
import pytest
from test_runner import is_running, record, wait_for

from spray.pipelines.stages import NAMES

SCRIPT = Path(__file__).resolve().parent.parent / "scripts/slurm_spray.sh"

# Takes a second to end after a signal, as spray does that has workers to stop.
SLOW = "trap 'sleep 1; echo ended; exit 75' TERM\necho ready >\"$READY\"\nwhile :; do sleep 0.05; done\n"


class Node:
    """Where the script runs: the stand-ins' folder comes first on its PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.write("scontrol", 'echo "$@" >>"$REQUEUED"\n')
        self.write("srun", 'echo srun\n"$@"\nexit $?\n')

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.write_text(f"#!/usr/bin/env bash\n{text}")
        path.chmod(0o755)

    def start(self, *arguments: str, spray: str | None = None, **environment: str | None) -> subprocess.Popen[str]:
        if spray is not None:
            self.write("spray", spray)
        wanted: dict[str, str | None] = {
            "PATH": f"{self.folder}{os.pathsep}{os.environ['PATH']}",
            "READY": str(self.folder / "ready"),
            "REQUEUED": str(self.folder / "requeued"),
            "SLURM_JOB_ID": "17",
        } | environment
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        return subprocess.Popen(
            ["bash", str(SCRIPT), *(arguments or ["run_dir=run"])],
            cwd=self.folder,
            env=kept | {name: value for name, value in wanted.items() if value is not None},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, spray: str, **environment: str | None) -> tuple[int, str, str]:
        process = self.start(*arguments, spray=spray, **environment)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    @property
    def requeued(self) -> list[str]:
        path = self.folder / "requeued"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def node(tmp_path):
    return Node(tmp_path)


def test_what_slurm_is_told():
    text = SCRIPT.read_text()
    for line in ("--requeue", "--signal=B:TERM@120", "--open-mode=append"):
        assert f"\n#SBATCH {line}\n" in text
    # Slurm reads no directive after the first command.
    assert text.rindex("#SBATCH") < text.index("set -u")
    assert os.access(SCRIPT, os.X_OK)


@pytest.mark.parametrize("code", [0, 1, 2, 130, 137])
def test_codes_are_handed_on(node, code):
    assert node.run(spray=f"exit {code}\n")[0] == code
    assert node.requeued == []


def test_resume_me_puts_the_job_back(node):
    code, out, _ = node.run(spray="exit 75\n")
    assert (code, node.requeued) == (0, ["requeue 17"])
    assert "job 17 is put back" in out


def test_slurm_does_not_take_it_back(node):
    node.write("scontrol", "exit 1\n")
    code, _, err = node.run(spray="exit 75\n")
    assert code == 75
    assert "submit the same command" in err


def test_not_for_ever(node):
    code, _, err = node.run(spray="exit 75\n", SLURM_RESTART_COUNT="3", MOST_RESTARTS="3")
    assert (code, node.requeued) == (75, [])
    assert "restarted 3 times" in err
    assert node.run(spray="exit 75\n", SLURM_RESTART_COUNT="2", MOST_RESTARTS="3")[0] == 0
    assert node.requeued == ["requeue 17"]


def test_without_slurm_nothing_is_put_back(node):
    assert node.run(spray="exit 75\n", SLURM_JOB_ID=None)[0] == 75
    assert node.requeued == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_signal_is_passed_on_and_the_end_waited_for(node, number):
    process = node.start(spray=SLOW)
    wait_for((node.folder / "ready").exists)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.splitlines()[0] == "ended"
    assert node.requeued == ["requeue 17"]


def test_signals_that_come_again_change_nothing(node):
    process = node.start(spray=SLOW)
    wait_for((node.folder / "ready").exists)
    for _ in range(5):
        process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out.splitlines()[0], node.requeued) == (0, "ended", ["requeue 17"])


def test_a_signal_before_spray_could_take_one(node):
    """The shell's code for it is 143; the job goes on all the same."""
    process = node.start(spray='echo ready >"$READY"\nexec sleep 60\n')
    wait_for((node.folder / "ready").exists)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert (process.returncode, node.requeued) == (0, ["requeue 17"])


def test_spray_that_is_killed_is_not_put_back(node):
    """Out of memory, say: it would be again."""
    process = node.start(spray='echo $$ >"$READY.new"\nmv "$READY.new" "$READY"\nsleep 60 &\nwait\n')
    wait_for((node.folder / "ready").exists)
    os.kill(int((node.folder / "ready").read_text()), signal.SIGKILL)
    process.wait(timeout=60)
    assert (process.returncode, node.requeued) == (137, [])


def test_arguments_arrive_as_they_are(node):
    wanted = ["run_dir=a b", "compute.slurm.job_extra_directives=['--gpus=1']", "model.factory=*.py:build", ""]
    code, out, _ = node.run(*wanted, spray='printf "%s\\n" "$@"\n')
    assert (code, out.splitlines()) == (0, wanted)


def test_spray_may_be_several_words(node):
    code, out, _ = node.run("run_dir=x", spray='echo "spray $*"\n', SPRAY="srun spray")
    assert (code, out.splitlines()) == (0, ["srun", "spray run_dir=x"])


def test_run_dir_has_to_be_given(node):
    code, _, err = node.run("seed=1", spray="exit 0\n")
    assert code == 2
    assert "give run_dir=DIR" in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_the_command_is_stopped_and_the_job_goes_on_by_itself(node):
    """The real command with fake stages: the second start is the one that Slurm makes of what was put back."""
    run = ["run_dir=run", *fakes.ARGUMENTS]
    environment = {
        "SPRAY": f"{sys.executable} {fakes.__file__}",
        "PYTHONPATH": str(SCRIPT.parent.parent),
    }
    process = node.start(*run, SPRAY_FAKE_SLEEP="rank", **environment)
    wait_for(lambda: is_running(node.folder / "run", "rank"))
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, node.requeued) == (0, ["requeue 17"])
    assert "stopped by SIGTERM" in err
    process = node.start(*run, **environment, SLURM_RESTART_COUNT="1")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert "attribute: up to date" in out
    stages = record(node.folder / "run")["stages"]
    assert {stages[name]["status"] for name in NAMES} == {"done"}
    assert node.requeued == ["requeue 17"]
