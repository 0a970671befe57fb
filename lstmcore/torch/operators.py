"""One layer in one direction as PyTorch operations: `layer`, and the operators under it.

`torch.ops.lstmcore.lstm` and its gradient `torch.ops.lstmcore.lstm_backward` are registered with
autograd, vmap, autocast and torch.compile. Their tensors are the kernels' arrays, without a copy.
What the forward pass saves for the backward pass, the gates and the cell state of every step, are
tensors too: autograd owns and frees them.

A call through these operators costs 0.3 ms of Python, more than a small layer computes. So where
nothing but autograd wants to see a call, the same parts run without them.
"""

import torch
from torch import Tensor
from torch.nn import Parameter

from lstmcore import functional
from lstmcore.torch.double_backward import lstm_backward_gradient, save_for_double_backward

# _CELL are the arguments of functional.lstm_forward in its letters; x (T,B,I) -> y (T,B,P).
# gates and c are the tape: (T,B,4H) and (T,B,H); of a ragged batch its real tokens, (N,4H) and
# (N,H); without keep_tape both (0,), and the backward pass runs the forward pass once more.

_CELL = ("Tensor x, Tensor W_ih, Tensor W_hh, Tensor? b, Tensor? h0, Tensor? c0, "
         "Tensor? peepholes, Tensor? W_hr, Tensor? lengths, bool reverse")
_TAPE = "Tensor y, Tensor gates, Tensor c"
_UPSTREAM = "Tensor? dy, Tensor? dh_n, Tensor? dc_n"
_GRADIENTS = ("(Tensor dx, Tensor dW_ih, Tensor dW_hh, Tensor db, Tensor dh0, Tensor dc0, "
              "Tensor dpeepholes, Tensor dW_hr)")
_N_DIFFERENTIABLE = 8  # of _CELL: all but lengths and reverse


# The kernels on tensors ---------------------------------------------------------------------------


def _array(tensor):
    """The tensor's memory as an array; only a strided or negated one is copied."""
    return None if tensor is None else tensor.contiguous().numpy(force=True)


def _tensor(array):
    return None if array is None else torch.from_numpy(array)


def _copy(tensor):
    return tensor.clone(memory_format=torch.contiguous_format)


def _forward(x, W_ih, W_hh, b, h0, c0, peepholes, W_hr, lengths, reverse, keep_tape):
    """y, h_n, c_n and the tape's gates and c, or None and None."""
    y, (h_n, c_n), tape = functional.lstm_forward(
        _array(x), _array(W_ih), _array(W_hh), _array(b), _array(h0), _array(c0),
        peepholes=_array(peepholes), W_hr=_array(W_hr), lengths=_array(lengths), reverse=reverse,
        keep_tape=keep_tape, n_threads=torch.get_num_threads())
    tape = (tape.raw_gates, tape.raw_c) if keep_tape else (None, None)
    return tuple(map(_tensor, (y, h_n, c_n, *tape)))


def _backward(dy, dh_n, dc_n, x, W_ih, W_hh, b, h0, c0, peepholes, W_hr, lengths, reverse,
              y, gates, c):
    """The gradients of all that is differentiable, in its order; gates is overwritten."""
    cell = dict(x=_array(x), W_ih=_array(W_ih), W_hh=_array(W_hh), h0=_array(h0), c0=_array(c0),
                peepholes=_array(peepholes), W_hr=_array(W_hr), lengths=_array(lengths),
                reverse=reverse)
    if gates.dim() == 1:
        tape = functional.lstm_forward(b=_array(b), n_threads=torch.get_num_threads(), **cell)[2]
    else:
        tape = functional.tape_from(
            y=_array(y), raw_gates=_array(gates).reshape(-1, gates.shape[-1]),
            raw_c=_array(c).reshape(-1, c.shape[-1]), **cell)
    g = functional.lstm_backward(tape, _array(torch.zeros_like(y) if dy is None else dy),
                                 _array(dh_n), _array(dc_n), n_threads=torch.get_num_threads())
    return tuple(map(_tensor, (g.dx, g.dW_ih, g.dW_hh, g.db, g.dh0, g.dc0, g.dpeepholes, g.dW_hr)))


# The operators ------------------------------------------------------------------------------------


def _operator(name, schema):
    return torch.library.custom_op("lstmcore::" + name, mutates_args=(), device_types="cpu",
                                   schema=schema)


def _present(tensors, like):
    """An operator's outputs: an empty tensor where there is none."""
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in tensors)


@_operator("lstm", f"({_CELL}, bool keep_tape) -> "
                   "(Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor c)")
def lstm(x, W_ih, W_hh, b, h0, c0, peepholes, W_hr, lengths, reverse, keep_tape):
    *outputs, gates, c = _forward(x, W_ih, W_hh, b, h0, c0, peepholes, W_hr, lengths, reverse,
                                  keep_tape)
    if keep_tape and lengths is None:
        gates, c = (raw.unflatten(0, x.shape[:2]) for raw in (gates, c))
    return _present((*outputs, gates, c), x)


