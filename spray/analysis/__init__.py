"""Spectral Relevance Analysis (SpRAy) and the ranking of what it finds.

Lapuschkin et al., "Unmasking Clever Hans predictors and assessing what machines really learn", 2019.

.. include:: guide.md
"""

from spray.analysis.clustering import CLUSTERINGS, cluster
from spray.analysis.fisher import separability
from spray.analysis.preprocessing import Preprocessing, heatmap_features
from spray.analysis.projection import PROJECTIONS, project
from spray.analysis.spectral import eigengap, spectral_embedding
from spray.analysis.steps import STEPS

__all__ = [
    "CLUSTERINGS",
    "PROJECTIONS",
    "STEPS",
    "Preprocessing",
    "cluster",
    "eigengap",
    "heatmap_features",
    "project",
    "separability",
    "spectral_embedding",
]
