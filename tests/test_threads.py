"""Threads: how many, one parallel region per call, the BLAS pool, concurrent callers, fork."""

import contextlib
import multiprocessing
import os
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from problems import backward, forward, lstm_problem
from test_api import python

import lstmcore
from lstmcore import _kernels, functional
from lstmcore.threads import one_blas_thread

needs_openmp = pytest.mark.skipif(not _kernels.has_openmp(), reason="this build has one thread")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="counts or limits as Linux does")
threads_module = sys.modules["lstmcore.threads"]  # the package's name `threads` is the context
needs_two_cpus = pytest.mark.skipif(threads_module.cpus() < 2, reason="one CPU is not shared")
needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(),
                                reason="this system has no fork")


def small_problem(seed=30):
    return lstm_problem(6, 8, 5, 40, lengths="ragged", peepholes=True, dtype="float32", seed=seed)


def answer(problem, n_threads=2):
    """Outputs and gradients as bytes."""
    y, state, _ = forward(functional, problem, n_threads=n_threads)
    return [a.tobytes() for a in (y, *state, *backward(functional, problem, n_threads=n_threads))
            if a is not None]


# ---- how many ------------------------------------------------------------------------------------------

def test_context_beats_default_and_is_undone():
    before = lstmcore.get_num_threads()
    with lstmcore.threads(3):
        assert lstmcore.get_num_threads() == 3
        with lstmcore.threads(5):
            assert lstmcore.get_num_threads() == 5
        assert lstmcore.get_num_threads() == 3
        with pytest.raises(KeyError), lstmcore.threads(7):
            raise KeyError
        assert lstmcore.get_num_threads() == 3
    assert lstmcore.get_num_threads() == before


def test_context_belongs_to_its_python_thread():
    with lstmcore.threads(3), ThreadPoolExecutor(1) as other:
        assert other.submit(lstmcore.get_num_threads).result() != 3


def test_set_num_threads_is_for_the_process():
    before = lstmcore.get_num_threads()
    try:
        lstmcore.set_num_threads(7)
        with ThreadPoolExecutor(1) as other:
            assert other.submit(lstmcore.get_num_threads).result() == 7
        with lstmcore.threads(2):
            assert lstmcore.get_num_threads() == 2
    finally:
        lstmcore.set_num_threads(before)


@pytest.mark.parametrize("n, error", [(0, ValueError), (-2, ValueError), (2.0, TypeError),
                                      ("2", TypeError), (None, TypeError), (True, TypeError)])
def test_wrong_number_of_threads_is_refused(n, error):
    with pytest.raises(error, match="must be"):
        lstmcore.set_num_threads(n)
    with pytest.raises(error, match="must be"):
        lstmcore.threads(n).__enter__()


