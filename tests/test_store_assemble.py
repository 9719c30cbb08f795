"""The file that is put together from shards holds their rows, always in the same bytes, or isn't there."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import stored
from hypothesis import given, settings
from hypothesis import strategies as st

from spray.errors import UserError
from spray.store import assemble as module
from spray.store.assemble import assemble
from spray.store.layout import ArraySpec, Layout
from spray.store.shards import DamagedShardError, Shard, plan_shards


def holds(path: Path, data: dict[str, np.ndarray]) -> None:
    """Compare with plain h5py, which knows nothing of shards."""
    with h5py.File(path) as file:
        for name, values in data.items():
            np.testing.assert_array_equal(file[name][:], values, strict=True)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Layout, list[int], int]:
    """A layout, how rows are dealt out, a seed."""
    kinds = st.sampled_from(["float16", "float32", "float64", "int64", "uint8", "bool"])
    shapes = st.one_of(
        st.just((3, 60, 60)),  # a row of more than 64 kB
        st.lists(st.integers(1, 9), max_size=3).map(tuple),
    )
    names = draw(st.sets(st.sampled_from(sorted(stored.SPECS)), min_size=1))
    arrays = {name: ArraySpec(draw(shapes), draw(kinds)) for name in sorted(names)}
    layout = Layout(arrays, draw(st.integers(1, 40)), draw(st.integers(1, 45)), draw(st.sampled_from(["none", "gzip"])))
    return layout, draw(st.lists(st.integers(0, 12), max_size=5)), draw(st.integers(0, 9))


@settings(max_examples=60, deadline=None)
@given(cases())
def test_any_layout_gives_back_the_rows_however_they_were_dealt_out(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[Layout, list[int], int]
) -> None:
    layout, parts, seed = case
    folder = tmp_path_factory.mktemp("case")
    data = stored.arrays(layout, seed)
    one, other = stored.whole(folder / "one", layout, data), stored.whole(folder / "other", layout, data, parts)
    holds(one, data)
    assert one.read_bytes() == other.read_bytes()
    for name in os.listdir(folder / "one/shards"):
        assert (folder / "one/shards" / name).read_bytes() == (folder / "other/shards" / name).read_bytes()
    shutil.rmtree(folder)


def test_the_file_is_plain_hdf5_with_checksums_and_says_what_it_is(tmp_path: Path) -> None:
    layout = stored.layout(compression="gzip")
    data = stored.arrays(layout)
    path = stored.whole(tmp_path, layout, data)
    holds(path, data)
    with h5py.File(path) as file:
        said = stored.ATTRIBUTES | {"key": stored.KEY, "format": "spray attributions 2"}
        assert dict(file.attrs) == {name: value.encode() for name, value in said.items()} | {"shard_size": 16}
        for name in data:
            assert (file[name].fletcher32, file[name].compression, file[name].shuffle) == (True, "gzip", True)
            assert layout.shard_size % file[name].chunks[0] == 0
        # The last chunks are those of HDF5 itself: appending to a copy doesn't bring up what was behind the rows.
    with h5py.File(path, "r+") as file:
        file["label"].resize(52, axis=0)
        assert file["label"][50:].tolist() == [0, 0]


def test_it_is_the_same_again_later_and_in_another_zone_and_reports_the_shards_facts(tmp_path: Path) -> None:
    layout = stored.layout()
    data = stored.arrays(layout)
    path = stored.whole(tmp_path, layout, data)
    text = """
        import sys, pathlib, stored
        from spray.store.assemble import assemble
        from spray.store.shards import plan_shards
        folder, layout, seen = pathlib.Path(sys.argv[1]), stored.layout(), []
        def progress(shards, number, what):
            seen.append((number, what))
            return shards
        facts = assemble(folder / "shards", plan_shards(50, 16), stored.KEY, layout, folder / "again.h5",
                         dict(reversed(stored.ATTRIBUTES.items())), progress)
        print(seen, [fact.quarantined for fact in facts])
    """
    time.sleep(1.1)  # HDF5 counts seconds
    done = stored.script(text, tmp_path, MALLOC_PERTURB_="90", TZ="Asia/Tokyo")
    assert done.stdout.strip() == str([(4, "shards put together"), (4, "shards compared")]) + " " + str(
        [{start: "not finite"} for start in (0, 16, 32, 48)]
    ), done.stderr
    assert (tmp_path / "again.h5").read_bytes() == path.read_bytes()


def damaged(tmp_path: Path, number: int = 2) -> tuple[Layout, list[Shard], Path]:
    layout = stored.layout()
    plan = stored.shards(tmp_path / "shards", layout, stored.arrays(layout))
    return layout, plan, tmp_path / "shards" / plan[number].name


def refuses(tmp_path: Path, layout: Layout, plan: list[Shard], path: Path, reason: str, key: str = stored.KEY) -> None:
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(DamagedShardError, match=reason) as error:
        assemble(tmp_path / "shards", plan, key, layout, tmp_path / "attributions.h5", stored.ATTRIBUTES)
    assert error.value.path == path
    assert sorted(os.listdir(tmp_path)) == before


def test_a_damaged_shard_is_named_and_no_file_left(tmp_path: Path) -> None:
    layout, plan, path = damaged(tmp_path)
    good = path.read_bytes()
    for at in (3, 460, 512, 520, len(good) // 2, len(good) - 300, len(good) - 9, len(good) - 1):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
        refuses(tmp_path, layout, plan, path, "SHA-256 differs|is not a shard")
    path.write_bytes(good[:-5])
    refuses(tmp_path, layout, plan, path, "SHA-256 differs")
    path.write_bytes((tmp_path / "shards" / plan[1].name).read_bytes())
    refuses(tmp_path, layout, plan, path, "holds samples 16 to 31, not 32 to 47")
    path.unlink()
    refuses(tmp_path, layout, plan, path, "is missing")
    path.write_bytes(good)
    refuses(tmp_path, layout, plan, tmp_path / "shards" / plan[0].name, "other settings", key="other")
    assemble(tmp_path / "shards", plan, stored.KEY, layout, tmp_path / "attributions.h5", stored.ATTRIBUTES)
    holds(tmp_path / "attributions.h5", stored.arrays(layout))


def test_a_shard_that_changes_while_it_is_copied_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, plan, path = damaged(tmp_path)
    read = module.shard_chunks

    def change(which: Path, *rest: object):
        if which == path:
            data = bytearray(path.read_bytes())
            data[600] ^= 1
            path.write_bytes(data)
        return read(which, *rest)

    monkeypatch.setattr(module, "shard_chunks", change)
    refuses(tmp_path, layout, plan, path, "SHA-256 differs")


def test_a_byte_that_changes_on_its_way_into_the_file_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, plan, _ = damaged(tmp_path)
    write = module.write_chunk

    def change(dataset: h5py.Dataset, row: int, mask: int, raw: bytes) -> None:
        write(dataset, row, mask, raw[:-1] + bytes([raw[-1] ^ (row == 32)]))

    monkeypatch.setattr(module, "write_chunk", change)
    with pytest.raises(UserError, match="doesn't give back what was written"):
        assemble(tmp_path / "shards", plan, stored.KEY, layout, tmp_path / "a.h5", {})
    assert not (tmp_path / "a.h5").exists()


def test_a_file_that_can_not_be_opened_again_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, plan, _ = damaged(tmp_path)
    forget = module._forget

    def spoil(path: Path) -> None:
        forget(path)
        path.write_bytes(bytes(8) + path.read_bytes()[8:])

    monkeypatch.setattr(module, "_forget", spoil)
    with pytest.raises(UserError, match="doesn't give back what was written"):
        assemble(tmp_path / "shards", plan, stored.KEY, layout, tmp_path / "a.h5", {})
    assert os.listdir(tmp_path) == ["shards"]


def test_shards_that_do_not_cover_the_dataset_are_refused(tmp_path: Path) -> None:
    layout, plan, _ = damaged(tmp_path)
    for wrong in (plan[:-1], plan[1:], plan[::-1], [*plan, plan[-1]], [], plan_shards(50, 50)[:0], plan_shards(48, 16)):
        with pytest.raises(ValueError, match="do not cover"):
            assemble(tmp_path / "shards", wrong, stored.KEY, layout, tmp_path / "a.h5", {})
    with pytest.raises(ValueError, match="not those of 16"):
        assemble(tmp_path / "shards", plan_shards(50, 10), stored.KEY, layout, tmp_path / "a.h5", {})


def test_a_disk_that_gives_back_other_bytes_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, plan, _ = damaged(tmp_path)
    forget = module._forget

    def corrupt(path: Path) -> None:
        """As if a byte of a heatmap had changed between memory and disk."""
        forget(path)
        with h5py.File(path) as file:
            at = file["attribution"].id.get_chunk_info(2).byte_offset
        data = bytearray(path.read_bytes())
        data[at + 5] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(module, "_forget", corrupt)
    with pytest.raises(UserError, match="the disk doesn't give back what was written"):
        assemble(tmp_path / "shards", plan, stored.KEY, layout, tmp_path / "attributions.h5", {})
    assert os.listdir(tmp_path) == ["shards"]


def test_an_error_or_an_interruption_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    layout, plan, _ = damaged(tmp_path)
    (tmp_path / "attributions.h5").write_bytes(b"old")

    def stop(shards: Any, number: int, what: str) -> Any:
        yield shards[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        assemble(tmp_path / "shards", plan, stored.KEY, layout, tmp_path / "attributions.h5", {}, stop)
    assert sorted(os.listdir(tmp_path)) == ["attributions.h5", "shards"]
    assert (tmp_path / "attributions.h5").read_bytes() == b"old"


@pytest.mark.parametrize("limit", [10, 500, 3_000, 30_000, 60_000, 75_000])
def test_a_file_that_can_not_grow_is_told_in_one_line(tmp_path: Path, limit: int) -> None:
    layout = stored.layout(n=200)
    stored.shards(tmp_path / "shards", layout, stored.arrays(layout))
    text = """
        import pathlib, resource, sys, stored
        from spray.errors import UserError
        from spray.store.assemble import assemble
        from spray.store.shards import plan_shards
        folder, limit = pathlib.Path(sys.argv[1]), int(sys.argv[2])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            assemble(folder / "shards", plan_shards(200, 16), stored.KEY, stored.layout(n=200), folder / "a.h5", {})
        except UserError as error:
            print(error)
    """
    done = stored.script(text, tmp_path, limit)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"no space left for {tmp_path / 'a.h5'}: free some")
    assert os.listdir(tmp_path) == ["shards"]


MEMORY = """
    import json, pathlib, sys, stored
    from spray.store.assemble import assemble
    from spray.store.layout import ArraySpec
    from spray.store.shards import plan_shards

    def peak():
        fields = dict(line.split(":") for line in open("/proc/self/status"))
        return int(fields["VmHWM"].split()[0]) / 1024

    folder, shard_size, number = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    n = shard_size * number
    layout = stored.layout(n, shard_size, attribution=ArraySpec((3, 64, 64), "float32"))
    plan = plan_shards(n, shard_size)
    before = peak()
    if sys.argv[4] == "write":
        rows = {name: values for name, values in stored.arrays(stored.layout(64, 64, **layout.arrays)).items()}
        before = peak()
        for shard in plan:
            stored.write_again(folder / shard.name, shard, layout, rows)
    else:
        assemble(folder, plan, stored.KEY, layout, folder / "attributions.h5", {})
    print(json.dumps(peak() - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_memory_does_not_grow_with_shards_or_their_size(tmp_path: Path) -> None:
    grown = {}
    for what in ("write", "assemble"):
        done = stored.script(MEMORY, tmp_path, 1024, 4, what)
        assert done.returncode == 0, done.stderr
        grown[what] = json.loads(done.stdout)
    # 200 MB in shards of 50 MB.
    assert (tmp_path / "attributions.h5").stat().st_size > 200_000_000
    assert grown["write"] < 20
    assert grown["assemble"] < 20
