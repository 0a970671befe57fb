"""PyTorch as a second oracle: torch.nn.LSTM, GRU and RNN, dense and packed, against the kernels."""

import numpy as np
import pytest
from problems import gru_problem, lstm_problem, rnn_problem

from lstmcore import functional

torch = pytest.importorskip("torch")


def shapes(seed, count):
    """Random sizes; all drawn from one stream, so that they are distinct problems."""
    rng = np.random.default_rng(seed)
    return [tuple(int(n) for n in (rng.integers(1, 30), rng.integers(1, 20), rng.integers(1, 60),
                                   rng.integers(1, 80))) for _ in range(count)]


def torch_layer(layer, problem):
    """The layer with the problem's weights; PyTorch's second bias is zero, but for b_hn of a GRU."""
    inputs, dtype = problem.inputs, problem.inputs["x"].dtype
    weights = {"weight_ih_l0": inputs["W_ih"], "weight_hh_l0": inputs["W_hh"],
               "bias_ih_l0": inputs["b"][:len(inputs["W_ih"])]}
    weights["bias_hh_l0"] = np.zeros_like(weights["bias_ih_l0"])
    if problem.kind == "gru":
        weights["bias_hh_l0"][-len(inputs["W_hh"][0]):] = inputs["b"][len(inputs["W_ih"]):]
    if inputs.get("W_hr") is not None:
        weights["weight_hr_l0"] = inputs["W_hr"]
    layer = layer.to(getattr(torch, str(dtype)))
    layer.load_state_dict({n: torch.tensor(w) for n, w in weights.items()})
    return layer


def run_torch(layer, problem):
    """y, states and gradients by name, as torch computes them."""
    lengths = problem.options["lengths"]
    x = torch.tensor(problem.inputs["x"], requires_grad=True)
    states = [torch.tensor(problem.inputs[n][None], requires_grad=True)
              for n in ("h0", "c0") if n in problem.inputs]
    given = tuple(states) if problem.kind == "lstm" else states[0]
    if lengths is None:
        y, state = layer(x, given)
    else:
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths),
                                                         enforce_sorted=False)
        packed, state = layer(packed, given)
        y, _ = torch.nn.utils.rnn.pad_packed_sequence(packed, total_length=len(x))
    finals = list(state) if problem.kind == "lstm" else [state]
    upstream = [torch.tensor(u) for u in problem.upstream.values()]
    loss = sum((u * r.squeeze(0) if n else u * r).sum()
               for n, (u, r) in enumerate(zip(upstream, [y, *finals])))
    loss.backward()
    found = {"y": y, "dx": x.grad, **dict(zip(("h_n", "c_n"), [s[0] for s in finals])),
             **dict(zip(("dh0", "dc0"), [s.grad[0] for s in states])),
             "dW_ih": layer.weight_ih_l0.grad, "dW_hh": layer.weight_hh_l0.grad,
             "db": layer.bias_ih_l0.grad}
    if problem.kind == "gru":
        found["db"] = torch.cat([found["db"], layer.bias_hh_l0.grad[2 * layer.hidden_size:]])
    if getattr(layer, "proj_size", 0):
        found["dW_hr"] = layer.weight_hr_l0.grad
    return {n: v.detach().numpy() for n, v in found.items()}


def compare(layer, problem, close):
    want = run_torch(torch_layer(layer, problem), problem)
    run = getattr(functional, problem.kind + "_forward")
    y, state, tape = run(**problem.inputs, **problem.options)
    state = state if problem.kind == "lstm" else (state,)
    g = getattr(functional, problem.kind + "_backward")(tape, **problem.upstream)
    got = {"y": y, **dict(zip(("h_n", "c_n"), state)), **g._asdict()}
    for name, array in want.items():
        close(got[name], array, "torch", name)


def lengths_for(shape, ragged, seed):
    """PyTorch packs sequences of at least one step."""
    T, B = shape[:2]
    return np.random.default_rng(seed).integers(1, T + 1, B) if ragged else None


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize("shape", shapes(40, 8), ids=lambda s: "x".join(map(str, s)))
def test_lstm(shape, ragged, dtype, close):
    T, B, I, H = shape
    problem = lstm_problem(T, B, I, H, lengths=lengths_for(shape, ragged, 41), dtype=dtype, seed=42)
    compare(torch.nn.LSTM(I, H), problem, close)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize("shape", shapes(43, 3), ids=lambda s: "x".join(map(str, s)))
def test_projected_lstm(shape, ragged, dtype, close):
    T, B, I, H = shape
    H += 3
    problem = lstm_problem(T, B, I, H, P=H - 2, lengths=lengths_for(shape, ragged, 44), dtype=dtype,
                           seed=45)
    compare(torch.nn.LSTM(I, H, proj_size=H - 2), problem, close)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize("shape", shapes(46, 3), ids=lambda s: "x".join(map(str, s)))
def test_rnn(shape, ragged, nonlinearity, dtype, close):
    T, B, I, H = shape
    problem = rnn_problem(T, B, I, H, lengths=lengths_for(shape, ragged, 47), dtype=dtype,
                          nonlinearity=nonlinearity, seed=48)
    compare(torch.nn.RNN(I, H, nonlinearity=nonlinearity), problem, close)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize("shape", shapes(51, 6), ids=lambda s: "x".join(map(str, s)))
def test_gru(shape, ragged, dtype, close):
    T, B, I, H = shape
    problem = gru_problem(T, B, I, H, lengths=lengths_for(shape, ragged, 52), dtype=dtype, seed=53)
    compare(torch.nn.GRU(I, H), problem, close)


@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
def test_reverse_is_the_backward_direction(ragged, close):
    """The second half of a bidirectional layer's output, in the place of each step."""
    T, B, I, H = 7, 5, 6, 9
    problem = lstm_problem(T, B, I, H, lengths=lengths_for((T, B), ragged, 49), reverse=True, seed=50)
    layer = torch.nn.LSTM(I, H, bidirectional=True).to(torch.float64)
    given = {"weight_ih": "W_ih", "weight_hh": "W_hh", "bias_ih": "b"}
    weights = {f"{n}_l0{way}": torch.tensor(problem.inputs[key])
               for n, key in given.items() for way in ("", "_reverse")}
    zeros = torch.zeros(4 * H, dtype=torch.float64)
    layer.load_state_dict({**weights, "bias_hh_l0": zeros, "bias_hh_l0_reverse": zeros})
    states = tuple(torch.tensor(np.stack([problem.inputs[n]] * 2)) for n in ("h0", "c0"))
    x, lengths = torch.tensor(problem.inputs["x"]), problem.options["lengths"]
    if ragged:
        x = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    with torch.no_grad():
        want, (h_n, c_n) = layer(x, states)
    if ragged:
        want, _ = torch.nn.utils.rnn.pad_packed_sequence(want, total_length=T)
    y, got, _ = functional.lstm_forward(**problem.inputs, **problem.options)
    close((y, got), (want[..., H:].numpy(), (h_n[1].numpy(), c_n[1].numpy())), "torch")
