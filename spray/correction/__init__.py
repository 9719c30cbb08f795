"""Class Artifact Compensation (ClArC) and its controls: models that no longer rely on an artifact.

Anders et al., "Finding and removing Clever Hans: using explanation methods to debug and improve deep models", 2022.
"""

from spray.correction.base import CORRECTIONS, Problem, check_methods
from spray.correction.cav import pattern_cav

# Registers the members.
from spray.correction import fine_tuning, projection  # noqa: F401  isort: skip

__all__ = ["CORRECTIONS", "Problem", "check_methods", "pattern_cav"]
