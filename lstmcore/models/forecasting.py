"""Forecaster: time series with an LSTMRegressor, by windows over the past.

A window of the series, and of columns known beside it, is one sequence; the next `horizon` values
are its targets. Longer forecasts roll on: what was forecast becomes past.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lstmcore import checks
from lstmcore._types import ArrayLike, Path
from lstmcore.models.estimators import LSTMRegressor
from lstmcore.models.network import Model
from lstmcore.module import products

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Forecaster(Model):
    """Forecasts a series from windows of its past, block by block.

    Parameters
    ----------
    window : steps of the past that are looked at
    horizon : steps forecast at once. With horizon=1 a forecast of many steps is built step by step,
        each from the last; a larger horizon forecasts that many directly
    season : the naive forecast to compare with repeats the last `season` values: 1 for the last
        value, 12 for the same month a year ago
    anchored : windows and targets are measured from the naive forecast's values, so that what is
        learned is the change: for series with a trend
    regressor : an LSTMRegressor to use (a copy is fitted); by default one of 32 units
    compute : "float32" or "bfloat16", of the regressor instead of its own, with its dtype then float32

    Attributes
    ----------
    regressor_ : the fitted LSTMRegressor

    >>> t = np.arange(200)
    >>> series = np.sin(t / 4) + t / 50
    >>> model = Forecaster(window=30, horizon=10, regressor=LSTMRegressor(16, random_state=0))
    >>> forecast = model.fit(series[:180]).predict(20)
    >>> forecast.shape, bool(abs(forecast - series[180:]).mean() < 0.3)
    ((20,), True)
    """

    def __init__(self, window: int = 24, horizon: int = 1, *, season: int = 1,
                 anchored: bool = True, regressor: LSTMRegressor | None = None,
                 compute: Literal["float32", "bfloat16"] | None = None) -> None:
        self.window = checks.size("window", window)
        self.horizon = checks.size("horizon", horizon)
        self.season = checks.size("season", season)
        self.anchored = bool(anchored)
        self.regressor, self.compute = regressor, compute
        products(compute, checks.F32)
        if self.season > self.window:
            raise ValueError(f"season must be at most window = {window}, got {season}")

    def fit(self, series: ArrayLike, exog: ArrayLike | None = None, *, comm: Any = None,
            shards: int | None = None) -> Forecaster:
        """Learn from a series (n,) and, beside it, columns exog (n, K); returns self.

        Both may be of pandas. The index of a Series must step evenly, through dates, periods or
        integers, and an exog beside it must have the same.

        A forecast sees the exog of the steps that it forecasts: columns known ahead (a calendar, a
        price that is set). What is known only afterwards must be shifted by `horizon` rows first.

        comm, shards : as for `LSTMRegressor.fit`
        """
        index, name, names = _index(series), getattr(series, "name", None), _names(exog)
        series, exog = self._check(series, exog)
        if index is not None and len(index):
            _after(index, 1)
        first, last = self.window - 1, len(series) - self.horizon
        if last <= first:
            raise ValueError(f"series must have more than window + horizon - 1 = "
                             f"{self.window + self.horizon - 1} values, got {len(series)}")
        if exog is not None and self.horizon > self.window:
            raise ValueError(f"with exog, horizon must be at most window = {self.window}, "
                             f"got {self.horizon}")
        origins = np.arange(first, last)
        x = self._windows(series, exog, origins)
        y = np.stack([series[t + 1:t + 1 + self.horizon] for t in origins])
        if self.anchored:
            y = y - self._naive(series, origins)
        from sklearn.base import clone, is_regressor
        if self.regressor is not None and not is_regressor(self.regressor):
            raise TypeError("regressor must be an LSTMRegressor, "
                            f"got {type(self.regressor).__name__}")
        self.regressor_ = clone(self.regressor or LSTMRegressor(random_state=0))
        if self.compute:
            self.regressor_.set_params(compute=self.compute, dtype="float32")
        if comm is None and shards is None:     # a pipeline's fit takes no more
            self.regressor_.fit(x, y)
        else:
            self.regressor_.fit(x, y, comm=comm, shards=shards)
        self._past, self._past_exog = series, exog
        self._index, self._name, self._exog_names = index, name, names
        return self

    def predict(self, steps: int = 1, exog: ArrayLike | None = None) -> Any:
        """The `steps` values after the end of the series in fit, (steps,).

        After a pandas Series, a Series again, whose index goes on from there.

        exog : (m, K), what is known of the steps to come, if fit was given any; m is `steps`,
            rounded up to a multiple of `horizon`
        """
        self._trained()
        steps = checks.size("steps", steps)
        blocks = -(-steps // self.horizon)
        series, known = self._past, None
        if (exog is None) != (self._past_exog is None):
            raise ValueError("exog must be given to predict if, and only if, it was given to fit")
        if exog is not None:
            self._check_next("exog", exog)
            exog = _columns(exog)
            if exog.shape != (blocks * self.horizon, self._past_exog.shape[1]):
                raise ValueError(f"exog must be ({blocks * self.horizon}, "
                                 f"{self._past_exog.shape[1]}), got {exog.shape}")
            known = np.concatenate([self._past_exog, exog])
        for _ in range(blocks):
            series = np.concatenate([series, self._block(series, known, [len(series) - 1])[0]])
        values = series[len(self._past):len(self._past) + steps]
        if self._index is None:
            return values
        from pandas import Series
        return Series(values, _after(self._index, steps), name=self._name)

    def backtest(self, series: ArrayLike, start: int,
                 exog: ArrayLike | None = None) -> dict[str, Any]:
        """Forecasts from every place of a series on, with the truth as past: how good is the model?

        series : (n,), the past and what came after, with exog (n, K) as in fit
        start : the index of the first value to be forecast
        Returns a dict: origins (m,), the last known index of each forecast; forecast, naive and
        actual, (m, horizon); mae and naive_mae, their mean absolute errors.
        """
        self._trained()
        series, exog = self._check(series, exog)
        if not self.window <= start <= len(series) - self.horizon:
            raise ValueError(f"start must be in window..n - horizon = {self.window}.."
                             f"{len(series) - self.horizon}, got {start}")
        origins = np.arange(start - 1, len(series) - self.horizon)
        actual = np.stack([series[t + 1:t + 1 + self.horizon] for t in origins])
        forecast = self._block(series, exog, origins)
        naive = self._naive(series, origins)
        return dict(origins=origins, forecast=forecast, naive=naive, actual=actual,
                    mae=float(np.abs(forecast - actual).mean()),
                    naive_mae=float(np.abs(naive - actual).mean()))

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
        self._check_next("actual", actual)
        actual = _series("actual", actual)
        forecast = np.asarray(self.predict(len(actual), exog))
        n, steps = len(self._past), self._steps(len(actual))
        naive = self._past[n - self.season + np.arange(len(actual)) % self.season]
        past = self._past[-(shown or 3 * len(actual)):]
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(steps[n - len(past):n], past, color="#888", label="known")
        # Each line starts at the last known value, so that it is seen to go on from there.
        for values, style in ((actual, dict(color="black", label="actual")),
                              (naive, dict(color="C0", linestyle=":", label=_error(
                                  "naive", naive, actual))),
                              (forecast, dict(color="C3", label=_error(
                                  "LSTM", forecast, actual)))):
            axes.plot(steps[n - 1:], np.r_[past[-1], values], **style)
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

    def _steps(self, ahead):
        """Where on the axis the known steps and those `ahead` of them stand: times, or numbers."""
        if self._index is not None:
            index = self._index.append(_after(self._index, ahead))
            index = index.to_timestamp() if hasattr(index, "to_timestamp") else index
            if index.dtype.kind in "iM":
                return index.to_numpy()
        return np.arange(len(self._past) + ahead)

    def _check_next(self, name, values):
        """What comes after fit must say so, if it has an index, and have the columns of then."""
        names, index = _names(values), _index(values)
        if name == "exog" and names and self._exog_names and names != self._exog_names:
            raise ValueError(f"exog must have the columns {self._exog_names}, as in fit, "
                             f"got {names}")
        if index is not None and self._index is not None and len(index):
            if not index.equals(_after(self._index, len(index))):
                first = _after(self._index, 1)[0]
                raise ValueError(f"{name} must go on where the series in fit ends, at {first}, "
                                 f"step by step; got {index[0]} to {index[-1]}")

    def _check(self, series, exog):
        index, other = _index(series), _index(exog)
        if index is not None and other is not None and not index.equals(other):
            raise ValueError("exog must have the index of the series")
        series = _series("series", series)
        if exog is not None:
            exog = _columns(exog)
            if len(exog) != len(series):
                raise ValueError(f"exog must have a row per value of the series, {len(series)}, "
                                 f"got {len(exog)}")
        return series, exog

    def _trained(self):
        if not hasattr(self, "regressor_"):
            raise ValueError("this Forecaster is not fitted yet: call fit first")
        return self.regressor_.network_

    def _block(self, series, exog, origins):
        """The `horizon` values after each origin, (m, horizon)."""
        origins = np.asarray(origins)
        values = self.regressor_.predict(self._windows(series, exog, origins))
        values = values.reshape(len(origins), self.horizon)
        return values + self._naive(series, origins) if self.anchored else values

    def _windows(self, series, exog, origins):
        """What the network sees for each origin, (m, window, 1 + K).

        The columns beside the series run `horizon` steps ahead of it.
        """
        at = origins[:, None] + np.arange(1 - self.window, 1)
        x = series[at][:, :, None]
        if self.anchored:
            x = x - x[:, -1:]
        if exog is None:
            return x
        return np.concatenate([x, exog[at + self.horizon]], axis=2)

    def _naive(self, series, origins):
        """The last `season` values before each origin, repeated: (m, horizon)."""
        ahead = np.arange(self.horizon) % self.season
        return series[origins[:, None] + 1 - self.season + ahead]


def _error(name, forecast, actual):
    return f"{name}, mean absolute error {np.abs(forecast - actual).mean():.3g}"


def _series(name, values):
    values = _numbers(name, values)
    if values.ndim != 1:
        raise ValueError(f"{name} must be (n,), got {values.shape}")
    return values


def _columns(exog):
    exog = _numbers("exog", exog)
    if exog.ndim != 2:
        raise ValueError(f"exog must be (n, K), got {exog.shape}")
    return exog


def _numbers(name, values):
    values = np.asarray(checks.unmasked(name, values))
    kind = values.dtype.kind
    if kind not in "biufO" or kind == "O" and any(isinstance(v, str) for v in values.flat):
        raise TypeError(f"{name} must hold numbers, got {values.flat[0]!r}")
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return values


def _names(exog):
    """The names of the columns of a DataFrame; None of an array."""
    return list(exog.columns) if hasattr(exog, "columns") else None


def _index(values):
    """The index of a pandas object; None of an array or a list."""
    return values.index if hasattr(values, "to_numpy") else None


def _after(index, steps):
    """The pandas index of the `steps` steps that follow those of `index`."""
    import pandas as pd

    if isinstance(index, pd.PeriodIndex):
        after = pd.period_range(index[-1], periods=steps + 1)
        even = index.equals(pd.period_range(index[0], periods=len(index)))
    elif isinstance(index, pd.DatetimeIndex):
        with warnings.catch_warnings():     # pandas 3 tells that pandas 4 returns another type
            warnings.simplefilter("ignore")
            freq = index.freq or index.inferred_freq
        even = freq is not None and index[0] < index[-1]
        after = pd.date_range(index[-1], periods=steps + 1, freq=freq) if even else None
    else:
        gaps = set(np.diff(index)) if index.dtype.kind in "iu" else ()
        even = len(gaps) == 1 and (step := gaps.pop()) > 0
        after = pd.RangeIndex(index[-1], index[-1] + step * (steps + 1), step) if even else None
    if not even:
        raise ValueError("the index of series must step evenly, through dates, periods or "
                         "integers, to be continued: series.asfreq(...) or series.to_numpy() may "
                         f"help; got {', '.join(map(str, index[:3]))}, ...")
    return after[1:]
