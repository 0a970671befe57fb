"""The checks of one number, choice or dtype. They need no kernels, so the reference runs without."""

import math
import numbers

import numpy as np

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)


def size(name, value, at_least=1):
    """value as an int; TypeError or ValueError unless it is one that is large enough."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
    return int(value)


def number(name, value, at_least=0):
    """value as a float; TypeError or ValueError unless it is a finite number, large enough."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not at_least <= value < math.inf:
        raise ValueError(f"{name} must be at least {at_least} and finite, got {value}")
    return float(value)


def probability(name, value):
    """value as a float; TypeError or ValueError unless it is a number in 0..1."""
    if not 0 <= number(name, value, -math.inf) <= 1:
        raise ValueError(f"{name} must be in 0..1, got {value}")
    return float(value)


def fraction(name, value):
    """value as a float; TypeError or ValueError unless it is at least 0 and below 1."""
    if not 0 <= number(name, value) < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {value}")
    return float(value)


def choice(name, value, choices):
    """value; ValueError unless it is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def float_dtype(dtype):
    """The numpy dtype that "float32" or "float64" names; TypeError for any other."""
    if dtype is None or np.dtype(dtype) not in (F32, F64):
        raise TypeError(f"dtype must be 'float32' or 'float64', got {dtype!r}")
    return F64 if np.dtype(dtype) == F64 else F32
