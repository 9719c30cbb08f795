"""Runs an experiment with and without its planted artifact, for several seeds, and says what was found.

    python scripts/controlled_study.py photos_tag fashion_mnist_tag --seeds 0 1 2 3 4 --out outputs/study

Each cell is one run of `spray` in a folder of its own; a study that was stopped goes on where it was. The table
goes to standard output and, with every number, to study.json in the output folder. Exit code 1 if a criterion is
missed; the misses are listed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOUND = ("clever_hans", "backdoor")


def main() -> int:
    """Run the cells that are asked for, print the table, name the misses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("outputs/study"))
    parser.add_argument("--arms", nargs="+", choices=("planted", "clean"), default=["planted", "clean"])
    options, overrides = parser.parse_known_args()
    rows = []
    for experiment in options.experiments:
        for arm in options.arms:
            for seed in options.seeds:
                folder = options.out / experiment / f"{arm}-{seed}"
                seconds = _run(experiment, arm, seed, folder, overrides)
                rows.append({"experiment": experiment, "arm": arm, "seed": seed, "seconds": seconds, **_read(folder)})
                print(_line(rows[-1]), file=sys.stderr, flush=True)
    (options.out / "study.json").write_text(json.dumps(rows, indent=2))
    print(_table(rows))
    misses = [miss for row in rows for miss in _misses(row)] + list(_ranking_misses(rows))
    print("\nMisses: " + ("none" if not misses else ""))
    for miss in misses:
        print(f"- {miss}")
    return 1 if misses else 0


def _run(experiment: str, arm: str, seed: int, folder: Path, overrides: list[str]) -> float:
    """Run one cell; return its seconds, from the run's own record if it had been done before."""
    command = [sys.executable, "-m", "spray.pipelines.cli", f"experiment={experiment}", f"seed={seed}"]
    command += [f"run_dir={folder}", *overrides]
    if arm == "clean":
        command.append("dataset.plant.rate=0")
    seconds = folder / "seconds.txt"
    start = time.monotonic()
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        sys.exit(f"{' '.join(command)}\nended with {result.returncode}:\n{result.stderr}")
    if not seconds.exists():
        seconds.write_text(f"{time.monotonic() - start:.1f}\n")
    return float(seconds.read_text())


def _read(folder: Path) -> dict[str, Any]:
    """Return what the study wants to know of one run."""
    ranking, artifacts, models, run = (
        json.loads((folder / name).read_text())
        for name in ("ranking.json", "artifacts.json", "verification.json", "run.json")
    )
    models, artifacts = models["models"], artifacts["artifacts"]
    truth = _truth(folder)
    found = [row for row in artifacts if row["verdict"] in FOUND]
    first = artifacts[0] if artifacts else None
    row: dict[str, Any] = {
        "first_class": ranking["classes"][0]["class_name"],
        "tau": [round(c["separability"], 2) for c in ranking["classes"][:2]],
        "candidates": len(artifacts),
        "found": [[f["class_name"], f["verdict"], f["flip_rate"], f["control_flip_rate"]] for f in found],
        "largest_gap_without_verdict": max(
            (a["flip_rate"] - a["control_flip_rate"] for a in artifacts if a["verdict"] not in FOUND), default=None
        ),
        "clean": {name: model["clean_accuracy"] for name, model in models.items()},
        "attacked": {name: model["attacked_accuracy"] for name, model in models.items()},
        "attacked_by_truth": {n: m["planted"]["attacked_accuracy"] for n, m in models.items() if "planted" in m},
        "stages": {name: stage["seconds"] for name, stage in run["stages"].items()},
    }
    if truth and first:
        samples = set(first["samples"])
        row |= {
            "planted_class": truth["class_name"],
            "artifact_class": first["class_name"],
            "verdict": first["verdict"],
            "precision": len(samples & set(truth["samples"])) / len(samples) if samples else 0.0,
            "recall": len(samples & set(truth["samples"])) / len(truth["samples"]),
        }
    return row


