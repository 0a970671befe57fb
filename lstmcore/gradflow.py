"""The vanishing gradient, measured: how much of ∂L/∂h is left k steps back.

A loss at the last step sees step t-k only through what the recurrence lets through. In a vanilla
RNN every step multiplies the gradient by W_hhᵀ and by a slope of tanh, and it dies out (or
explodes) exponentially; in an LSTM the way through the cell multiplies it by the forget gate alone
(Hochreiter and Schmidhuber 1997), so the forget bias decides how far it reaches.

`gradient_flow` measures a layer of yours, `compare` the textbook cases, `plot` draws either.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from lstmcore import checks, layers, scalars
from lstmcore._types import ArrayLike, Floats, Init, Path

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def gradient_flow(layer: layers.LSTM | layers.GRU | layers.RNN, x: ArrayLike, *,
                  seed: int = 0) -> Floats:
    """The norm of ∂L/∂h_{t-k} for k = 0..T, where L = rᵀh_t, t is the last step and r of norm 1.

    Parameters
    ----------
    layer : LSTM, GRU or RNN in one direction, with any number of layers; it is not changed
    x : (T, B, I), or (B, T, I) for a batch_first layer, of the layer's dtype; or token ids
    seed : of the random direction r, one for every row

    Returns
    -------
    (T+1, L) float64: the mean over the batch, one column per layer. Row 0 is the loss's own
    gradient by the last layer, of norm 1; row T is the gradient by the initial state.

    >>> x = np.random.default_rng(1).standard_normal((50, 8, 3), dtype="float32")
    >>> flow = gradient_flow(layers.LSTM(3, 16, seed=0), x)
    >>> flow.shape, round(float(flow[0, 0]), 6)
    ((51, 1), 1.0)
    """
    if not isinstance(layer, (layers.LSTM, layers.GRU, layers.RNN)):
        raise TypeError(f"layer must be an LSTM, a GRU or an RNN, got {type(layer).__name__}")
    if layer.bidirectional:
        raise ValueError("layer must have one direction: where there are two, no step is the last")
    x = np.asarray(checks.unmasked("x", x))
    probe = copy.deepcopy(layer).train()
    probe.dropout, probe.batch_first = 0.0, False
    if layer.batch_first:
        x = x.swapaxes(0, 1)

    state, starts = None, []
    for t in range(len(x)):
        starts.append(state)
        _, state = probe(x[t:t + 1], state)
    gated = isinstance(probe, layers.LSTM)
    _, state = probe(x[:0], state)
    h, c = state if gated else (state, None)
    dh = np.zeros_like(h)
    r = np.random.default_rng(seed).standard_normal(dh.shape[1:])
    dh[-1] = r / np.linalg.norm(r, axis=1, keepdims=True)

    # Each step is run again from the state it started with, and passes the gradient one step back.
    dstate = (dh, np.zeros_like(c)) if gated else dh
    norms = np.empty((len(x) + 1, len(dh)))
    for k in range(len(x) + 1):
        dh = dstate[0] if gated else dstate
        norms[k] = np.linalg.norm(dh.astype(np.float64), axis=2).mean(axis=1)
        if k < len(x):
            t = len(x) - 1 - k
            probe(x[t:t + 1], starts[t])
            _, dstate = probe.backward(None, dstate)
    return norms


def compare(hidden_size: int = 64, steps: int = 100, *, forget_biases: Iterable[float] = (0, 1, 3),
            input_size: int = 16, batch_size: int = 32, init: Init = "uniform",
            seed: int = 0) -> dict[str, Floats]:
    """`gradient_flow` of a vanilla RNN and of LSTMs of the same sizes, by forget bias.

    The input is white noise, the weights are fresh ones (`init` as in `LSTM`) in float64.

    Returns
    -------
    dict: "RNN" and "LSTM, forget bias 0" ... -> (steps+1,) norms for k = 0..steps

    >>> flows = compare(hidden_size=16, steps=40)
    >>> bool(flows["RNN"][40] < 1e-6 < flows["LSTM, forget bias 3"][40])
    True
    """
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((scalars.size("steps", steps), batch_size, input_size))
    options = dict(init=init, dtype="float64", seed=seed)
    cases = {"RNN": layers.RNN(input_size, hidden_size, **options)}
    for bias in forget_biases:
        cases[f"LSTM, forget bias {bias:g}"] = layers.LSTM(
            input_size, hidden_size, forget_bias=bias, **options)
    return {name: gradient_flow(layer, x, seed=seed)[:, 0] for name, layer in cases.items()}


def plot(flows: Mapping[str, ArrayLike] | ArrayLike, path: Path | None = None, *,
         title: str = "How far back the gradient reaches") -> Figure:
    """Draw norms against k, one line per name; written to `path` if given (PNG, SVG, PDF).

    `flows` is what `compare` or `gradient_flow` returned: any dict of name -> (T+1,) norms, or norms
    (T+1,) or (T+1, L), a line for each layer. Zeros, of which a logarithmic axis has none, end a line.
    Returns the matplotlib figure.
    """
    if not isinstance(flows, Mapping):
        norms = np.asarray(checks.unmasked("flows", flows))
        if norms.ndim not in (1, 2):
            raise ValueError("flows must be a dict of norms, or norms (T+1,) or (T+1, L), got the shape "
                             f"{norms.shape}")
        flows = {"norm": norms} if norms.ndim == 1 else {f"l{n}": norms[:, n] for n in range(norms.shape[1])}
    for name, norms in flows.items():
        norms = np.asarray(checks.unmasked(f"flows[{name!r}]", norms))
        if norms.ndim != 1:
            raise ValueError(f"flows[{name!r}] must be norms (T+1,), got the shape {norms.shape}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("gradflow.plot needs matplotlib: pip install 'lstmcore[plot]'") from error
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    for name, norms in flows.items():
        style = dict(color="black", linestyle="--") if name == "RNN" else {}
        norms = np.asarray(norms, np.float64)
        axes.semilogy(np.where(norms > 0, norms, np.nan), label=name, linewidth=2, **style)
    axes.set(xlabel="k, steps back from the loss", ylabel="norm of ∂L/∂h(t-k)", title=title)
    axes.margins(x=0)
    axes.grid(alpha=0.3)
    axes.legend()
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
