"""Layers: LSTM and RNN stacks, Embedding, Linear, Dropout, activations, pooling over time.

A layer is called on its input and, in training mode, keeps what its backward needs; `backward`
takes the gradient of the loss by the output, adds to `gradients()` and returns the gradient by the
input. There is no graph: a model calls its layers in order and their backwards in reverse order.
The recurrences themselves are `lstmcore.functional`'s; nothing here knows their equations.

Sizes: T steps, B batch, I inputs, H hidden units, P projected units (P = H without projection),
L layers, D directions, V vocabulary.
"""

import re
from collections import namedtuple

import numpy as np

from lstmcore import functional

Trace = namedtuple("Trace", "i f g o c h")


class Module:
    """What every layer is: named parameters with their gradients, and a training mode.

    A model is a class whose attributes (or lists of them) are layers; their parameters are then
    its own, named `attribute.parameter`.

    >>> class Tagger(Module):
    ...     def __init__(self):
    ...         self.embed, self.head = Embedding(50, 8, seed=0), Linear(8, 3, seed=1)
    >>> [(name, p.shape) for name, p in Tagger().parameters().items()]
    [('embed.weight', (50, 8)), ('head.weight', (3, 8)), ('head.bias', (3,))]
    """

    training = True
    rng = None          # the layer's random numbers, where it needs any
    _own = {}           # name -> (parameter, gradient) of this layer alone
    _tape = None        # what the last call in training mode left for backward

    def parameters(self):
        """The parameters by name: the arrays themselves, to be changed only in place."""
        return {name: p for name, (p, _) in self._named()}

    def gradients(self):
        """The gradients under the parameters' names: the arrays themselves."""
        return {name: g for name, (_, g) in self._named()}

    def zero_grad(self):
        """Set every gradient to zero, before the next backward adds to it."""
        for _, (_, g) in self._named():
            g.fill(0)

    def train(self, mode=True):
        """Training mode (or not): tapes are kept for backward, and dropout drops. Returns self."""
        for _, module in self.modules():
            module.training = bool(mode)
            if not mode:
                module._tape = None
        return self

    def eval(self):
        """Inference mode: nothing is kept, nothing dropped. Returns self."""
        return self.train(False)

    def modules(self, prefix=""):
        """(prefix, module) for this module and every module below it, in order of attributes."""
        yield prefix, self
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield from value.modules(f"{prefix}{name}.")
            elif isinstance(value, (list, tuple)):
                for n, module in enumerate(value):
                    if isinstance(module, Module):
                        yield from module.modules(f"{prefix}{name}.{n}.")

    def state_dict(self):
        """A copy of every parameter by name."""
        return {name: p.copy() for name, p in self.parameters().items()}

    def load_state_dict(self, state):
        """Copy `state` (name -> array, or a PyTorch state_dict) into the parameters, and cast it.

        The names and shapes must be this module's. PyTorch's pair of biases is taken as the one
        bias it stands for: bias_l0 = bias_ih_l0 + bias_hh_l0.
        """
        state = _fold_bias_pairs({name: np.asarray(value) for name, value in state.items()})
        parameters = self.parameters()
        missing, unknown = parameters.keys() - state.keys(), state.keys() - parameters.keys()
        if missing or unknown:
            raise ValueError(f"state_dict does not fit {type(self).__name__}: "
                             f"missing {sorted(missing)}, unexpected {sorted(unknown)}")
        for name, p in parameters.items():
            if state[name].shape != p.shape:
                raise ValueError(f"{name} must be {p.shape}, got {state[name].shape}")
            if state[name].dtype.kind != "f":
                raise TypeError(f"{name} must hold floats, got {state[name].dtype}")
        for name, p in parameters.items():
            np.copyto(p, state[name], casting="same_kind")

    def rng_state(self):
        """The state of every layer's random numbers, by the layer's name; JSON can hold it."""
        return {prefix + "rng": module.rng.bit_generator.state
                for prefix, module in self.modules() if module.rng is not None}

    def load_rng_state(self, state):
        """Continue with the random numbers that `rng_state` described."""
        for prefix, module in self.modules():
            if module.rng is not None:
                module.rng.bit_generator.state = state[prefix + "rng"]

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "_tape"}

    def _named(self):
        for prefix, module in self.modules():
            for name, pair in module._own.items():
                yield prefix + name, pair

    def _declare(self, name, value):
        """Make `value` a parameter of this layer, with a gradient of zeros beside it."""
        self._own = {**self._own, name: (value, np.zeros_like(value))}

    def _keep(self, *tape):
        self._tape = tape if self.training else None

    def _take(self, dy):
        """What the last call kept, once; `dy` must have the shape of that call's output."""
        if self._tape is None:
            name = type(self).__name__
            raise RuntimeError(f"{name}.backward needs a call of this {name} in training mode just "
                               "before it: none was kept, or a backward has already used it")
        shape = self._tape[-1]
        if np.shape(dy) != shape:
            raise ValueError(f"dy must have the shape of the output, {shape}, got {np.shape(dy)}")
        tape, self._tape = self._tape, None
        return tape


