"""The report of 10,000 samples: light, made in bearable time, and quick in the browser."""

from __future__ import annotations

import json
import time
from pathlib import Path

import browser
import h5py
import numpy as np
import pytest
import torch

from spray.data.base import ImageDataset
from spray.figures import to_png
from spray.report import render
from spray.report.gather import gather

pytestmark = pytest.mark.slow

N, CLASSES, CARRIERS = 10_000, 10, 180
LARGEST = 5_000_000


class Patches(ImageDataset):
    """Patches of photographs, or of noise, which compresses worst; names as long as those of many datasets."""

    def __init__(self, side: int, noise: bool) -> None:
        from skimage import data

        self.classes = tuple(f"class {c}" for c in range(CLASSES))
        self.labels = np.arange(N) // (N // CLASSES)
        self.names = [f"{self.classes[c]}/ILSVRC2012_{c:04d}_{i:08d}.JPEG" for i, c in enumerate(self.labels)]
        self.image_shape = (3, side, side)
        self.fingerprint = "f" * 64
        self.noise, self.side = noise, side
        self.photos = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket(), data.immunohistochemistry()]

    def batch(self, indices):
        return torch.stack([self._one(int(i)) for i in np.asarray(indices)])

    def _one(self, i: int) -> torch.Tensor:
        rng = np.random.default_rng(i)
        if self.noise:
            return torch.from_numpy(rng.random((3, self.side, self.side), dtype=np.float32))
        photo = self.photos[self.labels[i] % len(self.photos)]
        top, left = (int(rng.integers(size - self.side)) for size in photo.shape[:2])
        patch = photo[top : top + self.side, left : left + self.side]
        return torch.from_numpy(patch.transpose(2, 0, 1).astype(np.float32) / 255)


def write_run(folder: Path, dataset: Patches, side: int = 28) -> None:
    """Write what a finished run with two artifacts leaves."""
    rng = np.random.default_rng(0)
    with h5py.File(folder / "attributions.h5", "w") as file:
        file["attribution"] = rng.normal(size=(N, 1, side, side)).astype(np.float16)
        file["label"] = dataset.labels
        file["prediction"] = rng.normal(size=(N, CLASSES)).astype(np.float32)
    with h5py.File(folder / "analysis.h5", "w") as file:
        for c in range(CLASSES):
            index = np.flatnonzero(dataset.labels == c)
            group = file.create_group(f"{c:08d}")
            group["index"] = index.astype(np.uint32)
            group["embedding/spectral"] = rng.normal(size=(len(index), 32)).astype(np.float32)
            group["embedding/spectral"].attrs["eigenvalue"] = np.sort(rng.random(32))[::-1].astype(np.float32)
            group["embedding/umap"] = rng.normal(size=(len(index), 2)).astype(np.float32)
            for k in range(2, 9):
                group[f"cluster/kmeans-{k:02d}"] = rng.integers(0, k, len(index)).astype(np.int32)
    classes = [
        {"class_index": c, "class_name": dataset.classes[c], "n": 1000, "separability": 9.0 - c, "p_value": 0.01 * c}
        | {"q_value": 0.02 * c, "score": 9.0 - c, "rank": c + 1}
        for c in range(CLASSES)
    ]
    clusters = [
        row | {"cluster": f"kmeans-{k:02d}/{j}", "size": 99} for row in classes for k in (4, 8) for j in range(k)
    ]
    (folder / "ranking.json").write_text(json.dumps({"classes": classes, "clusters": clusters}))
    rows = []
    for c in (0, 4, 7, 9):
        at = folder / "artifacts" / f"a{c}"
        at.mkdir(parents=True)
        picture = rng.random((dataset.side, dataset.side, 4))
        (at / "mask.png").write_bytes(to_png(picture[..., 0]))
        (at / "pattern.png").write_bytes(to_png(picture))
        scores = "".join(f"{i},{score:.6f}\n" for i, score in enumerate(rng.random(N)))
        (at / "scores.csv").write_text("sample_index,score\n" + scores)
        samples = np.flatnonzero(dataset.labels == c)[:CARRIERS].tolist()
        rows.append(
            {"id": f"a{c}", "class_index": c, "class_name": dataset.classes[c], "cluster": "kmeans-04/1"}
            | {"samples": samples, "verdict": "clever_hans", "flip_rate": 0.7, "control_flip_rate": 0.02}
            | {"n_tested": 400, "p_value": 1e-5, "logit_gain": 4.0}
            | {
                key: f"artifacts/a{c}/{key}.{'csv' if key == 'scores' else 'png'}"
                for key in ("mask", "pattern", "scores")
            }
        )
    (folder / "artifacts.json").write_text(json.dumps({"artifacts": rows}))


@pytest.mark.parametrize(("noise", "side"), [(False, 64), (False, 224), (True, 64)], ids=["small", "large", "noise"])
def test_ten_thousand_samples_are_light(tmp_path, noise, side):
    dataset = Patches(side, noise)
    write_run(tmp_path, dataset)
    start = time.monotonic()
    data = gather(tmp_path, dataset, title="t", model="m")
    assert sum(len(plot.names) for plot in data.embeddings) == N, "all samples are shown"
    page = render(data).encode()
    seconds = time.monotonic() - start
    (tmp_path / "report.html").write_bytes(page)
    width, height = _thumbnail_size(page)
    print(f"{len(page)} bytes, thumbnails {width} x {height}, {seconds:.1f} s")
    assert len(page) < LARGEST
    assert width >= (12 if noise else 24), "thumbnails can be told apart"
    if browser.CHROMIUM:
        _opens(tmp_path / "report.html")


def _thumbnail_size(page: bytes) -> tuple[int, int]:
    script = page.partition(b'id="points-1">')[2].partition(b"</script>")[0]
    points = json.loads(script)
    assert len(points["names"]["rest"]) == N // CLASSES
    return points["width"], points["height"]


def _opens(path: Path) -> None:
    with browser.chromium() as chromium, browser.opened(chromium, path) as seen:
        seen.page.evaluate("for (const panel of document.querySelectorAll('.panel')) panel.open = true")
        seen.page.wait_for_timeout(500)
        assert seen.page.locator(".legend").last.locator("button").count() > 1
        loaded = seen.page.evaluate("performance.timing.domContentLoadedEventEnd - performance.timing.navigationStart")
        print(f"loaded in {loaded} ms")
        seen.assert_quiet()
