"""A font of three by five pixels, for artifacts that are text on images of any size."""

from __future__ import annotations

import torch
from torch import Tensor

HEIGHT = 5
"""Pixels of a line of text at scale 1."""

# Rows from top to bottom, most significant bit on the left.
_GLYPHS = {
    "0": (7, 5, 5, 5, 7),
    "1": (2, 6, 2, 2, 7),
    "2": (7, 1, 7, 4, 7),
    "3": (7, 1, 7, 1, 7),
    "4": (5, 5, 7, 1, 1),
    "5": (7, 4, 7, 1, 7),
    "6": (7, 4, 7, 5, 7),
    "7": (7, 1, 1, 2, 2),
    "8": (7, 5, 7, 5, 7),
    "9": (7, 5, 7, 1, 7),
    "C": (7, 4, 4, 4, 7),
    "K": (5, 5, 6, 5, 5),
    "O": (7, 5, 5, 5, 7),
    "S": (7, 4, 7, 1, 7),
    "T": (7, 2, 2, 2, 2),
    ":": (0, 1, 0, 1, 0),
}
_WIDTHS = {":": 1}


def width(text: str) -> int:
    """Return the pixels that a text is wide at scale 1, with one pixel between characters."""
    return sum(_WIDTHS.get(character, 3) + 1 for character in text) - 1


def scale_of(size: int) -> int:
    """Return the whole number by which the font is enlarged so that a line is at most `size` high, at least 1."""
    return max(1, size // HEIGHT)


def written(text: str, scale: int) -> Tensor:
    """Return a text as pixels: float (5 scale, width scale), 1 where there is ink.

    Parameters
    ----------
    text : str
        Digits, the colon and the letters of STOCK.
    scale : int
        Side of the squares that stand for a pixel of the font.
    """
    columns: list[list[int]] = []
    for character in text:
        wide = _WIDTHS.get(character, 3)
        columns += [[row >> bit & 1 for row in _GLYPHS[character]] for bit in reversed(range(wide))]
        columns.append([0] * HEIGHT)
    ink = torch.tensor(columns[:-1], dtype=torch.float32).T
    return ink.repeat_interleave(scale, dim=0).repeat_interleave(scale, dim=1)