def _fold_bias_pairs(state):
    """PyTorch's bias_ih_* and bias_hh_*, which act only as their sum, as one bias_*."""
    folded = dict(state)
    for name in state:
        match = re.fullmatch(r"(.*)bias_ih_(l\d+(?:_reverse)?)", name)
        if match and f"{match[1]}bias_hh_{match[2]}" in state:
            pair = folded.pop(name), folded.pop(f"{match[1]}bias_hh_{match[2]}")
            folded[f"{match[1]}bias_{match[2]}"] = pair[0] + pair[1]
    return folded


class _Recurrent(Module):
    """A stack of recurrent layers in one or two directions: everything but the cell."""

    gates = 1

    def _build(self, input_size, hidden_size, num_layers, bias, batch_first, dropout,
               bidirectional, init, dtype, seed, *, proj_size=0, peepholes=False):
        self.input_size = _size("input_size", input_size)
        self.hidden_size = _size("hidden_size", hidden_size)
        self.num_layers = _size("num_layers", num_layers)
        self.proj_size = _size("proj_size", proj_size, at_least=0)
        self.bias, self.batch_first = bool(bias), bool(batch_first)
        self.bidirectional, self.peepholes = bool(bidirectional), bool(peepholes)
        self.dropout = _probability("dropout", dropout)
        self.init, self.dtype = init, _dtype(dtype)
        self.rng = np.random.default_rng(seed)
        self.n_threads = None
        H, P, D = self.hidden_size, self.output_size, 1 + self.bidirectional
        if P > H:
            raise ValueError(f"proj_size must be at most hidden_size = {H}, got {proj_size}")
        draw = _initializer(init, H, self.rng)
        self._cells = []
        for layer in range(self.num_layers):
            for suffix in ("", "_reverse")[:D]:
                shapes = {"weight_ih": (self.gates, H, self.input_size if layer == 0 else P * D),
                          "weight_hh": (self.gates, H, P), "bias": (self.gates, H),
                          "weight_peephole": (3, H), "weight_hr": (P, H)}
                wanted = dict(weight_ih=True, weight_hh=True, bias=self.bias,
                              weight_peephole=self.peepholes, weight_hr=self.proj_size > 0)
                cell = {}
                for name in filter(wanted.get, shapes):
                    value = draw(name, shapes[name])
                    if name in ("weight_ih", "weight_hh", "bias"):
                        value = value.reshape(self.gates * H, *shapes[name][2:])
                    full = f"{name}_l{layer}{suffix}"
                    self._declare(full, np.ascontiguousarray(value, dtype=self.dtype))
                    cell[name] = self._own[full]
                self._cells.append(cell)

    @property
    def output_size(self):
        """The width of h of one direction: proj_size if there is a projection, else hidden_size."""
        return self.proj_size or self.hidden_size

    def __call__(self, x, state=None, lengths=None):
        """x (T,B,I), or (B,T,I) with batch_first -> y (T,B,D·P), and the final state.

        Parameters
        ----------
        x : array of the layer's dtype; or token ids (T,B) of an integer dtype, read as one-hot rows
        state : the initial state, as the final state of another call; zeros by default
        lengths : (B,) ints in 0..T: each sequence ends after its own number of steps; y is 0 past
            the end and the final state is that of each sequence's own last step
        """
        x, initial = self._check(x, state)
        y, final, tapes = self._run(x, initial, lengths, self.training)
        y = self._outside(y)
        self._keep(tapes, y.shape)
        return y, self._pack(final)

    def backward(self, dy=None, dstate=None):
        """Gradients of the loss by y and by the final state -> dx, and by the initial state.

        Adds to `gradients()`. Either may be None, for zero; dx is None for token ids.
        """
        D = 1 + self.bidirectional
        if dy is None and self._tape is not None:
            dy = np.zeros(self._tape[-1], self.dtype)
        self._expect("dy", dy)
        tapes, _ = self._take(dy)
        dy = self._outside(np.asarray(dy))
        dfinal = self._unpack(dstate, dy.shape[1], "dstate")
        dinitial = [None] * len(self._cells)
        for layer in reversed(range(self.num_layers)):
            mask, runs = tapes[layer]
            halves = [dy] if D == 1 else np.split(dy, 2, axis=2)
            dy = None
            for d in range(D):
                n = layer * D + d
                dx, dinitial[n] = self._cell_backward(n, runs[d], halves[d], dfinal[n])
                dy = dx if dy is None else np.add(dy, dx, out=dy)
            if mask is not None:
                np.multiply(dy, mask, out=dy)
        return None if dy is None else self._outside(dy), self._pack(dinitial)

    def stream(self, batch_size=1):
        """A `Stream`: the layer as a machine that takes one step at a time."""
        return Stream(self, batch_size)

    def trace(self, x, state=None, lengths=None):
        """Everything the layer computes for x: a list of Trace(i, f, g, o, c, h).

        One Trace per layer and direction, in the order of the states. Each array is (T,B,H), or
        (B,T,H) with batch_first, and h is (T,B,P). Runs without dropout and disturbs nothing.
        """
        x, initial = self._check(x, state)
        training, self.training = self.training, False
        try:
            _, _, tapes = self._run(x, initial, lengths, True)
        finally:
            self.training = training
        return [self._traced(tape) for _, runs in tapes for tape in runs]

    def _run(self, x, initial, lengths, keep_tape):
        D = 1 + self.bidirectional
        final, tapes = [], []
        for layer in range(self.num_layers):
            mask = None
            if layer and self.training and self.dropout:
                mask = _dropout_mask(self.rng, self.dropout, x.shape, self.dtype)
                x = x * mask
            ys, runs = [], []
            for d in range(D):
                n = layer * D + d
                y, last, tape = self._cell_forward(n, x, initial[n], lengths, d == 1, keep_tape)
                ys.append(y)
                final.append(last)
                runs.append(tape)
            x = ys[0] if D == 1 else np.concatenate(ys, axis=2)
            tapes.append((mask, runs))
        return x, final, tapes

    def _weights(self, n):
        return {name: p for name, (p, _) in self._cells[n].items()}

    def _accumulate(self, n, **found):
        for name, (_, g) in self._cells[n].items():
            g += found[name]

    def _check(self, x, state):
        """x as time-major, and the initial state of every cell."""
        x = np.asarray(x)
        tokens = x.dtype.kind in "iu" and x.ndim == 2
        if not tokens:
            self._expect("x", x)
            if x.ndim != 3 or x.shape[2] != self.input_size:
                axes = "(B, T, I)" if self.batch_first else "(T, B, I)"
                raise ValueError(f"x must be {axes} with I = {self.input_size}, got {x.shape}")
        x = self._outside(x)
        return x, self._unpack(state, x.shape[1], "state")

    def _expect(self, name, array):
        if array is not None and (got := getattr(array, "dtype", None)) != self.dtype:
            raise TypeError(f"{name} must be an array of the layer's dtype {self.dtype}, "
                            f"got {type(array).__name__ if got is None else got}")

    def _outside(self, a):
        """Time-major to what the user sees, or back: the same swap."""
        return a.swapaxes(0, 1) if self.batch_first else a

    def _expect_state(self, name, array, B, width):
        shape = (len(self._cells), B, width)
        self._expect(name, array)
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} must be (L·D, B, width) = {shape}, got {array.shape}")
        return [None] * shape[0] if array is None else array

    def __repr__(self):
        said = [f"{self.input_size}, {self.hidden_size}"]
        for name, plain in self._plain.items():
            if (value := getattr(self, name)) != plain:
                said.append(f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(said)})"


