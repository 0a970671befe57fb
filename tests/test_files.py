"""load and save above the formats: whole models, what a file asks for, and who knows whom."""

import ast
import json
import pathlib

import numpy as np
import pytest

import exported_models
import lstmcore
from fuzz_formats import write_pt
from lstmcore import formats
from lstmcore.formats import description, safetensors


class Tagger(lstmcore.Module):
    """As a torch.nn.Module of the same names would be: a table, an LSTM, a head."""

    def __init__(self, seed=0, pool=None, dtype="float32"):
        common = dict(seed=seed, dtype=dtype)
        self.embed = lstmcore.Embedding(20, 6, **common)
        self.lstm = lstmcore.LSTM(6, 5, 2, bidirectional=True, batch_first=True, **common)
        self.drop, self.pool = lstmcore.Dropout(0.3, seed=0), pool
        self.head = lstmcore.Sequential(lstmcore.Linear(10, 7, **common), lstmcore.Tanh(),
                                        lstmcore.Linear(7, 3, bias=False, **common))

    def __call__(self, tokens, lengths=None):
        y, _ = self.lstm(self.embed(tokens), lengths=lengths)
        y = self.drop(y)
        return self.head(y if self.pool is None else self.pool(y, lengths))


TOKENS = np.random.default_rng(0).integers(0, 20, (4, 6))
LENGTHS = np.array([6, 2, 1, 0], "i4")


def same(a, b):
    assert a.parameters().keys() == b.parameters().keys()
    for name, p in a.parameters().items():
        np.testing.assert_array_equal(p, b.parameters()[name])


def test_formats_know_no_layers_and_arrows_point_down():
    """No module of a floor names one above it; save of a Module asks the package, as users do."""
    floors = [{"scalars"}, {"checks", "threads"}, {"precision"}, {"functional", "dense"}, {"formats"},
              {"module"},
              {"recurrent"}, {"stack"}, {"layers"}, {"losses", "optim"},
              {"models", "gradflow", "inspect"}, {"files"}, {"cli"}]
    level = {name: n for n, names in enumerate(floors) for name in names}
    root = pathlib.Path(lstmcore.__file__).parent
    for path in root.rglob("*.py"):
        home = path.relative_to(root).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())) if home in level else ():
            named = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lstmcore"):
                inside = node.module.split(".")[1:2]
                named = inside or [alias.name for alias in node.names]
            for name in named:
                assert level.get(name, -1) <= level[home], (path.name, name)


@pytest.mark.parametrize("ending", ["safetensors", "onnx"])
def test_a_module_of_known_layers_comes_back_and_another_is_filled(tmp_path, ending):
    if ending == "onnx":
        pytest.importorskip("onnx")
    path = tmp_path / f"m.{ending}"
    net = lstmcore.Sequential(lstmcore.Linear(3, 4, seed=0), lstmcore.Dropout(0.25),
                              lstmcore.Sequential(lstmcore.ReLU(), lstmcore.Linear(4, 2, seed=1)))
    lstmcore.save(net, path)
    assert repr(lstmcore.load(path)) == repr(net)
    same(lstmcore.load(path), net)
    m = Tagger()
    m.save(path)
    filled = Tagger(seed=7)
    assert lstmcore.load(path, into=filled) is filled and not filled.training
    same(filled, m)
    with pytest.raises(ValueError, match=r"a .*Tagger, a class that is not lstmcore's.*into=it"):
        lstmcore.load(path)
    with pytest.raises(ValueError, match="the state does not fit Linear: missing"):
        lstmcore.load(path, into=lstmcore.Linear(3, 4))
    with pytest.raises(TypeError, match="must be an LSTM, GRU, RNN or Stack, got .*Tagger"):
        pytest.importorskip("h5py")
        m.save(tmp_path / "m.weights.h5")


