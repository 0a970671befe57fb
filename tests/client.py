"""A program of somebody else's, which test_types.py has checked by mypy --strict and pyright."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import lstmcore
from lstmcore import LSTM, RNN, Dropout, Embedding, Linear, Module, optim, softmax_cross_entropy


class Tagger(Module):
    def __init__(self, V: int, H: int) -> None:
        self.embed = Embedding(V, 8, seed=0)
        self.lstm = LSTM(8, H, bidirectional=True, seed=1)
        self.head = Linear(2 * H, 2, seed=2)

    def loss(self, tokens: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
        y, (h_n, c_n) = self.lstm(self.embed(tokens), lengths=[3, 2])
        assert h_n.shape == c_n.shape
        loss, d = softmax_cross_entropy(self.head(y), labels)
        dx, (dh0, dc0) = self.lstm.backward(self.head.backward(d))
        self.embed.backward(dx)
        return loss


def train() -> dict[str, tuple[int, ...]]:
    model = Tagger(5, 4).train()
    optimizer = optim.Adam(model, lr=0.01)
    schedule: optim.Schedule = optim.WarmUp(optimizer, 2, then=optim.CosineDecay(optimizer, 9))
    tokens = np.zeros((3, 2), np.int64)
    for _ in range(2):
        model.zero_grad()
        total: float = model.loss(tokens, tokens)
        norm: float = lstmcore.clip_grad_norm(model, 5.0)
        optimizer.step()
        schedule.step()
        assert total > 0 and norm > 0
    return {name: p.shape for name, p in model.freeze().parameters().items()}


def functions() -> tuple[int, ...]:
    x, W_ih, W_hh = (np.ones(n, "f4") for n in ((3, 2, 5), (16, 5), (16, 4)))
    y, (h_n, c_n), tape = lstmcore.lstm_forward(x, W_ih, W_hh, lengths=[3, 1])
    with lstmcore.threads(1):
        g = lstmcore.lstm_backward(tape, y, h_n, c_n)
    return g.dW_hh.shape


def streams() -> int:
    stream = LSTM(3, 5).stream(batch_size=2)
    h_t = stream.step(np.zeros((2, 3), "f4"))
    stream.step(np.zeros((2, 3), "f4"), out=h_t)
    h, c = stream.state
    y, h_n = RNN(3, 5, nonlinearity="relu")(Dropout(0.5).eval()(np.zeros((4, 2, 3), "f4")))
    return int(h_t.shape[1] + h.shape[0] + c.shape[0] + y.shape[0] + h_n.shape[0])


def write(path: Path) -> str:
    model = lstmcore.LanguageModel("char", hidden_size=8, num_layers=1)
    model.fit("abc" * 40, steps=1, seq_length=8, batch_size=2, progress=False).save(path)
    return lstmcore.LanguageModel.load(path).sample("a", length=2, seed=0)
