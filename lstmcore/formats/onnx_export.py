"""Modules as ONNX graphs that onnxruntime runs. Needs the package onnx.

Each recurrent layer is one LSTM, GRU or RNN node, its Y brought to (T, B, D·H). What such a node cannot
say, a projection, or what onnxruntime does not run in it, float64, is written as a Scan over the
cell's own equations. T and B stay open. Layout 0 always: onnxruntime refuses 1.

Of a model, its own `__call__` is run on values without numbers, which only its layers take: it
tells which layer reads what, `Step` by step. What a model does between its layers is not
written.

A description of the module and its steps stands in the graph's metadata, and weights and nodes bear
the names of parameters and layers: `lstmcore.load` makes the module from them, and believes them
only if the steps, written again, give the graph that is in the file. So what is written here is
read as long as it is written the same.
"""

import copy
import json
from typing import NamedTuple

import numpy as np

from lstmcore.formats import description, disk, onnx_variants
from lstmcore.formats.description import below
from lstmcore.variants import Variant

try:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
except ImportError:
    raise ImportError("ONNX files need the package onnx: pip install 'lstmcore[onnx]'") from None

OPSET, IR_VERSION = 17, 8           # of 2022: what every onnxruntime since 1.12 reads
ORDER = {"LSTM": [0, 3, 1, 2], "GRU": [1, 0, 2], "RNN": [0]}    # ONNX's gates, as places in ours
RECURRENT = "LSTM", "GRU", "RNN", "Stack"
POINTWISE = {"Tanh": "Tanh", "Sigmoid": "Sigmoid", "ReLU": "Relu", "Dropout": "Identity"}
POOLS = "LastStep", "MeanOverTime", "MaxOverTime"


class Step(NamedTuple):
    """One layer of a model at work; its result is the value of the number of the step, from 1."""

    layer: str                          # its place in the model, "" for a model of this layer alone
    said: dict                          # its description
    x: int                              # the value that it reads; 0 is the model's input
    lengths: bool = False               # whether the lengths of the sequences are given to it
    embedding: "str | None" = None      # the place of the table that it looks x up in


def export(module, path, *, state=False, lengths=False, tokens=False):
    """Write a module as an ONNX graph.

    Inputs of the graph: x (T, B, I), or (B, T, I) with batch_first, or what else the first layer
    reads; with `state`, h0 (L·D, B, P) and c0 (L·D, B, H); with `lengths`, lengths (B,) int32;
    with `tokens`, a recurrent layer that reads x reads token ids (T, B) as rows of zeros and a one.
    Outputs: y, of a recurrent layer (T, B, D·P), h_n, and c_n of an LSTM. The states of the n-th
    recurrent layer of several have _n at the end of their names; with the last_step of a Stack, y
    is (B, D·P).

    >>> import os, tempfile
    >>> from lstmcore import LSTM
    >>> export(LSTM(3, 5, seed=0), os.path.join(tempfile.mkdtemp(), "m.onnx"), lengths=True)
    """
    model = build(module.describe(), steps(module, lengths), module.parameters(),
                  state=state, lengths=lengths, tokens=tokens)
    onnx.checker.check_model(model)
    with disk.written(path) as file:
        file.write(model.SerializeToString())


def write_module(path, module, **options):
    """`export`, as every format calls it."""
    export(module, path, **options)


def build(said, steps, arrays, *, state, lengths, tokens):
    """The ModelProto that `export` writes."""
    graph = _Graph(lengths)
    arrays = {name: np.asarray(a) for name, a in arrays.items()}
    found = [_parts(step, arrays) if step.said["class"] in RECURRENT else [] for step in steps]
    count, n = sum(map(len, found)), 0
    values = [_input(graph, steps, found[0], arrays, tokens)]
    if lengths:
        graph.inputs.append(helper.make_tensor_value_info("lengths", TensorProto.INT32, ["B"]))
    for step, parts in zip(steps, found):
        x = values[step.x]
        if parts:
            suffixes = [f"_{n + k}" if count > 1 else "" for k in range(len(parts))]
            n += len(parts)
            values.append(_recurrent(graph, x, step, parts, arrays, state, suffixes))
        else:
            values.append(_plain(graph, x, step, below_or_all(step.layer, arrays)))
    y = values[-1]
    graph.output("y", y.name, y.dtype, y.axes, y.width)
    graph.outputs.insert(0, graph.outputs.pop())        # y first
    return graph.model({description.LAYER: json.dumps({
        "version": description.VERSION, **said, "steps": [list(step) for step in steps],
        "graph": {"state": state, "lengths": lengths, "tokens": tokens}})})


