"""What it costs to list a folder of many small images: the first time, later, on a slow file system; and memory.

    python scripts/bench_listing.py [--files 100000] [--folder DIR] [--rows 1000000] [--delay 0.5]

Files are made where none are; --rows entries are made in memory alone, without files; --delay is the milliseconds that
each look at a file is made to wait, as a network file system does.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from spray.data import folder as module
from spray.data import listing
from spray.data.folder import FolderDataset

PER_FOLDER = 1000


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def make(folder: Path, n: int) -> None:
    """Write n images of 32x32 pixels, a thousand in each folder, and wait until their folders are of some age."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "png")
    for number in range(n):
        name = f"n{number // PER_FOLDER:08d}"
        if number % PER_FOLDER == 0:
            (folder / name).mkdir(parents=True)
        (folder / name / f"{name}_{number}.png").write_bytes(buffer.getvalue())
    time.sleep(3)


def timed(what: str, function: Callable[[], object]) -> None:
    start = time.perf_counter()
    function()
    print(f"{what:<60}{time.perf_counter() - start:8.3f} s", flush=True)


def synthetic(n: int) -> listing.Listing:
    """Return a listing of n entries without files."""
    parts = [
        (label, listing._Folder(name, 1, [], [f"{name}_{row}.JPEG".encode() for row in range(PER_FOLDER)]))
        for label, name in enumerate(f"n{label:08d}" for label in range(n // PER_FOLDER))
    ]
    states = tuple([np.ones(n, dtype=np.int64)] * 3)
    original, listing._state = listing._state, lambda *_: states  # type: ignore[assignment]
    made = listing._join(Path("/nowhere"), [part.path for _, part in parts], parts, None)
    listing._state = original
    return made


def in_memory(n: int) -> None:
    """Say what a listing of n entries costs."""
    folder = Path("/nowhere")
    timed(f"{n} entries: made and written to the cache", lambda: listing.remember_listing(folder, synthetic(n)))
    before = resident()
    loaded: list[listing.Listing] = []
    timed(f"{n} entries: read from the cache", lambda: loaded.extend(filter(None, [listing._load(folder)])))
    module.list_images = lambda *_: loaded[0]  # type: ignore[assignment]
    data: list[FolderDataset] = []
    timed(f"{n} entries: dataset made of it", lambda: data.append(FolderDataset(folder, 224, check=False)))
    print(f"resident memory for each: {(resident() - before) / n:.0f} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--delay", type=float, default=0.5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["SPRAY_CACHE"] = f"{temporary}/cache"
        folder = options.folder or Path(temporary, "images")
        if not folder.exists():
            make(folder, options.files)

        def start(check: bool = False) -> FolderDataset:
            return FolderDataset(folder, 32, cache_bytes=0, check=check)

        n = len(start())
        Path(temporary, "cache").rename(f"{temporary}/warm")
        timed(f"{n} files: listed for the first time", start)
        timed(f"{n} files: listed before", start)
        timed(f"{n} files: each decoded once", lambda: start(True))
        timed(f"{n} files: checked before", lambda: start(True))
        stat = os.stat

        def slow(*arguments: object, **options_: object) -> os.stat_result:
            time.sleep(options.delay / 1000)
            return stat(*arguments, **options_)  # type: ignore[arg-type]

        os.stat = slow  # type: ignore[assignment]
        timed(f"{n} files, {options.delay} ms for each look: listed before", start)
        timed(f"{n} files, {options.delay} ms: for the first time", lambda: listing.list_images(folder, remember=False))
        os.stat = stat
        in_memory(options.rows)


if __name__ == "__main__":
    main()
