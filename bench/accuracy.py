"""Accuracy on held-out data: what a number format costs, what the estimators and forecasts reach.

`python -m bench.accuracy`: every task is trained in float32, then evaluated in float32, bfloat16 and
int8 on the same weights, and trained once more, from the same start, in bfloat16. `--estimators`:
LSTMClassifier with its defaults, on as many divisions of the data as seeds, beside a linear model.
`--forecasts`: Forecaster beside naive, linear and classical forecasts. The record of each goes to
bench/results/accuracy.json beside the others, from which `python -m bench.pages` makes the tables of
the manual. Language models read Python's documentation of its own language, and a text of yours, and
digits are scikit-learn's; the other data sets are left out unless their place is given.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import time
import warnings
from collections import namedtuple
from pathlib import Path

import numpy as np

import lstmcore
from bench.record import machine
from bench.report import table
from lstmcore.models.corpus import default_text

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
        return lstmcore.LanguageModel(level, seed=seed, **setting, **compute).fit(
            text[:cut], validation=0, progress=False, **schedule)

    return Task(f"{level} model of {name}", f"2 x 128 units, {steps} steps of 64 x 32 {level}s",
                f"nats per {level}", fit, lambda model: model.evaluate(text[cut:]).nats)


def classifier(name, data, epochs, **setting):
    """The share of right answers on the sequences held out."""
    X, y, X_test, y_test = data
    options = {**dict(epochs=epochs, dtype="float32", validation=0.0, dropout=0.0, lr=1e-2,
                      embed_size=32, min_count=1), **setting}

    def fit(seed, **compute):
        return lstmcore.LSTMClassifier(**options, random_state=seed, **compute).fit(X, y)

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
        return lstmcore.LSTMRegressor(32, forget_bias=4.0, epochs=epochs, bidirectional=False, pooling="last",
                             validation=0.0, dtype="float32", random_state=seed,
                             **compute).fit(*draw(seed, n))

    return Task(f"adding problem over {lag} steps", f"32 units, {n} sequences, epochs={epochs}",
                "mean absolute error", fit,
                lambda model: float(np.abs(model.predict(X_test) - y_test).mean()))


def held_out(X, y, share, seed):
    """(X, y) of the sequences to train on, then of those held out."""
    order = np.random.default_rng(seed).permutation(len(y))
    test, train = np.split(order, [round(share * len(y))])
    y = np.asarray(y)
    return [X[r] for r in train], y[train], [X[r] for r in test], y[test]


def digits(seed=0):
    """8 x 8 images, read row by row."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return held_out(data.images.astype("float32"), data.target, 1 / 3, seed)


def lines(folder, share, seed=0):
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
    return held_out(X, y, share, seed)


