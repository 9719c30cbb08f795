"""Batches of a dataset read ahead of their use, by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from spray.data.base import ImageDataset

T = TypeVar("T")


@dataclass
class Read(Generic[T]):
    """A batch that was read, or the error that came instead."""

    tag: T
    indices: np.ndarray
    pixels: Tensor | None
    error: Exception | None


def read_ahead(
    dataset: ImageDataset,
    parts: Iterable[tuple[T, np.ndarray]],
    *,
    depth: int = 4,
    threads: int = 2,
    pin: bool = False,
) -> Iterator[Read[T]]:
    """Yield batches in order, while those that come next are being read.

    Threads, not processes: decoding releases the interpreter's lock, and daemonic worker processes, such as Dask's,
    may have no children.

    Parameters
    ----------
    dataset : ImageDataset
        Is read by several threads at once.
    parts : iterable of (tag, ndarray)
        What a batch is for, and the indices of its samples.
    depth : int
        Batches in memory at once, at most, besides the one in use.
    threads : int
        Batches being read at once.
    pin : bool
        Read into memory from which a GPU copies without the CPU's help.
    """

    def read(indices: np.ndarray) -> Tensor:
        pixels = dataset.batch(indices)
        return pixels.pin_memory() if pin else pixels

    waiting: deque[tuple[T, np.ndarray, Future[Tensor]]] = deque()
    rest = iter(parts)
    pool = ThreadPoolExecutor(max_workers=max(1, threads), initializer=compute_with)
    try:
        while True:
            while len(waiting) < max(1, depth):
                following = next(rest, None)
                if following is None:
                    break
                waiting.append((*following, pool.submit(read, following[1])))
            if not waiting:
                return
            tag, indices, future = waiting.popleft()
            error = future.exception()
            if error is not None and not isinstance(error, Exception):
                raise error
            yield Read(tag, indices, None if error else future.result(), error)
    finally:
        # Not waited for: a file system that hangs must not keep a run from ending.
        pool.shutdown(wait=False, cancel_futures=True)


def compute_with(threads: int = 1) -> None:
    """Have torch use so many threads for what it is asked in this one; by default none besides.

    Turning pixels into numbers would start helpers for each reading thread, which wait for more by spinning: on two
    cores that took a fifth of the time away from the explanations.
    """
    # Torch sets the number for a thread when it first needs it; only after that it can be changed for it alone.
    torch.get_num_threads()
    ThreadpoolController().select(user_api="openmp").limit(limits=threads)
