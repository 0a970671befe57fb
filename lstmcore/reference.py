"""The specification: LSTM, GRU and vanilla RNN, forward and backward through time, in NumPy.

    a_t = x_t W_ihᵀ + h_{t-1} W_hhᵀ + b        a: (B, 4H), split into a_i, a_f, a_g, a_o
    i_t = σ(a_i + p_i ∘ c_{t-1})               p_i, p_f, p_o: peepholes (H,), zero unless given
    f_t = σ(a_f + p_f ∘ c_{t-1})
    g_t = tanh(a_g)
    c_t = f_t ∘ c_{t-1} + i_t ∘ g_t
    o_t = σ(a_o + p_o ∘ c_t)                   the output gate looks at the new cell state
    h_t = o_t ∘ tanh(c_t)                      with a projection W_hr: h_t = (o_t ∘ tanh(c_t)) W_hrᵀ

The gradient through c is multiplied by f_t alone: that is why an LSTM remembers (Hochreiter and
Schmidhuber 1997; forget gate: Gers, Schmidhuber and Cummins 2000; peepholes: Gers, Schraudolph and
Schmidhuber 2002; projection: Sak, Senior and Beaufays 2014).

The GRU (Cho et al. 2014) has no c, and two forms, whose reset gate comes before or after the product:

    r_t = σ(x_t W_irᵀ + h_{t-1} W_hrᵀ + b_r)
    z_t = σ(x_t W_izᵀ + h_{t-1} W_hzᵀ + b_z)
    n_t = tanh(x_t W_inᵀ + b_n + r_t ∘ q_t)    reset_after: q_t = h_{t-1} W_hnᵀ + b_hn
    n_t = tanh(x_t W_inᵀ + b_n + m_t W_hnᵀ)    or not: m_t = r_t ∘ h_{t-1}
    h_t = (1 - z_t) ∘ n_t + z_t ∘ h_{t-1}

A `Variant` of the LSTM has other activations A, A_g, A_c, clips what goes into the first two, may couple
f = 1 - i, multiplies h_{t-1} by a mask in the product with W_hh, and mixes (zoneout):

    ĉ_t = f_t ∘ c_{t-1} + i_t ∘ g_t                  c_t = z_c ∘ c_{t-1} + (1 - z_c) ∘ ĉ_t
    ĥ_t = o_t ∘ A_c(ĉ_t)                             h_t = z_h ∘ h_{t-1} + (1 - z_h) ∘ ĥ_t

With layer normalization of the two products and of c (Ba, Kiros and Hinton 2016), norm(v) = (v - mean(v)) /
√(var(v) + ε) over a row of v, ε = 10^-5:

    a_t = γ_x ∘ norm(x_t W_ihᵀ) + γ_h ∘ norm(h_{t-1} W_hhᵀ) + b       norms: γ_x, γ_h (4H), γ_c, β_c (H)
    h_t = o_t ∘ tanh(γ_c ∘ norm(c_t) + β_c)

or of each gate's sum and of c, which then goes on normalized (TensorFlow's LayerNormBasicLSTMCell):

    a_t = γ ∘ norm(x_t W_ihᵀ + h_{t-1} W_hhᵀ) + b, gate by gate       norms: γ (4H), γ_c, β_c (H)
    c_t = γ_c ∘ norm(f_t ∘ c_{t-1} + i_t ∘ g_t) + β_c                 h_t = o_t ∘ tanh(c_t)

`compute` names the number format of the operands of every product, forward and backward: None (as
they are), "bfloat16", or "int8" (forward only). All else, and so c, gates, bias and every sum, stays
in the dtype of x. Backward takes rounding for the identity.

The kernels are proven against this file, and this file against finite differences. It has the
signatures of `lstmcore.functional`, checks nothing, knows nothing but NumPy and the names of
activations, and is never a fallback. Sizes: T steps, B batch, I inputs, H hidden units, P projected
units (P = H without W_hr).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from lstmcore._types import ArrayLike, Floats, Ints, Lengths
from lstmcore.variants import Variant


class Tape(NamedTuple):
    """What lstm_forward keeps for lstm_backward."""

    x: Floats
    W_ih: Floats
    W_hh: Floats
    peepholes: Floats | None
    W_hr: Floats | None
    h0: Floats
    c0: Floats
    lengths: Lengths
    reverse: bool
    compute: str | None
    y: Floats
    gates: Floats
    c: Floats
    variant: Variant | None = None
    a: Any = None               # of a variant: what goes into the activations of i, f, g, o
    norms: Floats | None = None
    normed: Any = None          # with norms: x̂, ĥ (T, B, 4H) and ĉ (T, B, H), and their scales (T, B, 3)


class RNNTape(NamedTuple):
    """What rnn_forward keeps for rnn_backward."""

    x: Floats
    W_ih: Floats
    W_hh: Floats
    h0: Floats
    lengths: Lengths
    reverse: bool
    compute: str | None
    nonlinearity: str
    y: Floats


class GRUTape(NamedTuple):
    """What gru_forward keeps for gru_backward: gates (T, B, 4H), r, z, n, q, or (T, B, 3H), r, z, n."""

    x: Floats
    W_ih: Floats
    W_hh: Floats
    h0: Floats
    lengths: Lengths
    reverse: bool
    compute: str | None
    reset_after: bool
    y: Floats
    gates: Floats


class Gradients(NamedTuple):
    """Of lstm_backward, each shaped as what it belongs to; dx is None for the kernels' token ids."""

    dx: Any
    dW_ih: Floats
    dW_hh: Floats
    db: Floats
    dpeepholes: Floats | None
    dh0: Floats
    dc0: Floats
    dW_hr: Floats | None
    dnorms: Floats | None = None


