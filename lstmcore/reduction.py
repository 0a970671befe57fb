"""The sum of gradients over the shards of a batch: a tree of additions, and what travels for it.

The order of the additions depends on the number of shards alone. Knows flat buffers and a communicator
(`lstmcore.distributed.Processes`); knows no module and no loss. mpi4py is imported where something is sent.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from lstmcore import scalars
from lstmcore._types import Array, Floats

REDUCTIONS, WIRES = ("tree", "allreduce"), (None, "bfloat16")
ALIGN = 16              # numbers: a cache line of float32
BLOCK = 4096            # numbers that are rounded at once
UPPER = int(sys.byteorder == "little")      # which half of a float32 holds its sign

Node: TypeAlias = tuple[int, int]       # of the tree: the first shard below it, and the one after its last


def check_ways(reduction: Any, wire: Any) -> None:
    """ValueError unless a sum can be formed so."""
    scalars.choice("reduction", reduction, REDUCTIONS)
    if wire not in WIRES:
        raise ValueError(f"wire must be None or 'bfloat16', got {wire!r}")
    if wire and reduction == "allreduce":
        raise ValueError("wire='bfloat16' needs reduction='tree': an MPI does not add bfloat16")


class Reduction:
    """Sums gradients over shards, stage by stage; a stage is what a backward pass completes at once.

    The gradients of a stage lie in one flat buffer of M numbers: `places` says where. `fold` takes in
    those of one more shard of this process: neighbors in the tree are added on the spot. After the
    last, `send` starts the exchange: process r gets part r of what every process has, and adds it up in
    `collect`, in the order of the tree. Then the flat buffer holds the sums of this part, and `mine` says
    which numbers of which gradient these are: whoever updates the parameters there gives them to all by
    `share`. So 2 M numbers go out of each process and into it, as in any allreduce that makes the best
    of its links, however many shards it has (if they are a node of the tree, as they are where the
    numbers of shards and processes are powers of two), and each updates M / P parameters.

    With `wire`, and where MPI adds, the sums themselves go to all, and `mine` is None.
    """

    def __init__(self, processes: Any, gradients: Mapping[str, Floats], stages: Sequence[Sequence[str]],
                 count: int, reduction: str, wire: str | None, block: int,
                 note: Callable[[str], object] = lambda what: None) -> None:
        dtypes = {str(g.dtype) for g in gradients.values()}
        if len(dtypes) > 1:
            raise TypeError(f"gradients must be of one dtype, got {', '.join(sorted(dtypes))}")
        if wire and dtypes - {"float32"}:
            raise TypeError(f"wire={wire!r} is for float32 gradients, got {dtypes.pop()}")
        self.processes, self.stages, self.reduction, self.wire = processes, stages, reduction, wire
        self._note, P, rank = note, processes.size, processes.rank
        own = count // P
        cover = [nodes(count, r * own, (r + 1) * own) for r in range(P)]
        self._steps = folding(count, range(rank * own, (rank + 1) * own))
        self._counts = [len(nodes) for nodes in cover]  # nodes of the tree that travel, of each rank
        self._merges = merging(count, [node for nodes in cover for node in nodes])
        levels = 1 + max((level for level, _, _ in self._steps[:-1]), default=-1)
        self.places: dict[str, Floats] = {}
        self._flats, self._sums, self._cuts, self._rows = [], [], [], []
        self._owned: list[dict[str, slice]] = [{} for _ in range(P)]
        dtype = next(iter(dtypes), "float32")
        for names in stages:
            starts = np.cumsum([0] + [-(-gradients[name].size // ALIGN) * ALIGN for name in names])
            flat = np.zeros(starts[-1], dtype)
            blocks = [start + at for name, start in zip(names, starts)
                      for at in range(0, gradients[name].size, block)]
            for name, at in zip(names, starts):
                g = gradients[name]
                self.places[name] = flat[at:at + g.size].reshape(g.shape)
            cuts = parts(blocks, flat.size, P)
            for name, start in zip(names, starts.tolist()):
                for own, a, b in zip(self._owned, cuts, cuts[1:]):
                    piece = slice(max(a - start, 0), min(b - start, gradients[name].size))
                    if piece.start < piece.stop:
                        own[name] = piece
            self._flats.append(flat)
            self._sums.append(np.empty((levels, flat.size), dtype))     # of earlier shards, a stack
            self._cuts.append(cuts)
            others = (sum(self._counts) - self._counts[rank]) * (cuts[rank + 1] - cuts[rank])
            # made once: new memory for it in every step takes as long as the sums
            self._rows.append(None if P == 1 or reduction == "allreduce" else np.empty(
                others, "uint16" if wire else dtype))
        self.mine = None if P == 1 or wire or reduction == "allreduce" else self._owned[rank]
        self._requests: list[Any] = [None] * len(stages)

    def fold(self, stage: int, n: int) -> None:
        """Take in what the flat buffer holds, the gradients of the n-th shard of this process.

        After the last shard the buffer is the top of the stack of sums.
        """
        flat, sums, (level, add, merges) = self._flats[stage], self._sums[stage], self._steps[n]
        last = n == len(self._steps) - 1
        if self.wire:
            round_off(flat)
        top = flat if last else sums[level]
        if last and add:            # a + b is b + a, bit for bit
            top += sums[level]
        elif add:
            top += flat
        elif not last:
            top[...] = flat
        if add and self.wire:
            round_off(top)
        for into in merges:
            if last:
                top += sums[into]
            else:
                top = np.add(sums[into], top, out=sums[into])
            if self.wire:
                round_off(top)

    def send(self, stage: int) -> None:
        """Start the exchange."""
        P, rank, flat = self.processes.size, self.processes.rank, self._flats[stage]
        if P == 1:
            return
        from mpi4py import MPI

        for request in self._requests[:stage]:          # many MPIs move data only when they are called
            if request is not None:
                request[0].Test()
        comm = self.processes.comm
        if self.reduction == "allreduce":
            self._requests[stage] = comm.Iallreduce(MPI.IN_PLACE, flat), None
            return
        sent, cuts = self._counts[rank], self._cuts[stage]
        out = self._lowered(flat)
        if sent > 1:        # what goes to one process lies together
            every = [*map(self._lowered, self._sums[stage][:sent - 1]), out]
            out = np.concatenate([row[a:b] for a, b in zip(cuts, cuts[1:]) for row in every])
        size, own = np.diff(cuts), cuts[rank + 1] - cuts[rank]
        there = [0 if r == rank else sent * n for r, n in enumerate(size.tolist())]
        back = [0 if r == rank else count * own for r, count in enumerate(self._counts)]
        request = comm.Ialltoallv([out, (there, [sent * cut for cut in cuts[:-1]])],
                                  [self._rows[stage], back])
        self._requests[stage] = request, out            # which must live as long as it is sent

    def collect(self) -> None:
        """Wait for the sums: of this process's part, or of all."""
        gathered = []
        for stage, flat in enumerate(self._flats):
            if self._requests[stage] is None:
                continue
            self._requests[stage][0].Wait()
            self._requests[stage] = None
            self._note(f"parts of {stage}")
            if self.reduction == "allreduce":
                continue
            part = self._add_up(stage)
            if self.wire:
                part, whole = lowered(part), np.empty(flat.size, np.uint16)
                sizes = np.diff(self._cuts[stage]).tolist()
                gathered.append((self.processes.comm.Iallgatherv(part, [whole, sizes]), part, whole, flat))
        for request, _, whole, flat in gathered:
            request.Wait()
            raised(whole, flat)

    def share(self, arrays: Mapping[str, Floats]) -> None:
        """Give all processes the parts of arrays, named and shaped as the gradients, that each owns."""
        if self.mine is None:
            return
        from mpi4py import MPI

        comm, own, P = self.processes.comm, self.processes.rank, self.processes.size

        def pieces(r):
            return [arrays[name].reshape(-1)[piece] for name, piece in self._owned[r].items()]

        # As they lie: MPI's datatypes for scattered arrays take 3 times as long. The next rank first, so
        # that not all send to one.
        requests = [comm.Irecv(piece, (own - n) % P) for n in range(1, P) for piece in pieces((own - n) % P)]
        requests += [comm.Isend(piece, (own + n) % P) for n in range(1, P) for piece in pieces(own)]
        MPI.Request.Waitall(requests)

    def _add_up(self, stage):
        """The sums of this process's part, in the flat buffer."""
        rank, cuts, rows, at = self.processes.rank, self._cuts[stage], [], 0
        own = slice(cuts[rank], cuts[rank + 1])
        part = self._flats[stage][own]
        come = raised(self._rows[stage]) if self.wire else self._rows[stage]
        for r, count in enumerate(self._counts):
            if r == rank:
                rows += [*self._sums[stage][:count - 1, own], part]
            else:
                rows += list(come[at:at + count * part.size].reshape(count, part.size))
                at += count * part.size
        for into, other in self._merges:        # part is itself one of the rows: it is written to last
            out = part if (into, other) == self._merges[-1] else rows[into]
            np.add(rows[into], rows[other], out=out)
            if self.wire:
                round_off(out)
        return part

    def _lowered(self, row):
        return lowered(row) if self.wire else row


