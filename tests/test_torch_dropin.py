"""The modules of lstmcore.torch and accelerate against torch.nn's."""

import copy
import io
import os
import pickle
import warnings

import numpy as np
import pytest
from torch_pairs import (CELLS, CONFIGS, EVERYTHING, IGNORED, LAYERS, MODULES, TOLERANCE, B, H, I, P,
                         T, assert_close, build, called, flat, inputs, is_cell, leaves,
                         pack_padded_sequence, pair, parts, states, torch, weight)

import lstmcore.torch
from lstmcore import functional

pytestmark = IGNORED


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("config, kind", EVERYTHING)
def test_outputs_and_gradients_match_torch(config, kind, dtype):
    theirs, ours = pair(dtype, **config)
    x, hx = inputs(ours, kind)
    for state in (None, hx):
        assert_close(flat(ours, x, state), flat(theirs, x, state), dtype)


@pytest.mark.parametrize("layer", LAYERS)
def test_packed_output_keeps_its_indices(layer):
    theirs, ours = pair(**LAYERS[layer])
    x, hx = inputs(ours, "packed-unsorted")
    for got, expected in zip(ours(x, hx)[0][1:], theirs(x, hx)[0][1:]):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("config", ["plain", "stack-batch-first", "bidirectional"])
@pytest.mark.parametrize("layer", LAYERS)
def test_lengths_are_a_packed_sequence_without_packing(layer, config):
    theirs, ours = pair(**LAYERS[layer], **CONFIGS[config])
    x, hx = inputs(ours, "batched")
    lengths, first = [2, T, 1, 6, 6], ours.batch_first
    results = []
    for m in (theirs, ours):
        x_m, hx_m, wanted = leaves(m, x, hx)
        if m is ours:
            y, state = m(x_m, hx_m, torch.tensor(lengths))
        else:
            packed = pack_padded_sequence(x_m, lengths, first, enforce_sorted=False)
            y, state = m(packed, hx_m)
            y, _ = torch.nn.utils.rnn.pad_packed_sequence(y, first)
        found = [y, *parts(state)]
        gradients = torch.autograd.grad(sum((t * t.detach().cos()).sum() for t in found), wanted)
        results.append([*found, *gradients])
    assert_close(*results)


def test_a_length_may_be_0():
    _, ours = pair()
    x, hx = inputs(ours, "batched")
    y, (h_n, c_n) = ours(x, hx, [0, T, 3, 0, 1])
    assert not y[:, 0].any() and not y[3:, 2].any() and y[2, 2].all()
    assert torch.equal(h_n[:, 0], hx[0][:, 0]) and torch.equal(c_n[:, 3], hx[1][:, 3])


@pytest.mark.parametrize("lengths, kind, said", [
    ([1, 2, 3, 4, T + 1], "batched", "lengths must be in 0..T = 0..7"),
    ([1, 2], "batched", r"lengths must be \(B,\) = \(5,\)"),
    ([0.5] * B, "batched", "lengths must be"),
    ([1], "unbatched", "lengths need a batch, 3D, got an input of 2D"),
    ([1] * B, "packed", "a PackedSequence has lengths of its own"),
])
def test_bad_lengths_are_named(lengths, kind, said):
    _, ours = pair()
    with pytest.raises((ValueError, TypeError), match=said):
        ours(*inputs(ours, kind), lengths)


@pytest.mark.parametrize("layer", LAYERS)
def test_dropout_matches_torch_with_the_same_seed(layer):
    theirs, ours = pair(num_layers=3, dropout=0.4, bidirectional=True, **LAYERS[layer])
    x, hx = inputs(ours, "batched")
    results = []
    for m in (theirs, ours):
        torch.manual_seed(5)
        results.append(m(x, hx)[0])
    assert_close(*results)
    assert not torch.equal(ours(x, hx)[0], ours(x, hx)[0])  # a fresh mask on every call
    ours.eval(), theirs.eval()
    assert_close(ours(x, hx), theirs(x, hx))


@pytest.mark.parametrize("layer", LAYERS)
def test_empty_batch_and_empty_sequence(layer):
    _, ours = pair(**LAYERS[layer])
    hx = states(ours)
    y, *final = called(ours, torch.randn(0, B, I, dtype=torch.float64), hx)
    assert y.shape == (0, B, H) and all(map(torch.equal, final, parts(hx)))
    assert ours(torch.randn(T, 0, I, dtype=torch.float64))[0].shape == (T, 0, H)


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_without_rows_inputs_or_units(cell):
    theirs, ours = pair(**CELLS[cell])
    x = torch.randn(0, I, dtype=torch.float64)
    assert [h.shape for h in called(ours, x)] == [h.shape for h in called(theirs, x)] != []
    for sizes in (I, 0), (0, H):
        m = type(ours)(*sizes)
        h = called(m, torch.randn(B, sizes[0]))[-1]
        assert h.shape == (B, sizes[1])


