"""The training loop of the language model: truncated backpropagation through time over a stream.

The text is cut into B streams that run side by side; each step reads the next window of T tokens
of all of them, and the state at the end of a window is where the next one starts (Williams and
Peng 1990). A run can be taken apart anywhere between two steps and put together again: `snapshot`
holds all that the next step depends on. Knows a network, tokens and time; knows no text and no
files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lstmcore import checks, optim
from lstmcore._types import Array, Floats, Ints
from lstmcore.threads import one_blas_thread

CONTEXT = 100           # tokens that a stream of `total_nats` reads before it is scored
SCHEDULES = ("step", "cosine", "plateau", "constant")
OPTIMIZERS = {"sgd": optim.SGD, "rmsprop": optim.RMSprop, "adagrad": optim.Adagrad,
              "adam": optim.Adam, "adamw": optim.AdamW}
FIXED = ("batch_size", "seq_length", "optimizer", "validation")     # not to be changed by resuming


@dataclasses.dataclass
class Settings:
    """How a model is trained.

    seq_length : T, the steps that one update looks back; the state is carried on beyond
    batch_size : B, the streams that the text is cut into; fewer for a text below B·T tokens
    optimizer : "adam", "adamw", "rmsprop", "adagrad" or "sgd" (with momentum)
    lr : the learning rate, reached after `warmup` steps
    schedule : "step": lr · decay^n, where n counts the epochs after epoch decay_after;
        "cosine": half a cosine down to 1 % of lr at the end of the budget (epochs, minutes or
        steps); "plateau": lr halves when the validation loss did not fall; "constant".
        By default "cosine" where the budget is minutes, else "step"
    clip : the largest norm of all gradients together; 0 for no limit
    weight_decay : as the optimizer has it
    evaluate_every : steps from one evaluation to the next; by default one epoch
    patience : stop after so many evaluations in a row without a better one; None for never
    validation : the share of the text, at its end, that is kept for validation
    """

    seq_length: int = 100
    batch_size: int = 64
    optimizer: str = "adam"
    lr: float = 2e-3
    momentum: float = 0.9
    schedule: str = None
    decay: float = 0.97
    decay_after: int = 10
    warmup: int = 0
    clip: float = 5.0
    weight_decay: float = 0.0
    evaluate_every: int = None
    patience: int = None
    validation: float = 0.05

    def __post_init__(self):
        for name in ("seq_length", "batch_size"):
            checks.size(name, getattr(self, name))
        for name in ("warmup", "decay_after"):
            checks.size(name, getattr(self, name), at_least=0)
        for name in ("evaluate_every", "patience"):
            if getattr(self, name) is not None:
                checks.size(name, getattr(self, name))
        _check_choice("optimizer", self.optimizer, OPTIMIZERS)
        if self.schedule is not None:
            _check_choice("schedule", self.schedule, SCHEDULES)
        for name in ("lr", "clip", "weight_decay", "momentum", "decay"):
            checks.number(name, getattr(self, name))
        if self.validation is not None and not 0 <= self.validation < 1:
            raise ValueError(f"validation must be at least 0 and below 1, got {self.validation}")


@dataclasses.dataclass
class Budget:
    """When to end: after so many epochs, minutes or steps in all, whatever comes first."""

    epochs: float = None
    minutes: float = None
    steps: int = None

    def __post_init__(self):
        for name, value in vars(self).items():
            if value is not None:
                checks.number(name, value)
        if self.epochs is self.minutes is self.steps is None:
            self.epochs = 10

    def spent(self, epochs: float, seconds: float, steps: int) -> float:
        """The share of the budget that is used up, from 0 to 1."""
        pairs = ((epochs, self.epochs), (seconds / 60, self.minutes), (steps, self.steps))
        shares = [used / given if given else 1.0 for used, given in pairs if given is not None]
        return min(1.0, max(shares))


class Trainer:
    """One run over `tokens` (N,) with `validation` (M,), or None, to choose the best weights by.

    report : called with each new record of `history`, after the evaluation that it tells about;
        a true result ends the run
    tick : called after each step with the trainer, to show progress
    """

    def __init__(self, network: Any, tokens: Ints, validation: Ints | None, settings: Settings,
                 budget: Budget, report: Callable[[dict[str, Any]], object] | None = None,
                 tick: Callable[[Trainer], object] | None = None) -> None:
        self.network, self.settings, self.budget = network, settings, budget
        self.report, self.tick = report or (lambda record: None), tick or (lambda trainer: None)
        self.x, self.targets = streams(tokens, settings.batch_size, settings.seq_length)
        self.validation = validation
        self.digest = hashlib.sha256(np.ascontiguousarray(tokens)).hexdigest()
        options = dict(weight_decay=settings.weight_decay)
        if settings.optimizer in ("sgd", "rmsprop"):
            options["momentum"] = settings.momentum if settings.optimizer == "sgd" else 0.0
        self.optimizer = OPTIMIZERS[settings.optimizer](network, settings.lr, **options)
        self.schedule = settings.schedule or ("step" if budget.minutes is None else "cosine")
        self.gradients = network.gradients()
        self.state = None               # what the streams carry from window to window
        self.epoch = self.position = self.step = 0
        self.seconds = 0.0              # of this run and those that it resumes
        self.loss_sum, self.loss_tokens = 0.0, 0        # since the last evaluation
        self.scale, self.waited = 1.0, 0                # of plateau and patience
        self.best, self.best_loss = None, math.inf      # weights, by validation
        self.chosen, self.chosen_loss = None, math.inf  # the same with the run's last evaluation
        self.last = None                                # the weights when the run has ended
        self.history, self.outcome = [], None

    @property
    def tokens_seen(self) -> int:
        """Tokens that the run has trained on, repetitions included."""
        L, B = self.x.shape
        return (self.epoch * L + self.position) * B

    @property
    def epochs(self) -> float:
        """Epochs done, as a fraction."""
        return self.epoch + self.position / len(self.x)

    def run(self) -> None:
        """Train until the budget is spent, the loss stops falling, or an interrupt asks to end.

        The network is left with the best weights; `outcome` says why the run ended. Raises
        FloatingPointError, with the best weights in place, where a loss or gradient is not finite.
        """
        self.network.train()
        self._clock = time.perf_counter() - self.seconds
        # The kernels' threads and BLAS's, taking turns, wait for each other: 2.5 times the time of
        # one thread for BLAS (hidden 128, 2 cores). What overflows is found by _check_finite.
        with one_blas_thread(), np.errstate(all="ignore"), _interrupts() as interrupted:
            while self.outcome is None and self._share() < 1:
                due = self._advance()
                self.tick(self)
                if due:
                    self._evaluate(scheduled=True)
                if interrupted:
                    self.outcome = interrupted[0].name
        self.outcome = self.outcome or "finished"
        measured = self.history[-1]["step"] if self.history else -1
        if self.outcome == "finished" and measured < self.step:
            self._evaluate(scheduled=False)
        self.last = self.network.state_dict()
        if self.chosen is not None:
            self.network.load_state_dict(self.chosen)
        self.network.eval()
        return self

    def snapshot(self) -> tuple[dict[str, Floats], dict[str, Array], dict[str, Any]]:
        """(weights, arrays, meta): the best weights, and all that a resumed run needs beside them.

        Arrays are named best.*, last.* (each only if it is not `weights`), optimizer.*, state.*;
        meta can be held by JSON.
        """
        last = self.last or self.network.state_dict()
        weights = last if self.chosen is None else self.chosen
        arrays = {f"optimizer.{name}": a for name, a in self.optimizer.state_dict().items()}
        for kind, kept in (("last", last), ("best", self.best)):
            if kept is not None and kept is not weights:
                arrays.update({f"{kind}.{name}": a for name, a in kept.items()})
        for n, part in enumerate(_parts(self.state)):
            arrays[f"state.{n}"] = part
        own = ("epoch", "position", "step", "seconds", "loss_sum", "loss_tokens", "scale", "waited",
               "history", "digest")
        best_loss = self.best_loss if self.best is not None else None
        return weights, arrays, {
            **{name: getattr(self, name) for name in own}, "best_loss": best_loss,
            "settings": dataclasses.asdict(self.settings),
            "budget": dataclasses.asdict(self.budget), "rng": self.network.rng_state()}

    def restore(self, arrays: Mapping[str, Array], meta: Mapping[str, Any],
                weights: Mapping[str, Floats]) -> None:
        """Go on where a snapshot was taken, with the same tokens."""
        if meta["digest"] != self.digest:
            raise ValueError("this is not the text that the run to resume was trained on (or it "
                             "was divided otherwise into training and validation)")
        for name in FIXED:
            if (mine := getattr(self.settings, name)) != (then := meta["settings"][name]):
                raise ValueError(f"a resumed run cannot change {name} from {then} to {mine}")
        part = {kind: {name[len(kind) + 1:]: a for name, a in arrays.items()
                       if name.startswith(kind + ".")}
                for kind in ("last", "best", "optimizer", "state")}
        self.network.load_state_dict(part["last"] or weights)
        self.network.load_rng_state(meta["rng"])
        self.optimizer.load_state_dict(part["optimizer"])
        state = tuple(np.array(part["state"][str(n)]) for n in range(len(part["state"])))
        self.state = state if len(state) > 1 else state[0] if state else None
        for name in ("epoch", "position", "step", "seconds", "loss_sum", "loss_tokens", "scale",
                     "waited", "history"):
            setattr(self, name, meta[name])
        if meta["best_loss"] is not None:
            self.best = {name: np.array(a) for name, a in (part["best"] or weights).items()}
            self.best_loss = meta["best_loss"]
        self.chosen, self.chosen_loss = self.best, self.best_loss

    def _advance(self):
        """One update on the next window. Whether an evaluation is due."""
        end = min(self.position + self.settings.seq_length, len(self.x))
        window = slice(self.position, end)
        self.optimizer.lr = self._learning_rate()
        self.network.zero_grad()
        loss, dy, self.state = self.network.loss(self.x[window], self.targets[window], self.state)
        self._check_finite("loss", loss)
        self.network.backward_below(dy)
        norm = optim.clip_grad_norm(self.gradients, self.settings.clip or 1e300)
        self._check_finite("norm of the gradients", norm)
        self.optimizer.step()

        self.step += 1
        count = self.x[window].size
        self.loss_sum += loss * count
        self.loss_tokens += count
        self.position, every = end, self.settings.evaluate_every
        if end == len(self.x):
            self.epoch, self.position, self.state = self.epoch + 1, 0, None
        self.seconds = time.perf_counter() - self._clock
        return self.step % every == 0 if every else self.position == 0

    def _share(self):
        return self.budget.spent(self.epochs, self.seconds, self.step)

    def _learning_rate(self):
        s, lr = self.settings, self.settings.lr * self.scale
        if self.step < s.warmup:
            return lr * (self.step + 1) / s.warmup
        if self.schedule == "step":
            return lr * s.decay ** max(0, self.epoch + 1 - s.decay_after)
        if self.schedule == "cosine":
            return lr * (0.01 + 0.99 * (1 + math.cos(math.pi * self._share())) / 2)
        return lr

    def _evaluate(self, scheduled):
        """Measure, remember the best weights, report. Only what is `scheduled` steers the run."""
        train = self.loss_sum / self.loss_tokens if self.loss_tokens else None
        loss = None
        if self.validation is not None:
            self.network.eval()
            loss = total_nats(self.network, self.validation) / (len(self.validation) - 1)
            self.network.train()
            self._check_finite("validation loss", loss)
        better = loss is None or loss < self.chosen_loss
        if better:
            self.chosen, self.chosen_loss = self.network.state_dict(), loss or math.inf
        record = {"step": self.step, "epoch": round(self.epochs, 4), "loss": train,
                  "validation": loss, "lr": self.optimizer.lr, "seconds": round(self.seconds, 3),
                  "tokens_per_second": round(self.tokens_seen / max(self.seconds, 1e-9)),
                  "best": better}
        if scheduled:
            self.best, self.best_loss = self.chosen, self.chosen_loss
            self.loss_sum, self.loss_tokens = 0.0, 0
            self.waited = 0 if better else self.waited + 1
            if self.schedule == "plateau" and not better:
                self.scale *= 0.5
            self.history.append(record)
            if self.settings.patience is not None and self.waited >= self.settings.patience:
                self.outcome = "no progress"
        if self.report(record):
            self.outcome = self.outcome or "stopped by a callback"
        self.seconds = time.perf_counter() - self._clock

    def _check_finite(self, what, value):
        if math.isfinite(value):
            return
        if self.chosen is not None:
            self.network.load_state_dict(self.chosen)
        self.network.eval()
        raise FloatingPointError(
            f"the {what} is {value} at step {self.step + 1} (epoch {self.epoch + 1}, learning rate "
            f"{self.optimizer.lr:.3g}); a lower lr or clip may help")


def streams(tokens: Ints, B: int, T: int) -> tuple[Ints, ...]:
    """Tokens (N,) as B streams side by side: inputs and their successors, each (L, B).

    The last N - 1 - L·B tokens, fewer than B, are left out. A text below B·T tokens gets fewer
    streams.
    """
    n = len(tokens) - 1
    B = min(B, max(1, n // T))
    L = n // B
    return tuple(np.ascontiguousarray(tokens[shift:shift + B * L].reshape(B, L).T)
                 for shift in (0, 1))


@one_blas_thread()
def total_nats(network: Any, tokens: Ints) -> float:
    """-Σ log p(token | those before it), over all of `tokens` (N,) but the first.

    A long text is cut into up to 64 pieces of at least 1000 tokens, each read together with the
    100 tokens before it; below 2000 tokens the sum is exact.
    """
    n = len(tokens) - 1
    S = max(1, min(64, n // (10 * CONTEXT)))
    context = CONTEXT if S > 1 else 0
    L = -(-(n - context) // S)
    at = np.arange(context + L)[:, None] + L * np.arange(S)
    scored = ((np.arange(S) == 0) | (np.arange(context + L)[:, None] >= context)) & (at < n)
    at = np.minimum(at, n - 1)
    x, targets = tokens[at], tokens[at + 1]
    state, total = None, 0.0
    for t in range(0, len(x), 4 * CONTEXT):
        window = slice(t, t + 4 * CONTEXT)
        loss, _, state = network.loss(x[window], targets[window], state, mask=scored[window],
                                      reduction="sum")
        total += loss
    return total


@contextlib.contextmanager
def _interrupts():
    """A list that receives the first SIGINT or SIGTERM; the second one acts as it always does.

    An exception in the middle of an update would leave half-updated weights. Signals reach only
    the main thread; elsewhere the list stays empty.
    """
    received, before = [], {}

    def note(number, frame):
        received.append(signal.Signals(number))
        restore()

    def restore():
        while before:
            signal.signal(*before.popitem())

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        restore()


def _parts(state):
    return () if state is None else state if isinstance(state, tuple) else (state,)


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
