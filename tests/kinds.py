"""Every kind of dataset, made small on the fly from images whose pixels are known."""

from __future__ import annotations

import io
import json
import shutil
import struct
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from spray.data.base import ImageDataset
from spray.data.loading import DATASETS
from spray.errors import UserError

CLASSES = ("ant", "bee", "cat")
SIDE = 12
LABELS = np.arange(10) % 2
"""Labels of ten images in two classes."""
Part = tuple[np.ndarray, np.ndarray]
"""Images uint8 (N, C, H, W) and labels (N,)."""


def options(name: str, **changes: object) -> SimpleNamespace:
    """Return the configuration of a dataset."""
    defaults: dict[str, Any] = {"train": None, "test": None, "image_size": None, "mean": [0.5], "std": [0.5]}
    defaults |= {"factory": None, "options": None, "check": True, "plant": {}, "name": name}
    return SimpleNamespace(**(defaults | changes))


def build(name: str, **changes: object) -> tuple[ImageDataset, ImageDataset]:
    """Return training and test images of a dataset."""
    return DATASETS.get(name)(options(name, **changes))


def refused(function: Callable[[], object]) -> str:
    """Return the one line that a mistake is told in."""
    with pytest.raises(UserError) as caught:
        function()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def images(n: int = 10, shape: tuple[int, ...] = (3, 8, 8)) -> np.ndarray:
    """Return random images of bytes, always the same."""
    return np.random.default_rng(3).integers(0, 256, (n, *shape), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    """Return an image (C, H, W) as the bytes of a file."""
    buffer = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(buffer, "png")
    return buffer.getvalue()


@dataclass(frozen=True)
class Kind:
    """How a dataset is written, and what is known of it.

    `write` puts two parts into a folder and returns the configuration; `spoil` makes some training images unreadable.
    """

    write: Callable[[Path, Part, Part], SimpleNamespace]
    spoil: Callable[[Path, list[int]], None] | None = None
    needs: tuple[str, ...] = ()
    channels: int = 3
    side: int = SIDE
    n_classes: int = len(CLASSES)
    n: tuple[int, int] = (24, 12)
    fixed: bool = field(default=False)
    """Whether its images are its own, whatever is to be written."""

    def parts(self, seed: int = 0) -> tuple[Part, Part]:
        """Return training and test images, ordered by class."""
        rng = np.random.default_rng(seed)

        def part(n: int) -> Part:
            shape = (n, self.channels, self.side, self.side)
            return rng.integers(0, 256, shape, dtype=np.uint8), np.sort(np.arange(n) % self.n_classes)

        return part(self.n[0]), part(self.n[1])


def write_tree(folder: Path, part: Part, classes: tuple[str, ...] = CLASSES, ending: str = "png") -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for index, (image, label) in enumerate(zip(*part, strict=True)):
        path = folder / classes[label] / f"{index:03d}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(image))


def cut(path: Path) -> None:
    """Truncate an image's file."""
    path.write_bytes(path.read_bytes()[:60])


def image_folder(folder: Path, train: Part, test: Part) -> SimpleNamespace:
    write_tree(folder / "train", train)
    write_tree(folder / "test", test)
    return options("image_folder", train=str(folder / "train"), test=str(folder / "test"), image_size=SIDE)


def spoil_tree(folder: Path, rows: list[int]) -> None:
    for row in rows:
        cut(next((folder / "train").glob(f"*/{row:03d}.png")))


def fashion_mnist(folder: Path, train: Part, test: Part) -> SimpleNamespace:
    write_idx(folder, train, test)
    return options("fashion_mnist", train=str(folder))


def write_idx(folder: Path, train: Part, test: Part) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, (images, labels) in (("train", train), ("t10k", test)):
        head = struct.pack(">4I", 0x803, *images[:, 0].shape)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        head = struct.pack(">2I", 0x801, len(labels))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(head + labels.astype(np.uint8).tobytes())


def torchvision_mnist(folder: Path, train: Part, test: Part) -> SimpleNamespace:
    write_idx(folder / "MNIST/raw", train, test)
    return options("torchvision", options={"name": "MNIST", "root": str(folder)})


def torchvision_files(folder: Path, train: Part, test: Part) -> SimpleNamespace:
    # A dataset that is a tree of files, in parts called train, valid and test.
    write_tree(folder / "country211/train", train, ending="jpg")
    write_tree(folder / "country211/test", test, ending="jpg")
    return options("torchvision", options={"name": "Country211", "root": str(folder)})


def spoil_torchvision(folder: Path, rows: list[int]) -> None:
    for row in rows:
        cut(next((folder / "country211/train").glob(f"*/{row:03d}.jpg")))


def torchvision_fake(folder: Path, train: Part, test: Part) -> SimpleNamespace:
    own = {"name": "FakeData", "image_size": [3, SIDE, SIDE], "num_classes": 3}
    parts = {"train": {"size": 24}, "test": {"size": 12, "random_offset": 100}}
    return options("torchvision", options=own | parts)


def arrays_npz(folder: Path, train: Part, test: Part) -> SimpleNamespace:
    for name, (images, labels) in (("train", train), ("test", test)):
        np.savez(folder / f"{name}.npz", images=images, labels=labels, classes=CLASSES)
    return options("arrays", train=str(folder / "train.npz"), test=str(folder / "test.npz"))


def arrays_npz_float(folder: Path, train: Part, test: Part) -> SimpleNamespace:
    content, keys = {}, {}
    for name, (images, labels) in (("train", train), ("test", test)):
        content |= {f"x_{name}": images.astype(np.float64) / 255, f"y_{name}": labels}
        keys |= {f"{name}_images": f"x_{name}", f"{name}_labels": f"y_{name}"}
    np.savez(folder / "both.npz", **content)
    return options("arrays", train=str(folder / "both.npz"), test=str(folder / "both.npz"), options=keys)


def spoil_npz_float(folder: Path, rows: list[int]) -> None:
    with np.load(folder / "both.npz") as file:
        content = dict(file)
    content["x_train"][rows, 0, 0, 0] = np.nan
    np.savez(folder / "both.npz", **content)


def arrays_hdf5(folder: Path, train: Part, test: Part) -> SimpleNamespace:
    for name, (images, labels) in (("train", train), ("test", test)):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            last = images.transpose(0, 2, 3, 1)
            file.create_dataset("in/x", data=last, chunks=(1, *last.shape[1:]), compression="gzip", fletcher32=True)
            file["y"] = labels.astype(np.uint8)
            file["classes"] = list(CLASSES)
            file["names"] = [f"{name} {row}" for row in range(len(labels))]
    keys = {"images": "in/x", "labels": "y"}
    return options("arrays", train=str(folder / "train.h5"), test=str(folder / "test.h5"), options=keys)


def spoil_hdf5(folder: Path, rows: list[int]) -> None:
    with h5py.File(folder / "train.h5") as file:
        chunks = [file["in/x"].id.get_chunk_info(row) for row in rows]
    content = bytearray((folder / "train.h5").read_bytes())
    for chunk in chunks:
        content[chunk.byte_offset + chunk.size // 2] ^= 0xFF
    (folder / "train.h5").write_bytes(content)


def huggingface(folder: Path, train: Part, test: Part, spoiled: list[int] | None = None) -> SimpleNamespace:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, disable_progress_bars

    disable_progress_bars()

    def table(part: Part, spoiled: list[int]) -> Dataset:
        contents = [png(image)[: 60 if row in spoiled else None] for row, image in enumerate(part[0])]
        features = Features({"id": ClassLabel(names=["x"]), "img": Image(), "label": ClassLabel(names=list(CLASSES))})
        rows = {"id": [0] * len(part[1]), "img": [{"bytes": content, "path": None} for content in contents]}
        return Dataset.from_dict(rows | {"label": part[1].tolist()}, features=features)

    # Not in place: the library keeps the old files mapped.
    shutil.rmtree(folder / "saved", ignore_errors=True)
    DatasetDict(train=table(train, spoiled or []), test=table(test, [])).save_to_disk(str(folder / "saved"))
    np.savez(folder / "parts.npz", x=train[0], y=train[1], tx=test[0], ty=test[1])
    return options("huggingface", train=str(folder / "saved"))


def spoil_huggingface(folder: Path, rows: list[int]) -> None:
    with np.load(folder / "parts.npz") as file:
        huggingface(folder, (file["x"], file["y"]), (file["tx"], file["ty"]), rows)


def webdataset(folder: Path, train: Part, test: Part) -> SimpleNamespace:
    for name, (images, labels) in (("train", train), ("test", test)):
        halves = np.array_split(np.arange(len(labels)), 2)
        for number, rows in enumerate(halves):
            with tarfile.open(folder / f"{name}-{number}.tar", "w") as tar:
                for row in rows:
                    label = str(labels[row]) if number else json.dumps({"label": int(labels[row])})
                    add(tar, f"sub/{row:03d}.{'cls' if number else 'json'}", label.encode())
                    add(tar, f"sub/{row:03d}.png", png(images[row]))
    train_files, test_files = str(folder / "train-{0..1}.tar"), str(folder / "test-*.tar")
    return options("webdataset", train=train_files, test=test_files, options={"classes": list(CLASSES)})


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def spoil_webdataset(folder: Path, rows: list[int]) -> None:
    for path in folder.glob("train-*.tar"):
        with tarfile.open(path) as tar:
            places = [member.offset_data for member in tar if member.name in {f"sub/{row:03d}.png" for row in rows}]
        content = bytearray(path.read_bytes())
        for place in places:
            content[place : place + 40] = bytes(40)
        path.write_bytes(content)


FACTORY = """
import json
from pathlib import Path
import numpy as np
import torch
from PIL import Image

class Data:
    classes = ["ant", "bee", "cat"]

    def __init__(self, path, form):
        with np.load(path) as file:
            self.images, labels, self.bad = file["images"], file["labels"], file["bad"].tolist()
        self.form, self._own = form, labels.tolist()
        if form != "tensor":
            self.targets = self._own

    def __len__(self):
        return len(self._own)

    def __getitem__(self, row):
        if row in self.bad:
            raise KeyError(f"no {row}")
        image = self.images[row]
        if self.form == "tensor":
            return torch.from_numpy(image).float() / 255, torch.tensor(self._own[row])
        image = image.transpose(1, 2, 0)
        return (image if self.form == "array" else Image.fromarray(image)), self._own[row]

def load(folder, form):
    return tuple(Data(Path(folder, f"{part}.npz"), form) for part in ("train", "test"))
"""


def factory(form: str) -> Callable[[Path, Part, Part], SimpleNamespace]:
    def write(folder: Path, train: Part, test: Part) -> SimpleNamespace:
        (folder / "my_data.py").write_text(FACTORY)
        for name, (images, labels) in (("train", train), ("test", test)):
            np.savez(folder / f"{name}.npz", images=images, labels=labels, bad=np.zeros(0, dtype=int))
        own = {"folder": str(folder), "form": form}
        return options("factory", factory=f"{folder / 'my_data.py'}:load", options=own)

    return write


def spoil_factory(folder: Path, rows: list[int]) -> None:
    with np.load(folder / "train.npz") as file:
        content = dict(file)
    np.savez(folder / "train.npz", **(content | {"bad": np.array(rows)}))


def photos(folder: Path, train: Part, test: Part) -> SimpleNamespace:
    return options("photos")


KINDS: dict[str, Kind] = {
    "image_folder": Kind(image_folder, spoil_tree),
    "photos": Kind(photos, fixed=True),
    "fashion_mnist": Kind(fashion_mnist, channels=1, side=28, n_classes=10, n=(40, 20)),
    "torchvision/MNIST": Kind(torchvision_mnist, channels=1, side=28, n_classes=10, n=(40, 20)),
    "torchvision/Country211": Kind(torchvision_files, spoil_torchvision),
    "torchvision/FakeData": Kind(torchvision_fake, fixed=True),
    "arrays/npz": Kind(arrays_npz),
    "arrays/npz of floats": Kind(arrays_npz_float, spoil_npz_float),
    "arrays/HDF5": Kind(arrays_hdf5, spoil_hdf5),
    "huggingface": Kind(huggingface, spoil_huggingface, needs=("datasets",)),
    "webdataset": Kind(webdataset, spoil_webdataset),
    "factory/images": Kind(factory("image"), spoil_factory),
    "factory/arrays": Kind(factory("array"), spoil_factory),
    "factory/tensors": Kind(factory("tensor"), spoil_factory),
}
