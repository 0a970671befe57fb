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
import stat

import numpy as np

from lstmcore.formats import description, disk, onnx_export
from lstmcore.formats.description import Content
from lstmcore.formats.onnx_export import write_module           # noqa: F401
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


def content(path):
    """The chains of recurrent nodes in the file, and what lstmcore wrote."""
    model = _parsed(path)
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
    others, hint = sorted(probe.unknown_ops), ""
    if "Scan" in probe.unknown_ops:
        hint = ("it computes a recurrence in a Scan, which is read only from a whole file as "
                "lstmcore wrote it: without name=, and not changed since")
    elif odd := [op for op in others if op.rpartition(".")[2] in _NAMED]:
        hint = f"lstmcore reads LSTM and RNN, not {', '.join(odd)}"
    elif "MatMul" in others or "Gemm" in others:
        hint = ("an exporter may have written a recurrence out, step by step: torch.onnx.export "
                "with dynamo=False keeps it, or load the state_dict")
    options = {"batch_first": probe.is_batch_first(probe.recurrent[0])} if chains else {}
    own = _own(model, graph)
    return Content(own[1] if own else graph.constants, chains, others, options,
                   {onnx_export.KEY: own[0]} if own else {}, hint)


def _own(model, graph):
    """(description, arrays) that a file of `onnx_export` holds; None where it is not that, node for
    node."""
    said = {entry.key: entry.value for entry in model.metadata_props}
    if onnx_export.KEY not in said:
        return None
    try:
        found = json.loads(said[onnx_export.KEY])
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
            for suffix, cell in zip(("", "_reverse"), _layer(node, *weights).directions):
                arrays.update({f"{prefix}{weight}_l{n}{suffix}": a for weight, a in cell.items()})
    plain = {f"{place}.{name}".lstrip(".") for step in steps
             for place in {step.layer, step.embedding or step.layer} for name in ("weight", "bias")}
    for name, a in graph.constants.items():
        if description.is_weight(name):         # of a Scan, which has all matrices transposed
            arrays[name] = a if "weight_peephole_l" in name else a.T
        elif name in plain:
            arrays[name] = a
    return arrays


class Graph:
    """An ONNX graph of LSTM, RNN and plumbing, computed by lstmcore's kernels.

    Parameters
    ----------
    model : path, or onnx.ModelProto
    budget : how many numbers one run may produce in all, plumbing included; by default 2000 for
        each that the graph holds or is given, and a million
    """

    def __init__(self, model, budget=None, path=None):
        if not isinstance(model, onnx.ModelProto):
            path, model = model, _parsed(model)
        if not model.graph.node:
            raise ValueError("the ONNX model has no nodes")
        if model.graph.sparse_initializer:
            raise ValueError("the ONNX model has sparse_initializer, which is not read here")
        self.budget, external = budget, _External(path)
        self.constants = {_text(t.name): _array(t, external) for t in model.graph.initializer}
        self.nodes = _Flat(model, external, self.constants).nodes(model.graph.node, {}, {}, 0)
        self.inputs = {_text(v.name): v for v in model.graph.input if v.name not in self.constants}
        self.outputs = [_text(v.name) for v in model.graph.output]

    def run(self, inputs):
        """inputs: arrays by name -> the graph's outputs by name."""
        if unknown := inputs.keys() ^ self.inputs.keys():
            raise ValueError(f"inputs must be {sorted(self.inputs)}, wrong or missing are "
                             f"{sorted(unknown)}")
        values = {**self.constants, **{name: np.asarray(a) for name, a in inputs.items()}}
        budget = _Budget(self.budget or (1 << 20) + 2000 * sum(a.size for a in values.values()))
        for node in _chosen_nodes(self.nodes, lambda name: _given(values, name)):
            arguments = [_given(values, name) for name in node.inputs]
            if node.op in GATES:
                try:
                    results = _run_recurrent(node, budget, *arguments)
                except (TypeError, IndexError, AttributeError) as error:
                    raise ValueError(f"{node.name} ({node.op}) of the ONNX graph: "
                                     f"{error}") from None
            else:
                results = _plumb(node, arguments, budget)
            values.update(zip(node.outputs, results))
        return {name: _given(values, name) for name in self.outputs}


