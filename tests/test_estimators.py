"""The scikit-learn estimators and the Forecaster: conventions, every kind of X, honest learning."""

import copy
import pickle
import signal
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("sklearn")

from sklearn.base import clone  # noqa: E402
from sklearn.exceptions import NotFittedError  # noqa: E402
from sklearn.model_selection import GridSearchCV  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import FunctionTransformer  # noqa: E402
from sklearn.utils.estimator_checks import parametrize_with_checks  # noqa: E402

import lstmcore  # noqa: E402
from lstmcore import Forecaster, LSTMClassifier, LSTMRegressor, renames  # noqa: E402
from lstmcore.models import sequences  # noqa: E402
from lstmcore.models.sources import Batches  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    with lstmcore.threads(1):       # the nets are tiny
        yield


PLAIN = dict(bidirectional=False, pooling="last", dropout=0.0, token_dropout=0.0, lr=0.01, embed_size=32,
             min_count=1, schedule="constant", epochs=100)


# the defaults, but for a size that keeps the checks' many fits short
@parametrize_with_checks([LSTMClassifier(16), LSTMRegressor(32)])
def test_scikit_learn_conventions(estimator, check):
    check(estimator)


def ragged(n, C, seed=0, longest=9, dtype="float64"):
    """Sequences of different lengths, and the mean of the first channel of each."""
    rng = np.random.default_rng(seed)
    X = [rng.standard_normal((T, C)).astype(dtype) for T in rng.integers(1, longest, n)]
    return X, np.array([x[:, 0].mean() for x in X])


def words(n, seed=0):
    """Strings of letters, and whether the first letter is x; lengths 1 to 6."""
    rng = np.random.default_rng(seed)
    X = ["".join(rng.choice(list("xabc"), length)) for length in rng.integers(1, 7, n)]
    return X, np.where([text[0] == "x" for text in X], "with", "without")


def small(kind=LSTMRegressor, **options):
    return kind(**{**PLAIN, **dict(hidden_size=8, epochs=3, random_state=3), **options})


@pytest.mark.parametrize("options", [
    {}, dict(bidirectional=True), dict(pooling="mean"), dict(pooling="max", num_layers=2),
    dict(pooling="mean+max"),
    dict(cell="gru"), dict(cell="rnn"), dict(peepholes=True), dict(bidirectional=True, pooling="mean")])
def test_prediction_of_a_sequence_does_not_depend_on_its_company(options):
    X, y = ragged(40, 2)
    model = small(**options).fit(X, y)
    together = model.predict(X)
    alone = np.concatenate([model.predict([x]) for x in X])
    # The same sums; only the read-out's matrix product may order them differently.
    np.testing.assert_allclose(alone, together, rtol=0, atol=1e-12)
    assert np.ptp(together) > 0.01


def test_array_list_and_table_of_the_same_numbers_give_the_same_model():
    rng = np.random.default_rng(1)
    X = rng.standard_normal((30, 6, 2))
    y = X[:, :, 1].sum(axis=1)
    predictions = [small(n_channels=2).fit(given, y).predict(given)
                   for given in (X, list(X), X.reshape(30, 12), list(X.reshape(30, 12)))]
    for got in predictions[1:]:
        np.testing.assert_array_equal(got, predictions[0])


def test_padding_and_lengths_match_the_network_run_by_hand():
    X, y = ragged(20, 3)
    model = small(bidirectional=True, standardize=False).fit(X, y)
    net = model.network_
    for x, got in zip(X[:5], model.predict(X[:5])):
        h, _ = net.recurrent(x[:, None])
        read = np.concatenate([h[-1, :, :8], h[0, :, 8:]], axis=1)
        want = net.head(read)[0, 0] * model._y_scale[0] + model._y_shift[0]
        assert abs(got - want) < 1e-12


def test_regressor_learns_ragged_means_and_many_targets():
    X, y = ragged(150, 2)
    model = small(hidden_size=12, pooling="mean", epochs=60, random_state=0)
    assert model.fit(X, y).score(*ragged(80, 2, seed=1)) > 0.8
    Y = np.stack([y, 3 - 2 * y], axis=1)
    assert model.fit(X, Y).predict(X).shape == (150, 2) and model.score(X, Y) > 0.8


