"""Hostile files: a clear ValueError, in bounded time and memory, and nothing executed."""

import json
import pickle
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
from fuzz_formats import (TARGETS, beside_objects, layer, number, pack, pt_program, text,
                          write_pt)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lstmcore
from lstmcore import formats
from lstmcore.formats import hdf5, safetensors

NEEDS = {"hdf5": "h5py", "keras": "h5py", "onnx": "onnx"}       # to write the seeds
INTERESTING = [0, 1, 0x7F, 0x80, 0xFF]


@pytest.fixture(scope="module", params=TARGETS)
def target(request, tmp_path_factory):
    pytest.importorskip(NEEDS.get(request.param, "numpy"))
    made = TARGETS[request.param](tmp_path_factory.mktemp(request.param))
    made.all = made.seeds()
    made.seed = made.all[-1]
    assert made.attack(made.seed)
    return made


# One mutant: up to 8 bytes set, then perhaps a piece cut out, then perhaps an end cut off.
PLACE = st.floats(0, 1, exclude_max=True)
EDITS = st.lists(st.tuples(PLACE, st.sampled_from(INTERESTING) | st.integers(0, 255)), max_size=8)
CUTS = st.none() | st.tuples(PLACE, PLACE)


@settings(max_examples=150, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(edits=EDITS, cut=CUTS, end=st.none() | PLACE)
def test_mutants_are_read_or_refused(target, edits, cut, end):
    data = bytearray(target.seed)
    for place, value in edits:
        data[int(place * len(data))] = value
    if cut:
        first, last = sorted(int(p * len(data)) for p in cut)
        del data[first:last]
    if end is not None:
        del data[int(end * len(data)):]
    target.attack(data)         # anything but ValueError comes through


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_files_of_another_structure_are_read_or_refused(target):
    """Opcodes, fields, trees and members changed, with seeds that need no framework."""
    rng, accepted, begin = np.random.default_rng(0), [], time.process_time()
    for n in range(300):
        seed = target.all[n % len(target.all)]
        target.beside(seed)
        accepted.append(target.attack(target.restructured(seed, target.all, rng)))
    assert any(accepted) and time.process_time() - begin < 60
    target.beside(target.seed)


@settings(max_examples=50, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=st.binary(max_size=400))
def test_noise_is_refused(target, noise):
    target.attack(noise)
    target.attack(target.seed[:60] + noise)


def test_every_truncation_is_refused_in_little_time_and_memory(target):
    size = len(target.seed)
    tracemalloc.start()
    begin = time.process_time()
    for length in range(0, size, max(1, size // 80)):
        target.attack(target.seed[:length])
    peak, spent = tracemalloc.get_traced_memory()[1], time.process_time() - begin
    tracemalloc.stop()
    assert peak < 64 * size + (4 << 20)         # parsed JSON, protobuf and names take their toll
    assert spent < 20


def refused(path, message, limit=4 << 20):
    """load and read_arrays raise ValueError with the message, within `limit` bytes of memory."""
    tracemalloc.start()
    try:
        for read in (lstmcore.load, formats.read_arrays):
            with pytest.raises(ValueError, match=message):
                read(path)
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def header(path, entries, data=b"", length=None):
    made = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(made) if length is None else length) + made + data)
    return path


def entry(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("message, entries, data, length", [
    ("claims 9000000000000000000 bytes|none of", {}, b"", 9 * 10**18),
    ("claims 5000 bytes", {}, b"", 5000),
    ("must take the 40000000000 bytes", {"a": entry([10**10], [0, 8])}, b"\0" * 8, None),
    ("must take the 0 bytes", {"a": entry([0, 2**61], [0, 8])}, b"\0" * 8, None),
    ("from offset 8", {"a": entry([2], [0, 8]), "b": entry([2], [4, 12])}, b"\0" * 12, None),
    ("from offset 0", {"a": entry([2], [4, 12])}, b"\0" * 12, None),
    ("the file holds 12", {"a": entry([2], [0, 8])}, b"\0" * 12, None),
    ("two data_offsets", {"a": entry([-1], [0, 8])}, b"\0" * 8, None),
    ("two data_offsets", {"a": entry([True], [0, 4])}, b"\0" * 4, None),
    ("two data_offsets", {"a": entry([1] * 99, [0, 4])}, b"\0" * 4, None),
    ("the dtype 'F8'", {"a": entry([4], [0, 4], "F8")}, b"\0" * 4, None),
    ("appears twice", b'{"a": {}, "a": {}}', b"", None),
    ("not JSON", b"{" * 100, b"", None),
    ("not JSON", b'{"a":' + b"[" * 100000, b"", None),
    ("not JSON", b'{"\xff": 1}', b"", None),
    ("strings only", {"__metadata__": {"a": 1}}, b"", None),
    ("must have dtype, shape", {"a": 3}, b"", None)])
def test_lying_safetensors(tmp_path, message, entries, data, length):
    refused(header(tmp_path / "m.safetensors", entries, data, length), message)


def test_own_metadata_cannot_ask_for_memory(tmp_path):
    path = tmp_path / "m.safetensors"
    arrays = {"weight_ih_l0": np.ones((8, 2), "f4"), "weight_hh_l0": np.ones((8, 2), "f4")}
    for said in ('{"class": "LSTM", "hidden_size": 1000000000}', "[" * 100000, "[]", "{}",
                 '{"class": "LSTM", "dropout": "x"}', '{"class": "Stack", "layers": 3}',
                 '{"class": "Stack", "layers": []}', '{"class": "LSTM", "dropout": 7}'):
        safetensors.write(path, arrays, {"lstmcore.layer": said})
        with pytest.raises(ValueError):
            lstmcore.load(path)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_execute_nothing(tmp_path, protocol):
    witness = tmp_path / "executed"
    pack(tmp_path / "m.pt", {"a/data.pkl": pickle.dumps({"w": Evil(witness)}, protocol)})
    refused(tmp_path / "m.pt", r"not built here: \w*io.open; save a state_dict")
    assert not witness.exists()
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"w": Evil(witness)}, protocol))
    refused(tmp_path / "plain.pt", "plain pickle")
    assert not witness.exists()


