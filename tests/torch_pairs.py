"""What the tests of lstmcore.torch share: a torch.nn.LSTM and ours with the same weights."""

import pytest

torch = pytest.importorskip("torch")

import lstmcore.torch  # noqa: E402
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence  # noqa: E402

TOLERANCE = {torch.float64: dict(rtol=1e-10, atol=1e-12),  # same sums, another order
             torch.float32: dict(rtol=1e-4, atol=2e-5)}    # 4-ulp activations through 7 steps
T, B, I, H, P = 7, 5, 3, 6, 4
CONFIGS = {
    "plain": {},
    "no-bias": dict(bias=False),
    "stack-batch-first": dict(num_layers=3, batch_first=True),
    "bidirectional": dict(num_layers=2, bidirectional=True),
    "projected": dict(num_layers=2, bidirectional=True, proj_size=P, batch_first=True),
}
KINDS = ["batched", "unbatched", "packed", "packed-unsorted"]
IGNORED = [  # what torch warns of inside itself
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning")]


def pair(dtype=torch.float64, seed=0, **config):
    """A torch.nn.LSTM and an lstmcore.torch.LSTM with the same weights."""
    torch.manual_seed(seed)
    theirs = torch.nn.LSTM(I, H, dtype=dtype, **config)
    ours = lstmcore.torch.LSTM(I, H, dtype=dtype, **config)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def states(m, n=B):
    LD = m.num_layers * (2 if m.bidirectional else 1)
    dtype = m.weight_ih_l0.dtype
    return (torch.randn(LD, n, m.proj_size or H, dtype=dtype),
            torch.randn(LD, n, H, dtype=dtype))


def inputs(m, kind):
    x = torch.randn(T, B, I, dtype=m.weight_ih_l0.dtype)
    if kind == "unbatched":
        return x[:, 0].clone(), tuple(s[:, 0].clone() for s in states(m))
    if kind == "packed":
        return pack_padded_sequence(x, [7, 6, 6, 2, 1]), states(m)
    if kind == "packed-unsorted":
        return pack_padded_sequence(x, [2, 7, 1, 6, 6], enforce_sorted=False), states(m)
    return (x.transpose(0, 1).contiguous() if m.batch_first else x), states(m)


def flat(m, x, hx):
    """Every output of m, and the gradients of a random projection of them."""
    leaves = [p for p in m.parameters() if p.requires_grad]
    if isinstance(x, PackedSequence):
        data = x.data.detach().requires_grad_()
        x = PackedSequence(data, *x[1:])
    else:
        x = data = x.detach().requires_grad_()
    if hx is not None:
        hx = tuple(s.detach().requires_grad_() for s in hx)
        leaves += hx
    y, (h_n, c_n) = m(x, hx)
    outputs = [y.data if isinstance(y, PackedSequence) else y, h_n, c_n]
    torch.manual_seed(99)
    loss = sum((out * torch.randn(out.shape, dtype=out.dtype)).sum() for out in outputs)
    return outputs, torch.autograd.grad(loss, [data, *leaves])


def assert_close(got, expected, dtype=torch.float64):
    torch.testing.assert_close(got, expected, **TOLERANCE[dtype])
