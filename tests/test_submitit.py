"""Sweeps whose runs are processes of their own, by Hydra's submitit launcher: folders, exit codes, stops."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import small
import yaml
from hydra.core.config_store import ConfigStore
from test_runner import wait_for

from spray.errors import UserError
from spray.pipelines.sweeps import ENDS, Arrival, JobEnd, Task, lost_job

pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
ROOT = Path(__file__).resolve().parent.parent
SWEEP = ["--multirun", "hydra/launcher=local", "run_dir=sweep", "stages=[train]"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    """Options of a run that takes a moment."""
    folder = tmp_path_factory.mktemp("data")
    images = small.write_images(folder, {"coffee": 6, "skin": 6}, {"coffee": 3, "skin": 3})
    model = f"model.factory={small.write_model(folder)}:build"
    return [
        "experiment=image_folder",
        *images,
        f"dataset.image_size={small.SIDE}",
        model,
        "model.epochs=1",
        "device=cpu",
    ]


@pytest.fixture
def command(data, tmp_path):
    """Start the command in an empty folder; its children are ended with it."""
    started: list[psutil.Process] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", "from spray.pipelines.cli import main; main()", *data, *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(psutil.Process(process.pid))
        return process

    yield start
    for process in started:
        if process.is_running():
            for one in [*process.children(recursive=True), process]:
                one.kill()


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def folders(sweep: Path) -> dict[str, Path]:
    """Return the runs' folders by the seed in their names."""
    return {path.parent.name.split("seed=")[1][0]: path.parent for path in sweep.glob("*/run.json")}


@pytest.mark.slow
def test_each_run_has_its_folder_and_is_a_process_of_its_own(command, tmp_path):
    code, _, err = ended(command(*SWEEP, "seed=0,1"))
    assert (code, err) == (0, "")
    runs = folders(tmp_path / "sweep")
    assert set(runs) == {"0", "1"}
    for seed, folder in runs.items():
        said = json.loads((folder / "run.json").read_text())
        assert (said["seed"], said["stages"]["train"]["status"]) == (int(seed), "done")
        assert "seed=0,1" in said["command"]
        assert (folder / "model.pt").is_file()
        assert "train: done" in (folder / "run.log").read_text()
        assert f"- seed={seed}" in (folder / ".hydra/overrides.yaml").read_text()
    locks = {(folder / ".lock").read_text() for folder in runs.values()}
    assert len(locks) == 2
    # The same sweep in one process finds everything there.
    code, out, _ = ended(command("--multirun", "run_dir=sweep", "stages=[train]", "seed=0,1"))
    assert (code, out.count("train: up to date")) == (0, 2)


@pytest.mark.slow
def test_failures_are_told_in_a_line_each_and_decide_the_exit_code(command, tmp_path):
    code, _, err = ended(command(*SWEEP, "seed=0", "model.learning_rate=1e-3,-1,0"))
    assert code == 2
    assert sorted(err.splitlines()) == [
        f"spray: error: job model.learning_rate={value}: model.learning_rate={float(value)} is out of range; it has to "
        "be above 0"
        for value in (-1, 0)
    ]
    assert len(list((tmp_path / "sweep").glob("*/model.pt"))) == 1


@pytest.mark.slow
def test_the_plugins_own_launcher_and_the_module_as_a_command(data, tmp_path):
    """Without this project's configuration of it; functions of `__main__` couldn't be sent by name."""
    checkpoint = tmp_path / "nowhere.pt"
    sweep = ["--multirun", "hydra/launcher=submitit_local", *data, "stages=[train]", "run_dir=out"]

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "spray.pipelines.cli", *sweep, *options]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    said = run("seed=0,1")
    assert said.returncode == 0, said.stderr
    first, second = sorted(tmp_path.glob("out/*/model.pt"))
    assert first.read_bytes() != second.read_bytes()
    failed = run("seed=2,3", f"model.checkpoint={checkpoint}")
    assert failed.returncode == 2
    assert failed.stderr.splitlines() == [
        f"spray: error: job seed={seed}: model.checkpoint={checkpoint} cannot be read: No such file or directory"
        for seed in (2, 3)
    ]


