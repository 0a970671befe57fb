"""ONNX nodes, graphs and exports against onnxruntime, with random weights."""

import copy
import itertools
import math
import time

import numpy as np
import pytest

import lstmcore
from lstmcore import formats

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from lstmcore.formats import onnx as reader, onnx_export  # noqa: E402
from lstmcore.formats.onnx import Backend, Graph  # noqa: E402

T, B, I, H = 7, 3, 4, 5
# float32: another order of sums and other activations over 7 steps; float64: the same.
ABSOLUTE = {"float32": 1e-6, "float64": 1e-12}
DIRECTIONS = ("forward", "reverse", "bidirectional")


def run(path, feeds):
    """What onnxruntime computes, by name."""
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return dict(zip([v.name for v in session.get_outputs()], session.run(None, feeds)))


def model(nodes, inputs, outputs, constants):
    """A checked model; inputs maps names to shapes, or to int32 arrays' names."""
    kinds = {name: TensorProto.INT32 if name == "lengths" else TensorProto.FLOAT for name in inputs}
    made = helper.make_model(helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(n, kinds[n], s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
        [numpy_helper.from_array(a, n) for n, a in constants.items()]),
        opset_imports=[helper.make_opsetid("", 14)])
    made.ir_version = 8
    return made


def recurrent(op, direction, *, bias=True, peepholes=False, seed=0, inputs=I, hidden=H):
    """Constants of a node: W, R, and B and P where wanted."""
    rng, D = np.random.default_rng(seed), 1 + (direction == "bidirectional")
    n = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    shapes = {"W": (D, n * hidden, inputs), "R": (D, n * hidden, hidden)}
    shapes.update({"B": (D, 2 * n * hidden)} if bias else {})
    shapes.update({"P": (D, 3 * hidden)} if peepholes else {})
    return {k: rng.uniform(-0.7, 0.7, s).astype("float32") for k, s in shapes.items()}


def node_model(op, direction, *, bias=True, peepholes=False, lengths=False, states=False,
               layout=0, **attributes):
    op, _, after = op.partition(" ")
    attributes.update({"linear_before_reset": 1} if after else {})
    constants = recurrent(op, direction, bias=bias, peepholes=peepholes)
    D = len(constants["W"])
    inputs = {"x": [None, None, I]}
    inputs.update({"lengths": [None]} if lengths else {})
    widths = {"h0": H, "c0": H} if op == "LSTM" else {"h0": H}
    inputs.update({name: [None, None, n] for name, n in widths.items()} if states else {})
    names = ["x", "W", "R", "B" if bias else "", "lengths" if lengths else "",
             *(name if states else "" for name in widths), "P" if peepholes else ""]
    while not names[-1]:
        names.pop()
    outputs = ["Y", "Y_h", "Y_c"][:1 + len(widths)]
    options = dict(attributes, **({"layout": layout} if layout else {}))
    node = helper.make_node(op, names, outputs, hidden_size=H, direction=direction, **options)
    rng = np.random.default_rng(5)
    feeds = {"x": rng.normal(size=(T, B, I)).astype("float32"),
             "lengths": np.array([4, 0, T], "int32"),
             **{name: rng.normal(size=(D, B, H)).astype("float32") for name in ("h0", "c0")}}
    return model([node], inputs, outputs, constants), {name: feeds[name] for name in inputs}


CASES = [("LSTM", *case) for case in itertools.product(DIRECTIONS, *[(False, True)] * 4)]
GRUS = "GRU", "GRU after"
CASES += [(op, *case, False) for op in ("RNN", *GRUS)
          for case in itertools.product(DIRECTIONS, *[(False, True)] * 3)]


