"""What must hold for any LSTM, GRU and RNN, whatever the numbers: identities on random problems."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from problems import backward, forward, gru_problem, lstm_problem, rnn_problem

from lstmcore import functional

BATCH_AXIS = {"x": 1, "dy": 1, "h0": 0, "c0": 0, "dh_n": 0, "dc_n": 0}


@st.composite
def problems(draw, make=None, **fixed):
    """A random LSTM, GRU or RNN problem of random sizes; `fixed` are options that are not random."""
    make = make or draw(st.sampled_from([lstm_problem, gru_problem, rnn_problem]))
    options = dict(
        T=draw(st.integers(1, 7)), B=draw(st.integers(1, 8)), I=draw(st.integers(1, 9)),
        H=draw(st.integers(1, 20)), bias=draw(st.booleans()), seed=draw(st.integers(0, 2**32 - 1)),
        lengths=draw(st.sampled_from([None, "ragged"])), reverse=draw(st.booleans()))
    if make is lstm_problem:
        options.update(peepholes=draw(st.booleans()),
                       P=draw(st.none() | st.integers(1, 11)))
    elif make is gru_problem:
        options.update(reset_after=draw(st.booleans()))
    else:
        options.update(nonlinearity=draw(st.sampled_from(["tanh", "relu"])))
    return make(**{**options, **fixed})


def changed(problem, inputs=(), upstream=(), **options):
    """A copy of the problem with some of its parts replaced."""
    return type(problem)(kind=problem.kind, inputs={**problem.inputs, **dict(inputs)},
                         upstream={**problem.upstream, **dict(upstream)},
                         options={**problem.options, **options})


def arrays(result):
    """The arrays in a nested result, in order."""
    if isinstance(result, tuple):
        return [array for part in result for array in arrays(part)]
    return [] if result is None else [result]


def same(got, want):
    return all(np.array_equal(a, b) for a, b in zip(arrays(got), arrays(want), strict=True))


@given(problems(lengths=None, reverse=False, T=7), st.integers(0, 7))
def test_two_parts_of_a_sequence_are_the_whole(close, problem, cut):
    """T1 steps, then T2 from the state reached; backward, dh0 of the second is dh_n of the first."""
    y, state, _ = forward(functional, problem)
    g = backward(functional, problem)
    x, dy = problem.inputs["x"], problem.upstream["dy"]
    first = changed(problem, {"x": x[:cut]}, {"dy": dy[:cut]})
    y_1, state_1, _ = forward(functional, first)
    reached = dict(zip(("h0", "c0"), state_1 if problem.kind == "lstm" else [state_1]))
    second = changed(problem, {"x": x[cut:], **reached}, {"dy": dy[cut:]})
    y_2, state_2, _ = forward(functional, second)
    close(np.concatenate([y_1, y_2]), y, "identity")
    close(state_2, state, "identity")

    g_2 = backward(functional, second)
    back = {"d" + n.replace("0", "_n"): getattr(g_2, "d" + n) for n in reached}
    g_1 = backward(functional, changed(first, upstream=back))
    close(np.concatenate([g_1.dx, g_2.dx]), g.dx, "identity")
    for name in g._fields[1:]:
        one, two, whole = (getattr(part, name) for part in (g_1, g_2, g))
        if whole is not None:
            close(one if name in ("dh0", "dc0") else one + two, whole, "identity", name)


@given(problems(), st.randoms(use_true_random=False))
def test_permuting_the_batch_permutes_the_result(close, problem, random):
    rows = list(range(problem.inputs["x"].shape[1]))
    random.shuffle(rows)

    def permuted(arrays):
        return {n: np.take(a, rows, BATCH_AXIS[n]) for n, a in arrays.items() if n in BATCH_AXIS}

    lengths = problem.options["lengths"]
    other = changed(problem, permuted(problem.inputs), permuted(problem.upstream),
                    lengths=None if lengths is None else lengths[rows])
    y, state, _ = forward(functional, problem)
    got_y, got_state, _ = forward(functional, other)
    assert same((got_y, got_state), (y[:, rows], tuple(s[rows] for s in arrays((state,)))))
    g, got = backward(functional, problem), backward(functional, other)
    for name in g._fields:
        if name == "dx":
            assert np.array_equal(got.dx, g.dx[:, rows])
        elif name in ("dh0", "dc0"):
            assert np.array_equal(getattr(got, name), getattr(g, name)[rows])
        else:
            close(getattr(got, name), getattr(g, name), "identity", name)


@given(problems(), st.floats(-3, 3), st.integers(0, 99))
def test_backward_is_linear_in_its_upstream(close, problem, factor, seed):
    rng = np.random.default_rng(seed)
    other = {n: rng.standard_normal(u.shape) for n, u in problem.upstream.items()}
    mixed = {n: u + factor * other[n] for n, u in problem.upstream.items()}
    one = backward(functional, problem)
    two = backward(functional, changed(problem, upstream=other))
    got = backward(functional, changed(problem, upstream=mixed))
    for name, a, b, g in zip(one._fields, one, two, got):
        if g is not None:  # the scale of the terms, not of a sum that may cancel
            scale = np.abs(a).max() + abs(factor) * np.abs(b).max()
            close(np.append(g, scale), np.append(a + factor * b, scale), "identity", name)


@given(problems(lengths=None, reverse=False))
def test_reverse_is_the_flipped_sequence(problem):
    x, dy = problem.inputs["x"], problem.upstream["dy"]
    flipped = changed(problem, {"x": x[::-1]}, {"dy": dy[::-1]}, reverse=True)
    y, state, _ = forward(functional, problem)
    got_y, got_state, _ = forward(functional, flipped)
    assert same((got_y[::-1], got_state), (y, state))
    got = backward(functional, flipped)
    assert same(got._replace(dx=got.dx[::-1]), backward(functional, problem))


@given(problems(lengths="ragged"))
def test_past_the_end_nothing_counts(problem):
    """x and dy past a sequence's end may be anything, even nan."""
    lengths = problem.options["lengths"]
    past = np.arange(len(problem.inputs["x"]))[:, None] >= lengths
    other = changed(problem, {"x": np.where(past[..., None], np.nan, problem.inputs["x"])},
                    {"dy": np.where(past[..., None], np.nan, problem.upstream["dy"])})
    assert same(forward(functional, other)[:2], forward(functional, problem)[:2])
    assert same(backward(functional, other), backward(functional, problem))