@pytest.mark.parametrize("environment, want", [
    ({"LSTMCORE_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, "3"),
    ({"LSTMCORE_NUM_THREADS": "", "OMP_NUM_THREADS": "5"}, "5"),
    ({"LSTMCORE_NUM_THREADS": "", "OMP_NUM_THREADS": "6,2"}, "6"),
    ({"LSTMCORE_NUM_THREADS": "", "OMP_NUM_THREADS": ""}, "affinity"),
    ({"LSTMCORE_NUM_THREADS": "many"}, "LSTMCORE_NUM_THREADS must be an integer >= 1, got 'many'"),
    ({"LSTMCORE_NUM_THREADS": "0"}, "LSTMCORE_NUM_THREADS must be an integer >= 1, got '0'"),
    ({"LSTMCORE_NUM_THREADS": "", "OMP_NUM_THREADS": "auto"}, "affinity"),
], ids=str)
def test_environment_sets_the_default(environment, want):
    code, said = python("import lstmcore; print(lstmcore.get_num_threads())", **environment)
    if want == "affinity":
        want = str(threads_module.cpus())
    assert want in said and (code == 0) == want.isdigit()


@pytest.mark.parametrize("text, want", [     # libgomp 12, by its omp_get_max_threads()
    ("4", 4), (" 4 ", 4), ("+4", 4), ("04", 4), ("4,2", 4), ("4 , 2", 4), ("5\n", 5),
    ("100000", 1024),
    ("", None), (" ", None), ("0", None), ("1.0", None), ("-3", None), ("auto", None), ("0x4", None),
    ("4 2", None), ("4,", None), (",4", None), ("4,0", None), ("4,x", None), ("٤", None), ("²", None),
    ("9" * 23, None), ("9" * 5000, None)], ids=lambda value: repr(value)[:12])
def test_omp_num_threads_counts_where_libgomp_counts_it(monkeypatch, text, want):
    monkeypatch.delenv("LSTMCORE_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    monkeypatch.setattr(threads_module, "cpus", lambda: None)
    assert threads_module._from_environment() == want


@pytest.mark.parametrize("text", ["4,2", "1.0", "-3", "auto", "٤", "²"])
def test_our_own_variable_is_an_integer_or_an_error(monkeypatch, text):
    monkeypatch.setenv("LSTMCORE_NUM_THREADS", text)
    with pytest.raises(ValueError, match=f"_THREADS must be an integer >= 1, got '{text}'"):
        threads_module._from_environment()


def test_our_own_variable_may_be_huge(monkeypatch):
    monkeypatch.setenv("LSTMCORE_NUM_THREADS", "9" * 5000)
    assert threads_module._from_environment() == threads_module.MOST


V1 = "30 23 0:29 {top} {point} rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
V2 = "30 23 0:29 {top} {point} rw,relatime - cgroup2 none rw,nsdelegate\n"


@pytest.mark.parametrize("groups, mounts, files, want", [
    # version 2: nested groups, of which the smallest counts; one and a half CPUs are two
    ("0::/a/b", V2.format(top="/", point="/cg"),
     {"cg/a/cpu.max": "150000 100000", "cg/a/b/cpu.max": "max 100000",
      "cg/c/cpu.max": "10000 100000"}, [2]),
    ("0::/a/b", V2.format(top="/", point="/cg"),
     {"cg/cpu.max": "800000 100000", "cg/a/cpu.max": "50000 100000",
      "cg/a/b/cpu.max": "200000 100000\n"}, [8, 1, 2]),
    ("0::/", V2.format(top="/", point="/cg"), {"cg/cpu.max": "300000 100000"}, [3]),
    # a container whose own group is the mount, by either name, or lies outside of what it sees
    ("0::/docker/f00", V2.format(top="/docker/f00", point="/cg"), {"cg/cpu.max": "400000 100000"}, [4]),
    ("0::/docker/f00/in", V2.format(top="/docker/f00", point="/cg"),
     {"cg/cpu.max": "400000 100000", "cg/in/cpu.max": "100000 50000"}, [4, 2]),
    ("0::/../other", V2.format(top="/", point="/cg"), {"cg/cpu.max": "400000 100000"}, [4]),
    ("0::/docker/f00", V2.format(top="/docker/f", point="/cg"),
     {"cg/cpu.max": "400000 100000", "cg/00/cpu.max": "100000 100000"}, [4]),
    # version 1, the cpu controller only; and both versions at once
    ("9:memory:/m\n4:cpu,cpuacct:/a", V1.format(top="/", point="/cg/cpu"),
     {"cg/cpu/cpu.cfs_quota_us": "-1", "cg/cpu/cpu.cfs_period_us": "100000",
      "cg/cpu/a/cpu.cfs_quota_us": "250000", "cg/cpu/a/cpu.cfs_period_us": "100000"}, [3]),
    ("4:cpuset:/a\n0::/b", V1.format(top="/", point="/cg/cpu") + V2.format(top="/", point="/u"),
     {"cg/cpu/a/cpu.cfs_quota_us": "1", "cg/cpu/a/cpu.cfs_period_us": "1", "u/b/cpu.max": "5 1"}, [5]),
    ("0::/a b", V2.format(top="/", point="/c\\040g"), {"c g/a b/cpu.max": "2 1"}, [2]),
    # what is no limit, and no cgroups at all
    ("0::/", V2.format(top="/", point="/cg"), {"cg/cpu.max": "max 100000"}, []),
    ("0::/", V2.format(top="/", point="/cg"), {"cg/cpu.max": "100000 0"}, []),
    ("0::/", V2.format(top="/", point="/cg"), {"cg/cpu.max": "some text"}, []),
    ("0::/", V2.format(top="/", point="/cg"), {}, []),
    ("", "24 1 8:1 / / rw - ext4 /dev/root rw\n", {}, []),
    ("", "", {}, []),
    ("garbage\n0::/", "garbage\n" + V2.format(top="/", point="/cg"), {"cg/cpu.max": "3 1"}, [3]),
], ids=range(17))
def test_cpu_quotas_of_cgroups(tmp_path, groups, mounts, files, want):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert list(threads_module._quotas(groups, mounts, root=tmp_path)) == want


def test_the_smallest_quota_bounds_the_cpus(monkeypatch):
    monkeypatch.setattr(threads_module, "_quotas", lambda groups, mounts: [10 ** 6])
    alone = threads_module.cpus()
    monkeypatch.setattr(threads_module, "_quotas", lambda groups, mounts: [10 ** 6, 1, 3])
    assert alone >= threads_module.cpus() == 1


# ---- one region per call -------------------------------------------------------------------------------

@needs_openmp
def test_one_parallel_region_per_call(plan, share_small_work):
    problem = small_problem()
    for n_threads, regions in (2, 1), (4, 1), (1, 0):
        start = _kernels.regions()
        tape = forward(functional, problem, n_threads=n_threads)[-1]
        assert _kernels.regions() - start == regions
        functional.lstm_backward(tape, **problem.upstream, n_threads=n_threads)
        assert _kernels.regions() - start == 2 * regions


@needs_openmp
def test_argument_reaches_the_kernels(share_small_work):
    problem = small_problem()
    for n_threads in 1, 2, 4:
        forward(functional, problem, n_threads=n_threads)
        _, rows, slabs = _kernels.last_plan
        assert rows * slabs == n_threads
        with lstmcore.threads(n_threads):
            forward(functional, problem)
        assert _kernels.last_plan[1:] == (rows, slabs)


# ---- BLAS ----------------------------------------------------------------------------------------------

def blas_threads():
    import scipy.linalg  # noqa: F401  (its BLAS is one of the pools)
    from threadpoolctl import threadpool_info

    return sorted((pool["filepath"], pool["num_threads"]) for pool in threadpool_info()
                  if pool["user_api"] == "blas")


def test_blas_is_held_to_one_thread_and_restored():
    from threadpoolctl import threadpool_limits

    with threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        with one_blas_thread():
            with one_blas_thread():
                assert {n for _, n in blas_threads()} == {1}
            assert {n for _, n in blas_threads()} == {1}
        assert blas_threads() == before
        with pytest.raises(KeyError), one_blas_thread():
            raise KeyError
        assert blas_threads() == before


def test_blas_is_restored_by_the_last_of_concurrent_callers():
    from threadpoolctl import threadpool_limits

    inside, leave = threading.Barrier(2, timeout=30), threading.Event()

    def hold():
        with one_blas_thread():
            inside.wait()
            assert leave.wait(30)

    with threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        other = threading.Thread(target=hold)
        with one_blas_thread():
            other.start()
            inside.wait()
        assert {n for _, n in blas_threads()} == {1}  # the other caller is still inside
        leave.set()
        other.join(30)
        assert blas_threads() == before


def test_blas_is_restored_after_calls(monkeypatch):
    from threadpoolctl import threadpool_limits

    monkeypatch.setattr(_kernels, "plan", "blas")
    with threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        answer(small_problem())
        assert blas_threads() == before


LATE_BLAS = """
import lstmcore._kernels as k
from lstmcore.threads import one_blas_thread
import numpy as np, lstmcore, sys
from threadpoolctl import threadpool_info
pools = lambda: {p["filepath"]: p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas"}
k.plan, a = "blas", np.ones((4, 40, 8))
with one_blas_thread():
    few, scipy_before = pools(), "scipy.linalg.cython_blas" in sys.modules
    lstmcore.lstm_forward(a, np.ones((32, 8)), np.ones((32, 8)))
    many = pools()
    assert not scipy_before and set(many.values()) == {1}, many
assert max(pools().values()) > 1, pools()
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="a BLAS of one thread has nothing to hold")
def test_a_blas_that_comes_late_is_held_too():
    code, said = python(LATE_BLAS, OPENBLAS_NUM_THREADS="2")
    assert code == 0, said


# ---- many callers --------------------------------------------------------------------------------------

@pytest.fixture
def all_get_their_teams():
    """Calls at once do not divide the CPUs."""
    _kernels.share_cpus(0)
    yield
    _kernels.share_cpus(threads_module.cpus())


def test_eight_python_threads_at_once(plan, share_small_work, all_get_their_teams):
    problems = [small_problem(seed) for seed in range(8)]
    want = [answer(problem, n_threads=1) for problem in problems]
    start = threading.Barrier(8, timeout=60)

    def work(k):
        start.wait()
        return all(answer(problems[k], n_threads=1 + k % 3) == want[k] for _ in range(10))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def requests(model, x, n_threads=None, callers=8, seconds=0.4):
    """What a server of 8 Python threads gets through in a second, and what it answered."""
    start, answers = threading.Barrier(callers, timeout=30), set()

    def work(_):
        done = 0
        with contextlib.nullcontext() if n_threads is None else lstmcore.threads(n_threads):
            start.wait()
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                y, _ = model(x)
                done += 1
        answers.add(y.tobytes())
        return done

    with ThreadPoolExecutor(callers) as pool:
        return sum(pool.map(work, range(callers))) / seconds, answers


@needs_openmp
@needs_two_cpus
def test_a_server_needs_no_setting():
    """Its callers' teams shrink to what the CPUs can run; with full teams it is a tenth to a quarter."""
    model = lstmcore.LSTM(256, 256, 2, dtype="float32").freeze()
    x = np.random.default_rng(32).standard_normal((40, 1, 256)).astype("float32")
    requests(model, x)
    default = one = 0
    for attempt in range(5):    # other programs take turns with the CPUs: both get several
        rate, answers = requests(model, x)
        rate_of_one, answers_of_one = requests(model, x, 1)
        default, one = default + rate, one + rate_of_one
        assert len(answers | answers_of_one) == 1
        if attempt and default >= 0.6 * one:
            return
    raise AssertionError(f"{default / one:.0%} of the requests of threads(1)")


COST = """
import os, resource, time, numpy as np, lstmcore
m, x = lstmcore.LSTM(512, 512, dtype="float32").freeze(), np.ones((100, 1, 512), "float32")
{setting}
for m.n_threads in 1, {n}:
    m(x)
    before, sleeps = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
    for _ in range(10): m(x)
    sleeps = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - sleeps
    print(time.process_time() - before, sleeps / 10)
"""


ONE_CPU = "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])"


@needs_openmp
@needs_linux
def test_threads_beyond_the_cpus_do_not_burn_them():
    """Four times as many threads as CPUs: 1.2x to 1.9x the CPU time of one; 7x to 15x where waiting
    threads spin and yield. CPU time, because other programs lengthen the other one."""
    code, said = python(COST.format(n=4 * threads_module.cpus(), setting=""), LSTMCORE_NUM_THREADS="")
    assert code == 0, said
    (one, _), (many, _) = (map(float, line.split()) for line in said.splitlines())
    assert many <= 4 * one


@needs_openmp
@needs_linux
@needs_two_cpus
def test_threads_sleep_while_another_has_no_cpu():
    """Two threads that find one CPU, as beside a busy program: each of 100 steps puts one to sleep
    (a voluntary switch; a yield is none)."""
    code, said = python(COST.format(n=2, setting=ONE_CPU))
    assert code == 0, said
    (_, none), (_, sleeps) = (map(float, line.split()) for line in said.splitlines())
    assert none < 10 and sleeps > 60


FEW_THREADS = """
import resource, numpy as np
import lstmcore.functional as functional
from lstmcore import LSTM, _kernels
m, x = LSTM(64, 64, dtype="float32"), np.ones((20, 1024, 64), "float32")
m.n_threads = 1
want = m(x)[0]
m(x)
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
m.n_threads = 1024
for _ in range(2):
    y = m(x)[0]
    _, rows, slabs = _kernels.last_plan
    assert 1 < rows * slabs < 1024 and y.tobytes() == want.tobytes(), _kernels.last_plan
"""


@needs_openmp
@needs_linux
def test_a_system_that_refuses_threads_gets_fewer():
    code, said = python(FEW_THREADS)
    assert code == 0, said


def test_other_python_threads_run_during_a_call(plan):
    """The GIL is released: while a long call runs, another thread's longest pause is short."""
    problem = lstm_problem(80, 64, 64, 200, dtype="float32", seed=31)
    forward(functional, problem, n_threads=1)
    shares = []
    while not shares or min(shares) >= 1 / 4:   # other programs make pauses too, but not every time
        assert len(shares) < 5, f"a pause of {min(shares):.0%} of the call, in the best of 5 calls"
        shares.append(_longest_pause(problem))


def _longest_pause(problem):
    """Of this thread, while another one is in a call, as a share of that call."""
    calls, done = [], threading.Event()

    def call():
        start = time.perf_counter()
        backward(functional, problem, n_threads=1)
        calls.append(time.perf_counter() - start)
        done.set()

    # the call takes the GIL between forward and backward, so a pause is a half of it if it is held
    worker, pauses, last = threading.Thread(target=call), [], time.perf_counter()
    worker.start()
    while not done.is_set():
        now = time.perf_counter()
        pauses.append(now - last)
        last = now
    worker.join()
    pauses.append(time.perf_counter() - last)
    return max(pauses) / calls[0]


# ---- after fork ----------------------------------------------------------------------------------------

def _child(problem, queue):
    before = _kernels.regions()
    queue.put((answer(problem, n_threads=2), _kernels.regions() - before))


@needs_fork
def test_forked_child_computes_and_does_not_hang(plan, share_small_work):
    """The parent has used its team of threads; they do not exist in the child."""
    problem = small_problem()
    want = answer(problem, n_threads=2)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with warnings.catch_warnings():  # Python 3.12 on: "may lead to deadlocks", which is the point
        warnings.simplefilter("ignore", DeprecationWarning)
        child = context.Process(target=_child, args=(problem, queue))
        child.start()
    try:
        got, regions = queue.get(timeout=60)
    finally:
        child.join(10)
        if child.is_alive():
            child.kill()
    assert got == want and regions == 0
    assert answer(problem, n_threads=2) == want  # and the parent goes on


@needs_fork
def test_blas_is_free_in_a_child_forked_while_another_thread_held_it():
    from threadpoolctl import threadpool_limits

    held, leave = threading.Event(), threading.Event()

    def hold():
        with one_blas_thread():
            held.set()
            leave.wait(30)

    with threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        other = threading.Thread(target=hold)
        other.start()
        assert held.wait(30)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)     # of forking beside threads
            child = os.fork()
        if child == 0:
            failed = True
            try:
                failed = blas_threads() != before or not lstmcore.info()["forked"]
            finally:
                os._exit(failed)
        leave.set()
        other.join(30)
        assert os.waitpid(child, 0)[1] == 0


@needs_fork
def test_forked_grandchildren_in_a_pool(share_small_work):
    problems = [small_problem(seed) for seed in range(4)]
    want = [answer(problem) for problem in problems]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map_async(answer, problems).get(60) == want


@pytest.mark.parametrize("backend", ["loky", "multiprocessing", "threading"])
def test_joblib(backend, share_small_work):
    joblib = pytest.importorskip("joblib")
    problems = [small_problem(seed) for seed in range(4)]
    want = [answer(problem) for problem in problems]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with joblib.parallel_config(backend, n_jobs=2):
            got = joblib.Parallel(timeout=120)(joblib.delayed(answer)(p) for p in problems)
    assert got == want


def test_child_of_spawn(share_small_work):
    problem = small_problem()
    want = answer(problem)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply_async(answer, (problem,)).get(120) == want
