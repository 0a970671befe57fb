"""Every array that a public callable takes, given as one that it must not take.

CALLS is the list of them all; a public name that is in neither CALLS nor WITHOUT_ARRAYS fails a test
of its own. Estimators convert what scikit-learn converts, so of them only masks are tested.
"""

import importlib.util

import numpy as np
import pytest

import lstmcore
from lstmcore import gradflow, inspect, layers, losses, optim
from lstmcore import Stack

sklearn = importlib.util.find_spec("sklearn")
T, B, I, H, V = 4, 3, 2, 5, 7


def f(*shape):
    return np.random.default_rng(0).uniform(0.1, 0.9, shape).astype("float32")


IDS, LENGTHS, LABELS = np.arange(T * B).reshape(T, B) % I, np.array([2, 0, 4]), np.array([0, 1, 1])
W_ih, W_hh = f(4 * H, I), f(4 * H, H)


def called(layer, *args):
    """The layer after a call, whose backward is to be tried."""
    layer(*args)
    return layer


def lstm(**options):
    return layers.LSTM(I, H, seed=0, **options)


def state(width=H):
    return f(1, B, width)


def tape(forward=lstmcore.lstm_forward, rows=4):
    return forward(f(T, B, I), f(rows * H, I), f(rows * H, H))[2]


def with_state(a):
    lstm().stream(B).state = state(), a


def stepped(rule, name, a):
    values = {"w": f(2, 3)}
    optimizer = rule((values, {"w": f(2, 3)}))
    optimizer.load_state_dict({**optimizer.state_dict(), name: a})


def seen(signal):
    return inspect.Activations(list("ab" * 10), ["layer 1"], [{"h": signal}])


