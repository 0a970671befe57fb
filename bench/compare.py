"""lstmcore against the other LSTMs on CPU, in every number format: `python -m bench.compare`.

Each library runs in its own process, on the same cores, with the same number of threads. For every
case all of them first prove their results against the reference in float64; a library that is
wrong, cannot do it or fails is shown as such. Then they take turns, each turn a quarter of a
second or one run, and the median of the turns' medians counts. Training is forward and backward
with all gradients, dx included; one stream step is the next step with the state carried over.

Below float32 the weights are like trained ones, a library's error against float64 stands beside its
time, and only one that is off by more than rounding can explain counts as wrong (`cases.BELOW`).

Writes compare.json, the record of all that was measured, and from it compare.png into --output, and
prints the tables; --record FILE does it again without measuring; `bench.pages` puts them into README
and docs. A library that lives in another
environment is found with --python, e.g. --python openvino,jax=OTHER/bin/python; one that is not
installed is a line that says so. The sections in float32 and float64 take some eight minutes; those
below it ten more where the CPU has no bfloat16, most of them PyTorch's. --quick takes small cases.
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from bench import record, report, roofline
from bench.cases import (BELOW, CASES, DENSE, EVEN, PEEPHOLES, RAGGED, STREAM, TOLERANCE, WORDLM,
                         expected, make_data, refusal)
from bench.peers import PEERS
from bench.record import Contest, Library, Record, Timing, Versus
from bench.worker import ROOT, Failure, Worker

QUICK = ("char-rnn", "small", "seq-b1", "tiny", "stream", "ragged")
TURN = 0.25  # s
SLOW, SLOW_ROUNDS = 12.0, 3  # after 12 s three rounds must do, and after 36 s what there is
SECTIONS = (*report.HEADINGS, "self", "process")
ONE = ("ncnn", "tract", "mnn", "litert")  # made for one sequence at a time
FORCE = ("LSTMCORE_ISA", "ONEDNN_MAX_CPU_ISA")  # by which libraries leave instructions aside


def contests():
    """Every line of the tables."""
    dense = [(case, "infer") for case in DENSE] + [(STREAM, "stream")]
    hard = [(replace(case, weights="trained"), job) for case, job in dense]
    torch_bf16 = ("torch bf16", "torch autocast", "torch mkldnn bf16")
    int8 = tuple(name for name, peer in PEERS.items() if peer.precision == "int8")
    lines = [Contest("train", case, "train", ("lstmcore", "torch", "torch.compile", "jax"))
             for case in (*DENSE, WORDLM)]
    lines += [Contest("infer", case, job, ("lstmcore", "torch", "torch.compile", "onnxruntime",
                                           "openvino", "jax"))
              for case, job in dense]
    lines += [Contest("train-bf16", case, "train", ("lstmcore bf16", "lstmcore", *torch_bf16,
                                                    "torch"))
              for case, job in hard if job == "infer"]
    lines += [Contest("infer-bf16", case, job, ("lstmcore bf16", "lstmcore", *torch_bf16,
                                                "openvino default", "openvino", "torch"))
              for case, job in hard]
    lines += [Contest("infer-int8", case, job, ("lstmcore int8", "lstmcore", *(
                  name for name in int8[1:] if case.B == 1 or name.split()[0] not in ONE)))
              for case, job in hard]
    lines += [Contest("one", case, job, ("lstmcore", "onnxruntime", "openvino", *ONE))
              for case, job in hard if case.B == 1]
    lines += [Contest("float64", replace(case, dtype="float64"), "train", ("lstmcore", "torch"))
              for case in DENSE]
    lines += [Contest("ragged", case, job, ("lstmcore", "torch", "onnxruntime"))
              for case in RAGGED for job in ("train", "infer")]
    return lines


def self_contests(threads):
    """lstmcore against itself: what a second thread, peepholes and ragged batches give or cost."""
    named = {case.name: case for case in DENSE}
    lines = [Versus(f"1 thread / {threads} threads", case, "train", 1, case, "train", threads)
             for case in (named["ptb-medium"], named["char-512"], named["big"]) if threads > 1]
    lines.append(Versus("peepholes / plain", PEEPHOLES, "train", threads,
                        named["char-512"], "train", threads))
    lines.append(Versus("ragged / dense of as many tokens", RAGGED[0], "train", threads,
                        EVEN, "train", threads))
    return lines


class Arena:
    """The processes of all libraries and the folder through which they get their data."""

    def __init__(self, threads, pythons, rounds):
        self.threads, self.pythons, self.rounds = threads, pythons, rounds
        self._stack, self._workers = ExitStack(), {}
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stack.close()

    def python(self, library):
        """The interpreter that has the library."""
        return self.pythons.get(library, sys.executable)

    def worker(self, library, threads=None, role=""):
        """The library's process; another `role` is another process."""
        threads = threads or self.threads
        key = library, threads, role
        if key not in self._workers:
            self._workers[key] = self._stack.enter_context(
                Worker(library, threads, self.python(library)))
        return self._workers[key]

    def write(self, case, job, folder=None, answer=True):
        """Put the case's data, and the reference's answer, where the processes find them."""
        folder = Path(folder or self.folder)
        folder.mkdir(exist_ok=True)
        data = make_data(case, job)
        np.savez(folder / "data.npz", **data)
        (folder / "expected.npz").unlink(missing_ok=True)
        if answer:
            np.savez(folder / "expected.npz", **expected(case, job, data))
        return folder

    def hold(self, contest):
        """One contest: library -> Timing, or the reason why there is none."""
        self.write(contest.case, contest.job)
        result, runners = {}, {}
        for library in contest.libraries:
            if contest.job not in PEERS[library].jobs:
                result[library] = f"does not {contest.job}"
                continue
            try:
                found = self.worker(library).prepare(contest.case, contest.job, self.folder)
            except Failure as failure:
                result[library] = str(failure)
                continue
            if wrong := refusal(found, PEERS[library].precision, contest.case.dtype):
                result[library] = wrong
            else:
                runners[library] = self.worker(library), found
        return result | self.race(runners)

    def race(self, runners):
        """label -> (prepared worker, Errors) take turns: label -> Timing or the reason."""
        turns, failed = {label: [] for label in runners}, {}
        start = time.monotonic()
        for turn in range(self.rounds):
            order = list(runners)
            order = order[turn % len(order):] + order[:turn % len(order)] if order else []
            for label in order:
                if label in failed:
                    continue
                try:
                    turns[label].append(runners[label][0].time(TURN))
                except Failure as failure:
                    failed[label] = str(failure)
            slow = (time.monotonic() - start) / SLOW
            if slow > 3 or slow > 1 and turn + 1 >= SLOW_ROUNDS:
                break
        return failed | {
            label: Timing(statistics.median(map(statistics.median, times)),
                          float(np.quantile(np.concatenate(times), 0.99)), *runners[label][1])
            for label, times in turns.items() if label not in failed}

    def hold_self(self, versus):
        """The ratio of two ways of running lstmcore, or the reason why there is none."""
        sides = ((versus.case, versus.job, versus.threads, "this"),
                 (versus.other, versus.other_job, versus.other_threads, "that"))
        runners = {}
        try:
            for case, job, threads, role in sides:
                worker = self.worker("lstmcore", threads, role)
                found = worker.prepare(case, job, self.write(case, job))
                if wrong := refusal(found, "float32", case.dtype):
                    return wrong
                runners[role] = worker, found
        except Failure as failure:
            return str(failure)
        times = self.race(runners)
        failures = [time for time in times.values() if isinstance(time, str)]
        return failures[0] if failures else times["this"].median / times["that"].median

    def memory(self, library, case):
        """Megabytes by which one training step raises the peak; in a process of its own."""
        folder = self.write(case, "train", answer=False)
        small = CASES["tiny"]
        self.write(small, "train", folder / "warm_up", answer=False)
        with Worker(library, self.threads, self.python(library)) as worker:
            try:
                return worker.ask("memory", case=asdict(case), job="train", folder=str(folder),
                                  warm_up={"case": asdict(small), "job": "train"})["megabytes"]
            except Failure as failure:
                return str(failure)

    def import_seconds(self, library, times=5):
        """The median time of importing the library after NumPy, or None."""
        code = ("import sys; sys.path.append(sys.path.pop(0)); "  # the tree last, as in workers
                f"import numpy, time; begin = time.perf_counter(); {PEERS[library].load}; "
                "print(time.perf_counter() - begin)")
        taken = []
        for _ in range(times):
            done = subprocess.run([self.python(library), "-c", code], cwd=ROOT, text=True,
                                  capture_output=True)
            if done.returncode:
                return None
            taken.append(float(done.stdout.split()[-1]))
        return statistics.median(taken)

    def process(self, library):
        """What having the library costs: a dict for its row of the table, or the reason."""
        try:
            about = self.worker(library).ask("about")
        except Failure as failure:
            return str(failure)
        row = {**about, "import": self.import_seconds(library)}
        if "train" in PEERS[library].jobs:
            row |= {name: self.memory(library, CASES[name]) for name in ("ptb-medium", "char-512")}
        return row