class RNNGradients(NamedTuple):
    """Of rnn_backward, likewise."""

    dx: Any
    dW_ih: Floats
    dW_hh: Floats
    db: Floats
    dh0: Floats


class GRUGradients(NamedTuple):
    """Of gru_backward, likewise."""

    dx: Any
    dW_ih: Floats
    dW_hh: Floats
    db: Floats
    dh0: Floats


def sigmoid(a: Floats) -> Floats:
    """σ(a) = 1 / (1 + e^-a), by tanh, which does not overflow."""
    return 0.5 * (1 + np.tanh(0.5 * a))


def rounded(a: ArrayLike) -> Floats:
    """a as float32, rounded to the 8 significant bits of bfloat16: to nearest, ties to even."""
    a = np.asarray(a, "float32")
    bits = a.view("uint32")
    return np.where(np.isnan(a), a, (bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000).view("float32"))


def quantize(W: ArrayLike) -> tuple[Ints, Floats]:
    """W (n, K) -> q (n, K) int8 and scale (n,) float32 with W ≈ q scale: max |W| of a row is 127.

    A row below 2^-100 is zeros with scale 0; a row that holds nan or inf is zeros with scale nan.
    """
    W = np.asarray(W, "float32")
    largest = np.abs(W).max(axis=1, initial=0)
    largest = np.where(np.isfinite(largest), largest, np.float32(np.nan))
    kept = largest >= 2.0**-100
    factor = np.divide(127, largest, out=np.zeros_like(largest), where=kept)
    q = np.rint(np.where(kept[:, None], W, 0) * factor[:, None]).astype("int8")
    return q, np.where(largest < 2.0**-100, 0, largest / 127)


def product(a: Floats, b: Floats, compute: str | None) -> Floats:
    """a (n, K) times b (K, m), both in the number format `compute`; int8 has a scale per K numbers.

    Of bfloat16 only the rounding is specified here; in which order the kernels add is in docs/precision.md.
    """
    if compute == "bfloat16":
        return rounded(a).astype(a.dtype) @ rounded(b).astype(a.dtype)
    if compute == "int8":
        (q_a, scale_a), (q_b, scale_b) = quantize(a), quantize(b.T)
        sums = q_a.astype("float64") @ q_b.T.astype("float64")  # of integers: exact up to 2^53
        return (sums * np.outer(scale_a, scale_b)).astype(a.dtype)
    return a @ b


def cell_forward(a: Floats, c_prev: Floats, p: Floats) -> tuple[Floats, Floats, Floats]:
    """One step of the cell: a (n, 4H), c_prev (n, H), p (3, H) -> gates (n, 4H), c, m (n, H)."""
    a_i, a_f, a_g, a_o = np.split(a, 4, axis=1)
    p_i, p_f, p_o = p
    i = sigmoid(a_i + p_i * c_prev)
    f = sigmoid(a_f + p_f * c_prev)
    g = np.tanh(a_g)
    c = f * c_prev + i * g
    o = sigmoid(a_o + p_o * c)
    return np.concatenate([i, f, g, o], axis=1), c, o * np.tanh(c)


def cell_backward(gates: Floats, c: Floats, c_prev: Floats, p: Floats, dm: Floats,
                  dc: Floats) -> tuple[Floats, Floats]:
    """The mirror of cell_forward: dm = ∂L/∂m, dc = ∂L/∂c -> da (n, 4H), dc_prev (n, H)."""
    i, f, g, o = np.split(gates, 4, axis=1)
    p_i, p_f, p_o = p
    tanh_c = np.tanh(c)
    da_o = dm * tanh_c * o * (1 - o)
    dc = dc + dm * o * (1 - tanh_c**2) + p_o * da_o
    da_i = dc * g * i * (1 - i)
    da_f = dc * c_prev * f * (1 - f)
    da_g = dc * i * (1 - g**2)
    return np.concatenate([da_i, da_f, da_g, da_o], axis=1), dc * f + p_i * da_i + p_f * da_f


