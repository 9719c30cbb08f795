"""Datasets of Hugging Face's `datasets` library that were saved to disk."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spray.data.decoded import EncodedDataset, hash_of
from spray.data.decoding import UnreadableImageError
from spray.data.items import unique
from spray.data.subset import even_sample
from spray.errors import UserError
from spray.factories import kind_of, one_line

OPTIONS = ("image", "label", "train_split", "test_split", "channels")
SPLITS = {"train": ("train",), "test": ("test", "validation", "valid", "val")}
LABELS = ("label", "labels", "target", "fine_label")
HASHED = 256
"""Images whose bytes go into the fingerprint."""
NO_LABEL = -1


class HuggingFaceDataset(EncodedDataset):
    """Images and labels of a table of Hugging Face's.

    Parameters
    ----------
    table : datasets.Dataset
        Loaded from disk.
    what : str
        What it is called in messages.
    image, label : str
        Names of its columns.
    image_size : int or None
        Height and width that the images are given; None keeps theirs.
    channels : int
        3 for RGB, 1 for grey.
    check : bool
        Whether every image is decoded before it is used.
    train : HuggingFaceDataset, optional
        The training images: classes and form are theirs.

    Raises
    ------
    UserError
        If the columns are no images and labels.
    """

    def __init__(
        self,
        table: Any,
        what: str,
        image: str,
        label: str,
        image_size: int | None,
        channels: int,
        check: bool,
        train: HuggingFaceDataset | None = None,
    ) -> None:
        self._what, self._image, self._size, self._channels = what, image, image_size, channels
        n = len(table)
        if n == 0:
            raise UserError(f"{what} is empty")
        labels, self.classes = _labels(table, label, what, None if train is None else train.classes)
        self._images = _as_bytes(table, image, what)
        self._start(n, self._find_shape(n, what) if train is None else train.image_shape)
        form = f"{self.image_shape} {image_size} {channels} {list(self.classes)}"
        content = hash_of(form, labels, self._state(table, n))
        bad = dict.fromkeys(np.flatnonzero(labels == NO_LABEL).tolist(), "it has no label")
        if check:
            bad |= self._check(content, what)
        digits = len(str(n - 1))
        names = [f"{row:0{digits}d}" for row in range(n)]
        kept = self._keep(labels, names, bad, what)
        self.names = [names[row] for row in kept]
        self.fingerprint = hash_of(content, np.array(sorted(bad), dtype=np.int64))

    def _content(self, row: int) -> bytes:
        value = self._images[row][self._image]
        if isinstance(value, Mapping):
            if value.get("bytes") is None and value.get("path"):
                # It could be any file of this machine.
                raise UnreadableImageError("the dataset holds the path of a file only, not its content")
            value = value.get("bytes")
        if value is None:
            raise UnreadableImageError("there is no image")
        return bytes(value)

    def _place(self, row: int) -> str:
        return f"image {row} of {self._what}"

    def _state(self, table: Any, n: int) -> str:
        """Return a hash of size and time of change of the table's files and of the bytes of some images."""
        states = [os.stat(file["filename"]) for file in table.cache_files]
        parts: list[bytes] = []
        for row in even_sample(n, HASHED).tolist():
            try:
                parts.append(self._content(row))
            except UnreadableImageError as error:
                parts.append(str(error).encode())
        return hash_of(str([(state.st_size, state.st_mtime_ns) for state in states]), *parts)


def huggingface_data(
    train: str, test: str | None, options: Mapping[str, Any], image_size: int | None, check: bool
) -> tuple[HuggingFaceDataset, HuggingFaceDataset]:
    """Return training and test images from folders that ``Dataset.save_to_disk`` wrote.

    Nothing is downloaded, and no code of the dataset's is run.

    Parameters
    ----------
    train, test : str
        The folders; `test` may be missing where `train` holds several splits.
    options : mapping
        ``image`` and ``label`` name the columns where that is not plain, ``train_split`` and ``test_split`` the splits,
        ``channels`` is 1 for grey images.
    image_size : int or None
        Height and width that the images are given; None keeps theirs.
    check : bool
        Whether every image is decoded beforehand, to leave out those that cannot be.

    Raises
    ------
    UserError
        If the library is not installed, or a folder holds something else.
    """
    channels = options.get("channels", 3)
    if channels not in (1, 3):
        raise UserError(f"dataset.options.channels={channels} must be 1 (grey) or 3 (RGB)")
    found: list[HuggingFaceDataset] = []
    for part, folder in (("train", train), ("test", test or train)):
        table, what = _load(Path(folder).expanduser(), part, options.get(f"{part}_split"))
        image, label = _columns(table, options, what)
        like = found[0] if found else None
        found.append(HuggingFaceDataset(table, what, image, label, image_size, channels, check, like))
    return found[0], found[1]


