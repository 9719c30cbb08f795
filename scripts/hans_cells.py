"""The cells of `hans_bench.py`: which runs of `spray` there are, and how one is made."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from spray.storage import write_text

HERE = Path(__file__).resolve().parent
ARMS = ("planted", "clean", "everywhere", "biased")
CORNERS = ("top_left", "top_right", "bottom_left", "bottom_right")
STAGES = "stages=[train,attribute,analyze,rank,isolate,correct,verify]"
CEILINGS = "ceilings"
"""Models trained on clean data, shared by all cells of a set and a seed."""


@dataclass(frozen=True)
class Images:
    """A set of images.

    Attributes
    ----------
    overrides : tuple of str
        Its configuration.
    n_classes, side : int
        How many classes, and how many pixels wide.
    targets : tuple of int
        Classes that artifacts are planted on: those that are hard to tell from others. What is recognized anyway needs
        no artifact, and a model hardly relies on one there.
    """

    overrides: tuple[str, ...]
    n_classes: int
    side: int
    targets: tuple[int, ...]


SETS = {
    "photos32": Images(
        ("dataset.mean=[0.5]", "dataset.std=[0.25]", "model.epochs=12", "correction.epochs=6"), 8, 32, (6, 0, 2, 3, 7)
    ),
    "photos64": Images(
        ("dataset.mean=[0.5,0.5,0.5]", "dataset.std=[0.25,0.25,0.25]", "model.epochs=10", "correction.epochs=5"),
        8,
        64,
        (6, 0, 2, 3, 7),
    ),
    "fashion": Images(
        ("dataset.mean=[0.286]", "dataset.std=[0.353]", "model.epochs=6", "correction.epochs=4"),
        10,
        28,
        (6, 0, 2, 4, 3),
    ),
}
MODELS = {"photos32": "grey", "photos64": "colored", "fashion": "grey"}
KINDS: dict[str, dict[str, Any]] = {
    "tag": {"size": 6},
    "box": {"size": 6},
    "band_aid": {"size": 9},
    "timestamp": {"size": 5},
    "watermark": {"size": 5},
    "low_bit": {"size": 5},
    "stripe": {"size": 3},
    "tag_anywhere": {"kind": "tag", "size": 6, "place": "random"},
    "frame": {"size": 2, "jitter": 0},
    "vignette": {},
    "background": {},
    "brightness": {},
    "tint": {},
    "noise": {},
    "blur": {"size": 6},
}
"""The planted kinds: options for images of 32 pixels, of which `size` grows with the images."""
BIASES: dict[str, dict[str, Any]] = {
    "corruption": {"kind": "box", "size": 2},
    "mislabel": {"class": "all"},
    "missing": {"which": "dark"},
}
"""The three biases of Hägele et al. (2020), see `spray.data.plant_biases`: a small corruption that goes with a class,
which is planted like the other kinds; wrong labels in the whole set; and a kind of sample that training never saw. The
last two are no artifact on images: a verdict is a false one there, and a correction has nothing to correct."""
BIAS_RATES = {"corruption": 0.2, "mislabel": 0.2, "missing": 0.5}
METHODS = ("a_clarc", "p_clarc", "dfr")


@dataclass(frozen=True)
class Cell:
    """One run: on which images, with what planted in them.

    Attributes
    ----------
    dataset : str
        A key of `SETS`.
    seed : int
        Of images, training and planting.
    arm : str
        `planted` on one class, `clean`, `everywhere`: equally in all classes; or `biased`: by no artifact on images.
    kind : str
        A key of `KINDS` or `BIASES`; empty where nothing is planted.
    rate : float
        Share of the images of each class that it is planted on.
    """

    dataset: str
    seed: int
    arm: str = "clean"
    kind: str = ""
    rate: float = 0.0

    @property
    def name(self) -> str:
        """Of the cell's folder."""
        what = "clean" if self.arm == "clean" else f"{self.arm}-{self.kind}-{100 * self.rate:02.0f}"
        return f"{self.dataset}-{what}-seed{self.seed}"

    @property
    def target(self) -> int:
        """The class that it is planted on: another one for every kind and seed."""
        targets = SETS[self.dataset].targets
        place = [*KINDS, *BIASES].index(self.kind) if self.kind else 0
        return targets[(2 * place + 3 * self.seed) % len(targets)]

    def plant(self) -> list[str]:
        """Return the overrides that say what is planted."""
        if self.arm == "clean":
            return ["dataset.plant.kind=none"]
        options: dict[str, Any] = {"kind": self.kind, "place": CORNERS[(self.target + self.seed) % 4], "jitter": 1}
        options |= (KINDS | BIASES)[self.kind]
        if "size" in options and self.kind not in ("timestamp", "watermark", "low_bit"):
            options["size"] = round(options["size"] * SETS[self.dataset].side / 32)
        target = "all" if self.arm == "everywhere" else options.get("class", self.target)
        options |= {"class": target, "rate": self.rate, "seed": self.seed}
        return [f"dataset.plant.{key}={value}" for key, value in options.items()]

    def overrides(self, out: Path, methods: Sequence[str] = METHODS, more: Sequence[str] = ()) -> list[str]:
        """Return the cell's configuration, as on the command line, with what is given for all cells behind it."""
        return [
            "experiment=image_folder",
            "dataset=factory",
            f"dataset.factory={HERE / 'hans_data.py'}:{self.dataset}",
            f"dataset.options={{seed: {self.seed}}}",
            "model=small_cnn",
            *SETS[self.dataset].overrides,
            f"model.factory={HERE / 'rank_data.py'}:{MODELS[self.dataset]}",
            *self.plant(),
            "attribution.channels=sum",
            "attribution.dtype=float16",
            "analysis.umap=false",
            f"correction.methods=[{','.join(methods)}]",
            "correction.learning_rate=1e-3",
            f"verify.ceiling={str(self.arm != 'clean').lower()}",
            f"seed={self.seed}",
            "device=cpu",
            "compute.threads=1",
            STAGES,
            f"run_dir={out / self.name}",
            *more,
        ]


