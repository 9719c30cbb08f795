"""Pictures as data URIs, small enough that a whole page of them stays light."""

from __future__ import annotations

from base64 import b64encode
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from spray import figures

if TYPE_CHECKING:
    from PIL.Image import Image

_LARGEST = 112  # pixels: a larger gallery picture is shrunk
_PICTURE = 160  # the same for a pattern or a mask
_LOSSLESS = 64  # pixels: up to this size single pixels matter and pictures are cheap


def triptych_uri(image: np.ndarray, relevance: np.ndarray, limit: float | None) -> str:
    """Return image, heatmap and overlay side by side as a data URI; image (C, H, W), relevance (H, W)."""
    return strip_uri(figures.triptych(image, relevance, limit), max(image.shape[1:]))


def strip_uri(pixels: np.ndarray, size: int) -> str:
    """Return pictures of `size` pixels that stand side by side, uint8 (H, W, 3), as a data URI, shrunk if large."""
    from PIL import Image

    picture = Image.fromarray(pixels)
    if size <= _LOSSLESS:
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


def sprite(thumbnails: np.ndarray) -> tuple[str, int]:
    """Return thumbnails (n, h, w, 3) uint8 as one picture's data URI, and how many stand in a row of it."""
    from PIL import Image

    count, height, width = thumbnails.shape[:3]
    columns = max(1, int(np.ceil(np.sqrt(count))))
    rows = max(1, -(-count // columns))
    sheet = np.zeros((rows * columns, height, width, 3), dtype=np.uint8)
    sheet[:count] = thumbnails
    sheet = sheet.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    pixels = Image.fromarray(sheet.reshape(rows * height, columns * width, 3))
    return _webp(pixels, quality=70), columns


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