def ts(path, share, seed=0):
    """A file of the .ts form: a series per line, its channels and its class divided by colons."""
    data = Path(path).read_text().split("@data")[1].split()
    rows = [line.split(":") for line in data]
    X = [np.array([channel.split(",") for channel in row[:-1]], "float32").T for row in rows]
    return held_out(X, [row[-1] for row in rows], share, seed)


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
        path, name = Path(options.text[0]), options.text[1]
        makers["text"] = lambda: language("char", name, path.read_text(encoding="utf-8"), steps)
    makers["char"] = lambda: language("char", "Python's documentation", default_text(), steps)
    if options.text:
        makers["words"] = lambda: language("word", name, path.read_text(encoding="utf-8"), steps // 2,
                                           vocab_size=2000)
    if options.mnist1d:
        makers["mnist1d"] = lambda: classifier(
            "MNIST-1D", npz(options.mnist1d), 1 if few else 15, hidden_size=128, pooling="max",
            **both)
    if options.names:
        makers["names"] = lambda: classifier(
            "surnames", lines(options.names, 0.2), 1 if few else 10, hidden_size=128,
            pooling="max", **both)
    makers["word"] = lambda: language("word", "Python's documentation", default_text(),
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


def measure_formats(options, say):
    """A record of every task: the figures of each format and seed."""
    for task in tasks(options):
        figures = evaluate(task, options.seeds, options.formats, say)
        yield dict(name=task.name, setting=task.setting, quantity=task.quantity, figures=figures)


def formats_table(record):
    """The table of a record: means over seeds, and from float32 the difference of the means."""
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


def reached(options):
    """title -> (data by seed, what LSTMClassifier is told, linear models by name), data given."""
    from sklearn.ensemble import VotingClassifier
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    def flat(X):
        T = max(map(len, X))
        return np.stack([np.pad(np.reshape(x, (len(x), -1)), ((0, T - len(x)), (0, 0))).ravel()
                         for x in X])

    def tfidf(C, **how):
        return make_pipeline(TfidfVectorizer(**how), LogisticRegression(C=C, max_iter=1000))
    chars = dict(analyzer="char_wb", ngram_range=(1, 3), lowercase=False)
    linear = {"logistic regression on all steps": make_pipeline(
        FunctionTransformer(flat), StandardScaler(), LogisticRegression(max_iter=2000))}
    found = {"digits": ("digits, row by row, a third held out", digits, {}, linear)}
    if options.vowels:
        found["vowels"] = ("Japanese vowels, a third held out",
                           lambda seed: ts(options.vowels, 1 / 3, seed), {}, None)
    if options.mnist1d:
        found["mnist1d"] = ("MNIST-1D, its own test set", lambda seed: npz(options.mnist1d), {}, linear)
    if options.names:
        found["names"] = ("surnames in 18 languages, a fifth held out",
                          lambda seed: lines(options.names, 0.2, seed), {},
                          {f"char tf-idf, logistic regression, C={C}": tfidf(C, **chars) for C in (1, 10)})
    if options.reviews:
        found["reviews"] = ("film-review sentences, a tenth held out",
                            lambda seed: lines(options.reviews, 0.1, seed), dict(tokenizer="word"),
                            {f"word tf-idf, logistic regression, C={C}": tfidf(C) for C in (1, 10)}
                            | {"three of it, averaged by VotingClassifier": VotingClassifier(
                                [(f"{n}", lstmcore.LSTMClassifier(
                                    tokenizer="word", random_state=n, epochs=1 if options.quick else None))
                                 for n in range(3)], voting="soft")})
    return {name: task for name, task in found.items() if not options.only or name in options.only}


def measure_estimators(options, say):
    """A record of every task: the figures of each model and seed."""
    from sklearn.metrics import log_loss
    for title, data, told, linear in reached(options).values():
        figures = {}
        for seed in range(options.seeds):
            X, y, X_test, y_test = data(seed)
            X_test, X = list(X_test), list(X)
            models = {"LSTMClassifier": lstmcore.LSTMClassifier(**told, random_state=seed,
                                                       epochs=1 if options.quick else None)}
            for name, model in (models | (linear or {})).items():
                start = time.process_time()
                model.fit(X, y)
                seconds = time.process_time() - start
                p = model.predict_proba(X_test)
                got = dict(accuracy=float(np.mean(model.classes_[p.argmax(axis=1)] == y_test)),
                           log_loss=float(log_loss(y_test, p, labels=model.classes_)), seconds=seconds)
                say(f"{title}, seed {seed}, {name}: " + ", ".join(
                    f"{key} {value:.4f}" for key, value in got.items()))
                for key, value in got.items():
                    figures.setdefault(name, {}).setdefault(key, []).append(round(value, 5))
            shown = ", ".join(f"{key}={value!r}" for key, value in told.items())
            yield dict(name=title, setting=shown or "the defaults", figures=figures)


def spread(values, digits):
    """Mean and standard deviation of the seeds."""
    if len(values) < 2:
        return f"{statistics.mean(values):.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def estimators_table(record):
    """What the estimators reach, of a record, as Markdown."""
    block = record["estimators"]
    rows = [[task["name"] if n == 0 else "", f"{name} ({task['setting']})" if n == 0 else name,
             len(figures["accuracy"]), *(spread(figures[key], digits) for key, digits in
                                         (("accuracy", 4), ("log_loss", 4), ("seconds", 0)))]
            for task in block["tasks"] for n, (name, figures) in enumerate(task["figures"].items())]
    return (f"{said_of(block)}\n\n"
            + table(["data", "model", "seeds", "accuracy", "log-loss", "CPU seconds of a fit"], rows))


def said_of(block):
    """The line above a table: when, where, with what."""
    return (f"{block['date']}, {block['cpu']}, {block['isa']}, lstmcore {block['version']}, mean ± "
            f"standard deviation over the seeds; `{block['command']}`.")


def series(options):
    """name -> (title, values, steps to forecast, stretches, season, order of an ARIMA, what a Forecaster is
    told): where the season is one of the calendar, that; else no more than a window."""
    import statsmodels.datasets
    found, monthly = {}, dict(window=24, horizon=12, season=12)
    if options.airline:
        rows = Path(options.airline).read_text().split()[1:]
        found["airline"] = ("Airline passengers, 24 months", [float(row.split(",")[-1]) for row in rows],
                            24, 3, 12, ((2, 1, 1), (0, 1, 1, 12)), dict(monthly, transform="log"))
    spots = statsmodels.datasets.sunspots.load_pandas().data["SUNACTIVITY"]
    found["sunspots"] = ("sunspots, 11 years", spots, 11, 3, 11, ((9, 0, 0), (0, 0, 0, 0)),
                         dict(window=22))
    co2 = statsmodels.datasets.co2.load_pandas().data["co2"].resample("MS").mean()
    found["co2"] = ("CO2 on Mauna Loa, 24 months", co2, 24, 2, 12, ((2, 1, 1), (0, 1, 1, 12)), monthly)
    return {name: one for name, one in found.items() if not options.only or name in options.only}


def classical(values, steps, season, transform, order):
    """model -> its forecast of the steps after `values`, gaps filled for it on a straight line."""
    from sklearn.linear_model import RidgeCV
    from statsmodels.tsa.arima.model import ARIMA
    from statsmodels.tsa.exponential_smoothing.ets import ETSModel

    there = np.flatnonzero(~np.isnan(values))
    z = np.interp(np.arange(len(values)), there, values[there])
    level, back = (np.log(z), np.exp) if transform == "log" else (z, lambda z: z)

    def ridge():
        w = 2 * season
        model = RidgeCV(np.logspace(-3, 3, 13)).fit(
            np.stack([level[n:n + w] for n in range(len(level) - w)]), level[w:])
        known = list(level)
        for _ in range(steps):
            known.append(model.predict([known[-w:]])[0])
        return np.array(known[-steps:])
    monthly = dict(trend="add", damped_trend=True, seasonal="add", seasonal_periods=season)
    models = {
        "naive": lambda: np.full(steps, level[-1]),
        "seasonal naive": lambda: level[len(level) - season + np.arange(steps) % season],
        f"ridge AR({2 * season})": ridge,
        "ETS": lambda: ETSModel(level, **(monthly if order[1][3] else {})).fit(disp=False).forecast(steps),
        f"ARIMA{order[0]}{order[1] if order[1][3] else ''}".replace(" ", ""):
            lambda: ARIMA(level, order=order[0], seasonal_order=order[1],
                          trend="n" if order[0][1] else "c").fit().forecast(steps)}
    return {name: back(model()) for name, model in models.items()}


def measure_forecasts(options, say):
    """A record of every series: mean absolute errors on each stretch, coverage of 80 % intervals."""
    warnings.simplefilter("ignore")     # of what the others' optimizers say
    for title, values, steps, stretches, season, order, told in series(options).values():
        values = np.asarray(values, float)
        figures, covered = {}, []
        for stretch in range(1 if options.quick else stretches):
            end = len(values) - stretch * steps
            past, actual = values[:end - steps], values[end - steps:end]

            def error(forecast, actual=actual):
                return round(float(np.nanmean(np.abs(forecast - actual))), 4)
            for name, forecast in classical(past, steps, season, told.get("transform"), order).items():
                figures.setdefault(name, []).append([error(forecast)])
            runs, hits = [], []
            for seed in range(options.seeds):
                model = lstmcore.Forecaster(**told, calibration=steps, random_state=seed,
                                            folds=2 if end - steps > 9 * season else 1).fit(past)
                runs.append(error(model.predict(steps)))
                lower, upper = model.predict_interval(steps, coverage=0.8)
                there = ~np.isnan(actual)
                hits.append(round(float(np.mean(((lower <= actual) & (actual <= upper))[there])), 4))
            figures.setdefault("Forecaster", []).append(runs)
            covered.append(hits)
            say(f"{title}, stretch {stretch}: " + ", ".join(
                f"{name} {statistics.mean(runs[-1]):.4g}" for name, runs in figures.items())
                + f"; covered {statistics.mean(hits):.2f}")
        setting = ", ".join(f"{key}={value!r}" for key, value in told.items())
        yield dict(name=title, setting=setting, steps=steps, figures=figures, covered=covered)


def forecasts_table(record):
    """Mean absolute errors of forecasts, of a record, as Markdown."""
    block, rows = record["forecasts"], []
    for task in block["tasks"]:
        for n, (name, stretches) in enumerate(task["figures"].items()):
            runs = stretches[0]     # of the last stretch, one for each seed
            covered = [statistics.mean(hits) for hits in task["covered"]] if name == "Forecaster" else None
            said = f"{name}({task['setting']})" if covered else name
            rows.append([
                task["name"] if n == 0 else "", said, len(runs) if name == "Forecaster" else "",
                spread(runs, 2),
                f"{statistics.mean(statistics.mean(runs) for runs in stretches):.2f}",
                f"{covered[0]:.2f}; {statistics.mean(covered):.2f}" if covered else ""])
    return (f"{said_of(block)}\n\n" + table(
        ["series", "model", "seeds", "error on the last stretch", "and on all stretches",
         "of 80 % intervals: on the last; on all"], rows))


TABLES = {"formats": formats_table, "estimators": estimators_table, "forecasts": forecasts_table}


def page_table(kind):
    """The table of one kind, of the record in bench/results."""
    return TABLES[kind](json.loads((RESULTS / "accuracy.json").read_text()))


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
    parser.add_argument("--estimators", action="store_true",
                        help="what LSTMClassifier's defaults reach, instead of formats")
    parser.add_argument("--forecasts", action="store_true", help="what Forecaster reaches")
    parser.add_argument("--airline", metavar="FILE", help="of the forecasts: passengers by month, CSV")
    options = parser.parse_args()
    # the record says what was run, not where the data lie on this machine
    shown = [Path(word).name if os.sep in word else word for word in sys.argv[1:]]
    if "--only" in shown:       # a record may grow task by task
        at = shown.index("--only")
        last = next((n for n, word in enumerate(shown) if n > at and word.startswith("--")), len(shown))
        del shown[at:last]
    info = lstmcore.info()
    block = dict(date=time.strftime("%Y-%m-%d"), cpu=machine(0, 0)["cpu"], isa=info["isa"],
                 version=info["version"], numpy=np.__version__, seeds=options.seeds,
                 command=shlex.join(["python", "-m", "bench.accuracy", *shown]), tasks=[])
    out = Path(options.out or RESULTS / "accuracy.json")

    def say(line):
        print(line, file=sys.stderr, flush=True)
    if options.estimators:
        kind, measured = "estimators", measure_estimators(options, say)
    elif options.forecasts:
        kind, measured = "forecasts", measure_forecasts(options, say)
    else:
        kind, measured = None, measure_formats(options, say)
        block["formats"] = options.formats
    for task in measured:       # a long run may be cut short, and another may write beside it
        record = json.loads(out.read_text()) if out.exists() else {}
        kept = [] if kind is None and not block["tasks"] else (
            record.get(kind, {}) if kind else record).get("tasks", [])
        block["tasks"] = [old for old in kept if old["name"] != task["name"]] + [task]
        record = {**record, **(block if kind is None else {kind: block})}
        out.write_text(json.dumps(record, indent=1) + "\n")
    print(TABLES[kind or "formats"](record))


if __name__ == "__main__":
    main()
