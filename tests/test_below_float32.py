"""Products in bfloat16 and int8: every step has the sums that NumPy finds, and float32's cell.

A state that differs by its last bit rounds to another neighbor now and then, and many steps carry it
on; so single steps are compared with the specification, and many steps with single ones.
"""

import contextlib

import numpy as np
import pytest
from problems import (backward, bfloat16_sums, forward, gru_problem, in_float64, lstm_problem,
                      rnn_problem, with_products)
from test_determinism import MAKE, bits, everything, rows_of

from lstmcore import _kernels, functional, reference
from lstmcore.dense import linear_backward, linear_forward
from lstmcore.functional import Quantized, Step, pack
from lstmcore.reference import quantize, rounded

SHAPES = [(1, 1, 1), (3, 5, 7), (1, 65, 33), (4, 64, 32), (7, 9, 17), (13, 31, 40), (49, 3, 6),
          (194, 6, 5), (2, 520, 21), (2, 4, 520)]      # B, I, H; 192 rows are lowered at a time
OPTIONS = {"plain": {}, "no states": dict(states=False), "peepholes": dict(peepholes=True),
           "projected": dict(P=10, peepholes=True),
           "variant": dict(variant="softsign, scaled tanh", states=False)}
WEIGHTS = ("W_ih", "W_hh", "W_hr")


def packed_of(problem, precision):
    """The weights of a problem, packed; a vanilla RNN's too."""
    cell = problem.options.get("nonlinearity", "lstm" + "_varied" * ("variant" in problem.options))
    return pack(cell, *(problem.inputs.get(name) for name in WEIGHTS), precision=precision)


def run(problem, precision, n_threads=1, **options):
    """y and the final state, computed in a format without a tape."""
    call = getattr(functional, problem.kind + "_forward")
    return call(**problem.inputs, **problem.options, keep_tape=False, n_threads=n_threads,
                packed=packed_of(problem, precision), **options)[:2]


def from_sums(problem, a, **changes):
    """The problem of one step whose pre-activations (B, G) are these: x multiplied by one."""
    G = a.shape[1]
    inputs = dict(problem.inputs, x=a[None], W_ih=np.eye(G, dtype="float32"), b=None,
                  W_hh=np.zeros_like(problem.inputs["W_hh"]), **changes)
    return type(problem)(**{**vars(problem), "inputs": inputs})


@contextlib.contextmanager
def fused(isa):
    """For "base", whose float32 cells multiply and add in two roundings, an instruction set with one."""
    others = [name for name in _kernels.available_isas() if name != "base"]
    if isa == "base" and not others:
        pytest.skip("no instruction set here has fused multiply-adds")
    _kernels.use_isa(others[0] if isa == "base" else isa)
    yield
    _kernels.use_isa(isa)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_bfloat16_step_has_the_sums_of_numpy(shape, options, plan, isa):
    if _kernels.plan == "blas":
        pytest.skip("BLAS has an order of sums of its own")
    B, I, H = shape
    problem = lstm_problem(1, B, I, H, dtype="float32", seed=H, **OPTIONS[options])
    x, W_ih, W_hh, b, h0 = (problem.inputs[name] for name in ("x", "W_ih", "W_hh", "b", "h0"))
    y, (h, c), tape = forward(functional, with_products(problem, "bfloat16"))
    a = bfloat16_sums(x[0], W_ih.T, b)
    if h0 is not None:
        a = bfloat16_sums(h0, W_hh.T, a)
    with fused(isa):
        want = forward(functional, from_sums(problem, a))
    assert bits((tape.gates, c)) == bits((want[2].gates, want[1][1]))
    if "P" not in OPTIONS[options]:
        assert bits((y, h)) == bits((want[0], want[1][0]))
        assert bits(run(problem, "bfloat16")) == bits((y, (h, c)))
    else:
        m = tape.gates[0, :, 3 * H:] * np.tanh(c)       # the kernels' own tanh is within 4 ulp of it
        error = np.abs(h - rounded(m) @ rounded(problem.inputs["W_hr"]).T).max()
        assert error < 2e-3 * np.abs(h).max()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_int8_step_is_the_specification(shape, options, isa, close):
    B, I, H = shape
    if options == "projected" and H > 64:
        pytest.skip("o∘tanh(c) of so many is rounded to another neighbor somewhere")
    problem = lstm_problem(1, B, I, H, dtype="float32", seed=B, **OPTIONS[options])
    want = forward(reference, with_products(in_float64(problem), "int8"))
    close(run(problem, "int8"), want[:2], "one int8 step", "y and state")


