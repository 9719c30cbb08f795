"""A traffic light for each class: what the run says of it, at a glance."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from spray.report.data import Artifact, Light, RankRow
from spray.report.words import p_value, percent, verdict_name

LEVEL = 0.05
"""False discovery rate below which a class stands out."""
MOVED = 0.3
"""Share of other images above the control's: a candidate that turns as many is looked at though it did not pass."""


def lights(
    names: Sequence[str],
    artifacts: Sequence[Artifact] | None,
    ranks: Sequence[RankRow] | None,
    too_small: Collection[str] = (),
) -> tuple[Light, ...]:
    """Return what is to be said of each class, the worst first.

    Red and green are said only where candidates were put to the causal test; a class that stands out in the ranking
    but has no artifact that passed is amber, as is one whose finding is a kind of sample rather than an artifact, and
    one with a candidate that turns many images of other classes, although the test does not take it for an artifact.

    Parameters
    ----------
    names : sequence of str
        All classes.
    artifacts : sequence of Artifact, optional
        All candidates, tested; None where none were isolated yet.
    ranks : sequence of RankRow, optional
        The ranking of classes; None where there is none.
    too_small : collection of str
        Classes with too few samples to be analyzed.

    Returns
    -------
    tuple of Light
        One for each class, red before amber before green, in the order of the classes otherwise.
    """
    row_of = {row.class_index: row for row in ranks or ()}
    own: dict[int, list[Artifact]] = {}
    for artifact in artifacts or ():
        own.setdefault(artifact.class_index, []).append(artifact)
    made = [
        _light(index, name, None if artifacts is None else own.get(index, []), row_of, name in too_small)
        for index, name in enumerate(names)
    ]
    order = ("red", "amber", "none", "green")
    return tuple(sorted(made, key=lambda light: order.index(light.colour)))


def _light(
    index: int, name: str, candidates: list[Artifact] | None, row_of: Mapping[int | None, RankRow], too_small: bool
) -> Light:
    row = row_of.get(index)
    q = None if row is None else row.q_value if row.q_value is not None else row.p_value
    passed = [artifact for artifact in candidates or () if artifact.passed]
    cut_out = [artifact for artifact in passed if artifact.verdict != "sample_bias"]
    if cut_out:
        first = cut_out[0]
        kinds = verdict_name(first.verdict) if len(cut_out) == 1 else f"{len(cut_out)} artifacts"
        turned = f"{percent(first.flip_rate, 0)} turned, control {percent(first.control_flip_rate, 0)}"
        return Light(index, name, "red", f"{kinds}: {turned}")
    if passed:
        return Light(index, name, "amber", "a kind of its samples is under-represented, or belongs elsewhere")
    if too_small:
        return Light(index, name, "none", "too few samples to judge")
    if candidates is None or row is None:
        return Light(index, name, "none", "not judged: no causal test yet")
    stands_out = q is not None and q <= LEVEL
    tested = f"{len(candidates)} tested, none passed" if candidates else "nothing to test"
    moving = next((artifact for artifact in candidates if _moves(artifact)), None)
    if moving is not None:
        turned = f"{percent(moving.flip_rate, 0)} turned, control {percent(moving.control_flip_rate, 0)}"
        return Light(index, name, "amber", f"{moving.id} did not pass, but moves predictions: {turned}")
    if stands_out:
        return Light(index, name, "amber", f"stands out (q {p_value(q)}); {tested}")
    return Light(index, name, "green", f"q {p_value(q)}; {tested}")


def _moves(artifact: Artifact) -> bool:
    rates, chance = (artifact.flip_rate, artifact.control_flip_rate), artifact.p_value
    if rates[0] is None or rates[1] is None or chance is None or artifact.unusual is False:
        return False
    return chance <= LEVEL and rates[0] - rates[1] >= MOVED
