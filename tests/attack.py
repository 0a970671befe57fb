"""A randomized attack on the public API of arrays.

    python tests/attack.py [--calls 20000] [--seed N] [--first N] [--seconds S]

Every call draws legal arguments and spoils some: their layout, type, shape, values, or what they
hold while another thread writes to them. Then one of two must hold: a TypeError, ValueError or
RuntimeError in the caller's words, or a result that equals NumPy's; with no input written to and no
result in its memory. Whether arguments are legal is decided here, not asked of lstmcore. A failure
is printed with the seed and the number of its call: `--seed S --first N --calls 1` repeats it.

Sanitizers: CFLAGS and LDFLAGS "-fsanitize=address,undefined -fno-omit-frame-pointer" in the build, then
LD_PRELOAD="libasan.so libubsan.so" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 in the run.
"""

import argparse
import copy
import math
import pickle
import re
import sys
import tempfile
import threading
import time
import traceback
import warnings

import numpy as np
from conftest import TOLERANCES
from problems import lstm_problem, rnn_problem

from lstmcore import _kernels, arguments, dense, functional, layers, losses, optim, reference

F64 = np.dtype("float64")
LEAST = 0.1     # scale of errors: a state or a slope near 0 is a difference of numbers near 1
SPELLED = re.compile(r"must|got|cannot|needs|used by an earlier|is frozen|running in another|is named")
BARE = re.compile(r"has no attribute|'NoneType'|incorrect type|broadcast|out of bounds|unpack|ufunc"
                  r"|cannot reshape|matmul|sequence\.|inhomogeneous|subscriptable|positional|keyword")


class Finding(Exception):
    """What must not be."""


def require(condition, what):
    if not condition:
        raise Finding(what)


# ---- arguments ---------------------------------------------------------------------------------------

class Subclass(np.ndarray):
    """An array by another name."""


def odd_memory(rng, a):
    """An array of the same values that lies otherwise in memory, and the memory around it."""
    kind = rng.integers(9) if a.ndim else 3
    if kind == 0:
        around = np.zeros(tuple(2 * n + 1 for n in a.shape), a.dtype)
        b = around[tuple(slice(1, None, 2) for _ in a.shape)]
        b[...] = a
    elif kind == 1:
        around = a[(slice(None, None, -1),) * a.ndim].copy()
        b = around[(slice(None, None, -1),) * a.ndim]
    elif kind == 2:
        around = np.zeros(a.nbytes + 1, np.uint8)
        b = np.frombuffer(around.data, a.dtype, a.size, 1).reshape(a.shape)
        b[...] = a
    elif kind == 3:
        around = b = np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape)
    elif kind == 4:
        around = b = a.copy().view(Subclass)
    elif kind == 5 and a.size:
        file = tempfile.TemporaryFile()
        file.write(a.tobytes()), file.flush()
        around = b = np.memmap(file, a.dtype, "r", shape=a.shape)
    elif kind == 6:
        around = np.zeros(a.size + 3, a.dtype)
        b = around[1:1 + a.size].reshape(a.shape)
        b[...] = a
    elif kind == 7 and a.ndim:
        b = around = np.broadcast_to(a[:1].copy(), a.shape) if len(a) == 1 else a.copy(order="F")
    else:
        around = b = a.copy(order="F")
    return b, around


def other_array(rng, a):
    """Something that is mostly no fit argument where `a` is one."""
    kind = rng.integers(18)
    if kind < 7:
        names = ["f4", "f8", "f2", "i8", "?", "c16", "g", "O", a.dtype.newbyteorder().str]
        return a.astype(names[rng.integers(len(names))])
    if kind == 7:
        return np.ma.masked_array(a, rng.random(a.shape) < 0.5)
    if kind == 8:
        return a[None]
    if kind == 9:
        return a[0] if a.ndim and len(a) else a.reshape(-1)
    if kind == 10:
        return a.T
    if kind == 11:
        return [None, "x", 3.0, object(), a.dtype.type(1), {}][rng.integers(6)]
    if kind == 12:
        return np.zeros((), a.dtype)
    if kind == 13:
        return a.astype("U8")
    if not a.ndim:
        return a[None]
    axis = rng.integers(a.ndim)
    if kind < 16:
        return np.take(a, np.arange(a.shape[axis] - 1), axis) if a.shape[axis] else a
    return np.concatenate([a, a[tuple(slice(0, 1) for _ in a.shape)].repeat(1)[:0].reshape(
        [0 if d == axis else n for d, n in enumerate(a.shape)]), np.zeros(
            [1 if d == axis else n for d, n in enumerate(a.shape)], a.dtype)], axis)


def other_ids(rng, a, size):
    """Something that is mostly no fit integers 0..size-1 where `a` is."""
    kind = rng.integers(8)
    wide = a.astype(["i8", "u8"][rng.integers(2)])
    if kind < 4 and a.size:
        bad = [size, 2**31, 2**62, 2**63 + 5, -1, -2**63][rng.integers(6)]
        wide = a.astype("u8" if bad > 0 else "i8")
        wide.flat[rng.integers(a.size)] = bad
        return wide
    if kind == 4:
        return a.astype(["f8", "?", "O", "m8[s]", "c8"][rng.integers(5)])
    return other_array(rng, wide)


def is_masked(a):
    return isinstance(a, np.ma.MaskedArray)


def is_floats(a, dtype):
    return isinstance(a, np.ndarray) and not is_masked(a) and a.dtype == dtype


def are_ids(a, size, shape):
    """Whether a is integers in 0..size-1 of this shape; None where both answers would do."""
    if is_masked(a):
        return False
    try:
        a = np.asarray(a)
    except ValueError:
        return False
    if a.shape != shape:
        return False
    if not a.size:
        return None if a.dtype.kind not in "iu" else True
    return a.dtype.kind in "iu" and int(a.min()) >= 0 and int(a.max()) < size


def unified(spec, given, dtype):
    """The sizes by letter if the arrays have the dtype and the shapes of the spec, else None."""
    sizes = {}
    for name, letters in spec.items():
        a = given.get(name)
        if a is None and name in OPTIONAL:
            continue
        if not is_floats(a, dtype) or a.ndim != len(letters):
            return None
        for letter, n in zip(letters, a.shape):
            if sizes.setdefault(letter, n) != n:
                return None
    return sizes


OPTIONAL = {"b", "h0", "c0", "peepholes", "W_hr", "dh_n", "dc_n"}


def both(*answers):
    """All of three-valued answers: False wins over None, None over True."""
    return False if False in answers else None if None in answers else True


# ---- one call ----------------------------------------------------------------------------------------

