"""Weights in and out of files: safetensors, PyTorch, Keras, ONNX.

    m = lstmcore.load("model.pt")           the recurrent layers of a file, ready to run
    m.save("model.safetensors")             or .onnx, .weights.h5
    lstmcore.convert("a.keras", "b.onnx")   both in one
    formats.read_arrays("model.pt")         every array of a file, by its name there

Nothing in a file is ever executed, and nothing it claims is believed before it is compared with
the file's real size: a damaged or hostile file is a ValueError. No framework is imported. ONNX
files need the package onnx, and writing a .weights.h5 needs h5py; reading Keras's files does not.
"""

import functools
import importlib
import json
import os
import warnings

from lstmcore.formats import assemble, safetensors
from lstmcore.formats.archive import Archive
from lstmcore.formats.stack import Stack

__all__ = ["Stack", "convert", "load", "read_arrays", "save"]

SAVED = {".safetensors": "safetensors", ".onnx": "onnx", ".weights.h5": "keras"}


def load(path, name=None, **options):
    """The LSTM or RNN in a file, in evaluation mode.

    Parameters
    ----------
    path : a file of any of these kinds, told by its content
        - safetensors: what `save` wrote; or tensors under PyTorch's names
        - PyTorch's zip archives (.pt, .pth) of a state_dict, or of dicts that hold one
        - Keras 3 (.keras, .weights.h5) and older Keras (.h5), CuDNNLSTM included
        - ONNX (.onnx): what `save` wrote; or LSTM and RNN nodes; needs onnx
    name : which recurrent layer, where a file holds several: the prefix of its tensors in a
        state_dict, the layer's name in Keras, the node's name in ONNX. A list of names is loaded as
        one stack, each fed by the one before it.
    batch_first, dropout, nonlinearity : what a file of weights does not say, as for `lstmcore.LSTM`

    Returns an `lstmcore.LSTM` or `RNN`, a `lstmcore.formats.Stack` where layers differ in width,
    one reads from the end only, or Keras's return_sequences=False asks for the last output alone,
    or the model that lstmcore saved. What else a file holds (an
    embedding, a head) is named in a warning, unless `name` is given; `read_arrays` returns its
    arrays. What only acts in training (initializers, regularizers, dropout) is not carried over.

    Raises ValueError for a file that is damaged, or that asks for what lstmcore does not have, with
    its name (hard_sigmoid, clip, merge_mode='sum', GRU, ...).

    >>> import os, tempfile
    >>> import lstmcore
    >>> path = os.path.join(tempfile.mkdtemp(), "m.safetensors")
    >>> m = lstmcore.LSTM(3, 5, num_layers=2, bidirectional=True, seed=0)
    >>> m.save(path)
    >>> lstmcore.load(path)
    LSTM(3, 5, num_layers=2, bidirectional=True)
    """
    if unknown := options.keys() - set(assemble.OPTIONS):
        raise TypeError(f"options of load are {', '.join(assemble.OPTIONS)}, got {sorted(unknown)}")
    chains, others, options = _found(path, name, options)
    if chains is None:
        return others
    layers = [layer for make in _chosen(path, chains, others, name) for layer in make()]
    return assemble.assemble(layers, **options)


def save(module, path):
    """Write an LSTM, RNN or Stack to a file; the ending of `path` says which kind.

    `load` makes of each kind the module that was written, except that a .weights.h5 says nothing of
    dropout and of how a Stack groups its layers.

    .safetensors : PyTorch's names, so that `torch.nn.LSTM.load_state_dict` takes them, and what
        rebuilds the module
    .onnx : a graph for any runtime, see `lstmcore.formats.onnx.export`; needs onnx
    .weights.h5 : for `keras.Model.load_weights` of the same layers in a row; needs h5py
    """
    kind = _kind_to_write(path)
    if kind == "safetensors":
        safetensors.write(path, assemble.torch_names(module),
                          {"lstmcore.layer": json.dumps(assemble.describe(module))})
    elif kind == "onnx":
        importlib.import_module("lstmcore.formats.onnx_export").export(module, path)
    else:
        importlib.import_module("lstmcore.formats.keras").write_weights(module, path)


def convert(source, target, name=None, **options):
    """Load the recurrent layers of one file and save them as another: see `load` and `save`.

    Of a language model, which is a .safetensors file, other kinds hold the recurrent layers alone;
    a warning says so, and what was left out. Returns the module that was written.
    """
    if _kind_to_write(target) != "safetensors" and name is None:
        name = _part_of_model(source)
    module = load(source, name, **options)
    module.save(target)
    return module


def read_arrays(path):
    """Every array of a file by its name there: tensors, Keras's weights, ONNX's initializers.

    The arrays may be read-only. Integers and bool come as they are, bfloat16 as float32.
    """
    kind, module = _reader_of(path)
    return module.read(path)[0] if kind == "safetensors" else module.read_arrays(path)


def _kind_to_write(path):
    kind = next((kind for end, kind in SAVED.items() if os.fspath(path).endswith(end)), None)
    if kind is None:
        raise ValueError(f"path must end in {', '.join(SAVED)} to say what to write, got "
                         f"{os.fspath(path)!r}")
    return kind


