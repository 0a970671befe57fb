"""A model card: what a language model is, what it was trained on and how well, for those who get the file.

Alone, because it is a page of prose; it knows a trained model, and no file.
"""

from __future__ import annotations

import math
from typing import Any

from lstmcore import __version__

LEVELS = {"char": "characters", "byte": "bytes", "word": "words", "whitespace": "tokens"}


def card(model: Any, name: str, size: int) -> str:
    """The card of a `LanguageModel`, Markdown with the head that model hubs read.

    name, size : of its file, in bytes
    """
    unit = LEVELS[model.level]
    rows = [("Cell", model.cell.upper()), ("Layers x units", f"{model.num_layers} x {model.hidden_size}"),
            ("Width of the table of tokens", model.embed_size or "none, one-hot"),
            ("Parameters", f"{sum(p.size for p in model._trained().parameters().values()):,}"),
            ("Vocabulary", f"{len(model.vocabulary):,} {unit}"),
            ("Numbers", f"{model.network.head._frozen_in or model.dtype}"), ("File", f"{size:,} bytes")]
    written = model.sample(length=300, temperature=0.7, seed=0)
    return "\n".join([
        "---", "library_name: lstmcore", "pipeline_tag: text-generation", "tags:", "- lstm",
        "- language-model", "---", "", f"# {name}", "",
        f"A language model of {unit}, trained with [lstmcore](https://pypi.org/project/lstmcore/) "
        f"{__version__} on a CPU.", "", "## Model", "", *_table(rows), "", "## Training", "",
        *_training(model, unit), "", "## What it writes", "",
        "Without a beginning, at temperature 0.7, seed 0:", "",
        *("    " + "".join(c if c.isprintable() else " " for c in line) for line in written.split("\n")), "",
        "## Use", "", "```python", "from lstmcore import LanguageModel",
        f"model = LanguageModel.load({name!r})",
        'print(model.sample("", length=300, temperature=0.7))', "```", "", "```console",
        f"$ lstmcore sample {name} --length 300 --temperature 0.7", f"$ lstmcore eval {name} other.txt",
        "```", "", "## Limits", "",
        "It continues text as its training text would go on; it knows nothing else, and what it says may "
        "be wrong. What of it is private or under copyright depends on that text, which this card does not "
        "know.", ""])


def _training(model, unit):
    said, history = model.training, model.history
    rows = []
    if said:
        encodings = f" ({', '.join(said['encodings'])})" if said["encodings"] else ""
        text = f"{said['characters']:,} characters{encodings}"
        rows += [("Text", text), ("Trained on", f"{said['tokens']:,} {unit}"),
                 ("Held out", f"{said['held_out'] or 0:,} {unit}")]
    if history:
        last = history[-1]
        rows += [("Steps, epochs", f"{last['step']:,}, {last['epoch']:.4g}"),
                 ("Time", f"{last['seconds'] / 60:.3g} minutes")]
        best = min((r for r in history if r["validation"] is not None), default=None,
                   key=lambda r: r["validation"])
        if last["loss"] is not None:
            rows += [("Training loss at the end", f"{last['loss']:.4f} nats per token")]
        if best:
            nats = best["validation"]
            of = f"{nats / math.log(2):.4f} bits per character" if model.level == "char" \
                else f"perplexity {math.exp(min(nats, 700)):.4g}"
            rows += [("Best validation loss", f"{nats:.4f} nats per token, {of}, at step {best['step']:,}")]
    rows += [("Ended", model.outcome)] if model.outcome else []
    if said:
        kept = {name: value for name, value in said["settings"].items() if value is not None}
        rows += [("Settings", ", ".join(f"{name}={value!r}" for name, value in kept.items()))]
    return _table(rows) if rows else ["Not recorded in the file."]


def _table(rows):
    return ["| | |", "|---|---|", *(f"| {name} | {str(value).replace('|', chr(92) + '|')} |"
                                     for name, value in rows)]
