"""The study of planted artifacts as a command, run in this process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import hans_bench


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["hans_bench.py", *arguments])
    monkeypatch.setenv("PYTHONPATH", "")  # put back what the command sets
    return hans_bench.main()