def below_or_all(prefix, arrays):
    """The arrays of the layer in that place of a model."""
    return below(prefix, arrays) if prefix else arrays


# ---- from a model to steps ----------------------------------------------------------------------


def steps(module, lengths=False):
    """The `Step`s of a call of the module."""
    said = module.describe()
    if said["class"] in RECURRENT:
        return [Step("", said, 0, lengths)]
    trace, x, lengths = [], _Value(0), _Value(-1) if lengths else None
    try:
        y = _twin(module, "", trace)(x) if lengths is None else \
            _twin(module, "", trace)(x, lengths=lengths)
    except (TypeError, AttributeError, IndexError, KeyError) as error:
        raise ValueError(f"{said['class']} cannot be written to ONNX: between its layers it does "
                         f"what no layer does ({error})") from None
    y = y[0] if isinstance(y, tuple) else y
    if not isinstance(y, _Value) or y.number != len(trace) or not trace:
        raise ValueError(f"{said['class']} cannot be written to ONNX: what it returns is not what "
                         "its last layer gives")
    return trace


class _Value:
    """What a layer reads or gives; it has no numbers, so nothing else can be done with it."""

    def __init__(self, number):
        self.number = number


class _Leaf:
    """A layer that writes down by what it is called."""

    def __init__(self, module, place, trace):
        self.module, self.place, self.trace = module, place, trace

    def __getattr__(self, name):
        return getattr(self.module, name)

    def __call__(self, x, state=None, lengths=None, *, embedding=None):
        said = self.module.describe()
        if not isinstance(x, _Value) or x.number < 0:
            raise TypeError(f"{self.place} reads what no layer gives")
        if state is not None:
            if not isinstance(state, _Value) or state.number != -1 or lengths is not None:
                raise TypeError(f"{self.place} is given a state")
            lengths = state                     # a pool's second argument
        table = None if embedding is None else embedding.place
        self.trace.append(Step(self.place, said, x.number, lengths is not None, table))
        y = _Value(len(self.trace))
        return (y, _Value(-2)) if said["class"] in RECURRENT else y


def _twin(module, place, trace):
    """A copy of the module whose layers write down their calls."""
    known = {*RECURRENT, *POINTWISE, *POOLS, "Linear", "Embedding"}
    if module.describe()["class"] in known:
        return _Leaf(module, place, trace)
    places = {id(child): name for name, child in module._children()}

    def replaced(value):
        if id(value) in places:
            return _twin(value, f"{place}.{places[id(value)]}".lstrip("."), trace)
        return type(value)(map(replaced, value)) if type(value) in (list, tuple) else value
    twin = copy.copy(module)
    vars(twin).update({name: replaced(value) for name, value in vars(module).items()})
    twin.training = False
    return twin


# ---- from steps to nodes ------------------------------------------------------------------------


class _Known(NamedTuple):
    """A value of the graph: its name, its axes before the last one, which has `width` numbers."""

    name: str
    dtype: np.dtype
    axes: "list | None"
    width: "int | None"


class _Part(NamedTuple):
    """One LSTM, GRU or RNN of all its layers."""

    layers: list                # of description.Layer
    reverse: bool
    place: str                  # of its parameters: "layers.0." in a Stack

    @property
    def cells(self):
        return [layer.directions for layer in self.layers]

    @property
    def dtype(self):
        return self.cells[0][0]["weight_hh"].dtype

    @property
    def directions(self):
        return len(self.cells[0])

    @property
    def option(self):
        """The nonlinearity of an RNN; whether the reset gate of a GRU comes after the product; the variant
        of an LSTM."""
        layer = self.layers[0]
        return {"LSTM": Variant(**{name: layer.variant[name] for name in description.COMPUTED
                                   if name in layer.variant}),
                "GRU": layer.reset_after, "RNN": layer.nonlinearity}[layer.kind]

    @property
    def widths(self):
        """The widths of h and c."""
        return self.layers[0].output_size, self.layers[0].hidden_size


def _parts(step, arrays):
    place = f"{step.layer}." if step.layer else ""
    is_stack = step.said["class"] == "Stack"
    return [_Part(layers, reverse, place + f"layers.{n}." * is_stack)
            for n, (_, layers, reverse) in enumerate(description.parts(
                step.said, below_or_all(step.layer, arrays)))]


