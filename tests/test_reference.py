"""The specification is right: one case in fractions by hand, every gradient by differences."""

from functools import partial
from math import log

import numpy as np
import pytest
from problems import (VARIANTS, backward, forward, gru_problem, lstm_problem, rnn_problem,
                      with_products)

from lstmcore import reference

STEP = 1e-4

LSTM_CASES = {
    "plain": dict(T=4, B=3, I=5, H=2),
    "no bias, no states": dict(T=3, B=2, I=4, H=5, bias=False, states=False),
    "one step": dict(T=1, B=2, I=3, H=4, peepholes=True),
    "peepholes": dict(T=4, B=3, I=2, H=5, peepholes=True),
    "reverse": dict(T=4, B=2, I=3, H=5, peepholes=True, reverse=True),
    "ragged": dict(T=5, B=6, I=3, H=2, peepholes=True, lengths="ragged"),
    "ragged reverse": dict(T=5, B=6, I=2, H=3, peepholes=True, lengths="ragged", reverse=True),
    "projected": dict(T=4, B=3, I=2, H=5, P=4),
    "everything": dict(T=5, B=6, I=4, H=3, P=2, peepholes=True, lengths="ragged", reverse=True),
    "layer norm": dict(T=4, B=3, I=5, H=6, norms=10),
    "layer norm of gates": dict(T=4, B=3, I=5, H=6, norms=6),
    "layer norm of gates, ragged reverse": dict(T=5, B=6, I=3, H=4, norms=6, lengths="ragged", reverse=True),
    "layer norm, ragged reverse": dict(T=5, B=6, I=3, H=4, norms=10, lengths="ragged", reverse=True),
    **{name: dict(T=5, B=6, I=3, H=4, variant=name, lengths="ragged", reverse=name == "all",
                  peepholes="zone" not in name and name != "all") for name in VARIANTS},
}
RNN_CASES = {
    f"{nonlinearity} {name}": dict(nonlinearity=nonlinearity, **case)
    for nonlinearity in ("tanh", "relu")
    for name, case in {
        "plain": dict(T=4, B=3, I=5, H=2),
        "no bias, no states": dict(T=3, B=2, I=4, H=5, bias=False, states=False),
        "ragged": dict(T=5, B=6, I=2, H=3, lengths="ragged"),
        "ragged reverse": dict(T=5, B=6, I=3, H=4, lengths="ragged", reverse=True),
    }.items()
}
GRU_CASES = {f"{name}, reset {'after' if reset_after else 'before'}": dict(
    reset_after=reset_after, **{n: v for n, v in case.items() if n != "nonlinearity"})
    for reset_after in (True, False)
    for name, case in RNN_CASES.items() if name.startswith("tanh")}
GRUS = {"gru": gru_problem, "gru before": partial(gru_problem, reset_after=False)}
ALL = {"lstm": lstm_problem, "rnn": rnn_problem, **GRUS}


def by_name(cases):
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


def loss(problem, upstream):
    """The random projection of y, h_n and c_n whose gradient the backward pass returns."""
    y, state, _ = forward(reference, problem)
    results = [y, *(state if problem.kind == "lstm" else [state])]
    return sum((g * r).sum() for g, r in zip(upstream.values(), results) if g is not None)


def slope(problem, upstream, name, direction):
    """The loss's derivative along `direction` of the input `name`: a five-point difference."""
    array = problem.inputs[name]

    def at(distance):
        problem.inputs[name] = array + distance * direction
        return loss(problem, upstream)

    try:
        return (8 * (at(STEP) - at(-STEP)) - (at(2 * STEP) - at(-2 * STEP))) / (12 * STEP)
    finally:
        problem.inputs[name] = array


