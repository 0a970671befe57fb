"""One layer in one direction as PyTorch operations: `layer`, and the operators under it.

`torch.ops.lstmcore.lstm` and its gradient `torch.ops.lstmcore.lstm_backward` are registered with
autograd, vmap and torch.compile. Their tensors are the kernels' arrays, without a copy. What the
forward pass saves for the backward pass, the gates and the cell state of every step, are tensors
too: autograd owns and frees them.

The kernels know float32 and float64. `layer` converts bfloat16 to float32, whose products in the
format `compute` round it to itself again, and its results are float32 then.

A step through these operators costs 0.3 ms of Python, more than a small layer computes. So where
nothing but autograd wants to see a call, `layer` goes without them.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from lstmcore import functional
from lstmcore.torch.double_backward import lstm_backward_gradient, save_for_double_backward

# _CELL are the arguments of functional.lstm_forward in its letters; x (T,B,I) -> y (T,B,P).
# gates and c are the tape: (T,B,4H) and (T,B,H); of a ragged batch its real tokens, (N,4H) and
# (N,H); without keep_tape both (0,), and the backward pass runs the forward pass once more.
# compute is the format of the products, None that of the tensors; "int8" packs in every call.

_CELL = ("Tensor x, Tensor W_ih, Tensor W_hh, Tensor? b, Tensor? h0, Tensor? c0, "
         "Tensor? peepholes, Tensor? W_hr, Tensor? lengths, bool reverse, str? compute")
_TAPE = "Tensor y, Tensor gates, Tensor c"
_UPSTREAM = "Tensor? dy, Tensor? dh_n, Tensor? dc_n"
_GRADIENTS = ("(Tensor dx, Tensor dW_ih, Tensor dW_hh, Tensor db, Tensor dh0, Tensor dc0, "
              "Tensor dpeepholes, Tensor dW_hr)")
_N_DIFFERENTIABLE = 8  # of _CELL: all but lengths, reverse and compute


# Tensors as arrays --------------------------------------------------------------------------------


_COMPUTED = {torch.float32, torch.float64}


def _floats(tensor):
    """As the kernels take it, differentiably: float32 in place of bfloat16 and float16."""
    if tensor is None or tensor.dtype in _COMPUTED or not tensor.is_floating_point():
        return tensor
    return tensor.float()


def _array(tensor):
    """The tensor's memory as an array; only what is strided, negated or half as wide is copied."""
    return None if tensor is None else _floats(tensor).contiguous().numpy(force=True)


def _sum(b_ih, b_hh):
    return None if b_ih is None else _floats(b_ih) + _floats(b_hh)


def _run(x, W_ih, W_hh, b, h0, c0, peepholes, W_hr, lengths, reverse, compute, keep_tape,
         frozen=None):
    """functional.lstm_forward on tensors; the results are arrays."""
    if frozen is None and compute == "int8":
        frozen = Frozen(False)
    if frozen is None:
        weights, packed = (*map(_array, (W_ih, W_hh, W_hr)),), None
    else:
        weights, packed = frozen.pack(compute, W_ih, W_hh, W_hr)
    W_ih, W_hh, W_hr = weights
    return functional.lstm_forward(
        _array(x), W_ih, W_hh, _array(b), _array(h0), _array(c0), peepholes=_array(peepholes),
        W_hr=W_hr, lengths=_array(lengths), reverse=reverse, keep_tape=keep_tape,
        n_threads=torch.get_num_threads(), packed=packed, compute=None if packed else compute)


def _run_backward(tape, dy, dh_n, dc_n):
    """functional.lstm_backward on tensors: gradients as arrays, in the order of _CELL."""
    dy = np.zeros_like(tape.y) if dy is None else _array(dy)
    g = functional.lstm_backward(tape, dy, _array(dh_n), _array(dc_n),
                                 n_threads=torch.get_num_threads())
    return g.dx, g.dW_ih, g.dW_hh, g.db, g.dh0, g.dc0, g.dpeepholes, g.dW_hr


