"""The regression gate: `python -m bench.gate BASE HEAD`; exit code 1 if HEAD is slower than BASE.

BASE and HEAD are git revisions; HEAD may be left out and is then the working tree as it is. Both
are built with pip into folders of their own, BASE a second time, and the three builds run in three
processes on the same cores, taking turns in a rotating order. What BASE differs from itself (A/A)
is the noise of this machine at this hour: a case has failed if HEAD / BASE exceeds 1 + threshold,
where

    threshold = max(--threshold, 2 x the largest |A/A - 1| of all cases)

so a noisy machine makes the gate blunt, and says so, but does not make it lie. A ratio is the
median over the turns of the quotient of medians within one turn, against the mean of both BASEs.
Exit code 2: something did not build or gave wrong results. Timings never travel between machines.
"""

import argparse
import statistics
import sys
import tempfile
from collections import namedtuple
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from bench.builds import build
from bench.cases import CASES, expected, make_data, refusal
from bench.report import table
from bench.worker import Failure, Worker

GATED = ("char-rnn", "char-512", "small", "seq-b1", "tiny", "ragged")
TURN = 0.2  # s
Verdict = namedtuple("Verdict", "name ratio noise milliseconds")


def judge(workers, name, job, rounds, folder):
    """One case on the three builds: base, twin (base again), head."""
    case = CASES[name]
    job = "stream" if name == "stream" else job
    data = make_data(case, job)
    np.savez(folder / "data.npz", **data)
    np.savez(folder / "expected.npz", **expected(case, job, data))
    for label, worker in workers.items():
        try:
            found = worker.prepare(case, job, folder)
        except Failure as failure:
            raise Failure(f"{name} {job}, {label}: {failure}") from None
        if wrong := refusal(found, "float32", case.dtype):
            raise Failure(f"{name} {job}, {label}: {wrong}")
    turns = []
    for turn in range(rounds):
        order = list(workers)[turn % 3:] + list(workers)[:turn % 3]
        times = {label: statistics.median(workers[label].time(TURN)) for label in order}
        turns.append((2 * times["head"] / (times["base"] + times["twin"]),
                      times["twin"] / times["base"], times["base"]))
    ratio, noise, base = map(statistics.median, zip(*turns))
    return Verdict(f"{name} {job}", ratio, noise, base * 1e3)


def parse(argv):
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gate",
                                     description="Fail if HEAD is slower than BASE.")
    parser.add_argument("base", metavar="BASE", help="a git revision")
    parser.add_argument("head", metavar="HEAD", nargs="?", default="",
                        help="a git revision (default: the working tree)")
    parser.add_argument("--case", action="append", choices=[*CASES], metavar="NAME",
                        help=f"only this case (repeatable; default: {', '.join(GATED)})")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each build per case")
    parser.add_argument("--threshold", type=float, default=0.03, metavar="FRACTION",
                        help="the least slowdown that fails (default: 0.03)")
    return parser.parse_args(argv)


def main(argv=None):
    """Build, alternate, print the table; return the exit code."""
    options = parse(argv)
    verdicts = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        try:
            base = build(options.base, folder / "base")
            builds = {"base": base, "twin": build(options.base, folder / "twin"),
                      "head": build(options.head, folder / "head")}
            workers = {label: stack.enter_context(Worker("lstmcore", options.threads, path=[path]))
                       for label, path in builds.items()}
            for name in options.case or GATED:
                for job in ("train",) if CASES[name].V else ("train", "infer"):
                    verdicts.append(judge(workers, name, job, options.rounds, folder))
                    if name == "stream":
                        break
        except Failure as failure:
            print(failure, file=sys.stderr)
            return 2
    noise = max(abs(verdict.noise - 1) for verdict in verdicts)
    threshold = max(options.threshold, 2 * noise)
    failed = [verdict.name for verdict in verdicts if verdict.ratio > 1 + threshold]
    print(table(["case", "BASE, ms", "HEAD / BASE", "BASE / BASE", "verdict"],
                [[verdict.name, f"{verdict.milliseconds:.3g}", f"{verdict.ratio:.3f}",
                  f"{verdict.noise:.3f}", "slower" if verdict.name in failed else "ok"]
                 for verdict in verdicts]))
    print(f"threshold {threshold:.1%}: the larger of {options.threshold:.1%} and twice the A/A "
          f"spread {noise:.1%}")
    print(f"slower: {', '.join(failed)}" if failed else "no case is slower")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
