"""Datasets whose images are read and decoded when they are asked for."""

from __future__ import annotations

import hashlib
import logging
import math
import threading
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spray.data import cache
from spray.data.base import ImageDataset, UnreadableSampleError
from spray.data.checking import Check, run_check
from spray.data.decoding import UnreadableImageError, decode, reasons
from spray.data.parallel import MAX_DECODERS, in_threads, quiet_pillow
from spray.data.subset import even_sample
from spray.errors import UserError

log = logging.getLogger(__name__)

CACHE_BYTES = 2 << 30
CHUNK, CHUNK_BYTES = 256, 64 << 20
TRIED = 32
"""Images that are looked at to find out their form."""
SAID = 20
"""Images that were left out, named in the log."""


class PixelMemory:
    """The pixels of images that were used before; memory is taken for those alone.

    Parameters
    ----------
    n : int
        Number of images.
    shape : tuple of int
        (C, H, W) of each.
    dtype : dtype
        uint8 or float32.
    """

    def __init__(self, n: int, shape: tuple[int, int, int], dtype: np.dtype) -> None:
        # The system gives memory to pages that are written to.
        self._pixels = np.empty((n, *shape), dtype=dtype)
        self._known = np.zeros(n, dtype=bool)
        self._lock = threading.Lock()

    def fetch(self, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Write the pixels that are known into `out`; return the places in `rows` of the others."""
        with self._lock:
            known = self._known[rows]
        # Rows that are known never change.
        if known.all():
            np.take(self._pixels, rows, axis=0, out=out)
        else:
            out[known] = self._pixels[rows[known]]
        return np.flatnonzero(~known)

    def store(self, row: int, pixels: np.ndarray) -> None:
        """Remember the pixels of one image."""
        self._pixels[row] = pixels
        with self._lock:
            self._known[row] = True


class DecodedDataset(ImageDataset):
    """Images that are decoded in threads when they are asked for, and kept where memory allows.

    A subclass calls `_start` when it knows how many images there are and what form they have, then `_check`
    (or not), then `_keep`. Rows are all images that were found; an index counts those that were kept.

    Methods may be called by several threads.
    """

    _dtype: np.dtype[Any]

    @abstractmethod
    def _pixels(self, row: int) -> np.ndarray:
        """Return the pixels of an image: uint8 or float32 (C, H, W).

        Raises
        ------
        UnreadableImageError
            Or any other error; its message is the reason then.
        """

    @abstractmethod
    def _place(self, row: int) -> str:
        """Say where an image lies, for messages."""

    def batch(self, indices: np.ndarray) -> Tensor:
        """Return the images at `indices`: float32 (n, C, H, W) in [0, 1].

        Raises
        ------
        UnreadableSampleError
            If an image cannot be read; of several the first one is named.
        """
        indices = np.asarray(indices, dtype=np.int64)
        rows = self._rows[indices]
        pixels, failures = self._read(rows)
        if failures:
            place = min(failures)
            reason, where = str(failures[place]), self._place(int(rows[place]))
            advice = "dataset.check=true leaves such images out"
            if self._checked:
                advice = "it could be when it was checked: restore it, or set another SPRAY_CACHE to check all anew"
            raise UnreadableSampleError(int(indices[place]), reason, f"{where} cannot be read: {reason}; {advice}")
        images = torch.from_numpy(pixels)
        return images.float().div_(255) if images.dtype == torch.uint8 else images

    def _start(
        self,
        n_rows: int,
        image_shape: tuple[int, int, int],
        cache_bytes: int | None = None,
        dtype: type = np.uint8,
    ) -> None:
        self.image_shape = image_shape
        self._dtype = np.dtype(dtype)
        self._checked = False
        self._rows = np.arange(n_rows)
        n_bytes = n_rows * math.prod(image_shape) * self._dtype.itemsize
        fits = n_bytes <= (CACHE_BYTES if cache_bytes is None else cache_bytes)
        self._memory = PixelMemory(n_rows, image_shape, self._dtype) if fits and n_rows else None

    def _check(self, key: str, what: str) -> dict[int, str]:
        """Read every image once; a later start with the same key remembers what became of it."""
        n = len(self._rows)
        check = Check.unknown(n)
        arrays = cache.load("checks", key)
        if arrays is not None:
            try:
                known = Check.from_arrays(arrays)
                check = known if len(known.state) == n else check
            except (KeyError, ValueError):
                log.debug("the cached check of %s is of no use", what)
        return self._run_check(check, lambda: cache.save("checks", key, check.to_arrays()), what)

    def _run_check(self, check: Check, save: Callable[[], None], what: str) -> dict[int, str]:
        self._checked = True

        def read(rows: np.ndarray) -> dict[int, UnreadableImageError]:
            return {int(rows[place]): error for place, error in self._read(rows)[1].items()}

        return run_check(read, check, save, what, self._at_once)

    @property
    def _at_once(self) -> int:
        """Images to read at once: enough for all threads, not too many for the memory."""
        return min(CHUNK, max(MAX_DECODERS, CHUNK_BYTES // max(1, math.prod(self.image_shape) * self._dtype.itemsize)))

    def _hash_some(self, most: int) -> str:
        """Return a hash of the pixels of some images, spread evenly; those that cannot be read count as black."""
        rows = even_sample(len(self._rows), most)
        hashes = []
        for start in range(0, len(rows), self._at_once):
            pixels, failures = self._read(rows[start : start + self._at_once])
            pixels[list(failures)] = 0
            hashes += [hashlib.sha256(image.tobytes()).hexdigest() for image in pixels]
        return hash_of(*hashes)

    def _keep(self, labels: np.ndarray, names: Sequence[str], bad: dict[int, str], what: str) -> np.ndarray:
        """Leave out bad rows; return those that are kept.

        Raises
        ------
        UserError
            If a class has no image left.
        """
        mask = np.ones(len(labels), dtype=bool)
        mask[list(bad)] = False
        self._rows = np.flatnonzero(mask)
        self.labels = labels[self._rows].astype(np.int64)
        self.unreadable = [(names[row], reason) for row, reason in bad.items()]
        counts = np.bincount(self.labels, minlength=len(self.classes))
        for label in np.unique(labels[~mask]).tolist():
            if label >= 0 and counts[label] == 0:
                row = next(row for row in bad if labels[row] == label)
                raise UserError(
                    f"class {self.classes[label]!r} in {what} has no readable image (first: {names[row]}: "
                    f"{bad[row]}); repair its images or remove them"
                )
        for name, reason in self.unreadable[:SAID]:
            log.warning("%s: left out %s: %s", what, name, reason)
        if len(self.unreadable) > SAID:
            log.warning("%s: left out %d more", what, len(self.unreadable) - SAID)
        return self._rows

    def _read(self, rows: np.ndarray) -> tuple[np.ndarray, dict[int, UnreadableImageError]]:
        """Return the pixels of rows, and by its place in `rows` why each failed that did."""
        out = np.empty((len(rows), *self.image_shape), dtype=self._dtype)
        missing = np.arange(len(rows)) if self._memory is None else self._memory.fetch(rows, out)
        failures: dict[int, UnreadableImageError] = {}

        def attempt(place: int) -> None:
            row = int(rows[place])
            try:
                with reasons():
                    pixels = self._pixels(row)
                self._require_form(pixels)
            except UnreadableImageError as error:
                failures[place] = error
                return
            out[place] = pixels
            if self._memory is not None:
                self._memory.store(row, pixels)

        if len(missing):
            with quiet_pillow():
                in_threads(attempt, missing.tolist())
        return out, failures

    def _require_form(self, pixels: np.ndarray) -> None:
        if pixels.shape != self.image_shape:
            raise UnreadableImageError(
                f"it is {_form(pixels.shape)}, the first image {_form(self.image_shape)}; set dataset.image_size"
            )


class EncodedDataset(DecodedDataset):
    """Images that lie somewhere as the bytes of image files."""

    _size: int | None
    _channels: int

    @abstractmethod
    def _content(self, row: int) -> bytes:
        """Return the bytes of an image file."""

    def _pixels(self, row: int) -> np.ndarray:
        return decode(self._content(row), self._size, self._channels)

    def _find_shape(self, n_rows: int, what: str) -> tuple[int, int, int]:
        """Return the shape of the images: of the first one that can be read where no size is set.

        Raises
        ------
        UserError
            If none of the first images can be read.
        """
        if self._size is not None:
            return self._channels, self._size, self._size
        reason = ""
        for row in even_sample(n_rows, TRIED).tolist():
            try:
                with reasons(), quiet_pillow():
                    channels, height, width = self._pixels(row).shape
                    return channels, height, width
            except UnreadableImageError as error:
                reason = reason or str(error)
        raise UserError(f"no image in {what} can be read (first: {reason})")


def hash_of(*parts: bytes | str | np.ndarray) -> str:
    """Return the SHA-256 of parts, each with its length, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype.str}{part.shape};".encode())
            digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
            continue
        content = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        digest.update(f"{len(content)};".encode())
        digest.update(content)
    return digest.hexdigest()


def _form(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{height}×{width} with {channels} channel{'s' * (channels != 1)}"
