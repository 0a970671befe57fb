"""Inside a source tree that is not built, the installed lstmcore runs, or one line says why not."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES

import pytest

import lstmcore

COMPILED = tuple(EXTENSION_SUFFIXES)


@pytest.fixture
def site(tmp_path):
    """A folder with the lstmcore of this run and nothing else, as if installed there."""
    shutil.copytree(lstmcore.__path__[0], tmp_path / "site" / "lstmcore",
                    ignore=shutil.ignore_patterns("__pycache__", "*.c"))
    return tmp_path / "site"


@pytest.fixture
def tree(tmp_path, site):
    """A source tree without compiled modules."""
    shutil.copytree(site / "lstmcore", tmp_path / "tree" / "lstmcore",
                    ignore=lambda _, names: [name for name in names if name.endswith(COMPILED)])
    (tmp_path / "tree" / "lstmcore" / "_kernels.pyx").touch()
    (tmp_path / "tree" / "csrc").mkdir()
    (tmp_path / "tree" / "csrc" / "lstm.h").touch()
    return tmp_path / "tree"


def build(site, tree):
    for path in (site / "lstmcore").iterdir():
        if path.name.endswith(COMPILED):
            shutil.copyfile(path, tree / "lstmcore" / path.name)


def python(*arguments, cwd, path=()):
    """A new process's exit code and what it said; `path` comes before the site-packages."""
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))})
    return done.returncode, (done.stdout + done.stderr).strip()


WHERE = """
import sys, lstmcore
lstmcore.LSTM(2, 3)(lstmcore.reference.np.ones((4, 1, 2), "f4"))
print(*sorted({m.__file__.rpartition("lstmcore")[0] for name, m in sys.modules.items()
               if name.startswith("lstmcore") and name != "lstmcore._source_tree"}))
"""


def test_every_module_is_the_installed_one(tree, site, tmp_path):
    for cwd, path in ((tree, [site]), (tmp_path, [tree, site])):
        assert python("-c", WHERE, cwd=cwd, path=path) == (0, f"{site}{os.sep}")


def test_module_that_only_the_tree_has_is_not_there(tree, site):
    (tree / "lstmcore" / "unfinished.py").touch()
    code, said = python("-c", "import lstmcore.unfinished", cwd=tree, path=[site])
    assert code and "No module named 'lstmcore.unfinished'" in said


def test_command_runs(tree, site):
    assert python("-m", "lstmcore", "--version", cwd=tree, path=[site]) == python(
        "-m", "lstmcore", "--version", cwd=site)


def test_spawned_processes_and_pickles(tree, site):
    (tree / "script.py").write_text("""
import multiprocessing, pickle
import lstmcore

def where(m):
    return lstmcore.__file__, type(m) is lstmcore.LSTM

if __name__ == "__main__":
    m = lstmcore.LSTM(2, 3)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(where, (m,)) == (lstmcore.__file__, True)
    assert where(pickle.loads(pickle.dumps(m)))[1]
    print(lstmcore.__file__)
""")
    assert python("script.py", cwd=tree, path=[site]) == (
        0, str(site / "lstmcore" / "__init__.py"))


def test_nothing_installed_is_said_in_one_line(tree):
    code, said = python("-S", "-c", "import lstmcore", cwd=tree)
    assert code and said.splitlines()[-1] == (
        f"ImportError: lstmcore in {tree} is a source tree that is not built for this Python, and "
        f"none is installed: run `pip install .` in {tree}, or leave that folder")


def test_another_source_tree_that_is_not_built_does_not_count(tree, tmp_path):
    shutil.copytree(tree, tmp_path / "other")
    code, said = python("-S", "-c", "import lstmcore", cwd=tree, path=[tmp_path / "other"])
    assert code and "none is installed" in said.splitlines()[-1]


def test_another_version_is_refused(tree, site):
    init = tree / "lstmcore" / "__init__.py"
    init.write_text(init.read_text().replace(f'"{lstmcore.__version__}"', '"99.1"'))
    code, said = python("-c", "import lstmcore", cwd=tree, path=[site])
    assert code and f"lstmcore 99.1 in {tree} is a source tree that is not built" in said
    assert f"the installed one, in {site}, is {lstmcore.__version__}: run `pip install .`" in said


def test_modules_compiled_for_another_python_do_not_count(tree, site):
    for ending in (".cpython-27m-x86_64-linux-gnu.so", ".cp27-win_amd64.pyd"):
        (tree / "lstmcore" / ("_kernels" + ending)).touch()
    assert python("-c", WHERE, cwd=tree, path=[site]) == (0, f"{site}{os.sep}")


def test_a_built_tree_runs_itself_until_its_sources_are_newer(tree, site):
    build(site, tree)
    ours = f"{tree}{os.sep}"
    assert python("-W", "error", "-c", WHERE, cwd=tree, path=[site]) == (0, ours)
    os.utime(tree / "csrc" / "lstm.h", (2e9, 2e9))
    code, said = python("-c", WHERE, cwd=tree, path=[site])
    assert code == 0 and said.splitlines()[0] == ours
    assert f"RuntimeWarning: lstmcore in {tree} was built before its source lstm.h changed" in said


def test_outside_a_source_tree_nothing_is_looked_for(site, tmp_path):
    code = "import sys, lstmcore; print('lstmcore._source_tree' in sys.modules, lstmcore.__file__)"
    assert python("-c", code, cwd=tmp_path, path=[site]) == (
        0, f"False {site / 'lstmcore' / '__init__.py'}")


def test_what_needs_no_kernels_runs_from_a_zip_file(site, tmp_path):
    with zipfile.ZipFile(tmp_path / "lstmcore.zip", "w") as file:
        for path in site.rglob("*.py*"):
            file.write(path, path.relative_to(site))
    code = ("import lstmcore, numpy as np; a = np.ones((2, 1, 1)); w = np.ones((4, 1))\n"
            "lstmcore.reference.lstm_forward(a, w, w, np.ones(4), a[0], a[0]); print(lstmcore.__file__)")
    code, said = python("-c", code, cwd=tmp_path, path=[tmp_path / "lstmcore.zip"])
    assert code == 0 and "lstmcore.zip" in said
