"""What a spectral embedding of heatmaps costs, beside CoRelAy and alone, and how near to the exact one it is.

    python scripts/bench_spray.py against --corelay-python PATH    # time, memory and clusters beside CoRelAy 1.0.0
    python scripts/bench_spray.py alone                            # 10,000 to 100,000 x 1,024, 1,000,000 x 256
    python scripts/bench_spray.py growth                           # 10,000 to 1,000,000 x 256: grows as n to what?
    python scripts/bench_spray.py agreement                        # edges, clusters and spans against the exact ones
    python scripts/bench_spray.py searches                         # all pairs, cells, pynndescent: cost and recall

Each measurement has a process of its own and prints wall and CPU seconds: on a busy machine only the latter mean
something. Memory is the peak above what the process holds before, the data among it. Nothing is warmed up: the
first call of a process is what is measured.

CoRelAy wants a Python environment of its own: python -m venv DIR && DIR/bin/pip install corelay==1.0.0, and then
--corelay-python DIR/bin/python. Without it, it's imported from this one if it's there.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

KINDS = 8
SHARES = np.array([0.24, 0.2, 0.16, 0.13, 0.1, 0.08, 0.06, 0.03])


def heatmaps(n: int, d: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return maps (n, d) of a spot near its kind's place, of some width, under noise, and their kinds (n,)."""
    side = int(np.sqrt(d))
    rng = np.random.default_rng(seed)
    kinds = rng.permutation(np.repeat(np.arange(KINDS), np.diff(np.round(np.cumsum([0, *SHARES]) * n).astype(int))))
    places = np.array([(i, j) for i in range(3) for j in range(3) if (i, j) != (1, 1)])[:KINDS] * side / 3 + side / 6
    maps, axis = np.empty((n, d), np.float32), np.arange(side, dtype=np.float32)
    for at in range(0, n, 4096):
        some = kinds[at : at + 4096]
        centre = places[some] + rng.normal(scale=side / 60, size=(len(some), 2))
        width = rng.normal(side / 13, side / 100, size=(len(some), 1))
        rows, columns = (np.exp(-(((axis - centre[:, [i]]) / width) ** 2) / 2) for i in (0, 1))
        spot = (rows[:, :, None] * columns[:, None, :]).reshape(len(some), d)
        maps[at : at + 4096] = spot + 0.02 * rng.standard_normal((len(some), d), dtype=np.float32)
    return maps, kinds


