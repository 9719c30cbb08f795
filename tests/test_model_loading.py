"""Architectures by name and by the user's own function, checkpoints, checks of a model; datasets by name."""

from __future__ import annotations

import logging
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from spray.data.loading import DATASETS
from spray.errors import UserError
from spray.models.loading import build_model, check_model, load_checkpoint

RGB = (3, 32, 32)


def refused(call: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def small(seed: int = 0, n_classes: int = 4) -> nn.Module:
    return build_model("small_cnn", None, n_classes, RGB, seed)


# ---------------------------------------------------------------- by name


def test_the_seed_decides_the_weights_and_the_global_random_state_stays() -> None:
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    one, same, other = small(0), small(0), small(1)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    weights = [model.state_dict()["features.0.weight"] for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_small_cnn_takes_the_datasets_channels_and_classes() -> None:
    model = build_model("small_cnn", None, 7, (1, 28, 28), 0)
    check_model(model, torch.zeros(2, 1, 28, 28), 7)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 32),
        ("vit_b_32", 64),
        ("maxvit_t", 224),
        ("googlenet", 64),
        ("inception_v3", 96),
    ],
)
def test_torchvision_classifiers(name: str, size: int) -> None:
    model = build_model(name, None, 5, (3, size, size), 0)
    check_model(model, torch.zeros(1, 3, size, size), 5)
    if name in ("googlenet", "inception_v3"):
        # One tensor in training too, where torchvision's own models add their auxiliary heads.
        with torch.no_grad():
            assert isinstance(model.train()(torch.rand(2, 3, size, size)), Tensor)


def test_names_that_cannot_be_built() -> None:
    assert "did you mean 'resnet18'" in refused(build_model, "resnet_18", None, 2, RGB, 0)
    assert "did you mean 'small_cnn'" in refused(build_model, "smallcnn", None, 2, RGB, 0)
    # A segmentation and a detection model of torchvision: known there, but no classifiers.
    assert "unknown model.name" in refused(build_model, "fcn_resnet50", None, 2, RGB, 0)
    assert "unknown model.name" in refused(build_model, "fasterrcnn_resnet50_fpn", None, 2, RGB, 0)
    assert "3 channels" in refused(build_model, "resnet18", None, 2, (1, 32, 32), 0)
    assert "does not take images of 50×50" in refused(build_model, "vit_b_16", None, 2, (3, 50, 50), 0)


# ---------------------------------------------------------------- by factory

GOOD = """
from dataclasses import dataclass
from torch import nn
import sibling_of_factory

@dataclass
class Options:
    width: int = sibling_of_factory.WIDTH

def build():
    from lazy_sibling import LAZY
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, Options().width), nn.Linear(LAZY, 4))

def sized(num_classes):
    return nn.Linear(2, num_classes)

def keyword(*, n_classes=3):
    return nn.Linear(2, n_classes)

class Net(nn.Linear):
    def __init__(self):
        super().__init__(2, 3)

number = 5
def needs(width): return nn.Linear(width, 2)
def nothing(): pass
def listed(): return [nn.Linear(2, 2)]
def raises(): raise KeyError("no\\nsuch")
def quits(): raise SystemExit(3)
"""


@pytest.fixture
def factory(tmp_path: Path) -> Path:
    (tmp_path / "sibling_of_factory.py").write_text("WIDTH = 6")
    (tmp_path / "lazy_sibling.py").write_text("LAZY = 6")
    path = tmp_path / "my_model.py"
    path.write_text(GOOD)
    return path


def built(factory: str, n_classes: int = 4) -> nn.Module:
    return build_model("ignored", factory, n_classes, RGB, 0)


def test_factory_in_a_file(factory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, modules = list(sys.path), set(sys.modules)
    check_model(built(f"{factory}:build"), torch.zeros(2, *RGB), 4)
    assert sys.path == path
    assert "my_model" not in set(sys.modules) - modules
    monkeypatch.chdir(factory.parent)
    assert torch.equal(built("my_model.py:build")[1].weight, built(f"{factory}:build")[1].weight)
    assert built(f"{factory}:sized", 9).out_features == 9
    assert built(f"{factory}:keyword", 9).out_features == 9
    assert built(f"{factory}:Net").out_features == 3


def test_factory_in_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "factory_package_of_test"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "nets.py").write_text("from torch import nn\ndef build(): return nn.Linear(2, 3)")
    monkeypatch.chdir(tmp_path)
    assert built("factory_package_of_test.nets:build").out_features == 3
    assert isinstance(built("torch.nn:Identity"), nn.Identity)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("biuld", "did you mean 'build'"),
        ("zzz", "has no function 'zzz'"),
        ("number", "not a function"),
        ("needs", "missing 1 required positional argument"),
        ("nothing", "returns None"),
        ("listed", "returns a list"),
        ("raises", "KeyError"),
        ("quits", "SystemExit"),
    ],
)
def test_mistakes_in_the_function(factory: Path, function: str, message: str) -> None:
    assert message in refused(built, f"{factory}:{function}")


