"""The kernels are the reference: forward and backward, every shape of tile, plan and option."""

from functools import cache

import numpy as np
import pytest
from problems import VARIANTS, backward, forward, in_float64, lstm_problem, rnn_problem

from lstmcore import _kernels, _products, functional, reference
from lstmcore.dense import linear_backward, linear_forward

# (T, B, I, H): what the shape is there for
SHAPES = {
    (1, 1, 1, 1): "the smallest",
    (2, 3, 5, 1): "one unit",
    (3, 1, 2, 3): "one row; a vector less one lane (4 lanes)",
    (3, 2, 7, 4): "a whole vector of 4",
    (2, 4, 3, 5): "and one more",
    (3, 5, 9, 7): "a vector less one lane (8 lanes); 9 inputs",
    (2, 6, 8, 8): "a whole vector of 8; a whole tile of 6 rows",
    (3, 7, 4, 9): "and one more unit, and one more row",
    (2, 3, 17, 15): "a vector less one lane (16 lanes)",
    (2, 13, 3, 16): "a whole vector of 16; rows 5 + 4 + 4",
    (3, 10, 5, 17): "and one more",
    (2, 11, 33, 31): "two vectors less one lane",
    (3, 4, 16, 33): "two vectors and one lane",
    (2, 49, 3, 6): "a group of 48 rows and one",
    (2, 25, 64, 10): "a group of 24 rows and one; 64 inputs: a whole panel",
    (40, 7, 6, 12): "more than 256 tokens: two blocks of a weight gradient; two chunks of steps",
    (3, 5, 70, 65): "a panel and one lane, in units and in inputs",
    (2, 3, 131, 130): "4H above 512: the panel in two blocks, backward",
    (2, 2, 520, 21): "I above 512: the panel in two blocks, input projection",
    (2, 3, 4, 520): "H above 512: the panel in two blocks, forward",
}
OPTIONS = {
    "plain": {},
    "no bias": dict(bias=False),
    "no states": dict(states=False),
    "reverse": dict(reverse=True),
    "ragged": dict(lengths="ragged"),
    "ragged reverse": dict(lengths="ragged", reverse=True, states=False),
}
LSTM_OPTIONS = {
    **OPTIONS,
    "peepholes": dict(peepholes=True),
    "peepholes, ragged": dict(peepholes=True, lengths="ragged"),
    "projected": dict(P=10),
    "projected to more": dict(P=37, bias=False),
    "all": dict(P=9, peepholes=True, lengths="ragged", reverse=True),
    **{f"variant: {name}": dict(variant=name, lengths="ragged", reverse=name == "all",
                                peepholes="zone" not in name and name != "all") for name in VARIANTS},
    "variant without states": dict(variant="recurrent dropout", states=False),
    "layer norm": dict(norms=10),
    "layer norm of gates": dict(norms=6),
    "layer norm of gates, ragged": dict(norms=6, lengths="ragged", states=False),
    "layer norm of gates, ragged reverse, no bias": dict(norms=6, lengths="ragged", reverse=True, bias=False),
    "layer norm, ragged": dict(norms=10, lengths="ragged", states=False),
    "layer norm, ragged reverse, no bias": dict(norms=10, lengths="ragged", reverse=True, bias=False),
}
SHAPE_FOR_OPTIONS = (6, 9, 5, 21)


@cache
def solved(make, case):
    """A problem and the reference's answers to it in float64; `case` is a tuple of its options."""
    problem = make(**dict(case))
    exact = in_float64(problem)
    return problem, forward(reference, exact), backward(reference, exact)


def check(make, close, n_threads=1, **case):
    """Results, tape and gradients of a random problem are the reference's."""
    problem, (want_y, want_state, want_tape), want_gradients = solved(make, tuple(case.items()))
    y, state, tape = forward(functional, problem, n_threads=n_threads)
    close(y, want_y, "kernel", "y")
    close(state, want_state, "kernel", "state")
    if problem.kind == "lstm":
        close(tape.gates, want_tape.gates, "kernel", "gates")
        close(tape.c, want_tape.c, "kernel", "c")
    close(backward(functional, problem, n_threads=n_threads), want_gradients, "kernel", "gradients")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_lstm_shapes(shape, dtype, plan, isa, close):
    T, B, I, H = shape
    check(lstm_problem, close, T=T, B=B, I=I, H=H, dtype=dtype, peepholes=H % 2 == 1, seed=H)
    forward(functional, lstm_problem(T, B, I, H, dtype=dtype, seed=H), n_threads=1)
    assert _kernels.last_plan == (plan, 1, 1)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("options", LSTM_OPTIONS)
def test_lstm_options(options, dtype, plan, isa, close):
    T, B, I, H = SHAPE_FOR_OPTIONS
    check(lstm_problem, close, T=T, B=B, I=I, H=H, dtype=dtype, seed=1, **LSTM_OPTIONS[options])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("options", OPTIONS)
def test_rnn_options(options, nonlinearity, dtype, plan, isa, close):
    T, B, I, H = SHAPE_FOR_OPTIONS
    check(rnn_problem, close, T=T, B=B, I=I, H=H, dtype=dtype, nonlinearity=nonlinearity, seed=2,
          **OPTIONS[options])


