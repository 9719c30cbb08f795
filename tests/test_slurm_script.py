"""The job script for Slurm, with stand-ins for the command and for scontrol."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts/slurm_spray.sh"

# Notes what it was given; ends with a code, or hangs until SIGTERM and ends with 75, not at once.
COMMAND = """#!/usr/bin/env bash
echo "$@" > started
trap 'sleep 0.3; echo told > told; exit 75' TERM
[[ "$CODE" == hang ]] || exit "$CODE"
for _ in $(seq 300); do sleep 0.1; done
"""
SCONTROL = '#!/usr/bin/env bash\necho "$@" > queued\n'


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    for name, text in (("spray", COMMAND), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}


def run(tmp_path: Path, environment: dict[str, str], code: str, *options: str) -> subprocess.Popen[str]:
    command = ["bash", str(SCRIPT), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=tmp_path, env=environment | {"CODE": code}, text=True, **pipes)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("code", ["0", "1", "2"])
def test_the_commands_exit_code_is_the_jobs(tmp_path: Path, environment: dict[str, str], code: str) -> None:
    job = run(tmp_path, environment, code, "run_dir=x", "plan=false", "a=[b c]")
    assert job.wait(20) == int(code)
    assert (tmp_path / "started").read_text() == "run_dir=x plan=false a=[b c]\n"
    assert not (tmp_path / "queued").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_job_that_is_pre_empted_waits_for_the_command_and_is_queued_again(
    tmp_path: Path, environment: dict[str, str], number: signal.Signals
) -> None:
    job = run(tmp_path, environment, "hang", "run_dir=x")
    while not (tmp_path / "started").exists():
        time.sleep(0.02)
    time.sleep(0.2)
    job.send_signal(number)
    assert job.wait(20) == 0
    assert (tmp_path / "told").exists()
    assert (tmp_path / "queued").read_text() == "requeue 17\n"


def test_it_is_not_queued_for_ever(tmp_path: Path, environment: dict[str, str]) -> None:
    job = run(tmp_path, environment | {"SLURM_RESTART_COUNT": "3", "MOST_RESTARTS": "3"}, "75", "run_dir=x")
    assert job.wait(20) == 75
    assert not (tmp_path / "queued").exists()


def test_without_a_folder_of_its_own_it_could_not_go_on(tmp_path: Path, environment: dict[str, str]) -> None:
    job = run(tmp_path, environment, "0", "experiment=photos_tag")
    assert job.wait(20) == 2
    assert "run_dir=DIR" in job.communicate()[1]
    assert not (tmp_path / "started").exists()
