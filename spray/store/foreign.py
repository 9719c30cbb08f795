"""Opens HDF5 files that may come from anywhere: nothing outside of the file is read, nothing absurd believed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import h5py
from h5py import h5d, h5g, h5l, h5o, h5s, h5t, h5z

from spray.errors import UserError

LARGEST_CHUNK = 1 << 30
"""Bytes of a chunk, which HDF5 holds in memory as a whole."""

DENSEST = 1100
"""How many times larger than the file its data may be: deflate packs at most 1032 bytes into one."""

_SLACK = 1 << 20
# Complex numbers are compounds before HDF5 2.0.
_COMPLEX = (h5t.COMPLEX,) if hasattr(h5t, "COMPLEX") else ()
_PLAIN = (h5t.INTEGER, h5t.FLOAT, h5t.STRING, h5t.ENUM, h5t.BITFIELD, h5t.OPAQUE, *_COMPLEX)


def open_foreign(path: Path) -> h5py.File:
    """Open an HDF5 file read-only, after a walk through all of it that follows nothing out of the file.

    Parameters
    ----------
    path : Path
        Of the file.

    Returns
    -------
    h5py.File
        Also a context manager that closes it.

    Raises
    ------
    UserError
        If there is no such file, it isn't HDF5 or is cut off or damaged; or if it holds an external link, a
        soft link that leads nowhere, groups that contain each other, values kept in other files (external
        storage, virtual datasets), types that aren't plain values, filters that aren't installed, or
        declares far more values than it could hold.
    """
    path = Path(path)
    file = _open(path)
    try:
        with reading_errors(path):
            _Walk(path, path.stat().st_size).through(file)
    except BaseException:
        file.close()
        raise
    return file


@contextmanager
def reading_errors(path: Path) -> Iterator[None]:
    """Turn HDF5's errors, which come in many kinds, into a user's error."""
    try:
        yield
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} is damaged: {_line(error)}") from error


def _open(path: Path) -> h5py.File:
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if not path.is_file():
        raise UserError(f"{path} is not a file")
    try:
        path.open("rb").close()
        return h5py.File(path, "r")
    except PermissionError:
        raise UserError(f"{path} can't be read: permission denied") from None
    except (OSError, RuntimeError, ValueError) as error:
        text = _line(error)
        if "truncated file" in text:
            raise UserError(f"{path} is cut off: it is shorter than it says itself; copy or compute it again") from None
        if "file signature not found" in text:
            raise UserError(f"{path} is not an HDF5 file") from None
        raise UserError(f"{path} can't be opened: {text}") from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


@dataclass
class _Walk:
    """Goes through all objects of a file once."""

    path: Path
    file_size: int
    inside: dict[int, set[int]] = field(default_factory=dict)
    """Groups in each group, by address."""
    soft: list[tuple[int, h5g.GroupID, bytes, str]] = field(default_factory=list)

    def through(self, file: h5py.File) -> None:
        # Soft links may lead through external ones: they are followed when it is sure that there are none.
        start = h5o.get_info(file.id).addr
        waiting = [(start, h5g.open(file.id, b"/"), "")]
        self.inside[start] = set()
        while waiting:
            at, group, name = waiting.pop()
            for link in list(group):
                waiting += self._visit(at, group, link, f"{name}/{link.decode(errors='replace')}")
        for at, group, link, name in self.soft:
            self._follow(at, group, link, name)
        self._refuse_circles(start)

    def _visit(self, at: int, group: h5g.GroupID, link: bytes, name: str) -> Iterator[tuple[int, h5g.GroupID, str]]:
        """Look at one link; yield the group that it leads to, if it is the first that does."""
        kind = group.links.get_info(link).type
        if kind == h5l.TYPE_EXTERNAL:
            raise UserError(
                f"{self.path}: {name} is a link to another file; only files that hold all they need are read"
            )
        if kind == h5l.TYPE_SOFT:
            self.soft.append((at, group, link, name))
            return
        if kind != h5l.TYPE_HARD:
            raise UserError(f"{self.path}: {name} is a link of an unknown kind")
        info = h5o.get_info(group, link)
        if info.type == h5o.TYPE_DATASET:
            self._check_dataset(h5d.open(group, link), name)
        elif info.type == h5o.TYPE_GROUP:
            self.inside[at].add(info.addr)
            if info.addr not in self.inside:
                self.inside[info.addr] = set()
                yield info.addr, h5g.open(group, link), name

    def _follow(self, at: int, group: h5g.GroupID, link: bytes, name: str) -> None:
        try:
            info = h5o.get_info(group, link)
        except (OSError, RuntimeError, KeyError, ValueError):
            raise UserError(f"{self.path}: the link {name} leads nowhere") from None
        if info.type == h5o.TYPE_GROUP:
            self.inside[at].add(info.addr)

    def _refuse_circles(self, start: int) -> None:
        """Take away groups that contain no others, until none is left: what can't be taken away is a circle."""
        within: dict[int, list[int]] = {}
        for outer, inner in self.inside.items():
            for address in inner:
                within.setdefault(address, []).append(outer)
        left = {outer: len(inner) for outer, inner in self.inside.items()}
        empty = [outer for outer, number in left.items() if not number]
        while empty:
            address = empty.pop()
            del left[address]
            for outer in within.get(address, []):
                left[outer] -= 1
                if not left[outer]:
                    empty.append(outer)
        if left:
            raise UserError(f"{self.path}: its groups contain each other in a circle")

    def _check_dataset(self, dataset: h5d.DatasetID, name: str) -> None:
        """Check where values are before anything else: the shape of a virtual dataset may depend on other files."""
        properties = dataset.get_create_plist()
        layout = properties.get_layout()
        if layout == h5d.VIRTUAL:
            raise UserError(
                f"{self.path}: {name} is a virtual dataset, whose values are in other files; copy them into it"
            )
        if properties.get_external_count():
            raise UserError(
                f"{self.path}: the values of {name} are in another file (external storage); copy them into it"
            )
        self._check_type(dataset.get_type(), name)
        for number in range(properties.get_nfilters()):
            code = properties.get_filter(number)[0]
            if not h5z.filter_avail(code):
                raise UserError(f"{self.path}: {name} needs the HDF5 filter {code}, which isn't installed")
        if dataset.get_space().get_simple_extent_type() == h5s.NULL:
            return
        size = dataset.get_type().get_size()
        declared = stored = prod(dataset.shape) * size
        if layout == h5d.CHUNKED:
            chunk = prod(properties.get_chunk()) * size
            if chunk > max(LARGEST_CHUNK, self.file_size):
                raise UserError(f"{self.path}: {name} is in chunks of {chunk:,} bytes, too many to be read at once")
            stored = min(declared, dataset.get_num_chunks() * chunk) if declared else 0
        elif layout == h5d.CONTIGUOUS:
            stored = dataset.get_storage_size()
        if declared - stored > self.file_size + _SLACK or stored > DENSEST * self.file_size + _SLACK:
            shape = " x ".join(str(length) for length in dataset.shape)
            raise UserError(
                f"{self.path}: {name} claims to be {shape}, {declared:,} bytes, which a file of "
                f"{self.file_size:,} bytes can't hold"
            )

    def _check_type(self, kind: h5t.TypeID, name: str) -> None:
        """Refuse types whose values are not in the dataset itself, texts excepted."""
        category = kind.get_class()
        if category == h5t.COMPOUND:
            for number in range(kind.get_nmembers()):
                self._check_type(kind.get_member_type(number), name)
        elif category == h5t.ARRAY:
            self._check_type(kind.get_super(), name)
        elif category not in _PLAIN:
            raise UserError(f"{self.path}: {name} holds objects or references, not plain values")