class Call:
    """One call, its random numbers, and what it is given."""

    def __init__(self, rng):
        self.rng, self.said, self.kept = rng, [], []

    def say(self, *words):
        self.said.append(" ".join(map(str, words)))

    def chance(self, p):
        return self.rng.random() < p

    def pick(self, *options):
        return options[self.rng.integers(len(options))]

    def size(self, *more):
        return int(self.pick(1, 2, 3, 5, 8, 9, 17, *more))

    def floats(self, *shape, dtype):
        return self.rng.standard_normal(shape).astype(dtype)

    def dtype(self):
        return np.dtype(self.pick("float32", "float64"))

    def threads(self):
        return int(self.rng.integers(1, 10)) if self.chance(0.9) else None

    def switch(self):
        """Another instruction set and another plan, now and then."""
        if self.chance(0.3):
            _kernels.use_isa(self.pick(*_kernels.available_isas()))
            _kernels.plan = self.pick(None, "tiles", "fused", "blas")
            self.say(_kernels.isa(), _kernels.plan)

    def spoil(self, arguments, p_layout=0.3, p_other=0.25, sizes=()):
        """The arguments, by name, some in another layout, one perhaps no fit one; kept in mind.

        sizes: name -> size, of those that are integers 0..size-1.
        """
        out = {}
        for name, a in arguments.items():
            if isinstance(a, np.ndarray) and self.chance(p_layout):
                a, around = odd_memory(self.rng, a)
                self.keep(around)
                self.say(name, "at", a.strides, type(a).__name__, a.flags.writeable)
            out[name] = a
        names = [name for name, a in out.items() if isinstance(a, np.ndarray)]
        if names and self.chance(p_other):
            name = self.pick(*names)
            out[name] = other_ids(self.rng, out[name], sizes[name]) if name in sizes \
                else other_array(self.rng, out[name])
            self.say(name, "is", getattr(out[name], "dtype", type(out[name])),
                     getattr(out[name], "shape", ""))
        for a in out.values():
            self.keep(a)
        return out

    def keep(self, a):
        """Remember what a is, to see later whether it still is."""
        if isinstance(a, np.ndarray) and a.dtype != object:
            self.kept.append((a, form(a), a.tobytes()))

    def forget(self, a):
        self.kept = [k for k in self.kept if k[0] is not a]

    def run(self, run, legal, *args, **kwargs):
        """The result, or None after an error; legal: True, False, or None where either will do."""
        result, error = attempt(run, *args, **kwargs)
        for a, was, bytes_ in self.kept:
            require(form(a) == was and a.tobytes() == bytes_, "an input was written to")
        if error is not None:
            require(legal is not True, f"refused: {type(error).__name__}: {error}")
            return None
        require(legal is not False, f"accepted: {run}")
        for a in arrays_in(result):
            for given, *_ in self.kept:
                require(not np.may_share_memory(a, given), "a result has the memory of an input")
        return result


def form(a):
    return a.shape, a.strides, a.dtype, a.flags.writeable


def attempt(run, *args, **kwargs):
    """(result, None) or (None, an error that says what is wrong)."""
    try:
        return run(*args, **kwargs), None
    except (TypeError, ValueError, RuntimeError) as error:
        text = str(error)
        require(SPELLED.search(text) and not BARE.search(text),
                f"an error in nobody's words: {type(error).__name__}: {text}\n"
                + traceback.format_exc())
        return None, error


def arrays_in(result):
    if isinstance(result, np.ndarray):
        yield result
    elif isinstance(result, (tuple, list)):
        for part in result:
            yield from arrays_in(part)


def same(got, want, dtype, what, scale=LEAST):
    """got, of this dtype, equals want to the suite's tolerance; nan and inf where want has them.

    scale: at least this is what errors are measured by.
    """
    if isinstance(want, (tuple, list)):
        require(len(got) == len(want), f"{what}: {len(got)} results, want {len(want)}")
        for n, (g, w) in enumerate(zip(got, want)):
            same(g, w, dtype, f"{what}[{getattr(want, '_fields', range(len(want)))[n]}]", scale)
        return
    if want is None:
        require(got is None, f"{what}: got {got}, want None")
        return
    require(type(got) is np.ndarray and got.dtype == dtype and got.shape == np.shape(want),
            f"{what}: got {type(got).__name__} {getattr(got, 'dtype', '')} {np.shape(got)}, "
            f"want {dtype} {np.shape(want)}")
    finite = np.isfinite(want)
    require(np.array_equal(got[~finite], np.asarray(want)[~finite].astype(dtype), equal_nan=True),
            f"{what}: got {got[~finite][:5]}, want {want[~finite][:5]}")
    if finite.any():
        scale = max(np.abs(want[finite]).max(), scale)
        error = np.abs(got[finite].astype("longdouble") - want[finite]).max() / scale
        require(error <= TOLERANCES["kernel"][str(dtype)], f"{what}: off by {error:.2g}")


def up(a):
    """In float64, plain and contiguous: for the reference."""
    return np.array(a, F64) if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a


