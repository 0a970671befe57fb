"""ONNX graphs: their LSTM and RNN nodes as layers, or run as they are. Needs the package onnx.

ONNX orders the gates i, o, f, c and the peepholes i, o, f; a node's W (D, 4H, I), R (D, 4H, H) and
P (D, 3H) hold both directions, B (D, 8H) two biases in a row. Y is (T, D, B, H), so that between
stacked layers a graph squeezes, transposes and reshapes. That plumbing is not matched against
patterns: it is run, on cells that are numbered, and two nodes are stacked if the second one gets
the numbers of the first one's Y where an `lstmcore.LSTM` of two layers would put them.

`Graph.run` computes a graph of these nodes and plumbing. It follows ONNX Runtime where ONNX is
silent: a sequence of length 0 ends in a state of zeros, and Y is 0 past a sequence's end.
"""

import functools
import json
import math
import os

import numpy as np

from lstmcore import functional
from lstmcore.formats import assemble, onnx_export
from lstmcore.formats.safetensors import widened

try:
    import onnx
    import onnx.backend.base
    from google.protobuf.message import DecodeError
    from onnx import TensorProto
except ImportError:
    raise ImportError("ONNX files need the package onnx: pip install 'lstmcore[onnx]'") from None

GATES = {"LSTM": [0, 2, 3, 1], "RNN": [0]}              # ours, as places in ONNX's order
DEFAULTS = {"LSTM": ["sigmoid", "tanh", "tanh"], "RNN": ["tanh"]}
_DTYPES = {TensorProto.FLOAT: "f4", TensorProto.DOUBLE: "f8", TensorProto.FLOAT16: "f2",
           TensorProto.BFLOAT16: "u2", TensorProto.INT64: "i8", TensorProto.INT32: "i4",
           TensorProto.INT16: "i2", TensorProto.INT8: "i1", TensorProto.UINT8: "u1",
           TensorProto.UINT16: "u2", TensorProto.UINT32: "u4", TensorProto.UINT64: "u8",
           TensorProto.BOOL: "?"}
_FIELDS = {TensorProto.FLOAT: "float_data", TensorProto.DOUBLE: "double_data",
           TensorProto.INT64: "int64_data", TensorProto.UINT32: "uint64_data",
           TensorProto.UINT64: "uint64_data"}
_PROBE_T, _PROBE_B = 5, 3           # sizes of the numbered cells where the graph leaves them open


def read_arrays(path):
    """Every initializer of the graph by name."""
    return Graph(path).constants


def read_own(path, options):
    """The module that a file of `onnx_export` holds; None where it is not that, node for node."""
    model = _parsed(path)
    said = {entry.key: entry.value for entry in model.metadata_props}
    if onnx_export.KEY not in said:
        return None
    try:
        graph, description = Graph(path), json.loads(said[onnx_export.KEY])
        arrays = _own_arrays(graph)
        again = onnx_export.build(assemble.rebuild(description, arrays),
                                  state=any(name.startswith("h0") for name in graph.inputs),
                                  lengths="lengths" in graph.inputs)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return None             # the description is not that of the graph, which is read as it is
    return assemble.rebuild(description, arrays, **options) if again.graph == model.graph else None


def _own_arrays(graph):
    """The parameters in a graph of `onnx_export`, as their names and those of the nodes say."""
    arrays = {}
    for node in graph.nodes:
        if node.op in GATES:
            weights = [graph.constants.get(name) for name in node.inputs[1:4] + node.inputs[7:]]
            prefix, _, n = node.name.rpartition("l")
            for suffix, cell in zip(("", "_reverse"), _layer(node, *weights).directions):
                arrays.update({f"{prefix}{weight}_l{n}{suffix}": a for weight, a in cell.items()})
    for name, a in graph.constants.items():
        if assemble.is_weight(name):            # of a Scan, which has all matrices transposed
            arrays[name] = a if "weight_peephole_l" in name else a.T
    return arrays