def _input(graph, steps, parts, arrays, tokens):
    """The input x of the graph, as the first layer reads it: sequences, if any layer reads such."""
    step = steps[0]
    kind, arrays = step.said["class"], below_or_all(step.layer, arrays)
    over_time = [other.said for other in steps if other.said["class"] in (*RECURRENT, *POOLS)]
    axes = ["N"]
    if over_time:
        axes = ["B", "T"] if over_time[0]["batch_first"] else ["T", "B"]
    if kind == "Embedding" or step.embedding is not None or (parts and tokens):
        dtype, width = np.dtype("int64"), None
    else:
        weight = parts[0].cells[0][0]["weight_ih"] if parts else arrays.get("weight")
        dtype = np.dtype("float32") if weight is None else weight.dtype
        width = "I" if weight is None else weight.shape[1]
    return _Known(graph.input("x", dtype, axes, width), dtype, axes, width)


def _plain(graph, x, step, arrays):
    """A layer that is not recurrent."""
    kind, name = step.said["class"], f"{step.layer}." if step.layer else ""
    if kind in POINTWISE:
        return x._replace(name=graph.add(POINTWISE[kind], x.name))
    if kind in POOLS:
        return _pool(graph, x, step)
    weight = arrays["weight"]
    if kind == "Embedding":
        return _Known(graph.add("Gather", graph.constant(weight, name + "weight"), x.name, axis=0),
                      weight.dtype, x.axes, weight.shape[1])
    y = graph.add("MatMul", x.name, graph.add(
        "Transpose", graph.constant(weight, name + "weight"), perm=[1, 0]))
    if "bias" in arrays:
        y = graph.add("Add", y, graph.constant(arrays["bias"], name + "bias"))
    return _Known(y, weight.dtype, x.axes, len(weight))


def _pool(graph, x, step):
    """(T, B, W) -> (B, W), over the steps that are really there."""
    kind, said = step.said["class"], step.said
    y = graph.add("Transpose", x.name, perm=[1, 0, 2]) if said["batch_first"] else x.name
    T = graph.add("Shape", y, start=0, end=1)
    if step.lengths:
        lengths = graph.add("Cast", "lengths", to=TensorProto.INT64)
    else:
        lengths = graph.add("Expand", T, graph.add("Shape", y, start=1, end=2))
    zero, one = (graph.constant(np.int64(n)) for n in (0, 1))
    t = graph.add("Unsqueeze", graph.add("Range", zero, graph.add("Squeeze", T), one),
                  graph.ints(1, 2))                                             # (T, 1, 1)
    nothing = graph.constant(np.zeros((), x.dtype))
    ends = graph.add("Unsqueeze", lengths, graph.ints(1))                       # (B, 1)

    def total(mask, y):
        return graph.add("ReduceSum", graph.add("Where", mask, y, nothing), graph.ints(0),
                         keepdims=0)
    there = graph.add("Less", t, ends)
    if kind == "LastStep":
        last = graph.add("Equal", t, graph.add("Sub", ends, one))
        if not said["bidirectional"]:
            found = total(last, y)
        else:
            forward, backward = graph.add("Split", y, outputs=2, axis=2)
            first = graph.add("And", graph.add("Equal", t, zero), there)
            found = graph.add("Concat", total(last, forward), total(first, backward), axis=1)
    elif kind == "MeanOverTime":
        count = graph.add("Cast", graph.add("Max", ends, one),
                          to=helper.np_dtype_to_tensor_dtype(x.dtype))
        found = graph.add("Div", total(there, y), count)
    else:
        least = graph.constant(np.array(-np.inf, x.dtype))
        most = graph.add("ReduceMax", graph.add("Where", there, y, least), axes=[0], keepdims=0)
        found = graph.add("Where", graph.add("Greater", ends, zero), most, nothing)
    return _Known(found, x.dtype, ["B"], x.width)


