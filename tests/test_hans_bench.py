"""The controlled study: its cells, its arithmetic, its list of misses; and a small one from command to tables."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hans
import hans_bench
import hans_cases
import hans_cells
import hans_rows
import hans_tables
import numpy as np
import pytest
from hans_cells import KINDS, SETS, Cell
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from spray.data.plant_kinds import KINDS as PLANTED
from spray.data.plant_options import read_plants


def test_the_sweep_is_over_every_kind_on_every_set() -> None:
    config = OmegaConf.load(hans_cells.HERE / "hans_bench.yaml")
    swept = [f"{key}={values}" for key, values in config.hydra.sweeper.params.items()]
    (jobs,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(swept), None)
    cells = []
    for job in jobs:
        given = dict(each.split("=") for each in job)
        assert given["everywhere"] == "False"
        cells.append(hans_cells.named(given["dataset"], given["kind"], float(given["rate"]), int(given["seed"])))
    first = cells[: 1 + len(KINDS)]
    assert first == [Cell("photos32", 0), *(Cell("photos32", 0, "planted", kind, 0.2) for kind in KINDS)]
    rates, seeds = (0.2, 0.5, 0.1, 0.05, 0.01), (0, 1, 2)
    wanted = {Cell(d, s, "planted", k, r) for d in SETS for k in KINDS for r in rates for s in seeds}
    wanted |= {Cell(d, s) for d in SETS for s in seeds}
    wanted |= {hans_cells.biased(d, s, k) for d in SETS for s in seeds for k in hans_cells.BIASES}
    assert set(cells) == wanted
    assert {options["kind"] for options in ({"kind": k} | v for k, v in KINDS.items())} == {
        name for name in PLANTED.names() if name not in ("mislabel", "missing")
    }


def test_cells_are_named_by_their_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hans_bench.tell.cache_clear()
    given = ("dataset=fashion", "kind=none,tag,missing", "rate=0.05,0.5", "seed=3", "everywhere=true")
    assert hans.run(monkeypatch, "plan=true", f"out={tmp_path}", *given) == 0
    assert capsys.readouterr().out.split() == [
        "fashion-clean-seed3",
        "fashion-everywhere-tag-05-seed3",
        "fashion-biased-missing-50-seed3",
        "fashion-everywhere-tag-50-seed3",
    ]


def test_cells_are_told_in_one_order() -> None:
    cells = [Cell("photos32", 1), Cell("photos32", 0, "planted", "box", 0.2), Cell("fashion", 0)]
    cells += [Cell("photos32", 0, "planted", kind, rate) for kind in ("blur", "tag") for rate in (0.1, 0.5)]
    cells += [hans_cells.biased("photos32", 0, kind) for kind in hans_cells.BIASES]
    assert [cell.name for cell in sorted(cells, key=hans_cells.order)] == [
        "photos32-planted-tag-50-seed0",
        "photos32-planted-blur-50-seed0",
        "photos32-planted-box-20-seed0",
        "photos32-planted-corruption-20-seed0",
        "photos32-planted-tag-10-seed0",
        "photos32-planted-blur-10-seed0",
        "photos32-clean-seed1",
        "photos32-biased-missing-50-seed0",
        "photos32-biased-mislabel-20-seed0",
        "fashion-clean-seed0",
    ]


@pytest.mark.parametrize("dataset", SETS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_fits_in_every_set(dataset: str, kind: str) -> None:
    side, n = SETS[dataset].side, SETS[dataset].n_classes
    shape = (3 if dataset == "photos64" else 1, side, side)
    for arm in ("planted", "everywhere"):
        cell = Cell(dataset, 1, arm, kind, 0.2)
        assert cell.target in SETS[dataset].targets
        assert max(SETS[dataset].targets) < n
        given = dict(item.removeprefix("dataset.plant.").split("=") for item in cell.plant())
        (plant,) = read_plants(given, None, [f"c{i}" for i in range(n)], shape)
        assert plant.target == (cell.target if arm == "planted" else None)
        assert plant.rate == 0.2


@pytest.mark.parametrize("dataset", SETS)
def test_biases_are_planted_as_their_kinds_say(dataset: str) -> None:
    classes, shape = [f"c{i}" for i in range(SETS[dataset].n_classes)], (1, SETS[dataset].side, SETS[dataset].side)
    made = {}
    for kind in hans_cells.BIASES:
        cell = hans_cells.biased(dataset, 1, kind)
        given = dict(item.removeprefix("dataset.plant.").split("=") for item in cell.plant())
        (made[kind],) = read_plants(given, None, classes, shape)
        assert cell.target in SETS[dataset].targets
        if kind != "mislabel":
            assert made[kind].target == cell.target
    assert (made["corruption"].kind, made["mislabel"].kind, made["missing"].kind) == ("box", "mislabel", "missing")
    assert made["corruption"].size <= 4
    assert made["mislabel"].target is None
    assert (made["missing"].which, made["missing"].rate) == ("dark", 0.5)


def test_of_a_bias_that_is_no_artifact_only_a_bias_of_samples_may_be_said() -> None:
    rows = [{"class_index": 1, "verdict": said, "samples": [1]} for said in ("no_effect", "sample_bias", "backdoor")]
    assert hans_rows.false_alarms(rows, None, of_samples=True) == rows[2:]
    assert hans_rows.false_alarms(rows, None) == rows[1:]
    cell = {"cell": "x", "dataset": "photos32", "arm": "biased", "kind": "missing", "false_alarms": 1, "rate": 0.5}
    numbers = {"original": (0.8, 0.3), "fine_tuned": (0.1, 0.1), "ceiling": (0.9, 0.75)}
    table = hans_tables.biases(
        [cell | {"model": name, "clean_accuracy": a, "missing_accuracy": b} for name, (a, b) in numbers.items()]
    )
    assert "| photos32, missing | 1 | 0.800 | 0.900 | 0.300 | 0.750 | 1 |" in table


def test_precision_and_recall_count_samples() -> None:
    assert hans_rows.precision_recall([1, 2, 3, 4], [3, 4, 5, 6, 7, 8]) == (2 / 4, 2 / 6)
    assert hans_rows.precision_recall([], [1]) == (0.0, 0.0)


def test_the_overlap_of_masks_is_that_of_their_pixels() -> None:
    rng = np.random.default_rng(0)
    found, true = rng.random((5, 6, 7)) < 0.5, rng.random((5, 6, 7)) < 0.3
    expected = []
    for a, b in zip(found, true, strict=True):
        one, two = ({tuple(p) for p in np.argwhere(m)} for m in (a, b))
        expected.append(len(one & two) / len(one | two))
    assert hans_rows.mean_iou(found * 0.4, true * 1.0) == pytest.approx(np.mean(expected))
    # What is less than half as opaque as elsewhere is not inside.
    soft = np.array([[[1.0, 0.4, 0.0]]])
    assert hans_rows.mean_iou(soft, np.array([[[1.0, 0.0, 0.0]]])) == 1.0
    assert hans_rows.mean_iou(np.zeros((1, 2, 2)), np.ones((1, 2, 2))) == 0.0


def candidate(name: str, c: int, verdict: str, samples: list[int]) -> dict[str, Any]:
    return {"id": name, "class_index": c, "verdict": verdict, "samples": samples}


def test_what_counts_as_a_false_alarm_and_as_the_artifact() -> None:
    truth = {"class_index": 2, "samples": [1, 2, 3, 4]}
    rows = [
        candidate("a01", 1, "clever_hans", [1, 2]),  # of another class
        candidate("a02", 2, "clever_hans", [7, 8, 1]),  # of its class, mostly other samples
        candidate("a03", 2, "backdoor", [1, 2, 3, 9]),
        candidate("a04", 2, "no_effect", [1, 2, 3, 4]),
        candidate("a05", 3, "sample_bias", [5]),
        candidate("a06", 0, "no_effect", [5]),
    ]
    assert [row["id"] for row in hans_rows.false_alarms(rows, truth)] == ["a01", "a02", "a05"]
    assert [row["id"] for row in hans_rows.false_alarms(rows, None)] == ["a01", "a02", "a03", "a05"]
    found = hans_rows.matching(rows, truth)
    assert found is not None
    assert found["id"] == "a03"
    assert hans_rows.matching(rows[:1], truth) is None


def test_the_rank_of_a_class() -> None:
    classes = [{"class_index": c} for c in (4, 2, 0)]
    assert hans_rows.ranked(classes, 4) == {"class_rank": 1, "hit_at_1": True, "reciprocal_rank": 1.0}
    assert hans_rows.ranked(classes, 0) == {"class_rank": 3, "hit_at_1": False, "reciprocal_rank": 1 / 3}
    assert hans_rows.ranked(classes, 9)["reciprocal_rank"] == 0.0


def test_a_model_relies_only_beyond_what_the_ceiling_loses() -> None:
    def models(attacked: float, ceiling: float) -> dict[str, Any]:
        return {
            "original": {"planted": {"unattacked_accuracy": 0.9, "attacked_accuracy": attacked}},
            "ceiling": {"planted": {"attacked_accuracy": ceiling}},
        }

    assert hans_rows._reliance(models(0.6, 0.88))["relies"]
    assert not hans_rows._reliance(models(0.86, 0.95))["relies"]  # it costs less than five points
    assert not hans_rows._reliance(models(0.6, 0.62))["relies"]  # as much as it costs any model


def study() -> list[dict[str, Any]]:
    """Rows of two planted runs, one good and one that misses everything, and of a clean one."""
    cell = {"cell": "good", "dataset": "photos32", "arm": "planted", "kind": "tag", "rate": 0.2, "extent": "local"}
    cell |= {"relies": True, "detected": True, "found": True, "hit_at_1": True, "reciprocal_rank": 1.0, "class_rank": 1}
    cell |= {"precision": 1.0, "recall": 0.95, "auroc": 0.99, "average_precision": 0.9, "iou": 0.7}
    cell |= {"false_alarms": 0, "n_candidates": 3, "chosen": "a_clarc", "recheck": "gone", "verdict": "backdoor"}
    cell |= {"clean_accuracy_of_others": 0.9, "attacked_accuracy_of_others": 0.2, "attacked_ceiling": 0.88}
    bad = cell | {"cell": "bad", "kind": "box", "precision": 0.8, "iou": 0.4, "recheck": "left", "false_alarms": 2}
    clean = {"cell": "clean", "dataset": "photos32", "arm": "clean", "kind": "none", "rate": 0.0, "false_alarms": 1}
    clean |= {"n_candidates": 4, "chosen": None}
    rows = []
    for of, accuracies in (
        (cell, {"original": (0.9, 0.2), "fine_tuned": (0.9, 0.3), "a_clarc": (0.897, 0.875), "ceiling": (0.9, 0.88)}),
        (bad, {"original": (0.9, 0.2), "fine_tuned": (0.9, 0.7), "a_clarc": (0.88, 0.65), "ceiling": (0.9, 0.88)}),
        (clean, {"original": (0.9, None)}),
    ):
        rows += [
            of | {"model": name, "is_chosen": name == of["chosen"], "clean_accuracy": c, "attacked_accuracy": a}
            for name, (c, a) in accuracies.items()
        ]
    return rows


def test_misses_are_listed_one_by_one() -> None:
    assert list(hans_tables.misses(study())) == [
        "bad: 2 verdicts that are not of the planted artifact",
        "bad: precision 0.800, below 0.9",
        "bad: iou 0.400, below 0.5",
        "bad: a_clarc stays 23.0 points below the ceiling with the artifact",
        "bad: a_clarc loses 2.0 points of clean accuracy",
        "bad: a_clarc is not better than fine-tuning",
        "bad: the artifact is found again in the corrected model",
        "clean: 1 false verdicts",
    ]
    hidden = [row | {"detected": False, "found": False} for row in study() if row["cell"] == "good"]
    assert list(hans_tables.misses(hidden)) == ["good: not found; its class has rank 1, verdict backdoor"]
    second = [row | {"detected": False} for row in study() if row["cell"] == "good"]
    assert list(hans_tables.misses(second)) == ["good: found, but not first; its class has rank 1, verdict backdoor"]
    idle = [row | {"relies": False} for row in study()]
    assert [miss for miss in hans_tables.misses(idle) if not miss.startswith("clean")] == []


def test_tables_average_runs_not_models() -> None:
    text = hans_tables.summary(study(), [("worse", "no space")])
    assert "3 runs: 2 planted, 1 clean. 2 of 2 models rely on their artifact." in text
    assert "| **all but blur** | 2 | 1.000 | 1.000 | 1.000 | 1.000 | 0.900 | 0.950 | 0.990 | 0.900 | 0.550 |" in text
    assert "| photos32, clean | 1 | 1 (100 %) | 1.00 | 4 |" in text
    # 0.5 and 23 points to the ceiling, 0.3 and 2 points of clean accuracy.
    assert "| a_clarc | 2 | 0.889 | 0.762 | +11.8 | +1.2 | 1 of 2 | 1 of 2 |" in text
    assert "- worse: no space" in text


def test_case_by_case() -> None:
    missed = [row | {"found": False, "is_chosen": False} for row in study() if row["cell"] == "bad"]
    rows = [*(row for row in study() if row["cell"] != "bad"), *missed]
    rows = [row | {"seed": 3} for row in rows]
    text = hans_cases.text(rows)
    good, bad = (line for line in text.splitlines() if ", 20 %, 3 |" in line)
    assert good == (
        "| photos32, tag, 20 %, 3 | found | 1.00 | 0.95 | 0.990 | 0.70 "
        "| 0.200 | 0.300 | 0.875 | 0.875 | 0.880 | 0.900 | 0.897 | 0 |"
    )
    assert bad.startswith("| photos32, box, 20 %, 3 | missed | 0.80 |")
    assert bad.endswith("| 0.200 | 0.700 | 0.650 | – | 0.880 | 0.900 | – | 2 |")
    # Of what was found alone; false verdicts of all.
    assert (
        "| photos32, 20 % | 2 of 2 | 1 of 2 | 1.00 | 0.95 | 0.990 | 0.70 "
        "| 0.200 | 0.300 | 0.875 | 0.880 | 0.900 | 0.897 | 1 of 2 |"
    ) in text
    assert text.count("1 of 1 |") == 1
    both = hans_cases.overview([row | {"seed": 3} for row in study()])
    assert "| 2 of 2 | 0.80 to 1.00 | 0.95 | 0.990 | 0.40 to 0.70 | 0.200 | 0.500 | 0.762 |" in both


def test_the_table_has_the_documented_columns(tmp_path: Path) -> None:
    hans_rows.write_table(tmp_path / "hans.csv", study())
    with (tmp_path / "hans.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(hans_rows.COLUMNS)
    assert (rows[0]["cell"], rows[0]["attacked_accuracy"], rows[0]["tcav"]) == ("good", "0.2", "")


@pytest.mark.parametrize(
    ("given", "said"),
    [("kind=tga", "band_aid"), ("dataset=photos16", "photos64"), ("rate=many", "rate"), ("lots=1", "lots")],
)
def test_a_mistake_is_told_before_anything_is_made(tmp_path: Path, given: str, said: str) -> None:
    command = [sys.executable, hans_bench.__file__, f"out={tmp_path / 'out'}", "seed=0", given]
    # A run in this process asks Hydra for whole tracebacks.
    environment = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out/*/"))


def test_a_failed_cell_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only = ("dataset=photos32", "kind=none", "rate=0.2", "seed=0", f"out={tmp_path}")
    assert hans.run(monkeypatch, *only, 'overrides=["dataset.per_class=none"]') == 1
    assert "photos32-clean-seed0: spray: error" in capsys.readouterr().out
    assert not (tmp_path / "photos32-clean-seed0/cell.json").exists()
    assert hans.run(monkeypatch, *only, 'overrides=["plan=true"]') == 1  # a run without files gives no rows
    assert "photos32-clean-seed0: FileNotFoundError" in capsys.readouterr().out


@pytest.mark.slow
def test_the_quick_study(tmp_path: Path) -> None:
    command = [sys.executable, hans_bench.__file__, "--config-name", "hans_quick", f"out={tmp_path}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # Twice at once: what the one is at the other passes over.
    beside = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    errors = [done.stderr, beside.communicate()[1]]
    assert [done.returncode, beside.returncode] == [0, 0], errors
    assert sorted(line.rpartition(": ")[0] for said in errors for line in said.splitlines() if line.endswith(" s")) == [
        "photos32-clean-seed0",
        "photos32-planted-tag-20-seed0",
    ]
    assert "another process is at it" in "".join(errors)
    with (tmp_path / "hans.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    planted = {row["model"]: row for row in rows if row["arm"] == "planted"}
    assert list(planted) == ["original", "fine_tuned", "a_clarc", "ceiling"]
    assert planted["original"]["relies"] == "True"
    assert float(planted["original"]["auroc"]) > 0.95
    assert float(planted["original"]["iou"]) > 0.5
    assert float(planted["a_clarc"]["attacked_accuracy"]) > float(planted["fine_tuned"]["attacked_accuracy"]) + 0.05
    # Its numbers are those of the run's own files.
    folder = tmp_path / "photos32-planted-tag-20-seed0"
    models = json.loads((folder / "verification.json").read_text())["models"]
    for name, row in planted.items():
        assert float(row["attacked_accuracy"]) == pytest.approx(models[name]["planted"]["attacked_accuracy"], abs=1e-6)
    assert next(row["model"] for row in rows if row["arm"] == "clean") == "original"
    assert "### Misses" in (tmp_path / "summary.md").read_text()
    assert "| photos32, tag, 20 %, 0 |" in (tmp_path / "cases.md").read_text()
    for figure in ("detection.png", "samples.png", "corrections.png"):
        assert (tmp_path / figure).stat().st_size > 5000
    # Done cells are passed over.
    again = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert again.returncode == 0
    assert again.stdout == (tmp_path / "summary.md").read_text() + "\n"
    assert "1 planted, 1 clean" in again.stdout
    assert folder.joinpath("rows.json").stat().st_mtime < (tmp_path / "hans.csv").stat().st_mtime


def test_a_cell_whose_model_does_not_rely_ends_with_its_training(tmp_path: Path) -> None:
    cell = Cell("photos32", 0, "planted", "blur", 0.2)
    overrides = cell.overrides(tmp_path, ("a_clarc",))
    record = {"dataset": "photos32", "seed": 0, "arm": "planted", "kind": "blur", "rate": 0.2}
    record |= {"overrides": overrides, "seconds": 0.0, "idle": [0.8, 0.7, 0.7]}
    folder = tmp_path / cell.name
    folder.mkdir()
    (folder / "cell.json").write_text(json.dumps(record))
    study = hans_bench.Study(methods=["a_clarc"], relying=True)
    assert hans_bench.attempt(cell, study, tmp_path) == hans_bench.DONE
    rows = hans_rows.rows_of(record, tmp_path)
    assert [row["relies"] for row in rows] == [False]
    said = hans_tables.summary(rows)
    assert "0 of 1 models rely" in said
    assert f"{cell.name}: accuracy 0.800, 0.700 with the artifact; trained on clean data 0.700" in said
    # What was not explained says nothing of false verdicts.
    assert "photos32, planted | 1 |" not in said


@pytest.mark.parametrize(
    ("clean", "attacked", "ceiling", "expected"),
    [
        (0.8, 0.7, 0.8, True),
        (0.8, 0.7, 0.72, False),
        (0.8, 0.77, 0.9, False),
        (0.8, 0.7, None, True),
        (None, 0.7, 0.8, False),
    ],
)
def test_what_relying_is(clean: float | None, attacked: float, ceiling: float | None, expected: bool) -> None:
    assert hans_rows.relies(clean, attacked, ceiling) is expected
