"""Recurrent layers: LSTM, GRU and the plain RNN, unrolled over time.

In every product of a sigmoid gate with a signal the signal takes all of the relevance and the gate none ("LRP-all";
Arras et al. 2017, "Explaining recurrent neural network predictions in sentiment analysis", section 3.1; Arras
et al. 2019, "Explaining and interpreting LSTMs", section 11.3). So a step has one affine layer that relevance flows
through, that of the candidate, over the concatenated input and hidden state; the gates are constants:

- LSTM: g = tanh(W_g·[x_t, h_{t-1}] + b_g), c_t = f c_{t-1} + i g, h_t = o tanh(c_t);
- GRU (Cho et al. 2014, in the form of cuDNN and torch): n = tanh(W_in x_t + b_in + r (W_hn h_{t-1} + b_hn)),
  h_t = (1 - z) n + z h_{t-1}; what tanh takes is one affine layer whose weights W_hn are scaled by r;
- RNN: h_t = tanh(W·[x_t, h_{t-1}] + b), or ReLU.

The sums c_t and h_t divide relevance by contribution, and the composite's rule for linear layers, by the name of
the recurrent module, holds in the affine layer of every step. None of them counts as the first or the last
affine layer of a model: one step would get another rule than the others, and its input isn't the model's.
A constant initial state takes its share of the relevance, as a bias does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spray.lrp.affine import affine
from spray.lrp.handlers import Call, detached, handles
from spray.lrp.layers import FullyConnected, LinearMap
from spray.lrp.operations import move
from spray.lrp.trace import Trace, carriers, known, record_of

State = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Weights:
    """The weights of one layer and direction.

    Attributes
    ----------
    joint : Tensor, shape (gates · hidden, inputs + hidden)
        [W_ih, W_hh].
    input_bias, hidden_bias : Tensor or None, shape (gates · hidden,)
        b_ih and b_hh.
    bias : Tensor or None
        Their sum.
    inputs : int
        How many columns of `joint` belong to the input.
    projection : Tensor or None, shape (projected, hidden)
        W_hr of an LSTM with projections.
    """

    joint: Tensor
    input_bias: Tensor | None
    hidden_bias: Tensor | None
    bias: Tensor | None
    inputs: int
    projection: Tensor | None = None


def weights_of(
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    projection: Tensor | None = None,
) -> Weights:
    """Return one layer's weights, concatenated once for all its steps."""
    b_ih, b_hh = detached(b_ih), detached(b_hh)
    bias = b_ih if b_hh is None else b_hh if b_ih is None else b_ih + b_hh
    return Weights(torch.cat([w_ih, w_hh], 1).detach(), b_ih, b_hh, bias, w_ih.shape[1], projection)


