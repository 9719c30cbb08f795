"""Where shards are computed: in this process, by workers on this machine, or on a cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from spray.registry import Registry

if TYPE_CHECKING:
    from spray.pipelines.compute.base import Job, ShardResult
    from spray.pipelines.context import Context
    from spray.store.shards import Shard

Backend = Callable[["Context", "Job", "Sequence[Shard]", "Callable[[ShardResult], None]"], None]
"""Computes the shards; tells of each in the main thread as it is done; returns when all are."""

COMPUTES: Registry[str] = Registry("compute")
"""By `compute.name`: the module, imported only where it is asked for, whose `run` is a `Backend`."""

for _name in ("serial", "dask_local", "dask_cuda", "dask_slurm"):
    COMPUTES.register(_name)(f"spray.pipelines.compute.{_name}")


def backend(name: str) -> Backend:
    """Return the backend called `name`."""
    run: Backend = import_module(COMPUTES.get(name)).run
    return run
