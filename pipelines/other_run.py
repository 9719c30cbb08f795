"""Another run's results, which may come from anywhere: checked before anything in them is believed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from spray.data.base import ImageDataset
from spray.errors import UserError
from spray.storage import read_json, sha256
from spray.store import Attributions, open_attributions

ATTRIBUTIONS, ANALYSIS, RECORD = "attributions.h5", "analysis.h5", "run.json"
FILES = {"attribute": ATTRIBUTIONS, "analyze": ANALYSIS}
"""What is read of another run, by the stage that wrote it."""
_LONGEST = 200
"""Characters of a name in a foreign file that are kept."""


def content_hashes(folder: Path, key: str = "compare.other", stages: Sequence[str] = tuple(FILES)) -> dict[str, str]:
    """Return the SHA-256 of the files of another run that are read, those that some stages wrote.

    Parameters
    ----------
    folder : Path
        The run directory.
    key : str
        The configuration key that names it, for messages.
    stages : sequence of str
        Keys of `FILES`.

    Raises
    ------
    UserError
        If one is missing or isn't what the run's own record says, or a stage of that run isn't finished.
    """
    for stage in stages:
        if not (folder / FILES[stage]).is_file():
            raise UserError(
                f"{key}={folder} has no {FILES[stage]}; give the run_dir of a run on the same data, made with "
                f"stages=[{','.join(['train', *stages])}] or more"
            )
    try:
        hashes = {FILES[stage]: sha256(folder / FILES[stage]) for stage in stages}
    except OSError as error:
        raise UserError(f"{key}={folder} cannot be read: {error.strerror}") from error
    recorded = read_record(folder).get("stages", {})
    for stage in stages if recorded else ():
        entry, name = recorded.get(stage, {}), FILES[stage]
        if entry.get("status") != "done":
            raise UserError(f"{key}={folder}: its stage {stage} is not finished; run it there first")
        if entry.get("outputs", {}).get(name, {}).get("sha256", hashes[name]) != hashes[name]:
            raise UserError(f"{key}={folder}: {name} isn't what its stage {stage} wrote; run it there again")
    return hashes


def read_record(folder: Path) -> dict[str, Any]:
    """Return what `run.json` says of a run, empty where there is none.

    Raises
    ------
    UserError
        If it cannot be read, or isn't a run's record.
    """
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        record = read_json(path)
        for entry in (record, record["stages"], record.get("inputs", {}), *record["stages"].values()):
            dict(entry)
        for entry in record["stages"].values():
            for said in dict(entry.get("outputs", {})).values():
                dict(said)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}); run that run again") from error
    return dict(record)


@contextmanager
def open_other(folder: Path, dataset: ImageDataset, key: str = "compare.other") -> Iterator[Attributions]:
    """Open another run's heatmaps and check that they are of this dataset, sample by sample.

    Raises
    ------
    UserError
        If they are of other data, or the file is damaged or absurd.
    """
    said = read_record(folder).get("inputs", {}).get("dataset.train", dataset.fingerprint)
    if said != dataset.fingerprint:
        raise UserError(
            f"{key}={folder} was run on other training images (content {str(said)[:12]}, here "
            f"{dataset.fingerprint[:12]}); both runs need the same dataset.*, dataset.plant included"
        )
    with open_attributions(folder / ATTRIBUTIONS, shape=(len(dataset), None, None, None)) as attributions:
        index = attributions.index
        if index is not None and not np.array_equal(index, np.arange(len(dataset))):
            raise UserError(f"{attributions.path}: row i must be training sample i, but /index has another order")
        matches = _is_of_class(attributions.label[:], dataset.labels)
        if not matches.all():
            raise UserError(
                f"{attributions.path} is of other data: sample {int(matches.argmin())} has another class there; both "
                "runs need the same dataset.*"
            )
        yield attributions


def _is_of_class(found: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return whether each sample (n,) has its class in another run's labels, which may be truth values (n, classes)."""
    if found.ndim == 1:
        return np.asarray(found == labels)
    if found.ndim == 2 and found.shape[1] > labels.max():
        return np.asarray(found[np.arange(len(labels)), labels] > 0)
    return np.zeros(len(labels), dtype=bool)


def plain(text: object) -> str:
    """Return a foreign text so that any file can hold it: not endless, no lone surrogates."""
    return str(text)[:_LONGEST].encode("utf-8", "replace").decode()
