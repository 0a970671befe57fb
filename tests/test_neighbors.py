"""Programs around us: torch.fx, exporters to ONNX, others' arrays, encodings, closed streams."""

import importlib.util
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest


def has(*modules):
    return pytest.mark.skipif(not all(map(importlib.util.find_spec, modules)),
                              reason=f"needs {', '.join(modules)}")


# ---- PyTorch -------------------------------------------------------------------------------------

def tagger(torch, cls="LSTM", **options):
    class Tagger(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.rnn, self.head = getattr(torch.nn, cls)(4, 5, **options), torch.nn.Linear(5, 2)

        def forward(self, x):
            if cls.endswith("Cell"):
                h = self.rnn(x[0])
                return self.head(h[0] if cls == "LSTMCell" else self.rnn(x[1], h))
            y, h_n = self.rnn(x)
            return self.head(y) + self.head((h_n[0] if cls == "LSTM" else h_n)[-1])

    return Tagger()


@has("torch")
@pytest.mark.parametrize("cls, leaves", [
    ("LSTM", ["rnn", "head", "head"]), ("GRU", ["rnn", "head", "head"]), ("LSTMCell", ["rnn", "head"]),
    ("GRUCell", ["rnn", "rnn", "head"])])
def test_fx_sees_a_leaf_that_still_runs(cls, leaves):
    import torch

    import lstmcore.torch

    model, x = tagger(torch, cls), torch.randn(7, 2, 4)
    lstmcore.torch.accelerate(model)
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == leaves
    assert torch.equal(traced(x), model(x)) and traced.rnn is model.rnn


@has("torch")
def test_fx_takes_a_state_too():
    import torch

    import lstmcore.torch

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = lstmcore.torch.LSTM(4, 5)

        def forward(self, x, h, c):
            return self.rnn(x, (h, c))[0]

    step, given = Step(), (torch.randn(3, 2, 4), torch.randn(1, 2, 5), torch.randn(1, 2, 5))
    assert torch.equal(torch.fx.symbolic_trace(step)(*given), step(*given))


@has("torch")
@pytest.mark.parametrize("dynamo, needs", [(False, "onnx"), (True, "onnxscript")])
@pytest.mark.parametrize("options", [{}, dict(num_layers=2, batch_first=True), *(
    dict(cls=cls) for cls in ("GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"))], ids=str)
def test_both_exporters_write_an_accelerated_model(tmp_path, capfd, dynamo, needs, options):
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"needs {needs}")
    onnxruntime = pytest.importorskip("onnxruntime")
    import torch

    import lstmcore.torch

    model, x = tagger(torch, **options).eval(), torch.randn(2, 7, 4)
    model = model.rnn if "batch_first" in options else model    # h_n is never batch-first: it fits no y there
    assert len(lstmcore.torch.accelerate(model).replaced) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), tmp_path / "m.onnx", dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    want = model(x)
    want = (want[0] if isinstance(want, tuple) else want).detach().numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@has("torch")
def test_peepholes_are_not_exported_in_silence(tmp_path):
    import torch

    import lstmcore.torch

    model = lstmcore.torch.LSTM(4, 5, peepholes=True).eval()
    with warnings.catch_warnings(), pytest.raises(ValueError, match="cannot write peepholes"):
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (torch.zeros(3, 1, 4),), tmp_path / "m.onnx", dynamo=False)


@has("torch")
def test_restore_undoes_accelerate():
    import torch

    import lstmcore.torch

    model, x = tagger(torch, num_layers=2), torch.randn(7, 2, 4)
    torch.nn.utils.parametrizations.weight_norm(model.rnn, "weight_hh_l0")
    before, named = model(x), dict(model.named_parameters())
    assert lstmcore.torch.accelerate(model).replaced == ["rnn"]
    assert isinstance(model.rnn.eval().freeze(), lstmcore.torch.LSTM)
    assert lstmcore.torch.restore(model) == (["rnn"], {})
    assert isinstance(model.rnn, torch.nn.LSTM) and not isinstance(model.rnn, lstmcore.torch.LSTM)
    assert "_frozen" not in vars(model.rnn)
    assert torch.equal(model(x), before)
    assert all(p is named[name] for name, p in model.named_parameters())


