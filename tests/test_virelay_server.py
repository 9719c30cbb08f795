"""ViRelAy itself opens an exported project: its server, on loopback, gives every sample, heatmap and embedding.

ViRelAy needs an older Pillow than spray, so it can't be in the same environment: `SPRAY_TEST_VIRELAY_PYTHON` names
the interpreter of one that has it (`.ci/run` makes one).
"""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import ProxyHandler, build_opener

import h5py
import numpy as np
import pytest
from PIL import Image
from test_virelay import CLASSES, Images, export

PYTHON = os.environ.get("SPRAY_TEST_VIRELAY_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="SPRAY_TEST_VIRELAY_PYTHON names no interpreter with virelay")

LIGHTNESS = (0.299, 0.587, 0.114)
# A proxy of the environment must not come between.
_open = build_opener(ProxyHandler({})).open


@contextmanager
def server(project: Path) -> Iterator[str]:
    """Serve a project; yield the address of its API."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    application = f"virelay.application:run_wsgi_app(projects=[{str(project)!r}])"
    command = [str(PYTHON), "-m", "gunicorn", "--workers", "1", "--bind", f"127.0.0.1:{port}", application]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    address = f"http://127.0.0.1:{port}/api"
    try:
        for _ in range(300):
            try:
                _open(f"{address}/projects", timeout=60).close()
                break
            except (URLError, ConnectionError):
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.communicate()


def read(url: str) -> bytes:
    try:
        with _open(url, timeout=60) as reply:
            return bytes(reply.read())
    except HTTPError as error:
        raise AssertionError(f"{url}: {error.code} {error.read()[:200]!r}") from None


def strictly(data: bytes) -> Any:
    """Read JSON as a browser does, which knows no NaN."""
    return json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def picture(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float64)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_the_server_gives_everything(tmp_path, channels):
    path, dataset = export(tmp_path, channels), Images(channels)
    light = np.broadcast_to(dataset.pixels, (17, 3, 12, 10)).transpose(0, 2, 3, 1) @ LIGHTNESS
    with server(path) as api, h5py.File(tmp_path / "analysis.h5") as analysis:
        (listed,) = strictly(read(f"{api}/projects"))
        assert listed["name"] == "Tagged: cats & dogs"
        project = strictly(read(f"{api}/projects/0"))
        (method,) = project["analysisMethods"]
        assert [row["humanReadableName"] for row in method["categories"]] == list(CLASSES)
        assert [row["name"] for row in method["categories"]] == list(analysis)
        for category in analysis:
            group = analysis[category]
            assert sorted(method["clusterings"]) == sorted(group["cluster"])
            assert sorted(method["embeddings"]) == sorted(group["embedding"])
            for clustering in group["cluster"]:
                for embedding in group["embedding"]:
                    query = f"category={category}&clustering={clustering}&embedding={embedding}"
                    got = strictly(read(f"{api}/projects/0/analyses/{quote(method['name'])}?{query}"))
                    points = got["embedding"]
                    assert [point["attributionIndex"] for point in points] == group["index"][:].tolist()
                    assert [point["cluster"] for point in points] == group[f"cluster/{clustering}"][:].tolist()
                    stored = group[f"embedding/{embedding}"]
                    np.testing.assert_array_equal(np.float32([point["value"] for point in points]), stored[:])
                    if "eigenvalue" in stored.attrs:
                        np.testing.assert_array_equal(np.float32(got["eigenvalues"]), stored.attrs["eigenvalue"])
        for index in range(len(dataset)):
            sample = strictly(read(f"{api}/projects/0/dataset/{index}"))
            assert [label["name"] for label in sample["labels"]] == [CLASSES[dataset.labels[index]]]
            shown = picture(read(f"{api}/projects/0/dataset/{index}/image"))
            assert shown.shape == (12, 10, 3)
            # JPEG keeps little of the colours of noise, but no other image is nearer.
            apart = np.abs(shown @ LIGHTNESS - 255 * light).mean(axis=(1, 2))
            assert apart.argmin() == index
            assert apart[index] < 12
            attribution = strictly(read(f"{api}/projects/0/attributions/{index}?imageMode=overlay"))
            assert attribution["index"] == index
            assert [label["name"] for label in attribution["labels"]] == [CLASSES[dataset.labels[index]]]
            url = f"{api}/projects/0/attributions/{index}/heatmap"
            for color_map in ("black-fire-red", "jet", "blue-white-red"):
                assert picture(read(f"{url}?colorMap={color_map}&superimpose=true")).shape == (12, 10, 3)
                heatmap = picture(read(f"{url}?colorMap={color_map}"))
            with h5py.File(tmp_path / "attributions.h5") as file:
                relevance = np.abs(file["attribution"][:].sum(axis=1))
                np.testing.assert_allclose(attribution["prediction"], file["prediction"][index], rtol=1e-6)
            # White where there is no relevance, and darker the more there is; JPEG keeps brightness best.
            dark = -heatmap.mean(axis=2).ravel()
            alike = [np.corrcoef(dark, other.ravel())[0, 1] for other in relevance]
            assert np.argmax(alike) == index
            assert alike[index] > 0.8
        rows = strictly(read(f"{api}/projects/0/attributions?indices={','.join(map(str, range(17)))}&imageMode=input"))
        assert [row["index"] for row in rows] == list(range(17))
