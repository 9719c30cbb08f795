"""Shards put together while the later ones are still being computed, so that little is left to do at the end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from spray.store.assemble import COMPARED, TOGETHER, Progress
from spray.store.shards import Shard, ShardFacts


class AssemblingAhead(AbstractContextManager["AssemblingAhead"]):
    """A thread that puts shards together as they become ready; the end of the block stops it.

    Parameters
    ----------
    assemble : callable
        `spray.store.assemble.assemble` with everything but `progress`, which it is given here.
    """

    def __init__(self, assemble: Callable[[Progress], list[ShardFacts]]) -> None:
        self._assemble = assemble
        self._changed = threading.Condition()
        self._ready: set[int] = set()
        self._passed: dict[str, list[Shard]] = {TOGETHER: [], COMPARED: []}
        self._stopped = self._ended = False
        self._facts: list[ShardFacts] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="spray-assemble", daemon=True)

    def __enter__(self) -> AssemblingAhead:
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def ready(self, number: int) -> None:
        """Say that a shard's file is there."""
        with self._changed:
            self._ready.add(number)
            self._changed.notify_all()

    def finish(self, shards: int, progress: Progress) -> list[ShardFacts]:
        """Wait until all is put together and compared, and return the facts of the shards.

        Parameters
        ----------
        shards : int
            How many there are, all of them ready.
        progress : callable
            As for `assemble`.

        Raises
        ------
        DamagedShardError, UserError
            Of `assemble`, whenever they came.
        """
        for what in (TOGETHER, COMPARED):
            for _ in progress(self._taken(what, shards), shards, what):
                pass
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._facts

    def _taken(self, what: str, total: int) -> Iterator[Shard]:
        """Yield the shards that a pass is through with, until it is through with all or the work has ended."""
        for at in range(total):
            with self._changed:
                while len(self._passed[what]) <= at and not self._ended:
                    self._changed.wait()
                if len(self._passed[what]) <= at:
                    return
            yield self._passed[what][at]

    def _work(self) -> None:
        try:
            self._facts = self._assemble(self._through)
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _through(self, shards: Iterable[Shard], total: int, what: str) -> Iterable[Shard]:
        """Yield the shards as they become ready; all are when they are gone through a second time."""
        for shard in shards:
            with self._changed:
                while shard.number not in self._ready and not self._stopped:
                    self._changed.wait()
            self._check()
            yield shard
            with self._changed:
                self._passed[what].append(shard)
                self._changed.notify_all()

    def _check(self) -> None:
        if self._stopped:
            raise _StoppedError


class _StoppedError(Exception):
    """The block has ended: what was put together is dropped, the shards stay."""
