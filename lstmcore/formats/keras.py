"""Keras's files: Keras 3 (.keras, .weights.h5) and older HDF5 (.h5), CuDNNLSTM included.

Keras keeps kernel (I, 4H), recurrent_kernel (H, 4H) and bias (4H,) with the gates in the order
i, f, g, o: our matrices, transposed. Those of a GRU are in the order z, r, n, and with reset_after it
has two biases, (2, 3H). Its sequences are (B, T, ·), so layers come with batch_first.

    .keras         a zip of config.json, which names the layers, and model.weights.h5
    .weights.h5    layers/lstm/cell/vars/0..2, layers/bidirectional/{forward,backward}_layer/...
    .h5            the configuration as an attribute, and model_weights/<layer>/<weight name>

A .weights.h5 says neither the order of its layers nor what they are made of. Those written here
have an attribute OWN with a configuration of the form that Keras gives to a Sequential model.
"""

import functools
import io
import json
import re
import warnings
from typing import NamedTuple

import numpy as np

from lstmcore.formats import description, disk, hdf5, keras_variants
from lstmcore.formats.archive import Archive
from lstmcore.formats.description import Content

KINDS = {"LSTM": "LSTM", "CuDNNLSTM": "LSTM", "GRU": "GRU", "SimpleRNN": "RNN"}
CELLS = {"LSTMCell": "LSTM", "GRUCell": "GRU", "SimpleRNNCell": "SimpleRNN"}    # of the layer class RNN
WRITTEN = {"LSTM": ("LSTM", "lstm"), "GRU": ("GRU", "gru"), "RNN": ("SimpleRNN", "simple_rnn")}
GRU_ORDER = [1, 0, 2]           # z, r, n as places in r, z, n, and back
MODELS = "Sequential", "Functional", "Model"
KERAS = "keras", "tf_keras", "tensorflow", "lstmcore"            # lstmcore.keras
NODES = "layers", "_layer_checkpoint_dependencies"              # of Keras 3, and of TensorFlow 2.12
NO_LAYERS = "vars", "seed_generator", "optimizer", "optimizer_weights", "_metadata"
# What these do to a sequence, they do in training only.
PASSING = ("InputLayer", "Dropout", "SpatialDropout1D", "GaussianNoise", "GaussianDropout",
           "ActivityRegularization")
# What has a recurrent layer in it and is not read as one, and what to do then.
WAYS_OUT = {"TimeDistributed": "applies a layer to each part of its input: save that layer in a model of "
                               "its own",
            "RNN": "has several cells, or one that is not Keras's: save a model with an LSTM, GRU or "
                   "SimpleRNN for each"}
WEIGHTS = ("kernel", "recurrent_kernel", "bias")
OWN = "lstmcore.config"


def read_arrays(path):
    """Every array of the file by its path in the HDF5 part."""
    _, root, _ = _open(path)
    found, waiting = {}, [("", root)]
    while waiting:
        name, node = waiting.pop()
        if node.array is None:
            waiting += [(f"{name}/{key}".lstrip("/"), member)
                        for key, member in reversed(node.members.items())]
        else:
            found[name] = node.array
    return found


