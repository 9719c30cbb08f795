"""What is told of a run on Dask's workers: one live line on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import TYPE_CHECKING

from spray.pipelines.live import LiveLine, clock_time

if TYPE_CHECKING:
    from collections.abc import Callable

    from spray.store.shards import Shard

LOG_SECONDS, TERMINAL_SECONDS = 10.0, 0.2
"""How often progress is told without and with a terminal."""


class Progress:
    """Counts samples and shards, and tells of them.

    Parameters
    ----------
    log : logging.Logger
        Where lines go.
    shards, samples : int
        All that are to be computed.
    """

    def __init__(
        self, log: logging.Logger, shards: int, samples: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.log, self.clock = log, clock
        self.shards, self.samples = shards, samples
        self.shards_done = self.samples_done = 0
        self.workers = 0
        self.names: set[str] = set()
        self.failures: Counter[str] = Counter()
        self.losses: Counter[str] = Counter()
        self.start = self.told = clock()
        # When the first shard was there, and its samples: what came before is workers that start.
        self.first: tuple[float, int] | None = None
        self.line = LiveLine()

    def say(self, text: str, *arguments: object, level: int = logging.INFO) -> None:
        """Log a line of its own."""
        self.line.clear()
        self.log.log(level, text, *arguments)

    def done(self, shard: Shard) -> None:
        """Count a shard."""
        self.shards_done += 1
        self.samples_done += shard.size
        if self.first is None:
            self.first = (self.clock(), self.samples_done)

    def tick(self) -> None:
        """Tell how far it is, if it is time to."""
        now = self.clock()
        if now - self.told < (TERMINAL_SECONDS if self.line.is_terminal else LOG_SECONDS):
            return
        self.told = now
        if self.line.is_terminal:
            self.line.show(self.state(now))
        else:
            self.log.info("%s", self.state(now))

    def state(self, now: float) -> str:
        """Return how far it is: shards and samples done, rate, time left, workers."""
        rate, left = self.samples_done / max(now - self.start, 1e-9), "?"
        if self.first is not None:
            start, before = self.first
            if self.samples_done > before and now > start:
                rate = (self.samples_done - before) / (now - start)
            left = clock_time((self.samples - self.samples_done) / rate)
        return (
            f"heatmaps: {self.samples_done}/{self.samples} in {self.shards_done}/{self.shards} shards, "
            f"{rate:.1f}/s, {left} left, {_count(self.workers, 'worker')}"
        )

    def finish(self) -> None:
        """Tell what it came to, with the failures of each worker."""
        seconds = self.clock() - self.start
        parts = [
            f"{self.samples_done} heatmaps in {self.shards_done} shards by {_count(len(self.names), 'worker')}: "
            f"{seconds:.1f} s, {self.samples_done / max(seconds, 1e-9):.1f}/s"
        ]
        parts += [f"{name} failed {_count(n, 'time')}" for name, n in sorted(self.failures.items())]
        parts += [f"{name} was lost {_count(n, 'time')}" for name, n in sorted(self.losses.items())]
        self.say("%s", "; ".join(parts))

    def close(self) -> None:
        """Leave the terminal's line empty."""
        self.line.clear()


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
