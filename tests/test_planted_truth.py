"""The truth about what was planted: as files of a run, in verification and report, and nowhere else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import small
import torch

from spray.data.arrays import ArrayDataset
from spray.data.folder import FolderDataset
from spray.data.planting import Plant, plant_all, read_plants
from spray.data.truth import FILE, MASKS, read_masks, read_truth, write_truth

CLASSES = ("coffee", "skin", "stone")
ROOT = Path(__file__).resolve().parents[1]
N, SHAPE = 90, (3, 24, 24)


def dataset(n: int = N, seed: int = 0) -> ArrayDataset:
    pixels = np.random.default_rng(seed).integers(0, 256, (n, *SHAPE), dtype=np.uint8)
    return ArrayDataset(pixels, np.arange(n) % 3, CLASSES)


def written(folder: Path, *options: dict[str, Any]) -> tuple[Any, list[dict[str, Any]]]:
    data, truths = plant_all(dataset(), read_plants(options[0], options[1:], CLASSES, SHAPE))
    write_truth(folder, truths, dataset(60, 1))
    return data, read_truth(folder)


def test_it_comes_back_as_it_was_written(tmp_path: Path) -> None:
    data, rows = written(
        tmp_path,
        {"kind": "watermark", "class": "skin", "rate": 0.4},
        {"kind": "brightness", "class": "all", "rate": 0.2},
        {"kind": "vignette", "class": 0, "rate": 0.1},
        {"kind": "mislabel", "class": 2, "rate": 0.1},
        {"kind": "missing", "class": 2, "rate": 0.1},
    )
    assert [row["id"] for row in rows] == ["plant", *(f"plants[{i}]" for i in range(4))]
    assert [row["kind"] for row in rows] == ["watermark", "brightness", "vignette", "mislabel", "missing"]
    assert [row["extent"] for row in rows] == ["local", "global", "framing", None, None]
    assert [(row["class_index"], row["class_name"]) for row in rows][:3] == [(1, "skin"), (None, "all"), (0, "coffee")]
    assert [row["masks"] for row in rows] == [MASKS, None, MASKS, None, None]
    assert [len(row["samples"]) for row in rows[:3]] == [12, 18, 3]
    assert rows[0]["options"]["strength"] == 0.4
    with h5py.File(tmp_path / MASKS) as file:
        assert set(file) == {"plant", "plants[1]"}
    samples, masks = read_masks(tmp_path, "plant")
    assert samples.tolist() == rows[0]["samples"]
    assert (masks.shape, masks.dtype) == ((12, 24, 24), np.float16)
    clean = dataset()
    by_name = {name: i for i, name in enumerate(clean.names)}
    for sample, mask in zip(samples, masks, strict=True):
        changed = data.batch(np.array([sample])) != clean.batch(np.array([by_name[data.names[sample]]]))
        if not any(sample in row["samples"] for row in rows[1:3]):
            assert not bool((changed[0].any(dim=0) & (torch.from_numpy(mask) == 0)).any())
    plant = read_plants({"kind": "watermark", "class": "skin", "rate": 0.4}, [], CLASSES, SHAPE)[0]
    expected = plant.mark(clean.batch(samples), [f"train:{i}" for i in plant.chosen(clean.labels)])[1]
    np.testing.assert_allclose(masks, expected, atol=1e-3)
    assert len(rows[3]["labels"]) == len(rows[3]["labels_before"]) == len(rows[3]["samples"])
    assert len(rows[4]["left_out"]) == 3
    test = dataset(60, 1)
    assert set(test.labels[rows[4]["test_samples"]]) <= {2}


def test_at_rate_0_it_says_so_and_without_plants_there_is_no_file(tmp_path: Path) -> None:
    written(tmp_path, {"kind": "box", "class": 0, "rate": 0.5})
    assert (tmp_path / MASKS).is_file()
    _, rows = written(tmp_path, {"kind": "box", "class": 0, "rate": 0.0})
    assert [(row["kind"], row["samples"], row["masks"]) for row in rows] == [("box", [], None)]
    assert not (tmp_path / MASKS).exists()
    _, rows = written(tmp_path, {"kind": "none"})
    assert rows == []
    assert list(tmp_path.iterdir()) == []


READERS = {"train.py", "verify.py", "measures.py", "ceiling.py", "report.py"}
OPTIONS = {"context.py", "validate.py", "config.py", "project.py"}
"""Of the pipeline: the first writes the truth, the next ones verify and report with it; these know the options."""


def test_no_other_part_knows_of_it() -> None:
    told = re.compile(r"data\.(planting|truth|plant_\w+)|planted_truths|\bplanted(_masks)?\.(json|h5)|\.plants\b")
    folders = [
        ROOT / "spray" / part for part in ("analysis", "isolation", "correction", "attribution", "bulk", "store")
    ]
    sources = [path for folder in [*folders, ROOT / "pipelines"] for path in folder.rglob("*.py")]
    assert len(sources) > 50
    knowing = {path.name for path in sources if told.search(path.read_text())}
    assert knowing == READERS | OPTIONS
    assert told.search((ROOT / "pipelines" / "verify.py").read_text())


PLANTS = (
    "dataset.plant={kind: box, class: skin, rate: 0.4, size: 5, jitter: 1, place: random}",
    "dataset.plants=[{kind: missing, class: stone, which: bright, rate: 0.3}, "
    "{kind: mislabel, class: coffee, to: stone, rate: 0.2}, {kind: blur, class: all, rate: 0.2}]",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with an artifact on one class, one on all, and both other biases."""
    folder = tmp_path_factory.mktemp("truth")
    options = ["experiment=image_folder", f"dataset.image_size={small.SIDE}", "device=cpu", "model.epochs=6"]
    options += small.write_images(folder, dict.fromkeys(CLASSES, small.TRAIN), dict.fromkeys(CLASSES, small.TEST))
    options += [f"model.factory={small.write_model(folder)}:build", "model.learning_rate=5e-3", "model.batch_size=16"]
    options += ["analysis.umap=false", "correction.methods=[]", *PLANTS, f"run_dir={folder / 'run'}"]
    said = small.run(*options)
    assert said.code == 0, said.err
    return folder


