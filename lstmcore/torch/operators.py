"""One layer in one direction as PyTorch operations: `layer`, and the operators under it.

`torch.ops.lstmcore.recurrent` and its gradient `torch.ops.lstmcore.recurrent_backward` are
registered with autograd, vmap and torch.compile. Their tensors are the kernels' arrays, without a
copy. What the forward pass saves for the backward pass, the gates and the cell state of every step,
are tensors too: autograd owns and frees them. What differs from cell to cell is in rows.py.

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
from lstmcore.torch.double_backward import backward_gradient, save_for_double_backward
from lstmcore.torch.rows import ARGUMENTS, ROWS

# _CELL are the arguments of functional.lstm_forward in its letters; x (T,B,I) -> y (T,B,P). cell
# names the row; what it has not is None, and (0,) among the results.
# gates and c are the tape: (T,B,G) and (T,B,H); of a ragged batch its real tokens, (N,G) and
# (N,H); without keep_tape both (0,), and the backward pass runs the forward pass once more.
# compute is the format of the products, None that of the tensors; "int8" packs in every call.

_CELL = ("Tensor x, Tensor W_ih, Tensor W_hh, Tensor? b, Tensor? h0, Tensor? c0, "
         "Tensor? peepholes, Tensor? W_hr, Tensor? lengths, bool reverse, str cell, str? compute")
_TAPE = "Tensor y, Tensor gates, Tensor c"
_UPSTREAM = "Tensor? dy, Tensor? dh_n, Tensor? dc_n"
_GRADIENTS = ("(Tensor dx, Tensor dW_ih, Tensor dW_hh, Tensor db, Tensor dh0, Tensor dc0, "
              "Tensor dpeepholes, Tensor dW_hr)")
_N_DIFFERENTIABLE = len(ARGUMENTS)      # of _CELL: all but lengths, reverse, cell and compute


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


def _joined(cell, b_ih, b_hh):
    """The kernels' one bias, differentiably."""
    return None if b_ih is None else ROWS[cell].joined(_floats(b_ih), _floats(b_hh), torch.cat)


def _run(x, W_ih, W_hh, b, h0, c0, peepholes, W_hr, lengths, reverse, cell, compute, keep_tape,
         frozen=None):
    """The forward function of a cell on tensors, and on b, an array: y, h_n, c_n, arrays, tape."""
    if frozen is None and compute == "int8":
        frozen = Frozen(False)
    if frozen is None:
        weights, packed = (*map(_array, (W_ih, W_hh, W_hr)),), None
    else:
        weights, packed = frozen.pack(cell, compute, W_ih, W_hh, W_hr)
    W_ih, W_hh, W_hr = weights
    return ROWS[cell].forward(
        _array(x), W_ih, W_hh, b, _array(h0), _array(c0), _array(peepholes), W_hr,
        dict(lengths=_array(lengths), reverse=reverse, keep_tape=keep_tape,
             n_threads=torch.get_num_threads(), packed=packed,
             compute=None if packed else compute))


def _run_backward(cell, tape, dy, dh_n, dc_n):
    """The backward function of a cell on tensors: gradients as arrays, in the order of _CELL."""
    dy = np.zeros_like(tape.y) if dy is None else _array(dy)
    return ROWS[cell].backward(tape, dy, _array(dh_n), _array(dc_n),
                               n_threads=torch.get_num_threads())


class Frozen:
    """Weights of one layer in one direction, packed for many calls. A copy or pickle is empty."""

    __slots__ = ("compare", "seen", "copies", "packed")

    def __init__(self, compare):
        self.compare, self.seen, self.copies, self.packed = compare, None, None, None

    def __reduce__(self):
        return Frozen, (self.compare,)

    def pack(self, cell, precision, *weights):
        """W_ih, W_hh and W_hr as arrays of its own, and packed: again, if they have changed.

        Tensors count versions, but not what is written through .data or NumPy: that only a
        comparison of all numbers sees.
        """
        given = [W for W in weights if W is not None]
        seen = [cell, precision, *((W.data_ptr(), 0 if W.is_inference() else W._version) for W in given)]
        if seen != self.seen or self.compare and not all(map(_same_bits, given, self.copies)):
            self.copies = [_raw(W).copy() for W in given]
            own = [raw if W.dtype in _COMPUTED else _array(W)
                   for raw, W in zip(self.copies, given)]
            own += [None] * (len(weights) - len(own))   # W_hr, which alone may be absent
            self.packed = own, functional.pack(cell, *own, precision=precision)
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


@_operator("recurrent", f"({_CELL}, bool keep_tape) -> "
                        "(Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor c)")
