"""Mutations that keep a file's form and break its sense, for fuzz_formats.py.

Bytes changed at random mostly end in a parser's first check. These edit what the parser gives to
the reader: the tree of a JSON text, the opcodes of a pickle, the fields of a protobuf message, and
the numbers of an HDF5 file or a zip archive at the places where their headers keep them.
"""

import copy
import json
import pickletools
import re
import zipfile
from io import BytesIO

from lstmcore.formats import hdf5

NUMBERS = (0, 1, 2, 3, 7, 8, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**62,
           2**63 - 1)
ODD = (None, True, False, 0, -1, 1, 3, 2**31, 2**62, 10**30, 0.5, -1e308, float("nan"), "",
       "x" * 3000, "\ud800", "é\0", "LSTM", "GRU", "RNN", "Stack", "Bidirectional", "concat", [],
       {}, [[]], [0])


def pick(rng, items):
    return items[int(rng.integers(len(items)))]


# ---- JSON ---------------------------------------------------------------------------------------


def json_text(text, rng):
    """The text of a JSON tree of which a few places are removed, doubled, moved or replaced."""
    tree, room = [json.loads(text)], 4 * len(text) + 4096
    for _ in range(int(rng.integers(1, 5))):
        places = list(_places(tree))
        holder, key = pick(rng, places)
        other, there = pick(rng, places)
        kind = rng.integers(8)
        if kind == 0 and holder is not tree:
            del holder[key]
        elif kind == 1 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif kind == 2 and isinstance(holder, dict):
            holder[pick(rng, [k for _, k in places if isinstance(k, str)])] = holder.pop(key)
        elif kind == 3:
            holder[key] = copy.deepcopy(other[there])
        elif kind == 4:
            holder[key] = pick(rng, [[holder[key]], {"a": holder[key]}, str(holder[key]),
                                     [holder[key]] * 2])
        elif kind == 5 and isinstance(holder[key], (int, float)):
            holder[key] = pick(rng, [holder[key] + 1, -holder[key], float(holder[key]), 10**18])
        else:
            holder[key] = copy.deepcopy(pick(rng, ODD))
        if len(json.dumps(tree)) > room:
            break
    made = json.dumps(tree[0])
    if rng.integers(40) == 0:
        depth = int(pick(rng, [40, 900, 30000]))
        made = made.replace("[]", "[" * depth + "]" * depth, 1)
    return made.encode()


def _places(tree):
    """(container, key) of every value below a list or dict."""
    waiting = [tree]
    while waiting:
        holder = waiting.pop()
        for key in (range(len(holder)) if isinstance(holder, list) else list(holder)):
            yield holder, key
            if isinstance(holder[key], (list, dict)):
                waiting.append(holder[key])


# ---- pickles ------------------------------------------------------------------------------------


def pickle_program(program, others, rng):
    """A pickle of which a few opcodes are removed, doubled, moved, exchanged or put in."""
    steps, strange = _steps(program), [step for other in others for step in _steps(other)]
    for _ in range(int(rng.integers(1, 6))):
        at, size = int(rng.integers(len(steps))), int(2 ** rng.uniform(0, 5))
        kind = rng.integers(6)
        if kind == 0:
            del steps[at:at + size]
        elif kind == 1:
            steps[at:at] = steps[at:at + size] * int(rng.integers(1, 4))
        elif kind == 2:
            steps[at] = pick(rng, strange)
        elif kind == 3:
            moved = steps[at:at + size]
            del steps[at:at + size]
            there = int(rng.integers(len(steps) + 1))
            steps[there:there] = moved
        elif kind == 4:
            code = pick(rng, pickletools.opcodes)
            steps.insert(at, code.code.encode("latin-1") + _argument(code, rng))
        elif steps[at][:1] in b"JKMhjqr":               # a number, or a place in the memo
            n = len(steps[at]) - 1
            steps[at] = steps[at][:1] + (pick(rng, NUMBERS) % 256**n).to_bytes(n, "little")
        if len(steps) > 20000 or not steps:
            break
    return b"".join(steps) + b"."


def _steps(program):
    places = [at for _, _, at in pickletools.genops(program)]
    return [program[a:b] for a, b in zip(places, places[1:])]


