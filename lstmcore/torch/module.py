"""The module: `torch.nn.LSTM` on lstmcore's kernels, layer by layer and direction by direction."""

import warnings

import torch
from torch.fx import Proxy
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence

from lstmcore._types import Precision
from lstmcore.precision import check_precision
from lstmcore.torch.operators import Frozen, layer

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


class _Pad(torch.autograd.Function):
    """Spread packed rows (N, ·) over a padded batch (n, ·); with _Unpad, each other's gradient.

    The other rows are not written: nothing reads them.
    """

    @staticmethod
    def forward(packed, rows, n):
        return packed.new_empty(n, packed.shape[1]).index_copy_(0, rows, packed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, d):
        return _Unpad.apply(d, *ctx.saved_tensors), None, None


class _Unpad(torch.autograd.Function):
    """Pick the rows of a padded batch (n, ·) that are real: packed (N, ·)."""

    @staticmethod
    def forward(padded, rows):
        return padded.index_select(0, rows)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.n = len(inputs[0])
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, d):
        return _Pad.apply(d, *ctx.saved_tensors, ctx.n), None


class LSTM(torch.nn.LSTM):
    """`torch.nn.LSTM` on lstmcore's kernels: change the class, keep everything else.

    Constructor, parameters, state_dict, inputs (batched, unbatched, PackedSequence), outputs and
    semantics are those of torch.nn.LSTM. The number of threads is torch's (torch.set_num_threads).
    Parameters are float32, float64 or bfloat16; under torch.autocast("cpu") those of float32 stay,
    and products are of bfloat16. Whatever is bfloat16, sums, states and gates are float32 within.

    Parameters
    ----------
    *args, **kwargs
        torch.nn.LSTM's own.
    peepholes : bool
        The gates also see the cell (Gers et al. 2002): parameters weight_peephole_l{k} (3, H),
        rows p_i, p_f, p_o, zero at the start. A checkpoint without them sets them to zero.
    forget_bias : float, optional
        Start with this forget gate bias (1.0 is the usual choice) in place of torch's random one.

    Raises
    ------
    ValueError
        A parameter or input is on another device than the CPU, or of another type, as float16 is;
        the message says what to do. Wrong shapes raise what torch.nn.LSTM raises.

    Examples
    --------
    >>> import torch, lstmcore.torch
    >>> m = lstmcore.torch.LSTM(input_size=3, hidden_size=5, num_layers=2, batch_first=True)
    >>> y, (h_n, c_n) = m(torch.zeros(4, 7, 3))
    >>> y.shape, h_n.shape
    (torch.Size([4, 7, 5]), torch.Size([2, 4, 5]))
    >>> isinstance(m, torch.nn.LSTM)
    True
    """

    peepholes = False  # as class attributes, so that a torch.nn.LSTM can become an LSTM
    forget_bias = None
    _frozen = _precision = None

    def __init__(self, *args, peepholes=False, forget_bias=None, **kwargs):
        super().__init__(*args, **kwargs)
        if forget_bias is not None and not self.bias:
            raise ValueError(f"forget_bias={forget_bias} needs bias=True")
        if peepholes:
            self.peepholes = True
            for name in self._peephole_names():
                self.register_parameter(
                    name, Parameter(self.weight_hh_l0.new_empty(3, self.hidden_size)))
        if forget_bias is not None:
            self.forget_bias = float(forget_bias)
        self._reset_extras()

    def _suffixes(self):
        """One per layer and direction, in the order of the states: l0, l0_reverse, l1, ..."""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [f"l{k}{direction}" for k in range(self.num_layers) for direction in directions]

    def _peephole_names(self):
        return [f"weight_peephole_{s}" for s in self._suffixes()] if self.peepholes else []

    def reset_parameters(self):
        super().reset_parameters()
        self._reset_extras()

    @torch.no_grad()
    def _reset_extras(self):
        for name in self._peephole_names():
            getattr(self, name).zero_()
        if self.forget_bias is not None:
            f = slice(self.hidden_size, 2 * self.hidden_size)
            for s in self._suffixes():
                getattr(self, f"bias_ih_{s}")[f] = self.forget_bias
                getattr(self, f"bias_hh_{s}")[f] = 0

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys,
                              *args):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys,
                                      *args)
        if prefix + "weight_ih_l0" not in state_dict:
            return
        for name in self._peephole_names():  # a plain LSTM is one whose peepholes are zero
            if prefix + name in missing_keys:
                missing_keys.remove(prefix + name)
                with torch.no_grad():
                    getattr(self, name).zero_()

    def extra_repr(self):
        extras = ", peepholes=True" if self.peepholes else ""
        if self.forget_bias is not None:
            extras += f", forget_bias={self.forget_bias}"
        return super().extra_repr() + extras

    def freeze(self, precision: Precision | None = None, *, compare: bool = True) -> "LSTM":
        """Pack the weights once instead of on every call without gradients, in eval mode.

        precision is the format of the products: "float32", "bfloat16" or, without gradients,
        "int8", also under autocast; by default that of a call which is not frozen. The parameters
        stay. Holds until `train()`. Returns self.

        A new value of a weight is noticed however it is written, because each call compares all
        weights with a copy of those that were packed: 1.8 ms of 108 for (T, B, I, H) = (35, 20,
        650, 650) on one core, but 145 µs beside 82 for (1, 1, 256, 256). compare=False saves it:
        freeze again after a write through `.data` or NumPy, the only ones that are not noticed
        then.

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
        self._frozen = [Frozen(bool(compare)) for _ in self._all_weights]
        return self

    def train(self, mode=True):
        if mode:
            self._frozen = self._precision = None
        return super().train(mode)

    def __setattr__(self, name, value):
        if name == "qconfig":       # quantization marks every module, and replaces those it knows
            warnings.warn("lstmcore.torch.LSTM stays as it is: torch.ao.quantization replaces "
                          "torch.nn.LSTM itself only. Use its freeze(precision='int8'), or "
                          "quantize the model before lstmcore.torch.accelerate", stacklevel=2)
        super().__setattr__(name, value)

    def __prepare_scriptable__(self):
        raise TypeError("torch.jit.script cannot compile lstmcore.torch.LSTM: use torch.jit.trace, "
                        "torch.export or torch.compile, or a torch.nn.LSTM with its state_dict")

    def forward(self, input, hx=None):
        if isinstance(input, Proxy):    # torch.fx takes modules of torch alone for leaves
            tracer, args = input.tracer, (input,) if hx is None else (input, hx)
            return tracer.create_proxy("call_module", tracer.path_of_module(self), args, {})
        if torch.onnx.is_in_onnx_export():
            return self._forward_for_onnx(input, hx)
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        if hx is not None and not hx[0].dim() == hx[1].dim() == input.dim():
            raise RuntimeError(
                f"For a {input.dim()}-D input, hx and cx should also be {input.dim()}-D, "
                f"but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors")
        batched, batch_axis = input.dim() == 3, 0 if self.batch_first else 1
        if not batched:
            input = input.unsqueeze(batch_axis)
            hx = None if hx is None else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        self._check(input, hx, None)
        x = input.transpose(0, 1).contiguous() if self.batch_first else input
        y, h_n, c_n = self._stack(x, hx, None)
        y = y.transpose(0, 1) if self.batch_first else y
        if not batched:
            y, h_n, c_n = y.squeeze(batch_axis), h_n.squeeze(1), c_n.squeeze(1)
        return y, (h_n, c_n)

    def _forward_for_onnx(self, input, hx):
        """As torch.nn.LSTM computes it: the exporters know that, and write ONNX's LSTM for it."""
        if self.peepholes:
            raise ValueError("torch.onnx.export cannot write peepholes: lstmcore.LSTM with this "
                             "state_dict can, by save('model.onnx')")
        return super().forward(input, hx)

    def _forward_packed(self, input, hx):
        data, batch_sizes, sorted_indices, unsorted_indices = input
        hx = None if hx is None else self.permute_hidden(hx, sorted_indices)
        self._check(data, hx, batch_sizes)
        T, B = len(batch_sizes), int(batch_sizes[0])
        alive = torch.arange(B) < batch_sizes[:, None]  # (T, B): row b takes part in step t
        rows = alive.flatten().nonzero().squeeze(1)
        x = _Pad.apply(data, rows, T * B).unflatten(0, (T, B))
        y, h_n, c_n = self._stack(x, hx, alive.sum(0))
        y = PackedSequence(_Unpad.apply(y.flatten(0, 1), rows), batch_sizes, sorted_indices,
                           unsorted_indices)
        return y, self.permute_hidden((h_n, c_n), unsorted_indices)

    def _check(self, x, hx, batch_sizes):
        if hx is None:
            self.check_input(x, batch_sizes)
            return
        self.check_forward_args(x, hx, batch_sizes)
        for name, state in zip(("h", "c"), hx):
            if state.dtype != x.dtype and not (_autocasts(state) and _autocasts(x)):
                raise ValueError(f"{name} of the initial state must be {x.dtype} as the input is, "
                                 f"got {state.dtype}")

    def check_input(self, input, batch_sizes):
        weight = self.weight_hh_l0
        if (torch.is_autocast_enabled("cpu")
                or not (input.is_cpu and weight.is_cpu and input.dtype == weight.dtype in DTYPES)):
            _check_kind(input, weight)
        if not torch.jit.is_tracing() and input.size(-1) != self.input_size:
            raise RuntimeError(f"input.size(-1) must be equal to input_size = {self.input_size}, "
                               f"got {input.size(-1)}")

    def _formats(self, x, hx, lengths):
        """The format of products, and the dtypes of y and h_n and of c_n: torch.nn.LSTM's.

        Under autocast PyTorch has bfloat16 from oneDNN. What that does not compute, packed and
        projected, is PyTorch's own products in bfloat16 beside c in the dtype of the state.
        """
        weight = self.weight_hh_l0
        if not _autocasts(weight):
            y = c = weight.dtype
            compute = "bfloat16" if y is torch.bfloat16 else None
        else:
            compute, y, c = "bfloat16", torch.bfloat16, torch.bfloat16
            if lengths is not None or self.proj_size:
                state = x if hx is None else hx[1]
                c = state.dtype if state.dtype is torch.bfloat16 else torch.float32
                y = y if self.proj_size else c
        return self._precision or compute, y, c

    def _stack(self, x, hx, lengths):
        """All layers: x (T,B,I) -> y (T,B,D·P), h_n (L·D,B,P), c_n (L·D,B,H)."""
        compute, y_dtype, c_dtype = self._formats(x, hx, lengths)
        weights, D = self.all_weights, 2 if self.bidirectional else 1
        absent = [None] * len(weights)
        h0, c0 = (absent, absent) if hx is None else (states.split(1) for states in hx)
        peepholes = [getattr(self, name) for name in self._peephole_names()] or absent
        frozen = self._frozen or absent
        h_n, c_n = [], []
        for k in range(self.num_layers):
            if k > 0 and self.dropout > 0:
                x = torch.nn.functional.dropout(x, self.dropout, self.training)
            ys = []
            for n in range(k * D, k * D + D):
                W_ih, W_hh, *others = weights[n]
                b_ih, b_hh = others[:2] if self.bias else (None, None)
                W_hr = others[-1] if self.proj_size > 0 else None
                y, h, c = layer(x, W_ih, W_hh, b_ih, b_hh, h0[n], c0[n], peepholes[n], W_hr,
                                lengths, n % D == 1, compute, frozen[n])
                ys.append(y), h_n.append(h), c_n.append(c)
            x = _joined(ys, dim=2)
        return (_converted(x, y_dtype), _converted(_joined(h_n, dim=0), y_dtype),
                _converted(_joined(c_n, dim=0), c_dtype))


