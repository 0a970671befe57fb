"""LSTMClassifier and LSTMRegressor: one vector, class or number per sequence, as scikit-learn does.

X may be a table (n, T), an array (n, T, C), a list of arrays (T_i, C) of different lengths, or a
list of strings; pandas objects too. A `Network` reads them; training is the loop in
`_SequenceEstimator._train`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import numpy as np

from lstmcore import checks, optim
from lstmcore._types import Array, ArrayLike, Cell, Compute, Floats, Init, Lengths, Precision
from lstmcore.layers import (GRU, LSTM, RNN, Dropout, Embedding, LastStep, Linear, MaxOverTime,
                             MeanOverTime, Sequential)
from lstmcore.losses import mse_loss, softmax_cross_entropy
from lstmcore.models import sequences
from lstmcore.module import Module

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils import check_array, check_random_state, column_or_1d
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import (_check_sample_weight, assert_all_finite,
                                          check_consistent_length, check_is_fitted, validate_data)
except ImportError as error:
    raise ImportError("LSTMClassifier and LSTMRegressor need scikit-learn 1.6 or newer: "
                      "pip install 'lstmcore[sklearn]'") from error

Self = TypeVar("Self", bound="_SequenceEstimator")

PREDICT_ROWS = 256  # sequences at a time: the memory of a prediction does not grow with X

OPTIMIZERS = {"adam": optim.Adam, "adamw": optim.AdamW, "sgd": optim.SGD,
              "rmsprop": optim.RMSprop, "adagrad": optim.Adagrad}

PARAMETERS = """
    Parameters
    ----------
    hidden_size, num_layers, cell, bidirectional, peepholes, forget_bias, init
        The recurrent layers, as in `lstmcore.LSTM`; cell="gru" takes a
        `lstmcore.GRU`, "rnn" a vanilla `lstmcore.RNN`.
    pooling : "last" | "mean" | "max"
        What of the hidden states is read out: the last, or the mean or maximum over all steps.
    dropout : probability, on embedded tokens, between layers, and before the read-out
    n_channels : numbers per step in a two-dimensional X: its rows are (T·n_channels,)
    standardize : scale every channel to mean 0 and variance 1 over the training set
    tokenizer : "char" | "word" | function str -> list of str; for an X of strings
    embedding_size, min_count : size of a token's vector; rarer tokens are one <unk>
    epochs, batch_size, optimizer, learning_rate, weight_decay, clip_norm
        One update per batch; a set no larger than one batch is taken whole. Gradients of a
        larger norm than clip_norm are scaled down to it; None or 0: not.
        optimizer : "adam" | "adamw" | "sgd" | "rmsprop" | "adagrad"
    schedule : "constant" | "cosine", the learning rate over the epochs of one fit
    validation_fraction, patience
        With a fraction above 0, that part of the training set is held out, training stops
        after `patience` epochs without a better loss on it, and the best weights are kept.
    warm_start : go on from the weights of the previous fit
    dtype : "float32" | "float64" | None, to compute in X's own (strings, and with a compute of
        "bfloat16": float32)
    compute : None | "bfloat16", of the products: see `lstmcore.LSTM`
    n_threads, verbose, random_state

    Attributes
    ----------
    network_ : the trained `lstmcore.Module`; its `recurrent` is the LSTM, for a look inside
    n_iter_, loss_curve_, validation_curve_ : epochs run, and the mean losses after each
    n_features_in_, feature_names_in_ : of a two-dimensional X, its columns; of a DataFrame, their
        names
    vocabulary_ : of an X of strings
