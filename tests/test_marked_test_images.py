"""Test images that carry the artifact themselves, and classes larger than what a cluster is grown among."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from PIL import Image

from spray.pipelines import explaining, samples
from spray.pipelines.isolated import load_findings, load_scores
from spray.pipelines.measures import carried

N, MARKED, CLASS = 60, 24, "skin"
SIZE = 10
DRAWN = 40
"""Fewer than a class has."""


@dataclass
class Marked:
    """A run on images of which some of one class have a sticker, in training and in test images."""

    options: list[str]
    folder: Path
    train: np.ndarray
    test: np.ndarray

    def artifacts(self, run_dir: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads((self.folder / run_dir / "artifacts.json").read_text())["artifacts"]
        return found

    def run(self, run_dir: str, *more: str) -> None:
        said = small.run(*self.options, f"run_dir={self.folder / run_dir}", *more)
        assert (said.code, said.err) == (0, "")


def put_stickers(folder: Path, seed: int) -> np.ndarray:
    """Put the same sticker on some images of a folder; return the numbers of these."""
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(N, MARKED, replace=False))
    sticker = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
    sticker[..., 1], sticker[2:8, 2:8, 0] = 220, 255
    for number in chosen:
        path = folder / f"{number:03d}.png"
        image = np.asarray(Image.open(path)).copy()
        top, left = (2 * int(rng.integers(3)) for _ in range(2))
        image[top : top + SIZE, left : left + SIZE] = sticker
        Image.fromarray(image).save(path)
    return chosen


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Marked:
    folder = tmp_path_factory.mktemp("marked")
    names = sorted(small.photographs())
    options = [
        "experiment=image_folder",
        f"dataset.image_size={small.SIDE}",
        *small.write_images(folder, dict.fromkeys(names, N), dict.fromkeys(names, N)),
        f"model.factory={small.write_model(folder)}:build",
        "model.epochs=20",
        "model.learning_rate=5e-3",
        "model.batch_size=16",
        "isolate.per_class=1",
        "isolate.latent=1",
        "correction.methods=[]",
        "verify.recheck=false",
        "report.figures=[]",
        "device=cpu",
    ]
    stickers = (put_stickers(folder / part / CLASS, seed) for seed, part in enumerate(("train", "test")))
    before = names.index(CLASS) * N  # a folder's images are numbered class by class
    found = Marked(options, folder, *(before + numbers for numbers in stickers))
    found.run("run")
    return found


def shares(found: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """Return precision and recall."""
    hits = len(np.intersect1d(found, true))
    return hits / max(1, len(found)), hits / len(true)


def test_test_images_that_carry_it_are_told_by_the_same_score(marked: Marked) -> None:
    first = marked.artifacts("run")[0]
    assert first["verdict"] in ("clever_hans", "backdoor")
    assert min(shares(np.array(first["samples"]), marked.train)) >= 0.9
    scores = load_scores(marked.folder / "run" / first["test_scores"])
    assert len(scores) == 3 * N
    assert min(shares(np.flatnonzero(scores > first["score_threshold"]), marked.test)) >= 0.9


def test_it_is_removed_from_images_that_the_model_was_not_trained_on(marked: Marked) -> None:
    first = marked.artifacts("run")[0]
    own = load_scores(marked.folder / "run" / first["test_scores"])[N * first["class_index"] :][:N]
    assert first["removal_held_out"]
    assert first["sample_bias"]["held_out"]
    assert first["n_removed"] == (own > first["score_threshold"]).sum() >= explaining.HELD_OUT
    assert first["removal_cost"] > 0
    assert first["removal_p_value"] < 0.01


def test_groups_of_test_images_are_those_that_carry_it(marked: Marked) -> None:
    """Where its own class has enough of them nothing is added to it; other classes have none."""
    [(_, finding), *_] = load_findings(marked.folder / "run")
    assert min(shares(np.flatnonzero(carried(finding, 3 * N)), marked.test)) >= 0.9


def test_a_class_is_searched_whole_though_a_cluster_is_grown_among_some(
    marked: Marked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "GROWN", DRAWN)
    marked.run("part", "stages=[train,attribute,analyze,rank,isolate]")
    found = next(row for row in marked.artifacts("part") if row["class_name"] == CLASS)
    assert found["verdict"] != "no_effect"
    # Of those drawn alone it would be two in three.
    assert min(shares(np.array(found["samples"]), marked.train)) >= 0.9
