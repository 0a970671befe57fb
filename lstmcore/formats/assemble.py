"""From arrays to layers: what every reader ends with, and the names that PyTorch gives them.

A reader describes what it found as a list of `Layer`; `assemble` checks the shapes against each
other and builds one `lstmcore.LSTM` or `RNN` where it can say the same, and a `Stack` elsewhere.
"""

import re
from typing import NamedTuple

import numpy as np

from lstmcore.formats.stack import Stack
from lstmcore.layers import LSTM, RNN

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
WEIGHTS = ("weight_ih", "weight_hh", "bias", "weight_peephole", "weight_hr")
OPTIONS = ("batch_first", "dropout", "nonlinearity")
_TORCH_NAME = re.compile(r"(?:(.*)\.)?(weight_ih|weight_hh|bias|bias_ih|bias_hh|weight_hr|"
                         r"weight_peephole)_l(\d{1,4})(_reverse)?", re.DOTALL)


class Layer(NamedTuple):
    """One recurrent layer as a file describes it.

    directions: one or two dicts of arrays, named and shaped as an LSTM's parameters without their
    `_l0`: weight_ih (4H, I), weight_hh (4H, P), and where there are any bias (4H,),
    weight_peephole (3, H), weight_hr (P, H); rows ordered i, f, g, o. For an RNN H rows.
    """

    name: str
    kind: str                           # "LSTM" or "RNN"
    directions: list
    nonlinearity: "str | None" = None   # of an RNN
    reverse: bool = False               # its only direction reads from the end
    initial: "tuple | None" = None      # the initial state, where the file fixes one
    last_step: bool = False             # y is the last output only

    @property
    def hidden_size(self):
        return len(self.directions[0]["weight_ih"]) // GATES[self.kind]

    @property
    def output_size(self):
        return self.directions[0]["weight_hh"].shape[1]


def assemble(layers, batch_first=False, dropout=0.0, nonlinearity=None):
    """The layers, each fed by the one before it, as one module in evaluation mode."""
    layers = [_checked(layer, nonlinearity) for layer in layers]
    width = layers[0].directions[0]["weight_ih"].shape[1]
    for layer in layers:
        if layer.last_step and layer is not layers[-1]:
            raise ValueError(f"{layer.name} returns its last step only (return_sequences=False), "
                             "so it cannot feed another layer: load one of them by name=")
        for arrays in layer.directions:
            if (got := arrays["weight_ih"].shape[1]) != width:
                raise ValueError(f"{layer.name} must take the {width} outputs of the layer before "
                                 f"it, its weight_ih takes {got}")
        width = len(layer.directions) * layer.output_size
    dtype = np.result_type(np.float32, *(a for layer in layers for d in layer.directions
                                         for a in d.values()))
    are_one = len({_signature(layer) for layer in layers}) == 1 and \
        not any(layer.reverse or layer.initial is not None for layer in layers)
    if dropout and not are_one:
        raise ValueError("dropout cannot be given to layers that do not form one LSTM")
    if are_one and not layers[-1].last_step:
        return _build(layers, dtype, batch_first=batch_first, dropout=dropout).eval()
    groups = [layers] if are_one else [[layer] for layer in layers]
    return Stack([_build(group, dtype, dropout=dropout) for group in groups],
                 [group[0].reverse for group in groups], batch_first,
                 [_cast(group[0].initial, dtype) for group in groups],
                 layers[-1].last_step).eval()


def group(arrays):
    """Arrays by PyTorch's names -> {prefix: {(layer, suffix): {weight name: array}}}.

    An array may be replaced by a str that says why it cannot be read.
    """
    found = {}
    for name, a in arrays.items():
        if match := _TORCH_NAME.fullmatch(name):
            prefix, weight, layer, suffix = match[1] or "", match[2], int(match[3]), match[4] or ""
            found.setdefault(prefix, {}).setdefault((layer, suffix), {})[weight] = a
    # A name like an LSTM's does not make one: weight_hh does.
    return {prefix: cells for prefix, cells in found.items()
            if any("weight_hh" in cell for cell in cells.values())}


def is_weight(name):
    """Whether a parameter of an LSTM, RNN or Stack could be named so."""
    return _TORCH_NAME.fullmatch(name) is not None


