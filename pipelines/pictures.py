"""The pictures of an isolated artifact."""

from __future__ import annotations

import numpy as np

from spray.figures import fitted, gallery, to_png
from spray.isolation.candidate import Artifact
from spray.pipelines.context import Context
from spray.store.reading import Rows

SHOWN = 12
"""Samples in a gallery."""


def artifact_pictures(context: Context, artifact: Artifact, relevance: Rows, best: np.ndarray) -> dict[str, bytes]:
    """Return `mask.png`, `pattern.png` and `gallery.png`.

    Parameters
    ----------
    context : Context
        Of the run.
    artifact : Artifact
        What to show.
    relevance : Rows
        (N, C, h, w), of the images' size or smaller.
    best : ndarray of int
        The samples that carry it, best first; the gallery shows some of them.
    """
    mask, pattern = artifact.mask.numpy(), artifact.pattern.numpy()
    pictures = {"mask.png": to_png(mask), "pattern.png": to_png(_cut_out(pattern, mask))}
    shown = np.sort(best[:SHOWN])
    if len(shown):
        pictures["gallery.png"] = to_png(
            gallery(
                context.train.batch(shown).numpy(),
                fitted(relevance[shown].astype(np.float32), context.train.image_shape[1:]),
                [str(context.train.names[i]) for i in shown],
                columns=3,
            )
        )
    return pictures


def _cut_out(pattern: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the pattern (H, W, 4) as RGBA with the mask for its opacity."""
    color = np.repeat(pattern, 3, axis=0) if len(pattern) == 1 else pattern
    return np.concatenate([color, mask[None]]).transpose(1, 2, 0)
