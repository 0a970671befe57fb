"""What Keras's configuration says of an LSTM's activations and recurrent dropout, read and written."""

import re

from lstmcore.variants import activation

USUAL = {"recurrent_activation": "sigmoid", "activation": "tanh"}
ACTIVATIONS = {
    **{name: name for name in ("sigmoid", "tanh", "linear", "relu", "softsign", "elu", "selu",
                               "hard_sigmoid")},
    "leaky_relu": ("leaky_relu", 0.2)}

def read(path, name, config, version=""):
    """In what the configuration of a Keras LSTM differs from the usual one, as `lstmcore.LSTM` takes it."""
    found = {}
    for key in ("recurrent_activation", "activation"):
        said = config.get(key, USUAL[key])
        if isinstance(said, dict):                      # Keras's long form of a function's name
            said = said.get("config", said.get("class_name"))
        given = said if isinstance(said, tuple) else ACTIVATIONS.get("linear" if said is None else str(said))
        if given is None:
            raise ValueError(f"{name} asks for {key}={said!r:.100}, lstmcore has {list(ACTIVATIONS)}")
        if given == "hard_sigmoid" and not version[:1].isdigit():
            raise ValueError(f"{path} does not say which Keras wrote it: {name} has hard_sigmoid, which is "
                             "0.2 x + 0.5 before Keras 3 and x / 6 + 0.5 since; of weights alone, give "
                             "recurrent_activation=('hard_sigmoid', 0.2, 0.5), say")
        if given == "hard_sigmoid" and int(re.match(r"\d+", version)[0]) < 3:
            given = ("hard_sigmoid", 0.2, 0.5)
        if given != USUAL[key]:
            found[key] = given
    dropped = config.get("recurrent_dropout", 0.0)
    if not isinstance(dropped, (int, float)) or not 0 <= dropped < 1:
        raise ValueError(f"{name} asks for recurrent_dropout={dropped!r:.100}")
    return {**found, "recurrent_dropout": float(dropped)} if dropped else found


def written(layer):
    """What Keras's configuration says of a variant."""
    found = {name: value for name, value in layer.variant.items() if name in ("recurrent_dropout", *USUAL)}
    for key in found.keys() & USUAL:
        names = [name for name, ours in ACTIVATIONS.items()
                 if activation(key, ours) == activation(key, found[key])]
        if not names:
            raise ValueError(f"Keras has no layer with {key}={found[key]!r}")
        found[key] = names[0]
    if extra := layer.variant.keys() - found.keys() - {"locked_dropout", "weight_dropout"}:
        raise ValueError(f"Keras has no layer with {' and '.join(sorted(extra))}")
    return found