def content(path):
    """The chains of recurrent layers in the file."""
    config, root, version = _open(path)
    options = {"batch_first": _is_batch_first(path, config)}
    if isinstance(config, dict) and config.get("class_name") not in MODELS \
            and isinstance(said := config.get("config"), dict) and "layers" not in said:
        config = None                       # a class of its own, which says nothing of its layers
    layers = _layers(path, config) if config is not None else {}
    weights = _weights_by_layer(path, root, layers)
    if config is None:
        chains = [[(name, functools.partial(_unsaid, path, name, found, version))]
                  for name, found in weights.items() if _is_recurrent(found)]
        others = [name for name in weights if not _is_recurrent(weights[name])]
        return Content({}, chains, others, options)
    recurrent = {name: layer for name, layer in layers.items() if layer.inner["class_name"] in KINDS}
    links, used, known = {}, {}, {}
    for name in recurrent:
        source = _source(layers, name, known)
        if source in recurrent and _returns_sequences(layers[source]):
            links[name] = source
            used[source] = used.get(source, 0) + 1
    chains = []
    for name in recurrent:
        entry = name, functools.partial(_from_config, path, name, layers[name], weights, version)
        if chains and used.get(links.get(name)) == 1 and chains[-1][-1][0] == links[name]:
            chains[-1].append(entry)
        else:
            chains.append([entry])
    others = [f"{name} ({_what(layer)})" for name, layer in layers.items()
              if name not in recurrent and layer.kind not in PASSING]
    hint = _hint(layers, [name for name in weights if name not in recurrent
                          and _is_recurrent(weights[name]) and _rows(weights[name]) in (1, 3, 4)])
    return Content({}, chains, others, options, hint=hint)


def _hint(layers, like):
    """What to do of layers that are not read, of which those named in `like` have the weights of one."""
    for name, layer in layers.items():
        if layer.kind in WAYS_OUT and " of " in _what(layer):
            return f"{name!r:.80} {WAYS_OUT[layer.kind]}"
    return like and (f"{description.some(like)} has the weights of a recurrent layer, and a class "
                     "that is not Keras's own: save them alone, model.save_weights('x.weights.h5')") or ""


def write_module(path, module):
    """A .weights.h5 for `load_weights` of a keras.Sequential of the same layers in a row.

    Whether the module is time-major stands in it for `lstmcore.load`; Keras's layers never are.
    """
    try:
        import h5py
    except ImportError:
        raise ImportError("writing Keras files needs h5py: pip install 'lstmcore[keras]'") \
            from None
    said = module.describe()
    values, counts, entries = arrays(module), {}, []
    found = [(part, layer) for part, layers, _ in description.parts(said, module.parameters())
             for layer in layers]
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for (_, layer), each in zip(found, values):
            name = WRITTEN[layer.kind][1]
            places = [""]
            if len(layer.directions) == 2:
                name, places = "bidirectional", ["/forward_layer", "/backward_layer"]
            n = counts[name] = counts.get(name, -1) + 1
            group = file.create_group(f"layers/{name}" + (f"_{n}" if n else ""))
            name = group.name.rpartition("/")[2]
            group.create_group("vars").attrs["name"] = name
            entries.append(_entry(name, layer))
            count = len(each) // len(places)
            for d, place in enumerate(places):
                for k, value in enumerate(each[d * count:(d + 1) * count]):
                    group.create_dataset(f"{group.name}{place}/cell/vars/{k}",
                                         data=np.ascontiguousarray(value))
        own = entries[-1]["config"].get("layer", entries[-1])["config"]
        own["return_sequences"] = not said.get("last_step", False)
        file.attrs[OWN] = json.dumps({"class_name": "Sequential", "config": {"layers": entries},
                                      "batch_first": said["batch_first"],
                                      "version": description.VERSION})
    with disk.written(path) as file:
        file.write(buffer.getbuffer())


def arrays(module):
    """One list per layer: what `set_weights` of the Keras layer takes, both directions of a
    Bidirectional one after the other.

    >>> from lstmcore import LSTM
    >>> [a.shape for a in arrays(LSTM(3, 5, seed=0))[0]]
    [(3, 20), (5, 20), (20,)]
    """
    found = []
    for _, layers, reverse in description.parts(module.describe(), module.parameters()):
        if reverse:
            raise ValueError("Keras's go_backwards returns y in another order than a layer that "
                             "reads from the end: not written")
        for layer in layers:
            found.append([])
            for cell in layer.directions:
                if extra := cell.keys() & set(description.WEIGHTS[3:]):
                    raise ValueError(f"Keras has no layer with {' and '.join(sorted(extra))}")
                keras_variants.written(layer)
                cell = _for_gru(cell) if layer.kind == "GRU" else cell
                found[-1] += [cell[weight].T for weight in ("weight_ih", "weight_hh", "bias")
                              if weight in cell]
    return found


