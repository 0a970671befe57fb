"""One layer, one direction: check the arguments, allocate the results, call the kernels.

Signatures and meaning are those of `lstmcore.reference`. Arrays that are not C-contiguous are copied;
nothing is cast, no argument is written to, and no result aliases an argument.
"""

import numpy as np

from lstmcore import _kernels, checks
from lstmcore.checks import F32, F64
from lstmcore.reference import Gradients, RNNGradients
from lstmcore.threads import get_num_threads, resolve

_SERIAL_WORK = 1_000_000  # multiply-adds that are done before a second thread pays: about 20 µs


# ---- checks ------------------------------------------------------------------------------------------

def _sequence(x, W_ih, W_hh, gates, W_hr=None):
    """x contiguous, and the sizes T, B, I, H, K and the dtype, from x, W_ih, W_hh and W_hr."""
    for name, value, ndim in (("x", x, 0), ("W_ih", W_ih, 2), ("W_hh", W_hh, 2)):
        if not isinstance(value, np.ndarray):
            raise TypeError(f"{name} must be a NumPy array, got {type(value).__module__}."
                            f"{type(value).__qualname__}")
        if ndim and value.ndim != ndim:
            raise ValueError(f"{name} must be a matrix, got shape {value.shape}")
    ids = x.dtype.kind in "iu"
    dtype = W_hh.dtype if ids else x.dtype
    if dtype != F32 and dtype != F64:
        raise TypeError(f"{'W_hh' if ids else 'x'} must be float32 or float64, got {dtype}")
    dtype = F64 if dtype == F64 else F32
    if x.ndim != (2 if ids else 3):
        raise ValueError(f"x must be {'(T, B) of token ids' if ids else '(T, B, I)'}, got shape "
                         f"{x.shape}")
    if W_hh.shape[0] % gates or 0 in W_hh.shape:
        raise ValueError(f"W_hh must be ({'4H' if gates == 4 else 'H'}, H), got {W_hh.shape}")
    T, B = x.shape[:2]
    I, H = W_ih.shape[1] if ids else x.shape[2], W_hh.shape[0] // gates
    if I == 0:
        raise ValueError(f"x must have I >= 1 inputs, got x {x.shape} and W_ih {W_ih.shape}")
    if W_hr is None:
        K = H
    elif isinstance(W_hr, np.ndarray) and W_hr.ndim == 2 and W_hr.shape[1] == H and W_hr.shape[0]:
        K = W_hr.shape[0]
    else:
        raise ValueError(f"W_hr must be a (P, H) = (P, {H}) array, got "
                         f"{getattr(W_hr, 'shape', type(W_hr).__qualname__)}")
    if ids:
        x = checks.ids(x, "token ids", I, (T, B), "I")
    else:
        x = checks.array(x, "x", "(T, B, I)", (T, B, I), dtype)
    return x, T, B, I, H, K, dtype


def _table(x, W_ih, b):
    """x and the bias; or token ids and the table that they look up, what each projects to.

    The table is W_ihᵀ + b (I, 4H) or, if it has more rows than there are tokens, the rows in use.
    """
    if x.ndim == 3:
        return x, b
    rows = W_ih.T
    if x.size < len(rows):
        used, ids = np.unique(x, return_inverse=True)
        x, rows = ids.reshape(x.shape), rows[used]
    return x, _projected(rows, b)


def _projected(rows, b):
    return np.ascontiguousarray(rows if b is None else rows + b)


def _packed(packed, W_hh):
    """packed, found made of this very W_hh."""
    if packed is not None and packed.weights[1] is not W_hh:
        raise ValueError("packed must be of functional.pack with the weights of this call")
    return packed


def _lengths(lengths, T, B):
    """None, or lengths (B,) in 0..T with the order of the rows, longest first."""
    if lengths is None:
        return None, None
    lengths = checks.lengths(lengths, T, B)
    order = np.argsort(-lengths, kind="stable")
    return order, lengths[order]


def _threads(n_threads, tokens, G, width):
    """Threads for a call: one, if the work is too small to share."""
    n = get_num_threads() if n_threads is None else resolve(n_threads)
    return n if n == 1 or tokens * G * width > _SERIAL_WORK else 1


# ---- tapes -------------------------------------------------------------------------------------------