@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_gru_s_bfloat16_step_has_the_sums_of_numpy(shape, reset_after, plan, isa):
    """The gates that need no other gate's product, and h after a reset that follows the product."""
    if _kernels.plan == "blas":
        pytest.skip("BLAS has an order of sums of its own")
    B, I, H = shape
    problem = gru_problem(1, B, I, H, dtype="float32", reset_after=reset_after, seed=H)
    x, W_ih, W_hh, b, h0 = (problem.inputs[name] for name in ("x", "W_ih", "W_hh", "b", "h0"))
    y, h_n, tape = forward(functional, with_products(problem, "bfloat16"))
    a = bfloat16_sums(x[0], W_ih.T, b[:3 * H])
    a[:, :2 * H] = bfloat16_sums(h0, W_hh[:2 * H].T, a[:, :2 * H])
    if not reset_after:
        with fused(isa):
            want = forward(functional, from_sums(problem, a))
        assert bits(tape.gates[..., :2 * H].copy()) == bits(want[2].gates[..., :2 * H].copy())
        return
    q = bfloat16_sums(h0, W_hh[2 * H:].T, b[3 * H:])     # of each row: a bias of that row alone
    for row in range(B):
        one = from_sums(problem, a[row:row + 1], h0=h0[row:row + 1])
        one.inputs["b"] = np.concatenate([np.zeros(3 * H, "float32"), q[row]])
        with fused(isa):
            want = forward(functional, one)
        assert bits(tape.gates[:, row].copy()) == bits(want[2].gates[:, 0].copy())
        assert bits((y[:, row].copy(), h_n[row].copy())) == bits((want[0][:, 0].copy(), want[1][0].copy()))


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_a_vanilla_rnn_below_float32(nonlinearity, isa, close):
    problem = rnn_problem(1, 7, 33, 19, dtype="float32", nonlinearity=nonlinearity)
    exact = in_float64(problem)
    for precision in ("bfloat16", "int8"):
        want = forward(reference, with_products(exact, precision))
        close(run(problem, precision), want[:2], "one int8 step", precision)
    lower = with_products(problem, "bfloat16")
    close(backward(functional, lower), backward(reference, with_products(exact, "bfloat16")),
          "one bfloat16 step back", "gradients")


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gradients_of_one_step_in_bfloat16(shape, options, isa, close):
    B, I, H = shape
    problem = lstm_problem(1, B, I, H, dtype="float32", seed=H + 1, **OPTIONS[options])
    want = backward(reference, with_products(in_float64(problem), "bfloat16"))
    close(backward(functional, with_products(problem, "bfloat16")), want,
          "one bfloat16 step back", "gradients")


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@pytest.mark.parametrize("reverse", [False, True])
def test_many_steps_are_single_steps_in_a_row(precision, reverse, isa):
    problem = lstm_problem(6, 7, 9, 21, dtype="float32", peepholes=True, reverse=reverse)
    y, (h_n, c_n) = run(problem, precision)
    h, c = problem.inputs["h0"], problem.inputs["c0"]
    for t in range(6)[::-1 if reverse else 1]:
        step = lstm_problem(1, 7, 9, 21, dtype="float32", peepholes=True)
        step.inputs.update(problem.inputs, x=problem.inputs["x"][t:t + 1], h0=h, c0=c)
        y_t, (h, c) = run(step, precision)
        assert bits(y_t[0]) == bits(y[t])
    assert bits((h, c)) == bits((h_n, c_n))


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@pytest.mark.parametrize("P", [None, 11])
def test_a_stream_has_the_bits_of_the_batch(precision, P, isa):
    problem = lstm_problem(5, 3, 9, 21, dtype="float32", states=False, peepholes=True, P=P)
    inputs = problem.inputs
    step = Step("lstm", 3, inputs["W_ih"], inputs["W_hh"], inputs["b"], inputs["peepholes"],
                inputs["W_hr"], precision=precision)
    y, (h_n, c_n) = run(problem, precision)
    assert bits(np.stack([step(x_t) for x_t in inputs["x"]])) == bits(y)
    assert bits((step.h.copy(), step.c.copy())) == bits((h_n, c_n))


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_bfloat16_training_does_not_depend_on_threads(kind, plan, isa, share_small_work):
    problem = with_products(MAKE[kind](31, 11, 9, 70, dtype="float32", lengths="ragged"), "bfloat16")
    once = everything(problem, 1)
    for n_threads in (2, 3, 4):
        assert everything(problem, n_threads) == once, f"{n_threads} threads"