OPEN = b"\x80\x02"


@pytest.mark.parametrize("message, program", [
    ("not built here: os.system; save", b"cos\nsystem\n" + text("true") + b"\x85R."),
    ("not built here: torch._utils._rebuild_tensor_v2.x",
     b"ctorch._utils\n_rebuild_tensor_v2.x\n)R."),
    ("not built here: os.system", b"cos\nsystem\n)\x81."),                # NEWOBJ
    ("not built here: os.system", b"cos\nsystem\n)}\x92."),              # NEWOBJ_EX
    ("not built here: os.system", b"cos\nsystem\n}b."),                  # BUILD
    ("not built here: os.system", text("os") + text("system") + b"\x93)R."),
    ("not built here: os.system", b"cos\nsystem\n)R)R."),                # call what it returned
    ("uses INST.*save one", b"(ios\nsystem\n."), ("uses OBJ", b"(cos\nsystem\no."),
    ("uses EXT1", b"\x82\x01."), ("uses DUP", b"}2."), ("uses POP", b"}0."),
    ("it calls 'os.system'", text("os.system") + b")R."), ("it calls", b"})R."),
    ("as a dict", b"]}b."), ("list as a class", b"])\x81."), ("list as a class", b"](K\1\x90."),
    ("damaged", b")\x81."), ("damaged", b"K\1\x91."),
    ("damaged", b"R."), ("damaged", b"h\x07."), ("damaged", b"t."), ("damaged", b"."),
    ("damaged|expected", b"j\xff\xff\xff\xff."), ("expected", b"X\xff\xff\xff\x7fabc."),
    ("no tensor|no storage|damaged", b"ctorch._utils\n_rebuild_tensor_v2\n)R."),
    ("no storage", b"ctorch._utils\n_rebuild_tensor_v2\n(}K\0))\x89)tR."),
    ("not to a storage", b"K\x01Q."),
    ("half a pair", b"}(K\1u."),
    ("nests", b"]q\0h\0a."),                                        # a list in itself
    ("nests", b")" + b"q\0h\0\x86" * 30 + b"."),                    # a pair of pairs of pairs ...
    ("no pairs|damaged", b"ccollections\nOrderedDict\n]K\1a\x85R.")])
def test_hostile_pickle_programs(tmp_path, message, program):
    pack(tmp_path / "m.pt", {"a/data.pkl": OPEN + program})
    begin = time.perf_counter()
    refused(tmp_path / "m.pt", message)
    assert time.perf_counter() - begin < 5


