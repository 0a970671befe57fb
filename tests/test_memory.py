"""Memory: what a tape keeps, what inference does not, and that nothing grows with use."""

import sys

import numpy as np
import pytest
from problems import forward, lstm_problem, rnn_problem
from test_api import python

from lstmcore import functional
from lstmcore._memory import empty

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")

RESIDENT = """
import numpy as np, lstmcore
def kilobytes(name):
    with open('/proc/self/status') as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name))
"""


@pytest.mark.parametrize("dtype, item", [("float32", 4), ("float64", 8)])
def test_tape_keeps_five_numbers_per_unit_step_and_row(dtype, item):
    T, B, I, H = 7, 5, 3, 11
    tape = forward(functional, lstm_problem(T, B, I, H, dtype=dtype))[-1]
    assert tape.nbytes == 5 * H * T * B * item
    assert tape.raw_gates.nbytes + tape.raw_c.nbytes == tape.nbytes


def test_ragged_tape_keeps_the_real_tokens_only():
    T, B, I, H = 7, 5, 3, 11
    problem = lstm_problem(T, B, I, H, lengths="ragged")
    tape = forward(functional, problem)[-1]
    assert tape.nbytes == 5 * H * int(problem.options["lengths"].sum()) * 8


def test_rnn_tape_keeps_references_only():
    problem = rnn_problem(7, 5, 3, 11)
    y, _, tape = forward(functional, problem)
    assert tape.y is y and tape.x is problem.inputs["x"]


def test_tape_holds_contiguous_arguments_without_a_copy():
    problem = lstm_problem(7, 5, 3, 11)
    tape = forward(functional, problem)[-1]
    for kept, names in (tape.batch, ("x", "h0", "c0")), (tape.weights, ("W_ih", "W_hh")):
        for name in names:
            assert getattr(kept, name) is problem.inputs[name]


@needs_proc
@pytest.mark.parametrize("lengths", ["None", "[20000, 15000]"])
def test_inference_works_in_bounded_memory(lengths):
    """20,000 steps: the gates alone would be 82 MB; x and y together are 20 MB."""
    code, said = python(RESIDENT + f"""
T, B, I, H = 20000, 2, 1, 128
rng = np.random.default_rng(0)
x, W_ih, W_hh = (rng.standard_normal(s).astype('f4') for s in ((T, B, I), (4 * H, I), (4 * H, H)))
lstmcore.lstm_forward(x[:8], W_ih, W_hh, keep_tape=False)
before = kilobytes('VmRSS')
y, _, _ = lstmcore.lstm_forward(x, W_ih, W_hh, lengths={lengths}, keep_tape=False)
print(kilobytes('VmHWM') - before - y.nbytes // 1024)
""")
    assert code == 0, said
    assert int(said) < 6000, f"{said} kB beside x and y"


@needs_proc
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("gradients", [True, False])
def test_a_head_never_holds_all_logits(gradients, compute):
    """2,000 rows of 8,000 classes: 64 MB of logits, of which one block of 256 rows is 8 MB."""
    code, said = python(RESIDENT + f"""
from lstmcore.dense import linear_cross_entropy
x, W = (np.ones(shape, 'f4') for shape in ((2000, 16), (8000, 16)))
targets, weights = np.zeros(2000, int), np.ones(2000, 'f4')
into = np.ones_like(W), np.ones(8000, 'f4')
def call(n):
    return linear_cross_entropy(x[:n], W, None, targets[:n], weights[:n], gradients={gradients},
                                into=into if {gradients} else None, n_threads=2,
                                compute={compute!r})
call(2)
before = kilobytes('VmRSS')
call(2000)
print(kilobytes('VmHWM') - before)
""")
    assert code == 0, said
    assert int(said) < 16000, f"{said} kB beside the arguments"


@needs_proc
def test_resident_memory_does_not_grow_with_shapes():
    """2,000 training steps of random shapes; what a longer run needs, a shorter one needed too."""
    code, said = python(RESIDENT + """
rng = np.random.default_rng(0)
def train(times):
    for _ in range(times):
        T, B, I, H = rng.integers(1, 20, 4)
        x, W_ih, W_hh = (rng.standard_normal(s) for s in ((T, B, I), (4 * H, I), (4 * H, H)))
        ragged = rng.integers(0, T + 1, B) if rng.random() < 0.5 else None
        y, _, tape = lstmcore.lstm_forward(x, W_ih, W_hh, lengths=ragged)
        lstmcore.lstm_backward(tape, y)
train(500)
before = kilobytes('VmRSS')
train(2000)
print(kilobytes('VmRSS') - before)
""")
    assert code == 0, said
    assert int(said) < 2000, f"grew by {said} kB"


def test_large_arrays_begin_on_a_cache_line_and_lie_apart():
    sizes = [300_000 + 40_000 * n for n in range(12)]
    for order in sizes, sizes[::-1], sizes[::2] * 2:    # the later ones in memory of the earlier
        arrays = [empty((size,), np.dtype("f4")) for size in order]
        for n, a in enumerate(arrays):
            a.fill(n)
        assert all((a == n).all() and a.ctypes.data % 64 == 0 for n, a in enumerate(arrays))


def test_large_arrays_take_the_memory_of_earlier_ones_of_their_size():
    """Numbers that were left behind show which memory it is: beyond 32 MB malloc's is always zero."""
    code, said = python("""
import numpy as np
from lstmcore._memory import empty
large, small, f8 = (5_000_000,), (1_000_000,), np.dtype("f8")
a = empty(large, f8)
a.fill(7)
b = empty(large, f8)
print((b == 7).any())
del a
print((empty(large, f8) == 7).all(), (empty(small, f8) == 7).any())
""")
    assert code == 0 and said.split() == ["False", "True", "False"], said


@needs_proc
def test_few_blocks_wait_for_reuse():
    """Of 40 arrays of 4 MB that are gone, 16 stay."""
    code, said = python(RESIDENT + """
from lstmcore._memory import empty
before = kilobytes('VmRSS')
arrays = [empty((1 << 20,), np.dtype('f4')) for _ in range(40)]
for a in arrays:
    a.fill(1)
del a, arrays
print(kilobytes('VmRSS') - before)
""")
    assert code == 0 and 60_000 < int(said) < 80_000, said
