"""The shapes in which sequences come and go: each as a model in a few lines, proven and trained.

Many to many, many to one, one to many, sequence to sequence, truncated and full backpropagation
through time. Each model's gradient is checked by finite differences through all of its layers, and
each learns a task that only the intended path can solve.
"""

import numpy as np
import pytest
from slopes import assert_gradients

from lstmcore import (LSTM, Embedding, LastStep, Linear, MaxOverTime, MeanOverTime, Module, Tanh,
                      clip_grad_norm, sequence_mask, softmax_cross_entropy, threads)
from lstmcore.optim import Adam


def assert_model(model, loss, close):
    """model.gradients(), as loss() leaves them, are the slopes of loss() in every parameter."""
    model.zero_grad()
    loss()
    gradients = {name: g.copy() for name, g in model.gradients().items()}
    assert all(g.any() for g in gradients.values())
    assert_gradients(close, loss, model.parameters(), gradients)


def train(model, batches, lr=0.01):
    """Adam over batches of arguments for model.loss, which also does the backward pass."""
    optimizer = Adam(model, lr)
    with threads(1):
        for batch in batches:
            model.zero_grad()
            loss = model.loss(*batch)
            clip_grad_norm(model, 1.0)
            optimizer.step()
    return loss


def ragged(rng, T, B):
    lengths = rng.integers(0, T + 1, B)
    lengths[:2] = T, 0
    return lengths


# ---- many to many: a label for every token ----------------------------------------------------

class Tagger(Module):
    """tokens (T, B) -> logits (T, B, O), each of them knowing what comes before and after."""

    def __init__(self, V, E, H, labels, **options):
        self.embed = Embedding(V, E, seed=0, **options)
        self.lstm = LSTM(E, H, bidirectional=True, seed=1, **options)
        self.head = Linear(2 * H, labels, seed=2, **options)

    def logits(self, tokens, lengths=None):
        return self.head(self.lstm(self.embed(tokens), lengths=lengths)[0])

    def loss(self, tokens, labels, lengths):
        logits = self.logits(tokens, lengths)
        loss, d = softmax_cross_entropy(logits, labels, mask=sequence_mask(lengths, len(tokens)))
        dx, _ = self.lstm.backward(self.head.backward(d))
        self.embed.backward(dx)
        return loss


def tagging(rng, T=8, B=32):
    """Label 1: the token to the left is smaller than the one to the right, both being there."""
    tokens, lengths = rng.integers(0, 4, (T, B)), ragged(rng, T, B)
    labels, there = np.zeros((T, B), int), sequence_mask(lengths, T)
    labels[1:-1] = (tokens[:-2] < tokens[2:]) & there[2:]
    return tokens, labels, lengths


def test_many_to_many_gradient(close):
    model, data = Tagger(4, 3, 5, 2, dtype="float64"), tagging(np.random.default_rng(0), 5, 4)
    assert_model(model, lambda: model.loss(*data), close)


def test_many_to_many_learns():
    rng, model = np.random.default_rng(0), Tagger(4, 8, 16, 2)
    train(model, (tagging(rng) for _ in range(300)), lr=0.02)
    tokens, labels, lengths = tagging(rng, B=400)
    right = model.eval().logits(tokens, lengths).argmax(axis=2) == labels
    assert right[sequence_mask(lengths, len(tokens))].mean() > 0.95


# ---- many to one: a label for every sequence --------------------------------------------------

class Classifier(Module):
    """x (T, B, I) -> logits (B, O): by the last real step, or the mean or maximum over them."""

    def __init__(self, inputs, H, classes, pool, *, bidirectional=False, **options):
        self.lstm = LSTM(inputs, H, bidirectional=bidirectional, seed=0, **options)
        self.pool = pool
        self.head = Linear(H * (1 + bidirectional), classes, seed=1, **options)

    def logits(self, x, lengths=None):
        return self.head(self.pool(self.lstm(x, lengths=lengths)[0], lengths))

    def loss(self, x, labels, lengths):
        loss, d = softmax_cross_entropy(self.logits(x, lengths), labels, mask=lengths > 0)
        self.lstm.backward(self.pool.backward(self.head.backward(d)))
        return loss


