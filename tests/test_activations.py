"""Sigmoid and tanh of every instruction set: the stated error bounds, limits, signs and order."""

import mpmath
import numpy as np
import pytest

from lstmcore import _kernels

# Units in the last place of the correctly rounded result, wherever that is a normal number.
ULP = {"float32": 4, "float64": 2}
FUNCTIONS = {"sigmoid": (_kernels.sigmoid, lambda x: 1 / (1 + mpmath.exp(-x))),
             "tanh": (_kernels.tanh, mpmath.tanh)}
each_function = pytest.mark.parametrize("name", FUNCTIONS)
each_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])


def in_order(dtype, step):
    """Every step-th number of the dtype in ascending order: -inf to inf, with both zeros."""
    bits = np.dtype(dtype).itemsize * 8
    infinity = int(np.array(np.inf, dtype).view(f"i{bits // 8}"))
    magnitudes = np.unique(np.append(np.arange(0, infinity, step, f"i{bits // 8}"), infinity))
    positive = magnitudes.astype(f"i{bits // 8}").view(dtype)
    return np.concatenate([-positive[::-1], positive])


def errors_in_ulp(got, want):
    """|got - want| in units of the last place of want; want has a wider dtype than got."""
    ulp = np.spacing(np.abs(want).astype(got.dtype)).astype(want.dtype)
    return np.abs(got.astype(want.dtype) - want) / ulp


@each_function
def test_float32_error_on_a_dense_grid(name, isa):
    """Half a million numbers of every magnitude, against float64, exact enough for them."""
    x = in_order("float32", 8009)
    wide = x.astype("float64")
    with np.errstate(over="ignore"):
        want = np.tanh(wide) if name == "tanh" else 1 / (1 + np.exp(-wide))
    got = FUNCTIONS[name][0](x)
    normal = np.abs(want) >= np.finfo("float32").tiny
    assert errors_in_ulp(got, want)[normal].max() <= ULP["float32"]
    assert np.abs(got[~normal]).max() <= np.finfo("float32").tiny


@each_function
def test_float64_error_against_many_digits(name, isa):
    """Numbers of every magnitude and a fine grid where the function bends, against 30 digits."""
    rng = np.random.default_rng(0)
    magnitude = 2.0 ** rng.uniform(-60, 9.4, 2000)
    x = np.concatenate([magnitude * rng.choice([-1, 1], 2000), np.linspace(-40, 40, 2001)])
    got = FUNCTIONS[name][0](x)
    with mpmath.workdps(30):
        error = [abs(mpmath.mpf(g) - FUNCTIONS[name][1](mpmath.mpf(v))) / mpmath.mpf(u)
                 for g, v, u in zip(got.tolist(), x.tolist(), np.spacing(np.abs(got)).tolist())]
    assert max(error) <= ULP["float64"]


@each_dtype
@each_function
def test_special_values(name, dtype, isa):
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan], dtype)
    got = FUNCTIONS[name][0](x)
    want = [0, -0.0, 1, -1] if name == "tanh" else [0.5, 0.5, 1, 0]
    assert np.array_equal(got[:4], np.array(want, dtype))
    assert np.array_equal(np.signbit(got[:4]), np.signbit(want))
    assert np.isnan(got[4:]).all()


@each_dtype
@each_function
def test_range_and_saturation(name, dtype, isa):
    """Never outside of [0, 1] or [-1, 1]; exactly 1 where the correctly rounded result is."""
    x = in_order(dtype, 8009 if dtype == "float32" else (1 << 63) // 500_000)
    got = FUNCTIONS[name][0](x)
    assert got.max() == 1 and got.min() >= (-1 if name == "tanh" else 0)
    saturated = {"float32": (9.1, 17.4), "float64": (19.1, 37.5)}[dtype][name == "sigmoid"]
    assert (got[x > saturated] == 1).all()
    if name == "tanh":
        assert np.array_equal(got, -FUNCTIONS[name][0](-x))


@each_dtype
@each_function
def test_order_is_kept(name, dtype, isa):
    """Monotone up to the rounding: a larger argument never gives a result 2 ulp smaller."""
    x = in_order(dtype, 8009 if dtype == "float32" else (1 << 63) // 500_000)
    got = FUNCTIONS[name][0](x)
    fall = np.maximum.accumulate(got) - got
    assert (fall <= 2 * np.spacing(np.abs(got))).all()


@each_dtype
@each_function
@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33])
def test_tails_are_the_same_function(name, dtype, n, isa):
    """A value's result does not depend on its lane, nor on whether its vector is full."""
    x = np.random.default_rng(n).standard_normal(40).astype(dtype)
    function = FUNCTIONS[name][0]
    assert np.array_equal(function(x[:n].copy()), function(x)[:n])
