"""The stages after `attribute` read small heatmaps as well as large ones, and damaged files with one line."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import small
import torch

from spray.data.folder import FolderDataset
from spray.errors import UserError
from spray.figures import fitted
from spray.report import evidence

ARGUMENTS = ["experiment=image_folder", f"dataset.image_size={small.SIDE}", "device=cpu", "model.epochs=2"]
ARGUMENTS += ["analysis.umap=false", "correction.methods=[]", "dataset.plant.kind=tag", "dataset.plant.class=coffee"]
SIZES = {"coffee": 60, "stone": 60}


@pytest.mark.parametrize("size", [(24, 24), (7, 31), (1, 1), (8, 5)])
def test_maps_are_brought_to_size_as_torch_does_it(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for shape in ((8, 8), (3, 5, 9), (2, 3, 1, 4)):
        maps = rng.normal(size=shape).astype(np.float32)
        wide = torch.from_numpy(maps).reshape(1, -1, *shape[-2:])
        expected = torch.nn.functional.interpolate(wide, size, mode="bilinear", align_corners=False)
        found = fitted(maps, size)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected.reshape(*shape[:-2], *size).numpy(), rtol=1e-5, atol=1e-6)
    same = rng.normal(size=(2, *size))
    assert fitted(same, size) is same
    np.testing.assert_array_equal(fitted(np.full((2, 2), 3.0), size), np.full(size, 3.0))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run with a planted tag whose heatmaps are stored as 8 x 8 sums of channels; its options."""
    folder = tmp_path_factory.mktemp("pooled")
    options = [*ARGUMENTS, *small.write_images(folder, SIZES, {"coffee": 16, "stone": 16})]
    options.append(f"model.factory={small.write_model(folder)}:build")
    options += ["attribution.pool=8", "attribution.channels=sum"]
    said = small.run(*options, f"run_dir={folder / 'run'}")
    assert said.code == 0, said.err
    return folder / "run", options


@pytest.mark.slow
def test_the_whole_run_works_with_small_heatmaps(finished: tuple[Path, list[str]]) -> None:
    run_dir, _ = finished
    with h5py.File(run_dir / "attributions.h5") as file:
        assert file["attribution"].shape == (120, 1, 8, 8)
    artifacts = json.loads((run_dir / "artifacts.json").read_text())["artifacts"]
    assert artifacts
    for row in artifacts:
        with np.load(run_dir / "artifacts" / row["id"] / "artifact.npz") as artifact:
            assert artifact["mask"].shape == (small.SIDE, small.SIDE)
        assert (run_dir / "artifacts" / row["id"] / "gallery.png").stat().st_size > 1000
    assert (run_dir / "report.html").is_file()
    assert (run_dir / "virelay/project.yaml").is_file()


@pytest.mark.slow
def test_the_report_shows_small_heatmaps_at_the_size_of_their_images(finished: tuple[Path, list[str]]) -> None:
    path = finished[0] / "attributions.h5"
    data = FolderDataset(finished[0].parent / "train", small.SIDE)
    groups, limit = evidence.galleries(data, path, list(range(30)), 0, dict.fromkeys(range(60), 0.5))
    assert [len(group.tiles) for group in groups] == [9, 6, 6]
    assert limit is not None
    with h5py.File(path) as file:
        for tile in (tile for group in groups for tile in group.tiles):
            np.testing.assert_allclose(tile.relevance, fitted(file["attribution"][tile.index][0], (24, 24)), atol=1e-6)


def damaged(finished: tuple[Path, list[str]], tmp_path: Path) -> Path:
    """A copy of the run in which a bit of each chunk of heatmaps flipped after the run looked at its outputs."""
    run_dir = Path(shutil.copytree(finished[0], tmp_path / "run"))
    path = run_dir / "attributions.h5"
    with h5py.File(path) as file:
        chunks = file["attribution"].id
        places = [chunks.get_chunk_info(i).byte_offset for i in range(chunks.get_num_chunks())]
    data = bytearray(path.read_bytes())
    for place in places:
        data[place + 7] ^= 0x20
    path.write_bytes(data)
    record = json.loads((run_dir / "run.json").read_text())
    record["stages"]["attribute"]["outputs"]["attributions.h5"]["sha256"] = hashlib.sha256(data).hexdigest()
    (run_dir / "run.json").write_text(json.dumps(record))
    return run_dir


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["analyze", "rank", "isolate"])
def test_a_flipped_bit_in_a_heatmap_is_told_in_one_line(
    finished: tuple[Path, list[str]], tmp_path: Path, stage: str
) -> None:
    run_dir = damaged(finished, tmp_path)
    (run_dir / {"analyze": "analysis.h5", "rank": "ranking.json", "isolate": "artifacts.json"}[stage]).unlink()
    said = small.run(*finished[1], f"run_dir={run_dir}", f"stages=[{stage}]")
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert said.err.startswith(f"spray: error: {run_dir / 'attributions.h5'} is damaged: row")
    assert said.err.endswith("delete it and start the run again, which computes it anew\n")


@pytest.mark.slow
def test_so_it_is_where_the_report_reads_it(finished: tuple[Path, list[str]], tmp_path: Path) -> None:
    path = damaged(finished, tmp_path) / "attributions.h5"
    data = FolderDataset(finished[0].parent / "train", small.SIDE)
    with pytest.raises(UserError, match=r"attributions\.h5 is damaged: rows? \d"):
        evidence.galleries(data, path, [1, 2, 3], 0, {})
