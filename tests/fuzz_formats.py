"""Fuzzing of the file readers: one harness for Hypothesis (test_formats_hostile.py) and atheris.

    python tests/fuzz_formats.py all 60                             an hour, all readers in turn
    python tests/fuzz_formats.py pytorch 10                         minutes, one reader
    python tests/fuzz_formats.py pytorch -max_total_time=600        with atheris installed

A reader may return or raise ValueError. Anything else is a finding: another exception, a crash, a
run of more than 5 s of CPU time, memory beyond ten times the file and 100 MB. Half of the mutants
have bytes changed, half their structure (mutate_structure.py). Checksums are repaired before the
reader sees a mutant, or the zip layer would turn all of them away. Where PyTorch or Keras is
installed, files that they write are seeds too.
"""

import argparse
import collections
import importlib.util
import os
import pathlib
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile

import mutate_structure
import numpy as np

import lstmcore

SECONDS, TIMES, ROOM_MB = 5, 10, 100        # CPU time; memory: TIMES the file and ROOM_MB


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
        return self.bytes(name)

    def bytes(self, name):
        with open(self.path(name), "rb") as file:
            return file.read()

    def made_by(self, framework, name):
        """The bytes of files that a framework writes, named `name` with a number in it."""
        if importlib.util.find_spec(framework) is None:
            return []
        environment = {**os.environ, "KERAS_BACKEND": "torch"}
        script = pathlib.Path(self.folder, "write_seeds.py")
        script.write_text(FRAMEWORKS[framework])
        made = subprocess.run([sys.executable, script], cwd=self.folder, env=environment,
                              capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
        return [self.bytes(entry) for entry in sorted(os.listdir(self.folder))
                if re.fullmatch(name, entry)]

    def more_seeds(self):
        """What is not in `seeds` because it takes a framework."""
        return []

    def beside(self, seed):
        """Put what belongs to a seed beside its mutants."""

    def restructured(self, seed, others, rng):
        """A mutant whose structure is not the seed's."""
        raise NotImplementedError

    def place(self, data):
        with open(self.path(self.name), "wb") as file:
            file.write(data)
        return self.path(self.name)

    def reads(self):
        return [lstmcore.formats.load, lstmcore.formats.read_arrays]

    def attack(self, data):
        """Load the mutant; True if it was accepted."""
        path = self.place(bytes(data))
        accepted = False
        for read in self.reads():
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
        stack = lstmcore.formats.Stack([plain_layer(), lstmcore.LSTM(8, 3, proj_size=2, seed=1)])
        model = lstmcore.LanguageModel(hidden_size=4, num_layers=1, embed_size=2)
        model.fit("abc" * 50, steps=1, progress=False, batch_size=2, seq_length=5,
                  checkpoint=self.path("model.safetensors"))
        return [self.saved("stack.safetensors", stack), self.bytes("model.safetensors"),
                self.saved("seed.safetensors", layer())]

    def restructured(self, seed, others, rng):
        return mutate_structure.safetensors_header(seed, rng)


class Index(Target):
    """The mutant is the index, beside two shards of safetensors and two of PyTorch."""

    name = "mutant.safetensors.index.json"

    def seeds(self):
        arrays, found = layer().state_dict(), []
        names = sorted(arrays)
        for ending, write in (("safetensors", lstmcore.formats.safetensors.write), ("bin", write_pt)):
            places = {name: f"part-{n % 2}.{ending}" for n, name in enumerate(names)}
            for shard in set(places.values()):
                write(self.path(shard), {name: arrays[name] for name in names
                                         if places[name] == shard})
            found.append(b'{"metadata": {"total_size": 1}, "weight_map": {'
                         + ", ".join(f'"{a}": "{b}"' for a, b in places.items()).encode() + b"}}")
        return found

    def restructured(self, seed, others, rng):
        return mutate_structure.json_text(seed, rng)


class PyTorch(Target):
    """The mutant is the pickle, in an archive that holds the storages of the seed."""

    name = "mutant.pt"

    others = {}                             # what stands beside other seeds than the first

    def seeds(self):
        program, self.members = pt_program(layer().parameters())
        return [program, beside_objects(program)]

    def more_seeds(self):
        self.made_by("torch", "")
        self.others = dict.fromkeys(self.seeds(), self.members)
        for entry in sorted(os.listdir(self.folder)):
            if re.fullmatch(r"seed\d\.pt", entry):
                with zipfile.ZipFile(self.path(entry)) as archive:
                    kept = {"archive" + name[name.index("/"):]: archive.read(name)
                            for name in archive.namelist()}
                program = kept.pop("archive/data.pkl")
                self.others[program] = {name: data for name, data in kept.items()
                                        if name.startswith("archive/data/")}
        return list(self.others)[2:]

    def restructured(self, seed, others, rng):
        return mutate_structure.pickle_program(seed, others, rng)

    def beside(self, seed):
        self.members = self.others.get(seed, self.members)

    def place(self, data):
        pack(self.path(self.name), {"archive/data.pkl": data, "archive/byteorder": b"little",
                                    **self.members})
        return self.path(self.name)


class Archive(Target):
    """The mutant is the archive itself."""

    name = "mutant.pt"

    def seeds(self):
        write_pt(self.path("seed.pt"), layer().parameters())
        return [self.bytes("seed.pt")]

    def more_seeds(self):
        return [*self.made_by("torch", r"seed\d\.pt2?"),
                *self.made_by("keras", r"seed\d\.keras")]

    def restructured(self, seed, others, rng):
        if rng.integers(2):
            return mutate_structure.zip_members(seed, rng)
        return mutate_structure.fields(seed, mutate_structure.zip_places(seed), rng)


class HDF5(Target):
    name = "mutant.h5"

    def seeds(self):
        return [self.saved("seed.weights.h5", plain_layer())]

    def more_seeds(self):
        return self.made_by("keras", r"seed\d\.h5")

    def restructured(self, seed, others, rng):
        if seed not in self.places:
            self.places[seed] = mutate_structure.hdf5_places(seed)
        return mutate_structure.fields(seed, self.places[seed], rng)

    places = {}


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

    def more_seeds(self):
        self.made_by("keras", "")
        self.others = dict.fromkeys(self.seeds(), self.weights)
        for entry in sorted(os.listdir(self.folder)):
            if re.fullmatch(r"seed\d\.keras", entry):
                with zipfile.ZipFile(self.path(entry)) as archive:
                    self.others[archive.read("config.json")] = archive.read("model.weights.h5")
        return list(self.others)[1:]

    others = {}

    def restructured(self, seed, others, rng):
        return mutate_structure.json_text(seed, rng)

    def beside(self, seed):
        self.weights = self.others.get(seed, self.weights)

    def place(self, data):
        pack(self.path(self.name), {"config.json": data, "model.weights.h5": self.weights})
        return self.path(self.name)


class ONNX(Target):
    name = "mutant.onnx"

    def seeds(self):
        both = lstmcore.formats.Stack([plain_layer(), lstmcore.LSTM(8, 3, proj_size=2, seed=1)])
        return [self.saved("seed.onnx", layer()), self.saved("scan.onnx", both), self.quantized()]

    def quantized(self):
        """A node of onnxruntime's with weights of 8 bits, its state the same for each sequence."""
        from onnx import TensorProto, helper, numpy_helper
        arrays = {"W": np.ones((1, 3, 16), "i1"), "R": np.ones((1, 4, 16), "i1"),
                  "s": np.ones(1, "f4"), "z": np.zeros(1, "i1"), "h": np.ones((1, 1, 4), "f4"),
                  "one": np.ones(1, "i8")}
        nodes = [helper.make_node("Shape", ["x"], ["b"], start=1, end=2),
                 helper.make_node("Concat", ["one", "b", "one"], ["n"], axis=0),
                 helper.make_node("Expand", ["h", "n"], ["h0"]),
                 helper.make_node("DynamicQuantizeLSTM", [
                     "x", "W", "R", "", "", "h0", "h0", "", "s", "z", "s", "z"], ["y"],
                     domain="com.microsoft", hidden_size=4)]
        return helper.make_model(helper.make_graph(
            nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None, 3])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(a, name) for name, a in arrays.items()])).SerializeToString()

    def more_seeds(self):
        return self.made_by("torch", r"seed\d\.onnx")

    def reads(self):
        return [*super().reads(), self.run]

    def run(self, path):
        """The graph computed, on zeros."""
        graph = lstmcore.formats.onnx.Graph(path)
        kinds = {1: "f4", 6: "i4", 7: "i8", 9: "?", 11: "f8"}
        return graph.run({name: np.zeros(
            [min(max(d.dim_value, 2), 9) for d in value.type.tensor_type.shape.dim][:4],
            kinds.get(value.type.tensor_type.elem_type, "f4"))
            for name, value in graph.inputs.items()})

    def restructured(self, seed, others, rng):
        from lstmcore.formats import onnx_graph
        message = onnx_graph.onnx.ModelProto.FromString(seed)
        mutate_structure.protobuf(message, rng)
        return message.SerializeToString()