def _argument(code, rng):
    """Bytes of an argument as an opcode wants it."""
    if code.arg is None:
        return b""
    if code.arg.n > 0:
        return (pick(rng, NUMBERS) % 256**code.arg.n).to_bytes(code.arg.n, "little")
    if code.arg.n == pickletools.UP_TO_NEWLINE:
        return pick(rng, [b"1\n", b"os system\n", b"torch._utils\n_rebuild_tensor_v2\n",
                          b"collections\nOrderedDict\n", b"'a'\n"])
    width = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT8U: 8}.get(
        code.arg.n, 4)
    return (3).to_bytes(width, "little") + b"abc"


# ---- protobuf -----------------------------------------------------------------------------------


def protobuf(message, rng):
    """Change a few fields of a message, wherever they are in it: set, cleared, doubled, moved."""
    for _ in range(int(rng.integers(1, 5))):
        found = list(_messages(message))
        inner = pick(rng, found)
        there = [field for field, _ in inner.ListFields()]
        field = pick(rng, there if there and rng.integers(4) else inner.DESCRIPTOR.fields)
        values = getattr(inner, field.name)
        if field.message_type is not None:
            alike = [m for m in found if m.DESCRIPTOR is field.message_type]
            source = copy.deepcopy(pick(rng, alike)) if alike else None
            if not field.is_repeated:
                inner.ClearField(field.name)
                if source is not None and rng.integers(4):
                    getattr(inner, field.name).CopyFrom(source)
            elif len(values) and rng.integers(2):
                items = [copy.deepcopy(m) for m in values]
                _shuffle(items, rng)
                inner.ClearField(field.name)
                getattr(inner, field.name).extend(items)
            elif source is not None:
                values.append(source)
        elif field.is_repeated:
            items = list(values)
            if items and rng.integers(2):
                _shuffle(items, rng)
            elif items and rng.integers(4):
                items[int(rng.integers(len(items)))] = _scalar(field, found, rng)
            else:
                items.append(_scalar(field, found, rng))
            inner.ClearField(field.name)
            getattr(inner, field.name).extend(items)
        elif rng.integers(6) == 0:
            inner.ClearField(field.name)
        else:
            value = _scalar(field, found, rng)
            if isinstance(value, bytes) and len(values) and rng.integers(2):
                value = values[:int(rng.integers(len(values)))] + value
            setattr(inner, field.name, value)
        if message.ByteSize() > 200000:
            break


def _messages(message):
    yield message
    for field, values in message.ListFields():
        if field.message_type is not None:
            for inner in values if field.is_repeated else [values]:
                yield from _messages(inner)


def _shuffle(items, rng):
    at, there = (int(rng.integers(len(items))) for _ in range(2))
    kind = rng.integers(3)
    if kind == 0:
        del items[at]
    elif kind == 1:
        items.insert(there, copy.deepcopy(items[at]))
    else:
        items[at], items[there] = items[there], items[at]


def _scalar(field, found, rng):
    """A value of a field's kind: an odd one, or one that stands in such a field elsewhere."""
    if field.enum_type is not None:
        return pick(rng, field.enum_type.values).number
    if field.cpp_type == field.CPPTYPE_STRING and field.type == field.TYPE_STRING:
        texts = [text for m in found for f, values in m.ListFields() if f.type == field.TYPE_STRING
                 for text in (values if f.is_repeated else [values])]
        return pick(rng, [*texts, "", "LSTM", "If", "Loop", "Shape", "ConstantOfShape", "Expand",
                          "Gather", "../x", "x" * 300])
    if field.type == field.TYPE_BYTES:
        return pick(rng, [b"", b"\0", b"\xff" * 8, b"reverse", b"bidirectional", b"\0" * 100])
    if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return pick(rng, [0.0, -1.0, 1e30, float("nan"), float("inf")])
    if field.cpp_type == field.CPPTYPE_BOOL:
        return bool(rng.integers(2))
    most = {field.CPPTYPE_INT32: 2**31 - 1, field.CPPTYPE_UINT32: 2**32 - 1}.get(
        field.cpp_type, 2**63 - 1)
    value = min(pick(rng, NUMBERS), most)
    signed = field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_INT64)
    return -value if signed and rng.integers(3) == 0 else value


