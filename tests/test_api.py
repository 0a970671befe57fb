"""The public functions' contract: wrong arguments are named, legal ones work, none is written."""

import copy
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from problems import backward, forward, in_float64, lstm_problem, rnn_problem
from test_checks import Changing

import lstmcore
from lstmcore import dense, functional, reference

T, B, I, H = 4, 3, 5, 2
MAKE = {"lstm": lstm_problem, "rnn": rnn_problem}
both = pytest.mark.parametrize("kind", MAKE)


def problem_of(kind, **options):
    return MAKE[kind](T, B, I, H, dtype="float32", seed=20, **options)


def run_forward(kind, **changes):
    problem = problem_of(kind)
    return getattr(functional, kind + "_forward")(**{**problem.inputs, **changes})


def zeros(*shape, dtype="float32"):
    return np.zeros(shape, dtype)


# function, changed arguments, error, what its message must say
WRONG_FORWARD = [
    ("lstm", dict(W_hh=zeros(2, 8)), ValueError, "W_hh must be (4H, H), got (2, 8)"),
    ("lstm", dict(W_hh=zeros(8, 3)), ValueError, "W_hh must be (4H, H) = (8, 2), got (8, 3)"),
    ("lstm", dict(W_ih=zeros(5, 8)), ValueError, "W_ih must be (4H, I) = (8, 5), got (5, 8)"),
    ("lstm", dict(W_ih=zeros(8, 4)), ValueError, "W_ih must be (4H, I) = (8, 5), got (8, 4)"),
    ("lstm", dict(b=zeros(2)), ValueError, "b must be (4H,) = (8,), got (2,)"),
    ("lstm", dict(b=zeros(8, 1)), ValueError, "b must be (4H,) = (8,), got (8, 1)"),
    ("lstm", dict(h0=zeros(2, 3)), ValueError, "h0 must be (B, H) = (3, 2), got (2, 3)"),
    ("lstm", dict(c0=zeros(1, 3, 2)), ValueError, "c0 must be (B, H) = (3, 2), got (1, 3, 2)"),
    ("lstm", dict(peepholes=zeros(2, 3)), ValueError, "peepholes must be (3, H) = (3, 2), got (2, 3)"),
    ("lstm", dict(W_hr=zeros(3, 4)), ValueError, "W_hr must be a (P, H) = (P, 2) array, got (3, 4)"),
    ("lstm", dict(x=zeros(4, 5)), ValueError, "x must be (T, B, I), got shape (4, 5)"),
    ("lstm", dict(x=zeros(4, 3, 0)), ValueError, "I >= 1"),
    ("lstm", dict(x=zeros(4, 3, 5, dtype="float16")), TypeError,
     "x must be float32 or float64, got float16"),
    ("lstm", dict(x=zeros(4, 3, 5, dtype="complex64")), TypeError, "got complex64"),
    ("lstm", dict(x=zeros(4, 3, 5, dtype=">f4")), TypeError, "x must be float32 or float64, got >f4"),
    ("lstm", dict(x=[[[0.5] * 5] * 3]), TypeError, "x must be a NumPy array, got builtins.list"),
    ("lstm", dict(W_hh=None), TypeError, "W_hh must be a NumPy array, got builtins.NoneType"),
    ("lstm", dict(W_ih=zeros(8, 5, dtype="float64")), TypeError,
     "W_ih must be float32 like the other arrays, got float64"),
    ("lstm", dict(b=zeros(8, dtype="int32")), TypeError,
     "b must be float32 like the other arrays, got int32"),
    ("lstm", dict(h0=zeros(3, 2, dtype="float64")), TypeError, "h0 must be float32 like the other arrays"),
    ("lstm", dict(lengths=[1, 2]), ValueError, "lengths must be (B,) = (3,), got (2,)"),
    ("lstm", dict(lengths=[1, 2, 5]), ValueError, "lengths must be in 0..T = 0..4, got 1..5"),
    ("lstm", dict(lengths=[1, -2, 4]), ValueError, "lengths must be in 0..T = 0..4, got -2..4"),
    ("lstm", dict(lengths=[1.0, 2.0, 3.0]), TypeError, "lengths must be integers, got float64"),
    ("lstm", dict(lengths=[True, True, False]), TypeError, "lengths must be integers, got bool"),
    ("lstm", dict(n_threads=10**12), ValueError, "n_threads must be in 1..1024, got 1000000000000"),
    ("lstm", dict(x=np.ma.masked_invalid(zeros(4, 3, 2))), TypeError, "x must be an array without a mask"),
    ("lstm", dict(n_threads=0), ValueError, "n_threads must be in 1..1024, got 0"),
    ("lstm", dict(n_threads=1.5), TypeError, "n_threads must be an int >= 1, got 1.5"),
    ("lstm", dict(n_threads=True), TypeError, "n_threads must be an int >= 1, got True"),
    ("rnn", dict(W_hh=zeros(2, 3)), ValueError, "W_hh must be (H, H) = (2, 2), got (2, 3)"),
    ("rnn", dict(W_ih=zeros(5, 2)), ValueError, "W_ih must be (H, I) = (2, 5), got (5, 2)"),
    ("rnn", dict(b=zeros(8)), ValueError, "b must be (H,) = (2,), got (8,)"),
    ("rnn", dict(h0=zeros(2, 3)), ValueError, "h0 must be (B, H) = (3, 2), got (2, 3)"),
    ("rnn", dict(lengths=[5, 5, 5]), ValueError, "lengths must be in 0..T = 0..4, got 5..5"),
    ("rnn", dict(nonlinearity="sigmoid"), ValueError,
     "nonlinearity must be \"tanh\" or \"relu\", got 'sigmoid'"),
]
WRONG_BACKWARD = [
    ("lstm", dict(dy=zeros(4, 2, 3)), ValueError, "dy must be (T, B, H) = (4, 3, 2), got (4, 2, 3)"),
    ("lstm", dict(dy=zeros(4, 3, 2, dtype="float64")), TypeError, "dy must be float32 like the other arrays"),
    ("lstm", dict(dy=None), TypeError, "dy must be a NumPy array, got builtins.NoneType"),
    ("lstm", dict(dh_n=zeros(2, 3)), ValueError, "dh_n must be (B, H) = (3, 2), got (2, 3)"),
    ("lstm", dict(dc_n=zeros(3, 1)), ValueError, "dc_n must be (B, H) = (3, 2), got (3, 1)"),
    ("lstm", dict(n_threads=-1), ValueError, "n_threads must be in 1..1024, got -1"),
    ("rnn", dict(dy=zeros(3, 4, 2)), ValueError, "dy must be (T, B, H) = (4, 3, 2), got (3, 4, 2)"),
    ("rnn", dict(dh_n=zeros(3, 2, dtype="float64")), TypeError, "dh_n must be float32 like the other arrays"),
]


