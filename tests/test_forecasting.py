"""The Forecaster: honest forecasts, indexes, panels, intervals, and what is wrong by its name."""

import copy
import pickle

import numpy as np
import pytest

pytest.importorskip("sklearn")

from sklearn.base import clone  # noqa: E402
from sklearn.exceptions import NotFittedError  # noqa: E402
from test_estimators import one_thread, small  # noqa: E402, F401

from lstmcore import Forecaster, LSTMClassifier  # noqa: E402


def wave(n):
    t = np.arange(n)
    return np.sin(2 * np.pi * t / 12) + t / 40


@pytest.mark.parametrize("horizon", [1, 12])
def test_forecaster_beats_the_naive_forecast_of_a_seasonal_trend(horizon, tmp_path):
    series = wave(160)
    model = Forecaster(window=24, horizon=horizon, season=12, n_models=1,
                       regressor=small(hidden_size=16, epochs=60))
    model.fit(series[:136])
    assert np.abs(model.predict(24) - series[136:]).mean() < 0.15       # naive: 0.45
    report = model.backtest(series, start=136)
    assert report["forecast"].shape == report["actual"].shape == (25 - horizon, horizon)
    np.testing.assert_allclose(report["naive_mae"], 12 / 40)            # the trend of a season
    assert report["mae"] < report["naive_mae"] / 3
    np.testing.assert_allclose(report["forecast"][0], model.predict(horizon))
    pytest.importorskip("matplotlib")
    figure = model.plot(series[136:], tmp_path / "forecast.png")
    lines = {line.get_label().split(",")[0]: line.get_ydata() for line in figure.axes[0].lines}
    np.testing.assert_array_equal(lines["LSTM"][1:], model.predict(24))
    np.testing.assert_array_equal(lines["naive"][1:], np.tile(series[124:136], 2))
    assert (tmp_path / "forecast.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("horizon", [1, 3])
def test_forecaster_sees_the_exogenous_columns_of_the_steps_to_come(horizon):
    rng = np.random.default_rng(0)
    exog = rng.standard_normal((220, 1))
    series = exog[:, 0] * 2 + 5                     # known from the columns alone
    model = Forecaster(window=6, horizon=horizon, anchored=False, n_models=1,
                       regressor=small(hidden_size=16, epochs=60))
    model.fit(series[:214], exog[:214])
    got = model.predict(6, exog[214:])
    assert np.abs(got - series[214:]).mean() < 0.7                      # naive: about 2
    with pytest.raises(ValueError, match="exog must be given"):
        model.predict(6)
    with pytest.raises(ValueError, match=r"exog must be \(6, 1\)"):
        model.predict(6, exog[:2])


@pytest.mark.parametrize("start, freq, unit", [("2024-01-31", "ME", "datetime"),
                                               ("2024-03-30 22:00", "h", "datetime"),
                                               ("2024-01-01", "D", "period"), (7, 5, "integer")])
def test_forecast_of_a_series_goes_on_with_its_index(start, freq, unit, tmp_path):
    pd = pytest.importorskip("pandas")
    if unit == "integer":
        index = pd.RangeIndex(start, start + 5 * 48, freq)
    elif unit == "period":
        index = pd.period_range(start, periods=48, freq=freq)
    else:
        index = pd.DatetimeIndex(list(pd.date_range(start, periods=48, freq=freq)))    # no freq
    series, exog = pd.Series(wave(48), index, name="sales"), pd.DataFrame({"a": wave(48)}, index)
    model = Forecaster(window=12, horizon=3, n_models=2, regressor=small())
    got = model.fit(series[:40], exog[:40]).predict(5, exog[40:46])
    assert got.name == "sales" and got.index.equals(index[40:45])
    plain = model.fit(wave(48)[:40], wave(48)[:40, None]).predict(5, wave(48)[40:46, None])
    np.testing.assert_array_equal(got, plain)
    model.fit(series[:40])
    with pytest.raises(ValueError, match="actual must go on where the series in fit ends"):
        model.plot(series[41:45])
    pytest.importorskip("matplotlib")
    model.plot(series[40:46], tmp_path / "forecast.png")


def test_forecaster_names_what_is_wrong_in_a_series():
    pd = pytest.importorskip("pandas")
    dates = pd.date_range("2024-01-01", periods=40)
    series, exog = pd.Series(wave(40), dates), pd.DataFrame({"a": 1.0, "b": wave(40)}, dates)
    model = Forecaster(window=12, n_models=1, regressor=small())
    for uneven in (series[::-1], series.set_axis(list(map(str, dates)))):
        with pytest.raises(ValueError, match="must step forward"):
            model.fit(uneven)
    with pytest.raises(ValueError, match="exog must have the index of the series"):
        model.fit(series[1:], exog[:-1])
    model.fit(series[:30], exog[:30])
    with pytest.raises(ValueError, match=r"columns \['a', 'b'\], as in fit, got \['b', 'a'\]"):
        model.predict(1, exog[["b", "a"]][30:31])
    with pytest.raises(ValueError, match="exog must go on where the series in fit ends"):
        model.predict(1, exog[31:32])
    with pytest.raises(TypeError, match="must hold numbers"):
        model.fit(series.astype(str))


def test_forecaster_names_what_is_wrong():
    for options, said in ((dict(window=0), "window must be at"), (dict(window=3, season=4), "must be at"),
                          (dict(transform="root"), "transform must be one of"),
                          (dict(n_models=0), "n_models must be"), (dict(calibration=-1), "calibration")):
        with pytest.raises(ValueError, match=said):
            Forecaster(**options).fit(np.arange(60.0))
    with pytest.raises(NotFittedError, match="not fitted"):
        Forecaster().predict(3)
    for series, said in ((np.ones((4, 2, 2)), r"must be \(n,\), or"), (np.full(60, np.nan), "only NaN"),
                         (np.full(60, np.inf), "finite"),
                         (np.ones(24), "more than window")):
        with pytest.raises(ValueError, match=said):
            Forecaster(window=24).fit(series)
    with pytest.raises(TypeError, match="regressor must be an LSTMRegressor"):
        Forecaster(window=4, regressor=small(LSTMClassifier)).fit(np.arange(30.0))
    with pytest.raises(ValueError, match="a row per value"):
        Forecaster(window=4).fit(np.arange(30.0), np.ones((29, 1)))


def forecaster(**options):
    return Forecaster(**{**dict(window=12, horizon=3, n_models=1, regressor=small(
        hidden_size=12, epochs=30, lr=0.02)), **options})


def test_a_forecaster_is_cloned_pickled_and_searched_like_an_estimator():
    model = forecaster(season=3)
    assert clone(model).get_params()["season"] == 3 and "hidden_size=12" in repr(model)
    model.set_params(regressor__hidden_size=6, window=9)
    model.fit(wave(60))
    assert model.regressor_.network_.recurrent.hidden_size == 6
    want = model.predict(5)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).predict(5), want)
    with pytest.raises(NotFittedError):
        clone(model).predict()
    np.testing.assert_array_equal(clone(model).fit(wave(60)).predict(5), want)