@pytest.mark.parametrize("op, direction, lengths, states, bias, peepholes", CASES)
def test_nodes_agree_with_onnxruntime(tmp_path, op, direction, lengths, states, bias, peepholes):
    made, feeds = node_model(op, direction, bias=bias, peepholes=peepholes, lengths=lengths,
                             states=states)
    path = str(tmp_path / "m.onnx")
    onnx.save(made, path)
    want = run(path, feeds)
    got = Graph(path).run(feeds)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=1e-6, err_msg=name)
    m = lstmcore.load(path)
    state = None
    if states:
        state = (feeds["h0"], feeds["c0"]) if op == "LSTM" else feeds["h0"]
    reverse = isinstance(m, formats.Stack)
    assert reverse == (direction == "reverse")
    y, _ = m(feeds["x"], [state] if reverse else state, feeds.get("lengths"))
    np.testing.assert_allclose(y, want["Y"].transpose(0, 2, 1, 3).reshape(T, B, -1), rtol=0,
                               atol=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("op", ["LSTM", "RNN", *GRUS])
def test_layout_1_is_layout_0_with_the_batch_first(tmp_path, op, direction):
    path = str(tmp_path / "m.onnx")
    made, feeds = node_model(op, direction, lengths=True, states=True)
    want = run_saved(made, path, feeds)
    made, _ = node_model(op, direction, lengths=True, states=True, layout=1)
    got = Graph(made).run({k: v if k == "lengths" else v.swapaxes(0, 1) for k, v in feeds.items()})
    np.testing.assert_allclose(got["Y"], want["Y"].transpose(2, 0, 1, 3), rtol=0, atol=1e-6)
    np.testing.assert_allclose(got["Y_h"], want["Y_h"].swapaxes(0, 1), rtol=0, atol=1e-6)
    onnx.save(made, path)
    assert lstmcore.load(path).batch_first


def run_saved(made, path, feeds):
    onnx.save(made, path)
    return run(path, feeds)


def test_relu_and_what_is_refused_by_name(tmp_path):
    path = str(tmp_path / "m.onnx")
    made, feeds = node_model("RNN", "bidirectional", activations=["Relu", "Relu"])
    want = run_saved(made, path, feeds)["Y"]
    np.testing.assert_allclose(Graph(path).run(feeds)["Y"], want, rtol=0, atol=1e-6)
    assert lstmcore.load(path).nonlinearity == "relu"
    for message, attributes in {
            "clip must be": dict(clip=-3.0), "clip must be above": dict(clip=0.0),
            "input_forget=2": dict(input_forget=2),
            "softplus": dict(activations=["Sigmoid", "Softplus", "Tanh"]),
            "alpha and beta": dict(activations=["Sigmoid", "Affine", "Tanh"]),
            "a list of names|3 functions": dict(activations=["Sigmoid"]),
            "activation_alpha": dict(activation_alpha=[0.5])}.items():
        made, feeds = node_model("LSTM", "forward", **attributes)
        onnx.save(made, path)
        with pytest.raises(ValueError, match=message):
            lstmcore.load(path)
        with pytest.raises(ValueError, match=message):
            Graph(made).run(feeds)
    made, feeds = node_model("GRU", "forward", activations=["HardSigmoid", "Tanh"])
    onnx.save(made, path)
    with pytest.raises(ValueError, match="hardsigmoid"):
        lstmcore.load(path)


def stacked(plumbing, first=DIRECTIONS[2], widths=(H, H), second=DIRECTIONS[2]):
    """Two LSTM nodes, the plumbing between them given."""
    D = 1 + (first == "bidirectional")
    a = recurrent("LSTM", first, seed=1, hidden=widths[0])
    b = recurrent("LSTM", second, seed=2, inputs=D * widths[0], hidden=widths[1])
    constants = {**{f"{k}a": v for k, v in a.items()}, **{f"{k}b": v for k, v in b.items()},
                 "one": np.array([1]), "keep": np.array([0, 0, -1]),
                 "scale": np.float32([2.0])}
    nodes = [helper.make_node("LSTM", ["x", "Wa", "Ra", "Ba"], ["ya"], "a", hidden_size=widths[0],
                              direction=first), *plumbing,
             helper.make_node("LSTM", ["z", "Wb", "Rb", "Bb"], ["yb"], "b", hidden_size=widths[1],
                              direction=second)]
    return model(nodes, {"x": [None, None, I]}, ["yb"], constants)


TRANSPOSED = [helper.make_node("Transpose", ["ya"], ["t"], perm=[0, 2, 1, 3]),
              helper.make_node("Reshape", ["t", "keep"], ["z"])]


def test_stacked_nodes_become_one_layer(tmp_path):
    path, x = str(tmp_path / "m.onnx"), np.random.default_rng(0).normal(size=(T, B, I)).astype("f4")
    squeezed = [helper.make_node("Squeeze", ["ya", "one"], ["s"]),
                helper.make_node("Dropout", ["s"], ["z"])]
    for made, kind in ((stacked(TRANSPOSED), lstmcore.LSTM),
                       (stacked(TRANSPOSED, widths=(6, H)), formats.Stack),
                       (stacked(squeezed, "forward"), formats.Stack),
                       (stacked(squeezed, "reverse"), formats.Stack),
                       (stacked(squeezed, "forward", second="reverse"), formats.Stack)):
        want = run_saved(made, path, {"x": x})["yb"]
        m = lstmcore.load(path)
        assert type(m) is kind
        np.testing.assert_allclose(m(x)[0], want.transpose(0, 2, 1, 3).reshape(T, B, -1), rtol=0,
                                   atol=1e-6)
        np.testing.assert_allclose(Graph(path).run({"x": x})["yb"], want, rtol=0, atol=1e-6)


def test_other_plumbing_does_not_stack(tmp_path):
    """A reshape that mixes the batch with the directions, and an operation that computes."""
    path = str(tmp_path / "m.onnx")
    for plumbing in ([helper.make_node("Reshape", ["ya", "keep3"], ["z"])],
                     [*TRANSPOSED[:1], helper.make_node("Reshape", ["t", "keep"], ["r"]),
                      helper.make_node("Mul", ["r", "scale"], ["z"])]):
        made = stacked(plumbing)
        made.graph.initializer.append(numpy_helper.from_array(np.array([0, -1, 2 * H]), "keep3"))
        onnx.save(made, path)
        with pytest.raises(ValueError, match="several recurrent layers.*'a', 'b'"):
            lstmcore.load(path)
        assert lstmcore.load(path, "b").hidden_size == H


def test_constant_initial_state_is_honored(tmp_path):
    path, rng = str(tmp_path / "m.onnx"), np.random.default_rng(0)
    x, h0 = rng.normal(size=(T, B, I)).astype("f4"), rng.normal(size=(1, B, H)).astype("f4")
    constants = {**recurrent("LSTM", "forward"), "h0": h0, "c0": np.zeros((1, B, H), "f4")}
    for value, kind in ((h0, formats.Stack), (np.zeros_like(h0), lstmcore.LSTM)):
        constants["h0"] = value
        node = helper.make_node("LSTM", ["x", "W", "R", "B", "", "h0", "c0"], ["Y"], hidden_size=H)
        want = run_saved(model([node], {"x": [None, None, I]}, ["Y"], constants), path, {"x": x})
        m = lstmcore.load(path)
        assert type(m) is kind
        np.testing.assert_allclose(m(x)[0], want["Y"][:, 0], rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [dict(num_layers=2, bidirectional=True),
                                     dict(num_layers=3, batch_first=True), dict(bias=False)])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_graphs_from_torch(tmp_path, kind, options):
    torch = pytest.importorskip("torch")
    source, x = getattr(torch.nn, kind)(I, H, **options).eval(), torch.randn(T, B, I)
    with torch.no_grad():
        want = source(x)[0].numpy()
    for axes in (None, {"x": {0: "a", 1: "b"}}):
        torch.onnx.export(source, (x,), str(tmp_path / "m.onnx"), dynamo=False, input_names=["x"],
                          output_names=["y"], dynamic_axes=axes)
        m = lstmcore.load(tmp_path / "m.onnx")
        assert type(m) is getattr(lstmcore, kind) and m.batch_first == ("batch_first" in options)
        np.testing.assert_allclose(m(x.numpy())[0], want, rtol=0, atol=1e-6)
        got = Graph(str(tmp_path / "m.onnx")).run({"x": x.numpy()})["y"]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


EXPORTS = [lambda dtype, **o: lstmcore.LSTM(I, H, 2, dtype=dtype, seed=1, **o),
           lambda dtype, **o: lstmcore.LSTM(I, H, 2, dtype=dtype, seed=1, peepholes=True, **o),
           lambda dtype, **o: lstmcore.LSTM(I, H, 2, dtype=dtype, seed=1, proj_size=3, bias=False,
                                            batch_first=True, **o),
           lambda dtype, **o: lstmcore.GRU(I, H, 2, dtype=dtype, seed=1, **o),
           lambda dtype, **o: lstmcore.GRU(I, H, 2, dtype=dtype, seed=1, reset_after=False, **o),
           lambda dtype, **o: lstmcore.GRU(I, H, 2, dtype=dtype, seed=1, bias=False, batch_first=True,
                                           **o),
           lambda dtype, **o: lstmcore.RNN(I, H, 2, dtype=dtype, seed=1, nonlinearity="relu", **o)]


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("make", EXPORTS)
def test_exports_run_in_onnxruntime(tmp_path, make, dtype, bidirectional):
    m, rng = make(dtype, bidirectional=bidirectional).eval(), np.random.default_rng(0)
    path, N = str(tmp_path / "m.onnx"), 2 * m.directions
    P = m.parameters()["weight_hh_l0"].shape[1]
    is_lstm = isinstance(m, lstmcore.LSTM)
    for state, ragged in itertools.product((False, True), repeat=2):
        onnx_export.export(m, path, state=state, lengths=ragged)
        for t, b in ((T, B), (1, 2)):                   # T and B are open
            def draw(*shape):
                return rng.normal(size=shape).astype(dtype)

            feeds = {"x": draw(b, t, I) if m.batch_first else draw(t, b, I)}
            lengths = np.array([t, 0, 4][:b], "int32") if ragged else None
            given = [draw(N, b, P)] + [draw(N, b, H)] * is_lstm
            feeds.update(zip(("h0", "c0"), given) if state else {})
            feeds.update({"lengths": lengths} if ragged else {})
            initial = None if not state else tuple(given) if is_lstm else given[0]
            y, final = m(feeds["x"], initial, lengths)
            want = {"y": y, **dict(zip(("h_n", "c_n"), final if is_lstm else [final]))}
            got = run(path, feeds)
            assert list(got) == list(want)
            for name, a in want.items():
                np.testing.assert_allclose(got[name], a, rtol=0, atol=ABSOLUTE[dtype])


def test_export_and_import_are_inverse(tmp_path):
    stack = formats.Stack([lstmcore.LSTM(I, 6, seed=0), lstmcore.LSTM(6, H, seed=1)], [False, True],
                          batch_first=True)
    scans = [make(dtype, bidirectional=True) for make in EXPORTS for dtype in ABSOLUTE]
    mixed = formats.Stack([lstmcore.LSTM(I, 6, 2, proj_size=3, peepholes=True, seed=0),
                           lstmcore.LSTM(3, H, seed=1)], [True, False], last_step=True)
    for m in (*scans, mixed, stack,
              lstmcore.LSTM(I, H, 2, bidirectional=True, peepholes=True, dropout=0.3, seed=0),
              lstmcore.RNN(I, H, bidirectional=True, batch_first=True, seed=0)):
        for state, ragged in ((False, True), (True, False), (False, False)):
            onnx_export.export(m, tmp_path / "m.onnx", state=state, lengths=ragged)
            got = lstmcore.load(tmp_path / "m.onnx")
            assert repr(got) == repr(m) and not got.training
            for name, p in m.parameters().items():
                np.testing.assert_array_equal(got.parameters()[name], p)
        assert lstmcore.load(tmp_path / "m.onnx", batch_first=True).batch_first
    lstmcore.convert(tmp_path / "m.onnx", tmp_path / "m.safetensors")
    assert repr(lstmcore.load(tmp_path / "m.safetensors")) == repr(m)
    assert sorted(formats.read_arrays(tmp_path / "m.onnx"))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_last_steps_run_in_onnxruntime(tmp_path, dtype, bidirectional):
    path, rng = str(tmp_path / "m.onnx"), np.random.default_rng(0)
    layers = [lstmcore.LSTM(I, 6, dtype=dtype, seed=0),
              lstmcore.LSTM(6, H, 2, dtype=dtype, bidirectional=bidirectional, seed=1)]
    m = formats.Stack(layers, [True, False], batch_first=True, last_step=True).eval()
    onnx_export.export(m, path, lengths=True)
    x, lengths = rng.normal(size=(B, T, I)).astype(dtype), np.array([2, T, 5], "int32")
    got, (want, _) = run(path, {"x": x, "lengths": lengths})["y"], m(x, lengths=lengths)
    assert got.shape == (B, H * (1 + bidirectional))
    np.testing.assert_allclose(got, want, rtol=0, atol=ABSOLUTE[dtype])


def test_a_graph_that_was_changed_is_read_as_it_is(tmp_path):
    """Or refused, if only its description could tell what it was."""
    path = str(tmp_path / "m.onnx")
    for m, change in itertools.product(
            (lstmcore.LSTM(I, H, dtype="float64", seed=0), lstmcore.LSTM(I, H, seed=0)),
            ("description", "node", "name")):
        m.save(path)
        made = onnx.load(path)
        (said,) = made.metadata_props
        if change == "description":
            said.value = said.value.replace('"dropout": 0.0', '"dropout": [0]')
        elif change == "name":
            for node in made.graph.node:
                node.name = "n"
        elif m.dtype == np.float32:
            for node in made.graph.node:
                if node.op_type == "LSTM":
                    node.attribute.append(helper.make_attribute("clip", 3.0))
        else:
            (scan,) = [node for node in made.graph.node if node.op_type == "Scan"]
            (body,) = [a.g for a in scan.attribute if a.name == "body"]
            [node for node in body.node if node.op_type == "Tanh"][0].op_type = "Relu"
        onnx.save(made, path)
        if m.dtype == np.float32 and change != "node":
            assert repr(lstmcore.load(path)) == repr(m)
        else:
            if m.dtype == np.float32:
                assert lstmcore.load(path).clip == 3.0
                continue
            with pytest.raises(ValueError, match="only from a whole file as lstmcore"):
                lstmcore.load(path)
    lstmcore.LSTM(I, H, dtype="float64", seed=0).save(path)
    with pytest.raises(ValueError, match="without name="):
        lstmcore.load(path, "l0")


@pytest.mark.parametrize("location, message", [
    ("../w.bin", "own folder"), ("/etc/hostname", "own folder"), ("link.bin", "no file beside"),
    ("short.bin", "past the end"), ("w.bin", None)])
def test_external_data_stays_beside_the_model(tmp_path, location, message):
    made, _ = node_model("LSTM", "forward")
    W = made.graph.initializer[0]
    for name, data in (("w.bin", W.raw_data), ("short.bin", W.raw_data[:-4])):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "w.bin").write_bytes(W.raw_data)
    (tmp_path / "link.bin").symlink_to(tmp_path / "elsewhere" / "w.bin")
    want = numpy_helper.to_array(W)[0, :H]
    W.ClearField("raw_data")
    W.data_location = TensorProto.EXTERNAL
    W.external_data.add(key="location", value=location)
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    if message:
        with pytest.raises(ValueError, match=message):
            lstmcore.load(tmp_path / "m.onnx")
    else:
        m = lstmcore.load(tmp_path / "m.onnx")
        np.testing.assert_array_equal(m.parameters()["weight_ih_l0"][:H], want)


