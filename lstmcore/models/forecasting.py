"""Forecaster: time series with an LSTMRegressor, by windows over the past.

A window of the series, and of columns known beside it, is one sequence; the next `horizon` values
are its targets. Longer forecasts roll on: what was forecast becomes past.
"""

import numpy as np

from lstmcore.models.estimators import LSTMRegressor
from lstmcore.module import check_size


class Forecaster:
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

    def __init__(self, window=24, horizon=1, *, season=1, anchored=True, regressor=None):
        self.window = check_size("window", window)
        self.horizon = check_size("horizon", horizon)
        self.season = check_size("season", season)
        self.anchored = bool(anchored)
        self.regressor = regressor
        if self.season > self.window:
            raise ValueError(f"season must be at most window = {window}, got {season}")

    def fit(self, series, exog=None):
        """Learn from a series (n,) and, beside it, columns exog (n, K); returns self.

        A forecast sees the exog of the steps that it forecasts: columns known ahead (a calendar, a
        price that is set). What is known only afterwards must be shifted by `horizon` rows first.
        """
        series, exog = self._check(series, exog)
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
        from sklearn.base import clone
        self.regressor_ = clone(self.regressor or LSTMRegressor(random_state=0))
        self.regressor_.fit(x, y)
        self._past, self._past_exog = series, exog
        return self

    def predict(self, steps=1, exog=None):
        """The `steps` values after the end of the series in fit, (steps,).

        exog : (m, K), what is known of the steps to come, if fit was given any; m is `steps`,
            rounded up to a multiple of `horizon`
        """
        self._check_fitted()
        steps = check_size("steps", steps)
        blocks = -(-steps // self.horizon)
        series, known = self._past, None
        if (exog is None) != (self._past_exog is None):
            raise ValueError("exog must be given to predict if, and only if, it was given to fit")
        if exog is not None:
            exog = _columns(exog)
            if exog.shape != (blocks * self.horizon, self._past_exog.shape[1]):
                raise ValueError(f"exog must be ({blocks * self.horizon}, "
                                 f"{self._past_exog.shape[1]}), got {exog.shape}")
            known = np.concatenate([self._past_exog, exog])
        for _ in range(blocks):
            series = np.concatenate([series, self._block(series, known, [len(series) - 1])[0]])
        return series[len(self._past):len(self._past) + steps]

    def backtest(self, series, start, exog=None):
        """Forecasts from every place of a series on, with the truth as past: how good is the model?

        series : (n,), the past and what came after, with exog (n, K) as in fit
        start : the index of the first value to be forecast
        Returns a dict: origins (m,), the last known index of each forecast; forecast, naive and
        actual, (m, horizon); mae and naive_mae, their mean absolute errors.
        """
        self._check_fitted()
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

    def plot(self, actual, path=None, *, exog=None, shown=None, title="Forecast"):
        """Draw the forecast of what came after fit, beside the naive one and the truth.

        actual : (steps,) what came after; exog as in predict; shown : how much of the past.
        Written to `path` if given (PNG, SVG, PDF). Returns the matplotlib figure.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("Forecaster.plot needs matplotlib: pip install 'lstmcore[plot]'") \
                from error
        actual = _series("actual", actual)
        forecast = self.predict(len(actual), exog)
        n = len(self._past)
        naive = self._past[n - self.season + np.arange(len(actual)) % self.season]
        past = self._past[-(shown or 3 * len(actual)):]
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(np.arange(n - len(past), n), past, color="#888", label="known")
        # Each line starts at the last known value, so that it is seen to go on from there.
        for values, style in ((actual, dict(color="black", label="actual")),
                              (naive, dict(color="C0", linestyle=":", label=_error(
                                  "naive", naive, actual))),
                              (forecast, dict(color="C3", label=_error(
                                  "LSTM", forecast, actual)))):
            axes.plot(np.arange(n - 1, n + len(actual)), np.r_[past[-1], values], **style)
        axes.axvline(n - 1, color="#bbb", linewidth=1)
        axes.set(title=title, xlabel="step")
        axes.margins(x=0.01)
        axes.grid(alpha=0.3)
        figure.legend(loc="outside lower center", ncols=4)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def _check(self, series, exog):
        series = _series("series", series)
        if exog is not None:
            exog = _columns(exog)
            if len(exog) != len(series):
                raise ValueError(f"exog must have a row per value of the series, {len(series)}, "
                                 f"got {len(exog)}")
        return series, exog

    def _check_fitted(self):
        if not hasattr(self, "regressor_"):
            raise ValueError("this Forecaster is not fitted yet: call fit first")

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
    values = np.asarray(values, np.float64)
    if values.ndim != 1:
        raise ValueError(f"{name} must be (n,), got {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return values


def _columns(exog):
    exog = np.asarray(exog, np.float64)
    if exog.ndim != 2:
        raise ValueError(f"exog must be (n, K), got {exog.shape}")
    if not np.isfinite(exog).all():
        raise ValueError("exog must be finite, got NaN or infinity")
    return exog
