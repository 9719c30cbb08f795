"""Threads that read and decode: one pool for decoding in each process, and many threads for waiting on a disk."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

MAX_DECODERS = 32
# A network file system answers each request after a fraction of a millisecond, but many at once.
WAITERS = 32
CHUNK = 256
# Looking up a file in memory takes a few microseconds; where it takes longer, something is waited for.
SLOW_SECONDS = 50e-6


class _State:
    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew: neither threads nor who holds a lock survive a fork."""
        self.lock = threading.Lock()
        self.pool: ThreadPoolExecutor | None = None
        self.n_threads: int | None = None
        self.n_quiet = 0
        self.quiet: warnings.catch_warnings | None = None


_state = _State()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_state.reset)


def cpu_count() -> int:
    """Return how many CPUs this process may use: in a container or a batch job fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(n_threads: int | None) -> None:
    """Set how many threads decode images in this process; None: as many as there are CPUs, at least 2."""
    with _state.lock:
        _state.n_threads, _state.pool = n_threads, None


def in_threads(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Return the function's results, computed by the process's pool of decoding threads.

    Callers in several threads share the pool, so that no more images are decoded at once than there are threads
    in it. The function must not call `in_threads` itself.
    """
    if len(items) <= 1:
        return [function(item) for item in items]
    return list(_pool().map(function, items))


def wait_in_threads(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Return the function's results where it waits for a file system: in many threads if the waits are long."""
    results: list[R] = []
    position = 0
    while position < len(items):
        chunk = items[position : position + CHUNK]
        start = time.perf_counter()
        results += [function(item) for item in chunk]
        position += len(chunk)
        if time.perf_counter() - start > SLOW_SECONDS * len(chunk):
            break
    if position < len(items):
        size = max(1, min(CHUNK, (len(items) - position) // (4 * WAITERS)))
        chunks = [items[i : i + size] for i in range(position, len(items), size)]
        with ThreadPoolExecutor(max_workers=min(WAITERS, len(chunks))) as pool:
            for part in pool.map(lambda chunk: [function(item) for item in chunk], chunks):
                results += part
    return results


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Keep Pillow from warning of flaws that do no harm to the pixels; threads may overlap.

    `warnings.catch_warnings` restores what it found: overlapping in threads it would leave its filter for good.
    """
    with _state.lock:
        if _state.n_quiet == 0:
            _state.quiet = warnings.catch_warnings()
            _state.quiet.__enter__()
            warnings.filterwarnings("ignore", module="PIL")
        _state.n_quiet += 1
    try:
        yield
    finally:
        with _state.lock:
            _state.n_quiet -= 1
            if _state.n_quiet == 0 and _state.quiet is not None:
                _state.quiet.__exit__(None, None, None)
                _state.quiet = None


def _pool() -> ThreadPoolExecutor:
    with _state.lock:
        if _state.pool is None:
            n_threads = _state.n_threads or min(MAX_DECODERS, max(2, cpu_count()))
            _state.pool = ThreadPoolExecutor(max_workers=n_threads, thread_name_prefix="spray-decode")
        return _state.pool