class Tape:
    """What the forward pass keeps for the backward pass: 5H numbers per token, beside x and y.

    `gates` (T, B, 4H) in the order i, f, g, o and `c` (T, B, H) are views of a dense tape and, of a
    ragged one, which holds its real tokens only, copies that are zero past the end. `lstm_backward`
    uses the memory of the gates, so a tape can be used once and shows no gates afterwards.
    """

    __slots__ = ("x", "W_ih", "W_hh", "peepholes", "W_hr", "h0", "c0", "reverse", "y", "raw_gates",
                 "raw_c", "order", "sorted_lengths", "spent")

    def __init__(self, x, W_ih, W_hh, peepholes, W_hr, h0, c0, reverse, y, raw_gates, raw_c, order,
                 sorted_lengths):
        self.x, self.W_ih, self.W_hh, self.peepholes, self.W_hr = x, W_ih, W_hh, peepholes, W_hr
        self.h0, self.c0, self.reverse, self.y = h0, c0, reverse, y
        self.raw_gates, self.raw_c = raw_gates, raw_c
        self.order, self.sorted_lengths, self.spent = order, sorted_lengths, False

    @property
    def gates(self):
        self.check_unspent()
        return self._padded(self.raw_gates)

    @property
    def c(self):
        return self._padded(self.raw_c)

    @property
    def nbytes(self):
        """Bytes kept beside x and y."""
        return self.raw_gates.nbytes + self.raw_c.nbytes

    def check_unspent(self):
        if self.spent:
            raise ValueError("this tape was used by an earlier backward pass, which overwrote its "
                             "gates: run the forward pass again")

    def _padded(self, raw):
        T, B = self.y.shape[:2]
        if self.order is None:
            return raw.reshape(T, B, -1)
        out, first = np.zeros((T, B, raw.shape[-1]), raw.dtype), 0
        for s in range(self.sorted_lengths[0] if B else 0):
            n = int(np.count_nonzero(self.sorted_lengths > s))
            t = self.sorted_lengths[:n] - 1 - s if self.reverse else s
            out[t, self.order[:n]] = raw[first:first + n]
            first += n
        return out


class RNNTape:
    """What `rnn_forward` keeps: references to x, y and the weights; nothing is copied."""

    __slots__ = ("x", "W_ih", "W_hh", "h0", "reverse", "nonlinearity", "y", "order",
                 "sorted_lengths")

    def __init__(self, x, W_ih, W_hh, h0, reverse, nonlinearity, y, order, sorted_lengths):
        self.x, self.W_ih, self.W_hh, self.h0, self.reverse = x, W_ih, W_hh, h0, reverse
        self.nonlinearity, self.y = nonlinearity, y
        self.order, self.sorted_lengths = order, sorted_lengths


def tape_from(*, x, W_ih, W_hh, peepholes=None, W_hr=None, h0=None, c0=None, lengths=None,
              reverse=False, y, raw_gates, raw_c):
    """A tape from the arrays of an earlier one, for those who must store it as plain arrays."""
    order, sorted_lengths = _lengths(lengths, *x.shape[:2])
    return Tape(x, W_ih, W_hh, peepholes, W_hr, h0, c0, reverse, y, raw_gates, raw_c, order,
                sorted_lengths)


# ---- LSTM --------------------------------------------------------------------------------------------

