"""The GRU on the kernels: what x feeds alone, a unit that reads its own h, and a product that waits.

Its reset gate comes after the product with W_hn, or before it: two cells, and every test has both.
"""

import copy
import re
from functools import cache, partial

import numpy as np
import pytest
from problems import backward, forward, gru_problem, in_float64, with_products

from lstmcore import _kernels, functional, reference

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


@pytest.fixture(params=["after", "before"], autouse=True)
def make(request):
    """gru_problem, with the reset gate after or before the product."""
    return partial(gru_problem, reset_after=request.param == "after")


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
    """A problem and the reference's answers in float64; `case` is a tuple of its options."""
    problem = gru_problem(**dict(case))
    exact = in_float64(problem)
    return problem, forward(reference, exact), backward(reference, exact)


def check(make, close, n_threads=1, **case):
    problem, (*want, want_tape), want_gradients = solved((*make.keywords.items(), *case.items()))
    *got, tape = forward(functional, problem, n_threads=n_threads)
    close(tuple(got), tuple(want), "kernel")
    close(tape.gates, want_tape.gates, "kernel")
    close(backward(functional, problem, n_threads=n_threads), want_gradients, "kernel")


@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_shapes(shape, dtype, make, plan, isa, close):
    case = dict(zip("TBIH", shape), dtype=dtype, seed=shape[3])
    check(make, close, **case)
    forward(functional, make(**case), n_threads=1)
    assert _kernels.last_plan == (plan, 1, 1)


@every_dtype
@every_option
def test_options(options, dtype, make, plan, isa, close):
    check(make, close, T=6, B=9, I=5, H=21, dtype=dtype, seed=2, **OPTIONS[options])


# Rows of the batch -> how 4 threads are laid out: row groups x unit slabs. Slabs cut H = 70 between
# the five vectors of 16 lanes.
GRIDS = {1: (1, 4), 2: (2, 2), 9: (4, 1)}


@pytest.mark.skipif(not _kernels.has_openmp(), reason="this build has one thread")
@pytest.mark.parametrize("B", GRIDS)
@every_option
def test_grids_of_threads(options, B, make, isa, share_small_work, close):
    check(make, close, n_threads=4, T=6, B=B, I=5, H=70, dtype="float32", seed=3, **OPTIONS[options])
    assert _kernels.last_plan == ("tiles", *GRIDS[B])


@pytest.mark.parametrize("only", ["dy", "dh_n"])
@pytest.mark.parametrize("lengths", [None, "ragged"])
def test_each_upstream_gradient_alone(only, lengths, make, plan, close):
    problem = make(T=5, B=4, I=3, H=6, lengths=lengths, seed=4)
    upstream = {"dy": np.zeros_like(problem.upstream["dy"]), only: problem.upstream[only]}
    close(functional.gru_backward(forward(functional, problem)[-1], **upstream),
          reference.gru_backward(forward(reference, problem)[-1], **upstream), "kernel")


@pytest.mark.parametrize("T, B, lengths", [(0, 3, None), (4, 0, None), (4, 3, [0, 0, 0])])
def test_nothing_to_compute(T, B, lengths, make):
    problem = make(T, B, 5, 6, lengths=lengths, seed=5)
    y, h_n, _ = forward(functional, problem)
    g = backward(functional, problem)
    assert y.shape == (T, B, 6) and g.dx.shape == (T, B, 5) and not y.any() and not g.dx.any()
    assert np.array_equal(h_n, problem.inputs["h0"])
    assert np.array_equal(g.dh0, problem.upstream["dh_n"])
    assert not any(d.any() for d in (g.dW_ih, g.dW_hh, g.db))


def test_sizes_that_do_not_fit_are_named(make):
    problem = make(2, 3, 4, 5)
    b = ((15,), "b must be (4H,) = (20,), got (15,)") if problem.options["reset_after"] else (
        (20,), "b must be (3H,) = (15,), got (20,)")
    for name, wrong, said in (("W_ih", (20, 4), "W_ih must be (3H, I) = (15, 4), got (20, 4)"),
                              ("W_hh", (20, 5), "W_hh must be (3H, H), got (20, 5)"), ("b", *b)):
        with pytest.raises(ValueError, match=re.escape(said)):
            functional.gru_forward(**{**problem.inputs, name: np.zeros(wrong)}, **problem.options)


