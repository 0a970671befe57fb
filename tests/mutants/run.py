"""Breaks one line at a time and sees that a test turns red:  python tests/mutants/run.py [--quick]

Copies the tree to a scratch directory, builds it there once, and for every mutant of mutants.py
changes the one place, rebuilds what depends on it (for one instruction set, at -O1 or, what only
plans, -O0) and runs the tests that should notice, the C programs before the Python ones. Prints
what became of each and a table by file; the exit code is 1 if anything survived or a test fails
without any mutant, 2 if a mutant's text is not found exactly once.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from mutants import MUTANTS, NEEDS, QUICK

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-fPIC", "-ffp-contract=off", "-std=gnu11", "-Icsrc", "-w"]
WHOLE = ("avx512", "avx2", "neon", "base")  # which have every number format
EMULATE = ["-Itests/csrc/avx512", "-D__builtin_cpu_supports(feature)=1"]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")

# By what a path starts with: the C programs, then the tests, the likeliest to notice first.
KERNELS = ("test_kernels", "test_activations", "test_determinism", "test_losses", "test_optim",
           "test_gru", "test_below_float32")
PLANS = ("test_kernels", "test_gru", "test_determinism", "test_recurrent", "test_api",
         "test_layers", "test_losses", "test_below_float32")
CALLS = ("test_api", "test_checks", "test_variants", "test_recurrent", "test_layers", "test_losses",
         "test_arguments", "test_optim", "test_precision", "test_gru")
FILES = ("test_variants", "test_files", "test_formats_disk", "test_formats_state_dict", "test_formats_onnx",
         "test_formats_keras", "test_formats_hostile", "test_precision_models")
NOTICE = {
    "csrc/team.c": (("barrier", "region"), ("test_threads",)),
    "csrc/": (("check",), KERNELS),
    "lstmcore/_grid": ((), ("test_grid", "test_kernels")),
    "lstmcore/_memory": ((), ("test_memory", *PLANS)),
    "lstmcore/_dense": ((), ("test_losses", "test_optim", "test_layers", *PLANS)),
    "lstmcore/_products": ((), (*PLANS, "test_threads")),
    "lstmcore/_": ((), PLANS),
    "lstmcore/reference": ((), ("test_reference",)),
    "lstmcore/precision": ((), ("test_precision", "test_below_float32")),
    "lstmcore/threads": ((), ("test_threads",)),
    "lstmcore/checks": ((), ("test_checks", *CALLS)),
    "lstmcore/arguments": ((), ("test_kernels", *CALLS)),
    "lstmcore/functional": ((), ("test_kernels", *CALLS)),
    "lstmcore/dense": ((), ("test_losses", "test_optim", *CALLS)),
    "lstmcore/module": ((), ("test_layers", *CALLS)),
    "lstmcore/layers": ((), ("test_layers", *CALLS)),
    "lstmcore/streams": ((), ("test_recurrent", "test_precision", *CALLS)),
    "lstmcore/variants": ((), ("test_variants",)),
    "lstmcore/recurrent": ((), ("test_variants", "test_recurrent", *CALLS)),
    "lstmcore/files": ((), FILES),
    "lstmcore/formats/": ((), FILES),
    "lstmcore/models/training": ((), ("test_language_model", "test_estimators", "test_forecasting",
                                      "test_distributed")),
    "lstmcore/models/": ((), ("test_corpus", "test_language_model", "test_commands", "test_estimators",
                              "test_forecasting", "test_inspect")),
    "lstmcore/inspect": ((), ("test_inspect",)),
    "lstmcore/distributed": ((), ("test_distributed",)),
    "lstmcore/reduction": ((), ("test_distributed",)),
    "lstmcore/renames": ((), ("test_renames", "test_estimators")),
    "lstmcore/torch/": ((), ("test_torch_dropin", "test_torch_operators", "test_torch_precision")),
    "lstmcore/": ((), CALLS),
}


def noticing(file):
    """The C programs and the tests of a file, each once."""
    found = next(names for start, names in NOTICE.items() if file.startswith(start))
    return [tuple(dict.fromkeys(names)) for names in found]


class Scratch:
    """A copy of the tree in which single files are changed, built and tested."""

    def __init__(self, directory, isa):
        import numpy

        self.tree = Path(directory, "tree")
        skip = shutil.ignore_patterns(".git", "build", "*.so", "__pycache__", ".hypothesis", "dist")
        shutil.copytree(ROOT, self.tree, skip)
        self.includes = [f"-I{p}" for p in (numpy.get_include(), sysconfig.get_path("include"))]
        self.modules = sorted(p.stem for p in (self.tree / "lstmcore").glob("*.pyx"))
        self.sources = sorted(p.stem for p in (self.tree / "csrc").glob("*.c"))
        self.emulated = []
        self.took = {}      # seconds of the programs and tests that pass without a mutant
        self.broken = None  # the file whose last mutant is still built in
        for source in self.sources:
            self.compile(f"csrc/{source}.c")
        for module in self.modules:
            self.cython(module)
        if isa and isa.startswith(("avx", "amx")) and isa not in self.isas():
            self.emulated = EMULATE
            for source in self.sources:
                if source == "dispatch" or source.startswith("isa_a"):
                    self.compile(f"csrc/{source}.c")
        self.isa = isa or next(name for name in self.isas() if name in WHOLE)
        if self.isa not in self.isas():
            raise SystemExit(f"--isa must be one of {', '.join(self.isas())}, got {isa}")
        for checks in sorted((self.tree / "tests/csrc").glob("check*.c")):
            self.compile(f"tests/csrc/{checks.name}")

    def isas(self):
        self.link()
        code = "from lstmcore import _kernels as k; print(*k.available_isas())"
        return self.run(sys.executable, "-c", code).stdout.split()

    def run(self, *command, check=True):
        done = subprocess.run(command, cwd=self.tree, capture_output=True, text=True)
        if check and done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        return done

    # ---- building: False where something does not compile

    def cython(self, module, check=True):
        done = self.run(sys.executable, "-m", "cython", "-3", f"lstmcore/{module}.pyx", check=check)
        if done.returncode or not self.compile(f"lstmcore/{module}.c", check):
            return False
        if module != "_kernels":
            self.run("gcc", "-shared", f"{module}.o", "-o", f"lstmcore/{module}{SUFFIX}")
        return True

    def compile(self, source, check=True):
        if source.startswith("csrc/") or source == "lstmcore/_kernels.c":
            self.linked = False
        level = "-O0" if source.startswith("lstmcore") else "-O1"
        command = ["gcc", level, *FLAGS, "-fopenmp", *self.emulated, *self.includes, "-c", source]
        return self.run(*command, "-o", Path(source).stem + ".o", check=check).returncode == 0

    def link(self):
        """The kernels go into one module."""
        objects = [f"{stem}.o" for stem in ("_kernels", *self.sources)]
        self.run("gcc", "-shared", "-fopenmp", *objects, "-o", f"lstmcore/_kernels{SUFFIX}")
        self.linked = True

    def dependents(self, file):
        """The Cython modules that a .pyx or .pxd is part of."""
        name, known = Path(file).stem, {}
        if file.endswith(".pyx"):
            return [name]
        for source in (self.tree / "lstmcore").glob("*.p[yx][xd]"):
            used = re.findall(r"^from lstmcore\.(\w+) cimport", source.read_text(), re.MULTILINE)
            known.setdefault(source.stem, {source.stem}).update(used)
        while True:
            more = {stem: set().union(*map(known.get, uses)) for stem, uses in known.items()}
            if more == known:
                return [module for module in self.modules if name in known[module]]
            known = more

    def build(self, file):
        if file.endswith(".py"):
            return True
        if file.startswith("lstmcore/"):
            return all([self.cython(module, False) for module in self.dependents(file)])
        return self.compile(file if file.endswith(".c") else f"csrc/isa_{self.isa}.c", False)

    # ---- testing

    def program(self, name):
        """The command that builds a C program: of all kernels, or of a half of team.c's checks."""
        command = ["gcc", "-w", "-o", name]
        if name == "check":
            stems = [p.stem for p in (self.tree / "tests/csrc").glob("check*.c")]
            stems += ["dispatch", *(s for s in self.sources if s.startswith("isa_"))]
            return [*command, *(f"{stem}.o" for stem in stems), "-lm"]
        openmp = ["-fopenmp"] if name == "region" else []
        return [*command, "-O1", *FLAGS, *openmp, "tests/csrc/team.c", "csrc/team.c", "-lpthread",
                "-ldl"]

    def passes(self, limit, *command):
        """Whether a command says yes in time, and what it says."""
        environment = {**os.environ, "LSTMCORE_ISA": self.isa, "PYTHONDONTWRITEBYTECODE": "1"}
        process = subprocess.Popen(command, cwd=self.tree, text=True, env=environment,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   start_new_session=True)
        try:
            said, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return False, "no end"
        return process.returncode == 0, said

    def complaint(self, names, limit):
        """What the first C program says that fails, or pytest of all tests; None if all pass."""
        if names[0].startswith("test_"):
            if not self.linked:
                self.link()
            passed, said = self.passes(limit, sys.executable, "-m", "pytest", "-x", "-q", "-p",
                                       "no:cacheprovider", *(f"tests/{name}.py" for name in names))
            return None if passed else said
        for name in names:
            self.run(*self.program(name))
            passed, said = self.passes(limit, f"./{name}")
            if not passed:
                return said

    def limit(self, file, names):
        """Seconds that these may take with a mutant: once each has been seen to pass without."""
        for name in names:
            if name not in self.took:
                self.mend()
                start = time.perf_counter()
                said = self.complaint([name], 600)
                if said is not None:
                    raise SystemExit(f"the tests of {file} fail without any mutant:\n{said}")
                self.took[name] = time.perf_counter() - start
        return 60 + 3 * sum(self.took[name] for name in names)

    def mend(self):
        """Build what the last mutant was built into."""
        if self.broken:
            self.build(self.broken)
            self.broken = None

    def judge(self, file, text, wrong):
        """What became of a mutant: "survived" or "does not compile", or who killed it."""
        path = self.tree / file
        original = path.read_text()
        if self.broken != file:
            self.mend()
        for names in noticing(file):
            if not names:
                continue
            limit = self.limit(file, names)
            path.write_text(original.replace(text, wrong))
            try:
                self.broken = file
                if not self.build(file):
                    return "does not compile"
                said = self.complaint(names, limit)
            finally:
                path.write_text(original)
            if said is not None:
                return killer(said)
        return "survived"