def read_chains(path, options):
    """The chains of recurrent nodes in the file, see `lstmcore.formats`."""
    graph = Graph(path, budget=(1 << 20) + 4 * os.path.getsize(path))
    probe = _Probe(graph)
    chains = []
    for node in probe.recurrent:
        entry = node.name, functools.partial(probe.layer, node)
        before = probe.before(node)
        last = [n for n, chain in enumerate(chains) if chain[-1][0] == before]
        if before is not None and last:
            chains[last[0]].append(entry)
        else:
            chains.append([entry])
    if not chains and "Scan" in probe.unknown_ops:
        raise ValueError(f"{path} computes a recurrence in a Scan, which is read only from a whole "
                         "file as lstmcore wrote it: without name=, and not changed since")
    if chains and "batch_first" not in options:
        options = {**options, "batch_first": probe.is_batch_first(probe.recurrent[0])}
    return chains, sorted(probe.unknown_ops), options


class Graph:
    """An ONNX graph of LSTM, RNN and plumbing, computed by lstmcore's kernels.

    Parameters
    ----------
    model : path, or onnx.ModelProto
    budget : how many numbers one run may produce in all, plumbing included
    """

    def __init__(self, model, budget=1 << 31):
        folder = None
        if not isinstance(model, onnx.ModelProto):
            folder = os.path.dirname(os.path.abspath(model))
            model = _parsed(model)
        if not model.graph.node:
            raise ValueError("the ONNX model has no nodes")
        if model.graph.sparse_initializer:
            raise ValueError("the ONNX model has sparse_initializer, which is not read here")
        self.budget = budget
        self.constants = {_text(t.name): _array(t, folder) for t in model.graph.initializer}
        self.nodes = [_Node(n, node, folder) for n, node in enumerate(model.graph.node)]
        self.inputs = {_text(v.name): v for v in model.graph.input if v.name not in self.constants}
        self.outputs = [_text(v.name) for v in model.graph.output]

    def run(self, inputs):
        """inputs: arrays by name -> the graph's outputs by name."""
        if unknown := inputs.keys() ^ self.inputs.keys():
            raise ValueError(f"inputs must be {sorted(self.inputs)}, wrong or missing are "
                             f"{sorted(unknown)}")
        values = {**self.constants, **{name: np.asarray(a) for name, a in inputs.items()}}
        budget = _Budget(self.budget)
        for node in self.nodes:
            arguments = [_given(values, name) for name in node.inputs]
            if node.op in GATES:
                results = _run_recurrent(node, *arguments)
                for result in results:
                    budget.pay(result.shape)
            else:
                results = _plumb(node, arguments, budget)
            values.update(zip(node.outputs, results))
        return {name: _given(values, name) for name in self.outputs}


def _parsed(path):
    model = onnx.ModelProto()
    with open(path, "rb") as file:
        try:
            model.ParseFromString(file.read())
        except (DecodeError, RecursionError) as error:
            raise ValueError(f"{path} is not an ONNX model: {error}") from None
    return model


class _Node:
    """One node: its name, op, inputs, outputs and attributes as Python values."""

    def __init__(self, n, node, folder):
        self.op = _text(node.op_type)
        if node.domain not in ("", "ai.onnx"):
            self.op = f"{_text(node.domain)}.{self.op}"
        self.inputs, self.outputs = [*map(_text, node.input)], [*map(_text, node.output)]
        self.name = _text(node.name) or f"{node.op_type}_{n}"
        self.attributes = {}
        if self.op in GATES or self.op in _PLUMBING:
            self.attributes = {_text(a.name): _attribute(a, folder) for a in node.attribute}


def _text(value):
    """protobuf gives what is not UTF-8 as bytes."""
    if not isinstance(value, str):
        raise ValueError(f"the ONNX model has a name that is not UTF-8: {value!r:.100}")
    return value


class _Budget:
    def __init__(self, numbers):
        self.left = numbers

    def pay(self, shape):
        """Account for a result of this shape before it is made."""
        self.left -= math.prod(shape)
        if self.left < 0 or min(shape, default=0) < 0:
            raise ValueError(f"the ONNX graph makes a value of shape {list(shape)}, more than "
                             "its size allows")


def _given(values, name):
    if not name:
        return None
    if name not in values:
        raise ValueError(f"the ONNX graph uses {name!r:.100} before any node makes it")
    return values[name]


# ---- arrays and attributes ----------------------------------------------------------------------


