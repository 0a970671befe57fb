"""The plans over a cell that is fed apart and reads h: "gru", which has no public function.

x alone feeds its first gate, h alone the last, and a unit reads its own h_{t-1} beside the product.
The equations stand here in NumPy; a case by hand and finite differences prove them.
"""

import copy
import re
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
from problems import backward, forward, gru_problem, in_float64
from slopes import assert_gradients

from lstmcore import _kernels, functional
from lstmcore.reference import Gradients, sigmoid, steps

# ---- the equations -----------------------------------------------------------------------------------


def plain_forward(x, W_ih, W_hh, b=None, h0=None, *, lengths=None, reverse=False):
    """y (T,B,H), h_n (B,H), and what the way back needs; b (4H,) in the order n, r, z, q."""
    (T, B, _), H = x.shape, W_hh.shape[1]
    y, h, kept = np.zeros((T, B, H)), np.zeros((B, H)) if h0 is None else h0.copy(), []
    for rows, t, _ in steps(T, B, lengths, reverse):
        a = np.zeros((len(rows), 4 * H)) if b is None else np.tile(b, (len(rows), 1))
        a[:, :3 * H] += x[t, rows] @ W_ih.T
        a[:, H:] += h[rows] @ W_hh.T
        a_n, a_r, a_z, q = np.split(a, 4, axis=1)
        r, z = sigmoid(a_r), sigmoid(a_z)
        n = np.tanh(a_n + r * q)
        kept.append((rows, t, n, r, z, q, h[rows]))
        h[rows] = (1 - z) * n + z * h[rows]
        y[t, rows] = h[rows]
    return y, h, (x, W_ih, W_hh, kept)


def plain_backward(tape, dy, dh_n=None):
    x, W_ih, W_hh, kept = tape
    H = W_hh.shape[1]
    dx, dW_ih, dW_hh, db = (np.zeros(shape) for shape in (x.shape, W_ih.shape, W_hh.shape, 4 * H))
    dh = np.zeros(dy.shape[1:]) if dh_n is None else dh_n.copy()
    for rows, t, n, r, z, q, h_prev in reversed(kept):
        d = dh[rows] + dy[t, rows]
        da_n, da_z = d * (1 - z) * (1 - n * n), d * (h_prev - n) * z * (1 - z)
        da = np.concatenate([da_n, da_n * q * r * (1 - r), da_z, da_n * r], axis=1)
        dh[rows] = d * z + da[:, H:] @ W_hh
        dx[t, rows] = da[:, :3 * H] @ W_ih
        dW_ih += da[:, :3 * H].T @ x[t, rows]
        dW_hh += da[:, H:].T @ h_prev
        db += da.sum(0)
    return Gradients(dx, dW_ih, dW_hh, db, None, dh, None, None)


def by_plans_forward(x, W_ih, W_hh, b=None, h0=None, *, lengths=None, reverse=False, keep_tape=True,
                     n_threads=1, packed=None):
    y, h_n, c_n, made, (gates, c) = functional._run_forward(
        "gru", x, W_ih, W_hh, b, h0, None, lengths=lengths, reverse=reverse, keep_tape=keep_tape,
        n_threads=n_threads, packed=packed)
    assert c_n is None and c is None and (gates is not None) == keep_tape
    return y, h_n, (functional._Tape(*made), gates) if keep_tape else None


def by_plans_backward(tape, dy, dh_n=None, *, n_threads=1):
    tape, gates = tape
    dy, dh_n, _ = functional._checked_upstream(tape, dy, dh_n, None)
    return functional._run_backward(tape, dy, dh_n, None, n_threads, gates)


plain = SimpleNamespace(gru_forward=plain_forward, gru_backward=plain_backward)
by_plans = SimpleNamespace(gru_forward=by_plans_forward, gru_backward=by_plans_backward)

OPTIONS = {
    "plain": {},
    "no bias": dict(bias=False),
    "no states": dict(states=False),
    "reverse": dict(reverse=True),
    "ragged": dict(lengths="ragged"),
    "ragged reverse": dict(lengths="ragged", reverse=True, states=False),
}
every_option = pytest.mark.parametrize("options", OPTIONS)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])


