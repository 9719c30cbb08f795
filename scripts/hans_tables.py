"""Summary tables of `hans_bench.py` in Markdown: what was found, what was corrected, and every miss by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
GOAL = {"precision": 0.9, "recall": 0.9, "auroc": 0.98, "iou": 0.5}
LEAST_RATE = 0.05
"""Precision and recall are demanded from this rate on."""
HARD = "blur"
"""The kind that detection is not demanded of."""
NEAR_CEILING, CLEAN_LOSS = 0.01, 0.005
OTHERS = ("original", "ceiling")
BIASES_MEAN = (
    "Neither is on the images, so that a verdict is a false one (but for `sample_bias`), and no correction is due. "
    "Wrong labels in all classes alike cost clean accuracy. A kind of sample that training lacks is in none of its "
    "heatmaps: it can't be found there, and shows only in the accuracy on test images of this kind. The third bias of "
    "that study, a small corruption that goes with a class (`corruption`), is among the planted kinds."
)


def summary(rows: Sequence[Row], failed: Iterable[tuple[str, str]] = ()) -> str:
    """Return the whole summary.

    Parameters
    ----------
    rows : sequence of mapping
        The table's rows, of all cells.
    failed : iterable of tuple
        Name and last line of each cell that ended in an error.
    """
    cells = [group[0] for group in grouped(rows, "cell").values()]
    planted = [row for row in cells if row["arm"] == "planted"]
    relying = [row for row in planted if row.get("relies")]
    parts = [f"{len(cells)} runs: {_counts(cells)}. {len(relying)} of {len(planted)} models rely on their artifact."]
    parts.append(_section("Found", detection(planted)))
    parts.append(_section("False alarms", alarms(cells)))
    parts.append(_section("Corrected", corrections([row for row in rows if row["arm"] == "planted"])))
    parts.append(_section("By kind: accuracy with the true artifact", by_kind(rows)))
    if any(row["arm"] == "biased" for row in cells):
        parts.append(_section("Biases that are no artifact", biases(rows)))
    missed = [*misses(rows)]
    parts.append(_section(f"Misses: {len(missed)}", "\n".join(f"- {miss}" for miss in missed) or "none"))
    without = [row for row in planted if not row.get("relies")]
    parts.append(
        _section("Not relied on, so nothing to miss", "\n".join(f"- {_idle(row)}" for row in without) or "none")
    )
    if failed := list(failed):
        parts.append(_section("Failed", "\n".join(f"- {name}: {error}" for name, error in failed)))
    return "\n\n".join(parts) + "\n"


def detection(cells: Sequence[Row]) -> str:
    """Return the table of what was found, for each set of images and kind, of the models that rely on it."""
    columns = (
        "set, kind, rates | models that rely on it | first | found | hit@1 | reciprocal rank | precision | recall | "
        "AUROC | average precision | IoU"
    )
    lines = head(columns)
    for (dataset, kind), group in grouped(cells, "dataset", "kind").items():
        relying = [row for row in group if row.get("relies")]
        numbers = [mean(relying, key) for key in _FOUND]
        rates = ", ".join(f"{100 * rate:.0f} %" for rate in sorted({row["rate"] for row in group}))
        lines.append(f"| {dataset}, {kind}, {rates} | {len(relying)} of {len(group)} | {' | '.join(numbers)} |")
    easy = [row for row in cells if row.get("relies") and row["kind"] != HARD]
    lines.append(f"| **all but {HARD}** | {len(easy)} | {' | '.join(mean(easy, key) for key in _FOUND)} |")
    return "\n".join(lines)


_FOUND = (
    "detected",
    "found",
    "hit_at_1",
    "reciprocal_rank",
    "precision",
    "recall",
    "auroc",
    "average_precision",
    "iou",
)


def alarms(cells: Sequence[Row]) -> str:
    """Return the table of false verdicts, for each set and arm."""
    lines = head("set, arm | models | with a false verdict | false verdicts per model | candidates tested")
    explained = [row for row in cells if row.get("n_candidates") is not None]
    for (dataset, arm), group in grouped(explained, "dataset", "arm").items():
        false = [row["false_alarms"] for row in group]
        with_one = sum(n > 0 for n in false)
        tested = sum(row["n_candidates"] for row in group)
        lines.append(
            f"| {dataset}, {arm} | {len(group)} | {with_one} ({100 * with_one / len(group):.0f} %) "
            f"| {sum(false) / len(group):.2f} | {tested} |"
        )
    return "\n".join(lines)


def corrections(rows: Sequence[Row]) -> str:
    """Return the table of the corrections, where the artifact was found and relied on, against the ceiling."""
    corrected = [row for row in rows if row.get("relies") and row.get("found")]
    groups = grouped(corrected, "cell")
    lines = head(
        "model | runs | clean | with the artifact | to the ceiling, points | clean lost, points | "
        "as good as the ceiling | better than fine-tuning | TCAV | worst group"
    )
    names = dict.fromkeys(row["model"] for row in corrected)
    for name in [*names, "chosen"]:
        own = [(pick(group, name), group) for group in groups.values()]
        pairs = [(row, group) for row, group in own if row is not None]
        if not pairs:
            continue
        mine = [row for row, _ in pairs]
        gaps = [100 * gap for row, group in pairs if (gap := to_ceiling(row, group)) is not None]
        lost = [100 * clean_lost(row, group) for row, group in pairs]
        good = [as_good(row, group) for row, group in pairs]
        better = [beats_control(row, group) for row, group in pairs]
        lines.append(
            f"| {name if name != 'chosen' else '**chosen without the truth**'} | {len(mine)} "
            f"| {mean(mine, 'clean_accuracy')} | {mean(mine, 'attacked_accuracy')} "
            f"| {_average(gaps, '+.1f')} | {_average(lost, '+.1f')} | {_share(good)} | {_share(better)} "
            f"| {mean(mine, 'tcav')} | {mean(mine, 'worst_group_accuracy')} |"
        )
    return "\n".join(lines)


def by_kind(rows: Sequence[Row]) -> str:
    """Return the table of the accuracy with the true artifact, for each set and kind and each model."""
    planted = [row for row in rows if row["arm"] == "planted" and row.get("relies")]
    names = list(dict.fromkeys(row["model"] for row in planted))
    names = [*(name for name in names if name != "ceiling"), *(name for name in names if name == "ceiling")]
    lines = head(" | ".join(["set, kind", *names, "chosen"]))
    for (dataset, kind), group in grouped(planted, "dataset", "kind").items():
        cells = [mean([row for row in group if row["model"] == name], "attacked_accuracy") for name in names]
        chosen = ", ".join(dict.fromkeys(str(row["chosen"] or "–") for row in group))
        lines.append(f"| {dataset}, {kind} | {' | '.join(cells)} | {chosen} |")
    return "\n".join(lines)


def biases(rows: Sequence[Row]) -> str:
    """Return the table of wrong labels and of missing kinds of samples, with what is right for each."""
    lines = head(
        "set, bias | models | clean | without the bias | on the kind that is missing | without the bias | "
        "false verdicts"
    )
    for (dataset, kind), group in grouped([row for row in rows if row["arm"] == "biased"], "dataset", "kind").items():
        models = {name: [row for row in group if row["model"] == name] for name in OTHERS}
        numbers = [mean(models[name], key) for key in ("clean_accuracy", "missing_accuracy") for name in OTHERS]
        false = sum(row["false_alarms"] for row in models["original"])
        lines.append(f"| {dataset}, {kind} | {len(models['original'])} | {' | '.join(numbers)} | {false} |")
    return "\n".join([*lines, "", BIASES_MEAN])


def misses(rows: Sequence[Row]) -> Iterable[str]:
    """Yield what runs miss of the goals, a line for each."""
    for name, group in grouped(rows, "cell").items():
        row = group[0]
        if row["arm"] != "planted" and row["false_alarms"]:
            yield f"{name}: {row['false_alarms']} false verdicts"
        if row["arm"] != "planted" or not row.get("relies"):
            continue
        if row["false_alarms"]:
            yield f"{name}: {row['false_alarms']} verdicts that are not of the planted artifact"
        if not row.get("detected") and row["kind"] != HARD:
            what = row.get("verdict") or "no candidate"
            said = "found, but not first" if row.get("found") else "not found"
            yield f"{name}: {said}; its class has rank {row.get('class_rank')}, verdict {what}"
        if not row.get("found"):
            continue
        for key, least in GOAL.items():
            demanded = row["rate"] >= LEAST_RATE or key not in ("precision", "recall")
            value = row.get(key)
            if key == "iou" and row["extent"] != "local":
                continue
            if value is not None and demanded and value < least:
                yield f"{name}: {key} {value:.3f}, below {least}"
        yield from _correction_misses(name, group)


def _correction_misses(name: str, group: Sequence[Row]) -> Iterable[str]:
    best = pick(group, "chosen")
    if best is None:
        yield f"{name}: nothing was corrected"
        return
    gap, lost = to_ceiling(best, group), clean_lost(best, group)
    if gap is not None and gap > NEAR_CEILING:
        yield f"{name}: {best['model']} stays {100 * gap:.1f} points below the ceiling with the artifact"
    if lost > CLEAN_LOSS:
        yield f"{name}: {best['model']} loses {100 * lost:.1f} points of clean accuracy"
    clarc = pick(group, "a_clarc")
    if clarc is not None and beats_control(clarc, group) is False:
        yield f"{name}: a_clarc is not better than fine-tuning"
    if best.get("recheck") == "left":
        yield f"{name}: the artifact is found again in the corrected model"


def to_ceiling(row: Row, group: Sequence[Row]) -> float | None:
    """Return by how much a model's accuracy with the artifact is below that of the model trained on clean data."""
    ceiling = pick(group, "ceiling")
    if ceiling is None or row.get("attacked_accuracy") is None:
        return None
    return float(ceiling["attacked_accuracy"] - row["attacked_accuracy"])


