"""safetensors and PyTorch archives: what comes in is what the other side wrote, and back."""

import argparse
import collections
import itertools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import fuzz_formats
import numpy as np
import pytest

import lstmcore
from lstmcore import formats
from lstmcore.formats import safetensors

# One rounding of b_ih + b_hh more or less, and another library's order of sums, over 7 steps.
ABSOLUTE = {"float32": 1e-6, "float64": 1e-12}


def random_state_dict(I, H, L, D, P=0, seed=0, dtype="float32"):
    """A torch.nn.LSTM's state_dict without torch: two biases, none of them zero."""
    rng, found = np.random.default_rng(seed), {}
    for n, suffix in itertools.product(range(L), ["", "_reverse"][:D]):
        shapes = {"weight_ih": (4 * H, I if n == 0 else D * (P or H)), "weight_hh": (4 * H, P or H),
                  "bias_ih": (4 * H,), "bias_hh": (4 * H,)}
        shapes.update({"weight_hr": (P, H)} if P else {})
        for name, shape in shapes.items():
            found[f"{name}_l{n}{suffix}"] = rng.uniform(-0.6, 0.6, shape).astype(dtype)
    return found


def same_parameters(got, want):
    assert got.parameters().keys() == want.parameters().keys()
    for name, p in want.parameters().items():
        np.testing.assert_array_equal(got.parameters()[name], p)


@pytest.mark.parametrize("options", [
    dict(num_layers=2, bidirectional=True), dict(proj_size=3, peepholes=True, dtype="float64"),
    dict(bias=False, batch_first=True, dropout=0.25, num_layers=3)])
def test_saved_layer_comes_back(tmp_path, options):
    m = lstmcore.LSTM(4, 6, seed=1, **options).eval()
    m.save(tmp_path / "m.safetensors")
    got = lstmcore.load(tmp_path / "m.safetensors")
    assert repr(got) == repr(m) and not got.training
    same_parameters(got, m)


def test_saved_rnn_and_stack_come_back(tmp_path):
    rnn = lstmcore.RNN(4, 3, nonlinearity="relu", bidirectional=True, seed=1)
    layers = [lstmcore.LSTM(4, 6, 2, seed=1), lstmcore.LSTM(6, 5, seed=2)]
    stack = formats.Stack(layers, reverse=[False, True], batch_first=True)
    last = formats.Stack(layers, last_step=True)
    grus = [lstmcore.GRU(4, 3, 2, bidirectional=True, seed=1), lstmcore.GRU(4, 3, reset_after=False),
            lstmcore.GRU(4, 3, reset_after=False, bias=False, batch_first=True)]
    for m in (rnn, *grus, formats.Stack([lstmcore.GRU(4, 3), rnn.__class__(3, 2)]), stack, last):
        m.save(tmp_path / "m.safetensors")
        got = lstmcore.load(tmp_path / "m.safetensors")
        assert repr(got) == repr(m)
        same_parameters(got, m)
    assert lstmcore.load(tmp_path / "m.safetensors", batch_first=True).batch_first
    with pytest.raises(ValueError, match=r"a Stack, which says \['dropout'\] itself"):
        lstmcore.load(tmp_path / "m.safetensors", dropout=0.5)


def test_stack_reads_from_the_end_of_each_sequence():
    rng = np.random.default_rng(0)
    layer = lstmcore.LSTM(3, 4, dtype="float64", seed=1)
    x, lengths = rng.normal(size=(6, 2, 3)), np.array([6, 4])
    stack = formats.Stack([layer], reverse=[True])
    y, ((h_n, c_n),) = stack(x, lengths=lengths)
    alone, (h, c) = layer(x[3::-1, 1:])
    np.testing.assert_allclose(y[:4, 1:], alone[::-1], rtol=0, atol=1e-12)
    np.testing.assert_allclose(c_n[:, 1:], c, rtol=0, atol=1e-12)
    assert not y[4:, 1].any()


