"""Whether each image can be read: found out once, remembered for the next start."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import PIL

from spray.data import cache
from spray.data.decoding import UnreadableImageError

log = logging.getLogger(__name__)

UNKNOWN, GOOD, BAD = 0, 1, 2
CHUNK = 256
SAY_SECONDS, SAVE_SECONDS = 5.0, 60.0
# What another version of the decoder makes of a file is not known.
DECODER = f"1 Pillow {PIL.__version__}"


@dataclass
class Check:
    """What is known of each of n images.

    Attributes
    ----------
    state : ndarray of uint8, shape (n,)
        `UNKNOWN`, `GOOD` or `BAD`.
    reasons : dict of int to str
        Of each bad one, what is wrong with it.
    """

    state: np.ndarray
    reasons: dict[int, str] = field(default_factory=dict)

    @classmethod
    def unknown(cls, n: int) -> Check:
        """Return that nothing is known."""
        return cls(np.zeros(n, dtype=np.uint8))

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Check:
        """Return what `to_arrays` was called on; nothing is known if another decoder found it out.

        Raises
        ------
        KeyError, ValueError
            If the arrays are not from there.
        """
        state = arrays["check_state"]
        if str(arrays["check_decoder"]) != DECODER:
            return cls.unknown(len(state))
        reasons = cache.unpack(arrays["check_reasons"], arrays["check_lengths"])
        return cls(state, dict(zip(np.flatnonzero(state == BAD).tolist(), reasons, strict=True)))

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return arrays to be saved."""
        reasons, lengths = cache.pack([self.reasons[row] for row in np.flatnonzero(self.state == BAD).tolist()])
        return {
            "check_state": self.state,
            "check_reasons": reasons,
            "check_lengths": lengths,
            "check_decoder": np.array(DECODER),
        }

    def take(self, rows: np.ndarray, other: Check, rows_there: np.ndarray) -> None:
        """Take over what another check knows of some images, which have other rows there."""
        self.state[rows] = other.state[rows_there]
        for place in np.flatnonzero(self.state[rows] == BAD):
            self.reasons[int(rows[place])] = other.reasons[int(rows_there[place])]


def run_check(
    read: Callable[[np.ndarray], Mapping[int, UnreadableImageError]],
    check: Check,
    save: Callable[[], None],
    what: str,
    most: int = CHUNK,
) -> dict[int, str]:
    """Find out what is not known yet.

    Parameters
    ----------
    read : callable
        Reads the images of some rows, and returns why each failed that did.
    check : Check
        What is known; it is filled in.
    save : callable
        Saves it: called every minute and at the end, so that a check that is cut short goes on where it was.
    what : str
        Whose images they are, for the log.
    most : int
        Images that are read at once.

    Returns
    -------
    dict of int to str
        Each row that could not be read, and why. Reasons that need not last are not in `check`.
    """
    passing: dict[int, str] = {}
    waiting = np.flatnonzero(check.state == UNKNOWN)
    start = said = saved = time.monotonic()
    for done in range(0, len(waiting), most):
        rows = waiting[done : done + most]
        failures = read(rows)
        check.state[rows] = GOOD
        for row, error in failures.items():
            check.state[row] = BAD if error.lasting else UNKNOWN
            (check.reasons if error.lasting else passing)[row] = str(error)
        now = time.monotonic()
        if now - said > SAY_SECONDS:
            said = now
            n_done = done + len(rows)
            rate = n_done / (now - start)
            left = (len(waiting) - n_done) / rate / 60
            log.info(
                "%s: checking that every image can be read, once (dataset.check=false does not): "
                "%d of %d, %.0f/s, %.1f min left", what, n_done, len(waiting), rate, left,
            )  # fmt: skip
        if now - saved > SAVE_SECONDS:
            saved = now
            save()
    if len(waiting):
        save()
    return dict(sorted((check.reasons | passing).items()))
