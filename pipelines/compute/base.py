"""What computes a shard, wherever it runs: a small job that can be sent, and the worker made from it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from spray.bulk.batch_size import find_batch_size
from spray.bulk.explainer import Explainer
from spray.bulk.keeping import Keeping
from spray.bulk.memory import keeping_memory
from spray.bulk.reading import read_ahead
from spray.bulk.writing import Writer, WritingThread, Written
from spray.errors import UserError
from spray.storage import read_json, write_json
from spray.store.layout import ArraySpec, Layout
from spray.store.shard_writing import shard_writer
from spray.store.shards import DamagedShardError, Shard, read_shard

if TYPE_CHECKING:
    from spray.pipelines.config import SprayConfig
    from spray.pipelines.context import Context

FOLDER = "shards"
"""In the run directory: a folder for each key, which holds the shards that were computed with it."""

KNOWN = f"{FOLDER}/.known"
"""In the run directory: what workers have to know of the dataset's files, so that not each checks them all again."""

MOST_TOLD = 20
"""Samples that could not be explained, named in the log of each process; all are in `quarantined.csv` in the end."""

MOST_LOST = 0.01
"""Share of the relevance that may get lost in a smaller dtype without a warning."""

SHARD_BYTES, MOST_SAMPLES, FEWEST_SAMPLES = 64e6, 512, 16
"""A shard has about so many bytes, but at most and at least so many samples: what a kill can cost."""


@dataclass(frozen=True)
class Job:
    """All that a worker on another machine has to know.

    Attributes
    ----------
    config : dict
        The plain, resolved configuration.
    run_dir : str
        On a file system that all workers see.
    key : str
        Of everything that decides the heatmaps; it goes into every shard.
    fingerprint : str
        Of the training images: a worker that sees others refuses.
    weights : str
        SHA-256 of `model.pt`: likewise.
    shard_size : int
        Samples in a shard.
    """

    config: dict[str, Any]
    run_dir: str
    key: str
    fingerprint: str
    weights: str
    shard_size: int

    @property
    def folder(self) -> Path:
        """Where the shards go."""
        return Path(self.run_dir) / FOLDER / self.key[:16]


@dataclass(frozen=True)
class ShardResult:
    """A shard that is on disk."""

    number: int
    size: int
    seconds: float
    quarantined: int
    empty: int


def make_job(context: Context, key: str, weights: str, shard_size: int) -> Job:
    """Return the job of a run."""
    config = asdict(context.config)
    config["device"] = str(context.device) if context.config.compute.name == "serial" else config["device"]
    return Job(config, str(context.run_dir.absolute()), key, context.train.fingerprint, weights, shard_size)


def make_worker(job: Job, threads: int | None = None) -> ShardWorker:
    """Build data and model in a process of their own, which computes with so many threads.

    Raises
    ------
    UserError
        If this machine sees other images or weights than the one that made the job.
    """
    from spray.data import cache
    from spray.data.parallel import set_threads
    from spray.pipelines.config import typed_config
    from spray.pipelines.context import Context
    from spray.storage import sha256

    if threads is not None:
        torch.set_num_threads(threads)
        # Else each worker of a machine would decode with as many threads as that has cores.
        set_threads(threads)
    cache.look_in(Path(job.run_dir) / KNOWN)
    config = typed_config(job.config)
    context = Context(config, Path(job.run_dir), logging.getLogger("spray.worker"))
    if context.train.fingerprint != job.fingerprint:
        raise UserError(
            f"a worker sees other training images than the run started with (dataset.train={config.dataset.train}); "
            "they must be the same files on every machine, and not change meanwhile"
        )
    if sha256(context.run_dir / "model.pt") != job.weights:
        raise UserError(f"a worker sees another {context.run_dir / 'model.pt'} than the run started with")
    return ShardWorker(context, job)