def check_gradients(problem, only, close):
    """Every input's gradient under the upstream gradients in `only`, along random directions."""
    upstream = {n: g if n in only else None for n, g in problem.upstream.items()}
    if upstream["dy"] is None:
        upstream["dy"] = np.zeros_like(problem.upstream["dy"])
    tape = forward(reference, problem)[-1]
    gradients = getattr(reference, problem.kind + "_backward")(tape, **upstream)
    rng = np.random.default_rng(7)
    for name, array in problem.inputs.items():
        gradient = getattr(gradients, "d" + name)
        if array is None:
            continue
        assert gradient.shape == array.shape and gradient.dtype == array.dtype, name
        got, want = [], []
        for _ in range(3):
            direction = rng.standard_normal(array.shape)
            got.append((gradient * direction).sum())
            want.append(slope(problem, upstream, name, direction))
        close(np.array(got), np.array(want), "finite difference", f"d{name} from {only}")


@by_name(LSTM_CASES)
@pytest.mark.parametrize(
    "only", [("dy",), ("dh_n",), ("dc_n",), ("dy", "dh_n", "dc_n")], ids="+".join)
def test_lstm_gradients_are_the_slopes(case, only, close):
    check_gradients(lstm_problem(**case, seed=1), only, close)


@by_name(RNN_CASES)
@pytest.mark.parametrize("only", [("dy",), ("dh_n",), ("dy", "dh_n")], ids="+".join)
def test_rnn_gradients_are_the_slopes(case, only, close):
    check_gradients(rnn_problem(**case, seed=2), only, close)


@by_name(GRU_CASES)
@pytest.mark.parametrize("only", [("dy",), ("dh_n",), ("dy", "dh_n")], ids="+".join)
def test_gru_gradients_are_the_slopes(case, only, close):
    check_gradients(gru_problem(**case, seed=2), only, close)


@by_name(ALL)
def test_bias_and_states_left_out_mean_zeros(case):
    absent, zeros = (case(3, 4, 2, 3, states=False, bias=False, seed=3) for _ in range(2))
    gradients = backward(reference, absent)
    zeros.inputs.update({name: np.zeros_like(getattr(gradients, "d" + name))
                         for name in ("b", "h0", "c0") if name in zeros.inputs})
    assert all(np.array_equal(got, want) for got, want in zip(gradients, backward(reference, zeros))
               if got is not None)


@pytest.mark.parametrize("p", [(0.0, 0.0, 0.0), (2.0, -3.0, 5.0)], ids=["plain", "peepholes"])
def test_lstm_step_by_hand(p, close):
    """σ(ln 3) = 3/4, σ(-ln 3) = 1/4, σ(ln 4) = 4/5, tanh(ln(3)/2) = 1/2: all gates are fractions.

    With c0 = 2 ln 3 - 3/2 the new cell state is 1/4 c0 + 3/4 · 1/2 = ln(3)/2, so tanh c = 1/2 and
    h = 4/5 · 1/2 = 2/5. The bias takes the peepholes' share away again, so that they change the
    gradients only.
    """
    p_i, p_f, p_o = p
    c0, c = 2 * log(3) - 1.5, log(3) / 2
    arrays = dict(x=[[[log(3)]]], W_ih=[[1.0], [-1.0], [0.5], [0.0]],
                  W_hh=[[0.0], [0.0], [0.0], [log(2)]], b=[-p_i * c0, -p_f * c0, 0, -p_o * c],
                  h0=[[2.0]], c0=[[c0]], peepholes=[[p_i], [p_f], [p_o]])
    y, (h_n, c_n), tape = reference.lstm_forward(**{n: np.array(v) for n, v in arrays.items()})
    close(tape.gates[0, 0], np.array([3 / 4, 1 / 4, 1 / 2, 4 / 5]), "by hand", "gates")
    for got, want in (y[0], 2 / 5), (h_n, 2 / 5), (c_n, c), (tape.c[0], c):
        close(got, np.array([[want]]), "by hand")

    g = reference.lstm_backward(tape, dy=np.array([[[1.0]]]), dh_n=np.array([[1.0]]),
                                dc_n=np.array([[0.1]]))
    da_o = 2 * 1 / 2 * 4 / 25                      # dh = 1 + 1, tanh c, o(1-o)
    dc = 0.1 + 2 * 4 / 5 * 3 / 4 + p_o * da_o      # dc_n, dh o (1 - tanh² c)
    da = np.array([dc * 1 / 2 * 3 / 16, dc * c0 * 3 / 16, dc * 3 / 4 * 3 / 4, da_o])
    dc0 = dc / 4 + p_i * da[0] + p_f * da[1]
    close(g, reference.Gradients(
        dx=np.array([[[da[0] - da[1] + da[2] / 2]]]), dW_ih=da[:, None] * log(3),
        dW_hh=da[:, None] * 2, db=da,
        dpeepholes=np.array([[da[0] * c0], [da[1] * c0], [da_o * c]]),
        dh0=np.array([[da_o * log(2)]]), dc0=np.array([[dc0]]), dW_hr=None), "by hand")


