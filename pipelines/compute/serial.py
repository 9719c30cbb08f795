"""One shard after the other, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from spray.data.parallel import set_threads
from spray.pipelines.compute.base import Job, ShardResult, ShardWorker
from spray.pipelines.context import Context
from spray.store.shards import Shard


def run(context: Context, job: Job, shards: Sequence[Shard], on_done: Callable[[ShardResult], None]) -> None:
    """Compute the shards here, with the context's own model and data."""
    worker = ShardWorker(context, job)
    total = sum(shard.size for shard in shards)
    with threads(context.config.compute.threads), context.counter(total, "heatmaps") as count:
        for result in worker.run_all(shards, count):
            on_done(result)


@contextmanager
def threads(n: int | None) -> Iterator[None]:
    """Let torch compute, and images be decoded, with so many threads while the block runs; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    set_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        set_threads(None)
