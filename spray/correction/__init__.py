"""Class Artifact Compensation (ClArC) and its controls: models that no longer rely on an artifact.

Anders et al., "Finding and removing Clever Hans: using explanation methods to debug and improve deep models", 2022.
"""

from spray.correction import fine_tuning, projection
from spray.correction.base import CORRECTIONS, Finding, Problem, check_methods
from spray.correction.cav import pattern_cav

__all__ = ["CORRECTIONS", "Finding", "Problem", "check_methods", "fine_tuning", "pattern_cav", "projection"]
