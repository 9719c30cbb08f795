"""CSV files that people open in spreadsheets: what users named can't become a formula there.

RFC 4180, one header, lines that end in a line feed. Names of files and classes may start with a character that makes a
spreadsheet take the cell for a formula, which can run programs and send data. Such a text gets an apostrophe before it,
unless it is nothing but a number.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

# Also the wide forms, which some spreadsheets in East Asian languages take for the same.
FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?")


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table as CSV.

    Parameters
    ----------
    columns : sequence of str
        The header.
    rows : iterable of sequences
        Numbers are written as they are, None as an empty cell, everything else as a `guarded` text.
    """
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow([guarded(name) for name in columns])
    writer.writerows([_cell(value) for value in row] for row in rows)
    # File names that are no valid UTF-8 reach Python as lone surrogates, which no file can hold.
    return table.getvalue().encode("utf-8", "replace").decode()


def guarded(text: str) -> str:
    """Return a text with an apostrophe before it where a spreadsheet would take it for a formula.

    Apostrophes that are there already count as not there, so that `unguarded` gives back every text.
    """
    return f"'{text}" if FORMULA.match(text) and not NUMBER.fullmatch(text) else text


def unguarded(text: str) -> str:
    """Return the text that `guarded` was given."""
    return text[1:] if text.startswith("'") and FORMULA.match(text) else text


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, int | float) else guarded(str(value))
