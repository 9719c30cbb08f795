"""Projects of ViRelAy and CoRelAy are read and ranked: written by hand after the schema, by spray, and by CoRelAy."""

from __future__ import annotations

import json
import os
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml
from PIL import Image
from small import run

from spray.errors import UserError
from spray.storage import read_json
from spray.store import open_attributions
from spray.virelay_heatmaps import write_attributions
from spray.virelay_project import read_project

N, SIDE = 60, 12
NUMBERS = np.array([3, 7])
"""What the label map calls the two classes; it has more."""
rng = np.random.default_rng(7)
LABELS = np.arange(N) % 2
TAGGED = np.flatnonzero(LABELS == 1)[:10]
"""Samples of the second class whose relevance is in a corner."""
IMAGES = rng.integers(0, 256, (N, SIDE, SIDE, 3)).astype(np.uint8)


def heatmaps() -> np.ndarray:
    """Return relevance (N, C, H, W): noise around a centre, or in a corner."""
    R = np.random.default_rng(8).normal(0, 0.05, (N, 3, SIDE, SIDE)).astype(np.float32)
    R[:, :, 5:8, 5:8] += 1
    R[TAGGED] = np.roll(R[TAGGED], (-5, -5), (2, 3))
    return R


def write_project(folder: Path, **changes: Any) -> Path:
    """Write a project as the schema allows it, in a way that spray's own export never does."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = [f"n{index:08d}" for index in range(9)]
    rows = [{"index": i, "word_net_id": ids[i], "name": f"kind {i}"} for i in range(9)]
    (folder / "labels.json").write_text(json.dumps(rows))
    with h5py.File(folder / "images.h5", "w") as file:
        file["data"] = (IMAGES / 127.5 - 1).astype(np.float32)  # channels last, in [-1, 1]
        file["label"] = changes.get("labels", NUMBERS[LABELS]).astype(np.int32)
    R = heatmaps()
    outputs = np.zeros((N, 9), np.float32)
    outputs[np.arange(N), NUMBERS[LABELS]] = 5
    order = np.random.default_rng(9).permutation(N)
    for name, part in (("one.h5", order[:35]), ("two.h5", order[30:])):
        with h5py.File(folder / name, "w") as file:
            file["attribution"] = np.moveaxis(R[part], 1, -1)
            file["index"] = part.astype(np.uint32)
            file["label"] = np.eye(9, dtype=bool)[NUMBERS[LABELS[part]]]  # n-hot
            file["prediction"] = outputs[part]
    with h5py.File(folder / "clusters.h5", "w") as file:
        for number, members in ((3, LABELS == 0), (7, LABELS == 1)):
            index = np.random.default_rng(number).permutation(np.flatnonzero(members))
            group = file.create_group(ids[number])
            group["index"] = index.astype(np.uint32)
            group["embedding/spectral"] = np.random.default_rng(0).normal(size=(len(index), 3)).astype(np.float32)
            group["embedding/spectral"].attrs["eigenvalue"] = np.float32([0.9, 0.5, 0.0])
            labels = np.isin(index, TAGGED) if number == 7 else np.arange(len(index)) % 2
            group["cluster/kmeans-02"] = labels.astype(np.uint8)
            group["cluster/train_split"] = np.ones(len(index), bool)
        file["all/index"] = np.arange(N, dtype=np.uint32)
        file["all/embedding/spectral"] = np.zeros((N, 2), np.float32)
        file["all/cluster/kmeans-02"] = np.zeros(N, np.int32)
    project = {
        "name": "by hand",
        "model": "unknown",
        "label_map": "labels.json",
        "dataset": {"name": "noise", "type": "hdf5", "path": "images.h5"},
        "attributions": {
            "attribution_method": "some rule",
            "attribution_strategy": "true_label",
            "sources": ["one.h5", "two.h5"],
        },
        "analyses": [{"analysis_method": "spectral", "sources": ["clusters.h5"]}],
    }
    (folder / "project.yaml").write_text(yaml.safe_dump({"project": project | changes.get("project", {})}))
    return folder / "project.yaml"


def ranked(project: Path, run_dir: Path, *options: str) -> dict[str, Any]:
    outcome = run("experiment=virelay", f"dataset.train={project}", f"run_dir={run_dir}", "report.figures=[]", *options)
    assert outcome.code == 0, outcome.err + outcome.out
    return dict(read_json(run_dir / "ranking.json"))


def test_images_and_heatmaps_are_those_of_the_project(tmp_path):
    project = read_project(write_project(tmp_path))
    images = project.images()
    assert images.classes == ("kind 3", "kind 7")
    assert images.labels.tolist() == LABELS.tolist()
    # Rounded twice, to floats in [-1, 1] and back.
    np.testing.assert_allclose(images.batch(np.arange(N)).permute(0, 2, 3, 1).numpy() * 255, IMAGES, atol=1e-3)
    assert write_attributions(project, images, tmp_path / "out.h5") == N
    with open_attributions(tmp_path / "out.h5", shape=(N, 3, SIDE, SIDE)) as written:
        np.testing.assert_array_equal(written.attribution[:], heatmaps())
        assert written.label[:].tolist() == LABELS.tolist()
        np.testing.assert_array_equal(written.prediction[:], 5 * np.eye(2)[LABELS])
        assert written.valid.all()


def test_a_project_is_ranked(tmp_path):
    rows = ranked(write_project(tmp_path / "project"), tmp_path / "run")
    assert rows["classes"][0]["class_name"] == "kind 7"
    best = rows["clusters"][0]
    assert (best["class_index"], best["size"]) == (1, len(TAGGED))
    with h5py.File(tmp_path / "run" / "analysis.h5") as analysis:
        assert list(analysis) == ["00000000", "00000001"]
        assert list(analysis["00000001/cluster"]) == ["kmeans-02"]
        np.testing.assert_allclose(analysis["00000001/embedding/spectral"].attrs["eigenvalue"], [0.9, 0.5, 0.0])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "by hand" in page
    again = run("experiment=virelay", f"dataset.train={tmp_path / 'project'}/project.yaml", "report.figures=[]",
                f"run_dir={tmp_path / 'run'}")  # fmt: skip
    assert again.out.count("up to date") == 4


def test_heatmaps_can_be_clustered_anew(tmp_path):
    anew = "dataset.options={analysis: none}"
    rows = ranked(write_project(tmp_path / "project"), tmp_path / "run", anew, "analysis.umap=false")
    best = rows["clusters"][0]
    assert (best["class_index"], best["size"]) == (1, len(TAGGED))
    with h5py.File(tmp_path / "run" / "analysis.h5") as analysis:
        assert "kmeans-08" in analysis["00000001/cluster"]


def test_an_image_directory(tmp_path):
    root = tmp_path / "project" / "pictures"
    for index in range(N):
        path = root / f"{NUMBERS[LABELS[index]]}" / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(IMAGES[index]).save(path)
    # Sorted by path: all of one class first.
    order = np.argsort(LABELS, kind="stable")
    dataset = {
        "name": "x", "type": "image_directory", "path": "pictures", "input_width": SIDE, "input_height": SIDE,
        "down_sampling_method": "none", "up_sampling_method": "none",
        "label_index_regex": r".*/(\d+)/[^/]+\.png", "label_word_net_id_regex": None,
    }  # fmt: skip
    images = read_project(write_project(tmp_path / "project", project={"dataset": dataset})).images()
    assert images.labels.tolist() == LABELS[order].tolist()
    np.testing.assert_array_equal(np.rint(images.batch(np.arange(N)).permute(0, 2, 3, 1).numpy() * 255), IMAGES[order])


def test_what_spray_exports_can_be_read(tmp_path):
    from test_virelay import CLASSES, Images, export

    project, dataset = read_project(export(tmp_path, 1)), Images(1)
    images = project.images()
    assert len(images.classes) == len(CLASSES)
    expected = np.broadcast_to(dataset.pixels, (17, 3, 12, 10))
    np.testing.assert_allclose(images.batch(np.arange(17)).numpy(), expected, atol=0.5 / 255 + 1e-6)
    assert write_attributions(project, images, tmp_path / "out.h5") == 17


@pytest.mark.parametrize(
    ("break_", "message"),
    [
        (lambda f: (f / "project.yaml").unlink(), "there is no file"),
        (lambda f: (f / "project.yaml").write_text("a: [b"), "is no YAML"),
        (lambda f: (f / "project.yaml").write_text("- 1"), "is no project of ViRelAy"),
        (lambda f: write_project(f, project={"attributions": {"sources": []}}), "sources must be a list"),
        (lambda f: write_project(f, project={"attributions": None}), "project.attributions is no mapping"),
        (lambda f: write_project(f, project={"analyses": []}), "has no analyses"),
        (lambda f: (f / "labels.json").write_text('[{"index": 3}]'), "is no label map"),
        (lambda f: (f / "two.h5").write_bytes(b"x" * 999), "is not an HDF5 file"),
        (lambda f: write_project(f, labels=np.full(N, 3)), "one class only"),
        (lambda f: write_project(f, labels=np.full(N, 99)), "the label 99"),
        (lambda f: write_project(f, labels=NUMBERS[1 - LABELS]), "are they of other data"),
        (lambda f: write_project(f, labels=np.ones((N, 9), bool)), "several labels"),
        (lambda f: write_project(f, labels=NUMBERS[LABELS][:-1]), "60 images, but 59 labels"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, break_, message):
    folder = tmp_path / "project"
    write_project(folder)
    break_(folder)
    outcome = run("experiment=virelay", f"dataset.train={folder}/project.yaml", f"run_dir={tmp_path / 'run'}")
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("name", ["one.h5", "images.h5", "clusters.h5"])
def test_nothing_outside_of_a_file_is_read(tmp_path, name):
    path = write_project(tmp_path / "project")
    with h5py.File(tmp_path / "elsewhere.h5", "w") as file:
        file["secret"] = np.zeros(3)
    with h5py.File(path.parent / name, "a") as file:
        file["more"] = h5py.ExternalLink(str(tmp_path / "elsewhere.h5"), "secret")
    outcome = run("experiment=virelay", f"dataset.train={path}", f"run_dir={tmp_path / 'run'}")
    assert outcome.code == 2
    assert "is a link to another file" in outcome.err


@pytest.mark.parametrize("options", [["stages=[rank,isolate]"], ["dataset.per_class=3"], ["dataset.plant.kind=tag"]])
def test_what_needs_a_model_or_other_samples_is_refused(tmp_path, options):
    path = write_project(tmp_path / "project")
    outcome = run("experiment=virelay", f"dataset.train={path}", f"run_dir={tmp_path / 'run'}", *options)
    assert outcome.code == 2
    assert "project" in outcome.err


def test_unknown_analysis(tmp_path):
    with pytest.raises(UserError, match="it has: spectral"):
        read_project(write_project(tmp_path)).analysis("other")


CORELAY = os.environ.get("SPRAY_TEST_CORELAY_PYTHON")
SCRIPT = """
    import sys, h5py, numpy as np
    from corelay.pipeline.spectral import SpectralClustering
    from corelay.processor.clustering import KMeans
    from corelay.processor.embedding import EigenDecomposition
    from corelay.processor.flow import Parallel
    folder = sys.argv[1]
    R, index, label = [], [], []
    for name in ("one.h5", "two.h5"):
        with h5py.File(f"{folder}/{name}") as file:
            R.append(file["attribution"][:]); index.append(file["index"][:]); label.append(file["label"][:])
    R, index, label = (np.concatenate(parts) for parts in (R, index, label))
    index, first = np.unique(index, return_index=True)
    R, label = R[first], label[first].argmax(axis=1)
    with h5py.File(f"{folder}/clusters.h5", "w") as file:
        for number in (3, 7):
            chosen = label == number
            pipeline = SpectralClustering(
                embedding=EigenDecomposition(n_eigval=8, is_output=True),
                clustering=Parallel([KMeans(n_clusters=k) for k in (2, 3)], broadcast=True, is_output=True),
            )
            (eigenvalues, embedding), clusterings = pipeline(R[chosen].reshape(chosen.sum(), -1).astype(np.float64))
            group = file.create_group(f"n{number:08d}")
            group["index"] = index[chosen].astype(np.uint32)
            group["embedding/spectral"] = embedding.astype(np.float32)
            group["embedding/spectral"].attrs["eigenvalue"] = np.float32(eigenvalues)
            for k, found in zip((2, 3), clusterings):
                group[f"cluster/kmeans-{k:02d}"] = np.asarray(found)
"""


@pytest.mark.slow
@pytest.mark.skipif(not CORELAY, reason="SPRAY_TEST_CORELAY_PYTHON names no interpreter with corelay")
def test_an_analysis_of_corelay_is_ranked(tmp_path):
    path = write_project(tmp_path / "project")
    subprocess.run([str(CORELAY), "-c", textwrap.dedent(SCRIPT), str(path.parent)], check=True, timeout=300)
    best = ranked(path, tmp_path / "run")["clusters"][0]
    assert (best["class_index"], best["size"]) == (1, len(TAGGED))
