"""lstmcore.torch: the drop-in against torch.nn.LSTM, and everything PyTorch asks of an operator."""

import copy
import io
import os
import pickle
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import lstmcore.torch  # noqa: E402
from lstmcore import functional  # noqa: E402
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence  # noqa: E402

pytestmark = [  # what torch warns of inside itself
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")]
TOLERANCE = {torch.float64: dict(rtol=1e-10, atol=1e-12),  # same sums, another order
             torch.float32: dict(rtol=1e-4, atol=2e-5)}    # 4-ulp activations through 7 steps
T, B, I, H, P = 7, 5, 3, 6, 4
CONFIGS = {
    "plain": {},
    "no-bias": dict(bias=False),
    "stack-batch-first": dict(num_layers=3, batch_first=True),
    "bidirectional": dict(num_layers=2, bidirectional=True),
    "projected": dict(num_layers=2, bidirectional=True, proj_size=P, batch_first=True),
}


def pair(dtype=torch.float64, seed=0, **config):
    """A torch.nn.LSTM and an lstmcore.torch.LSTM with the same weights."""
    torch.manual_seed(seed)
    theirs = torch.nn.LSTM(I, H, dtype=dtype, **config)
    ours = lstmcore.torch.LSTM(I, H, dtype=dtype, **config)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def states(m, n=B):
    LD = m.num_layers * (2 if m.bidirectional else 1)
    dtype = m.weight_ih_l0.dtype
    return (torch.randn(LD, n, m.proj_size or H, dtype=dtype),
            torch.randn(LD, n, H, dtype=dtype))


def inputs(m, kind):
    x = torch.randn(T, B, I, dtype=m.weight_ih_l0.dtype)
    if kind == "unbatched":
        return x[:, 0].clone(), tuple(s[:, 0].clone() for s in states(m))
    if kind == "packed":
        return pack_padded_sequence(x, [7, 6, 6, 2, 1]), states(m)
    if kind == "packed-unsorted":
        return pack_padded_sequence(x, [2, 7, 1, 6, 6], enforce_sorted=False), states(m)
    return (x.transpose(0, 1).contiguous() if m.batch_first else x), states(m)


def flat(m, x, hx):
    """Every output of m, and the gradients of a random projection of them."""
    leaves = [p for p in m.parameters() if p.requires_grad]
    if isinstance(x, PackedSequence):
        data = x.data.detach().requires_grad_()
        x = PackedSequence(data, *x[1:])
    else:
        x = data = x.detach().requires_grad_()
    if hx is not None:
        hx = tuple(s.detach().requires_grad_() for s in hx)
        leaves += hx
    y, (h_n, c_n) = m(x, hx)
    outputs = [y.data if isinstance(y, PackedSequence) else y, h_n, c_n]
    torch.manual_seed(99)
    loss = sum((out * torch.randn(out.shape, dtype=out.dtype)).sum() for out in outputs)
    return outputs, torch.autograd.grad(loss, [data, *leaves])


def assert_close(got, expected, dtype=torch.float64):
    torch.testing.assert_close(got, expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["batched", "unbatched", "packed", "packed-unsorted"])
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


# What autograd can ask ----------------------------------------------------------------------------


def cell(peepholes=False, project=False, ragged=False, reverse=False, bias=True):
    """Arguments of the operator `lstm`, small, float64, all requiring gradients."""
    T, B, I, H = 3, 2, 2, 3
    P = 2 if project else H
    torch.manual_seed(3)

    def leaf(*shape, wanted=True):
        return torch.randn(shape, dtype=torch.float64).requires_grad_() if wanted else None

    return [leaf(T, B, I), leaf(4 * H, I), leaf(4 * H, P), leaf(4 * H, wanted=bias), leaf(B, P),
            leaf(B, H), leaf(3, H, wanted=peepholes), leaf(P, H, wanted=project),
            torch.tensor([1, 3]) if ragged else None, reverse, True]


CELLS = {
    "plain": dict(),
    "no-bias": dict(bias=False, reverse=True),
    "peepholes": dict(peepholes=True, ragged=True),
    "projected": dict(project=True, ragged=True, reverse=True, peepholes=True),
}


def upstream(args):
    outputs = lstmcore.torch.lstm(*args)
    y, h_n, c_n, gates, c = (out.detach() for out in outputs)
    return [torch.randn_like(out).requires_grad_() for out in (y, h_n, c_n)], (y, gates, c)


@pytest.mark.parametrize("which", ["no-bias", "projected"])
def test_opcheck(which):
    args = cell(**CELLS[which])
    torch.library.opcheck(lstmcore.torch.lstm, args)
    torch.library.opcheck(lstmcore.torch.lstm, [*args[:-1], False])
    d, tape = upstream(args)
    d = d if which == "projected" else [None, d[1], None]
    torch.library.opcheck(lstmcore.torch.lstm_backward, (*d, *args[:-1], *tape))


@pytest.mark.parametrize("which", CELLS)
def test_gradcheck_and_gradgradcheck(which):
    args = cell(**CELLS[which])
    leaves = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.requires_grad]
    assert torch.autograd.gradcheck(lambda *_: lstmcore.torch.lstm(*args)[:3], leaves)
    assert torch.autograd.gradgradcheck(lambda *_: lstmcore.torch.lstm(*args)[:3], leaves)


