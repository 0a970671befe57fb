"""LSTMClassifier and LSTMRegressor: sequences to classes, labels, tags or numbers, as scikit-learn does.

X may be a table (n, T), an array (n, T, C), a list of arrays (T_i, C) of different lengths, or a
list of strings; pandas objects and the arrays of other libraries too. What y is stands here, the rest
in `lstmcore.models.supervised`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import numpy as np

from lstmcore import checks, renames, scalars
from lstmcore._types import ArrayLike, Floats
from lstmcore.layers import sigmoid
from lstmcore.losses import bce_with_logits, mse_loss, softmax_cross_entropy
from lstmcore.models import supervised
from lstmcore.models.sequences import of_other_libraries
from lstmcore.models.sources import ROWS, PerStep
from lstmcore.models.supervised import SequenceEstimator, Weighted, moments

try:
    from sklearn.base import ClassifierMixin, RegressorMixin
    from sklearn.utils import check_array, column_or_1d
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import assert_all_finite, check_consistent_length
except ImportError as error:
    raise ImportError(supervised.NEEDS) from error

TRUSTED = 50        # held-out sequences, from which on they say how sure the classifier may be


@renames.checked
@dataclass(repr=False, eq=False)
class LSTMClassifier(ClassifierMixin, SequenceEstimator):
    """Sequences -> classes: an LSTM, its read-out, and cross-entropy.

    X is a table (n, T), an array (n, T, C), a list of arrays (T_i, C) of different lengths, or a
    list of strings; y holds n labels, or (n, K) zeros and ones for K labels that may come together,
    or with per_step=True n sequences of labels, one for each step. A DataFrame is a table (of one
    column of strings: a list of them), a Series is a list; arrays of PyTorch, h5py and xarray are
    arrays.

    With a held-out part (see validation) the probabilities are calibrated on it: the logits are
    divided by the one number, `temperature_`, with which its loss is least (Guo et al. 2017).

    >>> words = ["aab", "aba", "baa", "a", "xxy", "yx", "yxxy", "xy"]
    >>> model = LSTMClassifier(hidden_size=8, random_state=0).fit(words, list("llllrrrr"))
    >>> model.predict(["abaaba", "yyx"])
    array(['l', 'r'], dtype='<U1')
    >>> tagger = LSTMClassifier(8, per_step=True, random_state=0)
    >>> tagger = tagger.fit(words, [[letter in "ax" for letter in word] for word in words])
    >>> tagger.predict(["abx"])
    [array([ True, False,  True])]
    """

    _: KW_ONLY
    class_weight: Mapping[Any, float] | Literal["balanced"] | None = None
    per_step: bool = False

    _kind = "classes"       # or "labels", that may come together, or "steps"
    _usual_dropout = 0.3    # of numbers

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags

    def partial_fit(self, X: Any, y: ArrayLike, classes: ArrayLike | None = None,
                    sample_weight: ArrayLike | None = None) -> LSTMClassifier:
        """One epoch over X and y, going on from before. The first call must name all `classes`."""
        going_on = hasattr(self, "network_")
        checks.unmasked("classes", classes)
        if self.class_weight == "balanced":
            raise ValueError("class_weight='balanced' needs all data at once: give partial_fit the "
                             "weights as a dict")
        if not going_on:
            if classes is None:
                raise ValueError("classes must be passed on the first call to partial_fit")
            self.classes_ = np.unique(classes)
        elif classes is not None and not np.array_equal(self.classes_, np.unique(classes)):
            raise ValueError(f"classes must be those of the first call, {self.classes_}, "
                             f"got {np.unique(classes)}")
        self._classes_given = not going_on
        try:
            return self._fit(X, y, sample_weight, 1, going_on, partial=True)
        finally:
            del self._classes_given

    def predict_proba(self, X: Any) -> Any:
        """The probability of every class, (n, number of classes), in the order of `classes_`.

        With per_step a list of arrays (T_i, number of classes).
        """
        logits, read = self._run(X)
        logits = logits / logits.dtype.type(getattr(self, "temperature_", 1.0))
        if self._kind == "labels":
            return sigmoid(logits)
        e = np.exp(logits - logits.max(axis=1, keepdims=True))
        found = e / e.sum(axis=1, keepdims=True)
        return read.split(found) if self._kind == "steps" else found

    def predict(self, X: Any) -> Any:
        """The most probable class of each sequence, (n,).

        After a y of (n, K) that again, with ones where a label is more probable than not; with
        per_step a list of arrays (T_i,).
        """
        logits, read = self._run(X)
        if self._kind == "labels":
            return (logits > 0).astype(self._y_dtype)
        best = self.classes_[logits.argmax(axis=1)]
        return read.split(best) if self._kind == "steps" else best

    def score(self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """The share of X that `predict` gives the class y: all K labels, and with per_step of steps."""
        checks.unmasked("y", y), checks.unmasked("sample_weight", sample_weight)
        if not self.per_step:
            return super().score(X, y, sample_weight)
        predicted = self.predict(X)
        lengths = np.array([len(tags) for tags in predicted])
        right = np.concatenate(predicted) == self._tags(y, lengths)
        weights = None if sample_weight is None else np.repeat(sample_weight, lengths)
        return float(np.average(right, weights=weights))

    def _check_parameters(self):
        super()._check_parameters()
        if isinstance(self.class_weight, str):
            scalars.choice("class_weight", self.class_weight, ("balanced",))
        elif not isinstance(self.class_weight, (Mapping, type(None))):
            raise TypeError("class_weight must be a dict from class to weight, 'balanced' or None, got "
                            f"{type(self.class_weight).__name__}")

    def _encode_targets(self, y, lengths, reset):
        y = of_other_libraries(y)
        y = y.toarray() if hasattr(y, "toarray") else y     # a sparse matrix of labels
        kind = "steps" if self.per_step else "classes"
        if not self.per_step:
            try:
                shape = y.shape if hasattr(y, "shape") else np.asarray(y).shape
            except ValueError:
                raise ValueError("y must hold a label for each sequence, got lists of different lengths; "
                                 "for a label per step: per_step=True") from None
            kind = "labels" if len(shape) == 2 and shape[1] > 1 else kind
        if reset:
            self._kind = kind
        elif self._kind != kind:
            raise ValueError(f"y must hold {self._kind}, as in the first fit, got {kind}")
        if kind == "labels":
            return self._encode_labels(y, lengths, reset)
        y = self._tags(y, lengths) if kind == "steps" else column_or_1d(y, warn=True)
        if y.dtype.kind == "f":
            assert_all_finite(y, input_name="y")
        if len(kinds := {type(label).__name__ for label in y} if y.dtype == object else ()) > 1:
            raise TypeError("y must hold labels of one type, and one for every sequence; got "
                            + ", ".join(sorted(kinds)))
        check_classification_targets(y)
        if kind == "classes":
            check_consistent_length(lengths, y)
        if reset and not getattr(self, "_classes_given", False):
            self.classes_ = np.unique(y)
        unknown = np.setdiff1d(y, self.classes_)
        if len(unknown):
            raise ValueError(f"y must hold classes out of {self.classes_}, got {unknown}")
        return np.searchsorted(self.classes_, y)

    def _encode_labels(self, y, lengths, reset):
        y = check_array(y, dtype=None, input_name="y")
        check_consistent_length(lengths, y)
        if y.dtype.kind not in "biuf" or not np.isin(y, (0, 1)).all():
            raise ValueError("y should be a 1d array of labels, or (n, K) of zeros and ones for K labels "
                             f"that may come together; got an array of shape {y.shape} with other values")
        classes = np.arange(y.shape[1])
        if reset and not getattr(self, "_classes_given", False):
            self.classes_ = classes
        if not np.array_equal(self.classes_, classes):
            raise ValueError(f"y must be (n, {len(self.classes_)}), a column for each class of "
                             f"{self.classes_}, got {y.shape}")
        if reset:
            self._y_dtype = y.dtype
        return y.astype(np.int8)

    def _tags(self, y, lengths):
        """Labels for every step of all sequences, (steps,)."""
        check_consistent_length(lengths, y)
        rows = [np.asarray(of_other_libraries(list(row) if isinstance(row, str) else row)) for row in y]
        for n, (row, T) in enumerate(zip(rows, lengths)):
            if row.shape != (T,):
                raise ValueError(f"y[{n}] must hold a label for each of the {T} steps of X[{n}], got "
                                 f"{f'{row.size} labels' if row.ndim == 1 else f'shape {row.shape}'}")
        return np.concatenate([row for row in rows if len(row)] or rows)

    def _weighted(self, targets, weights, lengths):
        per_class = self._class_weights(targets, np.repeat(weights, lengths) if self._kind == "steps"
                                        else weights)
        if self._kind == "steps":
            return PerStep(targets, per_class[targets], lengths), weights
        if self._kind == "classes":
            return targets, weights * per_class[targets]
        return Weighted(targets, np.where(targets, *per_class) / targets.shape[1]), weights

    def _class_weights(self, targets, weights):
        """The weight of every class, (number of classes,); of labels (2, K): where they are, are not."""
        K, many = len(self.classes_), self._kind == "labels"
        if self.class_weight is None:
            return np.ones((2, K) if many else K)
        if isinstance(self.class_weight, Mapping):
            unknown = [key for key in self.class_weight if key not in self.classes_]
            if unknown:
                raise ValueError(f"class_weight must name classes out of {self.classes_}, got {unknown}")
            found = np.array([scalars.number("class_weight", self.class_weight.get(c, 1.0))
                              for c in self.classes_.tolist()])
            return np.stack([found, np.ones(K)]) if many else found
        if many:
            on = weights @ targets
            counts = np.stack([on, weights.sum() - on])
        else:
            counts = np.bincount(targets, weights, minlength=K)
        there = counts > 0
        return np.divide(counts.sum(axis=0), there.sum(axis=0) * counts, out=np.ones_like(counts),
                         where=there)

    def _strata(self, targets, rows):
        return targets[rows] if self._kind == "classes" else None

    def _n_outputs(self):
        return len(self.classes_)

    def _set_up_targets(self, targets, weights):
        self.temperature_ = 1.0

    def _scaled_targets(self, targets):
        return targets

    def _loss(self, outputs, targets, weights):
        if self._kind == "classes":
            return softmax_cross_entropy(outputs, targets, mask=weights, reduction="sum")
        targets, own = targets
        if self._kind == "steps":
            return softmax_cross_entropy(outputs, targets, mask=own * weights, reduction="sum")
        return bce_with_logits(outputs, targets.astype(outputs.dtype), mask=own * weights[:, None],
                               reduction="sum")

    def _calibrate(self, source):
        from scipy.optimize import minimize_scalar
        rows = source.held_out
        if len(rows) < TRUSTED:
            return
        pieces = [rows[at:at + ROWS] for at in range(0, len(rows), ROWS)]
        logits = []
        for some in pieces:
            x, lengths = source.sequences.batch(some)
            logits.append(self.network_(x, lengths=lengths)[0])
        weights = source.weights / source.weights[rows].sum()

        def loss(log_temperature):
            factor = np.exp(-log_temperature)
            return sum(self._loss(z * z.dtype.type(factor), source.targets[some], weights[some])[0]
                       for z, some in zip(logits, pieces))
        limit = np.log(4)       # beyond, too little was held out, or all of it is right
        self.temperature_ = float(np.exp(minimize_scalar(loss, bounds=(-limit, limit),
                                                         method="bounded").x))


class LSTMRegressor(RegressorMixin, SequenceEstimator):
    """Sequences -> numbers: an LSTM, its read-out, and squared error.

    X is a table (n, T), an array (n, T, C), a list of arrays (T_i, C) of different lengths, or a
    list of strings; y is (n,), or (n, K) for K numbers per sequence. Targets are standardized
    for training. A DataFrame is a table (of one column of strings: a list of them), a Series is a
    list; arrays of PyTorch, h5py and xarray are arrays. For time series, see `lstmcore.Forecaster`.

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
        return self._fit(X, y, sample_weight, 1, hasattr(self, "network_"), partial=True)

    def predict(self, X: Any) -> Floats:
        """The numbers of each sequence, shaped as y was: (n,) or (n, K)."""
        values = self._run(X)[0] * self._y_scale + self._y_shift
        return values[:, 0] if self._y_flat else values

    def score(self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """R², the share of the variance of y that `predict` explains."""
        checks.unmasked("y", y), checks.unmasked("sample_weight", sample_weight)
        return super().score(X, y, sample_weight)

    def _encode_targets(self, y, lengths, reset):
        y = check_array(of_other_libraries(y), ensure_2d=False, dtype=np.float64, input_name="y")
        check_consistent_length(lengths, y)
        if y.ndim > 2:
            raise ValueError(f"y must be (n,) or (n, K), got {y.shape}")
        flat, targets = y.ndim == 1, y.reshape(len(y), -1)
        if reset:
            self._y_flat = flat
        elif targets.shape[1] != len(self._y_shift):
            raise ValueError(f"y must hold {len(self._y_shift)} numbers per sequence, as in the "
                             f"first fit, got {targets.shape[1]}")
        return targets

    def _weighted(self, targets, weights, lengths):
        return targets, weights

    def _n_outputs(self):
        return len(self._y_shift)

    def _set_up_targets(self, targets, weights):
        self._y_shift, self._y_scale = moments(targets, weights, True)

    def _scaled_targets(self, targets):
        return ((targets - self._y_shift) / self._y_scale).astype(self._dtype)

    def _loss(self, outputs, targets, weights):
        return mse_loss(outputs, targets, mask=weights / outputs.shape[1], reduction="sum")


for _estimator, _own in ((LSTMClassifier, """
    class_weight : None | "balanced" | dict from class to weight
        How much a sequence (a step, with per_step; a label that is there) counts beside its
        sample_weight. "balanced": all classes the same in sum
    per_step : y has a label for every step, and so has a prediction; pooling has no part in it
"""), (LSTMRegressor, "\n")) if __doc__ else ():       # none under -OO
    _said = supervised.PARAMETERS.replace("\n    warm_start :", f"{_own[:-1]}\n    warm_start :", 1)
    _estimator.__doc__ = _estimator.__doc__.replace("\n\n    >>>", f"\n{_said}\n    >>>", 1)
