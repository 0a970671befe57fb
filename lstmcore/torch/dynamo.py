"""torch.compile refuses any torch.nn.LSTM unless config.allow_rnn is set; ours it may trace.

The setting would change what becomes of torch.nn.LSTM too, so it holds for our modules only.
Importing torch._dynamo takes a second, so this waits until something else does it.
"""

import importlib.util
import sys

_BUILDER = "torch._dynamo.variables.builder"


def open_to(cls: type) -> None:
    """Let torch.compile trace the modules of a class, now or when dynamo is first imported."""
    if _BUILDER in sys.modules:
        _patch(sys.modules[_BUILDER], cls)
    else:
        sys.meta_path.insert(0, _OnImport(cls))


class _OnImport:
    """The finder that finds _BUILDER as everybody does, and patches it once it is executed."""

    def __init__(self, cls):
        self.cls = cls

    def find_spec(self, name, path=None, target=None):
        if name != _BUILDER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            _patch(module, self.cls)

        spec.loader.exec_module = exec_module
        return spec


def _patch(builder, cls):
    wrap = builder.VariableBuilder.wrap_module

    def wrap_module(self, value):
        if not isinstance(value, cls):
            return wrap(self, value)
        with builder.config.patch(allow_rnn=True):
            return wrap(self, value)

    builder.VariableBuilder.wrap_module = wrap_module