def test_equations_by_hand(close):
    """r = 3/4, z = 1/4, n = tanh(log 2) = 3/5: h = 3/4 · 3/5 + 1/4 · 1/2."""
    a = np.array([np.log(2) - 3 / 4 * 2, np.log(3), -np.log(3), 2])
    fed_by_x, fed_by_h = np.array([1., 2, 3, 0]), np.array([0, 4., 5, 6])
    b = a - fed_by_x / 4 - fed_by_h / 2
    y, h_n, _ = plain_forward(np.full((1, 1, 1), 1 / 4), fed_by_x[:3, None], fed_by_h[1:, None], b,
                              np.full((1, 1), 1 / 2))
    close(y, np.full((1, 1, 1), 23 / 40), "by hand")
    close(h_n, y[0], "by hand")


@every_option
def test_equations_have_their_slopes(options, close):
    problem = gru_problem(T=4, B=5, I=3, H=4, seed=1, **OPTIONS[options])
    arrays = {name: array for name, array in problem.inputs.items() if array is not None}

    def loss():
        y, h_n, _ = forward(plain, problem)
        return (y * problem.upstream["dy"]).sum() + (h_n * problem.upstream["dh_n"]).sum()

    g = backward(plain, problem)
    assert_gradients(close, loss, arrays, {name: getattr(g, "d" + name) for name in arrays})


# ---- the plans compute them --------------------------------------------------------------------------

# (T, B, I, H): what the shape is there for
SHAPES = {
    (1, 1, 1, 1): "the smallest",
    (1, 6, 8, 8): "one step; a whole vector of 8",
    (3, 7, 4, 9): "and one more unit",
    (2, 25, 64, 10): "a group of 24 rows and one",
    (3, 5, 70, 33): "two vectors of 16 and one lane",
    (70, 4, 6, 12): "more than 256 tokens: two blocks of a weight gradient; chunks of steps",
    (2, 3, 131, 130): "three gates of 130: the panel in two blocks",
    (2, 2, 4, 520): "H above 512: the panel in two blocks, forward",
}


@cache
def solved(case):
    """A problem and the answers of the equations in float64; `case` is a tuple of its options."""
    problem = gru_problem(**dict(case))
    exact = in_float64(problem)
    return problem, forward(plain, exact)[:2], backward(plain, exact)


def check(close, n_threads=1, **case):
    problem, want, want_gradients = solved(tuple(case.items()))
    close(forward(by_plans, problem, n_threads=n_threads)[:2], want, "kernel")
    close(backward(by_plans, problem, n_threads=n_threads), want_gradients, "kernel")


@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_shapes(shape, dtype, plan, isa, close):
    case = dict(zip("TBIH", shape), dtype=dtype, seed=shape[3])
    check(close, **case)
    forward(by_plans, gru_problem(**case))
    assert _kernels.last_plan == (plan, 1, 1)


@every_dtype
@every_option
def test_options(options, dtype, plan, isa, close):
    check(close, T=6, B=9, I=5, H=21, dtype=dtype, seed=2, **OPTIONS[options])


# Rows of the batch -> how 4 threads are laid out: row groups x unit slabs. Slabs cut H = 70 between
# the five vectors of 16 lanes.
GRIDS = {1: (1, 4), 2: (2, 2), 9: (4, 1)}


@pytest.mark.skipif(not _kernels.has_openmp(), reason="this build has one thread")
@pytest.mark.parametrize("B", GRIDS)
@every_option
def test_grids_of_threads(options, B, isa, share_small_work, close):
    check(close, n_threads=4, T=6, B=B, I=5, H=70, dtype="float32", seed=3, **OPTIONS[options])
    assert _kernels.last_plan == ("tiles", *GRIDS[B])


@pytest.mark.parametrize("only", ["dy", "dh_n"])
@pytest.mark.parametrize("lengths", [None, "ragged"])
def test_each_upstream_gradient_alone(only, lengths, plan, close):
    problem = gru_problem(T=5, B=4, I=3, H=6, lengths=lengths, seed=4)
    upstream = {"dy": np.zeros_like(problem.upstream["dy"]), only: problem.upstream[only]}
    close(by_plans_backward(forward(by_plans, problem)[-1], **upstream),
          plain_backward(forward(plain, problem)[-1], **upstream), "kernel")


