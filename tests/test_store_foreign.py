"""Files from anywhere: nothing outside of them is read, nothing absurd allocated, each refusal says why."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import stored

from spray.errors import UserError
from spray.store.foreign import open_foreign

VALUES = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """In a folder of its own; the file beside it is a stranger's."""
    (tmp_path / "inside").mkdir()
    with h5py.File(tmp_path / "outside.h5", "w") as file:
        file["secret"] = VALUES
    (tmp_path / "outside.raw").write_bytes(VALUES.tobytes())
    with h5py.File(tmp_path / "inside/a.h5", "w") as file:
        file["data"] = VALUES
    return tmp_path / "inside/a.h5"


def refused(path: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        open_foreign(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    # It isn't left open.
    assert not any(str(path) == os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd"))


def test_what_is_harmless_is_read(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.create_dataset("packed", data=np.zeros((500, 500)), chunks=(50, 50), compression="gzip", fletcher32=True)
        file.create_dataset("lzf", data=np.zeros((500, 500)), chunks=(50, 50), compression="lzf")
        file["texts"] = np.array(["a", "bc"], dtype=object)
        file["table"] = np.zeros(4, dtype=[("a", "f4"), ("b", "i4", (2,))])
        file["complex"], file["truth"] = np.zeros(3, complex), np.ones(3, bool)
        file.create_dataset("empty", data=h5py.Empty("f4"))
        file.create_dataset("none", (0, 3), "f4", chunks=True, maxshape=(None, 3))
        file["group/inner/x"] = 1
        file["group/soft"], file["same"] = h5py.SoftLink("/data"), file["data"]
        file["group/twice"] = file["group/inner"]
        file["type"] = np.dtype("f4")
        file.create_dataset("sparse", (100, 100), "f4", chunks=(10, 10))
    with open_foreign(path) as file:
        np.testing.assert_array_equal(file["group/soft"][:], VALUES)
        assert not file["packed"][:].any()
        with pytest.raises(ValueError, match="no write intent"):
            file["more"] = 1
    stored.whole(path.parent, layout := stored.layout(), stored.arrays(layout))
    open_foreign(path.parent / "attributions.h5").close()


def external_link(file: h5py.File) -> None:
    file["x"] = h5py.ExternalLink("../outside.h5", "/secret")


def external_link_to_nothing(file: h5py.File) -> None:
    file["x"] = h5py.ExternalLink("/nowhere.h5", "/secret")


def external_link_deep(file: h5py.File) -> None:
    file["a/b/c/x"] = h5py.ExternalLink("../outside.h5", "/")
    file["soft"] = h5py.SoftLink("/a/b/c/x/secret")


def external_storage(file: h5py.File) -> None:
    file.create_dataset("x", VALUES.shape, "<f4", external=[("../outside.raw", 0, h5py.h5f.UNLIMITED)])


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout(VALUES.shape, "<f4")
    layout[:] = h5py.VirtualSource("../outside.h5", "secret", VALUES.shape)
    file.create_virtual_dataset("x", layout)


def virtual_growing(file: h5py.File) -> None:
    """Its shape is that of another file, which HDF5 opens to tell it."""
    layout = h5py.VirtualLayout(VALUES.shape, "<f4", maxshape=(None, 3, 4))
    source = h5py.VirtualSource("../outside.h5", "secret", VALUES.shape, maxshape=(None, 3, 4))
    layout[0 : h5py.h5s.UNLIMITED] = source[0 : h5py.h5s.UNLIMITED]
    file.create_virtual_dataset("x", layout)


def soft_to_nothing(file: h5py.File) -> None:
    file["x"] = h5py.SoftLink("/nothing")


def soft_circle(file: h5py.File) -> None:
    file["x"], file["y"] = h5py.SoftLink("/y"), h5py.SoftLink("/x")


def group_in_itself(file: h5py.File) -> None:
    file["x/y/z"] = file.create_group("x/y")


def group_in_its_own_soft(file: h5py.File) -> None:
    file["x/y/z"] = h5py.SoftLink("/x")


def two_groups_in_each_other(file: h5py.File) -> None:
    file["x/to_y"], file["y/to_x"] = h5py.SoftLink("/y"), h5py.SoftLink("/x")


def root_in_itself(file: h5py.File) -> None:
    file["x"] = file["/"]


def contiguous_of_nothing(file: h5py.File) -> None:
    file.create_dataset("x", (10**9, 10**6), "f8")


def chunks_of_nothing(file: h5py.File) -> None:
    file.create_dataset("x", (10**5, 10**5), "f4", chunks=(500, 500))[0, 0] = 1


def huge_chunk(file: h5py.File) -> None:
    file.create_dataset("x", (5 * 10**8,), "f8", chunks=(3 * 10**8,))


def bomb(file: h5py.File) -> None:
    """Deflated twice, zeros become a millionth."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((1 << 22,))
    properties.set_deflate(9)
    properties.set_deflate(9)
    space = h5py.h5s.create_simple((1 << 24,))
    h5py.Dataset(h5py.h5d.create(file.id, b"x", h5py.h5t.IEEE_F32LE, space, properties))[:] = 0


def references(file: h5py.File) -> None:
    file.create_dataset("x", (1,), h5py.ref_dtype)[0] = file["data"].ref


def lists(file: h5py.File) -> None:
    file.create_dataset("x", (1,), h5py.vlen_dtype(np.float32))[0] = [1, 2, 3]


def references_in_a_table(file: h5py.File) -> None:
    file.create_dataset("x", (1,), [("a", "f4"), ("b", h5py.ref_dtype, (2,))])


def unknown_filter(file: h5py.File) -> None:
    file.create_dataset("x", (4,), "f4", chunks=(4,), compression=29999, allow_unknown_filter=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (external_link, "/x is a link to another file"),
        (external_link_to_nothing, "/x is a link to another file"),
        (external_link_deep, "/a/b/c/x is a link to another file"),
        (external_storage, "values of /x are in another file"),
        (virtual, "/x is a virtual dataset, whose values are in other files"),
        (virtual_growing, "/x is a virtual dataset, whose values are in other files"),
        (soft_to_nothing, "the link /x leads nowhere"),
        (soft_circle, "the link /x leads nowhere"),
        (group_in_itself, "groups contain each other"),
        (group_in_its_own_soft, "groups contain each other"),
        (two_groups_in_each_other, "groups contain each other"),
        (root_in_itself, "groups contain each other"),
        (contiguous_of_nothing, "/x claims to be 1000000000 x 1000000, 8,000,000,000,000,000 bytes, which a file of"),
        (chunks_of_nothing, "/x claims to be 100000 x 100000, 40,000,000,000 bytes, which a file of"),
        (huge_chunk, "/x is in chunks of 2,400,000,000 bytes"),
        (bomb, "/x claims to be 16777216, 67,108,864 bytes, which a file of"),
        (references, "/x holds objects or references"),
        (lists, "/x holds objects or references"),
        (references_in_a_table, "/x holds objects or references"),
        (unknown_filter, "/x needs the HDF5 filter 29999"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_what_is_not_harmless_is_refused(
    path: Path, make: Callable[[h5py.File], None], message: str, libver: str
) -> None:
    with h5py.File(path, "w", libver=(libver, "latest")) as file:
        file["data"] = VALUES
        make(file)
    refused(path, message)


def test_other_files_are_not_even_opened(path: Path) -> None:
    """Opening is refused without a look at the strangers, which may be devices or on another machine."""
    names = [external_link, external_link_deep, external_storage, virtual, virtual_growing]
    for number, make in enumerate(names):
        with h5py.File(path.with_name(f"{number}.h5"), "w", libver="latest") as file:
            make(file)
    # A pipe that nobody writes to: who opens it waits for ever.
    for name in ("outside.h5", "outside.raw"):
        (path.parents[1] / name).unlink()
        os.mkfifo(path.parents[1] / name)
    text = """
        import pathlib, sys
        from spray.errors import UserError
        from spray.store.foreign import open_foreign
        for name in sys.argv[1:]:
            try:
                open_foreign(pathlib.Path(name))
            except UserError:
                continue
            print(name)
    """
    done = stored.script(text, *[path.with_name(f"{number}.h5") for number in range(len(names))])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_many_paths_to_one_group_take_no_longer(path: Path) -> None:
    """Forty groups, each twice in the one before: 2 to the 40th paths."""
    with h5py.File(path, "w") as file:
        groups = [file.create_group(f"g{number}") for number in range(40)]
        for outer, inner in itertools.pairwise(groups):
            outer["a"] = outer["b"] = inner
    open_foreign(path).close()


def test_what_is_no_hdf5_file_is_told(path: Path) -> None:
    refused(path.with_name("none.h5"), "does not exist")
    refused(path.parent, "is not a file")
    os.mkfifo(path.with_name("pipe"))
    refused(path.with_name("pipe"), "is not a file")
    for name, data in (("empty", b""), ("text", b"data"), ("zeros", bytes(5000))):
        path.with_name(name).write_bytes(data)
        refused(path.with_name(name), f"{name} is not an HDF5 file")
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    refused(path, "is cut off")
    path.write_bytes(data[:50])
    refused(path, "can't be opened|is cut off")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_told(path: Path) -> None:
    path.chmod(0)
    with pytest.raises(UserError, match="permission denied"):
        open_foreign(path)


def test_names_in_any_bytes_are_told(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.id.links.create_soft(b"caf\xe9", b"/nothing")
    refused(path, "the link /caf\ufffd leads nowhere")