def at_once(runs):
    """The outcomes of functions, each run by a thread of its own, all at the same time."""
    outcomes, failures, gate = [None] * len(runs), [], threading.Barrier(len(runs))

    def work(n, run):
        gate.wait()
        try:
            with np.errstate(all="ignore"):
                outcomes[n] = attempt(run)
        except BaseException as error:
            failures.append(error)
    workers = [threading.Thread(target=work, args=(n, run)) for n, run in enumerate(runs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]
    return outcomes


def while_refilled(a, bad, run):
    """The outcome of run, while another thread writes bad into the last number of a and good again."""
    good, stop = a.flat[-1], threading.Event()

    def refill():
        while not stop.is_set():
            a.flat[-1] = bad
            a.flat[-1] = good
    other = threading.Thread(target=refill)
    other.start()
    try:
        return attempt(run)
    finally:
        stop.set()
        other.join()
        a.flat[-1] = good


def changed_in_place(call, a, kinds=5):
    """Changes an array that owns its memory; whether another shape or dtype came of it."""
    kind = call.rng.integers(kinds)
    before = a.shape, a.dtype
    try:
        if kind == 0:
            a.resize((a.size + 1000,), refcheck=False)
        elif kind == 1:
            a.resize((0,), refcheck=False)
        elif kind == 2:
            a.shape = (-1,)
        elif kind == 3:
            a.dtype = "i4"
        else:
            a *= 2
    except (ValueError, AttributeError, TypeError):
        return False                # not an array that lets itself be changed so
    call.say("changed to", a.shape, a.dtype)
    return (a.shape, a.dtype) != before


# ---- one layer, one direction ------------------------------------------------------------------------

LSTM = dict(x="TBI", W_ih="GI", W_hh="GP", b="G", h0="BP", c0="BH", peepholes="3H", W_hr="PH")
RNN = dict(x="TBI", W_ih="HI", W_hh="HH", b="H", h0="BH")


def problem(call):
    """A problem of an LSTM or RNN, with its name."""
    T, B = (int(call.pick(0, 1, 2, 3, 5, 11)) for _ in range(2))
    shape = T, B, call.size(33), call.size(33, 40)
    seed = int(call.rng.integers(1 << 30))
    options = dict(bias=call.chance(0.7), states=call.chance(0.7), reverse=call.chance(0.4),
                   lengths="ragged" if call.chance(0.4) else None, dtype=str(call.dtype()), seed=seed)
    if call.chance(0.6):
        return lstm_problem(*shape, P=call.size() if call.chance(0.3) else None,
                            peepholes=call.chance(0.3), **options)
    return rnn_problem(*shape, nonlinearity=call.pick("tanh", "relu"), **options)


def legal_forward(p, given, lengths, packed, origin):
    """Whether a forward pass may be given this."""
    spec, x = dict(LSTM if p.kind == "lstm" else RNN), given["x"]
    ids = isinstance(x, np.ndarray) and x.dtype.kind in "iu" and not is_masked(x)
    dtype = getattr(given["W_hh"] if ids else x, "dtype", None)
    if dtype not in (np.float32, np.float64):
        return False
    if ids:
        del spec["x"]
    sizes = unified(spec, given, dtype)
    if sizes is None or (ids and x.ndim != 2):
        return False
    H = sizes["H"] if p.kind == "rnn" or "H" in sizes else sizes["P"]
    if given.get("W_hr") is None and "P" in sizes and sizes["P"] != H:
        return False
    if sizes.get("G", 4 * H) != 4 * H or sizes.get("3", 3) != 3 or 0 in (H, sizes["I"]):
        return False
    T, B = x.shape[:2]
    if sizes.get("B", B) != B:
        return False
    fine = are_ids(x, sizes["I"], (T, B)) if ids else True
    if lengths is not None:
        fine = both(fine, are_ids(lengths, T + 1, (B,)))
    if packed is not None:
        made = all(given.get(name) is a for name, a in zip(("W_ih", "W_hh", "W_hr"), origin))
        fine = both(fine, isinstance(packed, type(functional.pack("linear", np.ones((1, 1)))))
                    and made and packed.cell == cell_of(p))
    return fine


def cell_of(p):
    return "lstm" if p.kind == "lstm" else p.options["nonlinearity"]


def numbers(given, sizes_of_ids):
    """The arguments of the reference: float64, one-hot rows for ids."""
    x = given["x"]
    wide = {name: up(a) for name, a in given.items()}
    if x.dtype.kind in "iu":
        wide["x"] = np.eye(sizes_of_ids)[np.asarray(x, np.int64)]
    return wide


def packed_for(call, p, given):
    """What to give as packed=, and the arrays that it is of."""
    kind, mine = call.rng.integers(12), [given.get(name) for name in ("W_ih", "W_hh", "W_hr")]
    if kind > 3:
        return None, None
    call.say("packed", kind)
    cell, of = cell_of(p), list(mine)
    if kind == 1:
        of[call.rng.integers(2)] = call.floats(3, 2, dtype="f4")
    elif kind == 2:
        of = [None if a is None else np.array(a) for a in mine]
    elif kind == 3:
        cell = call.pick("lstm", "tanh", "relu", "linear", "gru", None, 3)
        of = of if cell != "linear" else [mine[0], None, None]
    packed, _ = attempt(functional.pack, cell, *of)
    return (packed, of) if packed is not None else (call.pick(None, None, 3, "packed"), [])


def one_layer(call):
    """lstm_forward, lstm_backward, rnn_forward, rnn_backward."""
    p = problem(call)
    T, B, I = p.inputs["x"].shape
    if call.chance(0.25):
        p.inputs["x"] = call.rng.integers(0, I, (T, B)).astype(call.pick("i8", "i4", "u2", "u8"))
    call.say(cell_of(p), p.inputs["x"].dtype, (T, B, I), p.inputs["W_hh"].shape, p.options["lengths"])
    poisoned = poison(call, p) if call.chance(0.1) else None
    if p.options["lengths"] is not None and call.chance(0.3):
        for b, n in enumerate(p.options["lengths"]):    # past the end anything may stand
            p.upstream["dy"][n:, b] = np.nan
            if p.inputs["x"].ndim == 3:
                p.inputs["x"][n:, b] = np.nan
    ids = {"x": I} if p.inputs["x"].ndim == 2 else {}
    given = call.spoil(p.inputs, sizes=ids)
    lengths = p.options["lengths"]
    if lengths is not None:
        lengths = call.spoil({"lengths": lengths}, 0.3, 0.1, {"lengths": T + 1})["lengths"]
    packed, origin = packed_for(call, p, given)
    options = {**p.options, "lengths": lengths}
    legal = legal_forward(p, given, lengths, packed, origin)
    forward = getattr(functional, p.kind + "_forward")
    if packed is not None and packed in (3, "packed"):
        legal = False
    n_threads = call.threads()
    if call.chance(0.03):
        n_threads, legal = call.pick(0, -1, True, 2.0, "2", 10**4, [1]), False
        call.say("n_threads", n_threads)
    call.switch()
    result = call.run(forward, legal, **given, **options, packed=packed, n_threads=n_threads,
                      keep_tape=call.chance(0.8))
    if result is None:
        return
    y, state, tape = result
    options["lengths"] = lengths = None if lengths is None else np.array(lengths, np.int64)
    wide = numbers(given, given["W_ih"].shape[1])
    want = getattr(reference, p.kind + "_forward")(**wide, **options)
    same((y, state), want[:2], y.dtype, "forward")
    if tape is not None and poisoned is None:
        backward(call, p, given, tape, want[-1], y)


def poison(call, p):
    """A number of x that is none, or infinite."""
    x = p.inputs["x"]
    if x.size and x.ndim == 3:
        x.flat[call.rng.integers(x.size)] = call.pick(np.nan, np.inf, -np.inf)
        call.say("poisoned")
        return x


def backward(call, p, given, tape, wide_tape, y):
    """The backward pass, by a tape that has been through something."""
    run = getattr(functional, p.kind + "_backward")
    upstream = {name: a for name, a in p.upstream.items() if name == "dy" or call.chance(0.7)}
    upstream = call.spoil(upstream)
    letters = dict(dy="TBP", dh_n="BP", dc_n="BH")
    sizes = unified({name: letters[name] for name in upstream}, upstream, y.dtype)
    H = wide_tape.c.shape[2] if p.kind == "lstm" else y.shape[2]
    fits = dict(zip("TBP", y.shape), H=H)
    legal = sizes is not None and all(fits[letter] == n for letter, n in sizes.items())
    kind, with_ids = call.rng.integers(10), given["x"].dtype.kind in "iu"
    call.switch()
    want = getattr(reference, p.kind + "_backward")(wide_tape, **{k: up(a) for k, a in upstream.items()}) \
        if legal else None
    if kind == 0:                   # copies are used one by one, as often as tapes are made
        tape = call.pick(copy.copy, copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a)))(tape)
        call.say("copied")
    elif kind == 1 and legal and p.kind == "lstm":
        outcomes = at_once([lambda: run(tape, **upstream, n_threads=call.threads())] * 3)
        right = [result for result, _ in outcomes if result is not None]
        require(len(right) == 1, f"a tape was used {len(right)} times")
        return same_gradients(right[0], want, y.dtype, with_ids)
    elif kind == 2:
        victims = [a for a in (y, *given.values()) if isinstance(a, np.ndarray)]
        victim = call.pick(*victims)
        call.kept = []
        ids = victim is given["x"] and victim.dtype.kind in "iu"
        if changed_in_place(call, victim) and not ids:
            legal = None            # an array that the tape has not, or has a copy of
        elif not ids:
            want = None
    elif kind == 3 and p.kind == "lstm":
        names = "x W_ih W_hh peepholes W_hr h0 c0 lengths reverse".split()
        stored = {name: {**given, **p.options}.get(name) for name in names}
        stored.update(y=y, raw_gates=tape.raw_gates, raw_c=tape.raw_c)
        for name in ("y", "raw_c"):
            stored[name] = odd_memory(call.rng, stored[name])[0] if call.chance(0.5) else stored[name]
        if call.chance(0.5):
            name = call.pick(*stored)
            stored[name] = other_array(call.rng, np.asarray(stored[name], y.dtype))
            call.say("tape_from", name, "is", stored[name])
            tape, _ = attempt(functional.tape_from, **stored)
            if tape is None:
                return
            legal, want = None, None
        else:
            tape = functional.tape_from(**stored)
    result = call.run(run, legal, tape, **upstream, n_threads=call.threads())
    if result is not None and want is not None:
        same_gradients(result, want, y.dtype, with_ids)
    if result is not None and p.kind == "lstm" and call.chance(0.3):
        require(attempt(run, tape, **upstream)[1] is not None, "a tape was used twice")


def same_gradients(got, want, dtype, with_ids):
    if with_ids:
        want = want._replace(dx=None)
    same(got, want, dtype, "backward")