def lstm_forward(x, W_ih, W_hh, b=None, h0=None, c0=None, *, peepholes=None, W_hr=None,
                 lengths=None, reverse=False, keep_tape=True, n_threads=None, packed=None):
    """Run one LSTM layer over a batch of sequences.

    Parameters
    ----------
    x : (T, B, I) float32 or float64; every other array has its dtype. Or (T, B) integers in 0..I-1:
        token ids that stand for one-hot rows, which are looked up instead of multiplied
    W_ih, W_hh : (4H, I), (4H, H), rows in the order i, f, g, o
    b : (4H,), optional
    h0, c0 : (B, H), default zeros
    peepholes : (3, H): p_i, p_f, p_o, optional
    W_hr : (P, H), optional: h is projected to P numbers, so W_hh is (4H, P), and y, h0, h_n have P
    lengths : (B,) ints in 0..T, any order: the ragged batch. y is 0 past the end of a sequence;
        h_n and c_n are those of its own last step, and h0 and c0 if its length is 0
    reverse : read each sequence from its own end to its start
    keep_tape : False for inference: nothing is saved, and the tape is None
    n_threads : int, default `get_num_threads()`; changes no bit of the result
    packed : of `functional.pack`, from the same weights, for many calls with weights that stay

    Returns
    -------
    y (T, B, H), (h_n (B, H), c_n (B, H)), tape for `lstm_backward`, with `tape.gates` and `tape.c`.
    The tape refers to the arguments and to y: do not change them before the backward pass.

    Raises
    ------
    TypeError, ValueError : with the expected and the given type or shape

    Notes
    -----
    The equations are in `lstmcore.reference`: Hochreiter and Schmidhuber (1997), with the forget gate
    of Gers, Schmidhuber and Cummins (2000).

    Examples
    --------
    >>> import numpy as np, lstmcore
    >>> T, B, I, H = 5, 2, 3, 4
    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((T, B, I))
    >>> W_ih, W_hh = rng.standard_normal((4 * H, I)), rng.standard_normal((4 * H, H))
    >>> y, (h_n, c_n), tape = lstmcore.lstm_forward(x, W_ih, W_hh, lengths=[5, 2])
    >>> y.shape, bool((y[1, 1] == h_n[1]).all()), float(abs(y[2:, 1]).max())
    ((5, 2, 4), True, 0.0)
    """
    x, T, B, I, H, K, dtype = _sequence(x, W_ih, W_hh, 4, W_hr)
    W_ih = checks.array(W_ih, "W_ih", "(4H, I)", (4 * H, I), dtype)
    W_hh = checks.array(W_hh, "W_hh", "(4H, H)" if W_hr is None else "(4H, P)", (4 * H, K), dtype)
    b = checks.optional(b, "b", "(4H,)", (4 * H,), dtype)
    h0 = checks.optional(h0, "h0", "(B, H)" if W_hr is None else "(B, P)", (B, K), dtype)
    c0 = checks.optional(c0, "c0", "(B, H)", (B, H), dtype)
    peepholes = checks.optional(peepholes, "peepholes", "(3, H)", (3, H), dtype)
    W_hr = checks.optional(W_hr, "W_hr", "(P, H)", (K, H), dtype)
    order, sorted_lengths = _lengths(lengths, T, B)
    tokens = T * B if order is None else int(sorted_lengths.sum())
    n_threads = _threads(n_threads, tokens, 4 * H, I + K)

    y = _kernels.empty((T, B, K), dtype) if order is None else np.zeros((T, B, K), dtype)
    h_n, c_n = np.empty((B, K), dtype), np.empty((B, H), dtype)
    gates = c = tape = None
    if keep_tape:
        gates, c = (_kernels.empty((tokens, n), dtype) for n in (4 * H, H))
        tape = Tape(x, W_ih, W_hh, peepholes, W_hr, h0, c0, bool(reverse), y, gates, c, order,
                    sorted_lengths)
    if tokens:
        rows, b = _table(x, W_ih, b)
        _kernels.run_forward("lstm", rows, W_ih, W_hh, b, W_hr, h0, c0, peepholes, order,
                             sorted_lengths, bool(reverse), y, h_n, c_n, gates, c, n_threads,
                             _packed(packed, W_hh))
    else:
        h_n[...] = 0 if h0 is None else h0
        c_n[...] = 0 if c0 is None else c0
    return y, (h_n, c_n), tape


