"""Progress as a person reads it: one line of a terminal that is written over, and the time that is left."""

from __future__ import annotations

import sys


class LiveLine:
    """The last line of a terminal; where there is none, nothing is shown."""

    def __init__(self) -> None:
        self.is_terminal = sys.stderr.isatty()
        self._is_shown = False

    def show(self, text: str) -> None:
        """Write over the line."""
        sys.stderr.write(f"\r{text}\x1b[K")
        sys.stderr.flush()
        self._is_shown = True

    def clear(self) -> None:
        """Leave the line empty, if anything is in it."""
        if self._is_shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._is_shown = False


def rate_text(per_second: float) -> str:
    """Return a rate with digits that say something: "7.8/s", "2.4/min", "3.0/h"."""
    for unit, seconds in (("s", 1.0), ("min", 60.0)):
        if per_second * seconds >= 1:
            return f"{per_second * seconds:.1f}/{unit}"
    return f"{per_second * 3600:.1f}/h"


def clock_time(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds; a day is 24:00:00."""
    whole = round(seconds)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"
