"""The operators under lstmcore.torch: everything that PyTorch can ask of a layer or a cell."""

import copy
import subprocess
import sys

import pytest
from torch_pairs import (IGNORED, LAYERS, MODULES, B, H, I, P, T, assert_close, called, flat,
                         inputs, is_cell, pair, parts, states, torch, weight, whole)

import lstmcore.torch
from lstmcore import functional
from lstmcore.torch.operators import recurrent, recurrent_backward
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

pytestmark = IGNORED


# What autograd can ask ----------------------------------------------------------------------------


def cell(name="lstm", peepholes=False, project=False, ragged=False, reverse=False, bias=True):
    """Arguments of the operator `recurrent`, small, float64, all requiring gradients."""
    T, B, I, H = 3, 2, 2, 3
    P = 2 if project else H
    row = functional.cell_row(name)
    rows, G = row.fed * H, row.gates * H
    torch.manual_seed(3)

    def leaf(*shape, wanted=True):
        return torch.randn(shape, dtype=torch.float64).requires_grad_() if wanted else None

    return [leaf(T, B, I), leaf(rows, I), leaf(rows, P), leaf(G, wanted=bias), leaf(B, P),
            leaf(B, H, wanted=row.has_c), leaf(3, H, wanted=peepholes), leaf(P, H, wanted=project),
            torch.tensor([1, 3]) if ragged else None, reverse, name, None, True]


CELLS = {
    "plain": dict(),
    "no-bias": dict(bias=False, reverse=True),
    "peepholes": dict(peepholes=True, ragged=True),
    "projected": dict(project=True, ragged=True, reverse=True, peepholes=True),
    "gru": dict(name="gru"),
    "gru-no-bias": dict(name="gru", bias=False, reverse=True, ragged=True),
    "tanh": dict(name="tanh", ragged=True),
    "relu": dict(name="relu", reverse=True),
}


def upstream(args):
    y, h_n, c_n, gates, c = (out.detach() for out in recurrent(*args))
    d = [torch.randn_like(out).requires_grad_() for out in (y, h_n, c_n)]
    return [*d[:2], d[2] if c_n.numel() else None], (y, gates, c)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # by PyTorch 2.14 itself
@pytest.mark.parametrize("which", ["no-bias", "projected", "gru", "gru-no-bias", "tanh"])
def test_opcheck(which):
    args = cell(**CELLS[which])
    torch.library.opcheck(recurrent, args)
    torch.library.opcheck(recurrent, [*args[:-1], False])
    d, tape = upstream(args)
    d = [None, d[1], None] if which == "no-bias" else d
    torch.library.opcheck(recurrent_backward, (*d, *args[:-1], *tape))


@pytest.mark.parametrize("which", CELLS)
def test_gradcheck_and_gradgradcheck(which):
    args = cell(**CELLS[which])
    leaves = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.requires_grad]

    def outputs(*_):
        return [out for out in recurrent(*args)[:3] if out.numel()]

    assert torch.autograd.gradcheck(outputs, leaves)
    assert torch.autograd.gradgradcheck(outputs, leaves)


@pytest.fixture
def nan_in_new_memory():
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("cls", ["LSTM", "GRU", "RNN"])
def test_gradgradcheck_packed(cls, nan_in_new_memory):
    m = getattr(lstmcore.torch, cls)(2, 3, bidirectional=True, dtype=torch.float64)
    x = pack_padded_sequence(torch.randn(3, 2, 2, dtype=torch.float64), [1, 3],
                             enforce_sorted=False)
    data = x.data.requires_grad_()

    def f(data):
        return tuple(called(m, PackedSequence(data, *x[1:])))

    assert torch.autograd.gradcheck(f, data) and torch.autograd.gradgradcheck(f, data)


@pytest.mark.parametrize("module", MODULES)
def test_second_backward_over_a_retained_graph(module):
    theirs, ours = pair(**MODULES[module])
    x, hx = inputs(ours, "batched")
    expected = flat(theirs, x, hx)[1][1 + len(parts(hx))]
    outputs = called(ours, x, hx)
    torch.manual_seed(99)
    loss = sum((out * torch.randn(out.shape, dtype=out.dtype)).sum() for out in outputs)
    for retain in (True, True, False):
        got, = torch.autograd.grad(loss, weight(ours, "ih"), retain_graph=retain)
        assert_close(got, expected)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, weight(ours, "ih"))


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes what is called while it is on; eager mode it is not."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("module, kind", [
    *((module, "batched") for module in MODULES), *((layer, "packed-unsorted") for layer in LAYERS)])