def parts(places: Sequence[int], size: int, count: int) -> list[int]:
    """Where a buffer is cut in `count` parts of about one size, at some of these places: 0, ..., size."""
    places = [*places, size]
    inner = [min(places, key=lambda place: abs(place - size * n / count)) for n in range(1, count)]
    return [0, *inner, size]


def _halves(node):
    low, high = node
    middle = (low + high + 1) // 2
    return (low, middle), (middle, high)


def nodes(count: int, first: int, last: int, node: Node | None = None) -> list[Node]:
    """The largest nodes of the tree over `count` shards that lie in first..last-1, in order."""
    low, high = node = node or (0, count)
    if high <= first or last <= low:
        return []
    if first <= low and high <= last:
        return [node]
    return [found for half in _halves(node) for found in nodes(count, first, last, half)]


def _parents(count):
    """{(left, right): parent} of all nodes."""
    waiting, found = [(0, count)], {}
    while waiting:
        node = waiting.pop()
        if node[1] - node[0] > 1:
            halves = _halves(node)
            found[halves] = node
            waiting += halves
    return found


def folding(count: int, shards: Iterable[int]) -> list[tuple[int, bool, list[int]]]:
    """What `fold` does with each of some shards: the level of the stack of sums that it becomes, or
    is added to, which of the two, and the levels to which what lies above them is added then."""
    parents, stack, steps = _parents(count), [], []
    for shard in shards:
        leaf, merges = (shard, shard + 1), []
        add = bool(stack) and (stack[-1], leaf) in parents
        if add:
            stack[-1] = parents[stack[-1], leaf]
        else:
            stack.append(leaf)
        level = len(stack) - 1
        while len(stack) > 1 and tuple(stack[-2:]) in parents:
            stack[-2:] = [parents[tuple(stack[-2:])]]
            merges.append(len(stack) - 1)
        steps.append((level, add, merges))
    return steps