@pytest.mark.parametrize("grow", ["Expand", "ConstantOfShape", "Concat"])
def test_graphs_that_grow_are_stopped(tmp_path, grow):
    made, _ = node_model("LSTM", "forward")
    constants = {"big": np.array([1 << 20, 1 << 20]), "one": np.ones((1, 1), "f4")}
    made.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in constants.items())
    if grow == "Concat":
        nodes = [helper.make_node("Concat", [f"v{n - 1}" if n else "one"] * 8, [f"v{n}"], axis=0)
                 for n in range(12)]
    else:
        nodes = [helper.make_node(grow, ["one"] * (grow == "Expand") + ["big"], ["v0"])]
    made.graph.node.extend(nodes)
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    with pytest.raises(ValueError, match="more than its size allows"):
        lstmcore.load(tmp_path / "m.onnx")


@pytest.mark.parametrize("name", ["defaults", "with_initial_bias", "with_peepholes", "batchwise",
                                  "reverse", "bidirectional"])
def test_node_tests_of_onnx(name):
    from onnx.backend.test.case.node import _NodeTestCases, lstm        # noqa: F401
    (case,) = [case for case in _NodeTestCases if case.name == f"test_lstm_{name}"]
    prepared = Backend.prepare(case.model)
    for inputs, outputs in case.data_sets:
        for got, want in zip(prepared.run(inputs), outputs, strict=True):
            np.testing.assert_allclose(got, want, rtol=case.rtol, atol=case.atol)


