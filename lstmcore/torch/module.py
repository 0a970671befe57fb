"""What layers and cells share: freezing, formats, and the checks of tensors."""

import warnings
from typing import Any, ClassVar, TypeVar

import torch
from torch.fx import Proxy

from lstmcore._types import Precision
from lstmcore.precision import check_precision
from lstmcore.torch.operators import Frozen
from lstmcore.torch.rows import ROWS

DTYPES = (torch.float32, torch.float64, torch.bfloat16)

M = TypeVar("M", bound="Kernels")


class Kernels:
    """What stands before a class of PyTorch's, so that its modules compute on lstmcore's kernels.

    A class says of which it is (`_theirs`), its cell (`_cell`, a row of rows.py), and has `_compute`
    in the place of `forward`.
    """

    _theirs: ClassVar[Any]
    _cell: Any
    _frozen: Any = None         # as class attributes, so that a module of torch can become one
    _precision: Any = None
    peepholes, proj_size = False, 0

    def freeze(self: M, precision: Precision | None = None, *, compare: bool = True) -> M:
        """Pack the weights once instead of on every call without gradients, in eval mode.

        precision is the format of the products: "float32", "bfloat16" or, without gradients,
        "int8", also under autocast; by default that of a call which is not frozen. The parameters
        stay. Holds until `train()`. Returns self.

        A new value of a weight is noticed however it is written, because each call compares all
        weights with a copy of those that were packed: 1.8 ms of 108 for an LSTM of (T, B, I, H) =
        (35, 20, 650, 650) on one core, but 145 µs beside 82 for (1, 1, 256, 256). compare=False
        saves it: freeze again after a write through `.data` or NumPy, the only ones that are not
        noticed then.

        >>> import torch, lstmcore.torch
        >>> m, state = lstmcore.torch.LSTM(input_size=3, hidden_size=5).freeze("int8"), None
        >>> with torch.inference_mode():
        ...     for x_t in torch.zeros(7, 1, 1, 3):
        ...         y_t, state = m(x_t, state)
        """
        check_precision(precision)
        why = reason_not_to_freeze(self, precision)
        if why:
            raise TypeError(why)
        self.eval()
        self._precision = precision
        self._frozen = [Frozen(bool(compare)) for _ in getattr(self, "_all_weights", "1")]
        return self

    def train(self, mode=True):
        if mode:
            self._frozen = self._precision = None
        return super().train(mode)

    def __setattr__(self, name, value):
        if name == "qconfig":       # quantization marks every module, and replaces those it knows
            theirs = self._theirs.__name__
            warnings.warn(f"lstmcore.torch.{theirs} stays as it is: torch.ao.quantization replaces "
                          f"torch.nn.{theirs} itself only. Use its freeze(precision='int8'), or "
                          "quantize the model before lstmcore.torch.accelerate", stacklevel=2)
        super().__setattr__(name, value)

    def __prepare_scriptable__(self):
        theirs = self._theirs.__name__
        raise TypeError(f"torch.jit.script cannot compile lstmcore.torch.{theirs}: use "
                        f"torch.jit.trace, torch.export or torch.compile, or a torch.nn.{theirs} "
                        "with its state_dict")

    def forward(self, input, hx=None):
        if isinstance(input, Proxy):
            return as_leaf(self, input, *(() if hx is None else (hx,)))
        if torch.onnx.is_in_onnx_export():
            return self._forward_for_onnx(input, hx)
        return self._compute(input, hx)

    def _forward_for_onnx(self, input, hx):
        """As PyTorch computes it: the exporters know that, and write ONNX's operators for it."""
        return super().forward(input, hx)

    def _formats(self, weight, state, one_dnn):
        """The format of products, and the dtypes of y and h_n and of c_n: those of PyTorch.

        Under autocast PyTorch has bfloat16 from oneDNN. What that does not compute is PyTorch's own
        products in bfloat16; where the state is added to what they give (`widens`), in its type. A
        projected h is a product itself.
        """
        if not autocasts(weight):
            y = c = weight.dtype
            compute = "bfloat16" if y is torch.bfloat16 else None
        else:
            compute, y, c = "bfloat16", torch.bfloat16, torch.bfloat16
            if not one_dnn and ROWS[self._cell].widens:
                c = state.dtype if state.dtype is torch.bfloat16 else torch.float32
                y = y if self.proj_size else c
        return self._precision or compute, y, c

    def _check_kind(self, input, weight):
        """Only tensors of one type on the CPU; autocast may convert them, meta tensors are traced."""
        if (input.is_cpu and weight.is_cpu and input.dtype == weight.dtype in DTYPES
                and not torch.is_autocast_enabled("cpu")):
            return
        theirs = self._theirs.__name__
        for what, tensor in (("input", input), ("weights", weight)):
            if tensor.device.type not in ("cpu", "meta"):
                raise ValueError(
                    f"lstmcore.torch.{theirs} runs on the CPU, got {what} on {tensor.device}: move "
                    f"the model and its input with .to('cpu'), or use torch.nn.{theirs} on this "
                    "device")
        if autocasts(input) and autocasts(weight):
            if torch.get_autocast_dtype("cpu") is torch.bfloat16:
                return
            raise ValueError(
                f"lstmcore.torch.{theirs} has no products of {torch.get_autocast_dtype('cpu')}: use"
                " torch.autocast('cpu', dtype=torch.bfloat16), or autocast with enabled=False")
        if input.dtype != weight.dtype:  # in torch's words
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: "
                f"model.to({input.dtype})")
        if weight.dtype not in DTYPES:
            raise ValueError(
                f"lstmcore.torch.{theirs} computes in float32, float64 and bfloat16, got input and "
                f"weights of {weight.dtype}: convert both with .bfloat16() or .float()")


def each(function, states, *args):
    """Of h, or of the pair (h, c)."""
    if isinstance(states, torch.Tensor):
        return function(states, *args)
    return tuple(function(state, *args) for state in states)


def as_leaf(module, input, *args, **options):
    """The call of a module as one node of torch.fx, which takes modules of torch alone for leaves."""
    tracer = input.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (input, *args), options)


def check_state(x, hx):
    """Only states of the input's type; autocast may convert them."""
    for name, state in zip("hc", hx if isinstance(hx, (tuple, list)) else (hx,)):
        if state.dtype != x.dtype and not (autocasts(state) and autocasts(x)):
            raise ValueError(f"{name} of the initial state must be {x.dtype} as the input is, "
                             f"got {state.dtype}")


def converted(tensor, dtype):
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def autocasts(tensor):
    """Whether autocast converts such a tensor; it leaves float64 alone."""
    return (torch.is_autocast_enabled("cpu") and tensor.is_floating_point()
            and tensor.dtype is not torch.float64)


def reason_not_to_freeze(module, precision):
    """Why the weights of a module of torch's cannot be frozen in this precision, or None."""
    is_layer = isinstance(module, torch.nn.RNNBase)
    dtype = (module.weight_hh_l0 if is_layer else module.weight_hh).dtype
    if precision is None or (precision == "float64") == (dtype is torch.float64):
        return None
    expected = "float64" if precision == "float64" else "float32 or bfloat16"
    return f"precision={precision!r} needs weights of {expected}, got {dtype}"
