"""Measures what heatmaps cost: spray, zennit, Captum's LRP and the plain gradient, side by side.

    python scripts/bench_lrp.py --models resnet50 --batch 8 16 --threads 2
    python scripts/bench_lrp.py --memory --check --targets 10 --relevance-dtype bfloat16

The unit is the gradient of the targets' logits with respect to the input, as anyone would write it. All engines run
alternately in one process, each on its own copy of the model, in an order that rotates; a ratio is the median of the
rounds' ratios. What users do for each batch is inside the time: zennit's `with composite.context(model)` with its
canonizers, Captum's assignment of rules. What an engine does once for a model, in its first call (the warm-up), is
not; the JSON file has the first calls' seconds (`first_s`). An engine that fails or refuses is listed with its reason.
Models have random weights and random statistics of BatchNorm.

Progress goes to standard error, Markdown tables to standard output, every raw time to the JSON file.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_engines import (
    COMPOSITES,
    ENGINES,
    MODELS,
    MORE_COMPOSITES,
    SHORT,
    UNIT,
    Attribute,
    build_engine,
    caveats,
    make_batch,
    make_model,
)
from bench_tables import report
from torch import Tensor, nn

import spray

Row = dict[str, Any]

CHECK_SAMPLES = 2
CHECKS = [("spray", "zennit"), ("spray", "zennit float64"), ("zennit", "zennit float64")]
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile")
LOGGED = ("model", "batch", "composite", "engine", "median_s", "ratio", "extra_mib", "cosine", "max_relative", "error")


@dataclass
class Outcome:
    """What a call returned first, the seconds of that and of its rounds, or the error that ended it."""

    first: Any = None
    first_seconds: float | None = None
    seconds: tuple[float, ...] = ()
    error: str | None = None


def one_line(error: BaseException) -> str:
    """Return an error as one short line."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    return f"{name}: {text[:200]}{'…' if len(text) > 200 else ''}" if text else name


def rotated(names: list[str], turn: int) -> list[str]:
    """Return the names in the order of a round."""
    start = turn % len(names) if names else 0
    return names[start:] + names[:start]