def from_torch_names(prefix, cells):
    """One entry of `group` as a list of Layer."""
    count = 1 + max(layer for layer, _ in cells)
    suffixes = ["", "_reverse"] if any(suffix for _, suffix in cells) else [""]
    wanted = {(layer, suffix) for layer in range(min(count, len(cells))) for suffix in suffixes}
    if wanted != cells.keys():
        raise ValueError(f"{prefix or 'the file'} must have the layers 0 to {count - 1}, each with "
                         f"the directions {suffixes}, got {sorted(cells)}")
    layers = []
    for n in range(count):
        name = f"{prefix}.l{n}".lstrip(".")
        directions = [_weights(name, cells[n, suffix]) for suffix in suffixes]
        layers.append(Layer(name, _kind(name, directions[0]), directions))
    return layers


def torch_names(module):
    """The parameters of an LSTM, RNN or Stack as PyTorch names them: two biases, one of zeros.

    `torch.nn.LSTM.load_state_dict` takes them, except peepholes, which it does not know.
    """
    found = {}
    for name, p in module.parameters().items():
        head, bias, tail = name.rpartition("bias_l")
        if bias:
            found[f"{head}bias_ih_l{tail}"], found[f"{head}bias_hh_l{tail}"] = p, np.zeros_like(p)
        else:
            found[name] = p
    return found


def cells(module):
    """One list per layer of an LSTM or RNN, one dict of `WEIGHTS` per direction."""
    parameters, suffixes = module.parameters(), ("", "_reverse")[:1 + module.bidirectional]
    return [[{weight: parameters[name] for weight in WEIGHTS
              if (name := f"{weight}_l{n}{suffix}") in parameters} for suffix in suffixes]
            for n in range(module.num_layers)]


def parts(module):
    """An LSTM, RNN or Stack as its (LSTM or RNN, reverse) pairs, for writing it."""
    if isinstance(module, Stack):
        if any(state is not None for state in module.initial):
            raise ValueError("a Stack with fixed initial states cannot be saved: set its initial "
                             "to [None, ...] and give the states to every call")
        return list(zip(module.layers, module.reverse))
    if isinstance(module, (LSTM, RNN)):
        return [(module, False)]
    raise TypeError(f"module must be an LSTM, RNN or Stack, got {type(module).__name__}")


def describe(module):
    """What the arrays of an LSTM, RNN or Stack do not say about it; JSON can hold it."""
    layers = [layer for layer, _ in parts(module)]
    if isinstance(module, Stack):
        return {"class": "Stack", "batch_first": module.batch_first, "reverse": module.reverse,
                "last_step": module.last_step, "layers": [describe(layer) for layer in layers]}
    kind, names = type(module).__name__, ("batch_first", "dropout")
    names += ("nonlinearity",) * (kind == "RNN")
    return {"class": kind, **{name: getattr(module, name) for name in names}}


def rebuild(description, arrays, **options):
    """The module that `describe` described, its sizes taken from its arrays alone.

    options : those of `OPTIONS` that shall be other than described.
    """
    kind = description["class"]
    if kind == "Stack" and (unknown := options.keys() - {"batch_first"}):
        raise ValueError(f"the file holds a Stack, which says {sorted(unknown)} itself; only "
                         "batch_first can be given")
    options = {**description, **options}
    del options["class"]
    groups = group(arrays)
    if kind != "Stack":
        return assemble(from_torch_names("", groups[""]), **options)
    layers = [rebuild(layer, {name.removeprefix(f"layers.{n}."): a for name, a in arrays.items()
                              if name.startswith(f"layers.{n}.")})
              for n, layer in enumerate(options.pop("layers"))]
    return Stack(layers, **options).eval()


def _kind(name, arrays):
    """LSTM or RNN, told by the number of rows per hidden unit."""
    w = arrays.get("weight_hh")
    if w is None or w.ndim != 2:
        raise ValueError(f"{name} must have a matrix weight_hh, got "
                         f"{'none' if w is None else w.shape}")
    projection = arrays.get("weight_hr", w)
    H = projection.shape[-1] if projection.ndim == 2 else 0
    for kind, rows in GATES.items():
        if H and len(w) == rows * H:
            if kind == "GRU":
                raise ValueError(f"{name} is a GRU: lstmcore has LSTM and RNN")
            return kind
    raise ValueError(f"weight_hh of {name} must have 4H rows (LSTM) or H (RNN) with H = {H}, "
                     f"got {w.shape}")


