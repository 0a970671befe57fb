"""The LSTM inside PyTorch: a drop-in for `torch.nn.LSTM` on lstmcore's CPU kernels.

    LSTM         a subclass of torch.nn.LSTM: same constructor, state_dict, inputs and outputs
    accelerate   turn every torch.nn.LSTM of a model into one, in place

Underneath, one operator per layer and direction, `torch.ops.lstmcore.lstm`, with its gradient
`torch.ops.lstmcore.lstm_backward`: registered with autograd, vmap, autocast and torch.compile.
Their tensors are the kernels' arrays, without a copy. What the forward pass saves for the backward pass,
the gates and the cell state of every step, are tensors too: autograd owns and frees them.

This file knows `lstmcore.functional` and PyTorch, nothing of the kernels. CPU only; float32 and
float64; under autocast it computes in float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence

from lstmcore import functional

__all__ = ["LSTM", "accelerate"]


# The operators ------------------------------------------------------------------------------------

# _CELL are the arguments of functional.lstm_forward in its letters; x (T,B,I) -> y (T,B,P).
# gates and c are the tape: (T,B,4H) and (T,B,H); of a ragged batch its real tokens, (N,4H) and
# (N,H); without keep_tape both (0,), and the backward pass runs the forward pass once more.
# The kernels' backward pass overwrites the gates. lstm_backward gives them a copy, unless the
# caller of lstm promises with spend_tape to drop gates, and autograd is about to free them anyway:
# 0 to 11 % of a training step, most where H is small.

_CELL = ("Tensor x, Tensor W_ih, Tensor W_hh, Tensor? b, Tensor? h0, Tensor? c0, "
         "Tensor? peepholes, Tensor? W_hr, Tensor? lengths, bool reverse")
_TAPE = "Tensor y, Tensor{} gates, Tensor c"
_UPSTREAM = "Tensor? dy, Tensor? dh_n, Tensor? dc_n"
_GRADIENTS = ("(Tensor dx, Tensor dW_ih, Tensor dW_hh, Tensor db, Tensor dh0, Tensor dc0, "
              "Tensor dpeepholes, Tensor dW_hr)")
_N_DIFFERENTIABLE = 8  # of _CELL: all but lengths and reverse


def _operator(name, schema, mutates_args=()):
    return torch.library.custom_op("lstmcore::" + name, mutates_args=mutates_args,
                                   device_types="cpu", schema=schema)


def _array(tensor):
    """The tensor's memory as an array; only a strided or negated one is copied."""
    return None if tensor is None else tensor.contiguous().numpy(force=True)


@_operator("lstm", f"({_CELL}, bool keep_tape, bool spend_tape) -> "
                   "(Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor c)")
def lstm(x, W_ih, W_hh, b, h0, c0, peepholes, W_hr, lengths, reverse, keep_tape,
         spend_tape):
    y, (h_n, c_n), tape = functional.lstm_forward(
        *map(_array, (x, W_ih, W_hh, b, h0, c0)), peepholes=_array(peepholes), W_hr=_array(W_hr),
        lengths=_array(lengths), reverse=reverse, keep_tape=keep_tape,
        n_threads=torch.get_num_threads())
    y, h_n, c_n = map(torch.from_numpy, (y, h_n, c_n))
    if not keep_tape:
        return y, h_n, c_n, x.new_empty(0), x.new_empty(0)
    gates, c = torch.from_numpy(tape.raw_gates), torch.from_numpy(tape.raw_c)
    if lengths is None:
        T, B, _ = x.shape
        gates, c = gates.view(T, B, gates.shape[1]), c.view(T, B, c.shape[1])
    return y, h_n, c_n, gates, c