def merging(count: int, nodes: Sequence[Node]) -> list[tuple[int, int]]:
    """(into, other) of each addition that makes the root of these nodes, by their places."""
    parents, stack, merges = _parents(count), [], []
    for place, node in enumerate(nodes):
        stack.append((node, place))
        while len(stack) > 1 and (stack[-2][0], stack[-1][0]) in parents:
            (left, into), (right, other) = stack[-2:]
            stack[-2:] = [(parents[left, right], into)]
            merges.append((into, other))
    return merges


def round_off(a: Floats) -> Floats:
    """float32 numbers (n,), rounded in place to bfloat16: to nearest, ties to even; nan stays nan.

    In blocks that stay in the first cache, 4 times as fast as at once, and in place: `reference.rounded`
    of such blocks takes 1.6 times as long.
    """
    odd = np.empty(min(a.size, BLOCK), np.uint32)
    for at in range(0, a.size, BLOCK):
        some = a[at:at + BLOCK]
        bits, up = some.view(np.uint32), odd[:some.size]
        nan = None if np.isfinite(some).all() else np.isnan(some)
        np.right_shift(bits, 16, out=up)
        up &= 1
        up += 0x7FFF
        if nan is not None:
            up[nan] = 0
            bits[nan] |= 0x00400000
        bits += up
        bits &= 0xFFFF0000
    return a


def lowered(a: Floats) -> Array:
    """The upper halves of float32 numbers that `round_off` has rounded."""
    return a.view(np.uint16)[..., UPPER::2].copy()


def raised(a: Array, out: Floats | None = None) -> Floats:
    """The float32 numbers of upper halves."""
    out = np.empty(a.shape, np.float32) if out is None else out
    halves = out.view(np.uint16)
    halves[..., 1 - UPPER::2], halves[..., UPPER::2] = 0, a
    return out