def test_a_tape_is_used_once_and_by_its_own_cell(make):
    problem = make(2, 3, 4, 5)
    y, _, tape = forward(functional, problem)
    with pytest.raises(TypeError, match="tape must be one of lstm_forward, got GRUTape"):
        functional.lstm_backward(tape, y)
    again, g = tape.again(), functional.gru_backward(tape, y)
    for spent in lambda: tape.gates, lambda: functional.gru_backward(tape, y):
        with pytest.raises(ValueError, match="this tape was used by an earlier backward pass"):
            spent()
    assert bits(functional.gru_backward(again, y)) == bits(g)
    assert again.nbytes == 6 * 5 * (3 + problem.options["reset_after"]) * 8
    with pytest.raises(TypeError, match="tape must be one of gru_forward, got NoneType"):
        functional.gru_backward(None, y)


# ---- the same bits -----------------------------------------------------------------------------------

CASES = {
    "dense": dict(T=31, B=11, I=9, H=70),
    "float64": dict(T=31, B=11, I=9, H=35, dtype="float64"),
    "few rows": dict(T=9, B=2, I=5, H=130),
    "ragged": dict(T=40, B=13, I=9, H=35, lengths="ragged"),
    "ragged reverse": dict(T=12, B=13, I=9, H=70, lengths="ragged", reverse=True),
}
every_case = pytest.mark.parametrize("case", CASES)


def problem_of(make, case):
    return make(**{"dtype": "float32", "seed": 6, **CASES[case]})


def bits(arrays):
    return [None if array is None else array.tobytes() for array in arrays]


@every_case
def test_bits_do_not_depend_on_threads_or_run(case, make, plan, isa, share_small_work):
    found = []
    for n_threads in 1, 2, 4, 3, 1:
        y, h_n, tape = forward(functional, problem_of(make, case), n_threads=n_threads)
        gates, g = tape.gates, backward(functional, problem_of(make, case), n_threads=n_threads)
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
def test_bits_of_a_row_are_those_of_the_row_alone(case, make, plan, isa, share_small_work):
    problem = problem_of(make, case)
    T, B, _ = problem.inputs["x"].shape
    lengths = problem.options["lengths"]
    (y, h_n, _), g = (run(functional, problem, n_threads=2) for run in (forward, backward))
    for r in range(B):
        n = T if lengths is None else lengths[r]
        alone = of_row(problem, r, n)
        (y_1, h_1, _), g_1 = (run(functional, alone) for run in (forward, backward))
        assert np.array_equal(y[:n, r:r + 1], y_1) and not y[n:, r].any()
        assert np.array_equal(g.dx[:n, r:r + 1], g_1.dx) and not g.dx[n:, r].any()
        assert np.array_equal(h_n[r:r + 1], h_1) and np.array_equal(g.dh0[r:r + 1], g_1.dh0)


@every_case
def test_inputs_multiplied_ahead_or_in_the_step_give_the_same_bits(case, make, isa, monkeypatch):
    found = []
    for plan in "tiles", "fused":
        monkeypatch.setattr(_kernels, "plan", plan)
        y, h_n, tape = forward(functional, problem_of(make, case))
        assert _kernels.last_plan[0] == plan
        found.append(bits([y, h_n, tape.gates]))
    assert found[0] == found[1]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lengths", [None, "ragged"])
def test_inference_gives_the_bits_of_training(lengths, bias, make, plan, isa):
    """keep_tape=False works in reused memory, over more steps than one chunk of it holds."""
    problem = make(250, 3, 4, 9, lengths=lengths, bias=bias, dtype="float32", seed=7)
    y, h_n, tape = forward(functional, problem, keep_tape=False)
    assert tape is None and bits([y, h_n]) == bits(forward(functional, problem)[:2])


# ---- token ids, packed weights, streams --------------------------------------------------------------

def cell_of(problem):
    return "gru" if problem.options["reset_after"] else "gru_before"


def with_ids(make, I, bias=True, lengths=None, T=6):
    """A problem on token ids, and the same on the rows that they stand for."""
    ids = make(T, 4, I, 37, bias=bias, lengths=lengths, seed=8)
    ids.inputs["x"] = np.random.default_rng(I).integers(0, I, (T, 4))
    rows = copy.deepcopy(ids)
    rows.inputs["x"] = np.eye(I)[ids.inputs["x"]]
    return ids, rows


