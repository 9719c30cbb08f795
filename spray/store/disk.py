"""New HDF5 files on a disk that may fail.

HDF5 crashes the process (a segmentation fault, measured with HDF5 2.0) when it closes a dataset while values
that it holds back can't be written, as on a full disk. So it never holds values back here: chunks are filtered
in memory and then written directly, and what is left in its caches are metadata, which fail with an error.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import h5py
import numpy as np
from numcodecs.fletcher32 import Fletcher32

from spray.errors import UserError
from spray.store.layout import COMPRESSIONS, Layout

_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_NUMBERS = itertools.count()


def new_file(path: Path | str, in_memory: bool = False) -> h5py.File:
    """Create an HDF5 file whose bytes depend on its contents only, and whose metadata carry checksums.

    The format is that of HDF5 1.10 (2016), which every h5py of today reads (tried back to 3.8). The older default
    format has no checksums in its metadata: with each byte of a small file changed in turn, 414 of 33,358 changes gave
    other values, whose own checksums were right. With this one none did.

    Parameters
    ----------
    path : Path
        Must not exist.
    in_memory : bool
        Nothing is written to the disk; the path is only a name, which no other open file may have.
    """
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    if in_memory:
        access.set_fapl_core(1 << 20, False)
    creation = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    creation.set_obj_track_times(False)
    # Many attributes together would otherwise move into a heap, whose large entries have no checksum.
    creation.set_attr_phase_change(65535, 0)
    return h5py.File(h5py.h5f.create(os.fsencode(path), h5py.h5f.ACC_EXCL, fcpl=creation, fapl=access))


def memory_file() -> h5py.File:
    """Create an HDF5 file in memory, without a cache: what is written to a chunk can be had filtered at once."""
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fapl_core(1 << 20, False)
    access.set_cache(0, 0, 0, 0.0)
    # HDF5 refuses a name that another open file has, be it in another thread.
    name = f"memory-{next(_NUMBERS)}"
    return h5py.File(h5py.h5f.create(name.encode(), h5py.h5f.ACC_TRUNC, fapl=access))


@contextmanager
def closing(file: h5py.File) -> Iterator[None]:
    """Close a new file; where an error came before, HDF5 can fail to close it for the same reason."""
    try:
        yield
        file.close()
    except BaseException:
        with suppress(OSError, RuntimeError):
            file.close()
        raise


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what a folder refuses while `path` is written into a user's error, as `replacing` does with a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno in _FORBIDDEN:
            what = os.strerror(error.errno)
            raise UserError(f"{Path(path).parent} can't be written to ({what}): choose another run_dir") from error
        raise


class Encoder:
    """Does to rows what HDF5's filters do, in memory.

    Parameters
    ----------
    layout : Layout
        Of the arrays.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        # Where the checksum is all that there is to do, HDF5 in memory would take eight times as long for it.
        self._checksum = Fletcher32()
        self._file = memory_file() if COMPRESSIONS[layout.compression] else None
        # One chunk for each array.
        self._datasets = {} if self._file is None else layout.create(self._file, None)

    def encode(self, name: str, rows: np.ndarray) -> tuple[int, bytes]:
        """Return one stored chunk of array `name`: which filters were skipped, and the bytes.

        Rows that are missing to a whole chunk are zeros in it.
        """
        spec = self._layout.arrays[name]
        missing = self._layout.rows_per_chunk(spec) - len(rows)
        if missing > 0:
            rows = np.concatenate([rows, np.zeros((missing, *rows.shape[1:]), rows.dtype)])
        if self._file is None:
            return 0, self._checksum.encode(np.ascontiguousarray(rows, spec.stored))
        dataset = self._datasets[name]
        dataset[...] = rows
        mask, raw = dataset.id.read_direct_chunk((0,) * dataset.ndim)
        return mask, raw

    def close(self) -> None:
        """Give the memory back."""
        if self._file is not None:
            self._file.close()
