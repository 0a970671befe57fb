"""Keras's files: Keras 3 (.keras, .weights.h5) and older HDF5 (.h5), CuDNNLSTM included.

Keras keeps kernel (I, 4H), recurrent_kernel (H, 4H) and bias (4H,) with the gates in the order
i, f, g, o: our matrices, transposed. Its sequences are (B, T, ·), so layers come with batch_first.

    .keras         a zip of config.json, which names the layers, and model.weights.h5
    .weights.h5    layers/lstm/cell/vars/0..2, layers/bidirectional/{forward,backward}_layer/...
    .h5            the configuration as an attribute, and model_weights/<layer>/<weight name>

A .weights.h5 says neither the order of its layers nor what they are made of. Those written here
have an attribute OWN with a configuration of the form that Keras gives to a Sequential model.
"""

import functools
import json

import numpy as np

from lstmcore.formats import assemble, hdf5
from lstmcore.formats.archive import Archive

KINDS = {"LSTM": "LSTM", "CuDNNLSTM": "LSTM", "SimpleRNN": "RNN"}
# What these do to a sequence, they do in training only.
PASSING = ("InputLayer", "Dropout", "SpatialDropout1D", "GaussianNoise", "GaussianDropout",
           "ActivityRegularization")
WEIGHTS = ("kernel", "recurrent_kernel", "bias")
OWN = "lstmcore.config"


def read_arrays(path):
    """Every array of the file by its path in the HDF5 part."""
    _, root = _open(path)
    found, waiting = {}, [("", root)]
    while waiting:
        name, node = waiting.pop()
        if node.array is None:
            waiting += [(f"{name}/{key}".lstrip("/"), member)
                        for key, member in reversed(node.members.items())]
        else:
            found[name] = node.array
    return found


def read_chains(path, options):
    """The chains of recurrent layers in the file, see `lstmcore.formats`."""
    config, root = _open(path)
    options = {"batch_first": _is_batch_first(path, config), **options}
    weights = _weights_by_layer(path, root)
    if config is None:
        chains = [[(name, functools.partial(_layer, name, found, None))]
                  for name, found in weights.items() if _is_recurrent(found)]
        return chains, [name for name in weights if not _is_recurrent(weights[name])], options
    layers = _layers(path, config)
    recurrent = [name for name, (_, inner, _, _) in layers.items()
                 if inner["class_name"] in KINDS]
    links, used = {}, {}
    for name in recurrent:
        source = _source(layers, name)
        if source in recurrent and _returns_sequences(layers[source]):
            links[name] = source
            used[source] = used.get(source, 0) + 1
    chains = []
    for name in recurrent:
        entry = name, functools.partial(_from_config, path, name, layers[name], weights)
        if chains and used.get(links.get(name)) == 1 and chains[-1][-1][0] == links[name]:
            chains[-1].append(entry)
        else:
            chains.append([entry])
    others = [f"{name} ({kind})" for name, (kind, _, _, _) in layers.items()
              if name not in recurrent and kind not in PASSING]
    return chains, others, options


def arrays(module):
    """One list per layer: what `set_weights` of the Keras layer takes, both directions of a
    Bidirectional one after the other.

    >>> from lstmcore import LSTM
    >>> [a.shape for a in arrays(LSTM(3, 5, seed=0))[0]]
    [(3, 20), (5, 20), (20,)]
    """
    found = []
    for part, reverse in assemble.parts(module):
        if reverse:
            raise ValueError("Keras's go_backwards returns y in another order than a layer that "
                             "reads from the end: not written")
        for directions in assemble.cells(part):
            found.append([])
            for cell in directions:
                if extra := cell.keys() & {"weight_peephole", "weight_hr"}:
                    raise ValueError(f"Keras has no layer with {' and '.join(sorted(extra))}")
                found[-1] += [cell[weight].T for weight in ("weight_ih", "weight_hh", "bias")
                              if weight in cell]
    return found


def write_weights(module, path):
    """A .weights.h5 for `load_weights` of a keras.Sequential of the same layers in a row.

    Whether the module is time-major stands in it for `lstmcore.load`; Keras's layers never are.
    """
    try:
        import h5py
    except ImportError:
        raise ImportError("writing Keras files needs h5py: pip install 'lstmcore[keras]'") \
            from None
    layers, counts, entries = arrays(module), {}, []
    parts = [part for part, _ in assemble.parts(module) for _ in range(part.num_layers)]
    with h5py.File(path, "w") as file:
        for part, values in zip(parts, layers):
            name = "lstm" if isinstance(part, assemble.LSTM) else "simple_rnn"
            places = [""]
            if part.bidirectional:
                name, places = "bidirectional", ["/forward_layer", "/backward_layer"]
            n = counts[name] = counts.get(name, -1) + 1
            group = file.create_group(f"layers/{name}" + (f"_{n}" if n else ""))
            name = group.name.rpartition("/")[2]
            group.create_group("vars").attrs["name"] = name
            entries.append(_entry(name, part))
            each = len(values) // len(places)
            for d, place in enumerate(places):
                for k, value in enumerate(values[d * each:(d + 1) * each]):
                    group.create_dataset(f"{group.name}{place}/cell/vars/{k}",
                                         data=np.ascontiguousarray(value))
        own = entries[-1]["config"].get("layer", entries[-1])["config"]
        own["return_sequences"] = not getattr(module, "last_step", False)
        file.attrs[OWN] = json.dumps({"class_name": "Sequential", "config": {"layers": entries},
                                      "batch_first": module.batch_first})


