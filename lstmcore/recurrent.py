"""Recurrent layers: stacks of LSTM, GRU or RNN in one or two directions, their streams and traces.

The equations are `lstmcore.functional`'s; here is what stands around them: parameters by name,
layers upon each other, both directions, dropout between layers, and the states of all of them.

Sizes: T steps, B batch, I inputs, H hidden units, P width of h (H without projection), L layers,
D directions. States are (L·D, B, ·); layer l in direction d stands at l·D + d.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np

from lstmcore import checks, dense, functional, scalars
from lstmcore._types import Array, Compute, Dtype, Floats, Init, Lengths, Seed
from lstmcore.initializers import initializer
from lstmcore.module import Module, dropout_mask, products
from lstmcore.streams import State, Stream
from lstmcore.variants import LAYER_NORMS, Activation, Variant


class LSTMTrace(NamedTuple):
    """What an LSTM computed: the gates i, f, g, o, the cell c, each (T, B, H), and h (T, B, P)."""

    i: Floats
    f: Floats
    g: Floats
    o: Floats
    c: Floats
    h: Floats


class GRUTrace(NamedTuple):
    """What a GRU computed: the gates r and z, the candidate n, and h, each (T, B, H)."""

    r: Floats
    z: Floats
    n: Floats
    h: Floats


class RNNTrace(NamedTuple):
    """What an RNN computed: h (T, B, H)."""

    h: Floats


Trace = TypeVar("Trace", LSTMTrace, GRUTrace, RNNTrace)
Pair: TypeAlias = tuple[Floats, Floats]

NAMES = dict(W_ih="weight_ih", W_hh="weight_hh", b="bias", peepholes="weight_peephole",
             W_hr="weight_hr", norms="weight_layernorm")


class _Recurrent(Module, Generic[State, Trace]):
    """A stack of recurrent layers: everything but the cell.

    A cell says how many gates it has (`_gates`, in the bias `_biases`), how wide the parts of its
    state are (`_widths`), its name for `functional.Step` (`_cell`), and how to run, run backward and
    trace one layer.
    """

    _variant: Variant | None = None
    _options: dict[str, Any] = {}   # what a file has to say where it is not the default: name -> default

    def describe(self) -> dict[str, Any]:
        """What the parameters do not say of this layer, as JSON can hold it: its class first."""
        values = {name: getattr(self, name) for name in self._options}
        return {**super().describe(), **{
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items() if value != self._options[name]}}

    @property
    def _biases(self):
        return self._gates

    @property
    def _widths(self):
        return (self.hidden_size,)

    def _build(self, input_size, hidden_size, num_layers, bias, batch_first, dropout,
               bidirectional, init, dtype, compute, seed, locked_dropout, weight_dropout):
        self.input_size = scalars.size("input_size", input_size)
        self.hidden_size = scalars.size("hidden_size", hidden_size)
        self.num_layers = scalars.size("num_layers", num_layers)
        self.bias, self.batch_first = bool(bias), bool(batch_first)
        self.bidirectional, self.directions = bool(bidirectional), 1 + bool(bidirectional)
        self.dropout = scalars.probability("dropout", dropout)
        self.locked_dropout = bool(locked_dropout)
        self.weight_dropout = scalars.probability("weight_dropout", weight_dropout)
        self.init, self.dtype = init, scalars.float_dtype(dtype)
        self.compute = products(compute, self.dtype)
        self.rng = np.random.default_rng(seed)
        self.n_threads: int | None = None           # handed on to lstmcore.functional
        draw = initializer(init, self.hidden_size, self.rng)
        for layer in range(self.num_layers):
            for suffix in ("", "_reverse")[:self.directions]:
                for letter, shape in self._shapes(layer).items():
                    gates = letter in ("W_ih", "W_hh", "b")
                    joined = (shape[0] * shape[1], *shape[2:]) if gates else shape
                    self._declare(f"{NAMES[letter]}_l{layer}{suffix}", joined,
                                  functools.partial(draw, letter, shape))
        self._sort()

    def _sort(self):
        """Parameters and gradients per layer and direction: letter -> array."""
        self._weights, self._dweights, self._lowered = [], [], []
        for layer in range(self.num_layers):
            for suffix in ("", "_reverse")[:self.directions]:
                names = {letter: f"{NAMES[letter]}_l{layer}{suffix}" for letter in self._shapes(layer)}
                self._weights.append({letter: self._own[n][0] for letter, n in names.items()})
                self._dweights.append({letter: self._own[n][1] for letter, n in names.items()})
                self._lowered.append([self._quantized.get(names.get(letter))
                                      for letter in ("W_ih", "W_hh", "W_hr")])

    def _fix(self, format):
        super()._fix(format)
        self._sort()
        for w, quantized in zip(self._weights, self._lowered):
            if format:
                w["packed"] = functional.pack(self._cell, w["W_ih"], w["W_hh"], w.get("W_hr"),
                                              precision=format, quantized=quantized)

    @property
    def _products(self):
        """The format of a call's products, where its weights are not packed for one."""
        return None if self._frozen_in else self.compute

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        del state["_weights"], state["_dweights"], state["_lowered"]    # `_sort` finds them again
        return state

    def _shapes(self, layer):
        """Letter -> shape of the weights of one layer in one direction, the gates on top."""
        H, P = self.hidden_size, self._widths[0]
        inputs = P * self.directions if layer else self.input_size
        shapes = {"W_ih": (self._gates, H, inputs), "W_hh": (self._gates, H, P)}
        return {**shapes, "b": (self._biases, H)} if self.bias else shapes

    def __call__(self, x: Array, state: State | None = None, lengths: Lengths = None, *,
                 embedding: Module | None = None) -> tuple[Floats, State]:
        """One pass over whole sequences.

        Parameters
        ----------
        x : (T, B, I), or (B, T, I) with batch_first, of the layer's dtype; or integer token ids
            (T, B), each standing for a one-hot row of I numbers
        state : the initial state, as the final state of another call; zeros by default
        lengths : (B,) ints in 0..T: sequence b ends after its own lengths[b] steps. Its y is 0
            past that, and its final state is that of its own last step
        embedding : an `Embedding` that x, token ids, are to be looked up in: as x = embedding(x),
            but the rows of a small table are multiplied by the weights once each, not once for
            every token. Its gradients are added to by `backward`

        Returns
        -------
        y : (T, B, D·P), or (B, T, D·P)
        state : the final state: (h_n, c_n) of an LSTM, else h_n, never batch-first
        """
        x, weights = self._look_up(x, embedding)
        x, initial = self._inputs(x, state)
        y, final, tapes = self._run(x, weights, initial, lengths, self.training, self.training)
        y = self._swap(y)
        self._keep(y, [(mask, [run[1:] for run in runs]) for mask, runs in tapes], embedding,
                   weights is not self._weights)
        return y, self._join(final)

    def backward(self, dy: Floats | None = None,
                 dstate: State | None = None) -> tuple[Floats, State]:
        """The gradients of the loss by y and by the final state -> by x and by the initial state.

        Adds to `gradients()`. None stands for zeros. For token ids the first result is None.
        """
        dy, tapes, embedding, tabled = self._take(dy)
        dx = self._swap(dy)
        dfinal = self._split(dstate, dx.shape[1], "dstate")
        dinitial = [None] * len(dfinal)
        for layer in reversed(range(self.num_layers)):
            mask, runs = tapes[layer]
            halves = [dx] if self.directions == 1 else np.split(dx, 2, axis=2)
            dx = None
            for d, ((tape, dropped), half) in enumerate(zip(runs, halves)):
                n = layer * self.directions + d
                g, dinitial[n] = self._cell_backward(tape, half, dfinal[n])
                if dropped is not None:
                    np.multiply(g.dW_hh, dropped, out=g.dW_hh)
                if tabled and layer == 0:
                    g = self._through_table(n, g, embedding)
                for letter, total in self._dweights[n].items():
                    total += getattr(g, "d" + letter)
                dx = g.dx if dx is None else np.add(dx, g.dx, out=dx)
            if self._on_gradients:
                self._on_gradients()
            if mask is not None:
                np.multiply(dx, mask, out=dx)
        dx = None if dx is None else self._swap(dx)
        if embedding is not None and not tabled:
            dx = embedding.backward(dx)
        return dx, self._join(dinitial)

    def stream(self, batch_size: int = 1) -> Stream[State]:
        """The layer as a machine that takes one step at a time: a `Stream`."""
        return Stream(self, batch_size)

    def trace(self, x: Array, state: State | None = None, lengths: Lengths = None) -> list[Trace]:
        """Everything the layer computes for x, for looking inside.

        Returns a list in the order of the states: for each layer and direction an LSTMTrace
        (i, f, g, o, c, h), a GRUTrace (r, z, n, h) or an RNNTrace (h), of arrays (T, B, H), or
        (B, T, H) with batch_first; h is (T, B, P). There is no dropout, and a tape kept for backward
        stays. A layer frozen in int8 keeps no gates: ValueError.
        """
        if self._frozen_in == "int8":
            raise ValueError(f"{'an' if self._gates != 3 else 'a'} {type(self).__name__} frozen in int8 "
                             "keeps nothing to look at: unfreeze() it first")
        x, initial = self._inputs(x, state)
        _, _, tapes = self._run(x, self._weights, initial, lengths, True, False)
        return [self._traced(y, tape) for _, runs in tapes for y, tape, _ in runs]

    def _run(self, x, weights, initial, lengths, keep_tape, drop):
        """The stack over time-major x: y, the final states, and per layer a mask and, for each direction,
        (y, tape, mask of W_hh)."""
        final, tapes = [], []
        for layer in range(self.num_layers):
            mask, runs = None, []
            if layer and drop and self.dropout:
                shape = (1, *x.shape[1:]) if self.locked_dropout else x.shape
                mask = dropout_mask(self.rng, self.dropout, shape, self.dtype)
                x = x * mask
            for d in range(self.directions):
                n, dropped = layer * self.directions + d, None
                w, variant = weights[n], self._variant
                if drop:
                    w, dropped = self._with_dropped_weights(w)
                    variant = self._drawn(variant, x)
                more = {} if variant is None else {"variant": variant}
                y, last, tape = self._cell_forward({**w, **more}, x, initial[n], lengths, d == 1,
                                                   keep_tape)
                final.append(last)
                runs.append((y, tape, dropped))
            x = y if len(runs) == 1 else np.concatenate([y for y, *_ in runs], axis=2)
            if keep_tape:
                tapes.append((mask, runs))
        return x, final, tapes

    def _with_dropped_weights(self, w):
        """The weights of a layer with some of W_hh dropped, for the whole sequence, and the mask."""
        if not self.weight_dropout:
            return w, None
        mask = dropout_mask(self.rng, self.weight_dropout, w["W_hh"].shape, self.dtype)
        return {**w, "W_hh": w["W_hh"] * mask}, mask

    def _drawn(self, variant, x):
        """The variant with the random masks of one call for x in training."""
        return variant

    def _look_up(self, x, embedding):
        """What the layers read for x, and their weights.

        With a table that has fewer rows than x has tokens, x stays as it is, and W_ih of the first
        layer becomes what each row of the table is projected to, bias included: the same sums in
        the same order as for the rows themselves, so the choice changes no bit.
        """
        if embedding is None:
            return x, self._weights
        x, E = np.asarray(checks.unmasked("x", x)), embedding.embed_size
        if embedding.dtype != self.dtype:
            raise TypeError(f"embedding must be {self.dtype}, got {embedding.dtype}")
        if E != self.input_size:
            raise ValueError(f"embedding must have rows of I = {self.input_size} numbers, got {E}")
        if x.ndim != 2 or x.dtype.kind not in "iu" or embedding.vocab_size >= x.size:
            return embedding(x), self._weights
        table, D = embedding._rows(), self.directions
        first = []
        for w, quantized in zip(self._weights[:D], self._lowered):
            b = None if "norms" in w else w.get("b")       # what is normalized has no bias yet
            W_ih, alone = w["W_ih"], (self._biases - self._gates) * self.hidden_size
            packed = functional.pack("linear", W_ih, precision=self._frozen_in,
                                     quantized=(quantized[0], None, None)) if self._frozen_in else None
            # E W_ihᵀ + b        (V,E) (E,4H) -> (V,4H)
            rows = dense.linear_forward(table, W_ih, None if b is None else b[:len(W_ih)],
                                        n_threads=self.n_threads, packed=packed,
                                        compute=self._products)
            if alone:                   # h alone feeds the last gates: they start from the bias
                rest = np.zeros(alone, self.dtype) if b is None else b[-alone:]
                rows = np.hstack([rows, np.broadcast_to(rest, (len(rows), alone))])
            first.append({**w, "W_ih": functional.TokenTable(rows), **({} if "norms" in w else {"b": None})})
        ids = functional.TokenIds(self._swap(x), embedding.vocab_size)
        return ids, first + self._weights[D:]

    def _through_table(self, n, g, embedding):
        """The gradients g with those by W_ih Eᵀ taken apart: into W_ih's, and into the table's."""
        table, dtable = (of()["weight"] for of in (embedding.parameters, embedding.gradients))
        W_ih = self._weights[n]["W_ih"]
        dE, dW_ih, _ = dense.linear_backward(table, W_ih, g.dW_ih[:, :len(W_ih)],
                                             n_threads=self.n_threads, compute=self.compute)
        dtable += dE
        return g._replace(dW_ih=dW_ih)

    def _inputs(self, x, state):
        """x time-major, token ids checked once for all directions, and the initial states."""
        if isinstance(x, functional.TokenIds):
            return x, self._split(state, x.shape[1], "state")
        x = np.asarray(checks.unmasked("x", x))
        if x.dtype.kind not in "iu":
            x = checks.floats("x", x, self.dtype)
            if x.ndim != 3 or x.shape[2] != self.input_size:
                axes = "(B, T, I)" if self.batch_first else "(T, B, I)"
                raise ValueError(f"x must be {axes} with I = {self.input_size}, got {x.shape}")
        elif x.ndim != 2:
            axes = "(B, T)" if self.batch_first else "(T, B)"
            raise ValueError(f"x must be {axes} if it holds token ids ({x.dtype}), got {x.shape}; "
                             f"numbers must be {self.dtype}")
        ids, x = x.ndim == 2, self._swap(x)
        x = functional.TokenIds(x, self.input_size) if ids else x
        return x, self._split(state, x.shape[1], "state")

    def _swap(self, a):
        """From the user's order of axes to time-major, or back."""
        return a.swapaxes(0, 1) if self.batch_first else a

    def _split(self, state, B, name):
        """A state, or a gradient by one, as one tuple of (B, ·) arrays per layer and direction."""
        N = len(self._weights)
        if state is None:
            return [(None,) * len(self._widths)] * N
        parts = state if len(self._widths) > 1 else (state,)
        if not isinstance(parts, (tuple, list)) or len(parts) != len(self._widths):
            raise TypeError(f"{name} must be a pair (h, c), got {type(state).__name__}")
        columns = []
        for letter, part, width in zip("hc", parts, self._widths):
            if part is None:
                columns.append([None] * N)
                continue
            part = checks.floats(f"{letter} of {name}", part, self.dtype)
            if part.shape != (N, B, width):
                raise ValueError(f"{letter} of {name} must be (L·D, B, {width}) = "
                                 f"{(N, B, width)}, got {part.shape}")
            columns.append(part)
        return list(zip(*columns))

    def _join(self, states):
        parts = tuple(np.stack(part) for part in zip(*states))
        return parts if len(parts) > 1 else parts[0]