def recurrent(x, W_ih, W_hh, b, h0, c0, peepholes, W_hr, lengths, reverse, cell, compute,
              keep_tape):
    y, h_n, c_n, tape = _run(x, W_ih, W_hh, _array(b), h0, c0, peepholes, W_hr, lengths, reverse,
                             cell, compute, keep_tape)
    tokens = x.shape[:2] if lengths is None else (-1,)
    kept = [getattr(tape, name, None) for name in ("raw_gates", "raw_c")]
    gates, c = (None if raw is None else raw.reshape(*tokens, raw.shape[-1]) for raw in kept)
    return _present((y, h_n, c_n, gates, c), x)


@recurrent.register_fake
def _(x, W_ih, W_hh, b, h0, c0, peepholes, W_hr, lengths, reverse, cell, compute, keep_tape):
    row, (T, B, _), (rows, P) = ROWS[cell].kernels, x.shape, W_hh.shape
    H, absent = rows // row.fed, (0,)
    tape = [absent, absent]
    if keep_tape and row.keeps_gates:
        tokens = (T, B) if lengths is None else (torch.library.get_ctx().new_dynamic_size(),)
        tape = [(*tokens, row.gates * H), (*tokens, H) if row.has_c else absent]
    shapes = (T, B, P), (B, P), (B, H) if row.has_c else absent, *tape
    return tuple(x.new_empty(shape) for shape in shapes)


@_operator("recurrent_backward", f"({_UPSTREAM}, {_CELL}, {_TAPE}) -> {_GRADIENTS}")
def recurrent_backward(dy, dh_n, dc_n, x, W_ih, W_hh, b, h0, c0, peepholes, W_hr, lengths, reverse,
                       cell, compute, y, gates, c):
    row = ROWS[cell].kernels
    if row.keeps_gates and gates.dim() == 1:
        tape = _run(x, W_ih, W_hh, _array(b), h0, c0, peepholes, W_hr, lengths, reverse, cell,
                    compute, True)[-1]
    else:
        gates = gates.clone(memory_format=torch.contiguous_format)  # the kernels overwrite them
        tape = functional.tape_from(
            cell, x=_array(x), W_ih=_array(W_ih), W_hh=_array(W_hh), h0=_array(h0), c0=_array(c0),
            peepholes=_array(peepholes), W_hr=_array(W_hr), lengths=_array(lengths),
            reverse=reverse, y=_array(y),
            raw_gates=_array(gates.flatten(0, -2)) if row.keeps_gates else None,
            raw_c=_array(c.flatten(0, -2)) if row.has_c else None, compute=compute)
    return _present(_run_backward(cell, tape, dy, dh_n, dc_n), x)


@recurrent_backward.register_fake
def _(dy, dh_n, dc_n, x, W_ih, W_hh, b, h0, c0, peepholes, W_hr, lengths, reverse, cell, compute, y,
      gates, c):
    row, (_, B, _), (rows, P) = ROWS[cell].kernels, x.shape, W_hh.shape
    H, absent = rows // row.fed, (0,)
    shapes = (x.shape, W_ih.shape, W_hh.shape, (row.gates * H,), (B, P),
              (B, H) if row.has_c else absent, absent if peepholes is None else peepholes.shape,
              absent if W_hr is None else W_hr.shape)
    return tuple(x.new_empty(shape) for shape in shapes)


# Their gradients ----------------------------------------------------------------------------------


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.reverse, ctx.cell, ctx.compute, _ = inputs
    y, _, _, gates, c = output
    ctx.save_for_backward(*tensors, y, gates, c)
    ctx.mark_non_differentiable(gates, c)
    ctx.set_materialize_grads(False)


def _recurrent_gradient(ctx, dy, dh_n, dc_n, _dgates, _dc):
    *cell, y, gates, c = ctx.saved_tensors
    if not ROWS[ctx.cell].kernels.has_c:
        dc_n = None
    gradients = _recurrent_backward(dy, dh_n, dc_n, *cell, ctx.reverse, ctx.cell, ctx.compute, y,
                                    gates, c)
    wanted = ctx.needs_input_grad[:_N_DIFFERENTIABLE]
    return (*(g if want else None for g, want in zip(gradients, wanted)), *[None] * 5)


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
    """The batching rule of `recurrent`: with weights in common, the examples are just more rows."""
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

        *cell, lengths, reverse, name, compute, keep_tape = map(merge, range(len(args)), args,
                                                                in_dims)
        keep_tape = keep_tape and lengths is None  # a ragged tape cannot be split by examples
        outputs = op(*cell, lengths, reverse, name, compute, keep_tape)
        axes = tuple(axis if out.dim() > 1 else None for axis, out in zip((1, 0, 0, 1, 1), outputs))
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


_recurrent = _register(recurrent, _save_for_backward, _recurrent_gradient, _as_larger_batch)
_recurrent_backward = _register(recurrent_backward, save_for_double_backward, backward_gradient,
                                _one_by_one)


# The short way ------------------------------------------------------------------------------------