def _parsed(path):
    model = onnx.ModelProto()
    data = disk.read(path)
    try:
        model.ParseFromString(data)
    except (DecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not an ONNX model: {error}") from None
    return model


class _Node:
    """One node: its name, op, inputs, outputs and attributes as Python values."""

    def __init__(self, name, op, inputs, outputs, attributes):
        self.name, self.op, self.inputs, self.outputs = name, op, inputs, outputs
        self.attributes, self.branches = attributes, {}


class _Flat:
    """The nodes of a graph in a row: functions are written out, and names within them and within
    the branches of an If made different from all others."""

    def __init__(self, model, external, constants):
        self.external, self.constants, self.count = external, constants, 0
        self.functions = {(_text(f.domain), _text(f.name)): f for f in model.functions}
        # Functions that call functions double with every floor.
        self.most = 16 * (len(model.graph.node) + sum(len(f.node) for f in model.functions)) + 1024

    def nodes(self, protos, names, given, depth):
        """names : what the protos' names are called in the row; given : a function's attributes."""
        if depth > 8:
            raise ValueError("the ONNX model has functions or branches in each other without end")
        found = []
        for proto in protos:
            self.count += 1
            if self.count > self.most:
                raise ValueError("the ONNX model has functions that call each other without end")
            n = self.count - 1
            inputs = [names.get(name, name) for name in map(_text, proto.input)]
            outputs = []
            for name in map(_text, proto.output):
                if depth and name and name not in names:
                    names[name] = f"{name}/{n}"
                outputs.append(names.get(name, name))
            key = _text(proto.domain), _text(proto.op_type)
            attributes = [given.get(a.ref_attr_name) if a.ref_attr_name else a
                          for a in proto.attribute]
            attributes = {_text(a.name): a for a in attributes if a is not None}
            if function := self.functions.get(key):
                inner = dict(zip(map(_text, function.input), inputs))
                inner.update(dict.fromkeys(map(_text, function.input[len(inputs):]), ""))
                inner.update(zip(map(_text, function.output), outputs))
                defaults = {_text(a.name): a for a in function.attribute_proto}
                found += self.nodes(function.node, inner, {**defaults, **attributes}, depth + 1)
                continue
            op = key[1] if key[0] in ("", "ai.onnx") else ".".join(key)
            node = _Node(_text(proto.name) or f"{key[1]}_{n}", op, inputs, outputs, {})
            if op in GATES or op in _PLUMBING or op in _SHAPES:
                node.attributes = {name: _attribute(a, self.external)
                                   for name, a in attributes.items()}
            elif op == "If":
                for branch in ("then_branch", "else_branch"):
                    if branch not in attributes:
                        raise ValueError(f"{node.name} (If) of the ONNX graph has no {branch}")
                    node.branches[branch] = self.branch(attributes[branch].g, names, given, outputs,
                                                        depth, n)
            found.append(node)
        return found

    def branch(self, graph, names, given, outputs, depth, n):
        names = dict(names)
        for tensor in graph.initializer:
            names[_text(tensor.name)] = f"{tensor.name}/{n}"
            self.constants[names[tensor.name]] = _array(tensor, self.external)
        nodes = self.nodes(graph.node, names, given, depth + 1)
        results = [names.get(_text(v.name), _text(v.name)) for v in graph.output]
        return nodes + [_Node(f"{result} of If", "Identity", [result], [output], {})
                        for result, output in zip(results, outputs)]


def _chosen_nodes(nodes, value):
    """The nodes, those of a branch in the place of an If. value(name): what decides."""
    waiting = list(reversed(nodes))
    while waiting:
        node = waiting.pop()
        condition = value(node.inputs[0]) if node.branches and node.inputs else None
        if isinstance(condition, np.ndarray) and condition.size == 1 \
                and condition.dtype == np.bool_:
            chosen = "then_branch" if condition.ravel()[0] else "else_branch"
            waiting += reversed(node.branches[chosen])
        else:
            yield node


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


def _array(tensor, external):
    """A TensorProto as an array, its shape compared with its data first."""
    kind, shape, name = tensor.data_type, tuple(tensor.dims), tensor.name
    if kind not in _DTYPES:
        raise ValueError(f"the ONNX tensor {name!r:.100} has the data type {kind}: not numbers")
    if min(shape, default=0) < 0 or len(shape) > 32:
        raise ValueError(f"the ONNX tensor {name!r:.100} has the shape {shape}")
    dtype, count = np.dtype("<" + _DTYPES[kind]), math.prod(shape)
    if tensor.data_location == TensorProto.EXTERNAL:
        raw = external.read(tensor, count * dtype.itemsize)
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


class _External:
    """The tensors' bytes that stand in files beside the model."""

    def __init__(self, path):
        self.path, self.left = path, {}

    def read(self, tensor, size):
        """The bytes of a tensor."""
        entries = {_text(entry.key): _text(entry.value) for entry in tensor.external_data}
        location, name = entries.get("location", ""), f"the ONNX tensor {tensor.name!r:.100}"
        if self.path is None or not location or os.path.basename(location) != location \
                or "\\" in location or location in (".", ".."):
            raise ValueError(f"{name} is in {location!r:.100}: only a file in the model's own "
                             "folder is opened")
        model = os.path.abspath(os.fsdecode(self.path))
        path = os.path.realpath(os.path.join(os.path.dirname(model), location))
        # A cache of downloads has links to both, which lead into one folder.
        homes = [os.path.realpath(os.path.dirname(model)), os.path.dirname(os.path.realpath(model))]
        if os.path.dirname(path) not in homes or not os.path.exists(path) \
                or not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError(f"{name} is in {location!r:.100}, which is no file beside the model")
        offset, length = (entries.get(key, default) for key, default in
                          (("offset", "0"), ("length", str(size))))
        if not (offset.isdecimal() and len(offset) < 20 and length == str(size)):
            raise ValueError(f"{name} must have {size} bytes, its external data says "
                             f"{length!r:.40} at {offset!r:.40}")
        if int(offset) + size > os.path.getsize(path):
            raise ValueError(f"{name} ends past the end of {location!r:.100}")
        self.left[path] = self.left.get(path, 2 * os.path.getsize(path) + (1 << 20)) - size
        if self.left[path] < 0:
            raise ValueError(f"{name}: the model reads {location!r:.100} again and again")
        with disk.opened(path) as file:
            file.seek(int(offset))
            return file.read(size)


def _attribute(a, external):
    kinds = onnx.AttributeProto
    if a.type == kinds.TENSOR:
        return _array(a.t, external)
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
    wanted = a.pop("activations", [])
    if not isinstance(wanted, list):
        raise ValueError(f"{node.name} has activations={wanted!r:.40}, not a list of names")
    wanted = [_string(s).lower() for s in wanted] or DEFAULTS[node.op] * D
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
    return description.Layer(node.name, node.op, directions, nonlinearity, reverse)


def _run_recurrent(node, budget, X=None, W=None, R=None, B=None, sequence_lens=None,
                   initial_h=None, initial_c=None, P=None):
    """Y, Y_h and, of an LSTM, Y_c, as ONNX lays them out."""
    from lstmcore import functional         # the reader alone needs no kernels

    layer, (_, reverse, layout, _) = _layer(node, W, R, B, P), _options(node)
    if X is None or X.ndim != 3 or X.dtype not in (np.float32, np.float64):
        raise ValueError(f"X of {node.name} must be float32 or float64 and have 3 axes")
    states = [None if s is None else np.moveaxis(s, 1, 0) if layout and s.ndim == 3 else s
              for s in (initial_h, initial_c)]
    x = X.swapaxes(0, 1) if layout else X
    D, H = len(layer.directions), layer.hidden_size
    if node.op == "RNN" and (initial_c is not None or P is not None):
        raise ValueError(f"{node.name} is an RNN and has an initial_c or P")
    for name, s in zip(("initial_h", "initial_c"), states):
        if s is not None and s.shape != (D, x.shape[1], H):
            raise ValueError(f"{name} of {node.name} must be {(D, x.shape[1], H)}, got {s.shape}")
    budget.pay((*x.shape[:2], D, H))
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
        with np.errstate(all="ignore"):
            result = _PLUMBING[node.op](node.attributes, budget, *arguments)
    except (TypeError, IndexError, KeyError, AttributeError, OverflowError, ValueError) as error:
        if budget.left < 0:
            raise
        raise ValueError(f"{node.name} ({node.op}) of the ONNX graph: {error}") from None
    results = result if isinstance(result, list) else [result]
    for result in results:
        budget.pay(result.shape)
    return results


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


def _tile(attributes, budget, data, repeats):
    repeats = tuple(int(n) for n in np.ravel(repeats))
    if min(repeats, default=0) < 0:
        raise ValueError(f"repeats must not be negative, got {list(repeats)}")
    budget.pay([n * k for n, k in zip(data.shape, repeats, strict=True)])
    return np.tile(data, repeats)


def _split(attributes, budget, data, sizes=None):
    axis = attributes.get("axis", 0)
    sizes = attributes.get("split") if sizes is None else np.ravel(sizes).tolist()
    if sizes is None:
        count = attributes["num_outputs"]
        each = -(-data.shape[axis] // count)
        sizes = [each] * (count - 1) + [data.shape[axis] - each * (count - 1)]
    if min(sizes, default=0) < 0 or sum(sizes) != data.shape[axis]:
        raise ValueError(f"{sizes} do not make up {data.shape[axis]}")
    return np.split(data, np.cumsum(sizes)[:-1], axis=axis)


def _range(attributes, budget, start, limit, delta):
    budget.pay((max(0, math.ceil((limit.item() - start.item()) / delta.item())),))
    return np.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def _div(a, b):
    """C's division of integers, towards zero."""
    if a.dtype.kind not in "iu":
        return a / b
    if not np.all(b):
        raise ValueError("division by zero")
    return (np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))).astype(np.result_type(a, b))


