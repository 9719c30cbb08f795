"""Files written whole or not at all: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spray.errors import UserError

if TYPE_CHECKING:
    import h5py

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
"""Names of temporary files."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place when the block ends without an error.

    Raises
    ------
    UserError
        If the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)
    except (OSError, RuntimeError) as error:
        if is_full(error):
            raise UserError(
                f"no space left for {path}: free some or choose another run_dir, then start again; what is "
                "computed already is kept"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def is_full(error: OSError | RuntimeError) -> bool:
    """Return whether an error, be it HDF5's, says that a disk or a quota is full."""
    return getattr(error, "errno", None) in _FULL or any(f"errno = {full}," in str(error) for full in _FULL)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that writers which were killed left anywhere in `folder`."""
    for path in Path(folder).rglob(".*.tmp"):
        if LEFTOVER.fullmatch(path.name) and path.is_file():
            path.unlink()


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` atomically; NaN and infinity are refused, since they are not JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


@contextmanager
def hdf5_writer(path: Path) -> Iterator[h5py.File]:
    """Yield a new HDF5 file that appears at `path` when the block ends without an error.

    It is kept in memory until then: HDF5 2.0 crashes the process when the disk is full while it closes a file.
    """
    from spray.store.disk import new_file

    with new_file(f"{path}.{secrets.token_hex(4)}", in_memory=True) as file:
        yield file
        file.flush()
        image = file.id.get_file_image()
    write_bytes(path, image)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
