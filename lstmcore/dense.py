"""What stands beside the recurrence: a dense layer, the loss of a softmax, the step of an optimizer.

They run on the kernels and threads of the recurrent layers. NumPy would need passes over memory where
one is enough, or a second pool of threads, which slows the kernels down.
"""

import numpy as np

from lstmcore import _kernels, checks
from lstmcore.checks import F32, F64
from lstmcore.functional import _threads


# ---- dense layer -------------------------------------------------------------------------------------

def linear_forward(x, W, b=None, *, n_threads=None, packed=None):
    """y = x Wᵀ + b on the project's own threads: x (n, I), W (O, I), b (O,) -> y (n, O).

    A matrix product of NumPy would use a second pool of threads, which slows the kernels down, and
    the bits of a row could depend on the other rows. packed: of pack("linear", W), for many calls.

    >>> import numpy as np
    >>> from lstmcore.dense import linear_forward
    >>> linear_forward(np.ones((2, 3)), np.ones((1, 3)), np.array([0.5]))
    array([[3.5],
           [3.5]])
    """
    x, W, dtype = _dense(x, W)
    b = checks.optional(b, "b", "(O,)", (len(W),), dtype)
    y = _kernels.empty((len(x), len(W)), dtype)
    if y.size:
        _kernels.run_linear_forward(x, W, b, y, _threads(n_threads, len(x), *W.shape), packed)
    return y


def linear_backward(x, W, dy, *, need_dx=True, n_threads=None):
    """dy (n, O) -> dx (n, I) or None, dW (O, I), db (O,).

    >>> import numpy as np
    >>> from lstmcore.dense import linear_backward
    >>> [d.shape for d in linear_backward(np.ones((2, 3)), np.ones((1, 3)), np.ones((2, 1)))]
    [(2, 3), (1, 3), (1,)]
    """
    x, W, dtype = _dense(x, W)
    dy = checks.array(dy, "dy", "(n, O)", (len(x), len(W)), dtype)
    dx = _kernels.empty(x.shape, dtype) if need_dx else None
    dW, db = _kernels.empty(W.shape, dtype), np.empty(len(W), dtype)
    if not dy.size:
        dW.fill(0), db.fill(0)
    else:
        _kernels.run_linear_backward(x, W, dy, dx, dW, db, _threads(n_threads, len(x), *W.shape))
    return dx, dW, db


def _dense(x, W):
    for name, value in (("x", x), ("W", W)):
        if not isinstance(value, np.ndarray) or value.ndim != 2:
            raise TypeError(f"{name} must be a 2-D NumPy array, got "
                            f"{getattr(value, 'shape', type(value).__qualname__)}")
    if x.dtype != F32 and x.dtype != F64:
        raise TypeError(f"x must be float32 or float64, got {x.dtype}")
    dtype = F64 if x.dtype == F64 else F32
    if W.shape[1] == 0:
        raise ValueError(f"W must be (O, I) with I >= 1, got {W.shape}")
    return (checks.array(x, "x", "(n, I)", (len(x), W.shape[1]), dtype),
            checks.array(W, "W", "(O, I)", W.shape, dtype), dtype)


# ---- a loss ------------------------------------------------------------------------------------------

def cross_entropy(logits, targets, weights, dlogits, *, n_threads=None):
    """Softmax cross-entropy of rows, in nats: logits (n, V), targets (n,) in 0..V-1 -> losses (n,).

    dlogits (n, V), which may be logits itself, becomes the gradient of Σ weights (n,) · losses; it is 0
    where the weight is, whatever the logits are. Arguments are trusted: see `softmax_cross_entropy`.

    >>> import numpy as np
    >>> from lstmcore.dense import cross_entropy
    >>> dlogits = np.empty((1, 4))
    >>> cross_entropy(np.zeros((1, 4)), np.array([2]), np.ones(1), dlogits).round(4), dlogits
    (array([1.3863]), array([[ 0.25,  0.25, -0.75,  0.25]]))
    """
    logits, targets = np.ascontiguousarray(logits), np.ascontiguousarray(targets, np.int64)
    losses = np.empty(len(logits), logits.dtype)
    if logits.size:
        weights = np.ascontiguousarray(weights, logits.dtype)
        n = _threads(n_threads, *logits.shape, 16)  # an exponential costs 16 multiply-adds
        _kernels.run_cross_entropy(logits, targets, weights, losses, dlogits, n)
    return losses


# ---- an optimizer ------------------------------------------------------------------------------------

def adam_step(p, g, m, v, *, betas, rate, eps, decay=0.0, keep=1.0, n_threads=None):
    """One step of Adam on the parameter p in place, by its gradient g; m and v are its averages.

    m += (1 - b1)(g' - m);  v += (1 - b2)(g'² - v);  p = keep · p - rate · m / (√v + eps),  where
    g' = g + decay · p. Arguments are trusted: see `optim.Adam`.

    >>> import numpy as np
    >>> from lstmcore.dense import adam_step
    >>> p, m, v = np.ones(1), np.zeros(1), np.zeros(1)
    >>> adam_step(p, np.ones(1), m, v, betas=(0.9, 0.75), rate=0.5, eps=0.0)
    >>> p, m, v
    (array([0.9]), array([0.1]), array([0.25]))
    """
    n = _threads(n_threads, p.size, 16, 1)  # root and quotient cost about 16 multiply-adds
    _kernels.run_adam(p, g, m, v, *betas, rate, eps, decay, keep, n)
