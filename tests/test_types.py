"""What editors, type checkers and freezers see: every public name, annotated, in one stub."""

import importlib.util
import inspect
import re
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import client
import numpy as np
import pytest

import lstmcore

HERE = Path(__file__).parent


@pytest.fixture
def site(tmp_path):
    """A folder with the lstmcore of this run and nothing else, as if installed there."""
    shutil.copytree(lstmcore.__path__[0], tmp_path / "site" / "lstmcore",
                    ignore=shutil.ignore_patterns("__pycache__", "*.c"))
    return tmp_path / "site"


def run(*command, cwd, path="", **env):
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(path), **env})
    return done.returncode, (done.stdout + done.stderr).strip()


def needs(module):
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"needs {module}")


# ---- the stub ------------------------------------------------------------------------------------

def test_stub_names_what_there_is():
    for name, home in lstmcore._HOME.items():
        if name in dir(lstmcore):
            found = getattr(lstmcore, name)
            there = importlib.import_module(f"lstmcore.{name}" if home == "lstmcore" else home)
            assert found is (there if home == "lstmcore" else getattr(there, name))


def test_a_stub_that_is_missing_is_named(site, tmp_path):
    (site / "lstmcore" / "__init__.pyi").unlink()
    code, said = run(sys.executable, "-c", "import lstmcore", cwd=tmp_path, path=site)
    assert code and said.splitlines()[-1].startswith("ImportError: " + str(site))
    assert "must take along its data" in said


# ---- annotations ---------------------------------------------------------------------------------

def public_callables():
    """(name, function) of the modules that the stub names, and of their classes."""
    modules = {importlib.import_module(f"lstmcore.{name}" if home == "lstmcore" else home)
               for name, home in lstmcore._HOME.items() if name in dir(lstmcore)}
    for module in sorted(modules, key=lambda module: module.__name__):
        if module.__name__.startswith("lstmcore.formats"):
            continue
        for name, value in vars(module).items():
            if name.startswith("_") or not getattr(value, "__module__", "").startswith("lstmcore"):
                continue
            if isinstance(value, types.FunctionType):
                yield f"{module.__name__}.{name}", value
            elif isinstance(value, type) and not issubclass(value, tuple):
                for method, member in vars(value).items():
                    member = getattr(member, "__func__", getattr(member, "fget", member))
                    if isinstance(member, types.FunctionType) and (
                            not method.startswith("_") or method in ("__init__", "__call__")):
                        yield f"{value.__module__}.{value.__qualname__}.{method}", member


def test_every_public_callable_is_annotated():
    found = dict(public_callables())
    assert {"lstmcore.functional.lstm_forward", "lstmcore.recurrent.LSTM.__init__"} <= found.keys()
    bare = []
    for name, function in found.items():
        if re.match(r"lstmcore\.(torch\.(LSTM|GRU|RNN)(Cell)?|keras\.LSTM)\.", name):
            continue            # PyTorch's and Keras's own signatures
        signature = inspect.signature(function)
        bare += [f"{name}({p.name})" for p in signature.parameters.values()
                 if p.annotation is p.empty and p.name != "self" and p.name != "cls"]
        bare += [name] * (signature.return_annotation is signature.empty)
    assert bare == []


def test_client_runs(tmp_path):
    assert client.train()["head.weight"] == (2, 8)
    assert client.functions() == (16, 4)
    assert client.streams() == 5 + 1 + 1 + 4 + 1
    assert len(client.write(tmp_path / "m.safetensors")) == 2


MISTAKES = {    # a wrong line: what mypy says of it
    "lstmcore.LSTM(3, '5')": "arg-type",
    "lstmcore.LSTM(3, 5).streams()": "attr-defined",
    "lstmcore.RNN(3, 5, nonlinearity='sigmoid')": "arg-type",
    "lstmcore.lstm_backwards": "attr-defined",
    "n: str = lstmcore.get_num_threads()": "assignment"}


@needs("mypy")
def test_mypy_strict_passes_the_client_and_sees_mistakes(site, tmp_path):
    (tmp_path / "wrong.py").write_text("\n".join(["import lstmcore", *MISTAKES]))
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = true\n[mypy-lstmcore.*]\n"
                                       "follow_imports = silent\nignore_errors = true\n")
    code, said = run(sys.executable, "-m", "mypy", "--cache-dir", tmp_path / "cache",
                     "--config-file", tmp_path / "mypy.ini", HERE / "client.py", "wrong.py", cwd=tmp_path,
                     MYPYPATH=str(site))
    errors = [line for line in said.splitlines() if ": error:" in line]
    assert code == 1 and len(errors) == len(MISTAKES), said
    for line, (error, kind) in enumerate(zip(errors, MISTAKES.values()), start=2):
        assert error.startswith(f"wrong.py:{line}:") and error.endswith(f"[{kind}]")


