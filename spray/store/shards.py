"""Shards: the parts that a file of attributions is computed in. Each is a file that is whole or not there.

A block of 512 bytes tells its range, its key and a SHA-256 of all its bytes. The chunks of the final file follow, as
HDF5 stores them, each behind its place, and at the end what else there is to know. Nothing of it is relied on before
the SHA-256 was compared: with the bytes of the shard's file, or with what became of them in the final file.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import h5py

from spray.store.layout import Layout

FORMAT = "spray shard 2"
READ_AHEAD = 1 << 20
"""Bytes that are read from a shard at once."""

BLOCK, HEADER = 512, 448
"""Bytes of the block at the start and of the text in it; a SHA-256 in hexadecimal is the rest."""

CHUNK = struct.Struct("<HIQ")
"""What comes before a chunk: the array's number among the sorted names, which filters were skipped, its bytes."""

LENGTH = struct.Struct("<Q")
"""The last bytes of a file: the length of the text before them."""


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


@dataclass(frozen=True)
class ShardClaim:
    """What a shard's file says that it holds, to be compared with what its chunks have become.

    Attributes
    ----------
    facts : ShardFacts
        Not to be relied on before `holds`.
    rest : bytes
        What the file's SHA-256 covers beside the chunks.
    sha256 : str
        Of the whole file.
    """

    facts: ShardFacts
    rest: bytes
    sha256: str

    def holds(self, digest: Any) -> bool:
        """Return whether everything that is claimed goes with chunks of this hash, as `rows_digest` makes it."""
        whole = digest.copy()
        whole.update(self.rest)
        return bool(digest.hexdigest() == self.facts.data_sha256 and whole.hexdigest() == self.sha256)


@dataclass(frozen=True)
class StoredChunk:
    """A chunk of the final file: its array and first row in the dataset, which filters were skipped, its bytes."""

    name: str
    row: int
    mask: int
    raw: bytes


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


def read_shard(path: Path, shard: Shard, key: str, layout: Layout) -> ShardFacts:
    """Verify every byte of a shard's file and that it is the one that is wanted.

    Raises
    ------
    DamagedShardError
        If the file is missing, can't be read, was changed since it was written, or belongs to another shard,
        key or layout.
    """
    path = Path(path)
    if not path.is_file():
        raise DamagedShardError(path, "is missing")
    with _reading(path), path.open("rb") as raw:
        block = _own_block(path, raw, shard, key)
        digest = hashlib.sha256()
        while part := raw.read(1 << 20):
            digest.update(part)
        digest.update(block[:HEADER])
        if digest.hexdigest().encode() != block[HEADER:]:
            raise DamagedShardError(path, "was changed or cut off since it was written: its SHA-256 differs")
        # These are the bytes that were written, but maybe not by this version of the writer.
        return _facts(path, _end(raw)[1], layout)


def read_claim(path: Path, shard: Shard, key: str, layout: Layout) -> ShardClaim:
    """Read what a shard's file says that it holds, without verifying it.

    Raises
    ------
    DamagedShardError
        If the file is missing, can't be read, contradicts itself, or belongs to another shard, key or layout.
    """
    path = Path(path)
    if not path.is_file():
        raise DamagedShardError(path, "is missing")
    with _reading(path), path.open("rb") as raw:
        block = _own_block(path, raw, shard, key)
        end, text = _end(raw)
        raw.seek(end)
        rest = raw.read() + block[:HEADER]
        facts = _facts(path, text, layout)
        if len(bytes.fromhex(facts.data_sha256)) != hashlib.sha256().digest_size:
            raise ValueError("no SHA-256 of its chunks")
        return ShardClaim(facts, rest, block[HEADER:].decode())


def shard_chunks(path: Path, shard: Shard, layout: Layout) -> Iterator[StoredChunk]:
    """Read the chunks of a shard's file one by one; they are not verified.

    Raises
    ------
    DamagedShardError
        If the file can't be read or doesn't hold these chunks.
    """
    rows = {name: layout.rows_per_chunk(spec) for name, spec in layout.arrays.items()}
    with _reading(path), path.open("rb", buffering=READ_AHEAD) as raw:
        end, _ = _end(raw)
        raw.seek(BLOCK)
        for name, row in _places(rows, shard.start, shard.stop):
            number, mask, length = CHUNK.unpack(raw.read(CHUNK.size))
            if layout.names[number] != name or raw.tell() + length > end:
                raise ValueError(f"no chunk of {name!r} for row {row}")
            yield StoredChunk(name, row, mask, raw.read(length))
        if raw.tell() != end:
            raise ValueError("more chunks than there should be")


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
            return _parse(path, raw.read(BLOCK))
    except OSError as error:
        raise DamagedShardError(path, f"can't be read: {error.strerror or error}") from None


