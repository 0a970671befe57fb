"""Recurrent layers inside PyTorch: drop-ins for torch.nn's on lstmcore's CPU kernels.

    LSTM, GRU, RNN                  subclasses of torch.nn's classes of these names: same
    LSTMCell, GRUCell, RNNCell      constructors, state_dicts, inputs and outputs
    accelerate   turn every such module of a model into one of these, in place
    restore      turn them into torch.nn's again

The package knows `lstmcore.functional` and PyTorch, nothing of the kernels. CPU only; float32,
float64 and bfloat16, also under autocast.
"""

from lstmcore.torch.cells import GRUCell, LSTMCell, RNNCell
from lstmcore.torch.dynamo import open_to
from lstmcore.torch.layers import GRU, LSTM, RNN
from lstmcore.torch.replacing import Report, accelerate, restore

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell", "Report", "accelerate",
           "restore"]

for _class in (LSTM, GRU, RNN, LSTMCell, GRUCell, RNNCell):
    _class.__module__ = __name__  # where pickles look for it
open_to((LSTM, GRU, RNN))
