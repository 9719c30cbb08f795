"""What a run directory tells of its run: which stages count, how it was made, what it wrote."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spray.csvs import unguarded
from spray.data.base import ImageDataset
from spray.report.data import Check, OutputRow, StageRow
from spray.report.words import LABELS, PROVENANCE, number
from spray.storage import read_json

FILES = {
    "train": "model.pt",
    "attribute": "attributions.h5",
    "analyze": "analysis.h5",
    "rank": "ranking.json",
    "isolate": "artifacts.json",
    "correct": "corrected",
    "verify": "verification.json",
}
"""The stages that the report tells of, in order, and the file that the report reads of each."""

_FACTS = 14  # further facts shown at most
_TEXT = 160  # characters of one of them
_CONFIG = 60_000  # characters of the configuration
_OUTPUTS = 60  # files listed at most


class Results:
    """The results in a run directory that count.

    A file counts where `run.json` says that its stage is done; where it says nothing of that stage, if the file is
    there. What an earlier run with other settings left behind, or one that failed, doesn't count.

    Parameters
    ----------
    run_dir : Path
        The run directory; every file in it may be missing.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = Path(run_dir)
        self.run: dict[str, Any] = self._json("run.json") or {}
        self.stages: dict[str, dict[str, Any]] = self.run.get("stages", {})

    def path(self, stage: str) -> Path | None:
        """Return the file of a stage, None if it is missing or does not count."""
        entry, path = self.stages.get(stage), self.run_dir / FILES[stage]
        if entry is not None and entry.get("status") != "done":
            return None
        return path if path.exists() else None

    def read(self, stage: str) -> Any:
        """Return what the JSON file of a stage holds, None if it does not count."""
        path = self.path(stage)
        return None if path is None else read_json(path)

    def _json(self, name: str) -> Any:
        path = self.run_dir / name
        return read_json(path) if path.is_file() else None

    def stage_rows(self) -> Iterator[StageRow]:
        """Yield all stages but the report itself, and what became of them."""
        others = [name for name in self.stages if name not in FILES and name != "report"]
        for name in (*FILES, *others):
            entry = self.stages.get(name)
            if entry is None:
                yield StageRow(name, "done" if (self.run_dir / FILES[name]).exists() else "not asked")
                continue
            status = str(entry.get("status", "unknown"))
            if status == "pending" and entry.get("stale"):
                status = "stale"
            yield StageRow(
                name,
                status,
                entry.get("seconds"),
                facts(entry.get("facts") or {}) if status == "done" else (),
                entry.get("started"),
                str(entry["error"]) if status == "failed" and entry.get("error") else entry.get("stale"),
            )

    def provenance(self, dataset: ImageDataset) -> Iterator[tuple[str, str]]:
        """Yield how the run was made: name and value."""
        run = self.run
        if command := run.get("command"):
            yield "Command", command if isinstance(command, str) else shlex.join(map(str, command))
        for name, key, pick in (("Started", "started", min), ("Finished", "finished", max)):
            if times := [entry[key] for entry in self.stages.values() if entry.get(key)]:
                yield name, pick(times)
        for key, name in PROVENANCE.items():
            if run.get(key) is not None:
                yield name, str(run[key])
        if run.get("threads") is not None:
            yield "Threads", str(run["threads"])
        for name, hashed in (run.get("inputs") or {"dataset.train": dataset.fingerprint}).items():
            yield f"Content of {name}, SHA-256", str(hashed)

    def versions(self) -> tuple[tuple[str, str], ...]:
        """Return the versions of the libraries."""
        return tuple((name, str(version)) for name, version in self.run.get("versions", {}).items() if version)

    def config(self) -> str:
        """Return the resolved configuration as YAML, empty where it isn't there."""
        path = self.run_dir / ".hydra" / "config.yaml"
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        return text if len(text) <= _CONFIG else text[:_CONFIG] + "\n…"

    def outputs(self) -> tuple[OutputRow, ...]:
        """Return the files that finished stages wrote, in the order of the stages."""
        rows = [
            OutputRow(path, int(said.get("bytes", 0)), str(said.get("sha256", "")))
            for name, entry in self.stages.items()
            if name != "report" and entry.get("status") == "done"
            for path, said in entry.get("outputs", {}).items()
        ]
        return tuple(rows[:_OUTPUTS])

    def quarantined(self) -> dict[int, str]:
        """Return the training samples that couldn't be explained, with name and reason."""
        path = self.run_dir / "quarantined.csv"
        if not path.is_file():
            return {}
        with path.open(newline="", encoding="utf-8") as file:
            # The others had been left out from the start.
            rows = [row for row in csv.DictReader(file) if row["sample_index"]]
        return {
            int(
                row["sample_index"]
            ): f"{unguarded(row['name'])} (sample {row['sample_index']}): {unguarded(row['reason'])}"
            for row in rows
        }


def skipped(dataset: ImageDataset, test: ImageDataset | None, quarantined: Mapping[int, str]) -> tuple[str, ...]:
    """Say which samples were left out, and which have a row of zeros instead of a heatmap, and why."""
    left_out = [
        f"{which}{name}: {why}"
        for part, which in ((dataset, ""), (test, "test image "))
        for name, why in getattr(part, "unreadable", ())
    ]
    return (*left_out, *quarantined.values())


def facts(values: Mapping[str, Any], known: frozenset[str] = frozenset()) -> tuple[tuple[str, str], ...]:
    """Return values as they are printed, by name, without those that are known, lists of rows and intervals."""
    shown = [
        (LABELS.get(key, key.replace("_", " ")), _text(value, values.get(f"{key}_interval")))
        for key, value in values.items()
        if key not in known and not key.endswith("_interval") and value not in (None, [], {}) and not _is_deep(value)
    ]
    return tuple(shown[:_FACTS])


def check(title: str, value: Any) -> Check | None:
    """Return a mapping, or a list of mappings, as a table; None for anything else or nothing."""
    if isinstance(value, Mapping) and value:
        return Check(title, ("", ""), tuple((str(key).replace("_", " "), _text(row)) for key, row in value.items()))
    if not _is_table(value):
        return None
    columns = list(dict.fromkeys(key for row in value for key in row))
    rows = tuple(tuple("–" if row.get(key) is None else _text(row[key]) for key in columns) for row in value)
    return Check(title, tuple(key.replace("_", " ") for key in columns), rows)


def tables(values: Mapping[str, Any]) -> tuple[Check, ...]:
    """Return those values that are lists of rows, as tables."""
    made = (check(LABELS.get(key, key.replace("_", " ").capitalize()), value) for key, value in values.items())
    return tuple(table for table, value in zip(made, values.values(), strict=True) if table and _is_table(value))


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)


def _is_deep(value: Any) -> bool:
    """Return whether a value has parts that have parts, which no line of text could hold."""
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return any(isinstance(part, list | Mapping) for part in parts)


def _text(value: Any, interval: Any = None) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        spread = interval if isinstance(interval, list) and len(interval) == 2 else None
        ends = f" ({number(spread[0])} – {number(spread[1])})" if spread and None not in spread else ""
        return (number(value) if np.isfinite(value) else str(value)) + ends
    if isinstance(value, list) and all(isinstance(part, str | int | float) for part in value):
        value = ", ".join(map(_text, value))
    if isinstance(value, Mapping):
        value = ", ".join(f"{str(key).replace('_', ' ')} {_text(part)}" for key, part in value.items())
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _TEXT else text[: _TEXT - 1] + "…"
