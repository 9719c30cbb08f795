"""Export of a run as a project that ViRelAy 0.6 opens (https://github.com/virelay/virelay).

The layout is the one that ViRelAy's code reads, which its documentation describes differently.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from spray.data.base import ImageDataset
from spray.storage import replacing, write_json, write_text
from spray.store import open_attributions
from spray.store.disk import closing, new_file
from spray.store.shards import write_chunk

Progress = Callable[[Iterable[np.ndarray], int, str], Iterable[np.ndarray]]
LARGEST_COPY = 2 << 30
"""Bytes of heatmaps of one channel that are copied for ViRelAy, before compression."""


def category(class_index: int) -> str:
    """Return the name of a class' group in the analysis file, which is its id in the label map too."""
    return f"{class_index:08d}"


def can_show(image_shape: tuple[int, int, int]) -> bool:
    """Say whether ViRelAy can show images of this shape (C, H, W): grey or RGB ones."""
    return image_shape[0] in (1, 3)


def export(
    folder: Path,
    dataset: ImageDataset,
    *,
    title: str,
    model: str,
    attributions: Path | None = None,
    attribution_method: str = "lrp",
    attribution_strategy: str = "true_label",
    analysis: Path | None = None,
    analysis_method: str = "spectral",
    batch_size: int = 256,
    progress: Progress | None = None,
) -> Path:
    """Write a ViRelAy project into `folder`; it refers to the attributions and the analysis files.

    Parameters
    ----------
    folder : Path
        Gets `project.yaml`, `label-map.json` and `dataset.h5`; and, where heatmaps have one channel, of which ViRelAy
        can't draw all by themselves, `attributions.h5` with three: the relevance and zeros, unless that were
        larger than `LARGEST_COPY`.
    dataset : ImageDataset
        The samples that row i of the attributions belongs to. Grey images are repeated to three channels,
        since ViRelAy shows no others.
    title, model : str
        What ViRelAy shows as the project's and the model's name.
    attributions, analysis : Path, optional
        HDF5 files in ViRelAy's layout (see `project`); what is None is left out of the project.
    attribution_method, attribution_strategy, analysis_method : str
        How they were made. ViRelAy finds no analysis whose name has a hyphen, so that is replaced.
    batch_size : int
        Images held in memory at once.
    progress : callable, optional
        Wraps the iteration over batches: `progress(batches, total, what)`.

    Returns
    -------
    Path
        Of `project.yaml`.

    Raises
    ------
    ValueError
        If the images are neither grey nor RGB.
    """
    if not can_show(dataset.image_shape):
        raise ValueError(f"ViRelAy shows grey and RGB images, not {dataset.image_shape[0]} channels")
    folder = Path(folder)
    _write_dataset(folder / "dataset.h5", dataset, batch_size, progress)
    if attributions is not None and _has_one_channel(attributions):
        attributions = _with_three_channels(attributions, folder / "attributions.h5", batch_size)
    write_json(folder / "label-map.json", label_map(dataset.classes))
    description = project(
        title=title,
        model=model,
        dataset=title,
        attributions=_relative(attributions, folder),
        attribution_method=attribution_method,
        attribution_strategy=attribution_strategy,
        analysis=_relative(analysis, folder),
        analysis_method=analysis_method,
    )
    # Last, so that a project that can be opened is a complete one.
    write_text(folder / "project.yaml", yaml.safe_dump(description, sort_keys=False, allow_unicode=True))
    return folder / "project.yaml"


def label_map(classes: Iterable[str]) -> list[dict[str, Any]]:
    """Return ViRelAy's label map: the readable name of each category of the analysis file."""
    return [{"index": index, "word_net_id": category(index), "name": name} for index, name in enumerate(classes)]


