"""From a run directory to the report's data, and the report stage as a whole."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch

from spray.data.base import ImageDataset
from spray.data.planting import plant_all, read_plants
from spray.data.truth import write_truth
from spray.figures import to_png
from spray.report.data import Truth
from spray.report.gather import gather
from spray.store.analyses import open_analysis

N, SIDE = 240, 16
CARRIERS = tuple(range(5, 35))  # of class 1, whose samples are 0 … 79


class Images(ImageDataset):
    """Three classes of 80 images, grey level i / N, so that an image tells its own index."""

    def __init__(self, channels: int = 1) -> None:
        self.classes = ("disc", "star", "moon & <i>sun</i>")
        self.labels = np.repeat([1, 0, 2], 80)
        self.names = [f"{self.classes[c]}/{i:03d}.png" for i, c in enumerate(self.labels)]
        self.image_shape = (channels, SIDE, SIDE)
        self.fingerprint = "f" * 64
        self.unreadable = [("star/broken.png", "truncated file")]

    def batch(self, indices):
        level = torch.as_tensor(np.asarray(indices), dtype=torch.float32) / N
        return level[:, None, None, None].expand(-1, *self.image_shape).clone()


@pytest.fixture
def dataset() -> Images:
    return Images()


@pytest.fixture
def run_dir(tmp_path: Path, dataset: Images) -> Path:
    """A finished run that found one artifact in class 1 and rejected a candidate of class 2."""
    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "attributions.h5", "w") as file:
        # Row i holds i everywhere: a heatmap tells which sample it belongs to.
        file["attribution"] = np.broadcast_to(np.arange(N, dtype=np.float32)[:, None, None, None], (N, 1, SIDE, SIDE))
        file["label"] = dataset.labels
        file["prediction"] = rng.normal(size=(N, 3)).astype(np.float32)
    with h5py.File(tmp_path / "analysis.h5", "w") as file:
        for index in range(3):
            members = np.flatnonzero(dataset.labels == index)
            group = file.create_group(f"{index:08d}")
            group["index"] = members.astype(np.uint32)
            group["embedding/spectral"] = np.stack([members * scale for scale in (1.0, 2.0, 3.0, 0.0)], 1).astype("f4")
            group["embedding/spectral"].attrs["eigenvalue"] = np.float32([0.9, 0.5, 0.1, 0.0])
            for k in (2, 3):
                group[f"cluster/kmeans-0{k}"] = (np.arange(80) % k).astype(np.int32)
    ranking = {
        "classes": [
            {
                "class_index": 2,
                "class_name": dataset.classes[2],
                "n": 80,
                "separability": 9.0,
                "p_value": 0.2,
                "rank": 1,
            },
            {
                "class_index": 1,
                "class_name": "star",
                "n": 80,
                "separability": 8.0,
                "p_value": 0.001,
                "rank": 2,
            },
        ],
        "clusters": [
            {
                "class_index": 1,
                "class_name": "star",
                "cluster": "kmeans-03/1",
                "size": 27,
                "separability": 7.5,
                "p_value": 0.001,
                "rank": 1,
            },
            {
                "class_index": 2,
                "class_name": dataset.classes[2],
                "cluster": "kmeans-02/0",
                "size": 40,
                "separability": 2.5,
                "p_value": 0.4,
                "rank": 2,
            },
        ],
    }
    folder = tmp_path / "artifacts" / "star-1"
    folder.mkdir(parents=True)
    (folder / "mask.png").write_bytes(to_png(np.eye(SIDE)))
    (folder / "pattern.png").write_bytes(to_png(np.zeros((SIDE, SIDE, 4))))
    scores = {i: (2.0 if i in CARRIERS else 0.0) + i / N for i in range(N)}
    lines = [f"{index},{score}" for index, score in scores.items()]
    (folder / "scores.csv").write_text("sample_index,score\n" + "\n".join(lines) + "\n")
    row = {
        "id": "star-1",
        "class_index": 1,
        "class_name": "star",
        "cluster": "kmeans-03/1",
        "samples": list(CARRIERS),
        "verdict": "clever_hans",
        "flip_rate": 0.6,
        "control_flip_rate": 0.05,
        "logit_gain": 3.5,
        "p_value": 0.0001,
        "n_tested": 40,
        "mask": "artifacts/star-1/mask.png",
        "pattern": "artifacts/star-1/pattern.png",
        "scores": "artifacts/star-1/scores.csv",
    }
    rejected = {
        "id": "moon-1",
        "class_index": 2,
        "class_name": dataset.classes[2],
        "cluster": "kmeans-02/0",
        "samples": [160],
        "verdict": "no_effect",
        "flip_rate": 0.01,
        "control_flip_rate": 0.01,
        "logit_gain": 0.0,
        "p_value": 0.5,
    }
    model = {
        "clean_accuracy": 0.9,
        "clean_accuracy_interval": [0.88, 0.92],
        "attacked_accuracy": 0.3,
        "n": 500,
        "artifacts": {"star-1": {"attacked_accuracy": 0.3}},
        "planted": {"attacked_accuracy": 0.25},
    }
    stages = {
        "train": {
            "status": "done",
            "seconds": 12.5,
            "started": "2026-01-02T03:04:05+0000",
            "facts": {"test_accuracy": 0.9},
        },
        "report": {"status": "running", "seconds": None},
    }
    run = {
        "command": ["spray", "seed=1", "dataset.train=my data"],
        "seed": 1,
        "git_sha": "abc",
        "stages": stages,
    }
    for name, value in {
        "ranking": ranking,
        "artifacts": {"artifacts": [row, rejected]},
        "verification": {"models": {"original": model, "a_clarc": model}},
        "run": run,
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    return tmp_path


def test_findings_and_rejected_candidates_are_told_apart(run_dir, dataset):
    data = gather(run_dir, dataset, title="t", model="m")
    assert [artifact.id for artifact in data.found] == ["star-1"]
    assert [artifact.id for artifact in data.rejected] == ["moon-1"]
    assert data.found[0].sample_names[0] == "star/005.png"
    assert data.found[0].mask.shape == (SIDE, SIDE)
    assert data.found[0].pattern.shape == (SIDE, SIDE, 4)
    assert [row.found for row in data.classes] == [False, True]
    assert [row.found for row in data.clusters] == [True, False]


def test_gallery_shows_the_right_samples_with_their_own_pictures(run_dir, dataset):
    top, drawn, near = gather(run_dir, dataset, title="t", model="m").found[0].galleries
    assert [tile.index for tile in top.tiles] == list(range(34, 25, -1))
    assert set(CARRIERS) - {tile.index for tile in top.tiles} >= {tile.index for tile in drawn.tiles}
    assert [tile.index for tile in near.tiles] == [79, 78, 77, 76, 75, 74]  # same class, not in the finding
    for tile in (*top.tiles, *drawn.tiles, *near.tiles):
        assert tile.image[0, 0, 0] == pytest.approx(tile.index / N)
        assert tile.relevance[0, 0] == tile.index


def test_embedding_shows_artifact_classes_and_the_first_of_the_ranking(run_dir, dataset):
    star, moon, disc = gather(run_dir, dataset, title="t", model="m").embeddings
    assert disc.class_name == "disc", "every class is shown, those of which something is known first"
    assert (star.class_name, star.clustering) == ("star", "kmeans-03")
    assert (moon.class_index, moon.clustering) == (2, "kmeans-02")
    assert star.indices[star.members].tolist() == list(CARRIERS)
    assert not moon.members.any()
    assert star.eigenvalues.tolist() == pytest.approx([0.0, 0.1, 0.5, 0.9])
    # Columns of the second- and third-smallest eigenvalue, not the trivial one.
    assert star.points.tolist() == [[3.0 * i, 2.0 * i] for i in star.indices]
    assert star.clusters.tolist() == [i % 3 for i in range(80)]


def test_shares_provenance_and_skipped_samples(run_dir, dataset):
    data = gather(run_dir, dataset, title="t", model="m")
    original = data.models[0]
    assert (original.clean.low, original.clean.high) == (0.88, 0.92)
    assert original.planted_attacked.value == 0.25
    assert original.worst_class is None
    assert data.found[0].effects[0].attacked.value == 0.3
    assert dict(data.provenance)["Command"] == "spray seed=1 'dataset.train=my data'"
    assert {stage.name: stage.status for stage in data.stages} == {
        "train": "done",
        "attribute": "done",
        "analyze": "done",
        "rank": "done",
        "isolate": "done",
        "correct": "not asked",
        "verify": "done",
    }, "of stages that run.json doesn't name, the files tell; the report itself is no row"
    assert data.skipped_samples == ("star/broken.png: truncated file",)
    assert any("tested on 40 images" in caveat for caveat in data.caveats)


def test_points_are_limited_and_keep_artifact_samples(run_dir, dataset):
    from spray.report.embeddings import Wanted, embedding

    with open_analysis(run_dir / "analysis.h5") as analysis:
        plot = embedding(dataset, analysis.group(1), 1, Wanted("no such", set(CARRIERS)), most=20)
    assert (len(plot.names), plot.members.sum(), plot.total) == (20, 10, 80)
    assert plot.clustering == "kmeans-02"


@pytest.mark.parametrize(
    "missing",
    ["attributions.h5", "analysis.h5", "ranking.json", "artifacts.json", "verification.json", "run.json"],
)
def test_any_one_file_may_be_missing(run_dir, dataset, missing):
    from spray.report import render

    (run_dir / missing).unlink()
    truth = Truth(1, "star", "tag", 0.375, frozenset(CARRIERS))
    page = render(gather(run_dir, dataset, title="t", model="m", truths=[truth]))
    expected = {
        "analysis.h5": "analyze",
        "ranking.json": "rank",
        "artifacts.json": "isolate",
        "verification.json": "verify",
    }
    for file, stage in expected.items():
        assert (f"Not run: the <b>{stage}</b>" in page) == (file == missing)


def with_stages(run_dir: Path, **statuses: str) -> None:
    """Say in run.json what became of stages."""
    run = json.loads((run_dir / "run.json").read_text())
    for name, status in statuses.items():
        run["stages"][name] = {"status": status, "seconds": 1.0, "outputs": {}, "facts": {}}
        if status == "failed":
            run["stages"][name]["error"] = "RuntimeError: <b>no</b> memory"
    (run_dir / "run.json").write_text(json.dumps(run))


@pytest.mark.parametrize("status", ["failed", "running", "pending"])
def test_results_of_stages_that_did_not_finish_do_not_count(run_dir, dataset, status):
    with_stages(run_dir, attribute="done", analyze="done", rank="done", isolate=status, verify="pending")
    data = gather(run_dir, dataset, title="t", model="m")
    assert data.artifacts is None, "artifacts.json is from an earlier run"
    assert data.models is None
    assert data.classes is not None
    assert not any(row.found for row in data.classes)
    assert {light.colour for light in data.lights} == {"none"}
    assert not any(plot.members.any() for plot in data.embeddings)
    assert (data.failed is not None) == (status == "failed")


def test_page_of_a_failed_run_says_where_and_claims_nothing(run_dir, dataset):
    from spray.report import render

    with_stages(run_dir, attribute="done", analyze="failed", rank="pending", isolate="pending", verify="pending")
    page = " ".join(
        re.sub(r"<[^>]+>", " ", render(gather(run_dir, dataset, title="t", model="m")).split("<script")[0]).split()
    )
    assert "No verdict: the run failed in stage analyze." in page
    assert "analyze failed: RuntimeError: &lt;b&gt;no&lt;/b&gt; memory" in page
    assert "rank was not reached" in page
    for claim in ("Clever Hans", "No artifact was found", "Every candidate", "turned, control"):
        assert claim not in page


def test_each_class_has_a_light(run_dir, dataset):
    data = gather(run_dir, dataset, title="t", model="m")
    assert [(light.class_name, light.colour) for light in data.lights] == [
        ("star", "red"),
        ("disc", "none"),  # it is in no row of the ranking
        (dataset.classes[2], "green"),
    ]
    assert "60\u202f% turned, control 5\u202f%" in data.lights[0].reason


@pytest.mark.parametrize(
    ("q", "verdict", "colour"),
    [(0.01, None, "amber"), (0.2, None, "green"), (0.01, "no_effect", "amber"), (0.9, "sample_bias", "amber")],
)
def test_a_class_that_stands_out_without_an_artifact_is_amber(q, verdict, colour):
    from spray.report.data import Artifact, RankRow
    from spray.report.lights import lights

    candidates = () if verdict is None else (Artifact("a1", 0, "c", verdict),)
    row = RankRow(1, "c", 9, 2.0, 0.001, class_index=0, q_value=q)
    assert [light.colour for light in lights(["c"], candidates, [row])] == [colour]


@pytest.mark.parametrize(
    ("turned", "p_value", "unusual", "colour"),
    [
        (0.9, 1e-9, True, "amber"),
        (0.9, 1e-9, None, "amber"),
        (0.9, 1e-9, False, "green"),
        (0.3, 1e-9, True, "green"),
        (0.9, 0.2, True, "green"),
        (None, None, True, "green"),
    ],
)
def test_a_class_with_a_candidate_that_moves_much_but_did_not_pass_is_amber(turned, p_value, unusual, colour):
    from spray.report.data import Artifact, RankRow
    from spray.report.lights import lights

    tested = Artifact(
        "a1", 0, "c", "no_effect", flip_rate=turned, control_flip_rate=0.1, p_value=p_value, unusual=unusual
    )
    (light,) = lights(["c"], (tested,), [RankRow(1, "c", 9, 2.0, 0.5, class_index=0, q_value=0.9)])
    assert light.colour == colour
    assert ("a1 did not pass, but moves predictions" in light.reason) == (colour == "amber")


@pytest.mark.parametrize(
    ("sizes", "weights", "most", "expected"),
    [
        ([10, 20], [1, 1], 100, [10, 20]),
        ([100, 100], [1, 1], 50, [25, 25]),
        ([100, 5, 100], [3, 1, 1], 45, [30, 5, 10]),
        ([], [], 10, []),
    ],
)
def test_points_are_shared_out(sizes, weights, most, expected):
    from spray.report.embeddings import allot

    assert allot(sizes, weights, most) == expected


def test_scores_predictions_and_clusterings_come_along(run_dir, dataset):
    star = gather(run_dir, dataset, title="t", model="m").embeddings[0]
    assert set(star.clusterings) == {"kmeans-02", "kmeans-03"}
    score = star.scores["artifact score of star-1"]
    assert score.tolist() == pytest.approx([(2.0 if i in CARRIERS else 0.0) + i / N for i in star.indices])
    with h5py.File(run_dir / "attributions.h5") as file:
        logits = file["prediction"][:][star.indices]
    assert star.predictions.tolist() == logits.argmax(axis=1).tolist()
    lead = logits[:, 1] - np.maximum(logits[:, 0], logits[:, 2])
    assert star.scores["lead of the class's logit"].tolist() == pytest.approx(lead.tolist())


def test_a_sample_that_cannot_be_read_is_grey(run_dir):
    from spray.data.base import UnreadableSampleError

    class Broken(Images):
        def batch(self, indices):
            if 7 in np.asarray(indices):
                raise UnreadableSampleError(7, "gone")
            return super().batch(indices)

    star = gather(run_dir, Broken(), title="t", model="m").embeddings[0]
    grey = star.thumbnails[star.indices.tolist().index(7)]
    assert (grey == 128).all()
    assert not (star.thumbnails[8] == 128).all()


def test_nothing_at_all_still_gives_a_page(tmp_path, dataset):
    from spray.report import render

    data = gather(tmp_path, dataset, title="t", model="m")
    assert data.artifacts is data.models is data.embeddings is data.classes is None
    assert "No verdict yet" in render(data)


def context(run_dir: Path, dataset: ImageDataset) -> SimpleNamespace:
    config = SimpleNamespace(
        dataset=SimpleNamespace(name="image_folder", train="/some where/shapes"),
        model=SimpleNamespace(name="small_cnn", factory="models/mine.py:build"),
        attribution=SimpleNamespace(method="lrp", composite="epsilon_plus_flat", target="label"),
        report=SimpleNamespace(figures=["png"]),
    )
    return SimpleNamespace(
        config=config,
        run_dir=run_dir,
        train=dataset,
        test=dataset,
        log=logging.getLogger("test"),
        progress=lambda iterable, total, what: iterable,
    )


def test_stage_writes_report_and_virelay_project(run_dir, dataset):
    from spray.pipelines.report import STAGE

    plants = read_plants(
        {"kind": "mislabel", "class": "star", "rate": 0.1},
        [{"kind": "box", "class": "all", "size": 4}, {"kind": "tag", "class": "star", "rate": 0.25, "size": 4}],
        dataset.classes,
        dataset.image_shape,
    )
    write_truth(run_dir, plant_all(dataset, plants)[1], dataset)
    facts = STAGE.run(context(run_dir, dataset))
    page = (run_dir / "report.html").read_text()
    told = [
        re.search(rf"{kind} on \d+ training samples\s+\({share}\s*%\) of", page)
        for kind, share in (("Box", 25), ("Tag", 25), ("Mislabel", 10))
    ]
    assert all(told), "all that was planted is named"
    assert [match.start() for match in told] == sorted(match.start() for match in told), "artifacts first"
    assert facts == {"artifacts_found": 1, "bytes": (run_dir / "report.html").stat().st_size}
    assert {path.name for path in (run_dir / "figures").iterdir()} == {
        f"{name}.png" for name in ("ranking", "spectrum", "embedding", "artifacts", "causal_effects", "accuracies")
    }
    assert "image_folder: shapes" in page
    assert "mine.py:build" in page
    assert "Known, because it was planted" in page
    assert "moon &amp; &lt;i&gt;sun" in page
    assert "<i>sun" not in page
    project = (run_dir / "virelay" / "project.yaml").read_text()
    # Of one channel: three of them are exported, which all of ViRelAy's colour maps can draw.
    assert "    - attributions.h5" in project
    assert "attribution_method: lrp_epsilon_plus_flat" in project


def test_failure_has_its_report_and_hides_nothing(run_dir, dataset):
    from spray.pipelines.report import report_failure

    where = context(run_dir, dataset)
    report_failure(where)
    assert not (run_dir / "report.html").exists(), "nothing failed"
    with_stages(run_dir, attribute="done", analyze="failed", isolate="pending")
    report_failure(where)
    assert "the run failed in stage analyze" in (run_dir / "report.html").read_text()
    (run_dir / "run.json").write_text("{")
    report_failure(where)  # what can't be told doesn't take the place of the failure


def test_stage_leaves_out_virelay_where_it_cannot_show_the_images(tmp_path):
    from spray.pipelines.report import STAGE

    STAGE.run(context(tmp_path, Images(channels=2)))
    assert (tmp_path / "report.html").is_file()
    assert not (tmp_path / "virelay").exists()


def test_quarantined_samples_are_told_with_their_reason(run_dir, dataset):
    (run_dir / "quarantined.csv").write_text(
        'sample_index,name,reason\n3,"a, b.png","ValueError: no"\n,left_out.png,truncated\n'
    )
    data = gather(run_dir, dataset, title="t", model="m")
    assert data.skipped_samples == ("star/broken.png: truncated file", "a, b.png (sample 3): ValueError: no")
