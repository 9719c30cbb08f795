"""Runs a model's own forward pass so that its autograd graph computes relevance.

A `Trace` is a torch-function mode. Every tensor that carries relevance has a `Record`; a torch function
that is called with such a tensor goes to the handler of its name in `spray.lrp.operations`, which builds the
graph node whose backward is the LRP rule. The model itself is never changed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from spray.errors import UserError
from spray.lrp.composites import Composite
from spray.lrp.layers import Layer, LinearMap

Handler = Callable[["Trace", Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

INPLACE_OPERATORS = {
    "__iadd__": "add",
    "__isub__": "sub",
    "__imul__": "mul",
    "__itruediv__": "div",
    "__idiv__": "div",
}


@dataclass
class Memory:
    """Storage that tensors share; `version` counts the in-place operations on it."""

    version: int = 0


@dataclass
class AffineCall:
    """The affine layer that made a tensor, and the input it had."""

    input: Tensor
    map: LinearMap
    layer: Callable[[], Layer]
    name: str
    first: bool


@dataclass
class Record:
    """What the trace knows of a tensor that carries relevance.

    Attributes
    ----------
    node : object
        Its autograd node; another one later means that an operation was hidden from the trace.
    nonnegative : bool
        Whether it can't hold a negative value.
    gate : int
        How much it looks like a gate: 2 after a sigmoid, 1 after another bounded function, else 0.
    after_affine : bool
        Whether an affine layer lies between the model's input and it.
    affine : AffineCall or None
        The affine layer whose direct output it is.
    alias : Tensor or None
        The tensor that took its place in an in-place operation.
    """

    node: object
    nonnegative: bool = False
    gate: int = 0
    after_affine: bool = False
    affine: AffineCall | None = None
    alias: Tensor | None = None
    memory: Memory = field(default_factory=Memory)
    version: int = 0


def record_of(t: Tensor) -> Record | None:
    """Return the record of a tensor, None if it carries no relevance."""
    return t.__dict__.get("_spray_record")


class Trace(TorchFunctionMode):
    """The mode under which the model runs.

    Parameters
    ----------
    model : nn.Module
        The model; only its names are read.
    composite : Composite
        Which rule a layer gets.
    handlers : mapping of str to handler
        What to do for a torch function, by its name.
    """

    def __init__(self, model: nn.Module, composite: Composite, handlers: Mapping[str, Handler]) -> None:
        super().__init__()
        self.composite = composite
        self.handlers = handlers
        self.modules = {id(module): name for name, module in model.named_modules()}
        self.layers = {
            id(parameter): name
            for name, module in model.named_modules()
            for parameter in module.parameters(recurse=False)
        }

    def mark(self, t: Tensor, parents: Sequence[Tensor] = (), **known: Any) -> Tensor:
        """Give a tensor its record; by default it inherits `after_affine` alone from its parents."""
        records = [record for parent in parents if (record := record_of(parent))]
        record = Record(t.grad_fn, after_affine=any(r.after_affine for r in records))
        for key, value in known.items():
            setattr(record, key, value)
        address = t.untyped_storage().data_ptr()  # 0 for a tensor without elements
        for parent, of_parent in zip(parents, records, strict=True):
            if address and parent.untyped_storage().data_ptr() == address:
                record.memory, record.version = of_parent.memory, of_parent.memory.version
        t.__dict__["_spray_record"] = record
        return t

    def current(self, t: Tensor) -> Tensor:
        """Return the tensor that holds what the model sees as `t` now.

        Raises
        ------
        UserError
            If the trace can't know: `t` was changed in place through a view, or by a hidden operation.
        """
        record = record_of(t)
        while record is not None and record.alias is not None:
            t = record.alias
            record = record_of(t)
        hidden = t.requires_grad and t.grad_fn is not (record.node if record else None)
        if hidden:
            hidden_in = "a custom autograd function, a checkpointed or a TorchScript part"
            self.fail(f"{hidden_in} ({type(t.grad_fn).__name__})", "can't see into")
        if record is not None and record.version != record.memory.version:
            self.fail("a tensor that was changed in place through one of its views", "can't follow")
        return t

    def fail(self, what: str, problem: str = "has no rule for") -> None:
        """Raise the error that says that LRP has a `problem` with `what`, and in which module that is."""
        module = next(self._active_modules(), None)
        place = f" (in module {module!r})" if module else ""
        raise UserError(f"LRP {problem} {what}{place}; replace it in the model or use method='gradient_x_input'")

    def layer_name(self, weight: Tensor) -> str:
        """Return the name of the module that owns a weight, '' if none does."""
        return self.layers.get(id(weight), "")

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given, given_kwargs = args, kwargs or {}
        args, kwargs = tree_map_only(Tensor, self.current, (given, given_kwargs))
        if not any(isinstance(leaf, Tensor) and record_of(leaf) for leaf in tree_leaves((args, kwargs))):
            with torch.no_grad():
                return func(*args, **kwargs)
        # Relevance flows even through what the model computes under no_grad or inference_mode.
        with torch.inference_mode(False), torch.enable_grad():
            name = name_of(func)
            target = given[0] if given else None
            if name in INPLACE_OPERATORS or (name.endswith("_") and not name.endswith("__")):
                return self._in_place(name, target, args, kwargs)
            return self._call(name, func, args, kwargs)

    def _call(self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("out") is not None:
            self.fail(f"{name}(out=...)")
        handler = self.handlers.get(name)
        if handler is not None:
            return handler(self, func, args, kwargs)
        if name == "__setitem__":
            self.fail("assigning to a part of a tensor", "can't follow")
        result = func(*args, **kwargs)
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(result)):
            self.fail(name)
        return result  # a shape, an index, a comparison: nothing that relevance flows through

    def _in_place(self, name: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute out of place, and let the result take the place of the target from now on."""
        base = INPLACE_OPERATORS.get(name, name[:-1])
        if base in ("requires_grad", "retain_grad"):
            return target
        if base not in self.handlers and base != "detach":
            self.fail(name)
        result = self._call(base, out_of_place(base), args, kwargs)
        self.replace(target, result)
        return result

    def replace(self, target: Tensor, result: Tensor) -> None:
        """Record that `target` was changed in place to `result`."""
        record = record_of(target)
        while record is not None and record.alias is not None:
            target = record.alias
            record = record_of(target)
        if record is None:
            self.fail("writing into a tensor that does not depend on the input", "can't follow")
        elif result is not target:
            after = record_of(result)
            if after is None or after.memory is not record.memory:  # else only the shape changed
                record.memory.version += 1
            record.alias = result

    def _active_modules(self) -> Iterator[str]:
        """Yield the names of the modules whose forward is running, the innermost first."""
        frame = sys._getframe(1)
        while frame is not None:
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and self.modules.get(id(module)):
                yield self.modules[id(module)]
            frame = frame.f_back  # type: ignore[assignment]


def name_of(func: Callable[..., Any]) -> str:
    """Return the name of a torch function, method or property."""
    name = getattr(func, "__name__", type(func).__name__)
    if name == "__get__":
        return str(getattr(getattr(func, "__self__", None), "__name__", name))
    return str(name)


def out_of_place(name: str) -> Callable[..., Any]:
    """Return the function that computes an in-place operation's result anew."""
    for namespace in (Tensor, torch, nn.functional):
        if hasattr(namespace, name):
            return getattr(namespace, name)
    raise LookupError(name)
