"""What files of attributions hold: their arrays, cut into chunks in one way that depends on nothing else.

Each array has one row per sample. A chunk holds whole rows and never crosses the border of two shards, so
that the stored bytes of a shard's chunks are those of the final file's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import h5py
import numpy as np

from spray.errors import UserError

CHUNK_BYTES = 64 * 1024
"""Largest chunk, unless one row is larger."""

COMPRESSIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "gzip": {"compression": "gzip", "compression_opts": 1, "shuffle": True},
}
"""What `compute.compression` may be, as h5py's options; both come with every HDF5.

LZF, which is faster, is not among them: it looks at memory that it didn't set, so that the same values come
out as other bytes now and then, which a file that is to be the same after an interruption can't have.
"""

DIGESTS = "sha256"
"""Name of the dataset with each shard's SHA-256."""

PLAIN = ("attribution", "label", "prediction", "valid", DIGESTS)
"""Names that arrays may have, beside those of inner layers."""

LAYER = "layer/"
"""Prefix of the arrays of inner layers; the name of the module follows."""


@dataclass(frozen=True)
class ArraySpec:
    """One row of an array.

    Attributes
    ----------
    shape : tuple of int
        Of a row, thus without the axis of samples; () for a number.
    dtype : str
        As NumPy names it; stored in little-endian order.
    """

    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        if any(size < 1 for size in self.shape):
            raise ValueError(f"a row of shape {self.shape} holds nothing")
        if np.dtype(self.dtype).kind not in "fiub":
            raise ValueError(f"rows must be numbers or truth values, not {self.dtype}")

    @property
    def stored(self) -> np.dtype[Any]:
        """The dtype in the file."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def nbytes(self) -> int:
        """Bytes of a row."""
        return prod(self.shape) * self.stored.itemsize


@dataclass(frozen=True)
class Layout:
    """The arrays of a file of attributions and how they are cut up.

    Attributes
    ----------
    arrays : mapping of str to ArraySpec
        "attribution" (C, H, W), "prediction" (classes,), "label" and "valid" (), "layer/<module>" (channels,).
    n : int
        Number of samples, of the whole dataset.
    shard_size : int
        Samples in each shard but the last one.
    compression : str
        `none` or `gzip`.
    """

    arrays: Mapping[str, ArraySpec]
    n: int
    shard_size: int
    compression: str = "none"

    def __post_init__(self) -> None:
        if self.compression not in COMPRESSIONS:
            allowed = ", ".join(COMPRESSIONS)
            raise UserError(f"compute.compression={self.compression!r} is unknown; it must be one of {allowed}")
        if self.n < 1 or self.shard_size < 1:
            raise ValueError(f"{self.n} samples in shards of {self.shard_size}: both must be at least 1")
        if not self.arrays:
            raise ValueError("a layout needs an array")
        for name in self.arrays:
            parts = name.removeprefix(LAYER).split("/")
            inner = name.startswith(LAYER) and all(part not in ("", ".") for part in parts) and "\0" not in name
            if name not in PLAIN and not inner:
                raise ValueError(f"an array can't be called {name!r}: it must be one of {PLAIN} or {LAYER}<module>")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the arrays in the order in which they are stored and hashed."""
        return tuple(sorted(self.arrays))

    @property
    def bytes_per_row(self) -> int:
        """Bytes of one sample in all arrays, before compression."""
        return sum(spec.nbytes for spec in self.arrays.values())

    def rows_per_chunk(self, spec: ArraySpec) -> int:
        """Return the rows of a chunk: as many as 64 KiB hold that divide a shard evenly, but at least one."""
        fit = max(1, CHUNK_BYTES // spec.nbytes)
        if self.n <= self.shard_size:
            return min(self.n, fit)
        return max(rows for rows in range(1, min(fit, self.shard_size) + 1) if self.shard_size % rows == 0)

    def create(self, file: h5py.File, rows: int | None) -> dict[str, h5py.Dataset]:
        """Create the arrays for `rows` samples, or for a chunk each, in an empty file; return them by name.

        Each chunk carries a checksum (fletcher32).
        """
        datasets = {}
        for name in self.names:
            spec = self.arrays[name]
            chunk = self.rows_per_chunk(spec)
            length = chunk if rows is None else rows
            group = file
            for part in name.split("/")[:-1]:
                group = group[part] if part in group else _untimed_group(group, part)
            datasets[name] = group.create_dataset(
                name.split("/")[-1],
                (length, *spec.shape),
                spec.stored,
                chunks=(chunk, *spec.shape),
                # HDF5 wants room for the whole of the last chunk, which has fewer rows in the last shard.
                maxshape=(-(-length // chunk) * chunk, *spec.shape),
                fletcher32=True,
                track_times=False,
                **COMPRESSIONS[self.compression],
            )
        return datasets


def _untimed_group(parent: h5py.Group, name: str) -> h5py.Group:
    properties = h5py.h5p.create(h5py.h5p.GROUP_CREATE)
    properties.set_obj_track_times(False)
    return h5py.Group(h5py.h5g.create(parent.id, name.encode(), gcpl=properties))
