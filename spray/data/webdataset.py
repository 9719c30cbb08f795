"""WebDataset shards: samples in `.tar` files, read by index where they lie."""

from __future__ import annotations

import glob
import os
import re
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spray.data.decoded import EncodedDataset, hash_of
from spray.data.decoding import UnreadableImageError
from spray.data.items import unique
from spray.data.listed import printable
from spray.data.tar_index import UNLABELLED, Shard, index_shards
from spray.errors import UserError

OPTIONS = ("classes", "label", "channels")
MAX_SHARDS = 100_000


class WebDataset(EncodedDataset):
    """The samples of some tar files, in their order.

    Parameters
    ----------
    paths : sequence of Path
        The files.
    shards : sequence of Shard
        What lies in each of them.
    what : str
        What they are called in messages.
    classes : sequence of str
        Names of the classes.
    image_size : int or None
        Height and width that the images are given; None keeps theirs.
    channels : int
        3 for RGB, 1 for grey.
    check : bool
        Whether every image is decoded before it is used.
    train : WebDataset, optional
        The training images: the form is theirs.

    Raises
    ------
    UserError
        If there are no samples, or labels without a class.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        shards: Sequence[Shard],
        what: str,
        classes: Sequence[str],
        image_size: int | None,
        channels: int,
        check: bool,
        train: WebDataset | None = None,
    ) -> None:
        self._paths, self._what = list(paths), what
        self._size, self._channels = image_size, channels
        self.classes = unique(classes)
        counts = [len(shard.names) for shard in shards]
        n = sum(counts)
        if n == 0:
            raise UserError(f"{what} hold no samples: files such as x.jpg and x.cls side by side")
        self._shard = np.repeat(np.arange(len(shards), dtype=np.int32), counts)
        self._offsets = np.array([offset for shard in shards for offset in shard.offsets], dtype=np.int64)
        self._sizes = np.array([size for shard in shards for size in shard.sizes], dtype=np.int64)
        labels = np.array([label for shard in shards for label in shard.labels], dtype=np.int64)
        if labels.max() >= len(self.classes):
            raise UserError(f"{what} have a label {labels.max()}, but there are only {len(self.classes)} classes")
        stems = _stems(self._paths)
        names = [printable(f"{stem}/{name}") for stem, shard in zip(stems, shards, strict=True) for name in shard.names]
        self._all_names = names
        self._start(n, self._find_shape(n, what) if train is None else train.image_shape)
        states = [(shard.size, shard.changed) for shard in shards]
        form = f"{self.image_shape} {image_size} {channels} {list(self.classes)} {states}"
        content = hash_of(form, labels, self._offsets, self._sizes, "\0".join(names))
        bad = dict.fromkeys(np.flatnonzero(labels == UNLABELLED).tolist(), "it has no label: a .cls or .json file")
        bad |= dict.fromkeys(np.flatnonzero(self._offsets == 0).tolist(), "it has no image")
        if check:
            bad = self._check(content, what) | bad
        kept = self._keep(labels, names, bad, what)
        self.names = [names[row] for row in kept] if bad else names
        self.fingerprint = hash_of(content, np.array(sorted(bad), dtype=np.int64))

    def _content(self, row: int) -> bytes:
        offset, size = int(self._offsets[row]), int(self._sizes[row])
        if offset == 0:
            raise UnreadableImageError("it has no image")
        descriptor = os.open(self._paths[self._shard[row]], os.O_RDONLY)
        try:
            content = os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)
        if len(content) != size:
            raise UnreadableImageError("its tar file is shorter than it was")
        return content

    def _place(self, row: int) -> str:
        return f"{self._all_names[row]} in {self._paths[self._shard[row]]}"


def webdataset(
    train: str, test: str, options: Mapping[str, Any], image_size: int | None, check: bool
) -> tuple[WebDataset, WebDataset]:
    """Return training and test images from tar files.

    Parameters
    ----------
    train, test : str
        A file, a folder of `.tar` files, or a pattern: ``train-{000000..000099}.tar``, ``train-*.tar``.
    options : mapping
        ``classes`` is a list of names or a text file with one on each line, the numbers if not given; ``label`` is
        the key of the label in `.json` files ("label"); ``channels`` is 1 for grey images.
    image_size : int or None
        Height and width that the images are given; None keeps theirs.
    check : bool
        Whether every image is decoded beforehand, to leave out those that cannot be.

    Raises
    ------
    UserError
        If there are no such files, or they hold something else.
    """
    channels = options.get("channels", 3)
    if channels not in (1, 3):
        raise UserError(f"dataset.options.channels={channels} must be 1 (grey) or 3 (RGB)")
    label = str(options.get("label", "label"))
    parts = [(find_shards(pattern, f"dataset.{part}"), pattern) for part, pattern in (("train", train), ("test", test))]
    indices = [index_shards(paths, label) for paths, _ in parts]
    most = max((max(shard.labels, default=0) for shards in indices for shard in shards), default=0)
    classes = _classes(options.get("classes"), most)
    found: list[WebDataset] = []
    for (paths, pattern), shards in zip(parts, indices, strict=True):
        like = found[0] if found else None
        what = f"the tar files {pattern}"
        found.append(WebDataset(paths, shards, what, classes, image_size, channels, check, like))
    return found[0], found[1]


def find_shards(pattern: str, key: str) -> list[Path]:
    """Return the tar files that a path, a folder or a pattern means, each once.

    Parameters
    ----------
    pattern : str
        ``{000..099}`` counts, ``{a,b}`` lists, ``*``, ``?`` and ``[…]`` match names.
    key : str
        The configuration's key, for messages.

    Raises
    ------
    UserError
        If there is none.
    """
    paths: list[str] = []
    for path in _expand(os.path.expanduser(pattern), key):
        if os.path.isdir(path):
            paths += sorted(glob.glob(f"{glob.escape(path)}/*.tar"))
        elif os.path.exists(path) or not glob.has_magic(path):
            paths.append(path)
        else:
            paths += sorted(glob.glob(path))
    if not paths:
        raise UserError(f"{key}={pattern}: there are no such tar files")
    return [Path(path) for path in dict.fromkeys(paths)]


def _expand(pattern: str, key: str) -> list[str]:
    """Return what a pattern's braces stand for, as a shell does."""
    if os.path.exists(pattern):
        return [pattern]
    done: list[str] = []
    waiting = deque([pattern])
    while waiting:
        text = waiting.popleft()
        match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", text)
        if match is None:
            done.append(text)
            continue
        if match[3] is not None:
            inside = match[3].split(",")
        else:
            first, last = int(match[1]), int(match[2])
            if not 0 <= last - first < MAX_SHARDS:
                raise UserError(f"{key}={pattern}: {match[0]} does not count up, or too far")
            # As in a shell, leading zeros are kept.
            width = len(match[1]) if match[1].startswith("0") or match[2].startswith("0") else 0
            inside = [f"{number:0{width}d}" for number in range(first, last + 1)]
        waiting.extendleft(text[: match.start()] + part + text[match.end() :] for part in reversed(inside))
        if len(waiting) + len(done) > MAX_SHARDS:
            raise UserError(f"{key}={pattern} stands for more than {MAX_SHARDS} files")
    return done


def _classes(given: Any, most: int) -> Sequence[str]:
    if given is None:
        return [str(number) for number in range(most + 1)]
    if isinstance(given, str):
        try:
            lines = Path(given).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeError) as error:
            raise UserError(f"dataset.options.classes={given} cannot be read as a text file: {error}") from None
        given = [line.strip() for line in lines if line.strip()]
    if not isinstance(given, list | tuple) or not given:
        raise UserError(f"dataset.options.classes={given} must be a list of names or a text file with one on each line")
    return [str(name) for name in given]


def _stems(paths: Sequence[Path]) -> list[str]:
    """Return a short name of each file: without folders where these do not tell them apart."""
    stems = [path.stem for path in paths]
    if len(set(stems)) == len(stems):
        return stems
    top = os.path.commonpath([os.path.abspath(path.parent) for path in paths])
    return [os.path.relpath(os.path.abspath(path), top).removesuffix(".tar") for path in paths]
