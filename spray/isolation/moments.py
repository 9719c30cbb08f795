"""Fitting a change of the whole image more closely, by the method of simulated moments.

What a change makes of the rest of a class shall have the statistics of the cluster (McFadden, "A method of simulated
moments for estimation of discrete response models without numerical integration", 1989): gain, offset, noise and blur
are moved until it has. A noise that is off by a hundredth of the range of values is plain to any classifier.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from spray.isolation.changed import Changed
from spray.isolation.evidence import Evidence
from spray.isolation.statistics import statistics

STEPS = {"gain": 0.05, "offset": 0.03, "noise": 0.02, "blur": 0.2}
"""By how much a parameter is moved to see what it does: more than the medians of few images scatter."""
VALUES = 60 * 64 * 64
"""Most values of all channels that statistics are taken of at once ..."""
FEWEST = 12
"""... but of so many images at least."""
ROUNDS = 6
DAMPING = 1.0
"""Of the first step of Levenberg and Marquardt."""
WORTH = 0.01
"""Least share of the loss that a round has to gain."""
ROUNDING = 1e-3
"""Differences of statistics below it, in units of the pixel range, are none."""


def refined(found: Changed, evidence: Evidence) -> Changed:
    """Return a change whose parameters are moved such that it gives the rest of a class the cluster's statistics.

    Medians of `statistics` are compared, in units of their standard errors, under the loss ``√(1 + z²)``: a cluster is
    never quite pure. Noise and blur are moved where there is some.

    Parameters
    ----------
    found : Changed
        Where to start.
    evidence : Evidence
        Cluster and rest.

    Returns
    -------
    Changed
        With the score of the one given, which does not depend on what is moved; itself if nothing is gained.
    """
    most = max(FEWEST, VALUES // evidence.images[0].numel())
    inside, outside = evidence.images[:most], evidence.other_images[:most]
    draws = np.arange(len(outside))
    names = _moved(found)
    units = np.array([STEPS[name] for name, _ in names])
    goal, error = _medians(statistics(inside))
    start = _medians(statistics(found.add(outside, draws)[0]))[1]
    unit = np.sqrt(error**2 + start**2) + ROUNDING

    def residual(values: np.ndarray) -> np.ndarray:
        changed = _with(found, names, values).add(outside, draws)[0]
        return np.asarray((_medians(statistics(changed))[0] - goal) / unit)

    values = np.array([_value(found, name, channel) for name, channel in names])
    now = residual(values)
    damping = DAMPING
    for _ in range(ROUNDS):
        moves = units * np.eye(len(units))
        slopes = np.stack([(residual(values + move) - residual(values - move)) / 2 for move in moves], axis=1)
        weighted = slopes.T / np.sqrt(1 + now**2)
        before = _loss(now)
        for _ in range(4):
            step = np.linalg.solve(weighted @ slopes + damping * np.eye(len(units)), -weighted @ now)
            tried = values + units * step.clip(-2, 2)
            then = residual(tried)
            if _loss(then) < _loss(now):
                values, now, damping = tried, then, damping / 3
                break
            damping *= 4
        if _loss(now) > (1 - WORTH) * before:
            break
    return _with(found, names, values)


def _loss(z: np.ndarray) -> float:
    return float(np.sqrt(1 + z**2).sum())


def _medians(values: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the median of each column (d,) of (n, d), and its standard error as the absolute deviations tell it."""
    middle = values.median(dim=0).values
    spread = 1.4826 * (values - middle).abs().median(dim=0).values
    return middle.double().numpy(), spread.double().numpy() / len(values) ** 0.5


def _moved(found: Changed) -> list[tuple[str, int | None]]:
    """Return the parameters that are moved, each with its channel."""
    names: list[tuple[str, int | None]] = [
        (name, channel) for name in ("gain", "offset") for channel in range(len(found.gain))
    ]
    return names + [(name, None) for name in ("noise", "blur") if getattr(found, name)]


def _value(found: Changed, name: str, channel: int | None) -> float:
    value = getattr(found, name)
    return float(value if channel is None else value[channel])


def _with(found: Changed, names: list[tuple[str, int | None]], values: np.ndarray) -> Changed:
    """Return the change with other parameters, kept within what they may be."""
    changes: dict[str, Any] = {"gain": found.gain.clone(), "offset": found.offset.clone()}
    for (name, channel), value in zip(names, values, strict=True):
        if channel is None:
            changes[name] = max(float(value), 0.0)
        else:
            changes[name][channel] = float(value)
    changes["gain"] = changes["gain"].clamp(0.1, 1.5)
    color = (changes["offset"] / (1 - changes["gain"]).clamp_min(0.05)).clamp(0, 1)
    pattern = color[:, None, None].expand_as(found.pattern).clone()
    return replace(found, **changes, pattern=pattern)