def _elementwise(function):
    def run(attributes, budget, *parts):
        budget.pay(np.broadcast_shapes(*(part.shape for part in parts)))
        return np.asarray(functools.reduce(function, parts) if len(parts) > 2
                          else function(*parts))
    return run


def _reduced(function):
    def run(attributes, budget, data, axes=None):
        return np.asarray(function(data, axis=_axes(attributes, axes),
                                   keepdims=bool(attributes.get("keepdims", 1))))
    return run


# What is computed: of integers, which stand for shapes; of floats, in `Graph.run` alone.
_ARITHMETIC = {
    **{name: _elementwise(function) for name, function in {
        "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": _div, "Mod": np.mod,
        "Min": np.minimum, "Max": np.maximum, "Equal": np.equal, "Less": np.less,
        "Greater": np.greater, "LessOrEqual": np.less_equal, "GreaterOrEqual": np.greater_equal,
        "And": np.logical_and, "Or": np.logical_or, "Not": np.logical_not, "Neg": np.negative,
        "Abs": np.abs, "Floor": np.floor, "Ceil": np.ceil, "Sign": np.sign}.items()},
    **{name: _reduced(function) for name, function in {
        "ReduceProd": np.prod, "ReduceSum": np.sum, "ReduceMax": np.max,
        "ReduceMin": np.min}.items()},
    "Where": lambda a, budget, mask, x, y: _where(budget, mask, x, y),
    "Range": _range,
}


