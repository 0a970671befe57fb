"""What files say of layers, as data: descriptions between the readers, the writers and lstmcore.

A reader describes the recurrent layers that it found as `Layer`s, a writer is given them. The names
of their arrays are those of an `lstmcore.LSTM`, which are PyTorch's. No layer is built here.
"""

import os
import re
from typing import NamedTuple

import numpy as np

from lstmcore.precision import Quantized
from lstmcore.variants import LAYER_NORMS, Variant

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_A = {"GRU": "a GRU", "RNN": "an RNN"}
WEIGHTS = ("weight_ih", "weight_hh", "bias", "weight_peephole", "weight_hr", "weight_layernorm")
OPTIONS = ("batch_first", "dropout", "nonlinearity", "reset_after")
# In what a layer is not the usual one, as `LSTM` takes it: what is computed, and what training draws.
COMPUTED = ("recurrent_activation", "activation", "cell_activation", "clip", "coupled", "zoneout")
NORMED = "layer_norm"
DRAWN = ("recurrent_dropout", "weight_dropout", "locked_dropout")
VERSION = 1             # of the descriptions in our own files
SCALE = ".scale"        # ends the name of the scales of int8 numbers
LAYER, MODEL = "lstmcore.layer", "lstmcore.language_model"      # their names there
_TORCH_NAME = re.compile(r"(?:(.*)\.)?(weight_ih|weight_hh|bias|bias_ih|bias_hh|weight_hr|"
                         r"weight_peephole|weight_layernorm)(?:_l(\d{1,4})(_reverse)?)?", re.DOTALL)


class Content(NamedTuple):
    """What a reader found in a file."""

    arrays: dict                # by the names of what lstmcore wrote, or else by the file's
    chains: list = []           # of lists of (name, function that returns a list of Layer), each
    #                             layer fed by the one before it
    others: list = []           # names of what is none of these
    options: dict = {}          # those of `OPTIONS` that the file says
    own: dict = {}              # the descriptions that lstmcore wrote, JSON by kind
    hint: str = ""              # what to do where no recurrent layer was found


class Layer(NamedTuple):
    """One recurrent layer as a file describes it.

    directions: one or two dicts of arrays, named and shaped as an LSTM's parameters without their
    `_l0`: weight_ih (4H, I), weight_hh (4H, P), and where there are any bias (4H,),
    weight_peephole (3, H), weight_hr (P, H), weight_layernorm (10 or 6, H); rows ordered i, f, g, o. For an
    RNN H rows; for a GRU 3H, ordered r, z, n, and with reset_after a bias (4H,), its last b_hn.
    """

    name: str
    kind: str                           # one of GATES
    directions: list
    nonlinearity: "str | None" = None   # of an RNN
    reverse: bool = False               # its only direction reads from the end
    initial: "tuple | None" = None      # the initial state, where the file fixes one
    last_step: bool = False             # y is the last output only
    reset_after: "bool | None" = None   # of a GRU, where its biases do not say it
    variant: dict = {}                  # those of COMPUTED and DRAWN that are not the usual ones
    int8: "list | None" = None          # {weight: Quantized} of each direction, if it is in int8

    @property
    def hidden_size(self):
        return len(self.directions[0]["weight_ih"]) // GATES[self.kind]

    @property
    def output_size(self):
        return self.directions[0]["weight_hh"].shape[1]


def check_version(path, said):
    """ValueError unless this version of lstmcore reads what one of our own files says."""
    if isinstance(said, dict) and (version := said.get("version", 1)) != VERSION:
        raise ValueError(f"{os.fsdecode(path)} is of version {version!r:.40} of lstmcore's files, "
                         f"this lstmcore reads version {VERSION}: install a newer one")


def group(arrays):
    """Arrays by PyTorch's names -> {prefix: {(layer, suffix): {weight name: array}}}.

    An array may be replaced by a str that says why it cannot be read.
    """
    found = {}
    for name, a in arrays.items():
        if match := _TORCH_NAME.fullmatch(name):
            # a torch.nn.LSTMCell has no number of a layer
            prefix, weight, layer, suffix = (match[1] or "", match[2], int(match[3] or 0),
                                             match[4] or "")
            found.setdefault(prefix, {}).setdefault((layer, suffix), {})[weight] = a
    # A name like an LSTM's does not make one: weight_hh does.
    return {prefix: cells for prefix, cells in found.items()
            if any("weight_hh" in cell for cell in cells.values())}


def is_weight(name):
    """Whether a parameter of an LSTM, GRU, RNN or Stack could be named so."""
    match = _TORCH_NAME.fullmatch(name)
    return match is not None and match[3] is not None


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