class ShardWorker:
    """Computes shards and writes them.

    Parameters
    ----------
    context : Context
        Model and data.
    job : Job
        What is wanted.
    """

    def __init__(self, context: Context, job: Job) -> None:
        self.context, self.job = context, job
        options, n = context.config.attribution, len(context.train)
        self.keeping = keeping_of(context.config)
        self.layout = layout_of(context, job.shard_size)
        rows = {name: spec for name, spec in self.layout.arrays.items() if name not in ("label", "valid")}
        self.explainer = Explainer(
            self._attribute,
            context.train,
            self.keeping,
            {name: (spec.shape, spec.dtype) for name, spec in rows.items()},
            context.device,
            int(options.max_bad * n),
        )
        self._told, self._told_loss = 0, False

    def run_all(
        self, shards: Sequence[Shard], on_rows: Callable[[int], None] = lambda n: None
    ) -> Iterator[ShardResult]:
        """Compute shards one after the other; each is told when it is on disk, while the next is in work."""
        missing = []
        for shard in shards:
            there = self._found(shard)
            if there is None:
                missing.append(shard)
            else:
                on_rows(shard.size)
                yield there
        if not missing:
            return
        compute, size = self.context.config.compute, self.batch_size
        parts = ((s, np.arange(at, min(at + size, s.stop))) for s in missing for at in range(s.start, s.stop, size))
        pin = self.context.device.type == "cuda"
        start = time.monotonic()
        labels = np.asarray(self.context.train.labels, np.int64)
        with keeping_memory(), WritingThread(self._open, labels) as writing:
            for read in read_ahead(self.context.train, parts, depth=compute.prefetch, pin=pin):
                rows = self.explainer.rows(read.indices, read.pixels)
                self._tell(rows.quarantined)
                writing.put(read.tag, rows)
                on_rows(len(read.indices))
                for written in writing.finished():
                    yield self._result(written, start)
                    start = time.monotonic()
        for written in writing.finished():
            yield self._result(written, start)

    def probe(self, start: int, stop: int) -> None:
        """Explain samples and keep nothing, to see whether the process outlives it."""
        for at in range(start, stop, self.batch_size):
            indices = np.arange(at, min(at + self.batch_size, stop))
            self._attribute(self.context.train.batch(indices), indices)

    def _tell(self, quarantined: Mapping[int, str]) -> None:
        """Log why samples could not be explained, of many those that come first, and once what their dtype loses."""
        if not self._told_loss and self.explainer.lost is not None:
            self._told_loss = True
            if self.explainer.lost > MOST_LOST:
                self.context.log.warning(
                    "%s holds only %.0f %% of the relevance, the rest is too small for it; for smaller files take "
                    "attribution.channels=sum or attribution.pool=K with float32",
                    self.keeping.stored,
                    100 * (1 - self.explainer.lost),
                )
        for index, reason in quarantined.items():
            self._told += 1
            if self._told <= MOST_TOLD:
                self.context.log.warning(
                    "passed over sample %d (%s): %s", index, self.context.train.names[index], reason
                )

    @cached_property
    def batch_size(self) -> int:
        """Samples explained at once, by configuration or measured; a measurement stands for all of a run."""
        wanted = self.context.config.attribution.batch_size
        return self._measured() if wanted == "auto" else int(wanted)

    def _measured(self) -> int:
        device = self.context.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        path = self.job.folder / f"batch_size-{''.join(c if c.isalnum() else '_' for c in name)}.json"
        if path.is_file():
            return int(read_json(path)["batch_size"])
        n = len(self.context.train)

        def attempt(size: int) -> None:
            indices = np.arange(size) % n
            relevance, logits = self._attribute(self.context.train.batch(indices), indices)
            relevance[""].cpu(), logits.cpu()

        size = find_batch_size(attempt, min(self.job.shard_size, n), device=device)
        self.context.log.info("batches of %d on %s", size, name)
        write_json(path, {"batch_size": size, "device": name})
        return int(read_json(path)["batch_size"])  # another worker may have been faster

    def _attribute(self, pixels: Tensor, indices: np.ndarray) -> tuple[Mapping[str, Tensor], Tensor]:
        context = self.context
        images = context.normalizer(pixels, context.device)
        # What a method draws must not depend on which samples this process explained before.
        seed(context.config.seed + int(indices[0]), context.device)
        return context.attribute(context.model, images, np.asarray(context.train.labels)[indices])

    def _open(self, shard: Shard) -> AbstractContextManager[Writer]:
        facts = {"batch_size": str(self.batch_size), "device": str(self.context.device)}
        return shard_writer(self.job.folder / shard.name, shard, self.job.key, self.layout, facts)

    def _found(self, shard: Shard) -> ShardResult | None:
        path = self.job.folder / shard.name
        if not path.exists():
            return None
        try:
            facts = read_shard(path, shard, self.job.key, self.layout)
        except DamagedShardError as error:
            self.context.log.warning("%s; it is computed again", error)
            return None
        return ShardResult(shard.number, shard.size, 0.0, len(facts.quarantined), int(facts.facts["empty"]))

    def _result(self, written: Written, start: float) -> ShardResult:
        seconds = time.monotonic() - start
        return ShardResult(written.shard.number, written.shard.size, seconds, written.quarantined, written.empty)


def seed(number: int, device: torch.device) -> None:
    """Seed what is drawn on a device, as `torch.manual_seed` does."""
    if device.type == "cpu":
        # That would also note a trace of the stack for each kind of device that isn't in use: with small images,
        # whose batches take some 20 ms, that was 1 % of the time.
        torch.default_generator.manual_seed(number)
    else:
        torch.manual_seed(number)


def keeping_of(config: SprayConfig) -> Keeping:
    """Return what is kept of each heatmap."""
    options = config.attribution
    return Keeping(options.channels, options.pool, options.dtype)


def layout_of(context: Context, shard_size: int, model: nn.Module | None = None) -> Layout:
    """Return the arrays that are stored; the sizes of inner layers come from explaining two samples."""
    train, keeping = context.train, keeping_of(context.config)
    arrays = {
        "attribution": ArraySpec(keeping.shape(train.image_shape), keeping.stored),
        "prediction": ArraySpec((len(train.classes),), "float32"),
        "label": ArraySpec((), "int64"),
        "valid": ArraySpec((), "bool"),
    }
    if stored_layers(context.config):
        for name, channels in context.layer_sizes(model or context.model).items():
            arrays[f"layer/{name}"] = ArraySpec((channels,), keeping.stored)
    return Layout(arrays, len(train), shard_size, context.config.compute.compression)


def stored_layers(config: SprayConfig) -> list[str]:
    """Return the inner layers whose relevance is stored beside that of the input."""
    options = config.attribution
    if options.method != "lrp" or not options.layer:
        return []
    return [options.layer] if isinstance(options.layer, str) else list(options.layer)


def choose_shard_size(context: Context, model: nn.Module | None = None) -> int:
    """Return the samples in a shard: as configured, or a power of two of about 64 MB, whatever the machine."""
    if context.config.compute.shard_size is not None:
        return context.config.compute.shard_size
    size = MOST_SAMPLES
    bytes_per_row = layout_of(context, size, model).bytes_per_row
    while size > FEWEST_SAMPLES and size * bytes_per_row > SHARD_BYTES:
        size //= 2
    return size