class Frozen:
    """Weights of one layer in one direction, packed for many calls. A copy or pickle is empty."""

    __slots__ = ("compare", "seen", "copies", "packed")

    def __init__(self, compare):
        self.compare, self.seen, self.copies, self.packed = compare, None, None, None

    def __reduce__(self):
        return Frozen, (self.compare,)

    def pack(self, precision, *weights):
        """W_ih, W_hh and W_hr as arrays of its own, and packed: again, if they have changed.

        Tensors count versions, but not what is written through .data or NumPy: that only a
        comparison of all numbers sees.
        """
        given = [W for W in weights if W is not None]
        seen = [precision, *((W.data_ptr(), 0 if W.is_inference() else W._version) for W in given)]
        if seen != self.seen or self.compare and not all(map(_same_bits, given, self.copies)):
            self.copies = [_raw(W).copy() for W in given]
            own = [raw if W.dtype in _COMPUTED else _array(W)
                   for raw, W in zip(self.copies, given)]
            own += [None] * (len(weights) - len(own))   # W_hr, which alone may be absent
            self.packed = own, functional.pack("lstm", *own, precision=precision)
            self.seen = seen
        return self.packed


def _raw(W):
    """A weight's memory as an array: bfloat16, which NumPy does not know, as int16."""
    return _array(W.view(torch.int16) if W.dtype is torch.bfloat16 else W)


def _same_bits(W, copy):
    """Whether a weight still is its copy, in every bit: a nan is equal to itself."""
    a = _raw(W)
    if (a.shape, a.dtype) != (copy.shape, copy.dtype):
        return False
    word = np.uint64 if a.nbytes % 8 == 0 else np.uint16
    return bool((a.reshape(-1).view(word) == copy.reshape(-1).view(word)).all())


# The operators ------------------------------------------------------------------------------------


def _operator(name, schema):
    return torch.library.custom_op("lstmcore::" + name, mutates_args=(), device_types="cpu",
                                   schema=schema)


def _present(arrays, like):
    """An operator's outputs: an empty tensor where there is none."""
    return tuple(like.new_empty(0) if array is None else torch.from_numpy(array)
                 for array in arrays)


@_operator("lstm", f"({_CELL}, bool keep_tape) -> "
                   "(Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor c)")
def lstm(x, W_ih, W_hh, b, h0, c0, peepholes, W_hr, lengths, reverse, compute, keep_tape):
    y, (h_n, c_n), tape = _run(x, W_ih, W_hh, b, h0, c0, peepholes, W_hr, lengths, reverse,
                               compute, keep_tape)
    if not keep_tape:
        return _present((y, h_n, c_n, None, None), x)
    tokens = x.shape[:2] if lengths is None else (-1,)
    gates, c = (raw.reshape(*tokens, raw.shape[-1]) for raw in (tape.raw_gates, tape.raw_c))
    return _present((y, h_n, c_n, gates, c), x)


