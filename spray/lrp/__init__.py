"""Layer-wise relevance propagation for unmodified PyTorch models.

.. include:: guide.md
"""

from __future__ import annotations

from spray.lrp.composites import COMPOSITES, Composite, build_composite
from spray.lrp.concepts import Concept
from spray.lrp.engine import propagate, propagate_to
from spray.lrp.rules import RULES, AlphaBeta, Epsilon, Flat, Gamma, Pass, Rule, WSquare, ZBox, Zero, ZPlus

__all__ = [
    "COMPOSITES",
    "RULES",
    "AlphaBeta",
    "Composite",
    "Concept",
    "Epsilon",
    "Flat",
    "Gamma",
    "Pass",
    "Rule",
    "WSquare",
    "ZBox",
    "ZPlus",
    "Zero",
    "build_composite",
    "propagate",
    "propagate_to",
]