def test_stack_gradients_are_those_of_finite_differences():
    rng = np.random.default_rng(0)
    stack = formats.Stack([lstmcore.LSTM(3, 4, dtype="float64", seed=1),
                           lstmcore.LSTM(4, 2, dtype="float64", seed=2)], [True, False],
                          batch_first=True)
    x, lengths = rng.normal(size=(2, 5, 3)), np.array([3, 5])
    dy, dlast = rng.normal(size=(2, 5, 2)), [(rng.normal(size=(1, 2, n)),) * 2 for n in (4, 2)]

    def loss(x):
        y, last = stack(x, lengths=lengths)
        return (y * dy).sum() + sum((s * d).sum() for pair, dpair in zip(last, dlast)
                                    for s, d in zip(pair, dpair))

    loss(x)
    dx, dfirst = stack.backward(dy, dlast)
    assert [h.shape for h, _ in dfirst] == [(1, 2, 4), (1, 2, 2)]
    step = 1e-6
    for place in [(0, 0, 1), (0, 2, 0), (1, 4, 2), (0, 4, 0)]:
        up, down = x.copy(), x.copy()
        up[place] += step
        down[place] -= step
        want = (loss(up) - loss(down)) / (2 * step)
        assert abs(dx[place] - want) < 1e-8     # the truncation and rounding of the difference


@pytest.mark.parametrize("layer", [
    lambda **o: lstmcore.LSTM(4, 3, 2, bidirectional=True, proj_size=2, **o),
    lambda **o: lstmcore.RNN(4, 3, **o)])
def test_last_step_of_a_stack_and_its_gradients(layer):
    rng = np.random.default_rng(0)
    layers = [lstmcore.LSTM(3, 4, dtype="float64", seed=1), layer(dtype="float64", seed=2)]
    whole, stack = formats.Stack(layers), formats.Stack(layers, last_step=True)
    x, lengths = rng.normal(size=(6, 3, 3)), np.array([6, 2, 4])
    (want, _), (y, final) = whole(x, lengths=lengths), stack(x, lengths=lengths)
    P = layers[1].parameters()["weight_hh_l0"].shape[1]
    np.testing.assert_array_equal(y[:, :P], want[lengths - 1, range(3), :P])
    np.testing.assert_array_equal(y[:, P:], want[0, :, P:])     # the last output of what reads back
    with pytest.raises(ValueError, match="dy must have the shape"):
        stack.backward(np.zeros_like(want))

    is_lstm = isinstance(final[1], tuple)
    dy, dlast = rng.normal(size=y.shape), [rng.normal(size=s.shape) for s in (
        final[1] if is_lstm else [final[1]])]

    def loss(x, of_state):
        y, final = stack(x, lengths=lengths)
        last = final[1] if is_lstm else [final[1]]
        return (y * dy).sum() + of_state * sum((s * d).sum() for s, d in zip(last, dlast))

    for of_state in (0, 1):
        loss(x, of_state)
        given = [None, (tuple(dlast) if is_lstm else dlast[0])] if of_state else None
        dx, _ = stack.backward(dy, given)
        step = 1e-6
        for place in [(0, 0, 1), (1, 1, 0), (3, 2, 2), (4, 2, 0)]:
            up, down = x.copy(), x.copy()
            up[place] += step
            down[place] -= step
            slope = (loss(up, of_state) - loss(down, of_state)) / (2 * step)
            assert abs(dx[place] - slope) < 1e-8    # the truncation and rounding of the difference


@pytest.mark.parametrize("ending", [".safetensors", ".onnx", ".weights.h5"])
def test_frozen_modules_are_saved(tmp_path, ending):
    pytest.importorskip({".onnx": "onnx", ".weights.h5": "h5py"}.get(ending, "numpy"))
    for m in (lstmcore.LSTM(3, 4, 2, bidirectional=True, seed=1), lstmcore.RNN(3, 4, seed=1),
              formats.Stack([lstmcore.LSTM(3, 4, seed=1), lstmcore.LSTM(4, 2, seed=2)])):
        m.freeze().save(tmp_path / f"m{ending}")
        got = lstmcore.load(tmp_path / f"m{ending}")
        assert repr(got) == repr(m)
        same_parameters(got, m)
        assert all(p.flags.writeable for p in got.parameters().values())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_two_files_hold_the_same_layer_and_torch_is_not_imported(tmp_path, dtype):
    state = random_state_dict(4, 6, 2, 2, dtype=dtype)
    safetensors.write(tmp_path / "m.safetensors", state)
    fuzz_formats.write_pt(tmp_path / "m.pt", state)
    a, b = (lstmcore.load(tmp_path / name) for name in ("m.safetensors", "m.pt"))
    same_parameters(a, b)
    np.testing.assert_array_equal(a.parameters()["bias_l1_reverse"],
                                  state["bias_ih_l1_reverse"] + state["bias_hh_l1_reverse"])
    code = (f"import sys, lstmcore; lstmcore.load({str(tmp_path / 'm.pt')!r});"
            "assert not {'torch', 'onnx', 'h5py', 'safetensors'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path,  # not beside the sources
                   env={**os.environ, "PYTHONPATH": str(Path(lstmcore.__file__).parents[1])})