# name -> [(argument as the error names it, what it takes, a good value, the call)]; what it takes is
# "floats", "ids" (integers that something is indexed by), "weights" (any real numbers) or "any".
CALLS = {
    "LSTM": [
        ("x", "floats", f(T, B, I), lambda a: lstm()(a)),
        ("(token ids|x)", "ids", IDS, lambda a: lstm()(a)),
        ("h of state", "floats", state(), lambda a: lstm()(f(T, B, I), (a, state()))),
        ("c of state", "floats", state(), lambda a: lstm()(f(T, B, I), (state(), a))),
        ("lengths", "ids", LENGTHS, lambda a: lstm()(f(T, B, I), lengths=a)),
        ("(tokens|x)", "ids", IDS, lambda a: lstm()(a, embedding=layers.Embedding(99, I))),
        ("(token ids|tokens|x)", "ids", IDS,
         lambda a: lstm()(a, embedding=layers.Embedding(3, I))),
        ("dy", "floats", f(T, B, H), lambda a: called(lstm(), f(T, B, I)).backward(a)),
        ("h of dstate", "floats", state(),
         lambda a: called(lstm(), f(T, B, I)).backward(None, (a, None))),
        ("x", "floats", f(T, B, I), lambda a: lstm().trace(a)),
        ("weight_hh_l0", "any", W_hh,
         lambda a: lstm().load_state_dict({**lstm().state_dict(), "weight_hh_l0": a}))],
    "GRU": [
        ("x", "floats", f(T, B, I), lambda a: layers.GRU(I, H)(a)),
        ("(token ids|x)", "ids", IDS, lambda a: layers.GRU(I, H)(a)),
        ("h of state", "floats", state(), lambda a: layers.GRU(I, H)(f(T, B, I), a)),
        ("lengths", "ids", LENGTHS, lambda a: layers.GRU(I, H)(f(T, B, I), lengths=a)),
        ("dy", "floats", f(T, B, H), lambda a: called(layers.GRU(I, H), f(T, B, I)).backward(a)),
        ("x", "floats", f(T, B, I), lambda a: layers.GRU(I, H).trace(a))],
    "RNN": [
        ("x", "floats", f(T, B, I), lambda a: layers.RNN(I, H)(a)),
        ("h of state", "floats", state(), lambda a: layers.RNN(I, H)(f(T, B, I), a)),
        ("lengths", "ids", LENGTHS, lambda a: layers.RNN(I, H)(f(T, B, I), lengths=a)),
        ("dy", "floats", f(T, B, H), lambda a: called(layers.RNN(I, H), f(T, B, I)).backward(a))],
    "Stream": [
        ("x_t", "floats", f(B, I), lambda a: lstm().stream(B).step(a)),
        ("token ids", "ids", LABELS, lambda a: lstm().stream(B).step(a)),
        ("c of state", "floats", state(), with_state)],
    "Stack": [
        ("x", "floats", f(T, B, I), lambda a: Stack([lstm()])(a)),
        ("lengths", "ids", LENGTHS, lambda a: Stack([lstm()], [True])(f(T, B, I), lengths=a))],
    "Embedding": [
        ("tokens", "ids", IDS, lambda a: layers.Embedding(V, I)(a)),
        ("dy", "floats", f(T, B, I), lambda a: called(layers.Embedding(V, I), IDS).backward(a))],
    "Linear": [
        ("x", "floats", f(B, I), lambda a: layers.Linear(I, H)(a)),
        ("dy", "floats", f(B, H), lambda a: called(layers.Linear(I, H), f(B, I)).backward(a)),
        ("bias", "any", f(H), lambda a: layers.Linear(I, H).load_state_dict(
            {"weight": f(H, I), "bias": a}))],
    "Sequential": [
        ("x", "floats", f(B, I), lambda a: layers.Sequential(layers.Linear(I, H))(a)),
        ("dy", "floats", f(B, I),
         lambda a: called(layers.Sequential(layers.Tanh()), f(B, I)).backward(a))],
    **{name: [("x", "floats", f(B, I), lambda a, make=getattr(layers, name): make()(a)),
              ("dy", "floats", f(B, I),
               lambda a, make=getattr(layers, name): called(make(), f(B, I)).backward(a))]
       for name in ("Dropout", "Tanh", "Sigmoid", "ReLU")},
    **{name: [("y", "floats", f(T, B, I), lambda a, make=getattr(layers, name): make()(a)),
              ("lengths", "ids", LENGTHS,
               lambda a, make=getattr(layers, name): make()(f(T, B, I), a)),
              ("dpooled", "floats", f(B, I),
               lambda a, make=getattr(layers, name): called(make(), f(T, B, I)).backward(a))]
       for name in ("LastStep", "MeanOverTime", "MaxOverTime")},
    "sequence_mask": [("lengths", "ids", LENGTHS, lambda a: layers.sequence_mask(a, T))],
    "sigmoid": [("x", "any", f(B), layers.sigmoid)],
    "softmax_cross_entropy": [
        ("logits", "floats", f(B, V), lambda a: losses.softmax_cross_entropy(a, LABELS)),
        ("targets", "ids", LABELS, lambda a: losses.softmax_cross_entropy(f(B, V), a)),
        ("targets", "ids", LABELS,
         lambda a: losses.softmax_cross_entropy(f(B, V), a, ignore_index=-1)),
        ("mask", "weights", f(B), lambda a: losses.softmax_cross_entropy(f(B, V), LABELS, mask=a)),
        ("out", "floats", f(B, V), lambda a: losses.softmax_cross_entropy(f(B, V), LABELS, out=a))],
    "linear_cross_entropy": [
        ("x", "floats", f(B, I),
         lambda a: losses.linear_cross_entropy(layers.Linear(I, V), a, LABELS)),
        ("targets", "ids", LABELS,
         lambda a: losses.linear_cross_entropy(layers.Linear(I, V), f(B, I), a)),
        ("mask", "weights", f(B),
         lambda a: losses.linear_cross_entropy(layers.Linear(I, V), f(B, I), LABELS, mask=a))],
    **{name: [("y" if name == "mse_loss" else "logits", "floats", f(T, B),
               lambda a, loss=getattr(losses, name): loss(a, f(T, B))),
              ("targets?", "floats", f(T, B),
               lambda a, loss=getattr(losses, name): loss(f(T, B), a)),
              ("mask", "weights", f(T, B),
               lambda a, loss=getattr(losses, name): loss(f(T, B), f(T, B), mask=a)),
              ("mask", "weights", f(T),
               lambda a, loss=getattr(losses, name): loss(f(T, B), f(T, B), mask=a))]
       for name in ("mse_loss", "bce_with_logits")},
    "lstm_forward": [
        ("x", "floats", f(T, B, I), lambda a: lstmcore.lstm_forward(a, W_ih, W_hh)),
        ("token ids", "ids", IDS, lambda a: lstmcore.lstm_forward(a, W_ih, W_hh)),
        ("W_ih", "floats", W_ih, lambda a: lstmcore.lstm_forward(f(T, B, I), a, W_hh)),
        ("W_hh", "floats", W_hh, lambda a: lstmcore.lstm_forward(f(T, B, I), W_ih, a)),
        ("b", "floats", f(4 * H), lambda a: lstmcore.lstm_forward(f(T, B, I), W_ih, W_hh, a)),
        ("h0", "floats", f(B, H), lambda a: lstmcore.lstm_forward(f(T, B, I), W_ih, W_hh, h0=a)),
        ("c0", "floats", f(B, H), lambda a: lstmcore.lstm_forward(f(T, B, I), W_ih, W_hh, c0=a)),
        ("peepholes", "floats", f(3, H),
         lambda a: lstmcore.lstm_forward(f(T, B, I), W_ih, W_hh, peepholes=a)),
        ("W_hr", "floats", f(H - 1, H),
         lambda a: lstmcore.lstm_forward(f(T, B, I), W_ih, f(4 * H, H - 1), W_hr=a)),
        ("lengths", "ids", LENGTHS,
         lambda a: lstmcore.lstm_forward(f(T, B, I), W_ih, W_hh, lengths=a))],
    "lstm_backward": [
        ("dy", "floats", f(T, B, H), lambda a: lstmcore.lstm_backward(tape(), a)),
        ("dh_n", "floats", f(B, H), lambda a: lstmcore.lstm_backward(tape(), f(T, B, H), a)),
        ("dc_n", "floats", f(B, H), lambda a: lstmcore.lstm_backward(tape(), f(T, B, H), None, a))],
    "gru_forward": [
        ("x", "floats", f(T, B, I), lambda a: lstmcore.gru_forward(a, f(3 * H, I), f(3 * H, H))),
        ("token ids", "ids", IDS, lambda a: lstmcore.gru_forward(a, f(3 * H, I), f(3 * H, H))),
        ("W_ih", "floats", f(3 * H, I),
         lambda a: lstmcore.gru_forward(f(T, B, I), a, f(3 * H, H))),
        ("W_hh", "floats", f(3 * H, H),
         lambda a: lstmcore.gru_forward(f(T, B, I), f(3 * H, I), a)),
        ("b", "floats", f(4 * H),
         lambda a: lstmcore.gru_forward(f(T, B, I), f(3 * H, I), f(3 * H, H), a)),
        ("b", "floats", f(3 * H),
         lambda a: lstmcore.gru_forward(f(T, B, I), f(3 * H, I), f(3 * H, H), a, reset_after=False)),
        ("h0", "floats", f(B, H),
         lambda a: lstmcore.gru_forward(f(T, B, I), f(3 * H, I), f(3 * H, H), h0=a)),
        ("lengths", "ids", LENGTHS,
         lambda a: lstmcore.gru_forward(f(T, B, I), f(3 * H, I), f(3 * H, H), lengths=a))],
    "gru_backward": [
        ("dy", "floats", f(T, B, H),
         lambda a: lstmcore.gru_backward(tape(lstmcore.gru_forward, 3), a)),
        ("dh_n", "floats", f(B, H),
         lambda a: lstmcore.gru_backward(tape(lstmcore.gru_forward, 3), f(T, B, H), a))],
    "rnn_forward": [
        ("x", "floats", f(T, B, I), lambda a: lstmcore.rnn_forward(a, f(H, I), f(H, H))),
        ("W_hh", "floats", f(H, H), lambda a: lstmcore.rnn_forward(f(T, B, I), f(H, I), a))],
    "rnn_backward": [
        ("dy", "floats", f(T, B, H),
         lambda a: lstmcore.rnn_backward(tape(lstmcore.rnn_forward, 1), a))],
    "optimizers": [
        ("parameter w", "floats", f(2, 3), lambda a: optim.SGD(({"w": a}, {"w": f(2, 3)}), 0.1)),
        ("gradient w", "floats", f(2, 3), lambda a: optim.Adam(({"w": f(2, 3)}, {"w": a}))),
        ("mean.w", "floats", f(2, 3), lambda a: stepped(optim.Adam, "mean.w", a)),
        ("square.w", "floats", f(2, 3), lambda a: stepped(optim.RMSprop, "square.w", a))],
    "clip_grad_norm": [
        ("gradient w", "floats", f(2, 3), lambda a: optim.clip_grad_norm({"w": a}, 1.0))],
    "clip_grad_value": [
        ("gradient w", "floats", f(2, 3), lambda a: optim.clip_grad_value({"w": a}, 1.0))],
    "gradient_flow": [("x", "floats", f(T, B, I), lambda a: gradflow.gradient_flow(lstm(), a))],
    "rank": [("signal h", "any", f(20, H), lambda a: inspect.rank(seen(a)))],
}
if importlib.util.find_spec("matplotlib"):
    CALLS["plot"] = [("flows['LSTM']", "any", f(T), lambda a: gradflow.plot({"LSTM": a}))]
    CALLS["picture"] = [("signal h", "any", f(20, H),
                         lambda a: inspect.picture(seen(a), None, neuron=0))]
