"""Keras's files against Keras itself, and our HDF5 reader against h5py."""

import json

import fuzz_formats
import numpy as np
import pytest

import lstmcore
from lstmcore import formats
from lstmcore.formats import hdf5
from lstmcore.formats import keras as keras_files

h5py = pytest.importorskip("h5py")


@pytest.fixture(scope="module")
def keras():
    pytest.importorskip("torch")
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("keras")


def build(keras, *layers, functional=False):
    """A model of these layers with random weights and biases."""
    x = keras.layers.Input((None, 5))
    y = x
    for layer in layers:
        y = layer(y)
    model = keras.Model(x, y) if functional else keras.Sequential([x, *layers])
    rng = np.random.default_rng(len(layers))
    model.set_weights([rng.normal(size=w.shape) * 0.5 for w in model.get_weights()])
    return model


def stacks(keras):
    L = keras.layers
    return [
        [L.LSTM(4, return_sequences=True)],
        [L.LSTM(4, return_sequences=True), L.Dropout(0.3), L.LSTM(4, return_sequences=True)],
        [L.Bidirectional(L.LSTM(4, return_sequences=True)),
         L.LSTM(6, return_sequences=True, use_bias=False)],
        [L.SimpleRNN(4, activation="relu", return_sequences=True),
         L.Bidirectional(L.SimpleRNN(3, return_sequences=True))],
        [L.LSTM(4)],
        [L.LSTM(4, return_sequences=True), L.LSTM(4)],
        [L.LSTM(4, return_sequences=True), L.Bidirectional(L.LSTM(3))],
        [L.SimpleRNN(4, activation="relu")],
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("n, functional", [(0, False), (1, True), (2, False), (3, True), (4, False),
                                           (5, True), (6, False), (7, True)])
def test_keras_models_compute_the_same(tmp_path, keras, n, functional):
    model = build(keras, *stacks(keras)[n], functional=functional)
    x = np.random.default_rng(9).normal(size=(3, 7, 5)).astype("float32")
    want = model.predict(x, verbose=0)
    for ending in (".keras", ".h5"):
        model.save(tmp_path / f"m{ending}")
        m = lstmcore.load(tmp_path / f"m{ending}")
        assert m(x)[0].shape == want.shape
        np.testing.assert_allclose(m(x)[0], want, rtol=0, atol=1e-6)
    m.save(tmp_path / "back.weights.h5")
    assert repr(lstmcore.load(tmp_path / "back.weights.h5")) == repr(m)
    model.set_weights([np.zeros_like(w) for w in model.get_weights()])
    model.load_weights(tmp_path / "back.weights.h5")
    np.testing.assert_array_equal(model.predict(x, verbose=0), want)
    model.set_weights([a for layer in keras_files.arrays(m) for a in layer])
    np.testing.assert_array_equal(model.predict(x, verbose=0), want)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize("use_bias", [True, False])
def test_keras_grus_compute_the_same(tmp_path, keras, reset_after, use_bias):
    """A last bit may differ: Keras adds its two biases one after the other."""
    L, options = keras.layers, dict(reset_after=reset_after, use_bias=use_bias, return_sequences=True)
    model = build(keras, L.Bidirectional(L.GRU(4, **options)), L.RNN(L.GRUCell(
        3, reset_after=reset_after, use_bias=use_bias), return_sequences=True))
    x = np.random.default_rng(9).normal(size=(3, 7, 5)).astype("float32")
    want = model.predict(x, verbose=0)
    for ending in (".keras", ".h5"):
        model.save(tmp_path / f"m{ending}")
        m = lstmcore.load(tmp_path / f"m{ending}")
        assert m.layers[0].reset_after == m.layers[1].reset_after == reset_after
        np.testing.assert_allclose(m(x)[0], want, rtol=0, atol=1e-6)
    m.save(tmp_path / "back.weights.h5")
    assert repr(lstmcore.load(tmp_path / "back.weights.h5")) == repr(m)
    twin = build(keras, L.Bidirectional(L.GRU(4, **options)), L.GRU(3, **options))
    for fill in (lambda: twin.load_weights(tmp_path / "back.weights.h5"),
                 lambda: twin.set_weights([a for layer in keras_files.arrays(m) for a in layer])):
        twin.set_weights([np.zeros_like(w) for w in twin.get_weights()])
        fill()
        np.testing.assert_allclose(twin.predict(x, verbose=0), want, rtol=0, atol=1e-6)
    alone = build(keras, L.GRU(4, name="gru", **options))
    alone.save_weights(tmp_path / "m.weights.h5")
    with pytest.warns(UserWarning, match="weights alone"):
        m = lstmcore.load(tmp_path / "m.weights.h5", **({} if use_bias else dict.fromkeys(
            ["reset_after"], reset_after)))
    np.testing.assert_allclose(m(x)[0], alone.predict(x, verbose=0), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_weights_alone_need_their_order(tmp_path, keras):
    L = keras.layers
    model = build(keras, L.Bidirectional(L.LSTM(4, return_sequences=True), name="first"),
                  L.LSTM(6, return_sequences=True, name="second"))
    x = np.random.default_rng(9).normal(size=(3, 7, 5)).astype("float32")
    model.save_weights(tmp_path / "m.weights.h5")
    with pytest.raises(ValueError, match="'first', 'second'"):
        lstmcore.load(tmp_path / "m.weights.h5")
    with pytest.warns(UserWarning, match="weights alone .* recurrent_activation='sigmoid'"):
        m = lstmcore.load(tmp_path / "m.weights.h5", ["first", "second"])
    np.testing.assert_allclose(m(x)[0], model.predict(x, verbose=0), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_what_keras_asks_for_is_refused_by_name(tmp_path, keras):
    L = keras.layers
    for message, layer in {
            "activation='gelu'": L.LSTM(3, activation="gelu"),
            "recurrent_activation='softplus'": L.LSTM(3, recurrent_activation="softplus"),
            "go_backwards=True": L.LSTM(3, go_backwards=True, return_sequences=True),
            "merge_mode='sum'": L.Bidirectional(L.LSTM(3), merge_mode="sum"),
            "activation='relu'.*a": L.GRU(3, activation="relu")}.items():
        build(keras, layer).save(tmp_path / "m.keras")
        with pytest.raises(ValueError, match=message):
            lstmcore.load(tmp_path / "m.keras")


@pytest.mark.filterwarnings("ignore")
def test_directions_that_differ_are_refused_and_cells_are_layers(tmp_path, keras):
    L, x = keras.layers, np.random.default_rng(9).normal(size=(3, 7, 5)).astype("float32")
    both, back = dict(return_sequences=True), dict(return_sequences=True, go_backwards=True)
    for message, layers in {
            "backward_layer asks for activation='relu'": (
                L.SimpleRNN(3, **both), L.SimpleRNN(3, activation="relu", **back)),
            "backward_layer asks for reset_after=False": (
                L.GRU(3, use_bias=False, **both), L.GRU(3, use_bias=False, reset_after=False, **back)),
            "backward_layer asks for .*recurrent_activation": (
                L.LSTM(3, **both), L.LSTM(3, recurrent_activation="hard_sigmoid", **back))}.items():
        build(keras, L.Bidirectional(layers[0], backward_layer=layers[1])).save(tmp_path / "m.keras")
        with pytest.raises(ValueError, match=message):
            lstmcore.load(tmp_path / "m.keras")
    for layer in (L.Bidirectional(L.SimpleRNN(3, activation="relu", **both)),
                  L.Bidirectional(L.RNN(L.GRUCell(3), **both))):
        model = build(keras, layer)
        for ending in "keras", "h5":
            model.save(tmp_path / f"m.{ending}")
            np.testing.assert_allclose(lstmcore.load(tmp_path / f"m.{ending}")(x)[0],
                                       model.predict(x, verbose=0), rtol=0, atol=1e-6)
    for message, layer in {"'wrapped' applies a layer": L.TimeDistributed(L.LSTM(3), name="wrapped"),
                           "several cells": L.RNN([L.LSTMCell(3), L.LSTMCell(3)])}.items():
        shape = (2, None, 5) if "wrapped" in message else (None, 5)
        keras.Sequential([keras.Input(shape), layer]).save(tmp_path / "m.keras")
        with pytest.raises(ValueError, match=message):
            lstmcore.load(tmp_path / "m.keras")


@pytest.mark.filterwarnings("ignore")
def test_models_of_a_class_of_their_own_hold_weights_alone(tmp_path, keras):
    class Own(keras.Model):
        def __init__(self, **options):
            super().__init__(**options)
            self.first = keras.layers.LSTM(3, return_sequences=True)

        def call(self, x):
            return self.first(x)
    model, x = Own(), np.random.default_rng(9).normal(size=(3, 7, 5)).astype("float32")
    want = model.predict(x, verbose=0)
    model.save(tmp_path / "m.keras")
    with pytest.warns(UserWarning, match="holds weights alone"):
        m = lstmcore.load(tmp_path / "m.keras")
    np.testing.assert_allclose(m(x)[0], want, rtol=0, atol=1e-6)
    build(keras, Own()).save(tmp_path / "m.keras")
    with pytest.raises(ValueError, match="only 'Own 1 .Own.': 'own.*/lstm.*save_weights"):
        lstmcore.load(tmp_path / "m.keras")


@pytest.mark.filterwarnings("ignore")
def test_other_layers_are_named_and_bfloat16_is_widened(tmp_path, keras):
    L = keras.layers
    model = build(keras, L.LSTM(3, dtype="bfloat16", recurrent_initializer="zeros"),
                  L.Dense(2, name="head"))
    model.save(tmp_path / "m.keras")
    with pytest.warns(UserWarning, match=r"left in the file: 'head \(Dense\)'"):
        m = lstmcore.load(tmp_path / "m.keras")
    want = np.asarray(model.get_weights()[0], "float32")
    np.testing.assert_array_equal(m.layers[0].parameters()["weight_ih_l0"], want.T)


@pytest.mark.filterwarnings("ignore")
def test_a_last_step_feeds_no_layer(tmp_path, keras):
    L = keras.layers
    build(keras, L.LSTM(3, name="a"), L.RepeatVector(2), L.LSTM(3, name="b")).save(
        tmp_path / "m.keras")
    with pytest.raises(ValueError, match="'a', 'b'"):
        lstmcore.load(tmp_path / "m.keras")
    with pytest.raises(ValueError, match="a returns its last step only .*return_sequences"):
        lstmcore.load(tmp_path / "m.keras", ["a", "b"])
    assert lstmcore.load(tmp_path / "m.keras", "a").last_step


L, R, G = lstmcore.LSTM, lstmcore.RNN, lstmcore.GRU


@pytest.mark.parametrize("make", [
    lambda: L(3, 4, 12, seed=1), lambda: L(3, 4, 2, bidirectional=True, batch_first=True, seed=1),
    lambda: L(3, 4, bias=False, dtype="float64", seed=1),
    lambda: R(3, 4, 2, nonlinearity="relu", seed=1), lambda: R(3, 4, bidirectional=True, seed=1),
    lambda: formats.Stack([R(3, 4, seed=1), L(4, 6, 2, seed=2), L(6, 2, bidirectional=True, seed=3),
                           R(4, 5, nonlinearity="relu", seed=4), G(5, 3, bidirectional=True, seed=5),
                           G(6, 3, reset_after=False, seed=6), G(3, 3, bias=False, seed=7)]),
    lambda: formats.Stack([L(3, 4, seed=1)], batch_first=True, last_step=True)])
def test_weights_that_we_write_come_back(tmp_path, make):
    m = make().eval()
    m.save(tmp_path / "m.weights.h5")
    got = lstmcore.load(tmp_path / "m.weights.h5")
    x = np.random.default_rng(0).normal(size=(5, 4, 3)).astype(m.parameters().popitem()[1].dtype)
    assert got.batch_first == m.batch_first
    np.testing.assert_array_equal(got(x)[0], m(x)[0])


def test_a_configuration_of_ours_is_not_believed(tmp_path):
    path = tmp_path / "m.weights.h5"
    L(3, 4, seed=1).save(path)
    with h5py.File(path) as file:
        said = json.loads(file.attrs["lstmcore.config"])
    for message, change in {"batch_first='yes'": {"batch_first": "yes"},
                            "unlike Keras's": {"config": 3}}.items():
        with h5py.File(path, "r+") as file:
            file.attrs["lstmcore.config"] = json.dumps({**said, **change})
        with pytest.raises(ValueError, match=message):
            lstmcore.load(path)


def legacy_file(path, kind, arrays, config=True):
    """An .h5 as Keras 2 wrote it: bytes as names, `:0` after them."""
    with h5py.File(path, "w") as file:
        group = file
        if config:
            file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": [
                {"class_name": kind, "config": {"name": "rnn", "return_sequences": True}}]})
            group = file.create_group("model_weights")
        group.attrs["layer_names"] = [b"rnn"]
        layer = group.create_group("rnn")
        names = [f"rnn/{name}:0" for name in ("kernel", "recurrent_kernel", "bias")]
        layer.attrs["weight_names"] = [name.encode() for name in names]
        for name, a in zip(names, arrays):
            layer.create_dataset(name, data=a)


