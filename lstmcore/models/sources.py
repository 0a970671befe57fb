"""Where a run's examples come from: windows of a stream of tokens, or batches of ragged sequences.

A source tells `lstmcore.models.training` how long an epoch is, computes the loss of a piece of it and
what goes back from there, and measures what is held out; of a batch in shards it does so shard by
shard, those of this process. Knows a network and arrays of numbers; knows no text, no optimizer and
no time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from lstmcore._types import Array, Floats, Ints
from lstmcore.distributed import Shards, share
from lstmcore.models.sequences import Sequences

CONTEXT = 100           # tokens that a stream of `total_nats` reads before it is scored
ROWS = 256              # sequences at a time: the memory of a prediction does not grow with X


class Streams:
    """A text as B streams side by side, with truncated backpropagation through time.

    Each update reads the next window of T tokens of all of them; the state at the end of a window is
    where the next one starts (Williams and Peng 1990).

    tokens : (N,) ints; held_out : (M,), or None
    shards : of the streams; a process holds its own alone
    """

    unit = "tokens"
    steps = None            # of the whole run, if they are known: "cosine" follows them, else the budget
    final = 0.01            # of the learning rate, where "cosine" ends

    def __init__(self, tokens: Ints, held_out: Ints | None, B: int, T: int,
                 shards: Shards | None = None) -> None:
        self.held_out, self.T, self.shards = held_out, T, shards
        if shards is None:
            self.x, self.targets = streams(tokens, B, T)
            self.length, self.size = len(self.x), self.x.size   # positions, tokens of an epoch
        else:
            B, self.length = stream_sizes(tokens, B, T)
            self.size, self._rows = B * self.length, shards.cut(B)
            self._own = {shard: streams(tokens, B, T, self._rows[shard]) for shard in shards.mine}
            self._states: dict[int, Any] = {}       # of each of these shards
        self._state: Any = None             # what the streams carry from window to window
        self.digest = hashlib.sha256(np.ascontiguousarray(tokens)).hexdigest()

    @property
    def state(self) -> Any:
        """The state at the end of the last window, of all streams: of shards on rank 0 alone, where
        every rank has to ask for it."""
        if self.shards is None:
            return self._state
        found = {shard: state for some in self.shards.processes.gather(self._states)
                 for shard, state in some.items() if state is not None}
        if not found:
            return None
        parts = [found[shard] for shard in sorted(found)]
        return tuple(np.concatenate(part, axis=1) for part in zip(*parts)) \
            if isinstance(parts[0], tuple) else np.concatenate(parts, axis=1)

    @state.setter
    def state(self, state: Any) -> None:
        if self.shards is None:
            self._state = state
            return
        self._states = {}
        for shard in self._own if state is not None else ():
            rows = self._rows[shard]
            if rows.start < rows.stop:
                self._states[shard] = tuple(part[:, rows] for part in state) \
                    if isinstance(state, tuple) else state[:, rows]

    def start(self) -> None:
        """Begin an epoch."""
        self._state, self._states = None, {}

    def extent(self, position: int) -> tuple[int, int]:
        """How many tokens the loss at a position is the mean of, and the next position."""
        end = min(position + self.T, self.length)
        return (end - position) * (self.size // self.length), end

    def loss_of_shard(self, network: Any, position: int,
                      shard: int) -> tuple[float, Callable[[], None] | None]:
        """What a shard adds to the loss at a position, and its backward; None where it has no streams."""
        x, targets = self._own[shard]
        count, end = self.extent(position)
        x, targets = x[position:end], targets[position:end]
        if not x.size:
            return 0.0, None
        share = np.broadcast_to(1 / count, x.shape)
        loss, dy, self._states[shard] = network.loss(x, targets, self._states.get(shard), mask=share,
                                                     reduction="sum")
        return loss, partial(network.backward_below, dy)

    def loss(self, network: Any, position: int) -> tuple[float, int, int, Callable[[], None]]:
        """The loss at a position, how many it is the mean of, the next position, and its backward."""
        end = min(position + self.T, self.length)
        window = slice(position, end)
        loss, dy, self._state = network.loss(self.x[window], self.targets[window], self._state)
        return loss, self.x[window].size, end, partial(network.backward_below, dy)

    def validation(self, network: Any) -> float | None:
        """Nats per token of what is held out, if anything is."""
        if self.held_out is None:
            return None
        if self.shards is None:
            nats = total_nats(network, self.held_out)
        else:
            nats = self.shards.total(lambda shard: total_nats(
                network, self.held_out, lambda S: self.shards.cut(S)[shard]))
        return nats / (len(self.held_out) - 1)


class Batches:
    """Sequences in shuffled batches, weighted; a set no larger than one batch is taken whole.

    sequences : with targets and weights (n, ...), of which `rows` are trained on
    held_out : the share of the rows to validate by
    epochs : how many there will be
    loss : outputs (B, O), targets, weights (B,) -> the loss and the gradient by outputs
    shards : of each batch
    """

    unit = "sequences"
    final = 0.0

    def __init__(self, sequences: Sequences, targets: Array, weights: Floats, rows: Ints, *,
                 batch_size: int, held_out: float, epochs: int, rng: np.random.Generator,
                 loss: Callable[..., tuple[float, Floats]], shards: Shards | None = None) -> None:
        n = int(np.ceil(held_out * len(rows)))
        if n == len(rows):
            raise ValueError(f"validation = {held_out} leaves none of {n} sequences to train on")
        rows = rng.permutation(rows) if n else rows
        self.rows, self.held_out = rows[n:], rows[:n]
        self.sequences, self.targets, self.weights = sequences, targets, weights
        self.length, self.size = -(-len(self.rows) // batch_size), len(self.rows)
        self.rng, self._loss, self.steps = rng, loss, epochs * self.length
        self.shards = shards

    def start(self) -> None:
        """Begin an epoch."""
        if self.length > 1:
            self.rows = self.rng.permutation(self.rows)
        self._batches = np.array_split(self.rows, self.length)

    def loss(self, network: Any, position: int) -> tuple[float, int, int, Callable[[], None]]:
        """The loss at a position, how many it is the mean of, the next position, and its backward."""
        batch = self._batches[position]
        loss, backward = self._loss_of(network, batch, len(batch))
        return loss, len(batch), position + 1, backward

    def extent(self, position: int) -> tuple[int, int]:
        """How many sequences the loss at a position is the mean of, and the next position."""
        return len(self._batches[position]), position + 1

    def loss_of_shard(self, network: Any, position: int,
                      shard: int) -> tuple[float, Callable[[], None] | None]:
        """What a shard adds to the loss at a position, and its backward; None where it has no rows."""
        batch = self._batches[position]
        rows = batch[self.shards.cut(len(batch))[shard]]
        return self._loss_of(network, rows, len(batch)) if len(rows) else (0.0, None)

    def _loss_of(self, network, rows, count):
        """The loss of some rows of a batch of `count`, and its backward."""
        x, lengths = self.sequences.batch(rows)
        outputs, _ = network(x, lengths=lengths)
        loss, d = self._loss(outputs, self.targets[rows], self.weights[rows] / count)
        return loss, partial(network.backward, d)

    def validation(self, network: Any) -> float | None:
        """The mean loss of what is held out, if anything is."""
        rows = self.held_out
        if not len(rows):
            return None
        weights = self.weights[rows] / self.weights[rows].sum()
        if self.shards is None:
            found = outputs(network, self.sequences, rows)
        else:       # the bits of a row are those of the row alone: any ranks may compute any rows
            mine = rows[share(len(rows), self.shards.processes)]
            found = np.concatenate(self.shards.processes.allgather(
                outputs(network, self.sequences, mine)))
        return self._loss(found, self.targets[rows], weights)[0]


def outputs(network: Any, sequences: Sequences, rows: Ints | None = None) -> Floats:
    """The outputs for some sequences or all, (n, O), those of like length together."""
    rows = np.arange(len(sequences)) if rows is None else rows
    order = np.argsort(sequences.lengths[rows], kind="stable")
    found = np.empty((len(rows), network.head.out_features), network.head.dtype)
    for at in range(0, len(rows), ROWS):
        some = order[at:at + ROWS]
        x, lengths = sequences.batch(rows[some])
        found[some], _ = network(x, lengths=lengths)
    return found


def stream_sizes(tokens: Ints, B: int, T: int) -> tuple[int, int]:
    """How many streams tokens (N,) make, and their length: see `streams`."""
    n = len(tokens) - 1
    B = min(B, max(1, n // T))
    return B, n // B


def streams(tokens: Ints, B: int, T: int, some: slice = slice(None)) -> tuple[Ints, ...]:
    """Tokens (N,) as B streams side by side, or some: inputs and their successors, each (L, B).

    The last N - 1 - L·B tokens, fewer than B, are left out. A text below B·T tokens gets fewer
    streams.
    """
    B, L = stream_sizes(tokens, B, T)
    return tuple(np.ascontiguousarray(tokens[shift:shift + B * L].reshape(B, L)[some].T)
                 for shift in (0, 1))


def total_nats(network: Any, tokens: Ints,
               part: Callable[[int], slice] = lambda pieces: slice(None)) -> float:
    """-Σ log p(token | those before it), over all of `tokens` (N,) but the first.

    A long text is cut into up to 64 pieces of at least 1000 tokens, each read together with the
    100 tokens before it; below 2000 tokens the sum is exact. part: which of so many pieces count.
    """
    n = len(tokens) - 1
    S = max(1, min(64, n // (10 * CONTEXT)))
    context = CONTEXT if S > 1 else 0
    L = -(-(n - context) // S)
    at = np.arange(context + L)[:, None] + L * np.arange(S)
    scored = ((np.arange(S) == 0) | (np.arange(context + L)[:, None] >= context)) & (at < n)
    at, scored = np.minimum(at, n - 1)[:, part(S)], scored[:, part(S)]
    if not at.size:
        return 0.0
    x, targets = tokens[at], tokens[at + 1]
    state, total = None, 0.0
    for t in range(0, len(x), 4 * CONTEXT):
        window = slice(t, t + 4 * CONTEXT)
        loss, _, state = network.loss(x[window], targets[window], state, mask=scored[window],
                                      reduction="sum")
        total += loss
    return total
