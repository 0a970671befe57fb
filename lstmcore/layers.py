"""The layers around the recurrent ones: Embedding, Linear, Dropout, activations, pooling over time.

`LSTM`, `GRU` and `RNN` live in lstmcore/recurrent.py and are named here too, so that one place has
every layer. Sizes: T steps, B batch, V vocabulary, W width of whatever comes in.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lstmcore import checks, dense, functional, renames, scalars
from lstmcore._types import Array, ArrayLike, Bools, Compute, Dtype, Floats, Lengths, Seed
from lstmcore.module import Module, dropout_mask, products
from lstmcore.precision import Quantized
from lstmcore.recurrent import GRU, LSTM, RNN, GRUTrace, LSTMTrace, RNNTrace
from lstmcore.stack import Stack
from lstmcore.streams import Stream

__all__ = ["Module", "LSTM", "GRU", "RNN", "LSTMTrace", "GRUTrace", "RNNTrace", "Stream", "Stack",
           "Embedding", "Linear", "Dropout", "Tanh", "Sigmoid", "ReLU", "Sequential", "LastStep",
           "MeanOverTime", "MaxOverTime", "sequence_mask", "sigmoid"]


@renames.checked
class Embedding(Module):
    """A table with a row of E numbers for each of V tokens: tokens (...) ints -> (..., E).

    Parameters: weight (V, E), drawn from N(0, 1). Frozen in int8 it holds, and gives, rows that are
    rounded to int8 numbers and a float32 scale each: see `Module.freeze`.

    >>> Embedding(10, 4, seed=0)(np.array([[1, 2, 3]])).shape
    (1, 3, 4)
    """

    def __init__(self, vocab_size: int, embed_size: int, *, dtype: Dtype = "float32",
                 seed: Seed = None) -> None:
        self.vocab_size = scalars.size("vocab_size", vocab_size)
        self.embed_size = scalars.size("embed_size", embed_size)
        self.dtype = scalars.float_dtype(dtype)
        rng, shape = np.random.default_rng(seed), (vocab_size, embed_size)
        self._declare("weight", shape, lambda: rng.standard_normal(shape))

    def __call__(self, tokens: ArrayLike) -> Floats:
        """Token ids in 0..V-1, in any shape -> their rows."""
        tokens = checks.ids(tokens, "tokens", self.vocab_size)
        y = self._rows(tokens)
        self._keep(y, tokens)
        return y

    def _rows(self, at=slice(None)):
        """The rows that calls give, of some tokens or of all: (..., E)."""
        if self._frozen_in == "int8":
            return Quantized(*(a[at] for a in self._quantized["weight"])).floats()
        return self._own["weight"][0][at]

    def backward(self, dy: Floats) -> None:
        """Adds dy (..., E) to the gradients of the tokens' rows. Tokens have none: returns None."""
        dy, tokens = self._take(dy)
        # SciPy trusts the tokens to be rows of the table, also of one that was resized.
        table = checks.out("the gradient of weight", self._own["weight"][1],
                           (self.vocab_size, self.embed_size), self.dtype)
        _add_rows(table, tokens.ravel(), dy.reshape(-1, self.embed_size))


def _add_rows(table, rows, values):
    """table[rows[n]] += values[n] for rows that repeat: np.add.at, 3 to 10 times as fast."""
    from scipy.sparse import csr_matrix     # 0.15 s of import that only training a table needs

    N, V, used = len(rows), len(table), slice(None)
    if V > N:                               # most rows are not meant: leave them alone
        used, rows = np.unique(rows, return_inverse=True)
        V = len(used)
    picks = csr_matrix((np.ones(N, table.dtype), rows.ravel(), np.arange(N + 1)), (N, V))
    table[used] += picks.T @ values


