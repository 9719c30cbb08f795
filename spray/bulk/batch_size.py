"""How many samples a model explains at once: grown until memory or throughput stops it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

GAIN = 1.05
"""A batch twice as large has to be faster by this factor, per sample, to be worth its memory."""

SHARE = 0.5
"""Share of the free memory that a batch may take, going by the one half its size."""

CGROUP = Path("/sys/fs/cgroup")


def find_batch_size(
    run: Callable[[int], None],
    most: int,
    *,
    device: torch.device,
    free: Callable[[], float] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Return the batch size, a power of two up to `most`, beyond which nothing is gained or memory ends.

    Parameters
    ----------
    run : callable
        Explains so many samples; raises an out-of-memory error if they are too many.
    most : int
        The largest size that is tried.
    device : torch.device
        Where it runs.
    free : callable, optional
        Returns the bytes of memory that are free; by default those of the machine, or of the device.
    clock : callable
        Returns seconds.
    """
    free = free or (lambda: free_memory(device))
    best, rate, size = 1, 0.0, 1
    run(1)  # the first run of all sets things up
    while size <= most:
        before = free()
        try:
            start = clock()
            run(size)
            seconds = clock() - start
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            forget(device)
            break
        if size / seconds < rate * GAIN:
            break
        best, rate = size, size / seconds
        taken = before - free()
        if 2 * taken > SHARE * free():
            break
        size *= 2
    return best


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on the device or on the machine."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "CUBLAS_STATUS_ALLOC_FAILED" in text or "CUDNN_STATUS_ALLOC_FAILED" in text
    )


def forget(device: torch.device) -> None:
    """Give back the memory that torch holds in reserve."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_memory(device: torch.device) -> float:
    """Return the bytes that can still be allocated on a device.

    On a GPU those that the largest batch so far took count as taken, so that the difference tells its need.
    """
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
        return total - torch.cuda.max_memory_reserved(device)
    import psutil

    available = float(psutil.virtual_memory().available)
    limit, used = _read(CGROUP / "memory.max"), _read(CGROUP / "memory.current")
    return available if limit is None or used is None else min(available, limit - used)


def _read(path: Path) -> float | None:
    try:
        return float(path.read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return None