def _kind(name, arrays):
    """LSTM, GRU or RNN, told by the number of rows per hidden unit."""
    w = arrays.get("weight_hh")
    if w is None or w.ndim != 2:
        raise ValueError(f"{name} must have a matrix weight_hh, got "
                         f"{'none' if w is None else w.shape}")
    projection = arrays.get("weight_hr", w)
    H = projection.shape[-1] if projection.ndim == 2 else 0
    for kind, rows in GATES.items():
        if H and len(w) == rows * H:
            return kind
    raise ValueError(f"weight_hh of {name} must have 4H rows (LSTM), 3H (GRU) or H (RNN) with "
                     f"H = {H}, got {w.shape}")


def _weights(name, cell):
    """One cell's arrays, PyTorch's two biases as the one that they act as."""
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
        cell["bias"] = one_bias(*pair, cell.get("weight_hh"))
    return cell


def one_bias(bias_ih, bias_hh, weight_hh):
    """PyTorch's two biases as one: their sum, but for a GRU's b_hn, which the reset gate multiplies."""
    if not is_gru(weight_hh) or bias_ih.shape != (len(weight_hh),):
        return bias_ih + bias_hh
    return gru_bias(bias_ih, bias_hh)


def gru_bias(bias_ih, bias_hh, concatenate=np.concatenate):
    """PyTorch's two biases (3H,) of a GRU as b_r, b_z, b_n, b_hn (4H,)."""
    rz = bias_ih.shape[0] // 3 * 2
    return concatenate([bias_ih[:rz] + bias_hh[:rz], bias_ih[rz:], bias_hh[rz:]])


def is_gru(weight_hh):
    """Whether it has three rows for each hidden unit, and so is no LSTM's and no RNN's."""
    return np.ndim(weight_hh) == 2 and len(weight_hh) == 3 * weight_hh.shape[1]


def checked(layer, nonlinearity=None, reset_after=None):
    """The layer, its shapes, dtypes and names proven to fit each other."""
    first = layer.directions[0]
    if any(np.ndim(first.get(weight)) != 2 for weight in ("weight_ih", "weight_hh")):
        raise ValueError(f"{layer.name} must have the matrices weight_ih and weight_hh, got "
                         f"{ {weight: np.shape(a) for weight, a in first.items()} }")
    rows, (H, P) = GATES[layer.kind], (layer.hidden_size, layer.output_size)
    shapes = {"weight_ih": (rows * H, first["weight_ih"].shape[-1]), "weight_hh": (rows * H, P),
              "bias": (rows * H,), "weight_peephole": (3, H), "weight_hr": (P, H),
              "weight_layernorm": (10, H)}
    for _, n in LAYER_NORMS.values():       # which of them it is, the layer's own words say
        if np.shape(first.get("weight_layernorm"))[:1] == (n,):
            shapes["weight_layernorm"] = n, H
    if layer.kind != "LSTM" and set(WEIGHTS[3:]) & first.keys():
        raise ValueError(f"{layer.name} has the shape of {_A[layer.kind]} and the weights "
                         f"{sorted(first)}")
    if layer.kind == "GRU":
        layer = layer._replace(reset_after=_reset_after(layer, reset_after))
        shapes["bias"] = ((rows + layer.reset_after) * H,)
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


def _reset_after(layer, wanted):
    """Whether a GRU's reset gate comes after the product: its bias says so, if it has one."""
    bias = layer.directions[0].get("bias")
    said = None if bias is None else len(bias) == 4 * layer.hidden_size
    for value in (layer.reset_after, wanted):
        if value is None:
            continue
        if not isinstance(value, bool):
            raise ValueError(f"reset_after must be True or False, got {value!r:.40}")
        if said is not None and value != said:
            raise ValueError(f"{layer.name} has biases of a GRU with reset_after={said}, and "
                             f"reset_after={value} is asked for")
        said = value
    return True if said is None else said


def signature(layer):
    """What layers must have in common to be one LSTM or RNN."""
    return (layer.kind, layer.hidden_size, layer.output_size, layer.nonlinearity, layer.reset_after,
            len(layer.directions), tuple(sorted(layer.directions[0])), repr(sorted(layer.variant.items())))


