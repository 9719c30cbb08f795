"""The second stage: the relevance of every training sample's pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from spray.errors import UserError
from spray.pipelines.context import Context
from spray.pipelines.stage import Stage
from spray.pipelines.validate import find_target
from spray.storage import hdf5_writer
from spray.training import batches


def run(context: Context) -> dict[str, Any]:
    """Write `attributions.h5`; row i is training sample i."""
    options = context.config.attribution
    dataset, model = context.train, context.model
    n, shape = len(dataset), dataset.image_shape
    empty = 0
    with hdf5_writer(context.run_dir / "attributions.h5") as file:
        relevances = file.create_dataset("attribution", (n, *shape), options.dtype, chunks=(1, *shape), fletcher32=True)
        predictions = file.create_dataset("prediction", (n, len(dataset.classes)), "float32")
        file["label"] = np.asarray(dataset.labels, dtype=np.int64)
        parts = list(batches(n, options.batch_size))
        for part in context.progress(parts, len(parts), "heatmap batches"):
            x = context.normalizer(dataset.batch(part), context.device)
            with torch.inference_mode():
                logits = model(x)
            relevance = context.explain(model, x, _target(context, part, logits))
            _check(relevance, dataset.names, part)
            empty += int((relevance.flatten(1).abs().amax(dim=1) == 0).sum())
            relevances[part[0] : part[-1] + 1] = relevance.cpu().numpy().astype(options.dtype)
            predictions[part[0] : part[-1] + 1] = logits.float().cpu().numpy()
        for name in ("method", "composite", "target"):
            file.attrs[name] = str(getattr(options, name))
        if empty == n:
            raise UserError("every heatmap is zero: the model does not respond to its input; check its weights")
    if empty:
        context.log.warning("%d of %d heatmaps are zero; they are left out of the clusters", empty, n)
    return {"samples": n, "empty_heatmaps": empty}


def _target(context: Context, part: np.ndarray, logits: Tensor) -> int | Tensor:
    target = find_target(context.config.attribution.target, logits.shape[1])
    if target == "label":
        return torch.from_numpy(np.asarray(context.train.labels)[part]).to(logits.device)
    return logits.argmax(dim=1) if isinstance(target, str) else target


def _check(relevance: Tensor, names: Any, part: np.ndarray) -> None:
    good = torch.isfinite(relevance.flatten(1)).all(dim=1)
    if not good.all():
        first = int(part[int((~good).nonzero()[0])])
        raise UserError(f"the relevance of sample {first} ({names[first]}) is not finite; try attribution=epsilon")


STAGE = Stage(
    name="attribute",
    needs=("train",),
    settings=(
        "attribution.method",
        "attribution.composite",
        "attribution.options",
        "attribution.layer",
        "attribution.target",
        "attribution.dtype",
    ),
    outputs=("attributions.h5",),
    run=run,
)
