"""The types of arguments and results, as annotations name them. Shapes stand in the docstrings."""

import os
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.floating[Any]]       # float32 or float64
Ints: TypeAlias = npt.NDArray[np.integer[Any]]
Bools: TypeAlias = npt.NDArray[np.bool_]
Array: TypeAlias = npt.NDArray[Any]                     # floats, or token ids where these may stand
ArrayLike: TypeAlias = npt.ArrayLike                    # lists too
Lengths: TypeAlias = npt.ArrayLike | None
Dtype: TypeAlias = Literal["float32", "float64"] | type[np.floating[Any]] | np.dtype[Any]
Seed: TypeAlias = int | np.random.Generator | None
Path: TypeAlias = str | os.PathLike[str]
Cell: TypeAlias = Literal["lstm", "gru", "rnn"]
Compute: TypeAlias = Literal["float32", "float64", "bfloat16"]     # the format of products
Precision: TypeAlias = Literal["float32", "float64", "bfloat16", "int8"]
Init: TypeAlias = Literal["uniform", "glorot"]
