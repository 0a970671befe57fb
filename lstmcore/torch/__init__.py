"""The LSTM inside PyTorch: a drop-in for `torch.nn.LSTM` on lstmcore's CPU kernels.

    LSTM         a subclass of torch.nn.LSTM: same constructor, state_dict, inputs and outputs
    accelerate   turn every torch.nn.LSTM of a model into one, in place
    restore      turn them into torch.nn.LSTM again

The package knows `lstmcore.functional` and PyTorch, nothing of the kernels. CPU only; float32,
float64 and bfloat16, also under autocast.
"""

from lstmcore.torch.dynamo import open_to
from lstmcore.torch.module import LSTM
from lstmcore.torch.operators import lstm, lstm_backward
from lstmcore.torch.replacing import Report, accelerate, restore

__all__ = ["LSTM", "Report", "accelerate", "restore"]

LSTM.__module__ = __name__  # where pickles look for it
open_to(LSTM)
