"""The images of a ViRelAy project: an HDF5 file or a folder of pictures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from PIL import Image

from spray.data.base import ImageDataset
from spray.data.items import ItemDataset
from spray.data.listed import printable
from spray.errors import UserError
from spray.store.foreign import open_foreign, reading_errors
from spray.virelay_heatmaps import label_number
from spray.virelay_project import numbered

if TYPE_CHECKING:
    from spray.virelay_project import Project

LOOKED_AT = 64
"""Images whose values tell the range of all."""
RANGES = ((-1.0, 1.0), (0.0, 1.0), (0.0, 255.0))


def project_images(project: Project) -> ImageDataset:
    """Return a project's images, as `Project.images` says."""
    kind, place = project.dataset.get("type"), project.path.parent / str(project.dataset.get("path"))
    if kind == "hdf5":
        items: _InHdf5 | _InFolder = _InHdf5(place)
    elif kind == "image_directory":
        items = _InFolder(place, project)
    else:
        raise UserError(f"{project.path}: dataset.type={kind} is unknown; ViRelAy has hdf5 and image_directory")
    present = sorted(set(items.numbers))
    names = {label.index: label.name for label in project.labels}
    if unknown := [number for number in present if number not in names]:
        raise UserError(f"{project.path}: samples have the label {unknown[0]}, which its label map lacks")
    items.targets = np.searchsorted(present, items.numbers).astype(np.int64)
    classes = [names[number] for number in present]
    files = [project.path, *project.attributions, *(path for paths in project.analyses.values() for path in paths)]
    return ItemDataset(
        items,
        str(place),
        None,
        classes=classes,
        identity="\n".join(numbered(files)),
        check=False,  # a sample that is left out would number the others anew
        names=items.names,
        channels=3,
    )


class _InHdf5:
    """`/data` and `/label`: arrays, or groups with an entry for each sample."""

    targets: np.ndarray

    def __init__(self, path: Path) -> None:
        self._file = open_foreign(path)
        with reading_errors(path):
            for name in ("data", "label"):
                if name not in self._file:
                    raise UserError(f"{path} has no /{name}, which a dataset of ViRelAy has")
            data, label = self._file["data"], self._file["label"]
            self._data = data
            self._keys = sorted(data) if isinstance(data, h5py.Group) else None
            n = len(data)
            if len(label) != n or not n:
                raise UserError(f"{path} holds {n} images, but {len(label)} labels")
            entries = (label[key][()] for key in sorted(label)) if isinstance(label, h5py.Group) else label[:]
            numbers = [label_number(np.asarray(value)) for value in entries]
        if None in numbers:
            raise UserError(
                f"{path}: sample {numbers.index(None)} has several labels or none; spray ranks samples of one class"
            )
        self.numbers = [number for number in numbers if number is not None]
        self.names = self._keys or [f"{row:0{len(str(n - 1))}d}" for row in range(n)]
        looked = [self._values(row) for row in np.unique(np.linspace(0, n - 1, LOOKED_AT).astype(int))]
        shape = looked[0].shape
        if len(shape) != 3 or shape[0 if int(np.argmin(shape)) == 0 else 2] not in (1, 3):
            raise UserError(f"{path}: its images have shape {shape}; ViRelAy's are (C, H, W) or (H, W, C), C = 1 or 3")
        ends = min(float(image.min()) for image in looked), max(float(image.max()) for image in looked)
        self._low, self._high = min(RANGES, key=lambda ends_: abs(ends_[0] - ends[0]) + abs(ends_[1] - ends[1]))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        values = self._values(row)
        if int(np.argmin(values.shape)) == 0:
            values = np.moveaxis(values, 0, -1)
        if values.dtype != np.uint8:
            share = (values.astype(np.float64) - self._low) / (self._high - self._low)
            values = np.rint(share.clip(0, 1) * 255).astype(np.uint8)
        return np.ascontiguousarray(values), int(self.targets[row])

    def _values(self, row: int) -> np.ndarray:
        return np.asarray(self._data[self._keys[row]][()] if self._keys else self._data[row])


class _InFolder:
    """Pictures below a folder, in the order of their paths; the class stands in the path."""

    targets: np.ndarray

    def __init__(self, root: Path, project: Project) -> None:
        options: dict[str, Any] = dict(project.dataset)
        listed = Path(f"{root}_paths.txt")
        if listed.is_file():
            lines = listed.read_text(encoding="utf-8").splitlines()
            self._paths = sorted(root.parent / line.strip() for line in lines if line.strip())
        else:
            self._paths = sorted(path for path in root.glob("**/*.*") if path.is_file())
        if not self._paths:
            raise UserError(f"there are no images in {root}")
        self._size = int(options["input_width"]), int(options["input_height"])
        self._methods = str(options.get("down_sampling_method")), str(options.get("up_sampling_method"))
        numbers = {label.category: label.index for label in project.labels}
        by_index, by_id = options.get("label_index_regex"), options.get("label_word_net_id_regex")
        try:
            pattern = re.compile(str(by_index or by_id))
        except re.error as error:
            raise UserError(f"{project.path}: the regular expression of its labels is wrong: {error}") from None
        self.numbers = []
        for path in self._paths:
            found = pattern.match(str(path))
            text = found.group(1) if found and pattern.groups else None
            number = int(text) if by_index and text and text.isdigit() else numbers.get(text or "")
            if number is None:
                raise UserError(f"{path}: its class can't be told by {pattern.pattern!r}")
            self.numbers.append(number)
        self.names = [printable(path.relative_to(root.parent).as_posix()) for path in self._paths]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, row: int) -> tuple[Image.Image, int]:
        with Image.open(self._paths[row]) as picture:
            image = picture.convert("RGB")
        if image.size != self._size:
            method = self._methods[0 if image.size[0] > self._size[0] or image.size[1] > self._size[1] else 1]
            if method != "resize":
                raise UserError(
                    f"it is {image.size[0]} x {image.size[1]}, and spray brings images to the project's size by resize "
                    f"only, not by {method}"
                )
            image = image.resize(self._size)
        return image, int(self.targets[row])