def test_rnn_two_steps_by_hand(close):
    """tanh(ln(3)/2) = 1/2 and tanh(ln 2) = 3/5: h_1 = 1/2 from x_1 = ln 3, h_2 = 3/5 from h_1."""
    arrays = dict(x=[[[log(3)]], [[0.0]]], W_ih=[[0.5]], W_hh=[[2 * log(2)]], b=[0.0], h0=[[0.0]])
    y, h_n, tape = reference.rnn_forward(**{n: np.array(v) for n, v in arrays.items()})
    close((y, h_n), (np.array([[[1 / 2]], [[3 / 5]]]), np.array([[3 / 5]])), "by hand")
    g = reference.rnn_backward(tape, dy=np.array([[[1.0]], [[2.0]]]), dh_n=np.array([[3.0]]))
    da_2 = 5 * 16 / 25
    da_1 = (1 + da_2 * 2 * log(2)) * 3 / 4
    close(g, reference.RNNGradients(
        dx=np.array([[[da_1 / 2]], [[da_2 / 2]]]), dW_ih=np.array([[da_1 * log(3)]]),
        dW_hh=np.array([[da_2 / 2]]), db=np.array([da_1 + da_2]),
        dh0=np.array([[da_1 * 2 * log(2)]])), "by hand")


@pytest.mark.parametrize("reset_after", [True, False], ids=["after", "before"])
def test_gru_step_by_hand(reset_after, close):
    """r = σ(ln 3) = 3/4, z = σ(-ln 3) = 1/4, n = tanh(ln 2) = 3/5: h = 3/4 · 3/5 + 1/4 · 1/2 = 23/40.

    a_n is ln 2, of which r ∘ q, q = 6 · 1/2 + 2, is 15/4; or 6 m, m = 3/4 · 1/2, is 9/4.
    """
    q_bias = [2.0] if reset_after else []
    b_n = log(2) - (15 / 4 if reset_after else 9 / 4) - 1 / 4
    arrays = dict(x=[[[1 / 4]]], W_ih=[[2.0], [3.0], [1.0]], W_hh=[[4.0], [5.0], [6.0]],
                  b=[log(3) - 2 / 4 - 4 / 2, -log(3) - 3 / 4 - 5 / 2, b_n, *q_bias], h0=[[1 / 2]])
    y, h_n, tape = reference.gru_forward(**{n: np.array(v) for n, v in arrays.items()},
                                         reset_after=reset_after)
    close((y, h_n), (np.array([[[23 / 40]]]), np.array([[23 / 40]])), "by hand")
    close(tape.gates[0, 0], np.array([3 / 4, 1 / 4, 3 / 5] + [5.0] * reset_after), "by hand")

    g = reference.gru_backward(tape, dy=np.array([[[1.0]]]), dh_n=np.array([[1.0]]))
    da_n = 2 * 3 / 4 * 16 / 25                     # dh = 1 + 1, 1 - z, 1 - n²
    da_z = 2 * (1 / 2 - 3 / 5) * 3 / 16
    if reset_after:
        dq, da_r = da_n * 3 / 4, da_n * 5 * 3 / 16
        dh0 = 2 / 4 + 4 * da_r + 5 * da_z + 6 * dq
        dW_hn, db = dq / 2, [da_r, da_z, da_n, dq]
    else:
        dm, da_r = 6 * da_n, 6 * da_n / 2 * 3 / 16
        dh0 = 2 / 4 + 4 * da_r + 5 * da_z + dm * 3 / 4
        dW_hn, db = da_n * 3 / 8, [da_r, da_z, da_n]
    da = np.array([[da_r], [da_z], [da_n]])
    close(g, reference.GRUGradients(
        dx=np.array([[[2 * da_r + 3 * da_z + da_n]]]), dW_ih=da / 4,
        dW_hh=np.array([[da_r / 2], [da_z / 2], [dW_hn]]), db=np.array(db),
        dh0=np.array([[dh0]])), "by hand")


