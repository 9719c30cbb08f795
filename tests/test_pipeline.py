"""A whole run with the real stages on real images: every file and field of the contract, resume, determinism."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import small
import torch
import yaml
from PIL import Image
from torch import nn
from torchvision import transforms
from torchvision.datasets import ImageFolder

from spray import explain
from spray.pipelines.stages import NAMES

CLASSES = ("coffee", "skin", "stone")
PLANTED = 1
N, SIDE = 3 * small.TRAIN, small.SIDE
METHODS = ("fine_tuned", "a_clarc", "p_clarc")
SHARES = ("clean_accuracy", "attacked_accuracy", "attacked_to_class", "artifact_relevance", "worst_class_accuracy")
OPTIONS = (
    "experiment=image_folder",
    f"dataset.image_size={SIDE}",
    "dataset.plant.kind=box",
    "dataset.plant.class=skin",
    "dataset.plant.rate=0.4",
    "dataset.plant.size=5",
    "dataset.plant.jitter=1",
    "model.epochs=30",
    "model.learning_rate=5e-3",
    "model.batch_size=16",
    "correction.epochs=6",
    "device=cpu",
)


@dataclass
class Run:
    options: list[str]
    folder: Path
    dir: Path
    said: small.Outcome

    def json(self, name: str) -> Any:
        return json.loads((self.dir / name).read_text())

    def again(self, *more: str, run_dir: Path | None = None) -> small.Outcome:
        return small.run(*self.options, f"run_dir={run_dir or self.dir}", *more)

    def images(self, part: str) -> ImageFolder:
        """The images as torchvision reads them, normalised as the configuration says."""
        prepare = [
            transforms.Resize(SIDE),
            transforms.CenterCrop(SIDE),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
        return ImageFolder(str(self.folder / part), transforms.Compose(prepare))

    def model(self, weights: str) -> nn.Module:
        spec = importlib.util.spec_from_file_location("my_model", self.folder / "my_model.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model = module.build(len(CLASSES))
        model.load_state_dict(torch.load(self.dir / weights, weights_only=True))
        return model.eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("whole")
    options = [
        *OPTIONS,
        *small.write_images(folder, dict.fromkeys(CLASSES, small.TRAIN), dict.fromkeys(CLASSES, small.TEST)),
        f"model.factory={small.write_model(folder)}:build",
    ]
    (folder / "train/coffee/900.png").write_bytes((folder / "train/coffee/000.png").read_bytes()[:600])
    (folder / "test/stone/901.jpg").write_text("not an image")
    said = small.run(*options, f"run_dir={folder / 'run'}")
    assert (said.code, said.err) == (0, "")
    return Run(options, folder, folder / "run", said)


def good_images(images: ImageFolder) -> list[int]:
    return [i for i, (path, _) in enumerate(images.samples) if not Path(path).name.startswith("90")]


def in_range(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def test_run_json(run: Run) -> None:
    record = run.json("run.json")
    assert list(record["stages"]) == list(NAMES)
    for stage in record["stages"].values():
        assert stage["status"] == "done"
        assert stage["seconds"] >= 0
        assert re.fullmatch("[0-9a-f]{64}", stage["key"])
    assert (record["seed"], record["device"]) == (0, "cpu")
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert "git_sha" in record
    assert {"dataset.train", "dataset.test", "model.factory"} == set(record["inputs"])
    config = yaml.safe_load((run.dir / ".hydra/config.yaml").read_text())
    assert config["dataset"]["plant"]["class"] == "skin"


def test_files_that_cannot_be_read_are_named(run: Run) -> None:
    log, report = (run.dir / "run.log").read_text(), (run.dir / "report.html").read_text()
    for name in ("coffee/900.png", "stone/901.jpg"):
        assert name in log
        assert name in run.said.out
        assert name in report


def test_attributions(run: Run) -> None:
    images = run.images("train")
    rows = good_images(images)
    with h5py.File(run.dir / "attributions.h5") as file:
        relevance, label, prediction = (file[name][:] for name in ("attribution", "label", "prediction"))
    assert relevance.shape == (N, 3, SIDE, SIDE)
    assert relevance.dtype == np.float32
    assert np.isfinite(relevance).all()
    assert label.tolist() == [images.targets[row] for row in rows]
    assert prediction.shape == (N, len(CLASSES))
    # Row i is training sample i of torchvision's ImageFolder; images of the planted class were changed.
    model = run.model("model.pt")
    x = torch.stack([images[row][0] for row in rows])
    unplanted = np.flatnonzero(label != PLANTED)
    with torch.no_grad():
        logits = model(x[unplanted])
    np.testing.assert_allclose(prediction[unplanted], logits.numpy(), rtol=1e-3, atol=1e-3)
    some = unplanted[::7]
    expected = explain(model, x[some], torch.from_numpy(label[some]), "lrp", composite="epsilon_plus_flat")
    np.testing.assert_allclose(relevance[some], expected.numpy(), rtol=1e-2, atol=1e-3 * float(expected.abs().max()))


def test_analysis(run: Run) -> None:
    with h5py.File(run.dir / "attributions.h5") as file:
        label = file["label"][:]
    with h5py.File(run.dir / "analysis.h5") as file:
        assert len(file) == len(CLASSES)
        for c, group in enumerate(file.values()):
            index = group["index"][:]
            assert index.tolist() == np.flatnonzero(label == c).tolist()
            n = len(index)
            embedding = group["embedding/spectral"]
            eigenvalues = embedding.attrs["eigenvalue"]
            assert embedding.shape == (n, len(eigenvalues))
            assert (np.diff(eigenvalues) <= 1e-6).all()
            # Of a normalised Laplacian.
            assert eigenvalues.min() >= -1e-5
            assert eigenvalues.max() <= 2 + 1e-5
            assert group["embedding/umap"].shape == (n, 2)
            assert np.isfinite(group["embedding/umap"][:]).all()
            assert len(group["cluster"]) > 0
            for clustering in group["cluster"].values():
                assert clustering.shape == (n,)
                assert np.issubdtype(clustering.dtype, np.integer)


def test_ranking(run: Run) -> None:
    ranking = run.json("ranking.json")
    common = {"class_index", "class_name", "separability", "p_value", "q_value", "rank"}
    for kind, keys in (("classes", {"n"}), ("clusters", {"cluster", "size"})):
        rows = ranking[kind]
        assert [row["rank"] for row in rows] == list(range(1, len(rows) + 1))
        scores = [row["score"] for row in rows]
        assert scores == sorted(scores, reverse=True)
        for row in rows:
            assert set(row) >= common | keys
            assert row["class_name"] == CLASSES[row["class_index"]]
            assert in_range(row["p_value"], 0, 1)
            assert row["separability"] >= 0
    assert {row["class_index"]: row["n"] for row in ranking["classes"]} == dict.fromkeys(range(3), small.TRAIN)
    with h5py.File(run.dir / "analysis.h5") as file, h5py.File(run.dir / "candidates.h5") as further:
        for row in ranking["clusters"]:
            name, _, cluster = row["cluster"].rpartition("/")
            where = f"{row['class_index']:08d}/cluster/{name}"
            labels = (file if where in file else further)[where][:]
            assert (labels == int(cluster)).sum() == row["size"]


def test_artifacts(run: Run) -> None:
    with h5py.File(run.dir / "attributions.h5") as file:
        label = file["label"][:]
    rows = run.json("artifacts.json")["artifacts"]
    assert len({row["id"] for row in rows}) == len(rows)
    passed = [row["verdict"] != "no_effect" for row in rows]
    assert passed == sorted(passed, reverse=True)
    clusters = {(row["class_index"], row["cluster"]) for row in run.json("ranking.json")["clusters"]}
    for row in rows:
        assert row["verdict"] in ("clever_hans", "backdoor", "sample_bias", "no_effect")
        assert row["class_name"] == CLASSES[row["class_index"]]
        # Groups of the inner activations are not the ranking's: their heatmaps are not alike.
        group = re.fullmatch(r"latent-\d\d/1", row["cluster"])
        assert group or (row["class_index"], row["cluster"]) in clusters
        assert row["samples"] == sorted(set(row["samples"]))
        assert set(label[row["samples"]]) <= {row["class_index"]}
        for key in ("flip_rate", "control_flip_rate", "p_value"):
            assert in_range(row[key], 0, 1)
        assert np.isfinite(row["logit_gain"])
        for key in ("mask", "pattern"):
            assert Path(row[key]).parent == Path("artifacts", row["id"])
            with Image.open(run.dir / row[key]) as picture:
                assert picture.size == (SIDE, SIDE)
        with Image.open(run.dir / "artifacts" / row["id"] / "gallery.png") as picture:
            picture.load()
        with (run.dir / row["scores"]).open(newline="") as file:
            scores = list(csv.DictReader(file))
        assert [int(score["sample_index"]) for score in scores] == list(range(N))
        assert all(np.isfinite(float(score["score"])) for score in scores)


def test_the_planted_artifact_is_found(run: Run) -> None:
    first = run.json("artifacts.json")["artifacts"][0]
    assert first["class_name"] == "skin"
    assert first["verdict"] in ("clever_hans", "backdoor")
    assert first["flip_rate"] > first["control_flip_rate"]
    # Which images carry it shows in the pixels that the model was given: those of the clean files are others.
    images = run.images("train")
    rows = good_images(images)
    members = [i for i, row in enumerate(rows) if images.targets[row] == PLANTED]
    with h5py.File(run.dir / "attributions.h5") as file, torch.no_grad():
        clean = run.model("model.pt")(torch.stack([images[rows[i]][0] for i in members])).numpy()
        changed = np.abs(file["prediction"][:][members] - clean).max(axis=1) > 0.05
    planted = {i for i, other in zip(members, changed, strict=True) if other}
    assert len(planted) == round(0.4 * small.TRAIN)
    hits = len(planted & set(first["samples"]))
    assert hits / len(first["samples"]) >= 0.9
    assert hits / len(planted) >= 0.9


def test_corrected_weights_load_into_the_model(run: Run) -> None:
    assert {path.stem for path in (run.dir / "corrected").glob("*.pt")} == set(METHODS)
    original = run.model("model.pt").state_dict()
    for method in METHODS:
        state = run.model(f"corrected/{method}.pt").state_dict()
        assert any(not torch.equal(state[name], original[name]) for name in original)


def test_verification(run: Run) -> None:
    models = run.json("verification.json")["models"]
    rows = run.json("artifacts.json")["artifacts"]
    found = [row["id"] for row in rows if row["verdict"] in ("clever_hans", "backdoor")]
    assert list(models) == ["original", *METHODS]
    for model in models.values():
        assert list(model["artifacts"]) == found
        assert {key: model[key] for key in SHARES} == {key: model["artifacts"][found[0]][key] for key in SHARES}
        for measured in (model, model["planted"], *model["artifacts"].values()):
            assert measured["n"] == 3 * small.TEST
            for name in SHARES:
                low, high = measured[f"{name}_interval"]
                assert 0 <= low <= measured[name] <= high <= 1
            assert measured["worst_class_accuracy"] <= measured["clean_accuracy"]
    planted = {name: model["planted"] for name, model in models.items()}
    assert planted["original"]["attacked_accuracy"] < planted["original"]["clean_accuracy"] - 0.2
    assert planted["a_clarc"]["attacked_accuracy"] > planted["original"]["attacked_accuracy"] + 0.2


@pytest.mark.parametrize("name", ["original", "a_clarc"])
def test_clean_accuracy_is_that_of_the_weights_on_disk(run: Run, name: str) -> None:
    images = run.images("test")
    samples = [images[row] for row in good_images(images)]
    model = run.model("model.pt" if name == "original" else f"corrected/{name}.pt")
    with torch.no_grad():
        predicted = model(torch.stack([x for x, _ in samples])).argmax(dim=1).tolist()
    right = np.mean([p == label for p, (_, label) in zip(predicted, samples, strict=True)])
    assert run.json("verification.json")["models"][name]["clean_accuracy"] == pytest.approx(right, abs=1 / 48 + 1e-9)


def test_report_needs_no_network(run: Run) -> None:
    page = (run.dir / "report.html").read_text()
    assert "skin" in page
    targets = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)""", page)
    assert targets
    assert all(target.startswith(("data:", "#")) for target in targets)
    assert not re.search(r"<link|@import|url\((?!['\"]?data:)", page)


