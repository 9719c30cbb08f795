"""Which images lie in a folder for each class: listed once, then compared with what was remembered.

A listing holds all that `spray.data.folder` has to know of a million files in a few arrays. At the next start the
time of change of every folder in it is compared, and size and time of change of its files: of all up to
`SAMPLED` files, of an even sample of more. A folder that changed is listed again; a file that changed means that
everything is.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from spray.data import cache
from spray.data.checking import Check
from spray.data.decoding import EXTENSIONS
from spray.data.listed import NO_FILE, Listing, printable
from spray.data.parallel import wait_in_threads
from spray.data.subset import even_sample
from spray.errors import UserError

FORMAT = 1
SAMPLED = 20_000
# Of a folder that changed so shortly before it was listed its time of change may not tell a later change:
# file systems count it in steps of up to two seconds.
UNSETTLED_NS = 2_500_000_000
STATES = ("sizes", "times", "regular")
"""What a listing holds of each file's state."""


@dataclass
class _Folder:
    """What was found in one folder."""

    path: str
    changed: int
    inside: list[str]
    files: list[bytes] = field(default_factory=list)
    # Its number in the remembered listing; if `same`, its files are those remembered there.
    old: int | None = None
    same: bool = False


def list_images(folder: Path, remember: bool = True) -> Listing:
    """Return the images in a folder that holds a folder for each class.

    As with ``ImageFolder``, hidden files and folders count and links are followed, but not a link to a folder
    around it.

    Parameters
    ----------
    folder : Path
        The folder.
    remember : bool, default True
        Whether the listing is taken from the user's cache where it still holds, and written there.

    Raises
    ------
    UserError
        If a folder is missing or can't be read, there is none inside, or a class has no file named like an image.
    """
    old = _load(folder) if remember else None
    if old is None:
        listing = _scan(folder, None, trusted=False)
    else:
        listing = _scan(folder, old, trusted=_same_files(folder, old))
        if listing is old:
            return old
    if remember:
        remember_listing(folder, listing)
    return listing


def class_folders(folder: Path) -> list[str]:
    """Return the names of the folders in `folder`, in alphabetical order: the classes.

    Raises
    ------
    UserError
        If there is no such folder, or no folder in it.
    """
    return _classes(folder, _read(folder, ""))


def remember_listing(folder: Path, listing: Listing) -> None:
    """Save a listing, with what is known of its files, for the next start."""
    folders, folder_lengths = cache.pack(listing.folders)
    classes, class_lengths = cache.pack(listing.classes)
    arrays = {name: getattr(listing, name) for name in (*STATES, "of_class", "changed", "starts")}
    arrays |= {"folders": folders, "folder_lengths": folder_lengths}
    arrays |= {"classes": classes, "class_lengths": class_lengths}
    arrays |= {"names": np.frombuffer(listing.names, np.uint8), "lengths": np.diff(listing.ends, prepend=0)}
    arrays |= {"format": np.array([FORMAT, listing.root_changed], dtype=np.int64)}
    cache.save("listings", os.path.realpath(folder), arrays | listing.check.to_arrays())


def _load(folder: Path) -> Listing | None:
    arrays = cache.load("listings", os.path.realpath(folder))
    if arrays is None:
        return None
    try:
        form, root_changed = arrays.pop("format").tolist()
        if form != FORMAT:
            return None
        listing = Listing(
            classes=cache.unpack(arrays["classes"], arrays["class_lengths"]),
            folders=cache.unpack(arrays["folders"], arrays["folder_lengths"]),
            names=arrays["names"].tobytes(),
            ends=np.cumsum(arrays["lengths"], dtype=np.int64),
            check=Check.from_arrays(arrays),
            root_changed=root_changed,
            **{name: arrays[name] for name in (*STATES, "of_class", "changed", "starts")},
        )
    except (KeyError, ValueError):
        return None
    return listing


def _same_files(folder: Path, listing: Listing) -> bool:
    """Whether the files, or an even sample of many, have the size and time of change that were remembered."""
    rows = even_sample(len(listing), SAMPLED)
    found = _state(folder, listing, rows)
    return all(np.array_equal(array, getattr(listing, name)[rows]) for name, array in zip(STATES, found, strict=True))


def _scan(folder: Path, old: Listing | None, trusted: bool) -> Listing:
    """List a folder; the parts of a trusted older listing that still hold are taken from there."""
    known = {} if old is None else {path: number for number, path in enumerate(old.folders)}
    inside = _children(known)

    def visit(path: str) -> _Folder:
        number = known.get(path)
        if trusted and old is not None and number is not None:
            settled = int(old.changed[number])
            if settled and settled == _changed(folder / path):
                return _Folder(path, settled, inside.get(path, []), old=number, same=True)
        found = _read(folder, path)
        found.old = number
        return found

    if trusted and old is not None and old.root_changed and old.root_changed == _changed(folder):
        root, classes = _Folder("", old.root_changed, []), old.classes
    else:
        root = _read(folder, "")
        classes = _classes(folder, root)
    folders: list[tuple[int, _Folder]] = []
    level = [(index, name) for index, name in enumerate(classes)]
    while level:
        found = wait_in_threads(visit, [path for _, path in level])
        folders += [(index, part) for (index, _), part in zip(level, found, strict=True)]
        level = [(index, f"{part.path}/{name}") for index, part in folders[-len(level) :] for name in part.inside]
    if old is not None and trusted and classes == old.classes and all(part.same for _, part in folders):
        return old
    folders.sort(key=lambda entry: (entry[0], entry[1].path))
    listing = _join(folder, classes, folders, old)
    listing.root_changed = root.changed
    return listing


