"""The user's own images: a folder for each class.

Classes, samples and their order are those of torchvision's ``ImageFolder``; GIF files count as images too.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spray.data.base import ImageDataset
from spray.data.decoding import EXTENSIONS, UnreadableImageError, decode
from spray.errors import UserError

CACHE_BYTES = 2 << 30
MAX_THREADS = 16


class FolderDataset(ImageDataset):
    """Images in a class-per-folder tree, all brought to one size and to RGB.

    Every file is decoded once when the dataset is made. Those that cannot be decoded are left out and listed
    in `unreadable`. How modes are converted and sizes are changed: see `spray.data.decoding.decode`.

    Parameters
    ----------
    folder : str or Path
        Holds one folder for each class. Links are followed.
    image_size : int
        Height and width that the images are given.
    cache_bytes : int, default 2 GiB
        The decoded images are kept in memory where they take no more than this; else each pass decodes anew.

    Attributes
    ----------
    unreadable : list of (str, str)
        The files left out, relative to the folder, each with the reason.

    Raises
    ------
    UserError
        If the folder is missing, has no class folders, or a class has no (readable) image.
    """

    def __init__(self, folder: str | Path, image_size: int, cache_bytes: int = CACHE_BYTES) -> None:
        if image_size < 1:
            raise UserError(f"dataset.image_size={image_size} must be at least 1")
        self.folder = Path(folder).expanduser()
        self.classes = tuple(_printable(name) for name in class_folders(self.folder))
        self.image_shape = (3, image_size, image_size)
        files = list(list_images(self.folder))
        self.fingerprint = _fingerprint(self.folder, files, self.classes, image_size)

        n_bytes = len(files) * 3 * image_size**2
        cache = np.empty((len(files), *self.image_shape), dtype=np.uint8) if n_bytes <= cache_bytes else None
        reasons = self._decode_all([path for path, _ in files], cache)
        kept = [row for row, reason in enumerate(reasons) if reason is None]
        names = [_printable(path) for path, _ in files]
        self.unreadable = [(names[row], reason) for row, reason in enumerate(reasons) if reason is not None]
        self.names = [names[row] for row in kept]
        self.labels = np.array([files[row][1] for row in kept], dtype=np.int64)
        self._paths = [files[row][0] for row in kept]
        self._cache = cache
        self._cache_rows = np.array(kept, dtype=np.int64)
        self._require_images_of_each_class()

    def batch(self, indices: np.ndarray) -> Tensor:
        """Return the images at `indices`: float32 (n, 3, image_size, image_size) in [0, 1].

        Raises
        ------
        UserError
            If a file that was readable when the dataset was made no longer is.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if self._cache is not None:
            pixels = self._cache[self._cache_rows[indices]]
        else:
            pixels = np.empty((len(indices), *self.image_shape), dtype=np.uint8)
            paths = [self._paths[index] for index in indices]
            for path, reason in zip(paths, self._decode_all(paths, pixels), strict=True):
                if reason is not None:
                    raise UserError(f"{self.folder / path} changed while it was in use: {reason}; start again")
        return torch.from_numpy(pixels).float().div_(255)

    def _decode_all(self, paths: list[str], out: np.ndarray | None) -> list[str | None]:
        """Decode files into the rows of `out`, where given; return why each failed, None where it did not."""

        def attempt(row: int) -> str | None:
            try:
                pixels = decode(self.folder / paths[row], self.image_shape[1])
            except UnreadableImageError as error:
                return str(error)
            if out is not None:
                out[row] = pixels
            return None

        n_threads = min(MAX_THREADS, _cpu_count(), max(len(paths), 1))
        with warnings.catch_warnings():
            # Of flaws that do no harm to the pixels, and without the file's name.
            warnings.filterwarnings("ignore", module="PIL")
            # Pillow decodes and resizes outside of the interpreter's lock.
            with ThreadPoolExecutor(max_workers=n_threads) as pool:
                return list(pool.map(attempt, range(len(paths))))

    def _require_images_of_each_class(self) -> None:
        counts = np.bincount(self.labels, minlength=len(self.classes))
        for name, count in zip(self.classes, counts, strict=True):
            if count == 0:
                path, reason = next(entry for entry in self.unreadable if entry[0].startswith(f"{name}/"))
                raise UserError(
                    f"class {name!r} in {self.folder} has no readable image (first: {path}: {reason}); "
                    "repair its images or remove its folder"
                )


def class_folders(folder: Path) -> list[str]:
    """Return the names of the folders in `folder`, in alphabetical order: the classes.

    Raises
    ------
    UserError
        If there is no such folder, or no folder in it.
    """
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir())
    except FileNotFoundError:
        raise UserError(f"there is no folder {folder}; give one that holds a folder for each class") from None
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from None
    if not names:
        raise UserError(f"{folder} holds no folders; put the images of each class into a folder of their own")
    return names


def list_images(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield (path inside of `folder`, class index) of each image, in the order of `ImageFolder`.

    As there, hidden files and folders count and links are followed, but not a link to a folder around it.

    Raises
    ------
    UserError
        If a class has no file that is named like an image.
    """
    for index, name in enumerate(class_folders(folder)):
        n_images = 0
        for parent, files in sorted(_walk(folder / name)):
            for file in sorted(files):
                if file.lower().endswith(EXTENSIONS):
                    n_images += 1
                    yield os.path.relpath(os.path.join(parent, file), folder), index
        if n_images == 0:
            allowed = " ".join(EXTENSIONS)
            name = _printable(name)
            raise UserError(f"class {name!r} in {folder} has no images ({allowed}); add some or remove its folder")


def _walk(top: Path) -> Iterator[tuple[str, list[str]]]:
    for parent, folders, files in os.walk(top, followlinks=True):
        folders[:] = [name for name in folders if not _leads_upwards(os.path.join(parent, name))]
        yield parent, files


def _leads_upwards(path: str) -> bool:
    """Whether a path is a link to a folder around it: following it would find each image again and again."""
    if not os.path.islink(path):
        return False
    target, here = os.path.realpath(path), os.path.realpath(os.path.dirname(path))
    return os.path.commonpath([target, here]) == target


def _fingerprint(folder: Path, files: Iterable[tuple[str, int]], classes: tuple[str, ...], size: int) -> str:
    digest = hashlib.sha256(json.dumps([size, classes]).encode())
    for path, _ in files:
        try:
            status = os.stat(folder / path)
            state = [status.st_size, status.st_mtime_ns, stat.S_ISREG(status.st_mode)]
        except OSError:
            state = []
        digest.update(json.dumps([path, state]).encode())
    return digest.hexdigest()


def _printable(path: str) -> str:
    """Return a path with slashes, and with the bytes that are no UTF-8 written as escapes."""
    return Path(path).as_posix().encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _cpu_count() -> int:
    # In a container or a batch job the process may use fewer CPUs than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
