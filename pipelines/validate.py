"""Checks a whole configuration, with data and model, before the first stage spends time on it."""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from spray.analysis.discovery import CORRECTIONS
from spray.analysis.neighbors import METHODS
from spray.analysis.resampling import FEWEST_DRAWS
from spray.analysis.vectors import METRICS
from spray.analysis.views import STEPS as VIEWS
from spray.bulk.keeping import DTYPES, kept_arrays
from spray.errors import UserError
from spray.pipelines.analysis_options import check_analysis, check_shapes
from spray.pipelines.compute import COMPUTES
from spray.pipelines.project import check as check_project
from spray.pipelines.project import is_project
from spray.pipelines.tracking import check as check_tracker
from spray.store.layout import COMPRESSIONS

if TYPE_CHECKING:
    from spray.pipelines.config import SprayConfig
    from spray.pipelines.context import Context

# The least value of each number, and what some have to be above.
LEAST = {
    "dataset.per_class": 1,
    "model.epochs": 1,
    "model.batch_size": 1,
    "attribution.pool": 1,
    "attribution.max_bad": 0,
    "compute.shard_size": 1,
    "compute.prefetch": 1,
    "compute.threads": 1,
    "compute.n_workers": 1,
    "analysis.n_neighbors": 1,
    "analysis.n_components": 1,
    "analysis.grid": 1,
    "rank.looked_at": 1,
    "rank.draws": 0,
    "isolate.latent": 0,
    "isolate.per_class": 1,
    "isolate.candidates": 1,
    "isolate.n_samples": 8,
    "isolate.n_tested": 1,
    "correction.epochs": 1,
    "correction.rounds": 1,
    "verify.n_explained": 1,
    "model.weight_decay": 0,
}
ABOVE = {"model.learning_rate": 0, "correction.learning_rate": 0}
CHOICES = {
    "attribution.dtype": tuple(DTYPES),
    "attribution.channels": ("all", "sum"),
    "analysis.metric": METRICS,
    "analysis.neighbors": METHODS,
    "compute.name": tuple(COMPUTES.names()),
    "compute.compression": tuple(COMPRESSIONS),
    "rank.score": ("cross_fitted", "fisher"),
    "rank.correction": CORRECTIONS,
}
FIGURES = ("png", "pdf")
EVIDENCE = ("repeated", "content", "confidence", "concentration", "stability", "resampling", "held_out")
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
    for key, least in LEAST.items():
        value = _value(config, key)
        if value is not None and not least <= value < float("inf"):
            raise UserError(f"{key}={value} is out of range; it has to be at least {least}")
    for key, bound in ABOVE.items():
        if not bound < (value := _value(config, key)) < float("inf"):
            raise UserError(f"{key}={value} is out of range; it has to be above {bound}")
    for key, allowed in CHOICES.items():
        if (value := _value(config, key)) not in allowed:
            raise UserError(f"{key}={value} is unknown; allowed: {', '.join(allowed)}")
    check_plants(config)
    if is_project(config):
        check_project(config, stages)
    check_attribution(config)
    check_ranking(config)
    check_analysis(config, stages)
    if "correct" in stages and config.correction.methods:
        from spray.correction import check_methods, check_options
        from spray.pipelines.correct import correction_options

        check_methods(config.correction.methods)
        check_options(correction_options(config))
    if "verify" in stages:
        from spray.pipelines.ceiling import check_ceiling

        check_ceiling(config)
    if unknown := [kind for kind in config.report.figures if kind not in FIGURES]:
        raise UserError(f"report.figures has {', '.join(unknown)}; allowed: {', '.join(FIGURES)}, or [] for none")
    check_tracker(config)
    if "compare" in stages:
        from spray.pipelines.compare import check

        check(config)


def check_plants(config: SprayConfig) -> None:
    """Check what can be checked of `dataset.plant` and `dataset.plants` without images.

    Raises
    ------
    UserError
        For the first mistake that is found; unknown classes and what images are too small for are found with the data.
    """
    from spray.data.plant_options import read_plants

    read_plants(config.dataset.plant, config.dataset.plants)


