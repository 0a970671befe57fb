"""Optimizers, gradient clipping and learning-rate schedules.

An optimizer changes the parameters of a model in place, from the gradients beside them. It works
through them in blocks that fit the cache and allocates nothing of the parameters' size per step.
"""

import numpy as np

BLOCK = 32768  # numbers per block: the five arrays of Adam, 128 KB each in float32, stay in L2


class Optimizer:
    """Shared by all update rules: the walk over the blocks, the state, its saving.

    A rule names its arrays in `slots` and updates one block in `_update`.
    """

    slots = ()

    def __init__(self, model, lr, weight_decay):
        self.lr, self.weight_decay, self.steps = float(lr), float(weight_decay), 0
        parameters, gradients = _named(model)
        self._parameters, self._gradients = parameters, gradients
        self._slots = {slot: {name: np.zeros_like(p) for name, p in parameters.items()}
                       for slot in self.slots}

    def step(self):
        """One update of every parameter by its gradient."""
        self.steps += 1
        for p, g, s, slots in self._blocks():
            self._update(p, g, s, *slots)

    def _blocks(self):
        scratch = {}
        for name, p in self._parameters.items():
            g = self._gradients[name]
            s = scratch.setdefault(p.dtype, np.empty(BLOCK, p.dtype))
            arrays = [a.reshape(-1) for a in (p, g, *(x[name] for x in self._slots.values()))]
            for n in range(0, p.size, BLOCK):
                p_, g_, *slots = (a[n:n + BLOCK] for a in arrays)
                yield p_, g_, s[:p_.size], slots


def _named(model):
    if hasattr(model, "parameters"):
        return model.parameters(), model.gradients()
    return model


class SGD(Optimizer):
    """p -= lr · v, with v = momentum · v + (1 - dampening) · g."""

    slots = ("velocity",)

    def __init__(self, model, lr, *, momentum=0.0, nesterov=False, weight_decay=0.0):
        self.momentum, self.nesterov = float(momentum), bool(nesterov)
        super().__init__(model, lr, weight_decay)

    def _update(self, p, g, s, v):
        np.multiply(p, self.weight_decay, out=s)
        s += g
        v *= self.momentum
        v += s
        if self.nesterov:
            s += self.momentum * v
        else:
            np.copyto(s, v)
        s *= self.lr
        p -= s


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015); weight_decay is added to the gradient."""

    slots = ("mean", "square")

    def __init__(self, model, lr=1e-3, *, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        self.betas, self.eps = betas, float(eps)
        super().__init__(model, lr, weight_decay)

    def _update(self, p, g, s, m, v):
        b1, b2 = self.betas
        np.multiply(p, self.weight_decay, out=s)
        s += g
        v *= b2
        m *= b1
        m += (1 - b1) * s
        s *= s
        s *= 1 - b2
        v += s
        np.sqrt(v, out=s)
        s /= (1 - b2**self.steps) ** 0.5
        s += self.eps
        np.divide(m, s, out=s)
        s *= self.lr / (1 - b1**self.steps)
        p -= s


def clip_grad_norm(gradients, max_norm):
    """Scale the gradients in place so that their joint 2-norm is at most max_norm; the norm before.

    `gradients` is a model, or what its `gradients()` returns.
    """
    if hasattr(gradients, "gradients"):
        gradients = gradients.gradients()
    norm = float(np.sqrt(sum(float(np.vdot(g, g)) for g in gradients.values())))
    if norm > max_norm:
        for g in gradients.values():
            g *= max_norm / norm
    return norm
