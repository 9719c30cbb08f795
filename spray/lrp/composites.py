"""Composites: which rule each layer of a model gets.

The named ones assign rules as zennit's composites of the same names do. Differences of convention:

- the first layers are those that no affine layer precedes in the executed graph, and a special first rule
  applies to whatever kind they are (zennit's zᴮ is for convolutions only);
- batch normalisation is merged into the affine layer that ran before it, its eps included (zennit 0.5.1
  follows the order of definition and divides by √(1 + eps) once more); elsewhere it is an affine layer
  under the norm rule (zennit passes relevance through it unchanged).

``lrp_0`` and ``epsilon`` use their rule in all layers; ``deep_taylor`` is z⁺ with zᴮ or w² at the input.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from spray.errors import UserError
from spray.lrp.rules import RULES, AlphaBeta, Epsilon, Flat, Gamma, Rule, WSquare, ZBox, Zero, ZPlus
from spray.registry import Registry

KINDS = ("first", "convolution", "linear", "last")

# Options of every composite that aren't rules, and what they may be; the first is the default.
COMMON: dict[str, tuple[Any, ...]] = {
    "addition": ("norm", "equal", "magnitude"),
    "normalization": ("norm", "pass"),
    "zero_bias": (False, True),
}


@dataclass(frozen=True)
class Composite:
    """An assignment of rules to layers.

    Parameters
    ----------
    convolution, linear : Rule
        For (transposed) convolutions and for fully connected layers.
    first : Rule, optional
        For affine layers that no other affine layer comes before, in the order of execution.
    names : mapping of str to Rule
        For layers by name or glob; goes before the kinds, the first match counts.
    last : Rule, optional
        For affine layers that no other affine layer comes after.
    addition : {"norm", "equal", "magnitude"}
        How relevance is split where two signals are added, as in residual connections: in proportion to the
        summands (the norm rule), in halves, or in proportion to the summands' absolute values.
    normalization : {"norm", "pass"}
        How relevance gets through layer, group, instance and root-mean-square norms: divided by contribution
        with the deviation taken as constant, or as it is.
    zero_bias : bool
        Whether the rules leave biases out, so that they get no share of the relevance.
    stabilizer : float, optional
        The stabiliser where relevance is divided by contribution (sums, averages, batch normalisation alone).
    """

    convolution: Rule = field(default_factory=Epsilon)
    linear: Rule = field(default_factory=Epsilon)
    first: Rule | None = None
    last: Rule | None = None
    addition: str = "norm"
    normalization: str = "norm"
    zero_bias: bool = False
    names: Mapping[str, Rule] = field(default_factory=dict)
    stabilizer: float | None = None

    def rule(self, kind: str, name: str, first: bool) -> Rule:
        """Return the rule of a layer of a kind ("convolution", "linear") and name."""
        for pattern, rule in self.names.items():
            if fnmatchcase(name, pattern):
                return rule
        if first and self.first is not None:
            return self.first
        return self.convolution if kind == "convolution" else self.linear

    def last_rule(self, name: str) -> Rule | None:
        """Return the rule that a layer of a name gets if no affine layer comes after it; None: the same."""
        named = any(fnmatchcase(name, pattern) for pattern in self.names)
        return None if named else self.last


COMPOSITES: Registry[Callable[..., Composite]] = Registry("composite")


@COMPOSITES.register("lrp_0")
def lrp_0() -> Composite:
    """LRP-0 everywhere: gradient × input on a piecewise-linear network."""
    return Composite(Zero(), Zero(), stabilizer=0.0)


@COMPOSITES.register("epsilon")
def epsilon_everywhere(epsilon: float | None = None) -> Composite:
    """LRP-ε in all layers."""
    return Composite(Epsilon(epsilon), Epsilon(epsilon))


@COMPOSITES.register("epsilon_plus")
def epsilon_plus(epsilon: float | None = None) -> Composite:
    """z⁺ in convolutions, ε in fully connected layers."""
    return Composite(ZPlus(), Epsilon(epsilon))


@COMPOSITES.register("epsilon_plus_flat")
def epsilon_plus_flat(epsilon: float | None = None) -> Composite:
    """Flat in the first layer, z⁺ in the other convolutions, ε in fully connected layers."""
    return Composite(ZPlus(), Epsilon(epsilon), first=Flat())


@COMPOSITES.register("epsilon_gamma_box")
def epsilon_gamma_box(
    low: Any = None, high: Any = None, epsilon: float | None = None, gamma: float = 0.25
) -> Composite:
    """zᴮ in the first layer, γ in the other convolutions, ε in fully connected layers."""
    return Composite(Gamma(gamma), Epsilon(epsilon), first=z_box(low, high, "epsilon_gamma_box"))


@COMPOSITES.register("epsilon_alpha2_beta1")
def epsilon_alpha2_beta1(epsilon: float | None = None) -> Composite:
    """α2β1 in convolutions, ε in fully connected layers."""
    return Composite(AlphaBeta(2, 1), Epsilon(epsilon))


@COMPOSITES.register("epsilon_alpha2_beta1_flat")
def epsilon_alpha2_beta1_flat(epsilon: float | None = None) -> Composite:
    """Flat in the first layer, α2β1 in the other convolutions, ε in fully connected layers."""
    return Composite(AlphaBeta(2, 1), Epsilon(epsilon), first=Flat())


@COMPOSITES.register("excitation_backprop")
def excitation_backprop() -> Composite:
    """z⁺ in all layers (Zhang et al. 2016)."""
    return Composite(ZPlus(), ZPlus())


@COMPOSITES.register("deep_taylor")
def deep_taylor(low: Any = None, high: Any = None) -> Composite:
    """z⁺ in all layers but the first, with zᴮ if it has `low` and `high`, else w² (Montavon et al. 2017)."""
    bounded = low is not None or high is not None
    return Composite(ZPlus(), ZPlus(), first=z_box(low, high, "deep_taylor") if bounded else WSquare())


def z_box(low: Any, high: Any, composite: str) -> ZBox:
    """Return the zᴮ rule, or raise a UserError if a bound is missing."""
    missing = " and ".join(f"{name}=" for name, value in (("low", low), ("high", high)) if value is None)
    if missing:
        raise UserError(
            f"{composite} needs {missing}: the least and greatest value of the model's input per channel, "
            "after normalisation; (0 - mean) / std and (1 - mean) / std for images"
        )
    return ZBox(low, high)


def build_composite(
    composite: str | Mapping[str, Rule | str | Mapping[str, Any]], model: nn.Module, **options: Any
) -> Composite:
    """Return the composite that a name or mapping stands for.

    Parameters
    ----------
    composite : str or mapping
        A registered name, or a mapping from kinds ("first", "last", "convolution", "linear") and module names
        or globs to rules, names of rules, or mappings like ``{"rule": "gamma", "gamma": 0.1}``. Layers it
        doesn't mention get the ε rule. The keys "addition", "normalization" and "zero_bias" may be in it too.
    model : nn.Module
        The model whose module names the mapping means.
    **options
        `epsilon`, `gamma`, `low`, `high`: those that the composite's rules take; `addition`, `normalization`,
        `zero_bias`: see `Composite`.

    Raises
    ------
    UserError
        For an unknown composite, rule, option or module name.
    """
    common = {key: options.pop(key) for key in COMMON if key in options}
    if not isinstance(composite, str | Mapping):
        raise UserError(f"composite must be a name or a mapping from layers to rules, not {composite!r}")
    if not isinstance(composite, str):
        common = {key: composite[key] for key in COMMON if key in composite} | common
        composite = {key: value for key, value in composite.items() if key not in COMMON}
    for key, value in common.items():
        if value not in COMMON[key]:
            raise UserError(f"unknown {key} {value!r}; allowed: {', '.join(map(str, COMMON[key]))}")
    check_options(options)
    if isinstance(composite, str):
        recipe = COMPOSITES.get(composite)
        allowed = list(inspect.signature(recipe).parameters)
        refuse_options(set(options) - set(allowed), f"composite {composite!r}", [*allowed, *COMMON])
        return replace(recipe(**options), **common)
    return replace(from_mapping(composite, model, options), **common)


def from_mapping(
    mapping: Mapping[str, Rule | str | Mapping[str, Any]], model: nn.Module, options: dict[str, Any]
) -> Composite:
    """Return the composite that a mapping from kinds and module names to rules describes."""
    modules = [name for name, _ in model.named_modules()]
    rules: dict[str, Rule] = {}
    used: set[str] = set()
    taken: set[str] = set()
    for key, value in mapping.items():
        if not isinstance(key, str):
            raise UserError(f"the composite's keys are kinds of layers or names of modules, not {key!r}")
        if key not in KINDS and not any(fnmatchcase(name, key) for name in modules):
            raise UserError(
                f"the composite names {key!r}, which is neither a kind of layer ({', '.join(KINDS)}) nor "
                "a module of the model (see model.named_modules())"
            )
        if isinstance(value, Mapping):
            rules[key] = rule_with_options(key, value)
        else:
            rules[key] = value if isinstance(value, Rule) else named_rule(value, options, used)
            taken |= set() if isinstance(value, Rule) else set(options_of(value))
    refuse_options(set(options) - used, "this mapping's rules", [*sorted(taken), *COMMON])
    kinds = {kind: rules.pop(kind) for kind in KINDS if kind in rules}
    return Composite(**kinds, names=rules)  # type: ignore[arg-type]


def rule_with_options(key: str, value: Mapping[str, Any]) -> Rule:
    """Return the rule that a mapping like ``{"rule": "gamma", "gamma": 0.1}`` describes."""
    own = {name: option for name, option in value.items() if name != "rule"}
    if not isinstance(value.get("rule"), str):
        raise UserError(f"the composite's entry for {key!r} names no rule; write {{rule: gamma, gamma: 0.1}}")
    used: set[str] = set()
    check_options(own)
    rule = named_rule(value["rule"], own, used)
    refuse_options(set(own) - used, f"rule {value['rule']!r}", options_of(value["rule"]))
    return rule


def options_of(rule: str) -> list[str]:
    """Return the names of a rule's options."""
    return [f.name for f in fields(RULES.get(rule))]  # type: ignore[arg-type]


