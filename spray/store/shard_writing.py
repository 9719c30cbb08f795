"""Writes shards: files that appear whole, each byte hashed once on its way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from spray.storage import replacing
from spray.store.disk import Encoder, disk_errors
from spray.store.layout import Layout
from spray.store.shards import BLOCK, CHUNK, FORMAT, HEADER, LENGTH, Shard, layout_text

AT_ONCE = 1 << 20
"""Bytes that are hashed and written together: with each call the interpreter's lock goes to and fro, and the thread
that explains waits for it."""


class ShardWriter(AbstractContextManager["ShardWriter"]):
    """Takes a shard's rows in order; the file appears when the block ends. Made by `shard_writer`."""

    def __init__(self, path: Path, shard: Shard, key: str, layout: Layout, facts: Mapping[str, str]) -> None:
        self.path, self.shard, self.key, self.layout, self.facts = Path(path), shard, key, layout, dict(facts)
        self.rows = 0
        self.quarantined: dict[int, str] = {}
        self._numbers = {name: number for number, name in enumerate(layout.names)}
        self._chunk = {name: layout.rows_per_chunk(spec) for name, spec in layout.arrays.items()}
        self._written = dict.fromkeys(layout.names, 0)
        self._digest = hashlib.sha256()
        self._waiting = {name: np.empty((0, *spec.shape), spec.stored) for name, spec in layout.arrays.items()}

    def __enter__(self) -> ShardWriter:
        with disk_errors(self.path), ExitStack() as stack:
            temporary = stack.enter_context(replacing(self.path))
            self._encoder = Encoder(self.layout)
            stack.callback(self._encoder.close)
            # Without a buffer, so that closing it after an error has nothing left to write.
            self._file = stack.enter_context(temporary.open("xb", buffering=0))
            _write(self._file, bytes(BLOCK))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with disk_errors(self.path), self._stack:
            self._finish()

    def append(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Write the next rows; only what doesn't fill a chunk yet is kept in memory.

        Parameters
        ----------
        arrays : mapping of str to ndarray
            Every array of the layout, (m, *shape of a row), in its dtype.

        Raises
        ------
        ValueError
            If an array is missing, unknown or of another shape, dtype or length, or the shard gets too many
            rows. Let it pass on out of the block, and no file is written.
        UserError
            If the disk is full.
        """
        self._check(arrays)
        self.rows += len(next(iter(arrays.values())))
        with disk_errors(self.path):
            self._write({name: self._with_waiting(name, arrays[name]) for name in self.layout.names})

    def quarantine(self, index: int, reason: str) -> None:
        """Note that sample `index` (in the dataset) could not be explained; its row is still to be appended."""
        if not self.shard.start <= index < self.shard.stop:
            raise ValueError(f"sample {index} is not in {self.shard}")
        self.quarantined[int(index)] = str(reason)

    def _with_waiting(self, name: str, array: np.ndarray) -> np.ndarray:
        """Return rows behind those that wait; without such, which is so where each row fills a chunk, not copied."""
        return np.concatenate([self._waiting[name], array]) if len(self._waiting[name]) else array

    def _check(self, arrays: Mapping[str, np.ndarray]) -> None:
        if set(arrays) != set(self.layout.arrays):
            raise ValueError(f"the rows have {sorted(arrays)}, but the layout has {list(self.layout.names)}")
        lengths = {len(array) if array.ndim else -1 for array in arrays.values()}
        if len(lengths) != 1:
            raise ValueError(f"the arrays differ in their number of rows: {sorted(lengths)}")
        for name, spec in self.layout.arrays.items():
            array = arrays[name]
            if array.shape[1:] != spec.shape or array.dtype != np.dtype(spec.dtype):
                raise ValueError(
                    f"rows of {name!r} must be {spec.shape} {spec.dtype}, not {array.shape[1:]} {array.dtype}"
                )
        if self.rows + lengths.pop() > self.shard.size:
            raise ValueError(f"{self.shard} has {self.shard.size} rows, but got more")

    def _write(self, rows: Mapping[str, np.ndarray]) -> None:
        """Write whole chunks, in an order that doesn't depend on how the rows were dealt out."""
        ready = []
        for name, array in rows.items():
            at, chunk = self._written[name], self._chunk[name]
            last = self.rows if self.rows == self.shard.size else self.rows // chunk * chunk
            for cut in range(at, last, chunk):
                stop = min(cut + chunk, last)
                ready.append((stop, name, array[cut - at : stop - at]))
            self._written[name] = last
            # A copy, so that a few rows don't keep the whole batch in memory.
            self._waiting[name] = array[last - at :].copy()
        together: list[bytes] = []
        size = 0
        for _, name, part in sorted(ready, key=lambda each: each[:2]):
            mask, raw = self._encoder.encode(name, part)
            together += CHUNK.pack(self._numbers[name], mask, len(raw)), raw
            size += len(raw)
            if size >= AT_ONCE:
                self._put(b"".join(together))
                together, size = [], 0
        self._put(b"".join(together))

    def _put(self, raw: bytes) -> None:
        _write(self._file, raw)
        self._digest.update(raw)

    def _finish(self) -> None:
        """Write what else there is to know, then the block at the start, whose SHA-256 covers everything."""
        if self.rows != self.shard.size:
            raise ValueError(f"{self.shard} has {self.shard.size} rows, but got {self.rows}")
        text = json.dumps(
            {
                "layout": layout_text(self.layout),
                "facts": self.facts,
                "quarantined": {str(index): self.quarantined[index] for index in sorted(self.quarantined)},
                "data": self._digest.hexdigest(),
            }
        ).encode()
        self._put(text)
        self._put(LENGTH.pack(len(text)))
        header = _block(self.shard, self.key)
        self._digest.update(header)
        self._file.seek(0)
        _write(self._file, header + self._digest.hexdigest().encode())


def shard_writer(
    path: Path, shard: Shard, key: str, layout: Layout, facts: Mapping[str, str] | None = None
) -> ShardWriter:
    """Return a context manager that takes a shard's rows; its file appears at the end, if all rows were given.

    Parameters
    ----------
    path : Path
        Of the file, which is replaced if it is there.
    shard : Shard
        Which samples.
    key : str
        Of the computation: ASCII, at most 128 characters. Readers refuse a shard with another key.
    layout : Layout
        Of the whole dataset.
    facts : mapping of str to str, optional
        Kept in the file.

    Raises
    ------
    ValueError
        If the shard doesn't lie in the dataset; at the end, if it didn't get exactly its rows. No file is left.
    UserError
        If the file can't be written: no space, no permission.
    """
    if not key.isascii() or not key.isprintable() or len(key) > 128:
        raise ValueError(f"the key of a shard must be at most 128 printable ASCII characters, not {key!r}")
    if not 0 <= shard.start < shard.stop <= layout.n:
        raise ValueError(f"{shard} does not lie in a dataset of {layout.n} samples")
    return ShardWriter(path, shard, key, layout, facts or {})


def _write(file: FileIO, raw: bytes) -> None:
    """Write all bytes, where the system may take fewer at a time."""
    rest = memoryview(raw)
    while rest:
        rest = rest[file.write(rest) :]


def _block(shard: Shard, key: str) -> bytes:
    header = json.dumps({"format": FORMAT, "start": shard.start, "stop": shard.stop, "key": key})
    return header.encode().ljust(HEADER)