def test_rnn_relu_by_hand():
    x = np.array([[[2.0, -3.0]]])
    y, h_n, tape = reference.rnn_forward(x, np.eye(2), np.zeros((2, 2)), nonlinearity="relu")
    assert np.array_equal(y, [[[2, 0]]]) and np.array_equal(h_n, [[2, 0]])
    assert np.array_equal(reference.rnn_backward(tape, np.full((1, 1, 2), 5.0)).dx, [[[5, 0]]])


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@by_name(ALL)
def test_ragged_row_equals_the_row_alone(case, reverse, close):
    """The meaning of lengths: each row as if run alone, cut to its length; y is 0 beyond it."""
    lengths = [2, 0, 5, 3]
    problem = case(5, 4, 3, 2, lengths=np.array(lengths), reverse=reverse, seed=4)
    y, state, _ = forward(reference, problem)
    dx = backward(reference, problem).dx
    for r, n in enumerate(lengths):
        alone = row_alone(problem, r, n)
        want_y, want_state, _ = forward(reference, alone)
        close(y[:n, r:r + 1], want_y, "identity")
        close(np.array(state)[..., r:r + 1, :], np.array(want_state), "identity")
        close(dx[:n, r:r + 1], backward(reference, alone).dx, "identity")
        assert not y[n:, r].any() and not dx[n:, r].any()


def row_alone(problem, r, n):
    """Row r of a problem, cut to n steps, as a batch of one without lengths."""
    def cut(name, array):
        if name in ("x", "dy"):
            return array[:n, r:r + 1]
        return array[r:r + 1] if name in ("h0", "c0", "dh_n", "dc_n") else array

    alone = {part: {name: cut(name, array) for name, array in getattr(problem, part).items()}
             for part in ("inputs", "upstream")}
    return type(problem)(kind=problem.kind, options={**problem.options, "lengths": None}, **alone)


@by_name(ALL)
def test_length_zero_row_returns_its_initial_state(case):
    problem = case(3, 3, 2, 4, lengths=np.array([2, 0, 3]), seed=8)
    _, state, _ = forward(reference, problem)
    state = dict(zip(("h0", "c0"), state if problem.kind == "lstm" else [state]))
    for name, final in state.items():
        assert np.array_equal(final[1], problem.inputs[name][1])


def test_saved_gates_and_cells_are_the_steps(close):
    """tape.gates and tape.c hold i, f, g, o and c of every step: the equations hold among them."""
    problem = lstm_problem(4, 3, 2, 5, seed=5)
    y, (_, c_n), tape = forward(reference, problem)
    i, f, g, o = np.split(tape.gates, 4, axis=2)
    c_prev = np.concatenate([problem.inputs["c0"][None], tape.c[:-1]])
    close(tape.c, f * c_prev + i * g, "identity")
    close(y, o * np.tanh(tape.c), "identity")
    close(c_n, tape.c[-1], "identity")


def test_keep_tape_false_returns_the_same_results():
    problem = lstm_problem(4, 3, 2, 5, seed=6)
    y, state, tape = forward(reference, problem, keep_tape=False)
    want_y, want_state, _ = forward(reference, problem)
    assert tape is None
    assert np.array_equal(y, want_y) and np.array_equal(state, want_state)


# ---- below float32 -----------------------------------------------------------------------------------


