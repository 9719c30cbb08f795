"""The LRP benchmark: its arithmetic, its order, its tables, its measurement of memory, and a small run."""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import bench_engines
import bench_lrp
import bench_tables
from bench_lrp import Outcome

SMALL = ["--models", "tiny", "--batch", "2", "--size", "16"]


def test_ratio_is_paired_by_rounds() -> None:
    # the ratio of the medians would be 4 / 2
    row = bench_lrp.summary(Outcome(seconds=(1.0, 4.0, 9.0)), Outcome(seconds=(1.0, 2.0, 3.0)), 8)
    assert (row["ratio"], row["ratio_min"], row["ratio_max"]) == (2.0, 1.0, 3.0)
    row = bench_lrp.summary(Outcome(seconds=(1.0, 4.0, 9.0)), Outcome(seconds=(2.0, 1.0, 3.0)), 8)
    assert (row["ratio"], row["ratio_min"], row["ratio_max"]) == (3.0, 0.5, 4.0)
    assert (row["median_s"], row["heatmaps_per_s"]) == (4.0, 2.0)


def test_summary_of_what_failed() -> None:
    assert bench_lrp.summary(Outcome(error="no"), Outcome(seconds=(1.0,)), 8) == {"error": "no"}
    assert "ratio" not in bench_lrp.summary(Outcome(seconds=(1.0,)), Outcome(error="no"), 8)


def test_every_engine_runs_first_once() -> None:
    order = [bench_lrp.rotated(["a", "b", "c"], turn) for turn in range(4)]
    assert order == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_rounds_alternate_and_failures_are_kept() -> None:
    ran: list[str] = []
    count = itertools.count()

    def refuse() -> None:
        ran.append("b")
        raise ValueError("not\n  this")

    def late() -> int:
        ran.append("c")
        if next(count) == 2:
            raise ValueError
        return 7

    calls = {"a": lambda: ran.append("a"), "b": refuse, "c": late}
    outcomes = bench_lrp.alternate(calls, 3, "cpu")
    assert ran == ["a", "b", "c", "a", "c", "c", "a", "a"]
    assert len(outcomes["a"].seconds) == 3
    assert outcomes["b"] == Outcome(error="ValueError: not this")
    assert outcomes["c"] == Outcome(error="ValueError")


def test_difference() -> None:
    a = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]]])
    b = torch.tensor([[[3.0, 4.0]], [[0.5, 0.5]]])
    assert bench_lrp.difference(a, a) == pytest.approx({"cosine": 1.0, "max_relative": 0.0})
    assert bench_lrp.difference(a, b) == pytest.approx({"cosine": 0.5**0.5, "max_relative": 1.0})
    assert bench_lrp.difference(a * 1e-20, b * 1e-20) == pytest.approx({"cosine": 0.5**0.5, "max_relative": 1.0})
    assert bench_lrp.difference(a * 0, a) == {"cosine": 0.0, "max_relative": 1.0}


def test_suspicion() -> None:
    logits = torch.tensor([2.0, -1.0, 1.0])
    assert bench_lrp.suspicion(logits[:, None].expand(3, 4), logits) is None
    assert "1.0e+04 times" in str(bench_lrp.suspicion(logits[:, None] * 1e4, logits))
    assert "not finite" in str(bench_lrp.suspicion(torch.tensor([[1.0], [float("nan")], [1.0]]), logits))


def test_table_names_what_failed() -> None:
    rows: list[dict[str, Any]] = [
        {"model": "m", "batch": 8, "engine": "gradient", "heatmaps_per_s": 2.0},
        {"model": "m", "batch": 8, "engine": "a", "error": "no", "notes": ["a is odd"]},
        {"model": "m", "batch": 8, "engine": "b", "heatmaps_per_s": 1.0, "notes": ["b is odd"]}
        | {"ratio": 2.0, "ratio_min": 1.5, "ratio_max": 2.5},
        {"model": "n", "batch": 8, "engine": "a", "error": "no"},
    ]
    assert bench_tables.table(rows, bench_tables.time_cell).splitlines() == [
        "| model, batch | gradient | a | b |",
        "|---|---|---|---|",
        "| m, 8 | 2/s | – [1] | 2.00 (1.50–2.50), 1/s [2] |",
        "| n, 8 |  | – [1] |  |",
        "",
        "[1] a: no  ",
        "[2] b is odd",
    ]


def test_models_and_batches_are_reproducible() -> None:
    a, b = bench_engines.make_model("resnet18", 32), bench_engines.make_model("resnet18", 32)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert float(a.get_buffer("bn1.running_mean").std()) > 0.1
    assert not any(module.training for module in a.modules())
    assert not any(p.requires_grad for p in a.parameters())
    x, target = bench_engines.make_batch(3, 8)
    bounds = bench_engines.bounds("epsilon_gamma_box")
    assert x.shape == (3, 3, 8, 8)
    assert bool((x >= bounds["low"]).all() & (x <= bounds["high"]).all())
    assert torch.equal(bench_engines.make_batch(3, 8)[0], x)
    assert target.shape == (3,)


