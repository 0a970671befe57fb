"""Module: what every layer and model is, whatever it computes.

Parameters with their gradients under one name, training and inference mode, state in and out of
dictionaries. There is no graph: a model calls its layers in order and their backwards in reverse
order, and a layer keeps, in training mode, what its next backward needs. It keeps its input, its
weights and its output themselves, not copies: leave the numbers in them as they are until then.
What it finds of another shape or dtype then is an error; what is indexed by is always a copy.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from lstmcore import checks
from lstmcore._types import Floats, Path

M = TypeVar("M", bound="Module")


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
    _thawed = None      # of a frozen layer: name -> the parameter from before, for `unfreeze`
    _packed = None      # what a frozen layer with kernels has packed for them
    _tape = None        # what the last call in training mode left for backward
    _says: tuple[str, ...] = ()          # attributes that the parameters do not tell, and a file has to

    def parameters(self) -> dict[str, Floats]:
        """The parameters by name: the arrays themselves, to be changed only in place."""
        return {name: p for name, (p, _) in self._named()}

    def gradients(self) -> dict[str, Floats]:
        """The gradients under the parameters' names: the arrays themselves."""
        return {name: g for name, (_, g) in self._named()}

    def zero_grad(self) -> None:
        """Set every gradient to zero, before the next backward adds to it."""
        for _, (_, g) in self._named():
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

    def freeze(self: M) -> M:
        """Fix the parameters for inference, in inference mode, until `unfreeze`. Returns self.

        Calls give the same bits, but no longer pack the weights for the kernels each time. The
        parameters are immutable copies meanwhile, one more in memory: nothing that is written
        through an array taken before reaches them. A copy or a pickle of the model is not frozen.

        >>> from lstmcore import LSTM
        >>> m = LSTM(3, 5, seed=0).freeze()
        >>> m.parameters()["bias_l0"][0] = 1
        Traceback (most recent call last):
        ValueError: assignment destination is read-only
        """
        for _, module in self.eval().modules():
            module._fix(True)
        return self

    def unfreeze(self: M) -> M:
        """Let the parameters change again; the mode stays inference. Returns self.

        They are the arrays that they were before, for optimizers and whoever else has them, and
        hold what the frozen ones held.
        """
        for _, module in self.modules():
            module._fix(False)
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
        parameters = self.parameters()
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
            own = {name: (np.array(p), np.array(g)) for name, (p, g) in self._own.items()}
            state.update(_own=own, _thawed=None, _packed=None)
        return state

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

    def _fix(self, fixed):
        """Freeze this layer's own parameters, or thaw them; layers with kernels pack them."""
        if fixed and self._thawed is None:
            self._thawed = {name: p for name, (p, _) in self._own.items()}
            self._own = {name: (_immutable(p), g) for name, (p, g) in self._own.items()}
        elif not fixed and self._thawed is not None:
            self._own, self._thawed = self._melted(), None
        self._hold_back()

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
        if not all(p.flags.writeable for p in self.parameters().values()):
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

    def _declare(self, name, value):
        """Make `value` a parameter of this layer, with a gradient of zeros; returns both."""
        pair = value, np.zeros_like(value)
        self._own = {**self._own, name: pair}
        return pair

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
    from lstmcore.formats.description import one_bias       # arrays alone: it knows no layer

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