def _joined(tensors, dim):
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _converted(tensor, dtype):
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _autocasts(tensor):
    """Whether autocast converts such a tensor; it leaves float64 alone."""
    return (torch.is_autocast_enabled("cpu") and tensor.is_floating_point()
            and tensor.dtype is not torch.float64)


def _check_kind(input, weight):
    """Only tensors of one type on the CPU; autocast may convert them, meta tensors are traced."""
    for what, tensor in (("input", input), ("weights", weight)):
        if tensor.device.type not in ("cpu", "meta"):
            raise ValueError(
                f"lstmcore.torch.LSTM runs on the CPU, got {what} on {tensor.device}: move the "
                "model and its input with .to('cpu'), or use torch.nn.LSTM on this device")
    if _autocasts(input) and _autocasts(weight):
        if torch.get_autocast_dtype("cpu") is torch.bfloat16:
            return
        raise ValueError(
            f"lstmcore.torch.LSTM has no products of {torch.get_autocast_dtype('cpu')}: use "
            "torch.autocast('cpu', dtype=torch.bfloat16), or autocast with enabled=False")
    if input.dtype != weight.dtype:  # in torch's words
        raise ValueError(
            f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
            f"Convert input: input.to({weight.dtype}), or convert model: "
            f"model.to({input.dtype})")
    if weight.dtype not in DTYPES:
        raise ValueError(
            f"lstmcore.torch.LSTM computes in float32, float64 and bfloat16, got input and weights "
            f"of {weight.dtype}: convert both with .bfloat16() or .float()")


def reason_not_to_freeze(module, precision):
    """Why the weights of a torch.nn.LSTM cannot be frozen in this precision, or None."""
    dtype = module.weight_hh_l0.dtype
    if precision is None or (precision == "float64") == (dtype is torch.float64):
        return None
    expected = "float64" if precision == "float64" else "float32 or bfloat16"
    return f"precision={precision!r} needs weights of {expected}, got {dtype}"
