"""LSTM, RNN and Stack as ONNX graphs that onnxruntime runs. Needs the package onnx.

Each layer is one LSTM or RNN node, its Y brought to (T, B, D·H). What such a node cannot say, a
projection, or what onnxruntime does not run in it, float64, is written as a Scan over the cell's
own equations. T and B stay open. Layout 0 always: onnxruntime refuses 1.

A description of the module stands in the model's metadata, and weights and nodes bear the names of
parameters and layers: `lstmcore.load` makes the module from them, and believes them only if that
module, written again, gives the graph that is in the file. So what is written here is read as long
as it is written the same.
"""

import json

import numpy as np

from lstmcore.formats import assemble

try:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
except ImportError:
    raise ImportError("ONNX files need the package onnx: pip install 'lstmcore[onnx]'") from None

OPSET, IR_VERSION = 17, 8           # of 2022: what every onnxruntime since 1.12 reads
ORDER = {"LSTM": [0, 3, 1, 2], "RNN": [0]}              # ONNX's gates, as places in ours
KEY = "lstmcore.layer"


def export(module, path, *, state=False, lengths=False):
    """Write the module as an ONNX graph.

    Inputs of the graph: x (T, B, I), or (B, T, I) with batch_first; with `state`, h0 (L·D, B, P)
    and c0 (L·D, B, H); with `lengths`, lengths (B,) int32. Outputs: y (T, B, D·P), h_n, and c_n of
    an LSTM. The states of the n-th layer of a Stack have _n at the end of their names; with its
    last_step, y is (B, D·P).

    >>> import os, tempfile
    >>> from lstmcore import LSTM
    >>> export(LSTM(3, 5, seed=0), os.path.join(tempfile.mkdtemp(), "m.onnx"), lengths=True)
    """
    model = build(module, state, lengths)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def build(module, state, lengths):
    """The ModelProto that `export` writes."""
    parts = assemble.parts(module)
    is_stack = isinstance(module, assemble.Stack)
    graph = _Graph(lengths)
    x = graph.input("x", parts[0][0].dtype, ["B", "T"] if module.batch_first else ["T", "B"],
                    parts[0][0].input_size)
    if lengths:
        graph.inputs.append(helper.make_tensor_value_info("lengths", TensorProto.INT32, ["B"]))
    y = graph.add("Transpose", x, perm=[1, 0, 2]) if module.batch_first else x
    for n, (part, reverse) in enumerate(parts):
        y, h = _part(graph, y, part, reverse, state, f"_{n}" if len(parts) > 1 else "",
                     f"layers.{n}." if is_stack else "")
    width, axes = part.directions * _widths(part)[0], ["T", "B"]
    if is_stack and module.last_step:
        y = graph.add("Reshape", graph.add("Transpose", h, perm=[1, 0, 2]), graph.ints(0, width))
        axes = ["B"]
    elif module.batch_first:
        y, axes = graph.add("Transpose", y, perm=[1, 0, 2]), ["B", "T"]
    graph.output("y", y, part.dtype, axes, width)
    graph.outputs.insert(0, graph.outputs.pop())        # y first
    return graph.model({KEY: json.dumps(assemble.describe(module))})


def _part(graph, x, part, reverse, state, suffix, prefix):
    """One LSTM or RNN of all its layers: its y, and the h (D, B, P) that its last layer ends with.

    Its final states become outputs of the graph.
    """
    kind = "LSTM" if isinstance(part, assemble.LSTM) else "RNN"
    if reverse and part.bidirectional:
        raise ValueError("a bidirectional layer that is read from the end is not written to ONNX")
    letters, D = "hc"[:1 + (kind == "LSTM")], part.directions
    widths, finals = _widths(part), []
    given = [graph.input(f"{letter}0{suffix}", part.dtype, [D * part.num_layers, "B"], width)
             for letter, width in zip(letters, widths)] if state else []
    plain = part.dtype == np.float32 and widths[0] == widths[-1]
    for n, cells in enumerate(assemble.cells(part)):
        initial = [graph.add("Slice", s, graph.ints(n * D), graph.ints((n + 1) * D), graph.ints(0))
                   for s in given]
        run = _node if plain and "weight_hr" not in cells[0] else _scans
        x, *last = run(graph, kind, x, cells, initial, reverse,
                       getattr(part, "nonlinearity", None), f"{prefix}{{}}l{n}")
        if initial and graph.lengths:       # onnxruntime forgets the state of an empty sequence
            empty = graph.add("Unsqueeze", graph.add(
                "Equal", "lengths", graph.constant(np.zeros(1, "int32"))), graph.ints(1))
            last = [graph.add("Where", empty, first, s) for first, s in zip(initial, last)]
        finals.append(last)
    for letter, width, states in zip(letters, widths, zip(*finals)):
        graph.output(f"{letter}_n{suffix}", graph.add("Concat", *states, axis=0), part.dtype,
                     [D * part.num_layers, "B"], width)
    return x, last[0]


