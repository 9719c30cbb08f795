"""The page that compares the runs of a sweep: what differs, what each found, what its corrections gave."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from markupsafe import Markup

from spray.data.truth import read_truth
from spray.report.data import PASSED, ModelResult
from spray.report.record import Results
from spray.report.render import best_correction, environment
from spray.report.verified import chosen, finite, model_result

_HERE = Path(__file__).parent
_OWN = ("run_dir", "stages", "plan")
"""Keys that do not make a run another one."""
_COLUMNS = 4  # settings with a column of their own at most: the verdict is to be seen without scrolling


@dataclass(frozen=True)
class Finding:
    """An artifact that passed the causal test."""

    id: str
    class_name: str
    verdict: str
    flip_rate: float | None
    control_flip_rate: float | None


@dataclass(frozen=True)
class Hit:
    """How a planted artifact was found: by which finding, and with which precision and recall of its samples."""

    what: str
    artifact: str | None = None
    precision: float = 0.0
    recall: float = 0.0


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes
    ----------
    folder : str
        Relative to the sweep's.
    overrides : dict
        What it was given on the command line, by key.
    state : str
        `found`, `none`, `failed`, or `incomplete` (no verdict, but no failure either).
    told : str
        Why there is no verdict, where there is none.
    report : str or None
        Address of its report, relative to the page.
    top_class : tuple of str and float, or None
        The first class of the ranking with its q-value.
    findings, hits : tuple
        Artifacts; how those that were planted were found.
    before, after : ModelResult, optional
        The model under study and its best correction.
    seconds : float
        Of all stages.
    """

    folder: str
    overrides: Mapping[str, str]
    state: str
    told: str = ""
    report: str | None = None
    top_class: tuple[str, float | None] | None = None
    findings: tuple[Finding, ...] = ()
    hits: tuple[Hit, ...] = ()
    n_candidates: int | None = None
    before: ModelResult | None = None
    after: ModelResult | None = None
    seconds: float = 0.0


def read_runs(sweep: Path, lines: Mapping[str, str] | None = None) -> list[Run]:
    """Read the runs in a sweep's folder, by what they were given.

    Parameters
    ----------
    sweep : Path
        The sweep's folder; each folder in it with a configuration or a `run.json` is a run.
    lines : mapping, optional
        Line of the error of runs that failed, by folder, where it is known.
    """
    folders = [path for path in sorted(sweep.iterdir()) if path.is_dir() and _is_run(path)]
    runs = [_run(path, (lines or {}).get(path.name, "")) for path in folders]
    return sorted(runs, key=lambda run: [_natural(value) for value in (*run.overrides.values(), run.folder)])


def render_index(sweep: Path, runs: Sequence[Run], title: str = "") -> str:
    """Return the page of a sweep: HTML with no reference to anything but the reports of its runs, and no script."""
    columns = differing(runs)
    page = (
        environment()
        .get_template("index.html.j2")
        .render(
            title=title or sweep.name,
            runs=runs,
            columns=columns[:_COLUMNS],
            further=columns[_COLUMNS:],
            counts={
                state: sum(run.state == state for run in runs) for state in ("found", "none", "failed", "incomplete")
            },
            n_planted=sum(bool(run.hits) for run in runs if run.state in ("found", "none")),
            n_hit=sum(any(hit.artifact for hit in run.hits) for run in runs),
            same=_same(runs, columns),
            style=Markup((_HERE / "report.css").read_text(encoding="utf-8")),
            own_style=Markup((_HERE / "index.css").read_text(encoding="utf-8")),
        )
    )
    return page.encode("utf-8", "replace").decode()


def differing(runs: Sequence[Run]) -> list[str]:
    """Return the keys that not all runs were given alike, in the order in which they were given."""
    keys = dict.fromkeys(key for run in runs for key in run.overrides)
    return [key for key in keys if len({run.overrides.get(key) for run in runs}) > 1]


def _same(runs: Sequence[Run], columns: Sequence[str]) -> list[tuple[str, str]]:
    first = runs[0].overrides if runs else {}
    return [(key, value) for key, value in first.items() if key not in columns]


def _is_run(path: Path) -> bool:
    return (path / "run.json").is_file() or (path / ".hydra" / "config.yaml").is_file()