def _array(tensor, folder):
    """A TensorProto as an array, its shape compared with its data first."""
    kind, shape, name = tensor.data_type, tuple(tensor.dims), tensor.name
    if kind not in _DTYPES:
        raise ValueError(f"the ONNX tensor {name!r:.100} has the data type {kind}: not numbers")
    if min(shape, default=0) < 0 or len(shape) > 32:
        raise ValueError(f"the ONNX tensor {name!r:.100} has the shape {shape}")
    dtype, count = np.dtype("<" + _DTYPES[kind]), math.prod(shape)
    if tensor.data_location == TensorProto.EXTERNAL:
        raw = _external(tensor, folder, count * dtype.itemsize)
    elif tensor.HasField("raw_data"):
        raw = tensor.raw_data
    else:
        raw = np.array(getattr(tensor, _FIELDS.get(kind, "int32_data")), dtype="<i8"
                       if kind not in (TensorProto.FLOAT, TensorProto.DOUBLE) else dtype)
        raw = raw.astype("<u2" if kind == TensorProto.FLOAT16 else dtype).tobytes()
    if len(raw) != count * dtype.itemsize:
        raise ValueError(f"the ONNX tensor {name!r:.100} of shape {shape} must have "
                         f"{count * dtype.itemsize} bytes, got {len(raw)}")
    if not count:
        return np.zeros([n if n < 1 << 31 else 0 for n in shape], dtype)
    found = np.frombuffer(raw, dtype).reshape(shape)
    return widened(found) if kind == TensorProto.BFLOAT16 else found


def _external(tensor, folder, size):
    """The bytes of a tensor that stands in a file beside the model."""
    entries = {_text(entry.key): _text(entry.value) for entry in tensor.external_data}
    location = entries.get("location", "")
    if folder is None or not location or os.path.basename(location) != location \
            or "\\" in location or location in (".", ".."):
        raise ValueError(f"the ONNX tensor {tensor.name!r:.100} is in {location!r:.100}: only a "
                         "file in the model's own folder is opened")
    path = os.path.join(folder, location)
    if os.path.islink(path) or not os.path.isfile(path):
        raise ValueError(f"the ONNX tensor {tensor.name!r:.100} is in {location!r:.100}, which is "
                         "no file beside the model")
    offset, length = (entries.get(key, default) for key, default in
                      (("offset", "0"), ("length", str(size))))
    if not (offset.isdecimal() and len(offset) < 20 and length == str(size)):
        raise ValueError(f"the ONNX tensor {tensor.name!r:.100} must have {size} bytes, its "
                         f"external data says {length!r:.40} at {offset!r:.40}")
    if int(offset) + size > os.path.getsize(path):
        raise ValueError(f"the ONNX tensor {tensor.name!r:.100} ends past the end of "
                         f"{location!r:.100}")
    with open(path, "rb") as file:
        file.seek(int(offset))
        return file.read(size)


def _attribute(a, folder):
    kinds = onnx.AttributeProto
    if a.type == kinds.TENSOR:
        return _array(a.t, folder)
    values = {kinds.INT: a.i, kinds.FLOAT: a.f, kinds.STRING: a.s, kinds.INTS: list(a.ints),
              kinds.FLOATS: list(a.floats), kinds.STRINGS: list(a.strings)}
    if a.type not in values:
        raise ValueError(f"the ONNX attribute {a.name!r:.100} is of a type that is not read here")
    return values[a.type]


# ---- recurrent nodes ----------------------------------------------------------------------------


def _options(node):
    """The attributes of a recurrent node: (directions, reverse, layout, nonlinearity).

    What lstmcore does not compute is refused by its name.
    """
    a = dict(node.attributes)
    direction = _string(a.pop("direction", b"forward"))
    if direction not in ("forward", "reverse", "bidirectional"):
        raise ValueError(f"{node.name} has direction={direction!r:.40}")
    D = 1 + (direction == "bidirectional")
    for name in ("clip", "activation_alpha", "activation_beta", "input_forget"):
        if value := a.pop(name, None):
            raise ValueError(f"{node.name} asks for {name}={value}, which lstmcore does not have")
    wanted = [_string(s).lower() for s in a.pop("activations", [])] or DEFAULTS[node.op] * D
    allowed = [DEFAULTS[node.op] * D] + ([["relu"] * D] if node.op == "RNN" else [])
    if wanted not in allowed:
        raise ValueError(f"{node.name} asks for activations={wanted}, lstmcore has {allowed}")
    layout = a.pop("layout", 0)
    a.pop("hidden_size", None), a.pop("output_sequence", None)
    if a or layout not in (0, 1):
        raise ValueError(f"{node.name} asks for {a or {'layout': layout}}, which lstmcore does not "
                         "have")
    return D, direction == "reverse", layout, wanted[0] if node.op == "RNN" else None


