"""The cells: `torch.nn.LSTMCell`, `GRUCell` and `RNNCell`, one step of a layer on its kernels."""

import torch

from lstmcore.torch.module import Kernels, check_state, converted
from lstmcore.torch.operators import layer


class _Cell(Kernels):
    """What the cells share, beside a class of PyTorch's."""

    _takes_c = False

    def _compute(self, input, hx):
        name, n = self._theirs.__name__, input.dim()
        if n not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {n}D instead")
        states = () if hx is None else hx if self._takes_c else (hx,)
        for k, state in enumerate(states):
            if state.dim() not in (1, 2):
                what = f"hx[{k}]" if self._takes_c else "hidden"
                raise ValueError(f"{name}: Expected {what} to be 1D or 2D, got {state.dim()}D "
                                 "instead")
        W_ih, W_hh = self.weight_ih, self.weight_hh
        if not self.input_size or not self.hidden_size:     # the kernels have at least one of each
            return self._theirs.forward(self, input, hx)
        self._check_kind(input, W_hh)
        self._check_shapes(input, states)
        check_state(input, states)
        compute, y_dtype, c_dtype = self._formats(W_hh, states[-1] if states else input, False)
        lead = (None,) * (3 - n)    # x (1,B,I), states (1,B,H)
        h0, c0 = (*(state[lead] for state in states), None, None)[:2]
        y, _, c = layer(input[lead], W_ih, W_hh, self.bias_ih, self.bias_hh, h0, c0, None, None,
                        None, False, self._cell, compute, self._frozen and self._frozen[0])
        first = (0,) * (3 - n)
        h = converted(y[first], y_dtype)
        return (h, converted(c[first], c_dtype)) if self._takes_c else h

    def _check_shapes(self, input, states):
        if torch.jit.is_tracing():
            return
        rows, H = input.shape[:-1], self.hidden_size
        if input.shape[-1] != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {input.shape[-1]}, expected "
                               f"{self.input_size}")
        for name, state in zip("hc", states):
            if state.shape != (*rows, H):
                raise RuntimeError(f"{name} must be {(*rows, H)} beside an input of "
                                   f"{tuple(input.shape)}, got {tuple(state.shape)}")


class LSTMCell(_Cell, torch.nn.LSTMCell):
    """`torch.nn.LSTMCell` on lstmcore's kernels; all else as `LSTM`.

    A call packs the weights, with gradients or without: where many steps follow one another, a
    layer does it once for all of them, and `freeze` once for all calls without gradients.

    >>> import torch, lstmcore.torch
    >>> cell = lstmcore.torch.LSTMCell(input_size=3, hidden_size=5)
    >>> h, c = cell(torch.zeros(4, 3))
    >>> h, c = cell(torch.zeros(4, 3), (h, c))
    >>> h.shape, c.shape
    (torch.Size([4, 5]), torch.Size([4, 5]))
    """

    _theirs, _cell, _takes_c = torch.nn.LSTMCell, "lstm", True


class GRUCell(_Cell, torch.nn.GRUCell):
    """`torch.nn.GRUCell` on lstmcore's kernels, as `LSTMCell`.

    >>> import torch, lstmcore.torch
    >>> lstmcore.torch.GRUCell(input_size=3, hidden_size=5)(torch.zeros(4, 3)).shape
    torch.Size([4, 5])
    """

    _theirs, _cell = torch.nn.GRUCell, "gru"


class RNNCell(_Cell, torch.nn.RNNCell):
    """`torch.nn.RNNCell` on lstmcore's kernels, nonlinearity "tanh" or "relu", as `LSTMCell`.

    >>> import torch, lstmcore.torch
    >>> m = lstmcore.torch.RNNCell(input_size=3, hidden_size=5, nonlinearity="relu")
    >>> m(torch.zeros(4, 3)).shape
    torch.Size([4, 5])
    """

    _theirs = torch.nn.RNNCell

    @property
    def _cell(self):
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity!r}, expected 'tanh' or "
                               "'relu'")
        return self.nonlinearity
