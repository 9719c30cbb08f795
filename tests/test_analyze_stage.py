"""The analyze stage on files whose truth is known: groups, sources, clusterings, damage, determinism."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score
from threadpoolctl import threadpool_limits
from torch import nn

from spray.analysis.clustering import CLUSTERINGS
from spray.errors import UserError
from spray.pipelines import analyze
from spray.pipelines.analysis_options import check_analysis, clusterings_of
from spray.pipelines.config import SprayConfig
from spray.pipelines.context import Context
from spray.pipelines.plan import written_bytes
from spray.store.analyses import open_analysis

CLASSES = ("cat", "dog", "eel")
N, SIDE = 180, 12
BROKEN = 7  # a sample that could not be explained
LABELS = np.arange(N) % 3
PREDICTED = np.where(np.arange(N) < 60, 1, LABELS)
TAGGED = (LABELS == 0) & (np.arange(N) % 9 == 0)

Stage = Callable[..., Path]


def write(path: Path) -> None:
    """Write a foreign file: heatmaps with a spot in class 0, and a layer in which class 1 falls into halves."""
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(N, 2, SIDE, SIDE)).astype(np.float32)
    maps[TAGGED, :, 1:4, 1:4] += 8
    layer = rng.normal(size=(N, 10)).astype(np.float32) + 3
    layer[(LABELS == 1) & (np.arange(N) % 2 == 0), 4] += 30
    maps[BROKEN] = layer[BROKEN] = 0
    logits = np.eye(3, dtype=np.float32)[PREDICTED] + 0.1 * rng.random((N, 3)).astype(np.float32)
    with h5py.File(path, "w") as file:
        for name, values in (("attribution", maps), ("layer/inner.1", layer)):
            file.create_dataset(name, data=values, chunks=(10, *values.shape[1:]), fletcher32=True)
        file["label"], file["prediction"] = LABELS, logits
        file["valid"] = np.arange(N) != BROKEN


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """The stage with options of the analysis; returns the file that it has written."""
    write(tmp_path / "attributions.h5")
    monkeypatch.setattr(Context, "train", property(lambda self: Data()))

    def run(**options: Any) -> Path:
        config = SprayConfig(device="cpu")
        config.analysis.umap = False
        for key, value in options.items():
            setattr(config.analysis, key, value)
        config.attribution.layer = ["inner.1"]
        check_analysis(config)
        analyze.run(Context(config, tmp_path, logging.getLogger("spray.test")))
        return tmp_path / "analysis.h5"

    return run


class Data:
    classes, labels, image_shape = CLASSES, LABELS, (2, SIDE, SIDE)

    def __len__(self) -> int:
        return N


def contents(path: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}

    def keep(name: str, item: h5py.HLObject) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = item[()].tobytes()

    with h5py.File(path) as file:
        file.visititems(keep)
    return found


def test_a_group_for_each_class_in_the_layout_of_the_contract(stage: Stage) -> None:
    with open_analysis(stage(), N) as analysis:
        assert analysis.names == ["00000000", "00000001", "00000002"]
        for c in range(3):
            group = analysis.group(c)
            assert group.index.tolist() == np.flatnonzero(c == LABELS).tolist()
            assert group.clusterings == [f"kmeans-0{k}" for k in range(2, 9)]
            assert group.embeddings == ["spectral"]
            eigenvalues = group.eigenvalues()
            assert (np.diff(eigenvalues) <= 1e-6).all()
            assert group.embedding().shape == (60, len(eigenvalues)) == (60, 32)
        labels = analysis.group(0).labels("kmeans-02")
        assert adjusted_rand_score(TAGGED[LABELS == 0], labels) == 1
        # Not explained: noise, at the origin.
        broken = analysis.group(1)
        at = broken.index.tolist().index(BROKEN)
        assert {int(broken.labels(name)[at]) for name in broken.clusterings} == {-1}
        assert not broken.embedding()[at].any()
        assert (np.delete(broken.labels("kmeans-02"), at) >= 0).all()


def test_options_are_kept_with_the_results(stage: Stage) -> None:
    path = stage(steps=["sum", {"pool": 6}, "normalize_l2"], metric="cosine", clusterings=[{"dbscan": {"eps": 0.2}}])
    with h5py.File(path) as file:
        assert json.loads(file.attrs["steps"]) == ["sum", {"pool": 6}, "normalize_l2"]
        assert (file.attrs["metric"], file.attrs["source"], file.attrs["seed"]) == ("cosine", "attribution", 0)
        assert set(file.attrs) == {*vars(SprayConfig().analysis), "seed"}
        group = file["00000001"]
        assert (group.attrs["class_name"], group.attrs["kind"]) == ("dog", "class")
        assert group.attrs["used"] == 59
        labels = group["cluster/dbscan-eps=0.2"]
        assert json.loads(labels.attrs["options"]) == {"eps": 0.2}
        assert labels.attrs["embedding"] == "spectral"
        assert labels.attrs["k"] == max(2, group.attrs["eigengap"])


def test_the_predicted_class_and_the_whole_set(stage: Stage) -> None:
    path = stage(groups=["all", "predicted", "class"], clusterings=["kmeans", "hdbscan"], n_clusters=[2])
    explained = np.arange(N) != BROKEN
    with open_analysis(path, N) as analysis:
        assert analysis.classes == [0, 1, 2]
        assert analysis.names == [
            *(f"0000000{c}" for c in range(3)),
            "all",
            *(f"predicted-0000000{c}" for c in range(3)),
        ]
        for c in range(3):
            expected = np.flatnonzero((c == PREDICTED) & explained)
            assert analysis.group(f"predicted-0000000{c}").index.tolist() == expected.tolist()
        assert analysis.group("all").index.tolist() == np.flatnonzero(explained).tolist()
        # What ViRelAy asks of every group at the top: the same parts.
        assert {tuple(analysis.group(name).clusterings) for name in analysis.names} == {("hdbscan", "kmeans-02")}
    alone = contents(stage(groups=["class"], clusterings=["kmeans", "hdbscan"], n_clusters=[2]))
    assert len(alone) == 12
    assert stage(groups=["predicted"]).is_file()
    with open_analysis(path) as analysis:
        assert analysis.classes == []


def test_groups_of_classes_are_the_same_whatever_else_is_analyzed(stage: Stage) -> None:
    alone = contents(stage())
    together = contents(stage(groups=["predicted", "class", "all"]))
    assert {name: together[name] for name in alone} == alone


def test_every_clustering_and_picture_is_written_for_every_group(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analyze, "project", lambda vectors, name, seed: vectors[:, 1:3])
    path = stage(clusterings=[*CLUSTERINGS.names(), {"hdbscan": 5}], n_clusters=[2, 12], umap=True, tsne=True)
    names = [f"{method}-{k}" for method in ("agglomerative", "kmeans") for k in ("02", "12")]
    names = sorted([*names, "dbscan", "hdbscan", "hdbscan-min_cluster_size=5"])
    with open_analysis(path, N) as analysis:
        for c in analysis.classes:
            group = analysis.group(c)
            assert group.clusterings == names
            assert group.embeddings == ["spectral", "tsne", "umap"]
            assert group.embedding("tsne").shape == (60, 2)
            for name in names:
                assert group.labels(name).min() >= -1
        assert set(analysis.group(0).labels("kmeans-12")) == set(range(12))


def test_an_inner_layer_is_analyzed_as_heatmaps_are(stage: Stage) -> None:
    path = stage(source="inner.1", steps=["normalize_l2"])
    with open_analysis(path, N) as analysis:
        group = analysis.group(1)
        labels, used = group.labels("kmeans-02"), group.index != BROKEN
    assert adjusted_rand_score((np.flatnonzero(LABELS == 1) % 2 == 0)[used], labels[used]) == 1
    with pytest.raises(UserError, match=r"steps\[0\]=sum needs heatmaps, not vectors of 10 values; leave it out"):
        stage(source="inner.1")


def test_the_same_bytes_again_and_with_another_number_of_threads(stage: Stage) -> None:
    options = {"clusterings": CLUSTERINGS.names(), "groups": ["class", "all"], "steps": ["sum", {"pca": 20}]}
    with threadpool_limits(1):
        first = contents(stage(**options))
    with threadpool_limits(2):
        assert contents(stage(**options)) == first


def test_the_plan_knows_the_size(stage: Stage, tmp_path: Path) -> None:
    options = {"groups": ["class", "all"], "clusterings": ["kmeans", "hdbscan"], "n_clusters": [2, 3]}
    with h5py.File(stage(**options)) as file:
        written: list[int] = []
        file.visititems(lambda name, item: written.append(item.nbytes) if isinstance(item, h5py.Dataset) else None)
    config = SprayConfig()
    config.analysis = replace(config.analysis, umap=False, **options)
    planned = written_bytes(Context(config, tmp_path, logging.getLogger("spray.test")), ["analyze"], nn.Identity())
    assert planned["analysis.h5"] == pytest.approx(sum(written), rel=0.01)  # but for the one that isn't explained


def test_too_few_samples_make_a_group_of_the_same_form(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    with h5py.File(stage().with_name("attributions.h5"), "a") as file:
        file["attribution"][...] = file["attribution"][:] * ((LABELS != 2) | (np.arange(N) < 9))[:, None, None, None]
    with caplog.at_level(logging.WARNING, "spray"):
        path = stage(clusterings=["kmeans", "dbscan"])
    assert "group 'eel' has fewer than 5 heatmaps" in caplog.text
    with open_analysis(path, N) as analysis:
        few, other = analysis.group(2), analysis.group(0)
        assert (few.clusterings, few.embeddings) == (other.clusterings, other.embeddings)
        assert not few.labels("dbscan").any()
        assert few.embedding().shape == (60, 2)


def test_damage_is_told_and_leaves_no_file(stage: Stage, tmp_path: Path) -> None:
    path = tmp_path / "attributions.h5"
    with h5py.File(path) as file:
        places = [file[name].id.get_chunk_info(3).byte_offset for name in ("layer/inner.1", "attribution")]
    whole = path.read_bytes()
    for place, options in zip(places, ({"source": "inner.1", "steps": ["normalize_l2"]}, {}), strict=True):
        data = bytearray(whole)
        data[place + 2] ^= 1
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"attributions\.h5 is damaged: rows 30 to 39 of /"):
            stage(**options)
    path.write_bytes(whole)
    with h5py.File(path, "a") as file:
        file["attribution"][50, 1, 2, 2] = np.nan
    with pytest.raises(UserError, match=r"attributions\.h5 is damaged: row 50 of /attribution holds NaN"):
        stage()
    with h5py.File(path, "a") as file:
        del file["layer/inner.1"]
    with pytest.raises(UserError, match=r"has no /layer/inner\.1"):
        stage(source="inner.1", steps=["normalize_l2"])
    path.unlink()
    with pytest.raises(UserError, match="does not exist"):
        stage()
    assert [file.name for file in tmp_path.iterdir()] == []


def test_features_that_memory_has_no_room_for_are_refused(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(available=2 * 60 * SIDE**2 * 4 - 1)
    monkeypatch.setattr(analyze.psutil, "virtual_memory", lambda: memory)
    with pytest.raises(UserError, match=r"leave 144 values of each of 60 samples, .* more than half of the free"):
        stage()
    assert stage(grid=11).is_file()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"clusterings": ["kmean"]}, r"clusterings\[0\]: unknown clustering 'kmean' \(did you mean 'kmeans'"),
        ({"clusterings": []}, "clusterings=.. is empty"),
        ({"clusterings": ["kmeans", "kmeans"]}, "makes kmeans-02 twice"),
        ({"clusterings": [{"kmeans": {"n_clusters": 3}}]}, "kmeans has no option 'n_clusters'; allowed: starts"),
        ({"clusterings": ["hdbscan", {"dbscan": -0.5}]}, r"clusterings\[1\]: dbscan.eps=-0.5 is out of range"),
        ({"clusterings": [{"dbscan": "wide"}]}, "dbscan.eps='wide' has the wrong type; it has to be float or null"),
        ({"clusterings": [{"hdbscan": 1}]}, "hdbscan.min_cluster_size=1 is out of range"),
        ({"groups": []}, "analysis.groups=.. must hold some of class, predicted, all"),
        ({"groups": ["class", "klass"]}, "analysis.groups"),
        ({"groups": ["all", "all"]}, "each once"),
        ({"n_clusters": [1, 2]}, "analysis.n_clusters"),
        (
            {"source": "inner.2"},
            "analysis.source=inner.2 isn't stored; analysis.source has to be attribution or",
        ),
        ({"steps": ["summ"]}, r"analysis.steps\[0\]: unknown step 'summ'"),
    ],
)
def test_mistakes_are_told_before_anything_is_read(stage: Stage, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        stage(**options)


def test_stages_that_work_on_classes_need_their_groups() -> None:
    config = SprayConfig()
    config.analysis.groups = ["all"]
    check_analysis(config, ["train", "attribute", "analyze", "report"])
    with pytest.raises(UserError, match="leaves out class, but rank and isolate work on the groups of classes"):
        check_analysis(config, ["analyze", "rank", "isolate"])


def test_names_of_clusterings_say_their_options() -> None:
    config = SprayConfig().analysis
    config.clusterings = [{"dbscan": 0.5}, {"dbscan": {"eps": 1, "min_samples": 9}}, {"agglomerative": 4}]
    config.n_clusters = [3, 11]
    assert [clustering.name for clustering in clusterings_of(config)] == [
        "dbscan-eps=0.5",
        "dbscan-eps=1.0-min_samples=9",
        "agglomerative-n_neighbors=4-03",
        "agglomerative-n_neighbors=4-11",
    ]
