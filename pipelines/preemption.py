"""A stop that is asked for from outside, as batch systems do before they kill: SIGTERM or SIGUSR1."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

RESUME = 75
"""Exit code (EX_TEMPFAIL) of a command that was told to stop: the same command goes on from there."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

LOCKING = ("threading", "queue", "concurrent", "multiprocessing", "logging")
"""Packages whose code holds a lock for a moment, and keeps it for good if an exception comes right after it took it."""

PATIENCE, AGAIN = 1.0, 0.005
"""Seconds that a stop waits for the end of such code, which may itself be waiting for long, and between two looks."""

_received: list[str] = []
_deferred: list[bool] = []
_postponed: list[float] = []


class Preempted(BaseException):
    """The process was told to stop. Not an `Exception`, so that no handler of errors takes it for one."""


@contextmanager
def listening() -> Iterator[None]:
    """Raise `Preempted` in the main thread, once, when SIGTERM or SIGUSR1 arrives while the block runs.

    Neither that nor the `KeyboardInterrupt` of Ctrl-C comes while the standard library holds a lock that another
    thread, or the cleaning up, would then wait for without end. Signals that arrive while that one is on its way
    out change nothing, and none does after the block: the process is about to end. Outside of the main thread,
    where no handler can be set, the block runs as it is.
    """
    _received.clear()
    _postponed.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            # A forked child, such as a worker of a data loader: to it the signal means what it always means.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if _received and not _postponed and _is_on_its_way():
            return
        if not _received:
            _received.append(signal.Signals(number).name)
        if _deferred or _postpone(number, frame):
            return
        check()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not _postpone(number, frame):
            _postponed.clear()
            signal.default_int_handler(number, frame)

    before: dict[int, Any] = {number: signal.signal(number, handle) for number in SIGNALS}
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_default:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        if is_default:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, handler in before.items():
            # None: set by something that isn't Python, which cannot be put back.
            old = signal.SIG_DFL if handler is None else handler
            signal.signal(number, signal.SIG_IGN if _received else old)


@contextmanager
def deferred() -> Iterator[None]:
    """Let a stop wait for the end of the block: C++ that is being initialised, PyTorch's say, takes no exception."""
    _deferred.append(True)
    try:
        yield
    finally:
        _deferred.pop()
    if not _deferred:
        check()


def check() -> None:
    """Raise `Preempted` if a stop was asked for, for loops: a callback of C code may have swallowed the first."""
    if _received:
        _postponed.clear()
        raise Preempted(_received[0])


def _postpone(number: int, frame: FrameType | None) -> bool:
    """Send the signal again in a moment if the code it interrupted may hold a lock; return whether it will come.

    Not for ever: code that waits without end is ended all the same.
    """
    if frame is None or str(frame.f_globals.get("__name__")).partition(".")[0] not in LOCKING:
        return False
    now = time.monotonic()
    if not _postponed:
        _postponed.append(now + PATIENCE)
    if now > _postponed[0]:
        return False

    def send() -> None:
        time.sleep(AGAIN)
        if _postponed:
            os.kill(os.getpid(), number)

    try:
        # The lowest of all ways: what `threading` does to start a thread takes locks.
        _thread.start_new_thread(send, ())
    except RuntimeError:
        return False
    return True


def _is_on_its_way() -> bool:
    """Say whether the interrupted code is cleaning up because of `Preempted`."""
    error = sys.exc_info()[1]
    while error is not None:
        if isinstance(error, Preempted):
            return True
        error = error.__context__
    return False
