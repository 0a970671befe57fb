"""load, save, convert: between files and layers or models.

    m = lstmcore.load("model.pt")           the recurrent layers of a file, ready to run
    lstmcore.save(m, "model.safetensors")   or m.save(...); .onnx and .weights.h5 too
    lstmcore.convert("a.keras", "b.onnx")   both in one
    lstmcore.load("model.pt", into=net)     the parameters of a whole model of your own

What the formats are, `lstmcore.formats` knows; here their descriptions become layers, and back.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from lstmcore import formats, layers, scalars
from lstmcore._types import Path, Precision
from lstmcore.formats import description
from lstmcore.module import Module, blank
from lstmcore.precision import Quantized
from lstmcore.variants import LAYER_NORMS

OPTIONS = (*description.OPTIONS, "dtype", "activation", "recurrent_activation")


def load(path: Path, name: str | None = None, *, into: Any = None, **options: Any) -> Any:
    """The LSTM, GRU or RNN in a file, in evaluation mode.

    Parameters
    ----------
    path : a file of any of these kinds, told by its content
        - safetensors: what `save` wrote (what was frozen in int8 is frozen in int8 again, without
          float32 matrices: `parameters()` computes q · scale of them, read-only, whenever it is
          called, and `unfreeze()` makes them); or tensors under PyTorch's names
        - PyTorch's zip archives (.pt, .pth, .bin) of a state_dict, of dicts that hold one, of a whole
          module, and of TorchScript
        - the index (.index.json) of a model in several files of these two kinds
        - Keras 3 (.keras, .weights.h5) and older Keras (.h5), CuDNNLSTM included
        - ONNX (.onnx): what `save` wrote; or LSTM, GRU and RNN nodes, and DynamicQuantizeLSTM, which
          comes frozen in int8; needs onnx
    name : which recurrent layer, where a file holds several: the prefix of its tensors in a
        state_dict, the layer's name in Keras, the node's name in ONNX. A list of names is loaded as
        one stack, each fed by the one before it.
    into : a `Module` whose parameters, by their names, are set to the file's arrays; it is
        returned. `name` is then the prefix of its tensors in the file
    batch_first, dropout, nonlinearity, reset_after : what a file of weights does not say, as for
        `lstmcore.LSTM`, `RNN` and `GRU`; the biases of a GRU say reset_after
    activation, recurrent_activation : what Keras's files of weights alone do not say
    dtype : "float32" or "float64", of the layers; by default float64 for float64 alone

    Returns an `lstmcore.LSTM`, `GRU` or `RNN`, an `lstmcore.Stack` where layers differ in width,
    one reads from the end only, or Keras's return_sequences=False asks for the last output alone,
    or the module or model that lstmcore saved. What else a file holds (an
    embedding, a head) is named in a warning, unless `name` is given; `formats.read_arrays` returns
    its arrays. What only acts in training (initializers, regularizers, dropout) is not kept.

    Raises ValueError for a file that is damaged, or that asks for what lstmcore does not have, with
    its name (gelu, merge_mode='sum', ...).

    >>> import os, tempfile
    >>> import lstmcore
    >>> path = os.path.join(tempfile.mkdtemp(), "m.safetensors")
    >>> m = lstmcore.LSTM(3, 5, num_layers=2, bidirectional=True, seed=0)
    >>> m.save(path)
    >>> lstmcore.load(path)
    LSTM(3, 5, num_layers=2, bidirectional=True)
    >>> net = lstmcore.Sequential(lstmcore.Linear(3, 4, seed=0), lstmcore.Tanh())
    >>> lstmcore.save(net, path)
    >>> lstmcore.load(path)
    Sequential(Linear(3, 4), Tanh())
    """
    options = _checked(options)
    if into is not None:
        return _fill(into, path, name, options)
    return _made(formats.read(path), path, name, options)


def _checked(options):
    """The options of `load`; TypeError for what is none."""
    if unknown := options.keys() - set(OPTIONS):
        raise TypeError(f"options of load are {', '.join(OPTIONS)}, got {sorted(unknown)}")
    if "dtype" in options:
        options = {**options, "dtype": scalars.float_dtype(options["dtype"])}
    return options


def _made(content, path, name, options):
    """What the content of a file describes: see `load`."""
    if name is None and (own := content.own.keys() & _OWN.keys()):
        return _OWN[own.pop()](path, content, options)
    if (lowered := _lowered(path, content)) is not None:
        content = formats.state_dict.content(description.as_floats(lowered), own=content.own)
    if description.MODEL in content.own:                       # its RNNs are all of this kind
        options = {"nonlinearity": "tanh", **options}
    with formats.naming(path):
        makers = _chosen(path, content, name)
        said = {key: options.pop(key) for key in ("activation", "recurrent_activation")
                if key in options}
        found, room = [], 4 * _size(path) + (1 << 24)
        for make in makers:
            made = make(**said) if said else make()
            # Layers have arrays of their own: those of a file may be few, and stand in many places.
            room -= sum(a.nbytes for layer in made for d in layer.directions for a in d.values())
            if room < 0:
                raise ValueError(f"{path} shares its arrays among so many layers that they would "
                                 "take more than four times its size")
            found += made
        return assemble(found, **{**content.options, **options})


def save(module: Any, path: Path, **options: Any) -> None:
    """Write a module or a language model to a file; the ending of `path` says which kind.

    `load` makes of each kind the module that was written, except that a .weights.h5 says nothing of
    dropout, of compute and of how a Stack groups its layers, and that a class of your own is filled,
    not made: `load(path, into=...)`. The file appears whole or not at all.

    .safetensors: PyTorch's names, so that `torch.nn.LSTM.load_state_dict` takes them, and what
    rebuilds the module. Of what is frozen in int8 the matrices are int8 arrays, each with a float32
    scale per row under its name and ".scale": a quarter of the size. The other kinds, and
    what is frozen in bfloat16, hold `parameters()`, float32.

    .onnx: a graph for any runtime, see `lstmcore.formats.onnx_export.export`, and its options
    `state` and `lengths`; needs onnx.

    .weights.h5: for `keras.Model.load_weights` of the same layers in a row; needs h5py
    """
    if not isinstance(module, Module) and not hasattr(module, "save"):
        raise TypeError(f"module must be a Module or a LanguageModel, got {type(module).__name__}")
    write = formats.writer(path).write_module
    if isinstance(module, Module):
        write(path, module, **options)
    elif os.fsdecode(path).endswith(".onnx") and hasattr(module, "network"):
        module._trained()
        write(path, module.network, tokens=True, **options)
    elif options:
        raise TypeError(f"a {type(module).__name__} is saved without options, got {options}")
    else:
        module.save(path)


def convert(source: Path, target: Path, name: str | None = None, *,
            precision: Precision | None = None, **options: Any) -> Any:
    """Load the recurrent layers of one file and save them as another: see `load` and `save`.

    Of a language model, which is a .safetensors file, other kinds hold the recurrent layers alone;
    a warning says so, and what was left out: `save` of the loaded model writes all of it to .onnx.
    With `precision` "int8" a .safetensors file gets int8 weights, with "float32" what int8 weights
    stand for; by default a .safetensors file of int8 stays one. Returns the module that was written.
    """
    options = _checked(options)
    if precision not in (None, "float32", "int8"):
        raise ValueError(f"precision must be 'float32' or 'int8', got {precision!r}")
    if precision == "int8" and not os.fsdecode(target).endswith(".safetensors"):
        raise ValueError("int8 weights are written to .safetensors files alone, got "
                         f"{os.fsdecode(target)!r}")
    content = formats.read(source)
    formats.writer(target)
    if not os.fsdecode(target).endswith(".safetensors") and name is None:
        name = _part_of_model(content, source)
    module = _made(content, source, name, options)
    if precision:
        module = module.freeze("int8") if precision == "int8" else module.unfreeze()
    module.save(target)
    return module


def _part_of_model(content, path):
    """The name of the recurrent layers in a language model's file; None for any other file."""
    if description.MODEL not in content.own:
        return None
    left = {name.partition(".")[0] for name in content.arrays} - {"recurrent", "training"}
    warnings.warn(f"{path} is a language model, of which only the recurrent layers were converted; "
                  f"left out: {description.some(sorted(left))} (lstmcore.formats.read_arrays "
                  "returns them)", stacklevel=3)
    return "recurrent"


