"""LSTMs that differ from the usual one: what the layer draws, what files say, and other libraries' answers.

That the kernels are the reference in every plan, and the reference its slopes, is proven with the usual
cell's: tests/test_kernels.py and tests/test_reference.py run the same variants.
"""

import copy
import itertools
import pickle

import numpy as np
import pytest
from problems import forward, lstm_problem

import lstmcore
from lstmcore import GRU, LSTM, RNN, Embedding, functional
from lstmcore.variants import ACTIVATIONS, Variant, activation

OPTIONS = {
    "recurrent_activation": dict(recurrent_activation=("hard_sigmoid", 0.2, 0.5)),
    "activation": dict(activation="softsign"),
    "cell_activation": dict(cell_activation=("tanh", 1.5, 0.7)),
    "clip": dict(clip=0.4),
    "coupled": dict(coupled=True),
    "zoneout": dict(zoneout=(0.1, 0.2)),
    "layer_norm": dict(layer_norm="products"),
    "layer_norm of gates": dict(layer_norm="gates"),
    "recurrent_dropout": dict(recurrent_dropout=0.3),
    "weight_dropout": dict(weight_dropout=0.3),
    "locked_dropout": dict(dropout=0.3, locked_dropout=True),
    "bidirectional": dict(bidirectional=True),
    "peepholes": dict(peepholes=True),
    "projection": dict(proj_size=2),
}
CELLS, NORMED = list(OPTIONS)[:9], list(OPTIONS)[6:8]       # what is not the usual cell
REFUSED = [("zoneout", "peepholes"), *((name, "projection") for name in CELLS),
           *((name, other) for name in NORMED for other in ("peepholes", "recurrent_dropout")),
           *((name, norm) for name in CELLS[:6] for norm in NORMED)]
T, B, I, H = 5, 3, 3, 4


# ---- the layer ---------------------------------------------------------------------------------------

def slopes_are_gradients(m):
    """Every gradient of a ragged batch in training, its masks drawn again for each difference."""
    rng = np.random.default_rng(1)
    x, lengths, state = rng.standard_normal((T, B, I)), [5, 2, 0], m.rng.bit_generator.state
    dy = rng.standard_normal(m(x, lengths=lengths)[0].shape)

    def loss():
        m.rng.bit_generator.state = state
        return (m(x, lengths=lengths)[0] * dy).sum()

    m.zero_grad()
    loss()
    dx, _ = m.backward(dy)
    for name, a, g in [("x", x, dx), *((n, p, m.gradients()[n].copy())
                                       for n, p in m.parameters().items())]:
        direction = rng.standard_normal(a.shape)
        kept, found = a.copy(), []
        for step in (1e-6, -1e-6):
            a[...] = kept + step * direction
            found.append(loss())
        a[...] = kept
        slope = (found[0] - found[1]) / 2e-6
        assert abs(slope - (g * direction).sum()) < 1e-6 * max(1, abs(slope)), name


@pytest.mark.parametrize("pair", list(itertools.combinations_with_replacement(OPTIONS, 2)),
                         ids="+".join)
def test_gradients_of_every_option_and_pair_are_slopes(pair):
    if pair == tuple(NORMED):
        return      # two values of one option
    options = {name: value for key in pair for name, value in OPTIONS[key].items()}
    if pair in REFUSED:
        with pytest.raises(ValueError, match="peepholes|proj_size|layer_norm"):
            LSTM(I, H, 2, dtype="float64", seed=0, **options)
        return
    slopes_are_gradients(LSTM(I, H, 2, dtype="float64", seed=0, **options))


@pytest.mark.parametrize("kind", [GRU, RNN])
@pytest.mark.parametrize("option", ["weight_dropout", "locked_dropout"])
def test_gradients_of_other_layers_are_slopes(kind, option):
    slopes_are_gradients(kind(I, H, 2, dtype="float64", seed=0, **OPTIONS[option]))


