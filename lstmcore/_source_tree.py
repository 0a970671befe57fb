"""lstmcore imported from a source tree, which may not be built.

Inside a clone Python finds the folder lstmcore before the installed package. If that folder has no
compiled modules for this Python, the installed package takes its place, as if the clone were not on
the path. If it has some (an editable install), they are used, with a warning once they are older
than their sources.
"""

import importlib.util
import os
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder


def settle(path, version):
    """For the package being imported, its __path__ and version: hand over, warn, or neither."""
    if PathFinder.find_spec("lstmcore._kernels", path) is None:
        _hand_over(path, version)
    else:
        _warn_if_outdated(path[0])


def _hand_over(path, version):
    """Put the installed lstmcore into sys.modules, and its folder into `path`."""
    tree, spec = os.path.dirname(os.path.abspath(path[0])), _installed()
    ways = f"run `pip install .` in {tree}, or leave that folder"
    if spec is None:
        raise ImportError(f"lstmcore in {tree} is a source tree that is not built for this Python, "
                          f"and none is installed: {ways}")
    path[:] = spec.submodule_search_locations    # it imports its own modules while it is loaded
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.__version__ != version:
        raise ImportError(f"lstmcore {version} in {tree} is a source tree that is not built for "
                          f"this Python, and the installed one, in {os.path.dirname(path[0])}, is "
                          f"{module.__version__}: {ways}")
    sys.modules["lstmcore"] = module


def _installed():
    """The spec of the first lstmcore on sys.path that is built for this Python, or None."""
    for entry in sys.path:
        spec = PathFinder.find_spec("lstmcore", [entry])
        folders = spec and spec.submodule_search_locations
        if folders and PathFinder.find_spec("lstmcore._kernels", folders):
            return spec


def _warn_if_outdated(folder):
    csrc = os.path.join(os.path.dirname(folder), "csrc")
    source = _newest(_files(folder, ".pyx", ".pxd", ".pxi") + _files(csrc, ".c", ".h"))
    # A change rebuilds only what depends on it, so the newest of each are compared.
    if os.path.getmtime(source) > os.path.getmtime(_newest(_files(folder, *EXTENSION_SUFFIXES))):
        warnings.warn(f"lstmcore in {os.path.dirname(folder)} was built before its source "
                      f"{os.path.basename(source)} changed: run `pip install -e .` there",
                      RuntimeWarning, stacklevel=3)


def _files(folder, *endings):
    return [os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(endings)]


def _newest(names):
    return max(names, key=os.path.getmtime)