def test_prefix_chooses_and_the_rest_is_named(tmp_path):
    path = tmp_path / "m.safetensors"
    a, b = (random_state_dict(4, 6, 1, 1, seed=s) for s in (0, 1))
    arrays = {**{f"enc.{k}": v for k, v in a.items()}, "fc.weight": np.ones((2, 2), "float32")}
    safetensors.write(path, arrays)
    with pytest.warns(UserWarning, match="left in the file: 'fc.weight'"):
        lstmcore.load(path)
    safetensors.write(path, {**arrays, **{f"dec.{k}": v for k, v in b.items()}})
    with pytest.raises(ValueError, match="'enc'.*choose|choose.*'enc'"):
        lstmcore.load(path)
    got = lstmcore.load(path, "dec.", batch_first=True)
    assert got.batch_first
    np.testing.assert_array_equal(got.parameters()["weight_ih_l0"], b["weight_ih_l0"])
    with pytest.raises(ValueError, match="no recurrent layer .*'fc'"):
        lstmcore.load(path, "fc")
    assert formats.read_arrays(path)["fc.weight"].shape == (2, 2)


def test_what_is_not_there_is_refused_by_name(tmp_path):
    path, state = tmp_path / "m.safetensors", random_state_dict(4, 6, 2, 1)
    cases = {
        r"bias of l0 must be \(18,\)": {"weight_ih_l0": np.ones((18, 4), "f4"), "bias_l0": np.ones(7, "f4"),
                                      "weight_hh_l0": np.ones((18, 6), "f4")},
        "shape of a GRU and the weights": {
            "weight_ih_l0": np.ones((18, 4), "f4"), "weight_hh_l0": np.ones((18, 6), "f4"),
            "weight_peephole_l0": np.ones((3, 6), "f4")},
        "nonlinearity": {"weight_ih_l0": np.ones((6, 4), "f4"),
                         "weight_hh_l0": np.ones((6, 6), "f4")},
        "bias_hh": {k: v for k, v in state.items() if k != "bias_hh_l1"},
        "layers 0 to 1": {k: v for k, v in state.items() if "l1" in k},
        "must take the 6 outputs": {**state, "weight_ih_l1": np.ones((24, 7), "f4")},
        "must hold floats": {**state, "weight_ih_l1": np.ones((24, 6), "i4")},
        "holds no LSTM": {"fc.weight": np.ones((2, 2), "f4")},
    }
    for message, arrays in cases.items():
        safetensors.write(path, arrays)
        with pytest.raises(ValueError, match=message):
            lstmcore.load(path)
    safetensors.write(path, cases["nonlinearity"])
    assert lstmcore.load(path, nonlinearity="relu").nonlinearity == "relu"
    with pytest.raises(TypeError, match="options of load"):
        lstmcore.load(path, hidden_size=3)
    with pytest.raises(ValueError, match=".safetensors, .onnx, .weights.h5"):
        lstmcore.LSTM(1, 1).save(tmp_path / "m.pt")


def test_half_precision_is_widened(tmp_path):
    path, state = tmp_path / "m.safetensors", random_state_dict(3, 4, 1, 1)
    safetensors.write(path, {k: v.astype("float16") for k, v in state.items()})
    m = lstmcore.load(path)
    assert m.dtype == np.float32
    want = sum(state[f"bias_{k}_l0"].astype("f2").astype("f4") for k in ("ih", "hh"))
    np.testing.assert_array_equal(m.parameters()["bias_l0"], want)


def test_a_language_model_comes_back_as_one(tmp_path):
    model = lstmcore.LanguageModel("char", hidden_size=4, num_layers=1)
    model.fit("to be or not to be " * 20, epochs=1, progress=False)
    model.save(tmp_path / "m.safetensors")
    got = lstmcore.load(tmp_path / "m.safetensors")
    assert isinstance(got, lstmcore.LanguageModel)
    assert lstmcore.load(tmp_path / "m.safetensors", "recurrent").hidden_size == 4