def step_by_step(call):
    """functional.Step: copies, out=, and threads that share one."""
    p = problem(call)
    T, B, I = p.inputs["x"].shape
    dtype = p.inputs["W_hh"].dtype
    weights = {name: a for name, a in p.inputs.items() if name not in ("x", "h0", "c0")}
    given = call.spoil(weights, 0.3, 0.15)
    batch = call.pick(B, B, B, 0, -1, 2.0, None, True)
    legal = legal_forward(p, {"x": np.zeros((1, 1, I), dtype), **given}, None, None, None)
    if isinstance(given["W_ih"], np.ndarray) and given["W_ih"].ndim == 2:   # which says what x is
        x = np.zeros((1, 1, given["W_ih"].shape[1]), given["W_ih"].dtype)
        legal = legal_forward(p, {"x": x, **given}, None, None, None)
    legal = both(legal, type(batch) is int and batch > 0)
    call.say("Step", cell_of(p), (batch, I), weights["W_hh"].shape)
    step = call.run(functional.Step, legal, cell_of(p), batch, **given, n_threads=call.threads())
    if step is None:
        return
    dtype, I, H = given["W_hh"].dtype, given["W_ih"].shape[1], step.h.shape[1]
    xs = call.floats(5, B, I, dtype=dtype)
    ids = call.rng.integers(0, I, (5, B)) if call.chance(0.3) else None
    wide = {name: up(a) for name, a in given.items()}
    options = {} if p.kind == "lstm" else {"nonlinearity": cell_of(p)}
    want = getattr(reference, p.kind + "_forward")(
        up(xs) if ids is None else np.eye(I)[ids], **wide, **options)[0]
    for t in range(5):
        call.switch()
        if call.chance(0.2):
            old = step
            step = call.pick(copy.copy, copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a)))(step)
            attempt(old, xs[t])     # goes on by itself, and leaves the copy alone
        if call.chance(0.1):
            changed_in_place(call, call.pick(step.h, step.h if step.c is None else step.c), 4)
        if call.chance(0.1) and ids is None:
            before = copy.deepcopy(step)
            outcomes = at_once([lambda: step(xs[t])] * 3)
            require(any(error is None for _, error in outcomes), "no thread made the step")
            require(np.isfinite(step.h).all(), "a state of no numbers")
            step = before
        if call.chance(0.1):
            size = I if ids is not None else 0
            bad = other_ids(call.rng, ids[t], size) if size else other_array(call.rng, xs[t])
            fits = are_ids(bad, I, (B,)) is not False if isinstance(bad, (np.ndarray, list)) \
                and np.asarray(bad).dtype.kind in "iu" else is_floats(bad, dtype) and bad.shape == (B, I)
            if not fits:
                call.run(step, False, bad)
        x = xs[t] if ids is None else ids[t]
        out, fine = out_for(call, (B, H), dtype, [step.h, step.c, xs[t]])
        y = call.run(step, fine, x, out)
        require(out is None or not fine or y is out, "out was not used")
        y = step(x) if y is None else y
        same(np.array(y), want[t], dtype, f"step {t}")


def out_for(call, shape, dtype, others):
    """Something to give as out=, and whether it may be given."""
    kind = call.rng.integers(12)
    if kind == 0:
        return np.empty(shape, dtype), True
    if kind == 1:
        a = call.pick(*(a for a in others if a is not None))
        return a, a is others[-1] and is_floats(a, dtype) and a.shape == shape
    if kind == 2:
        return np.frombuffer(bytes(math.prod(shape) * dtype.itemsize), dtype).reshape(shape), False
    if kind == 3:
        a = other_array(call.rng, np.empty(shape, dtype))
        fits = is_floats(a, dtype) and a.shape == shape and a.flags.carray
        return a, a is None or (bool(fits) if isinstance(a, np.ndarray) else False)
    if kind == 4:
        a, around = odd_memory(call.rng, np.zeros(shape, dtype))
        return a, bool(a.flags.carray and a.flags.aligned)
    if kind == 5:
        around = np.empty(2 * math.prod(shape) + 1, dtype)
        return around[:math.prod(shape)].reshape(shape), True
    return None, True


# ---- dense -------------------------------------------------------------------------------------------

def dense_layer(call):
    """linear_forward and linear_backward."""
    dtype, n, I, O = call.dtype(), call.size(0, 40), call.size(33), call.size(70)
    given = call.spoil(dict(x=call.floats(n, I, dtype=dtype), W=call.floats(O, I, dtype=dtype),
                            b=call.floats(O, dtype=dtype) if call.chance(0.6) else None))
    call.say("linear", dtype, (n, I, O))
    W, packed, of = given["W"], None, None
    if call.chance(0.4):
        of = call.pick(W, W, np.array(W), call.floats(O, I, dtype=dtype))
        packed, _ = attempt(functional.pack, "linear", of)
        call.switch()
    actual = getattr(given["x"], "dtype", None)
    sizes = unified(dict(x="nI", W="OI", b="O"), given, actual)
    legal = sizes is not None and actual in (np.float32, np.float64) and sizes["I"] > 0
    y = call.run(dense.linear_forward, legal and (packed is None or of is W), **given, packed=packed,
                 n_threads=call.threads())
    if y is not None:
        same(y, up(given["x"]) @ up(W).T + (0 if given["b"] is None else up(given["b"])), actual, "y")
    if not legal:
        return
    dy = call.spoil(dict(dy=call.floats(sizes["n"], sizes["O"], dtype=actual)))["dy"]
    fine = is_floats(dy, actual) and dy.shape == (sizes["n"], sizes["O"])
    need_dx = call.chance(0.7)
    g = call.run(dense.linear_backward, fine, given["x"], W, dy, need_dx=need_dx,
                 n_threads=call.threads())
    if g is not None:
        x, d = up(given["x"]), up(dy)
        same(g, dense.LinearGradients(d @ up(W) if need_dx else None, d.T @ x, d.sum(axis=0)), actual,
             "linear gradients")


def softmax(call):
    """dense.cross_entropy."""
    dtype, n, V = call.dtype(), call.size(0), call.size(33)
    z = call.floats(n, V, dtype=dtype) * dtype.type(call.pick(1, 1, 30, 1e30))
    given = call.spoil(dict(logits=z, targets=call.rng.integers(0, V, n),
                            weights=np.abs(call.floats(n, dtype=dtype))), sizes={"targets": V})
    out, fine = np.empty((n, V), dtype), True
    if call.chance(0.3):
        out, fine = out_for(call, (n, V), dtype, [given["weights"], given["logits"]])
        fine = out is not None and out is not given["weights"] and (fine or out is given["logits"])
    call.say("cross_entropy", dtype, (n, V))
    actual = getattr(given["logits"], "dtype", None)
    sizes = unified(dict(logits="nV", weights="n"), given, actual)
    legal = both(sizes is not None and actual in (np.float32, np.float64), fine)
    if legal is not False:
        legal = both(legal, are_ids(given["targets"], sizes["V"], (sizes["n"],)),
                     isinstance(out, np.ndarray) and out.dtype == actual
                     and out.shape == (sizes["n"], sizes["V"]))
        if out is given["logits"] and not (out.flags.carray and out.flags.aligned):
            legal = False
    kept = np.array(given["logits"]) if out is given["logits"] else given["logits"]
    if out is given["logits"]:
        call.kept = []
    elif isinstance(out, np.ndarray):
        call.forget(out)
    loss = call.run(dense.cross_entropy, legal, **given, dlogits=out, n_threads=call.threads())
    if loss is None:
        return
    want, dz = softmax_in_numpy(up(kept), np.asarray(given["targets"], np.int64))
    same(loss, want, actual, "losses", scale=1.0)      # log Σ - z is a difference of numbers near 1
    same(np.array(out), dz * up(given["weights"])[:, None], actual, "dlogits", scale=1.0)


def softmax_in_numpy(z, targets):
    """Losses (n,) and their gradients (n, V)."""
    top = z.max(axis=1, keepdims=True) if z.size else np.zeros((len(z), 1))
    e = np.exp(z - top)
    rows = np.arange(len(z))
    loss = np.log(e.sum(axis=1)) - (z - top)[rows, targets]
    d = e / e.sum(axis=1, keepdims=True)
    d[rows, targets] -= 1
    return loss, d


def adam_step(call):
    """dense.adam_step."""
    dtype, shape = call.dtype(), (call.size(0, 40), call.size())[:call.rng.integers(0, 3)]
    arrays = {name: np.array(np.abs(call.floats(*shape, dtype=dtype))) for name in "pgmv"}
    kind = call.rng.integers(5)
    given = dict(arrays)
    if kind == 0:
        name, of = call.pick(*"pgmv"), call.pick(*"pgmv")
        given[name] = given[of]
        legal = name == of or not arrays["p"].size and None
    elif kind == 1:
        name = call.pick(*"pgmv")
        given[name], around = odd_memory(call.rng, arrays[name])
        flags = given[name].flags
        legal = name == "g" or bool(flags.carray)
    elif kind == 2:
        name = call.pick(*"pgmv")
        given[name] = other_array(call.rng, arrays[name])
        kinds = {getattr(a, "dtype", None) for a in given.values()}
        shapes = {getattr(a, "shape", None) for a in given.values()}
        legal = len(kinds) == 1 and len(shapes) == 1 and not any(map(is_masked, given.values()))
        legal = legal and (name == "g" or bool(given[name].flags.carray))
    else:
        legal = True
    call.say("adam_step", dtype, shape, kind)
    before = {name: up(np.array(a)) if isinstance(a, np.ndarray) else a for name, a in given.items()}
    kept = {name: (a, a.tobytes()) for name, a in given.items()
            if isinstance(a, np.ndarray) and a.dtype != object}
    rule = dict(betas=(0.9, 0.99), rate=0.1, eps=1e-3, decay=call.pick(0.0, 0.1),
                keep=call.pick(1.0, 0.9))
    done = call.run(lambda: (dense.adam_step(**given, **rule, n_threads=call.threads()), True)[1], legal)
    if not done:
        require(all(a.tobytes() == was for a, was in kept.values()), "written to before an error")
        return
    p, g, m, v = (before[name] for name in "pgmv")
    g = g + rule["decay"] * p
    m = m + 0.1 * (g - m)
    v = v + (1 - 0.99) * (g * g - v)
    p = rule["keep"] * p - 0.1 * m / (np.sqrt(v) + 1e-3)
    for name, want in zip("pmv", (p, m, v)):
        same(np.array(given[name]), want, given["p"].dtype, name)