def _entry(name, part):
    """One layer of an LSTM or RNN in the configuration of a Sequential model."""
    config = {"name": name, "return_sequences": True}
    if isinstance(part, assemble.RNN):
        config["activation"] = part.nonlinearity
    entry = {"class_name": "LSTM" if isinstance(part, assemble.LSTM) else "SimpleRNN",
             "config": config}
    if part.bidirectional:
        return {"class_name": "Bidirectional", "config": {"name": name, "layer": entry}}
    return entry


def _is_batch_first(path, config):
    """As the configuration says, if it is ours; Keras's layers always are."""
    said = config.get("batch_first", True) if isinstance(config, dict) else True
    if not isinstance(said, bool):
        raise ValueError(f"{path} says batch_first={said!r:.40}: it must be true or false")
    return said


def _open(path):
    """The configuration, or None, and the root of the weights."""
    with open(path, "rb") as file:
        data = file.read()
    if data[:8] == hdf5.SIGNATURE:
        root = hdf5.read(data)
        text = root.attributes.get("model_config", root.attributes.get(OWN))
        return None if text is None else _json(path, text), root
    del data
    with Archive(path) as archive:
        if "model.weights.h5" not in archive.members:
            raise ValueError(f"{path} has no model.weights.h5; weights as npz are pickled and not "
                             "read: save with weights_format='h5'")
        return (_json(path, archive.read("config.json")),
                hdf5.read(archive.read("model.weights.h5")))


def _json(path, text):
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} has a configuration that is not JSON: {error}") from None


def _weights_by_layer(path, root):
    """{layer: [[kernel, recurrent_kernel, bias] of each direction]}, the rest of layers as []."""
    root = (root.members or {}).get("model_weights", root)
    if "layer_names" in root.attributes:                            # before Keras 3
        names = [str(name) for name in root.attributes["layer_names"]]
        return {name: _by_weight_names(path, root, name) for name in names}
    layers = (root.members or {}).get("layers")
    if layers is None or layers.members is None:
        raise ValueError(f"{path} is HDF5, but neither Keras 3's layout nor the older one")
    found = {}
    for key, node in layers.members.items():
        variables = (node.members or {}).get("vars")
        name = variables.attributes.get("name", key) if variables else key
        halves = [_at(node, half) for half in ("forward_layer", "backward_layer")]
        cells = [_at(half, "cell", "vars") for half in (halves if all(halves) else [node])]
        found[str(name)] = [[c.members[k].array for k in "012" if k in c.members] for c in cells
                            if c is not None and c.members is not None]
    return found


def _at(node, *names):
    for name in names:
        node = (node.members or {}).get(name) if node else None
    return node


def _by_weight_names(path, root, layer):
    directions = {}
    group = _at(root, layer)
    for weight in group.attributes.get("weight_names", ()) if group else ():
        place, _, last = str(weight).rpartition("/")
        node = _at(group, *str(weight).split("/"))
        if node is None:
            raise ValueError(f"{path} names the weight {weight!r:.100} and does not hold it")
        if last.partition(":")[0] in WEIGHTS:
            directions.setdefault(place, []).append(node.array)
    return list(directions.values())


def _is_recurrent(directions):
    """Whether arrays alone look like kernel (I, nH), recurrent_kernel (H, nH) and bias."""
    return bool(directions) and all(
        len(d) in (2, 3) and all(a is not None and a.ndim == 2 for a in d[:2]) and len(d[1])
        and d[0].shape[1] == d[1].shape[1] in (4 * len(d[1]), 3 * len(d[1]), len(d[1]))
        for d in directions)


def _layers(path, config):
    """{name: (class, the recurrent layer's own entry, its wrapper's config, its sources)}."""
    try:
        entries, found, previous = config["config"], {}, []
        sequential = config["class_name"] == "Sequential"
        for entry in entries if isinstance(entries, list) else entries["layers"]:
            kind, inner, wrapper = entry["class_name"], entry, None
            if kind == "Bidirectional":
                wrapper, inner = entry["config"], entry["config"]["layer"]
            name = entry["config"]["name"]
            if name in found:
                raise ValueError(f"{path} has two layers {name!r:.100}")
            sources = previous if sequential else _sources(entry.get("inbound_nodes", []))
            found[name] = kind, inner, wrapper, sources
            if not isinstance(inner["config"], dict) or not isinstance(inner["class_name"], str):
                raise TypeError(f"the layer {name!r:.100}")
            previous = [name]
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} has a configuration unlike Keras's: {error!r:.100}") from None
    return found


