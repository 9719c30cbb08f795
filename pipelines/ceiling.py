"""The ceiling of a controlled study: the model as it would be, had nothing been planted in its training images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from spray.data.plant_options import read_plants
from spray.errors import UserError
from spray.pipelines.context import Context

if TYPE_CHECKING:
    from spray.pipelines.config import SprayConfig

CEILING = "ceiling"
"""Of the model, and of the folder of its run."""


def check_ceiling(config: SprayConfig) -> None:
    """Check that there can be a ceiling if there is to be one.

    Raises
    ------
    UserError
        If nothing is planted, or the model is not trained here.
    """
    if not config.verify.ceiling:
        return
    if not read_plants(config.dataset.plant, config.dataset.plants):
        raise UserError(
            "verify.ceiling=true needs a planted artifact (dataset.plant.kind=...): the ceiling is a model trained "
            "without it"
        )
    if config.model.checkpoint is not None:
        raise UserError(
            "verify.ceiling=true needs a model that is trained here, to train it again without the planted artifact; "
            "leave model.checkpoint out, or verify.ceiling"
        )


def ceiling_context(context: Context) -> Context:
    """Return a context for the same training with nothing planted, in a folder of its own.

    Whatever is planted, it has the same configuration, so that runs that differ in that alone can share the result.
    """
    folder = context.run_dir / CEILING
    dataset = replace(context.config.dataset, plant={"kind": "none"}, plants=[])
    return context.sibling(folder, replace(context.config, dataset=dataset, run_dir=str(folder)))


def train_ceiling(context: Context) -> Path | None:
    """Train the model with the same budget and seed on images in which nothing is planted.

    Returns
    -------
    Path or None
        Its weights; None where it isn't asked for. A ceiling that is there already is not trained again.
    """
    if not context.config.verify.ceiling:
        return None
    from spray.pipelines.runner import run_part

    part = ceiling_context(context)
    context.log.info("training the ceiling, without anything planted, in %s", part.run_dir)
    run_part(part, ["train"])
    return part.run_dir / "model.pt"