def test_rounded_is_the_nearest_bfloat16():
    """Every sign, exponent and mantissa of bfloat16, and around each what lies before the next."""
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], "uint32")
    bits = (np.arange(1 << 16, dtype="uint32")[:, None] << 16 | low).ravel()
    a = bits.view("float32")
    a, bits = a[np.isfinite(a)], bits[np.isfinite(a)]
    below, above = ((bits >> 16) + up << 16 for up in (0, 1))  # in magnitude
    in_float64 = [np.where(np.isinf(end), np.copysign(2.0**128, end), end) for end in
                  (n.view("float32").astype("float64") for n in (below, above))]
    to_below, to_above = (np.abs(end - a) for end in in_float64)
    tie_goes_up = (to_below == to_above) & (below >> 16 & 1 == 1)
    want = np.where((to_above < to_below) | tie_goes_up, above, below).view("float32")
    got = reference.rounded(a)
    assert got.dtype == "float32" and np.array_equal(got.view("uint32"), want.view("uint32"))
    assert (got[in_float64[0] == a] == a[in_float64[0] == a]).all()


def test_rounded_keeps_nan_infinity_and_the_sign_of_zero():
    nan = np.array([0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF], "uint32")
    assert np.isnan(reference.rounded(nan.view("float32"))).all()
    a = np.array([np.inf, -np.inf, 0.0, -0.0])
    got = reference.rounded(a)
    assert np.array_equal(got, a) and np.array_equal(np.signbit(got), np.signbit(a))
    assert reference.rounded(np.arange(12.0).reshape(3, 4).T).shape == (4, 3)


def test_quantize_by_hand():
    """Ties go to even; 9 (127/18) is a tie in float32, where 9 / (18/127) lies below it."""
    W = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5], [-254, 254, 1, 3, 5, -253], [18, 9, 0, 0, 0, 0],
                  [0, 0, 0, 0, 0, -0.0], [2.0**-100, 0, 0, 0, 0, 0], [2.0**-101, 1e-40, 0, 0, 0, 0],
                  [3e38, -1.5e38, 0, 0, 0, 0], [1, np.nan, 2, 3, 4, 5], [1, 2, 3, -np.inf, 4, 5]])
    q, scale = reference.quantize(W)
    assert q.dtype == "int8" and scale.dtype == "float32"
    assert q.tolist() == [[127, 0, 2, 2, 0, -2], [-127, 127, 0, 2, 2, -126], [127, 64, 0, 0, 0, 0],
                          [0] * 6, [127, 0, 0, 0, 0, 0], [0] * 6, [127, -64, 0, 0, 0, 0],
                          [0] * 6, [0] * 6]
    assert np.array_equal(scale, np.array([1, 2, 18 / 127, 0, 2.0**-100 / 127, 0, 3e38 / 127,
                                           np.nan, np.nan], "float32"), equal_nan=True)
    for empty in (0, 3), (3, 0):
        q, scale = reference.quantize(np.zeros(empty))
        assert q.shape == empty and np.array_equal(scale, np.zeros(empty[0]))


def test_quantize_is_off_by_half_a_scale():
    W = np.random.default_rng(1).standard_normal((50, 301)) * np.logspace(-20, 20, 50)[:, None]
    q, scale = reference.quantize(W.astype("float32"))
    assert (np.abs(q.astype(int)).max(axis=1) == 127).all()
    error = np.abs(q * scale[:, None].astype("float64") - W) / scale[:, None]
    assert 0.49 < error.max() <= 0.5 + 127 * 2.0**-22  # float32: two roundings of up to 127


def test_products_of_int8_are_exact_and_keep_nan_in_its_row():
    """150,000 products of up to 127 x 127: their sum is beyond int32, and its last digit counts."""
    rng = np.random.default_rng(2)
    a, b = rng.integers(120, 128, (3, 150_000)), rng.integers(120, 128, (2, 150_000))
    a[:, 0] = b[:, 0] = 127                            # scales of 1
    want = [[sum(map(int, row * column)) for column in b] for row in a]
    a, b = a.astype("float64"), b.astype("float64")
    assert reference.product(a, b.T, "int8").tolist() == want and want[0][0] > 2**31
    a[1, 7], b[1, 3] = np.nan, np.inf
    bad = np.isnan(reference.product(a, b.T, "int8"))
    assert bad.tolist() == [[False, True], [True, True], [False, True]]


