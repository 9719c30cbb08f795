"""Tiny data, model and stages behind the real command; as a script, that command.

Every stage writes what it reads, so that a wrong order or a stale input shows in the files. Environment:
SPRAY_FAKE_FAIL=STAGE raises in it, SPRAY_FAKE_SLEEP=STAGE hangs in it after half of its output is written.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

from spray.data.arrays import ArrayDataset
from spray.data.base import ImageDataset
from spray.data.loading import DATASETS, DatasetOptions, validate
from spray.errors import UserError
from spray.models.loading import MODELS
from spray.pipelines import stages
from spray.pipelines.config import SprayConfig
from spray.pipelines.context import Context
from spray.pipelines.stage import Stage

ARGUMENTS = [
    "dataset.name=tiny",
    "dataset.mean=[0]",
    "dataset.std=[1]",
    "dataset.plant.kind=none",
    "dataset.plant.class=0",
    "model.name=tiny",
    "correction.methods=[]",
    "device=cpu",
]
NEEDS: dict[str, tuple[str, ...]] = {
    "train": (),
    "attribute": ("train",),
    "analyze": ("attribute",),
    "rank": ("analyze",),
    "isolate": ("rank", "attribute"),
    "correct": ("isolate", "train"),
    "verify": ("correct",),
    "report": ("verify",),
}
SETTINGS = {"train": ("dataset", "model", "seed"), "attribute": ("attribution.composite",), "rank": ("rank",)}
OUTPUTS = {"train": "model.pt", "attribute": "attributions.h5", "correct": "corrected/*.pt"}
ran: list[str] = []


def first_output(name: str) -> str:
    return OUTPUTS.get(name, f"{name}.json").replace("*", f"{name}ed")


def fake(name: str) -> Stage:
    def run(context: Context) -> dict[str, Any]:
        ran.append(name)
        path = context.run_dir / first_output(name)
        path.parent.mkdir(exist_ok=True)
        if os.environ.get("SPRAY_FAKE_FAIL") == name:
            raise RuntimeError("it broke\nin two lines")
        if os.environ.get("SPRAY_FAKE_FAIL") == f"{name}:user":
            raise UserError("that cannot be done; do this")
        if os.environ.get("SPRAY_FAKE_SLEEP") == name:
            path.write_text("half")
            time.sleep(120)
        read = [(context.run_dir / first_output(need)).read_text() for need in NEEDS[name]]
        values = [context.config.seed, context.config.attribution.composite] if name in SETTINGS else []
        path.unlink(missing_ok=True)
        path.write_text(f"{name}{values}({','.join(read)})")
        if name == "correct":
            (path.parent / f"{context.config.seed}.pt").write_text("one for each seed")
        return {"read": len(read)}

    outputs = (OUTPUTS.get(name, f"{name}.json"),)
    return Stage(name, NEEDS[name], SETTINGS.get(name, ()), outputs, run)


def load(names: list[str], config: SprayConfig | None = None) -> dict[str, Stage]:
    wanted = set(names)
    for name in reversed(stages.NAMES):
        if name in wanted:
            wanted |= set(NEEDS[name])
    return {name: fake(name) for name in stages.NAMES if name in wanted}


def tiny(options: DatasetOptions) -> tuple[ImageDataset, ImageDataset]:
    def part(n: int) -> ArrayDataset:
        images = np.random.default_rng(n).integers(0, 255, size=(n, 1, 6, 6), dtype=np.uint8)
        return ArrayDataset(images, np.arange(n) % 3, ("a", "b", "c"))

    return validate(part(12), part(6), options)


def tiny_model(in_channels: int, n_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36 * in_channels, n_classes))


def install(setattr_: Callable[[Any, str, Any], None] = setattr) -> None:
    if "tiny" not in DATASETS.names():
        DATASETS.register("tiny")(tiny)
        MODELS.register("tiny")(tiny_model)
    setattr_(stages, "load", load)


if __name__ == "__main__":
    from spray.pipelines.cli import main

    install()
    main()
