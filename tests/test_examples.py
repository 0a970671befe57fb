"""Every example in a docstring and in the README runs as printed."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import lstmcore

README = Path(__file__).parents[1] / "README.md"
NEEDS = {"lstmcore.torch": "torch", "lstmcore.models.estimators": "sklearn",
         "lstmcore.models.forecasting": "sklearn", "lstmcore.gradflow": "matplotlib",
         "lstmcore.inspect": "matplotlib", "lstmcore.formats.keras": "h5py",
         "lstmcore.formats.hdf5": "h5py", "lstmcore.formats.onnx": "onnx",
         "lstmcore.formats.onnx_export": "onnx"}
MODULES = sorted(m.name for m in pkgutil.walk_packages(lstmcore.__path__, "lstmcore.")
                 if not m.name.endswith("__main__"))


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name, tmp_path, monkeypatch):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS).failed == 0


def test_readme_examples_run(tmp_path, monkeypatch):
    for name in set(NEEDS.values()):
        pytest.importorskip(name)
    if not README.exists():
        pytest.skip("the tests of an installed wheel may lie without the README")
    monkeypatch.chdir(tmp_path)
    assert doctest.testfile(str(README), module_relative=False,
                            optionflags=doctest.ELLIPSIS).failed == 0