def _chosen(path, content, name):
    """The functions that make the wanted layers."""
    chains, others = content.chains, content.others
    names = [found for chain in chains for found, _ in chain]
    if not names:
        hint = content.hint and f": {content.hint}"
        raise ValueError(f"{path} holds no LSTM, GRU or RNN, only "
                         f"{description.some(others) or 'nothing'}{hint}")
    if name is not None:
        wanted = [name] if isinstance(name, str) else list(name)
        makers = {found: make for chain in chains for found, make in chain}
        if missing := [n for n in wanted if n.rstrip(".") not in makers] or not wanted:
            raise ValueError(f"{path} has no recurrent layer {missing}, it has "
                             f"{description.some(names)}")
        return [makers[n.rstrip(".")] for n in wanted]
    if len(chains) > 1:
        raise ValueError(f"{path} holds several recurrent layers, choose by name= one of "
                         f"{description.some(names)}, or a list of those that feed each other")
    if others:
        warnings.warn(f"{path}: loaded {description.some(names)}; left in the file: "
                      f"{description.some(others)} (lstmcore.formats.read_arrays returns them)",
                      stacklevel=3)
    return [make for _, make in chains[0]]


def _size(path):
    """The size of a file, and of those beside it that it may lead to."""
    name = os.fsdecode(path)
    if not name.endswith((".onnx", ".json")):
        return os.path.getsize(name)
    total, folder = os.path.getsize(name), os.path.dirname(name)
    with contextlib.suppress(OSError):                  # a folder that may be passed, not listed
        for other in os.listdir(folder or "."):
            with contextlib.suppress(OSError):          # gone meanwhile, or a link to nothing
                total += os.path.getsize(os.path.join(folder, other))
    return total


