"""lstmcore: the LSTM on CPU. Every public name is loaded when it is first used.

Where each lives stands in __init__.pyi alone, which type checkers and editors read too.
"""

import importlib
import importlib.util
import os
import sys

__version__ = "0.1.0"

if os.path.exists(os.path.join(os.path.dirname(__path__[0]), "csrc", "lstm.h")):
    from lstmcore import _source_tree
    _source_tree.settle(__path__, __version__)

# Not lazy: importing the module `threads` later would put it in place of the context manager.
from lstmcore.threads import get_num_threads, set_num_threads, threads

_EXTRAS = {"LSTMClassifier": "sklearn", "LSTMRegressor": "sklearn", "Forecaster": "sklearn",
           "torch": "torch"}     # public names that only exist beside another library


def _homes():
    """Public name -> module, from the lines `from MODULE import NAME as NAME` of the stub."""
    path = os.path.join(os.path.dirname(__file__), "__init__.pyi")
    try:
        stub = __spec__.loader.get_data(path)       # from a zip file too
    except OSError:
        raise ImportError(f"{path} is missing: whoever copies or freezes lstmcore must take along "
                          "its data, where the public names are listed") from None
    lines = [line.split() for line in stub.decode().splitlines()]
    return {words[3]: words[1] for words in lines if words[:1] == ["from"]}


_HOME = _homes()


def __getattr__(name):
    if name == "__all__":
        return ["__version__", *(name for name in filter(_is_there, _HOME)
                                 if _HOME[name] != "lstmcore" or name in ("optim", "reference"))]
    if name not in _HOME:
        raise AttributeError(f"module 'lstmcore' has no attribute {name!r}")
    if _HOME[name] == "lstmcore":
        return importlib.import_module("lstmcore." + name)
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__():
    return sorted({*globals(), *filter(_is_there, _HOME)})


def _is_there(name):
    if name == "keras":     # whose import fails where the backend that it is set to is missing
        return "keras" in sys.modules
    return name not in _EXTRAS or importlib.util.find_spec(_EXTRAS[name]) is not None


def _for_freezers():
    """Never called: a freezer takes along what import statements name, and sees no others."""
    import scipy.linalg.cython_blas

    from lstmcore import (_blas, _grid, distributed, files, functional, gradflow, inspect, layers,
                          losses, optim, reference)
    from lstmcore.formats import keras, onnx, onnx_export, pytorch
    from lstmcore.models import card, curves, language    # the others want scikit-learn


def _hook_dirs():
    """Where PyInstaller finds hook-lstmcore.py."""
    return list(__path__)