TARGETS = {"safetensors": Safetensors, "index": Index, "pytorch": PyTorch, "archive": Archive,
           "hdf5": HDF5, "keras": Keras, "onnx": ONNX}

# What writes seeds into the folder where it runs.
FRAMEWORKS = {"torch": """
import warnings, torch
from torch import nn
warnings.simplefilter("ignore")
class Net(nn.Module):
    def __init__(self, both, layers):
        super().__init__()
        self.embed = nn.Embedding(9, 3)
        self.rnn = nn.LSTM(3, 4, layers, bidirectional=both, batch_first=True)
        self.head = nn.Linear(8 if both else 4, 2)
    def forward(self, x):
        if x.shape[0] > 100:
            return self.head(self.rnn(self.embed(x))[0]) + 1
        return self.head(self.rnn(self.embed(x))[0])
x = torch.zeros(2, 5, dtype=torch.int64)
first, second = Net(False, 1), Net(True, 2)
torch.save({"model": first.state_dict(), "epoch": 3}, "seed0.pt")
torch.save(nn.Sequential(nn.Linear(2, 3), nn.LSTM(3, 4)), "seed1.pt")
torch.jit.save(torch.jit.script(second), "seed2.pt")
torch.save(nn.utils.parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0").state_dict(),
           "seed3.pt")
torch.save(torch.compile(nn.LSTM(3, 4)), "seed4.pt")
torch.save(nn.utils.parametrizations.spectral_norm(nn.LSTM(3, 4), "weight_hh_l0").state_dict(),
           "seed5.pt")
torch.export.save(torch.export.export(first, (x,)), "seed0.pt2")
names = {0: "b", 1: "t"}
for n, model in enumerate((first, second)):
    torch.onnx.export(model, (x,), f"seed{n}.onnx", input_names=["x"], dynamic_axes={"x": names},
                      opset_version=(11, 17)[n], dynamo=False)
torch.onnx.export(torch.jit.script(first), (x,), "seed2.onnx", input_names=["x"], opset_version=14,
                  dynamic_axes={"x": names}, dynamo=False)
try:
    import onnxscript
    torch.onnx.export(second, (x,), "seed3.onnx", dynamo=True, verbose=False, external_data=False)
except ImportError:
    pass
""", "keras": """
import keras
L = keras.layers
def build(n, *layers):
    x = y = keras.Input((None, 3))
    for layer in layers:
        y = layer(y)
    model = keras.Model(x, y) if n % 2 else keras.Sequential([x, *layers])
    model.save(f"seed{n}.keras")
    model.save(f"seed{n}.h5")
build(0, L.Dense(3), L.Bidirectional(L.LSTM(4, return_sequences=True)), L.Dropout(.1), L.LSTM(3))
build(1, L.SimpleRNN(4, return_sequences=True, activation="relu"), L.LSTM(2), L.Dense(1))
build(2, keras.Sequential([keras.Input((None, 3)), L.RNN(L.LSTMCell(4))]), L.Dense(2))
build(3, L.Bidirectional(L.SimpleRNN(2, use_bias=False), merge_mode="sum"))
"""}


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


