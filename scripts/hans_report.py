"""Tables and figures of `hans_bench.py`, of all cells in its output folder, whichever command or machine made them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import hans_cases
import hans_cells
import hans_rows
import hans_tables
from hydra.experimental.callback import Callback

from spray.storage import write_text

FAILURE = "failed.json"
"""In a cell's folder: why it could not be made when that was last tried."""


class Begun(Callback):
    """Knows the output folders of this command's sweeps, which Hydra does not hand on."""

    out: ClassVar[list[Path]] = []

    def on_multirun_start(self, config: Any, **kwargs: Any) -> None:
        """Note the folder."""
        if not config.plan:
            self.out.append(Path(config.out))


def write(out: Path) -> list[tuple[str, str]]:
    """Write `hans.csv`, `columns.md`, `summary.md`, `cases.md` and the figures of the cells that are done.

    Returns
    -------
    list of tuple
        Name and error of each cell that failed; one whose files give no rows is among them.
    """
    groups: list[tuple[tuple[float, ...], list[dict[str, Any]]]] = []
    failed: list[tuple[str, str]] = []
    for folder in sorted(out.glob("*/")):
        try:
            if (folder / FAILURE).is_file():
                failed.append((folder.name, json.loads((folder / FAILURE).read_text())["error"]))
            elif (record := hans_cells.read_record(folder)) is not None:
                groups.append((hans_cells.order(hans_rows.cell_of(record)), hans_rows.rows_of(record, out)))
        except Exception as error:
            failed.append((folder.name, _why(error)))
    rows = [row for _, group in sorted(groups, key=lambda pair: pair[0]) for row in group]
    hans_rows.write_table(out / "hans.csv", rows)
    write_text(out / "columns.md", "".join(f"- `{name}`: {text}\n" for name, text in hans_rows.COLUMNS.items()))
    write_text(out / "summary.md", hans_tables.summary(rows, failed))
    write_text(out / "cases.md", hans_cases.text(rows))
    if rows:
        import hans_plots

        hans_plots.draw(rows, out)
    return failed


def note(path: Path, error: Exception) -> str:
    """Keep in a cell's folder what went wrong in it; return the line."""
    said = _why(error)
    write_text(path, json.dumps({"error": said}))
    return said


def _why(error: Exception) -> str:
    said = " ".join(str(error).split())
    return said if isinstance(error, hans_cells.CellError) else f"{type(error).__name__}: {said}"
