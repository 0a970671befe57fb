"""Random problems: everything one forward and backward call needs, drawn from a seed.

Weights, biases, states and upstream gradients are all random and never zero, so that a term that
is dropped or taken from the wrong place changes the result. `forward` and `backward` run a problem
through `lstmcore.functional` or `lstmcore.reference`, which share their signatures.
"""

import dataclasses
from types import SimpleNamespace

import numpy as np

from lstmcore.reference import rounded
from lstmcore.variants import Variant

UPSTREAM = ("dy", "dh_n", "dc_n")


VARIANTS = {        # of an LSTM; `masks` says what is drawn
    "hard_sigmoid": dict(recurrent_activation=("hard_sigmoid", 0.2, 0.5)),
    "softsign, scaled tanh": dict(activation="softsign", cell_activation=("tanh", 1.5, 0.7)),
    "leaky, thresholded": dict(activation=("leaky_relu", 0.1), cell_activation=("thresholded_relu", 0.2)),
    "elu, linear": dict(activation=("elu", 0.8, 1.2), cell_activation=("linear", 0.5, 0.1)),
    "clip": dict(clip=0.7),
    "coupled": dict(coupled=True),
    "zoneout in the mean": dict(zoneout=(0.2, 0.4)),
    "zoneout": dict(masks=("zone_masks",)),
    "recurrent dropout": dict(masks=("h_mask",)),
    "all": dict(recurrent_activation="hard_sigmoid", activation="softsign", clip=1.5, coupled=True,
                masks=("zone_masks", "h_mask")),
}


def variant_of(said, T, B, H, dtype, seed):
    """A `Variant`, of an entry of VARIANTS, with masks that drop about half."""
    rng, said = np.random.default_rng([seed, T, B, H]), dict(said)
    drawn = {"zone_masks": lambda: rng.random((T, B, 2, H)) < 0.5,
             "h_mask": lambda: 2.0 * (rng.random((B, H)) < 0.5)}
    masks = {name: drawn[name]().astype(dtype) for name in said.pop("masks", ())}
    return Variant(**said, **masks)


def lstm_problem(T, B, I, H, *, P=None, bias=True, states=True, peepholes=False, lengths=None,
                 reverse=False, variant=None, norms=0, dtype="float64", seed=0):
    """An LSTM problem: `inputs` (arrays), `options`, `upstream` gradients. variant: a key of VARIANTS;
    norms: how many rows of them, 10 or 6.

    lengths="ragged" draws them from 0..T in no order; where B allows, one is 0 and one is T.
    """
    draw = _drawer(seed, dtype)
    P, projected = (H, False) if P is None else (P, True)
    inputs = dict(
        x=draw(T, B, I), W_ih=draw(4 * H, I, scale=1.5 / np.sqrt(I + 1)),
        W_hh=draw(4 * H, P, scale=1.5 / np.sqrt(P + 1)), b=draw(4 * H) if bias else None,
        h0=draw(B, P) if states else None, c0=draw(B, H) if states else None,
        peepholes=draw(3, H, scale=0.7) if peepholes else None,
        W_hr=draw(P, H, scale=1.5 / np.sqrt(H + 1)) if projected else None)
    if norms:
        inputs["norms"] = draw(norms, H)
    upstream = dict(dy=draw(T, B, P), dh_n=draw(B, P), dc_n=draw(B, H))
    options = dict(lengths=_lengths(lengths, T, B, seed), reverse=reverse)
    if variant is not None:
        options["variant"] = variant_of(VARIANTS[variant], T, B, H, dtype, seed)
    return SimpleNamespace(kind="lstm", inputs=inputs, upstream=upstream, options=options)


