"""The classification datasets of torchvision, by name."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Subset

from spray.data.decoded import hash_of
from spray.data.items import ItemDataset
from spray.data.listed import printable
from spray.data.subset import even_sample
from spray.errors import UserError
from spray.factories import one_line

OWN_OPTIONS = ("name", "channels", "holdout", "train", "test")
# They set torch's random numbers while they make an image.
NOT_IN_THREADS = ("FakeData",)
# Where datasets of torchvision keep their files, each a path or a tuple that begins with one.
PATHS = ("samples", "imgs", "_samples", "_image_files", "_images")
SPLITS = {"train": ("train", "train-standard"), "test": ("test", "val", "valid")}
CALLABLES = ("transform", "target_transform", "transforms", "loader", "is_valid_file")
SAMPLED = 20_000


def torchvision_data(
    options: Mapping[str, Any], image_size: int | None, check: bool
) -> tuple[ItemDataset, ItemDataset]:
    """Return training and test images of one of torchvision's datasets.

    Parameters
    ----------
    options : mapping
        ``name`` is that of the class, such as CIFAR10. ``train`` and ``test`` may each map to arguments for
        that part alone; ``holdout`` is the share of each class that is held out for testing where the dataset is
        not divided; ``channels`` is 1 or 3 for grey or RGB. All else are arguments of the class.
    image_size : int or None
        Height and width that the images are given; None keeps theirs.
    check : bool
        Whether every image is read once beforehand.

    Raises
    ------
    UserError
        If there is no such dataset, its files are not there, an argument does not fit, or it does not classify.
    """
    name = options.get("name")
    if not name:
        raise UserError(
            "dataset.options has no name; give that of a dataset of torchvision: {name: CIFAR10, root: DIR}"
        )
    kind = _find(str(name))
    shared = {key: value for key, value in options.items() if key not in OWN_OPTIONS}
    own = {part: _mapping(options.get(part), part) for part in ("train", "test")}
    if options.get("holdout") is not None:
        parts = _divide(_make(kind, [shared | own["train"]]), options["holdout"])
    else:
        choices = {part: _choices(kind, part, shared | own[part]) for part in ("train", "test")}
        if choices["train"] == choices["test"]:
            raise UserError(
                f"torchvision's {name} is not divided in training and test images; add holdout: 0.2 to "
                "dataset.options, or test: {…} with the arguments that make its test images"
            )
        parts = _make(kind, choices["train"]), _make(kind, choices["test"])
    train = _wrap(parts[0], str(name), "training", options, image_size, check, None)
    return train, _wrap(parts[1], str(name), "test", options, image_size, check, train)


def _find(name: str) -> type:
    from torchvision import datasets

    known = [key for key in datasets.__all__ if isinstance(getattr(datasets, key), type)]
    if name not in known:
        by_lower = {key.lower(): key for key in known}
        close = get_close_matches(name.lower(), by_lower, n=1)
        hint = f" (did you mean {by_lower[close[0]]!r}?)" if close else ""
        raise UserError(f"torchvision has no dataset {name!r}{hint}; dataset.options.name is that of a class there")
    kind: type = getattr(datasets, name)
    return kind


def _mapping(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, Mapping | None):
        raise UserError(f"dataset.options.{key}={value} is no mapping of arguments, such as {{split: val}}")
    return dict(value or {})


def _parameters(kind: type) -> set[str]:
    """Return the names of a class's arguments, with those that it hands on to the one that it is derived from."""
    names: set[str] = set()
    for base in kind.__mro__:
        parameters = inspect.signature(base).parameters.values()
        names |= {parameter.name for parameter in parameters}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return names - {"self", "args", "kwargs"}


def _choices(kind: type, part: str, given: dict[str, Any]) -> list[dict[str, Any]]:
    """Return arguments that may make the training or the test images, best first."""
    names = _parameters(kind)
    if "train" in names and "train" not in given:
        return [given | {"train": part == "train"}]
    if "split" in names and "split" not in given:
        return [given | {"split": split} for split in SPLITS[part]]
    return [given]