"""


class Network(Module):
    """Tokens or channels -> recurrent layers -> one vector per sequence -> outputs."""

    def __init__(self, recurrent: LSTM | GRU | RNN, pool: Any, head: Linear, dropout: list[Any],
                 embed: Embedding | None = None) -> None:
        self.embed, self.recurrent, self.pool, self.head = embed, recurrent, pool, head
        self.before, self.after = dropout

    def __call__(self, x: Array, lengths: Lengths = None) -> Floats:
        """x (T, B, C), or tokens (T, B), and lengths (B,) -> outputs (B, O)."""
        if self.embed is not None:
            x = self.before(self.embed(x))
        y, _ = self.recurrent(x, lengths=lengths)
        return self.head(self.after(self.pool(y, lengths)))

    def backward(self, doutputs: Floats) -> None:
        """doutputs (B, O); adds to the gradients of every layer."""
        dy = self.pool.backward(self.after.backward(self.head.backward(doutputs)))
        dx, _ = self.recurrent.backward(dy)
        if self.embed is not None:
            self.embed.backward(self.before.backward(dx))


class _SequenceEstimator(BaseEstimator):
    """Everything but the targets: reading X, building the network, training it, running it."""

    def __init__(self, hidden_size: int = 32, num_layers: int = 1, *, cell: Cell = "lstm",
                 bidirectional: bool = False, peepholes: bool = False, forget_bias: float = 1.0,
                 init: Init = "glorot", pooling: Literal["last", "mean", "max"] = "last",
                 dropout: float = 0.0, n_channels: int = 1, standardize: bool = True,
                 tokenizer: Literal["char", "word"] | Callable[[str], list[str]] = "char",
                 embedding_size: int = 32, min_count: int = 1, epochs: int = 100,
                 batch_size: int = 64,
                 optimizer: Literal["adam", "adamw", "sgd", "rmsprop", "adagrad"] = "adam",
                 learning_rate: float = 1e-2, weight_decay: float = 0.0,
                 clip_norm: float | None = 1.0,
                 schedule: Literal["constant", "cosine"] = "constant",
                 validation_fraction: float = 0.0, patience: int = 10, warm_start: bool = False,
                 dtype: Literal["float32", "float64"] | None = None,
                 compute: Compute | None = None, n_threads: int | None = None,
                 verbose: bool = False,
                 random_state: int | np.random.RandomState | None = None) -> None:
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.cell = cell
        self.bidirectional = bidirectional
        self.peepholes = peepholes
        self.forget_bias = forget_bias
        self.init = init
        self.pooling = pooling
        self.dropout = dropout
        self.n_channels = n_channels
        self.standardize = standardize
        self.tokenizer = tokenizer
        self.embedding_size = embedding_size
        self.min_count = min_count
        self.epochs = epochs
        self.batch_size = batch_size
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.clip_norm = clip_norm
        self.schedule = schedule
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.warm_start = warm_start
        self.dtype = dtype
        self.compute = compute
        self.n_threads = n_threads
        self.verbose = verbose
        self.random_state = random_state

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    def fit(self: Self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Train on sequences X (see the class) and their targets y. Returns self."""
        return self._fit(X, y, sample_weight, self.epochs,
                         resume=self.warm_start and hasattr(self, "network_"))

    def freeze(self: Self, precision: Precision | None = None) -> Self:
        """Fix the weights for predictions in "float32", "bfloat16" or "int8", until `unfreeze`.

        A fit that starts anew makes new weights; one that goes on (`partial_fit`, warm_start) needs
        `unfreeze` before it. See `lstmcore.Module.freeze`. Returns self.
        """
        check_is_fitted(self)
        if precision in ("bfloat16", "int8") and self._dtype == np.float64:
            raise TypeError(f"precision={precision!r} needs a network of float32, this "
                            f"{type(self).__name__} was fitted in float64: give it dtype='float32'")
        self.network_.freeze(precision)
        return self

    def unfreeze(self: Self) -> Self:
        """Let the weights change again, which are as before `freeze`. Returns self."""
        check_is_fitted(self)
        self.network_.unfreeze()
        return self

    def _fit(self, X, y, sample_weight, epochs, resume):
        self._check_parameters()
        checks.unmasked("y", y), checks.unmasked("sample_weight", sample_weight)
        if y is None:
            raise ValueError(f"{type(self).__name__} requires y to be passed, "
                             "but the target y is None")
        read = self._read(X, reset=not resume)
        targets = self._encode_targets(y, reset=not resume)
        check_consistent_length(read.lengths, targets)
        weights = _check_sample_weight(sample_weight, read.lengths, dtype=np.float64,
                                       ensure_non_negative=True)
        rows = np.flatnonzero(weights)
        if not rows.size:
            raise ValueError("sample_weight must hold a weight above zero, got only zeros")
        if not resume:
            self._build(read, targets, weights)
        self._train(self._scaled(read), self._scaled_targets(targets), weights, rows, epochs)
        return self

    def _check_parameters(self):
        for name, allowed in dict(cell=("lstm", "gru", "rnn"), pooling=("last", "mean", "max"),
                                  optimizer=tuple(OPTIMIZERS),
                                  schedule=("constant", "cosine")).items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name in ("hidden_size", "num_layers", "embedding_size", "epochs", "batch_size",
                     "n_channels", "min_count", "patience"):
            checks.size(name, getattr(self, name))
        for name in ("learning_rate", "weight_decay"):
            checks.number(name, getattr(self, name))
        if self.clip_norm is not None:
            checks.number("clip_norm", self.clip_norm)
        checks.probability("dropout", self.dropout)
        checks.number("validation_fraction", self.validation_fraction)
        if not 0 <= self.validation_fraction < 1:
            raise ValueError("validation_fraction must be at least 0 and below 1, "
                             f"got {self.validation_fraction}")
        if self.cell != "lstm" and self.peepholes:
            raise ValueError(f"peepholes are an LSTM's: with cell={self.cell!r} they must be False")
        if self.dtype not in (None, "float32", "float64"):
            raise ValueError(f"dtype must be 'float32', 'float64' or None, got {self.dtype!r}")
        if self.compute not in (None, self.dtype or "float32", "bfloat16"):
            raise ValueError(f"compute must be None, {self.dtype or 'float32'!r} or 'bfloat16', got "
                             f"{self.compute!r}")
        if self.compute == "bfloat16" and self.dtype == "float64":
            raise ValueError("compute='bfloat16' needs dtype='float32' or None, got 'float64'")

    def _read(self, X, reset):
        """X as Sequences; with reset, what a later X must look like is noted."""
        kind, given = sequences.recognize(X)
        if reset:
            for name in ("n_features_in_", "feature_names_in_"):
                vars(self).pop(name, None)
        if kind == "text":
            if np.ndim(X) == 2 and (reset or hasattr(self, "n_features_in_")):
                validate_data(self, X, skip_check_array=True, reset=reset)
            if reset:
                self.vocabulary_ = sequences.Vocabulary(given, self.tokenizer, self.min_count)
            elif self.vocabulary_ is None:
                raise TypeError("X must hold numbers, as in fit, got strings")
            return self.vocabulary_.encode(given)
        if reset:
            self.vocabulary_ = None
        elif self.vocabulary_ is not None:
            raise TypeError("X must hold strings, as in fit, got numbers")
        if kind == "list":
            read = sequences.from_list(given, self.n_channels, self.dtype)
            assert_all_finite(read.values, input_name="X")
        elif kind == "array":
            X = check_array(given, allow_nd=True, dtype=self._dtypes(), input_name="X")
            read = sequences.from_array(X)
        else:
            if reset or hasattr(self, "n_features_in_"):
                X = validate_data(self, X, dtype=self._dtypes(), reset=reset)
            else:
                X = check_array(X, dtype=self._dtypes(), input_name="X")
            if X.shape[1] % self.n_channels:
                raise ValueError(f"X has {X.shape[1]} columns, which do not divide into "
                                 f"n_channels = {self.n_channels}")
            read = sequences.from_array(X.reshape(len(X), -1, self.n_channels))
        if not reset and read.values.shape[1] != len(self._shift):
            raise ValueError(f"X has {read.values.shape[1]} channels, but "
                             f"{type(self).__name__} was fitted on {len(self._shift)}")
        return read

    def _dtypes(self):
        return [np.float64, np.float32] if self.dtype is None else self.dtype

    def _build(self, read, targets, weights):
        text = self.vocabulary_ is not None
        own = "float32" if text or self.compute else read.values.dtype
        self._dtype = np.dtype(self.dtype or own)
        rng = self._rng = np.random.default_rng(
            check_random_state(self.random_state).randint(2**31))
        if not text:
            self._shift, self._scale = _moments(read.values, np.repeat(weights, read.lengths),
                                                self.standardize)
        self._set_up_targets(targets, weights)
        embed, width = None, None if text else read.values.shape[1]
        if text:
            width = self.embedding_size
            embed = Embedding(len(self.vocabulary_), width, dtype=self._dtype, seed=rng)
            table = embed.parameters()["weight"]
            table /= width**0.5     # length 1: rare words keep their first vector, which is noise
            table[0] = 0            # an unseen token says nothing
        options = dict(num_layers=self.num_layers, dropout=self.dropout, init=self.init,
                       bidirectional=self.bidirectional, dtype=self._dtype, compute=self.compute,
                       seed=rng)
        if self.cell == "lstm":
            recurrent = LSTM(width, self.hidden_size, peepholes=self.peepholes,
                             forget_bias=self.forget_bias, **options)
        else:
            recurrent = (GRU if self.cell == "gru" else RNN)(width, self.hidden_size, **options)
        recurrent.n_threads = self.n_threads
        pool = {"mean": MeanOverTime, "max": MaxOverTime}.get(self.pooling)
        self.network_ = Network(
            recurrent, pool() if pool else LastStep(bidirectional=self.bidirectional),
            Linear(self.hidden_size * (1 + bool(self.bidirectional)), self._n_outputs(),
                   dtype=self._dtype, compute=self.compute, seed=rng),
            [Dropout(self.dropout, seed=rng) if self.dropout else Sequential() for _ in range(2)],
            embed)
        self.network_.head.n_threads = self.n_threads
        self._optimizer = OPTIMIZERS[self.optimizer](
            self.network_, self.learning_rate, weight_decay=self.weight_decay)
        self.n_iter_, self.loss_curve_, self.validation_curve_ = 0, [], []

    def _scaled(self, read):
        if self.vocabulary_ is not None:
            return read
        values = (read.values - self._shift) / self._scale
        return sequences.Sequences(values.astype(self._dtype, copy=False), read.lengths)

    def _train(self, read, targets, weights, rows, epochs):
        """Updates over `rows` of the sequences, for some epochs; see PARAMETERS."""
        weights = weights / weights[rows].mean()
        rows, held = self._hold_out(rows)
        batches = -(-len(rows) // self.batch_size)
        self._optimizer.lr = self.learning_rate
        schedule = None
        if self.schedule == "cosine":
            schedule = optim.CosineDecay(self._optimizer, epochs * batches)
        best, best_weights, best_epoch = np.inf, None, 0
        for epoch in range(1, epochs + 1):
            self.network_.train()
            if batches > 1:
                rows = self._rng.permutation(rows)
            total = sum(len(batch) * self._update(read, targets, weights, batch, schedule)
                        for batch in np.array_split(rows, batches))
            self.network_.eval()
            self.n_iter_ += 1
            self.loss_curve_.append(total / len(rows))
            said = f"epoch {self.n_iter_}: loss {self.loss_curve_[-1]:.4f}"
            if len(held):
                loss = self._loss_of(read, targets, weights, held)
                self.validation_curve_.append(loss)
                said += f", validation {loss:.4f}"
                if loss < best:
                    best, best_epoch = loss, epoch
                    best_weights = self.network_.state_dict()
            if self.verbose:
                print(said)
            if best_weights is not None and epoch - best_epoch >= self.patience:
                break
        if best_weights is not None:
            self.network_.load_state_dict(best_weights)

    def _hold_out(self, rows):
        n = int(np.ceil(self.validation_fraction * len(rows)))
        if n == len(rows):
            raise ValueError(f"validation_fraction = {self.validation_fraction} leaves none of "
                             f"{n} sequences to train on")
        if n:
            rows = self._rng.permutation(rows)
        return rows[n:], rows[:n]

    def _update(self, read, targets, weights, batch, schedule):
        self.network_.zero_grad()
        outputs = self.network_(*read.batch(batch))
        with np.errstate(over="ignore", invalid="ignore"):      # seen in the loss
            loss, doutputs = self._loss(outputs, targets[batch], weights[batch] / len(batch))
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} in epoch {self.n_iter_ + 1}: "
                                     f"lower learning_rate = {self.learning_rate}")
        self.network_.backward(doutputs)
        if self.clip_norm:      # None or 0: not at all
            optim.clip_grad_norm(self.network_, self.clip_norm)
        self._optimizer.step()
        if schedule is not None:
            schedule.step()
        return loss

    def _loss_of(self, read, targets, weights, rows):
        outputs = self._outputs(read, rows)
        return self._loss(outputs, targets[rows], weights[rows] / weights[rows].sum())[0]

    def _outputs(self, read, rows=None):
        """The outputs for some sequences, (n, O), those of like length together."""
        rows = np.arange(len(read)) if rows is None else rows
        order = np.argsort(read.lengths[rows], kind="stable")
        outputs = np.empty((len(rows), self.network_.head.out_features), self._dtype)
        for at in range(0, len(rows), PREDICT_ROWS):
            some = order[at:at + PREDICT_ROWS]
            outputs[some] = self.network_(*read.batch(rows[some]))
        return outputs

    def _run(self, X):
        check_is_fitted(self)
        return self._outputs(self._scaled(self._read(X, reset=False)))