def mutants(target, seeds, rng):
    """Mutants without end."""
    while True:
        seed = seeds[int(rng.integers(len(seeds)))]
        target.beside(seed)
        yield (mutant(seed, rng, seeds) if rng.integers(2)
               else target.restructured(seed, seeds, rng))


class _Hang(BaseException):
    """A reader that took too long."""


def _raise_hang(*_):
    raise _Hang


def _memory(name):
    """VmRSS or VmHWM of this process, bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(name))


def without_atheris(name, minutes, seed=None):
    """Random mutants until the time is over; returns the number of findings."""
    os.environ["LSTMCORE_NUM_THREADS"] = "1"
    warnings.simplefilter("ignore")
    target, rng = TARGETS[name](tempfile.mkdtemp()), np.random.default_rng(seed)
    seeds = target.seeds()
    seeds += target.more_seeds()
    signal.signal(signal.SIGPROF, _raise_hang)
    begin, count, accepted, slowest, most, found = time.monotonic(), 0, 0, 0.0, 0, {}
    for data in mutants(target, seeds, rng):
        if time.monotonic() - begin > 60 * minutes:
            break
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")                                     # VmHWM begins anew
        before, started, finding = _memory("VmRSS"), time.process_time(), None
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            accepted += target.attack(data)
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            finding = f"{type(error).__name__} {os.path.basename(last.filename)}:{last.lineno}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        slowest = max(slowest, spent := time.process_time() - started)
        most = max(most, grown := _memory("VmHWM") - before)
        if finding is None and spent > SECONDS:
            finding = "slow"
        if finding is None and grown > TIMES * len(data) + (ROOM_MB << 20):
            finding = "memory"
        if finding is not None:
            if finding not in found:
                kept = f"found-{len(found)}-{target.name}"
                shutil.copy(target.path(target.name), kept)
                print(f"{name}: {finding}, see {kept}", flush=True)
            found[finding] = found.get(finding, 0) + 1
            if finding.startswith("KeyboardInterrupt"):
                break
        count += 1
    print(f"{name}: {count} mutants of {len(seeds)} seeds, {accepted} loaded, slowest "
          f"{slowest:.2f} s, most memory {most >> 20} MB, findings {found or 'none'}", flush=True)
    return len(found)


def main():
    if sys.argv[2:] and sys.argv[2].replace(".", "").isdecimal():
        minutes = float(sys.argv[2])
        if sys.argv[1] != "all":
            sys.exit(without_atheris(sys.argv[1], minutes) > 0)
        # A process for each: a crash ends that one, and is a finding.
        codes = {name: subprocess.run([sys.executable, __file__, name, str(minutes / len(TARGETS))]
                                      ).returncode for name in TARGETS}
        print("ended with", codes)
        sys.exit(any(codes.values()))
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
