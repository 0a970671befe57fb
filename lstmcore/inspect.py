"""Look inside a trained model: color a text by any neuron's h, c or gate, and rank the neurons.

`activations` reads a text with a model, `rank` finds the neurons that follow something visible in
the text (Karpathy, Johnson and Li 2015 found cells for quotes, brackets and line length), `page`
writes an HTML file with a chooser for all of them, `picture` a PNG of one.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from lstmcore import checks
from lstmcore._types import Floats, Path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lstmcore.models.estimators import LSTMClassifier, LSTMRegressor
    from lstmcore.models.language import LanguageModel

    Model: TypeAlias = LanguageModel | LSTMClassifier | LSTMRegressor


class Activations(NamedTuple):
    """What every neuron does, token by token: signals holds a dict per place of (T, H) arrays."""

    tokens: list[str]
    places: list[str]
    signals: list[dict[str, Floats]]


class Selective(NamedTuple):
    """A neuron, the feature that it follows best, and the correlation r."""

    neuron: int
    feature: str
    r: float


MEANINGS = {"h": "hidden state h", "c": "cell state c (its tanh)", "i": "input gate i",
            "f": "forget gate f", "o": "output gate o", "g": "candidate g",
            "r": "reset gate r", "z": "update gate z", "n": "candidate n"}
GATES = "iforz"           # in 0..1; the other signals are shown in -1..1
DARK = 0.62             # above this the color is so dark that letters are white
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
    Activations: tokens, a list of T strs; places, a name per layer and direction; signals, per
    place a dict of "h", "c", "i", "f", "o", "g" -> (T, H) arrays; of a GRU "h", "r", "z",
    "n", of a vanilla RNN "h" alone
    """
    if not isinstance(text, str) or not text:
        raise ValueError("text must be a str that is not empty")
    tokens, x, recurrent = _read(model, text)
    if not tokens:
        raise ValueError("text holds no token that the model could read")
    places = [f"layer {n + 1}{direction}" for n in range(recurrent.num_layers)
              for direction in (("", ", backward") if recurrent.bidirectional else ("",))]
    signals = []
    for trace in recurrent.trace(x):
        found = {name: values[:, 0] for name, values in trace._asdict().items()}
        signals.append({name: np.tanh(found[name]) if name == "c" else found[name]
                        for name in MEANINGS if name in found})
    return Activations(tokens, places, signals)


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


def rank(found: Activations, place: int = 0, signal: str = "h",
         count: int = 20) -> list[Selective]:
    """The most selective neurons: those that follow one feature of the text most closely.

    Parameters
    ----------
    found : Activations
    place : which layer and direction, an index into found.places
    signal : "h", "c", "i", "f", "o" or "g"; of a GRU "h", "r", "z" or "n"

    Returns
    -------
    list of Selective(neuron, feature, r), by falling size of r, the correlation of the neuron's
    signal with the feature that it follows best. It is what stands in this one text, not a proof.
    """
    values = _signal(found, place, signal).astype(np.float64)
    seen = features(found.tokens)
    if not seen:
        return []
    r = _standard(values).T @ _standard(np.stack(list(seen.values()), axis=1)) / len(values)
    best = np.abs(r).argmax(axis=1)
    names = list(seen)
    ranked = [Selective(n, names[at], float(r[n, at])) for n, at in enumerate(best)]
    return sorted(ranked, key=lambda entry: -abs(entry.r))[:count]


def _standard(columns):
    centered = columns - columns.mean(axis=0)
    deviation = centered.std(axis=0)
    return centered / np.where(deviation > 1e-9, deviation, np.inf)


def _signal(found, place, signal):
    if not 0 <= place < len(found.places):
        raise ValueError(f"place must be in 0..{len(found.places) - 1}, got {place}")
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
    data = {"tokens": found.tokens, "meanings": MEANINGS, "gates": GATES, "places": []}
    for n, (name, signals) in enumerate(zip(found.places, found.signals)):
        data["places"].append({"name": name, "signals": {
            signal: {"width": values.shape[1], "ranked": rank(found, n, signal, 40),
                     "bytes": base64.b64encode(_bytes(values, signal)).decode()}
            for signal, values in signals.items()}})
    # In a script element only "</" could end the data too early.
    fields = {"@TITLE@": html.escape(title), "@DARK@": str(DARK),
              "@DATA@": json.dumps(data).replace("</", "<\\/")}
    with open(path, "w", encoding="utf-8") as file:
        file.write(re.sub("@[A-Z]+@", lambda field: fields[field[0]], PAGE))