@pytest.mark.parametrize("indexed", [False, True])
def test_a_pickle_of_a_forecaster_with_the_attributes_of_before_goes_on(indexed):
    series, exog, later = wave(60), np.cos(np.arange(60.0))[:, None], np.ones((6, 1))
    if indexed:
        pd = pytest.importorskip("pandas")
        index = pd.date_range("2024-01-01", periods=60)
        series, exog = pd.Series(series, index, name="sales"), pd.DataFrame({"a": exog[:, 0]}, index)
    model = forecaster().fit(series, exog)
    old = copy.copy(model)
    for new in ("transform", "n_models", "calibration", "folds", "random_state", "regressors_", "_panel",
                "_keys", "_missing"):
        delattr(old, new)
    old._past, old._past_exog = wave(60), np.cos(np.arange(60.0))[:, None]
    old._index, old._name, old._exog_names = (index, "sales", ["a"]) if indexed else (None,) * 3
    loaded = pickle.loads(pickle.dumps(old))
    np.testing.assert_array_equal(loaded.predict(5, later), model.predict(5, later))
    assert not indexed or loaded.predict(5, later).index.equals(model.predict(5, later).index)
    assert repr(loaded.fit(series, exog)) == repr(model)


def test_a_forecast_is_the_mean_of_seeds():
    model = forecaster(n_models=3, horizon=4).fit(wave(60))
    alone, forecasts = copy.copy(model), []
    for regressor in model.regressors_:
        alone.regressors_ = [regressor]
        forecasts.append(alone.predict(4))
    np.testing.assert_allclose(model.predict(4), np.mean(forecasts, axis=0), rtol=1e-12)
    assert np.ptp(forecasts, axis=0).min() > 0 and model.regressor_ is model.regressors_[0]
    np.testing.assert_array_equal(forecasts[0], forecaster(horizon=4).fit(wave(60)).predict(4))