@has("torch")
def test_quantization_is_warned_of_and_honored_after_restore():
    import torch

    import lstmcore.torch

    quantize = torch.ao.quantization.quantize_dynamic
    model = tagger(torch)
    lstmcore.torch.accelerate(model)
    with pytest.warns(UserWarning, match="stays as it is"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        quantize(model, {torch.nn.LSTM})
    lstmcore.torch.restore(model)
    assert type(model.rnn) is torch.nn.LSTM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = quantize(model, {torch.nn.LSTM})
    assert "quantized" in type(quantized.rnn).__module__


@has("torch")
def test_restore_keeps_what_torch_cannot_compute():
    import torch

    import lstmcore.torch

    class Own(lstmcore.torch.LSTM):
        pass

    model = torch.nn.ModuleDict({"a": lstmcore.torch.LSTM(2, 3, peepholes=True), "b": Own(2, 3)})
    replaced, refused = lstmcore.torch.restore(model)
    assert replaced == [] and refused["a"] == "torch.nn.LSTM has no peepholes"
    assert refused["b"].endswith("Own is a subclass with code of its own")
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got int"):
        lstmcore.torch.restore(3)


# ---- skorch --------------------------------------------------------------------------------------

@has("torch", "skorch")
def test_skorch_trains_clones_and_searches():
    import pickle

    import torch
    from sklearn.base import clone
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer
    from skorch import NeuralNetClassifier

    import lstmcore.torch

    class Last(torch.nn.Module):
        def __init__(self, lstm, units=5):
            super().__init__()
            self.rnn, self.head = lstm(2, units, batch_first=True), torch.nn.Linear(units, 2)

        def forward(self, x):
            return self.head(self.rnn(x)[1][0][-1])

    def net(lstm):
        torch.manual_seed(0)
        return NeuralNetClassifier(Last, module__lstm=lstm, criterion=torch.nn.CrossEntropyLoss,
                                   max_epochs=3, lr=0.5, train_split=None, verbose=0)

    X = np.random.default_rng(0).standard_normal((40, 6, 2), dtype="float32")
    y = (X[:, -1, 0] > 0).astype("int64")
    ours = net(lstmcore.torch.LSTM).fit(X, y)
    assert type(ours.module_.rnn) is lstmcore.torch.LSTM
    np.testing.assert_allclose(ours.predict_proba(X), net(torch.nn.LSTM).fit(X, y).predict_proba(X),
                               rtol=0, atol=1e-5)
    with pytest.raises(AttributeError, match="local object"):
        pickle.dumps(ours)      # the class is local: what skorch says of any module
    assert clone(ours).get_params()["module__lstm"] is lstmcore.torch.LSTM
    weights = pickle.loads(pickle.dumps(ours.module_.rnn))
    assert torch.equal(weights.weight_hh_l0, ours.module_.rnn.weight_hh_l0)
    search = GridSearchCV(make_pipeline(FunctionTransformer(np.negative), net(lstmcore.torch.LSTM)),
                          {"neuralnetclassifier__module__units": [2, 4]}, cv=2).fit(X, y)
    assert search.best_params_["neuralnetclassifier__module__units"] in (2, 4)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


# ---- threadpoolctl -------------------------------------------------------------------------------

def test_threadpoolctl_sees_and_limits_the_pool():
    from threadpoolctl import threadpool_info, threadpool_limits

    import lstmcore

    def pools():
        return [pool for pool in threadpool_info() if pool["user_api"] == "lstmcore"]

    lstmcore.LSTM(2, 3)(np.zeros((4, 1, 2), "float32"))
    before = lstmcore.get_num_threads()
    (pool,) = pools()
    assert (pool["num_threads"], pool["version"]) == (before, lstmcore.__version__)
    assert os.path.basename(pool["filepath"]).startswith("_kernels")
    for limits in (before + 1, {"lstmcore": before + 1}):
        with threadpool_limits(limits):
            assert lstmcore.get_num_threads() == before + 1 == pools()[0]["num_threads"]
            with lstmcore.threads(before + 2):
                assert lstmcore.get_num_threads() == before + 2
        assert lstmcore.get_num_threads() == before
    with threadpool_limits(1, user_api="blas"):
        assert lstmcore.get_num_threads() == before
    with lstmcore.threads(before + 2), threadpool_limits(before + 1):
        pass
    assert lstmcore.get_num_threads() == before     # what a context says is not the process's


# ---- tensors and datasets as X -------------------------------------------------------------------

class Dataset:
    """What h5py and xarray hand out: a shape, items, and a way to become an array."""

    def __init__(self, values):
        self.values, self.shape, self.dtype = values, values.shape, values.dtype

    def __len__(self):
        return len(self.values)

    def __getitem__(self, at):
        return self.values[at]

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)