def shaped(nodes, constants, want=None, tmp_path=None, opset=14, functions=(), inputs=None):
    """The LSTM that a graph of these nodes, from x to Y, is loaded as."""
    made = model(nodes, inputs or {"x": [None, None, I]}, ["Y"], {**recurrent("LSTM", "forward"),
                                                                   **constants})
    made.functions.extend(functions)
    if functions:
        made.opset_import.append(helper.make_opsetid("local", 1))
    onnx.save(made, tmp_path / "m.onnx")
    return lstmcore.load(tmp_path / "m.onnx")


def lstm(*more, x="x", y="Y"):
    return helper.make_node("LSTM", [x, "W", "R", "B", *more], [y], hidden_size=H)


ONE, WIDTH = {"one": np.array([1])}, {"one": np.array([1]), "H": np.array([H])}


@pytest.mark.filterwarnings("ignore:.*left in the file")
@pytest.mark.parametrize("front", ["Mul", "Softmax", "Erf", "Unheard"])
def test_states_of_zeros_are_zeros_whatever_their_shape(tmp_path, front):
    """As exporters write them: of the shape of what the layer reads, which nobody computes here."""
    n = helper.make_node
    first = [n("Mul", ["x", "k"], ["a"]) if front == "Mul" else n(front, ["x"], ["a"]),
             n("Shape", ["a"], ["s"]), n("Gather", ["s", "one"], ["b"])]
    shape = n("Concat", ["one", "b", "H"], ["hs"], axis=0)
    zeros = {**WIDTH, "k": np.full(1, 0.5, "f4"), "z": np.zeros((1, 1, H), "f4"),
             "start": np.array([0])}
    for made in ([shape, n("ConstantOfShape", ["hs"], ["h0"])],
                 [shape, n("Expand", ["z", "hs"], ["h0"])],
                 [n("Concat", ["one", "b", "one"], ["rep"], axis=0),
                  n("Tile", ["z", "rep"], ["h0"])],
                 [shape, n("ConstantOfShape", ["hs"], ["h1"]),
                  n("Slice", ["h1", "start", "one", "start"], ["h0"])]):
        if front == "Unheard":          # a graph without a shape of its own behind it
            first[0].domain = "other"
        m = shaped([*first, *made, lstm("", "h0", "h0", x="a")], zeros, tmp_path=tmp_path)
        assert repr(m) == f"LSTM({I}, {H})"
    nodes = [*first, shape, n("Expand", ["z", "hs"], ["h0"]), lstm("", "h0", "h0", x="a")]
    m = shaped(nodes, {**zeros, "z": np.ones((1, 1, H), "f4")}, tmp_path=tmp_path)
    assert all((state == np.ones((1, 1, H))).all() for state in m.initial[0])
    zeros["z"] = np.random.default_rng(0).normal(size=(1, 1, H)).astype("f4")
    if front == "Unheard":
        with pytest.raises(ValueError, match="initial state of .* comes from"):
            shaped(nodes, zeros, tmp_path=tmp_path)
        return
    m, x = shaped(nodes, zeros, tmp_path=tmp_path), np.ones((T, B, I), "f4")
    want = run(str(tmp_path / "m.onnx"), {"x": x})["Y"][:, 0]
    fed = {"Mul": x / 2, "Softmax": x / I, "Erf": x * np.float32(math.erf(1))}[front]
    np.testing.assert_allclose(m(fed)[0], want, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*left in the file")
def test_states_that_no_call_is_given_are_named(tmp_path):
    n, node = helper.make_node, lstm("", "h0", "h0")
    inputs = {"x": [None, None, I], "h": [None, H]}
    given = n("Unsqueeze", ["h", "start"], ["h0"])
    constants = {"start": np.array([0]), "k": np.ones(1, "f4")}
    assert repr(shaped([given, node], constants, tmp_path=tmp_path, inputs=inputs)) == f"LSTM({I}, {H})"
    computed = n("Mul", ["h", "k"], ["g"]), n("Unsqueeze", ["g", "start"], ["h0"])
    with pytest.warns(UserWarning, match="starts in a state that the graph computes") as said:
        shaped([*computed, node], constants, tmp_path=tmp_path, inputs=inputs)
    assert len(said) == 2           # that, and the Mul
    # as PyTorch's dynamo exporter writes a layer with projections, whose c0 gives it away
    constants = {"h0": np.zeros((1, 1, H), "f4"), "c0": np.zeros((1, 1, H + 2), "f4")}
    with pytest.raises(ValueError, match=f"must be floats .* got float32 .1, 1, {H + 2}.: .*projections"):
        shaped([lstm("", "h0", "c0")], constants, tmp_path=tmp_path)


@pytest.mark.parametrize("op, options", [
    ("Slice", {}), ("Transpose", dict(perm=[1, 0, 2])), ("Transpose", dict(perm=[2, 0, 1]))])
def test_an_x_in_another_order_is_named(tmp_path, op, options):
    """Read from the end, or with other axes in front: what the layer reads is not what the graph does."""
    n, ends = helper.make_node, {"a": np.array([-1]), "b": np.array([-9]), "c": np.array([0])}
    made = n(op, ["x"] + ["a", "b", "c", "a"] * (op == "Slice"), ["v"], **options)
    if options.get("perm") == [1, 0, 2]:
        assert shaped([made, lstm(x="v")], ends, tmp_path=tmp_path).batch_first
        return
    with pytest.warns(UserWarning, match=f"left in the file: '{op}'"):
        shaped([made, lstm(x="v")], ends, tmp_path=tmp_path, inputs={
            "x": [I, None, None] if options else [None, None, I]})


def test_sizes_that_are_computed_join_layers(tmp_path):
    """(T, 1, B, H) -> (T, B, 1 * H) by a product of sizes, as PyTorch's exporter writes it."""
    n, sizes = helper.make_node, {str(k): np.array([k]) for k in range(5)}

    def joined(y, out):
        yield n("Transpose", [y], [out + "t"], perm=[0, 2, 1, 3])
        yield n("Shape", [out + "t"], [out + "s"])
        for k in range(4):
            yield n("Slice", [out + "s", str(k), str(k + 1)], [out + str(k)])
        yield n("Mul", [out + "2", out + "3"], [out + "m"])
        yield n("Concat", [out + "0", out + "1", out + "m"], [out + "c"], axis=0)
        yield n("Reshape", [out + "t", out + "c"], [out])
    second = {k + "2": v for k, v in recurrent("LSTM", "forward", inputs=H, seed=3).items()}
    nodes = [lstm(y="y1"), *joined("y1", "x2"),
             n("LSTM", ["x2", "W2", "R2", "B2"], ["y2"], hidden_size=H), *joined("y2", "Y")]
    m = shaped(nodes, {**sizes, **second}, tmp_path=tmp_path)
    assert repr(m) == f"LSTM({I}, {H}, num_layers=2)"
    x = np.random.default_rng(0).normal(size=(T, B, I)).astype("f4")
    want = run(str(tmp_path / "m.onnx"), {"x": x})["Y"]
    np.testing.assert_allclose(m(x)[0], want, rtol=0, atol=1e-6)
    got = Graph(tmp_path / "m.onnx").run({"x": x})["Y"]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_constant_lengths_must_be_the_whole_length(tmp_path):
    fixed = {"x": [T, B, I]}
    for lengths, fits in (([T] * B, True), ([T] * (B - 1) + [T - 1], False)):
        constants = {"n": np.array(lengths, "i4")}
        if fits:
            assert repr(shaped([lstm("n")], constants, tmp_path=tmp_path, inputs=fixed)) == \
                f"LSTM({I}, {H})"
        else:
            with pytest.raises(ValueError, match="sequence_lens of .* not the whole length"):
                shaped([lstm("n")], constants, tmp_path=tmp_path, inputs=fixed)
    with pytest.raises(ValueError, match="not the whole length"):
        shaped([lstm("n")], {"n": np.full(B, 9, "i4")}, tmp_path=tmp_path)


def test_branches_that_are_chosen_and_functions(tmp_path):
    n = helper.make_node

    def branch(node):
        return helper.make_graph([node], node.output[0], [], [
            helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)])
    choice = n("If", ["c"], ["Y"], then_branch=branch(lstm(y="a")),
               else_branch=branch(helper.make_node("LSTM", ["x", "W2", "R2", "B2"], ["a"],
                                                   hidden_size=H)))
    second = {k + "2": v for k, v in recurrent("LSTM", "forward", seed=3).items()}
    for c in (True, False):
        m = shaped([choice], {"c": np.array(c), **second}, tmp_path=tmp_path)
        want = recurrent("LSTM", "forward", seed=0 if c else 3)["W"][0, :H]
        np.testing.assert_array_equal(m.parameters()["weight_ih_l0"][:H], want)
    function = helper.make_function("local", "Layer", ["a", "w", "r"], ["b"], [
        helper.make_node("LSTM", ["a", "w", "r"], ["b"], hidden_size=H)],
        [helper.make_opsetid("", 14)])
    call = helper.make_node("Layer", ["x", "W", "R"], ["Y"], domain="local")
    m = shaped([call], {}, tmp_path=tmp_path, functions=[function])
    assert repr(m) == f"LSTM({I}, {H}, bias=False)"
    # attributes that the call gives, under names of the function's own
    inner, kinds = helper.make_node("LSTM", ["a", "w", "r"], ["b"]), onnx.AttributeProto
    for name, said, kind in ("hidden_size", "size", kinds.INT), ("direction", "way", kinds.STRING):
        inner.attribute.add(name=name, ref_attr_name=said, type=kind)
    function = helper.make_function("local", "Layer", ["a", "w", "r"], ["b"], [inner],
                                    [helper.make_opsetid("", 14)], attributes=["size", "way"])
    call.attribute.extend([helper.make_attribute("size", H), helper.make_attribute("way", "reverse")])
    assert shaped([call], {}, tmp_path=tmp_path, functions=[function]).reverse == [True]
    del call.attribute[1]                           # one that is not given is not there
    assert repr(shaped([call], {}, tmp_path=tmp_path, functions=[function])) == repr(m)
    floors = [helper.make_function("local", f"F{k}", ["a"], ["b"], [
        helper.make_node(f"F{k + 1}", ["a"], ["c"], domain="local"),
        helper.make_node(f"F{k + 1}", ["c"], ["b"], domain="local")],
        [helper.make_opsetid("local", 1)]) for k in range(40)]
    with pytest.raises(ValueError, match="without end"):
        shaped([helper.make_node("F0", ["x"], ["Y"], domain="local")], {}, tmp_path=tmp_path,
               functions=floors)