def clean_lost(row: Row, group: Sequence[Row]) -> float:
    """Return by how much a model's clean accuracy is below that of the untouched model."""
    original = pick(group, "original")
    assert original is not None
    return float(original["clean_accuracy"] - row["clean_accuracy"])


def as_good(row: Row, group: Sequence[Row]) -> bool | None:
    """Return whether a model is within a point of the ceiling and loses at most half a point of clean accuracy."""
    gap = to_ceiling(row, group)
    return None if gap is None else gap <= NEAR_CEILING and clean_lost(row, group) <= CLEAN_LOSS


def beats_control(row: Row, group: Sequence[Row]) -> bool | None:
    """Return whether a correction is better with the artifact than fine-tuning on the same budget."""
    control = pick(group, "fine_tuned")
    if control is None or row["model"] in (*OTHERS, "fine_tuned"):
        return None
    return bool(row["attacked_accuracy"] > control["attacked_accuracy"])


def grouped(rows: Iterable[Row], *keys: str) -> dict[Any, list[Row]]:
    """Return rows by the values of some columns, in order of appearance."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        key = tuple(row[k] for k in keys)
        groups.setdefault(key if len(keys) > 1 else key[0], []).append(row)
    return groups


def pick(group: Sequence[Row], name: str) -> Row | None:
    """Return the row of one of a cell's models, `chosen` for the one that was chosen; None if there is none."""
    if name == "chosen":
        return next((row for row in group if row["is_chosen"]), None)
    return next((row for row in group if row["model"] == name), None)


