"""Arrays, layouts and shards for the tests of `spray.store`."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from spray.store.assemble import assemble
from spray.store.layout import ArraySpec, Layout
from spray.store.shard_writing import shard_writer
from spray.store.shards import Shard, plan_shards

KEY = "0123abcd"
ATTRIBUTES = {"method": "lrp", "composite": "epsilon_plus_flat", "target": "", "title": "Größe"}

SPECS = {
    "attribution": ArraySpec((3, 6, 5), "float32"),
    "label": ArraySpec((), "int64"),
    "layer/features.3": ArraySpec((7,), "float16"),
    "layer/head/inner": ArraySpec((2,), "float32"),
    "prediction": ArraySpec((4,), "float32"),
    "valid": ArraySpec((), "bool"),
}


def script(text: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own."""
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent)])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def layout(n: int = 50, shard_size: int = 16, compression: str = "none", **changes: ArraySpec) -> Layout:
    return Layout(SPECS | changes, n, shard_size, compression)


def arrays(of: Layout, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows that compress a little, as relevance does."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(size=(of.n, *spec.shape)).round(1) * 3).astype(spec.dtype) for name, spec in of.arrays.items()
    }


def write(path: Path, shard: Shard, of: Layout, data: dict[str, np.ndarray], parts: Iterable[int] = (), key: str = KEY):
    """Write one shard, its rows dealt out in parts of the given sizes and then the rest."""
    with shard_writer(path, shard, key, of, {"device": "cpu"}) as writer:
        at = shard.start
        for size in (*parts, shard.size):
            stop = min(at + size, shard.stop)
            writer.append({name: values[at:stop] for name, values in data.items()})
            at = stop
        writer.quarantine(shard.start, "not finite")


def shards(folder: Path, of: Layout, data: dict[str, np.ndarray], parts: Iterable[int] = ()) -> list[Shard]:
    plan = plan_shards(of.n, of.shard_size)
    for shard in plan:
        write(folder / shard.name, shard, of, data, parts)
    return plan


def whole(folder: Path, of: Layout, data: dict[str, np.ndarray], parts: Iterable[int] = ()) -> Path:
    """Write shards and put them together."""
    path = folder / "attributions.h5"
    assemble(folder / "shards", shards(folder / "shards", of, data, parts), KEY, of, path, ATTRIBUTES)
    return path


def write_again(path: Path, shard: Shard, of: Layout, rows: dict[str, np.ndarray]) -> None:
    """Write one shard from the same few rows, over and over."""
    with shard_writer(path, shard, KEY, of) as writer:
        for _ in range(shard.size // len(rows["label"])):
            writer.append(rows)
