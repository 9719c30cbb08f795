"""Shards: the parts that a file of attributions is computed in. Each is a file that is whole or not there.

A shard is an HDF5 file behind a block of 512 bytes that holds its range, its key and a SHA-256 of all its
bytes. That is compared before HDF5, which doesn't check what it follows in a file, gets to see any of them.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from spray.storage import replacing
from spray.store.disk import Encoder, closing, disk_errors, memory_file, new_file
from spray.store.layout import Layout, describe

FORMAT = "spray shard 1"
_BLOCK, _HEADER = 512, 448
"""Bytes of the block before the HDF5 file and of the text in it; a SHA-256 in hexadecimal is the rest."""


class DamagedShardError(Exception):
    """A shard's file isn't what was written, or isn't the shard that is wanted: it has to be computed again."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = Path(path), reason

    def __str__(self) -> str:
        return f"{self.path} {self.reason}"


@dataclass(frozen=True)
class Shard:
    """Samples `start` to `stop` - 1 of a dataset."""

    number: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of samples."""
        return self.stop - self.start

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"{self.number:06d}.h5"


@dataclass(frozen=True)
class ShardHeader:
    """What a shard's file says that it is; nothing of it is verified."""

    start: int
    stop: int
    key: str


@dataclass(frozen=True)
class ShardFacts:
    """What a verified shard holds beside its arrays.

    Attributes
    ----------
    quarantined : dict of int to str
        Samples that could not be explained, by their index in the dataset, and why.
    facts : dict of str to str
        As given to the writer.
    data_sha256 : str
        Of its chunks as they are stored.
    """

    quarantined: dict[int, str]
    facts: dict[str, str]
    data_sha256: str


def plan_shards(n: int, shard_size: int) -> list[Shard]:
    """Cut `n` samples into shards of `shard_size`; only the last one may have fewer.

    Raises
    ------
    ValueError
        If one of the two is below 1.
    """
    if n < 1 or shard_size < 1:
        raise ValueError(f"{n} samples in shards of {shard_size}: both must be at least 1")
    return [Shard(i, at, min(at + shard_size, n)) for i, at in enumerate(range(0, n, shard_size))]


class ShardWriter(AbstractContextManager["ShardWriter"]):
    """Takes a shard's rows in order; the file appears when the block ends. Made by `shard_writer`."""

    def __init__(self, path: Path, shard: Shard, key: str, layout: Layout, facts: Mapping[str, str]) -> None:
        self.path, self.shard, self.key, self.layout, self.facts = Path(path), shard, key, layout, dict(facts)
        self.rows = 0
        self.quarantined: dict[int, str] = {}
        self._chunk = {name: layout.rows_per_chunk(spec) for name, spec in layout.arrays.items()}
        self._written = dict.fromkeys(layout.names, 0)
        self._digests = {name: hashlib.sha256() for name in layout.names}
        self._waiting = {name: np.empty((0, *spec.shape), spec.stored) for name, spec in layout.arrays.items()}

    def __enter__(self) -> ShardWriter:
        with disk_errors(self.path), ExitStack() as stack:
            self._temporary = stack.enter_context(replacing(self.path))
            self._encoder = Encoder(self.layout)
            stack.callback(self._encoder.close)
            self._file = new_file(self._temporary, _BLOCK)
            stack.enter_context(closing(self._file))
            self._datasets = self.layout.create(self._file, self.shard.size)
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
        for stop, name, part in sorted(ready, key=lambda each: each[:2]):
            mask, raw = self._encoder.encode(name, part)
            write_chunk(self._datasets[name], stop - len(part), mask, raw)
            update(self._digests[name], mask, raw)

    def _finish(self) -> None:
        """Describe the data, then the file: what closes it can't be written by HDF5, since it covers HDF5's bytes."""
        if self.rows != self.shard.size:
            raise ValueError(f"{self.shard} has {self.shard.size} rows, but got {self.rows}")
        data = join(self._digests[name] for name in self.layout.names)
        head = _head(self.shard, self.key, self.facts, self.quarantined, data)
        for name, value in head.items():
            self._file.attrs[name] = value
        self._file.attrs["sha256"] = _digest(head)
        self._file.close()
        header = _block(self.shard, self.key)
        with self._temporary.open("r+b") as raw:
            raw.write(header + _rest_sha256(raw, header))


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


def read_shard(path: Path, shard: Shard, key: str, layout: Layout) -> ShardFacts:
    """Verify every byte of a shard's file and that it is the one that is wanted.

    Raises
    ------
    DamagedShardError
        If the file is missing, can't be read, was changed since it was written, or belongs to another shard,
        key or layout.
    """
    with open_shard(path, shard, key, layout) as (datasets, facts):
        try:
            found = rows_sha256(datasets)
        except (OSError, RuntimeError) as error:
            raise DamagedShardError(path, f"can't be read: {error}") from None
        if found != facts.data_sha256:
            raise DamagedShardError(path, "contradicts itself")
        return facts


def shard_header(path: Path) -> ShardHeader:
    """Return what a shard's file says of itself, from its first bytes; the rest may be damaged.

    Raises
    ------
    DamagedShardError
        If it isn't the file of a shard.
    """
    path = Path(path)
    try:
        with path.open("rb") as raw:
            return _parse(path, raw.read(_BLOCK))
    except OSError as error:
        raise DamagedShardError(path, f"can't be read: {error.strerror or error}") from None