def names(cases):
    return [f"{kind} {next(iter(changes))} {n}" for n, (kind, changes, _, _) in enumerate(cases)]


@pytest.mark.parametrize("kind, changes, error, message", WRONG_FORWARD, ids=names(WRONG_FORWARD))
def test_wrong_argument_of_forward_is_named(kind, changes, error, message):
    with pytest.raises(error) as caught:
        run_forward(kind, **changes)
    assert message in str(caught.value)


@pytest.mark.parametrize("kind, changes, error, message", WRONG_BACKWARD, ids=names(WRONG_BACKWARD))
def test_wrong_argument_of_backward_is_named(kind, changes, error, message):
    problem = problem_of(kind)
    tape = forward(functional, problem)[-1]
    arguments = {**problem.upstream, **changes}
    with pytest.raises(error) as caught:
        getattr(functional, kind + "_backward")(tape, **arguments)
    assert message in str(caught.value)


def test_sizes_of_a_projection_are_named():
    problem = problem_of("lstm", P=3)
    with pytest.raises(ValueError, match=r"W_hh must be \(4H, P\) = \(8, 3\), got \(8, 2\)"):
        functional.lstm_forward(**{**problem.inputs, "W_hh": zeros(8, 2)})
    with pytest.raises(ValueError, match=r"h0 must be \(B, P\) = \(3, 3\), got \(3, 2\)"):
        functional.lstm_forward(**{**problem.inputs, "h0": zeros(3, 2)})