@pytest.mark.parametrize("shape", [(1, 1, 2, 1), (3, 50, 4, 70), (2, 3, 5, 130)],
                         ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_rnn_shapes(shape, nonlinearity, plan, isa, close):
    T, B, I, H = shape
    check(rnn_problem, close, T=T, B=B, I=I, H=H, nonlinearity=nonlinearity, seed=3)


needs_openmp = pytest.mark.skipif(not _kernels.has_openmp(), reason="this build has one thread")

# Rows of the batch -> how 4 threads are laid out: row groups x unit slabs. Slabs cut H = 70 between
# the five vectors of 16 lanes.
GRIDS = {1: (1, 4), 2: (2, 2), 9: (4, 1)}


@needs_openmp
@pytest.mark.parametrize("B", GRIDS)
@pytest.mark.parametrize("options", LSTM_OPTIONS)
def test_lstm_grids_of_threads(options, B, isa, share_small_work, close):
    check(lstm_problem, close, n_threads=4, T=6, B=B, I=5, H=70, dtype="float32", seed=4,
          **LSTM_OPTIONS[options])
    assert _kernels.last_plan == ("tiles", *GRIDS[B])


@needs_openmp
@pytest.mark.parametrize("B", GRIDS)
@pytest.mark.parametrize("options", OPTIONS)
def test_rnn_grids_of_threads(options, B, isa, share_small_work, close):
    check(rnn_problem, close, n_threads=4, T=6, B=B, I=5, H=70, dtype="float32", seed=5,
          **OPTIONS[options])
    assert _kernels.last_plan == ("tiles", *GRIDS[B])


@needs_openmp
@pytest.mark.parametrize("H", [190, 300])
@pytest.mark.parametrize("options", ["ragged reverse", "all"])
def test_many_rows_share_slabs_of_large_weights(options, H, isa, close):
    """W_hh of 1.2 and 2.9 MB: 2x2 and 1x4 where a core's second-level cache has 1 MB."""
    case = {**LSTM_OPTIONS[options], "P": None}
    check(lstm_problem, close, n_threads=4, T=3, B=9, I=5, H=H, seed=6, **case)
    _, rows, slabs = _kernels.last_plan
    assert rows * slabs == 4


def packed_of(problem):
    return functional.pack("lstm", *(problem.inputs[name] for name in ("W_ih", "W_hh", "W_hr")))


@needs_openmp
@pytest.mark.parametrize("B", GRIDS)
@pytest.mark.parametrize("P", [None, 70])
def test_packed_weights_give_the_same_bits_on_any_grid(B, P, isa, share_small_work):
    problem = lstm_problem(3, B, 5, 70, P=P, dtype="float32", seed=11)
    want, states, _ = forward(functional, problem, n_threads=1)
    packed = packed_of(problem)
    for n_threads in 1, 4:
        y, got, _ = forward(functional, problem, packed=packed, n_threads=n_threads)
        assert np.array_equal(y, want) and all(map(np.array_equal, got, states))
    assert _kernels.last_plan[1:] == GRIDS[B]


@needs_openmp
@pytest.mark.parametrize("B", GRIDS)
@pytest.mark.parametrize("make", [lstm_problem, rnn_problem])
def test_token_ids_give_the_same_bits_on_any_grid(make, B, isa, share_small_work):
    problem = make(6, B, 12, 70, dtype="float32", seed=13)
    problem.inputs["x"] = np.random.default_rng(13).integers(0, 12, (6, B))
    want, gradients = forward(functional, problem, n_threads=1), backward(functional, problem)
    got = forward(functional, problem, n_threads=4)
    assert _kernels.last_plan[1:] == GRIDS[B]
    assert np.array_equal(got[0], want[0]) and np.array_equal(got[1], want[1])
    for g, w in zip(backward(functional, problem, n_threads=4), gradients, strict=True):
        assert g is w is None or np.array_equal(g, w)


# Instruction sets that have formats below float32 alone, and whose floats they take.
FLOATS = {"amx": "avx512", "avx512bf16": "avx512", "avx512vnni": "avx512", "avxvnni": "avx2",
          "neondot": "neon"}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_packed_weights_run_on_the_instruction_set_that_they_are_packed_for(dtype, isa, close):
    problem = lstm_problem(3, 4, 5, 33, P=20, dtype=dtype, seed=12)
    x, W = problem.inputs["x"][0], problem.inputs["W_ih"]
    want = forward(functional, problem)[0], linear_forward(x, W)
    for other in _kernels.available_isas():
        _kernels.use_isa(other)
        packed, dense = packed_of(problem), functional.pack("linear", W)
        _kernels.use_isa(isa)
        assert packed.isa == dense.isa == FLOATS.get(other, other)
        close(forward(functional, problem, packed=packed)[0], want[0], "identity")
        close(linear_forward(x, W, packed=dense), want[1], "identity")


@pytest.mark.parametrize("B", [1, 2, 3])
def test_fewer_rows_than_threads(B, plan, isa, share_small_work, close):
    check(lstm_problem, close, n_threads=4, T=3, B=B, I=4, H=35, dtype="float32", seed=6)


@pytest.mark.parametrize("only", ["dy", "dh_n", "dc_n"])
@pytest.mark.parametrize("lengths", [None, "ragged"])
def test_each_upstream_gradient_alone(only, lengths, plan, close):
    problem, _, _ = solved(lstm_problem, (("T", 5), ("B", 4), ("I", 3), ("H", 6), ("seed", 7),
                                          ("peepholes", True), ("lengths", lengths)))
    upstream = {n: u if n == only else None for n, u in problem.upstream.items()}
    if only != "dy":
        upstream["dy"] = np.zeros_like(problem.upstream["dy"])
    got = functional.lstm_backward(forward(functional, problem)[-1], **upstream)
    want = reference.lstm_backward(forward(reference, problem)[-1], **upstream)
    close(got, want, "kernel")


@pytest.mark.parametrize("make", [lstm_problem, rnn_problem])
@pytest.mark.parametrize("lengths", [None, "ragged"])
def test_inference_gives_the_bits_of_training(make, lengths, plan, isa):
    """keep_tape=False works in reused memory, over more steps than one chunk of it holds."""
    problem = make(250, 3, 4, 9, lengths=lengths, dtype="float32", seed=8)
    y, state, tape = forward(functional, problem, keep_tape=False)
    want_y, want_state, _ = forward(functional, problem)
    assert tape is None
    assert np.array_equal(y, want_y) and np.array_equal(state, want_state)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("trans_a", [False, True])
@pytest.mark.parametrize("trans_b", [False, True])
def test_blas_shim_is_a_row_major_product(trans_a, trans_b, dtype, close):
    from lstmcore import _blas

    rng = np.random.default_rng(9)
    m, n, k = 3, 5, 7
    a = rng.standard_normal((k, m) if trans_a else (m, k)).astype(dtype)
    b = rng.standard_normal((n, k) if trans_b else (k, n)).astype(dtype)
    c = rng.standard_normal((m, n)).astype(dtype)
    want = 2.5 * np.dot(a.T if trans_a else a, b.T if trans_b else b) - 0.5 * c
    _blas.matrix_product(2.5, a, trans_a, b, trans_b, -0.5, c)
    close(c, want, "kernel")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("inputs, outputs",
                         [(9, 1), (40, 12), (257, 70), (64, 256), (33, 265), (700, 513)])
def test_a_row_has_the_same_bits_at_every_place(inputs, outputs, dtype, plan):
    rng = np.random.default_rng(inputs)
    W = rng.standard_normal((outputs, inputs)).astype(dtype)
    for width, product in (inputs, lambda x: linear_forward(x, W)), \
            (outputs, lambda dy: linear_backward(np.empty((len(dy), inputs), dtype), W, dy)[0]):
        rows = rng.standard_normal((3, width)).astype(dtype)[np.arange(76) % 3]
        rows[1::3] = rng.standard_normal((25, width))
        got = product(rows)
        assert (got[::3] == product(rows[:1])).all() and (got[2::3] == got[2]).all()


def test_a_blas_is_used_where_its_rows_are_alike(monkeypatch):
    from lstmcore import _blas

    def by_place(alpha, a, trans_a, b, trans_b, beta, c):
        b = b.T if trans_b else b
        c[:12] += a[:12] @ b
        c[12:] += a[12:, ::-1] @ b[::-1]

    x, W = np.ones((5, 3)), np.ones((2, 3))
    monkeypatch.setattr(_kernels, "plan", "blas")
    monkeypatch.setattr(_products, "_fit", {})
    linear_forward(x, W)
    fit = dict(_products._fit)
    assert list(fit) == ["float64"]
    monkeypatch.setattr(_blas, "matrix_product", by_place)
    _products._fit.clear()
    weights = np.ones((8, 3)), np.ones((8, 2))
    functional.lstm_forward(np.ones((1, 5, 3)), *weights)
    assert _products._fit == {"float64": False} and _kernels.last_plan[0] == "tiles"
    _products._fit.update(fit)
    functional.lstm_forward(np.ones((1, 5, 3)), *weights)
    assert _kernels.last_plan[0] == ("blas" if fit["float64"] else "tiles")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["x", "c0"])
def test_nan_and_inf_stay_in_their_row(name, value, plan, isa):
    """What is not finite shows in its own row from its own step on, and nowhere else."""
    problem = lstm_problem(4, 5, 3, 18, dtype="float32", seed=10)
    clean = forward(functional, problem)[0]
    problem.inputs[name] = problem.inputs[name].copy()
    problem.inputs[name][(2, 3, 1) if name == "x" else (3, 1)] = value
    y, (_, c_n), _ = forward(functional, problem)
    first = 2 if name == "x" else 0
    others = [0, 1, 2, 4]
    assert np.array_equal(y[:, others], clean[:, others])
    assert np.array_equal(y[:first, 3], clean[:first, 3])
    assert not np.array_equal(y[first, 3], clean[first, 3])
    if np.isnan(value):
        assert np.isnan(y[first:, 3]).any(axis=1).all() and np.isnan(c_n[3]).any()
