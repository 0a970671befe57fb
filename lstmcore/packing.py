"""Weights packed for many calls, and one step at a time on such weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from lstmcore import _forward, _kernels, _products, arguments, checks, scalars
from lstmcore._recurrence import cell as cell_row  # the row of a cell, by name
from lstmcore._types import Array, Floats, Precision
from lstmcore.arguments import Batch, Cell, Room, Weights
from lstmcore.checks import F32, F64
from lstmcore.precision import Quantized, format_of_weights, lowered
from lstmcore.threads import resolve
from lstmcore.variants import Variant


# ---- weights packed for many calls -------------------------------------------------------------------

def pack(cell: Cell | Literal["linear"], W_ih: Floats, W_hh: Floats | None = None,
         W_hr: Floats | None = None, *, precision: Precision | None = None,
         quantized: Sequence[Quantized | None] | None = None) -> _products.Packed:
    """Weights arranged for many calls with packed=; they must not change as long as it is used.

    precision: the number format of the products: the weights' dtype by default; or "bfloat16", or
    "int8", of float32 weights, which are rounded to `Quantized` ones, or to those in quantized
    (of W_ih, W_hh, W_hr), if given.

    cell: "lstm", "tanh", "relu", "gru" or, without reset_after, "gru_before"; or "linear" for a dense
    layer's W_ih alone. `Module.freeze` does this for a model. A call compares: the weights that it is
    given must be these very arrays.

    >>> import numpy as np
    >>> from lstmcore import lstm_forward
    >>> from lstmcore.functional import pack
    >>> W_ih, W_hh = np.ones((8, 3)), np.ones((8, 2))
    >>> packed = pack("lstm", W_ih, W_hh)
    >>> lstm_forward(np.zeros((5, 1, 3)), W_ih, W_hh, packed=packed)[0].shape
    (5, 1, 2)
    """
    origin = W_ih, W_hh, W_hr
    if cell == "linear":
        if W_hh is not None or W_hr is not None:
            raise ValueError("a dense layer has one matrix, got W_hh or W_hr beside it")
        W = checks.floats("W_ih", W_ih)
        if W.ndim != 2 or 0 in W.shape:
            raise ValueError(f"W_ih must be (O, I) with O, I >= 1, got {W.shape}")
        format = format_of_weights(precision, W.dtype)
        if format != "int8":
            W = checks.array(W, "W_ih", "(O, I)", W.shape, F64 if W.dtype == F64 else F32)
        return _products.Packed("linear", (1, 1, 1), format,
                                lowered((W, None, None), format, quantized), origin)
    row = cell_row(cell)
    if W_hr is not None and not row.has_projection:
        raise ValueError(f"a {cell} cell has no projection, got W_hr")
    W_ih = checks.unmasked("W_ih", W_ih)
    x = np.empty((1, 1, *np.shape(W_ih)[1:2]), getattr(W_ih, "dtype", float))
    x, sizes = arguments.sizes_of(row, x, W_ih, W_hh, W_hr)
    format = format_of_weights(precision, sizes.dtype)
    w = arguments.weights_of(row, sizes, W_ih, W_hh, None, None, W_hr, format=format)
    return _packed(row, format, lowered((w.W_ih, w.W_hh, w.W_hr), format, quantized), origin)


def _packed(cell, format, weights, origin):
    W_ih, W_hh, W_hr = weights
    if cell.later:                 # the last gate's rows of W_hh multiply by themselves
        if format == "int8":
            cut = len(W_hh.q) // cell.fed * cell.heard
            W_hh, W_hr = (Quantized(*(a[part] for a in W_hh))
                          for part in (slice(cut), slice(cut, None)))
        else:
            W_hh, W_hr = np.split(W_hh, [len(W_hh) // cell.fed * cell.heard])
    return _products.Packed(cell.name, (cell.fed, cell.heard, 1), format, (W_ih, W_hh, W_hr), origin,
                            cell.turn)


# ---- one step at a time ------------------------------------------------------------------------------

class Step:
    """One layer, one step per call, with its state h (B, H) and c (B, H): for streams.

    The weights are copied and packed once, as they are now; a call allocates nothing but what it
    returns, and nothing at all with `out`. A copy or pickle goes on from the same state by itself.

    >>> import numpy as np
    >>> from lstmcore.functional import Step
    >>> step = Step("lstm", 1, np.ones((8, 3)), np.ones((8, 2)))
    >>> step(np.zeros((1, 3))).shape
    (1, 2)
    """

    def __init__(self, cell: Cell, batch_size: int, W_ih: Floats, W_hh: Floats,
                 b: Floats | None = None, peepholes: Floats | None = None,
                 W_hr: Floats | None = None, *, n_threads: int | None = None,
                 precision: Precision | None = None,
                 quantized: Sequence[Quantized | None] | None = None,
                 variant: Variant | None = None, norms: Floats | None = None) -> None:
        row = cell_row(cell)
        B = scalars.size("batch_size", batch_size)
        W_ih = checks.unmasked("W_ih", W_ih)
        x = np.zeros((1, B, *np.shape(W_ih)[1:2]), getattr(W_ih, "dtype", float))
        x, self._sizes = arguments.sizes_of(row, x, W_ih, W_hh, W_hr)
        if (W_hr is not None and not row.has_projection
                or peepholes is not None and not row.has_peepholes):
            raise ValueError(f"a {cell} cell has neither projection nor peepholes")
        weights = arguments.weights_of(row, self._sizes, W_ih, W_hh, b, peepholes, W_hr,
                           format=format_of_weights(precision, self._sizes.dtype))
        if (variant is None) == row.varies:
            raise ValueError(f"a {cell} cell takes {'a' if row.varies else 'no'} variant")
        if variant is not None and (variant.h_mask is not None or variant.zone_masks is not None):
            raise ValueError("a step has no masks: they are for training")
        if (norms is None) == bool(row.norms):
            raise ValueError(f"a {cell} cell takes {'its' if row.norms else 'no'} norms")
        if norms is not None:
            weights = arguments.norms_of(row, norms, self._sizes, weights)
        self._cell, self._quantized, self._variant = row, None, variant and arguments.variant_of(
            variant, self._sizes, None, peepholes is not None, False)
        if weights.format == "int8":
            self._quantized = lowered((weights.W_ih, weights.W_hh, weights.W_hr), "int8",
                                      quantized)
            weights = weights._replace(W_ih=None, W_hh=None, W_hr=None)
        self._weights = Weights(*(a if a is None or isinstance(a, str) else np.array(a) for a in weights))
        _, _, I, H, K, dtype = self._sizes
        self._h = np.zeros((B, K), dtype)
        self._c = np.zeros((B, H), dtype) if row.has_c else None
        self._n_threads = None if n_threads is None else resolve(n_threads)
        self._prepare()

    def _prepare(self):
        """Pack the weights, and all else that is made and not kept."""
        _, B, I, H, K, dtype = self._sizes
        W_ih, W_hh, b, _, W_hr, format, _ = self._weights
        self._x_shape, self._y_shape, self._is_double = (B, I), (B, K), dtype == F64
        self._table = None
        packed = _packed(self._cell, format, self._quantized or (W_ih, W_hh, W_hr), ())
        batch = Batch(np.zeros((1, B, I), dtype), None, None, None, None, False, None, self._variant)
        room = Room(np.zeros((B, K), dtype), self._h, self._c, None, None)
        shapes = self._weights._replace(b=arguments.turn(self._cell, b))
        if self._quantized:         # the kernels ask W_hh for its shape, and whether W_hr is there
            shapes = shapes._replace(W_hh=self._quantized[1].q, W_hr=self._quantized[2])
        self._run = _forward.Stepper(self._cell, shapes, batch, room, packed)
        # A step reads all weights once: a second thread helps if they do not fit near one core (-9 % for
        # 0.8 MB, +8 % for 0.5).
        self._serial = packed.nbytes <= 3 << 18

    # Views: what has no memory of its own cannot be resized.
    @property
    def h(self) -> Floats:
        """The state h (B, K), a view to be written to."""
        return self._h[...]

    @property
    def c(self) -> Floats | None:
        """The state c (B, H), likewise; None of a cell without c."""
        return None if self._c is None else self._c[...]

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name]
                for name in ("_cell", "_weights", "_quantized", "_variant", "_sizes", "_h", "_c",
                             "_n_threads")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._h, self._c = (None if a is None else a.copy() for a in (self._h, self._c))
        self._prepare()

    def __call__(self, x_t: Array, out: Floats | None = None) -> Floats:
        """x_t (B, I), or token ids (B,) -> h_t (B, H), in `out` if it is given."""
        return self._fill(self.room(out), x_t)

    def _fill(self, out: Floats, x_t: Array) -> Floats:
        """A call with `out` of `room`, which is not looked at again: 0.25 µs."""
        table = None
        if not _kernels.fits(x_t, self._x_shape, self._is_double):
            x_t, table = self._checked(x_t)
        n_threads = 1 if self._serial else resolve(self._n_threads)
        self._run(x_t, out, n_threads, table)
        return out

    def room(self, out: Floats | None) -> Floats:
        """`out`, found fit to take h_t, or a new array if it is None."""
        if out is None:
            return np.empty(self._y_shape, self._sizes.dtype)
        if not _kernels.fits(out, self._y_shape, self._is_double) or not out.flags.writeable:
            raise ValueError(f"out must be a writable C-contiguous {self._sizes.dtype} array of shape "
                             f"{self._y_shape}, got {getattr(out, 'shape', type(out).__name__)}")
        if _kernels.shares_memory(out, self._h) or _kernels.shares_memory(out, self._c):
            raise ValueError("out must not be the state, which is read while out is written")
        return out

    def _checked(self, x_t):
        """x_t contiguous; or token ids with the table that they look up."""
        x_t, (B, I), dtype = np.asanyarray(x_t), self._x_shape, self._sizes.dtype
        if x_t.dtype.kind not in "iu":
            return checks.array(x_t, "x_t", "(B, I)", (B, I), dtype), None
        if x_t.shape != (B,):
            raise ValueError(f"x_t must be (B,) = ({B},) token ids, got {x_t.shape}")
        x_t = checks.ids(x_t, "token ids", I)
        if self._table is None:
            W_ih = self._quantized[0].floats() if self._quantized else self._weights.W_ih
            self._table = arguments.project(self._cell, W_ih.T,
                                            None if self._cell.norms else self._weights.b)
        return x_t, self._table
