"""What the tests of lstmcore.torch share: a module of torch.nn and ours with the same weights."""

import pytest

torch = pytest.importorskip("torch")

import lstmcore.torch  # noqa: E402
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence  # noqa: E402

TOLERANCE = {torch.float64: dict(rtol=1e-10, atol=1e-12),  # same sums, another order
             torch.float32: dict(rtol=1e-4, atol=2e-5)}    # 4-ulp activations through 7 steps
T, B, I, H, P = 7, 5, 3, 6, 4
LAYERS = {"LSTM": {}, "GRU": dict(cls="GRU"), "tanh": dict(cls="RNN"),
          "relu": dict(cls="RNN", nonlinearity="relu")}
CELLS = {"LSTMCell": dict(cls="LSTMCell"), "GRUCell": dict(cls="GRUCell"),
         "tanh-cell": dict(cls="RNNCell"), "relu-cell": dict(cls="RNNCell", nonlinearity="relu")}
MODULES = LAYERS | CELLS
CONFIGS = {
    "plain": {},
    "no-bias": dict(bias=False),
    "stack-batch-first": dict(num_layers=3, batch_first=True),
    "bidirectional": dict(num_layers=2, bidirectional=True),
}
LAYER_CONFIGS = {f"{layer}-{name}": LAYERS[layer] | config
                 for layer in LAYERS for name, config in CONFIGS.items()}
LAYER_CONFIGS["LSTM-projected"] = dict(num_layers=2, bidirectional=True, proj_size=P,
                                       batch_first=True)
CELL_CONFIGS = {f"{cell}-{name}": CELLS[cell] | CONFIGS[name]
                for cell in CELLS for name in ("plain", "no-bias")}
KINDS = ["batched", "unbatched", "packed", "packed-unsorted"]
# every module in every configuration, with the kinds of input that it takes
EVERYTHING = [pytest.param(config, kind, id=f"{name}-{kind}")
              for configs, kinds in ((LAYER_CONFIGS, KINDS), (CELL_CONFIGS, KINDS[:2]))
              for name, config in configs.items() for kind in kinds]
IGNORED = [  # what torch warns of inside itself
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning")]


def build(where, config, **options):
    """A module of `where`, torch.nn or lstmcore.torch; config["cls"] names its class."""
    cls, config = config.get("cls", "LSTM"), {k: v for k, v in config.items() if k != "cls"}
    return getattr(where, cls)(I, H, **config, **options)


def pair(dtype=torch.float64, seed=0, **config):
    """A module of torch.nn, an LSTM unless cls says another, and ours with the same weights."""
    torch.manual_seed(seed)
    theirs, ours = (build(where, config, dtype=dtype) for where in (torch.nn, lstmcore.torch))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def is_cell(m):
    return isinstance(m, torch.nn.RNNCellBase)


def weight(m, name="hh"):
    """A weight of the first layer."""
    return getattr(m, f"weight_{name}" if is_cell(m) else f"weight_{name}_l0")


def parts(state):
    """A state as a tuple of tensors: (h, c), (h,) or ()."""
    return () if state is None else state if isinstance(state, tuple) else (state,)


def whole(m, tensors):
    """The tensors of `parts` as m takes them."""
    return None if not tensors else tuple(tensors) if isinstance(
        m, torch.nn.LSTM | torch.nn.LSTMCell) else tensors[0]


def states(m, n=B):
    LD = () if is_cell(m) else (m.num_layers * (2 if m.bidirectional else 1),)
    dtype, P = weight(m).dtype, getattr(m, "proj_size", 0) or H
    has_c = isinstance(m, torch.nn.LSTM | torch.nn.LSTMCell)
    return whole(m, [torch.randn(*LD, n, width, dtype=dtype) for width in (P, H)[:1 + has_c]])


def inputs(m, kind):
    dtype = weight(m).dtype
    x = torch.randn(*() if is_cell(m) else (T,), B, I, dtype=dtype)
    if kind == "unbatched":
        return x[..., 0, :].clone(), whole(m, [s[..., 0, :].clone() for s in parts(states(m))])
    if kind == "packed":
        return pack_padded_sequence(x, [7, 6, 6, 2, 1]), states(m)
    if kind == "packed-unsorted":
        return pack_padded_sequence(x, [2, 7, 1, 6, 6], enforce_sorted=False), states(m)
    batch_first = getattr(m, "batch_first", False)
    return (x.transpose(0, 1).contiguous() if batch_first else x), states(m)


def called(m, x, hx=None):
    """Every output of m as one list: y of a layer, packed or not, and the states."""
    out = m(x, hx)
    if is_cell(m):
        return list(parts(out))
    y, state = out
    return [y.data if isinstance(y, PackedSequence) else y, *parts(state)]


def leaves(m, x, hx):
    """x, hx with leaves of their own that want gradients, and these: of x, the states, m."""
    data = (x.data if isinstance(x, PackedSequence) else x).detach().requires_grad_()
    x = PackedSequence(data, *x[1:]) if isinstance(x, PackedSequence) else data
    own = [s.detach().requires_grad_() for s in parts(hx)]
    return x, whole(m, own), [data, *own, *(p for p in m.parameters() if p.requires_grad)]


def flat(m, x, hx):
    """Every output of m, and the gradients of a random projection of them."""
    x, hx, wanted = leaves(m, x, hx)
    outputs = called(m, x, hx)
    torch.manual_seed(99)
    loss = sum((out * torch.randn(out.shape, dtype=out.dtype)).sum() for out in outputs)
    return outputs, torch.autograd.grad(loss, wanted)


def assert_close(got, expected, dtype=torch.float64):
    torch.testing.assert_close(got, expected, **TOLERANCE[dtype])
