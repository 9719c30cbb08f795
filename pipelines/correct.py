"""The sixth stage: models that no longer rely on the proven artifacts."""

from __future__ import annotations

import copy
import time
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from spray.correction import CORRECTIONS, Options, Problem, check_methods
from spray.pipelines.config import CorrectionConfig
from spray.pipelines.context import Context
from spray.pipelines.isolated import load_findings
from spray.pipelines.stage import Stage
from spray.pipelines.weights import save_weights

if TYPE_CHECKING:
    from spray.pipelines.config import SprayConfig


def run(context: Context) -> dict[str, Any]:
    """Write `corrected/<method>.pt` for each method; nothing where there is nothing to correct."""
    options = context.config.correction
    findings = load_findings(context.run_dir)
    if not findings:
        context.log.info("nothing to correct: no artifact passed the causal test")
        return {"artifacts": [], "methods": []}
    methods = check_methods(options.methods)
    seconds, details = {}, {}
    shared: dict[Any, Any] = {}
    for method in methods:
        start = time.monotonic()
        problem = Problem(
            model=copy.deepcopy(context.model),
            train=context.train,
            normalizer=context.normalizer,
            findings=[finding for _, finding in findings],
            epochs=options.epochs,
            batch_size=context.config.model.batch_size,
            learning_rate=options.learning_rate,
            seed=context.config.seed,
            device=context.device,
            options=correction_options(context.config),
            shared=shared,
        )
        save_weights(context.run_dir / "corrected" / f"{method}.pt", CORRECTIONS.get(method)(problem))
        seconds[method] = round(time.monotonic() - start, 2)
        if problem.facts:
            details[method] = problem.facts
        context.log.info("%s: %.0f s%s", method, seconds[method], _chosen(problem.facts))
    return {
        "artifacts": [name for name, _ in findings],
        "methods": methods,
        "seconds": seconds,
        "details": details,
    }


def correction_options(config: SprayConfig) -> Options:
    """Return what the configuration says about how corrections work."""
    section = config.correction
    return Options(**{field.name: getattr(section, field.name) for field in fields(Options)})


def _chosen(facts: dict[str, Any]) -> str:
    """Return what was chosen, for the log."""
    said = ", ".join(f"{key} {value}" for key, value in facts.get("chosen", {}).items())
    warning = "" if facts.get("within_limit", True) else "; every setting tried costs clean accuracy"
    return f" ({said}{warning})" if said else ""


# Another number of rounds changes nothing in this one.
SETTINGS = tuple(f"correction.{field.name}" for field in fields(CorrectionConfig) if field.name != "rounds")
STAGE = Stage(
    name="correct",
    needs=("train", "isolate"),
    settings=(*SETTINGS, "seed"),
    outputs=("corrected/*.pt",),
    run=run,
)