def steps(T: int, B: int, lengths: Lengths,
          reverse: bool) -> Iterator[tuple[Ints, Ints, Ints | None]]:
    """The (rows, times, earlier times) of each step: row b takes part in its own lengths[b] steps.

    In reverse a row is read from its own last step to its first.
    """
    lengths = np.full(B, T) if lengths is None else np.asarray(lengths)
    for s in range(T):
        r = np.flatnonzero(lengths > s)
        t = lengths[r] - 1 - s if reverse else np.full(len(r), s)
        yield r, t, (t + 1 if reverse else t - 1) if s > 0 else None


def lstm_forward(x: Floats, W_ih: Floats, W_hh: Floats, b: Floats | None = None,
                 h0: Floats | None = None, c0: Floats | None = None, *,
                 peepholes: Floats | None = None, W_hr: Floats | None = None,
                 lengths: Lengths = None, reverse: bool = False, keep_tape: bool = True,
                 compute: str | None = None, variant: Variant | None = None,
                 norms: Floats | None = None, n_threads: int | None = None,
                 ) -> tuple[Floats, tuple[Floats, Floats], Tape | Any]:
    """x (T,B,I), W_ih (4H,I), W_hh (4H,P) -> y (T,B,P), (h_n (B,P), c_n (B,H)), tape."""
    if norms is not None:
        forward = _normed_forward if len(norms) == 10 else _gates_normed_forward
        return forward(x, W_ih, W_hh, b, h0, c0, norms, lengths, reverse, keep_tape, compute)
    if variant is not None:
        return _varied_forward(x, W_ih, W_hh, b, h0, c0, peepholes, variant, lengths, reverse, keep_tape,
                              compute)
    T, B, _ = x.shape
    H, P = W_hh.shape[0] // 4, W_hh.shape[1]
    h0 = np.zeros((B, P), x.dtype) if h0 is None else h0
    c0 = np.zeros((B, H), x.dtype) if c0 is None else c0
    p = np.zeros((3, H), x.dtype) if peepholes is None else peepholes
    y, gates, c_all = (np.zeros((T, B, n), x.dtype) for n in (P, 4 * H, H))
    h, c = h0.copy(), c0.copy()
    for r, t, _ in steps(T, B, lengths, reverse):
        a = product(x[t, r], W_ih.T, compute) + product(h[r], W_hh.T, compute)
        a += 0 if b is None else b
        gates[t, r], c[r], m = cell_forward(a, c[r], p)
        h[r] = m if W_hr is None else product(m, W_hr.T, compute)
        y[t, r], c_all[t, r] = h[r], c[r]
    tape = Tape(x, W_ih, W_hh, peepholes, W_hr, h0, c0, lengths, reverse, compute, y, gates, c_all)
    return y, (h, c), tape if keep_tape else None


def lstm_backward(tape: Tape, dy: Floats, dh_n: Floats | None = None, dc_n: Floats | None = None, *,
                  n_threads: int | None = None) -> Gradients:
    """dy (T,B,P), dh_n (B,P), dc_n (B,H) -> Gradients, every one shaped as what it belongs to."""
    x, W_ih, W_hh, peepholes, W_hr, h0, c0, lengths, reverse, compute, y, gates, c, *_ = tape
    if tape.variant is not None:
        return _varied_backward(tape, dy, dh_n, dc_n)
    if tape.norms is not None:
        backward = _normed_backward if len(tape.norms) == 10 else _gates_normed_backward
        return backward(tape, dy, dh_n, dc_n)
    T, B, _ = x.shape
    p = np.zeros((3, c.shape[2]), x.dtype) if peepholes is None else peepholes
    dx, dW_ih, dW_hh = np.zeros_like(x), np.zeros_like(W_ih), np.zeros_like(W_hh)
    db, dp = np.zeros(len(W_ih), x.dtype), np.zeros_like(p)
    dW_hr = None if W_hr is None else np.zeros_like(W_hr)
    dh = np.zeros_like(h0) if dh_n is None else dh_n.copy()
    dc = np.zeros_like(c0) if dc_n is None else dc_n.copy()
    for r, t, t_prev in reversed(list(steps(T, B, lengths, reverse))):
        h_prev, c_prev = (h0[r], c0[r]) if t_prev is None else (y[t_prev, r], c[t_prev, r])
        dh_t = dh[r] + dy[t, r]
        if W_hr is None:
            dm = dh_t
        else:
            m = gates[t, r, -c.shape[2]:] * np.tanh(c[t, r])
            dm = product(dh_t, W_hr, compute)
            dW_hr += product(dh_t.T, m, compute)
        da, dc[r] = cell_backward(gates[t, r], c[t, r], c_prev, p, dm, dc[r])
        dh[r] = product(da, W_hh, compute)
        dx[t, r] = product(da, W_ih, compute)
        dW_ih += product(da.T, x[t, r], compute)
        dW_hh += product(da.T, h_prev, compute)
        db += da.sum(axis=0)
        da_i, da_f, _, da_o = np.split(da, 4, axis=1)
        dp += np.stack([da_i * c_prev, da_f * c_prev, da_o * c[t, r]]).sum(axis=1)
    return Gradients(dx, dW_ih, dW_hh, db, None if peepholes is None else dp, dh, dc, dW_hr)