def check_attribution(config: SprayConfig) -> None:
    """Check the attribution's keys that need no model.

    Raises
    ------
    UserError
        For a layer where it has no meaning, or an option that the pipeline sets itself.
    """
    options = config.attribution
    if options.layer is not None and options.method not in ("lrp", "grad_cam"):
        raise UserError(
            f"attribution.layer={options.layer} has no meaning for attribution.method={options.method}; lrp stores "
            "the relevance of inner layers, grad_cam looks at one"
        )
    names = options.layer if isinstance(options.layer, list) and options.method == "lrp" else [options.layer or ""]
    if any(not isinstance(name, str) for name in names) or len(set(names)) < len(names):
        allowed = "a name" + (" or a list of different names" if options.method == "lrp" else "")
        raise UserError(f"attribution.layer={options.layer} must be {allowed}, as in model.named_modules()")
    size = options.batch_size
    if size != "auto" and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise UserError(f"attribution.batch_size={size} must be a number from 1, or auto")
    if not isinstance(options.options, dict | None):
        raise UserError(
            f"attribution.options={options.options} is no mapping; write attribution.options={{gamma: 0.1}}"
        )
    own = sorted({"layer", "start", "target", "method", "composite"} & set(options.options or {}))
    if own:
        raise UserError(f"attribution.options has {', '.join(own)}, which isn't an option of heatmaps of the input")


def check_ranking(config: SprayConfig) -> None:
    """Check `rank.evidence`, `rank.views` and what the evidence needs.

    Raises
    ------
    UserError
        For a kind that there is not, one that is given twice, or one that lacks what it needs.
    """
    for key, given, allowed in (
        ("evidence", config.rank.evidence, EVIDENCE),
        ("views", config.rank.views, tuple(VIEWS)),
    ):
        unknown = [name for name in given if name not in allowed]
        if unknown:
            raise UserError(f"rank.{key} has {unknown[0]!r}, which is unknown; allowed: {', '.join(allowed)}, or []")
        if len(set(given)) < len(given):
            raise UserError(f"rank.{key}={given} names one twice; each counts once")
    if "resampling" in config.rank.evidence and config.rank.draws < FEWEST_DRAWS:
        raise UserError(
            f"rank.evidence has resampling, but rank.draws={config.rank.draws}; it needs at least {FEWEST_DRAWS}"
        )
    from spray.pipelines.again import check_held_out

    check_held_out(config)


def _value(config: SprayConfig, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def try_out(context: Context, stages: Collection[str]) -> None:
    """Try data, model and attribution on two samples, as far as the stages that will run depend on them.

    Raises
    ------
    UserError
        For the first mistake that is found.
    """
    _check_labels(context)
    if not WITH_MODEL & set(stages) or is_project(context.config):
        return
    from spray.models.loading import check_model

    model = context.build_model()
    images = context.trial_images(2)
    n_classes = len(context.train.classes)
    check_model(model, images, n_classes)
    if "attribute" in stages:
        find_target(context.config.attribution.target, n_classes)
        relevance, logits = context.attribute(model, images, np.zeros(2))
        if "analyze" in stages:
            from spray.pipelines.compute.base import keeping_of

            kept = kept_arrays(relevance, logits, keeping_of(context.config))
            check_shapes(context.config, {name: values.shape[1:] for name, values in kept.items()})
        check_backend(context)
    if "correct" in stages and context.config.correction.methods:
        from spray.correction.checks import check_model as check_correction
        from spray.pipelines.correct import correction_options

        check_correction(model, images, context.config.correction.methods, correction_options(context.config))


def check_backend(context: Context) -> None:
    """Let the module of `compute.name` check what it needs, such as packages, GPUs and commands."""
    module = import_module(COMPUTES.get(context.config.compute.name))
    if hasattr(module, "check"):
        module.check(context)


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