class LSTM(_Recurrent[Pair, LSTMTrace]):
    """A stack of LSTM layers (Hochreiter and Schmidhuber 1997; forget gate: Gers et al. 2000).

    Parameters
    ----------
    input_size, hidden_size, num_layers : int
    bias : False for neither bias nor forget_bias
    batch_first : x and y are (B, T, ·) instead of (T, B, ·); states never are
    dropout : probability to drop a number between two layers, drawn anew for every step
    bidirectional : a second LSTM reads each sequence from its own end; y holds both, (T, B, 2P)
    proj_size : P, the width to which h is projected (Sak et al. 2014); 0 for no projection
    peepholes : the gates also see the cell, each unit its own (Gers et al. 2002)
    forget_bias : added to the forget gate's bias at the start, so that cells remember
    init : "uniform": U(-1/√H, 1/√H), as in PyTorch; "glorot": Glorot for inputs and projection,
        orthogonal for the recurrence, zeros for bias and peepholes
    dtype : "float32" or "float64", of the weights and of all that is given and returned
    recurrent_activation, activation, cell_activation, clip, coupled : as of `Variant`
    layer_norm : in float32 and float64, with no other of these options but the last two. "products":
        x W_ihᵀ, h W_hhᵀ and, where h is made of it, c are normalized over their units (Ba et al. 2016).
        "gates": x W_ihᵀ + h W_hhᵀ is, gate by gate, and c, which goes on normalized (TensorFlow's
        LayerNormBasicLSTMCell)
    zoneout : z, or (z_h, z_c): in training, the probability of a number of h, and of c, to keep its last
        value; afterwards the mean of that (Krueger et al. 2017)
    recurrent_dropout : probability to drop a number of h where it enters the next step's product, drawn
        once for a sequence (Gal and Ghahramani 2016)
    weight_dropout : probability to drop a number of weight_hh, drawn once for a call (Merity et al. 2018)
    locked_dropout : dropout between two layers is drawn once for a sequence too
    compute : the number format of the products, forward and backward: that of dtype by default; or,
        of a float32 layer, "bfloat16": their operands (x, h, the weights; da in `backward`) are
        rounded to 8 significant bits. All else, and so every sum and gradient, stays float32. See
        `freeze` for inference in "bfloat16" or "int8" after training in float32
    seed : int, numpy Generator or None, for the weights and for dropout

    Its parameters in layer 0 (`_l1` and so on above it, `_reverse` added in the second direction):
    weight_ih_l0 (4H, I), weight_hh_l0 (4H, P) and bias_l0 (4H,), their rows ordered i, f, g, o;
    weight_peephole_l0 (3, H), ordered i, f, o; weight_hr_l0 (P, H); weight_layernorm_l0 (10, H): the gammas
    of i, f, g, o for x W_ihᵀ, those for h W_hhᵀ, gamma and beta of c; or (6, H): the gammas of the gates,
    gamma and beta of c.

    >>> m = LSTM(3, 5, num_layers=2, seed=0)
    >>> x = np.random.default_rng(1).standard_normal((7, 4, 3), dtype="float32")
    >>> y, (h_n, c_n) = m(x, lengths=[7, 2, 0, 5])
    >>> y.shape, h_n.shape, c_n.shape
    ((7, 4, 5), (2, 4, 5), (2, 4, 5))
    >>> dx, (dh0, dc0) = m.backward(np.ones_like(y))
    >>> dx.shape, m.gradients()["weight_hh_l1"].shape
    ((7, 4, 3), (20, 5))
    """

    _gates = 4
    _says = "batch_first", "dropout"
    _options = dict(recurrent_activation="sigmoid", activation="tanh", cell_activation=None, clip=None,
                    coupled=False, layer_norm=None, zoneout=0.0, recurrent_dropout=0.0, weight_dropout=0.0,
                    locked_dropout=False)

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, *,
                 bias: bool = True, batch_first: bool = False, dropout: float = 0.0,
                 bidirectional: bool = False, proj_size: int = 0, peepholes: bool = False,
                 forget_bias: float = 1.0, recurrent_activation: Activation = "sigmoid",
                 activation: Activation = "tanh", cell_activation: Activation | None = None,
                 clip: float | None = None, coupled: bool = False,
                 layer_norm: Literal["products", "gates"] | None = None,
                 zoneout: float | tuple[float, float] = 0.0, recurrent_dropout: float = 0.0,
                 weight_dropout: float = 0.0, locked_dropout: bool = False,
                 init: Init = "uniform", dtype: Dtype = "float32",
                 compute: Compute | None = None, seed: Seed = None) -> None:
        self.recurrent_activation, self.activation = recurrent_activation, activation
        self.cell_activation, self.clip, self.coupled = cell_activation, clip, bool(coupled)
        self.recurrent_dropout = scalars.probability("recurrent_dropout", recurrent_dropout)
        self.zoneout = zoneout if isinstance(zoneout, (int, float)) else tuple(zoneout)
        variant = Variant(recurrent_activation, activation, cell_activation, clip, coupled, zoneout)
        self._variant = None if variant.is_usual() else variant
        self.layer_norm = layer_norm
        self._cell = "lstm_varied" if self._variant else "lstm"
        if layer_norm is not None:
            self._cell, _ = LAYER_NORMS[scalars.choice("layer_norm", layer_norm, LAYER_NORMS)]
            if self._variant or recurrent_dropout or peepholes or proj_size or compute == "bfloat16":
                raise ValueError("an LSTM with layer_norm has the usual activations, no clip, no coupled "
                                 "gates, no zoneout, no recurrent dropout, no peepholes and no projection, "
                                 "and computes in float32 or float64")
        if (self._variant or recurrent_dropout) and proj_size:
            raise ValueError(f"an LSTM with proj_size={proj_size} has the usual activations, no clip, no "
                             "zoneout, no recurrent dropout and no coupled gates")
        if peepholes and any(variant.zones()):
            raise ValueError("peepholes cannot look at a c with zoneout: leave out one of them")
        self.proj_size = scalars.size("proj_size", proj_size, at_least=0)
        self.peepholes, self.forget_bias = bool(peepholes), float(forget_bias)
        if self.proj_size > scalars.size("hidden_size", hidden_size):
            raise ValueError(f"proj_size must be at most hidden_size = {hidden_size}, "
                             f"got {proj_size}")
        self._build(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
                    init, dtype, compute, seed, locked_dropout, weight_dropout)
        for weights in self._weights if self.bias else ():
            weights["b"][hidden_size:2 * hidden_size] += self.forget_bias
        for weights in self._weights if layer_norm else ():
            weights["norms"][:-1], weights["norms"][-1] = 1, 0

    def _drawn(self, variant, x):
        (T, B), H = x.shape[:2], self.hidden_size
        masks = {}
        if self.recurrent_dropout:
            masks["h_mask"] = dropout_mask(self.rng, self.recurrent_dropout, (B, H), self.dtype)
        if variant is not None and any(z := variant.zones()):
            masks["zone_masks"] = _zone_masks(self.rng, z, T, B, H, self.dtype)
        return dataclasses.replace(variant or Variant(), **masks) if masks else variant

    @property
    def _widths(self):
        return self.proj_size or self.hidden_size, self.hidden_size

    def _shapes(self, layer):
        shapes, (P, H) = super()._shapes(layer), self._widths
        if self.peepholes:
            shapes["peepholes"] = 3, H
        if self.proj_size:
            shapes["W_hr"] = P, H
        if self.layer_norm:
            shapes["norms"] = LAYER_NORMS[self.layer_norm][1], H
        return shapes

    def _format(self, precision):
        format = super()._format(precision)
        if self.layer_norm and format not in ("float32", "float64"):
            raise ValueError(f"an LSTM with layer_norm cannot be frozen in {format}: its means are sums over "
                             "a row")
        return format

    def _cell_forward(self, weights, x, state, lengths, reverse, keep_tape):
        h0, c0 = state
        return functional.lstm_forward(
            x, **weights, h0=h0, c0=c0, lengths=lengths, reverse=reverse,
            keep_tape=keep_tape, n_threads=self.n_threads, compute=self._products)

    def _cell_backward(self, tape, dy, dfinal):
        g = functional.lstm_backward(tape, dy, *dfinal, n_threads=self.n_threads)
        return g, (g.dh0, g.dc0)

    def _traced(self, y, tape):
        gates = np.split(tape.gates, 4, axis=2)
        return LSTMTrace(*(self._swap(a.copy()) for a in (*gates, tape.c, y)))