def _where(budget, mask, x, y):
    budget.pay(np.broadcast_shapes(mask.shape, x.shape, y.shape))
    return np.where(mask, x, y)


_MOVING = {
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
    "Flatten": lambda a, budget, x: x.reshape(math.prod(x.shape[:a.get("axis", 1)]), -1),
    "Tile": _tile,
    "Split": _split,
    "Size": lambda a, budget, x: np.array(x.size, "i8"),
    "CastLike": lambda a, budget, x, like: x.astype(like.dtype),
}
_PLUMBING = {**_MOVING, **_ARITHMETIC}
# The same number everywhere stays that, whatever the shape, which may be unknown.
_KEEPING_FILL = {"Identity", "Expand", "Tile", "Slice", "Reshape", "Transpose", "Squeeze",
                 "Unsqueeze", "Gather", "Flatten", "Split", "Dropout", "Cast", "CastLike"}


# ---- shapes of what is not computed -------------------------------------------------------------


def _matmul_shape(a, x, w, *_):
    if min(len(x), len(w)) < 2:
        raise ValueError("vectors")
    return (*np.broadcast_shapes(x[:-2], w[:-2]), x[-2], w[-1])


def _gemm_shape(a, x, w, *_):
    return x[1 if a.get("transA", 0) else 0], w[0 if a.get("transB", 0) else 1]


