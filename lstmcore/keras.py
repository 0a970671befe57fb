"""The LSTM inside Keras 3: a layer on lstmcore's CPU kernels, for Keras's backends torch and numpy.

    LSTM         a subclass of keras.layers.LSTM: same arguments, weights, outputs and files
    accelerate   turn every keras.layers.LSTM of a model into one, in place
    restore      turn them into keras.layers.LSTM again

It stands on what Keras documents or names without an underscore: `RNN.inner_loop` is the loop over
the steps, which every backend may compute in its own way. What the kernels lack (see `LSTM`) runs
in Keras's own loop.
"""

import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from lstmcore import functional

_BACKENDS = "torch", "numpy"


@keras.saving.register_keras_serializable("lstmcore")
class LSTM(keras.layers.LSTM):
    """`keras.layers.LSTM` on lstmcore's kernels: x (B, T, I) -> (B, H), or (B, T, H).

    Arguments, weights, states, masks, `get_config` and files are those of `keras.layers.LSTM`; a
    file of the one loads into the other by its weights. With Keras's backend torch it is trained
    like any layer; with numpy, which has no gradients, it predicts. float32, float64 and bfloat16.

    The kernels compute activation "tanh" with recurrent_activation "sigmoid", without
    recurrent_dropout in training, on the CPU, two steps or more, and masks that hide the ends of
    sequences alone. The rest is computed by Keras's own loop over the steps, as slowly as there.

    Raises
    ------
    RuntimeError
        if Keras runs on another backend: set KERAS_BACKEND before keras is imported

    Examples
    --------
    >>> import keras, lstmcore.keras
    >>> model = keras.Sequential([keras.Input((None, 8)), lstmcore.keras.LSTM(16)])
    >>> tuple(model(keras.ops.zeros((2, 5, 8))).shape)
    (2, 16)
    """

    def __init__(self, units: int, **options: Any):
        _check_backend()
        super().__init__(units, **options)

    def inner_loop(self, sequences, initial_state, mask, training=False):
        mask = mask[0] if isinstance(mask, (list, tuple)) else mask
        lengths = None if mask is None else _lengths(mask)
        if (reason_to_keep(self) is None and not (training and self.recurrent_dropout)
                and _is_computed(sequences) and (mask is None or lengths is not None)
                and sequences.shape[1] > 1):    # for one step, copies of Wᵀ cost more than they save
            return self._on_kernels(sequences, initial_state, mask, lengths, training)
        return super().inner_loop(sequences, initial_state, mask, training=training)

    def _on_kernels(self, x, initial_state, mask, lengths, training):
        if training and self.dropout:           # one mask for all steps, as Keras's fused loops do
            x = x * ops.expand_dims(self.cell.get_dropout_mask(x[:, 0, :]), 1)
        W_ih, W_hh = (ops.transpose(ops.convert_to_tensor(W))
                      for W in (self.cell.kernel, self.cell.recurrent_kernel))
        b = None if self.cell.bias is None else ops.convert_to_tensor(self.cell.bias)
        h0, c0 = map(ops.convert_to_tensor, initial_state)
        run = _torch_layer if keras.backend.backend() == "torch" else _numpy_layer
        y, h_n, c_n = run(ops.swapaxes(x, 0, 1), W_ih, W_hh, b, h0, c0, lengths, self.go_backwards)
        y = ops.swapaxes(y, 0, 1)
        if self.go_backwards:                   # Keras leaves the steps in the order of computation
            y = ops.flip(y, 1)
        elif mask is not None and not self.zero_output_for_mask:
            last = ops.where((lengths > 0)[:, None], h_n, ops.zeros_like(h_n))
            y = ops.where(mask[:, :, None], y, last[:, None])   # what is hidden repeats the last
        return y[:, -1], y, [h_n, c_n]


