"""On request: the strategies of two models on the same samples, side by side.

The other model is another run's (`compare.other=RUN_DIR`), or this run's own model after a correction
(`compare.correction=a_clarc`), which is then explained and clustered as configured, in a run of its own in
`compared/<method>/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import threadpool_limits

from spray.analysis.comparison import Compared, Side, compare, strategies
from spray.analysis.comparison_rule import ONLY, VERDICTS, rule
from spray.analysis.preprocessing import heatmap_features
from spray.correction import CORRECTIONS
from spray.correction.base import CONTROL
from spray.errors import UserError
from spray.pipelines.analysis_options import preprocessing_of, source_array
from spray.pipelines.analyze import read_features
from spray.pipelines.comparison_page import Found, page
from spray.pipelines.context import Context
from spray.pipelines.other_run import ANALYSIS, ATTRIBUTIONS, open_other, plain, read_record
from spray.pipelines.rounds import inside
from spray.pipelines.stage import Stage
from spray.report.words import model_name
from spray.storage import write_json, write_text
from spray.store import Attributions, open_attributions
from spray.store.analyses import ALL, Analysis, class_group, open_analysis, predicted_group

if TYPE_CHECKING:
    from spray.pipelines.config import SprayConfig

SIDES = ("this", "other")


def run(context: Context) -> dict[str, Any]:
    """Write `comparison.json` and `comparison.html`."""
    method = context.config.compare.correction
    if method is None:
        folder = Path(str(context.config.compare.other))
        names = _two_names(context.run_dir, folder)
    else:
        names = model_name("original"), model_name(method)
        folder = context.run_dir / "compared" / method
        if not _explain_corrected(context, method, folder):
            note = "There is no corrected model: no artifact passed the causal test, so nothing was corrected."
            context.log.info("%s", note)
            return _write(context, folder, names, [], [], note)
    shape = (len(context.train), None, None, None)
    with (
        open_attributions(context.run_dir / ATTRIBUTIONS, shape=shape) as ours,
        open_other(folder, context.train) as theirs,
        # On matrices this small more threads only wait for each other.
        threadpool_limits(1),
    ):
        groups = common_groups(context, folder)
        grid = _common_grid(context, ours, theirs)
        found: list[Found] = []
        for group in context.progress(groups, len(groups), "classes compared"):
            sides, index = _sides(context, group, (ours, theirs), grid)
            for own in (0, 1):
                options, seed = context.config.analysis, context.config.seed
                rows = compare(sides[own], sides[1 - own], options.n_neighbors, options.metric, seed)
                found.append(Found(own, group.class_index, group.title, index, rows))
        caveats = _caveats(ours, theirs, folder)
        facts = _write(context, folder, names, found, caveats, "", (ours, theirs))
    for own in (0, 1):
        context.log.info("%d strategies only in %s", facts["only"][SIDES[own]], names[own])
    return facts


@dataclass(frozen=True, eq=False)
class Group:
    """Samples that both runs clustered together, such as a class, in ascending order.

    Attributes
    ----------
    class_index : int or None
        The class, None for a group that is none.
    title : str
        The class's name, or the group's.
    index : ndarray of int64
        (n,): its training samples.
    clusterings : tuple of dict
        Labels (n,) by the clustering's name, in this run and in the other.
    """

    class_index: int | None
    title: str
    index: np.ndarray
    clusterings: tuple[dict[str, np.ndarray], dict[str, np.ndarray]]


def common_groups(context: Context, folder: Path) -> list[Group]:
    """Return the groups of samples that both runs clustered.

    Raises
    ------
    UserError
        If there are none, or a file is damaged.
    """
    n, groups = len(context.train), []
    with (
        open_analysis(context.run_dir / ANALYSIS, n) as ours,
        open_analysis(folder / ANALYSIS, n) as theirs,
    ):
        for name in [name for name in ours.names if name in theirs.names]:
            parts = [_clusterings(analysis, name) for analysis in (ours, theirs)]
            if np.array_equal(parts[0][0], parts[1][0]):
                index, title = _class(context, name)
                groups.append(Group(index, title, parts[0][0], (parts[0][1], parts[1][1])))
        left_out = len({*ours.names, *theirs.names}) - len(groups)
    if not groups:
        raise UserError(f"{folder / ANALYSIS} has no group of the same samples as {context.run_dir / ANALYSIS}")
    if left_out:
        context.log.info("%d groups that do not hold the same samples in both runs are left out", left_out)
    return groups


def _clusterings(analysis: Analysis, name: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return a group's samples, ascending, and their labels in each clustering."""
    group = analysis.group(name)
    order = np.argsort(group.index, kind="stable")
    return group.index[order], {plain(each): group.labels(each)[order] for each in group.clusterings}


def _class(context: Context, name: str) -> tuple[int | None, str]:
    """Return class index and class name of a group; for one that is no class None and what it is."""
    for c, class_name in enumerate(context.train.classes):
        if name == class_group(c):
            return c, class_name
        if name == predicted_group(c):
            return None, f"predicted as {class_name}"
    return None, "all samples" if name == ALL else plain(name)


def _sides(
    context: Context, group: Group, files: tuple[Attributions, Attributions], grid: int | None
) -> tuple[tuple[Side, Side], np.ndarray]:
    """Return what both models give for a group, without samples whose heatmap is zero in one; and its samples."""
    options = context.config.analysis
    features = [
        read_features(file, group.index, preprocessing_of(options), source_array(options)).values for file in files
    ]
    maps = [None if grid is None else heatmaps(file, group.index, grid) for file in files]
    # In one of them nothing is known of such a sample: it would be the other model's difference.
    used = features[0].any(axis=1) & features[1].any(axis=1)
    sides = [
        Side(
            part[used],
            {name: labels[used] for name, labels in clusterings.items()},
            None if shown is None else shown[used],
        )
        for part, clusterings, shown in zip(features, group.clusterings, maps, strict=True)
    ]
    return (sides[0], sides[1]), group.index[used]


