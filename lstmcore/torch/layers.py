"""The layers: `torch.nn.LSTM`, `GRU` and `RNN` on lstmcore's kernels, direction by direction."""

import torch
from torch.fx import Proxy
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence

from lstmcore.torch.module import Kernels, as_leaf, check_state, converted, each
from lstmcore.torch.operators import layer


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


class _Layer(Kernels):
    """What the layers share, beside a class of PyTorch's."""

    def _suffixes(self):
        """One per layer and direction, in the order of the states: l0, l0_reverse, l1, ..."""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [f"l{k}{direction}" for k in range(self.num_layers) for direction in directions]

    def _peephole_names(self):
        return [f"weight_peephole_{s}" for s in self._suffixes()] if self.peepholes else []

    def forward(self, input, hx=None, lengths=None):
        if lengths is None:
            return super().forward(input, hx)
        if isinstance(input, PackedSequence):
            raise ValueError("a PackedSequence has lengths of its own: give lengths with a padded "
                             "batch")
        if isinstance(input, Proxy):
            return as_leaf(self, input, hx=hx, lengths=lengths)
        if torch.onnx.is_in_onnx_export():
            raise ValueError("torch.onnx.export writes a PackedSequence, not lengths: give it "
                             "pack_padded_sequence(input, lengths)")
        if input.dim() != 3:
            raise ValueError(f"lengths need a batch, 3D, got an input of {input.dim()}D")
        return self._compute(input, hx, torch.as_tensor(lengths, device="cpu"))

    def _compute(self, input, hx, lengths=None):
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        n = input.dim()
        if n not in (2, 3):
            raise ValueError(f"{self._theirs.__name__}: Expected input to be 2D or 3D, got {n}D "
                             "instead")
        if hx is not None:
            self._check_dims(hx, n)
        batched, batch_axis = n == 3, 0 if self.batch_first else 1
        if not batched:
            input = input.unsqueeze(batch_axis)
            hx = None if hx is None else each(torch.Tensor.unsqueeze, hx, 1)
        self._check(input, hx, None)
        x = input.transpose(0, 1).contiguous() if self.batch_first else input
        y, hx = self._stack(x, hx, lengths)
        y = y.transpose(0, 1) if self.batch_first else y
        if not batched:
            y, hx = y.squeeze(batch_axis), each(torch.Tensor.squeeze, hx, 1)
        return y, hx

    def _check_dims(self, hx, n):
        if hx.dim() != n:
            raise RuntimeError(f"For a {n}-D input, hx should also be {n}-D but got {hx.dim()}-D "
                               "tensor")

    def _forward_packed(self, input, hx):
        data, batch_sizes, sorted_indices, unsorted_indices = input
        hx = None if hx is None else self.permute_hidden(hx, sorted_indices)
        self._check(data, hx, batch_sizes)
        T, B = len(batch_sizes), int(batch_sizes[0])
        alive = torch.arange(B) < batch_sizes[:, None]  # (T, B): row b takes part in step t
        rows = alive.flatten().nonzero().squeeze(1)
        x = _Pad.apply(data, rows, T * B).unflatten(0, (T, B))
        y, hx = self._stack(x, hx, alive.sum(0))
        y = PackedSequence(_Unpad.apply(y.flatten(0, 1), rows), batch_sizes, sorted_indices,
                           unsorted_indices)
        return y, self.permute_hidden(hx, unsorted_indices)

    def _check(self, x, hx, batch_sizes):
        if hx is None:
            self.check_input(x, batch_sizes)
            return
        self.check_forward_args(x, hx, batch_sizes)
        check_state(x, hx)

    def check_input(self, input, batch_sizes):
        self._check_kind(input, self.weight_hh_l0)
        if not torch.jit.is_tracing() and input.size(-1) != self.input_size:
            raise RuntimeError(f"input.size(-1) must be equal to input_size = {self.input_size}, "
                               f"got {input.size(-1)}")

    def _stack(self, x, hx, lengths):
        """All layers: x (T,B,I) -> y (T,B,D·P) and the states, h_n (L·D,B,P) and c_n (L·D,B,H)."""
        cell, weights, D = self._cell, self.all_weights, 2 if self.bidirectional else 1
        pair = cell == "lstm"
        absent = [None] * len(weights)
        h, c = (None, None) if hx is None else hx if pair else (hx, None)
        h0 = absent if h is None else h.split(1)
        c0 = absent if c is None else c.split(1)
        state = x if hx is None else c if pair else h
        compute, y_dtype, c_dtype = self._formats(
            self.weight_hh_l0, state, pair and lengths is None and not self.proj_size)
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
                                lengths, n % D == 1, cell, compute, frozen[n])
                ys.append(y), h_n.append(h), c_n.append(c)
            x = _joined(ys, dim=2)
        y, h_n = converted(x, y_dtype), converted(_joined(h_n, dim=0), y_dtype)
        return y, (h_n, converted(_joined(c_n, dim=0), c_dtype)) if pair else h_n


def _joined(tensors, dim):
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


class LSTM(_Layer, torch.nn.LSTM):
    """`torch.nn.LSTM` on lstmcore's kernels: change the class, keep everything else.

    Constructor, parameters, state_dict, inputs (batched, unbatched, PackedSequence), outputs and
    semantics are those of torch.nn.LSTM; and `m(x, hx, lengths=lengths)` takes the lengths (B,) of
    a padded batch, in any order and 0 too: y is 0 past the ends, and the states are those of each
    sequence's own last step, without the copies of a PackedSequence. The number of threads is
    torch's (torch.set_num_threads). Parameters are float32, float64 or bfloat16; under
    torch.autocast("cpu") those of float32 stay, and products are of bfloat16. Whatever is bfloat16,
    sums, states and gates are float32 within.

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

    _theirs, _cell = torch.nn.LSTM, "lstm"
    forget_bias = None  # as a class attribute, so that a torch.nn.LSTM can become an LSTM

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

    def _check_dims(self, hx, n):
        if not hx[0].dim() == hx[1].dim() == n:
            raise RuntimeError(
                f"For a {n}-D input, hx and cx should also be {n}-D, "
                f"but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors")

    def _forward_for_onnx(self, input, hx):
        if self.peepholes:
            raise ValueError("torch.onnx.export cannot write peepholes: lstmcore.LSTM with this "
                             "state_dict can, by save('model.onnx')")
        return super()._forward_for_onnx(input, hx)


class GRU(_Layer, torch.nn.GRU):
    """`torch.nn.GRU` on lstmcore's kernels; all else as `LSTM`, without its own two parameters.

    >>> import torch, lstmcore.torch
    >>> m = lstmcore.torch.GRU(input_size=3, hidden_size=5, num_layers=2, batch_first=True)
    >>> y, h_n = m(torch.zeros(4, 7, 3))
    >>> y.shape, h_n.shape
    (torch.Size([4, 7, 5]), torch.Size([2, 4, 5]))
    """

    _theirs, _cell = torch.nn.GRU, "gru"


class RNN(_Layer, torch.nn.RNN):
    """`torch.nn.RNN` on lstmcore's kernels, nonlinearity "tanh" or "relu", as `GRU`.

    >>> import torch, lstmcore.torch
    >>> m = lstmcore.torch.RNN(input_size=3, hidden_size=5, nonlinearity="relu")
    >>> y, h_n = m(torch.zeros(7, 4, 3))
    >>> y.shape, h_n.shape
    (torch.Size([7, 4, 5]), torch.Size([1, 4, 5]))
    """

    _theirs = torch.nn.RNN

    @property
    def _cell(self):
        return "tanh" if self.mode == "RNN_TANH" else "relu"