# The module ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [*MODULES.values(), dict(num_layers=2, proj_size=P, dropout=0.1),
                                    dict(cls="GRU", num_layers=2, dropout=0.1)], ids=str)
def test_is_a_module_of_torch(config):
    theirs, ours = pair(**config)
    assert isinstance(ours, type(theirs)) and repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    state = []
    for where in torch.nn, lstmcore.torch:
        torch.manual_seed(8)
        state.append(build(where, config).state_dict())
    assert_close(*state, torch.float32)


@pytest.mark.parametrize("config", [*MODULES.values(), dict(num_layers=2, forget_bias=1),
                                    dict(num_layers=2, peepholes=True, forget_bias=1)], ids=str)
def test_copies_and_pickles(config):
    m = build(lstmcore.torch, config)
    x, hx = inputs(m, "batched")
    buffer = io.BytesIO()
    torch.save(m, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)),
                  torch.load(buffer, weights_only=False)):
        assert type(other) is type(m) and repr(other) == repr(m)
        assert all(map(torch.equal, called(other, x, hx), called(m, x, hx)))


def test_peepholes_match_the_reference_and_load_plain_checkpoints():
    m = lstmcore.torch.LSTM(I, H, bidirectional=True, peepholes=True, dtype=torch.float64)
    plain = torch.nn.LSTM(I, H, bidirectional=True, dtype=torch.float64)
    x, hx = inputs(m, "batched")
    for p in m.parameters():
        torch.nn.init.normal_(p)
    w = {k: v.detach().numpy() for k, v in m.state_dict().items()}
    y, _, _ = lstmcore.reference.lstm_forward(
        x.numpy(), w["weight_ih_l0_reverse"], w["weight_hh_l0_reverse"],
        w["bias_ih_l0_reverse"] + w["bias_hh_l0_reverse"], hx[0][1].numpy(), hx[1][1].numpy(),
        peepholes=w["weight_peephole_l0_reverse"], reverse=True)
    np.testing.assert_allclose(m(x, hx)[0].detach().numpy()[:, :, H:], y, rtol=1e-10, atol=1e-12)
    m.load_state_dict(plain.state_dict())  # strict
    assert_close(flat(m, x, hx)[0], flat(plain, x, hx)[0])
    with pytest.raises(RuntimeError, match="weight_peephole_l0"):
        m.load_state_dict({})


