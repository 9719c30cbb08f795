"""Pictures of relevance: heatmaps, overlays, galleries and their PNG encoding, as functions on arrays."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import numpy as np

# ColorBrewer's 11-class RdBu, reversed: blue is negative, white is zero, red is positive.
# Its two ends stay apart for every common kind of colour blindness.
_DIVERGING = np.array(
    [
        (5, 48, 97),
        (33, 102, 172),
        (67, 147, 195),
        (146, 197, 222),
        (209, 229, 240),
        (255, 255, 255),
        (253, 219, 199),
        (244, 165, 130),
        (214, 96, 77),
        (178, 24, 43),
        (103, 0, 31),
    ],
    dtype=np.float64,
)
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
_VISIBLE = 96  # pixels: smaller pictures are enlarged at least to this
_GAP = 4
_MARGIN = 14
_CAPTION = 20


def relevance_map(relevance: np.ndarray) -> np.ndarray:
    """Return the relevance of each pixel, its channels summed.

    Parameters
    ----------
    relevance : ndarray, shape (H, W) or (C, H, W)

    Returns
    -------
    ndarray of float64, shape (H, W)

    Raises
    ------
    ValueError
        If `relevance` has neither two nor three axes.
    """
    relevance = np.asarray(relevance, dtype=np.float64)
    if relevance.ndim == 3:
        return relevance.sum(axis=0)
    if relevance.ndim != 2:
        raise ValueError(f"relevance must have shape (H, W) or (C, H, W), not {relevance.shape}")
    return relevance


def fitted(relevance: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Bring heatmaps that were stored smaller to the size of their images, by bilinear interpolation.

    What a pixel gets is the relevance of its surroundings, not a share of it: the sum is not conserved. That
    serves for looking at a map and for weighting pixels with it.

    Parameters
    ----------
    relevance : ndarray of float, shape (..., h, w)
    size : sequence of int
        Height and width of the images.

    Returns
    -------
    ndarray of float, shape (..., height, width)
        The same array if it has that size already.
    """
    for axis, length in ((-2, int(size[0])), (-1, int(size[1]))):
        have = relevance.shape[axis]
        if have == length:
            continue
        # Where the centres of the new pixels lie among those of the old ones; beyond the last one, at the last one.
        place = ((np.arange(length) + 0.5) * have / length - 0.5).clip(0, have - 1)
        low = np.floor(place).astype(int)
        share = np.asarray(place - low, dtype=relevance.dtype)
        share = share[:, None] if axis == -2 else share
        before, after = relevance.take(low, axis), relevance.take(np.minimum(low + 1, have - 1), axis)
        relevance = before + share * (after - before)
    return relevance


def shared_limit(relevances: Sequence[np.ndarray] | np.ndarray, quantile: float = 0.995) -> float:
    """Return one limit that makes several heatmaps comparable: a quantile of |R| over all their pixels.

    The quantile keeps a single hot pixel from washing out every other map.
    """
    maps = [np.abs(relevance_map(relevance)).ravel() for relevance in relevances]
    return float(np.quantile(np.concatenate(maps), quantile)) if maps else 0.0


