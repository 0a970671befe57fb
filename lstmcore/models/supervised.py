"""What LSTMClassifier and LSTMRegressor share: all but the targets.

It reads X, holds sequences out, builds the network, trains it in the training loop of all models, and
runs it. Apart from the two because they only say what y is, and what an output means.
"""

from __future__ import annotations

import json
import os
import signal
import warnings
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from lstmcore import checks, distributed, renames, scalars
from lstmcore._types import ArrayLike, Cell, Compute, Init, Path
from lstmcore.formats import disk, safetensors
from lstmcore.models import sequences, text
from lstmcore.models.network import POOLING, Model, Network, checked
from lstmcore.models.sources import ROWS, Batches, outputs
from lstmcore.models.training import Budget, Settings, Trainer, check_run, new_optimizer

NEEDS = ("LSTMClassifier and LSTMRegressor need scikit-learn 1.6 or newer: "
         "pip install 'lstmcore[sklearn]'")
try:
    from sklearn.base import BaseEstimator
    from sklearn.utils import check_array, check_random_state
    from sklearn.utils.validation import (_check_sample_weight, assert_all_finite,
                                          check_is_fitted, validate_data)
except ImportError as error:
    raise ImportError(NEEDS) from error

Self = TypeVar("Self", bound="SequenceEstimator")

RUN = "lstmcore.fit"        # where a checkpoint says how far a fit is
HELD_OUT = 0.1              # of the sequences, with validation="auto"
ENOUGH = 1000               # sequences; a tenth of fewer says too little to choose weights by
USUAL = {       # measured: see docs/accuracy.md
    "dropout": {"word": 0.5, "char": 0.3},
    "token_dropout": {"word": 0.4, "char": 0.0, "numbers": 0.0},
    "lr": {"word": 2e-3, "char": 1e-2, "numbers": 5e-3},
    "embed_size": {"word": 64, "char": 32},
    "min_count": {"word": 2, "char": 1}}
UPDATES, EPOCHS = 1500, (10, 100)
FREE = ("epochs", "patience", "n_threads", "verbose", "random_state", "warm_start")

PARAMETERS = """
    Parameters
    ----------
    hidden_size, num_layers, cell, bidirectional, peepholes, forget_bias, init
        The recurrent layers, as in `lstmcore.LSTM`; cell="gru" takes a
        `lstmcore.GRU`, "rnn" a vanilla `lstmcore.RNN`.
    pooling : "last" | "mean" | "max" | "mean+max"
        What of the hidden states is read out: the last, or the mean or maximum over all steps, or
        both side by side.
    dropout : probability, on embedded tokens, between layers, and before the read-out; by default 0.5
        for words, 0.3 for characters and for a classifier's numbers of 1000 sequences or more, else 0
    token_dropout : probability that a whole token is left out, in training; by default 0.4 for words
    n_channels : numbers per step in a two-dimensional X: its rows are (T·n_channels,)
    standardize : scale every channel to mean 0 and variance 1 over the training set
    tokenizer : "char" | "word" | function str -> list of str; for an X of strings
    embed_size, min_count
        Size of a token's vector, by default 64 of words and else 32; rarer tokens are one <unk>, by
        default words that are there once.
    epochs, batch_size, optimizer, lr, weight_decay, clip
        By default as many epochs as make 1500 updates, from 10 to 100. One update per batch; a set no
        larger than one batch is taken whole. lr is the learning rate, by default 0.01 for characters,
        0.005 for numbers and 0.002 for words. Gradients of a larger norm than clip are scaled down to
        it; None or 0: not.
        optimizer : "adam" | "adamw" | "sgd" | "rmsprop" | "adagrad"
    schedule : "constant" | "cosine" | "plateau", the learning rate over the epochs of one fit
    validation, patience
        A share of the training set that is held out: training stops after `patience` epochs
        without a better loss on it, and the best weights are kept. "auto": a tenth, and none of
        fewer than 1000 sequences, nor in `partial_fit`.
    warm_start : go on from the weights of the previous fit, and the optimizer's state
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


class Weighted:
    """Targets (n, K) and weights beside them."""

    def __init__(self, targets: np.ndarray, weights: np.ndarray) -> None:
        self._targets, self._weights = targets, weights

    def __getitem__(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Those of some rows."""
        return self._targets[rows], self._weights[rows]


