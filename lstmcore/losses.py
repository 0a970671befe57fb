"""Losses: each returns the loss and its gradient by the first argument, in one call.

What counts, and how much, is said by a mask; what becomes of the single losses, by `reduction`:
"mean" (over what counts, weighted by the mask; 0 if nothing does), "sum", or "none" (an array of
losses; the gradient is then that of their sum). Sums are formed in float64.
"""

import numpy as np

from lstmcore.layers import sigmoid
from lstmcore.module import check_dtype


def softmax_cross_entropy(logits, targets, *, ignore_index=None, mask=None, reduction="mean",
                          out=None):
    """-log softmax(logits)[target], in nats, for targets that are classes.

    Parameters
    ----------
    logits : (..., V) float32 or float64
    targets : (...) ints in 0..V-1
    ignore_index : the targets of this value do not count
    mask : (...) bool or weights: how much each target counts
    reduction : "mean", "sum" or "none"
    out : where to write dlogits, of the shape and dtype of logits; may be logits itself

    Returns
    -------
    loss : float, or (...) for "none"
    dlogits : (..., V)

    >>> loss, dlogits = softmax_cross_entropy(np.zeros((5, 2, 4)), np.ones((5, 2), int))
    >>> round(loss, 4), dlogits.shape
    (1.3863, (5, 2, 4))
    """
    logits, targets = _floats("logits", logits), np.asarray(targets)
    _check_reduction(reduction, "mean", "sum", "none")
    V, shape = logits.shape[-1], logits.shape[:-1]
    if targets.dtype.kind not in "iu":
        raise TypeError(f"targets must be integers, got {targets.dtype}")
    if targets.shape != shape:
        raise ValueError(f"targets must be {shape}, as logits {logits.shape} without their last "
                         f"axis, got {targets.shape}")
    if out is not None:
        check_dtype("out", out, logits.dtype)
        if out.shape != logits.shape:
            raise ValueError(f"out must be {logits.shape}, as logits, got {out.shape}")
        if not out.flags.c_contiguous:
            raise ValueError("out must be C-contiguous")
    weights = _weights(mask, shape)
    if ignore_index is not None:
        counts = targets != ignore_index
        weights = counts if weights is None else weights * counts
        targets = np.where(counts, targets, 0)
    if targets.size and not 0 <= targets.min() <= targets.max() < V:
        raise ValueError(f"targets must be in 0..{V - 1}, got {targets.min()}..{targets.max()}")

    # loss = log Σ_j e^(z_j - max z) - (z_k - max z);    dz = softmax(z) - 1 at k
    k, each = targets.reshape(-1), np.arange(targets.size)
    with np.errstate(invalid="ignore"):     # what is not finite shows in the loss
        top = logits.max(axis=-1, keepdims=True, initial=-np.inf)
        d = np.subtract(logits, top, out=out, order="C")
        rows = d.reshape(-1, V)
        z_k = rows[each, k]
        np.exp(rows, out=rows)
        total = rows.sum(axis=1)
        loss, factor = _reduce((np.log(total) - z_k).reshape(shape), weights, reduction)
        factor = np.broadcast_to(factor, shape).reshape(-1)
        _scale(rows, (factor / total)[:, None], factor == 0)
    rows[each, k] -= factor
    return loss, d


def mse_loss(y, target, *, mask=None, reduction="mean"):
    """Squared error (y - target)² of every number.

    Parameters
    ----------
    y, target : (...) of one dtype, float32 or float64
    mask : bool or weights, (...), or without the last axis
    reduction : "mean", "sum", "none", or the textbook's "half_sum": ½ Σ (y - target)²

    Returns
    -------
    loss : float, or (...) for "none"
    dy : (...)

    >>> mse_loss(np.array([1.0, 2.0]), np.array([1.0, 5.0]), reduction="half_sum")
    (4.5, array([ 0., -3.]))
    """
    _check_reduction(reduction, "mean", "sum", "none", "half_sum")
    y, target, weights = _pair("y", y, "target", target, mask)
    d = y - target
    half = reduction == "half_sum"
    loss, factor = _reduce(0.5 * d * d if half else d * d, weights, "sum" if half else reduction)
    return loss, _scale(d, factor if half else 2 * factor, weights == 0)


def bce_with_logits(logits, targets, *, mask=None, reduction="mean"):
    """Binary cross-entropy -t log σ(z) - (1 - t) log(1 - σ(z)), in nats, of logits z.

    Parameters
    ----------
    logits, targets : (...) of one dtype, float32 or float64; targets in 0..1
    mask : bool or weights, (...), or without the last axis
    reduction : "mean", "sum" or "none"

    Returns
    -------
    loss : float, or (...) for "none"
    dlogits : (...)

    >>> loss, dlogits = bce_with_logits(np.array([0.0, 2.0]), np.array([1.0, 1.0]))
    >>> round(loss, 4)
    0.41
    """
    _check_reduction(reduction, "mean", "sum", "none")
    z, t, weights = _pair("logits", logits, "targets", targets, mask)
    if t.size and not 0 <= t.min() <= t.max() <= 1:
        raise ValueError(f"targets must be in 0..1, got {t.min()}..{t.max()}")
    # max(z, 0) - t z + log(1 + e^-|z|): the same, without overflow
    losses = np.maximum(z, 0) - t * z + np.log1p(np.exp(-np.abs(z)))
    loss, factor = _reduce(losses, weights, reduction)
    return loss, _scale(sigmoid(z) - t, factor, weights == 0)


def _floats(name, a):
    a = np.asarray(a)
    if a.dtype not in (np.float32, np.float64):
        raise TypeError(f"{name} must be float32 or float64, got {a.dtype}")
    return a


def _pair(name, a, other, b, mask):
    """Two arrays of one shape and dtype, and the weights of their numbers."""
    a, b = _floats(name, a), np.asarray(b)
    check_dtype(other, b, a.dtype)
    if b.shape != a.shape:
        raise ValueError(f"{other} must be {a.shape}, as {name}, got {b.shape}")
    if mask is not None and a.ndim > 1 and np.shape(mask) == a.shape[:-1]:
        mask = np.broadcast_to(np.asarray(mask)[..., None], a.shape)
    return a, b, _weights(mask, a.shape)


def _weights(mask, shape):
    """The mask as weights, None for all ones."""
    if mask is not None and np.shape(mask) != shape:
        raise ValueError(f"mask must be {shape}, got {np.shape(mask)}")
    return None if mask is None else np.asarray(mask)


def _check_reduction(reduction, *names):
    if reduction not in names:
        raise ValueError(f"reduction must be one of {', '.join(names)}, got {reduction!r}")


def _reduce(losses, weights, reduction):
    """The losses as `reduction` says, and how much each counts in it: a number, or as losses."""
    factor = losses.dtype.type(1) if weights is None else weights.astype(losses.dtype)
    if weights is not None:
        # A weight of zero wins over a loss of infinity or nan.
        losses = np.multiply(losses, factor, out=np.zeros_like(losses), where=weights != 0)
    if reduction == "none":
        return losses, factor
    loss = float(losses.sum(dtype=np.float64))
    if reduction == "sum":
        return loss, factor
    count = losses.size if weights is None else float(weights.sum(dtype=np.float64))
    share = 1 / count if count else 0.0
    return loss * share, factor * losses.dtype.type(share)


def _scale(d, factor, nothing):
    """d *= factor in place, where `nothing` counts 0 even for infinity or nan; returns d."""
    d *= factor
    if np.any(nothing):
        d[nothing] = 0
    return d
