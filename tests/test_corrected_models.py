"""Corrected models on disk: made by the stage, loaded by later stages and by users, and corrected again."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from cheating import NORMALIZER, World
from torch import nn

import spray
from spray.correction import CORRECTIONS, Options, Projected, Projection, load_weights
from spray.correction.wrapped import is_wrapped, unwrapped
from spray.errors import UserError
from spray.isolation.candidate import Artifact
from spray.pipelines import correct
from spray.pipelines.config import typed_config
from spray.pipelines.context import Context
from spray.pipelines.isolated import load_findings, save_artifact
from spray.pipelines.weights import save_weights
from spray.training import predict


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def wrapped(world: World, **changes: object) -> nn.Module:
    options = Options(layer="1", strength=0.75, directions=2)
    return CORRECTIONS.get("reactive_p_clarc")(world.problem(options=options, **changes))


def test_a_projected_model_is_tensors_alone_and_comes_back_the_same(world: World, tmp_path: Path) -> None:
    model = wrapped(world)
    assert isinstance(model, Projected)
    save_weights(tmp_path / "x.pt", model)
    state = torch.load(tmp_path / "x.pt", weights_only=True)
    assert is_wrapped(state)
    assert not is_wrapped(world.model.state_dict())
    architecture = copy.deepcopy(world.model)
    nn.init.zeros_(architecture[1].weight)
    loaded = load_weights(architecture, str(tmp_path / "x.pt"))
    assert isinstance(loaded, Projected)
    assert [p.layer for p in loaded.projections] == ["1"]
    assert torch.equal(predict(loaded.eval(), world.attacked, NORMALIZER), predict(model, world.attacked, NORMALIZER))
    save_weights(tmp_path / "y.pt", loaded)
    assert (tmp_path / "x.pt").read_bytes() == (tmp_path / "y.pt").read_bytes()


def test_a_corrected_model_can_be_corrected_again(world: World, tmp_path: Path) -> None:
    once = wrapped(world)
    problem = world.problem(model=copy.deepcopy(once), options=Options(layer="model.2", strength=1.0))
    twice = CORRECTIONS.get("p_clarc")(problem)
    save_weights(tmp_path / "x.pt", twice)
    loaded = load_weights(copy.deepcopy(world.model), str(tmp_path / "x.pt")).eval()
    assert torch.equal(predict(loaded, world.attacked, NORMALIZER), predict(twice, world.attacked, NORMALIZER))
    assert not torch.equal(predict(loaded, world.attacked, NORMALIZER), predict(once, world.attacked, NORMALIZER))
    nested = Projected(once, [Projection("model.2", torch.eye(64)[:1], torch.zeros(1))]).eval()
    save_weights(tmp_path / "z.pt", nested)
    loaded = load_weights(copy.deepcopy(world.model), str(tmp_path / "z.pt")).eval()
    assert torch.equal(predict(loaded, world.attacked, NORMALIZER), predict(nested, world.attacked, NORMALIZER))


def test_damaged_and_foreign_files_end_in_one_line(world: World, tmp_path: Path) -> None:
    (tmp_path / "corrected").mkdir()
    path = tmp_path / "corrected/p_clarc.pt"
    good = wrapped(world).state_dict()

    def refused(state: dict, words: str) -> None:
        torch.save(state, path)
        architecture = copy.deepcopy(world.model)
        with pytest.raises(UserError, match=words) as error:
            spray.load_corrected(tmp_path, "p_clarc", architecture)
        assert "\n" not in str(error.value)

    refused({key: v for key, v in good.items() if not key.endswith("offsets")}, "damaged")
    refused(good | {"projections.0.layer_name": torch.tensor(list(b"9"), dtype=torch.uint8)}, "no layer '9'")
    refused(good | {"projections.0.layer_name": torch.tensor([255, 254], dtype=torch.uint8)}, "damaged")
    refused(good | {"projections.0.offsets": torch.zeros(7)}, "damaged")
    refused(good | {"projections.one.offsets": torch.zeros(2)}, "damaged")
    refused({key: v for key, v in good.items() if key != "model.3.bias"}, "lacks 3.bias")
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="no checkpoint of PyTorch"):
        spray.load_corrected(tmp_path, "p_clarc", world.model)
    with pytest.raises(UserError, match=r"there is no .*rrr.pt; .* has: original, p_clarc"):
        spray.load_corrected(tmp_path, "rrr", world.model)


def test_the_state_says_everything() -> None:
    H = torch.linalg.qr(torch.randn(6, 2)).Q.T
    gate = torch.randn(6), torch.tensor(0.3)
    model = Projected(nn.Sequential(nn.Conv2d(1, 6, 3)), [Projection("0", H, torch.ones(2), 1, 0.5, gate)])
    inner, (projection,) = unwrapped(model.state_dict())
    assert set(inner) == {"0.weight", "0.bias"}
    assert (projection.layer, projection.dim, float(projection.strength)) == ("0", 1, 0.5)
    a = torch.randn(8, 6, 4, 4)
    assert torch.equal(projection(a), model.projections[0](a))


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    """A run whose stages up to `isolate` are done: a network, not trained, and a box in some images of class 1."""
    folder = tmp_path_factory.mktemp("stage")
    images = small.write_images(folder, dict.fromkeys(("coffee", "skin"), 24), dict.fromkeys(("coffee", "skin"), 4))
    train, test = (option.partition("=")[2] for option in images)
    run_dir = folder / "run"
    config = typed_config(
        {
            "run_dir": str(run_dir),
            "device": "cpu",
            "dataset": {"name": "image_folder", "train": train, "test": test, "image_size": small.SIDE},
            "model": {"factory": f"{small.write_model(folder)}:build", "batch_size": 16},
            "correction": {
                "methods": ["p_clarc", "reactive_p_clarc", "rr_clarc"],
                "layer": "1",
                "epochs": 1,
                "strength": {"rr_clarc": 5},
            },
        }
    )
    context = Context(config, run_dir, logging.getLogger("test"))
    save_weights(run_dir / "model.pt", context.build_model())
    mask = torch.zeros(small.SIDE, small.SIDE)
    mask[:5, :5] = 1
    artifact = Artifact(mask, torch.ones(3, *mask.shape), torch.zeros(2, 2, dtype=torch.int64), 0.5, 1, True)
    save_artifact(run_dir / "artifacts/a01/artifact.npz", artifact)
    scores = "".join(f"{i},{0.9 if i in range(24, 32) else 0.1}\n" for i in reversed(range(48)))
    (run_dir / "artifacts/a01/scores.csv").write_text("sample_index,score\n" + scores)
    row = {"id": "a01", "class_index": 1, "samples": list(range(24, 32)), "verdict": "backdoor"}
    (run_dir / "artifacts.json").write_text(json.dumps({"artifacts": [row]}))
    return context


def test_findings_come_with_the_scores_of_all_samples_in_their_order(context: Context) -> None:
    ((name, finding),) = load_findings(context.run_dir)
    assert name == "a01"
    assert np.flatnonzero(finding.scores > 0.5).tolist() == list(range(24, 32))
    assert len(finding.scores) == len(context.train) == 48


def test_the_stage_writes_what_later_stages_and_users_load(context: Context) -> None:
    facts = correct.run(context)
    methods = ["fine_tuned", "p_clarc", "reactive_p_clarc", "rr_clarc"]
    assert facts["methods"] == methods
    assert json.loads(json.dumps(facts)) == facts
    assert facts["details"]["rr_clarc"]["chosen"] == {"layer": "1 (full)", "strength": 5.0}
    assert {"layer", "strength"} == set(facts["details"]["p_clarc"]["chosen"])
    x = context.normalizer(context.test.batch(np.arange(8)))
    for method in methods:
        path = context.run_dir / "corrected" / f"{method}.pt"
        later, users = context.load_model(path), spray.load_corrected(context.run_dir, method, context.build_model())
        assert isinstance(later, Projected) == ("p_clarc" in method)
        with torch.no_grad():
            assert torch.equal(later(x), users(x))
            assert later(x).isfinite().all()
        # As verify and compare do it: explained, and taken for a model of its own.
        assert context.explain(later, x, 1).abs().sum() > 0
        own = context.with_model(path, context.run_dir / "compared" / method).build_model()
        with torch.no_grad():
            assert torch.equal(own(x), later(x))
    original = spray.load_corrected(context.run_dir, "original", context.build_model())
    with torch.no_grad():
        assert torch.equal(original(x), context.model(x))
