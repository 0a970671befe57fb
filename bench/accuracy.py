"""What a number format costs in accuracy, on held-out data: `python -m bench.accuracy`.

Every task is trained in float32, then evaluated in float32, bfloat16 and int8 on the same weights,
and trained once more, from the same start, in bfloat16. A record of all figures goes to
bench/results/, a page with their table to standard output and, with `--page MD`, to a file; `--show
RECORD` makes the page of an old record. Language models read Python's documentation of its own
language, and a text of yours, and digits are scikit-learn's; the other data sets are left out unless
their place is given.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np

import lstmcore
from bench.record import machine
from bench.report import table
from lstmcore import LanguageModel, LSTMClassifier, LSTMRegressor
from lstmcore.models import text as texts

RESULTS = Path(__file__).parent / "results"
FORMATS = {  # format -> (compute of training, precision of inference or None, heading)
    "float32": ("float32", None, "float32"),
    "bfloat16": ("float32", "bfloat16", "bfloat16 inference"),
    "int8": ("float32", "int8", "int8 inference"),
    "trained bfloat16": ("bfloat16", None, "trained in bfloat16"),
}
Task = namedtuple("Task", "name setting quantity fit measure")


def language(level, name, text, steps, **setting):
    """Nats per token of a text's last twentieth, after training on the rest."""
    cut = len(text) - len(text) // 20
    setting = dict(hidden_size=128, num_layers=2, **setting)
    schedule = dict(steps=steps, lr=5e-3, schedule="cosine", seq_length=64, batch_size=32)

    def fit(seed, **compute):
        return LanguageModel(level, seed=seed, **setting, **compute).fit(
            text[:cut], validation=0, progress=False, **schedule)

    return Task(f"{level} model of {name}", f"2 x 128 units, {steps} steps of 64 x 32 {level}s",
                f"nats per {level}", fit, lambda model: model.evaluate(text[cut:]).nats)


def classifier(name, data, epochs, **setting):
    """The share of right answers on the sequences held out."""
    X, y, X_test, y_test = data
    options = dict(epochs=epochs, schedule="cosine", dtype="float32", **setting)

    def fit(seed, **compute):
        return LSTMClassifier(**options, random_state=seed, **compute).fit(X, y)

    shown = ", ".join(f"{key}={value}" for key, value in setting.items())
    return Task(name, f"{shown}, epochs={epochs}", "accuracy", fit,
                lambda model: float(np.mean(model.predict(X_test) == y_test)))


