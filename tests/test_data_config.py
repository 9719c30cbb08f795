"""Every kind of dataset through the command: its configuration, its mistakes, and what counts as a change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import yaml
from kinds import KINDS, Kind, Part

GIVEN = {
    "arrays": ["dataset.train=a.npz", "dataset.test=b.h5", "dataset.options={images: x, labels: y}"],
    "factory": ["dataset.factory=my_data.py:load", "dataset.options={root: data, n: 3}"],
    "huggingface": ["dataset.train=DIR", "dataset.options={test_split: validation, label: fine_label}"],
    "image_folder": ["dataset.train=a", "dataset.test=b", "dataset.check=false"],
    "torchvision": ["dataset.options={name: CIFAR10, root: data, download: true}"],
    "webdataset": ['dataset.train="shards/train-{000..099}.tar"', "dataset.options={classes: [a, b]}"],
}
STAGES = ["stages=[train,attribute]", "device=cpu", "model.epochs=1", "attribution=epsilon", "model.name=small_cnn"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPRAY_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", GIVEN)
def test_the_configuration_is_what_was_given(spray: Any, name: str) -> None:
    said = spray("--cfg", "job", "experiment=image_folder", f"dataset={name}", *GIVEN[name], fakes_only=False)
    assert (said.code, said.err) == (0, "")
    found = yaml.safe_load(said.out)["dataset"]
    assert found["name"] == name
    for option in GIVEN[name]:
        key, _, value = option.removeprefix("dataset.").partition("=")
        assert found[key] == yaml.safe_load(value)


@pytest.mark.parametrize(
    ("name", "given", "parts"),
    [
        ("arrays", [], ["dataset.train is not set", "FILE.npz"]),
        ("arrays", ["dataset.train=x.npz", "dataset.test=x.npz"], ["there is no file x.npz"]),
        ("arrays", ["dataset.options=5"], ["dataset.options=5 is no mapping"]),
        ("factory", [], ["dataset.factory is not set", "FILE.py:FUNCTION"]),
        ("factory", ["dataset.factory=x.py:load"], ["dataset.factory: there is no file x.py"]),
        ("huggingface", ["dataset.train=nowhere"], ["there is no folder nowhere", "save_to_disk"]),
        ("torchvision", [], ["dataset.options has no name"]),
        ("torchvision", ["dataset.options={name: Mnist}"], ["did you mean 'MNIST'"]),
        ("webdataset", ["dataset.train=x-*.tar", "dataset.test=y.tar"], ["dataset.train=x-*.tar", "no such tar files"]),
        ("webdataset", ["dataset.options={klasses: [a]}"], ["did you mean 'classes'"]),
        ("image_folder", ["dataset.options={a: 1}"], ["no option of dataset=image_folder; it takes none"]),
        ("photos", ["dataset.factory=x.py:load"], ["only dataset=factory"]),
        ("huggingfase", [], ["huggingfase"]),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, name: str, given: list[str], parts: list[str]) -> None:
    if name == "huggingface":
        pytest.importorskip("datasets")
    said = small.run("experiment=image_folder", f"dataset={name}", *given, f"run_dir={tmp_path / 'run'}", *STAGES)
    assert said.code == 2
    assert said.err.startswith("spray: error: ")
    assert said.err.count("\n") == 1
    for part in parts:
        assert part in said.err


def typed(configuration: Any) -> list[str]:
    """Return the options that a person types."""
    values = {key: getattr(configuration, key) for key in ("train", "test", "factory", "image_size")}
    given = [f"dataset={configuration.name}"]
    given += [f"dataset.{key}={json.dumps(value)}" for key, value in values.items() if value is not None]
    if configuration.options:
        pairs = [f"{key}: {json.dumps(value)}" for key, value in configuration.options.items()]
        given.append(f"dataset.options={{{', '.join(pairs)}}}")
    return [*given, "dataset.mean=[0.5]", "dataset.std=[0.25]"]


@pytest.mark.parametrize("name", ["arrays/HDF5", "webdataset", "huggingface", "torchvision/MNIST"])
def test_a_run_on_it(tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    for package in kind.needs:
        pytest.importorskip(package)
    configuration = kind.write(tmp_path, *kind.parts())
    options = ["experiment=image_folder", *typed(configuration), *STAGES, f"run_dir={tmp_path / 'run'}"]
    said = small.run(*options)
    assert (said.code, said.err) == (0, "")
    again = small.run(*options)
    assert again.out.count("up to date") == 2


def test_what_changes_in_a_factory_is_noticed(tmp_path: Path) -> None:
    kind: Kind = KINDS["factory/images"]
    train, test = kind.parts()
    configuration = kind.write(tmp_path, train, test)
    helper = tmp_path / "only_for_this_test.py"
    helper.write_text("VALUE = 1\n")
    path = tmp_path / "my_data.py"
    path.write_text(f"import only_for_this_test\n{path.read_text()}")
    options = ["experiment=image_folder", *typed(configuration), *STAGES, f"run_dir={tmp_path / 'run'}"]
    assert small.run(*options).code == 0
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert set(record["inputs"]) == {"dataset.train", "dataset.test", "dataset.factory"}
    assert small.run(*options).out.count("up to date") == 2
    helper.write_text("VALUE = 1  # changed\n")
    said = small.run(*options)
    assert "train: recomputed because content of dataset" in said.out
    changed: Part = (np.roll(train[0], 1, axis=0), train[1])
    kind.write(tmp_path, changed, test)
    path.write_text(f"import only_for_this_test\n{path.read_text()}")
    assert "train: recomputed because content of dataset.train changed" in small.run(*options).out
