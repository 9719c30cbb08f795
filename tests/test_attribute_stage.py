"""The stage that explains every sample: what it stores, how it goes on, what it does about samples that fail."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import small
import torch

from spray import explain
from spray.data.base import Normalizer
from spray.data.folder import FolderDataset
from spray.models.factory import call_factory
from spray.pipelines.compute.base import seed
from spray.pipelines.compute.serial import threads
from spray.pipelines.context import Context

SIZES = {"coffee": 20, "stone": 21}
ARGUMENTS = ["experiment=image_folder", f"dataset.image_size={small.SIDE}", "device=cpu", "model.epochs=1"]
ARGUMENTS += ["stages=[train,attribute]", "attribution.batch_size=4", "compute.shard_size=8"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with images and a trained model; the command's options."""
    folder = tmp_path_factory.mktemp("project")
    options = [*ARGUMENTS, *small.write_images(folder, SIZES, {"coffee": 8, "stone": 8})]
    options.append(f"model.factory={small.write_model(folder)}:build")
    assert small.run(*options, f"run_dir={folder / 'first'}").code == 0
    return folder, [*options, f"model.checkpoint={folder / 'first/model.pt'}"]


def started(project: tuple[Path, list[str]], name: str, *options: str) -> small.Outcome:
    folder, common = project
    return small.run(*common, f"run_dir={folder / name}", *options)


def the_model(project: tuple[Path, list[str]], x_of: range) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """The run's model, and some of its images and labels, made without the pipeline."""
    folder, _ = project
    model = call_factory(f"{folder / 'my_model.py'}:build", 2).eval()
    model.load_state_dict(torch.load(folder / "first/model.pt", weights_only=True))
    data = FolderDataset(folder / "train", small.SIDE)
    x = Normalizer([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])(data.batch(np.array(x_of)))
    return model, x, torch.from_numpy(data.labels[list(x_of)])


def test_every_array_is_what_explain_gives(project: tuple[Path, list[str]]) -> None:
    said = started(project, "layers", "attribution.layer=['0','3']", "attribution.dtype=float32")
    assert said.code == 0, said.err
    model, x, labels = the_model(project, range(8, 12))  # the second shard's first batch
    R = explain(model, x, labels, layer=["", "0", "3"])
    with h5py.File(project[0] / "layers/attributions.h5") as file:
        np.testing.assert_array_equal(file["attribution"][8:12], R[""].numpy())
        np.testing.assert_allclose(file["layer/0"][8:12], R["0"].sum((2, 3)).numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(file["layer/3"][8:12], R["3"].sum((2, 3)).numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(file["prediction"][8:12], model(x).detach().numpy(), rtol=1e-5, atol=1e-5)
        assert file["label"][:].tolist() == [0] * 20 + [1] * 21
        assert file["valid"][:].all()
        assert file["attribution"].fletcher32
    assert not (project[0] / "layers/shards").exists()
    assert (project[0] / "layers/quarantined.csv").read_text() == "sample_index,name,reason\n"


def test_less_may_be_kept(project: tuple[Path, list[str]]) -> None:
    options = ["attribution.channels=sum", "attribution.pool=6", "attribution.dtype=float16"]
    assert started(project, "less", *options).code == 0
    model, x, labels = the_model(project, range(4))
    R = explain(model, x, labels).sum(1, keepdim=True)
    pooled = R.unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2))
    with h5py.File(project[0] / "less/attributions.h5") as file:
        assert file["attribution"].shape == (41, 1, 6, 6)
        assert file["attribution"].dtype == np.float16
        np.testing.assert_allclose(file["attribution"][:4], pooled.numpy(), rtol=2e-3, atol=1e-5)


def test_bfloat16_is_computed_in_it(project: tuple[Path, list[str]]) -> None:
    assert started(project, "bf16", "attribution.dtype=bfloat16").code == 0
    model, x, labels = the_model(project, range(4))
    R = explain(model, x, labels, relevance_dtype="bfloat16")
    with h5py.File(project[0] / "bf16/attributions.h5") as file:
        np.testing.assert_array_equal(file["attribution"][:4], R.half().numpy())


@pytest.mark.parametrize("method", ["gradient", "smooth_grad", "grad_cam"])
def test_other_methods_are_stored_alike(project: tuple[Path, list[str]], method: str) -> None:
    options = [f"attribution.method={method}", "attribution.target=prediction"]
    assert started(project, method, *options).code == 0
    model, x, _ = the_model(project, range(4))
    with h5py.File(project[0] / method / "attributions.h5") as file:
        np.testing.assert_array_equal(file["attribution"][:4], explain(model, x, None, method).numpy())