if sklearn:
    X, LONG = f(12, T), f(40)

    def fitted(make, y):
        return make(hidden_size=2, epochs=1, random_state=0).fit(X, y)

    def forecaster(*exog):
        regressor = lstmcore.LSTMRegressor(2, epochs=1, random_state=0)
        return lstmcore.Forecaster(4, regressor=regressor).fit(LONG, *exog)

    for _name, _y in ("LSTMClassifier", np.arange(12) % 2), ("LSTMRegressor", f(12)):
        def make(*args, name=_name, **options):
            return getattr(lstmcore, name)(2, epochs=1, random_state=0)

        CALLS[_name] = [
            ("X", "any", X, lambda a, make=make, y=_y: make().fit(a, y)),
            ("X", "any", X, lambda a, make=make, y=_y: make().fit(list(a), y)),
            ("X", "any", f(12, T, 2), lambda a, make=make, y=_y: make().fit(a, y)),
            ("y", "any", _y, lambda a, make=make: make().fit(X, a)),
            ("sample_weight", "any", f(12), lambda a, make=make, y=_y: make().fit(X, y, a)),
            ("y", "any", _y, lambda a, make=make: make().partial_fit(X, a, **(
                {"classes": [0, 1]} if make().__class__.__name__ == "LSTMClassifier" else {}))),
            ("X", "any", X, lambda a, make=make, y=_y: make().fit(X, y).predict(a)),
            ("X", "any", X, lambda a, make=make, y=_y: make().fit(X, y).score(a, y)),
            ("y", "any", _y, lambda a, make=make, y=_y: make().fit(X, y).score(X, a)),
            ("sample_weight", "any", f(12),
             lambda a, make=make, y=_y: make().fit(X, y).score(X, y, a))]
    CALLS["LSTMClassifier"] += [
        ("classes", "any", np.arange(2),
         lambda a: lstmcore.LSTMClassifier(2).partial_fit(X, np.arange(12) % 2, a)),
        ("X", "any", X, lambda a: fitted(lstmcore.LSTMClassifier, np.arange(12) % 2).predict_proba(a))]
    CALLS["Forecaster"] = [
        ("series", "any", LONG, lambda a: lstmcore.Forecaster(4).fit(a)),
        ("exog", "any", f(40, 2), lambda a: lstmcore.Forecaster(4).fit(LONG, a)),
        ("exog", "any", f(3, 2), lambda a: forecaster(f(40, 2)).predict(3, a)),
        ("series", "any", LONG, lambda a: forecaster().backtest(a, 30)),
        ("exog", "any", f(40, 2), lambda a: forecaster(f(40, 2)).backtest(LONG, 30, a))]
    if importlib.util.find_spec("matplotlib"):
        CALLS["Forecaster"].append(("actual", "any", f(3), lambda a: forecaster().plot(a)))