# ---- layers ------------------------------------------------------------------------------------------

class Stacked:
    """A recurrent layer of the library and the same in the reference's hands, in float64."""

    def __init__(self, layer):
        self.layer, self.rnn = layer, isinstance(layer, layers.RNN)
        self.runs = []

    def weights(self, n, letters=("W_ih", "W_hh", "b", "peepholes", "W_hr")):
        layer, d = divmod(n, self.layer.directions)
        names = dict(W_ih="weight_ih", W_hh="weight_hh", b="bias", peepholes="weight_peephole",
                     W_hr="weight_hr")
        found = {letter: f"{names[letter]}_l{layer}{'_reverse' * d}" for letter in letters}
        own = self.layer.parameters()
        return {letter: name for letter, name in found.items() if name in own}

    def forward(self, x, state, lengths):
        """x (T, B, I) -> y, (h_n, c_n) or h_n."""
        own, D = self.layer.parameters(), self.layer.directions
        self.runs, finals = [], []
        for n in range(self.layer.num_layers * D):
            if n % D == 0:
                read, halves = x, []
            w = {letter: up(own[name]) for letter, name in self.weights(n).items()}
            first = {} if state is None else {k: up(s[n]) for k, s in zip(("h0", "c0"), state)}
            if self.rnn:
                y, last, tape = reference.rnn_forward(read, **w, **first, lengths=lengths,
                                                      reverse=n % D == 1,
                                                      nonlinearity=self.layer.nonlinearity)
                last = (last,)
            else:
                y, last, tape = reference.lstm_forward(read, **w, **first, lengths=lengths,
                                                       reverse=n % D == 1)
            halves.append(y)
            finals.append(last)
            self.runs.append(tape)
            x = np.concatenate(halves, axis=2)
        final = tuple(np.stack(part) for part in zip(*finals))
        return x, final[0] if self.rnn else final

    def backward(self, dy):
        """dy (T, B, D·P) -> dx and the gradients by name."""
        D, found = self.layer.directions, {}
        for layer in reversed(range(self.layer.num_layers)):
            dx = 0
            for d, half in enumerate(np.split(dy, D, axis=2)):
                n = layer * D + d
                run = reference.rnn_backward if self.rnn else reference.lstm_backward
                g = run(self.runs[n], half)
                dx = dx + g.dx
                found.update({name: getattr(g, "d" + letter)
                              for letter, name in self.weights(n).items()})
            dy = dx
        return dy, found


def recurrent_layer(call, **more):
    dtype, I, H = str(call.dtype()), call.size(), call.size()
    options = dict(num_layers=int(call.pick(1, 1, 2, 3)), bias=call.chance(0.8),
                   batch_first=call.chance(0.3), bidirectional=call.chance(0.3), dtype=dtype,
                   seed=int(call.rng.integers(1 << 30)), **more)
    if call.chance(0.35):
        layer = layers.RNN(I, H, nonlinearity=call.pick("tanh", "relu"), **options)
    else:
        layer = layers.LSTM(I, H, proj_size=int(call.rng.integers(0, H + 1)) if call.chance(0.3) else 0,
                            peepholes=call.chance(0.3), **options)
    layer.n_threads = call.threads()
    call.say(layer)
    return layer


def lived(call, m, steps=3):
    """The layer, or a copy of it, after a few things that change no number of it."""
    for _ in range(call.rng.integers(steps + 1)):
        kind = call.pick("train", "eval", "freeze", "unfreeze", "copy", "deepcopy", "pickle", "load",
                         "setflags")
        call.say(kind)
        frozen = not all(p.flags.writeable for p in m.parameters().values())
        if kind in ("copy", "deepcopy"):
            m = getattr(copy, kind)(m)
        elif kind == "pickle":
            m = pickle.loads(pickle.dumps(m))
        elif kind == "load":
            done = attempt(lambda: (m.load_state_dict(m.state_dict()), True))[1] is None
            require(done is not frozen, "a frozen layer was loaded into, or another was not")
        elif kind == "setflags":
            for p in m.parameters().values():
                try:
                    p.flags.writeable = True
                except ValueError:
                    continue
                require(not frozen, "a frozen parameter can be made writable")
        else:
            error = attempt(getattr(m, kind))[1]
            require(error is None or (kind == "train" and frozen), f"{kind}: {error}")
    return m


def a_layer(call):
    """LSTM and RNN: a call, its backward, a trace, in whatever mode."""
    m = lived(call, recurrent_layer(call, dropout=0.0))
    dtype, N = m.dtype, m.num_layers * m.directions
    T, B = int(call.pick(0, 1, 2, 5)), int(call.pick(0, 1, 2, 5))
    swap = (lambda a: a.swapaxes(0, 1)) if m.batch_first else (lambda a: a)
    widths = m._widths
    embedding, ids = None, call.chance(0.35)
    x = call.floats(T, B, m.input_size, dtype=dtype)
    size = m.input_size
    if ids:
        if call.chance(0.6):
            size = call.size(40)
            embedding = layers.Embedding(size, m.input_size, dtype=str(dtype), seed=1)
        x = call.rng.integers(0, size, (T, B))
    given = call.spoil({"x": swap(x)}, 0.4, 0.15, {"x": size} if ids else ())
    state = None
    if call.chance(0.5):
        state = call.spoil({"h": call.floats(N, B, widths[0], dtype=dtype),
                            **({"c": call.floats(N, B, widths[1], dtype=dtype)} if len(widths) > 1
                               else {})}, 0.4, 0.1)
    lengths = call.spoil({"lengths": call.rng.integers(0, T + 1, B)}, 0.3, 0.1,
                         {"lengths": T + 1})["lengths"] if call.chance(0.4) else None
    legal, form_ = True, None
    g = given["x"]
    if isinstance(g, np.ndarray) and not is_masked(g):
        if g.dtype.kind in "iu":
            form_ = g.shape if g.ndim == 2 else None
            legal = both(form_ is not None, are_ids(g, size, g.shape))
            if not ids:
                legal = both(legal, are_ids(g, m.input_size, g.shape))
        else:
            form_ = g.shape[:2] if g.ndim == 3 else None
            legal = form_ is not None and g.dtype == dtype and g.shape[2] == m.input_size \
                and embedding is None
    else:
        legal = False
    if legal is not False:
        t, b = swap(np.empty(form_)).shape
        if state is not None:
            legal = both(legal, *(is_floats(a, dtype) and a.shape == (N, b, w) or a is None and None
                                  for a, w in zip(state.values(), widths)))
        if lengths is not None:
            legal = both(legal, are_ids(lengths, t + 1, (b,)))
    handed = None if state is None else tuple(state.values()) if len(widths) > 1 else state["h"]
    result = call.run(m, legal, given["x"], handed, lengths, embedding=embedding)
    if result is None or (state is not None and any(a is None for a in state.values())):
        return
    model = Stacked(m)
    wide = np.array(swap(np.asarray(given["x"])))
    tokens = wide if wide.dtype.kind in "iu" else None
    if tokens is not None:
        tokens = tokens.astype(np.int64)
        wide = np.eye(m.input_size)[tokens] if embedding is None else \
            up(embedding.parameters()["weight"])[tokens]
    counts = None if lengths is None else np.asarray(lengths, np.int64)
    y, final = model.forward(up(wide), None if state is None else [up(a) for a in state.values()],
                             counts)
    same(result, (swap(y), final), dtype, "layer")
    if call.chance(0.2) and embedding is None:
        traces = call.run(m.trace, True, given["x"], handed, lengths)
        same(np.array(swap(traces[0].h)), model.runs[0].y, dtype, "trace")
    if not m.training:
        require(attempt(m.backward, result[0])[1] is not None, "backward of a call that kept nothing")
        return
    dy = call.spoil({"dy": call.floats(*swap(y).shape, dtype=dtype)}, 0.3, 0.15)["dy"]
    fits = dy is None or is_floats(dy, dtype) and dy.shape == swap(y).shape
    if call.chance(0.1):            # in the hands of somebody else
        call.kept = []
        victim = call.pick(*m.parameters().values(), given["x"], result[0])
        if changed_in_place(call, victim):
            attempt(m.backward, dy)
            return
        fits = None if victim is not given["x"] or tokens is None else fits
    back = call.run(m.backward, fits, dy)
    if back is None or fits is not True:
        return
    dx, found = model.backward(np.zeros(y.shape) if dy is None else up(swap(np.asarray(dy))))
    if tokens is None:
        same(np.array(back[0]), swap(dx), dtype, "dx")
    for name, want in found.items():
        same(m.gradients()[name], want, dtype, name)
    if embedding is not None and embedding.training:
        table = np.zeros((size, m.input_size))
        np.add.at(table, tokens, dx)
        same(embedding.gradients()["weight"], table, dtype, "embedding")