@has("sklearn")
@pytest.mark.parametrize("make", [Dataset, "torch", "h5py", "xarray"])
def test_three_axes_of_other_libraries(make, tmp_path):
    from lstmcore import LSTMClassifier

    X, y = np.random.default_rng(0).standard_normal((20, 6, 2)), np.arange(20) % 2
    if isinstance(make, str):
        library = pytest.importorskip(make)
    if make == "torch":
        given = library.tensor(X)
    elif make == "h5py":
        given = library.File(tmp_path / "x.h5", "w").create_dataset("X", data=X)
    elif make == "xarray":
        given = library.DataArray(X)
    else:
        given = make(X)
    model = LSTMClassifier(2, epochs=2, random_state=0)
    want = model.fit(X, y).predict_proba(X)
    assert (model.fit(given, y).predict_proba(given) == want).all()


# ---- the command line's streams ------------------------------------------------------------------

@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A model of a text that few encodings can write."""
    from lstmcore import LanguageModel

    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    text = "grüße “aus” 東京 ☃\n" * 60
    LanguageModel(hidden_size=4, num_layers=1, seed=0).fit(
        text, steps=2, progress=False, seq_length=10, batch_size=4).save(path)
    return path


def command(*arguments, redirect="", **env):
    """The command's exit code, output and errors, its streams redirected by a shell."""
    line = 'exec "$0" -m lstmcore "$@" ' + redirect
    done = subprocess.run(["sh", "-c", line, sys.executable, *map(str, arguments)],
                          capture_output=True, env={**os.environ, **env}, stdin=subprocess.DEVNULL)
    return done.returncode, done.stdout, done.stderr.decode()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "koi8-r", "utf-8"])
def test_a_text_reaches_a_pipe_of_any_encoding(written, encoding):
    code, out, said = command("sample", written, "--length", 200, "--seed", 1,
                              PYTHONIOENCODING=encoding)
    assert (code, said) == (0, "")
    _, whole, _ = command("sample", written, "--length", 200, "--seed", 1, PYTHONIOENCODING="utf-8")
    assert out == whole.decode().encode(encoding, "backslashreplace")


@pytest.mark.skipif(os.name == "nt", reason="the shell's redirections")
@pytest.mark.parametrize("arguments", [
    ("train", "-", "--steps", "1"), ("sample", None, "--prime", "-"), ("eval", None, "-")])
def test_closed_standard_input_is_one_line(written, arguments, tmp_path):
    given = [written if a is None else a for a in arguments]
    if given[0] == "train":
        given += ["--out", tmp_path / "out.safetensors"]
    code, _, said = command(*given, redirect="<&-")
    assert code == 2 and "Traceback" not in said
    assert said.splitlines()[-1] == "lstmcore: standard input is closed"


@pytest.mark.skipif(os.name == "nt", reason="the shell's redirections")
@pytest.mark.parametrize("redirect", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_outputs_end_no_training(tmp_path, redirect):
    (tmp_path / "t.txt").write_text("once more unto the breach, dear friends\n" * 60)
    code, out, said = command("train", tmp_path / "t.txt", "--steps", 1, "--hidden", 8, "--layers",
                              1, "--out", tmp_path / "m.safetensors", redirect=redirect)
    assert code == 0 and "Traceback" not in said
    assert command("sample", tmp_path / "m.safetensors", "--length", 5)[0] == 0
    if redirect == "2>&-":
        assert b"saved" not in out      # what belongs to standard error does not go elsewhere