class LSTM(_Recurrent):
    """A stack of LSTM layers (Hochreiter and Schmidhuber 1997; forget gate: Gers et al. 2000).

    Parameters
    ----------
    input_size, hidden_size, num_layers : int
    bias : without it there is no bias and no forget_bias
    batch_first : x and y are (B, T, ·) instead of (T, B, ·); states never are
    dropout : probability to drop a number between two layers, drawn anew for every step
    bidirectional : a second LSTM reads each sequence from its own end; y holds both, (T, B, 2P)
    proj_size : P, the width to which h is projected (Sak et al. 2014); 0 for none
    peepholes : the gates also see the cell, weight by weight (Gers et al. 2002)
    forget_bias : added to the bias of the forget gate at the start, so that cells remember
    init : "uniform", U(-1/√H, 1/√H) as in PyTorch; or "glorot", Glorot for inputs, orthogonal for
        the recurrence, zero for bias and peepholes
    dtype : "float32" or "float64", of the weights and everything that is given or returned
    seed : int, numpy Generator or None: of the weights and of dropout

    Parameters by name, for layer 0 (`_l1`, ... above; `_reverse` added for the second direction):
    weight_ih_l0 (4H, I), weight_hh_l0 (4H, P), bias_l0 (4H,), rows ordered i, f, g, o;
    weight_peephole_l0 (3, H): p_i, p_f, p_o; weight_hr_l0 (P, H).

    >>> m = LSTM(3, 5, num_layers=2, seed=0)
    >>> x = np.random.default_rng(1).standard_normal((7, 4, 3), dtype="float32")
    >>> y, (h_n, c_n) = m(x)
    >>> y.shape, h_n.shape, c_n.shape
    ((7, 4, 5), (2, 4, 5), (2, 4, 5))
    >>> dx, (dh0, dc0) = m.backward(np.ones_like(y))
    >>> dx.shape, m.gradients()["weight_hh_l1"].shape
    ((7, 4, 3), (20, 5))
    """

    gates = 4
    _plain = dict(num_layers=1, bias=True, batch_first=False, dropout=0.0, bidirectional=False,
                  proj_size=0, peepholes=False, forget_bias=1.0, init="uniform",
                  dtype=np.dtype("float32"))

    def __init__(self, input_size, hidden_size, num_layers=1, *, bias=True, batch_first=False,
                 dropout=0.0, bidirectional=False, proj_size=0, peepholes=False, forget_bias=1.0,
                 init="uniform", dtype="float32", seed=None):
        self._build(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
                    init, dtype, seed, proj_size=proj_size, peepholes=peepholes)
        self.forget_bias = float(forget_bias)
        for cell in self._cells if self.bias else ():
            cell["bias"][0][self.hidden_size:2 * self.hidden_size] += self.forget_bias

    def _cell_forward(self, n, x, state, lengths, reverse, keep_tape):
        w = self._weights(n)
        return functional.lstm_forward(
            x, w["weight_ih"], w["weight_hh"], w.get("bias"), *state,
            peepholes=w.get("weight_peephole"), W_hr=w.get("weight_hr"), lengths=lengths,
            reverse=reverse, keep_tape=keep_tape, n_threads=self.n_threads)

    def _cell_backward(self, n, tape, dy, dstate):
        g = functional.lstm_backward(tape, dy, *dstate, n_threads=self.n_threads)
        self._accumulate(n, weight_ih=g.dW_ih, weight_hh=g.dW_hh, bias=g.db,
                         weight_peephole=g.dpeepholes, weight_hr=g.dW_hr)
        return g.dx, (g.dh0, g.dc0)

    def _traced(self, tape):
        gates = np.split(tape.gates, 4, axis=2)
        return Trace(*(self._outside(a.copy()) for a in (*gates, tape.c, tape.y)))

    def _unpack(self, state, B, name):
        h, c = (None, None) if state is None else state
        letter = "d" * (name == "dstate")
        return list(zip(self._expect_state(f"{letter}h of {name}", h, B, self.output_size),
                        self._expect_state(f"{letter}c of {name}", c, B, self.hidden_size)))

    def _pack(self, states):
        return tuple(np.stack(part) for part in zip(*states))

    def _zero_state(self, B):
        return [(np.zeros((B, self.output_size), self.dtype),
                 np.zeros((B, self.hidden_size), self.dtype)) for _ in self._cells]


