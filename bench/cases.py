"""The named cases, the random data of a case, and the answer that every library must give.

A case is a size (T steps, B rows, I inputs, H units, L layers) and what is special about it. Its
data depend on its name alone. The answer comes from `lstmcore.reference` in float64, which stands
apart from all that is measured. Nothing here times anything or knows another library.
"""

import zlib
from collections import namedtuple
from dataclasses import dataclass, replace

import numpy as np

from lstmcore import reference

TOLERANCE = {  # largest error, relative to the largest magnitude of the array
    "float32": 3e-4,  # sums of up to 6,400 rows and 200 steps in float32, in any order
    "float64": 1e-10,
}
BELOW = {  # root mean square error, relative to the array's: confused gates or scales give 1
    "bfloat16": 0.1,
    "int8": 0.3,
}
GATES = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}     # of H rows of the weights, by the cell
Errors = namedtuple("Errors", "largest rms")  # each of the worst array, relative as above


def _rng(name):
    return np.random.default_rng(zlib.crc32(name.encode()))


@dataclass(frozen=True)
class Case:
    """One size; `lengths` is the (shortest, longest) of a ragged batch, `V` adds an embedding
    before and a softmax over V words behind, `D` is 2 when bidirectional; `weights` are "uniform",
    as they are before training, or "trained": see `trained_weights`; `cell` is one of GATES."""

    name: str
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    L: int
    origin: str
    D: int = 1
    lengths: tuple = None
    V: int = 0
    peepholes: bool = False
    dtype: str = "float32"
    weights: str = "uniform"
    cell: str = "lstm"

    @property
    def sizes(self):
        """T, B, I, H, L as a table shows them."""
        return f"{self.T}, {self.B}, {self.I}, {self.H}, {self.L}" + (" ×2" if self.D == 2 else "")

    def row_lengths(self):
        """The (B,) lengths of a ragged batch (the longest is T), or None."""
        if self.lengths is None:
            return None
        lengths = _rng(self.name).integers(self.lengths[0], self.lengths[1] + 1, self.B)
        lengths[0] = self.lengths[1]
        return np.minimum(lengths, self.T)

    def tokens(self):
        """Steps that are computed: T·B, or the sum of the lengths."""
        return self.T * self.B if self.lengths is None else int(self.row_lengths().sum())

    def flops(self, job):
        """Multiplications and additions of the matrix products; activations are not counted."""
        per_token = 2 * self.H * self.V
        for layer in range(self.L):
            per_token += self.D * 2 * GATES[self.cell] * self.H * (self.inputs(layer) + self.H)
        return per_token * self.tokens() * (3 if job == "train" else 1)

    def inputs(self, layer):
        """The number of inputs of a layer."""
        return self.I if layer == 0 else self.D * self.H

    def parts(self):
        """(layer, suffix, reverse) of every layer and direction, in torch's names and order."""
        return [(layer, f"_l{layer}" + "_reverse" * d, d == 1)
                for layer in range(self.L) for d in range(self.D)]

    def short(self):
        """The same case, cut to a few steps: to verify, not to time."""
        return replace(self, T=min(self.T, 4), V=min(self.V, 50))


DENSE = (
    Case("ptb-medium", 35, 20, 650, 650, 2, "word model of Zaremba et al. 2014, medium"),
    Case("char-rnn", 50, 50, 128, 128, 2, "the char-rnn defaults"),
    Case("char-512", 100, 64, 128, 512, 1, "one layer of a larger character model"),
    Case("small", 50, 256, 64, 64, 1, "many short windows of sensor data"),
    Case("big", 50, 128, 1024, 1024, 1, "one layer of a translation or speech model"),
    Case("seq-b1", 100, 1, 512, 512, 1, "one sequence alone, offline"),
    Case("tiny", 20, 8, 16, 32, 1, "a teaching example: call overhead counts"),
)
STREAM = Case("stream", 1, 1, 256, 256, 1, "one step at a time, as samples arrive")
RAGGED = (
    Case("ragged", 200, 64, 128, 256, 1, "sentences, lengths uniform in 5..200", lengths=(5, 200)),
    Case("sentiment", 400, 32, 300, 256, 1, "reviews, bidirectional, lengths uniform in 20..400",
         D=2, lengths=(20, 400)),
)
WORDLM = Case("wordlm", 35, 20, 200, 200, 2, "word model with a softmax over 10,000 words",
              V=10_000)
