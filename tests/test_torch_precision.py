"""The modules of lstmcore.torch below float32: under autocast, in bfloat16, and frozen."""

import copy
import io
import pickle
import warnings

import numpy as np
import pytest
from torch_pairs import (EVERYTHING, IGNORED, LAYERS, MODULES, B, H, I,
                         P, T, assert_close, build, called, inputs, is_cell, leaves, pair, parts,
                         torch, weight, whole)

import lstmcore.torch
from lstmcore import functional
from torch.nn.utils.rnn import PackedSequence

pytestmark = [
    *IGNORED, pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")]
F32, BF16 = torch.float32, torch.bfloat16


def autocast(dtype=BF16):
    return torch.autocast("cpu", dtype=dtype)


def cast(tree, dtype):
    """Every tensor of floats among these as one of this type; a module is copied."""
    if isinstance(tree, torch.nn.Module):
        return copy.deepcopy(tree).to(dtype)
    if isinstance(tree, PackedSequence):
        return tree._replace(data=tree.data.to(dtype))
    if isinstance(tree, tuple):
        return tuple(cast(leaf, dtype) for leaf in tree)
    return tree if tree is None else tree.to(dtype)


def results(m, x, hx):
    """Every output, and gradients of a random projection of them: of x, the states, the weights."""
    x, hx, wanted = leaves(m, x, hx)
    outputs = called(m, x, hx)
    random = np.random.default_rng(99)
    loss = sum((out * torch.from_numpy(random.standard_normal(out.shape)).to(out.dtype)).sum()
               for out in outputs)
    return outputs + list(torch.autograd.grad(loss, wanted))


def accelerated(m):
    m = copy.deepcopy(m)
    assert lstmcore.torch.accelerate(m).replaced
    return m


def error(got, truth):
    """Root mean square, relative; of a truth of zeros, absolute."""
    got, truth = got.detach().double(), truth.detach()
    scale = truth.square().sum() if truth.any() else 1
    return float(((got - truth).square().sum() / scale).sqrt())


def dtypes(tensors):
    return [t.dtype for t in tensors]


# Bits ---------------------------------------------------------------------------------------------


def by_hand(m, x, hx, d, compute="bfloat16"):
    """Every output and gradient of one layer or cell by lstmcore's functions, in float32."""
    def array(t):
        return t.detach().float().numpy()

    W = {k.removesuffix("_l0"): array(p) for k, p in m.named_parameters()}
    cell, b_ih, b_hh = is_cell(m), W["bias_ih"], W["bias_hh"]
    name = "lstm" if "LSTM" in type(m).__name__ else "gru" if "GRU" in type(m).__name__ else "rnn"
    b, options = b_ih + b_hh, {}
    if name == "gru":
        b = np.concatenate([b[:2 * H], b_ih[2 * H:], b_hh[2 * H:]])
    elif name == "rnn":
        options = dict(nonlinearity=m.nonlinearity)
    else:
        options = dict(peepholes=W.get("weight_peephole"), W_hr=W.get("weight_hr"))
    x, d = (array(x)[None], [array(t) for t in d]) if cell else (array(x), [array(t) for t in d])
    y, final, tape = getattr(lstmcore, f"{name}_forward")(
        x, W["weight_ih"], W["weight_hh"], b,
        *(array(h) if cell else array(h)[0] for h in parts(hx)), compute=compute, **options)
    final = parts(final)
    if cell:                # h is y, whose gradient is the first
        outputs, d = final, [d[0][None], None, *d[1:]]
    else:
        outputs, d = [y, *(h[None] for h in final)], [d[0], *(t[0] for t in d[1:])]
    g = getattr(lstmcore, f"{name}_backward")(tape, *d)
    states = [g.dh0, g.dc0] if name == "lstm" else [g.dh0]
    db_hh = np.concatenate([g.db[:2 * H], g.db[3 * H:]]) if name == "gru" else g.db
    gradients = [g.dx[0] if cell else g.dx, *(h if cell else h[None] for h in states), g.dW_ih,
                 g.dW_hh, g.db[:len(b_ih)], db_hh]
    gradients += [a for a in (getattr(g, "dpeepholes", None), getattr(g, "dW_hr", None))
                  if a is not None]
    return [torch.from_numpy(a) for a in (*outputs, *gradients)]


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
@pytest.mark.parametrize("config", [dict(peepholes=True), dict(proj_size=P), *MODULES.values()],
                         ids=str)
def test_bits_are_those_of_lstmcore_rounded_once(config, how):
    torch.manual_seed(2)
    m = build(lstmcore.torch, config)
    for p in m.parameters():
        torch.nn.init.normal_(p)
    x, hx = inputs(m, "batched")
    if how == "bfloat16":
        m, x, hx = m.bfloat16(), x.bfloat16(), cast(hx, BF16)
    x, hx, wanted = leaves(m, x, hx)
    with torch.autocast("cpu", dtype=BF16, enabled=how == "autocast"):
        outputs = called(m, x, hx)
    d = [torch.randn(out.shape).to(out.dtype) for out in outputs]
    got = torch.autograd.grad(outputs, wanted, d)
    got = [*outputs, *got]

    def equal(compute):
        return [torch.equal(ours, theirs.to(ours.dtype))
                for ours, theirs in zip(got, by_hand(m, x, hx, d, compute), strict=True)]

    # One relu step of bfloat16 arrays rounds nothing more: dy passes, or it does not.
    exact = how == "bfloat16" and config == MODULES["relu-cell"]
    assert all(equal("bfloat16")) and all(equal("float32")) == exact


def test_float32_between_layers():
    torch.manual_seed(3)
    stack = lstmcore.torch.LSTM(I, H, num_layers=2).bfloat16()
    x = torch.randn(T, B, I, dtype=BF16)
    first, second = (torch.nn.LSTM(n, H) for n in (I, H))
    for k, one in enumerate((first, second)):
        one.load_state_dict({f"{name}_l0": stack.state_dict()[f"{name}_l{k}"]
                             for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")})
    lstmcore.torch.accelerate(both := torch.nn.ModuleList([first, second]))
    y = x.float()
    with torch.no_grad():
        for one in both:
            one.freeze("bfloat16")
            y, _ = one(y)
        assert y.dtype == F32 and torch.equal(stack(x)[0], y.bfloat16())


# Types and errors against torch -------------------------------------------------------------------


def types_of_torch(m, x, hx):
    """What torch.nn gives under autocast; if this CPU is none for that, on one that is."""
    dense = isinstance(m, torch.nn.LSTM) and not isinstance(x, PackedSequence) and not m.proj_size
    if dense and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return [BF16] * 3
    return dtypes(called(m, x, hx))


@pytest.mark.parametrize("state", [None, F32, BF16], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("config, kind", [
    param for param in EVERYTHING if "-plain" in param.id or "projected" in param.id])
def test_autocast_gives_the_types_of_torch(config, kind, dtype, state):
    theirs, ours = pair(F32, **config)
    x, hx = inputs(ours, kind)
    x, hx = cast(x, dtype), None if state is None else cast(hx, state)
    with autocast():
        got = results(ours, x, hx)
        n = len(called(ours, x, hx))
        assert dtypes(got[:n]) == types_of_torch(theirs, x, hx)
        data = x.data if isinstance(x, PackedSequence) else x
        assert dtypes(got[n:]) == [data.dtype, *dtypes(parts(hx)),
                                   *[F32] * len(list(ours.parameters()))]
        with torch.autocast("cpu", enabled=False):
            assert called(ours, cast(x, F32))[-1].dtype == F32


@pytest.mark.parametrize("module", ["LSTM", "LSTMCell"])
def test_autocast_takes_the_type_of_c_where_states_differ(module):
    theirs, ours = pair(F32, **MODULES[module])
    for kind in ("packed",) if module == "LSTM" else ("batched",):
        x, (h, c) = inputs(ours, kind)
        for hx in (h.bfloat16(), c), (h, c.bfloat16()):
            with autocast():
                assert dtypes(called(ours, x, hx)) == types_of_torch(theirs, x, hx)


@pytest.mark.parametrize("module", MODULES)
def test_autocast_leaves_float64_alone(module):
    theirs, ours = pair(**MODULES[module])
    x, hx = inputs(ours, "batched")
    expected = results(theirs, x, hx)
    for dtype in BF16, torch.float16:
        with autocast(dtype):
            assert_close(results(ours, x, hx), expected)
            with pytest.raises(ValueError, match=r"torch.float32\) does not match"):
                ours(x.float())
            *same, last = parts(hx)
            with pytest.raises(ValueError, match=f"{'hc'[len(same)]} of the initial state must be "
                                                 "torch.float64"):
                ours(x, whole(ours, [*same, last.float()]))


@pytest.mark.parametrize("module", MODULES)
def test_float16_is_an_error_that_says_what_to_do(module):
    theirs, ours = pair(F32, **MODULES[module])
    x, _ = inputs(ours, "batched")
    with autocast(torch.float16):
        with pytest.raises(ValueError, match=r"no products of torch.float16.*torch.bfloat16"):
            ours(x)
        with torch.autocast("cpu", enabled=False):
            ours(x)
    half, x = ours.half(), x.half()
    with pytest.raises(ValueError, match=r"float16: convert both with .bfloat16\(\) or .float\(\)"):
        half(x)
    with autocast():
        assert called(half, x)[0].dtype in (BF16, F32)
    assert "float16" in lstmcore.torch.accelerate(theirs.half()).refused[""]


@pytest.mark.parametrize("bad", ["x", "h", "c"])
def test_one_type_for_module_input_and_state(bad):
    """torch.nn takes a c of another type where oneDNN has bfloat16, and refuses it elsewhere."""
    theirs, ours = pair(F32)
    x, (h, c) = inputs(ours, "batched")
    args = dict(x=x, h=h, c=c)
    theirs, ours = theirs.bfloat16(), ours.bfloat16()
    args = {k: v if k == bad else v.bfloat16() for k, v in args.items()}
    if bad != "c":
        with pytest.raises((ValueError, RuntimeError)):
            theirs(args["x"], (args["h"], args["c"]))
    with pytest.raises(ValueError, match="torch.float32"):
        ours(args["x"], (args["h"], args["c"]))


# Accuracy against torch ---------------------------------------------------------------------------

SHAPES = {  # T, B, I, H, options
    "short": (7, 5, 3, 6, {}),
    "long": (50, 3, 8, 32, {}),
    "deep": (20, 3, 8, 24, dict(num_layers=2, bidirectional=True)),
    "projected": (30, 4, 40, 24, dict(proj_size=8)),
    "gru": (50, 3, 8, 32, dict(cls="GRU")),
    "deep-gru": (20, 3, 8, 24, dict(cls="GRU", num_layers=2, bidirectional=True)),
    "tanh": (20, 3, 8, 24, dict(cls="RNN")),
}


def problem(shape):
    """A module of torch with weights as after training, twice the usual, an input and a state."""
    T, B, I, H, options = SHAPES[shape]
    torch.manual_seed(0)
    cls = options.get("cls", "LSTM")
    m = getattr(torch.nn, cls)(I, H, **{k: v for k, v in options.items() if k != "cls"})
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(2)
    n = m.num_layers * (1 + m.bidirectional)
    hx = torch.randn(n, B, m.proj_size or H) / 2, torch.randn(n, B, H)
    return m, torch.randn(T, B, I), hx if cls == "LSTM" else hx[0]


@pytest.mark.parametrize("how", ["bfloat16", "autocast", "autocast-bfloat16-input"])
@pytest.mark.parametrize("shape", SHAPES)
def test_results_and_gradients_are_nearer_to_the_truth_than_torchs(shape, how):
    m, x, hx = problem(shape)
    if how == "bfloat16":
        m, x, hx = cast((m, x, hx), BF16)
    truth = results(*cast((m, x, hx), torch.float64))
    if how == "autocast-bfloat16-input":
        x, hx = cast((x, hx), BF16)
    # Without oneDNN, whose bfloat16 not every CPU has, PyTorch computes with bfloat16 products too.
    with torch.backends.mkldnn.flags(enabled=False), \
            torch.autocast("cpu", dtype=BF16, enabled=how != "bfloat16"):
        theirs, ours = results(m, x, hx), results(accelerated(m), x, hx)
    for got, other, true in zip(ours, theirs, truth, strict=True):
        assert 0 < error(got, true) <= error(other, true)
    # Rounding to bfloat16 alone is an error of 2**-9 at most, 0.0017 in the mean.
    assert error(ours[0], truth[0]) < 0.006


@pytest.mark.parametrize("config, kind", [      # the gradient of relu jumps where a sum is near 0
    param for param in EVERYTHING if "relu" not in param.id])
def test_every_configuration_in_bfloat16(config, kind):
    _, ours = pair(F32, **config)
    ours = ours.bfloat16()
    x, hx = cast(inputs(pair(F32, **config)[1], kind), BF16)
    theirs = build(torch.nn, config, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    for state in None, hx:
        got = results(ours, x, state)
        assert {*dtypes(got)} == {BF16}
        truth = results(theirs, cast(x, torch.float64), cast(state, torch.float64))
        for ours_, true in zip(got, truth, strict=True):
            assert error(ours_, true) < 0.02     # 0.009 is the worst here; a wrong gate gives 0.1


def train(dtype, autocast_to):
    """Losses of a small tagger that learns to repeat the symbol of two steps ago."""
    torch.manual_seed(7)
    V, T, B, H = 8, 20, 16, 32
    model = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(V, 16),
                                 "rnn": torch.nn.LSTM(16, H), "out": torch.nn.Linear(H, V)})
    lstmcore.torch.accelerate(model)
    model.to(dtype)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.01), []
    for _ in range(150):
        tokens = torch.randint(V, (T, B))
        with torch.autocast("cpu", dtype=BF16, enabled=autocast_to is not None):
            logits = model["out"](model["rnn"](model["embedding"](tokens))[0])
        loss = torch.nn.functional.cross_entropy(logits[2:].flatten(0, 1).float(),
                                                 tokens[:-2].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_training_reaches_the_loss_of_float32():
    start, end = (lambda losses: losses[0]), (lambda losses: float(np.mean(losses[-20:])))
    exact = train(F32, None)
    assert end(exact) < start(exact) / 10
    assert end(train(F32, BF16)) < 1.05 * end(exact)
    assert end(train(BF16, None)) < 1.2 * end(exact)     # updates below 2**-9 of a weight are lost


# Everything that PyTorch can ask ------------------------------------------------------------------

WAYS = ["bfloat16", "autocast"]


MODULE = pytest.mark.parametrize("module", MODULES)


def lowered(how, **config):
    """A module, an input, a state, and the context to call it in."""
    _, m = pair(F32, **config)
    x, hx = inputs(m, "batched")
    if how == "bfloat16":
        m, x, hx = cast((m, x, hx), BF16)
    return m, x, hx, torch.autocast("cpu", dtype=BF16, enabled=how == "autocast")


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@MODULE
@pytest.mark.parametrize("how", WAYS)
def test_compile_export_and_trace(how, module, fresh_dynamo):
    m, x, hx, context = lowered(how, **MODULES[module], **dict(num_layers=2, bidirectional=True)
                                if module in LAYERS else {})
    outside = None if how == "bfloat16" else called(m, x, hx)[0]
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    if outside is not None:                 # the same compiled module outside of autocast
        assert torch.equal(parts(compiled(x, hx))[0], outside)
    with context:
        expected = called(m, x, hx)
        wanted = [x.detach().requires_grad_(), *m.parameters()]
        for f in torch.export.export(m, (x, hx)).module(), compiled:
            y, *final = parts(f(x, hx))
            final = parts(final[0]) if module in LAYERS else final
            torch.testing.assert_close([y, *final], expected, rtol=0, atol=0)
        assert torch.equal(parts(torch.jit.trace(m, x)(x))[0], called(m, x)[0])
        gradients = [torch.autograd.grad(parts(f(wanted[0], hx))[0].float().square().sum(), wanted)
                     for f in (compiled, m)]
        torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("how", WAYS)
def test_vmap_and_functional_gradients(how, layer):
    m, x, hx, context = lowered(how, num_layers=2, **LAYERS[layer])
    params = {k: p.detach() for k, p in m.named_parameters()}

    def loss(p, x):
        return torch.func.functional_call(m, p, (x,))[0].float().square().sum()

    with context:
        each = torch.vmap(torch.func.grad(loss), in_dims=(None, 1))(params, x[:, :, None])
        for b in range(B):
            m.zero_grad()
            m(x[:, b:b + 1])[0].float().square().sum().backward()
            for name, p in m.named_parameters():
                assert torch.equal(each[name][b], p.grad)


@MODULE
@pytest.mark.parametrize("how", WAYS)
def test_double_backward_checkpointing_and_retained_graphs(how, module):
    m, x, hx, context = lowered(how, **MODULES[module])
    double = cast(m, torch.float64)

    def second(m, x):
        x = x.detach().requires_grad_()
        y = called(m, x)[0]
        dx, = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, *m.parameters()], materialize_grads=True)

    with context:
        got = second(m, x)
        once = results(m, x, hx)
        again = torch.utils.checkpoint.checkpoint(results, m, x, hx, use_reentrant=False)
        torch.testing.assert_close(again, once, rtol=0, atol=0)
        y = called(m, x, hx)[0].sum()
        first = torch.autograd.grad(y, weight(m), retain_graph=True)
        assert torch.equal(*first, *torch.autograd.grad(y, weight(m)))
    for ours, true in zip(got, second(double, x.double()), strict=True):
        assert ours.dtype == x.dtype and error(ours, true) < 0.05


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("how", WAYS)
def test_copies_pickles_and_dropout(how, layer):
    m, x, hx, context = lowered(how, num_layers=2, dropout=0.5, **LAYERS[layer])
    buffer = io.BytesIO()
    torch.save(m, buffer)
    buffer.seek(0)
    with context:
        torch.manual_seed(1)
        expected = m(x, hx)[0]
        for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)),
                      torch.load(buffer, weights_only=False)):
            torch.manual_seed(1)
            assert torch.equal(other(x, hx)[0], expected)
        assert not torch.equal(m(x, hx)[0], expected)
        assert torch.equal(m.eval()(x, hx)[0], m(x, hx)[0])


