"""The arguments of one layer in one direction: token ids, and checks that all fits together.

Nothing here computes: `lstmcore.functional` asks, and its errors are these. Of a cell only its row is
known (`lstmcore._recurrence.cell`).
"""

from __future__ import annotations

import functools
from collections import namedtuple
from typing import Any, Literal, TypeAlias

import numpy as np

from lstmcore import _products, checks, scalars
from lstmcore._types import ArrayLike, Floats, Ints
from lstmcore.checks import F32, F64
from lstmcore.precision import format_of_call
from lstmcore.threads import get_num_threads, resolve
from lstmcore.variants import Variant

_SERIAL_WORK = 1_000_000  # multiply-adds that are done before a second thread pays: about 20 µs

Cell: TypeAlias = Literal["lstm", "lstm_varied", "lstm_norm", "lstm_norm_gates", "tanh", "relu", "gru",
                          "gru_before"]

# What goes to the plans, by name.
Sizes = namedtuple("Sizes", "T B I H K dtype")
Weights = namedtuple("Weights", "W_ih W_hh b peepholes W_hr format norms", defaults=[None])
Batch = namedtuple("Batch", "x h0 c0 order lengths reverse table variant", defaults=[None])
Room = namedtuple("Room", "y h_n c_n gates c m ax ah moments raw", defaults=[None] * 5)
Upstream = namedtuple("Upstream", "dy dy_last dm0")
Varied = namedtuple("Varied", "gate candidate cell clip coupled zones mask zone m0")


# ---- token ids ---------------------------------------------------------------------------------------

class TokenIds:
    """Token ids (T, B) in 0..size-1: an own copy, checked once, for several calls.

    >>> import numpy as np
    >>> from lstmcore.functional import TokenIds
    >>> TokenIds(np.array([[3, 1], [3, 0]]), 4).shape
    (2, 2)
    """

    __slots__ = ("array", "size", "_used")

    def __init__(self, ids: ArrayLike, size: int) -> None:
        self.size, self._used = scalars.size("size", size), None
        own = checks.ids(ids, "token ids", self.size)
        own.flags.writeable = False
        self.array = own[...]       # a view of what is read-only cannot be made writable

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenIds, (self.array, self.size)    # a copy is checked like any ids

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def used(self) -> tuple[Ints, Ints]:
        """The ids that occur, and the place of each id among them, as this array."""
        if self._used is None:
            used, places = np.unique(self.array, return_inverse=True)
            self._used = used, places.reshape(self.shape)
        return self._used


class TokenTable:
    """What each of V tokens projects to, bias included: rows (V, 4H), in place of W_ih and b.

    In the backward pass dW_ih is then the gradient of the rows. They are as wide as b, in its order.
    """

    __slots__ = ("rows",)

    def __init__(self, rows: Floats) -> None:
        self.rows = rows


def look_up(cell, ids, W_ih, b, quantized=None):
    """Token ids and the table that they look up, what each projects to.

    The table is W_ihᵀ + b (I, G) or, if it has more rows than there are tokens, the rows in use.
    """
    if isinstance(W_ih, TokenTable):
        return ids.array, turn(cell, W_ih.rows)
    W_ih = quantized[0].floats() if quantized else W_ih
    if ids.array.size >= W_ih.shape[1]:
        return ids.array, project(cell, W_ih.T, b)
    used, places = ids.used()
    return places, project(cell, W_ih.T[used], b)


