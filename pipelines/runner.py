"""Runs the asked stages in a locked run directory; finished ones with nothing changed are skipped."""

from __future__ import annotations

import fcntl
import os
import random
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spray.errors import UserError
from spray.factories import files
from spray.pipelines.record import (
    Record,
    changed_output,
    describe_outputs,
    digest,
    find_outputs,
    header,
    now,
    stamp,
)
from spray.pipelines.stage import Stage
from spray.pipelines.validate import check_settings, try_out
from spray.storage import remove_leftovers, sha256, write_text

if TYPE_CHECKING:
    from spray.pipelines.context import Context

RESULT_FORMAT = 4
"""Raised when a stage's results change though no setting does: older ones are then computed again."""


@dataclass(frozen=True)
class Decision:
    """What is to be done about a stage, and why."""

    stage: Stage
    key: str
    settings: dict[str, Any]
    upstream: dict[str, str]
    reason: str | None
    """Why the stage has to run; None if its results are up to date."""


def run_stages(context: Context, asked: Sequence[str], stages: Mapping[str, Stage]) -> None:
    """Bring the asked stages up to date; the caller holds the run directory's lock.

    Parameters
    ----------
    context : Context
        Configuration, run directory, data.
    asked : sequence of str
        Names of the stages, in order.
    stages : mapping
        The asked stages and all that they need, by name, in order.

    Raises
    ------
    UserError
        For a mistake in configuration or data, or a needed stage that is neither asked nor up to date.
    """
    check_settings(context, asked)
    remove_leftovers(context.run_dir)
    inputs = find_inputs(context)
    record = Record(context.run_dir)
    decisions = decide(context, asked, stages, record, inputs)
    waiting = [decision for decision in decisions if decision.reason is not None]
    record.header = header(context.config, str(context.device), inputs)
    if waiting:
        try_out(context, [decision.stage.name for decision in waiting])
    for decision in decisions:
        record.stages.setdefault(decision.stage.name, {"status": "pending"})
    for decision in decisions:
        if decision.reason is None:
            context.log.info("%s: up to date", decision.stage.name)
        else:
            _run(context, decision, record)
        decision.stage.tidy(context)
    record.save()


def run_part(context: Context, asked: Sequence[str]) -> None:
    """Bring stages of a run inside a run up to date: one for the same data, with a folder and a lock of its own.

    Parameters
    ----------
    context : Context
        As `Context.sibling` returns it; its folder need not exist.
    asked : sequence of str
        Names of the stages, in order.
    """
    from omegaconf import OmegaConf

    from spray.pipelines.stages import load

    context.run_dir.mkdir(parents=True, exist_ok=True)
    with locked(context.run_dir):
        config = OmegaConf.create(asdict(context.config))
        write_text(context.run_dir / ".hydra" / "config.yaml", OmegaConf.to_yaml(config))
        run_stages(context, asked, load(asked, context.config))


def decide(
    context: Context,
    asked: Sequence[str],
    stages: Mapping[str, Stage],
    record: Record,
    inputs: Mapping[str, str],
) -> list[Decision]:
    """Say for each asked stage whether it has to run, and why.

    Raises
    ------
    UserError
        If a stage needs another one that is neither asked nor up to date.
    """
    decisions: dict[str, Decision] = {}
    for name, stage in stages.items():
        settings = _settings(context, stage, inputs)
        upstream = {need: decisions[need].key for need in stage.needs}
        key = digest({"settings": settings, "upstream": upstream, "format": RESULT_FORMAT})
        redone = [need for need in stage.needs if decisions[need].reason is not None]
        reason = _reason(context.run_dir, record.stages.get(name), settings, key, redone)
        decisions[name] = Decision(stage, key, settings, upstream, reason)
    for name, decision in decisions.items():
        if name not in asked and decision.reason is not None:
            wanted = [other for other in stages if other in asked or decisions[other].reason is not None]
            raise UserError(
                f"the asked stages need the results of {name}, which are not up to date in {context.run_dir} "
                f"({decision.reason}); ask for it too: stages=[{','.join(wanted)}]"
            )
    return [decisions[name] for name in asked]


