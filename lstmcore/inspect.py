"""Look inside a trained model: color a text by any neuron's h, c or gate, and rank the neurons.

`activations` reads a text with a model, `rank` finds the neurons that follow something visible in
the text (Karpathy, Johnson and Li 2015 found cells for quotes, brackets and line length), `saturation`
tells how often each gate is open or shut (of the same paper), `page` writes an HTML file with all of
that and with what the model expects next, `picture` a PNG of one neuron.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from lstmcore import checks
from lstmcore._types import Floats, Path
from lstmcore.inspect_page import PAGE
from lstmcore.models.text import EOS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lstmcore.models.estimators import LSTMClassifier, LSTMRegressor
    from lstmcore.models.language import LanguageModel

    Model: TypeAlias = LanguageModel | LSTMClassifier | LSTMRegressor


class Activations(NamedTuple):
    """What every neuron does, token by token: signals holds a dict per place of (T, H) arrays.

    guesses : of a language model, for each token the likeliest next ones, (token, probability)
    """

    tokens: list[str]
    places: list[str]
    signals: list[dict[str, Floats]]
    guesses: list[list[tuple[str, float]]] | None = None


class Selective(NamedTuple):
    """A neuron, the feature that it follows best, the correlation r, and what of r is beyond the token.

    beyond : r without what the token that was just read tells by itself, of both
    """

    neuron: int
    feature: str
    r: float
    beyond: float = 0.0


MEANINGS = {"h": "hidden state h", "c": "cell state c (its tanh)", "i": "input gate i",
            "f": "forget gate f", "o": "output gate o", "g": "candidate g",
            "r": "reset gate r", "z": "update gate z", "n": "candidate n"}
GATES = "iforz"           # in 0..1; the other signals are shown in -1..1
DARK = 0.62             # above this the color is so dark that letters are white
SHUT, OPEN = 0.1, 0.9   # a gate below, above (Karpathy et al. 2015)
GUESSES = 5             # next tokens that are kept
RARE = 5                # a feature seen (or missing) less often than this explains nothing
OPENING, CLOSING = "([{<", ")]}>"


def activations(model: Model, text: str) -> Activations:
    """What every neuron of a model does, token by token, while it reads a text.

    Parameters
    ----------
    model : LanguageModel; or LSTMClassifier or LSTMRegressor, fitted on strings
    text : str

    Returns
    -------
    Activations: tokens, a list of T strs; places, a name per layer and direction, as its parameters
    have it ("l0", "l0_reverse"); signals, per place a dict of "h", "c", "i", "f", "o", "g" ->
    (T, H) arrays; of a GRU "h", "r", "z", "n", of a vanilla RNN "h" alone; guesses, of a
    LanguageModel
    """
    if not isinstance(text, str) or not text:
        raise ValueError("text must be a str that is not empty")
    tokens, x, recurrent = _read(model, text)
    if not tokens:
        raise ValueError("text holds no token that the model could read")
    places = [f"l{n}{direction}" for n in range(recurrent.num_layers)
              for direction in (("", "_reverse") if recurrent.bidirectional else ("",))]
    signals, traces = [], recurrent.trace(x)
    for trace in traces:
        found = {name: values[:, 0] for name, values in trace._asdict().items()}
        signals.append({name: np.tanh(found[name]) if name == "c" else found[name]
                        for name in MEANINGS if name in found})
    expects = hasattr(model, "vocabulary")
    return Activations(tokens, places, signals, _guesses(model, traces[-1].h[:, 0]) if expects else None)


def _guesses(model, h):
    """What a language model expects after each state h (T, H) of its last layer."""
    shown, found = _shown(model.vocabulary), []
    for at in range(0, len(h), 256):
        logits = model.network.head(np.ascontiguousarray(h[at:at + 256])).astype(np.float64)
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        best = np.argsort(-p, axis=1, kind="stable")[:, :GUESSES]
        found += [[(shown(k), float(row[k])) for k in some] for row, some in zip(p, best.tolist())]
    return found


def _shown(vocabulary):
    """A function from an id to what it is shown as."""
    if vocabulary.level == "byte":
        return lambda k: chr(k) if k < 0x80 else f"\\x{k:02x}"
    return lambda k: vocabulary.tokens[k]


def _read(model, text):
    """Tokens as strs, what the recurrent layers read for them, (T, 1) or (T, 1, I), and these."""
    vocabulary = getattr(model, "vocabulary", getattr(model, "vocabulary_", None))
    if vocabulary is None:
        raise TypeError("model must be a trained LanguageModel, or an estimator fitted on strings, "
                        f"got {type(model).__name__}")
    network, x = model._trained(), vocabulary.encode(text)[:, None]
    tokens = vocabulary.split(text)
    if callable(vocabulary.level):
        tokens = [f"{token} " for token in tokens]
    elif vocabulary.level == "whitespace":
        tokens = ["\n" if token == EOS else f"{token} " for token in tokens]
    return tokens, network.inputs(x), network.recurrent


def features(tokens: Sequence[str]) -> dict[str, Floats]:
    """What can be seen in a text without a model: name -> (T,) numbers.

    >>> sorted(features(list('say "hi" 12 times to me, now')))[:3]
    ['a letter', 'a space', 'a vowel']
    """
    starts = np.cumsum([0] + [len(token) for token in tokens])
    text = "".join(tokens)
    found = {name: [1.0 if re.search(pattern, token) else 0.0 for token in tokens]
             for name, pattern in {"a letter": r"[^\W\d_]", "a digit": r"\d", "a space": r" ",
                                   "a line end": r"\n", "punctuation": r"[^\w\s]",
                                   "a vowel": r"^\s?[aeiouAEIOU]$"}.items()}
    found["a capital"] = [float(any(c.isupper() for c in token)) for token in tokens]
    by_character = _by_character(text)
    for name, values in by_character.items():
        found[name] = [values[min(at, len(text) - 1)] for at in starts[:-1]]
    found["place in the text"] = np.arange(len(tokens))
    for token in sorted(set(tokens)):
        found[f"the token {token!r}"] = [float(other == token) for other in tokens]
    found = {name: np.asarray(values, np.float64) for name, values in found.items()}
    return {name: values for name, values in found.items()
            if min((values != values.min()).sum(), (values != values.max()).sum()) >= RARE}


def _by_character(text):
    """Name -> a number per character, for what depends on the characters before it."""
    found = {name: [] for name in ("inside quotes", "depth of brackets", "indentation",
                                   "place in the line", "place in the word", "a capital word")}
    quoted, depth, line, word, indent, capital = 0, 0, 0, 0, 0, 0
    for n, character in enumerate(text):
        if character == '"' or character in "“”":
            quoted = 1 - quoted if character == '"' else int(character == "“")
        depth = max(0, depth + (character in OPENING) - (character in CLOSING))
        word = word + 1 if character.isalnum() else 0
        capital = int(character.isupper()) if word == 1 else capital * (word > 0)
        indent = indent + 1 if character in " \t" and indent == line else indent
        for name, value in zip(found, (quoted, depth, indent, line, word, capital)):
            found[name].append(value)
        line, indent = (0, 0) if character == "\n" else (line + 1, indent)
        quoted = 0 if text[n - 1:n + 1] == "\n\n" else quoted       # a quote ends with a paragraph
    return found


def rank(found: Activations, place: int | str = 0, signal: str = "h",
         count: int = 20) -> list[Selective]:
    """The most selective neurons: those that follow one feature of the text most closely.

    Parameters
    ----------
    found : Activations
    place : which layer and direction, a name of found.places or its index
    signal : "h", "c", "i", "f", "o" or "g"; of a GRU "h", "r", "z" or "n"

    Returns
    -------
    list of Selective(neuron, feature, r, beyond): the feature is the one that the neuron's signal
    follows best in the first half of the text, r their correlation in the second half, so that what
    was but chance does not come back. The closest first; one whose r changes its sign is last.
    """
    values, seen = _signal(found, place, signal).astype(np.float64), features(found.tokens)
    if not seen:
        return []
    columns, names = np.stack(list(seen.values()), axis=1), list(seen)
    best, first, r = _halves(values, columns)
    tokens = _numbers(found.tokens)
    half = len(values) // 2
    left = _correlation(_beyond(values[half:], tokens[half:]),
                        _beyond(columns[half:], tokens[half:], columns[half:].std(axis=0)))
    ranked = [Selective(n, names[at], float(r[n]), float(left[n, at])) for n, at in enumerate(best)]
    return sorted(ranked, key=lambda entry: -entry.r * np.sign(first[entry.neuron]))[:count]


def _halves(values, columns):
    """Per neuron: the feature chosen in the first half, its correlation there and in the second half."""
    half, every = len(values) // 2, np.arange(values.shape[1])
    r = _correlation(_standard(values[:half]), _standard(columns[:half]))
    best = np.abs(r).argmax(axis=1)
    again = _correlation(_standard(values[half:]), _standard(columns[half:]))
    return best, r[every, best], again[every, best]


def chance(found: Activations, place: int | str = 0, signal: str = "h") -> float:
    """The size of r that one neuron in twenty reaches by chance: in `rank` of a text moved by a quarter."""
    values, seen = _signal(found, place, signal).astype(np.float64), features(found.tokens)
    if not seen:
        return 0.0
    moved = np.roll(np.stack(list(seen.values()), axis=1), len(values) // 4, axis=0)
    return float(np.quantile(np.abs(_halves(values, moved)[2]), 0.95))


def saturation(found: Activations, place: int | str = 0) -> dict[str, Floats]:
    """The share of time that each gate of each unit is shut (below 0.1), and open (above 0.9).

    Returns
    -------
    dict: "i", "f", "o" ("r", "z" of a GRU) -> (H, 2) float64, shut and open. A forget gate that is
    always open never forgets; an unit whose gates are always half open has learnt little about
    when (Karpathy, Johnson and Li 2015, figure 3).
    """
    signals = found.signals[_place(found, place)]
    return {name: np.stack([(signals[name] < SHUT).mean(axis=0), (signals[name] > OPEN).mean(axis=0)], axis=1)
            for name in GATES if name in signals}


def _standard(columns, deviation=None):
    """Columns (T, n) of mean 0, and of deviation 1 or divided by another; those that are constant: 0."""
    centered = columns - columns.mean(axis=0) if len(columns) else columns
    own = centered.std(axis=0) if len(columns) else np.zeros(columns.shape[1])
    by = own if deviation is None else deviation
    return centered / np.where((own > 1e-9) & (by > 1e-9), by, np.inf)


def _correlation(a, b):
    return a.T @ b / max(1, len(a))


def _numbers(tokens):
    return np.unique(np.array(tokens, dtype=object).astype(str), return_inverse=True)[1].ravel()


def _beyond(columns, numbers, deviation=None):
    """Columns without the mean that they have at each token; features in units of their own deviation."""
    counts = np.bincount(numbers)[:, None]
    sums = np.zeros((len(counts), columns.shape[1]))
    np.add.at(sums, numbers, columns)
    left = columns - (sums / np.maximum(counts, 1))[numbers]
    return _standard(left, deviation)


def _place(found, place):
    """The index of a layer and direction, given that or its name."""
    if isinstance(place, str):
        if place not in found.places:
            raise ValueError(f"place must be one of {', '.join(found.places)}, got {place!r}")
        return found.places.index(place)
    if not 0 <= place < len(found.places):
        raise ValueError(f"place must be in 0..{len(found.places) - 1}, got {place}")
    return place


def _signal(found, place, signal):
    place = _place(found, place)
    if signal not in found.signals[place]:
        raise ValueError(f"signal must be one of {', '.join(found.signals[place])}, "
                         f"got {signal!r}")
    return checks.unmasked(f"signal {signal}", found.signals[place][signal])


def page(model: Model | Activations, text: str | None, path: Path, *, limit: int = 2000,
         title: str | None = None) -> None:
    """Write an HTML page that colors a text by any neuron; it needs no network.

    Parameters
    ----------
    model, text : as for `activations`, or Activations and None
    path : the file to write
    limit : only this many tokens are shown; each costs 6 bytes or so per neuron
    title : of the page
    """
    found = _cut(model if isinstance(model, Activations) else activations(model, text), limit)
    title = title or "What the neurons see"
    data = {"tokens": found.tokens, "meanings": MEANINGS, "gates": GATES, "places": [],
            "guesses": found.guesses and [[(token, round(p, 3)) for token, p in some]
                                          for some in found.guesses]}
    opening, most = (0, next(iter(found.signals[0])), 0), -1.0
    for n, (name, signals) in enumerate(zip(found.places, found.signals)):
        place: dict[str, Any] = {"name": name, "signals": {}, "saturation": {
            gate: np.round(shares, 3).tolist() for gate, shares in saturation(found, n).items()}}
        for signal, values in signals.items():
            ranked = rank(found, n, signal, 40)
            place["signals"][signal] = {
                "width": values.shape[1], "ranked": ranked, "chance": round(chance(found, n, signal), 3),
                "bytes": base64.b64encode(_bytes(values, signal)).decode()}
            # Most worth a look: what it has in mind is not what the last token says anyway.
            for entry in ranked if signal in "hc" else ():
                if abs(entry.beyond) > most:
                    opening, most = (n, signal, entry.neuron), abs(entry.beyond)
        data["places"].append(place)
    data["opening"] = opening
    # In a script element only "</" could end the data too early.
    fields = {"@TITLE@": html.escape(title), "@DARK@": str(DARK),
              "@DATA@": json.dumps(data).replace("</", "<\\/")}
    with open(path, "w", encoding="utf-8") as file:
        file.write(re.sub("@[A-Z]+@", lambda field: fields[field[0]], PAGE))


def _cut(found, limit):
    return Activations(found.tokens[:limit], found.places,
                       [{name: values[:limit] for name, values in signals.items()}
                        for signals in found.signals], found.guesses and found.guesses[:limit])


def _bytes(values, signal):
    """Values in 0..1 (gates) or -1..1 as bytes 0..254, a row per token."""
    share = values if signal in GATES else (values + 1) / 2
    return np.clip(np.rint(share * 254), 0, 254).astype(np.uint8).tobytes()


def picture(model: Model | Activations, text: str | None, path: Path | None = None, *, neuron: int,
            place: int | str = 0, signal: str = "h", limit: int = 1200, width: int = 80) -> Figure:
    """Draw a text colored by one neuron, as PNG, SVG or PDF; returns the matplotlib figure.

    Parameters
    ----------
    model, text, limit : as for `page`
    path : the file to write, or None
    neuron, place, signal : which neuron of which layer and direction (see `rank`), and what of it
    width : characters per line
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise ImportError("inspect.picture needs matplotlib: pip install 'lstmcore[plot]'") \
            from error
    found = _cut(model if isinstance(model, Activations) else activations(model, text), limit)
    values = _signal(found, place, signal)
    if not 0 <= neuron < values.shape[1]:
        raise ValueError(f"neuron must be in 0..{values.shape[1] - 1}, got {neuron}")
    cells, lines = _layout(found.tokens, width)
    figure = Figure(figsize=(0.085 * width + 0.2, 0.2 * lines + 0.5), layout="constrained")
    axes = figure.subplots()
    for (line, column, shown), value in zip(cells, values[:, neuron]):
        axes.add_patch(Rectangle((column, line), len(shown), 1, linewidth=0,
                                 facecolor=_color(float(value), signal)))
        for n, character in enumerate(shown):
            axes.text(column + n + 0.5, line + 0.5, character, family="monospace", fontsize=9,
                      ha="center", va="center", parse_math=False,
                      color="white" if abs(value) > DARK else "#222")
    axes.set(xlim=(0, width), ylim=(lines, 0))
    scale = "white 0, green 1" if signal in GATES else "blue −1, white 0, red 1"
    axes.set_title(f"{found.places[_place(found, place)]}, neuron {neuron}, {MEANINGS[signal]}: {scale}",
                   fontsize=10)
    axes.axis("off")
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _layout(tokens, width):
    """(line, column, shown text) of every token on a page of `width` columns, and its lines."""
    cells, line, column = [], 0, 0
    for token in tokens:
        shown = token.replace("\n", "↵").replace("\t", "→")[:width]
        if column + len(shown) > width:
            line, column = line + 1, 0
        cells.append((line, column, shown))
        column += len(shown)
        if token.endswith("\n"):
            line, column = line + 1, 0
    return cells, line + 1


def _color(value, signal):
    """White at 0, blue below, red above; the same as in the page."""
    r, g, b = (33, 102, 172) if value < 0 else (0, 128, 96) if signal in GATES else (202, 0, 32)
    share = min(abs(value), 1.0)
    return tuple((255 + (part - 255) * share) / 255 for part in (r, g, b))
