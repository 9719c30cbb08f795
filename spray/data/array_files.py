"""Images in arrays on disk: NumPy's `.npz`, read into memory, and HDF5, read when they are used."""

from __future__ import annotations

import logging
import math
import os
import threading
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spray.data.checking import Check
from spray.data.decoded import DecodedDataset, hash_of
from spray.data.decoding import UnreadableImageError, is_of_system
from spray.data.items import unique
from spray.data.listed import printable
from spray.errors import UserError

log = logging.getLogger(__name__)

HDF5 = (".h5", ".hdf5", ".hdf")
PARTS = ("images", "labels", "classes", "names")
OPTIONS = (*PARTS, *(f"{part}_{name}" for part in ("train", "test") for name in PARTS), "layout")
LAYOUTS = ("channels_first", "channels_last")
HASHED = 256
"""Images of an HDF5 file whose pixels go into the fingerprint."""
CHUNK_CACHE = 256 << 20


class _Source(ABC):
    """Where images lie: (N, ...) of some type."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @abstractmethod
    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return some images."""


class _InMemory(_Source):
    def __init__(self, images: np.ndarray) -> None:
        self.images, self.shape, self.dtype = images, images.shape, images.dtype

    def take(self, rows: np.ndarray) -> np.ndarray:
        taken: np.ndarray = self.images[rows]
        return taken


