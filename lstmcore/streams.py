"""A recurrent layer fed one step at a time."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import numpy as np

from lstmcore import functional, scalars
from lstmcore._types import Array, Floats

State = TypeVar("State")                        # (h, c) of an LSTM, h of a GRU or RNN


class Stream(Generic[State]):
    """A recurrent layer fed one step at a time; it remembers its state and keeps nothing else.

    It has the weights as they were when it was made (call `stream` again after training), never
    drops out, and allocates nothing in a step. A copy or pickle of it goes on from the same state by
    itself. It is one sequence: a second thread in a step is an error.

    >>> from lstmcore import LSTM
    >>> s = LSTM(3, 5, seed=0).stream(batch_size=2)
    >>> s.step(np.zeros((2, 3), "float32")).shape
    (2, 5)
    >>> h, c = s.state
    >>> s.reset()
    """

    def __init__(self, layer: Any, batch_size: int = 1) -> None:
        if layer.bidirectional:
            raise ValueError("a bidirectional layer cannot stream: its second half starts at the "
                             "end of the sequence")
        self.layer, self.batch_size = layer, scalars.size("batch_size", batch_size)
        self._steps = [functional.Step(layer._cell, self.batch_size, n_threads=layer.n_threads,
                                       precision=layer._frozen_in or layer.compute,
                                       quantized=quantized, variant=layer._variant,
                                       **{letter: a for letter, a in w.items() if letter != "packed"})
                       for w, quantized in zip(layer._weights, layer._lowered)]
        self._prepare()

    def _prepare(self):
        # What goes from layer to layer within a step.
        self._between = [np.empty_like(step.h) for step in self._steps[:-1]]
        self._turn = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in ("layer", "batch_size", "_steps")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._steps = [copy.copy(step) for step in self._steps]
        self._prepare()

    def reset(self) -> None:
        """Back to a state of zeros."""
        self.state = None

    @property
    def state(self) -> State:
        """The state after the last step, a copy, as the layer returns it; may be set."""
        return self.layer._join([(step.h, step.c)[:len(self.layer._widths)]
                                 for step in self._steps])

    @state.setter
    def state(self, state: State | None) -> None:
        for step, parts in zip(self._steps, self.layer._split(state, self.batch_size, "state")):
            for own, part in zip((step.h, step.c), parts):
                own[...] = 0 if part is None else part

    def step(self, x_t: Array, out: Floats | None = None) -> Floats:
        """x_t (B, I), or token ids (B,) -> y_t (B, P), in `out` if it is given."""
        out = self._steps[-1].room(out)     # before any layer has taken a step
        if not self._turn.acquire(blocking=False):
            raise RuntimeError("this stream is in a step in another thread: it is one sequence, so each "
                               "thread needs one of its own")
        try:
            for step, h in zip(self._steps, self._between):
                x_t = step._fill(h, x_t)
            return self._steps[-1]._fill(out, x_t)
        finally:
            self._turn.release()
