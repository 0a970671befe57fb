"""What a Forecaster reads: a series, several beside each other, or a panel of them, all as `Series`.

Values, the columns known beside them, and the index that says when; what is missing is filled from
the past alone, so that a forecast never sees what came later. Knows pandas if its objects come; no
network.
"""

import copy
import warnings

from typing import Any

import numpy as np

from lstmcore import checks

TRANSFORMS = (None, "log", "difference", "log difference")


class Series:
    """One series, or several at the same times, beside columns that are known ahead.

    values : (n, D), NaN where missing
    exog : (n, K), or None
    index : of pandas, or None; where it does not step evenly, the time since the step before is one
        more column of exog, in units of the median
    names : of the D series, and columns: of exog, as pandas has them
    flat : whether values came as (n,)
    """

    def __init__(self, series: Any, exog: Any = None) -> None:
        self.index, self.flat = _index(series), np.ndim(series) == 1
        self.names = series.name if hasattr(series, "name") else _columns_of(series)
        self.columns = _columns_of(exog)
        self.values = numbers("series", series, missing=True)
        if self.values.ndim not in (1, 2) or self.values.shape[1:] == (0,):
            raise ValueError(f"series must be (n,), or (n, D) for D series, got {self.values.shape}")
        self.values = self.values[:, None] if self.values.ndim == 1 else self.values
        empty = np.isnan(self.values).all(axis=0)
        if len(self.values) and empty.any():
            raise ValueError(f"series must hold a number, got only NaN in column {np.argmax(empty)}")
        self.exog = None if exog is None else numbers("exog", exog)
        if exog is not None:
            if self.exog.ndim != 2:
                raise ValueError(f"exog must be (n, K), got {self.exog.shape}")
            if len(self.exog) != len(self.values):
                raise ValueError(f"exog must have a row per value of the series, {len(self.values)}, "
                                 f"got {len(self.exog)}")
            other = _index(exog)
            if self.index is not None and other is not None and not self.index.equals(other):
                raise ValueError("exog must have the index of the series")
        self.even = self.index is None or not len(self.index) or steps_evenly(self.index)

    def __len__(self) -> int:
        return len(self.values)

    def prepare(self, transform: Any, season: Any, scaled: Any, anchored: Any, like: Any = None) -> Any:
        """Set `level`, `model` (n, D), what is forecast, and the scale that a panel needs.

        level : the values, filled and, if wanted, as logs
        model : the level, or its differences, scaled as those of `like`
        """
        self._log, self._difference = "log" in (transform or ""), "difference" in (transform or "")
        if self._log and not np.nanmin(self.values, initial=np.inf) > 0:
            raise ValueError(f"transform={transform!r} needs values above zero, got "
                             f"{np.nanmin(self.values)}")
        self.observed = ~np.isnan(self.values)
        with np.errstate(all="ignore"):
            level = np.log(self.values) if self._log else self.values
        self.level = filled(level, season)
        model = np.diff(self.level, axis=0, prepend=self.level[:1]) if self._difference else self.level
        if like is not None:
            self.shift, self.scale = like.shift, like.scale
            if not like.even and self.index is not None:
                self.even, self.usual = False, like.usual
        else:
            D = model.shape[1]
            self.shift, self.scale = np.zeros(D), np.ones(D)
            if scaled:
                spread = (np.diff(model, axis=0) if anchored else model).std(axis=0)
                self.scale = np.where(spread > 0, spread, 1.0)
                self.shift = self.shift if anchored else model.mean(axis=0)
        self.model = (model - self.shift) / self.scale
        self.known = self._known(self.index, self.exog)
        return self

    def _known(self, index, exog):
        """(n, K) known ahead of every step, or None."""
        columns = [] if exog is None else [exog]
        if not self.even:
            gaps = np.diff(when(index)).astype(float)
            self.usual = getattr(self, "usual", np.median(gaps))
            columns.append((np.r_[self.usual, gaps] / self.usual)[:, None])
        return np.concatenate(columns, axis=1) if columns else None

    def ahead(self, steps: Any, exog: Any, index: Any) -> Any:
        """(index of the steps to come, what is known of all steps up to them), checked."""
        if index is not None and self.index is None:
            raise ValueError("index must be given to predict only if the series in fit had one")
        if index is None and self.index is not None:
            index = after(self.index, steps)
        elif index is not None:
            import pandas as pd
            index = pd.Index(index) if not isinstance(index, pd.Index) else index
            if len(index) != steps or not np.all(np.diff(when(self.index[-1:].append(index))) > 0):
                raise ValueError(f"index must hold {steps} times, one after the other and after "
                                 f"{self.index[-1]}, got {', '.join(map(str, index[:3]))}, ...")
        if exog is not None:
            self.check_next("exog", exog, index)
            exog = numbers("exog", exog)
            if exog.shape != (steps, self.exog.shape[1]):
                raise ValueError(f"exog must be ({steps}, {self.exog.shape[1]}), got {exog.shape}")
            exog = np.concatenate([self.exog, exog])
        whole = None if index is None else self.index.append(index)
        return index, self._known(whole, exog)

    def check_next(self, name: Any, values: Any, index: Any = None) -> Any:
        """What comes after the series must say so, if it has an index, and have the columns of then."""
        columns, own = _columns_of(values), _index(values)
        if name == "exog" and columns and self.columns and columns != self.columns:
            raise ValueError(f"exog must have the columns {self.columns}, as in fit, got {columns}")
        if own is None or self.index is None or not len(own):
            return
        if index is None:
            index = after(self.index, len(own)) if self.even else own
        if not own.equals(index) or not when(own[:1])[0] > when(self.index[-1:])[0]:
            first = after(self.index, 1)[0] if self.even else f"a time after {self.index[-1]}"
            raise ValueError(f"{name} must go on where the series in fit ends, at {first}, "
                             f"step by step; got {own[0]} to {own[-1]}")

    def extended(self, series: Any, exog: Any) -> Any:
        """This series with more values after it, not yet prepared."""
        self.check_next("series", series)
        new = Series(series, exog)
        if new.values.shape[1] != self.values.shape[1]:
            raise ValueError(f"series must be {self._shape('m')}, as in fit, got "
                             f"{np.shape(series)}")
        if (exog is None) != (self.exog is None):
            raise ValueError("exog must be given to update if, and only if, it was given to fit")
        if self.index is not None and new.index is None:
            raise ValueError("series must have an index, as in fit")
        both = copy.copy(self)
        both.values = np.concatenate([self.values, new.values])
        if exog is not None:
            if new.exog.shape[1] != self.exog.shape[1]:
                raise ValueError(f"exog must be (m, {self.exog.shape[1]}), got {new.exog.shape}")
            both.exog = np.concatenate([self.exog, new.exog])
        if self.index is not None:
            both.index = self.index.append(new.index)
        return both

    def _shape(self, n):
        return f"({n},)" if self.flat else f"({n}, {self.values.shape[1]})"

    def back(self, model: Any, origins: Any) -> Any:
        """Forecasts (m, steps, D) of `model` after these origins -> of the level."""
        level = model * self.scale + self.shift
        if self._difference:
            level = np.cumsum(level, axis=1) + self.level[origins][:, None]
        return level

    def natural(self, level: Any) -> Any:
        """The level -> in the units of the values."""
        return np.exp(level) if self._log else level

    def like(self, values: Any, index: Any) -> Any:
        """Values (steps, D) of the steps to come, in the form in which the series came."""
        values = values[:, 0] if self.flat else values
        if index is None:
            return values
        import pandas as pd
        if self.flat:
            return pd.Series(values, index, name=self.names)
        return pd.DataFrame(values, index, columns=self.names)