def test_a_download_cache_links_model_and_data(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    blobs.mkdir(), snapshot.mkdir(parents=True)
    layer = lstmcore.LSTM(I, H, seed=0)
    layer.save(tmp_path / "m.onnx")
    onnx.save(onnx.load(tmp_path / "m.onnx"), blobs / "model.onnx", save_as_external_data=True,
              location="data", size_threshold=0)
    for name in ("model.onnx", "data"):
        (snapshot / name).symlink_to(blobs / name)
    got = lstmcore.load(snapshot / "model.onnx")
    np.testing.assert_array_equal(got.parameters()["weight_hh_l0"],
                                  layer.parameters()["weight_hh_l0"])
    (blobs / "data").rename(tmp_path / "data")
    (snapshot / "data").unlink()
    (snapshot / "data").symlink_to(tmp_path / "data")
    with pytest.raises(ValueError, match="no file beside"):
        lstmcore.load(snapshot / "model.onnx")


def test_what_is_not_read_is_named(tmp_path):
    with pytest.raises(ValueError, match="lstmcore reads LSTM, GRU and RNN, not Loop"):
        shaped([helper.make_node("Loop", ["x", "W", "R"], ["Y"])], {}, tmp_path=tmp_path)
    body = helper.make_graph([lstm(y="b")], "body", [], [])
    with pytest.raises(ValueError, match="lstmcore reads LSTM, GRU and RNN, not Loop"):
        shaped([helper.make_node("Loop", ["W"], ["Y"], body=body)], {}, tmp_path=tmp_path)
    with pytest.raises(ValueError, match="may have written a recurrence out"):
        shaped([helper.make_node("MatMul", ["x", "x"], ["Y"])], {}, tmp_path=tmp_path)
    steps = [helper.make_node("MatMul", [f"y{n}" if n else "x", "V"], [f"y{n + 1}"])
             for n in range(4)]
    with pytest.raises(ValueError, match="it multiplies by 'V' 4 times: .*recurrence out"):
        shaped([*steps, helper.make_node("Identity", ["y4"], ["Y"])], {"V": np.eye(I, dtype="f4")},
               tmp_path=tmp_path)


def quantized(a, per_channel, kind, offset):
    """W or R in 8 bits, (D, I, 4H), with scales and zero points; and what they stand for."""
    rng, shape = np.random.default_rng(7), (len(a), a.shape[1]) if per_channel else (len(a),)
    # Integers up to 64: onnxruntime adds two products in 16 bits where a CPU has no VNNI
    scale = rng.uniform(0.011, 0.015, shape).astype("f4")
    zero = np.full(shape, offset, kind)
    wide_scale, wide_zero = (v[:, None] if per_channel else v[:, None, None] for v in (scale, zero))
    most = np.iinfo(kind)
    q = np.clip(np.rint(a.transpose(0, 2, 1) / wide_scale) + wide_zero, most.min, most.max)
    q = q.astype(kind)
    meant = (q.astype("f4") - wide_zero) * wide_scale
    return (q, scale, zero), meant.astype("f4").transpose(0, 2, 1)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind, offset", [("i1", 0), ("u1", 128)])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_quantized_nodes_stay_in_int8(tmp_path, per_channel, kind, offset, direction):
    found = recurrent("LSTM", direction)
    (W, *w), found_W = quantized(found["W"], per_channel, kind, offset)
    (R, *r), found_R = quantized(found["R"], per_channel, kind, offset)
    names = ["x", "W", "R", "B", "", "", "", "", "ws", "wz", "rs", "rz"]
    constants = dict(W=W, R=R, B=found["B"], ws=w[0], wz=w[1], rs=r[0], rz=r[1])
    node = helper.make_node("DynamicQuantizeLSTM", names, ["Y"], domain="com.microsoft",
                            hidden_size=H, direction=direction)
    made = model([node], {"x": [None, None, I]}, ["Y"], constants)
    made.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(made, tmp_path / "q.onnx")
    with pytest.warns(UserWarning, match="weights of 8 bits"):
        m = lstmcore.load(tmp_path / "q.onnx")
    plain = helper.make_node("LSTM", ["x", "W", "R", "B"], ["Y"], hidden_size=H,
                             direction=direction)
    onnx.save(model([plain], {"x": [None, None, I]}, ["Y"],
                    {"W": found_W, "R": found_R, "B": found["B"]}), tmp_path / "m.onnx")
    plain = lstmcore.load(tmp_path / "m.onnx")
    for name, p in plain.parameters().items():
        np.testing.assert_array_equal(m.parameters()[name], p)
    x = np.random.default_rng(0).normal(size=(T, B, I)).astype("f4")
    m.save(tmp_path / "q.safetensors")
    assert formats.read_arrays(tmp_path / "q.safetensors")["weight_ih_l0"].dtype == np.int8
    np.testing.assert_array_equal(lstmcore.load(tmp_path / "q.safetensors")(x)[0], m(x)[0])
    assert not (plain(x)[0] == m(x)[0]).all()
    got, want = m(x)[0], run(str(tmp_path / "q.onnx"), {"x": x})["Y"]
    # x and h of 8 bits: a step of 1/127 of the largest of each, over 7 steps
    np.testing.assert_allclose(got, want.transpose(0, 2, 1, 3).reshape(got.shape), atol=0.05)
    # what our int8 cannot say
    other = copy.deepcopy(made)
    for tensor in other.graph.initializer:
        if tensor.name == "wz":
            tensor.CopyFrom(numpy_helper.from_array(w[1] + w[1].dtype.type(100), "wz"))
    onnx.save(other, tmp_path / "o.onnx")
    for name, options in ("q.onnx", dict(dtype="float64")), ("o.onnx", {}):
        with pytest.warns(UserWarning, match="weights of 8 bits"):
            lstmcore.load(tmp_path / name, **options).save(tmp_path / "o.safetensors")
        assert formats.read_arrays(tmp_path / "o.safetensors")["weight_ih_l0"].dtype.kind == "f"
    with pytest.raises(ValueError, match="DynamicQuantizeLSTM, which rounds x"):
        Graph(tmp_path / "q.onnx").run({"x": x})
    del node.input[-1]
    made.graph.node[0].CopyFrom(node)
    onnx.save(made, tmp_path / "q.onnx")
    with pytest.raises(ValueError, match="constant scales and zero points"):
        lstmcore.load(tmp_path / "q.onnx")


def test_weights_that_a_graph_dequantizes(tmp_path):
    """As quantizers with Q and DQ nodes write them, with one scale or one per row."""
    n, found = helper.make_node, recurrent("LSTM", "forward")
    q = np.random.default_rng(1).integers(-99, 99, found["W"].shape).astype("i1")
    for scale, zero in ((np.float32(0.01), np.int8(3)),
                        (np.linspace(0.01, 0.02, 4 * H, dtype="f4"), np.arange(4 * H, dtype="i1"))):
        nodes = [n("DequantizeLinear", ["q", "s", "z"], ["V"], axis=1),
                 n("LSTM", ["x", "V", "R", "B"], ["Y"], hidden_size=H)]
        m = shaped(nodes, {"q": q, "s": scale, "z": zero}, tmp_path=tmp_path)
        want = (q[0].astype("f4") - zero.astype("f4").reshape(-1, 1)) * scale.reshape(-1, 1)
        order = np.concatenate([np.arange(H) + k * H for k in (0, 2, 3, 1)])    # ONNX's i, o, f, c
        np.testing.assert_array_equal(m.parameters()["weight_ih_l0"], want[order])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [
    {}, {"enforce_sorted": False}, {"batch_first": True, "enforce_sorted": False},
    {"embedding": True, "batch_first": True}])
