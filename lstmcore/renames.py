"""Keywords that have another name now: whoever gives the old one is told the new one.

Alone, because layers and models both need it; it knows neither.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T", bound=type)

_ESTIMATOR = {"learning_rate": "lr", "clip_norm": "clip", "embedding_size": "embed_size",
              "validation_fraction": "validation"}
RENAMED = {         # class -> keyword of its constructor -> what it is called now
    "Embedding": {"num_embeddings": "vocab_size", "embedding_dim": "embed_size"},
    "LSTMClassifier": _ESTIMATOR,
    "LSTMRegressor": _ESTIMATOR,
}


def check(kind: type, names: Iterable[str]) -> None:
    """TypeError for a keyword that has another name now."""
    new = _of(kind)
    for name in names:
        if name in new:
            raise TypeError(f"{kind.__name__} takes {new[name]}, which was called {name}")


def check_settings(names: Iterable[str]) -> None:
    """TypeError for a setting of `fit` that is called otherwise, as estimators once had it."""
    for name in names:
        if name in _ESTIMATOR:
            raise TypeError(f"fit takes {_ESTIMATOR[name]}, not {name}")


def current(kind: type, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of an object, pickled under whichever names, under those of now."""
    new = _of(kind)
    return {new.get(name, name): value for name, value in state.items()}


def checked(kind: T) -> T:
    """A class whose constructor says which of its keywords have another name now."""
    init = kind.__init__

    @functools.wraps(init)
    def named(self, *args, **options):
        check(type(self), options)
        init(self, *args, **options)
    kind.__init__ = named
    return kind


def _of(kind):
    return {old: new for base in kind.__mro__ for old, new in RENAMED.get(base.__name__, {}).items()}
