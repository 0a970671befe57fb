"""One layer, one direction: check the arguments, allocate the results, call the kernels.

Signatures and meaning are those of `lstmcore.reference`. Arrays that are not C-contiguous are copied;
nothing is cast, no argument is written to, and no result aliases an argument. What a call keeps for a
later one (a tape, packed weights, a step) remembers what it was made of, and is compared with it.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from lstmcore import _backward, _forward, _kernels, _products, arguments, checks
from lstmcore._memory import empty
from lstmcore._recurrence import cell as cell_row  # the row of a cell, by name
from lstmcore._types import Array, Compute, Floats, Lengths
from lstmcore.arguments import Batch, Cell, Room, TokenIds, TokenTable, Upstream
from lstmcore.packing import Step, pack
from lstmcore.precision import Quantized, format_of_call
from lstmcore.reference import Gradients, GRUGradients, RNNGradients
from lstmcore.tapes import GRUTape, RNNTape, Tape
from lstmcore.threads import get_num_threads, resolve
from lstmcore.variants import LAYER_NORMS, Variant

__all__ = ["lstm_forward", "lstm_backward", "gru_forward", "gru_backward", "rnn_forward", "rnn_backward",
           "pack", "Quantized", "Step", "Variant", "Gradients", "GRUGradients", "RNNGradients", "Tape",
           "GRUTape", "RNNTape", "TokenIds", "TokenTable", "Cell", "tape_from", "info"]

_NORMED = {rows: cell for cell, rows in LAYER_NORMS.values()}  # by the rows of norms


# ---- a layer -----------------------------------------------------------------------------------------

def _run_forward(name, x, W_ih, W_hh, b, h0, c0, *, peepholes=None, W_hr=None, lengths, reverse,
                 keep_tape, n_threads, packed=None, compute=None, variant=None, norms=None):
    """What the forward passes of all cells have in common: y, h_n, c_n and the pieces of a tape."""
    cell = cell_row(name)
    x, sizes = arguments.sizes_of(cell, x, W_ih, W_hh, W_hr)
    T, B, I, H, K, dtype = sizes
    looked_up = isinstance(x, TokenIds)
    x = arguments.inputs_of(x, sizes)
    if packed is not None:
        packed = arguments.found_packed(packed, name, (W_ih, W_hh, W_hr), looked_up)
    format = format_of_call(compute, dtype, packed)
    if format == "int8" and keep_tape:
        raise ValueError("weights packed as int8 are for inference: keep_tape must be False")
    weights = arguments.weights_of(cell, sizes, W_ih, W_hh, b, peepholes, W_hr, looked_up, format)
    if norms is not None:
        weights = arguments.norms_of(cell, norms, sizes, weights)
    if h0 is not None or c0 is not None:
        h0, c0 = arguments.states_of(cell, sizes, h0, c0, ("h0", "c0"), W_hr is not None)
    order, lengths = (None, None) if lengths is None else arguments.order_of(lengths, T, B)
    tokens = T * B if order is None else int(lengths.sum())
    y = empty((T, B, K), dtype) if order is None else np.zeros((T, B, K), dtype)
    h_n, c_n = np.empty((B, K), dtype), np.empty((B, H), dtype) if cell.has_c else None
    gates = c = ax = ah = moments = raw = None
    if keep_tape and cell.keeps_gates:
        gates = empty((tokens, cell.gates * H), dtype)
        if cell.norms:
            ax, ah = (empty((tokens, cell.gates * H), dtype) for _ in range(2))
            moments = np.empty((tokens, cell.moments), dtype)
            raw = empty((tokens, H), dtype) if cell.keeps_raw else None
        c = empty((tokens, H), dtype) if cell.has_c else None
    m = None
    if variant is not None:
        variant = arguments.variant_of(variant, sizes, h0, peepholes is not None, W_hr is not None)
        m = None if variant.mask is None else empty((tokens, H), dtype)
    batch = Batch(x, h0, c0, order, lengths, bool(reverse), None, variant)
    n_threads = arguments.threads_for(n_threads, tokens, cell.gates * H, K if looked_up else I + K)
    if tokens:
        run = batch
        if looked_up:
            ids, table = arguments.look_up(cell, x, weights.W_ih, None if cell.norms else weights.b,
                                           packed and packed.quantized)
            run = batch._replace(x=ids, table=table)
        turned = weights._replace(b=arguments.turn(cell, weights.b)) if cell.turn else weights
        _forward.run(cell, turned, run, Room(y, h_n, c_n, gates, c, m, ax, ah, moments, raw),
                     packed=packed, n_threads=n_threads)
    else:
        for final, initial in (h_n, h0), (c_n, c0):
            if final is not None:
                final[...] = 0 if initial is None else initial
    return y, h_n, c_n, (cell, sizes, weights, batch, tokens, y), (gates, c, m, ax, ah, moments, raw)


def _run_backward(kind, of, tape, dy, dh_n, dc_n, n_threads):
    """What the backward passes of all cells have in common: `Gradients`. tape: of this kind."""
    if not isinstance(tape, kind):
        raise TypeError(f"tape must be one of {of}, got {type(tape).__qualname__}")
    dy, dh_n, dc_n = _checked_upstream(tape, dy, dh_n, dc_n)
    if n_threads is not None:
        resolve(n_threads)
    gates, c, m, ax, ah, moments, raw = tape.take()
    cell, sizes, weights, batch, y = tape.cell, tape.sizes, tape.weights, tape.batch, tape.y
    T, B, I, H, K, dtype = sizes
    looked_up = isinstance(batch.x, TokenIds)
    tokens, G, rows = tape.tokens, cell.gates * H, cell.fed * H
    ragged = batch.order is not None
    dx = dW_ih = dtable = None
    if looked_up:
        dtable = empty((I, G), dtype)
        dtable.fill(0)
    else:
        dx, dW_ih = (np.zeros if ragged else empty)((T, B, I), dtype), empty((rows, I), dtype)
    g = Gradients(
        dx, dW_ih, empty((rows, K), dtype), np.empty(G, dtype),
        None if weights.peepholes is None else np.empty((3, H), dtype),
        np.zeros((B, K), dtype) if dh_n is None else np.array(dh_n),
        None if not cell.has_c else np.zeros((B, H), dtype) if dc_n is None else np.array(dc_n),
        None if weights.W_hr is None else np.empty((K, H), dtype),
        None if weights.norms is None else np.zeros_like(weights.norms))
    if tokens:
        if looked_up:
            batch = batch._replace(x=batch.x.array)
        dm0 = None if m is None else np.zeros((B, K), dtype)
        _backward.run(cell, weights, batch, Room(y, None, None, gates, c, m, ax, ah, moments, raw),
                      Upstream(dy, None if cell.reads_h else _last_dy(batch, dy, dh_n), dm0), g,
                      dtable=dtable,
                      n_threads=arguments.threads_for(n_threads, tokens, G, K if looked_up else I + K))
        if m is not None:
            np.add(g.dh0, dm0 * batch.variant.mask, out=g.dh0)
    else:
        for d in g.dW_ih, g.dW_hh, g.db, g.dpeepholes, g.dW_hr, g.dnorms:
            if d is not None:
                d[...] = 0
    if looked_up:
        dtable = arguments.turn(cell, dtable, back=True)
        g = g._replace(dW_ih=dtable if type(weights.W_ih) is TokenTable else dtable[:, :rows].T)
    return g


def _last_dy(batch, dy, dh_n):
    """dy of each row's last step plus dh_n, in the order of the batch; None without dh_n."""
    if dh_n is None:
        return None
    T, B = dy.shape[:2]
    if batch.order is None:
        return dy[0 if batch.reverse else T - 1] + dh_n
    last = np.zeros(B, np.int64)
    if not batch.reverse:
        last[batch.order] = np.maximum(batch.lengths - 1, 0)
    return dy[last, np.arange(B)] + dh_n