def _fill(module, path, name, options):
    """The module, its parameters set to the arrays of a file."""
    if not isinstance(module, Module):
        raise TypeError(f"into must be a Module, got {type(module).__name__}")
    if options:
        raise TypeError(f"a module that is filled says everything itself, got {sorted(options)}")
    content = formats.read(path)
    if description.LAYER in content.own:
        with formats.naming(path):
            description.check_version(path, json.loads(content.own[description.LAYER]))
    arrays, _ = formats.state_dict.folded(content.arrays or formats.read_arrays(path))
    if (lowered := _lowered(path, content)) is not None:
        arrays, _ = formats.state_dict.folded(description.as_floats(lowered))
    if name:
        arrays = description.below(name.rstrip("."), arrays)
        if not arrays:
            raise ValueError(f"{path} has no arrays whose names begin with {name!r}")
    with formats.naming(path):
        module.load_state_dict(arrays)
    return module.eval()


# ---- what lstmcore wrote ------------------------------------------------------------------------


def _own_layer(path, content, options):
    """A module from what `save` wrote."""
    with formats.naming(path):
        try:
            said = json.loads(content.own[description.LAYER])
            description.check_version(path, said)
            said.pop("version", None)
            if (arrays := _lowered(path, content)) is None:
                return rebuild(said, content.arrays, **options).eval()
            if options.get("dtype", np.float32) != np.float32:
                raise ValueError("int8 weights are of float32 layers: dtype must be float32")
            with blank():
                module = rebuild(said, description.outlines(arrays), **options).eval()
            module._fill(arrays)
            return module
        except (json.JSONDecodeError, RecursionError, TypeError, KeyError,
                AttributeError) as error:
            raise ValueError(f"{path} has a description of its layer that is not lstmcore's: "
                             f"{error!r:.200}") from None


def _lowered(path, content):
    """The arrays of a file of ours with int8 numbers, as `description.joined`; None of any other."""
    if not content.own:
        return None
    with formats.naming(path):
        arrays = description.joined(content.arrays)
    return arrays if any(isinstance(a, Quantized) for a in arrays.values()) else None


def _own_model(path, content, options):
    """A model from what its own `save` wrote."""
    from lstmcore.models import LanguageModel
    if options:
        raise TypeError(f"a file of a language model says everything itself, got {options}")
    return LanguageModel._of(path, content.arrays, content.own)


_OWN = {description.LAYER: _own_layer, description.MODEL: _own_model}


def rebuild(said: Mapping[str, Any], arrays: Mapping[str, Any], **options: Any) -> Any:
    """The module of a description, its sizes taken from its arrays alone.

    options : those of `load` that shall be other than described.
    """
    description.check(said)
    kind = said["class"]
    if kind in description.GATES:
        said = {"dtype": None, **said, **options}
        dtype = said.pop("dtype")
        if said.get("compute") == "bfloat16" and dtype == np.float64:
            raise ValueError(f"the {kind} computes in bfloat16: dtype must be float32, got float64")
        del said["class"]
        found = description.from_torch_names("", description.group(arrays)[""])
        if found[0].kind != kind:
            raise ValueError(f"the file says that it holds a {kind}, and holds weights of a "
                             f"{found[0].kind}")
        return assemble(found, dtype=dtype, **said)
    if unknown := options.keys() - ({"batch_first"} if kind == "Stack" else set()):
        raise ValueError(f"the file holds a {kind}, which says {sorted(unknown)} itself"
                         + "; only batch_first can be given" * (kind == "Stack"))
    if kind not in _MAKERS:
        raise ValueError(f"the file holds the parameters of a {kind}, a class that is not "
                         "lstmcore's: make one, and load(path, into=it)")
    values = {**said, **options}
    del values["class"]
    if "layers" in values:
        start = "layers." if kind == "Stack" else ""
        values["layers"] = [rebuild(layer, description.below(f"{start}{n}", arrays))
                            for n, layer in enumerate(values["layers"])]
    elif kind in ("Linear", "Embedding"):
        values["arrays"] = arrays
    return _MAKERS[kind](**values).eval()


def _linear(arrays, compute=None):
    weight = _matrix(arrays)
    module = layers.Linear(weight.shape[1], weight.shape[0], bias="bias" in arrays,
                           dtype=weight.dtype, compute=compute, seed=0)
    module.load_state_dict(arrays)
    return module


