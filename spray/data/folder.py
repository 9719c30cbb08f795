"""The user's own images: a folder for each class.

Classes, samples and their order are those of torchvision's ``ImageFolder``; GIF files count as images too.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from spray.data.decoded import DecodedDataset, hash_of
from spray.data.decoding import decode
from spray.data.listed import Listing, Names, printable
from spray.data.listing import class_folders, list_images, remember_listing
from spray.errors import UserError

__all__ = ["FolderDataset", "class_folders"]


class FolderDataset(DecodedDataset):
    """Images in a class-per-folder tree, all brought to one size and to RGB.

    Files that cannot be decoded are left out and listed in `unreadable`; whether a file can be is found out once
    and remembered, with the listing, in the user's cache (see `spray.data.listing` and
    `spray.data.cache.cache_folder`). How modes are converted and sizes are changed: see
    `spray.data.decoding.decode`.

    Parameters
    ----------
    folder : str or Path
        Holds one folder for each class. Links are followed.
    image_size : int
        Height and width that the images are given.
    cache_bytes : int, default 2 GiB
        Decoded images are kept in memory if all of them would take no more than this; else each pass decodes anew.
    check : bool, default True
        Whether every file is decoded before it is used. If not, one that cannot be raises an error when it is.
    remember : bool, default True
        Whether the listing and what was found out about the files is taken from the user's cache and written there.

    Attributes
    ----------
    unreadable : list of (str, str)
        The files left out, relative to the folder, each with the reason.

    Raises
    ------
    UserError
        If the folder is missing, has no class folders, or a class has no (readable) image.
    """

    def __init__(
        self,
        folder: str | Path,
        image_size: int,
        cache_bytes: int | None = None,
        check: bool = True,
        remember: bool = True,
    ) -> None:
        if image_size < 1:
            raise UserError(f"dataset.image_size={image_size} must be at least 1")
        self.folder = Path(folder).expanduser()
        self._listing = list_images(self.folder, remember)
        self.classes = tuple(printable(name) for name in self._listing.classes)
        self._start(len(self._listing), (3, image_size, image_size), cache_bytes)
        bad: dict[int, str] = {}
        if check:
            known = self._listing.check
            bad = self._run_check(
                known,
                lambda: remember_listing(self.folder, self._listing) if remember else None,
                str(self.folder),
            )
        everything = Names(self._listing, np.arange(len(self._listing)))
        kept = self._keep(self._listing.labels, everything, bad, str(self.folder))
        self.names = Names(self._listing, kept)
        self.fingerprint = _fingerprint(self._listing, self.classes, image_size, sorted(bad))

    def _pixels(self, row: int) -> np.ndarray:
        return decode(self.folder / self._listing.path(row), self.image_shape[1])

    def _place(self, row: int) -> str:
        return str(self.folder / printable(self._listing.path(row)))


def _fingerprint(listing: Listing, classes: tuple[str, ...], image_size: int, left_out: list[int]) -> str:
    # Folders without images in them do not matter, nor when a folder changed.
    counts = np.diff(listing.starts)
    used = [listing.folders[number] for number in np.flatnonzero(counts)]
    return hash_of(
        json.dumps([image_size, classes]),
        "\0".join(used),
        counts[counts > 0],
        listing.names,
        listing.ends,
        listing.sizes,
        listing.times,
        listing.regular,
        np.array(left_out, dtype=np.int64),
    )
