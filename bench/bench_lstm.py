"""lstmcore on every case with pytest-benchmark: first verified against the reference, then timed.

    pytest bench                        all cases
    pytest bench -k "train and ptb"     some
    pytest bench --benchmark-disable    verify alone, on cases cut to four steps

Each result carries, in its extra_info: gflops, the matrix products per second; percent_of_peak of
the format's peak that bench.roofline measures for that number of threads; percent_of_gemm of the
rate at which NumPy's BLAS multiplies (T·B, I+H) by (I+H, 4H) in one piece, as if time had no order;
and bytes_saved, what training keeps for the backward pass beside x and y.
"""

import functools
import os
import time
from dataclasses import replace

import numpy as np
import pytest

import lstmcore
from bench import roofline
from bench.cases import (DENSE, PEEPHOLES, RAGGED, STREAM, TOLERANCE, WORDLM, errors,
                         expected, make_data, refusal)
from bench.peers import PEERS, Unsupported

THREADS = int(os.environ.get("LSTMCORE_NUM_THREADS", min(2, os.cpu_count())))
JOBS = [(case, job, "lstmcore")
        for case in (*DENSE, *RAGGED, PEEPHOLES) for job in ("train", "infer")]
JOBS += [(replace(case, dtype="float64"), "train", "lstmcore") for case in DENSE]
JOBS += [(STREAM, "stream", "lstmcore"), (WORDLM, "train", "lstmcore")]
JOBS += [(replace(case, weights="trained"), job, library)
         for library in ("lstmcore bf16", "lstmcore int8")
         for case in (*DENSE, STREAM) for job in PEERS[library].jobs
         if (case is STREAM) == (job == "stream")]


@pytest.mark.parametrize("case, job, library", JOBS, ids=lambda value: getattr(
    value, "dtype", None) and f"{value.name}-{value.dtype}" or value)
def bench_lstm(benchmark, case, job, library):
    """One case, as bench.compare runs it."""
    if benchmark.disabled:
        case = case.short()
    data = make_data(case, job)
    peer = PEERS[library](THREADS)
    try:
        run, collect = peer.prepare(case, job, data)
    except Unsupported as reason:
        pytest.skip(str(reason))
    found = errors(collect(run()), expected(case, job, data))
    assert refusal(found, peer.precision, case.dtype) is None
    benchmark.extra_info |= {"threads": THREADS, "error": found.largest, "rms": found.rms,
                             "bytes_saved": bytes_saved(case)}
    benchmark(run)
    if not benchmark.disabled:
        rate = case.flops(job) / benchmark.stats.stats.median / 1e9
        precision = case.dtype if peer.precision == "float32" else peer.precision
        peak = roofline.peak_gflops(THREADS, precision)
        benchmark.extra_info |= {"gflops": rate, "percent_of_peak": 100 * rate / peak,
                                 "percent_of_gemm": 100 * rate / gemm_gflops(case)}


def bench_call_overhead(benchmark):
    """The smallest call there is: T = B = 1, I = H = 8, inference."""
    rng = np.random.default_rng(8)
    x, W_ih, W_hh = (rng.uniform(-1, 1, shape).astype("float32")
                     for shape in ((1, 1, 8), (32, 8), (32, 8)))
    right = lstmcore.reference.lstm_forward(x, W_ih, W_hh)[0]
    found = benchmark(lambda: lstmcore.lstm_forward(x, W_ih, W_hh, keep_tape=False)[0])
    np.testing.assert_allclose(found, right, rtol=TOLERANCE["float32"], atol=0)


def bytes_saved(case):
    """gates and c of every step: what the tapes hold beside their x and y."""
    if case is STREAM or case.name == STREAM.name:
        return 0
    data = make_data(replace(case, V=0), "train")
    total, x = 0, data["x"]
    for layer, suffix, reverse in case.parts():
        if x.shape[2] != case.inputs(layer):
            x = np.zeros((case.T, case.B, case.inputs(layer)), case.dtype)
        _, _, tape = lstmcore.lstm_forward(
            x, data["weight_ih" + suffix], data["weight_hh" + suffix], lengths=data.get("lengths"),
            reverse=reverse)
        total += tape.gates.nbytes + tape.c.nbytes
    return total


def gemm_gflops(case):
    """The rate of one bare GEMM of the first layer's shape, at THREADS threads."""
    return _gemm_gflops(case.T * case.B, case.I + case.H, 4 * case.H, case.dtype)


@functools.lru_cache
def _gemm_gflops(rows, inner, columns, dtype):
    from threadpoolctl import threadpool_limits

    rng = np.random.default_rng(rows)
    a = rng.uniform(-1, 1, (rows, inner)).astype(dtype)
    b = rng.uniform(-1, 1, (columns, inner)).astype(dtype)
    out, times, end = np.empty((rows, columns), dtype), [], time.perf_counter() + 0.3
    with threadpool_limits(THREADS, user_api="blas"):
        while len(times) < 3 or time.perf_counter() < end:
            begin = time.perf_counter()
            np.matmul(a, b.T, out=out)
            times.append(time.perf_counter() - begin)
    return 2e-9 * rows * inner * columns / np.median(times)
