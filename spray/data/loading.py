"""From a dataset's configuration to its training and test images."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from spray.data.base import ImageDataset
from spray.data.folder import FolderDataset, class_folders
from spray.errors import UserError
from spray.registry import Registry

log = logging.getLogger(__name__)


class DatasetOptions(Protocol):
    """What is read of the configuration `dataset`."""

    @property
    def train(self) -> str | None:
        """Folder of the training images."""

    @property
    def test(self) -> str | None:
        """Folder of the test images."""

    @property
    def image_size(self) -> int | None:
        """Height and width of the images; None for those that the dataset has."""

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

    for key, value in (("train", options.train), ("test", options.test)):
        if value is not None:
            raise UserError(
                f"dataset.{key}={value}: the dataset photos has its own images; take experiment=image_folder"
            )
    return validate(*photos(), options)


@DATASETS.register("fashion_mnist")
def _fashion_mnist(options: DatasetOptions) -> tuple[ImageDataset, ImageDataset]:
    from spray.data.fashion_mnist import fashion_mnist

    if options.test not in (None, options.train):
        raise UserError(f"dataset.test={options.test}: Fashion-MNIST takes one folder, dataset.train, for both parts")
    folder = None if options.train is None else Path(options.train)
    return validate(*fashion_mnist(folder), options)


@DATASETS.register("image_folder")
def _image_folder(options: DatasetOptions) -> tuple[ImageDataset, ImageDataset]:
    for key, value in (("train", options.train), ("test", options.test)):
        if not value:
            raise UserError(f"dataset.{key} is not set; give dataset.{key}=DIR with a folder for each class")
    if options.image_size is None:
        raise UserError("dataset.image_size is not set; give the height and width that the model takes, such as 224")
    train_folder, test_folder = Path(str(options.train)).expanduser(), Path(str(options.test)).expanduser()
    # Before all images are decoded, which can take long.
    _require_same_classes(class_folders(train_folder), class_folders(test_folder))
    if os.path.realpath(train_folder) == os.path.realpath(test_folder):
        log.warning("dataset.train and dataset.test are the same folder: every accuracy is one on training images")
    train, test = (_read_folder(folder, options.image_size) for folder in (train_folder, test_folder))
    return validate(train, test, options)


def _read_folder(folder: Path, image_size: int) -> FolderDataset:
    dataset = FolderDataset(folder, image_size)
    for path, reason in dataset.unreadable:
        log.warning("left out %s: %s", folder / path, reason)
    log.info("%s: %d images, %d files left out", folder, len(dataset), len(dataset.unreadable))
    return dataset


def validate(train: ImageDataset, test: ImageDataset, options: DatasetOptions) -> tuple[ImageDataset, ImageDataset]:
    """Return both parts if a classifier can be studied on them.

    Raises
    ------
    UserError
        If the parts differ in classes, there is but one class, or image size, mean or deviation do not fit.
    """
    _require_same_classes(train.classes, test.classes)
    if len(train.classes) < 2:
        raise UserError(f"the dataset has one class only ({train.classes[0]}); it takes at least two")
    channels, height, width = train.image_shape
    if options.image_size not in (None, height) or height != width:
        raise UserError(f"dataset.image_size={options.image_size}: the images of this dataset are {height}×{width}")
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