def signs(rng, T=12, B=32, dtype="float32"):
    """Label 1: the first number of the sequence is positive, whatever noise follows."""
    x, lengths = rng.standard_normal((T, B, 1)).astype(dtype), ragged(rng, T, B)
    return x, (x[0, :, 0] > 0).astype(int), lengths


POOLS = {"last": LastStep, "mean": MeanOverTime, "max": MaxOverTime}


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("pool", POOLS)
def test_many_to_one_gradient(pool, bidirectional, close):
    chosen = LastStep(bidirectional=bidirectional) if pool == "last" else POOLS[pool]()
    model = Classifier(1, 4, 2, chosen, bidirectional=bidirectional, dtype="float64")
    data = signs(np.random.default_rng(0), 5, 4, "float64")
    assert_model(model, lambda: model.loss(*data), close)


@pytest.mark.parametrize("pool", POOLS)
def test_many_to_one_learns(pool):
    rng, model = np.random.default_rng(0), Classifier(1, 16, 2, POOLS[pool]())
    train(model, (signs(rng) for _ in range(250)), lr=0.02)
    x, labels, lengths = signs(rng, B=500)
    right = model.eval().logits(x, lengths).argmax(axis=1) == labels
    assert right[lengths > 0].mean() > 0.95


def test_many_to_one_by_the_final_state(close):
    """The final state itself is the last step's h, and its gradient goes back in as dstate."""
    pooled = Classifier(2, 4, 3, LastStep(), dtype="float64")
    x = np.random.default_rng(0).standard_normal((6, 5, 2))
    labels, lengths = np.array([0, 2, 1, 1, 0]), np.array([6, 1, 3, 5, 2])
    pooled.loss(x, labels, lengths)
    wanted = {name: g.copy() for name, g in pooled.gradients().items()}
    pooled.zero_grad()
    _, (h_n, _) = pooled.lstm(x, lengths=lengths)
    _, d = softmax_cross_entropy(pooled.head(h_n[-1]), labels)
    pooled.lstm.backward(dstate=(pooled.head.backward(d)[None], None))
    for name, g in pooled.gradients().items():
        close(g, wanted[name], "identity", name)


# ---- one to many: a vector becomes a sequence -------------------------------------------------

class Generator(Module):
    """A vector (B, I) sets h0; the LSTM then writes tokens, each fed back as the next input."""

    def __init__(self, inputs, V, H, **options):
        self.start, self.squash = Linear(inputs, H, seed=0, **options), Tanh()
        self.embed = Embedding(V + 1, 8, seed=1, **options)        # token V: the beginning
        self.lstm, self.head = LSTM(8, H, seed=2, **options), Linear(H, V, seed=3, **options)
        self.begin = V

    def loss(self, vector, tokens):
        fed = np.vstack([np.full((1, tokens.shape[1]), self.begin), tokens[:-1]])
        h0 = self.squash(self.start(vector))[None]
        y, _ = self.lstm(self.embed(fed), state=(h0, np.zeros_like(h0)))
        loss, d = softmax_cross_entropy(self.head(y), tokens)
        dx, (dh0, _) = self.lstm.backward(self.head.backward(d))
        self.embed.backward(dx)
        self.start.backward(self.squash.backward(dh0[0]))
        return loss

    def generate(self, vector, T):
        s = self.lstm.stream(len(vector))
        h0 = self.squash(self.start(vector))[None]
        s.state = h0, np.zeros_like(h0)
        tokens = [np.full(len(vector), self.begin)]
        for _ in range(T):
            tokens.append(self.head(s.step(self.embed(tokens[-1]))).argmax(axis=1))
        return np.array(tokens[1:])


