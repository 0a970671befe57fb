"""PyTorch's zip archives (.pt, .pth, since 1.6), read without torch and without running anything.

    <root>/data.pkl      a pickle: the dicts, and for each tensor its storage, sizes and strides
    <root>/data/<key>    the bytes of one storage
    <root>/byteorder     "little" or "big"

A pickle is a program for a small stack machine, and Python's own machine lets it call any function.
The one here knows containers, numbers and strings, and the calls that rebuild a tensor; it has no
way to import, call or build anything else, and no way to ask for memory: every count it believes is
bounded by the bytes that are there. Where a pickle asks for any other object, its place is taken by
an `Opaque`, which is nothing but the name of what was asked for.
"""

import math
import pickletools
import re
import reprlib
import warnings

import numpy as np

from lstmcore.formats import disk, state_dict
from lstmcore.formats.archive import Archive
from lstmcore.formats.safetensors import widened

STORAGES = {"torch.DoubleStorage": "f8", "torch.FloatStorage": "f4", "torch.HalfStorage": "f2",
            "torch.BFloat16Storage": "u2", "torch.LongStorage": "i8", "torch.IntStorage": "i4",
            "torch.ShortStorage": "i2", "torch.CharStorage": "i1", "torch.ByteStorage": "u1",
            "torch.BoolStorage": "?"}
MAX_DEPTH = 32
_HOLDS = "_parameters", "_buffers", "_modules"
_KIND = re.compile(r"torch\.nn\.modules\.rnn\.\w+")


def content(path):
    """The recurrent layers in a .pt archive, of a state_dict or of a whole module."""
    arrays, objects, keys, said, kind = _read(path)
    found = state_dict.content(arrays, objects, said)
    if not found.chains:
        there = list(arrays) + [f"{n} ({made_by})" for n, made_by in objects.items()] or keys
        found = found._replace(others=there or ["an empty dict"], hint=(
            f"{kind}save the state_dict() of the model that has one"))
    return found


def read_arrays(path):
    """Every tensor in a .pt archive, under the keys that lead to it joined by dots.

    A state_dict gives its own names, {"model": state_dict} those with "model." before them, and so
    does {"model": module}. Tensors of a kind that is not read (sparse, quantized, ...) are named in
    a warning.
    """
    found, objects = tensors(path)
    warn_of(path, objects)
    return found


def tensors(path):
    """The tensors of a .pt archive by name, and the names of the objects beside them, as `Opaque`."""
    return _read(path)[:2]


def warn_of(path, objects):
    """Say which of the objects are tensors."""
    if left := [name for name, kind in objects.items() if kind.startswith("torch._")]:
        said = ", ".join(f"{name!r:.80} ({objects[name]})" for name in left[:8])
        more = f" and {len(left) - 8} more" * (len(left) > 8)
        warnings.warn(f"{path}: tensors that are not read: {said}{more}", stacklevel=5)


