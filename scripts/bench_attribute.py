"""What explaining a whole dataset costs beside the bare work: throughput, memory, bytes, time lost to a kill.

    python scripts/bench_attribute.py throughput      # the stage against a bare loop over the same batches in memory
    python scripts/bench_attribute.py memory          # peak memory for 1,000, 10,000 and 100,000 samples
    python scripts/bench_attribute.py bytes           # bytes of a heatmap on disk
    python scripts/bench_attribute.py resume          # time that a kill costs
    python scripts/bench_attribute.py dask            # two workers against one process on the same cores

Each prints a Markdown table. Models have random weights: time doesn't depend on them.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MODELS = ("small_cnn", "resnet18", "vgg16_bn", "resnet50")


def make_context(run_dir: Path, model: str, n: int, side: int, **changes: Any) -> Any:
    """Return the context of a run on `n` random images, with `model.pt` as its train stage would leave it."""
    from spray.data.arrays import ArrayDataset
    from spray.pipelines.config import SprayConfig
    from spray.pipelines.context import Context
    from spray.pipelines.weights import save_weights

    config = SprayConfig()
    config.device = changes.pop("device", "auto")
    config.model.name = model
    config.dataset.mean, config.dataset.std = [0.5] * 3, [0.25] * 3
    for key, value in changes.items():
        section, name = key.split("__")
        setattr(getattr(config, section), name, value)
    # The same thousand images again and again: what they show doesn't matter, and memory is to be the stage's own.
    pixels = np.random.default_rng(0).integers(0, 256, (min(n, 1000), 3, side, side), np.uint8)
    dataset = Repeated(ArrayDataset(pixels, np.arange(len(pixels)) % 10, [f"c{k}" for k in range(10)]), n)
    log = logging.getLogger("bench")
    context = Context(config, run_dir, log)
    context.__dict__["_datasets"] = (dataset, dataset)
    run_dir.mkdir(parents=True, exist_ok=True)
    if not (run_dir / "model.pt").exists():
        save_weights(run_dir / "model.pt", context.build_model())
    context.key = "bench"
    return context


class Repeated:
    """A few images, again and again up to `n`."""

    def __init__(self, dataset: Any, n: int) -> None:
        self.dataset, self.fingerprint = dataset, f"{dataset.fingerprint}-{n}"
        self.classes, self.image_shape, self.unreadable = dataset.classes, dataset.image_shape, ()
        self.labels = np.resize(dataset.labels, n)
        self.names = range(n)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray) -> Any:
        """Return the images at `indices`."""
        return self.dataset.batch(np.asarray(indices) % len(self.dataset))


def throughput(arguments: argparse.Namespace) -> None:
    """Compare the stage with `explain` in a loop over batches that lie ready in memory, in turns."""
    from spray.bulk.memory import keeping_memory

    print(f"{arguments.side}² pixels, batches of {arguments.batch}, {arguments.n} samples; medians of heatmaps/s\n")
    print("| model | bare loop | stage | stage / bare (least–most) | stage / bare that keeps its memory |")
    print("|---|---|---|---|---|")
    for model in arguments.models:
        bare, keeping, stage = [], [], []
        for _ in range(arguments.repeats):
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                options = {"attribution__batch_size": arguments.batch, "compute__compression": arguments.compression}
                context = make_context(Path(folder), model, arguments.n, arguments.side, **options)
                bare.append(arguments.n / bare_seconds_alone(arguments, model))
                with keeping_memory():
                    keeping.append(arguments.n / bare_seconds(context))
                stage.append(arguments.n / stage_seconds(context))
        cells = [f"{statistics.median(bare):.1f}", f"{statistics.median(stage):.1f}"]
        for loop in (bare, keeping):
            ratios = [s / b for s, b in zip(stage, loop, strict=True)]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})")
        print(f"| {model} | {' | '.join(cells)} |")


def bare_seconds_alone(arguments: argparse.Namespace, model: str) -> float:
    """Return the seconds of the bare loop in a process of its own: the stage changes how memory is kept in its."""
    numbers = [f"--{name}={getattr(arguments, name)}" for name in ("n", "batch", "side")]
    command = [sys.executable, __file__, "bare-of", "--models", model, *numbers]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def bare_of(arguments: argparse.Namespace) -> None:
    """Print the seconds of the bare loop."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        options = {"attribution__batch_size": arguments.batch}
        context = make_context(Path(folder), arguments.models[0], arguments.n, arguments.side, **options)
        print(bare_seconds(context))


