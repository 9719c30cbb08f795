"""A kind of sample that a model is wrong on because its class has too few of it: nothing can be cut out.

That a model does worse on some kind is no proof: what lies at the border of two classes is hard, and in every model
some of it makes a cluster. A kind that its class has too few of is a stranger there: its samples are like those of
other classes, and like none of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import fisher_exact

APART = 0.9
"""Least area under the ROC curve by which samples are a kind of their own."""
WORSE = 0.25
"""Least difference of accuracies, of a kind of sample and the rest of its class, that is a bias."""
NEIGHBORS = 10
"""Nearest samples that a sample is judged by."""
STRANGE = 0.05
"""Largest share of the own class among a stranger's neighbors, as a part of what the rest of the class has."""
TOLD = 0.3
"""Least share of its own class among the rest's neighbors where distances tell anything of the class."""
COMPARED = 100
"""Most samples of a kind, and of the rest of its class, whose neighbors are looked at."""


@dataclass(frozen=True)
class SampleBias:
    """How well the model does on the samples of a kind, against the others of their class.

    Attributes
    ----------
    separation : float
        Area under the ROC curve of the samples' score, each by a fit without it: 1 if it is a kind of its own.
    accuracy, rest_accuracy : float
        Of the model on these samples and on the rest.
    p_value : float
        Fisher's exact test, one-sided, of the model being right less often on the kind.
    held_out : bool
        Whether the accuracies are of images that the model was not trained on.
    strangeness : float or None
        Where it was looked for, see `strangeness`.
    """

    separation: float
    accuracy: float
    rest_accuracy: float
    p_value: float
    held_out: bool = False
    strangeness: float | None = None

    @property
    def is_worse(self) -> bool:
        """Whether it is a kind of its own that the model does far worse on; `p_value` says if that may be chance."""
        return self.separation >= APART and self.rest_accuracy - self.accuracy >= WORSE


def sample_bias(
    scores: np.ndarray, carries: np.ndarray, right: np.ndarray, held_out: tuple[np.ndarray, np.ndarray] | None = None
) -> SampleBias:
    """Compare how often a model is right on the samples of a kind and on the rest of their class.

    Parameters
    ----------
    scores : ndarray
        (n,), of the class's samples, each by a fit without it.
    carries, right : ndarray of bool
        (n,): which are of the kind, and which the model gets right.
    held_out : tuple of ndarray of bool, optional
        The same two, (m,), of images that the model was not trained on, of which it does not know the answers by heart.
    """
    of_kind, known = held_out or (carries, right)
    accuracy, rest_accuracy, p_value = worse(of_kind, known)
    larger = scores[carries][:, None] > scores[~carries]
    return SampleBias(
        separation=float(larger.mean()) if larger.size else 0.5,
        accuracy=accuracy,
        rest_accuracy=rest_accuracy,
        p_value=p_value,
        held_out=held_out is not None,
    )


def worse(of_kind: np.ndarray, right: np.ndarray) -> tuple[float, float, float]:
    """Return the accuracies on a kind and on the rest, and Fisher's one-sided p-value of the former being lower.

    Parameters
    ----------
    of_kind, right : ndarray of bool
        (n,): which samples of a class are of the kind, and which the model gets right.
    """
    inside, outside = right[of_kind], right[~of_kind]
    table = [[int(inside.sum()), int((~inside).sum())], [int(outside.sum()), int((~outside).sum())]]
    accuracy, rest_accuracy = (float(part.mean()) if len(part) else 0.0 for part in (inside, outside))
    return accuracy, rest_accuracy, float(fisher_exact(table, alternative="less")[1])


def strangeness(spaces: Sequence[np.ndarray], own: np.ndarray, member: np.ndarray, seed: int) -> float:
    """Return how much of their own class a kind's samples have around them, as a part of what the rest of it has.

    A sample whose nearest neighbors are all of other classes is one that no example of its own supports (Wilson,
    "Asymptotic properties of nearest neighbor rules using edited data", 1972); here it is asked of a group, without
    what its samples have in each other.

    Parameters
    ----------
    spaces : sequence of ndarray
        (n, d) each: samples of all classes, as different features see them, in units that make distances comparable.
    own : ndarray of bool
        (n,): which of them are of the class.
    member : ndarray of bool
        (n,): which of these are of the kind.
    seed : int
        Draws the samples whose neighbors are looked at.

    Returns
    -------
    float
        The mean share of all spaces that tell the class, where the rest has at least `TOLD` of its own around it, of
        the kind by that of the rest. Infinite if fewer than two do.
    """
    rng = np.random.default_rng([seed, 13])
    drawn = [np.sort(rng.permutation(np.flatnonzero(part))[:COMPARED]) for part in (member, own & ~member)]
    others = np.flatnonzero(~member)
    shares = np.array([[_own_share(space, who, others, own) for who in drawn] for space in spaces])
    telling = shares[shares[:, 1] >= TOLD]
    kind, usual = telling.sum(axis=0)
    return float(kind / usual) if len(telling) > 1 else float("inf")


def _own_share(space: np.ndarray, who: np.ndarray, others: np.ndarray, own: np.ndarray) -> float:
    """Return the share of the class among the nearest of the others of some samples, themselves left out."""
    a, b = space[who], space[others]
    distance = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
    distance[who[:, None] == others] = np.inf
    k = min(NEIGHBORS, len(others) - 1)
    nearest = np.argpartition(distance, k, axis=1)[:, :k]
    return float(own[others[nearest]].mean())
