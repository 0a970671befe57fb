"""Breaks one line at a time and sees that a test turns red:  python tests/mutants/run.py [--quick]

Copies the tree to a scratch directory, builds it there once, and for every mutant of mutants.py
changes the one line, rebuilds what depends on it (for one instruction set, without optimization
beyond -O1) and runs the tests that should notice. Prints a table of what was killed and what
survived; the exit code is 1 if anything survived, 2 if a mutant's text is not found exactly once.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from mutants import ACT, BACKWARD, DENSE, FORWARD, MUTANTS, PASS, QUICK, REF

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-O1", "-fPIC", "-ffp-contract=off", "-std=gnu11", "-fopenmp", "-Icsrc", "-w"]
PLAN = (PASS, FORWARD, BACKWARD, DENSE)
TESTS = {REF: ["test_reference.py"], ACT: ["test_activations.py", "test_kernels.py"],
         **dict.fromkeys(PLAN, ["test_kernels.py", "test_determinism.py", "test_identities.py",
                                "test_api.py", "test_losses.py"])}
C_TESTS = ["test_kernels.py", "test_activations.py", "test_determinism.py", "test_losses.py",
           "test_optim.py"]


class Scratch:
    """A copy of the tree in which single files are changed, built and tested."""

    def __init__(self, directory):
        import numpy

        self.tree = Path(directory, "tree")
        skip = shutil.ignore_patterns(".git", "build", "*.so", "__pycache__", ".hypothesis", "dist")
        shutil.copytree(ROOT, self.tree, skip)
        self.includes = [f"-I{p}" for p in (numpy.get_include(), sysconfig.get_path("include"))]
        self.sources = sorted(p.name for p in (self.tree / "csrc").glob("*.c"))
        for module in "_kernels", "_blas":
            self.cython(module)
        for source in self.sources:
            self.compile(f"csrc/{source}")
        self.link("_kernels", self.sources)
        self.link("_blas", [])
        self.isa = self.python("-c", "from lstmcore import _kernels as k; print(k.available_isas()[0])",
                               check=True).stdout.strip()

    def run(self, *command, check=True):
        done = subprocess.run(command, cwd=self.tree, capture_output=True, text=True)
        if check and done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        return done

    def cython(self, module, check=True):
        done = self.run(sys.executable, "-m", "cython", "-3", f"lstmcore/{module}.pyx", check=check)
        return done.returncode == 0 and self.compile(f"lstmcore/{module}.c", check)

    def compile(self, source, check=True):
        return self.run("gcc", *FLAGS, *self.includes, "-c", source, "-o", self.object(source),
                        check=check).returncode == 0

    @staticmethod
    def object(source):
        return Path(source).stem + ".o"

    def link(self, module, sources):
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        self.run("gcc", "-shared", "-fopenmp", f"{module}.o", *map(self.object, sources),
                 "-o", f"lstmcore/{module}{suffix}")

    def python(self, *arguments, check=False, **environment):
        try:
            done = subprocess.run([sys.executable, *arguments], cwd=self.tree, text=True, timeout=600,
                                  capture_output=True, env={**os.environ, **environment})
        except subprocess.TimeoutExpired as late:
            return subprocess.CompletedProcess(late.cmd, 1, "timeout", "")
        if check and done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        return done

    def build(self, file):
        """Rebuild what depends on a file; False if it does not compile."""
        if file == REF:
            return True
        built = self.cython("_kernels", False) if file in PLAN else self.compile(
            f"csrc/isa_{self.isa}.c", False)
        if built:
            self.link("_kernels", self.sources)
        return built

    def tests_pass(self, file):
        tests = [f"tests/{name}" for name in TESTS.get(file, C_TESTS)]
        done = self.python("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests,
                           LSTMCORE_ISA=self.isa)
        return done.returncode == 0, done.stdout

    def judge(self, file, text, wrong):
        """What became of a mutant: "killed", "survived" or "does not compile"."""
        path = self.tree / file
        original = path.read_text()
        path.write_text(original.replace(text, wrong))
        try:
            if not self.build(file):
                return "does not compile"
            return "survived" if self.tests_pass(file)[0] else "killed"
        finally:
            path.write_text(original)


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--quick", action="store_true", help="only the few that CI runs")
    arguments.add_argument("--only", metavar="TEXT", default="", help="mutants whose name has TEXT")
    options = arguments.parse_args()
    chosen = [m for m in MUTANTS if options.only in m[0] and (m[0] in QUICK or not options.quick)]
    for name, file, text, _ in MUTANTS:
        found = (ROOT / file).read_text().count(text)
        if found != 1:
            print(f"{name}: its text is found {found} times in {file}")
            return 2
    fates = {}
    with tempfile.TemporaryDirectory(prefix="lstmcore-mutants-") as directory:
        scratch = Scratch(directory)
        for file in sorted({m[1] for m in chosen}):
            passed, said = scratch.tests_pass(file)
            if not passed:
                print(f"the tests of {file} fail without any mutant:\n{said}")
                return 2
        previous = None
        for name, file, text, wrong in sorted(chosen, key=lambda m: m[1]):
            if previous not in (None, file):
                scratch.build(previous)  # without its last mutant
            previous, start = file, time.perf_counter()
            fates[name] = scratch.judge(file, text, wrong)
            print(f"{fates[name]:<18}{time.perf_counter() - start:5.1f} s  {file}: {name}", flush=True)
    killed = sum(fate == "killed" for fate in fates.values())
    print(f"{killed} of {len(fates)} mutants killed ({scratch.isa})")
    return 0 if killed == len(fates) else 1


if __name__ == "__main__":
    sys.exit(main())