def heatmaps(attributions: Attributions, index: np.ndarray, grid: int) -> np.ndarray:
    """Return small heatmaps (n, p), each divided by its absolute sum."""
    parts = [heatmap_features(part.astype(np.float32), grid) for _, part in attributions.batches(index)]
    return np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)


def _common_grid(context: Context, ours: Attributions, theirs: Attributions) -> int | None:
    """Return the size of the small heatmaps, the same in both runs; None where their proportions differ."""
    (h, w), (other_h, other_w) = ours.attribution.shape[2:], theirs.attribution.shape[2:]
    if h * other_w != w * other_h:
        return None
    grid: int = context.config.analysis.grid
    return grid if (h, w) == (other_h, other_w) else min(grid, h, w, other_h, other_w)


def _explain_corrected(context: Context, method: str, folder: Path) -> bool:
    """Explain and cluster the corrected model in a run of its own; False if there is none."""
    weights = context.run_dir / "corrected" / f"{method}.pt"
    if not weights.is_file():
        return False
    from spray.pipelines.runner import run_part

    context.log.info("explaining %s in %s", model_name(method), folder)
    part = context.with_model(weights, folder)
    # Where a projection wraps the model its layers have other names.
    part.config = inside(part.config, context.load_model(weights))
    run_part(part, ["train", "attribute", "analyze"])
    return True


def _two_names(ours: Path, theirs: Path) -> tuple[str, str]:
    """Return what the models are called: by their folders' names, as far as these tell them apart."""
    a, b = ours.resolve(), theirs.resolve()
    return (a.name, b.name) if a.name != b.name else (str(a), str(b))


def _caveats(ours: Attributions, theirs: Attributions, folder: Path) -> list[str]:
    """Return what makes the runs differ in more than their models."""
    caveats = []
    for key in ("method", "composite", "target", "channels"):
        said = [str(file.attributes.get(key, "unknown"))[:200] for file in (ours, theirs)]
        if said[0] != said[1]:
            caveats.append(f"The models were not explained in the same way: {key} is {said[0]} here, {said[1]} there.")
    if not read_record(folder):
        caveats.append("The other folder has no run.json: only labels and number tell that its samples are the same.")
    return caveats


def _write(
    context: Context,
    folder: Path,
    names: tuple[str, str],
    found: Sequence[Found],
    caveats: Sequence[str],
    note: str,
    files: tuple[Attributions, Attributions] | None = None,
) -> dict[str, Any]:
    """Write both files; return the stage's facts."""
    rows: list[dict[str, Any]] = []
    clusters: list[dict[str, Any]] = []
    for part in found:
        for together in strategies(part.rows):
            clusters += [_row(part, each) | {"strategy": len(rows)} for each in together]
            rows.append(_row(part, together[0]) | {"clusters": [each.cluster for each in together]})
            if together[0].verdict == ONLY:
                rows[-1]["samples"] = part.index[together[0].member].tolist()
    counts = {
        SIDES[own]: {v: sum(row["model"] == SIDES[own] and row["verdict"] == v for row in rows) for v in VERDICTS}
        for own in (0, 1)
    }
    data = {
        "models": {side: {"name": name} for side, name in zip(SIDES, names, strict=True)},
        "samples": len(context.train),
        "rule": rule(),
        "strategies_by_verdict": counts,
        "strategies": rows,
        "clusters": clusters,
        "note": note,
    }
    write_json(context.run_dir / "comparison.json", data)
    html = page(context, folder, names, found, caveats, note, files)
    write_text(context.run_dir / "comparison.html", html)
    return {"strategies": len(rows), "only": {side: count["only"] for side, count in counts.items()}}


def _row(part: Found, row: Compared) -> dict[str, Any]:
    """Return what `comparison.json` says of a cluster."""
    return {
        "model": SIDES[part.own],
        "class_index": part.class_index,
        "class_name": part.class_name,
        "cluster": row.cluster,
        "size": int(row.member.sum()),
        "n": len(row.member),
        "verdict": row.verdict,
        "weaker": row.weaker,
        "clear": row.clear,
        "counterpart": asdict(row.overlap) if row.overlap.cluster else None,
        "separability": {"own": row.separability[0], "other": row.separability[1], "kept": row.kept},
        "cohesion": {"own": row.cohesion[0], "other": row.cohesion[1], "kept": row.held},
        "cosine": row.cosine,
        "contrast_cosine": row.contrast_cosine,
        "retention": row.retention,
    }


def check(config: SprayConfig) -> None:
    """Check the configuration `compare`.

    Raises
    ------
    UserError
        If it doesn't name exactly one other model, or a correction that isn't made.
    """
    options = config.compare
    if (options.other is None) == (options.correction is None):
        raise UserError(
            "stage compare needs another model: give compare.other=RUN_DIR of another run on the same data, or "
            "compare.correction=METHOD for this one's corrected model (not both)"
        )
    if options.correction is not None:
        CORRECTIONS.get(options.correction)
        made = [CONTROL, *config.correction.methods] if config.correction.methods else []
        if options.correction not in made:
            raise UserError(
                f"compare.correction={options.correction} is not among correction.methods="
                f"{list(config.correction.methods)}; add it there"
            )


def _also_needs(config: SprayConfig) -> tuple[str, ...]:
    return ("correct",) if config.compare.correction is not None else ()


STAGE = Stage(
    name="compare",
    needs=("attribute", "analyze"),
    settings=("compare", "seed", "analysis"),
    outputs=("comparison.json", "comparison.html"),
    run=run,
    also_needs=_also_needs,
)
