"""The training loop: budget, learning rate, clipping, best weights, patience, reports, Ctrl-C.

A run can be taken apart anywhere between two steps and put together again: `snapshot` holds all
that the next step depends on. Knows a network, a source of examples (`lstmcore.models.sources`) and
time; knows no text and no files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lstmcore import distributed, optim, renames, scalars
from lstmcore._types import Array, Floats

SCHEDULES = ("step", "cosine", "plateau", "constant")
FIXED = ("batch_size", "seq_length", "optimizer", "validation")     # not to be changed by resuming
WATCHED = 10            # steps, at least, whose mean loss says that it runs away: single ones vary
SHARDING = {"shards": None, "reduction": "tree", "wire": None}      # settings that older files lack
# What a run counts, by which it goes on.
OWN = ("epoch", "position", "step", "seconds", "loss_sum", "loss_tokens", "scale", "waited", "history")


@dataclasses.dataclass
class Settings:
    """How a model is trained.

    seq_length : T, the steps that one update looks back; the state is carried on beyond
    batch_size : B, the streams that the text is cut into; fewer for a text below B·T tokens
    optimizer : "adam", "adamw", "rmsprop", "adagrad" or "sgd" (with momentum)
    lr : the learning rate, reached after `warmup` steps
    schedule : "step": lr · decay^n, where n counts the epochs after epoch decay_after;
        "cosine": half a cosine down to 1 % of lr at the end of the budget (epochs, minutes or
        steps; an estimator's down to 0); "plateau": lr halves when the validation loss did not fall;
        "constant". By default "cosine" where the budget is minutes, else "step"
    clip : the largest norm of all gradients together; 0 for no limit
    weight_decay : as the optimizer has it
    evaluate_every : steps from one evaluation to the next; by default one epoch
    patience : stop after so many evaluations in a row without a better one; None for never
    validation : the share of the text, at its end, that is kept for validation; None: as the model has it
    shards : parts of the batch whose gradients are summed in a fixed order, for bits that do not
        depend on the number of processes; with a comm 8 by default, else none
    reduction : "tree", or "allreduce": MPI's own sum of a shard for each process
    wire : "bfloat16": gradients are rounded to it and travel so
        (all three: `lstmcore.distributed.Shards`)
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
    validation: float = None
    shards: int = None
    reduction: str = "tree"
    wire: str = None

    def __post_init__(self):
        for name in ("seq_length", "batch_size"):
            scalars.size(name, getattr(self, name))
        for name in ("warmup", "decay_after"):
            scalars.size(name, getattr(self, name), at_least=0)
        for name in ("evaluate_every", "patience", "shards"):
            if getattr(self, name) is not None:
                scalars.size(name, getattr(self, name))
        scalars.choice("optimizer", self.optimizer, optim.RULES)
        distributed.check_ways(self.reduction, self.wire)
        if self.schedule is not None:
            scalars.choice("schedule", self.schedule, SCHEDULES)
        for name in ("lr", "clip", "weight_decay", "momentum", "decay"):
            scalars.number(name, getattr(self, name))
        if self.validation is not None:
            scalars.fraction("validation", self.validation)

    def divide(self, processes: distributed.Processes) -> distributed.Shards | None:
        """The shards of a batch that these settings ask for; None for one process and no shards.

        For several processes `shards` is set here, so that a checkpoint says it.
        """
        if processes.comm is None and self.shards is None:
            for name in ("reduction", "wire"):
                if getattr(self, name) != SHARDING[name]:
                    raise ValueError(f"{name} needs a comm, or shards")
            return None
        if self.shards is None and self.reduction == "tree":
            self.shards = distributed.SHARDS
        return distributed.Shards(processes, self.shards or 1, reduction=self.reduction, wire=self.wire)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Settings:
        """These settings; TypeError for what is none."""
        renames.check_settings(given)
        known = list(cls.__dataclass_fields__)
        if unknown := sorted(given.keys() - set(known)):
            raise TypeError(f"fit has no setting {', '.join(unknown)}; it has {', '.join(known)}")
        return cls(**given)


@dataclasses.dataclass
class Budget:
    """When to end: after so many epochs, minutes or steps in all, whatever comes first."""

    epochs: float = None
    minutes: float = None
    steps: int = None

    def __post_init__(self):
        for name, value in vars(self).items():
            if value is not None:
                scalars.number(name, value)
        if self.epochs is self.minutes is self.steps is None:
            self.epochs = 10

    def spent(self, epochs: float, seconds: float, steps: int) -> float:
        """The share of the budget that is used up, from 0 to 1."""
        pairs = ((epochs, self.epochs), (seconds / 60, self.minutes), (steps, self.steps))
        shares = [used / given if given else 1.0 for used, given in pairs if given is not None]
        return min(1.0, max(shares))


class Trainer:
    """One run over a source of examples, which may hold some out to choose the best weights by.

    optimizer : one to go on with; by default a new one, by the settings
    report : called with each new record of `history`, after the evaluation that it tells about;
        a true result ends the run
    tick : called after each step with the trainer, to show progress
    shards : `distributed.Shards`, those of the source, for several processes that all run this
    """

    def __init__(self, network: Any, source: Any, settings: Settings, budget: Budget, *,
                 optimizer: optim.Optimizer | None = None,
                 report: Callable[[dict[str, Any]], object] | None = None,
                 tick: Callable[[Trainer], object] | None = None,
                 shards: distributed.Shards | None = None) -> None:
        self.network, self.source, self.settings, self.budget = network, source, settings, budget
        self.report, self.tick = report or (lambda record: None), tick or (lambda trainer: None)
        self.shards, self._signal, self._interrupted = shards, 0, []
        if shards:
            shards.attach(network)
        self.optimizer = optimizer or new_optimizer(network, settings)
        if shards:
            shards.divide(self.optimizer)
        self.gradients = network.gradients()
        self.schedule = settings.schedule or ("step" if budget.minutes is None else "cosine")
        self._rise, self._fall = self._schedules()
        self.epoch = self.position = self.step = 0
        self.seconds = 0.0              # of this run and those that it resumes
        self.loss_sum, self.loss_tokens = 0.0, 0        # since the last evaluation
        self.scale, self.waited = 1.0, 0                # of plateau and patience
        self.best, self.best_loss = None, math.inf      # weights, by validation
        self.chosen, self.chosen_loss = None, math.inf  # the same with the run's last evaluation
        self.last = None                                # the weights when the run has ended
        self.history, self.outcome, self._warned = [], None, False
        self._mark, self._means = (0.0, 0.0, 0, 0), []  # share, loss_sum, _tokens, step when it was watched

    @property
    def seen(self) -> int:
        """Tokens or sequences that the run has trained on, repetitions included."""
        return round(self.epochs * self.source.size)

    @property
    def epochs(self) -> float:
        """Epochs done, as a fraction."""
        return self.epoch + self.position / self.source.length

    @property
    def share(self) -> float:
        """The share of the budget that is used up, from 0 to 1."""
        return self.budget.spent(self.epochs, self.seconds, self.step)

    def run(self) -> Trainer:
        """Train until the budget is spent, the loss stops falling, or an interrupt asks to end.

        The network is left with the best weights; `outcome` says why the run ended. Raises
        FloatingPointError, with the best weights in place, where a loss or gradient is not finite.
        """
        self.network.train()
        self._clock = time.perf_counter() - self.seconds
        self._mark = self.share, self.loss_sum, self.loss_tokens, self.step
        # What overflows is found by _check_finite.
        try:
            with np.errstate(all="ignore"), _interrupts() as self._interrupted:
                while self.outcome is None and self.share < 1:
                    if self._advance():
                        self._evaluate(scheduled=True)
                    elif self.share >= self._mark[0] + 0.05 and self.step >= self._mark[3] + WATCHED:
                        self._watch()
                    self.tick(self)
                    # Of several processes all end after the same step, of which `_signal` is known to all.
                    if number := self._signal if self.shards else self._received():
                        self.outcome = signal.Signals(number).name
        finally:
            self.optimizer.restrict(None)
        if self.shards:
            self.shards.complete(self.optimizer)
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
        for n, part in enumerate(_parts(self.source.state) if self.position else ()):
            arrays[f"state.{n}"] = part
        best_loss = self.best_loss if self.best is not None else None
        return weights, arrays, {
            **{name: getattr(self, name) for name in OWN}, "digest": self.source.digest,
            "best_loss": best_loss, "settings": self._said(),
            "budget": dataclasses.asdict(self.budget), "rng": self.network.rng_state()}

    def _said(self):
        """The settings, without what is as before there were shards: an older lstmcore reads them."""
        return {name: value for name, value in dataclasses.asdict(self.settings).items()
                if name not in SHARDING or value != SHARDING[name]}

    def restore(self, arrays: Mapping[str, Array], meta: Mapping[str, Any],
                weights: Mapping[str, Floats]) -> None:
        """Go on where a snapshot was taken, with the same tokens."""
        if meta["digest"] != self.source.digest:
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
        self.source.state = state if len(state) > 1 else state[0] if state else None
        for name in OWN:
            setattr(self, name, meta[name])
        if meta["best_loss"] is not None:
            self.best = {name: np.array(a) for name, a in (part["best"] or weights).items()}
            self.best_loss = meta["best_loss"]
        self.chosen, self.chosen_loss = self.best, self.best_loss
        if self.position >= self.source.length:
            raise IndexError(f"position {self.position} of {self.source.length}")

    def _advance(self):
        """One update. Whether an evaluation is due."""
        if not self.position:
            self.source.start()
        self.optimizer.lr = self._learning_rate()
        loss, count, end = self._differentiate()
        clip = self.settings.clip or 1e300
        norm = self.shards.clip(clip) if self.shards else optim.clip_grad_norm(self.gradients, clip)
        self._check_finite("norm of the gradients", norm)
        if self.shards:
            self.shards.step(self.optimizer)
        else:
            self.optimizer.step()

        self.step += 1
        self.loss_sum += loss * count
        self.loss_tokens += count
        self.position, every = end, self.settings.evaluate_every
        if end == self.source.length:
            self.epoch, self.position = self.epoch + 1, 0
        if not self.shards:
            self.seconds = time.perf_counter() - self._clock
        return self.step % every == 0 if every else self.position == 0

    def _differentiate(self):
        """The loss at the position, how many it is the mean of, and the next position; the gradients
        are the loss's."""
        if not self.shards:
            self.network.zero_grad()
            loss, count, end, backward = self.source.loss(self.network, self.position)
            self._check_finite("loss", loss)
            backward()
            return loss, count, end
        losses = self.shards.differentiate(
            self.step, lambda shard: self.source.loss_of_shard(self.network, self.position, shard))
        loss, self.seconds, self._signal = self.shards.exchange(
            losses, time.perf_counter() - self._clock, self._received())
        self._check_finite("loss", loss)
        return loss, *self.source.extent(self.position)

    def _received(self):
        """The number of the signal that asks to end, or 0."""
        return self._interrupted[0].value if self._interrupted else 0

    def _schedules(self):
        """The schedules of `optim`: of the rate while it rises, and of its factor from then on."""
        s, unit = self.settings, optim.SGD(({}, {}), lr=1.0)
        rise = optim.WarmUp(optim.SGD(({}, {}), lr=s.lr), s.warmup) if s.warmup else None
        if self.schedule == "step":
            return rise, optim.StepDecay(unit, 1, s.decay, start=s.decay_after - 1)
        if self.schedule == "cosine":
            return rise, optim.CosineDecay(unit, self.source.steps or 1, final=self.source.final)
        return rise, None

    def _learning_rate(self):
        if self._rise and self.step < self._rise.steps:
            return self.scale * self._rise.lr_at(self.step)
        lr = self.settings.lr * self.scale
        if not self._fall:
            return lr
        at = self.step if self.source.steps else self.share
        return lr * self._fall.lr_at(self.epoch if self.schedule == "step" else at)

    def _evaluate(self, scheduled):
        """Measure, remember the best weights, report. Only what is `scheduled` steers the run."""
        if self.shards:
            self.shards.complete(self.optimizer)        # a report may save it
            self.shards.check_replicas()
        train = self.loss_sum / self.loss_tokens if self.loss_tokens else None
        self.network.eval()
        loss = self.source.validation(self.network)
        if loss is not None:
            self._check_finite("validation loss", loss)
        better = loss is None or loss < self.chosen_loss
        if better:
            self.chosen = self.network.state_dict()
            self.chosen_loss = math.inf if loss is None else loss
        record = {"step": self.step, "epoch": round(self.epochs, 4), "loss": train,
                  "validation": loss, "lr": self.optimizer.lr, "seconds": round(self.seconds, 3),
                  f"{self.source.unit}_per_second": round(self.seen / max(self.seconds, 1e-9)),
                  "best": better}
        if scheduled:
            self._warn_if_it_runs_away(train)
            self.best, self.best_loss = self.chosen, self.chosen_loss
            self.loss_sum, self.loss_tokens = 0.0, 0
            self._mark = self.share, 0.0, 0, self.step
            self.waited = 0 if better else self.waited + 1
            if self.schedule == "plateau" and not better:
                self.scale *= 0.5
            self.history.append(record)
            if self.settings.patience is not None and self.waited >= self.settings.patience:
                self.outcome = "no progress"
        stop = self.report(record)
        if self.shards:
            stop = self.shards.processes.bcast(bool(stop))
        if stop:
            self.outcome = self.outcome or "stopped by a callback"
        self.network.train()        # whatever a callback has done with it
        self.seconds = time.perf_counter() - self._clock
        if self.shards:
            self.seconds = self.shards.processes.bcast(self.seconds)

    def _watch(self):
        """Between evaluations that are far apart: whether the loss of late runs away."""
        _, total, count, _ = self._mark
        self._mark = self.share, self.loss_sum, self.loss_tokens, self.step
        if self.loss_tokens > count:
            late = (self.loss_sum - total) / (self.loss_tokens - count)
            self._warn_if_it_runs_away(late)
            self._means.append(late)

    def _warn_if_it_runs_away(self, loss):
        """Once, where the loss is above the run's first and half as much again as its least."""
        losses = self._means + [record["loss"] for record in self.history if record["loss"] is not None]
        if self.shards and not self.shards.is_root:
            return
        if losses and loss is not None and not self._warned and loss > max(losses[0], 1.5 * min(losses)):
            self._warned = True
            warnings.warn(f"the loss runs away: {min(losses):.4g} before, {loss:.4g} at step {self.step} "
                          f"(learning rate {self.optimizer.lr:.3g}); a lower lr or clip may help",
                          stacklevel=2)

    def _check_finite(self, what, value):
        if math.isfinite(value):
            return
        if self.chosen is not None:
            self.network.load_state_dict(self.chosen)
        self.network.eval()
        raise FloatingPointError(
            f"the {what} is {value} at step {self.step + 1} (epoch {self.epoch + 1}, learning rate "
            f"{self.optimizer.lr:.3g}); a lower lr or clip may help")


def new_optimizer(network: Any, settings: Settings) -> optim.Optimizer:
    """The optimizer that the settings name, over the parameters of a network."""
    momentum = {"momentum": settings.momentum} if settings.optimizer == "sgd" else {}
    return optim.by_name(settings.optimizer, network, lr=settings.lr,
                         weight_decay=settings.weight_decay, **momentum)


def check_run(meta: Mapping[str, Any]) -> None:
    """KeyError, TypeError or ValueError unless this is what `Trainer.snapshot` says of a run."""
    kinds = {"digest": str, "rng": dict, "settings": dict, "budget": dict, **dict.fromkeys(
        ("epoch", "position", "step", "loss_tokens", "waited"), int), **dict.fromkeys(
        ("seconds", "loss_sum", "scale"), (int, float)), "best_loss": (int, float, type(None))}
    for name, kind in kinds.items():
        if not isinstance(value := meta[name], kind) or isinstance(value, bool):
            raise TypeError(f"{name} must be of another type than {value!r:.40}")
        if kind is int and not 0 <= value < 1 << 62:
            raise ValueError(f"{name} must be a count, got {value!r:.40}")
        if kind == (int, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value!r:.40}")
    checked_history(meta["history"])
    Settings.of(meta["settings"])
    if missing := Settings.__dataclass_fields__.keys() - SHARDING.keys() - meta["settings"].keys():
        raise KeyError(*sorted(missing))
    Budget(**meta["budget"])


def checked_history(history: Any) -> list[dict[str, Any]]:
    """The records of a file; TypeError or KeyError where one lacks what a record says."""
    if not isinstance(history, list) or not all(isinstance(record, dict) for record in history):
        raise TypeError(f"history must be a list of records, got {history!r:.100}")
    for record in history:
        for name in ("step", "epoch", "loss", "validation", "lr", "seconds", "best"):
            if record[name] is not None and not isinstance(record[name], (int, float)):
                raise TypeError(f"{name} in history must be a number, got {record[name]!r:.40}")
    return list(history)


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