def _embedding(arrays):
    module = layers.Embedding(*_matrix(arrays).shape, dtype=arrays["weight"].dtype, seed=0)
    module.load_state_dict(arrays)
    return module


def _matrix(arrays):
    weight = arrays["weight"]
    if weight.ndim != 2 or weight.dtype not in (np.float32, np.float64):
        raise ValueError(f"weight must be a matrix of float32 or float64, got {weight.dtype} "
                         f"{weight.shape}")
    return weight


_MAKERS = {"Linear": _linear, "Embedding": _embedding, "Stack": layers.Stack,
           "Sequential": lambda **said: layers.Sequential(*said["layers"]),
           **{kind: getattr(layers, kind) for kind in (
               "Dropout", "Tanh", "Sigmoid", "ReLU", "LastStep", "MeanOverTime", "MaxOverTime")}}


# ---- from descriptions to layers ----------------------------------------------------------------


def assemble(found: Any, batch_first: bool = False, dropout: float = 0.0,
             nonlinearity: str | None = None, dtype: Any = None, compute: Any = None,
             reset_after: bool | None = None, **variant: Any) -> Any:
    """Descriptions of layers, each fed by the one before it, as one module in evaluation mode.

    They make one `LSTM`, `GRU` or `RNN` where it can say the same, and a `Stack` elsewhere. variant: those
    of `description.COMPUTED` and `DRAWN` that are not the usual ones.
    """
    found = [description.checked(layer, nonlinearity, reset_after) for layer in found]
    if variant:
        found = [layer._replace(variant=variant) for layer in found]
    width = found[0].directions[0]["weight_ih"].shape[1]
    for layer in found:
        if layer.last_step and layer is not found[-1]:
            raise ValueError(f"{layer.name} returns its last step only (return_sequences=False), "
                             "so it cannot feed another layer: load one of them by name=")
        for arrays in layer.directions:
            if (got := arrays["weight_ih"].shape[1]) != width:
                raise ValueError(f"{layer.name} must take the {width} outputs of the layer before "
                                 f"it, its weight_ih takes {got}")
        width = len(layer.directions) * layer.output_size
    dtype = dtype or np.result_type(np.float32, *(a for layer in found for d in layer.directions
                                                  for a in d.values()))
    are_one = len({description.signature(layer) for layer in found}) == 1 and \
        not any(layer.reverse or layer.initial is not None for layer in found)
    if (dropout or compute) and not are_one:
        raise ValueError(f"{'dropout' if dropout else 'compute'} cannot be given to layers that do not "
                         "form one LSTM")
    if are_one and not found[-1].last_step:
        return _build(found, dtype, batch_first=batch_first, dropout=dropout,
                      compute=compute).eval()
    groups = [found] if are_one else [[layer] for layer in found]
    return layers.Stack([_build(group, dtype, dropout=dropout, compute=compute) for group in groups],
                        [group[0].reverse for group in groups], batch_first,
                        [_cast(group[0].initial, dtype) for group in groups],
                        found[-1].last_step).eval()


def _build(found, dtype, **options):
    first = found[0]
    names = first.directions[0]
    options.update(first.variant)
    if first.kind == "LSTM":
        options["peepholes"] = "weight_peephole" in names
        normed, rows = options.get("layer_norm"), sum(np.shape(names.get("weight_layernorm"))[:1])
        expected = 0 if normed is None else LAYER_NORMS.get(normed, (None, rows))[1]
        if rows != expected:
            raise ValueError(f"{first.name} must have weight_layernorm of {expected} rows for layer_norm="
                             f"{normed!r}, got {rows}")
        options["proj_size"] = first.output_size if "weight_hr" in names else 0
    elif first.kind == "GRU":
        options["reset_after"] = first.reset_after
    else:
        options["nonlinearity"] = first.nonlinearity
    module = getattr(layers, first.kind)(
        names["weight_ih"].shape[1], first.hidden_size, len(found), bias="bias" in names,
        bidirectional=len(first.directions) == 2, dtype=dtype, seed=0, **options)
    module.load_state_dict(_by_name([layer.directions for layer in found]))
    if all(layer.int8 for layer in found) and dtype == np.float32 and not options.get("compute"):
        module._fill(_by_name([layer.int8 for layer in found]))
    return module


def _by_name(layers):
    """{weight name of a layer and direction: value}"""
    return {f"{weight}_l{n}{suffix}": a for n, directions in enumerate(layers)
            for suffix, arrays in zip(("", "_reverse"), directions) for weight, a in arrays.items()}


def _cast(state, dtype):
    if state is None:
        return None
    if isinstance(state, tuple):
        return tuple(a.astype(dtype) for a in state)
    return state.astype(dtype)
