"""Stack: recurrent layers in a row that one LSTM, GRU or RNN cannot express, as files hold them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lstmcore import checks
from lstmcore._types import Array, Floats, Lengths
from lstmcore.module import Module


class Stack(Module):
    """LSTM, GRU and RNN layers in a row: of different widths or kinds, or read from the end.

    Parameters
    ----------
    layers : list of LSTM, GRU or RNN, time-major, each as wide as the output of the one before
    reverse : list of bool: this layer reads each sequence from its own end to its start, and its
        y is in the order of x all the same; none by default
    batch_first : x and y are (B, T, ·); states never are
    initial : one initial state per layer (None: zeros), used when a call gives no state; of one
        sequence, (·, 1, ·), it is every sequence's
    last_step : y is not (T, B, W) but (B, W), the last output of each sequence; of a bidirectional
        layer the last output of each direction, which the second one gives at step 0

    Parameters by name: `layers.0.weight_ih_l0` and so on.

    >>> from lstmcore import LSTM
    >>> m = Stack([LSTM(3, 8, seed=0), LSTM(8, 5, seed=1)], reverse=[False, True])
    >>> y, (state0, state1) = m(np.zeros((7, 4, 3), "float32"))
    >>> y.shape, state1[0].shape
    ((7, 4, 5), (1, 4, 5))
    """

    _says = "batch_first", "reverse", "last_step"

    def __init__(self, layers: Sequence[Any], reverse: Sequence[bool] | None = None,
                 batch_first: bool = False, initial: Sequence[Any] | None = None,
                 last_step: bool = False) -> None:
        self.layers, self.batch_first = list(layers), bool(batch_first)
        self.last_step = bool(last_step)
        if not self.layers:
            raise ValueError("a Stack needs at least one layer")
        self.reverse = [bool(r) for r in _one_each("reverse", reverse, False, self.layers)]
        self.initial = _one_each("initial", initial, None, self.layers)
        for n, layer in enumerate(self.layers):
            if layer.batch_first:
                raise ValueError(f"layers[{n}] must be time-major; give batch_first to the Stack")
            before = self.layers[n - 1]
            width = before._widths[0] * before.directions
            if n and (layer.input_size, layer.dtype) != (width, before.dtype):
                raise ValueError(f"layers[{n}] must take {width} {before.dtype} inputs from the "
                                 f"layer before it, it takes {layer.input_size} {layer.dtype}")

    def __call__(self, x: Array, state: Sequence[Any] | None = None,
                 lengths: Lengths = None) -> tuple[Floats, list[Any]]:
        """x (T,B,I), or (B,T,I) with batch_first -> y, and the list of the layers' final states.

        lengths : (B,) ints in 0..T. With last_step, the y of a sequence of length 0 is its initial
            state h.
        """
        y, final = self._outside(np.asarray(checks.unmasked("x", x))), []
        if lengths is not None and y.ndim > 1:
            lengths = checks.lengths(lengths, *y.shape[:2])
        states = _one_each("state", state, None, self.layers)
        for layer, reverse, given, initial in zip(self.layers, self.reverse, states, self.initial):
            given = _for_each(initial, y) if given is None else given
            y, last = layer(_flip(y, lengths, reverse), given, lengths)
            y = _flip(y, lengths, reverse)
            final.append(last)
        y = self._last_output(last) if self.last_step else self._outside(y)
        self._keep(y, lengths)
        return y, final

    def backward(self, dy: Floats | None = None,
                 dstate: Sequence[Any] | None = None) -> tuple[Floats, list[Any]]:
        """Gradients by y and by the final states, None for zeros -> dx, and by initial states."""
        dy, lengths = self._take(dy)
        dstates, dinitial = _one_each("dstate", dstate, None, self.layers), []
        if self.last_step:
            dstates[-1], dy = self._with_last_output(dstates[-1], dy), None
        else:
            dy = self._outside(dy)
        for layer, reverse, dlast in reversed(list(zip(self.layers, self.reverse, dstates))):
            dy = None if dy is None else _flip(dy, lengths, reverse)
            dy, dfirst = layer.backward(dy, dlast)
            dy = None if dy is None else _flip(dy, lengths, reverse)
            dinitial.append(dfirst)
        return None if dy is None else self._outside(dy), dinitial[::-1]

    def describe(self) -> dict[str, Any]:
        """What the parameters do not say; ValueError with fixed initial states."""
        if any(state is not None for state in self.initial):
            raise ValueError("a Stack with fixed initial states cannot be saved: set its initial "
                             "to [None, ...] and give the states to every call")
        return {**super().describe(), "layers": [layer.describe() for layer in self.layers]}

    def _last_output(self, state):
        """The last output (B, D·P) of the last layer: its h in the final state, (L·D, B, P)."""
        layer = self.layers[-1]
        h = state[0] if isinstance(state, tuple) else state
        return np.concatenate(h[-layer.directions:], axis=1)

    def _with_last_output(self, dlast, dy):
        """The gradient by the last layer's final state, that by its last output added to h's."""
        layer = self.layers[-1]
        parts = [[np.zeros((len(dy), width), dy.dtype) if part is None else part
                  for part, width in zip(state, layer._widths)]
                 for state in layer._split(dlast, len(dy), "dstate")]
        halves = np.split(dy, layer.directions, axis=1)
        for state, half in zip(parts[-layer.directions:], halves):
            state[0] = state[0] + half
        return layer._join(parts)

    def _outside(self, a):
        return a.swapaxes(0, 1) if self.batch_first else a

    def __repr__(self) -> str:
        said = [repr(self.layers)]
        if any(self.reverse):
            said.append(f"reverse={self.reverse}")
        if self.batch_first:
            said.append("batch_first=True")
        if any(state is not None for state in self.initial):
            said.append("initial=...")
        if self.last_step:
            said.append("last_step=True")
        return f"Stack({', '.join(said)})"


def _one_each(name, values, default, layers):
    values = [default] * len(layers) if values is None else list(values)
    if len(values) != len(layers):
        raise ValueError(f"{name} must have one entry for each of {len(layers)} layers, "
                         f"got {len(values)}")
    return values


def _for_each(state, x):
    """A fixed state, that of one sequence for each of x (T, B, I)."""
    if state is None or x.ndim != 3:
        return state
    parts = [np.repeat(part, x.shape[1], axis=1) if part.shape[1] == 1 else part
             for part in (state if isinstance(state, tuple) else (state,))]
    return tuple(parts) if isinstance(state, tuple) else parts[0]


def _flip(a, lengths, wanted):
    """a (T, B, ...) with the steps of every sequence in the opposite order; its own inverse."""
    if not wanted:
        return a
    if lengths is None:
        return np.ascontiguousarray(a[::-1])
    t = np.arange(len(a))[:, None]
    return a[np.where(t < lengths, lengths - 1 - t, t), np.arange(a.shape[1])]
