"""Datasets of the user's own: forms of items, labels, classes, fingerprints, threads, and mistakes."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kinds import build, png, refused
from PIL import Image
from torch.utils.data import ConcatDataset, Subset, TensorDataset
from torchvision import transforms

from spray.data.arrays import ArrayDataset
from spray.data.base import ImageDataset, UnreadableSampleError
from spray.data.decoding import decode
from spray.data.items import ItemDataset, unique
from spray.data.subset import even_sample

N = 20


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPRAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", list(sys.path))


class Items:
    """A dataset made of functions."""

    def __init__(self, image: Callable[[int], Any], label: Callable[[int], Any] | None = None, n: int = N) -> None:
        self._image, self._label, self._n = image, label or (lambda row: row % 3), n

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, row: int) -> tuple[Any, Any]:
        return self._image(row), self._label(row)


def pixels_of(row: int, side: int = 6, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(row).integers(0, 256, (channels, side, side), dtype=np.uint8)


def dataset(image: Callable[[int], Any], label: Callable[[int], Any] | None = None, **more: Any) -> ItemDataset:
    n = more.pop("n", N)
    return ItemDataset(Items(image, label, n), "the images", more.pop("image_size", None), **more)


# ---------------------------------------------------------------- forms of images


@pytest.mark.parametrize(
    ("form", "channels"),
    [
        (lambda p: Image.fromarray(p.transpose(1, 2, 0)), 3),
        (lambda p: Image.fromarray(p[0]), 1),
        (lambda p: p.transpose(1, 2, 0), 3),
        (lambda p: p[0], 1),
        (lambda p: p[:1].transpose(1, 2, 0), 1),
        (torch.from_numpy, 3),
        (lambda p: torch.from_numpy(p[0]), 1),
        (lambda p: torch.from_numpy(p).float() / 255, 3),
        (lambda p: torch.from_numpy(p).double().requires_grad_() / 255, 3),
    ],
)
def test_every_form_gives_the_same_pixels(form: Callable[[np.ndarray], Any], channels: int) -> None:
    data = dataset(lambda row: form(pixels_of(row)))
    assert data.image_shape == (channels, 6, 6)
    expected = np.stack([pixels_of(row)[:channels] for row in range(N)]) / 255.0
    np.testing.assert_allclose(data.batch(np.arange(N)).numpy(), expected, atol=1e-7)
    assert data.labels.tolist() == [row % 3 for row in range(N)]


def test_floats_are_not_rounded_to_bytes() -> None:
    values = torch.rand(N, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dataset(lambda row: values[row]).batch(np.arange(N)), values)
    half = dataset(lambda row: values[row].to(torch.bfloat16)).batch(np.arange(N))
    assert torch.equal(half, values.to(torch.bfloat16).float())


def test_bytes_among_floats_are_floats() -> None:
    data = dataset(lambda row: torch.from_numpy(pixels_of(row)) if row % 2 else torch.from_numpy(pixels_of(row)) / 255)
    expected = np.stack([pixels_of(row) for row in range(N)]) / 255.0
    np.testing.assert_allclose(data.batch(np.arange(N)).numpy(), expected, atol=1e-7)


@pytest.mark.parametrize("size", [8, 5, 11])
def test_every_form_is_resized_as_files_are(size: int) -> None:
    files = [decode(png(np.kron(pixels_of(row, 4), np.ones((1, 3, 2), dtype=np.uint8))), size) for row in range(N)]
    source = [np.kron(pixels_of(row, 4), np.ones((1, 3, 2), dtype=np.uint8)) for row in range(N)]  # 12x8
    expected = np.stack(files) / 255.0
    for form in (lambda p: Image.fromarray(p.transpose(1, 2, 0)), lambda p: p.transpose(1, 2, 0), torch.from_numpy):
        data = dataset(lambda row, form=form: form(source[row]), image_size=size)
        np.testing.assert_allclose(data.batch(np.arange(N)).numpy(), expected, atol=1e-7)
    floats = torch.from_numpy(np.stack(source)) / 255
    data = dataset(lambda row: floats[row], image_size=size)
    oracle = transforms.CenterCrop(size)(transforms.Resize(size, antialias=True)(floats))
    np.testing.assert_allclose(data.batch(np.arange(N)).numpy(), oracle.numpy(), atol=1e-5)


def test_grey_stays_grey_only_if_all_are() -> None:
    grey, colour = Image.fromarray(pixels_of(0)[0]), Image.fromarray(pixels_of(0).transpose(1, 2, 0))
    assert dataset(lambda row: grey).image_shape[0] == 1
    assert dataset(lambda row: colour if row == 7 else grey).image_shape[0] == 3
    assert dataset(lambda row: grey, channels=3).image_shape[0] == 3
    assert dataset(lambda row: colour, channels=1).image_shape[0] == 1


def test_images_of_several_sizes_need_one_to_be_set() -> None:
    data = dataset(lambda row: Image.fromarray(pixels_of(row, 6 + row % 2).transpose(1, 2, 0)))
    assert len(data) == N // 2
    assert data.unreadable[0][1].startswith("it is 7×7 with 3 channels, the first image 6×6 with 3 channels; set")
    assert len(dataset(lambda row: pixels_of(row, 6 + row % 2).transpose(1, 2, 0), image_size=4)) == N


@pytest.mark.parametrize(
    ("image", "label", "part"),
    [
        (lambda row: "x.png", None, "its image is a str; it must be an image of Pillow"),
        (lambda row: pixels_of(row).astype(float), None, "array (3, 6, 6) of float64; it must be uint8"),
        (lambda row: pixels_of(row), None, "array (3, 6, 6) of uint8; it must be uint8, (H, W) or (H, W, C)"),
        (lambda row: torch.zeros(3, 6, 6, dtype=torch.int64), None, "tensor (3, 6, 6) of torch.int64"),
        (lambda row: torch.zeros(1, 3, 6, 6), None, "tensor (1, 3, 6, 6)"),
        (lambda row: torch.rand(3, 6, 6) * 0 - 2, None, "go from -2 to -2, outside of [0, 1]; leave normalisation"),
        (lambda row: torch.full((3, 6, 6), torch.nan), None, "outside of [0, 1]"),
        (lambda row: pixels_of(row)[0], lambda row: 0.5, "its label is a float; it must be one whole number"),
        (lambda row: pixels_of(row)[0], lambda row: np.eye(3)[row % 3], "its label is a ndarray"),
        (lambda row: pixels_of(row)[0], lambda row: "cat", "its label is a str"),
        (lambda row: pixels_of(row)[0], lambda row: -1, "its label is -1"),
        (lambda row: 1 / 0, None, "ZeroDivisionError: division by zero (test_data_items.py:"),
    ],
)
def test_what_is_no_image_or_label_is_refused(image: Callable, label: Callable | None, part: str) -> None:
    message = refused(lambda: dataset(image, label))
    assert "no image of the images can be read (first: item 0: " in message
    assert part in message


def test_items_that_are_no_pairs_are_refused() -> None:
    class Dicts(Items):
        def __getitem__(self, row: int) -> Any:
            return {"image": 0}

    assert "it is a dict; it must be a pair" in refused(lambda: ItemDataset(Dicts(pixels_of), "x", None))
    assert "the images is empty" in refused(lambda: dataset(lambda row: pixels_of(row)[0], n=0))
    three = TensorDataset(torch.zeros(4, 3, 6, 6), torch.zeros(4), torch.zeros(4))
    assert "it is a tuple of 3; it must be a pair" in refused(lambda: ItemDataset(three, "x", None))


# ---------------------------------------------------------------- the same each time


def test_random_transforms_are_noticed() -> None:
    rng = np.random.default_rng(0)

    def flip(row: int) -> np.ndarray:
        return pixels_of(row)[0, :, :: rng.choice([-1, 1])]

    assert "gives another image or label when item" in refused(lambda: dataset(flip))
    assert "random transforms" in refused(lambda: dataset(lambda row: pixels_of(row)[0], lambda row: rng.integers(3)))


def test_a_label_that_changes_later_is_noticed() -> None:
    late = [0]
    data = dataset(lambda row: pixels_of(row)[0], lambda row: (row + late[0]) % 3)
    data._memory = None
    late[0] = 1
    with pytest.raises(UnreadableSampleError, match="its label is 1, but was 0 before"):
        data.batch(np.array([0]))


# ---------------------------------------------------------------- labels, classes, fingerprint


def test_labels_come_from_a_list_if_it_is_right() -> None:
    read: list[int] = []

    def image(row: int) -> np.ndarray:
        read.append(row)
        return pixels_of(row)[0]

    n = 200
    items = Items(image, None, n)
    tried = 2 * len(even_sample(n, 32))
    for name, value in (("targets", [row % 3 for row in range(n)]), ("labels", torch.arange(n) % 3)):
        items.__dict__ = {key: items.__dict__[key] for key in ("_image", "_label", "_n")} | {name: value}
        read.clear()
        items.__dict__["fingerprint"] = "own"  # no images are read for one
        assert ItemDataset(items, "x", None, check=False).labels.tolist() == [row % 3 for row in range(n)]
        assert len(read) == tried
    items.targets = [0] * n  # not those of the items
    assert ItemDataset(items, "x", None).labels.tolist() == [row % 3 for row in range(n)]
    items.targets = [0.5] * n
    assert ItemDataset(items, "x", None).labels.tolist() == [row % 3 for row in range(n)]


def test_labels_and_classes_of_parts_and_joins() -> None:
    items = Items(lambda row: pixels_of(row)[0])
    items.targets, items.classes = [row % 3 for row in range(N)], ["a", "b", "c"]
    read: list[int] = []
    items._image = lambda row: (read.append(row), pixels_of(row)[0])[1]
    part = Subset(items, [5, 1, 4])
    data = ItemDataset(ConcatDataset([part, items]), "x", None, check=False)
    assert data.labels.tolist() == [2, 1, 1, *items.targets]
    assert data.classes == ("a", "b", "c")
    np.testing.assert_allclose(data.batch(np.array([0])).numpy()[0], pixels_of(5)[:1] / 255.0, atol=1e-7)


def test_classes_are_numbers_unless_named() -> None:
    assert dataset(lambda row: pixels_of(row)[0]).classes == ("0", "1", "2")
    items = Items(lambda row: pixels_of(row)[0])
    items.classes = ["a", "b"]
    assert "has a label 2, but only 2 classes" in refused(lambda: ItemDataset(items, "x", None))
    assert unique([("tench", "Tinca tinca"), "crane", "crane", 7]) == (
        "tench, Tinca tinca",
        "crane (1)",
        "crane (2)",
        "7",
    )


def test_the_fingerprint_follows_what_it_should() -> None:
    def fingerprint(**more: Any) -> str:
        return dataset(more.pop("image", lambda row: pixels_of(row)[0]), more.pop("label", None), **more).fingerprint

    first = fingerprint()
    assert fingerprint() == first
    others = [
        fingerprint(identity="code"),
        fingerprint(image_size=3),
        fingerprint(channels=3),
        fingerprint(classes=["a", "b", "c"]),
        fingerprint(n=N - 1),
        fingerprint(label=lambda row: (row == 7) + row % 2),
        fingerprint(image=lambda row: pixels_of(row + (row == 7))[0]),
    ]
    assert len({first, *others}) == 1 + len(others)


def test_an_own_fingerprint_is_heeded() -> None:
    def made(value: str, offset: int) -> str:
        items = Items(lambda row: pixels_of(row + offset)[0])
        items.fingerprint = value
        return ItemDataset(items, "x", None).fingerprint

    assert made("a", 0) == made("a", 1) != made("b", 0)


# ---------------------------------------------------------------- threads


@pytest.mark.parametrize("safe", [False, True])
def test_one_item_at_a_time_unless_threads_are_allowed(safe: bool) -> None:
    lock, inside, most = threading.Lock(), 0, 0

    def image(row: int) -> np.ndarray:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.002)
        with lock:
            inside -= 1
        return pixels_of(row)[0]

    data, other = (dataset(image, in_threads=safe, check=False) for _ in range(2))
    data._memory = other._memory = None
    most = 0
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda part: part.batch(np.arange(N)), [data, other] * 2))
    assert (most > 1) == safe


# ---------------------------------------------------------------- the user's function


def factory(folder: Path, code: str, function: str = "load", **changes: object) -> tuple[ImageDataset, ImageDataset]:
    path = folder / "mine.py"
    path.write_text(code)
    return build("factory", factory=f"{path}:{function}", **changes)


GOOD = """
import numpy as np