@pytest.mark.parametrize("transform, series", [
    (None, wave(80)), ("log", np.exp(wave(80))), ("difference", np.cumsum(wave(80))),
    ("log difference", np.exp(np.cumsum(wave(80)) / 50))])
def test_what_is_learned_through_a_transform_is_forecast_in_the_units_of_the_series(transform, series):
    model = forecaster(window=24, season=12, horizon=6, transform=transform,
                       regressor=small(hidden_size=16, epochs=60)).fit(series[:68])
    got, spread = model.predict(12), np.abs(series[68:] - series[67]).mean()
    assert np.abs(got - series[68:]).mean() < spread / 3
    if transform:
        report = model.backtest(series, start=68)
        np.testing.assert_allclose(report["forecast"][0], got[:6], rtol=1e-9)
        np.testing.assert_allclose(report["naive"][0], (
            series[56:62] if transform == "log" else report["naive"][0]), rtol=1e-12)
    with pytest.raises(ValueError, match="needs values above zero, got -1"):
        forecaster(transform="log").fit(np.r_[-1.0, series])


def test_new_values_are_taken_in_without_training():
    series, exog = wave(90), np.cos(np.arange(90.0))[:, None]
    model = forecaster().fit(series[:70], exog[:70])
    weights = model.regressor_.network_.state_dict()
    model.update(series[70:73], exog[70:73]).update(series[73:80], exog[73:80])
    report = model.backtest(series[:83], start=80, exog=exog[:83])
    np.testing.assert_allclose(model.predict(3, exog[80:83]), report["forecast"][0], rtol=1e-12)
    for name, p in model.regressor_.network_.parameters().items():
        np.testing.assert_array_equal(p, weights[name])
    with pytest.raises(ValueError, match="exog must be given to update"):
        model.update(series[80:])
    pd = pytest.importorskip("pandas")
    dates = pd.date_range("2024-01-01", periods=90)
    dated = forecaster().fit(pd.Series(series, dates)[:70]).update(pd.Series(series, dates)[70:80])
    assert dated.predict(4).index.equals(dates[80:84])
    with pytest.raises(ValueError, match="must go on where the series in fit ends"):
        dated.update(pd.Series(series, dates)[81:])


