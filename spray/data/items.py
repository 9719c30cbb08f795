"""Datasets of other libraries and of the user: anything with a length whose items are (image, label)."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from spray.data.decoded import TRIED, DecodedDataset, hash_of
from spray.data.decoding import UnreadableImageError, decode_image, is_of_system, reasons, resize
from spray.data.parallel import quiet_pillow
from spray.data.subset import even_sample
from spray.errors import UserError
from spray.factories import kind_of, one_line, place

log = logging.getLogger(__name__)

UNKNOWN = -1
HASHED = 256
"""Images whose pixels go into the fingerprint of a dataset that has none of its own."""
SAY_SECONDS = 5.0
LABEL_NAMES = ("targets", "labels", "_labels", "y")
GREY = ("1", "L")
# One for all: training and test images may share a file that is open.
_one_at_a_time = threading.Lock()


@runtime_checkable
class Items(Protocol):
    """What a dataset has to have."""

    def __len__(self) -> int:
        """Return how many items there are."""

    def __getitem__(self, index: int) -> Any:
        """Return image and label of an item."""


class ItemDataset(DecodedDataset):
    """The items of another dataset, brought to one form.

    An image is an image of Pillow, an array uint8 (H, W) or (H, W, C), or a tensor (C, H, W), uint8 or floating
    point in [0, 1]. Images of Pillow become RGB unless all of those looked at are grey; see
    `spray.data.decoding.decode` for modes, orientation and size.

    Parameters
    ----------
    items : Items
        The dataset.
    what : str
        What it is called in messages.
    image_size : int or None
        Height and width that the images are given; None keeps theirs, which must be the same then.
    classes : sequence of str, optional
        Names of the classes; the dataset's own `classes` if not given, else the numbers.
    identity : str
        What else its fingerprint depends on.
    check : bool
        Whether every item is read before it is used, to leave out those that cannot be.
    in_threads : bool
        Whether several threads may ask it for items at once.
    names : sequence of str, optional
        A readable name of each item; its number with leading zeros if not given.
    channels : int, optional
        1 for grey, 3 for RGB: what images of Pillow become.
    like : ItemDataset, optional
        The form of the images, and the classes if it has none of its own, are those of this one.

    Raises
    ------
    UserError
        If items are no image and label, differ from one reading to the next, or no image can be read.
    """

    _channels: int

    def __init__(
        self,
        items: Items,
        what: str,
        image_size: int | None,
        *,
        classes: Sequence[str] | None = None,
        identity: str = "",
        check: bool = True,
        in_threads: bool = False,
        names: Sequence[str] | None = None,
        channels: int | None = None,
        like: ItemDataset | None = None,
    ) -> None:
        self._items, self._what, self._size = items, what, image_size
        self._in_threads = in_threads
        n = len(items)
        if n == 0:
            raise UserError(f"{what} is empty")
        self._labels = np.full(n, UNKNOWN, dtype=np.int64)
        tried = self._try_out(n)
        self._find_form(tried, n, channels, like)
        self._require_the_same_again(tried)
        known = _labels_of(items, n)
        if known is not None and any(known[row] != label for row, (_, label) in tried.items()):
            known = None
        bad: dict[int, str] = {}
        if known is None:
            bad = self._read_all()
        else:
            self._labels[:] = known
        self.classes = self._find_classes(classes, like)
        digits = len(str(n - 1))
        own_names = [f"{row:0{digits}d}" for row in range(n)] if names is None else names
        content = self._hash(identity)
        if check and known is not None:
            bad = self._check(content, what)
        self._checked = check or known is None
        kept = self._keep(self._labels, own_names, bad, what)
        self.names = [own_names[row] for row in kept] if bad else own_names
        self.fingerprint = hash_of(content, np.array(sorted(bad), dtype=np.int64))

    def _pixels(self, row: int) -> np.ndarray:
        image, label = self._fetch(row)
        if self._labels[row] not in (UNKNOWN, label):
            raise UnreadableImageError(f"its label is {label}, but was {self._labels[row]} before")
        self._labels[row] = label
        return self._form(image)

    def _place(self, row: int) -> str:
        return f"item {row} of {self._what}"

    def _fetch(self, row: int) -> tuple[Any, int]:
        """Return image and label of an item as they are."""
        try:
            with nullcontext() if self._in_threads else _one_at_a_time:
                item = self._items[row]
        except (Exception, SystemExit) as error:  # the user's code can raise anything
            reason = f"{one_line(error)}{place(error)}"
            raise UnreadableImageError(reason, lasting=not is_of_system(error)) from None
        if not isinstance(item, tuple | list) or len(item) != 2:
            length = f" of {len(item)}" if isinstance(item, tuple | list) else ""
            raise UnreadableImageError(f"it is {kind_of(item)}{length}; it must be a pair (image, label)")
        image, label = item
        number = np.asarray(label.cpu() if isinstance(label, Tensor) else label)
        if number.ndim != 0 or number.dtype.kind not in "iu":
            raise UnreadableImageError(f"its label is {kind_of(label)}; it must be one whole number")
        if number < 0:
            raise UnreadableImageError(f"its label is {number}; classes are numbered from 0")
        return image, int(number)

    def _try_out(self, n: int) -> dict[int, tuple[Any, int]]:
        """Return some items by row."""
        tried: dict[int, tuple[Any, int]] = {}
        self._first_reason = ""
        for row in even_sample(n, TRIED).tolist():
            try:
                tried[row] = self._fetch(row)
            except UnreadableImageError as error:
                self._first_reason = self._first_reason or f"item {row}: {error}"
        if not tried:
            raise UserError(f"no image of {self._what} can be read (first: {self._first_reason})")
        return tried

    def _find_form(
        self, tried: dict[int, tuple[Any, int]], n: int, channels: int | None, like: ItemDataset | None
    ) -> None:
        """Find out channels, type and shape of the images."""
        if like is not None:
            self._channels = like._channels
            self._start(n, like.image_shape, dtype=like._dtype.type)
            return
        images = [image for image, _ in tried.values()]
        self._channels = channels or (1 if all(_is_grey(image) for image in images) else 3)
        # Bytes are kept as bytes where all are such.
        floats = any(isinstance(image, Tensor) and image.is_floating_point() for image in images)
        self._dtype = np.dtype(np.float32 if floats else np.uint8)
        for row, (image, _) in tried.items():
            try:
                with reasons(), quiet_pillow():
                    shape = self._form(image).shape
                self._start(n, (shape[0], shape[1], shape[2]), dtype=self._dtype.type)
                return
            except UnreadableImageError as error:
                self._first_reason = self._first_reason or f"item {row}: {error}"
        raise UserError(f"no image of {self._what} can be read (first: {self._first_reason})")

    def _require_the_same_again(self, tried: dict[int, tuple[Any, int]]) -> None:
        for row, (image, label) in tried.items():
            try:
                with reasons(), quiet_pillow():
                    again, label_again = self._fetch(row)
                    same = label == label_again and np.array_equal(self._form(image), self._form(again))
            except UnreadableImageError:
                continue
            if not same:
                raise UserError(
                    f"{self._what} gives another image or label when item {row} is read again; explanations need the "
                    "same each time: take random transforms (crops, flips) and shuffling out"
                )

    def _read_all(self) -> dict[int, str]:
        """Read every item, since nothing else tells the labels; return which could not be read, and why."""
        n = len(self._labels)
        bad: dict[int, str] = {}
        start = said = time.monotonic()
        for first in range(0, n, self._at_once):
            rows = np.arange(first, min(first + self._at_once, n))
            bad |= {int(rows[at]): str(error) for at, error in sorted(self._read(rows)[1].items())}
            now = time.monotonic()
            if now - said > SAY_SECONDS:
                said = now
                rate = (rows[-1] + 1) / (now - start)
                log.info(
                    "%s: reading every item for its label, which a list `targets` would spare: %d of %d, %.0f/s",
                    self._what, rows[-1] + 1, n, rate,
                )  # fmt: skip
        return bad

    def _find_classes(self, classes: Sequence[str] | None, like: ItemDataset | None) -> tuple[str, ...]:
        most = int(self._labels.max())
        found = classes or _classes_of(self._items) or (like.classes if like is not None else None)
        if found is None:
            return tuple(str(number) for number in range(most + 1))
        if most >= len(found):
            raise UserError(f"{self._what} has a label {most}, but only {len(found)} classes")
        return unique(found)

    def _hash(self, identity: str) -> str:
        form = f"{self.image_shape} {self._dtype} {self._channels} {self._size} {list(self.classes)}"
        own = getattr(self._items, "fingerprint", None)
        if isinstance(own, str):
            return hash_of(identity, form, self._labels, own)
        return hash_of(identity, form, self._labels, self._hash_some(HASHED))

    def _form(self, image: Any) -> np.ndarray:
        """Return an image as an array (C, H, W) of the dataset's type."""
        if isinstance(image, Tensor):
            return self._form_of_tensor(image)
        if isinstance(image, np.ndarray):
            image = _from_array(image)
        if not isinstance(image, Image.Image):
            raise UnreadableImageError(
                f"its image is {kind_of(image)}; it must be an image of Pillow, an array of bytes (H, W, C) "
                "or a tensor (C, H, W)"
            )
        pixels = decode_image(image, self._size, self._channels)
        return pixels if self._dtype == np.uint8 else pixels.astype(np.float32) / 255

    def _form_of_tensor(self, image: Tensor) -> np.ndarray:
        held = image.detach().cpu()
        pixels = (held.float() if held.dtype == torch.bfloat16 else held).numpy()
        if pixels.ndim == 2:
            pixels = pixels[None]
        if pixels.ndim != 3 or not (pixels.dtype == np.uint8 or image.is_floating_point()):
            raise UnreadableImageError(
                f"its image is a tensor {tuple(image.shape)} of {image.dtype}; it must be (C, H, W), "
                "uint8 or floating point in [0, 1]"
            )
        if image.is_floating_point():
            if self._dtype == np.uint8:
                raise UnreadableImageError("its image is floating point, those of other items are bytes")
            if not (pixels.min() >= 0 and pixels.max() <= 1):  # False for NaN too
                raise UnreadableImageError(
                    f"its values go from {pixels.min():.3g} to {pixels.max():.3g}, outside of [0, 1]; leave "
                    "normalisation to dataset.mean and dataset.std"
                )
            pixels = pixels.astype(np.float32)
        if self._size is not None and pixels.shape[1:] != (self._size, self._size):
            pixels = np.stack([np.asarray(resize(Image.fromarray(part), self._size)) for part in pixels])
        if self._dtype == np.float32:
            return pixels.clip(0, 1) if pixels.dtype == np.float32 else pixels.astype(np.float32) / 255
        return pixels


