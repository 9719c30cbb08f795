"""Explains batches of a dataset; samples that can't be explained are found, noted and passed over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from spray.bulk.batch_size import forget, is_out_of_memory
from spray.bulk.keeping import Keeping, kept_arrays
from spray.data.base import ImageDataset
from spray.errors import UserError

Attribute = Callable[[Tensor, np.ndarray], tuple[Mapping[str, Tensor], Tensor]]
"""Pixels (n, C, H, W) in [0, 1] on the CPU and the samples' indices to relevance by layer ("" the input) and logits."""

PROOF = 32
"""If so many samples fail and none has gone well, it isn't the samples."""


@dataclass
class Rows:
    """What is stored of consecutive samples.

    Attributes
    ----------
    indices : ndarray of int
        The samples.
    arrays : dict of str to Tensor
        By name; on the CPU, or on their way there until `wait` returns. Rows of samples in `quarantined` are zero.
    quarantined : dict of int to str
        Why a sample could not be explained.
    """

    indices: np.ndarray
    arrays: dict[str, Tensor]
    quarantined: dict[int, str] = field(default_factory=dict)
    arrived: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Return when all arrays are on the CPU."""
        if self.arrived is not None:
            self.arrived.synchronize()


class TooManyBadSamplesError(UserError):
    """More samples than configured can't be explained."""


class Explainer:
    """Turns batches of pixels into rows to be stored.

    Parameters
    ----------
    attribute : callable
        See `Attribute`.
    dataset : ImageDataset
        Where samples that fail are read again one by one; its names are for messages.
    keeping : Keeping
        What is kept of each heatmap.
    empty : mapping of str to (shape, dtype)
        Of each array's row, for samples without any.
    device : torch.device
        Where `attribute` computes.
    most_bad : int
        How many samples may fail.
    """

    def __init__(
        self,
        attribute: Attribute,
        dataset: ImageDataset,
        keeping: Keeping,
        empty: Mapping[str, tuple[tuple[int, ...], str]],
        device: torch.device,
        most_bad: int,
    ) -> None:
        self.attribute, self.dataset, self.keeping, self.empty = attribute, dataset, keeping, empty
        self.device, self.most_bad = device, most_bad
        self.good, self.bad = 0, 0
        self.limit: int | None = None
        """The most samples at once, since more did not fit into memory."""
        self.lost: float | None = None
        """Share of the first batch's relevance that the stored dtype can't hold."""

    def rows(self, indices: np.ndarray, pixels: Tensor | None) -> Rows:
        """Explain the samples at `indices`; `pixels` is None where reading them together failed.

        Raises
        ------
        TooManyBadSamplesError
            If more samples have failed than may, or all of the first ones.
        UserError
            If memory does not even hold one sample.
        """
        pieces = self._pieces(indices, pixels)
        if len(pieces) == 1:
            return self._to_host(pieces[0])
        arrays = {name: torch.cat([piece.arrays[name] for piece in pieces]) for name in self.empty}
        reasons = {index: why for piece in pieces for index, why in piece.quarantined.items()}
        return self._to_host(Rows(indices, arrays, reasons))

    def _pieces(self, indices: np.ndarray, pixels: Tensor | None) -> list[Rows]:
        n = len(indices)
        if self.limit is not None and n > self.limit:
            return self._split(indices, pixels, self.limit)
        try:
            if pixels is None:
                pixels = self.dataset.batch(indices)
            relevance, logits = self.attribute(pixels, indices)
            arrays = kept_arrays(relevance, logits, self.keeping)
            if self.lost is None:
                self.lost = self.keeping.lost(relevance[""])
        except Exception as error:
            out_of_memory = is_out_of_memory(error)
            if not out_of_memory:
                self._require_device(error)
                if n == 1:
                    return [self._quarantine(int(indices[0]), error)]
            reason = str(error)
        else:
            self.good += n
            return [Rows(indices, arrays)]
        # Outside of the handler, since a traceback holds on to the tensors that were too many.
        if out_of_memory:
            forget(self.device)
            if n == 1:
                raise UserError(
                    f"one image is too much for the memory of {self.device} ({' '.join(reason.split())[:200]}); "
                    "take a smaller dataset.image_size or another device"
                )
            self.limit = -(-n // 2)
            return self._split(indices, pixels, self.limit)
        return self._split(indices, pixels, -(-n // 2))

    def _split(self, indices: np.ndarray, pixels: Tensor | None, size: int) -> list[Rows]:
        pieces: list[Rows] = []
        for start in range(0, len(indices), size):
            part = slice(start, start + size)
            pieces += self._pieces(indices[part], None if pixels is None else pixels[part])
        return pieces

    def _quarantine(self, index: int, error: Exception) -> Rows:
        reason = " ".join(f"{'' if isinstance(error, UserError) else f'{type(error).__name__}: '}{error}".split())
        self.bad += 1
        if self.bad > self.most_bad or (self.good == 0 and self.bad >= PROOF):
            raise TooManyBadSamplesError(
                f"{self.bad} of {self.good + self.bad} samples could not be explained, the last one "
                f"{self.dataset.names[index]} (sample {index}): {reason}; mend them, or allow more with "
                "attribution.max_bad"
            )
        arrays = {
            name: torch.zeros(1, *shape, dtype=getattr(torch, dtype), device=self.device)
            for name, (shape, dtype) in self.empty.items()
        }
        return Rows(np.array([index]), arrays, {index: reason})

    def _require_device(self, error: Exception) -> None:
        """Raise the error if the device is of no use after it: then it isn't the samples that are bad."""
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
            except Exception:
                raise error from None

    def _to_host(self, rows: Rows) -> Rows:
        """Start the arrays' way to the CPU; on a GPU it isn't waited for."""
        if self.device.type != "cuda":
            return rows
        host = {}
        for name, values in rows.arrays.items():
            host[name] = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host[name].copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return Rows(rows.indices, host, rows.quarantined, arrived)
