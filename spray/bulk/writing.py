"""Rows written to shards by a thread of its own, while the next ones are computed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from spray.bulk.explainer import Rows
from spray.store.shards import Shard


class Writer(Protocol):
    """What a shard is written with; `spray.store.shard_writing.ShardWriter` is one."""

    facts: dict[str, str]

    def append(self, arrays: dict[str, np.ndarray]) -> None:
        """Add rows."""

    def quarantine(self, index: int, reason: str) -> None:
        """Note that a sample could not be explained."""


@dataclass(frozen=True)
class Written:
    """A shard that is on disk: how many of its samples failed, and how many heatmaps are zero."""

    shard: Shard
    quarantined: int
    empty: int


class WritingThread:
    """Writes the rows of one shard after the other; what it has finished is to be had from `finished`.

    Parameters
    ----------
    open_shard : callable
        Returns the context manager that gives a shard's writer; the shard is on disk when it has closed.
    labels : ndarray of int, shape (N,)
        Class of every sample.
    depth : int
        Batches that wait to be written, at most; `put` waits for room.
    """

    def __init__(
        self,
        open_shard: Callable[[Shard], AbstractContextManager[Writer]],
        labels: np.ndarray,
        depth: int = 4,
    ) -> None:
        self._open, self._labels = open_shard, labels
        self._rows: queue.Queue[tuple[Shard, Rows] | None] = queue.Queue(max(1, depth))
        self._done: queue.SimpleQueue[Written] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="spray-writer", daemon=True)

    def __enter__(self) -> WritingThread:
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if kind is not None:
            self._stopped = True
        self._hand_over(None)
        self._thread.join()
        if kind is None:
            self._check()

    def put(self, shard: Shard, rows: Rows) -> None:
        """Hand over the next rows of a shard; an error of the thread is raised here."""
        self._hand_over((shard, rows))
        self._check()

    def finished(self) -> Iterator[Written]:
        """Yield the shards that have been finished since the last call."""
        while True:
            try:
                yield self._done.get_nowait()
            except queue.Empty:
                return

    def _hand_over(self, item: tuple[Shard, Rows] | None) -> None:
        while self._thread.is_alive():
            try:
                return self._rows.put(item, timeout=0.5)
            except queue.Full:  # look again whether the thread still lives
                continue

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            while (item := self._rows.get()) is not None:
                self._write(*item)
        except _StoppedError:
            pass
        except BaseException as error:
            self._error = error

    def _write(self, shard: Shard, rows: Rows) -> None:
        """Write a whole shard, of which these are the first rows."""
        quarantined = empty = 0
        with self._open(shard) as writer:
            at = shard.start
            while True:
                rows.wait()
                arrays = {name: values.numpy() for name, values in rows.arrays.items()}
                valid = np.array([int(index) not in rows.quarantined for index in rows.indices])
                writer.append({**arrays, "label": self._labels[rows.indices], "valid": valid})
                for index, reason in rows.quarantined.items():
                    writer.quarantine(index, reason)
                quarantined += len(rows.quarantined)
                flat = arrays["attribution"].reshape(len(rows.indices), -1)
                empty += int((~flat.any(axis=1) & valid).sum())
                at += len(rows.indices)
                if at == shard.stop:
                    break
                item = self._rows.get()
                if item is None or self._stopped:
                    raise _StoppedError
                assert item[0] == shard
                rows = item[1]
            writer.facts["empty"] = str(empty)
        self._done.put(Written(shard, quarantined, empty))


class _StoppedError(Exception):
    """No more rows will come: the shard in hand is dropped."""