def countdown(rng, B=32, T=6, dtype="float32"):
    """A one-hot number n becomes n, n-1, ..., 1, 0, 0, ..."""
    n = rng.integers(0, 6, B)
    return np.eye(6, dtype=dtype)[n], np.maximum(n - np.arange(T)[:, None], 0)


def test_one_to_many_gradient(close):
    model = Generator(6, 6, 5, dtype="float64")
    data = countdown(np.random.default_rng(0), 4, 5, "float64")
    assert_model(model, lambda: model.loss(*data), close)


def test_one_to_many_learns():
    rng, model = np.random.default_rng(0), Generator(6, 6, 24)
    train(model, (countdown(rng) for _ in range(250)), lr=0.02)
    vector, tokens = countdown(rng, B=50)
    assert (model.eval().generate(vector, len(tokens)) == tokens).all()


# ---- sequence to sequence: two LSTMs ----------------------------------------------------------

class Translator(Module):
    """An encoder's final state is the decoder's initial state (Sutskever et al. 2014)."""

    def __init__(self, V, H, **options):
        self.embed = Embedding(V, 8, seed=0, **options)
        self.embed_out = Embedding(V + 1, 8, seed=1, **options)    # token V: the beginning
        self.encoder, self.decoder = LSTM(8, H, seed=2, **options), LSTM(8, H, seed=3, **options)
        self.head, self.begin = Linear(H, V, seed=4, **options), V

    def loss(self, tokens, lengths, target):
        fed = np.vstack([np.full((1, target.shape[1]), self.begin), target[:-1]])
        _, state = self.encoder(self.embed(tokens), lengths=lengths)
        y, _ = self.decoder(self.embed_out(fed), state, lengths)
        mask = sequence_mask(lengths, len(target))
        loss, d = softmax_cross_entropy(self.head(y), target, mask=mask)
        dfed, dstate = self.decoder.backward(self.head.backward(d))
        self.embed_out.backward(dfed)
        dx, _ = self.encoder.backward(dstate=dstate)
        self.embed.backward(dx)
        return loss

    def translate(self, tokens, lengths, T):
        s = self.decoder.stream(len(lengths))
        _, s.state = self.encoder(self.embed(tokens), lengths=lengths)
        out = [np.full(len(lengths), self.begin)]
        for _ in range(T):
            out.append(self.head(s.step(self.embed_out(out[-1]))).argmax(axis=1))
        return np.array(out[1:])


def backwards(rng, T=5, B=64):
    """Each sequence is to be written backwards."""
    tokens, lengths = rng.integers(0, 5, (T, B)), ragged(rng, T, B)
    t = np.arange(T)[:, None]
    target = np.take_along_axis(tokens, np.where(t < lengths, lengths - 1 - t, 0), axis=0)
    return tokens, lengths, target


def test_sequence_to_sequence_gradient(close):
    model, data = Translator(5, 4, dtype="float64"), backwards(np.random.default_rng(0), 4, 5)
    assert_model(model, lambda: model.loss(*data), close)


def test_sequence_to_sequence_learns():
    rng, model = np.random.default_rng(0), Translator(5, 48)
    train(model, (backwards(rng) for _ in range(500)), lr=0.015)
    tokens, lengths, target = backwards(rng, B=300)
    right = model.eval().translate(tokens, lengths, len(target)) == target
    assert right[sequence_mask(lengths, len(target))].mean() > 0.95


# ---- backpropagation through time: truncated, with the state carried on; and full -------------

class Predictor(Module):
    """Numbers in, a number per step out."""

    def __init__(self, H=5, **options):
        self.lstm, self.head = LSTM(2, H, 2, seed=0, **options), Linear(H, 1, seed=1, **options)

    def window(self, x, dy, state, backward=True):
        """Loss Σ dy · y of one window, and the state to carry on; its gradient stays in it."""
        y, state = self.lstm(x, state)
        loss = (self.head(y) * dy).sum()
        if backward:
            self.lstm.backward(self.head.backward(dy))
        return loss, state


