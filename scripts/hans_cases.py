"""The study of `hans_bench.py` case by case, and in a few lines for each set of images and rate, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from hans_tables import HARD, Row, grouped, head, mean, pick

DECIMALS = {"auroc": 3}
"""Of what is nearly 1; the others have two."""


def text(rows: Sequence[Row]) -> str:
    """Return both tables, of the table's rows of all cells."""
    return f"### In short\n\n{overview(rows)}\n\n### Case by case\n\n{cases(rows)}\n"


def overview(rows: Sequence[Row]) -> str:
    """Return one line for each set and rate: what was found, how well, what became of it, and false verdicts.

    Samples, scores and accuracies are of what was found, from the least to the largest; accuracies are means.
    """
    lines = head(
        "set, rate | rely on it | found | precision | recall | AUROC | IoU, local | with the artifact: before | "
        "fine-tuned | chosen | ceiling | clean: before | chosen | planted models with a false verdict"
    )
    planted = [row for row in rows if row["arm"] == "planted"]
    for (dataset, rate), group in grouped(planted, "dataset", "rate").items():
        cells = [cell[0] for cell in grouped(group, "cell").values()]
        easy = [row for row in cells if row.get("relies") and row["kind"] != HARD]
        found = [row for row in easy if row.get("found")]
        explained = [row for row in cells if row.get("n_candidates") is not None]
        models = [cell for cell in grouped(group, "cell").values() if cell[0] in found]
        numbers = [
            f"{dataset}, {100 * rate:.0f} %",
            f"{len(easy)} of {sum(row['kind'] != HARD for row in cells)}",
            f"{len(found)} of {len(easy)}",
            *(_range(found, key) for key in ("precision", "recall", "auroc")),
            _range([row for row in found if row["extent"] == "local"], "iou"),
            *(_mean(models, name, "attacked_accuracy") for name in ("original", "fine_tuned", "chosen", "ceiling")),
            *(_mean(models, name, "clean_accuracy") for name in ("original", "chosen")),
            f"{sum(row['false_alarms'] > 0 for row in explained)} of {len(explained)}",
        ]
        lines.append(f"| {' | '.join(numbers)} |")
    clean = [row for row in rows if row["arm"] == "clean"]
    for dataset, group in grouped(clean, "dataset").items():
        cells = [cell[0] for cell in grouped(group, "cell").values()]
        with_one = sum(row["false_alarms"] > 0 for row in cells)
        lines.append(f"| {dataset}, clean models {' | –' * 12} | {with_one} of {len(cells)} |")
    return "\n".join(lines)


def cases(rows: Sequence[Row]) -> str:
    """Return one line for each planted model that relies on its artifact."""
    lines = head(
        "set, kind, rate, seed | verdict | precision | recall | AUROC | IoU | with the artifact: before | fine-tuned | "
        "A-ClArC | chosen | ceiling | clean: before | chosen | false verdicts"
    )
    relying = [row for row in rows if row["arm"] == "planted" and row.get("relies")]
    for group in grouped(relying, "cell").values():
        row, models = group[0], [group]
        name = f"{row['dataset']}, {row['kind']}, {100 * row['rate']:.0f} %, {row['seed']}"
        said = "found" if row.get("found") and row.get("detected") else "not first" if row.get("found") else "missed"
        numbers = [
            f"{said} (not demanded)" if row["kind"] == HARD else said,
            *(_range([row], key) for key in ("precision", "recall", "auroc", "iou")),
            *(
                _mean(models, model, "attacked_accuracy")
                for model in ("original", "fine_tuned", "a_clarc", "chosen", "ceiling")
            ),
            *(_mean(models, model, "clean_accuracy") for model in ("original", "chosen")),
            str(row["false_alarms"]),
        ]
        lines.append(f"| {name} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def _range(rows: Sequence[Row], key: str) -> str:
    values = [float(row[key]) for row in rows if row.get(key) is not None]
    if not values:
        return "–"
    low, high = (f"{value:.{DECIMALS.get(key, 2)}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _mean(cells: Sequence[Sequence[Row]], model: str, key: str) -> str:
    """Return the mean over cells of a number of one of their models, where they have it."""
    return mean([row for group in cells if (row := pick(group, model)) is not None], key)