def killer(said):
    """The test that failed first, or the last line that was said."""
    test = re.search(r"^(?:FAILED|ERROR) tests/(\S+?)(?:\[| |$)|^Fatal Python error: (.*)", said,
                     re.MULTILINE)
    return "killed by " + (test[1] or test[2] if test else
                           (said.strip().splitlines() or ["a crash"])[-1])


def table(fates):
    """Markdown: mutants and killed by file."""
    lines = ["| one line broken in | mutants | killed | for example |", "|---|--:|--:|---|"]
    counts = []
    for file in dict.fromkeys(file for _, file, _, _ in MUTANTS):
        names = [name for name, where, _, _ in MUTANTS if where == file and name in fates]
        if names:
            counts.append((len(names), sum(fates[name].startswith("killed") for name in names)))
            examples = "; ".join(dict.fromkeys([names[0], names[len(names) // 2], names[-1]]))
            lines.append(f"| `{file}` | {counts[-1][0]} | {counts[-1][1]} | {examples} |")
    mutants, killed = map(sum, zip(*counts)) if counts else (0, 0)
    return "\n".join([*lines, f"| together | {mutants} | {killed} | |"])


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--quick", action="store_true", help="only the few that CI runs")
    arguments.add_argument("--only", metavar="TEXT", default="",
                           help="mutants with TEXT in 'file: name', a regular expression")
    arguments.add_argument("--isa", metavar="NAME",
                           help="the instruction set of the kernels; what the CPU lacks of "
                                "AVX-512, VNNI, BF16 and AMX is emulated (default: the best here that "
                                "has every number format)")
    options = arguments.parse_args()
    chosen = [m for m in MUTANTS if re.search(options.only, f"{m[1]}: {m[0]}")
              and (m[0] in QUICK or not options.quick)]
    for name, file, text, wrong in MUTANTS:
        found = (ROOT / file).read_text().count(text)
        if found != 1 or text == wrong:
            print(f"{name}: its text is found {found} times in {file}")
            return 2
    fates = {}
    with tempfile.TemporaryDirectory(prefix="lstmcore-mutants-") as directory:
        scratch = Scratch(directory, options.isa)
        chosen = [m for m in chosen if scratch.isa in NEEDS.get(m[0], (scratch.isa,))]
        print(f"{scratch.isa}{', emulated' if scratch.emulated else ''}: {len(chosen)} mutants; "
              f"left out are {len(MUTANTS) - len(chosen)}", flush=True)
        for name, file, text, wrong in sorted(chosen, key=lambda m: m[1]):
            start = time.perf_counter()
            fates[name] = scratch.judge(file, text, wrong)
            took = time.perf_counter() - start
            print(f"{took:5.1f} s  {file}: {name}: {fates[name]}", flush=True)
    killed = sum(fate.startswith("killed") for fate in fates.values())
    print(table(fates))
    print(f"{killed} of {len(fates)} mutants killed ({scratch.isa})")
    return 0 if killed == len(fates) else 1


if __name__ == "__main__":
    sys.exit(main())
