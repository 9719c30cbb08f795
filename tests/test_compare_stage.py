"""Stage compare behind the real command: a planted tag that only one of two models knows; mistakes; foreign files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import small
import torch

from spray.pipelines.stages import NAMES, in_order
from spray.report.comparison import ComparisonData, Evidence, Example, Model, Strategy, render_comparison

CLASSES = ("coffee", "skin", "stone")
N, MARKED = 48, 16
OPTIONS = (
    "experiment=image_folder",
    f"dataset.image_size={small.SIDE}",
    "model.epochs=14",
    "model.learning_rate=5e-3",
    "model.batch_size=16",
    "analysis.umap=false",
    "analysis.n_clusters=[2,3,4]",
    "device=cpu",
)
PLANT = (
    "dataset.plant.kind=box",
    "dataset.plant.class=skin",
    f"dataset.plant.rate={MARKED / N}",
    "dataset.plant.size=5",
    "dataset.plant.jitter=1",
)
EXPLAINED = "stages=[train,attribute,analyze]"


@dataclass
class Runs:
    """Two runs on the same images: `tagged` was trained on them, `clean` without the tag."""

    folder: Path
    options: list[str]

    @property
    def tagged(self) -> Path:
        return self.folder / "tagged"

    @property
    def clean(self) -> Path:
        return self.folder / "clean"

    def run(self, run_dir: Path, *more: str) -> small.Outcome:
        return small.run(*self.options, *PLANT, f"run_dir={run_dir}", *more)

    def compare(self, other: Path, run_dir: Path | None = None) -> small.Outcome:
        return self.run(run_dir or self.tagged, "stages=[compare]", f"compare.other={other}")


def done(said: small.Outcome) -> small.Outcome:
    assert (said.code, said.err) == (0, "")
    return said


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("two_models")
    options = [
        *OPTIONS,
        *small.write_images(folder, dict.fromkeys(CLASSES, N), dict.fromkeys(CLASSES, small.TEST)),
        f"model.factory={small.write_model(folder)}:build",
    ]
    made = Runs(folder, options)
    done(small.run(*options, "stages=[train]", f"run_dir={folder / 'trained'}"))
    done(made.run(made.tagged, EXPLAINED))
    done(made.run(made.clean, EXPLAINED, f"model.checkpoint={folder / 'trained/model.pt'}"))
    return made


@pytest.fixture(scope="module")
def compared(runs: Runs) -> dict[str, Any]:
    done(runs.compare(runs.clean))
    return dict(json.loads((runs.tagged / "comparison.json").read_text()))


@pytest.fixture
def copy(runs: Runs, tmp_path: Path) -> Path:
    """The other run, to be spoilt."""
    return Path(shutil.copytree(runs.clean, tmp_path / "copy"))


def marked(runs: Runs) -> set[int]:
    """The training samples whose images have the box."""
    from spray.data.planting import Plant

    labels = np.repeat(range(len(CLASSES)), N)
    plant = {"kind": "box", "class": "skin", "rate": MARKED / N, "size": 5, "jitter": 1}
    chosen = Plant.from_config(plant, CLASSES, (3, small.SIDE, small.SIDE))
    assert chosen is not None
    return set(chosen.chosen(labels).tolist())


def test_the_tag_is_known_to_the_model_only_that_was_trained_with_it(runs: Runs, compared: dict[str, Any]) -> None:
    only = [row for row in compared["strategies"] if row["verdict"] == "only"]
    assert [(row["model"], row["class_name"], row["class_index"]) for row in only] == [("this", "skin", 1)]
    found, truth = set(only[0]["samples"]), marked(runs)
    assert len(found & truth) >= 0.9 * max(len(found), len(truth))
    assert only[0]["separability"]["kept"] < 0.25
    counts = compared["strategies_by_verdict"]
    assert (counts["this"]["only"], counts["other"]["only"]) == (1, 0)


def test_every_cluster_has_its_row(runs: Runs, compared: dict[str, Any]) -> None:
    expected: set[tuple[str, int, bytes]] = set()
    for side, folder in (("this", runs.tagged), ("other", runs.clean)):
        with h5py.File(folder / "analysis.h5") as file:
            for c in range(len(CLASSES)):
                for labels in (dataset[:] for dataset in file[f"{c:08d}/cluster"].values()):
                    members = [labels == label for label in np.unique(labels)]
                    expected |= {(side, c, m.tobytes()) for m in members if 8 <= m.sum() <= N / 2}
    rows = compared["clusters"]
    assert len(rows) == len(expected)
    assert sorted({row["strategy"] for row in rows}) == list(range(len(compared["strategies"])))
    for row in rows:
        assert row["verdict"] in ("only", "undecided", "shared")
        assert row["cluster"] in compared["strategies"][row["strategy"]]["clusters"]
        with h5py.File((runs.tagged if row["model"] == "this" else runs.clean) / "analysis.h5") as file:
            name, _, label = row["cluster"].rpartition("/")
            labels = file[f"{row['class_index']:08d}/cluster/{name}"][:]
        assert (labels == int(label)).sum() == row["size"]


def test_the_other_way_round_it_is_the_other_that_knows(runs: Runs, compared: dict[str, Any]) -> None:
    done(runs.run(runs.clean, "stages=[compare]", f"compare.other={runs.tagged}", checkpoint(runs)))
    back = json.loads((runs.clean / "comparison.json").read_text())
    assert back["strategies_by_verdict"]["other"] == compared["strategies_by_verdict"]["this"]
    assert back["strategies_by_verdict"]["this"] == compared["strategies_by_verdict"]["other"]


def checkpoint(runs: Runs) -> str:
    return f"model.checkpoint={runs.folder / 'trained/model.pt'}"


def test_the_page_is_self_contained_and_shows_both_models(runs: Runs, compared: dict[str, Any]) -> None:
    page = (runs.tagged / "comparison.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert "<script" not in page
    assert "default-src 'none'" in page
    assert "1 strategy</em> only in <bdi>tagged</bdi>" in page
    for text in ("clean", "skin", "Only in", "Shared", "separability at least 3 times"):
        assert text in page
    # Image and two heatmaps of each sample.
    assert page.count("relevance in tagged, relevance in clean") >= 9


def test_it_is_done_once_until_something_changes(runs: Runs, compared: dict[str, Any], copy: Path) -> None:
    assert "compare: up to date" in done(runs.compare(runs.clean)).out
    first = (runs.tagged / "comparison.json").read_bytes()
    said = done(runs.compare(copy)).out
    assert "compare: recomputed because compare.other changed" in said
    assert (runs.tagged / "comparison.json").read_bytes().replace(b'"copy"', b'"clean"') == first
    with h5py.File(copy / "analysis.h5", "r+") as file:
        del file["00000002"]
    # It is no more what the run's own stage wrote.
    assert "isn't what its stage analyze wrote" in runs.compare(copy).err
    (copy / "run.json").unlink()
    said = done(runs.compare(copy)).out
    assert "content of compare.other changed" in said
    assert "1 groups that do not hold the same samples" in said
    assert "only labels and number tell" in (runs.tagged / "comparison.html").read_text()


def spoil_labels(folder: Path) -> None:
    (folder / "run.json").unlink()
    with h5py.File(folder / "attributions.h5", "r+") as file:
        file["label"][5] = 2


def spoil_order(folder: Path) -> None:
    (folder / "run.json").unlink()
    with h5py.File(folder / "attributions.h5", "r+") as file:
        file["index"] = np.arange(len(CLASSES) * N)[::-1]


def spoil_index(folder: Path) -> None:
    (folder / "run.json").unlink()
    with h5py.File(folder / "analysis.h5", "r+") as file:
        del file["00000001/index"]
        file["00000001/index"] = np.full(N, 10**6)


def spoil_clusters(folder: Path) -> None:
    (folder / "run.json").unlink()
    with h5py.File(folder / "analysis.h5", "r+") as file:
        del file["00000001/cluster/kmeans-02"]
        file["00000001/cluster/kmeans-02"] = np.zeros(3, int)


def spoil_elsewhere(folder: Path) -> None:
    (folder / "run.json").unlink()
    with h5py.File(folder / "analysis.h5", "r+") as file:
        del file["00000001/index"]
        file["00000001/index"] = h5py.ExternalLink("/etc/hostname", "/x")


def spoil_record(folder: Path) -> None:
    (folder / "run.json").write_text('{"stages": [1, 2]}')


def unfinish(folder: Path) -> None:
    record = json.loads((folder / "run.json").read_text())
    record["stages"]["analyze"]["status"] = "failed"
    (folder / "run.json").write_text(json.dumps(record))


def of_other_images(folder: Path) -> None:
    record = json.loads((folder / "run.json").read_text())
    record["inputs"]["dataset.train"] = "0" * 64
    (folder / "run.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda folder: (folder / "analysis.h5").unlink(), ["has no analysis.h5", "stages=[train,attribute,analyze]"]),
        (lambda folder: (folder / "attributions.h5").write_bytes(b"no"), ["attributions.h5", "attribute"]),
        (spoil_labels, ["other data", "sample 5"]),
        (spoil_order, ["/index has another order"]),
        (spoil_index, ["index"]),
        (spoil_clusters, ["kmeans-02"]),
        (spoil_elsewhere, ["index", "file"]),
        (spoil_record, ["run.json is damaged"]),
        (unfinish, ["analyze is not finished"]),
        (of_other_images, ["other training images", "dataset.plant"]),
    ],
)
def test_another_run_that_is_not_to_be_trusted(
    runs: Runs, copy: Path, spoil: Callable[[Path], None], told: list[str]
) -> None:
    spoil(copy)
    said = runs.compare(copy)
    assert said.code == 2
    assert said.err.startswith("spray: error: ")
    assert said.err.count("\n") == 1
    for part in told:
        assert part in said.err


MISTAKES = {
    (): ["compare.other=RUN_DIR", "compare.correction=METHOD"],
    ("compare.other=nowhere", "compare.correction=a_clarc"): ["not both"],
    ("compare.other=nowhere",): ["compare.other=nowhere has no attributions.h5"],
    ("compare.correction=a_clarq",): ["did you mean 'a_clarc'"],
    ("compare.correction=a_clarc", "correction.methods=[p_clarc]"): ["a_clarc", "['p_clarc']"],
    ("compare.othr=x",): ["did you mean 'compare.other'"],
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_mistakes_are_told_before_anything_runs(typed: tuple[str, ...], tmp_path: Path) -> None:
    said = small.run(f"run_dir={tmp_path / 'run'}", "stages=[train,attribute,analyze,compare]", *typed)
    assert (said.code, said.err.count("\n")) == (2, 1)
    for part in MISTAKES[typed]:
        assert part in said.err
    assert not (tmp_path / "run/run.json").exists()


def test_it_is_no_part_of_the_loop() -> None:
    assert "compare" not in NAMES
    assert in_order(["compare", *reversed(NAMES)]) == [*NAMES, "compare"]


def test_plan_knows_it(runs: Runs, compared: dict[str, Any]) -> None:
    said = done(runs.run(runs.tagged, "stages=[compare]", f"compare.other={runs.clean}", "plan=true")).out
    assert re.search(r"compare +(up to date|would run)", said)


@pytest.mark.slow
def test_other_groups_features_and_sizes_of_heatmaps(runs: Runs, tmp_path: Path) -> None:
    other, this = tmp_path / "other", tmp_path / "this"
    analysis = ("analysis=anywhere", "analysis.groups=[class,predicted,all]", "analysis.n_clusters=[2,3]")
    done(runs.run(other, EXPLAINED, *analysis, checkpoint(runs), "attribution.pool=8"))
    shutil.copytree(runs.tagged, this)
    done(runs.run(this, "stages=[train,attribute,analyze,compare]", *analysis, f"compare.other={other}"))
    found = json.loads((this / "comparison.json").read_text())
    groups = {(row["class_index"], row["class_name"]) for row in found["clusters"]}
    # Which samples are predicted as a class may differ; then there is nothing to compare.
    assert {(1, "skin"), (None, "all samples")} <= groups
    only = [row for row in found["strategies"] if row["verdict"] == "only" and row["class_name"] == "skin"]
    assert {row["model"] for row in only} == {"this"}
    assert len(set(only[0]["samples"]) & marked(runs)) >= 0.9 * MARKED
    assert all(row["retention"] is not None for row in only)


@pytest.mark.slow
def test_before_against_after_a_correction(runs: Runs, tmp_path: Path) -> None:
    stages = f"stages=[{','.join(NAMES[:6])},compare]"
    more = ("compare.correction=p_clarc", "correction.epochs=2", "correction.methods=[p_clarc]")
    done(runs.run(tmp_path, stages, *more))
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert [found["models"][side]["name"] for side in ("this", "other")] == ["Original model", "P-ClArC"]
    only = [row for row in found["strategies"] if row["verdict"] == "only"]
    assert [(row["model"], row["class_name"]) for row in only] == [("this", "skin")]
    assert len(set(only[0]["samples"]) & marked(runs)) >= 0.9 * MARKED
    part = json.loads((tmp_path / "compared/p_clarc/run.json").read_text())
    assert {name: entry["status"] for name, entry in part["stages"].items()} == dict.fromkeys(
        ("train", "attribute", "analyze"), "done"
    )
    assert (tmp_path / "compared/p_clarc/model.pt").read_bytes() == (tmp_path / "corrected/p_clarc.pt").read_bytes()
    again = done(runs.run(tmp_path, stages, *more)).out
    assert again.count("up to date") == 7
    # The control was trained on the same tagged images: the strategy is still there.
    said = done(runs.run(tmp_path, stages, *more[1:], "compare.correction=fine_tuned")).out
    assert "compare: recomputed because compare.correction changed" in said
    found = json.loads((tmp_path / "comparison.json").read_text())
    first = max((row for row in found["strategies"] if row["class_name"] == "skin"), key=lambda row: row["clear"])
    assert (first["verdict"], found["strategies_by_verdict"]["this"]["only"]) == ("shared", 0)


@pytest.mark.slow
def test_a_projected_model_is_explained_in_the_same_layer(runs: Runs, tmp_path: Path) -> None:
    stages = f"stages=[{','.join(NAMES[:6])},compare]"
    more = ("correction.methods=[p_clarc]", "correction.layer='4'", "correction.epochs=1")
    done(runs.run(tmp_path, stages, *more, "compare.correction=p_clarc", "attribution.layer='2'"))
    state = torch.load(tmp_path / "corrected/p_clarc.pt", weights_only=True)
    assert any(key.startswith("projections.") for key in state), "no projection is left to wrap the model"
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert found["models"]["other"]["name"] == "P-ClArC"
    facts = json.loads((tmp_path / "compared/p_clarc/run.json").read_text())["stages"]["attribute"]["facts"]
    assert facts["layers"] == ["model.2"]


def test_a_run_without_an_artifact_has_nothing_to_compare(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spray.pipelines.correct.load_findings", lambda run_dir: [])
    stages = f"stages=[{','.join(NAMES[:6])},compare]"
    done(runs.run(tmp_path, stages, "compare.correction=a_clarc", checkpoint(runs), "isolate.candidates=1"))
    assert "nothing was corrected" in json.loads((tmp_path / "comparison.json").read_text())["note"]
    assert "nothing was corrected" in (tmp_path / "comparison.html").read_text()


def test_names_are_escaped() -> None:
    evil = "<img src=x onerror=alert(1)>\u202e\"'"
    maps = (np.eye(4), -np.eye(4))
    example = Example(evil, 3, np.zeros((1, 4, 4)), maps)
    strategy = Strategy(
        0, evil, evil, (evil,), 9, 30, "only", evil, 7, 0.3, 0.2, (8.0, 0.5), (0.9, 0.1), 0.06, 0.11, None, None, None
    )
    seen = Strategy(
        **{
            **strategy.__dict__,
            "evidence": Evidence(maps, maps, (1.0, 1.0), (example,), (example,), (1.0, 0.0)),
            "cosine": 0.5,
            "retention": -0.001,
        }
    )
    model = Model(evil, evil, ((evil, evil),))
    weak = Strategy(**strategy.__dict__ | {"verdict": "shared", "weaker": True})
    page = render_comparison(ComparisonData(evil, (model, model), 30, 1, (seen, strategy, weak), (evil,), (evil,), ""))
    assert "1 strategy</b> of <bdi>&lt;img" in page
    assert "<img src=x" not in page
    assert page.count("&lt;img src=x") > 20
    assert "onerror=alert(1)>" not in page
    assert "-0" not in re.sub(r'"[^"]*"', "", page.partition("<body>")[2])