@lstm.register_fake
def _(x, W_ih, W_hh, b, h0, c0, peepholes, W_hr, lengths, reverse, compute, keep_tape):
    (T, B, _), (H4, P) = x.shape, W_hh.shape
    outputs = x.new_empty(T, B, P), x.new_empty(B, P), x.new_empty(B, H4 // 4)
    if not keep_tape:
        return *outputs, x.new_empty(0), x.new_empty(0)
    tokens = (T, B) if lengths is None else (torch.library.get_ctx().new_dynamic_size(),)
    return *outputs, x.new_empty(*tokens, H4), x.new_empty(*tokens, H4 // 4)


@_operator("lstm_backward", f"({_UPSTREAM}, {_CELL}, {_TAPE}) -> {_GRADIENTS}")
def lstm_backward(dy, dh_n, dc_n, x, W_ih, W_hh, b, h0, c0, peepholes, W_hr, lengths, reverse,
                  compute, y, gates, c):
    if gates.dim() == 1:
        tape = _run(x, W_ih, W_hh, b, h0, c0, peepholes, W_hr, lengths, reverse, compute, True)[2]
    else:
        gates = gates.clone(memory_format=torch.contiguous_format)  # the kernels overwrite them
        tape = functional.tape_from(
            x=_array(x), W_ih=_array(W_ih), W_hh=_array(W_hh), h0=_array(h0), c0=_array(c0),
            peepholes=_array(peepholes), W_hr=_array(W_hr), lengths=_array(lengths),
            reverse=reverse, y=_array(y), raw_gates=_array(gates.flatten(0, -2)),
            raw_c=_array(c.flatten(0, -2)), compute=compute)
    return _present(_run_backward(tape, dy, dh_n, dc_n), x)


@lstm_backward.register_fake
def _(dy, dh_n, dc_n, x, W_ih, W_hh, b, h0, c0, peepholes, W_hr, lengths, reverse, compute, y,
      gates, c):
    (_, B, _), (H4, P) = x.shape, W_hh.shape
    shapes = (x.shape, W_ih.shape, W_hh.shape, (H4,), (B, P), (B, H4 // 4),
              (0,) if peepholes is None else peepholes.shape, (0,) if W_hr is None else W_hr.shape)
    return tuple(x.new_empty(shape) for shape in shapes)


# Their gradients ----------------------------------------------------------------------------------


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.reverse, ctx.compute, _ = inputs
    y, _, _, gates, c = output
    ctx.save_for_backward(*tensors, y, gates, c)
    ctx.mark_non_differentiable(gates, c)
    ctx.set_materialize_grads(False)


def _lstm_gradient(ctx, dy, dh_n, dc_n, _dgates, _dc):
    *cell, y, gates, c = ctx.saved_tensors
    gradients = _lstm_backward(dy, dh_n, dc_n, *cell, ctx.reverse, ctx.compute, y, gates, c)
    wanted = ctx.needs_input_grad[:_N_DIFFERENTIABLE]
    return (*(g if want else None for g, want in zip(gradients, wanted)), *[None] * 4)


# vmap and registration ---------------------------------------------------------------------------


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

        *cell, lengths, reverse, compute, keep_tape = map(merge, range(len(args)), args, in_dims)
        keep_tape = keep_tape and lengths is None  # a ragged tape cannot be split by examples
        outputs = op(*cell, lengths, reverse, compute, keep_tape)
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


# The short way ------------------------------------------------------------------------------------


class _Eager(torch.autograd.Function):
    """`layer` for eager mode, without operators.

    It keeps the tape itself: nobody else sees it, so the backward pass may overwrite its gates. Of
    the tensors that it saves beside, autograd checks that nobody has changed them.
    """

    @staticmethod
    def forward(ctx, *args):
        *tensors, ctx.reverse, ctx.compute = args
        y, h_n, c_n, ctx.tape = _run_eager(*args, True)
        ctx.save_for_backward(*tensors, y)
        ctx.set_materialize_grads(False)
        return y, h_n, c_n

    @staticmethod
    def backward(ctx, *upstream):
        saved = ctx.saved_tensors
        alone = (_is_plain(*upstream) and not torch.is_grad_enabled()
                 and not any(map(_is_batched, upstream)))
        run = _eager_gradients if alone else _operator_gradients
        dx, dW_ih, dW_hh, db, dh0, dc0, dpeepholes, dW_hr = run(ctx, saved, *upstream)
        gradients = dx, dW_ih, dW_hh, db, db, dh0, dc0, dpeepholes, dW_hr
        return (*(g if want else None for g, want in zip(gradients, ctx.needs_input_grad)),
                None, None, None)


def _run_eager(x, W_ih, W_hh, b_ih, b_hh, h0, c0, peepholes, W_hr, lengths, reverse, compute,
               keep_tape, frozen=None):
    y, (h_n, c_n), tape = _run(x, W_ih, W_hh, _sum(b_ih, b_hh), _first(h0), _first(c0), peepholes,
                               W_hr, lengths, reverse, compute, keep_tape, frozen)
    return torch.from_numpy(y), torch.from_numpy(h_n[None]), torch.from_numpy(c_n[None]), tape


def _eager_gradients(ctx, _, dy, dh_n, dc_n):
    """From the tape, which is spent unless autograd keeps the graph."""
    tape = ctx.tape
    if torch._C._autograd._get_current_graph_task_keep_graph():
        tape = tape.again()
    else:
        ctx.tape = None
    dx, dW_ih, dW_hh, db, dh0, dc0, dpeepholes, dW_hr = _run_backward(
        tape, dy, _first(dh_n), _first(dc_n))
    return (torch.from_numpy(g) if g is not None else None
            for g in (dx, dW_ih, dW_hh, db, dh0[None], dc0[None], dpeepholes, dW_hr))


def _operator_gradients(ctx, saved, dy, dh_n, dc_n):
    """From the operator, whose gradients are differentiable and can be batched."""
    x, W_ih, W_hh, b_ih, b_hh, h0, c0, peepholes, W_hr, lengths, y = saved
    b = _sum(b_ih, b_hh)
    gates, c = torch.from_numpy(ctx.tape.raw_gates), torch.from_numpy(ctx.tape.raw_c)
    dx, dW_ih, dW_hh, db, dh0, dc0, dpeepholes, dW_hr = _lstm_backward(
        dy, _first(dh_n), _first(dc_n), x, W_ih, W_hh, b, _first(h0), _first(c0), peepholes, W_hr,
        lengths, ctx.reverse, ctx.compute, y, gates, c)
    return dx, dW_ih, dW_hh, db, dh0[None], dc0[None], dpeepholes, dW_hr


def _first(states):
    return None if states is None else states[0]


_PLAIN = {Tensor, Parameter, type(None)}


def _is_plain(*tensors):
    """Whether these are ordinary tensors, and no transform, mode, hook or tracer sees the call."""
    C = torch._C
    return (not torch.compiler.is_compiling()
            and {*map(type, tensors)} <= _PLAIN
            and not C._are_functorch_transforms_active()
            and not C._len_torch_dispatch_stack()
            and not C._len_torch_function_stack()
            and C._autograd._top_saved_tensors_default_hooks(False) is None
            and C._get_tracing_state() is None)


def _is_batched(tensor):
    """Whether it is what autograd.grad(is_grads_batched=True) makes of a gradient."""
    return tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor)


def layer(x, W_ih, W_hh, b_ih, b_hh, h0, c0, peepholes, W_hr, lengths, reverse, compute=None,
          frozen=None):
    """One layer in one direction: x (T,B,I) -> y (T,B,P), h_n (1,B,P), c_n (1,B,H).

    The arguments are those of functional.lstm_forward, as tensors, but for PyTorch's two biases and
    its states (1,B,·), and that compute may be "int8" where nothing has a gradient. Tensors below
    float32 give results in float32. frozen, a Frozen of its own, serves calls without gradients.
    """
    tensors = x, W_ih, W_hh, b_ih, b_hh, h0, c0, peepholes, W_hr, lengths
    keep_tape = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if keep_tape and compute == "int8":
        raise ValueError("lstmcore.torch.LSTM frozen in int8 has no gradients: call it under "
                         "torch.inference_mode() or torch.no_grad(), or freeze(precision="
                         "'bfloat16')")
    plain = x.is_cpu and _is_plain(*tensors)
    if plain and not keep_tape:
        return _run_eager(*tensors, reverse, compute, False, frozen)[:3]
    x, W_ih, W_hh, b_ih, b_hh, h0, c0, peepholes, W_hr, _ = tensors = [*map(_floats, tensors)]
    if plain:
        return _Eager.apply(*tensors, reverse, compute)
    keep_tape = keep_tape and not torch.jit.is_tracing()  # a trace has no grad mode
    y, h_n, c_n, _, _ = _lstm(x, W_ih, W_hh, _sum(b_ih, b_hh), _first(h0), _first(c0), peepholes,
                              W_hr, lengths, reverse, compute, keep_tape)
    return y, h_n[None], c_n[None]
