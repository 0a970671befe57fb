"""ONNX graphs: their LSTM, GRU and RNN nodes as layers. Needs the package onnx.

Between stacked layers a graph squeezes, transposes and reshapes Y. That plumbing is not matched
against patterns: it is run, on cells that are numbered, and two nodes are stacked if the second one
gets the numbers of the first one's Y where an `lstmcore.LSTM` of two layers would put them.
"""

import collections
import functools
import json
import math
import os
import warnings

import numpy as np

from lstmcore.formats import description, onnx_export
from lstmcore.formats.description import Content
from lstmcore.formats.onnx_export import write_module           # noqa: F401
from lstmcore.formats.onnx_graph import (GATES, Budget, Graph, chosen_nodes, dequantized, in_int8,
                                         int8_of, layer_of, parsed)
from lstmcore.formats.onnx_operators import (ARITHMETIC, KEEPING_FILL, MOVING, SHAPES, plumb,
                                             reduced_shape)

import onnx.backend.base  # onnx_export has said what to do if it is not there

_PROBE_T, _PROBE_B = 5, 3           # sizes of the numbered cells where the graph leaves them open
INTEGERS = onnx.TensorProto.INT32, onnx.TensorProto.INT64
_NAMED = ("Loop", "If")


def read_arrays(path):
    """Every initializer of the graph by name."""
    return Graph(path).constants


def content(path):
    """The chains of recurrent nodes in the file, and what lstmcore wrote."""
    model = parsed(path)
    graph = Graph(model, budget=(1 << 20) + 4 * os.path.getsize(path), path=path)
    probe = _Probe(graph)
    chains, ends = [], {}
    for node in probe.recurrent:
        entry, before = (node.name, functools.partial(probe.layer, node)), probe.before(node)
        chain = ends.pop(before, None)
        if chain is None:
            chain = []
            chains.append(chain)
        chain.append(entry)
        ends[node.name] = chain
    others = sorted(probe.unknown_ops | {
        op for chain in chains if (op := probe.reordered(chain[0][0]))})
    hint = ""
    if "Scan" in probe.unknown_ops:
        hint = ("it computes a recurrence in a Scan, which is read only from a whole file as "
                "lstmcore wrote it: without name=, and not changed since")
    elif odd := [op for op in others if op.rpartition(".")[2] in _NAMED]:
        hint = f"lstmcore reads LSTM, GRU and RNN, not {', '.join(odd)}"
    elif "MatMul" in others or "Gemm" in others:
        hint = probe.repeated() + (
            "an exporter may have written a recurrence out, step by step: torch.onnx.export with "
            "dynamo=False keeps it, or load the state_dict or the .keras file")
    options = {"batch_first": probe.is_batch_first(probe.recurrent[0])} if chains else {}
    own = _own(model, graph)
    return Content(own[1] if own else graph.constants, chains, others, options,
                   {description.LAYER: own[0]} if own else {}, hint)


def _own(model, graph):
    """(description, arrays) that a file of `onnx_export` holds; None where it is not that, node for
    node."""
    said = {entry.key: entry.value for entry in model.metadata_props}
    if description.LAYER not in said:
        return None
    try:
        found = json.loads(said[description.LAYER])
        version, said_steps = found.pop("version", 1), found.pop("steps", None)
        options = {"state": any(name.startswith("h0") for name in graph.inputs),
                   "lengths": "lengths" in graph.inputs, "tokens": False,
                   **found.pop("graph", {})}
        description.check(found)
        steps = [onnx_export.Step(*step) for step in said_steps or [
            ["", found, 0, options["lengths"]]]]
        for step in steps:
            description.check(step.said)
        arrays = _own_arrays(graph, steps)
        again = onnx_export.build(found, steps, arrays, **options)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return None             # the description is not that of the graph, which is read as it is
    found["version"] = version
    return (json.dumps(found), arrays) if again.graph == model.graph else None