def adding(lag, n, epochs):
    """The mean absolute error of the sum of two marked numbers among `lag` (Hochreiter and
    Schmidhuber 1997, experiment 4, at one length)."""
    def draw(seed, n):
        rng = np.random.default_rng(seed)
        X = np.stack([rng.uniform(-1, 1, (n, lag)), np.zeros((n, lag))], axis=2)
        marked = np.stack([rng.integers(0, lag // 10, n), rng.integers(lag // 10, lag // 2, n)])
        X[np.arange(n), marked, 1] = 1
        return X.astype("float32"), X[np.arange(n), marked, 0].sum(axis=0)

    X_test, y_test = draw(97, 2000)

    def fit(seed, **compute):
        return LSTMRegressor(32, forget_bias=4.0, epochs=epochs, schedule="cosine", dtype="float32",
                             random_state=seed, **compute).fit(*draw(seed, n))

    return Task(f"adding problem over {lag} steps", f"32 units, {n} sequences, epochs={epochs}",
                "mean absolute error", fit,
                lambda model: float(np.abs(model.predict(X_test) - y_test).mean()))


def held_out(X, y, share, seed=0):
    """(X, y) of the sequences to train on, then of those held out."""
    order = np.random.default_rng(seed).permutation(len(y))
    test, train = np.split(order, [round(share * len(y))])
    y = np.asarray(y)
    return [X[r] for r in train], y[train], [X[r] for r in test], y[test]


def digits():
    """8 x 8 images, read row by row."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return held_out(data.images.astype("float32"), data.target, 1 / 3)


def lines(folder, share):
    """Every file is a class, every line a sequence; bytes that are not UTF-8 are Latin-1."""
    X, y = [], []
    for path in sorted(path for path in Path(folder).iterdir() if path.is_file()):
        data = path.read_bytes()
        try:
            data = data.decode()
        except UnicodeDecodeError:
            data = data.decode("latin-1")
        found = [line.strip() for line in data.split("\n") if line.strip()]
        X += found
        y += [path.name] * len(found)
    return held_out(X, y, share)


def ts(path, share):
    """A file of the .ts form: a series per line, its channels and its class divided by colons."""
    data = Path(path).read_text().split("@data")[1].split()
    rows = [line.split(":") for line in data]
    X = [np.array([channel.split(",") for channel in row[:-1]], "float32").T for row in rows]
    return held_out(X, [row[-1] for row in rows], share)


def npz(path):
    """Arrays x, y, x_test, y_test."""
    with np.load(path) as data:
        return [data[name] for name in ("x", "y", "x_test", "y_test")]


def tasks(options):
    """The tasks whose data are there, without loading what is not asked for."""
    both = dict(bidirectional=True)
    few = options.quick     # an epoch or two, to see that it runs
    steps = 20 if few else options.steps
    makers = {"digits": lambda: classifier("digits", digits(), 2 if few else 40, hidden_size=64,
                                           pooling="max", **both)}
    if options.vowels:
        makers["vowels"] = lambda: classifier(
            "Japanese vowels", ts(options.vowels, 1 / 3), 2 if few else 60, hidden_size=64,
            pooling="mean", **both)
    if options.text:
        path, name = options.text
        makers["text"] = lambda: language("char", name, texts.load(path, "char"), steps)
    makers["char"] = lambda: language("char", "Python's documentation", texts.default_text(), steps)
    if options.text:
        makers["words"] = lambda: language("word", name, texts.load(path, "char"), steps // 2,
                                           vocab_size=2000)
    if options.mnist1d:
        makers["mnist1d"] = lambda: classifier(
            "MNIST-1D", npz(options.mnist1d), 1 if few else 15, hidden_size=128, pooling="max",
            **both)
    if options.names:
        makers["names"] = lambda: classifier(
            "surnames", lines(options.names, 0.2), 1 if few else 10, hidden_size=128,
            pooling="max", **both)
    makers["word"] = lambda: language("word", "Python's documentation", texts.default_text(),
                                      steps // 2, vocab_size=2000)
    makers["adding"] = lambda: adding(50, 500, 2) if few else adding(50, 10_000, 40)
    if options.reviews:
        makers["reviews"] = lambda: classifier(
            "film-review sentences", lines(options.reviews, 0.1), 1 if few else 4, hidden_size=32,
            pooling="mean", tokenizer="word", dropout=0.5, min_count=2, **both)
    unknown = set(options.only or ()) - set(makers)
    if unknown:
        raise SystemExit(f"--only must name some of {', '.join(makers)}, got {', '.join(unknown)}")
    return [make() for name, make in makers.items() if not options.only or name in options.only]


def evaluate(task, seeds, formats, say):
    """format -> the figure of every seed; one training per seed and compute."""
    figures = {name: [] for name in formats}
    for seed in range(seeds):
        models = {}
        for name in formats:
            compute, precision, _ = FORMATS[name]
            if compute not in models:
                start = time.perf_counter()
                models[compute] = task.fit(seed, **({} if compute == "float32" else
                                                    {"compute": compute}))
                say(f"{task.name}, seed {seed}: trained in {compute} in "
                    f"{time.perf_counter() - start:.0f} s")
            model = models[compute]
            if precision:
                model.freeze(precision=precision)
            figures[name].append(task.measure(model))
            if precision:
                model.unfreeze()
            say(f"    {FORMATS[name][2]}: {figures[name][-1]:.5f}")
    return figures


def markdown(record):
    """The page of a record: means over seeds, and from float32 the difference of the means."""
    rows = []
    for task in record["tasks"]:
        means = {name: statistics.mean(values) for name, values in task["figures"].items()}
        base = means.get("float32")
        rows.append([f"{task['name']} ({task['setting']})", task["quantity"],
                     *(f"{mean:.4f}" if name == "float32" or base is None
                       else f"{mean:.4f} ({mean - base:+.4f})" for name, mean in means.items())])
    head = ["task", "figure", *(FORMATS[name][2] for name in record["formats"])]
    return "\n".join([
        f"{record['date']}, {record['cpu']}, {record['isa']}, lstmcore {record['version']}, "
        f"means over seeds (here {record['seeds']}), in brackets the difference from float32; "
        f"`{record['command']}`.",
        "", table(head, rows)])


def show(record, page):
    """Print the page of a record, and write it to a file if one is named."""
    text = markdown(record)
    print(text, flush=True)
    if page:
        Path(page).write_text(f"# What a number format costs\n\n{text}\n")


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy",
                                     description=__doc__.split("\n\n")[0])
    parser.add_argument("--text", nargs=2, metavar=("FILE", "NAME"),
                        help="of two language models more, and how the table calls it")
    parser.add_argument("--names", metavar="DIR", help="surnames: a file of lines per class")
    parser.add_argument("--reviews", metavar="DIR", help="sentences: a file of lines per class")
    parser.add_argument("--vowels", metavar="FILE", help="Japanese vowels, a .ts file")
    parser.add_argument("--mnist1d", metavar="FILE", help="MNIST-1D, an .npz file")
    parser.add_argument("--only", nargs="+", metavar="TASK")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3000, help="of the language models (words: half)")
    parser.add_argument("--quick", action="store_true", help="an epoch or two: does it run?")
    parser.add_argument("--out", metavar="RECORD", help="default: bench/results/accuracy.json")
    parser.add_argument("--show", metavar="RECORD", help="print the page of a record")
    parser.add_argument("--page", metavar="MD", help="write it to this file too")
    options = parser.parse_args()
    if options.show:
        show(json.loads(Path(options.show).read_text()), options.page)
        return
    # the record says what was run, not where the data lie on this machine
    shown = [Path(word).name if os.sep in word else word for word in sys.argv[1:]]
    info = lstmcore.info()
    record = dict(date=time.strftime("%Y-%m-%d"), cpu=machine(0, 0)["cpu"], isa=info["isa"],
                  version=info["version"], numpy=np.__version__, seeds=options.seeds,
                  formats=options.formats, tasks=[],
                  command=shlex.join(["python", "-m", "bench.accuracy", *shown]))
    out = Path(options.out or RESULTS / "accuracy.json")
    for task in tasks(options):
        figures = evaluate(task, options.seeds, options.formats,
                           lambda line: print(line, file=sys.stderr, flush=True))
        record["tasks"].append(dict(name=task.name, setting=task.setting, quantity=task.quantity,
                                    figures=figures))
        out.write_text(json.dumps(record, indent=1) + "\n")     # a long run may be cut short
    show(record, options.page)


if __name__ == "__main__":
    main()
