"""What is remembered between starts: listings of folders and which files could be read.

An entry is a file of arrays (`.npz`, never a pickle) whose CRC tells damage. All that is in the cache can be found
out again, so that whatever is wrong with it is no more than a line in the debug log.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from spray.errors import UserError
from spray.storage import replacing

log = logging.getLogger(__name__)

MAX_ENTRIES, MAX_BYTES = 200, 2 << 30
"""The entries that were not used for longest are removed when there are more."""
DAY = 86400.0

_beside: list[Path] = []
"""Folders where an entry is looked for that the user's cache lacks."""
_copied_to: list[Path] = []
"""Folders where every entry that is used is written, too."""


def cache_folder() -> Path:
    """Return the user's cache: ``$SPRAY_CACHE``, else ``$XDG_CACHE_HOME/spray``, else ``~/.cache/spray``.

    Raises
    ------
    UserError
        If none of these is known.
    """
    if own := os.environ.get("SPRAY_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(shared):  # its specification wants relative ones ignored
        return Path(shared, "spray")
    try:
        return Path.home() / ".cache/spray"
    except RuntimeError:
        raise UserError("this user has no home folder; name a folder for cached data in SPRAY_CACHE") from None


def load(kind: str, key: str) -> dict[str, np.ndarray] | None:
    """Return the arrays that were saved under a key; None if there are none or they are damaged."""
    for folder in (None, *_beside):
        arrays = _load(folder, kind, key)
        if arrays is not None:
            for copy in _copied_to:
                _save(copy, kind, key, arrays)
            return arrays
    return None


def save(kind: str, key: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Save arrays under a key, atomically; where that cannot be done it is not."""
    for folder in (None, *_copied_to):
        _save(folder, kind, key, arrays)


@contextmanager
def shared_in(folder: Path | None) -> Iterator[None]:
    """While the block runs, write all that is remembered or looked up to this folder too, for other machines.

    The user's cache may be one that these don't see, or that can't be written.
    """
    before = _copied_to[:]
    _copied_to[:] = [] if folder is None else [folder]
    try:
        yield
    finally:
        _copied_to[:] = before


def look_in(folder: Path) -> None:
    """Look for what the user's cache lacks in this folder, from now on."""
    _beside[:] = [folder]


def _load(folder: Path | None, kind: str, key: str) -> dict[str, np.ndarray] | None:
    """Return what is saved in a folder, by default the user's cache."""
    try:
        path = _path(folder, kind, key)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        os.utime(path)
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged archive fails in many ways
        log.debug("the cached %s of %s is of no use: %s", kind, key, error)
        return None
    return arrays


def _save(folder: Path | None, kind: str, key: str, arrays: Mapping[str, np.ndarray]) -> None:
    try:
        path = _path(folder, kind, key)
        with replacing(path) as temporary, temporary.open("xb") as file:
            # The stubs of NumPy take the names for its own options.
            np.savez(file, **dict(arrays))  # type: ignore[arg-type]
        _prune(path.parent)
    except Exception as error:
        log.debug("the %s of %s could not be cached: %s", kind, key, error)


def pack(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return texts as one array of bytes and the length of each in bytes; names of files come back as they are."""
    parts = [text.encode("utf-8", "surrogateescape") for text in texts]
    return np.frombuffer(b"".join(parts), dtype=np.uint8), np.array([len(part) for part in parts], dtype=np.int32)


def unpack(content: np.ndarray, lengths: np.ndarray) -> list[str]:
    """Return the texts that `pack` was given."""
    data, ends = content.tobytes(), np.cumsum(lengths, dtype=np.int64)
    starts = ends - lengths
    return [data[a:b].decode("utf-8", "surrogateescape") for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]


def _path(folder: Path | None, kind: str, key: str) -> Path:
    return (folder or cache_folder()) / kind / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}.npz"


def _prune(folder: Path) -> None:
    now = time.time()
    entries = []
    with os.scandir(folder) as found:
        for entry in found:
            status = entry.stat()
            if entry.name.endswith(".npz"):
                entries.append((status.st_mtime, status.st_size, entry.path))
            elif entry.name.endswith(".tmp") and now - status.st_mtime > DAY:  # of a writer that was killed
                os.unlink(entry.path)
    total = 0
    for number, (_, size, path) in enumerate(sorted(entries, reverse=True)):
        total += size
        if number >= MAX_ENTRIES or total > MAX_BYTES:
            os.unlink(path)