@pytest.mark.parametrize("compute", [None, "bfloat16"])
def test_the_usual_variant_has_the_usual_bits(compute, plan, isa):
    problem = lstm_problem(12, 13, 9, 35, dtype="float32", lengths="ragged", peepholes=True)
    usual, varied = ([y, *state, tape.gates, *functional.lstm_backward(tape, **problem.upstream)]
                     for options in ({}, {"variant": Variant()})
                     for y, state, tape in [forward(functional, problem, compute=compute, **options)])
    for one, two in zip(usual[:5], varied[:5]):
        assert one.tobytes() == two.tobytes()
    for one, two in zip(usual[5:], varied[5:]):     # what reaches h from two sides is added in another order
        assert one is two is None or np.allclose(one, two, rtol=0, atol=2e-2 if compute else 1e-4)


def test_an_option_that_is_off_is_the_usual_cell():
    off = dict(recurrent_activation="sigmoid", activation=("tanh", 1.0), cell_activation="tanh", clip=None,
               zoneout=0, recurrent_dropout=0.0)
    m, usual = LSTM(I, H, seed=0, **off), LSTM(I, H, seed=0)
    assert m._cell == "lstm" and m.describe() == {**usual.describe(), "activation": ["tanh", 1.0],
                                                  "cell_activation": "tanh"}
    x = np.ones((T, B, I), "float32")
    assert (m(x)[0] == usual(x)[0]).all()


def test_masks_are_drawn_for_a_sequence_or_a_step():
    x = np.ones((40, 50, I), "float32")
    for option in "zoneout", "recurrent_dropout", "locked_dropout":
        m = LSTM(I, 30, 2, seed=0, **OPTIONS[option])
        m(x)
        mask, ((tape, _),) = m._tape[2][0][1]
        variant = tape.batch.variant
        if option == "zoneout":
            kept = variant.zone.mean(axis=(0, 1, 3))
            assert np.allclose(kept, (0.1, 0.2), atol=0.01) and set(np.unique(variant.zone)) == {0, 1}
            assert (variant.zone[0] != variant.zone[1]).any()
            neighbors = (variant.zone[..., 1:] * variant.zone[..., :-1]).mean(axis=(0, 1, 3))
            assert np.allclose(neighbors, (0.01, 0.04), atol=0.005)
        elif option == "recurrent_dropout":
            assert variant.mask.shape == (50, 30) and abs((variant.mask == 0).mean() - 0.3) < 0.03
            assert abs(variant.mask.max() - 1 / 0.7) < 1e-4
        else:
            assert mask.shape == (1, 50, 30) and abs((mask == 0).mean() - 0.3) < 0.03


def test_evaluation_draws_nothing_and_zones_are_means():
    m = LSTM(I, H, seed=0, zoneout=(0.25, 0.5), recurrent_dropout=0.5, weight_dropout=0.5,
             dtype="float64").eval()
    state = m.rng.bit_generator.state
    x = np.random.default_rng(0).standard_normal((T, B, I))
    y, (h, c) = m(x)
    assert m.rng.bit_generator.state == state
    w = {letter: m.parameters()[f"{name}_l0"] for letter, name in (
        ("W_ih", "weight_ih"), ("W_hh", "weight_hh"), ("b", "bias"))}
    want = lstmcore.reference.lstm_forward(x, **w, variant=Variant(zoneout=(0.25, 0.5)))
    np.testing.assert_allclose(y, want[0], rtol=0, atol=1e-14)
    np.testing.assert_allclose(c[0], want[1][1], rtol=0, atol=1e-14)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_streams_frozen_layers_and_copies_compute_the_same(precision, tmp_path):
    m = LSTM(I, 20, 2, seed=0, recurrent_activation="hard_sigmoid", activation="elu", clip=2.0, coupled=True,
             zoneout=0.1, recurrent_dropout=0.4).eval()
    x = np.random.default_rng(0).standard_normal((T, B, I), dtype="float32")
    plain = m(x)[0]
    m.freeze(precision)
    y = m(x)[0]
    assert abs(y - plain).max() < {"float32": 1e-6, "bfloat16": 0.02, "int8": 0.03}[precision]
    stream = m.stream(B)
    for n in range(T):
        if n == 2:
            stream = pickle.loads(pickle.dumps(copy.copy(stream)))
        assert (stream.step(x[n]) == y[n]).all()
    m.save(tmp_path / "m.safetensors")
    again = lstmcore.load(tmp_path / "m.safetensors")
    assert again.describe() == m.describe()
    assert (again.freeze(precision)(x)[0] == y).all()


