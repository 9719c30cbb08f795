"""What the page of a comparison shows: which strategies get pictures, and the samples in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from spray.analysis.comparison import Compared, strategies
from spray.analysis.comparison_rule import ONLY, SHARED, VERDICTS, rule
from spray.figures import fitted, relevance_map, shared_limit
from spray.pipelines.context import Context
from spray.pipelines.other_run import plain, read_record
from spray.report.comparison import ComparisonData, Evidence, Example, Model, Strategy, render_comparison
from spray.report.words import PROVENANCE
from spray.store import Attributions

_CARDS, _SHARED_CARDS = 6, 3
"""Strategies with pictures at most: those that only one model has, for each model; and shared ones."""
_MEMBERS, _OTHERS, _AVERAGED = 6, 3, 400
_CAVEATS = (
    "A strategy that only one model has is a difference, not yet a fault: whether it is an artifact, the causal test "
    "of the isolate stage decides.",
    "Shared means that both models treat the same samples as one kind, not that they do so for the same reason: look "
    "at the heatmaps.",
    "Only what SpRAy clusters in at least one of the models can be compared; a strategy that makes no cluster in "
    "either isn't seen.",
    "Seeds of the training can find strategies of their own: of models that differ in nothing else the rule called "
    "0.5 % of the clusters, in 6 % of the classes.",
)


@dataclass(frozen=True, eq=False)
class Found:
    """What was found for the clusters of one model in one group of samples.

    Attributes
    ----------
    own : int
        0 for clusters of this run's model, 1 for those of the other.
    class_index : int or None
        The class; None for a group that is none.
    class_name : str
        Name of the class, or of the group.
    index : ndarray of int64
        (n,): the training samples that were compared.
    rows : list of Compared
        Their clusters.
    """

    own: int
    class_index: int | None
    class_name: str
    index: np.ndarray
    rows: list[Compared]


def page(
    context: Context,
    folder: Path,
    names: tuple[str, str],
    found: Sequence[Found],
    caveats: Sequence[str],
    note: str,
    files: tuple[Attributions, Attributions] | None,
) -> str:
    """Return `comparison.html`."""
    shown = [(part, together, _strategy(part, together)) for part in found for together in strategies(part.rows)]
    # Over all classes the clearest come first.
    shown.sort(key=lambda item: (item[2].own, VERDICTS.index(item[2].verdict), -item[1][0].clear))
    strategies_ = [strategy for _, _, strategy in shown]
    if files is not None:
        for place in _with_pictures(strategies_):
            part, together, strategy = shown[place]
            ordered = files if part.own == 0 else files[::-1]
            evidence = _evidence(context, part.index, together[0].member, ordered)
            strategies_[place] = replace(strategy, evidence=evidence)
    models = [
        Model(name, plain(path), tuple(_provenance(read_record(path))))
        for name, path in zip(names, (context.run_dir, folder), strict=True)
    ]
    return render_comparison(
        ComparisonData(
            title=f"{names[0]} and {names[1]}",
            models=(models[0], models[1]),
            n_samples=len(context.train),
            n_classes=len(context.train.classes),
            strategies=tuple(strategies_),
            rule=tuple(rule()["text"]),
            caveats=(*caveats, *_CAVEATS),
            note=note,
        )
    )


def _with_pictures(rows: Sequence[Strategy]) -> list[int]:
    """Return which strategies get a card: those of one model only or mostly, and the most separable shared ones."""
    only = [
        place
        for own in (0, 1)
        for place in [i for i, row in enumerate(rows) if row.own == own and row.verdict == ONLY][:_CARDS]
    ]
    weaker = [
        place for own in (0, 1) for place in [i for i, row in enumerate(rows) if row.own == own and row.weaker][:_CARDS]
    ]
    shared = [i for i, row in enumerate(rows) if row.own == 0 and row.verdict == SHARED and not row.weaker]
    return [*only, *weaker, *sorted(shared, key=lambda i: -rows[i].separability[0])[:_SHARED_CARDS]]


def _strategy(part: Found, together: Sequence[Compared]) -> Strategy:
    first = together[0]
    return Strategy(
        own=part.own,
        group_name=part.class_name,
        cluster=first.cluster,
        also=tuple(row.cluster for row in together[1:]),
        size=int(first.member.sum()),
        n=len(first.member),
        verdict=first.verdict,
        weaker=first.weaker,
        counterpart=first.overlap.cluster,
        counterpart_size=first.overlap.size,
        jaccard=first.overlap.jaccard,
        p_value=first.overlap.p_value,
        separability=first.separability,
        cohesion=first.cohesion,
        kept=first.kept,
        held=first.held,
        cosine=first.cosine,
        contrast_cosine=first.contrast_cosine,
        retention=first.retention,
    )


def _evidence(
    context: Context, index: np.ndarray, member: np.ndarray, files: tuple[Attributions, Attributions]
) -> Evidence:
    """Return mean heatmaps and examples of a cluster, the own model's file first."""
    rng = np.random.default_rng(0)
    inside, outside = (_some(rng, index[side], _AVERAGED) for side in (member, ~member))
    maps = [(_maps(context, file, inside), _maps(context, file, outside)) for file in files]
    members, rest = ([pair[side].mean(axis=0) for pair in maps] for side in (0, 1))
    limits = [max(float(np.abs(m).max()), float(np.abs(r).max())) for m, r in zip(members, rest, strict=True)]
    examples: tuple[Example, ...] = ()
    others: tuple[Example, ...] = ()
    example_limits = (0.0, 0.0)
    if context.train.image_shape[0] in (1, 3):
        # The most typical are those whose heatmaps have most of what makes the cluster's mean differ.
        contrast = (members[0] - rest[0]).ravel()
        typical = np.argsort(-maps[0][0].reshape(len(inside), -1) @ contrast, kind="stable")[:_MEMBERS]
        drawn = np.arange(min(_OTHERS, len(outside)))
        examples = _examples(context, inside, typical, maps[0][0], maps[1][0])
        others = _examples(context, outside, drawn, maps[0][1], maps[1][1])
        shown = [*examples, *others]
        example_limits = (
            shared_limit([example.relevances[0] for example in shown]),
            shared_limit([example.relevances[1] for example in shown]),
        )
    return Evidence(
        (members[0], members[1]), (rest[0], rest[1]), (limits[0], limits[1]), examples, others, example_limits
    )