def panel(series: Any, exog: Any) -> Any:
    """(list of Series, their keys or None): a panel is a list, a tuple or a dict of series."""
    if isinstance(series, dict):
        keys = list(series)
    elif isinstance(series, (list, tuple)) and len(series) and np.ndim(series[0]) \
            and hasattr(series[0], "shape"):
        keys = range(len(series))
    else:
        return [Series(series, exog)], None
    if not len(keys):
        raise ValueError("series must hold at least one series, got none")
    found = []
    for key, columns in zip(keys, beside("exog", exog, keys)):
        try:
            found.append(Series(series[key], columns))
        except (TypeError, ValueError) as error:
            raise type(error)(f"series[{key!r}]: {error}") from None
    for name, of in (("series", lambda one: one.values.shape[1]),
                     ("exog columns", lambda one: 0 if one.exog is None else one.exog.shape[1])):
        if len(counts := {of(one) for one in found}) > 1:
            raise ValueError(f"a panel must have as many {name} everywhere, got {sorted(counts)}")
    if len({one.even for one in found}) > 1:
        raise ValueError("a panel must have indexes that all step evenly, or none that does")
    return found, keys


def beside(name: Any, given: Any, keys: Any) -> Any:
    """What stands beside each series of a panel, with the same keys; Nones for None."""
    if given is None:
        return [None] * len(keys)
    if not isinstance(given, (dict, list, tuple)) or len(given) != len(keys):
        raise ValueError(f"{name} must have one entry for each of the {len(keys)} series of the panel")
    try:
        return [given[key] for key in keys]
    except KeyError as error:
        raise ValueError(f"{name} must have the keys of the panel; {error} is missing") from None


