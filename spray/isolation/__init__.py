"""From a cluster of heatmaps to the artifact that made it, and the causal test of its effect.

.. include:: guide.md
"""

from spray.isolation.candidate import Artifact, isolate
from spray.isolation.causal import Effect, measure_effect, verdict
from spray.isolation.choice import ISOLATORS

__all__ = ["ISOLATORS", "Artifact", "Effect", "isolate", "measure_effect", "verdict"]
