"""Puts shards together into the one file that is the result: their stored chunks, copied as they are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np

from spray.errors import UserError
from spray.storage import replacing
from spray.store.disk import Encoder, closing, disk_errors, new_file
from spray.store.layout import DIGESTS, ArraySpec, Layout
from spray.store.shards import (
    DamagedShardError,
    Shard,
    ShardClaim,
    ShardFacts,
    read_claim,
    read_shard,
    rows_digest,
    shard_chunks,
    write_chunk,
)

FORMAT = "spray attributions 2"

TOGETHER, COMPARED = "shards put together", "shards compared"
"""What `assemble` goes through its shards for, first and then."""

Progress = Callable[[Iterable[Shard], int, str], Iterable[Shard]]


def assemble(
    folder: Path,
    shards: Sequence[Shard],
    key: str,
    layout: Layout,
    path: Path,
    attributes: Mapping[str, str | int | float],
    progress: Progress | None = None,
) -> list[ShardFacts]:
    """Write the file of attributions from its shards; the shards stay.

    Chunks are copied as they are stored. Then the new file is read back from the disk, and what is read compared with
    the SHA-256 of the shards: each byte is hashed once for both, whether its shard was damaged and whether the disk
    holds it. Only after that the file appears at `path`.

    Parameters
    ----------
    folder : Path
        Of the shards.
    shards : sequence of Shard
        All of them, in order.
    key : str
        Of the computation; a shard with another one is refused.
    layout : Layout
        That they were written in.
    path : Path
        Of the file, which is replaced if it is there.
    attributes : mapping
        What the file says of itself, beside its key and format.
    progress : callable, optional
        Wraps the iterations over shards: `progress(shards, number, what)`.

    Returns
    -------
    list of ShardFacts
        Of each shard.

    Raises
    ------
    DamagedShardError
        If a shard is missing, changed or another's. No file is left.
    ValueError
        If the shards don't cover the dataset.
    UserError
        If the disk is full or can't be written to.
    """
    folder, path = Path(folder), Path(path)
    if [shard.start for shard in shards] + [layout.n] != [0] + [shard.stop for shard in shards]:
        raise ValueError(f"the shards do not cover the {layout.n} samples, each once and in order")
    if any(shard.start % layout.shard_size for shard in shards):
        raise ValueError(f"the shards are not those of {layout.shard_size} samples each")
    through = progress or _silent
    with disk_errors(path), replacing(path) as temporary:
        file = new_file(temporary)
        with closing(file):
            _describe(file, {**attributes, "key": key, "format": FORMAT, "shard_size": layout.shard_size})
            datasets = layout.create(file, layout.n)
            copied = through(shards, len(shards), TOGETHER)
            claims = []
            for shard in copied:
                try:
                    claims.append(read_claim(folder / shard.name, shard, key, layout))
                    for chunk in shard_chunks(folder / shard.name, shard, layout):
                        write_chunk(datasets[chunk.name], chunk.row, chunk.mask, chunk.raw)
                except DamagedShardError:
                    read_shard(folder / shard.name, shard, key, layout)  # knows better what is wrong
                    raise
                # The disk has most of it by the end, when it is waited for.
                _advise(temporary, "POSIX_FADV_DONTNEED")
            _write_digests(file, [claim.facts for claim in claims])
        _forget(temporary)
        wrong = _first_wrong(temporary, layout, shards, claims, through)
        if wrong is not None:
            # A damaged shard is computed again; where it is whole, the disk is to blame.
            read_shard(folder / wrong.name, wrong, key, layout)
            raise UserError(
                f"{path}: the disk doesn't give back what was written to it; check the disk, then start again: what "
                "is computed already is kept"
            )
    return [claim.facts for claim in claims]


def _describe(file: h5py.File, attributes: Mapping[str, str | int | float]) -> None:
    """Write what the file says of itself.

    Texts are of fixed length: those of any length are kept where HDF5 has no checksums, and one changed byte there
    can have it go round in a circle for ever.
    """
    for name, value in sorted(attributes.items()):
        file.attrs[name] = np.bytes_(value.encode() or b"\0") if isinstance(value, str) else value


def _write_digests(file: h5py.File, facts: Sequence[ShardFacts]) -> None:
    """Write the digest of each shard's rows, so that a fault can be traced to them."""
    digests = np.frombuffer(b"".join(bytes.fromhex(fact.data_sha256) for fact in facts), np.uint8).reshape(-1, 32)
    table = Layout({DIGESTS: ArraySpec((32,), "uint8")}, len(digests), len(digests))
    dataset, encoder = table.create(file, len(digests))[DIGESTS], Encoder(table)
    for row in range(0, len(digests), dataset.chunks[0]):
        write_chunk(dataset, row, *encoder.encode(DIGESTS, digests[row : row + dataset.chunks[0]]))
    encoder.close()


def _first_wrong(
    path: Path, layout: Layout, shards: Sequence[Shard], claims: Sequence[ShardClaim], through: Progress
) -> Shard | None:
    """Return the first shard whose rows the file doesn't give back as the shard claims; None if it does all."""
    at = shards[0]
    try:
        with h5py.File(path, "r") as file:
            datasets = {name: file[name] for name in layout.names}
            for at, claim in zip(through(shards, len(shards), COMPARED), claims, strict=True):
                # About where the next rows lie: chunks were written in order. HDF5 would wait for each.
                size = path.stat().st_size
                start, stop = size * at.start // layout.n, size * min(2 * at.stop - at.start, layout.n) // layout.n
                _advise(path, "POSIX_FADV_WILLNEED", start, stop - start)
                if not claim.holds(rows_digest(datasets, at.start, at.stop)):
                    return at
            return None
    except (OSError, RuntimeError, KeyError):
        return at


def _forget(path: Path) -> None:
    """Have the system drop what it holds of a file in memory, so that the file is next read from the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    _advise(path, "POSIX_FADV_DONTNEED")


def _advise(path: Path, advice: str, start: int = 0, length: int = 0) -> None:
    """Tell the system what becomes of a range of a file: DONTNEED starts writing it and drops what is written."""
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, start, length, getattr(os, advice))
    finally:
        os.close(descriptor)


def _silent(shards: Iterable[Shard], total: int, what: str) -> Iterable[Shard]:
    return shards
