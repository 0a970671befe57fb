"""`lstmcore.keras.LSTM` against `keras.layers.LSTM`, on Keras's backends torch and numpy."""

import os
import subprocess
import sys

import numpy as np
import pytest

keras = pytest.importorskip("keras")
torch = pytest.importorskip("torch")
if keras.backend.backend() != "torch":
    pytest.skip("these tests want KERAS_BACKEND=torch", allow_module_level=True)

import lstmcore.keras  # noqa: E402
from lstmcore.keras import LSTM, accelerate, restore  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")       # Keras's own, of NumPy's and of masks
B, T, I, H = 3, 6, 4, 5
OPTIONS = [
    {}, {"return_sequences": True}, {"go_backwards": True, "return_sequences": True},
    {"return_state": True}, {"use_bias": False}, {"zero_output_for_mask": True},
    {"zero_output_for_mask": True, "return_sequences": True, "return_state": True},
    {"unroll": True},
]


def pair(options, shape=(B, T, I), dtype="float32"):
    """A layer of Keras's and one of ours with the same random weights."""
    both = [cls(H, dtype=dtype, **options) for cls in (keras.layers.LSTM, LSTM)]
    rng = np.random.default_rng(0)
    for layer in both:
        layer.build(shape)
    values = [rng.normal(0, 0.5, w.shape) for w in both[0].get_weights()]
    for layer in both:
        layer.set_weights(values)
    return both


def inputs(hidden, dtype="float32"):
    """x (B, T, I) and a mask (B, T) that hides the ends, the starts, or nothing."""
    x = torch.tensor(np.random.default_rng(1).normal(size=(B, T, I)), dtype=getattr(torch, dtype))
    if hidden == "none":
        return x, None
    mask = torch.arange(T) < torch.tensor([[T], [2], [0]])
    return x, mask if hidden == "ends" else mask.flip(1)


def all_of(results):
    return results if isinstance(results, (list, tuple)) else [results]


def never(*_, **__):
    raise AssertionError("Keras's loop ran")


@pytest.fixture
def no_loop(monkeypatch):
    """Keras's loop over the steps may not run."""
    return lambda layer: monkeypatch.setattr(layer.cell, "call", never)