@pytest.mark.parametrize("config", [True, False])
def test_keras_2_files(tmp_path, config):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=s).astype("float32") for s in ((3, 20), (5, 20), (20,))]
    legacy_file(tmp_path / "m.h5", "LSTM", arrays, config)
    said = {} if config else {"recurrent_activation": "sigmoid"}
    m = lstmcore.load(tmp_path / "m.h5", **said)
    np.testing.assert_array_equal(m.parameters()["weight_ih_l0"], arrays[0].T)
    np.testing.assert_array_equal(m.parameters()["weight_hh_l0"], arrays[1].T)


def keras_2_12_entry(kind, name, source, **config):
    return {"module": "keras.layers", "class_name": kind, "registered_name": None,
            "name": name, "inbound_nodes": [[[source, 0, 0, {}]]] if source else [],
            "config": {"name": name, "time_major": False, "go_backwards": False, **config}}


@pytest.mark.parametrize("functional", [False, True])
def test_keras_2_12_finds_layers_by_their_class(tmp_path, functional):
    """The second LSTM stands under lstm_1, also if it is called lstm."""
    rng = np.random.default_rng(0)
    weights = {n: [rng.normal(size=s).astype("f4") for s in ((I, 16), (4, 16), (16,))]
               for n, I in (("lstm", 3), ("lstm_1", 4))}
    said = dict(activation="tanh", recurrent_activation="sigmoid", return_sequences=True)
    layers = [keras_2_12_entry("InputLayer", "x", None),
              keras_2_12_entry("LSTM", "lstm_1", "x", **said),
              keras_2_12_entry("LSTM", "lstm", "lstm_1", **said)]
    config = {"module": "keras", "class_name": "Functional" if functional else "Sequential",
              "config": {"name": "m", "layers": layers}}
    with h5py.File(tmp_path / "w.h5", "w") as file:
        for n, each in weights.items():
            file.create_group(f"_layer_checkpoint_dependencies/{n}/vars")
            for k, a in enumerate(each):
                file[f"_layer_checkpoint_dependencies/{n}/cell/vars/{k}"] = a
    fuzz_formats.pack(tmp_path / "m.keras", {
        "metadata.json": b'{"keras_version": "2.12.0"}', "config.json": json.dumps(config),
        "model.weights.h5": (tmp_path / "w.h5").read_bytes()})
    m = lstmcore.load(tmp_path / "m.keras")
    assert repr(m) == "LSTM(3, 4, num_layers=2, batch_first=True)"
    for n, each in enumerate(weights.values()):
        np.testing.assert_array_equal(m.parameters()[f"weight_ih_l{n}"], each[0].T)


