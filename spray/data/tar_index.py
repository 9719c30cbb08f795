"""Which samples lie where in the `.tar` files of a WebDataset: read from their headers once, then remembered.

A sample is what has one name up to the first dot, as the WebDataset format has it: an image (`.jpg`, `.png`, …) and its
label, `.cls` (a whole number as text) or `.json`. Nothing is ever extracted; an image is read where it lies.
"""

from __future__ import annotations

import json
import logging
import os
import tarfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from spray.data import cache
from spray.data.decoding import EXTENSIONS
from spray.errors import UserError

log = logging.getLogger(__name__)

FORMAT = 1
BLOCK = 512
READERS = 8
LARGEST_LABEL = 1 << 20
"""Bytes of a label's file, at most."""
SAY_SECONDS = 5.0
UNLABELLED = -1


@dataclass
class Shard:
    """The samples of one tar file, in its order.

    Attributes
    ----------
    size, changed : int
        Of the file itself: bytes and time of change in nanoseconds.
    names : list of str
        Each sample's name.
    offsets, sizes : list of int
        Where each image lies, in bytes; offset 0 where there is none.
    labels : list of int
        `UNLABELLED` where there is none.
    """

    size: int
    changed: int
    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)


def index_shards(paths: Sequence[Path], label: str) -> list[Shard]:
    """Return what lies in each of some tar files.

    Parameters
    ----------
    paths : sequence of Path
        The files.
    label : str
        The key of the label in `.json` files.

    Raises
    ------
    UserError
        If a file is missing, is no plain tar file, is damaged, or holds links or the like.
    """
    key = json.dumps([label, *(os.path.realpath(path) for path in paths)])
    known = _load(key, len(paths))
    states = [_state(path) for path in paths]
    waiting = [
        number for number, (size, changed) in enumerate(states)
        if known is None or (known[number].size, known[number].changed) != (size, changed)
    ]  # fmt: skip
    shards = list(known) if known is not None else [Shard(0, 0)] * len(paths)
    if waiting:
        said = time.monotonic()
        with ThreadPoolExecutor(max_workers=READERS) as pool:
            scanned = pool.map(lambda number: scan(paths[number], label), waiting)
            for done, (number, shard) in enumerate(zip(waiting, scanned, strict=True), start=1):
                shards[number] = shard
                if time.monotonic() - said > SAY_SECONDS:
                    said = time.monotonic()
                    log.info("reading the headers of tar files, once: %d of %d", done, len(waiting))
        _save(key, shards)
    return shards


def scan(path: Path, label: str) -> Shard:
    """Read the headers of a tar file.

    Raises
    ------
    UserError
        If it cannot be read, is damaged or holds anything but files and folders.
    """
    size, changed = _state(path)
    shard = Shard(size, changed)
    here: dict[str, int] = {}
    try:
        with path.open("rb") as raw, tarfile.open(fileobj=raw, mode="r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise UserError(f"{path} holds {member.name!r}, which is no plain file; links are not followed")
                if member.offset_data + member.size > size:
                    raise UserError(f"{path} is cut off inside of {member.name!r}; get it again")
                _take(shard, here, member, raw.fileno(), label, path)
            _require_end(raw.fileno(), tar.offset, size, path)
    except tarfile.TarError as error:
        compressed = "; unpack it first" if path.suffix.lower() != ".tar" else ""
        raise UserError(f"{path} is no plain tar file: {error}{compressed}") from None
    except (OSError, ValueError, UnicodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return shard


def _take(shard: Shard, here: dict[str, int], member: tarfile.TarInfo, descriptor: int, label: str, path: Path) -> None:
    """Take a file into the sample that it belongs to."""
    folder, _, file = member.name.rpartition("/")
    stem, _, extension = file.partition(".")
    if not stem:  # hidden
        return
    name = f"{folder}/{stem}" if folder else stem
    extension = extension.lower()
    is_image = f".{extension}" in EXTENSIONS
    if not is_image and extension not in ("cls", "json"):
        return
    row = here.get(name)
    if row is None:
        row = here[name] = len(shard.names)
        shard.names.append(name)
        shard.offsets.append(0)
        shard.sizes.append(0)
        shard.labels.append(UNLABELLED)
    elif row != len(shard.names) - 1:
        raise UserError(f"{path} holds the sample {name!r} at two places; the files of a sample lie side by side")
    if is_image:
        if shard.offsets[row]:
            raise UserError(f"{path} holds two images of the sample {name!r}; which one is meant cannot be told")
        shard.offsets[row], shard.sizes[row] = member.offset_data, member.size
        return
    if member.size <= LARGEST_LABEL:
        content = os.pread(descriptor, member.size, member.offset_data)
        found = _label(content, extension, label)
        if found is not None:
            shard.labels[row] = found


def _label(content: bytes, extension: str, label: str) -> int | None:
    try:
        if extension == "cls":
            value = int(content)
        else:
            value = json.loads(content)[label]
            if isinstance(value, bool) or not isinstance(value, int):
                return None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return value if 0 <= value < 1 << 31 else None


def _require_end(descriptor: int, offset: int, size: int, path: Path) -> None:
    """Check that the headers end where the file says so: the reader stops without a word at a damaged one."""
    block = os.pread(descriptor, BLOCK, offset)
    if len(block) not in (0, BLOCK) or block.strip(b"\0") or offset > size:
        raise UserError(f"{path} is damaged or cut off at byte {offset}; get it again")


def _state(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return status.st_size, status.st_mtime_ns


def _save(key: str, shards: Sequence[Shard]) -> None:
    names, lengths = cache.pack([name for shard in shards for name in shard.names])
    arrays = {
        "format": np.array(FORMAT),
        "counts": np.array([len(shard.names) for shard in shards], dtype=np.int64),
        "states": np.array([(shard.size, shard.changed) for shard in shards], dtype=np.int64).reshape(-1, 2),
        "names": names,
        "lengths": lengths,
    }
    for column in ("offsets", "sizes", "labels"):
        values = [value for shard in shards for value in getattr(shard, column)]
        arrays[column] = np.array(values, dtype=np.int64)
    cache.save("tars", key, arrays)


def _load(key: str, n_shards: int) -> list[Shard] | None:
    arrays = cache.load("tars", key)
    if arrays is None:
        return None
    try:
        if int(arrays["format"]) != FORMAT or len(arrays["counts"]) != n_shards:
            return None
        names = cache.unpack(arrays["names"], arrays["lengths"])
        columns = [arrays[column].tolist() for column in ("offsets", "sizes", "labels")]
        shards, start = [], 0
        for count, (size, changed) in zip(arrays["counts"].tolist(), arrays["states"].tolist(), strict=True):
            rows = slice(start, start + count)
            shards.append(Shard(size, changed, names[rows], *(column[rows] for column in columns)))
            start += count
    except (KeyError, ValueError):
        return None
    return shards