class RNN(_Recurrent):
    """A stack of vanilla (Elman 1990) layers: h_t = tanh(x_t W_ihᵀ + h_{t-1} W_hhᵀ + b), or relu.

    The parameters are those of `LSTM`, with H rows where it has 4H; the state is h alone, (L·D,B,H).

    >>> m = RNN(3, 5, nonlinearity="relu", seed=0)
    >>> y, h_n = m(np.zeros((7, 4, 3), "float32"))
    >>> y.shape, h_n.shape
    ((7, 4, 5), (1, 4, 5))
    """

    _plain = dict(num_layers=1, nonlinearity="tanh", bias=True, batch_first=False, dropout=0.0,
                  bidirectional=False, init="uniform", dtype=np.dtype("float32"))

    def __init__(self, input_size, hidden_size, num_layers=1, *, nonlinearity="tanh", bias=True,
                 batch_first=False, dropout=0.0, bidirectional=False, init="uniform",
                 dtype="float32", seed=None):
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
        self.nonlinearity = nonlinearity
        self._build(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
                    init, dtype, seed)

    def _cell_forward(self, n, x, h0, lengths, reverse, keep_tape):
        w = self._weights(n)
        return functional.rnn_forward(
            x, w["weight_ih"], w["weight_hh"], w.get("bias"), h0, nonlinearity=self.nonlinearity,
            lengths=lengths, reverse=reverse, keep_tape=keep_tape, n_threads=self.n_threads)

    def _cell_backward(self, n, tape, dy, dh_n):
        g = functional.rnn_backward(tape, dy, dh_n, n_threads=self.n_threads)
        self._accumulate(n, weight_ih=g.dW_ih, weight_hh=g.dW_hh, bias=g.db)
        return g.dx, g.dh0

    def _traced(self, tape):
        return Trace(None, None, None, None, None, self._outside(tape.y.copy()))

    def _unpack(self, state, B, name):
        letter = "d" * (name == "dstate")
        return self._expect_state(f"{letter}h of {name}", state, B, self.hidden_size)

    def _pack(self, states):
        return np.stack(states)

    def _zero_state(self, B):
        return [np.zeros((B, self.hidden_size), self.dtype) for _ in self._cells]