def test_classes_of_others_are_not_believed(tmp_path):
    """A class named LSTM in a module whose name only begins like Keras's."""
    L(3, 4, seed=1).save(tmp_path / "w.weights.h5")
    for module, fits in (("keras.layers", True), ("keras_contrib.layers", False), ("mine", False)):
        entry = {**keras_2_12_entry("LSTM", "lstm", None), "module": module}
        fuzz_formats.pack(tmp_path / "m.keras", {
            "config.json": json.dumps({"class_name": "Sequential", "config": {"layers": [entry]}}),
            "model.weights.h5": (tmp_path / "w.weights.h5").read_bytes()})
        if fits:
            lstmcore.load(tmp_path / "m.keras")
        else:
            with pytest.raises(ValueError, match="not Keras's own"):
                lstmcore.load(tmp_path / "m.keras")


def test_cudnn_layout(tmp_path):
    """Written as Keras documents the conversion: per gate, in Fortran order and transposed."""
    rng = np.random.default_rng(0)
    I, H = 3, 5
    kernel, recurrent, bias = (rng.normal(size=s).astype("float32")
                               for s in ((I, 4 * H), (H, 4 * H), (8 * H,)))
    legacy_file(tmp_path / "m.h5", "CuDNNLSTM", [kernel, recurrent, bias])
    m = lstmcore.load(tmp_path / "m.h5")
    plain = np.hstack([g.T.reshape(g.shape, order="F") for g in np.hsplit(kernel, 4)])
    np.testing.assert_array_equal(m.parameters()["weight_ih_l0"], plain.T)
    plain = np.hstack([g.T for g in np.hsplit(recurrent, 4)])
    np.testing.assert_array_equal(m.parameters()["weight_hh_l0"], plain.T)
    np.testing.assert_array_equal(m.parameters()["bias_l0"], bias[:4 * H] + bias[4 * H:])