def _moments(values, weights, standardize):
    """Weighted mean and deviation of every column, (C,); a constant column has deviation 1."""
    C = values.shape[1]
    if not (standardize and weights.sum() > 0):
        return np.zeros(C), np.ones(C)
    mean = np.average(values, axis=0, weights=weights)
    deviation = np.sqrt(np.average((values - mean) ** 2, axis=0, weights=weights))
    # What rounding leaves of a constant column is not a deviation.
    constant = deviation <= 1e-12 * np.abs(mean)
    return mean, np.where(constant, 1.0, deviation)


class LSTMClassifier(ClassifierMixin, _SequenceEstimator):
    """Sequences -> classes: an LSTM, its read-out, and softmax cross-entropy.

    X is a table (n, T), an array (n, T, C), a list of arrays (T_i, C) of different lengths, or a
    list of strings; y holds n labels. A DataFrame is a table (of one column of strings: a list of
    them), a Series is a list.

    >>> words = ["aab", "aba", "baa", "a", "xxy", "yx", "yxxy", "xy"]
    >>> model = LSTMClassifier(hidden_size=8, random_state=0).fit(words, list("llllrrrr"))
    >>> model.predict(["abaaba", "yyx"])
    array(['l', 'r'], dtype='<U1')
    """

    def partial_fit(self, X: Any, y: ArrayLike, classes: ArrayLike | None = None,
                    sample_weight: ArrayLike | None = None) -> LSTMClassifier:
        """One epoch over X and y, going on from before. The first call must name all `classes`."""
        resume = hasattr(self, "network_")
        checks.unmasked("classes", classes)
        if not resume:
            if classes is None:
                raise ValueError("classes must be passed on the first call to partial_fit")
            self.classes_ = np.unique(classes)
        elif classes is not None and not np.array_equal(self.classes_, np.unique(classes)):
            raise ValueError(f"classes must be those of the first call, {self.classes_}, "
                             f"got {np.unique(classes)}")
        self._classes_given = not resume
        try:
            return self._fit(X, y, sample_weight, 1, resume)
        finally:
            del self._classes_given

    def predict_proba(self, X: Any) -> Floats:
        """The probability of every class, (n, number of classes), in the order of `classes_`."""
        logits = self._run(X)
        e = np.exp(logits - logits.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)

    def predict(self, X: Any) -> Array:
        """The most probable class of each sequence, (n,)."""
        best = self._run(X).argmax(axis=1)
        return self.classes_[best]

    def score(self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """The share of X that `predict` gives the class y."""
        checks.unmasked("y", y), checks.unmasked("sample_weight", sample_weight)
        return super().score(X, y, sample_weight)

    def _encode_targets(self, y, reset):
        y = column_or_1d(y, warn=True)
        if y.dtype.kind == "f":
            assert_all_finite(y, input_name="y")
        if len(kinds := {type(label).__name__ for label in y} if y.dtype == object else ()) > 1:
            raise TypeError("y must hold labels of one type, and one for every sequence; got "
                            + ", ".join(sorted(kinds)))
        check_classification_targets(y)
        if reset and not getattr(self, "_classes_given", False):
            self.classes_ = np.unique(y)
        unknown = np.setdiff1d(y, self.classes_)
        if len(unknown):
            raise ValueError(f"y must hold classes out of {self.classes_}, got {unknown}")
        return np.searchsorted(self.classes_, y)

    def _n_outputs(self):
        return len(self.classes_)

    def _set_up_targets(self, targets, weights):
        pass

    def _scaled_targets(self, targets):
        return targets

    def _loss(self, outputs, targets, weights):
        return softmax_cross_entropy(outputs, targets, mask=weights, reduction="sum")


class LSTMRegressor(RegressorMixin, _SequenceEstimator):
    """Sequences -> numbers: an LSTM, its read-out, and squared error.

    X is a table (n, T), an array (n, T, C), a list of arrays (T_i, C) of different lengths, or a
    list of strings; y is (n,), or (n, K) for K numbers per sequence. Targets are standardized
    for training. A DataFrame is a table (of one column of strings: a list of them), a Series is a
    list. For time series, see `lstmcore.Forecaster`.

    >>> rng = np.random.default_rng(0)
    >>> X = [rng.standard_normal(n) for n in rng.integers(2, 9, size=60)]
    >>> y = [x.mean() for x in X]
    >>> model = LSTMRegressor(hidden_size=8, random_state=0).fit(X, y)
    >>> model.score(X, y) > 0.9
    True
    """

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def partial_fit(self, X: Any, y: ArrayLike,
                    sample_weight: ArrayLike | None = None) -> LSTMRegressor:
        """One epoch over X and y, going on from before; the first call fixes the scaling."""
        return self._fit(X, y, sample_weight, 1, hasattr(self, "network_"))

    def predict(self, X: Any) -> Floats:
        """The numbers of each sequence, shaped as y was: (n,) or (n, K)."""
        outputs = self._run(X)
        values = outputs * self._y_scale + self._y_shift
        return values[:, 0] if self._y_flat else values

    def score(self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """R², the share of the variance of y that `predict` explains."""
        checks.unmasked("y", y), checks.unmasked("sample_weight", sample_weight)
        return super().score(X, y, sample_weight)

    def _encode_targets(self, y, reset):
        y = check_array(y, ensure_2d=False, dtype=np.float64, input_name="y")
        if y.ndim > 2:
            raise ValueError(f"y must be (n,) or (n, K), got {y.shape}")
        flat, targets = y.ndim == 1, y.reshape(len(y), -1)
        if reset:
            self._y_flat = flat
        elif targets.shape[1] != len(self._y_shift):
            raise ValueError(f"y must hold {len(self._y_shift)} numbers per sequence, as in the "
                             f"first fit, got {targets.shape[1]}")
        return targets

    def _n_outputs(self):
        return len(self._y_shift)

    def _set_up_targets(self, targets, weights):
        self._y_shift, self._y_scale = _moments(targets, weights, True)

    def _scaled_targets(self, targets):
        return ((targets - self._y_shift) / self._y_scale).astype(self._dtype)

    def _loss(self, outputs, targets, weights):
        return mse_loss(outputs, targets, mask=weights / outputs.shape[1], reduction="sum")


for _estimator in (LSTMClassifier, LSTMRegressor) if __doc__ else ():       # none under -OO
    _estimator.__doc__ = _estimator.__doc__.replace("\n\n    >>>", f"\n{PARAMETERS}\n    >>>", 1)
