"""A shard's file is whole, right and its own, or it is refused: killed writers, damage, full disks, mix-ups."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import stored

from spray.errors import UserError
from spray.store.disk import memory_file
from spray.store.layout import CHUNK_BYTES, ArraySpec, Layout
from spray.store.shard_writing import shard_writer
from spray.store.shards import (
    DamagedShardError,
    Shard,
    ShardHeader,
    plan_shards,
    read_shard,
    rows_sha256,
    shard_chunks,
    shard_header,
    write_chunk,
)


def seal(path: Path) -> None:
    """Compute a changed shard's SHA-256 anew: what is wrong with it is in its contents then."""
    data = bytearray(path.read_bytes())
    data[448:512] = hashlib.sha256(data[512:] + data[:448]).hexdigest().encode()
    path.write_bytes(data)


@pytest.fixture
def shard(tmp_path: Path) -> tuple[Path, Shard, Layout, dict[str, np.ndarray]]:
    """The last and shorter shard of a small dataset, on disk."""
    layout = stored.layout()
    data = stored.arrays(layout)
    last = plan_shards(layout.n, layout.shard_size)[-1]
    stored.write(tmp_path / last.name, last, layout, data)
    return tmp_path / last.name, last, layout, data


def test_plan_covers_each_sample_once() -> None:
    plan = plan_shards(10, 4)
    assert plan == [Shard(0, 0, 4), Shard(1, 4, 8), Shard(2, 8, 10)]
    assert [shard.size for shard in plan] == [4, 4, 2]
    assert plan[2].name == "000002.h5"
    assert plan_shards(4, 4) == plan_shards(4, 512) == [Shard(0, 0, 4)]
    for n, size in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            plan_shards(n, size)


@pytest.mark.parametrize(
    ("shape", "dtype", "n", "size", "rows"),
    [
        ((3, 224, 224), "float32", 10_000, 107, 1),  # one row is larger than a chunk should be
        ((3, 32, 32), "float32", 10_000, 512, 4),  # 12,288 bytes: 5 fit, 4 divide 512
        ((3, 32, 32), "float32", 10_000, 510, 5),
        ((3, 32, 32), "float32", 10_000, 7, 1),  # 7 is prime
        ((), "int64", 10_000, 512, 512),
        ((), "int64", 100_000, 20_000, 5_000),  # 8,192 fit
        ((), "int64", 100, 512, 100),  # one shard: nothing to divide
        ((3, 32, 32), "float32", 100, 512, 5),
    ],
)
def test_chunks_are_of_a_few_rows_and_end_where_shards_do(
    shape: tuple[int, ...], dtype: str, n: int, size: int, rows: int
) -> None:
    spec = ArraySpec(shape, dtype)
    layout = Layout({"attribution": spec}, n, size)
    assert layout.rows_per_chunk(spec) == rows
    assert n <= size or size % rows == 0
    assert rows == 1 or rows * spec.nbytes <= CHUNK_BYTES
    assert layout.bytes_per_row == int(np.prod(shape, dtype=int)) * np.dtype(dtype).itemsize


def test_layouts_that_make_no_sense_are_refused() -> None:
    spec = ArraySpec((3,), "float32")
    with pytest.raises(UserError, match=r"compute.compression='lzf' is unknown; it must be one of none, gzip"):
        Layout({"attribution": spec}, 4, 4, "lzf")
    for name in ("weights", "layer/", "layer/a//b", "layer/.", "/label"):
        with pytest.raises(ValueError, match="can't be called"):
            Layout({name: spec}, 4, 4)
    for n, size in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            Layout({"attribution": spec}, n, size)
    with pytest.raises(ValueError, match="needs an array"):
        Layout({}, 4, 4)
    for shape, dtype in (((3, 0), "float32"), ((3,), "object"), ((3,), "U3")):
        with pytest.raises(ValueError, match=r"holds nothing|must be numbers"):
            ArraySpec(shape, dtype)


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_a_shard_gives_back_its_rows_and_facts(tmp_path: Path, compression: str) -> None:
    layout = stored.layout(compression=compression)
    data = stored.arrays(layout)
    for shard in stored.shards(tmp_path, layout, data, parts=(3, 1)):
        path = tmp_path / shard.name
        facts = read_shard(path, shard, stored.KEY, layout)
        assert facts.quarantined == {shard.start: "not finite"}
        assert facts.facts == {"device": "cpu"}
        assert shard_header(path) == ShardHeader(shard.start, shard.stop, stored.KEY)
        with memory_file() as file:  # HDF5 itself undoes the filters and compares the checksums
            datasets = layout.create(file, layout.n)
            for chunk in shard_chunks(path, shard, layout):
                write_chunk(datasets[chunk.name], chunk.row, chunk.mask, chunk.raw)
            for name, values in data.items():
                found = datasets[name][shard.start : shard.stop]
                np.testing.assert_array_equal(found, values[shard.start : shard.stop], strict=True)
                assert datasets[name].fletcher32
                assert datasets[name].compression == (None if compression == "none" else compression)
            assert facts.data_sha256 == rows_sha256(datasets, shard.start, shard.stop)
    assert sorted(os.listdir(tmp_path)) == [f"{number:06d}.h5" for number in range(4)]