def test_no_copy_of_the_weights_is_kept_between_steps():
    m, x, hx, _ = lowered("bfloat16", num_layers=2)
    held = {k: v for k, v in vars(m).items() if k not in ("_parameters", "training")}
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
    before = m.weight_hh_l1.detach().clone()
    m(x, hx)[0].sum().backward()
    optimizer.step()
    assert not torch.equal(m.weight_hh_l1, before) and m.weight_hh_l1.grad.dtype == BF16
    assert {k: v for k, v in vars(m).items() if k not in ("_parameters", "training")} == held


# Frozen -------------------------------------------------------------------------------------------


def layer_by_hand(m, x, precision, suffix="l0", reverse=False):
    """One layer in one direction of a module, by lstmcore's functions on packed weights."""
    W = {k: p.detach().float().numpy() for k, p in m.named_parameters()}
    W_ih, W_hh, W_hr = (W.get(f"weight_{name}_{suffix}") for name in ("ih", "hh", "hr"))
    packed = functional.pack("lstm", W_ih, W_hh, W_hr, precision=precision)
    return lstmcore.lstm_forward(x, W_ih, W_hh, W[f"bias_ih_{suffix}"] + W[f"bias_hh_{suffix}"],
                                 W_hr=W_hr, reverse=reverse, keep_tape=False, packed=packed)[0]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("proj_size", [0, P])