def _weights(name, cell):
    """One cell's arrays, PyTorch's two biases as the one that they add up to."""
    cell = dict(cell)
    for weight, a in cell.items():
        if isinstance(a, str):
            raise ValueError(f"{weight} of {name} is no tensor that is read here, but {a}")
    if ("bias_ih" in cell) != ("bias_hh" in cell) or ("bias" in cell and "bias_ih" in cell):
        raise ValueError(f"{name} must have bias_ih and bias_hh, or bias alone, or none; "
                         f"got {sorted(cell)}")
    if "bias_ih" in cell:
        pair = cell.pop("bias_ih"), cell.pop("bias_hh")
        if pair[0].shape != pair[1].shape:
            raise ValueError(f"bias_ih and bias_hh of {name} must have one shape, "
                             f"got {pair[0].shape} and {pair[1].shape}")
        if not {pair[0].dtype.kind, pair[1].dtype.kind} <= {"f"}:
            raise ValueError(f"the biases of {name} must hold floats, "
                             f"got {pair[0].dtype} and {pair[1].dtype}")
        if pair[0].dtype.itemsize < 4:          # a sum in float16 would lose what both hold
            pair = [b.astype("float32") for b in pair]
        cell["bias"] = pair[0] + pair[1]
    return cell


def _checked(layer, nonlinearity):
    """The layer, its shapes, dtypes and names proven to fit each other."""
    first = layer.directions[0]
    if "weight_ih" not in first or np.ndim(first["weight_hh"]) != 2:
        raise ValueError(f"{layer.name} must have weight_ih and weight_hh, got {sorted(first)}")
    rows, (H, P) = GATES[layer.kind], (layer.hidden_size, layer.output_size)
    shapes = {"weight_ih": (rows * H, first["weight_ih"].shape[-1]), "weight_hh": (rows * H, P),
              "bias": (rows * H,), "weight_peephole": (3, H), "weight_hr": (P, H)}
    if layer.kind == "RNN" and {"weight_peephole", "weight_hr"} & first.keys():
        raise ValueError(f"{layer.name} has the shape of an RNN and the weights {sorted(first)}")
    for arrays in layer.directions:
        if arrays.keys() != first.keys():
            raise ValueError(f"the directions of {layer.name} must have the same weights, "
                             f"got {sorted(first)} and {sorted(arrays)}")
        for weight, a in arrays.items():
            if a.shape != shapes[weight] or not a.size:
                raise ValueError(f"{weight} of {layer.name} must be {shapes[weight]} and not "
                                 f"empty, got {a.shape}")
            if a.dtype.kind != "f":
                raise ValueError(f"{weight} of {layer.name} must hold floats, got {a.dtype}")
    if H != P and "weight_hr" not in first:
        raise ValueError(f"weight_hh of {layer.name} must be {(rows * H, H)}, got {(rows * H, P)}")
    if layer.kind != "RNN":
        return layer
    if (found := nonlinearity or layer.nonlinearity) is None:
        raise ValueError(f"{layer.name} is an RNN, and its file does not say whether its "
                         "nonlinearity is tanh or relu: give nonlinearity=")
    return layer._replace(nonlinearity=found)


def _signature(layer):
    return (layer.kind, layer.hidden_size, layer.output_size, layer.nonlinearity,
            len(layer.directions), tuple(sorted(layer.directions[0])))


def _build(layers, dtype, **options):
    first = layers[0]
    names = first.directions[0]
    if first.kind == "LSTM":
        options["peepholes"] = "weight_peephole" in names
        options["proj_size"] = first.output_size if "weight_hr" in names else 0
    else:
        options["nonlinearity"] = first.nonlinearity
    module = (LSTM if first.kind == "LSTM" else RNN)(
        names["weight_ih"].shape[1], first.hidden_size, len(layers), bias="bias" in names,
        bidirectional=len(first.directions) == 2, dtype=dtype, seed=0, **options)
    module.load_state_dict({f"{weight}_l{n}{suffix}": a for n, layer in enumerate(layers)
                            for suffix, arrays in zip(("", "_reverse"), layer.directions)
                            for weight, a in arrays.items()})
    return module


def _cast(state, dtype):
    if state is None:
        return None
    if isinstance(state, tuple):
        return tuple(a.astype(dtype) for a in state)
    return state.astype(dtype)
