"""One process that runs one library: `Worker` is its handle, `serve` what happens inside.

Each library brings its own thread pool, so each gets a process, on the same cores and with the
same number of threads. Commands and answers are JSON lines. Whatever fails in the process (no such
library, an exception, a crash, silence) is a `Failure` that says why, and the next command starts
a new process: one bad peer spoils no table.
"""

import gc
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
# The tree comes last: an lstmcore that is installed is found before the tree's.
SERVE = ("import sys; sys.path.append(sys.argv[1]); from bench.worker import serve; "
         "serve(sys.argv[2], int(sys.argv[3]))")
WARM_UP = 0.05  # s after other processes have run: caches, clocks and thread pools come back


class Failure(Exception):
    """A library that could not do what it was asked; the message is one line."""


class Worker:
    """The handle of one library's process. Use as a context manager."""

    def __init__(self, library, threads, python=sys.executable, path=(), patience=120):
        """`path` comes first on the process's sys.path; `patience` is in seconds per command."""
        self.library, self.patience, self._process = library, patience, None
        self._command = [python, "-c", SERVE, str(ROOT), library, str(threads)]
        limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS",
                                "LSTMCORE_NUM_THREADS"), str(threads))
        self._environment = {**os.environ, **limits,
                             "PYTHONPATH": os.pathsep.join(map(str, path))}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop()

    def ask(self, do, **arguments):
        """Send one command and return its answer; Failure if there is none."""
        if self._process is None:
            self._start()
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
            readable, _, _ = select.select([self._process.stdout], [], [], self.patience)
            line = self._process.stdout.readline() if readable else None
        except BrokenPipeError:
            line = b""
        if not line:
            raise self._silence(timed_out=line is None)
        answer = json.loads(line)
        if "failed" in answer:
            raise Failure(answer["failed"])
        return answer

    def prepare(self, case, job, folder):
        """Build the case's job from data.npz in `folder`, run it once, verify it, and return its
        Errors against expected.npz there; without that file, return None."""
        from bench.cases import Errors

        found = self.ask("prepare", case=asdict(case), job=job, folder=str(folder))["errors"]
        return found and Errors(*found)

    def time(self, seconds):
        """Run what was prepared for about `seconds` and return the seconds of each run."""
        return self.ask("time", seconds=seconds)["times"]

    def _silence(self, timed_out):
        """The Failure of a process that did not answer, which is stopped."""
        reason = f"no answer in {self.patience} s"
        if not timed_out:
            code = self._process.wait()
            reason = f"the process died of {signal.Signals(-code).name}" if code < 0 else \
                f"the process ended with exit code {code}"
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip().splitlines()[-1:]
        self._stop()
        return Failure(": ".join([reason, *last]))

    def _start(self):
        self._errors = tempfile.TemporaryFile()
        # An empty folder as the working directory: no source tree gets onto the import path.
        self._home = tempfile.TemporaryDirectory()
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            env=self._environment, cwd=self._home.name)

    def _stop(self):
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._home.cleanup()
            self._errors.close()
            self._process = None


class Server:
    """What the process can do; every public method is a command."""

    def __init__(self, library, threads):
        from bench.peers import PEERS

        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        self.peer = PEERS[library](threads)
        self.run = None

    def about(self):
        """The library's version, and megabytes installed: alone, and with what it requires."""
        required = _required(self.peer.packages)
        return {"version": self.peer.version, "alone": _megabytes(self.peer.packages),
                "with_requirements": _megabytes(required) if required else None}

    def prepare(self, case, job, folder):
        """See Worker.prepare."""
        from bench.cases import errors

        case = self._case(case)
        self.run = None  # gives back the memory of the last case
        gc.collect()
        self.run, collect = self.peer.prepare(case, job, _load(folder, "data"))
        answer = _load(folder, "expected")
        return {"errors": errors(collect(self.run()), answer) if answer else None}

    def time(self, seconds):
        """See Worker.time."""
        clock, run, times = time.perf_counter, self.run, []
        start = begin = clock()
        gc.disable()
        while begin < start + seconds:
            run()
            end = clock()
            times.append((begin, end - begin))
            begin = end
        gc.enable()
        warm = [taken for begin, taken in times if begin > start + min(WARM_UP, seconds / 4)]
        return {"times": warm or [times[-1][1]]}

    def memory(self, case, job, folder, warm_up):
        """By how many megabytes two runs raise the peak of the resident memory.

        A small case runs first, so that the library's own code and pools do not count.
        """
        warm_up = {**warm_up, "folder": str(Path(folder, "warm_up"))}
        self.prepare(**warm_up)
        run, _ = self.peer.prepare(self._case(case), job, _load(folder, "data"))
        self.run = None
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _status("VmRSS")
        run(), run()
        return {"megabytes": (_status("VmHWM") - before) / 1024}

    def _case(self, fields):
        from bench.cases import Case

        return Case(**{**fields, "lengths": fields["lengths"] and tuple(fields["lengths"])})


def _load(folder, name):
    path = Path(folder, name + ".npz")
    if not path.exists():
        return None
    with np.load(path) as arrays:
        return dict(arrays)


def _status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise Failure(f"/proc/self/status has no {field}")


def _required(packages):
    """The packages and all they require, extras left out; None for a tree without metadata."""
    import re
    from importlib import metadata

    found, ahead = set(), list(packages)
    while ahead:
        package = re.split(r"[^\w.-]", ahead.pop())[0].lower().replace("_", "-")
        if package not in found:
            found.add(package)
            try:
                required = metadata.requires(package) or []
            except metadata.PackageNotFoundError:
                if package in packages:
                    return None
                required = []  # for another platform or Python
            ahead += [r for r in required if "extra ==" not in r]
    return found


def _megabytes(packages):
    """Bytes on disk of the files that the packages brought; of a source tree, of its folder."""
    import importlib.util
    from importlib import metadata

    total = 0
    for package in packages:
        try:
            files = [file.locate() for file in metadata.files(package) or []]
        except metadata.PackageNotFoundError:
            spec = importlib.util.find_spec(package.replace("-", "_"))
            folders = spec.submodule_search_locations if spec else []
            files = [file for folder in folders for file in Path(folder).rglob("*")
                     if file.suffix in (".py", ".so")]
        total += sum(Path(file).stat().st_size for file in files if Path(file).is_file())
    return total / 1e6


def _one_line(error):
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


def serve(library, threads):
    """Answer commands from stdin until it closes; whatever a library prints goes to stderr."""
    from bench.peers import Unsupported

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    server, broken = None, None
    try:
        server = Server(library, threads)
    except ImportError as error:
        broken = "not installed: " + _one_line(error)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if broken:
                raise Failure(broken)
            answer = getattr(server, command.pop("do"))(**command)
        except (Failure, Unsupported) as error:
            answer = {"failed": _one_line(error)}
        except Exception as error:  # a peer may raise anything; the table says what it was
            answer = {"failed": f"{type(error).__name__}: {_one_line(error)}"}
        print(json.dumps(answer), file=answers, flush=True)
