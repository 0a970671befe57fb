"""Every example in a docstring and in the README runs as printed."""

import doctest
import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest

import lstmcore

README = Path(__file__).parents[1] / "README.md"
NEEDS = {"lstmcore.torch": "torch", "lstmcore.models.estimators": "sklearn",
         "lstmcore.models.forecasting": "sklearn", "lstmcore.gradflow": "matplotlib",
         "lstmcore.inspect": "matplotlib", "lstmcore.formats.keras": "h5py",
         "lstmcore.formats.hdf5": "h5py", "lstmcore.formats.onnx": "onnx",
         "lstmcore.formats.onnx_export": "onnx", "lstmcore.formats.onnx_graph": "onnx",
         "lstmcore.formats.onnx_operators": "onnx"}
MODULES = sorted(m.name for m in pkgutil.walk_packages(lstmcore.__path__, "lstmcore.")
                 if not m.name.endswith("__main__"))


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name, tmp_path, monkeypatch):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS).failed == 0


README_NEEDS = {"Classify and predict": "sklearn", "Forecast": "sklearn", "Look inside": "matplotlib",
                "See the gradient vanish": "matplotlib", "Files, without": "h5py onnx torch"}


def test_readme_examples_run(tmp_path, monkeypatch):
    """Section by section, each with the names of those before it, but for those that need an extra."""
    if not README.exists():
        pytest.skip("the tests of an installed wheel may lie without the README")
    monkeypatch.chdir(tmp_path)
    names, runner = {}, doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for section in re.split("^##+ ", README.read_text(encoding="utf-8"), flags=re.MULTILINE):
        title = section.partition("\n")[0]
        needs = " ".join(n for start, n in README_NEEDS.items() if title.startswith(start)).split()
        if all(map(importlib.util.find_spec, needs)):
            test = doctest.DocTestParser().get_doctest(section, names, title, str(README), 0)
            runner.run(test, clear_globs=False)
            names.update(test.globs)
    assert runner.tries > 50 and runner.failures == 0