def _checked_upstream(tape, dy, dh_n, dc_n):
    """The gradients that come from above, found to fit the tape, which is still what it was."""
    tape.check()
    (T, B, _, _, K, dtype), projected = tape.sizes, tape.weights.W_hr is not None
    dy = checks.array(dy, "dy", "(T, B, P)" if projected else "(T, B, H)", (T, B, K), dtype)
    return np.asarray(dy), *arguments.states_of(tape.cell, tape.sizes, dh_n, dc_n, ("dh_n", "dc_n"),
                                                projected)


def tape_from(name: Cell = "lstm", *, x: Array, W_ih: Floats, W_hh: Floats,
              peepholes: Floats | None = None, W_hr: Floats | None = None,
              h0: Floats | None = None, c0: Floats | None = None, lengths: Lengths = None,
              reverse: bool = False, y: Floats, raw_gates: Floats | None = None,
              raw_c: Floats | None = None, compute: Compute | None = None,
              ) -> Tape | GRUTape | RNNTape:
    """A cell's tape from the arrays of an earlier one, for those who must store it as plain arrays.

    raw_gates (tokens, G) is written to by the backward pass, so it shares no memory with the
    others. It and raw_c are None if the cell keeps none.
    """
    cell = cell_row(name)
    x, sizes = arguments.sizes_of(cell, x, W_ih, W_hh, W_hr)
    weights = arguments.weights_of(cell, sizes, W_ih, W_hh, None, peepholes, W_hr, isinstance(x, TokenIds),
                       format_of_call(compute, sizes.dtype))
    h0, c0 = arguments.states_of(cell, sizes, h0, c0, ("h0", "c0"), W_hr is not None)
    T, B, _, H, K, dtype = sizes
    order, lengths = arguments.order_of(lengths, T, B)
    batch = Batch(arguments.inputs_of(x, sizes), h0, c0, order, lengths, bool(reverse), None)
    tokens = T * B if order is None else int(lengths.sum())
    y = checks.array(y, "y", "(T, B, H)" if W_hr is None else "(T, B, P)", (T, B, K), dtype)
    made, kept = (cell, sizes, weights, batch, tokens, y), {"raw_gates": raw_gates, "raw_c": raw_c}
    for part, has in (("raw_gates", cell.keeps_gates), ("raw_c", cell.has_c)):
        if (kept[part] is not None) != has:
            raise TypeError(f"{part} must be {'an array' if has else 'None'} for a {name} cell, got "
                            f"{type(kept[part]).__name__}")
    if cell.has_c:
        raw_c = checks.array(raw_c, "raw_c", "(tokens, H)", (tokens, H), dtype)
    if cell.keeps_gates:
        x = getattr(batch.x, "array", batch.x)
        checks.out("raw_gates", raw_gates, (tokens, cell.gates * H), dtype, y, raw_c, x,
                   *weights[1:5], h0, c0)
    tape: Tape | GRUTape | RNNTape
    if cell.keeps_gates:
        tape = (Tape if cell.has_c else GRUTape)(*made, raw_gates, raw_c)
    else:
        tape = RNNTape(*made)
    tape.check()
    return tape


