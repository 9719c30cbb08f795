"""Writes the reference pages from the docstrings: python scripts/docs.py [FOLDER]."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc

import spray

PAGES = [
    "spray",
    "spray.attribution",
    "spray.lrp",
    "spray.lrp.rules",
    "spray.lrp.composites",
    "spray.bulk",
    "spray.analysis",
    "spray.analysis.scoring",
    "spray.analysis.comparison",
    "spray.isolation",
    "spray.correction",
    "spray.verification",
    "spray.faithfulness",
    "spray.figures",
    "spray.report",
    "spray.store",
    "spray.data",
    "spray.models.loading",
    "spray.virelay",
    "spray.virelay_project",
    "spray.errors",
    "spray.pipelines",
]


def main(folder: Path) -> None:
    """Write one page for each module; whatever pdoc warns of is an error."""
    # Some libraries ask the system for something when they are imported, which pdoc does not let them.
    for module in pkgutil.walk_packages(spray.__path__, "spray."):
        importlib.import_module(module.name)
    # These are imported when they are used first, which pdoc does not do.
    for name in spray.__all__:
        setattr(spray, name, getattr(spray, name))
    pdoc.render.configure(docformat="numpy", show_source=False, footer_text=f"spray {spray.__version__}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pdoc.pdoc(*PAGES, output_directory=folder)
    print(folder / "index.html")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/docs"))