@pytest.mark.parametrize("message, old, new", [
    ("does not fit its storage", number(16) + number(3) + b"t", number(10**9) + number(3) + b"t"),
    ("does not fit its storage", number(3) + number(1) + b"t", number(10**6) + number(1) + b"t"),
    ("does not fit its storage", number(3) + number(1) + b"t", number(3) + number(9) + b"t"),
    ("and strides", number(3) + number(1) + b"t", number(-3) + number(1) + b"t"),
    ("claims 12345 numbers", number(48) + b"tQ", number(12345) + b"tQ"),
    ("_rebuild_tensor_v2 of torch.EvilyStorage", b"ctorch\nFloatStorage",
     b"ctorch\nEvilyStorage"),
    ("type 'torch.FloatStorage', no class", b"ctorch\nFloatStorage\n",
     text("torch.FloatStorage")),
    ("'archive/data/../x' is missing", text("0") + text("cpu"), text("../x") + text("cpu"))])
def test_lying_tensors(tmp_path, message, old, new):
    arrays = {"weight_ih_l0": np.ones((16, 3), "float32")}
    assert old in pt_program(arrays)[0]
    write_pt(tmp_path / "m.pt", arrays, lambda program: program.replace(old, new))
    refused(tmp_path / "m.pt", message)


def test_objects_beside_a_state_dict_do_no_harm(tmp_path):
    program, members = pt_program(layer().state_dict())
    pack(tmp_path / "m.pt", {"archive/data.pkl": beside_objects(program), **members})
    assert lstmcore.load(tmp_path / "m.pt").hidden_size == layer().hidden_size
    assert {name.partition(".")[0] for name in formats.read_arrays(tmp_path / "m.pt")} == {"model"}


def test_tensors_given_to_objects_stay_there(tmp_path):
    """A class called on, built from, and filled with a state_dict, by every opcode that can."""
    program, members = pt_program(layer().state_dict())
    made, open_ = program[2:-1], OPEN + b"cos\nsystem\n"
    for hidden in (made + b"\x85R.", made + b"\x85\x81.", b")" + made + b"\x92.", made + b"b.",
                   text("w") + made + b"s.", b"(" + text("w") + made + b"u.", made + b"a.",
                   b"(" + made + b"e.", b"(" + made + b"\x90."):
        pack(tmp_path / "m.pt", {"archive/data.pkl": open_ + hidden, **members})
        refused(tmp_path / "m.pt", "not built here: os.system")
    pack(tmp_path / "m.pt", {"archive/data.pkl": OPEN + b"(" + made + b"\x91.", **members})
    refused(tmp_path / "m.pt", "not built here: frozenset")


def test_an_object_in_the_place_of_a_weight_is_no_missing_bias(tmp_path):
    arrays = lstmcore.LSTM(3, 4, seed=0).state_dict()
    for value in (b"cos\nsystem\n)R", b"cos\nsystem\n"):
        program, members = pt_program({n: a for n, a in arrays.items() if n != "bias_l0"})
        program = program[:-2] + text("bias_l0") + value + b"u."
        pack(tmp_path / "m.pt", {"archive/data.pkl": program, **members})
        with pytest.raises(ValueError, match="bias of l0 is no tensor.*but os.system"):
            lstmcore.load(tmp_path / "m.pt")


def test_names_of_objects_are_cut_and_not_copied(tmp_path):
    """A long name used a hundred thousand times, and a name that is put into the next one."""
    program = OPEN + b"](c" + b"x" * 10**6 + b"\nname\nq\0" + b"h\0" * 10**5 + b"e."
    pack(tmp_path / "m.pt", {"a/data.pkl": program})
    refused(tmp_path / "m.pt", "not built here: x{200};", 64 << 20)
    program = (OPEN + b"](ctorch\nEvilyStorage\nq\1ctorch._utils\n_rebuild_tensor_v2\nq\0"
               + b"h\0(h\1K\0))tRq\1" * 10**4 + b"e.")
    pack(tmp_path / "m.pt", {"a/data.pkl": program})
    refused(tmp_path / "m.pt", "not built here", 16 << 20)


def test_expanded_tensors_do_not_expand(tmp_path):
    """Strides of 0 would make one number a billion."""
    arrays = {"weight_ih_l0": np.ones((16, 3), "float32")}
    shape, strides = number(16) + number(3), number(3) + number(1)
    write_pt(tmp_path / "m.pt", arrays, lambda p: p.replace(shape, number(10**5) * 2).replace(
        strides, number(0) * 2))
    refused(tmp_path / "m.pt", "does not fit its storage")


