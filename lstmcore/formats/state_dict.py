"""Named tensors as PyTorch's modules have them -> recurrent layers, whatever file they were in.

A weight that PyTorch keeps in parts is put together: weight_norm's length g and direction v, in the
old form (`_g`, `_v`) and as parametrizations; spectral_norm's weight and the vectors u and v that
tell its norm; pruning's `_orig` and `_mask`; and the `_raw` weight of DropConnect (Merity et al. 2017),
beside which a copy stands that lacks what was dropped last.
"""

import functools
import re

import numpy as np

from lstmcore.formats import description
from lstmcore.formats.description import Content

_PART = re.compile(r"(?:(.*?)\.)?(parametrizations\.)?((?:weight_[ih]h|weight_hr|bias_[ih]h)"
                   r"(?:_l\d{1,4}(?:_reverse)?)?)(_g|_v|_u|_orig|_mask|_raw|"
                   r"\.original[01]?|\.[01]\.\w{1,40})", re.DOTALL)


def content(arrays, objects=(), said=None, own=None, hint=""):
    """What a file of tensors holds.

    objects : {name: what stands there and is no array}
    said : {prefix: options that the file says of the layer there}
    """
    objects, said = dict(objects), said or {}
    whole, parts = folded(arrays)
    groups = description.group({**whole, **objects})
    used = {id(a) for cells in groups.values() for cell in cells.values() for a in cell.values()}
    others = [name for name, a in arrays.items() if id(a) not in used and name not in parts]
    odd = _odd_cells(whole, others)
    chains = [[(prefix, functools.partial(_layers, prefix, cells, said.get(prefix, {}),
                                          odd.get(prefix)))] for prefix, cells in groups.items()]
    options = {}
    for name in ("batch_first", "dropout"):
        values = {said[prefix][name] for prefix in groups if name in said.get(prefix, {})}
        if len(values) == 1 and all(prefix in said for prefix in groups):
            options[name] = values.pop()
    return Content(arrays, chains, others, options, own or {}, hint)


def folded(arrays):
    """The arrays with weights in the place of their parts, and the names of these parts.

    Where a file does not say how the parts make the weight, a str in its place tells so.
    """
    kept = {}
    for name in arrays:
        if match := _PART.fullmatch(name):
            prefix, _, weight, part = match.groups()
            kept.setdefault((f"{prefix}." if prefix else "", weight), {})[part] = name
    whole, used = dict(arrays), set()
    for (prefix, weight), names in kept.items():
        if names.keys() <= {"_v", "_u", "_mask"}:       # parts of nothing
            continue
        place = prefix + weight
        tail = weight[len("weight_hh"):]
        if "_raw" in names and any(f"{prefix}module.{beside}{tail}" in arrays for beside in (
                "weight_ih", "weight_hh", "bias_ih")):
            place = f"{prefix}module.{weight}"
        whole[place] = _whole(weight, {part: arrays[name] for part, name in names.items()})
        used.update(names.values(), [place])
    return whole, used


def _whole(weight, parts):
    """A weight from its parts, or why it cannot be."""
    kinds = parts.keys()
    if kinds == {"_raw"}:
        return parts["_raw"]
    if kinds == {"_orig", "_mask"}:
        a, mask = parts["_orig"], parts["_mask"]
        if a.shape == mask.shape and a.dtype.kind == "f" and mask.dtype.kind in "fb":
            return (a * mask).astype(a.dtype)
    for orig, u, v in (("_orig", "_u", "_v"), (".original", ".0._u", ".0._v")):
        if kinds == {orig, u, v}:
            W, u, v = (parts[part] for part in (orig, u, v))
            if all(a.dtype.kind == "f" for a in (W, u, v)) and W.ndim == 2 \
                    and (u.shape, v.shape) in ((W.shape[:1], W.shape[1:]),
                                               (W.shape[1:], W.shape[:1])):
                # w = W / s, s = u W v as it was last estimated; with dim=1 of the transpose
                u, v = (u, v) if u.shape == W.shape[:1] else (v, u)
                with np.errstate(divide="ignore", invalid="ignore"):
                    return (W / (u.astype("f8") @ W @ v)).astype(np.promote_types(W.dtype, "f4"))
    for g, v in (("_g", "_v"), (".original0", ".original1")):
        if kinds == {g, v}:
            g, v = parts[g], parts[v]
            if g.dtype.kind == v.dtype.kind == "f" and g.ndim in (0, v.ndim) and \
                    all(n in (1, m) for n, m in zip(g.shape, v.shape)):
                # w = g v / |v|, the length taken along the axes that g does not have
                axes = tuple(k for k in range(v.ndim) if not g.ndim or g.shape[k] == 1)
                wide = v.astype("f8")
                length = np.sqrt((wide * wide).sum(axis=axes, keepdims=True))
                with np.errstate(divide="ignore", invalid="ignore"):
                    return (g * (wide / length)).astype(np.promote_types(v.dtype, "f4"))
    said = ", ".join(sorted(weight + part for part in kinds))
    return (f"only its parts {said}, and not how they make it: before saving, let "
            f"torch.nn.utils.parametrize.remove_parametrizations(module, {weight!r}), or what else "
            "undoes them, put it together")


def _odd_cells(arrays, others):
    """{prefix: the names of what stands in a cell of its names beside the weights of torch's cells}"""
    found = {}
    for name in others:
        parts = name.rsplit(".", 2)                     # (cell.)norm.weight, or (cell.)weight
        for prefix in {".".join(parts[:-n]) for n in (1, 2)}:
            if f"{prefix}.weight_hh".lstrip(".") in arrays:
                found.setdefault(prefix, []).append(name)
    return found


def _layers(prefix, cells, said, odd):
    if odd:
        raise ValueError(f"{prefix or 'the cell'} has the weights of a cell, and {description.some(odd)}, "
                         "which no cell of torch.nn has: what its class makes of them, the file does "
                         "not say (lstmcore.formats.read_arrays returns them)")
    return [layer._replace(nonlinearity=said.get("nonlinearity"))
            for layer in description.from_torch_names(prefix, cells)]
