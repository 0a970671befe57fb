"""bfloat16 and int8 in files, models and the command."""

import json
import os
import pickle
import tracemalloc
import warnings

import numpy as np
import pytest
from test_cli import SMALL, STORY, run, trained         # noqa: F401  (fixtures)
from test_precision import COPIES, LAYERS, LOW, B, H, I, T, normal

import lstmcore
from lstmcore import (LSTM, RNN, Embedding, LanguageModel, Linear, Sequential, Stack, Tanh, cli, dense,
                      softmax_cross_entropy)
from lstmcore.formats import read_arrays, safetensors
from lstmcore.models.sources import total_nats


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


@pytest.mark.parametrize("cell, embed_size", [("lstm", 0), ("lstm", 12), ("gru", 0), ("gru", 12)])
def test_a_language_model_in_int8(cell, embed_size, tmp_path):
    model = trained_model(cell=cell, embed_size=embed_size)
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


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_reader_of_tokens_gives_the_network_s_bits(cell):
    model = trained_model(cell=cell)
    ids = np.random.default_rng(0).integers(0, len(model.vocabulary), 9)
    for precision in (None, *LOW):
        network = model.network.freeze(precision)
        want, _ = network(ids[:, None])
        read = network.reader(None)
        assert (np.array([read(token) for token in ids]) == want[:, 0]).all()


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_training_in_bfloat16_learns_the_same_bits_for_any_threads(cell, share_small_work):
    models = [trained_model(cell=cell, compute="bfloat16", n_threads=n) for n in (1, 2, 3)]
    exact = trained_model(cell=cell)
    first = models[0].network.state_dict()
    for model in models[1:]:
        assert all((p == first[name]).all() for name, p in model.network.parameters().items())
    assert any((p != first[name]).any() for name, p in exact.network.parameters().items())
    untrained = LanguageModel(cell=cell, hidden_size=24, num_layers=2, compute="bfloat16")
    assert models[0].perplexity(TEXT) < 1.5
    assert untrained.fit(TEXT, steps=1, progress=False).perplexity(TEXT) > 1.5


def test_training_computes_its_loss_in_bfloat16():
    network = trained_model(compute="bfloat16", fit=dict(steps=2)).network.train()
    tokens, targets = np.random.default_rng(0).integers(0, network.head.out_features, (2, 20, 30))
    network.zero_grad()
    loss, dy, _ = network.loss(tokens, targets, reduction="none")
    found = {name: g.copy() for name, g in network.head.gradients().items()}
    x = network.recurrent(tokens, embedding=network.embedding)[0].reshape(600, -1)
    problem = x, *network.head.parameters().values(), targets.reshape(-1), np.ones(600, "float32")
    for compute in "bfloat16", "float32":
        losses, g = dense.linear_cross_entropy(*problem, compute=compute)
        same = compute == "bfloat16"
        assert (loss.reshape(-1) == losses).all() == (dy.reshape(x.shape) == g.dx).all() == same
        assert (found["weight"] == g.dW).all() == same


@pytest.mark.parametrize("precision", (None, *LOW))
def test_evaluation_has_the_bits_of_logits_and_their_loss(precision):
    model = trained_model(fit=dict(steps=20))
    exact, network = model.evaluate(TEXT).nats, model.freeze(precision).network
    tokens = np.array(model.vocabulary.encode(TEXT[:1500]))
    want, state = 0.0, None
    for t in range(0, len(tokens) - 1, 400):            # as total_nats has its windows
        window = tokens[t:t + 401]
        logits, state = network(window[:-1, None], state)
        want += softmax_cross_entropy(logits[:, 0], window[1:], reduction="sum")[0]
    assert total_nats(network, tokens) == want
    assert (model.evaluate(TEXT).nats == exact) == (precision is None)


def test_a_run_and_its_resumption_keep_compute(tmp_path):
    path = tmp_path / "m.safetensors"
    whole = trained_model(compute="bfloat16")
    part = trained_model(compute="bfloat16", fit=dict(steps=25, checkpoint=path))
    assert repr(part) == repr(LanguageModel.load(path)) and "compute='bfloat16'" in repr(part)
    resumed = LanguageModel.load(path).fit(TEXT, resume=path, steps=60, progress=False)
    assert all((p == whole.network.parameters()[n]).all()
               for n, p in resumed.network.parameters().items())
    with pytest.raises(ValueError, match="cannot change compute from bfloat16 to float32"):
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

    @pytest.mark.parametrize("cell", ["lstm", "gru"])
    def test_a_classifier_learns_and_predicts_in_every_precision(self, cell):
        model, low = (lstmcore.LSTMClassifier(12, cell=cell, epochs=40, random_state=0, pooling="last",
                                              bidirectional=False, lr=0.01, schedule="constant", **options)
                      .fit(self.X, self.y) for options in (dict(dtype="float32"),
                                                           dict(compute="bfloat16")))
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
        for options, error, words in (
                (dict(compute="int8"), ValueError, "compute must be .*, got 'int8': that is for inference"),
                (dict(compute="bfloat16", dtype="float64"), TypeError, "'bfloat16' needs float32 arrays"),
                (dict(compute="float64"), TypeError, "'float64' needs float64 arrays, got float32")):
            with pytest.raises(error, match=words):
                lstmcore.LSTMClassifier(2, epochs=1, **options).fit(self.X, self.y)
        with pytest.raises(ValueError, match="compute must be .*, got 'int8': that is for inference"):
            lstmcore.Forecaster(4, compute="int8").fit(np.arange(30.0))
        model = lstmcore.LSTMClassifier(2, epochs=1, random_state=0).fit(self.X, self.y)
        with pytest.raises(TypeError, match="float32, got float64: train with dtype='float32'"):
            model.freeze("int8")
        from sklearn.exceptions import NotFittedError
        with pytest.raises(NotFittedError):
            lstmcore.LSTMClassifier().freeze("int8")


# ---- the command -------------------------------------------------------------------------------------

def test_the_command_trains_and_reads_in_every_precision(run, tmp_path):        # noqa: F811
    (tmp_path / "a.txt").write_text(STORY)
    code, _, err = run("train", "a.txt", "--checkpoint", "m", "--out", "m", "--steps", 30, "--compute",
                       "bfloat16", *SMALL)
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


