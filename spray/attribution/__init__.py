"""Attribution of a model's decision to its input."""

from __future__ import annotations

from spray.attribution import gradients as gradients
from spray.attribution import relevance as relevance
from spray.attribution.explanation import explain
from spray.attribution.registry import ATTRIBUTIONS, Attribution

__all__ = ["ATTRIBUTIONS", "Attribution", "explain"]