@contextmanager
def open_shard(
    path: Path, shard: Shard, key: str, layout: Layout
) -> Iterator[tuple[dict[str, h5py.Dataset], ShardFacts]]:
    """Yield a shard's arrays and facts, verified but for `data_sha256`, for whoever hashes the chunks anyway."""
    path = Path(path)
    try:
        if not path.is_file():
            raise DamagedShardError(path, "is missing")
        with path.open("rb") as raw:
            block = raw.read(_BLOCK)
            header = _parse(path, block)
            if (header.start, header.stop) != (shard.start, shard.stop):
                found, wanted = f"{header.start} to {header.stop - 1}", f"{shard.start} to {shard.stop - 1}"
                raise DamagedShardError(path, f"holds samples {found}, not {wanted}")
            if header.key != key:
                raise DamagedShardError(path, "was computed with other settings")
            if _rest_sha256(raw, block[:_HEADER]) != block[_HEADER:]:
                raise DamagedShardError(path, "was changed or cut off since it was written: its SHA-256 differs")
        file = h5py.File(path, "r")
    except OSError as error:
        raise DamagedShardError(path, f"can't be read: {error.strerror or error}") from None
    with file:
        yield _open_arrays(path, file, shard, key, layout)


def _open_arrays(
    path: Path, file: h5py.File, shard: Shard, key: str, layout: Layout
) -> tuple[dict[str, h5py.Dataset], ShardFacts]:
    """Check what the bytes mean. They are those that were written, but maybe not by this version of the writer."""
    try:
        with memory_file() as template:
            wanted = {name: describe(dataset) for name, dataset in layout.create(template, shard.size).items()}
            same_names = _names(file) == _names(template)
        # Names that are there by a hard link lead to what is in this file; none else is looked at.
        datasets = {name: file[name] for name in layout.names} if same_names else {}
        if {name: describe(dataset) for name, dataset in datasets.items()} != wanted:
            raise DamagedShardError(path, "holds other arrays: they were computed with other settings")
        head = {name: file.attrs[name] for name in ("format", "start", "stop", "key", "facts", "quarantined", "data")}
        same = (head["start"], head["stop"], head["key"]) == (shard.start, shard.stop, key)
        if not same or file.attrs["sha256"] != _digest(head):
            raise DamagedShardError(path, "contradicts itself")
        quarantined = {int(index): reason for index, reason in json.loads(head["quarantined"]).items()}
        return datasets, ShardFacts(quarantined, json.loads(head["facts"]), head["data"])
    except (KeyError, OSError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise DamagedShardError(path, f"can't be read: {error}") from None


def _names(file: h5py.File) -> set[str]:
    """Return the names of all objects that are reached by hard links."""
    names: set[str] = set()
    file.visit(names.add)
    return names


def rows_sha256(datasets: Mapping[str, h5py.Dataset], start: int = 0, stop: int | None = None) -> str:
    """Return the SHA-256 of some rows as they are stored, in all arrays; a chunk must begin at `start`."""
    digests = {name: hashlib.sha256() for name in sorted(datasets)}
    for name, digest in digests.items():
        for chunk in chunks(datasets[name], start, stop):
            update(digest, *chunk)
    return join(digests.values())


def join(digests: Iterable[Any]) -> str:
    """Return one SHA-256 of those of the arrays, in order of their names."""
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


def chunks(dataset: h5py.Dataset, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Iterate over the stored chunks of rows `start` to `stop`: which filters were skipped, and the bytes."""
    rest = (0,) * (dataset.ndim - 1)
    for row in range(start, len(dataset) if stop is None else stop, dataset.chunks[0]):
        mask, raw = dataset.id.read_direct_chunk((row, *rest))
        yield mask, raw


def write_chunk(dataset: h5py.Dataset, row: int, mask: int, raw: bytes) -> None:
    """Write a stored chunk, whose first row is `row`."""
    dataset.id.write_direct_chunk((row, *(0,) * (dataset.ndim - 1)), raw, mask)


def update(digest: Any, mask: int, raw: bytes) -> None:
    """Add a stored chunk to a hash; its length comes first, so that borders count too."""
    digest.update(struct.pack("<IQ", mask, len(raw)))
    digest.update(raw)


def _head(
    shard: Shard, key: str, facts: Mapping[str, str], quarantined: Mapping[int, str], data: str
) -> dict[str, Any]:
    reasons = {str(index): quarantined[index] for index in sorted(quarantined)}
    return {
        "format": FORMAT,
        "start": shard.start,
        "stop": shard.stop,
        "key": key,
        "facts": json.dumps(facts, sort_keys=True),
        "quarantined": json.dumps(reasons),
        "data": data,
    }


def _digest(head: Mapping[str, Any]) -> str:
    plain = {name: value if isinstance(value, str) else int(value) for name, value in head.items()}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _block(shard: Shard, key: str) -> bytes:
    header = json.dumps({"format": FORMAT, "start": shard.start, "stop": shard.stop, "key": key})
    return header.encode().ljust(_HEADER)


def _parse(path: Path, block: bytes) -> ShardHeader:
    with suppress(ValueError, KeyError, TypeError):
        header = json.loads(block[:_HEADER].decode())
        if header["format"] == FORMAT and len(block) == _BLOCK:
            return ShardHeader(int(header["start"]), int(header["stop"]), str(header["key"]))
    raise DamagedShardError(path, "is not a shard of this version")


def _rest_sha256(raw: Any, header: bytes) -> bytes:
    """Return the SHA-256, in hexadecimal, of the header and of all bytes after the block."""
    digest = hashlib.sha256(header)
    raw.seek(_BLOCK)
    while part := raw.read(1 << 20):
        digest.update(part)
    raw.seek(0)
    return digest.hexdigest().encode()