def test_archives_with_tricks(tmp_path):
    path, program = tmp_path / "m.pt", OPEN + b"}."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:       # a bomb of 1000 : 1
        archive.writestr("a/data.pkl", b"\0" * (64 << 20))
    refused(path, "is compressed")
    for name in ("../a/data.pkl", "/a/data.pkl", "a\\..\\data.pkl", "a/../data.pkl"):
        pack(path, {name: program})
        refused(path, "points out of the archive")
    pack(path, {"a/data.pkl": program, "b/data.pkl": program})
    refused(path, "one member data.pkl")
    pack(path, {"a/data.pkl": program, "a/constants.pkl": program})
    with pytest.raises(ValueError, match="TorchScript archive, save the state_dict"):
        lstmcore.load(path)
    pack(path, {"a/data.pkl": program, "a/byteorder": b"middle"})
    refused(path, "byteorder")
    pack(path, {"a/data.pkl": program})
    data = path.read_bytes()
    path.write_bytes(data.replace(program, OPEN + b"]."))
    refused(path, "damaged zip archive: Bad CRC-32")
    path.write_bytes(data.replace(b"a/data.pkl" + program, b"b/data.pkl" + program))
    refused(path, "damaged zip archive")


def test_members_that_overlap_are_refused(tmp_path):
    """Two hundred entries of the directory that all point to the same bytes."""
    path = tmp_path / "m.pt"
    pack(path, {"a/data.pkl": OPEN + b"}.", **{f"a/data/{n:03}": b"x" * 4096 for n in range(2)}})
    with zipfile.ZipFile(path, "a") as archive:
        for n in range(2, 200):
            info = zipfile.ZipInfo(f"a/data/{n:03}")
            first = archive.getinfo("a/data/000")
            info.CRC, info.file_size, info.compress_size = first.CRC, 4096, 4096
            info.header_offset = first.header_offset
            archive.filelist.append(info)
            archive.NameToInfo[info.filename] = info
        archive._didModify = True
    refused(path, "members claim")


def test_big_endian_storages_are_turned(tmp_path):
    state = layer().state_dict()
    swapped = {name: a.byteswap() for name, a in state.items()}
    program, members = pt_program(swapped)
    pack(tmp_path / "m.pt", {"archive/data.pkl": program, "archive/byteorder": b"big", **members})
    for name, a in formats.read_arrays(tmp_path / "m.pt").items():
        np.testing.assert_array_equal(a, state[name])


