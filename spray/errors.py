"""The one kind of error that a user's mistake raises."""

from __future__ import annotations


class UserError(Exception):
    """A user's mistake, told in one line: what was wrong, what is allowed, what to do.

    The command line prints the line and exits with code 2, without a traceback.
    """
