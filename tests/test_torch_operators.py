"""The operators under lstmcore.torch.LSTM: everything that PyTorch can ask of a layer."""

import copy
import subprocess
import sys

import pytest
from torch_pairs import (IGNORED, B, H, I, P, T, assert_close, flat, inputs, pair, states,
                         torch)

import lstmcore.torch
from lstmcore import functional
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

pytestmark = IGNORED


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
            torch.tensor([1, 3]) if ragged else None, reverse, None, True]


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


@pytest.fixture
def nan_in_new_memory():
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def test_gradgradcheck_packed(nan_in_new_memory):
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


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes what is called while it is on; eager mode it is not."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["batched", "packed-unsorted"])
def test_eager_mode_and_operators_give_the_same_bits(kind):
    _, ours = pair(num_layers=2, bidirectional=True, proj_size=P)
    x, hx = inputs(ours, kind)
    eager = flat(ours, x, hx)
    with Calls() as calls:
        torch.testing.assert_close(flat(ours, x, hx), eager, rtol=0, atol=0)
    assert calls.names.count("lstmcore::lstm") == calls.names.count("lstmcore::lstm_backward") == 4


def test_gradients_cost_no_operator_in_eager_mode(monkeypatch):
    _, ours = pair(num_layers=2, bidirectional=True)
    x, hx = inputs(ours, "batched")
    for name in ("_lstm", "_lstm_backward"):
        monkeypatch.setattr(lstmcore.torch.operators, name, None)
    flat(ours, x, hx)


@pytest.mark.parametrize("what", ["x", "weight", "bias", "h0", "y"])
def test_changes_of_saved_tensors_are_noticed(what):
    _, ours = pair()
    x, hx = inputs(ours, "batched")
    y, (h_n, _) = ours(x, hx)
    changed = dict(x=x, weight=ours.weight_hh_l0, bias=ours.bias_ih_l0, h0=hx[0], y=y)[what]
    with torch.no_grad():
        changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h_n.sum().backward()


def test_tape_is_freed_by_the_backward_pass():
    _, ours = pair()
    y, _ = ours(inputs(ours, "batched")[0])
    assert y.grad_fn.tape.nbytes == 8 * T * B * 5 * H
    y.sum().backward()
    assert y.grad_fn.tape is None


def test_hooks_on_saved_tensors_get_the_tape():
    _, ours = pair()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t,
                                                  lambda t: t):
        y, _ = ours(inputs(ours, "batched")[0])
    assert {T * B * 4 * H, T * B * H} <= {*saved}
    y.sum().backward()


def test_both_biases_get_a_gradient_of_their_own():
    _, ours = pair()
    ours(inputs(ours, "batched")[0])[0].sum().backward()
    assert torch.equal(ours.bias_ih_l0.grad, ours.bias_hh_l0.grad)
    ours.bias_ih_l0.grad.zero_()
    assert ours.bias_hh_l0.grad.abs().sum() > 0


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


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's
def test_compiled_autograd(fresh_dynamo):
    from torch._dynamo import compiled_autograd
    theirs, ours = pair(num_layers=2)
    compiler = torch.compile(backend="eager", fullgraph=True)
    for _ in range(2):  # one graph, two inputs
        x, hx = inputs(ours, "batched")
        expected = flat(theirs, x, hx)
        with compiled_autograd._enable(compiler):
            y, (h_n, c_n) = ours(x, hx)
            torch.manual_seed(99)
            loss = sum((out * torch.randn_like(out)).sum() for out in (y, h_n, c_n))
            loss.backward()
        assert_close([p.grad for p in ours.parameters()], list(expected[1][1:-2]))
        ours.zero_grad()


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


def test_jit_trace_serves_with_and_without_gradients():
    theirs, ours = pair(num_layers=2, bidirectional=True)
    x, _ = inputs(ours, "batched")
    traced = torch.jit.trace(ours, x)
    x = torch.cat([x, x])
    results = []
    for m in (theirs, traced):
        y, (h_n, c_n) = m(x)
        grads = torch.autograd.grad(y.square().sum() + c_n.sum(), [*m.parameters()])
        with torch.no_grad():
            results.append([y, h_n, c_n, *grads, m(x)[0]])
    assert_close(*results)


def test_jit_script_is_refused_with_a_way_out():
    with pytest.raises(TypeError, match="cannot compile lstmcore.torch.LSTM: use torch.jit.trace"):
        torch.jit.script(torch.nn.Sequential(pair()[1]))


@pytest.mark.parametrize("first", ["torch", "torch._dynamo"])
def test_import_waits_for_dynamo(first):
    subprocess.run([sys.executable, "-c", f"""if 1:
        import {first}, sys, lstmcore.torch
        assert ("torch._dynamo" in sys.modules) == ("{first}" == "torch._dynamo")
        m, x = lstmcore.torch.LSTM(2, 3), torch.zeros(4, 1, 2)
        assert torch.equal(torch.compile(m, fullgraph=True, backend="eager")(x)[0], m(x)[0])
        """], check=True)


def test_torch_export():
    _, ours = pair(torch.float32)
    x, _ = inputs(ours, "batched")
    program = torch.export.export(ours, (x,))
    assert_close(program.module()(x), ours(x), torch.float32)