def activate(A: tuple[int, float, float], x: Floats) -> tuple[Floats, Floats]:
    """A(x) and A'(x) of one of `Variant.activations`."""
    kind, alpha, beta = A
    low = alpha * np.expm1(np.minimum(x, 0))
    value, slope = [
        lambda: (sigmoid(x), sigmoid(x) * sigmoid(-x)),
        lambda: (alpha * np.tanh(beta * x), alpha * beta * (1 - np.tanh(beta * x)**2)),
        lambda: (alpha * x + beta, alpha),
        lambda: (np.clip(alpha * x + beta, 0, 1), alpha * (abs(alpha * x + beta - 0.5) < 0.5)),
        lambda: (np.where(x > 0, x, alpha * x), np.where(x > 0, 1, alpha)),
        lambda: (np.where(x > alpha, x, 0), x > alpha),
        lambda: (x / (1 + abs(x)), 1 / (1 + abs(x))**2),
        lambda: (beta * np.where(x > 0, x, low), beta * np.where(x > 0, 1, low + alpha)),
    ][kind]()
    return value.astype(x.dtype), np.broadcast_to(slope, x.shape).astype(x.dtype)


def clipped(A: tuple[int, float, float], x: Floats, clip: float | None) -> tuple[Floats, Floats]:
    """`activate` of x in -clip..clip; the slope is 0 outside."""
    if clip is None:
        return activate(A, x)
    value, slope = activate(A, np.clip(x, -clip, clip))
    return value, slope * (abs(x) < clip)


def zones_of(v: Variant, t: Ints, r: Ints) -> tuple[Any, Any]:
    """z_h and z_c of a step."""
    return v.zones() if v.zone_masks is None else (v.zone_masks[t, r, 0], v.zone_masks[t, r, 1])


def _varied_forward(x, W_ih, W_hh, b, h0, c0, peepholes, v, lengths, reverse, keep_tape, compute):
    """lstm_forward of a `Variant` v."""
    T, B, _ = x.shape
    H = W_hh.shape[1]
    h0 = np.zeros((B, H), x.dtype) if h0 is None else h0
    c0 = np.zeros((B, H), x.dtype) if c0 is None else c0
    p_i, p_f, p_o = np.zeros((3, H), x.dtype) if peepholes is None else peepholes
    mask = np.ones((B, H), x.dtype) if v.h_mask is None else v.h_mask
    A, A_g, A_c = v.activations()
    y, gates, a_all, c_all = (np.zeros((T, B, n), x.dtype) for n in (H, 4 * H, 4 * H, H))
    h, c = h0.copy(), c0.copy()
    for r, t, _ in steps(T, B, lengths, reverse):
        a = product(x[t, r], W_ih.T, compute) + product(h[r] * mask[r], W_hh.T, compute)
        a_i, a_f, a_g, a_o = np.split(a + (0 if b is None else b), 4, axis=1)
        a_i, a_f = a_i + p_i * c[r], a_f + p_f * c[r]
        i = clipped(A, a_i, v.clip)[0]
        f = 1 - i if v.coupled else clipped(A, a_f, v.clip)[0]
        g = clipped(A_g, a_g, v.clip)[0]
        c_hat = f * c[r] + i * g
        a_o = a_o + p_o * c_hat
        o = clipped(A, a_o, v.clip)[0]
        h_hat = o * activate(A_c, c_hat)[0]
        z_h, z_c = zones_of(v, t, r)
        c[r], h[r] = z_c * c[r] + (1 - z_c) * c_hat, z_h * h[r] + (1 - z_h) * h_hat
        y[t, r], c_all[t, r] = h[r], c[r]
        gates[t, r], a_all[t, r] = (np.concatenate(parts, axis=1) for parts in (
            (i, f, g, o), (a_i, a_f, a_g, a_o)))
    tape = Tape(x, W_ih, W_hh, peepholes, None, h0, c0, lengths, reverse, compute, y, gates, c_all, v, a_all)
    return y, (h, c), tape if keep_tape else None


