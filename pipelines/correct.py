"""The sixth stage: models that no longer rely on the proven artifacts."""

from __future__ import annotations

import copy
import time
from typing import Any

from spray.correction import CORRECTIONS, Problem, check_methods
from spray.pipelines.context import Context
from spray.pipelines.isolated import load_findings
from spray.pipelines.stage import Stage
from spray.pipelines.weights import save_weights


def run(context: Context) -> dict[str, Any]:
    """Write `corrected/<method>.pt` for each method; nothing where there is nothing to correct."""
    options = context.config.correction
    findings = load_findings(context.run_dir)
    if not findings:
        context.log.info("nothing to correct: no artifact passed the causal test")
        return {"artifacts": [], "methods": []}
    methods = check_methods(options.methods)
    seconds = {}
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
        )
        save_weights(context.run_dir / "corrected" / f"{method}.pt", CORRECTIONS.get(method)(problem))
        seconds[method] = round(time.monotonic() - start, 2)
        context.log.info("%s: %.0f s", method, seconds[method])
    return {"artifacts": [name for name, _ in findings], "methods": methods, "seconds": seconds}


STAGE = Stage(
    name="correct",
    needs=("train", "isolate"),
    settings=("correction", "seed"),
    outputs=("corrected/*.pt",),
    run=run,
)
