"""Which sample of a shard ends the process that explains it, found by halving; each step may cost a worker."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Search:
    """Halves a range of samples until those are alone that a process does not survive.

    Attributes
    ----------
    culprits : list of int
        Those found.
    """

    culprits: list[int] = field(default_factory=list)
    # Ranges to be probed, the next one last; whether it follows from what is known that one ends the process.
    _open: list[tuple[int, int, bool]] = field(default_factory=list)
    # Of each first half the second.
    _halves: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, start: int, stop: int) -> Search:
        """Return the search in samples `start` to `stop` - 1, which together have ended processes."""
        search = cls()
        search._split(start, stop)
        return search

    def next(self) -> tuple[int, int] | None:
        """Return the range to be probed next, as its start and stop; None at the end."""
        while self._open:
            start, stop, is_guilty = self._open[-1]
            # What follows is not enough for a single sample: it may be that only many together do it.
            if not is_guilty or stop - start == 1:
                return start, stop
            self._open.pop()
            self._split(start, stop)
        return None

    def survived(self) -> None:
        """Note that the process outlived the range that was last returned."""
        start, stop, _ = self._open.pop()
        # If it was a first half, the second one, which is next then, is to blame.
        if self._open and self._halves.get((start, stop)) == self._open[-1][:2]:
            self._open[-1] = (*self._open[-1][:2], True)

    def died(self) -> None:
        """Note that the range that was last returned ended the process."""
        start, stop, _ = self._open.pop()
        if stop - start == 1:
            self.culprits.append(start)
        else:
            self._split(start, stop)

    def _split(self, start: int, stop: int) -> None:
        middle = (start + stop + 1) // 2
        self._open += [(other, end, False) for other, end in ((middle, stop), (start, middle)) if other < end]
        self._halves[start, middle] = (middle, stop)