@both
@pytest.mark.parametrize("tape", [None, "tape", (1, 2)], ids=repr)
def test_what_is_no_tape_is_refused(kind, tape):
    with pytest.raises(TypeError, match=f"tape must be one of {kind}_forward, got "):
        getattr(functional, kind + "_backward")(tape, zeros(T, B, H))


def test_tape_of_the_other_kind_is_refused():
    tapes = {kind: forward(functional, problem_of(kind))[-1] for kind in MAKE}
    with pytest.raises(TypeError, match="tape must be one of lstm_forward, got RNNTape"):
        functional.lstm_backward(tapes["rnn"], zeros(T, B, H))
    with pytest.raises(TypeError, match="tape must be one of rnn_forward, got Tape"):
        functional.rnn_backward(tapes["lstm"], zeros(T, B, H))


def test_tape_can_be_used_once():
    problem = problem_of("lstm")
    tape = forward(functional, problem)[-1]
    functional.lstm_backward(tape, **problem.upstream)
    with pytest.raises(ValueError, match="this tape was used by an earlier backward pass"):
        functional.lstm_backward(tape, **problem.upstream)
    with pytest.raises(ValueError, match="run the forward pass again"):
        tape.gates


def test_arrays_of_other_libraries_are_named():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="x must be a NumPy array, got torch.Tensor"):
        run_forward("lstm", x=torch.zeros(T, B, I))


# ---- legal, and as good as any other -----------------------------------------------------------------

def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def strided(array):
    """The same numbers in every second place of a larger array of nan."""
    wide = np.full([2 * n for n in array.shape], np.nan, array.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in array.shape)]
    view[...] = array
    return view


def unaligned(array):
    view = np.zeros(array.nbytes + 1, "u1")[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


LAYOUTS = {"read-only": read_only, "Fortran": np.asfortranarray, "strided": strided,
           "backwards": lambda array: array[::-1].copy()[::-1], "unaligned": unaligned}


def results(problem):
    """Everything that the public functions return for a problem, as a flat list of arrays."""
    y, state, _ = forward(functional, problem)
    flat = [y, *(state if problem.kind == "lstm" else [state]), *backward(functional, problem)]
    return [array for array in flat if array is not None]


@both
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout_is_accepted(kind, layout):
    problem, other = problem_of(kind, lengths="ragged"), problem_of(kind, lengths="ragged")
    for part in (other.inputs, other.upstream):
        part.update({n: LAYOUTS[layout](a) for n, a in part.items() if a is not None})
    for got, want in zip(results(other), results(problem), strict=True):
        assert np.array_equal(got, want)


@both
def test_nothing_given_is_written(kind):
    problem = MAKE[kind](T, B, I, 9, lengths="ragged", seed=21,
                         **({"peepholes": True, "P": 3} if kind == "lstm" else {}))
    given = [a for part in (problem.inputs, problem.upstream) for a in part.values() if a is not None]
    given.append(problem.options["lengths"])
    before = [a.copy() for a in given]
    results(problem)
    assert all(np.array_equal(a, b) for a, b in zip(given, before))


@both
def test_no_result_shares_memory_with_an_argument_or_another_result(kind):
    problem = problem_of(kind)
    given = [a for part in (problem.inputs, problem.upstream) for a in part.values() if a is not None]
    found = results(problem)
    for n, array in enumerate(found):
        assert not any(np.shares_memory(array, other) for other in given + found[:n])


@both
def test_results_of_subclasses_are_plain_arrays(kind):
    class Subclass(np.ndarray):
        pass

    problem = problem_of(kind)
    for part in problem.inputs, problem.upstream:
        part.update({name: None if a is None else a.view(Subclass) for name, a in part.items()})
    assert {type(array) for array in results(problem)} == {np.ndarray}


@both
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_results_have_the_dtype_of_the_arguments(kind, dtype):
    problem = MAKE[kind](T, B, I, H, dtype=dtype, seed=22)
    assert {str(array.dtype) for array in results(problem)} == {dtype}


@both
@pytest.mark.parametrize("T, B", [(0, 3), (4, 0), (0, 0)])
@pytest.mark.parametrize("lengths", [None, "ragged"])
def test_no_steps_and_no_rows_are_legal(kind, T, B, lengths, close):
    problem = MAKE[kind](T, B, I, H, lengths=lengths, seed=23)
    close(forward(functional, problem)[:2], forward(reference, problem)[:2], "kernel")
    close(backward(functional, problem), backward(reference, problem), "kernel")


@both
def test_all_lengths_zero_returns_the_states(kind, close):
    problem = MAKE[kind](T, B, I, H, lengths=np.zeros(B, int), seed=24)
    y, state, _ = forward(functional, problem)
    assert not y.any()
    want = [problem.inputs[n] for n in ("h0", "c0") if n in problem.inputs]
    assert all(np.array_equal(a, b) for a, b in zip(state if kind == "lstm" else [state], want))
    close(backward(functional, problem), backward(reference, problem), "kernel")


@pytest.mark.parametrize("lengths", [[2, 0, 4], (2, 0, 4), np.array([2, 0, 4], "u1"),
                                     np.array([2, 9, 0, 9, 4, 9])[::2]],
                         ids=["list", "tuple", "uint8", "strided"])
def test_lengths_are_any_integers(lengths):
    problem = problem_of("lstm", lengths=np.array([2, 0, 4]))
    want = results(problem)
    problem.options["lengths"] = lengths
    assert all(np.array_equal(a, b) for a, b in zip(results(problem), want))


def test_lengths_may_be_an_empty_list_of_an_empty_batch():
    y, _, _ = run_forward("lstm", x=zeros(T, 0, I), h0=None, c0=None, lengths=[])
    assert y.shape == (T, 0, H)


# ---- what a call keeps for a later one ---------------------------------------------------------------

COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy,
          "pickle": lambda a: pickle.loads(pickle.dumps(a))}
