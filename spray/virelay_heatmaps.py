"""Reads the heatmaps of a ViRelAy project, checked before they are believed, and writes them as spray keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np

from spray.data.base import ImageDataset
from spray.errors import UserError
from spray.storage import replacing
from spray.store.disk import closing, new_file
from spray.store.foreign import open_foreign, reading_errors

if TYPE_CHECKING:
    from spray.virelay_project import Project


def write_attributions(project: Project, dataset: ImageDataset, path: Path) -> int:
    """Write a project's heatmaps as spray keeps them: row i is sample i, channels first.

    Samples without a heatmap get zeros and a false `/valid`. Of the model's outputs only those of the dataset's
    classes are kept.

    Parameters
    ----------
    project : Project
        As `read_project` returns it.
    dataset : ImageDataset
        Its images.
    path : Path
        Of the new file: `/attribution` (N, C, H, W), `/label` (N,), `/prediction` (N, classes), `/valid` (N,).

    Returns
    -------
    int
        How many samples have a heatmap.

    Raises
    ------
    UserError
        If a file is damaged, foreign, of other data, or holds heatmaps of several sizes.
    """
    n, names = len(dataset), {name: place for place, name in enumerate(dataset.classes)}
    columns = [label.index for label in project.labels if label.name in names]
    files = [_open_source(source) for source in project.attributions]
    try:
        valid = np.zeros(n, bool)
        shape = files[0].shape
        with replacing(path) as temporary:
            target = new_file(temporary)
            with closing(target):
                rows = target.create_dataset("attribution", (n, *shape), "<f4", chunks=(1, *shape), fletcher32=True)
                predictions = np.zeros((n, len(dataset.classes)), np.float32)
                zeros = np.zeros(shape, np.float32)
                for source in files:
                    source.require(shape, n)
                    for row, sample in enumerate(source.index):
                        if valid[sample]:
                            continue
                        with reading_errors(source.path):
                            rows[sample] = source.heatmap(row)
                            predictions[sample] = source.outputs(row, columns)
                            source.require_class(row, int(sample), columns, dataset.labels)
                        valid[sample] = True
                for sample in np.flatnonzero(~valid):
                    rows[sample] = zeros
                for key, values in (
                    ("label", np.asarray(dataset.labels, "<i8")),
                    ("prediction", predictions),
                    ("valid", valid),
                ):
                    target.create_dataset(key, data=values, fletcher32=True)
    finally:
        for source in files:
            source.file.close()
    if not valid.any():
        raise UserError(f"{project.path}: none of the samples has a heatmap")
    return int(valid.sum())


class _Source:
    """One open file of heatmaps."""

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path, self.file = path, file
        for name in ("attribution", "label", "prediction"):
            if name not in file:
                raise UserError(f"{path} has no /{name}, which a file of heatmaps of ViRelAy has")
        rows = file["attribution"]
        self.keys = sorted(rows) if isinstance(rows, h5py.Group) else None
        first = rows[self.keys[0]] if self.keys else rows
        size = first.shape if self.keys else first.shape[1:]
        if len(size) != 3 or (not self.keys and self.keys is not None) or first.dtype.kind != "f":
            raise UserError(f"{path}: /attribution holds {first.dtype} {first.shape}; it must be float (N, C, H, W)")
        # As ViRelAy decides it.
        self.channels_last = int(np.argmin(size)) != 0
        self.shape = (size[2], size[0], size[1]) if self.channels_last else tuple(size)
        n = len(self.keys) if self.keys else rows.shape[0]
        if self.keys and any(rows[key].shape != size for key in self.keys):
            raise UserError(f"{path}: its heatmaps differ in size; spray ranks those of one size")
        self.index = np.asarray(file["index"][:] if "index" in file else np.arange(n)).astype(np.int64)
        lengths = {name: len(file[name]) for name in ("label", "prediction")} | {"index": len(self.index)}
        if wrong := next((name for name, length in lengths.items() if length != n), None):
            raise UserError(f"{path}: /{wrong} has {lengths[wrong]} rows for {n} heatmaps")

    def heatmap(self, row: int) -> np.ndarray:
        values = self._row("attribution", row).astype(np.float32)
        return np.moveaxis(values, -1, 0) if self.channels_last else values

    def outputs(self, row: int, columns: Sequence[int]) -> np.ndarray:
        values = self._row("prediction", row).reshape(-1)
        if len(values) <= max(columns):
            raise UserError(
                f"{self.path}: /prediction has {len(values)} classes, but the labels go up to {max(columns)}"
            )
        chosen: np.ndarray = values[list(columns)].astype(np.float32)
        return chosen

    def require(self, shape: tuple[int, ...], n: int) -> None:
        if self.shape != shape:
            raise UserError(f"{self.path} has heatmaps of {self.shape}, another file of {shape}; they must be the same")
        if self.index.min(initial=0) < 0 or self.index.max(initial=-1) >= n:
            raise UserError(f"{self.path}: /index names sample {self.index.max()}, but the dataset has {n}")

    def require_class(self, row: int, sample: int, columns: Sequence[int], labels: np.ndarray) -> None:
        given = label_number(self._row("label", row))
        if given != columns[int(labels[sample])]:
            raise UserError(
                f"{self.path}: sample {sample} is of class {given}, in the dataset of {columns[int(labels[sample])]}; "
                "are they of other data?"
            )

    def _row(self, name: str, row: int) -> np.ndarray:
        at = self.file[name]
        if not isinstance(at, h5py.Group):
            return np.asarray(at[row])
        # Where rows have keys, all three have the same ones.
        return np.asarray(at[self.keys[row] if self.keys else sorted(at)[row]][()])


def label_number(value: np.ndarray) -> int | None:
    """Return the class that a stored label stands for, None where it isn't exactly one."""
    if value.ndim == 0:
        return int(value)
    present = np.flatnonzero(value)
    return int(present[0]) if len(present) == 1 else None


def _open_source(path: Path) -> _Source:
    file = open_foreign(path)
    try:
        with reading_errors(path):
            return _Source(path, file)
    except BaseException:
        file.close()
        raise