def accelerate(model: keras.Layer) -> list[str]:
    """Turn every keras.layers.LSTM inside a model or layer into an `lstmcore.keras.LSTM`, in place.

    The layers stay the same objects with the same weights, so optimizers and what was compiled go
    on working. Subclasses with code of their own are left alone, and so is what the kernels do not
    compute: a warning names it, with the reason.

    Returns
    -------
    list of str
        the names of the layers that were turned

    Examples
    --------
    >>> import keras, lstmcore.keras
    >>> rnn = keras.layers.Bidirectional(keras.layers.LSTM(16, name="lstm"))
    >>> lstmcore.keras.accelerate(keras.Sequential([keras.Input((None, 8)), rnn]))
    ['forward_lstm', 'backward_lstm']
    """
    _check_backend()
    turned, kept = [], {}
    for layer in _layers(model):
        if type(layer) is keras.layers.LSTM:
            reason = reason_to_keep(layer)
            if reason is None:
                layer.__class__ = LSTM
                turned.append(layer.name)
            else:
                kept[layer.name] = reason
        elif isinstance(layer, keras.layers.LSTM) and type(layer) is not LSTM:
            kept[layer.name] = f"it is a {type(layer).__name__}, with code of its own"
    if kept:
        warnings.warn("these layers stay Keras's: "
                      + "; ".join(f"{name}: {reason}" for name, reason in kept.items()),
                      stacklevel=2)
    return turned


def restore(model: keras.Layer) -> list[str]:
    """Turn every `lstmcore.keras.LSTM` inside a model back into a keras.layers.LSTM, in place.

    Returns the names of the layers that were turned.
    """
    turned = [layer for layer in _layers(model) if type(layer) is LSTM]
    for layer in turned:
        layer.__class__ = keras.layers.LSTM
    return [layer.name for layer in turned]


def reason_to_keep(layer: keras.layers.LSTM) -> str | None:
    """Why the kernels cannot compute a keras.layers.LSTM, or None."""
    for name, wanted in (("activation", keras.activations.tanh),
                         ("recurrent_activation", keras.activations.sigmoid)):
        if getattr(layer, name) is not wanted:
            return f"{name} is {keras.activations.serialize(getattr(layer, name))!r}"
    if layer.compute_dtype not in ("float32", "float64", "bfloat16"):
        return f"it computes in {layer.compute_dtype}"
    return None


def _check_backend():
    if keras.backend.backend() not in _BACKENDS:
        raise RuntimeError(f"lstmcore.keras runs on Keras's backends torch and numpy, got "
                           f"{keras.backend.backend()!r}: set KERAS_BACKEND=torch in the "
                           "environment before keras is imported")


def _layers(layer):
    """The layer and all in it, each once, in the order of its attributes."""
    found, waiting = {}, [layer]
    while waiting:
        value = waiting.pop()
        if isinstance(value, keras.Layer):
            if id(value) in found:
                continue
            found[id(value)] = value
            value = list(vars(value).values())
        elif isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, (list, tuple)):
            waiting.extend(reversed(value))
    return found.values()


def _is_computed(x):
    """Whether x has numbers, on the CPU: Keras asks for shapes with tensors that have none."""
    return x.dtype.kind == "f" if isinstance(x, np.ndarray) else x.device.type == "cpu"


def _lengths(mask):
    """The lengths that a mask (B, T) stands for, (B,); None if it hides more than ends."""
    if not isinstance(mask, np.ndarray):
        import torch
        if mask.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        mask = mask.numpy(force=True)
    lengths = mask.sum(1)
    return lengths if (mask == (np.arange(mask.shape[1]) < lengths[:, None])).all() else None


def _torch_layer(x, W_ih, W_hh, b, h0, c0, lengths, reverse):
    import torch

    from lstmcore.torch.operators import layer

    compute = "bfloat16" if x.dtype is torch.bfloat16 else None
    lengths = None if lengths is None else torch.from_numpy(lengths)
    b_hh = None if b is None else torch.zeros_like(b)       # PyTorch's second one
    y, h_n, c_n = layer(x, W_ih, W_hh, b, b_hh, h0[None], c0[None], None, None, lengths, reverse,
                        "lstm", compute)
    return y, h_n[0], c_n[0]


def _numpy_layer(x, W_ih, W_hh, b, h0, c0, lengths, reverse):
    y, (h_n, c_n), _ = functional.lstm_forward(x, W_ih, W_hh, b, h0, c0, lengths=lengths,
                                               reverse=reverse, keep_tape=False)
    return y, h_n, c_n
