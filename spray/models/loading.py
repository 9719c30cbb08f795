"""From a model's configuration to an `nn.Module`: architecture, weights, checks."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from spray.errors import UserError
from spray.models.factory import call_factory, one_line
from spray.registry import Registry

MODELS: Registry[Callable[[int, int], nn.Module]] = Registry("model")
"""Architectures of the project's own by `model.name`: (channels, number of classes) to model."""

CHECKPOINT_KEYS = ("state_dict", "model_state_dict", "model")
# What DistributedDataParallel, torch.compile and training frameworks put before every name.
WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.")
# Heads of Inception and GoogLeNet that are there for training alone; models are built without them.
AUXILIARY_PREFIXES = ("AuxLogits.", "aux1.", "aux2.")


@MODELS.register("small_cnn")
def _small_cnn(in_channels: int, n_classes: int) -> nn.Module:
    from spray.models.small_cnn import SmallCNN

    return SmallCNN(in_channels, n_classes)


def build_model(
    name: str, factory: str | None, n_classes: int, input_shape: tuple[int, int, int], seed: int
) -> nn.Module:
    """Build an architecture with freshly initialised weights.

    Parameters
    ----------
    name : str
        One of `MODELS` or any classifier of torchvision; not used where there is a factory.
    factory : str or None
        ``FILE.py:FUNCTION`` or ``package.module:function`` of the user's own, see `spray.models.factory`.
    n_classes : int
        Number of outputs.
    input_shape : tuple of int
        (C, H, W) of the images.
    seed : int
        Seeds the initial weights. The global random state is left as it was.

    Returns
    -------
    nn.Module
        On the CPU, as its constructor left it.

    Raises
    ------
    UserError
        If the name is unknown, the factory fails, or the architecture does not take such images.
    """
    with _seeded(seed):
        if factory:
            return call_factory(factory, n_classes)
        if name in MODELS.names():
            return MODELS.get(name)(input_shape[0], n_classes)
        return _torchvision_model(name, n_classes, input_shape)


def load_checkpoint(model: nn.Module, path: str) -> None:
    """Load weights into a model: all of them or, with an error, none.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    path : str
        A file that ``torch.save`` wrote: a state_dict, or a dict that holds one under ``state_dict``,
        ``model_state_dict`` or ``model``. A prefix that all names share with no name of the model, such as
        ``module.``, is taken off. Only tensors are ever loaded (``weights_only=True``).

    Raises
    ------
    UserError
        If there is no such file, it holds no state_dict, or that is not one of this model.
    """
    load_state(model, read_state(path), path)


def load_state(model: nn.Module, state: Mapping[str, Tensor], path: str) -> None:
    """Load a state_dict that was read from `path` into a model, as `load_checkpoint` does.

    Raises
    ------
    UserError
        If it is not one of this model.
    """
    state = _without_wrapper(state, model)
    own = model.state_dict()
    if type(model).__module__.startswith("torchvision.models."):
        state = {key: value for key, value in state.items() if key in own or not key.startswith(AUXILIARY_PREFIXES)}
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        parts = [f"lacks {_first(missing)}"] * bool(missing) + [f"has in excess {_first(unexpected)}"] * bool(
            unexpected
        )
        raise UserError(
            f"checkpoint {path} is not one of this model: it {' and '.join(parts)}; check model.name/factory"
        )
    for key, value in state.items():
        if not is_lazy(own[key]) and value.shape != own[key].shape:
            raise UserError(
                f"checkpoint {path} is not one of this model: {key} has shape {tuple(value.shape)}, in the "
                f"model {tuple(own[key].shape)}; check the number of classes and model.name/factory"
            )
    try:
        model.load_state_dict(state)
    except Exception as error:  # modules can bring loading code of their own
        raise UserError(f"checkpoint {path} cannot be loaded: {one_line(error)}") from None


def check_model(model: nn.Module, x: Tensor, n_classes: int) -> None:
    """Check on a few inputs that a model is a classifier that can be studied.

    Parameters
    ----------
    model : nn.Module
        Left as it was; run in eval mode.
    x : Tensor, shape (N, C, H, W)
        Normalised images on the model's device.
    n_classes : int
        Number of outputs that it must have.

    Raises
    ------
    UserError
        If the model fails on `x`, or returns anything but finite numbers of shape (N, n_classes).
    """
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            output = model.eval()(x)
    except Exception as error:  # the user's own code can raise anything
        raise UserError(f"the model fails on images of shape {tuple(x.shape)}: {one_line(error)}") from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not isinstance(output, Tensor):
        raise UserError(
            f"the model returns a {type(output).__name__}; it must return one tensor of logits (N, classes)"
        )
    if output.shape != (len(x), n_classes):
        raise UserError(
            f"the model returns shape {tuple(output.shape)} for {len(x)} images, but the dataset has "
            f"{n_classes} classes; it must be ({len(x)}, {n_classes})"
        )
    if not output.is_floating_point() or not torch.isfinite(output).all():
        raise UserError("the model's output is not finite; check its checkpoint, dataset.mean and dataset.std")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # The generator itself: torch.manual_seed would seed those of the GPUs as well, for good.
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _torchvision_model(name: str, n_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    from torchvision import models

    channels, height, width = input_shape
    known = models.list_models(module=models)
    if name not in known:
        close = get_close_matches(name, [*MODELS.names(), *known], n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UserError(
            f"unknown model.name={name}{hint}; allowed: {', '.join(MODELS.names())} or a classifier of "
            "torchvision such as resnet18; or give model.factory"
        )
    if channels != 3:
        raise UserError(f"{name} takes images of 3 channels, these have {channels}; use small_cnn or model.factory")
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": False}
    elif name.startswith("vit_"):
        options = {"image_size": height}
    elif name.startswith("maxvit_"):
        options = {"input_size": (height, width)}
    try:
        return models.get_model(name, weights=None, num_classes=n_classes, **options)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"{name} does not take images of {height}×{width}: {one_line(error)}") from None


def read_state(path: str) -> dict[str, Tensor]:
    """Return the state_dict in a file that ``torch.save`` wrote; only tensors are ever loaded.

    Raises
    ------
    UserError
        If there is no such file, or it holds none.
    """
    advice = "save it with torch.save(model.state_dict(), PATH)"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}; check model.checkpoint") from None
    except OSError as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror or one_line(error)}") from None
    except pickle.UnpicklingError as error:
        # An operand that is no opcode is one of a file that is no pickle; a class or global is one that is refused.
        if "Unsupported" in str(error) and "Unsupported operand" not in str(error):
            raise UserError(f"checkpoint {path} holds more than tensors, such as a whole model; {advice}") from None
        raise UserError(f"{path} is no checkpoint of PyTorch; {advice}") from None
    except Exception:  # damaged archives fail in many ways
        raise UserError(f"{path} is no checkpoint of PyTorch, or damaged; {advice}") from None
    if not _is_state(content) and isinstance(content, Mapping):
        content = next((content[key] for key in CHECKPOINT_KEYS if _is_state(content.get(key))), content)
    if not _is_state(content):
        raise UserError(f"checkpoint {path} holds no state_dict (names with tensors); {advice}")
    return dict(content)


def _is_state(content: object) -> bool:
    return (
        isinstance(content, Mapping)
        and len(content) > 0
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())
    )


def _without_wrapper(state: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    own = model.state_dict()
    for prefix in WRAPPER_PREFIXES:
        shared = all(key.startswith(prefix) for key in state)
        if shared and not any(key.startswith(prefix) for key in own):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
