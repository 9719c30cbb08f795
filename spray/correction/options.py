"""What a user can choose about corrections, and what is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spray.errors import UserError

CAV_NAMES = ("pattern", "svm", "logistic", "ridge", "lasso")
POOLINGS = ("auto", "full", "max")
PENALTIES = ("cosine", "square")
AUTO = "auto"
STRENGTHS: dict[str, tuple[float, ...]] = {
    "p_clarc": (0.5, 0.75, 1.0),
    "reactive_p_clarc": (0.5, 0.75, 1.0),
    "a_clarc_latent": (0.25, 0.5, 0.75),
    "rr_clarc": (1.0, 10.0, 100.0, 1000.0),
    "rrr": (1.0, 3.0, 10.0, 30.0, 100.0),
    "lrp_guided": (0.3, 1.0, 3.0),
    "dfr": (100.0, 10.0, 1.0),
}
"""The strengths that are tried, the weakest first: the share of the way that is projected (P-ClArC), of the
activations that are changed (latent A-ClArC), the weight of the penalty or second loss, and what holds DFR's logistic
regression to the layer that it had been (1 / C)."""


@dataclass(frozen=True)
class Options:
    """How corrections work.

    Attributes
    ----------
    layer : str
        Where latent methods work: the name of a module, whose output is meant; with ``:in`` behind it its input;
        ``output`` for the input of the layer that makes the model's output; or ``auto``.
    cav : str
        How an artifact's direction is estimated: pattern, svm, logistic, ridge or lasso.
    pooling : str
        Whether a direction is one of all activations (``full``) or of channels, found in activations max-pooled over
        positions (``max``); or ``auto``.
    directions : int
        How many directions each artifact gets.
    strength : str, float or mapping
        ``auto``, a number for all methods that have one, or a mapping from methods to numbers.
    penalty : str
        RR-ClArC's: ``cosine``, which has no scale, or ``square``, that of the paper.
    fill_groups : bool
        Whether a group without samples is filled with images that the isolated artifact is added to; else images
        with an artifact that some class lacks are left out.
    validation : float
        Share of the training images that choices are made on.
    max_loss : float
        By how much accuracy on clean images may fall for a choice to be allowed.
    """

    layer: str = AUTO
    cav: str = "pattern"
    pooling: str = AUTO
    directions: int = 1
    strength: Any = AUTO
    penalty: str = "cosine"
    fill_groups: bool = True
    validation: float = 0.2
    max_loss: float = 0.005

    def strength_of(self, method: str) -> float | None:
        """Return the strength that is set for a method, None if it is to be chosen."""
        value = self.strength.get(method, AUTO) if isinstance(self.strength, Mapping) else self.strength
        return None if value == AUTO else float(value)


def check_options(options: Options) -> None:
    """Check what can be checked without a model.

    Raises
    ------
    UserError
        For the first value that is not allowed.
    """
    for key, allowed in (("cav", CAV_NAMES), ("pooling", POOLINGS), ("penalty", PENALTIES)):
        if getattr(options, key) not in allowed:
            raise UserError(f"correction.{key}={getattr(options, key)} is unknown; allowed: {', '.join(allowed)}")
    if not isinstance(options.layer, str) or not options.layer:
        raise UserError(
            f"correction.layer={options.layer} must be auto, output, or a module's name as in model.named_modules()"
        )
    if not 1 <= options.directions <= 64:
        raise UserError(f"correction.directions={options.directions} is out of range; give a number from 1 to 64")
    if not 0 < options.validation <= 0.5:
        raise UserError(f"correction.validation={options.validation} is out of range; give a share above 0, up to 0.5")
    if not 0 <= options.max_loss <= 1:
        raise UserError(f"correction.max_loss={options.max_loss} is out of range; give a share from 0 to 1")
    given = options.strength
    for method, value in given.items() if isinstance(given, Mapping) else [("", given)]:
        key = f"correction.strength.{method}" if method else "correction.strength"
        if method and method not in STRENGTHS:
            raise UserError(f"{key}: this method has no strength; allowed: {', '.join(STRENGTHS)}")
        if value == AUTO:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise UserError(f"{key}={value} must be auto or a number above 0")
        if method in ("p_clarc", "reactive_p_clarc", "a_clarc_latent") and value > 1:
            raise UserError(f"{key}={value} is a share; it has to be at most 1")