def _varied_backward(tape, dy, dh_n, dc_n):
    """lstm_backward of a `Variant`."""
    x, W_ih, W_hh, peepholes, _, h0, c0, lengths, reverse, compute, y, gates, c, v, a, *_ = tape
    T, B, _ = x.shape
    H = W_hh.shape[1]
    p = np.zeros((3, H), x.dtype) if peepholes is None else peepholes
    mask = np.ones((B, H), x.dtype) if v.h_mask is None else v.h_mask
    A, A_g, A_c = v.activations()
    dx, dW_ih, dW_hh = np.zeros_like(x), np.zeros_like(W_ih), np.zeros_like(W_hh)
    db, dp = np.zeros(len(W_ih), x.dtype), np.zeros_like(p)
    dh = np.zeros_like(h0) if dh_n is None else dh_n.copy()
    dc = np.zeros_like(c0) if dc_n is None else dc_n.copy()
    for r, t, t_prev in reversed(list(steps(T, B, lengths, reverse))):
        h_prev, c_prev = (h0[r], c0[r]) if t_prev is None else (y[t_prev, r], c[t_prev, r])
        i, f, g, o = np.split(gates[t, r], 4, axis=1)
        a_i, a_f, a_g, a_o = np.split(a[t, r], 4, axis=1)
        z_h, z_c = zones_of(v, t, r)
        dh_t, c_hat = dh[r] + dy[t, r], f * c_prev + i * g
        dh_hat, dc_hat = (1 - z_h) * dh_t, (1 - z_c) * dc[r]
        u, slope_u = activate(A_c, c_hat)
        da_o = dh_hat * u * clipped(A, a_o, v.clip)[1]
        dc_hat = dc_hat + dh_hat * o * slope_u + p[2] * da_o
        di, df, dg = dc_hat * g, dc_hat * c_prev, dc_hat * i
        if v.coupled:
            di, df = di - df, 0 * df
        da_i = di * clipped(A, a_i, v.clip)[1]
        da_f = df * clipped(A, a_f, v.clip)[1]
        da_g = dg * clipped(A_g, a_g, v.clip)[1]
        da = np.concatenate([da_i, da_f, da_g, da_o], axis=1)
        dc[r] = z_c * dc[r] + dc_hat * f + p[0] * da_i + p[1] * da_f
        dh[r] = z_h * dh_t + product(da, W_hh, compute) * mask[r]
        dx[t, r] = product(da, W_ih, compute)
        dW_ih += product(da.T, x[t, r], compute)
        dW_hh += product(da.T, h_prev * mask[r], compute)
        db += da.sum(axis=0)
        dp += np.stack([da_i * c_prev, da_f * c_prev, da_o * c_hat]).sum(axis=1)
    return Gradients(dx, dW_ih, dW_hh, db, None if peepholes is None else dp, dh, dc, None)


def norm(v: Floats) -> tuple[Floats, Floats]:
    """norm(v) of each row of v (n, K), and its scale (n, 1)."""
    scale = 1 / np.sqrt(v.var(axis=1, keepdims=True) + 1e-5)
    return (v - v.mean(axis=1, keepdims=True)) * scale, scale


def norm_backward(g: Floats, normed: Floats, scale: Floats) -> Floats:
    """What reaches v, where g reaches norm(v)."""
    first, second = (part.mean(axis=1, keepdims=True) for part in (g, g * normed))
    return scale * (g - first - normed * second)


def gates_backward(gates: Floats, c_prev: Floats, dc: Floats, do_: Floats) -> tuple[Floats, Floats]:
    """dc of c = f ∘ c_prev + i ∘ g, and do -> da (n, 4H), dc_prev (n, H)."""
    i, f, g, o = np.split(gates, 4, axis=1)
    return np.concatenate([dc * g * i * (1 - i), dc * c_prev * f * (1 - f), dc * i * (1 - g**2),
                           do_ * o * (1 - o)], axis=1), dc * f


def _normed_forward(x, W_ih, W_hh, b, h0, c0, norms, lengths, reverse, keep_tape, compute):
    """lstm_forward with layer normalization."""
    T, B, _ = x.shape
    H = W_hh.shape[1]
    h0 = np.zeros((B, H), x.dtype) if h0 is None else h0
    c0 = np.zeros((B, H), x.dtype) if c0 is None else c0
    gamma_x, gamma_h, (gamma_c, beta_c) = norms[:4].ravel(), norms[4:8].ravel(), norms[8:]
    y, gates, x_all, h_all, c_all, c_normed, scales = (np.zeros((T, B, n), x.dtype) for n in (
        H, 4 * H, 4 * H, 4 * H, H, H, 3))
    h, c, p = h0.copy(), c0.copy(), np.zeros((3, H), x.dtype)
    for r, t, _ in steps(T, B, lengths, reverse):
        x_hat, x_scale = norm(product(x[t, r], W_ih.T, compute))
        h_hat, h_scale = norm(product(h[r], W_hh.T, compute))
        a = gamma_x * x_hat + gamma_h * h_hat + (0 if b is None else b)
        gates[t, r], c[r], _ = cell_forward(a, c[r], p)
        c_hat, c_scale = norm(c[r])
        y[t, r] = h[r] = gates[t, r, 3 * H:] * np.tanh(gamma_c * c_hat + beta_c)
        x_all[t, r], h_all[t, r], c_all[t, r], c_normed[t, r] = x_hat, h_hat, c[r], c_hat
        scales[t, r] = np.concatenate([x_scale, h_scale, c_scale], axis=1)
    tape = Tape(x, W_ih, W_hh, None, None, h0, c0, lengths, reverse, compute, y, gates, c_all, norms=norms,
                normed=(x_all, h_all, c_normed, scales))
    return y, (h, c), tape if keep_tape else None