def project(cell, rows, b):
    apart = cell.gates - cell.fed
    if apart:          # h alone feeds the last gates: they start from the bias
        rows = np.pad(rows, ((0, 0), (0, rows.shape[1] // cell.fed * apart)))
    return np.ascontiguousarray(turn(cell, rows if b is None else rows + b))


def turn(cell, a, back=False):
    """a (..., G), in the order of b, in that of the kernels' rows of gates, which begin with the gates
    that x feeds alone; or back. It is a itself if the cell has none."""
    if not cell.turn or a is None:
        return a
    H = a.shape[-1] // cell.gates
    cut, end = (cell.fed - cell.turn if back else cell.turn) * H, cell.fed * H
    return np.concatenate([a[..., cut:end], a[..., :cut], a[..., end:]], axis=-1)


# ---- checks ------------------------------------------------------------------------------------------

# How the error messages write the shapes of a cell's arrays.
Letters = namedtuple("Letters", "W_ih W_hh b h table")


@functools.cache
def letters_of(cell, projected):
    G, fed = ("H" if gates == 1 else f"{gates}H" for gates in (cell.gates, cell.fed))
    P = "P" if projected else "H"
    return Letters(f"({fed}, I)", f"({fed}, {P})", f"({G},)", f"(B, {P})", f"(V, {G})")


def sizes_of(cell, x, W_ih, W_hh, W_hr=None):
    """The sizes and the dtype that x, W_ih, W_hh and W_hr are of, not yet compared.

    Also x: `TokenIds`, if it holds token ids.
    """
    is_table = type(W_ih) is TokenTable
    first = W_ih.rows if is_table else W_ih
    ids = type(x) is TokenIds
    if not (ids or isinstance(x, np.ndarray)):
        _refuse("x", x)
    if not isinstance(first, np.ndarray) or first.ndim != 2:
        _refuse("W_ih", first)
    if not isinstance(W_hh, np.ndarray) or W_hh.ndim != 2:
        _refuse("W_hh", W_hh)
    ids = ids or x.dtype.kind in "iu"
    dtype = W_hh.dtype if ids else x.dtype
    if dtype is not F32 and dtype is not F64 and dtype != F32 and dtype != F64:
        raise TypeError(f"{'W_hh' if ids else 'x'} must be float32 or float64, got {dtype}")
    shape, (rows, K) = x.shape, W_hh.shape
    if len(shape) != (2 if ids else 3):
        raise ValueError(f"x must be {'(T, B) of token ids' if ids else '(T, B, I)'}, got shape "
                         f"{shape}")
    if rows % cell.fed or not rows or not K:
        letters = letters_of(cell, False).W_hh
        raise ValueError(f"W_hh must be {letters}, got {W_hh.shape}")
    if is_table and not ids:
        raise TypeError(f"a table of tokens needs x to be token ids, got {x.dtype}")
    I, H = first.shape[not is_table] if ids else shape[2], rows // cell.fed
    if I == 0:
        raise ValueError(f"x must have I >= 1 inputs, got x {shape} and W_ih {first.shape}")
    if W_hr is None:
        K = H
    elif isinstance(W_hr, np.ndarray) and W_hr.ndim == 2 and W_hr.shape[1] == H and W_hr.shape[0]:
        K = W_hr.shape[0]
    else:
        raise ValueError(f"W_hr must be a (P, H) = (P, {H}) array, got "
                         f"{getattr(W_hr, 'shape', type(W_hr).__qualname__)}")
    if ids and type(x) is not TokenIds:
        x = TokenIds(x, I)
    elif ids and x.size != I:
        raise ValueError(f"token ids must be of I = {I} tokens, got of {x.size}")
    return x, Sizes(shape[0], shape[1], I, H, K, F64 if dtype == F64 else F32)


def _refuse(name, value):
    """Say why this is no matrix."""
    if isinstance(value, np.ndarray):
        raise ValueError(f"{name} must be a matrix, got shape {value.shape}")
    raise TypeError(f"{name} must be a NumPy array, got {type(value).__module__}."
                    f"{type(value).__qualname__}")


def inputs_of(x, sizes):
    return x if type(x) is TokenIds else checks.array(x, "x", "(T, B, I)", sizes[:3], sizes[5])


def weights_of(cell, sizes, W_ih, W_hh, b=None, peepholes=None, W_hr=None, looked_up=False, format=None):
    """The weights, found to be of these sizes. What is only looked up stays strided: W_ih of tokens, and
    matrices of format int8, which are read as they were packed.
    """
    _, _, I, H, K, dtype = sizes
    width, rows, letters = cell.gates * H, cell.fed * H, letters_of(cell, W_hr is not None)
    array, matrix = checks.array, found if format == "int8" else checks.array
    if type(W_ih) is TokenTable:
        W_ih = TokenTable(array(W_ih.rows, "rows of the table", letters.table, (I, width), dtype))
    elif not (looked_up and checks.unmasked("W_ih", W_ih).shape == (rows, I) and W_ih.dtype == dtype):
        W_ih = matrix(W_ih, "W_ih", letters.W_ih, (rows, I), dtype)
    return Weights(
        W_ih, matrix(W_hh, "W_hh", letters.W_hh, (rows, K), dtype),
        None if b is None else array(b, "b", letters.b, (width,), dtype),
        None if peepholes is None else array(peepholes, "peepholes", "(3, H)", (3, H), dtype),
        None if W_hr is None else matrix(W_hr, "W_hr", "(P, H)", (K, H), dtype),
        format or format_of_call(None, dtype))


def norms_of(cell, norms, sizes, weights):
    """The gammas and betas of a cell that normalizes, which has no other options."""
    if weights.peepholes is not None or weights.W_hr is not None:
        raise ValueError("an LSTM with norms has neither peepholes nor a projection")
    if weights.format not in ("float32", "float64"):
        raise ValueError(f"an LSTM with norms computes in float32 or float64, not in {weights.format}: its "
                         "means are sums over a row")
    letters = "(10, H), or (6, H) where gates are normalized,"
    return weights._replace(norms=checks.array(norms, "norms", letters, (cell.norms, sizes.H), sizes.dtype))


def found(value, name, letters, shape, dtype):
    """value, of this shape and dtype, wherever its numbers lie."""
    fits = isinstance(value, np.ndarray) and value.shape == shape and value.dtype == dtype
    return value if fits else checks.array(value, name, letters, shape, dtype)


def states_of(cell, sizes, h, c, names, projected):
    """h (B, K) and c (B, H), or None each; a cell without c takes none."""
    if h is not None:
        h = checks.array(h, names[0], letters_of(cell, projected).h, (sizes.B, sizes.K), sizes.dtype)
    if c is not None:
        c = checks.array(c, names[1], "(B, H)", (sizes.B, sizes.H), sizes.dtype)
    return h, c


def variant_of(variant, sizes, h0, peepholes, projected):
    """A `Variant` as the plans read it."""
    T, B, _, H, K, dtype = sizes
    if not isinstance(variant, Variant):
        raise TypeError(f"variant must be a Variant, got {type(variant).__qualname__}")
    if projected:
        raise ValueError("a variant has no projection: W_hr must be None")
    mask, zone = variant.h_mask, variant.zone_masks
    zones = variant.zones()
    if zone is not None:
        zone = checks.array(zone, "zone_masks", "(T, B, 2, H)", (T, B, 2, H), dtype)
    if mask is not None:
        mask = checks.array(mask, "h_mask", "(B, H)", (B, H), dtype)
    zones = zones if any(zones) or zone is not None else None
    if zones and peepholes:
        raise ValueError("peepholes cannot look at a c with zoneout: leave out one of them")
    m0 = None if mask is None or h0 is None else h0 * mask
    return Varied(*variant.activations(), variant.clip, bool(variant.coupled), zones, mask, zone, m0)


def order_of(lengths, T, B):
    """None, or lengths (B,) in 0..T with the order of the rows, longest first."""
    if lengths is None:
        return None, None
    lengths = checks.lengths(lengths, T, B)
    order = np.argsort(-lengths, kind="stable")
    return order, lengths[order]


def check_order(tape):
    """An error unless order and lengths, by which the kernels index, are still of `_order`."""
    order, lengths, (T, B) = tape.batch.order, tape.batch.lengths, tape.sizes[:2]
    if order is None:
        return
    order, lengths = checks.ids(order, "order", B, (B,)), checks.lengths(lengths, T, B)
    if ((np.bincount(order, minlength=B) != 1).any() or (lengths[1:] > lengths[:-1]).any()
            or lengths.sum() != tape.tokens):
        raise ValueError("order and lengths of a tape must stay as the forward pass left them")


def threads_for(n_threads, tokens, G, width):
    """Threads for a call: one, if the work is too small to share."""
    n = None if n_threads is None else resolve(n_threads)
    if tokens * G * width <= _SERIAL_WORK:
        return 1
    return get_num_threads() if n is None else n


def found_packed(packed, cell, weights, looked_up=False):
    """packed, found made of these very weights as they are, for this cell.

    W_ih is not compared where token ids look up a table that was made of it.
    """
    if not isinstance(packed, _products.Packed):
        raise TypeError(f"packed must be of functional.pack, got {type(packed).__qualname__}")
    if packed.cell != cell:
        raise ValueError(f"packed must be of a {cell} cell's weights, got of {packed.cell}")
    named = zip(("W_ih", "W_hh", "W_hr"), weights, packed.origin, packed.shapes)
    for name, now, then, shape in named:
        if name == "W_ih" and looked_up and isinstance(now, TokenTable):
            continue
        if now is not then or (now is not None and (now.shape, now.strides, now.dtype) != shape):
            raise ValueError(f"packed must be of functional.pack with the {name} of this call")
    return packed