def heatmap_rgb(relevance: np.ndarray, limit: float | None = None) -> np.ndarray:
    """Return relevance as colours: blue for negative, white for zero, red for positive.

    Parameters
    ----------
    relevance : ndarray, shape (H, W) or (C, H, W)
        Channels are summed.
    limit : float, optional
        The relevance shown as full red, its negative as full blue; what lies beyond is clipped. By default
        the map's own largest |R|.

    Returns
    -------
    ndarray of uint8, shape (H, W, 3)
    """
    share = _share_of_limit(relevance, limit)
    stops = np.linspace(-1.0, 1.0, len(_DIVERGING))
    channels = [np.interp(share, stops, _DIVERGING[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def overlay(image: np.ndarray, relevance: np.ndarray, limit: float | None = None) -> np.ndarray:
    """Return the image in grey with its relevance laid over it, the more opaque the larger |R|.

    Parameters
    ----------
    image : ndarray, shape (C, H, W)
        C is 1 or 3, values in [0, 1].
    relevance : ndarray, shape (H, W) or (C, H, W)
        Of the image's height and width.
    limit : float, optional
        As for `heatmap_rgb`.

    Returns
    -------
    ndarray of uint8, shape (H, W, 3)

    Raises
    ------
    ValueError
        If image and relevance differ in size.
    """
    pixels = image_rgb(image)
    share = _share_of_limit(relevance, limit)
    if pixels.shape[:2] != share.shape:
        raise ValueError(f"image is {pixels.shape[:2]} pixels, relevance {share.shape}: they must agree")
    # A lifted black point keeps dark images readable under dark reds and blues.
    grey = 40.0 + (pixels @ _LUMA)[..., None] * (215.0 / 255.0)
    colour = np.where(share[..., None] >= 0, _DIVERGING[-2], _DIVERGING[1])
    opacity = 0.9 * np.abs(share)[..., None]
    return np.rint(grey * (1.0 - opacity) + colour * opacity).astype(np.uint8)


def image_rgb(image: np.ndarray) -> np.ndarray:
    """Return an image (C, H, W) in [0, 1], grey or RGB, as uint8 (H, W, 3); grey is repeated."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"image must have shape (1, H, W) or (3, H, W), not {image.shape}")
    pixels = np.rint(np.clip(image.astype(np.float64), 0.0, 1.0) * 255.0).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(pixels.transpose(1, 2, 0), (*pixels.shape[1:], 3)))


def enlarge(pixels: np.ndarray, smallest: int = _VISIBLE) -> np.ndarray:
    """Repeat the pixels of an (H, W, C) array so that its shorter side has at least `smallest` of them."""
    factor = max(1, -(-smallest // min(pixels.shape[:2])))
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def triptych(image: np.ndarray, relevance: np.ndarray, limit: float | None = None) -> np.ndarray:
    """Return image, heatmap and overlay side by side, at the image's own size: uint8 (H, 3 W, 3)."""
    return np.concatenate([image_rgb(image), heatmap_rgb(relevance, limit), overlay(image, relevance, limit)], axis=1)


def gallery(
    images: np.ndarray,
    relevances: np.ndarray,
    captions: Sequence[str],
    columns: int = 2,
    limit: float | None = None,
) -> np.ndarray:
    """Return a sheet of samples, each as image, heatmap and overlay over its caption.

    Parameters
    ----------
    images : ndarray, shape (n, C, H, W)
        Grey or RGB, values in [0, 1].
    relevances : ndarray, shape (n, H, W) or (n, C, H, W)
    captions : sequence of str
        One for each sample; shortened where too long for its place.
    columns : int
        Samples side by side.
    limit : float, optional
        One limit for all the heatmaps (see `shared_limit`); by default each map's own largest |R|.

    Returns
    -------
    ndarray of uint8, shape (height, width, 3)

    Raises
    ------
    ValueError
        If there is no sample, or images, relevances and captions differ in number.
    """
    if not len(images) == len(relevances) == len(captions) or len(images) == 0:
        counts = f"{len(images)} images, {len(relevances)} relevances, {len(captions)} captions"
        raise ValueError(f"a gallery needs one relevance and one caption for each of its images, not {counts}")
    cells = [_cell(*sample, limit) for sample in zip(images, relevances, captions, strict=True)]
    height, width = cells[0].shape[:2]
    columns = max(1, min(columns, len(cells)))
    rows = -(-len(cells) // columns)
    shape = (_MARGIN + rows * (height + _MARGIN), _MARGIN + columns * (width + _MARGIN), 3)
    sheet = np.full(shape, 255, dtype=np.uint8)
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        top, left = _MARGIN + row * (height + _MARGIN), _MARGIN + column * (width + _MARGIN)
        sheet[top : top + height, left : left + width] = cell
    return sheet


def to_png(array: np.ndarray) -> bytes:
    """Encode a picture as PNG.

    Parameters
    ----------
    array : ndarray, shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)
        Grey, RGB or RGBA; uint8, or float in [0, 1] (clipped).

    Raises
    ------
    ValueError
        If the array has another shape.
    """
    from PIL import Image

    array = np.asarray(array)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise ValueError(f"a picture must have shape (H, W), (H, W, 3) or (H, W, 4), not {array.shape}")
    if array.dtype != np.uint8:
        array = np.rint(np.clip(array.astype(np.float64), 0.0, 1.0) * 255.0).astype(np.uint8)
    buffer = BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, format="PNG")
    return buffer.getvalue()


def _share_of_limit(relevance: np.ndarray, limit: float | None) -> np.ndarray:
    """Return R / limit, clipped to [-1, 1]; zero everywhere if the limit is zero."""
    relevance = relevance_map(relevance)
    if limit is None:
        limit = float(np.abs(relevance).max(initial=0.0))
    if limit < 0:
        raise ValueError(f"limit must not be negative, but is {limit}")
    if limit == 0:
        return np.zeros_like(relevance)
    return np.clip(relevance / limit, -1.0, 1.0)


def _cell(image: np.ndarray, relevance: np.ndarray, caption: str, limit: float | None) -> np.ndarray:
    """Return one sample's enlarged image, heatmap and overlay with the caption below."""
    pictures = [image_rgb(image), heatmap_rgb(relevance, limit), overlay(image, relevance, limit)]
    large = [enlarge(picture) for picture in pictures]
    gap = np.full((large[0].shape[0], _GAP, 3), 255, dtype=np.uint8)
    strip = np.concatenate([large[0], gap, large[1], gap, large[2]], axis=1)
    return np.concatenate([strip, _text(caption, strip.shape[1])], axis=0)


def _text(text: str, width: int) -> np.ndarray:
    """Return one line of text as uint8 (20, width, 3), shortened with an ellipsis where it is too long."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=12)
    text = " ".join(text.split())
    if font.getlength(text) > width:
        while text and font.getlength(text + "…") > width:
            text = text[:-1]
        text += "…"
    line = Image.new("RGB", (width, _CAPTION), "white")
    ImageDraw.Draw(line).text((0, 4), text, fill=(70, 70, 70), font=font)
    return np.asarray(line)