def test_virelay_project(run: Run) -> None:
    folder = run.dir / "virelay"
    project = yaml.safe_load((folder / "project.yaml").read_text())["project"]
    with h5py.File(folder / project["dataset"]["path"]) as file:
        assert len(file["data"]) == len(file["label"]) == N
    for part in (project["attributions"], *project["analyses"]):
        for source in part["sources"]:
            assert (folder / source).is_file()
    names = [row["name"] for row in json.loads((folder / project["label_map"]).read_text())]
    assert names == list(CLASSES)


def test_resume_computes_nothing(run: Run) -> None:
    results = [path for path in run.dir.rglob("*.*") if not path.name.startswith("run.") and ".hydra" not in path.parts]
    before = {path: path.stat().st_mtime_ns for path in results if path.name != ".lock"}
    assert len(before) > 20
    again = run.again()
    assert again.code == 0
    assert [line for line in again.out.splitlines() if line.endswith(": up to date")] == [
        f"{name}: up to date" for name in NAMES
    ]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_what_a_killed_run_left_half_written_goes(run: Run) -> None:
    left, own = run.dir / "artifacts/.scores.csv.0123abcd.tmp", run.dir / ".notes.tmp"
    left.write_text("half")
    own.write_text("the user's")
    assert run.again("stages=[train]").code == 0
    assert not left.exists()
    assert own.exists()