def test_bytes_do_not_depend_on_how_rows_are_dealt_out_on_the_clock_or_on_memory(tmp_path: Path) -> None:
    layout = stored.layout(n=40, shard_size=40)
    data, (shard,) = stored.arrays(layout), plan_shards(40, 40)
    for name, parts in (("a", ()), ("b", (1,) * 40), ("c", (39,)), ("d", (0, 7, 0, 13))):
        stored.write(tmp_path / name, shard, layout, data, parts)
    text = """
        import sys, pathlib, stored
        from spray.store.shards import plan_shards
        layout = stored.layout(n=40, shard_size=40)
        stored.write(pathlib.Path(sys.argv[1]), plan_shards(40, 40)[0], layout, stored.arrays(layout), (5, 5))
    """
    time.sleep(1.1)  # HDF5 counts seconds
    # glibc fills memory that is allocated and freed with this byte: nothing of it may get into the file.
    assert stored.script(text, tmp_path / "e", MALLOC_PERTURB_="165", TZ="Asia/Tokyo").returncode == 0
    assert len({(tmp_path / name).read_bytes() for name in "abcde"}) == 1


def test_any_changed_byte_is_noticed(shard: tuple[Path, Shard, Layout, dict[str, np.ndarray]]) -> None:
    path, which, layout, _ = shard
    good = path.read_bytes()
    changed = path.with_name("changed.h5")
    for at in (*range(520), *range(520, len(good), 3)):
        changed.write_bytes(good[:at] + bytes([good[at] ^ (1 << at % 8)]) + good[at + 1 :])
        with pytest.raises(DamagedShardError):
            read_shard(changed, which, stored.KEY, layout)
    changed.write_bytes(good)
    read_shard(changed, which, stored.KEY, layout)


def test_any_missing_or_added_end_is_noticed(shard: tuple[Path, Shard, Layout, dict[str, np.ndarray]]) -> None:
    path, which, layout, _ = shard
    good = path.read_bytes()
    changed = path.with_name("changed.h5")
    for length in {0, 1, 447, 448, 511, 512, 513, *range(0, len(good), 97), len(good) - 1}:
        changed.write_bytes(good[:length])
        with pytest.raises(DamagedShardError):
            read_shard(changed, which, stored.KEY, layout)
    changed.write_bytes(good + b"\0")
    with pytest.raises(DamagedShardError, match="SHA-256 differs"):
        read_shard(changed, which, stored.KEY, layout)


def test_another_shard_key_or_layout_is_refused(shard: tuple[Path, Shard, Layout, dict[str, np.ndarray]]) -> None:
    path, which, layout, _ = shard
    with pytest.raises(DamagedShardError, match="holds samples 48 to 49, not 0 to 15"):
        read_shard(path, Shard(3, 0, 16), stored.KEY, layout)
    with pytest.raises(DamagedShardError, match="computed with other settings"):
        read_shard(path, which, "other", layout)
    attribution = ArraySpec((3, 6, 5), "float16")
    for other in (
        stored.layout(compression="gzip"),
        stored.layout(attribution=attribution),
        stored.layout(label=ArraySpec((), "int32")),
        stored.layout(prediction=ArraySpec((5,), "float32")),
        stored.layout(**{"layer/more": attribution}),
        Layout({name: spec for name, spec in stored.SPECS.items() if name != "valid"}, 50, 16),
        stored.layout(shard_size=50),  # other chunks
    ):
        with pytest.raises(DamagedShardError, match="holds other arrays"):
            read_shard(path, which, stored.KEY, other)
    with pytest.raises(DamagedShardError, match="is missing"):
        read_shard(path.with_name("none.h5"), which, stored.KEY, layout)
    with pytest.raises(DamagedShardError, match="is missing"):
        read_shard(path.parent, which, stored.KEY, layout)


