"""Datasets of torchvision by name: its own reading is the oracle; splits, shares held out, and mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kinds import KINDS, Part, build, refused, write_tree
from PIL import Image

from spray.data.base import ImageDataset


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPRAY_CACHE", str(tmp_path / "cache"))


def torchvision(**own: Any) -> tuple[ImageDataset, ImageDataset]:
    return build("torchvision", options=own)


def test_torchvisions_own_reading_is_the_oracle(tmp_path: Path) -> None:
    from torchvision.datasets import MNIST

    kind = KINDS["torchvision/MNIST"]
    kind.write(tmp_path, *kind.parts())
    for data, part in zip(torchvision(name="MNIST", root=str(tmp_path)), (True, False), strict=True):
        oracle = MNIST(str(tmp_path), train=part)
        assert list(data.classes) == oracle.classes
        for row in (0, 3, len(oracle) - 1):
            image, label = oracle[row]
            np.testing.assert_allclose(data.batch(np.array([row]))[0, 0].numpy(), np.asarray(image) / 255, atol=1e-7)
            assert data.labels[row] == label


def test_names_of_files_are_those_in_the_root(tmp_path: Path) -> None:
    kind = KINDS["torchvision/Country211"]
    train, _ = build(**vars(kind.write(tmp_path, *kind.parts())))
    assert train.names[0] == "country211/train/ant/000.jpg"


def test_splits_are_found_or_given(tmp_path: Path) -> None:
    kind = KINDS["torchvision/Country211"]
    parts = kind.parts()
    kind.write(tmp_path, *parts)
    other: Part = (255 - parts[1][0], parts[1][1])
    write_tree(tmp_path / "country211/valid", other, ending="jpg")
    _, test = torchvision(name="Country211", root=str(tmp_path), test={"split": "valid"})
    np.testing.assert_allclose(test.batch(np.arange(len(test))).numpy(), other[0] / 255.0, atol=1e-7)
    # Without a split called test.
    (tmp_path / "imagenette2").mkdir()
    for split, part in (("train", parts[0]), ("val", other)):
        write_tree(tmp_path / "imagenette2" / split, part, ("n01440764", "n02102040", "n02979186"))
    for path in (tmp_path / "imagenette2").rglob("*.png"):
        path.rename(path.with_suffix(".JPEG"))
    for wnid in ("n03000684", "n03028079", "n03394916", "n03417042", "n03425413", "n03445777", "n03888257"):
        for split in ("train", "val"):
            (tmp_path / "imagenette2" / split / wnid).mkdir()
            Image.new("RGB", (12, 12)).save(tmp_path / "imagenette2" / split / wnid / "0.JPEG")
    train, test = torchvision(name="Imagenette", root=str(tmp_path))
    assert (len(train), len(test)) == (24 + 7, 12 + 7)
    assert train.classes[0].startswith("tench")


def test_a_share_is_held_out_where_there_are_no_parts() -> None:
    own = {"name": "FakeData", "size": 40, "image_size": [3, 8, 8], "num_classes": 2}
    assert "is not divided" in refused(lambda: torchvision(**own))
    train, test = torchvision(**own, holdout=0.25)
    assert (len(train), len(test)) == (30, 10)
    whole, _ = torchvision(**own, test={"random_offset": 99})
    rows = {image.numpy().tobytes() for image in whole.batch(np.arange(40))}
    found = [{image.numpy().tobytes() for image in part.batch(np.arange(len(part)))} for part in (train, test)]
    assert found[0] | found[1] == rows
    assert not found[0] & found[1]
    for share in (0, 1, 2, "x", True):
        assert "holdout" in refused(lambda share=share: torchvision(**own, holdout=share))


def test_mistakes_in_torchvisions_options(tmp_path: Path) -> None:
    root = str(tmp_path)
    assert "dataset.options has no name" in refused(lambda: torchvision())
    assert "did you mean 'CIFAR10'" in refused(lambda: torchvision(name="Cifar10", root=root))
    message = refused(lambda: torchvision(name="CIFAR10", root=root))
    assert "download: true" in message
    assert "has rot, which torchvision's CIFAR10 does not take; allowed: download, root, train" in refused(
        lambda: torchvision(name="CIFAR10", rot=root)
    )
    assert "has transform" in refused(lambda: torchvision(name="CIFAR10", root=root, transform="ToTensor"))
    assert "has loader" in refused(lambda: torchvision(name="ImageNet", root=root, loader="x"))
    assert "options.train=True is no mapping" in refused(lambda: torchvision(name="MNIST", root=root, train=True))
    assert "channels=2" in refused(lambda: torchvision(name="FakeData", channels=2, size=4, test={"size": 3}))
    assert "dataset.options={root: DIR}" in refused(lambda: build("torchvision", train=root))
    assert "dataset.options=x is no mapping" in refused(lambda: build("torchvision", options="x"))
    assert "'holdouts' (did you mean" not in refused(lambda: torchvision(name="FakeData", holdouts=1))