class Stream:
    """A recurrent layer that is fed one step at a time and remembers its state.

    >>> m = LSTM(3, 5, seed=0)
    >>> s = m.stream(batch_size=2)
    >>> s.step(np.zeros((2, 3), "float32")).shape
    (2, 5)
    >>> s.reset()
    """

    def __init__(self, layer, batch_size=1):
        if layer.bidirectional:
            raise ValueError("a bidirectional layer cannot stream: it reads the end first")
        self.layer, self.batch_size = layer, _size("batch_size", batch_size)
        self.reset()

    def reset(self):
        """Back to the state of zeros."""
        self._state = self.layer._zero_state(self.batch_size)

    @property
    def state(self):
        """The state after the last step, as the layer returns it; may be set."""
        return self.layer._pack(self._state)

    @state.setter
    def state(self, state):
        self._state = self.layer._unpack(state, self.batch_size, "state")

    def step(self, x_t, out=None):
        """One step: x_t (B, I), or token ids (B,) -> y_t (B, P), written to `out` if given."""
        x = self.layer._outside(np.asarray(x_t)[None])
        if x.shape[int(not self.layer.batch_first)] != self.batch_size:
            raise ValueError(f"x_t must have B = {self.batch_size} rows, got {np.shape(x_t)}")
        x, _ = self.layer._check(x, None)
        for n in range(self.layer.num_layers):
            x, self._state[n], _ = self.layer._cell_forward(n, x, self._state[n], None, False, False)
        if out is None:
            return x[0]
        np.copyto(out, x[0])
        return out