def _join(folder: Path, classes: list[str], folders: list[tuple[int, _Folder]], old: Listing | None) -> Listing:
    """Make a listing of what was found in each folder."""
    parts = [part for _, part in folders]
    names: list[bytes] = []
    lengths: list[np.ndarray] = []
    for part in parts:
        if part.same and old is not None and part.old is not None:
            content, ends = old.names_of(part.old)
            names.append(content)
            lengths.append(np.diff(ends, prepend=0))
        else:
            names += part.files
            lengths.append(np.array([len(name) for name in part.files], dtype=np.int64))
    starts = np.cumsum([0, *(len(part) for part in lengths)], dtype=np.int64)
    n = int(starts[-1])
    listing = Listing(
        classes=classes,
        folders=[part.path for part in parts],
        of_class=np.array([index for index, _ in folders], dtype=np.int32),
        changed=np.array([part.changed for part in parts], dtype=np.int64),
        starts=starts,
        names=b"".join(names),
        ends=np.cumsum(np.concatenate(lengths), dtype=np.int64),
        sizes=np.zeros(n, dtype=np.int64),
        times=np.zeros(n, dtype=np.int64),
        regular=np.zeros(n, dtype=bool),
        check=Check.unknown(n),
    )
    _require_images(folder, listing)
    fresh = np.ones(n, dtype=bool)
    for number, part in enumerate(parts):
        if part.same and old is not None and part.old is not None:
            rows, before = listing.rows_of(number), old.rows_of(part.old)
            fresh[rows] = False
            for name in STATES:
                getattr(listing, name)[rows] = getattr(old, name)[before]
            listing.check.take(rows, old.check, before)
    rows_of_fresh = np.flatnonzero(fresh)
    for name, array in zip(STATES, _state(folder, listing, rows_of_fresh), strict=True):
        getattr(listing, name)[rows_of_fresh] = array
    if old is not None:
        _carry_over(listing, parts, old)
    return listing


def _carry_over(listing: Listing, parts: list[_Folder], old: Listing) -> None:
    """Keep what was known of the files that did not change in folders that were listed again."""
    for number, part in enumerate(parts):
        if part.same or part.old is None:
            continue
        rows, before = listing.rows_of(number), old.rows_of(part.old)
        (content, ends), (old_content, old_ends) = listing.names_of(number), old.names_of(part.old)
        if content != old_content or not np.array_equal(ends, old_ends):
            old_rows = {old.name(row): row for row in before.tolist()}
            match = np.array([old_rows.get(listing.name(row), -1) for row in rows.tolist()], dtype=np.int64)
            rows, before = rows[match >= 0], match[match >= 0]
        same = np.ones(len(rows), dtype=bool)
        for name in STATES:
            same &= getattr(listing, name)[rows] == getattr(old, name)[before]
        listing.check.take(rows[same], old.check, before[same])


def _require_images(folder: Path, listing: Listing) -> None:
    counts = np.bincount(listing.labels, minlength=len(listing.classes))
    if not counts.all():
        allowed = " ".join(EXTENSIONS)
        name = printable(listing.classes[int(counts.argmin())])
        raise UserError(f"class {name!r} in {folder} has no images ({allowed}); add some or remove its folder")


def _classes(folder: Path, root: _Folder) -> list[str]:
    if not root.inside:
        raise UserError(f"{folder} holds no folders; put the images of each class into a folder of their own")
    return root.inside


def _read(folder: Path, path: str) -> _Folder:
    """List one folder inside of `folder`."""
    here = os.path.join(folder, path)
    inside: list[str] = []
    files: list[str] = []
    try:
        now, changed = time.time_ns(), os.stat(here).st_mtime_ns  # a change from now on is seen as one
        with os.scandir(here) as entries:
            for entry in entries:
                if _is_folder(entry):
                    # Whatever lies right inside is a class.
                    if not path or not entry.is_symlink() or not _leads_upwards(entry.path):
                        inside.append(entry.name)
                elif entry.name.lower().endswith(EXTENSIONS):
                    files.append(entry.name)
    except FileNotFoundError:
        raise UserError(f"there is no folder {here}; give one that holds a folder for each class") from None
    except OSError as error:
        raise UserError(f"cannot read the folder {here}: {error.strerror}") from None
    settled = 0 if changed > now - UNSETTLED_NS else changed
    return _Folder(path, settled, sorted(inside), [os.fsencode(name) for name in sorted(files)])


def _changed(path: Path) -> int | None:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return None


def _state(folder: Path, listing: Listing, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return size, time of change and whether it is a regular file, of each of some files."""
    prefix = f"{folder}/"
    sizes, times = np.full(len(rows), NO_FILE, dtype=np.int64), np.full(len(rows), NO_FILE, dtype=np.int64)
    regular = np.zeros(len(rows), dtype=bool)

    def look(place: int) -> None:
        try:
            status = os.stat(prefix + listing.path(int(rows[place])))
        except OSError:
            return
        sizes[place], times[place], regular[place] = status.st_size, status.st_mtime_ns, stat.S_ISREG(status.st_mode)

    wait_in_threads(look, range(len(rows)))
    return sizes, times, regular


def _children(paths: Iterable[str]) -> dict[str, list[str]]:
    children: dict[str, list[str]] = {}
    for path in paths:
        parent, _, name = path.rpartition("/")
        if parent:
            children.setdefault(parent, []).append(name)
    return children


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _leads_upwards(path: str) -> bool:
    """Whether a link leads to a folder around it: following it would find each image again and again."""
    target, here = os.path.realpath(path), os.path.realpath(os.path.dirname(path))
    return os.path.commonpath([target, here]) == target