def unique(classes: Sequence[Any]) -> tuple[str, ...]:
    """Return names of classes as texts of their own: of several names the first ones, numbered where twice."""
    texts = [", ".join(map(str, name)) if isinstance(name, tuple | list) else str(name) for name in classes]
    count = Counter(texts)
    return tuple(text if count[text] == 1 else f"{text} ({index})" for index, text in enumerate(texts))


def _is_grey(image: Any) -> bool:
    if isinstance(image, np.ndarray):
        return image.ndim == 2 or image.shape[-1] == 1
    return isinstance(image, Image.Image) and image.mode in GREY


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise UnreadableImageError(
            f"its image is an array {array.shape} of {array.dtype}; it must be uint8, (H, W) or (H, W, C)"
        )
    return Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _labels_of(items: Any, n: int) -> np.ndarray | None:
    """Return the labels that a dataset has in a list, if any."""
    if isinstance(items, Subset):
        inner = _labels_of(items.dataset, len(items.dataset))  # type: ignore[arg-type]
        return None if inner is None else inner[np.asarray(items.indices, dtype=np.int64)]
    if isinstance(items, ConcatDataset):
        parts = [_labels_of(part, len(part)) for part in items.datasets]  # type: ignore[arg-type]
        return None if any(part is None for part in parts) else np.concatenate(parts)  # type: ignore[arg-type]
    for name in LABEL_NAMES:
        try:
            value = getattr(items, name, None)
            labels = np.asarray(value.cpu() if isinstance(value, Tensor) else value)
        except Exception:  # a property can raise anything; the items tell their labels too
            continue
        if labels.shape == (n,) and labels.dtype.kind in "iu" and n and labels.min() >= 0:
            return labels.astype(np.int64)
    return None


def _classes_of(items: Any) -> Sequence[Any] | None:
    if isinstance(items, Subset):
        return _classes_of(items.dataset)
    if isinstance(items, ConcatDataset):
        return _classes_of(items.datasets[0])
    classes = getattr(items, "classes", None)
    return list(classes) if isinstance(classes, Sequence) and not isinstance(classes, str) and len(classes) else None
