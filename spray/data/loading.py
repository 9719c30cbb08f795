"""From a dataset's configuration to its training and test images."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

from spray.data.base import ImageDataset
from spray.data.folder import FolderDataset, class_folders
from spray.errors import UserError
from spray.registry import Registry

log = logging.getLogger(__name__)


class DatasetOptions(Protocol):
    """What is read of the configuration `dataset`."""

    @property
    def train(self) -> str | None:
        """Where the training images are: a folder, a file or a pattern."""

    @property
    def test(self) -> str | None:
        """Where the test images are."""

    @property
    def image_size(self) -> int | None:
        """Height and width of the images; None for those that the dataset has."""

    @property
    def factory(self) -> str | None:
        """The user's function that returns the images: ``FILE.py:FUNCTION``."""

    @property
    def options(self) -> Any:
        """What else the kind of dataset takes: a mapping, or None."""

    @property
    def check(self) -> bool:
        """Whether every image is read once, to leave out those that cannot be, before anything starts."""

    @property
    def mean(self) -> Sequence[float]:
        """Mean of the channels."""

    @property
    def std(self) -> Sequence[float]:
        """Standard deviation of the channels."""


Builder = Callable[[DatasetOptions], tuple[ImageDataset, ImageDataset]]

DATASETS: Registry[Builder] = Registry("dataset")
"""Builders by `dataset.name`: each returns training and test images that passed `validate`."""


@DATASETS.register("photos")
def _photos(options: DatasetOptions) -> tuple[ImageDataset, ImageDataset]:
    from spray.data.photos import photos

    own = "the dataset photos has its own images; take experiment=image_folder"
    _refuse(options, ("train", "test"), own)
    _read_options(options, "photos")
    return validate(*photos(), options)


@DATASETS.register("fashion_mnist")
def _fashion_mnist(options: DatasetOptions) -> tuple[ImageDataset, ImageDataset]:
    from spray.data.fashion_mnist import fashion_mnist

    if options.test not in (None, options.train):
        raise UserError(f"dataset.test={options.test}: Fashion-MNIST takes one folder, dataset.train, for both parts")
    _read_options(options, "fashion_mnist")
    folder = None if options.train is None else Path(options.train)
    return validate(*fashion_mnist(folder), options)


@DATASETS.register("image_folder")
def _image_folder(options: DatasetOptions) -> tuple[ImageDataset, ImageDataset]:
    _read_options(options, "image_folder")
    train, test = _places(options, "DIR with a folder for each class")
    if options.image_size is None:
        raise UserError("dataset.image_size is not set; give the height and width that the model takes, such as 224")
    train_folder, test_folder = Path(train).expanduser(), Path(test).expanduser()
    # Before all images are decoded, which can take long.
    _require_same_classes(class_folders(train_folder), class_folders(test_folder))
    parts = [FolderDataset(folder, options.image_size, check=options.check) for folder in (train_folder, test_folder)]
    for folder, part in zip((train_folder, test_folder), parts, strict=True):
        log.info("%s: %d images, %d files left out", folder, len(part), len(part.unreadable))
    return validate(parts[0], parts[1], options)


@DATASETS.register("torchvision")
def _torchvision(options: DatasetOptions) -> tuple[ImageDataset, ImageDataset]:
    from spray.data.torchvision_data import torchvision_data

    _refuse(options, ("train", "test"), "where the files of torchvision are is dataset.options={root: DIR}")
    own = _read_options(options, "torchvision", None)
    return validate(*torchvision_data(own, _image_size(options), options.check), options)


@DATASETS.register("arrays")
def _arrays(options: DatasetOptions) -> tuple[ImageDataset, ImageDataset]:
    from spray.data.array_files import OPTIONS, array_files

    own = _read_options(options, "arrays", OPTIONS)
    train, test = _places(options, "FILE.npz or FILE.h5", own)
    return validate(*array_files(train, test, own, options.check), options)


@DATASETS.register("huggingface")
def _huggingface(options: DatasetOptions) -> tuple[ImageDataset, ImageDataset]:
    from spray.data.huggingface import OPTIONS, huggingface_data

    own = _read_options(options, "huggingface", OPTIONS)
    if not options.train:
        raise UserError("dataset.train is not set; give dataset.train=DIR that Dataset.save_to_disk wrote")
    if options.test is not None and not own:
        _warn_if_same(options.train, options.test)
    return validate(*huggingface_data(options.train, options.test, own, _image_size(options), options.check), options)


@DATASETS.register("webdataset")
def _webdataset(options: DatasetOptions) -> tuple[ImageDataset, ImageDataset]:
    from spray.data.webdataset import OPTIONS, webdataset

    own = _read_options(options, "webdataset", OPTIONS)
    train, test = _places(options, "FILES, such as 'shards/train-{000..099}.tar'")
    return validate(*webdataset(train, test, own, _image_size(options), options.check), options)


