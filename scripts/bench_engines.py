"""The engines that `bench_lrp.py` compares, each as a function of the input and the targets, and its networks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

Attribute = Callable[[Tensor, Any], Tensor]

SEED = 0
CLASSES = 1000
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
MODELS = ("vgg16", "vgg16_bn", "resnet18", "resnet50", "densenet121", "efficientnet_b0", "vit_b_16")
COMPOSITES = ("epsilon_plus_flat", "epsilon", "epsilon_gamma_box", "epsilon_alpha2_beta1_flat")
MORE_COMPOSITES = ("epsilon_plus", "epsilon_alpha2_beta1", "excitation_backprop")
ENGINES = ("spray", "zennit", "captum", "gradient")
SHORT = {"bfloat16": "bf16", "float16": "fp16"}
UNIT = "gradient"
CAVEATS = {
    ("zennit", "densenet121"): "has no canonizer for DenseNet: here BatchNorm is merged, by name, where it follows a "
    "convolution, and passed through elsewhere; the functional ReLU and pooling at the end get the gradient",
    ("zennit", "efficientnet_b0"): "has SequentialMergeBatchNorm only: additions and the products of squeeze-and-"
    "excitation get the gradient, which is not LRP",
    ("captum", "resnet18"): "passes relevance uncut to both branches of an addition, which is wrong",
    ("captum", "resnet50"): "passes relevance uncut to both branches of an addition, which is wrong",
    ("captum", "densenet121"): "does not see the functional ReLU and pooling at the end, which is wrong",
    ("captum", "epsilon_plus_flat"): "has no flat rule: z⁺ in the first layer as well",
    ("captum", "epsilon_gamma_box"): "has no zᴮ rule: γ in the first layer as well",
}


class RefusedError(Exception):
    """What an engine can't do."""


class Tiny(nn.Module):
    """A network that every engine can explain, for a first call and for tests."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)
        )
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))


def make_model(name: str, size: int) -> nn.Module:
    """Return a model with random weights and random statistics of BatchNorm, in evaluation mode."""
    torch.manual_seed(SEED)
    if name == "tiny":
        model: nn.Module = Tiny()
    else:
        options = {"image_size": size} if name.startswith("vit") else {}
        model = getattr(torchvision.models, name)(weights=None, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.get_buffer("running_mean"), -0.3, 0.3)
            nn.init.uniform_(module.get_buffer("running_var"), 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
        elif isinstance(module, nn.Conv2d) and module.groups > 1:
            # torchvision's fan_out takes a depthwise convolution for a full one: gradients would be 1e-14
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
    if name.startswith("vit"):  # torchvision starts the head with zeros, which would make every gradient zero
        nn.init.normal_(model.heads.head.weight, std=0.05)  # type: ignore[union-attr, arg-type]
    return model.eval().requires_grad_(False)


def make_batch(n: int, size: int) -> tuple[Tensor, Tensor]:
    """Return `n` normalised random images (n, 3, size, size) and their targets (n,)."""
    generator = torch.Generator().manual_seed(SEED)
    x = (torch.rand(n, 3, size, size, generator=generator) - MEAN) / STD
    return x, torch.randint(CLASSES, (n,), generator=generator)


def logit_mask(logits: Tensor, target: Tensor) -> Tensor:
    return torch.zeros_like(logits).scatter(1, target[:, None], 1)


def forward_engine(model: nn.Module) -> Attribute:
    @torch.no_grad()
    def forward(x: Tensor, target: Tensor) -> Tensor:
        return model(x)

    return forward


def gradient_engine(model: nn.Module, memory_format: torch.memory_format = torch.contiguous_format) -> Attribute:
    """Return the plain gradient of the target's logit."""
    model = model.to(memory_format=memory_format)

    def gradient(x: Tensor, target: Tensor) -> Tensor:
        leaf = x.detach().contiguous(memory_format=memory_format).requires_grad_()
        return torch.autograd.grad(model(leaf).gather(1, target[:, None]).sum(), leaf)[0]

    return gradient