@pytest.mark.parametrize("T, B, lengths", [(0, 3, None), (4, 0, None), (4, 3, [0, 0, 0])])
def test_nothing_to_compute(T, B, lengths):
    problem = gru_problem(T, B, 5, 6, lengths=lengths, seed=5)
    y, h_n, _ = forward(by_plans, problem)
    g = backward(by_plans, problem)
    assert y.shape == (T, B, 6) and g.dx.shape == (T, B, 5) and not y.any() and not g.dx.any()
    assert np.array_equal(h_n, problem.inputs["h0"])
    assert np.array_equal(g.dh0, problem.upstream["dh_n"])
    assert not any(d.any() for d in (g.dW_ih, g.dW_hh, g.db))


def test_sizes_that_do_not_fit_are_named():
    inputs = gru_problem(2, 3, 4, 5).inputs
    for name, wrong, said in (("W_ih", (20, 4), "W_ih must be (3H, I) = (15, 4), got (20, 4)"),
                              ("W_hh", (20, 5), "W_hh must be (3H, H), got (20, 5)"),
                              ("b", (15,), "b must be (4H,) = (20,), got (15,)")):
        with pytest.raises(ValueError, match=re.escape(said)):
            by_plans_forward(**{**inputs, name: np.zeros(wrong)})


# ---- the same bits -----------------------------------------------------------------------------------

CASES = {
    "dense": dict(T=31, B=11, I=9, H=70),
    "float64": dict(T=31, B=11, I=9, H=35, dtype="float64"),
    "few rows": dict(T=9, B=2, I=5, H=130),
    "ragged": dict(T=40, B=13, I=9, H=35, lengths="ragged"),
    "ragged reverse": dict(T=12, B=13, I=9, H=70, lengths="ragged", reverse=True),
}
every_case = pytest.mark.parametrize("case", CASES)


def problem_of(case):
    return gru_problem(**{"dtype": "float32", "seed": 6, **CASES[case]})


def bits(arrays):
    return [None if array is None else array.tobytes() for array in arrays]


@every_case
def test_bits_do_not_depend_on_threads_or_run(case, plan, isa, share_small_work):
    found = []
    for n_threads in 1, 2, 4, 3, 1:
        y, h_n, (_, gates) = forward(by_plans, problem_of(case), n_threads=n_threads)
        g = backward(by_plans, problem_of(case), n_threads=n_threads)
        found.append(bits([y, h_n, gates, *g]))
    assert all(one == found[0] for one in found)


def of_row(problem, r, T):
    """Row r alone, its first T steps, without lengths."""
    alone = copy.deepcopy(problem)
    for part, axes in (alone.inputs, {"x": 1, "h0": 0}), (alone.upstream, {"dy": 1, "dh_n": 0}):
        for name, axis in axes.items():
            part[name] = np.take(part[name], [r], axis)[:T if axis else 1]
    alone.options["lengths"] = None
    return alone


@every_case
def test_bits_of_a_row_are_those_of_the_row_alone(case, plan, isa, share_small_work):
    problem = problem_of(case)
    T, B, _ = problem.inputs["x"].shape
    lengths = problem.options["lengths"]
    (y, h_n, _), g = (run(by_plans, problem, n_threads=2) for run in (forward, backward))
    for r in range(B):
        n = T if lengths is None else lengths[r]
        alone = of_row(problem, r, n)
        (y_1, h_1, _), g_1 = (run(by_plans, alone) for run in (forward, backward))
        assert np.array_equal(y[:n, r:r + 1], y_1) and not y[n:, r].any()
        assert np.array_equal(g.dx[:n, r:r + 1], g_1.dx) and not g.dx[n:, r].any()
        assert np.array_equal(h_n[r:r + 1], h_1) and np.array_equal(g.dh0[r:r + 1], g_1.dh0)


@every_case
def test_inputs_multiplied_ahead_or_in_the_step_give_the_same_bits(case, isa, monkeypatch):
    found = []
    for plan in "tiles", "fused":
        monkeypatch.setattr(_kernels, "plan", plan)
        y, h_n, (_, gates) = forward(by_plans, problem_of(case))
        assert _kernels.last_plan[0] == plan
        found.append(bits([y, h_n, gates]))
    assert found[0] == found[1]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lengths", [None, "ragged"])
