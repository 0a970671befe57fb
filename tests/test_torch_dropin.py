"""lstmcore.torch.LSTM and accelerate against torch.nn.LSTM."""

import copy
import io
import os
import pickle
import warnings

import numpy as np
import pytest
from torch_pairs import (CONFIGS, IGNORED, KINDS, TOLERANCE, B, H, I, P, T, assert_close,
                         flat, inputs, pair, states, torch)

import lstmcore.torch
from lstmcore import functional

pytestmark = IGNORED


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CONFIGS)
def test_outputs_and_gradients_match_torch(config, kind, dtype):
    theirs, ours = pair(dtype, **CONFIGS[config])
    x, hx = inputs(ours, kind)
    for state in (None, hx):
        assert_close(flat(ours, x, state), flat(theirs, x, state), dtype)


def test_packed_output_keeps_its_indices():
    theirs, ours = pair()
    x, hx = inputs(ours, "packed-unsorted")
    for got, expected in zip(ours(x, hx)[0][1:], theirs(x, hx)[0][1:]):
        assert torch.equal(got, expected)


def test_dropout_matches_torch_with_the_same_seed():
    theirs, ours = pair(num_layers=3, dropout=0.4, bidirectional=True)
    x, hx = inputs(ours, "batched")
    results = []
    for m in (theirs, ours):
        torch.manual_seed(5)
        results.append(m(x, hx)[0])
    assert_close(*results)
    assert not torch.equal(ours(x, hx)[0], ours(x, hx)[0])  # a fresh mask on every call
    ours.eval(), theirs.eval()
    assert_close(ours(x, hx), theirs(x, hx))


def test_empty_batch_and_empty_sequence():
    _, ours = pair()
    h0, c0 = states(ours)
    y, (h_n, c_n) = ours(torch.randn(0, B, I, dtype=torch.float64), (h0, c0))
    assert y.shape == (0, B, H) and torch.equal(h_n, h0) and torch.equal(c_n, c0)
    assert ours(torch.randn(T, 0, I, dtype=torch.float64))[0].shape == (T, 0, H)


# The module ---------------------------------------------------------------------------------------


def test_is_a_torch_lstm():
    theirs, ours = pair(num_layers=2, proj_size=P, dropout=0.1)
    assert isinstance(ours, torch.nn.LSTM) and repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    torch.manual_seed(8)
    a = torch.nn.LSTM(I, H).state_dict()
    torch.manual_seed(8)
    assert_close(lstmcore.torch.LSTM(I, H).state_dict(), a, torch.float32)


@pytest.mark.parametrize("peepholes", [False, True])
def test_copies_and_pickles(peepholes):
    m = lstmcore.torch.LSTM(I, H, num_layers=2, peepholes=peepholes, forget_bias=1)
    x, hx = inputs(m, "batched")
    buffer = io.BytesIO()
    torch.save(m, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)),
                  torch.load(buffer, weights_only=False)):
        assert type(other) is lstmcore.torch.LSTM and repr(other) == repr(m)
        assert torch.equal(other(x, hx)[0], m(x, hx)[0])


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


def test_frozen_weights_give_the_same_bits_and_follow_changes():
    torch.manual_seed(1)
    frozen = lstmcore.torch.LSTM(I, H, num_layers=2, bidirectional=True).freeze()
    plain = lstmcore.torch.LSTM(I, H, num_layers=2, bidirectional=True)

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
        frozen.weight_hh_l1.mul_(2)
    agree()
    frozen.load_state_dict(lstmcore.torch.LSTM(I, H, num_layers=2, bidirectional=True).state_dict())
    agree()
    frozen.weight_ih_l0 = torch.nn.Parameter(torch.randn(4 * H, I))
    agree()
    frozen.double(), plain.double()
    agree()
    for write in (lambda W: W.data.mul_(2), lambda W: W.data.neg_(),
                  lambda W: W.data.copy_(W.data.flip(0)), lambda W: W.detach().numpy().fill(0.5)):
        for weight in frozen.weight_hh_l0, frozen.weight_ih_l1_reverse:
            write(weight)           # which no version counts
            agree()


def test_frozen_weights_have_gradients_and_train_ends_it():
    theirs, ours = pair(num_layers=2)
    x, hx = inputs(ours, "batched")
    assert_close(flat(ours.freeze(), x, hx), flat(theirs, x, hx))
    assert ours.train()._frozen is None and ours.training
    projected = pair(proj_size=P)[1].freeze()
    with torch.inference_mode():
        assert_close(projected(x), pair(proj_size=P)[0](x))


def test_frozen_call_packs_once(monkeypatch):
    packed = []
    original = functional.pack
    monkeypatch.setattr(functional, "pack", lambda *args, **options: packed.append(1)
                        or original(*args, **options))
    x, _ = inputs(pair()[1], "batched")
    for compare in True, False:
        m = pair(num_layers=3)[1].freeze(compare=compare)
        packed.clear()
        with torch.inference_mode():
            m.weight_hh_l1.data[0, 0] = np.nan
            for _ in range(4):
                m(x)
        assert len(packed) == 3


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


def test_quantization_that_leaves_the_layer_says_so():
    model = torch.nn.ModuleDict({"rnn": torch.nn.LSTM(I, H), "head": torch.nn.Linear(H, 2)})
    lstmcore.torch.accelerate(model)
    with pytest.warns(UserWarning, match="lstmcore.torch.LSTM stays as it is"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.LSTM})
    assert type(quantized["rnn"]) is lstmcore.torch.LSTM


