"""File formats: bytes <-> arrays and descriptions of layers. No layer is known here.

    formats.read(path)              what is in a file, by whatever format it has
    formats.read_arrays(path)       every array of it, by its name there
    formats.writer(path)            the module that writes the format of this ending

Nothing in a file is ever executed, and nothing it claims is believed before it is compared with
the file's real size: a damaged or hostile file is a ValueError that names it. No framework is
imported. ONNX files need the package onnx, and writing a .weights.h5 needs h5py; reading Keras's
files does not.

A format is one module here and one row of FORMATS. The module has `content(path)`, a
`description.Content`, `read_arrays(path)`, and, where lstmcore writes the format too,
`write_module(path, module, **options)`, which asks the module for `describe()` and `parameters()`.
"""

import contextlib
import importlib
import os
import struct
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lstmcore.formats import disk, hdf5, safetensors, shards, state_dict
from lstmcore.formats.archive import Archive

__all__ = ["read", "read_arrays", "state_dict", "writer"]


class Format(NamedTuple):
    """What tells a format, and how it is called."""

    module: str                     # of lstmcore.formats
    name: str                       # as a message calls it
    recognizes: Callable            # of the path, the first bytes, the names in it if it is a zip
    ending: "str | None" = None     # of the files that lstmcore writes in it


FORMATS = (
    Format("shards", "index of shards (.index.json)",
           lambda path, head, members: path.endswith(shards.ENDING)),
    Format("safetensors", "safetensors",
           lambda path, head, members: safetensors.looks_like(head), ".safetensors"),
    Format("onnx", "ONNX (named .onnx)",
           lambda path, head, members: path.endswith(".onnx") and not members
           and head[:8] != hdf5.SIGNATURE,
           ".onnx"),
    Format("keras", "Keras .keras or .h5",
           lambda path, head, members: head[:8] == hdf5.SIGNATURE or "config.json" in members,
           ".weights.h5"),
    Format("pytorch", "PyTorch zip archive",
           lambda path, head, members: head[:4] == b"PK\x03\x04" or head[:1] == b"\x80"),
)
_MOVED = {"Stack": "stack", "load": "files", "save": "files", "convert": "files"}


def read(path):
    """What is in a file: a `description.Content`."""
    with naming(path):
        reader = _reader(path)
        shards.check_whole(path)
        return reader.content(path)


def read_arrays(path, dtype=None):
    """Every array of a file by its name there: tensors, Keras's weights, ONNX's initializers.

    dtype : "float32" or "float64", of all that hold floats; as they are by default

    The arrays may be read-only. Integers and bool come as they are, bfloat16 as float32.
    """
    with naming(path):
        arrays = _reader(path).read_arrays(path)
    if dtype is None:
        return arrays
    if (dtype := np.dtype(dtype)) not in (np.float32, np.float64):
        raise ValueError(f"dtype must be float32 or float64, got {dtype}")
    return {name: a.astype(dtype, copy=False) if a.dtype.kind == "f" else a
            for name, a in arrays.items()}


def writer(path):
    """The module that writes the format which the ending of a path names."""
    name = os.fsdecode(path)
    for row in FORMATS:
        if row.ending and name.endswith(row.ending):
            return importlib.import_module("lstmcore.formats." + row.module)
    endings = [row.ending for row in FORMATS if row.ending]
    raise ValueError(f"path must end in {', '.join(endings)} to say what to write, got {name!r}")


@contextlib.contextmanager
def naming(path):
    """Whatever a reader stumbles over in a file, as a ValueError that names the file."""
    name = os.fsdecode(path)
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError,
            struct.error) as error:
        raise ValueError(f"{name} is damaged or not what it claims to be: {error!r:.200}") from None
    except ValueError as error:
        if str(error).startswith(name):
            raise
        raise ValueError(f"{name}: {error}") from None


def _reader(path):
    """The module that reads a file, told by the file's beginning."""
    name = os.fsdecode(path)
    with disk.opened(path) as file:
        head = file.read(16)
    if head == b"version https://":
        raise ValueError(f"{name} is a pointer of Git LFS, not the file: git lfs pull fetches it")
    members = ()
    if head[:4] == b"PK\x03\x04":
        with Archive(path) as archive:
            members = archive.members
    for row in FORMATS:
        if row.recognizes(name, head, members):
            return importlib.import_module("lstmcore.formats." + row.module)
    raise ValueError(f"{name} is none of: {', '.join(row.name for row in FORMATS)}; it begins with "
                     f"{head[:8]!r}")


def __getattr__(name):
    # What works on layers stands above them, and is known by these names too.
    if name in _MOVED:
        return getattr(importlib.import_module("lstmcore." + _MOVED[name]), name)
    raise AttributeError(f"module 'lstmcore.formats' has no attribute {name!r}")
