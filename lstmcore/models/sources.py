"""Where a run's examples come from: windows of a stream of tokens, or batches of ragged sequences.

A source tells `lstmcore.models.training` how long an epoch is, computes the loss of a piece of it and
what goes back from there, and measures what is held out; of a batch in shards it does so shard by
shard, those of this process. Knows a network and arrays of numbers; knows no text, no optimizer and
no time.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from lstmcore._types import Array, Floats, Ints
from lstmcore.distributed import Shards, share
from lstmcore.models.sequences import Sequences

PIECE = 1 << 22         # tokens at a time
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
        self.tokens, self.held_out, self.T, self.shards = tokens, held_out, T, shards
        B, self.length = stream_sizes(tokens, B, T)         # positions
        self.B, self.size = B, B * self.length              # streams, tokens of an epoch
        if shards is not None:
            self._rows = shards.cut(B)
            self._states: dict[int, Any] = {}       # of each shard of this process
        self._state: Any = None             # what the streams carry from window to window
        self.digest = _digest(tokens)

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
        for shard in self.shards.mine if state is not None else ():
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
        count, end = self.extent(position)
        x, targets = self._window(position, end, self._rows[shard])
        if not x.size:
            return 0.0, None
        share = np.broadcast_to(1 / count, x.shape)
        loss, dy, self._states[shard] = network.loss(x, targets, self._states.get(shard), mask=share,
                                                     reduction="sum")
        return loss, partial(network.backward_below, dy)

    def loss(self, network: Any, position: int) -> tuple[float, int, int, Callable[[], None]]:
        """The loss at a position, how many it is the mean of, the next position, and its backward."""
        count, end = self.extent(position)
        x, targets = self._window(position, end)
        loss, dy, self._state = network.loss(x, targets, self._state)
        return loss, count, end, partial(network.backward_below, dy)

    def _window(self, start, end, rows=slice(None)):
        """Inputs and their successors, (end - start, B) int32 each, of all streams or some."""
        if start % (self.T << 10) == 0:
            _release(self.tokens)
        return streams(self.tokens, self.B, self.T, rows, slice(start, end))

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


class PerStep:
    """Targets (steps of all sequences,) and weights beside them, which a batch has time-major."""

    def __init__(self, targets: Array, weights: Array, lengths: Array) -> None:
        self._sequences = Sequences(targets, lengths)
        self._weights = Sequences(weights / max(lengths.mean(), 1), lengths)

    def __getitem__(self, rows: Array) -> tuple[Array, Array]:
        """Targets (T, B) and weights (T, B), 0 where a sequence has ended."""
        return self._sequences.batch(rows)[0], self._weights.batch(rows)[0]


class Batches:
    """Sequences in shuffled batches, weighted; a set no larger than one batch is taken whole.

    sequences : with targets and weights (n, ...), of which `rows` are trained on
    held_out : the rows to validate by
    epochs : how many there will be
    loss : outputs (B, O), targets, weights (B,) -> the loss and the gradient by outputs
    shards : of each batch
    digest : of the data, for a run that is resumed
    """

    unit = "sequences"
    final = 0.0
    state = None            # between two batches there is none

    def __init__(self, sequences: Sequences, targets: Array, weights: Floats, rows: Ints, *,
                 batch_size: int, held_out: Ints, epochs: int, rng: np.random.Generator,
                 loss: Callable[..., tuple[float, Floats]], shards: Shards | None = None,
                 digest: str = "") -> None:
        self.rows, self.held_out, self.digest = rows, held_out, digest
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
        if isinstance(self.targets, PerStep):
            return sum(self._loss_of(network, rows[at:at + ROWS], self.weights[rows].sum())[0]
                       for at in range(0, len(rows), ROWS))
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


def streams(tokens: Ints, B: int, T: int, rows: slice = slice(None),
            steps: slice = slice(None)) -> tuple[Ints, ...]:
    """Tokens (N,) as B streams of length L side by side: inputs and their successors, each (L, B)
    int32, or of some streams some steps.

    The last N - 1 - L·B tokens, fewer than B, are left out. A text below B·T tokens gets fewer
    streams.
    """
    B, L = stream_sizes(tokens, B, T)
    return tuple(np.ascontiguousarray(tokens[shift:shift + B * L].reshape(B, L)[rows, steps].T, np.int32)
                 for shift in (0, 1))


def _release(tokens):
    """Hand back the memory of a mapped file; what is read again comes back."""
    while isinstance(tokens, np.ndarray):
        if tokens.flags.writeable:
            return
        tokens = tokens.base
    if isinstance(tokens, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        tokens.madvise(mmap.MADV_DONTNEED)


def _digest(tokens):
    """The SHA-256 of the tokens as int32, piece by piece."""
    found = hashlib.sha256()
    for at in range(0, len(tokens), PIECE):
        found.update(np.ascontiguousarray(tokens[at:at + PIECE], np.int32))
        _release(tokens)
    return found.hexdigest()


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
    pieces = np.arange(S)[part(S)]
    if not len(pieces):
        return 0.0
    state, total = None, 0.0
    for t in range(0, context + L, 4 * CONTEXT):
        steps = np.arange(t, min(t + 4 * CONTEXT, context + L))[:, None]
        at = steps + L * pieces
        scored = ((pieces == 0) | (steps >= context)) & (at < n)
        at = np.minimum(at, n - 1)
        loss, _, state = network.loss(tokens[at].astype(np.int32), tokens[at + 1].astype(np.int32), state,
                                      mask=scored, reduction="sum")
        total += loss
    return total