def _run(path: Path, line: str) -> Run:
    try:
        results = Results(path)
        found = results.read("isolate")
        return _read(path, results, found, line)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        told = f"its files cannot be read: {type(error).__name__}: {error}"
        return Run(path.name, _overrides(path), "failed", line or told, _report(path))


def _read(path: Path, results: Results, found: Any, line: str) -> Run:
    ranking, verification = results.read("rank"), results.read("verify") or {}
    rows = [] if found is None else found["artifacts"]
    passed = [row for row in rows if row.get("verdict") in PASSED]
    models = tuple(model_result(name, row) for name, row in verification.get("models", {}).items())
    state, told = _state(results, found, bool(passed), line)
    first = next(iter((ranking or {}).get("classes", [])), None)
    return Run(
        folder=path.name,
        overrides=_overrides(path),
        state=state,
        told=told,
        report=_report(path),
        top_class=None if first is None else (str(first["class_name"]), finite(first.get("q_value"))),
        findings=tuple(
            Finding(
                str(row["id"]),
                str(row["class_name"]),
                str(row["verdict"]),
                finite(row.get("flip_rate")),
                finite(row.get("control_flip_rate")),
            )
            for row in passed
        ),
        hits=tuple(_hits(path, passed)) if found is not None else (),
        n_candidates=None if found is None else len(rows),
        before=next((model for model in models if model.name == "original"), None),
        after=_after(verification, models),
        seconds=sum(entry.get("seconds") or 0.0 for entry in results.stages.values()),
    )


def _state(results: Results, found: Any, has_passed: bool, line: str) -> tuple[str, str]:
    """Return the state, and why a run has no verdict or stopped after it."""
    failed = next(((name, entry) for name, entry in results.stages.items() if entry.get("status") == "failed"), None)
    if failed is not None:
        return "failed", f"{failed[0]}: {failed[1].get('error', 'failed')}"
    if line or not results.stages:
        return "failed", line or "it did not come to its first stage; see its run.log"
    if found is None:
        unfinished = [name for name, entry in results.stages.items() if entry.get("status") != "done"]
        return "incomplete", f"{unfinished[0]} was not finished" if unfinished else "isolate was not asked for"
    return ("found" if has_passed else "none"), ""


def _after(verification: Mapping[str, Any], models: tuple[ModelResult, ...]) -> ModelResult | None:
    best = chosen(verification)
    if best is not None:
        return next((model for model in models if model.name == best.method), None)
    return best_correction(models)


def _hits(path: Path, passed: Sequence[Mapping[str, Any]]) -> Iterator[Hit]:
    for row in read_truth(path):
        truth = set(row["samples"])
        if not row["extent"] or not truth:
            continue
        what = f"{row['kind']} on {'all classes' if row['class_name'] is None else row['class_name']}"
        of_class = [
            other for other in passed if row["class_index"] is None or other["class_index"] == row["class_index"]
        ]
        shared = [(len(truth.intersection(other["samples"])), other) for other in of_class]
        most, other = max(shared, key=lambda pair: pair[0], default=(0, None))
        yield (
            Hit(what, str(other["id"]), most / len(other["samples"]), most / len(truth))
            if most and other
            else Hit(what)
        )


def _overrides(path: Path) -> dict[str, str]:
    """Return what a run was given, by key, without what does not make it another run."""
    file = path / ".hydra" / "overrides.yaml"
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else []
    except (OSError, ValueError, yaml.YAMLError):
        given = []
    pairs = (str(text).lstrip("+~").partition("=") for text in given or [])
    # Hydra escapes characters of its own.
    return {key: re.sub(r"\\(.)", r"\1", value) for key, _, value in pairs if key not in _OWN}


def _report(path: Path) -> str | None:
    return f"{quote(path.name)}/report.html" if (path / "report.html").is_file() else None


def _natural(text: str) -> tuple[tuple[int, float, str], ...]:
    """Return what texts are sorted by: numbers in them by their value."""
    parts = re.findall(r"\d+(?:\.\d+)?|\D+", text)
    return tuple((0, float(part), "") if part[0].isdigit() else (1, 0.0, part) for part in parts)