class Linear(Module):
    """y = x Wᵀ + b on the last axis: x (..., I) -> (..., O).

    Parameters: weight (O, I) and bias (O,), drawn from U(-1/√I, 1/√I) as in PyTorch. compute: the
    number format of the products, as of an `LSTM`.

    >>> Linear(8, 3, seed=0)(np.zeros((5, 2, 8), "float32")).shape
    (5, 2, 3)
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True,
                 dtype: Dtype = "float32", compute: Compute | None = None,
                 seed: Seed = None) -> None:
        self.in_features = scalars.size("in_features", in_features)
        self.out_features = scalars.size("out_features", out_features)
        self.bias, self.dtype = bool(bias), scalars.float_dtype(dtype)
        self.compute = products(compute, self.dtype)
        self.n_threads: int | None = None           # handed on to lstmcore.functional
        rng, bound = np.random.default_rng(seed), in_features**-0.5
        shapes = {"weight": (out_features, in_features), "bias": (out_features,)}
        for name in ("weight", "bias")[:1 + self.bias]:
            self._declare(name, shapes[name],
                          lambda name=name: rng.uniform(-bound, bound, shapes[name]))

    def _fix(self, format):
        super()._fix(format)
        quantized = self._quantized.get("weight"), None, None
        self._packed = functional.pack("linear", self._own["weight"][0], precision=format,
                                       quantized=quantized) if format else None

    def __call__(self, x: Floats) -> Floats:
        """x (..., I) of the layer's dtype -> y (..., O)."""
        x = self._check(x)
        y = dense.linear_forward(x.reshape(-1, self.in_features), self._own["weight"][0],
                                 self._own["bias"][0] if self.bias else None,
                                 n_threads=self.n_threads, packed=self._packed,
                                 compute=None if self._packed else self.compute)
        y = y.reshape(*x.shape[:-1], self.out_features)
        self._keep(y, x)
        return y

    def backward(self, dy: Floats) -> Floats:
        """dy (..., O) -> dx (..., I); adds to the gradients of weight and bias."""
        dy, x = self._take(dy)
        dx = dense.linear_backward(x.reshape(-1, self.in_features), self._own["weight"][0],
                                   dy.reshape(-1, self.out_features), into=self._gradients(),
                                   n_threads=self.n_threads, compute=self.compute).dx
        return dx.reshape(*dy.shape[:-1], self.in_features)

    def _check(self, x: Floats) -> Floats:
        x = checks.floats("x", x, self.dtype)
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"x must be (..., {self.in_features}), got {x.shape}")
        return x

    def _cross_entropy(self, x: Floats, targets: ArrayLike,
                       weights: Floats) -> tuple[Floats, Floats | None]:
        """`dense.cross_entropy` of y for x (n, I), and dx; None in inference mode.

        In training mode it adds to the gradients, as a call and its backward would.
        """
        losses, g = dense.linear_cross_entropy(
            x, self._own["weight"][0], self._own["bias"][0] if self.bias else None, targets, weights,
            gradients=self.training, into=self._gradients() if self.training else None,
            n_threads=self.n_threads, packed=self._packed,
            compute=None if self._packed else self.compute)
        return losses, g and g.dx

    def _gradients(self):
        return self._own["weight"][1], self._own["bias"][1] if self.bias else None


class Dropout(Module):
    """In training, each number is zero with probability p, and the others are scaled by 1/(1-p).

    >>> Dropout(0.5).eval()(np.ones(3))
    array([1., 1., 1.])
    """

    _says = ("p",)

    def __init__(self, p: float = 0.5, *, seed: Seed = None) -> None:
        self.p = scalars.probability("p", p)
        self.rng = np.random.default_rng(seed)

    def __call__(self, x: Floats) -> Floats:
        """x of any shape -> the same shape."""
        x = checks.floats("x", x)
        if not self.training:
            return np.array(x)
        mask = dropout_mask(self.rng, self.p, x.shape, x.dtype)
        y = x * mask
        self._keep(y, mask)
        return y

    def backward(self, dy: Floats) -> Floats:
        """dy -> dx, dropped and scaled as x was."""
        dy, mask = self._take(dy)
        return dy * mask


class _Pointwise(Module):
    """A function of each number by itself, whose slope is known from its value y."""

    def __call__(self, x: Floats) -> Floats:
        """x of any shape -> the same shape."""
        y = self._value(checks.floats("x", x))
        self._keep(y, y)
        return y

    def backward(self, dy: Floats) -> Floats:
        """dy -> dx."""
        dy, y = self._take(dy)
        return dy * self._slope(y)


class Tanh(_Pointwise):
    """y = tanh(x)."""

    _value = staticmethod(np.tanh)

    def _slope(self, y):
        return 1 - y * y


class Sigmoid(_Pointwise):
    """y = 1 / (1 + e^-x)."""

    def _value(self, x):
        return sigmoid(x)

    def _slope(self, y):
        return y * (1 - y)


