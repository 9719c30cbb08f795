"""Class Artifact Compensation (ClArC), its peers and its controls: models that no longer rely on an artifact.

Anders et al., "Finding and removing Clever Hans: using explanation methods to debug and improve deep models", 2022.

.. include:: guide.md
"""

from spray.correction import augmentation, fine_tuning, guided, input_gradients, latent, projection, refitting
from spray.correction.base import CORRECTIONS, Finding, Problem, check_methods
from spray.correction.cav import pattern_cav
from spray.correction.options import Options, check_options
from spray.correction.wrapped import Projected, Projection, load_corrected, load_weights

__all__ = [
    "CORRECTIONS",
    "Finding",
    "Options",
    "Problem",
    "Projected",
    "Projection",
    "augmentation",
    "check_methods",
    "check_options",
    "fine_tuning",
    "guided",
    "input_gradients",
    "latent",
    "load_corrected",
    "load_weights",
    "pattern_cav",
    "projection",
    "refitting",
]