def test_eager_mode_and_operators_give_the_same_bits(module, kind):
    config = MODULES[module]
    if module in LAYERS:
        config = dict(num_layers=2, bidirectional=True, **config)
    _, ours = pair(**config, **dict(proj_size=P) if module == "LSTM" else {})
    x, hx = inputs(ours, kind)
    eager = flat(ours, x, hx)
    with Calls() as calls:
        torch.testing.assert_close(flat(ours, x, hx), eager, rtol=0, atol=0)
    assert calls.names.count("lstmcore::recurrent") == (4 if module in LAYERS else 1)
    assert calls.names.count("lstmcore::recurrent_backward") == (4 if module in LAYERS else 1)


@pytest.mark.parametrize("module", MODULES)
def test_gradients_cost_no_operator_in_eager_mode(module, monkeypatch):
    _, ours = pair(**MODULES[module])
    x, hx = inputs(ours, "batched")
    for name in ("_recurrent", "_recurrent_backward"):
        monkeypatch.setattr(lstmcore.torch.operators, name, None)
    flat(ours, x, hx)


@pytest.mark.parametrize("layer", ["LSTM", "GRU", "tanh"])
@pytest.mark.parametrize("what", ["x", "weight", "bias", "h0", "y"])
def test_changes_of_saved_tensors_are_noticed(what, layer):
    _, ours = pair(**LAYERS[layer])
    x, hx = inputs(ours, "batched")
    y, h_n, *_ = called(ours, x, hx)
    changed = dict(x=x, weight=ours.weight_hh_l0, bias=ours.bias_ih_l0, h0=parts(hx)[0], y=y)[what]
    with torch.no_grad():
        changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h_n.sum().backward()


@pytest.mark.parametrize("layer, kept", [("LSTM", 5 * H), ("GRU", 4 * H)])
def test_tape_is_freed_by_the_backward_pass(layer, kept):
    _, ours = pair(**LAYERS[layer])
    y, _ = ours(inputs(ours, "batched")[0])
    assert y.grad_fn.tape.nbytes == 8 * T * B * kept
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


@pytest.mark.parametrize("layer", LAYERS)
def test_both_biases_get_a_gradient_of_their_own(layer):
    _, ours = pair(**LAYERS[layer])
    ours(inputs(ours, "batched")[0])[0].square().sum().backward()
    ih, hh = ours.bias_ih_l0.grad, ours.bias_hh_l0.grad
    same = len(ih) if layer != "GRU" else 2 * H         # the rest of b_hh is reset
    assert torch.equal(ih[:same], hh[:same])
    assert (layer == "GRU") == (not torch.equal(ih, hh))
    ih.zero_()
    assert (hh != 0).all()


@pytest.mark.parametrize("which", ["plain", "gru"])
def test_gates_are_spoiled_only_for_those_who_drop_them(which):
    args = cell(**CELLS[which])
    y, _, _, gates, _ = recurrent(*args)
    before = gates.clone()
    y.sum().backward()
    assert torch.equal(gates, before)


@pytest.mark.parametrize("module", MODULES)
def test_batched_gradients_and_checkpointing(module):
    theirs, ours = pair(**MODULES[module])
    x, _ = inputs(ours, "batched")
    x.requires_grad_()
    y = called(ours, x)[0]
    d = torch.randn(4, *y.shape, dtype=torch.float64)
    got, = torch.autograd.grad(y, x, d, is_grads_batched=True)
    for n in range(4):
        assert_close(got[n], torch.autograd.grad(called(theirs, x)[0], x, d[n])[0])
    y = torch.utils.checkpoint.checkpoint(lambda x: called(ours, x)[0], x, use_reentrant=False)
    assert_close(torch.autograd.grad(y, x, d[0])[0], got[0])


@pytest.mark.parametrize("module, used", [("LSTM", 0), ("LSTM", 1), ("LSTM", 2), ("GRU", 0),
                                          ("GRU", 1), ("relu", 1), ("LSTMCell", 0),
                                          ("LSTMCell", 1)])
def test_undefined_output_gradients(module, used):
    theirs, ours = pair(**MODULES[module])
    x, hx = inputs(ours, "batched")
    results = []
    for m in (theirs, ours):
        called(m, x, hx)[used].square().sum().backward()
        results.append([p.grad for p in m.parameters()])
    assert_close(results[1], results[0])


