"""Images to arrays: formats, colour modes, orientation and size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
# Pillow goes by a file's content, not its name: with these alone no other decoder ever sees the user's files.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")

ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC = 0x0112, 258, 262
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImageError(Exception):
    """Something that is no image that can be read; the message says why, without its name.

    Attributes
    ----------
    lasting : bool
        False where trying again may help: the system failed, not the image.
    """

    def __init__(self, reason: str, lasting: bool = True) -> None:
        super().__init__(reason)
        self.lasting = lasting


def decode(source: Path | bytes, size: int | None, channels: int = 3) -> np.ndarray:
    """Read an image as RGB or grey of one size.

    - The first frame of an animation, the first page of a document.
    - Turned upright as its EXIF orientation says.
    - Transparency over white.
    - Grey of 16 (12) bits: 65535 (4095) becomes 255. Floating point: [0, 1] becomes [0, 255], all else is
      refused, as are whole numbers of 32 bits: they have no known range. CMYK by Pillow's plain formula.
    - Shorter side resized to `size` with an antialiasing triangle filter, then the centre cropped: the pixels
      that torchvision's ``Resize(size)`` and ``CenterCrop(size)`` give.

    Parameters
    ----------
    source : Path or bytes
        A file, or what would be in it.
    size : int or None
        Height and width of the result; None keeps those of the image.
    channels : int, default 3
        3 for RGB, 1 for grey.

    Returns
    -------
    ndarray of uint8, shape (channels, size, size)

    Raises
    ------
    UnreadableImageError
        If the file is missing, empty, truncated, no image, or holds more pixels than Pillow deems safe.
    """
    with reasons():
        if isinstance(source, Path):
            # Opening a pipe would wait for ever.
            if not source.is_file():
                raise UnreadableImageError("no such file" if not source.exists() else "not a regular file")
            n_bytes = source.stat().st_size
        else:
            n_bytes = len(source)
        if n_bytes == 0:
            raise UnreadableImageError("the file is empty")
        with Image.open(source if isinstance(source, Path) else BytesIO(source), formats=FORMATS) as image:
            image.load()
            return decode_image(image, size, channels)


def decode_image(image: Image.Image, size: int | None, channels: int = 3) -> np.ndarray:
    """Bring an image of Pillow to the form that `decode` gives.

    Raises
    ------
    UnreadableImageError
        If its pixels have no known range. Damaged ones raise errors of many kinds; see `reasons`.
    """
    upright = _upright(_to_rgb(image), _orientation(image))
    if channels == 1:
        upright = upright.convert("L")
    pixels = np.asarray(upright if size is None else resize(upright, size))
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


@contextmanager
def reasons() -> Iterator[None]:
    """Turn every error of the block into an `UnreadableImageError` with a reason of one line."""
    try:
        yield
    except UnreadableImageError:
        raise
    except Image.UnidentifiedImageError:
        raise UnreadableImageError("not an image of a known format") from None
    # Pillow's decoders raise errors of many kinds on damaged files, SyntaxError and struct.error among them.
    except Exception as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        raise UnreadableImageError(reason or type(error).__name__, lasting=not is_of_system(error)) from None


def is_of_system(error: BaseException) -> bool:
    """Return whether the system failed, not the image."""
    # Pillow's own OSErrors have no number.
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # damaged EXIF says nothing about the pixels, which are good
        return None


def _upright(image: Image.Image, orientation: int | None) -> Image.Image:
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _eight_bits(image).convert("RGB")
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        white = Image.new("RGBA", colours.size, "white")
        return Image.alpha_composite(white, colours).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale grey of more than 8 bits to [0, 255]."""
    values = np.asarray(image).astype(np.float64)
    if image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})
        values /= 2 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1
        if tags.get(PHOTOMETRIC) == 0:  # white is zero, which Pillow heeds for 8 bits alone
            values = 1 - values
    elif image.mode == "I" and image.format == "PPM":  # Pillow scales these to 16 bits
        values /= 65535
    elif image.mode == "I":
        raise UnreadableImageError("whole-number pixels without a known range")
    # False for NaN too.
    if not (values.min() >= 0 and values.max() <= 1):
        raise UnreadableImageError("floating-point pixels outside of [0, 1]")
    return Image.fromarray(np.rint(values * 255).astype(np.uint8))


def resize(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to `size` and crop the centre, in one step that computes the crop alone."""
    shorter = min(image.size)
    box: list[float] = []
    for side in image.size:
        # torchvision's rounding, so that a model sees what it saw in training.
        resized = int(size * side / shorter)
        start = round((resized - size) / 2)
        box += [start * side / resized, (start + size) * side / resized]
    left, right, top, bottom = box
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
