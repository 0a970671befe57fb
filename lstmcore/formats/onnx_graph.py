"""ONNX graphs as rows of nodes, read within bounds and computed. Needs the package onnx.

`Graph.run` computes a graph of LSTM, RNN and the operations of onnx_operators.py. It follows ONNX
Runtime where ONNX is silent: a sequence of length 0 ends in a state of zeros, and Y is 0 past a
sequence's end.

ONNX orders the gates i, o, f, c and the peepholes i, o, f; a node's W (D, 4H, I), R (D, 4H, H) and
P (D, 3H) hold both directions, B (D, 8H) two biases in a row. Y is (T, D, B, H).
"""

import math
import os
import stat

import numpy as np

from lstmcore.formats import description, onnx_variants, disk
from lstmcore.formats.safetensors import widened
from lstmcore.precision import Quantized

try:
    import onnx
    from google.protobuf.message import DecodeError
    from onnx import TensorProto
except ImportError:
    raise ImportError("ONNX files need the package onnx: pip install 'lstmcore[onnx]'") from None

from lstmcore.formats.onnx_operators import DTYPES, PLUMBING, SHAPES, plumb, string
from lstmcore.variants import Variant

GATES = {"LSTM": [0, 2, 3, 1], "GRU": [1, 0, 2], "RNN": [0]}    # ours, as places in ONNX's order
DEFAULTS = {"LSTM": ["sigmoid", "tanh", "tanh"], "GRU": ["sigmoid", "tanh"], "RNN": ["tanh"]}
QUANTIZED = "com.microsoft.DynamicQuantizeLSTM"
_FIELDS = {TensorProto.FLOAT: "float_data", TensorProto.DOUBLE: "double_data",
           TensorProto.INT64: "int64_data", TensorProto.UINT32: "uint64_data",
           TensorProto.UINT64: "uint64_data"}


class Graph:
    """An ONNX graph of LSTM, GRU, RNN and plumbing, computed by lstmcore's kernels.

    Parameters
    ----------
    model : path, or onnx.ModelProto
    budget : how many numbers one run may produce in all, plumbing included; by default 2000 for
        each that the graph holds or is given, and a million
    """

    def __init__(self, model, budget=None, path=None):
        if not isinstance(model, onnx.ModelProto):
            path, model = model, parsed(model)
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
        budget = Budget(self.budget or (1 << 20) + 2000 * sum(a.size for a in values.values()))
        for node in chosen_nodes(self.nodes, lambda name: _given(values, name)):
            arguments = [_given(values, name) for name in node.inputs]
            if node.quantized:
                raise ValueError(f"{node.name} is the operation {QUANTIZED}, which rounds x to "
                                 "int8: load gives its layer in float32")
            if node.op in GATES:
                try:
                    results = _run_recurrent(node, budget, *arguments)
                except (TypeError, IndexError, AttributeError) as error:
                    raise ValueError(f"{node.name} ({node.op}) of the ONNX graph: "
                                     f"{error}") from None
            else:
                results = plumb(node, arguments, budget)
            values.update(zip(node.outputs, results))
        return {name: _given(values, name) for name in self.outputs}


