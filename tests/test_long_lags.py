"""An LSTM solves what a vanilla RNN of the same size, on the same budget, does not."""

import numpy as np
import pytest

import long_lags
import lstmcore


@pytest.fixture(autouse=True)
def one_thread():
    with lstmcore.threads(1):       # the nets are small
        yield


def test_adding_asks_for_what_is_marked():
    x, lengths, targets, counts = long_lags.adding(np.random.default_rng(0), 200, lag=30)
    for b, length in enumerate(lengths):
        values, marks = x[:, b].T
        assert list(np.flatnonzero(marks == -1)) == [0, length - 1]
        marked = np.flatnonzero(marks == 1)
        assert len(marked) == 2 and marked.max() < 15
        assert targets[length - 1, b] == pytest.approx(0.5 + values[marked].sum() / 4, abs=1e-6)
        assert list(np.flatnonzero(counts[:, b])) == [length - 1]


def test_order_asks_for_the_order():
    x, lengths, targets, counts = long_lags.order(np.random.default_rng(0), 200, lag=50)
    symbols = x.argmax(axis=2)
    for b, length in enumerate(lengths):
        one, two = [s - 4 for s in symbols[:length, b] if s in (4, 5)]
        assert targets[length - 1, b] == 2 * one + two and counts[:, b].sum() == 1
    assert set(targets[counts > 0]) == {0, 1, 2, 3}


def test_spikes_ask_for_the_delay():
    x, lengths, targets, counts = long_lags.spikes(np.random.default_rng(0), 50, lag=7)
    for b, length in enumerate(lengths):
        at = np.flatnonzero(x[:, b, 0])
        assert at[-1] == length - 1 and list(np.flatnonzero(counts[:, b])) == list(at[1:])
        np.testing.assert_array_equal(targets[at[1:], b], np.diff(at) - 7)


def test_lstm_solves_adding_and_vanilla_rnn_does_not():
    budget = dict(sequences=12_800, lag=60)
    lstm = long_lags.make(long_lags.adding, forget_bias=4, input_bias=-2)
    seen, error = long_lags.train(lstm, long_lags.adding, goal=0.04, **budget)
    assert error < 0.04
    rnn = long_lags.make(long_lags.adding, cell="rnn")
    assert long_lags.train(rnn, long_lags.adding, **{**budget, "sequences": seen})[1] > 0.12


def test_lstm_solves_temporal_order_and_vanilla_rnn_does_not():
    lstm = long_lags.make(long_lags.order, forget_bias=4, input_bias=-2, seed=2)
    seen, error = long_lags.train(lstm, long_lags.order, 12_800, lag=40, goal=0.01, seed=2)
    assert error < 0.01
    rnn = long_lags.make(long_lags.order, cell="rnn", seed=2)
    assert long_lags.train(rnn, long_lags.order, seen, lag=40, seed=2)[1] > 0.5
