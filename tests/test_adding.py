"""docs/adding.md: its examples, taken from the page, applied to a copy of csrc, compiled and run."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "adding.md"
FLAGS = ["-std=gnu11", "-O0", "-ffp-contract=off", "-Wall", "-Wno-psabi", "-Werror", "-Icsrc"]
SKIPPED = 77                       # the exit code of an example that cannot run on this CPU

pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="the examples are compiled by gcc"),
    pytest.mark.skipif(not PAGE.exists() or not (ROOT / "csrc").is_dir(),
                       reason="these tests lie apart from docs and csrc")]


def patched(text, hunks):
    """text with every hunk of a diff without line numbers; what it takes out stands there once."""
    for hunk in hunks.split("\n@@\n"):
        lines = hunk.split("\n")
        old, new = ("\n".join(line[1:] for line in lines if line[:1] in marks)
                    for marks in (" -", " +"))
        assert text.count(old) == 1, f"not found once:\n{old}"
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """A folder with a program for each example, all applied to one copy of csrc."""
    scratch = tmp_path_factory.mktemp("adding")
    shutil.copytree(ROOT / "csrc", scratch / "csrc")
    programs = []
    for info, body in re.findall(r"^```([^\n]+)\n(.*?)\n```$", PAGE.read_text("utf-8"), re.M | re.S):
        language, _, name = info.partition(" ")
        if language == "diff":
            first, _, hunks = body.partition("\n")
            file = scratch / first.removeprefix("+++ ")
            file.write_text(patched(file.read_text("utf-8"), hunks), "utf-8")
        elif name:
            (scratch / name).write_text(body + "\n", "utf-8")
            programs += [name] if "/" not in name else []
    sources = sorted(p.name for p in (scratch / "csrc").glob("isa_*.c")) + ["dispatch.c"]

    def gcc(*arguments):
        done = subprocess.run(["gcc", *FLAGS, *arguments], cwd=scratch, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda name: gcc("-c", f"csrc/{name}", "-o", name + ".o"), sources))
    for name in programs:
        gcc(name, *(source + ".o" for source in sources), "-lm", "-o", Path(name).stem)
    return scratch


@pytest.mark.parametrize("program", ["mgu", "float19", "avx"])
def test_an_example_runs(program, examples):
    done = subprocess.run([examples / program], capture_output=True, text=True)
    if done.returncode == SKIPPED:
        pytest.skip(done.stdout.strip().removeprefix("skipped: "))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n") >= 1