def _cut(found, limit):
    return Activations(found.tokens[:limit], found.places,
                       [{name: values[:limit] for name, values in signals.items()}
                        for signals in found.signals])


def _bytes(values, signal):
    """Values in 0..1 (gates) or -1..1 as bytes 0..254, a row per token."""
    share = values if signal in GATES else (values + 1) / 2
    return np.clip(np.rint(share * 254), 0, 254).astype(np.uint8).tobytes()


def picture(model: Model | Activations, text: str | None, path: Path | None = None, *, neuron: int,
            place: int = 0, signal: str = "h", limit: int = 1200, width: int = 80) -> Figure:
    """Draw a text colored by one neuron, as PNG, SVG or PDF; returns the matplotlib figure.

    Parameters
    ----------
    model, text, limit : as for `page`
    path : the file to write, or None
    neuron, place, signal : which neuron of which layer and direction, and what of it
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
    axes.set_title(f"{found.places[place]}, neuron {neuron}, {MEANINGS[signal]}: {scale}",
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


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>
  * { box-sizing: border-box }
  body { margin: 0; font: 16px/1.4 system-ui, sans-serif; color: #222; background: #fff }
  header { position: sticky; top: 0; background: #fff; border-bottom: 1px solid #ddd;
           padding: .5rem .8rem; z-index: 1 }
  h1 { font-size: 1.05rem; margin: 0 0 .4rem }
  .row { display: flex; flex-wrap: wrap; gap: .4rem; align-items: center }
  select, button, input { font: inherit; padding: .3rem .5rem; min-height: 2.4rem;
           border: 1px solid #bbb; border-radius: .4rem; background: #fff; color: inherit }
  input { width: 5em }
  .group { display: inline-flex; gap: .3rem; align-items: center }
  #status { font-size: .9rem; color: #555; min-height: 1.4em; margin-top: .3rem }
  main { display: grid; grid-template-columns: minmax(0, 1fr) 19rem; gap: 1rem; padding: .8rem }
  #text { font: 15px/1.65 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap;
           overflow-wrap: anywhere; margin: 0 }
  #text span { border-radius: 2px; padding: .12em 0 }
  #text i { font-style: normal; opacity: .35 }
  h2 { font-size: .95rem; margin: .2rem 0 }
  aside p { font-size: .85rem; color: #666; margin: .2rem 0 .5rem }
  ol { list-style: none; margin: 0; padding: 0 }
  ol button { width: 100%; text-align: left; margin-bottom: .25rem; font-size: .9rem;
           display: flex; gap: .5rem; align-items: center }
  ol button b { min-width: 2.6em } ol button span { flex: 1; overflow-wrap: anywhere }
  ol button.on { border-color: #222; background: #f2f2f2 }
  aside { position: sticky; top: 7.5rem; align-self: start; max-height: calc(100vh - 8rem);
           overflow-y: auto; padding: 0 .2rem }
  #scale { display: inline-block; width: 8rem; height: .8rem; border: 1px solid #ccc }
  @media (max-width: 900px) {
    main { grid-template-columns: minmax(0, 1fr) }
    ol { display: flex; overflow-x: auto; gap: .4rem } ol li { flex: 0 0 12rem }
    aside { order: -1; min-width: 0; position: static; overflow: visible }
    #text { font-size: 14px }
  }
</style>
<header>
  <h1>@TITLE@</h1>
  <div class="row">
    <select id="place" aria-label="layer"></select>
    <select id="signal" aria-label="signal"></select>
    <span class="group">
      <button id="back" aria-label="previous neuron">&#9664;</button>
      <input id="neuron" type="number" min="0" aria-label="neuron">
      <button id="next" aria-label="next neuron">&#9654;</button>
    </span>
    <span class="group"><span id="low"></span><span id="scale"></span>1</span>
  </div>
  <div id="status"></div>
</header>
<main>
  <pre id="text"></pre>
  <aside>
    <h2>Most selective neurons</h2>
    <p id="told"></p>
    <ol id="ranked"></ol>
  </aside>
</main>
<script id="data" type="application/json">@DATA@</script>
<script>
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = id => document.getElementById(id);
  const RED = [202, 0, 32], BLUE = [33, 102, 172], GREEN = [0, 128, 96];
  const decoded = new Map();
  let place = 0, signal = "h", neuron = 0, strongest = -1;
  data.places.forEach((p, n) => Object.entries(p.signals).forEach(([name, s]) => {
    const r = s.ranked.length ? Math.abs(s.ranked[0][2]) : 0;
    if ("hc".includes(name) && r > strongest) [place, signal, strongest] = [n, name, r];
  }));

  const spans = data.tokens.map((token, t) => {
    const span = document.createElement("span");
    for (const part of token.split(/(\\n)/)) {
      if (part !== "\\n") { span.append(part); continue; }
      const mark = document.createElement("i");
      mark.textContent = "\\u21b5";
      span.append(mark, "\\n");
    }
    const tell = () => {
      find("status").textContent = `${JSON.stringify(token)}: ${value(t).toFixed(2)}`;
    };
    span.onmouseenter = span.onclick = tell;
    find("text").append(span);
    return span;
  });

  const current = () => data.places[place].signals[signal];
  const gate = () => data.gates.includes(signal);

  function bytes() {
    const key = place + signal;
    if (!decoded.has(key))
      decoded.set(key, Uint8Array.from(atob(current().bytes), c => c.charCodeAt(0)));
    return decoded.get(key);
  }

  function value(t) {
    const share = bytes()[t * current().width + neuron] / 254;
    return gate() ? share : 2 * share - 1;
  }

  function color(v) {
    const end = v < 0 ? BLUE : gate() ? GREEN : RED, share = Math.min(Math.abs(v), 1);
    return `rgb(${end.map(p => Math.round(255 + (p - 255) * share)).join()})`;
  }

  function show() {
    const entry = current(), known = entry.ranked.find(r => r[0] === neuron);
    find("neuron").value = neuron;
    find("neuron").max = entry.width - 1;
    find("low").textContent = gate() ? "0" : "\\u22121";
    find("scale").style.background = "linear-gradient(to right," +
      [gate() ? 0 : -1, gate() ? .5 : 0, 1].map(color).join() + ")";
    spans.forEach((span, t) => {
      const v = value(t);
      span.style.background = color(v);
      span.style.color = Math.abs(v) > @DARK@ ? "#fff" : "#222";
    });
    find("status").textContent = known
      ? `neuron ${neuron} follows: ${known[1]} (r = ${known[2].toFixed(2)})`
      : `neuron ${neuron} of 0 to ${entry.width - 1}`;
    for (const button of find("ranked").querySelectorAll("button"))
      button.classList.toggle("on", +button.dataset.neuron === neuron);
  }

  function step(by) {
    neuron = (neuron + by + current().width) % current().width;
    show();
  }

  function list() {
    find("told").textContent = current().ranked.length
      ? "What each follows best in this text, and the correlation."
      : "None yet: in a text this short nothing is seen often enough.";
    find("ranked").replaceChildren(...current().ranked.map(([n, feature, r]) => {
      const item = document.createElement("li"), button = document.createElement("button");
      const parts = [["b", n], ["span", feature], ["em", r.toFixed(2)]].map(([tag, text]) => {
        const part = document.createElement(tag);
        part.textContent = text;
        return part;
      });
      button.dataset.neuron = n;
      button.append(...parts);
      button.onclick = () => { neuron = n; show(); };
      item.append(button);
      return item;
    }));
  }

  function signals() {
    const names = Object.keys(data.places[place].signals);
    find("signal").replaceChildren(...names.map(s => new Option(data.meanings[s], s)));
    find("signal").value = signal;
  }

  function best() {
    list();
    neuron = current().ranked.length ? current().ranked[0][0] : 0;
    show();
  }

  data.places.forEach((p, n) => find("place").append(new Option(p.name, n)));
  find("place").value = place;
  find("place").onchange = event => { place = +event.target.value; signals(); best(); };
  find("signal").onchange = event => { signal = event.target.value; best(); };
  find("neuron").onchange = event => {
    const asked = Math.trunc(+event.target.value) || 0;
    neuron = Math.max(0, Math.min(asked, current().width - 1));
    show();
  };
  find("back").onclick = () => step(-1);
  find("next").onclick = () => step(1);
  signals();
  best();
</script>
</html>
"""