def test_an_error_says_where(factory: Path) -> None:
    line = 1 + GOOD.splitlines().index('def raises(): raise KeyError("no\\nsuch")')
    assert f"(my_model.py:{line})" in refused(built, f"{factory}:raises")


def test_mistakes_in_the_factorys_name_or_file(tmp_path: Path) -> None:
    for name in ("my_model.py", "build", ":build", "my_model.py:"):
        assert "FILE.py:FUNCTION" in refused(built, name)
    assert "no file" in refused(built, f"{tmp_path}/absent.py:build")
    (tmp_path / "syntax.py").write_text("x = 1\ndef build(:\n")
    assert "syntax.py:2 is no valid Python" in refused(built, f"{tmp_path}/syntax.py:build")
    (tmp_path / "broken.py").write_text("import no_such_package_at_all\n")
    message = refused(built, f"{tmp_path}/broken.py:build")
    assert "no_such_package_at_all" in message
    assert "(broken.py:1)" in message
    assert "FILE.py:FUNCTION" in refused(built, "no_such_package_at_all.x:build")


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model_state_dict": state, "optimizer": {"lr": 0.1}},
        lambda state: {"model": state, "note": "x"},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"module._orig_mod.{key}": value for key, value in state.items()}},
        lambda state: {key: value.half().float() for key, value in state.items()},
    ],
)
def test_checkpoints_that_fit(tmp_path: Path, wrap: Callable[[dict], dict]) -> None:
    source, model = small(0), small(1)
    torch.save(wrap(source.state_dict()), tmp_path / "c.pt")
    load_checkpoint(model, str(tmp_path / "c.pt"))
    for key, value in source.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-3, atol=1e-4)


def test_a_prefix_of_the_model_itself_stays(tmp_path: Path) -> None:
    source, model = nn.ModuleDict({"module": nn.Linear(2, 2)}), nn.ModuleDict({"module": nn.Linear(2, 2)})
    torch.save(source.state_dict(), tmp_path / "c.pt")
    load_checkpoint(model, str(tmp_path / "c.pt"))
    assert torch.equal(model["module"].weight, source["module"].weight)


def test_auxiliary_heads_of_torchvisions_checkpoints_are_not_needed(tmp_path: Path) -> None:
    from torchvision.models import googlenet

    source = googlenet(weights=None, num_classes=5, aux_logits=True, init_weights=False)
    torch.save(source.state_dict(), tmp_path / "c.pt")
    model = build_model("googlenet", None, 5, RGB, 0)
    load_checkpoint(model, str(tmp_path / "c.pt"))
    assert torch.equal(model.fc.weight, source.fc.weight)


def test_checkpoints_that_do_not_fit_change_nothing(tmp_path: Path) -> None:
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state, path = small(1).state_dict(), str(tmp_path / "c.pt")

    def message(content: object) -> str:
        torch.save(content, path)
        return refused(load_checkpoint, model, path)

    fewer = {key: value for key, value in state.items() if key != "classifier.3.bias"}
    assert "lacks classifier.3.bias" in message(fewer)
    assert "has in excess extra.weight" in message(state | {"extra.weight": torch.zeros(1)})
    other = message(nn.Linear(2, 2).state_dict())
    assert "lacks" in other
    assert "and 7 more" in other
    assert "has in excess bias, weight" in other
    classes = message(small(1, n_classes=9).state_dict())
    assert "has shape (9" in classes
    assert "number of classes" in classes
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    model, path = small(), tmp_path / "c.pt"
    assert "there is no checkpoint" in refused(load_checkpoint, model, str(path))
    assert "cannot read" in refused(load_checkpoint, model, str(tmp_path))
    torch.save(model.state_dict(), path)
    content = path.read_bytes()
    # Of a later protocol than torch writes, of which it warns.
    plain = pickle.dumps({"weight": [1.0]}, protocol=4)
    for bad in (b"", b"some text, no checkpoint", b"not one", content[: len(content) // 2], b"PK\x03\x04junk", plain):
        path.write_bytes(bad)
        assert "no checkpoint of PyTorch" in refused(load_checkpoint, model, str(path))
    for bad in ([1, 2], {}, {"a": 1}, {"state_dict": {}}, torch.zeros(2), {1: torch.zeros(2)}):
        torch.save(bad, path)
        assert "holds no state_dict" in refused(load_checkpoint, model, str(path))
    torch.save(model, path)
    assert "model.state_dict()" in refused(load_checkpoint, model, str(path))


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"weight": Evil()}, tmp_path / "c.pt")
    assert "more than tensors" in refused(load_checkpoint, small(), str(tmp_path / "c.pt"))
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- check_model


