"""What is known of the images in a class-per-folder tree: a million files in a few arrays."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from spray.data.checking import Check

NO_FILE = -1
"""Size and time of change of a link that leads nowhere."""


@dataclass
class Listing:
    """The images in a class-per-folder tree, ordered as torchvision's ``ImageFolder`` does.

    Attributes
    ----------
    classes : list of str
        The folders right inside, in alphabetical order.
    folders : list of str
        Every folder inside, relative, by class and then by path.
    of_class : ndarray of int32
        The class of each folder.
    changed : ndarray of int64
        When each folder changed, in nanoseconds; 0 where that was too shortly before it was listed.
    starts : ndarray of int64, shape (folders + 1,)
        Files [starts[i], starts[i + 1]) lie in folder i.
    names : bytes
        All files' names, one after the other.
    ends : ndarray of int64
        Where each name ends.
    sizes, times : ndarray of int64
        Bytes and time of change of each file; `NO_FILE` where a link leads nowhere.
    regular : ndarray of bool
        Whether it is a file, not a pipe or the like.
    check : Check
        Which of them could be read.
    root_changed : int
        When the folder itself changed.
    """

    classes: list[str]
    folders: list[str]
    of_class: np.ndarray
    changed: np.ndarray
    starts: np.ndarray
    names: bytes
    ends: np.ndarray
    sizes: np.ndarray
    times: np.ndarray
    regular: np.ndarray
    check: Check
    root_changed: int = 0

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def labels(self) -> np.ndarray:
        """The class of each file: int64."""
        return np.repeat(self.of_class, np.diff(self.starts)).astype(np.int64)

    def name(self, row: int) -> bytes:
        """Return a file's name without its folder."""
        start = self.ends[row - 1] if row else 0
        return self.names[start : self.ends[row]]

    def path(self, row: int) -> str:
        """Return a file's path inside of the folder."""
        folder = self.folders[int(np.searchsorted(self.starts, row, side="right")) - 1]
        return f"{folder}/{os.fsdecode(self.name(row))}"

    def rows_of(self, number: int) -> np.ndarray:
        """Return the rows of the files in a folder."""
        return np.arange(self.starts[number], self.starts[number + 1])

    def names_of(self, number: int) -> tuple[bytes, np.ndarray]:
        """Return the names of the files in a folder, one after the other, and where each ends."""
        start, stop = self.starts[number : number + 2]
        offset = int(self.ends[start - 1]) if start else 0
        ends = self.ends[start:stop] - offset
        return self.names[offset : offset + int(ends[-1]) if len(ends) else offset], ends


class Names(Sequence[str]):
    """The paths of files in a listing, as they can be printed.

    Parameters
    ----------
    listing : Listing
        The files.
    rows : ndarray of int
        Those that are meant, in order.
    """

    def __init__(self, listing: Listing, rows: np.ndarray) -> None:
        self._listing, self._rows = listing, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...

    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return Names(self._listing, self._rows[index])
        return printable(self._listing.path(int(self._rows[index])))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


def printable(name: str) -> str:
    """Return a name with bytes that are no UTF-8 and characters that cannot be printed written as escapes."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