def a_stream(call):
    """A layer's stream, step by step, copied, pickled, reset."""
    m = lived(call, recurrent_layer(call, dropout=0.3))
    B = int(call.pick(1, 2, 5))
    if m.bidirectional:
        require(attempt(m.stream, B)[1] is not None, "a stream in two directions")
        return
    s, dtype, P = m.stream(B), m.dtype, m._widths[0]
    xs = call.floats(4, B, m.input_size, dtype=dtype)
    ids = call.rng.integers(0, m.input_size, (4, B)) if call.chance(0.3) else None
    want, final = Stacked(m).forward(up(xs) if ids is None else np.eye(m.input_size)[ids], None, None)
    for t in range(4):
        kind = call.rng.integers(8)
        call.say("step", t, "after", kind)
        if kind == 0:
            old, s = s, call.pick(copy.copy, copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a)))(s)
            attempt(old.step, xs[0])
        elif kind == 1:
            kept = s.state
            attempt(s.step, xs[0])
            s.reset()
            s.state = kept
        elif kind == 2:
            kept = s.state
            outcomes = at_once([lambda: s.step(xs[t])] * 3)
            require(any(error is None for _, error in outcomes), "no thread made the step")
            s.state = kept
        elif kind == 3:
            kept = copy.deepcopy(s)
            part = s.state if m._gates == 1 else s.state[0]
            bad = other_array(call.rng, part)
            if bad is not None and not (is_floats(bad, dtype) and bad.shape == part.shape):
                error = attempt(setattr, s, "state", bad if m._gates == 1 else (bad, s.state[1]))[1]
                require(error is not None, f"a state of {getattr(bad, 'shape', bad)}")
            s = kept
        x = xs[t] if ids is None else ids[t]
        out, fine = out_for(call, (B, P), dtype, [s._steps[-1].h, s._steps[-1].c, xs[t]])
        y = call.run(s.step, fine, x, out)
        y = s.step(x) if y is None else y
        same(np.array(y), want[t], dtype, f"stream {t}")
    same(s.state, final, dtype, "state")


def small_layers(call):
    """Embedding, Linear, pointwise layers, dropout, pooling, all in a Sequential now and then."""
    dtype = call.dtype()
    shape = tuple(int(call.pick(0, 1, 2, 5)) for _ in range(call.rng.integers(1, 4)))
    I, V = call.size(), call.size()
    kind = call.pick("embedding", "linear", "tanh", "sigmoid", "relu", "dropout", "pool", "mask")
    call.say(kind, dtype, shape)
    if kind == "embedding":
        m = lived(call, layers.Embedding(V, I, dtype=str(dtype), seed=0))
        tokens = call.spoil({"t": call.rng.integers(0, V, shape)}, sizes={"t": V})["t"]
        legal = are_ids(tokens, V, np.shape(tokens)) if not isinstance(tokens, (dict, str)) else False
        y = call.run(m, legal, tokens)
        if y is None:
            return
        ids = np.array(tokens, np.int64)
        same(y, up(m.parameters()["weight"])[ids], dtype, "rows")
        if m.training:
            dy = call.floats(*y.shape, dtype=dtype)
            if isinstance(tokens, np.ndarray) and tokens.flags.writeable and tokens.size:
                call.kept = []
                changed_in_place(call, tokens)
            m.backward(dy)
            want = np.zeros((V, I))
            np.add.at(want, ids, up(dy))
            same(m.gradients()["weight"], want, dtype, "dweight")
        return
    if kind in ("pool", "mask"):
        return pooling(call, dtype, kind)
    O = call.size()
    make, f, slope = {
        "linear": (lambda: layers.Linear(I, O, dtype=str(dtype), seed=0, bias=call.chance(0.7)), None, 0),
        "tanh": (layers.Tanh, np.tanh, lambda x: 1 - np.tanh(x)**2),
        "sigmoid": (layers.Sigmoid, reference.sigmoid,
                    lambda x: reference.sigmoid(x) * reference.sigmoid(-x)),
        "relu": (layers.ReLU, lambda x: np.maximum(x, 0), lambda x: x > 0),
        "dropout": (lambda: layers.Dropout(call.pick(0, 0.5, 1.0), seed=0), None, 0)}[kind]
    m = lived(call, layers.Sequential(make()) if call.chance(0.3) else make())
    x = call.spoil({"x": call.floats(*shape, I, dtype=dtype)})["x"]
    if kind == "linear":
        legal = not is_masked(x) and getattr(x, "dtype", None) == dtype and np.shape(x)[-1:] == (I,)
    else:
        legal = not is_masked(x) and (isinstance(x, (float, list)) or getattr(x, "dtype", None) in
                                      (np.float32, np.float64))
    y = call.run(m, None if not isinstance(x, np.ndarray) else legal, x)
    if y is None or not isinstance(x, np.ndarray):
        return
    if kind == "dropout":
        require(y.shape == x.shape and y.dtype == x.dtype, f"dropout gave {y.dtype} {y.shape}")
        return
    own = {name.split(".")[-1]: up(p) for name, p in m.parameters().items()}
    want = up(x) @ own["weight"].T + own.get("bias", 0) if kind == "linear" else f(up(x))
    same(np.asarray(y), np.asarray(want), x.dtype, kind)
    dy = call.spoil({"dy": call.floats(*y.shape, dtype=x.dtype)})["dy"]
    fits = dy is None or is_floats(dy, x.dtype) and dy.shape == y.shape
    if not m.training:
        fits = False
    back = call.run(m.backward, fits if dy is None or isinstance(dy, np.ndarray) else None, dy)
    if back is None or dy is None or not fits:
        return
    want = up(dy) @ own["weight"] if kind == "linear" else up(dy) * slope(up(x))
    same(np.asarray(back), np.asarray(want), x.dtype, "d" + kind)