def stream_of(T, B=3):
    rng = np.random.default_rng(T)
    return rng.standard_normal((T, B, 2)), rng.standard_normal((T, B, 1))


def test_windows_with_a_carried_state_are_the_whole_sequence(close):
    model, (x, dy) = Predictor(dtype="float64"), stream_of(60)
    state, total = None, 0.0
    for t in range(0, 60, 7):
        loss, state = model.window(x[t:t + 7], dy[t:t + 7], state)
        total += loss
    loss, last = model.window(x, dy, None)
    close(total, np.array(loss), "identity")
    close(state, last, "identity")


def test_truncated_gradient_treats_the_carried_state_as_given(close):
    """The gradient of each window by finite differences, the state it starts from held fixed."""
    model, (x, dy) = Predictor(dtype="float64"), stream_of(14)
    _, state = model.window(x[:7], dy[:7], None)
    assert_model(model, lambda: model.window(x[7:], dy[7:], state)[0], close)


def test_full_gradient_reaches_the_first_of_a_thousand_steps(close):
    lstm, x = LSTM(2, 4, dtype="float64", seed=0), 0.02 * stream_of(1000, B=1)[0]
    bias = lstm.parameters()["bias_l0"]
    bias[:] = np.repeat([0, 9, 0, 0], 4)        # forget gates at 0.9999: the path stays open
    y, _ = lstm(x)
    dy = np.zeros_like(y)
    dy[-1] = 1.0
    dx, _ = lstm.backward(dy)
    first, slopes = x[0, 0].copy(), []
    for direction in np.eye(2):

        def at(distance):
            x[0, 0] = first + distance * direction
            return lstm(x)[0][-1].sum()
        slopes.append((8 * (at(1e-3) - at(-1e-3)) - (at(2e-3) - at(-2e-3))) / 12e-3)
    # Small, after a thousand steps, but there (a vanilla RNN's would be 0.9^1000 = 1e-46): so the
    # differences are taken 10 times as wide as elsewhere, and round to 1e-7 of the slope.
    assert np.abs(slopes).min() > 1e-5
    np.testing.assert_allclose(dx[0, 0], slopes, rtol=1e-6)


def test_full_gradient_in_windows(close):
    """dstate hands the gradient from a window to the one before it: windows, and yet full."""
    model, (x, dy) = Predictor(dtype="float64"), stream_of(21)
    model.window(x, dy, None)
    wanted = {name: g.copy() for name, g in model.lstm.gradients().items()}
    model.zero_grad()
    states = [None]
    for t in range(0, 21, 7):
        states.append(model.lstm(x[t:t + 7], states[-1])[1])
    dstate = None
    for n in (2, 1, 0):             # the forward pass once more for each, as memory is spared
        window = slice(7 * n, 7 * n + 7)
        y, _ = model.lstm(x[window], states[n])
        model.head(y)
        _, dstate = model.lstm.backward(model.head.backward(dy[window]), dstate)
    for name, g in model.lstm.gradients().items():
        close(g, wanted[name], "identity", name)


def test_a_carried_state_bridges_windows():
    """A sign shown in one window is asked for in the next: nothing but the state can tell it."""
    class Recall(Module):
        def __init__(self):
            self.lstm, self.head = LSTM(1, 8, seed=0), Linear(8, 2, seed=1)

        def loss(self, sign):
            shown = np.zeros((4, len(sign), 1), "float32")
            shown[0, :, 0] = 2 * sign - 1
            _, state = self.lstm(shown)
            y, _ = self.lstm(np.zeros_like(shown), state)
            loss, d = softmax_cross_entropy(self.head(y[-1]), sign)
            dy = np.zeros_like(y)
            dy[-1] = self.head.backward(d)
            self.lstm.backward(dy)
            return loss

    rng, model = np.random.default_rng(0), Recall()
    assert train(model, ((rng.integers(0, 2, 32),) for _ in range(150)), lr=0.02) < 0.05