def _read(path):
    """The arrays of a .pt archive by name, its `Opaque` objects by name, its outermost keys, what
    the recurrent modules in it say of themselves, and what else to say of it."""
    with disk.opened(path) as file:
        if file.read(2)[:1] == b"\x80":
            raise ValueError(f"{path} is a plain pickle, which can run any code when it is read: "
                             "save the state_dict with PyTorch 1.6 or later, or as safetensors")
    with Archive(path) as archive:
        root = _root(archive)
        order = "little"
        if root + "byteorder" in archive.members:
            order = archive.read(root + "byteorder").decode("ascii", "replace")
            if order not in ("little", "big"):
                raise ValueError(f"{path}: byteorder must say little or big, got {order!r:.20}")
        program = archive.read(root + "data.pkl")
        kind = "it is a TorchScript archive, " * (root + "constants.pkl" in archive.members)
        result = _Machine(archive, root, "<" if order == "little" else ">").run(program)
    found, said = _leaves(result, len(program))
    arrays = {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
    objects = {name: value for name, value in found.items() if name not in arrays}
    if objects and not arrays:
        kinds = sorted(set(objects.values()))[:8]
        raise ValueError(f"{path} holds no tensors but in objects, which are not built here: "
                         f"{', '.join(kinds)}; save a state_dict instead: "
                         "torch.save(model.state_dict(), path)")
    keys = list(result) if isinstance(result, dict) else [
        str(result) if isinstance(result, Opaque) else type(result).__name__]
    return arrays, objects, keys, said, kind


def _root(archive):
    """The folder that every member of the archive is in, with its slash."""
    roots = [name[:-len("data.pkl")] for name in archive.members
             if name == "data.pkl" or name.endswith("/data.pkl")]
    if any(name.endswith("/archive_format") for name in archive.members):
        raise ValueError(f"{archive.path} is a program of torch.export: save the state_dict() of "
                         "what torch.export.load makes of it")
    if len(roots) != 1:
        raise ValueError(f"{archive.path} must have one member data.pkl, as torch.save writes, "
                         f"got {len(roots)}")
    return roots[0]


def _leaves(root, limit):
    """{name: array or Opaque} of everything below root that is neither container nor plain value.

    A module is a container of its parameters, buffers and modules. What recurrent modules say of
    themselves comes second, {name: options}.

    Containers may be shared, so a small pickle can describe an endless tree: the visits are bounded
    by the pickle's size, `limit`, and so is the length of all names together.
    """
    found, said, letters, waiting = {}, {}, 0, [((), root)]
    while waiting:
        path, value = waiting.pop()
        limit -= 1
        if limit < 0 or len(path) > MAX_DEPTH or letters > 32 * limit + 65536:
            raise ValueError("the .pt file nests its containers without end")
        if isinstance(value, Opaque) and (inside := _inside(value)) is not None:
            if _KIND.fullmatch(value):
                said[".".join(path)] = _said(value.state)
            value = inside
        if isinstance(value, (np.ndarray, Opaque)):
            name = ".".join(path) or "tensor"
            letters += len(name)
            found[name] = value
        elif isinstance(value, dict):
            waiting += [((*path, str(key)), item) for key, item in reversed(value.items())]
        elif isinstance(value, (list, tuple)):
            waiting += [((*path, str(n)), item) for n, item in reversed(list(enumerate(value)))]
    return found, said


def _inside(value):
    """What a torch.nn.Module holds, by name; None of any other object.

    Of a TorchScript module, all attributes are such.
    """
    state = value.state
    if not isinstance(state, dict):
        return None
    if value.startswith("__torch__."):
        return {name: item for name, item in state.items()
                if isinstance(item, (np.ndarray, Opaque))}
    if not all(isinstance(state.get(kind), dict) for kind in _HOLDS):
        return None
    return {name: item for kind in _HOLDS for name, item in state[kind].items()}


def _said(state):
    """The options that the attributes of a recurrent module say."""
    mode = state.get("mode", state.get("nonlinearity"))
    found = {"nonlinearity": {"RNN_TANH": "tanh", "RNN_RELU": "relu"}.get(mode, mode)
             if isinstance(mode, str) else None}
    if isinstance(batch_first := state.get("batch_first"), bool):
        found["batch_first"] = batch_first
    if isinstance(dropout := state.get("dropout"), (int, float)) and 0 <= dropout <= 1:
        found["dropout"] = float(dropout)
    return found


def _short(value):
    """A value for a message: what is nested in it may be the same thing, 2^n times."""
    said = reprlib.Repr()
    said.maxlevel = 2
    return said.repr(value)[:100]


class _Mark:
    """Where the arguments of a container begin on the stack."""


class Opaque(str):
    """The name of a class or function that the pickle mentions, or of what an object is made by.

    It stands for the thing, which is never imported, called or built. What a pickle sets as the
    attributes of an object stays, as `state`; what else it puts into it is dropped.
    """

    state = None


class _Machine:
    """Runs the pickle programs that torch.save writes for tensors in plain containers."""

    CALLS = {"collections.OrderedDict": "_ordered_dict",
             "collections.defaultdict": "_default_dict",
             "torch._utils._rebuild_tensor_v2": "_rebuild_tensor",
             "torch._utils._rebuild_parameter": "_rebuild_parameter",
             "torch._utils._rebuild_parameter_with_state": "_rebuild_parameter",
             "torch._dynamo.eval_frame.OptimizedModule": "_compiled"}
    VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
    LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE",
                "SHORT_BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8",
                "BYTEARRAY8"}
    EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple,
             "EMPTY_SET": lambda: Opaque("set")}

    def __init__(self, archive, root, order):
        self.archive, self.root, self.order = archive, root, order
        self.budget = 0                     # how many items functions may still be given
        self.stack, self.memo, self.storages, self.odd_keys = [], {}, {}, 0

    def run(self, program):
        """The object that the program builds."""
        self.budget = 4 * len(program) + 1024
        try:
            for opcode, argument, _ in pickletools.genops(program):
                if opcode.name == "STOP":
                    break
                self._step(opcode.name, argument)
            if len(self.stack) != 1:
                raise ValueError("the pickle in the .pt file is damaged: it ends with "
                                 f"{len(self.stack)} objects, not one")
        except ValueError:
            raise
        except (IndexError, KeyError, TypeError, AttributeError, UnicodeError, OverflowError,
                RecursionError) as error:
            raise ValueError(f"the pickle in the .pt file is damaged: {error}"[:300]) from None
        return self.stack[0]

    def _step(self, name, argument):
        stack = self.stack
        if name in self.VALUES:
            stack.append(self.VALUES[name])
        elif name in self.LITERALS:
            stack.append(argument)
        elif name in self.EMPTY:
            stack.append(self.EMPTY[name]())
        elif name == "MARK":
            stack.append(_Mark)
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            place = len(self.memo) if argument is None else argument
            if place > self.budget:         # numbers that are chosen well make a dict slow
                raise ValueError(f"the pickle in the .pt file is damaged: it counts to {place}")
            self.memo[place] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            n = int(name[-1])
            stack[-n:] = [tuple(self._plain(stack[-n:], n))]
        elif name == "TUPLE":
            stack.append(tuple(self._from_mark()))
        elif name == "LIST":
            stack.append(self._from_mark())
        elif name == "DICT":
            stack.append(self._pairs(self._from_mark()))
        elif name in ("APPEND", "APPENDS"):
            items = self._from_mark() if name == "APPENDS" else [stack.pop()]
            self._fill(list, items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._from_mark() if name == "SETITEMS" else [stack.pop(), stack.pop()][::-1]
            self._fill(dict, items)
        elif name == "ADDITEMS":
            self._fill(Opaque, self._from_mark())
        elif name == "FROZENSET":
            self._from_mark()
            stack.append(Opaque("frozenset"))
        elif name == "GLOBAL":
            stack.append(Opaque(argument.replace(" ", ".", 1)[:200]))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(Opaque(f"{module:.100}.{attribute:.100}"))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(self._call(function, arguments))
        elif name in ("NEWOBJ", "NEWOBJ_EX"):
            del stack[-1 - (name == "NEWOBJ_EX"):]      # the arguments; their class stays
            self._fill(Opaque, ())
            stack[-1] = Opaque(stack[-1])
        elif name == "BUILD":
            state = stack.pop()             # attributes, of an OrderedDict torch's _metadata
            self._fill(dict, ())
            if isinstance(stack[-1], Opaque):
                stack[-1].state = state
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"the pickle in the .pt file uses {name}, which no state_dict "
                             "needs: save one, torch.save(model.state_dict(), path)")

    def _call(self, function, arguments):
        """What a function gives: a tensor or dict from those that are known, an Opaque else."""
        if not isinstance(function, Opaque):
            raise ValueError("the pickle in the .pt file is damaged: it calls "
                             f"{_short(function)}")
        if function not in self.CALLS:
            return Opaque(function)
        return getattr(self, self.CALLS[function])(*arguments)

    def _from_mark(self):
        """The items above the last mark, taken off the stack with it."""
        for n in range(len(self.stack) - 1, -1, -1):
            if self.stack[n] is _Mark:
                items = self.stack[n + 1:]
                del self.stack[n:]
                return items
        raise ValueError("the pickle in the .pt file is damaged: no mark on its stack")

    def _plain(self, items, n):
        if len(items) != n or _Mark in map(type, items) or any(item is _Mark for item in items):
            raise ValueError("the pickle in the .pt file is damaged: its stack is too short")
        return items

    def _fill(self, kind, items):
        """Put items into the container on top of the stack; an Opaque there swallows them."""
        top = self.stack[-1]
        if not isinstance(top, (kind, Opaque)):
            wanted = "class" if kind is Opaque else kind.__name__
            raise ValueError(f"the pickle in the .pt file treats a {type(top).__name__} as a "
                             f"{wanted}")
        if isinstance(top, list):
            top.extend(items)
        elif isinstance(top, dict):
            top.update(self._pairs(items))

    def _pairs(self, items):
        keys, values = items[::2], items[1::2]
        if len(keys) != len(values):
            raise ValueError("the pickle in the .pt file is damaged: a dict with half a pair")
        return dict(zip(map(self._key, keys), values))

    def _key(self, key):
        # As numbers, keys could be chosen that all fall on one place of the table.
        if isinstance(key, (str, int, float, type(None))):
            return str(key)
        self.odd_keys += 1                  # an optimizer has tensors as keys
        return f"(key {self.odd_keys})"

    def _default_dict(self, factory=None, pairs=()):
        return self._ordered_dict(pairs)

    def _ordered_dict(self, pairs=()):
        self.budget -= len(pairs)
        if self.budget < 0:
            raise ValueError("the .pt file makes dicts of the same items again and again")
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError("the .pt file makes an OrderedDict of something that is no pairs")
        return self._pairs([value for pair in pairs for value in pair])

    def _compiled(self, module, *context):
        """What torch.compile made, as its state_dict names it."""
        return {"_orig_mod": module}

    def _rebuild_parameter(self, tensor, requires_grad=True, hooks=None, state=None):
        if not isinstance(tensor, (np.ndarray, Opaque)):
            raise ValueError("the .pt file makes a parameter of something that is no tensor")
        return tensor

    def _storage(self, identity):
        """The storage ("storage", type, key, device, numel) names, as a flat array."""
        if not (isinstance(identity, tuple) and len(identity) == 5 and identity[0] == "storage"):
            raise ValueError(f"the .pt file refers to {_short(identity)}, not to a storage")
        _, kind, key, _, numel = identity
        if not isinstance(kind, Opaque):
            raise ValueError(f"the .pt file has a storage of the type {_short(kind)}, no class")
        if kind not in STORAGES:
            return kind
        if not isinstance(key, str):
            raise ValueError(f"the key of a storage must be a string, got {_short(key)}")
        if key not in self.storages:
            dtype = np.dtype(STORAGES[kind])
            data = self.archive.read(f"{self.root}data/{key}")
            if type(numel) is not int or numel * dtype.itemsize != len(data):
                raise ValueError(f"the storage {key!r:.100} claims {_short(numel)} numbers of "
                                 f"{dtype.itemsize} bytes, the archive holds {len(data)} bytes")
            stored = np.frombuffer(data, dtype.newbyteorder(self.order))
            stored = stored if stored.dtype.isnative else stored.astype(dtype)
            self.storages[key] = kind, widened(stored) if "BFloat16" in kind else stored
        found, stored = self.storages[key]
        if found != kind:
            raise ValueError(f"the storage {key!r:.100} is used as {found} and as {kind}")
        return stored

    def _rebuild_tensor(self, storage, offset, shape, strides, requires_grad=False, hooks=None,
                        metadata=None):
        """A view into a storage; it may not repeat elements, nor reach out of the storage."""
        if isinstance(storage, Opaque):
            return Opaque(f"torch._utils._rebuild_tensor_v2 of {storage}"[:200])
        if not isinstance(storage, np.ndarray) or storage.ndim != 1:
            raise ValueError("the .pt file makes a tensor of something that is no storage")
        sizes = (offset, *shape, *strides)
        if len(shape) != len(strides) or len(shape) > 32 or \
                not all(type(n) is int and 0 <= n < 1 << 40 for n in sizes):
            raise ValueError(f"a tensor of the .pt file has offset {_short(offset)}, shape "
                             f"{_short(shape)} and strides {_short(strides)}")
        count = math.prod(shape)
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides)) if count else 0
        if count > storage.size or last >= max(storage.size, 1):
            raise ValueError(f"a tensor of shape {shape} with strides {strides} at {offset} does "
                             f"not fit its storage of {storage.size} numbers")
        if not count:
            return np.zeros(shape, storage.dtype)
        return np.lib.stride_tricks.as_strided(
            storage[offset:], shape, [n * storage.itemsize for n in strides], writeable=False)
