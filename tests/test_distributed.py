"""Several processes: the bits of one, faults of one rank, the command under mpiexec, other launchers.

The tests start MPI themselves, as pip installs it ('lstmcore[mpi]' mpich); without it they skip.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ranks

import lstmcore
from lstmcore import LanguageModel, distributed, reduction, reference
from lstmcore.formats import safetensors

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "distributed.md"
apart = pytest.mark.skipif(not PAGE.exists(), reason="needs docs/distributed.md")
MPIEXEC = next(filter(None, (shutil.which("mpiexec", path=path)
                             for path in (str(Path(sys.executable).parent), None))), None)
needs_mpi = pytest.mark.skipif(
    MPIEXEC is None or importlib.util.find_spec("mpi4py") is None,
    reason="needs mpi4py and an mpiexec: pip install 'lstmcore[mpi]' mpich")
ENVIRONMENT = {
    **os.environ, "LSTMCORE_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
    # Open MPI refuses more processes than cores, and root, unless it is told
    "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1", "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}


def mpiexec(P, *command, cwd=None, timeout=120, **env):
    """The exit code, standard output and standard error of P processes."""
    done = subprocess.run([MPIEXEC, "-n", str(P), *map(str, command)], env={**ENVIRONMENT, **env}, cwd=cwd,
                          capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
    return done.returncode, done.stdout, done.stderr


def answers(P, job, *args, **options):
    """What each of P ranks returns from a job of ranks.py, in order."""
    code, out, err = mpiexec(P, sys.executable, HERE / "ranks.py", job, *args, **options)
    assert code == 0, err
    # lines of several processes may run together
    found = dict(json.JSONDecoder().raw_decode(out, at.start())[0]
                 for at in re.finditer(r'\[\d+, (?=[\[{"n])', out))
    assert sorted(found) == list(range(P)), out
    return [found[rank] for rank in range(P)]


# ---- the tree, without MPI ---------------------------------------------------------------------------

def tree(low, high):
    """The sum of leaves low..high-1, by its definition."""
    if high - low == 1:
        return str(low)
    middle = (low + high + 1) // 2
    return f"({tree(low, middle)}+{tree(middle, high)})"


@pytest.mark.parametrize("count", range(1, 25))
def test_every_number_of_processes_adds_up_one_tree(count):
    for P in (P for P in range(1, count + 1) if count % P == 0):
        own, sent = count // P, []
        for rank in range(P):
            shards = range(rank * own, (rank + 1) * own)
            steps = reduction.folding(count, shards)
            stack = [None] * count
            for shard, (level, add, merges) in zip(shards, steps):
                stack[level] = f"({stack[level]}+{shard})" if add else str(shard)
                for into in merges:
                    stack[into] = f"({stack[into]}+{stack[into + 1]})"
            sent += stack[:len(reduction.nodes(count, shards[0], shards[-1] + 1))]
        nodes = [node for rank in range(P)
                 for node in reduction.nodes(count, rank * own, (rank + 1) * own)]
        assert len(sent) == len(nodes) and (count not in (2, 4, 8, 16) or len(nodes) == P)
        for into, other in reduction.merging(count, nodes):
            sent[into] = f"({sent[into]}+{sent[other]})"
        assert sent[0] == tree(0, count)


def test_shards_are_cut_as_array_split_cuts():
    for n in range(20):
        for parts in range(1, 9):
            got = [np.arange(n)[rows] for rows in distributed._cut(n, parts)]
            assert all(map(np.array_equal, got, np.array_split(np.arange(n), parts)))


def test_rounding_to_bfloat16_is_the_reference_s():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 1 << 32, 100_000, np.uint32).view(np.float32)
    a[:6] = 0, -0.0, np.inf, -np.inf, np.nan, 1 + 2.0**-8
    want = reference.rounded(a)
    got = reduction.round_off(a.copy())
    there = ~np.isnan(want)
    assert np.array_equal(got[there].view(np.uint32), want[there].view(np.uint32))
    assert np.isnan(got[~there]).all()
    assert np.array_equal(reduction.raised(reduction.lowered(got)).view(np.uint32), got.view(np.uint32))


@pytest.mark.parametrize("P", (1, 2, 3, 8))
@pytest.mark.parametrize("block", (1, 7, 16, 1000))
def test_the_parts_of_all_processes_are_every_number_once(P, block):
    gradients = {name: np.zeros(shape, "float32") for name, shape in (
        ("a", (3, 5)), ("b", 0), ("c", 257), ("d", 1))}
    found = {name: np.zeros(g.size, int) for name, g in gradients.items()}
    for rank in range(P):
        processes = distributed.Processes()
        processes.rank, processes.size = rank, P
        mine = reduction.Reduction(processes, gradients, [["b", "c"], ["d", "a"], []], 8 * P, "tree", None,
                                   block).mine
        if mine is None:
            mine = {name: slice(0, g.size) for name, g in gradients.items()}
        for name, part in mine.items():
            assert part.start % block == 0
            found[name][part] += 1
    assert all((n == 1).all() for n in found.values())


def test_parts_are_about_equal():
    assert reduction.parts(range(0, 1000, 10), 1000, 3) == [0, 330, 670, 1000]
    assert reduction.parts([0], 5, 2) in ([0, 0, 5], [0, 5, 5])


def test_one_shard_has_the_bits_of_none():
    options = dict(steps=60, seq_length=9, batch_size=12, lr=0.02, progress=False)
    plain, sharded = (LanguageModel(hidden_size=11, seed=0).fit(ranks.story(500), shards=shards, **options)
                      for shards in (None, 1))
    assert ranks.bits(plain.network) == ranks.bits(sharded.network)


def test_an_optimizer_updates_all_again_after_a_run(monkeypatch):
    seen = []

    def divide(self, optimizer):
        optimizer.follow()
        optimizer.restrict({"head.bias": slice(0, 3)})
        seen.append(optimizer)
    monkeypatch.setattr(distributed.Shards, "divide", divide)
    model = LanguageModel(hidden_size=5, seed=0).fit(ranks.story(100), shards=1, steps=3, progress=False)
    before = model.network.state_dict()
    (optimizer,) = seen
    model.network.train()
    for g in model.network.gradients().values():
        g.fill(1)
    optimizer.step()
    assert all((p != before[name]).any() for name, p in model.network.parameters().items())


def test_shards_change_rounding_alone():
    options = dict(steps=40, seq_length=9, batch_size=12, lr=0.02, progress=False, validation=0.3)
    plain, sharded = (LanguageModel(hidden_size=11, seed=0).fit(ranks.story(), shards=shards, **options)
                      for shards in (None, 8))
    assert ranks.bits(plain.network) != ranks.bits(sharded.network)
    for name, p in plain.network.parameters().items():
        assert np.allclose(p, sharded.network.parameters()[name], rtol=0, atol=2e-4), name
    for what in "loss", "validation":
        assert plain.history[-1][what] == pytest.approx(sharded.history[-1][what], abs=1e-4)


def test_dropout_of_a_shard_depends_on_step_and_shard_alone():
    masks = {}

    class Note(lstmcore.Dropout):
        def __call__(self, x):
            return masks.setdefault(self.at, super().__call__(x))

    layer = Note(0.5, seed=0)
    shards = distributed.Shards(None, 3)
    shards.attach(layer)
    before = layer.rng.bit_generator.state
    for step in range(2):
        def loss_of(shard, step=step):
            layer.at = step, shard
            layer(np.ones(64, "float32"))
            return 0.0, None
        shards.differentiate(step, loss_of)
    assert len({mask.tobytes() for mask in masks.values()}) == 6
    assert layer.rng.bit_generator.state == before


# ---- the bits of one ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def fits_of_one():
    with lstmcore.threads(1):
        return ranks.fits(None)


@needs_mpi
@pytest.mark.parametrize("P", [2, 4, 8])
def test_bits_do_not_depend_on_the_number_of_processes(P, fits_of_one):
    for rank, found in enumerate(answers(P, "fits")):
        assert found == json.loads(json.dumps(fits_of_one)), f"rank {rank}"


LINK = ["unshare", "-rn", "sh", "-c", "ip link set lo up && tc qdisc add dev lo root tbf rate 200mbit"
        ' burst 256kb latency 200ms && exec "$@"', "sh"]     # in a network namespace of its own


def can_slow_a_link():
    try:
        return subprocess.run([*LINK, "true"], capture_output=True).returncode == 0
    except OSError:
        return False


@needs_mpi
@pytest.mark.skipif(not can_slow_a_link(), reason="needs unshare, ip, tc and the right to use them")
def test_bits_do_not_depend_on_the_link(tmp_path):
    """Over TCP, slowed down, so that stages arrive when they arrive."""
    tcp = {"MPIR_CVAR_CH4_NETMOD": "ofi", "MPIR_CVAR_NOLOCAL": "1", "FI_PROVIDER": "tcp",
           "FI_TCP_IFACE": "lo", "OMPI_MCA_btl": "tcp,self", "OMPI_MCA_pml": "ob1",
           "OMPI_MCA_btl_tcp_if_include": "lo"}
    fast = answers(2, "resumed", tmp_path / "m", 20)
    done = subprocess.run([*LINK, MPIEXEC, "-n", "2", sys.executable, HERE / "ranks.py", "resumed",
                           tmp_path / "m", "20"], env={**ENVIRONMENT, **tcp}, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(fast[0]) == 2


@needs_mpi
@pytest.mark.parametrize("P", [2, 3, 6])
def test_shards_that_are_no_node_of_the_tree(P, tmp_path):
    """Of 12: processes send several sums each, 3 of them not equally many."""
    found = answers(P, "resumed", tmp_path / "m", 20, "", 12)
    with lstmcore.threads(1):
        assert set(found) == {ranks.bits(ranks.char_model(None, 20, shards=12).network)}


@needs_mpi
def test_a_run_goes_on_with_other_numbers_of_processes(tmp_path):
    """A part of a run each, by 2, 4 and 1, that break off inside an epoch."""
    a, b, c = (str(tmp_path / name) for name in "abc")
    answers(2, "resumed", a, 31)
    answers(4, "resumed", b, 67, a)
    (last,) = answers(1, "resumed", c, 110, b)
    with lstmcore.threads(1):
        assert ranks.resumed(None, str(tmp_path / "d"), 110) == last
        assert ranks.resumed(None, str(tmp_path / "e"), 110, a) == last


@needs_mpi
def test_allreduce_trains_alike_but_for_rounding(tmp_path):
    code = ("import ranks, json; from mpi4py import MPI; import lstmcore; lstmcore.set_num_threads(1)\n"
            "m = ranks.LanguageModel(hidden_size=11, seed=0).fit(ranks.story(), steps=40, seq_length=9,"
            " batch_size=12, lr=0.02, progress=False, comm=MPI.COMM_WORLD, reduction='allreduce')\n"
            "if not MPI.COMM_WORLD.rank: print(json.dumps(m.history[-1]['validation']))")
    code, out, err = mpiexec(2, sys.executable, "-c", code)
    assert code == 0, err
    plain = LanguageModel(hidden_size=11, seed=0).fit(ranks.story(), steps=40, seq_length=9, batch_size=12,
                                                      lr=0.02, progress=False)
    assert float(out) == pytest.approx(plain.history[-1]["validation"], abs=1e-4)


@needs_mpi
def test_the_exchange_begins_before_backward_ends():
    """Two shards of each rank; head, upper layer, lower layer while the last is computed, and the table."""
    for noted in answers(2, "overlap"):
        assert noted == ["forward", "backward", "forward", "stage 0", "backward", "stage 1", "stage 2",
                         "wait", "parts of 0", "parts of 1", "parts of 2", "parts of 3", "done"]


# ---- loops of one's own ------------------------------------------------------------------------------

@needs_mpi
def test_functions_for_own_loops():
    found = answers(4, "own_loop")
    assert [one["rows"] for one in found] == [[8 * n, 8 * n + 8] for n in range(4)]
    assert {one["weights"] for one in found} == {ranks.bits(lstmcore.Linear(5, 3, seed=0))}
    layer = lstmcore.Linear(5, 3, seed=0)
    x = np.random.default_rng(0).standard_normal((32, 5)).astype("float32")
    y = layer(x)
    layer.backward(2 * y / y.size)
    want = layer.gradients()["weight"]
    for way, error in ("tree", 1e-6), ("allreduce", 1e-6), ("bfloat16", 1e-2):
        assert len({str(one[way]) for one in found}) == 1
        assert np.abs(np.array(found[0][way]) - want).max() <= error * np.abs(want).max(), way
    assert found[0]["bfloat16"] != found[0]["tree"]


def test_functions_for_own_loops_of_one_process():
    layer = lstmcore.Linear(5, 3, seed=0)
    layer.backward(layer(np.ones((2, 5), "float32")))
    before = layer.gradients()["weight"].copy()
    distributed.broadcast(layer, None)
    distributed.average_gradients(layer, None)
    assert np.array_equal(layer.gradients()["weight"], before)
    assert distributed.share(7, None) == slice(0, 7)


@needs_mpi
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs affinity")
def test_processes_share_the_cpus_and_the_text(tmp_path):
    cpus = sorted(os.sched_getaffinity(0))
    found = answers(2, "machine", TMPDIR=str(tmp_path), LSTMCORE_NUM_THREADS="")
    each = max(1, distributed.cpus() // 2)
    for rank, one in enumerate(found):
        assert one["sum"] == 499_500 and not one["writeable"] and one["none"] and one["empty"] == [0]
        assert one["threads"] == 1      # ranks.py says so, and the user's number stays
        assert one["before"] == one["after"]
        if len(cpus) >= 2 and one["before"] == cpus:    # else the launcher has bound it
            assert one["inside"] == cpus[rank * each:(rank + 1) * each]
    assert not list(tmp_path.glob("lstmcore-*"))


# ---- faults ------------------------------------------------------------------------------------------

@needs_mpi
@pytest.mark.parametrize("what, said", [
    ("version", "the version of lstmcore in common: rank 0 has"), ("text", "the text in common"),
    ("setting", "the settings in common: rank 0 has {'lr': 0.2}, rank 1 has {'lr': 0.1}"),
    ("isa", "the instruction set in common: rank 0 has"), ("data", "the data in common")])
def test_ranks_that_differ_are_noticed_at_the_start(what, said):
    if what == "data":
        pytest.importorskip("sklearn")
    if what == "isa" and len(lstmcore.info()["available_isas"]) < 2:
        pytest.skip("needs two instruction sets")
    for error in answers(3, "unlike", what):
        assert said in error


@needs_mpi
def test_ranks_without_a_seed_begin_with_the_weights_of_rank_0():
    assert len(set(answers(2, "unlike", "weights"))) == 1


@needs_mpi
@pytest.mark.parametrize("how, said", [("kill", ""), ("exception", "no memory on this machine"),
                                       ("callback", "no more of this")])
def test_a_fault_of_one_rank_ends_all_and_leaves_a_whole_checkpoint(how, said, tmp_path):
    start = time.monotonic()
    code, out, err = mpiexec(4, sys.executable, HERE / "ranks.py", "failing", how, tmp_path / "m", timeout=60)
    assert code and time.monotonic() - start < 30
    assert said in err and "[" not in out
    if said:
        assert f"rank {how == 'exception':d} of 4 has failed, so all processes end" in err
    else:
        assert re.search("(?i)kill|signal 9|exit code: 9", out + err)       # the launcher's message
    kept = LanguageModel.load(tmp_path / "m")
    assert kept.history[-1]["step"] == (15 if how == "callback" else 10)
    kept.fit(ranks.story(), resume=tmp_path / "m", steps=16, progress=False)
    assert kept.outcome == "finished"


@needs_mpi
def test_an_interrupt_of_one_rank_ends_all_after_one_step(tmp_path):
    found = answers(2, "failing", "interrupt", tmp_path / "m")
    assert [outcome for outcome, _ in found] == ["SIGINT"] * 2
    kept = LanguageModel.load(tmp_path / "m")
    assert kept.outcome == "SIGINT" and json.loads(
        safetensors.read(tmp_path / "m")[1]["lstmcore.training"])["step"] in range(12, 20)


@needs_mpi
def test_parameters_that_part_ways_are_noticed(tmp_path):
    for error in answers(2, "failing", "replicas", tmp_path / "m"):
        assert "the parameters of rank 1 are no longer those of rank 0" in error


@needs_mpi
def test_what_all_ranks_raise_is_raised():
    found = answers(2, "diverging")
    assert found[0] == found[1] and found[0].startswith("the loss is nan at step 6 ")


# ---- the command -------------------------------------------------------------------------------------

TRAIN = ("-m", "lstmcore", "train", "story.txt", "--hidden", 11, "--seq-length", 9, "--batch-size", 16,
         "--steps", 30, "--dropout", 0.2, "--no-sample")


@needs_mpi
def test_the_command_under_mpiexec(tmp_path):
    (tmp_path / "story.txt").write_text(ranks.story())
    code, out, err = mpiexec(2, sys.executable, *TRAIN, "--checkpoint", "two", "--out", "two", "--log",
                             "log.csv", cwd=tmp_path)
    assert code == 0 and not out, err
    assert err.count("saved two; write more") == 1 and (tmp_path / "log.csv").read_text().count("\n") == 2
    done = subprocess.run([sys.executable, *map(str, TRAIN), "--checkpoint", "one", "--out", "one",
                           "--shards", "8"], cwd=tmp_path,
                          env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = (safetensors.read(tmp_path / name)[0] for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)
    code, out, err = mpiexec(4, sys.executable, "-m", "lstmcore", "train", "story.txt", "--resume", "two",
                             "--steps", 40, "--no-sample", cwd=tmp_path)
    assert code == 0 and LanguageModel.load(tmp_path / "two").history[-1]["step"] == 40, err


@needs_mpi
@pytest.mark.parametrize("options, said", [
    (("--shards", "3"), "lstmcore: --shards must be a multiple of the 2 processes, got 3"),
    (("--batch-size", "0"), "lstmcore: --batch-size must be at least 1, got 0"),
    (("--lr", "fast"), "argument --lr: invalid float value"), (("--ephocs", "3"), "--ephocs 3 (see "),
    (("--reduction", "allreduce", "--wire", "bfloat16"), "needs reduction='tree'")])
def test_a_mistake_under_mpiexec_is_said_once(options, said, tmp_path):
    (tmp_path / "story.txt").write_text(ranks.story(100))
    code, _, err = mpiexec(2, sys.executable, *TRAIN, *options, cwd=tmp_path)
    assert code and err.count(said) == 1 and "Traceback" not in err, err


def test_mpi_is_imported_only_where_it_is_asked_for(tmp_path):
    (tmp_path / "story.txt").write_text(ranks.story(100))
    code = ("import sys; from lstmcore import cli; assert cli.main(sys.argv[1:]) == 0;"
            "assert 'mpi4py' not in sys.modules")
    quiet = {name: value for name, value in ENVIRONMENT.items() if name not in distributed.LAUNCHERS}
    done = subprocess.run([sys.executable, "-c", code, *map(str, TRAIN[2:]), "--shards", "2"], cwd=tmp_path,
                          env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_launcher_without_mpi4py_says_what_to_install(monkeypatch):
    for name in distributed.LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    assert distributed.launched() is None
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.setenv("PMI_SIZE", "1")
    assert distributed.launched() is None
    monkeypatch.setenv("PMI_SIZE", "4")
    with pytest.raises(ImportError, match=r"PMI_SIZE is set.*pip install 'lstmcore\[mpi\]'"):
        distributed.launched()


@needs_mpi
def test_a_launcher_of_another_mpi_is_noticed():
    code = "from lstmcore import distributed; distributed.launched()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**ENVIRONMENT, "OMPI_COMM_WORLD_SIZE": "3", "MV2_COMM_WORLD_SIZE": "3"})
    assert "has started 3 processes, but mpi4py sees 1" in done.stderr


@needs_mpi
def test_the_command_under_mpiexec_of_one(tmp_path):
    (tmp_path / "story.txt").write_text(ranks.story(300))
    for P in 1, 2:
        code, _, err = mpiexec(P, sys.executable, *TRAIN, "--out", f"m{P}", cwd=tmp_path)
        assert code == 0, err
    assert ranks.bits(LanguageModel.load(tmp_path / "m1").network) == ranks.bits(
        LanguageModel.load(tmp_path / "m2").network)


# ---- mistakes, files ---------------------------------------------------------------------------------

@pytest.mark.parametrize("options, error, said", [
    ({"comm": "world"}, TypeError, "comm must be a communicator of mpi4py"),
    ({"shards": 0}, ValueError, "shards must be at least 1, got 0"),
    ({"wire": "bfloat16"}, ValueError, "wire needs a comm, or shards"),
    ({"reduction": "allreduce"}, ValueError, "reduction needs a comm, or shards"),
    ({"shards": 2, "wire": "int8"}, ValueError, "wire must be None or 'bfloat16', got 'int8'"),
    ({"shards": 2, "reduction": "ring"}, ValueError, "reduction must be one of"),
    ({"shards": 2, "reduction": "allreduce", "wire": "bfloat16"}, ValueError, "needs reduction='tree'")])
def test_mistakes_are_named(options, error, said):
    with pytest.raises(error, match=re.escape(said)):
        LanguageModel(hidden_size=3).fit(ranks.story(100), steps=1, progress=False, **options)


def test_a_frozen_model_is_not_trained_in_shards():
    model = LanguageModel(hidden_size=3).fit(ranks.story(100), steps=1, progress=False, shards=2)
    with pytest.raises(ValueError, match="frozen Network cannot be trained"):
        model.freeze().fit(ranks.story(100), steps=1, progress=False, shards=2)


def test_bfloat16_on_the_wire_is_for_float32():
    with pytest.raises(TypeError, match="wire='bfloat16' is for float32 gradients, got float64"):
        LanguageModel(hidden_size=3, dtype="float64").fit(ranks.story(100), steps=1, progress=False,
                                                          shards=2, wire="bfloat16")


def test_a_checkpoint_without_shards_is_that_of_an_older_version(tmp_path):
    for shards, names in (None, set()), (4, {"shards"}):
        LanguageModel(hidden_size=3).fit(ranks.story(300), steps=5, progress=False, shards=shards,
                                         checkpoint=tmp_path / "m")
        settings = json.loads(safetensors.read(tmp_path / "m")[1]["lstmcore.training"])["settings"]
        assert settings.keys() & {"shards", "reduction", "wire"} == names
        model = LanguageModel.load(tmp_path / "m")
        model.fit(ranks.story(300), steps=7, progress=False, resume=tmp_path / "m")
        assert model.history[-1]["step"] == 7


@apart
def test_the_example_for_pytorch_trains_as_one_process(tmp_path):
    torch = pytest.importorskip("torch")
    text = re.search(r"^```python ddp.py\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)[1]
    (tmp_path / "ddp.py").write_text(text)
    states = []
    for P in 1, 2:
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                               f"--nproc-per-node={P}", "ddp.py"], cwd=tmp_path, capture_output=True,
                              text=True, timeout=120, env={**ENVIRONMENT, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        states.append(torch.load(tmp_path / "ddp.pt"))
    assert len(states[0]) == 6 and {str(p.dtype) for p in states[0].values()} == {"torch.float32"}
    for name, want in states[0].items():
        assert torch.allclose(states[1][name], want, rtol=0, atol=1e-5), name


# ---- other programs that start processes -------------------------------------------------------------

@pytest.mark.parametrize("backend", ["loky", "dask"])
def test_grid_search_over_processes_finds_what_one_process_finds(backend, monkeypatch):
    for name in "LSTMCORE_NUM_THREADS", "OMP_NUM_THREADS":
        monkeypatch.delenv(name, raising=False)
    pytest.importorskip("sklearn")
    joblib = pytest.importorskip("joblib")
    from sklearn.model_selection import GridSearchCV

    from lstmcore import LSTMClassifier
    X, y = np.random.default_rng(0).standard_normal((40, 6, 2)), np.arange(40) % 2

    def search(**options):
        model = LSTMClassifier(4, epochs=3, random_state=0)
        return GridSearchCV(model, {"lr": [0.01, 0.1]}, cv=2, n_jobs=2, **options).fit(X, y)

    with joblib.parallel_config("sequential"):
        want = search()
    if backend == "dask":
        client = pytest.importorskip("dask.distributed")
        with client.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, \
                client.Client(cluster) as workers, joblib.parallel_config("dask"):
            got = search()
            # its nannies set OMP_NUM_THREADS, which the workers' lstmcore reads
            assert set(workers.run(lstmcore.get_num_threads).values()) == {1}
    else:
        with joblib.parallel_config(backend, n_jobs=2):
            got = search()
            # so does loky, each its share of the CPUs
            found = joblib.Parallel()(joblib.delayed(lstmcore.get_num_threads)() for _ in range(4))
            assert set(found) == {max(1, distributed.cpus() // 2)}
    for name in "mean_test_score", "std_test_score":
        assert np.array_equal(got.cv_results_[name], want.cv_results_[name])
    for name, p in want.best_estimator_.network_.parameters().items():
        assert np.array_equal(got.best_estimator_.network_.parameters()[name], p)