# ---- LSTM --------------------------------------------------------------------------------------------

def lstm_forward(x: Array, W_ih: Floats, W_hh: Floats, b: Floats | None = None,
                 h0: Floats | None = None, c0: Floats | None = None, *,
                 peepholes: Floats | None = None, W_hr: Floats | None = None,
                 lengths: Lengths = None, reverse: bool = False, keep_tape: bool = True,
                 n_threads: int | None = None, packed: _products.Packed | None = None,
                 compute: Compute | None = None, variant: Variant | None = None,
                 norms: Floats | None = None) -> tuple[Floats, tuple[Floats, Floats], Tape | Any]:
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
    compute : "bfloat16" rounds the operands of every product, here and in `lstm_backward`, to
        bfloat16 (x, h, the weights, and da there); sums, states, bias and results stay float32. By
        default the dtype of the arrays, or what `packed` is of
    variant : a `Variant`: other activations, clipping, f = 1 - i, zoneout, recurrent dropout; without
        projection. `packed` is then of "lstm_varied"
    norms : optional, in float32 and float64, with no other option. (10, H): layer normalization (Ba et
        al. 2016) of x W_ihᵀ and h W_hhᵀ, by the gammas in rows 0 to 3 and 4 to 7, and of c where h is
        made of it, by gamma and beta in rows 8 and 9; `packed` is then of "lstm_norm". (6, H): of each
        gate's x W_ihᵀ + h W_hhᵀ, by the gammas in rows 0 to 3, and of c, which goes on normalized, by
        gamma and beta in rows 4 and 5; `packed` is then of "lstm_norm_gates"

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
    y, h_n, c_n, made, kept = _run_forward(
        _name_of(variant, norms), x, W_ih, W_hh, b, h0, c0, peepholes=peepholes,
        W_hr=W_hr, lengths=lengths, reverse=reverse, keep_tape=keep_tape, n_threads=n_threads,
        packed=packed, compute=compute, variant=variant, norms=norms)
    return y, (h_n, c_n), Tape(*made, *kept) if keep_tape else None