def test_packed_sequences_from_torch(tmp_path, capfd, options):
    """Packed before the layer and padded behind it: an LSTM with sequence_lens."""
    torch = pytest.importorskip("torch")
    pack, pad = torch.nn.utils.rnn.pack_padded_sequence, torch.nn.utils.rnn.pad_packed_sequence
    first = options.get("batch_first", False)
    how = {"batch_first": first, "enforce_sorted": options.get("enforce_sorted", True)}

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(9, I) if "embedding" in options else torch.nn.Identity()
            self.rnn = torch.nn.LSTM(I, H, 2, bidirectional=True, batch_first=first)

        def forward(self, x, lengths):
            y, _ = self.rnn(pack(self.embed(x), lengths, **how))
            return pad(y, batch_first=first)[0]

    net, rng = Net().eval(), np.random.default_rng(0)
    shape = (B, T) if first else (T, B)
    x = torch.tensor(rng.integers(0, 9, shape) if "embedding" in options
                     else rng.normal(size=(*shape, I)).astype("f4"))
    lengths = torch.tensor([T, 5, 2] if how["enforce_sorted"] else [5, T, 2])
    torch.onnx.export(net, (x, lengths), tmp_path / "m.onnx", input_names=["x", "lengths"],
                      dynamic_axes={"x": {0: "a", 1: "b"}, "lengths": {0: "n"}}, dynamo=False,
                      opset_version=14)
    m = lstmcore.load(tmp_path / "m.onnx")
    assert m.batch_first == first
    with torch.no_grad():
        got = m(net.embed(x).numpy(), lengths=lengths.numpy())[0]
        np.testing.assert_allclose(got, net(x, lengths).numpy(), rtol=0, atol=1e-6)