def test_frozen_bits_are_those_of_packed_weights(precision, proj_size, dtype):
    torch.manual_seed(1)
    m = lstmcore.torch.LSTM(I, H, num_layers=2, bidirectional=True, proj_size=proj_size).to(dtype)
    x = torch.randn(T, B, I, dtype=dtype)
    with torch.no_grad():
        plain = m(x)[0]
    assert m.freeze(precision) is m and not m.training

    def agree():
        y = x.float().numpy()
        for k in range(2):
            y = np.concatenate([layer_by_hand(m, y, precision, f"l{k}"),
                                layer_by_hand(m, y, precision, f"l{k}_reverse", True)], 2)
        expected = torch.from_numpy(y).to(dtype)
        with torch.no_grad():
            for other in (m, m, copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
                assert torch.equal(other(x)[0], expected)
            with autocast():
                assert torch.equal(m(x)[0], expected.bfloat16() if not proj_size else
                                   expected.to(m(x)[0].dtype))
        return expected

    same = (precision, dtype) in (("float32", F32), ("bfloat16", BF16))
    assert torch.equal(agree(), plain) == same
    for write in (lambda W: W.data.mul_(2), lambda W: W.data[0].neg_(),
                  lambda W: W.data.copy_(W.data.flip(0))):      # which no version counts
        for name in ("weight_hh_l0", "weight_ih_l1_reverse", *(["weight_hr_l1"] * bool(proj_size))):
            write(getattr(m, name))
            agree()
    with torch.no_grad():
        assert m.train()(x)[0].dtype == dtype and m._precision is None
        fresh = copy.deepcopy(m)
        assert torch.equal(m(x)[0], fresh(x)[0])


@MODULE
def test_frozen_without_a_precision_is_of_the_call(module):
    _, plain = pair(F32, **MODULES[module])
    m = copy.deepcopy(plain).freeze()
    x, hx = inputs(m, "batched")
    with torch.inference_mode():
        for _ in range(2):                  # packed anew where the format changes
            assert torch.equal(called(m, x, hx)[0], called(plain, x, hx)[0])
            with autocast():
                assert torch.equal(called(m, x, hx)[0], called(plain, x, hx)[0])


@MODULE
def test_frozen_int8_has_no_gradients_and_bfloat16_has(module):
    _, m = pair(F32, **MODULES[module])
    x, hx = inputs(m, "batched")
    m.freeze("int8")
    with pytest.raises(ValueError, match="int8 has no gradients: call it under"):
        m(x)
    with torch.no_grad():
        assert not called(m, x)[0].requires_grad
    m.freeze("bfloat16")
    outputs = called(m, x, hx)
    d = [torch.randn(out.shape) for out in outputs]
    got, = torch.autograd.grad(outputs, weight(m), d)
    place = len(outputs) + 1 + len(parts(hx)) + 1       # of dW_hh
    assert torch.equal(got, by_hand(m, x, hx, d)[place])


@MODULE
def test_frozen_int8_under_compile_export_and_vmap(module, fresh_dynamo):
    m = pair(F32, **MODULES[module], **dict(num_layers=2, bidirectional=True)
             if module in LAYERS else {})[1].freeze("int8")
    x, _ = inputs(m, "batched")
    rows = x.dim() - 2
    with torch.no_grad():
        expected = called(m, x)[0]
        plain = called(copy.deepcopy(m).train().eval(), x)[0]
        assert not torch.equal(expected, plain) and error(expected, plain.double()) < 0.02
        compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
        for other in (compiled, torch.export.export(m, (x,)).module(), torch.jit.trace(m, x)):
            assert torch.equal(parts(other(x))[0], expected)
        got = torch.vmap(lambda x: called(m, x)[0], in_dims=rows, out_dims=rows)(
            x.unsqueeze(rows + 1))
        assert torch.equal(got.squeeze(rows + 1), expected)


@pytest.mark.parametrize("dtype, precision, error, match", [
    (F32, "int4", ValueError, "precision must be one of .*float64, bfloat16, int8, got 'int4'"),
    (F32, "float64", TypeError, "needs weights of float64, got torch.float32"),
    (torch.float64, "int8", TypeError, "needs weights of float32 or bfloat16, got torch.float64")])
def test_freeze_refuses(dtype, precision, error, match):
    for module in "LSTM", "GRUCell":
        m = build(lstmcore.torch, MODULES[module], dtype=dtype)
        with pytest.raises(error, match=match):
            m.freeze(precision)
        assert m._frozen is None and m.training


# accelerate and restore ---------------------------------------------------------------------------


def test_accelerate_freezes_what_it_replaced():
    torch.manual_seed(1)
    model = torch.nn.ModuleDict({
        "rnn": torch.nn.LSTM(I, H), "wide": torch.nn.LSTM(I, H, dtype=torch.float64),
        "ours": lstmcore.torch.LSTM(I, H), "short": torch.nn.LSTM(I, H).bfloat16(),
        "cell": torch.nn.LSTMCell(I, H), "gru": torch.nn.GRU(I, H)})
    x = torch.randn(T, B, I)
    report = lstmcore.torch.accelerate(model, freeze=True, precision="int8")
    assert report.replaced == ["rnn", "short", "cell", "gru"]
    assert {name: why.split()[0] for name, why in report.refused.items()} == {
        "wide": "precision='int8'"}
    assert "kept wide: precision='int8' needs weights of float32 or bfloat16" in str(report)
    assert type(model["wide"]) is torch.nn.LSTM and model["ours"]._frozen is None
    for name in "cell", "gru":
        assert model[name]._precision == "int8" and not model[name].training
    assert not model["rnn"].training and model["ours"].training
    with torch.no_grad():
        expected = layer_by_hand(model["rnn"], x.numpy(), "int8")
        assert np.array_equal(model["rnn"](x)[0].numpy(), expected)
    assert lstmcore.torch.restore(model["rnn"]).replaced == [""]
    assert not {"_frozen", "_precision"} & {*vars(model["rnn"])}
    assert lstmcore.torch.accelerate(model, True).replaced == ["rnn", "wide"]
    with torch.no_grad():
        expected = layer_by_hand(model["rnn"], x.numpy(), "float32")
        assert np.array_equal(model["rnn"](x)[0].numpy(), expected)
    model.train()
    assert model["rnn"](x)[0].requires_grad
    for args, match in ((dict(precision="int8"), "precision='int8' needs freeze=True"),
                        (dict(freeze=True, precision="int4"), "precision must be one of")):
        with pytest.raises(ValueError, match=match):
            lstmcore.torch.accelerate(torch.nn.Linear(2, 3), **args)


def test_quantize_dynamic_beside_a_frozen_layer():
    model = torch.nn.ModuleDict({"rnn": torch.nn.LSTM(I, H), "head": torch.nn.Linear(H, 2)})
    lstmcore.torch.accelerate(model, freeze=True, precision="int8")
    x = torch.randn(T, B, I)
    with pytest.warns(UserWarning, match=r"stays as it is.*freeze\(precision='int8'\)"), \
            warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")
        quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.LSTM, torch.nn.Linear})
    assert type(quantized["head"]) is not torch.nn.Linear
    with torch.no_grad():
        assert torch.equal(quantized["rnn"](x)[0], model["rnn"](x)[0])
