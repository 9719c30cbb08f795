"""The fifth stage: what the most separable clusters share, and whether it moves the model."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from spray.isolation.causal import LEVEL, holm, verdict
from spray.isolation.choice import WHOLE, Trial
from spray.pipelines.candidates import Candidate
from spray.pipelines.clusters import agreement, jaccard, ranked_clusters
from spray.pipelines.context import Context
from spray.pipelines.explained import explained
from spray.pipelines.explaining import Explainer
from spray.pipelines.isolated import save_artifact
from spray.pipelines.pictures import artifact_pictures
from spray.pipelines.stage import Stage
from spray.pipelines.strangers import strangers
from spray.storage import read_json, write_bytes, write_json, write_text
from spray.store import open_attributions
from spray.store.reading import Rows

UNUSUAL, COMPARABLE = 0.05, 4
"""Largest q-value of clusters that the ranking finds unusual; classes that it takes to say what is usual."""
APART = 0.5
"""Jaccard index from which on two clusters, or the samples of two candidates, are too much the same."""

MORE = (
    "flip_rate_interval",
    "control_flip_rate_interval",
    "effect_interval",
    "logit_gain_interval",
    "removal_cost_interval",
    "elsewhere_flip_rate",
    "elsewhere_flip_rate_interval",
    "removal_cost_elsewhere",
    "removal_cost_elsewhere_interval",
    "n_removed",
    "removal_held_out",
    "removal_gain_p_value",
)
"""What else of an effect is written, under its own names."""


def run(context: Context) -> dict[str, Any]:
    """Write `artifacts.json` and a folder for each candidate."""
    shape = (len(context.train), None, None, None)
    with open_attributions(context.run_dir / "attributions.h5", shape=shape) as attributions:
        explainer = Explainer(context, attributions.attribution)
        clusters = _with_groups(context, explainer, _choose(context))
        clusters = _with_strangers(clusters, strangers(context, explainer.samples, attributions))
        with context.counter(len(clusters), "candidates isolated") as count:
            candidates = explained(explainer, clusters, partial(_known, context), count)
        _judge(candidates)
        candidates = sorted(_distinct(candidates), key=lambda c: c.strength, reverse=True)
        scores = explainer.scores(candidates), explainer.test_scores(candidates)
        rows = []
        for number, (candidate, everywhere, of_test) in enumerate(zip(candidates, *scores, strict=True), start=1):
            candidate.samples = _completed(candidate, everywhere, np.asarray(context.train.labels))
            name = f"a{number:02d}"
            rows.append(_write(context, attributions.attribution, name, candidate, everywhere, of_test))
    write_json(context.run_dir / "artifacts.json", {"artifacts": rows})
    found = [row for row in rows if row["verdict"] != "no_effect"]
    for row in found:
        said = "%s in %r: %d samples, added to other classes it turns %.0f %% to it (control %.0f %%)"
        shares = row["flip_rate"], row["control_flip_rate"]
        if row["verdict"] == "sample_bias":
            said = "%s in %r: %d samples, of whose kind %.0f %% are told right (%.0f %% of the rest)"
            shares = row["sample_bias"]["accuracy"], row["sample_bias"]["rest_accuracy"]
        context.log.info(said, row["verdict"], row["class_name"], len(row["samples"]), *(100 * x for x in shares))
    if not found:
        context.log.info("none of %d candidates has an effect beyond its control", len(rows))
    return {"candidates": len(rows), "found": len(found)}


def _choose(context: Context) -> list[tuple[dict[str, Any], np.ndarray]]:
    """Return the clusters to look at with their samples: of each class those that overlap little.

    In turns that which ranks best and that on which most clusterings agree; and the largest in which the very same is
    repeated, which natural kinds of images hardly have. Of all classes first those that rank best.
    """
    options = context.config.isolate
    ranked: list[tuple[dict[str, Any], np.ndarray]] = []
    agreed: list[tuple[dict[str, Any], np.ndarray]] = []
    with ranked_clusters(context.run_dir, len(context.train)) as clusters:
        by_class: dict[int, list[dict[str, Any]]] = {}
        for row in clusters.rows:
            by_class.setdefault(row["class_index"], []).append(row)
        # Further classes have no chance: even the best of their clusters ranks behind as many as are taken.
        for of_class in list(by_class.values())[: options.candidates]:
            rows = [(row, clusters.members(row)) for row in of_class]
            again = agreement([members for _, members in rows], [row["cluster"] for row, _ in rows])
            turns = [(rows, ranked), ([rows[i] for i in np.argsort(-again, kind="stable")], agreed)]
            same = [each for each in rows if "repeated" in each[0].get("evidence", {})]
            largest = sorted(same, key=lambda each: -len(each[1]))[:1]
            own: list[tuple[dict[str, Any], np.ndarray]] = []
            for order, taken in [*(turns[turn % 2] for turn in range(options.per_class)), (largest, ranked)]:
                apart = (each for each in order if all(jaccard(each[1], one) < APART for _, one in own))
                if (found := next(apart, None)) is not None:
                    own.append(found)
                    taken.append(found)
    ranked.sort(key=lambda each: each[0]["rank"])
    return (ranked + agreed)[: options.candidates]


def _with_groups(
    context: Context, explainer: Explainer, clusters: list[tuple[dict[str, Any], np.ndarray]]
) -> list[tuple[dict[str, Any], np.ndarray]]:
    """Return the clusters and groups that the heatmaps don't show, class by class, those that rank first before."""
    options = context.config.isolate
    classes = list(dict.fromkeys(row["class_index"] for row in read_json(context.run_dir / "ranking.json")["classes"]))
    found, room = [], options.candidates if options.latent else 0
    for c in classes:
        own = [(row, members) for row, members in clusters if row["class_index"] == c]
        found += own
        if room > 0:
            for number, members in enumerate(explainer.groups(c, min(options.latent, room)), start=1):
                if all(jaccard(members, other) < APART for _, other in own):
                    found.append(({"class_index": c, "cluster": f"latent-{number:02d}/1", "q_value": 1.0}, members))
                    room -= 1
    return found