def _some(rng: np.random.Generator, samples: np.ndarray, most: int) -> np.ndarray:
    return samples if len(samples) <= most else np.sort(rng.permutation(samples)[:most])


def _maps(context: Context, file: Attributions, samples: np.ndarray) -> np.ndarray:
    """Return the heatmaps (n, H, W) of samples, of the images' size, each divided by its absolute sum."""
    size = context.train.image_shape[1:]
    maps = []
    for _, part in file.batches(samples):
        for relevance in part:
            shown = np.nan_to_num(relevance_map(relevance.astype(np.float64)))
            total = np.abs(shown).sum()
            maps.append(fitted(shown / total if total > 0 else shown, size))
    return np.stack(maps)


def _examples(
    context: Context, samples: np.ndarray, rows: np.ndarray, own: np.ndarray, other: np.ndarray
) -> tuple[Example, ...]:
    if not len(rows):
        return ()
    images = context.train.batch(samples[rows]).numpy()
    return tuple(
        Example(plain(context.train.names[int(samples[row])]), int(samples[row]), image, (own[row], other[row]))
        for row, image in zip(rows, images, strict=True)
    )


def _provenance(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    told = [(name, plain(run[key])) for key, name in PROVENANCE.items() if run.get(key) is not None]
    return told + [(f"Content of {plain(key)}", plain(value)) for key, value in dict(run.get("inputs", {})).items()]