PEEPHOLES = replace(DENSE[2], name="char-512-peep", peepholes=True,
                    origin="char-512 with peepholes")
EVEN = Case("even", RAGGED[0].tokens() // 64, 64, 128, 256, 1, "dense, as many tokens as ragged")
CASES = {case.name: case for case in (*DENSE, STREAM, *RAGGED, WORDLM, PEEPHOLES, EVEN)}
STREAM_STEPS = 20  # steps that are verified, and inputs that are cycled through


def make_data(case, job):
    """The arrays of a case by name: torch's weight names, x, dy, lengths, tokens, targets."""
    rng = _rng(case.name)

    def draw(*shape, scale=1.0):
        return rng.uniform(-scale, scale, shape).astype(case.dtype)

    data, bound, rows = {}, case.H**-0.5, GATES[case.cell] * case.H
    for layer, suffix, _ in case.parts():
        if case.weights == "trained":
            data |= trained_weights(case, layer, suffix, rng)
            continue
        data["weight_ih" + suffix] = draw(rows, case.inputs(layer), scale=bound)
        data["weight_hh" + suffix] = draw(rows, case.H, scale=bound)
        data["bias" + suffix] = draw(rows, scale=bound)
        if case.peepholes:
            data["weight_peephole" + suffix] = draw(3, case.H, scale=bound)
    T = STREAM_STEPS if job == "stream" else case.T
    if case.V:
        data["embedding"] = draw(case.V, case.I)
        data["linear_weight"], data["linear_bias"] = draw(case.V, case.H, scale=bound), draw(case.V)
        data["tokens"], data["targets"] = rng.integers(0, case.V, (2, T, case.B))
    else:
        data["x"], data["dy"] = draw(T, case.B, case.I), draw(T, case.B, case.D * case.H)
    if case.lengths is not None:
        data["lengths"] = case.row_lengths()
        real = np.arange(T)[:, None, None] < data["lengths"][:, None]
        data["x"], data["dy"] = data["x"] * real, data["dy"] * real
    return data


def trained_weights(case, layer, suffix, rng):
    """Random weights of one layer that are as hard on a number format as trained ones.

    Entries are normal times log-normal, rows differ in size (kurtosis about 6); the sums that go
    into a gate have a spread of 1 from the input and 0.4 from h; forget gates are biased by 1.
    Measured on eight rows of each case: max |h| from 0.94 to 0.98, 1 to 3 % of the gates within
    0.05 of an end, and h in float32 differs from float64 by 1.6e-6 at most: rounding is not blown
    up by chaos over the steps.
    """
    def heavy(columns, spread):
        a = rng.standard_normal((4 * case.H, columns))
        a *= np.exp(0.35 * rng.standard_normal(a.shape) + 0.25 * rng.standard_normal((len(a), 1)))
        return (a * (spread / np.sqrt(columns * (a * a).mean()))).astype(case.dtype)

    square_of_x, square_of_h = 1 / 3, 0.15  # means of uniform numbers, and of h in these layers
    b = 0.5 * rng.standard_normal(4 * case.H)
    b[case.H:2 * case.H] += 1
    return {"weight_ih" + suffix: heavy(case.inputs(layer),
                                        (square_of_h if layer else square_of_x)**-0.5),
            "weight_hh" + suffix: heavy(case.H, 0.4 * square_of_h**-0.5),
            "bias" + suffix: b.astype(case.dtype)}


def expected(case, job, data):
    """What every library must return: y, h_n, c_n; in training also dx and "d" + weight's name.

    c_n is the LSTM's alone; the bias of a GRU is what its three gates have, without the one beside h.

    With a vocabulary: loss, and the gradients of all weights.
    """
    data = {name: a.astype(np.float64) if a.dtype.kind == "f" else a for name, a in data.items()}
    x = data["embedding"][data["tokens"]] if case.V else data["x"]
    y, final, tapes = _stack_forward(case, data, x)
    answer = {} if case.V else {"y": y, **dict(zip(("h_n", "c_n"), final))}
    if job == "train":
        dy = data["dy"] if not case.V else _softmax_head(data, y, answer)
        dx = _stack_backward(case, tapes, dy, answer)
        if case.V:
            answer["dembedding"] = np.zeros_like(data["embedding"])
            np.add.at(answer["dembedding"], data["tokens"], dx)
        else:
            answer["dx"] = dx
    return answer


def _stack_forward(case, data, x):
    finals, tapes, outputs = [], [], []
    for _, suffix, reverse in case.parts():
        weights = data["weight_ih" + suffix], data["weight_hh" + suffix], data["bias" + suffix]
        options = dict(lengths=data.get("lengths"), reverse=reverse)
        if case.cell == "lstm":
            y, final, tape = reference.lstm_forward(
                x, *weights, peepholes=data.get("weight_peephole" + suffix), **options)
        elif case.cell == "gru":
            b = np.append(weights[2], np.zeros(case.H))
            y, final, tape = reference.gru_forward(x, *weights[:2], b, **options)
        else:
            y, final, tape = reference.rnn_forward(x, *weights, nonlinearity=case.cell, **options)
        finals.append(final if case.cell == "lstm" else (final,))
        tapes.append(tape), outputs.append(y)
        if len(outputs) == case.D:  # both directions are there: they are the next layer's input
            x, outputs = np.concatenate(outputs, axis=2), []
    return x, [np.stack(state) for state in zip(*finals)], tapes


def _stack_backward(case, tapes, dy, answer):
    dx = 0
    for (_, suffix, reverse), tape in reversed(list(zip(case.parts(), tapes))):
        half = slice(case.H, None) if reverse else slice(case.H)
        backward = {"lstm": reference.lstm_backward, "gru": reference.gru_backward}.get(
            case.cell, reference.rnn_backward)
        g = backward(tape, dy[:, :, half])
        answer |= {"dweight_ih" + suffix: g.dW_ih, "dweight_hh" + suffix: g.dW_hh,
                   "dbias" + suffix: g.db[:GATES[case.cell] * case.H]}
        if case.peepholes:
            answer["dweight_peephole" + suffix] = g.dpeepholes
        dx = dx + g.dx
        if not reverse:  # the forward direction comes last: both have given their part
            dy, dx_of_layer, dx = dx, dx, 0
    return dx_of_layer


def _softmax_head(data, y, answer):
    """The mean cross-entropy of y W_outᵀ + b_out, its gradients into answer, and its dy."""
    logits = y @ data["linear_weight"].T + data["linear_bias"]
    logits -= logits.max(axis=2, keepdims=True)
    p = np.exp(logits)
    p /= p.sum(axis=2, keepdims=True)
    t, b = np.indices(data["targets"].shape)
    answer["loss"] = -np.log(p[t, b, data["targets"]]).mean()
    p[t, b, data["targets"]] -= 1
    dlogits = p / data["targets"].size
    answer["dlinear_weight"] = np.einsum("tbv,tbh->vh", dlogits, y, optimize=True)
    answer["dlinear_bias"] = dlogits.sum(axis=(0, 1))
    return dlogits @ data["linear_weight"]


def errors(got, answer):
    """The Errors of all arrays: the largest, and the root mean square of the worst array."""
    if missing := set(answer) - set(got):
        raise ValueError(f"missing results: {sorted(missing)}")
    largest = rms = 0.0
    for name, right in answer.items():
        if np.shape(got[name]) != np.shape(right):
            raise ValueError(f"{name} must be {np.shape(right)}, got {np.shape(got[name])}")
        error = np.asarray(got[name], np.float64) - right
        if np.isnan(error).any():
            raise ValueError(f"{name} contains NaN")
        largest = max(largest, float(np.abs(error).max(initial=0) /
                                     np.abs(right).max(initial=1e-30)))
        rms = max(rms, float(np.linalg.norm(error) / max(np.linalg.norm(right), 1e-30)))
    return Errors(largest, rms)


def refusal(found, precision, dtype):
    """Why a result with the Errors `found` is wrong for a library that computes in `precision`
    ("float32" there means the case's dtype), or None."""
    if precision in BELOW:
        return f"wrong: rms error {found.rms:.1e}" if found.rms > BELOW[precision] else None
    return f"wrong: largest relative error {found.largest:.1e}" \
        if found.largest > TOLERANCE[dtype] else None