def joined(arrays):
    """The arrays of a file, those in int8 with their scales as `Quantized`."""
    found = {}
    for name, q in arrays.items():
        rows = name.removesuffix(SCALE)
        if rows != name and rows in arrays and arrays[rows].dtype == np.int8:
            continue
        if q.dtype != np.int8:
            found[name] = q
            continue
        if (scale := arrays.get(name + SCALE)) is None:
            raise ValueError(f"{name} is int8 and has no scales, {name}{SCALE}")
        if scale.dtype != np.float32 or q.ndim != 2 or scale.shape != q.shape[:1]:
            raise ValueError(f"{name}{SCALE} must be float32 with a scale for each row of {name}, int8 "
                             f"{q.shape}, got {scale.dtype} {scale.shape}")
        if (q == -128).any() or not ((scale >= 0) & (scale < np.inf) | np.isnan(scale)).all():
            raise ValueError(f"{name} must be within -127..127 times scales that are finite and not "
                             "negative")
        found[name] = Quantized(q, scale)
    return found


def as_floats(arrays):
    """What `joined` found, with the floats that int8 numbers stand for."""
    return {name: a.floats() if isinstance(a, Quantized) else a for name, a in arrays.items()}


def outlines(arrays):
    """What `joined` found, with float32 of the shape of int8 numbers that takes no memory."""
    return {name: np.broadcast_to(np.float32(0), a.q.shape) if isinstance(a, Quantized) else a
            for name, a in arrays.items()}


def check(said):
    """ValueError unless a description in a file says what it can say."""
    kinds = {"batch_first": bool, "dropout": (int, float), "p": (int, float), "nonlinearity": str,
             "compute": str, "bidirectional": bool, "last_step": bool, "reset_after": bool,
             "reverse": list, "layers": list, "class": str, "clip": (int, float), "coupled": bool,
             "zoneout": (int, float, list), "recurrent_dropout": (int, float),
             "weight_dropout": (int, float), "locked_dropout": bool, NORMED: str,
             **dict.fromkeys(COMPUTED[:3], (str, list))}
    if not isinstance(said, dict) or "class" not in said:
        raise ValueError(f"a description must be an object with a class, got {said!r:.100}")
    for name, value in said.items():
        if name not in kinds or not isinstance(value, kinds[name]) \
                or (name != "clip" and isinstance(value, (int, float)) and not 0 <= value <= 1):
            raise ValueError(f"the description of a {said['class']:.100} says "
                             f"{name} = {value!r:.100}")
    try:
        Variant(**{name: said[name] for name in COMPUTED if name in said})
    except (TypeError, ValueError) as error:
        raise ValueError(f"the description of a {said['class']:.100} does not fit: {error}") from None
    if not all(isinstance(r, bool) for r in said.get("reverse", [])):
        raise ValueError(f"the description of a {said['class']:.100} says reverse = "
                         f"{said['reverse']!r:.100}")


def parts(description, arrays):
    """The LSTMs, GRUs and RNNs of a described module as (description, [Layer], reverse)."""
    kind = description["class"]
    if kind == "Stack":
        return [(layer, parts(layer, below(f"layers.{n}", arrays))[0][1], reverse)
                for n, (layer, reverse) in enumerate(zip(description["layers"],
                                                         description["reverse"]))]
    if kind not in GATES:
        raise TypeError(f"module must be an LSTM, GRU, RNN or Stack, got {kind}")
    layers = from_torch_names("", group(arrays)[""])
    said = description.get("nonlinearity"), description.get("reset_after")
    variant = {name: description[name] for name in (*COMPUTED, NORMED, *DRAWN) if name in description}
    return [(description, [checked(layer._replace(variant=variant), *said) for layer in layers], False)]


def below(prefix, arrays):
    """The arrays whose names begin with prefix and a dot, without these."""
    start = prefix + "."
    return {name[len(start):]: a for name, a in arrays.items() if name.startswith(start)}


def torch_names(arrays):
    """Recurrent layers' parameters as PyTorch names them: two biases, one of zeros but for b_hn of a
    GRU. The one of a GRU without reset_after, which PyTorch does not have, keeps its name."""
    found = {}
    for name, a in arrays.items():
        head, _, tail = name.rpartition("bias_l")
        w = arrays.get(f"{head}weight_hh_l{tail}")
        if not name.rpartition(".")[2].startswith("bias_l") or not is_weight(name) \
                or (is_gru(w) and len(a) == len(w)):
            found[name] = a
            continue
        ih, hh = a, np.zeros_like(a)
        if is_gru(w):
            ih, hh = a[:len(w)], np.zeros_like(a[:len(w)])
            hh[-w.shape[1]:] = a[len(w):]
        found[f"{head}bias_ih_l{tail}"], found[f"{head}bias_hh_l{tail}"] = ih, hh
    return found


def some(names, limit=12):
    """Names for a message, cut to a readable number."""
    names = [repr(str(n)[:80]) if n else "(no prefix)" for n in names]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" * (len(names) > limit))