def _with_strangers(
    clusters: list[tuple[dict[str, Any], np.ndarray]], kinds: list[tuple[dict[str, Any], np.ndarray]]
) -> list[tuple[dict[str, Any], np.ndarray]]:
    """Return the clusters and kinds of sample, class by class in the order of the clusters."""
    classes = list(dict.fromkeys(row["class_index"] for row, _ in clusters + kinds))
    return [each for c in classes for each in clusters + kinds if each[0]["class_index"] == c]


def _known(context: Context, row: dict[str, Any]) -> tuple[bool, bool, float | None]:
    """Return whether other classes have nothing like a cluster, whether it repeats, and its strangeness, by its row."""
    compared = len(context.train.classes) >= COMPARABLE
    return compared and row["q_value"] < UNUSUAL, "repeated" in row.get("evidence", {}), row.get("strangeness")


def _judge(candidates: list[Candidate]) -> None:
    """Set the verdicts, with p-values corrected for the number of candidates."""
    p_values = holm([candidate.effect.p_value for candidate in candidates])
    removal = holm([candidate.effect.removal_p_value for candidate in candidates])
    biases = holm([candidate.bias.p_value for candidate in candidates])
    gains = holm([candidate.effect.removal_gain_p_value for candidate in candidates])
    for candidate, p_value, removal_p_value, bias, gain in zip(
        candidates, p_values, removal, biases, gains, strict=True
    ):
        candidate.p_value, candidate.removal_p_value = float(p_value), float(removal_p_value)
        candidate.bias = replace(candidate.bias, p_value=float(bias))
        candidate.effect = replace(candidate.effect, removal_gain_p_value=float(gain))
        candidate.verdict = verdict(
            candidate.effect,
            candidate.artifact.constant,
            p_value,
            removal_p_value,
            candidate.bias if _has_reason(candidate) else None,
            candidate.unusual,
            candidate.trials[0].accounts,
            candidate.artifact.constant and candidate.trials[0].isolator not in WHOLE,
        )
        if not candidate.trials[0].explains and candidate.verdict != "sample_bias":
            candidate.verdict = "no_effect"
    acting = {candidate.class_index for candidate in candidates if candidate.verdict in ("clever_hans", "backdoor")}
    for candidate in candidates:
        # Of a class that is known by its artifact the model is wrong on whatever has none.
        if candidate.bias.strangeness is not None and candidate.class_index in acting:
            candidate.verdict = "no_effect"