def parse(argv):
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare",
                                     description="Compare lstmcore with other LSTMs on CPU.")
    parser.add_argument("--section", action="append", choices=SECTIONS,
                        help="only this table (repeatable)")
    parser.add_argument("--case", action="append", choices=[*CASES], metavar="NAME",
                        help=f"only this case (repeatable): {', '.join(CASES)}")
    parser.add_argument("--library", action="append", choices=[*PEERS], metavar="NAME",
                        help=f"only this library beside lstmcore (repeatable): {', '.join(PEERS)}")
    parser.add_argument("--python", action="append", default=[], metavar="LIB[,LIB]=PATH",
                        help="the interpreter that has these libraries (default: this one)")
    parser.add_argument("--threads", type=int, default=2, help="threads and cores for each library")
    parser.add_argument("--quick", action="store_true", help="small cases, 3 rounds instead of 5")
    parser.add_argument("--output", type=Path, default=Path("bench/results"), metavar="FOLDER",
                        help="where the two files go (default: bench/results)")
    parser.add_argument("--record", type=Path, metavar="FILE",
                        help="the tables of this compare.json: nothing is measured")
    options = parser.parse_args(argv)
    options.cases = options.case or (QUICK if options.quick else tuple(CASES))
    options.section = options.section or SECTIONS
    options.libraries = [name for name in PEERS
                         if name.startswith("lstmcore") or name in (options.library or PEERS)]
    options.pythons = {}
    for pair in options.python:
        names, _, path = pair.partition("=")
        if not path or not set(names.split(",")) <= set(PEERS):
            parser.error(f"--python must be LIB[,LIB]=PATH with LIB of {', '.join(PEERS)}; "
                         f"got {pair}")
        options.pythons |= dict.fromkeys(names.split(","), path)
    return options