def _widths(part):
    """The widths of h and c."""
    return part.parameters()["weight_hh_l0"].shape[1], part.hidden_size


def _node(graph, kind, x, cells, initial, reverse, nonlinearity, name):
    """One layer as one LSTM or RNN node -> y (T, B, D·H), and the final states (D, B, H).

    name : of the layer; with "weight_ih_" in the place of its {}, of a parameter.
    """
    order, D = ORDER[kind], len(cells)
    H = cells[0]["weight_hh"].shape[1]

    def gates(weight):
        blocks = np.stack([cell[weight] for cell in cells]).reshape(D, len(order), H, -1)
        return blocks[:, order].reshape(D, len(order) * H, -1)

    inputs = [x, graph.constant(gates("weight_ih")), graph.constant(gates("weight_hh")), "",
              "lengths" if graph.lengths else "", *initial] + [""] * (2 - len(initial))
    if "bias" in cells[0]:
        b = gates("bias")[:, :, 0]
        inputs[3] = graph.constant(np.concatenate([b, np.zeros_like(b)], axis=1))
    if "weight_peephole" in cells[0]:
        inputs.append(graph.constant(np.stack([cell["weight_peephole"][[0, 2, 1]].ravel()
                                               for cell in cells])))
    while not inputs[-1]:
        inputs.pop()
    options = {} if nonlinearity in (None, "tanh") else {"activations": ["Relu"] * D}
    direction = "bidirectional" if D == 2 else "reverse" if reverse else "forward"
    y, *last = graph.add(kind, *inputs, outputs=3 if kind == "LSTM" else 2, hidden_size=H,
                         direction=direction, name=name.format(""), **options)
    y = graph.add("Transpose", y, perm=[0, 2, 1, 3])
    return graph.add("Reshape", y, graph.ints(0, 0, D * H)), *last


def _scans(graph, kind, x, cells, initial, reverse, nonlinearity, name):
    """One layer as a Scan per direction, like `_node`."""
    found = []
    for d, cell in enumerate(cells):
        first = [graph.add("Gather", s, graph.constant(np.int64(d)), axis=0) for s in initial]
        weights = {weight: graph.constant(a if weight == "weight_peephole" else a.T,
                                          name.format(weight + "_") + ("", "_reverse")[d])
                   for weight, a in cell.items()}
        y, *last = _scan(graph, kind, x, weights, cell["weight_hh"], first, reverse or d == 1,
                         nonlinearity)
        found.append([y] + [graph.add("Unsqueeze", s, graph.ints(0)) for s in last])
    y, *last = zip(*found)
    if len(cells) == 1:
        return y[0], *(s[0] for s in last)
    return graph.add("Concat", *y, axis=2), *(graph.add("Concat", *s, axis=0) for s in last)


def _scan(graph, kind, x, weights, weight_hh, initial, reverse, nonlinearity):
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
    if "bias" in weights:
        a = graph.add("Add", a, weights["bias"])
    scanned = [a]
    if graph.lengths:
        T = graph.add("Squeeze", graph.add("Cast", graph.add("Shape", x, start=0, end=1),
                                           to=TensorProto.INT32), graph.ints(0))
        zero, one = (graph.constant(np.int32(n)) for n in (0, 1))
        scanned.append(graph.add("Range", zero, T, one))
    body = graph.inner()
    previous, steps = [f"{letter}_prev" for letter in letters], ["a", "t"][:len(scanned)]
    step = _lstm_step if kind == "LSTM" else _rnn_step
    rec = body.add("MatMul", "h_prev", weights["weight_hh"])
    new = step(body, graph, body.add("Add", "a", rec), weights, H, nonlinearity)
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


def _rnn_step(body, graph, a, weights, H, nonlinearity):
    return [body.add({"tanh": "Tanh", "relu": "Relu"}[nonlinearity], a)]


class _Graph:
    """An ONNX graph under construction; a value that is given no name gets a number."""

    def __init__(self, lengths, names=None):
        self.lengths = lengths
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
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array).reshape(
            np.shape(array)), name or self._name()))
        return self.constants[-1].name

    def ints(self, *values):
        """An initializer of int64, 1-D."""
        return self.constant(np.array(values, "int64"))

    def input(self, name, dtype, axes, width):
        """A graph input (*axes, width) -> its name."""
        self.inputs.append(helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(dtype), [*axes, width]))
        return name

    def output(self, name, value, dtype, axes, width):
        """Give a value to the outside as `name` (*axes, width)."""
        self.nodes.append(helper.make_node("Identity", [value], [name], name=f"Identity_{name}"))
        self.outputs.append(helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(dtype), [*axes, width]))

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