# ---- numbers at places: HDF5, zip ---------------------------------------------------------------


def fields(data, places, rng):
    """The bytes with a few of the numbers at `places`, (offset, width), set to others."""
    data = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        at, width = pick(rng, places)
        there, _ = pick(rng, places)
        value = int.from_bytes(data[at:at + width], "little")
        value = pick(rng, [pick(rng, NUMBERS), value + 1, value - 1, value + 8, value * 2, there,
                           at, len(data), len(data) - 8,
                           int.from_bytes(data[there:there + width], "little")])
        data[at:at + width] = (value % 256**width).to_bytes(width, "little")
    return bytes(data)


def hdf5_places(data):
    """Where an HDF5 file has the numbers that the reader follows."""
    found = {(at, 8) for at in range(24, 96, 8)} | {(at, 1) for at in range(8, 24)}

    class Recorder(hdf5._Reader):
        def _unpack(self, layout, at, mark=b""):
            place = at + len(mark)
            for count, kind in re.findall(r"(\d*)([BHIQ])", layout):
                for _ in range(int(count or 1)):
                    width = {"B": 1, "H": 2, "I": 4, "Q": 8}[kind]
                    found.add((place, width))
                    place += width
            return super()._unpack(layout, at, mark)

    Recorder(data).node(int.from_bytes(data[64:72], "little"), 0)
    return sorted(found)


ZIP = {b"PK\3\4": (2, 2, 2, 2, 2, 4, 4, 4, 2, 2), b"PK\5\6": (2, 2, 2, 2, 4, 4, 2),
       b"PK\1\2": (2, 2, 2, 2, 2, 2, 4, 4, 4, 2, 2, 2, 2, 2, 4, 4)}


def zip_places(data):
    """Where a zip archive's headers have their numbers."""
    found = []
    for mark, widths in ZIP.items():
        for match in re.finditer(re.escape(mark), data):
            place = match.end()
            for width in widths:
                found.append((place, width))
                place += width
    return [(at, width) for at, width in found if at + width <= len(data)]


def zip_members(data, rng):
    """The archive with a few members removed, renamed, exchanged, doubled, cut or compressed."""
    with zipfile.ZipFile(BytesIO(data)) as archive:
        entries = [[name, archive.read(name), zipfile.ZIP_STORED] for name in archive.namelist()]
    for _ in range(int(rng.integers(1, 4))):
        entry, other = pick(rng, entries), pick(rng, entries)
        kind = rng.integers(6)
        if kind == 0 and len(entries) > 1:
            entries.remove(entry)
        elif kind == 1:
            entry[0] = pick(rng, [other[0], "data.pkl", "x/" + entry[0], "config.json", "", "é",
                                  entry[0].upper(), entry[0] + "/", "constants.pkl"])
        elif kind == 2:
            entry[1], other[1] = other[1], entry[1]
        elif kind == 3:
            entries.insert(int(rng.integers(len(entries))), list(entry))
        elif kind == 4:
            entry[1] = entry[1][:int(rng.integers(len(entry[1]) + 1))]
        else:
            entry[2] = zipfile.ZIP_DEFLATED
    made = BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content, compression in entries:
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return made.getvalue()


# ---- safetensors --------------------------------------------------------------------------------


def safetensors_header(data, rng):
    """The file with another header, whose length is right; perhaps the arrays too few or many."""
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8:8 + length], data[8 + length:]
    tree = json.loads(header)
    own = [key for key in tree.get("__metadata__", {}) if key.startswith("lstmcore.")]
    if own and rng.integers(2):                         # JSON in the JSON
        key = pick(rng, own)
        tree["__metadata__"][key] = json_text(tree["__metadata__"][key], rng).decode()
        header = json.dumps(tree).encode()
    else:
        header = json_text(header, rng)
    if rng.integers(6) == 0:
        rest = rest[:int(rng.integers(len(rest) + 1))] + b"\0" * int(rng.integers(64))
    return len(header).to_bytes(8, "little") + header + rest