class Embedding(Module):
    """A table with one row of numbers per token: tokens (...) ints -> (..., E).

    Parameters: weight (V, E), drawn from N(0, 1).

    >>> Embedding(10, 4, seed=0)(np.array([[1, 2, 3]])).shape
    (1, 3, 4)
    """

    def __init__(self, num_embeddings, embedding_dim, *, dtype="float32", seed=None):
        self.num_embeddings = _size("num_embeddings", num_embeddings)
        self.embedding_dim = _size("embedding_dim", embedding_dim)
        self.dtype = _dtype(dtype)
        shape = self.num_embeddings, self.embedding_dim
        self._declare("weight", np.random.default_rng(seed).standard_normal(shape)
                      .astype(self.dtype))

    def __call__(self, tokens):
        """Token ids in 0..V-1, any shape -> their rows."""
        tokens = np.asarray(tokens)
        if tokens.dtype.kind not in "iu":
            raise TypeError(f"tokens must be integers, got {tokens.dtype}")
        V = self.num_embeddings
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < V:
            raise ValueError(f"tokens must be in 0..{V - 1}, got {tokens.min()}..{tokens.max()}")
        y = self._own["weight"][0][tokens]
        self._keep(tokens, y.shape)
        return y

    def backward(self, dy):
        """Adds each dy to the gradient of its token's row. Tokens have no gradient: None."""
        tokens, _ = self._take(dy)
        _add_rows(self._own["weight"][1], tokens.ravel(), np.reshape(dy, (tokens.size, -1)))

    def __repr__(self):
        return f"Embedding({self.num_embeddings}, {self.embedding_dim})"


def _add_rows(table, rows, values):
    """table[rows[n]] += values[n], for rows that repeat: sorted, then summed run by run."""
    if rows.size == 0:
        return
    order = np.argsort(rows, kind="stable")
    rows = rows[order]
    starts = np.flatnonzero(np.r_[True, rows[1:] != rows[:-1]])
    table[rows[starts]] += np.add.reduceat(values[order], starts, axis=0)


