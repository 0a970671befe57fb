"""The part of HDF5 that Keras writes, read without the HDF5 library.

Keras stores groups, contiguous arrays and attributes of numbers and strings, in HDF5's classic
layout (superblock 0, object headers 1, groups as B-trees of symbol tables). That is what is read
here; chunks, compression, links to other files and the layouts since HDF5 1.8 are refused by name.
The library itself is not used because damaged files hang it: copies of a 36 KB Keras file with 1 to
16 random bytes changed were read with h5py 3.16 (HDF5 2.0), and each of three runs met, within its
first 4000, one that it was still busy with after 100 seconds.

Every address in the file is checked before it is followed, no object is entered twice, and all that
is read together may not exceed a few times the size of the file, so time and memory are bounded.
"""

import math
import struct
from typing import NamedTuple

import numpy as np

from lstmcore.formats.safetensors import widened

SIGNATURE = b"\x89HDF\r\n\x1a\n"
UNDEFINED = (1 << 64) - 1
MAX_DEPTH = 32
_CLASSES = ("integer", "float", "time", "string", "bitfield", "opaque", "compound", "reference",
            "enumeration", "variable-length", "array")
_REFUSED = {0x02: "the links of HDF5 1.8", 0x06: "the links of HDF5 1.8", 0x07: "external files",
            0x0B: "compression", 0x15: "the attributes of HDF5 1.8"}


class Node(NamedTuple):
    """A group (members) or a dataset (array), and its attributes."""

    attributes: dict
    members: "dict | None"
    array: "np.ndarray | None"


def read(data):
    """The root group of the HDF5 file that these bytes are; arrays are views of the bytes."""
    if data[:8] != SIGNATURE:
        raise ValueError("not an HDF5 file")
    if len(data) < 96 or data[8] != 0 or data[13:15] != b"\x08\x08":
        raise ValueError("the HDF5 file has not the classic layout (superblock 0, 8-byte offsets) "
                         "that Keras writes")
    try:
        return _Reader(data).node(struct.unpack_from("<Q", data, 64)[0], 0)
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"the HDF5 file is damaged: {error}") from None