def test_how_the_work_was_cut_leaves_no_trace(project: tuple[Path, list[str]]) -> None:
    """Shards of another size, other reading ahead: the same numbers; the same settings: the same bytes."""
    for name, options in {
        "a": [],
        "b": ["compute.prefetch=1", "compute.threads=1"],
        "c": ["compute.shard_size=16"],
    }.items():
        assert started(project, name, *options).code == 0
    one, two = ((project[0] / name / "attributions.h5").read_bytes() for name in "ab")
    assert one == two
    with h5py.File(project[0] / "a/attributions.h5") as a, h5py.File(project[0] / "c/attributions.h5") as c:
        for name in ("attribution", "prediction", "label", "valid"):
            np.testing.assert_array_equal(a[name][:], c[name][:])


def test_the_batch_size_may_be_found(project: tuple[Path, list[str]]) -> None:
    said = started(project, "auto", "attribution.batch_size=auto")
    assert said.code == 0, said.err
    facts = json.loads((project[0] / "auto/run.json").read_text())["stages"]["attribute"]["facts"]
    assert int(facts["batch_size"][0]) in (1, 2, 4, 8)
    assert f"batches of {facts['batch_size'][0]} on cpu" in said.out


def test_samples_that_cannot_be_read_are_passed_over_and_named(project: tuple[Path, list[str]], tmp_path: Path) -> None:
    options = small.write_images(tmp_path, SIZES, {"coffee": 8, "stone": 8})
    for name in ("coffee/003.png", "stone/020.png"):
        path = tmp_path / "train" / name
        path.write_bytes(path.read_bytes()[:300])
    common = [option for option in project[1] if not option.startswith("dataset.train=")]
    said = small.run(
        *common, *options, f"run_dir={tmp_path / 'run'}", "dataset.check=false", "attribution.max_bad=0.05"
    )
    assert said.code == 0, said.err
    rows = list(csv.DictReader((tmp_path / "run/quarantined.csv").open()))
    assert [(row["sample_index"], row["name"]) for row in rows] == [("3", "coffee/003.png"), ("40", "stone/020.png")]
    assert all("truncated" in row["reason"] for row in rows)
    for index, name in ((3, "coffee/003.png"), (40, "stone/020.png")):
        assert f"passed over sample {index} ({name}):" in said.out
    good = np.setdiff1d(np.arange(41), [3, 40])
    with (
        h5py.File(tmp_path / "run/attributions.h5") as file,
        h5py.File(project[0] / "first/attributions.h5") as whole,
    ):
        assert np.flatnonzero(~file["valid"][:]).tolist() == [3, 40]
        assert not file["attribution"][[3, 40]].any()
        np.testing.assert_allclose(file["attribution"][:][good], whole["attribution"][:][good], rtol=1e-4, atol=1e-6)
    stopped = small.run(
        *common, *options, f"run_dir={tmp_path / 'other'}", "dataset.check=false", "attribution.max_bad=0.04"
    )
    assert stopped.code == 2
    assert "2 of" in stopped.err
    assert "attribution.max_bad" in stopped.err
    assert not (tmp_path / "other/attributions.h5").exists()


def test_a_worker_can_probe_samples_and_keeps_nothing(
    project: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As scheduling does to find the sample that ends its process."""
    import spray.pipelines.attribute as stage
    from spray.pipelines.compute.base import Job, ShardWorker

    probed: list[int] = []

    def compute(context: Context, job: Job, shards: object, on_done: object) -> None:
        worker = ShardWorker(context, job)
        original = context.attribute
        labels = np.asarray(context.train.labels)

        def attribute(model: torch.nn.Module, images: torch.Tensor, of: np.ndarray) -> object:
            probed.extend(of.tolist())
            return original(model, images, of)

        monkeypatch.setattr(context, "attribute", attribute)
        worker.probe(17, 26)
        assert probed == labels[17:26].tolist()
        assert not list(job.folder.glob("*.h5"))
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "backend", lambda name: compute)
    assert started(project, "probed").code == 130
    assert len(probed) == 9


def test_a_worker_decodes_with_its_threads_and_checks_no_file_again(
    project: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the user's cache can't be written, as on nodes that share only the run directory."""
    import spray.pipelines.attribute as stage
    from spray.data import cache, checking, parallel
    from spray.pipelines.compute.base import Job, make_worker

    checked: list[int] = []
    unread = checking.Check.unknown
    monkeypatch.setattr(checking.Check, "unknown", lambda n: checked.append(n) or unread(n))
    monkeypatch.setattr(cache, "_beside", [])
    monkeypatch.setenv("SPRAY_CACHE", "/dev/null/none")

    def compute(context: Context, job: Job, shards: object, on_done: object) -> None:
        assert len(checked) == 2  # training and test images, by the command itself
        before = torch.get_num_threads()
        try:
            worker = make_worker(job, 1)
            assert parallel._pool()._max_workers == 1
            assert worker.context.train.fingerprint == context.train.fingerprint
        finally:
            torch.set_num_threads(before)
            parallel.set_threads(None)
        assert len(checked) == 2
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "backend", lambda name: compute)
    assert started(project, "worker", "compute=dask_local").code == 130