@pytest.mark.parametrize("hidden", ["none", "ends", "starts"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype, atol", [("float32", 2e-5), ("float64", 1e-11)])
def test_the_same_numbers_and_gradients(options, hidden, dtype, atol, no_loop):
    theirs, ours = pair(options, dtype=dtype)
    results = []
    for layer in (theirs, ours):
        x, mask = inputs(hidden, dtype)
        x.requires_grad_()
        if layer is ours and hidden != "starts":
            no_loop(layer)
        found = all_of(layer(x, mask=mask))
        sum((part * part.detach().cos()).sum() for part in found).backward()
        results.append([*found, x.grad, *(w.value.grad for w in layer.trainable_weights)])
    if dtype == "float64" and hidden == "ends":
        atol = 1e-6                             # Keras's own error: its masks pass through float32
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=atol)


def test_an_initial_state(no_loop):
    theirs, ours = pair({"return_state": True})
    state = [torch.full((B, H), 0.3), torch.full((B, H), -2.0)]
    no_loop(ours)
    x, mask = inputs("ends")
    for want, got in zip(theirs(x, initial_state=state, mask=mask),
                         ours(x, initial_state=state, mask=mask), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


def test_a_stateful_layer_goes_on_from_its_state(no_loop):
    theirs, ours = pair({"stateful": True})
    no_loop(ours)
    x, _ = inputs("none")
    with torch.no_grad():
        first = ours(x)
        for layer in (theirs, ours):
            layer.reset_state()
        for _ in range(2):
            want, got = theirs(x), ours(x)
            torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    assert not torch.equal(first, got)


def test_dropout_of_x_is_the_same_in_every_step(no_loop):
    theirs, ours = pair({"dropout": 0.5, "return_sequences": True, "seed": 3})
    no_loop(ours)
    x, _ = inputs("none")
    torch.testing.assert_close(ours(x, training=True), theirs(x, training=True), rtol=0, atol=2e-6)
    assert not torch.equal(ours(x, training=True), ours(x))


@pytest.mark.parametrize("options", [{"activation": "relu"}, {"recurrent_activation": "relu"},
                                     {"recurrent_dropout": 0.4, "seed": 3}])
def test_what_the_kernels_lack_is_computed_by_keras(options):
    theirs, ours = pair(options)
    x, _ = inputs("none")
    torch.testing.assert_close(ours(x, training=True), theirs(x, training=True), rtol=0, atol=0)


def test_mixed_precision(no_loop):
    theirs, ours = pair({"return_sequences": True}, dtype="mixed_bfloat16")
    no_loop(ours)
    x, _ = inputs("none")
    got, want = ours(x), theirs(x)
    assert got.dtype is want.dtype is torch.bfloat16
    torch.testing.assert_close(got, want, rtol=0, atol=0.03)    # h rounded in each of 6 steps


def model_of(*more):
    layers = keras.layers
    return keras.Sequential([
        keras.Input((None,)), layers.Embedding(11, I, mask_zero=True),
        layers.Bidirectional(layers.LSTM(H, return_sequences=True, name="lstm"), name="both"),
        keras.Sequential([layers.LSTM(H, name="inner")]), *more, layers.Dense(2)])


def test_accelerate_changes_a_model_in_place(no_loop):
    model, tokens = model_of(), np.array([[3, 1, 4, 1], [5, 9, 0, 0]])
    want = model.predict(tokens, verbose=0)
    assert accelerate(model) == ["forward_lstm", "backward_lstm", "inner"]
    assert accelerate(model) == []
    both = model.get_layer("both")
    for layer in (both.forward_layer, both.backward_layer, model.layers[2].layers[0]):
        no_loop(layer)
    np.testing.assert_allclose(model.predict(tokens, verbose=0), want, rtol=0, atol=1e-6)
    assert restore(model) == ["forward_lstm", "backward_lstm", "inner"]
    with pytest.raises(AssertionError, match="Keras's loop ran"):
        model(tokens)


def test_accelerate_names_what_stays():
    class Mine(keras.layers.LSTM):
        pass

    model = keras.Sequential([keras.Input((None, I)), Mine(H, return_sequences=True, name="mine"),
                              keras.layers.LSTM(H, activation="relu", name="other")])
    with pytest.warns(UserWarning, match="mine: it is a Mine.*other: activation is 'relu'"):
        assert accelerate(model) == []


def test_a_model_trains_as_keras_trains_it():
    rng = np.random.default_rng(0)
    tokens, labels = rng.integers(1, 11, (64, 7)), rng.integers(0, 2, 64)
    losses = []
    for change in (lambda model: None, accelerate):
        keras.utils.set_random_seed(0)
        model = model_of()
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        change(model)
        losses.append(model.fit(tokens, labels, epochs=3, shuffle=False, verbose=0).history["loss"])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_files(tmp_path):
    model = keras.Sequential([keras.Input((None, I)), LSTM(H, name="rnn"), keras.layers.Dense(1)])
    x = np.random.default_rng(0).normal(size=(B, T, I)).astype("float32")
    want = model.predict(x, verbose=0)
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    assert type(again.get_layer("rnn")) is LSTM
    np.testing.assert_array_equal(again.predict(x, verbose=0), want)
    ours = lstmcore.load(tmp_path / "m.keras", "rnn")       # without Keras
    np.testing.assert_allclose(ours(x)[0], again.get_layer("rnn")(x).detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend, said", [
    ("numpy", "True True"), ("jax", "numpy, got 'jax': set KERAS_BACKEND=torch")])
def test_other_backends(backend, said):
    pytest.importorskip("jax")                  # which Keras's numpy backend imports too
    code = f"""
import numpy as np, keras, lstmcore.keras
x = np.random.default_rng(0).normal(size=({B}, {T}, {I})).astype("float32")
mask = np.arange({T}) < np.array([[{T}], [2], [0]])
try:
    ours = lstmcore.keras.LSTM({H}, return_sequences=True)
except RuntimeError as error:
    print(error)
else:
    theirs = keras.layers.LSTM({H}, return_sequences=True)
    theirs.build(x.shape), ours.build(x.shape)
    theirs.set_weights(ours.get_weights())
    same = [np.abs(ours(x, mask=m) - theirs(x, mask=m)).max() < 2e-6 for m in (None, mask)]
    print(*same)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                         env={**os.environ, "KERAS_BACKEND": backend})
    assert said in run.stdout, run.stderr