def _part_of_model(path):
    """The name of the recurrent layers in a language model's file; None for any other file."""
    kind, module = _reader_of(path)
    arrays, metadata = module.read(path) if kind == "safetensors" else ({}, {})
    if _MODEL not in metadata:
        return None
    left = {name.partition(".")[0] for name in arrays} - {"recurrent", "training"}
    warnings.warn(f"{path} is a language model, of which only the recurrent layers were converted; "
                  f"left out: {_some(sorted(left))} (lstmcore.formats.read_arrays returns them)",
                  stacklevel=3)
    return "recurrent"


def _found(path, name, options):
    """The chains of recurrent layers in a file, what else it holds, and the final options.

    A chain is a list of (name, function that returns a list of Layer). For a file that lstmcore
    wrote, (None, the module, options).
    """
    kind, module = _reader_of(path)
    if kind == "onnx" and name is None and (own := module.read_own(path, options)):
        return None, own, options
    if kind in ("keras", "onnx"):
        return module.read_chains(path, options)
    if kind == "safetensors":
        (arrays, metadata), objects = module.read(path), {}
        if name is None and (own := metadata.keys() & _OWN.keys()):
            return None, _OWN[own.pop()](path, arrays, metadata, options), options
        if _MODEL in metadata:                          # its RNNs are all of this kind
            options = {"nonlinearity": "tanh", **options}
    else:
        arrays, objects, keys = module.read(path)
    groups = assemble.group({**arrays, **objects})
    chains = [[(prefix, functools.partial(assemble.from_torch_names, prefix, cells))]
              for prefix, cells in groups.items()]
    used = {id(a) for cells in groups.values() for cell in cells.values() for a in cell.values()}
    others = [n for n, a in arrays.items() if id(a) not in used]
    if kind == "pytorch" and not chains:
        found = others + [f"{n} ({made_by})" for n, made_by in objects.items()] or keys
        raise ValueError(f"{path} holds no LSTM or RNN, only {_some(found) or 'an empty dict'}: "
                         "save the state_dict() of the model that has one")
    return chains, others, options


def _chosen(path, chains, others, name):
    """The functions that make the wanted layers."""
    names = [found for chain in chains for found, _ in chain]
    if not names:
        raise ValueError(f"{path} holds no LSTM or RNN, only {_some(others) or 'nothing'}")
    if name is not None:
        wanted = [name] if isinstance(name, str) else list(name)
        makers = {found: make for chain in chains for found, make in chain}
        if missing := [n for n in wanted if n.rstrip(".") not in makers] or not wanted:
            raise ValueError(f"{path} has no recurrent layer {missing}, it has {_some(names)}")
        return [makers[n.rstrip(".")] for n in wanted]
    if len(chains) > 1:
        raise ValueError(f"{path} holds several recurrent layers, choose by name= one of "
                         f"{_some(names)}, or a list of those that feed each other")
    if others:
        warnings.warn(f"{path}: loaded {_some(names)}; left in the file: {_some(others)} "
                      "(lstmcore.formats.read_arrays returns them)", stacklevel=3)
    return [make for _, make in chains[0]]


def _some(names, limit=12):
    """Names for a message, cut to a readable number."""
    names = [repr(str(n)[:80]) if n else "(no prefix)" for n in names]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" * (len(names) > limit))


def _reader_of(path):
    """(kind, the module that reads it), told by the first bytes of the file."""
    with open(path, "rb") as file:
        head = file.read(16)
    if head[:4] == b"PK\x03\x04":
        with Archive(path) as archive:
            kind = "keras" if "config.json" in archive.members else "pytorch"
    elif head[:8] == b"\x89HDF\r\n\x1a\n":
        kind = "keras"
    elif safetensors.looks_like(head):
        kind = "safetensors"
    elif os.fspath(path).endswith(".onnx"):
        kind = "onnx"
    elif head[:1] == b"\x80":
        raise ValueError(f"{path} is a plain pickle, which can run any code when it is read: save "
                         "the state_dict with PyTorch 1.6 or later, or as safetensors")
    else:
        raise ValueError(f"{path} is none of: safetensors, PyTorch zip archive, Keras .keras or "
                         f".h5, or ONNX (named .onnx); it begins with {head[:8]!r}")
    return kind, importlib.import_module("lstmcore.formats." + kind)


def _own_layer(path, arrays, metadata, options):
    """An LSTM, RNN or Stack from what `save` wrote."""
    try:
        description = json.loads(metadata["lstmcore.layer"])
        return assemble.rebuild(description, arrays, **options)
    except (json.JSONDecodeError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} has a description of its layer that is not lstmcore's: "
                         f"{error!r:.200}") from None


def _own_model(path, arrays, metadata, options):
    """A model from what its own `save` wrote."""
    from lstmcore.models import LanguageModel
    if options:
        raise TypeError(f"a file of a language model says everything itself, got {options}")
    return LanguageModel.load(path)


_MODEL = "lstmcore.language_model"
_OWN = {"lstmcore.layer": _own_layer, _MODEL: _own_model}