def test_inference_gives_the_bits_of_training(lengths, bias, plan, isa):
    """keep_tape=False works in reused memory, over more steps than one chunk of it holds."""
    problem = gru_problem(250, 3, 4, 9, lengths=lengths, bias=bias, dtype="float32", seed=7)
    y, h_n, tape = forward(by_plans, problem, keep_tape=False)
    assert tape is None and bits([y, h_n]) == bits(forward(by_plans, problem)[:2])


# ---- token ids, packed weights, streams --------------------------------------------------------------

def with_ids(I, bias=True, lengths=None, T=6):
    """A problem on token ids, and the same on the rows that they stand for."""
    ids = gru_problem(T, 4, I, 37, bias=bias, lengths=lengths, seed=8)
    ids.inputs["x"] = np.random.default_rng(I).integers(0, I, (T, 4))
    rows = copy.deepcopy(ids)
    rows.inputs["x"] = np.eye(I)[ids.inputs["x"]]
    return ids, rows


@pytest.mark.parametrize("n_threads", [1, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lengths", [None, "ragged"])
@pytest.mark.parametrize("I", [11, 50])
def test_token_ids_are_rows(I, lengths, bias, n_threads, plan, isa, share_small_work, close):
    """Tables of all I tokens, and of those of 24 that occur."""
    ids, rows = with_ids(I, bias, lengths)
    close(forward(by_plans, ids, n_threads=n_threads)[:2], forward(plain, rows)[:2], "kernel")
    close(backward(by_plans, ids, n_threads=n_threads),
          backward(plain, rows)._replace(dx=None), "kernel")


def test_a_table_of_tokens_has_all_gates(plan, isa, close):
    """Its gradient adds up to db; of the gates that x feeds it is dW_ih."""
    ids, rows = with_ids(11, bias=False)
    want = backward(plain, rows)
    table = np.pad(rows.inputs["W_ih"].T, ((0, 0), (0, 37)))
    ids.inputs["W_ih"] = functional.TokenTable(table)
    got = backward(by_plans, ids)
    assert got.dW_ih.shape == (11, 4 * 37)
    close(got.dW_ih[:, :3 * 37].T, want.dW_ih, "kernel")
    close(got.dW_ih.sum(0), want.db, "kernel")


@pytest.mark.parametrize("n_threads", [1, 4])
@pytest.mark.parametrize("lengths", [None, "ragged"])
def test_packed_weights_give_the_same_bits(lengths, n_threads, isa, share_small_work):
    for problem in with_ids(11, lengths=lengths):
        packed = functional.pack("gru", problem.inputs["W_ih"], problem.inputs["W_hh"])
        got = forward(by_plans, problem, n_threads=n_threads, packed=packed)
        assert bits(got[:2]) == bits(forward(by_plans, problem, n_threads=n_threads)[:2])
        assert bits(got[2][1:]) == bits(forward(by_plans, problem)[2][1:])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("copied", [False, True])
def test_a_stream_gives_the_bits_of_the_sequence(copied, bias, isa):
    for problem in with_ids(11, bias, T=9):
        x, W_ih, W_hh, b, h0 = problem.inputs.values()
        step = functional.Step("gru", len(h0), W_ih, W_hh, b)
        step.h[...] = h0
        assert step.c is None
        y, h_n, _ = forward(by_plans, problem)
        for t, x_t in enumerate(x):
            step = copy.copy(step) if copied else step
            assert np.array_equal(step(x_t), y[t])
        assert np.array_equal(step.h, h_n)


def test_a_stream_on_two_threads_gives_the_same_bits(isa):
    """3.5 MB of weights: a step shares them out."""
    problem = gru_problem(3, 2, 280, 260, seed=9)
    x, W_ih, W_hh, b, _ = problem.inputs.values()
    one, two = (functional.Step("gru", 2, W_ih, W_hh, b, n_threads=n) for n in (1, 2))
    for x_t in x:
        assert np.array_equal(one(x_t), two(x_t))
    ids = np.array([3, 279])
    assert np.array_equal(one(ids), two(ids)) and np.array_equal(one.h, two.h)