def _string(value):
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _layer(node, W, R, B=None, P=None):
    """A recurrent node's weights as a `Layer`, checked against each other."""
    D, reverse, _, nonlinearity = _options(node)
    n = 4 if node.op == "LSTM" else 1
    for name, a in (("W", W), ("R", R)):
        if a is None or a.ndim != 3 or a.shape[0] != D or a.dtype.kind != "f":
            raise ValueError(f"{name} of {node.name} must be floats ({D}, {n}H, ·), got "
                             f"{'none' if a is None else (a.dtype, a.shape)}")
    H = R.shape[2]
    sized = node.attributes.get("hidden_size", H)
    if R.shape[1] != n * H or W.shape[1] != n * H or sized != H or not H:
        raise ValueError(f"{node.name} must have W (D, {n}H, I) and R (D, {n}H, H) with "
                         f"H = {sized}, got {W.shape} and {R.shape}")
    for name, a, shape in (("B", B, (D, 2 * n * H)), ("P", P, (D, 3 * H))):
        if a is not None and (a.shape != shape or a.dtype.kind != "f"):
            raise ValueError(f"{name} of {node.name} must be floats {shape}, "
                             f"got {a.dtype} {a.shape}")
    order = GATES[node.op]
    directions = []
    for d in range(D):
        cell = {"weight_ih": W[d].reshape(n, H, -1)[order].reshape(W[d].shape),
                "weight_hh": R[d].reshape(n, H, H)[order].reshape(R[d].shape)}
        if B is not None:
            cell["bias"] = B[d].reshape(2, n, H)[:, order].sum(axis=0).reshape(n * H)
        if P is not None:
            cell["weight_peephole"] = P[d].reshape(3, H)[[0, 2, 1]]
        directions.append(cell)
    return assemble.Layer(node.name, node.op, directions, nonlinearity, reverse)


def _run_recurrent(node, X, W, R, B=None, sequence_lens=None, initial_h=None, initial_c=None,
                   P=None):
    """Y, Y_h and, of an LSTM, Y_c, as ONNX lays them out."""
    layer, (_, reverse, layout, _) = _layer(node, W, R, B, P), _options(node)
    if X is None or X.ndim != 3 or X.dtype not in (np.float32, np.float64):
        raise ValueError(f"X of {node.name} must be float32 or float64 and have 3 axes")
    states = [None if s is None else np.moveaxis(s, 1, 0) if layout else s
              for s in (initial_h, initial_c)]
    x = X.swapaxes(0, 1) if layout else X
    lengths = None if sequence_lens is None else np.asarray(sequence_lens)
    results = []
    for d, cell in enumerate(layer.directions):
        cell = {name: np.ascontiguousarray(a, x.dtype) for name, a in cell.items()}
        h0, c0 = (None if s is None else s[d] for s in states)
        common = dict(lengths=lengths, reverse=reverse or d == 1, keep_tape=False)
        weights = x, cell["weight_ih"], cell["weight_hh"], cell.get("bias"), h0
        if layer.kind == "LSTM":
            y, last, _ = functional.lstm_forward(*weights, c0, **common,
                                                 peepholes=cell.get("weight_peephole"))
        else:
            y, last, _ = functional.rnn_forward(*weights, nonlinearity=layer.nonlinearity, **common)
            last = (last,)
        if lengths is not None:
            last = [np.where(lengths[:, None] > 0, s, 0).astype(s.dtype) for s in last]
        results.append((y, *last))
    Y, *last = (np.stack(parts, axis=1 if n == 0 else 0) for n, parts in enumerate(zip(*results)))
    if layout:                          # (T, D, B, H) -> (B, T, D, H); (D, B, H) -> (B, D, H)
        return Y.transpose(2, 0, 1, 3), *(s.swapaxes(0, 1) for s in last)
    return Y, *last


# ---- plumbing -----------------------------------------------------------------------------------


def _plumb(node, arguments, budget):
    """The outputs of a node that only moves numbers, or computes shapes."""
    if node.op not in _PLUMBING:
        raise ValueError(f"{node.name} is the operation {node.op}; run here are LSTM, RNN, "
                         f"{', '.join(_PLUMBING)}")
    try:
        result = _PLUMBING[node.op](node.attributes, budget, *arguments)
    except (TypeError, IndexError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"{node.name} ({node.op}) of the ONNX graph: {error}") from None
    budget.pay(result.shape)
    return [result]