def bare_seconds(context: Any) -> float:
    """Return the seconds that the explanations alone take, of normalised batches in memory; nothing is kept."""
    import torch

    from spray import explain

    options, train = context.config.attribution, context.train
    parts = [np.arange(at, min(at + options.batch_size, len(train))) for at in range(0, len(train), options.batch_size)]
    # Few enough to lie in memory together.
    ready = [context.normalizer(train.batch(part), context.device) for part in parts[:16]]
    targets = [torch.from_numpy(train.labels[part]).to(context.device) for part in parts[:16]]
    model = context.model
    explain(model, ready[0], targets[0], composite=options.composite)
    start = time.perf_counter()
    for number, part in enumerate(parts):
        x, target = ready[number % len(ready)][: len(part)], targets[number % len(ready)][: len(part)]
        explain(model, x, target, composite=options.composite).cpu()
    return time.perf_counter() - start


def stage_seconds(context: Any) -> float:
    """Return the seconds of the whole attribute stage: to the verified file, with a model that is warm."""
    from spray.pipelines.attribute import run, tidy

    start = time.perf_counter()
    run(context)
    seconds = time.perf_counter() - start
    tidy(context)
    (context.run_dir / "attributions.h5").unlink()
    return seconds


def memory(arguments: argparse.Namespace) -> None:
    """Run the stage on more and more samples, each time in a process of its own."""
    folder = ["--folder", str(arguments.folder)] if arguments.folder else []
    print("| samples | peak memory | above the model alone | heatmaps/s |\n|---|---|---|---|")
    for n in arguments.sizes:
        said = subprocess.run(
            [sys.executable, __file__, "memory-of", str(n), *folder],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        before, after, seconds = map(float, said)
        print(f"| {n:,} | {after / 1e6:.0f} MB | {(after - before) / 1e6:.0f} MB | {n / seconds:.0f} |")


def memory_of(arguments: argparse.Namespace) -> None:
    """Print peak memory before and after the stage, and its seconds."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        context = make_context(Path(folder), "small_cnn", arguments.n, 32, attribution__batch_size=64)
        bare_seconds(make_context(Path(folder), "small_cnn", 128, 32, attribution__batch_size=64))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        seconds = stage_seconds(context)
        print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, seconds)


def sizes(arguments: argparse.Namespace) -> None:
    """Print the bytes of a heatmap, with all that stands beside it, for what may be kept."""
    from spray.pipelines.attribute import run

    keep: list[tuple[str, dict[str, Any]]] = [
        ("float32", {}),
        ("float16", {"attribution__dtype": "float16"}),
        ("float32, sum of channels", {"attribution__channels": "sum"}),
        ("float16, sum of channels", {"attribution__channels": "sum", "attribution__dtype": "float16"}),
        ("float32, sum, 16 × 16", {"attribution__channels": "sum", "attribution__pool": 16}),
    ]
    print(f"{arguments.side}² pixels, ResNet-18\n\n| kept | none | gzip |\n|---|---|---|")
    for name, options in keep:
        cells = []
        for compression in ("none", "gzip"):
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                changes = {"attribution__batch_size": 8, "compute__compression": compression} | options
                context = make_context(Path(folder), "resnet18", 32, arguments.side, **changes)
                run(context)
                cells.append((Path(folder) / "attributions.h5").stat().st_size / 32)
        print(f"| {name} | {' | '.join(f'{cell / 1000:.1f} kB' for cell in cells)} |")


COMMAND = [sys.executable, "-m", "spray.pipelines.cli", "experiment=photos_tag", "device=cpu", "model.epochs=1"]


def spray(run_dir: Path, *options: str, popen: Callable[..., Any] = subprocess.run) -> Any:
    """Start the command quietly."""
    return popen([*COMMAND, f"run_dir={run_dir}", *options], stdout=subprocess.DEVNULL)


def resume(arguments: argparse.Namespace) -> None:
    """Kill a run in the middle of its attribute stage, start it again; compare with one that wasn't killed."""
    import json

    work = ["attribution.batch_size=16", f"compute.shard_size={arguments.shard_size}", "stages=[train,attribute]"]
    lost, starts = [], []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        spray(whole, *work)
        in_one = stage_time(whole)
        for number in range(arguments.repeats):
            run_dir = Path(f"{killed}{number}")
            spray(run_dir, *work, "stages=[train]")
            process = spray(run_dir, *work, popen=subprocess.Popen)
            while True:
                time.sleep(0.01)
                entry = json.loads((run_dir / "run.json").read_text())["stages"].get("attribute", {})
                if entry.get("status") == "running":
                    break
            began = time.perf_counter()
            time.sleep(in_one * (number + 0.5) / arguments.repeats)
            process.send_signal(signal.SIGKILL)
            process.wait()
            before = time.perf_counter() - began
            began = time.perf_counter()
            spray(run_dir, *work)
            starts.append(time.perf_counter() - began - stage_time(run_dir))
            lost.append(before + stage_time(run_dir) - in_one)
    print(f"the stage in one go: {in_one:.2f} s, shards of {arguments.shard_size} samples")
    print(f"lost by a kill: median {statistics.median(lost):.2f} s ({min(lost):.2f} to {max(lost):.2f})")
    print(f"and to start again (imports, data, checks): {statistics.median(starts):.1f} s")


def stage_time(run_dir: Path) -> float:
    """Return the seconds of the attribute stage, as recorded."""
    import json

    return float(json.loads((run_dir / "run.json").read_text())["stages"]["attribute"]["seconds"])


def dask(arguments: argparse.Namespace) -> None:
    """Compare two Dask workers of one thread with one process of two threads, and of one."""
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        common = [
            "stages=[train,attribute]",
            f"attribution.batch_size={arguments.batch}",
            f"model.name={arguments.model}",
        ]
        kinds = {
            "serial, 2 threads": ["compute=serial", "compute.threads=2"],
            "serial, 1 thread": ["compute=serial", "compute.threads=1"],
            "dask_local, 2 workers": ["compute=dask_local", "compute.n_workers=2", "compute.threads=1"],
        }
        for number, (name, options) in enumerate(kinds.items()):
            run_dir = Path(folder) / str(number)
            spray(run_dir, *common, *options)
            rows.append((name, stage_time(run_dir)))
    print("| compute | seconds | heatmaps/s |\n|---|---|---|")
    for name, seconds in rows:
        print(f"| {name} | {seconds:.1f} | {3600 / seconds:.0f} |")


def main() -> None:
    """Read the command line and run what it names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    each = {}
    for name, function in {
        "throughput": throughput,
        "bare-of": bare_of,
        "memory": memory,
        "memory-of": memory_of,
        "bytes": sizes,
        "resume": resume,
        "dask": dask,
    }.items():
        each[name] = commands.add_parser(name, help=function.__doc__)
        each[name].add_argument("--folder", type=Path, help="where the files go (default: a temporary folder)")
        each[name].set_defaults(run=function)
    for name in ("throughput", "bare-of"):
        each[name].add_argument("--models", nargs="+", default=["small_cnn", "resnet18"], choices=MODELS)
        each[name].add_argument("--n", type=int, default=512)
        each[name].add_argument("--batch", type=int, default=16)
        each[name].add_argument("--side", type=int, default=64)
    each["throughput"].add_argument("--compression", default="none")
    each["throughput"].add_argument("--repeats", type=int, default=3)
    each["memory"].add_argument("--sizes", type=int, nargs="+", default=[1000, 10000, 100000])
    each["memory-of"].add_argument("n", type=int)
    each["bytes"].add_argument("--side", type=int, default=224)
    each["resume"].add_argument("--shard-size", type=int, default=256)
    each["resume"].add_argument("--repeats", type=int, default=5)
    each["dask"].add_argument("--model", default="small_cnn")
    each["dask"].add_argument("--batch", type=int, default=16)
    arguments = parser.parse_args()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    arguments.run(arguments)


if __name__ == "__main__":
    main()