@given(problems(make=lstm_problem, P=None, peepholes=False))
def test_identity_projection_and_zero_peepholes_change_nothing(close, problem):
    H = problem.inputs["W_hh"].shape[1]
    other = changed(problem, {"W_hr": np.eye(H), "peepholes": np.zeros((3, H))})
    close(forward(functional, other)[:2], forward(functional, problem)[:2], "identity")
    want, got = backward(functional, problem), backward(functional, other)
    close(got._replace(dpeepholes=None, dW_hr=None), want, "identity")


@given(problems(make=lstm_problem, P=None), st.randoms(use_true_random=False))
def test_hidden_units_have_no_order(close, problem, random):
    """Renaming the hidden units renames them in every result."""
    H = problem.inputs["W_hh"].shape[1]
    j = list(range(H))
    random.shuffle(j)
    j = np.array(j)
    rows = np.concatenate([j + gate * H for gate in range(4)])
    axes = {"W_ih": (rows,), "b": (rows,), "W_hh": (rows, j), "h0": (..., j), "c0": (..., j),
            "peepholes": (..., j), "dy": (..., j), "dh_n": (..., j), "dc_n": (..., j)}

    def renamed(name, array):
        if name not in axes or array is None:
            return array
        return array[np.ix_(*axes[name])] if name == "W_hh" else array[axes[name]]

    other = changed(problem, *({n: renamed(n, a) for n, a in part.items()}
                               for part in (problem.inputs, problem.upstream)))
    y, (h_n, c_n), _ = forward(functional, problem)
    close(forward(functional, other)[:2], (y[..., j], (h_n[:, j], c_n[:, j])), "identity")
    want, got = backward(functional, problem), backward(functional, other)
    close(got, want._make(renamed(n[1:], d) for n, d in want._asdict().items()), "identity")
