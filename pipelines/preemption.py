"""A stop that is asked for from outside, as batch systems do before they kill: SIGTERM or SIGUSR1."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

RESUME = 75
"""Exit code (EX_TEMPFAIL) of a command that was told to stop: the same command goes on from there."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_received: list[str] = []
_deferred: list[bool] = []


class Preempted(BaseException):
    """The process was told to stop. Not an `Exception`, so that no handler of errors takes it for one."""


@contextmanager
def listening() -> Iterator[None]:
    """Raise `Preempted` in the main thread, once, when SIGTERM or SIGUSR1 arrives while the block runs.

    Signals that arrive while that one is on its way out change nothing, and none does after the block: the
    process is about to end. Outside of the main thread, where no handler can be set, the block runs as it is.
    """
    _received.clear()
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
        if _received and (_deferred or _is_on_its_way()):
            return
        _received.append(signal.Signals(number).name)
        if _deferred:
            return
        raise Preempted(_received[0])

    before: dict[int, Any] = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
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
        raise Preempted(_received[0])


def _is_on_its_way() -> bool:
    """Say whether the interrupted code is cleaning up because of `Preempted`."""
    error = sys.exc_info()[1]
    while error is not None:
        if isinstance(error, Preempted):
            return True
        error = error.__context__
    return False
