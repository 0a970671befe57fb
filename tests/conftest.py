"""What every test shares: the tolerances, the comparison that reads them, the modes to run in."""

import os

import numpy as np
import pytest
from hypothesis import settings

os.environ.setdefault("KERAS_BACKEND", "torch")     # read when Keras is imported

settings.register_profile("lstmcore", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("lstmcore")

# Every figure is the largest |got - want| allowed, divided by the largest |want| of the array:
# an entry that is small beside its neighbors is only as good as the sums it comes from.
TOLERANCES = {
    # Five-point differences at step 1e-4 in float64: the truncation (1e-16 times a fifth
    # derivative) and the rounding (1e-16 / 1e-4) both stay below 1e-10 of the gradient's scale.
    "finite difference": {"float64": 1e-9},
    # Fractions worked out by hand against a dozen operations: a few roundings.
    "by hand": {"float64": 1e-14},
    # A fused kernel and the reference round differently (fused multiply-adds, another order of
    # sums, 2 ulp or 4 ulp activations), and the recurrence carries it on. Want is computed in
    # float64, so the float32 figure is the kernel's whole error over a few dozen steps.
    "kernel": {"float64": 1e-11, "float32": 3e-5},
    # The same formulas on the same kernels, but cut or combined differently (time split in two,
    # two calls added up): a few roundings of sums, carried on by the recurrence.
    "identity": {"float64": 1e-12, "float32": 2e-5},
    # Rounding to bfloat16 moves an operand by up to 2^-9, its product by up to 2^-8 = 4e-3, and a
    # sum of many by less, as their errors differ in sign; a few steps there and back carry it on.
    "bfloat16": {"float64": 2e-2, "float32": 2e-2},
    # Rounding to int8 moves an operand by up to 1/254 of the largest of its row.
    "int8": {"float64": 2e-2, "float32": 2e-2},
    # Sums of int8 are exact, so one step is off as a float32 kernel is.
    "one int8 step": {"float32": 3e-5},
    # Backward, a float32 gradient is rounded to another neighbor than the float64 one about once in
    # 10,000 times, and then one product of a sum is off by 2^-8 of itself.
    "one bfloat16 step back": {"float32": 1e-3},
    # PyTorch brings its own activations and its own order of sums.
    "torch": {"float64": 1e-10, "float32": 3e-4},
}


def largest_error(got, want):
    """max |got - want| / max |want|; 0 for empty arrays, inf where one is not finite."""
    got, want = np.asarray(got, "longdouble"), np.asarray(want, "longdouble")
    if not want.size:
        return 0.0
    if not (np.isfinite(got).all() and np.isfinite(want).all()):
        return np.inf
    scale = np.abs(want).max()
    return float(np.abs(got - want).max() / (scale if scale else 1))


@pytest.fixture(scope="session")
def close():
    """close(got, want, "kernel"): assert agreement within TOLERANCES, for arrays or results.

    Results may be nested tuples; None matches only None; shapes must be equal. The dtype of `got`
    picks the tolerance.
    """
    def check(got, want, why, name="result"):
        if want is None or got is None:
            assert got is want, f"{name}: got {got}, want {want}"
        elif isinstance(want, tuple):
            assert len(got) == len(want)
            names = getattr(want, "_fields", [f"{name}[{n}]" for n in range(len(want))])
            for part, g, w in zip(names, got, want):
                check(g, w, why, part)
        else:
            got, want = np.asarray(got), np.asarray(want)
            assert got.shape == want.shape, f"{name}: shape {got.shape}, want {want.shape}"
            error, limit = largest_error(got, want), TOLERANCES[why][str(got.dtype)]
            assert error <= limit, f"{name}: off by {error:.2g} of its scale, allowed {limit:.2g}"
    return check


def instruction_sets():
    """Those that can run here, or the one that LSTMCORE_ISA forces on this whole run."""
    from lstmcore import _kernels

    return [_kernels.isa()] if os.environ.get("LSTMCORE_ISA") else _kernels.available_isas()


def pytest_generate_tests(metafunc):
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", instruction_sets(), indirect=True)


@pytest.fixture
def isa(request):
    """The test runs once per instruction set of this machine."""
    from lstmcore import _kernels

    before = _kernels.isa()
    _kernels.use_isa(request.param)
    yield request.param
    _kernels.use_isa(before)


@pytest.fixture(params=["tiles", "fused", "blas"])
def plan(request, monkeypatch):
    """The test runs with the register tiles, inputs multiplied ahead or in the step, and over BLAS."""
    from lstmcore import _kernels

    monkeypatch.setattr(_kernels, "plan", request.param)
    return request.param


@pytest.fixture
def share_small_work(monkeypatch):
    """Small problems use all the threads that they are given, as large ones do."""
    from lstmcore import arguments

    monkeypatch.setattr(arguments, "_SERIAL_WORK", 0)