def test_what_cannot_be_saved_or_filled_is_said(tmp_path):
    path = tmp_path / "m.safetensors"
    lstmcore.Linear(3, 4, seed=0).save(path)
    for message, call in {
            "module must be a Module or a LanguageModel, got int": lambda: lstmcore.save(3, path),
            "into must be a Module, got dict": lambda: lstmcore.load(path, into={}),
            "says everything itself": lambda: lstmcore.load(path, into=lstmcore.Linear(3, 4),
                                                            dropout=0.5)}.items():
        with pytest.raises(TypeError, match=message):
            call()
    with pytest.raises(ValueError, match="no arrays whose names begin with 'a'"):
        lstmcore.load(path, "a", into=lstmcore.Linear(3, 4))


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-6), ("float64", 1e-14)])
@pytest.mark.parametrize("pool", [None, "LastStep", "MeanOverTime", "MaxOverTime"])
def test_onnxruntime_runs_a_whole_model(tmp_path, pool, dtype, bound):
    runtime = pytest.importorskip("onnxruntime")
    options = {"bidirectional": True} if pool == "LastStep" else {}
    made = pool and getattr(lstmcore, pool)(batch_first=True, **options)
    m = Tagger(pool=made, dtype=dtype).eval()
    for lengths in (None, LENGTHS):
        lstmcore.save(m, tmp_path / "m.onnx", lengths=lengths is not None)
        session = runtime.InferenceSession(tmp_path / "m.onnx")
        given = {} if lengths is None else {"lengths": lengths}
        (got,) = session.run(["y"], {"x": TOKENS, **given})
        np.testing.assert_allclose(got, m(TOKENS, lengths), rtol=0, atol=bound)


