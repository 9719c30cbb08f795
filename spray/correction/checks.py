"""Whether a model can be corrected as it is asked, found out before anything is computed."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from spray.correction.layers import INPUT, activations, candidates, feature_layer, output_layer, upstream
from spray.correction.options import AUTO, Options
from spray.correction.refitting import last_layer
from spray.errors import UserError

LATENT = ("p_clarc", "reactive_p_clarc", "a_clarc_latent", "rr_clarc")
TRAINED_LATENT = ("a_clarc_latent", "rr_clarc")


def check_model(model: nn.Module, x: Tensor, methods: Collection[str], options: Options) -> None:
    """Check that a model has the layers that the methods need.

    Parameters
    ----------
    model : nn.Module
        In eval mode; left as it was.
    x : Tensor
        (N, C, H, W), two normalised images or more, on the model's device.
    methods : collection of str
        What will be run.
    options : Options
        How.

    Raises
    ------
    UserError
        For the first layer that does not exist or is of no use.
    """
    if "dfr" in methods:
        last_layer(model, x)
    layer = options.layer
    if "lrp_guided" in methods:
        if layer in (AUTO, "output"):
            feature_layer(model, x)
        elif layer.endswith(INPUT):
            raise UserError(
                f"correction.layer={layer}: lrp_guided needs the output of a module; name one without {INPUT}"
            )
        else:
            activations(model, layer, x)
    if not any(method in LATENT for method in methods):
        return
    if layer == AUTO:
        if not candidates(model, x):
            raise UserError("no layer of the model gives activations for each image; take a_clarc alone")
        return
    if layer == "output":
        head = output_layer(model, x)
        if head is None:
            raise UserError("correction.layer=output needs a model whose output is made by an nn.Linear; name a layer")
        layer = head + INPUT
    activations(model, layer, x)
    if any(method in TRAINED_LATENT for method in methods):
        before = {id(p) for p in upstream(model, layer, x)[0]}
        if all(id(p) in before for p in model.parameters()):
            raise UserError(f"correction.layer={layer}: no weights come behind this layer; name an earlier one")