@pytest.mark.parametrize("tokenizer", ["char", "word", list])
def test_classifier_learns_the_first_letter_of_strings(tokenizer):
    X, y = words(200)
    test, want = words(100, seed=1)
    if tokenizer == "word":
        X, test = ([" ".join(text) for text in given] for given in (X, test))
    model = small(LSTMClassifier, hidden_size=12, tokenizer=tokenizer, epochs=25, embed_size=6)
    assert model.fit(X, y).score(test, want) > 0.9
    assert sorted(model.vocabulary_.tokens) == ["<unk>", "a", "b", "c", "x"]
    with pytest.warns(UserWarning, match=r"X\[1\] has no steps"):
        assert model.predict_proba(["?!", ""]).shape == (2, 2)       # unseen letters, and none


def test_dtype_follows_the_input_and_may_be_set():
    X, y = ragged(20, 2)
    single = [x.astype("float32") for x in X]
    for given, dtype, want in ((X, None, "float64"), (single, None, "float32"),
                               (X, "float32", "float32"), (single, "float64", "float64")):
        model = small(dtype=dtype).fit(given, y)
        assert {str(p.dtype) for p in model.network_.parameters().values()} == {want}


def test_fit_repeats_bit_for_bit_and_random_state_matters():
    X, y = ragged(100, 2)
    options = dict(batch_size=16, dropout=0.2, validation=0.2)
    first, again, other = (small(**options, random_state=seed).fit(X, y).predict(X)
                           for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_weight_two_is_the_sequence_twice_and_weight_zero_is_none():
    X, y = ragged(20, 2)
    weights = np.random.default_rng(0).integers(0, 3, 20)
    repeated = np.repeat(np.arange(20), weights)
    by_weight = small().fit(X, y, sample_weight=weights).predict(X)
    by_rows = small().fit([X[n] for n in repeated], y[repeated]).predict(X)
    # Sums over the batch in another order, carried on by three updates.
    np.testing.assert_allclose(by_weight, by_rows, rtol=0, atol=1e-10)
    assert np.abs(by_weight - small().fit(X, y).predict(X)).max() > 1e-4


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("dropping", [{}, dict(dropout=0.2, num_layers=2)])
def test_warm_start_and_partial_fit_go_on_also_in_a_copy(duplicate, dropping):
    X, y = ragged(50, 2)
    long = small(epochs=4, **dropping).fit(X, y)
    short = small(epochs=2, warm_start=True, **dropping).fit(X, y)
    twin = duplicate(short)
    for model in (short, twin):
        assert model.fit(X, y).n_iter_ == 4 and len(model.loss_curve_) == 4
        np.testing.assert_array_equal(model.predict(X), long.predict(X))
        before = model.predict(X)
        model.partial_fit(X, y)
        assert model.n_iter_ == 5 and (model.predict(X) != before).any()


@pytest.mark.parametrize("tokenizer", ["char", "word"])
def test_a_pickle_with_the_names_of_before_goes_on(tokenizer):
    """0.1 kept its layers, vocabulary and parameters under other names."""
    X, y = words(50)
    model = small(LSTMClassifier, tokenizer=tokenizer, dropout=0.2, validation=0.1, embed_size=32,
                  min_count=1, warm_start=True).fit(X, y)
    twin = copy.deepcopy(model)
    state, rule = vars(twin), twin._optimizer
    network, vocabulary = vars(twin.network_), twin.vocabulary_

    def before(arrays):
        return {name.replace("embedding.", "embed."): a for name, a in arrays.items()}
    for old, new in renames.RENAMED["LSTMClassifier"].items():
        state[old] = state.pop(new)
    for old, new in dict(embed="embedding", before="input_dropout", after="dropout").items():
        network[old] = network.pop(new)
    for old, new in renames.RENAMED["Embedding"].items():
        vars(network["embed"])[old] = vars(network["embed"]).pop(new)
    rule._parameters, rule._gradients, rule._shapes = map(before, (rule._parameters, rule._gradients,
                                                                   rule._shapes))
    rule._slots = {slot: before(arrays) for slot, arrays in rule._slots.items()}
    rule._blocks = rule._seen = None
    vocabulary.__dict__ = {"tokenizer": tokenizer, "tokens": vocabulary.tokens, "_ids": vocabulary.ids}
    for new in ("token_dropout", "class_weight", "per_step", "temperature_", "_kind"):
        del state[new]
    del network["_arguments"]
    loaded = pickle.loads(pickle.dumps(twin))
    np.testing.assert_array_equal(loaded.predict_proba(X), model.predict_proba(X))
    np.testing.assert_array_equal(loaded.partial_fit(X, y).predict_proba(X),
                                  model.partial_fit(X, y).predict_proba(X))
    loaded.token_dropout = model.token_dropout
    assert repr(loaded) == repr(model) and loaded.fit(X, y).n_iter_ == 7


def test_an_interrupt_ends_a_fit_between_two_updates():
    X, y = ragged(50, 2)
    model = small(epochs=9)
    ended = model._note

    def interrupt(record):
        ended(record)
        if model.n_iter_ == 2:
            signal.raise_signal(signal.SIGINT)
    model._note = interrupt
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, y)
    assert model.n_iter_ == 2 and len(model.history_) == 2
    np.testing.assert_array_equal(model.predict(X), small(epochs=2).fit(X, y).predict(X))


