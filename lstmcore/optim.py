"""Optimizers, gradient clipping, learning-rate schedules.

An optimizer changes the parameters of a model in place, from the gradients beside them. It walks
through them in blocks that fit the cache, or in one kernel (Adam), and allocates nothing of the
parameters' size after its first step. Optimizers and schedules give and take their state, so that a
training that is resumed goes on bit for bit.

The update rules are PyTorch's, letter for letter: p parameter, g gradient, lr learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import cos, inf, pi, sqrt
from typing import Any, TypeAlias

import numpy as np

from lstmcore import _kernels, checks, dense, scalars
from lstmcore._types import Array, Floats
from lstmcore.module import Module

# What an optimizer changes: a Module, parameters and gradients by name, or an array and its gradient.
Trained: TypeAlias = (Module | tuple[Mapping[str, Floats], Mapping[str, Floats]]
                      | tuple[Floats, Floats])

BLOCK = 32768   # numbers: six blocks of float32, 768 KB, stay in a second-level cache


class Optimizer:
    """What all update rules share: the walk over the parameters, and the state.

    `model` is a Module, or a pair (parameters, gradients) of dicts with the same names or of two
    arrays; the arrays must stay in their place, unfrozen, for every step; `lr` may be changed between
    steps. A rule names the arrays it keeps per parameter in `slots`, and updates one block of one
    parameter in `_update(p, g, s, r, *slots)`, with s and r to write on.
    """

    slots: tuple[str, ...] = ()
    block: int | None = BLOCK       # numbers that `_update` is given at once

    def __init__(self, model: Trained, lr: float, weight_decay: float) -> None:
        self.lr = scalars.number("lr", lr)
        self.weight_decay = scalars.number("weight_decay", weight_decay)
        self.steps = 0
        if isinstance(model, Module):
            model._check_not_frozen("be trained")
        self._model = model
        self._parameters, self._gradients = _parameters_and_gradients(model)
        self._shapes = {name: (p.shape, p.dtype) for name, p in self._parameters.items()}
        self._slots = {slot: {name: np.zeros_like(p) for name, p in self._parameters.items()}
                       for slot in self.slots}
        self._own: Mapping[str, slice] | None = None
        self._blocks = self._seen = None

    def step(self) -> None:
        """Update every parameter by its gradient, once."""
        self._check_unchanged()
        self.steps += 1
        self._prepare()
        for block in self._blocks:
            self._update(*block)

    def state_dict(self) -> dict[str, Array]:
        """Everything that steps change, as a flat dict of name -> copied array."""
        state = {name: a.copy() for name, a in self.arrays().items()}
        return {"lr": np.array(self.lr), "steps": np.array(self.steps), **state}

    def follow(self) -> None:
        """Take the gradients where the model has them now: see `Module.place_gradients`."""
        _, self._gradients = _parameters_and_gradients(self._model)
        self._seen = None

    def restrict(self, own: Mapping[str, slice] | None) -> None:
        """Update only these numbers of each parameter, counted in its flat form, from now on; None: all.

        For whoever has the others updated elsewhere. A parameter without a slice is left alone.
        """
        self._own, self._seen = own, None

    def arrays(self) -> dict[str, Floats]:
        """The arrays that the rule keeps, themselves, by slot and parameter."""
        return {f"{slot}.{name}": a
                for slot, arrays in self._slots.items() for name, a in arrays.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state_dict of the same rule over the same parameters."""
        own = self.arrays()
        if state.keys() != {"lr", "steps", *own}:
            raise ValueError(f"the state does not fit {type(self).__name__} over these "
                             f"parameters: expected {sorted(own)}, got {sorted(state)}")
        given = {name: np.asarray(checks.unmasked(name, a)) for name, a in state.items()}
        for name, a in own.items():
            if given[name].shape != a.shape or given[name].dtype != a.dtype:
                error = ValueError if given[name].dtype == a.dtype else TypeError
                raise error(f"{name} must be {a.dtype} {a.shape}, "
                            f"got {given[name].dtype} {given[name].shape}")
        lr = scalars.number("lr", given["lr"].tolist())
        steps = scalars.size("steps", given["steps"].tolist(), at_least=0)
        for name, a in own.items():
            a[...] = given[name]
        self.lr, self.steps = lr, steps

    def __getstate__(self) -> dict[str, Any]:
        # Views and addresses: cut anew from the arrays.
        return {**vars(self), "_blocks": None, "_seen": None}

    def _check_unchanged(self):
        """The arrays must be those of the model still; if one has moved, the blocks are cut again.

        A block of an array that was resized would point into freed memory.
        """
        now = dict(_pairs(self._model))
        for name, p in self._parameters.items():
            if not p.flags.writeable:
                raise ValueError(f"parameter {name} is frozen: unfreeze() the model first")
            own, found = (p, self._gradients[name]), now.get(name, (None, None))
            if own[0] is not found[0] or own[1] is not found[1]:
                raise ValueError(f"parameter {name} and its gradient must be the arrays that this "
                                 "optimizer was made for: make a new one for others")
        seen = _kernels.layout([*self._parameters.values(), *self._gradients.values()])
        if seen == self._seen:
            return
        _parameters_and_gradients((self._parameters, self._gradients))
        for name, p in self._parameters.items():
            if (p.shape, p.dtype) != self._shapes[name]:
                shape, dtype = self._shapes[name]
                raise ValueError(f"parameter {name} must stay {dtype} {shape}, "
                                 f"got {p.dtype} {p.shape}")
        self._blocks, self._seen = list(self._cut()), seen

    def _prepare(self):
        """What depends on the number of steps alone, once per step."""

    def _cut(self):
        """(p, g, s, r, *slots) of every block of every parameter, flat."""
        scratch = {p.dtype: np.empty((2, BLOCK), p.dtype) for p in self._parameters.values()}
        for name, p in self._parameters.items():
            size = self.block or max(1, p.size)
            s, r = scratch[p.dtype][:, :min(BLOCK, p.size)]
            flat = [a[name].reshape(-1)
                    for a in (self._parameters, self._gradients, *self._slots.values())]
            own = slice(0, p.size) if self._own is None else self._own.get(name, slice(0, 0))
            for at in range(own.start, own.stop, size):
                p_, g_, *slots = (a[at:min(at + size, own.stop)] for a in flat)
                yield p_, g_, s[:p_.size], r[:p_.size], *slots

    def _decayed(self, p, g, s):
        """g + weight_decay · p, in s, or g itself without decay."""
        if not self.weight_decay:
            return g
        np.multiply(p, self.weight_decay, out=s)
        s += g
        return s