@renames.checked
@dataclass(repr=False, eq=False)
class SequenceEstimator(Model, BaseEstimator):
    """Everything but the targets: reading X, building the network, training it, running it."""

    hidden_size: int = 128
    num_layers: int = 1
    _: KW_ONLY
    cell: Cell = "lstm"
    bidirectional: bool = True
    peepholes: bool = False
    forget_bias: float = 1.0
    init: Init = "glorot"
    pooling: Literal["last", "mean", "max", "mean+max"] = "mean+max"
    dropout: float | None = None
    token_dropout: float | None = None
    n_channels: int = 1
    standardize: bool = True
    tokenizer: Literal["char", "word"] | Callable[[str], list[str]] = "char"
    embed_size: int | None = None
    min_count: int | None = None
    epochs: int | None = None
    batch_size: int = 64
    optimizer: Literal["adam", "adamw", "sgd", "rmsprop", "adagrad"] = "adam"
    lr: float | None = None
    weight_decay: float = 0.0
    clip: float | None = 1.0
    schedule: Literal["constant", "cosine", "plateau"] = "cosine"
    validation: float | Literal["auto"] = "auto"
    patience: int = 10
    warm_start: bool = False
    dtype: Literal["float32", "float64"] | None = None
    compute: Compute | None = None
    n_threads: int | None = None
    verbose: bool = False
    random_state: int | np.random.RandomState | None = None

    _usual_dropout = 0.0
    per_step = False        # whether there is an output for every step

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    def fit(self: Self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None, *,
            checkpoint: Path | None = None, resume: Path | None = None,
            comm: Any = None, shards: int | None = None) -> Self:
        """Train on sequences X (see the class) and their targets y. Returns self.

        Parameters
        ----------
        checkpoint : a file to write the run to after every epoch
        resume : a checkpoint to go on from, with the same data and parameters (but more epochs, if
            wanted): the numbers are those of a fit without the break
        comm : a communicator of mpi4py, whose processes all make this call with the same data: each
            computes its share of every batch, and all end with the same network
        shards : parts of a batch whose gradients are summed in a fixed order: the bits depend on them,
            8 by default with a comm, and not on how many processes there are
        """
        going_on = self.warm_start and hasattr(self, "network_")
        if resume is not None and going_on:
            raise ValueError("resume begins with a checkpoint's weights, warm_start with those of the "
                             "fit before: use one of the two")
        with distributed.training(comm) as processes:
            if checkpoint is not None:
                processes.at_root(lambda: disk.check_writable(checkpoint))
            return self._fit(X, y, sample_weight, self.epochs, going_on, processes=processes,
                             shards=shards, checkpoint=checkpoint, resume=resume)

    def set_params(self: Self, **params: Any) -> Self:
        """Set parameters by their names, as scikit-learn does. Returns self."""
        renames.check(type(self), params)
        return super().set_params(**params)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        if packed := hasattr(self, "network_") and self.network_.packed():
            state["network_"] = packed
            if "_optimizer" in state:
                state["_optimizer"] = self._optimizer.state_dict()
        return state

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        super().__setstate__(renames.current(type(self), state))
        if isinstance(vars(self).get("network_"), dict):
            self.network_ = Network.unpacked(self.network_, self._rng)
        rule = vars(self).get("_optimizer")
        if isinstance(rule, dict):
            self._optimizer = self._new_optimizer()
            self._optimizer.load_state_dict(rule)
        if "clip_norm" in state:        # an older pickle, whose network called a layer embed
            for held in (vars(rule), rule._slots) if rule else ():
                held.update({what: {name.replace("embed.", "embedding."): a for name, a in arrays.items()}
                             for what, arrays in held.items()
                             if isinstance(arrays, dict) and what != "_slots"})

    def _trained(self):
        check_is_fitted(self)
        return self.network_

    def _fit(self, X, y, sample_weight, epochs, going_on, processes=distributed.ALONE, shards=None,
             checkpoint=None, resume=None, partial=False):
        self._check_parameters()
        checks.unmasked("y", y), checks.unmasked("sample_weight", sample_weight)
        if y is None:
            raise ValueError(f"{type(self).__name__} requires y to be passed, "
                             "but the target y is None")
        read = self._read(X, reset=not going_on)
        encoded = self._encode_targets(y, read.lengths, reset=not going_on)
        weights = _check_sample_weight(sample_weight, read.lengths, dtype=np.float64,
                                       ensure_non_negative=True)
        digest = distributed.digest(read.values, read.lengths, encoded, weights) \
            if processes.size > 1 or checkpoint is not None or resume is not None else ""
        targets, weights = self._weighted(encoded, weights, read.lengths)
        rows = np.flatnonzero(weights)
        if not rows.size:
            raise ValueError("sample_weight must hold a weight above zero, got only zeros")
        if processes.size > 1:
            processes.agree_on_build(**{
                "the parameters": self._said("n_threads", "random_state", "verbose"),
                "a fitted model": going_on, "shards": shards, "the data": digest})
        if not going_on:
            self._build(read, encoded, weights, processes)
        run = None if resume is None else processes.at_root(lambda: self._load_run(resume))
        self._train(self._scaled(read), self._scaled_targets(targets), weights, rows, epochs, processes,
                    shards, digest, checkpoint, run, whole=not partial)
        if not (partial or self.warm_start):
            del self._optimizer     # of a fit that nothing goes on from
        return self

    def _said(self, *without):
        """The parameters, as processes and checkpoints compare them."""
        return {name: value if isinstance(value, (str, int, float, type(None))) else type(value).__name__
                for name, value in self.get_params(deep=False).items() if name not in without}

    def _check_parameters(self):
        dtype = self.dtype or "float32"
        checked(cell=self.cell, hidden_size=self.hidden_size, num_layers=self.num_layers,
                embed_size=self.embed_size or 1, dropout=self.dropout or 0.0, peepholes=self.peepholes,
                dtype=dtype, compute=self.compute)
        scalars.choice("pooling", self.pooling, POOLING)
        scalars.choice("schedule", self.schedule, ("constant", "cosine", "plateau"))
        scalars.size("n_channels", self.n_channels)
        for name in ("embed_size", "epochs", "min_count"):
            if getattr(self, name) is not None:
                scalars.size(name, getattr(self, name))
        scalars.probability("token_dropout", self.token_dropout or 0.0)
        if isinstance(self.validation, str):
            scalars.choice("validation", self.validation, ("auto",))
        else:
            scalars.fraction("validation", self.validation)
        if not callable(self.tokenizer):
            scalars.choice("tokenizer", self.tokenizer, ("char", "word"))
        self._settings()

    def _settings(self, shards=None):
        named = ("batch_size", "optimizer", "weight_decay", "schedule", "patience")
        return Settings(**{name: getattr(self, name) for name in named}, clip=self.clip or 0.0,
                        lr=self._or_usual("lr"), momentum=0.0, validation=0.0, shards=shards)

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
                self.vocabulary_ = text.Vocabulary.of_many(given, how, self._or_usual("min_count"))
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
                X = validate_data(self, given, dtype=self._dtypes(), reset=reset)
            else:
                X = check_array(given, dtype=self._dtypes(), input_name="X")
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

    def _or_usual(self, name):
        """A parameter, or if it is None what is usual for such an X."""
        value = getattr(self, name)
        if value is not None:
            return value
        numbers = vars(self).get("vocabulary_") is None and name != "min_count"
        if numbers and name == "dropout":       # few: so that a weight of two is the sequence twice
            return self._usual_dropout if self._many else 0.0
        return USUAL[name]["numbers" if numbers else "word" if self.tokenizer == "word" else "char"]

    def _build(self, read, targets, weights, processes):
        strings = self.vocabulary_ is not None
        own = "float32" if strings or self.compute else read.values.dtype
        self._dtype = np.dtype(self.dtype or own)
        rng = self._rng = np.random.default_rng(
            processes.bcast(check_random_state(self.random_state).randint(2**31)))
        if not strings:
            self._shift, self._scale = moments(read.values, np.repeat(weights, read.lengths),
                                               self.standardize)
        self._set_up_targets(targets, weights)
        self._many = np.count_nonzero(weights) >= ENOUGH
        self.network_ = Network(
            len(self.vocabulary_) if strings else read.values.shape[1], self._n_outputs(),
            embed_size=self._or_usual("embed_size") if strings else 0, dtype=self._dtype, seed=rng,
            **{name: self._or_usual(name) for name in ("dropout", "token_dropout")},
            **{name: getattr(self, name) for name in (
                "cell", "hidden_size", "num_layers", "bidirectional", "peepholes", "forget_bias",
                "init", "compute", "n_threads")},
            pooling=None if self.per_step else self.pooling)
        if strings:
            table = self.network_.embedding.parameters()["weight"]
            table /= table.shape[1]**0.5    # length 1: rare words keep their first vector, which is noise
            table[0] = 0                    # an unseen token says nothing
        self._optimizer = self._new_optimizer()
        self.n_iter_, self.loss_curve_, self.validation_curve_ = 0, [], []

    def _scaled(self, read):
        if self.vocabulary_ is not None:
            return read
        values = (read.values - self._shift) / self._scale
        return sequences.Sequences(values.astype(self._dtype, copy=False), read.lengths)

    def _held_out(self, rows, targets, whole):
        """(rows to train on, rows held out): of every stratum the share of all. whole: of a fit."""
        share = self.validation
        if share == "auto":
            share = HELD_OUT if whole and len(rows) >= ENOUGH else 0.0
        n = int(np.ceil(share * len(rows)))
        if n == len(rows):
            raise ValueError(f"validation = {share} leaves none of {n} sequences to train on")
        if not n:
            return rows, rows[:0]
        rows = self._rng.permutation(rows)
        strata = self._strata(targets, rows)
        if strata is not None:
            order = np.argsort(strata, kind="stable")
            first = np.unique(strata[order], return_index=True)[1]      # each stays to be learned from
            others = np.delete(order, first)
            if n <= len(others):
                some = others[((np.arange(n) + self._rng.random()) * (len(others) / n)).astype(int)]
                rows = np.concatenate([rows[some], np.delete(rows, some)])
        return rows[n:], rows[:n]

    def _strata(self, targets, rows):
        """A number for each row, of which the held-out part shall have its share; None: no matter."""
        return None

    def _train(self, read, targets, weights, rows, epochs, processes, shards, digest, checkpoint, run,
               whole):
        """Updates over `rows` of the sequences, for some epochs; see PARAMETERS."""
        settings = self._settings(shards)
        shards = settings.divide(processes)
        if "_optimizer" not in vars(self):
            self._optimizer = self._new_optimizer()
        if shards:      # of ranks that have been trained differently before: rank 0 goes on
            self._rng.bit_generator.state = processes.bcast(self._rng.bit_generator.state)
            distributed.broadcast(self._optimizer.arrays(), processes)
            self._optimizer.steps = processes.bcast(self._optimizer.steps)
        training, held_out = self._held_out(rows, targets, whole)
        if epochs is None:
            epochs = int(np.clip(np.ceil(UPDATES / -(-len(training) // settings.batch_size)), *EPOCHS))
        source = Batches(read, targets, weights / weights[rows].mean(), training, epochs=epochs,
                          batch_size=settings.batch_size, held_out=held_out, rng=self._rng,
                          loss=self._loss, shards=shards, digest=digest)
        report = self._note if processes.rank == 0 else self._keep

        def note(record):
            report(record)
            if checkpoint is not None:
                self._save_run(checkpoint, trainer, source, record)
        trainer = Trainer(self.network_, source, settings, Budget(epochs=epochs),
                          optimizer=self._optimizer, shards=shards, report=note)
        if run:
            self._restore(trainer, source, run)
        self.history_ = trainer.history
        if trainer.run().outcome.startswith("SIG"):     # between two updates: now as ever
            signal.raise_signal(signal.Signals[trainer.outcome])
            raise KeyboardInterrupt         # a handler that comes back does not finish the fit
        self.network_.zero_grad()
        self._calibrate(source)

    def _calibrate(self, source):
        """What is set by the held-out part, after the weights."""

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

    def _save_run(self, path, trainer, source, record):
        if trainer.position:        # what an interrupt leaves in mid-epoch: the last file stands
            return
        weights, arrays, meta = trainer.snapshot()
        if trainer.shards and not trainer.shards.is_root:
            return
        arrays = {**arrays, "rows": source.rows, "held_out": source.held_out}
        said = {"parameters": self._said(*FREE), "order": self._rng.bit_generator.state}
        safetensors.write(path, {**weights, **{f"training.{name}": a for name, a in arrays.items()}},
                          {RUN: json.dumps({**meta, "estimator": said})})

    def _load_run(self, path):
        """(weights, arrays, meta) of the fit in a checkpoint, with these parameters."""
        name = os.fsdecode(path)
        arrays, metadata = safetensors.read(path)
        if RUN not in metadata:
            raise ValueError(f"{name} holds no fit of an estimator to resume")
        try:
            meta = json.loads(metadata[RUN])
            check_run(meta)
            then, now = meta["estimator"]["parameters"], self._said(*FREE)
            parts = {part: {key.removeprefix("training."): a for key, a in arrays.items()
                            if key.startswith("training.") == (part == "rest")}
                     for part in ("weights", "rest")}
            parts["rest"]["rows"], parts["rest"]["held_out"], meta["estimator"]["order"]["state"]
        except (KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
            raise ValueError(f"{name} holds a fit that is damaged or of another version of lstmcore: "
                             f"{error!r:.200}") from None
        for key in now:
            if then.get(key) != now[key]:
                raise ValueError(f"a resumed fit cannot change {key} from {then.get(key)} to {now[key]}")
        return parts["weights"], parts["rest"], meta

    def _restore(self, trainer, source, run):
        weights, arrays, meta = run
        rows, held_out = (arrays.pop(name).astype(np.intp) for name in ("rows", "held_out"))
        if meta["digest"] != source.digest:
            raise ValueError("a resumed fit needs the X, y and sample_weight that it began with")
        if not np.array_equal(np.sort(np.concatenate([rows, held_out])),
                              np.sort(np.concatenate([source.rows, source.held_out]))):
            raise ValueError("the checkpoint to resume names other sequences than those to train on")
        trainer.restore(arrays, meta, weights)
        source.rows, source.held_out = rows, held_out
        self._rng.bit_generator.state = meta["estimator"]["order"]
        for record in trainer.history:
            self._keep(record)

    def _run(self, X):
        """(outputs of every sequence, or of every step of all, and the sequences)."""
        network = self._trained()
        read = self._read(X, reset=False)
        if not read.lengths.all():
            warnings.warn(f"X[{np.argmin(read.lengths != 0)}] has no steps: what is predicted for it "
                          "says nothing but what the network puts out without any", stacklevel=3)
        return (per_step if self.per_step else outputs)(network, self._scaled(read)), read


def per_step(network: Network, read: sequences.Sequences) -> np.ndarray:
    """The outputs for all steps of all sequences, (steps, O), those of like length together."""
    order = np.argsort(read.lengths, kind="stable")
    found = np.empty((len(read.values), network.head.out_features), network.head.dtype)
    for at in range(0, len(order), ROWS):
        some = order[at:at + ROWS]
        x, lengths = read.batch(some)
        there, places = read.places(some)
        found[places] = network(x, lengths=lengths)[0][there]
    return found


def moments(values: np.ndarray, weights: np.ndarray,
            standardize: bool) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean and deviation of every column, (C,); a constant column has deviation 1."""
    C = values.shape[1]
    if not (standardize and weights.sum() > 0):
        return np.zeros(C), np.ones(C)
    mean = np.average(values, axis=0, weights=weights)
    deviation = np.sqrt(np.average((values - mean) ** 2, axis=0, weights=weights))
    # What rounding leaves of a constant column is not a deviation.
    constant = deviation <= 1e-12 * np.abs(mean)
    return mean, np.where(constant, 1.0, deviation)
