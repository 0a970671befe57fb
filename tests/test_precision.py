"""bfloat16 and int8 in layers.

The kernels' own bits are proven elsewhere; here a layer's single step is held against the reference
in its format, many steps against float32 in the mean (h falls on another side of a rounding sooner or
later), and everything that promises the same bits against itself.
"""

import copy
import pickle

import numpy as np
import pytest

import lstmcore
from lstmcore import (GRU, LSTM, RNN, Dropout, Embedding, Linear, Module, Sequential, Stack, Tanh, dense,
                      reference)
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
    "gru": lambda **o: GRU(I, H, 2, bidirectional=True, seed=1, **o),
    "gru, one way": lambda **o: GRU(I, H, seed=1, **o),
    "gru, reset before": lambda **o: GRU(I, H, reset_after=False, seed=1, **o),
    "gru, no bias": lambda **o: GRU(I, H, bias=False, seed=1, **o),
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


@both
@pytest.mark.parametrize("name", ["lstm", "without bias", "peepholes", "projected", "relu",
                                  "gru, one way", "gru, reset before"])
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
    elif isinstance(layer, GRU):
        options["reset_after"] = layer.reset_after
    else:
        options["nonlinearity"] = "relu"
    call = getattr(reference, type(layer).__name__.lower() + "_forward")
    args = x.astype("float64"), w["weight_ih_l0"], w["weight_hh_l0"]
    want = call(*args, h0=h[0].astype("float64"), **options)
    # m = o tanh(c) before W_hr, and r h before W_hn, may be rounded to other neighbors than there
    again = name in ("projected", "gru, reset before")
    close(y, want[0], precision if again else "kernel")
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
                                  "gru, one way", "gru, reset before", "gru, no bias", "tanh",
                                  "relu"])
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
@pytest.mark.parametrize("name", ["stack", "gru", "gru, reset before", "gru, no bias"])
@pytest.mark.parametrize("frozen_table", [False, True])
def test_a_table_of_tokens_gives_the_rows_bits(name, precision, frozen_table):
    layer, table = spread(LAYERS[name]()).freeze(precision), Embedding(9, I, seed=3)
    if frozen_table:
        table.freeze(precision)
    ids = np.random.default_rng(2).integers(0, 9, (T, B))
    assert ids.size > 9             # so that the table is projected, not the rows
    layers = [layer]
    if precision == "bfloat16":
        layers.append(spread(LAYERS[name](compute="bfloat16")).eval())
    for layer in layers:
        assert (layer(ids, embedding=table)[0] == layer(table(ids))[0]).all()


@pytest.mark.parametrize("kind", [LSTM, GRU])
def test_training_on_a_table_gives_the_rows_gradients_in_bfloat16(kind, close, monkeypatch):
    seen, backward = [], dense.linear_backward
    monkeypatch.setattr(dense, "linear_backward",
                        lambda *args, **options: (seen.append(options["compute"]),
                                                  backward(*args, **options))[1])
    ids, dy = np.random.default_rng(2).integers(0, 9, (T, B)), normal(T, B, H)
    found = []
    for tabled in True, False:
        layer, table = kind(I, H, compute="bfloat16", seed=1), Embedding(9, I, seed=3)
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


@pytest.mark.parametrize("kind", [LSTM, GRU])
def test_compute_is_what_freezing_in_it_gives(kind):
    x = normal(T, B, I)
    low = kind(I, H, 2, bidirectional=True, compute="bfloat16", seed=1)
    exact = kind(I, H, 2, bidirectional=True, seed=1).eval()
    want = exact(x)[0]
    y = low(x)[0]
    assert (y == exact.freeze("bfloat16")(x)[0]).all() and (y != want).any()
    assert (low.freeze()(x)[0] == y).all()          # the same bits, as ever
    assert (low.freeze("float32")(x)[0] == want).all()
    assert (copy.deepcopy(low)(x)[0] == want).all()


@pytest.mark.parametrize("kind, options", [(LSTM, dict(peepholes=True)), (GRU, {}),
                                           (GRU, dict(reset_after=False))])
def test_training_in_bfloat16_gives_gradients_near_those_of_float32(kind, options, close):
    x, dy = normal(T, B, I), normal(T, B, H)
    layers = [kind(I, H, 2, compute=compute, seed=1, **options) for compute in (None, "bfloat16")]
    for layer in layers:
        layer(x)
        layer.backward(dy)
    exact, low = (layer.gradients() for layer in layers)
    for name, g in low.items():
        close(g, exact[name], "bfloat16")
        assert (g != exact[name]).any()


def test_layers_say_in_what_they_compute(tmp_path):
    said = [LSTM(3, 4, compute="bfloat16"), RNN(3, 4, compute="bfloat16"),
            GRU(3, 4, reset_after=False, compute="bfloat16"), Linear(3, 4, compute="bfloat16"),
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
    for make in LSTM, GRU, RNN, Linear:
        with pytest.raises(ValueError, match=r"'bfloat16', got 'int8': .*freeze\('int8'\)"):
            make(3, 4, compute="int8")
        with pytest.raises(ValueError, match="compute must be .*, got 'half'"):
            make(3, 4, compute="half")
        with pytest.raises(TypeError, match="compute='bfloat16' needs float32 arrays, got float64"):
            make(3, 4, compute="bfloat16", dtype="float64")
    for make, named in (LSTM, "an LSTM"), (GRU, "a GRU"), (RNN, "an RNN"):
        with pytest.raises(ValueError, match=rf"{named} frozen in int8 keeps nothing .* unfreeze\(\)"):
            make(3, 4).freeze("int8").trace(normal(2, 1, 3))
        assert make(3, 4).freeze("bfloat16").trace(normal(2, 1, 3))[0].h.shape == (2, 1, 4)
