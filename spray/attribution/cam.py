"""Class activation maps weighted by gradients: Grad-CAM."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spray.attribution.gradients import for_two, strays_alone
from spray.attribution.options import Perturbed, explained_classes
from spray.attribution.registry import ATTRIBUTIONS
from spray.attribution.target import Target
from spray.errors import UserError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# How a map is enlarged, by the input's number of dimensions.
ENLARGEMENT = {3: "linear", 4: "bilinear", 5: "trilinear"}
# The modules that ran and gave one tensor, and its shape.
Outputs = list[tuple[nn.Module, tuple[int, ...]]]


@ATTRIBUTIONS.register("grad_cam")
def grad_cam(model: nn.Module, x: Tensor, target: Target, *, layer: str | None = None, relu: bool = True) -> Tensor:
    """Return the gradient-weighted class activation map (Selvaraju et al. 2017, equations 1 and 2), by Captum.

    With the layer's feature maps Aᵏ and its gradients' means αₖ over places, the map is ReLU(Σₖ αₖ Aᵏ),
    enlarged to the input's size (bilinearly, corners not aligned) and spread evenly over the input's channels:
    the sum over the channels is the map.

    Parameters
    ----------
    model : nn.Module
        The model.
    x : Tensor, shape (N, C, H, W), also (N, C, L) or (N, C, D, H, W)
        Its input.
    target : Target
        The class, as `explain` has it.
    layer : str, optional
        The module whose output is taken, by its name in the model. The default is the last one to run whose
        output has the size of the last convolution's output: past the normalisation, the activation and the
        residual connection that follow it, but before any pooling (in a ResNet `layer4`, in VGG-16
        `features.29`).
    relu : bool
        Keep what speaks for the class only, as the paper does; False keeps both signs.

    Returns
    -------
    Tensor, shape of x
        The map.

    Raises
    ------
    UserError
        For an input that isn't an image, a layer that doesn't exist, doesn't run or has no feature map, and
        targets or outputs that aren't allowed.
    """
    if not isinstance(relu, bool):
        raise UserError(f"relu must be True or False, not {relu!r}")
    if x.dim() not in ENLARGEMENT:
        raise UserError(f"grad_cam needs an input of shape (N, C, H, W), not {tuple(x.shape)}")
    if strays_alone(model, x):
        return grad_cam(model, torch.cat([x, x]), for_two(target), layer=layer, relu=relu)[:1]
    module = None if layer is None else find_layer(model, layer)
    index, outputs = run(model, x, target)
    if module is None:
        module = last_map(outputs, x)
    what = "the layer of the last convolution" if layer is None else f"layer {layer!r}"
    shape = next((shape for ran, shape in reversed(outputs) if ran is module), None)
    if shape is None:
        raise UserError(f"{what} does not run in the model, or its output isn't one tensor; name another")
    if len(shape) != x.dim() or shape[0] != len(x):
        raise UserError(f"the output of {what} has shape {shape}, which is no feature map of the input; name another")
    if not len(x):
        return torch.zeros_like(x)
    from captum.attr import LayerGradCam

    logits = Perturbed(model)

    def differentiable(inputs: Tensor) -> Tensor:
        output: Tensor = logits(inputs)
        if not output.requires_grad:
            raise UserError(f"the model's output has no gradient with respect to {what}")
        return output

    cam = LayerGradCam(differentiable, module).attribute(
        x.detach(), target=index, relu_attributions=relu, grad_kwargs={"materialize_grads": True}
    )
    large = F.interpolate(cam.detach(), x.shape[2:], mode=ENLARGEMENT[x.dim()], align_corners=False)
    return (large / x.shape[1]).to(x.dtype).expand(x.shape).clone()


def find_layer(model: nn.Module, layer: str) -> nn.Module:
    """Return a module by its name in the model, or raise a UserError that lists the closest names."""
    # A wrapper such as `Contrast` passes names on to the model; its own named_modules() would differ.
    modules = dict(model.get_submodule("").named_modules(remove_duplicate=False))
    modules.pop("")
    if layer in modules:
        return modules[layer]
    close = get_close_matches(str(layer), modules, n=3)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"allowed: {', '.join(modules)}"
    raise UserError(f"the model has no layer {layer!r}; {hint}")


def run(model: nn.Module, x: Tensor, target: Target) -> tuple[Tensor, Outputs]:
    """Return each sample's class (N,), and what ran meanwhile, in the order in which it finished."""
    outputs: Outputs = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append((module, tuple(output.shape)))

    handles = [module.register_forward_hook(note) for module in model.modules()]
    try:
        return explained_classes(model, x, target), outputs
    finally:
        for handle in handles:
            handle.remove()


def last_map(outputs: Outputs, x: Tensor) -> nn.Module:
    """Return the last module to run whose output has the size of the last convolution's output.

    A convolution whose output has a single place (the heads of some networks) counts only where there is no other.
    """
    sizes = [shape[2:] for module, shape in outputs if isinstance(module, CONVOLUTIONS) and len(shape) == x.dim()]
    if not sizes:
        raise UserError("the model runs no convolution over its input; name the layer whose output is the map, layer=")
    size = next((size for size in reversed(sizes) if max(size) > 1), sizes[-1])
    return next(module for module, shape in reversed(outputs) if len(shape) == x.dim() and shape[2:] == size)