def biased(dataset: str, seed: int, kind: str) -> Cell:
    """Return the cell of one of the `BIASES`."""
    return Cell(dataset, seed, "planted" if kind == "corruption" else "biased", kind, BIAS_RATES[kind])


def named(dataset: str, kind: str, rate: float = 0.2, seed: int = 0, everywhere: bool = False) -> Cell:
    """Return the cell of a set of images and what is planted in it: one of `KINDS`, of `BIASES`, or `none`."""
    if kind == "none":
        return Cell(dataset, seed)
    if kind in BIASES:
        return biased(dataset, seed, kind)
    return Cell(dataset, seed, "everywhere" if everywhere else "planted", kind, rate)


def order(cell: Cell) -> tuple[float, ...]:
    """Return what cells are sorted by in tables."""
    kinds = ["", *KINDS, *BIASES]
    places = list(SETS).index(cell.dataset), ARMS.index(cell.arm), kinds.index(cell.kind)
    return (*places[:2], cell.seed, -cell.rate, places[2])


class CellError(Exception):
    """A cell that could not be made; the message is one line that says why."""


@contextmanager
def held(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a cell's folder, in which no two commands can work at a time, while the block runs.

    Parameters
    ----------
    folder : Path
        It is made.
    wait : bool
        Until no other process holds it.

    Yields
    ------
    bool
        False if another holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".cell.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def is_done(cell: Cell, out: Path, methods: Sequence[str], more: Sequence[str], relying: bool) -> bool:
    """Return whether a cell was made with just this configuration; if `relying`, as far as its model relies on it.

    Raises
    ------
    CellError
        If what is kept of it can't be read.
    """
    record = read_record(out / cell.name)
    if record is None or record["overrides"] != cell.overrides(out, methods, more):
        return False
    return relying or "idle" not in record


def make(cell: Cell, out: Path, methods: Sequence[str], more: Sequence[str] = ()) -> dict[str, Any]:
    """Run a cell, whose folder is held; return what `cell.json` says from then on.

    Returns
    -------
    dict
        The cell's fields, `overrides` and `seconds`.

    Raises
    ------
    CellError
        If the run fails.
    """
    folder = out / cell.name
    overrides = cell.overrides(out, methods, more)
    shared = out / CEILINGS / f"{cell.dataset}-seed{cell.seed}"
    if shared.is_dir() and not (folder / "ceiling").exists():
        _copy(shared, folder / "ceiling", out / CEILINGS)
    start = time.monotonic()
    spray(overrides)
    record = asdict(cell) | {"overrides": overrides, "seconds": round(time.monotonic() - start, 1)}
    if (folder / "ceiling").is_dir() and not shared.exists():
        _copy(folder / "ceiling", shared, out / CEILINGS)
    write_text(folder / "cell.json", json.dumps(record, indent=1))
    return record


def spray(overrides: Sequence[str]) -> None:
    """Run `spray` in a process of one thread.

    Raises
    ------
    CellError
        If it fails, with the last line that it said.
    """
    # Not the one of the folder that the study was started in.
    command = [sys.executable, "-P", "-m", "spray.pipelines.cli", *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise CellError((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])


def _copy(source: Path, target: Path, beside: Path) -> None:
    """Copy a folder, by way of one in `beside`: a copy that is cut short must not be taken for a whole one."""
    beside.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".", dir=beside) as partial:
        whole = shutil.copytree(source, Path(partial, target.name))
        try:
            whole.rename(target)
        except OSError:
            # Another cell that ended at the same time was first; its copy is as good.
            if not target.is_dir():
                raise


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return what `cell.json` says; None where the cell was not finished.

    Raises
    ------
    CellError
        If it can't be read.
    """
    path = folder / "cell.json"
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except ValueError as error:
        raise CellError(f"{path} is damaged ({error}); remove it to make the cell again") from error