def _truth(folder: Path) -> dict[str, Any] | None:
    """Return what the run says of the first artifact that was planted; None where no sample carries one."""
    from spray.data.truth import read_truth

    return next((row for row in read_truth(folder) if row["samples"]), None)


def _misses(row: dict[str, Any]) -> Iterable[str]:
    """Yield what one run misses of the criteria."""
    name = f"{row['experiment']} {row['arm']} seed {row['seed']}"
    if row["arm"] == "clean":
        for class_name, verdict, flips, control in row["found"]:
            yield f"{name}: {verdict} in {class_name} ({flips:.2f} against {control:.2f}) on a clean model"
        return
    clean, attacked, truly = row["clean"], row["attacked"], row["attacked_by_truth"]
    if row.get("artifact_class") != row.get("planted_class") or row.get("verdict") not in FOUND:
        yield f"{name}: the first artifact is {row.get('verdict')} in {row.get('artifact_class')}"
        return
    if row["precision"] < 0.95 or row["recall"] < 0.95:
        yield f"{name}: precision {row['precision']:.3f}, recall {row['recall']:.3f}"
    if clean["original"] - truly["original"] < 0.2:
        yield f"{name}: attacked accuracy only falls from {clean['original']:.3f} to {truly['original']:.3f}"
    for kind, values in (("isolated", attacked), ("planted", truly)):
        if values["a_clarc"] < clean["original"] - 0.02:
            yield (
                f"{name}: A-ClArC's accuracy with the {kind} artifact is {values['a_clarc']:.3f}, "
                f"clean accuracy {clean['original']:.3f}"
            )


def _ranking_misses(rows: list[dict[str, Any]]) -> Iterable[str]:
    """Yield the experiments in which the planted class is not first in at least four of five seeds."""
    for experiment in dict.fromkeys(row["experiment"] for row in rows):
        planted = [row for row in rows if row["experiment"] == experiment and row["arm"] == "planted"]
        first = [row["first_class"] == row.get("planted_class") for row in planted]
        if planted and sum(first) < 0.8 * len(first):
            yield f"{experiment}: the planted class ranks first in {sum(first)} of {len(first)} seeds"


def _line(row: dict[str, Any]) -> str:
    return f"{row['experiment']} {row['arm']} {row['seed']}: {row['seconds']:.0f} s, found {row['found']}"


def _table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as two Markdown tables, one for each arm."""
    lines = []
    planted = [row for row in rows if row["arm"] == "planted"]
    if planted:
        lines += [
            "| experiment, seed | first class (τ, next) | first artifact | precision / recall | clean | attacked | "
            "A-ClArC clean / attacked | P-ClArC attacked | fine-tuned attacked |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
    for row in planted:
        clean, attacked = row["clean"], row["attacked_by_truth"]
        lines.append(
            f"| {row['experiment']}, {row['seed']} | {row['first_class']} ({row['tau'][0]}, {row['tau'][1]}) "
            f"| {row.get('verdict')} in {row.get('artifact_class')} "
            f"| {row.get('precision', 0):.3f} / {row.get('recall', 0):.3f} "
            f"| {clean['original']:.3f} | {attacked['original']:.3f} "
            f"| {_number(clean, 'a_clarc')} / {_number(attacked, 'a_clarc')} | {_number(attacked, 'p_clarc')} "
            f"| {_number(attacked, 'fine_tuned')} |"
        )
    if clean_rows := [row for row in rows if row["arm"] == "clean"]:
        lines += [
            "",
            "| experiment, seed (nothing planted) | candidates tested | false verdicts | "
            "largest flip rate above control | clean |",
            "|---|---|---|---|---|",
        ]
        for row in clean_rows:
            gap = row["largest_gap_without_verdict"]
            lines.append(
                f"| {row['experiment']}, {row['seed']} | {row['candidates']} | {len(row['found'])} "
                f"| {'–' if gap is None else format(gap, '.3f')} | {row['clean']['original']:.3f} |"
            )
    return "\n".join(lines)


def _number(values: dict[str, float], name: str) -> str:
    return f"{values[name]:.3f}" if name in values else "–"


if __name__ == "__main__":
    sys.exit(main())