def alternate(calls: Mapping[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, Outcome]:
    """Run each call once to warm up, then all of them in turn `repeats` times.

    A call that raises is not called again; its error is kept and its times are dropped.
    """
    outcomes = {name: Outcome() for name in calls}
    gc.collect()
    gc.freeze()  # so that collecting before each call is quick
    for turn in range(-1, repeats):
        for name in rotated([name for name in calls if outcomes[name].error is None], max(turn, 0)):
            try:
                result, seconds = timed(calls[name], device)
            except Exception as error:
                outcomes[name] = Outcome(error=one_line(error))
                continue
            if turn < 0:
                outcomes[name].first, outcomes[name].first_seconds = result, seconds
            else:
                outcomes[name].seconds += (seconds,)
    gc.unfreeze()
    return outcomes


def timed(call: Callable[[], Any], device: str) -> tuple[Any, float]:
    """Return a call's result and its seconds, without the collection of earlier garbage."""
    gc.collect()
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    return result, time.perf_counter() - start


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def summary(outcome: Outcome, unit: Outcome, heatmaps: int) -> Row:
    """Return median seconds, heatmaps per second, and the ratio to the unit, paired by rounds."""
    if outcome.error is not None or not outcome.seconds:
        return {"error": outcome.error or "was not timed"}
    median = statistics.median(outcome.seconds)
    row: Row = {"seconds": list(outcome.seconds), "median_s": median, "heatmaps_per_s": heatmaps / median}
    row["first_s"] = outcome.first_seconds
    if unit.seconds:
        ratios = [a / b for a, b in zip(outcome.seconds, unit.seconds, strict=True)]
        row |= {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
    return row


def suspicion(R: Tensor, logits: Tensor) -> str | None:
    """Return what is wrong with heatmaps (N, ...) of logits (N,) at first sight: not finite, or far too large."""
    if not bool(torch.isfinite(R).all()):
        return "gives values that are not finite"
    shares = R.double().flatten(1).sum(1) / logits.double()
    median = float(shares.abs().median())
    return f"gives relevance whose sum is {median:.1e} times the logit" if median > 1e3 else None


def time_models(options: argparse.Namespace) -> Iterator[Row]:
    """Yield the times of the engines for each model, batch and composite; composite "" is for orientation."""
    for name in options.models:
        model = make_model(name, options.size).to(options.device)
        for n in options.batch:
            x, target = (t.to(options.device) for t in make_batch(n, options.size))
            with torch.no_grad():
                logits = model(x).gather(1, target[:, None])[:, 0]
            orientation = [""] if UNIT in options.engines else []
            for composite in orientation + options.composites:
                engines = [UNIT, *lrp_engines(options)] if composite else ["forward", UNIT, "gradient channels_last"]
                calls = {e: partial(prepared(e, model, composite, options), x, target) for e in engines}
                outcomes = alternate(calls, options.repeats, options.device)
                for engine, outcome in outcomes.items():
                    notes = caveats(engine, name, composite)
                    if composite and engine != UNIT and outcome.first is not None:
                        wrong = suspicion(outcome.first, logits)
                        notes += [f"{engine} {wrong} ({name}, {composite})"] if wrong else []
                    row = {"model": name, "batch": n, "composite": composite, "engine": engine, "notes": notes}
                    yield row | summary(outcome, outcomes[UNIT], n)


def prepared(engine: str, model: nn.Module, composite: str, options: argparse.Namespace) -> Attribute:
    """Return an engine on its own copy of the model; what it refuses to build, it refuses when called."""
    try:
        return build_engine(engine, copy.deepcopy(model), composite, options.relevance_dtype)
    except Exception as error:
        failure = error

    def refuse(x: Tensor, target: Tensor) -> Tensor:
        raise failure

    return refuse


def lrp_engines(options: argparse.Namespace) -> list[str]:
    """Return the engines that were asked for, without the gradient, with the variant of spray."""
    engines = [engine for engine in options.engines if engine != UNIT]
    if "spray" in engines and options.relevance_dtype:
        engines.insert(engines.index("spray") + 1, f"spray {SHORT[options.relevance_dtype]}")
    return engines


def time_targets(options: argparse.Namespace) -> Iterator[Row]:
    """Yield the times for several targets of one image: in one call, in a call for each, as a batch of copies."""
    k = options.targets
    target = make_batch(k, 1)[1].to(options.device)
    for name in options.models:
        model = make_model(name, options.size).to(options.device)
        x = make_batch(1, options.size)[0].to(options.device)
        for composite in options.composites:
            calls: dict[str, Callable[[], Any]] = {UNIT: partial(prepared(UNIT, model, "", options), x, target[:1])}
            for engine in lrp_engines(options):
                calls |= for_targets(engine, prepared(engine, model, composite, options), x, target)
            outcomes = alternate(calls, options.repeats, options.device)
            for engine, outcome in outcomes.items():
                row = {"model": name, "batch": 1, "composite": composite, "engine": engine, "targets": k}
                row["notes"] = caveats(engine.split(",")[0], name, composite)
                yield row | summary(outcome, outcomes[UNIT], 1 if engine == UNIT else k)


def for_targets(engine: str, attribute: Attribute, x: Tensor, target: Tensor) -> dict[str, Callable[[], Any]]:
    """Return the ways to explain several targets (K,) of one image (1, ...)."""
    k = len(target)
    calls: dict[str, Callable[[], Any]] = {
        f"{engine}, {k} calls": lambda: [attribute(x, one) for one in target.split(1)],
        f"{engine}, batch of {k}": lambda: attribute(x.expand(k, *x.shape[1:]).contiguous(), target),
    }
    if engine.startswith("spray"):
        calls = {f"{engine}, one call": lambda: attribute(x, target.tolist())} | calls
    return calls


# Peak memory


def peak_rss() -> int:
    """Return the most bytes that this process has held (since `forget_peak`, where the system allows that)."""
    status = Path("/proc/self/status")
    if status.exists():  # unlike ru_maxrss, VmHWM leaves out what the parent held when it started this process
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def rss() -> int:
    """Return the bytes that this process holds now."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else peak_rss()


def forget_peak() -> None:
    """Hand freed memory back to the system and start the peak anew; do nothing where that isn't possible."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def measure_memory(engine: str, options: argparse.Namespace) -> Row:
    """Return the peak memory of an engine's first call above what the process held before it, in MiB.

    The warm-up, which loads the libraries, is on another, tiny model: what an engine keeps for a model is new
    memory, and the warm-up's peak stays far below that of the call.
    """
    name, composite, n = options.models[0], options.composites[0], options.batch[0]
    cuda = options.device.startswith("cuda")
    tiny, sample = make_model("tiny", 16).to(options.device), make_batch(1, 16)
    model = make_model(name, options.size).to(options.device)
    x, target = (t.to(options.device) for t in make_batch(n, options.size))
    try:
        build_engine(engine, tiny, composite, options.relevance_dtype)(*(t.to(options.device) for t in sample))
        attribute = build_engine(engine, model, composite, options.relevance_dtype)
        synchronize(options.device)
        forget_peak()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        before, earlier = (torch.cuda.memory_allocated(), 0) if cuda else (rss(), peak_rss())
        R = attribute(x, target)
        synchronize(options.device)
        peak = torch.cuda.max_memory_allocated() if cuda else peak_rss()
        del R
    except Exception as error:
        return {"error": one_line(error)}
    forget_peak()
    kept = (torch.cuda.memory_allocated() if cuda else rss()) - before
    row: Row = {"extra_mib": (peak - before) / 2**20, "kept_mib": kept / 2**20, "before_mib": before / 2**20}
    # without a way to start the peak anew, building the model may have taken more than the call
    return row | {"notes": ["the peak came before the call: an upper bound"] if earlier >= peak else []}


def memory_in_child(engine: str, name: str, n: int, composite: str, options: argparse.Namespace) -> Row:
    """Return what `measure_memory` says in a fresh process."""
    command = [sys.executable, __file__, "--one", engine, "--models", name, "--batch", str(n)]
    command += ["--composites", composite, "--size", str(options.size), "--device", options.device]
    command += ["--threads", str(options.threads)] if options.threads else []
    command += ["--relevance-dtype", options.relevance_dtype] if options.relevance_dtype else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {"error": f"ended with {done.returncode}: {' '.join(done.stderr.split())[-200:]}"}
    return json.loads(done.stdout)


def peak_memory(options: argparse.Namespace) -> Iterator[Row]:
    """Yield the peak memory of each engine, model, batch and composite, and its ratio to the gradient's."""
    for name in options.models:
        for n in options.batch:
            unit = memory_in_child(UNIT, name, n, options.composites[0], options)
            for composite in options.composites:
                for engine in [UNIT, *lrp_engines(options)]:
                    own = unit if engine == UNIT else memory_in_child(engine, name, n, composite, options)
                    notes = [*caveats(engine, name, composite), *own.get("notes", [])]
                    row = {"model": name, "batch": n, "composite": composite, "engine": engine} | own
                    if "extra_mib" in own and unit.get("extra_mib", 0) > 0:
                        row["ratio"] = own["extra_mib"] / unit["extra_mib"]
                    yield row | {"notes": notes}


# Agreement


def difference(R: Tensor, reference: Tensor) -> Row:
    """Return the least cosine and the largest error, relative to the map's largest entry, of maps (N, ...)."""
    a, b = R.double().flatten(1), reference.double().flatten(1)
    scale = b.abs().amax(1, keepdim=True).clamp(min=torch.finfo(b.dtype).tiny)
    a, b = a / scale, b / scale  # maps may be so small that the cosine's own stabiliser would count
    norms = a.norm(dim=1) * b.norm(dim=1)
    cosine = (a * b).sum(1) / norms.clamp(min=torch.finfo(b.dtype).tiny)
    return {"cosine": float(cosine.min()), "max_relative": float((a - b).abs().max())}


def check_agreement(options: argparse.Namespace) -> Iterator[Row]:
    """Yield how spray's and zennit's maps differ, each from zennit's in float64, and low precision from full.

    BatchNorm's eps is 1e-12 here, since zennit 0.5.1 divides by √(1 + eps) once more after merging.
    """
    low = f"spray {SHORT[options.relevance_dtype]}" if options.relevance_dtype else None
    for name in options.models:
        model = make_model(name, options.size).to(options.device)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-12
        x, target = (t.to(options.device) for t in make_batch(CHECK_SAMPLES, options.size))
        for composite in options.composites:
            maps: dict[str, Tensor | str] = {}
            for engine, dtype in [("spray", x.dtype), ("zennit", x.dtype), ("zennit", torch.float64), (low, x.dtype)]:
                key = f"{engine} float64" if dtype == torch.float64 else engine
                if engine is None or key is None:
                    continue
                try:
                    maps[key] = prepared(engine, model.to(dtype), composite, options)(x.to(dtype), target)
                except Exception as error:
                    maps[key] = one_line(error)
            model.float()
            for engine, reference in CHECKS + ([(low, "spray")] if low else []):
                a, b = maps[engine], maps[reference]
                row: Row = {"model": name, "composite": composite, "engine": f"{engine} against {reference}"}
                row["notes"] = caveats("zennit", name, composite) if "zennit" in row["engine"] else []
                failed = a if isinstance(a, str) else b if isinstance(b, str) else None
                yield row | ({"error": failed} if failed else difference(a, b))  # type: ignore[arg-type]


# The command


def logged(row: Row) -> Iterator[str]:
    """Yield what of a row is worth a look while the benchmark runs."""
    for key in LOGGED:
        if key in row:
            yield f"{row[key]:.4g}" if isinstance(row[key], float) else str(row[key])


def commit() -> str | None:
    """Return the commit of spray's checkout, "-dirty" added if it has been changed since; None without git."""
    folder = Path(spray.__file__).parent
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def about(options: argparse.Namespace) -> Row:
    """Return what the numbers depend on: versions, the processor, the options."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "zennit", "captum", "spray-xai"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    cpuinfo = Path("/proc/cpuinfo")
    known = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return {
        "versions": versions,
        "spray_commit": commit(),
        "command": sys.argv,
        "options": vars(options) | {"output": str(options.output)},
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_flags": [flag for flag in FLAGS if flag in known],
        "device": torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else "cpu",
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=(*MODELS, "tiny"), default=list(MODELS))
    parser.add_argument("--composites", nargs="+", choices=(*COMPOSITES, *MORE_COMPOSITES), default=list(COMPOSITES))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--batch", nargs="+", type=positive, default=[8, 16])
    parser.add_argument("--size", type=positive, default=224, help="height and width of the images")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; 0 leaves the times out")
    parser.add_argument("--threads", type=positive, help="of the processor; torch's default if not given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--relevance-dtype", choices=tuple(SHORT), help="adds spray with this dtype of relevance")
    parser.add_argument("--targets", type=positive, metavar="K", help="also time K targets of one image")
    parser.add_argument("--memory", action="store_true", help="also measure peak memory, each in a fresh process")
    parser.add_argument("--check", action="store_true", help="also compare spray's maps with zennit's")
    parser.add_argument("--output", type=Path, default=Path("bench_lrp.json"))
    parser.add_argument("--one", metavar="ENGINE", help="print one engine's peak memory as JSON (used by --memory)")
    options = parser.parse_args(arguments)
    if "vit_b_16" in options.models and options.size % 16:
        parser.error("vit_b_16 needs a --size that is a multiple of 16")
    if options.targets and not options.repeats:
        parser.error("--targets needs --repeats of 1 or more")
    return options


def positive(text: str) -> int:
    """Return a number of 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, but is {number}")
    return number


def main(arguments: list[str] | None = None) -> int:
    """Measure what is asked for; print the tables, write the JSON file after each row."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(measure_memory(options.one, options)))
        return 0
    result: dict[str, Any] = {"about": about(options)}
    sections = {"memory": peak_memory, "check": check_agreement, "times": time_models, "targets": time_targets}
    for section, measure in sections.items():
        if not (options.repeats if section == "times" else getattr(options, section)):
            continue
        result[section] = []
        for row in measure(options):
            result[section].append(row)
            options.output.write_text(json.dumps(result, indent=1, ensure_ascii=False))
            print(section, *logged(row), file=sys.stderr, flush=True)
    print(report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