def test_partial_fit_of_a_classifier_knows_all_classes():
    X, y = words(40)
    with pytest.raises(ValueError, match="classes must be passed"):
        small(LSTMClassifier).partial_fit(X, y)
    model = small(LSTMClassifier).partial_fit(X, y, classes=["no", "with", "without"])
    assert list(model.classes_) == ["no", "with", "without"]
    assert model.predict_proba(X).shape == (40, 3)
    with pytest.raises(ValueError, match="classes out of"):
        model.partial_fit(X, ["other"] * 40)
    with pytest.raises(ValueError, match="those of the first call"):
        model.partial_fit(X, y, classes=["with", "without"])
    model.fit(X, y)
    assert list(model.classes_) == ["with", "without"]


def test_early_stopping_keeps_the_best_weights():
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((60, 5)), rng.standard_normal(60)       # nothing to learn
    model = small(hidden_size=32, epochs=200, patience=5, validation=0.25, random_state=0)
    model.fit(X, y)
    best = int(np.argmin(model.validation_curve_))
    assert model.n_iter_ == best + 1 + 5 < 200
    assert len(model.validation_curve_) == model.n_iter_
    again = clone(model).set_params(epochs=best + 1).fit(X, y)
    np.testing.assert_array_equal(again.predict(X), model.predict(X))


def test_pipeline_and_grid_search():
    X, y = words(60)
    search = GridSearchCV(make_pipeline(FunctionTransformer(), small(LSTMClassifier)),
                          {"lstmclassifier__pooling": ["last", "max"]}, cv=2)
    search.fit(np.array(X, object), y)
    assert set(search.best_params_) == {"lstmclassifier__pooling"}
    assert search.predict(["xa", "bb"]).shape == (2,)


@pytest.mark.parametrize("options, words", [
    (dict(pooling="first"), "pooling must be one of"), (dict(cell="qrnn"), "cell must be one of"),
    (dict(optimizer="lbfgs"), "optimizer must be one of"), (dict(epochs=0), "epochs must be"),
    (dict(validation=1.0), "validation must be"),
    (dict(cell="rnn", peepholes=True), "peepholes need cell"),
    (dict(dtype="float16"), "dtype must be"), (dict(n_channels=4), "n_channels = 4"),
    (dict(schedule="step"), "schedule must be one of"), (dict(hidden_size=0), "hidden_size must"),
    (dict(lr=-1), "lr must be at least 0"),
    (dict(lr="slow"), "lr must be a number, got 'slow'"),
    (dict(dropout=1.5), "dropout must be in 0..1"), (dict(clip=-1), "clip must be at")])