def test_a_panel_has_one_model_and_the_scale_of_each():
    t = np.arange(120)
    shapes = [np.sin(t / 5), np.sin(t / 5 + 1), np.sin(t / 5 + 2)[30:]]
    panel = {"a": 2 + shapes[0], "b": 1000 * shapes[1], "c": shapes[2] / 100 - 5}
    known = {name: values[:-6] for name, values in panel.items()}
    model = forecaster(horizon=6).fit(known)
    got = model.predict(6)
    for name, values in panel.items():
        assert np.abs(got[name] - values[-6:]).mean() < 0.25 * np.ptp(values)
    same = forecaster(horizon=6).fit(list(known.values())).predict(6)
    assert isinstance(same, list)
    for one, other in zip(same, got.values()):
        np.testing.assert_array_equal(one, other)
    model.update({"a": panel["a"][-6:], "b": panel["b"][-6:-3], "c": panel["c"][:0]})
    np.testing.assert_array_equal(model.predict(6)["c"], got["c"])
    assert (model.predict(6)["a"] != got["a"]).all()
    with pytest.raises(ValueError, match="one entry for each of the 3 series"):
        model.update({"a": [1.0]})
    with pytest.raises(ValueError, match="series\\['b'\\]: series must be finite"):
        forecaster().fit({"a": wave(60), "b": np.full(60, np.inf)})
    with pytest.raises(ValueError, match="as many exog columns everywhere, got \\[1, 2\\]"):
        forecaster().fit([wave(60)] * 2, [np.ones((60, 1)), np.ones((60, 2))])


def test_series_at_the_same_times_are_forecast_together():
    pd = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    lead = rng.standard_normal(240).cumsum()
    both = np.stack([lead[1:], lead[:-1]], axis=1)          # the second was the first a step ago
    frame = pd.DataFrame(both, pd.date_range("2024-01-01", periods=239), columns=["x", "y"])
    model = forecaster(horizon=1).fit(frame[:200])
    got = model.predict(2)
    assert list(got.columns) == ["x", "y"] and got.index.equals(frame.index[200:202])
    report = model.backtest(frame, start=200)
    assert report["forecast"].shape == report["actual"].shape == (39, 1, 2)
    wrong = np.abs(report["forecast"] - report["actual"])[:, 0].mean(axis=0)
    assert wrong[1] < np.abs(np.diff(lead)).mean() / 3 < wrong[0]
    np.testing.assert_array_equal(forecaster(horizon=1).fit(both[:200]).predict(2), got)
    with pytest.raises(ValueError, match="plot draws one series"):
        model.plot(frame["x"][200:])


def test_what_is_missing_is_no_target_and_is_not_seen_from_the_future():
    from lstmcore.models.series import filled
    series = wave(200)
    gaps = series.copy()
    gaps[np.random.default_rng(0).choice(180, 30, replace=False)] = np.nan
    model = forecaster(season=12, horizon=4).fit(gaps[:188])
    assert np.abs(model.predict(12) - series[188:]).mean() < 0.3
    report = model.backtest(np.r_[series[:190], np.nan, series[191:]], start=188)
    assert np.isnan(report["actual"]).any() and np.isfinite([report["mae"], report["naive_mae"]]).all()
    for t in range(1, 60):      # what is filled in never changes with what comes later
        column = gaps[:t, None]
        if not np.isnan(column).all():
            np.testing.assert_array_equal(filled(column, 12)[~np.isnan(gaps[:t]).cumprod().astype(bool)],
                                          filled(gaps[:, None], 12)[:t][
                                              ~np.isnan(gaps[:t]).cumprod().astype(bool)])
    pd = pytest.importorskip("pandas")
    whole = pd.Series(np.arange(60), dtype="Int64")
    whole[7] = pd.NA
    assert len(forecaster().fit(whole).predict(3)) == 3
    assert forecaster().fit(pd.DataFrame({"a": whole, "b": 1.5})).predict(3).shape == (3, 2)


