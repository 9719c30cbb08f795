"""compute=dask_cuda without a GPU: what is refused, and that the call of dask-cuda is what it takes.

The stand-in for `dask_cuda.LocalCUDACluster` has the signature of the real one (26.10) as far as it is used, and
gives each worker the CUDA_VISIBLE_DEVICES that the real one does: all GPUs, its own first.
"""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType
from typing import Any

import faulty
import pytest
import torch
from distributed import LocalCluster

from spray.errors import UserError
from spray.pipelines.compute import dask_cuda
from spray.pipelines.compute.dask_cuda import device_count
from spray.pipelines.compute.dask_worker import _own_device

calls: list[dict[str, Any]] = []


class LocalCUDACluster(LocalCluster):
    def __init__(
        self,
        CUDA_VISIBLE_DEVICES: Any = None,
        n_workers: int | None = None,
        threads_per_worker: int = 1,
        memory_limit: Any = "auto",
        device_memory_limit: Any = "default",
        **kwargs: Any,
    ) -> None:
        calls.append({"n_workers": n_workers, "threads": threads_per_worker, "gpu": device_memory_limit, **kwargs})
        super().__init__(n_workers=0, threads_per_worker=threads_per_worker, memory_limit=memory_limit, **kwargs)
        for number in range(n_workers or torch.cuda.device_count()):
            gpus = [*range(number, torch.cuda.device_count()), *range(number)]
            options = self.new_spec["options"] | {"env": {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}}
            self.worker_spec[number] = {"cls": self.new_spec["cls"], "options": options}
        self.sync(self._correct_state)


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs and dask-cuda, as far as the command can see."""
    module = ModuleType("dask_cuda")
    module.__spec__ = importlib.machinery.ModuleSpec("dask_cuda", None)
    module.LocalCUDACluster = LocalCUDACluster  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dask_cuda", module)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    calls.clear()


def context(tmp_path, device: str = "auto", **options: Any) -> Any:
    made = faulty.a_context(tmp_path, **options)
    made.config.device = device
    return made


def test_plan_counts_gpus(gpus, tmp_path):
    assert device_count(context(tmp_path)) == 2
    assert device_count(context(tmp_path, n_workers=1)) == 1


def test_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="finds no GPU; use compute=dask_local"):
        dask_cuda.check(context(tmp_path))


def test_no_dask_cuda(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    if importlib.util.find_spec("dask_cuda") is None:
        with pytest.raises(UserError, match=r"pip install 'spray-xai\[cuda\]'"):
            dask_cuda.check(context(tmp_path))


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_other_devices(gpus, tmp_path, device):
    with pytest.raises(UserError, match=f"device={device} does not go with compute=dask_cuda"):
        dask_cuda.check(context(tmp_path, device))


def test_more_workers_than_gpus(gpus, tmp_path):
    with pytest.raises(UserError, match=r"compute.n_workers=3 is more than the 2 GPUs"):
        dask_cuda.check(context(tmp_path, n_workers=3))
    dask_cuda.check(context(tmp_path, n_workers=2))


def test_a_mistake_is_found_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    job, shards = faulty.a_job(tmp_path)
    with pytest.raises(UserError, match="finds no GPU"):
        dask_cuda.run(context(tmp_path), job, shards, lambda result: None, faulty.make)


@pytest.mark.slow
def test_one_worker_for_each_gpu_that_computes_on_its_own(gpus, tmp_path):
    job, shards = faulty.a_job(tmp_path, device="auto", seconds=0.1)
    done: list[int] = []
    dask_cuda.run(context(tmp_path), job, shards, lambda result: done.append(result.number), faulty.make)
    assert sorted(done) == list(range(len(shards)))
    assert faulty.files(job) == faulty.expected(job, shards)
    (call,) = calls
    assert (call["n_workers"], call["threads"], call["gpu"]) == (2, 1, 0)
    devices = sorted(note.rsplit("-", 1)[0] for note in faulty.notes(job, "device"))
    assert devices == ["device-cuda:0-0+1", "device-cuda:0-1+0"]


@pytest.mark.parametrize(
    ("configured", "name", "count", "device"),
    [
        ("auto", "0", 4, "cuda:0"),
        ("auto", "3", 4, "cuda:3"),
        ("cuda", "SLURMCluster-7-1", 2, "cuda:1"),
        ("auto", "5", 4, "cuda:1"),
        ("auto", "0", 1, None),
        ("auto", "0", 0, None),
        ("cpu", "1", 4, None),
        ("cuda:2", "1", 4, None),
        ("auto", "a worker", 4, None),
    ],
)
def test_where_workers_see_several_gpus_each_takes_its_own(monkeypatch, configured, name, count, device):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert _own_device(configured, name) == device
