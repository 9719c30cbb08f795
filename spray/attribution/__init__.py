"""Attribution of a model's decision to its input."""

from __future__ import annotations

from spray.attribution import averaged as averaged
from spray.attribution import cam as cam
from spray.attribution import gradients as gradients
from spray.attribution import occlusion as occlusion
from spray.attribution import relevance as relevance
from spray.attribution import surrogate as surrogate
from spray.attribution.explanation import explain
from spray.attribution.registry import ATTRIBUTIONS, Attribution

__all__ = ["ATTRIBUTIONS", "Attribution", "explain"]