def _make(kind: type, choices: Sequence[Mapping[str, Any]]) -> Any:
    """Make a dataset with the first arguments that it takes."""
    names = _parameters(kind)
    for key in choices[0]:
        if key not in names or key in CALLABLES:
            allowed = ", ".join(sorted(names - set(CALLABLES)))
            raise UserError(
                f"dataset.options has {key}, which torchvision's {kind.__name__} does not take; allowed: {allowed}"
            )
    for number, arguments in enumerate(choices, start=1):
        try:
            return kind(**arguments)
        except ValueError as error:  # of a split that it does not have
            if number == len(choices):
                raise UserError(f"torchvision's {kind.__name__} fails: {one_line(error)}") from None
        except Exception as error:  # damaged or missing files fail in many ways
            missing = "download" in names and not arguments.get("download")
            hint = "; add download: true to dataset.options to get its files" if missing else ""
            raise UserError(f"torchvision's {kind.__name__} fails: {one_line(error)}{hint}") from None
    raise AssertionError("there is always a choice")


def _divide(dataset: Any, share: Any) -> tuple[Any, Any]:
    """Hold out a share of the items, spread evenly."""
    n = len(dataset)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
        raise UserError(f"dataset.options.holdout={share} is no share between 0 and 1, such as 0.2")
    held_out = even_sample(n, max(1, round(share * n)))
    return Subset(dataset, np.setdiff1d(np.arange(n), held_out).tolist()), Subset(dataset, held_out.tolist())


def _wrap(
    items: Any,
    name: str,
    part: str,
    options: Mapping[str, Any],
    image_size: int | None,
    check: bool,
    train: ItemDataset | None,
) -> ItemDataset:
    channels = options.get("channels")
    if channels not in (None, 1, 3):
        raise UserError(f"dataset.options.channels={channels} must be 1 (grey) or 3 (RGB)")
    what = f"the {part} images of torchvision's {name}"
    if not len(items):
        raise UserError(f"{what}: there are none")
    source, rows = (items.dataset, np.asarray(items.indices)) if isinstance(items, Subset) else (items, None)
    paths = _paths(source)
    picked = paths if paths is None or rows is None else [paths[row] for row in rows]
    return ItemDataset(
        items,
        what,
        image_size,
        identity=hash_of(name, _state(source, picked)),
        check=check,
        in_threads=name not in NOT_IN_THREADS,
        names=None if picked is None else _names(picked, getattr(source, "root", None)),
        channels=channels,
        like=train,
    )


def _paths(source: Any) -> list[str] | None:
    """Return the files of a dataset that has one for each image."""
    for name in PATHS:
        entries = getattr(source, name, None)
        if isinstance(entries, Sequence) and len(entries) == len(source):
            paths = [entry[0] if isinstance(entry, tuple | list) else entry for entry in entries]
            if all(isinstance(path, str | os.PathLike) for path in paths):
                return [os.fspath(path) for path in paths]
    return None


def _names(paths: list[str], root: Any) -> list[str] | None:
    top = Path(root) if isinstance(root, str | os.PathLike) else Path()
    names = [printable(os.path.relpath(path, top)) for path in paths]
    return names if len(set(names)) == len(names) else None


def _state(source: Any, paths: list[str] | None) -> str:
    """Return a hash of what the images are made of, as far as that can be told: arrays, or the state of files."""
    data = getattr(source, "data", None)
    if isinstance(data, Tensor):
        data = data.numpy()
    if isinstance(data, np.ndarray) and len(data) == len(source):
        return hash_of(data)
    found = []
    for row in even_sample(len(paths or ()), SAMPLED):
        try:
            status = os.stat((paths or [])[row])
            found.append((status.st_size, status.st_mtime_ns))
        except OSError:
            found.append((-1, -1))
    return hash_of(np.array(found, dtype=np.int64))