@lstm.register_fake
def _(x, W_ih, W_hh, b, h0, c0, peepholes, W_hr, lengths, reverse, keep_tape, spend_tape):
    (T, B, _), (H4, P) = x.shape, W_hh.shape
    outputs = x.new_empty(T, B, P), x.new_empty(B, P), x.new_empty(B, H4 // 4)
    if not keep_tape:
        return *outputs, x.new_empty(0), x.new_empty(0)
    tokens = (T, B) if lengths is None else (torch.library.get_ctx().new_dynamic_size(),)
    return *outputs, x.new_empty(*tokens, H4), x.new_empty(*tokens, H4 // 4)


def _backward(dy, dh_n, dc_n, x, W_ih, W_hh, b, h0, c0, peepholes, W_hr, lengths, reverse,
              y, gates, c):
    """Run the kernels backward; gates is overwritten."""
    cell = dict(x=_array(x), W_ih=_array(W_ih), W_hh=_array(W_hh), h0=_array(h0), c0=_array(c0),
                peepholes=_array(peepholes), W_hr=_array(W_hr), lengths=_array(lengths),
                reverse=reverse)
    if gates.dim() == 1:
        tape = functional.lstm_forward(b=_array(b), n_threads=torch.get_num_threads(), **cell)[2]
    else:
        tape = functional.tape_from(
            y=_array(y), raw_gates=gates.numpy(force=True).reshape(-1, gates.shape[-1]),
            raw_c=_array(c).reshape(-1, c.shape[-1]), **cell)
    g = functional.lstm_backward(tape, _array(torch.zeros_like(y) if dy is None else dy),
                                 _array(dh_n), _array(dc_n), n_threads=torch.get_num_threads())
    return tuple(x.new_empty(0) if array is None else torch.from_numpy(array) for array in
                 (g.dx, g.dW_ih, g.dW_hh, g.db, g.dh0, g.dc0, g.dpeepholes, g.dW_hr))


@_operator("lstm_backward", f"({_UPSTREAM}, {_CELL}, {_TAPE.format('')}) -> {_GRADIENTS}")
def lstm_backward(dy, dh_n, dc_n, x, W_ih, W_hh, b, h0, c0, peepholes, W_hr, lengths, reverse,
                  y, gates, c):
    return _backward(dy, dh_n, dc_n, x, W_ih, W_hh, b, h0, c0, peepholes, W_hr, lengths, reverse,
                     y, gates.clone(memory_format=torch.contiguous_format), c)


@lstm_backward.register_fake
def _(dy, dh_n, dc_n, x, W_ih, W_hh, b, h0, c0, peepholes, W_hr, lengths, reverse, y, gates, c):
    (_, B, _), (H4, P) = x.shape, W_hh.shape
    shapes = (x.shape, W_ih.shape, W_hh.shape, (H4,), (B, P), (B, H4 // 4),
              (0,) if peepholes is None else peepholes.shape, (0,) if W_hr is None else W_hr.shape)
    return tuple(x.new_empty(shape) for shape in shapes)


_lstm_backward_in_place = _operator(
    "lstm_backward_", f"({_UPSTREAM}, {_CELL}, {_TAPE.format('(a!)')}) -> {_GRADIENTS}",
    mutates_args={"gates"})(_backward)


# Their gradients ----------------------------------------------------------------------------------


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.reverse, _, ctx.spend_tape = inputs
    y, _, _, gates, c = output
    ctx.save_for_backward(*tensors, y, gates, c)
    ctx.mark_non_differentiable(gates, c)
    ctx.set_materialize_grads(False)


def _lstm_gradient(ctx, dy, dh_n, dc_n, _dgates, _dc):
    *cell, y, gates, c = ctx.saved_tensors
    spend = ctx.spend_tape and _is_last_use(gates, (dy, dh_n, dc_n))
    backward = _lstm_backward_in_place if spend else _lstm_backward
    gradients = backward(dy, dh_n, dc_n, *cell, ctx.reverse, y, gates, c)
    wanted = ctx.needs_input_grad[:_N_DIFFERENTIABLE]
    return (*(g if want else None for g, want in zip(gradients, wanted)),
            None, None, None, None)


def _is_last_use(gates, upstream):
    """Whether autograd frees the saved gates after this backward pass, so that it may spoil them.

    Not with retain_graph or create_graph, not under torch.func or is_grads_batched, and not while
    being traced.
    """
    is_grads_batched = torch._C._functorch.is_legacy_batchedtensor
    return not (torch._C._autograd._get_current_graph_task_keep_graph()
                or torch.is_grad_enabled()
                or torch._C._are_functorch_transforms_active()
                or any(is_grads_batched(d) for d in upstream if d is not None)
                or type(gates) is not Tensor)


def _recurrence(x, W_ih, W_hh, b, h0, c0, peepholes, W_hr, lengths, reverse):
    """The same layer in PyTorch's own operations, which can be differentiated any number of times.

    A row is frozen outside its own steps, so both directions visit the steps in plain order.
    """
    T, B, _ = x.shape
    H, P = W_hh.shape[0] // 4, W_hh.shape[1]
    h = x.new_zeros(B, P) if h0 is None else h0
    c = x.new_zeros(B, H) if c0 is None else c0
    p_i, p_f, p_o = (0, 0, 0) if peepholes is None else peepholes
    y = [None] * T
    for t in reversed(range(T)) if reverse else range(T):
        a_i, a_f, a_g, a_o = torch.nn.functional.linear(x[t], W_ih, b).addmm(h, W_hh.T).chunk(4, 1)
        c_t = (torch.sigmoid(a_f + p_f * c) * c
               + torch.sigmoid(a_i + p_i * c) * torch.tanh(a_g))
        h_t = torch.sigmoid(a_o + p_o * c_t) * torch.tanh(c_t)
        h_t = h_t if W_hr is None else h_t @ W_hr.T
        if lengths is None:
            y[t], h, c = h_t, h_t, c_t
        else:
            alive = (t < lengths)[:, None]
            y[t] = torch.where(alive, h_t, 0)
            h, c = torch.where(alive, h_t, h), torch.where(alive, c_t, c)
    return torch.stack(y) if T else x.new_zeros(0, B, P), h, c


def _save_for_double_backward(ctx, inputs, output):
    *tensors, ctx.reverse, y, gates, c = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _lstm_backward_gradient(ctx, *dd):
    """The gradient of the gradient, by running the layer again in PyTorch's operations."""
    (*upstream, lengths), n = ctx.saved_tensors, 3
    upstream, cell = upstream[:n], upstream[n:]
    tensors = (*upstream, *cell)
    present = [k for k, tensor in enumerate(tensors) if tensor is not None]

    def gradients(*values):
        full = [None] * len(tensors)
        for k, value in zip(present, values):
            full[k] = value
        given = [k for k in present if k >= n]

        def outputs(*values):
            args = list(full[n:])
            for k, value in zip(given, values):
                args[k - n] = value
            y_h_c = _recurrence(*args, lengths, ctx.reverse)
            return tuple(out for out, d in zip(y_h_c, full[:n]) if d is not None)

        _, pullback = torch.func.vjp(outputs, *(full[k] for k in given))
        return pullback(tuple(d for d in full[:n] if d is not None))

    firsts, pullback = torch.func.vjp(gradients, *(tensors[k] for k in present))
    dd = [d for d, tensor in zip(dd, cell) if tensor is not None]
    seconds = pullback(tuple(torch.zeros_like(first) if d is None else d
                             for first, d in zip(firsts, dd)))
    result = [None] * len(tensors)
    for k, second in zip(present, seconds):
        result[k] = second
    return (*result, None, None, None, None, None)


# vmap, autocast and registration ------------------------------------------------------------------


def _one_by_one(op):
    """The batching rule that always holds: an ensemble has weights of its own for every example."""
    def rule(info, in_dims, *args):
        results = [op(*(arg if dim is None else arg.select(dim, k)
                        for arg, dim in zip(args, in_dims))) for k in range(info.batch_size)]
        stacked = tuple(map(torch.stack, zip(*results)))
        return stacked, (0,) * len(stacked)
    return rule


def _as_larger_batch(op):
    """The batching rule of `lstm`: with weights in common, the examples are just more rows."""
    batch_axis = {0: 1, 4: 0, 5: 0, 8: 0}  # of x, h0, c0, lengths; the other tensors are weights

    def rule(info, in_dims, *args):
        if any(dim is not None and k not in batch_axis for k, dim in enumerate(in_dims)):
            return _one_by_one(op)(info, in_dims, *args)

        def merge(k, arg, dim):
            if arg is None or k not in batch_axis:
                return arg
            axis = batch_axis[k]
            arg = arg.unsqueeze(axis) if dim is None else arg.movedim(dim, axis)
            shape = (*arg.shape[:axis], info.batch_size, *arg.shape[axis + 1:])
            return arg.expand(shape).flatten(axis, axis + 1)

        *cell, lengths, reverse, keep_tape, spend_tape = map(merge, range(len(args)), args, in_dims)
        keep_tape = keep_tape and lengths is None  # a ragged tape cannot be split by examples
        outputs = op(*cell, lengths, reverse, keep_tape, spend_tape)
        axes = (1, 0, 0, 1, 1) if keep_tape else (1, 0, 0, None, None)
        return tuple(out if axis is None else out.unflatten(axis, (info.batch_size, -1))
                     for out, axis in zip(outputs, axes)), axes
    return rule


def _register(op, save, gradient, batching):
    """Give op its gradient and batching rule; returns op as torch.func can take it.

    The autograd.Function that a custom operator gets is one that torch.func refuses (it lacks a
    setup_context), so under torch.func's transforms this one, with the same parts, stands in.
    """
    op.register_autograd(gradient, setup_context=save)
    op.register_vmap(batching(op))

    class Function(torch.autograd.Function):
        forward = staticmethod(lambda *args: op(*args))
        setup_context = staticmethod(save)
        backward = staticmethod(gradient)
        vmap = staticmethod(batching(lambda *args: Function.apply(*args)))

    def call(*args):
        return (Function.apply if torch._C._are_functorch_transforms_active() else op)(*args)
    return call


_lstm = _register(lstm, _save_for_backward, _lstm_gradient, _as_larger_batch)
_lstm_backward = _register(lstm_backward, _save_for_double_backward, _lstm_backward_gradient,
                           _one_by_one)
lstm.register_autocast("cpu", torch.float32)


# The module ---------------------------------------------------------------------------------------


class _Pad(torch.autograd.Function):
    """Spread packed rows (N, ·) over a padded batch (n, ·); with _Unpad, each other's gradient."""

    @staticmethod
    def forward(packed, rows, n):
        return packed.new_zeros(n, packed.shape[1]).index_copy_(0, rows, packed)

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

    Parameters beyond torch.nn.LSTM's, both by keyword
    --------------------------------------------------
    peepholes : bool
        The gates also see the cell (Gers et al. 2002): parameters weight_peephole_l{k} (3, H),
        rows p_i, p_f, p_o, zero at the start. A checkpoint without them sets them to zero.
    forget_bias : float, optional
        Start with this forget gate bias (1.0 is the usual choice) in place of torch's random one.

    Raises
    ------
    ValueError
        A parameter or input is on another device than the CPU, or of another type than float32 or
        float64; the message says what to do. Wrong shapes raise what torch.nn.LSTM raises.

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

    def forward(self, input, hx=None):
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
        else:
            self.check_forward_args(x, hx, batch_sizes)

    def check_input(self, input, batch_sizes):
        weight = self.weight_hh_l0
        autocast = torch.is_autocast_enabled("cpu")
        for what, tensor in (("input", input), ("weights", weight)):
            if tensor.device.type not in ("cpu", "meta"):
                raise ValueError(
                    f"lstmcore.torch.LSTM runs on the CPU, got {what} on {tensor.device}: move the "
                    "model and its input with .to('cpu'), or use torch.nn.LSTM on this device")
            if tensor.dtype not in (torch.float32, torch.float64) and not autocast:
                raise ValueError(
                    f"lstmcore.torch.LSTM computes in float32 and float64, got {what} of "
                    f"{tensor.dtype}: convert with .float(), or use torch.autocast('cpu')")
        if input.dtype != weight.dtype and not autocast:  # in torch's words
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: "
                f"model.to({input.dtype})")
        if input.size(-1) != self.input_size:
            raise RuntimeError(f"input.size(-1) must be equal to input_size = {self.input_size}, "
                               f"got {input.size(-1)}")

    def _stack(self, x, hx, lengths):
        """All layers: x (T,B,I) -> y (T,B,D·P), h_n (L·D,B,P), c_n (L·D,B,H)."""
        suffixes = self._suffixes()
        h0, c0 = ([None] * len(suffixes),) * 2 if hx is None else (s.unbind(0) for s in hx)
        D = 2 if self.bidirectional else 1
        h_n, c_n = [], []
        for k in range(self.num_layers):
            if k > 0 and self.dropout > 0:
                x = torch.nn.functional.dropout(x, self.dropout, self.training)
            ys = []
            for n in range(k * D, k * D + D):
                y, h, c = self._direction(x, suffixes[n], h0[n], c0[n], lengths, reverse=n % D == 1)
                ys.append(y), h_n.append(h), c_n.append(c)
            x = ys[0] if D == 1 else torch.cat(ys, dim=2)
        return x, torch.stack(h_n), torch.stack(c_n)

    def _direction(self, x, suffix, h0, c0, lengths, reverse):
        def weight(name, exists=True):
            return getattr(self, f"{name}_{suffix}") if exists else None

        W_ih, W_hh = weight("weight_ih"), weight("weight_hh")
        b = weight("bias_ih") + weight("bias_hh") if self.bias else None
        peepholes = weight("weight_peephole", self.peepholes)
        W_hr = weight("weight_hr", self.proj_size > 0)
        keep_tape = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (x, W_ih, W_hh, b, h0, c0, peepholes, W_hr))
        return _lstm(x, W_ih, W_hh, b, h0, c0, peepholes, W_hr, lengths, reverse, keep_tape,
                     True)[:3]


# A whole model ------------------------------------------------------------------------------------


class Report(NamedTuple):
    """What `accelerate` did: names of modules replaced; names refused, each with its reason."""

    replaced: list
    refused: dict

    def __str__(self):
        lines = [f"replaced {len(self.replaced)} torch.nn.LSTM"]
        lines += [f"  {name or '(the model itself)'}" for name in self.replaced]
        lines += [f"  kept {name or '(the model itself)'}: {why}"
                  for name, why in self.refused.items()]
        return "\n".join(lines)


def accelerate(model):
    """Turn every torch.nn.LSTM inside a model into an `lstmcore.torch.LSTM`, in place.

    The modules stay the same objects with the same parameters: optimizers, hooks, shared modules
    and weights, and torch.nn.utils parametrizations go on working. A module is left as it is,
    and the report says why, if it is a subclass with code of its own, has had its forward
    replaced, or is not float32 or float64 on the CPU.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    Report
        .replaced, a list of module names; .refused, a dict of module name to reason; print it.

    Examples
    --------
    >>> import torch, lstmcore.torch
    >>> model = torch.nn.ModuleDict({"rnn": torch.nn.LSTM(3, 5), "out": torch.nn.Linear(5, 2)})
    >>> print(lstmcore.torch.accelerate(model))
    replaced 1 torch.nn.LSTM
      rnn
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    report = Report([], {})
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.LSTM) or isinstance(module, LSTM):
            continue
        why = _reason_to_keep(module)
        if why:
            report.refused[name] = why
        else:
            module.__class__ = _counterpart(type(module))
            report.replaced.append(name)
    return report


def _reason_to_keep(module):
    cls = type(module)
    if cls is not torch.nn.LSTM and not _is_parametrized(module):
        return f"{cls.__module__}.{cls.__qualname__} is a subclass with code of its own"
    if "forward" in vars(module):
        return "its forward has been replaced"
    for name, p in module.named_parameters():
        if p.device.type != "cpu":
            return f"{name} is on {p.device}, lstmcore runs on the CPU"
        if p.dtype not in (torch.float32, torch.float64):
            return f"{name} is {p.dtype}, lstmcore computes in float32 and float64"
    return None


def _is_parametrized(module):
    """Whether the class is the one that torch.nn.utils.parametrize makes of a torch.nn.LSTM."""
    return (torch.nn.utils.parametrize.is_parametrized(module)
            and type(module).__bases__ == (torch.nn.LSTM,))


def _counterpart(cls):
    if cls is torch.nn.LSTM:
        return LSTM
    own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls.__name__, (LSTM,), own)


def _open_dynamo_to_our_lstm():
    """torch.compile refuses any torch.nn.LSTM unless config.allow_rnn is set; ours it may trace.

    The setting would change what becomes of torch.nn.LSTM too, so it holds for our modules only.
    """
    import torch._dynamo
    from torch._dynamo.variables.builder import VariableBuilder
    wrap = VariableBuilder.wrap_module

    def wrap_module(self, value):
        if not isinstance(value, LSTM):
            return wrap(self, value)
        with torch._dynamo.config.patch(allow_rnn=True):
            return wrap(self, value)

    VariableBuilder.wrap_module = wrap_module


_open_dynamo_to_our_lstm()
