"""A short run of the randomized attack (tests/attack.py), and that it would find something."""

import attack
import numpy as np
import pytest

from lstmcore import functional


@pytest.mark.parametrize("seed", range(4))
def test_attacks_find_nothing(seed):
    for n in range(100):
        attack.attack(seed, n)


def wrong(forward):
    """A forward pass whose last number is a little off."""
    def run(*args, **kwargs):
        y, *rest = forward(*args, **kwargs)
        y.flat[-1:] += 1e-3
        return y, *rest
    return run


def writing(forward):
    """A forward pass that writes to its bias."""
    def run(*args, b=None, **kwargs):
        result = forward(*args, b=b, **kwargs)
        if b is not None and b.flags.writeable:
            b[...] = 7
        return result
    return run


def aliasing(forward):
    """A forward pass whose y lies in its input."""
    def run(x, *args, **kwargs):
        y, *rest = forward(x, *args, **kwargs)
        return (np.frombuffer(x.data, y.dtype)[:y.size].reshape(y.shape)
                if x.nbytes >= y.nbytes and x.flags.c_contiguous and x.size else y), *rest
    return run


def lenient(forward):
    """A forward pass that casts W_hh to the dtype of x."""
    def run(x, W_ih, W_hh, *args, **kwargs):
        if isinstance(W_hh, np.ndarray) and x.dtype.kind == "f":
            W_hh = W_hh.astype(x.dtype)
        return forward(x, W_ih, W_hh, *args, **kwargs)
    return run


@pytest.mark.parametrize("fault, words", [
    (wrong, "off by"), (writing, "an input was written to"), (aliasing, "memory of an input"),
    (lenient, "accepted")])
def test_a_planted_fault_is_found(fault, words, monkeypatch):
    for name in "lstm_forward", "rnn_forward":
        monkeypatch.setattr(functional, name, fault(getattr(functional, name)))
    monkeypatch.setattr(attack, "TARGETS", [attack.one_layer])
    with pytest.raises(attack.Finding, match=words):
        for n in range(300):
            attack.attack(0, n)