def as_operands(problem, compute):
    """A problem's operands as `compute` sees them, the rest as it is, in the dtype of x."""
    def seen(name, array):
        if array is None or name in ("b", "c0", "peepholes"):
            return array
        if compute == "bfloat16":
            return reference.rounded(array).astype(array.dtype)
        q, scale = reference.quantize(array.reshape(-1, array.shape[-1]))
        return (q * scale[:, None].astype(array.dtype)).reshape(array.shape)

    inputs = {name: seen(name, array) for name, array in problem.inputs.items()}
    return type(problem)(kind=problem.kind, inputs=inputs, upstream=problem.upstream,
                         options=problem.options)


LOW = pytest.mark.parametrize("compute", ["bfloat16", "int8"])
FED = {"lstm": lstm_problem, "rnn": rnn_problem, "relu": partial(rnn_problem, nonlinearity="relu"),
       "peepholes": partial(lstm_problem, peepholes=True)}    # that read h_{t-1} in products alone
KINDS = by_name({**FED, **GRUS})


@LOW
@by_name(FED)
def test_a_low_step_is_a_step_on_the_operands(case, compute, close):
    """x, W_ih, h_{t-1} and W_hh are rounded; b, c, peepholes, gates and states are not."""
    problem = case(1, 5, 7, 6, dtype="float32", seed=9)
    y, state, tape = forward(reference, problem, compute=compute)
    want_y, want_state, want = forward(reference, as_operands(problem, compute))
    close((y, np.array(state)), (want_y, np.array(want_state)), "identity")
    exact = forward(reference, problem)[0]
    assert np.abs(y - exact).max() > 1e-4 and tape.compute == compute
    close(y, exact, compute)


@LOW
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@KINDS
def test_low_steps_hand_on_their_own_h(case, reverse, compute, close):
    """T steps are T times one step, from the state (not rounded) that the one before left."""
    problem = case(4, 3, 5, 6, reverse=reverse, seed=10)
    y, state, _ = forward(reference, problem, compute=compute)
    x, names = problem.inputs["x"], [n for n in ("h0", "c0") if n in problem.inputs]
    for t in range(4)[::-1 if reverse else 1]:
        problem.inputs["x"] = x[t:t + 1]
        y_t, state_t, _ = forward(reference, problem, compute=compute)
        problem.inputs.update(zip(names, state_t if len(names) == 2 else [state_t]))
        close(y[t], y_t[0], "identity")
    close(np.array(state), np.array(state_t), "identity")


@LOW
def test_a_low_projection_rounds_what_it_projects(compute, close):
    problem = lstm_problem(3, 4, 5, 6, P=2, seed=11)
    y, _, tape = forward(reference, problem, compute=compute)
    m = np.split(tape.gates, 4, axis=2)[3] * np.tanh(tape.c)
    for t in range(3):
        close(y[t], reference.product(m[t], problem.inputs["W_hr"].T, compute), "identity")


@by_name(FED)
def test_a_low_step_back_rounds_da(case, close):
    """With one row db is da, and all else is a product of it, rounded, with a rounded operand."""
    problem = case(1, 1, 7, 6, seed=12)
    g = backward(reference, with_products(problem, "bfloat16"))
    low = as_operands(problem, "bfloat16").inputs
    da = reference.rounded(g.db).astype("float64")
    want = backward(reference, as_operands(problem, "bfloat16"))
    for name in "db", "dc0", "dpeepholes":
        if hasattr(g, name):
            close(getattr(g, name), getattr(want, name), "identity")
    for name, operands in dict(dx=(da, low["W_ih"]), dh0=(da, low["W_hh"]), dW_ih=(
            da[:, None], low["x"][0]), dW_hh=(da[:, None], low["h0"])).items():
        close(getattr(g, name).squeeze(), (operands[0] @ operands[1]).squeeze(), "identity")
        assert np.abs(getattr(g, name) - getattr(want, name)).max() > 0


