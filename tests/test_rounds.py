"""Rounds: the best correction is chosen, its model looked at again, what is left is corrected again; resume."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import small
import torch
from torch import nn

from spray.correction import Projected, Projection
from spray.pipelines import recheck, rounds
from spray.pipelines.config import SprayConfig
from spray.pipelines.context import Context
from spray.pipelines.isolated import load_findings

CLASSES = ("coffee", "skin", "stone")
STAGES = "stages=[train,attribute,analyze,rank,isolate,correct,verify]"
OPTIONS = (
    "experiment=image_folder",
    f"dataset.image_size={small.SIDE}",
    "dataset.plant.kind=box",
    "dataset.plant.class=skin",
    "dataset.plant.rate=0.4",
    "dataset.plant.size=5",
    "dataset.plant.jitter=1",
    "model.epochs=30",
    "model.learning_rate=5e-3",
    "model.batch_size=16",
    "analysis.umap=false",
    "isolate.per_class=1",
    "isolate.latent=0",
    "device=cpu",
    STAGES,
)
# Steps so small that nothing changes: the artifact is found again in every round.
USELESS = ("correction.methods=[fine_tuned]", "correction.epochs=1", "correction.learning_rate=1e-7")
USEFUL = ("correction.methods=[a_clarc]", "correction.epochs=6", "verify.ceiling=true")


@dataclass
class World:
    options: list[str]
    folder: Path

    def run(self, name: str, *more: str) -> small.Outcome:
        return small.run(*self.options, *more, f"run_dir={self.folder / name}")

    def json(self, name: str, file: str = "verification.json") -> Any:
        return json.loads((self.folder / name / file).read_text())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("rounds")
    options = [
        *OPTIONS,
        *small.write_images(folder, dict.fromkeys(CLASSES, small.TRAIN), dict.fromkeys(CLASSES, small.TEST)),
        f"model.factory={small.write_model(folder)}:build",
    ]
    found = World(options, folder)
    for name, more in (("useless", (*USELESS, "correction.rounds=2")), ("useful", (*USEFUL, "correction.rounds=2"))):
        said = found.run(name, *more)
        assert (said.code, said.err) == (0, "")
    return found


def test_a_useless_correction_leaves_the_artifact_until_the_rounds_are_used_up(world: World) -> None:
    said = world.json("useless")
    assert [row["round"] for row in said["rounds"]] == [1, 2, 3]
    assert [row["run_dir"] for row in said["rounds"]] == [".", "rounds/2", "rounds/3"]
    assert all(len(row["artifacts"]) == 1 for row in said["rounds"])
    # The third only looks.
    assert [row["chosen"] for row in said["rounds"]] == ["fine_tuned", "fine_tuned", None]
    assert not (world.folder / "useless/rounds/3/corrected").exists()
    weights = "rounds/2/corrected/fine_tuned.pt"
    assert said["final"] == {"round": 2, "method": "fine_tuned", "within_limit": True, "weights": weights}
    assert list(said["recheck"]) == ["a01", "2/a01"]
    for row in said["recheck"].values():
        assert row["verdict"] == "left"
        assert row["after"]["jaccard"] > 0.5
    assert list(said["models"]) == ["original", "fine_tuned", "round_2"]
    folder = world.folder / "useless/rounds/2"
    for file in ("run.json", "model.pt", "attributions.h5", "analysis.h5", "ranking.json", "artifacts.json"):
        assert (folder / file).is_file(), file
    for file in ("corrected/fine_tuned.pt", "verification.json", ".hydra/config.yaml"):
        assert (folder / file).is_file(), file


def test_each_round_explains_the_model_that_the_one_before_chose(world: World) -> None:
    run = world.folder / "useless"
    weights = [run / "corrected/fine_tuned.pt", run / "rounds/2/corrected/fine_tuned.pt"]
    for number, path in enumerate(weights, start=2):
        given, own = (torch.load(p, weights_only=True) for p in (path, run / f"rounds/{number}/model.pt"))
        assert all(torch.equal(value, own[key]) for key, value in given.items())


def test_a_useful_correction_ends_the_loop(world: World) -> None:
    said = world.json("useful")
    assert len(said["rounds"]) == 2
    assert said["rounds"][1] == {"round": 2, "run_dir": "rounds/2", "artifacts": [], "chosen": None}
    assert (said["final"]["round"], said["final"]["method"]) == (1, "a_clarc")
    assert said["final"]["weights"] == "corrected/a_clarc.pt"
    assert said["final"]["within_limit"] == said["chosen"]["within_limit"]
    (row,) = said["recheck"].values()
    assert row["verdict"] in ("gone", "no_effect")
    assert row["before"]["jaccard"] > 0.9
    assert list(said["models"]) == ["original", "fine_tuned", "a_clarc", "ceiling"]


def test_the_clusters_of_the_recheck_are_those_of_the_files(world: World) -> None:
    run = world.folder / "useful"
    (row,) = world.json("useful")["recheck"].values()
    samples = set(world.json("useful", "artifacts.json")["artifacts"][0]["samples"])
    for part, folder in (("before", run), ("after", run / "rounds/2")):
        best = 0.0
        for ranked in json.loads((folder / "ranking.json").read_text())["clusters"]:
            if ranked["class_index"] == row["class_index"]:
                name, label = ranked["cluster"].rsplit("/", 1)
                members: set[int] = set()
                for file in ("analysis.h5", "candidates.h5"):
                    with h5py.File(folder / file) as opened:
                        for group in opened.values():
                            path = f"cluster/{name}"
                            if set(group["index"][:].tolist()) >= samples and path in group:
                                members = set(group["index"][:][group[path][:] == int(label)].tolist())
                assert len(members) == ranked["size"]
                best = max(best, len(members & samples) / len(members | samples))
        assert row[part]["jaccard"] == pytest.approx(best)
        assert row[part]["share"] <= 1


def test_the_choice_is_made_on_half_of_the_test_images(world: World) -> None:
    chosen = world.json("useful")["chosen"]
    models = world.json("useful")["models"]
    n = models["original"]["n"]
    assert chosen["n"] == n / 2
    best = chosen["tried"][chosen["method"]]
    # Both halves together are all of them.
    whole = (best["clean_accuracy"] + chosen["other_half"]["clean_accuracy"]) / 2
    assert whole == pytest.approx(models["a_clarc"]["clean_accuracy"])
    assert best["attacked_accuracy"] > chosen["tried"]["original"]["attacked_accuracy"] + 0.2
    assert "test images" in chosen["why"]


def test_the_ceiling_never_saw_the_artifact_and_is_trained_alike(world: World) -> None:
    run = world.folder / "useful"
    record = json.loads((run / "ceiling/run.json").read_text())
    assert list(record["stages"]) == ["train"]
    assert not (run / "ceiling/planted.json").exists()
    plain = world.run("clean", "stages=[train]", "dataset.plant.kind=none")
    assert plain.code == 0
    ours, theirs = (torch.load(p / "model.pt", weights_only=True) for p in (run / "ceiling", world.folder / "clean"))
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    ceiling = world.json("useful")["models"]["ceiling"]
    original = world.json("useful")["models"]["original"]
    assert ceiling["planted"]["attacked_accuracy"] > original["planted"]["attacked_accuracy"] + 0.2


def test_rounds_of_an_earlier_configuration_are_removed_and_corrections_kept(world: World) -> None:
    import shutil

    copy = world.folder / "copied"
    shutil.copytree(world.folder / "useless", copy)
    said = world.run("copied", *USELESS, "correction.rounds=1", "verify.recheck=false")
    assert said.code == 0
    assert "correct: up to date" in said.out
    assert not list((copy / "rounds").glob("*"))
    assert world.json("copied")["recheck"] == {}
    assert world.json("copied")["final"]["round"] == 1


@pytest.mark.parametrize("stage", ["rank", pytest.param("correct", marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_in_round_2_goes_on_there(
    world: World, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    import importlib
    import shutil

    module = importlib.import_module(f"spray.pipelines.{stage}")
    name = f"stopped-{stage}"
    shutil.copytree(world.folder / "useless", world.folder / name)
    shutil.rmtree(world.folder / name / "rounds")
    work = module.STAGE.run

    def stop(context: Context) -> Any:
        if context.run_dir.name == "2":
            raise KeyboardInterrupt
        return work(context)

    with monkeypatch.context() as patch:
        patch.setattr(module, "STAGE", replace(module.STAGE, run=stop))
        said = world.run(name, *USELESS, "correction.rounds=2", "verify.n_explained=499")
        assert said.code == 130
    record = world.json(f"{name}/rounds/2", "run.json")["stages"]
    assert record["attribute"]["status"] == "done"
    assert record[stage]["status"] == "failed"
    kept = world.folder / name / "rounds/2/attributions.h5"
    before = kept.stat().st_mtime_ns
    said = world.run(name, *USELESS, "correction.rounds=2")
    assert said.code == 0
    assert kept.stat().st_mtime_ns == before
    assert world.json(name) == world.json("useless")


@pytest.mark.slow
def test_a_run_that_is_killed_in_round_2_goes_on_there(world: World) -> None:
    command = [sys.executable, "-m", "spray.pipelines.cli", *world.options, *USELESS, "correction.rounds=2"]
    command += [f"run_dir={world.folder / 'killed'}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    record = world.folder / "killed/rounds/2/run.json"
    until = time.monotonic() + 300
    while time.monotonic() < until and process.poll() is None:
        try:
            if json.loads(record.read_text())["stages"]["analyze"]["status"] == "running":
                break
        except (OSError, KeyError):
            pass
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    said = world.run("killed", *USELESS, "correction.rounds=2")
    assert said.code == 0
    assert world.json("killed")["recheck"] == world.json("useless")["recheck"]
    assert world.json("killed")["rounds"] == world.json("useless")["rounds"]


@pytest.mark.slow
def test_a_projected_model_is_looked_at_and_corrected_again(world: World) -> None:
    weak = ["correction.methods=[p_clarc]", "correction.layer='4'", "correction.strength={p_clarc: 0.02}"]
    # An inner layer goes by its name in the architecture, however many projections are around it.
    weak += ["attribution.layer=['4']"]
    said = world.run("projected", *weak, *USELESS[1:], "correction.rounds=2")
    assert (said.code, said.err) == (0, "")
    found = world.json("projected")
    assert [row["chosen"] for row in found["rounds"]] == ["p_clarc", "p_clarc", None]
    # Two projections around each other by now.
    state = torch.load(world.folder / "projected" / found["final"]["weights"], weights_only=True)
    assert any(key.startswith("model.projections.") for key in state)
    assert {row["verdict"] for row in found["recheck"].values()} == {"left"}
    models = found["models"]
    assert models["round_2"]["attacked_accuracy"] >= models["original"]["attacked_accuracy"]


@pytest.mark.slow
def test_two_artifacts_are_found_and_corrected_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In a round only the strongest is known, whatever else was proven.
    for stage in ("correct", "verify", "rounds", "recheck"):
        monkeypatch.setattr(f"spray.pipelines.{stage}.load_findings", lambda run_dir: load_findings(run_dir)[:1])
    scripts = Path(__file__).parent.parent / "scripts"
    said = small.run(
        "experiment=image_folder",
        "dataset=factory",
        f"dataset.factory={scripts / 'hans_data.py'}:photos32",
        "dataset.options={seed: 0}",
        "dataset.per_class=120",
        "dataset.mean=[0.5]",
        "dataset.std=[0.25]",
        "dataset.plant={kind: tag, class: 6, rate: 0.4, jitter: 1}",
        "dataset.plants=[{kind: frame, class: 3, rate: 0.4, size: 2, jitter: 0}]",
        "model=small_cnn",
        f"model.factory={scripts / 'rank_data.py'}:grey",
        "model.epochs=10",
        "analysis.umap=false",
        "isolate.per_class=1",
        "isolate.latent=0",
        "isolate.n_tested=150",
        "correction.methods=[a_clarc]",
        "correction.epochs=5",
        "correction.learning_rate=1e-3",
        "correction.max_loss=0.1",
        "correction.rounds=2",
        "verify.recheck=false",
        "device=cpu",
        STAGES,
        f"run_dir={tmp_path}",
    )
    assert said.code == 0
    found = json.loads((tmp_path / "verification.json").read_text())
    true = {
        row["class_index"]: set(row["samples"]) for row in json.loads((tmp_path / "planted.json").read_text())["plants"]
    }
    seen = []
    for row in found["rounds"]:
        listed = json.loads((tmp_path / row["run_dir"] / "artifacts.json").read_text())["artifacts"]
        first = next(each for each in listed if each["verdict"] in ("clever_hans", "backdoor"))
        seen.append(first["class_index"])
        samples, planted = set(first["samples"]), true[first["class_index"]]
        assert len(samples & planted) >= 0.9 * len(samples), "it is the planted one"
    assert sorted(seen) == [3, 6]
    assert (found["final"]["round"], [row["chosen"] for row in found["rounds"]]) == (2, ["a_clarc", "a_clarc"])
    keys = ("plant", "plants[0]") if seen == [6, 3] else ("plants[0]", "plant")
    attacked = {
        name: [found["models"][name]["planted"]["plants"][key]["attacked_accuracy"] for key in keys]
        for name in ("original", "a_clarc", "round_2")
    }
    assert max(attacked["original"]) < 0.2
    assert attacked["a_clarc"][0] > attacked["original"][0] + 0.2
    assert attacked["a_clarc"][1] < 0.25, "what was not found yet still acts"
    assert attacked["round_2"][0] > attacked["original"][0] + 0.2
    assert attacked["round_2"][1] > attacked["original"][1] + 0.2
    clean = [found["models"][name]["clean_accuracy"] for name in ("original", "round_2")]
    assert clean[1] > clean[0] - 0.06


def test_what_cannot_be_is_told(world: World) -> None:
    said = world.run("none", "verify.ceiling=true", "dataset.plant.kind=none")
    assert said.code == 2
    assert "verify.ceiling=true needs a planted artifact" in said.err
    weights = world.folder / "useless/model.pt"
    said = world.run("none", "verify.ceiling=true", f"model.checkpoint={weights}")
    assert said.code == 2
    assert "trained here" in said.err
    assert "correction.rounds=0 is out of range" in world.run("none", "correction.rounds=0").err


def test_the_plan_tells_of_rounds_and_ceiling(world: World) -> None:
    said = world.run("planned", "plan=true", "verify.ceiling=true", "correction.rounds=3")
    assert said.code == 0
    assert "up to 3 times, in rounds/2 to rounds/4" in said.out
    assert "a second model is trained" in said.out
    once = world.run("planned", "plan=true").out
    assert "up to 1 time, in rounds/2 (" in once
    assert "second model" not in once
    assert "rounds/" not in world.run("planned", "plan=true", "verify.recheck=false").out
    assert not (world.folder / "planned").exists()


def test_layers_have_other_names_in_a_projected_model() -> None:
    inner = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model: nn.Module = inner
    for prefix in ("", "model."):
        model = Projected(model, [Projection(f"{prefix}1", torch.eye(4)[:1], torch.zeros(1))])
    config = SprayConfig()
    config.attribution.layer, config.attribution.composite = ["1", "other"], {"conv": "z_plus", "0": "epsilon"}
    config.analysis.source, config.correction.layer = "1", "2:in"
    found = rounds.inside(config, model)
    assert found.attribution.layer == ["model.model.1", "other"]
    assert found.attribution.composite == {"conv": "z_plus", "model.model.0": "epsilon"}
    assert (found.analysis.source, found.correction.layer) == ("model.model.1", "model.model.2:in")
    assert config.attribution.layer == ["1", "other"]
    assert rounds.inside(config, inner) is config
    assert rounds.inside(SprayConfig(), model).correction.layer == "auto"


def cluster(jaccard: float, q: float, separability: float) -> dict[str, Any]:
    return {"jaccard": jaccard, "q_value": q, "p_value": q, "separability": separability}


def test_a_cluster_stands_out_if_it_is_significant_or_as_separable_as_before() -> None:
    before = cluster(1.0, 0.2, 10.0)
    assert not recheck.stands_out(before, None)
    assert not recheck.stands_out(before, cluster(0.4, 0.001, 20.0))
    assert recheck.stands_out(before, cluster(0.6, 0.001, 1.0))
    assert recheck.stands_out(before, cluster(0.6, 0.9, 5.5))
    assert not recheck.stands_out(before, cluster(0.6, 0.9, 4.5))


def test_the_half_has_half_of_each_class() -> None:
    labels = np.array([0] * 10 + [1] * 7 + [2])
    half = rounds.half_of(labels, 0)
    assert [int(half[labels == c].sum()) for c in range(3)] == [5, 4, 1]
    assert not np.array_equal(half, rounds.half_of(labels, 1))


def hits(labels: np.ndarray, clean: float, attacked: float, seed: int) -> rounds.Hits:
    rng = np.random.default_rng(seed)
    others = labels != 1
    return rounds.Hits(rng.random(len(labels)) < clean, [(others, rng.random(len(labels)) < attacked)])


def test_the_best_of_those_that_cost_nothing_is_chosen() -> None:
    labels = np.arange(4000) % 4
    models = {
        "original": hits(labels, 0.9, 0.2, 0),
        "fine_tuned": hits(labels, 0.9, 0.4, 1),
        "a_clarc": hits(labels, 0.9, 0.8, 2),
        "costly": hits(labels, 0.7, 0.88, 3),
    }
    chosen = rounds.choose(labels, models, 0, 0.005)
    assert (chosen["method"], chosen["within_limit"]) == ("a_clarc", True)
    half = rounds.half_of(labels, 0)
    for name, row in chosen["tried"].items():
        right = models[name].attacked[0][1]
        assert row["clean_accuracy"] == sum(models[name].clean[half].tolist()) / half.sum()
        seen = [bool(right[i]) for i in range(len(labels)) if half[i] and labels[i] != 1]
        assert row["attacked_accuracy"] == pytest.approx(sum(seen) / len(seen))
    rest = [bool(models["a_clarc"].attacked[0][1][i]) for i in range(len(labels)) if not half[i] and labels[i] != 1]
    assert chosen["other_half"]["attacked_accuracy"] == pytest.approx(sum(rest) / len(rest))
    low, high = chosen["other_half"]["attacked_accuracy_interval"]
    assert low < chosen["other_half"]["attacked_accuracy"] < high


def test_what_the_other_half_shows_has_no_say() -> None:
    labels = np.arange(4000) % 4
    models = {"original": hits(labels, 0.9, 0.2, 0), "one": hits(labels, 0.9, 0.6, 1), "two": hits(labels, 0.9, 0.5, 2)}
    half = rounds.half_of(labels, 0)
    models["two"].attacked[0][1][~half] = True
    assert rounds.choose(labels, models, 0, 0.005)["method"] == "one"
    models["two"].attacked[0][1][half] = True
    assert rounds.choose(labels, models, 0, 0.005)["method"] == "two"


def test_a_correction_that_gives_up_a_class_is_not_chosen() -> None:
    labels = np.arange(4000) % 4
    models = {"original": hits(labels, 0.9, 0.2, 0), "one": hits(labels, 0.9, 0.6, 1), "two": hits(labels, 1.0, 0.9, 2)}
    models["two"].clean[(labels == 3) & (np.arange(4000) % 8 == 3)] = False
    assert models["two"].clean.mean() > 0.87
    chosen = rounds.choose(labels, models, 0, 0.05)
    assert (chosen["method"], chosen["tried"]["two"]["allowed"]) == ("one", False)
    assert chosen["tried"]["two"]["worst_class_accuracy"] == pytest.approx(0.5, abs=0.03)
    # With the artifact it may not either.
    models["two"].clean[:] = True
    models["original"].attacked[0][1][labels == 3] = True
    models["one"].attacked[0][1][labels == 3] = True
    models["two"].attacked[0][1][labels == 3] = False
    assert not rounds.choose(labels, models, 0, 0.005)["tried"]["two"]["allowed"]


def test_where_all_cost_clean_accuracy_the_best_of_both_is_chosen_and_said_to_be_too_dear() -> None:
    labels = np.arange(4000) % 4
    models = {"original": hits(labels, 0.9, 0.2, 0), "a": hits(labels, 0.7, 0.9, 1), "b": hits(labels, 0.8, 0.3, 2)}
    chosen = rounds.choose(labels, models, 0, 0.005)
    assert (chosen["method"], chosen["within_limit"]) == ("a", False)
    assert "highest together" in chosen["why"]


def test_the_control_is_chosen_only_where_there_is_nothing_else() -> None:
    labels = np.arange(400) % 4
    good, bad = hits(labels, 0.9, 0.9, 1), hits(labels, 0.9, 0.1, 2)
    assert rounds.choose(labels, {"original": bad, "fine_tuned": good, "dfr": bad}, 0, 0.005)["method"] == "dfr"
    assert rounds.choose(labels, {"original": bad, "fine_tuned": good}, 0, 0.005)["method"] == "fine_tuned"
