"""The fifth stage: what the most separable clusters share, and whether it moves the model."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from spray.figures import fitted
from spray.isolation.candidate import Artifact, isolate, otsu, scores
from spray.isolation.causal import Effect, holm, test_effect, verdict
from spray.pipelines.context import Context
from spray.pipelines.isolated import save_artifact
from spray.pipelines.pictures import artifact_pictures
from spray.pipelines.stage import Stage
from spray.storage import read_json, write_bytes, write_json, write_text
from spray.store import open_attributions
from spray.store.analyses import open_analysis
from spray.store.reading import Rows
from spray.training import batches

FEWEST = 4
"""Fewest samples that an artifact is isolated from."""


@dataclass
class Candidate:
    """An isolated candidate and what was measured on it."""

    class_index: int
    cluster: str
    artifact: Artifact
    samples: np.ndarray
    effect: Effect
    verdict: str = "no_effect"
    p_value: float = 1.0
    removal_p_value: float = 1.0

    @property
    def strength(self) -> tuple[bool, float]:
        """What candidates are ordered by: a verdict first, then by how much more they flip than the control."""
        return self.verdict != "no_effect", self.effect.flip_rate - self.effect.control_flip_rate


def run(context: Context) -> dict[str, Any]:
    """Write `artifacts.json` and a folder for each candidate."""
    clusters = _choose(context)
    candidates = []
    shape = (len(context.train), None, None, None)
    with open_attributions(context.run_dir / "attributions.h5", shape=shape) as attributions:
        for row, members in context.progress(clusters, len(clusters), "candidates isolated"):
            candidate = _isolate(context, attributions.attribution, row, members)
            if candidate is not None:
                candidates.append(candidate)
        _judge(candidates)
        candidates = _distinct(sorted(candidates, key=lambda c: c.strength, reverse=True))
        rows = []
        for number, candidate in enumerate(candidates, start=1):
            rows.append(_write(context, attributions.attribution, f"a{number:02d}", candidate))
    write_json(context.run_dir / "artifacts.json", {"artifacts": rows})
    found = [row for row in rows if row["verdict"] != "no_effect"]
    for row in found:
        context.log.info(
            "%s in %r: %d samples, added to other classes it turns %.0f %% to it (control %.0f %%)",
            row["verdict"],
            row["class_name"],
            len(row["samples"]),
            100 * row["flip_rate"],
            100 * row["control_flip_rate"],
        )
    if not found:
        context.log.info("none of %d candidates has an effect beyond its control", len(rows))
    return {"candidates": len(rows), "found": len(found)}


def _choose(context: Context) -> list[tuple[dict[str, Any], np.ndarray]]:
    """Return the clusters to look at with their samples: the best of each class that overlap little."""
    options = context.config.isolate
    chosen: list[tuple[dict[str, Any], np.ndarray]] = []
    taken: dict[int, list[np.ndarray]] = {}
    with (
        open_analysis(context.run_dir / "analysis.h5", len(context.train)) as analysis,
        open_analysis(context.run_dir / "candidates.h5", len(context.train)) as further,
    ):
        for row in read_json(context.run_dir / "ranking.json")["clusters"]:
            earlier = taken.setdefault(row["class_index"], [])
            if len(earlier) == options.per_class:
                continue
            name, _, label = row["cluster"].rpartition("/")
            group = analysis.group(row["class_index"])
            if name not in group.clusterings:
                group = further.group(row["class_index"])
            members = group.index[group.labels(name) == int(label)]
            if all(_overlap(members, other) < 0.5 for other in earlier):
                earlier.append(members)
                chosen.append((row, members))
    return chosen[: options.candidates]


def _isolate(context: Context, relevance: Rows, row: dict[str, Any], members: np.ndarray) -> Candidate | None:
    """Isolate one cluster's artifact, score all samples of its class, test its effect."""
    options, c = context.config.isolate, row["class_index"]
    rng = np.random.default_rng([context.config.seed, c, len(members)])
    of_class = np.flatnonzero(context.train.labels == c)

    def some(indices: np.ndarray) -> np.ndarray:
        return np.sort(rng.permutation(indices)[: options.n_samples])

    inside, outside = some(members), some(np.setdiff1d(of_class, members))
    if len(inside) < FEWEST or len(outside) < FEWEST:
        return None
    artifact = isolate(
        context.train.batch(inside),
        _maps(context, relevance, inside),
        context.train.batch(outside),
        _maps(context, relevance, outside),
    )
    if artifact is None:
        return None
    matched = _scores(context, artifact, of_class)
    carries = matched > otsu(torch.from_numpy(matched).clamp_min(0))
    others = np.flatnonzero(context.test.labels != c)
    effect = test_effect(
        lambda pixels: context.predict_pixels(context.model, pixels),
        artifact,
        c,
        context.test.batch(np.sort(rng.permutation(others)[: options.n_tested])),
        context.train.batch(some(of_class[carries])),
        context.train.batch(some(of_class[~carries])),
        context.config.seed,
    )
    return Candidate(c, row["cluster"], artifact, of_class[carries], effect)


