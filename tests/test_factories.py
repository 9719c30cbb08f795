"""The user's own code: which files belong to a factory, so that a changed one is noticed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from spray.errors import UserError
from spray.factories import call, files


def write(folder: Path, **contents: str) -> None:
    for name, content in contents.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def test_files_are_the_factorys_and_what_it_imports_from_beside_it(tmp_path: Path) -> None:
    (tmp_path / "pack/deep").mkdir(parents=True)
    (tmp_path / "pack/__init__.py").write_text("from . import sibling")
    (tmp_path / "pack/deep/__init__.py").write_text("from ..upper import x")
    write(
        tmp_path,
        main="import torch\nimport top\nfrom pack.deep import inner\ndef build():\n    import late, json\n",
        top="import top2 as y",
        top2="import main",
        late="",
        unused="",
        json="",
        pack__sibling="from .deep.inner import *",
        pack__upper="",
        pack__unused="",
        pack__deep__inner="import not_there.at_all",
    )
    expected = ["json", "late", "main", "pack/__init__", "pack/deep/__init__", "pack/deep/inner", "pack/sibling"]
    assert list(files(f"{tmp_path}/main.py:build")) == [
        f"{name}.py" for name in [*expected, "pack/upper", "top", "top2"]
    ]


def test_files_of_a_package_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").touch()
    write(tmp_path, mine__nets="from mine import parts", mine__parts="")
    monkeypatch.chdir(tmp_path)
    assert list(files("mine.nets:build")) == ["mine/__init__.py", "mine/nets.py", "mine/parts.py"]
    assert files("torch.nn:Identity") == {}


def test_code_that_cannot_be_read_is_left_to_who_loads_it(tmp_path: Path) -> None:
    write(tmp_path, main="def build(:")
    assert list(files(f"{tmp_path}/main.py:build")) == ["main.py"]
    assert list(files(f"{tmp_path}/absent.py:build")) == ["absent.py"]


def test_arguments_are_offered_or_given(tmp_path: Path) -> None:
    write(tmp_path, main="def build(a, b=2, *, c=3): return a, b, c\ndef none(): return 7")
    assert call(f"{tmp_path}/main.py:build", "key", {"a": 1, "c": 5, "d": 6}) == (1, 2, 5)
    assert call(f"{tmp_path}/main.py:build", "key", {}, {"a": 1, "b": 0}) == (1, 0, 3)
    assert call(f"{tmp_path}/main.py:none", "key", {"a": 1}) == 7
    with pytest.raises(UserError, match=r"key=.*main\.py:none fails: TypeError.*unexpected keyword"):
        call(f"{tmp_path}/main.py:none", "key", {}, {"a": 1})


def test_a_kept_folder_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = list(sys.path)
    write(
        tmp_path, main="def build(): return lambda: __import__('sibling_that_is_late').X", sibling_that_is_late="X = 4"
    )
    function = call(f"{tmp_path}/main.py:build", "key", {}, keep=True)
    assert sys.path == [*before, str(tmp_path)]
    assert function() == 4


def test_a_changed_helper_of_the_model_is_noticed(spray: Any, tmp_path: Path) -> None:
    code = "from torch import nn\ndef build(num_classes):\n    import helper_of_a_model\n"
    write(
        tmp_path, m=f"{code}    return nn.Sequential(nn.Flatten(), nn.Linear(36, num_classes))\n", helper_of_a_model=""
    )
    run = ("run_dir=run", "model.factory=m.py:build")
    assert spray(*run).code == 0
    assert spray(*run).ran == []
    write(tmp_path, helper_of_a_model="X = 1")
    again = spray(*run)
    assert "train: recomputed because content of model.factory changed" in again.out
