"""Fashion-MNIST: 70,000 real photographs of clothes in ten classes, 28×28, grey.

Xiao, Rasul and Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms",
2017.
"""

from __future__ import annotations

import gzip
import os
import socket
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np

from spray.data.arrays import ArrayDataset
from spray.data.cache import cache_folder
from spray.errors import UserError

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
HOW_TO_GET_IT = "apt-get install dataset-fashion-mnist, or let it be downloaded, or dataset.train=FOLDER of its files"
SIDE = 28
DOWNLOAD_TIMEOUT = 30.0


def fashion_mnist(folder: Path | None = None) -> tuple[ArrayDataset, ArrayDataset]:
    """Return the training images (60,000) and the test images (10,000).

    Parameters
    ----------
    folder : Path, optional
        Where the four idx files lie, compressed or not. If not given: the folder of Debian's package, else
        ``$SPRAY_DATA``, else the cache (see `spray.data.cache.cache_folder`), into which torchvision downloads
        what is missing.

    Returns
    -------
    train, test : ArrayDataset
        Images of shape (1, 28, 28).

    Raises
    ------
    UserError
        If the files are nowhere to be had, or one of them is damaged.
    """
    found = _find() if folder is None else _holding(folder.expanduser())
    if found is None:
        raise UserError(f"no Fashion-MNIST files in {folder}: {HOW_TO_GET_IT}")
    return _part(found, "train"), _part(found, "t10k")


def read_idx(path: Path, n_axes: int) -> np.ndarray:
    """Read an idx file of unsigned bytes, compressed (``.gz``) or not.

    Parameters
    ----------
    path : Path
        The file.
    n_axes : int
        How many axes it must have: 1 for labels, 3 for grey images.

    Returns
    -------
    ndarray of uint8
        The array with the shape that the file's header states.

    Raises
    ------
    UserError
        If the file cannot be read, is no idx file of bytes, or is shorter or longer than its header says.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * n_axes)
            if len(header) < 4 + 4 * n_axes:
                raise UserError(f"{path} is truncated: it ends inside its header; get it again")
            # Magic number: two zeros, the type (8 is an unsigned byte), the number of axes.
            if header[:4] != bytes([0, 0, 8, n_axes]):
                raise UserError(f"{path} is no idx file of bytes with {n_axes} axes; get it again")
            shape = struct.unpack(f">{n_axes}I", header[4:])
            content = file.read()
    except EOFError:
        raise UserError(f"{path} is truncated: its compressed data ends too early; get it again") from None
    except (OSError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}; get it again") from None
    size = int(np.prod(shape, dtype=object))
    if len(content) != size:
        what = "truncated" if len(content) < size else "too long"
        raise UserError(f"{path} is {what}: {len(content)} bytes of data, its header says {size}; get it again")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def _part(folder: Path, prefix: str) -> ArrayDataset:
    image_file = _file(folder, f"{prefix}-images-idx3-ubyte")
    label_file = _file(folder, f"{prefix}-labels-idx1-ubyte")
    if image_file is None or label_file is None:
        raise UserError(f"{folder} lacks the {prefix} images or labels of Fashion-MNIST: {HOW_TO_GET_IT}")
    images, labels = read_idx(image_file, 3), read_idx(label_file, 1)
    if images.shape[1:] != (SIDE, SIDE) or len(images) == 0:
        raise UserError(f"{image_file} holds an array {images.shape}, not images of {SIDE}×{SIDE}; get it again")
    if len(images) != len(labels):
        raise UserError(f"{image_file} holds {len(images)} images, {label_file.name} {len(labels)} labels")
    if labels.max() >= len(CLASSES):
        raise UserError(f"{label_file} holds a label {labels.max()}; Fashion-MNIST has {len(CLASSES)} classes")
    name = "test" if prefix == "t10k" else prefix
    return ArrayDataset(images[:, None], labels, CLASSES, [f"{name}/{i:05d}" for i in range(len(images))])


def _file(folder: Path, name: str) -> Path | None:
    candidates = (folder / name, folder / f"{name}.gz")
    return next((path for path in candidates if path.is_file()), None)


def _holding(folder: Path) -> Path | None:
    """Return the folder itself or the one inside where torchvision puts its files."""
    candidates = (folder, folder / "raw", folder / "FashionMNIST" / "raw")
    return next((path for path in candidates if _file(path, "train-images-idx3-ubyte")), None)


def _find() -> Path:
    if found := _holding(DEBIAN_FOLDER):
        return found
    own = os.environ.get("SPRAY_DATA")
    cache = Path(own).expanduser() if own else cache_folder()
    return _holding(cache) or _download(cache)


def _download(cache: Path) -> Path:
    from torchvision.datasets import FashionMNIST

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Renamed when complete, so that an interrupted download is never taken for the data.
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            FashionMNIST(temporary, download=True)
            if _holding(cache) is None:
                (Path(temporary) / "FashionMNIST").rename(cache / "FashionMNIST")
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"Fashion-MNIST could not be downloaded ({reason}): {HOW_TO_GET_IT}") from None
    finally:
        socket.setdefaulttimeout(timeout)
    return cache / "FashionMNIST" / "raw"
