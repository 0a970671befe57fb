"""Fuzzing of the file readers: one harness for Hypothesis (test_formats_hostile.py) and atheris.

    python tests/fuzz_formats.py pytorch -max_total_time=600        with atheris installed
    python tests/fuzz_formats.py pytorch 10                         minutes, without it

A reader may return or raise ValueError. Anything else is a finding: another exception, a crash, a
run longer than the limit, memory beyond it. Checksums are repaired before the reader sees a mutant,
or the zip layer would turn all of them away.
"""

import argparse
import collections
import os
import pathlib
import pickle
import re
import resource
import sys
import tempfile
import time
import warnings
import zipfile

import numpy as np

import lstmcore


def pack(path, members):
    """An uncompressed zip archive with right checksums."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def write_pt(path, tensors, changed=None):
    """A .pt archive as torch.save writes it, from arrays by name; `changed` edits the pickle."""
    program, members = pt_program(tensors)
    program = changed(program) if changed else program
    pack(path, {"archive/data.pkl": program, "archive/byteorder": b"little", **members})


def pt_program(tensors):
    """The pickle and the storages of a state_dict of float32 or float64 arrays."""
    kinds = {"f4": b"FloatStorage", "f8": b"DoubleStorage"}
    program, members = b"\x80\x02ccollections\nOrderedDict\n)R(", {}
    for n, (name, a) in enumerate(tensors.items()):
        a = np.ascontiguousarray(a)
        members[f"archive/data/{n}"] = a.tobytes()
        strides = [s // a.itemsize for s in a.strides]
        program += (text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage")
                    + b"ctorch\n" + kinds[a.dtype.str[1:]] + b"\n" + text(str(n)) + text("cpu")
                    + number(a.size) + b"tQK\0" + sizes(a.shape) + sizes(strides)
                    + b"\x89ccollections\nOrderedDict\n)RtR")
    return program + b"u.", members


def beside_objects(program):
    """A pickle of {"model": what that pickle makes, "objects": some that no reader should make}."""
    objects = pickle.dumps([argparse.Namespace(a={1}, b=b"2"), pathlib.PurePath("c"), 4j,
                            collections.defaultdict(int, d=frozenset([5]))], protocol=4)
    return (b"\x80\x04}(" + text("model") + program[:-1] + text("objects") + objects[:-1] + b"u.")


def text(value):
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def number(value):
    return b"J" + value.to_bytes(4, "little", signed=True)


def sizes(values):
    return b"(" + b"".join(number(int(n)) for n in values) + b"t"


def layer():
    """What the seeds hold."""
    return lstmcore.LSTM(3, 4, num_layers=2, bidirectional=True, peepholes=True, seed=0)


def plain_layer():
    return lstmcore.LSTM(3, 4, num_layers=2, bidirectional=True, seed=0)


class Target:
    """A reader under attack: `seeds` (bytes) and `place` (bytes -> path of a file to load)."""

    def __init__(self, folder):
        self.folder = folder

    def path(self, name):
        return os.path.join(self.folder, name)

    def saved(self, name, module):
        module.save(self.path(name))
        with open(self.path(name), "rb") as file:
            return file.read()

    def place(self, data):
        with open(self.path(self.name), "wb") as file:
            file.write(data)
        return self.path(self.name)

    def attack(self, data):
        """Load the mutant; True if it was accepted."""
        path = self.place(bytes(data))
        accepted = False
        for read in (lstmcore.formats.load, lstmcore.formats.read_arrays):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    read(path)
                accepted = True
            except ValueError:
                pass
        return accepted


class Safetensors(Target):
    name = "mutant.safetensors"

    def seeds(self):
        return [self.saved("seed.safetensors", layer())]


class PyTorch(Target):
    """The mutant is the pickle, in an archive that holds the storages of the seed."""

    name = "mutant.pt"

    def seeds(self):
        program, self.members = pt_program(layer().parameters())
        return [program, beside_objects(program)]

    def place(self, data):
        pack(self.path(self.name), {"archive/data.pkl": data, "archive/byteorder": b"little",
                                    **self.members})
        return self.path(self.name)


class Archive(Target):
    """The mutant is the archive itself."""

    name = "mutant.pt"

    def seeds(self):
        write_pt(self.path("seed.pt"), layer().parameters())
        with open(self.path("seed.pt"), "rb") as file:
            return [file.read()]


class HDF5(Target):
    name = "mutant.h5"

    def seeds(self):
        return [self.saved("seed.weights.h5", plain_layer())]


class Keras(Target):
    """The mutant is the configuration, beside the weights of the seed."""

    name = "mutant.keras"

    def seeds(self):
        self.weights = self.saved("seed.weights.h5", plain_layer())
        return [b'{"class_name": "Sequential", "config": {"layers": [{'
                b'"class_name": "Bidirectional",'
                b' "config": {"name": "bidirectional", "merge_mode": "concat", "layer": {'
                b'"class_name": "LSTM", "config": {"return_sequences": true, "activation": "tanh",'
                b'"recurrent_activation": "sigmoid"}}}, "inbound_nodes": [[["x", 0, 0, {}]]]}]}}']

    def place(self, data):
        pack(self.path(self.name), {"config.json": data, "model.weights.h5": self.weights})
        return self.path(self.name)


class ONNX(Target):
    name = "mutant.onnx"

    def seeds(self):
        both = lstmcore.formats.Stack([plain_layer(), lstmcore.LSTM(8, 3, proj_size=2, seed=1)])
        return [self.saved("seed.onnx", layer()), self.saved("scan.onnx", both)]


TARGETS = {"safetensors": Safetensors, "pytorch": PyTorch, "archive": Archive, "hdf5": HDF5,
           "keras": Keras, "onnx": ONNX}


def mutant(seed, rng, others):
    """A seed with a few bytes, numbers or runs of bytes changed, moved, doubled or taken out."""
    data = bytearray(seed)
    for _ in range(int(rng.integers(1, 9))):
        at, size = int(rng.integers(len(data) + 1)), int(2 ** rng.uniform(0, 7))
        kind = rng.integers(6)
        if kind == 0 and at < len(data):
            data[at] = int(rng.integers(256))
        elif kind == 1:
            data[at:at + size] = b""
        elif kind == 2:
            data[at:at] = data[at:at + size] * int(rng.integers(1, 4))
        elif kind == 3:
            other = others[int(rng.integers(len(others)))]
            start = int(rng.integers(len(other)))
            data[at:at + size] = other[start:start + size]
        elif kind == 4:
            width = int(rng.choice([1, 2, 4, 8]))
            value = int(rng.choice([0, 1, 127, 128, 255, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**62]))
            data[at:at + width] = (value % 256**width).to_bytes(width, "little")
        elif found := [m.span() for m in re.finditer(rb"\d+", bytes(data[:4096]))]:
            start, end = found[int(rng.integers(len(found)))]
            data[start:end] = str(int(2 ** rng.uniform(0, 63))).encode()
    return bytes(data)


def without_atheris(name, minutes):
    """Random mutants until the time is over: another exception ends it, a slow one is told."""
    target, rng = TARGETS[name](tempfile.mkdtemp()), np.random.default_rng()
    seeds, begin, count, accepted, slowest = target.seeds(), time.monotonic(), 0, 0, 0.0
    while time.monotonic() - begin < 60 * minutes:
        data = mutant(seeds[int(rng.integers(len(seeds)))], rng, seeds)
        started = time.monotonic()
        try:
            accepted += target.attack(data)
        except BaseException:
            with open(f"found-{name}", "wb") as file:
                file.write(data)
            raise
        count, slowest = count + 1, max(slowest, time.monotonic() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{name}: {count} mutants, {accepted} loaded, slowest {slowest:.2f} s, peak {peak} MB")


def main():
    if sys.argv[2:] and sys.argv[2].replace(".", "").isdecimal():
        return without_atheris(sys.argv[1], float(sys.argv[2]))
    import atheris
    with atheris.instrument_imports(include=["lstmcore.formats"]):
        from lstmcore.formats import keras, onnx, pytorch       # noqa: F401
    target = TARGETS[sys.argv[1]](tempfile.mkdtemp())
    corpus = tempfile.mkdtemp()
    for n, seed in enumerate(target.seeds()):
        assert target.attack(seed), "the seed itself must load"
        with open(os.path.join(corpus, str(n)), "wb") as file:
            file.write(seed)
    atheris.Setup([sys.argv[0], *sys.argv[2:], "-timeout=10", "-rss_limit_mb=2048", corpus],
                  lambda data: target.attack(data) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
