"""Models whose inner activations are projected while they run: no weights stand for that, so a module does."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from spray.correction.layers import changed, find
from spray.errors import UserError

MODEL, PROJECTIONS = "model.", "projections."


class Projection(nn.Module):
    """Sets what activations have along some directions h_i to fixed values z_i.

    P-ClArC (Anders et al. 2022, equation 9), a' = a + (z⁻ - h·a) h for one direction. For several, a' is the nearest
    point to a at which h_i·a' = z_i for all i: a' = a + H⁺ (z - H a), with H (k, d) and its pseudo-inverse H⁺.

    Parameters
    ----------
    layer : str
        See `spray.correction.layers.changed`.
    directions : Tensor
        (k, d); d counts all activations of a sample, or with `dim` the channels.
    offsets : Tensor
        (k,): z.
    dim : int, optional
        The dimension of the activations that counts channels, each position of which is projected on its own.
    strength : float
        Share of the way that activations go.
    gate : tuple of Tensor, optional
        Weights w (d,) and bias b (): only samples with w·a + b > 0 are projected, a being all activations or, with
        `dim`, their maxima over positions. Bareeva et al., "Reactive model correction: mitigating harm to
        task-relevant features via conditional bias suppression", 2024.
    """

    def __init__(
        self,
        layer: str,
        directions: Tensor,
        offsets: Tensor,
        dim: int | None = None,
        strength: float = 1.0,
        gate: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        shapes = [directions.shape[1:], offsets.shape, *([gate[0].shape, gate[1].shape] if gate else [])]
        wanted = [directions.shape[1:], directions.shape[:1], *([directions.shape[1:], ()] if gate else [])]
        if directions.dim() != 2 or [tuple(s) for s in shapes] != [tuple(s) for s in wanted]:
            raise ValueError(f"directions {tuple(directions.shape)} do not fit {[tuple(s) for s in shapes[1:]]}")
        # As numbers, so that a state_dict, which holds tensors alone, says where and how.
        self.register_buffer("layer_name", torch.tensor(list(layer.encode()), dtype=torch.uint8))
        self.register_buffer("channel_dim", torch.tensor(dim or 0))
        self.register_buffer("strength", torch.tensor(float(strength), dtype=torch.float64))
        self.register_buffer("directions", directions.detach().clone())
        self.register_buffer("back", torch.linalg.pinv(directions.detach().double(), rtol=1e-6).to(directions))
        self.register_buffer("offsets", offsets.detach().clone())
        self.register_buffer("gate_weight", None if gate is None else gate[0].detach().clone())
        self.register_buffer("gate_bias", None if gate is None else gate[1].detach().clone())
        self.layer, self.dim = layer, dim

    directions: Tensor
    back: Tensor
    offsets: Tensor
    strength: Tensor
    gate_weight: Tensor | None
    gate_bias: Tensor | None

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> Projection:
        """Return the projection that a state_dict describes.

        Raises
        ------
        KeyError, ValueError, RuntimeError
            If it describes none.
        """
        layer = bytes(state["layer_name"].tolist()).decode()
        gate = (state["gate_weight"], state["gate_bias"]) if "gate_weight" in state else None
        dim, share = int(state["channel_dim"]), float(state["strength"])
        projection = cls(layer, state["directions"], state["offsets"], dim or None, share, gate)
        projection.load_state_dict(dict(state), strict=True)
        return projection

    def rows(self, a: Tensor) -> Tensor:
        """Return activations (N, ...) as (N, d), or with positions as (N, ..., d)."""
        return a.flatten(1) if self.dim is None else a.movedim(self.dim, -1)

    def fires(self, a: Tensor) -> Tensor:
        """Return which samples are projected, bool (N,)."""
        if self.gate_weight is None or self.gate_bias is None:
            return torch.ones(len(a), dtype=torch.bool, device=a.device)
        return pooled(a, self.dim) @ self.gate_weight.to(a) + self.gate_bias.to(a) > 0

    def forward(self, a: Tensor) -> Tensor:
        """Return activations (N, ...), projected."""
        rows = self.rows(a)
        H, back = self.directions.to(a), self.back.to(a)
        missing = nn.functional.linear(rows, -H, self.offsets.to(a))  # z - H a
        step = nn.functional.linear(missing, back) * self.strength.to(a)
        if self.gate_weight is not None:
            with torch.no_grad():
                on = self.fires(a.detach()).to(a)
            step = step * on.view(-1, *[1] * (step.dim() - 1))
        step = step.view(a.shape) if self.dim is None else step.movedim(-1, self.dim)
        return a + step


def pooled(a: Tensor, dim: int | None) -> Tensor:
    """Return activations (N, ...) as one vector each: all of them, or each channel's maximum over positions."""
    return a.flatten(1) if dim is None else a.movedim(dim, -1).flatten(1, -2).amax(dim=1)


