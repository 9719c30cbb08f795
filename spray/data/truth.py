"""What was planted, in files beside a run's results: for verification, the report and studies, never for the analysis.

`planted.json` has a row for each plant: what it is, on which class, the samples that carry it. Where an artifact is
somewhere rather than everywhere alike, `planted_masks.h5` has its opacity on each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from spray.data.base import ImageDataset
from spray.data.plant_biases import of_kind
from spray.data.plant_kinds import drawn
from spray.data.planting import PlantedTruth
from spray.storage import hdf5_writer, read_json, write_json

FILE, MASKS = "planted.json", "planted_masks.h5"
FILES = "planted*"
"""Both, as a glob."""
_AT_ONCE = 256


def write_truth(run_dir: Path, truths: Sequence[PlantedTruth], test: ImageDataset) -> None:
    """Write the truth of a run; nothing where nothing is configured to be planted.

    Parameters
    ----------
    run_dir : Path
        The run directory. Files of an earlier truth that has no successor are removed.
    truths : sequence of PlantedTruth
        As `plant_all` returned them; one at rate 0 has no samples but is written.
    test : ImageDataset
        The test images: where a kind of sample is missing in training, those of that kind are named.
    """
    for name in (FILE, MASKS):
        (run_dir / name).unlink(missing_ok=True)
    if not truths:
        return
    with_masks = [truth for truth in truths if truth.has_masks]
    if with_masks:
        with hdf5_writer(run_dir / MASKS) as file:
            for truth in with_masks:
                n, shape = len(truth.samples), test.image_shape[1:]
                masks = file.create_dataset(
                    truth.plant.name, (n, *shape), "f2", chunks=(1, *shape), compression="gzip", shuffle=True
                )
                masks.attrs["sample_index"] = truth.samples
                for start in range(0, n, _AT_ONCE):
                    masks[start : start + _AT_ONCE] = truth.masks(start, start + _AT_ONCE).numpy()
    write_json(run_dir / FILE, {"plants": [_row(truth, test) for truth in truths]})


def read_truth(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of `planted.json`, in the order of planting; none where nothing was planted."""
    path = Path(run_dir) / FILE
    return list(read_json(path)["plants"]) if path.is_file() else []


def read_masks(run_dir: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the samples (n,) that carry an artifact and its opacity on them, float16 (n, H, W).

    Parameters
    ----------
    run_dir : Path
        The run directory.
    name : str
        The row's `id`: `plant`, `plants[0]`, ...
    """
    import h5py

    with h5py.File(Path(run_dir) / MASKS, "r") as file:
        return file[name].attrs["sample_index"], file[name][:]


def _row(truth: PlantedTruth, test: ImageDataset) -> dict[str, Any]:
    plant = truth.plant
    options = {key: value for key, value in asdict(plant).items() if key not in ("kind", "rate", "target", "key")}
    row = {
        "id": plant.name,
        "kind": truth.kind,
        # None: a bias that is no artifact on images.
        "extent": drawn(plant.kind).extent if plant.is_drawn else None,
        "class_index": truth.class_index,
        "class_name": truth.class_name,
        "rate": truth.rate,
        "options": options,
        "samples": truth.samples.tolist(),
        "masks": MASKS if truth.has_masks else None,
        **truth.facts,
    }
    if truth.kind == "missing":
        row["test_samples"] = of_kind(test, plant, truth.facts).tolist()
    return row
