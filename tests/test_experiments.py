"""Every shipped experiment, run small through all stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import small

from spray.data.fashion_mnist import DEBIAN_FOLDER
from spray.pipelines.stages import NAMES

FOLDER = Path(__file__).resolve().parent.parent / "conf/experiment"
SMALL = ("model.epochs=1", "correction.epochs=1", "analysis.umap=false", "dataset.per_class=16", "device=cpu")
# What an experiment needs besides.
OWN = {"image_folder": ["dataset.image_size=32", "model.name=resnet18", "attribution.batch_size=16"]}


# A project has no model; test_virelay_project.py runs that experiment.
@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "virelay"))
def test_experiment(name: str, tmp_path: Path) -> None:
    options = list(OWN.get(name, []))
    if name == "image_folder":
        classes = small.photographs()
        options += small.write_images(tmp_path, dict.fromkeys(classes, 20), dict.fromkeys(classes, 6))
    if name.startswith("fashion_mnist") and not DEBIAN_FOLDER.is_dir():
        pytest.skip("Fashion-MNIST is not installed")
    said = small.run(f"experiment={name}", *SMALL, *options, f"run_dir={tmp_path / 'run'}")
    assert (said.code, said.err) == (0, "")
    stages = json.loads((tmp_path / "run/run.json").read_text())["stages"]
    assert {stage: entry["status"] for stage, entry in stages.items()} == dict.fromkeys(NAMES, "done")
    planted = "planted" in json.loads((tmp_path / "run/verification.json").read_text())["models"]["original"]
    assert planted == (name != "image_folder")