@pytest.mark.parametrize("n_threads", [1, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lengths", [None, "ragged"])
@pytest.mark.parametrize("I", [11, 50])
def test_token_ids_are_rows(I, lengths, bias, n_threads, make, plan, isa, share_small_work, close):
    """Tables of all I tokens, and of those of 24 that occur."""
    ids, rows = with_ids(make, I, bias, lengths)
    close(forward(functional, ids, n_threads=n_threads)[:2], forward(reference, rows)[:2], "kernel")
    close(backward(functional, ids, n_threads=n_threads),
          backward(reference, rows)._replace(dx=None), "kernel")


def test_a_table_of_tokens_has_all_gates(make, plan, isa, close):
    """It is as wide as b, and its gradient adds up to db; of the gates that x feeds it is dW_ih."""
    ids, rows = with_ids(make, 11)
    want, b = backward(reference, rows), ids.inputs.pop("b")
    table = b + np.pad(rows.inputs["W_ih"].T, ((0, 0), (0, len(b) - 3 * 37)))
    ids.inputs["W_ih"] = functional.TokenTable(table)
    close(forward(functional, ids)[0], forward(reference, rows)[0], "kernel")
    got = backward(functional, ids)
    assert got.dW_ih.shape == (11, len(b))
    close(got.dW_ih[:, :3 * 37].T, want.dW_ih, "kernel")
    close(got.dW_ih.sum(0), want.db, "kernel")


@pytest.mark.parametrize("n_threads", [1, 4])
@pytest.mark.parametrize("lengths", [None, "ragged"])
def test_packed_weights_give_the_same_bits(lengths, n_threads, make, isa, share_small_work):
    for problem in with_ids(make, 11, lengths=lengths):
        packed = functional.pack(cell_of(problem), problem.inputs["W_ih"], problem.inputs["W_hh"])
        y, h_n, tape = forward(functional, problem, n_threads=n_threads, packed=packed)
        want_y, want_h_n, want = forward(functional, problem)
        assert bits([y, h_n, tape.gates]) == bits([want_y, want_h_n, want.gates])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("copied", [False, True])
def test_a_stream_gives_the_bits_of_the_sequence(copied, bias, make, isa):
    for problem in with_ids(make, 11, bias, T=9):
        x, W_ih, W_hh, b, h0 = problem.inputs.values()
        step = functional.Step(cell_of(problem), len(h0), W_ih, W_hh, b)
        step.h[...] = h0
        assert step.c is None
        y, h_n, _ = forward(functional, problem)
        for t, x_t in enumerate(x):
            step = copy.copy(step) if copied else step
            assert np.array_equal(step(x_t), y[t])
        assert np.array_equal(step.h, h_n)


def test_a_stream_on_two_threads_gives_the_same_bits(make, isa):
    """3.5 MB of weights: a step shares them out."""
    problem = make(3, 2, 280, 260, seed=9)
    x, W_ih, W_hh, b, _ = problem.inputs.values()
    one, two = (functional.Step(cell_of(problem), 2, W_ih, W_hh, b, n_threads=n) for n in (1, 2))
    for x_t in x:
        assert np.array_equal(one(x_t), two(x_t))
    ids = np.array([3, 279])
    assert np.array_equal(one(ids), two(ids)) and np.array_equal(one.h, two.h)


# ---- below float32 -----------------------------------------------------------------------------------


@every_option
@pytest.mark.parametrize("n_threads", [1, 4])
def test_bfloat16_is_the_reference_in_bfloat16(options, n_threads, make, isa, share_small_work, close):
    """Up to a sum that rounds to another number: there and back, on one thread and on four."""
    problem = make(T=5, B=4, I=7, H=37, dtype="float32", seed=10, **OPTIONS[options])
    low = with_products(problem, "bfloat16")
    for run in forward, backward:
        got, want = (run(module, low)[:5 if run is backward else 2] for module in (functional, reference))
        close(tuple(got), tuple(want), "bfloat16")
    y, exact = forward(functional, low, n_threads=n_threads)[0], forward(functional, problem)[0]
    assert bits([y]) == bits([forward(functional, low)[0]]) and 1e-5 < np.abs(y - exact).max()


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@pytest.mark.parametrize("ids", [False, True])
def test_low_packed_weights_and_streams(precision, ids, make, isa, close):
    for problem in with_ids(make, 11)[:2 - (not ids)]:
        for name, array in problem.inputs.items():
            if array.dtype.kind == "f":
                problem.inputs[name] = array.astype("float32")
        x, W_ih, W_hh, b, h0 = problem.inputs.values()
        packed = functional.pack(cell_of(problem), W_ih, W_hh, precision=precision)
        y, h_n, _ = forward(functional, problem, packed=packed, keep_tape=False)
        rows = x if x.ndim == 3 else np.eye(11, dtype="float32")[x]
        want = reference.gru_forward(rows, W_ih, W_hh, b, h0, **problem.options, compute=precision)
        close((y, h_n), want[:2], precision)
        step = functional.Step(cell_of(problem), 4, W_ih, W_hh, b, precision=precision)
        step.h[...] = h0
        assert all(np.array_equal(step(x_t), y_t) for x_t, y_t in zip(x, y))
