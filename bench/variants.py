"""What each variant of the LSTM costs: `python -m bench.variants`, about five minutes.

A training step (forward, backward, all gradients) of one layer at char-512, float32, with one option of
`lstmcore.LSTM` after the other, over that of the usual cell; and a Keras LSTM with and without recurrent
dropout on the same shape, where Keras and PyTorch are installed. All in one process, in turn, medians.
With --text FILE instead what each does to the validation loss of a character model, after equally many
steps; about a quarter of an hour. Both write their part of bench/results/variants.json, from which
bench.pages makes the tables of docs/variants.md.
"""

import argparse
import importlib.util
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np

from bench import record
from bench.cases import CASES

OUTPUT = Path(__file__).resolve().parent / "results" / "variants.json"
USUAL = "the usual cell"
OPTIONS = {  # options of LSTM, as they are written there
    USUAL: {},
    'recurrent_activation="hard_sigmoid"': dict(recurrent_activation="hard_sigmoid"),
    'activation="softsign"': dict(activation="softsign"),
    'activation="elu"': dict(activation="elu"),
    "clip=3.0": dict(clip=3.0),
    "coupled=True": dict(coupled=True),
    "zoneout=0.1": dict(zoneout=0.1),
    "recurrent_dropout=0.3": dict(recurrent_dropout=0.3),
    "weight_dropout=0.3": dict(weight_dropout=0.3),
    "peepholes=True": dict(peepholes=True),
    'layer_norm="products"': dict(layer_norm="products"),
    'layer_norm="gates"': dict(layer_norm="gates"),
}
MODELS = {  # of the losses, as options of LanguageModel
    "none of them": {},
    "dropout=0.3": dict(dropout=0.3),
    "dropout=0.3, locked_dropout=True": dict(dropout=0.3, locked_dropout=True),
    "recurrent_dropout=0.3": dict(recurrent_dropout=0.3),
    "weight_dropout=0.3": dict(weight_dropout=0.3),
    "zoneout=0.1": dict(zoneout=0.1),
    "dropout=0.3, recurrent_dropout=0.2": dict(dropout=0.3, recurrent_dropout=0.2),
    'layer_norm="products"': dict(layer_norm="products"),
    'layer_norm="gates"': dict(layer_norm="gates"),
}
KERAS = ("Keras", "Keras, recurrent_dropout=0.3")


def ours(case):
    """{name: a training step}."""
    import lstmcore

    rng = np.random.default_rng(0)
    x = rng.standard_normal((case.T, case.B, case.I), dtype=np.float32)
    dy = rng.standard_normal((case.T, case.B, case.H), dtype=np.float32)

    def step_of(options):
        layer = lstmcore.LSTM(case.I, case.H, seed=0, **options)

        def step():
            layer.zero_grad()
            layer(x)
            layer.backward(dy)
        return step

    return {name: step_of(options) for name, options in OPTIONS.items()}


def keras_steps(case, threads):
    """The same of Keras on PyTorch; nothing where they are not installed."""
    if not all(map(importlib.util.find_spec, ("keras", "torch"))):
        return {}
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras
    import torch

    torch.set_num_threads(threads)
    x = torch.randn(case.B, case.T, case.I, requires_grad=True)
    dy = torch.randn(case.B, case.T, case.H)

    def step_of(dropout):
        layer = keras.layers.LSTM(case.H, return_sequences=True, recurrent_dropout=dropout)
        layer.build(x.shape)

        def step():
            layer.zero_grad()
            layer(x, training=True).backward(dy)
        return step

    return dict(zip(KERAS, (step_of(0.0), step_of(0.3))))


def losses(path, named, steps, seed):
    """{name: [least validation loss, that at the end, the training loss at the end]}, nats a character."""
    import lstmcore

    found = {}
    for name, options in MODELS.items():
        model = lstmcore.LanguageModel(hidden_size=256, num_layers=1, seed=seed, **options).fit(
            path, steps=steps, seq_length=64, batch_size=32, lr=3e-3, evaluate_every=steps // 20,
            validation=0.1, progress=False)
        history = [record for record in model.history if record["validation"] is not None]
        found[name] = [min(r["validation"] for r in history), history[-1]["validation"], history[-1]["loss"]]
        print(name, *(f"{loss:.4f}" for loss in found[name]), flush=True)
    return {"text": named, "steps": steps, "seed": seed, "found": found}


def measure(steps, rounds):
    """{name: median seconds}, in turn."""
    seconds = {name: [] for name in steps}
    for n in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if n:                               # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}


def main(argv=None):
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(prog="python -m bench.variants",
                                     description="Measure what variants of the LSTM cost.")
    parser.add_argument("--rounds", type=int, default=15, help="steps per figure (default: 15)")
    parser.add_argument("--keras-rounds", type=int, default=3, help="of Keras's (default: 3)")
    parser.add_argument("--threads", type=int, help="of each library (default: the CPUs)")
    parser.add_argument("--text", nargs=2, metavar=("FILE", "NAME"),
                        help="measure losses on a text, of this name in the table, instead of times")
    parser.add_argument("--steps", type=int, default=4000, help="of each training (default: 4000)")
    parser.add_argument("--seed", type=int, default=0, help="of each training (default: 0)")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="JSON")
    options = parser.parse_args(argv)
    import lstmcore

    kept = json.loads(options.output.read_text()) if options.output.exists() else {}
    if options.text:
        kept["losses"] = {"date": record.today(), **losses(*options.text, options.steps, options.seed)}
        options.output.write_text(json.dumps(kept, indent=1) + "\n")
        return
    threads = options.threads or lstmcore.get_num_threads()
    lstmcore.set_num_threads(threads)
    here, case = record.machine(threads, os.getloadavg()[0]), CASES["char-512"]
    seconds = measure(ours(case), options.rounds)
    peers = keras_steps(case, threads)
    seconds |= measure(peers, options.keras_rounds)
    versions = {name: __import__(name).__version__ for name in ("lstmcore", *(
        ("keras", "torch") if peers else ()))}
    options.output.write_text(json.dumps({
        **kept, "machine": here, "date": record.today(), "command": "python -m bench.variants",
        "versions": versions, "rounds": options.rounds, "seconds": seconds}, indent=1) + "\n")
    print(table(json.loads(options.output.read_text())))


def table(found):
    """The table of a page, from the record."""
    cpu, seconds, case = found["machine"], found["seconds"], CASES["char-512"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [f"`{found['command']}`, {found['date']}: {cpu['cpu']}, {cpu['threads']} threads, {versions}; "
             f"medians of {found['rounds']} training steps of one layer at (T, B, I, H) = "
             f"{case.T, case.B, case.I, case.H}, in turn.", "",
             "| | ms | over the usual cell |", "|---|--:|--:|"]
    for name, value in seconds.items():
        words = f"`{name}`" if "=" in name and name not in KERAS else name
        lines.append(f"| {words} | {value * 1e3:,.1f} | {value / seconds[USUAL]:.2f}× |")
    return "\n".join(lines)


def losses_table(found):
    """The losses, from the record."""
    said = found["losses"]
    lines = [f"`python -m bench.variants --text`, {said['date']}: {said['text']}, one layer of 256 units, "
             f"{said['steps']} steps of 32 × 64 characters, Adam, seed {said['seed']}; nats per character, "
             "on a tenth of the text held out.", "",
             "| | least loss held out | at the end | training, at the end |", "|---|--:|--:|--:|"]
    for name, values in said["found"].items():
        words = f"`{name}`" if "=" in name else name
        lines.append(f"| {words} | " + " | ".join(f"{loss:.3f}" for loss in values) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