def bounds(composite: str, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Return the options of a composite: the bounds of the normalised input, if it needs them."""
    low, high = ((value - MEAN) / STD for value in (0.0, 1.0))
    return {"low": low.to(device), "high": high.to(device)} if composite.endswith("_box") else {}


def spray_engine(model: nn.Module, composite: str, relevance_dtype: str | None) -> Attribute:
    from spray import explain

    options: dict[str, Any] = {"relevance_dtype": getattr(torch, relevance_dtype)} if relevance_dtype else {}

    def attribute(x: Tensor, target: Any) -> Tensor:
        return explain(model, x, target, composite=composite, **bounds(composite, x.device), **options)

    return attribute


def zennit_engine(model: nn.Module, composite: str) -> Attribute:
    from zennit.canonizers import NamedMergeBatchNorm, SequentialMergeBatchNorm
    from zennit.composites import COMPOSITES as RECIPES
    from zennit.composites import LayerMapComposite, layer_map_base
    from zennit.rules import Epsilon
    from zennit.torchvision import ResNetCanonizer, VGGCanonizer
    from zennit.types import Linear

    if isinstance(model, torchvision.models.ResNet):
        canonizer = ResNetCanonizer()
    elif isinstance(model, torchvision.models.VGG):
        canonizer = VGGCanonizer()
    elif isinstance(model, torchvision.models.DenseNet):  # SequentialMergeBatchNorm would merge across blocks and fail
        names = [name for name, _ in model.named_modules() if name.endswith("norm2")]
        pairs = [([name.replace("norm2", "conv1")], name) for name in names]
        canonizer = NamedMergeBatchNorm([(["features.conv0"], "features.norm0"), *pairs])
    else:
        canonizer = SequentialMergeBatchNorm()
    if composite == "epsilon":
        rules = LayerMapComposite([*layer_map_base(), (Linear, Epsilon(epsilon=1e-6))], canonizers=[canonizer])
    else:
        rules = RECIPES[composite](**bounds(composite), canonizers=[canonizer])

    def attribute(x: Tensor, target: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        with rules.context(model) as modified:
            logits = modified(leaf)
            return torch.autograd.grad(logits, leaf, logit_mask(logits, target) * logits.detach())[0]

    return attribute


def captum_engine(model: nn.Module, composite: str) -> Attribute:
    lrp, rules = import_module("captum.attr").LRP, import_module("captum.attr._utils.lrp_rules")
    convolution: dict[str, Callable[[], Any]] = {
        "epsilon": lambda: rules.EpsilonRule(1e-6),
        "epsilon_plus": rules.Alpha1_Beta0_Rule,
        "epsilon_plus_flat": rules.Alpha1_Beta0_Rule,
        "epsilon_gamma_box": lambda: rules.GammaRule(0.25),
    }
    if composite not in convolution:
        raise RefusedError(f"has no rule for {composite} (αβ only with β = 0)")
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    for module in model.modules():
        if getattr(module, "inplace", False):  # its hooks on activations need their inputs
            module.inplace = False  # type: ignore[assignment]

    def attribute(x: Tensor, target: Tensor) -> Tensor:
        for layer in layers:  # Captum deletes the rules after each call
            layer.rule = convolution[composite]() if isinstance(layer, nn.Conv2d) else rules.EpsilonRule(1e-6)  # type: ignore[assignment]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it sets hooks on the activations
            return lrp(model).attribute(x, target=target).detach()

    return attribute


def build_engine(name: str, model: nn.Module, composite: str, relevance_dtype: str | None = None) -> Attribute:
    """Return an engine on a model, which it may change.

    Raises
    ------
    RefusedError
        If the engine has no such rules.
    """
    if name == "forward":
        return forward_engine(model)
    if name.startswith(UNIT):
        return gradient_engine(model, torch.channels_last if name.endswith("last") else torch.contiguous_format)
    if name == "zennit":
        return zennit_engine(model, composite)
    if name == "captum":
        return captum_engine(model, composite)
    return spray_engine(model, composite, None if name == "spray" else relevance_dtype)


def caveats(engine: str, model: str, composite: str) -> list[str]:
    """Return what has to be said about an engine's heatmaps."""
    return [f"{engine} {CAVEATS[key]}" for key in ((engine, model), (engine, composite)) if key in CAVEATS]
