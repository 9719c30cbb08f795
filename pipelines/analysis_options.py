"""The configuration's section `analysis` as steps, clusterings and groups, checked before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from spray.analysis.clustering import CLUSTERINGS, cluster
from spray.analysis.options import named_options
from spray.analysis.preprocessing import Preprocessing
from spray.errors import UserError

if TYPE_CHECKING:
    from spray.pipelines.config import AnalysisConfig, SprayConfig

GROUPS = ("class", "predicted", "all")
"""What `analysis.groups` may hold."""

OF_CLASSES = ("rank", "isolate")
"""Stages that read the groups of classes."""


@dataclass(frozen=True)
class Clustering:
    """One clustering of each group.

    Attributes
    ----------
    name : str
        Of its labels in the file.
    method : str
        As in `CLUSTERINGS`.
    options : dict
        Keyword arguments from the configuration.
    n_clusters : int or None
        Where the method is told how many; it then looks at as many columns of the embedding.
    """

    name: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    n_clusters: int | None = None

    def arguments(self, seed: int) -> dict[str, Any]:
        """Return the keyword arguments of `cluster`."""
        own = {"n_clusters": self.n_clusters, "seed": seed}
        return self.options | {name: own[name] for name in _parameters(self.method) if own.get(name) is not None}


def preprocessing_of(options: AnalysisConfig) -> Preprocessing:
    """Return the configured steps.

    Raises
    ------
    UserError
        For an unknown step or option, or a value that it can't have.
    """
    return Preprocessing(options.steps, options.grid)


def clusterings_of(options: AnalysisConfig) -> list[Clustering]:
    """Return the configured clusterings, those that are told how many clusters to make once for each number.

    Raises
    ------
    UserError
        For an unknown method or option, a value that it can't have, or a clustering that is there twice.
    """
    found: list[Clustering] = []
    for number, entry in enumerate(options.clusterings):
        key = f"analysis.clusterings[{number}]"
        method, own = named_options(entry, CLUSTERINGS, key, reserved=("n_clusters", "seed"))
        name = method + "".join(f"-{option}={value}" for option, value in own.items())
        if "n_clusters" in _parameters(method):
            found += [Clustering(f"{name}-{k:02d}", method, own, k) for k in options.n_clusters]
        else:
            found.append(Clustering(name, method, own))
        if own:
            _try(key, method, own)
    names = [clustering.name for clustering in found]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"analysis.clusterings makes {double} twice; leave one out")
    return found


def projections_of(options: AnalysisConfig) -> list[str]:
    """Return the names of the configured pictures of the embedding."""
    return [name for name, wanted in (("tsne", options.tsne), ("umap", options.umap)) if wanted]


def source_array(options: AnalysisConfig) -> str:
    """Return the array of `attributions.h5` that is analyzed."""
    return options.source if options.source == "attribution" else f"layer/{options.source}"


def check_analysis(config: SprayConfig, stages: Collection[str] = ()) -> None:
    """Check the section's keys that are more than a number.

    Raises
    ------
    UserError
        For the first mistake that is found.
    """
    from spray.pipelines.compute.base import stored_layers

    options = config.analysis
    counts = options.n_clusters
    if not counts or min(counts) < 2:
        raise UserError(f"analysis.n_clusters={counts} is out of range; give numbers of at least 2, such as [2,4,8]")
    if not options.clusterings:
        raise UserError("analysis.clusterings=[] is empty; give some, such as [kmeans,hdbscan]")
    preprocessing_of(options)
    clusterings_of(options)
    layers = stored_layers(config)
    if not options.source:
        raise UserError(
            "analysis.source is not set; give an inner layer, as in model.named_modules(), that is stored as well: "
            "analysis.source=layer3 attribution.layer=[layer3]"
        )
    if options.source != "attribution" and options.source not in layers:
        stored = f"analysis.source has to be attribution or one of {', '.join(layers)}, or " if layers else ""
        raise UserError(
            f"analysis.source={options.source} isn't stored; {stored}set attribution.layer=[{options.source}], which "
            "stores the relevance of an inner layer with attribution.method=lrp"
        )
    _check_groups(options.groups, stages)


def check_shapes(config: SprayConfig, shapes: dict[str, Sequence[int]]) -> None:
    """Check the steps against what will be stored of a sample, by the array's name.

    Raises
    ------
    UserError
        If a step can't take what it would be given.
    """
    preprocessing_of(config.analysis).width(shapes[source_array(config.analysis)])


def _check_groups(groups: Sequence[str], stages: Collection[str]) -> None:
    unknown = [group for group in groups if group not in GROUPS]
    if unknown or not groups or len(set(groups)) < len(groups):
        raise UserError(
            f"analysis.groups={list(groups)} must hold some of {', '.join(GROUPS)}, each once, such as [class,all]"
        )
    readers = [stage for stage in OF_CLASSES if stage in stages]
    if "class" not in groups and readers:
        raise UserError(
            f"analysis.groups={list(groups)} leaves out class, but {' and '.join(readers)} work on the groups of "
            "classes; add class, or ask for other stages only: stages=[train,attribute,analyze]"
        )


def _try(key: str, method: str, options: dict[str, Any]) -> None:
    """Cluster a few rows: what the method doesn't take is found now and not after hours."""
    rows = np.arange(20.0).reshape(10, 2)
    try:
        cluster(rows, method, **options)
    except (UserError, ValueError) as error:
        raise UserError(f"{key}: {method}.{error}") from None


def _parameters(method: str) -> list[str]:
    return list(inspect.signature(CLUSTERINGS.get(method)).parameters)
