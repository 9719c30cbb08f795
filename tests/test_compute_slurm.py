"""compute=dask_slurm with a stand-in for Slurm: the job's script, mistakes, jobs that end, are killed or refused."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from typing import Any

import faulty
import pytest
from fake_slurm import FakeSlurm

from spray.errors import UserError
from spray.pipelines.compute import dask_scheduling, dask_slurm
from spray.pipelines.compute.dask_parts import ShardsFailedError
from spray.pipelines.compute.dask_slurm import CLOSING_SECONDS, job_script, lifetime_of, walltime_seconds

HERE = {"host": "127.0.0.1"}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    fake = FakeSlurm(tmp_path / "slurm")
    for name, value in fake.environment.items():
        monkeypatch.setenv(name, value)
    yield fake
    fake.close()


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def context(run_dir, threads: int | None = None, **slurm: Any) -> Any:
    options = {"cores": 1, "memory": "2GB", "scheduler_options": HERE} | slurm
    return faulty.a_context(run_dir, slurm=options, threads=threads)


def test_script_asks_for_what_is_configured(slurm, run_dir):
    script = job_script(
        context(
            run_dir,
            queue="gpu",
            account="lab",
            cores=8,
            memory="64GB",
            walltime="04:00:00",
            job_extra_directives=["--gpus=1", "--constraint=a100"],
            job_script_prologue=["module load cuda"],
            interface="lo",
        )
    ).splitlines()
    assert script[0] == "#!/usr/bin/env bash"
    for directive in ("-J spray", "-p gpu", "-A lab", "-n 1", "--cpus-per-task=8", "--mem=60G", "-t 04:00:00"):
        assert f"#SBATCH {directive}" in script
    for directive in ("--gpus=1", "--constraint=a100", "--no-requeue", f"-o {run_dir}/slurm/spray-%J.out"):
        assert f"#SBATCH {directive}" in script
    command = script[-1]
    assert " -m distributed.cli.dask_worker tcp://" in command
    for part in ("--interface lo", "--nthreads 8", "--nanny", "--no-dashboard"):
        assert part in command
    # Ends itself in time: 4 h less a minute and what it varies by.
    assert f"--lifetime {4 * 3600 - 60 - 300}s --lifetime-stagger 300s" in command
    assert script.index("export OMP_NUM_THREADS=8") < script.index("module load cuda") < len(script) - 1


def test_looking_at_the_script_writes_and_submits_nothing(slurm, run_dir):
    job_script(context(run_dir))
    assert list(run_dir.iterdir()) == []
    assert slurm.jobs() == []


def test_an_interrupt_means_what_it_did_before():
    # In a process of its own: what an import does, it does once.
    code = """
import signal
from spray.pipelines.compute.dask_slurm import _jobqueue
_jobqueue().SLURMCluster
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("options", "threads", "expected"),
    [({"cores": 8}, None, 8), ({"cores": 8, "processes": 4}, None, 2), ({"cores": 8, "processes": 4}, 3, 3)],
)
def test_cores_are_shared_out(slurm, run_dir, options, threads, expected):
    script = job_script(context(run_dir, threads, **options))
    assert f"export OMP_NUM_THREADS={expected}\n" in script
    assert dask_slurm.worker_threads(context(run_dir, threads, **options)) == expected


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"qeue": "gpu"}, ["unknown option 'compute.slurm.qeue'", "did you mean 'queue'", "walltime"]),
        ({"memory": None}, ["compute.slurm.memory is missing"]),
        ({"cores": None}, ["compute.slurm.cores is missing", "compute.slurm.cores=8"]),
        ({"cores": 0}, ["compute.slurm.cores=0"]),
        ({"cores": "8"}, ["compute.slurm.cores=8"]),
        ({"jobs": 0}, ["compute.slurm.jobs=0"]),
        ({"jobs": True}, ["compute.slurm.jobs=True"]),
        ({"processes": 2}, ["compute.slurm.processes=2", "1 cores"]),
        ({"walltime": "soon"}, ["compute.slurm.walltime=soon", "04:00:00"]),
        ({"walltime": 14400}, ["compute.slurm.walltime=14400", "quote"]),
        ({"walltime": "1"}, ["compute.slurm.walltime=1 is too short (60 s)"]),
        ({"job_extra_directives": "--gpus=1"}, ["job_extra_directives=--gpus=1 is no list"]),
        ({"job_script_prologue": [1]}, ["job_script_prologue=[1] is no list of texts"]),
    ],
)
def test_mistakes(slurm, run_dir, options, parts):
    with pytest.raises(UserError) as error:
        dask_slurm.check(context(run_dir, **options))
    for part in parts:
        assert part in str(error.value)


def test_no_slurm_here(run_dir, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="finds no sbatch on the PATH"):
        dask_slurm.check(context(run_dir))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("30:30", 1830),
        ("04:00:00", 14400),
        ("1-0", 86400),
        ("1-2", 93600),
        ("1-02:30", 95400),
        ("2-00:00:30", 172830),
    ],
)
def test_walltimes_as_slurm_reads_them(text, seconds):
    assert walltime_seconds(text) == seconds