def _idle(row: Row) -> str:
    clean, attacked, ceiling = (row.get(f"{key}") for key in _RELIANCE)
    numbers = [f"{value:.3f}" if value is not None else "–" for value in (clean, attacked, ceiling)]
    return f"{row['cell']}: accuracy {numbers[0]}, {numbers[1]} with the artifact; trained on clean data {numbers[2]}"


_RELIANCE = ("clean_accuracy_of_others", "attacked_accuracy_of_others", "attacked_ceiling")


def _counts(cells: Sequence[Row]) -> str:
    return ", ".join(f"{len(group)} {arm}" for arm, group in grouped(cells, "arm").items())


def _section(title: str, text: str) -> str:
    return f"### {title}\n\n{text}"


def head(columns: str) -> list[str]:
    """Return the first two lines of a table, from the names of its columns."""
    return [f"| {columns} |", "|---" * (columns.count("|") + 1) + "|"]


def mean(rows: Sequence[Row], key: str) -> str:
    """Return the mean of a column where it is known."""
    return _average([float(row[key]) for row in rows if row.get(key) is not None], ".3f")


def _average(values: Sequence[float], form: str) -> str:
    return format(sum(values) / len(values), form) if values else "–"


def _share(values: Iterable[bool | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known)} of {len(known)}" if known else "–"
