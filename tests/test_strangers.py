"""A kind of sample that its class has too few of: told by its neighbors and the model's mistakes, not by being hard."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import fisher_exact
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors

from spray.isolation.artifact import Artifact
from spray.isolation.causal import Effect
from spray.isolation.growing import Scorer
from spray.isolation.sample_bias import COMPARED, NEIGHBORS, STRANGE, SampleBias, strangeness, worse
from spray.pipelines import isolate
from spray.pipelines.candidates import Candidate

MODEL = """
from spray.models.small_cnn import SmallCNN

def build(num_classes):
    return SmallCNN(1, num_classes, width=8)
"""
CLASSES, HOST, GUEST, GUESTS = 5, 1, 0, 32
"""Some noughts are labelled as ones."""


def blobs(seed: int, guests_at: float) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Return two spaces with two classes, at 0 and at 10, and 20 more of the first class somewhere; own; member."""
    rng = np.random.default_rng(seed)
    where = np.repeat([0.0, guests_at, 10.0], [80, 20, 100])
    spaces = [rng.normal(size=(200, d)) + where[:, None] for d in (3, 5)]
    index = np.arange(200)
    return spaces, index < 100, (index >= 80) & (index < 100)


def test_a_kind_among_another_class_is_a_stranger_and_one_among_its_own_is_not() -> None:
    assert strangeness(*blobs(0, 10.0), seed=0) == 0
    assert strangeness(*blobs(0, 0.0), seed=0) > 0.9
    # Half-way: its nearest neighbors are of both classes, as at the border of two.
    assert 0.2 < strangeness(*blobs(0, 5.0), seed=0) < 0.8


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 10))
def test_strangeness_is_a_ratio_of_neighbors_shares(seed: int, where: float) -> None:
    """Scikit-learn's neighbors are the oracle; the rest is small enough for all of it to be compared."""
    spaces, own, member = blobs(seed, where)
    kind, usual = 0.0, 0.0
    for space in spaces:
        others = np.flatnonzero(~member)
        nearest = NearestNeighbors(n_neighbors=NEIGHBORS).fit(space[others])
        rest = np.flatnonzero(own & ~member)
        assert len(rest) < COMPARED
        kind += own[others[nearest.kneighbors(space[member], return_distance=False)]].mean()
        itself_too = NearestNeighbors(n_neighbors=NEIGHBORS + 1).fit(space[others])
        around = others[itself_too.kneighbors(space[rest], return_distance=False)]
        usual += np.mean([own[row[row != i]].mean() for i, row in zip(rest, around, strict=True)])
    assert strangeness(spaces, own, member, seed) == pytest.approx(kind / usual)


def test_where_distances_tell_nothing_of_the_class_no_kind_is_a_stranger() -> None:
    (one, _), own, member = blobs(0, 10.0)
    noise = np.random.default_rng(1).normal(size=(200, 4))
    own = own & (member | (np.arange(200) % 4 == 0))  # 20 of 120 others: less than `TOLD`
    assert strangeness([one, noise], own, member, 0) == float("inf")
    assert strangeness([noise, noise], own, member, 0) == float("inf")


def test_worse_is_fishers_exact_test() -> None:
    of_kind = np.arange(60) < 20
    right = np.ones(60, dtype=bool)
    right[:15] = right[55:] = False
    accuracy, rest_accuracy, p_value = worse(of_kind, right)
    assert (accuracy, rest_accuracy) == (0.25, 0.875)
    assert p_value == pytest.approx(float(fisher_exact([[5, 15], [35, 5]], alternative="less")[1]))
    assert worse(~of_kind, right)[2] > 0.5


@dataclass
class Tried:
    """What a verdict asks of an explanation."""

    accounts: bool
    explains: bool = True
    isolator: str = "local"


def candidate(c: int, effect: Effect, strangeness: float | None = None, unusual: bool = False) -> Candidate:
    """Return a candidate on whose samples the model is far worse; `unusual` for its artifact, not by the ranking."""
    artifact = Artifact(torch.ones(4, 4), torch.ones(1, 4, 4), torch.zeros(1, 2, dtype=torch.int64), 0.5, 1, True)
    bias = SampleBias(0.98, 0.3, 0.9, 1e-12, strangeness=strangeness)
    scorer = Scorer(np.zeros(1), 0.0, 0.5)
    parts: Any = (c, "kmeans-02/1", artifact, np.arange(20), {}, 0.5, scorer, scorer, [Tried(unusual)])
    return Candidate(*parts, effect, bias, unusual, False)