@pytest.mark.parametrize("walltime", [120, 600, 3600, 86400, 7 * 86400])
def test_a_worker_ends_before_its_job_does(walltime):
    lifetime, stagger = lifetime_of(walltime)
    assert lifetime - stagger > 0
    assert lifetime + stagger + CLOSING_SECONDS <= walltime


def compute(context: Any, job: Any, shards: Any) -> list[int]:
    done: list[int] = []
    dask_slurm.run(context, job, shards, lambda result: done.append(result.number), faulty.make)
    return done


@pytest.mark.slow
def test_jobs_do_the_work_and_are_gone(slurm, run_dir):
    job, shards = faulty.a_job(run_dir, seconds=0.05)
    done = compute(context(run_dir, jobs=2, threads=1), job, shards)
    assert sorted(done) == list(range(len(shards)))
    assert faulty.files(job) == faulty.expected(job, shards)
    assert slurm.jobs() == [100, 101]
    end = time.monotonic() + 20
    while any(slurm.is_alive(number) for number in slurm.jobs()):
        assert time.monotonic() < end
        time.sleep(0.1)
    # Threads as asked for, of torch, and in the environment.
    assert all(note.split("-")[2:5] == ["1", "1", "1"] for note in faulty.notes(job, "build"))
    assert len(list((run_dir / "slurm").glob("spray-*.err"))) == 2


@pytest.mark.slow
def test_no_more_jobs_than_there_are_shards(slurm, run_dir):
    job, shards = faulty.a_job(run_dir, n=4, shard_size=4)
    compute(context(run_dir, jobs=8), job, shards)
    assert slurm.jobs() == [100]


@pytest.mark.slow
def test_several_workers_in_a_job(slurm, run_dir):
    job, shards = faulty.a_job(run_dir, n=60, shard_size=2, seconds=0.1)
    assert len(compute(context(run_dir, jobs=1, cores=2, processes=2), job, shards)) == len(shards)
    assert slurm.jobs() == [100]
    assert len({note.split("-")[1] for note in faulty.notes(job, "build")}) == 2


@pytest.mark.slow
def test_a_job_that_is_killed_is_replaced(slurm, run_dir, monkeypatch, caplog):
    monkeypatch.setattr(dask_scheduling, "HEAL_SECONDS", 1.0)
    job, shards = faulty.a_job(run_dir, n=60, shard_size=1, seconds=0.3)
    killed = []

    def kill() -> None:
        end = time.monotonic() + 60
        while not faulty.notes(job, "run") and time.monotonic() < end:
            time.sleep(0.05)
        slurm.kill(100)
        killed.append(100)

    thread = threading.Thread(target=kill)
    thread.start()
    done = compute(context(run_dir, jobs=1), job, shards)
    thread.join()
    assert killed == [100]
    assert sorted(done) == list(range(60))
    assert faulty.files(job) == faulty.expected(job, shards)
    assert slurm.jobs() == [100, 101]
    assert "lost worker" in caplog.text


@pytest.mark.slow
def test_jobs_that_slurm_refuses(slurm, run_dir):
    (slurm.folder / "refuses").touch()
    job, shards = faulty.a_job(run_dir)
    with pytest.raises(
        UserError, match=r"sbatch refuses the job: .*invalid partition specified: nope; see compute.slurm"
    ):
        compute(context(run_dir, queue="nope"), job, shards)


@pytest.mark.slow
def test_jobs_that_end_before_they_begin(slurm, run_dir, monkeypatch):
    """As with a module that is not there: else jobs would be submitted for ever."""
    monkeypatch.setattr(dask_scheduling, "HEAL_SECONDS", 0.5)
    (slurm.folder / "breaks").touch()
    job, shards = faulty.a_job(run_dir)
    with pytest.raises(ShardsFailedError, match=rf"3 Slurm jobs ended before .* their logs are in {run_dir}/slurm"):
        compute(context(run_dir), job, shards)
    assert len(slurm.jobs()) == 3


@pytest.mark.slow
def test_fewer_jobs_than_asked_for_will_do(slurm, run_dir, monkeypatch, caplog):
    """As where a user may have only so many: what is refused is asked for again."""
    sbatch = slurm.bin / "sbatch"
    text = sbatch.read_text().replace('if [ -e "$FAKE_SLURM/refuses" ]', 'if [ -e "$FAKE_SLURM/100" ]')
    # Two that come at once would both find that there is none yet.
    text = text.replace("set -eu\n", 'set -eu\nexec 9>"$FAKE_SLURM/lock"\nflock 9\n')
    sbatch.write_text(text.replace("</dev/null &", "</dev/null 9>&- &"))
    monkeypatch.setattr(dask_scheduling, "HEAL_SECONDS", 0.5)
    job, shards = faulty.a_job(run_dir, n=24, shard_size=1, seconds=0.2)
    assert len(compute(context(run_dir, jobs=2), job, shards)) == len(shards)
    assert caplog.text.count("sbatch refuses 1 of 2 jobs") >= 3
    assert slurm.jobs() == [100]