class _InHdf5(_Source):
    """A dataset of an HDF5 file, opened anew in each process and used by one thread at a time."""

    def __init__(self, path: Path, key: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._path, self._key, self.shape, self.dtype = path, key, shape, dtype
        self._lock, self._process = threading.Lock(), -1
        self._file: Any = None

    def take(self, rows: np.ndarray) -> np.ndarray:
        # HDF5 wants each row once, in order; neighbours are read at one go.
        wanted, places = np.unique(rows, return_inverse=True)
        found = np.empty((len(wanted), *self.shape[1:]), dtype=self.dtype)
        breaks = np.flatnonzero(np.diff(wanted) > 1) + 1
        with self._lock:
            images = self._images()
            for start, stop in zip([0, *breaks], [*breaks, len(wanted)], strict=True):
                if stop > start:
                    images.read_direct(found, np.s_[int(wanted[start]) : int(wanted[stop - 1]) + 1], np.s_[start:stop])
        return found[places]

    def _images(self) -> Any:
        import h5py

        from spray.store.foreign import open_foreign

        if self._process != os.getpid():
            self._file = open_foreign(self._path)
            plain = self._file[self._key]
            access = h5py.h5p.create(h5py.h5p.DATASET_ACCESS)
            # Larger chunks than the cache would be read again for each image in them.
            chunk = int(np.prod(plain.chunks)) * plain.dtype.itemsize if plain.chunks else 0
            access.set_chunk_cache(1009, min(max(4 * chunk, 1 << 20), max(CHUNK_CACHE, chunk)), 1.0)
            self._dataset = h5py.Dataset(h5py.h5d.open(self._file.id, plain.name.encode(), access))
            self._process = os.getpid()
        if self._dataset.shape != self.shape or self._dataset.dtype != self.dtype:
            raise OSError(f"the array changed to {self._dataset.dtype} {self._dataset.shape} while it was in use")
        return self._dataset


@dataclass
class _Arrays:
    """What one file holds of one part of the data."""

    path: Path
    images: _Source
    labels: np.ndarray
    classes: list[str] | None
    names: list[str] | None


class ArrayFileDataset(DecodedDataset):
    """Images in one array of a file.

    Parameters
    ----------
    arrays : _Arrays
        The file's arrays.
    classes : tuple of str
        Names of the classes.
    layout : str or None
        ``channels_first`` or ``channels_last``; None: the channels are where 1 or 3 stands.
    check : bool
        Whether every image is looked at before it is used, to leave out damaged ones.

    Raises
    ------
    UserError
        If the arrays are no images and labels.
    """

    def __init__(self, arrays: _Arrays, classes: tuple[str, ...], layout: str | None, check: bool) -> None:
        self._path, self._source = arrays.path, arrays.images
        self.classes = classes
        labels = arrays.labels
        if labels.max() >= len(classes):
            raise UserError(f"{arrays.path} has a label {labels.max()}, but there are only {len(classes)} classes")
        self._channels_last, shape = _find_layout(self._source.shape, layout, arrays.path)
        floats = self._source.dtype.kind == "f"
        self._start(len(labels), shape, cache_bytes=0, dtype=np.float32 if floats else np.uint8)
        digits = len(str(len(labels) - 1))
        names = arrays.names or [f"{row:0{digits}d}" for row in range(len(labels))]
        content = hash_of(str(classes), labels, self._state())
        bad: dict[int, str] = {}
        self._checked = check
        if check and isinstance(self._source, _InHdf5):
            bad = self._check(content, str(arrays.path))
        elif check and floats:
            bad = self._run_check(Check.unknown(len(labels)), lambda: None, str(arrays.path))
        kept = self._keep(labels, names, bad, str(arrays.path))
        self.names = [names[row] for row in kept] if bad else names
        self.fingerprint = hash_of(content, np.array(sorted(bad), dtype=np.int64))

    def _state(self) -> str:
        """Return a hash of the pixels, or for an HDF5 file of its size, its time of change and some pixels."""
        if isinstance(self._source, _InMemory):
            return hash_of(str(self._channels_last), self._source.images)
        status = self._path.stat()
        about = f"{self._channels_last} {self._source.shape} {self._source.dtype}"
        return hash_of(about, f"{status.st_size} {status.st_mtime_ns}", self._hash_some(HASHED))

    def _pixels(self, row: int) -> np.ndarray:
        pixels, failures = self._read(np.array([row]))
        if failures:
            raise failures[0]
        return pixels[0]

    def _place(self, row: int) -> str:
        return f"image {row} of {self._path}"

    def _read(self, rows: np.ndarray) -> tuple[np.ndarray, dict[int, UnreadableImageError]]:
        failures: dict[int, UnreadableImageError] = {}
        try:
            values = self._source.take(rows)
        except Exception as error:  # damaged files fail in many ways
            values = np.zeros((len(rows), *self._source.shape[1:]), dtype=self._source.dtype)
            if len(rows) == 1:
                return self._to_form(values), {0: _failure(error)}
            for place in range(len(rows)):
                try:
                    values[place] = self._source.take(rows[place : place + 1])[0]
                except Exception as reason:
                    failures[place] = _failure(reason)
        if values.dtype.kind == "f":
            flat = values.reshape(len(values), math.prod(values.shape[1:]))
            low, high = flat.min(axis=1), flat.max(axis=1)
            for place in np.flatnonzero(~((low >= 0) & (high <= 1))).tolist():  # NaN is neither
                failures[place] = UnreadableImageError(
                    f"its values go from {low[place]:.3g} to {high[place]:.3g}, outside of [0, 1]"
                )
        return self._to_form(values), failures

    def _to_form(self, values: np.ndarray) -> np.ndarray:
        if values.ndim == 3:
            values = values[:, None]
        elif self._channels_last:
            values = values.transpose(0, 3, 1, 2)
        return np.ascontiguousarray(values, dtype=self._dtype)


def array_files(
    train: str, test: str, options: Mapping[str, Any], check: bool
) -> tuple[ArrayFileDataset, ArrayFileDataset]:
    """Return training and test images from `.npz` or HDF5 files.

    Parameters
    ----------
    train, test : str
        The files; one file may hold both parts under different keys.
    options : mapping
        The keys of ``images`` ((N, C, H, W), (N, H, W, C) or (N, H, W); uint8, or floating point in [0, 1]),
        ``labels`` (whole numbers, (N,)), ``classes`` and ``names`` (texts; both may be missing), where they are not
        called so. ``train_images``, ``test_labels`` and so on are those of one part. ``layout`` is ``channels_first``
        or ``channels_last``, where the shape leaves it open.
    check : bool
        Whether every image is looked at beforehand, to leave out damaged ones.

    Raises
    ------
    UserError
        If a file cannot be read or holds something else.
    """
    layout = options.get("layout")
    if layout not in (None, *LAYOUTS):
        raise UserError(f"dataset.options.layout={layout} is unknown; allowed: {', '.join(LAYOUTS)}")
    found = []
    for part, file in (("train", train), ("test", test)):
        keys = {name: options.get(f"{part}_{name}", options.get(name)) for name in PARTS}
        found.append(_read_file(Path(file).expanduser(), keys))
    most = max(int(arrays.labels.max()) for arrays in found) + 1
    numbers = [str(number) for number in range(most)]
    classes = [unique(arrays.classes or found[0].classes or numbers) for arrays in found]
    first, second = (
        ArrayFileDataset(arrays, names, layout, check) for arrays, names in zip(found, classes, strict=True)
    )
    return first, second


def _read_file(path: Path, keys: Mapping[str, str | None]) -> _Arrays:
    if path.suffix.lower() == ".npz":
        return _read_npz(path, keys)
    if path.suffix.lower() in HDF5:
        return _read_hdf5(path, keys)
    raise UserError(f"{path} is neither an .npz file nor an HDF5 file ({', '.join(HDF5)})")


def _read_npz(path: Path, keys: Mapping[str, str | None]) -> _Arrays:
    try:
        with np.load(path, allow_pickle=False) as file:
            names = _find_keys(path, file.files, keys)
            arrays = {name: file[key] for name, key in names.items()}
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, TypeError, AttributeError) as error:
        reason = "it holds Python objects, which are not read" if "allow_pickle" in str(error) else f"{error}"
        raise UserError(f"{path} cannot be read: {' '.join(reason.split())}") from None
    return _arrays(path, _InMemory(arrays["images"]), arrays)