def _own_arrays(graph, steps):
    """The parameters in a graph of `onnx_export`, as their names and those of the nodes say."""
    arrays = {}
    for node in graph.nodes:
        if node.op in GATES:
            weights = [graph.constants.get(name) for name in node.inputs[1:4] + node.inputs[7:]]
            prefix, _, n = node.name.rpartition("l")
            for suffix, cell in zip(("", "_reverse"), layer_of(node, *weights).directions):
                arrays.update({f"{prefix}{weight}_l{n}{suffix}": a for weight, a in cell.items()})
    plain = {f"{place}.{name}".lstrip(".") for step in steps
             for place in {step.layer, step.embedding or step.layer} for name in ("weight", "bias")}
    for name, a in graph.constants.items():
        if description.is_weight(name):         # of a Scan, which has all matrices transposed
            arrays[name] = a if "weight_peephole_l" in name else a.T
        elif name in plain:
            arrays[name] = a
    return arrays


# ---- from a graph to layers ---------------------------------------------------------------------


class _Unknown:
    """A value that depends on an operation that is not computed here.

    fill : the number that it has everywhere, where only its shape is unknown
    """

    def __init__(self, why, fill=None):
        self.why, self.fill = why, fill


class _Probe:
    """A graph run on numbered cells: which recurrent node feeds which, and where x comes from."""

    def __init__(self, graph):
        self.graph, self.unknown_ops, self.recurrent = graph, set(), []
        self.next, self.sources, self.given, self.fronts = 1, {}, {}, []
        self.values, self.feeds, self.fixed = dict(graph.constants), {}, set(graph.constants)
        self.counts = {name for name, value in graph.inputs.items()     # one integer a sequence
                       if value.type.tensor_type.elem_type in INTEGERS
                       and len(value.type.tensor_type.shape.dim) == 1}
        self.moving = set(graph.inputs)     # what holds numbers that a call is given or computes
        self.handed = {name: name for name in graph.inputs}     # which of the inputs it is, moved
        self.makers, self.origins = {}, {}      # the operation that makes a value; a node's X
        self.found, self.orders = {}, {}        # what `before` and `reordered` said
        for name, value in graph.inputs.items():
            self.values[name] = self.feeds[name] = self._feed(value)
        budget, names = Budget(graph.budget), set()
        for n, node in enumerate(chosen_nodes(graph.nodes, self._decides)):
            if node.name in names:
                node.name = f"{node.name}_{n}"
            names.add(node.name)
            arguments = [self.values.get(name, _Unknown("an input that is not there"))
                         if name else None for name in node.inputs]
            results = self._results(node, arguments, budget)
            self.values.update(zip(node.outputs, results))
            self.makers.update(dict.fromkeys(node.outputs, node.op))
            if all(name in self.fixed for name in node.inputs if name):
                self.fixed.update(node.outputs)
            if node.op in ("Identity", "Cast") and not self.counts.isdisjoint(node.inputs):
                self.counts.update(node.outputs)
            if node.op not in ("Shape", "Size") and not self.moving.isdisjoint(node.inputs):
                self.moving.update(node.outputs)
                if node.op in MOVING and node.inputs[0] in self.handed:
                    self.handed.update(dict.fromkeys(node.outputs, self.handed[node.inputs[0]]))

    def _decides(self, name):
        """The value of an If's condition, where it is known: not of what a call is given."""
        value = self.values.get(name)
        return value if isinstance(value, np.ndarray) else None

    def layer(self, node):
        """The node as a list of one Layer; initial states that the graph fixes come with it."""
        given = dict(zip(("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P"),
                         node.inputs))
        arrays = {}
        for name in ("W", "R", "B", "P"):
            if source := given.get(name):
                arrays[name] = self._constant(source)
                if arrays[name] is None:
                    raise ValueError(f"{name} of {node.name} is no constant of the graph: only "
                                     "a graph that holds its weights can be loaded")
        if node.quantized:
            scales = [self._constant(source) for source in (*node.quantized, *[""] * 4)[:4]]
            lowered = {}
            for name, pair in (("W", scales[:2]), ("R", scales[2:])):
                if name in arrays:
                    q, arrays[name] = arrays[name], dequantized(node, arrays[name], *pair)
                    lowered[name] = in_int8(q, *pair)
        layer = layer_of(node, arrays.get("W"), arrays.get("R"), arrays.get("B"), arrays.get("P"))
        if node.quantized:
            layer = layer._replace(int8=int8_of(layer, lowered))
            warnings.warn(f"{node.name} has weights of 8 bits, by which onnxruntime multiplies x and h "
                          "rounded to 8 bits with one scale for all their rows: the results of the layer "
                          "made of it differ by that rounding", stacklevel=4)
        if source := given.get("sequence_lens"):
            lengths, x = self.values.get(source), self.given[node.name]
            known = isinstance(lengths, np.ndarray) and lengths.dtype.kind in "iu"
            if isinstance(lengths, _Unknown) and source not in self.feeds:
                raise ValueError(f"sequence_lens of {node.name} comes from {lengths.why}")
            if known and (x is None or not np.all(lengths == len(x))):
                raise ValueError(f"sequence_lens of {node.name} is a constant or computed, and not "
                                 "the whole length of x: lstmcore gives lengths to a call")
        sources = [given.get(name) for name in ("initial_h", "initial_c")]
        x = self.handed.get(self.origins[node.name])
        if any(s in self.moving and self.handed.get(s) in (None, x) for s in sources):
            warnings.warn(f"{node.name} starts in a state that the graph computes: give it to every call",
                          stacklevel=4)
        states = [self._initial(node, source, layer) for source in sources]
        if any(state is not None for state in states):
            shape = np.broadcast_shapes(*(s.shape for s in states if s is not None))
            states = [np.broadcast_to(np.float32(0) if s is None else s, shape) for s in states]
            layer = layer._replace(initial=tuple(states) if node.op == "LSTM" else states[0])
        return [layer]

    def _constant(self, name):
        """The array of that name, if the graph fixes it; None elsewhere."""
        value = self.values.get(name)
        return value if name in self.fixed and isinstance(value, np.ndarray) else None

    def repeated(self):
        """A message of the matrix that a recurrence without a node of its own multiplies by."""
        ((name, n),) = collections.Counter(
            source for node in self.graph.nodes if node.op in ("MatMul", "Gemm")
            for source in node.inputs[1:2] if source in self.fixed).most_common(1) or [("", 0)]
        return f"it multiplies by {name!r:.80} {n} times: " if n > 1 else ""

    def before(self, node):
        """The name of the node whose Y, in the usual order, is this node's X, or None."""
        x, place = self.given[node.name], (self.origins[node.name], node.attributes.get("layout", 0))
        if place not in self.found:         # a wide x of many nodes is looked at once
            self.found[place] = None if x is None else self.sources.get(_key(x))
        return self.found[place]

    def is_batch_first(self, node):
        """Whether the graph's input, or what a layer before this node makes of it, reaches the
        node with its first two axes swapped."""
        x = self.given[node.name]
        for feed in (*self.feeds.values(), *self.fronts):
            if x is not None and isinstance(feed, np.ndarray) and feed.ndim == 3:
                if np.array_equal(x, feed):
                    return False
                if np.array_equal(x, feed.swapaxes(0, 1)):
                    return True
        return bool(node.attributes.get("layout", 0))

    def reordered(self, name):
        """The operation that gives a node its X, where that is numbers of an input and not in its order,
        nor with its first two axes swapped; None elsewhere."""
        x, source = self.given[name], self.origins[name]
        feed = self.feeds.get(self.handed.get(source))
        if x is None or not isinstance(feed, np.ndarray) or source in self.feeds:
            return None
        if source not in self.orders:
            orders = [feed, feed.swapaxes(0, 1)] if feed.ndim > 1 else [feed]
            self.orders[source] = None if any(
                np.array_equal(x.ravel(), order.ravel()) for order in orders) else self.makers[source]
        return self.orders[source]

    def _initial(self, node, source, layer):
        """The state that the graph fixes, (D, B, H), or (D, 1, H) for each sequence; None for zeros,
        or where a call gives it."""
        if not source or source in self.moving:
            return None
        value = self.values.get(source)
        wanted = len(layer.directions), layer.hidden_size
        if isinstance(value, _Unknown) and value.fill is not None:
            return np.full((wanted[0], 1, wanted[1]), value.fill, "f4") if value.fill else None
        if not isinstance(value, np.ndarray):
            raise ValueError(f"an initial state of {node.name} comes from "
                             f"{value.why if value else 'an input that is not there'}")
        value = value.swapaxes(0, 1) if node.attributes.get("layout", 0) and value.ndim == 3 else value
        if value.ndim != 3 or value.shape[::2] != wanted or value.dtype.kind != "f":
            raise ValueError(f"an initial state of {node.name} must be floats (D, B, H) with D, H = "
                             f"{wanted}, got {value.dtype} {value.shape}" + (
                                 ": exporters that do not know projections write so"
                                 if value.ndim == 3 else ""))
        if not value.any():
            return None
        if source in self.fixed:
            return value
        if (value != value[:, :1]).any():
            raise ValueError(f"{node.name} starts in a state that is as large as the batch is, and not "
                             "the same for each sequence: lstmcore keeps states of one size only")
        return value[:, :1]

    def _feed(self, value):
        tensor = value.type.tensor_type
        shape = [d.dim_value if d.dim_value > 0 else (_PROBE_T, _PROBE_B)[min(n, 1)]
                 for n, d in enumerate(tensor.shape.dim)]
        if not tensor.HasField("shape") or math.prod(shape) > 1 << 16 or len(shape) > 32:
            return _Unknown("an input of open or large shape")
        return self._numbered(shape)

    def _numbered(self, shape):
        count = math.prod(shape)
        self.next += count
        return np.arange(self.next - count, self.next, dtype="f8").reshape(shape)

    def _results(self, node, arguments, budget):
        if node.op in GATES:
            return self._recurrent(node, arguments, budget)
        unknown = next((a for a in arguments if isinstance(a, _Unknown)), None)
        computed = node.op in ARITHMETIC and unknown is None and all(
            a.dtype.kind in "iub" or name in self.fixed
            for a, name in zip(arguments, node.inputs) if a is not None)
        if node.op == "TopK" and node.inputs[0] in self.counts:
            # Sorted by length, sequences are the same sequences: as if they came in this order.
            return [arguments[0], np.arange(len(arguments[0]))]
        if node.op == "Cast" and isinstance(arguments[0], np.ndarray) \
                and node.inputs[0] not in self.fixed and arguments[0].dtype == np.float64:
            return [arguments[0]]               # the numbers of cells stay what they are
        if node.op in MOVING or computed:
            fill = _fill_of(node, arguments)
            if unknown is None:
                try:
                    return plumb(node, arguments, budget)
                except ValueError as error:
                    if budget.left < 0:
                        raise
                    unknown = _Unknown(str(error))
            if node.op == "Gather" and isinstance(unknown, _Unknown) and fill is None:
                return self._like(node, arguments, unknown, budget)
            unknown = _Unknown(unknown.why, fill)
        else:
            if node.op in _NAMED or not all(name in self.fixed for name in node.inputs if name):
                self.unknown_ops.add(node.op)
            first, *more = self._like(node, arguments, unknown, budget)
            return [first, *more, *[unknown or _Unknown(node.op)] * len(node.outputs)]
        return [unknown] * max(1, len(node.outputs))

    def _like(self, node, arguments, unknown, budget):
        """New cells of the shapes that the operation gives, where these are known."""
        shapes = [() if a is None else getattr(a, "shape", None) for a in arguments]
        try:
            if None in shapes or not shapes:
                return [unknown or _Unknown(node.op)]
            if node.op == "Gather":
                axis = node.attributes.get("axis", 0) % len(shapes[0])
                shape = (*shapes[0][:axis], *shapes[1], *shapes[0][axis + 1:])
            elif node.op in SHAPES or node.op.startswith("Reduce"):
                shape = SHAPES.get(node.op, reduced_shape)(node.attributes, *shapes)
            elif node.op in ARITHMETIC:
                shape = np.broadcast_shapes(*shapes)
            else:
                return [unknown or _Unknown(node.op)]
        except (ValueError, IndexError, TypeError, ZeroDivisionError, AttributeError):
            return [_Unknown(node.op)]
        found = []
        for part in shape if isinstance(shape, list) else [shape]:
            budget.pay(part)
            found.append(self._numbered(part))
        self.fronts.insert(0, found[0])
        return found

    def _recurrent(self, node, arguments, budget):
        """Numbered Y, Y_h and Y_c; T and B are those of X."""
        self.recurrent.append(node)
        self.origins[node.name] = node.inputs[0] if node.inputs else ""
        x, W, R = (arguments + [None] * 3)[:3]
        D = 1 + (node.attributes.get("direction") == b"bidirectional")
        layout = node.attributes.get("layout", 0)
        H = R.shape[1 if node.quantized else 2] if isinstance(R, np.ndarray) and R.ndim == 3 else 1
        known = isinstance(x, np.ndarray) and x.ndim == 3
        x = x.swapaxes(0, 1) if known and layout == 1 else x
        T, B = x.shape[:2] if known else (_PROBE_T, _PROBE_B)
        budget.pay((T, D, B, H)), budget.pay((2, D, B, H))
        self.given[node.name] = x if known else None
        Y = self._numbered((T, D, B, H))
        self.sources[_key(Y.transpose(0, 2, 1, 3).reshape(T, B, D * H))] = node.name
        states = [self._numbered((D, B, H)) for _ in range(2)]
        if layout == 1:
            Y, states = Y.transpose(2, 0, 1, 3), [s.swapaxes(0, 1) for s in states]
        return [Y, *states]


