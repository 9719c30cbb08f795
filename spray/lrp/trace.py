"""Runs a model's own forward pass and records on a tape how relevance will flow back.

A `Trace` is a torch-function mode. Every tensor that carries relevance has a `Record`; a torch function that is
called with such a tensor goes to the handler of its name, which computes its result and appends the node of
its rule to the tape. The model itself is never changed.

Results are leaves that require gradients though no graph is kept: an operation that the trace doesn't see
gives a tensor with an autograd node but no record, which is how it is noticed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from spray.errors import UserError
from spray.lrp.composites import Composite
from spray.lrp.rules import default_stabilizer
from spray.lrp.tape import Slot, Tape

Handler = Callable[["Trace", Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def names(text: str) -> frozenset[str]:
    """Return the names in a text."""
    return frozenset(text.split())


INPLACE_OPERATORS = {
    "__iadd__": "add",
    "__isub__": "sub",
    "__imul__": "mul",
    "__itruediv__": "div",
    "__idiv__": "div",
    "__ipow__": "pow",
    "__iand__": "logical_and",
    "__ior__": "logical_or",
}

# What a model may ask of a tensor without its values.
METADATA = names(
    "size shape dim ndim ndimension numel nelement __len__ dtype device layout requires_grad is_cuda "
    "is_cpu is_floating_point is_complex is_sparse is_quantized is_mkldnn element_size names"
)


# What draws random numbers.
RANDOM = names(
    "rand randn randint randperm rand_like randn_like randint_like normal bernoulli multinomial poisson normal_ "
    "uniform_ bernoulli_ random_ exponential_ geometric_ log_normal_ cauchy_ dropout alpha_dropout rrelu"
)


@dataclass
class Memory:
    """Storage that tensors share; `version` counts the in-place operations on it."""

    version: int = 0


class Deferred(Protocol):
    """An operation that waits for what follows, with which it may be computed in one."""

    def compute(self, trace: Trace, slot: Slot, rectify: bool = False) -> Tensor:
        """Return its result, after a ReLU if `rectify`; its node has been appended to the tape."""


@dataclass(eq=False)
class Record:
    """What the trace knows of a tensor that carries relevance.

    Attributes
    ----------
    slot : Slot
        Where its relevance gathers.
    nonnegative : bool
        Whether it can't hold a negative value.
    gate : int
        How much it looks like a gate: 2 after a sigmoid or a statistic, 1 after another bounded function, -1 after a
        softmax (weights, which share relevance with what they weigh), else 0.
    after_affine : bool
        Whether an affine layer lies between the model's input and it.
    contiguous : bool
        Whether it would be contiguous in the model alone, which may be run in another memory format here.
    deferred : Deferred or None
        The operation whose result it is, even if that has been computed.
    waiting : bool
        Whether that result isn't there yet: the tensor is only a placeholder of its shape.
    alias : Tensor or None
        The tensor that took its place, in an in-place operation or when a deferred one was computed.
    reduced : Tensor or None
        Its values in the dtype of the relevance, once they were asked for.
    """

    slot: Slot = field(default_factory=Slot)
    nonnegative: bool = False
    gate: int = 0
    after_affine: bool = False
    contiguous: bool = True
    deferred: Deferred | None = None
    waiting: bool = False
    alias: Tensor | None = None
    reduced: Tensor | None = None
    memory: Memory = field(default_factory=Memory)
    version: int = 0


def record_of(t: Tensor) -> Record | None:
    """Return the record of a tensor, None if it carries no relevance."""
    return t.__dict__.get("_spray_record")


def known(t: Tensor) -> Record:
    """Return the record of a tensor that has one."""
    record = record_of(t)
    assert record is not None
    return record


def carriers(*trees: Any) -> list[Tensor]:
    """Return the tensors among arguments that carry relevance."""
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, Tensor) and record_of(leaf)]


class RandomState:
    """The state of the random generators, to put it back."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def put_back(self) -> None:
        """Undo the draws since."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state_all(self.cuda)


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
    lazy : set of str
        The functions whose handlers take placeholders.
    relevance_dtype : torch.dtype, optional
        The dtype in which relevance is propagated; None is that of each layer's output.
    fallback : handler, optional
        What to do for a function that has no handler; None is an error.
    integers : handler, optional
        What to do for functions of integer tensors that carry relevance; None if the model's input is floating.
    """

    def __init__(
        self,
        model: nn.Module,
        composite: Composite,
        handlers: Mapping[str, Handler],
        lazy: frozenset[str] = frozenset(),
        relevance_dtype: torch.dtype | None = None,
        fallback: Handler | None = None,
        integers: Handler | None = None,
    ) -> None:
        super().__init__()
        self.composite = composite
        self.handlers = handlers
        self.lazy = lazy
        self.relevance_dtype = relevance_dtype
        self.fallback = fallback
        self.integers = integers
        self.tape = Tape()
        self.random: RandomState | None = None
        self.modules = {id(module): name for name, module in model.named_modules()}
        self.layers = {
            id(parameter): name
            for name, module in model.named_modules()
            for parameter in module.parameters(recurse=False)
        }

    def mark(self, t: Tensor, parents: Sequence[Tensor] = (), shares: bool = False, **known_of_it: Any) -> Tensor:
        """Give a tensor its record; by default it inherits `after_affine` alone from its parents.

        With `shares`, it stands for the same memory as its one parent, even if it had to be copied.
        """
        records = [record for parent in parents if (record := record_of(parent))]
        record = Record(after_affine=any(r.after_affine for r in records))
        for key, value in known_of_it.items():
            setattr(record, key, value)
        address = t.untyped_storage().data_ptr()  # 0 for a tensor without elements
        for parent, of_parent in zip(parents, records, strict=True):
            if shares or (address and parent.untyped_storage().data_ptr() == address):
                record.memory, record.version = of_parent.memory, of_parent.memory.version
        t.__dict__["_spray_record"] = record
        return t.requires_grad_() if t.is_floating_point() else t

    def current(self, t: Tensor, values: bool = True) -> Tensor:
        """Return the tensor that holds what the model sees as `t` now.

        With ``values=False`` it may be a placeholder.

        Raises
        ------
        UserError
            If the trace can't know: `t` was changed in place through a view, or by a hidden operation.
        """
        record = record_of(t)
        while record is not None and record.alias is not None:
            t = record.alias
            record = record_of(t)
        if record is None:
            if t.requires_grad and t.grad_fn is not None:
                hidden_in = "a custom autograd function, a checkpointed or a TorchScript part"
                self.fail(f"{hidden_in} ({type(t.grad_fn).__name__})", "can't see into")
            return t
        if record.version != record.memory.version:
            self.fail("a tensor that was changed in place through one of its views", "can't follow")
        if record.waiting and values:
            assert record.deferred is not None
            record.waiting = False
            record.alias = t = record.deferred.compute(self, record.slot)
        return t

    def keep(self, t: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Return a tensor's values for the way back, in a dtype (None: its own)."""
        if dtype is None or t.dtype == dtype:
            return t.detach()
        record = record_of(t)
        if record is None:
            return t.detach().to(dtype)
        if record.reduced is None or record.reduced.dtype != dtype:
            record.reduced = t.detach().to(dtype)
        return record.reduced

    def epsilon(self, dtype: torch.dtype) -> float:
        """Return the stabiliser where relevance is divided by contribution."""
        stabilizer = self.composite.stabilizer
        return default_stabilizer(dtype) if stabilizer is None else stabilizer

    def fail(self, what: str, problem: str = "has no rule for", place: str | None = None) -> NoReturn:
        """Raise the error that says that LRP has a `problem` with `what`, and in which module that is."""
        where = self.place() if place is None else place
        raise UserError(f"LRP {problem} {what}{where}; replace it in the model or use method='gradient_x_input'")

    def place(self) -> str:
        """Return the module whose forward is running, for a message."""
        module = next(self._active_modules(), None)
        return f" (in module {module!r})" if module else ""

    def layer_name(self, weight: Tensor) -> str:
        """Return the name of the module that owns a weight, else of the one that is running."""
        return self.layers.get(id(weight)) or next(self._active_modules(), "")

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given, given_kwargs = args, kwargs or {}
        name = name_of(func)
        if name in RANDOM and self.random is None:
            self.random = RandomState()  # only then: other threads may draw from the same generator
        in_place = name in INPLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))
        base = (INPLACE_OPERATORS.get(name) or name[:-1]) if in_place else name
        values = base not in self.lazy and base not in METADATA
        args, kwargs = tree_map_only(Tensor, lambda t: self.current(t, values), (given, given_kwargs))
        if not carriers(args, kwargs):
            if any(
                is_functorch_wrapped_tensor(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
            ):
                self.fail("a transform of torch.func (vmap, grad, jvp)", "can't see into")
            with torch.no_grad():
                return func(*args, **kwargs)
        # Relevance flows even through what the model computes under no_grad or inference_mode.
        with torch.inference_mode(False), torch.no_grad():
            if in_place:
                return self._in_place(name, base, given[0] if given else None, args, kwargs)
            return self._call(name, func, args, kwargs)

    def _call(self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("out") is not None:
            self.fail(f"{name}(out=...)")
        if self.integers is not None and not all(t.is_floating_point() for t in carriers(args, kwargs)):
            return self.integers(self, func, args, kwargs)
        handler = self.handlers.get(name)
        if handler is not None:
            return handler(self, func, args, kwargs)
        if name in METADATA:
            return func(*args, **kwargs)
        if name in ("numpy", "__array__"):
            self.fail(name, "can't follow")
        if name == "__setitem__":
            self.fail("assigning to a part of a tensor", "can't follow")
        with torch.enable_grad():
            result = func(*args, **kwargs)
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(result)):
            if self.fallback is not None:
                return self.fallback(self, func, args, kwargs)
            self.fail(name)
        return result  # an index, a comparison, a detached tensor: nothing that relevance flows through

    def _in_place(self, name: str, base: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute out of place, and let the result take the place of the target from now on."""
        if base in ("requires_grad", "retain_grad"):
            return target
        if base not in self.handlers and base != "detach" and self.fallback is None:
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
