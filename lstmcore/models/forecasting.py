"""Forecaster: time series with LSTMRegressors, by windows over the past.

A window of the series, and of columns known beside it, is one sequence; the next `horizon` values
are its targets. Longer forecasts roll on: what was forecast becomes past.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lstmcore import checks, scalars
from lstmcore._types import ArrayLike, Path, Precision
from lstmcore.models.estimators import LSTMRegressor
from lstmcore.models.network import Model
from lstmcore.models.series import TRANSFORMS, Series, after, beside, numbers, panel
from lstmcore.models.supervised import NEEDS
from lstmcore.module import products

try:
    from sklearn.base import BaseEstimator, clone, is_regressor
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import check_is_fitted
except ImportError as error:
    raise ImportError(NEEDS) from error

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Forecaster(Model, BaseEstimator):
    """Forecasts series from windows of their past, block by block.

    Parameters
    ----------
    window : steps of the past that are looked at
    horizon : steps forecast at once. With horizon=1 a forecast of many steps is built step by step,
        each from the last; a larger horizon forecasts that many directly
    season : the naive forecast to compare with repeats the last `season` values: 1 for the last
        value, 12 for the same month a year ago
    anchored : windows and targets are measured from the naive forecast's values, so that what is
        learned is the change: for series with a trend
    transform : None, "log" for what grows and swings in proportion, "difference" to learn from the
        changes from step to step, "log difference" for both
    n_models : so many regressors, of as many seeds, whose forecasts are averaged
    calibration, folds
        Steps at the end on which the errors are measured that `predict_interval` needs, by models that
        have not seen them; and how many such stretches, one before the other. Each costs as many
        trainings again. 0: no intervals.
    regressor : an LSTMRegressor to use (copies are fitted); by default one of 32 units that trains
        for 30 epochs, its learning rate falling as a cosine. A validation="auto" is none here:
        windows overlap, so that some held out at random are known from their neighbors
    compute : "float32" or "bfloat16", of the regressor instead of its own, with its dtype then float32
    random_state : int, of the regressors, instead of the regressor's own

    Attributes
    ----------
    regressors_ : the fitted LSTMRegressors
    regressor_ : the first of them
    errors_ : with calibration, the absolute errors of its forecasts, (series of every fold, origins,
        steps ahead, D), of logs with a log; NaN where there is no value

    >>> t = np.arange(200)
    >>> series = np.sin(t / 4) + t / 50
    >>> model = Forecaster(window=30, horizon=10, n_models=2, regressor=LSTMRegressor(16, random_state=0))
    >>> forecast = model.fit(series[:180]).predict(20)
    >>> forecast.shape, bool(abs(forecast - series[180:]).mean() < 0.3)
    ((20,), True)
    """

    def __init__(self, window: int = 24, horizon: int = 1, *, season: int = 1, anchored: bool = True,
                 transform: Literal["log", "difference", "log difference"] | None = None,
                 n_models: int = 5, calibration: int = 0, folds: int = 1,
                 regressor: LSTMRegressor | None = None,
                 compute: Literal["float32", "bfloat16"] | None = None,
                 random_state: int | None = None) -> None:
        self.window, self.horizon, self.season = window, horizon, season
        self.anchored, self.transform = anchored, transform
        self.n_models, self.calibration, self.folds = n_models, calibration, folds
        self.regressor, self.compute, self.random_state = regressor, compute, random_state

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        super().__setstate__(state)
        if "_past" in state:        # an older pickle, of one series and one regressor
            given = vars(self)
            past, exog, index, name, columns = (given.pop(name) for name in (
                "_past", "_past_exog", "_index", "_name", "_exog_names"))
            given.update({**dict(transform=None, n_models=1, calibration=0, folds=1, random_state=None),
                          "regressors_": [self.regressor_], "_keys": None, "_missing": False})
            if index is not None:
                import pandas as pd
                past = pd.Series(past, index, name=name)
                exog = None if exog is None else pd.DataFrame(exog, index, columns=columns)
            self._panel = [self._prepare(Series(past, exog))]

    def fit(self, series: Any, exog: Any = None, *, comm: Any = None,
            shards: int | None = None) -> Forecaster:
        """Learn from a series (n,) and, beside it, columns exog (n, K); returns self.

        Parameters
        ----------
        series : (n,); or (n, D), D series at the same times that are forecast together; or a panel: a
            list of arrays or a dict of them, of any lengths, from which one model learns them all, each
            in its own scale. NaN where a value is missing: it is no target, and the network is told
        exog : columns beside the series; of a panel as many lists, or a dict with the same keys
        comm, shards : as for `LSTMRegressor.fit`

        Notes
        -----
        Both may be of pandas. The index then steps through dates, periods or integers; exog must have
        the same. Days of a working week may leave out holidays. Of any other uneven index the time
        from one step to the next is one more column that the network sees.

        A forecast sees the exog of the steps that it forecasts: columns known ahead (a calendar, a
        price that is set). What is known only afterwards must be shifted by `horizon` rows first.
        """
        self._check_parameters()
        found, keys = panel(series, exog)
        missing = any(np.isnan(one.values).any() for one in found)
        for one in found:
            self._prepare(one, scaled=keys is not None)
        if self.horizon > self.window and found[0].known is not None:
            raise ValueError(f"with exog, horizon must be at most window = {self.window}, "
                             f"got {self.horizon}")
        options = {} if comm is None and shards is None else dict(comm=comm, shards=shards)
        self._missing = missing
        for name in ("errors_", "_growth", "_scores"):
            vars(self).pop(name, None)
        if self.calibration:
            self._measure(found, options)
        self.regressors_ = self._train(found, 0, options)
        self.regressor_ = self.regressors_[0]
        self._panel, self._keys = found, keys
        return self

    def update(self, series: Any, exog: Any = None) -> Forecaster:
        """Take in what came after the series in fit, without training again; returns self.

        Parameters
        ----------
        series, exog : as in fit, the new values only; of a panel an entry for each of its series, of
            no length where nothing is new
        """
        self._trained()
        keys = [None] if self._keys is None else self._keys
        new, columns = ([series], [exog]) if self._keys is None else (
            beside("series", series, keys), beside("exog", exog, keys))
        self._panel = [one.extended(values, known).prepare(
            self.transform, self.season, False, self.anchored, like=one)
            for one, values, known in zip(self._panel, new, columns)]
        return self

    def predict(self, steps: int = 1, exog: Any = None, *, index: Any = None) -> Any:
        """The `steps` values after the end of the series, (steps,) or (steps, D).

        After a pandas Series, a Series again, whose index goes on from there; after a DataFrame a
        DataFrame; of a panel a list or a dict of such.

        Parameters
        ----------
        exog : (m, K), what is known of the steps to come, if fit was given any; m is `steps`,
            rounded up to a multiple of `horizon`; of a panel one for each series
        index : of pandas, the m times to come, where they cannot be told from the index so far
        """
        return self._form([(one.like(one.natural(level), times), ) for one, level, times
                           in self._ahead(steps, exog, index)])[0]

    def predict_interval(self, steps: int = 1, exog: Any = None, *, coverage: float = 0.8,
                         index: Any = None) -> Any:
        """(lower, upper) of `predict`, which a future value lies between with this probability.

        Split conformal prediction (Lei et al. 2018): the width is the quantile of the errors that were
        made on the stretches of `calibration`, relative to how they grow with the steps ahead; it holds
        as far as the future errs as those stretches do. Beyond its length the errors grow as the root
        of the steps.
        """
        self._trained()
        if not hasattr(self, "_scores"):
            raise ValueError("predict_interval needs errors to go by: fit with a calibration above 0")
        if not 0 < scalars.number("coverage", coverage) < 1:
            raise ValueError(f"coverage must be between 0 and 1, got {coverage}")
        found = []
        for one, level, times in self._ahead(steps, exog, index):
            width = self._width(scalars.size("steps", steps), coverage) * one.scale
            found.append(tuple(one.like(one.natural(level + sign * width), times) for sign in (-1, 1)))
        return tuple(self._form(found))

    def backtest(self, series: ArrayLike, start: int,
                 exog: ArrayLike | None = None) -> dict[str, Any]:
        """Forecasts from every place of a series on, with the truth as past: how good is the model?

        series : (n,) or (n, D), the past and what came after, with exog (n, K) as in fit
        start : the index of the first value to be forecast
        Returns a dict: origins (m,), the last known index of each forecast; forecast, naive and
        actual, (m, horizon) or (m, horizon, D); mae and naive_mae, their mean absolute errors.
        """
        self._trained()
        one = self._prepare(Series(series, exog), like=self._panel[0])
        self._check_columns(one)
        if not self.window <= start <= len(one) - self.horizon:
            raise ValueError(f"start must be in window..n - horizon = {self.window}.."
                             f"{len(one) - self.horizon}, got {start}")
        origins = np.arange(start - 1, len(one) - self.horizon)
        forecast = one.natural(self._paths(one, origins, self.horizon, one.known))
        naive = one.natural(one.level[origins[:, None] + 1 - self.season
                                      + np.arange(self.horizon) % self.season])
        actual = one.values[origins[:, None] + 1 + np.arange(self.horizon)]
        if one.flat:
            forecast, naive, actual = forecast[..., 0], naive[..., 0], actual[..., 0]
        return dict(origins=origins, forecast=forecast, naive=naive, actual=actual,
                    mae=float(np.nanmean(np.abs(forecast - actual))),
                    naive_mae=float(np.nanmean(np.abs(naive - actual))))

    def plot(self, actual: ArrayLike, path: Path | None = None, *, exog: ArrayLike | None = None,
             shown: int | None = None, title: str = "Forecast") -> Figure:
        """Draw the forecast of what came after fit, beside the naive one and the truth.

        actual : (steps,) what came after; exog as in predict; shown : how much of the past.
        Written to `path` if given (PNG, SVG, PDF). Returns the matplotlib figure.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("Forecaster.plot needs matplotlib: pip install 'lstmcore[plot]'") \
                from error
        self._trained()
        one = self._panel[0]
        if self._keys is not None or not one.flat:
            raise ValueError("plot draws one series, and this Forecaster has several")
        one.check_next("actual", actual)
        index = None if one.even else getattr(actual, "index", None)
        actual = numbers("actual", actual, missing=True)
        if actual.ndim != 1:
            raise ValueError(f"actual must be (n,), got {actual.shape}")
        forecast = np.asarray(self.predict(len(actual), exog, index=index))
        n, steps = len(one), self._steps(len(actual), index)
        known = one.natural(one.level)[:, 0]
        naive = known[n - self.season + np.arange(len(actual)) % self.season]
        past = one.values[-(shown or 3 * len(actual)):, 0]
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(steps[n - len(past):n], past, color="#888", label="known")
        # Each line starts at the last known value, so that it is seen to go on from there.
        for values, style in ((actual, dict(color="black", label="actual")),
                              (naive, dict(color="C0", linestyle=":", label=_error(
                                  "naive", naive, actual))),
                              (forecast, dict(color="C3", label=_error(
                                  "LSTM", forecast, actual)))):
            axes.plot(steps[n - 1:], np.r_[known[-1], values], **style)
        if hasattr(self, "_scores"):
            lower, upper = self.predict_interval(len(actual), exog, index=index)
            axes.fill_between(steps[n:], lower, upper, color="C3", alpha=0.15, linewidth=0,
                              label="80 % interval")
        axes.axvline(steps[n - 1], color="#bbb", linewidth=1)
        axes.set(title=title, xlabel="step")
        if steps.dtype.kind == "M":
            from matplotlib.dates import ConciseDateFormatter
            axes.xaxis.set_major_formatter(ConciseDateFormatter(axes.xaxis.get_major_locator()))
            axes.set(xlabel="")
        axes.margins(x=0.01)
        axes.grid(alpha=0.3)
        figure.legend(loc="outside lower center", ncols=2)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def _steps(self, ahead, index):
        """Where on the axis the known steps and those `ahead` of them stand: times, or numbers."""
        one = self._panel[0]
        if one.index is not None:
            index = one.index.append(after(one.index, ahead) if index is None else index)
            index = index.to_timestamp() if hasattr(index, "to_timestamp") else index
            if index.dtype.kind in "iM":
                return index.to_numpy()
        return np.arange(len(one) + ahead)

    def freeze(self, precision: Precision | None = None) -> Forecaster:
        """`lstmcore.Module.freeze` of all regressors. Returns self."""
        self._trained()
        for regressor in self.regressors_:
            regressor.freeze(precision)
        return self

    def unfreeze(self) -> Forecaster:
        """Let the weights change again, which are as before `freeze`. Returns self."""
        self._trained()
        for regressor in self.regressors_:
            regressor.unfreeze()
        return self

    def _check_parameters(self):
        for name in ("window", "horizon", "season", "n_models", "folds"):
            scalars.size(name, getattr(self, name))
        scalars.size("calibration", self.calibration, at_least=0)
        if self.transform not in TRANSFORMS:
            raise ValueError(f"transform must be one of {', '.join(map(repr, TRANSFORMS))}, "
                             f"got {self.transform!r}")
        products(self.compute, checks.F32)
        if self.season > self.window:
            raise ValueError(f"season must be at most window = {self.window}, got {self.season}")
        if self.regressor is not None and not is_regressor(self.regressor):
            raise TypeError("regressor must be an LSTMRegressor, "
                            f"got {type(self.regressor).__name__}")

    def _prepare(self, one, scaled=False, like=None):
        return one.prepare(self.transform, self.season, scaled, self.anchored, like)

    def _check_columns(self, one):
        """What a backtest is given must be like what was learned from."""
        for name, of in (("series", lambda one: one.values.shape[1]),
                         ("columns of exog", lambda one: 0 if one.known is None else one.known.shape[1])):
            if of(one) != of(self._panel[0]):
                raise ValueError(f"the {name} must be as many as in fit, {of(self._panel[0])}, "
                                 f"got {of(one)}")

    def _trained(self):
        check_is_fitted(self, "regressors_")
        return self.regressors_[0].network_

    def _train(self, found, left_out, options):
        """`n_models` regressors, trained on all windows but those with the last steps as targets."""
        x, y, weights = [], [], []
        for one in found:
            last = len(one) - self.horizon - left_out
            origins = np.arange(self.window - 1 + one._difference, last)
            if not len(origins):
                continue
            naive = self._naive(one.model[origins[:, None] + np.arange(1 - self.window, 1)])
            ahead = origins[:, None] + 1 + np.arange(self.horizon)
            targets = one.model[ahead] - naive if self.anchored else one.model[ahead]
            x.append(self._windows(one.model, one.observed, one.known, origins))
            y.append(targets.reshape(len(origins), -1))
            weights.append(one.observed[ahead].mean(axis=(1, 2)))
        if not x:
            longest = max(map(len, found))
            said = f" and {left_out} of calibration" if left_out else ""
            raise ValueError(f"series must have more than window + horizon - 1 = "
                             f"{self.window + self.horizon - 1} values{said}, got {longest}")
        x, y, weights = map(np.concatenate, (x, y, weights))
        if not weights.all():       # what has no value to be learned is no example
            x, y, weights = x[weights > 0], y[weights > 0], weights[weights > 0]
        if not len(x):
            raise ValueError("series must have values after its windows, got only NaN there")
        if not (weights == 1).all():
            options = dict(options, sample_weight=weights)
        regressors = self._regressors()
        for regressor in regressors:
            regressor.fit(x, y[:, 0] if y.shape[1] == 1 else y, **options)
        return regressors

    def _regressors(self):
        """`n_models` unfitted copies of the regressor, the first with its own random_state."""
        first = clone(self.regressor) if self.regressor is not None else LSTMRegressor(
            32, bidirectional=False, pooling="last", epochs=30, lr=1e-2, random_state=0)
        given = first.get_params()
        if self.compute:
            first.set_params(compute=self.compute, dtype="float32")
        if given.get("validation") == "auto":
            first.set_params(validation=0.0)
        named = [name for name in given if name.split("__")[-1] == "random_state"]
        if self.random_state is not None:
            first.set_params(**dict.fromkeys(named, self.random_state))
            given.update(dict.fromkeys(named, self.random_state))
        rng = check_random_state(given[named[0]]) if named else None
        found = [first]
        for _ in range(self.n_models - 1):
            found.append(clone(first).set_params(**{name: int(rng.randint(2**31)) for name in named}))
        return found

    def _measure(self, found, options):
        """The errors on the stretches of calibration, and what the intervals go by."""
        ahead, folds = self.calibration, []
        for fold in range(self.folds):
            end = fold * ahead          # so many steps of a series are not there yet
            self.regressors_ = self._train(found, end + ahead, options)
            folds += [self._errors(one, len(one) - end) for one in found]
        errors = np.stack(folds)
        if np.isnan(errors).all():
            raise ValueError("the stretch of calibration has no value to measure errors by")
        self.errors_ = errors
        counts = (~np.isnan(errors)).sum(axis=(0, 1))                       # (ahead, D)
        sums = np.nansum(errors, axis=(0, 1))
        # Of the last leads there are few errors: each takes its neighbors in, and none errs less
        # than those before it.
        reach = np.arange(ahead)
        near = np.abs(reach[:, None] - reach) <= 1 + reach[:, None] // 4
        mean = (near @ sums) / np.maximum(near @ counts, 1)
        self._growth = np.maximum.accumulate(np.maximum(mean, 1e-12), axis=0)
        self._scores = [np.sort(column[~np.isnan(column)]) for column in np.moveaxis(
            errors / self._growth, -1, 0)]

    def _errors(self, one, end):
        """Those of the forecasts from every place of the last steps before `end`, in its scale."""
        ahead = self.calibration
        errors = np.full((ahead, ahead, one.values.shape[1]), np.nan)
        origins = np.arange(max(end - 1 - ahead, self.window - 1 + one._difference), end - 1)
        if len(origins):
            paths = self._paths(one, origins, ahead, one.known)
            at = origins[:, None] + 1 + np.arange(ahead)
            there = (at < end)[..., None] & one.observed[np.minimum(at, end - 1)]
            wrong = np.abs(paths - one.level[np.minimum(at, end - 1)]) / one.scale
            errors[:len(origins)] = np.where(there, wrong, np.nan)
        return errors

    def _width(self, steps, coverage):
        """Half the interval of each step ahead, (steps, D), of the level in its scale."""
        quantile = []
        for scores in self._scores:
            rank = int(np.ceil((len(scores) + 1) * coverage)) - 1
            quantile.append(scores[min(rank, len(scores) - 1)])
        lead = np.arange(steps)
        known = len(self._growth)
        beyond = np.sqrt((1 + lead) / known)[:, None]
        growth = self._growth[np.minimum(lead, known - 1)] * np.maximum(beyond, 1)
        return growth * np.array(quantile)

    def _ahead(self, steps, exog, index):
        """(series, level of the steps to come (steps, D), their index) for each of the panel."""
        self._trained()
        steps = scalars.size("steps", steps)
        whole = -(-steps // self.horizon) * self.horizon
        given = [exog] if self._keys is None else beside("exog", exog, self._keys)
        times = [index] if self._keys is None else beside("index", index, self._keys)
        if any((one.exog is None) != (columns is None) for one, columns in zip(self._panel, given)):
            raise ValueError("exog must be given to predict if, and only if, it was given to fit")
        found = []
        for one, columns, time in zip(self._panel, given, times):
            if len(one) < self.window + one._difference:
                raise ValueError(f"a forecast needs window = {self.window} values before it, got "
                                 f"{len(one)}")
            time, known = one.ahead(whole, columns, time)
            level = self._paths(one, np.array([len(one) - 1]), steps, known)[0]
            found.append((one, level, None if time is None else time[:steps]))
        return found

    def _form(self, found):
        """Tuples for each series -> a tuple, each part in the form of the panel."""
        if self._keys is None:
            return found[0]
        parts = list(zip(*found))
        return tuple(dict(zip(self._keys, part)) if isinstance(self._keys, list) else list(part)
                     for part in parts)

    def _paths(self, one, origins, steps, known):
        """The level of the `steps` steps after each origin, (m, steps, D), each block from the last.

        known : as far ahead as there is any; what lies beyond is not asked for by who calls
        """
        past = one.model[origins[:, None] + np.arange(1 - self.window, 1)]
        observed = one.observed[origins[:, None] + np.arange(1 - self.window, 1)]
        found = []
        for block in range(-(-steps // self.horizon)):
            at = origins + block * self.horizon
            x = self._channels(past, observed, known, at)
            ahead = np.mean([regressor.predict(x) for regressor in self.regressors_], axis=0)
            ahead = ahead.reshape(len(origins), self.horizon, -1)
            if self.anchored:
                ahead = ahead + self._naive(past)
            found.append(ahead)
            past = np.concatenate([past, ahead], axis=1)[:, -self.window:]
            observed = np.concatenate([observed, np.ones(ahead.shape, bool)], axis=1)[:, -self.window:]
        return one.back(np.concatenate(found, axis=1)[:, :steps], origins)

    def _windows(self, model, observed, known, origins):
        """What the network sees for each origin, (m, window, channels)."""
        at = origins[:, None] + np.arange(1 - self.window, 1)
        return self._channels(model[at], observed[at], known, origins)

    def _channels(self, past, observed, known, origins):
        """Windows (m, window, D), which of it was observed, and what is known ahead of each origin.

        The columns beside the series run `horizon` steps ahead of it.
        """
        x = [past - past[:, -1:] if self.anchored else past]
        if self._missing:
            x.append(observed.astype(past.dtype))
        if known is not None:
            at = origins[:, None] + np.arange(1 - self.window, 1) + self.horizon
            x.append(known[np.minimum(at, len(known) - 1)])
        return np.concatenate(x, axis=2)

    def _naive(self, past):
        """The last `season` values of windows (m, window, D), repeated: (m, horizon, D)."""
        return past[:, self.window - self.season + np.arange(self.horizon) % self.season]


def _error(name, forecast, actual):
    return f"{name}, mean absolute error {np.nanmean(np.abs(forecast - actual)):.3g}"