def test_working_days_go_on_and_uneven_times_are_seen():
    pd = pytest.importorskip("pandas")
    days = pd.bdate_range("2024-01-01", "2024-06-28").drop(["2024-01-15", "2024-03-29", "2024-04-01"])
    prices = pd.Series(wave(len(days)), days)
    got = forecaster().fit(prices).predict(5)
    assert got.index.equals(pd.bdate_range("2024-07-01", periods=5))
    # an integral: its steps are told by the time that they take alone
    rng = np.random.default_rng(0)
    hours = rng.integers(1, 20, 300).cumsum()
    times = pd.Timestamp("2024-01-01") + pd.to_timedelta(hours, unit="h")
    series = pd.Series(hours / 10.0, times)
    model = forecaster(horizon=1, regressor=small(hidden_size=12, epochs=60, lr=0.02)).fit(series[:280])
    got = model.predict(20, index=times[280:])
    assert got.index.equals(times[280:])
    steps = np.abs(np.diff(np.r_[series.iloc[279], got]) - np.diff(hours[279:]) / 10).mean()
    assert steps < 0.15 < np.diff(hours).std() / 10
    with pytest.raises(ValueError, match="predict needs the times to forecast"):
        model.predict(3)
    with pytest.raises(ValueError, match="index must hold 2 times"):
        model.predict(2, index=times[278:280])
    model.update(series[280:290])
    assert model.predict(1, index=times[290:291]).index[0] == times[290]
    with pytest.raises(ValueError, match="only if the series in fit had one"):
        forecaster().fit(wave(60)).predict(1, index=times[:1])


def test_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(900)
    series = np.zeros(900)
    for t in range(1, 900):
        series[t] = 0.8 * series[t - 1] + noise[t]
    model = forecaster(window=8, horizon=1, calibration=120, folds=2, anchored=False).fit(series[:500])
    assert model.errors_.shape == (2, 120, 120, 1)
    hit, origins = [], range(500, 890, 10)
    for t in origins:
        lower, upper = model.predict_interval(5)
        hit.append((lower <= series[t:t + 5]) & (series[t:t + 5] <= upper))
        model.update(series[t:t + 10])
    hit = np.mean(hit, axis=0)
    assert 0.7 < hit.mean() < 0.9 and (hit > 0.6).all()     # 39 origins: a deviation of 0.064 for each
    narrow, wide = (np.subtract(*model.predict_interval(150, coverage=c)[::-1]) for c in (0.5, 0.95))
    assert (narrow < wide).all() and (np.diff(wide) >= -1e-9).all() and (narrow > 0).all()
    assert 1.2 < wide[4] / wide[0]      # an AR(1) knows less the further it looks
    with pytest.raises(ValueError, match="coverage must be between 0 and 1, got 1"):
        model.predict_interval(3, coverage=1)
    with pytest.raises(ValueError, match="fit with a calibration above 0"):
        forecaster().fit(series[:60]).predict_interval(3)
    with pytest.raises(ValueError, match="and 40 of calibration, got 50"):
        forecaster(calibration=40).fit(series[:50])


def test_intervals_are_of_each_series_and_in_its_units(tmp_path):
    rng = np.random.default_rng(1)
    series = np.exp(wave(160) + 0.05 * rng.standard_normal(160))
    model = forecaster(season=12, transform="log", calibration=30).fit(series[:150])
    lower, upper = model.predict_interval(10)
    middle = model.predict(10)
    np.testing.assert_allclose(upper / middle, middle / lower, rtol=1e-9)       # of a log: in proportion
    scales = forecaster(calibration=20).fit([wave(100), 100 * wave(100)])
    (low, high), (low100, high100) = zip(*scales.predict_interval(4))
    np.testing.assert_allclose(high100 - low100, 100 * (high - low), rtol=1e-6)
    pytest.importorskip("matplotlib")
    figure = model.plot(series[150:], tmp_path / "band.png")
    assert "80 % interval" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_exogenous_columns_help():
    rng = np.random.default_rng(0)
    promotion = (rng.random((260, 1)) < 0.2).astype(float)
    sales = wave(260) + 3 * promotion[:, 0]
    wrong = []
    for exog in (None, promotion):
        model = forecaster(horizon=2, regressor=small(hidden_size=16, epochs=60, lr=0.02))
        model.fit(sales[:220], None if exog is None else exog[:220])
        wrong.append(model.backtest(sales, 220, exog)["mae"])
    assert wrong[1] < wrong[0] / 2