def test_weights_put_together_in_the_graph(tmp_path):
    """As Paddle's and TensorFlow's converters write a layer: gates cut and reordered by nodes,
    directions stacked by them, x transposed, states by shapes."""
    n, rng = helper.make_node, np.random.default_rng(2)
    nodes, constants, wanted = [], {"one": np.array([1]), "zero": np.array([0]),
                                    "end": np.array([9]), "two": np.array([2]),
                                    "H": np.array([H]), "join": np.array([0, 0, 2 * H])}, {}
    constants.update({str(k * H): np.array([k * H]) for k in range(5) if str(k * H) != "0"})
    constants["0"] = np.array([0])
    for suffix in ("", "_reverse"):
        for kind, shape in (("ih", (4 * H, I)), ("hh", (4 * H, H))):
            name = f"weight_{kind}_l0{suffix}"
            wanted[name] = constants[name] = rng.uniform(-1, 1, shape).astype("f4")
            for k in range(4):
                nodes.append(n("Slice", [name, str(k * H), str((k + 1) * H), "zero"],
                               [f"{name}{k}"]))
            nodes += [n("Concat", [f"{name}{k}" for k in (0, 3, 1, 2)], [name + "o"], axis=0),
                      n("Unsqueeze", [name + "o", "zero"], [name + "u"])]
    for kind in ("ih", "hh"):
        nodes.append(n("Concat", [f"weight_{kind}_l0u", f"weight_{kind}_l0_reverseu"], ["w" + kind],
                       axis=0))
    nodes += [n("Shape", ["x"], ["s"]), n("Slice", ["s", "zero", "one", "zero"], ["n"]),
              n("Concat", ["two", "n", "H"], ["hs"], axis=0), n("ConstantOfShape", ["hs"], ["h0"]),
              n("Transpose", ["x"], ["xt"], perm=[1, 0, 2]),
              n("LSTM", ["xt", "wih", "whh", "", "", "h0", "h0"], ["yd"], hidden_size=H,
                direction="bidirectional"),
              n("Transpose", ["yd"], ["yt"], perm=[0, 2, 1, 3]),
              n("Reshape", ["yt", "join"], ["yr"]),
              n("Transpose", ["yr"], ["Y"], perm=[1, 0, 2])]
    m = shaped(nodes, constants, tmp_path=tmp_path, inputs={"x": [None, None, I]})
    assert repr(m) == f"LSTM({I}, {H}, bias=False, batch_first=True, bidirectional=True)"
    for name, a in wanted.items():
        np.testing.assert_array_equal(m.parameters()[name], a)
    x = rng.normal(size=(B, T, I)).astype("f4")
    want = run(str(tmp_path / "m.onnx"), {"x": x})["Y"]
    np.testing.assert_allclose(m(x)[0], want, rtol=0, atol=1e-6)


