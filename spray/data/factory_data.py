"""The user's own datasets: what a function of theirs returns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spray.data.base import ImageDataset
from spray.data.decoded import hash_of
from spray.data.items import ItemDataset, Items
from spray.errors import UserError
from spray.factories import call, files, kind_of
from spray.storage import sha256

KEY = "dataset.factory"
ATTRIBUTES = {
    "classes": "names of the classes",
    "labels": "an array of whole numbers, one for each image",
    "names": "a name for each image",
    "image_shape": "(channels, height, width)",
    "fingerprint": "a text that changes with the data",
}


def factory_data(
    factory: str,
    options: Mapping[str, Any],
    image_size: int | None,
    check: bool,
    folders: Mapping[str, str | None] | None = None,
) -> tuple[ImageDataset, ImageDataset]:
    """Return the training and test images that a function of the user's returns.

    Parameters
    ----------
    factory : str
        ``FILE.py:FUNCTION`` or ``package.module:function``. The function returns training and test images, each an
        `ImageDataset` or anything with a length whose items are (image, label), see `spray.data.items`;
        such a dataset may have ``classes``, ``targets`` (the labels, so that not every item is read for them),
        ``fingerprint`` (a text that changes with the data) and ``thread_safe`` (True: several threads may ask it
        for items at once).
    options : mapping
        Arguments of the function. `image_size` is passed as well if it has a parameter of that name.
    image_size : int or None
        Height and width that the images are given; None keeps theirs.
    check : bool
        Whether every item is read once beforehand, to leave out those that cannot be.
    folders : mapping, optional
        `train` and `test` of the configuration: arguments of the function too, where they are set.

    Raises
    ------
    UserError
        If the function fails or returns anything else.
    """
    given = {key: value for key, value in (folders or {}).items() if value is not None} | dict(options)
    result = call(factory, KEY, {"image_size": image_size}, given, keep=True)
    if not isinstance(result, tuple | list) or len(result) != 2:
        length = f" of {len(result)}" if isinstance(result, tuple | list) else ""
        raise UserError(f"{KEY}={factory} returns {kind_of(result)}{length}; it must return (training, test) datasets")
    code = hash_of(*(part for name, path in files(factory).items() for part in (name, sha256(path))))
    train = _wrap(result[0], "training", factory, image_size, check, code, None)
    like = train if isinstance(train, ItemDataset) else None
    return train, _wrap(result[1], "test", factory, image_size, check, code, like)


def _wrap(
    data: Any, part: str, factory: str, image_size: int | None, check: bool, code: str, like: ItemDataset | None
) -> ImageDataset:
    what = f"the {part} images of {_short(factory)}"
    if isinstance(data, ImageDataset):
        _require_attributes(data, what)
        return data
    if not isinstance(data, Items):
        lacks = "__len__" if hasattr(data, "__getitem__") else "__getitem__" if hasattr(data, "__len__") else "both"
        raise UserError(f"{what} are {kind_of(data)}; a dataset needs __len__ and __getitem__ (it lacks {lacks})")
    in_threads = bool(getattr(data, "thread_safe", False))
    return ItemDataset(data, what, image_size, identity=code, check=check, in_threads=in_threads, like=like)


def _require_attributes(data: ImageDataset, what: str) -> None:
    for name, meaning in ATTRIBUTES.items():
        if not hasattr(data, name):
            raise UserError(f"{what} have no {name}: {meaning}")
    labels = np.asarray(data.labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) == 0:
        raise UserError(f"{what} have labels {labels.shape} of {labels.dtype}; it must be {ATTRIBUTES['labels']}")
    if not 0 <= labels.min() <= labels.max() < len(data.classes):
        raise UserError(f"{what} have labels from {labels.min()} to {labels.max()}, but {len(data.classes)} classes")
    if len(data.names) != len(labels):
        raise UserError(f"{what} have {len(labels)} labels and {len(data.names)} names")


def _short(factory: str) -> str:
    source, _, name = factory.rpartition(":")
    return f"{Path(source).name}:{name}"