def chosen(options, lines):
    """The contests that the command line asks for."""
    return [line._replace(libraries=tuple(name for name in line.libraries
                                          if name in options.libraries))
            for line in lines
            if line.case.name in options.cases and line.section in options.section]


def progress(title, result):
    """One line to stderr for what was just measured."""
    if isinstance(result, dict):
        result = "  ".join(f"{name} {report.milliseconds(value)}" for name, value in result.items())
    print(f"{time.strftime('%H:%M:%S')}  {title:28} {result}", file=sys.stderr, flush=True)


def measure(options, command):
    """Hold every contest: the Record."""
    load, results, versus, processes, libraries = os.getloadavg()[0], [], [], {}, {}
    with Arena(options.threads, options.pythons, 3 if options.quick else 5) as arena:
        for contest in chosen(options, contests()):
            results.append((contest, arena.hold(contest)))
            progress(f"{contest.section} {contest.case.name} {contest.job}", results[-1][1])
        for line in self_contests(options.threads) if "self" in options.section else ():
            if line.case.name in options.cases:
                versus.append((line, arena.hold_self(line)))
                progress(f"{line.case.name}: {line.title}", versus[-1][1])
        for library in options.libraries:
            peer = PEERS[library]
            try:
                version = arena.worker(library).ask("about")["version"]
            except Failure as failure:
                version = str(failure)
            first = all(peer.packages != other.packages for other in libraries.values())
            libraries[library] = Library(version, peer.precision, peer.packages)
            if "process" in options.section and first:
                processes[library] = arena.process(library)
                progress(library, str(processes[library]))
    return Record(record.machine(options.threads, load), command, record.today(), libraries,
                  *limits(options.threads), results, versus, processes)


def limits(threads):
    """The measured peaks and reads of a Record; two empty dicts without a probe."""
    try:
        probe = roofline.measure(threads)
        return ({name: roofline.peak_gflops(threads, name) for name in (*TOLERANCE, *BELOW)},
                {name.removeprefix("read_"): value for name, value in probe.items()
                 if name.startswith("read_")})
    except (OSError, subprocess.CalledProcessError) as error:
        progress("no roofline", error)
        return {}, {}


def typed(argv):
    """What a reader would type for the same figures: where the files go is left out."""
    forced = [f"{name}={os.environ[name]}" for name in FORCE if os.environ.get(name)]
    where = {k + further for k, word in enumerate(argv) if word == "--output" for further in (0, 1)}
    return " ".join([*forced, "python -m bench.compare", shlex.join(
        word for k, word in enumerate(argv) if k not in where and not word.startswith("--output="))]).strip()


def main(argv=None):
    """Measure, write the record and the report, print it."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    source = options.record or options.output / "compare.json"
    if not options.record:
        found = measure(options, typed(argv))
        record.write(found, source)
    found = record.read(source)
    try:
        report.chart(found, options.output / "compare.png")
    except ImportError as error:
        progress("no chart", error)
    print(report.markdown(found))


if __name__ == "__main__":
    main()