def _for_gru(cell):
    """A GRU's arrays in Keras's order, transposed; two biases if its reset gate comes after."""
    H = cell["weight_hh"].shape[1]

    def ordered(a):
        return a.reshape(3, H, *a.shape[1:])[GRU_ORDER].reshape(a.shape)
    found = {weight: ordered(cell[weight]) for weight in ("weight_ih", "weight_hh")}
    if "bias" in cell:
        bias, b_hn = np.split(cell["bias"], [3 * H])
        found["bias"] = ordered(bias)
        if b_hn.size:
            hidden = np.concatenate([np.zeros(2 * H, b_hn.dtype), b_hn])
            found["bias"] = np.stack([found["bias"], hidden], axis=1)
    return found


def _entry(name, layer):
    """One layer of an LSTM, GRU or RNN in the configuration of a Sequential model."""
    config = {"name": name, "return_sequences": True, **keras_variants.written(layer)}
    if layer.kind == "RNN":
        config["activation"] = layer.nonlinearity
    if layer.kind == "GRU":
        config["reset_after"] = layer.reset_after
    entry = {"class_name": WRITTEN[layer.kind][0], "config": config}
    if len(layer.directions) == 2:
        return {"class_name": "Bidirectional", "config": {"name": name, "layer": entry}}
    return entry


def _is_batch_first(path, config):
    """As the configuration says, if it is ours; Keras's layers always are."""
    said = config.get("batch_first", True) if isinstance(config, dict) else True
    if isinstance(config, dict) and "batch_first" in config:
        description.check_version(path, config)
    if not isinstance(said, bool):
        raise ValueError(f"{path} says batch_first={said!r:.40}: it must be true or false")
    return said


def _open(path):
    """The configuration, or None, the root of the weights, and which Keras wrote them, if that is said."""
    data = disk.read(path)
    if data[:8] == hdf5.SIGNATURE:
        root = hdf5.read(data)
        text = root.attributes.get("model_config", root.attributes.get(OWN))
        version = "3" if OWN in root.attributes else _text(root.attributes.get("keras_version", ""))
        return None if text is None else _json(path, text), root, version
    del data
    with Archive(path) as archive:
        if "model.weights.h5" not in archive.members:
            raise ValueError(f"{path} has no model.weights.h5; weights as npz are pickled and not "
                             "read: save with weights_format='h5'")
        said = _json(path, archive.read("metadata.json")) if "metadata.json" in archive.members else {}
        return (_json(path, archive.read("config.json")), hdf5.read(archive.read("model.weights.h5")),
                _text(said.get("keras_version", "") if isinstance(said, dict) else ""))