def _maps(context: Context, relevance: Rows, indices: np.ndarray) -> torch.Tensor:
    """Return heatmaps (n, H, W) of the images' size, however small and with however many channels they are stored."""
    return torch.from_numpy(fitted(relevance[indices].astype(np.float32).sum(axis=1), context.train.image_shape[1:]))


def _judge(candidates: list[Candidate]) -> None:
    """Set the verdicts, with p-values corrected for the number of candidates."""
    p_values = holm([candidate.effect.p_value for candidate in candidates])
    removal = holm([candidate.effect.removal_p_value for candidate in candidates])
    for candidate, p_value, removal_p_value in zip(candidates, p_values, removal, strict=True):
        candidate.p_value, candidate.removal_p_value = float(p_value), float(removal_p_value)
        candidate.verdict = verdict(candidate.effect, candidate.artifact.constant, p_value, removal_p_value)


def _distinct(candidates: list[Candidate]) -> list[Candidate]:
    """Keep, of candidates that are found in the same samples of a class, the first one."""
    kept: list[Candidate] = []
    for candidate in candidates:
        if all(
            candidate.class_index != other.class_index or _overlap(candidate.samples, other.samples) < 0.5
            for other in kept
        ):
            kept.append(candidate)
    return kept


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Jaccard index of two sets of indices."""
    both = len(np.intersect1d(a, b))
    union = len(a) + len(b) - both
    return both / union if union else 1.0


def _scores(context: Context, artifact: Artifact, indices: np.ndarray) -> np.ndarray:
    return scores(artifact, (context.train.batch(indices[part]) for part in batches(len(indices), 1024)))


def _write(context: Context, relevance: Rows, name: str, candidate: Candidate) -> dict[str, Any]:
    """Write a candidate's folder and return its row of `artifacts.json`."""
    folder = context.run_dir / "artifacts" / name
    everywhere = _scores(context, candidate.artifact, np.arange(len(context.train)))
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["sample_index", "score"])
    writer.writerows((i, f"{score:.6f}") for i, score in enumerate(everywhere))
    write_text(folder / "scores.csv", table.getvalue())
    save_artifact(folder / "artifact.npz", candidate.artifact)
    best = candidate.samples[np.argsort(-everywhere[candidate.samples], kind="stable")]
    for file, picture in artifact_pictures(context, candidate.artifact, relevance, best).items():
        write_bytes(folder / file, picture)
    effect = asdict(candidate.effect)
    return {
        "id": name,
        "class_index": candidate.class_index,
        "class_name": context.train.classes[candidate.class_index],
        "cluster": candidate.cluster,
        "samples": [int(i) for i in candidate.samples],
        "verdict": candidate.verdict,
        "flip_rate": effect["flip_rate"],
        "control_flip_rate": effect["control_flip_rate"],
        "logit_gain": effect["logit_gain"],
        "p_value": candidate.p_value,
        "mask": f"artifacts/{name}/mask.png",
        "pattern": f"artifacts/{name}/pattern.png",
        "scores": f"artifacts/{name}/scores.csv",
        "n_tested": effect["n"],
        "removal_cost": effect["removal_cost"],
        "removal_p_value": candidate.removal_p_value,
        "constant_content": candidate.artifact.constant,
        "mask_share": float(candidate.artifact.mask.mean()),
    }


STAGE = Stage(
    name="isolate",
    needs=("train", "attribute", "analyze", "rank"),
    settings=("isolate", "seed"),
    outputs=("artifacts.json", "artifacts/"),
    run=run,
)