def _zone_masks(rng, zones, T, B, H, dtype):
    """1 where h, and c, keep their last value, else 0, (T, B, 2, H).

    Four of them for each number that is drawn, so probabilities are multiples of 2^-16: drawn one by one
    they were a sixth of a training step at 512 units. z is below 1.
    """
    drawn = rng.integers(0, 1 << 64, (T * B * H + 1) // 2, np.uint64).view(np.uint16)
    drawn, masks = drawn[:T * B * 2 * H].reshape(T, B, 2, H), np.empty((T, B, 2, H), dtype)
    for k, z in enumerate(zones):
        np.less(drawn[:, :, k], np.uint16(z * 65536), out=masks[:, :, k])
    return masks


class GRU(_Recurrent[Floats, GRUTrace]):
    """A stack of gated recurrent units (Cho et al. 2014): three gates, and no cell beside h.

    As `LSTM`, without projection, peepholes and variants; the state is h alone, (L·D, B, H).

    reset_after : True: the reset gate multiplies W_hn h + b_hn, as in torch.nn.GRU and, by default, in
        Keras; False: it multiplies h, as in the paper

    Its parameters in layer 0: weight_ih_l0 (3H, I) and weight_hh_l0 (3H, H), their rows ordered r, z, n,
    and bias_l0 (4H,), ordered b_r, b_z, b_n, b_hn; without reset_after (3H,), without b_hn.

    >>> m = GRU(3, 5, seed=0)
    >>> y, h_n = m(np.zeros((7, 4, 3), "float32"))
    >>> y.shape, h_n.shape, m.parameters()["bias_l0"].shape
    ((7, 4, 5), (1, 4, 5), (20,))
    """

    _gates = 3
    _says = "batch_first", "dropout", "reset_after"
    _options = dict(weight_dropout=0.0, locked_dropout=False)

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, *,
                 reset_after: bool = True, bias: bool = True, batch_first: bool = False,
                 dropout: float = 0.0, bidirectional: bool = False, weight_dropout: float = 0.0,
                 locked_dropout: bool = False, init: Init = "uniform",
                 dtype: Dtype = "float32", compute: Compute | None = None,
                 seed: Seed = None) -> None:
        self.reset_after = bool(reset_after)
        self._cell = "gru" if self.reset_after else "gru_before"
        self._build(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
                    init, dtype, compute, seed, locked_dropout, weight_dropout)

    @property
    def _biases(self):
        return 3 + self.reset_after

    def _cell_forward(self, weights, x, state, lengths, reverse, keep_tape):
        y, h_n, tape = functional.gru_forward(
            x, **weights, h0=state[0], reset_after=self.reset_after, lengths=lengths,
            reverse=reverse, keep_tape=keep_tape, n_threads=self.n_threads, compute=self._products)
        return y, (h_n,), tape

    def _cell_backward(self, tape, dy, dfinal):
        g = functional.gru_backward(tape, dy, *dfinal, n_threads=self.n_threads)
        return g, (g.dh0,)

    def _traced(self, y, tape):
        r, z, n, *_ = np.split(tape.gates, self._biases, axis=2)
        return GRUTrace(*(self._swap(a.copy()) for a in (r, z, n, y)))