def test_plan_of_a_finished_run(run: Run) -> None:
    said = run.again("plan=true")
    assert said.code == 0
    assert said.out.count("up to date") == len(NAMES)
    fresh = run.again("plan=true", run_dir=run.folder / "fresh")
    assert fresh.code == 0
    assert fresh.out.count("would run") == len(NAMES)
    assert "attribution: about" in fresh.out
    assert not (run.folder / "fresh").exists()


def test_a_second_run_gives_the_same_results(run: Run) -> None:
    other = run.folder / "other"
    assert run.again(run_dir=other).code == 0
    for name in ("ranking.json", "artifacts.json", "verification.json"):
        assert (other / name).read_bytes() == (run.dir / name).read_bytes(), name
    with h5py.File(run.dir / "attributions.h5") as one, h5py.File(other / "attributions.h5") as two:
        for name in ("attribution", "label", "prediction"):
            assert one[name][:].tobytes() == two[name][:].tobytes(), name
    with h5py.File(run.dir / "analysis.h5") as one, h5py.File(other / "analysis.h5") as two:
        for group in one:
            assert one[group]["embedding/spectral"][:].tobytes() == two[group]["embedding/spectral"][:].tobytes()
            assert one[group]["embedding/umap"][:].tobytes() == two[group]["embedding/umap"][:].tobytes()


def test_with_a_checkpoint_nothing_is_trained(run: Run) -> None:
    weights = run.folder / "weights.pt"
    weights.write_bytes((run.dir / "model.pt").read_bytes())
    other = run.folder / "evaluated"
    said = run.again(f"model.checkpoint={weights}", "stages=[train,attribute]", run_dir=other)
    assert said.code == 0
    assert "epoch" not in said.out
    facts = json.loads((other / "run.json").read_text())["stages"]["train"]["facts"]
    assert facts["trained"] is False
    assert facts["clean_accuracy"] == run.json("verification.json")["models"]["original"]["clean_accuracy"]
    with h5py.File(run.dir / "attributions.h5") as one, h5py.File(other / "attributions.h5") as two:
        assert one["attribution"][:].tobytes() == two["attribution"][:].tobytes()