def _recurrent(graph, x, step, parts, arrays, state, suffixes):
    """An LSTM, GRU, RNN or Stack: its y. Its final states become outputs of the graph."""
    said, name = step.said, x.name
    if step.embedding is not None:
        name = graph.add("Gather", graph.constant(arrays[f"{step.embedding}.weight"],
                                                  f"{step.embedding}.weight"), name, axis=0)
    elif x.dtype == np.int64:
        rows = graph.constant(np.array([0, 1], parts[0].dtype))
        name = graph.add("OneHot", name, graph.constant(
            np.int64(parts[0].cells[0][0]["weight_ih"].shape[1])), rows)
    lengths, graph.lengths = graph.lengths, step.lengths
    y = graph.add("Transpose", name, perm=[1, 0, 2]) if said["batch_first"] else name
    for part, suffix in zip(parts, suffixes):
        y, h = _part(graph, y, part, state, suffix)
    graph.lengths = lengths
    width, axes = part.directions * part.widths[0], ["T", "B"]
    if said.get("last_step"):
        y = graph.add("Reshape", graph.add("Transpose", h, perm=[1, 0, 2]), graph.ints(0, width))
        axes = ["B"]
    elif said["batch_first"]:
        y, axes = graph.add("Transpose", y, perm=[1, 0, 2]), ["B", "T"]
    return _Known(y, part.dtype, axes, width)


def _part(graph, x, part, state, suffix):
    """One LSTM, GRU or RNN of all its layers: its y, and the h (D, B, P) that its last layer ends with.

    Its final states become outputs of the graph.
    """
    kind, D, count = part.layers[0].kind, part.directions, len(part.layers)
    if part.reverse and D == 2:
        raise ValueError("a bidirectional layer that is read from the end is not written to ONNX")
    letters = "hc"[:1 + (kind == "LSTM")]
    widths, finals = part.widths, []
    given = [graph.input(f"{letter}0{suffix}", part.dtype, [D * count, "B"], width)
             for letter, width in zip(letters, widths)] if state else []
    plain = part.dtype == np.float32 and widths[0] == widths[-1]
    for n, cells in enumerate(part.cells):
        if "weight_layernorm" in cells[0]:
            raise ValueError("ONNX has no LSTM with layer normalization")
        initial = [graph.add("Slice", s, graph.ints(n * D), graph.ints((n + 1) * D), graph.ints(0))
                   for s in given]
        run = _node if plain and "weight_hr" not in cells[0] else _scans
        x, *last = run(graph, kind, x, cells, initial, part.reverse,
                       part.option, f"{part.place}{{}}l{n}")
        if initial and graph.lengths:       # onnxruntime forgets the state of an empty sequence
            empty = graph.add("Unsqueeze", graph.add(
                "Equal", "lengths", graph.constant(np.zeros(1, "int32"))), graph.ints(1))
            last = [graph.add("Where", empty, first, s) for first, s in zip(initial, last)]
        finals.append(last)
    for letter, width, states in zip(letters, widths, zip(*finals)):
        graph.output(f"{letter}_n{suffix}", graph.add("Concat", *states, axis=0), part.dtype,
                     [D * count, "B"], width)
    return x, last[0]


def _node(graph, kind, x, cells, initial, reverse, option, name):
    """One layer as one LSTM, GRU or RNN node -> y (T, B, D·H), and the final states (D, B, H).

    name : of the layer; with "weight_ih_" in the place of its {}, of a parameter.
    """
    order, D = ORDER[kind], len(cells)
    H = cells[0]["weight_hh"].shape[1]

    def gates(weight, most=None):
        blocks = np.stack([cell[weight][:most] for cell in cells]).reshape(D, len(order), H, -1)
        return blocks[:, order].reshape(D, len(order) * H, -1)

    inputs = [x, graph.constant(gates("weight_ih")), graph.constant(gates("weight_hh")), "",
              "lengths" if graph.lengths else "", *initial] + [""] * (2 - len(initial))
    if "bias" in cells[0]:
        b = gates("bias", len(order) * H)[:, :, 0]
        second = np.zeros_like(b)
        if kind == "GRU" and option:                    # b_hn, which the reset gate multiplies
            second[:, -H:] = [cell["bias"][-H:] for cell in cells]
        inputs[3] = graph.constant(np.concatenate([b, second], axis=1))
    if "weight_peephole" in cells[0]:
        inputs.append(graph.constant(np.stack([cell["weight_peephole"][[0, 2, 1]].ravel()
                                               for cell in cells])))
    while not inputs[-1]:
        inputs.pop()
    options = {"activations": ["Relu"] * D} if option == "relu" else {}
    if kind == "GRU" and option:
        options["linear_before_reset"] = 1
    if kind == "LSTM":
        options = onnx_variants.written(option, D)
    direction = "bidirectional" if D == 2 else "reverse" if reverse else "forward"
    y, *last = graph.add(kind, *inputs, outputs=3 if kind == "LSTM" else 2, hidden_size=H,
                         direction=direction, name=name.format(""), **options)
    y = graph.add("Transpose", y, perm=[0, 2, 1, 3])
    return graph.add("Reshape", y, graph.ints(0, 0, D * H)), *last


