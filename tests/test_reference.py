"""The specification is right: one case in fractions by hand, every gradient by differences."""

from math import log

import numpy as np
import pytest
from problems import backward, forward, lstm_problem, rnn_problem

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


@by_name({"lstm": lstm_problem, "rnn": rnn_problem})
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


def test_rnn_relu_by_hand():
    x = np.array([[[2.0, -3.0]]])
    y, h_n, tape = reference.rnn_forward(x, np.eye(2), np.zeros((2, 2)), nonlinearity="relu")
    assert np.array_equal(y, [[[2, 0]]]) and np.array_equal(h_n, [[2, 0]])
    assert np.array_equal(reference.rnn_backward(tape, np.full((1, 1, 2), 5.0)).dx, [[[5, 0]]])


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@by_name({"lstm": lstm_problem, "rnn": rnn_problem})
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


@by_name({"lstm": lstm_problem, "rnn": rnn_problem})
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
