"""What is kept of each heatmap: channels or their sum, full size or averaged down, in which dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from spray.errors import UserError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.float16}
"""By the name of `attribution.dtype`: how relevance is stored. HDF5 has no bfloat16."""


@dataclass(frozen=True)
class Keeping:
    """How a heatmap is made smaller before it leaves the device.

    Attributes
    ----------
    channels : {"all", "sum"}
        Whether each channel is kept or their sum.
    pool : int or None
        Maps with more rows or columns than this are averaged down to it.
    dtype : {"float32", "float16", "bfloat16"}
        How it is stored; bfloat16 is computed in that and stored as float16.
    """

    channels: str = "all"
    pool: int | None = None
    dtype: str = "float32"

    def shape(self, image_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return the shape (C, H, W) of what is kept of a heatmap of shape `image_shape`."""
        channels, height, width = image_shape
        most = self.pool or max(height, width)
        return (1 if self.channels == "sum" else channels), min(most, height), min(most, width)

    @property
    def stored(self) -> str:
        """The name of the dtype on disk."""
        return str(DTYPES[self.dtype]).removeprefix("torch.")

    def __call__(self, relevance: Tensor) -> Tensor:
        """Return what is kept of heatmaps (n, C, H, W), on their device.

        Raises
        ------
        UserError
            If the numbers are too large for the dtype.
        """
        kept = relevance.float()
        if self.channels == "sum":
            kept = kept.sum(1, keepdim=True)
        _, height, width = self.shape(tuple(relevance.shape[1:]))
        if (height, width) != tuple(relevance.shape[2:]):
            kept = nn.functional.adaptive_avg_pool2d(kept, (height, width))
        return self.converted(kept, "the heatmap")

    def lost(self, relevance: Tensor) -> float:
        """Return the share of heatmaps' absolute relevance (n, C, H, W) that the stored dtype can't hold.

        Large images spread relevance over so many pixels that most of it falls below what float16 tells from zero.
        """
        exact = replace(self, dtype="float32")(relevance).double()
        total = float(exact.abs().sum())
        return float((exact - self(relevance).double()).abs().sum()) / total if total > 0 else 0.0

    def converted(self, values: Tensor, what: str) -> Tensor:
        """Return finite values in the stored dtype."""
        stored = values.to(DTYPES[self.dtype])
        if stored.dtype != values.dtype and not bool(torch.isfinite(stored).all()):
            largest = float(values.abs().max())
            raise UserError(f"{what} has values up to {largest:.3g}, too large for {self.stored}; take float32")
        return stored


def kept_arrays(relevance: Mapping[str, Tensor], logits: Tensor, keeping: Keeping) -> dict[str, Tensor]:
    """Return what is stored of a batch by name: "attribution", "prediction" and "layer/<name>".

    Parameters
    ----------
    relevance : mapping
        That of the input (n, C, H, W) under "", and of inner layers (n, channels) under their names.
    logits : Tensor, shape (n, classes)
        The model's output.
    keeping : Keeping
        What is kept.
    """
    arrays = {"attribution": keeping(relevance[""]), "prediction": logits.float()}
    for name, layer in relevance.items():
        if name:
            arrays[f"layer/{name}"] = keeping.converted(layer.float(), f"the relevance at layer {name!r}")
    return arrays
