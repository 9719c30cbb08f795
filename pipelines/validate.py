"""Checks a whole configuration, with data and model, before the first stage spends time on it."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from spray.errors import UserError

if TYPE_CHECKING:
    from spray.pipelines.context import Context

DTYPES = ("float32", "float16")
POSITIVE = ("attribution.batch_size", "model.batch_size", "analysis.n_neighbors", "analysis.n_components")
# Stages that put images through the model.
WITH_MODEL = {"train", "attribute", "isolate", "correct", "verify"}


def check_settings(context: Context, stages: Collection[str]) -> None:
    """Check what can be checked without data: names, ranges, device.

    Raises
    ------
    UserError
        For the first mistake that is found.
    """
    config = context.config
    context.log.debug("device: %s", context.device)
    if not 0 <= config.seed < 2**32:
        raise UserError(f"seed={config.seed} is out of range; give a number from 0 to {2**32 - 1}")
    if config.attribution.dtype not in DTYPES:
        allowed = ", ".join(DTYPES)
        raise UserError(f"attribution.dtype={config.attribution.dtype} is unknown; allowed: {allowed}")
    for key in POSITIVE:
        section, name = key.split(".")
        if (value := getattr(getattr(config, section), name)) < 1:
            raise UserError(f"{key}={value} is too small; it has to be at least 1")
    if config.dataset.per_class is not None and config.dataset.per_class < 1:
        raise UserError(f"dataset.per_class={config.dataset.per_class} is too small; it has to be at least 1")
    if "correct" in stages and config.correction.methods:
        from spray.correction import CORRECTIONS

        for method in config.correction.methods:
            CORRECTIONS.get(method)


def try_out(context: Context, stages: Collection[str]) -> None:
    """Try data, model and attribution on two samples, as far as the stages that will run depend on them.

    Raises
    ------
    UserError
        For the first mistake that is found.
    """
    _check_labels(context)
    if not WITH_MODEL & set(stages):
        return
    from spray.models.loading import check_model

    model = context.build_model()
    images = context.normalizer(context.train.batch(np.arange(2)), context.device)
    n_classes = len(context.train.classes)
    check_model(model, images, n_classes)
    if "attribute" in stages:
        target = find_target(context.config.attribution.target, n_classes)
        context.explain(model, images, target if isinstance(target, int) else 0)


def find_target(target: str, n_classes: int) -> str | int:
    """Return `attribution.target`: "label", "prediction" or a class index."""
    if target in ("label", "prediction"):
        return target
    if target.isdigit() and int(target) < n_classes:
        return int(target)
    raise UserError(
        f"attribution.target={target} is unknown; allowed: label, prediction or a class index up to {n_classes - 1}"
    )


def _check_labels(context: Context) -> None:
    for part, name in ((context.train, "training"), (context.test, "test")):
        sizes = np.bincount(part.labels, minlength=len(part.classes))
        if not sizes.all():
            empty = part.classes[int(sizes.argmin())]
            raise UserError(f"there are no {name} images of class {empty!r}; every class needs some")