copies = pytest.mark.parametrize("copied", COPIES)


@both
@copies
def test_a_copied_tape_gives_the_same_gradients(kind, copied):
    problem = problem_of(kind, lengths="ragged")
    tape = COPIES[copied](forward(functional, problem)[-1])
    got = getattr(functional, kind + "_backward")(tape, **problem.upstream)
    for g, want in zip(got, backward(functional, problem), strict=True):
        assert np.array_equal(g, want) if want is not None else g is None


@both
@copies
def test_a_copied_tape_still_wants_its_dtype(kind, copied):
    problem = MAKE[kind](T, B, I, H, dtype="float64", seed=20)
    tape = COPIES[copied](forward(functional, problem)[-1])
    dy = problem.upstream["dy"].astype("float32")
    with pytest.raises(TypeError, match="dy must be float64 like the other arrays, got float32"):
        getattr(functional, kind + "_backward")(tape, dy)


@pytest.mark.parametrize("name, value", [("lengths", 10**9), ("lengths", -1), ("order", 10**9),
                                         ("order", 0)])
def test_a_tape_whose_lengths_were_changed_is_refused(name, value):
    problem = problem_of("lstm", lengths="ragged")
    tape = forward(functional, problem)[-1]
    getattr(tape.batch, name)[-1:] = value
    getattr(tape.batch, name)[:1] = value
    with pytest.raises(ValueError, match="must"):
        functional.lstm_backward(tape, **problem.upstream)


TAPED = "x W_ih W_hh peepholes W_hr h0 c0 y raw_gates raw_c".split()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", TAPED)
def test_a_tape_whose_arrays_were_changed_is_refused(name):
    problem = problem_of("lstm", P=3, peepholes=True)
    y, _, tape = forward(functional, problem)
    array = {**problem.inputs, "y": y, "raw_gates": tape.raw_gates, "raw_c": tape.raw_c}[name]
    array.shape = array.size, 1
    with pytest.raises(ValueError, match=f"{name} of the tape must be as in the forward pass"):
        functional.lstm_backward(tape, **problem.upstream)