def test_gradgradcheck_packed():
    m = lstmcore.torch.LSTM(2, 3, bidirectional=True, dtype=torch.float64)
    x = pack_padded_sequence(torch.randn(3, 2, 2, dtype=torch.float64), [1, 3],
                             enforce_sorted=False)
    data = x.data.requires_grad_()

    def f(data):
        y, (h_n, c_n) = m(PackedSequence(data, *x[1:]))
        return y.data, h_n, c_n

    assert torch.autograd.gradcheck(f, data) and torch.autograd.gradgradcheck(f, data)


def test_second_backward_over_a_retained_graph():
    theirs, ours = pair(num_layers=2)
    x, hx = inputs(ours, "batched")
    expected = flat(theirs, x, hx)[1][1]
    y, (h_n, c_n) = ours(x, hx)
    torch.manual_seed(99)
    loss = sum((out * torch.randn(out.shape, dtype=out.dtype)).sum() for out in (y, h_n, c_n))
    for retain in (True, True, False):
        got, = torch.autograd.grad(loss, ours.weight_ih_l0, retain_graph=retain)
        assert_close(got, expected)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, ours.weight_ih_l0)


def test_gates_are_spoiled_only_for_those_who_drop_them():
    args = cell()
    y, _, _, gates, _ = lstmcore.torch.lstm(*args)
    before = gates.clone()
    y.sum().backward()
    assert torch.equal(gates, before)


def test_batched_gradients_and_checkpointing():
    theirs, ours = pair()
    x, _ = inputs(ours, "batched")
    x.requires_grad_()
    d = torch.randn(4, T, B, H, dtype=torch.float64)
    y = ours(x)[0]
    got, = torch.autograd.grad(y, x, d, is_grads_batched=True)
    for n in range(4):
        assert_close(got[n], torch.autograd.grad(theirs(x)[0], x, d[n])[0])
    y = torch.utils.checkpoint.checkpoint(lambda x: ours(x)[0], x, use_reentrant=False)
    assert_close(torch.autograd.grad(y, x, d[0])[0], got[0])


@pytest.mark.parametrize("used", [0, 1, 2])
def test_undefined_output_gradients(used):
    theirs, ours = pair()
    x, hx = inputs(ours, "batched")
    results = []
    for m in (theirs, ours):
        y, (h_n, c_n) = m(x, hx)
        (y, h_n, c_n)[used].square().sum().backward()
        results.append([p.grad for p in m.parameters()])
    assert_close(results[1], results[0])


def test_frozen_weights_still_give_dx():
    theirs, ours = pair(num_layers=2)
    for m in (theirs, ours):
        m.requires_grad_(False)
    x, hx = inputs(ours, "batched")
    assert_close(flat(ours, x, hx), flat(theirs, x, hx))