class ReLU(_Pointwise):
    """y = max(x, 0)."""

    def _value(self, x):
        return np.maximum(x, 0)

    def _slope(self, y):
        return y > 0


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + e^-x), accurate and free of overflow on both sides."""
    e = np.exp(-np.abs(checks.unmasked("x", x)))
    return np.where(x >= 0, 1, e) / (1 + e)


class Sequential(Module):
    """Layers of one input and one output, one after the other: a plain feed-forward net.

    Parameters are named `0.weight`, `0.bias`, ... by position, as in PyTorch.

    >>> net = Sequential(Linear(64, 32, seed=0), Tanh(), Linear(32, 10, seed=1))
    >>> net(np.zeros((5, 64), "float32")).shape
    (5, 10)
    """

    def __init__(self, *layers: Module) -> None:
        self.layers: list[Any] = list(layers)

    def __call__(self, x: Array) -> Floats:
        """The input of the first layer -> the output of the last."""
        for layer in self.layers:
            x = layer(x)
        return x

    def backward(self, dy: Floats) -> Floats:
        """The gradient by the output -> by the input, through every layer."""
        for layer in reversed(self.layers):
            dy = layer.backward(dy)
        return dy

    def _children(self):
        return ((str(n), layer) for n, layer in enumerate(self.layers))

    def describe(self) -> dict[str, Any]:
        """What the parameters do not say: the layers, each by its own description."""
        return {**super().describe(), "layers": [layer.describe() for layer in self.layers]}

    def __repr__(self) -> str:
        return f"Sequential({', '.join(map(repr, self.layers))})"


class _Pool(Module):
    """From a vector per step to a vector per sequence, over the steps that are really there.

    A sequence of length 0 gives zeros.
    """

    _says = ("batch_first",)

    def __init__(self, *, batch_first: bool = False) -> None:
        self.batch_first = bool(batch_first)

    def __call__(self, y: Floats, lengths: Lengths = None) -> Floats:
        """y (T, B, W), or (B, T, W) with batch_first, and lengths (B,) in 0..T -> (B, W)."""
        y = checks.floats("y", y)
        if y.ndim != 3:
            axes = "(B, T, W)" if self.batch_first else "(T, B, W)"
            raise ValueError(f"y must be {axes}, got {y.shape}")
        steps = y.swapaxes(0, 1) if self.batch_first else y
        T, B, _ = steps.shape
        lengths = np.full(B, T) if lengths is None else checks.lengths(lengths, T, B)
        pooled, tape = self._pool(steps, lengths)
        self._keep(pooled, steps.shape, lengths, tape)
        return pooled

    def backward(self, dpooled: Floats) -> Floats:
        """dpooled (B, W) -> dy, as y was; 0 past the end of each sequence."""
        dpooled, shape, lengths, tape = self._take(dpooled, "dpooled")
        dy = self._spread(dpooled, shape, lengths, tape)
        return dy.swapaxes(0, 1) if self.batch_first else dy


class LastStep(_Pool):
    """The y of each sequence's own last step.

    bidirectional: y holds two directions, and the second has read the whole sequence at step 0.

    >>> y = np.arange(6.0).reshape(3, 2, 1)
    >>> LastStep()(y, lengths=[3, 1])
    array([[4.],
           [1.]])
    """

    _says = "batch_first", "bidirectional"

    def __init__(self, *, bidirectional: bool = False, batch_first: bool = False) -> None:
        super().__init__(batch_first=batch_first)
        self.bidirectional = bool(bidirectional)

    def _pool(self, y, lengths):
        pooled = np.zeros(y.shape[1:], y.dtype)
        for picked, at in self._picks(lengths, y.shape[2]):
            pooled[picked] = y[at]
        return pooled, None

    def _spread(self, dpooled, shape, lengths, _):
        dy = np.zeros(shape, dpooled.dtype)
        for picked, at in self._picks(lengths, shape[2]):
            dy[at] = dpooled[picked]
        return dy

    def _picks(self, lengths, W):
        """(index into pooled, index into y) of each direction."""
        b = np.flatnonzero(lengths)
        half = slice(0, W // 2 if self.bidirectional else W)
        yield (b, half), (lengths[b] - 1, b, half)
        if self.bidirectional:
            half = slice(W // 2, W)
            yield (b, half), (0, b, half)


class MeanOverTime(_Pool):
    """The mean of y over each sequence's own steps.

    >>> y = np.arange(6.0).reshape(3, 2, 1)
    >>> MeanOverTime()(y, lengths=[3, 1])
    array([[2.],
           [1.]])
    """

    def _pool(self, y, lengths):
        share = self._share(lengths, y.dtype)
        return np.where(_mask(lengths, len(y)), y, 0).sum(axis=0) * share, None

    def _spread(self, dpooled, shape, lengths, _):
        share = self._share(lengths, dpooled.dtype)
        return np.where(_mask(lengths, shape[0]), dpooled * share, 0)

    def _share(self, lengths, dtype):
        return (1 / np.maximum(lengths, 1)).astype(dtype)[:, None]


class MaxOverTime(_Pool):
    """The maximum of y, number by number, over each sequence's own steps; the first on a tie.

    >>> y = np.arange(6.0).reshape(3, 2, 1)
    >>> MaxOverTime()(y, lengths=[3, 1])
    array([[4.],
           [1.]])
    """

    def _pool(self, y, lengths):
        if not len(y):
            return np.zeros(y.shape[1:], y.dtype), None
        at = np.where(_mask(lengths, len(y)), y, -np.inf).argmax(axis=0)[None]
        return np.where(lengths[:, None] > 0, np.take_along_axis(y, at, axis=0)[0], 0), at

    def _spread(self, dpooled, shape, lengths, at):
        dy = np.zeros(shape, dpooled.dtype)
        if at is not None:
            there = np.where(lengths[:, None] > 0, dpooled, 0)
            np.put_along_axis(dy, at, there[None], axis=0)
        return dy


def sequence_mask(lengths: ArrayLike, T: int) -> Bools:
    """Which steps are really there: (B,) ints in 0..T -> (T, B) bool.

    >>> sequence_mask([2, 0, 1], 3).astype(int)
    array([[1, 0, 1],
           [1, 0, 0],
           [0, 0, 0]])
    """
    return _mask(checks.lengths(lengths, scalars.size("T", T, 0), np.size(lengths)), T)[:, :, 0]


def _mask(lengths, T):
    return (np.arange(T)[:, None] < lengths)[:, :, None]