def test_gates_of_a_tape_must_be_writable_and_alone():
    problem = problem_of("lstm")
    tape = forward(functional, problem)[-1]
    tape.raw_gates.flags.writeable = False
    with pytest.raises(ValueError, match="raw_gates of the tape must be writable"):
        functional.lstm_backward(tape, **problem.upstream)
    inputs = {k: a for k, a in problem.inputs.items() if k != "b"}
    both = zeros(T * B * 5 * H)
    gates, c = both[:T * B * 4 * H].reshape(-1, 4 * H), both[-1 - T * B * H:-1].reshape(-1, H)
    with pytest.raises(ValueError, match="raw_gates must not share memory with the other arguments"):
        functional.tape_from(**inputs, y=tape.y, raw_gates=gates, raw_c=c)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["y", "raw_c"])
def test_a_stored_tape_may_lie_anyhow_in_memory(name, layout):
    problem = problem_of("lstm", lengths="ragged")
    names = "x W_ih W_hh peepholes W_hr h0 c0 lengths reverse".split()
    tape = forward(functional, problem)[-1]
    stored = dict(y=tape.y, raw_gates=tape.raw_gates, raw_c=tape.raw_c)
    stored.update({k: a for k, a in {**problem.inputs, **problem.options}.items() if k in names})
    stored[name] = LAYOUTS[layout](stored[name])
    got = functional.lstm_backward(functional.tape_from(**stored), **problem.upstream)
    for g, want in zip(got, backward(functional, problem), strict=True):
        assert np.array_equal(g, want) if want is not None else g is None


@pytest.mark.parametrize("lengths", [None, "ragged"])
@pytest.mark.parametrize("cell", ["gru", "gru_before", "tanh", "relu"])
def test_a_stored_tape_of_every_cell_gives_its_gradients(cell, lengths):
    rng, row = np.random.default_rng(0), functional.cell_row(cell)
    arrays = dict(x=rng.standard_normal((T, B, I)), W_ih=rng.standard_normal((row.fed * H, I)),
                  W_hh=rng.standard_normal((row.fed * H, H)), h0=rng.standard_normal((B, H)),
                  lengths=lengths and np.arange(B) % (T + 1))
    kind, options = "rnn", dict(nonlinearity=cell)
    if "gru" in cell:
        kind, options = "gru", dict(reset_after=cell == "gru")
    backward = getattr(functional, f"{kind}_backward")
    y, _, tape = getattr(functional, f"{kind}_forward")(**arrays, **options)
    dy, gates = rng.standard_normal(y.shape), getattr(tape, "raw_gates", None)
    stored = functional.tape_from(cell, **arrays, y=y,
                                  raw_gates=None if gates is None else gates.copy())
    assert type(stored) is type(tape)
    for g, want in zip(backward(stored, dy), backward(tape, dy), strict=True):
        assert np.array_equal(g, want)
    wrong = np.zeros(1) if gates is None else None
    with pytest.raises(TypeError, match=f"raw_gates must be .* for a {cell} cell, got "):
        functional.tape_from(cell, **arrays, y=y, raw_gates=wrong)
    with pytest.raises(TypeError, match=f"raw_c must be None for a {cell} cell, got ndarray"):
        functional.tape_from(cell, **arrays, y=y, raw_gates=gates, raw_c=np.zeros(1))


@copies
def test_token_ids_stay_as_they_were_checked(copied):
    ids = COPIES[copied](functional.TokenIds(np.array([[3, 1], [3, 0]]), 4))
    assert ids.size == 4 and ids.array.tolist() == [[3, 1], [3, 0]]
    with pytest.raises(ValueError, match="read-only"):
        ids.array[0, 0] = 10**9
    with pytest.raises(ValueError, match="WRITEABLE"):
        ids.array.flags.writeable = True


