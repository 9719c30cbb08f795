"""Makes the runs that `rank_bench.py` ranks: models trained with and without a planted artifact, and their heatmaps.

    python scripts/rank_cells.py --out outputs/rank --jobs 2

Each cell is a run directory of the stages `train` and `attribute`, with `cell.json`: what was planted where, and the
accuracy on clean test images and on those of the other classes with the true artifact added. It is written last, so
cells that are there already are complete and passed over. Heatmaps are stored as sums over channels, float16.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
PLACES = ("fixed", "random")
CORNERS = ("top_left", "top_right", "bottom_left", "bottom_right")
TUNING, REPORTED = (100, 0, 1, 2), (10, 11, 12)
"""Seeds: the score was built looking at the first; the tables are of the others."""
CLEAN_TUNING, CLEAN_REPORTED = (100, 101, 102, *range(7), *range(10, 18)), tuple(range(18, 26))
LAYERS = ("features.6", "classifier.0")
SETS: dict[str, tuple[str, ...]] = {
    "clothes": ("dataset.mean=[0.286]", "dataset.std=[0.353]", "model.epochs=6", "model.batch_size=64"),
    "patches": ("dataset.mean=[0.5,0.5,0.5]", "dataset.std=[0.25,0.25,0.25]", "model.epochs=10"),
    "digits": ("dataset.mean=[0.3]", "dataset.std=[0.38]", "model.epochs=12"),
}
N_CLASSES = {"clothes": 10, "patches": 8, "digits": 10}
SIZE = {"clothes": 5, "patches": 6, "digits": 3}


@dataclass(frozen=True)
class Cell:
    """One model: on which images it was trained and what was planted in them."""

    dataset: str
    seed: int
    rate: float = 0.0
    place: str = "none"

    @property
    def name(self) -> str:
        """Of the cell's folder."""
        what = "clean" if self.rate == 0 else f"{self.place}-{100 * self.rate:02.0f}"
        return f"{self.dataset}-{what}-seed{self.seed}"

    @property
    def target(self) -> int:
        """The class that the artifact is planted on: another one for every seed, rate and place."""
        step = (RATES.index(self.rate) + 3 * PLACES.index(self.place)) if self.rate else 0
        return (self.seed * 3 + 7 * step + 1) % N_CLASSES[self.dataset]

    def overrides(self, out: Path) -> list[str]:
        """Return the cell's configuration, as on the command line."""
        plant = ["dataset.plant.kind=none"]
        if self.rate:
            place = "random" if self.place == "random" else CORNERS[(self.seed + self.target) % 4]
            plant = [
                "dataset.plant.kind=tag",
                f"dataset.plant.class={self.target}",
                f"dataset.plant.rate={self.rate}",
                f"dataset.plant.place={place}",
                f"dataset.plant.size={SIZE[self.dataset]}",
                "dataset.plant.jitter=1",
                f"dataset.plant.seed={self.seed}",
            ]
        return [
            "experiment=image_folder",
            "dataset=factory",
            f"model.factory={HERE / 'rank_data.py'}:{'colored' if self.dataset == 'patches' else 'grey'}",
            f"dataset.factory={HERE / 'rank_data.py'}:{self.dataset}",
            f"dataset.options={{seed: {self.seed}}}",
            *SETS[self.dataset],
            *plant,
            "attribution.channels=sum",
            "attribution.dtype=float16",
            f"attribution.layer=[{','.join(LAYERS)}]",
            f"seed={self.seed}",
            "device=cpu",
            "compute.threads=1",
            f"run_dir={out / self.name}",
        ]


def cells(sets: list[str]) -> Iterator[Cell]:
    """Yield all cells, those to tune on first."""
    for seed in (*CLEAN_TUNING, *CLEAN_REPORTED):
        yield from (Cell(dataset, seed) for dataset in sets)
        if seed in (*TUNING, *REPORTED):
            kinds = ((rate, place) for rate in reversed(RATES) for place in PLACES)
            yield from (Cell(d, seed, rate, place) for rate, place in kinds for d in sets if d != "digits")


def context_of(cell: Cell, out: Path) -> Any:
    """Return a context for a cell: configuration, run directory, data, model."""
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    from spray.pipelines.cli import register_resolvers
    from spray.pipelines.config import register_schema, typed_config
    from spray.pipelines.context import Context

    register_resolvers()
    register_schema()
    GlobalHydra.instance().clear()
    with initialize_config_module("spray.conf", version_base="1.3"):
        config = compose("config", cell.overrides(out))
    return Context(typed_config(OmegaConf.to_container(config, resolve=True)), out / cell.name, logging.getLogger("c"))


def make(cell: Cell, out: Path) -> float:
    """Run a cell; return its seconds, 0 if it had been done."""
    import torch

    from spray.pipelines.runner import locked, run_stages
    from spray.pipelines.stages import load

    done = out / cell.name / "cell.json"
    if done.exists():
        return 0.0
    torch.set_num_threads(1)
    start = time.monotonic()
    context = context_of(cell, out)
    names = ["train", "attribute"]
    context.run_dir.mkdir(parents=True, exist_ok=True)
    with locked(context.run_dir):
        run_stages(context, names, load(names))
        record = asdict(cell) | {"target": cell.target if cell.rate else None, **_accuracies(context)}
        record["seconds"] = time.monotonic() - start
        done.with_suffix(".part").write_text(json.dumps(record, indent=1))
        done.with_suffix(".part").rename(done)
    return record["seconds"]


def _accuracies(context: Any) -> dict[str, Any]:
    """Return the accuracy on all test images, and that on the other classes' without and with the true artifact."""
    import numpy as np

    from spray.data.planting import planted_truth

    labels = context.test.labels
    right = context.predict(context.model, context.test).argmax(1).numpy() == labels
    found: dict[str, Any] = {"clean_accuracy": float(right.mean()), "samples": []}
    truth = planted_truth(context.config.dataset.plant, context.train)
    if truth is not None:
        others = np.flatnonzero(labels != truth.class_index)
        pixels, _ = truth.plant.mark(context.test.batch(others), [f"test:{i}" for i in others])
        predicted = context.predict_pixels(context.model, pixels).argmax(1).numpy()
        found |= {
            "samples": truth.samples.tolist(),
            "clean_others": float(right[others].mean()),
            "attacked_others": float((predicted == labels[others]).mean()),
            "attacked_to_class": float((predicted == truth.class_index).mean()),
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/rank"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--sets", nargs="+", choices=tuple(SETS), default=list(SETS))
    parser.add_argument("--only", nargs="+", help="names of cells")
    options = parser.parse_args()
    wanted = [cell for cell in cells(options.sets) if not options.only or cell.name in options.only]
    missing = [cell for cell in wanted if not (options.out / cell.name / "cell.json").exists()]
    print(f"{len(wanted)} cells, {len(missing)} to make", file=sys.stderr, flush=True)
    method = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=method) as pool:
        waiting = {pool.submit(make, cell, options.out): cell for cell in missing}
        for future in as_completed(waiting):
            print(f"{waiting[future].name}: {future.result():.0f} s", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