WITHOUT_ARRAYS = {
    "__version__", "get_num_threads", "set_num_threads", "threads", "info", "Module", "LanguageModel",
    "load", "save", "convert",      # of files and texts
    "optim",                        # a module: see "optimizers"
    "reference",                    # a module that checks nothing
    "LSTMTrace", "GRUTrace", "RNNTrace"}        # results

ALL = [(name, *entry) for name, entries in CALLS.items() for entry in entries]


def cases(*kinds):
    found = [entry for entry in ALL if entry[2] in kinds]
    return pytest.mark.parametrize("name, words, kind, good, call", found,
                                   ids=[f"{entry[0]}-{entry[1]}" for entry in found])


def test_every_public_callable_is_here():
    public = {*lstmcore.__all__, *layers.__all__,
              *(name for name, value in vars(losses).items()
                if name[0] != "_" and getattr(value, "__module__", "") == "lstmcore.losses")}
    if sklearn is None:
        public -= {"LSTMClassifier", "LSTMRegressor", "Forecaster"}
    assert public <= CALLS.keys() | WITHOUT_ARRAYS


@cases("floats", "ids", "weights")
def test_a_good_array_is_taken(name, words, kind, good, call):
    call(good.copy())


@cases("floats", "ids", "weights")
def test_read_only_memory_is_read_or_refused(name, words, kind, good, call, tmp_path):
    good.tofile(tmp_path / "array")
    for a in (np.frombuffer(good.tobytes(), good.dtype).reshape(good.shape),
              np.memmap(tmp_path / "array", good.dtype, "r", shape=good.shape)):
        if words in ("out", "parameter w", "gradient w"):
            with pytest.raises(ValueError, match=f"^{words} must be writable"):
                call(a)
        else:
            call(a)
        assert (a == good).all()


