"""LSTMClassifier and LSTMRegressor: one vector, class or number per sequence, as scikit-learn does.

X may be a table (n, T), an array (n, T, C), a list of arrays (T_i, C) of different lengths, or a
list of strings; pandas objects too. A `Network` reads them, in the training loop of all models.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from lstmcore import checks, distributed, renames
from lstmcore._types import Array, ArrayLike, Cell, Compute, Floats, Init
from lstmcore.losses import mse_loss, softmax_cross_entropy
from lstmcore.models import sequences, text
from lstmcore.models.network import POOLING, Model, Network, checked
from lstmcore.models.sources import Batches, outputs
from lstmcore.models.training import Budget, Settings, Trainer, new_optimizer

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
    embed_size, min_count : size of a token's vector; rarer tokens are one <unk>
    epochs, batch_size, optimizer, lr, weight_decay, clip
        One update per batch; a set no larger than one batch is taken whole. lr is the learning
        rate. Gradients of a larger norm than clip are scaled down to it; None or 0: not.
        optimizer : "adam" | "adamw" | "sgd" | "rmsprop" | "adagrad"
    schedule : "constant" | "cosine", the learning rate over the epochs of one fit
    validation, patience
        With a share above 0, that part of the training set is held out, training stops
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
    history_ : of the last fit a dict per epoch, as `LanguageModel.history` has them
    n_features_in_, feature_names_in_ : of a two-dimensional X, its columns; of a DataFrame, their
        names
    vocabulary_ : of an X of strings
"""


