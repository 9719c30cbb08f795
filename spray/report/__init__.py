"""The report of a run: one self-contained page that opens from disk with no network."""

from spray.report.data import ReportData
from spray.report.render import render

__all__ = ["ReportData", "render"]