def test_an_operation_without_its_input_is_refused():
    made = model([helper.make_node("Identity", [""], ["Y"])], {"x": [None]}, ["Y"], {})
    with pytest.raises(ValueError, match="Identity.* lacks an input"):
        Graph(made).run({"x": np.zeros(3, "f4")})


def test_many_nodes_and_shared_weights_take_little(tmp_path, monkeypatch):
    compared, key = [], reader._key
    monkeypatch.setattr(reader, "_key", lambda a: compared.append(a) or key(a))
    many = [lstm(y=f"y{n}") for n in range(3000)]
    begin = time.perf_counter()
    with pytest.raises(ValueError, match="several recurrent layers"):
        shaped([*many, helper.make_node("Identity", ["y0"], ["Y"])], {}, tmp_path=tmp_path)
    assert time.perf_counter() - begin < 5
    assert len(compared) < 3010         # each Y once, and x, which may be wide, once for all
    n, x, nodes, size = helper.make_node, "x", [], 96
    for k in range(300):
        nodes += [n("LSTM", [x, "V", "V"], [f"y{k}"], hidden_size=size),
                  n("Squeeze", [f"y{k}", "one"], [f"z{k}"])]
        x = f"z{k}"
    with pytest.raises(ValueError, match="shares its arrays among so many layers"):
        shaped([*nodes, n("Identity", [x], ["Y"])],
               {**ONE, "V": np.zeros((1, 4 * size, size), "f4")},
               tmp_path=tmp_path, inputs={"x": [2, 1, size]})


@pytest.mark.parametrize("inputs, feeds", [
    (["x", "W", "R", "", "", "h"], {"h": np.zeros((0, B, H), "f4")}),
    (["x", "W", "R", "", "", "h"], {"h": np.zeros(1, "f4")}),
    (["x", "W", "R", "", "", "h"], {"h": np.float32(1)}),
    (["x", "W", "R", "", "n"], {"n": np.array([1, 99, 1], "i4")}),
    (["x", "W", "R", "", "n"], {"n": np.array(1, "i4")}), ([], {})])
def test_inputs_of_a_run_are_checked(inputs, feeds):
    constants = recurrent("LSTM", "forward", bias=False)
    made = model([helper.make_node("LSTM", inputs, ["Y"])],
                 {name: None for name in ("x", *feeds) if name in inputs}, ["Y"], constants)
    x = {"x": np.zeros((T, B, I), "f4")} if inputs else {}
    with pytest.raises(ValueError):
        Graph(made).run({**x, **feeds})