def test_bad_parameters_are_named(options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        small(**options).fit(np.ones((4, 6)), np.arange(4.0))


def test_bad_input_is_named():
    X, y = ragged(6, 2)
    model = small().fit(X, y)
    for given, error, said in (
            ("text", TypeError, "single string"), (["a", "b"], TypeError, "got strings"),
            ([np.ones((3, 5))], ValueError, "5 channels"),
            ([np.full((2, 2), np.nan)], ValueError, "NaN"),
            ([np.ones((2, 2)), np.ones((2, 3))], ValueError, "same number of channels"),
            ([np.ones((2, 2)), "b"], TypeError, "got both"),
            ([np.ones((2, 2)), np.ones((2, 2)) * 1j], TypeError, "real numbers"),
            ([], ValueError, "at least one sequence"), ({"a"}, TypeError, "got set"),
            ((x for x in X), TypeError, "got generator"), ([b"a"], TypeError, "got bytes"),
            ([[[1, 2], [3]]], ValueError, r"X\[0\] must be an array")):
        with pytest.raises(error, match=said):
            model.predict(given)
    with pytest.raises(NotFittedError):
        small().predict(X)
    with pytest.raises(FloatingPointError, match="a lower lr or clip may help"):
        small(lr=1e200, clip=None, optimizer="sgd", epochs=20).fit(X, y)


def test_a_column_of_strings_is_text():
    X, y = words(60)
    column = np.array(X, object)[:, None]
    model, other = (small(LSTMClassifier).fit(given, y) for given in (X, column))
    np.testing.assert_array_equal(model.predict_proba(X), other.predict_proba(column))
    assert other.n_features_in_ == 1 and not hasattr(model, "n_features_in_")
    np.testing.assert_array_equal(other.predict_proba(X), model.predict_proba(X))
    with pytest.raises(TypeError, match="2 columns, 2 of them of strings"):
        small(LSTMClassifier).fit(np.hstack([column, column]), y)
    with pytest.raises(TypeError, match=r"X\[3\] is nan"):
        small(LSTMClassifier).fit([*X[:3], np.nan, *X[4:]], y)


@pytest.mark.parametrize("labels, said", [(["a", None], "NoneType, str"),
                                          (["a", np.nan], "float, str"), (["a", 1], "int, str")])
def test_labels_are_of_one_type(labels, said):
    X, _ = ragged(6, 2)
    with pytest.raises(TypeError, match=f"labels of one type.*got {said}"):
        small(LSTMClassifier).fit(X, np.array(labels * 3, object))


def test_dataframes_and_series_go_in():
    pd = pytest.importorskip("pandas")
    X, y = words(60)
    frame = pd.DataFrame({"text": X, "label": y}, index=range(100, 160))
    model = small(LSTMClassifier).fit(X, y)
    want = model.predict_proba(X)
    for given in (frame["text"], frame[["text"]], frame["text"].astype("category")):
        model = small(LSTMClassifier).fit(given, frame["label"].astype("category"))
        np.testing.assert_array_equal(model.predict_proba(given), want)
        assert list(model.classes_) == ["with", "without"]
    model = small(LSTMClassifier).fit(frame[["text"]], y)
    assert list(model.feature_names_in_) == ["text"]
    with pytest.raises(ValueError, match="feature names should match"):
        model.predict(frame[["text"]].rename(columns={"text": "other"}))
    numbers = pd.DataFrame(np.random.default_rng(0).standard_normal((30, 4)), columns=list("abcd"))
    model = small().fit(numbers, numbers["a"])
    assert list(model.feature_names_in_) == list("abcd")
    with pytest.raises(ValueError, match="same order"):
        model.predict(numbers[list("dcba")])
    X, y = ragged(20, 2)
    by_frames = small().fit(pd.Series([pd.DataFrame(x) for x in X]), pd.Series(y))
    np.testing.assert_array_equal(by_frames.predict(X), small().fit(X, y).predict(X))
    assert not hasattr(model.fit(X, y), "feature_names_in_")       # they were the table's


def test_the_least_that_can_be_learned_from():
    X, _ = words(6)
    one = small(LSTMClassifier).fit(X, ["only"] * 6)
    np.testing.assert_array_equal(one.predict_proba(X), np.ones((6, 1)))
    apart = small(LSTMClassifier, epochs=60).fit(["a", "bb", "ccc", ""], list("wxyz"))
    with pytest.warns(UserWarning, match=r"X\[1\] has no steps"):
        assert list(apart.predict(["ccc", "", "a", "bb"])) == list("yzwx")
    series = [[1.0], [2.0], [4.0]]
    constant = small(epochs=100).fit(series, [7.0, 7.0, 7.0])
    np.testing.assert_allclose(constant.predict(series), 7, rtol=0, atol=0.05)
    assert small().fit([[[1.0, 2.0]]], [3.0]).predict([[[1.0, 2.0]]]).shape == (1,)


@pytest.mark.parametrize("labels", [[True, False], np.array(["b", "a"], object), [2, -1],
                                    np.array(["x", "longer"])])
def test_labels_come_back_as_they_were(labels):
    X, _ = ragged(8, 2)
    y = np.asarray(labels)[[0, 1] * 4]
    model = small(LSTMClassifier, hidden_size=16, epochs=150, lr=0.02).fit(X, y)
    assert list(model.classes_) == sorted(labels) and model.predict(X).dtype == y.dtype
    np.testing.assert_array_equal(model.predict(X), y)


def test_sequences_of_no_steps_are_legal():
    X, y = ragged(10, 2)
    X[3] = np.zeros((0, 2))
    for pooling in ("last", "mean", "max", "mean+max"):
        model = small(pooling=pooling).fit(X, y)
        with pytest.warns(UserWarning, match=r"X\[3\] has no steps"):
            assert np.isfinite(model.predict(X)).all()


def test_batches_are_padded_with_zeros_and_lose_nothing():
    rng = np.random.default_rng(0)
    lengths = [3, 0, 5, 1]
    values = rng.standard_normal((9, 2))
    x, got = sequences.Sequences(values, lengths).batch([2, 0, 1])
    assert x.shape == (5, 3, 2) and list(got) == [5, 3, 0]
    np.testing.assert_array_equal(x[:, 0], values[3:8])
    np.testing.assert_array_equal(x[:3, 1], values[:3])
    assert not x[3:, 1].any() and not x[:, 2].any()


def test_an_epoch_has_each_sequence_once_and_nothing_that_is_held_out():
    seen, weighed, network = [], [], mock.Mock(return_value=(None, None))

    def loss(outputs, targets, weights):
        seen.extend(targets), weighed.append(weights.sum())
        return 0.0, outputs
    source = Batches(sequences.Sequences(np.zeros((30, 1)), np.ones(30)), np.arange(30), np.ones(30),
                     np.arange(30), batch_size=7, held_out=0.2, epochs=2, loss=loss,
                     rng=np.random.default_rng(0))
    for _ in range(2):
        source.start()
        at = 0
        while at < source.length:
            _, _, at, _ = source.loss(network, at)
    assert (source.length, source.steps, len(source.held_out)) == (4, 8, 6)
    assert sorted(seen[:24]) == sorted(seen[24:]) == sorted({*range(30)} - {*source.held_out})
    assert seen[:24] != seen[24:] and np.allclose(weighed, 1)       # means of each batch


def test_an_unseen_token_says_nothing_and_others_as_much():
    X, y = words(60)
    table = small(LSTMClassifier, epochs=1, lr=0.0).fit(X, y).network_.embedding.parameters()["weight"]
    assert not table[0].any()
    assert np.allclose((table[1:] ** 2).sum(axis=1), 1, atol=0.8)       # 32 squares: a deviation of 0.25


def test_digits_read_row_by_row():
    from sklearn.datasets import load_digits
    digits = load_digits()
    X, y = digits.images.astype("float32"), digits.target
    model = LSTMClassifier(32, epochs=20, lr=0.01, random_state=0)
    assert model.fit(X[::2], y[::2]).score(X[1::2], y[1::2]) > 0.93


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


@pytest.mark.parametrize("clip", [None, 0])
def test_no_clipping_is_none_or_zero(clip):
    X, y = np.random.default_rng(0).standard_normal((20, 6)), np.arange(20) % 2
    model = LSTMClassifier(4, epochs=2, clip=clip, random_state=0).fit(X, y)
    free = LSTMClassifier(4, epochs=2, clip=1e9, random_state=0).fit(X, y)
    assert (model.predict_proba(X) == free.predict_proba(X)).all()


def test_the_head_has_the_threads_of_the_whole():
    X, y = np.zeros((4, 6)), [0, 1, 0, 1]
    network = LSTMClassifier(4, epochs=1, n_threads=3).fit(X, y).network_
    assert network.head.n_threads == network.recurrent.n_threads == 3


def test_a_pickle_has_the_weights_once_and_nothing_of_the_training():
    X, y = words(60)
    model = small(LSTMClassifier, hidden_size=64, bidirectional=True).fit(X, y)
    weights = sum(p.nbytes for p in model.network_.parameters().values())
    assert weights < len(pickle.dumps(model)) < 1.1 * weights + 4000
    assert not any(g.any() for g in model.network_.gradients().values())
    for precision in ("int8", "bfloat16", "float32"):
        frozen = pickle.loads(pickle.dumps(copy.deepcopy(model).freeze(precision)))
        np.testing.assert_array_equal(frozen.predict_proba(X),
                                      copy.deepcopy(model).freeze(precision).predict_proba(X))
        np.testing.assert_array_equal(frozen.unfreeze().predict_proba(X), model.predict_proba(X))
    going_on = small(LSTMClassifier, hidden_size=64, warm_start=True).fit(X, y)     # Adam's moments too
    weights = sum(p.nbytes for p in going_on.network_.parameters().values())
    assert 2.9 * weights < len(pickle.dumps(going_on)) < 3.1 * weights + 8000


def test_held_out_part_has_its_share_of_every_class():
    rng = np.random.default_rng(0)
    y = rng.permutation(np.repeat(["a", "b", "c", "d"], [700, 200, 99, 1]))
    X = rng.standard_normal((1000, 3)).astype("float32")
    model = small(LSTMClassifier, validation="auto", epochs=1)
    chosen = []
    model._calibrate = chosen.append
    model.fit(X, y)
    (source,) = chosen
    assert len(source.held_out) == 100 and not set(source.held_out) & set(source.rows)
    assert sorted([*source.held_out, *source.rows]) == list(range(1000))
    counts = {c: int((y[source.held_out] == c).sum()) for c in "abcd"}
    assert abs(counts["a"] - 70) <= 1 and abs(counts["b"] - 20) <= 1 and counts["d"] == 0
    assert not small(LSTMClassifier, validation="auto", epochs=1).fit(X[:900], y[:900]).validation_curve_
    assert not small(validation="auto").partial_fit(X, X[:, 0]).validation_curve_


def test_what_is_usual_depends_on_what_X_holds():
    X = np.random.default_rng(0).standard_normal((1000, 2)).astype("float32")
    y = np.arange(1000) % 2

    def rates(model):
        network = model.network_
        layers = getattr(network.input_dropout, "layers", [network.input_dropout])
        return [layer.p for layer in layers], network.dropout and network.dropout.p
    assert rates(many := LSTMClassifier(2, epochs=1).fit(X, y)) == ([0.3], 0.3)
    assert "pooling='mean+max'" in repr(many.network_)
    assert rates(LSTMClassifier(2, epochs=1).fit(X[1:], y[1:])) == ([], None)
    assert rates(LSTMRegressor(2, epochs=1).fit(X, y)) == ([], None)
    texts, labels = words(30)
    chars = LSTMClassifier(2, epochs=1).fit(texts, labels)
    assert rates(chars) == ([0.3], 0.3) and chars.network_.embedding.parameters()["weight"].shape == (5, 32)
    several = LSTMClassifier(2, tokenizer="word").fit(["a b", "b a", "b c"] * 5 + ["d"], [0, 1] * 8)
    assert rates(several) == ([0.4, 0.5], 0.5) and len(several.vocabulary_) == 4       # no d
    assert several.n_iter_ == 100 and len(LSTMRegressor(2).fit(X[:64], y[:64]).loss_curve_) == 100


@pytest.mark.parametrize("what", ["classes", "labels", "steps"])
def test_probabilities_are_calibrated_on_what_is_held_out(what):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((400, 4)).astype("float32")
    y = (rng.random((400, 4)) < 1 / (1 + np.exp(-X))).astype(int)       # little can be known
    y = y if what == "steps" else y[:, :2] if what == "labels" else y[:, 0]
    model, sources = small(LSTMClassifier, hidden_size=16, epochs=9, validation=0.2, batch_size=20,
                           per_step=what == "steps"), []
    calibrate = model._calibrate
    model._calibrate = lambda source: (sources.append(source), calibrate(source))
    rows = model.fit(X, y) and sources[0].held_out

    def loss(temperature):
        model.temperature_ = temperature
        p = np.concatenate(model.predict_proba(X[rows])) if what == "steps" else model.predict_proba(X[rows])
        truth = y[rows].ravel() if what == "steps" else y[rows]
        p = np.where(truth, p, 1 - p) if what == "labels" else p[np.arange(len(p)), truth]
        return -np.log(p).mean()
    best = model.temperature_
    assert best != 1 and loss(best) < min(loss(1.05 * best), loss(best / 1.05))
    assert len(rows) == 80 and small(LSTMClassifier, validation=0.1).fit(X, y[:, 0] if what != "classes"
                                                                         else y).temperature_ == 1


@pytest.mark.parametrize("weight", [{"rare": 30.0}, "balanced"])
def test_class_weight_is_a_sample_weight(weight):
    X, _ = ragged(60, 2)
    y = np.where(np.arange(60) % 10 == 3, "rare", "usual")
    factor = {"rare": 30.0, "usual": 1.0} if weight != "balanced" else {"rare": 5.0, "usual": 5 / 9}
    model = small(LSTMClassifier, class_weight=weight, epochs=10).fit(X, y)
    same = small(LSTMClassifier, epochs=10).fit(X, y, sample_weight=[factor[label] for label in y])
    np.testing.assert_allclose(model.predict_proba(X), same.predict_proba(X), rtol=0, atol=1e-12)
    plain = small(LSTMClassifier, epochs=10).fit(X, y)
    assert model.predict_proba(X)[:, 0].mean() > plain.predict_proba(X)[:, 0].mean() + 0.02


def test_class_weight_that_is_wrong_is_named():
    X, y = words(20)
    for weight, error, said in (({"other": 2}, ValueError, "class_weight must name classes out of"),
                                ("heavy", ValueError, "class_weight must be one of"),
                                ({"with": -1}, ValueError, "class_weight must be at least 0"),
                                (3, TypeError, "class_weight must be a dict")):
        with pytest.raises(error, match=said):
            small(LSTMClassifier, class_weight=weight).fit(X, y)
    with pytest.raises(ValueError, match="give partial_fit the weights"):
        small(LSTMClassifier, class_weight="balanced").partial_fit(X, y, classes=["with", "without"])


def test_labels_that_may_come_together():
    X, _ = words(300)
    test, _ = words(100, seed=1)

    def has(texts):
        return np.array([[letter in text for letter in "xab"] for text in texts])
    model = small(LSTMClassifier, hidden_size=16, pooling="max", epochs=40).fit(X, has(X))
    assert model.predict(test).dtype == bool and model.score(test, has(test)) > 0.9
    p = model.predict_proba(test)
    assert p.shape == (100, 3) and ((p > 0.5) == model.predict(test)).all()
    assert list(model.classes_) == [0, 1, 2]
    other = small(LSTMClassifier, hidden_size=16, pooling="max", epochs=40).fit(X, has(X).astype(int))
    assert other.predict(test).dtype.kind == "i"
    np.testing.assert_array_equal(other.predict_proba(test), p)
    with pytest.raises(ValueError, match=r"array of shape \(300, 3\)"):
        model.fit(X, has(X) * 2)
    warm = small(LSTMClassifier, warm_start=True).fit(X, has(X))
    with pytest.raises(ValueError, match="y must hold labels, as in the first fit, got classes"):
        warm.fit(X, has(X)[:, 0])
    with pytest.raises(ValueError, match=r"y must be \(n, 3\)"):
        warm.fit(X, has(X)[:, :2])
    rare = np.zeros((60, 2), int)
    rare[::15, 0] = 1
    plain, balanced = (small(LSTMClassifier, epochs=10, class_weight=how).fit(X[:60], rare)
                       for how in (None, "balanced"))
    assert (balanced.predict_proba(X)[:, 0] > plain.predict_proba(X)[:, 0]).all()


def test_a_label_for_every_step():
    X, _ = words(200)
    test, _ = words(60, seed=1)

    def tags(texts):        # whether an x was seen before: not to be told from the letter alone
        return [["after" if "x" in text[:n] else letter for n, letter in enumerate(text)] for text in texts]
    model = small(LSTMClassifier, hidden_size=16, per_step=True, epochs=60, validation=0.1, patience=60)
    model.fit(X, tags(X))
    assert sorted(model.classes_) == ["a", "after", "b", "c", "x"]
    got = model.predict(test)
    assert [len(tag) for tag in got] == [len(text) for text in test]
    assert model.score(test, tags(test)) > 0.95
    assert model.predict_proba(test)[3].shape == (len(test[3]), 5)
    one = np.concatenate([model.predict_proba([text])[0] for text in test])
    np.testing.assert_allclose(one, np.concatenate(model.predict_proba(test)), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"y\[0\] must hold a label for each of the \d steps of X"):
        model.fit(X, [["a"]] * 200)
    numbers, y = np.zeros((9, 4, 2)), np.arange(36).reshape(9, 4) % 3
    np.testing.assert_array_equal(np.shape(small(LSTMClassifier, per_step=True).fit(numbers, y)
                                           .predict(numbers)), (9, 4))


def test_a_mistagged_step_past_the_end_counts_nothing():
    """A short sequence in the company of a long one learns as alone: padding has no weight."""
    from lstmcore.models.supervised import PerStep
    targets = PerStep(np.array([1, 2, 3, 1]), np.array([1.0, 2.0, 1.0, 1.0]), np.array([3, 1]))
    ids, weights = targets[np.array([1, 0])]
    np.testing.assert_array_equal(ids, [[1, 1], [0, 2], [0, 3]])
    np.testing.assert_array_equal(weights, np.array([[1, 1], [0, 2], [0, 1]]) / 2)


def test_arrays_of_other_libraries_are_arrays(tmp_path):
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((20, 5, 2)), np.arange(20) % 2
    want = small(LSTMClassifier).fit(X, y).predict_proba(X)
    given = []
    torch, h5py, xarray = (pytest.importorskip(name) if name != "xarray" else None
                           for name in ("torch", "h5py", "xarray"))
    given += [(torch.tensor(X, requires_grad=True), torch.tensor(y)),
              ([torch.tensor(x) for x in X], list(y))]
    with h5py.File(tmp_path / "x.h5", "w") as file:
        given.append((file.create_dataset("x", data=X), file.create_dataset("y", data=y)))
        try:
            import xarray
            given.append((xarray.DataArray(X, dims=("row", "step", "channel")), xarray.DataArray(y)))
        except ImportError:
            pass
        for a, b in given:
            model = small(LSTMClassifier).fit(a, b)
            np.testing.assert_array_equal(model.predict_proba(a), want)
            assert model.score(a, b) == model.score(X, y)
    flat = X.reshape(20, 10)
    np.testing.assert_array_equal(small().fit(torch.tensor(flat), torch.tensor(flat)).predict(flat),
                                  small().fit(flat, flat).predict(flat))


class Stopped(Exception):
    pass


@pytest.mark.parametrize("kind, options", [(LSTMClassifier, dict(dropout=0.3)), (LSTMRegressor, {})])
def test_a_fit_goes_on_from_its_checkpoint_bit_for_bit(kind, options, tmp_path):
    X, y = words(60)
    y = y if kind is LSTMClassifier else np.array([text.count("a") for text in X])
    options = dict(batch_size=16, validation=0.2, schedule="cosine", epochs=6, patience=9, **options)
    whole = small(kind, **options).fit(X, y)
    path = tmp_path / "run.safetensors"
    broken = small(kind, **options)
    ended = broken._note

    def stop(record):
        if broken.n_iter_ == 3:
            raise Stopped
        ended(record)
    broken._note = stop
    with pytest.raises(Stopped):
        broken.fit(X, y, checkpoint=path)
    resumed = small(kind, **options, random_state=9).fit(X, y, resume=path, checkpoint=path)
    assert resumed.loss_curve_ == whole.loss_curve_ and resumed.n_iter_ == 6
    assert resumed.validation_curve_ == whole.validation_curve_
    np.testing.assert_array_equal(resumed.predict(X), whole.predict(X))
    run = (kind.predict_proba if kind is LSTMClassifier else kind.predict)
    np.testing.assert_array_equal(run(resumed, X), run(whole, X))
    for change, said in ((dict(hidden_size=9), "cannot change hidden_size from 8 to 9"),
                         (dict(lr=0.02), "cannot change lr from 0.01 to 0.02")):
        with pytest.raises(ValueError, match=said):
            small(kind, **{**options, **change}).fit(X, y, resume=path)
    with pytest.raises(ValueError, match="needs the X, y and sample_weight"):
        small(kind, **options).fit(X[::-1], y, resume=path)
    warm = small(kind, **options, warm_start=True).fit(X, y)
    with pytest.raises(ValueError, match="use one of the two"):
        warm.fit(X, y, resume=path)
    lstmcore.save(lstmcore.Linear(2, 3), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no fit of an estimator"):
        small(kind, **options).fit(X, y, resume=tmp_path / "other.safetensors")


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
