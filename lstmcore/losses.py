"""Losses: each returns the loss and its gradient by the first argument, in one call.

What counts, and how much, is said by a mask; what becomes of the single losses, by `reduction`:
"mean" (over what counts, weighted by the mask; 0 if nothing does), "sum", or "none" (an array of
losses; the gradient is then that of their sum). Sums are formed in float64.
"""

from __future__ import annotations

from typing import Literal, overload

import numpy as np

from lstmcore import checks, dense
from lstmcore._types import ArrayLike, Floats
from lstmcore.layers import Linear, sigmoid


@overload
def softmax_cross_entropy(logits: Floats, targets: ArrayLike, *, ignore_index: int | None = None,
                          mask: ArrayLike | None = None, reduction: Literal["mean", "sum"] = "mean",
                          out: Floats | None = None) -> tuple[float, Floats]: ...
@overload
def softmax_cross_entropy(logits: Floats, targets: ArrayLike, *, ignore_index: int | None = None,
                          mask: ArrayLike | None = None, reduction: Literal["none"],
                          out: Floats | None = None) -> tuple[Floats, Floats]: ...
def softmax_cross_entropy(logits: Floats, targets: ArrayLike, *, ignore_index: int | None = None,
                          mask: ArrayLike | None = None,
                          reduction: Literal["mean", "sum", "none"] = "mean",
                          out: Floats | None = None) -> tuple[float | Floats, Floats]:
    """-log softmax(logits)[target], in nats, for targets that are classes.

    Parameters
    ----------
    logits : (..., V) float32 or float64
    targets : (...) ints in 0..V-1
    ignore_index : the targets of this value do not count
    mask : (...) bool, or finite weights: how much each target counts
    reduction : "mean", "sum" or "none"
    out : where to write dlogits, of the shape and dtype of logits; may be logits itself, but not
        a part of it or of another argument

    Returns
    -------
    loss : float, or (...) for "none"
    dlogits : (..., V)

    >>> loss, dlogits = softmax_cross_entropy(np.zeros((5, 2, 4)), np.ones((5, 2), int))
    >>> round(loss, 4), dlogits.shape
    (1.3863, (5, 2, 4))
    """
    _check_reduction(reduction, "mean", "sum", "none")
    logits = checks.floats("logits", logits)
    if not logits.ndim:
        raise ValueError("logits must be (..., V), got ()")
    V = logits.shape[-1]
    if out is not None:
        checks.out("out", out, logits.shape, logits.dtype, targets, mask, over=logits)
    d = np.empty(logits.shape, logits.dtype) if out is None else out

    def losses(targets, factors):
        return dense.cross_entropy(logits.reshape(-1, V), targets, factors, d.reshape(-1, V))
    return _of_classes("logits", logits, V, targets, ignore_index, mask, reduction, losses), d


@overload
def linear_cross_entropy(linear: Linear, x: Floats, targets: ArrayLike, *,
                         ignore_index: int | None = None, mask: ArrayLike | None = None,
                         reduction: Literal["mean", "sum"] = "mean",
                         ) -> tuple[float, Floats | None]: ...
@overload
def linear_cross_entropy(linear: Linear, x: Floats, targets: ArrayLike, *,
                         ignore_index: int | None = None, mask: ArrayLike | None = None,
                         reduction: Literal["none"]) -> tuple[Floats, Floats | None]: ...
def linear_cross_entropy(linear: Linear, x: Floats, targets: ArrayLike, *,
                         ignore_index: int | None = None, mask: ArrayLike | None = None,
                         reduction: Literal["mean", "sum", "none"] = "mean",
                         ) -> tuple[float | Floats, Floats | None]:
    """`softmax_cross_entropy` of the logits linear(x), a block of rows at a time.

    A block of 256 rows has its logits, its losses and its gradients computed before the next begins:
    with many classes that saves the memory of (..., V) numbers. In inference mode up to 32 MB of
    logits are one block. In training mode it also adds to the gradients of the layer, as its call and
    backward would, with the same bits.

    Parameters
    ----------
    linear : a `Linear` of V outputs
    x : (..., I), its input
    targets, ignore_index, mask, reduction : as in `softmax_cross_entropy`

    Returns
    -------
    loss : float, or (...) for "none"
    dx : (..., I), or None in inference mode

    >>> from lstmcore import Linear
    >>> loss, dx = linear_cross_entropy(Linear(8, 4, seed=0), np.zeros((5, 2, 8), "float32"),
    ...                                 np.ones((5, 2), int))
    >>> dx.shape
    (5, 2, 8)
    """
    _check_reduction(reduction, "mean", "sum", "none")
    if not isinstance(linear, Linear):
        raise TypeError(f"linear must be a Linear, got {type(linear).__name__}")
    x, dx = linear._check(x), None

    def losses(targets, factors):
        nonlocal dx
        losses, dx = linear._cross_entropy(x.reshape(-1, x.shape[-1]), targets, factors)
        return losses
    loss = _of_classes("x", x, linear.out_features, targets, ignore_index, mask, reduction, losses)
    return loss, None if dx is None else dx.reshape(x.shape)


