"""Module: what every layer and model is, whatever it computes.

Parameters with their gradients under one name, training and inference mode, state in and out of
dictionaries. There is no graph: a model calls its layers in order and their backwards in reverse
order, and a layer keeps, in training mode, what its next backward needs. It keeps its input, its
weights and its output themselves, not copies: leave the numbers in them as they are until then.
What it finds of another shape or dtype then is an error; what is indexed by is always a copy.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from lstmcore import checks, renames
from lstmcore._types import Compute, Floats, Path, Precision
from lstmcore.formats.description import one_bias
from lstmcore.precision import Quantized, check_precision, format_of_call, format_of_weights

M = TypeVar("M", bound="Module")

_blank = contextvars.ContextVar("_blank", default=False)        # whether `blank` is on


class Module:
    """A layer, or a model: a class whose attributes (or lists of them) are layers.

    A model's parameters are those of its layers, named `attribute.parameter`; a layer that appears
    twice is listed once.

    >>> from lstmcore import Embedding, Linear, Module
    >>> class Tagger(Module):
    ...     def __init__(self):
    ...         self.embed, self.head = Embedding(50, 8, seed=0), Linear(8, 3, seed=1)
    ...     def __call__(self, tokens):
    ...         return self.head(self.embed(tokens))
    ...     def backward(self, dlogits):
    ...         self.embed.backward(self.head.backward(dlogits))
    >>> [(name, p.shape) for name, p in Tagger().parameters().items()]
    [('embed.weight', (50, 8)), ('head.weight', (3, 8)), ('head.bias', (3,))]
    """

    training = True
    rng: np.random.Generator | None = None      # the layer's random numbers, where it needs any
    _own: dict[str, tuple[Floats, Floats]] = {}     # name -> (parameter, gradient) of this layer alone
    dtype: np.dtype[Any] | None = None          # of a layer with parameters
    compute: Compute | None = None      # the format of its products, where it is not the dtype
    _thawed = None      # of a frozen layer: name -> the parameter from before, for `unfreeze`
    _frozen_in: Precision | None = None         # of a frozen layer: the format of its products
    _quantized: dict[str, Quantized] = {}       # of one in int8: name -> its matrix, rounded
    _without: frozenset[str] = frozenset()      # of those, the names of which there are no floats
    _packed = None      # what a frozen layer with kernels has packed for them
    _tape = None        # what the last call in training mode left for backward
    _on_gradients: Callable[[], None] | None = None     # told in backward that more are complete
    _says: tuple[str, ...] = ()          # attributes that the parameters do not tell, and a file has to

    def parameters(self) -> dict[str, Floats]:
        """The parameters by name: the arrays themselves, to be changed only in place."""
        return {prefix + name: module._floats(name) for prefix, module in self.modules()
                for name in module._own}

    def gradients(self) -> dict[str, Floats]:
        """The gradients under the parameters' names: the arrays themselves."""
        return {name: g for name, (_, g) in self._named()}

    def place_gradients(self, places: Mapping[str, Floats]) -> None:
        """Let arrays of the gradients' shapes take their place, by name: they get what those hold.

        For whoever wants many gradients to lie together. An optimizer is made afterwards, or told by
        `Optimizer.follow`.
        """
        for prefix, module in self.modules():
            moved = {name: places[prefix + name] for name in module._own if prefix + name in places}
            for name, place in moved.items():
                place[...] = module._own[name][1]
            module._own = {name: (p, moved.get(name, g)) for name, (p, g) in module._own.items()}
            module._sort()

    def _sort(self):
        """Find the arrays in `_own` again, for layers that keep them elsewhere too."""

    def zero_grad(self) -> None:
        """Set every gradient to zero, before the next backward adds to it."""
        for _, module in self.modules():
            for name, (_, g) in module._own.items():
                if name not in module._without:
                    g.fill(0)

    def train(self: M, mode: bool = True) -> M:
        """Training mode: calls keep what backward needs, and dropout drops. Returns self."""
        if mode:
            self._check_not_frozen("be trained")
        for _, module in self.modules():
            module.training = bool(mode)
            if not mode:
                module._tape = None
        return self

    def eval(self: M) -> M:
        """Inference mode: nothing is kept, nothing dropped. Returns self."""
        return self.train(False)

    def freeze(self: M, precision: Precision | None = None) -> M:
        """Fix the parameters for inference, in inference mode, until `unfreeze`. Returns self.

        Calls no longer pack the weights for the kernels each time. By default they give the same
        bits. With a precision of "bfloat16" or "int8", for float32 layers, the operands of every
        product are rounded to that format: weights once, now; inputs and h in every call. Biases,
        peepholes, cells, gates, sums and what goes in and out stay float32. An Embedding gives
        float32 rows: in "int8" those that its rounded rows stand for, else its own.

        The parameters are immutable copies meanwhile, one more in memory, and float32 in every
        precision: nothing that is written through an array taken before reaches them. A copy or a
        pickle computes as the model does: it is frozen too only if it must be for that.

        Raises TypeError for a float64 layer in a precision of float32 layers, or the reverse; then
        nothing is frozen.

        >>> from lstmcore import LSTM
        >>> m = LSTM(3, 5, seed=0).freeze("int8")
        >>> m.parameters()["bias_l0"][0] = 1
        Traceback (most recent call last):
        ValueError: assignment destination is read-only
        """
        check_precision(precision)
        modules = [module for _, module in self.modules()]
        formats = [module._format(precision) if module._own else None for module in modules]
        self.eval()
        for module, format in zip(modules, formats):
            module._fix(format)
        return self

    def _format(self, precision):
        """The format of a frozen layer's products; an error where it cannot have it."""
        return format_of_weights(precision or self.compute, self.dtype)

    def unfreeze(self: M) -> M:
        """Let the parameters change again; the mode stays inference. Returns self.

        They are the arrays that they were before, for optimizers and whoever else has them, and
        hold what the frozen ones held. Of a model that was loaded in int8 they are new, and hold the
        floats that its weights stand for, q · scale.
        """
        for _, module in self.modules():
            module._fix(None)
        return self

    def modules(self) -> list[tuple[str, Module]]:
        """(prefix, module) of this module and of every module below it, each module once."""
        return list(self._walk("", set()))

    def save(self, path: Path, **options: Any) -> None:
        """Write the module to a file, for `lstmcore.load`: see `lstmcore.save`."""
        import lstmcore                 # files stand above the layers
        lstmcore.save(self, path, **options)

    def describe(self) -> dict[str, Any]:
        """What the parameters do not say of this module, as JSON can hold it: its class first."""
        kind, values = type(self), {name: getattr(self, name) for name in self._says}
        home = "" if kind.__module__.startswith("lstmcore.") else kind.__module__ + "."
        if self.compute:
            values["compute"] = self.compute
        return {"class": home + kind.__qualname__, **values}

    def state_dict(self) -> dict[str, Floats]:
        """A copy of every parameter by name."""
        return {name: p.copy() for name, p in self.parameters().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy `state` into the parameters; floats of another width are rounded to theirs.

        `state` maps names to arrays, or is a PyTorch state_dict. Its names and shapes must be this
        module's. PyTorch's two biases count as the one they act as:
        bias_l0 = bias_ih_l0 + bias_hh_l0, but for b_hn of a GRU.
        """
        self._check_not_frozen("load a state")
        state = _fold_bias_pairs({name: np.asarray(checks.unmasked(name, value))
                                  for name, value in state.items()})
        parameters = {name: p for name, (p, _) in self._named()}
        missing, unknown = parameters.keys() - state.keys(), state.keys() - parameters.keys()
        if missing or unknown:
            raise ValueError(f"the state does not fit {type(self).__name__}: "
                             f"missing {sorted(missing)}, unexpected {sorted(unknown)}")
        for name, p in parameters.items():
            if state[name].shape != p.shape:
                raise ValueError(f"{name} must be {p.shape}, got {state[name].shape}")
            if state[name].dtype.kind != "f":
                raise TypeError(f"{name} must hold floats, got {state[name].dtype}")
        for name, p in parameters.items():
            if not (_blank.get() and _is_matrix(name.rpartition(".")[2])):      # see `_fill`
                np.copyto(p, state[name], casting="same_kind")

    def rng_state(self) -> dict[str, Any]:
        """The state of every layer's random numbers, by the layer's name; JSON can hold it."""
        return {prefix + "rng": module.rng.bit_generator.state
                for prefix, module in self.modules() if module.rng is not None}

    def load_rng_state(self, state: Mapping[str, Any]) -> None:
        """Continue with the random numbers where `rng_state` described them."""
        for prefix, module in self.modules():
            if module.rng is not None:
                module.rng.bit_generator.state = state[prefix + "rng"]

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name != "_tape"}
        if self._thawed is not None:
            # apart from the arrays that wait for `unfreeze`, which a shallow copy would share
            own = {name: p.shape if name in self._without else (np.array(p), np.array(g))
                   for name, (p, g) in self._own.items()}
            as_before = self._frozen_in == (self.compute or str(self.dtype))
            state.update(_own=own, _thawed=None, _packed=None,
                         _frozen_in=None if as_before else self._frozen_in)
        return state

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(renames.current(type(self), state))
        self._own = {name: _outline(pair, self.dtype) if name in self._without else pair
                     for name, pair in self._own.items()}
        self._fix(self._frozen_in)

    def __repr__(self) -> str:
        said = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = getattr(self, name, parameter.default)
            if isinstance(value, np.dtype):
                value = str(value)
            if parameter.default is parameter.empty and hasattr(self, name):
                said.append(f"{value!r}")
            elif value != parameter.default:
                said.append(f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(said)})"

    def _fix(self, format):
        """Freeze this layer's own parameters in a format, or thaw them for None.

        Layers with kernels pack them.
        """
        if format != "int8" and self._without:
            self._expand()
        if format and self._thawed is None:
            self._thawed = {name: p for name, (p, _) in self._own.items()}
            self._own = {name: (_immutable(p), g) if name not in self._without else (p, g)
                         for name, (p, g) in self._own.items()}
        elif not format and self._thawed is not None:
            self._own, self._thawed = self._melted(), None
        self._frozen_in = format
        if not format:
            self._quantized = {}
        elif format == "int8" and not self._quantized:
            self._quantized = {name: Quantized.of(p) for name, (p, _) in self._own.items()
                               if _is_matrix(name)}
        self._hold_back()

    def _expand(self):
        """Make the floats that a layer loaded in int8 has not had."""
        for name in self._without:
            self._thawed[name] = p = self._quantized[name].floats()
            self._own[name] = _immutable(p), np.zeros_like(p)
        self._without = frozenset()

    def _floats(self, name):
        """A parameter of this layer, read-only if it is only what int8 numbers stand for."""
        if name not in self._without:
            return self._own[name][0]
        return _immutable(self._quantized[name].floats())

    def _stored(self):
        """name -> what a file holds of it: a parameter, or the `Quantized` of a layer in int8."""
        return {prefix + name: module._quantized[name] if module._frozen_in == "int8"
                and name in module._quantized else module._own[name][0]
                for prefix, module in self.modules() for name in module._own}

    def _fill(self, arrays):
        """Set the matrices of a module made in `blank`: from `Quantized` or from floats.

        A layer of whose matrices some are int8 is frozen in it.
        """
        for prefix, module in self.modules():
            wanted = {name: p for name, (p, _) in module._own.items() if _is_matrix(name)}
            found = {name: arrays[prefix + name] for name in wanted}
            lowered = {name for name, a in found.items() if isinstance(a, Quantized)}
            if lowered and lowered != wanted.keys():
                odd = sorted(wanted.keys() - lowered)[0]
                raise ValueError(f"{prefix}{odd} must be int8, as other weights of its layer are, got "
                                 f"{found[odd].dtype}")
            if lowered:
                module._quantized = {name: a.checked(prefix + name, wanted[name].shape)
                                     for name, a in found.items()}
                module._without = frozenset(wanted)
                module.eval()
            else:
                module._own = {name: _with_gradient(found[name].astype(module.dtype))
                               if name in wanted else pair for name, pair in module._own.items()}
            module._fix("int8" if lowered else None)

    def _melted(self):
        """`_own` with the parameters from before `freeze`, set to what the frozen ones hold."""
        for name, p in self._thawed.items():
            if not p.flags.writeable:
                p.flags.writeable = True
            p[...] = self._own[name][0]
        return {name: (self._thawed[name], g) for name, (_, g) in self._own.items()}

    def _hold_back(self):
        """Let who still has the parameters from before `freeze` notice: they are read-only.

        Unpickled arrays stay writable: in the memory of bytes, they would be read-only for good.
        """
        for p in (self._thawed or {}).values():
            if p.flags.owndata:
                p.flags.writeable = False

    def _check_not_frozen(self, what):
        if not (_blank.get() or all(p.flags.writeable for _, (p, _) in self._named())):
            raise ValueError(f"a frozen {type(self).__name__} cannot {what}: unfreeze() it first")

    def _walk(self, prefix, seen):
        if id(self) in seen:
            return
        seen.add(id(self))
        yield prefix, self
        for name, module in self._children():
            yield from module._walk(f"{prefix}{name}.", seen)

    def _children(self):
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value
            elif isinstance(value, (list, tuple)):
                yield from ((f"{name}.{n}", item) for n, item in enumerate(value)
                            if isinstance(item, Module))

    def _named(self):
        for prefix, module in self.modules():
            for name, pair in module._own.items():
                yield prefix + name, pair

    def _declare(self, name: str, shape: tuple[int, ...], draw: Callable[[], Floats]) -> None:
        """Make what `draw` returns a parameter of this layer, with a gradient of zeros."""
        pair = _outline(shape, self.dtype) if _blank.get() and _is_matrix(name) else \
            _with_gradient(draw().reshape(shape).astype(self.dtype))
        self._own = {**self._own, name: pair}

    def _keep(self, y, *tape):
        """Remember `tape` for backward, and what a gradient by the output y must look like."""
        self._tape = (y.shape, y.dtype, tape, _forms(tape)) if self.training else None

    def _take(self, dy, named="dy"):
        """dy, checked against the output of the last call, and the tape of that call, once.

        A dy of None stands for zeros.
        """
        if self._tape is None:
            name = type(self).__name__
            raise RuntimeError(f"{name}.backward needs a call of this {name} in training mode just "
                               "before it: none was kept, or a backward has already used it")
        shape, dtype, tape, forms = self._tape
        dy = np.zeros(shape, dtype) if dy is None else checks.floats(named, dy, dtype)
        if dy.shape != shape:
            raise ValueError(f"{named} must have the shape of the output, {shape}, got {dy.shape}")
        if (now := _forms(tape)) != forms:
            raise ValueError("an array that backward needs must stay as it was in the call, "
                             f"{forms}, got {now}")
        self._tape = None
        return dy, *tape


def _forms(tape):
    """The shapes and dtypes of the arrays of a tape."""
    return [(a.shape, str(a.dtype)) for a in tape if isinstance(a, np.ndarray)]


@contextlib.contextmanager
def blank() -> Iterator[None]:
    """Layers that are made meanwhile draw no matrices and have none yet, for `Module._fill`."""
    before = _blank.set(True)
    try:
        yield
    finally:
        _blank.reset(before)


def products(compute: Compute | None, dtype: np.dtype[Any]) -> Compute | None:
    """compute, found to be a format of products of this dtype; None where it is the dtype itself."""
    format = format_of_call(compute, dtype, int8="that is for inference, by freeze('int8')")
    return None if format == str(dtype) else format


def _is_matrix(name):
    """Whether a parameter is an operand of products, which int8 rounds; the others are added."""
    return not name.startswith(("bias", "weight_peephole", "weight_layernorm"))


def _with_gradient(p):
    return p, np.zeros_like(p)


def _outline(shape, dtype):
    """A parameter and a gradient of zeros that take no memory, to be read only."""
    zeros = np.broadcast_to(np.zeros((), dtype), shape)
    return zeros, zeros


def _immutable(p):
    """A copy of p that nobody can make writable: its memory is that of bytes."""
    return np.frombuffer(p.tobytes(), p.dtype).reshape(p.shape)


def dropout_mask(rng: np.random.Generator, p: float, shape: tuple[int, ...],
                 dtype: np.dtype[Any]) -> Floats:
    """Zero with probability p, else 1 / (1 - p), so that x * mask has the expectation of x.

    16 random bits decide on a number (four times as fast as a random float), so p is rounded to a
    multiple of 2^-16; the scale is that of the rounded p.
    """
    dropped = round(p * 65536)
    if dropped == 65536:
        return np.zeros(shape, dtype)
    kept = rng.integers(0, 65536, shape, np.uint16) >= dropped
    return kept * dtype.type(65536 / (65536 - dropped))


def _fold_bias_pairs(state):
    """PyTorch's bias_ih_* and bias_hh_* as the one bias_* that they act as."""
    folded = dict(state)
    for name in state:
        match = re.fullmatch(r"(.*)bias_ih_(l\d+(?:_reverse)?)", name)
        if match and (other := f"{match[1]}bias_hh_{match[2]}") in state:
            if state[name].shape != state[other].shape:
                raise ValueError(f"{other} must be {state[name].shape} as {name}, "
                                 f"got {state[other].shape}")
            folded[f"{match[1]}bias_{match[2]}"] = one_bias(
                folded.pop(name), folded.pop(other), state.get(f"{match[1]}weight_hh_{match[2]}"))
    return folded
