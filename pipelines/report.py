"""The last stage: a self-contained report, and the same results as a ViRelAy project."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from spray.data.truth import read_truth
from spray.pipelines.context import Context
from spray.pipelines.stage import Stage
from spray.report.charts import draw
from spray.report.data import ReportData, Truth
from spray.report.gather import gather
from spray.report.record import Results
from spray.report.render import render
from spray.storage import write_bytes, write_text
from spray.virelay import can_show, export


def run(context: Context) -> dict[str, Any]:
    """Write `report.html`, `figures/` and `virelay/` from what the run directory holds."""
    data = _data(context)
    size = save(context, data)
    _export(context)
    return {"artifacts_found": len(data.found), "bytes": size}


def save(context: Context, data: ReportData) -> int:
    """Write `report.html` and `figures/`; return the page's bytes."""
    size = _save_page(context, data)
    for name, picture in draw(data, context.config.report.figures).items():
        write_bytes(context.run_dir / "figures" / name, picture)
    return size


def _save_page(context: Context, data: ReportData) -> int:
    path = context.run_dir / "report.html"
    write_text(path, render(data))
    return path.stat().st_size


def _data(context: Context) -> ReportData:
    """Return what the page shows of what there is, be it part of a run."""
    return gather(
        context.run_dir,
        context.train,
        context.test,
        title=_title(context),
        model=_model(context),
        truths=_truths(context),
    )


def report_failure(context: Context) -> None:
    """Write the report of a run that failed in a stage: what was done before, and where it stopped."""
    try:
        stages = Results(context.run_dir).stages
        if any(entry.get("status") == "failed" for name, entry in stages.items() if name != "report"):
            _save_page(context, _data(context))
            context.log.info("report of what was done before: %s", context.run_dir / "report.html")
    except Exception as error:
        # The failure itself is what is to be told.
        context.log.debug("no report: %r", error)


def _export(context: Context) -> None:
    if not can_show(context.train.image_shape):
        context.log.warning("ViRelAy shows grey and RGB images only: no project is written")
        return
    attribution = context.config.attribution
    composite = attribution.composite if isinstance(attribution.composite, str) else "own"
    method = attribution.method if attribution.method != "lrp" else f"lrp_{composite}"
    strategies = {"label": "true_label", "prediction": "predicted_label"}
    export(
        context.run_dir / "virelay",
        context.train,
        title=_title(context),
        model=_model(context),
        attributions=_existing(context.run_dir / "attributions.h5"),
        attribution_method=method,
        attribution_strategy=strategies.get(attribution.target, f"class_{attribution.target}"),
        analysis=_existing(context.run_dir / "analysis.h5"),
        progress=context.progress,
    )


def _truths(context: Context) -> tuple[Truth, ...]:
    """Return what was planted and changed something, artifacts first."""
    rows = [row for row in read_truth(context.run_dir) if row["samples"] or row.get("left_out")]
    truths = [
        Truth(
            row["class_index"],
            row["class_name"],
            row["kind"],
            row["rate"],
            frozenset(map(int, row["samples"])),
            is_artifact=bool(row["extent"]),
        )
        for row in rows
    ]
    return tuple(sorted(truths, key=lambda truth: not truth.is_artifact))


def _title(context: Context) -> str:
    dataset = context.config.dataset
    return f"{dataset.name}: {Path(dataset.train).name}" if dataset.train else dataset.name


def _model(context: Context) -> str:
    factory = context.config.model.factory
    return re.split(r"[/\\]", factory)[-1] if factory else context.config.model.name


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None


STAGE = Stage(
    name="report",
    needs=("attribute", "analyze", "rank", "isolate", "correct", "verify"),
    settings=("report",),
    outputs=("report.html", "figures/", "virelay/"),
    run=run,
)
