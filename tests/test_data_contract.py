"""What every kind of dataset keeps to: index, image, label; order, threads, fingerprint, unreadable samples."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from kinds import KINDS, Kind, Part, build

from spray.data import decoded, loading
from spray.data.base import ImageDataset, UnreadableSampleError
from spray.data.loading import DATASETS
from spray.data.subset import Subset, per_class
from spray.errors import UserError

BAD = 5
"""The training image that is spoiled."""
CHANGED = 7


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPRAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> Kind:
    found = KINDS[request.param]
    for package in found.needs:
        pytest.importorskip(package)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def made(configuration: SimpleNamespace, **changes: object) -> tuple[ImageDataset, ImageDataset]:
    return build(**(vars(configuration) | changes))


def pixels(data: ImageDataset) -> np.ndarray:
    return data.batch(np.arange(len(data))).numpy()


def test_every_kind_of_dataset_is_here() -> None:
    here = {name.partition("/")[0] for name in KINDS}
    # The fakes of the runner's tests add `tiny`; a project of results has no test part (see test_virelay_project.py).
    assert here == set(DATASETS.names()) - {"tiny", "virelay"}
    assert {path.stem for path in Path(loading.__file__).parents[2].glob("conf/dataset/*.yaml")} == {*here, "virelay"}


def test_index_image_and_label_are_what_was_written(kind: Kind, folder: Path) -> None:
    parts = kind.parts()
    for data, (images, labels) in zip(made(kind.write(folder, *parts)), parts, strict=True):
        assert isinstance(data.classes, tuple)
        assert all(isinstance(name, str) and name for name in data.classes)
        assert len(set(data.classes)) == len(data.classes)
        assert len(data) == len(data.labels) == len(data.names)
        assert data.labels.dtype == np.int64
        assert set(data.labels.tolist()) <= set(range(len(data.classes)))
        assert list(data.unreadable) == []
        assert len(data.image_shape) == 3
        if not kind.fixed:
            assert data.image_shape == images.shape[1:]
            np.testing.assert_array_equal(data.labels, labels)
            np.testing.assert_allclose(pixels(data), images / 255.0, atol=1e-7)


def test_batches_are_float_in_range_in_the_asked_order(kind: Kind, folder: Path) -> None:
    data, _ = made(kind.write(folder, *kind.parts()))
    order = np.random.default_rng(1).permutation(min(len(data), 24))
    asked = np.concatenate([order, order[:3], order[:1]])
    batch = data.batch(asked)
    assert (batch.dtype, batch.device.type) == (torch.float32, "cpu")
    assert batch.shape == (len(asked), *data.image_shape)
    assert 0 <= batch.min() < batch.max() <= 1
    for place, index in enumerate(asked):
        assert torch.equal(batch[place], data.batch(np.array([index]))[0])
    assert data.batch(np.array([], dtype=np.int64)).shape == (0, *data.image_shape)
    # What a user does to a batch stays there.
    batch.zero_()
    assert data.batch(asked).max() > 0
    with pytest.raises(IndexError):
        data.batch(np.array([len(data)]))


def test_threads_get_what_one_gets(kind: Kind, folder: Path) -> None:
    configuration = kind.write(folder, *kind.parts())
    expected = pixels(made(configuration)[0])
    data = made(configuration)[0]  # nothing of it was used before
    rng = np.random.default_rng(2)
    asked = [rng.integers(0, len(data), 17) for _ in range(40)]
    with ThreadPoolExecutor(4) as pool:
        for indices, batch in zip(asked, pool.map(data.batch, asked), strict=True):
            np.testing.assert_array_equal(batch.numpy(), expected[indices])


def test_names_are_printable_and_each_one_of_its_own(kind: Kind, folder: Path) -> None:
    for data in made(kind.write(folder, *kind.parts())):
        names = [data.names[index] for index in range(len(data))]
        assert all(isinstance(name, str) and name and name.isprintable() for name in names)
        assert len(set(names)) == len(names)


def test_the_fingerprint_stays(kind: Kind, folder: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configuration = kind.write(folder, *kind.parts())
    first = [data.fingerprint for data in made(configuration)]
    assert len(set(first)) == 2
    assert [data.fingerprint for data in made(configuration)] == first
    monkeypatch.setenv("SPRAY_CACHE", str(own_cache) + "2")
    assert [data.fingerprint for data in made(configuration)] == first
    assert [data.fingerprint for data in made(configuration, check=False)] == first


@pytest.mark.parametrize("what", ["image", "label"])
def test_the_fingerprint_follows_the_data(kind: Kind, folder: Path, what: str) -> None:
    if kind.fixed:
        pytest.skip("its images are its own")
    train, test = kind.parts()
    first = [data.fingerprint for data in made(kind.write(folder, train, test))]
    changed: Part = (train[0].copy(), train[1].copy())
    if what == "image":
        changed[0][CHANGED] = 255 - changed[0][CHANGED]
    else:  # the last of the first class goes to the second
        changed[1][np.flatnonzero(train[1] == 0)[-1]] = 1
    again = [data.fingerprint for data in made(kind.write(folder, changed, test))]
    assert again[0] != first[0]


def test_a_sample_that_cannot_be_read_is_left_out(kind: Kind, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    if kind.spoil is None:
        pytest.skip("it is read as a whole or not at all")
    train, test = kind.parts()
    configuration = kind.write(folder, train, test)
    whole = made(configuration)[0].fingerprint
    kind.spoil(folder, [BAD])
    kept = np.delete(np.arange(len(train[1])), BAD)
    for _ in range(2):  # found out, then remembered
        data = made(configuration)[0]
        assert len(data) == len(kept)
        assert len(data.unreadable) == 1
        name, reason = data.unreadable[0]
        assert reason
        assert name not in [data.names[index] for index in range(len(data))]
        np.testing.assert_array_equal(data.labels, train[1][kept])
        np.testing.assert_allclose(pixels(data), train[0][kept] / 255.0, atol=1e-7)
        assert data.fingerprint != whole
        assert f"left out {name}: {reason}" in caplog.text


def test_a_sample_that_cannot_be_read_is_known_when_it_is_used(kind: Kind, folder: Path) -> None:
    if kind.spoil is None:
        pytest.skip("it is read as a whole or not at all")
    if kind is KINDS["factory/tensors"]:
        pytest.skip("items are all read for their labels")
    train, test = kind.parts()
    configuration = kind.write(folder, train, test)
    kind.spoil(folder, [BAD])
    data = made(configuration, check=False)[0]
    assert len(data) == len(train[1])
    assert list(data.unreadable) == []
    assert data.fingerprint != made(configuration)[0].fingerprint  # other samples
    with pytest.raises(UnreadableSampleError, match=r"dataset\.check=true leaves such images out") as caught:
        data.batch(np.array([3, BAD, 4]))
    assert caught.value.index == BAD
    assert caught.value.reason
    assert "\n" not in str(caught.value)
    good = np.delete(np.arange(len(data)), BAD)
    np.testing.assert_allclose(data.batch(good).numpy(), train[0][good] / 255.0, atol=1e-7)
    with pytest.raises(UnreadableSampleError) as caught:
        Subset(data, np.array([9, BAD, 2])).batch(np.array([2, 1]))
    assert caught.value.index == 1


def test_all_of_a_class_unreadable_is_an_error(kind: Kind, folder: Path) -> None:
    if kind.spoil is None:
        pytest.skip("it is read as a whole or not at all")
    if kind is KINDS["factory/tensors"]:
        pytest.skip("only its items tell their labels")
    train, test = kind.parts()
    configuration = kind.write(folder, train, test)
    kind.spoil(folder, np.flatnonzero(train[1] == 1).tolist())
    with pytest.raises(UserError, match=r"class '(bee|1)' .* has no readable image"):
        made(configuration)


def test_another_process_makes_the_same_of_the_configuration(tmp_path: Path) -> None:
    configurations, expected = [], []
    for number, one in enumerate(KINDS.values()):
        if all(package_is_there(package) for package in one.needs):
            (tmp_path / str(number)).mkdir()
            configurations.append(one.write(tmp_path / str(number), *one.parts()))
            train, test = made(configurations[-1])
            expected.append([train.fingerprint, test.fingerprint, float(pixels(test).astype(np.float64).sum())])
    code = """if True:
        import json, sys, numpy as np
        from types import SimpleNamespace
        from spray.data.loading import DATASETS
        found = []
        for configuration in json.load(sys.stdin):
            train, test = DATASETS.get(configuration["name"])(SimpleNamespace(**configuration))
            total = test.batch(np.arange(len(test))).numpy().astype(np.float64).sum()
            found.append([train.fingerprint, test.fingerprint, float(total)])
        print(json.dumps(found))
    """
    plain = json.dumps([vars(configuration) for configuration in configurations])
    root = str(Path(loading.__file__).parents[2])
    said = subprocess.run(
        [sys.executable, "-c", code],
        input=plain,
        env=os.environ | {"PYTHONPATH": root, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(said.stdout.splitlines()[-1]) == expected


def package_is_there(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def test_a_few_of_each_class(kind: Kind, folder: Path) -> None:
    data, _ = made(kind.write(folder, *kind.parts()))
    few = per_class(data, 2)
    assert np.bincount(few.labels, minlength=len(data.classes)).max() == 2
    rows = [list(data.names).index(name) for name in few.names]
    assert torch.equal(few.batch(np.arange(len(few))), data.batch(np.array(rows)))


def test_the_error_comes_back_from_a_worker_whole() -> None:
    error = UnreadableSampleError(7, "cut off", "x.png cannot be read: cut off")
    again = pickle.loads(pickle.dumps(error))
    assert (again.index, again.reason, str(again)) == (7, "cut off", "x.png cannot be read: cut off")
    assert "sample 3 cannot be read: why" in str(UnreadableSampleError(3, "why"))


def test_two_starts_do_not_get_in_each_others_way(kind: Kind, folder: Path) -> None:
    configuration = kind.write(folder, *kind.parts())
    start = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        found = {data.fingerprint for data, _ in pool.map(lambda _: made(configuration), range(4))}
    assert len(found) == 1
    assert time.monotonic() - start < 60


def test_what_was_found_out_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second start decodes no more than the few images that the fingerprint is made of."""
    asked: list[int] = []
    original = decoded.run_check

    def counting(read: Any, check: Any, *more: Any) -> Any:
        asked.append(int((check.state == 0).sum()))
        return original(read, check, *more)

    monkeypatch.setattr(decoded, "run_check", counting)
    for number, name in enumerate(("arrays/HDF5", "webdataset", "factory/images", "torchvision/Country211")):
        folder = tmp_path / str(number)
        folder.mkdir()
        configuration = KINDS[name].write(folder, *KINDS[name].parts())
        assert KINDS[name].spoil is not None
        KINDS[name].spoil(folder, [3])
        asked.clear()
        for _ in range(2):
            train, _ = made(configuration)
            assert len(train.unreadable) == 1
        assert asked == [24, 12, 0, 0], name