NOTHING = Effect(0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 100)
COSTS = replace(NOTHING, removal_cost=-2.0, removal_gain_p_value=1e-6)
ACTS = Effect(0.8, 0.0, 3.0, 1e-9, 2.0, 1e-9, 100)


@pytest.mark.parametrize(
    ("candidates", "verdicts"),
    [
        # A kind that the model is worse on is hard, if nothing else is known of it.
        ([candidate(0, NOTHING)], ["no_effect"]),
        ([candidate(0, NOTHING, strangeness=0.0)], ["sample_bias"]),
        # A mark that the model takes for another class's: removed, it gains.
        ([candidate(0, COSTS, unusual=True)], ["sample_bias"]),
        ([candidate(0, COSTS)], ["no_effect"]),
        ([candidate(0, replace(COSTS, removal_gain_p_value=0.02), unusual=True)], ["no_effect"]),
        ([candidate(0, replace(COSTS, removal_cost=0.1), unusual=True)], ["no_effect"]),
        # Holm's correction for 20 candidates.
        ([candidate(0, replace(COSTS, removal_gain_p_value=0.001), unusual=True)] * 20, ["no_effect"] * 20),
        # Whatever is without an artifact by which a class is told is a stranger in it; of another class it is one.
        (
            [candidate(0, ACTS, unusual=True), candidate(0, NOTHING, 0.0), candidate(1, NOTHING, 0.0)],
            ["clever_hans", "no_effect", "sample_bias"],
        ),
    ],
)
def test_there_is_a_reason_for_a_sample_bias(candidates: list[Candidate], verdicts: list[str]) -> None:
    judged = [replace(each) for each in candidates]
    isolate._judge(judged)
    assert [each.verdict for each in judged] == verdicts


def digits(folder: Path, guests: int) -> list[str]:
    """Write scikit-learn's digits, of 16² pixels, with some noughts among the ones; return the options."""
    source = load_digits(n_class=CLASSES)
    images = np.round(source.images * (255 / 16)).astype(np.uint8).repeat(2, axis=1).repeat(2, axis=2)[:, None]
    labels = source.target.copy()
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:-200], order[-200:]
    moved = train[labels[train] == GUEST][:guests]
    names = np.array([f"guest/{i}" if i in set(moved.tolist()) else f"digit/{i}" for i in range(len(labels))])
    labels[moved] = HOST
    classes = [str(name) for name in source.target_names[:CLASSES]]
    for name, part in (("train", train), ("test", test)):
        np.savez(folder / f"{name}.npz", images=images[part], labels=labels[part], classes=classes, names=names[part])
    (folder / "model.py").write_text(MODEL)
    return [
        "experiment=image_folder",
        "dataset=arrays",
        f"dataset.train={folder / 'train.npz'}",
        f"dataset.test={folder / 'test.npz'}",
        "model=small_cnn",
        f"model.factory={folder / 'model.py'}:build",
        "model.epochs=8",
        "model.learning_rate=5e-3",
        "analysis.umap=false",
        "isolate.per_class=1",
        "isolate.latent=0",
        "correction.methods=[]",
        "verify.recheck=false",
        "report.figures=[]",
        "device=cpu",
    ]


def found(folder: Path, guests: int, *more: str) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Return the rows of a run that have a verdict, and which training samples are guests."""
    said = small.run(*digits(folder, guests), f"run_dir={folder / 'run'}", *more)
    assert (said.code, said.err) == (0, "")
    rows = json.loads((folder / "run" / "artifacts.json").read_text())["artifacts"]
    names = np.load(folder / "train.npz")["names"]
    return [row for row in rows if row["verdict"] != "no_effect"], np.flatnonzero(np.char.startswith(names, "guest/"))


def test_samples_that_belong_to_another_class_are_a_sample_bias(tmp_path: Path) -> None:
    (row,), guests = found(tmp_path, GUESTS)
    assert len(guests) == GUESTS
    assert (row["verdict"], row["class_index"]) == ("sample_bias", HOST)
    hits = len(np.intersect1d(row["samples"], guests))
    assert hits >= 0.9 * len(guests)
    assert hits >= 0.9 * len(row["samples"])
    bias = row["sample_bias"]
    assert bias["strangeness"] <= STRANGE
    assert bias["rest_accuracy"] - bias["accuracy"] > 0.5
    page = (tmp_path / "run" / "report.html").read_text()
    assert "of a kind of its samples, on" in page


def test_without_them_no_kind_is_found(tmp_path: Path) -> None:
    rows, guests = found(tmp_path, 0, "stages=[train,attribute,analyze,rank,isolate]")
    assert (rows, len(guests)) == ([], 0)