def blobs(n: int, d: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return Gaussian blobs, round in all dimensions: no component tells more about neighbours than another."""
    rng = np.random.default_rng(seed)
    kinds = rng.permutation(np.repeat(np.arange(KINDS), np.diff(np.round(np.cumsum([0, *SHARES]) * n).astype(int))))
    centres = rng.standard_normal((KINDS, d), dtype=np.float32)
    maps = rng.standard_normal((n, d), dtype=np.float32)
    for at in range(0, n, 4096):
        maps[at : at + 4096] += 2 * centres[kinds[at : at + 4096]]
    return maps, kinds


DATA = {"heatmaps": heatmaps, "blobs": blobs}


# ------------------------------------------------------------------------------------- one measurement, in a process


def one(arguments: argparse.Namespace) -> None:
    """Measure one call and print what it took as JSON; labels and embedding go to `arguments.out`."""
    X = np.load(arguments.data)
    call = {"corelay": _corelay, "spray": _spray, "dense": _dense}[arguments.who](arguments)
    # Whatever a measurement imports belongs to the process, not to the call.
    held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    took = []
    for _ in range(arguments.calls):
        wall, cpu = time.perf_counter(), time.process_time()
        result = call(X)
        took.append((time.perf_counter() - wall, time.process_time() - cpu))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    np.savez(arguments.out, **result)
    print(json.dumps({"wall": took[0][0], "cpu": took[0][1], "again": took[-1][1], "memory": max(0, peak - held)}))


def _corelay(_: argparse.Namespace) -> Any:
    from corelay.pipeline.spectral import SpectralEmbedding

    pipeline = SpectralEmbedding()

    def call(X: np.ndarray) -> dict[str, np.ndarray]:
        eigenvalues, embedding = pipeline(X)
        # Its largest come last; they are the ones of interest.
        return {"eigenvalues": eigenvalues[::-1], "embedding": embedding[:, ::-1]}

    return call


def _spray(arguments: argparse.Namespace) -> Any:
    from spray.analysis.neighbors import affinity_of, nearest_neighbors
    from spray.analysis.spectral import graph_embedding

    def call(X: np.ndarray) -> dict[str, np.ndarray]:
        if arguments.search_only:
            return {"indices": nearest_neighbors(X, 10, method=arguments.method)[0]}
        cpu = time.process_time()
        indices = nearest_neighbors(X, 10, method=arguments.method)[0]
        graph = affinity_of(indices)
        searched = time.process_time() - cpu
        eigenvalues, embedding = graph_embedding(graph, 32)
        edges = np.column_stack(graph.nonzero()).astype(np.int32) if len(X) <= 20_000 else np.empty(0)
        found = {"eigenvalues": eigenvalues, "embedding": embedding, "edges": edges, "searched": np.array(searched)}
        return {**found, "indices": indices}

    return call


def _dense(_: argparse.Namespace) -> Any:
    """From the formulas, in double precision, with nothing of the package: all distances, all of the Laplacian."""
    from scipy.linalg import eigh
    from sklearn.neighbors import NearestNeighbors

    def call(X: np.ndarray) -> dict[str, np.ndarray]:
        search = NearestNeighbors(n_neighbors=10, algorithm="brute").fit(X.astype(np.float64))
        graph = search.kneighbors_graph(mode="connectivity").toarray()
        affinity = (graph + graph.T) / 2
        root = 1 / np.sqrt(affinity.sum(axis=1))
        eigenvalues, embedding = eigh(np.eye(len(X)) - root[:, None] * affinity * root, subset_by_index=(0, 31))
        return {"eigenvalues": eigenvalues, "embedding": embedding, "edges": np.argwhere(affinity).astype(np.int32)}

    return call


def measure(arguments: argparse.Namespace, who: str, data: Path, **options: Any) -> tuple[dict[str, float], Any]:
    """Run `one` in a process of its own; return what it took and what it found."""
    python = arguments.corelay_python if who == "corelay" and arguments.corelay_python else sys.executable
    out = data.with_suffix(f".{who}.npz")
    flags = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    environment = dict(os.environ)
    if arguments.threads:
        environment.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(arguments.threads)))
    command = [str(python), __file__, "one", "--who", who, "--data", str(data), "--out", str(out), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}\n{__doc__ if who == 'corelay' else ''}")
    with np.load(out) as found:
        return json.loads(done.stdout.splitlines()[-1]), dict(found)


def saved(
    arguments: argparse.Namespace, folder: str, n: int, d: int, kind: str = "heatmaps"
) -> tuple[Path, np.ndarray]:
    """Write samples to a file; return its path and their kinds."""
    path = Path(folder) / f"{kind}-{n}-{d}.npy"
    X, kinds = DATA[kind](n, d, arguments.seed)
    np.save(path, X)
    return path, kinds


def clusters(embedding: np.ndarray, k: int = KINDS) -> np.ndarray:
    """Return k-means clusters of the first `k` columns, of rows of unit length."""
    from spray.analysis.clustering import cluster, spectral_rows

    return cluster(spectral_rows(embedding, k), "kmeans", n_clusters=k)


# --------------------------------------------------------------------------------------------------------- the tables


def against(arguments: argparse.Namespace) -> None:
    """Compare with CoRelAy, in turns, and the clusters of both with the dense reference's."""
    from sklearn.metrics import adjusted_rand_score

    print(
        f"{arguments.data}, {arguments.d} dimensions; medians of {arguments.repeats}; s are wall (CPU)\n\n"
        "| n | CoRelAy s | MB | spray s | MB | faster, wall | faster, CPU | ARI CoRelAy | ARI spray | ARI to truth |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    for n in arguments.sizes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            path, kinds = saved(arguments, folder, n, arguments.d, arguments.data)
            took: dict[str, list[dict[str, float]]] = {"corelay": [], "spray": []}
            found = {}
            for _ in range(arguments.repeats):
                for who, those in took.items():
                    result, found[who] = measure(arguments, who, path)
                    those.append(result)
            reference = measure(arguments, "dense", path)[1] if n <= arguments.dense_to else None
        theirs, ours = ({key: float(np.median([t[key] for t in those])) for key in those[0]} for those in took.values())
        # What is left of a reference too large to be computed is CoRelAy's own, whose distances are dense too.
        labels = clusters((reference or found["corelay"])["embedding"])
        same = [f"{adjusted_rand_score(labels, clusters(found[who]['embedding'])):.3f}" for who in took]
        truth = adjusted_rand_score(kinds, clusters(found["spray"]["embedding"]))
        print(
            f"| {n:,} | {theirs['wall']:.2f} ({theirs['cpu']:.2f}) | {theirs['memory'] / 1e6:.0f} | "
            f"{ours['wall']:.2f} ({ours['cpu']:.2f}) | {ours['memory'] / 1e6:.0f} | "
            f"{theirs['wall'] / ours['wall']:.1f} | {theirs['cpu'] / ours['cpu']:.1f} | "
            f"{same[0] if reference else 'is the reference'} | {same[1]} | {truth:.3f} |",
            flush=True,
        )


def alone(arguments: argparse.Namespace) -> None:
    """Measure the embedding of more and more samples."""
    from sklearn.metrics import adjusted_rand_score

    from spray.analysis.neighbors import neighbor_recall

    print(
        f"{arguments.data}; s are wall (CPU)\n\n"
        "| n x d | s | of it, the graph's CPU | MB above the data | recall of neighbours | ARI to truth |\n"
        "|---|---|---|---|---|---|"
    )
    points = []
    for size in arguments.shapes:
        n, d = map(int, size.split("x"))
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            path, kinds = saved(arguments, folder, n, d, arguments.data)
            took, found = measure(arguments, "spray", path)
            recall = neighbor_recall(np.load(path, mmap_mode="r"), found["indices"], seed=1)
        points.append((n, took["cpu"]))
        print(
            f"| {n:,} x {d:,} | {took['wall']:.1f} ({took['cpu']:.1f}) | {float(found['searched']):.1f} | "
            f"{took['memory'] / 1e6:,.0f} | {recall:.3f} | "
            f"{adjusted_rand_score(kinds, clusters(found['embedding'])):.3f} |",
            flush=True,
        )
    if len(points) > 2 and len({size.split("x")[1] for size in arguments.shapes}) == 1:
        (n, least), (m, most) = points[0], points[-1]
        print(
            f"\nfrom {n:,} to {m:,}: CPU time times {most / least:.0f}, n log n times "
            f"{m * np.log(m) / (n * np.log(n)):.0f}; exponent {np.log(most / least) / np.log(m / n):.2f}"
        )


def agreement(arguments: argparse.Namespace) -> None:
    """Compare each way to the embedding with the dense computation."""
    from sklearn.metrics import adjusted_rand_score

    print(
        "| data | n x d | search | edge recall | edge precision | largest difference of an eigenvalue | "
        "largest angle of the first 8 | of all 32 | ARI |\n|---|---|---|---|---|---|---|---|---|"
    )
    for kind in arguments.kinds:
        for n in arguments.sizes:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                path, _ = saved(arguments, folder, n, arguments.d, kind)
                exact = measure(arguments, "dense", path)[1]
                for method in ("exact", "auto", "cells"):
                    found = measure(arguments, "spray", path, method=method)[1]
                    keys, mine = (set((e["edges"] @ np.array([n, 1])).tolist()) for e in (exact, found))
                    angles = [angle(exact["embedding"][:, :k], found["embedding"][:, :k]) for k in (KINDS, 32)]
                    labels = [clusters(e["embedding"]) for e in (exact, found)]
                    print(
                        f"| {kind} | {n:,} x {arguments.d:,} | {method} | {len(keys & mine) / len(keys):.4f} | "
                        f"{len(keys & mine) / len(mine):.4f} | "
                        f"{np.abs(exact['eigenvalues'] - found['eigenvalues']).max():.1e} | {angles[0]:.2f}° | "
                        f"{angles[1]:.2f}° | {adjusted_rand_score(*labels):.4f} |",
                        flush=True,
                    )


def angle(A: np.ndarray, B: np.ndarray) -> float:
    """Return the largest principal angle in degrees between the spans of two embeddings' columns."""
    from scipy.linalg import subspace_angles

    return float(np.degrees(subspace_angles(A, B).max()))


def searches(arguments: argparse.Namespace) -> None:
    """Compare the ways to find neighbours: CPU seconds of a first and of a second call, and recall."""
    from spray.analysis.neighbors import neighbor_recall

    print("| n x d | search | first call, CPU s | second | MB | recall |\n|---|---|---|---|---|---|")
    for n in arguments.sizes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            path, _ = saved(arguments, folder, n, arguments.d, arguments.data)
            for method in ("auto", "exact", "cells", "pynndescent"):
                if method == "exact" and n > arguments.exact_to:
                    continue
                took, found = measure(arguments, "spray", path, method=method, search_only=1, calls=2)
                recall = neighbor_recall(np.load(path), found["indices"], seed=1)
                print(
                    f"| {n:,} x {arguments.d:,} | {method} | {took['cpu']:.2f} | {took['again']:.2f} | "
                    f"{took['memory'] / 1e6:.0f} | {recall:.3f} |",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    for name, function in (("against", against), ("alone", alone), ("growth", alone), ("agreement", agreement),
                           ("searches", searches)):  # fmt: skip
        command = commands.add_parser(name, help=(function.__doc__ or "").splitlines()[0])
        command.set_defaults(function=function, corelay_python=None)
        command.add_argument("--folder", type=Path, help="where samples lie meanwhile; 2 GB for a million")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--threads", type=int, help="of every measurement; by default as many as it likes")
        command.add_argument("--data", choices=DATA, default="heatmaps")
        command.add_argument("--d", type=int, default=1024)
        if name == "against":
            command.add_argument("--corelay-python", type=Path, help="a Python that has CoRelAy 1.0.0")
            command.add_argument("--repeats", type=int, default=3)
            command.add_argument("--dense-to", type=int, default=10_000, help="most samples of the dense reference")
            command.add_argument("--sizes", type=int, nargs="+", default=[1000, 2000, 5000, 10_000])
        elif name == "alone":
            shapes = ["10000x1024", "20000x1024", "50000x1024", "100000x1024", "1000000x256"]
            command.add_argument("--shapes", nargs="+", default=shapes)
        elif name == "growth":
            shapes = ["10000x256", "30000x256", "100000x256", "300000x256", "1000000x256"]
            command.add_argument("--shapes", nargs="+", default=shapes)
        elif name == "agreement":
            command.add_argument("--sizes", type=int, nargs="+", default=[2000, 5000])
            command.add_argument("--kinds", nargs="+", choices=DATA, default=list(DATA))
        else:
            command.add_argument("--sizes", type=int, nargs="+", default=[5000, 10_000, 20_000, 50_000, 100_000])
            command.add_argument("--exact-to", type=int, default=20_000)
    command = commands.add_parser("one", help="one measurement; the others call it")
    command.set_defaults(function=one)
    command.add_argument("--who", choices=["corelay", "spray", "dense"])
    command.add_argument("--data", type=Path)
    command.add_argument("--out", type=Path)
    command.add_argument("--method", default="auto")
    command.add_argument("--search-only", type=int, default=0)
    command.add_argument("--calls", type=int, default=1)
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