class SGD(Optimizer):
    """Gradient descent: p -= lr · v, where v = momentum · v + g.

    With nesterov (Nesterov 1983; Sutskever et al. 2013) p -= lr · (g + momentum · v).

    >>> from lstmcore import Linear
    >>> optimizer = SGD(Linear(3, 2, seed=0), lr=0.1, momentum=0.9)
    >>> optimizer.step()
    >>> w, dw = np.array([0.0]), np.array([2.0])        # or arrays of one's own
    >>> SGD((w, dw), lr=0.1).step()
    >>> w
    array([-0.2])
    """

    def __init__(self, model: Trained, lr: float, *, momentum: float = 0.0, nesterov: bool = False,
                 weight_decay: float = 0.0) -> None:
        self.momentum, self.nesterov = scalars.number("momentum", momentum), bool(nesterov)
        if nesterov and not momentum:
            raise ValueError("nesterov needs a momentum above 0")
        self.slots = ("velocity",) if momentum else ()
        super().__init__(model, lr, weight_decay)

    def _update(self, p, g, s, r, v=None):
        g = self._decayed(p, g, s)
        if v is not None:
            v *= self.momentum
            v += g
            if self.nesterov:
                np.multiply(v, self.momentum, out=r)
                r += g
            g = r if self.nesterov else v
        np.multiply(g, self.lr, out=s)
        p -= s


