"""The same bits: for every number of threads, in every run, and whatever else is in the batch."""

import dataclasses

import numpy as np
import pytest
from problems import backward, forward, gru_problem, lstm_problem, rnn_problem

from lstmcore import _kernels, functional

MAKE = {"lstm": lstm_problem, "gru": gru_problem, "rnn": rnn_problem}
BY_ROW = {"x": 1, "dy": 1, "h0": 0, "c0": 0, "dh_n": 0, "dc_n": 0}  # name: the axis of the batch

# More than 256 tokens, so that the sums over time are cut; H beyond one panel of every width.
CASES = {
    "lstm": ("lstm", dict(T=31, B=11, I=9, H=70)),
    "lstm float64": ("lstm", dict(T=31, B=11, I=9, H=35, dtype="float64")),
    "peepholes": ("lstm", dict(T=9, B=14, I=5, H=33, peepholes=True)),
    "ragged": ("lstm", dict(T=40, B=13, I=9, H=35, lengths="ragged")),
    "ragged reverse": ("lstm", dict(T=12, B=13, I=9, H=35, lengths="ragged", reverse=True)),
    "projected": ("lstm", dict(T=9, B=14, I=5, H=70, P=19)),
    "everything": ("lstm", dict(T=9, B=14, I=5, H=70, P=36, peepholes=True, lengths="ragged",
                                reverse=True)),
    "variant": ("lstm", dict(T=31, B=11, I=9, H=70, variant="all")),
    "variant, ragged": ("lstm", dict(T=12, B=13, I=9, H=35, lengths="ragged", variant="recurrent dropout")),
    "layer norm": ("lstm", dict(T=31, B=11, I=9, H=70, norms=10)),
    "layer norm, ragged": ("lstm", dict(T=12, B=13, I=9, H=35, norms=10, lengths="ragged")),
    "layer norm of gates": ("lstm", dict(T=31, B=11, I=9, H=70, norms=6)),
    "layer norm of gates, ragged": ("lstm", dict(T=12, B=13, I=9, H=35, norms=6, lengths="ragged")),
    "few rows": ("lstm", dict(T=9, B=2, I=5, H=130)),
    "gru": ("gru", dict(T=31, B=11, I=9, H=70)),
    "gru before, ragged": ("gru", dict(T=12, B=13, I=9, H=70, reset_after=False, lengths="ragged")),
    "rnn": ("rnn", dict(T=31, B=11, I=9, H=70)),
    "rnn ragged relu": ("rnn", dict(T=12, B=13, I=9, H=35, lengths="ragged", nonlinearity="relu")),
}
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(autouse=True)
def use_all_threads(share_small_work):
    pass


def problem_of(case):
    kind, sizes = CASES[case]
    return MAKE[kind](**{"dtype": "float32", "seed": 11, **sizes})


def bits(result):
    """A result, tuples and all, as bytes."""
    if isinstance(result, tuple):
        return [bits(part) for part in result]
    return None if result is None else result.tobytes()


def everything(problem, n_threads):
    """The bits of the outputs, the tape and all the gradients."""
    y, state, tape = forward(functional, problem, n_threads=n_threads)
    saved = {"lstm": ("gates", "c"), "gru": ("gates",), "rnn": ()}[problem.kind]
    saved = tuple(getattr(tape, name) for name in saved)
    return bits((y, state, saved, backward(functional, problem, n_threads=n_threads)))


@every_case
def test_bits_do_not_depend_on_threads_or_run(case, plan, isa):
    problem = problem_of(case)
    once = everything(problem, 1)
    for n_threads in (1, 2, 3, 4, 2):
        assert everything(problem, n_threads) == once, f"{n_threads} threads"


def rows_of(problem, rows):
    """The problem with some of its rows only."""
    def pick(name, array):
        return np.take(array, rows, BY_ROW[name]) if name in BY_ROW else array

    parts = {part: {name: pick(name, array) for name, array in getattr(problem, part).items()}
             for part in ("inputs", "upstream")}
    lengths = problem.options["lengths"]
    options = {**problem.options, "lengths": lengths if lengths is None else lengths[rows]}
    if (variant := options.get("variant")) is not None:
        masks = {name: np.take(mask, rows, axis) for name, axis in (("h_mask", 0), ("zone_masks", 1))
                 if (mask := getattr(variant, name)) is not None}
        options["variant"] = dataclasses.replace(variant, **masks)
    return type(problem)(kind=problem.kind, options=options, **parts)


def by_row(problem, n_threads=1):
    """What belongs to single rows: y and dx (T, B, .), states and their gradients (B, .)."""
    y, state, _ = forward(functional, problem, n_threads=n_threads)
    g = backward(functional, problem, n_threads=n_threads)
    states = [*state, g.dh0, g.dc0] if problem.kind == "lstm" else [state, g.dh0]
    return [y, g.dx], states


@every_case
@pytest.mark.parametrize("parts", [2, 3, "ones", "mixed"])
def test_bits_of_a_row_do_not_depend_on_the_batch(case, parts, plan, isa):
    problem = problem_of(case)
    B = problem.inputs["x"].shape[1]
    if parts == "mixed":
        splits = np.array_split(np.random.default_rng(12).permutation(B), 2)
    else:
        splits = np.array_split(np.arange(B), B if parts == "ones" else parts)
    sequences, states = by_row(problem, n_threads=2)
    for rows in splits:
        got_sequences, got_states = by_row(rows_of(problem, rows))
        for want, got in zip(sequences, got_sequences):
            assert np.array_equal(got, want[:, rows])
        for want, got in zip(states, got_states):
            assert np.array_equal(got, want[rows])


@pytest.mark.parametrize("case", ["ragged", "ragged reverse", "everything", "variant"])
def test_inputs_multiplied_ahead_or_in_the_step_give_the_same_bits(case, isa, monkeypatch):
    found = []
    for plan in "tiles", "fused":
        monkeypatch.setattr(_kernels, "plan", plan)
        y, state, tape = forward(functional, problem_of(case))
        assert _kernels.last_plan[0] == plan
        found.append([y, *state, tape.gates, tape.c])
    assert all(np.array_equal(one, two) for one, two in zip(*found))


def test_bits_of_a_row_are_those_of_the_row_alone_in_a_large_batch(isa):
    """With the plan that is chosen for 40 rows and that for one."""
    problem = lstm_problem(6, 40, 9, 20, dtype="float32", seed=14)
    (y, dx), _ = by_row(problem)
    (y_alone, dx_alone), _ = by_row(rows_of(problem, np.array([11])))
    assert np.array_equal(y_alone, y[:, 11:12]) and np.array_equal(dx_alone, dx[:, 11:12])


@pytest.mark.parametrize("case", ["ragged", "ragged reverse", "everything", "rnn ragged relu"])
def test_bits_of_a_ragged_row_are_those_of_the_row_alone(case, plan, isa):
    """Cut to its length, without lengths: the ragged batch is only a way to run many at once."""
    problem = problem_of(case)
    (y, dx), states = by_row(problem)
    for r, n in enumerate(problem.options["lengths"]):
        alone = rows_of(problem, np.array([r]))
        alone.options = {**alone.options, "lengths": None}
        alone.inputs["x"], alone.upstream["dy"] = alone.inputs["x"][:n], alone.upstream["dy"][:n]
        (y_1, dx_1), states_1 = by_row(alone)
        assert np.array_equal(y[:n, r:r + 1], y_1) and not y[n:, r].any()
        assert np.array_equal(dx[:n, r:r + 1], dx_1) and not dx[n:, r].any()
        for want, got in zip(states_1, states):
            assert np.array_equal(got[r:r + 1], want)
