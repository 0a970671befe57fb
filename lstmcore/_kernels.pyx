# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False
"""The machine under the plans: which kernels run, on how many threads, on what memory.

The one module that is linked with csrc/; the plans reach the kernels through the tables that it
hands out. No checks (checks.py), no plan (_forward.pyx, _backward.pyx, _dense.pyx), no maths (csrc/).
"""

cimport numpy as cnp

import os

import numpy as np

from lstmcore.threads import cpus, show_pool

from lstmcore._lstm cimport (lstm_cell, lstm_cell_of, lstm_isa, lstm_kernels, lstm_kernels_for,
                             lstm_l2_bytes)
from lstmcore._team cimport (team_barrier, team_fn, team_forked, team_has_openmp, team_regions,
                             team_run, team_set_cpus, team_wait)

cdef extern from *:
    """
    #if defined(__clang__)
    #define COMPILER "clang " __clang_version__
    #elif defined(__GNUC__)
    #define COMPILER "gcc " __VERSION__
    #else
    #define COMPILER "other"
    #endif
    """
    const char *COMPILER

cnp.import_array()
show_pool()

cdef bytes chosen = b""         # the instruction set in use
cdef Py_ssize_t L2_BYTES = lstm_l2_bytes()

plan = None                    # tests: force "tiles", "fused" (where it can be) or "blas"
last_plan = ("", 0, 0)         # tests: plan, row groups and unit slabs of the last call


def available_isas():
    """Names of the instruction sets that this CPU and build can run, best first."""
    names, k = [], 0
    while lstm_isa(k) != NULL:
        names.append(lstm_isa(k).decode())
        k += 1
    return names


def use_isa(name):
    """Choose the instruction set for all later calls; ValueError lists the available ones."""
    if name is not None and name not in available_isas():
        raise ValueError(f"instruction set must be one of {', '.join(available_isas())}, got {name!r}")
    global chosen
    chosen = (name or available_isas()[0]).encode()


def isa():
    """The instruction set in use."""
    return chosen.decode()


def compiler():
    """Name and version of the C compiler that built this."""
    return COMPILER.decode()


def has_openmp():
    return bool(team_has_openmp())


def is_forked():
    return bool(team_forked())


def share_cpus(int n):
    """Calls that run at once divide n CPUs among them; 0: each gets the threads that it asks for."""
    team_set_cpus(n)


def regions():
    """Parallel regions opened so far."""
    return team_regions()


# ---- for the plans -----------------------------------------------------------------------------------

cdef const lstm_kernels *kernels_of(str format) except NULL:
    """The kernels of a number format, of the instruction set in use."""
    cdef const lstm_kernels *k = lstm_kernels_for(chosen, format.encode())
    if k == NULL:
        raise ValueError(f"there are no {format} kernels for {isa()}")
    return k


cdef str format_of(a):
    """The number format of an array of floats or doubles."""
    return "float64" if cnp.PyArray_TYPE(a) == cnp.NPY_DOUBLE else "float32"


cdef const lstm_cell *cell_of(const lstm_kernels *k, name):
    """The row of a cell, or NULL."""
    return lstm_cell_of(k, name.encode())


cdef Py_ssize_t cache_bytes() noexcept nogil:
    return L2_BYTES


cdef forced_plan():
    return plan


cdef void run_team(int n, team_fn *fn, void *arg) noexcept nogil:
    team_run(n, fn, arg)


cdef void wait(team_barrier *barrier, int size) noexcept nogil:
    team_wait(barrier, size)


# ---- for the checks ----------------------------------------------------------------------------------

def fits(a, shape, bint is_double):
    """Whether a is a C-contiguous, aligned array of native floats or doubles of this shape, unmasked."""
    cdef int d
    cdef int number = <int>(cnp.NPY_DOUBLE if is_double else cnp.NPY_FLOAT)
    if not cnp.PyArray_Check(a) or cnp.PyArray_TYPE(a) != number:
        return False
    if not cnp.PyArray_CheckExact(a) and hasattr(a, "mask"):
        return False
    if cnp.PyArray_NDIM(a) != len(<tuple>shape) or not cnp.PyArray_ISCARRAY_RO(a):
        return False
    for d in range(cnp.PyArray_NDIM(a)):
        if cnp.PyArray_DIM(a, d) != <Py_ssize_t>(<tuple>shape)[d]:
            return False
    return True


def all_fit(pairs, bint is_double):
    """Whether every one of the (name, array, shape) fits, as above."""
    for _, a, shape in pairs:
        if not fits(a, shape, is_double):
            return False
    return True


def fit_to_update(written, read):
    """Whether arrays fit one another to be updated in place: like the first, apart, and writable."""
    cdef Py_ssize_t q, t
    first = written[0]
    if not cnp.PyArray_Check(first):
        return False
    arrays, is_double = (*written, *read), cnp.PyArray_TYPE(first) == cnp.NPY_DOUBLE
    for q in range(len(arrays)):
        if not fits(arrays[q], first.shape, is_double):
            return False
        if q < len(written) and not cnp.PyArray_ISWRITEABLE(arrays[q]):
            return False
        for t in range(q):
            if overlap(arrays[q], arrays[t]):
                return False
    return True


def layout(arrays):
    """Where arrays lie and how: equal as long as none moves or changes its shape, strides or dtype."""
    return [(<size_t>cnp.PyArray_DATA(a), a.shape, a.strides, a.dtype) for a in arrays]


def shares_memory(a, b):
    """Whether two contiguous arrays, or None, have memory in common."""
    return b is not None and overlap(a, b)


# ---- for tests ---------------------------------------------------------------------------------------

def _activation(x, bint tanh):
    out = np.empty_like(x)
    cdef const lstm_kernels *k = kernels_of(format_of(x))
    (k.tanh if tanh else k.sigmoid)(cnp.PyArray_SIZE(x), address(x), address(out))
    return out


def sigmoid(x):
    """The kernels' σ on a contiguous array."""
    return _activation(x, False)


def tanh(x):
    """The kernels' tanh on a contiguous array."""
    return _activation(x, True)


use_isa(os.environ.get("LSTMCORE_ISA") or None)
share_cpus(cpus())
