"""Stages for a project of ViRelAy or CoRelAy: heatmaps and clusters are taken from it, and ranked as a run's own are.

There is no model, only its outputs, so that what needs one (to train, isolate, correct, verify) can't be asked for.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spray.errors import UserError
from spray.pipelines.stage import Stage

if TYPE_CHECKING:
    from spray.pipelines.config import SprayConfig
    from spray.pipelines.context import Context
    from spray.virelay_project import Project

NAME = "virelay"
STAGES = ("attribute", "analyze", "rank", "report")
ANEW = "none"
"""What `analysis` in `dataset.options` is where spray's own analysis is wanted."""


def is_project(config: SprayConfig) -> bool:
    """Say whether heatmaps and clusters come from a project."""
    return config.dataset.name == NAME


def check(config: SprayConfig, stages: Collection[str]) -> None:
    """Check what is asked for of a project.

    Raises
    ------
    UserError
        If a stage is asked for that needs a model or another dataset, or an option that would change the samples.
    """
    from spray.data.plant_options import read_plants

    if asked := [stage for stage in stages if stage not in STAGES]:
        raise UserError(
            f"stage {asked[0]} needs a model, which a project of ViRelAy does not have; "
            f"stages=[{','.join(STAGES)}] are what can be asked for"
        )
    if config.dataset.per_class is not None or read_plants(config.dataset.plant, config.dataset.plants):
        raise UserError("dataset.per_class and dataset.plant have no meaning for a project, whose heatmaps are there")


def substitute(stage: Stage, config: SprayConfig) -> Stage:
    """Return what a stage of the loop is for a project."""
    analysis = (config.dataset.options or {}).get("analysis")
    if stage.name == "attribute":
        return Stage("attribute", (), ("dataset",), ("attributions.h5",), take_attributions)
    if stage.name == "analyze" and analysis != ANEW:
        return Stage("analyze", ("attribute",), ("dataset",), ("analysis.h5",), take_analysis)
    if stage.name == "report":
        needs = ("attribute", "analyze", "rank")
        return replace(stage, needs=needs, outputs=("report.html", "figures/"), run=report)
    return stage


def take_attributions(context: Context) -> dict[str, Any]:
    """Write `attributions.h5` from the project's files."""
    from spray.virelay_heatmaps import write_attributions

    project, n = _project(context), len(context.train)
    found = write_attributions(project, context.train, context.run_dir / "attributions.h5")
    if found < n:
        context.log.warning("%d of %d samples have no heatmap", n - found, n)
    return {"project": project.name, "heatmaps": found, "method": project.attribution_method}


def take_analysis(context: Context) -> dict[str, Any]:
    """Write `analysis.h5` from one analysis of the project."""
    from spray.virelay_project import write_analysis

    project, name = _project(context), (context.config.dataset.options or {}).get("analysis")
    left_out = write_analysis(project, name, context.train, context.run_dir / "analysis.h5")
    taken = name or next(iter(project.analyses))
    others = [each for each in project.analyses if each != taken]
    if others:
        context.log.info("analysis %r is ranked; dataset.options={analysis: %s} takes another", taken, others[0])
    if left_out:
        context.log.info("left out, since they are no classes: %s", ", ".join(left_out[:10]))
    return {"analysis": taken, "left_out": left_out[:100]}


def report(context: Context) -> dict[str, Any]:
    """Write `report.html` and the figures, of what there is."""
    from spray.pipelines.report import save
    from spray.report.gather import gather

    project = _project(context)
    return {"bytes": save(context, gather(context.run_dir, context.train, title=project.name, model=project.model))}


def _project(context: Context) -> Project:
    from spray.virelay_project import read_project

    return read_project(Path(str(context.config.dataset.train)))
