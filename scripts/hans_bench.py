"""The controlled study: artifacts planted on purpose, found, proven, corrected, each compared with the truth.

    python scripts/hans_bench.py --out outputs/hans --jobs 2
    python scripts/hans_bench.py --quick                         # a few small runs, minutes
    python scripts/hans_bench.py --sets photos32 --kinds tag blur --rates 0.2 --seeds 0 1 isolate.per_class=3

Kinds of artifacts x rates x seeds x sets of images, with two control arms: nothing planted (any verdict is a false one)
and the artifact in all classes alike (it says nothing about any). Each cell is a run of `spray` in a folder of its
own, with a model trained on clean data as its ceiling; cells that are done are passed over, a study that was stopped
goes on where it was, in the middle of a run too. `--list` names the cells. Overrides of `spray` are for all cells.

A miss is a miss only where the model relies on its artifact: where that costs it 5 points of accuracy, and 5 more than
it costs the ceiling, which may see worse with it, but learnt nothing from it.

In the output folder: `hans.csv`, one row for each cell, planted artifact and model (columns: `--columns`),
`summary.md` with the misses one by one, `cases.md` with a line for each model, and figures. Exit code 1 if a cell
failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hans_cases
import hans_cells
import hans_reliance
import hans_rows
import hans_tables
from hans_cells import ARMS, CLEAN_SEEDS, KINDS, METHODS, RATES, SEEDS, SETS, Cell

from spray.storage import write_text

QUICK = (
    "model.epochs=8",
    "dataset.per_class=200",
    "correction.epochs=3",
    "isolate.n_tested=200",
    "isolate.per_class=1",
    "isolate.latent=1",
)
QUICK_CELLS = (Cell("photos32", 0, "planted", "tag", 0.2), Cell("photos32", 0))
QUICK_METHODS = ("a_clarc",)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the cells that are asked for; write table, summary and figures."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Wherever they stand: behind `--seeds 0 1`, say, they are no seeds.
    overrides = [each for each in given if "=" in each and not each.startswith("-")]
    options = _parser().parse_args([each for each in given if each not in overrides])
    if options.columns:
        print("\n".join(f"{name}: {meaning}" for name, meaning in hans_rows.COLUMNS.items()))
        return 0
    methods = QUICK_METHODS if options.quick else options.methods
    more = [*(QUICK if options.quick else ()), *overrides]
    wanted = _cells(options)
    if options.list:
        print("\n".join(cell.name for cell in wanted))
        return 0
    records: dict[str, dict[str, Any]] = {}

    def one(cell: Cell) -> None:
        given = (cell, options.out, methods, more)
        try:
            known = hans_reliance.idle(*given) if options.relying and cell.arm == "planted" else None
            record = known or hans_cells.make(*given)
        except Exception as error:
            # Whatever it is, it is told, and the other cells go on.
            record = {"error": _why(error)}
        records[cell.name] = record
        said = record.get("error") or f"{record['seconds']:.0f} s"
        print(f"{len(records)}/{len(wanted)} {cell.name}: {said}", file=sys.stderr, flush=True)

    try:
        with ThreadPoolExecutor(options.jobs) as pool:
            try:
                for future in [pool.submit(one, cell) for cell in wanted]:
                    future.result()
                    report([cell for cell in wanted if cell.name in records], records, options.out)
            except BaseException:
                # Without this the pool would make all other cells before it lets the study end.
                pool.shutdown(cancel_futures=True)
                raise
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print((options.out / "summary.md").read_text())
    return 1 if any("error" in record for record in records.values()) else 0


def report(cells: Sequence[Cell], records: dict[str, dict[str, Any]], out: Path) -> None:
    """Write `hans.csv`, `summary.md`, `cases.md` and the figures, of the cells that are done.

    A cell whose files give no rows is a failed one; its record says so from then on.
    """
    rows: list[dict[str, Any]] = []
    for cell in cells:
        if "error" not in records[cell.name]:
            try:
                rows += hans_rows.rows_of(records[cell.name], out)
            except Exception as error:
                records[cell.name] = {"error": _why(error)}
    failed = [(cell.name, records[cell.name]["error"]) for cell in cells if "error" in records[cell.name]]
    hans_rows.write_table(out / "hans.csv", rows)
    write_text(out / "summary.md", hans_tables.summary(rows, failed))
    write_text(out / "cases.md", hans_cases.text(rows))
    if rows:
        import hans_plots

        hans_plots.draw(rows, out)


def _why(error: Exception) -> str:
    """Return one line that says what went wrong in a cell."""
    said = " ".join(str(error).split())
    return said if isinstance(error, hans_cells.CellError) else f"{type(error).__name__}: {said}"


def _cells(options: argparse.Namespace) -> list[Cell]:
    if options.quick:
        return list(QUICK_CELLS)
    found = hans_cells.cells(
        options.sets, options.kinds, options.rates, options.seeds, options.clean_seeds, options.arms
    )
    return [cell for cell in found if not options.only or cell.name in options.only][: options.most]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/hans"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each")
    parser.add_argument("--sets", nargs="+", choices=tuple(SETS), default=list(SETS))
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS))
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--clean-seeds", nargs="+", type=int, default=list(CLEAN_SEEDS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="corrections; fine_tuned is always made")
    parser.add_argument("--relying", action="store_true", help="end a cell once its model doesn't rely on its artifact")
    parser.add_argument("--only", nargs="+", help="names of cells")
    parser.add_argument("--most", type=int, help="at most so many cells")
    parser.add_argument("--quick", action="store_true", help="one planted and one clean cell, small")
    parser.add_argument("--list", action="store_true", help="name the cells and stop")
    parser.add_argument("--columns", action="store_true", help="tell what the columns of hans.csv mean and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
