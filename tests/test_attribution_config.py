"""What a configuration asks of an attribution method reaches it, and mistakes are found before anything is computed."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import small
import torch

from spray import explain
from spray.errors import UserError

OPTIONS = ("dataset.name=photos", "dataset.plant.kind=none", "dataset.per_class=4", "model.epochs=1", "device=cpu")
FIRST = "stages=[train,attribute]"


def heatmaps(folder: Path, *options: str) -> np.ndarray:
    said = small.run(*OPTIONS, FIRST, f"run_dir={folder}", *options)
    assert (said.code, said.err) == (0, "")
    with h5py.File(folder / "attributions.h5") as file:
        return np.asarray(file["attribution"][:])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    folder = tmp_path_factory.mktemp("plain")
    return folder, heatmaps(folder)


def same_model(folder: Path, plain: Path) -> None:
    weights = [torch.load(run / "model.pt", weights_only=True) for run in (folder, plain)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_an_own_composite_is_that_mapping_of_explain(plain: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    found = heatmaps(tmp_path, "attribution=custom")
    same_model(tmp_path, plain[0])
    assert not np.allclose(found, plain[1])
    by_hand = heatmaps(tmp_path / "gamma", "attribution=epsilon_gamma_box", "attribution.options={gamma: 0.1}")
    np.testing.assert_array_equal(found, by_hand)


def test_options_reach_the_method_and_start_its_stage_anew(plain: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    first = heatmaps(tmp_path, "attribution=epsilon")
    second = heatmaps(tmp_path, "attribution=epsilon", "attribution.options={zero_bias: true}")
    assert not np.allclose(first, second)


def test_a_mapping_may_name_modules(tmp_path: Path, plain: tuple[Path, np.ndarray]) -> None:
    found = heatmaps(tmp_path, "attribution.composite={first: flat, convolution: z_plus, linear: epsilon}")
    np.testing.assert_array_equal(found, plain[1])


@pytest.mark.parametrize("method", ["gradient_x_input", "smooth_grad", "grad_cam"])
def test_other_methods_take_their_options(method: str, tmp_path: Path) -> None:
    options = {"smooth_grad": ["attribution.options={n_samples: 2, seed: 3}"]}.get(method, [])
    found = heatmaps(tmp_path, f"attribution.method={method}", *options)
    assert np.isfinite(found).all()
    assert np.abs(found).max() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["attribution.options={gamma: 0.1}"], "takes no option gamma; allowed: epsilon"),
        (["attribution.options={layer: fc}"], "attribution.options has layer"),
        (["attribution.options=gamma"], "is no mapping"),
        (["attribution.layer=fc"], "the model has no layer 'fc'"),
        (["attribution.method=grad_cam", "attribution.layer=fd"], "fd"),
        (["attribution.composite={frist: flat}"], "neither a kind of layer"),
        (["attribution.composite={first: flatt}"], "did you mean 'flat'"),
        (["attribution.options={relevance_dtype: int8}"], "allowed: float32, float64, bfloat16"),
        (["attribution.options={addition: half}"], "allowed: norm, equal, magnitude"),
    ],
)
def test_mistakes_are_found_before_the_training(options: list[str], message: str, tmp_path: Path) -> None:
    said = small.run(*OPTIONS, f"run_dir={tmp_path}", *options)
    assert said.code == 2
    assert message in said.err
    assert "Traceback" not in said.err
    assert not (tmp_path / "model.pt").exists()


def test_explain_takes_what_the_configuration_takes() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8, 2))
    x = torch.rand(1, 1, 4, 4)
    mapping = {"first": {"rule": "z_box", "low": 0.0, "high": 1.0}, "convolution": {"rule": "gamma", "gamma": 0.1}}
    named = explain(model.eval(), x, 0, composite="epsilon_gamma_box", low=0.0, high=1.0, gamma=0.1)
    assert torch.equal(explain(model, x, 0, composite=mapping), named)


def test_pass_hands_relevance_on_where_shapes_agree() -> None:
    torch.manual_seed(0)
    first, second, head = torch.nn.Conv2d(1, 2, 3, padding=1), torch.nn.Conv2d(2, 2, 3, padding=1), torch.nn.Flatten()
    model = torch.nn.Sequential(first, second, head).eval()
    x = torch.rand(2, 1, 4, 4)
    at_output = explain(model, x, 5, composite={"1": "pass"}, layer="1")
    torch.testing.assert_close(explain(model, x, 5, composite={"1": "pass"}, layer="0"), at_output)
    with pytest.raises(UserError, match="as many outputs as inputs"):
        explain(model, x, 5, composite={"0": "pass"})
