"""Markdown tables of what `bench_lrp.py` measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from bench_engines import UNIT

Row = dict[str, Any]


class Notes:
    """Numbered notes under a table."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, texts: Iterable[str]) -> str:
        """Return the marks of notes, which are added if they are new."""
        self.texts += [text for text in dict.fromkeys(texts) if text not in self.texts]
        return "".join(f" [{self.texts.index(text) + 1}]" for text in dict.fromkeys(texts))


def time_cell(row: Row) -> str:
    rate = f"{row['heatmaps_per_s']:.3g}/s"
    if row["engine"] == UNIT or "ratio" not in row:
        return rate
    return f"{row['ratio']:.2f} ({row['ratio_min']:.2f}–{row['ratio_max']:.2f}), {rate}"


def memory_cell(row: Row) -> str:
    ratio = f" ({row['ratio']:.2f})" if row["engine"] != UNIT and "ratio" in row else ""
    return f"{row['extra_mib']:,.0f}{ratio}"


def agreement_cell(row: Row) -> str:
    return f"{row['cosine']:.7f}, {row['max_relative']:.1e}"


def table(rows: list[Row], cell: Callable[[Row], str]) -> str:
    """Return rows as a Markdown table: a line for each model and batch, a column for each engine, notes below."""
    notes = Notes()
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    lines = [f"| model, batch | {' | '.join(engines)} |", "|---" * (len(engines) + 1) + "|"]
    for name, n in dict.fromkeys((row["model"], row.get("batch")) for row in rows):
        cells = {}
        for row in rows:
            if (row["model"], row.get("batch")) != (name, n):
                continue
            errors = [f"{row['engine'].split(',')[0]}: {row['error']}"] if "error" in row else []
            text = "–" if errors else cell(row)
            cells[row["engine"]] = text + notes.mark(errors or row.get("notes", []))
        lines.append(f"| {name}{'' if n is None else f', {n}'} | {' | '.join(cells.get(e, '') for e in engines)} |")
    return "\n".join([*lines, "", *(f"[{i}] {text}  " for i, text in enumerate(notes.texts, 1))]).rstrip()


TITLES: dict[str, tuple[str, Callable[[Row], str]]] = {
    "memory": ("Peak memory above the model and its input, MiB (ratio to the gradient's)", memory_cell),
    "check": (
        "Agreement (BatchNorm's eps 1e-12): least cosine, largest error over largest entry",
        agreement_cell,
    ),
    "times": ("Time in gradients: median (least–most), heatmaps per second", time_cell),
    "targets": ("Time for several targets of one image, in gradients of one target", time_cell),
}


def report(result: Mapping[str, Any]) -> str:
    """Return the results as Markdown, a table for each section and composite."""
    parts = []
    for section, (title, cell) in TITLES.items():
        rows = result.get(section, [])
        for composite in dict.fromkeys(row["composite"] for row in rows):
            own = [row for row in rows if row["composite"] == composite]
            parts.append(f"### {title}: {composite or 'for orientation'}\n\n{table(own, cell)}\n")
    return "\n".join(parts)
