"""Writers that are killed, disks that are full, folders that can't be written to."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest
import stored

from spray import storage
from spray.errors import UserError
from spray.store import disk
from spray.store.shards import Shard

KILLED = """
    import json, os, pathlib, random, signal, sys, time, stored
    from spray.store.layout import ArraySpec
    from spray.store.shards import plan_shards
    folder, kills = pathlib.Path(sys.argv[1]), int(sys.argv[2])
    layout = stored.layout(n=512, shard_size=512, attribution=ArraySpec((3, 24, 24), "float32"))
    data, shard = stored.arrays(layout), plan_shards(512, 512)[0]

    def begin():
        done, tell = os.pipe()
        if child := os.fork():
            os.close(tell)
            return child, done
        stored.write(folder / shard.name, shard, layout, data, (8,) * 64)
        os.write(tell, b"x")
        os._exit(0)

    child, done = begin()
    start = time.monotonic()
    assert os.read(done, 1) == b"x"
    seconds = time.monotonic() - start
    os.waitpid(child, 0)
    os.rename(folder / shard.name, folder / "good")
    random.seed(0)
    killed = []
    while len(killed) < kills:
        child, done = begin()
        time.sleep(random.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        finished = os.read(done, 1) == b"x"  # else the pipe is at its end
        os.close(done)
        names = os.listdir(folder)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and not finished:
            half = [os.path.getsize(folder / name) for name in names if name.endswith(".tmp")]
            whole = shard.name in names and (folder / shard.name).read_bytes() == (folder / "good").read_bytes()
            killed.append({"half": half, "there": shard.name in names, "whole": whole})
        for name in names:
            if name != "good":
                os.unlink(folder / name)
    print(json.dumps(killed))
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_no_shard_or_a_whole_one(tmp_path: Path) -> None:
    done = stored.script(KILLED, tmp_path, 60)
    assert done.returncode == 0, done.stderr
    killed = json.loads(done.stdout)
    assert len(killed) == 60
    assert all(kill["whole"] for kill in killed if kill["there"])
    # The kills landed while rows were being written, at many different places.
    assert len({size for kill in killed for size in kill["half"]}) >= 10
    assert sum(bool(kill["half"]) and not kill["there"] for kill in killed) >= 30


FULL = """
    import os, pathlib, resource, sys, stored
    from spray.errors import UserError
    from spray.store.shards import plan_shards
    folder, limit = pathlib.Path(sys.argv[1]), int(sys.argv[2])
    layout = stored.layout(n=400, shard_size=400, compression=sys.argv[3])
    data, shard = stored.arrays(layout), plan_shards(400, 400)[0]
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        stored.write(folder / shard.name, shard, layout, data, (8,) * 50)
        print("written")
    except UserError as error:
        print(error)
    held = 0  # by files that are gone, but open
    for name in os.listdir("/proc/self/fd"):
        link = f"/proc/self/fd/{name}"
        if os.path.lexists(link) and ".tmp" in os.readlink(link):
            held += os.stat(link).st_blocks
    print(sorted(os.listdir(folder)), held)
"""


@pytest.mark.parametrize("compression", ["none", "gzip"])
@pytest.mark.parametrize("limit", [300, 512, 2_000, 20_000, 100_000, 150_000, 155_000])
def test_a_file_that_can_not_grow_is_told_in_one_line(tmp_path: Path, limit: int, compression: str) -> None:
    done = stored.script(FULL, tmp_path, limit, compression)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    told, left = done.stdout.splitlines()
    if told != "written":
        assert told.startswith(f"no space left for {tmp_path / '000000.h5'}: free some")
        assert left == "[] 0"
    assert told != "written" or limit > 20_000


@pytest.mark.parametrize("kilobytes", [4, 8, 40, 120, 152])
def test_a_full_disk_is_told_in_one_line(tmp_path: Path, kilobytes: int) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        done = stored.script(FULL, tmp_path, 0, "none")
        free = os.statvfs(tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout.startswith("no space left for")
    # Nothing is left and the space is given back, though the process goes on.
    assert done.stdout.splitlines()[1] == "[] 0"
    assert free.f_bavail >= free.f_blocks - 1


RESULTS = """
    import sys, numpy as np, os
    from pathlib import Path
    from spray.data.arrays import ArrayDataset
    from spray.errors import UserError
    from spray.storage import hdf5_writer
    from spray.virelay import export
    noise = np.random.default_rng(0).integers(0, 256, (16, 3, 40, 40), np.uint8)

    def analysis():
        with hdf5_writer(Path(sys.argv[1]) / "analysis.h5") as file:
            file["a/b"] = noise

    def virelay():
        dataset = ArrayDataset(noise, np.zeros(16, int), ["a"])
        export(Path(sys.argv[1]), dataset, attributions=None, analysis=None, title="t", model="m",
               attribution_method="m", attribution_strategy="s", analysis_method="a")

    for write in (analysis, virelay):
        try:
            write()
        except UserError as error:
            print(error)
        print(os.listdir(sys.argv[1]))
"""


@pytest.mark.parametrize("kilobytes", [4, 16, 64])
def test_a_full_disk_is_told_by_whatever_writes_hdf5(tmp_path: Path, kilobytes: int) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        done = stored.script(RESULTS, tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    first, left, second, left_too = done.stdout.splitlines()
    assert first.startswith(f"no space left for {tmp_path / 'analysis.h5'}: ")
    assert second.startswith(f"no space left for {tmp_path / 'dataset.h5'}: ")
    assert left == left_too == "[]"


def test_the_disk_s_refusals_are_user_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = stored.layout(n=16, shard_size=16)
    for number, message in (
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "no space left"),
        (errno.EROFS, "can't be written to \\(Read-only file system\\)"),
        (errno.EACCES, "can't be written to \\(Permission denied\\)"),
    ):

        def fail(*_: object, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(storage.os, "replace", fail)
        with pytest.raises(UserError, match=message):
            stored.write(tmp_path / "x.h5", Shard(0, 0, 16), layout, stored.arrays(layout))
        assert os.listdir(tmp_path) == []
    with pytest.raises(OSError, match="Input/output"), disk.disk_errors(tmp_path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    layout = stored.layout(n=16, shard_size=16)
    with pytest.raises(UserError, match="can't be written to"):
        stored.write(tmp_path / "x.h5", Shard(0, 0, 16), layout, stored.arrays(layout))