def test_a_run_writes_it_once(folder: Path) -> None:
    run, rows = folder / "run", read_truth(folder / "run")
    assert [row["kind"] for row in rows] == ["box", "missing", "mislabel", "blur"]
    outputs = json.loads((run / "run.json").read_text())["stages"]["train"]["outputs"]
    assert {"model.pt", FILE, MASKS} == set(outputs)
    clean = FolderDataset(folder / "train", small.SIDE)
    boxed, missing, wrong, blurred = rows
    assert len(missing["left_out"]) == 9
    kept = [i for i, name in enumerate(clean.names) if name not in missing["left_out"]]
    labels = clean.labels[kept].copy()
    assert labels[wrong["samples"]].tolist() == wrong["labels_before"] == [0] * 6
    labels[wrong["samples"]] = 2
    with h5py.File(run / "attributions.h5") as file:
        np.testing.assert_array_equal(file["label"][:], labels)
    # Of each class as it is labelled by then: 24, 30 and 27.
    assert np.bincount(labels[blurred["samples"]]).tolist() == [5, 6, 5]
    samples, masks = read_masks(run, "plant")
    assert samples.tolist() == boxed["samples"]
    assert (masks.sum(axis=(1, 2)) == 25).all()
    assert len({mask.tobytes() for mask in masks}) > 6, "each at its own place"


