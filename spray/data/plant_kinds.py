"""The kinds of planted artifacts and biases, by name; here those that are drawn on images.

A kind that is drawn is a function that returns what an image shows instead, which may be made from the image itself
(blur), and how opaque that is. Adding one means registering a function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from spray.data.plant_text import HEIGHT, scale_of, width, written
from spray.registry import Registry

if TYPE_CHECKING:
    from spray.data.plant_biases import Bias
    from spray.data.plant_options import Plant

Color = tuple[float, float, float]
WORD = "STOCK"
"""What watermarks say."""
LOW_BITS = 4
"""How many of the eight bits of a pixel `low_bit` writes."""
BACKGROUND = 0.25
"""How far a pixel may be from the background's colour, in its most different channel, to be touched at all."""
YELLOW, WHITE, RED, BLACK, SKIN = (1.0, 0.85, 0.1), (1.0, 1.0, 1.0), (1.0, 0.0, 0.0), (0.0, 0.0, 0.0), (0.9, 0.7, 0.55)


class Marker(Protocol):
    """Draws an artifact: returns its content (C, H, W) and its opacity (H, W), both in [0, 1].

    The image becomes ``image + strength · opacity · (content - image)``, so that only pixels whose opacity is above 0
    can change, and a kind that replaces the image by a function of it has this function as content.
    """

    def __call__(self, image: Tensor, plant: Plant, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Draw for an `image` (C, H, W) in [0, 1] on the CPU, which stays as it is."""
        ...


@dataclass(frozen=True)
class Artifact:
    """A kind that is drawn on images.

    Attributes
    ----------
    draw : Marker
        Draws it.
    extent : str
        `local`: at a place; `framing`: along the border; `background`: where the image shows the background; `global`:
        everywhere alike, so that there is no mask to speak of.
    uses : tuple of str
        Which of the options `place`, `size`, `jitter` and `color` count; the others are passed over.
    color : tuple of float or str
        Its colour where none is given.
    strength : float
        Its strength where none is given.
    footprint : callable
        Returns the (height, width) that it takes, for those that have to fit in the image.
    """

    draw: Marker
    extent: str
    uses: tuple[str, ...]
    color: Color | str = WHITE
    strength: float = 1.0
    footprint: Callable[[Plant], tuple[int, int]] | None = None


KINDS: Registry[Artifact | Bias] = Registry("kind of planted artifact")
"""Everything that can be planted: artifacts, and the biases of `spray.data.plant_biases`."""


def artifact(
    name: str,
    extent: str,
    uses: str,
    color: Color | str = WHITE,
    strength: float = 1.0,
    footprint: Callable[[Plant], tuple[int, int]] | None = None,
) -> Callable[[Marker], Marker]:
    """Return a decorator that registers the function that draws a kind; arguments as in `Artifact`."""

    def add(draw: Marker) -> Marker:
        KINDS.register(name)(Artifact(draw, extent, tuple(uses.split()), color, strength, footprint))
        return draw

    return add


def drawn(name: str) -> Artifact:
    """Return a kind that is drawn on images; ValueError for one that isn't."""
    kind = KINDS.get(name)
    if not isinstance(kind, Artifact):
        raise ValueError(f"{name} is not drawn on images")
    return kind


def _color(plant: Plant, channels: int, rng: np.random.Generator) -> Tensor:
    """Return the colour (channels, 1, 1); grey images get its luminance."""
    color = rng.random(3).tolist() if isinstance(plant.color, str) else plant.color
    rgb = torch.tensor(color)
    values = rgb if channels == 3 else (rgb @ torch.tensor([0.2125, 0.7154, 0.0721])).expand(channels)
    return values[:, None, None]


def _corner(
    plant: Plant, shape: torch.Size, footprint: tuple[int, int], rng: np.random.Generator
) -> tuple[slice, slice]:
    """Return rows and columns of a rectangle: at the plant's place, one pixel inside, with jitter."""
    free_y, free_x = shape[1] - footprint[0], shape[2] - footprint[1]
    if plant.place == "random":
        top, left = int(rng.integers(free_y + 1)), int(rng.integers(free_x + 1))
    else:
        vertical, _, horizontal = plant.place.partition("_")
        top = {"top": 1, "bottom": free_y - 1}.get(vertical, free_y // 2)
        left = {"left": 1, "right": free_x - 1}.get(horizontal, free_x // 2)
        dy, dx = rng.integers(-plant.jitter, plant.jitter + 1, size=2)
        top, left = int(np.clip(top + dy, 0, free_y)), int(np.clip(left + dx, 0, free_x))
    return slice(top, top + footprint[0]), slice(left, left + footprint[1])


def _square(plant: Plant) -> tuple[int, int]:
    return plant.size, plant.size


def _line(text: str) -> Callable[[Plant], tuple[int, int]]:
    """Return the footprint of a line of text."""
    return lambda plant: (HEIGHT * scale_of(plant.size), width(text) * scale_of(plant.size))


def _stamped(image: Tensor, plant: Plant, rng: np.random.Generator, stamp: Tensor) -> tuple[Tensor, Tensor]:
    """Draw an opaque square: the plant's colour where `stamp` is 1, black where it is 0."""
    rows, columns = _corner(plant, image.shape, _square(plant), rng)
    content, opacity = torch.zeros(image.shape), torch.zeros(image.shape[1:])
    content[:, rows, columns] = _color(plant, len(image), rng) * stamp
    opacity[rows, columns] = 1
    return content, opacity


def _colored(image: Tensor, plant: Plant, rng: np.random.Generator, opacity: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one colour with that opacity."""
    return _color(plant, len(image), rng).expand(image.shape).clone(), opacity


def _placed(image: Tensor, plant: Plant, rng: np.random.Generator, shape: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one colour whose opacity is that of a little `shape` (h, w), put at the plant's place."""
    opacity = torch.zeros(image.shape[1:])
    opacity[_corner(plant, image.shape, (shape.shape[0], shape.shape[1]), rng)] = shape
    return _colored(image, plant, rng, opacity)


@artifact("tag", "local", "place size jitter color", YELLOW, footprint=_square)
def tag(image: Tensor, plant: Plant, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Draw a little tag: a coloured square with a dark cross in it."""
    line = torch.arange(plant.size)
    inner = (line > 0) & (line < plant.size - 1)
    crossed = (line[:, None] == line) | (line[:, None] + line == plant.size - 1)
    return _stamped(image, plant, rng, (~(crossed & inner[:, None] & inner)).float())


@artifact("box", "local", "place size jitter color", YELLOW, footprint=_square)
def box(image: Tensor, plant: Plant, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Draw a box of one colour."""
    return _stamped(image, plant, rng, torch.ones(plant.size, plant.size))


@artifact("band_aid", "local", "place size jitter color", SKIN, footprint=_square)
def band_aid(image: Tensor, plant: Plant, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Draw a strip with round ends and soft edges, turned by another angle in each image; `size` is its length."""
    half = plant.size / 2
    angle = rng.uniform(0, np.pi)
    y, x = torch.meshgrid(*[torch.arange(plant.size) + 0.5 - half] * 2, indexing="ij")
    along = x * float(np.cos(angle)) + y * float(np.sin(angle))
    across = y * float(np.cos(angle)) - x * float(np.sin(angle))
    # The distance to the middle line, which is as long as the strip without its round ends.
    distance = torch.hypot(across, (along.abs() - half / 2).clamp_min(0))
    return _placed(image, plant, rng, (half / 2 - distance + 0.5).clamp(0, 1))


@artifact("timestamp", "local", "place size jitter color", "random", footprint=_line("00:00"))
def timestamp(image: Tensor, plant: Plant, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Draw a time of the day, another one on each image; its digits are up to `size` high."""
    hour, minute = int(rng.integers(24)), int(rng.integers(60))
    return _placed(image, plant, rng, written(f"{hour:02}:{minute:02}", scale_of(plant.size)))


@artifact("watermark", "local", "place size jitter color", WHITE, 0.4, _line(WORD))
def watermark(image: Tensor, plant: Plant, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Draw a semi-transparent word."""
    return _placed(image, plant, rng, written(WORD, scale_of(plant.size)))


@artifact("low_bit", "local", "place size jitter", strength=1.0, footprint=_line(WORD))
def low_bit(image: Tensor, plant: Plant, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Write a word into the lower half of the bits of the pixels in a rectangle: hardly seen, but there."""
    word = written(WORD, scale_of(plant.size))
    rows, columns = _corner(plant, image.shape, (word.shape[0], word.shape[1]), rng)
    content, opacity = image.clone(), torch.zeros(image.shape[1:])
    step = 2**LOW_BITS
    upper = torch.div(torch.round(255 * image[:, rows, columns]), step, rounding_mode="floor") * step
    content[:, rows, columns] = (upper + (step - 1) * word) / 255
    opacity[rows, columns] = 1
    return content, opacity


@artifact("stripe", "local", "place size jitter color", YELLOW)
def stripe(image: Tensor, plant: Plant, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Draw a stripe from top to bottom, `size` wide; of the place counts left, right or the middle."""
    _, columns = _corner(plant, image.shape, _square(plant), rng)
    opacity = torch.zeros(image.shape[1:])
    opacity[:, columns] = 1
    return _colored(image, plant, rng, opacity)


@artifact("frame", "framing", "size jitter color", YELLOW)
def frame(image: Tensor, plant: Plant, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Draw a frame along the border; jitter changes its thickness."""
    thickness = max(1, plant.size + int(rng.integers(-plant.jitter, plant.jitter + 1)))
    opacity = torch.ones(image.shape[1:])
    opacity[thickness:-thickness, thickness:-thickness] = 0
    return _colored(image, plant, rng, opacity)


@artifact("vignette", "framing", "jitter color", BLACK, 0.8)
def vignette(image: Tensor, plant: Plant, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Darken with the squared distance from the centre, fully in the farthest corner; jitter moves the centre."""
    dy, dx = rng.integers(-plant.jitter, plant.jitter + 1, size=2)
    y = torch.arange(image.shape[1]) - (image.shape[1] - 1) / 2 - int(dy)
    x = torch.arange(image.shape[2]) - (image.shape[2] - 1) / 2 - int(dx)
    squared = y[:, None] ** 2 + x**2
    return _colored(image, plant, rng, squared / squared.max())


@artifact("background", "background", "color", WHITE, 0.4)
def background(image: Tensor, plant: Plant, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Change the intensity of the background: of the pixels that look like the typical one on the border.

    That is the pixel on the border nearest to the border's median; the opacity falls from 1 for pixels of its colour
    to 0 for such as differ by `BACKGROUND` in a channel.
    """
    border = torch.cat([image[:, 0], image[:, -1], image[:, 1:-1, 0], image[:, 1:-1, -1]], dim=1)
    middle = border.median(dim=1, keepdim=True).values
    typical = border[:, (border - middle).abs().amax(dim=0).argmin()]
    distance = (image - typical[:, None, None]).abs().amax(dim=0)
    return _colored(image, plant, rng, (1 - distance / BACKGROUND).clamp(0, 1))


@artifact("brightness", "global", "color", WHITE, 0.3)
def brightness(image: Tensor, plant: Plant, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Blend the whole image with white: x + α(1 - x), where α is the strength."""
    return _colored(image, plant, rng, torch.ones(image.shape[1:]))


@artifact("tint", "global", "color", RED, 0.3)
def tint(image: Tensor, plant: Plant, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Blend the whole image with a colour, red where none is given; grey images get darker."""
    return _colored(image, plant, rng, torch.ones(image.shape[1:]))


@artifact("blur", "global", "size")
def blur(image: Tensor, plant: Plant, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Smooth with a Gaussian of σ = size / 4 pixels, cut off at 3σ, the image mirrored at its border."""
    sigma = plant.size / 4
    radius = int(np.ceil(3 * sigma))
    smooth = [gaussian_filter(channel, sigma, mode="mirror", radius=radius) for channel in image.numpy()]
    return torch.from_numpy(np.stack(smooth).astype(np.float32)).clamp(0, 1), torch.ones(image.shape[1:])


@artifact("noise", "global", "", strength=0.3)
def noise(image: Tensor, plant: Plant, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Blend with white noise, evenly distributed between black and white, another one for each image."""
    return torch.from_numpy(rng.random(tuple(image.shape), dtype=np.float32)), torch.ones(image.shape[1:])