class RMSprop(Optimizer):
    """RMSprop (Tieleman and Hinton 2012): the gradient over its root mean square.

        v = alpha · v + (1 - alpha) · g² ;   d = g / (√v + eps) ;   p -= lr · d

    centered (Graves 2013): √(v - m²), where m = alpha · m + (1 - alpha) · g, instead of √v.
    momentum: p -= lr · u, where u = momentum · u + d.
    """

    def __init__(self, model: Trained, lr: float = 0.01, *, alpha: float = 0.99, eps: float = 1e-8,
                 centered: bool = False, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        self.alpha, self.eps = scalars.fraction("alpha", alpha), scalars.number("eps", eps)
        self.momentum, self.centered = scalars.number("momentum", momentum), bool(centered)
        self.slots = ("square", *["mean"] * self.centered, *["velocity"] * (self.momentum > 0))
        super().__init__(model, lr, weight_decay)

    def _update(self, p, g, s, r, v, *slots):
        g = self._decayed(p, g, s)
        _follow(v, np.multiply(g, g, out=r), self.alpha, r)
        if self.centered:
            m = slots[0]
            _follow(m, g, self.alpha, r)
            np.multiply(m, m, out=r)
            np.subtract(v, r, out=r)
            np.maximum(r, 0, out=r)             # a variance, but for rounding
        np.sqrt(r if self.centered else v, out=r)
        r += self.eps
        np.divide(g, r, out=r)
        if self.momentum:
            u = slots[-1]
            u *= self.momentum
            u += r
            np.multiply(u, self.lr, out=r)
        else:
            r *= self.lr
        p -= r


class Adagrad(Optimizer):
    """Adagrad (Duchi et al. 2011): v += g² ;   p -= lr · g / (√v + eps)."""

    slots = ("square",)

    def __init__(self, model: Trained, lr: float = 0.01, *, eps: float = 1e-10,
                 weight_decay: float = 0.0) -> None:
        self.eps = scalars.number("eps", eps)
        super().__init__(model, lr, weight_decay)

    def _update(self, p, g, s, r, v):
        g = self._decayed(p, g, s)
        v += np.multiply(g, g, out=r)
        np.sqrt(v, out=r)
        r += self.eps
        np.divide(g, r, out=r)
        r *= self.lr
        p -= r


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015): the mean gradient over its root mean square, both unbiased.

        m = b1 · m + (1 - b1) · g ;   v = b2 · v + (1 - b2) · g²
        p -= lr · m / (1 - b1ᵗ) / (√(v / (1 - b2ᵗ)) + eps)          in step t = 1, 2, ...
    """

    slots = ("mean", "square")

    def __init__(self, model: Trained, lr: float = 1e-3, *,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0) -> None:
        b1, b2 = betas
        self.betas = scalars.fraction("betas[0]", b1), scalars.fraction("betas[1]", b2)
        self.eps = scalars.number("eps", eps)
        super().__init__(model, lr, weight_decay)

    block = None        # a kernel passes over a whole parameter, 5 times as fast as the rules above

    def _prepare(self):
        # The corrections of v leave the root and join the scalars.
        b1, b2 = self.betas
        root = sqrt(1 - b2**self.steps)
        self._rate, self._eps = self.lr * root / (1 - b1**self.steps), self.eps * root

    def _update(self, p, g, s, r, m, v):
        dense.adam_step(p, g, m, v, betas=self.betas, rate=self._rate, eps=self._eps,
                        **self._decay())

    def _decay(self):
        return {"decay": self.weight_decay}


class AdamW(Adam):
    """Adam with decoupled decay (Loshchilov and Hutter 2019): p -= lr · weight_decay · p first."""

    def __init__(self, model: Trained, lr: float = 1e-3, *,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.01) -> None:
        super().__init__(model, lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def _decay(self):
        return {"keep": 1 - self.lr * self.weight_decay}


def _follow(average, new, keep, r):
    """average = keep · average + (1 - keep) · new; r is written on, and may be new."""
    np.subtract(new, average, out=r)
    r *= 1 - keep
    average += r


def clip_grad_norm(gradients: Module | Mapping[str, Floats] | Floats, max_norm: float) -> float:
    """Scale gradients in place so that their joint 2-norm is at most max_norm; the norm before.

    `gradients` is a model, or what its `gradients()` returns, or one array. A norm that is not finite is
    returned and nothing scaled. The sums are cut in fixed blocks: the same bits for any number of threads.

    >>> g = {"a": np.array([3.0, 0.0]), "b": np.array([[4.0]])}
    >>> clip_grad_norm(g, 1.0), g["b"].round(3)
    (5.0, array([[0.8]]))
    """
    max_norm, arrays = scalars.number("max_norm", max_norm), _to_be_clipped(gradients)
    blocks = [a.reshape(-1)[at:at + BLOCK] for a in arrays for at in range(0, a.size, BLOCK)]
    norm = joint_norm(blocks)
    scale_to(arrays, norm, max_norm)
    return norm


def joint_norm(blocks: Sequence[Floats],
               to_all: Callable[[list[float]], list[float]] = list) -> float:
    """The 2-norm of blocks of numbers together.

    to_all : the sums of squares of these blocks -> those of all blocks, where others have more of them,
        in an order that is always the same
    """
    def norm_of(dtype):
        return sqrt(sum(to_all([float(np.square(g, dtype=dtype).sum()) for g in blocks])))

    with np.errstate(over="ignore", invalid="ignore"):
        norm = norm_of(None)
        return norm_of(np.float64) if norm == inf else norm     # squares beyond float32


def scale_to(arrays: Sequence[Floats], norm: float, max_norm: float) -> None:
    """Scale arrays of this joint norm in place, so that it is at most max_norm; one that is not finite
    scales nothing."""
    if max_norm < norm < inf:
        for g in arrays:
            g *= max_norm / norm


def clip_grad_value(gradients: Module | Mapping[str, Floats] | Floats, max_value: float) -> None:
    """Limit every number of the gradients to -max_value..max_value, in place.

    `gradients` is a model, or what its `gradients()` returns, or one array.
    """
    max_value = scalars.number("max_value", max_value)
    for g in _to_be_clipped(gradients):
        np.clip(g, -max_value, max_value, out=g)


RULES = {"sgd": SGD, "rmsprop": RMSprop, "adagrad": Adagrad, "adam": Adam, "adamw": AdamW}


def by_name(name: str, model: Trained, **options: Any) -> Optimizer:
    """The optimizer that a word names: "sgd", "rmsprop", "adagrad", "adam" or "adamw".

    options : lr, weight_decay and whatever else its class takes

    >>> by_name("sgd", ({}, {}), lr=0.1, momentum=0.9).momentum
    0.9
    """
    return RULES[scalars.choice("optimizer", name, RULES)](model, **options)


class Schedule:
    """What all schedules share: `step()` after every epoch, or every update, sets optimizer.lr."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.base, self.count = optimizer, optimizer.lr, 0
        optimizer.lr = self.lr_at(0)

    def lr_at(self, n: int) -> float:
        """The learning rate after n steps."""
        raise NotImplementedError(f"{type(self).__name__} must say what lr is after n steps")

    def step(self) -> None:
        """Count one more, and set the learning rate accordingly."""
        self.count += 1
        self.optimizer.lr = self.lr_at(self.count)

    def state_dict(self) -> dict[str, Any]:
        """What steps change, as a dict of numbers; JSON can hold it."""
        return {"base": self.base, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state_dict of the same kind of schedule, the learning rate included."""
        self.base = scalars.number("base", state["base"])
        self.count = scalars.size("count", state["count"], at_least=0)
        self.optimizer.lr = self.lr_at(self.count)


class StepDecay(Schedule):
    """lr = base · factor^k, where k counts the full spans of `every` steps after `start`.

    >>> optimizer = SGD(({}, {}), lr=1.0)
    >>> schedule = StepDecay(optimizer, every=2, factor=0.5, start=1)
    >>> for _ in range(5):
    ...     schedule.step()
    >>> optimizer.lr
    0.25
    """

    def __init__(self, optimizer: Optimizer, every: int, factor: float, *, start: int = 0) -> None:
        self.every, self.factor, self.start = scalars.size("every", every), float(factor), start
        super().__init__(optimizer)

    def lr_at(self, n: int) -> float:
        """The learning rate after n steps."""
        return self.base * self.factor ** (max(0, n - self.start) // self.every)


class CosineDecay(Schedule):
    """lr falls from base to `final` in `steps` steps, by half a cosine, and stays there."""

    def __init__(self, optimizer: Optimizer, steps: int, *, final: float = 0.0) -> None:
        self.steps, self.final = scalars.size("steps", steps), scalars.number("final", final)
        super().__init__(optimizer)

    def lr_at(self, n: int) -> float:
        """The learning rate after n steps."""
        share = (1 + cos(pi * min(n, self.steps) / self.steps)) / 2
        return self.final + (self.base - self.final) * share


class WarmUp(Schedule):
    """lr rises evenly to base in `steps` steps, from base / steps; then another schedule's turn.

    `then` is that schedule, made for the same optimizer; by default lr stays at base.

    >>> optimizer = SGD(({}, {}), lr=1.0)
    >>> schedule = WarmUp(optimizer, 4, then=CosineDecay(optimizer, 100))
    >>> optimizer.lr
    0.25
    """

    def __init__(self, optimizer: Optimizer, steps: int, *, then: Schedule | None = None) -> None:
        if then is not None and (then.optimizer is not optimizer or not hasattr(then, "lr_at")):
            raise ValueError("then must be a StepDecay or CosineDecay of the same optimizer")
        self.steps, self.then = scalars.size("steps", steps), then
        super().__init__(optimizer)

    def lr_at(self, n: int) -> float:
        """The learning rate after n steps."""
        if n < self.steps:
            return self.base * (n + 1) / self.steps
        return self.then.lr_at(n - self.steps) if self.then else self.base

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state_dict of the same kind of schedule, the learning rate included."""
        if self.then:
            self.then.base = scalars.number("base", state["base"])
        super().load_state_dict(state)


class Plateau:
    """lr becomes factor · lr when a loss has not fallen for more than `patience` steps in a row.

    Falling means below the best so far by the share `threshold` of it; lr never gets below
    `min_lr`.

    >>> optimizer = SGD(({}, {}), lr=1.0)
    >>> schedule = Plateau(optimizer, factor=0.1, patience=1)
    >>> for loss in (3.0, 2.0, 2.5, 2.5):
    ...     schedule.step(loss)
    >>> optimizer.lr
    0.1
    """

    def __init__(self, optimizer: Optimizer, *, factor: float = 0.5, patience: int = 0,
                 threshold: float = 1e-4, min_lr: float = 0.0) -> None:
        self.optimizer, self.factor = optimizer, scalars.fraction("factor", factor)
        self.patience = scalars.size("patience", patience, at_least=0)
        self.threshold = scalars.number("threshold", threshold)
        self.min_lr = scalars.number("min_lr", min_lr)
        self.best: float | None = None
        self.waited = 0

    def step(self, loss: float) -> None:
        """Take note of a loss, and lower the learning rate if it is time."""
        if self.best is None or loss < self.best - self.threshold * abs(self.best):
            self.best, self.waited = float(loss), 0
            return
        self.waited += 1
        if self.waited > self.patience:
            self.optimizer.lr = max(self.optimizer.lr * self.factor, self.min_lr)
            self.waited = 0

    def state_dict(self) -> dict[str, Any]:
        """What steps change, as a dict of numbers; JSON can hold it."""
        return {"lr": self.optimizer.lr, "best": self.best, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state_dict of another Plateau, the learning rate included."""
        lr = scalars.number("lr", state["lr"])
        best = None if state["best"] is None else float(state["best"])
        waited = scalars.size("waited", state["waited"], at_least=0)
        self.optimizer.lr, self.best, self.waited = lr, best, waited


def _parameters_and_gradients(model):
    """The two dicts of a Module or of a pair, found fit to be updated in place."""
    parameters, gradients = _both(model)
    if parameters.keys() != gradients.keys():
        raise ValueError(f"parameters and gradients must have the same names, "
                         f"got {sorted(parameters.keys() ^ gradients.keys())} in one only")
    for name, p in parameters.items():
        g = gradients[name]
        _check_float_array(f"parameter {name}", p), _check_float_array(f"gradient {name}", g)
        if g.shape != p.shape or g.dtype != p.dtype:
            raise ValueError(f"gradient {name} must be {p.dtype} {p.shape}, "
                             f"got {g.dtype} {g.shape}")
        checks.out(f"parameter {name}", p, p.shape, p.dtype)
        checks.out(f"gradient {name}", g, p.shape, p.dtype, p)
    return dict(parameters), dict(gradients)


def _both(model):
    if isinstance(model, tuple) and len(model) == 2:
        arrays = [isinstance(each, np.ndarray) for each in model]
        if all(arrays):
            return {"p": model[0]}, {"p": model[1]}
        if not any(arrays) and all(isinstance(each, Mapping) for each in model):
            return model
    elif isinstance(model, Module):
        return model.parameters(), model.gradients()
    got = f"({', '.join(type(each).__name__ for each in model)})" if isinstance(model, tuple) else \
        type(model).__name__
    raise TypeError("an optimizer needs a Module, or a pair (parameters, gradients) of dicts of arrays "
                    f"or of two arrays, got {got}")


def _pairs(model):
    """(name, (parameter, gradient)), of a Module in one walk."""
    if isinstance(model, Module):
        return model._named()
    parameters, gradients = _both(model)
    return ((name, (p, gradients.get(name))) for name, p in parameters.items())


def _to_be_clipped(gradients):
    """The arrays of a Module, or of a dict, or one, found fit to be changed in place."""
    named = gradients.gradients() if isinstance(gradients, Module) else gradients
    named = {"p": named} if isinstance(named, np.ndarray) else named
    if not isinstance(named, Mapping):
        raise TypeError("clipping needs a Module, a dict of arrays or an array, "
                        f"got {type(gradients).__name__}")
    for name, g in named.items():
        _check_float_array(f"gradient {name}", g)
        if not g.flags.writeable:
            raise ValueError(f"gradient {name} must be writable")
    return list(named.values())


def _check_float_array(what, a):
    checks.unmasked(what, a)
    if not isinstance(a, np.ndarray) or a.dtype not in (checks.F32, checks.F64):
        raise TypeError(f"{what} must be a float32 or float64 array, "
                        f"got {getattr(a, 'dtype', type(a).__name__)}")
