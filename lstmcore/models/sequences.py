"""What the estimators read: tables, arrays, lists of arrays and strings, all as `Sequences`.

`recognize` says which of the four an X is, `from_...` turn it into sequences of channels or of token
ids. Nothing here knows a network.
"""

from typing import Any

import numpy as np

from lstmcore import checks
from lstmcore.models.text import Vocabulary     # noqa: F401  where older pickles look for it


class Sequences:
    """Sequences of any lengths, joined end to end.

    values : (steps of all sequences, C) floats, or (steps of all sequences,) token ids
    lengths : (n,) ints

    >>> s = Sequences(np.arange(6.0)[:, None], [3, 1, 2])
    >>> x, lengths = s.batch([0, 2])
    >>> x.shape, lengths
    ((3, 2, 1), array([3, 2]))
    """

    def __init__(self, values, lengths):
        self.values, self.lengths = values, np.asarray(lengths, np.intp)
        self._starts = np.cumsum(self.lengths) - self.lengths

    def __len__(self):
        return len(self.lengths)

    def batch(self, rows):
        """Some sequences, time-major and padded with zeros: x (T,B,C) or (T,B), lengths (B,).

        The lengths are None where all are equal.
        """
        there, at = self.places(rows)
        x = np.zeros((*there.shape, *self.values.shape[1:]), self.values.dtype)
        x[there] = self.values[at]
        return x, None if there.all() else self.lengths[rows]

    def places(self, rows):
        """Which places of a batch of these rows are steps, (T,B) bool, and which of `values` those are."""
        t = np.arange(self.lengths[rows].max(initial=0))[:, None]
        there = t < self.lengths[rows]
        return there, (self._starts[rows] + t)[there]

    def split(self, values):
        """Something of every step, (steps of all sequences, ...), as an array for each sequence."""
        return np.split(values, np.cumsum(self.lengths)[:-1])


def recognize(X):
    """("text" | "list" | "array" | "table", X): which kind of input X is.

    A list of equally long one-dimensional rows is a table, as anywhere in scikit-learn; a table of
    one column that holds strings is text.
    """
    X = of_other_libraries(checks.unmasked("X", X))
    if isinstance(X, (str, bytes)):
        raise TypeError("X must hold many sequences, got a single string: pass [X]")
    if not (isinstance(X, (list, tuple)) or hasattr(X, "__array__") or hasattr(X, "shape")):
        raise TypeError("X must be an array, a table or a list of arrays or strings, "
                        f"got {type(X).__name__}")
    X = _text_column(X)
    if isinstance(X, np.ndarray) and not (X.ndim == 1 and X.dtype.kind in "OUT"):
        return ("array" if X.ndim == 3 else "table"), X
    if not isinstance(X, (list, tuple, np.ndarray)):
        return "table", X
    if not len(X):
        raise ValueError("X must hold at least one sequence, got none")
    strings = sum(isinstance(x, str) for x in X)
    if strings == len(X):
        return "text", list(X)
    if any(isinstance(x, bytes) for x in X):
        raise TypeError("X must hold strings or arrays, got bytes: decode them")
    if strings:
        n, odd = next((n, x) for n, x in enumerate(X) if not isinstance(x, str))
        raise TypeError("X must hold strings only or arrays only, got both: "
                        f"X[{n}] is {odd if np.ndim(odd) == 0 else type(odd).__name__}")
    dimensions = {np.ndim(x[0]) + 1 if isinstance(x, (list, tuple)) and len(x) else np.ndim(x)
                  for x in X}
    if dimensions == {1} and len({len(x) for x in X}) == 1 or dimensions & {0}:
        return "table", X
    return "list", X


def of_other_libraries(a: Any) -> Any:
    """Tensors (of PyTorch), datasets (h5py) and labelled arrays (xarray) as NumPy arrays.

    What scikit-learn or we look into ourselves stays as it is: tables of pandas, lists, arrays.
    """
    if hasattr(a, "detach"):                # np.asarray takes no tensor with a gradient, or on a GPU
        a = a.detach().cpu()
    elif isinstance(a, np.ndarray) or hasattr(a, "columns") or hasattr(a, "iloc"):
        return a
    return np.asarray(a) if hasattr(a, "shape") and hasattr(a, "__array__") else a


def _text_column(X):
    """The strings of a pandas Series, or of a table of one column; every other X as it is."""
    dimensions = getattr(X, "ndim", None)
    if dimensions == 1 and hasattr(X, "to_numpy"):
        return X.to_numpy()
    if dimensions == 2 and X.shape[0] and (hasattr(X, "iloc") or isinstance(X, np.ndarray)):
        first = X.iloc[0] if hasattr(X, "iloc") else X[0]
        texts = sum(isinstance(value, str) for value in first)
        if texts and len(first) > 1:
            raise TypeError(f"X must hold numbers, or one column of strings; got {len(first)} "
                            f"columns, {texts} of them of strings")
        if texts:
            return np.asarray(X, object)[:, 0]
    return X


def from_list(X, n_channels, dtype):
    """Arrays (T_i, C), or (T_i·C,) when n_channels says what C is -> Sequences of C channels."""
    rows = [_as_array(n, x) for n, x in enumerate(X)]
    widths = {row.shape[1] for row in rows if row.ndim == 2}
    if any(row.ndim not in (1, 2) for row in rows) or len(widths) > 1:
        raise ValueError("each sequence in X must be (steps, channels), with the same number of "
                         f"channels; got shapes {sorted({row.shape for row in rows})[:4]}")
    for row in rows:
        if row.dtype.kind not in "biuf":
            raise TypeError(f"each sequence in X must hold real numbers, got {row.dtype}")
        if row.ndim == 1 and row.size % n_channels:
            raise ValueError(f"a sequence of {row.size} numbers does not divide into n_channels = "
                             f"{n_channels}")
    C = widths.pop() if widths else n_channels
    rows = [row.reshape(-1, C if row.ndim == 2 else n_channels) for row in rows]
    if any(row.shape[1] != C for row in rows):
        raise ValueError(f"X mixes sequences of {C} and of n_channels = {n_channels} channels")
    dtype = float_type(rows, dtype)
    values = np.concatenate(rows).astype(dtype, order="C", copy=False)
    return Sequences(values, [len(row) for row in rows])


def _as_array(n, x):
    try:
        return np.asarray(of_other_libraries(x))
    except ValueError:
        raise ValueError(f"X[{n}] must be an array (steps, channels), with as many channels in "
                         f"every step; got {str(x):.60}") from None


def from_array(X):
    """An array (n, T, C) -> Sequences of C channels."""
    n, T, C = X.shape
    return Sequences(X.reshape(n * T, C), np.full(n, T))


def float_type(arrays, dtype=None):
    """`dtype` if there is one; else float32 if every array is float32; else float64."""
    if dtype is not None:
        return np.dtype(dtype)
    return np.dtype("float32" if all(a.dtype == np.float32 for a in arrays) else "float64")


def from_texts(texts, vocabulary):
    """Strings -> Sequences of token ids."""
    if vocabulary.level == "char":
        return Sequences(vocabulary.encode("".join(texts)), [len(text) for text in texts])
    ids = [vocabulary.encode(text) for text in texts]
    return Sequences(np.concatenate(ids), [len(row) for row in ids])