@pytest.mark.parametrize("options", [dict(activation="softsign", coupled=True), dict(layer_norm="products"),
                                     dict(layer_norm="gates")], ids=str)
def test_token_ids_and_a_table_compute_the_same(options):
    ids, dy = np.random.default_rng(0).integers(0, 7, (T, B)), np.ones((T, B, H))
    m, table = LSTM(7, H, seed=0, dtype="float64", **options), Embedding(7, 7, dtype="float64", seed=1)
    table.parameters()["weight"][...] = np.eye(7)
    found = []
    for call in (lambda: m(ids), lambda: m(np.eye(7)[ids]), lambda: m(ids, embedding=table)):
        m.zero_grad()
        y = call()[0]
        m.backward(dy)
        found.append([y, *(g.copy() for g in m.gradients().values())])
    for one, two, three in zip(*found):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-12)
        np.testing.assert_allclose(one, three, rtol=0, atol=1e-12)


@pytest.mark.parametrize("normed", ["products", "gates"])
def test_a_layer_with_layer_norm_streams_saves_and_freezes(normed, tmp_path):
    m = LSTM(I, 20, 2, seed=0, layer_norm=normed).eval()
    x = np.random.default_rng(0).standard_normal((T, B, I), dtype="float32")
    y, stream = m(x)[0], m.stream(B)
    assert all((stream.step(x[t]) == y[t]).all() for t in range(T))
    m.save(tmp_path / "m.safetensors")
    again = lstmcore.load(tmp_path / "m.safetensors")
    assert again.describe() == m.describe() and (again(x)[0] == y).all() and (m.freeze()(x)[0] == y).all()
    for precision in "int8", "bfloat16":
        with pytest.raises(ValueError, match="layer_norm cannot be frozen"):
            lstmcore.Sequential(LSTM(I, 4, seed=0), LSTM(4, 5, layer_norm=normed)).freeze(precision)
    for name in "m.onnx", "m.weights.h5":
        if pytest.importorskip("onnx") and pytest.importorskip("h5py"):
            with pytest.raises(ValueError, match="normalization|weight_layernorm"):
                m.unfreeze().save(tmp_path / name)


def test_layer_norm_is_that_of_the_definition():
    """One step by hand: gammas of 1 and a beta of 0, as a layer begins."""
    m = LSTM(I, H, seed=0, layer_norm="products", dtype="float64")
    x, h0, c0 = (np.random.default_rng(0).standard_normal((1, B, n)) for n in (I, H, H))

    def norm(v):
        return (v - v.mean(1, keepdims=True)) / np.sqrt(v.var(1, keepdims=True) + 1e-5)
    p = m.parameters()
    a = norm(x[0] @ p["weight_ih_l0"].T) + norm(h0[0] @ p["weight_hh_l0"].T) + p["bias_l0"]
    i, f, g, o = np.split(a, 4, axis=1)
    i, f, o = (1 / (1 + np.exp(-v)) for v in (i, f, o))
    c = f * c0[0] + i * np.tanh(g)
    y, (h, c_n) = m(x, (h0, c0))
    np.testing.assert_allclose(c_n[0], c, rtol=0, atol=1e-14)
    np.testing.assert_allclose(y[0], o * np.tanh(norm(c)), rtol=0, atol=1e-14)


def test_layer_norm_of_gates_is_that_of_the_definition():
    """Two steps by hand: what each gate sums, and c, which goes on normalized."""
    m = LSTM(I, H, seed=0, layer_norm="gates", dtype="float64")
    p = m.parameters()
    rng = np.random.default_rng(0)
    p["weight_layernorm_l0"][...] = gammas = rng.standard_normal((6, H))
    x, h, c = (rng.standard_normal((n, B, width)) for n, width in ((2, I), (1, H), (1, H)))
    y, (h_n, c_n) = m(x, (h, c))
    h, c = h[0], c[0]

    def norm(v):
        return (v - v.mean(1, keepdims=True)) / np.sqrt(v.var(1, keepdims=True) + 1e-5)
    for t in range(2):
        sums = np.split(x[t] @ p["weight_ih_l0"].T + h @ p["weight_hh_l0"].T, 4, axis=1)
        i, f, g, o = (gamma * norm(s) + b
                      for gamma, s, b in zip(gammas, sums, np.split(p["bias_l0"], 4)))
        i, f, o = (1 / (1 + np.exp(-v)) for v in (i, f, o))
        c = gammas[4] * norm(f * c + i * np.tanh(g)) + gammas[5]
        h = o * np.tanh(c)
        np.testing.assert_allclose(y[t], h, rtol=0, atol=1e-13)
    np.testing.assert_allclose(c_n[0], c, rtol=0, atol=1e-13)


