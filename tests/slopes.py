"""Proof of gradients: the slope of a loss along random directions of whatever it reads."""

import numpy as np
import pytest

STEP = 1e-4


def by_name(cases, what="make"):
    """Run a test for each of the named cases."""
    return pytest.mark.parametrize(what, cases.values(), ids=cases.keys())


def normal(*shape, seed=0, dtype="float64"):
    """Random numbers that depend on the shape and the seed alone."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def slope(loss, array, direction):
    """The derivative of loss() along a direction of one array it reads, by five points."""
    before = array.copy()

    def at(distance):
        array[...] = before + distance * direction
        return loss()

    try:
        return (8 * (at(STEP) - at(-STEP)) - (at(2 * STEP) - at(-2 * STEP))) / (12 * STEP)
    finally:
        array[...] = before


def assert_gradients(close, loss, arrays, gradients):
    """Each gradient, along four random directions, is the slope of loss() in its array."""
    assert arrays.keys() == gradients.keys()
    for name, array in arrays.items():
        directions = normal(4, *array.shape, seed=1)
        close([(gradients[name] * direction).sum() for direction in directions],
              [slope(loss, array, direction) for direction in directions],
              "finite difference", name)


def assert_copied(model, copied, run):
    """copied(model) computes what model does, dropout included, and shares nothing with it."""
    run(model)
    twin = copied(model)
    assert twin.parameters().keys() == model.parameters().keys()
    assert (run(twin) == run(model)).all()
    kept = run(model.eval())
    for p in twin.parameters().values():
        p += 1
    assert (run(model) == kept).all()
    assert not twin.parameters() or (run(twin.eval()) != kept).any()
