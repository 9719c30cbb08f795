"""An artifact's axes in a layer: its directions, and what samples with and without it have along them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from spray.correction.base import Finding, Problem, inputs, unmarked
from spray.correction.cav import detector, directions
from spray.correction.layers import activations, channel_dim
from spray.correction.wrapped import Projected, Projection, pooled
from spray.errors import UserError
from spray.training import batches

MOST_VALUES = 2**26
"""Most activations that are held at once, half a GB of float64."""
FEWEST = 2
"""Fewest samples of each kind that a direction is estimated from."""


@dataclass(frozen=True)
class Axes:
    """The directions of one artifact in a layer.

    Attributes
    ----------
    layer : str
        See `spray.correction.layers.changed`.
    dim : int or None
        The dimension of channels, if the directions are of channels; else they are of all activations.
    directions : Tensor
        (k, d), orthonormal.
    clean, marked : Tensor
        (k,): z⁻ and z⁺, the means of h·a over samples without and with the artifact; over their positions as well if
        directions are of channels.
    gate : tuple of Tensor
        Weights (d,) and bias () of a classifier that says which samples carry the artifact.
    """

    layer: str
    dim: int | None
    directions: Tensor
    clean: Tensor
    marked: Tensor
    gate: tuple[Tensor, Tensor] | None = None

    @property
    def name(self) -> str:
        """The layer and what the directions are of."""
        return f"{self.layer} ({'full' if self.dim is None else 'max'})"


def fit_axes(problem: Problem, finding: Finding, layer: str, pool: bool, gate: bool = False) -> Axes:
    """Estimate an artifact's axes in a layer, from the samples of its class.

    Where that class has hardly any samples of one kind, unmarked samples of all classes are taken as well.

    Parameters
    ----------
    problem : Problem
        With the model.
    finding : Finding
        The artifact.
    layer : str
        Where.
    pool : bool
        Whether directions are of channels, estimated from activations max-pooled over positions. No difference
        where there are no positions.
    gate : bool
        Whether a classifier is fitted as well that says which samples carry the artifact (logistic regression).

    Raises
    ------
    UserError
        If there are too few samples with or without the artifact, or the layer does not give activations.
    """
    members, marked = samples(problem, finding)
    probe = activations(problem.model, layer, inputs(problem, members[:1]))
    channels = channel_dim(problem.model, layer, probe.shape)
    dim = channels if pool else None
    size = probe[0].numel() if dim is None else probe.shape[dim]
    kept = _thinned(marked, max(2 * FEWEST, MOST_VALUES // size), problem.seed)
    members, marked = members[kept], marked[kept]
    vectors, means = [], []
    for part in batches(len(members), problem.batch_size):
        a = activations(problem.model, layer, inputs(problem, members[part]))
        vectors.append(pooled(a, dim).double())
        if dim is not None:
            means.append(a.movedim(dim, -1).flatten(1, -2).double().mean(dim=1))
    v = torch.cat(vectors)
    t = torch.from_numpy(marked).to(v.device)
    H = directions(problem.options.cav, v, t, problem.options.directions)
    along = (v if dim is None else torch.cat(means)) @ H.T
    fires = None
    if gate:
        w, b = detector("logistic", v, t)
        fires = w.to(probe), torch.tensor(b).to(probe)
    like = [part.to(probe) for part in (H, along[~t].mean(dim=0), along[t].mean(dim=0))]
    return Axes(layer, dim, like[0], like[1], like[2], fires)


def samples(problem: Problem, finding: Finding) -> tuple[np.ndarray, np.ndarray]:
    """Return the samples that an artifact's direction is estimated from, (n,), and which carry it, bool (n,).

    Raises
    ------
    UserError
        If there are too few of one kind.
    """
    members = np.flatnonzero(np.asarray(problem.train.labels) == finding.class_index)
    marked = np.isin(members, finding.samples)
    if (~marked).sum() < FEWEST:
        others = np.setdiff1d(np.flatnonzero(unmarked(problem)), members)
        members = np.concatenate([members, others])
        marked = np.isin(members, finding.samples)
    if marked.sum() < FEWEST or (~marked).sum() < FEWEST:
        raise UserError(
            f"an artifact of class {problem.train.classes[finding.class_index]!r} has {marked.sum()} samples with it "
            f"and {(~marked).sum()} without; a direction needs {FEWEST} of each: leave latent methods out of "
            "correction.methods"
        )
    return members, marked


def joint(axes: Sequence[Axes], strength: float = 1.0) -> list[Projection]:
    """Return P-ClArC's projection for artifacts in the same layer: all their directions at once."""
    axes = [part for part in axes if len(part.directions)]
    if not axes:
        return []
    H, z = torch.cat([part.directions for part in axes]), torch.cat([part.clean for part in axes])
    return [Projection(axes[0].layer, H, z, axes[0].dim, strength)]


def reactive(axes: Sequence[Axes], strength: float = 1.0) -> list[Projection]:
    """Return reactive P-ClArC's projections: each artifact's own, where its classifier fires."""
    return [
        Projection(part.layer, part.directions, part.clean, part.dim, strength, part.gate)
        for part in axes
        if len(part.directions)
    ]


def projected(model: nn.Module, projections: Sequence[Projection], device: torch.device) -> nn.Module:
    """Return a model around another one that projects its activations, in eval mode; itself where there are none."""
    return Projected(model, projections).to(device).eval() if projections else model


def _thinned(marked: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Return which samples to keep, at most `most`: half of each kind, or more of one where the other has fewer."""
    if len(marked) <= most:
        return np.arange(len(marked))
    rng = np.random.default_rng([seed, 47])
    with_it, without = (rng.permutation(np.flatnonzero(marked == kind)) for kind in (True, False))
    n_with = min(len(with_it), max(most // 2, most - len(without)))
    return np.sort(np.concatenate([with_it[:n_with], without[: most - n_with]]))