def test_hdf5_reader_agrees_with_h5py(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "m.h5"
    with h5py.File(path, "w") as file:
        for n in range(70):                             # more than one leaf of the groups' B-tree
            group = file.create_group(f"group {n:02}/deep/er")
            group.attrs["text"], group.attrs["bytes"] = "ünïcode" * n, np.bytes_(b"abc")
            group.attrs["names"] = [f"name {k}" for k in range(n)] or "none"
            group.attrs["numbers"] = rng.normal(size=(2, n))
        for n, kind in enumerate(("<f4", ">f8", "<f2", "<i8", ">i2", "u1")):
            file.create_dataset(f"data {kind}", data=rng.normal(size=(3, n)).astype(kind))
        file["scalar"] = 2.5
    root = hdf5.read(path.read_bytes())

    def compare(node, want):
        for key, value in want.attrs.items():
            np.testing.assert_array_equal(node.attributes[key], value.astype("U")
                                          if isinstance(value, np.bytes_) else value)
        if isinstance(want, h5py.Group):
            assert node.members.keys() == want.keys()
            for key in want:
                compare(node.members[key], want[key])
        else:
            np.testing.assert_array_equal(node.array, want[()])
            assert node.array.dtype == want.dtype

    with h5py.File(path) as file:
        compare(root, file)


def test_hdf5_that_keras_does_not_write_is_refused(tmp_path):
    path = tmp_path / "m.h5"
    for message, make in {
            "compression|chunks": lambda f: f.create_dataset("a", (9, 9), "f4", compression="gzip"),
            "chunks": lambda f: f.create_dataset("a", (9, 9), "f4", chunks=(3, 3)),
            "soft links": lambda f: f.update({"a": h5py.SoftLink("/b")}),
            "two links": lambda f: f.update({"a": f, "b": f}),
            "neither a group nor an array|1.8|external": lambda f: f.create_dataset(
                "a", (9,), "f4", external=[("/etc/passwd", 0, 36)])}.items():
        with h5py.File(path, "w") as file:
            make(file)
        with pytest.raises(ValueError, match=message):
            formats.read_arrays(path)
    with h5py.File(path, "w", libver="latest") as file:
        file["a"] = np.ones(3)
    with pytest.raises(ValueError, match="classic layout"):
        formats.read_arrays(path)


def test_layers_that_keras_does_not_have_are_not_written(tmp_path):
    for message, m in {"weight_peephole": lstmcore.LSTM(2, 3, peepholes=True),
                       "weight_hr": lstmcore.LSTM(2, 3, proj_size=2),
                       "fixed initial": formats.Stack([lstmcore.RNN(2, 3)], initial=[
                           np.ones((1, 4, 3), "float32")]),
                       "go_backwards": formats.Stack([lstmcore.LSTM(2, 3)], [True])}.items():
        with pytest.raises(ValueError, match=message):
            m.save(tmp_path / "m.weights.h5")


def test_npz_weights_are_refused(tmp_path):
    fuzz_formats.pack(tmp_path / "m.keras", {"config.json": b"{}", "model.weights.npz": b""})
    with pytest.raises(ValueError, match="npz are pickled"):
        lstmcore.load(tmp_path / "m.keras")