def lstm_backward(tape, dy, dh_n=None, dc_n=None, *, n_threads=None):
    """Gradients of a loss through `lstm_forward`, by backpropagation through time.

    Parameters
    ----------
    tape : of `lstm_forward`; it can be used once, because its gates become their gradients
    dy : (T, B, H), the gradient of the loss with respect to y; ignored past the end of a sequence
    dh_n, dc_n : (B, H), those with respect to the final states, default zeros

    Returns
    -------
    Gradients(dx, dW_ih, dW_hh, db, dpeepholes, dh0, dc0, dW_hr), a named tuple of arrays shaped as
    what they belong to; dpeepholes and dW_hr are None where the forward pass had none, and dx is None
    for token ids

    Raises
    ------
    TypeError, ValueError : with the expected and the given type or shape; or the tape is spent

    Examples
    --------
    >>> import numpy as np, lstmcore
    >>> rng = np.random.default_rng(0)
    >>> x, W_ih, W_hh = (rng.standard_normal(shape) for shape in ((5, 2, 3), (16, 3), (16, 4)))
    >>> y, _, tape = lstmcore.lstm_forward(x, W_ih, W_hh)
    >>> g = lstmcore.lstm_backward(tape, dy=np.ones_like(y))
    >>> g.dx.shape, g.dW_hh.shape, g.dpeepholes
    ((5, 2, 3), (16, 4), None)
    """
    if not isinstance(tape, Tape):
        raise TypeError(f"tape must be one of lstm_forward, got {type(tape).__qualname__}")
    tape.check_unspent()
    x, W_ih, W_hh, W_hr, y = tape.x, tape.W_ih, tape.W_hh, tape.W_hr, tape.y
    (T, B, K), I, H, dtype = y.shape, W_ih.shape[1], W_hh.shape[0] // 4, y.dtype
    dy = checks.array(dy, "dy", "(T, B, H)" if W_hr is None else "(T, B, P)", (T, B, K), dtype)
    dh_n = checks.optional(dh_n, "dh_n", "(B, H)" if W_hr is None else "(B, P)", (B, K), dtype)
    dc_n = checks.optional(dc_n, "dc_n", "(B, H)", (B, H), dtype)
    tokens = len(tape.raw_gates) if tape.order is not None else T * B
    n_threads = _threads(n_threads, tokens, 4 * H, I + K)
    dx = _gradient_of_x(x, tape.order)
    dh0 = np.zeros((B, K), dtype) if dh_n is None else dh_n.copy()
    dc0 = np.zeros((B, H), dtype) if dc_n is None else dc_n.copy()
    dW_ih, dW_hh = _gradient_of_W(x, W_ih), _kernels.empty(W_hh.shape, dtype)
    db = np.empty(4 * H, dtype)
    dpeepholes = None if tape.peepholes is None else np.empty((3, H), dtype)
    dW_hr = None if W_hr is None else np.empty_like(W_hr)
    g = Gradients(dx, dW_ih, dW_hh, db, dpeepholes, dh0, dc0, dW_hr)
    tape.spent = True
    if tokens:
        _kernels.run_backward("lstm", x, W_ih, W_hh, W_hr, tape.h0, tape.c0, tape.peepholes,
                              tape.order, tape.sorted_lengths, tape.reverse, y, tape.raw_gates,
                              tape.raw_c, dy, _last_dy(tape, dy, dh_n), dx, _as_table(dW_ih, x),
                              *g[2:], n_threads)
    else:
        _zero_sums(dW_ih, dW_hh, db, dpeepholes, dW_hr)
    return g


def _gradient_of_x(x, order):
    """Room for dx: None for token ids, zeros where a ragged batch has no tokens."""
    if x.ndim == 2:
        return None
    return _kernels.empty(x.shape, x.dtype) if order is None else np.zeros(x.shape, x.dtype)


def _gradient_of_W(x, W_ih):
    """Room for dW_ih (4H, I): for token ids the view of a table (I, 4H) of zeros."""
    if x.ndim == 3:
        return _kernels.empty(W_ih.shape, W_ih.dtype)
    table = _kernels.empty(W_ih.shape[::-1], W_ih.dtype)
    table.fill(0)
    return table.T


def _as_table(dW_ih, x):
    return dW_ih if x.ndim == 3 else dW_ih.T


def _last_dy(tape, dy, dh_n):
    """dy of each row's last step plus dh_n, in the order of the batch; None without dh_n."""
    if dh_n is None:
        return None
    T, B = dy.shape[:2]
    if tape.order is None:
        return dy[0 if tape.reverse else T - 1] + dh_n
    last = np.zeros(B, np.int64)
    if not tape.reverse:
        last[tape.order] = np.maximum(tape.sorted_lengths - 1, 0)
    return dy[last, np.arange(B)] + dh_n


def _zero_sums(*sums):
    for d in sums:
        if d is not None:
            d[...] = 0


# ---- vanilla RNN -------------------------------------------------------------------------------------