def pooling(call, dtype, kind):
    T, B, W = (int(call.pick(0, 1, 2, 5)) for _ in range(3))
    lengths = call.spoil({"l": call.rng.integers(0, T + 1, B)}, sizes={"l": T + 1})["l"]
    if kind == "mask":
        legal = are_ids(lengths, T + 1, (B,)) if np.shape(lengths) == (B,) \
            else None if isinstance(lengths, np.ndarray) and lengths.ndim == 1 else False
        got = call.run(layers.sequence_mask, legal, lengths, T)
        if got is not None:
            ends = np.asarray(lengths, np.int64)
            require(np.array_equal(got, np.arange(T)[:, None] < ends), "mask")
        return
    first = call.chance(0.5)
    m = lived(call, call.pick(layers.LastStep, layers.MeanOverTime, layers.MaxOverTime)(batch_first=first))
    call.say(type(m).__name__, (T, B, W))
    y = call.floats(T, B, W, dtype=dtype)
    given = call.spoil({"y": y.swapaxes(0, 1) if first else y})["y"]
    legal = isinstance(given, np.ndarray) and not is_masked(given) and given.ndim == 3 \
        and given.dtype in (np.float32, np.float64)
    if legal:
        steps = up(given).swapaxes(0, 1) if first else up(given)
        legal = lengths is None or are_ids(lengths, len(steps) + 1, steps.shape[1:2])
    pooled = call.run(m, legal, given, lengths)
    if pooled is None:
        return
    ends, rows = np.full(steps.shape[1], len(steps)) if lengths is None else \
        np.asarray(lengths, np.int64), []
    for b, n in enumerate(ends):
        part = steps[:n, b]
        rows.append(np.zeros(steps.shape[2]) if not n else part[-1] if type(m) is layers.LastStep
                    else part.mean(axis=0) if type(m) is layers.MeanOverTime else part.max(axis=0))
    same(np.asarray(pooled), np.reshape(rows, pooled.shape), given.dtype, "pooled")
    if m.training:
        d = call.floats(*pooled.shape, dtype=given.dtype)
        back = call.run(m.backward, True, d)
        total = up(np.asarray(back)).sum(axis=1 if first else 0)
        same(total.astype(given.dtype), up(d) * (ends > 0)[:, None], given.dtype, "spread")


# ---- losses, optimizers ------------------------------------------------------------------------------

def a_loss(call):
    """softmax_cross_entropy, mse_loss, bce_with_logits."""
    dtype, V = call.dtype(), call.size()
    shape = tuple(int(call.pick(0, 1, 2, 5)) for _ in range(call.rng.integers(0, 3)))
    kind = call.pick("softmax", "softmax", "mse", "bce")
    reduction = call.pick("mean", "sum", "none")
    mask = call.pick(None, np.ones(shape, bool), call.rng.random(shape) < 0.5, call.rng.random(shape))
    mask = None if mask is None else np.asarray(mask)
    z = call.floats(*shape, V, dtype=dtype)
    call.say(kind, dtype, shape, V, reduction, None if mask is None else mask.dtype)
    if kind == "softmax":
        ignore = call.pick(None, 0, -1)
        targets = call.rng.integers(0, V, shape)
        if ignore == -1 and targets.size:
            targets = np.where(call.rng.random(shape) < 0.3, -1, targets)
        given = call.spoil(dict(logits=z, targets=targets, mask=mask), 0.3, 0.2, {"targets": V})
        fitting = is_floats(given["logits"], dtype)
        out, fine = out_for(call, given["logits"].shape if fitting else z.shape, dtype,
                            [given["mask"], given["logits"]])
        if out is not None:
            fine = out is not given["mask"] and (fine or out is given["logits"])
        logits, targets, mask = given["logits"], given["targets"], given["mask"]
        legal = (isinstance(logits, np.ndarray) and not is_masked(logits) and logits.ndim > 0
                 and logits.dtype in (np.float32, np.float64))
        if legal:
            known = np.asarray(targets)
            if ignore is not None and not is_masked(targets) and known.dtype.kind in "iu":
                known = np.where(known == ignore, 0, known) if logits.shape[-1] else known
            legal = both(are_ids(targets if is_masked(targets) else known, logits.shape[-1],
                                 logits.shape[:-1]),
                         fits_mask(mask, logits.shape[:-1]), fine)
            if out is not None and isinstance(out, np.ndarray) and legal is not False:
                legal = both(legal, out.dtype == logits.dtype and out.shape == logits.shape
                             and bool(out.flags.carray))
        if out is logits or (isinstance(out, np.ndarray) and out is mask):
            call.kept = [k for k in call.kept if not np.may_share_memory(k[0], out)]
        kept = np.array(logits)
        got = call.run(lambda: both_of(losses.softmax_cross_entropy(
            logits, targets, ignore_index=ignore, mask=mask, reduction=reduction, out=out), out), legal)
        if got is None:
            return
        n = int(np.prod(logits.shape[:-1]))
        counted = np.asarray(targets, np.int64).reshape(n)
        w = (np.ones(n) if mask is None else np.asarray(mask, F64).reshape(n))
        if ignore is not None:
            w = w * (counted != ignore)
            counted = np.where(counted == ignore, 0, counted)
        want, d = softmax_in_numpy(up(kept).reshape(n, logits.shape[-1]), counted)
        share = (1 / w.sum() if w.sum() else 0.0) if reduction == "mean" else 1.0
        close_loss(got[0], want * w, share, reduction, logits.shape[:-1], logits.dtype)
        same(np.array(got[1]), (d * (w * share)[:, None]).reshape(logits.shape), logits.dtype,
             "dlogits")
        return
    target = call.rng.random(z.shape).astype(dtype)
    given = call.spoil(dict(z=z, target=target, mask=mask), 0.3, 0.2)
    a, b, mask = given["z"], given["target"], given["mask"]
    legal = is_floats(a, dtype) and is_floats(b, dtype) and a.shape == b.shape
    if is_floats(a, np.float32) and is_floats(b, np.float32) and a.shape == b.shape:
        legal = True
    if legal:
        legal = fits_mask(mask, a.shape) or (a.ndim > 1 and fits_mask(mask, a.shape[:-1]))
    else:
        legal = False if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) else None
    if kind == "bce" and legal and b.size and not (0 <= b.min() and b.max() <= 1):
        legal = False
    run = losses.mse_loss if kind == "mse" else losses.bce_with_logits
    got = call.run(run, legal, a, b, mask=mask, reduction=reduction)
    if got is None or not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray):
        return
    x, t = up(a), up(b)
    w = np.ones(x.shape) if mask is None else np.asarray(mask, F64)
    w = np.broadcast_to(w[..., None] if w.shape != x.shape else w, x.shape)
    want = (x - t)**2 if kind == "mse" else np.maximum(x, 0) - t * x + np.log1p(np.exp(-np.abs(x)))
    d = 2 * (x - t) if kind == "mse" else reference.sigmoid(x) - t
    total = w.sum() if mask is not None else x.size
    share = (1 / total if total else 0.0) if reduction == "mean" else 1.0
    close_loss(got[0], want * w, share, reduction, x.shape, a.dtype)
    same(np.asarray(got[1]), np.asarray(d * w * share), a.dtype, "d")


def both_of(result, out):
    """loss and d; d copied if it is out, as it must be."""
    require(out is None or result[1] is out, "out was not used")
    return result if out is None else (result[0], np.array(result[1]))


def close_loss(got, want, share, reduction, shape, dtype):
    if reduction == "none":
        same(np.asarray(got), np.reshape(want, shape), dtype, "loss", scale=1.0)
    else:
        total = float(np.sum(want)) * share
        require(type(got) is float and abs(got - total) <= 1e-4 * max(abs(total), 1e-3),
                f"loss {got!r}, want {total}")


def fits_mask(mask, shape):
    if mask is None:
        return True
    if is_masked(mask):
        return False
    mask = np.asarray(mask)
    if mask.shape != shape:
        return False
    if not mask.size:
        return True if mask.dtype.kind in "biuf" else None
    return mask.dtype.kind in "biuf" and bool(np.isfinite(mask).all())