def test_verification_measures_each_of_them(folder: Path) -> None:
    import importlib.util

    model = json.loads((folder / "run/verification.json").read_text())["models"]["original"]
    planted = model["planted"]
    effects = planted.pop("plants")
    assert list(effects) == ["plant", "plants[0]", "plants[1]", "plants[2]"]
    assert planted == effects["plant"]
    spec = importlib.util.spec_from_file_location("own_model", folder / "my_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net = module.build(3).eval()
    net.load_state_dict(torch.load(folder / "run/model.pt", weights_only=True))
    test = FolderDataset(folder / "test", small.SIDE)

    def predict(indices: np.ndarray, plant: Plant | None = None) -> np.ndarray:
        pixels = test.batch(indices)
        if plant is not None:
            pixels, _ = plant.mark(pixels, [f"test:{i}" for i in indices])
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        with torch.no_grad():
            return net((pixels - mean[:, None, None]) / std[:, None, None]).argmax(dim=1).numpy()

    box = {"kind": "box", "class": "skin", "rate": 0.4, "size": 5, "jitter": 1, "place": "random"}
    box_plant, _, _, blur = read_plants(
        box, [{"kind": "missing"}, {"kind": "mislabel"}, {"kind": "blur", "class": "all"}], CLASSES, SHAPE
    )
    others = np.flatnonzero(test.labels != 1)
    assert planted["n_attacked"] == 32
    assert planted["attacked_accuracy"] == (predict(others, box_plant) == test.labels[others]).mean()
    assert planted["attacked_to_class"] == (predict(others, box_plant) == 1).mean()
    everything = effects["plants[2]"]
    assert (everything["n_attacked"], everything["attacked_to_class"]) == (48, None)
    whole = np.arange(48)
    assert everything["attacked_accuracy"] == (predict(whole, blur) == test.labels).mean()
    assert everything["artifact_relevance"] == pytest.approx(1), "blur is everywhere"
    # Of the missing kind: stones at least as bright as the darkest of those that were left out.
    train = FolderDataset(folder / "train", small.SIDE)

    def brightness(data: FolderDataset, index: np.ndarray) -> np.ndarray:
        return np.tensordot(data.batch(index).numpy().mean(axis=(2, 3)), [0.2125, 0.7154, 0.0721], 1)

    stones, tests = np.flatnonzero(train.labels == 2), np.flatnonzero(test.labels == 2)
    bound = np.sort(brightness(train, stones))[-9]
    bright = tests[brightness(test, tests) >= bound - 1e-6]
    lacking = effects["plants[0]"]
    assert (lacking["n_missing"], lacking["attacked_accuracy"]) == (len(bright), None)
    assert lacking["missing_accuracy"] == ((predict(bright) == 2).mean() if len(bright) else None)
    assert effects["plants[1]"]["attacked_accuracy"] is None
    assert effects["plants[1]"]["clean_accuracy"] == planted["clean_accuracy"] == model["clean_accuracy"]


def test_the_report_names_the_artifact(folder: Path) -> None:
    page = (folder / "run/report.html").read_text()
    assert re.search(r"Box on 12 training samples\s+\(40\s*%\) of", page)


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (
            "dataset.plants=[{kind: bx}]",
            "unknown kind of planted artifact 'bx' (did you mean 'box'?); allowed: background",
        ),
        ("dataset.plants=[box]", "dataset.plants[0]=box is no mapping; write it as {kind: box, class: 0}"),
        ("dataset.plants=[{kind: box, clas: 1}]", "dataset.plants[0] has no key 'clas'; allowed: kind, class"),
        ("dataset.plants=box", "dataset.plants: Invalid value assigned: str is not a ListConfig, list or tuple"),
        ("dataset.plants={kind: box}", "dataset.plants is a list; write dataset.plants=[..], with commas between"),
        ("dataset.plants.0.kind=box", "dataset.plants is a list, which is given as a whole; write dataset.plants=[..]"),
        ("dataset.plant=[{kind: box}]", "dataset.plant is a mapping; write dataset.plant={KEY: VALUE}, or its keys by"),
        ("dataset.plant.strength=2", "dataset.plant.strength=2 is not a number from 0.0 to 1.0"),
        (
            "dataset.plant.color=red",
            "dataset.plant.color=red must be three numbers in [0, 1]: red, green, blue; or random",
        ),
    ],
)
def test_mistakes_are_told_before_images_are_looked_for(tmp_path: Path, typed: str, words: str) -> None:
    folders = ["dataset.train=nowhere", "dataset.test=nowhere", "model.checkpoint=nowhere"]
    plan = [f"run_dir={tmp_path}", "plan=true", "experiment=image_folder", *folders]
    said = small.run(*plan, "dataset.plant.kind=tag", typed)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith(f"spray: error: {words}")
    assert said.err.count("\n") == 1
