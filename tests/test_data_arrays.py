"""Arrays in `.npz` and HDF5 files: layouts, types, keys, reading in parts, and what is refused."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from kinds import LABELS, build, images, refused

from spray.data.base import ImageDataset, UnreadableSampleError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPRAY_CACHE", str(tmp_path / "cache"))


def write(path: Path, **arrays: Any) -> str:
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for key, value in arrays.items():
                file[key] = value
    return str(path)


def arrays(path: str, **changes: object) -> tuple[ImageDataset, ImageDataset]:
    return build("arrays", train=path, test=path, **changes)


@pytest.mark.parametrize("ending", ["npz", "h5"])
@pytest.mark.parametrize(
    ("axes", "shape", "layout"),
    [
        ((0, 1, 2, 3), (3, 8, 8), None),
        ((0, 2, 3, 1), (3, 8, 8), None),
        ((0, 2, 3, 1), (1, 8, 8), None),
        ((0, 2, 3, 1), (3, 3, 3), "channels_last"),
        ((0, 1, 2, 3), (3, 3, 3), "channels_first"),
        ((0, 2, 3, 1), (5, 8, 8), "channels_last"),
    ],
)
def test_layouts(
    tmp_path: Path, ending: str, axes: tuple[int, ...], shape: tuple[int, ...], layout: str | None
) -> None:
    pixels = images(shape=shape)
    path = write(tmp_path / f"x.{ending}", images=pixels.transpose(axes), labels=LABELS)
    train, _ = arrays(path, options=layout and {"layout": layout})
    assert train.image_shape == shape
    np.testing.assert_allclose(train.batch(np.arange(10)).numpy(), pixels / 255.0, atol=1e-7)


@pytest.mark.parametrize("ending", ["npz", "h5"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_floats(tmp_path: Path, ending: str, dtype: str) -> None:
    values = (images()[:, 0] / 255).astype(dtype)
    train, _ = arrays(write(tmp_path / f"x.{ending}", images=values, labels=LABELS))
    assert train.image_shape == (1, 8, 8)
    np.testing.assert_array_equal(train.batch(np.arange(10)).numpy()[:, 0], values.astype(np.float32))


def test_hdf5_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = images(300)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("images", data=pixels, chunks=(7, 3, 8, 8), compression="gzip", shuffle=True)
        file["labels"] = np.arange(300) % 2
    read: list[int] = []
    original = h5py.Dataset.read_direct

    def counting(self: h5py.Dataset, out: np.ndarray, source: slice, target: slice) -> None:
        read.append(source.stop - source.start)
        original(self, out, source, target)

    monkeypatch.setattr(h5py.Dataset, "read_direct", counting)
    train, _ = arrays(str(tmp_path / "x.h5"), check=False)
    read.clear()
    asked = np.array([250, 3, 4, 5, 4, 251, 299, 0])
    np.testing.assert_allclose(train.batch(asked).numpy(), pixels[asked] / 255.0, atol=1e-7)
    assert read == [1, 3, 2, 1]
    asked = [np.random.default_rng(seed).integers(0, 300, 50) for seed in range(30)]
    with ThreadPoolExecutor(4) as pool:
        for rows, batch in zip(asked, pool.map(train.batch, asked), strict=True):
            np.testing.assert_allclose(batch.numpy(), pixels[rows] / 255.0, atol=1e-7)


def test_one_thread_at_a_time_uses_hdf5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, _ = arrays(write(tmp_path / "x.h5", images=images(), labels=LABELS))
    lock, inside, most = threading.Lock(), 0, 0

    def slow(self: h5py.Dataset, out: np.ndarray, source: slice, target: slice) -> None:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.002)
        with lock:
            inside -= 1

    monkeypatch.setattr(h5py.Dataset, "read_direct", slow)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(train.batch, [np.arange(10)] * 20))
    assert most == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_process_opens_hdf5_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "x.h5", images=images(), labels=LABELS)
    train, _ = arrays(path)
    expected = train.batch(np.arange(10)).numpy()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover
        good = np.array_equal(train.batch(np.arange(10)).numpy(), expected)
        good = good and train._source._process == os.getpid()
        os.write(writer, b"good" if good else b"bad")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 10) == b"good"
    np.testing.assert_array_equal(train.batch(np.arange(10)).numpy(), expected)
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("ending", ["npz", "h5"])
def test_names_and_classes(tmp_path: Path, ending: str, caplog: pytest.LogCaptureFixture) -> None:
    names = [f"näme {row}" for row in range(10)]
    path = write(
        tmp_path / f"x.{ending}", images=images(), labels=LABELS.astype(np.int8), classes=["a", "é"], names=names
    )
    train, test = arrays(path)
    assert train.classes == test.classes == ("a", "é")
    assert list(train.names) == names
    train, _ = arrays(write(tmp_path / f"y.{ending}", images=images(), labels=LABELS, names=["same"] * 10))
    assert train.classes == ("0", "1")
    assert list(train.names) == [str(row) for row in range(10)]
    assert "names are left aside" in caplog.text


def test_numbers_as_classes_are_those_of_both_parts(tmp_path: Path) -> None:
    train = write(tmp_path / "train.npz", images=images(), labels=LABELS)
    test = write(tmp_path / "test.npz", images=images(), labels=LABELS * 3)
    parts = build("arrays", train=train, test=test)
    assert [part.classes for part in parts] == [("0", "1", "2", "3")] * 2


@pytest.mark.parametrize("ending", ["npz", "h5"])
@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"images": images().astype(np.uint16)}, "are uint16; they must be uint8, or floating point in [0, 1]"),
        ({"images": images()[0, 0]}, "have shape (8, 8); it must be (N, C, H, W)"),
        ({"images": images(shape=(5, 8, 8))}, "does not tell where the channels are; set dataset.options={layout"),
        ({"images": images(shape=(3, 3, 3))}, "does not tell where the channels are"),
        ({"images": images(0)}, "have shape (0, 3, 8, 8)"),
        ({"images": images(9)}, "holds 9 images, but 10 labels"),
        (
            {"images": images() / 1.0},
            "no readable image (first: 0: its values go from 0 to 255, outside of [0, 1])",
        ),
        ({"labels": LABELS / 1.0}, "the labels in"),
        ({"labels": np.eye(10, dtype=int)}, "are int64 (10, 10); they must be whole numbers (N,)"),
        ({"labels": LABELS - 1}, "has a label -1"),
        ({"classes": ["a"]}, "has a label 1, but there are only 1 classes"),
        ({"labels": LABELS * 0}, "one class only"),
        ({"images": images(shape=(3, 8, 9))}, "are 8×9"),
    ],
)
def test_arrays_that_are_no_images_and_labels(tmp_path: Path, ending: str, changes: dict, part: str) -> None:
    pixels = images()
    if "readable" in part:
        pixels[0, 0, 0, :2] = 0, 255
        changes = {"images": np.broadcast_to(pixels[:1] / 1.0, pixels.shape)}
    path = write(tmp_path / f"x.{ending}", **({"images": pixels, "labels": LABELS} | changes))
    assert part in refused(lambda: arrays(path))


def test_mistakes_with_arrays(tmp_path: Path) -> None:
    path = write(tmp_path / "x.npz", x=images(), y=LABELS)
    assert "has no array 'images'; it holds x, y; name it with dataset.options={images: KEY}" in refused(
        lambda: arrays(path)
    )
    assert "has no array 'z'" in refused(lambda: arrays(path, options={"images": "z", "labels": "y"}))
    assert "has no array 'c'" in refused(lambda: arrays(path, options={"images": "x", "labels": "y", "classes": "c"}))
    assert len(arrays(path, options={"images": "x", "labels": "y"})[0]) == 10
    assert "has 'image' (did you mean 'images'?), which is no option of dataset=arrays" in refused(
        lambda: arrays(path, options={"image": "x"})
    )
    assert "layout=last is unknown; allowed: channels_first" in refused(
        lambda: arrays(path, options={"layout": "last"})
    )
    assert "dataset.test is not set; give dataset.test=FILE.npz" in refused(lambda: build("arrays", train=path))
    for name in ("absent.npz", "absent.h5"):
        assert "absent" in refused(lambda name=name: arrays(str(tmp_path / name)))
    (tmp_path / "x.csv").write_text("1")
    assert "neither an .npz file nor an HDF5 file" in refused(lambda: arrays(str(tmp_path / "x.csv")))
    for ending in ("npz", "h5"):
        (tmp_path / f"text.{ending}").write_text("text")
        assert f"text.{ending}" in refused(lambda ending=ending: arrays(str(tmp_path / f"text.{ending}")))
    content = Path(path).read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    assert "cannot be read" in refused(lambda: arrays(str(tmp_path / "cut.npz")))
    objects = np.array([images()[0], None, 1, 2, 3, 4, 5, 6, 7, 8], dtype=object)
    path = write(tmp_path / "objects.npz", images=objects, labels=LABELS)
    assert "holds Python objects, which are not read" in refused(lambda: arrays(path))


def test_parts_of_other_sizes_are_refused(tmp_path: Path) -> None:
    train = write(tmp_path / "train.npz", images=images(), labels=LABELS)
    test = write(tmp_path / "test.npz", images=images(shape=(3, 9, 9)), labels=LABELS)
    assert "the training images are 8×8 (3 channels), the test images 9×9 (3 channels); both must be" in refused(
        lambda: build("arrays", train=train, test=test)
    )


def test_foreign_hdf5_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "other.h5", images=images(), labels=LABELS)
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["images"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "images")
        file["labels"] = LABELS
    assert "link to another file" in refused(lambda: arrays(str(tmp_path / "link.h5")))
    (tmp_path / "raw").write_bytes(images().tobytes())
    with h5py.File(tmp_path / "outside.h5", "w") as file:
        file.create_dataset("images", (10, 3, 8, 8), "u1", external=[(str(tmp_path / "raw"), 0, h5py.h5f.UNLIMITED)])
        file["labels"] = LABELS
    assert "external storage" in refused(lambda: arrays(str(tmp_path / "outside.h5")))


def test_hdf5_that_is_replaced_while_it_is_used(tmp_path: Path) -> None:
    path = write(tmp_path / "x.h5", images=images(), labels=LABELS)
    train, _ = arrays(path)
    train._source._process = -1
    write(tmp_path / "y.h5", images=images(9), labels=LABELS[:9])
    os.replace(tmp_path / "y.h5", path)
    with pytest.raises(UnreadableSampleError, match="the array changed to uint8"):
        train.batch(np.array([0]))


def test_the_same_file_twice_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "x.npz", images=images(), labels=LABELS, a=LABELS)
    arrays(path)
    assert "every accuracy is one on training images" in caplog.text
    caplog.clear()
    arrays(path, options={"test_images": "images", "test_labels": "a"})
    assert caplog.text == ""