def rnn_forward(x, W_ih, W_hh, b=None, h0=None, *, nonlinearity="tanh", lengths=None, reverse=False,
                keep_tape=True, n_threads=None):
    """Run one vanilla (Elman) RNN layer: h_t = tanh(x_t W_ihᵀ + h_{t-1} W_hhᵀ + b), or relu.

    Parameters are those of `lstm_forward`, with W_ih (H, I), W_hh (H, H), b (H,), and nonlinearity
    "tanh" or "relu". Returns y (T, B, H), h_n (B, H), tape.

    Examples
    --------
    >>> import numpy as np, lstmcore
    >>> rng = np.random.default_rng(0)
    >>> x, W_ih, W_hh = (rng.standard_normal(shape) for shape in ((5, 2, 3), (4, 3), (4, 4)))
    >>> y, h_n, tape = lstmcore.rnn_forward(x, W_ih, W_hh)
    >>> bool((y[-1] == h_n).all())
    True
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f'nonlinearity must be "tanh" or "relu", got {nonlinearity!r}')
    x, T, B, I, H, _, dtype = _sequence(x, W_ih, W_hh, 1)
    W_ih = checks.array(W_ih, "W_ih", "(H, I)", (H, I), dtype)
    W_hh = checks.array(W_hh, "W_hh", "(H, H)", (H, H), dtype)
    b = checks.optional(b, "b", "(H,)", (H,), dtype)
    h0 = checks.optional(h0, "h0", "(B, H)", (B, H), dtype)
    order, sorted_lengths = _lengths(lengths, T, B)
    tokens = T * B if order is None else int(sorted_lengths.sum())
    n_threads = _threads(n_threads, tokens, H, I + H)
    y = _kernels.empty((T, B, H), dtype) if order is None else np.zeros((T, B, H), dtype)
    h_n = np.empty((B, H), dtype)
    if tokens:
        rows, b = _table(x, W_ih, b)
        _kernels.run_forward(nonlinearity, rows, W_ih, W_hh, b, None, h0, None, None, order,
                             sorted_lengths, bool(reverse), y, h_n, None, None, None, n_threads)
    else:
        h_n[...] = 0 if h0 is None else h0
    tape = RNNTape(x, W_ih, W_hh, h0, bool(reverse), nonlinearity, y, order, sorted_lengths)
    return y, h_n, tape if keep_tape else None


def rnn_backward(tape, dy, dh_n=None, *, n_threads=None):
    """Gradients through `rnn_forward`: dy (T, B, H), dh_n (B, H).

    Returns RNNGradients(dx, dW_ih, dW_hh, db, dh0), a named tuple.

    Examples
    --------
    >>> import numpy as np, lstmcore
    >>> rng = np.random.default_rng(0)
    >>> x, W_ih, W_hh = (rng.standard_normal(shape) for shape in ((5, 2, 3), (4, 3), (4, 4)))
    >>> y, h_n, tape = lstmcore.rnn_forward(x, W_ih, W_hh, nonlinearity="relu")
    >>> lstmcore.rnn_backward(tape, np.ones_like(y)).dW_hh.shape
    (4, 4)
    """
    if not isinstance(tape, RNNTape):
        raise TypeError(f"tape must be one of rnn_forward, got {type(tape).__qualname__}")
    x, W_ih, W_hh, y = tape.x, tape.W_ih, tape.W_hh, tape.y
    (T, B, H), I, dtype = y.shape, W_ih.shape[1], y.dtype
    dy = checks.array(dy, "dy", "(T, B, H)", (T, B, H), dtype)
    dh_n = checks.optional(dh_n, "dh_n", "(B, H)", (B, H), dtype)
    tokens = T * B if tape.order is None else int(tape.sorted_lengths.sum())
    n_threads = _threads(n_threads, tokens, H, I + H)
    dx = _gradient_of_x(x, tape.order)
    dh0 = np.zeros((B, H), dtype) if dh_n is None else dh_n.copy()
    dW_ih, dW_hh = _gradient_of_W(x, W_ih), _kernels.empty(W_hh.shape, dtype)
    db = np.empty(H, dtype)
    if tokens:
        _kernels.run_backward(tape.nonlinearity, x, W_ih, W_hh, None, tape.h0, None, None, tape.order,
                              tape.sorted_lengths, tape.reverse, y, None, None, dy,
                              _last_dy(tape, dy, dh_n), dx, _as_table(dW_ih, x), dW_hh, db, None,
                              dh0, None, None, n_threads)
    else:
        _zero_sums(dW_ih, dW_hh, db)
    return RNNGradients(dx, dW_ih, dW_hh, db, dh0)


# ---- one step at a time ------------------------------------------------------------------------------

class Step:
    """One layer, one step per call, with its state h (B, H) and c (B, H): for streams.

    The weights are packed once, as they are now; a call allocates nothing but what it returns, and
    nothing at all with `out`.

    >>> import numpy as np
    >>> from lstmcore.functional import Step
    >>> step = Step("lstm", 1, np.ones((8, 3)), np.ones((8, 2)))
    >>> step(np.zeros((1, 3))).shape
    (1, 2)
    """

    def __init__(self, cell, batch_size, W_ih, W_hh, b=None, peepholes=None, W_hr=None, *,
                 n_threads=None):
        B, dtype = batch_size, W_ih.dtype
        H, K = len(W_hh) // (4 if cell == "lstm" else 1), W_hh.shape[1]
        W_ih, W_hh, b, peepholes, W_hr = (None if a is None else a.copy()
                                          for a in (W_ih, W_hh, b, peepholes, W_hr))
        self.h, self.c = np.zeros((B, K), dtype), np.zeros((B, H), dtype)
        self._x_shape, self._y_shape, self._dtype = (B, W_ih.shape[1]), (B, K), dtype
        self._weights, self._table = (cell, W_ih, W_hh, b, W_hr, peepholes), None
        self._packed = _kernels.Packed(cell, W_ih, W_hh, W_hr)
        # A step reads all weights once: a second thread helps if they do not fit near one core.
        self._n_threads = n_threads if W_ih.nbytes + W_hh.nbytes > 1 << 20 else 1

    def __call__(self, x_t, out=None):
        """x_t (B, I), or token ids (B,) -> h_t (B, H), in `out` if it is given."""
        cell, W_ih, W_hh, b, W_hr, peepholes = self._weights
        if not _kernels.fits(x_t, self._x_shape, self._dtype == F64):
            x_t, b = self._checked(x_t, b)
        out = self.room(out)
        _kernels.run_step(cell, x_t, W_ih, W_hh, b, W_hr, peepholes, self.h, self.c, out,
                          resolve(self._n_threads), self._packed)
        return out

    def room(self, out):
        """`out`, found fit to take h_t, or a new array if it is None."""
        if out is None:
            return np.empty(self._y_shape, self._dtype)
        if not _kernels.fits(out, self._y_shape, self._dtype == F64) or not out.flags.writeable:
            raise ValueError(f"out must be a writable C-contiguous {self._dtype} array of shape "
                             f"{self._y_shape}, got {getattr(out, 'shape', type(out).__name__)}")
        return out

    def _checked(self, x_t, b):
        """x_t contiguous with the bias; or token ids with the table that they look up."""
        x_t, (B, I) = np.asanyarray(x_t), self._x_shape
        if x_t.dtype.kind not in "iu":
            return checks.array(x_t, "x_t", "(B, I)", (B, I), self._dtype), b
        x_t = checks.ids(x_t, "token ids", I, (B,), "I")
        if self._table is None:
            self._table = _projected(self._weights[1].T, b)
        return x_t, self._table


def pack(cell, W_ih, W_hh=None, W_hr=None):
    """Weights arranged for many calls with packed=; they must not change as long as it is used.

    cell: "lstm", or "linear" for a dense layer's W_ih alone. `Module.freeze` does this for a model.

    >>> import numpy as np
    >>> from lstmcore import lstm_forward
    >>> from lstmcore.functional import pack
    >>> W_ih, W_hh = np.ones((8, 3)), np.ones((8, 2))
    >>> packed = pack("lstm", W_ih, W_hh)
    >>> lstm_forward(np.zeros((5, 1, 3)), W_ih, W_hh, packed=packed)[0].shape
    (5, 1, 2)
    """
    return _kernels.Packed(cell, W_ih, W_hh, W_hr)


# ---- the machine -------------------------------------------------------------------------------------

def info():
    """What runs here: version, instruction sets, BLAS, threads and OpenMP, as a dict.

    forked: whether this is a child of fork(), where every call runs on one thread.

    >>> import lstmcore
    >>> sorted(lstmcore.info())
    ['available_isas', 'blas', 'compiler', 'forked', 'isa', 'n_threads', 'openmp', 'version']
    """
    import scipy.linalg  # noqa: F401  (loads the BLAS that is reported)
    from threadpoolctl import threadpool_info

    from lstmcore import __version__

    blas = sorted({f"{pool['internal_api']} {pool['version']} ({pool.get('architecture', '?')})"
                   for pool in threadpool_info() if pool["user_api"] == "blas"})
    return {"version": __version__, "isa": _kernels.isa(),
            "available_isas": _kernels.available_isas(), "blas": ", ".join(blas) or "unknown",
            "n_threads": get_num_threads(), "compiler": _kernels.compiler(),
            "openmp": _kernels.has_openmp(), "forked": _kernels.is_forked()}
