"""README, guides and reference pages: links lead somewhere, and the pages can be made."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GUIDES = sorted(path.relative_to(ROOT) for path in ROOT.glob("*/**/guide.md") if ".venv" not in path.parts)


@pytest.mark.parametrize("path", [Path("README.md"), *GUIDES], ids=str)
def test_links_lead_somewhere(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        linked = (ROOT / path).parent / name
        assert linked.exists(), target
        if heading:
            titles = re.findall(r"(?m)^#+ (.*)$", linked.read_text(encoding="utf-8"))
            assert heading in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("path", GUIDES, ids=str)
def test_each_guide_is_on_the_page_of_its_package(path):
    assert ".. include:: guide.md" in (ROOT / path).with_name("__init__.py").read_text(encoding="utf-8")
    assert str(path) in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("pdoc") is None, reason="pdoc is not installed")
def test_reference_pages_are_made(tmp_path):
    said = subprocess.run(
        [sys.executable, str(ROOT / "scripts/docs.py"), str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert said.returncode == 0, said.stderr
    page = (tmp_path / "spray.html").read_text(encoding="utf-8")
    assert "relevance" in page
    assert "Peak memory above model and input" in (tmp_path / "spray/lrp.html").read_text(encoding="utf-8")
    # Parameters of a docstring become a list.
    assert "n_neighbors" in (tmp_path / "spray/analysis.html").read_text(encoding="utf-8")