@lstm.register_fake
def _(x, W_ih, W_hh, b, h0, c0, peepholes, W_hr, lengths, reverse, keep_tape):
    (T, B, _), (H4, P) = x.shape, W_hh.shape
    outputs = x.new_empty(T, B, P), x.new_empty(B, P), x.new_empty(B, H4 // 4)
    if not keep_tape:
        return *outputs, x.new_empty(0), x.new_empty(0)
    tokens = (T, B) if lengths is None else (torch.library.get_ctx().new_dynamic_size(),)
    return *outputs, x.new_empty(*tokens, H4), x.new_empty(*tokens, H4 // 4)


@_operator("lstm_backward", f"({_UPSTREAM}, {_CELL}, {_TAPE}) -> {_GRADIENTS}")
def lstm_backward(dy, dh_n, dc_n, x, W_ih, W_hh, b, h0, c0, peepholes, W_hr, lengths, reverse,
                  y, gates, c):
    return _present(_backward(dy, dh_n, dc_n, x, W_ih, W_hh, b, h0, c0, peepholes, W_hr, lengths,
                              reverse, y, _copy(gates), c), x)


@lstm_backward.register_fake
def _(dy, dh_n, dc_n, x, W_ih, W_hh, b, h0, c0, peepholes, W_hr, lengths, reverse, y, gates, c):
    (_, B, _), (H4, P) = x.shape, W_hh.shape
    shapes = (x.shape, W_ih.shape, W_hh.shape, (H4,), (B, P), (B, H4 // 4),
              (0,) if peepholes is None else peepholes.shape, (0,) if W_hr is None else W_hr.shape)
    return tuple(x.new_empty(shape) for shape in shapes)


# Their gradients ----------------------------------------------------------------------------------


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.reverse, _ = inputs
    y, _, _, gates, c = output
    ctx.save_for_backward(*tensors, y, gates, c)
    ctx.mark_non_differentiable(gates, c)
    ctx.set_materialize_grads(False)
    ctx.owns_tape = False


def _lstm_gradient(ctx, dy, dh_n, dc_n, *_):
    *cell, y, gates, c = ctx.saved_tensors
    if _is_plain(dy, dh_n, dc_n, gates) and not torch.is_grad_enabled():
        if not ctx.owns_tape or torch._C._autograd._get_current_graph_task_keep_graph():
            gates = _copy(gates)
        gradients = _backward(dy, dh_n, dc_n, *cell, ctx.reverse, y, gates, c)
    else:
        gradients = _lstm_backward(dy, dh_n, dc_n, *cell, ctx.reverse, y, gates, c)
    wanted = ctx.needs_input_grad[:_N_DIFFERENTIABLE]
    return (*(g if want else None for g, want in zip(gradients, wanted)), None, None, None)


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

        *cell, lengths, reverse, keep_tape = map(merge, range(len(args)), args, in_dims)
        keep_tape = keep_tape and lengths is None  # a ragged tape cannot be split by examples
        outputs = op(*cell, lengths, reverse, keep_tape)
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
_lstm_backward = _register(lstm_backward, save_for_double_backward, lstm_backward_gradient,
                           _one_by_one)
lstm.register_autocast("cpu", torch.float32)


# The short way ------------------------------------------------------------------------------------


def _is_plain(*tensors):
    """Whether these are ordinary tensors, and no transform, mode or tracer wants to see the call."""
    C = torch._C
    return (not torch.compiler.is_compiling()
            and not C._are_functorch_transforms_active()
            and not C._len_torch_dispatch_stack()
            and not C._len_torch_function_stack()
            and C._get_tracing_state() is None
            and all(t is None or (type(t) is Tensor or type(t) is Parameter) and t.is_cpu
                    and not C._functorch.is_legacy_batchedtensor(t) for t in tensors))


class _Eager(torch.autograd.Function):
    """`lstm` without its operator. Nobody sees its tape, so the backward pass may overwrite it."""

    @staticmethod
    def forward(ctx, *args):
        output = _forward(*args)
        _save_for_backward(ctx, args, output)
        ctx.owns_tape = True
        return output[:3]

    backward = staticmethod(_lstm_gradient)


def layer(x, W_ih, W_hh, b, h0, c0, peepholes, W_hr, lengths, reverse):
    """One layer in one direction: x (T,B,I) -> y (T,B,P), h_n (B,P), c_n (B,H).

    The arguments are those of functional.lstm_forward, as tensors.
    """
    tensors = x, W_ih, W_hh, b, h0, c0, peepholes, W_hr
    keep_tape = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if not _is_plain(*tensors, lengths) or torch.is_autocast_enabled("cpu"):
        return _lstm(*tensors, lengths, reverse, keep_tape)[:3]
    return (_Eager.apply if keep_tape else _forward)(*tensors, lengths, reverse, keep_tape)[:3]
