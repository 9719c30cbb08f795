"""Files of analyses are read with care: what is damaged or not as it should be is told in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import stored

from spray.errors import UserError
from spray.store.analyses import class_group, open_analysis, predicted_group

N = 40


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "analysis.h5"
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for name, index in (
            (class_group(0), np.arange(0, N, 2)),
            (class_group(3), np.arange(1, N, 2)),
            (predicted_group(0), np.arange(25)),
            ("all", np.arange(N)),
        ):
            group = file.create_group(name)
            group["index"] = index.astype(np.uint32)
            spectral = group.create_dataset("embedding/spectral", data=rng.normal(size=(len(index), 4)).astype("f4"))
            spectral.attrs["eigenvalue"] = np.float32([0.9, 0.5, 0.1, 0])
            labels = (np.arange(len(index)) % 3 - 1).astype(np.int32)
            group.create_dataset("cluster/kmeans-02", data=labels, fletcher32=True, chunks=(10,))
    return path


def test_classes_are_told_from_other_groups(path: Path) -> None:
    with open_analysis(path, N) as analysis:
        assert analysis.classes == [0, 3]
        assert analysis.names == ["00000000", "00000003", "all", "predicted-00000000"]
        group = analysis.group(3)
        assert group.index.tolist() == list(range(1, N, 2))
        assert len(group) == 20
        assert (group.clusterings, group.embeddings) == (["kmeans-02"], ["spectral"])
        assert group.labels("kmeans-02").tolist() == [i % 3 - 1 for i in range(20)]
        assert group.embedding().shape == (20, 4)
        np.testing.assert_allclose(group.eigenvalues(), [0.9, 0.5, 0.1, 0], atol=1e-6)
        assert group.eigenvalues("umap").size == 0
        assert len(analysis.group("all")) == N
        assert len(analysis.group(predicted_group(0))) == 25


def change(path: Path, what: Callable[[h5py.File], None]) -> None:
    with h5py.File(path, "a") as file:
        what(file)


def replace(name: str, values: np.ndarray) -> Callable[[h5py.File], None]:
    def what(file: h5py.File) -> None:
        del file[name]
        file[name] = values

    return what


def read_all(path: Path) -> None:
    with open_analysis(path, N) as analysis:
        for name in analysis.names:
            group = analysis.group(name)
            for embedding in group.embeddings:
                group.embedding(embedding)
                group.eigenvalues(embedding)
            for clustering in group.clusterings:
                group.labels(clustering)


BAD = np.full((20, 4), np.nan, np.float32)
CHANGES = {
    "no index": (lambda file: file.__delitem__("00000003/index"), "has no /00000003/index"),
    "a group as labels": (lambda file: file.create_group("00000003/cluster/x"), "has no /00000003/cluster/x"),
    "float index": (replace("00000003/index", np.arange(20.0)), "/00000003/index holds float64"),
    "index beyond the data": (replace("00000003/index", np.arange(30, 50)), "/00000003/index doesn't hold each"),
    "negative index": (replace("00000003/index", np.arange(20) - 1), "/00000003/index doesn't hold each"),
    "double index": (replace("00000003/index", np.zeros(20, int)), "/00000003/index doesn't hold each"),
    "short labels": (replace("00000003/cluster/kmeans-02", np.zeros(19, int)), "has 19 rows, but the index has 20"),
    "float labels": (replace("00000003/cluster/kmeans-02", np.zeros(20)), "kmeans-02 holds float64"),
    "odd labels": (replace("00000003/cluster/kmeans-02", np.full(20, -2)), "labels below -1"),
    "NaN": (replace("00000003/embedding/spectral", BAD), "embedding/spectral holds NaN"),
    "flat embedding": (replace("00000003/embedding/spectral", np.zeros(20)), r"float64 of shape \(20,\)"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_is_not_as_it_should_be_is_told(path: Path, kind: str) -> None:
    what, said = CHANGES[kind]
    read_all(path)
    change(path, what)
    with pytest.raises(UserError, match=said) as error:
        read_all(path)
    assert str(path) in str(error.value)
    assert "start the run again" in str(error.value)


def test_a_flipped_bit_is_told(path: Path) -> None:
    with h5py.File(path) as file:
        place = file["00000003/cluster/kmeans-02"].id.get_chunk_info(1).byte_offset
    data = bytearray(path.read_bytes())
    data[place + 3] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"is damaged: /00000003/cluster/kmeans-02 can't be read"):
        read_all(path)


@pytest.mark.parametrize("length", [0, 100, 3000])
def test_a_cut_off_file_is_told(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=r"analysis\.h5"):
        read_all(path)


def test_a_group_that_is_not_there_is_told(path: Path) -> None:
    with open_analysis(path) as analysis:
        with pytest.raises(UserError, match="has no group for class 1, but 00000000, 00000003, all"):
            analysis.group(1)
        with pytest.raises(UserError, match="has no group predicted-00000003"):
            analysis.group(predicted_group(3))
        with pytest.raises(UserError, match="has no /all/cluster/dbscan"):
            analysis.group("all").labels("dbscan")
    with pytest.raises(UserError, match="does not exist"):
        open_analysis(path.with_name("other.h5"))


CHANGED = """
    import signal, sys
    from pathlib import Path
    import numpy as np
    from spray.errors import UserError
    from spray.storage import hdf5_writer
    from spray.store.analyses import open_analysis

    path = Path(sys.argv[1]) / "analysis.h5"
    with hdf5_writer(path) as file:
        file.attrs["options"] = "{}"
        group = file.create_group("00000000")
        group.attrs["class_name"] = "Größe"
        for name, values in (
            ("index", np.arange(20, dtype=np.uint32)),
            ("embedding/spectral", np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)),
            ("cluster/kmeans-02", np.zeros(20, np.int32)),
        ):
            group.create_dataset(name, data=values, chunks=values.shape, fletcher32=True, track_times=False)

    def read():
        with open_analysis(path, 20) as analysis:
            group = analysis.group(0)
            return str((group.index, group.embedding(), group.labels("kmeans-02")))

    good, wanted, told = path.read_bytes(), read(), 0
    for at in range(0, len(good), 4):
        path.write_bytes(good[:at] + bytes([good[at] ^ (1 << at // 4 % 8)]) + good[at + 1 :])
        signal.alarm(20)  # a changed byte may have HDF5 go round in a circle
        try:
            assert read() == wanted, at
        except UserError:
            told += 1
    print(told > 100)
"""


@pytest.mark.slow
def test_a_changed_byte_is_told_or_changes_nothing_that_is_read(tmp_path: Path) -> None:
    done = stored.script(CHANGED, tmp_path)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
