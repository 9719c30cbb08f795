"""Pictures as data URIs, small enough that a whole page of them stays light."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from spray import figures

if TYPE_CHECKING:
    from PIL.Image import Image

_LARGEST = 112  # pixels: a larger gallery picture is shrunk
_PICTURE = 160  # the same for a pattern or a mask
_LOSSLESS = 64  # pixels: up to this size single pixels matter and pictures are cheap
_LEVELS = ((48, 70), (40, 65), (32, 65), (32, 45), (24, 50), (24, 30), (20, 30), (16, 30), (12, 25), (8, 20))
"""Size and quality of thumbnails, from the best down."""
_TRIED = 600  # thumbnails on which sizes are estimated
_SAFETY = 0.93  # part of the budget that an estimate may take


def triptych_uri(image: np.ndarray, relevance: np.ndarray, limit: float | None, lossless: int = _LOSSLESS) -> str:
    """Return image, heatmap and overlay side by side as a data URI; image (C, H, W), relevance (H, W)."""
    return strip_uri(figures.triptych(image, relevance, limit), max(image.shape[1:]), lossless)


def strip_uri(pixels: np.ndarray, size: int, lossless: int = _LOSSLESS) -> str:
    """Return pictures of `size` pixels that stand side by side, uint8 (H, W, 3), as a data URI.

    They are shrunk if they are large, and lose a little in compression if they are larger than `lossless`.
    """
    from PIL import Image

    picture = Image.fromarray(pixels)
    if size <= lossless:
        return _uri(figures.to_png(np.asarray(picture)), "png")
    scale = min(1.0, _LARGEST / size)
    shrunk = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BOX)
    return _webp(shrunk, quality=70)


def picture_uri(pixels: np.ndarray) -> str:
    """Return a picture (H, W[, 3 or 4]) uint8 as a lossless data URI, shrunk where it is large."""
    from PIL import Image

    scale = min(1.0, _PICTURE / max(pixels.shape[:2]))
    if scale < 1.0:
        size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))
    return _uri(figures.to_png(pixels), "png")


def scale_uri() -> str:
    """Return the colour scale of the heatmaps, from -limit to +limit, as a data URI."""
    return picture_uri(figures.heatmap_rgb(np.linspace(-1.0, 1.0, 129)[None], limit=1.0))


def sprite(thumbnails: np.ndarray, size: int = 48, quality: int = 70) -> tuple[str, int, int, int]:
    """Return thumbnails as one picture.

    Parameters
    ----------
    thumbnails : ndarray of uint8, shape (n, h, w, 3)
    size : int
        Their longer side at most, in pixels; larger ones are shrunk.
    quality : int
        Of the compression, WebP's.

    Returns
    -------
    str
        The data URI.
    int
        How many stand in a row of it.
    int, int
        Width and height of one.
    """
    from PIL import Image

    count, height, width = thumbnails.shape[:3]
    scale = min(1.0, size / max(height, width))
    columns = max(1, int(np.ceil(np.sqrt(count))))
    rows = max(1, -(-count // columns))
    sheet = np.zeros((rows * columns, height, width, 3), dtype=np.uint8)
    sheet[:count] = thumbnails
    sheet = sheet.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    pixels = Image.fromarray(sheet.reshape(rows * height, columns * width, 3))
    small = (max(1, round(width * scale)), max(1, round(height * scale)))
    if scale < 1.0:
        # Each becomes a whole number of pixels, so that none bleeds into its neighbours.
        pixels = pixels.resize((columns * small[0], rows * small[1]), Image.Resampling.BOX)
    return _webp(pixels, quality=quality), columns, *small


def sprite_quality(thumbnails: Sequence[np.ndarray], budget: int) -> tuple[int, int]:
    """Return size and quality at which sprites of these classes take at most `budget` characters, if any does.

    Sizes are estimated on some of the thumbnails, so that the large sheets are encoded once.

    Parameters
    ----------
    thumbnails : sequence of ndarray of uint8, shape (n, h, w, 3)
        Of each class.
    budget : int
        Characters of all data URIs together.
    """
    total = sum(len(part) for part in thumbnails)
    each = max(1, _TRIED // max(1, len(thumbnails)))
    some = [part[np.linspace(0, len(part) - 1, min(each, len(part))).astype(int)] for part in thumbnails if len(part)]
    for size, quality in _LEVELS:
        seen = sum(len(part) for part in some)
        if sum(len(sprite(part, size, quality)[0]) for part in some) * total <= _SAFETY * budget * seen:
            return size, quality
    return _LEVELS[-1]


def thumbnail(image: np.ndarray, largest: int = 48) -> np.ndarray:
    """Return an image (C, H, W) in [0, 1] as uint8 (h, w, 3), no side longer than `largest` pixels."""
    from PIL import Image

    pixels = figures.image_rgb(image)
    scale = min(1.0, largest / max(pixels.shape[:2]))
    if scale == 1.0:
        return pixels
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))


def _webp(picture: Image, quality: int) -> str:
    buffer = BytesIO()
    picture.save(buffer, format="WEBP", quality=quality, method=4)
    return _uri(buffer.getvalue(), "webp")


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{b64encode(data).decode()}"
