"""Data and models that cannot be studied, or only in part: one clear line, or a right result of what is there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import small
import torch

from spray.models.factory import call_factory

Start = Callable[..., small.Outcome]
QUICK = ("device=cpu", "analysis.umap=false", "model.epochs=1", f"dataset.image_size={small.SIDE}")


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """The command on classes of the given sizes; the run directory is `tmp_path`/run."""

    def begin(sizes: dict[str, int], *options: str, factory: str = "build") -> small.Outcome:
        folders = small.write_images(tmp_path, sizes, dict.fromkeys(sizes, 4))
        model = f"model.factory={small.write_model(tmp_path)}:{factory}"
        own = [] if any(option.startswith("model.name=") for option in options) else [model]
        return small.run("experiment=image_folder", *QUICK, *folders, *own, f"run_dir={tmp_path / 'run'}", *options)

    return begin


def assert_refused(said: small.Outcome, *parts: str) -> None:
    assert said.code == 2
    assert said.err.startswith("spray: error: ")
    assert said.err.count("\n") == 1
    for part in parts:
        assert part in said.err


def assert_finished(said: small.Outcome, run_dir: Path) -> dict:
    assert (said.code, said.err) == (0, "")
    assert (run_dir / "report.html").is_file()
    with h5py.File(run_dir / "analysis.h5") as file:
        for group in file.values():
            for embedding in group["embedding"].values():
                assert np.isfinite(embedding[:]).all()
    return json.loads((run_dir / "ranking.json").read_text())


@pytest.mark.parametrize(
    ("options", "factory", "parts"),
    [
        ([], "NotANumber", ["not finite"]),
        ([], "WithoutRule", ["LRP has no rule for cumprod"]),
        (["correction.methods=[dfr]"], "without_linear", ["dfr", "correction.methods"]),
        (["correction.layer=layer9"], "without_linear", ["no layer 'layer9'", "named_modules"]),
        (["dataset.image_size=1", "model.name=alexnet"], "", ["(2, 3, 1, 1)"]),
    ],
)
def test_models_that_cannot_be_studied_are_refused_before_training(
    start: Start, tmp_path: Path, options: list[str], factory: str, parts: list[str]
) -> None:
    said = start({"coffee": 8, "stone": 8}, *options, factory=factory)
    assert_refused(said, *parts)
    assert "train: running" not in said.out
    assert not (tmp_path / "run/model.pt").exists()


def test_a_model_that_ignores_its_input_is_refused(start: Start, tmp_path: Path) -> None:
    model = call_factory(f"{small.write_model(tmp_path)}:constant", 2)
    torch.save(model.state_dict(), tmp_path / "constant.pt")
    said = start({"coffee": 8, "stone": 8}, f"model.checkpoint={tmp_path / 'constant.pt'}")
    assert_refused(said, "every heatmap is zero")
    assert not (tmp_path / "run/attributions.h5").exists()


def test_weights_that_diverge_are_refused(start: Start) -> None:
    assert_refused(start({"coffee": 8, "stone": 8}, "model.learning_rate=1e30"), "not finite")


def test_a_loss_that_is_not_a_number_is_told(start: Start, tmp_path: Path) -> None:
    said = start({"coffee": 8, "stone": 8}, "model.learning_rate=1e30", "model.epochs=4", "model.batch_size=4")
    assert_refused(said, "diverged", "not finite", "learning_rate")
    assert not (tmp_path / "run/model.pt").exists()


def test_one_class_is_refused(start: Start) -> None:
    assert_refused(start({"coffee": 8}), "one class only", "coffee")


def test_a_class_with_one_image(start: Start, tmp_path: Path) -> None:
    said = start({"coffee": 20, "skin": 20, "stone": 1})
    ranking = assert_finished(said, tmp_path / "run")
    assert "'stone' has fewer than" in said.out
    row = next(row for row in ranking["classes"] if row["class_name"] == "stone")
    assert (row["n"], row["separability"], row["p_value"]) == (1, 0.0, 1.0)
    assert "stone" not in {row["class_name"] for row in ranking["clusters"]}
    artifacts = json.loads((tmp_path / "run/artifacts.json").read_text())["artifacts"]
    assert "stone" not in {row["class_name"] for row in artifacts}


def test_a_class_with_fewer_samples_than_neighbours(start: Start, tmp_path: Path) -> None:
    n = 7
    said = start({"coffee": 20, "stone": n}, "analysis.n_neighbors=10")
    assert_finished(said, tmp_path / "run")
    with h5py.File(tmp_path / "run/analysis.h5") as file:
        eigenvalues = file["00000001/embedding/spectral"].attrs["eigenvalue"]
    # Each sample is a neighbour of each other: the normalised Laplacian of a complete graph.
    np.testing.assert_allclose(eigenvalues, [n / (n - 1)] * (n - 1) + [0], atol=1e-6)


def test_two_images_and_two_classes(start: Start, tmp_path: Path) -> None:
    ranking = assert_finished(start({"coffee": 1, "stone": 1}), tmp_path / "run")
    assert ranking["clusters"] == []
    assert [row["p_value"] for row in ranking["classes"]] == [1.0, 1.0]


def test_an_artifact_in_every_image_of_a_class(start: Start, tmp_path: Path) -> None:
    plant = [f"dataset.plant.{option}" for option in ("kind=box", "class=stone", "rate=1", "size=5")]
    assert_finished(start({"coffee": 20, "skin": 20, "stone": 20}, *plant), tmp_path / "run")
    models = json.loads((tmp_path / "run/verification.json").read_text())["models"]
    assert models["original"]["planted"]["n_attacked"] == 8


def test_names_of_classes_do_no_harm(tmp_path: Path) -> None:
    names = {"coffee": '-it\'s "q" ${seed}, a=b', "skin": "</script><script>alert(1)", "stone": "камень " + "x" * 200}
    folders = small.write_images(tmp_path, dict.fromkeys(names, 12), dict.fromkeys(names, 4))
    # A slash cannot be in a file's name.
    names = {old: new.replace("/", "\u2215") for old, new in names.items()}
    for part in ("train", "test"):
        for old, new in names.items():
            (tmp_path / part / old).rename(tmp_path / part / new)
    model = f"model.factory={small.write_model(tmp_path)}:build"
    run_dir = tmp_path / "a run, with = and ünïcode"
    said = small.run("experiment=image_folder", *QUICK, *folders, model, f"run_dir='{run_dir}'")
    ranking = assert_finished(said, run_dir)
    assert {row["class_name"] for row in ranking["classes"]} == set(names.values())
    assert "<script>alert" not in (run_dir / "report.html").read_text()


def test_other_groups_change_nothing_for_those_who_work_on_classes(start: Start, tmp_path: Path) -> None:
    sizes, run_dir = {"coffee": 24, "stone": 24}, tmp_path / "run"
    ranking = assert_finished(start(sizes, "correction.methods=[]"), run_dir)
    artifacts = (run_dir / "artifacts.json").read_bytes()
    again = small.run(
        *("experiment=image_folder", *QUICK, f"run_dir={run_dir}", "correction.methods=[]"),
        *(f"dataset.{part}={tmp_path / part}" for part in ("train", "test")),
        *(f"model.factory={tmp_path / 'my_model.py'}:build", "analysis.groups=[all,predicted,class]"),
    )
    assert assert_finished(again, run_dir) == ranking
    assert "train: up to date" in again.out
    assert (run_dir / "artifacts.json").read_bytes() == artifacts
    with h5py.File(run_dir / "analysis.h5") as file:
        assert "all" in file
        # All that ViRelAy asks of a category.
        assert all({"index", "embedding", "cluster"} <= set(group) for group in file.values())


def test_damaged_analyses_are_told(start: Start, tmp_path: Path) -> None:
    sizes = {"coffee": 24, "stone": 24}
    assert_finished(start(sizes, "correction.methods=[]"), tmp_path / "run")
    record = json.loads((tmp_path / "run/run.json").read_text())
    with h5py.File(tmp_path / "run/analysis.h5", "a") as file:
        for group in file.values():
            del group["index"]
    data = (tmp_path / "run/analysis.h5").read_bytes()
    said = record["stages"]["analyze"]["outputs"]["analysis.h5"]
    said.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    for name, stage in (("artifacts.json", "isolate"), ("report.html", "report")):
        (tmp_path / "run" / name).unlink()
        again = small.run(
            *("experiment=image_folder", *QUICK, f"run_dir={tmp_path / 'run'}", "correction.methods=[]"),
            *(f"dataset.{part}={tmp_path / part}" for part in ("train", "test")),
            *(f"model.factory={tmp_path / 'my_model.py'}:build", f"stages=[{stage}]"),
        )
        assert_refused(again, "analysis.h5 has no /0000000", "/index", "start the run again")
        if stage == "isolate":
            (tmp_path / "run" / name).write_text(json.dumps({"artifacts": []}))
            record["stages"]["isolate"]["outputs"][name] = {
                "bytes": len((tmp_path / "run" / name).read_bytes()),
                "sha256": hashlib.sha256((tmp_path / "run" / name).read_bytes()).hexdigest(),
            }
            (tmp_path / "run/run.json").write_text(json.dumps(record))