@pytest.mark.parametrize("module", MODULES)
def test_frozen_weights_give_the_same_bits_and_follow_changes(module):
    torch.manual_seed(1)
    config = MODULES[module]
    if module in LAYERS:
        config = dict(num_layers=2, bidirectional=True, **config)
    plain, frozen, other = (build(lstmcore.torch, config) for _ in range(3))
    assert frozen.freeze() is frozen
    first, *_, last = [name for name, _ in plain.named_parameters() if "weight" in name]

    def agree():
        x, hx = inputs(plain, "batched")
        plain.load_state_dict(frozen.state_dict())
        with torch.no_grad():
            for m in (frozen, copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
                for _ in range(2):
                    torch.testing.assert_close(m(x, hx), plain(x, hx), rtol=0, atol=0)

    assert not frozen.training
    agree()
    with torch.no_grad():
        getattr(frozen, last).mul_(2)
    agree()
    frozen.load_state_dict(other.state_dict())
    agree()
    setattr(frozen, first, torch.nn.Parameter(torch.randn_like(getattr(plain, first))))
    agree()
    frozen.double(), plain.double()
    agree()
    for write in (lambda W: W.data.mul_(2), lambda W: W.data.neg_(),
                  lambda W: W.data.copy_(W.data.flip(0)), lambda W: W.detach().numpy().fill(0.5)):
        for name in first, last:
            write(getattr(frozen, name))    # which no version counts
            agree()


@pytest.mark.parametrize("module", MODULES)
def test_frozen_weights_have_gradients_and_train_ends_it(module):
    theirs, ours = pair(**MODULES[module])
    x, hx = inputs(ours, "batched")
    assert_close(flat(ours.freeze(), x, hx), flat(theirs, x, hx))
    assert ours.train()._frozen is None and ours.training


def test_a_frozen_cell_follows_its_nonlinearity():
    m = lstmcore.torch.RNNCell(I, H).freeze()
    x = torch.randn(B, I)
    with torch.no_grad():
        for m.nonlinearity in "tanh", "relu":
            assert_close(m(x), torch.nn.RNNCell.forward(m, x), torch.float32)
        m.nonlinearity = "sigmoid"
        with pytest.raises(RuntimeError, match="'sigmoid', expected 'tanh' or 'relu'"):
            m(x)


def test_frozen_projection():
    x, _ = inputs(pair()[1], "batched")
    projected = pair(proj_size=P)[1].freeze()
    with torch.inference_mode():
        assert_close(projected(x), pair(proj_size=P)[0](x))


@pytest.mark.parametrize("module", MODULES)
def test_frozen_call_packs_once(module, monkeypatch):
    packed = []
    original = functional.pack
    monkeypatch.setattr(functional, "pack", lambda *args, **options: packed.append(1)
                        or original(*args, **options))
    config = MODULES[module] | (dict(num_layers=3) if module in LAYERS else {})
    x, _ = inputs(pair(**config)[1], "batched")
    for compare in True, False:
        m = pair(**config)[1].freeze(compare=compare)
        packed.clear()
        with torch.inference_mode():
            weight(m).data[0, 0] = np.nan
            for _ in range(4):
                m(x)
        assert len(packed) == (3 if module in LAYERS else 1)


def test_frozen_without_comparison_notices_counted_writes():
    plain, m = pair()[1].eval(), pair()[1].freeze(compare=False)
    x, _ = inputs(m, "batched")
    for write in (lambda W: W.mul_(2), lambda W: W.data.mul_(2)):
        with torch.no_grad():
            before = m(x)[0]
            for layer in plain, m:
                write(layer.weight_hh_l0)
            seen = not torch.equal(m(x)[0], before)
            assert seen == torch.equal(m(x)[0], plain(x)[0])
            assert torch.equal(m.freeze(compare=False)(x)[0], plain(x)[0])


@pytest.mark.parametrize("cls", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_quantization_that_leaves_the_module_says_so(cls):
    theirs, ours = getattr(torch.nn, cls), getattr(lstmcore.torch, cls)
    model = torch.nn.ModuleDict({"rnn": theirs(I, H), "head": torch.nn.Linear(H, 2)})
    lstmcore.torch.accelerate(model)
    with pytest.warns(UserWarning, match=f"lstmcore.torch.{cls} stays as it is.*torch.nn.{cls} its"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            quantized = torch.ao.quantization.quantize_dynamic(model, {theirs})
    assert type(quantized["rnn"]) is ours


def test_forget_bias():
    m = lstmcore.torch.LSTM(I, H, num_layers=2, forget_bias=1.5)
    for k in range(2):
        b = getattr(m, f"bias_ih_l{k}") + getattr(m, f"bias_hh_l{k}")
        assert torch.equal(b[H:2 * H], torch.full((H,), 1.5)) and b[:H].std() > 0
    with pytest.raises(ValueError, match="needs bias=True"):
        lstmcore.torch.LSTM(I, H, bias=False, forget_bias=1.0)


@pytest.mark.parametrize("module", MODULES)
def test_another_device_says_what_to_do(module):
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode():
        m = build(lstmcore.torch, MODULES[module])
        name = type(m).__name__
        with pytest.raises(ValueError, match=rf"torch\.{name} runs on the CPU, got input on cuda:0.*"
                                             rf"\.to\('cpu'\), or use torch.nn.{name}"):
            m(torch.empty(*[B] * (not is_cell(m)), T, I, device="cuda:0"))


@pytest.mark.parametrize("module", MODULES)
def test_wrong_shapes_raise_what_torch_raises(module):
    theirs, ours = pair(**MODULES[module])
    x, hx = inputs(ours, "batched")

    def spoiled(change, k=0):
        changed = [change(h) if n == k else h for n, h in enumerate(parts(hx))]
        return tuple(changed) if isinstance(hx, tuple) else changed[0]

    bad = [(x[..., :2],), (x, spoiled(lambda h: h[..., :2, :])), (x[None, None],),
           (x, spoiled(lambda h: h[..., :2], len(parts(hx)) - 1)), (x[(0,) * (x.dim() - 1)][0],),
           (x, spoiled(lambda h: h[None])), (x[..., 0, :], hx)]
    if module in LAYERS:
        bad += [(x.float(),), (x, tuple(h[0] for h in hx) if isinstance(hx, tuple) else hx[0]),
                (inputs(ours, "packed")[0], spoiled(lambda h: h[:, :2]))]
    for args in bad:
        with pytest.raises((ValueError, RuntimeError)) as expected:
            theirs(*args)
        with pytest.raises(expected.type):
            ours(*args)


# accelerate ---------------------------------------------------------------------------------------


class Twice(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.LSTM(I, I, num_layers=2)
        self.again = self.first
        self.tied = torch.nn.LSTM(I, I)
        self.tied.weight_hh_l0 = self.first.weight_hh_l0

    def forward(self, x):
        return self.tied(self.again(self.first(x)[0])[0])[0]


def test_accelerate_keeps_results_sharing_and_hooks():
    torch.manual_seed(4)
    model = Twice()
    params, calls = list(model.parameters()), []
    model.tied.register_forward_hook(lambda *_: calls.append("hook"))
    x = torch.randn(T, B, I)
    expected = model(x)
    expected.square().sum().backward()
    grads = [p.grad.clone() for p in params]
    model.zero_grad()
    report = lstmcore.torch.accelerate(model)
    assert report == (["first", "tied"], {}) and str(report).startswith("replaced 2 of torch.nn\n")
    assert model.first is model.again and type(model.first) is lstmcore.torch.LSTM
    assert all(a is b for a, b in zip(params, model.parameters()))
    got = model(x)
    got.square().sum().backward()
    assert_close([got, *(p.grad for p in params)], [expected, *grads], torch.float32)
    assert calls == ["hook", "hook"]
    assert lstmcore.torch.accelerate(model) == ([], {})


def test_accelerate_and_restore_every_kind():
    torch.manual_seed(4)
    model = torch.nn.ModuleDict({name: build(torch.nn, config) for name, config in MODULES.items()})
    expected = {name: called(m, *inputs(m, "batched")[:1]) for name, m in model.items()}
    torch.manual_seed(4)
    model = torch.nn.ModuleDict({name: build(torch.nn, config) for name, config in MODULES.items()})
    assert lstmcore.torch.accelerate(model) == ([*MODULES], {})
    for name, m in model.items():
        cls = MODULES[name].get("cls", "LSTM")
        assert type(m) is getattr(lstmcore.torch, cls)
        assert_close(called(m, *inputs(m, "batched")[:1]), expected[name], torch.float32)
    assert lstmcore.torch.accelerate(model) == lstmcore.torch.restore(torch.nn.Linear(2, 3))
    assert lstmcore.torch.restore(model) == ([*MODULES], {})
    assert {type(m) for m in model.values()} == {
        getattr(torch.nn, config.get("cls", "LSTM")) for config in MODULES.values()}


@pytest.mark.parametrize("module", ["LSTM", "GRU", "GRUCell"])
def test_accelerate_respects_parametrizations(module):
    from torch.nn.utils import parametrizations, parametrize
    m, ours = build(torch.nn, MODULES[module]), getattr(lstmcore.torch, module)
    name = next(name for name, _ in m.named_parameters() if "weight_hh" in name)
    parametrizations.weight_norm(m, name)
    x, hx = inputs(m, "batched")
    expected = called(m, x, hx)
    assert lstmcore.torch.accelerate(m).replaced == [""]
    got = called(m, x, hx)
    assert isinstance(m, ours)
    assert_close(got, expected, torch.float32)
    got[0].sum().backward()
    assert m.parametrizations[name].original0.grad.abs().sum() > 0
    assert lstmcore.torch.restore(m).replaced == [""] and not isinstance(m, ours)
    lstmcore.torch.accelerate(m)
    parametrize.remove_parametrizations(m, name)
    assert type(m) is ours
    assert_close(called(m, x, hx), expected, torch.float32)


@pytest.mark.parametrize("module", ["LSTM", "GRU", "GRUCell"])
def test_accelerate_respects_weight_hooks(module):
    m = build(torch.nn, MODULES[module])
    from torch.nn.utils import prune
    prune.random_unstructured(m, next(name for name, _ in m.named_parameters() if "hh" in name), 0.5)
    x, hx = inputs(m, "batched")
    expected = called(m, x, hx)
    assert lstmcore.torch.accelerate(m).replaced == [""]
    assert_close(called(m, x, hx), expected, torch.float32)


def test_accelerate_refuses_with_a_reason():
    class Own(torch.nn.LSTM):
        def forward(self, input, hx=None):
            return super().forward(2 * input, hx)

    patched = torch.nn.LSTM(I, H)
    patched.forward = lambda x: x
    model = torch.nn.ModuleDict({
        "own": Own(I, H), "patched": patched, "short": torch.nn.GRUCell(I, H).half(),
        "meta": torch.nn.GRU(I, H, device="meta"), "fine": torch.nn.LSTM(I, H),
        "other": torch.nn.RNNBase("GRU", I, H)})
    report = lstmcore.torch.accelerate(model)
    assert report.replaced == ["fine"]
    for name, why in {"own": "subclass", "patched": "forward", "short": "float16",
                      "meta": "on meta", "other": "RNNBase has no counterpart here"}.items():
        assert why in report.refused[name] and f"kept {name}" in str(report)
    with pytest.raises(TypeError, match="torch.nn.Module, got list"):
        lstmcore.torch.accelerate([model])


# Two processes ------------------------------------------------------------------------------------


def _train_one_of_two(rank, folder):
    import torch.distributed as dist
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    _, ours = pair(num_layers=2, bidirectional=True)
    model = torch.nn.parallel.DistributedDataParallel(ours)
    x = torch.load(os.path.join(folder, "x.pt"))[:, rank::2]
    model(x)[0].square().sum().div(x.shape[1]).backward()
    if rank == 0:
        torch.save([p.grad for p in ours.parameters()], os.path.join(folder, "grads.pt"))
    dist.barrier()
    os._exit(0)  # torch's gloo threads can wait for the GIL while their destructor holds it


def test_two_processes_give_the_gradients_of_one(tmp_path):
    x = torch.randn(T, 4, I, dtype=torch.float64)
    torch.save(x, tmp_path / "x.pt")
    torch.multiprocessing.spawn(_train_one_of_two, args=(str(tmp_path),), nprocs=2)
    theirs, _ = pair(num_layers=2, bidirectional=True)
    theirs(x)[0].square().sum().div(4).backward()
    assert_close(torch.load(tmp_path / "grads.pt"), [p.grad for p in theirs.parameters()])


# The module tests inside the torch wheel ----------------------------------------------------------


def samples(module, requires_grad=False):
    """The inputs that PyTorch tests a module with, and the module that takes each."""
    common_modules = pytest.importorskip("torch.testing._internal.common_modules")
    cls = {"LSTM": torch.nn.LSTM, "GRU": torch.nn.GRU, "RNN": torch.nn.RNN}.get(
        module, getattr(torch.nn, module))
    info, = (info for info in common_modules.module_db if info.module_cls is cls)
    for sample in info.module_inputs_func(info, "cpu", torch.float64, requires_grad=requires_grad,
                                          training=True):
        torch.manual_seed(6)
        yield sample, getattr(lstmcore.torch, module)(
            *sample.constructor_input.args, **sample.constructor_input.kwargs, dtype=torch.float64)


def leaves_of(tree):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree)
            if isinstance(leaf, torch.Tensor)]


CLASSES = pytest.mark.parametrize("module", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])


@CLASSES
def test_wheel_module_inputs_forward_and_pickle(module):
    for sample, m in samples(module):
        args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
        out = m(*args, **kwargs)
        assert_close(out, sample.reference_fn(m, *args, **kwargs))
        assert_close(pickle.loads(pickle.dumps(m))(*args, **kwargs), out)


@CLASSES
def test_wheel_module_inputs_non_contiguous(module):
    def strided(x):
        return torch.repeat_interleave(x.detach(), 2, dim=-1)[..., ::2] \
            if isinstance(x, torch.Tensor) else x

    for sample, m in samples(module):
        args = sample.forward_input.args
        expected = m(*args)
        assert_close(m(*torch.utils._pytree.tree_map(strided, args)), expected)


@CLASSES
def test_wheel_module_inputs_grad_and_gradgrad(module):
    for sample, m in samples(module, requires_grad=True):
        args = sample.forward_input.args
        free = [*leaves_of(args), *m.parameters()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # gradcheck warns of its own random directions
            f = lambda *_: tuple(leaves_of(m(*args)))  # noqa: E731
            assert torch.autograd.gradcheck(f, free, fast_mode=True)
            if m.bias and not getattr(m, "batch_first", False):  # a quarter: the slow part here
                assert torch.autograd.gradgradcheck(f, free, fast_mode=True)