def test_non_contiguous_inputs_weights_and_gradients():
    theirs, ours = pair()
    for m in (theirs, ours):
        m.weight_ih_l0 = torch.nn.Parameter(m.weight_ih_l0.detach().T.contiguous().T)
    x = torch.randn(I, B, 2 * T, dtype=torch.float64).permute(2, 1, 0)[::2]
    hx = tuple(s.expand(1, B, H) for s in torch.randn(2, 1, 1, 1, dtype=torch.float64))
    assert not x.is_contiguous() and not ours.weight_ih_l0.is_contiguous()
    assert_close(flat(ours, x, hx), flat(theirs, x, hx))
    for m in (theirs, ours):
        m(x)[0].sum().backward()  # an upstream gradient with stride 0
    assert_close(ours.weight_hh_l0.grad, theirs.weight_hh_l0.grad)


def test_nothing_is_saved_without_gradients(monkeypatch):
    kept = []
    original = functional.lstm_forward

    def spy(*args, keep_tape, **kwargs):
        kept.append(keep_tape)
        return original(*args, keep_tape=keep_tape, **kwargs)

    monkeypatch.setattr(functional, "lstm_forward", spy)
    _, ours = pair()
    x, hx = inputs(ours, "batched")
    with torch.no_grad():
        ours(x, hx)
    with torch.inference_mode():
        ours(x, hx)
    ours.requires_grad_(False)(x, hx)
    assert kept == [False] * 3


def test_no_copy_between_tensors_and_kernels(monkeypatch):
    seen = []
    original = functional.lstm_forward

    def spy(*args, **kwargs):
        result = original(*args, **kwargs)
        seen.append([a.ctypes.data for a in (*args[:3], result[0])])
        return result

    monkeypatch.setattr(functional, "lstm_forward", spy)
    _, ours = pair()
    x, hx = inputs(ours, "batched")
    y = ours(x, hx)[0]
    tensors = (x, ours.weight_ih_l0, ours.weight_hh_l0, y)
    assert seen == [[tensor.data_ptr() for tensor in tensors]]


@pytest.mark.parametrize("n", [1, 2])
def test_torch_set_num_threads_is_respected(n, monkeypatch):
    seen = []
    for name in ("lstm_forward", "lstm_backward"):
        def spy(*args, original=getattr(functional, name), n_threads, **kwargs):
            seen.append(n_threads)
            return original(*args, n_threads=n_threads, **kwargs)
        monkeypatch.setattr(functional, name, spy)
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        _, ours = pair()
        ours(*inputs(ours, "batched"))[0].sum().backward()
    finally:
        torch.set_num_threads(before)
    assert seen == [n, n]


def test_autocast_computes_in_float32():
    theirs, ours = pair(torch.float32, num_layers=2)
    x, hx = inputs(ours, "batched")
    expected = flat(theirs, x.bfloat16().float(), hx)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = flat(ours, x.bfloat16(), hx)
    assert got[0][0].dtype == torch.float32 and got[1][0].dtype == torch.bfloat16
    assert_close(got[0], expected[0], torch.float32)
    assert_close(got[1][1:], expected[1][1:], torch.float32)


# torch.compile and torch.func ---------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=False):  # or torch refuses retain_graph
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend, fresh_dynamo):
    _, lstm = pair(torch.float32, num_layers=2, bidirectional=True, batch_first=True)
    model = torch.nn.ModuleDict({"rnn": lstm, "out": torch.nn.Linear(2 * H, 2)})

    def f(x):
        return model["out"](model["rnn"](x)[0])

    compiled = torch.compile(f, fullgraph=True, backend=backend, dynamic=backend == "aot_eager")
    for steps in (T, T + 2):
        x = torch.randn(B, steps, I)
        for retain in (False, True):  # a compiled backward, also twice
            results = []
            for g in (compiled, f):
                model.zero_grad()
                loss = g(x).square().sum()
                loss.backward(retain_graph=retain)
                if retain:
                    loss.backward()
                results.append([loss, *(p.grad for p in model.parameters())])
            assert_close(*results, torch.float32)
        if backend == "inductor":
            break