def test_a_trace_shows_the_gates():
    m = LSTM(I, H, seed=0, coupled=True, recurrent_activation="hard_sigmoid")
    (trace,) = m.trace(np.ones((T, B, I), "float32"))
    assert (trace.f == 1 - trace.i).all()


# ---- mistakes ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, said", [
    (dict(activation="gelu"), "activation must be.*softsign.*gelu"),
    (dict(activation=("elu", -1.0)), "a number of activation must be"),
    (dict(activation=("relu", 0.1)), "activation 'relu' takes no numbers, got 1"),
    (dict(activation=("tanh", 0.0)), "above 0"),
    (dict(recurrent_activation=("hard_sigmoid", 0.2, 0.5, 1.0)), "takes 2 numbers, got 3"),
    (dict(clip=0.0), "clip must be above 0"), (dict(clip=-1.0), "clip must be"),
    (dict(clip=float("nan")), "clip must be"),
    (dict(zoneout=1.5), "zoneout must be"), (dict(zoneout=(0.1, 0.2, 0.3)), r"zoneout must be z or"),
    (dict(recurrent_dropout=2), "recurrent_dropout must be"),
    (dict(weight_dropout=-1), "weight_dropout must be"),
])
def test_a_layer_refuses(options, said):
    with pytest.raises(ValueError, match=said):
        LSTM(I, H, **options)


@pytest.mark.parametrize("options, error, said", [
    (dict(variant="clip"), TypeError, "variant must be a Variant, got str"),
    (dict(variant=Variant(h_mask=np.ones((B, H)))), TypeError, "h_mask must be float32"),
    (dict(variant=Variant(h_mask=np.ones((B, H + 1), "float32"))), ValueError, r"h_mask must be \(B, H\)"),
    (dict(variant=Variant(zone_masks=np.ones((T, B, H), "float32"))), ValueError, "zone_masks must"),
    (dict(variant=Variant(), W_hr=np.ones((2, H), "float32")), ValueError, "no projection"),
    (dict(variant=Variant(zoneout=0.1), peepholes=np.ones((3, H), "float32")), ValueError, "peepholes"),
])
def test_a_call_refuses(options, error, said):
    problem = lstm_problem(T, B, I, H, dtype="float32", P=2 if "W_hr" in options else None)
    with pytest.raises(error, match=said):
        functional.lstm_forward(**{**problem.inputs, **options})


def test_a_mask_that_has_changed_is_noticed():
    problem = lstm_problem(T, B, I, H, dtype="float32", variant="recurrent dropout")
    tape = forward(functional, problem)[-1]
    tape.batch.variant.mask.resize((1, 1), refcheck=False)
    with pytest.raises(ValueError, match="h_mask of the tape"):
        functional.lstm_backward(tape, **problem.upstream)


def test_a_step_takes_no_masks():
    problem = lstm_problem(T, B, I, H, dtype="float32", states=False)
    weights = {name: problem.inputs[name] for name in ("W_ih", "W_hh", "b")}
    with pytest.raises(ValueError, match="for training"):
        functional.Step("lstm_varied", B, **weights, variant=Variant(h_mask=np.ones((B, H), "float32")))
    with pytest.raises(ValueError, match="takes a variant"):
        functional.Step("lstm_varied", B, **weights)
    with pytest.raises(ValueError, match="takes no variant"):
        functional.Step("lstm", B, **weights, variant=Variant())


# ---- other libraries ---------------------------------------------------------------------------------

@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("options", [
    dict(clip=0.5), dict(coupled=True), dict(peepholes=True, clip=0.7, coupled=True),
    dict(recurrent_activation=("hard_sigmoid", 0.3, 0.4), activation="softsign",
         cell_activation=("tanh", 1.5, 0.7)),
    dict(activation=("leaky_relu", 0.1), cell_activation=("thresholded_relu", 0.2)),
    dict(activation="elu", cell_activation="relu"), dict(activation=("linear", 0.5, 0.1))], ids=str)
