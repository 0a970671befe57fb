"""Long-lag tasks that made the LSTM's name, and a loop that trains LSTM and vanilla RNN on them.

A task is a function rng, n -> (x (T,n,I), lengths (n,), targets (T,n), counts (T,n)): what to read,
and what to answer at the steps that count. To run one in full:

    python tests/long_lags.py adding --forget-bias 4 --input-bias -2
    python tests/long_lags.py order --cell rnn
    python tests/long_lags.py spikes --hidden 1 --peepholes --lag 20
"""

import argparse
import functools
import json
import time

import numpy as np

from lstmcore import (LSTM, RNN, Linear, Module, clip_grad_norm, mse_loss, optim,
                      softmax_cross_entropy)


def adding(rng, n, *, lag=100):
    """The adding problem (Hochreiter and Schmidhuber 1997, experiment 4): numbers, two of them
    marked; at the end, tell 0.5 + (X1 + X2) / 4. Lengths are lag to 1.1 lag."""
    lengths = rng.integers(lag, lag + lag // 10 + 1, n)
    T, b = lengths.max(), np.arange(n)
    x = np.zeros((T, n, 2), np.float32)
    x[:, :, 0] = rng.uniform(-1, 1, (T, n))
    first = rng.integers(1, 10, n)
    second = (first + rng.integers(1, lag // 2 - 1, n) - 1) % (lag // 2 - 2) + 1
    second += second == first
    for t, value in ((0, -1), (lengths - 1, -1), (first, 1), (second, 1)):
        x[t, b, 1] = value
    targets = np.zeros((T, n), np.float32)
    targets[lengths - 1, b] = 0.5 + (x[first, b, 0] + x[second, b, 0]) / 4
    return x, lengths, targets, _last(lengths, T)


def order(rng, n, *, lag=100):
    """Temporal order (experiment 6a): noise symbols, among them two of X and Y; at the end, tell
    which of the four orders it was. X or Y stand near 0.15 lag and 0.55 lag."""
    lengths = rng.integers(lag, lag + lag // 10 + 1, n)
    T, b = lengths.max(), np.arange(n)
    symbols = rng.integers(0, 4, (T, n))                # a, b, c, d; X, Y = 4, 5; E, B = 6, 7
    first = rng.integers(lag // 10, lag // 5 + 1, n)
    second = rng.integers(lag // 2, lag // 2 + lag // 10 + 1, n)
    one, two = rng.integers(0, 2, (2, n))
    for t, value in ((0, 6), (lengths - 1, 7), (first, 4 + one), (second, 4 + two)):
        symbols[t, b] = value
    targets = np.zeros((T, n), np.int64)
    targets[lengths - 1, b] = 2 * one + two
    return np.eye(8, dtype=np.float32)[symbols], lengths, targets, _last(lengths, T)


def spikes(rng, n, *, lag=20, count=8):
    """Measuring spike delays (Gers, Schraudolph and Schmidhuber 2002): a spike comes lag or lag+1
    steps after the one before; at each spike, tell which. Counting, with one input."""
    longer = rng.integers(0, 2, (count, n))
    at = np.cumsum(lag + longer, axis=0)
    T, b = at.max() + 1, np.arange(n)
    x = np.zeros((T, n, 1), np.float32)
    targets, counts = np.zeros((T, n), np.int64), np.zeros((T, n))
    x[0] = x[at, b] = 1
    targets[at, b], counts[at, b] = longer, 1
    return x, at[-1] + 1, targets, counts


def _last(lengths, T):
    return (np.arange(T)[:, None] == lengths - 1).astype(np.float64)


class Net(Module):
    """A recurrent layer and an answer at every step."""

    def __init__(self, recurrent, outputs, seed):
        self.recurrent = recurrent
        self.head = Linear(recurrent.hidden_size, outputs, seed=seed)

    def __call__(self, x, lengths):
        return self.head(self.recurrent(x, lengths=lengths)[0])

    def backward(self, dy):
        self.recurrent.backward(self.head.backward(dy))


OUTPUTS = {adding: 1, order: 4, spikes: 2}


def make(task, *, cell="lstm", hidden=32, peepholes=False, forget_bias=1.0, input_bias=0.0, seed=0):
    """A fresh network for a task; input_bias is added to the input gates' biases."""
    inputs = {adding: 2, order: 8, spikes: 1}[task]
    if cell == "rnn":
        recurrent = RNN(inputs, hidden, seed=seed)
    else:
        recurrent = LSTM(inputs, hidden, peepholes=peepholes, forget_bias=forget_bias, seed=seed)
        recurrent.parameters()["bias_l0"][:hidden] += input_bias
    return Net(recurrent, OUTPUTS[task], seed + 1)


def train(net, task, sequences, *, lag, lr=1e-2, batch=32, clip=1.0, seed=0, every=100, goal=None,
          say=None):
    """Train on fresh sequences, at most so many; (sequences seen, error on 2560 others).

    The error is the mean absolute error of `adding`, and else the share of wrong answers. With a
    goal, it is looked at `every` updates, and training ends below it.
    """
    rng = np.random.default_rng(seed)
    draw = functools.partial(task, lag=lag)
    optimizer = optim.Adam(net, lr)
    updates = sequences // batch
    for update in range(1, updates + 1):
        x, lengths, targets, counts = draw(rng, batch)
        net.train().zero_grad()
        _, dy = _loss(task, net(x, lengths), targets, counts)
        net.backward(dy)
        clip_grad_norm(net, clip)
        optimizer.step()
        if update == updates or goal is not None and update % every == 0:
            error = measure(net, task, lag)
            if say:
                say(dict(sequences=update * batch, error=round(error, 5)))
            if goal is not None and error < goal:
                break
    return update * batch, error


def measure(net, task, lag, n=2560):
    """The error on n sequences of a fixed seed that training never draws."""
    x, lengths, targets, counts = task(np.random.default_rng([97, lag]), n, lag=lag)
    answers = net.eval()(x, lengths)
    wrong = np.abs(answers[..., 0] - targets) if task is adding else answers.argmax(2) != targets
    return float((wrong * counts).sum() / counts.sum())


def _loss(task, answers, targets, counts):
    if task is adding:
        return mse_loss(answers, targets[..., None], mask=counts)
    return softmax_cross_entropy(answers, targets, mask=counts)


def main():
    parser = argparse.ArgumentParser(description="Train on a long-lag task; a JSON line per look.")
    parser.add_argument("task", choices=[task.__name__ for task in OUTPUTS])
    parser.add_argument("--cell", choices=("lstm", "rnn"), default="lstm")
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--peepholes", action="store_true")
    parser.add_argument("--forget-bias", type=float, default=1.0)
    parser.add_argument("--input-bias", type=float, default=0.0)
    parser.add_argument("--lag", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--sequences", type=int, default=74_000)
    parser.add_argument("--goal", type=float, default=None, help="stop below this error")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    task = {task.__name__: task for task in OUTPUTS}[options.task]
    goal = {adding: 0.04}.get(task, 0.001) if options.goal is None else options.goal
    net = make(task, cell=options.cell, hidden=options.hidden, peepholes=options.peepholes,
               forget_bias=options.forget_bias, input_bias=options.input_bias, seed=options.seed)
    start = time.time()
    seen, error = train(net, task, options.sequences, lag=options.lag, lr=options.lr, goal=goal,
                        seed=options.seed, say=lambda record: print(json.dumps(record), flush=True))
    print(json.dumps(dict(vars(options), goal=goal, sequences=seen, error=error,
                          solved=error < goal, seconds=round(time.time() - start))))


if __name__ == "__main__":
    main()
