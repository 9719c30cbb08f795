"""The runs of a sweep as a CSV file, for tables and statistics of one's own: one row for each run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spray.csvs import csv_text

if TYPE_CHECKING:
    from spray.report.data import ModelResult, Share
    from spray.report.index import Run

_FOUND = ("artifacts", "first_artifact", "class", "verdict", "flip_rate", "control_flip_rate")
_PLANTED = ("planted", "found_by", "precision", "recall")
_MODELS = ("clean_before", "attacked_before", "correction", "clean_after", "attacked_after")


def runs_csv(runs: Sequence[Run]) -> str:
    """Return what the page of a sweep shows of each run, as CSV.

    After the run's folder come the settings that it was given, under their own keys, then its `state` (`found`, `none`,
    `failed` or `incomplete`), its first artifact, the first that was planted and how it was found, accuracies of the
    model under study and of its best correction, seconds, and why there is no verdict. What isn't known is empty.
    """
    keys = list(dict.fromkeys(key for run in runs for key in run.overrides))
    rows = [
        [
            run.folder,
            *(run.overrides.get(key) for key in keys),
            run.state,
            *_found(run),
            *_planted(run),
            *_accuracies(run.before),
            None if run.after is None else run.after.name,
            *_accuracies(run.after),
            round(run.seconds, 3),
            run.told or None,
        ]
        for run in runs
    ]
    return csv_text(["run", *keys, "state", *_FOUND, *_PLANTED, *_MODELS, "seconds", "told"], rows)


def _found(run: Run) -> list[Any]:
    if run.n_candidates is None:
        return [None] * len(_FOUND)
    if not run.findings:
        return [0, *[None] * (len(_FOUND) - 1)]
    first = run.findings[0]
    return [len(run.findings), first.id, first.class_name, first.verdict, first.flip_rate, first.control_flip_rate]


def _planted(run: Run) -> list[Any]:
    if not run.hits:
        return [None] * len(_PLANTED)
    hit = run.hits[0]
    return [hit.what, hit.artifact, hit.precision, hit.recall]


def _accuracies(model: ModelResult | None) -> list[float | None]:
    def value(share: Share | None) -> float | None:
        return None if share is None else share.value

    return [None, None] if model is None else [value(model.clean), value(model.attacked)]