def test_onnxruntime_computes_what_is_written(options, bidirectional, tmp_path):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    m = LSTM(4, 6, 2, bidirectional=bidirectional, seed=1, **options).eval()
    x = 2 * np.random.default_rng(0).standard_normal((9, 2, 4), dtype="float32")
    m.save(tmp_path / "m.onnx")
    got = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, {"x": x})[0]
    np.testing.assert_allclose(got, m(x)[0], rtol=0, atol=1e-5)
    assert (lstmcore.load(tmp_path / "m.onnx")(x)[0] == m(x)[0]).all()
    read = lstmcore.formats.onnx_graph.Graph(str(tmp_path / "m.onnx")).run({"x": x})
    np.testing.assert_allclose(next(iter(read.values())), m(x)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("options, said", [(dict(zoneout=0.1), "zoneout"), (dict(activation="selu"), "selu"),
                                           (dict(dtype="float64", coupled=True), "float32 alone")])
def test_what_onnx_does_not_have_is_not_written(options, said, tmp_path):
    pytest.importorskip("onnx")
    with pytest.raises(ValueError, match=said):
        LSTM(4, 5, **options).save(tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [
    dict(recurrent_activation="hard_sigmoid"), dict(activation="relu"), dict(activation=None),
    dict(activation="leaky_relu"), dict(activation="selu", recurrent_activation="hard_sigmoid"),
    dict(recurrent_dropout=0.3)], ids=str)
def test_keras_s_layers_load_and_are_written(options, tmp_path):
    keras = pytest.importorskip("keras")
    pytest.importorskip("h5py")
    layer = keras.layers.LSTM(5, return_sequences=True, **options)
    model = keras.Sequential([keras.Input((None, 4)), layer])
    model.save(tmp_path / "m.keras")
    x = np.random.default_rng(0).standard_normal((2, 6, 4)).astype("float32")
    m = lstmcore.load(tmp_path / "m.keras")
    np.testing.assert_allclose(m(x)[0], model.predict(x, verbose=0), rtol=0, atol=1e-6)
    m.save(tmp_path / "m.weights.h5")
    again = lstmcore.load(tmp_path / "m.weights.h5")
    assert (again(x)[0] == m(x)[0]).all() and again.describe() == m.describe()
    assert m.recurrent_dropout == options.get("recurrent_dropout", 0)


@pytest.mark.filterwarnings("ignore")
def test_recurrent_dropout_is_keras_s():
    """With one mask for all gates: Keras draws one for each."""
    keras = pytest.importorskip("keras")
    from keras import ops
    layer = keras.layers.LSTM(5, return_sequences=True, recurrent_dropout=0.4)
    layer.build((2, 6, 4))
    mask = (np.arange(10).reshape(2, 5) % 3 > 0).astype("float32") / 0.6
    layer.cell.get_recurrent_dropout_mask = lambda step_input: [ops.convert_to_tensor(mask)] * 4
    x = np.random.default_rng(0).standard_normal((2, 6, 4)).astype("float32")
    want = ops.convert_to_numpy(layer(x, training=True))
    kernel, recurrent, bias = (np.ascontiguousarray(w) for w in layer.get_weights())
    got = functional.lstm_forward(x.swapaxes(0, 1), np.ascontiguousarray(kernel.T),
                                  np.ascontiguousarray(recurrent.T), bias, variant=Variant(h_mask=mask))[0]
    np.testing.assert_allclose(got.swapaxes(0, 1), want, rtol=0, atol=1e-6)


def test_weight_dropout_is_that_of_the_weights():
    m = LSTM(I, H, seed=0, weight_dropout=0.5, dtype="float64")
    x = np.random.default_rng(0).standard_normal((T, B, I))
    y = m(x)[0]
    ((_, ((_, mask),)),) = m._tape[2][0]
    plain = LSTM(I, H, seed=0, dtype="float64")
    plain.parameters()["weight_hh_l0"][...] *= mask
    assert (plain(x)[0] == y).all() and set(np.unique(mask)) == {0, 2}


def test_every_activation_has_a_name_and_its_numbers():
    for name, (kind, alpha, beta, _) in ACTIVATIONS.items():
        assert activation("activation", name) == (kind, alpha, beta)