def _axes(attributes, axes):
    axes = attributes.get("axes") if axes is None else axes
    return None if axes is None else tuple(int(n) for n in np.ravel(axes))


def _reshape(attributes, budget, data, shape=None):
    shape = [int(n) for n in np.ravel(attributes["shape"] if shape is None else shape)]
    if not attributes.get("allowzero", 0):
        shape = [data.shape[n] if size == 0 else size for n, size in enumerate(shape)]
    return data.reshape(shape)


def _slice(attributes, budget, data, starts=None, ends=None, axes=None, steps=None):
    starts, ends, steps = (
        [int(n) for n in np.ravel(attributes.get(name, default) if value is None else value)]
        for name, value, default in (("starts", starts, None), ("ends", ends, None),
                                     ("steps", steps, [1] * np.size(starts))))
    axes = range(len(starts)) if (found := _axes(attributes, axes)) is None else found
    cut = [slice(None)] * data.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        # Going backwards, an end before the first element cannot be written as -1.
        cut[axis] = slice(start, None if step < 0 and end < -data.shape[axis] else end, step)
    return data[tuple(cut)]


def _gather(attributes, budget, data, indices):
    axis = attributes.get("axis", 0)
    budget.pay((*indices.shape, *np.delete(data.shape, axis)))
    return np.take(data, indices, axis=axis)


def _concat(attributes, budget, *parts):
    budget.pay((sum(part.size for part in parts),))
    return np.concatenate(parts, axis=attributes["axis"])


def _broadcast(data, shape, budget):
    budget.pay(shape)
    return np.broadcast_to(data, shape)


def _expand(attributes, budget, data, shape):
    return _broadcast(data, np.broadcast_shapes(data.shape, tuple(int(n) for n in shape)), budget)


def _constant_of_shape(attributes, budget, shape):
    value = attributes.get("value", np.zeros(1, "float32"))
    return _broadcast(value.reshape(()), tuple(int(n) for n in shape), budget)


def _constant(attributes, budget):
    ((name, value),) = attributes.items()
    return np.asarray(value, {"value_int": "i8", "value_ints": "i8", "value_float": "f4",
                              "value_floats": "f4"}.get(name))


_PLUMBING = {
    "Identity": lambda a, budget, x: x,
    "Dropout": lambda a, budget, x, *training: x,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Expand": _expand,
    "Shape": lambda a, budget, x: np.array(x.shape[a.get("start", 0):a.get("end")], "i8"),
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Cast": lambda a, budget, x: x.astype(_DTYPES[a["to"]]),
    "Squeeze": lambda a, budget, x, axes=None: np.squeeze(x, _axes(a, axes)),
    "Unsqueeze": lambda a, budget, x, axes=None: np.expand_dims(x, _axes(a, axes)),
    "Transpose": lambda a, budget, x: np.transpose(x, a.get("perm")),
    "Reshape": _reshape,
}


# ---- from a graph to layers ---------------------------------------------------------------------


class _Unknown:
    """A value that depends on an operation that is not computed here."""

    def __init__(self, why):
        self.why = why