class Linear(Module):
    """y = x Wᵀ + b on the last axis: x (..., I) -> (..., O).

    Parameters: weight (O, I), bias (O,), drawn from U(-1/√I, 1/√I) as in PyTorch.

    >>> Linear(8, 3, seed=0)(np.zeros((5, 2, 8), "float32")).shape
    (5, 2, 3)
    """

    def __init__(self, in_features, out_features, *, bias=True, dtype="float32", seed=None):
        self.in_features = _size("in_features", in_features)
        self.out_features = _size("out_features", out_features)
        self.bias, self.dtype = bool(bias), _dtype(dtype)
        rng, bound = np.random.default_rng(seed), self.in_features**-0.5
        for name, shape in {"weight": (self.out_features, self.in_features),
                            "bias": (self.out_features,)}.items():
            if name == "weight" or self.bias:
                self._declare(name, rng.uniform(-bound, bound, shape).astype(self.dtype))

    def __call__(self, x):
        """x (..., I) of the layer's dtype -> y (..., O)."""
        x = np.asarray(x)
        if x.dtype != self.dtype:
            raise TypeError(f"x must be of the layer's dtype {self.dtype}, got {x.dtype}")
        if x.ndim < 1 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must be (..., {self.in_features}), got {x.shape}")
        rows = x.reshape(-1, self.in_features)
        y = rows @ self._own["weight"][0].T
        if self.bias:
            y += self._own["bias"][0]
        y = y.reshape(*x.shape[:-1], self.out_features)
        self._keep(rows, y.shape)
        return y

    def backward(self, dy):
        """dy (..., O) -> dx (..., I); adds to the gradients of weight and bias."""
        x, shape = self._take(dy)
        dy = np.reshape(dy, (len(x), self.out_features))
        weight, dweight = self._own["weight"]
        dweight += dy.T @ x
        if self.bias:
            self._own["bias"][1][...] += dy.sum(axis=0)
        return (dy @ weight).reshape(*shape[:-1], self.in_features)

    def __repr__(self):
        return (f"Linear({self.in_features}, {self.out_features}"
                f"{'' if self.bias else ', bias=False'})")


class Dropout(Module):
    """In training, sets each number to zero with probability p and scales the rest by 1/(1-p).

    >>> Dropout(0.5).eval()(np.ones(3))
    array([1., 1., 1.])
    """

    def __init__(self, p=0.5, *, seed=None):
        self.p = _probability("p", p)
        self.rng = np.random.default_rng(seed)

    def __call__(self, x):
        """x of any shape -> the same shape."""
        x = np.asarray(x)
        if not self.training:
            return x
        mask = _dropout_mask(self.rng, self.p, x.shape, x.dtype)
        self._keep(mask, x.shape)
        return x * mask

    def backward(self, dy):
        """dy -> dx, dropped and scaled as x was."""
        mask, _ = self._take(dy)
        return dy * mask

    def __repr__(self):
        return f"Dropout({self.p})"


def _dropout_mask(rng, p, shape, dtype):
    """0 with probability p, else 1/(1-p)."""
    if p == 1:
        return np.zeros(shape, dtype)
    return (rng.random(shape, np.float32) >= p) * dtype.type(1 / (1 - p))


def _size(name, value, at_least=1):
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
    return int(value)


def _probability(name, value):
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in 0..1, got {value}")
    return float(value)


def _dtype(dtype):
    if np.dtype(dtype) not in (np.float32, np.float64):
        raise TypeError(f"dtype must be 'float32' or 'float64', got {dtype!r}")
    return np.dtype(dtype)


def _initializer(init, H, rng):
    """draw(name, shape) -> the first values of a parameter, for the initialization `init`."""
    def uniform(name, shape):
        return rng.uniform(-H**-0.5, H**-0.5, shape)

    def glorot(name, shape):
        if name in ("bias", "weight_peephole"):
            return np.zeros(shape)
        if name == "weight_hh":
            return np.stack([_orthogonal(rng, *shape[1:]) for _ in range(shape[0])])
        bound = (6 / sum(shape[-2:])) ** 0.5
        return rng.uniform(-bound, bound, shape)

    try:
        return {"uniform": uniform, "glorot": glorot}[init]
    except (KeyError, TypeError):
        raise ValueError(f"init must be 'uniform' or 'glorot', got {init!r}") from None


def _orthogonal(rng, rows, columns):
    """A (rows, columns) matrix, rows >= columns, whose columns are orthonormal (Saxe et al. 2014)."""
    q, r = np.linalg.qr(rng.standard_normal((rows, columns)))
    return q * np.sign(np.diag(r))