def project(
    *,
    title: str,
    model: str,
    dataset: str,
    attributions: str | None,
    attribution_method: str,
    attribution_strategy: str,
    analysis: str | None,
    analysis_method: str,
) -> dict[str, Any]:
    """Return the contents of `project.yaml`.

    The attribution file must hold `/attribution` (N, C, H, W) with C = 1 or 3, `/label` integer (N,) and
    `/prediction` float (N, classes), and no `/index`: without it ViRelAy finds a row at once, with it by a
    search through the whole file. The analysis file must hold one group for each class, named by `category`.
    """
    contents: dict[str, Any] = {
        "name": title,
        "model": model,
        "label_map": "label-map.json",
        "dataset": {"name": dataset, "type": "hdf5", "path": "dataset.h5"},
    }
    if attributions is not None:
        contents["attributions"] = {
            "attribution_method": attribution_method,
            "attribution_strategy": attribution_strategy,
            "sources": [attributions],
        }
    if analysis is not None:
        method = analysis_method.replace("-", "_")
        contents["analyses"] = [{"analysis_method": method, "sources": [analysis]}]
    return {"project": contents}


def _write_dataset(path: Path, dataset: ImageDataset, batch_size: int, progress: Progress | None) -> None:
    """Write `/data` uint8 (N, 3, H, W) and `/label` uint16 (N,), one batch at a time."""
    total = len(dataset)
    shape = (3, *dataset.image_shape[1:])
    starts = range(0, total, batch_size)
    batches: Iterable[np.ndarray] = (np.arange(at, min(at + batch_size, total)) for at in starts)
    if progress is not None:
        batches = progress(batches, len(starts), "ViRelAy dataset")
    with replacing(path) as temporary:
        file = new_file(temporary)
        with closing(file):
            # ViRelAy reads one sample at a time, so each one is a chunk of its own.
            data = file.create_dataset("data", (total, *shape), np.uint8, chunks=(1, *shape), compression="gzip")
            for indices in batches:
                pixels = np.rint(dataset.batch(indices).numpy().clip(0.0, 1.0) * 255.0).astype(np.uint8)
                for index, image in zip(indices, np.broadcast_to(pixels, (len(indices), *shape)), strict=True):
                    write_chunk(data, int(index), 0, zlib.compress(image.tobytes(), 1))
            labels = np.asarray(dataset.labels, dtype="<u2")
            write_chunk(
                file.create_dataset("label", data.shape[:1], "<u2", chunks=data.shape[:1]), 0, 0, labels.tobytes()
            )


def _has_one_channel(attributions: Path) -> bool:
    with open_attributions(attributions) as file:
        rows = file.attribution
        return rows.shape[1] == 1 and len(rows) * rows[:1].nbytes <= LARGEST_COPY


def _with_three_channels(attributions: Path, path: Path, batch_size: int) -> Path:
    """Write heatmaps (N, 1, H, W) as (N, 3, H, W), whose sum over channels they are, with labels and logits."""
    with open_attributions(attributions) as source, replacing(path) as temporary:
        rows = source.attribution
        shape = (3, *rows.shape[2:])
        file = new_file(temporary)
        with closing(file):
            data = file.create_dataset(
                "attribution", (len(rows), *shape), rows.dtype, chunks=(1, *shape), compression="gzip"
            )
            for start in range(0, len(rows), batch_size):
                for index, heatmap in enumerate(rows[start : start + batch_size], start=start):
                    padded = np.concatenate([heatmap, np.zeros((2, *shape[1:]), rows.dtype)])
                    write_chunk(data, index, 0, zlib.compress(padded.tobytes(), 1))
            for name, values in (("label", source.label[:]), ("prediction", source.prediction[:])):
                table = file.create_dataset(name, values.shape, values.dtype, chunks=values.shape)
                write_chunk(table, 0, 0, np.ascontiguousarray(values).tobytes())
    return path


def _relative(path: Path | None, folder: Path) -> str | None:
    return None if path is None else Path(os.path.relpath(path, folder)).as_posix()