def _conv_shape(a, x, w, *_):
    n = len(x) - 2
    auto, pads = _string(a.get("auto_pad", b"NOTSET")), a.get("pads", [0] * 2 * n)
    sizes = []
    for k in range(n):
        stride, dilation = (a.get(name, [1] * n)[k] for name in ("strides", "dilations"))
        if auto.startswith("SAME"):
            sizes.append(-(-x[2 + k] // stride))
        else:
            there = x[2 + k] + (0 if auto == "VALID" else pads[k] + pads[k + n])
            sizes.append((there - dilation * (w[2 + k] - 1) - 1) // stride + 1)
    return (x[0], w[0], *sizes)


def _reduced_shape(a, x, *axes):
    axes = a.get("axes")
    if axes is None:
        raise ValueError("axes that are computed")
    axes = [k % len(x) for k in axes]
    return tuple(1 if k in axes else n for k, n in enumerate(x)
                 if k not in axes or a.get("keepdims", 1))


def _same(a, x, *_):
    return x


_SHAPES = {
    "MatMul": _matmul_shape, "Gemm": _gemm_shape, "Conv": _conv_shape,
    "ReduceMean": _reduced_shape, "Pow": lambda a, *shapes: np.broadcast_shapes(*shapes),
    **dict.fromkeys(("Relu", "Tanh", "Sigmoid", "Gelu", "Erf", "Exp", "Log", "Sqrt", "LeakyRelu",
                     "Elu", "Selu", "Celu", "Softmax", "LogSoftmax", "LayerNormalization", "Clip",
                     "BatchNormalization", "InstanceNormalization", "GroupNormalization",
                     "HardSwish", "HardSigmoid", "Softplus", "Softsign", "PRelu", "Reciprocal",
                     "Mish"), _same),
}
_NAMED = ("GRU", "DynamicQuantizeLSTM", "Loop", "If")


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
        self.next, self.sources, self.given = 1, {}, {}
        self.values, self.feeds, self.fixed = dict(graph.constants), {}, set(graph.constants)
        self.moving = set(graph.inputs)     # what holds numbers that a call is given or computes
        for name, value in graph.inputs.items():
            self.values[name] = self.feeds[name] = self._feed(value)
        budget, names = _Budget(graph.budget), set()
        for n, node in enumerate(_chosen_nodes(graph.nodes, self._decides)):
            if node.name in names:
                node.name = f"{node.name}_{n}"
            names.add(node.name)
            arguments = [self.values.get(name, _Unknown("an input that is not there"))
                         if name else None for name in node.inputs]
            results = self._results(node, arguments, budget)
            self.values.update(zip(node.outputs, results))
            if all(name in self.fixed for name in node.inputs if name):
                self.fixed.update(node.outputs)
            if node.op not in ("Shape", "Size") and not self.moving.isdisjoint(node.inputs):
                self.moving.update(node.outputs)

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
                arrays[name] = self.values.get(source)
                if source not in self.fixed or not isinstance(arrays[name], np.ndarray):
                    raise ValueError(f"{name} of {node.name} is no constant of the graph: only "
                                     "a graph that holds its weights can be loaded")
        layer = _layer(node, arrays.get("W"), arrays.get("R"), arrays.get("B"), arrays.get("P"))
        if source := given.get("sequence_lens"):
            lengths, x = self.values.get(source), self.given[node.name]
            known = isinstance(lengths, np.ndarray) and lengths.dtype.kind in "iu"
            if isinstance(lengths, _Unknown) and source not in self.feeds:
                raise ValueError(f"sequence_lens of {node.name} comes from {lengths.why}")
            if known and (x is None or not np.all(lengths == len(x))):
                raise ValueError(f"sequence_lens of {node.name} is a constant or computed, and not "
                                 "the whole length of x: lstmcore gives lengths to a call")
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
        return None if x is None else self.sources.get(_key(x))

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
        if isinstance(value, _Unknown) and value.fill == 0:
            return None
        if isinstance(value, _Unknown):
            raise ValueError(f"an initial state of {node.name} comes from {value.why}")
        if value is None or source in self.moving or not value.any():
            return None                     # zeros, or an input: the state that a call is given
        if source not in self.fixed:
            raise ValueError(f"{node.name} starts in a state that is not zero and as large as the "
                             "batch is: lstmcore keeps states of one size only")
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
        computed = node.op in _ARITHMETIC and unknown is None and all(
            a.dtype.kind in "iub" or name in self.fixed
            for a, name in zip(arguments, node.inputs) if a is not None)
        if node.op == "Cast" and isinstance(arguments[0], np.ndarray) \
                and node.inputs[0] not in self.fixed and arguments[0].dtype == np.float64:
            return [arguments[0]]               # the numbers of cells stay what they are
        if node.op in _MOVING or computed:
            fill = _fill_of(node, arguments)
            if unknown is None:
                try:
                    return _plumb(node, arguments, budget)
                except ValueError as error:
                    if budget.left < 0:
                        raise
                    unknown = _Unknown(str(error))
            if node.op == "Gather" and isinstance(unknown, _Unknown) and fill is None:
                return [self._like(node, arguments, unknown, budget)]
            unknown = _Unknown(unknown.why, fill)
        else:
            if not all(name in self.fixed for name in node.inputs if name):
                self.unknown_ops.add(node.op)
            return [self._like(node, arguments, unknown, budget)] * max(1, len(node.outputs))
        return [unknown] * max(1, len(node.outputs))

    def _like(self, node, arguments, unknown, budget):
        """New cells of the shape that the operation gives, where that is known."""
        shapes = [() if a is None else getattr(a, "shape", None) for a in arguments]
        try:
            if None in shapes or not shapes:
                return unknown or _Unknown(node.op)
            if node.op == "Gather":
                axis = node.attributes.get("axis", 0) % len(shapes[0])
                shape = (*shapes[0][:axis], *shapes[1], *shapes[0][axis + 1:])
            elif node.op in _ARITHMETIC and not node.op.startswith("Reduce"):
                shape = np.broadcast_shapes(*shapes)
            elif node.op in _SHAPES or node.op.startswith("Reduce"):
                shape = _SHAPES.get(node.op, _reduced_shape)(node.attributes, *shapes)
            else:
                return unknown or _Unknown(node.op)
        except (ValueError, IndexError, TypeError, ZeroDivisionError, AttributeError):
            return _Unknown(node.op)
        budget.pay(shape)
        return self._numbered(shape)

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
    if node.op not in _KEEPING_FILL and node.op != "Concat":
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