def find_inputs(context: Context) -> dict[str, str]:
    """Return the hashes of what comes from outside: images, the user's code, weights, another run."""
    inputs = {"dataset.train": context.train.fingerprint, "dataset.test": context.test.fingerprint}
    model = context.config.model
    if model.checkpoint is not None:
        inputs["model.checkpoint"] = _hash_file(model.checkpoint, "model.checkpoint")
    for key, factory in (("model.factory", model.factory), ("dataset.factory", context.config.dataset.factory)):
        # With the modules beside it that it imports.
        hashes = {name: _hash_file(str(path), key) for name, path in files(factory).items()} if factory else {}
        if hashes:
            inputs[key] = next(iter(hashes.values())) if len(hashes) == 1 else digest(hashes)
    if context.config.compare.other is not None:
        from spray.pipelines.other_run import content_hashes

        inputs["compare.other"] = digest(content_hashes(Path(context.config.compare.other)))
    if "held_out" in context.config.rank.evidence:
        from spray.pipelines.again import other_heatmaps
        from spray.pipelines.other_run import content_hashes

        if (folder := other_heatmaps(context.config)) is not None:
            inputs["rank.held_out"] = digest(content_hashes(folder, "rank.held_out", ["attribute"]))
    return inputs


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run directory alone while the block runs.

    Raises
    ------
    UserError
        If another process holds it.
    """
    try:
        lock = (run_dir / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"run_dir={run_dir} cannot be written: {error.strerror}; choose another") from error
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                f"another spray ({file.read().strip() or 'pid unknown'}) is using {run_dir}; "
                "wait for it or choose another run_dir"
            ) from error
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _run(context: Context, decision: Decision, record: Record) -> None:
    """Run one stage and record it, whatever becomes of it."""
    stage, before = decision.stage, record.stages[decision.stage.name]
    if before["status"] == "pending" and "key" not in before:
        context.log.info("%s: running", stage.name)
    else:
        context.log.info("%s: recomputed because %s", stage.name, decision.reason)
    entry: dict[str, Any] = {
        "status": "running",
        "key": decision.key,
        "settings": decision.settings,
        "upstream": decision.upstream,
        "seconds": None,
        "started": now(),
        "finished": None,
        # What an earlier run wrote stays until it is written again.
        "outputs": before.get("outputs", {}),
        "facts": {},
    }
    record.stages[stage.name] = entry
    record.mark_stale(stage.name)
    record.save()
    old = {path: stamp(path) for path in find_outputs(context.run_dir, stage.outputs)}
    own = [path for path in old if _wrote(before, path, context.run_dir)]
    start = time.monotonic()
    _seed(context.config.seed)
    context.key = decision.key
    try:
        facts = stage.run(context)
        for path in own:
            if stamp(path) == old[path] and path.relative_to(context.run_dir).as_posix() not in stage.outputs:
                path.unlink()
        entry |= {"status": "done", "outputs": _outputs(context.run_dir, stage, old), "facts": facts or {}}
    except BaseException as error:
        entry |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        raise
    finally:
        entry |= {"seconds": round(time.monotonic() - start, 3), "finished": now()}
        record.save()
        context.forget_model()
    context.log.info("%s: done in %.1f s", stage.name, entry["seconds"])


def _outputs(run_dir: Path, stage: Stage, old: Mapping[Path, Any]) -> dict[str, dict[str, Any]]:
    """Describe what a stage wrote: the files it names, and of folders and globs those that are not old."""
    for name in stage.outputs:
        may_be_empty = name.endswith("/") or any(mark in name for mark in "*?[")
        if not may_be_empty and not (run_dir / name).exists():
            raise RuntimeError(f"stage {stage.name} did not write {name}")
    found = find_outputs(run_dir, stage.outputs)
    named = [run_dir / name for name in stage.outputs]
    return describe_outputs(run_dir, [path for path in found if path in named or stamp(path) != old.get(path)])


def _wrote(entry: Mapping[str, Any], path: Path, run_dir: Path) -> bool:
    """Say whether an earlier run of a stage wrote a file, so that a later one may remove it."""
    if path.relative_to(run_dir).as_posix() in entry.get("outputs", {}):
        return True
    # A run that was cut short recorded nothing.
    cut_short = entry["status"] in ("running", "failed")
    return cut_short and path.stat().st_mtime >= datetime.fromisoformat(entry["started"]).timestamp()


def _reason(
    run_dir: Path, entry: dict[str, Any] | None, settings: dict[str, Any], key: str, redone: Sequence[str]
) -> str | None:
    """Say why a stage has to run, going by its entry in run.json; None if it is up to date."""
    if entry is None or "key" not in entry:
        return "it was not computed yet"
    if changes := _changes(entry["settings"], settings):
        return changes[0] + (f" (and {len(changes) - 1} more)" if len(changes) > 1 else "")
    if entry["status"] == "running":
        return "it did not finish"
    if entry["status"] == "failed":
        return f"it failed before ({entry['error']})"
    if entry["status"] == "pending":
        return str(entry["stale"])
    if redone:
        return f"{redone[0]} was recomputed"
    if entry["key"] != key:
        return "the format of results changed"
    return changed_output(run_dir, entry["outputs"])


def _settings(context: Context, stage: Stage, inputs: Mapping[str, str]) -> dict[str, Any]:
    """Return what decides a stage's result, flat: dotted path to value, inputs as their hashes."""
    config = asdict(context.config)
    settings: dict[str, Any] = {}
    for path in stage.settings:
        value: Any = config
        for part in path.split("."):
            value = value[part]
        settings |= _flatten(path, value)
    groups = {path.partition(".")[0] for path in stage.settings}
    used = {name: hashed for name, hashed in inputs.items() if name.partition(".")[0] in groups}
    return settings | {f"content of {name}": hashed for name, hashed in used.items()}


def _flatten(path: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    parts = [_flatten(f"{path}.{key}", part) for key, part in value.items()]
    return {name: leaf for part in parts for name, leaf in part.items()}


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    missing = object()
    return [
        f"{name} changed from {_show(old[name])} to {_show(new[name])}"
        if name in old and name in new
        else f"{name} was {'added' if name in new else 'dropped'}"
        for name in dict.fromkeys([*new, *old])
        if old.get(name, missing) != new.get(name, missing)
    ]


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:18] + "…" + text[-18:]


def _hash_file(path: str, key: str) -> str:
    try:
        return sha256(Path(path))
    except OSError as error:
        raise UserError(f"{key}={path} cannot be read: {error.strerror}") from error


def _seed(seed: int) -> None:
    """Seed every generator, so that a stage gives the same result in a resumed run as in a whole one."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