class Projected(nn.Module):
    """A model, itself unmodified, with projections at some of its layers.

    Parameters
    ----------
    model : nn.Module
        Any model.
    projections : sequence of Projection
        Those of the same layer act one after the other.
    """

    def __init__(self, model: nn.Module, projections: Sequence[Projection]) -> None:
        super().__init__()
        self.model = model
        self.projections = nn.ModuleList(projections)
        for projection in projections:
            find(model, projection.layer)
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's output for `x`."""
        with ExitStack() as stack:
            for projection in self.projections:
                assert isinstance(projection, Projection)
                stack.enter_context(changed(self.model, projection.layer, projection))
            output: Tensor = self.model(x)
        return output


def innermost(model: nn.Module) -> tuple[nn.Module, str]:
    """Return the model inside of all projections, and what stands before its layers' names: `model.` for each."""
    prefix = ""
    while isinstance(model, Projected):
        model, prefix = model.model, prefix + MODEL
    return model, prefix


def is_wrapped(state: Mapping[str, Tensor]) -> bool:
    """Return whether a state_dict is that of a `Projected` model."""
    inside = [key.startswith(PROJECTIONS) for key in state]
    return any(inside) and all(is_one or key.startswith(MODEL) for key, is_one in zip(state, inside, strict=True))


def unwrapped(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[Projection]]:
    """Return the state of the model inside, and the projections.

    Raises
    ------
    UserError
        If the projections cannot be made of it.
    """
    inner = {key.removeprefix(MODEL): value for key, value in state.items() if key.startswith(MODEL)}
    parts: dict[int, dict[str, Tensor]] = {}
    try:
        for key, value in state.items():
            if key.startswith(PROJECTIONS):
                number, _, name = key.removeprefix(PROJECTIONS).partition(".")
                parts.setdefault(int(number), {})[name] = value
        return inner, [Projection.of_state(parts[number]) for number in sorted(parts)]
    except (KeyError, ValueError, RuntimeError, UnicodeDecodeError, OverflowError) as error:
        raise UserError(f"the projections of a corrected model are damaged ({type(error).__name__})") from None


def load_weights(model: nn.Module, path: str) -> nn.Module:
    """Load a checkpoint into a model, and wrap it where the checkpoint is that of a `Projected` model.

    Parameters
    ----------
    model : nn.Module
        The architecture; changed in place.
    path : str
        As of `spray.models.loading.load_checkpoint`.

    Returns
    -------
    nn.Module
        `model`, or a `Projected` around it, on the model's device.

    Raises
    ------
    UserError
        If the file is no checkpoint, or none of this model.
    """
    from spray.models.loading import load_state, read_state

    state = read_state(path)
    layers: list[list[Projection]] = []
    while is_wrapped(state) and not set(state) <= set(model.state_dict()):
        state, projections = unwrapped(state)
        layers.append(projections)
    load_state(model, state, path)
    device = next((p.device for p in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    for projections in reversed(layers):
        try:
            model = Projected(model, projections).to(device)
        except UserError as error:
            raise UserError(f"checkpoint {path} is not one of this model: {error}") from None
    return model


def load_corrected(run_dir: str | Path, method: str, model: nn.Module) -> nn.Module:
    """Return a corrected model of a run: `corrected/<method>.pt`, ready to use.

    Parameters
    ----------
    run_dir : str or Path
        Where the run's results are.
    method : str
        A correction of that run, such as ``"a_clarc"``; or ``"original"`` for the model under study.
    model : nn.Module
        The architecture, which is left as it is.

    Returns
    -------
    nn.Module
        In eval mode: a copy of `model` with the corrected weights or, where no weights stand for the correction, a
        module around it that projects inner activations while it runs. Only tensors are read from the file.

    Raises
    ------
    UserError
        If there is no such correction, or it is not one of this architecture.

    Examples
    --------
    >>> model = spray.load_corrected("outputs/run", "p_clarc", my_model.build())  # doctest: +SKIP
    """
    folder = Path(run_dir)
    path = folder / "model.pt" if method == "original" else folder / "corrected" / f"{method}.pt"
    if not path.is_file():
        made = sorted(file.stem for file in (folder / "corrected").glob("*.pt"))
        raise UserError(f"there is no {path}; {run_dir} has: {', '.join(['original', *made])}")
    return load_weights(copy.deepcopy(model), str(path)).eval()
