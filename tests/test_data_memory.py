"""What datasets take of memory and threads: pixels of used images alone, few bytes a file, one pool of decoders."""

from __future__ import annotations

import os
import threading
import time
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from kinds import images, png, write_tree

from spray.data import decoded, listing
from spray.data import folder as folder_module
from spray.data.decoding import UnreadableImageError, decode
from spray.data.folder import FolderDataset
from spray.data.parallel import in_threads, quiet_pillow, set_threads, wait_in_threads


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPRAY_CACHE", str(tmp_path / "cache"))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_memory_is_taken_for_the_images_that_are_used(tmp_path: Path) -> None:
    for number in range(12):
        path = tmp_path / f"tree/{'ab'[number % 2]}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(images()[number % 10]))
    size = 3000
    each = 3 * size**2
    FolderDataset(tmp_path / "tree", size, cache_bytes=0)  # checked
    before = resident()
    data = FolderDataset(tmp_path / "tree", size)
    assert data._memory is not None
    assert data._memory._pixels.nbytes == 12 * each
    assert resident() - before < each
    data.batch(np.array([7]))
    # Its pixels, and what is left of decoding and of the batch.
    assert resident() - before < 4 * each
    assert data._memory._known.sum() == 1


def test_memory_for_a_file_of_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n_classes, n_each = 100, 500
    found = [
        (label, listing._Folder(f"n{label:08d}", 1, [], [b"n%08d_%d.JPEG" % (label, i) for i in range(n_each)]))
        for label in range(n_classes)
    ]
    n = n_classes * n_each
    monkeypatch.setattr(listing, "_state", lambda _folder, _listing, rows: [np.ones(len(rows), dtype=np.int64)] * 3)
    made = listing._join(tmp_path, [part.path for _, part in found], found, None)
    del found
    monkeypatch.setattr(folder_module, "list_images", lambda *_: made)
    tracemalloc.start()
    data = FolderDataset(tmp_path, 64, check=False)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    held = sum(getattr(made, name).nbytes for name in ("ends", "sizes", "times", "regular")) + len(made.names)
    assert len(data) == n
    assert (held + made.check.state.nbytes) / n < 60
    pixels = n * 3 * 64**2
    assert (taken - pixels) / n < 60
    assert data.names[777] == "n00000001/n00000001_277.JPEG"


def test_filters_of_warnings_are_left_as_they_were_whoever_decodes() -> None:
    before = list(warnings.filters)
    first, second = quiet_pillow(), quiet_pillow()  # of two threads, each of which leaves in its own time
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert len(warnings.filters) == len(before) + 1
    assert warnings.filters[0][0] == "ignore"
    second.__exit__(None, None, None)
    assert list(warnings.filters) == before

    def use() -> None:
        for _ in range(500):
            with quiet_pillow():
                pass

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before


@pytest.mark.parametrize("seconds", [0, 2e-4])
def test_results_of_waiting_in_threads_keep_their_order(seconds: float) -> None:
    used = set()

    def wait(item: int) -> int:
        used.add(threading.get_ident())
        if seconds:
            time.sleep(seconds)
        return item * 2

    assert wait_in_threads(wait, range(2000)) == list(range(0, 4000, 2))
    assert (len(used) > 1) == (seconds > 0)
    assert wait_in_threads(wait, []) == []


def test_set_threads_bounds_how_many_images_are_decoded_at_once() -> None:
    lock, now, most = threading.Lock(), 0, 0

    def work(_: int) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.002)
        with lock:
            now -= 1

    set_threads(2)
    try:
        callers = [threading.Thread(target=in_threads, args=(work, range(20))) for _ in range(3)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert most == 2
    finally:
        set_threads(None)


def test_unreadable_is_lasting_unless_the_system_failed() -> None:
    assert UnreadableImageError("x").lasting
    with pytest.raises(UnreadableImageError, match="not a regular file") as caught:
        decode(Path("/dev/null"), 4)
    assert caught.value.lasting


def test_large_images_are_read_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded, "MAX_DECODERS", 2)
    monkeypatch.setattr(decoded, "CHUNK_BYTES", 3 * 8 * 8 * 5)
    write_tree(tmp_path / "tree", (images(24), np.arange(24) % 3))
    asked: list[int] = []
    read = FolderDataset._read
    monkeypatch.setattr(FolderDataset, "_read", lambda self, rows: (asked.append(len(rows)), read(self, rows))[1])
    FolderDataset(tmp_path / "tree", 8)
    assert asked == [5, 5, 5, 5, 4]
    asked.clear()
    FolderDataset(tmp_path / "tree", 80, remember=False)
    assert asked == [2] * 12