def filled(values: Any, season: Any) -> Any:
    """NaN -> the value a season before, else the last one, else (at the start) the first.

    >>> filled(np.array([[np.nan], [1], [2], [np.nan], [np.nan]]), 2)[:, 0].tolist()
    [1.0, 1.0, 2.0, 1.0, 2.0]
    """
    if not np.isnan(values).any():
        return values
    values = values.copy()
    for column in values.T:
        known = np.flatnonzero(~np.isnan(column))
        column[:known[0]] = column[known[0]]
        for t in np.flatnonzero(np.isnan(column)):
            column[t] = column[t - season] if t >= season else column[t - 1]
    return values


def numbers(name: Any, values: Any, missing: Any = False) -> Any:
    """An array of floats; finite, or with NaN for what is missing."""
    given = checks.unmasked(name, values)
    values = np.asarray(given)
    if values.dtype == object and hasattr(given, "to_numpy"):       # of pandas' own types, with its NA
        values = given.to_numpy(dtype=object, na_value=np.nan)
    kind = values.dtype.kind
    if kind not in "biufO" or kind == "O" and any(isinstance(v, str) for v in values.flat):
        raise TypeError(f"{name} must hold numbers, got {values.flat[0]!r}")
    values = values.astype(np.float64)
    if np.isinf(values).any() or not missing and np.isnan(values).any():
        raise ValueError(f"{name} must be finite, got {'' if missing else 'NaN or '}infinity")
    return values


def when(index: Any) -> Any:
    """The times of an index as numbers."""
    return index.asi8 if hasattr(index, "asi8") else np.asarray(index)


def steps_evenly(index: Any) -> Any:
    """Whether an index can be continued; ValueError unless it increases through times or integers."""
    if not (hasattr(index, "asi8") or index.dtype.kind in "iu") or not np.all(np.diff(when(index)) > 0):
        raise ValueError("the index of series must step forward, through dates, periods or integers; "
                         f"series.to_numpy() has none; got {', '.join(map(str, index[:3]))}, ...")
    return len(index) == 1 or _continued(index, 1) is not None


def after(index: Any, steps: Any) -> Any:
    """The pandas index of the `steps` steps that follow those of `index`."""
    found = _continued(index, steps)
    if found is None:
        raise ValueError("the series in fit did not step evenly: predict needs the times to forecast, "
                         f"index=...; got {', '.join(map(str, index[:3]))}, ...")
    return found


def _continued(index, steps):
    """The index of the steps after, or None if it does not step evenly."""
    import pandas as pd

    if isinstance(index, pd.PeriodIndex):
        even = index.equals(pd.period_range(index[0], periods=len(index), freq=index.freq))
        return pd.period_range(index[-1], periods=steps + 1, freq=index.freq)[1:] if even else None
    if isinstance(index, pd.DatetimeIndex):
        with warnings.catch_warnings():     # pandas 3 tells that pandas 4 returns another type
            warnings.simplefilter("ignore")
            freq = index.freq or (index.inferred_freq if len(index) > 2 else None)
        if freq is None and _business_days(index):
            freq = "B"
        return None if freq is None else pd.date_range(index[-1], periods=steps + 1, freq=freq)[1:]
    gaps = set(np.diff(index))
    if len(gaps) != 1:
        return None
    step = gaps.pop()
    return pd.RangeIndex(index[-1], index[-1] + step * (steps + 1), step)[1:]


def _business_days(index):
    """Whether these are the days of a working week, less some holidays."""
    days = np.diff(index.normalize().to_numpy().astype("datetime64[D]").astype(int))
    return bool(len(index) > 10 and (index.day_of_week < 5).all() and (index == index.normalize()).all()
                and np.mean(days == 1) > 0.7 and days.max() <= 6)


def _columns_of(values):
    """The names of the columns of a DataFrame; None of an array."""
    return list(values.columns) if hasattr(values, "columns") else None


def _index(values):
    """The index of a pandas object; None of an array or a list."""
    return values.index if hasattr(values, "to_numpy") and hasattr(values, "index") else None
