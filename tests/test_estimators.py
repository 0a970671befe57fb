"""The scikit-learn estimators: conventions, every kind of X, honest learning."""

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
from lstmcore import LSTMClassifier, LSTMRegressor, renames  # noqa: E402
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
                     np.arange(24), batch_size=7, held_out=np.arange(24, 30), epochs=2, loss=loss,
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
    from lstmcore.models.sources import PerStep
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
