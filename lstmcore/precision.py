"""The number formats of products: their names, where each may stand, and int8 numbers with scales.

A format is a row of the kernels (docs/adding.md); here is what a caller may ask for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import numpy as np

from lstmcore import checks
from lstmcore._types import Compute, Floats, Ints, Precision
from lstmcore.checks import F32, F64
from lstmcore.reference import quantize

COMPUTES, PRECISIONS = get_args(Compute), get_args(Precision)


def format_of_call(compute: Any, dtype: np.dtype[Any], packed: Any = None,
                   int8: str = "int8 is for weights of pack(precision='int8')") -> str:
    """The format of a call on arrays of this dtype: `compute`, that of packed weights, or the dtype.

    int8 : where that format has its place, for whoever asks for it here.
    """
    own = _own(dtype)
    if compute is None:
        return own if packed is None else packed.format
    if compute not in COMPUTES:
        *names, last = map(repr, COMPUTES)
        hint = f": {int8}" if compute == "int8" else ""
        raise ValueError(f"compute must be {', '.join(names)} or {last}, got {compute!r}{hint}")
    if compute != own and (compute, own) != ("bfloat16", "float32"):
        raise TypeError(f"compute={compute!r} needs {_needed(compute)} arrays, got {own}")
    if packed is not None and packed.format != compute:
        raise ValueError(f"packed must be of pack(precision={compute!r}), got of {packed.format}")
    return compute


def format_of_weights(precision: Any, dtype: np.dtype[Any]) -> str:
    """The format that weights of this dtype are packed in: `precision`, or by default the dtype."""
    own = _own(dtype)
    if precision is None:
        return own
    check_precision(precision)
    if (precision == "float64") != (own == "float64"):
        raise TypeError(f"precision={precision!r} needs weights of {_needed(precision)}, got {own}")
    return precision


def check_precision(precision: Any) -> None:
    """ValueError for what names no precision; None is one."""
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


def _own(dtype):
    return "float32" if dtype is F32 or dtype != F64 else "float64"     # `is` takes no time


def _needed(format):
    return "float64" if format == "float64" else "float32"


class Quantized(NamedTuple):
    """A matrix below float32: q (n, K) int8 times scale (n,) float32, as `reference.quantize` has it.

    Rows of one, q (..., K) and scale (...), are one too.

    >>> import numpy as np
    >>> from lstmcore.functional import Quantized
    >>> Quantized.of(np.array([[0.5, -1.0]], "float32")).q
    array([[  64, -127]], dtype=int8)
    """

    q: Ints
    scale: Floats

    @classmethod
    def of(cls, W: Floats) -> Quantized:
        """W (n, K) float32, rounded: one scale for each row."""
        return cls(*quantize(W))

    def checked(self, name: str, shape: tuple[int, ...]) -> Quantized:
        """These arrays, contiguous, found to be of a matrix of this shape."""
        q, scale = (np.ascontiguousarray(checks.unmasked(name, a)) for a in self)
        if q.shape != shape or q.dtype != np.int8 or scale.shape != shape[:1] or scale.dtype != F32:
            raise ValueError(f"{name} must be quantized as int8 {shape} with float32 scales "
                             f"{shape[:1]}, got {q.dtype} {q.shape} with {scale.dtype} {scale.shape}")
        return Quantized(q, scale)

    def floats(self) -> Floats:
        """What it stands for: q scale, float32, shaped as q."""
        return self.q * self.scale[..., None]


def lowered(weights: Sequence[Floats | None], format: str,
            quantized: Sequence[Quantized | None] | None = None) -> tuple[Any, ...]:
    """W_ih, W_hh, W_hr, or None each, as products of this format are packed of."""
    if format != "int8":
        return tuple(weights)
    return tuple(W if W is None else (Quantized.of(W) if q is None else q).checked(name, W.shape)
                 for name, W, q in zip(("W_ih", "W_hh", "W_hr"), weights, quantized or (None,) * 3))
