"""LSTM, GRU and RNN: gradients by finite differences and against PyTorch; states, streams, traces."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from slopes import assert_copied, assert_gradients, by_name, normal

import lstmcore
from lstmcore import GRU, LSTM, RNN, Embedding, LastStep, _kernels, sequence_mask

RAGGED = [4, 0, 6, 1, 3]        # of T = 6: unsorted, with an empty and a full sequence

RECURRENT = {
    "LSTM": lambda: LSTM(3, 4, dtype="float64", seed=1),
    "LSTM without bias": lambda: LSTM(3, 4, bias=False, dtype="float64", seed=1),
    "LSTM stack": lambda: LSTM(3, 4, 3, dtype="float64", seed=1),
    "LSTM both ways": lambda: LSTM(3, 4, 2, bidirectional=True, dtype="float64", seed=1),
    "LSTM peepholes": lambda: LSTM(3, 4, 2, peepholes=True, dtype="float64", seed=1),
    "LSTM projected": lambda: LSTM(3, 4, 2, proj_size=2, dtype="float64", seed=1),
    "LSTM projected to H": lambda: LSTM(3, 4, proj_size=4, dtype="float64", seed=1),
    "LSTM glorot": lambda: LSTM(3, 4, 2, init="glorot", dtype="float64", seed=1),
    "LSTM everything": lambda: LSTM(3, 5, 2, batch_first=True, dropout=0.4, bidirectional=True,
                                    proj_size=4, peepholes=True, dtype="float64", seed=1),
    "GRU": lambda: GRU(3, 4, dtype="float64", seed=1),
    "GRU without bias": lambda: GRU(3, 4, 2, bias=False, dtype="float64", seed=1),
    "GRU before": lambda: GRU(3, 4, 2, reset_after=False, init="glorot", dtype="float64", seed=1),
    "GRU everything": lambda: GRU(3, 4, 2, batch_first=True, dropout=0.4, bidirectional=True,
                                  dtype="float64", seed=1),
    "RNN": lambda: RNN(3, 4, dtype="float64", seed=1),
    "RNN relu": lambda: RNN(3, 4, 2, nonlinearity="relu", bias=False, dtype="float64", seed=1),
    "RNN everything": lambda: RNN(3, 4, 2, batch_first=True, dropout=0.4, bidirectional=True,
                                  dtype="float64", seed=1),
}


def as_tuple(state):
    return state if isinstance(state, tuple) else (state,)


def recurrent_case(layer, B=5, T=6):
    """x, state, dy, dstate: random, of the shapes this layer wants."""
    D, N = layer.directions, layer.directions * layer.num_layers
    lead = (B, T) if layer.batch_first else (T, B)
    P = getattr(layer, "proj_size", 0) or layer.hidden_size
    widths = (P, layer.hidden_size) if isinstance(layer, LSTM) else (P,)
    state = tuple(normal(N, B, width, seed=width) for width in widths)
    dstate = tuple(normal(N, B, width, seed=width + 9) for width in widths)
    unpack = (lambda s: s) if len(widths) > 1 else (lambda s: s[0])
    return (normal(*lead, layer.input_size), unpack(state), normal(*lead, D * P, seed=3),
            unpack(dstate))


# ---- gradients by finite differences ------------------------------------------------------------

@pytest.mark.parametrize("lengths", [None, RAGGED], ids=["dense", "ragged"])
@by_name(RECURRENT)
def test_recurrent_gradients_are_slopes(make, lengths, close):
    layer = make()
    x, state, dy, dstate = recurrent_case(layer)
    rng = layer.rng_state()

    def loss():
        layer.load_rng_state(rng)           # the same dropout every time
        y, final = layer(x, state, lengths)
        return (y * dy).sum() + sum((a * b).sum() for a, b in zip(as_tuple(final),
                                                                  as_tuple(dstate)))
    loss()
    dx, dinitial = layer.backward(dy, dstate)
    arrays = {"x": x, **dict(zip("hc", as_tuple(state))), **layer.parameters()}
    gradients = {"x": dx, **dict(zip("hc", as_tuple(dinitial))), **layer.gradients()}
    assert_gradients(close, loss, arrays, gradients)


# ---- against PyTorch ----------------------------------------------------------------------------

def torch_twin(torch, layer):
    """torch.nn.LSTM, GRU or RNN with the weights of `layer`, its second bias zero, but for b_hn."""
    options = dict(num_layers=layer.num_layers, bias=layer.bias, batch_first=layer.batch_first,
                   bidirectional=layer.bidirectional, dtype=getattr(torch, str(layer.dtype)))
    if isinstance(layer, LSTM):
        twin = torch.nn.LSTM(layer.input_size, layer.hidden_size,
                             proj_size=layer.proj_size, **options)
    elif isinstance(layer, GRU):
        twin = torch.nn.GRU(layer.input_size, layer.hidden_size, **options)
    else:
        twin = torch.nn.RNN(layer.input_size, layer.hidden_size,
                            nonlinearity=layer.nonlinearity, **options)
    ours = layer.parameters()
    with torch.no_grad():
        for name, p in twin.named_parameters():
            p.copy_(torch.from_numpy(torch_part(name, ours)))
    return twin


def torch_part(name, ours):
    """What a parameter of the twin holds, or its gradient, if `ours` are gradients."""
    if not name.startswith("bias"):
        return ours[name]
    end = name.removeprefix("bias_ih").removeprefix("bias_hh")
    b, rows = ours["bias" + end], len(ours["weight_hh" + end])
    rest = b[rows:]                         # b_hn of a GRU
    if name.startswith("bias_hh"):
        return np.concatenate([np.zeros(rows - len(rest), b.dtype), rest])
    return b[:rows]


@pytest.mark.filterwarnings("ignore:LSTM with projections")      # torch: it will be slow
@pytest.mark.parametrize("lengths", [None, [4, 2, 6, 1, 3]], ids=["dense", "ragged"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("make, options", [
    (LSTM, {}), (LSTM, dict(num_layers=3)), (LSTM, dict(num_layers=2, bidirectional=True)),
    (LSTM, dict(num_layers=2, proj_size=3, bidirectional=True, batch_first=True)),
    (LSTM, dict(bias=False)),
    (GRU, {}), (GRU, dict(num_layers=2, bidirectional=True, batch_first=True)), (GRU, dict(bias=False)),
    (RNN, {}), (RNN, dict(num_layers=2, bidirectional=True, batch_first=True)),
    (RNN, dict(nonlinearity="relu", num_layers=2)),
], ids=str)
def test_recurrent_equals_torch(make, options, dtype, lengths, close):
    torch = pytest.importorskip("torch")
    layer = make(3, 7, dtype=dtype, seed=5, **options)
    twin = torch_twin(torch, layer)
    x, state, dy, dstate = (a if isinstance(a, tuple) else a.astype(dtype)
                            for a in recurrent_case(layer))
    state, dstate = (tuple(a.astype(dtype) for a in s) if isinstance(s, tuple) else s
                     for s in (state, dstate))
    y, final = layer(x, state, lengths)
    dx, dinitial = layer.backward(dy, dstate)

    leaves = [torch.from_numpy(a).requires_grad_() for a in (x, *as_tuple(state))]
    fed, start = leaves[0], tuple(leaves[1:])
    if lengths:
        fed = torch.nn.utils.rnn.pack_padded_sequence(fed, torch.tensor(lengths),
                                                      layer.batch_first, enforce_sorted=False)
    want, last = twin(fed, start if len(start) > 1 else start[0])
    if lengths:
        want, _ = torch.nn.utils.rnn.pad_packed_sequence(want, layer.batch_first, total_length=6)
    torch.autograd.backward([want, *as_tuple(last)],
                            [torch.from_numpy(a) for a in (dy, *as_tuple(dstate))])
    close(y, want.detach(), "torch", "y")
    for got, wanted in zip(as_tuple(final), as_tuple(last)):
        close(got, wanted.detach(), "torch", "final state")
    for name, got, leaf in zip(("dx", "dh0", "dc0"), (dx, *as_tuple(dinitial)), leaves):
        close(got, leaf.grad, "torch", name)
    for name, p in twin.named_parameters():
        got, want = torch_part(name, layer.gradients()), p.grad
        if name.startswith("bias_hh"):      # but for b_hn it is that of bias_ih
            got, want = (a[2 * layer.hidden_size:] for a in (got, want))
            if not isinstance(layer, GRU):
                continue
        close(got, want, "torch", name)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_torch_state_dict_goes_in(close):
    torch = pytest.importorskip("torch")
    twin = torch.nn.LSTM(3, 5, 2, bidirectional=True, proj_size=2)
    layer = LSTM(3, 5, 2, bidirectional=True, proj_size=2)
    layer.load_state_dict(twin.state_dict())
    x = normal(4, 2, 3, dtype="float32")
    close(layer(x)[0], twin(torch.from_numpy(x))[0].detach(), "torch")


def test_torch_gru_state_dict_goes_in(close):
    """Its two biases act as one but for the last third, which the reset gate multiplies."""
    torch = pytest.importorskip("torch")
    twin = torch.nn.GRU(3, 5, 2, bidirectional=True)
    layer, x = GRU(3, 5, 2, bidirectional=True), normal(4, 2, 3, dtype="float32")
    layer.load_state_dict(twin.state_dict())
    close(layer(x)[0], twin(torch.from_numpy(x))[0].detach(), "torch")
    with pytest.raises(ValueError, match=r"bias_l0 must be \(15,\), got \(20,\)"):
        GRU(3, 5, 2, bidirectional=True, reset_after=False).load_state_dict(twin.state_dict())


# ---- what a call gives --------------------------------------------------------------------------

def test_lstm_equals_the_reference_layer_by_layer(close):
    layer = LSTM(3, 5, 2, peepholes=True, proj_size=4, bidirectional=True, dtype="float64", seed=2)
    x, (h0, c0), _, _ = recurrent_case(layer)
    y, (h_n, c_n) = layer(x, (h0, c0), RAGGED)
    p, wanted, first = layer.parameters(), x, None
    for n in range(4):
        end = f"_l{n // 2}{'_reverse' * (n % 2)}"
        half, (h, c), _ = lstmcore.reference.lstm_forward(
            wanted, p["weight_ih" + end], p["weight_hh" + end], p["bias" + end], h0[n], c0[n],
            peepholes=p["weight_peephole" + end], W_hr=p["weight_hr" + end], lengths=RAGGED,
            reverse=n % 2 == 1)
        close((h_n[n], c_n[n]), (h, c), "kernel")
        if n % 2:
            wanted = np.concatenate([first, half], axis=2)
        first = half
    close(y, wanted, "kernel")


@by_name(RECURRENT)
def test_padding_and_empty_sequences(make):
    layer = make().eval()
    x, state, _, _ = recurrent_case(layer)
    y, final = layer(x, state, RAGGED)
    steps = y.swapaxes(0, 1) if layer.batch_first else y
    assert (steps[~sequence_mask(RAGGED, 6)] == 0).all()
    assert (steps[sequence_mask(RAGGED, 6)] != 0).any()
    for start, end in zip(as_tuple(state), as_tuple(final)):
        assert (end[:, 1] == start[:, 1]).all() and (end[:, 0] != start[:, 0]).any()


@by_name(RECURRENT)
@pytest.mark.parametrize("T, B", [(0, 3), (4, 0), (0, 0)])
def test_no_steps_or_no_rows(make, T, B):
    layer = make()
    x, state, dy, dstate = recurrent_case(layer, B=B, T=T)
    y, final = layer(x, state)
    assert y.shape == dy.shape
    dx, dinitial = layer.backward(dy, dstate)
    assert dx.shape == x.shape
    for before, after in zip((*as_tuple(state), *as_tuple(dstate)),
                             (*as_tuple(final), *as_tuple(dinitial))):
        assert (before == after).all() and before.shape == after.shape
    assert not any(g.any() for g in layer.gradients().values())


def test_batch_first_swaps_x_and_y_only():
    plain, swapped = LSTM(3, 4, 2, seed=1), LSTM(3, 4, 2, batch_first=True, seed=1)
    x = normal(6, 5, 3, dtype="float32")
    y, (h, c) = plain(x, lengths=RAGGED)
    y_, (h_, c_) = swapped(x.swapaxes(0, 1), lengths=RAGGED)
    assert (y_.swapaxes(0, 1) == y).all() and (h_ == h).all() and (c_ == c).all()
    dx, _ = plain.backward(y)
    dx_, _ = swapped.backward(y_)
    assert (dx_.swapaxes(0, 1) == dx).all()


@pytest.mark.parametrize("given", ["h", "c"])
def test_missing_upstreams_are_zeros(given):
    layer, x = LSTM(3, 4, 2, seed=0), normal(5, 2, 3, dtype="float32")
    y, (h, c) = layer(x)
    zero = np.zeros_like(h)
    want = layer.backward(np.zeros_like(y), (h, zero) if given == "h" else (zero, c))
    layer(x)
    got = layer.backward(dstate=(h, None) if given == "h" else (None, c))
    assert (got[0] == want[0]).all() and all((a == b).all() for a, b in zip(got[1], want[1]))


def test_inputs_are_not_written():
    layer = LSTM(3, 4, 2, dropout=0.5, bidirectional=True, dtype="float64", seed=0)
    x, state, dy, dstate = recurrent_case(layer)
    for a in (x, *state, dy, *dstate, *layer.parameters().values()):
        a.flags.writeable = False
    layer(x, state, RAGGED)
    layer.backward(dy, dstate)
    assert any(g.any() for g in layer.gradients().values())


@by_name(RECURRENT)
def test_any_layout_will_do(make, close):
    results = []
    for layout in (np.array, np.asfortranarray, lambda a: np.repeat(a, 2, axis=0)[::2]):
        layer = make()
        x, state, dy, dstate = recurrent_case(layer)
        y, final = layer(layout(x), state)
        dx, dinitial = layer.backward(layout(dy), dstate)
        results.append((y, final, dx, dinitial, *layer.gradients().values()))
    for other in results[1:]:
        close(other, results[0], "identity")


def test_threads_change_no_bit():
    results = []
    for n_threads in (1, 2, 3):
        layer = LSTM(20, 40, 2, bidirectional=True, seed=0)
        layer.n_threads = n_threads
        y, _ = layer(normal(12, 30, 20, dtype="float32"))
        dx, _ = layer.backward(y)
        results.append([y, dx, *layer.gradients().values()])
    for other in results[1:]:
        assert all((a == b).all() for a, b in zip(results[0], other))


def test_one_model_serves_several_threads():
    model, xs = LSTM(20, 40, 2, seed=0).eval(), normal(8, 12, 30, 20, dtype="float32")
    wanted = [model(x)[0] for x in xs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: model(x)[0], [*xs] * 4))
    assert all((a == b).all() for a, b in zip(wanted * 4, found))


@pytest.mark.parametrize("bidirectional", [False, True])
@by_name({"LSTM": LSTM, "GRU": GRU, "RNN": RNN})
def test_token_ids_are_one_hot_rows(make, bidirectional, close):
    layer = make(6, 4, 2, bidirectional=bidirectional, dtype="float64", seed=0)
    tokens = np.random.default_rng(0).integers(0, 6, (5, 3))
    y, _ = layer(np.eye(6)[tokens])
    dy = normal(*y.shape)
    layer.backward(dy)
    wanted = layer.gradients()["weight_ih_l0"].copy()
    layer.zero_grad()
    close(layer(tokens)[0], y, "kernel")
    dx, _ = layer.backward(dy)
    assert dx is None
    close(layer.gradients()["weight_ih_l0"], wanted, "kernel")


@pytest.mark.parametrize("V", [7, 200], ids=["small table", "large table"])
@pytest.mark.parametrize("lengths", [None, RAGGED], ids=["dense", "ragged"])
@by_name(RECURRENT)
def test_embedding_is_looked_up_on_the_way_in(make, lengths, V, close):
    layer, table = make(), Embedding(V, 3, dtype="float64", seed=2)
    other, other_table = copy.deepcopy((layer, table))
    _, state, dy, dstate = recurrent_case(layer)
    tokens = np.random.default_rng(4).integers(0, V, dy.shape[:2])
    y, final = layer(tokens, state, lengths, embedding=table)
    y_other, final_other = other(other_table(tokens), state, lengths)
    dx, dinitial = layer.backward(dy, dstate)
    dx_other, dinitial_other = other.backward(dy, dstate)
    other_table.backward(dx_other)
    assert dx is None
    close((y, final, dinitial), (y_other, final_other, dinitial_other), "identity")
    for one, two in (layer, other), (table, other_table):
        close(tuple(one.gradients().values()), tuple(two.gradients().values()), "identity")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("V", [7, 200], ids=["small table", "large table"])
def test_the_bits_of_an_embedded_row_are_those_of_its_vectors(V, bias):
    layer, table = LSTM(3, 5, bias=bias, seed=0).eval(), Embedding(V, 3, seed=1)
    tokens = np.random.default_rng(2).integers(0, V, (6, 40))
    whole, _ = layer(tokens, embedding=table)
    alone, _ = layer(tokens[:, 11:12], embedding=table)
    assert (whole[:, 11:12] == alone).all() and (whole == layer(table(tokens))[0]).all()


@pytest.mark.parametrize("tokens, table, error, words", [
    (np.zeros((5, 2), int), Embedding(4, 2), ValueError, "I = 3 numbers, got 2"),
    (np.zeros((5, 2), int), Embedding(4, 3, dtype="float64"), TypeError, "float32, got float64"),
    (np.full((5, 2), 4), Embedding(4, 3), ValueError, r"0\.\.3, got 4\.\.4|0\.\.I-1 = 0\.\.3"),
    (np.zeros((5, 2)), Embedding(4, 3), TypeError, "tokens must be integers, got float64"),
    (np.zeros((5, 2, 1), int), Embedding(4, 3), ValueError, "I = 3, got"),
])
def test_embedding_must_fit(tokens, table, error, words):
    with pytest.raises(error, match=words):
        LSTM(3, 5)(tokens, embedding=table)


def test_last_step_of_both_ways_is_the_final_state():
    layer, x = LSTM(3, 4, bidirectional=True, seed=0), normal(6, 5, 3, dtype="float32")
    y, (h_n, _) = layer(x, lengths=RAGGED)
    assert (LastStep(bidirectional=True)(y, RAGGED) == np.concatenate([*h_n], axis=1)).all()


# ---- dropout, first values, names, copies -------------------------------------------------------

def test_dropout_between_layers_is_fresh_for_each_step_and_off_in_eval():
    layer = LSTM(3, 50, 2, dropout=0.5, seed=0)
    lower, upper = LSTM(3, 50, seed=0), LSTM(50, 50, seed=0)
    for part, n in ((lower, 0), (upper, 1)):
        part.load_state_dict({name[:-1] + "0": p for name, p in layer.parameters().items()
                              if name.endswith(str(n))})
    x = np.repeat(normal(1, 1, 3, dtype="float32"), 4, axis=0)
    assert (layer(x)[0] != layer(x)[0]).any()
    y, _ = layer.eval()(x)
    assert (y == upper(lower(x)[0])[0]).all()
    layer.train()
    layer(x)
    dx_mask = layer._tape[2][0][1][0]
    assert dx_mask.shape == (4, 1, 50) and len({row.tobytes() for row in dx_mask}) == 4


def test_seed_gives_the_weights():
    def weights(**options):
        return np.concatenate([p.ravel() for p in LSTM(3, 4, 2, **options).parameters().values()])
    assert (weights(seed=3) == weights(seed=3)).all()
    assert (weights(seed=3) != weights(seed=4)).any()
    assert (weights(seed=None) != weights(seed=None)).any()
    rounded = weights(seed=3, forget_bias=0, dtype="float64").astype("float32")
    assert (weights(seed=3, forget_bias=0) == rounded).all()


def test_uniform_init_is_torchs_with_the_forget_bias_on_top():
    p = LSTM(30, 100, peepholes=True, proj_size=20, seed=0).parameters()
    p["bias_l0"][100:200] -= 1
    for name, values in p.items():
        # The extremes of n draws from U(-0.1, 0.1), n >= 300, are within 0.1 of its bounds.
        assert 0.09 < values.max() <= 0.1001 and -0.1001 <= values.min() < -0.09, name


def test_glorot_init_is_orthogonal_gate_by_gate(close):
    p = LSTM(30, 20, init="glorot", forget_bias=3, peepholes=True, dtype="float64",
             seed=0).parameters()
    for gate in np.split(p["weight_hh_l0"], 4):
        close(gate @ gate.T, np.eye(20), "identity")
    bound = (6 / 50) ** 0.5
    assert 0.98 * bound < abs(p["weight_ih_l0"]).max() <= bound
    assert (p["bias_l0"] == np.repeat([0, 3, 0, 0], 20)).all() and not p["weight_peephole_l0"].any()
    projected = LSTM(30, 20, init="glorot", proj_size=8, dtype="float64", seed=0).parameters()
    gate = projected["weight_hh_l0"][:20]
    close(gate.T @ gate, np.eye(8), "identity")


def test_parameter_names_and_shapes():
    p = LSTM(3, 5, 2, bidirectional=True, proj_size=2, peepholes=True).parameters()
    assert {name: a.shape for name, a in p.items() if name.endswith(("l0", "l1_reverse"))} == {
        "weight_ih_l0": (20, 3), "weight_hh_l0": (20, 2), "bias_l0": (20,),
        "weight_peephole_l0": (3, 5), "weight_hr_l0": (2, 5),
        "weight_ih_l1_reverse": (20, 4), "weight_hh_l1_reverse": (20, 2), "bias_l1_reverse": (20,),
        "weight_peephole_l1_reverse": (3, 5), "weight_hr_l1_reverse": (2, 5)}
    assert len(p) == 20
    assert [a.shape for a in GRU(3, 5).parameters().values()] == [(15, 3), (15, 5), (20,)]
    assert GRU(3, 5, reset_after=False).parameters()["bias_l0"].shape == (15,)
    assert list(RNN(3, 5, bias=False).parameters()) == ["weight_ih_l0", "weight_hh_l0"]


@by_name({"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}, "copied")
@by_name(RECURRENT)
def test_copies_are_whole_and_apart(make, copied):
    model = make()
    x, *_ = recurrent_case(model)
    assert_copied(model, copied, lambda module: module(x)[0])


# ---- step by step, and inside -------------------------------------------------------------------

@by_name({name: make for name, make in RECURRENT.items() if make().directions == 1})
def test_stream_equals_the_whole_sequence(make, close):
    layer = make().eval()
    x, state, _, _ = recurrent_case(layer)
    y, final = layer(x, state)
    s = layer.stream(5)
    for _ in range(2):
        s.state = state
        out = np.empty((5, y.shape[-1]))
        for t in range(6):
            close(s.step(x[t]), y[t], "identity")
        close(as_tuple(s.state), as_tuple(final), "identity")
    assert s.step(x[0], out) is out
    s.reset()
    assert not any(part.any() for part in as_tuple(s.state))
    close(s.step(x[0], out), layer(x[:1])[0][0], "identity")


def test_streams_are_apart_and_keep_the_weights_they_were_made_with():
    layer, x = LSTM(3, 4, seed=0), normal(2, 3, dtype="float32")
    one, two = layer.stream(2), layer.stream(2)
    first = one.step(x)
    one.step(x)
    assert (two.step(x) == first).all()
    two.reset()
    layer.parameters()["weight_ih_l0"][...] *= -1
    assert (two.step(x) == first).all()
    assert (layer.stream(2).step(x) != first).any()


@by_name({"copy": copy.copy, "deepcopy": copy.deepcopy,
          "pickle": lambda s: pickle.loads(pickle.dumps(s))}, "copied")
def test_a_copied_stream_goes_on_by_itself(copied):
    layer, x = LSTM(3, 4, num_layers=2, seed=0), normal(4, 2, 3, dtype="float32")
    want, stream = layer(x)[0], layer.stream(2)
    stream.step(x[0])
    other = copied(stream)
    for t in 1, 2, 3:
        assert (stream.step(x[t]) == other.step(x[t])).all()
        other.step(x[0])
        other.state = stream.state
    assert np.allclose(other.state[0][1], want[3], atol=1e-6)


@pytest.mark.parametrize("H", [5, 300])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_stream_may_write_over_its_input(H, n_threads):
    layer = LSTM(H, H, seed=0)
    layer.n_threads = n_threads
    plain, in_place = layer.stream(2), layer.stream(2)
    x = normal(2, H, dtype="float32")
    own = x.copy()
    for _ in range(3):
        x = plain.step(x)
        assert in_place.step(own, out=own) is own and (own == x).all()


def test_a_refused_step_changes_no_state():
    s = LSTM(3, 4, 2, seed=0).stream(2)
    with pytest.raises(ValueError, match="out must be"):
        s.step(np.ones((2, 3), "float32"), out=np.zeros((1, 4), "float32"))
    assert not s.state[0].any()


def test_a_stream_has_as_many_threads_as_its_layer(monkeypatch):
    layer, x = LSTM(300, 300, seed=0), np.ones((1, 300), "float32")
    s = layer.stream()
    with lstmcore.threads(2):
        before = _kernels.regions()
        s.step(x)
        assert _kernels.regions() == before + lstmcore.info()["openmp"]
    layer.n_threads = 1
    layer.stream().step(x)
    with lstmcore.threads(1):
        s.step(x)
    assert _kernels.regions() == before + lstmcore.info()["openmp"]


def test_ids_changed_before_the_backward_pass_change_nothing(close):
    layer, other = LSTM(5, 4, seed=0), LSTM(5, 4, seed=0)
    ids = np.random.default_rng(0).integers(0, 5, (6, 3))
    y, _ = layer(ids)
    other(ids.copy())
    ids[...] = -10**7
    layer.backward(y)
    other.backward(y)
    close(tuple(layer.gradients().values()), tuple(other.gradients().values()), "identity")


@pytest.mark.parametrize("make", [LSTM, RNN])
def test_few_of_many_tokens_are_the_same_as_one_hot_rows(make, close):
    layer, ids = make(50, 4, dtype="float64", seed=0), np.array([[3, 49], [0, 3], [17, 3]])
    dy = normal(3, 2, 4)
    y, _ = layer(ids)
    layer.backward(dy)
    got = {name: g.copy() for name, g in layer.gradients().items()}
    layer.zero_grad()
    close(y, layer(np.eye(50)[ids])[0], "kernel")
    layer.backward(dy)
    close(tuple(got.values()), tuple(layer.gradients().values()), "kernel")


@by_name(RECURRENT)
def test_a_frozen_layer_gives_the_same_bits(make, isa):
    layer = make().eval()
    x, state, _, _ = recurrent_case(layer)
    want, final = layer(x, state, RAGGED)
    want_dense, _ = layer(x)
    assert layer.freeze() is layer
    for n in 1, 2, 3:
        layer.n_threads = n
        y, frozen_final = layer(x, state, RAGGED)
        assert (y == want).all() and (layer(x)[0] == want_dense).all()
        assert all((a == b).all() for a, b in zip(as_tuple(frozen_final), as_tuple(final)))


def test_a_frozen_layer_reads_tokens_and_streams(close):
    layer, table = LSTM(3, 5, 2, seed=0).eval(), Embedding(7, 3, seed=1)
    ids, hot = np.array([[1, 2], [0, 2], [4, 6], [4, 1]]), np.array([[1, 2], [0, 2]])
    want, want_hot, x = layer(table(ids)), layer(hot), normal(1, 3, dtype="float32")
    step = layer.stream().step(x)
    layer.freeze()
    assert (layer(ids, embedding=table)[0] == want[0]).all() and (layer(hot)[0] == want_hot[0]).all()
    assert (layer.stream().step(x) == step).all()
    assert layer.trace(normal(4, 2, 3, dtype="float32"))[1].h.shape == (4, 2, 5)


def test_a_frozen_layer_stays_as_it_is_until_it_is_not_frozen(tmp_path):
    layer = LSTM(3, 5, seed=0)
    optimizer = lstmcore.optim.Adam(layer)
    optimizer.step()
    x, kept = normal(4, 2, 3, dtype="float32"), layer.state_dict()
    layer.freeze()
    with pytest.raises(ValueError, match="read-only"):
        layer.parameters()["weight_hh_l0"][0] = 1
    for change in (layer.train, lambda: layer.load_state_dict(kept), optimizer.step):
        with pytest.raises(ValueError, match=r"unfreeze\(\)"):
            change()
    assert all((p == kept[name]).all() for name, p in layer.parameters().items())
    want = layer(x)[0]
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        copied.train().parameters()["weight_hh_l0"][...] = 0
        assert (copied(x)[0] != want).any() and (layer(x)[0] == want).all()
    layer.unfreeze().parameters()["weight_hh_l0"][...] = 0
    assert (layer(x)[0] == copied(x)[0]).all() and layer.train().training


def test_stream_says_what_it_wants():
    with pytest.raises(ValueError, match="bidirectional"):
        LSTM(3, 4, bidirectional=True).stream()
    s = LSTM(3, 4).stream(2)
    with pytest.raises(ValueError, match=r"x_t must be \(B, I\) = \(2, 3\), got \(3,\)"):
        s.step(np.zeros(3, "float32"))
    with pytest.raises(TypeError, match="x_t must be float32 like the other arrays, got float64"):
        s.step(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"out must be .* \(2, 4\), got \(1, 4\)"):
        s.step(np.zeros((2, 3), "float32"), out=np.zeros((1, 4), "float32"))
    with pytest.raises(ValueError, match=r"h of state must be .* = \(1, 2, 4\), got \(2, 4\)"):
        s.state = np.zeros((2, 4), "float32"), np.zeros((1, 2, 4), "float32")


@by_name({"LSTM": LSTM, "GRU": GRU, "RNN": RNN})
def test_stream_takes_token_ids(make, close):
    layer = make(6, 4, 2, dtype="float64", seed=0)
    tokens = np.random.default_rng(0).integers(0, 6, (5, 3))
    s = layer.stream(3)
    close(np.array([s.step(ids) for ids in tokens]), layer(tokens)[0], "kernel")
    with pytest.raises(ValueError, match=r"token ids must be in 0..5, got 0..6"):
        s.step([0, 6, 1])


@by_name({name: make for name, make in RECURRENT.items() if name.startswith("LSTM")})
def test_trace_is_the_equations(make, close):
    layer = make()
    x, state, _, _ = recurrent_case(layer)
    layer(x, state, RAGGED)
    kept = layer._tape
    traces = layer.trace(x, state, RAGGED)
    assert layer._tape is kept and layer.training
    y, (h_n, c_n) = layer.eval()(x, state, RAGGED)
    axis = 1 if layer.batch_first else 0
    for n, trace in enumerate(traces):
        i, f, g, o, c, h = (np.moveaxis(a, axis, 0) for a in trace)
        c_prev = state[1][n]
        for t in range(6) if n % layer.directions == 0 else ():
            there = np.array(RAGGED) > t
            close(c[t, there], (f[t] * c_prev + i[t] * g[t])[there], "identity")
            c_prev = np.where(there[:, None], c[t], c_prev)
        if n % layer.directions == 0:
            close(c_prev, c_n[n], "identity")
        if not layer.proj_size:
            close(h, o * np.tanh(c), "kernel")
        assert not h[~sequence_mask(RAGGED, 6)].any()
    top = np.concatenate([trace.h for trace in traces[-layer.directions:]], axis=2)
    assert (top == y).all()


@by_name({name: make for name, make in RECURRENT.items() if name.startswith("GRU")})
def test_gru_trace_is_the_equations(make, close):
    layer = make()
    x, state, _, _ = recurrent_case(layer)
    traces = layer.trace(x, state, RAGGED)
    y, h_n = layer.eval()(x, state, RAGGED)
    for n, trace in enumerate(traces):
        r, z, candidate, h = (np.moveaxis(a, 1 if layer.batch_first else 0, 0) for a in trace)
        assert ((0 <= r) & (r < 1)).all() and (r[0, 0] != z[0, 0]).all()
        h_prev = state[n]
        for t in range(6) if n % layer.directions == 0 else ():
            there = np.array(RAGGED) > t
            close(h[t, there], ((1 - z[t]) * candidate[t] + z[t] * h_prev)[there], "kernel")
            h_prev = np.where(there[:, None], h[t], h_prev)
        if n % layer.directions == 0:
            close(h_prev, h_n[n], "identity")
    top = np.concatenate([trace.h for trace in traces[-layer.directions:]], axis=2)
    assert (top == y).all()
    p, first = layer.parameters(), np.moveaxis(traces[0].r, 1 if layer.batch_first else 0, 0)[0, 0]
    a_r = sum(p[f"weight_{w}_l0"][:4] @ a for w, a in (("ih", x[0, 0]), ("hh", state[0, 0])))
    close(first, 1 / (1 + np.exp(-a_r - (p["bias_l0"][:4] if layer.bias else 0))), "kernel")


def test_rnn_trace_is_every_h():
    layer, x = RNN(3, 4, 2, seed=0), normal(5, 2, 3, dtype="float32")
    below, above = layer.trace(x)
    assert (above.h == layer(x)[0]).all() and below.h.shape == (5, 2, 4)


# ---- errors -------------------------------------------------------------------------------------

def f32(*shape):
    return np.zeros(shape, "float32")


@pytest.mark.parametrize("call, error, words", [
    (lambda: LSTM(0, 4), ValueError, "input_size must be at least 1, got 0"),
    (lambda: LSTM(3, 4.0), TypeError, "hidden_size must be an int, got float"),
    (lambda: LSTM(3, 4, dropout=1.5), ValueError, r"dropout must be in 0..1, got 1.5"),
    (lambda: LSTM(3, 4, proj_size=5), ValueError, "proj_size must be at most hidden_size = 4"),
    (lambda: LSTM(3, 4, init="xavier"), ValueError, "init must be 'uniform' or 'glorot'"),
    (lambda: LSTM(3, 4, dtype="float16"), TypeError, "dtype must be 'float32' or 'float64'"),
    (lambda: RNN(3, 4, nonlinearity="gelu"), ValueError, "nonlinearity must be 'tanh' or 'relu'"),
    (lambda: LSTM(3, 4)(np.zeros((5, 2, 3))), TypeError, "x must be float32, got float64"),
    (lambda: LSTM(3, 4)(f32(5, 2, 2)), ValueError, r"x must be \(T, B, I\) with I = 3, got"),
    (lambda: LSTM(3, 4, batch_first=True)(f32(5, 3)), ValueError, r"x must be \(B, T, I\)"),
    (lambda: LSTM(3, 4)(np.zeros((5, 2, 3), int)), ValueError, r"x must be \(T, B\) if it holds"),
    (lambda: LSTM(3, 4)(f32(5, 2, 3), f32(1, 2, 4)), TypeError, r"state must be a pair \(h, c\)"),
    (lambda: LSTM(3, 4)(f32(5, 2, 3), (f32(1, 2, 4), f32(2, 4))), ValueError,
     r"c of state must be \(L·D, B, 4\) = \(1, 2, 4\), got \(2, 4\)"),
    (lambda: LSTM(3, 4)(f32(5, 2, 3), (np.zeros((1, 2, 4)), f32(1, 2, 4))), TypeError,
     "h of state must be float32, got float64"),
    (lambda: RNN(3, 4)(f32(5, 2, 3), f32(2, 2, 4)), ValueError, "h of state must be"),
    (lambda: LSTM(3, 4)(f32(5, 2, 3), lengths=[5]), ValueError, r"lengths must be \(B,\) = \(2,\)"),
    (lambda: LSTM(3, 4)(f32(5, 2, 3), lengths=[5, 6]), ValueError,
     r"lengths must be in 0..T = 0..5"),
])
def test_errors_say_what_was_expected(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_state_gradient_must_fit():
    layer = LSTM(3, 4)
    layer(f32(5, 2, 3))
    with pytest.raises(ValueError, match=r"h of dstate must be \(L·D, B, 4\) = \(1, 2, 4\)"):
        layer.backward(dstate=(f32(1, 1, 4), None))