def stored_chunks(datasets: Mapping[str, h5py.Dataset], start: int, stop: int) -> Iterator[StoredChunk]:
    """Read the chunks of rows `start` to `stop` - 1 from HDF5, as they are stored and in the order of a shard.

    A chunk must begin at `start`, and all arrays of the layout be given.
    """
    rows = {name: dataset.chunks[0] for name, dataset in datasets.items()}
    for name, row in _places(rows, start, stop):
        dataset = datasets[name]
        mask, raw = dataset.id.read_direct_chunk((row, *(0,) * (dataset.ndim - 1)))
        yield StoredChunk(name, row, mask, raw)


def rows_sha256(datasets: Mapping[str, h5py.Dataset], start: int, stop: int) -> str:
    """Return the SHA-256 of the chunks of rows `start` to `stop` - 1, which is `data_sha256` of a shard of these."""
    return str(rows_digest(datasets, start, stop).hexdigest())


def rows_digest(datasets: Mapping[str, h5py.Dataset], start: int, stop: int) -> Any:
    """Return the SHA-256 of the chunks of rows `start` to `stop` - 1 as an object that takes more.

    Chunks are hashed by a thread of its own, while the next ones are read.
    """
    numbers, digest = {name: number for number, name in enumerate(sorted(datasets))}, hashlib.sha256()
    with ThreadPoolExecutor(1, thread_name_prefix="spray-hash") as pool:
        hashing: Future[None] | None = None
        together: list[bytes] = []
        size = 0
        for chunk in stored_chunks(datasets, start, stop):
            together += CHUNK.pack(numbers[chunk.name], chunk.mask, len(chunk.raw)), chunk.raw
            size += len(chunk.raw)
            if size >= READ_AHEAD:
                # One at a time: in memory are what is hashed and what comes next.
                if hashing is not None:
                    hashing.result()
                hashing, together, size = pool.submit(digest.update, b"".join(together)), [], 0
        if hashing is not None:
            hashing.result()
    digest.update(b"".join(together))
    return digest


def write_chunk(dataset: h5py.Dataset, row: int, mask: int, raw: bytes) -> None:
    """Write a stored chunk, whose first row is `row`."""
    dataset.id.write_direct_chunk((row, *(0,) * (dataset.ndim - 1)), raw, mask)


def _places(rows_per_chunk: Mapping[str, int], start: int, stop: int) -> list[tuple[str, int]]:
    """Return array and first row of the chunks in the order in which a writer can have them ready."""
    ends = (
        (min(row + rows, stop), name, row) for name, rows in rows_per_chunk.items() for row in range(start, stop, rows)
    )
    return [(name, row) for _, name, row in sorted(ends)]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what can go wrong with a shard's file into one kind of error."""
    try:
        yield
    except OSError as error:
        raise DamagedShardError(path, f"can't be read: {error.strerror or error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, struct.error) as error:
        raise DamagedShardError(path, f"contradicts itself: {error}") from None


def _end(raw: BinaryIO) -> tuple[int, dict[str, Any]]:
    """Return where the chunks end, and the text behind them."""
    end = raw.seek(-LENGTH.size, os.SEEK_END)
    (length,) = LENGTH.unpack(raw.read(LENGTH.size))
    if length > end - BLOCK:
        raise ValueError("its text is longer than the file")
    raw.seek(end - length)
    return end - length, json.loads(raw.read(length))


def layout_text(layout: Layout) -> dict[str, Any]:
    """Return all that decides what a shard's bytes mean, as JSON gives it back."""
    arrays = {
        name: [list(spec.shape), spec.stored.str, layout.rows_per_chunk(spec)]
        for name, spec in sorted(layout.arrays.items())
    }
    return {"arrays": arrays, "compression": layout.compression}


def _own_block(path: Path, raw: BinaryIO, shard: Shard, key: str) -> bytes:
    """Return the block at the start, which says that this is the shard that is wanted."""
    block = raw.read(BLOCK)
    header = _parse(path, block)
    if (header.start, header.stop) != (shard.start, shard.stop):
        found, wanted = f"{header.start} to {header.stop - 1}", f"{shard.start} to {shard.stop - 1}"
        raise DamagedShardError(path, f"holds samples {found}, not {wanted}")
    if header.key != key:
        raise DamagedShardError(path, "was computed with other settings")
    return block


def _facts(path: Path, text: Mapping[str, Any], layout: Layout) -> ShardFacts:
    if text["layout"] != layout_text(layout):
        raise DamagedShardError(path, "holds other arrays: they were computed with other settings")
    quarantined = {int(index): reason for index, reason in text["quarantined"].items()}
    return ShardFacts(quarantined, text["facts"], text["data"])


def _parse(path: Path, block: bytes) -> ShardHeader:
    with suppress(ValueError, KeyError, TypeError):
        header = json.loads(block[:HEADER].decode())
        if header["format"] == FORMAT and len(block) == BLOCK:
            return ShardHeader(int(header["start"]), int(header["stop"]), str(header["key"]))
    raise DamagedShardError(path, "is not a shard of this version")