def _normed_backward(tape, dy, dh_n, dc_n):
    """lstm_backward with layer normalization."""
    x, W_ih, W_hh, _, _, h0, c0, lengths, reverse, compute, y, gates, c, *_ = tape
    T, B, _ = x.shape
    H, norms, (x_all, h_all, c_all, scales) = W_hh.shape[1], tape.norms, tape.normed
    gamma_x, gamma_h, (gamma_c, beta_c) = norms[:4].ravel(), norms[4:8].ravel(), norms[8:]
    dx, dW_ih, dW_hh, dnorms = (np.zeros_like(a) for a in (x, W_ih, W_hh, norms))
    db = np.zeros(4 * H, x.dtype)
    dh, dc = (np.zeros((B, H), x.dtype) if d is None else d.copy() for d in (dh_n, dc_n))
    for r, t, t_prev in reversed(list(steps(T, B, lengths, reverse))):
        h_prev, c_prev = (h0[r], c0[r]) if t_prev is None else (y[t_prev, r], c[t_prev, r])
        o = gates[t, r, 3 * H:]
        x_hat, h_hat, c_hat = x_all[t, r], h_all[t, r], c_all[t, r]
        x_scale, h_scale, c_scale = np.split(scales[t, r], 3, axis=1)
        dh_t, tanh_n = dh[r] + dy[t, r], np.tanh(gamma_c * c_hat + beta_c)
        dn = dh_t * o * (1 - tanh_n**2)
        dc_t = dc[r] + norm_backward(dn * gamma_c, c_hat, c_scale)
        da, dc[r] = gates_backward(gates[t, r], c_prev, dc_t, dh_t * tanh_n)
        dax, dah = (norm_backward(da * gamma, normed, scale) for gamma, normed, scale in (
            (gamma_x, x_hat, x_scale), (gamma_h, h_hat, h_scale)))
        dh[r] = product(dah, W_hh, compute)
        dx[t, r] = product(dax, W_ih, compute)
        dW_ih += product(dax.T, x[t, r], compute)
        dW_hh += product(dah.T, h_prev, compute)
        db += da.sum(axis=0)
        dnorms[:4] += (da * x_hat).sum(axis=0).reshape(4, H)
        dnorms[4:8] += (da * h_hat).sum(axis=0).reshape(4, H)
        dnorms[8:] += np.stack([dn * c_hat, dn]).sum(axis=1)
    return Gradients(dx, dW_ih, dW_hh, db, None, dh, dc, None, dnorms)


def _gates_normed_forward(x, W_ih, W_hh, b, h0, c0, norms, lengths, reverse, keep_tape, compute):
    """lstm_forward with each gate normalized over its units, and a c that goes on normalized."""
    T, B, _ = x.shape
    H = W_hh.shape[1]
    h0 = np.zeros((B, H), x.dtype) if h0 is None else h0
    c0 = np.zeros((B, H), x.dtype) if c0 is None else c0
    gamma, (gamma_c, beta_c) = norms[:4].ravel(), norms[4:]
    y, gates, s_all, c_all, raw_all, scales = (np.zeros((T, B, n), x.dtype) for n in (
        H, 4 * H, 4 * H, H, H, 5))
    h, c, p = h0.copy(), c0.copy(), np.zeros((3, H), x.dtype)
    for r, t, _ in steps(T, B, lengths, reverse):
        s = product(x[t, r], W_ih.T, compute) + product(h[r], W_hh.T, compute)
        s_hat, s_scales = zip(*(norm(s_k) for s_k in np.split(s, 4, axis=1)))
        s_hat = np.concatenate(s_hat, axis=1)
        gates[t, r], raw, _ = cell_forward(gamma * s_hat + (0 if b is None else b), c[r], p)
        raw_hat, raw_scale = norm(raw)
        c_all[t, r] = c[r] = gamma_c * raw_hat + beta_c
        y[t, r] = h[r] = gates[t, r, 3 * H:] * np.tanh(c[r])
        s_all[t, r], raw_all[t, r] = s_hat, raw_hat
        scales[t, r] = np.concatenate([*s_scales, raw_scale], axis=1)
    tape = Tape(x, W_ih, W_hh, None, None, h0, c0, lengths, reverse, compute, y, gates, c_all, norms=norms,
                normed=(s_all, raw_all, scales))
    return y, (h, c), tape if keep_tape else None