def _key(a):
    """What is equal for equal arrays."""
    return a.shape, a.dtype.str, np.ascontiguousarray(a).tobytes()


def _fill_of(node, arguments):
    """The number that a result has everywhere, where the arguments tell it whatever its shape."""
    if node.op == "ConstantOfShape":
        return node.attributes.get("value", np.zeros(1)).ravel()[:1].sum()
    if node.op not in KEEPING_FILL and node.op != "Concat":
        return None
    sources = arguments if node.op == "Concat" else arguments[:1]
    fills = set()
    for a in sources:
        if isinstance(a, np.ndarray) and a.size and a.dtype.kind == "f" and (a == a.flat[0]).all():
            fills.add(a.flat[0])
        else:
            fills.add(a.fill if isinstance(a, _Unknown) else None)
    return fills.pop() if len(fills) == 1 else None


# ---- a backend for ONNX's own tests -------------------------------------------------------------


class Backend(onnx.backend.base.Backend):
    """onnx.backend: runs models of LSTM, GRU and RNN nodes, `prepare(model).run(inputs)`."""

    @classmethod
    def prepare(cls, model, device="CPU", **kwargs):
        """The model, ready to run."""
        super().prepare(model, device, **kwargs)
        return _Prepared(Graph(model))

    @classmethod
    def supports_device(cls, device):
        """CPU only."""
        return device == "CPU"


class _Prepared(onnx.backend.base.BackendRep):
    def __init__(self, graph):
        self.graph = graph

    def run(self, inputs, **kwargs):
        found = self.graph.run(dict(zip(self.graph.inputs, inputs)))
        return tuple(found[name] for name in self.graph.outputs)