def test_a_damaged_shard_is_computed_again(project: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    import spray.pipelines.attribute as stage

    ready, broken = stage.AssemblingAhead.ready, []

    def damage(self: object, number: int) -> None:
        if number == 2 and not broken:
            broken.extend((project[0] / "damaged/shards").glob("*/000002.h5"))
            data = bytearray(broken[0].read_bytes())
            data[len(data) // 2] ^= 1
            broken[0].write_bytes(data)
        ready(self, number)  # type: ignore[arg-type]

    monkeypatch.setattr(stage.AssemblingAhead, "ready", damage)
    said = started(project, "damaged")
    assert said.code == 0, said.err
    assert "000002.h5" in said.out
    assert "it is computed again" in said.out
    monkeypatch.undo()
    assert started(project, "undamaged").code == 0
    one, two = ((project[0] / name / "attributions.h5").read_bytes() for name in ("damaged", "undamaged"))
    assert one == two


def test_a_run_of_other_settings_does_not_lose_the_shards(
    project: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import spray.pipelines.attribute as stage

    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stage, "assemble", fail)
        assert started(project, "kept").code == 130
    shards = sorted((project[0] / "kept/shards").glob("*/*.h5"))
    assert len(shards) == 6
    with monkeypatch.context() as patched:
        patched.setattr(stage, "assemble", fail)
        other = started(project, "kept", "attribution=epsilon")
        assert "6 shards of other settings are kept" in other.out
    assert all(path.exists() for path in shards)
    said = started(project, "kept", "compute.shard_size=16")  # back again: the cut of those shards stands
    assert said.code == 0, said.err
    assert "6 of 6 shards are there already" in said.out
    assert not (project[0] / "kept/shards").exists()
    assert started(project, "unbroken").code == 0
    one, two = ((project[0] / name / "attributions.h5").read_bytes() for name in ("kept", "unbroken"))
    assert one == two


def test_a_kill_between_the_last_step_and_its_record_costs_nothing(
    project: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import spray.pipelines.attribute as stage

    with monkeypatch.context() as patched:
        patched.setattr(stage, "write_json", lambda path, value: (_really(path, value), _stop(path)))
        assert started(project, "late").code == 130
    with monkeypatch.context() as patched:
        patched.setattr(stage, "assemble", None)
        patched.setattr(stage, "backend", None)
        assert started(project, "late").code == 0
    assert not (project[0] / "late/shards").exists()


def _really(path: Path, value: object) -> None:
    from spray.storage import write_json

    write_json(path, value)


def _stop(path: Path) -> None:
    if path.name == "assembled.json":
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("attribution.batch_size=0", "must be a number from 1, or auto"),
        ("attribution.batch_size=many", "must be a number from 1, or auto"),
        ("attribution.dtype=float8", "allowed: float32, float16, bfloat16"),
        ("attribution.channels=some", "allowed: all, sum"),
        ("attribution.pool=0", "at least 1"),
        ("attribution.layer=['0','0']", "different names"),
        ("attribution.layer=nowhere", "no layer 'nowhere'"),
        ("compute.compression=zip", "allowed: none, gzip"),
        ("compute.name=grid", "allowed: dask_cuda, dask_local, dask_slurm, serial"),
        ("compute.shard_size=0", "at least 1"),
    ],
)
def test_mistakes_are_told_before_anything_is_computed(
    project: tuple[Path, list[str]], option: str, message: str
) -> None:
    said = started(project, "mistake", option)
    assert said.code == 2
    assert message in said.err
    assert not (project[0] / "mistake/attributions.h5").exists()


def test_seeding_the_device_alone_is_torchs_own_seeding() -> None:
    drawn = []
    for how in (torch.manual_seed, lambda number: seed(number, torch.device("cpu"))):
        how(7)
        drawn.append(torch.rand(5).tolist() + torch.randn(5).tolist())
    assert drawn[0] == drawn[1]


def test_compute_threads_bounds_arithmetic_and_decoding() -> None:
    from spray.data import parallel

    before = torch.get_num_threads()
    with threads(1):
        assert (torch.get_num_threads(), parallel._pool()._max_workers) == (1, 1)
    assert torch.get_num_threads() == before
    assert parallel._pool()._max_workers >= 2
    with threads(None):
        assert torch.get_num_threads() == before
