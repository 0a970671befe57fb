"""torch.compile refuses torch.nn's recurrent layers unless config.allow_rnn is set; ours it may trace.

The setting would change what becomes of torch.nn's too, so it holds for our modules only.
Importing torch._dynamo takes a second, so this waits until something else does it.
"""

import importlib.util
import sys

_BUILDER = "torch._dynamo.variables.builder"


def open_to(classes: tuple[type, ...]) -> None:
    """Let torch.compile trace modules of these, now or when dynamo is first imported."""
    if _BUILDER in sys.modules:
        _patch(sys.modules[_BUILDER], classes)
    else:
        sys.meta_path.insert(0, _OnImport(classes))


class _OnImport:
    """The finder that finds _BUILDER as everybody does, and patches it once it is executed."""

    def __init__(self, classes):
        self.classes = classes

    def find_spec(self, name, path=None, target=None):
        if name != _BUILDER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            _patch(module, self.classes)

        spec.loader.exec_module = exec_module
        return spec


def _patch(builder, classes):
    wrap = builder.VariableBuilder.wrap_module

    def wrap_module(self, value):
        if not isinstance(value, classes):
            return wrap(self, value)
        with builder.config.patch(allow_rnn=True):
            return wrap(self, value)

    builder.VariableBuilder.wrap_module = wrap_module
