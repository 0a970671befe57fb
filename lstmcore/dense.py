"""What stands beside the recurrence: a dense layer, the loss of a softmax, the step of an optimizer.

They run on the kernels and threads of the recurrent layers. NumPy would need passes over memory where
one is enough, or a second pool of threads, which slows the kernels down.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lstmcore import _dense, _kernels, _products, arguments, checks, scalars
from lstmcore._memory import empty
from lstmcore._types import ArrayLike, Compute, Floats
from lstmcore.precision import format_of_call


class LinearGradients(NamedTuple):
    """Of a dense layer, shaped as what they belong to; None where not needed: dx, db of no bias."""

    dx: Floats | None
    dW: Floats
    db: Floats | None


# ---- dense layer -------------------------------------------------------------------------------------

def linear_forward(x: Floats, W: Floats, b: Floats | None = None, *, n_threads: int | None = None,
                   packed: _products.Packed | None = None,
                   compute: Compute | None = None) -> Floats:
    """y = x Wᵀ + b on the project's own threads: x (n, I), W (O, I), b (O,) -> y (n, O).

    A matrix product of NumPy would use a second pool of threads, which slows the kernels down, and
    the bits of a row could depend on the other rows. packed: of pack("linear", W), for many calls.
    compute: as in `lstm_forward`.

    >>> import numpy as np
    >>> from lstmcore.dense import linear_forward
    >>> linear_forward(np.ones((2, 3)), np.ones((1, 3)), np.array([0.5]))
    array([[3.5],
           [3.5]])
    """
    x, W, b, dtype = _layer(x, W, b, packed)
    y, n_threads = empty((len(x), len(W)), dtype), arguments.threads_for(n_threads, len(x), *W.shape)
    if y.size:
        _dense.run_forward(x, W, b, y, n_threads=n_threads, packed=packed,
                           format=format_of_call(compute, dtype, packed))
    return y


def linear_backward(x: Floats, W: Floats, dy: Floats, *, need_dx: bool = True,
                    into: tuple[Floats, Floats | None] | None = None,
                    n_threads: int | None = None, compute: Compute | None = None) -> LinearGradients:
    """dy (n, O) -> dx (n, I) or None, dW (O, I), db (O,). compute: as in `lstm_forward`.

    into: (dW, db) to add to, db or None; they are those that come back.

    >>> import numpy as np
    >>> from lstmcore.dense import linear_backward
    >>> [d.shape for d in linear_backward(np.ones((2, 3)), np.ones((1, 3)), np.ones((2, 1)))]
    [(2, 3), (1, 3), (1,)]
    """
    x, W, dtype = _matrices(x, W)
    dy = checks.array(dy, "dy", "(n, O)", (len(x), len(W)), dtype)
    g, n_threads = _room(x, W, need_dx, into, dy), arguments.threads_for(n_threads, len(x), *W.shape)
    if dy.size:
        _dense.run_backward(x, W, dy, g, add=into is not None, n_threads=n_threads,
                            format=format_of_call(compute, dtype))
    else:
        _clear(g, into)
    return g


def _room(x, W, need_dx, into, *inputs):
    dx = empty(x.shape, x.dtype) if need_dx else None
    if into is None:
        return LinearGradients(dx, empty(W.shape, x.dtype), np.empty(len(W), x.dtype))
    dW, db = into
    checks.out("dW", dW, W.shape, x.dtype, x, W, db, *inputs)
    if db is not None:
        checks.out("db", db, (len(W),), x.dtype, x, W, *inputs)
    return LinearGradients(dx, dW, db)


def _clear(g, into):
    for d in g[:3 if into is None else 1]:      # nothing is added to those of the caller
        if d is not None:
            d.fill(0)


def _layer(x, W, b, packed):
    """x, W, b and the dtype of all, with `packed` found to be of W."""
    if packed is not None:
        arguments.found_packed(packed, "linear", (W, None, None))
    x, W, dtype = _matrices(x, W, packed is not None and packed.format == "int8")
    return x, W, checks.optional(b, "b", "(O,)", (len(W),), dtype), dtype


def _matrices(x, W, lowered=False):
    """x and W, and their dtype. A lowered W is read as it was packed: it stays where it lies."""
    for name, value in (("x", x), ("W", W)):
        if not isinstance(value, np.ndarray) or value.ndim != 2:
            raise TypeError(f"{name} must be a 2-D NumPy array, got "
                            f"{getattr(value, 'shape', type(value).__qualname__)}")
    x = checks.floats("x", x)
    dtype = scalars.float_dtype(x.dtype)
    if W.shape[1] == 0:
        raise ValueError(f"W must be (O, I) with I >= 1, got {W.shape}")
    return (checks.array(x, "x", "(n, I)", (len(x), W.shape[1]), dtype),
            (arguments.found if lowered else checks.array)(W, "W", "(O, I)", W.shape, dtype), dtype)


# ---- a loss ------------------------------------------------------------------------------------------

def cross_entropy(logits: Floats, targets: ArrayLike, weights: Floats, dlogits: Floats, *,
                  n_threads: int | None = None) -> Floats:
    """Softmax cross-entropy of rows, in nats: logits (n, V), targets (n,) in 0..V-1 -> losses (n,).

    dlogits (n, V), which may be logits itself, becomes the gradient of Σ weights (n,) · losses; it is 0
    where the weight is, whatever the logits are.

    >>> import numpy as np
    >>> from lstmcore.dense import cross_entropy
    >>> dlogits = np.empty((1, 4))
    >>> cross_entropy(np.zeros((1, 4)), np.array([2]), np.ones(1), dlogits).round(4), dlogits
    (array([1.3863]), array([[ 0.25,  0.25, -0.75,  0.25]]))
    """
    logits = checks.floats("logits", logits)
    if logits.ndim != 2:
        raise ValueError(f"logits must be (n, V), got {logits.shape}")
    n, V = logits.shape
    dtype = scalars.float_dtype(logits.dtype)
    weights = checks.array(weights, "weights", "(n,)", (n,), dtype)
    checks.out("dlogits", dlogits, (n, V), dtype, weights, targets, over=logits)
    logits = checks.array(logits, "logits", "(n, V)", (n, V), dtype)
    targets = checks.ids(targets, "targets", V, (n,))
    losses = np.empty(n, dtype)
    n_threads = arguments.threads_for(n_threads, n, V, 16)   # an exponential costs 16 multiply-adds
    if logits.size:
        _dense.run_cross_entropy(logits, targets, weights, (losses, dlogits), n_threads=n_threads)
    return losses


def linear_cross_entropy(x: Floats, W: Floats, b: Floats | None, targets: ArrayLike, weights: Floats, *,
                         gradients: bool = True, into: tuple[Floats, Floats | None] | None = None,
                         n_threads: int | None = None, packed: _products.Packed | None = None,
                         compute: Compute | None = None) -> tuple[Floats, LinearGradients | None]:
    """The losses (n,) of `cross_entropy` for the logits x Wᵀ + b, and the `LinearGradients`, or None.

    What linear_forward, cross_entropy and linear_backward return, bit for bit, from one call. The
    logits are not stored whole: only a block of 256 rows (with more than 4 threads, of more) at a
    time. Without gradients, up to 32 MB of them are one block.
    into: as in linear_backward. packed, compute: as in linear_forward; packed as int8, it has no
    gradients.

    >>> import numpy as np
    >>> from lstmcore.dense import linear_cross_entropy
    >>> losses, g = linear_cross_entropy(np.ones((1, 3)), np.zeros((4, 3)), None, np.array([2]),
    ...                                  np.ones(1))
    >>> losses.round(4), g.db
    (array([1.3863]), array([ 0.25,  0.25, -0.75,  0.25]))
    """
    x, W, b, dtype = _layer(x, W, b, packed)
    n, O = len(x), len(W)
    if not O:
        raise ValueError(f"W must be (O, I) with O >= 1, got {W.shape}")
    weights = checks.array(weights, "weights", "(n,)", (n,), dtype)
    targets = checks.ids(targets, "targets", O, (n,))
    losses = np.empty(n, dtype)
    format = format_of_call(compute, dtype, packed)
    if format == "int8" and gradients:
        raise ValueError("weights packed as int8 are for inference: gradients must be False")
    g = _room(x, W, True, into, b, weights) if gradients else None
    n_threads = arguments.threads_for(n_threads, n, *W.shape)
    if n:
        _dense.run_head(x, W, b, targets, weights, losses, g, add=into is not None, packed=packed,
                        format=format, n_threads=n_threads)
    elif gradients:
        _clear(g, into)
    return losses, g


# ---- an optimizer ------------------------------------------------------------------------------------

def adam_step(p: Floats, g: Floats, m: Floats, v: Floats, *, betas: tuple[float, float],
              rate: float, eps: float, decay: float = 0.0, keep: float = 1.0,
              n_threads: int | None = None) -> None:
    """One step of Adam on the parameter p in place, by its gradient g; m and v are its averages.

    m += (1 - b1)(g' - m);  v += (1 - b2)(g'² - v);  p = keep · p - rate · m / (√v + eps),  where
    g' = g + decay · p. All are C-contiguous arrays of one shape and dtype, apart from one another.

    >>> import numpy as np
    >>> from lstmcore.dense import adam_step
    >>> p, m, v = np.ones(1), np.zeros(1), np.zeros(1)
    >>> adam_step(p, np.ones(1), m, v, betas=(0.9, 0.75), rate=0.5, eps=0.0)
    >>> p, m, v
    (array([0.9]), array([0.1]), array([0.25]))
    """
    if not _kernels.fit_to_update((p, m, v), (g,)):
        dtype = scalars.float_dtype(checks.floats("p", p).dtype)
        g = checks.array(g, "g", "as p", np.shape(p), dtype)
        for name, a, others in ("p", p, (g, m, v)), ("m", m, (g, v)), ("v", v, (g,)):
            checks.out(name, a, g.shape, dtype, *others)
    rule = dict(b1=betas[0], b2=betas[1], rate=rate, eps=eps, decay=decay, keep=keep)
    # root and quotient cost about 16 multiply-adds
    _dense.run_adam(p, g, m, v, rule, n_threads=arguments.threads_for(n_threads, p.size, 16, 1))