def rnn_problem(T, B, I, H, *, nonlinearity="tanh", bias=True, states=True, lengths=None,
                reverse=False, dtype="float64", seed=0):
    """A vanilla RNN problem, like lstm_problem."""
    draw = _drawer(seed, dtype)
    inputs = dict(
        x=draw(T, B, I), W_ih=draw(H, I, scale=1 / np.sqrt(I + 1)),
        W_hh=draw(H, H, scale=1 / np.sqrt(H + 1)), b=draw(H) if bias else None,
        h0=draw(B, H) if states else None)
    upstream = dict(dy=draw(T, B, H), dh_n=draw(B, H))
    options = dict(lengths=_lengths(lengths, T, B, seed), reverse=reverse,
                   nonlinearity=nonlinearity)
    return SimpleNamespace(kind="rnn", inputs=inputs, upstream=upstream, options=options)


def gru_problem(T, B, I, H, *, reset_after=True, bias=True, states=True, lengths=None, reverse=False,
                dtype="float64", seed=0):
    """A GRU problem, like lstm_problem."""
    draw = _drawer(seed, dtype)
    inputs = dict(
        x=draw(T, B, I), W_ih=draw(3 * H, I, scale=1.5 / np.sqrt(I + 1)),
        W_hh=draw(3 * H, H, scale=1.5 / np.sqrt(H + 1)),
        b=draw((3 + reset_after) * H) if bias else None,
        h0=draw(B, H) if states else None)
    upstream = dict(dy=draw(T, B, H), dh_n=draw(B, H))
    options = dict(lengths=_lengths(lengths, T, B, seed), reverse=reverse, reset_after=reset_after)
    return SimpleNamespace(kind="gru", inputs=inputs, upstream=upstream, options=options)


def forward(module, problem, **options):
    """y, state, tape of a problem; `options` come on top of the problem's own."""
    run = getattr(module, problem.kind + "_forward")
    return run(**problem.inputs, **problem.options, **options)


def backward(module, problem, **options):
    """The gradients of a problem under all its upstream gradients."""
    tape = forward(module, problem, **options)[-1]
    return getattr(module, problem.kind + "_backward")(tape, **problem.upstream, **options)


def with_products(problem, compute):
    """The same problem, its products computed in another number format, forward and backward."""
    return SimpleNamespace(**{**vars(problem), "options": {**problem.options, "compute": compute}})


def in_float64(problem):
    """The same problem, its arrays cast up: what a float32 kernel is compared on."""
    cast = {part: {name: None if array is None else array.astype("float64")
                   for name, array in getattr(problem, part).items()}
            for part in ("inputs", "upstream")}
    options = dict(problem.options)
    if (variant := options.get("variant")) is not None:
        options["variant"] = dataclasses.replace(variant, **{
            name: mask.astype("float64") for name in ("zone_masks", "h_mask")
            if (mask := getattr(variant, name)) is not None})
    return SimpleNamespace(kind=problem.kind, options=options, **cast)


def bfloat16_sums(a, b, start=0):
    """start + a (n, K) times b (K, m), all float32, as products in bfloat16 have it: blocks of 32 numbers
    k, of each the even ones, the odd ones, both, each multiply-add with one rounding."""
    a, b = (np.float64(rounded(array)) for array in (a, b))
    out = np.full((len(a), b.shape[1]), start, "float32")
    for k0 in range(0, a.shape[1], 32):
        sums = np.zeros((2, *out.shape), "float32")
        for k in range(k0, min(k0 + 32, a.shape[1])):    # a product has 16 bits: float64 holds the sum
            sums[k % 2] = sums[k % 2] + a[:, k, None] * b[k]
        out = out + (sums[0] + sums[1])
    return out


def _drawer(seed, dtype):
    rng = np.random.default_rng(seed)
    return lambda *shape, scale=1.0: (scale * rng.standard_normal(shape)).astype(dtype)


def _lengths(lengths, T, B, seed):
    if not isinstance(lengths, str):
        return lengths
    rng = np.random.default_rng([seed, T, B])
    drawn = rng.integers(0, T + 1, B)
    drawn[:2] = (T, 0)[:B]
    return rng.permutation(drawn)