def tiny() -> nn.Module:
    model = bench_engines.make_model("tiny", 16)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-12
    return model


def run(engine: str, composite: str = "") -> Tensor:
    return bench_engines.build_engine(engine, tiny(), composite)(*bench_engines.make_batch(2, 16))


@pytest.mark.parametrize("engine", ["gradient", "gradient channels_last"])
def test_gradient_engines(engine: str) -> None:
    model = tiny()
    x, target = bench_engines.make_batch(2, 16)
    for i in range(2):
        expected = torch.func.grad(lambda image, i=i: model(image[None])[0, target[i]])(x[i])
        torch.testing.assert_close(run(engine)[i], expected)


@pytest.mark.parametrize("composite", bench_engines.COMPOSITES)
def test_engines_compute_the_same_composites(composite: str) -> None:
    pytest.importorskip("zennit")
    difference = bench_lrp.difference(run("spray", composite), run("zennit", composite))
    assert difference["max_relative"] < 1e-4


@pytest.mark.parametrize("composite", bench_engines.COMPOSITES)
def test_captum_explains_or_says_why_not(composite: str) -> None:
    pytest.importorskip("captum")
    if composite == "epsilon_alpha2_beta1_flat":
        with pytest.raises(bench_engines.RefusedError, match="β = 0"):
            run("captum", composite)
    else:
        model, (x, target) = tiny(), bench_engines.make_batch(2, 16)
        attribute = bench_engines.build_engine("captum", model, composite)
        first = attribute(x, target)
        assert float(first.abs().max()) > 0
        torch.testing.assert_close(attribute(x, target), first)  # the rules are there again


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can't be started anew")
def test_peak_memory_is_that_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []

    def build(engine: str, model: nn.Module, *rest: Any) -> Any:
        def attribute(x: Tensor, target: Tensor) -> Tensor:
            if isinstance(x, Tensor) and len(x) == 2:  # not the warm-up
                calls.append(torch.ones(8 << 20))
                torch.ones(16 << 20)
            return x

        return attribute

    monkeypatch.setattr(bench_lrp, "build_engine", build)
    row = bench_lrp.measure_memory("any", bench_lrp.parse(SMALL))
    assert row["extra_mib"] == pytest.approx(32 + 64, abs=8)
    assert row["kept_mib"] == pytest.approx(32, abs=8)
    assert row["notes"] == []


def test_child_that_was_killed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    killed = subprocess.CompletedProcess([], -9, stdout="", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: killed)
    assert "-9" in bench_lrp.memory_in_child("spray", "tiny", 2, "epsilon", bench_lrp.parse(SMALL))["error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "must be 1 or more, but is 0"),
        (["--models", "nothing"], "invalid choice: 'nothing'"),
        (["--models", "vit_b_16", "--size", "100"], "multiple of 16"),
        (["--targets", "3", "--repeats", "0"], "--repeats of 1 or more"),
    ],
)
def test_wrong_options_end_with_a_message(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        bench_lrp.parse(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_engines_with_a_variant_of_spray() -> None:
    options = argparse.Namespace(engines=["gradient", "spray", "zennit"], relevance_dtype="bfloat16")
    assert bench_lrp.lrp_engines(options) == ["spray", "spray bf16", "zennit"]


def test_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("zennit")
    output = tmp_path / "out.json"
    arguments = [*SMALL, "--composites", "epsilon_plus_flat", "--repeats", "2", "--targets", "2", "--check"]
    assert bench_lrp.main([*arguments, "--engines", "spray", "zennit", "gradient", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    times = {row["engine"]: row for row in result["times"] if row["composite"]}
    assert set(times) == {"gradient", "spray", "zennit"}
    assert all(len(row["seconds"]) == 2 and row["ratio"] > 0 for row in times.values())
    assert {row["engine"] for row in result["times"]} >= {"forward", "gradient channels_last"}
    assert {row["engine"] for row in result["targets"]} == {"gradient", "spray, one call"} | {
        f"{engine}, {way}" for engine in ("spray", "zennit") for way in ("2 calls", "batch of 2")
    }
    assert all("error" not in row for section in ("times", "targets", "check") for row in result[section])
    assert result["check"][0]["cosine"] > 0.9999
    assert result["about"]["versions"]["torch"]
    assert capsys.readouterr().out.count("| tiny") == 4


def test_memory_in_a_fresh_process(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    arguments = [*SMALL, "--composites", "epsilon", "--repeats", "0", "--memory", "--engines", "gradient"]
    assert bench_lrp.main([*arguments, "--output", str(output)]) == 0
    (row,) = json.loads(output.read_text())["memory"]
    assert row["engine"] == "gradient"
    assert 0 < row["extra_mib"] < 200
    assert row["ratio"] == 1