class RNN(_Recurrent[Floats, RNNTrace]):
    """A stack of vanilla layers (Elman 1990): h_t = tanh(x_t W_ihᵀ + h_{t-1} W_hhᵀ + b), or relu.

    As `LSTM`, with `nonlinearity` "tanh" or "relu". Weights have H rows where an LSTM's have 4H,
    and the state is h alone, (L·D, B, H).

    >>> m = RNN(3, 5, nonlinearity="relu", seed=0)
    >>> y, h_n = m(np.zeros((7, 4, 3), "float32"))
    >>> y.shape, h_n.shape
    ((7, 4, 5), (1, 4, 5))
    """

    _gates = 1
    _says = "batch_first", "dropout", "nonlinearity"
    _options = dict(weight_dropout=0.0, locked_dropout=False)

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, *,
                 nonlinearity: Literal["tanh", "relu"] = "tanh", bias: bool = True,
                 batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False,
                 weight_dropout: float = 0.0, locked_dropout: bool = False,
                 init: Init = "uniform", dtype: Dtype = "float32",
                 compute: Compute | None = None, seed: Seed = None) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
        self.nonlinearity = self._cell = nonlinearity
        self._build(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
                    init, dtype, compute, seed, locked_dropout, weight_dropout)

    def _cell_forward(self, weights, x, state, lengths, reverse, keep_tape):
        y, h_n, tape = functional.rnn_forward(
            x, **weights, h0=state[0], nonlinearity=self.nonlinearity, lengths=lengths,
            reverse=reverse, keep_tape=keep_tape, n_threads=self.n_threads, compute=self._products)
        return y, (h_n,), tape

    def _cell_backward(self, tape, dy, dfinal):
        g = functional.rnn_backward(tape, dy, *dfinal, n_threads=self.n_threads)
        return g, (g.dh0,)

    def _traced(self, y, tape):
        return RNNTrace(self._swap(y))
