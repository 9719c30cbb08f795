"""What a run found, as a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unicodedata import combining, east_asian_width

from spray.data.listed import printable
from spray.report.data import PASSED
from spray.report.record import Results
from spray.report.verified import model_result, rechecks
from spray.report.words import VERDICTS, left_sentence, model_name

MOST_CLASSES = 12
LONGEST_NAME = 28


def summary(run_dir: Path) -> list[str]:
    """Return the lines of the summary: classes with what was found, models before and after, what is left, the report.

    Parameters
    ----------
    run_dir : Path
        A run directory; what is missing in it, or doesn't count, is left out.
    """
    results = Results(run_dir)
    ranking, found, verification = (results.read(stage) or {} for stage in ("rank", "isolate", "verify"))
    name = str((verification.get("chosen") or {}).get("method"))
    row = verification.get("models", {}).get(name)
    left = left_sentence(rechecks(verification), None if row is None else model_result(name, row))
    parts = [
        _classes(ranking, found if results.path("isolate") else None),
        _models(verification),
        [left] if left else [],
    ]
    lines = [line for part in parts if part for line in (*part, "")]
    pages = [name for name in ("report", "comparison") if (run_dir / f"{name}.html").is_file()]
    return [*lines, *(f"{name}: {run_dir / name}.html" for name in pages)]


def _classes(ranking: Mapping[str, Any], found: Mapping[str, Any] | None) -> list[str]:
    """Return the table of classes, those with a finding first, then by rank."""
    classes: list[Mapping[str, Any]] = list(ranking.get("classes", ()))
    of_class: dict[int, list[Mapping[str, Any]]] = {}
    for artifact in (found or {}).get("artifacts", ()):
        of_class.setdefault(artifact["class_index"], []).append(artifact)
    passed = {c for c, rows in of_class.items() if any(row.get("verdict") in PASSED for row in rows)}
    classes.sort(key=lambda row: (row["class_index"] not in passed, row.get("rank", 0)))
    rows = [
        [
            _name(row["class_name"]),
            str(row.get("rank", "")),
            _number(row.get("separability"), ".1f"),
            "not tested" if found is None else _found(of_class.get(row["class_index"], ())),
        ]
        for row in classes[:MOST_CLASSES]
    ]
    if not rows:
        return []
    table = _table(["class", "rank", "tau", "first artifact"], rows, right=(1, 2))
    if left := len(classes) - len(rows):
        more = len(passed) - sum(row["class_index"] in passed for row in classes[:MOST_CLASSES])
        table.append(f"and {left} more classes, {more or 'none'} of them with a finding")
    return table


def _found(artifacts: Sequence[Mapping[str, Any]]) -> str:
    """Say what of a class's candidates is first."""
    if not artifacts:
        return "no candidate"
    best = next((row for row in artifacts if row.get("verdict") in PASSED), None)
    if best is None:
        return f"none of {len(artifacts)} candidates passed" if len(artifacts) > 1 else "a candidate, did not pass"
    verdict = VERDICTS.get(str(best["verdict"]), str(best["verdict"]))
    text = f"{best['id']}: {verdict} in {len(best.get('samples', ()))} images"
    if (rate := _share(best.get("flip_rate"))) and (control := _share(best.get("control_flip_rate"))):
        text += f", turns {rate} of other images (control {control})"
    return text


def _models(verification: Mapping[str, Any]) -> list[str]:
    """Return the table of models."""
    chosen = (verification.get("chosen") or {}).get("method")
    rows = [
        [
            model_name(name) + (" (chosen)" if name == chosen else ""),
            *(_share(row.get(key)) or "-" for key in ("clean_accuracy", "attacked_accuracy", "worst_class_accuracy")),
        ]
        for name, row in verification.get("models", {}).items()
    ]
    if not rows:
        return []
    return _table(["accuracy", "clean", "with the artifact", "worst class"], rows, right=(1, 2, 3))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> list[str]:
    widths = [max(_width(row[at]) for row in (head, *rows)) for at in range(len(head))]
    lines = []
    for row in (head, *rows):
        cells = []
        for at, text in enumerate(row):
            room = " " * (widths[at] - _width(text))
            cells.append(room + text if at in right else text + room)
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "-" * max(map(_width, lines)), *lines[1:]]


def _width(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def _name(name: str) -> str:
    text = printable(name)
    return text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "…"


def _share(value: Any) -> str | None:
    return f"{100 * value:.1f} %" if isinstance(value, int | float) and math.isfinite(value) else None


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) and math.isfinite(value) else "-"
