"""Reading attributions gives what was written, or one clear error; never something else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import stored
from hypothesis import given, settings
from hypothesis import strategies as st

from spray.errors import UserError
from spray.store import Attributions, open_attributions
from spray.store.layout import ArraySpec, Layout

LAYOUT = stored.layout(compression="gzip")
DATA = stored.arrays(LAYOUT)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored.whole(tmp_path_factory.mktemp("good"), LAYOUT, DATA)


@pytest.fixture
def path(good: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copy(good, tmp_path / "attributions.h5"))


def plain(path: Path, **changes: Any) -> Path:
    """A file as other programs write it: no checksums, no key, no `valid`."""
    arrays = {name: DATA[name] for name in ("attribution", "label", "prediction")} | changes
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            if values is not None:
                file[name] = values
    return path


def test_everything_that_was_written_is_there(good: Path) -> None:
    with open_attributions(good, stored.KEY, (50, 3, 6, 5)) as a:
        assert len(a) == 50
        for name, rows in {"attribution": a.attribution, "label": a.label, "prediction": a.prediction}.items():
            assert (rows.shape, rows.dtype, rows.ndim, len(rows)) == (
                *(lambda x: (x.shape, x.dtype, x.ndim))(DATA[name]),
                50,
            )
            np.testing.assert_array_equal(rows[:], DATA[name], strict=True)
            np.testing.assert_array_equal(np.asarray(rows), DATA[name], strict=True)
            np.testing.assert_array_equal(a.array(name)[...], DATA[name], strict=True)
        np.testing.assert_array_equal(a.valid, DATA["valid"], strict=True)
        assert list(a.layers) == ["features.3", "head/inner"]
        for name, rows in a.layers.items():
            np.testing.assert_array_equal(rows[:], DATA[f"layer/{name}"], strict=True)
        assert a.layers["features.3"].dtype == np.float16
        assert stored.ATTRIBUTES.items() <= a.attributes.items()
        assert a.index is None
        a.verify()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_selection_is_numpy_s(good: Path, data: st.DataObject) -> None:
    n = LAYOUT.n
    rows = st.integers(-n, n - 1)
    arrays = st.lists(rows, max_size=60).map(lambda values: np.array(values, dtype=np.int64))
    selection = data.draw(
        st.one_of(
            rows,
            rows.map(np.int32),
            st.slices(n),
            arrays,
            arrays.map(np.sort),
            arrays.map(lambda values: values.tolist()),
            st.lists(st.booleans(), min_size=n, max_size=n).map(np.array),
        )
    )
    rest = data.draw(st.sampled_from([(), (0,), (slice(None), 1), (Ellipsis, slice(1, 3)), (slice(None), [0, 1])]))
    # NumPy moves axes about when indices meet across a slice: there, rows first and then the rest is meant.
    expected = DATA["attribution"][np.asarray(selection, dtype=int) if isinstance(selection, list) else selection]
    for part in (rest,) if rest else ():
        expected = expected[
            part if np.ndim(selection) == 0 and not isinstance(selection, slice) else (slice(None), *part)
        ]
    with open_attributions(good) as a:
        found = a.attribution[(selection, *rest)] if rest else a.attribution[selection]
    np.testing.assert_array_equal(found, expected, strict=True)


@pytest.mark.parametrize(
    "wrong", [50, -51, [50], [-51], [0.5], np.zeros(49, bool), np.zeros((2, 2), int), np.True_, None, "label"]
)
def test_rows_that_are_not_there_are_index_errors(good: Path, wrong: Any) -> None:
    with open_attributions(good) as a, pytest.raises(IndexError):
        a.attribution[wrong]


@pytest.mark.parametrize("size", [1, 7, 16, 1000])
def test_batches_go_through_rows_in_order_and_end_with_chunks(tmp_path: Path, size: int) -> None:
    layout = Layout(stored.SPECS | {"attribution": ArraySpec((3, 30, 30), "float32")}, 100, 12)
    data = stored.arrays(layout)
    path = stored.whole(tmp_path, layout, data)
    rng = np.random.default_rng(0)
    with open_attributions(path) as a:
        chunk = a.attribution.rows_per_chunk
        assert chunk == 6
        for indices in (None, np.arange(0, 100, 3), np.sort(rng.permutation(100)[:40]), rng.permutation(100)[:40], []):
            parts = list(a.batches(indices, size))
            wanted = np.arange(100) if indices is None else np.asarray(indices, dtype=int)
            assert np.concatenate([[], *(rows for rows, _ in parts)]).tolist() == wanted.tolist()
            for rows, values in parts:
                assert 1 <= len(rows) <= size
                np.testing.assert_array_equal(values, data["attribution"][rows], strict=True)
            if size > 2 * chunk and (np.diff(wanted) > 0).all():
                read = [set((rows // chunk).tolist()) for rows, _ in parts]
                assert sum(map(len, read)) == len(set().union(*read))
        values = np.concatenate([part for _, part in a.batches(name="layer/features.3", size=size)])
        np.testing.assert_array_equal(values, data["layer/features.3"], strict=True)
        with pytest.raises(UserError, match="has no /layer/none, but /attribution, /label"):
            next(a.batches(name="layer/none"))


def test_files_of_other_programs_are_read_too(tmp_path: Path) -> None:
    n = LAYOUT.n
    for number, changes in enumerate(
        [
            {},
            {"attribution": DATA["attribution"].astype(">f8")},
            {"attribution": DATA["attribution"].astype("f2"), "label": DATA["label"].astype("u2")},
            {"attribution": DATA["attribution"].sum(1), "label": np.eye(4, dtype=bool)[np.arange(n) % 4]},
            {"index": np.arange(n, dtype=np.uint32)[::-1], "sha256": np.zeros(3)},
        ]
    ):
        path = plain(tmp_path / f"{number}.h5", **changes)
        with open_attributions(
            path, shape=(n, *[None] * (np.ndim(changes.get("attribution", DATA["attribution"])) - 1))
        ) as a:
            np.testing.assert_array_equal(
                a.attribution[:], changes.get("attribution", DATA["attribution"]), strict=True
            )
            np.testing.assert_array_equal(a.label[::-1], changes.get("label", DATA["label"])[::-1], strict=True)
            assert a.valid.tolist() == [True] * n
            assert not a.layers
            assert a.index is None or a.index.tolist() == list(range(n))[::-1]
            a.verify()
    path = plain(tmp_path / "bare.h5", label=None, prediction=None)
    with open_attributions(path) as a:
        np.testing.assert_array_equal(a.attribution[3], DATA["attribution"][3])
        for name in ("label", "prediction"):
            with pytest.raises(UserError, match=f"bare.h5 has no /{name}, but /attribution"):
                getattr(a, name)


def everything(a: Attributions) -> dict[str, Any]:
    arrays = {name: a.array(name)[:] for name in ("attribution", "label", "prediction")}
    arrays |= {f"layer/{name}": rows[:] for name, rows in a.layers.items()}
    return arrays | {"valid": a.valid, "attributes": a.attributes}


def test_no_changed_byte_leads_to_other_data(path: Path) -> None:
    """Bytes of heatmaps, of HDF5's own records, of texts: whatever is changed, it is told or doesn't matter."""
    good, changed = path.read_bytes(), path.with_name("changed.h5")
    with open_attributions(path) as a:
        expected = everything(a)
    told: list[str] = []
    by_reading = 0
    rng = np.random.default_rng(0)
    for at in rng.permutation(len(good))[:1500]:
        changed.write_bytes(good[:at] + bytes([good[at] ^ int(rng.integers(1, 256))]) + good[at + 1 :])
        found: dict[str, Any] | None = None
        try:
            with open_attributions(changed, stored.KEY) as a:
                found = everything(a)
                a.verify()
        except UserError as error:
            told.append(str(error))
            by_reading += found is None
        if found is not None:
            assert found["attributes"] == expected["attributes"]
            for name in DATA:
                np.testing.assert_array_equal(found[name], expected[name], strict=True)
    assert by_reading > 700
    assert all(str(changed) in text and "\n" not in text for text in told)


def test_no_missing_end_leads_to_other_data(path: Path) -> None:
    good, changed = path.read_bytes(), path.with_name("changed.h5")
    for length in range(0, len(good), 61):
        changed.write_bytes(good[:length])
        with pytest.raises(UserError, match=r"is cut off|is not an HDF5 file|is damaged|can't be opened"):
            open_attributions(changed)


def flip(path: Path, row: int, name: str = "attribution", bytes_: int = 1) -> None:
    with h5py.File(path) as file:
        chunk = file[name].chunks[0]
        info = file[name].id.get_chunk_info_by_coord((row // chunk * chunk, *[0] * (file[name].ndim - 1)))
    data = bytearray(path.read_bytes())
    for at in range(info.byte_offset + 10, info.byte_offset + 10 + bytes_):
        data[at] ^= 0xFF
    path.write_bytes(data)


def test_damage_is_told_by_its_rows_and_the_others_are_still_read(path: Path) -> None:
    flip(path, 20)
    with open_attributions(path) as a:
        for selection in (20, slice(16, 32), [3, 20], slice(None), np.arange(50) > 15):
            with pytest.raises(UserError) as error:
                a.attribution[selection]
            assert str(error.value) == (
                f"{path} is damaged: rows 16 to 31 of /attribution can't be read as they were written; "
                "delete it and start the run again, which computes it anew"
            )
        np.testing.assert_array_equal(a.attribution[:16], DATA["attribution"][:16])
        np.testing.assert_array_equal(a.attribution[[40, 2]], DATA["attribution"][[40, 2]])
        with pytest.raises(UserError, match="something in rows 16 to 31 isn't what was written"):
            a.verify()


def test_verify_finds_what_the_checksums_of_hdf5_can_not_see(tmp_path: Path) -> None:
    """Fletcher's checksum takes 0x0000 for 0xFFFF; so would a reader that asks only it."""
    layout = stored.layout(n=4, shard_size=2)
    data = {name: np.zeros_like(values) for name, values in stored.arrays(layout).items()}
    data["attribution"][:, 0, 0, 0] = 1
    path = stored.whole(tmp_path, layout, data)
    flip(path, 2, bytes_=2)
    with open_attributions(path) as a:
        assert not np.array_equal(a.attribution[:], data["attribution"])  # nobody noticed
        with pytest.raises(UserError, match="something in rows 2 to 3"):
            a.verify()


