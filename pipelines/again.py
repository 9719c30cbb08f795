"""What `rank` does over: clusterings of some of the samples, and features that had no part in the clusterings."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spray.analysis import cluster, eigengap
from spray.analysis.clustering import spectral_rows
from spray.analysis.preprocessing import Preprocessing
from spray.analysis.resampling import STARTS, Clusterer, kmeans_clusterer
from spray.errors import UserError
from spray.pipelines.analysis_options import Clustering, clusterings_of
from spray.pipelines.analyze import read_features
from spray.pipelines.compute.base import stored_layers
from spray.pipelines.context import Context
from spray.pipelines.other_run import open_other
from spray.pipelines.project import is_project
from spray.store import Attributions

if TYPE_CHECKING:
    from spray.pipelines.config import SprayConfig

LAYER, HEATMAPS = ("normalize_sum",), ("sum", "pool", "normalize_sum")
"""What makes the relevance of an inner layer comparable, and another run's heatmaps."""


def clusterers_of(context: Context) -> list[dict[str, Clusterer]]:
    """Return what makes the clusterings of each view again, by name: of the analysis, then of `rank.views`."""
    options, seed = context.config.analysis, context.config.seed
    # How a project's clusterings were made is not known.
    own = [] if is_project(context.config) else clusterings_of(options)
    found: list[dict[str, Clusterer]] = [{each.name: partial(_again, each, seed) for each in own}]
    counts = {k: kmeans_clusterer(k, seed) for k in options.n_clusters}
    found += [{f"{view}-kmeans-{k:02d}": each for k, each in counts.items()} for view in context.config.rank.views]
    return found


def held_out_features(context: Context, index: np.ndarray, attributions: Attributions) -> np.ndarray:
    """Return what `rank.held_out` compares a class's samples by, float32 (n, d): a layer's relevance or another run's.

    Parameters
    ----------
    context : Context
        Of the run.
    index : ndarray of int, shape (n,)
        The samples of the class.
    attributions : Attributions
        Of this run.

    Raises
    ------
    UserError
        If the other run is of other samples, or not to be read.
    """
    folder, grid = other_heatmaps(context.config), context.config.analysis.grid
    if folder is None:
        layer = f"layer/{context.config.rank.held_out}"
        return read_features(attributions, index, Preprocessing(LAYER, grid), layer).values
    with open_other(folder, context.train, "rank.held_out") as other:
        return read_features(other, index, Preprocessing(HEATMAPS, grid)).values


def other_heatmaps(config: SprayConfig) -> Path | None:
    """Return the other run's directory; None where `rank.held_out` names a layer of this one."""
    return None if config.rank.held_out in stored_layers(config) else Path(config.rank.held_out)


def check_held_out(config: SprayConfig) -> None:
    """Check `rank.held_out`, which the evidence `held_out` needs.

    Raises
    ------
    UserError
        If it is missing without need, is what the clusters are made of, or neither a stored layer nor a run.
    """
    held_out, layers = config.rank.held_out, stored_layers(config)
    if "held_out" not in config.rank.evidence:
        return
    if held_out in layers and held_out != config.analysis.source:
        return
    if held_out and held_out not in layers and (Path(held_out) / "attributions.h5").is_file():
        return
    stored = [layer for layer in layers if layer != config.analysis.source]
    there = f"one of {', '.join(stored)}" if stored else "a layer that attribution.layer=[LAYER] stores"
    raise UserError(
        f"rank.held_out={held_out} won't do for the evidence held_out; give what had no part in the clusters: {there}, "
        "or the run_dir of a run with another attribution.method on the same data"
    )


def _again(clustering: Clustering, seed: int, values: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    k = clustering.n_clusters or max(2, eigengap(values))
    arguments = clustering.arguments(seed)
    if clustering.method == "kmeans":
        arguments.setdefault("starts", STARTS)
    return cluster(spectral_rows(vectors, k), clustering.method, **arguments)
