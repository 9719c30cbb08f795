"""Writes what trackers are given: event files of TensorBoard, a database of MLflow."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from spray.data.listed import printable
from spray.pipelines.tracking import Embedded, Tracked


def write_tensorboard(tracked: Tracked, folder: Path) -> None:
    """Write event files: `run/`, with images and the embedding projector, and one folder for each model."""
    from torch.utils.tensorboard import SummaryWriter

    for group, scalars in tracked.scalars.items():
        with SummaryWriter(str(folder / _file_name(group))) as writer:
            for name, values in scalars.items():
                for step, value in enumerate(values):
                    writer.add_scalar(_tag(name), value, step)
            if group == "run":
                for name, pixels in tracked.images.items():
                    writer.add_image(_tag(name), pixels, dataformats="HWC")
                for embedded in tracked.embeddings:
                    _add_embedding(writer, embedded)


def _add_embedding(writer: Any, embedded: Embedded) -> None:
    import torch

    # The projector takes a sheet of square thumbnails.
    n, height, width = embedded.thumbnails.shape[:3]
    side = max(height, width)
    square = np.zeros((n, side, side, 3), np.uint8)
    square[:, :height, :width] = embedded.thumbnails
    writer.add_embedding(
        torch.from_numpy(np.ascontiguousarray(embedded.points, np.float32)),
        metadata=[[_cell(text) for text in row] for row in embedded.rows],
        metadata_header=["sample", "file", "cluster"],
        label_img=torch.from_numpy(square).permute(0, 3, 1, 2).float() / 255,
        tag=_file_name(embedded.name),
    )


def write_mlflow(tracked: Tracked, folder: Path) -> None:
    """Write a run with metrics, parameters, pictures and the report into `mlflow.db` and `artifacts/`.

    `mlflow ui --backend-store-uri sqlite:///FOLDER/mlflow.db` shows it. MLflow's store of plain files is no longer
    taken care of.
    """
    # Nothing is sent to anywhere.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    folder = folder.resolve()
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.create_experiment("spray", artifact_location=(folder / "artifacts").as_uri())
    run = client.create_run(experiment, run_name=folder.parent.name).info.run_id
    for name, value in tracked.settings.items():
        client.log_param(run, _key(name), str(value)[: mlflow.utils.validation.MAX_PARAM_VAL_LENGTH])
    for group, scalars in tracked.scalars.items():
        for name, values in scalars.items():
            for step, value in enumerate(values):
                client.log_metric(run, _key(f"{group}/{name}" if group != "run" else name), value, step=step)
    for name, pixels in tracked.images.items():
        client.log_image(run, pixels, "pictures/" + "/".join(_file_name(part) for part in name.split("/")) + ".png")
    for path in tracked.files:
        client.log_artifact(run, str(path))
    client.set_terminated(run)


def _tag(name: str) -> str:
    return printable(name)


def _cell(text: str) -> str:
    """Return a text for a table whose cells are parted by tabs."""
    return printable(text).replace("\\t", " ")


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.,=+-]+", "_", name).strip(".")[:80] or "_"


def _key(name: str) -> str:
    """Return a name with the characters that MLflow takes."""
    return re.sub(r"[^\w./ -]", "_", name)[:250]


WRITERS: dict[str, Callable[[Tracked, Path], None]] = {"tensorboard": write_tensorboard, "mlflow": write_mlflow}
