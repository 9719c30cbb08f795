"""Checks a whole configuration, with data and model, before the first stage spends time on it."""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from spray.errors import UserError

if TYPE_CHECKING:
    from spray.pipelines.context import Context

DTYPES = ("float32", "float16")


def check_settings(context: Context, stages: Collection[str]) -> None:
    """Check what can be checked without data: names, ranges, device.

    Raises
    ------
    UserError
        For the first mistake that is found.
    """
    config = context.config
    context.log.debug("device: %s", context.device)
    if config.seed < 0:
        raise UserError(f"seed={config.seed} is negative; give a number from 0")
    if config.attribution.dtype not in DTYPES:
        raise UserError(
            f"attribution.dtype={config.attribution.dtype} is unknown; allowed: {', '.join(DTYPES)}"
        )
    if min(config.dataset.std, default=0) <= 0:
        raise UserError(f"dataset.std={config.dataset.std} has to be above 0 in every channel")
    for key in (
        "attribution.batch_size",
        "model.batch_size",
        "analysis.n_neighbors",
        "analysis.n_components",
    ):
        section, name = key.split(".")
        if (value := getattr(getattr(config, section), name)) < 1:
            raise UserError(f"{key}={value} is too small; it has to be at least 1")
    if "correct" in stages:
        corrections = import_module("spray.correction").CORRECTIONS
        for method in config.correction.methods:
            corrections.get(method)


def try_out(context: Context, stages: Collection[str]) -> None:
    """Try data, model and attribution on two samples, as far as the stages that will run depend on them.

    Raises
    ------
    UserError
        For the first mistake that is found.
    """
    _check_data(context)
    if not {"train", "attribute", "isolate", "correct", "verify"} & set(stages):
        return
    model = context.build_model()
    images = context.normalizer(context.train.batch(np.arange(2))).to(context.device)
    n_classes = len(context.train.classes)
    check_outputs(_forward(model, images), n_classes)
    if "attribute" in stages:
        target = find_target(context.config.attribution.target, n_classes)
        relevance = attribute_batch(context, model, images, target if isinstance(target, int) else 0)
        if relevance.shape != images.shape:
            raise UserError(
                f"attribution.method={context.config.attribution.method} gives shape "
                f"{tuple(relevance.shape)} for images of shape {tuple(images.shape)}; choose another method"
            )


def check_outputs(logits: Tensor, n_classes: int) -> None:
    """Refuse a model's outputs (n, k) that are not finite or not one for each class."""
    if logits.ndim != 2 or logits.shape[1] != n_classes:
        raise UserError(
            f"the model gives outputs of shape {tuple(logits.shape)} for {len(logits)} images, but the dataset "
            f"has {n_classes} classes; give a model with {n_classes} outputs"
        )
    if not torch.isfinite(logits).all():
        raise UserError(
            "the model's outputs are NaN or infinite; check model.checkpoint, dataset.mean and dataset.std"
        )


def find_target(target: str, n_classes: int) -> str | int:
    """Return `attribution.target`: "label", "prediction" or a class index."""
    if target in ("label", "prediction"):
        return target
    if target.isdigit() and int(target) < n_classes:
        return int(target)
    raise UserError(
        f"attribution.target={target} is unknown; allowed: label, prediction or a class index up to "
        f"{n_classes - 1}"
    )


def attribute_batch(context: Context, model: nn.Module, images: Tensor, target: int) -> Tensor:
    """Return the relevance of a few images, as the stage `attribute` computes it."""
    from spray.explain import explain

    options = context.config.attribution
    composite = {"composite": options.composite} if options.method == "lrp" else {}
    return explain(model, images, target, method=options.method, **composite)


def _check_data(context: Context) -> None:
    train, test, options = context.train, context.test, context.config.dataset
    if len(train.classes) < 2:
        raise UserError(
            f"the dataset has {len(train.classes)} class ({', '.join(train.classes)}); it takes at least two"
        )
    if train.classes != test.classes:
        different = sorted(set(train.classes) ^ set(test.classes))
        raise UserError(
            "training and test images have different classes "
            f"({', '.join(different[:5]) or 'another order'}); give both folders the same ones"
        )
    for part, name in ((train, "training"), (test, "test")):
        sizes = np.bincount(part.labels, minlength=len(part.classes))
        if not sizes.all():
            empty = part.classes[int(sizes.argmin())]
            raise UserError(f"there are no {name} images of class {empty!r}; every class needs some")
    for key, values in (("mean", options.mean), ("std", options.std)):
        if len(values) not in (1, train.image_shape[0]):
            raise UserError(
                f"dataset.{key}={values} has {len(values)} numbers, but the images have "
                f"{train.image_shape[0]} channels"
            )


def _forward(model: nn.Module, images: Tensor) -> Tensor:
    try:
        with torch.inference_mode():
            logits = model(images)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(
            f"the model cannot take images of shape {tuple(images.shape[1:])}: {error}; "
            "check dataset.image_size"
        ) from error
    if not isinstance(logits, Tensor):
        raise UserError(f"the model returns {type(logits).__name__}; it has to return a tensor (N, classes)")
    return logits
