"""Reads what verification says: how models do, which correction was chosen, what is left in its model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from spray.report.data import Check, Chosen, ClusterThen, ModelResult, Recheck, Share
from spray.report.record import check, facts
from spray.verification import wilson_interval

_OF_MODEL = frozenset(
    (
        *("n", "n_attacked", "clean_accuracy", "attacked_accuracy", "attacked_to_class", "artifact_relevance"),
        *("worst_class_accuracy", "worst_group_accuracy", "worst_group", "tcav", "tcav_sensitivity", "n_tcav"),
        *("artifacts", "planted"),
    )
)
_KNOWN = ("models", "chosen", "recheck", "rounds", "final")


def model_result(name: str, row: Mapping[str, Any]) -> ModelResult:
    """Return how a model does, from its row of `verification.json` or that of one artifact below it."""
    planted = row.get("planted") or {}
    return ModelResult(
        name=name,
        n=row.get("n"),
        clean=share(row, "clean_accuracy"),
        attacked=share(row, "attacked_accuracy"),
        attacked_to_class=share(row, "attacked_to_class"),
        artifact_relevance=share(row, "artifact_relevance"),
        worst_class=share(row, "worst_class_accuracy"),
        worst_group=share(row, "worst_group_accuracy"),
        tcav=share(row, "tcav"),
        planted_attacked=share(planted, "attacked_accuracy"),
        planted_to_class=share(planted, "attacked_to_class"),
        further=facts(row, _OF_MODEL),
    )


def chosen(verification: Mapping[str, Any]) -> Chosen | None:
    """Return which correction was chosen, and how it does on the images that it wasn't chosen on."""
    row = verification.get("chosen")
    if not isinstance(row, Mapping) or not row.get("method"):
        return None
    other = row.get("other_half") or {}
    return Chosen(
        str(row["method"]), str(row.get("why") or ""), share(other, "clean_accuracy"), share(other, "attacked_accuracy")
    )


def rechecks(verification: Mapping[str, Any]) -> tuple[Recheck, ...]:
    """Return what is left of each artifact in the corrected model."""
    rows = verification.get("recheck")
    if not isinstance(rows, Mapping):
        return ()
    return tuple(
        Recheck(
            str(name),
            str(row.get("class_name", "")),
            str(row["verdict"]),
            *map(_then, (row.get("before"), row.get("after"))),
        )
        for name, row in rows.items()
        if isinstance(row, Mapping) and "verdict" in row
    )


def further_checks(verification: Mapping[str, Any]) -> Iterator[Check]:
    """Yield what else it says, as tables: rounds where there were further corrections, and what is not known here."""
    rounds = verification.get("rounds")
    if isinstance(rounds, list) and sum(bool(row.get("chosen")) for row in rounds) > 1:
        table = check("Rounds of correction", rounds)
        if table is not None:
            yield table
    for key, value in verification.items():
        table = None if key in _KNOWN else check(key.replace("_", " ").capitalize(), value)
        if table is not None:
            yield table


def share(row: Mapping[str, Any], name: str) -> Share | None:
    """Return a share with its interval, None where it is not known."""
    value = finite(row.get(name))
    low, high = row.get(f"{name}_interval") or (None, None)
    return None if value is None else Share(value, low, high)


def rate_interval(row: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    """Return the 95 % interval of a candidate's rate: as it is given, else from the number of images."""
    rate, n = finite(row.get(name)), row.get("n_tested")
    given = row.get(f"{name}_interval")
    if given is None and rate is not None and n:
        given = wilson_interval(rate * n, n)
    low, high = (finite(end) for end in given or (None, None))
    return None if low is None or high is None else (low, high)


def finite(value: Any) -> float | None:
    """Return a number, None for what is none."""
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else None


def _then(row: Any) -> ClusterThen | None:
    if not isinstance(row, Mapping):
        return None
    return ClusterThen(
        str(row.get("cluster", "")), row.get("size"), finite(row.get("share")), finite(row.get("separability"))
    )