def _load(folder: Path, part: str, split: str | None) -> tuple[Any, str]:
    """Return one part's table and what it is called."""
    try:
        from datasets import Dataset, load_from_disk
    except ImportError:
        raise UserError(
            "dataset=huggingface needs the package `datasets`: pip install 'spray-xai[huggingface]'"
        ) from None
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give one that Dataset.save_to_disk wrote")
    _require_own_files(folder)
    try:
        loaded = load_from_disk(str(folder))
    except Exception as error:  # damaged files fail in many ways
        raise UserError(f"{folder} cannot be loaded as a dataset saved to disk: {one_line(error)}") from None
    if isinstance(loaded, Dataset):
        if split is not None:
            raise UserError(f"dataset.options.{part}_split={split}: {folder} holds one dataset without splits")
        return loaded, str(folder)
    wanted = SPLITS[part] if split is None else (split,)
    name = next((name for name in wanted if name in loaded), None)
    if name is None:
        raise UserError(
            f"{folder} has no split {' or '.join(wanted)}, but {', '.join(loaded)}; "
            f"set dataset.options={{{part}_split: NAME}}"
        )
    return loaded[name], f"{folder}/{name}"


def _require_own_files(folder: Path) -> None:
    """Refuse a dataset that names files outside of its folder."""
    for path in [folder / "state.json", *sorted(folder.glob("*/state.json"))]:
        if path.is_file():
            try:
                names = [str(entry["filename"]) for entry in json.loads(path.read_bytes())["_data_files"]]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path} is damaged; save the dataset again") from None
            if strange := [name for name in names if Path(name).name != name or "::" in name]:
                raise UserError(f"{path} names a file outside of the dataset's folder: {strange[0]}")


def _columns(table: Any, options: Mapping[str, Any], what: str) -> tuple[str, str]:
    from datasets import ClassLabel, Image

    features = table.features
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    labels += [name for name in LABELS if name in features and name not in labels]
    chosen: list[str] = []
    for key, found in (("image", images), ("label", labels)):
        name = options.get(key) or (key if key in found else next(iter(found), None))
        if name is None or name not in features:
            which = f"no column {name!r}" if name else f"no column of {key}s that is plain"
            raise UserError(
                f"{what} has {which}, but {', '.join(features)}; name it with dataset.options={{{key}: NAME}}"
            )
        chosen.append(name)
    return chosen[0], chosen[1]


def _as_bytes(table: Any, image: str, what: str) -> Any:
    """Return the column of images as they are stored, not decoded."""
    from datasets import Image, Value

    feature = table.features[image]
    column = table.with_format(None).select_columns([image])
    if isinstance(feature, Image):
        return column.cast_column(image, Image(decode=False))
    if isinstance(feature, Value) and feature.dtype in ("binary", "large_binary"):
        return column
    raise UserError(f"{what}: the column {image!r} holds no images, but {kind_of(feature)}")


def _labels(table: Any, label: str, what: str, classes: Sequence[str] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the labels, `NO_LABEL` where there is none, and the classes."""
    from datasets import ClassLabel

    column = table.with_format("arrow").select_columns([label])[:].column(0)
    feature = table.features[label]
    own = tuple(unique(feature.names)) if isinstance(feature, ClassLabel) and feature.names else None
    if str(column.type).lstrip("u").startswith("int"):
        labels = column.fill_null(NO_LABEL).to_numpy().astype(np.int64)
        if labels.min() < NO_LABEL or labels.max() < 0:
            raise UserError(f"{what} has a label {labels.min()}; classes are numbered from 0")
        if own is None:
            own = tuple(classes or (str(number) for number in range(int(labels.max()) + 1)))
    elif str(column.type) in ("string", "large_string"):
        texts = column.to_pylist()
        own = tuple(classes or sorted({text for text in texts if text is not None}))
        number = {text: index for index, text in enumerate(own)}
        if strange := {text for text in texts if text is not None} - set(own):
            raise UserError(f"{what} has a class {min(strange)!r}, which the training images lack")
        labels = np.array([NO_LABEL if text is None else number[text] for text in texts], dtype=np.int64)
    else:
        raise UserError(f"{what}: the column {label!r} holds {column.type}; labels are whole numbers or texts")
    if labels.max() >= len(own):
        raise UserError(f"{what} has a label {labels.max()}, but only {len(own)} classes")
    return labels, own