def test_compile_leaves_torch_lstm_alone(fresh_dynamo):
    assert torch._dynamo.config.allow_rnn is False
    theirs, ours = pair()
    x, _ = inputs(ours, "batched")
    torch.compile(ours, fullgraph=True, backend="eager")(x)
    assert torch._dynamo.config.allow_rnn is False
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(theirs, fullgraph=True, backend="eager")(x)


def test_vmap_over_inputs():
    theirs, ours = pair(num_layers=2, bidirectional=True)
    N = 4
    x = torch.randn(T, N, B, I, dtype=torch.float64)
    h0, c0 = (torch.stack(s) for s in zip(*(states(ours) for _ in range(N))))

    def f(x, h0, c0):
        y, (h_n, c_n) = ours(x, (h0, c0))
        return y, h_n, c_n

    got = torch.vmap(f, in_dims=(1, 0, 0))(x, h0, c0)
    shared = torch.vmap(f, in_dims=(1, None, None))(x, h0[0], c0[0])
    for n in range(N):
        y, (h_n, c_n) = theirs(x[:, n], (h0[n], c0[n]))
        assert_close([out[n] for out in got], [y, h_n, c_n])
        assert_close(shared[0][n], theirs(x[:, n], (h0[0], c0[0]))[0])


def test_vmap_of_an_ensemble_and_per_sample_gradients():
    members = [pair(seed=seed, num_layers=2)[1] for seed in range(3)]
    params, buffers = torch.func.stack_module_state(members)
    base = copy.deepcopy(members[0])
    x, _ = inputs(base, "batched")

    def loss(p, x):
        return torch.func.functional_call(base, p, (x,))[0].square().sum()

    losses = torch.vmap(loss, in_dims=(0, None))(params, x)
    assert_close(losses, torch.stack([m(x)[0].square().sum() for m in members]))
    one = {k: v[1] for k, v in params.items()}
    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 1))(one, x[:, :, None])
    through_vmap = torch.func.grad(
        lambda p: torch.vmap(loss, in_dims=(None, 1))(p, x[:, :, None]).sum())(one)
    for b in range(B):
        members[1].zero_grad()
        members[1](x[:, b:b + 1])[0].square().sum().backward()
        for name, p in members[1].named_parameters():
            assert_close(per_sample[name][b], p.grad)
    for name, total in through_vmap.items():
        assert_close(total, per_sample[name].sum(0))


def test_torch_export():
    _, ours = pair(torch.float32)
    x, _ = inputs(ours, "batched")
    program = torch.export.export(ours, (x,))
    assert_close(program.module()(x), ours(x), torch.float32)


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


def test_forget_bias():
    m = lstmcore.torch.LSTM(I, H, num_layers=2, forget_bias=1.5)
    for k in range(2):
        b = getattr(m, f"bias_ih_l{k}") + getattr(m, f"bias_hh_l{k}")
        assert torch.equal(b[H:2 * H], torch.full((H,), 1.5)) and b[:H].std() > 0
    with pytest.raises(ValueError, match="needs bias=True"):
        lstmcore.torch.LSTM(I, H, bias=False, forget_bias=1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_unsupported_dtype_says_what_to_do(dtype):
    m = lstmcore.torch.LSTM(I, H).to(dtype)
    with pytest.raises(ValueError, match=r"float32 and float64.*\.float\(\)"):
        m(torch.zeros(T, B, I, dtype=dtype))


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
        "own": Own(I, H), "patched": patched, "short": torch.nn.LSTM(I, H).bfloat16(),
        "meta": torch.nn.LSTM(I, H, device="meta"), "fine": torch.nn.LSTM(I, H)})
    report = lstmcore.torch.accelerate(model)
    assert report.replaced == ["fine"]
    for name, why in {"own": "subclass", "patched": "forward", "short": "bfloat16",
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
