"""Reads files of analyses (`analysis.h5`): groups of samples with embeddings and clusterings, checked as they are read.

A class's group is named by its eight-digit index. Other groups, `predicted-<class>` and `all`, are beside them under
names that can't be taken for a class; only who asks for one by its name gets it.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import TracebackType

import h5py
import numpy as np

from spray.errors import UserError
from spray.store.foreign import open_foreign, reading_errors

REMEDY = "delete it and start the run again, which computes it anew"

_CLASS = re.compile(r"[0-9]{8}")


def class_group(class_index: int) -> str:
    """Return the name of a class's group."""
    return f"{class_index:08d}"


def predicted_group(class_index: int) -> str:
    """Return the name of the group of what is predicted as a class."""
    return f"predicted-{class_index:08d}"


ALL = "all"
"""Name of the group of all samples."""


def open_analysis(path: Path, n_samples: int | None = None) -> Analysis:
    """Open a file of analyses.

    Parameters
    ----------
    path : Path
        Of the file.
    n_samples : int, optional
        How many samples there are; no index may be beyond.

    Returns
    -------
    Analysis
        Also a context manager that closes the file.

    Raises
    ------
    UserError
        If the file is missing, damaged, cut off, isn't HDF5 or refers to other files; see `open_foreign`.
    """
    file = open_foreign(Path(path))
    try:
        with reading_errors(Path(path)):
            return Analysis(Path(path), file, n_samples)
    except BaseException:
        file.close()
        raise


class Analysis:
    """An open file of analyses; made by `open_analysis`.

    Attributes
    ----------
    classes : list of int
        Classes that have a group, ascending.
    names : list of str
        All groups.
    """

    def __init__(self, path: Path, file: h5py.File, n_samples: int | None = None) -> None:
        self.path, self._file, self._n_samples = path, file, n_samples
        self.names = [name for name in file if isinstance(file[name], h5py.Group)]
        self.classes = [int(name) for name in self.names if _CLASS.fullmatch(name)]

    def __enter__(self) -> Analysis:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def group(self, which: int | str) -> AnalysisGroup:
        """Return the group of a class, by its index, or any other by its name.

        Raises
        ------
        UserError
            If there is none.
        """
        name = which if isinstance(which, str) else class_group(which)
        if name not in self.names:
            what = f"no group {name}" if isinstance(which, str) else f"no group for class {which}"
            raise UserError(f"{self.path} has {what}, but {', '.join(self.names) or 'none at all'}; {REMEDY}")
        with reading_errors(self.path):
            return AnalysisGroup(self.path, self._file[name], self._n_samples)


class AnalysisGroup:
    """What was found out about a group of samples.

    Attributes
    ----------
    name : str
        In the file.
    index : ndarray of int64
        (n,): the samples, each once.
    clusterings : list of str
        Names of the clusterings, in alphabetical order.
    embeddings : list of str
        Names of the embeddings, in alphabetical order.
    """

    def __init__(self, path: Path, group: h5py.Group, n_samples: int | None) -> None:
        self.path, self._group, self.name = path, group, group.name.strip("/")
        self.index = self._values("index", "iu", 1).astype(np.int64)
        below = self.index.min(initial=0) >= 0 and (n_samples is None or self.index.max(initial=-1) < n_samples)
        if not below or len(np.unique(self.index)) < len(self.index):
            raise UserError(
                f"{path}: /{self.name}/index doesn't hold each sample once, or others than the run's; {REMEDY}"
            )
        self.clusterings, self.embeddings = self._members("cluster"), self._members("embedding")

    def __len__(self) -> int:
        return len(self.index)

    def labels(self, clustering: str) -> np.ndarray:
        """Return a clustering's labels, int64 (n,): 0, 1, …, -1 for noise.

        Raises
        ------
        UserError
            If there is no such clustering, or it is damaged.
        """
        labels = self._values(f"cluster/{clustering}", "iub", 1, len(self)).astype(np.int64)
        if labels.min(initial=0) < -1:
            raise UserError(f"{self.path}: /{self.name}/cluster/{clustering} has labels below -1; {REMEDY}")
        return labels

    def embedding(self, name: str = "spectral") -> np.ndarray:
        """Return an embedding, float (n, m), finite, as it is stored: spectral columns by descending eigenvalue.

        Raises
        ------
        UserError
            If there is no such embedding, or it is damaged.
        """
        values = self._values(f"embedding/{name}", "f", 2, len(self))
        if not np.isfinite(values).all():
            raise UserError(f"{self.path}: /{self.name}/embedding/{name} holds NaN or infinity; {REMEDY}")
        return values

    def eigenvalues(self, name: str = "spectral") -> np.ndarray:
        """Return an embedding's eigenvalues, float64 (m,), in the order of its columns; none, if it has none."""
        if name not in self.embeddings:
            return np.zeros(0)
        with reading_errors(self.path):
            values = np.asarray(self._group[f"embedding/{name}"].attrs.get("eigenvalue", ()), np.float64).reshape(-1)
        return np.nan_to_num(values)

    def _members(self, name: str) -> list[str]:
        group = self._group.get(name)
        return sorted(group) if isinstance(group, h5py.Group) else []

    def _values(self, name: str, kinds: str, ndim: int, length: int | None = None) -> np.ndarray:
        where = f"/{self.name}/{name}"
        if not isinstance(dataset := self._group.get(name), h5py.Dataset):
            raise UserError(f"{self.path} has no {where}; {REMEDY}")
        if dataset.dtype.kind not in kinds or dataset.ndim != ndim:
            raise UserError(f"{self.path}: {where} holds {dataset.dtype} of shape {dataset.shape}; {REMEDY}")
        if length is not None and len(dataset) != length:
            raise UserError(f"{self.path}: {where} has {len(dataset)} rows, but the index has {length}; {REMEDY}")
        try:
            values: np.ndarray = dataset[:]
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"{self.path} is damaged: {where} can't be read as it was written; {REMEDY}") from error
        return values
