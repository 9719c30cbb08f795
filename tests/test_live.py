"""Progress in a terminal: what is done, how fast, how long it still takes."""

from __future__ import annotations

import io
import logging
import sys
import time
from types import SimpleNamespace

import pytest

from spray.pipelines.context import Context
from spray.pipelines.live import clock_time, rate_text


@pytest.mark.parametrize(
    ("rate", "text"),
    [(120.0, "120.0/s"), (1.0, "1.0/s"), (0.99, "59.4/min"), (1 / 60, "1.0/min"), (0.01, "36.0/h"), (0.0, "0.0/h")],
)
def test_slow_rates_are_told_in_longer_times(rate, text):
    assert rate_text(rate) == text


def test_durations_are_clock_times():
    assert [clock_time(seconds) for seconds in (0.4, 59.6, 86400)] == ["00:00:00", "00:01:00", "24:00:00"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_at_once_what_is_being_done(monkeypatch):
    shown, times = Terminal(), iter((0.0, 90.0, 180.0))
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    with Context.counter(SimpleNamespace(log=logging.getLogger("x")), 10, "candidates") as count:
        assert shown.getvalue() == "\rcandidates: 0/10\x1b[K"
        count(1)
        assert "candidates: 1/10, 40.0/h, 00:13:30 left" in shown.getvalue()
        count(1)
    assert shown.getvalue().endswith("\r\x1b[K"), "the line is left empty"


def test_elsewhere_nothing_is_written_over(monkeypatch, caplog):
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    with (
        caplog.at_level(logging.INFO),
        Context.counter(SimpleNamespace(log=logging.getLogger("x")), 10, "candidates") as count,
    ):
        count(1)
    assert (shown.getvalue(), caplog.text) == ("", "")
