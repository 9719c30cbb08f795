"""Relevance propagation leaves no trace, remembers nothing, and is the same wherever it runs."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations
from torch.overrides import _get_current_function_mode_stack

from spray import explain
from spray.errors import UserError


class Block(nn.Module):
    """A residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(x)) + x)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    stem = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), Block(8), nn.MaxPool2d(2)]
    head = [nn.Flatten(), nn.Linear(8 * 16, 16), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(16, 4)]
    model = nn.Sequential(*stem, *head)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def images(n: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


GLOBAL_HOOKS = [name for name in vars(torch_module) if name.startswith("_global") and "hook" in name]


def everything(model: nn.Module) -> dict[str, Any]:
    """What must not change: values to compare with ==."""
    return {
        "weights": {name: t.numpy().tobytes() for name, t in model.state_dict().items()},
        "identities": {name: (id(t), t.data_ptr(), t._version) for name, t in model.state_dict(keep_vars=True).items()},
        "parameters": {
            name: (p.requires_grad, id(p.grad), None if p.grad is None else p.grad.tolist(), dict(p.__dict__))
            for name, p in model.named_parameters()
        },
        "modules": {
            name: (module.training, {k: id(v) for k, v in vars(module).items()})
            for name, module in model.named_modules()
        },
        "hooks": {
            (name, key): list(hooks)
            for name, module in model.named_modules()
            for key, hooks in vars(module).items()
            if "hooks" in key and hooks is not None
        },
        "global hooks": {
            name: len(hooks) for name in GLOBAL_HOOKS if (hooks := getattr(torch_module, name)) is not None
        },
        "modes": len(_get_current_function_mode_stack()),
        "random": torch.get_rng_state().tolist(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "default": torch.get_default_dtype(),
    }


class Failing(nn.Module):
    """A module whose forward raises an error, or does what is asked of it."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


def raising(error: BaseException) -> Callable[[Tensor], Tensor]:
    def act(x: Tensor) -> Tensor:
        raise error

    return act


LAYERS = {"layer": ["", "0", "3"]}
BOX = {"composite": "epsilon_gamma_box", "low": -0.1, "high": 0.1}

FAILURES: dict[str, tuple[Callable[[Tensor], Tensor] | None, dict[str, Any], type[BaseException]]] = {
    "error in forward": (raising(RuntimeError("broken")), {}, RuntimeError),
    "error in forward, with layers": (raising(RuntimeError("broken")), LAYERS, RuntimeError),
    "interrupted": (raising(KeyboardInterrupt()), LAYERS, KeyboardInterrupt),
    "unknown operation": (
        torch.special.bessel_j0,
        LAYERS,
        UserError,
    ),
    "no rule, found in the sweep": (lambda x: x.exp(), LAYERS, UserError),
    "rule's check": (None, BOX, UserError),
    "wrong class": (None, {"target": 9}, UserError),
    "wrong concept at the start": (None, {"start": ("3", 99)}, UserError),
    "wrong condition": (None, {"condition": {"3": 99}}, UserError),
    "layer that doesn't run": (None, {"layer": "0#2"}, UserError),
    "not finite": (lambda x: x * float("nan"), LAYERS, UserError),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_an_error_leaves_everything_as_it_was(failure: str) -> None:
    act, options, error = FAILURES[failure]
    model, x = network(), images()
    if act is not None:
        model[8] = Failing(act).eval()
    (model[0].weight.sum() + model[9].bias.sum()).backward()
    model[3].conv.weight.requires_grad_(False)
    model[5].register_forward_hook(lambda module, args, output: None)
    before, values = everything(model), x.clone()
    with pytest.raises(error):
        explain(model, x, **options)
    assert everything(model) == before
    assert torch.equal(x, values)
    assert set(x.__dict__) == set()


@pytest.mark.parametrize(
    "options",
    [
        {},
        LAYERS,
        {"start": ("3", 1)},
        {"condition": {"0": 1}},
        {"relevance_dtype": "bfloat16"},
        {"autocast": torch.bfloat16},
    ],
    ids=str,
)
def test_success_leaves_everything_as_it_was(options: dict[str, Any]) -> None:
    model, x = network(), images().requires_grad_()
    y = x * 2  # an input with a graph
    y.retain_grad()
    (model[0].weight.sum() + model[9].bias.sum() + y.sum()).backward(retain_graph=True)
    gradients = x.grad.clone(), y.grad.clone()
    before, values, version = everything(model), y.detach().clone(), y._version
    result = explain(model, y, **options)
    assert everything(model) == before
    assert torch.equal(y, values)
    assert y._version == version
    assert y.requires_grad
    assert y.grad_fn is not None
    assert torch.equal(x.grad, gradients[0])
    assert torch.equal(y.grad, gradients[1])
    assert set(x.__dict__) == set() == set(y.__dict__)
    for R in result.values() if isinstance(result, dict) else [result]:
        assert not R.requires_grad
        assert R.is_leaf
        assert set(R.__dict__) == set()
        assert not R.is_inference()
        assert R.untyped_storage().data_ptr() != y.untyped_storage().data_ptr()


def test_the_result_is_the_callers_own() -> None:
    """No layer's relevance shares memory with another's or with the model's."""
    model, x = network(), images()
    for options in ({"composite": "epsilon"}, {"composite": "lrp_0"}, {"composite": "epsilon_plus_flat"}):
        layers = ["", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
        results = explain(model, x, 1, layer=layers, **options)
        copies = {name: R.clone() for name, R in results.items()}
        for name in layers:
            results[name].fill_(7)
            for other in layers[layers.index(name) + 1 :]:
                assert torch.equal(results[other], copies[other]), (name, other)
        assert torch.equal(explain(model, x, 1, **options), copies[""])


# Memory


def tensors() -> int:
    return sum(type(o) in (Tensor, nn.Parameter) for o in gc.get_objects())


@pytest.mark.parametrize(
    "options",
    [
        {},
        LAYERS,
        {"start": ("3", 1)},
        {"condition": {"0": 1}},
        {"target": [0, 1]},
        {"composite": "epsilon"},
        {"start": ("3", 99)},
        {"condition": {"3": 99}},
        {"composite": BOX["composite"], "low": -0.1, "high": 0.1},
    ],
    ids=str,
)
def test_activations_are_freed_without_the_garbage_collector(options: dict[str, Any]) -> None:
    model, x = network(), images()
    seen: list[weakref.ref[Tensor]] = []

    def remember(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.append(weakref.ref(output))

    for module in model.modules():
        module.register_forward_hook(remember)

    def run() -> None:
        with suppress(UserError):
            explain(model, x, **options)

    run()  # what is made once
    gc.collect()
    gc.disable()
    try:
        seen.clear()
        before = tensors()
        run()
        assert len(seen) > 1
        assert [ref for ref in seen if ref() is not None] == []
        assert tensors() == before
    finally:
        gc.enable()


# Threads


def test_threads_do_not_see_each_other() -> None:
    model, x = network(), images(4)
    jobs: list[dict[str, Any]] = [
        {"target": 0},
        {"target": [1, 2], "composite": "epsilon"},
        {"target": 3, "layer": ["", "3", "0"]},
        {"start": ("3", 2), "composite": "epsilon_alpha2_beta1"},
        {"target": 1, "condition": {"0": torch.arange(1.0, 9)}},
        {"target": 2, "relevance_dtype": "bfloat16"},
        {"target": 2, "autocast": torch.bfloat16},
        {"target": 1, "method": "gradient"},
    ]

    def flat(result: Any) -> list[Tensor]:
        return list(result.values()) if isinstance(result, dict) else [result]

    expected = [flat(explain(model, x, **job)) for job in jobs]
    wrong: list[str] = []

    def work(number: int) -> None:
        for turn in range(6):
            job = (number + turn) % len(jobs)
            try:
                result = flat(explain(model, x, **jobs[job]))
            except BaseException as error:
                wrong.append(f"{jobs[job]}: {error!r}")
                return
            if not all(torch.equal(a, b) for a, b in zip(result, expected[job], strict=True)):
                wrong.append(f"{jobs[job]}: other values")

    untrained = network(5)

    def train() -> list[float]:
        own = copy.deepcopy(untrained).train()
        own[8] = nn.Identity()  # what draws no random numbers
        optimizer = torch.optim.SGD(own.parameters(), 0.01)
        losses = []
        for _ in range(30):
            loss = nn.functional.cross_entropy(own(images(4)), torch.arange(4))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    alone, beside = train(), []
    before = everything(model)
    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    threads.append(threading.Thread(target=lambda: beside.extend(train())))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert beside == alone
    after = everything(model)
    assert after["global hooks"] == before["global hooks"]
    assert after["weights"] == before["weights"]


def test_random_numbers_of_other_threads_do_not_repeat() -> None:
    drawn: list[Tensor] = []

    def draw(x: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: drawn.append(torch.rand(4)))
        thread.start()
        thread.join()
        return x

    model = network()
    model[8] = Failing(draw).eval()
    explain(model, images(), 1)
    drawn.append(torch.rand(4))
    assert not torch.equal(drawn[0], drawn[1])


# Nothing is remembered


def step(model: nn.Sequential) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(images()).sum().backward()
    optimizer.step()


def write_through_numpy(model: nn.Sequential) -> None:
    model[0].weight.detach().numpy()[:] *= 1.5


def change_statistics(model: nn.Sequential) -> None:
    model[1].running_mean += 0.5
    model[3].norm.running_var.data.mul_(3)


def replace_module(model: nn.Sequential) -> None:
    torch.manual_seed(9)
    model[6] = nn.Linear(8 * 16, 16).eval()


def change_in_place(model: nn.Sequential) -> None:
    model[3].conv.weight.data.mul_(-1.2)


def load(model: nn.Sequential) -> None:
    model.load_state_dict(network(7).state_dict())


def change_data(model: nn.Sequential) -> None:
    model[9].weight.data = torch.randn_like(model[9].weight)


def change_settings(model: nn.Sequential) -> None:
    model[1].eps = 0.5
    model[4].kernel_size = 2
    model[0].padding_mode = "circular"


@pytest.mark.parametrize(
    "change",
    [step, write_through_numpy, change_statistics, replace_module, change_in_place, load, change_data, change_settings],
)
def test_results_are_never_stale(change: Callable[[nn.Sequential], None]) -> None:
    x = images()
    for options in (
        {},
        {"composite": "epsilon_gamma_box", "low": -6.0, "high": 6.0},
        {"composite": "epsilon", **LAYERS},
    ):
        model = network()
        before = explain(model, x, 1, **options)
        change(model)
        after = explain(model, x, 1, **options)
        fresh = explain(copy.deepcopy(model), x.clone(), 1, **options)
        pairs = (
            [(after[k], fresh[k], before[k]) for k in fresh] if isinstance(fresh, dict) else [(after, fresh, before)]
        )
        for now, expected, earlier in pairs:
            assert torch.equal(now, expected)
            assert not torch.equal(now, earlier)


# Surroundings


def in_context(name: str) -> Any:
    return {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "enable_grad": torch.enable_grad,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "meta": lambda: torch.device("meta"),
    }[name]()


@pytest.mark.parametrize("context", ["no_grad", "inference_mode", "enable_grad", "autocast", "meta"])
@pytest.mark.parametrize("composite", ["epsilon", "epsilon_plus_flat", "epsilon_gamma_box", "deep_taylor"])
def test_surroundings_do_not_matter(composite: str, context: str) -> None:
    model, x = network(), images()
    options: dict[str, Any] = {"low": -6.0, "high": 6.0} if composite == "epsilon_gamma_box" else {}
    for more in ({"target": 1}, {"target": [0, 1], "layer": "3"}, {"start": ("3", 1)}, {"condition": {"3": [1, 2]}}):
        expected = explain(model, x, composite=composite, **more, **options)
        with in_context(context):
            result = explain(model, x, composite=composite, **more, **options)
        assert torch.equal(result, expected)
        assert not result.is_inference()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    model, x = network(), images()
    jobs: list[dict[str, Any]] = [{"composite": c} for c in ("epsilon", "epsilon_plus_flat", "deep_taylor", "lrp_0")]
    jobs += [{"start": ("3", torch.ones(8))}, {"condition": {"3": 1}}, {"addition": "magnitude"}, {"contrast": True}]
    jobs += [{"composite": "epsilon_gamma_box", "low": [-6.0, -6.0, -6.0], "high": 6.0}]
    for job in jobs:
        expected = explain(model, x, **job)
        torch.set_default_dtype(dtype)
        try:
            result = explain(model, x, **job)
        finally:
            torch.set_default_dtype(torch.float32)
        assert result.dtype == torch.float32
        assert torch.equal(result, expected), job


def test_inference_tensors() -> None:
    """An input, and a model's weights, that were made in inference mode."""
    model, x = network(), images()
    expected = explain(model, x, 1)
    with torch.inference_mode():
        inference = x.clone()
        own = network()
    assert torch.equal(explain(model, inference, 1), expected)
    assert torch.equal(explain(own, x, 1), expected)
    assert torch.equal(explain(own, inference, 1, layer="3"), explain(model, x, 1, layer="3"))


# Inputs


def test_layouts_of_the_input() -> None:
    model, x = network(), images()
    expected = explain(model, x, 1)
    wide = torch.zeros(2, 3, 8, 16)
    wide[..., ::2] = x
    shapes = [
        x.contiguous(memory_format=torch.channels_last),
        wide[..., ::2],
        x.flip(0).flip(0),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        x.clone().requires_grad_(),
        (x.clone().requires_grad_() * 1),
        nn.Parameter(x.clone()),
    ]
    for other in shapes:
        result = explain(model, other, 1)
        assert torch.equal(result, expected)
        assert type(result) is Tensor
    expanded = x[:1].expand(3, -1, -1, -1)
    torch.testing.assert_close(explain(model, expanded, 1), expected[:1].expand(3, -1, -1, -1))
    torch.testing.assert_close(explain(model, x[1:], 1), expected[1:], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("options", [{}, LAYERS, {"start": ("3", 1)}, {"condition": {"3": torch.ones(8)}}], ids=str)
def test_empty_batches(options: dict[str, Any]) -> None:
    model = network()
    result = explain(model, images()[:0], **options)
    if isinstance(result, dict):
        assert result["3"].shape == (0, 8, 8, 8)
        result = result[""]
    assert result.shape == (0, 3, 8, 8)


# Models


def same(model: nn.Module, **options: Any) -> None:
    for more in ({"composite": "epsilon"}, {"composite": "epsilon_plus_flat"}):
        expected, result = explain(network(), images(), 1, **more), explain(model, images(), 1, **more, **options)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_copies_and_wrappers() -> None:
    model = network()
    same(copy.deepcopy(model))
    same(pickle.loads(pickle.dumps(model)))
    same(nn.DataParallel(model).eval())
    same(nn.Sequential(model).eval())
    same(model.to(memory_format=torch.channels_last))
    wrapped = nn.DataParallel(network()).eval()
    assert torch.equal(explain(wrapped, images(), 1, layer="module.3"), explain(network(), images(), 1, layer="3"))


def test_explained_models_can_still_be_copied_pickled_and_trained() -> None:
    model, x = network(), images()
    explain(model, x, 1, layer=["", "3"])
    same(pickle.loads(pickle.dumps(model)))
    same(copy.deepcopy(model))
    model(x).sum().backward()
    reference = network()
    reference(x).sum().backward()
    for own, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(own.grad, other.grad)


@pytest.mark.parametrize("way", ["wrapper", "method", "part"])
def test_compiled_models(way: str) -> None:
    torch._dynamo.reset()
    model: nn.Module = network()
    if way == "wrapper":
        model = torch.compile(model, backend="eager")  # type: ignore[assignment]
    elif way == "method":
        model.compile(backend="eager")
    else:
        model[3] = torch.compile(model[3], backend="eager")  # type: ignore[index]
    same(model)
    if way == "part":  # after it was really compiled
        expected = model(images())
        same(model)
        assert torch.equal(model(images()), expected)
    torch._dynamo.reset()


def test_parametrised_and_shared_weights() -> None:
    for wrap in (parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal):
        torch.manual_seed(0)
        layer = wrap(nn.Linear(8 * 16, 16))
        model = network()
        model[6] = layer
        model.eval()
        plain = network()
        plain[6] = nn.Linear(8 * 16, 16).eval()
        plain[6].weight.data.copy_(layer.weight)
        plain[6].bias.data.copy_(layer.bias)
        for options in ({"composite": {"6": "gamma", "linear": "lrp_0"}}, {}, {"composite": "epsilon", "layer": "6"}):
            before = everything(model)["weights"]
            expected = explain(plain, images(), 1, **options)
            torch.testing.assert_close(explain(model, images(), 1, **options), expected, rtol=1e-4, atol=1e-7)
            assert everything(model)["weights"] == before
    tied = network()
    tied[3].conv.weight = nn.Parameter(torch.randn(8, 8, 3, 3) / 5)
    tied.insert(4, Block(8).eval())
    tied[4].conv.weight = tied[3].conv.weight
    free = copy.deepcopy(tied)
    free[4].conv.weight = nn.Parameter(free[3].conv.weight.detach().clone())
    assert torch.equal(explain(tied, images(), 1), explain(free, images(), 1))


def test_hooks_of_the_user_still_run() -> None:
    model, x = network(), images()
    expected = explain(model, x, 1)
    seen = []
    model[3].register_forward_pre_hook(lambda module, args: seen.append("pre"))
    model[3].register_forward_hook(lambda module, args, output: seen.append("post"))
    model[6].register_forward_hook(lambda module, args, output: output * 2)
    assert torch.equal(explain(model, x, 1, layer=["", "3"])[""], explain(model, x, 1))
    assert seen == ["pre", "post"] * 2
    assert not torch.equal(explain(model, x, 1), expected)


def test_parameters_shared_with_numpy_are_only_read() -> None:
    model, x = network(), images()
    memory = np.ascontiguousarray(model[0].weight.detach().numpy().copy())
    model[0].weight.data = torch.from_numpy(memory)
    memory.flags.writeable = False
    expected = memory.copy()
    explain(model, x, 1)
    assert np.array_equal(memory, expected)
