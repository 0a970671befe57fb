"""bfloat16 and int8 above the kernels: layers, files, models and the command.

The kernels' own bits are proven elsewhere; here a layer's single step is held against the reference
in its format, many steps against float32 in the mean (h falls on another side of a rounding sooner or
later), and everything that promises the same bits against itself.
"""

import copy
import json
import os
import pickle
import tracemalloc
import warnings

import numpy as np
import pytest
from test_cli import SMALL, STORY, run, trained         # noqa: F401  (fixtures)

import lstmcore
from lstmcore import (LSTM, RNN, Dropout, Embedding, LanguageModel, Linear, Module, Sequential, Stack,
                      Tanh, cli, dense, reference)
from lstmcore.formats import read_arrays, safetensors
from lstmcore.functional import Quantized

LOW = "bfloat16", "int8"
I, H, B, T = 11, 19, 5, 7

LAYERS = {
    "lstm": lambda **o: LSTM(I, H, seed=1, **o),
    "without bias": lambda **o: LSTM(I, H, bias=False, seed=1, **o),
    "peepholes": lambda **o: LSTM(I, H, peepholes=True, seed=1, **o),
    "projected": lambda **o: LSTM(I, H, proj_size=6, seed=1, **o),
    "stack": lambda **o: LSTM(I, H, 2, bidirectional=True, peepholes=True, proj_size=6, seed=1, **o),
    "batch first": lambda **o: LSTM(I, H, 2, batch_first=True, seed=1, **o),
    "tanh": lambda **o: RNN(I, H, 2, seed=1, **o),
    "relu": lambda **o: RNN(I, H, nonlinearity="relu", seed=1, **o),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
both = pytest.mark.parametrize("precision", LOW)
COPIES = {"deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype="float32")


def spread(layer, factor=3):
    """The layer with weights of about 1: those of the start hardly move a state."""
    for p in layer.parameters().values():
        p *= factor
    return layer


def pair(state):
    return state if isinstance(state, tuple) else (state,)


# ---- layers ------------------------------------------------------------------------------------------

@both
@pytest.mark.parametrize("name", ["lstm", "without bias", "peepholes", "projected", "relu"])
def test_one_step_is_the_reference_s(name, precision, close):
    layer = spread(LAYERS[name]()).freeze(precision)
    w = {k: p.astype("float64") for k, p in layer.parameters().items()}
    P = w["weight_hh_l0"].shape[1]
    x, h, c = normal(1, B, I), normal(1, B, P, seed=2), normal(1, B, H, seed=3)
    lstm = isinstance(layer, LSTM)
    y, final = layer(x, (h, c) if lstm else h)
    options = dict(b=w.get("bias_l0"), keep_tape=False, compute=precision)
    if lstm:
        options.update(c0=c[0].astype("float64"), peepholes=w.get("weight_peephole_l0"),
                       W_hr=w.get("weight_hr_l0"))
    else:
        options["nonlinearity"] = "relu"
    call = reference.lstm_forward if lstm else reference.rnn_forward
    args = x.astype("float64"), w["weight_ih_l0"], w["weight_hh_l0"]
    want = call(*args, h0=h[0].astype("float64"), **options)
    # m = o tanh(c) may be rounded to another neighbor before W_hr than the reference's
    close(y, want[0], precision if name == "projected" else "kernel")
    if lstm:
        close(final[1][0], want[1][1], "kernel")
    exact = layer.unfreeze()(x, (h, c) if lstm else h)[0]
    assert np.abs(y - exact).max() > 1e-4


@both
@every_layer
def test_many_steps_stay_near_float32(name, precision):
    layer, x = spread(LAYERS[name](), 2).eval(), normal(B, T, I) / 2
    x = x if getattr(layer, "batch_first", False) else x.swapaxes(0, 1)
    want, _ = layer(x)
    error = layer.freeze(precision)(x)[0] - want
    rms, scale = np.sqrt(np.mean(error**2)), np.sqrt(np.mean(want**2))
    assert 1e-5 < rms / scale < 2e-2


@both
@every_layer
def test_bits_do_not_depend_on_threads_or_batch(name, precision, share_small_work):
    layer = spread(LAYERS[name]()).freeze(precision)
    first = getattr(layer, "batch_first", False)
    x, lengths = normal(T, B, I), np.array([T, 3, 0, T, 1])

    def call(rows, n_threads):
        layer.n_threads = n_threads
        given = x[:, rows].swapaxes(0, 1) if first else x[:, rows]
        y, state = layer(given, lengths=lengths[rows])
        return (y.swapaxes(0, 1) if first else y), *pair(state)

    whole = call(np.arange(B), 1)
    for n_threads in 1, 2, 3:
        for rows in [np.arange(B)], np.arange(B)[:, None], [np.array([4, 1, 0])]:
            for some in rows:
                for got, want in zip(call(some, n_threads), whole):
                    assert got.tobytes() == np.ascontiguousarray(want[:, some]).tobytes()


@both
@pytest.mark.parametrize("name", ["lstm", "without bias", "peepholes", "projected", "batch first",
                                  "tanh", "relu"])
def test_a_stream_gives_the_batch_s_bits(name, precision):
    layer = spread(LAYERS[name]())
    x, ids = normal(T, B, I), np.random.default_rng(1).integers(0, I, (T, B))
    layers = [layer.freeze(precision)]
    if precision == "bfloat16":
        layers.append(spread(LAYERS[name](compute="bfloat16")).eval())
    for layer in layers:
        for given in x, ids:
            want = layer(given.swapaxes(0, 1))[0].swapaxes(0, 1) if layer.batch_first \
                else layer(given)[0]
            for stream in layer.stream(B), pickle.loads(pickle.dumps(layer.stream(B))):
                assert (np.array([stream.step(x_t) for x_t in given]) == want).all()


@both
@pytest.mark.parametrize("frozen_table", [False, True])
def test_a_table_of_tokens_gives_the_rows_bits(precision, frozen_table):
    layer, table = spread(LAYERS["stack"]()).freeze(precision), Embedding(9, I, seed=3)
    if frozen_table:
        table.freeze(precision)
    ids = np.random.default_rng(2).integers(0, 9, (T, B))
    assert ids.size > 9             # so that the table is projected, not the rows
    layers = [layer]
    if precision == "bfloat16":
        layers.append(spread(LAYERS["stack"](compute="bfloat16")).eval())
    for layer in layers:
        assert (layer(ids, embedding=table)[0] == layer(table(ids))[0]).all()


def test_training_on_a_table_gives_the_rows_gradients_in_bfloat16(close, monkeypatch):
    seen, backward = [], dense.linear_backward
    monkeypatch.setattr(dense, "linear_backward",
                        lambda *args, **options: (seen.append(options["compute"]),
                                                  backward(*args, **options))[1])
    ids, dy = np.random.default_rng(2).integers(0, 9, (T, B)), normal(T, B, H)
    found = []
    for tabled in True, False:
        layer, table = LSTM(I, H, compute="bfloat16", seed=1), Embedding(9, I, seed=3)
        if tabled:
            layer(ids, embedding=table)
            layer.backward(dy)
        else:
            layer(table(ids))
            table.backward(layer.backward(dy)[0])
        found.append({**layer.gradients(), "table": table.gradients()["weight"]})
    for name, g in found[0].items():        # sums of da per row are rounded, not each da
        close(g, found[1][name], "bfloat16")
    assert seen == ["bfloat16"]


def test_one_hot_tokens_look_up_what_the_int8_weights_stand_for(close):
    layer, ids = spread(LSTM(I, H, seed=1)), np.arange(I)[None]
    floats = LSTM(I, H, seed=1)
    floats.load_state_dict(layer.state_dict())
    W_ih = floats.parameters()["weight_ih_l0"]
    W_ih[...] = Quantized.of(W_ih).floats()
    want = floats.eval()(ids)[0]            # one step from zeros: h has no part in it
    close(layer.freeze("int8")(ids)[0], want, "kernel")
    assert np.abs(layer.unfreeze()(ids)[0] - want).max() > 1e-3


@both
def test_a_linear_layer_is_the_reference_s(precision, close, share_small_work):
    layer, x = Linear(I, H, seed=0).freeze(precision), normal(T, B, I)
    want = reference.product(x.reshape(-1, I).astype("float64"),
                             layer.parameters()["weight"].T.astype("float64"), precision)
    want = (want + layer.parameters()["bias"]).reshape(T, B, H)
    y = layer(x)
    close(y, want, "kernel")
    assert np.abs(y - layer.unfreeze()(x)).max() > 1e-4
    layer.freeze(precision)
    for layer.n_threads in 1, 2, 3:
        assert (layer(x) == y).all() and (layer(x[2, 3:4]) == y[2, 3:4]).all()


def test_a_linear_layer_computes_forward_and_backward_in_bfloat16():
    low, exact = (Linear(I, H, seed=0, compute=compute) for compute in ("bfloat16", None))
    x, dy = normal(T, B, I), normal(T, B, H)
    assert (low(x) == exact.freeze("bfloat16")(x)).all()
    dx = low.backward(dy)
    want = dense.linear_backward(x.reshape(-1, I), low.parameters()["weight"], dy.reshape(-1, H),
                                 compute="bfloat16")
    assert (dx.reshape(-1, I) == want.dx).all() and (low.gradients()["weight"] == want.dW).all()


@pytest.mark.parametrize("make", [lambda: Linear(I, H, seed=0), lambda: Embedding(I, H, seed=0)])
def test_what_changed_since_is_rounded_anew(make):
    layer = make().freeze("int8").unfreeze()
    layer.parameters()["weight"][...] = normal(*layer.parameters()["weight"].shape, seed=9)
    twin = make()
    twin.load_state_dict(layer.state_dict())
    x = normal(B, I) if isinstance(layer, Linear) else np.arange(I)
    assert (layer.freeze("int8")(x) == twin.freeze("int8")(x)).all()


def test_an_embedding_in_int8_gives_rounded_rows():
    table, ids = Embedding(9, I, seed=0), np.array([[3, 0], [8, 3]])
    exact = table.eval()(ids)
    want = Quantized.of(table.parameters()["weight"]).floats()
    assert (table.freeze("int8")(ids) == want[ids]).all() and (want[ids] != exact).any()
    assert (table.freeze("bfloat16")(ids) == exact).all()


@both
@every_layer
def test_unfreeze_gives_back_every_bit(name, precision):
    layer = LAYERS[name]().eval()
    x = normal(B, T, I) if getattr(layer, "batch_first", False) else normal(T, B, I)
    arrays, before, want = layer.parameters(), layer.state_dict(), layer(x)[0]
    low = layer.freeze(precision)(x)[0]
    assert (low != want).any()
    for _ in range(2):
        for n, p in layer.parameters().items():
            assert p.dtype == "float32" and (p == before[n]).all() and not p.flags.writeable
        with pytest.raises(ValueError, match=r"cannot be trained: unfreeze\(\) it first"):
            layer.train()
        assert (layer.freeze("float32")(x)[0] == want).all()
        assert (layer.freeze(precision)(x)[0] == low).all()
    assert layer.unfreeze() is layer and (layer(x)[0] == want).all()
    assert all(p is arrays[n] and (p == before[n]).all() for n, p in layer.parameters().items())
    layer.train()


@both
@pytest.mark.parametrize("copied", COPIES)
def test_copies_keep_the_precision(copied, precision):
    net, x = Net(), np.random.default_rng(0).integers(0, 9, (T, B))
    exact, before = net.eval()(x), net.state_dict()
    y = net.freeze(precision)(x)
    twin = COPIES[copied](net)
    assert (twin(x) == y).all() and (y != exact).any()
    if copied != "copy":                    # a shallow copy has the net's own layers
        twin.unfreeze().train()
        assert all((p == before[name]).all() for name, p in twin.parameters().items())
        twin.recurrent.parameters()["weight_hh_l0"][...] = 0
        assert (twin.eval()(x) != exact).any()
    assert (net(x) == y).all()


class Net(Module):
    """Tokens -> outputs, of every kind of layer with products."""

    def __init__(self):
        self.table, self.recurrent = Embedding(9, I, seed=0), LSTM(I, H, 2, dropout=0.5, seed=1)
        self.head = Sequential(Linear(H, 6, seed=2), Tanh(), Dropout(0.5, seed=3), Linear(6, 4, seed=4))

    def __call__(self, ids):
        return self.head(self.recurrent(ids, embedding=self.table)[0])


def test_compute_is_what_freezing_in_it_gives():
    x = normal(T, B, I)
    low = LSTM(I, H, 2, bidirectional=True, compute="bfloat16", seed=1)
    exact = LSTM(I, H, 2, bidirectional=True, seed=1).eval()
    want = exact(x)[0]
    y = low(x)[0]
    assert (y == exact.freeze("bfloat16")(x)[0]).all() and (y != want).any()
    assert (low.freeze()(x)[0] == y).all()          # the same bits, as ever
    assert (low.freeze("float32")(x)[0] == want).all()
    assert (copy.deepcopy(low)(x)[0] == want).all()


def test_training_in_bfloat16_gives_gradients_near_those_of_float32(close):
    x, dy = normal(T, B, I), normal(T, B, H)
    layers = [LSTM(I, H, 2, peepholes=True, compute=compute, seed=1) for compute in (None, "bfloat16")]
    for layer in layers:
        layer(x)
        layer.backward(dy)
    exact, low = (layer.gradients() for layer in layers)
    for name, g in low.items():
        close(g, exact[name], "bfloat16")
        assert (g != exact[name]).any()


def test_layers_say_in_what_they_compute(tmp_path):
    said = [LSTM(3, 4, compute="bfloat16"), RNN(3, 4, compute="bfloat16"), Linear(3, 4, compute="bfloat16"),
            Sequential(Linear(3, 4, compute="bfloat16"), Linear(4, 2)),
            Stack([LSTM(3, 4, compute="bfloat16"), RNN(4, 2)])]
    for module in said:
        assert repr(module).count("compute='bfloat16'") == 1
        module.save(tmp_path / "m.safetensors")
        loaded = lstmcore.load(tmp_path / "m.safetensors")
        assert repr(loaded) == repr(module) and loaded.describe() == module.describe()
    said[0].save(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="m.safetensors: the LSTM computes in bfloat16: dtype must be"):
        lstmcore.load(tmp_path / "m.safetensors", dtype="float64")
    plain = LSTM(3, 4, compute="float32")
    assert plain.compute is None and "compute" not in repr(plain) and "compute" not in plain.describe()
    assert LSTM(3, 4, compute="float64", dtype="float64").compute is None


def test_a_precision_that_cannot_be_is_refused_before_anything_freezes():
    mixed = Sequential(Linear(3, 4), Linear(4, 2, dtype="float64"))
    for precision, words in (("int8", "needs weights of float32, got float64"),
                             ("float64", "needs weights of float64, got float32"),
                             ("float16", "precision must be one of float32, float64, bfloat16, int8")):
        with pytest.raises((TypeError, ValueError), match=words):
            mixed.freeze(precision)
        mixed.train()
    with pytest.raises(ValueError, match="precision must be one of"):
        Tanh().freeze("float16")
    for make in LSTM, RNN, Linear:
        with pytest.raises(ValueError, match=r"'bfloat16', got 'int8': .*freeze\('int8'\)"):
            make(3, 4, compute="int8")
        with pytest.raises(ValueError, match="compute must be .*, got 'half'"):
            make(3, 4, compute="half")
        with pytest.raises(TypeError, match="compute='bfloat16' needs float32 arrays, got float64"):
            make(3, 4, compute="bfloat16", dtype="float64")
    with pytest.raises(ValueError, match=r"an LSTM frozen in int8 keeps nothing .* unfreeze\(\)"):
        LSTM(3, 4).freeze("int8").trace(normal(2, 1, 3))
    assert LSTM(3, 4).freeze("bfloat16").trace(normal(2, 1, 3))[0].h.shape == (2, 1, 4)


# ---- files -------------------------------------------------------------------------------------------

def saved_in_int8(module, path):
    module.freeze("int8").save(path)
    return lstmcore.load(path)


MODULES = {
    **LAYERS,
    "sequential": lambda: Sequential(Linear(I, H, seed=1), Tanh(), Linear(H, 3, bias=False, seed=2)),
    "reversed": lambda: Stack([LSTM(I, H, seed=1), RNN(H, 4, seed=2)], [True, False], last_step=True),
    "embedding": lambda: Embedding(9, I, seed=1),
}


@pytest.mark.parametrize("name", MODULES)
def test_an_int8_file_gives_the_same_module(name, tmp_path):
    module = MODULES[name]()
    x = np.array([[3, 8], [0, 3]]) if name == "embedding" else normal(B, T, I)
    loaded = saved_in_int8(module, tmp_path / "m.safetensors")
    assert repr(loaded) == repr(module)

    def outputs(m):
        y = m(x)
        return [a.tobytes() for a in (y if isinstance(y, tuple) else (y,)) if isinstance(a, np.ndarray)]

    want = outputs(module)
    assert outputs(loaded) == want
    for copied in COPIES.values():
        assert outputs(copied(loaded)) == want
    lstmcore.save(loaded, tmp_path / "again.safetensors")
    first, again = ((tmp_path / f).read_bytes() for f in ("m.safetensors", "again.safetensors"))
    assert first == again
    # its parameters are what the numbers stand for, and what unfreeze gives
    arrays, before = read_arrays(tmp_path / "m.safetensors"), module.parameters()
    found = loaded.parameters()
    for n, p in found.items():
        matrix = n in arrays and arrays[n].dtype == np.int8
        assert matrix == (n.rpartition(".")[2][:9] in ("weight_ih", "weight_hh", "weight_hr", "weight"))
        want = arrays[n] * arrays[n + ".scale"][:, None] if matrix else before[n]
        assert (p == want).all() and p.dtype == "float32" and not p.flags.writeable
    loaded.zero_grad()
    loaded.unfreeze().train()
    assert all((p == found[n]).all() and p.flags.writeable for n, p in loaded.parameters().items())
    assert all((g == 0).all() and g.flags.writeable for g in loaded.gradients().values())


def test_an_int8_file_takes_a_quarter_and_loads_without_floats(tmp_path):
    layer = LSTM(256, 256, 2, seed=0)
    layer.save(tmp_path / "f.safetensors")
    layer.freeze("int8").save(tmp_path / "q.safetensors")
    whole, quarter = (os.path.getsize(tmp_path / n) for n in ("f.safetensors", "q.safetensors"))
    assert quarter < 0.27 * whole
    tracemalloc.start()
    loaded = lstmcore.load(tmp_path / "q.safetensors")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 0.7 * whole       # the file, the packed numbers and a mask
    assert len(pickle.dumps(loaded)) < 0.3 * whole


def test_a_part_in_int8_stays_a_part(tmp_path):
    net, x = Sequential(Linear(I, H, seed=1), Linear(H, 3, seed=2)).eval(), normal(B, I)
    net.layers[0].freeze("int8")
    net.save(tmp_path / "m.safetensors")
    loaded = lstmcore.load(tmp_path / "m.safetensors")
    assert (loaded(x) == net(x)).all()
    loaded.layers[1].train().parameters()["weight"][...] = 0
    with pytest.raises(ValueError, match="unfreeze"):
        loaded.layers[0].train()


def test_other_files_of_an_int8_module_hold_its_parameters(tmp_path):
    module = LSTM(I, H, seed=1)
    loaded = saved_in_int8(module, tmp_path / "m.safetensors")
    for ending in ".onnx", ".weights.h5":
        pytest.importorskip("onnx" if ending == ".onnx" else "h5py")
        for m in module, loaded:
            m.save(tmp_path / f"other{ending}")
            got = lstmcore.load(tmp_path / f"other{ending}").parameters()
            assert all((got[name] == p).all() for name, p in m.parameters().items())
    filled = lstmcore.load(tmp_path / "m.safetensors", into=LSTM(I, H)).train()
    assert all((filled.parameters()[n] == p).all() for n, p in loaded.parameters().items())
    with pytest.raises(ValueError, match="m.safetensors.*dtype must be float32"):
        lstmcore.load(tmp_path / "m.safetensors", dtype="float64")


def test_convert_writes_int8_and_floats(tmp_path):
    layer, x = LSTM(I, H, seed=1), normal(T, B, I)
    layer.save(tmp_path / "f.safetensors")
    module = lstmcore.convert(tmp_path / "f.safetensors", tmp_path / "q.safetensors", precision="int8")
    want = layer.freeze("int8")(x)[0]
    assert (module(x)[0] == want).all()
    assert (lstmcore.load(tmp_path / "q.safetensors")(x)[0] == want).all()
    lstmcore.convert(tmp_path / "q.safetensors", tmp_path / "g.safetensors", precision="float32")
    floats = lstmcore.load(tmp_path / "g.safetensors").train().parameters()
    assert all((p == floats[n]).all() for n, p in module.parameters().items()
               if n.startswith("bias")) and floats["weight_ih_l0"].dtype == "float32"
    for precision, target, words in (("int8", "x.onnx", "to .safetensors files alone, got .*x.onnx"),
                                     ("bfloat16", "x.safetensors", "'float32' or 'int8', got 'bfloat16'")):
        with pytest.raises(ValueError, match=words):
            lstmcore.convert(tmp_path / "f.safetensors", tmp_path / target, precision=precision)


DAMAGE = {
    "a missing scale": (lambda a: a.pop("weight_hh_l0.scale"), "weight_hh_l0"),
    "a scale too few": (lambda a: a.update({"weight_hh_l0.scale": a["weight_hh_l0.scale"][1:]}),
                        r"weight_hh_l0\.scale must be float32 with a scale for each row"),
    "scales of float64": (lambda a: a.update({"weight_hh_l0.scale": a["weight_hh_l0.scale"].astype("f8")}),
                          r"weight_hh_l0\.scale must be float32"),
    "an infinite scale": (lambda a: a["weight_hh_l0.scale"].__setitem__(0, np.inf),
                          "weight_hh_l0 must be within -127..127 times scales that are finite"),
    "a negative scale": (lambda a: a["weight_hh_l0.scale"].__setitem__(0, -1), "weight_hh_l0 must"),
    "a number below the least": (lambda a: a["weight_hh_l0"].__setitem__((0, 0), -128),
                                 "weight_hh_l0 must be within -127..127"),
    "a matrix that is not rounded": (
        lambda a: a.update({"weight_ih_l0": a["weight_ih_l0"].astype("f4"),
                            "weight_ih_l0.scale": np.zeros(0, "f4")}), "weight_ih_l0"),
    "another shape": (lambda a: a.update({"weight_hh_l0": a["weight_hh_l0"][:, 1:]}), "weight_hh"),
    "int8 biases": (lambda a: a.update({"bias_ih_l0": a["bias_ih_l0"].astype("i1")}), "bias"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_int8_file_is_named(damage, tmp_path):
    LSTM(I, H, seed=1).freeze("int8").save(tmp_path / "m.safetensors")
    arrays, said = safetensors.read(tmp_path / "m.safetensors")
    arrays = {name: a.copy() for name, a in arrays.items()}
    change, words = DAMAGE[damage]
    change(arrays)
    safetensors.write(tmp_path / "bad.safetensors", arrays, said)
    with pytest.raises(ValueError, match=rf"bad\.safetensors.*{words}"):
        lstmcore.load(tmp_path / "bad.safetensors")


# ---- models ------------------------------------------------------------------------------------------

TEXT = "she sells sea shells by the sea shore. " * 60


def trained_model(**options):
    n_threads = options.pop("n_threads", None)
    fit = {"steps": 60, **options.pop("fit", {})}
    model = LanguageModel(hidden_size=24, num_layers=2, seed=0, **options)
    with lstmcore.threads(n_threads or 1):
        return model.fit(TEXT, lr=0.02, seq_length=20, batch_size=8, progress=False, **fit)


@pytest.mark.parametrize("embed_size", [0, 12])
def test_a_language_model_in_int8(embed_size, tmp_path):
    model = trained_model(embed_size=embed_size)
    exact = model.perplexity(TEXT)
    assert model.freeze("int8") is model
    low, written = model.perplexity(TEXT), model.sample("she ", 30, seed=1)
    assert low != exact and low < 1.02 * exact and exact < 2
    model.save(tmp_path / "m.safetensors")
    for loaded in LanguageModel.load(tmp_path / "m.safetensors"), lstmcore.load(tmp_path / "m.safetensors"), \
            pickle.loads(pickle.dumps(model)):
        assert loaded.perplexity(TEXT) == low and loaded.sample("she ", 30, seed=1) == written
        with pytest.raises(ValueError, match=r"unfreeze\(\)"):
            loaded.fit(TEXT, steps=1, progress=False)
    loaded = LanguageModel.load(tmp_path / "m.safetensors").unfreeze()
    assert loaded.perplexity(TEXT) < 1.02 * exact
    loaded.fit(TEXT, steps=1, progress=False)
    assert model.unfreeze().perplexity(TEXT) == exact
    model.save(tmp_path / "f.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        part = lstmcore.convert(tmp_path / "m.safetensors", tmp_path / "r.safetensors", "recurrent")
    assert part.hidden_size == 24


def test_a_reader_of_tokens_gives_the_network_s_bits():
    model = trained_model()
    ids = np.random.default_rng(0).integers(0, len(model.vocabulary), 9)
    for precision in (None, *LOW):
        network = model.network.freeze(precision)
        want, _ = network(ids[:, None])
        read = network.reader(None)
        assert (np.array([read(token) for token in ids]) == want[:, 0]).all()


def test_training_in_bfloat16_learns_the_same_bits_for_any_threads(share_small_work):
    models = [trained_model(compute="bfloat16", n_threads=n) for n in (1, 2, 3)]
    exact = trained_model()
    first = models[0].network.state_dict()
    for model in models[1:]:
        assert all((p == first[name]).all() for name, p in model.network.parameters().items())
    assert any((p != first[name]).any() for name, p in exact.network.parameters().items())
    assert models[0].perplexity(TEXT) < 1.5 < LanguageModel(
        hidden_size=24, num_layers=2, compute="bfloat16").fit(TEXT, steps=1, progress=False).perplexity(TEXT)


def test_a_run_and_its_resumption_keep_compute(tmp_path):
    path = tmp_path / "m.safetensors"
    whole = trained_model(compute="bfloat16")
    part = trained_model(compute="bfloat16", fit=dict(steps=25, checkpoint=path))
    assert repr(part) == repr(LanguageModel.load(path)) and "compute='bfloat16'" in repr(part)
    resumed = LanguageModel.load(path).fit(TEXT, resume=path, steps=60, progress=False)
    assert all((p == whole.network.parameters()[n]).all()
               for n, p in resumed.network.parameters().items())
    with pytest.raises(ValueError, match="is the run of another model"):
        LanguageModel(hidden_size=24, num_layers=2).fit(TEXT, resume=path, progress=False)
    trained_model(fit=dict(steps=1, checkpoint=path))
    assert "compute" not in json.loads(safetensors.read(path)[1]["lstmcore.language_model"])["config"]


def test_a_language_model_says_what_it_wants():
    with pytest.raises(ValueError, match="has no weights yet"):
        LanguageModel().freeze("int8")
    with pytest.raises(TypeError, match="compute='bfloat16' needs float32"):
        LanguageModel(compute="bfloat16", dtype="float64")
    double = LanguageModel(hidden_size=4, num_layers=1, dtype="float64").fit(TEXT, steps=1, progress=False)
    with pytest.raises(TypeError, match="precision='int8' needs weights of float32, got float64"):
        double.freeze("int8")


class TestEstimators:
    @pytest.fixture(autouse=True)
    def data(self):
        pytest.importorskip("sklearn")
        self.X = np.random.default_rng(0).standard_normal((120, 8))
        self.y = (self.X[:, :4].sum(axis=1) > 0).astype(int)

    def test_a_classifier_learns_and_predicts_in_every_precision(self):
        model = lstmcore.LSTMClassifier(12, epochs=40, random_state=0, dtype="float32").fit(self.X, self.y)
        low = lstmcore.LSTMClassifier(12, epochs=40, random_state=0, compute="bfloat16").fit(self.X, self.y)
        assert low.network_.recurrent.compute == low.network_.head.compute == "bfloat16"
        assert low.network_.recurrent.dtype == "float32" and low.score(self.X, self.y) > 0.9
        want = model.predict_proba(self.X)
        for precision in LOW:
            got = model.freeze(precision).predict_proba(self.X)
            assert 0 < np.abs(got - want).max() < 0.1
            assert (pickle.loads(pickle.dumps(model)).predict_proba(self.X) == got).all()
        with pytest.raises(ValueError, match=r"unfreeze\(\)"):
            model.partial_fit(self.X, self.y)
        assert (model.unfreeze().predict_proba(self.X) == want).all()
        assert model.freeze("int8").fit(self.X, self.y).network_.recurrent.training is False
        model.partial_fit(self.X, self.y)       # a new fit is not frozen

    def test_text_and_regression_in_int8(self):
        words = ["aab", "aba", "baa", "a", "xxy", "yx", "yxxy", "xy"]
        model = lstmcore.LSTMClassifier(8, random_state=0).fit(words, list("llllrrrr")).freeze("int8")
        assert list(model.predict(["abaaba", "yyx"])) == ["l", "r"]
        t = np.arange(200)
        series = np.sin(t / 4) + t / 50
        regressor = lstmcore.LSTMRegressor(8, epochs=5, random_state=0)
        forecaster = lstmcore.Forecaster(10, 5, regressor=regressor, compute="bfloat16").fit(series)
        want = forecaster.predict(5)
        got = forecaster.freeze("int8").predict(5)
        assert 0 < np.abs(got - want).max() < 0.1
        assert (forecaster.unfreeze().predict(5) == want).all()
        assert forecaster.regressor_.compute == "bfloat16" and regressor.compute is None

    def test_estimators_say_what_they_want(self):
        for options, words in ((dict(compute="int8"), "compute must be None, 'float32' or 'bfloat16'"),
                               (dict(compute="bfloat16", dtype="float64"), "needs dtype='float32' or None")):
            with pytest.raises(ValueError, match=words):
                lstmcore.LSTMClassifier(2, epochs=1, **options).fit(self.X, self.y)
        with pytest.raises(ValueError, match="compute must be 'float32', 'bfloat16' or None, got 'int8'"):
            lstmcore.Forecaster(4, compute="int8")
        model = lstmcore.LSTMClassifier(2, epochs=1, random_state=0).fit(self.X, self.y)
        with pytest.raises(TypeError, match="fitted in float64: give it dtype='float32'"):
            model.freeze("int8")
        from sklearn.exceptions import NotFittedError
        with pytest.raises(NotFittedError):
            lstmcore.LSTMClassifier().freeze("int8")


# ---- the command -------------------------------------------------------------------------------------

def test_the_command_trains_and_reads_in_every_precision(run, tmp_path):        # noqa: F811
    (tmp_path / "a.txt").write_text(STORY)
    code, _, err = run("train", "a.txt", "--out", "m", "--steps", 30, "--compute", "bfloat16", *SMALL)
    assert code == 0 and "compute='bfloat16'" in err
    code, _, err = run("train", "a.txt", "--resume", "m", "--steps", 31, "--compute", "float32")
    assert code == 2 and err == ("lstmcore: a resumed run cannot change --compute from bfloat16 to "
                                 "float32\n")
    assert run("train", "a.txt", "--resume", "m", "--steps", 31, "--no-sample",
               "--compute", "bfloat16")[0] == 0
    nats = {}
    for precision in ("float32", "bfloat16", "int8"):
        code, out, _ = run("eval", "m", "a.txt", "--json", "--precision", precision)
        assert code == 0
        nats[precision] = json.loads(out)["nats"]
        assert run("sample", "m", "--seed", 1, "--length", 9, "--precision", precision)[0] == 0
    assert len(set(nats.values())) == 3 and max(nats.values()) - min(nats.values()) < 0.02
    assert json.loads(run("eval", "m", "a.txt", "--json")[1])["nats"] == nats["bfloat16"]


def test_the_command_writes_int8_files(run, trained):           # noqa: F811
    code, _, err = run("convert", "m", "q.safetensors", "--precision", "int8")
    assert code == 0 and "saved" in err
    assert os.path.getsize("q.safetensors") < os.path.getsize("m")
    as_said = run("eval", "m", "story.txt", "--precision", "int8")
    assert run("eval", "q.safetensors", "story.txt") == as_said != run("eval", "m", "story.txt")
    assert run("sample", "q.safetensors", "--length", 20)[0] == 0
    assert run("inspect", "q.safetensors", "story.txt", "--limit", 40)[0] == 0
    code, _, err = run("convert", "m", "q.onnx", "--precision", "int8")
    assert code == 2 and err.count("\n") == 1 and "--precision" not in err and ".safetensors" in err
    assert run("convert", "q.safetensors", "f.safetensors", "--precision", "float32")[0] == 0
    assert not isinstance(cli.main(["eval", "f.safetensors", "story.txt"]), Exception)
    for args in (("sample", "m", "--precision", "int4"), ("train", "--compute", "int8")):
        code, _, err = run(*args)
        assert code == 2 and "invalid choice" in err