@pytest.mark.parametrize("compute", ["bfloat16", "int8"])
def test_threads_that_lower_their_rows_together(compute, isa):
    """Units in slabs, and so many rows that each thread lowers some for all; the last step has fewer."""
    if isa == "base":
        pytest.skip("the plan is the same, and 300 million lanes one by one take a minute")
    problem = lstm_problem(3, 40, 12, 800, dtype="float32", lengths=[3] * 37 + [2, 1, 0])
    lower = with_products(problem, compute)
    call = run if compute == "int8" else lambda problem, _, n_threads: everything(lower, n_threads)
    want = call(problem, compute, 1)
    for n_threads in 2, 3:
        got = call(problem, compute, n_threads)
        assert bits(got) == bits(want) if compute == "int8" else got == want


@pytest.mark.parametrize("shape", [(12, 13, 9, 70), (2, 120, 545, 544)])  # AMX fetches the latter ahead
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_a_row_does_not_depend_on_threads_or_on_its_batch(precision, shape, isa, share_small_work):
    problem = lstm_problem(*shape, dtype="float32", lengths="ragged", peepholes=True)
    y, (h_n, c_n) = run(problem, precision)
    for n_threads in (2, 3, 4):
        assert bits(run(problem, precision, n_threads)) == bits((y, (h_n, c_n)))
    for row in (0, 5, 12):
        y1, (h1, c1) = run(rows_of(problem, [row]), precision)
        assert bits((y1[:, 0], h1[0], c1[0])) == bits((y[:, row].copy(), h_n[row], c_n[row]))


def test_token_ids_look_up_a_table_of_floats(isa):
    V, H = 17, 21
    problem = lstm_problem(1, 3, V, H, dtype="float32")
    problem.inputs["x"] = functional.TokenIds(np.array([[16, 0, 5]]), V)
    inputs = problem.inputs
    a = (inputs["W_ih"].T + inputs["b"])[[16, 0, 5]]
    a = bfloat16_sums(inputs["h0"], inputs["W_hh"].T, a)
    got = run(problem, "bfloat16")
    with fused(isa):
        assert bits(got) == bits(forward(functional, from_sums(problem, a))[:2])
    table = Quantized.of(problem.inputs["W_ih"]).floats()
    W_hh = problem.inputs["W_hh"]
    got = run(problem, "int8")
    problem.inputs["W_ih"] = table
    again = Quantized.of(W_hh)
    packed = pack("lstm", table, W_hh, precision="int8", quantized=(None, again, None))
    want = functional.lstm_forward(**problem.inputs, keep_tape=False, packed=packed)[:2]
    np.testing.assert_allclose(got[0], want[0], rtol=0, atol=1e-6)


