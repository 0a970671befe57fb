"""safetensors files: named arrays and a dictionary of strings, read and written without a package.

    8 bytes         N, little-endian
    N bytes         JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__"}
    the rest        the arrays, C order, little-endian, end to end, offsets counted from here

`read` trusts nothing: everything the header claims is compared with the size of the file before a
byte of it is used, and the arrays must fill the file without gap or overlap.
"""

import json
import math
import os
import struct

import numpy as np

from lstmcore.formats import description, disk, state_dict
from lstmcore.precision import Quantized

MAX_HEADER = 1 << 24        # a header is JSON: parsed, it takes some twenty times its size
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2",
          "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?"}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}


def content(path):
    """The recurrent layers in a file under PyTorch's names, or what lstmcore wrote."""
    found, metadata = read(path)
    return state_dict.content(tied(found, metadata), own=own(metadata))


def read_arrays(path):
    """Every array of the file."""
    return tied(*read(path))


def own(metadata):
    """What lstmcore wrote into the metadata."""
    return {key: value for key, value in metadata.items() if key.startswith("lstmcore.")}


def tied(arrays, metadata):
    """The arrays, and those that the package safetensors left out, as it tells in the metadata: of
    tensors that share their numbers `save_model` writes one, and the name of this one for the others."""
    return {**arrays, **{name: arrays[kept] for name, kept in metadata.items()
                         if name not in arrays and kept in arrays}}


def write_module(path, module):
    """Write a module: PyTorch's names, and what rebuilds it."""
    said = {"version": description.VERSION, **module.describe()}
    write(path, description.torch_names(stored(module)), {description.LAYER: json.dumps(said)})


def stored(module):
    """The arrays of a module by name: its parameters, or int8 numbers and their scales."""
    arrays = {}
    for name, a in module._stored().items():
        if isinstance(a, Quantized):
            arrays[name], arrays[name + description.SCALE] = a
        else:
            arrays[name] = a
    return arrays


def read(path):
    """The arrays of a safetensors file by name, and its metadata (strings by name).

    BF16 arrays come as float32, which holds every bfloat16. Raises ValueError for a file that is
    damaged or that claims what it does not hold.
    """
    with disk.opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        entries, metadata, begin = _read_header(file, size)
        _check_layout(entries, size - begin)
        data = file.read(size - begin)
    if len(data) != size - begin:
        raise ValueError("the safetensors file changed while it was read")
    return {name: _array(data, *entry) for name, entry in entries.items()}, metadata


def write(path, arrays, metadata=None):
    """Write arrays by name, and metadata (strings by name), as a safetensors file.

    The file appears whole or not at all: see `disk.written`. Arrays of int8 and other integers are
    written as they are.

    >>> import os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "two.safetensors")
    >>> write(path, {"a": np.arange(3.0), "b": np.zeros((2, 1), "float32")}, {"made by": "me"})
    >>> arrays, metadata = read(path)
    >>> arrays["a"], metadata
    (array([0., 1., 2.]), {'made by': 'me'})
    """
    # Widest first keeps every array aligned to its own item size.
    arrays = {name: np.asarray(a) for name, a in arrays.items()}
    names = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header, end = {}, 0
    if metadata:
        header["__metadata__"] = dict(metadata)
    for name in names:
        a = arrays[name]
        if (code := CODES.get(a.dtype.newbyteorder("<"))) is None:
            raise TypeError(f"{name} must hold numbers that safetensors knows, got {a.dtype}")
        begin, end = end, end + a.nbytes
        header[name] = {"dtype": code, "shape": list(a.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ValueError(f"names and metadata take {len(text)} bytes, at most {MAX_HEADER} fit")
    with disk.written(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            a = arrays[name]
            file.write(a.astype(a.dtype.newbyteorder("<"), "C", copy=False).data.cast("B")
                       if a.size else b"")


def looks_like(head):
    """Whether a file that starts with these 9 bytes could be a safetensors file."""
    return len(head) >= 9 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= MAX_HEADER


def widened(bits):
    """bfloat16 as its 16 bits -> float32: the upper half of the same number."""
    return (bits.astype("<u4") << 16).view("<f4")


def _read_header(file, size):
    """{name: (code, shape, begin, end)}, metadata, and where the data begins."""
    if size < 8:
        raise ValueError(f"a safetensors file has at least 8 bytes, this one has {size}")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(MAX_HEADER, size - 8):
        raise ValueError(f"the safetensors header claims {length} bytes, of {size} in the file "
                         f"and {MAX_HEADER} allowed")
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_without_repeats)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"the safetensors header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise ValueError("the safetensors header must be a JSON object, got "
                         f"{type(header).__name__}")
    metadata = header.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise ValueError("__metadata__ of a safetensors file must hold strings only")
    return {name: _entry(name, value) for name, value in header.items()}, metadata, 8 + length


def _without_repeats(pairs):
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice in the safetensors header")
    return found


def _entry(name, value):
    if not (isinstance(value, dict) and value.keys() == {"dtype", "shape", "data_offsets"}):
        raise ValueError(f"{name!r} must have dtype, shape and data_offsets, got {value!r:.100}")
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(shape) <= 32 and len(offsets) == 2):
        raise ValueError(f"{name!r} must have a list of sizes as shape and two data_offsets, "
                         f"got {shape!r:.100} and {offsets!r:.100}")
    if not isinstance(code, str) or (code not in DTYPES and code != "BF16"):
        raise ValueError(f"{name!r} has the dtype {code!r:.20}: known are "
                         f"{', '.join(DTYPES)}, BF16")
    return code, tuple(shape), *offsets


def _are_sizes(value):
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


def _check_layout(entries, available):
    """The arrays must follow each other from 0 to the end of the file."""
    expected = 0
    for name, (code, shape, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        size = math.prod(shape) * np.dtype(DTYPES.get(code, "<u2")).itemsize
        if begin != expected or end - begin != size:
            raise ValueError(f"{name!r} must take the {size} bytes of its shape {shape} from "
                             f"offset {expected}, its data_offsets say {begin} to {end}")
        expected = end
    if expected != available:
        raise ValueError(f"the safetensors header describes {expected} bytes of arrays, "
                         f"the file holds {available}")


def _array(data, code, shape, begin, end):
    if code == "BF16":
        return widened(np.frombuffer(memoryview(data)[begin:end], "<u2")).reshape(shape)
    dtype = np.dtype(DTYPES[code])
    try:
        return np.frombuffer(memoryview(data)[begin:end], dtype).reshape(shape)
    except ValueError:                      # (0, 2**61): empty, and still too large for an index
        raise ValueError(f"no array can have the shape {shape}") from None
