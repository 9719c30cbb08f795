"""Tables that Hugging Face's library saved to disk: columns, splits, labels, images, and what is refused."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kinds import LABELS, build, images, png, refused
from PIL import Image

from spray.data.base import UnreadableSampleError
from spray.data.decoding import decode


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPRAY_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def library() -> Any:
    found = pytest.importorskip("datasets")
    found.disable_progress_bars()
    return found


def table(library: Any, n: int = 6, **columns: Any) -> Any:
    features = {"image": library.Image(), "label": library.ClassLabel(names=["a", "b"])}
    values: dict[str, Any] = {
        "image": [{"bytes": png(image), "path": None} for image in images()[:n]],
        "label": LABELS[:n].tolist(),
    }
    for key, (feature, column) in columns.items():
        features[key], values[key] = feature, column
    return library.Dataset.from_dict(values, features=library.Features(features))


def saved(data: Any, path: Path) -> str:
    data.save_to_disk(str(path))
    return str(path)


def test_columns_and_splits(tmp_path: Path, library: Any) -> None:
    whole = table(library)
    train = saved(whole, tmp_path / "train")
    test = saved(whole.select([5, 0, 3]), tmp_path / "test")
    first, second = build("huggingface", train=train, test=test)
    assert first.classes == second.classes == ("a", "b")
    assert second.labels.tolist() == [1, 0, 1]
    np.testing.assert_allclose(second.batch(np.arange(3)).numpy(), images()[[5, 0, 3]] / 255.0, atol=1e-7)
    renamed = table(library).rename_columns({"image": "x", "label": "y"})
    parts = saved(library.DatasetDict(train=renamed, validation=renamed.select([1, 2])), tmp_path / "parts")
    first, second = build("huggingface", train=parts)
    assert (len(first), len(second)) == (6, 2)
    first, second = build("huggingface", train=parts, options={"train_split": "validation", "test_split": "train"})
    assert (len(first), len(second)) == (2, 6)
    assert "has no split dev, but train, validation" in refused(
        lambda: build("huggingface", train=parts, options={"test_split": "dev"})
    )
    assert "holds one dataset without splits" in refused(
        lambda: build("huggingface", train=train, test=test, options={"test_split": "dev"})
    )


def test_labels_of_several_kinds(tmp_path: Path, library: Any) -> None:
    texts = ["cat", "bee", None, "cat", "bee", "cat"]
    numbers = [1, 0, 1, None, 0, 1]
    words, ints = library.Value("string"), library.Value("int32")
    data = saved(table(library, word=(words, texts), number=(ints, numbers)), tmp_path / "data")
    first, _ = build("huggingface", train=data, test=data, options={"label": "word"})
    assert first.classes == ("bee", "cat")
    assert first.labels.tolist() == [1, 0, 1, 0, 1]
    assert first.unreadable == [("2", "it has no label")]
    first, _ = build("huggingface", train=data, test=data, options={"label": "number"}, check=False)
    assert first.classes == ("0", "1")
    assert first.labels.tolist() == [1, 0, 1, 0, 1]
    other = saved(table(library, word=(words, ["dog"] * 6)), tmp_path / "other")
    assert "has a class 'dog', which the training images lack" in refused(
        lambda: build("huggingface", train=data, test=other, options={"label": "word"})
    )


def test_classes_in_another_order_are_refused(tmp_path: Path, library: Any) -> None:
    data = saved(table(library), tmp_path / "data")
    swapped = table(library).cast_column("label", library.ClassLabel(names=["b", "a"]))
    assert "number the classes differently" in refused(
        lambda: build("huggingface", train=data, test=saved(swapped, tmp_path / "swapped"))
    )


def test_images_are_decoded_as_files_are(tmp_path: Path, library: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(images(shape=(8, 12, 3))[0]).save(buffer, "png", exif=exif)
    contents = [buffer.getvalue(), b"", None, b"text", png(images()[0]), png(images()[0])]
    rows = [{"bytes": content, "path": None} for content in contents]
    rows[2] = {"bytes": None, "path": "/etc/passwd"}
    stored = {"bytes": library.Value("binary"), "path": library.Value("string")}
    data = saved(table(library, picture=(stored, rows), raw=(library.Value("binary"), contents)), tmp_path / "d")
    # The library would put the file in when it saves; whoever makes such a table by hand would not.
    about = json.loads((tmp_path / "d/dataset_info.json").read_text())
    about["features"]["picture"] = {"_type": "Image"}
    (tmp_path / "d/dataset_info.json").write_text(json.dumps(about))
    for column, of_two in (("picture", "the dataset holds the path of a file only"), ("raw", "there is no image")):
        own = {"image": column}
        train, _ = build("huggingface", train=data, test=data, image_size=8, options=own, check=False)
        expected = np.stack([decode(contents[row] or b"", 8) for row in (0, 4)]) / 255.0
        np.testing.assert_allclose(train.batch(np.array([0, 4])).numpy(), expected, atol=1e-7)
        for row, reason in ((1, "the file is empty"), (2, of_two), (3, "not an image of a known format")):
            with pytest.raises(UnreadableSampleError) as caught:
                train.batch(np.array([row]))
            assert reason in caught.value.reason


def test_tables_that_are_refused(tmp_path: Path, library: Any) -> None:
    data = saved(table(library, z=(library.Value("float32"), [0.5] * 6)), tmp_path / "data")
    assert "has no column 'x', but image, label, z" in refused(
        lambda: build("huggingface", train=data, test=data, options={"image": "x"})
    )
    assert "the column 'z' holds no images" in refused(
        lambda: build("huggingface", train=data, test=data, options={"image": "z"})
    )
    assert "the column 'z' holds float; labels are whole numbers or texts" in refused(
        lambda: build("huggingface", train=data, test=data, options={"label": "z"})
    )
    bare = saved(table(library).remove_columns("label"), tmp_path / "bare")
    assert "no column of labels that is plain" in refused(lambda: build("huggingface", train=bare, test=bare))
    assert "there is no folder" in refused(lambda: build("huggingface", train=str(tmp_path / "absent")))
    assert "dataset.train is not set" in refused(lambda: build("huggingface"))
    (tmp_path / "empty").mkdir()
    assert "cannot be loaded" in refused(lambda: build("huggingface", train=str(tmp_path / "empty")))
    state = json.loads((tmp_path / "data/state.json").read_text())
    for name in ("../bare/data-00000-of-00001.arrow", "/etc/passwd", "zip://x::y"):
        state["_data_files"] = [{"filename": name}]
        (tmp_path / "data/state.json").write_text(json.dumps(state))
        assert "names a file outside of the dataset's folder" in refused(lambda: build("huggingface", train=data))
    (tmp_path / "data/state.json").write_text("{")
    assert "is damaged" in refused(lambda: build("huggingface", train=data))


def test_without_the_library_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = refused(lambda: build("huggingface", train=str(tmp_path)))
    assert "pip install 'spray-xai[huggingface]'" in message