@pytest.mark.parametrize("cell", ["lstm", "rnn"])
@pytest.mark.parametrize("embed_size", [0, 5])
def test_onnxruntime_runs_a_language_model(tmp_path, cell, embed_size):
    runtime = pytest.importorskip("onnxruntime")
    model = lstmcore.LanguageModel(hidden_size=8, cell=cell, embed_size=embed_size, dropout=0.5)
    model.fit("hello world " * 40, steps=3, progress=False)
    lstmcore.save(model, tmp_path / "m.onnx", state=True)
    tokens = np.random.default_rng(0).integers(0, len(model.vocabulary), (7, 3))
    _, state = model.network(tokens[:3])
    want, final = model.network(tokens[3:], state)
    state, final = ((s,) if cell == "rnn" else s for s in (state, final))
    session = runtime.InferenceSession(tmp_path / "m.onnx")
    got = session.run(None, {"x": tokens[3:], **dict(zip(("h0", "c0"), state))})
    for a, b in zip(got, (want, *final), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_what_is_done_between_layers_is_not_exported(tmp_path):
    pytest.importorskip("onnx")

    class Odd(lstmcore.Module):
        def __init__(self, call):
            self.a, self.b, self.call = *(lstmcore.Linear(3, 3, seed=n) for n in (0, 1)), call

        def __call__(self, x):
            return self.call(self, x)
    for call in (lambda m, x: m.a(x) + 1, lambda m, x: np.tanh(m.a(x)), lambda m, x: x,
                 lambda m, x: (m.a(x), m.b(x))[0], lambda m, x: m.a(np.ones(3, "f4"))):
        with pytest.raises(ValueError, match="Odd cannot be written to ONNX"):
            Odd(call).save(tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_description_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    lstmcore.LSTM(3, 4, seed=0).save(path)
    arrays, said = safetensors.read(path)
    safetensors.write(path, arrays, {name: value.replace("LSTM", "GRU") for name, value in said.items()})
    with pytest.raises(ValueError, match="says that it holds a GRU, and holds weights of a LSTM"):
        lstmcore.load(path)


def test_versions_and_descriptions_are_checked(tmp_path):
    path, layer = tmp_path / "m.safetensors", lstmcore.LSTM(3, 4, seed=0)
    arrays = description.torch_names(layer.parameters())
    said = {"version": 1, **layer.describe()}
    for message, change in {
            "version 2 of lstmcore's files, this lstmcore reads version 1": {"version": 2},
            "version 'x' of": {"version": "x"}, "batch_first = 'yes'": {"batch_first": "yes"},
            "dropout = 2": {"dropout": 2}, "says hidden_size = 9": {"hidden_size": 9},
            "parameters of a os.system, a class": {"class": "os.system"}}.items():
        wrong = {**said, **change}
        if "class" in change:
            wrong = {"class": change["class"]}
        safetensors.write(path, arrays, {"lstmcore.layer": json.dumps(wrong)})
        with pytest.raises(ValueError, match=message) as raised:
            lstmcore.load(path)
        assert str(path) in str(raised.value)
    del said["version"]                     # as files had none at first
    safetensors.write(path, arrays, {"lstmcore.layer": json.dumps(said)})
    same(lstmcore.load(path), layer)


def state(rng, I=4, H=5, prefix="rnn."):
    return {prefix + name: rng.standard_normal(size).astype("f4") for name, size in {
        "weight_ih_l0": (4 * H, I), "weight_hh_l0": (4 * H, H), "bias_ih_l0": 4 * H,
        "bias_hh_l0": 4 * H}.items()}


def test_shards_are_one_model_and_none_is_loaded_alone(tmp_path):
    arrays = state(np.random.default_rng(0))
    names, files = list(arrays), [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    places = {name: files[n // 2] for n, name in enumerate(names)}
    index = tmp_path / "model.safetensors.index.json"

    def write(places, files=files):
        for file in files:
            safetensors.write(tmp_path / file, {n: arrays[n] for n in names
                                                if n in places and places[n] == file})
        index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    write(places)
    np.testing.assert_array_equal(lstmcore.load(index).parameters()["weight_hh_l0"],
                                  arrays["rnn.weight_hh_l0"])
    assert formats.read_arrays(index).keys() == arrays.keys()
    for file in files:
        with pytest.raises(ValueError, match="one shard of several: load .*index.json"):
            lstmcore.load(tmp_path / file)
    index.rename(tmp_path / "away")
    with pytest.raises(ValueError, match="one shard of several, whose index .* is not beside it"):
        lstmcore.load(tmp_path / files[0])
    renamed = {name: place.replace("-of-00002", "") for name, place in places.items()}
    write(renamed, sorted(set(renamed.values())))
    with pytest.raises(ValueError, match="one shard of several: load"):
        lstmcore.load(tmp_path / renamed[names[0]])
    (tmp_path / "link.index.json").symlink_to("nowhere")        # others' faults are not this file's
    (tmp_path / "broken.index.json").write_text("[")
    safetensors.write(tmp_path / "whole.safetensors", arrays)
    assert lstmcore.load(tmp_path / "whole.safetensors").hidden_size
    for message, places in {"own folder": {names[0]: "../m.safetensors"}, "no index": 3,
                            "disagree on 'x'": {**renamed, "x": renamed[names[0]]}}.items():
        index.write_text(json.dumps({"weight_map": places}))
        with pytest.raises(ValueError, match=message):
            lstmcore.load(index)


def test_shards_that_torch_saved(tmp_path):
    """Two layers, each in a shard: either alone would load as half of the model."""
    layer = lstmcore.LSTM(3, 4, 2, seed=0)
    arrays = lstmcore.formats.description.torch_names(layer.parameters())
    index = tmp_path / "pytorch_model.bin.index.json"
    shards = {f"pytorch_model-0000{n + 1}-of-00002.bin": {
        name: a for name, a in arrays.items() if name.endswith(f"_l{n}")} for n in range(2)}
    for file, part in shards.items():
        write_pt(tmp_path / file, part)
    index.write_text(json.dumps({"weight_map": {
        name: file for file, part in shards.items() for name in part}}))
    for name, p in lstmcore.load(index).parameters().items():
        np.testing.assert_array_equal(p, layer.parameters()[name])
    assert formats.read_arrays(index).keys() == arrays.keys()
    for file in shards:
        with pytest.raises(ValueError, match="one shard of several: load .*bin.index.json"):
            lstmcore.load(tmp_path / file)
    (tmp_path / file).unlink()
    with pytest.raises(ValueError, match="which cannot be read: No such file"):
        lstmcore.load(index)


def test_tensors_that_save_model_left_out(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_model
    model = torch.nn.ModuleDict({"a": torch.nn.LSTM(4, 4, 2), "head": torch.nn.Linear(4, 9)})
    model["a"].weight_hh_l1 = model["a"].weight_hh_l0
    model["embed"] = torch.nn.Embedding(9, 4)
    model["embed"].weight = model["head"].weight
    path = str(tmp_path / "m.safetensors")
    save_model(model, path)
    x = torch.randn(5, 2, 4)
    np.testing.assert_allclose(lstmcore.load(path, "a")(x.numpy())[0],
                               model["a"](x)[0].detach().numpy(), rtol=0, atol=1e-6)
    assert formats.read_arrays(path).keys() == model.state_dict().keys()

    class Net(lstmcore.Module):
        def __init__(self):
            self.a, self.head = lstmcore.LSTM(4, 4, 2), lstmcore.Linear(4, 9)
            self.embed = lstmcore.Embedding(9, 4)
    net = lstmcore.load(path, into=Net()).parameters()
    np.testing.assert_array_equal(net["embed.weight"], net["head.weight"])


@pytest.mark.filterwarnings("ignore:.*spectral_norm")
def test_weights_in_parts_are_put_together(tmp_path):
    torch = pytest.importorskip("torch")
    prune = pytest.importorskip("torch.nn.utils.prune")
    x = torch.randn(6, 3, 4)

    def changed(change):
        m = torch.nn.Module()
        m.rnn = torch.nn.LSTM(4, 5, bidirectional=True)
        change(m.rnn)
        want = m.rnn(x)[0].detach().numpy()
        return m.state_dict(), want

    def parametrized(rnn):
        for name in ("weight_hh_l0", "weight_ih_l0_reverse"):
            torch.nn.utils.parametrizations.weight_norm(rnn, name)
    def spectral(rnn):
        for name, dim in (("weight_hh_l0", 0), ("weight_ih_l0_reverse", 1)):
            torch.nn.utils.parametrizations.spectral_norm(rnn, name, dim=dim)
        rnn.eval()
    for change in (parametrized, lambda rnn: prune.l1_unstructured(rnn, "weight_hh_l0", 0.5),
                   lambda rnn: old_weight_norm(torch, rnn), spectral,
                   lambda rnn: torch.nn.utils.spectral_norm(rnn, "weight_hh_l0").eval()):
        found, want = changed(change)
        torch.save(found, tmp_path / "m.pt")
        m = lstmcore.load(tmp_path / "m.pt")
        np.testing.assert_allclose(m(x.numpy())[0], want, rtol=0, atol=1e-6)
    found, _ = changed(lambda rnn: torch.nn.utils.parametrizations.orthogonal(rnn, "weight_hh_l0"))
    torch.save(found, tmp_path / "m.pt")
    with pytest.raises(ValueError, match="weight_hh of rnn.l0 .*remove_parametrizations"):
        lstmcore.load(tmp_path / "m.pt")


def old_weight_norm(torch, rnn):
    """What the deprecated torch.nn.utils.weight_norm keeps, for dim=0, and for dim=None."""
    for name, dim in (("weight_hh_l0", 1), ("weight_ih_l0", None)):
        v = torch.nn.Parameter(getattr(rnn, name).detach().clone())
        g = v.detach().norm() if dim is None else v.detach().norm(dim=1, keepdim=True)
        g = torch.nn.Parameter(1.5 * g)
        with torch.no_grad():
            getattr(rnn, name).copy_(1.5 * v)
        delattr(rnn, name)
        rnn.register_parameter(name + "_g", g)
        rnn.register_parameter(name + "_v", v)
        setattr(rnn, name, 1.5 * v.detach())


@pytest.mark.parametrize("raw", ["{0}weight_hh_l0_raw", "{0}module.weight_hh_l0_raw"])
def test_the_raw_weight_counts_and_not_its_dropped_copy(tmp_path, raw):
    arrays = state(np.random.default_rng(0), prefix="0.rnns.0.module.")
    kept = arrays["0.rnns.0.module.weight_hh_l0"]
    arrays[raw.format("0.rnns.0.")] = kept
    arrays["0.rnns.0.module.weight_hh_l0"] = np.where(kept > 0, 0, kept)
    for _ in range(2):                          # with the copy, and where it was no parameter
        write_pt(tmp_path / "m.pt", arrays)
        m = lstmcore.load(tmp_path / "m.pt")
        np.testing.assert_array_equal(m.parameters()["weight_hh_l0"], kept)
        arrays.pop("0.rnns.0.module.weight_hh_l0", None)


def test_torch_modules_scripts_and_cells(tmp_path):
    torch = pytest.importorskip("torch")

    rnn, x = torch.nn.RNN(4, 5, 2, nonlinearity="relu", batch_first=True), torch.randn(3, 6, 4)
    want = rnn(x)[0].detach().numpy()
    torch.save({"model": torch.nn.ModuleDict({"rnn": rnn}), "step": 3}, tmp_path / "m.pt")
    m = lstmcore.load(tmp_path / "m.pt")
    assert repr(m) == "RNN(4, 5, num_layers=2, nonlinearity='relu', batch_first=True)"
    np.testing.assert_allclose(m(x.numpy())[0], want, rtol=0, atol=1e-6)

    cell = torch.nn.LSTMCell(4, 5)
    torch.save(cell.state_dict(), tmp_path / "c.pt")
    m = lstmcore.load(tmp_path / "c.pt")
    h, c = cell(x[0])
    y, (_, c_n) = m(x[0][None].numpy())
    np.testing.assert_allclose(y[0], h.detach().numpy(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(c_n[0], c.detach().numpy(), rtol=0, atol=1e-6)
    for options in {}, dict(bias=False):
        cell = torch.nn.GRUCell(4, 5, **options)
        torch.save(cell.state_dict(), tmp_path / "g.pt")
        y, _ = lstmcore.load(tmp_path / "g.pt")(x[0][None].numpy())
        np.testing.assert_allclose(y[0], cell(x[0]).detach().numpy(), rtol=0, atol=1e-6)
    gru = torch.nn.GRU(4, 5, 2, bidirectional=True, batch_first=True, dropout=0.25).eval()
    torch.save(gru, tmp_path / "g.pt")
    m = lstmcore.load(tmp_path / "g.pt")
    assert repr(m) == "GRU(4, 5, num_layers=2, batch_first=True, dropout=0.25, bidirectional=True)"
    np.testing.assert_allclose(m(x.numpy())[0], gru(x)[0].detach().numpy(), rtol=0, atol=1e-6)
    m.save(tmp_path / "g.safetensors")
    from safetensors.torch import load_file
    gru.load_state_dict({n: a + 0 for n, a in load_file(tmp_path / "g.safetensors").items()})
    np.testing.assert_allclose(m(x.numpy())[0], gru(x)[0].detach().numpy(), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="with reset_after=True, and reset_after=False is asked for"):
        lstmcore.load(tmp_path / "g.pt", reset_after=False)


@pytest.mark.filterwarnings("ignore")
def test_objects_of_a_training_are_passed_over(tmp_path):
    """A module that torch.compile wrapped, and an optimizer, whose dict has tensors as keys."""
    torch = pytest.importorskip("torch")
    rnn, x = torch.nn.LSTM(4, 5), torch.randn(3, 6, 4)
    optimizer = torch.optim.Adam(rnn.parameters())
    rnn(x)[0].sum().backward()
    optimizer.step()
    torch.save({"model": torch.compile(rnn), "optimizer": optimizer}, tmp_path / "m.pt")
    m = lstmcore.load(tmp_path / "m.pt", "model._orig_mod")
    np.testing.assert_allclose(m(x.numpy())[0], rnn(x)[0].detach().numpy(), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*left in the file")
def test_a_cell_of_another_class_is_refused(tmp_path):
    """Layer-normalized cells have the names of torch.nn.LSTMCell's weights."""
    shapes = {"weight_ih": (20, 4), "weight_hh": (20, 5)}
    for prefix in ("", "cell."):
        plain = {prefix + name: np.ones(shape, "f4") for name, shape in shapes.items()}
        for more in "norm.weight", "weight_ch":
            write_pt(tmp_path / "m.pt", {**plain, prefix + more: np.ones(20, "f4")})
            with pytest.raises(ValueError, match=f"weights of a cell, and '{prefix}{more}'"):
                lstmcore.load(tmp_path / "m.pt")
    write_pt(tmp_path / "m.pt", {**plain, "norm.weight": np.ones(20, "f4")})
    with pytest.warns(UserWarning, match="left in the file: 'norm.weight'"):
        lstmcore.load(tmp_path / "m.pt")


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_archive_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    lstm, x = torch.nn.LSTM(4, 5, 2).eval(), torch.randn(3, 2, 4)
    torch.jit.trace(torch.nn.Sequential(torch.nn.Identity(), lstm), x).save(tmp_path / "m.pt")
    m = lstmcore.load(tmp_path / "m.pt")
    np.testing.assert_allclose(m(x.numpy())[0], lstm(x)[0].detach().numpy(), rtol=0, atol=1e-6)


def test_half_floats_become_what_is_asked_for(tmp_path):
    path, arrays = tmp_path / "m.safetensors", state(np.random.default_rng(0))
    half = {name: a.astype("f2") for name, a in arrays.items()}
    safetensors.write(path, {**half, "ids": np.arange(3, dtype="i1")}, {"scale": "x"})
    assert lstmcore.load(path, "rnn").dtype == np.float32
    assert lstmcore.load(path, "rnn", dtype="float64").dtype == np.float64
    found = formats.read_arrays(path, dtype="float32")
    assert {name: str(a.dtype) for name, a in found.items()} == {
        **dict.fromkeys(arrays, "float32"), "ids": "int8"}
    np.testing.assert_array_equal(found["rnn.bias_ih_l0"], half["rnn.bias_ih_l0"].astype("f4"))
    assert safetensors.read(path)[1] == {"scale": "x"}
    with pytest.raises(ValueError, match="dtype must be float32 or float64"):
        formats.read_arrays(path, dtype="int8")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("which, package, seeds", [("torch", "onnx", range(24)),
                                                   ("keras", "keras", range(24))])
def test_random_models_load_and_are_equal_or_named(tmp_path, which, package, seeds):
    """Seeds of `exported_models`, whose own run draws more of them."""
    pytest.importorskip("torch")
    pytest.importorskip(package)
    check, equal = getattr(exported_models, "check_" + which), 0
    for seed in seeds:
        name = f"{seed}.onnx" if which == "torch" else f"{seed}"
        found, drawn = check(np.random.default_rng(seed), str(tmp_path / name))
        equal += found == "equal"
        assert not found.startswith("WRONG"), (seed, found, drawn)
    assert equal >= len(seeds) / 2
