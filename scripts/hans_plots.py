"""Figures of `hans_bench.py`, in colours that the colour-blind can tell apart (Okabe and Ito, 2008)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hans_tables import grouped

from spray.storage import write_bytes

Row = Mapping[str, Any]
COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
MARKERS = "os^Dv*P"


def draw(rows: Sequence[Row], out: Path) -> list[Path]:
    """Write the figures that there are numbers for; return their paths."""
    import matplotlib

    matplotlib.use("Agg")
    cells = [group[0] for group in grouped(rows, "cell").values()]
    planted = [row for row in cells if row["arm"] == "planted"]
    relying = [row for row in rows if row["arm"] == "planted" and row.get("relies")]
    made = []
    if planted:
        made.append(_save(_found(planted), out / "detection.png"))
    if any(row["relies"] for row in planted):
        made.append(_save(_samples([row for row in planted if row["relies"]]), out / "samples.png"))
    if relying:
        made.append(_save(_corrected(relying), out / "corrections.png"))
    return made


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=150, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)
    # Another command may be at the same figure.
    write_bytes(path, drawn.getvalue())
    return path


def _found(planted: Sequence[Row]) -> Any:
    """Return a grid of kinds and rates: which share of the models that rely on it were caught."""
    from matplotlib import pyplot

    sets, kinds = (list(dict.fromkeys(row[key] for row in planted)) for key in ("dataset", "kind"))
    rates = sorted({row["rate"] for row in planted})
    figure, axes = pyplot.subplots(1, len(sets), figsize=(1.6 + 0.9 * len(sets) * len(rates), 0.8 + 0.34 * len(kinds)))
    groups = grouped(planted, "dataset", "kind", "rate")
    for axis, dataset in zip(np.atleast_1d(axes), sets, strict=True):
        shown = np.full((len(kinds), len(rates)), np.nan)
        for i, kind in enumerate(kinds):
            for j, rate in enumerate(rates):
                group = groups.get((dataset, kind, rate), [])
                relying = [row for row in group if row["relies"]]
                if relying:
                    shown[i, j] = np.mean([bool(row["detected"]) for row in relying])
                text = (
                    f"{sum(bool(row['detected']) for row in relying)}/{len(relying)}" if relying else "no" * bool(group)
                )
                dark = relying and shown[i, j] < 0.5
                axis.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
        axis.imshow(shown, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        axis.set_title(dataset, fontsize=9)
        axis.set_xticks(range(len(rates)), [f"{100 * rate:.0f} %" for rate in rates], fontsize=7)
        axis.set_yticks(range(len(kinds)), kinds if dataset == sets[0] else [], fontsize=7)
    figure.suptitle("Detected, of models that rely on the artifact (no: none does)", fontsize=9)
    return figure


def _samples(relying: Sequence[Row]) -> Any:
    """Return precision and recall of each run's samples."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(4.6, 4))
    for number, (dataset, group) in enumerate(grouped(relying, "dataset").items()):
        x, y = ([row.get(key) or 0.0 for row in group] for key in ("recall", "precision"))
        axis.scatter(x, y, 24, COLORS[1 + number], MARKERS[number], label=dataset, alpha=0.8, edgecolor="none")
    axis.axhline(0.9, color="0.6", lw=0.8, ls=":")
    axis.axvline(0.9, color="0.6", lw=0.8, ls=":")
    axis.set(xlabel="recall of the samples", ylabel="precision of the samples", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    axis.legend(fontsize=7)
    return figure


def _corrected(rows: Sequence[Row]) -> Any:
    """Return each model's accuracy with the true artifact, by kind."""
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["model"] for row in rows))
    kinds = list(grouped(rows, "dataset", "kind"))
    figure, axis = pyplot.subplots(figsize=(2 + 0.42 * len(kinds), 3.6))
    for number, name in enumerate(names):
        of_model = grouped([row for row in rows if row["model"] == name], "dataset", "kind")
        x = [kinds.index(kind) + 0.1 * (number - len(names) / 2) for kind in of_model]
        y = [np.mean([row["attacked_accuracy"] for row in group]) for group in of_model.values()]
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        axis.scatter(x, y, 22, color, marker, label=name)
    axis.set_xticks(range(len(kinds)), [f"{dataset} {kind}" for dataset, kind in kinds], rotation=90, fontsize=7)
    axis.set(ylabel="accuracy with the artifact", ylim=(0, 1.02))
    axis.grid(axis="y", lw=0.4)
    axis.legend(fontsize=7, ncols=min(4, len(names)), loc="upper center", bbox_to_anchor=(0.5, 1.18))
    return figure
