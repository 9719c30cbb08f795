"""Inner layers of an unmodified model: which there are, what they give, and how it is changed on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spray.errors import UserError

INPUT = ":in"
"""Behind a module's name: its input instead of its output."""
CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding)
MOST = 6
"""Most layers that are tried where one is to be chosen."""


@contextmanager
def changed(model: nn.Module, layer: str, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Put what `change` returns in the place of a layer's activations, if anything, while the block runs.

    Parameters
    ----------
    model : nn.Module
        Left as it was.
    layer : str
        A module's name, whose output is meant, or with ``:in`` its first input.
    change : callable
        Given the activations (N, ...).
    """
    name = layer.removesuffix(INPUT)
    module = find(model, layer)

    def before(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        new = change(arguments[0])
        return None if new is None else (new, *arguments[1:])

    def after(_: nn.Module, arguments: Any, output: Any) -> Tensor | None:
        if not isinstance(output, Tensor):
            raise UserError(f"correction.layer={name} returns a {type(output).__name__}, no tensor; name one inside it")
        return change(output)

    hook = module.register_forward_pre_hook(before) if name != layer else module.register_forward_hook(after)
    try:
        yield
    finally:
        hook.remove()


def find(model: nn.Module, layer: str) -> nn.Module:
    """Return the module that a layer's name means.

    Raises
    ------
    UserError
        If the model has none of that name.
    """
    modules = dict(model.named_modules())
    name = layer.removesuffix(INPUT)
    if name not in modules or not name:
        close = get_close_matches(name, modules, n=1)
        hint = f"did you mean {close[0]!r}?" if close and close[0] else "see model.named_modules()"
        raise UserError(f"correction.layer={layer}: the model has no layer {name!r}; {hint}")
    return modules[name]


def activations(model: nn.Module, layer: str, x: Tensor) -> Tensor:
    """Return a layer's activations (N, ...) for an input (N, ...), detached, in memory of their own.

    Raises
    ------
    UserError
        If the layer does not run exactly once, or does not give a tensor (N, ...) of floats.
    """
    seen: list[Tensor] = []
    with torch.no_grad(), changed(model, layer, lambda a: seen.append(a.detach().clone())):
        model(x)
    if len(seen) != 1:
        raise UserError(f"correction.layer={layer} runs {len(seen)} times for one input; name one that runs once")
    if seen[0].dim() < 2 or len(seen[0]) != len(x) or not seen[0].is_floating_point():
        raise UserError(
            f"correction.layer={layer} gives shape {tuple(seen[0].shape)} for {len(x)} images; name another"
        )
    return seen[0]


def run_hooked(model: nn.Module, x: Tensor, hooks: Iterable[RemovableHandle]) -> Any:
    """Return a model's output for an input, without a graph, and remove the hooks that have looked on."""
    try:
        with torch.no_grad():
            return model(x)
    finally:
        for hook in hooks:
            hook.remove()


def channel_dim(model: nn.Module, layer: str, shape: torch.Size) -> int | None:
    """Return which dimension of activations (N, ...) counts channels, None where there are no positions."""
    if len(shape) < 3:
        return None
    if len(shape) == 3 or (isinstance(find(model, layer), CHANNELS_LAST) and not layer.endswith(INPUT)):
        return len(shape) - 1
    return 1


def output_layer(model: nn.Module, x: Tensor) -> str | None:
    """Return the name of the linear layer whose output is the model's, None if there is no such layer."""
    outputs: list[tuple[str, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: outputs.append((name, output)))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name
    ]
    result = run_hooked(model, x, hooks)
    same = [name for name, output in outputs if output.shape == result.shape and torch.equal(output, result)]
    return same[-1] if same else None


def candidates(model: nn.Module, x: Tensor) -> list[str]:
    """Return layers to choose among, in the order in which they run: at most `MOST`, spread over the depth.

    These are outputs of modules that run once and return a tensor of floats for each image, such that no two of
    them hold the same numbers; the last one is the input of the linear layer that makes the output, where there is
    one.
    """
    runs = _runs(model, x)
    head = output_layer(model, x)
    result = runs[-1][1] if runs else None
    names: list[str] = []
    last: Tensor | None = None
    for name, output, times in runs:
        if name == head or (result is not None and output.shape == result.shape and torch.equal(output, result)):
            continue
        if times != 1 or not _usable(output, len(x)):
            continue
        if last is not None and _same(output, last):
            names[-1] = name  # a container, dropout or flattening: the same numbers further on
        else:
            names.append(name)
        last = output
    # What a nonlinearity or pooling gives: a layer in front of one is left out, since the two say nearly the same.
    kept = [name for name in names if not _is_linear(find(model, name))] or names
    if head is not None:
        inner = activations(model, head + INPUT, x)
        if kept and last is not None and _same(inner, last):
            kept = kept[:-1]
        kept.append(head + INPUT)
    if len(kept) <= MOST:
        return kept
    chosen = torch.linspace(0, len(kept) - 1, MOST).round().long().unique().tolist()
    return [kept[i] for i in chosen]


def feature_layer(model: nn.Module, x: Tensor) -> str:
    """Return the last module that gives what the output is made of: the last layer's input, where it is one's output.

    Raises
    ------
    UserError
        If no module gives such features.
    """
    head = output_layer(model, x)
    wanted = None if head is None else activations(model, head + INPUT, x)
    runs = [(name, output) for name, output, times in _runs(model, x) if times == 1 and _usable(output, len(x))]
    same = [name for name, output in runs if wanted is not None and _same(output, wanted)]
    inner = [name for name in candidates(model, x) if not name.endswith(INPUT)]
    if not same and not inner:
        raise UserError("no module of the model gives features; set correction.layer, or leave the method out")
    return (same or inner)[-1]


def upstream(model: nn.Module, layer: str, x: Tensor) -> tuple[list[nn.Parameter], list[nn.Module]]:
    """Return parameters that a layer's activations depend on, and modules that have run when they are known."""
    seen: list[Tensor] = []
    done: list[nn.Module] = []
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    needs = [p.requires_grad for p in parameters]
    hooks = [
        module.register_forward_hook(lambda m, *_: None if seen else done.append(m))
        for module in model.modules()
        if module is not model
    ]
    try:
        for p in parameters:
            p.requires_grad_(True)
        with torch.enable_grad(), changed(model, layer, lambda a: seen.append(a.clone())):
            model(x.clone())
        grads = torch.autograd.grad(seen[0].sum(), parameters, allow_unused=True) if seen[0].requires_grad else []
        own = find(model, layer)
        inside = [] if layer.endswith(INPUT) else list(own.modules())
        return [p for p, g in zip(parameters, grads, strict=False) if g is not None], [*done, *inside]
    finally:
        for hook in hooks:
            hook.remove()
        for p, need in zip(parameters, needs, strict=True):
            p.requires_grad_(need)


def _runs(model: nn.Module, x: Tensor) -> list[tuple[str, Tensor, int]]:
    """Return name, output and number of calls of each module that returns a tensor, in order of execution."""
    seen: dict[str, tuple[Tensor, int]] = {}

    def look(name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            seen[name] = output.detach().clone(), seen.get(name, (output, 0))[1] + 1

    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: look(name, output))
        for name, module in model.named_modules()
        if name
    ]
    run_hooked(model, x, hooks)
    return [(name, output, times) for name, (output, times) in seen.items()]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and torch.equal(a.flatten(), b.flatten())


def _usable(a: Tensor, n: int) -> bool:
    return a.dim() >= 2 and len(a) == n and a.is_floating_point() and bool(a.isfinite().all())


def _is_linear(module: nn.Module) -> bool:
    while isinstance(module, nn.Sequential) and len(module):
        module = module[-1]
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return isinstance(module, kinds)