def test_forget_bias():
    m = lstmcore.torch.LSTM(I, H, num_layers=2, forget_bias=1.5)
    for k in range(2):
        b = getattr(m, f"bias_ih_l{k}") + getattr(m, f"bias_hh_l{k}")
        assert torch.equal(b[H:2 * H], torch.full((H,), 1.5)) and b[:H].std() > 0
    with pytest.raises(ValueError, match="needs bias=True"):
        lstmcore.torch.LSTM(I, H, bias=False, forget_bias=1.0)


def test_another_device_says_what_to_do():
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode():
        m = lstmcore.torch.LSTM(I, H)
        with pytest.raises(ValueError, match=r"CPU, got input on cuda:0.*\.to\('cpu'\)"):
            m(torch.empty(T, B, I, device="cuda:0"))


def test_wrong_shapes_raise_what_torch_raises():
    theirs, ours = pair()
    x, (h0, c0) = inputs(ours, "batched")
    packed, _ = inputs(ours, "packed")
    bad = [(x[..., :2],), (x, (h0[:, :2], c0)), (x, (h0, c0[..., :2])), (x, (h0[0], c0[0])),
           (x[0, 0],), (x.float(),), (packed, (h0[:, :2], c0))]
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
    assert report == (["first", "tied"], {}) and str(report).startswith("replaced 2 torch.nn.LSTM")
    assert model.first is model.again and type(model.first) is lstmcore.torch.LSTM
    assert all(a is b for a, b in zip(params, model.parameters()))
    got = model(x)
    got.square().sum().backward()
    assert_close([got, *(p.grad for p in params)], [expected, *grads], torch.float32)
    assert calls == ["hook", "hook"]
    assert lstmcore.torch.accelerate(model) == ([], {})


def test_accelerate_respects_parametrizations():
    from torch.nn.utils import parametrizations, parametrize
    lstm = torch.nn.LSTM(I, H)
    parametrizations.weight_norm(lstm, "weight_hh_l0")
    x = torch.randn(T, B, I)
    expected = lstm(x)[0]
    assert lstmcore.torch.accelerate(lstm).replaced == [""]
    got = lstm(x)[0]
    assert isinstance(lstm, lstmcore.torch.LSTM)
    assert_close(got, expected, torch.float32)
    got.sum().backward()
    assert lstm.parametrizations.weight_hh_l0.original0.grad.abs().sum() > 0
    parametrize.remove_parametrizations(lstm, "weight_hh_l0")
    assert type(lstm) is lstmcore.torch.LSTM
    assert_close(lstm(x)[0], expected, torch.float32)


def test_accelerate_respects_weight_hooks():
    lstm = torch.nn.LSTM(I, H)
    from torch.nn.utils import prune
    prune.random_unstructured(lstm, "weight_hh_l0", amount=0.5)
    x = torch.randn(T, B, I)
    expected = lstm(x)[0]
    assert lstmcore.torch.accelerate(lstm).replaced == [""]
    assert_close(lstm(x)[0], expected, torch.float32)


def test_accelerate_refuses_with_a_reason():
    class Own(torch.nn.LSTM):
        def forward(self, input, hx=None):
            return super().forward(2 * input, hx)

    patched = torch.nn.LSTM(I, H)
    patched.forward = lambda x: x
    model = torch.nn.ModuleDict({
        "own": Own(I, H), "patched": patched, "short": torch.nn.LSTM(I, H).half(),
        "meta": torch.nn.LSTM(I, H, device="meta"), "fine": torch.nn.LSTM(I, H)})
    report = lstmcore.torch.accelerate(model)
    assert report.replaced == ["fine"]
    for name, why in {"own": "subclass", "patched": "forward", "short": "float16",
                      "meta": "on meta"}.items():
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


def module_inputs(requires_grad=False):
    common_modules = pytest.importorskip("torch.testing._internal.common_modules")
    return common_modules.module_inputs_torch_nn_LSTM(
        None, "cpu", torch.float64, requires_grad=requires_grad, training=True)


def build(sample):
    torch.manual_seed(6)
    return lstmcore.torch.LSTM(*sample.constructor_input.args, **sample.constructor_input.kwargs,
                               dtype=torch.float64)


def leaves_of(tree):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree)
            if isinstance(leaf, torch.Tensor)]


def test_wheel_module_inputs_forward_and_pickle():
    for sample in module_inputs():
        m = build(sample)
        args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
        out = m(*args, **kwargs)
        assert_close(out, sample.reference_fn(m, *args, **kwargs))
        assert_close(pickle.loads(pickle.dumps(m))(*args, **kwargs), out)


def test_wheel_module_inputs_non_contiguous():
    def strided(x):
        return torch.repeat_interleave(x.detach(), 2, dim=-1)[..., ::2] \
            if isinstance(x, torch.Tensor) else x

    for sample in module_inputs():
        m = build(sample)
        args = sample.forward_input.args
        expected = m(*args)
        assert_close(m(*torch.utils._pytree.tree_map(strided, args)), expected)


def test_wheel_module_inputs_grad_and_gradgrad():
    for sample in module_inputs(requires_grad=True):
        m = build(sample)
        args = sample.forward_input.args
        free = [*leaves_of(args), *m.parameters()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # gradcheck warns of its own random directions
            f = lambda *_: tuple(leaves_of(m(*args)))  # noqa: E731
            assert torch.autograd.gradcheck(f, free, fast_mode=True)
            if m.bias and not m.batch_first:  # a quarter of them: the slow part of this file
                assert torch.autograd.gradgradcheck(f, free, fast_mode=True)
