"""Which worker computes what, and what happens when one fails, dies or finds a mistake: real workers, fake work."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import faulty
import pytest

from spray.errors import UserError
from spray.pipelines.compute import dask_scheduling
from spray.pipelines.compute.dask_common import QUIET, quiet_logs
from spray.pipelines.compute.dask_parts import Crew, ShardsFailedError, Watch
from spray.pipelines.compute.dask_progress import Progress
from spray.pipelines.compute.dask_scheduling import Scheduling
from spray.pipelines.compute.dask_worker import EXIT_SECONDS, here, is_hopeless, one_line
from spray.store.shards import Shard

dask = pytest.importorskip("dask")
LOG = logging.getLogger("spray.test.scheduling")


def start_cluster() -> Any:
    from distributed import LocalCluster

    options: dict[str, Any] = {"dashboard_address": "127.0.0.1:0", "dashboard": False}
    return LocalCluster(n_workers=2, threads_per_worker=1, memory_limit=0, scheduler_kwargs=options)


@pytest.fixture(scope="module")
def cluster():
    with dask.config.set(QUIET), quiet_logs(LOG):
        cluster = start_cluster()
        yield cluster
        cluster.close(timeout=10)


class Run:
    """One run of the scheduling loop on the cluster, and what it said."""

    def __init__(self, cluster: Any, run_dir: Path, **config: Any) -> None:
        self.job, self.shards = faulty.a_job(run_dir, **config)
        self.done: list[int] = []
        self.cluster = cluster
        crew = Crew(here(threads=1), "the log", patience=60)
        self.scheduling = Scheduling(cluster, crew, LOG, self.job, self.shards, self.on_done, faulty.make)

    def on_done(self, result: Any) -> None:
        shard = self.shards[result.number]
        assert (self.job.folder / shard.name).exists()
        self.done.append(result.number)

    def __call__(self) -> Run:
        self.scheduling.run()
        return self

    @property
    def are_whole(self) -> bool:
        """Whether each shard was told once and is there with the right bytes, and nothing else is."""
        every = list(range(len(self.shards)))
        return sorted(self.done) == every and faulty.files(self.job) == faulty.expected(self.job, self.shards)


@pytest.fixture
def run(cluster, tmp_path, caplog):
    caplog.set_level(logging.INFO, LOG.name)
    runs: list[Run] = []

    def start(**config: Any) -> Run:
        runs.append(Run(cluster, tmp_path, **config))
        return runs[-1]

    yield start
    if any(run.job.config["faults"] for run in runs):
        # Workers that failed end a moment later; the next test is to have those that take their places.
        time.sleep(EXIT_SECONDS + 0.5)
    end = time.monotonic() + 60
    while len(cluster.scheduler.workers) < 2:
        assert time.monotonic() < end, "a worker did not come back"
        time.sleep(0.05)


def test_every_shard_is_told_once(run, caplog):
    job = run(n=90, shard_size=4)()
    assert job.are_whole
    assert len(faulty.notes(job.job, "build")) == 2
    assert "90 heatmaps in 23 shards by 2 workers" in caplog.text


def test_shards_are_given_to_workers_several_at_once(run):
    """A message for each shard would cost more than quick shards do themselves."""
    job = run(n=2000, shard_size=2)
    job()
    assert job.are_whole
    assert job.scheduling.last_task < 200


def test_slow_shards_are_given_one_at_a_time(run):
    job = run(n=8, shard_size=1, seconds=0.3)
    start = time.monotonic()
    job()
    assert job.are_whole
    # By two workers at once: one after the other would take 2.4 s.
    assert len({note.split("-")[2] for note in faulty.notes(job.job, "run")}) == 2
    assert time.monotonic() - start < 20


def test_mistake_ends_the_run(run):
    job = run(n=400, faults={"9": "user"}, seconds=0.01)
    with pytest.raises(UserError, match="that cannot be done; do this"):
        job()
    assert len(job.done) < 100


def test_disk_full_ends_the_run(run):
    with pytest.raises(UserError, match=r"/some/file: No space left on device on .*; make room or choose another"):
        run(faults={"3": "full"})()


def test_error_in_the_callback_ends_the_run(cluster, run):
    job = run(n=400, seconds=0.01)

    def stop(result: Any) -> None:
        job.on_done(result)
        if len(job.done) == 3:
            raise ZeroDivisionError

    job.scheduling.on_done = stop
    start = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        job()
    assert len(job.done) == 3
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("kind", ["error", "kill", "exit", "unpicklable"])
def test_what_fails_once_is_done_again(run, caplog, kind):
    job = run(n=24, faults={"2": f"once {kind}"})()
    assert job.are_whole
    if kind in ("error", "unpicklable"):
        assert "failed at shard" in caplog.text
        assert " failed 1 time" in caplog.text
    else:
        assert "lost worker" in caplog.text
        assert "on 127.0.0.1 (tcp://" in caplog.text
        assert " was lost 1 time" in caplog.text
    # A new process takes the place of one that failed, since it may not be in order any more.
    assert len(faulty.notes(job.job, "build")) >= 2


def test_a_shard_that_always_fails_is_named_and_the_rest_goes_on(run):
    job = run(n=24, faults={"2": "error", "4": "vanish"})
    with pytest.raises(ShardsFailedError) as error:
        job()
    assert sorted(job.done) == [0, 1, 3, 5]
    text = str(error.value)
    assert "2 of 6 shards could not be computed" in text
    assert "shard 2 (samples 8 to 11): ValueError: it broke in two lines" in text
    assert "shard 4 (samples 16 to 19): the worker ended without it" in text
    assert "the same command again" in text
    # Tried by itself three times, on both workers.
    tried = [note.split("-")[2] for note in faulty.notes(job.job, "run-2")]
    assert 3 <= len(tried) <= 4
    assert len(set(tried)) >= 2


@pytest.mark.slow
def test_a_shard_that_kills_workers_is_named_and_the_rest_goes_on(run):
    job = run(n=24, faults={"2": "kill"})
    with pytest.raises(ShardsFailedError, match=r"1 of 6 shards .* shard 2 \(samples 8 to 11\): its worker .* died"):
        job()
    assert sorted(job.done) == [0, 1, 3, 4, 5]


@pytest.mark.slow
def test_samples_that_end_processes_are_found(run):
    """By a process for each halving and two before that; the rest goes on."""
    job = run(n=64, shard_size=16, faults={"sample 21": "kill"})
    with pytest.raises(ShardsFailedError, match=r"1 of 4 shards .* shard 1 .*: the process that explains sample 21 is"):
        job()
    assert sorted(job.done) == [0, 2, 3]
    assert job.scheduling.progress.losses.total() <= 1 + 2 + 5


@pytest.mark.slow
def test_where_workers_cannot_probe_a_deadly_shard_is_tried_as_often_as_any(run, monkeypatch):
    job = run(n=8, shard_size=4, faults={"sample 5": "kill"}, probes=False)
    with pytest.raises(ShardsFailedError, match=r"1 of 2 shards .* shard 1 \(samples 4 to 7\): its worker .* died"):
        job()
    assert job.scheduling.progress.losses.total() == 3


def test_nothing_is_waited_for_where_nothing_can_be_built(run):
    start = time.monotonic()
    with pytest.raises(ShardsFailedError, match=r"no worker could build the model .*: ValueError: it broke"):
        run(n=400, faults={"build": "error"})()
    assert time.monotonic() - start < 40


def test_a_mistake_in_building_ends_the_run(run):
    with pytest.raises(UserError, match="do this"):
        run(faults={"build": "user"})()


@pytest.mark.slow
def test_a_worker_that_fails_at_everything_gets_no_more(run, caplog, monkeypatch):
    """Else it would, being the quickest, take what the other could do."""
    monkeypatch.setattr(dask_scheduling, "IN_A_ROW", 2)
    job = run(n=60, shard_size=1, seconds=0.2, faults={"worker 0": "error"})()
    assert job.are_whole
    assert "worker 0 on 127.0.0.1 failed" in caplog.text
    assert "worker 1 on 127.0.0.1 failed" not in caplog.text
    # Twice by single shards, perhaps once before by several.
    assert caplog.text.count("worker 0 on 127.0.0.1 failed at") in (2, 3)


@pytest.mark.slow
def test_where_all_workers_fail_at_everything_not_all_is_tried(run, monkeypatch):
    monkeypatch.setattr(dask_scheduling, "IN_A_ROW", 2)
    job = run(n=40, shard_size=1, faults=dict.fromkeys(map(str, range(40)), "error"))
    with pytest.raises(ShardsFailedError, match=r"40 of 40 shards could not be computed: shard .* and 35 more"):
        job()
    assert len(faulty.notes(job.job, "run")) < 10


@pytest.mark.slow
def test_a_worker_that_ends_as_announced_is_no_failure(cluster, tmp_path, caplog):
    """As at the end of its lifetime; on a cluster of its own, since nothing takes its place."""
    cluster = start_cluster()
    job = Run(cluster, tmp_path, n=30, shard_size=1, seconds=0.2)
    retired = []

    def retire(result: Any) -> None:
        job.on_done(result)
        if len(job.done) == 3:
            address = next(iter(cluster.scheduler.workers))
            retired.append(address)
            job.scheduling._call(cluster.scheduler.retire_workers([address], close_workers=True, stimulus_id="test"))

    job.scheduling.on_done = retire
    job()
    assert job.are_whole
    assert retired
    assert "lost worker" not in caplog.text
    cluster.close(timeout=10)


def test_no_worker_for_too_long(cluster, run, monkeypatch):
    monkeypatch.setattr(Scheduling, "_watch", lambda self: _nothing())
    job = run()
    job.scheduling.crew.patience = 0.5
    with pytest.raises(ShardsFailedError, match="no worker was there for 0 s; see the log"):
        job()


async def _nothing() -> None:
    pass


def test_stop_that_was_asked_for_is_seen_though_nothing_happens(run, monkeypatch):
    from spray.pipelines.preemption import Preempted

    def stop() -> None:
        raise Preempted("SIGTERM")

    monkeypatch.setattr(dask_scheduling, "check", stop)
    with pytest.raises(Preempted):
        run()()


def test_plugin_of_the_scheduler_is_taken_away(cluster, run):
    run()()
    assert Watch.name not in cluster.scheduler.plugins


def test_hopeless_errors():
    assert is_hopeless(UserError("x"))
    assert is_hopeless(OSError(28, "No space left on device"))
    assert is_hopeless(PermissionError(13, "Permission denied"))
    assert not is_hopeless(OSError(5, "Input/output error"))
    assert not is_hopeless(RuntimeError("CUDA error"))
    assert one_line(ValueError("a\n b")) == "ValueError: a b"
    assert one_line(UserError("a\nb")) == "a b"
    assert one_line(KeyError()) == "KeyError"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_tells_rate_and_time_left(caplog):
    caplog.set_level(logging.INFO, LOG.name)
    clock = Clock()
    progress = Progress(LOG, 100, 1000, clock)
    progress.workers = 2
    clock.now = 9.9
    progress.tick()
    assert caplog.text == ""
    clock.now = 30.0
    progress.tick()
    assert "heatmaps: 0/1000 in 0/100 shards, 0.0/s, ? left, 2 workers" in caplog.text
    # Workers took 30 s to start; ten samples a second from then on.
    progress.done(Shard(0, 0, 10))
    for second in range(1, 11):
        clock.now = 30.0 + second
        progress.done(Shard(second, 10 * second, 10 * second + 10))
    progress.tick()
    assert "heatmaps: 110/1000 in 11/100 shards, 10.0/s, 00:01:29 left, 2 workers" in caplog.text


def test_progress_on_a_terminal_leaves_whole_lines(capsys, caplog):
    caplog.set_level(logging.INFO, LOG.name)
    clock = Clock()
    progress = Progress(LOG, 2, 20, clock)
    progress.line.is_terminal = True
    clock.now = 1.0
    progress.tick()
    shown = capsys.readouterr().err
    assert shown.startswith("\rheatmaps: 0/20")
    assert "\n" not in shown
    progress.say("a line")
    assert capsys.readouterr().err == "\r\x1b[K"
    progress.close()
    assert capsys.readouterr().err == ""