def _scans(graph, kind, x, cells, initial, reverse, option, name):
    """One layer as a Scan per direction, like `_node`."""
    if kind == "LSTM" and not option.is_usual():
        raise ValueError("an LSTM with other activations, clip or coupled gates is written to ONNX in "
                         f"float32 alone, got {cells[0]['weight_hh'].dtype}")
    found = []
    for d, cell in enumerate(cells):
        first = [graph.add("Gather", s, graph.constant(np.int64(d)), axis=0) for s in initial]
        weights = {weight: graph.constant(a if weight == "weight_peephole" else a.T,
                                          name.format(weight + "_") + ("", "_reverse")[d])
                   for weight, a in cell.items()}
        y, *last = _scan(graph, kind, x, weights, cell["weight_hh"], first, reverse or d == 1,
                         option)
        found.append([y] + [graph.add("Unsqueeze", s, graph.ints(0)) for s in last])
    y, *last = zip(*found)
    if len(cells) == 1:
        return y[0], *(s[0] for s in last)
    return graph.add("Concat", *y, axis=2), *(graph.add("Concat", *s, axis=0) for s in last)


def _scan(graph, kind, x, weights, weight_hh, initial, reverse, option):
    """One layer in one direction: y (T, B, P), h_n (B, P), and c_n (B, H) of an LSTM.

    weights : the names of the constants that hold them, matrices transposed.
    """
    dtype, H = weight_hh.dtype, len(weight_hh) // len(ORDER[kind])
    P, letters = weight_hh.shape[1], "hc"[:1 + (kind == "LSTM")]
    if not initial:
        B = graph.add("Shape", x, start=1, end=2)
        initial = [graph.add("Expand", graph.constant(np.zeros((1, width), dtype)),
                             graph.add("Concat", B, graph.ints(width), axis=0))
                   for width in (P, H)[:len(letters)]]
    a = graph.add("MatMul", x, weights["weight_ih"])
    bias = weights.get("bias")
    if kind == "GRU" and option and bias:               # (4H,): its last, b_hn, is added in the step
        bias, weights["b_hn"] = graph.add("Split", bias, graph.ints(3 * H, H), outputs=2, axis=0)
    if bias:
        a = graph.add("Add", a, bias)
    scanned = [a]
    if graph.lengths:
        T = graph.add("Squeeze", graph.add("Cast", graph.add("Shape", x, start=0, end=1),
                                           to=TensorProto.INT32), graph.ints(0))
        zero, one = (graph.constant(np.int32(n)) for n in (0, 1))
        scanned.append(graph.add("Range", zero, T, one))
    body = graph.inner()
    previous, steps = [f"{letter}_prev" for letter in letters], ["a", "t"][:len(scanned)]
    if kind == "GRU":
        new = _gru_step(body, graph, weights, H, option)
    else:
        step = _lstm_step if kind == "LSTM" else _rnn_step
        rec = body.add("MatMul", "h_prev", weights["weight_hh"])
        new = step(body, graph, body.add("Add", "a", rec), weights, H, option)
    y = new[0]
    if graph.lengths:
        alive = body.add("Unsqueeze", body.add("Less", "t", "lengths"), graph.ints(1))
        new = [body.add("Where", alive, s, prev) for s, prev in zip(new, previous)]
        y = body.add("Where", alive, y, graph.constant(np.zeros((), dtype)))
    kinds = [helper.np_dtype_to_tensor_dtype(dtype)] * (len(letters) + 1) + [TensorProto.INT32]
    inputs, outputs = previous + steps, [body.add("Identity", s) for s in (*new, y)]
    made = helper.make_graph(
        body.nodes, "step",
        [helper.make_tensor_value_info(name, k, None) for name, k in zip(inputs, kinds)],
        [helper.make_tensor_value_info(name, kinds[0], None) for name in outputs])
    *last, y = graph.add("Scan", *initial, *scanned, outputs=len(letters) + 1, body=made,
                         num_scan_inputs=len(scanned),
                         scan_input_directions=[int(reverse)] * len(scanned),
                         scan_output_directions=[int(reverse)])
    return y, *last