@pytest.mark.parametrize("module", MODULES)
def test_frozen_weights_still_give_dx(module):
    theirs, ours = pair(**MODULES[module])
    for m in (theirs, ours):
        m.requires_grad_(False)
    x, hx = inputs(ours, "batched")
    assert_close(flat(ours, x, hx), flat(theirs, x, hx))


@pytest.mark.parametrize("layer", LAYERS)
def test_non_contiguous_inputs_weights_and_gradients(layer):
    theirs, ours = pair(**LAYERS[layer])
    for m in (theirs, ours):
        m.weight_ih_l0 = torch.nn.Parameter(m.weight_ih_l0.detach().T.contiguous().T)
    x = torch.randn(I, B, 2 * T, dtype=torch.float64).permute(2, 1, 0)[::2]
    hx = whole(ours, [s.expand(1, B, H) for s in torch.randn(2, 1, 1, 1, dtype=torch.float64)])
    assert not x.is_contiguous() and not ours.weight_ih_l0.is_contiguous()
    assert_close(flat(ours, x, hx), flat(theirs, x, hx))
    for m in (theirs, ours):
        m(x)[0].sum().backward()  # an upstream gradient with stride 0
    assert_close(ours.weight_hh_l0.grad, theirs.weight_hh_l0.grad)


FUNCTIONS = {"LSTM": "lstm_forward", "GRU": "gru_forward", "relu": "rnn_forward",
             "GRUCell": "gru_forward"}


@pytest.mark.parametrize("module", FUNCTIONS)
def test_nothing_is_saved_without_gradients(module, monkeypatch):
    kept = []
    original = getattr(functional, FUNCTIONS[module])

    def spy(*args, keep_tape, **kwargs):
        kept.append(keep_tape)
        return original(*args, keep_tape=keep_tape, **kwargs)

    monkeypatch.setattr(functional, FUNCTIONS[module], spy)
    _, ours = pair(**MODULES[module])
    x, hx = inputs(ours, "batched")
    with torch.no_grad():
        ours(x, hx)
    with torch.inference_mode():
        ours(x, hx)
    ours.requires_grad_(False)(x, hx)
    assert kept == [False] * 3


@pytest.mark.parametrize("module", FUNCTIONS)
def test_no_copy_between_tensors_and_kernels(module, monkeypatch):
    seen = []
    original = getattr(functional, FUNCTIONS[module])

    def spy(*args, **kwargs):
        result = original(*args, **kwargs)
        seen.append([a.ctypes.data for a in (*args[:3], result[0])])
        return result

    monkeypatch.setattr(functional, FUNCTIONS[module], spy)
    _, ours = pair(**MODULES[module])
    x, hx = inputs(ours, "batched")
    y = called(ours, x, hx)[0]
    tensors = (x, weight(ours, "ih"), weight(ours), y)
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
@pytest.mark.parametrize("layer", LAYERS)
def test_compile_fullgraph(layer, backend, fresh_dynamo):
    _, rnn = pair(torch.float32, num_layers=2, bidirectional=True, batch_first=True,
                  **LAYERS[layer])
    _, cell = pair(torch.float32, **MODULES[layer + ("Cell" if layer.isupper() else "-cell")])
    model = torch.nn.ModuleDict({"rnn": rnn, "out": torch.nn.Linear(2 * H, 2), "cell": cell})

    def f(x):
        return model["out"](model["rnn"](x)[0]), called(cell, x[:, 0])[-1]

    compiled = torch.compile(f, fullgraph=True, backend=backend, dynamic=backend == "aot_eager")
    for steps in (T, T + 2):
        x = torch.randn(B, steps, I)
        for retain in (False, True):  # a compiled backward, also twice
            results = []
            for g in (compiled, f):
                model.zero_grad()
                loss = sum(out.square().sum() for out in g(x))
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
@pytest.mark.parametrize("layer", ["LSTM", "GRU", "relu"])
def test_compiled_autograd(layer, fresh_dynamo):
    from torch._dynamo import compiled_autograd
    theirs, ours = pair(num_layers=2, **LAYERS[layer])
    compiler = torch.compile(backend="eager", fullgraph=True)
    for _ in range(2):  # one graph, two inputs
        x, hx = inputs(ours, "batched")
        expected = flat(theirs, x, hx)
        with compiled_autograd._enable(compiler):
            outputs = called(ours, x, hx)
            torch.manual_seed(99)
            loss = sum((out * torch.randn_like(out)).sum() for out in outputs)
            loss.backward()
        assert_close([p.grad for p in ours.parameters()], list(expected[1][1 + len(parts(hx)):]))
        ours.zero_grad()


