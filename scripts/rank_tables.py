"""The tables of `rank_bench.py`: from the clusters of each run and their evidence to what was found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rank_cells import CLEAN_TUNING, TUNING

from spray.analysis.scoring import Candidate, judge
from spray.verification import wilson_interval

LEVEL = 0.05
RELIES = 0.05
"""Points of accuracy that the true artifact costs, from which on a model counts as relying on it."""


@dataclass(frozen=True)
class Ranking:
    """What a way of ranking makes of one run: classes and clusters, best first, with p-values where it has them."""

    classes: list[int]
    clusters: list[dict[str, Any]]
    p_values: dict[int, float] | None


Method = Callable[[dict[str, Any]], Ranking]


def ours(views: Sequence[str], kinds: Sequence[str]) -> Method:
    """Rank by cross-fitted separability in some views, with some kinds of further evidence."""

    def rank(run: dict[str, Any]) -> Ranking:
        taken = {*views, *({"repeated"} & set(kinds))}
        rows = [row for row in run["rows"] if row["view"] in taken]
        member = np.zeros(0, dtype=bool)
        found = [
            Candidate(
                r["c"],
                r["cluster"],
                member,
                r["tau"],
                r["distinct"],
                r["n"],
                None,
                r["evidence"],
                of_heatmaps=r["view"] != "repeated",
            )
            for r in rows
        ]
        of_class, of_cluster = judge(found, range(run["n_classes"]), kinds)
        return Ranking(
            sorted(of_class, key=lambda c: -of_class[c].score),
            [rows[i] for i in np.argsort([-verdict.score for verdict in of_cluster], kind="stable")],
            {c: verdict.p_value for c, verdict in of_class.items()},
        )

    return rank


def by(view: str, key: Callable[[dict[str, Any]], float]) -> Method:
    """Rank clusters by one number."""

    def rank(run: dict[str, Any]) -> Ranking:
        rows = sorted((row for row in run["rows"] if row["view"] == view), key=lambda row: -key(row))
        return Ranking(list(dict.fromkeys(row["c"] for row in rows)), rows, None)

    return rank


ALL = ("place", "scaled", "peak")
SHIPPED = ("repeated", "content")
METHODS: dict[str, Method] = {
    "this ranking": ours(ALL, SHIPPED),
    "this ranking, clusters of heatmaps only": ours(ALL, ("content",)),
    "plain Fisher score": by("plain", lambda row: row["tau"]),
    "largest cluster": by("plain", lambda row: row["size"]),
    "smallest cluster": by("plain", lambda row: -row["size"]),
    "silhouette": by("plain", lambda row: row["silhouette"] if row["silhouette"] is not None else -1),
    "CoRelAy's clusters, plain score": by("corelay", lambda row: row["tau"]),
}
ABLATION: dict[str, Method] = {
    "separability, place": ours(("place",), ()),
    "separability, place + scaled": ours(("place", "scaled"), ()),
    "separability, place + peak": ours(("place", "peak"), ()),
    "separability, all": ours(ALL, ()),
    "content, place": ours(("place",), ("content",)),
    "content, place + scaled": ours(("place", "scaled"), ("content",)),
    "content, place + peak": ours(("place", "peak"), ("content",)),
    "content, all": ours(ALL, ("content",)),
    "repeated, place": ours(("place",), ("repeated",)),
    "repeated, all": ours(ALL, ("repeated",)),
    "repeated + content, place": ours(("place",), SHIPPED),
    "repeated + content, all": ours(ALL, SHIPPED),
    **{
        f"content + {kind}, all": ours(ALL, ("content", kind))
        for kind in ("confidence", "concentration", "stability", "resampling", "held_out")
    },
}


def tables(results: Sequence[dict[str, Any]], tuning: bool, structureless: Sequence[dict[str, Any]]) -> str:
    """Return all tables as Markdown."""
    runs = [run for run in results if tuned(run) == tuning]
    clean = [run for run in runs if not run["rate"]]
    planted = [run for run in runs if run["rate"]]
    which = "tuning" if tuning else "held-out"
    parts = [f"Runs with {which} seeds: {len(clean)} clean, {len(planted)} planted, {sum(map(relies, planted))} rely."]
    parts += ["### Calibration", calibration(clean, structureless)]
    parts += ["### Power", power(planted), "### By rate and place", by_rate(planted)]
    parts += ["### Ablation", ablation(planted, clean), "### Misses", misses(planted)]
    return "\n\n".join(parts)


def tuned(run: dict[str, Any]) -> bool:
    """Return whether the score was built looking at a run of this seed."""
    return run["seed"] in (TUNING if run["rate"] else CLEAN_TUNING)


def relies(run: dict[str, Any]) -> bool:
    """Return whether the true artifact costs enough accuracy on the other classes' test images."""
    return bool(run["rate"]) and run["clean_others"] - run["attacked_others"] >= RELIES


def calibration(clean: Sequence[dict[str, Any]], structureless: Sequence[dict[str, Any]]) -> str:
    rows = []
    for name in dict.fromkeys(run["dataset"] for run in [*structureless, *clean]):
        for method in ("this ranking", "this ranking, clusters of heatmaps only"):
            runs = [run for run in [*structureless, *clean] if run["dataset"] == name]
            p_values = [p for run in runs for p in (METHODS[method](run).p_values or {}).values()]
            rows.append([name, method, len(runs), *_called(p_values)])
    for method in ("this ranking", "this ranking, clusters of heatmaps only"):
        p_values = [p for run in clean for p in (METHODS[method](run).p_values or {}).values()]
        rows.append(["all clean models", method, len(clean), *_called(p_values)])
    return _table(["data", "ranking", "models", "classes", "called at 0.05", "share [95 %]", "at 0.01", "at 0.2"], rows)