def parsed(path):
    model = onnx.ModelProto()
    data = disk.read(path)
    try:
        model.ParseFromString(data)
    except (DecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not an ONNX model: {error}") from None
    return model


class _Node:
    """One node: its name, op, inputs, outputs and attributes as Python values.

    quantized : of a DynamicQuantizeLSTM of onnxruntime's, whose other inputs are an LSTM's, the
        names of the scale and the zero point of W, and of R
    """

    quantized = ()

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
            attributes = {_text(a.name): given.get(a.ref_attr_name) if a.ref_attr_name else a
                          for a in proto.attribute}
            attributes = {name: a for name, a in attributes.items() if a is not None}
            if function := self.functions.get(key):
                inner = dict(zip(map(_text, function.input), inputs))
                inner.update(dict.fromkeys(map(_text, function.input[len(inputs):]), ""))
                inner.update(zip(map(_text, function.output), outputs))
                defaults = {_text(a.name): a for a in function.attribute_proto}
                found += self.nodes(function.node, inner, {**defaults, **attributes}, depth + 1)
                continue
            op = key[1] if key[0] in ("", "ai.onnx") else ".".join(key)
            node = _Node(_text(proto.name) or f"{key[1]}_{n}", op, inputs, outputs, {})
            if op == QUANTIZED:
                node.op = op = "LSTM"
                node.inputs, node.quantized = inputs[:8], inputs[8:12]
            if op in GATES or op in PLUMBING or op in SHAPES:
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


def chosen_nodes(nodes, value):
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


class Budget:
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
    if kind not in DTYPES:
        raise ValueError(f"the ONNX tensor {name!r:.100} has the data type {kind}: not numbers")
    if min(shape, default=0) < 0 or len(shape) > 32:
        raise ValueError(f"the ONNX tensor {name!r:.100} has the shape {shape}")
    dtype, count = np.dtype("<" + DTYPES[kind]), math.prod(shape)
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
    """The attributes of a recurrent node: (directions, reverse, layout, nonlinearity, reset_after,
    variant).

    What lstmcore does not compute is refused by its name.
    """
    a = dict(node.attributes)
    direction = string(a.pop("direction", b"forward"))
    if direction not in ("forward", "reverse", "bidirectional"):
        raise ValueError(f"{node.name} has direction={direction!r:.40}")
    D = 1 + (direction == "bidirectional")
    variant = onnx_variants.read(node, a, D) if node.op == "LSTM" else {}
    for name in ("clip", "activation_alpha", "activation_beta", "input_forget"):
        # An empty list and input_forget=0 ask for nothing; clip=0 asks for zeros.
        if (value := a.pop(name, None)) or (name == "clip" and value is not None):
            raise ValueError(f"{node.name} asks for {name}={value}, which lstmcore's {node.op} does not have")
    wanted = a.pop("activations", [])
    if not isinstance(wanted, list):
        raise ValueError(f"{node.name} has activations={wanted!r:.40}, not a list of names")
    wanted = [string(s).lower() for s in wanted] or DEFAULTS[node.op] * D
    allowed = [DEFAULTS[node.op] * D] + ([["relu"] * D] if node.op == "RNN" else [])
    if wanted not in allowed:
        raise ValueError(f"{node.name} asks for activations={wanted}, lstmcore has {allowed}")
    layout, reset_after = a.pop("layout", 0), None
    if node.op == "GRU":
        reset_after = a.pop("linear_before_reset", 0) != 0
    a.pop("hidden_size", None), a.pop("output_sequence", None)
    if a or layout not in (0, 1):
        raise ValueError(f"{node.name} asks for {a or {'layout': layout}}, which lstmcore does not "
                         "have")
    return (D, direction == "reverse", layout, wanted[0] if node.op == "RNN" else None,
            reset_after, variant)


def layer_of(node, W, R, B=None, P=None):
    """A recurrent node's weights as a `Layer`, checked against each other."""
    D, reverse, _, nonlinearity, reset_after, variant = _options(node)
    order = GATES[node.op]
    n = len(order)
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
    directions = []
    for d in range(D):
        cell = {"weight_ih": W[d].reshape(n, H, -1)[order].reshape(W[d].shape),
                "weight_hh": R[d].reshape(n, H, H)[order].reshape(R[d].shape)}
        if B is not None:
            pair = B[d].reshape(2, n, H)[:, order].reshape(2, n * H)
            cell["bias"] = description.one_bias(*pair, cell["weight_hh"]) if reset_after \
                else pair.sum(axis=0)
        if P is not None:
            cell["weight_peephole"] = P[d].reshape(3, H)[[0, 2, 1]]
        directions.append(cell)
    return description.Layer(node.name, node.op, directions, nonlinearity, reverse,
                             reset_after=reset_after, variant=variant)


def dequantized(node, q, scale, zero):
    """W or R of a DynamicQuantizeLSTM, (D, I, 4H) integers -> (D, 4H, I) float32.

    scale, zero : (D,), or one for each column, (D, 4H)
    """
    if any(a is None or a.dtype.kind not in kinds or a.shape not in (q.shape[:1], q.shape[::2])
           for a, kinds in ((scale, "f"), (zero, "iu"))) or q.dtype.kind not in "iu" or q.ndim != 3:
        raise ValueError(f"W and R of {node.name} must be integers (D, I, 4H) with constant scales "
                         "and zero points (D,) or (D, 4H)")
    scale, zero = (a.reshape(len(q), -1, 1) for a in (scale, zero))
    return (q.transpose(0, 2, 1).astype("f4") - zero.astype("f4")) * scale.astype("f4")


def in_int8(q, scale, zero):
    """As `dequantized`, as integers within -127..127 and a scale for each row, both (D, 4H, ·); None
    for what is not that."""
    zero = zero.reshape(len(q), -1, 1)
    q = q.transpose(0, 2, 1).astype("i4") - zero.astype("i4")
    scale = np.broadcast_to(scale.astype("f4").reshape(len(q), -1, 1), (*q.shape[:2], 1))
    fit = np.abs(q).max(initial=0) <= 127 and (scale >= 0).all() and (scale < np.inf).all()
    return (q.astype("i1"), scale) if fit else None


def int8_of(layer, lowered):
    """{weight: Quantized} of each direction of a layer, from W and R as `in_int8` gives them."""
    if len(lowered) < 2 or None in lowered.values():
        return None
    order, found = GATES["LSTM"], []
    for d in range(len(layer.directions)):
        cell = {}
        for weight, (q, scale) in zip(("weight_ih", "weight_hh"), lowered.values()):
            q, scale = (a[d].reshape(4, layer.hidden_size, -1)[order].reshape(a[d].shape)
                        for a in (q, scale))
            cell[weight] = Quantized(np.ascontiguousarray(q), np.ascontiguousarray(scale[:, 0]))
        found.append(cell)
    return found


def _run_recurrent(node, budget, X=None, W=None, R=None, B=None, sequence_lens=None,
                   initial_h=None, initial_c=None, P=None):
    """Y, Y_h and, of an LSTM, Y_c, as ONNX lays them out."""
    from lstmcore import functional         # the reader alone needs no kernels

    layer, (_, reverse, layout, *_) = layer_of(node, W, R, B, P), _options(node)
    if X is None or X.ndim != 3 or X.dtype not in (np.float32, np.float64):
        raise ValueError(f"X of {node.name} must be float32 or float64 and have 3 axes")
    states = [None if s is None else np.moveaxis(s, 1, 0) if layout and s.ndim == 3 else s
              for s in (initial_h, initial_c)]
    x = X.swapaxes(0, 1) if layout else X
    D, H = len(layer.directions), layer.hidden_size
    if node.op != "LSTM" and (initial_c is not None or P is not None):
        raise ValueError(f"{node.name} is no LSTM ({node.op}) and has an initial_c or P")
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
            y, last, _ = functional.lstm_forward(
                *weights, c0, **common, peepholes=cell.get("weight_peephole"),
                variant=Variant(**layer.variant) if layer.variant else None)
        elif layer.kind == "GRU":
            y, *last, _ = functional.gru_forward(*weights, reset_after=layer.reset_after, **common)
        else:
            y, *last, _ = functional.rnn_forward(*weights, nonlinearity=layer.nonlinearity, **common)
        if lengths is not None:
            last = [np.where(lengths[:, None] > 0, s, 0).astype(s.dtype) for s in last]
        results.append((y, *last))
    Y, *last = (np.stack(parts, axis=1 if n == 0 else 0) for n, parts in enumerate(zip(*results)))
    if layout:                          # (T, D, B, H) -> (B, T, D, H); (D, B, H) -> (B, D, H)
        return Y.transpose(2, 0, 1, 3), *(s.swapaxes(0, 1) for s in last)
    return Y, *last
