"""lstmcore: the LSTM on CPU. Every public name is loaded when it is first used."""

import importlib
import importlib.util
import os

__version__ = "0.1.0"

if os.path.exists(os.path.join(os.path.dirname(__path__[0]), "csrc", "lstm.h")):
    from lstmcore import _source_tree
    _source_tree.settle(__path__, __version__)

# Not lazy: importing the module `threads` later would put it in place of the context manager.
from lstmcore.threads import get_num_threads, set_num_threads, threads

_HOME = {  # module: the public names that live there
    "functional": "lstm_forward lstm_backward rnn_forward rnn_backward info",
    "layers": "LSTM RNN Stack Embedding Linear Dropout Tanh Sigmoid ReLU Sequential LastStep "
              "MeanOverTime MaxOverTime sequence_mask Module",
    "losses": "softmax_cross_entropy mse_loss bce_with_logits",
    "optim": "clip_grad_norm clip_grad_value",
    "models": "LanguageModel LSTMClassifier LSTMRegressor Forecaster",
    "files": "load save convert",
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names.split()}
_MODULES = ("reference", "functional", "layers", "losses", "optim", "models", "formats", "files",
            "gradflow", "inspect")
_EXTRAS = {"LSTMClassifier": "sklearn", "LSTMRegressor": "sklearn", "Forecaster": "sklearn",
           "torch": "torch"}     # public names that only exist beside another library


def __getattr__(name):
    if name == "__all__":
        return ["__version__", "get_num_threads", "set_num_threads", "threads", "optim", "reference",
                *filter(_is_there, _MODULE_OF)]
    if name in _MODULE_OF:
        module = importlib.import_module("lstmcore." + _MODULE_OF[name])
        value = globals()[name] = getattr(module, name)
        return value
    if name in _MODULES or name in _EXTRAS:
        return importlib.import_module("lstmcore." + name)
    raise AttributeError(f"module 'lstmcore' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *filter(_is_there, (*_MODULE_OF, *_MODULES, *_EXTRAS))})


def _is_there(name):
    return name not in _EXTRAS or importlib.util.find_spec(_EXTRAS[name]) is not None