class _Probe:
    """A graph run on numbered cells: which recurrent node feeds which, and where x comes from."""

    def __init__(self, graph):
        self.graph, self.unknown_ops, self.recurrent = graph, set(), []
        self.next, self.outputs, self.given = 1, {}, {}
        self.values, self.feeds, self.fixed = dict(graph.constants), {}, set(graph.constants)
        for name, value in graph.inputs.items():
            self.values[name] = self.feeds[name] = self._feed(value)
        budget, names = _Budget(graph.budget), set()
        for n, node in enumerate(graph.nodes):
            if node.name in names:
                node.name = f"{node.name}_{n}"
            names.add(node.name)
            arguments = [self.values.get(name, _Unknown("an input that is not there"))
                         if name else None for name in node.inputs]
            results = self._results(node, arguments, budget)
            self.values.update(zip(node.outputs, results))
            if all(name in self.fixed for name in node.inputs if name):
                self.fixed.update(node.outputs)

    def layer(self, node):
        """The node as a list of one Layer; initial states that the graph fixes come with it."""
        given = dict(zip(("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P"),
                         node.inputs))
        arrays = {}
        for name in ("W", "R", "B", "P"):
            if source := given.get(name):
                arrays[name] = self.values.get(source)
                if source not in self.fixed or not isinstance(arrays[name], np.ndarray):
                    raise ValueError(f"{name} of {node.name} is no constant of the graph: only "
                                     "a graph that holds its weights can be loaded")
        layer = _layer(node, arrays.get("W"), arrays.get("R"), arrays.get("B"), arrays.get("P"))
        if (source := given.get("sequence_lens")) and source in self.fixed:
            raise ValueError(f"sequence_lens of {node.name} is a constant, which lstmcore gives "
                             "to a call, as lengths")
        states = [self._initial(node, given.get(name)) for name in ("initial_h", "initial_c")]
        if any(state is not None for state in states):
            shape = (len(layer.directions), next(s.shape[1] for s in states if s is not None),
                     layer.hidden_size)
            states = [np.zeros(shape, "f4") if s is None else s for s in states]
            if any(state.shape != shape for state in states):
                raise ValueError(f"the initial states of {node.name} must be {shape}, "
                                 f"got {[state.shape for state in states]}")
            layer = layer._replace(initial=tuple(states) if node.op == "LSTM" else states[0])
        return [layer]

    def before(self, node):
        """The name of the node whose Y, in the usual order, is this node's X, or None."""
        x = self.given[node.name]
        for name, y in self.outputs.items():
            if x is not None and x.shape == y.shape and np.array_equal(x, y):
                return name
        return None

    def is_batch_first(self, node):
        """Whether the graph's input reaches this node with its first two axes swapped."""
        x = self.given[node.name]
        for feed in self.feeds.values():
            if x is not None and isinstance(feed, np.ndarray) and feed.ndim == 3:
                if np.array_equal(x, feed):
                    return False
                if np.array_equal(x, feed.swapaxes(0, 1)):
                    return True
        return bool(node.attributes.get("layout", 0))

    def _initial(self, node, source):
        value = self.values.get(source) if source else None
        if isinstance(value, _Unknown):
            raise ValueError(f"an initial state of {node.name} comes from {value.why}")
        if value is None or source not in self.fixed or not value.any():
            return None                     # zeros, or an input: the state that a call is given
        if value.ndim != 3 or value.dtype.kind != "f":
            raise ValueError(f"an initial state of {node.name} must be floats with 3 axes, got "
                             f"{value.dtype} {value.shape}")
        return value.swapaxes(0, 1) if node.attributes.get("layout", 0) else value

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
        if node.op not in _PLUMBING:
            self.unknown_ops.add(node.op)
            unknown = _Unknown(node.op)
        if unknown is None:
            try:
                return _plumb(node, arguments, budget)
            except ValueError as error:
                if budget.left < 0:
                    raise
                unknown = _Unknown(str(error))
        return [unknown] * len(node.outputs)

    def _recurrent(self, node, arguments, budget):
        """Numbered Y, Y_h and Y_c; T and B are those of X."""
        self.recurrent.append(node)
        x, W, R = (arguments + [None] * 3)[:3]
        D = 1 + (node.attributes.get("direction") == b"bidirectional")
        layout = node.attributes.get("layout", 0)
        H = R.shape[2] if isinstance(R, np.ndarray) and R.ndim == 3 else 1
        known = isinstance(x, np.ndarray) and x.ndim == 3
        x = x.swapaxes(0, 1) if known and layout == 1 else x
        T, B = x.shape[:2] if known else (_PROBE_T, _PROBE_B)
        budget.pay((T, D, B, H)), budget.pay((2, D, B, H))
        self.given[node.name] = x if known else None
        Y = self._numbered((T, D, B, H))
        self.outputs[node.name] = Y.transpose(0, 2, 1, 3).reshape(T, B, D * H)
        states = [self._numbered((D, B, H)) for _ in range(2)]
        if layout == 1:
            Y, states = Y.transpose(2, 0, 1, 3), [s.swapaxes(0, 1) for s in states]
        return [Y, *states]


# ---- a backend for ONNX's own tests -------------------------------------------------------------


class Backend(onnx.backend.base.Backend):
    """onnx.backend: runs models of LSTM and RNN nodes, `prepare(model).run(inputs)`."""

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
