"""Threads: how many, one parallel region per call, the BLAS pool, concurrent callers, fork."""

import multiprocessing
import os
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
], ids=str)
def test_environment_sets_the_default(environment, want):
    code, said = python("import lstmcore; print(lstmcore.get_num_threads())", **environment)
    if want == "affinity":
        available = hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0))
        want = str(available or os.cpu_count())
    assert want in said and (code == 0) == want.isdigit()


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

def test_eight_python_threads_at_once(plan, share_small_work):
    problems = [small_problem(seed) for seed in range(8)]
    want = [answer(problem, n_threads=1) for problem in problems]
    start = threading.Barrier(8, timeout=60)

    def work(k):
        start.wait()
        return all(answer(problems[k], n_threads=1 + k % 3) == want[k] for _ in range(10))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


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
