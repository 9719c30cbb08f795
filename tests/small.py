"""A small folder of real images, a small model of the user's own, and the real command on them."""

from __future__ import annotations

import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

from spray.pipelines import cli

SIDE, SOURCE_SIDE = 24, 48
TRAIN, TEST = 30, 16
"""Images of each class."""

MODEL = """\
from torch import nn

def build(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 12, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(2),
        nn.Flatten(), nn.Linear(64, num_classes),
    )

def constant(num_classes):
    model = build(num_classes)
    nn.init.zeros_(model[-1].weight)
    nn.init.zeros_(model[-1].bias)
    return model

def without_linear(num_classes):
    return nn.Sequential(nn.Conv2d(3, num_classes, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten())

class NotANumber(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.inner = build(num_classes)

    def forward(self, x):
        return self.inner(x) * float("nan")

class WithoutRule(NotANumber):
    def forward(self, x):
        return self.inner(x).cumprod(1)
"""


def photographs() -> dict[str, np.ndarray]:
    """Return photographs of scikit-image, uint8 (H, W, 3), by the name of the class that they make."""
    from skimage import data

    return {"coffee": data.coffee(), "skin": data.immunohistochemistry(), "stone": np.stack([data.gravel()] * 3, -1)}


def write_images(root: Path, train: dict[str, int], test: dict[str, int]) -> list[str]:
    """Write `root`/train and `root`/test, a folder for each class; return the options that name them.

    Test patches are cut from the right third of a photograph, training patches from the rest.
    """
    rng = np.random.default_rng(5)
    for part, sizes in (("train", train), ("test", test)):
        for name, n in sizes.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            photograph = photographs()[name]
            border = photograph.shape[1] * 2 // 3
            area = photograph[:, :border] if part == "train" else photograph[:, border:]
            for number in range(n):
                top, left = (int(rng.integers(side - SOURCE_SIDE)) for side in area.shape[:2])
                patch = area[top : top + SOURCE_SIDE, left : left + SOURCE_SIDE]
                Image.fromarray(patch).save(folder / f"{number:03d}.png")
    return [f"dataset.train={root / 'train'}", f"dataset.test={root / 'test'}"]


def write_model(folder: Path) -> Path:
    """Write the file of the user's model."""
    path = folder / "my_model.py"
    path.write_text(MODEL)
    return path


@dataclass
class Outcome:
    """What the command said and how it ended."""

    code: int
    out: str
    err: str


def run(*arguments: str) -> Outcome:
    """Run the command with the real stages in this process."""
    out, err, before = StringIO(), StringIO(), sys.argv
    sys.argv = ["spray", *arguments]
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as exit_:
            cli.main()
    finally:
        sys.argv = before
        GlobalHydra.instance().clear()
    return Outcome(int(exit_.value.code or 0), out.getvalue(), err.getvalue())