@pytest.mark.parametrize("cell, embed_size, left", [("lstm", 3, "'embedding', 'head'"),
                                                    ("rnn", 0, "'head'")])
def test_converting_a_language_model_gives_its_recurrent_layers(tmp_path, cell, embed_size, left):
    model = lstmcore.LanguageModel("char", cell=cell, hidden_size=4, embed_size=embed_size)
    path = tmp_path / "m.safetensors"
    model.fit("to be or not to be " * 20, steps=2, progress=False, checkpoint=path)
    for ending, package in ((".onnx", "onnx"), (".weights.h5", "h5py")):
        pytest.importorskip(package)
        out = tmp_path / f"m{ending}"
        with pytest.warns(UserWarning, match=f"only the recurrent .* left out: {left}"):
            made = lstmcore.convert(path, out)
        got = lstmcore.load(out)
        assert repr(got) == repr(made) == repr(model.network.recurrent)
        same_parameters(got, model.network.recurrent)
        with pytest.raises(ValueError, match=r"saved as .safetensors.*convert\(file"):
            model.save(tmp_path / f"n{ending}")
        with pytest.raises(ValueError, match="saved as .safetensors"):
            model.fit("to be " * 20, steps=1, progress=False, checkpoint=tmp_path / f"n{ending}")
    assert isinstance(lstmcore.convert(path, tmp_path / "n.safetensors"), lstmcore.LanguageModel)
    lstmcore.convert(path, tmp_path / "part.safetensors", "recurrent")
    same_parameters(lstmcore.load(tmp_path / "part.safetensors"), model.network.recurrent)
    for name in ("m.pt", "m.keras", "m"):
        with pytest.raises(ValueError, match="must end in .safetensors, .onnx, .weights.h5"):
            lstmcore.convert(path, tmp_path / name)
        assert not (tmp_path / name).exists()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "m.safetensors"
    safetensors.write(path, {"a": np.arange(3.0)})
    with pytest.raises(TypeError, match="got complex128"):
        safetensors.write(path, {"a": np.ones(2, complex)})
    assert safetensors.read(path)[0]["a"].tolist() == [0, 1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_safetensors_package_agrees(tmp_path):
    package = pytest.importorskip("safetensors.numpy")
    rng, path = np.random.default_rng(0), tmp_path / "m.safetensors"
    arrays = {f"{code} {n}": rng.integers(0, 2, (n, 3)).astype(dtype)
              for code, dtype in safetensors.DTYPES.items() for n in (0, 2)}
    arrays["scalar"] = np.float64(2.5)
    safetensors.write(path, arrays, {"note": json.dumps("ü")})
    for found in (package.load_file(path), safetensors.read(path)[0]):
        assert found.keys() == arrays.keys()
        for name, a in arrays.items():
            np.testing.assert_array_equal(found[name], a)
            assert found[name].dtype == a.dtype
    package.save_file({k: np.asarray(v) for k, v in arrays.items()}, path, {"a": "b"})
    got, metadata = safetensors.read(path)
    assert metadata == {"a": "b"} and got.keys() == arrays.keys()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("options", [dict(num_layers=2, bidirectional=True), dict(bias=False),
                                     dict(num_layers=2, proj_size=3, bidirectional=True)])
def test_torch_models_compute_the_same(tmp_path, dtype, options):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file
    torch.manual_seed(3)
    model = torch.nn.LSTM(4, 6, dtype=getattr(torch, dtype), **options)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")             # projections: torch says that oneDNN has none
        x = torch.randn(7, 3, 4, dtype=model.weight_ih_l0.dtype)
        want, (h, c) = model(x)
    torch.save({"model": {"lstm": model.state_dict()}, "epoch": 3, "lr": 0.1,
                "optimizer": torch.optim.Adam(model.parameters()).state_dict()}, tmp_path / "m.pt")
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    for path, name in (("m.pt", "model.lstm"), ("m.safetensors", None)):
        y, (h_n, c_n) = (m := lstmcore.load(tmp_path / path, name))(x.numpy())
        for got, expected in ((y, want), (h_n, h), (c_n, c)):
            np.testing.assert_allclose(got, expected, rtol=0, atol=ABSOLUTE[dtype])
    m.save(tmp_path / "back.safetensors")
    model.load_state_dict(load_file(tmp_path / "back.safetensors"))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_allclose(model(x)[0], want, rtol=0, atol=ABSOLUTE[dtype])


def test_checkpoints_hold_more_than_tensors(tmp_path):
    torch = pytest.importorskip("torch")
    path, model = tmp_path / "m.pt", torch.nn.LSTM(4, 6)
    adam = torch.optim.Adam(model.parameters())
    for protocol in (2, 4, 5):
        torch.save({"model": collections.defaultdict(int, model.state_dict()),
                    "args": argparse.Namespace(lr=0.1, best=torch.ones(2)), "adam": adam,
                    "size": torch.Size([1]), "device": torch.device("cpu"), "loss": np.float64(3),
                    "out": Path("out"), "tags": {1}, "fixed": frozenset([2]), "dtype": torch.half,
                    "table": np.ones(2), "raw": b"3", "both": bytearray(b"4"), "complex": 5j,
                    None: 6}, path, pickle_protocol=protocol)
        got = lstmcore.load(path, "model")
        want = {f"model.{name}": t.numpy() for name, t in model.state_dict().items()}
        np.testing.assert_array_equal(got.parameters()["weight_hh_l0"],
                                      want["model.weight_hh_l0"])
        assert {n: a.tolist() for n, a in formats.read_arrays(path).items()} == {
            n: a.tolist() for n, a in want.items()}


def test_what_is_no_state_dict_is_named_with_the_way_out(tmp_path):
    torch = pytest.importorskip("torch")
    path, model = tmp_path / "m.pt", torch.nn.LSTM(4, 6)
    adam = torch.optim.Adam(model.parameters()).state_dict()
    args = argparse.Namespace(lr=0.1)
    for message, saved in {
            r"argparse.Namespace; save a state_dict": args,
            r"only 'state', 'param_groups': save the state_dict\(\)": adam,
            r"only 'w', 'args \(argparse.Namespace\)': save the state": {"w": torch.ones(2),
                                                                         "args": args},
            "only 'an empty dict': save the state": {}}.items():
        torch.save(saved, path)
        with pytest.raises(ValueError, match=message):
            lstmcore.load(path)
    odd = {"c": torch.ones(2, dtype=torch.complex64), "s": torch.eye(2).to_sparse()}
    torch.save({**odd, **model.state_dict()}, path)
    with pytest.warns(UserWarning, match=r"'c' \(.*ComplexFloatStorage\), 's' \(.*sparse"):
        assert formats.read_arrays(path).keys() == model.state_dict().keys()
    torch.save({**model.state_dict(), "bias_ih_l0": odd["s"]}, path)
    with pytest.raises(ValueError, match="bias_ih of l0 is no tensor .*rebuild_sparse_tensor"):
        lstmcore.load(path)


def test_torch_views_and_types(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(24.0).reshape(4, 6)
    saved = {"turned": base.t(), "part": base[1:3, ::2], "none": base[:0],
             "scalar": torch.tensor(2.5), "parameter": torch.nn.Parameter(base.clone()),
             **{str(d): torch.arange(-2, 2).to(d) for d in (
                 torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
                 torch.uint8, torch.bool)}}
    torch.save(saved, tmp_path / "m.pt")
    found = formats.read_arrays(tmp_path / "m.pt")
    assert found.keys() == saved.keys()
    for name, tensor in saved.items():
        tensor = tensor.detach().float() if tensor.dtype == torch.bfloat16 else tensor.detach()
        np.testing.assert_array_equal(found[name], tensor.numpy())


def test_a_shard_that_cannot_be_read_is_named_with_its_index(tmp_path):
    state = random_state_dict(3, 4, 1, 1)
    names, index = sorted(state), tmp_path / "m.safetensors.index.json"
    safetensors.write(tmp_path / "a.safetensors", {n: state[n] for n in names[:2]})
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "empty.safetensors").touch()
    for shard, said in {"none": "cannot be read: No such file", "folder": "Is a directory",
                        "empty": "at least 8 bytes", "n" * 300: "cannot be read"}.items():
        index.write_text(json.dumps({"weight_map": {
            name: f"{'a' if name in names[:2] else shard}.safetensors" for name in names}}))
        with pytest.raises(ValueError, match=f"index.json.* the shard '{shard[:90]}.*{said}"):
            lstmcore.load(index)
