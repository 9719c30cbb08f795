"""Listing image folders once: what is remembered, what is noticed, what is done again, and damage to the cache."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from kinds import png

from spray.data import cache, checking, decoded, listing
from spray.data import folder as folder_module
from spray.data.decoding import decode
from spray.data.folder import FolderDataset
from spray.errors import UserError

SIZE = 4
CONTENT = [png(np.full((3, SIZE, SIZE), value, dtype=np.uint8)) for value in range(0, 250, 10)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPRAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three classes, four files in each, one of them in a folder further in; all of it of some age."""
    for name in ("a", "b", "b-c"):
        for number in range(3):
            put(tmp_path / "tree" / name / f"{number}.png", number)
        put(tmp_path / "tree" / name / "in/side.png", 3)
    age(tmp_path / "tree")
    return tmp_path / "tree"


def put(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(CONTENT[number % len(CONTENT)])


def age(top: Path, seconds: float = 60) -> None:
    """Have a tree's folders changed some time ago."""
    then = time.time() - seconds
    for parent, _, _ in os.walk(top):
        os.utime(parent, (then, then))


class Calls:
    """Counts what is listed and what is decoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.listed: list[str] = []
        self.decoded: list[str] = []
        read, decoding = listing._read, decode

        def count_read(folder: Path, path: str) -> object:
            self.listed.append(path)
            return read(folder, path)

        def count_decode(path: Path, size: int) -> np.ndarray:
            self.decoded.append(path.name)
            return decoding(path, size)

        monkeypatch.setattr(listing, "_read", count_read)
        monkeypatch.setattr(folder_module, "decode", count_decode)

    def clear(self) -> None:
        self.listed.clear()
        self.decoded.clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def contents(data: FolderDataset) -> list[tuple[str, int, int]]:
    """Name, label and first pixel of each sample."""
    first = (data.batch(np.arange(len(data)))[:, 0, 0, 0] * 255).round().int().tolist()
    return list(zip(data.names, data.labels.tolist(), first, strict=True))


def test_a_second_start_lists_and_decodes_nothing(tree: Path, calls: Calls) -> None:
    first = FolderDataset(tree, SIZE)
    assert sorted(calls.listed) == ["", "a", "a/in", "b", "b-c", "b-c/in", "b/in"]
    assert len(calls.decoded) == 12
    calls.clear()
    second = FolderDataset(tree, SIZE)
    assert (calls.listed, calls.decoded) == ([], [])
    assert second.fingerprint == first.fingerprint
    assert contents(second) == contents(first)
    calls.clear()
    FolderDataset(tree, 2 * SIZE)  # whether a file can be read does not depend on the size
    assert (calls.listed, calls.decoded) == ([], [])


def test_without_remembering_nothing_is_written(tree: Path, own_cache: Path, calls: Calls) -> None:
    for _ in range(2):
        calls.clear()
        FolderDataset(tree, SIZE, remember=False)
        assert len(calls.listed) == 7
    assert not own_cache.exists()


def test_without_a_check_nothing_is_decoded(tree: Path, calls: Calls) -> None:
    data = FolderDataset(tree, SIZE, check=False)
    assert calls.decoded == []
    data.batch(np.array([0, 5]))
    assert len(calls.decoded) == 2
    data.batch(np.array([5, 0, 0]))
    assert len(calls.decoded) == 2


def add(tree: Path) -> None:
    put(tree / "b/new.png", 7)


def remove(tree: Path) -> None:
    (tree / "b/1.png").unlink()


def rename(tree: Path) -> None:
    (tree / "b/1.png").rename(tree / "b/9.png")


def rewrite(tree: Path) -> None:
    put(tree / "b/1.png", 9)  # of the same size, in place: no folder changes


def replace(tree: Path) -> None:
    put(tree / "other", 9)
    os.utime(tree / "other", (1, 1))
    os.replace(tree / "other", tree / "b/1.png")


def add_class(tree: Path) -> None:
    put(tree / "b-a/1.png", 9)


def add_folder(tree: Path) -> None:
    put(tree / "b/in/deep/1.png", 9)


def remove_class(tree: Path) -> None:
    shutil.rmtree(tree / "a")


def remove_folder(tree: Path) -> None:
    shutil.rmtree(tree / "b/in")


def link(tree: Path) -> None:
    os.symlink(tree / "a/0.png", tree / "b/in/link.png")


def damage(tree: Path) -> None:
    (tree / "b/1.png").write_bytes(CONTENT[1][:45])


def touch_class(tree: Path) -> None:
    (tree / "b/notes.txt").write_text("no image")


CHANGES: list[Callable[[Path], None]] = [
    add, remove, rename, rewrite, replace, add_class, add_folder, remove_class, remove_folder, link, damage,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_are_noticed(tree: Path, change: Callable[[Path], None]) -> None:
    before = FolderDataset(tree, SIZE)
    change(tree)
    after, oracle = FolderDataset(tree, SIZE), FolderDataset(tree, SIZE, remember=False)
    assert after.fingerprint == oracle.fingerprint != before.fingerprint
    assert contents(after) == contents(oracle)
    assert after.classes == oracle.classes
    assert after.unreadable == oracle.unreadable
    again = FolderDataset(tree, SIZE)
    assert again.fingerprint == oracle.fingerprint
    assert again.unreadable == oracle.unreadable


def test_after_any_changes_it_is_as_if_listed_for_the_first_time(tree: Path) -> None:
    rng = np.random.default_rng(0)
    for step in range(60):
        files = sorted(path for path in tree.rglob("*.png") if path.is_file())
        path = files[rng.integers(len(files))]
        what = rng.integers(6)
        if what == 0:
            put(path.with_name(f"{step}.png"), step)
        elif what == 1 and len(list((tree / path.relative_to(tree).parts[0]).rglob("*.png"))) > 2:
            path.unlink()
        elif what == 2:
            put(path, step)
        elif what == 3:
            put(path.parent / f"in{rng.integers(3)}" / f"{step}.png", step)
        elif what == 4:
            path.rename(path.with_name(f"{step}.png"))
        else:
            path.write_bytes(CONTENT[step % 25][: 30 + step % 20])  # damaged
        if rng.integers(2):
            age(tree, 600 - step)
        found, oracle = (made_of(tree, remember) for remember in (True, False))
        assert found == oracle


def made_of(tree: Path, remember: bool) -> object:
    try:
        data = FolderDataset(tree, SIZE, remember=remember)
    except UserError as error:
        return str(error)
    return data.fingerprint, contents(data), data.unreadable


def test_only_what_changed_is_listed_and_decoded_again(tree: Path, calls: Calls) -> None:
    FolderDataset(tree, SIZE)
    calls.clear()
    add(tree)
    FolderDataset(tree, SIZE)
    assert calls.listed == ["b"]
    assert calls.decoded == ["new.png"]
    calls.clear()
    touch_class(tree)
    FolderDataset(tree, SIZE)
    assert (calls.listed, calls.decoded) == (["b"], [])
    calls.clear()
    rewrite(tree)  # a file that changed in place: nothing is trusted but files that are as they were
    FolderDataset(tree, SIZE)
    assert len(calls.listed) == 7
    assert calls.decoded == ["1.png"]


def test_of_many_files_a_sample_is_compared(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "SAMPLED", 4)  # of 12: the rows 0, 3, 7 and 11
    first = FolderDataset(tree, SIZE, check=False).fingerprint
    put(tree / "a/1.png", 9)
    assert FolderDataset(tree, SIZE, check=False).fingerprint == first
    put(tree / "a/0.png", 9)
    assert FolderDataset(tree, SIZE, check=False).fingerprint != first


def test_a_folder_that_changed_just_before_it_was_listed_is_listed_again(tree: Path, calls: Calls) -> None:
    add(tree)
    changed = os.stat(tree / "b").st_mtime_ns
    first = FolderDataset(tree, SIZE)
    put(tree / "b/later.png", 8)
    # In the same step of the file system's clock.
    os.utime(tree / "b", ns=(changed, changed))
    assert len(FolderDataset(tree, SIZE)) == len(first) + 1
    age(tree)
    FolderDataset(tree, SIZE)
    calls.clear()
    FolderDataset(tree, SIZE)
    assert calls.listed == []


def entries(own_cache: Path) -> list[Path]:
    return sorted(own_cache.glob("listings/*.npz"))


def test_a_damaged_cache_is_of_no_use(tree: Path, own_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = contents(FolderDataset(tree, SIZE))
    (entry,) = entries(own_cache)
    whole = entry.read_bytes()
    rng = np.random.default_rng(1)
    damages = [b"", b"text", whole[:10], whole[: len(whole) // 2], whole[:-1], whole + b"x" * 100]
    for place in rng.integers(0, len(whole), 60):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(rng.integers(8))
        damages.append(bytes(flipped))
    # Whole, but of other content: from another version, or not from here.
    np.savez(own_cache / "other.npz", format=np.array([99, 0]))
    damages.append((own_cache / "other.npz").read_bytes())
    np.savez(own_cache / "other.npz", x=np.arange(3))
    damages.append((own_cache / "other.npz").read_bytes())
    np.savez(own_cache / "other.npz", x=np.array([{"a": 1}], dtype=object))
    damages.append((own_cache / "other.npz").read_bytes())
    with caplog.at_level(logging.INFO):
        for content in damages:
            entry.write_bytes(content)
            assert contents(FolderDataset(tree, SIZE)) == expected
    assert caplog.text == ""


def test_nothing_comes_of_a_cache_that_cannot_be_written(
    tree: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SPRAY_CACHE", "/dev/null/cache")
    with caplog.at_level(logging.DEBUG, "spray"):  # to which the command gives a level of its own
        first = FolderDataset(tree, SIZE)
        assert FolderDataset(tree, SIZE).fingerprint == first.fingerprint
    assert "could not be cached" in caplog.text
    assert all(record.levelno == logging.DEBUG for record in caplog.records)


def test_what_is_known_is_shared_with_those_who_do_not_see_the_cache(
    tree: Path, tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_beside", [])
    first = FolderDataset(tree, SIZE)
    for own in ("/dev/null/cache", str(tmp_path / "cache")):  # found out anew, and looked up
        shared = tmp_path / f"shared{len(own)}"
        monkeypatch.setenv("SPRAY_CACHE", own)
        with cache.shared_in(shared):
            FolderDataset(tree, SIZE)
        assert list(shared.glob("listings/*.npz"))
        monkeypatch.setenv("SPRAY_CACHE", "/dev/null/elsewhere")
        calls.clear()
        cache.look_in(shared)
        assert FolderDataset(tree, SIZE).fingerprint == first.fingerprint
        assert (calls.listed, calls.decoded) == ([], [])
    before = sorted(tmp_path.rglob("*.npz"))
    put(tree / "a/new.png", 4)
    assert len(FolderDataset(tree, SIZE)) == 13  # what is known is compared with the files as ever
    assert sorted(tmp_path.rglob("*.npz")) == before


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SPRAY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert cache.cache_folder() == Path("/home/me/.cache/spray")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.cache_folder() == Path("/home/me/.cache/spray")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache.cache_folder() == Path("/x/spray")
    monkeypatch.setenv("SPRAY_CACHE", "~/own")
    assert cache.cache_folder() == Path("/home/me/own")


def test_old_entries_make_room(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MAX_ENTRIES", 3)
    for number in range(5):
        cache.save("things", str(number), {"x": np.array(number)})
        then = time.time() - 100 + number
        for path in (own_cache / "things").glob("*.npz"):
            if time.time() - path.stat().st_mtime < 50:
                os.utime(path, (then, then))
        if number >= 1:
            assert cache.load("things", "1") is not None  # which makes it the one used last
    kept = [number for number in range(5) if cache.load("things", str(number)) is not None]
    assert len(kept) == 3
    assert {1, 4} <= set(kept)
    leftover = own_cache / "things/.x.npz.0123abcd.tmp"
    leftover.write_bytes(b"half")
    cache.save("things", "6", {"x": np.array(6)})
    assert leftover.exists()  # another process may be writing it
    os.utime(leftover, (1, 1))
    cache.save("things", "7", {"x": np.array(7)})
    assert not leftover.exists()


def test_processes_that_start_at_once(tree: Path, tmp_path: Path) -> None:
    code = """if True:
        import sys, time
        from pathlib import Path
        from spray.data.folder import FolderDataset
        print("ready", flush=True)
        sys.stdin.readline()
        for _ in range(20):
            for path in Path(sys.argv[2]).glob("cache/listings/*.npz"):
                path.unlink(missing_ok=True)
            print(FolderDataset(sys.argv[1], 4).fingerprint, flush=True)
    """
    root = Path(listing.__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-c", code, str(tree), str(tmp_path)]
    started = [
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    found = [process.communicate("go\n") for process in started]
    assert [process.returncode for process in started] == [0] * 3
    assert {line for said, _ in found for line in said.split()} == {FolderDataset(tree, SIZE).fingerprint}


def test_a_check_that_is_cut_short_goes_on_where_it_was(
    tree: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoded, "CHUNK", 4)
    monkeypatch.setattr(checking, "SAVE_SECONDS", -1)
    read = FolderDataset._read

    def interrupted(self: FolderDataset, rows: np.ndarray) -> object:
        if rows[0] >= 8:
            raise KeyboardInterrupt
        return read(self, rows)

    damage(tree)  # row 5
    monkeypatch.setattr(FolderDataset, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        FolderDataset(tree, SIZE)
    assert len(calls.decoded) == 8
    monkeypatch.setattr(FolderDataset, "_read", read)
    calls.clear()
    assert [name for name, _ in FolderDataset(tree, SIZE).unreadable] == ["b/1.png"]
    assert len(calls.decoded) == 4


def test_an_error_of_the_system_is_not_remembered(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(path: Path, size: int) -> np.ndarray:
        if path.name == "1.png" and path.parent.name == "b":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return decode(path, size)

    monkeypatch.setattr(folder_module, "decode", failing)
    for _ in range(2):
        assert FolderDataset(tree, SIZE).unreadable == [("b/1.png", "Input/output error")]
    monkeypatch.setattr(folder_module, "decode", decode)
    assert FolderDataset(tree, SIZE).unreadable == []


def test_another_decoder_is_asked_again(tree: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(tree)
    FolderDataset(tree, SIZE)
    calls.clear()
    monkeypatch.setattr(checking, "DECODER", "another")
    assert len(FolderDataset(tree, SIZE).unreadable) == 1
    assert len(calls.decoded) == 12


def test_a_long_check_says_how_far_it_is(
    tree: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(decoded, "CHUNK", 4)
    monkeypatch.setattr(checking, "SAY_SECONDS", -1)
    with caplog.at_level(logging.INFO):
        FolderDataset(tree, SIZE)
    assert "4 of 12" in caplog.text
    assert "12 of 12" in caplog.text
    assert "dataset.check=false" in caplog.text
    caplog.clear()
    FolderDataset(tree, SIZE)
    assert caplog.text == ""


def test_many_files_left_out_are_counted(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(30):
        (tree / f"a/bad{number:02d}.png").write_bytes(b"")
    data = FolderDataset(tree, SIZE)
    assert len(data.unreadable) == 30
    assert caplog.text.count("left out a/bad") == decoded.SAID
    assert "left out 10 more" in caplog.text


def test_a_folder_that_cannot_be_listed_is_an_error(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def failing(path: object) -> object:
        if str(path).endswith("b/in"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(UserError, match=r"cannot read the folder .*b/in: Permission denied"):
        FolderDataset(tree, SIZE)
