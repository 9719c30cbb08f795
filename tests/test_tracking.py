"""What trackers are written, read back with their own readers."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_virelay import CLASSES, Images, write_run

from spray.errors import UserError
from spray.pipelines import tracking
from spray.pipelines.config import SprayConfig
from spray.pipelines.tracking import check, track
from spray.storage import read_json, write_json, write_text


def context(run_dir: Path, tracker: str = "tensorboard") -> Any:
    """Return what trackers use of a context, with a run directory that holds what a finished run's does."""
    dataset = Images(3)
    write_run(run_dir, dataset)
    classes = [
        {"class_index": c, "class_name": CLASSES[c], "n": 6, "separability": 3.0 - c, "p_value": 0.5, "rank": c + 1}
        for c in range(3)
    ]
    clusters = [{"class_index": 0, "class_name": CLASSES[0], "cluster": "kmeans-02/1", "rank": 1}]
    write_json(run_dir / "ranking.json", {"classes": classes, "clusters": clusters})
    write_json(run_dir / "artifacts.json", {"artifacts": [{"id": "a01", "flip_rate": 0.75, "samples": [1, 2]}]})
    models = {"original": {"clean_accuracy": 0.9, "clean_accuracy_interval": [0.8, 0.95]}, "a_clarc": {"n": 12}}
    write_json(run_dir / "verification.json", {"models": models})
    stages = {name: {"status": "done", "key": name} for name in ("attribute", "analyze", "rank", "isolate", "verify")}
    train = {"status": "done", "key": "0", "seconds": 2.5, "facts": {"losses": [1.5, 0.5, 0.25], "trained": True}}
    write_json(run_dir / "run.json", {"stages": {"train": train} | stages})
    write_text(run_dir / ".hydra" / "config.yaml", "seed: 3\nmodel:\n  name: x\n")
    mask = np.zeros((12, 10), np.uint8)
    mask[:3] = 255
    (run_dir / "artifacts" / "a01").mkdir(parents=True)
    Image.fromarray(mask).save(run_dir / "artifacts" / "a01" / "mask.png")
    return SimpleNamespace(config=SprayConfig(tracker=tracker), run_dir=run_dir, train=dataset)


def test_without_a_tracker_nothing_is_written(tmp_path):
    assert track(context(tmp_path, "none")) is None
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_missing_package_is_told_at_once(name, monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=rf"pip install 'spray-xai\[{name}\]'"):
        check(SprayConfig(tracker=name))


def test_an_unknown_tracker_is_refused():
    with pytest.raises(UserError, match="allowed: none, tensorboard, mlflow"):
        check(SprayConfig(tracker="wandb"))


def read_events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    return events.Reload()


def test_tensorboard_reads_numbers_pictures_and_embeddings(tmp_path):
    folder = track(context(tmp_path))
    assert folder == tmp_path / "tensorboard"
    run = read_events(folder / "run")
    assert [event.value for event in run.Scalars("train/losses")] == [1.5, 0.5, 0.25]
    assert [event.step for event in run.Scalars("train/losses")] == [0, 1, 2]
    assert run.Scalars("seconds/train")[0].value == 2.5
    assert run.Scalars("ranking/cat/separability")[0].value == 3
    assert run.Scalars("artifacts/a01/flip_rate")[0].value == 0.75
    assert read_events(folder / "original").Scalars("verification/clean_accuracy")[0].value == pytest.approx(0.9)
    assert read_events(folder / "a_clarc").Tags()["scalars"] == ["verification/n"]

    mask = Image.open(io.BytesIO(run.Images("artifacts/a01/mask")[0].encoded_image_string))
    assert np.asarray(mask)[:, :, 0].tolist() == [[255] * 10] * 3 + [[0] * 10] * 9
    # Three of the six samples are in each of the two clusters: image, heatmap and overlay side by side.
    heatmaps = run.Images("heatmaps/cat/cluster 1")[0]
    assert (heatmaps.width, heatmaps.height) == (3 * 10, 3 * 12)
    first = np.asarray(Image.open(io.BytesIO(heatmaps.encoded_image_string)))[:12, :10]
    expected = Images(3).pixels[3].transpose(1, 2, 0) * 255  # sample 3 is the second one of class 0
    assert np.abs(first - expected).max() <= 1

    (config,) = (folder / "run").glob("projector_config.pbtxt")
    assert config.read_text().count("embeddings {") == 3
    tables = sorted((folder / "run").glob("*/*/metadata.tsv"))
    assert len(tables) == 3
    rows = [line.split("\t") for line in tables[-1].read_text().splitlines() if "\t" in line]
    assert rows[0] == ["sample", "file", "cluster"]
    assert {len(row) for row in rows} == {3}
    cat = next(path for path in tables if "cat" in str(path))
    rows = [line.split("\t") for line in cat.read_text().splitlines()][1:]
    assert rows == [[str(i), f"{i}.png", str(at % 2)] for at, i in enumerate(range(0, 17, 3))]
    assert Image.open(cat.parent / "sprite.png").size[0] >= 12
    points = np.loadtxt(cat.parent / "tensors.tsv", delimiter="\t")
    assert points.shape == (6, 4)


def test_what_did_not_change_is_left_and_what_did_is_written_anew(tmp_path):
    given = context(tmp_path)
    track(given)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "tensorboard").rglob("*") if path.is_file()}
    track(given)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    run = read_json(tmp_path / "run.json")
    run["stages"]["train"] |= {"key": "1", "facts": {"losses": [9.0]}}
    write_json(tmp_path / "run.json", run)
    track(given)
    events = read_events(tmp_path / "tensorboard" / "run")
    assert [event.value for event in events.Scalars("train/losses")] == [9.0]


def test_a_folder_of_someone_else_is_left_alone(tmp_path):
    given = context(tmp_path)
    write_text(tmp_path / "tensorboard" / "notes.txt", "mine")
    with pytest.raises(UserError, match="is in the way"):
        track(given)
    assert (tmp_path / "tensorboard" / "notes.txt").read_text() == "mine"


def test_mlflow_reads_the_run(tmp_path):
    from mlflow.tracking import MlflowClient

    folder = track(context(tmp_path, "mlflow"))
    assert folder is not None
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("spray").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"seed": "3", "model.name": "x"}
    assert run.data.metrics["original/verification/clean_accuracy"] == 0.9
    assert [m.value for m in client.get_metric_history(run.info.run_id, "train/losses")] == [1.5, 0.5, 0.25]
    assert "pictures" in [file.path for file in client.list_artifacts(run.info.run_id)]
    assert "run.json" in [file.path for file in client.list_artifacts(run.info.run_id)]