def _gates_normed_backward(tape, dy, dh_n, dc_n):
    """lstm_backward with each gate normalized over its units, and a c that goes on normalized."""
    x, W_ih, W_hh, _, _, h0, c0, lengths, reverse, compute, y, gates, c, *_ = tape
    T, B, _ = x.shape
    H, norms, (s_all, raw_all, scales) = W_hh.shape[1], tape.norms, tape.normed
    gamma, gamma_c = norms[:4].ravel(), norms[4]
    dx, dW_ih, dW_hh, dnorms = (np.zeros_like(a) for a in (x, W_ih, W_hh, norms))
    db = np.zeros(4 * H, x.dtype)
    dh, dc = (np.zeros((B, H), x.dtype) if d is None else d.copy() for d in (dh_n, dc_n))
    for r, t, t_prev in reversed(list(steps(T, B, lengths, reverse))):
        h_prev, c_prev = (h0[r], c0[r]) if t_prev is None else (y[t_prev, r], c[t_prev, r])
        o = gates[t, r, 3 * H:]
        *s_scales, raw_scale = np.split(scales[t, r], 5, axis=1)
        dh_t, tanh_c = dh[r] + dy[t, r], np.tanh(c[t, r])
        dn = dc[r] + dh_t * o * (1 - tanh_c**2)
        draw = norm_backward(dn * gamma_c, raw_all[t, r], raw_scale)
        da, dc[r] = gates_backward(gates[t, r], c_prev, draw, dh_t * tanh_c)
        ds = np.concatenate([norm_backward(d, s_hat, scale) for d, s_hat, scale in zip(
            np.split(da * gamma, 4, axis=1), np.split(s_all[t, r], 4, axis=1), s_scales)], axis=1)
        dh[r] = product(ds, W_hh, compute)
        dx[t, r] = product(ds, W_ih, compute)
        dW_ih += product(ds.T, x[t, r], compute)
        dW_hh += product(ds.T, h_prev, compute)
        db += da.sum(axis=0)
        dnorms[:4] += (da * s_all[t, r]).sum(axis=0).reshape(4, H)
        dnorms[4:] += np.stack([dn * raw_all[t, r], dn]).sum(axis=1)
    return Gradients(dx, dW_ih, dW_hh, db, None, dh, dc, None, dnorms)


def rnn_forward(x: Floats, W_ih: Floats, W_hh: Floats, b: Floats | None = None,
                h0: Floats | None = None, *, nonlinearity: str = "tanh", lengths: Lengths = None,
                reverse: bool = False, keep_tape: bool = True, compute: str | None = None,
                n_threads: int | None = None,
                ) -> tuple[Floats, Floats, RNNTape | Any]:
    """h_t = tanh(x_t W_ihᵀ + h_{t-1} W_hhᵀ + b), or relu: x (T,B,I) -> y (T,B,H), h_n (B,H), tape."""
    T, B, _ = x.shape
    H = len(W_hh)
    h0 = np.zeros((B, H), x.dtype) if h0 is None else h0
    y, h = np.zeros((T, B, H), x.dtype), h0.copy()
    for r, t, _ in steps(T, B, lengths, reverse):
        a = product(x[t, r], W_ih.T, compute) + product(h[r], W_hh.T, compute)
        a += 0 if b is None else b
        y[t, r] = h[r] = np.tanh(a) if nonlinearity == "tanh" else np.maximum(a, 0)
    tape = RNNTape(x, W_ih, W_hh, h0, lengths, reverse, compute, nonlinearity, y)
    return y, h, tape if keep_tape else None


def rnn_backward(tape: RNNTape, dy: Floats, dh_n: Floats | None = None, *,
                 n_threads: int | None = None) -> RNNGradients:
    """dy (T,B,H), dh_n (B,H) -> RNNGradients: each step multiplies by W_hhᵀ, and so it vanishes."""
    x, W_ih, W_hh, h0, lengths, reverse, compute, nonlinearity, y = tape
    T, B, _ = x.shape
    dx, dW_ih, dW_hh = np.zeros_like(x), np.zeros_like(W_ih), np.zeros_like(W_hh)
    db = np.zeros(len(W_ih), x.dtype)
    dh = np.zeros_like(h0) if dh_n is None else dh_n.copy()
    for r, t, t_prev in reversed(list(steps(T, B, lengths, reverse))):
        h_prev = h0[r] if t_prev is None else y[t_prev, r]
        h = y[t, r]
        da = (dh[r] + dy[t, r]) * (1 - h**2 if nonlinearity == "tanh" else h > 0)
        dh[r] = product(da, W_hh, compute)
        dx[t, r] = product(da, W_ih, compute)
        dW_ih += product(da.T, x[t, r], compute)
        dW_hh += product(da.T, h_prev, compute)
        db += da.sum(axis=0)
    return RNNGradients(dx, dW_ih, dW_hh, db, dh)


