"""Samples as a neighbour search wants them: checked, scaled, centred, and identical ones counted once.

Nothing here copies the samples as a whole: rows are prepared when they are taken.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from spray.errors import UserError

METRICS = ("euclidean", "cosine")
BLOCK_BYTES = 1 << 24
"""Rows are prepared in blocks of about so many bytes."""


class Vectors:
    """The distinct samples of X, in the order in which they first appear.

    Two samples are one here if a Euclidean distance of exactly zero lies between them once they are prepared. Under
    the cosine metric rows are divided by their length, so that half the squared Euclidean distance is the cosine
    distance; a row of zeros has no direction and gets one of its own, at distance 1 from all the others.

    Parameters
    ----------
    X : ndarray
        (n, d), n at least 2, finite.
    metric : str
        "euclidean" or "cosine".

    Raises
    ------
    UserError
        If there is no such metric.
    ValueError
        If `X` holds NaN or infinity, or fewer than two samples.
    """

    def __init__(self, X: np.ndarray, metric: str) -> None:
        if metric not in METRICS:
            raise UserError(f"there is no metric {metric!r}; there are {', '.join(METRICS)}")
        X = np.asarray(X)
        if X.ndim != 2 or len(X) < 2:
            raise ValueError(f"a neighbour graph needs at least two samples in rows, not shape {X.shape}")
        narrow = X.dtype == np.float32 or X.dtype.itemsize <= 2
        self.dtype = np.dtype(np.float32 if narrow else np.float64)
        self.metric = metric
        self._X = X
        self._keep: np.ndarray | None = None
        self._step = max(1, BLOCK_BYTES // (max(1, X.shape[1]) * self.dtype.itemsize))
        self._prepare()
        self.group, self.members, self.starts = self._distinct()
        if len(self.starts) - 1 < len(X):
            self._keep = self.members[self.starts[:-1]]
        # What a screening subtracts: products of centred rows lose fewer digits.
        self.mean = sum(self.take(rows).sum(axis=0, dtype=np.float64) for rows in self.blocks()) / len(self)

    def __len__(self) -> int:
        return len(self._X) if self._keep is None else len(self._keep)

    @property
    def n_samples(self) -> int:
        """Return the number of samples, identical ones counted each."""
        return len(self._X)

    @property
    def width(self) -> int:
        """Return the number of columns of what `take` returns."""
        return self._X.shape[1] + bool(self.metric == "cosine" and self._blank.any())

    def blocks(self) -> Iterator[slice]:
        """Yield the distinct samples in blocks."""
        for at in range(0, len(self), self._step):
            yield slice(at, min(at + self._step, len(self)))

    def take(self, rows: slice | np.ndarray) -> np.ndarray:
        """Return the distinct samples at `rows`, prepared: scaled, and of unit length under the cosine metric."""
        rows = rows if self._keep is None else self._keep[rows]
        taken = self._X[rows].astype(self.dtype, copy=False)
        if self.metric == "euclidean":
            return taken if self.scale == 1 else taken * self.dtype.type(self.scale)
        taken = np.ldexp(taken, -self._exponent[rows, None]) * self._inverse[rows, None].astype(self.dtype)
        return np.column_stack([taken, self._blank[rows]]) if self._blank.any() else taken

    def centred(self, rows: slice | np.ndarray, dtype: type = np.float32) -> np.ndarray:
        """Return the distinct samples at `rows`, prepared and centred, for products in the precision of `dtype`."""
        precision = np.result_type(self.dtype, dtype)
        return (self.take(rows).astype(precision, copy=False) - self.mean.astype(precision)).astype(dtype, copy=False)

    def distances(self, squared: np.ndarray) -> np.ndarray:
        """Return the distances in the metric from squared Euclidean distances of prepared samples."""
        return squared / 2 if self.metric == "cosine" else np.sqrt(squared) / self.scale

    def expand(self, indices: np.ndarray, squared: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the `k` neighbours of each sample from those of each distinct one; identical samples come first.

        Among identical samples those of lowest index are taken, so that however many there are, they hang together.
        """
        if self._keep is None:
            return indices[:, :k], squared[:, :k]
        n, sizes = self.n_samples, np.diff(self.starts)
        single = (sizes == 1) & (sizes[indices] == 1).all(axis=1) & (indices.shape[1] >= k)
        alone = single[self.group]
        out, out_squared = np.empty((n, k), indices.dtype), np.empty((n, k))
        if alone.any():
            out[alone] = self._keep[indices[self.group[alone], :k]]
            out_squared[alone] = squared[self.group[alone], :k]
        rest, step = np.flatnonzero(~alone), max(16, (1 << 19) // (k + 1) ** 2)
        for at in range(0, len(rest), step):
            samples = rest[at : at + step]
            own = self.group[samples]
            groups = np.concatenate([own[:, None], indices[own]], axis=1)
            between = np.concatenate([np.zeros((len(own), 1)), squared[own]], axis=1)
            # Of each group the first k + 1 members, of which one may be the sample itself.
            nth = np.arange(k + 1)
            there = nth < sizes[groups][:, :, None]
            found = self.members[np.where(there, self.starts[groups][:, :, None] + nth, 0)]
            there &= found != samples[:, None, None]
            first = np.argsort(~there.reshape(len(own), -1), axis=1, kind="stable")[:, :k]
            out[samples] = np.take_along_axis(found.reshape(len(own), -1), first, axis=1)
            out_squared[samples] = np.take_along_axis(between, first // (k + 1), axis=1)
        return out, out_squared

    def _prepare(self) -> None:
        """Look at all samples once: whether they are finite, and how large."""
        n = len(self._X)
        low, high = np.inf, -np.inf
        self.scale = 1.0
        if self.metric == "cosine":
            self._exponent, self._inverse = np.zeros(n, np.int32), np.zeros(n)
        for at in range(0, n, self._step):
            rows = slice(at, at + self._step)
            block = self._X[rows].astype(self.dtype, copy=False)
            if block.size:
                # NaN and infinity show in the extremes.
                least, most = float(block.min()), float(block.max())
                if not (np.isfinite(least) and np.isfinite(most)):
                    raise ValueError("X holds NaN or infinity")
                low, high = min(low, least), max(high, most)
            if self.metric == "cosine":
                largest = np.abs(block).max(axis=1, initial=0)
                self._exponent[rows] = np.frexp(largest)[1]
                length = np.linalg.norm(np.ldexp(block, -self._exponent[rows, None]).astype(np.float64), axis=1)
                self._inverse[rows] = np.divide(1, length, out=np.zeros_like(length), where=length > 0)
        if self.metric == "cosine":
            self._blank = (self._inverse == 0).astype(self.dtype)
        elif not 1e-6 < (largest := max(abs(low), abs(high), np.finfo(np.float64).tiny)) < 1e12:
            # Squares must neither overflow nor vanish; a power of two is exact.
            self.scale = float(2.0 ** -np.clip(np.frexp(largest)[1], -1000, 1000))

    def _distinct(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the group of each sample, the samples sorted by group, and where each group starts in them."""
        n = len(self._X)
        keys = np.zeros(n, np.uint64)
        words = self.width * self.dtype.itemsize // 4
        factors = np.random.default_rng(0).integers(0, 2**63, words, np.uint64) * np.uint64(2) + np.uint64(1)
        for at in range(0, n, self._step):
            # Adding zero makes -0 a 0, whose bytes differ.
            block = np.ascontiguousarray(self.take(slice(at, at + self._step)) + self.dtype.type(0)).view(np.uint32)
            keys[at : at + self._step] = (block * factors).sum(axis=1, dtype=np.uint64)
        _, first, group = np.unique(keys, return_index=True, return_inverse=True)
        if len(first) < n:
            # Equal keys are nearly always equal samples; those that aren't go alone.
            later = np.flatnonzero(first[group] != np.arange(n))
            for at in range(0, len(later), self._step):
                rows = later[at : at + self._step]
                alone = rows[(self.take(rows) != self.take(first[group[rows]])).any(axis=1)]
                group[alone], first = len(first) + np.arange(len(alone)), np.concatenate([first, alone])
        # Groups are numbered by their first samples.
        rank = np.empty(len(first), np.int64)
        rank[np.argsort(first)] = np.arange(len(first))
        group = rank[group]
        members = np.argsort(group, kind="stable")
        return group, members, np.concatenate([[0], np.cumsum(np.bincount(group))])