def _name_of(variant, norms):
    """The cell of an LSTM."""
    if variant is not None and norms is not None:
        raise ValueError("an LSTM with norms has no variant")
    if norms is not None:       # the cell says what is wrong with those that are of none
        return _NORMED.get(len(norms) if np.ndim(norms) else 0, "lstm_norm")
    return "lstm" if variant is None else "lstm_varied"


def lstm_backward(tape: Tape, dy: Floats, dh_n: Floats | None = None, dc_n: Floats | None = None, *,
                  n_threads: int | None = None) -> Gradients:
    """Gradients of a loss through `lstm_forward`, by backpropagation through time.

    Parameters
    ----------
    tape : of `lstm_forward`; it can be used once, because its gates become their gradients
    dy : (T, B, H), the gradient of the loss with respect to y; ignored past the end of a sequence
    dh_n, dc_n : (B, H), those with respect to the final states, default zeros

    Returns
    -------
    Gradients(dx, dW_ih, dW_hh, db, dpeepholes, dh0, dc0, dW_hr, dnorms), a named tuple of arrays shaped as
    what they belong to; dpeepholes, dW_hr and dnorms are None where the forward pass had none, and dx is
    None for token ids

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
    return _run_backward(Tape, "lstm_forward", tape, dy, dh_n, dc_n, n_threads)


# ---- vanilla RNN -------------------------------------------------------------------------------------

def rnn_forward(x: Array, W_ih: Floats, W_hh: Floats, b: Floats | None = None,
                h0: Floats | None = None, *, nonlinearity: Literal["tanh", "relu"] = "tanh",
                lengths: Lengths = None, reverse: bool = False, keep_tape: bool = True,
                n_threads: int | None = None, packed: _products.Packed | None = None,
                compute: Compute | None = None,
                ) -> tuple[Floats, Floats, RNNTape | Any]:
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
    y, h_n, _, made, _ = _run_forward(nonlinearity, x, W_ih, W_hh, b, h0, None, lengths=lengths,
                                      reverse=reverse, keep_tape=keep_tape, n_threads=n_threads,
                                      packed=packed, compute=compute)
    return y, h_n, RNNTape(*made) if keep_tape else None


def rnn_backward(tape: RNNTape, dy: Floats, dh_n: Floats | None = None, *,
                 n_threads: int | None = None) -> RNNGradients:
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
    g = _run_backward(RNNTape, "rnn_forward", tape, dy, dh_n, None, n_threads)
    return RNNGradients(g.dx, g.dW_ih, g.dW_hh, g.db, g.dh0)


# ---- GRU ---------------------------------------------------------------------------------------------

def gru_forward(x: Array, W_ih: Floats, W_hh: Floats, b: Floats | None = None,
                h0: Floats | None = None, *, reset_after: bool = True, lengths: Lengths = None,
                reverse: bool = False, keep_tape: bool = True, n_threads: int | None = None,
                packed: _products.Packed | None = None, compute: Compute | None = None,
                ) -> tuple[Floats, Floats, GRUTape | Any]:
    """Run one GRU layer over a batch of sequences.

    Parameters
    ----------
    x, h0, lengths, reverse, keep_tape, n_threads, packed, compute : as for `lstm_forward`
    W_ih, W_hh : (3H, I), (3H, H), rows in the order r, z, n
    b : (4H,), optional: b_r, b_z, b_n and b_hn, the one that is reset. PyTorch's two biases are
        b_ir + b_hr, b_iz + b_hz, b_in and b_hn. Without reset_after (3H,): b_r, b_z, b_n
    reset_after : True: the reset gate multiplies W_hn h_{t-1} + b_hn, as in PyTorch, in Keras by
        default, and in ONNX with linear_before_reset = 1. False: it multiplies h_{t-1}

    Returns
    -------
    y (T, B, H), h_n (B, H), tape for `gru_backward`, with `tape.gates`

    Raises
    ------
    TypeError, ValueError : with the expected and the given type or shape

    Notes
    -----
    The equations are in `lstmcore.reference`: Cho et al. (2014), where the reset gate comes before the
    product.

    Examples
    --------
    >>> import numpy as np, lstmcore
    >>> rng = np.random.default_rng(0)
    >>> x, W_ih, W_hh = (rng.standard_normal(shape) for shape in ((5, 2, 3), (12, 3), (12, 4)))
    >>> y, h_n, tape = lstmcore.gru_forward(x, W_ih, W_hh)
    >>> y.shape, bool((y[-1] == h_n).all())
    ((5, 2, 4), True)
    """
    y, h_n, _, made, kept = _run_forward(
        "gru" if reset_after else "gru_before", x, W_ih, W_hh, b, h0, None, lengths=lengths,
        reverse=reverse, keep_tape=keep_tape, n_threads=n_threads, packed=packed, compute=compute)
    return y, h_n, GRUTape(*made, *kept) if keep_tape else None


def gru_backward(tape: GRUTape, dy: Floats, dh_n: Floats | None = None, *,
                 n_threads: int | None = None) -> GRUGradients:
    """Gradients through `gru_forward`: dy (T, B, H), dh_n (B, H); a tape can be used once.

    Returns GRUGradients(dx, dW_ih, dW_hh, db, dh0), a named tuple; dx is None for token ids.

    Examples
    --------
    >>> import numpy as np, lstmcore
    >>> rng = np.random.default_rng(0)
    >>> x, W_ih, W_hh = (rng.standard_normal(shape) for shape in ((5, 2, 3), (12, 3), (12, 4)))
    >>> y, h_n, tape = lstmcore.gru_forward(x, W_ih, W_hh, reset_after=False)
    >>> lstmcore.gru_backward(tape, np.ones_like(y)).dW_hh.shape
    (12, 4)
    """
    g = _run_backward(GRUTape, "gru_forward", tape, dy, dh_n, None, n_threads)
    return GRUGradients(g.dx, g.dW_ih, g.dW_hh, g.db, g.dh0)


# ---- the machine -------------------------------------------------------------------------------------

def info() -> dict[str, Any]:
    """What runs here: version, instruction sets, BLAS, threads and OpenMP, as a dict.

    blas: also whether SciPy's may be used at all, where the compiler has no vectors: only if the bits of
    a row do not depend on its place among others there.

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
    blas = ", ".join(blas) or "unknown"
    if not _products.blas_fits():
        blas += "; not used: a row's bits depend on its place"
    return {"version": __version__, "isa": _kernels.isa(),
            "available_isas": _kernels.available_isas(), "blas": blas,
            "n_threads": get_num_threads(), "compiler": _kernels.compiler(),
            "openmp": _kernels.has_openmp(), "forked": _kernels.is_forked()}