def _called(p_values: Sequence[float]) -> list[Any]:
    n, p = len(p_values), np.array(p_values)
    called = int((p <= LEVEL).sum())
    low, high = wilson_interval(called, n)
    share = f"{called / max(1, n):.3f} [{low:.3f}, {high:.3f}]"
    return [n, called, share, f"{(p <= 0.01).mean():.3f}" if n else "–", f"{(p <= 0.2).mean():.3f}" if n else "–"]


@dataclass(frozen=True)
class Found:
    """What a ranking finds of a planted artifact."""

    class_rank: int
    cluster_rank: int | None
    precision: float
    recall: float
    auroc: float | None
    p_value: float | None


def find(run: dict[str, Any], ranking: Ranking) -> Found:
    """Compare a ranking with the truth; precision, recall and AUROC are those of the class's first cluster."""
    target = run["target"]
    rank = ranking.classes.index(target) + 1 if target in ranking.classes else run["n_classes"]
    own = [row for row in ranking.clusters if row["c"] == target]
    # The artifact's cluster: the first whose samples are mostly the artifact's.
    right = next((i for i, row in enumerate(ranking.clusters, 1) if 2 * row["hits"] > row["size"]), None)
    first = own[0] if own else None
    return Found(
        rank,
        right,
        first["hits"] / first["size"] if first else 0.0,
        first["hits"] / first["planted"] if first else 0.0,
        first["auroc"] if first else None,
        None if ranking.p_values is None else ranking.p_values[target],
    )


def power(planted: Sequence[dict[str, Any]]) -> str:
    rows = []
    for name, method in METHODS.items():
        for place in ("fixed", "random"):
            runs = [run for run in planted if relies(run) and run["place"] == place]
            rows.append([name, place, *_summary([find(run, method(run)) for run in runs])])
    head = ["ranking", "place", "cases", "hit@1", "called", "MRR", "cluster rank (median)", "precision", "recall"]
    return _table([*head, "AUROC"], rows)


def _summary(found: Sequence[Found]) -> list[Any]:
    if not found:
        return [0, *["–"] * 7]
    n, hits = len(found), sum(x.class_rank == 1 for x in found)
    called = [x.p_value <= LEVEL for x in found if x.p_value is not None]
    ranks = [x.cluster_rank if x.cluster_rank is not None else 10**6 for x in found]
    middle = float(np.median(ranks))
    aurocs = [x.auroc for x in found if x.auroc is not None]
    return [
        n,
        f"{hits / n:.3f}",
        f"{np.mean(called):.3f}" if called else "–",
        f"{np.mean([1 / x.class_rank for x in found]):.3f}",
        "none" if middle >= 10**6 else f"{middle:g}",
        f"{np.mean([x.precision for x in found]):.3f}",
        f"{np.mean([x.recall for x in found]):.3f}",
        f"{np.mean(aurocs):.3f}" if aurocs else "–",
    ]


def by_rate(planted: Sequence[dict[str, Any]]) -> str:
    rows = []
    for dataset in dict.fromkeys(run["dataset"] for run in planted):
        for place in ("fixed", "random"):
            for rate in sorted({run["rate"] for run in planted}):
                runs = [r for r in planted if (r["dataset"], r["place"], r["rate"]) == (dataset, place, rate)]
                if not runs:
                    continue
                row: list[Any] = [dataset, place, f"{rate:.0%}", len(runs), sum(map(relies, runs))]
                for subset in (runs, [run for run in runs if relies(run)]):
                    for method in ("this ranking", "plain Fisher score"):
                        found = [find(run, METHODS[method](run)) for run in subset]
                        row.append(f"{sum(x.class_rank == 1 for x in found)}/{len(found)}")
                ours_ = [find(run, METHODS["this ranking"](run)) for run in runs if relies(run)]
                row += _summary(ours_)[5:]
                rows.append(row)
    head = ["data", "place", "rate", "runs", "rely", "hit@1, all", "plain", "hit@1, rely", "plain"]
    return _table([*head, "precision", "recall", "AUROC"], rows)


def ablation(planted: Sequence[dict[str, Any]], clean: Sequence[dict[str, Any]]) -> str:
    rows = []
    relying = [run for run in planted if relies(run)]
    for name, method in ABLATION.items():
        found = [find(run, method(run)) for run in relying]
        p_values = [p for run in clean for p in (method(run).p_values or {}).values()]
        summary = _summary(found)
        called = _called(p_values)
        rows.append([name, *summary[:4], *summary[5:7], called[2]])
    head = ["evidence, views", "cases", "hit@1", "called", "MRR", "precision", "recall"]
    return _table([*head, "clean classes called"], rows)


def misses(planted: Sequence[dict[str, Any]]) -> str:
    """Return the relying runs whose class is not first, with what is known about each."""
    lines = []
    for run in planted:
        found = find(run, METHODS["this ranking"](run))
        if relies(run) and found.class_rank > 1:
            own = [row for row in run["rows"] if row["c"] == run["target"] and row["view"] in (*ALL, "repeated")]
            best = max(own, key=lambda row: 2 * row["hits"] / (row["size"] + row["planted"]))
            lines.append(
                f"- {run['dataset']}, {run['place']}, {run['rate']:.0%}, seed {run['seed']}, class {run['target']}: "
                f"rank {found.class_rank}; accuracy of the others {run['clean_others']:.3f}, attacked "
                f"{run['attacked_others']:.3f}, {run['attacked_to_class']:.1%} to the class; {best['planted']} marked, "
                f"best cluster {best['cluster']} has {best['hits']} of them among {best['size']}"
                + (f"; a clean twin loses {run['twin_loss']:.3f}" if run.get("twin_loss") is not None else "")
            )
    return "\n".join(lines) or "none"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)
