"""Reads files of attributions: row by row, without taking for right what is damaged, foreign or another run's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np

from spray.errors import UserError
from spray.store.assemble import FORMAT
from spray.store.foreign import open_foreign, reading_errors
from spray.store.layout import DIGESTS, LAYER
from spray.store.shards import rows_sha256

Selection: TypeAlias = "int | slice | np.ndarray | Sequence[int] | Sequence[bool]"

REMEDY = "delete it and start the run again, which computes it anew"

_BLOCK_BYTES = 16 << 20
"""Largest part that is read at once."""


def open_attributions(path: Path, key: str | None = None, shape: Sequence[int | None] | None = None) -> Attributions:
    """Open a file of attributions; a run's own, or any other in the layout that ViRelAy reads.

    Parameters
    ----------
    path : Path
        Of the file.
    key : str, optional
        That its computation must have had.
    shape : sequence of int or None, optional
        That `/attribution` must have, such as (60000, None, None, None); None stands for any length.

    Returns
    -------
    Attributions
        Also a context manager that closes the file.

    Raises
    ------
    UserError
        If the file is missing, damaged or cut off, isn't HDF5, lacks something or has it in another shape or
        dtype, has another key, or refers to other files; see `open_foreign`.
    """
    file = open_foreign(Path(path))
    try:
        with reading_errors(Path(path)):
            return Attributions(Path(path), file, key, shape)
    except BaseException:
        file.close()
        raise


class Rows:
    """An array in the file, one row per sample; rows are read when they are asked for.

    `rows[selection]` takes a number, a slice, indices in any order (repeated ones too) or a truth value per
    row, and behind that whatever NumPy takes for the axes of a row. Values come as they are stored.
    """

    def __init__(self, path: Path, dataset: h5py.Dataset) -> None:
        self._path, self._dataset = path, dataset
        self.shape: tuple[int, ...] = dataset.shape
        self.dtype: np.dtype[Any] = dataset.dtype
        self.ndim = len(self.shape)
        self.rows_per_chunk: int = dataset.chunks[0] if dataset.chunks else 1

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def __getitem__(self, selection: Any) -> Any:
        first, *rest = selection if isinstance(selection, tuple) else (selection,)
        if first is Ellipsis:
            first, rest = slice(None), [Ellipsis, *rest]
        if isinstance(first, slice):
            values = self._slice(first)
        elif np.ndim(first) == 0:
            row = int(self._indices(np.asarray(first)[None])[0])
            values = self._range(row, row + 1)[0]
            return values[tuple(rest)] if rest else values
        else:
            values = self._take(self._indices(np.asarray(first)))
        return values[(slice(None), *rest)] if rest else values

    def _slice(self, which: slice) -> np.ndarray:
        rows = range(*which.indices(len(self)))
        if not rows:
            return np.empty((0, *self.shape[1:]), self.dtype)
        return self._range(rows[0], rows[-1] + 1) if rows.step == 1 else self._take(np.asarray(rows))

    def _indices(self, indices: np.ndarray) -> np.ndarray:
        if indices.dtype == bool:
            if indices.shape != (len(self),):
                raise IndexError(f"a mask of shape {indices.shape} doesn't fit {len(self)} rows")
            return np.flatnonzero(indices)
        if indices.size == 0:
            return np.empty(0, np.int64)
        if indices.ndim != 1 or indices.dtype.kind not in "iu":
            raise IndexError(f"rows are chosen by one axis of whole numbers, not by {indices.dtype} {indices.shape}")
        if indices.min() < -len(self) or indices.max() >= len(self):
            raise IndexError(f"row {indices.min()} or {indices.max()} is not among {len(self)} rows")
        return np.where(indices < 0, indices.astype(np.int64) + len(self), indices.astype(np.int64))

    def _take(self, indices: np.ndarray) -> np.ndarray:
        """Read rows in the order of the file, neighbours together."""
        values = np.empty((len(indices), *self.shape[1:]), self.dtype)
        order = np.argsort(indices, kind="stable")
        ascending = indices[order]
        # A new part begins where a chunk is left out, or where the part gets too long.
        most = self.rows_at_once
        chunk = ascending // self.rows_per_chunk
        breaks = (np.diff(chunk) > 1) | (np.diff(chunk // (most // self.rows_per_chunk)) > 0)
        for part in np.split(np.arange(len(indices)), np.flatnonzero(breaks) + 1):
            if len(part):
                start, stop = int(ascending[part[0]]), int(ascending[part[-1]]) + 1
                values[order[part]] = self._range(start, stop)[ascending[part] - start]
        return values

    @property
    def rows_at_once(self) -> int:
        """Rows of whole chunks that are read in one go: some 16 MiB."""
        row = max(1, self._dataset.nbytes // max(1, len(self)))
        return max(1, _BLOCK_BYTES // row // self.rows_per_chunk) * self.rows_per_chunk

    def _range(self, start: int, stop: int) -> np.ndarray:
        try:
            return self._dataset[start:stop]
        except (OSError, RuntimeError, ValueError) as error:
            raise self._damaged(start, stop) from error

    def _damaged(self, start: int, stop: int) -> UserError:
        """Return the error that names the rows of the first chunk that can't be read."""
        chunk = self.rows_per_chunk
        for at in range(start // chunk * chunk, stop, chunk):
            try:
                self._dataset[at : at + chunk]
            except (OSError, RuntimeError, ValueError):
                start, stop = at, min(at + chunk, len(self))
                break
        rows = f"row {start}" if stop - start == 1 else f"rows {start} to {stop - 1}"
        name = self._dataset.name
        return UserError(f"{self._path} is damaged: {rows} of {name} can't be read as they were written; {REMEDY}")


class Attributions:
    """An open file of attributions; made by `open_attributions`.

    Attributes
    ----------
    attribution : Rows
        Float, (N, ...); mostly (N, C, H, W).
    layers : mapping of str to Rows
        Relevance of inner layers by module, float (N, channels).
    attributes : dict
        What the file says of itself: method, composite, target, key.
    """

    def __init__(
        self, path: Path, file: h5py.File, key: str | None = None, shape: Sequence[int | None] | None = None
    ) -> None:
        self.path, self._file = path, file
        self.attributes = _attributes(path, file, key)
        self._own = "format" in self.attributes
        self.attribution = self._rows("attribution", "f")
        self._check_shape(shape)
        if self._own:
            _ = self.label, self.prediction
        names: list[str] = []
        group = file.get(LAYER.strip("/"))
        if isinstance(group, h5py.Group):
            group.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        self.layers: Mapping[str, Rows] = {name: self._rows(LAYER + name, "f") for name in sorted(names)}

    def __enter__(self) -> Attributions:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.attribution)

    def close(self) -> None:
        """Close the file; nothing can be read afterwards."""
        self._file.close()

    @cached_property
    def label(self) -> Rows:
        """True classes, integer (N,); other programs may have written truth values (N, classes)."""
        return self._rows("label", "iub")

    @cached_property
    def prediction(self) -> Rows:
        """Outputs of the model, float (N, classes)."""
        return self._rows("prediction", "f")

    @cached_property
    def valid(self) -> np.ndarray:
        """Whether each sample could be explained, bool (N,); all of them, if the file doesn't say."""
        return self._rows("valid", "iub")[:].astype(bool) if "valid" in self._file else np.ones(len(self), bool)

    @cached_property
    def index(self) -> np.ndarray | None:
        """The sample in the dataset that each row belongs to, int64 (N,), where it isn't row i to sample i."""
        return self._rows("index", "iu")[:].astype(np.int64) if "index" in self._file else None

    def array(self, name: str) -> Rows:
        """Return an array by its name in the file, such as `layer/features.3`."""
        known = {"attribution": self.attribution, **{LAYER + layer: rows for layer, rows in self.layers.items()}}
        return known[name] if name in known else self._rows(name, "fiub")

    def batches(
        self, indices: np.ndarray | Sequence[int] | None = None, size: int | None = None, name: str = "attribution"
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Go through rows in parts.

        Parameters
        ----------
        indices : ndarray of int, optional
            Which rows, in this order; by default all. Where they ascend, parts end where chunks do, so that
            none is read twice.
        size : int, optional
            Most rows in a part; by default as many as 16 MiB hold.
        name : str
            Of the array.

        Yields
        ------
        tuple of ndarray
            The rows' indices, int64 (m,), and their values (m, ...).
        """
        rows = self.array(name)
        wanted = np.arange(len(self)) if indices is None else np.asarray(indices, dtype=np.int64)
        chunk = wanted // rows.rows_per_chunk
        most = rows.rows_at_once if size is None else max(1, size)
        at = 0
        while at < len(wanted):
            stop = min(at + most, len(wanted))
            while stop < len(wanted) and chunk[stop] == chunk[stop - 1] and chunk[stop - 1] != chunk[at]:
                stop -= 1
            yield wanted[at:stop], rows[wanted[at:stop]]
            at = stop

    def verify(self) -> None:
        """Read everything once.

        A run's own file is compared with the SHA-256 of what was written; of any other only what has a checksum
        is verified (`fletcher32`), the rest is only read.

        Raises
        ------
        UserError
            If something can't be read or isn't what was written. It names the rows.
        """
        names = ["attribution", *(name for name in ("label", "prediction", "valid") if name in self._file)]
        names += [LAYER + name for name in self.layers]
        if self._own:
            self._verify_digests(names)
            return
        for name in names:
            rows = self.array(name)
            for start in range(0, len(rows), rows.rows_at_once):
                rows[start : start + rows.rows_at_once]

    def _verify_digests(self, names: Sequence[str]) -> None:
        size = int(self.attributes["shard_size"])
        digests, datasets = self._rows(DIGESTS, "u")[:], {name: self._file[name] for name in names}
        starts = range(0, len(self), size)
        if len(digests) != len(starts):
            raise UserError(f"{self.path} is damaged: its checksums don't fit its {len(self)} rows; {REMEDY}")
        for start, digest in zip(starts, digests, strict=True):
            stop = min(start + size, len(self))
            try:
                good = rows_sha256(datasets, start, stop) == digest.tobytes().hex()
            except (OSError, RuntimeError):
                good = False
            if not good:
                which = f"rows {start} to {stop - 1}"
                raise UserError(f"{self.path} is damaged: something in {which} isn't what was written; {REMEDY}")

    def _rows(self, name: str, kinds: str) -> Rows:
        if name not in self._file:
            raise UserError(f"{self.path} has no /{name}, but {', '.join('/' + each for each in self._file)}")
        dataset = self._file[name]
        if not isinstance(dataset, h5py.Dataset):
            raise UserError(f"{self.path}: /{name} is a group; only arrays with one row per sample are read")
        kind = dataset.id.get_type()
        if dataset.dtype.kind not in kinds:
            raise UserError(f"{self.path}: /{name} holds {dataset.dtype}, but must hold {_words(kinds)}")
        if not kind.equal(h5py.h5t.py_create(dataset.dtype, logical=True)):
            raise UserError(f"{self.path}: /{name} holds numbers in a form of its own, not {dataset.dtype}")
        wanted = None if name in ("attribution", DIGESTS) else self.attribution.shape[0]
        if not dataset.shape or (wanted is not None and dataset.shape[0] != wanted):
            raise UserError(f"{self.path}: /{name} has shape {dataset.shape}, but must have {wanted} rows")
        if _missing(dataset):
            raise UserError(f"{self.path} is incomplete: rows of /{name} were never written; {REMEDY}")
        return Rows(self.path, dataset)

    def _check_shape(self, shape: Sequence[int | None] | None) -> None:
        found = self.attribution.shape
        if len(found) < 2:
            raise UserError(f"{self.path}: /attribution has shape {found}, but must have one heatmap per sample")
        fits = shape is None or (
            len(found) == len(shape) and all(want in (None, have) for want, have in zip(shape, found, strict=True))
        )
        if not fits and shape is not None:
            wanted = ", ".join("any" if length is None else str(length) for length in shape)
            raise UserError(
                f"{self.path}: /attribution has shape {found}, but must have ({wanted}): was it made from other data?"
            )


def _attributes(path: Path, file: h5py.File, key: str | None) -> dict[str, Any]:
    """Read and check what the file says of itself."""
    attributes = {
        name: value.decode(errors="replace") if isinstance(value, bytes) else value
        for name, value in file.attrs.items()
    }
    if attributes.get("format", FORMAT) != FORMAT:
        raise UserError(f"{path} has format {attributes['format']!r}, but this version reads {FORMAT!r}")
    if key is not None and attributes.get("key") != key:
        found = f"key {attributes['key']}" if "key" in attributes else "no key"
        raise UserError(f"{path} was computed with other settings ({found}, not {key}); {REMEDY}")
    return attributes


def _missing(dataset: h5py.Dataset) -> bool:
    """Say whether values were never written: HDF5 would give zeros for them."""
    if dataset.size == 0:
        return False
    if dataset.chunks is None:
        return bool(dataset.id.get_storage_size() == 0)
    chunks = [-(-length // chunk) for length, chunk in zip(dataset.shape, dataset.chunks, strict=True)]
    return bool(dataset.id.get_num_chunks() < np.prod(chunks))


def _words(kinds: str) -> str:
    words = {"f": "floats", "i": "whole numbers", "u": "whole numbers", "b": "truth values"}
    return " or ".join(dict.fromkeys(words[kind] for kind in kinds))