@pytest.mark.parametrize(
    "what", ["no text", "no length", "long text", "no facts", "quarantined", "array", "length", "fewer", "more"]
)
def test_what_was_written_by_another_program_is_refused(
    shard: tuple[Path, Shard, Layout, dict[str, np.ndarray]], what: str
) -> None:
    path, which, layout, _ = shard
    good = path.read_bytes()
    seal(path)
    assert path.read_bytes() == good
    (length,) = struct.unpack("<Q", good[-8:])
    chunks, text = good[512 : -8 - length], json.loads(good[-8 - length : -8])
    if what == "no facts":
        del text["facts"]
    elif what == "quarantined":
        text["quarantined"] = ["none"]
    elif what == "array":  # the first chunk is said to be of an array that doesn't exist
        chunks = b"\xff\xff" + chunks[2:]
    elif what == "length":
        chunks = chunks[:6] + struct.pack("<Q", 2**63) + chunks[14:]
    elif what == "fewer":
        chunks = b""
    elif what == "more":
        chunks += chunks
    end = b"" if what == "no text" else json.dumps(text).encode()
    end += b"" if what == "no length" else struct.pack("<Q", 2**62 if what == "long text" else len(end))
    path.write_bytes(good[:512] + chunks + end)
    seal(path)

    def read() -> None:
        read_shard(path, which, stored.KEY, layout)
        list(shard_chunks(path, which, layout))

    with pytest.raises(DamagedShardError, match="contradicts itself"):
        read()


def test_rows_that_do_not_fit_leave_no_file(tmp_path: Path) -> None:
    layout = stored.layout(n=16, shard_size=16)
    data, (shard,), path = stored.arrays(layout), plan_shards(16, 16), tmp_path / "x.h5"

    def append(*parts: dict[str, np.ndarray], error: type[BaseException] | None = None) -> None:
        with shard_writer(path, shard, stored.KEY, layout) as writer:
            for part in parts:
                writer.append(part)
            if error is not None:
                raise error

    def attempt(message: str, *parts: dict[str, np.ndarray]) -> None:
        with pytest.raises(ValueError, match=message):
            append(*parts)
        assert os.listdir(tmp_path) == []

    attempt("has 16 rows, but got 0")
    attempt("has 16 rows, but got 15", {name: values[:15] for name, values in data.items()})
    attempt("but got more", data, {name: values[:1] for name, values in data.items()})
    attempt("but the layout has", {name: values for name, values in data.items() if name != "valid"})
    attempt("but the layout has", data | {"more": data["label"]})
    attempt("differ in their number of rows", data | {"label": data["label"][:-1]})
    attempt(r"must be \(3, 6, 5\) float32, not \(3, 5, 6\)", data | {"attribution": np.zeros((16, 3, 5, 6), "f4")})
    attempt("float64", data | {"attribution": data["attribution"].astype(float)})
    attempt("int32", data | {"label": data["label"].astype(np.int32)})
    with (
        pytest.raises(ValueError, match="sample 16 is not in"),
        shard_writer(path, shard, stored.KEY, layout) as writer,
    ):
        writer.quarantine(16, "bad")
    with pytest.raises(ValueError, match="does not lie in"):
        shard_writer(path, Shard(1, 16, 32), "k", layout)
    for key in ("k" * 129, "kä", "a\nb"):
        with pytest.raises(ValueError, match="ASCII"):
            shard_writer(path, shard, key, layout)
    with pytest.raises(KeyboardInterrupt):
        append(data, error=KeyboardInterrupt)
    assert os.listdir(tmp_path) == []


def test_errors_of_the_block_are_not_taken_for_those_of_the_disk(tmp_path: Path) -> None:
    layout = stored.layout(n=16, shard_size=16)
    error = PermissionError(errno.EACCES, "an image")
    with pytest.raises(PermissionError, match="an image"), shard_writer(tmp_path / "x", Shard(0, 0, 16), "k", layout):
        raise error


def test_threads_may_write_shards_at_once(tmp_path: Path) -> None:
    layout = stored.layout(n=64, shard_size=8, compression="gzip")
    data, plan = stored.arrays(layout), plan_shards(64, 8)
    threads = [
        threading.Thread(target=stored.write, args=(tmp_path / shard.name, shard, layout, data, (1,) * 8))
        for shard in plan
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for shard in plan:
        read_shard(tmp_path / shard.name, shard, stored.KEY, layout)


def test_what_goes_to_other_processes_can_be_pickled() -> None:
    for value in (Shard(1, 2, 3), stored.layout(), ArraySpec((3,), "float32")):
        assert pickle.loads(pickle.dumps(value)) == value
    error = pickle.loads(pickle.dumps(DamagedShardError(Path("a.h5"), "is missing")))
    assert (error.path, error.reason, str(error)) == (Path("a.h5"), "is missing", "a.h5 is missing")