@pytest.mark.slow
def test_the_default_folder_is_one_for_all_runs(command, tmp_path):
    """Its name has the time and a token in it, which each process would make anew."""
    code, _, _ = ended(command("--multirun", "hydra/launcher=local", "stages=[train]", "seed=0,1"))
    assert code == 0
    assert len({path.parent.parent for path in tmp_path.glob("outputs/*/*/*/run.json")}) == 1
    assert len(list(tmp_path.glob("outputs/*/*/*/run.json"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_ends_the_runs_too(command, tmp_path, number):
    process = command(*SWEEP, "seed=0,1", "model.epochs=100000")
    wait_for(lambda: len(folders(tmp_path / "sweep")) == 2)
    helpers = psutil.Process(process.pid).children(recursive=True)
    assert len(helpers) >= 4
    process.send_signal(number)
    code, _, err = ended(process)
    assert code == (75 if number == signal.SIGTERM else 130)
    assert err.splitlines()[-1].endswith("goes on from here")
    assert "Traceback" not in err
    wait_for(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in helpers), 20)


@pytest.mark.slow
def test_a_run_that_is_killed_is_told(command, tmp_path):
    process = command(*SWEEP, "seed=0,1", "model.epochs=100000")
    wait_for(lambda: len(folders(tmp_path / "sweep")) == 2)
    pid = int((folders(tmp_path / "sweep")["0"] / ".lock").read_text().split()[1])
    os.kill(pid, signal.SIGKILL)
    code, _, err = ended(process)
    assert code == 1
    assert err.startswith("spray: error: a job of the sweep ended before it could tell how: ")
    assert err.count("\n") == 1


def test_a_plan_is_not_for_other_machines(spray, tmp_path):
    result = spray("--multirun", "hydra/launcher=local", "seed=0,1", "plan=true")
    assert result.code == 2
    assert "hydra/launcher=basic" in result.err
    assert result.err.count("\n") == 1
    assert spray("--multirun", "hydra/launcher=basic", "seed=0,1", "plan=true").code == 0


def test_the_launcher_has_to_be_installed(spray, monkeypatch):
    spray("--cfg", "job")  # plugins are found
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"]["launcher"], "submitit_slurm.yaml")
    result = spray("--multirun", "hydra/launcher=slurm", "seed=0,1")
    assert result.code == 2
    assert result.err == (
        "spray: error: this launcher needs hydra-submitit-launcher: pip install 'spray-xai[slurm]'; without it: "
        "hydra/launcher=basic\n"
    )


def test_jobs_of_slurm_are_put_back_when_their_time_is_over(spray):
    options = "hydra.launcher.partition=gpu"
    result = spray("--cfg", "hydra", "-p", "hydra.launcher", "hydra/launcher=slurm", options, fakes_only=False)
    settings = yaml.safe_load(result.out)
    assert settings["_target_"].endswith("SlurmLauncher")
    assert (settings["partition"], settings["gpus_per_node"]) == ("gpu", 1)
    assert settings["max_num_timeout"] > 0
    assert settings["signal_delay_s"] >= 60


def test_how_a_job_ended_arrives_by_unpickling(capsys):
    ENDS.codes.clear()
    sent = pickle.dumps(Arrival(JobEnd(3, 2, "spray: error: job x: y")))
    assert ENDS.codes == {}
    pickle.loads(sent)
    # A launcher may read a result twice; it is told once.
    pickle.loads(sent)
    assert ENDS.codes == {3: 2}
    assert capsys.readouterr().err == "spray: error: job x: y\n"
    for number, code in ((4, 1), (5, 2), (6, 0)):
        ENDS.note(JobEnd(number, code))
    assert ENDS.worst() == 1
    ENDS.codes.clear()
    assert ENDS.worst() == 0


prepared: list[str] = []


def prepare(unique: str) -> None:
    prepared.append(unique)


def a_job(config: dict, typed: list[str]) -> JobEnd:
    return JobEnd(0, 2, "the line")


def test_a_task_knows_where_it_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["spray", "seed=0,1"])
    ENDS.codes.clear()
    prepared.clear()
    task = Task(a_job, prepare, "token")
    assert task({}) is None
    assert ENDS.codes == {0: 2}
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["elsewhere"])
    other = pickle.loads(pickle.dumps(task))
    assert prepared == ["token"]
    assert sys.argv == ["spray", "seed=0,1"]
    arrival = other({})
    assert arrival.end == JobEnd(0, 2, "the line")
    assert capsys.readouterr().err == "the line\n"
    monkeypatch.setattr(sys, "argv", ["spray", "plan=True"])
    with pytest.raises(UserError, match="plan=true"):
        pickle.dumps(Task(a_job, prepare, "token"))


def test_other_errors_are_no_lost_jobs():
    assert lost_job(ValueError("x")) is None