def test_other_keys_and_shapes_are_refused(path: Path) -> None:
    with pytest.raises(UserError, match=r"computed with other settings \(key 0123abcd, not ffff\); delete it"):
        open_attributions(path, "ffff")
    for shape in ((51, None, None, None), (50, 3, 6), (50, 1, 6, 5), (50, 3, 6, 5, 1)):
        with pytest.raises(UserError, match=r"has shape \(50, 3, 6, 5\), but must have"):
            open_attributions(path, stored.KEY, shape)
    with pytest.raises(UserError, match=r"\(no key, not ffff\)"):
        open_attributions(plain(path), "ffff")
    with pytest.raises(UserError, match="was it made from other data"):
        open_attributions(path, shape=(60_000, None, None, None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attribution": None}, "has no /attribution, but /label, /prediction"),
        ({"attribution": np.zeros(50, "f4")}, "must have one heatmap per sample"),
        ({"attribution": np.zeros((), "f4")}, "shape"),
        ({"attribution": np.zeros((50, 1, 2, 2), int)}, "/attribution holds int64, but must hold floats"),
        ({"attribution": np.array([b"a"] * 50)}, r"/attribution holds \|S1, but must hold floats"),
        ({"label": np.zeros(50, "f4")}, "/label holds float32, but must hold whole numbers or truth values"),
        ({"label": np.zeros(49, int)}, r"/label has shape \(49,\), but must have 50 rows"),
        ({"prediction": np.zeros((50, 4), int)}, "/prediction holds int64, but must hold floats"),
        ({"valid": np.zeros(3, bool)}, r"/valid has shape \(3,\), but must have 50 rows"),
        ({"layer/a": np.zeros((49, 2), "f4")}, r"/layer/a has shape \(49, 2\), but must have 50 rows"),
        ({"attribution/one": np.zeros((50, 1, 2, 2), "f4"), "attribution": None}, "/attribution is a group"),
    ],
)
def test_what_is_not_attributions_is_told(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = plain(tmp_path / "a.h5", **changes)
    with pytest.raises(UserError, match=message), open_attributions(path) as a:
        _ = a.label, a.prediction, a.valid


def test_rows_that_were_never_written_are_told(tmp_path: Path) -> None:
    """HDF5 itself would give zeros for them."""
    for chunks in (None, (1, 1, 2, 2)):
        with h5py.File(tmp_path / "a.h5", "w") as file:
            dataset = file.create_dataset("attribution", (50, 1, 2, 2), "f4", chunks=chunks)
            if chunks:
                dataset[:30] = 1
        with pytest.raises(UserError, match="incomplete: rows of /attribution were never written"):
            open_attributions(tmp_path / "a.h5")


def test_a_newer_format_is_told(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["format"] = "spray attributions 9"
    with pytest.raises(UserError, match="has format 'spray attributions 9', but this version reads"):
        open_attributions(path)


def test_a_float_with_other_bits_is_refused(tmp_path: Path) -> None:
    """The type says how bits become numbers; one that NumPy calls float32 need not be one."""
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_ebias(kind.get_ebias() - 1)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        space = h5py.h5s.create_simple((50, 1, 2, 2))
        h5py.h5d.create(file.id, b"attribution", kind, space).write(
            h5py.h5s.ALL, h5py.h5s.ALL, np.ones((50, 1, 2, 2), "f4")
        )
    with pytest.raises(UserError, match="/attribution holds numbers in a form of its own"):
        open_attributions(tmp_path / "a.h5")


def test_missing_and_foreign_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.h5 does not exist"):
        open_attributions(tmp_path / "none.h5")
    with pytest.raises(UserError, match="is not a file"):
        open_attributions(tmp_path)
    (tmp_path / "text.h5").write_text("attributions")
    with pytest.raises(UserError, match=r"text\.h5 is not an HDF5 file"):
        open_attributions(tmp_path / "text.h5")
    plain(tmp_path / "link.h5", attribution=None)
    with h5py.File(tmp_path / "link.h5", "r+") as file:
        file["attribution"] = h5py.ExternalLink(plain(tmp_path / "other.h5"), "/attribution")
    with pytest.raises(UserError, match="/attribution is a link to another file"):
        open_attributions(tmp_path / "link.h5")