def _sources(node):
    """The layers that feed this one, from either form of inbound_nodes."""
    if isinstance(node, dict):
        if "keras_history" in node:
            return [node["keras_history"][0]]
        return [name for value in node.values() for name in _sources(value)]
    if isinstance(node, list):
        if len(node) >= 3 and isinstance(node[0], str) and isinstance(node[1], int):
            return [node[0]]
        return [name for value in node for name in _sources(value)]
    return []


def _source(layers, name):
    """The one layer whose y this one reads, past those that act in training only."""
    for _ in layers:
        sources = layers[name][3]
        if len(sources) != 1 or (name := sources[0]) not in layers:
            return None
        if layers[name][0] not in PASSING:
            return name
    return None


def _from_config(path, name, layer, weights):
    """The Layers of one entry of the configuration, everything it asks for checked."""
    kind, inner, wrapper, _ = layer
    config = inner["config"]
    wanted = {"go_backwards": [False], "stateful": [False], "time_major": [False]}
    if inner["class_name"] == "LSTM":
        wanted.update(activation=["tanh"], recurrent_activation=["sigmoid"])
    elif inner["class_name"] == "SimpleRNN":
        wanted.update(activation=["tanh", "relu"])
    _expect(name, config, wanted)
    if wrapper is not None:
        _expect(name, wrapper, {"merge_mode": ["concat"]})
        if (back := wrapper.get("backward_layer")) is not None:
            if back["class_name"] != inner["class_name"]:
                raise ValueError(f"{name} has a {back['class_name']} as its backward_layer")
            _expect(name, back["config"], {**wanted, "go_backwards": [True]})
    if not str(inner.get("module", "keras")).startswith("keras"):
        raise ValueError(f"{name} is of a class of {inner['module']!r:.100}, not Keras's own")
    if name not in weights:
        raise ValueError(f"{path} has no weights of the layer {name!r:.100}")
    if len(weights[name]) != (1 if wrapper is None else 2):
        raise ValueError(f"{name} must have weights of {1 if wrapper is None else 2} directions, "
                         f"got {len(weights[name])}")
    (made,) = _layer(name, weights[name], inner)
    return [made._replace(last_step=not _returns_sequences(layer))]


def _returns_sequences(layer):
    """Whether an entry of the configuration gives its y at every step, not at the last one only."""
    return bool(layer[1]["config"].get("return_sequences", False))


def _expect(name, config, wanted):
    for key, allowed in wanted.items():
        value = config.get(key, allowed[0])
        if isinstance(value, dict):                 # Keras's long form of a function's name
            value = value.get("config")
        if value not in allowed:
            raise ValueError(f"{name} asks for {key}={value!r:.100}, lstmcore has {allowed}")


def _layer(name, directions, inner):
    """A list of one Layer from Keras's arrays; without a configuration the shapes say the kind."""
    if not _is_recurrent(directions):
        raise ValueError(f"{name} must have {', '.join(WEIGHTS)}, got arrays of the shapes "
                         f"{[[np.shape(a) for a in d] for d in directions]}")
    (_, recurrent), cudnn = directions[0][:2], bool(inner) and inner["class_name"] == "CuDNNLSTM"
    rows = recurrent.shape[1] // len(recurrent)
    kind = KINDS[inner["class_name"]] if inner else {4: "LSTM", 1: "RNN"}.get(rows)
    if kind is None or rows != assemble.GATES[kind]:
        raise ValueError(f"{name} has {rows} gates: lstmcore has LSTM (4) and SimpleRNN (1)")
    nonlinearity = None
    if kind == "RNN" and inner:
        nonlinearity = inner["config"].get("activation", "tanh")
        nonlinearity = nonlinearity["config"] if isinstance(nonlinearity, dict) else nonlinearity
    cells = [(_from_cudnn if cudnn else _from_keras)(*arrays) for arrays in directions]
    return [assemble.Layer(name, kind, cells, nonlinearity)]


def _from_keras(kernel, recurrent, bias=None):
    found = {"weight_ih": kernel.T, "weight_hh": recurrent.T}
    return found if bias is None else {**found, "bias": bias}


def _from_cudnn(kernel, recurrent, bias):
    """CuDNNLSTM's arrays: the bytes of each gate's (I, H) kernel are really a matrix (H, I).

    Its recurrent gates are transposed as well, and it has two biases in a row.
    """
    I, H = len(kernel), len(recurrent)
    if bias.shape != (8 * H,):
        raise ValueError(f"the bias of a CuDNNLSTM must be (8H,) = ({8 * H},), got {bias.shape}")
    return {"weight_ih": np.concatenate([g.reshape(H, I) for g in np.split(kernel, 4, axis=1)]),
            "weight_hh": np.concatenate(np.split(recurrent, 4, axis=1)),
            "bias": bias[:4 * H] + bias[4 * H:]}
