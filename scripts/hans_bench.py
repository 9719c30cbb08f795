"""The controlled study: artifacts planted on purpose, found, proven, corrected, each compared with the truth.

    python scripts/hans_bench.py                                   # everything
    python scripts/hans_bench.py --config-name hans_quick          # two small runs, minutes
    python scripts/hans_bench.py dataset=photos32 kind=tag,none rate=0.2 seed=0,1 'overrides=["isolate.per_class=3"]'

A multirun of Hydra over kinds of artifacts, rates, seeds and sets of images, with control arms: nothing planted
(`kind=none`: any verdict is a false one), the artifact in all classes alike (`everywhere=true`: it says nothing about
any), and the biases that are no artifact. What there is to choose from: `--cfg job`, `--info`, and hans_bench.yaml.

Each cell is a run of `spray` in a folder of its own, with a model trained on clean data as its ceiling. Cells that are
done are passed over; a study that was stopped goes on where it was, in the middle of a run too. The same command may be
started several times, on several machines with one folder: each takes cells that no other is at. On a cluster:
`hydra/launcher=submitit_slurm`.

A miss is a miss only where the model relies on its artifact: where that costs it 5 points of accuracy, and 5 more than
it costs the ceiling, which may see worse with it, but learnt nothing from it.

In the output folder, of all cells in it: `hans.csv`, one row for each cell, planted artifact and model (`columns.md`
says what its columns mean), `summary.md` with the misses one by one, `cases.md` with a line a model, and figures.
Exit code 1 if a cell failed.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import hans_cells
import hans_reliance
import hans_report
from hans_cells import BIASES, KINDS, METHODS, SETS, Cell

if TYPE_CHECKING:
    from omegaconf import DictConfig

DONE = "done before"
Set = Enum("Set", {name: name for name in SETS})
Kind = Enum("Kind", {name: name for name in ("none", *KINDS, *BIASES)})


@dataclass
class Study:
    """The options of the study; the first five name a cell."""

    dataset: Set = Set["photos32"]
    kind: Kind = Kind["tag"]
    rate: float = 0.2
    """Share of the images of a class that carry it; the biases have rates of their own."""
    seed: int = 0
    """Of images, training and planting."""
    everywhere: bool = False
    """In all classes alike."""
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    """Corrections; fine_tuned is always made."""
    relying: bool = False
    """End a cell once its model doesn't rely on its artifact."""
    overrides: list[str] = field(default_factory=list)
    """Of `spray`, for all cells."""
    out: str = "outputs/hans"
    plan: bool = False
    """Name the cells and stop."""


def main() -> int:
    """Make the cells that are asked for; write table, summary and figures."""
    import hydra
    from hydra.core.config_store import ConfigStore

    here = str(hans_cells.HERE)
    # For jobs that a launcher starts elsewhere.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    ConfigStore.instance().store("study_schema", Study)
    hans_report.Begun.out.clear()
    # A run is a process of its own: it must not go on when this one is told to stop.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        hydra.main(config_path=here, config_name="hans_bench", version_base="1.3")(job)()
    except KeyboardInterrupt:
        from spray.pipelines.sweeps import stop_local_jobs

        stop_local_jobs()
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    failed = False
    for out in hans_report.Begun.out:
        failed |= bool(hans_report.write(out))
        print((out / "summary.md").read_text())
    return int(failed)


def job(config: DictConfig) -> None:
    """Make the cell that a job's configuration names, and the tables anew."""
    from omegaconf import OmegaConf

    study = OmegaConf.to_object(config)
    assert isinstance(study, Study)
    out = Path(study.out)
    cell = hans_cells.named(study.dataset.value, study.kind.value, study.rate, study.seed, study.everywhere)
    if study.plan:
        tell(cell.name)
        return
    said = attempt(cell, study, out)
    print(f"{cell.name}: {said}", file=sys.stderr, flush=True)
    if said != DONE:
        hans_report.write(out)


@cache
def tell(name: str) -> None:
    """Print a cell's name, once; several jobs may mean the same cell, such as a clean one at several rates."""
    print(name)


def attempt(cell: Cell, study: Study, out: Path) -> str:
    """Make a cell; return what is to be said of it.

    Whatever goes wrong in it is kept for the tables, and the other cells go on.
    """
    with hans_cells.held(out / cell.name) as is_ours:
        if not is_ours:
            return "another process is at it"
        given = (cell, out, study.methods, study.overrides)
        failure = out / cell.name / hans_report.FAILURE
        try:
            if hans_cells.is_done(*given, study.relying) and not failure.exists():
                return DONE
            known = hans_reliance.idle(*given) if study.relying and cell.arm == "planted" else None
            record = known or hans_cells.make(*given)
        except Exception as error:
            return hans_report.note(failure, error)
        failure.unlink(missing_ok=True)
        return f"{record['seconds']:.0f} s"


if __name__ == "__main__":
    # Under its own name, since what is of `__main__` can't be sent to other processes by name.
    from hans_bench import main as command

    sys.exit(command())
