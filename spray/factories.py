"""The user's own code, named in the configuration: a function in a file or in an installed package."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from spray.errors import UserError


def call(
    factory: str, key: str, offered: Mapping[str, Any], given: Mapping[str, Any] | None = None, keep: bool = False
) -> Any:
    """Call the user's function and return what it returns.

    Parameters
    ----------
    factory : str
        ``FILE.py:FUNCTION`` or ``package.module:function``. While the file is loaded and the function runs,
        the file's folder (for a package, the working directory) can be imported from.
    key : str
        The configuration's key, for messages: "model.factory".
    offered : mapping
        Arguments that are passed if the function has a parameter of that name.
    given : mapping, optional
        Arguments that are passed in any case.
    keep : bool, default False
        Whether the folder can be imported from later as well, after all other places.

    Raises
    ------
    UserError
        If there is no such file, module or function, or it fails.
    """
    source, name = _split(factory, key)
    folder = Path(source).expanduser().resolve().parent if source.endswith(".py") else Path.cwd()
    with _importable(folder):
        module = _load_file(source, key) if source.endswith(".py") else _import(source, key)
        function = _find(module, name, source, key)
        try:
            result = function(**_accepted(function, offered), **(given or {}))
        except (Exception, SystemExit) as error:
            raise UserError(f"{key}={factory} fails: {one_line(error)}{place(error)}") from error
    if keep and str(folder) not in sys.path:
        sys.path.append(str(folder))
    return result


def files(factory: str) -> dict[str, Path]:
    """Return the files of the user's own that a factory is made of, by their path in the factory's folder.

    These are its file and what that, and each of them in turn, imports from the file's folder (for a package, the
    working directory), in functions too; found by reading the code, not by running it.

    Parameters
    ----------
    factory : str
        ``FILE.py:FUNCTION`` or ``package.module:function``.
    """
    source = factory.rpartition(":")[0]
    if source.endswith(".py"):
        waiting = [Path(source).expanduser().resolve()]
        folder = waiting[0].parent
    else:
        folder = Path.cwd()
        waiting = _module_files(folder, source.split("."))
    found = set(waiting)
    while waiting:
        path = waiting.pop()
        for imported in _imports(path, folder):
            if imported not in found:
                found.add(imported)
                waiting.append(imported)
    return {path.relative_to(folder).as_posix(): path for path in sorted(found)}


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


def _load_file(source: str, key: str) -> ModuleType:
    path = Path(source).expanduser().resolve()
    if not path.is_file():
        raise UserError(f"{key}: there is no file {source}")
    # A name of its own, so that a file called like an installed package takes nobody's place.
    name = f"_spray_factory_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{key}: {source} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look the module up
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{key}: {error.filename}:{error.lineno} is no valid Python: {error.msg}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"{key}: loading {source} fails: {one_line(error)}{place(error)}") from error
    return module


def _import(source: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(source)
    except (Exception, SystemExit) as error:
        hint = "; a file is given as FILE.py:FUNCTION" if isinstance(error, ModuleNotFoundError) else ""
        raise UserError(f"{key}: importing {source} fails: {one_line(error)}{hint}") from error


def _find(module: ModuleType, name: str, source: str, key: str) -> Callable[..., Any]:
    function = getattr(module, name, None)
    if callable(function):
        return function
    if function is not None:
        raise UserError(f"{key}: {name} in {source} is {kind_of(function)}, not a function")
    names = [key for key, value in vars(module).items() if callable(value)]
    close = get_close_matches(name, names, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise UserError(f"{key}: {source} has no function {name!r}{hint}")


def _accepted(function: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # some callables of C code do not tell
        return {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: value for name, value in offered.items() if name in parameters and parameters[name].kind in named}


def place(error: BaseException) -> str:
    """Return where in the user's code an error arose, as `` (FILE:LINE)``."""
    own = str(Path(__file__).parent)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(own)]
    users = [frame for frame in frames if "site-packages" not in frame.filename and "<frozen" not in frame.filename]
    return f" ({Path(users[-1].filename).name}:{users[-1].lineno})" if users else ""


def kind_of(value: object) -> str:
    """Return a value's type with an article."""
    return "None" if value is None else f"a {type(value).__name__}"


def _split(factory: str, key: str) -> tuple[str, str]:
    source, _, name = factory.rpartition(":")
    if not source or not name:
        raise UserError(f"{key}={factory} is neither FILE.py:FUNCTION nor package.module:function")
    return source, name


def _imports(path: Path, folder: Path) -> Iterator[Path]:
    """Yield the files in `folder` that the code in `path` imports."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):  # loading it says what is wrong
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _module_files(folder, alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            start = path.parents[node.level - 1] if 0 < node.level <= len(path.parents) else folder
            if start == folder or folder in start.parents:
                module = (node.module or "").split(".") if node.module else []
                yield from _module_files(start, module)
                for alias in node.names:
                    yield from _module_files(start, [*module, alias.name])


def _module_files(folder: Path, names: list[str]) -> list[Path]:
    """Return the files of a module and of the packages around it, as far as they are in `folder`."""
    found: list[Path] = []
    for depth in range(1, len(names) + 1):
        here = folder.joinpath(*names[:depth])
        candidates = (here / "__init__.py", here.with_name(f"{here.name}.py"))
        found += [path for path in candidates if path.is_file()][:1]
    return found
