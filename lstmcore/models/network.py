"""The network of every model: tokens or channels -> recurrent layers -> a linear head.

`Model` is what the models share: weights that can be fixed for inference. Knows layers; knows no
text, no training and no files.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import numpy as np

from lstmcore import scalars
from lstmcore._types import Array, Cell, Compute, Dtype, Floats, Ints, Lengths, Precision, Seed
from lstmcore.layers import (GRU, LSTM, RNN, Dropout, Embedding, LastStep, Linear, MaxOverTime,
                             MeanOverTime, Sequential)
from lstmcore.losses import linear_cross_entropy
from lstmcore.module import Module, dropout_mask, products
from lstmcore.variants import LAYER_NORMS

M = TypeVar("M", bound="Model")

CELLS = {"lstm": LSTM, "gru": GRU, "rnn": RNN}


class MeanAndMaxOverTime(Module):
    """The mean and the maximum of y over each sequence's steps, side by side: (T,B,N) -> (B,2N)."""

    def __init__(self) -> None:
        self.mean, self.max = MeanOverTime(), MaxOverTime()

    def __call__(self, y: Floats, lengths: Lengths = None) -> Floats:
        return np.concatenate([self.mean(y, lengths), self.max(y, lengths)], axis=1)

    def backward(self, dout: Floats) -> Floats:
        """The gradient by what was returned -> the gradient by y, which it has twice."""
        by_mean, by_max = (np.ascontiguousarray(part) for part in np.split(dout, 2, axis=1))
        dy = self.mean.backward(by_mean)
        dy += self.max.backward(by_max)
        return dy


class TokenDropout(Module):
    """Drops the vectors of whole tokens, (T,B,N), each with probability p, in training mode."""

    _says = ("p",)

    def __init__(self, p: float, *, seed: Seed = None) -> None:
        self.p, self.rng = p, np.random.default_rng(seed)

    def __call__(self, x: Floats) -> Floats:
        if not self.training:
            return x
        mask = dropout_mask(self.rng, self.p, (*x.shape[:-1], 1), x.dtype)
        y = x * mask
        self._keep(y, mask)
        return y

    def backward(self, dy: Floats | None = None) -> Floats:
        """The gradient by what was returned -> the gradient by x."""
        dy, mask = self._take(dy)
        return dy * mask


POOLING = {"last": LastStep, "mean": MeanOverTime, "max": MaxOverTime, "mean+max": MeanAndMaxOverTime}


def checked(*, cell: Any, hidden_size: Any, num_layers: Any, embed_size: Any, dropout: Any,
            peepholes: Any, dtype: Any, compute: Any) -> dict[str, Any]:
    """What every model lets its user choose, found to be right, by the names of the arguments."""
    scalars.choice("cell", cell, CELLS)
    if peepholes and cell != "lstm":
        raise ValueError(f"peepholes need cell='lstm', got {cell!r}")
    return dict(cell=cell, hidden_size=scalars.size("hidden_size", hidden_size),
                num_layers=scalars.size("num_layers", num_layers),
                embed_size=scalars.size("embed_size", embed_size, at_least=0),
                dropout=scalars.probability("dropout", dropout), peepholes=bool(peepholes),
                dtype=str(scalars.float_dtype(dtype)),
                compute=products(compute, scalars.float_dtype(dtype)))


# Of a language model, what its layers take beside, and what is usual; the first three are an LSTM's.
OPTIONS: dict[str, Any] = {"recurrent_dropout": 0.0, "zoneout": 0.0, "layer_norm": None,
                           "weight_dropout": 0.0, "locked_dropout": False}


def checked_options(cell: str, **given: Any) -> dict[str, Any]:
    """OPTIONS, found to be right for a cell."""
    for name in list(OPTIONS)[:3]:
        if given[name] and cell != "lstm":
            raise ValueError(f"{name} needs cell='lstm', got {cell!r}")
    for name in ("recurrent_dropout", "zoneout", "weight_dropout"):
        given[name] = scalars.probability(name, given[name])
    if given["layer_norm"] is not None:
        scalars.choice("layer_norm", given["layer_norm"], LAYER_NORMS)
    return {**given, "locked_dropout": bool(given["locked_dropout"])}