@LOW
@by_name(GRUS)
def test_a_low_gru_step_rounds_what_it_multiplies(case, compute, close):
    """The gates are those of rounded operands, m among them; z lets h_{t-1} through as it is."""
    problem = case(1, 5, 7, 6, dtype="float32", seed=9)
    y, _, tape = forward(reference, problem, compute=compute)
    low, h_prev = as_operands(problem, compute), problem.inputs["h0"]
    want = forward(reference, low)[-1].gates[0]
    r, z, n = np.split(tape.gates[0, :, :18], 3, axis=1)
    if not tape.reset_after:
        a_n = low.inputs["x"][0] @ low.inputs["W_ih"][12:].T + low.inputs["b"][12:]
        m = reference.product(r * h_prev, problem.inputs["W_hh"][12:].T, compute)
        want[:, 12:] = np.tanh(a_n + m)
    close(tape.gates[0], want, "identity")
    close(y[0], (1 - z) * n + z * h_prev, "identity")
    assert np.abs(y - forward(reference, problem)[0]).max() > 1e-4


@by_name(GRUS)
def test_a_low_gru_step_back_rounds_da(case, close):
    """With one row db is da, and of q; all else is a product of it, or what z and r let through."""
    problem = case(1, 1, 7, 6, seed=12)
    tape = forward(reference, with_products(problem, "bfloat16"))[-1]
    g = reference.gru_backward(tape, **problem.upstream)
    x, W_ih, W_hh, _, h_prev = problem.inputs.values()
    r, z = np.split(tape.gates[0, :, :12], 2, axis=1)
    product = partial(reference.product, compute="bfloat16")
    da, dh = g.db[None], (problem.upstream["dy"][0] + problem.upstream["dh_n"]) * z
    if tape.reset_after:
        da_h = np.delete(da, range(12, 18), axis=1)
        dh, dW_hh = dh + product(da_h, W_hh), product(da_h.T, h_prev)
        close(da_h[:, 12:], da[:, 12:18] * r, "identity")
    else:
        dm = product(da[:, 12:], W_hh[12:])
        dh = dh + dm * r + product(da[:, :12], W_hh[:12])
        dW_hh = np.concatenate([product(da[:, :12].T, h_prev), product(da[:, 12:].T, r * h_prev)])
        close(da[:, :6], dm * h_prev * r * (1 - r), "identity")
    close(g, reference.GRUGradients(product(da[:, :18], W_ih)[None], product(da[:, :18].T, x[0]), dW_hh,
                                    g.db, dh), "identity")


def test_a_low_projection_back_rounds_dh(close):
    """dm is rounded dh times rounded W_hr, and dW_hr rounded dh times rounded m."""
    problem = lstm_problem(1, 1, 3, 6, P=2, states=False, seed=13)
    tape = forward(reference, with_products(problem, "bfloat16"))[-1]
    g = reference.lstm_backward(tape, problem.upstream["dy"])
    dh, m = problem.upstream["dy"][0], tape.gates[0, :, -6:] * np.tanh(tape.c[0])
    dm = reference.product(dh, problem.inputs["W_hr"], "bfloat16")
    da, _ = reference.cell_backward(tape.gates[0], tape.c[0], 0 * tape.c[0], np.zeros((3, 6)), dm, 0)
    close(g.db, da[0], "identity")
    close(g.dW_hr, reference.rounded(dh).T.astype("float64") @ reference.rounded(m), "identity")


@by_name({**LSTM_CASES, **GRU_CASES, "tanh": dict(T=4, B=3, I=5, H=2, nonlinearity="tanh")})
def test_low_gradients_are_the_gradients_up_to_rounding(case, close):
    """Not so for relu: where rounding takes a sum across its kink, a whole slope goes. The kernels compute
    no layer normalization so."""
    if case.get("norms"):
        return
    problem = (rnn_problem if "nonlinearity" in case else gru_problem if "reset_after" in case
               else lstm_problem)(**case, seed=14)
    low = backward(reference, with_products(problem, "bfloat16"))
    close(low, backward(reference, problem), "bfloat16")
