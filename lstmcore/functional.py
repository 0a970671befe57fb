"""Placeholder until the kernels land: the reference under the public names."""

from lstmcore.reference import (Gradients, RNNGradients, lstm_backward, lstm_forward,  # noqa: F401
                                rnn_backward, rnn_forward)
