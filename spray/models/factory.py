"""The user's own architecture: a function in a file or in an installed package."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from spray.errors import UserError

CLASS_COUNT_NAMES = ("num_classes", "n_classes")


def call_factory(factory: str, n_classes: int) -> nn.Module:
    """Call the user's function and return its model.

    Parameters
    ----------
    factory : str
        ``FILE.py:FUNCTION`` or ``package.module:function``. While the file is loaded and the function runs,
        the file's folder (for a package, the working directory) can be imported from.
    n_classes : int
        Passed if the function has a parameter `num_classes` or `n_classes`; else it is called with nothing.

    Raises
    ------
    UserError
        If there is no such file, module or function, or it fails, or returns anything but an `nn.Module`.
    """
    source, _, name = factory.rpartition(":")
    if not source or not name:
        raise UserError(f"model.factory={factory} is neither FILE.py:FUNCTION nor package.module:function")
    is_file = source.endswith(".py")
    with _importable(Path(source).expanduser().resolve().parent if is_file else Path.cwd()):
        module = _load_file(source) if is_file else _import(source)
        function = _find(module, name, source)
        try:
            model = function(**_arguments(function, n_classes))
        except (Exception, SystemExit) as error:
            raise UserError(f"model.factory={factory} fails: {one_line(error)}{_place(error)}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"model.factory={factory} returns {_a(model)}; it must return an nn.Module")
    return model


def one_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


def _load_file(source: str) -> ModuleType:
    path = Path(source).expanduser().resolve()
    if not path.is_file():
        raise UserError(f"model.factory: there is no file {source}")
    # A name of its own, so that a file called like an installed package takes nobody's place.
    name = f"_spray_factory_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"model.factory: {source} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look the module up
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"model.factory: {error.filename}:{error.lineno} is no valid Python: {error.msg}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"model.factory: loading {source} fails: {one_line(error)}{_place(error)}") from error
    return module


def _import(source: str) -> ModuleType:
    try:
        return importlib.import_module(source)
    except (Exception, SystemExit) as error:
        hint = "; a file is given as FILE.py:FUNCTION" if isinstance(error, ModuleNotFoundError) else ""
        raise UserError(f"model.factory: importing {source} fails: {one_line(error)}{hint}") from error


def _find(module: ModuleType, name: str, source: str) -> Callable[..., Any]:
    function = getattr(module, name, None)
    if callable(function):
        return function
    if function is not None:
        raise UserError(f"model.factory: {name} in {source} is {_a(function)}, not a function")
    names = [key for key, value in vars(module).items() if callable(value)]
    close = get_close_matches(name, names, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise UserError(f"model.factory: {source} has no function {name!r}{hint}")


def _arguments(function: Callable[..., Any], n_classes: int) -> dict[str, int]:
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # some callables of C code do not tell
        return {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [name for name in CLASS_COUNT_NAMES if name in parameters and parameters[name].kind in named]
    return dict.fromkeys(names, n_classes)


def _place(error: BaseException) -> str:
    """Where in the code the error arose, as `` (FILE:LINE)``."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    users = [frame for frame in frames if "site-packages" not in frame.filename and "<frozen" not in frame.filename]
    return f" ({Path(users[-1].filename).name}:{users[-1].lineno})" if users else ""


def _a(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