class Network(Module):
    """[A table of tokens] -> recurrent layers -> [one vector per sequence] -> linear head.

    Parameters
    ----------
    inputs, outputs : V tokens, or C channels; and as many outputs as inputs by default
    embed_size : width of the table of tokens; 0 for channels, and for one-hot rows of tokens
    pooling : "last", "mean", "max" or "mean+max" of the steps; None for outputs at each step
    dropout : probability, between layers and before the head; with pooling on embedded tokens too
    token_dropout : with pooling, probability of whole tokens
    recurrent : what else the layers take; peepholes and forget_bias only an LSTM
    """

    pool: Any = None
    input_dropout: Any = None

    def __init__(self, inputs: int, outputs: int | None = None, *, cell: Cell, hidden_size: int,
                 num_layers: int, embed_size: int, dropout: float = 0.0, token_dropout: float = 0.0,
                 pooling: Literal["last", "mean", "max", "mean+max"] | None = None, dtype: Dtype = "float32",
                 compute: Compute | None = None, n_threads: int | None = None, seed: Seed = None,
                 **recurrent: Any) -> None:
        self._arguments = dict(
            recurrent, inputs=inputs, outputs=outputs, cell=cell, hidden_size=hidden_size,
            num_layers=num_layers, embed_size=embed_size, dropout=dropout, token_dropout=token_dropout,
            pooling=pooling, dtype=str(np.dtype(dtype)), compute=compute, n_threads=n_threads)
        rng = np.random.default_rng(seed)
        common: dict[str, Any] = dict(dtype=dtype, compute=compute, seed=rng)
        if cell != "lstm":
            recurrent = {name: value for name, value in recurrent.items()
                         if name not in ("peepholes", "forget_bias")}
        self.embedding = Embedding(inputs, embed_size, dtype=dtype, seed=rng) if embed_size else None
        self.recurrent = CELLS[cell](embed_size or inputs, hidden_size, num_layers, dropout=dropout,
                                     **recurrent, **common)
        if pooling:
            last = {"bidirectional": self.recurrent.bidirectional} if pooling == "last" else {}
            self.pool = POOLING[pooling](**last)
            drop = [kind(p, seed=rng) for kind, p in ((TokenDropout, token_dropout), (Dropout, dropout)) if p]
            self.input_dropout = drop[0] if len(drop) == 1 else Sequential(*drop)
        self.dropout = Dropout(dropout, seed=rng) if dropout else None
        width = hidden_size * self.recurrent.directions * (2 if pooling == "mean+max" else 1)
        self.head = Linear(width, outputs or inputs, **common)
        self.recurrent.n_threads = self.head.n_threads = n_threads

    def __call__(self, x: Array, state: Any = None, lengths: Lengths = None) -> tuple[Floats, Any]:
        """x (T, B, C) or tokens (T, B), the state so far, lengths (B,) -> outputs, final state.

        Outputs are (T, B, O), or (B, O) with pooling.
        """
        y, state = self._read(x, state, lengths)
        return self.head(y), state

    def backward(self, doutputs: Floats) -> None:
        """The gradient by the outputs -> gradients of all parameters; none by the first state."""
        dy = self.head.backward(doutputs)
        if self._on_gradients:
            self._on_gradients()
        self.backward_below(dy)

    def loss(self, tokens: Array, targets: Ints, state: Any = None,
             **options: Any) -> tuple[float, Floats | None, Any]:
        """Tokens and targets (T, B) -> the loss, the gradient by what the head reads, the state.

        options: of `lstmcore.losses.linear_cross_entropy`, which adds to the head's gradients.
        """
        y, state = self._read(tokens, state)
        loss, dy = linear_cross_entropy(self.head, y, targets, **options)
        if self._on_gradients:
            self._on_gradients()
        return loss, dy, state

    def backward_below(self, dy: Floats) -> None:
        """The gradient by what the head reads -> gradients of all parameters below it."""
        dy = self.dropout.backward(dy) if self.dropout else dy
        dx, _ = self.recurrent.backward(self.pool.backward(dy) if self.pool else dy)
        if self._embeds_first():
            self.embedding.backward(self.input_dropout.backward(dx))

    def stages(self) -> list[list[str]]:
        """The names of the gradients that are complete at once, in the order in which they are."""
        def stage(name):
            layer = re.search(r"^recurrent\..*_l(\d+)(_reverse)?$", name)
            return -int(layer[1]) if layer else 1 if name.startswith("embedding.") else -math.inf
        names = list(self.gradients())
        return [[name for name in names if stage(name) == now] for now in sorted({*map(stage, names)})]

    def tellers(self) -> list[Module]:
        """The modules that call `_on_gradients` when the next of these stages is complete."""
        return [self, self.recurrent]

    def inputs(self, tokens: Array) -> Array:
        """What the recurrent layers read for tokens (T, B): rows of the table, or the tokens."""
        return self.embedding(tokens) if self.embedding else tokens

    def reader(self, state: Any) -> Callable[[int], Floats]:
        """A function that reads one token after another, from a state on: id -> logits (V,)."""
        stream = self.recurrent.stream(1)
        head = copy.deepcopy(self.head).freeze(self.head._frozen_in)
        stream.state = state

        def read(token):
            return head(stream.step(self.inputs(np.array([token]))))[0]
        return read

    def _read(self, x, state=None, lengths=None):
        """What the head reads, and the final state."""
        table = self.embedding
        if self._embeds_first():
            x, table = self.input_dropout(table(x)), None
        y, state = self.recurrent(x, state, lengths, embedding=table)
        if self.pool:
            y = self.pool(y, lengths)
        return self.dropout(y) if self.dropout else y, state

    def _embeds_first(self):
        """Whether the layers read rows of the table; else they look up what each is projected to."""
        return self.embedding is not None and self.input_dropout is not None

    def __repr__(self) -> str:
        said = vars(self).get("_arguments", {})
        return f"Network({', '.join(f'{name}={value!r}' for name, value in said.items())})"

    def packed(self) -> dict[str, Any] | None:
        """What `unpacked` makes this network of: no gradients, no tape, each weight once.

        None of a network that an older lstmcore pickled, which does not say how it was made.
        """
        if "_arguments" not in vars(self):
            return None
        return {"arguments": self._arguments, "weights": self.state_dict(), "rng": self.rng_state(),
                "training": self.training, "frozen_in": self.recurrent._frozen_in}

    @classmethod
    def unpacked(cls, state: Mapping[str, Any], rng: np.random.Generator) -> Network:
        """The network of which `packed` told, whose layers share rng with whoever else draws from it."""
        now = rng.bit_generator.state
        network = cls(**state["arguments"], seed=rng)
        rng.bit_generator.state = now
        network.load_state_dict(state["weights"])
        network.load_rng_state(state["rng"])
        network.train(state["training"])
        return network.freeze(state["frozen_in"]) if state["frozen_in"] else network

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        # An estimator of an older pickle calls its layers so.
        names = {"embed": "embedding", "before": "input_dropout", "after": "dropout"}
        super().__setstate__({names.get(name, name): value for name, value in state.items()})


class Model:
    """Weights that can be fixed for inference, of whatever has a network within."""

    def freeze(self: M, precision: Precision | None = None) -> M:
        """Fix the weights for inference in "float32", "bfloat16" or "int8", until `unfreeze`.

        What is computed from then on is computed in it. A `fit` that goes on from these weights
        needs `unfreeze` first; one that starts anew makes new ones. See `lstmcore.Module.freeze`.
        Returns self.

        Raises TypeError for a precision that the weights' dtype does not have.
        """
        network = self._trained()
        try:
            network.freeze(precision)
        except TypeError as error:
            fit = "float64" if precision == "float64" else "float32"
            raise TypeError(f"{error}: train with dtype={fit!r}") from None
        return self

    def unfreeze(self: M) -> M:
        """Let the weights change again, which are as before `freeze`. Returns self."""
        self._trained().unfreeze()
        return self

    def _trained(self) -> Network:
        """The network, or an error that says that there is none yet."""
        raise NotImplementedError
