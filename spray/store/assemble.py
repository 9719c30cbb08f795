"""Puts shards together into the one file that is the result: their stored chunks, copied as they are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np

from spray.errors import UserError
from spray.storage import replacing
from spray.store.disk import Encoder, closing, disk_errors, new_file
from spray.store.layout import DIGESTS, ArraySpec, Layout
from spray.store.shards import Shard, ShardFacts, read_shard, rows_sha256, shard_chunks, write_chunk

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

    Chunks are copied as they are stored, out of shards whose SHA-256 was compared. Then the new file is read back
    from the disk and its chunks compared with those of the shards. Only after that it appears at `path`.

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
            facts = []
            for shard, fact in _verified(lambda each: read_shard(folder / each.name, each, key, layout), copied):
                for chunk in shard_chunks(folder / shard.name, shard, layout):
                    write_chunk(datasets[chunk.name], chunk.row, chunk.mask, chunk.raw)
                facts.append(fact)
                # The disk has most of it by the end, when it is waited for.
                _advise(temporary, "POSIX_FADV_DONTNEED")
            _write_digests(file, facts)
        _forget(temporary)
        compared = zip(through(shards, len(shards), COMPARED), facts, strict=True)
        if not _gives_back(temporary, layout, compared):
            raise UserError(
                f"{path}: the disk doesn't give back what was written to it; check the disk, then start again: what "
                "is computed already is kept"
            )
    return facts


def _verified(read: Callable[[Shard], ShardFacts], shards: Iterable[Shard]) -> Iterator[tuple[Shard, ShardFacts]]:
    """Verify each shard in a thread of its own, while the one before it is copied."""
    with ThreadPoolExecutor(1, thread_name_prefix="spray-verify") as pool:
        coming: tuple[Shard, Future[ShardFacts]] | None = None
        for shard in shards:
            ready, coming = coming, (shard, pool.submit(read, shard))
            if ready is not None:
                yield ready[0], ready[1].result()
        if coming is not None:
            yield coming[0], coming[1].result()


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


def _gives_back(path: Path, layout: Layout, compared: Iterable[tuple[Shard, ShardFacts]]) -> bool:
    """Return whether the file holds the shards' chunks."""
    try:
        with h5py.File(path, "r") as file:
            datasets = {name: file[name] for name in layout.names}
            for shard, fact in compared:
                # About where the next rows lie: chunks were written in order. HDF5 would wait for each.
                size = path.stat().st_size
                at, to = size * shard.start // layout.n, size * min(2 * shard.stop - shard.start, layout.n) // layout.n
                _advise(path, "POSIX_FADV_WILLNEED", at, to - at)
                if rows_sha256(datasets, shard.start, shard.stop) != fact.data_sha256:
                    return False
            return True
    except (OSError, RuntimeError, KeyError):
        return False


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
