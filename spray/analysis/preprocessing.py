"""From relevance to the vectors that SpRAy compares: steps by configuration, streamed through in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spray.analysis import anywhere as anywhere  # registers its steps
from spray.analysis.options import named_options
from spray.analysis.steps import STEPS, NormalizeSum, Pool, Step, Sum
from spray.errors import UserError

DEFAULT = ("sum", "pool", "normalize_sum")
"""Steps for heatmaps that are all aligned in the same way."""

Batches = Callable[[], Iterable[np.ndarray]]
"""Starts a pass through the samples."""


@dataclass(frozen=True)
class Features:
    """What the steps make of samples.

    Attributes
    ----------
    values : ndarray of float32
        (n, d), zero where a sample is not used.
    used : ndarray of bool
        (n,): samples with relevance; the others can't be compared with anything.
    """

    values: np.ndarray
    used: np.ndarray


class Preprocessing:
    """Steps that follow one another.

    Parameters
    ----------
    entries : sequence
        Each a step's name in `STEPS`, or a mapping from it to its options (see `named_options`).
    grid : int
        What `pool` averages maps down to where its entry doesn't say.

    Raises
    ------
    UserError
        For an unknown step or option, or a value of another type or out of range.
    """

    def __init__(self, entries: Sequence[Any] = DEFAULT, grid: int = 16) -> None:
        self.steps = [_build(entry, number, grid) for number, entry in enumerate(entries)]
        self.names = [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]

    @property
    def passes(self) -> int:
        """How often each sample is read."""
        return 1 + sum(step.fitted for step in self.steps)

    def width(self, shape: Sequence[int]) -> int:
        """Return how many values a sample of shape `shape`, (C, H, W) or (d,), ends up with, at most.

        Raises
        ------
        UserError
            If a step can't take what it would be given.
        """
        x = torch.rand((2, *shape), generator=torch.Generator().manual_seed(0))
        for number, (name, step) in enumerate(zip(self.names, self.steps, strict=True)):
            if step.maps and x.ndim != 4:
                remedy = (
                    f"put it before {self.names[number - 1]}" if number else "leave it out, as analysis=latent does"
                )
                raise UserError(
                    f"analysis.steps[{number}]={name} needs heatmaps, not vectors of {x[0].numel()} values; {remedy}"
                )
            try:
                x = step.trial(x)
            except UserError as error:
                raise UserError(f"analysis.steps[{number}]: {error}") from None
        return int(x[0].numel())

    def features(self, batches: Batches, n: int) -> Features:
        """Put samples through all steps, one batch in memory at a time and only the result of all of them.

        Parameters
        ----------
        batches : callable
            Returns the samples in batches (m, C, H, W) or (m, d), the same ones each time; called `passes` times.
        n : int
            Number of samples.

        Returns
        -------
        Features

        Raises
        ------
        ValueError
            If a value is not finite, or a step leaves the range of float32.
        """
        steps: list[Callable[[Tensor], Tensor]] = []
        for step in self.steps:
            steps.append(step.fit(self._fitting(batches, steps)) if step.fitted else step)
        values, used, at = np.zeros((n, 0), np.float32), np.zeros(n, bool), 0
        for batch, alive in self._through(batches, steps):
            rows = batch.flatten(1)
            if at == 0:
                values = np.zeros((n, rows.shape[1]), np.float32)
            values[at : at + len(rows)] = (rows * alive[:, None]).numpy()
            used[at : at + len(rows)] = alive.numpy()
            at += len(rows)
        return Features(values, used)

    def _fitting(self, batches: Batches, steps: Sequence[Callable[[Tensor], Tensor]]) -> Iterator[Tensor]:
        """Yield the samples that have relevance, as they are after the first `steps`."""
        return (batch[alive] for batch, alive in self._through(batches, list(steps)) if alive.any())

    def _through(
        self, batches: Batches, steps: Sequence[Callable[[Tensor], Tensor]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each batch after `steps`, and which of its samples have relevance; nothing is taken from it later.

        A sample that is all zero has none; every step leaves it so, but for a fitted one, after which zero is a value
        as any other.
        """
        with torch.inference_mode():
            for batch in batches():
                x = _finite(torch.from_numpy(np.ascontiguousarray(batch)).float())
                alive: Tensor | None = None
                for step, made in zip(self.steps, steps, strict=False):
                    if step.fitted and alive is None:
                        alive = x.flatten(1).any(dim=1)
                    x = _finite(made(x))
                yield x, x.flatten(1).any(dim=1) if alive is None else alive


def heatmap_features(relevance: np.ndarray | Tensor, grid: int = 16) -> np.ndarray:
    """Sum the channels, make the map smaller, divide it by the sum of its absolute values.

    Parameters
    ----------
    relevance : ndarray or Tensor
        (n, C, H, W), finite.
    grid : int
        Maps with more than so many rows or columns are averaged down to it.

    Returns
    -------
    ndarray of float32
        (n, h·w), h and w at most `grid`; a map without any relevance stays zero.

    Raises
    ------
    ValueError
        If the relevance is not finite.
    """
    maps = Sum()(_finite(torch.as_tensor(relevance).float()))
    features: np.ndarray = NormalizeSum()(Pool(grid)(maps)).flatten(1).numpy()
    return features


def _finite(x: Tensor) -> Tensor:
    """Return `x` if it is finite.

    Raises
    ------
    ValueError
        If it is not.
    """
    # The sum tells in one pass, unless it overflows itself.
    if not x.sum().isfinite() and not x.isfinite().all():
        raise ValueError("the relevance holds NaN or infinity, or numbers too large for float32")
    return x


def _build(entry: Any, number: int, grid: int) -> Step:
    key = f"analysis.steps[{number}]"
    name, options = named_options(entry, STEPS, key)
    if name == "pool":
        options = {"size": grid} | options
    try:
        return STEPS.get(name)(**options)
    except UserError as error:
        raise UserError(f"{key}: {name}.{error}") from None