@dataclass(frozen=True, eq=False)
class Gated:
    """The map of a GRU's candidate: ``W_in x + r · (W_hn h)`` of the input [x, h], for a weight [W_in, W_hn].

    The reset gate r isn't negative, so that weights may be split by sign as in any layer (only w² counts the
    weights as they are, without r).

    Attributes
    ----------
    inputs : int
        How many of the inputs are x.
    reset : Tensor, shape (N, hidden)
        The gate r.
    """

    inputs: int
    reset: Tensor
    kind: str = "linear"

    def forward(self, a: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """Return ``W_in x + r · (W_hn h) + b``."""
        n = self.inputs
        z = F.linear(a[:, :n], w[:, :n]) + self.reset.to(w.dtype) * F.linear(a[:, n:], w[:, n:])
        return z if b is None else z + b

    def transpose(self, s: Tensor, w: Tensor, shape: Sequence[int]) -> Tensor:
        """Return ``[s W_in, (r s) W_hn]``."""
        n = self.inputs
        return torch.cat([s @ w[:, :n], (s * self.reset.to(w.dtype)) @ w[:, n:]], 1)

    def scale_outputs(self, w: Tensor, scale: Tensor) -> Tensor:
        """Refuse: no normalisation follows it."""
        raise NotImplementedError

    def output_shape(self, shape: Sequence[int], w: Tensor) -> tuple[int, ...]:
        """Replace the last dimension."""
        return (*shape[:-1], w.shape[0])

    def n_outputs(self, w: Tensor) -> int:
        """Count the rows."""
        return w.shape[0]

    def spread(self, R: Tensor, shape: Sequence[int], w: Tensor) -> Tensor | None:
        """Every output sees every input of its sample."""
        return FullyConnected().spread(R, shape, w)


def candidate(trace: Trace, a: Tensor, map: LinearMap, weight: Tensor, bias: Tensor | None, z: Tensor) -> Tensor:
    """Return `z`, computed already, as the output of an affine layer of `a`; a constant if `a` is one."""
    record = record_of(a)
    if record is None:
        return z
    record.after_affine = True  # never the first layer ...
    z = affine(trace, a, map, weight, bias, z)
    known(z).slot.leads_to_affine = True  # ... nor the last
    return z


# A step takes the trace, x_t, the state before it, led by h, and the weights, and returns the state after it.
Step = Callable[[Trace, Tensor, State, Weights], State]


def lstm_step(trace: Trace, x: Tensor, state: State, w: Weights) -> State:
    """Return (h_t, c_t) of an LSTM."""
    h, c = state
    with trace:
        a = torch.cat([x, h], 1)
    i, f, z, o = F.linear(a.detach(), w.joint, w.bias).chunk(4, 1)
    _, _, weight, _ = w.joint.chunk(4)
    bias = None if w.bias is None else w.bias.chunk(4)[2]
    z = candidate(trace, a, FullyConnected(), weight, bias, z.contiguous())
    i, f, o = i.sigmoid(), f.sigmoid(), o.sigmoid()
    with trace:
        c = f * c + i * torch.tanh(z)
        h = o * torch.tanh(c)
        if w.projection is not None:
            h = F.linear(h, w.projection)
            known(h).slot.leads_to_affine = True
    return trace.current(h), trace.current(c)


def gru_step(trace: Trace, x: Tensor, state: State, w: Weights) -> State:
    """Return (h_t,) of a GRU."""
    (h,) = state
    with trace:
        a = torch.cat([x, h], 1)
    size = h.shape[1]
    gates, weight = w.joint[: 2 * size], w.joint[2 * size :]
    r, update = F.linear(a.detach(), gates, None if w.bias is None else w.bias[: 2 * size]).sigmoid().chunk(2, 1)
    bias = None
    if w.input_bias is not None and w.hidden_bias is not None:
        bias = w.input_bias[2 * size :] + r * w.hidden_bias[2 * size :]
    map = Gated(inputs=w.inputs, reset=r)
    z = candidate(trace, a, map, weight, bias, map.forward(a.detach(), weight, bias))
    keep = 1 - update
    with trace:
        h = keep * torch.tanh(z) + update * h
    return (trace.current(h),)


def rnn_step(activation: Callable[[Tensor], Tensor]) -> Step:
    """Return the step of a plain RNN with an activation."""

    def step(trace: Trace, x: Tensor, state: State, w: Weights) -> State:
        with trace:
            a = torch.cat([x, state[0]], 1)
        z = F.linear(a.detach(), w.joint, w.bias)
        z = candidate(trace, a, FullyConnected(), w.joint, w.bias, z)
        with trace:
            return (activation(z),)

    return step


STEPS: dict[str, Step] = {
    "lstm": lstm_step,
    "gru": gru_step,
    "rnn_tanh": rnn_step(torch.tanh),
    "rnn_relu": rnn_step(torch.relu),
}


def unroll(trace: Trace, step: Step, xs: Sequence[Tensor], state: State, w: Weights) -> tuple[list[Tensor], State]:
    """Return the hidden state after each step, and the last state.

    The steps of a packed sequence have ever fewer samples (those of its reverse ever more): the state of a
    sample that has ended waits, that of one that hasn't begun is the initial one.
    """
    initial, outputs = state, []
    ended: list[State] = []
    state = resized(trace, state, 0, len(xs[0]))
    for x in xs:
        before, now = len(state[0]), len(x)
        if now < before:
            ended.append(resized(trace, state, now, before))
            state = resized(trace, state, 0, now)
        elif now > before:
            state = joined(trace, [state, resized(trace, initial, before, now)])
        state = step(trace, x, state, w)
        outputs.append(state[0])
    return outputs, joined(trace, [state, *reversed(ended)])


def resized(trace: Trace, state: State, start: int, stop: int) -> State:
    """Return the state of some of the samples."""
    if start == 0 and stop == len(state[0]):
        return state
    with trace:
        return tuple(t[start:stop] for t in state)


def joined(trace: Trace, states: Sequence[State]) -> State:
    """Return the state of some samples followed by that of others."""
    if len(states) == 1:
        return states[0]
    with trace:
        return tuple(torch.cat(parts) for parts in zip(*states, strict=True))


@handles("lstm gru rnn_tanh rnn_relu")
def recurrent(trace: Trace, func: Call, args: Any, kwargs: Any) -> tuple[Tensor, ...]:
    """Handle what `torch.nn.LSTM`, `GRU` and `RNN` call, for padded and for packed sequences."""

    def of_padded(
        input: Tensor,
        hx: Tensor | State,
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        return input, None, hx, params, has_biases, num_layers, dropout, train, bidirectional, int(batch_first)

    def of_packed(
        data: Tensor,
        batch_sizes: Tensor,
        hx: Tensor | State,
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
    ) -> Any:
        return data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional, 0

    name = func.__name__
    packed = "batch_sizes" in kwargs or (len(args) > 3 and not isinstance(args[3], bool))
    unpack = of_packed if packed else of_padded
    x, sizes, hx, params, has_biases, layers, dropout, train, bidirectional, time = unpack(*args, **kwargs)
    if train and dropout:
        trace.fail("active dropout")
    if carriers(params):
        trace.fail(f"{name} with weights that depend on the input")
    directions = 2 if bidirectional else 1
    of_one = len(params) // (layers * directions)
    with trace:
        xs = list(torch.unbind(x, time) if sizes is None else torch.split(x, sizes.tolist()))
        states = list(zip(*(torch.unbind(t) for t in ((hx,) if isinstance(hx, Tensor) else hx)), strict=True))
    last: list[State] = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            own = params[index * of_one :][:of_one]
            b_ih, b_hh = own[2:4] if has_biases else (None, None)
            w = weights_of(own[0], own[1], b_ih, b_hh, own[-1] if of_one % 2 else None)
            order = -1 if direction else 1
            hs, state = unroll(trace, STEPS[name], xs[::order], states[index], w)
            outputs.append(hs[::order])
            last.append(state)
        with trace:
            xs = outputs[0] if directions == 1 else [torch.cat(pair, 1) for pair in zip(*outputs, strict=True)]
    with trace:
        result = torch.stack(xs, time) if sizes is None else torch.cat(xs)
        return tuple(signal(t) for t in (result, *map(torch.stack, zip(*last, strict=True))))


@handles("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
def cell(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor | State:
    """Handle what `torch.nn.LSTMCell`, `GRUCell` and `RNNCell` call: one step."""

    def unpack(
        input: Tensor,
        hx: Tensor | State,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        return input, hx, (w_ih, w_hh, b_ih, b_hh)

    x, hx, parameters = unpack(*args, **kwargs)
    if carriers(parameters):
        trace.fail(f"{func.__name__} with weights that depend on the input")
    step = STEPS[func.__name__.removesuffix("_cell")]
    state = step(trace, x, (hx,) if isinstance(hx, Tensor) else tuple(hx), weights_of(*parameters))
    state = tuple(signal(t) for t in state)
    return state[0] if isinstance(hx, Tensor) else state


def signal(t: Tensor) -> Tensor:
    """Return a state as a signal: though tanh made it, it isn't a gate where the model multiplies with it."""
    record = record_of(t)
    if record is not None:
        record.gate = 0
    return t


@handles("_pack_padded_sequence _pad_packed_sequence")
def packing(trace: Trace, func: Call, args: Any, kwargs: Any) -> Any:
    """Handle the packing of sequences of different lengths: data is moved."""
    result = move(trace, func, args, kwargs)
    for t in carriers(result):
        known(t).nonnegative = False  # the padding may be negative
    return result
