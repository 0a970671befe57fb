"""What an lstmcore computes, as hashes of bits: a fixed list of cases of everything public.

Runs in the process of the lstmcore in question (see `serve`) and reaches its names one by one, so
that one which is gone costs the cases that need it and no others. A result is the name of an array
-> the hash of its dtype, shape and bytes; of a case that could not run, {"missing": why}. The data
depend on numpy's Generator alone. Nothing here compares.
"""

import hashlib
import importlib
import json
import os
import platform
import sys
from collections import defaultdict, namedtuple
from functools import partial
from itertools import product

import numpy as np

PLANS = ("default", "tiles", "fused", "blas")
DTYPES = ("float32", "float64")

Layer = namedtuple("Layer", "cell dtype T B I H P lengths reverse bias state peepholes ids "
                            "keep_tape upstream packed")
SMALL_CASES = 280
SIZES = dict(H=(1, 3, 7, 8, 9, 16, 17, 33, 64, 65, 130), B=(1, 2, 5, 20, 50), T=(1, 7, 20),
             I=(1, 2, 5, 8, 9, 16, 20, 33, 65, 100))
LARGE = (   # T, B, I, H: shared out by units, in chunks of steps, or both
    (50, 50, 128, 128), (12, 200, 300, 150), (100, 1, 512, 512), (35, 20, 650, 650),
    (6, 3, 40, 1100), (300, 4, 24, 48),
)


def digest(value):
    """The hash of an array's dtype, shape and bytes."""
    if value is None:
        return None
    a = np.asarray(value)
    return hashlib.sha256(f"{a.dtype.str} {a.shape} ".encode() + a.tobytes()).hexdigest()[:16]


# ---- one layer, one direction --------------------------------------------------------------------