@pytest.mark.parametrize("module", MODULES)
def test_vmap_over_inputs(module):
    theirs, ours = pair(**MODULES[module], **dict(num_layers=2, bidirectional=True)
                        if module in LAYERS else {})
    N = 4
    x = torch.stack([inputs(ours, "batched")[0] for _ in range(N)], 1)
    hx = [torch.stack(s) for s in zip(*(parts(states(ours)) for _ in range(N)))]

    def f(m, x, *hx):
        return called(m, x, whole(m, hx))

    got = torch.vmap(lambda *args: tuple(f(ours, *args)), in_dims=(1, *[0] * len(hx)))(x, *hx)
    shared = torch.vmap(lambda x: f(ours, x, *(h[0] for h in hx))[0], in_dims=1)(x)
    for n in range(N):
        assert_close([out[n] for out in got], f(theirs, x[:, n], *(h[n] for h in hx)))
        assert_close(shared[n], f(theirs, x[:, n], *(h[0] for h in hx))[0])


@pytest.mark.parametrize("module", MODULES)
def test_vmap_of_an_ensemble_and_per_sample_gradients(module):
    members = [pair(seed=seed, **MODULES[module])[1] for seed in range(3)]
    params, buffers = torch.func.stack_module_state(members)
    base = copy.deepcopy(members[0])
    x, _ = inputs(base, "batched")

    def loss(p, x):
        out = torch.func.functional_call(base, p, (x,))
        return (out if isinstance(out, torch.Tensor) else out[0]).square().sum()

    losses = torch.vmap(loss, in_dims=(0, None))(params, x)
    assert_close(losses, torch.stack([called(m, x)[0].square().sum() for m in members]))
    rows = x.dim() - 2          # the axis of the batch
    one = {k: v[1] for k, v in params.items()}
    each = x.unsqueeze(rows + 1)
    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, rows))(one, each)
    through_vmap = torch.func.grad(
        lambda p: torch.vmap(loss, in_dims=(None, rows))(p, each).sum())(one)
    for b in range(B):
        members[1].zero_grad()
        called(members[1], each.select(rows, b))[0].square().sum().backward()
        for name, p in members[1].named_parameters():
            assert_close(per_sample[name][b], p.grad)
    for name, total in through_vmap.items():
        assert_close(total, per_sample[name].sum(0))


@pytest.mark.parametrize("module", MODULES)
def test_jit_trace_serves_with_and_without_gradients(module):
    theirs, ours = pair(**MODULES[module], **dict(num_layers=2, bidirectional=True)
                        if module in LAYERS else {})
    x, _ = inputs(ours, "batched")
    traced = torch.jit.trace(ours, x)
    x = torch.cat([x, x])
    results = []
    for m in (theirs, traced):
        out = m(x)
        if is_cell(ours):
            y, *final = parts(out)
        else:
            y, final = out[0], parts(out[1])
        loss = y.square().sum() + sum(state.sum() for state in final)
        grads = torch.autograd.grad(loss, [*m.parameters()])
        with torch.no_grad():
            again = m(x)
            results.append([y, *final, *grads, again if torch.is_tensor(again) else again[0]])
    assert_close(*results)


@pytest.mark.parametrize("module", MODULES)
def test_jit_script_is_refused_with_a_way_out(module):
    ours = pair(**MODULES[module])[1]
    name = type(ours).__name__
    with pytest.raises(TypeError, match=rf"cannot compile lstmcore.torch.{name}: use torch.jit.trace"
                                        rf".*a torch.nn.{name} with"):
        torch.jit.script(torch.nn.Sequential(ours))


@pytest.mark.parametrize("first", ["torch", "torch._dynamo"])
def test_import_waits_for_dynamo(first):
    subprocess.run([sys.executable, "-c", f"""if 1:
        import {first}, sys, lstmcore.torch
        assert ("torch._dynamo" in sys.modules) == ("{first}" == "torch._dynamo")
        m, x = lstmcore.torch.LSTM(2, 3), torch.zeros(4, 1, 2)
        assert torch.equal(torch.compile(m, fullgraph=True, backend="eager")(x)[0], m(x)[0])
        """], check=True)


@pytest.mark.parametrize("module", MODULES)
def test_torch_export(module):
    _, ours = pair(torch.float32, **MODULES[module])
    x, hx = inputs(ours, "batched")
    program = torch.export.export(ours, (x, hx))
    assert_close(program.module()(x, hx), ours(x, hx), torch.float32)