def an_optimizer(call):
    """Steps of every rule, clipping, and states that come back."""
    dtype = call.dtype()
    shapes = [(), (0,), (call.size(),), (call.size(), call.size())]
    p = {str(n): np.array(call.floats(*shape, dtype=dtype)) for n, shape in enumerate(shapes)}
    g = {name: np.array(call.floats(*a.shape, dtype=dtype)) for name, a in p.items()}
    rule = call.pick("SGD", "RMSprop", "Adagrad", "Adam", "AdamW")
    legal, kind = True, call.rng.integers(6)
    call.say(rule, dtype, kind)
    if kind == 0:
        where, name = call.pick(p, g), call.pick(*p)
        a = where[name]
        where[name] = other_array(call.rng, a)
        b = where[name]
        legal = is_floats(b, dtype) and b.shape == a.shape and bool(b.flags.carray)
    elif kind == 1:
        where, name = call.pick(p, g), call.pick(*p)
        where[name], _ = odd_memory(call.rng, where[name])
        legal = bool(where[name].flags.carray)
    elif kind == 2:
        g["3"] = p["3"]
        legal = False
    before = {name: up(np.array(a)) for name, a in p.items() if isinstance(a, np.ndarray)}
    make = getattr(optim, rule)
    o = call.run(make, legal, (p, g), lr=0.1)
    if o is None:
        return
    for _ in range(2):
        o.step()
    want = {name: stepped_in_numpy(rule, before[name], up(g[name])) for name in p}
    for name, a in want.items():
        same(np.array(p[name]), a, dtype, f"{rule} {name}")
    if call.chance(0.5):
        name = call.pick("2", "3")
        if changed_in_place(call, call.pick(p, g)[name]):
            require(attempt(o.step)[1] is not None, "a step on another array")
            return
    o = call.pick(copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a)))(o)
    o.step()
    norm = math.sqrt(sum(float(np.square(up(a)).sum()) for a in g.values()))
    kept = {name: up(np.array(a)) for name, a in g.items()}
    got = call.run(optim.clip_grad_norm, True, g, 0.5)
    require(abs(got - norm) <= 1e-5 * max(norm, 1), f"norm {got}, want {norm}")
    for name, a in g.items():
        same(np.array(a), np.asarray(kept[name] * min(1, 0.5 / norm)), dtype, "clipped")
    optim.clip_grad_value(g, 0.01)
    require(all(np.abs(a).max(initial=0) <= dtype.type(0.01) for a in g.values()), "not clipped")


def stepped_in_numpy(rule, p, g):
    """Two steps with one gradient."""
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t in (1, 2):
        if rule == "SGD":
            p = p - 0.1 * g
        elif rule == "RMSprop":
            v = 0.99 * v + 0.01 * g * g
            p = p - 0.1 * g / (np.sqrt(v) + 1e-8)
        elif rule == "Adagrad":
            v = v + g * g
            p = p - 0.1 * g / (np.sqrt(v) + 1e-10)
        else:
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            p = p * (1 - 0.1 * 0.01) if rule == "AdamW" else p
            p = p - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return p


# ---- threads that write ------------------------------------------------------------------------------

def refilled(call):
    """Ids, lengths and targets that another thread writes to during the call."""
    B, I, H = 400, 3, 2
    bad = call.pick(-1, 10**9, 2**62)
    kind = call.pick("ids", "lengths", "embedding", "targets", "pool", "step", "TokenIds")
    call.say("refilled", kind, bad)
    a = np.zeros(B, np.int64)
    m = layers.LSTM(I, H, seed=0)
    calls = {
        "ids": lambda: m(a[None]),
        "lengths": lambda: m(np.ones((2, B, I), "f4"), lengths=a),
        "embedding": lambda: layers.Embedding(I, H)(a),
        "targets": lambda: losses.softmax_cross_entropy(np.ones((B, I)), a),
        "pool": lambda: layers.LastStep()(np.ones((2, B, I)), a),
        "step": lambda: functional.Step("tanh", B, np.ones((H, I)), np.ones((H, H)))(a),
        "TokenIds": lambda: m(a[None], embedding=layers.Embedding(I, I))}
    for _ in range(5):
        while_refilled(a, bad, calls[kind])


def tokens_and_tables(call):
    """functional.TokenIds and TokenTable, as models use them."""
    dtype, V, H = call.dtype(), call.size(), call.size()
    T, B = call.size(), call.size()
    ids = call.spoil({"ids": call.rng.integers(0, V, (T, B))}, sizes={"ids": V})["ids"]
    shape = np.shape(ids) if not isinstance(ids, dict) else ()
    legal = are_ids(ids, V, shape) if isinstance(ids, np.ndarray) else None
    size = call.pick(V, V, V, V + 1)
    call.say("TokenIds", shape, size)
    tokens = call.run(functional.TokenIds, legal if size == V else None, ids, size)
    if tokens is None:
        return
    held = np.array(tokens.array)
    if isinstance(ids, np.ndarray) and ids.flags.writeable and ids.dtype != object:
        call.kept = []
        changed_in_place(call, ids)
    if call.chance(0.3):
        tokens = call.pick(copy.copy, copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a)))(tokens)
    try:
        tokens.array[...] = 10**9
        raise Finding("token ids that were checked can be written to")
    except ValueError:
        pass
    rows, W_hh = call.floats(V, 4 * H, dtype=dtype), call.floats(4 * H, H, dtype=dtype)
    given = call.spoil(dict(rows=rows, W_hh=W_hh), 0.3, 0.2)
    actual = getattr(given["W_hh"], "dtype", None)
    sizes = unified(dict(rows="VG", W_hh="GH"), given, actual)
    legal = sizes is not None and actual in (np.float32, np.float64) \
        and sizes["G"] == 4 * sizes["H"] and sizes["H"] > 0 and sizes["V"] == size and held.ndim == 2
    result = call.run(functional.lstm_forward, legal, tokens, functional.TokenTable(given["rows"]),
                      given["W_hh"], n_threads=call.threads())
    if result is None:
        return
    x = np.eye(size)[held.astype(np.int64)]
    want = reference.lstm_forward(x, up(given["rows"]).T, up(given["W_hh"]))
    same(result[:2], want[:2], actual, "table")
    dy = call.floats(*result[0].shape, dtype=actual)
    g = call.run(functional.lstm_backward, True, result[2], dy)
    back = reference.lstm_backward(want[2], up(dy))
    same((g.dW_ih, g.dW_hh), (back.dW_ih.T, back.dW_hh), actual, "table backward")


TARGETS = [one_layer] * 6 + [step_by_step, dense_layer, softmax, adam_step, a_layer, a_layer, a_layer,
                             a_stream, small_layers, small_layers, a_loss, a_loss, an_optimizer,
                             tokens_and_tables]


def attack(seed, n):
    """Call number n of a seed. Raises Finding."""
    call = Call(np.random.default_rng([seed, n]))
    before = _kernels.isa(), _kernels.plan, arguments._SERIAL_WORK
    _kernels.use_isa(call.pick(*_kernels.available_isas()))
    _kernels.plan = call.pick(None, "tiles", "fused", "blas")
    arguments._SERIAL_WORK = call.pick(0, before[2])
    target = refilled if call.chance(0.02) else call.pick(*TARGETS)
    call.say(f"{target.__name__}: {_kernels.isa()}, {_kernels.plan}")
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target(call)
    except Exception as error:
        raise Finding(f"seed {seed}, call {n}: {'; '.join(call.said)}\n"
                      f"{type(error).__name__}: {error}") from error
    finally:
        _kernels.use_isa(before[0])
        _, _kernels.plan, arguments._SERIAL_WORK = before


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--go-on", action="store_true", help="after a finding, too")
    args = parser.parse_args()
    start, found = time.monotonic(), 0
    for n in range(args.first, args.first + args.calls):
        if time.monotonic() - start > args.seconds:
            break
        try:
            attack(args.seed, n)
        except Finding:
            traceback.print_exc()
            found += 1
            if not args.go_on:
                break
    print(f"seed {args.seed}: calls {args.first} to {n}, {found} findings, "
          f"{time.monotonic() - start:.0f} s")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
