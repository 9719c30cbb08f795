"""The exported project against ViRelAy 0.6.1's schema, read independently, and against ViRelAy itself."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml

from spray import virelay
from spray.data.base import ImageDataset

CLASSES = ("cat", "<b>dög</b> \u202e😀", "tree: - 'x'")


class Images(ImageDataset):
    """Seventeen small random images."""

    def __init__(self, channels: int = 1) -> None:
        rng = np.random.default_rng(0)
        self.pixels = rng.random((17, channels, 12, 10)).astype(np.float32)
        self.classes = CLASSES
        self.labels = np.arange(17) % 3
        self.names = [f"{i}.png" for i in range(17)]
        self.image_shape = (channels, 12, 10)
        self.fingerprint = "x"

    def batch(self, indices):
        return torch.from_numpy(self.pixels[indices])


def write_run(folder: Path, dataset: ImageDataset) -> None:
    """Write attributions and analysis as the stages of a run do."""
    rng = np.random.default_rng(1)
    with h5py.File(folder / "attributions.h5", "w") as file:
        file["attribution"] = rng.normal(size=(len(dataset), *dataset.image_shape)).astype(np.float32)
        file["label"] = dataset.labels.astype(np.int64)
        file["prediction"] = rng.normal(size=(len(dataset), 3)).astype(np.float32)
    with h5py.File(folder / "analysis.h5", "w") as file:
        for index in range(3):
            members = np.flatnonzero(dataset.labels == index)
            group = file.create_group(f"{index:08d}")
            group.attrs["class_name"] = CLASSES[index]
            group["index"] = members.astype(np.uint32)
            group["embedding/spectral"] = rng.normal(size=(len(members), 4)).astype(np.float32)
            group["embedding/spectral"].attrs["eigenvalue"] = np.float32([0.9, 0.4, 0.1, 0.0])
            group["embedding/umap"] = rng.normal(size=(len(members), 2)).astype(np.float32)
            group["cluster/kmeans-02"] = (np.arange(len(members)) % 2).astype(np.int32)


def violations(path: Path) -> list[str]:
    """Check a project by the rules of ViRelAy 0.6.1's loader; return what it could not open."""
    project = yaml.safe_load(path.read_text(encoding="utf-8"))["project"]
    found = [f"project lacks {key}" for key in ("name", "model", "label_map", "dataset") if key not in project]
    labels = json.loads((path.parent / project["label_map"]).read_text(encoding="utf-8"))
    found += [f"label {row}" for row in labels if set(row) != {"index", "word_net_id", "name"}]
    with h5py.File(path.parent / project["dataset"]["path"]) as file:
        shape = file["data"].shape
        if file["data"].dtype != np.uint8 or shape[1] != 3 or int(np.argmin(shape[1:])) != 0:
            found.append(f"data {file['data'].dtype} {shape}")
        if file["label"].dtype.kind not in "iu" or file["label"].shape != shape[:1]:
            found.append(f"label {file['label'].dtype}")
    for source in project.get("attributions", {}).get("sources", []):
        with h5py.File(path.parent / source) as file:
            rows = file["attribution"].shape
            if len(rows) != 4 or rows[1] not in (1, 3) or rows[0] != shape[0]:
                found.append(f"attribution {rows}")
            if "index" in file or file["label"].dtype.kind not in "iu" or file["prediction"].ndim != 2:
                found.append("attribution file")
    ids = {row["word_net_id"] for row in labels}
    for analysis in project.get("analyses", []):
        if "-" in analysis["analysis_method"]:
            found.append("hyphen in the analysis method")
        for source in analysis["sources"]:
            with h5py.File(path.parent / source) as file:
                found += [f"category {name}" for name in file if name not in ids]
                found += [
                    f"{name} lacks {part}"
                    for name in file
                    for part in ("index", "embedding", "cluster")
                    if part not in file[name]
                ]
    return found


def export(folder: Path, channels: int = 1) -> Path:
    dataset = Images(channels)
    write_run(folder, dataset)
    return virelay.export(
        folder / "virelay",
        dataset,
        title="Tagged: cats & dogs",
        model="small_cnn",
        attributions=folder / "attributions.h5",
        analysis=folder / "analysis.h5",
        analysis_method="spectral-clusters",
        batch_size=5,
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_project_follows_the_schema(tmp_path, channels):
    path = export(tmp_path, channels)
    assert violations(path) == []
    # ViRelAy can't draw all heatmaps of one channel.
    assert sorted(file.name for file in path.parent.iterdir()) == [
        *(["attributions.h5"] if channels == 1 else []),
        "dataset.h5",
        "label-map.json",
        "project.yaml",
    ]


@pytest.mark.parametrize("channels", [1, 3])
def test_every_sample_is_written_once_and_in_order(tmp_path, channels):
    export(tmp_path, channels)
    dataset = Images(channels)
    with h5py.File(tmp_path / "virelay" / "dataset.h5") as file:
        assert file["label"][:].tolist() == dataset.labels.tolist()
        for channel in range(3):
            expected = dataset.pixels[:, channel if channels == 3 else 0] * 255
            assert np.abs(file["data"][:, channel] - expected).max() <= 0.5


def test_heatmaps_of_one_channel_are_copied_with_three(tmp_path):
    path = export(tmp_path, 1)
    with h5py.File(path.parent / "attributions.h5") as copy, h5py.File(tmp_path / "attributions.h5") as file:
        assert copy["attribution"].shape == (17, 3, 12, 10)
        np.testing.assert_array_equal(copy["attribution"][:].sum(axis=1, keepdims=True), file["attribution"][:])
        for name in ("label", "prediction"):
            np.testing.assert_array_equal(copy[name][:], file[name][:])


def test_very_large_heatmaps_of_one_channel_are_not_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(virelay, "LARGEST_COPY", 17 * 12 * 10 * 4 - 1)
    path = export(tmp_path, 1)
    assert not (path.parent / "attributions.h5").exists()
    assert yaml.safe_load(path.read_text())["project"]["attributions"]["sources"] == ["../attributions.h5"]


def test_class_names_survive_the_label_map(tmp_path):
    path = export(tmp_path)
    labels = json.loads((path.parent / "label-map.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in labels] == list(CLASSES)


def test_missing_results_are_left_out(tmp_path):
    path = virelay.export(tmp_path / "virelay", Images(), title="t", model="m")
    project = yaml.safe_load(path.read_text(encoding="utf-8"))["project"]
    assert "attributions" not in project
    assert "analyses" not in project
    assert violations(path) == []


def test_images_that_virelay_cannot_show_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not 2 channels"):
        virelay.export(tmp_path, Images(2), title="t", model="m")
    assert not list(tmp_path.iterdir())
