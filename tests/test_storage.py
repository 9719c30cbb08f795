"""Files are there whole or not at all, whatever happens in the middle."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from spray import storage
from spray.errors import UserError


def files(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_writes_what_it_is_given_and_makes_folders(tmp_path: Path) -> None:
    storage.write_bytes(tmp_path / "a" / "b" / "x.bin", b"\x00\xff")
    assert (tmp_path / "a" / "b" / "x.bin").read_bytes() == b"\x00\xff"
    storage.write_text(tmp_path / "x.txt", "Grüße\n")
    assert (tmp_path / "x.txt").read_bytes() == "Grüße\n".encode()
    assert files(tmp_path) == ["a", "x.txt"]


def test_json_round_trip_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    value = {"class_name": "Müsli 汉", "p": 1e-17, "list": [1, None, True], "inner": {"x": []}}
    storage.write_json(tmp_path / "x.json", value)
    assert storage.read_json(tmp_path / "x.json") == value
    assert json.loads((tmp_path / "x.json").read_bytes().decode("utf-8")) == value
    code = "import sys; from spray import storage; print(ascii(storage.read_json(sys.argv[1])['class_name']))"
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code, str(tmp_path / "x.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ascii(value["class_name"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}, {"a": object()}])
def test_what_is_not_json_is_refused_and_the_old_file_stays(tmp_path: Path, value: object) -> None:
    storage.write_json(tmp_path / "x.json", 1)
    with pytest.raises((ValueError, TypeError)):
        storage.write_json(tmp_path / "x.json", value)
    assert storage.read_json(tmp_path / "x.json") == 1
    assert files(tmp_path) == ["x.json"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_in_the_middle_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")

    def half() -> None:
        with storage.replacing(path) as temporary:
            temporary.write_bytes(b"ne")
            assert temporary.parent == path.parent
            raise error

    with pytest.raises(error):
        half()
    assert path.read_bytes() == b"old"
    assert files(tmp_path) == ["x.bin"]


def test_the_file_changes_at_once_and_only_after_its_bytes_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, events = tmp_path / "x.bin", []
    path.write_bytes(b"old")
    fsync, replace = os.fsync, os.replace

    def logged_fsync(descriptor: int) -> None:
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}"), path.read_bytes()))
        fsync(descriptor)

    def logged_replace(source: Path, target: Path) -> None:
        events.append(("replace", str(target), source.read_bytes()))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    storage.write_bytes(path, b"new")
    assert [event[0] for event in events] == ["fsync", "replace", "fsync"]
    assert events[0][2] == b"old"
    assert events[1][2] == b"new"
    assert events[2][1:] == (str(tmp_path), b"new")


def test_a_failing_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    storage.write_bytes(tmp_path / "x", b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=f"no space left for {tmp_path / 'x'}: free some"):
        storage.write_bytes(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old"
    assert files(tmp_path) == ["x"]


def test_hdf5_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with storage.hdf5_writer(path) as file:
        file["a"] = np.arange(5)
        assert not path.exists()

    def half() -> None:
        with storage.hdf5_writer(path) as file:
            file["b"] = np.zeros(100)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    with h5py.File(path) as file:
        assert list(file) == ["a"]
        np.testing.assert_array_equal(file["a"][:], np.arange(5))
    assert files(tmp_path) == ["x.h5"]


KILLED = """
import os, signal, sys
from pathlib import Path
from spray import storage
path = Path(sys.argv[1])
if sys.argv[2] == "hdf5":
    with storage.hdf5_writer(path) as file:
        file["a"] = [1.0] * 100_000
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
elif sys.argv[2] == "bytes":
    os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
    storage.write_bytes(path, b"new" * 100_000)
"""


@pytest.mark.parametrize("kind", ["bytes", "hdf5"])
def test_a_killed_process_leaves_the_old_file_and_the_next_one_succeeds(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), kind], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    # What is left beside it is hidden, and in nobody's way.
    assert [name for name in files(tmp_path) if not name.startswith(".")] == ["x"]
    storage.write_bytes(path, b"new")
    assert path.read_bytes() == b"new"


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "x").write_bytes(data)
    assert storage.sha256(tmp_path / "x") == hashlib.sha256(data).hexdigest()
