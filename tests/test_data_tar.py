"""WebDataset's tar files: samples, classes, patterns, the index that is remembered, damage, and what is refused."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from kinds import add, build, images, png, refused

from spray.data import tar_index
from spray.data.base import ImageDataset, UnreadableSampleError
from spray.data.decoding import decode
from spray.data.webdataset import find_shards


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPRAY_CACHE", str(tmp_path / "cache"))


def write_tar(path: Path, *files: tuple[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in files:
            add(tar, name, content)
    return path


def samples(n: int = 6, start: int = 0) -> list[tuple[str, bytes]]:
    found: list[tuple[str, bytes]] = []
    for row in range(start, start + n):
        found += [(f"{row}.jpg", png(images()[row % 10])), (f"{row}.cls", str(row % 2).encode())]
    return found


def tars(train: object, test: object = None, **changes: object) -> tuple[ImageDataset, ImageDataset]:
    return build("webdataset", train=str(train), test=str(test or train), **changes)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_of_tar_files(tmp_path: Path, form: int) -> None:
    long = "x" * 150
    files = [
        (f"deep/{long}.with.jpg", b"no image by its ending"),
        (f"deep/{long}.png", png(images()[0])),
        (f"deep/{long}.cls", b" 1\n"),
        ("README", b"text"),
        ("b.seg.png", b"another image of it"),
        ("b.json", b'{"label": 0, "x": [1]}'),
        ("b.txt", b"a caption"),
        ("b.JPG", png(images()[1])),
        (".hidden.jpg", b"x"),
        ("a/c.cls", b"1"),
        ("a/c.png", png(images()[2])),
    ]
    if form == tarfile.USTAR_FORMAT:
        files = [(name.replace(long, "y" * 60), content) for name, content in files]
    path = write_tar(tmp_path / "s-000.tar", *files, form=form)
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("folder")
        member.type = tarfile.DIRTYPE
        tar.addfile(member)
    train, _ = tars(path)
    assert train.labels.tolist() == [1, 0, 1]
    assert [name.rpartition("/")[2] for name in train.names] == [("y" * 60 if form == 0 else long), "b", "c"]
    np.testing.assert_allclose(train.batch(np.arange(3)).numpy(), images()[:3] / 255.0, atol=1e-7)


def test_incomplete_samples_are_left_out(tmp_path: Path) -> None:
    files = [*samples(), ("x.jpg", b"x"), ("y.cls", b"1"), ("z.jpg", b"x"), ("z.cls", b"one"), ("w.jpg", b"x")]
    files += [("w.json", b'{"label": true}'), ("v.jpg", b"x"), ("v.json", b"{"), ("u.jpg", b""), ("u.cls", b"0")]
    train, _ = tars(write_tar(tmp_path / "s.tar", *files))
    assert len(train) == 6
    reasons = dict(train.unreadable)
    assert sorted(reasons) == [f"s/{name}" for name in "uvwxyz"]
    assert reasons["s/y"] == "it has no image"
    assert reasons["s/u"] == "the file is empty"
    assert all("no label" in reasons[f"s/{name}"] for name in "vwxz")


def test_classes_of_tar_files(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", *samples())
    assert tars(path)[0].classes == ("0", "1")
    assert tars(path, options={"classes": ["a", "b", "c"]})[0].classes == ("a", "b", "c")
    (tmp_path / "names.txt").write_text("ä\n b \n\n")
    assert tars(path, options={"classes": str(tmp_path / "names.txt")})[0].classes == ("ä", "b")
    assert "have a label 1, but there are only 1 classes" in refused(lambda: tars(path, options={"classes": ["a"]}))
    assert "cannot be read as a text file" in refused(lambda: tars(path, options={"classes": "nowhere.txt"}))
    assert "must be a list of names" in refused(lambda: tars(path, options={"classes": 3}))


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a-08.tar", "a-09.tar", "a-10.tar", "b.tar", "b.txt", "[x].tar", "{1..2}.tar"):
        Path(name).touch()

    def found(pattern: str) -> list[str]:
        return [str(path) for path in find_shards(pattern, "dataset.train")]

    assert found("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert found("a-{8..11}.tar") == ["a-8.tar", "a-9.tar", "a-10.tar", "a-11.tar"]  # which of them are missing is said
    assert found("{b,a-{08..09}}.tar") == ["b.tar", "a-08.tar", "a-09.tar"]
    assert found("a-*.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert found("{b,a-*,b}.tar") == ["b.tar", "a-08.tar", "a-09.tar", "a-10.tar"]
    assert found("[x].tar") == ["[x].tar"]
    assert found("{1..2}.tar") == ["{1..2}.tar"]
    folder = found(str(tmp_path))
    assert [Path(path).name for path in folder] == [
        "[x].tar",
        "a-08.tar",
        "a-09.tar",
        "a-10.tar",
        "b.tar",
        "{1..2}.tar",
    ]
    assert "there are no such tar files" in refused(lambda: found("c-*.tar"))
    assert "does not count up" in refused(lambda: found("a-{9..8}.tar"))
    assert "does not count up, or too far" in refused(lambda: found("a-{0..99999999999}.tar"))
    assert "more than" in refused(lambda: found("{0..999}{0..999}{0..999}.tar"))
    assert "there is no file" in refused(lambda: tars("a-{10..11}.tar"))


def test_headers_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        write_tar(tmp_path / f"s-{number}.tar", *samples(4, 4 * number))
    scanned: list[str] = []
    scan = tar_index.scan
    monkeypatch.setattr(tar_index, "scan", lambda path, label: (scanned.append(path.name), scan(path, label))[1])
    first = tars(tmp_path)[0]
    assert sorted(scanned) == [f"s-{number}.tar" for number in range(4)]
    scanned.clear()
    second = tars(tmp_path)[0]
    assert scanned == []
    assert (second.fingerprint, list(second.names)) == (first.fingerprint, list(first.names))
    write_tar(tmp_path / "s-2.tar", *samples(5, 8))
    assert len(tars(tmp_path)[0]) == 17
    assert scanned == ["s-2.tar"]


def test_names_of_shards_that_are_called_alike(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        write_tar(tmp_path / folder / "0.tar", *samples(2))
    train, _ = tars(f"{tmp_path}/{{x,y}}/0.tar", write_tar(tmp_path / "t.tar", *samples()))
    assert list(train.names) == ["x/0/0", "x/0/1", "y/0/0", "y/0/1"]


def test_tar_files_that_are_refused(tmp_path: Path) -> None:
    for kind, target in ((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "0.jpg"), (tarfile.FIFOTYPE, "")):
        path = write_tar(tmp_path / "link.tar", *samples(2))
        with tarfile.open(path, "a") as tar:
            member = tarfile.TarInfo("evil.jpg")
            member.type, member.linkname = kind, target
            tar.addfile(member)
        assert "'evil.jpg', which is no plain file; links are not followed" in refused(lambda path=path: tars(path))
    twice = write_tar(tmp_path / "twice.tar", *samples(2), *samples(1))
    assert "holds the sample '0' at two places" in refused(lambda: tars(twice))
    two = write_tar(tmp_path / "two.tar", ("0.jpg", b"x"), ("0.png", b"x"), ("0.cls", b"1"))
    assert "two images of the sample '0'" in refused(lambda: tars(two))
    assert "hold no samples" in refused(lambda: tars(write_tar(tmp_path / "none.tar", ("x", b"y"))))
    (tmp_path / "text.tar").write_text("text" * 500)
    assert "is no plain tar file" in refused(lambda: tars(tmp_path / "text.tar"))
    with tarfile.open(tmp_path / "s.tar.gz", "w:gz") as tar:
        add(tar, "0.jpg", b"x")
    assert "is no plain tar file" in refused(lambda: tars(tmp_path / "s.tar.gz"))
    assert "unpack it first" in refused(lambda: tars(tmp_path / "s.tar.gz"))


def test_every_cut_and_every_damaged_header_is_noticed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", *samples(4), form=tarfile.USTAR_FORMAT)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        end = tar.offset
    assert len(tar_index.scan(path, "label").names) == 4
    starts = {member.offset for member in members}
    for length in range(1, end, 97):
        path.write_bytes(whole[:length])
        if length in starts:
            continue
        assert str(path) in refused(lambda: tar_index.scan(path, "label"))
    path.write_bytes(whole[: members[2].offset_data + 9])
    assert f"is cut off inside of '{members[2].name}'" in refused(lambda: tar_index.scan(path, "label"))
    for member in members:
        for at in (0, 60, 130, 150):  # name, text of the mode, size, sum
            damaged = bytearray(whole)
            damaged[member.offset + at] ^= 0x15
            path.write_bytes(damaged)
            assert str(path) in refused(lambda: tar_index.scan(path, "label"))
    path.write_bytes(whole[:end])  # without the blocks of zeros at its end, as some writers leave it
    assert len(tar_index.scan(path, "label").names) == 4


def test_a_tar_file_that_shrinks_while_it_is_used(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", *samples(6))
    train, _ = tars(path, write_tar(tmp_path / "t.tar", *samples()), check=False)
    os.truncate(path, 600)
    with pytest.raises(UnreadableSampleError, match="its tar file is shorter than it was"):
        train.batch(np.array([5]))


def test_a_size_may_be_set(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", *samples())
    assert tars(path, image_size=5)[0].image_shape == (3, 5, 5)
    assert tars(path, options={"channels": 1})[0].image_shape == (1, 8, 8)
    assert "channels=2" in refused(lambda: tars(path, options={"channels": 2}))
    assert "image_size=0" in refused(lambda: tars(path, image_size=0))
    other = write_tar(tmp_path / "o.tar", ("0.jpg", png(images(shape=(3, 9, 9))[0])), ("0.cls", b"1"), *samples(4, 1))
    assert "it is 8×8 with 3 channels, the first image 9×9" in refused(lambda: tars(other))


@pytest.mark.filterwarnings("ignore")
def test_webdatasets_own_library_is_the_oracle(tmp_path: Path) -> None:
    library = pytest.importorskip("webdataset")
    with library.ShardWriter(str(tmp_path / "s-%03d.tar"), maxcount=4, verbose=0) as sink:
        for row in range(10):
            label = {"cls": row % 3} if row < 6 else {"json": {"label": row % 3}}
            sink.write({"__key__": f"some/{row:03d}", "png": png(images()[row]), "other.txt": "x", **label})
    pattern = f"{tmp_path}/s-{{000..002}}.tar"
    expected = []
    for sample in library.WebDataset(pattern, shardshuffle=False, empty_check=False):
        label = int(sample["cls"]) if "cls" in sample else json.loads(sample["json"])["label"]
        expected.append((sample["__key__"], label, decode(sample["png"], None)))
    train, _ = tars(pattern)
    assert len(train) == len(expected) == 10
    for index, (key, label, pixels) in enumerate(expected):
        assert train.names[index].endswith(f"/{key}")
        assert train.labels[index] == label
        np.testing.assert_array_equal(train.batch(np.array([index]))[0].numpy(), pixels.astype(np.float32) / 255)
    for pattern in ("a-{08..11}.tar", "{a,b}-{1..2}.tar", "x{a,b{1..2}}y"):
        assert [str(path) for path in find_shards(pattern, "x")] == library.shardlists.expand_urls(pattern)
