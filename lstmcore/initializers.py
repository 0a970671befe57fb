"""The first values of the weights of recurrent layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lstmcore._types import Floats, Init


def initializer(init: Init, H: int, rng: np.random.Generator) -> Callable[[str, Any], Floats]:
    """draw(letter, shape): first values for a weight of that letter, one gate after the other."""
    def uniform(letter, shape):
        return rng.uniform(-H**-0.5, H**-0.5, shape)

    def glorot(letter, shape):
        if letter in ("b", "peepholes", "norms"):
            return np.zeros(shape)
        if letter == "W_hh":
            return np.stack([_orthogonal(rng, *shape[1:]) for _ in range(shape[0])])
        bound = (6 / sum(shape[-2:])) ** 0.5
        return rng.uniform(-bound, bound, shape)

    rules = dict(uniform=uniform, glorot=glorot)
    if init not in rules:
        raise ValueError(f"init must be 'uniform' or 'glorot', got {init!r}")

    return rules[init]


def _orthogonal(rng, rows, columns):
    """A random matrix, rows >= columns, whose columns are orthonormal (Saxe et al. 2014)."""
    q, r = np.linalg.qr(rng.standard_normal((rows, columns)))
    return q * np.sign(np.diag(r))