def test_token_ids_are_what_was_checked():
    ids = functional.TokenIds(Changing([[0, 2]], [[9, 9]]), 3)
    assert ids.array.tolist() == [[0, 2]]
    with pytest.raises(ValueError, match="token ids must be of I = 5 tokens, got of 3"):
        run_forward("lstm", x=ids, h0=None, c0=None)


# What becomes of an array that packed weights are of. NumPy lets its owner say it anew.
REMADE = {
    "equal": lambda W: {},
    "another dtype": lambda W: dict(dtype=np.dtype("int32")),
    "other strides": lambda W: dict(strides=(W.itemsize, W.itemsize * len(W))),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("remade", REMADE)
@pytest.mark.parametrize("name", ["W_ih", "W_hh", "W_hr"])
def test_packed_of_other_weights_is_refused(name, remade):
    inputs = problem_of("lstm", P=3).inputs
    packed = functional.pack("lstm", inputs["W_ih"], inputs["W_hh"], inputs["W_hr"])
    functional.lstm_forward(**inputs, packed=packed)
    changes = REMADE[remade](inputs[name])
    for attribute, value in changes.items():
        setattr(inputs[name], attribute, value)
    if not changes:
        inputs[name] = inputs[name].copy()
    with pytest.raises(ValueError, match=f"packed must be of functional.pack with the {name} of"):
        functional.lstm_forward(**inputs, packed=packed)


def test_packed_of_another_cell_is_refused():
    inputs = problem_of("rnn").inputs
    packed = functional.pack("relu", inputs["W_ih"], inputs["W_hh"])
    with pytest.raises(ValueError, match="packed must be of a tanh cell's weights, got of relu"):
        functional.rnn_forward(**inputs, packed=packed)
    W = zeros(4, I)
    packed = functional.pack("linear", W)
    with pytest.raises(ValueError, match="packed must be of functional.pack with the W_ih of"):
        dense.linear_forward(zeros(B, I), W.copy(), packed=packed)


@both
@copies
def test_a_copied_step_goes_on_by_itself(kind, copied):
    inputs = {name: a for name, a in problem_of(kind).inputs.items() if name not in ("x", "h0", "c0")}
    x = problem_of(kind).inputs["x"]
    step = functional.Step("lstm" if kind == "lstm" else "relu", B, **inputs)
    step(x[0])
    other = COPIES[copied](step)
    assert np.array_equal(other(x[1]), step(x[1])) and not np.shares_memory(other.h, step.h)
    other(x[2])
    assert not np.array_equal(other.h, step.h)


@copies
def test_a_copied_step_still_wants_its_dtype(copied):
    inputs = lstm_problem(T, B, I, H, dtype="float64").inputs
    step = COPIES[copied](functional.Step("lstm", B, inputs["W_ih"], inputs["W_hh"]))
    with pytest.raises(TypeError, match="x_t must be float64 like the other arrays, got float32"):
        step(zeros(B, I))


def test_a_step_keeps_the_weights_that_it_was_made_with():
    inputs = problem_of("lstm", P=3, peepholes=True).inputs
    x, _, _ = (inputs.pop(name) for name in ("x", "h0", "c0"))
    step, ids = functional.Step("lstm", B, **inputs), np.array([4, 0, 2])
    other = copy.deepcopy(step)
    for W in inputs.values():
        W.fill(0.5)
    for now in x[0], ids, x[1]:
        assert np.array_equal(step(now), other(now))


def test_a_step_writes_where_it_may():
    inputs = problem_of("lstm").inputs
    step, x = functional.Step("lstm", B, inputs["W_ih"], inputs["W_hh"]), inputs["x"][0]
    for state in step.h, step.c:
        with pytest.raises(ValueError, match="out must not be the state"):
            step(x, out=state)
    with pytest.raises(ValueError, match="out must be a writable C-contiguous float32 array"):
        step(x, out=read_only(zeros(B, H)))
    assert not step.h.any() and not step.c.any()


def test_a_step_runs_in_one_thread_at_a_time():
    rng, refused = np.random.default_rng(0), []
    W_ih, W_hh = (rng.standard_normal((2000, n)).astype("float32") for n in (300, 500))
    step, x = functional.Step("lstm", 8, W_ih, W_hh, n_threads=1), zeros(8, 300)
    end = time.monotonic() + 60                   # until the threads meet: a busy machine may wait

    def call():
        while not refused and time.monotonic() < end:
            try:
                step(x)
            except RuntimeError as error:
                refused.append(str(error))

    both = [threading.Thread(target=call) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert refused and all("this step is running in another thread" in said for said in refused)


def test_the_state_of_a_step_cannot_be_resized():
    inputs = problem_of("lstm").inputs
    step = functional.Step("lstm", B, inputs["W_ih"], inputs["W_hh"])
    for state in step.h, step.c:
        with pytest.raises(ValueError, match="resize"):
            state.resize((10**6,), refcheck=False)


@both
@pytest.mark.parametrize("T", [0, 4])
def test_n_threads_is_checked_even_where_there_is_nothing_to_do(kind, T):
    problem = MAKE[kind](T, B, I, H)
    with pytest.raises(TypeError, match="n_threads must be an int >= 1, got 2.0"):
        forward(functional, problem, n_threads=2.0)
    tape = forward(functional, problem)[-1]
    with pytest.raises(TypeError, match="n_threads must be an int >= 1, got 2.0"):
        getattr(functional, kind + "_backward")(tape, **problem.upstream, n_threads=2.0)
    getattr(functional, kind + "_backward")(tape, **problem.upstream)


@pytest.mark.parametrize("n", [0, 4])
def test_n_threads_of_dense_layers_is_checked(n):
    x, W = zeros(n, 3), zeros(2, 3)
    for call in (lambda: dense.linear_forward(x, W, n_threads=0),
                 lambda: dense.linear_cross_entropy(x, W, None, np.zeros(n, int), zeros(n),
                                                    n_threads=0),
                 lambda: dense.linear_backward(x, W, zeros(n, 2), n_threads=0),
                 lambda: dense.cross_entropy(x, np.zeros(n, int), zeros(n), zeros(n, 3), n_threads=0)):
        with pytest.raises(ValueError, match="n_threads must be in 1..1024, got 0"):
            call()


def test_dlogits_may_not_lie_in_the_targets():
    memory = np.zeros(4)
    with pytest.raises(ValueError, match="dlogits must not share memory with the other arguments"):
        dense.cross_entropy(np.zeros((2, 2)), memory.view("int64")[:2], np.ones(2),
                            memory.reshape(2, 2))


@pytest.mark.parametrize("cell", [None, 3, b"lstm"])
def test_a_cell_is_named_by_a_string(cell):
    W = np.ones((8, 2))
    for make in functional.pack, lambda cell, *W: functional.Step(cell, 1, *W):
        with pytest.raises(TypeError, match="cell must be a name, got"):
            make(cell, W, W)


@pytest.mark.parametrize("n, O", [(0, 2), (6, 0), (0, 0)])
def test_gradients_of_an_empty_dense_layer_are_zero(n, O, monkeypatch):
    monkeypatch.setattr(dense, "empty", lambda shape, dtype: np.full(shape, np.nan, dtype))
    g = dense.linear_backward(zeros(n, 3), zeros(O, 3), zeros(n, O))
    assert [d.shape for d in g] == [(n, 3), (O, 3), (O,)] and not any(d.any() for d in g)
    assert dense.linear_backward(zeros(n, 3), zeros(O, 3), zeros(n, O), need_dx=False).dx is None


def test_a_parameter_that_is_no_array_is_named():
    a = [np.ones(()) for _ in range(3)]
    with pytest.raises(TypeError, match="p must be a NumPy array, got float"):
        dense.adam_step(1.0, *a, betas=(0.9, 0.9), rate=0.1, eps=0.1)


@pytest.mark.parametrize("B", [0, 3])
def test_lengths_that_are_no_numbers_are_named(B):
    with pytest.raises(TypeError, match="lengths must be integers, got <U1"):
        functional.lstm_forward(zeros(T, B, I), zeros(8, I), zeros(8, 2), lengths="x")


def test_public_names_are_the_functions():
    for name in ("lstm_forward", "lstm_backward", "rnn_forward", "rnn_backward"):
        assert getattr(lstmcore, name) is getattr(functional, name)
        assert name in dir(lstmcore)


def test_the_package_can_be_looked_at_without_its_extras():
    code, said = python("""
import sys
sys.modules |= dict.fromkeys(("sklearn", "torch"))
import inspect
import lstmcore
from lstmcore import *
assert "LSTM" in dir() and "LSTMClassifier" not in dir() and "torch" not in dir(lstmcore)
assert "keras" not in dir(lstmcore)     # importing it may want a backend that is not there
assert dict(inspect.getmembers(lstmcore))["gradflow"].compare
""")
    assert code == 0, said


def test_tape_views_are_the_reference_tape(close):
    """gates and c as (T, B, .) arrays: dense they are views, ragged they are zero past the end."""
    for lengths in (None, "ragged"):
        problem = problem_of("lstm", lengths=lengths)
        tape, want = (forward(m, p)[-1] for m, p in
                      ((functional, problem), (reference, in_float64(problem))))
        close(tape.gates, want.gates, "kernel", "gates")
        close(tape.c, want.c, "kernel", "c")
        assert np.shares_memory(tape.gates, tape.gates) == (lengths is None)


# ---- the process ---------------------------------------------------------------------------------------

def python(code, **environment):
    """Runs code in a new process, with the lstmcore of this one: its exit code and what it said."""
    environment["PYTHONPATH"] = str(Path(lstmcore.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          cwd=Path(__file__).parent, env={**os.environ, **environment})
    return done.returncode, done.stdout + done.stderr


def test_unavailable_instruction_set_lists_the_available():
    code, said = python("import lstmcore; lstmcore.info()", LSTMCORE_ISA="mmx")
    available = ", ".join(lstmcore.info()["available_isas"])
    assert code and "ValueError" in said and "mmx" in said and f"one of {available}" in said


def test_instruction_set_is_forced_by_the_environment(isa):
    code, said = python("import lstmcore; print(lstmcore.info()['isa'])", LSTMCORE_ISA=isa)
    assert code == 0 and said.strip() == isa


def test_import_leaves_the_floating_point_state_alone():
    """No flush to zero, no denormals-are-zero, no other rounding: here and in a kernel's wake."""
    code, said = python("""
import numpy as np
def state():
    tiny, one = np.array([1e-40, 3e-39], 'f4'), np.ones(2)
    return [(tiny * np.float32(0.5)).tobytes(), (tiny + tiny).tobytes(),
            (np.array([5e-324]) * 3).tobytes(), (one / 3).tobytes(), (-one / 3).tobytes()]
before = state()
import lstmcore
import lstmcore.functional
assert state() == before, 'import'
x, W_ih, W_hh = np.ones((3, 40, 30), 'f4'), np.ones((160, 30), 'f4'), np.ones((160, 40), 'f4')
y, _, tape = lstmcore.lstm_forward(x, W_ih, W_hh, n_threads=2)
lstmcore.lstm_backward(tape, y)
assert state() == before, 'call'
""")
    assert code == 0, said


def test_import_is_cheap():
    """`import lstmcore` alone loads neither NumPy nor what only some users have."""
    code, said = python("import sys, lstmcore; print(sorted({m.split('.')[0] for m in sys.modules}))")
    assert code == 0
    for heavy in ("numpy", "scipy", "torch", "sklearn", "matplotlib", "h5py", "onnx", "tqdm"):
        assert f"'{heavy}'" not in said, heavy


def test_no_framework_is_loaded_by_the_kernels():
    code, said = python("""
import sys, numpy as np, lstmcore
lstmcore.lstm_forward(np.ones((2, 3, 4)), np.ones((20, 4)), np.ones((20, 5)))
print(sorted({m.split('.')[0] for m in sys.modules}))""")
    assert code == 0
    for heavy in ("torch", "sklearn", "matplotlib", "h5py", "onnx"):
        assert f"'{heavy}'" not in said, heavy