class _Reader:
    def __init__(self, data):
        self.data, self.budget = data, 4 * len(data) + 65536
        self.entered, self.heaps = set(), {}

    def node(self, address, depth):
        """The group or dataset whose object header stands at this address."""
        if depth > MAX_DEPTH:
            raise ValueError("the HDF5 file nests its groups without end")
        attributes, found = {}, {}
        for kind, at, size in self._messages(address):
            if kind == 0x0C:
                name, value = self._attribute(at, size)
                attributes[name] = value
            elif kind in _REFUSED:
                raise ValueError(f"the HDF5 file uses {_REFUSED[kind]}, which is not read here")
            else:
                found[kind] = at, size
        if 0x11 in found:
            return Node(attributes, self._members(found[0x11][0], depth), None)
        if found.keys() >= {0x01, 0x03, 0x08}:
            array = self._dataset(*(found[k] for k in (0x01, 0x03, 0x08)))
            if array.dtype.kind == "V":                 # what Keras marks is bfloat16's 16 bits
                if attributes.get("dtype") != "bfloat16":
                    raise ValueError("the HDF5 file has opaque values, which are not read here")
                array = widened(array.view("<u2"))
            return Node(attributes, None, array)
        raise ValueError("the HDF5 file has an object that is neither a group nor an array")

    def _unpack(self, layout, at, mark=b""):
        """Numbers at an address, after its signature if it has one; paid from the budget."""
        size = struct.calcsize(layout) + len(mark)
        self._take(at, size)
        if self.data[at:at + len(mark)] != mark:
            raise ValueError(f"the HDF5 file is damaged: no {mark.decode()} at {at}")
        return struct.unpack_from(layout, self.data, at + len(mark))

    def _take(self, at, size):
        self.budget -= size
        if at + size > len(self.data):
            raise ValueError(f"the HDF5 file is damaged: it points to {size} bytes at {at}, of "
                             f"{len(self.data)}")
        if self.budget < 0:
            raise ValueError("the HDF5 file is damaged: it reads the same bytes again and again")

    def _enter(self, address):
        if address in self.entered:
            raise ValueError(f"the HDF5 file has two links to the object at {address}")
        self.entered.add(address)

    def _messages(self, address):
        """(type, address, size) of every message of an object header, version 1."""
        self._enter(address)
        version, _, count, _, size = self._unpack("<BBHII", address)
        if version != 1:
            raise ValueError(f"the HDF5 file has an object header of version {version}, not 1")
        blocks = [(address + 16, size)]
        while blocks:
            at, size = blocks.pop(0)
            end = at + size
            while at + 8 <= end and count:
                kind, size, flags = self._unpack("<HHB", at)
                self._take(at + 8, size)
                count -= 1
                if at + 8 + size > end:
                    raise ValueError("the HDF5 file is damaged: a message leaves its object header")
                if kind == 0x10:
                    block = self._unpack("<QQ", at + 8)
                    self._enter(block[0])
                    blocks.append(block)
                elif flags & 2:
                    raise ValueError("the HDF5 file uses shared messages, which are not read here")
                elif kind:
                    yield kind, at + 8, size
                at += 8 + size

    def _members(self, at, depth):
        """A group's members: the B-tree's leaves list names, in a heap, and object headers."""
        tree, heap = self._unpack("<QQ", at)
        _, size, _, names = self._unpack("<IQQQ", heap, b"HEAP")
        self._take(names, size)
        members, waiting = {}, [tree]
        while waiting:
            at = waiting.pop()
            self._enter(at)
            if self.data[at:at + 4] == b"SNOD":
                _, _, count = self._unpack("<BBH", at, b"SNOD")
                for n in range(count):
                    offset, header, cache = self._unpack("<QQI", at + 8 + 40 * n)
                    if cache == 2 or header == UNDEFINED:
                        raise ValueError("the HDF5 file uses soft links, which are not read here")
                    name = self._text(names + offset, names + size)
                    if name in members:
                        raise ValueError(f"the HDF5 file has two members {name!r:.100}")
                    members[name] = self.node(header, depth + 1)
            else:
                kind, _, count, _, _ = self._unpack("<BBHQQ", at, b"TREE")
                if kind != 0:
                    raise ValueError("the HDF5 file is damaged: a group without a tree of names")
                waiting += [self._unpack("<Q", at + 32 + 16 * n)[0] for n in range(count)][::-1]
        return members

    def _text(self, at, end):
        stop = self.data.find(b"\0", at, end)
        if stop < 0 or stop - at > 1024:
            raise ValueError("the HDF5 file is damaged: a name without end")
        self._take(at, stop - at)
        return self.data[at:stop].decode("utf-8")

    def _dataset(self, space, datatype, layout):
        shape, dtype = self._shape(*space), self._dtype(datatype[0])
        if dtype is None:
            raise ValueError("the HDF5 file has a dataset of strings, where Keras has numbers")
        version, kind = self._unpack("<BB", layout[0])
        if version != 3 or kind not in (0, 1):
            raise ValueError("the HDF5 file has a dataset in chunks, or in a layout that Keras "
                             "does not write")
        if kind == 1:
            at, size = self._unpack("<QQ", layout[0] + 2)
        else:
            (size,), at = self._unpack("<H", layout[0] + 2), layout[0] + 4
        return self._numbers(at, size, shape, dtype)

    def _numbers(self, at, size, shape, dtype):
        needed = math.prod(shape) * dtype.itemsize
        if needed > size:
            raise ValueError(f"the HDF5 file has an array of shape {shape} in {size} bytes")
        if not needed:
            return np.zeros([min(n, len(self.data)) for n in shape], dtype)
        self._take(at, needed)
        return np.frombuffer(self.data, dtype, math.prod(shape), at).reshape(shape)

    def _shape(self, at, size):
        version, rank, flags, kind = self._unpack("<BBBB", at)
        if version not in (1, 2) or rank > 32:
            raise ValueError(f"the HDF5 file is damaged: dataspace {version} of rank {rank}")
        if version == 2 and kind == 2:
            return (0,)
        return self._unpack(f"<{rank}Q", at + (8 if version == 1 else 4))

    def _dtype(self, at):
        """The numpy dtype of numbers and fixed strings; None for variable strings."""
        kind, bits, _, _, size = self._unpack("<BBBBI", at)
        name = _CLASSES[kind & 15] if kind & 15 < len(_CLASSES) else f"class {kind & 15}"
        order = "<>"[bits & 1]
        if name == "integer" and size in (1, 2, 4, 8):
            return np.dtype(f"{order}{'i' if bits & 8 else 'u'}{size}")
        if name == "float" and size in (2, 4, 8):
            layout = self._unpack("<HHBBBBI", at + 8)
            ieee = {2: (0, 16, 10, 5, 0, 10, 15), 4: (0, 32, 23, 8, 0, 23, 127),
                    8: (0, 64, 52, 11, 0, 52, 1023)}
            if layout != ieee[size]:
                raise ValueError(f"the HDF5 file has floats that are not IEEE's: {layout}")
            return np.dtype(f"{order}f{size}")
        if name == "string" and 0 < size <= len(self.data):
            return np.dtype(f"S{size}")
        if name == "variable-length" and bits & 15 == 1:
            return None
        if name == "opaque" and size == 2:
            return np.dtype("V2")
        if name == "enumeration" and size == 1:         # h5py's bool
            return np.dtype("u1")
        raise ValueError(f"the HDF5 file has values of the kind {name}, {size} bytes, which are "
                         "not read here")

    def _attribute(self, at, size):
        """Name and value: a str, a list of str, or an array."""
        version, _, *sizes = self._unpack("<BBHHH", at)
        if version not in (1, 2, 3):
            raise ValueError(f"the HDF5 file has an attribute of version {version}")
        start = at + 8 + (version == 3)
        places = []
        for length in sizes:
            places.append((start, length))
            start += length + (-length % 8 if version == 1 else 0)
        if start > at + size:
            raise ValueError("the HDF5 file is damaged: an attribute leaves its message")
        name = self._text(places[0][0], places[0][0] + places[0][1])
        dtype, shape = self._dtype(places[1][0]), self._shape(*places[2])
        room = at + size - start
        if dtype is None:
            if math.prod(shape) * 16 > room:
                raise ValueError("the HDF5 file is damaged: an attribute leaves its message")
            value = [self._heap_text(start + 16 * n) for n in range(math.prod(shape))]
        else:
            value = self._numbers(start, room, shape, dtype)
            if dtype.kind != "S":
                return name, value
            value = [text.decode("utf-8") for text in value.ravel().tolist()]
        return name, value if shape else value[0]

    def _heap_text(self, at):
        """A variable-length string: its length, and its place in the global heap."""
        length, address, index = self._unpack("<IQI", at)
        if not length:
            return ""
        if address not in self.heaps:
            self.heaps[address] = self._heap(address)
        start, size = self.heaps[address].get(index, (0, 0))
        if length > size:
            raise ValueError("the HDF5 file is damaged: a string leaves the heap")
        self._take(start, length)
        return self.data[start:start + length].rstrip(b"\0").decode("utf-8")

    def _heap(self, address):
        _, size = self._unpack("<IQ", address, b"GCOL")
        at, end, found = address + 16, address + size, {}
        while at + 16 <= end:
            index, _, _, length = self._unpack("<HHIQ", at)
            if index == 0:
                break
            found[index] = at + 16, length
            at += 16 + length + -length % 8
        return found