@DATASETS.register("virelay")
def _virelay(options: DatasetOptions) -> tuple[ImageDataset, ImageDataset]:
    from spray.virelay_project import read_project

    _read_options(options, "virelay", ("analysis",))
    _refuse(options, ("test", "image_size"), "a project of ViRelAy has its own images")
    if not options.train:
        raise UserError("dataset.train is not set; give dataset.train=DIR/project.yaml of a project of ViRelAy")
    images = read_project(options.train).images()
    if len(images.classes) < 2:
        raise UserError(f"{options.train} has samples of one class only ({images.classes[0]}); it takes at least two")
    # There are no others, and nothing is tested on them.
    return images, images


@DATASETS.register("factory")
def _factory(options: DatasetOptions) -> tuple[ImageDataset, ImageDataset]:
    from spray.data.factory_data import factory_data

    if not options.factory:
        raise UserError("dataset.factory is not set; give dataset.factory=FILE.py:FUNCTION")
    own = _read_options(options, "factory", None)
    folders = {"train": options.train, "test": options.test}
    return validate(*factory_data(options.factory, own, _image_size(options), options.check, folders), options)


def _read_options(options: DatasetOptions, kind: str, allowed: Sequence[str] | None = ()) -> dict[str, Any]:
    """Return `dataset.options` as a mapping; of keys in `allowed`, if these are given."""
    if kind != "factory":
        _refuse(options, ("factory",), "only dataset=factory calls a function of yours")
    own = {} if options.options is None else options.options
    if not isinstance(own, Mapping) or not all(isinstance(key, str) for key in own):
        raise UserError(f"dataset.options={own} is no mapping; write dataset.options={{key: value}}")
    for key in own:
        if allowed is not None and key not in allowed:
            close = get_close_matches(key, allowed, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            takes = f"allowed: {', '.join(allowed)}" if allowed else "it takes none"
            raise UserError(f"dataset.options has {key!r}{hint}, which is no option of dataset={kind}; {takes}")
    return dict(own)


def _places(options: DatasetOptions, what: str, own: Mapping[str, Any] | None = None) -> tuple[str, str]:
    """Return where training and test images are."""
    for key, value in (("train", options.train), ("test", options.test)):
        if not value:
            raise UserError(f"dataset.{key} is not set; give dataset.{key}={what}")
    train, test = str(options.train), str(options.test)
    # Options may tell one part from the other.
    if not any(key.startswith(("train_", "test_")) for key in own or ()):
        _warn_if_same(train, test)
    return train, test


def _warn_if_same(train: str, test: str) -> None:
    if os.path.realpath(os.path.expanduser(train)) == os.path.realpath(os.path.expanduser(test)):
        log.warning(
            "dataset.train and dataset.test are the same folder or file: every accuracy is one on training images"
        )


def _refuse(options: DatasetOptions, keys: Sequence[str], why: str) -> None:
    for key in keys:
        if (value := getattr(options, key, None)) is not None:
            raise UserError(f"dataset.{key}={value}: {why}")


def _image_size(options: DatasetOptions) -> int | None:
    size = options.image_size
    if size is not None and size < 1:
        raise UserError(f"dataset.image_size={size} must be at least 1")
    return size


def validate(train: ImageDataset, test: ImageDataset, options: DatasetOptions) -> tuple[ImageDataset, ImageDataset]:
    """Return both parts if a classifier can be studied on them.

    Raises
    ------
    UserError
        If the parts differ in classes, there is but one class, or image size, mean or deviation do not fit.
    """
    _require_same_classes(train.classes, test.classes)
    if tuple(train.classes) != tuple(test.classes):
        raise UserError("training and test images number the classes differently; both must have the same order")
    if len(train.classes) < 2:
        raise UserError(f"the dataset has one class only ({train.classes[0]}); it takes at least two")
    channels, height, width = train.image_shape
    if options.image_size not in (None, height) or height != width:
        raise UserError(f"dataset.image_size={options.image_size}: the images of this dataset are {height}×{width}")
    if test.image_shape != train.image_shape:
        shapes = [
            f"{part.image_shape[1]}×{part.image_shape[2]} ({part.image_shape[0]} channels)" for part in (train, test)
        ]
        raise UserError(f"the training images are {shapes[0]}, the test images {shapes[1]}; both must be the same")
    for key, values in (("mean", options.mean), ("std", options.std)):
        if len(values) not in (1, channels):
            raise UserError(f"dataset.{key} has {len(values)} numbers; give 1 or {channels}, one for each channel")
        if not all(math.isfinite(value) for value in values):
            raise UserError(f"dataset.{key}={list(values)} must be finite in every channel")
    if not min(options.std) > 0:
        raise UserError(f"dataset.std={list(options.std)} must be above 0 in every channel")
    return train, test


def _require_same_classes(train: Sequence[str], test: Sequence[str]) -> None:
    for one, other, where in ((train, test, "test"), (test, train, "training")):
        if missing := sorted(set(one) - set(other)):
            shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
            raise UserError(f"the {where} images lack classes that the others have: {shown}; both must have the same")