@needs("pyright")
def test_client_passes_pyright(site, tmp_path):
    shutil.copy(HERE / "client.py", tmp_path)
    code, said = run(sys.executable, "-m", "pyright", "client.py", cwd=tmp_path, path=site)
    assert code == 0, said


@needs("jedi")
def test_jedi_completes(site):
    import jedi

    project = jedi.Project(site, added_sys_path=[str(site)])
    for code, expected in (
            ("import lstmcore\nlstmcore.", {"LSTM", "lstm_forward", "LanguageModel", "optim"}),
            ("import lstmcore\nlstmcore.LSTM.", {"freeze", "stream", "trace", "backward"}),
            ("import lstmcore\nlstmcore.LSTM(2, 3).stream().", {"step", "state", "reset"})):
        completed = {c.name for c in jedi.Script(code, project=project).complete()}
        assert expected <= completed


# ---- freezers ------------------------------------------------------------------------------------

APP = """
import sys
import numpy as np
import lstmcore
y, _ = lstmcore.LSTM(2, 3, seed=0)(np.ones((4, 1, 2), "f4"))
loss, d = lstmcore.mse_loss(y, np.zeros_like(y))
model = lstmcore.LanguageModel(hidden_size=4, num_layers=1)
model.fit("ab" * 40, steps=1, seq_length=8, batch_size=2, progress=False)
print("done", y.shape, len(lstmcore.__all__) > 20)
"""


def test_import_statements_name_all_modules(site, tmp_path):
    """As the freezers that read bytecode find them; what is named must be there."""
    (tmp_path / "app.py").write_text("import lstmcore\n")
    finder = f"""
import modulefinder, sysconfig
finder = modulefinder.ModuleFinder(path=[{str(site)!r}, sysconfig.get_path("stdlib")])
finder.run_script("app.py")
print(*sorted(name for name in finder.modules if name.startswith("lstmcore")))
print(*sorted(name for name in finder.badmodules if name.startswith("lstmcore.")
              and not name.endswith(("__version__", "LanguageModel"))))      # no modules
"""
    code, said = run(sys.executable, "-S", "-c", finder, cwd=tmp_path)
    assert code == 0, said
    found, bad = (said + "\n").split("\n")[:2]
    package = site / "lstmcore"
    optional = {f"lstmcore.{name}" for name in (
        "hook-lstmcore", "__main__", "cli", "models.estimators", "models.forecasting",
        "models.sequences", "models.series", "models.supervised", "keras")}     # the commands come with cli
    there = {".".join(path.relative_to(site).with_suffix("").parts).removesuffix(".__init__")
             for path in package.rglob("*.py")
             if not {"torch", "commands"} & {*path.relative_to(package).parts}}
    assert there - optional <= set(found.split())
    assert {"lstmcore._blas", "lstmcore._grid", "lstmcore._kernels"} <= set(found.split())
    assert bad == ""


@needs("PyInstaller")
def test_pyinstaller_without_docstrings(tmp_path):
    (tmp_path / "app.py").write_text(APP)
    others = ("matplotlib torch pandas sklearn onnx h5py keras IPython PIL setuptools "
              "pkg_resources").split()
    excluded = [part for name in others for part in ("--exclude-module", name)]
    hooks = ["--additional-hooks-dir", lstmcore.__path__[0], "--paths",
             os.path.dirname(lstmcore.__path__[0])]       # an editable install is hidden from it
    code, said = run(sys.executable, "-m", "PyInstaller", "--log-level", "ERROR", "--optimize", 2,
                     *excluded, *hooks, "app.py", cwd=tmp_path)
    assert code == 0, said
    assert run(tmp_path / "dist" / "app" / "app", cwd=tmp_path) == (0, "done (4, 1, 3) True")


@pytest.mark.parametrize("flag", ["-O", "-OO"])
def test_without_asserts_and_docstrings(site, tmp_path, flag):
    names = """
for name in {*lstmcore.__all__, *dir(lstmcore)} - {"keras", "torch"}:    # a minute without caches
    getattr(lstmcore, name)
"""
    code, said = run(sys.executable, "-W", "ignore", flag, "-c", APP + names, cwd=tmp_path,
                     path=site)
    assert (code, said) == (0, "done (4, 1, 3) True")


def test_a_copied_folder_is_an_install(tmp_path, site):
    """As zip applications unpack it: no metadata, another place, unwritable, no caches."""
    code, said = run(sys.executable, "-B", "-c", APP, cwd=tmp_path, path=site)
    assert (code, said) == (0, "done (4, 1, 3) True")


def test_annotations_resolve_at_run_time():
    import typing

    hints = typing.get_type_hints(lstmcore.lstm_forward)
    assert hints["reverse"] is bool and "return" in hints
    assert typing.get_type_hints(lstmcore.LSTM.__init__)["seed"] == int | np.random.Generator | None