@renames.checked
@dataclass(repr=False, eq=False)
class _SequenceEstimator(Model, BaseEstimator):
    """Everything but the targets: reading X, building the network, training it, running it."""

    hidden_size: int = 32
    num_layers: int = 1
    _: KW_ONLY
    cell: Cell = "lstm"
    bidirectional: bool = False
    peepholes: bool = False
    forget_bias: float = 1.0
    init: Init = "glorot"
    pooling: Literal["last", "mean", "max"] = "last"
    dropout: float = 0.0
    n_channels: int = 1
    standardize: bool = True
    tokenizer: Literal["char", "word"] | Callable[[str], list[str]] = "char"
    embed_size: int = 32
    min_count: int = 1
    epochs: int = 100
    batch_size: int = 64
    optimizer: Literal["adam", "adamw", "sgd", "rmsprop", "adagrad"] = "adam"
    lr: float = 1e-2
    weight_decay: float = 0.0
    clip: float | None = 1.0
    schedule: Literal["constant", "cosine"] = "constant"
    validation: float = 0.0
    patience: int = 10
    warm_start: bool = False
    dtype: Literal["float32", "float64"] | None = None
    compute: Compute | None = None
    n_threads: int | None = None
    verbose: bool = False
    random_state: int | np.random.RandomState | None = None

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    def fit(self: Self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None, *,
            comm: Any = None, shards: int | None = None) -> Self:
        """Train on sequences X (see the class) and their targets y. Returns self.

        comm : a communicator of mpi4py, whose processes all make this call with the same data: each
            computes its share of every batch, and all end with the same network
        shards : parts of a batch whose gradients are summed in a fixed order: the bits depend on them,
            8 by default with a comm, and not on how many processes there are
        """
        with distributed.training(comm) as processes:
            return self._fit(X, y, sample_weight, self.epochs,
                             resume=self.warm_start and hasattr(self, "network_"),
                             processes=processes, shards=shards)

    def set_params(self: Self, **params: Any) -> Self:
        """Set parameters by their names, as scikit-learn does. Returns self."""
        renames.check(type(self), params)
        return super().set_params(**params)

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        super().__setstate__(renames.current(type(self), state))
        if "clip_norm" in state:        # an older pickle, whose network called a layer embed
            rule = vars(self).get("_optimizer")
            for held in (vars(rule), rule._slots) if rule else ():
                held.update({what: {name.replace("embed.", "embedding."): a for name, a in arrays.items()}
                             for what, arrays in held.items()
                             if isinstance(arrays, dict) and what != "_slots"})

    def _trained(self):
        check_is_fitted(self)
        return self.network_

    def _fit(self, X, y, sample_weight, epochs, resume, processes=distributed.ALONE, shards=None):
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
        if processes.size > 1:
            said = {name: value if isinstance(value, (str, int, float, type(None))) else type(value).__name__
                    for name, value in self.get_params(deep=False).items()
                    if name not in ("n_threads", "random_state", "verbose")}
            processes.agree_on_build(**{
                "the parameters": said, "a fitted model": resume, "shards": shards,
                "the data": distributed.digest(read.values, read.lengths, targets, weights)})
        if not resume:
            self._build(read, targets, weights, processes)
        self._train(self._scaled(read), self._scaled_targets(targets), weights, rows, epochs, processes,
                    shards)
        return self

    def _check_parameters(self):
        dtype = self.dtype or "float32"
        checked(cell=self.cell, hidden_size=self.hidden_size, num_layers=self.num_layers,
                embed_size=self.embed_size, dropout=self.dropout, peepholes=self.peepholes,
                dtype=dtype, compute=self.compute)
        checks.choice("pooling", self.pooling, POOLING)
        checks.choice("schedule", self.schedule, ("constant", "cosine"))
        for name in ("embed_size", "epochs", "n_channels", "min_count"):
            checks.size(name, getattr(self, name))
        checks.fraction("validation", self.validation)
        if not callable(self.tokenizer):
            checks.choice("tokenizer", self.tokenizer, ("char", "word"))
        self._settings()

    def _settings(self, shards=None):
        named = ("batch_size", "optimizer", "lr", "weight_decay", "schedule", "patience")
        return Settings(**{name: getattr(self, name) for name in named}, clip=self.clip or 0.0,
                        momentum=0.0, validation=self.validation, shards=shards)

    def _new_optimizer(self):
        return new_optimizer(self.network_, self._settings())

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
                how = text.words if self.tokenizer == "word" else self.tokenizer
                self.vocabulary_ = text.Vocabulary.of_many(given, how, self.min_count)
            elif self.vocabulary_ is None:
                raise TypeError("X must hold numbers, as in fit, got strings")
            return sequences.from_texts(given, self.vocabulary_)
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

    def _build(self, read, targets, weights, processes):
        strings = self.vocabulary_ is not None
        own = "float32" if strings or self.compute else read.values.dtype
        self._dtype = np.dtype(self.dtype or own)
        rng = self._rng = np.random.default_rng(
            processes.bcast(check_random_state(self.random_state).randint(2**31)))
        if not strings:
            self._shift, self._scale = _moments(read.values, np.repeat(weights, read.lengths),
                                                self.standardize)
        self._set_up_targets(targets, weights)
        self.network_ = Network(
            len(self.vocabulary_) if strings else read.values.shape[1], self._n_outputs(),
            embed_size=self.embed_size if strings else 0, dtype=self._dtype, seed=rng,
            **{name: getattr(self, name) for name in (
                "cell", "hidden_size", "num_layers", "bidirectional", "peepholes", "forget_bias",
                "init", "pooling", "dropout", "compute", "n_threads")})
        if strings:
            table = self.network_.embedding.parameters()["weight"]
            table /= self.embed_size**0.5   # length 1: rare words keep their first vector, which is noise
            table[0] = 0                    # an unseen token says nothing
        self._optimizer = self._new_optimizer()
        self.n_iter_, self.loss_curve_, self.validation_curve_ = 0, [], []

    def _scaled(self, read):
        if self.vocabulary_ is not None:
            return read
        values = (read.values - self._shift) / self._scale
        return sequences.Sequences(values.astype(self._dtype, copy=False), read.lengths)

    def _train(self, read, targets, weights, rows, epochs, processes, shards):
        """Updates over `rows` of the sequences, for some epochs; see PARAMETERS."""
        settings = self._settings(shards)
        shards = settings.divide(processes)
        if shards:      # of ranks that have been trained differently before: rank 0 goes on
            self._rng.bit_generator.state = processes.bcast(self._rng.bit_generator.state)
            distributed.broadcast(self._optimizer.arrays(), processes)
            self._optimizer.steps = processes.bcast(self._optimizer.steps)
        source = Batches(read, targets, weights / weights[rows].mean(), rows, epochs=epochs,
                         batch_size=settings.batch_size, held_out=settings.validation,
                         rng=self._rng, loss=self._loss, shards=shards)
        trainer = Trainer(self.network_, source, settings, Budget(epochs=epochs),
                          optimizer=self._optimizer, shards=shards,
                          report=self._note if processes.rank == 0 else self._keep)
        self.history_ = trainer.history
        if trainer.run().outcome.startswith("SIG"):     # between two updates: now as ever
            signal.raise_signal(signal.Signals[trainer.outcome])
            raise KeyboardInterrupt         # a handler that comes back does not finish the fit

    def _note(self, record):
        self._keep(record)
        if self.verbose:
            held_out = record["validation"]
            print(f"epoch {self.n_iter_}: loss {record['loss']:.4f}"
                  + ("" if held_out is None else f", validation {held_out:.4f}"))

    def _keep(self, record):
        self.n_iter_ += 1
        self.loss_curve_.append(record["loss"])
        if record["validation"] is not None:
            self.validation_curve_.append(record["validation"])

    def _run(self, X):
        network = self._trained()
        return outputs(network, self._scaled(self._read(X, reset=False)))


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