def _of_classes(name, a, V, targets, ignore_index, mask, reduction, losses):
    """The loss of targets in 0..V-1, one for each row of a; losses(targets, factors): of all rows."""
    shape, dtype = a.shape[:-1], a.dtype
    weights = _weights(mask, shape, dtype)
    targets = checks.integers("targets", targets)
    if targets.shape != shape:
        raise ValueError(f"targets must be {shape}, as {name} {a.shape} without their last axis, got "
                         f"{targets.shape}")
    if ignore_index is not None:
        counts = targets != ignore_index
        weights = counts if weights is None else weights * counts
        targets[~counts] = 0
    targets = checks.ids(targets, "targets", V)
    share, factor = _shares(weights, targets.size, dtype, reduction)
    single = losses(targets.reshape(-1), np.broadcast_to(factor, shape).reshape(-1))
    return _reduce(single.reshape(shape), weights, share, reduction)


@overload
def mse_loss(y: Floats, target: ArrayLike, *, mask: ArrayLike | None = None,
             reduction: Literal["mean", "sum", "half_sum"] = "mean") -> tuple[float, Floats]: ...
@overload
def mse_loss(y: Floats, target: ArrayLike, *, mask: ArrayLike | None = None,
             reduction: Literal["none"]) -> tuple[Floats, Floats]: ...
def mse_loss(y: Floats, target: ArrayLike, *, mask: ArrayLike | None = None,
             reduction: Literal["mean", "sum", "half_sum", "none"] = "mean",
             ) -> tuple[float | Floats, Floats]:
    """Squared error (y - target)² of every number.

    Parameters
    ----------
    y, target : (...) of one dtype, float32 or float64
    mask : bool or finite weights, (...), or without the last axis
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
    d = np.asarray(y - target)
    half = reduction == "half_sum"
    share, factor = _shares(weights, d.size, d.dtype, reduction)
    loss = _reduce(0.5 * d * d if half else d * d, weights, share, reduction)
    return loss, _scale(d, factor if half else 2 * factor, weights == 0)


@overload
def bce_with_logits(logits: Floats, targets: ArrayLike, *, mask: ArrayLike | None = None,
                    reduction: Literal["mean", "sum"] = "mean") -> tuple[float, Floats]: ...
@overload
def bce_with_logits(logits: Floats, targets: ArrayLike, *, mask: ArrayLike | None = None,
                    reduction: Literal["none"]) -> tuple[Floats, Floats]: ...
def bce_with_logits(logits: Floats, targets: ArrayLike, *, mask: ArrayLike | None = None,
                    reduction: Literal["mean", "sum", "none"] = "mean",
                    ) -> tuple[float | Floats, Floats]:
    """Binary cross-entropy -t log σ(z) - (1 - t) log(1 - σ(z)), in nats, of logits z.

    Parameters
    ----------
    logits, targets : (...) of one dtype, float32 or float64; targets in 0..1
    mask : bool or finite weights, (...), or without the last axis
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
    share, factor = _shares(weights, z.size, z.dtype, reduction)
    loss = _reduce(losses, weights, share, reduction)
    return loss, _scale(np.asarray(sigmoid(z) - t), factor, weights == 0)


def _pair(name, a, other, b, mask):
    """Two arrays of one shape and dtype, and the weights of their numbers."""
    a = checks.floats(name, a)
    b = checks.floats(other, b, a.dtype)
    if b.shape != a.shape:
        raise ValueError(f"{other} must be {a.shape}, as {name}, got {b.shape}")
    checks.unmasked("mask", mask)
    if mask is not None and a.ndim > 1 and np.shape(mask) == a.shape[:-1]:
        mask = np.broadcast_to(np.asarray(mask)[..., None], a.shape)
    return a, b, _weights(mask, a.shape, a.dtype)


def _weights(mask, shape, dtype):
    """The mask as weights, finite in this dtype; None for all ones."""
    if mask is None:
        return None
    weights = np.asarray(checks.unmasked("mask", mask))
    if weights.shape != shape:
        raise ValueError(f"mask must be {shape}, got {weights.shape}")
    if not weights.size:
        return np.ones(shape, dtype)    # an empty list is not yet of any type
    if weights.dtype.kind not in "biuf":
        raise TypeError(f"mask must be bool or real numbers, got {weights.dtype}")
    finite = np.abs(weights) <= np.finfo(dtype).max if weights.dtype.kind == "f" else True
    if not np.all(finite):
        raise ValueError(f"mask must be finite in {dtype}, got {weights[~finite][0]}")
    return weights


def _check_reduction(reduction, *names):
    if reduction not in names:
        raise ValueError(f"reduction must be one of {', '.join(names)}, got {reduction!r}")


def _shares(weights, count, dtype, reduction):
    """What the weighted sum of losses is multiplied by, and what each loss is: a number or array."""
    if reduction == "mean" and weights is not None:
        count = float(weights.sum(dtype=np.float64))
    share = 1.0 if reduction != "mean" else 1 / count if count else 0.0
    return share, dtype.type(share) * (1 if weights is None else weights.astype(dtype))


def _reduce(losses, weights, share, reduction):
    """The losses as `reduction` says."""
    if weights is not None:
        # A weight of zero wins over a loss of infinity or nan.
        losses = np.multiply(losses, weights, out=np.zeros_like(losses), where=weights != 0)
    return losses if reduction == "none" else float(losses.sum(dtype=np.float64)) * share


def _scale(d, factor, nothing):
    """d *= factor in place, where `nothing` counts 0 even for infinity or nan; returns d."""
    d *= factor
    if np.any(nothing):
        d[nothing] = 0
    return d