def named_rule(name: str, options: dict[str, Any], used: set[str]) -> Rule:
    """Return the rule called `name` with its options, whose names are added to `used`."""
    rule = RULES.get(name)
    taken = {option for option in options_of(name) if option in options}
    used |= taken
    if rule is ZBox:
        return z_box(options.get("low"), options.get("high"), "the z_box rule")
    return rule(**{key: options[key] for key in taken})


def check_options(options: Mapping[str, Any]) -> None:
    """Raise a UserError for an option of a rule that is no number of zero or more, or no bound."""
    for name in ("epsilon", "gamma", "alpha", "beta"):
        value = options.get(name)
        if value is not None and not (isinstance(value, int | float) and 0 <= value < float("inf")):
            raise UserError(f"{name}= must be a number of 0 or more, but is {value!r}")
    for name in ("low", "high"):
        try:
            torch.as_tensor(options.get(name, 0.0) or 0.0) if not isinstance(options.get(name), Tensor) else None
        except (TypeError, ValueError, RuntimeError):
            raise UserError(
                f"{name}= must be a number, one per channel or a tensor, but is {options[name]!r}"
            ) from None


def refuse_options(unknown: set[str], what: str, allowed: Iterable[str]) -> None:
    """Raise a UserError if there are options that `what` doesn't take."""
    if unknown:
        raise UserError(f"{what} takes no option {', '.join(sorted(unknown))}; allowed: {', '.join(allowed) or 'none'}")
