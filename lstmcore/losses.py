"""Losses: each returns the loss and its gradient by the first argument, in one call."""

import numpy as np


def softmax_cross_entropy(logits, targets, *, ignore_index=None, mask=None, reduction="mean",
                          out=None):
    """-log softmax(logits)[target], for integer targets.

    Parameters
    ----------
    logits : (..., V) float32 or float64
    targets : (...) ints in 0..V-1
    ignore_index : a value of targets that does not count
    mask : (...) bool, or weights: a target counts as much as its mask says
    reduction : "mean" (over what counts), "sum", or "none" (a loss per target)
    out : where to write dlogits, of the shape and dtype of logits; may be logits itself

    Returns
    -------
    loss : float, or (...) for "none"; of nothing that counts it is 0
    dlogits : (..., V), the gradient of the loss (for "none", of the sum of the losses)

    >>> loss, dlogits = softmax_cross_entropy(np.zeros((5, 2, 4)), np.ones((5, 2), int))
    >>> round(loss, 4), dlogits.shape
    (1.3863, (5, 2, 4))
    """
    logits, targets = _floats("logits", logits), np.asarray(targets)
    V = logits.shape[-1]
    if targets.dtype.kind not in "iu":
        raise TypeError(f"targets must be integers, got {targets.dtype}")
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"targets must be {logits.shape[:-1]}, as logits {logits.shape} without "
                         f"its last axis, got {targets.shape}")
    weights = _weights(mask, targets.shape)
    if ignore_index is not None:
        counts = targets != ignore_index
        weights = counts.astype(float) if weights is None else weights * counts
        targets = np.where(counts, targets, 0)
    if targets.size and not 0 <= targets.min() <= targets.max() < V:
        raise ValueError(f"targets must be in 0..{V - 1}, got {targets.min()}..{targets.max()}")

    # -log softmax(z)_k = log Σ_j e^(z_j - max z) - (z_k - max z);    its gradient: softmax(z) - 1_k
    d = np.subtract(logits, logits.max(axis=-1, keepdims=True, initial=-np.inf), out=out)
    rows, k = d.reshape(-1, V), targets.reshape(-1)
    picked = rows[np.arange(len(rows)), k]
    np.exp(rows, out=rows)
    total = rows.sum(axis=1)
    losses = (np.log(total) - picked).reshape(targets.shape)
    rows /= total[:, None]
    rows[np.arange(len(rows)), k] -= 1
    return _reduce(losses, d, weights, reduction)


def _floats(name, a):
    a = np.asarray(a)
    if a.dtype not in (np.float32, np.float64):
        raise TypeError(f"{name} must be float32 or float64, got {a.dtype}")
    return a


def _weights(mask, shape):
    if mask is None:
        return None
    if np.shape(mask) != shape:
        raise ValueError(f"mask must be {shape}, got {np.shape(mask)}")
    return np.asarray(mask, np.float64)


def _reduce(losses, d, weights, reduction):
    """The losses (...) as `reduction` says, and d (..., V), their gradients, scaled alike."""
    if weights is not None:
        losses = losses * weights.astype(losses.dtype)
        d *= weights[..., None].astype(d.dtype)
    if reduction == "none":
        return losses, d
    loss = float(losses.sum(dtype=np.float64))
    if reduction == "mean":
        count = float(losses.size if weights is None else weights.sum())
        scale = 1 / count if count else 0.0
        d *= scale
        loss *= scale
    elif reduction != "sum":
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    return loss, d