class Data:
    def __init__(self, n, value=0):
        self.n, self.value = n, value
    def __len__(self):
        return self.n
    def __getitem__(self, row):
        from late_helper import LABELS
        return np.full((4, 4), self.value + row, dtype=np.uint8), row % LABELS

def load(n=6, image_size=None, train=None):
    return Data(n), Data(4, 100 if train is None else int(train))

def nothing(): pass
def one(): return (Data(3),)
def lists(): return [[1, 2], [3]]
def numbers(): return 1, 2
def stream():
    class Stream:
        def __iter__(self):
            return iter([])
        def __getitem__(self, row):
            return 0
    return Stream(), Stream()
"""


def test_a_function_gives_datasets_and_takes_options(tmp_path: Path) -> None:
    (tmp_path / "late_helper.py").write_text("LABELS = 2")
    sys.modules.pop("late_helper", None)
    train, test = factory(tmp_path, GOOD, options={"n": 10}, image_size=2, train="50")
    assert (len(train), len(test)) == (10, 4)
    assert train.image_shape == (1, 2, 2)
    np.testing.assert_allclose(test.batch(np.arange(4))[:, 0, 0, 0].numpy(), np.arange(50, 54) / 255, atol=1e-7)
    first = train.fingerprint
    (tmp_path / "late_helper.py").write_text("LABELS = 2  # another")
    assert factory(tmp_path, GOOD, options={"n": 10}, image_size=2)[0].fingerprint != first


def test_mistakes_in_the_function(tmp_path: Path) -> None:
    (tmp_path / "late_helper.py").write_text("LABELS = 2")

    def message(function: str = "load", **changes: object) -> str:
        return refused(lambda: factory(tmp_path, GOOD, function, **changes))

    assert "dataset.factory=" in message("nothing")
    assert "returns None; it must return (training, test) datasets" in message("nothing")
    assert "returns a tuple of 1; it must" in message("one")
    assert "it must be a pair" in message("lists")
    assert "the training images of mine.py:numbers are a int" in message("numbers")
    assert "it lacks __len__" in message("stream")
    assert "unexpected keyword argument 'm'" in message(options={"m": 1})
    assert "unexpected keyword argument 'test'" in message(test="x")
    assert "dataset.factory: there is no file" in refused(lambda: build("factory", factory="nowhere.py:load"))
    assert "dataset.factory is not set" in refused(lambda: build("factory"))
    assert "dataset.factory=x.py:f: only dataset=factory" in refused(
        lambda: build("image_folder", factory="x.py:f", train="a", test="b", image_size=8)
    )


def test_own_image_datasets_are_taken_as_they_are(tmp_path: Path) -> None:
    code = """
        import numpy as np
        from spray.data.arrays import ArrayDataset
        from spray.data.base import ImageDataset
        def load():
            images = np.arange(4 * 9, dtype=np.uint8).reshape(4, 1, 3, 3)
            return ArrayDataset(images, [0, 1, 0, 1], ["x", "y"]), ArrayDataset(images[:2], [0, 1], ["x", "y"])
        class Bare(ImageDataset):
            def batch(self, indices): return None
        def bare(): return Bare(), Bare()
        def wrong():
            good = load()[0]
            good.labels = np.array([0, 1, 0, 2])
            return good, good
    """
    code = "\n".join(line[8:] for line in code.splitlines())
    train, test = factory(tmp_path, code)
    assert isinstance(train, ArrayDataset)
    assert (len(train), len(test)) == (4, 2)
    assert "have no classes: names of the classes" in refused(lambda: factory(tmp_path, code, "bare"))
    assert "labels from 0 to 2, but 2 classes" in refused(lambda: factory(tmp_path, code, "wrong"))


def test_an_item_that_raises_says_where(tmp_path: Path) -> None:
    code = GOOD.replace("return np.full", "if row == 4: raise OSError('cut\\noff')\n        return np.full")
    (tmp_path / "late_helper.py").write_text("LABELS = 2")
    train, _ = factory(tmp_path, code)
    line = 1 + next(i for i, text in enumerate(code.splitlines()) if "raise OSError" in text)
    assert train.unreadable == [("4", f"OSError: cut (mine.py:{line})")]
    assert train.labels.tolist() == [0, 1, 0, 1, 1]