def small_cases():
    """The cases around the vector width, every option drawn for each anew."""
    rng = np.random.default_rng(1)
    for n in range(SMALL_CASES):
        H, B, T, I = (int(rng.choice(SIZES[letter])) for letter in "HBTI")  # noqa: E741
        cell = ("lstm", "lstm", "lstm", "tanh", "relu")[n % 5]
        odds = rng.random(10)
        ids = "" if odds[0] < 0.7 else "few" if odds[0] < 0.85 else "many"
        yield Layer(
            cell, DTYPES[n // 5 % 2], T, B,
            {"": I if I != H else I + 1, "few": 3 if T * B > 3 else 1, "many": T * B + 13}[ids], H,
            1 + int(odds[1] * H) if cell == "lstm" and odds[2] < 0.25 else 0,
            odds[3] < 0.4, odds[4] < 0.4, odds[5] < 0.8, odds[6] < 0.7,
            cell == "lstm" and odds[7] < 0.3, ids, odds[8] < 0.85,
            ("dy", "dy dh_n", "dy dh_n dc_n")[int(odds[9] * 3)], n % 4 == 0)


def large_cases():
    for cell, dtype in (("lstm", "float32"), ("lstm", "float64"), ("tanh", "float32")):
        for n, sizes in enumerate(LARGE):
            if dtype == "float32" or n in (0, 1, 4):
                yield Layer(cell, dtype, *sizes, 0, n == 1, n == 2, True, True, False, "", True,
                            "dy dh_n dc_n", n == 2)
    plain = dict(cell="lstm", dtype="float32", lengths=False, reverse=False, bias=True, state=True,
                 peepholes=False, ids="", keep_tape=True, upstream="dy dh_n dc_n", packed=True)
    yield Layer(T=40, B=30, I=100, H=200, P=120, **plain)
    yield Layer(T=40, B=30, I=100, H=200, P=0, **{**plain, "peepholes": True, "lengths": True})
    yield Layer(T=35, B=20, I=50, H=200, P=0, **{**plain, "ids": "few"})
    yield Layer(T=35, B=20, I=2000, H=200, P=0, **{**plain, "ids": "many"})


def label(c, n_threads):
    """A case in a line."""
    words = [c.cell, c.dtype]
    words += [f"{name}={getattr(c, name)}" for name in "TBIHP" if getattr(c, name)]
    words += [f"{c.ids} ids"] if c.ids else []
    words += [name for name in ("lengths", "reverse", "peepholes", "packed") if getattr(c, name)]
    words += [f"no {name}" for name in ("bias", "state", "keep_tape") if not getattr(c, name)]
    return f"{' '.join(words)} {c.upstream}, {n_threads} threads"


def layer_data(c):
    """The arrays of a case, by the names of the arguments."""
    rng, (T, B, H) = np.random.default_rng([c.T, c.B, c.I, c.H, c.P]), (c.T, c.B, c.H)
    G, K, bound = (4 * H if c.cell == "lstm" else H), c.P or H, H**-0.5

    def draw(*shape, scale=1.0):
        return rng.uniform(-scale, scale, shape).astype(c.dtype)

    d = {"x": rng.integers(0, c.I, (T, B)) if c.ids else draw(T, B, c.I),
         "W_ih": draw(G, c.I, scale=bound), "W_hh": draw(G, K, scale=bound)}
    d["b"] = draw(G) if c.bias else None
    d["h0"], d["c0"] = (draw(B, K), draw(B, H)) if c.state else (None, None)
    d["peepholes"] = draw(3, H) if c.peepholes else None
    d["W_hr"] = draw(c.P, H, scale=bound) if c.P else None
    d["lengths"] = rng.integers(0, T + 1, B) if c.lengths else None
    d["dy"], d["dh_n"], d["dc_n"] = draw(T, B, K), draw(B, K), draw(B, H)
    return d


def run_layer(lib, c, d, n_threads):
    """Forward and, with a tape, backward: every array that comes out."""
    common = dict(lengths=d["lengths"], reverse=c.reverse, n_threads=n_threads)
    args = [d[name] for name in ("x", "W_ih", "W_hh", "b", "h0")]
    upstream = [d[name] if name in c.upstream.split() else None for name in ("dy", "dh_n", "dc_n")]
    if c.cell != "lstm":
        y, h_n, tape = lib.rnn_forward(*args, nonlinearity=c.cell, keep_tape=c.keep_tape, **common)
        out = dict(y=y, h_n=h_n)
        if tape is not None:
            out |= lib.rnn_backward(tape, *upstream[:2], n_threads=n_threads)._asdict()
        return out
    common |= dict(peepholes=d["peepholes"], W_hr=d["W_hr"])
    y, (h_n, c_n), tape = lib.lstm_forward(*args, d["c0"], keep_tape=c.keep_tape, **common)
    out = dict(y=y, h_n=h_n, c_n=c_n)
    if tape is not None:
        out |= dict(gates=tape.gates.copy(), c=tape.c.copy())   # their memory is used again
        out |= lib.lstm_backward(tape, *upstream, n_threads=n_threads)._asdict()
    if c.packed:
        packed = lib.functional.pack("lstm", d["W_ih"], d["W_hh"], d["W_hr"])
        out["packed_y"] = lib.lstm_forward(*args, d["c0"], keep_tape=False, packed=packed,
                                           **common)[0]
    return out


# ---- what stands on it ---------------------------------------------------------------------------

RAGGED = [6, 2, 1, 5, 6]


def _draw(seed, *shape, dtype="float32"):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(dtype)


def _ids(seed, V, *shape):
    return np.random.default_rng(seed).integers(0, V, shape)


def _states(*states):
    return {f"state{n}": part for n, part in enumerate(
        a for state in states for a in (state if isinstance(state, tuple) else (state,)))}


def _passed(m, x, lengths=None, **options):
    """Two training passes of a layer, the second from the state of the first."""
    y, state = m(x, lengths=lengths, **options)
    dx, dstate = m.backward(_draw(3, *y.shape, dtype=m.dtype))
    y2, state2 = m(x, state, lengths, **options)
    dx2, dstate2 = m.backward(_draw(4, *y2.shape, dtype=m.dtype), state2)
    return dict(y=y, dx=dx, y2=y2, dx2=dx2, **_states(state, dstate, state2, dstate2),
                **{"d" + name: g for name, g in m.gradients().items()})


def _stack(lib, cell, x=None, lengths=None, **options):
    m = getattr(lib, cell)(9, 17, **{"num_layers": 2, "seed": 1, **options})
    x = _draw(2, 6, 5, 9, dtype=m.dtype) if x is None else x
    return _passed(m, x, lengths)


def _embedded(lib, V, cell, dtype="float32", **options):
    embedding = lib.Embedding(V, 9, dtype=dtype, seed=5)
    m = getattr(lib, cell)(9, 17, 2, seed=1, dtype=dtype, **options)
    out = _passed(m, _ids(6, V, 8, 5), embedding=embedding)
    return {**out, "dtable": embedding.gradients()["weight"]}


def _frozen(lib, **options):
    m = lib.LSTM(9, 17, 2, seed=1, dropout=0.2, **options)
    m.eval()
    before, _ = m(_draw(2, 6, 5, 9))
    m.freeze()
    after, state = m(_draw(2, 6, 5, 9))
    return dict(before=before, after=after, **_states(state))


def _traced(lib, cell, **options):
    m = getattr(lib, cell)(9, 17, 2, seed=1, **options)
    traces = m.trace(_draw(2, 6, 5, 9), lengths=RAGGED)
    return {f"{n} {letter}": a for n, trace in enumerate(traces)
            for letter, a in trace._asdict().items()}


def _sequential(lib):
    m = lib.Sequential(lib.Linear(9, 7, seed=1), lib.Tanh(), lib.Dropout(0.3, seed=2), lib.ReLU(),
                       lib.Linear(7, 4, seed=3), lib.Sigmoid())
    y = m(_draw(2, 6, 5, 9))
    return dict(y=y, dx=m.backward(_draw(3, 6, 5, 4)), **m.gradients())


def _pooled(lib, name, **options):
    pool = getattr(lib, name)(**options)
    pooled = pool(_draw(2, 6, 5, 8), RAGGED)
    return dict(pooled=pooled, dy=pool.backward(_draw(3, *pooled.shape)))


def layer_jobs(lib):
    """Name -> function without arguments that returns the arrays of a layer."""
    jobs = {}
    for cell, dtype in product(("LSTM", "RNN"), DTYPES):
        stacks = {"two layers": {},
                  "bidirectional ragged": dict(bidirectional=True, lengths=RAGGED),
                  "dropout": dict(dropout=0.4, num_layers=3), "glorot": dict(init="glorot"),
                  "no bias": dict(bias=False, num_layers=1), "ids": dict(x=_ids(2, 9, 6, 5)),
                  "batch first": dict(batch_first=True, bidirectional=True, dropout=0.2)}
        if cell == "LSTM":
            stacks["projection, peepholes"] = dict(proj_size=6, peepholes=True, lengths=RAGGED)
        else:
            stacks["relu"] = dict(nonlinearity="relu", bidirectional=True)
        for name, options in stacks.items():
            jobs[f"{cell} {dtype} {name}"] = partial(_stack, lib, cell, dtype=dtype, **options)
        for V in (7, 300):      # fewer rows than tokens, and more
            jobs[f"{cell} {dtype} embedding of {V}"] = partial(_embedded, lib, V, cell, dtype,
                                                               bidirectional=V == 7)
    return jobs | {
        "frozen": partial(_frozen, lib), "frozen projection": partial(_frozen, lib, proj_size=6),
        "frozen peepholes": partial(_frozen, lib, peepholes=True, bidirectional=True),
        "trace of an LSTM": partial(_traced, lib, "LSTM", bidirectional=True, peepholes=True),
        "trace of an RNN": partial(_traced, lib, "RNN"), "Sequential": partial(_sequential, lib),
        "LastStep": partial(_pooled, lib, "LastStep", bidirectional=True),
        "MeanOverTime": partial(_pooled, lib, "MeanOverTime"),
        "MaxOverTime": partial(_pooled, lib, "MaxOverTime"),
    }


def _steps(lib, cell, dtype, B, H, ids=False, n_threads=None, P=0, peepholes=False):
    rng = np.random.default_rng(H)
    G, K, I = (4 * H if cell == "lstm" else H), P or H, 11  # noqa: E741
    weights = [rng.uniform(-1, 1, shape).astype(dtype) for shape in ((G, I), (G, K), (G,))]
    weights[1] *= np.asarray(H**-0.5, dtype)
    step = lib.functional.Step(cell, B, *weights, n_threads=n_threads,
                               peepholes=_draw(1, 3, H, dtype=dtype) if peepholes else None,
                               W_hr=_draw(2, P, H, dtype=dtype) if P else None)
    out = {f"y{t}": step(_ids(t, I, B) if ids else _draw(t, B, I, dtype=dtype)) for t in range(5)}
    return dict(out, h=step.h, **({"c": step.c} if cell == "lstm" else {}))  # an RNN has no c


def _streamed(lib, cell, ids):
    m = getattr(lib, cell)(11, 17, 3, seed=1)
    stream = m.stream(batch_size=4)
    out = {f"y{t}": stream.step(_ids(t, 11, 4) if ids else _draw(t, 4, 11)) for t in range(6)}
    state = stream.state
    stream.reset()
    stream.state = state
    return dict(out, **_states(state), last=stream.step(_draw(9, 4, 11)))


def stream_jobs(lib):
    """Streams of layers, and the steps below them."""
    jobs = {}
    for cell, ids in product(("LSTM", "RNN"), (False, True)):
        jobs[f"{cell} stream{' of ids' * ids}"] = partial(_streamed, lib, cell, ids)
    for cell, dtype, (B, H), ids in product(
            ("lstm", "tanh", "relu"), DTYPES, ((1, 1), (1, 17), (3, 8), (1, 300), (20, 65)),
            (False, True)):
        jobs[f"Step {cell} {dtype} B={B} H={H}{' ids' * ids}"] = partial(
            _steps, lib, cell, dtype, B, H, ids)
    for n in (1, 2, 3):
        jobs[f"Step lstm H=700, {n} threads"] = partial(_steps, lib, "lstm", "float32", 1, 700,
                                                        n_threads=n)
    jobs["Step lstm projection"] = partial(_steps, lib, "lstm", "float32", 2, 33, P=9)
    jobs["Step lstm peepholes"] = partial(_steps, lib, "lstm", "float64", 2, 33, True,
                                          peepholes=True)
    return jobs


def _linear(lib, dtype, n, I, O, n_threads):  # noqa: E741
    x, W, b, dy = (_draw(s, *shape, dtype=dtype)
                   for s, shape in enumerate(((n, I), (O, I), (O,), (n, O))))
    forward, packed = lib.dense.linear_forward, lib.functional.pack("linear", W)
    out = dict(y=forward(x, W, b, n_threads=n_threads), plain=forward(x, W, n_threads=n_threads),
               packed=forward(x, W, b, n_threads=n_threads, packed=packed))
    out["dx"], out["dW"], out["db"] = lib.dense.linear_backward(x, W, dy, n_threads=n_threads)
    return out


def _linear_layer(lib, dtype):
    m = lib.Linear(9, 6, dtype=dtype, seed=1)
    y = m(_draw(2, 4, 5, 9, dtype=dtype))
    return dict(y=y, dx=m.backward(_draw(3, 4, 5, 6, dtype=dtype)), **m.gradients())


def dense_jobs(lib):
    """Dense layers."""
    jobs = {f"Linear {dtype}": partial(_linear_layer, lib, dtype) for dtype in DTYPES}
    sizes = (1, 1, 1), (2, 5, 3), (7, 16, 33), (50, 65, 130), (700, 200, 40), (35, 128, 3000)
    for dtype, (n, I, O), n_threads in product(DTYPES, sizes, (1, 2, 3)):  # noqa: E741
        jobs[f"linear {dtype} n={n} I={I} O={O}, {n_threads} threads"] = partial(
            _linear, lib, dtype, n, I, O, n_threads)
    return jobs


def _loss(lib, name, logits, target, options):
    loss = getattr(lib, name)(logits, target, **options)
    return dict(zip(("loss", "gradient"), loss if isinstance(loss, tuple) else (loss,)))


def _optimized(lib, name, options, dtype, clip):
    m = lib.LSTM(9, 17, seed=1, dtype=dtype)
    optimizer = getattr(lib.optim, name)(m, 0.05, **options)
    for t in range(3):
        m.zero_grad()
        y, _ = m(_draw(t, 6, 5, 9, dtype=dtype))
        m.backward(y)
        if clip:
            getattr(lib, clip)(m.gradients(), 0.01)
        optimizer.step()
    return {**m.parameters(), **optimizer.state_dict()}


def training_jobs(lib):
    """Losses and optimizers."""
    jobs = {}
    ways = {"mean": {}, "sum": dict(reduction="sum"), "none": dict(reduction="none"),
            "ignore_index": dict(ignore_index=3), "mask": dict(mask=_ids(1, 2, 6, 5).astype(bool))}
    for dtype, way, V in product(DTYPES, ways, (5, 17, 3000)):
        jobs[f"softmax_cross_entropy {dtype} {way} V={V}"] = partial(
            _loss, lib, "softmax_cross_entropy", 4 * _draw(2, 6, 5, V, dtype=dtype),
            _ids(3, V, 6, 5), ways[way])
    rules = {"Adam": {}, "Adam, decay": dict(weight_decay=0.1), "AdamW": {},
             "SGD": dict(momentum=0.9, nesterov=True), "Adagrad": {},
             "RMSprop": dict(momentum=0.5, centered=True)}
    for dtype in DTYPES:
        z = 4 * _draw(2, 6, 5, dtype=dtype)
        for name, target in (("mse_loss", _draw(3, 6, 5)), ("bce_with_logits", _ids(3, 2, 6, 5))):
            jobs[f"{name} {dtype}"] = partial(_loss, lib, name, z, target.astype(dtype), {})
        for rule, clip in product(rules, ("", "clip_grad_norm", "clip_grad_value")):
            jobs[f"{rule} {dtype} {clip}".strip()] = partial(
                _optimized, lib, rule.split(",")[0], rules[rule], dtype, clip)
    return jobs


def _language_model(lib, **options):
    text = "".join(chr(97 + n) for n in _ids(1, 12, 900) // 2)
    m = lib.LanguageModel(**{"hidden_size": 24, "seed": 3, "embed_size": 10, **options})
    m.fit(text, steps=12, evaluate_every=4, seq_length=15, batch_size=6, validation=0.1, lr=0.02,
          progress=False)
    out = {f"{n} {name}": record[name] for n, record in enumerate(m.history)
           for name in ("loss", "validation")}
    return {**out, **m.network.parameters(), "perplexity": m.perplexity(text[:200]),
            "sample": m.sample("ab", length=40, seed=1), "beam": m.beam_search("ab", 10, width=3)}


def model_jobs(lib):
    """A few steps of training."""
    return {name: partial(_language_model, lib, **options) for name, options in {
        "LanguageModel": dict(dropout=0.2), "one-hot": dict(embed_size=0, num_layers=1),
        "float64, peepholes": dict(dtype="float64", peepholes=True), "rnn": dict(cell="rnn"),
        "bytes": dict(level="byte"),
    }.items()}


# ---- all of it -----------------------------------------------------------------------------------

class Kernels:
    """The switches of the compiled modules, wherever they are: `switch` is False without one."""

    def __init__(self):
        self._homes = []
        for name in ("functional", "_kernels", "_grid", "_products", "_recurrence", "_forward",
                     "_backward", "_dense"):
            try:
                self._homes.append(importlib.import_module("lstmcore." + name))
            except ImportError:
                pass

    def switch(self, name, value):
        homes = [home for home in self._homes if hasattr(home, name)]
        for home in homes:
            setattr(home, name, value)
        return bool(homes)


def attempt(job):
    """The hashes of what a job returns, or why it did not return."""
    try:
        return {name: digest(a) for name, a in job().items()}
    except Exception as error:  # whatever a changed name or signature leads to
        return {"missing": f"{type(error).__name__}: {error}"[:200]}


def everything(lib):
    """plan -> group -> case -> hashes, with the instruction set that runs now."""
    slow, found, kernels = lib.info()["isa"] == "base", {}, Kernels()
    shared = kernels.switch("_SERIAL_WORK", 0)      # small cases use all their threads too
    small = [(c, layer_data(c)) for c in small_cases()]
    for plan in PLANS:
        groups = found[plan] = defaultdict(dict)
        if kernels.switch("plan", None if plan == "default" else plan) or plan == "default":
            run = run_layer
        else:
            run = _no_switch
        if not shared:
            groups["threads"]["small"] = {"missing": "no module has the switch _SERIAL_WORK"}
        every = plan == "default" and not slow      # number of threads for every case
        for n, (c, data) in enumerate(small):
            for team in (1, 2, 3) if every else (1 + n % 3,):
                groups[c.cell][label(c, team)] = attempt(partial(run, lib, c, data, team))
        for c in large_cases():
            if slow and (plan == "fused" or c.H > 300):
                continue
            data = layer_data(c)
            for team in (1, 2, 3) if every else (2,):
                groups["large"][label(c, team)] = attempt(partial(run, lib, c, data, team))
        for group, jobs in (("layers", layer_jobs), ("streams", stream_jobs), ("dense", dense_jobs),
                            ("losses and optimizers", training_jobs), ("models", model_jobs)):
            if plan == "default" or plan != "fused" and group in ("layers", "dense"):
                groups[group] = {name: attempt(job if run is run_layer else _no_switch)
                                 for name, job in jobs(lib).items()}
    return found


def _no_switch(*_):
    raise AttributeError("no module has the switch `plan`")


def serve(do):
    """Print, as JSON, what this lstmcore is ("about") or what it computes ("everything")."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import scipy

    import lstmcore

    info = lstmcore.info()
    print(json.dumps(everything(lstmcore) if do == "everything" else {
        "file": lstmcore.__file__, "isas": info["available_isas"], "version": info["version"],
        "beside": {"numpy": np.__version__, "scipy": scipy.__version__, "blas": info["blas"],
                   "machine": platform.machine(), "python": sys.version.split()[0]},
    }), file=answers)
