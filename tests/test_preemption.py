"""SIGTERM and SIGUSR1, as a batch system sends them before it kills: exit code 75, and the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from fakes import first_output
from test_runner import RUN, is_running, record, wait_for

from spray.pipelines import preemption
from spray.pipelines.preemption import RESUME, Preempted, check, deferred, listening
from spray.pipelines.stages import NAMES

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in preemption.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    preemption._received.clear()
    preemption._postponed.clear()


def raise_signal(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)
    # The handler runs between two instructions of this thread.
    for _ in range(1000):
        pass


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_signal_raises_once(number):
    with pytest.raises(Preempted, match=signal.Signals(number).name), listening():
        raise_signal(number)


def test_preempted_is_no_error():
    assert not issubclass(Preempted, Exception)


def test_signals_while_cleaning_up_change_nothing():
    cleaned = []

    def work() -> None:
        try:
            raise_signal()
        finally:
            raise_signal()
            raise_signal(signal.SIGUSR1)
            cleaned.append(1)

    with pytest.raises(Preempted), listening():
        work()
    assert cleaned == [1]
    # Nor do they afterwards: the process is about to end.
    raise_signal()


def test_signals_while_a_context_manager_cleans_up_change_nothing():
    class Manager:
        is_closed = False

        def __enter__(self) -> None:
            pass

        def __exit__(self, *error: object) -> None:
            raise_signal()
            self.is_closed = True

    manager = Manager()
    with pytest.raises(Preempted), listening(), manager:
        raise_signal()
    assert manager.is_closed


def test_a_stop_that_was_swallowed_is_found_by_loops_and_by_the_next_signal():
    with listening():
        with suppress(Preempted):
            raise_signal()
        with pytest.raises(Preempted, match="SIGTERM"):
            check()
        with pytest.raises(Preempted, match="SIGTERM"):
            raise_signal(signal.SIGUSR1)
    # The next command of the process starts without it.
    with listening():
        check()


STOPS = [(signal.SIGTERM, Preempted), (signal.SIGUSR1, Preempted), (signal.SIGINT, KeyboardInterrupt)]


@pytest.mark.parametrize(("number", "stop"), STOPS)
def test_a_stop_waits_while_the_standard_library_takes_a_lock(number, stop):
    """Else the lock stays taken: a thread that writes then never ends, nor does the command that waits for it."""

    class Lock:
        """Is interrupted when it has been taken, before that is known to who took it."""

        def __init__(self) -> None:
            self.lock = threading.Lock()
            self.acquire, self.release = self.lock.acquire, self.lock.release
            self.__enter__ = partial(signal.raise_signal, number)

        def __exit__(self, *error: object) -> None:
            left.append(1)

    left: list[int] = []
    with pytest.raises(stop), listening(), threading.Condition(Lock()):
        time.sleep(2)
    assert left == [1]


@pytest.mark.parametrize(("number", "stop"), STOPS)
def test_a_stop_ends_what_waits_without_end(number, stop):
    threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
    start = time.monotonic()
    with pytest.raises(stop), listening():
        threading.Event().wait()
    assert time.monotonic() - start < 10


def test_handlers_are_put_back_where_nothing_came():
    before = signal.getsignal(signal.SIGTERM)
    with listening():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_other_threads_cannot_listen_but_run():
    ran = []

    def run() -> None:
        with listening():
            ran.append(1)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert ran == [1]


def test_a_forked_child_ends_as_it_always_does():
    """Else a data loader's worker that is ended would go on as if it were the command."""
    code = """
        import os, signal, sys, time
        sys.path.insert(0, ".")
        from spray.pipelines.preemption import listening
        with listening():
            child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(7)
            time.sleep(0.2)
            os.kill(child, signal.SIGTERM)
            print(os.waitpid(child, 0)[1])
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (result.stdout.strip(), result.stderr) == (str(int(signal.SIGTERM)), "")


def is_running_in_sweep(folder: Path, seed: int, name: str) -> bool:
    return any(is_running(path.parent, name) for path in folder.glob(f"*seed={seed}*/run.json"))


def stopped(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> tuple[str, str]:
    """Send a signal to a command; return what it wrote, having checked how it ended."""
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == RESUME == 75
    assert err.startswith(f"spray: stopped by {signal.Signals(number).name}; the same command with run_dir=/")
    assert err.endswith(" goes on from here\n")
    assert err.count("\n") == 1
    return out, err


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("train", signal.SIGTERM),
        ("attribute", signal.SIGUSR1),
        *(pytest.param(name, signal.SIGTERM, marks=pytest.mark.slow) for name in NAMES[1:]),
    ],
)
def test_any_stage_is_stopped_and_resumed(start, spray, tmp_path, name, number):
    process = start(RUN, SPRAY_FAKE_SLEEP=name)
    wait_for(lambda: is_running(tmp_path / "run", name))
    _, err = stopped(process, number)
    assert str(tmp_path / "run") in err
    said = record(tmp_path / "run")["stages"]
    place = NAMES.index(name)
    assert [said[other]["status"] for other in NAMES[:place]] == ["done"] * place
    assert [said[other]["status"] for other in NAMES[place + 1 :]] == ["pending"] * (len(NAMES) - place - 1)
    log = (tmp_path / "run/run.log").read_text()
    assert "stopped: Preempted(" in log
    assert "Traceback" not in log
    again = spray(RUN)
    assert (again.code, again.ran) == (0, list(NAMES[place:]))
    assert "half" not in (tmp_path / "run" / first_output(name)).read_text()


def test_signals_that_come_together(start, tmp_path):
    """As from a batch system that sends one to each process and one to the group."""
    process = start(RUN, SPRAY_FAKE_SLEEP="train")
    wait_for(lambda: is_running(tmp_path / "run", "train"))
    for _ in range(5):
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == RESUME
    assert err.count("\n") == 1


def test_a_stop_waits_for_what_takes_no_exception():
    reached = []

    def importing():
        with deferred():
            with deferred():
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGUSR1)
                reached.append("inner")
            reached.append("outer")
        reached.append("after")

    with pytest.raises(Preempted, match="SIGTERM"), listening():
        importing()
    assert reached == ["inner", "outer"]


def test_a_stop_while_it_starts(tmp_path):
    """Wherever it comes, in imports too, there is one line, unless Python itself was not ready yet."""
    codes = []
    for delay in (0.1, 0.3, 0.5, 0.7, 1.0, 1.5, 2.5):
        process = subprocess.Popen(
            [sys.executable, "-c", "from spray.pipelines.cli import main; main()", "model.epochs=1000", "run_dir=run"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        codes.append(process.returncode)
        lines = err.splitlines()
        assert len(lines) == (process.returncode == RESUME), err
        assert all(line.startswith("spray: stopped by SIGTERM; ") for line in lines)
    assert set(codes) <= {RESUME, -signal.SIGTERM}
    assert codes[-1] == RESUME


def test_the_other_jobs_of_a_sweep_are_not_started(start, spray, tmp_path):
    sweep = ["--multirun", "seed=0,1,2", "run_dir=sweep", "stages=[train,attribute]"]
    process = start(*sweep, SPRAY_FAKE_SLEEP="attribute")
    wait_for(lambda: is_running_in_sweep(tmp_path / "sweep", 0, "attribute"))
    out, err = stopped(process)
    assert f"run_dir={tmp_path / 'sweep'} goes" in err
    assert out.count("train: running") == 1
    assert len(list(tmp_path.rglob("run.json"))) == 1
    again = spray(*sweep)
    assert again.code == 0
    assert again.ran == ["attribute", "train", "attribute", "train", "attribute"]


def test_interrupt_of_a_sweep_is_130(start, tmp_path):
    process = start("--multirun", "seed=0,1", "run_dir=sweep", SPRAY_FAKE_SLEEP="train")
    wait_for(lambda: is_running_in_sweep(tmp_path / "sweep", 0, "train"))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.startswith("spray: interrupted; ")
    assert len(list((tmp_path / "sweep").glob("*seed=*"))) == 1


def test_the_lock_is_free_afterwards(start, spray, tmp_path):
    process = start(RUN, SPRAY_FAKE_SLEEP="train")
    wait_for(lambda: is_running(tmp_path / "run", "train"))
    stopped(process)
    assert spray(RUN, "stages=[train]").code == 0