def test_a_dense_layer_in_int8_is_numpys_integers(isa):
    rng = np.random.default_rng(0)
    for n, K, J in ((1, 1, 1), (5, 33, 17), (194, 64, 40), (3, 70000, 2)):
        x, W = (rng.normal(size=shape).astype("float32") for shape in ((n, K), (J, K)))
        (q_x, scale_x), (q_w, scale_w) = quantize(x), quantize(W)
        sums = q_x.astype(np.int64) @ q_w.T.astype(np.int64)
        y = linear_forward(x, W, packed=pack("linear", W, precision="int8"))
        scales = (scale_x[:, None] * scale_w).astype("float32")
        want = np.float32(sums) * np.float64(scales)
        if K <= 65536:
            assert bits(y) == bits(want.astype("float32"))
        else:       # pieces of a sum, each added as float32
            np.testing.assert_allclose(y, want, rtol=0, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_the_bits_are_those_of_every_instruction_set(precision):
    rng = np.random.default_rng(1)
    x, W = (rng.normal(size=shape).astype("float32") for shape in ((9, 133), (41, 133)))
    before, seen = _kernels.isa(), set()
    try:
        for name in _kernels.available_isas():
            _kernels.use_isa(name)
            seen.add(linear_forward(x, W, packed=pack("linear", W, precision=precision)).tobytes())
    finally:
        _kernels.use_isa(before)
    assert len(seen) == 1


def test_a_dense_layer_in_bfloat16(isa):
    rng = np.random.default_rng(2)
    x, W, dy = (rng.normal(size=s).astype("float32") for s in ((300, 33), (17, 33), (300, 17)))
    y = linear_forward(x, W, compute="bfloat16")
    dx, dW, db = linear_backward(x, W, dy, compute="bfloat16")
    assert bits(y) == bits(bfloat16_sums(x, W.T))
    assert bits(dx) == bits(bfloat16_sums(dy, W))
    first = bfloat16_sums(dy[:256].T, x[:256])          # a gradient is cut into blocks of 256 rows
    assert bits(dW) == bits(first + bfloat16_sums(dy[256:].T, x[256:]))
    assert bits(db) == bits(linear_backward(x, W, dy).db)      # a sum, not a product


def test_the_largest_sums_of_int8_do_not_overflow(isa):
    """127² · 65,536 is 0.49 of 2³¹; a longer row is summed in pieces."""
    K = 3 * 65536 + 5
    x, W = np.ones((1, K), "float32"), np.ones((3, K), "float32")
    W[1] = -1
    y = linear_forward(x, W, packed=pack("linear", W, precision="int8"))
    np.testing.assert_allclose(y, [[K, -K, K]], rtol=1e-6)


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_are_not_lost(precision, bad, isa):
    problem = lstm_problem(1, 4, 9, 5, dtype="float32")
    problem.inputs["x"][0, 2, 3] = bad
    y, _ = run(problem, precision)
    assert np.isnan(y[0, 2]).any() or (precision == "bfloat16" and bad == np.inf)
    assert np.isfinite(np.delete(y[0], 2, axis=0)).all()


def test_quantized_weights_are_taken_as_they_are():
    problem = lstm_problem(3, 2, 9, 5, dtype="float32", states=False)
    W_ih, W_hh = problem.inputs["W_ih"], problem.inputs["W_hh"]
    given = [Quantized.of(W_ih), Quantized.of(W_hh), None]
    given[0] = Quantized(given[0].q, given[0].scale * 2)
    packed = pack("lstm", W_ih, W_hh, precision="int8", quantized=given)
    y = functional.lstm_forward(**problem.inputs, keep_tape=False, packed=packed)[0]
    doubled = pack("lstm", W2 := given[0].floats(), W_hh, precision="int8")
    problem.inputs["W_ih"] = W2
    assert bits(y) == bits(functional.lstm_forward(**problem.inputs, keep_tape=False,
                                                   packed=doubled)[0])
    with pytest.raises(ValueError, match=r"W_hh must be quantized as int8 \(20, 5\)"):
        pack("lstm", W_ih, W_hh, precision="int8", quantized=(None, given[0], None))
    few = Quantized(given[1].q, given[1].scale[:-1])
    with pytest.raises(ValueError, match=r"float32 scales \(20,\), got int8 \(20, 5\) with float32 \(19,\)"):
        pack("lstm", W_ih, W_hh, precision="int8", quantized=(None, few, None))


@pytest.mark.parametrize("call, said", [
    (lambda p: forward(functional, with_products(p, "int8")), "pack"),
    (lambda p: forward(functional, with_products(p, "half")), "'half'"),
    (lambda p: pack("lstm", p.inputs["W_ih"], p.inputs["W_hh"], precision="int4"), "'int4'"),
    (lambda p: functional.lstm_forward(**p.inputs, packed=packed_of(p, "int8")), "keep_tape"),
    (lambda p: run(p, "bfloat16", compute="float32"), "bfloat16"),
])
def test_what_formats_there_are_is_said(call, said):
    with pytest.raises(ValueError, match=said):
        call(lstm_problem(2, 2, 3, 4, dtype="float32"))


@pytest.mark.parametrize("call", [
    lambda p: forward(functional, with_products(p, "bfloat16")), lambda p: run(p, "int8"),
    lambda p: run(p, "bfloat16"), lambda p: forward(functional, with_products(p, "float32"))])
def test_float64_has_no_lower_format(call):
    with pytest.raises(TypeError, match="float32.*float64|float64.*float32"):
        call(lstm_problem(2, 2, 3, 4, dtype="float64"))