def _text(value):
    """A version, whatever stands there."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _json(path, text):
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} has a configuration that is not JSON: {error}") from None


def _weights_by_layer(path, root, layers):
    """{layer: [[kernel, recurrent_kernel, bias] of each direction]}, the rest of layers as [].

    layers : the names that the configuration gives, if there is one
    """
    root = (root.members or {}).get("model_weights", root)
    if (names := _texts(root, "layer_names")) is not None:          # before Keras 3
        found = {name: _by_weight_names(path, root, name) for name in names}
        inner, parts = {}, {}
        for name in layers:                             # those of a model in the model
            outer, _, last = name.partition("/")
            if last and outer in found:
                if outer not in parts:
                    parts[outer] = {}
                    for place, arrays in found[outer].items():
                        for part in dict.fromkeys(place.split("/")):
                            parts[outer].setdefault(part, []).append(arrays)
                inner[name] = parts[outer].get(last.rpartition("/")[2], [])
        return {**inner, **{name: list(places.values()) for name, places in found.items()}}
    found, waiting, unnamed = {}, [("", root)], _by_class(layers)
    while waiting:
        prefix, parent = waiting.pop()
        for key, node in _nodes(parent).items():
            if node.members is None:
                continue
            variables = node.members.get("vars")
            name = unnamed.get(prefix + key, prefix + key)[len(prefix):]
            name = variables.attributes.get("name", name) if variables else name
            halves = [_at(node, half) for half in ("forward_layer", "backward_layer")]
            cells = [_at(half, "cell", "vars") for half in (halves if all(halves) else [node])]
            cells = [[c.members[k].array for k in "012" if k in c.members]
                     for c in cells if c is not None and c.members is not None]
            found[prefix + str(name)] = cells
            if not any(cells):
                waiting.append((f"{prefix}{name}/", node))
    if not any(name in (root.members or {}) for name in NODES) and not any(found.values()):
        raise ValueError(f"{path} is HDF5, but neither Keras 3's layout nor the older one")
    return found


def _nodes(parent):
    """The layers in a model or layer: a list of them, and those that a class of the user's has as
    attributes, by their names."""
    listed = next((parent.members[name].members or {} for name in NODES if name in parent.members), {})
    return {**{key: node for key, node in parent.members.items() if key not in (*NODES, *NO_LAYERS)},
            **listed}


def _by_class(layers):
    """{where a file without names keeps a layer: its name}: by its class, the n-th of it as _n.

    So TensorFlow's Keras 2.12 wrote them, whatever the layers' own names.
    """
    found, counts = {}, {}
    for name, layer in layers.items():
        inner = layer.inner["class_name"]
        prefix = name[:name.rfind("/") + 1]
        key = re.sub(r"(.)([A-Z][a-z]+)|(?<=[a-z])([A-Z])",
                     lambda m: f"{m[1]}_{m[2]}" if m[1] else f"_{m[3]}",
                     inner if inner in MODELS else layer.kind).lower()
        n = counts[prefix + key] = counts.get(prefix + key, -1) + 1
        found[prefix + key + (f"_{n}" if n else "")] = name
    return found


def _texts(node, name):
    """An attribute that is a list of texts, which Keras cuts in pieces where it is long."""
    if name in node.attributes:
        value = node.attributes[name]
    else:
        value, n = [], 0
        while f"{name}{n}" in node.attributes:
            piece = node.attributes[f"{name}{n}"]
            value, n = value + list(piece) if not isinstance(piece, str) else [*value, piece], n + 1
        if not n:
            return None
    if isinstance(value, np.ndarray) and not value.size:
        value = []
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"the attribute {name} must be a list of texts, got {value!r:.100}")
    return value


def _at(node, *names):
    for name in names:
        node = (node.members or {}).get(name) if node else None
    return node


def _by_weight_names(path, root, layer):
    directions = {}
    group = _at(root, layer)
    for weight in _texts(group, "weight_names") or () if group else ():
        place, _, last = str(weight).rpartition("/")
        node = _at(group, *str(weight).split("/"))
        if node is None:
            raise ValueError(f"{path} names the weight {weight!r:.100} and does not hold it")
        if last.partition(":")[0] in WEIGHTS:
            directions.setdefault(place, []).append(node.array)
    return directions


def _is_recurrent(directions):
    """Whether arrays alone look like kernel (I, nH), recurrent_kernel (H, nH) and bias."""
    return bool(directions) and all(
        len(d) in (2, 3) and all(a is not None and a.ndim == 2 for a in d[:2]) and len(d[1])
        and d[0].shape[1] == d[1].shape[1] in (4 * len(d[1]), 3 * len(d[1]), len(d[1]))
        for d in directions)


class _Entry(NamedTuple):
    """A layer in a configuration."""

    kind: str                   # its class
    inner: dict                 # the recurrent layer's own entry
    wrapper: "dict | None"      # the configuration of the Bidirectional around it
    sources: list               # the names of the layers that feed it


def _what(layer):
    """The class of a layer, and of the one in it."""
    config = layer.inner["config"]
    inside = config.get("layer", config.get("cell"))
    said = inside.get("class_name") if isinstance(inside, dict) else None
    return f"{layer.kind} of {said!s:.40}" if said else layer.kind


def _layers(path, config):
    """{name: _Entry} of all layers, those of models in the model as model/layer."""
    try:
        found = {}
        _collect(path, config, "", [], found)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} has a configuration unlike Keras's: {error!r:.100}") from None
    return found


def _collect(path, config, prefix, previous, found):
    """Add the layers of one model; returns the names of what its last one gives."""
    entries = config["config"]
    sequential = config["class_name"] == "Sequential"
    for entry in entries if isinstance(entries, list) else entries["layers"]:
        kind, inner, wrapper = entry["class_name"], entry, None
        # A class of the user's may say no name.
        name = prefix + entry["config"].get("name", f"{kind} {len(found)}")
        if name in found:
            raise ValueError(f"{path} has two layers {name!r:.100}")
        sources = previous if sequential else [
            prefix + source for source in _sources(entry.get("inbound_nodes", []))]
        if kind in MODELS:
            if name.count("/") > 8:
                raise ValueError(f"{path} has models in models without end")
            # What a model in a model reads, its first layer is fed by.
            previous = _collect(path, entry, name + "/", sources, found)
            found[name] = _Entry("Dropout", {"class_name": kind, "config": {}}, None, previous)
        else:
            if kind == "Bidirectional":
                wrapper, inner = entry["config"], entry["config"]["layer"]
            inner = _of_cell(inner)
            found[name] = _Entry(kind, inner, wrapper, sources)
        if not isinstance(inner["config"], dict) or not isinstance(inner["class_name"], str):
            raise TypeError(f"the layer {name!r:.100}")
        previous = [name]
    return previous


def _of_cell(entry):
    """An RNN around one cell as the layer that it is; any other entry as it is."""
    cell = entry["config"].get("cell") if entry["class_name"] == "RNN" else None
    if not isinstance(cell, dict) or cell["class_name"] not in CELLS:
        return entry
    return {"class_name": CELLS[cell["class_name"]], "module": cell.get("module"),
            "config": {**cell["config"], **entry["config"]}}


def _sources(node):
    """The layers that feed this one, from either form of inbound_nodes."""
    if isinstance(node, dict):
        if "keras_history" in node:
            return [str(name) for name in node["keras_history"][:1]]
        return [name for value in node.values() for name in _sources(value)]
    if isinstance(node, list):
        if len(node) >= 3 and isinstance(node[0], str) and isinstance(node[1], int):
            return [node[0]]
        return [name for value in node for name in _sources(value)]
    return []


def _source(layers, name, known):
    """The one layer whose y this one reads, past those that act in training only, or None.

    known : {layer: its source}, which grows by what is passed, so that no way is gone twice
    """
    passed, source = [], None
    while name not in known:
        known[name] = None              # of a circle, and until it is found
        passed.append(name)
        sources = layers[name].sources
        if len(sources) != 1 or (name := sources[0]) not in layers:
            break
        if layers[name].kind not in PASSING:
            source = name
            break
    else:
        source = known[name]
    known.update(dict.fromkeys(passed, source))
    return source


def _from_config(path, name, layer, weights, version):
    """The Layers of one entry of the configuration, everything it asks for checked."""
    kind, inner, wrapper, _ = layer
    config = inner["config"]
    last_step = not _returns_sequences(layer)
    backwards = last_step and wrapper is None and config.get("go_backwards") is True
    # Of the last step alone, the order that Keras gives a sequence read backwards is no matter.
    wanted = {"go_backwards": [False, True] if backwards else [False], "time_major": [False]}
    variant = {}
    if inner["class_name"] == "LSTM":
        variant = keras_variants.read(path, name, config, version)
    elif inner["class_name"] == "GRU":
        wanted.update(activation=["tanh"], recurrent_activation=["sigmoid"])
    elif inner["class_name"] == "SimpleRNN":
        wanted.update(activation=["tanh", "relu"])
    _expect(name, config, wanted)
    if config.get("stateful"):
        warnings.warn(f"{path}: {name} is stateful: give the state that a call returns to the next "
                      "call", stacklevel=4)
    if wrapper is not None:
        _expect(name, wrapper, {"merge_mode": ["concat"]})
        if (back := wrapper.get("backward_layer")) is not None:
            back = _of_cell(back)
            if back["class_name"] != inner["class_name"]:
                raise ValueError(f"{name} has a {back['class_name']!r:.40} as its backward_layer")
            alike = {key: [config.get(key)] for key in ("activation", "reset_after") if key in config}
            _expect(name + "'s backward_layer", back["config"], {
                **wanted, **alike, "go_backwards": [True]})
            if inner["class_name"] == "LSTM":
                theirs = keras_variants.read(path, name, back["config"], version)
                if theirs != variant:
                    theirs, own = theirs or keras_variants.USUAL, variant or keras_variants.USUAL
                    raise ValueError(f"{name}'s backward_layer asks for {theirs}, its layer for {own}")
    if str(inner.get("module") or "keras").partition(".")[0] not in KERAS:
        raise ValueError(f"{name} is of a class of {inner['module']!r:.100}, not Keras's own")
    if name not in weights:
        raise ValueError(f"{path} has no weights of the layer {name!r:.100}")
    if len(weights[name]) != (1 if wrapper is None else 2):
        raise ValueError(f"{name} must have weights of {1 if wrapper is None else 2} directions, "
                         f"got {len(weights[name])}")
    (made,) = _layer(name, weights[name], inner)
    return [made._replace(last_step=last_step, reverse=backwards, variant=variant)]


def _unsaid(path, name, weights, version, activation=None, recurrent_activation=None):
    """The Layers of a file of weights alone, which does not say what they were made of."""
    (made,) = _layer(name, weights, None)
    given = {key: value for key, value in (("activation", activation),
                                           ("recurrent_activation", recurrent_activation))
             if value is not None}
    variant = {}
    if made.kind == "LSTM":
        variant = keras_variants.read(path, name, given, version)
    elif made.kind == "GRU" and any(value != keras_variants.USUAL[key] for key, value in given.items()):
        raise ValueError(f"{name}: {given} is asked for, a GRU of lstmcore has {keras_variants.USUAL}")
    if made.kind != "RNN" and recurrent_activation is None:
        old = version and [int(n) for n in re.findall(r"\d+", version)[:2]] < [2, 3]
        if old:
            raise ValueError(
                f"{path} was written by Keras {version:.20}, whose {made.kind} had recurrent_activation "
                f"hard_sigmoid unless told otherwise, and does not say which {name} had: give "
                "recurrent_activation='hard_sigmoid' or 'sigmoid'")
        warnings.warn(f"{path} holds weights alone and does not say what {name} was: taken are "
                      "activation='tanh', recurrent_activation='sigmoid' and go_backwards=False; "
                      "recurrent_activation='sigmoid' says that they are right", stacklevel=4)
    if made.kind == "GRU" and "bias" not in made.directions[0]:
        warnings.warn(f"{path} holds weights alone and {name} has no biases, which would say whether "
                      "it has reset_after: taken is True, unless reset_after= is given", stacklevel=4)
    if made.kind == "RNN" and activation:
        return [made._replace(nonlinearity=activation)]
    return [made._replace(variant=variant)]


def _returns_sequences(layer):
    """Whether an entry of the configuration gives its y at every step, not at the last one only."""
    return bool(layer.inner["config"].get("return_sequences", False))


def _expect(name, config, wanted):
    for key, allowed in wanted.items():
        value, *allowed = (a.get("config") if isinstance(a, dict) else a     # Keras's long form
                           for a in (config.get(key, allowed[0]), *allowed))
        if not any(value is a or (isinstance(value, str) and value == a) for a in allowed):
            raise ValueError(f"{name} asks for {key}={value!r:.100}, lstmcore has {allowed}")


def _layer(name, directions, inner):
    """A list of one Layer from Keras's arrays; without a configuration the shapes say the kind."""
    if not _is_recurrent(directions):
        raise ValueError(f"{name} must have {', '.join(WEIGHTS)}, got arrays of the shapes "
                         f"{[[np.shape(a) for a in d] for d in directions]}")
    cudnn = bool(inner) and inner["class_name"] == "CuDNNLSTM"
    rows = _rows(directions)
    kind = KINDS[inner["class_name"]] if inner else {4: "LSTM", 3: "GRU", 1: "RNN"}[rows]
    if rows != description.GATES[kind]:
        raise ValueError(f"{name} is of the class {inner['class_name']} and has {rows} gates")
    nonlinearity = reset_after = None
    if kind == "RNN" and inner:
        nonlinearity = inner["config"].get("activation", "tanh")
        nonlinearity = nonlinearity["config"] if isinstance(nonlinearity, dict) else nonlinearity
    if kind == "GRU" and inner:
        reset_after = inner["config"].get("reset_after", False)     # Keras before 2.2 has no such word
        if not isinstance(reset_after, bool):
            raise ValueError(f"{name} asks for reset_after={reset_after!r:.100}, lstmcore has "
                             "[True, False]")
    read = _from_cudnn if cudnn else _from_gru if kind == "GRU" else _from_keras
    cells = [read(*arrays) for arrays in directions]
    return [description.Layer(name, kind, cells, nonlinearity, reset_after=reset_after)]


