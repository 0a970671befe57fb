"""What a language model's training says of itself on standard error: what it reads, how long it takes,
and, between evaluations, how far it is.

Knows a trainer and the facts that the model gathered; knows no network and no files.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from lstmcore.models.training import Trainer

SOON = 2.0                      # seconds of training from which the whole time is told


def opening(texts: list[dict[str, Any]], characters: int, tokens: int, held_out: int | None,
            unit: str, model: str) -> list[str]:
    """The lines before the first step."""
    encodings = list(dict.fromkeys(part["encoding"] for part in texts if part["encoding"]))
    told = ", ".join(encodings[:5]) + (", ..." if len(encodings) > 5 else "")
    size = f"{characters:,} characters" + (f", {told}" if told else "") if unit != "byte" \
        else f"{tokens + (held_out or 0):,} bytes"
    lines = [f"text: {size}; {tokens:,} tokens to train on, {held_out or 0:,} held out", f"model: {model}"]
    guesses = dict.fromkeys(f"{part['name']}: encoding {part['encoding']} is a guess" for part in texts
                            if part["guessed"])
    return [*guesses][:5] + lines


def expectation(trainer: Trainer, since: tuple[float, float]) -> str:
    """How long the run takes, from what it has done since (seconds, share)."""
    seconds, share = trainer.seconds - since[0], trainer.share - since[1]
    whole = trainer.seconds + seconds * (1 - trainer.share) / share
    epochs = trainer.epochs * whole / trainer.seconds
    return (f"expected: {epochs:.3g} epochs of {trainer.source.size:,} tokens in {_time(whole)} at "
            f"{trainer.seen / trainer.seconds:,.0f} tokens/s")


def _time(seconds):
    for size, name in (86400, "days"), (3600, "hours"), (60, "minutes"):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.3g} {name}"
    return f"{seconds:.0f} seconds"


class _Told:
    """What both ways share: the lines of the beginning."""

    def begin(self, trainer: Trainer, lines: list[str]) -> None:
        self._since: tuple[float, float] | None = (trainer.seconds, trainer.share)
        for line in lines:
            self.say(line)

    def expect(self, trainer: Trainer) -> None:
        if self._since and trainer.seconds >= self._since[0] + SOON and self._since[1] < trainer.share < 1:
            self.say(expectation(trainer, self._since))
            self._since = None

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


class Bar(_Told):
    """The progress of a run as a bar."""

    def __init__(self) -> None:
        from tqdm.auto import tqdm
        self.bar: Any = None
        self._make = lambda: tqdm(total=100, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}")
        self.record: Mapping[str, Any] = {"loss": None, "validation": None}
        self.shown = -1.0

    def begin(self, trainer: Trainer, lines: list[str]) -> None:
        super().begin(trainer, lines)
        self.bar = self._make()

    def say(self, line: str) -> None:
        if self.bar is None:
            super().say(line)
        else:
            self.bar.write(line, file=sys.stderr)

    def report(self, trainer: Trainer, record: Mapping[str, Any]) -> None:
        self.record = record

    def tick(self, trainer: Trainer, every: float = 0.2) -> None:
        if trainer.seconds - self.shown < every:
            return
        self.expect(trainer)
        self.shown, loss, validation = trainer.seconds, self.record["loss"], self.record["validation"]
        if trainer.loss_tokens:
            loss = trainer.loss_sum / trainer.loss_tokens
        if loss is not None:
            said = "" if validation is None else f", validation {validation:.3f}"
            self.bar.set_postfix_str(f"loss {loss:.3f}{said}, "
                                     f"{trainer.seen / trainer.seconds:,.0f} tokens/s", refresh=False)
        self.bar.update(100 * trainer.share - self.bar.n)

    def close(self, trainer: Trainer) -> None:
        self.tick(trainer, every=0)
        self.bar.close()


class Lines(_Told):
    """The progress of a run between its evaluations, which tell of themselves."""

    due = 0.1

    def report(self, trainer: Trainer, record: Mapping[str, Any]) -> None:
        self.due = (int(10 * trainer.share) + 1) / 10

    def tick(self, trainer: Trainer) -> None:
        self.expect(trainer)
        if self.due <= trainer.share < 1:
            self.due = (int(10 * trainer.share) + 1) / 10
            self.say(f"epoch {trainer.epochs:7.2f}  step {trainer.step:6}  "
                     f"loss {trainer.loss_sum / trainer.loss_tokens:.4f}  "
                     f"{trainer.seen / trainer.seconds:,.0f} tokens/s  {trainer.seconds:.0f} s")

    def close(self, trainer: Trainer) -> None:
        pass
