"""Fashion-MNIST: the files' format, damaged files, where they are looked for, the real data."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import spray.data.fashion_mnist as module
from spray.data.fashion_mnist import DEBIAN_FOLDER, fashion_mnist, read_idx
from spray.errors import UserError


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def write(folder: Path, n_train: int = 20, n_test: int = 10, compressed: bool = True) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", n_train), ("t10k", n_test)):
        arrays[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = (np.arange(n) % 10).astype(np.uint8)
    for name, array in arrays.items():
        content = idx(array)
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return arrays


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("inside", ["", "raw", "FashionMNIST/raw"])
def test_reads_a_folder(tmp_path: Path, compressed: bool, inside: str) -> None:
    arrays = write(tmp_path / inside, compressed=compressed)
    train, test = fashion_mnist(tmp_path)
    np.testing.assert_array_equal(train.images[:, 0], arrays["train-images-idx3-ubyte"])
    np.testing.assert_array_equal(test.images[:, 0], arrays["t10k-images-idx3-ubyte"])
    np.testing.assert_array_equal(test.labels, arrays["t10k-labels-idx1-ubyte"])
    assert train.image_shape == (1, 28, 28)
    assert train.classes[0] == "T-shirt/top"
    assert train.names[3] == "train/00003"
    assert train.batch(np.array([0])).dtype == torch.float32


@pytest.mark.parametrize("keep", [0, 2, 10, 200])
@pytest.mark.parametrize("compressed", [True, False])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int, compressed: bool) -> None:
    write(tmp_path, compressed=compressed)
    path = tmp_path / ("train-images-idx3-ubyte" + (".gz" if compressed else ""))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="truncated") as caught:
        fashion_mnist(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_damage_is_named(tmp_path: Path) -> None:
    images = np.zeros((3, 28, 28), dtype=np.uint8)
    damaged = {
        "long": (idx(images) + b"x", "too long"),
        "magic": (b"PNG!" + idx(images)[4:], "no idx file"),
        "type": (struct.pack(">4I", 0xD03, 3, 28, 28) + bytes(3 * 784 * 4), "no idx file"),
        "axes": (idx(images[0]) + bytes(4), "no idx file"),
        "huge": (struct.pack(">4I", 0x803, 2**32 - 1, 2**32 - 1, 2**32 - 1), "truncated"),
        "notgzip.gz": (b"plain text, no gzip", "cannot read"),
        "deflate.gz": (gzip.compress(idx(images))[:10] + b"\xff" * 40, "cannot read"),
        "checksum.gz": (gzip.compress(idx(images))[:-8] + bytes(8), "cannot read"),
    }
    for name, (content, message) in damaged.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_idx(path, 3)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("train-labels-idx1-ubyte", np.zeros(19, dtype=np.uint8), "19 labels"),
        ("train-labels-idx1-ubyte", np.full(20, 10, dtype=np.uint8), "label 10"),
        ("train-images-idx3-ubyte", np.zeros((20, 28, 27), dtype=np.uint8), "28×28"),
        ("t10k-images-idx3-ubyte", np.zeros((0, 28, 28), dtype=np.uint8), "28×28"),
    ],
)
def test_files_that_do_not_fit_together(tmp_path: Path, name: str, array: np.ndarray, message: str) -> None:
    write(tmp_path, compressed=False)
    (tmp_path / name).write_bytes(idx(array))
    with pytest.raises(UserError, match=message):
        fashion_mnist(tmp_path)


def test_a_missing_file_or_folder_says_how_to_get_it(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="dataset-fashion-mnist"):
            fashion_mnist(folder)
    write(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match="lacks the t10k"):
        fashion_mnist(tmp_path)


def test_looks_in_debians_folder_then_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "debian", n_train=20)
    write(tmp_path / "cache/FashionMNIST/raw", n_train=30)
    monkeypatch.setenv("SPRAY_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "DEBIAN_FOLDER", tmp_path / "debian")
    assert len(fashion_mnist()[0]) == 20
    monkeypatch.setattr(module, "DEBIAN_FOLDER", tmp_path / "absent")
    assert len(fashion_mnist()[0]) == 30


def test_download_lands_in_the_cache_or_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    def offline(root: str, download: bool) -> None:
        write(Path(root) / "FashionMNIST/raw")
        raise RuntimeError("no\nnetwork")

    def online(root: str, download: bool) -> None:
        write(Path(root) / "FashionMNIST/raw")

    monkeypatch.setattr(module, "DEBIAN_FOLDER", tmp_path / "absent")
    monkeypatch.setenv("SPRAY_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", offline)
    with pytest.raises(UserError, match=r"no network.*dataset-fashion-mnist") as caught:
        fashion_mnist()
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", online)
    assert len(fashion_mnist()[0]) == 20
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["FashionMNIST"]


@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="needs the package dataset-fashion-mnist")
def test_the_real_data() -> None:
    train, test = fashion_mnist()
    assert (len(train), len(test)) == (60_000, 10_000)
    assert np.bincount(train.labels).tolist() == [6000] * 10
    assert np.bincount(test.labels).tolist() == [1000] * 10
    # The published mean and deviation of the training pixels.
    assert train.images.mean() / 255 == pytest.approx(0.2860, abs=1e-4)
    assert train.images[::10].std() / 255 == pytest.approx(0.3530, abs=2e-3)
    # Trousers leave the sides of the picture empty, T-shirts fill them.
    assert train.images[train.labels == 1, 0, :, :4].mean() < train.images[train.labels == 0, 0, :, :4].mean()