def _rows(directions):
    """How many gates the arrays of a recurrent layer have."""
    return directions[0][1].shape[1] // len(directions[0][1])


def _from_keras(kernel, recurrent, bias=None):
    found = {"weight_ih": kernel.T, "weight_hh": recurrent.T}
    return found if bias is None else {**found, "bias": bias}


def _from_gru(kernel, recurrent, bias=None):
    """As `_from_keras`, of z, r, n; with reset_after the bias is (2, 3H): of the kernel and of the
    recurrent kernel."""
    H = len(recurrent)

    def ordered(a):
        if len(a) != 3 * H:
            raise ValueError(f"a GRU's bias must be (3H,) or (2, 3H) with H = {H}, got {bias.shape}")
        return a.reshape(3, H, *a.shape[1:])[GRU_ORDER].reshape(a.shape)
    found = {"weight_ih": ordered(kernel.T), "weight_hh": ordered(recurrent.T)}
    if bias is not None and bias.ndim == 2 and len(bias) == 2:
        found["bias"] = description.one_bias(*map(ordered, bias), found["weight_hh"])
    elif bias is not None:
        found["bias"] = ordered(bias)
    return found


def _from_cudnn(kernel, recurrent, bias=np.zeros(0)):
    """CuDNNLSTM's arrays: the bytes of each gate's (I, H) kernel are really a matrix (H, I).

    Its recurrent gates are transposed as well, and it has two biases in a row.
    """
    I, H = len(kernel), len(recurrent)
    if bias.shape != (8 * H,):
        raise ValueError(f"the bias of a CuDNNLSTM must be (8H,) = ({8 * H},), got {bias.shape}")
    return {"weight_ih": np.concatenate([g.reshape(H, I) for g in np.split(kernel, 4, axis=1)]),
            "weight_hh": np.concatenate(np.split(recurrent, 4, axis=1)),
            "bias": bias[:4 * H] + bias[4 * H:]}
