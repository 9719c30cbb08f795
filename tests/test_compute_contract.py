"""What every kind of compute that can run here keeps to: the same shards, told once, and clean ends."""

from __future__ import annotations

import time
from typing import Any

import faulty
import pytest
from fake_slurm import FakeSlurm

from spray.errors import UserError
from spray.pipelines.compute import COMPUTES, backend

# Needs GPUs; see test_compute_cuda.py.
ELSEWHERE = {"dask_cuda"}
KINDS = sorted(set(COMPUTES.names()) - ELSEWHERE)
OPTIONS: dict[str, dict[str, Any]] = {
    "dask_local": {"n_workers": 2},
    "dask_slurm": {"slurm": {"jobs": 2, "cores": 1, "memory": "2GB", "scheduler_options": {"host": "127.0.0.1"}}},
}
pytestmark = pytest.mark.slow


def with_workers(test):
    """Let a test run on the kinds alone that have workers beside this process."""
    kinds = [kind for kind in KINDS if kind != "serial"]
    return pytest.mark.parametrize("compute", kinds, indirect=True)(test)


@pytest.fixture(params=KINDS)
def compute(request, tmp_path, monkeypatch):
    """Run shards with faults on one kind; returns the job, the shards and what was told."""
    kind = request.param
    slurm = FakeSlurm(tmp_path / "slurm")
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    if kind == "serial":
        # It has a worker of its own, in this process.
        monkeypatch.setattr("spray.pipelines.compute.serial.ShardWorker", InProcess)
    run = backend(kind)
    arguments = () if kind == "serial" else (faulty.make,)

    def start(on_done=lambda result: None, **config: Any):
        run_dir = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        run_dir.mkdir()
        job, shards = faulty.a_job(run_dir, **config)
        told: list[int] = []

        def note(result: Any) -> None:
            told.append(result.number)
            on_done(result)

        context = faulty.a_context(run_dir, name=kind, **OPTIONS.get(kind, {}))
        begin = time.monotonic()
        try:
            run(context, job, shards, note, *arguments)
        finally:
            start.seconds = time.monotonic() - begin
            start.last = (job, shards, told)
        return job, shards, told

    start.kind, start.slurm = kind, slurm
    yield start
    slurm.close()


class InProcess(faulty.Faulty):
    """The stand-in as the serial kind takes it."""

    def __init__(self, context: Any, job: Any) -> None:
        super().__init__(job, None)

    def run_all(self, shards: Any, count: Any = None) -> Any:
        yield from super().run_all(shards)


def test_every_shard_is_computed_and_told_once(compute):
    job, shards, told = compute(n=41, shard_size=4)
    assert sorted(told) == list(range(11))
    assert faulty.files(job) == faulty.expected(job, shards)


def test_nothing_to_do_is_done(compute):
    job, _, told = compute(n=0)
    assert told == []
    assert faulty.files(job) == {}


def test_a_users_mistake_is_told_as_it_is(compute):
    with pytest.raises(UserError, match=r"^that cannot be done; do this$"):
        compute(faults={"3": "user"})
    job, shards, told = compute.last
    assert 3 not in told
    assert compute.seconds < 60
    whole = faulty.expected(job, shards)
    assert all(whole[name] == content for name, content in faulty.files(job).items())


def test_an_error_of_the_caller_stops_it(compute):
    before: list[int] = []

    def stop(result: Any) -> None:
        if before:
            raise ZeroDivisionError
        before.append(result.number)

    with pytest.raises(ZeroDivisionError):
        compute(on_done=stop, n=2000, shard_size=4, seconds=0.01)
    job, _, told = compute.last
    assert len(told) == 2
    # Nothing goes on behind the caller's back.
    time.sleep(1)
    there = faulty.files(job)
    time.sleep(1)
    assert faulty.files(job) == there
    assert len(there) < 500
    assert not [name for name in there if name.endswith(".tmp")]


@with_workers
@pytest.mark.parametrize("kind", ["kill", "error"])
def test_workers_that_fail_are_replaced(compute, kind):
    job, shards, told = compute(n=24, faults={"2": f"once {kind}"}, seconds=0.05)
    assert sorted(told) == list(range(6))
    assert faulty.files(job) == faulty.expected(job, shards)


@with_workers
def test_a_shard_that_hangs_does_not_keep_a_stop_waiting(compute):
    """The caller raises while a worker is at something long: it is ended, with what it had begun to write."""

    def stop(result: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        compute(on_done=stop, n=8, shard_size=4, faults={"1": "hang"}, seconds=1)
    assert compute.seconds < 60
    job, _, told = compute.last
    assert told == [0]
    assert set(faulty.files(job)) == {"000000.h5"}


def test_names_and_modules():
    assert set(KINDS) == {"serial", "dask_local", "dask_slurm"}
    for name in COMPUTES.names():
        assert callable(backend(name))


@with_workers
def test_nothing_is_left_on_the_terminal(compute, capfd):
    """What Dask logs is for run.log."""
    compute(n=24, faults={"2": "once kill", "4": "once error"})
    out, err = capfd.readouterr()
    assert "distributed" not in err + out
    assert "Traceback" not in err + out
