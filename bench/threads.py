"""Threads as users have them: `python -m bench.threads`, about two minutes.

Requests per second of a server (8 Python threads, each a request at a time: two layers, H = 256,
float32, 40 steps of one sequence) with default settings and with one thread a call; milliseconds of
one layer at (T, B, I, H) = (100, 1, 512, 512), float32, for as many threads as CPUs, fewer and more;
and the same while a busy process takes its share of the CPUs. PyTorch beside, where it is installed.
Every figure is the median over processes of its own, the libraries in turn.
"""

import argparse
import importlib.util
import itertools
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
CALLERS, SECONDS = 8, 2


def lstmcore_model(size, layers, threads):
    """A function of x; threads is None for the default."""
    import lstmcore

    if threads:
        lstmcore.set_num_threads(threads)
    return lstmcore.LSTM(size, size, layers, dtype="float32").freeze()


def torch_model(size, layers, threads):
    """The same with PyTorch."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    model = torch.nn.LSTM(size, size, layers).eval()

    def run(x):
        with torch.inference_mode():  # of each Python thread
            return model(torch.from_numpy(x))

    return run


MODELS = {"lstmcore": lstmcore_model, "torch": torch_model}


def serve(model, x):
    """Requests per second of CALLERS Python threads."""
    start, done = threading.Barrier(CALLERS), []

    def work():
        start.wait()
        count, end = 0, time.perf_counter() + SECONDS
        while time.perf_counter() < end:
            model(x)
            count += 1
        done.append(count / SECONDS)

    callers = [threading.Thread(target=work) for _ in range(CALLERS)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    return sum(done)


def milliseconds(model, x):
    """The median of one call."""
    times, end = [], time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        model(x)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


JOBS = {  # what: how, size, layers, steps
    "server": (serve, 256, 2, 40), "layer": (milliseconds, 512, 1, 100)}


def measure(what, library, threads):
    """One figure, in this process; threads 0 is the library's default."""
    how, size, layers, steps = JOBS[what]
    model = MODELS[library](size, layers, threads)
    x = np.random.default_rng(0).standard_normal((steps, 1, size)).astype("float32")
    model(x)
    return how(model, x)


def in_turn(what, rows, rounds, libraries):
    """{(library, threads): the median over `rounds` processes}."""
    figures = {key: [] for key in itertools.product(libraries, rows)}
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("OMP_NUM_THREADS", "LSTMCORE_NUM_THREADS")}
    for _ in range(rounds):
        for (library, threads), seen in figures.items():
            command = [sys.executable, "-m", "bench.threads", "--one", what, library, str(threads)]
            answer = subprocess.run(command, cwd=ROOT, env=environment, check=True,
                                    capture_output=True, text=True).stdout
            seen.append(float(answer))
    return {key: statistics.median(seen) for key, seen in figures.items()}


def table(title, names, figures, libraries):
    """A row per number of threads; ratios to the row of one thread."""
    print(f"\n{title:44}" + "".join(f"{library:>12}{'/ 1 thread':>12}" for library in libraries))
    for threads, name in names.items():
        cells = (f"{figures[key, threads]:12.1f}{figures[key, threads] / figures[key, 1]:12.2f}"
                 for key in libraries)
        print(f"{name:44}" + "".join(cells))


def main(argv=None):
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.threads",
                                     description="Measure threads as users have them.")
    parser.add_argument("--rounds", type=int, default=3, help="processes per figure (default: 3)")
    parser.add_argument("--one", nargs=3, metavar=("JOB", "LIBRARY", "THREADS"),
                        help="one figure, measured in this process")
    options = parser.parse_args(argv)
    if options.one:
        print(measure(options.one[0], options.one[1], int(options.one[2])))
        return
    libraries = ["lstmcore"] + ["torch"] * (importlib.util.find_spec("torch") is not None)
    cpus = len(os.sched_getaffinity(0))
    print(f"{cpus} CPUs, load of the last minute before this {os.getloadavg()[0]:.1f}")
    table(f"requests/s, {CALLERS} Python threads", {0: "default", 1: "one thread a call"},
          in_turn("server", (0, 1), options.rounds, libraries), libraries)
    rows = {n: f"{n} thread{'s' * (n > 1)}" for n in sorted({1, cpus, 4 * cpus})}
    table("ms at (100,1,512,512)", rows, in_turn("layer", rows, options.rounds, libraries),
          libraries)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        table("ms beside a busy process", rows, in_turn("layer", rows, options.rounds, libraries),
              libraries)
    finally:
        busy.kill()
        busy.wait()


if __name__ == "__main__":
    main()