def test_hdf5_claims_are_compared_with_the_file(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "m.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("a", data=np.ones((7, 11), "f4"))
    data = path.read_bytes()
    shape = struct.pack("<QQ", 7, 11)
    for new in ((2**62, 11), (7, 12), (2**63, 2**63), (0, 2**63)):
        mutant = data.replace(shape, struct.pack("<QQ", *new))
        if 0 in new:
            assert hdf5.read(mutant).members["a"].array.size == 0
        else:
            with pytest.raises(ValueError, match=r"in 308 bytes"):
                hdf5.read(mutant)


def test_unknown_files_are_refused_by_their_first_bytes(tmp_path):
    (tmp_path / "m.bin").write_bytes(b"GGUF and more")
    refused(tmp_path / "m.bin", "begins with b'GGUF and'")
    for name in ("m.onnx", "m.pt"):
        (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
        refused(tmp_path / name, "a pointer of Git LFS, not the file")
    (tmp_path / "empty.pt").write_bytes(b"")
    refused(tmp_path / "empty.pt", "begins with b''")
    with pytest.raises(FileNotFoundError):
        lstmcore.load(tmp_path / "nothing.pt")


PAIR = b"ccollections\nOrderedDict\nq\0]q\1(K\1K\2\x86q\2"


@pytest.mark.parametrize("message, program", {
    # every floor holds the one below it twice: written out, 2^60 of them
    "it calls": b"\x80\x02)" + b"q\0h\0\x86" * 60 + b")R.",
    "again and again": b"\x80\x02" + PAIR + b"h\2" * 20000 + b"eh\1\x85q\3("
                       + b"h\0h\3R" * 4000 + b"l.",
    # numbers that all have the hash 0
    "holds no": b"\x80\x02}(" + b"".join(b"\x8a\x0a" + ((2**61 - 1) * k).to_bytes(10, "little")
                                         + b"N" for k in range(1, 20000)) + b"u.",
    "it counts to": b"\x80\x02}r\xff\xff\xff\x7f.",
}.items())
def test_small_pickles_that_would_take_long(tmp_path, message, program):
    pack(tmp_path / "m.pt", {"a/data.pkl": program})
    begin = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        lstmcore.load(tmp_path / "m.pt")
    assert time.perf_counter() - begin < 4


def test_a_configuration_of_many_layers_takes_little(tmp_path):
    """Layers that all read what many others have passed on, and a model with many in a model."""
    pytest.importorskip("h5py")
    n = 6000

    def entry(kind, name, source=None):
        return {"class_name": kind, "config": {"name": name, "return_sequences": True},
                "inbound_nodes": [[[source, 0, 0, {}]]] if source else []}
    passing = [entry("Dropout", f"d{k}", f"d{k - 1}" if k else None) for k in range(n)]
    readers = [entry("LSTM", f"l{k}", f"d{n - 1}") for k in range(n)]
    inside = [{"class_name": "Sequential", "config": {"name": f"m{k}", "layers": [entry("GRU", "a")]}}
              for k in range(n)]
    lstmcore.LSTM(3, 4, seed=0).save(tmp_path / "m.weights.h5")
    for layers in [*passing, *readers], [*inside, *readers]:
        pack(tmp_path / "m.keras", {"model.weights.h5": (tmp_path / "m.weights.h5").read_bytes(),
                                    "config.json": json.dumps({
                                        "class_name": "Functional", "config": {"layers": layers}})})
        begin = time.process_time()
        with pytest.raises(ValueError, match="several recurrent layers"):
            lstmcore.load(tmp_path / "m.keras")
        assert time.process_time() - begin < 4


def test_one_storage_for_many_layers_is_refused(tmp_path):
    H, program = 64, b""
    tensor, members = pt_program({"": np.zeros((4 * H, H), "f4")})
    tensor = tensor[tensor.index(b"ctorch._utils"):-2]          # what makes the tensor
    for n in range(400):
        for weight in ("ih", "hh"):
            kept = b"q\1" if not program else b""
            program += text(f"weight_{weight}_l{n}") + (tensor + kept if kept else b"h\1")
    pack(tmp_path / "m.pt", {"archive/data.pkl": b"\x80\x02}(" + program + b"u.", **members})
    tracemalloc.start()
    with pytest.raises(ValueError, match="shares its arrays among so many layers"):
        lstmcore.load(tmp_path / "m.pt")
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_what_a_language_model_claims_is_compared_with_its_weights(tmp_path):
    path = tmp_path / "m.safetensors"
    model = lstmcore.LanguageModel(hidden_size=4, num_layers=1, embed_size=2)
    model.fit("abc" * 50, steps=1, progress=False, batch_size=2, seq_length=5, checkpoint=path)
    arrays, metadata = safetensors.read(path)
    key, run = "lstmcore.language_model", "lstmcore.training"
    said = json.loads(metadata[key])

    def changed(**config):
        return json.dumps({**said, "config": {**said["config"], **config}})
    for message, wrong in {"head.weight must be": changed(hidden_size=10**6),
                           "10000000 layers": changed(num_layers=10**7),
                           "embedding.weight must be": changed(embed_size=10**6),
                           "cannot read": "[" * 10**5, "cannot read: KeyError": "{}",
                           "version 9 of": json.dumps({**said, "version": 9}),
                           "'step'": json.dumps({**said, "history": [{}]})}.items():
        safetensors.write(path, arrays, {**metadata, key: wrong})
        tracemalloc.start()
        for load in (lstmcore.load, lstmcore.LanguageModel.load):
            with pytest.raises(ValueError, match=message) as raised:
                load(path)
            assert str(path) in str(raised.value)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
        tracemalloc.stop()
    meta = json.loads(metadata[run])
    for name, value in {"digest": None, "settings": [], "budget": {"x": 1}, "rng": {},
                        "epoch": 1e400, "position": 10**9, "history": [3], "step": -1,
                        "scale": "1"}.items():
        safetensors.write(path, arrays, {**metadata, run: json.dumps({**meta, name: value})})
        with pytest.raises(ValueError, match="training run that is damaged or of another"):
            lstmcore.LanguageModel(hidden_size=4, num_layers=1, embed_size=2).fit(
                "abc" * 50, steps=2, progress=False, resume=path)