class Returns(nn.Module):
    def __init__(self, answer: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.answer = answer
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> object:
        return self.answer(self.norm(x))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: x.flatten(1)[:, :4] * float("nan"), "not finite"),
        (lambda x: x.flatten(1)[:, :4] + float("inf"), "not finite"),
        (lambda x: (x.flatten(1)[:, :4],), "returns a tuple"),
        (lambda x: {"logits": x}, "returns a dict"),
        (lambda x: x.flatten(1)[:, :5], r"(2, 5)"),
        (lambda x: x[:, :, :2, :2], "(2, 3, 2, 2)"),
        (lambda x: x.flatten(1)[:1, :4], "(1, 4)"),
        (lambda x: x.flatten(1)[:, :4].argsort(), "not finite"),
        (lambda x: x @ torch.zeros(5, 5), "RuntimeError"),
    ],
)
def test_models_that_cannot_be_studied(answer: Callable[[Tensor], object], message: str) -> None:
    assert message in refused(check_model, Returns(answer), torch.rand(2, *RGB), 4)


def test_checking_leaves_the_model_as_it_was() -> None:
    model = Returns(lambda x: x.flatten(1)[:, :4]).train()
    model.norm.eval()
    before = model.norm.running_mean.clone()
    check_model(model, torch.rand(2, *RGB), 4)
    assert model.training
    assert not model.norm.training
    assert torch.equal(model.norm.running_mean, before)


# ---------------------------------------------------------------- datasets by name


def options(**changes: object) -> SimpleNamespace:
    defaults = {"train": None, "test": None, "image_size": None, "mean": [0.5], "std": [0.5], "plant": {}}
    own = {"factory": None, "options": None, "check": True}
    return SimpleNamespace(**(defaults | own | changes))


def make_tree(folder: Path, classes: str) -> str:
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (9, 7), (i, 20, 30)).save(folder / name / f"{i}.png")
    return str(folder)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    return {"train": make_tree(tmp_path / "train", "ab"), "test": make_tree(tmp_path / "test", "ab")}


def load(name: str, **changes: object) -> tuple:
    return DATASETS.get(name)(options(**changes))


def test_image_folder_by_name(folders: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    (Path(folders["train"]) / "a" / "bad.png").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        train, test = load("image_folder", image_size=8, **folders)
    assert train.classes == test.classes == ("a", "b")
    assert (len(train), len(test)) == (4, 4)
    assert test.batch(np.arange(4)).shape == (4, 3, 8, 8)
    assert "bad.png: the file is empty" in caplog.text


def test_mistakes_in_a_datasets_configuration(folders: dict[str, str], tmp_path: Path) -> None:
    def message(name: str = "image_folder", **changes: object) -> str:
        return refused(lambda: load(name, **changes))

    assert "did you mean 'image_folder'" in message("image_folders")
    assert "fashion_mnist, huggingface, image_folder, photos" in message("imagenet")
    assert "dataset.train is not set" in message(image_size=8)
    assert "dataset.test is not set" in message(image_size=8, train=folders["train"])
    assert "dataset.image_size is not set" in message(**folders)
    for key, others, where in (
        ("test", "bcd", "test"),
        ("train", "abc", "test"),
        ("test", "abz", "training"),
    ):
        changed = folders | {key: make_tree(tmp_path / f"{key}{others}", others)}
        text = message(image_size=8, **changed)
        assert f"the {where} images lack classes that the others have" in text
    one = make_tree(tmp_path / "one", "a")
    assert "one class only (a)" in message(image_size=8, train=one, test=one)
    assert "give 1 or 3" in message(image_size=8, mean=[0.1, 0.2], **folders)
    assert "above 0" in message(image_size=8, std=[0.1, 0.0, 0.1], **folders)
    assert "photos has its own images" in message("photos", train=folders["train"])
    assert "one folder" in message("fashion_mnist", test=folders["test"])


def test_the_same_folder_twice_is_said(folders: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    load("image_folder", image_size=8, train=folders["train"], test=folders["train"])
    assert "same folder" in caplog.text
