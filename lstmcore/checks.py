"""The checks of arguments, each written once.

What is right comes back, fit for a kernel or for NumPy; what is not is a TypeError or a ValueError
that says expected and got in the caller's words. Nothing is cast but integers to int64. What is
indexed by (ids, lengths) comes back as a copy that was checked after copying: whoever refills the
caller's array meanwhile changes nothing. No layer is known here.
"""

import numpy as np

from lstmcore import _kernels
from lstmcore.scalars import F32, F64


# ---- arrays ------------------------------------------------------------------------------------------

def array(value, name, letters, shape, dtype):
    """value as a C-contiguous array of this shape and dtype (F32 or F64): itself, if it is one."""
    if _kernels.fits(value, shape, dtype == F64):   # not `is`: an unpickled dtype is another object
        return value
    unmasked(name, value)
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, got {type(value).__module__}."
                        f"{type(value).__qualname__}")
    if value.dtype != dtype:
        raise TypeError(f"{name} must be {dtype} like the other arrays, got {value.dtype}")
    if value.shape != shape:
        raise ValueError(f"{name} must be {letters} = {shape}, got {value.shape}")
    return np.array(value, order="C", subok=False)


def optional(value, name, letters, shape, dtype):
    """None, or the array."""
    return None if value is None else array(value, name, letters, shape, dtype)


def floats(name, value, dtype=None):
    """value as a plain array of native float32 or float64, or of `dtype` alone."""
    unmasked(name, value)
    value = np.asarray(value)
    if value.dtype not in ((F32, F64) if dtype is None else (dtype,)):
        raise TypeError(f"{name} must be {dtype or 'float32 or float64'}, got {value.dtype}")
    return value


def unmasked(name, value):
    """value, if neither it nor, in a list, any part of it is a masked array."""
    parts = (value, *value) if isinstance(value, (list, tuple)) else (value,)
    for part in parts:
        # Other libraries' masked arrays are subclasses with a mask.
        if type(part) is not np.ndarray and isinstance(part, np.ndarray) and hasattr(part, "mask"):
            raise TypeError(f"{name} must be an array without a mask: fill it, or use lengths")
    return value


def out(name, value, shape, dtype, *inputs, over=None):
    """value, found fit to be written to: of this shape and dtype, and no memory of the inputs.

    over: an input that the result may overwrite, if value is exactly it.
    """
    unmasked(name, value)
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, got {type(value).__name__}")
    if value.dtype != dtype:
        raise TypeError(f"{name} must be {np.dtype(dtype)}, got {value.dtype}")
    if value.shape != shape:
        raise ValueError(f"{name} must be {shape}, got {value.shape}")
    for flag, word in ("C", "C-contiguous"), ("W", "writable"), ("A", "aligned"):
        if not value.flags[flag]:
            raise ValueError(f"{name} must be {word}")
    if over is not None and value.__array_interface__ != over.__array_interface__:
        inputs += (over,)
    for other in inputs:
        if isinstance(other, np.ndarray) and other.flags.c_contiguous:
            shared = _kernels.shares_memory(value, other)
        else:
            # 1000 tries settle the strides in use; a case too hard counts as shared.
            shared = other is not None and np.may_share_memory(value, other, 1000)
        if shared:
            raise ValueError(f"{name} must not share memory with the other arguments")
    return value


# ---- what is indexed by ------------------------------------------------------------------------------

def integers(name, value, shape=None):
    """A copy of value, an array or list of integers of any width, of this shape."""
    unmasked(name, value)
    given = isinstance(value, np.ndarray)
    value = np.array(value, order="C")
    if not value.size and not given:
        value = value.astype(np.int64)      # an empty list is not yet of any type
    if value.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {value.dtype}")
    if shape is not None and value.shape != shape:
        raise ValueError(f"{name} must be {shape}, got {value.shape}")
    return value


def ids(value, name, size, shape=None, letter=None):
    """A copy of value as C-contiguous int64 in 0..size-1, of this shape; letter: size's name."""
    value = integers(name, value, shape)
    if value.size and (value.min() < 0 or value.max() >= size):
        symbol = f"0..{letter}-1 = " if letter else ""
        raise ValueError(f"{name} must be in {symbol}0..{size - 1}, "
                         f"got {value.min()}..{value.max()}")
    return value.astype(np.int64, copy=False)


def lengths(value, T, B):
    """A copy of lengths (B,) as int64 in 0..T."""
    value = integers("lengths", value)
    if value.shape != (B,):
        raise ValueError(f"lengths must be (B,) = ({B},), got {value.shape}")
    if value.size and (value.min() < 0 or value.max() > T):
        raise ValueError(f"lengths must be in 0..T = 0..{T}, got {value.min()}..{value.max()}")
    return value.astype(np.int64, copy=False)