def gru_forward(x: Floats, W_ih: Floats, W_hh: Floats, b: Floats | None = None,
                h0: Floats | None = None, *, reset_after: bool = True, lengths: Lengths = None,
                reverse: bool = False, keep_tape: bool = True, compute: str | None = None,
                n_threads: int | None = None,
                ) -> tuple[Floats, Floats, GRUTape | Any]:
    """x (T,B,I), W_ih (3H,I), W_hh (3H,H) in r, z, n -> y (T,B,H), h_n (B,H), tape.

    b is b_r, b_z, b_n and, with reset_after, b_hn.
    """
    T, B, _ = x.shape
    H = W_hh.shape[1]
    h0 = np.zeros((B, H), x.dtype) if h0 is None else h0
    y, gates = np.zeros((T, B, H), x.dtype), np.zeros((T, B, 3 * H + reset_after * H), x.dtype)
    b_a, b_q = (0, 0) if b is None else (b[:3 * H], b[3 * H:])
    W_hrz, W_hn = W_hh[:2 * H], W_hh[2 * H:]
    h = h0.copy()
    for rows, t, _ in steps(T, B, lengths, reverse):
        a_rz, a_n = np.split(product(x[t, rows], W_ih.T, compute) + b_a, [2 * H], axis=1)
        r, z = np.split(sigmoid(a_rz + product(h[rows], W_hrz.T, compute)), 2, axis=1)
        if reset_after:
            q = product(h[rows], W_hn.T, compute) + b_q
            n = np.tanh(a_n + r * q)
            gates[t, rows, 3 * H:] = q
        else:
            n = np.tanh(a_n + product(r * h[rows], W_hn.T, compute))
        y[t, rows] = h[rows] = (1 - z) * n + z * h[rows]
        gates[t, rows, :3 * H] = np.concatenate([r, z, n], axis=1)
    tape = GRUTape(x, W_ih, W_hh, h0, lengths, reverse, compute, reset_after, y, gates)
    return y, h, tape if keep_tape else None


def gru_backward(tape: GRUTape, dy: Floats, dh_n: Floats | None = None, *,
                 n_threads: int | None = None) -> GRUGradients:
    """dy (T,B,H), dh_n (B,H) -> GRUGradients: what z lets through is not multiplied by W_hh."""
    x, W_ih, W_hh, h0, lengths, reverse, compute, reset_after, y, gates = tape
    T, B, _ = x.shape
    H = W_hh.shape[1]
    dx, dW_ih, dW_hh = np.zeros_like(x), np.zeros_like(W_ih), np.zeros_like(W_hh)
    db, W_hrz, W_hn = np.zeros(gates.shape[2], x.dtype), W_hh[:2 * H], W_hh[2 * H:]
    dh = np.zeros_like(h0) if dh_n is None else dh_n.copy()
    for rows, t, t_prev in reversed(list(steps(T, B, lengths, reverse))):
        h_prev = h0[rows] if t_prev is None else y[t_prev, rows]
        r, z, n, *q = np.split(gates[t, rows], 3 + reset_after, axis=1)
        dh_t = dh[rows] + dy[t, rows]
        da_z = dh_t * (h_prev - n) * z * (1 - z)
        da_n = dh_t * (1 - z) * (1 - n**2)
        if reset_after:
            dq = da_n * r
            da_r = da_n * q[0] * r * (1 - r)
            dh[rows] = dh_t * z + product(np.concatenate([da_r, da_z, dq], axis=1), W_hh, compute)
            dW_hh[2 * H:] += product(dq.T, h_prev, compute)
            db[3 * H:] += dq.sum(axis=0)
        else:
            dm = product(da_n, W_hn, compute)
            da_r = dm * h_prev * r * (1 - r)
            dh[rows] = (dh_t * z + dm * r
                        + product(np.concatenate([da_r, da_z], axis=1), W_hrz, compute))
            dW_hh[2 * H:] += product(da_n.T, r * h_prev, compute)
        da = np.concatenate([da_r, da_z, da_n], axis=1)
        dx[t, rows] = product(da, W_ih, compute)
        dW_ih += product(da.T, x[t, rows], compute)
        dW_hh[:2 * H] += product(da[:, :2 * H].T, h_prev, compute)
        db[:3 * H] += da.sum(axis=0)
    return GRUGradients(dx, dW_ih, dW_hh, db, dh)