@cases("floats", "ids", "weights", "any")
def test_masked_arrays_are_refused_by_name(name, words, kind, good, call):
    for mask in False, np.arange(good.size).reshape(good.shape) == 1:
        with pytest.raises(TypeError, match=rf"^{words}.* must be an array without a mask".replace(
                "[", r"\[")):
            call(np.ma.masked_array(good, mask))


class Masked(np.ndarray):
    """As other libraries have them: an array with a mask beside it."""

    mask = True


@cases("floats", "ids", "weights", "any")
def test_other_libraries_masked_arrays_are_refused(name, words, kind, good, call):
    with pytest.raises(TypeError, match="without a mask"):
        call(good.view(Masked))


@cases("floats")
def test_floats_of_another_kind_are_refused_by_name(name, words, kind, good, call):
    for dtype in "float16", ">f4", ">f8", "object", "complex64", "bool", "longdouble", "U3", "M8[s]":
        with pytest.raises(TypeError, match=rf"^{words}\b"):
            call(good.astype("i8").astype(dtype) if dtype == "M8[s]" else good.astype(dtype))


@cases("ids")
def test_ids_that_are_no_integers_are_refused_by_name(name, words, kind, good, call):
    for dtype in "float16", ">f8", "object", "complex64", "bool", "U3", "M8[s]":
        with pytest.raises(TypeError, match=rf"^({words}|x|x_t)\b"):
            call(good.astype(dtype))


@cases("ids")
def test_ids_of_any_width_and_order_of_bytes_are_taken(name, words, kind, good, call):
    for dtype in "uint8", "int16", ">i8", ">u4", "uint64":
        call(good.astype(dtype))


@cases("ids")
def test_ids_out_of_range_are_refused_by_name(name, words, kind, good, call):
    for bad in -2, 10**9, -2**62:
        ids = good.copy()
        ids.flat[-1] = bad
        with pytest.raises(ValueError, match=f"^{words} must be in 0.*{bad}"):
            call(ids)
    ids = good.astype("uint64")
    ids.flat[-1] = 2**64 - 1
    with pytest.raises(ValueError, match=f"^{words} must be in 0.*{2**64 - 1}"):
        call(ids)


@cases("weights")
def test_weights_must_be_real_and_finite(name, words, kind, good, call):
    for dtype in "object", "complex64", "U3", "M8[s]":
        with pytest.raises(TypeError, match="^mask must be bool or real numbers"):
            call(good.astype("i8").astype(dtype) if dtype == "M8[s]" else good.astype(dtype))
    for bad in np.nan, np.inf, -np.inf, 1e39:
        weights = good.astype("float64")
        weights.flat[-1] = bad
        with pytest.raises(ValueError, match="^mask must be finite"):
            call(weights)


@cases("floats", "ids", "weights")
def test_scalars_are_refused_or_harmless(name, words, kind, good, call):
    for scalar in good.flat[0], good.reshape(-1)[:1].reshape(()):
        try:
            call(scalar)
        except (TypeError, ValueError):
            pass
