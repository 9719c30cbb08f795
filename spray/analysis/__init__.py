"""Spectral Relevance Analysis (SpRAy) and the ranking of what it finds.

Lapuschkin et al., "Unmasking Clever Hans predictors and assessing what machines really learn", 2019.
"""

from spray.analysis.clustering import CLUSTERINGS, cluster
from spray.analysis.fisher import separability
from spray.analysis.preprocessing import heatmap_features
from spray.analysis.spectral import eigengap, spectral_embedding

__all__ = ["CLUSTERINGS", "cluster", "eigengap", "heatmap_features", "separability", "spectral_embedding"]