class _Eager(torch.autograd.Function):
    """`layer` for eager mode, without operators.

    It keeps the tape itself: nobody else sees it, so the backward pass may overwrite its gates. Of
    the tensors that it saves beside, autograd checks that nobody has changed them.
    """

    @staticmethod
    def forward(ctx, *args):
        *tensors, ctx.reverse, ctx.cell, ctx.compute = args
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
        gradients = run(ctx, saved, *upstream)
        return (*(g if want else None for g, want in zip(gradients, ctx.needs_input_grad)),
                None, None, None, None)


def _run_eager(x, W_ih, W_hh, b_ih, b_hh, h0, c0, peepholes, W_hr, lengths, reverse, cell, compute,
               keep_tape, frozen=None):
    b = b_ih
    if b is not None:
        b = ROWS[cell].joined(_array(b_ih), _array(b_hh), np.concatenate)
    y, h_n, c_n, tape = _run(x, W_ih, W_hh, b, _first(h0), _first(c0), peepholes, W_hr, lengths,
                             reverse, cell, compute, keep_tape, frozen)
    return (torch.from_numpy(y), torch.from_numpy(h_n[None]),
            None if c_n is None else torch.from_numpy(c_n[None]), tape)


def _eager_gradients(ctx, _, dy, dh_n, dc_n):
    """From the tape, which is spent unless autograd keeps the graph."""
    tape = ctx.tape
    if torch._C._autograd._get_current_graph_task_keep_graph():
        tape = tape.again()
    else:
        ctx.tape = None
    gradients = _stacked(_run_backward(ctx.cell, tape, dy, _first(dh_n), _first(dc_n)))
    return _parted(ctx.cell, [None if g is None else torch.from_numpy(g) for g in gradients])


def _operator_gradients(ctx, saved, dy, dh_n, dc_n):
    """From the operator, whose gradients are differentiable and can be batched."""
    x, W_ih, W_hh, b_ih, b_hh, h0, c0, peepholes, W_hr, lengths, y = saved
    b = _joined(ctx.cell, b_ih, b_hh)
    gates, c = (x.new_empty(0) if raw is None else torch.from_numpy(raw)
                for raw in (getattr(ctx.tape, name, None) for name in ("raw_gates", "raw_c")))
    gradients = _recurrent_backward(
        dy, _first(dh_n), _first(dc_n), x, W_ih, W_hh, b, _first(h0), _first(c0), peepholes, W_hr,
        lengths, ctx.reverse, ctx.cell, ctx.compute, y, gates, c)
    return _parted(ctx.cell, _stacked(gradients))


def _stacked(gradients):
    """Gradients in the order of `ARGUMENTS`, those of the states as `layer` has them, (1,B,·)."""
    *others, dh0, dc0, dpeepholes, dW_hr = gradients
    return *others, dh0[None], None if dc0 is None else dc0[None], dpeepholes, dW_hr


def _parted(cell, gradients):
    """Tensors in the order of `ARGUMENTS`, with those of both biases in the place of db."""
    dx, dW_ih, dW_hh, db, *others = gradients
    return dx, dW_ih, dW_hh, *ROWS[cell].parted(db), *others


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


def layer(x, W_ih, W_hh, b_ih, b_hh, h0, c0, peepholes, W_hr, lengths, reverse, cell, compute=None,
          frozen=None):
    """One layer in one direction: x (T,B,I) -> y (T,B,P), h_n (1,B,P), c_n (1,B,H) or None.

    The arguments are those of functional.lstm_forward, as tensors, but for PyTorch's two biases and
    its states (1,B,·), the name of the cell, and that compute may be "int8" where nothing has a
    gradient. Tensors below float32 give results in float32. frozen, a Frozen of its own, serves
    calls without gradients.
    """
    tensors = x, W_ih, W_hh, b_ih, b_hh, h0, c0, peepholes, W_hr, lengths
    keep_tape = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if keep_tape and compute == "int8":
        raise ValueError("a module frozen in int8 has no gradients: call it under "
                         "torch.inference_mode() or torch.no_grad(), or freeze(precision="
                         "'bfloat16')")
    plain = x.is_cpu and _is_plain(*tensors)
    if plain and not keep_tape:
        return _run_eager(*tensors, reverse, cell, compute, False, frozen)[:3]
    x, W_ih, W_hh, b_ih, b_hh, h0, c0, peepholes, W_hr, _ = tensors = [*map(_floats, tensors)]
    if plain:
        return _Eager.apply(*tensors, reverse, cell, compute)
    keep_tape = keep_tape and not torch.jit.is_tracing()  # a trace has no grad mode
    y, h_n, c_n, _, _ = _recurrent(
        x, W_ih, W_hh, _joined(cell, b_ih, b_hh), _first(h0), _first(c0), peepholes, W_hr, lengths,
        reverse, cell, compute, keep_tape)
    return y, h_n[None], c_n[None] if ROWS[cell].kernels.has_c else None