def _read_hdf5(path: Path, keys: Mapping[str, str | None]) -> _Arrays:
    import h5py

    from spray.store.foreign import open_foreign, reading_errors

    with open_foreign(path) as file, reading_errors(path):
        found: list[str] = []
        file.visititems(lambda name, entry: found.append(name) if isinstance(entry, h5py.Dataset) else None)
        names = _find_keys(path, found, keys)
        images = file[names["images"]]
        arrays = {
            name: (file[key].asstr() if h5py.check_string_dtype(file[key].dtype) else file[key])[...]
            for name, key in names.items()
            if name != "images"
        }
        source = _InHdf5(path, names["images"], images.shape, images.dtype)
    return _arrays(path, source, arrays)


def _find_keys(path: Path, found: list[str], keys: Mapping[str, str | None]) -> dict[str, str]:
    """Return the key of each array that is there; images and labels have to be."""
    names: dict[str, str] = {}
    for name, given in keys.items():
        key = name if given is None else str(given).strip("/")
        if key in found:
            names[name] = key
        elif given is not None or name in ("images", "labels"):
            held = ", ".join(sorted(found)[:20]) or "nothing"
            raise UserError(
                f"{path} has no array {key!r}; it holds {held}; name it with dataset.options={{{name}: KEY}}"
            )
    return names


def _arrays(path: Path, images: _Source, arrays: Mapping[str, np.ndarray]) -> _Arrays:
    """Check what was read."""
    labels = arrays["labels"]
    if not (images.dtype == np.uint8 or images.dtype.kind == "f"):
        raise UserError(f"the images in {path} are {images.dtype}; they must be uint8, or floating point in [0, 1]")
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise UserError(f"the labels in {path} are {labels.dtype} {labels.shape}; they must be whole numbers (N,)")
    if len(images.shape) not in (3, 4) or 0 in images.shape:
        raise UserError(
            f"the images in {path} have shape {images.shape}; it must be (N, C, H, W), (N, H, W, C) or (N, H, W)"
        )
    if len(labels) != images.shape[0]:
        raise UserError(f"{path} holds {images.shape[0]} images, but {len(labels)} labels")
    if labels.min() < 0:
        raise UserError(f"{path} has a label {labels.min()}; classes are numbered from 0")
    names = _texts(arrays.get("names"))
    if names is not None and (len(names) != len(labels) or len(set(names)) != len(names)):
        log.warning("%s: its names are left aside, they are not one of its own for each image", path)
        names = None
    return _Arrays(path, images, labels.astype(np.int64), _texts(arrays.get("classes")), names)


def _failure(error: Exception) -> UnreadableImageError:
    return UnreadableImageError(" ".join(str(error).split()), lasting=not is_of_system(error))


def _texts(array: np.ndarray | None) -> list[str] | None:
    if array is None or array.ndim != 1 or not len(array):
        return None
    values = [value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value) for value in array]
    return [printable(value) for value in values]


def _find_layout(shape: tuple[int, ...], layout: str | None, path: Path) -> tuple[bool, tuple[int, int, int]]:
    """Return whether the channels come last, and (C, H, W)."""
    if len(shape) == 3:
        return False, (1, shape[1], shape[2])
    if layout is None:
        first, last = shape[1] in (1, 3), shape[3] in (1, 3)
        if first == last:
            raise UserError(
                f"the images in {path} have shape {shape}, which does not tell where the channels are; "
                "set dataset.options={layout: channels_first} or channels_last"
            )
        layout = LAYOUTS[0] if first else LAYOUTS[1]
    if layout == LAYOUTS[1]:
        return True, (shape[3], shape[1], shape[2])
    return False, (shape[1], shape[2], shape[3])