def _lstm_step(body, graph, a, weights, H, nonlinearity):
    """h_t and c_t from a_t: the equations of `lstmcore.reference`."""
    a_i, a_f, a_g, a_o = body.add("Split", a, graph.ints(H, H, H, H), outputs=4, axis=1)
    c_prev, p = "c_prev", None
    if "weight_peephole" in weights:                    # (3, H) -> three times (1, H)
        p = graph.add("Split", weights["weight_peephole"], graph.ints(1, 1, 1), outputs=3, axis=0)

    def peep(a, n, c):
        return body.add("Add", a, body.add("Mul", p[n], c)) if p else a

    i = body.add("Sigmoid", peep(a_i, 0, c_prev))
    f = body.add("Sigmoid", peep(a_f, 1, c_prev))
    c = body.add("Add", body.add("Mul", f, c_prev), body.add("Mul", i, body.add("Tanh", a_g)))
    o = body.add("Sigmoid", peep(a_o, 2, c))
    h = body.add("Mul", o, body.add("Tanh", c))
    if "weight_hr" in weights:
        h = body.add("MatMul", h, weights["weight_hr"])
    return [h, c]


def _gru_step(body, graph, weights, H, reset_after):
    """h_t from a_t, what x feeds, and h_{t-1}."""
    W_hrz, W_hn = graph.add("Split", weights["weight_hh"], graph.ints(2 * H, H), outputs=2, axis=1)
    a_rz, a_n = body.add("Split", "a", graph.ints(2 * H, H), outputs=2, axis=1)
    rz = body.add("Sigmoid", body.add("Add", a_rz, body.add("MatMul", "h_prev", W_hrz)))
    r, z = body.add("Split", rz, graph.ints(H, H), outputs=2, axis=1)
    if reset_after:
        q = body.add("MatMul", "h_prev", W_hn)
        q = body.add("Add", q, weights["b_hn"]) if "b_hn" in weights else q
        q = body.add("Mul", r, q)
    else:
        q = body.add("MatMul", body.add("Mul", r, "h_prev"), W_hn)
    n = body.add("Tanh", body.add("Add", a_n, q))
    return [body.add("Add", n, body.add("Mul", z, body.add("Sub", "h_prev", n)))]


def _rnn_step(body, graph, a, weights, H, nonlinearity):
    return [body.add({"tanh": "Tanh", "relu": "Relu"}[nonlinearity], a)]


class _Graph:
    """An ONNX graph under construction; a value that is given no name gets a number."""

    def __init__(self, lengths, names=None):
        self.lengths = lengths          # whether the layer that is being written has them
        self.nodes, self.inputs, self.outputs, self.constants = [], [], [], []
        self.names = [0] if names is None else names

    def inner(self):
        """A graph inside this one, whose values are named apart from this one's."""
        return _Graph(self.lengths, self.names)

    def add(self, op, *inputs, outputs=1, name=None, **attributes):
        """A node -> the name of its output, or a list of names."""
        names = [self._name() for _ in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names,
                                           name=name or f"{op}_{names[0]}", **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, array, name=None):
        """An initializer -> its name."""
        if name and any(made.name == name for made in self.constants):
            return name                 # of a layer that is called twice
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array).reshape(
            np.shape(array)), name or self._name()))
        return self.constants[-1].name

    def ints(self, *values):
        """An initializer of int64, 1-D."""
        return self.constant(np.array(values, "int64"))

    def input(self, name, dtype, axes, width=None):
        """A graph input (*axes, width), or (*axes); without axes of any shape -> its name."""
        self.inputs.append(_info(name, dtype, axes, width))
        return name

    def output(self, name, value, dtype, axes, width):
        """Give a value to the outside as `name` (*axes, width)."""
        self.nodes.append(helper.make_node("Identity", [value], [name], name=f"Identity_{name}"))
        self.outputs.append(_info(name, dtype, axes, width))

    def model(self, metadata):
        """The graph as a ModelProto."""
        model = helper.make_model(
            helper.make_graph(self.nodes, "lstmcore", self.inputs, self.outputs,
                              self.constants),
            opset_imports=[helper.make_opsetid("", OPSET)], producer_name="lstmcore")
        model.ir_version = IR_VERSION
        helper.set_model_props(model, metadata)
        return model

    def _name(self):
        self.names[0] += 1
        return f"v{self.names[0]}"


def _info(name, dtype, axes, width):
    shape = None if axes is None else [*axes, *[width] * (width is not None)]
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), shape)
