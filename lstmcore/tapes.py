"""Tapes: what a forward pass keeps for the backward pass, and remembers of it.

Most arrays are the caller's, so a tape compares them with the sizes that they had (`check`).
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np

from lstmcore import _kernels, arguments, checks
from lstmcore._types import Array, Floats, Ints
from lstmcore.arguments import Batch, Sizes, TokenIds, Weights
from lstmcore.checks import F64

Self = TypeVar("Self", bound="_GateTape")


class _Tape:
    """What the forward pass keeps for the backward pass, and the sizes that all of it had then."""

    # tokens: steps that were computed, T·B or the sum of the lengths
    __slots__ = ("cell", "sizes", "weights", "batch", "tokens", "y")

    def __init__(self, cell, sizes, weights, batch, tokens, y):
        self.cell, self.sizes, self.weights, self.batch = cell, sizes, weights, batch
        self.tokens, self.y = tokens, y

    @property
    def x(self) -> Array | TokenIds:
        return self.batch.x

    @property
    def lengths(self) -> Ints | None:
        return self.batch.lengths

    def check(self) -> None:
        """An error unless every array is still what it was: most are the caller's."""
        T, B, I, H, K, dtype = self.sizes
        rows, is_double = self.cell.fed * H, dtype is F64
        W_ih, W_hh, _, peepholes, W_hr, _, norms = self.weights
        x, h0, c0 = self.batch[:3]
        kept = [("y", self.y, (T, B, K)), ("W_hh", W_hh, (rows, K)), *self._kept()]
        if type(x) is not TokenIds:         # of token ids neither is read again
            kept += ("x", x, (T, B, I)), ("W_ih", W_ih, (rows, I))
        if h0 is not None:
            kept.append(("h0", h0, (B, K)))
        if c0 is not None:
            kept.append(("c0", c0, (B, H)))
        if peepholes is not None:
            kept.append(("peepholes", peepholes, (3, H)))
        if W_hr is not None:
            kept.append(("W_hr", W_hr, (K, H)))
        if norms is not None:
            kept.append(("norms", norms, (self.cell.norms, H)))
        if (variant := self.batch.variant) is not None:
            kept += [(name, a, shape) for name, a, shape in (
                ("h_mask", variant.mask, (B, H)), ("zone_masks", variant.zone, (T, B, 2, H)),
                ("h0 ∘ h_mask", variant.m0, (B, H))) if a is not None]
        arguments.check_order(self)
        if not _kernels.all_fit(kept, is_double):
            for name, a, shape in kept:
                checks.array(a, f"{name} of the tape", "as in the forward pass", shape, dtype)

    def _kept(self):
        return ()


class _GateTape(_Tape):
    """A tape with gates: `raw_gates` (tokens, G), whose memory the backward pass uses, and c if any."""

    __slots__ = ("raw_gates", "raw_c", "more", "_turn")

    def __init__(self, cell: Any, sizes: Sizes, weights: Weights, batch: Batch, tokens: int, y: Floats,
                 raw_gates: Floats, raw_c: Floats | None, *more: Floats | None) -> None:
        super().__init__(cell, sizes, weights, batch, tokens, y)
        self.raw_gates, self.raw_c = raw_gates, raw_c
        self.more = more            # of variants: h ∘ mask; ax, ah and their moments
        self._turn = [True]        # popping it is one step, for threads that race for the tape too

    @property
    def gates(self) -> Floats:
        if not self._turn:
            self._refuse()
        return arguments.turn(self.cell, self._padded(self.raw_gates), back=True)

    @property
    def nbytes(self) -> int:
        """Bytes kept beside x and y."""
        return sum(a.nbytes for a in self._raw() if a is not None)

    def check(self) -> None:
        if not self._turn:
            self._refuse()
        super().check()
        if not self.raw_gates.flags.writeable:
            raise ValueError("raw_gates of the tape must be writable: they become their gradients")

    def _kept(self):
        N, H = self.tokens, self.sizes.H
        G = self.cell.gates * H
        names = "raw_gates", "raw_c", "h ∘ mask", "ax", "ah", "moments", "c before it is normalized"
        named = zip(names, (G, H, H, G, G, self.cell.moments, H), self._raw())
        return [(name, a, (N, width)) for name, width, a in named if a is not None]

    def _raw(self):
        return self.raw_gates, self.raw_c, *(self.more or (None,) * 5)

    def take(self) -> tuple[Floats | None, ...]:
        """What it keeps: the tape is used now; an error if it was before."""
        try:
            self._turn.pop()
        except IndexError:
            self._refuse()
        return self._raw()

    def again(self: Self) -> Self:
        """This tape with gates of its own, to be used one time more."""
        return type(self)(self.cell, self.sizes, self.weights, self.batch, self.tokens, self.y,
                          self.raw_gates.copy(), self.raw_c, *(
                              a if n != 1 or a is None else a.copy()      # ax becomes its gradient too
                              for n, a in enumerate(self.more)))

    def _refuse(self):
        raise ValueError("this tape was used by an earlier backward pass, which overwrote its "
                         "gates: run the forward pass again")

    def _padded(self, raw):
        T, B = self.sizes[:2]
        order, lengths, reverse = self.batch.order, self.lengths, self.batch.reverse
        if order is None:
            return raw.reshape(T, B, raw.shape[-1])
        out, first = np.zeros((T, B, raw.shape[-1]), raw.dtype), 0
        for s in range(lengths[0] if B else 0):
            n = int(np.count_nonzero(lengths > s))
            t = lengths[:n] - 1 - s if reverse else s
            out[t, order[:n]] = raw[first:first + n]
            first += n
        return out


class Tape(_GateTape):
    """What the forward pass keeps for the backward pass: 5H numbers per token, beside x and y.

    `gates` (T, B, 4H) in the order i, f, g, o and `c` (T, B, H) are views of a dense tape and, of a
    ragged one, which holds its real tokens only, copies that are zero past the end. `lstm_backward`
    uses the memory of the gates, so a tape can be used once and shows no gates afterwards.
    """

    __slots__ = ()
    raw_c: Floats

    @property
    def c(self) -> Floats:
        return self._padded(self.raw_c)


class GRUTape(_GateTape):
    """What `gru_forward` keeps for `gru_backward`: 4H numbers per token, beside x and y.

    `gates` (T, B, 4H) is in the order r, z, n, q, where q = W_hn h_{t-1} + b_hn; without reset_after
    it is (T, B, 3H), r, z, n. Otherwise as `Tape`, but `gates` is a copy.
    """

    __slots__ = ()


class RNNTape(_Tape):
    """What `rnn_forward` keeps: references to x, y and the weights; nothing is copied."""

    __slots__ = ()

    def take(self) -> tuple[None, ...]:
        """Nothing, as often as it is asked for."""
        return (None,) * 7

    def again(self) -> RNNTape:
        """This tape, which any number of backward passes may read."""
        return self
