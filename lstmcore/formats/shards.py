"""A model in several files, its shards: an index beside them, JSON, tells by the names of the arrays.

    {"metadata": ..., "weight_map": {name: file}}

The shards are safetensors files (model.safetensors.index.json) or PyTorch's (pytorch_model.bin.index.json).
"""

import json
import os
import re

from lstmcore.formats import description, disk, pytorch, safetensors, state_dict

ENDING = ".index.json"
_SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})(\.safetensors|\.bin|\.pt|\.pth)", re.DOTALL)


def content(path):
    """The recurrent layers in all shards together."""
    found, objects, metadata = _all(path)
    return state_dict.content(found, objects, own=safetensors.own(metadata))


def read_arrays(path):
    """Every array of the shards."""
    found, objects, _ = _all(path)
    pytorch.warn_of(path, objects)
    return found


def check_whole(path):
    """ValueError if a file is one shard of several, by its name or by an index beside it."""
    path = os.fsdecode(path)
    index = None if path.endswith(ENDING) else _index_of(path)
    if index is None:
        return
    raise ValueError(f"{path} is one shard of several" + (
        f": load {index}, which names them all" if os.path.exists(index)
        else f", whose index {os.path.basename(index)} is not beside it"))


def _all(path):
    """The arrays, the objects that are none, and the metadata of all shards of an index."""
    name = os.fsdecode(path)
    try:
        places = json.loads(disk.read(path).decode("utf-8"))["weight_map"]
        shards = dict.fromkeys(places.values())         # in order, each once
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} is no index of the files of a model: {error!r:.100}") from None
    found, objects, metadata = {}, {}, {}
    for shard in shards:
        if not isinstance(shard, str) or os.path.basename(shard) != shard or "\\" in shard \
                or not shard.endswith((".safetensors", ".bin", ".pt", ".pth")):
            raise ValueError(f"{name} names the shard {shard!r:.100}: only a .safetensors, .bin or .pt "
                             "file in its own folder is opened")
        try:
            there, odd, said = _one(os.path.join(os.path.dirname(name), shard))
        except OSError as error:
            raise ValueError(f"{name} names the shard {shard!r:.100}, which cannot be read: "
                             f"{error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"{name}: the shard {shard!r:.100}: {error}") from None
        if repeated := there.keys() & found.keys():
            raise ValueError(f"{name}: {description.some(sorted(repeated))} of {shard} stands in "
                             "another shard too")
        found.update(there), objects.update(odd), metadata.update(said)
    there = found.keys() | objects.keys()
    if odd := [array for array in places if array not in there] or \
            sorted(found.keys() - places.keys()):
        raise ValueError(f"{name} and its shards disagree on {description.some(odd)}")
    return safetensors.tied(found, metadata), objects, metadata


def _one(path):
    if not path.endswith(".safetensors"):
        return (*pytorch.tensors(path), {})
    arrays, metadata = safetensors.read(path)
    return arrays, {}, metadata


def _index_of(path):
    """The index that a file is a shard of, or None."""
    folder, name = os.path.split(path)
    if (match := _SHARD.fullmatch(name)) and int(match[2]) > 1:
        return os.path.join(folder, match[1] + match[3] + ENDING)
    try:
        beside = sorted(os.path.join(folder, other) for other in os.listdir(folder or ".")
                        if other.endswith(ENDING))
    except OSError:                                     # a folder that may be passed, not listed
        return None
    for index in beside:
        try:
            if os.path.getsize(index) > safetensors.MAX_HEADER:
                continue
            shards = set(json.loads(disk.read(index))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue                                    # what is beside a file is not its fault
        if name in shards and len(shards) > 1:
            return index
    return None