def _has_reason(candidate: Candidate) -> bool:
    """Return whether there is a reason for the model to do worse on a candidate's samples than that they are hard.

    The ranking finds them unusual; they are strangers in their class; or they share an artifact that costs them, since
    the model takes it for another class's: without it, it is surer of them.
    """
    effect = candidate.effect
    costs = candidate.unusual and effect.removal_cost < 0 and effect.removal_gain_p_value < LEVEL
    return candidate.ranked or candidate.bias.strangeness is not None or costs


def _distinct(candidates: list[Candidate]) -> list[Candidate]:
    """Keep, of candidates that are found in the same samples of a class, the one that is explained best.

    A verdict goes first. The strongest effect would favour what takes more of the image along.
    """
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.verdict != "no_effect", c.explained), reverse=True):
        if all(
            candidate.class_index != other.class_index or jaccard(candidate.samples, other.samples) < APART
            for other in kept
        ):
            kept.append(candidate)
    return kept


def _completed(candidate: Candidate, everywhere: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return a candidate's samples with those of its class that were not among the ones it was grown among."""
    further = (labels == candidate.class_index) & (everywhere > candidate.threshold)
    further[list(candidate.own_scores)] = False
    return np.union1d(candidate.samples, np.flatnonzero(further))


def _write_scores(path: Path, name: str, scores: np.ndarray) -> None:
    """Write a table of images, by an index of that name, and their scores."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow([name, "score"])
    writer.writerows((i, f"{score:.6f}") for i, score in enumerate(scores))
    write_text(path, table.getvalue())


def _write(
    context: Context, relevance: Rows, name: str, candidate: Candidate, everywhere: np.ndarray, of_test: np.ndarray
) -> dict[str, Any]:
    """Write a candidate's folder and return its row of `artifacts.json`."""
    folder = context.run_dir / "artifacts" / name
    _write_scores(folder / "scores.csv", "sample_index", everywhere)
    _write_scores(folder / "test_scores.csv", "test_index", of_test)
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
        "test_scores": f"artifacts/{name}/test_scores.csv",
        "score_threshold": candidate.threshold,
        "n_tested": effect["n"],
        "removal_cost": effect["removal_cost"],
        "removal_p_value": candidate.removal_p_value,
        "constant_content": candidate.artifact.constant,
        "mask_share": float(candidate.artifact.mask.mean()),
        "kind": candidate.artifact.kind,
        "unusual": candidate.unusual,
        "told_apart": candidate.trials[0].apart,
        "still_told_apart": candidate.trials[0].still_apart,
        "opacity": candidate.artifact.opacity,
        **{key: effect[key] for key in MORE},
        "sample_bias": asdict(candidate.bias),
        "explanations": [_trial_row(trial) for trial in candidate.trials],
    }


def _trial_row(trial: Trial) -> dict[str, Any]:
    """Return what is told of an explanation that was tried."""
    return {
        "isolator": trial.isolator,
        "kind": trial.artifact.kind,
        "likeness": trial.likeness,
        "explained": trial.explained,
        "separation": trial.separation,
        "told_apart": trial.apart,
        "still_told_apart": trial.still_apart,
        "flip_rate": trial.flip_rate,
        "control_flip_rate": trial.control_flip_rate,
    }


STAGE = Stage(
    name="isolate",
    needs=("train", "attribute", "analyze", "rank"),
    settings=("isolate", "seed"),
    outputs=("artifacts.json", "artifacts/"),
    run=run,
)
