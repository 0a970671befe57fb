"""The gradient of the gradient: the layer runs again, in PyTorch's own operations.

That is slow and needs much memory, and is the price of gradient penalties, Hessians and the like.
Products are of the tensors' own type here, also where those of the layer are of bfloat16.
"""

import torch

from lstmcore.torch.rows import ROWS


def _recurrence(x, W_ih, W_hh, b, h0, c0, peepholes, W_hr, lengths, reverse, cell):
    """The same layer in PyTorch's own operations, which can be differentiated any number of times.

    A row is frozen outside its own steps, so both directions visit the steps in plain order.
    """
    row = ROWS[cell].kernels
    T, B, _ = x.shape
    H, P = W_hh.shape[0] // row.fed, W_hh.shape[1]
    h = x.new_zeros(B, P) if h0 is None else h0
    c = x.new_zeros(B, H if row.has_c else 0) if c0 is None else c0
    peepholes = None if peepholes is None else peepholes.unbind()
    y = [None] * T
    if lengths is not None:
        alive = (torch.arange(T)[:, None] < lengths)[:, :, None]
        x = torch.where(alive, x, 0)  # whatever stands there: 0 times nan is nan
    for t in reversed(range(T)) if reverse else range(T):
        h_t, c_t = ROWS[cell].step(x[t], W_ih, W_hh, b, h, c, peepholes, W_hr)
        if lengths is None:
            y[t], h, c = h_t, h_t, c_t
        else:
            y[t] = torch.where(alive[t], h_t, 0)
            h, c = torch.where(alive[t], h_t, h), torch.where(alive[t], c_t, c)
    return torch.stack(y) if T else x.new_zeros(0, B, P), h, c


def save_for_double_backward(ctx, inputs, output):
    *tensors, ctx.reverse, ctx.cell, _, y, gates, c = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


@torch.autocast("cpu", enabled=False)
def backward_gradient(ctx, *dd):
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
            y_h_c = _recurrence(*args, lengths, ctx.reverse, ctx.cell)
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
    return (*result, *[None] * 7)
