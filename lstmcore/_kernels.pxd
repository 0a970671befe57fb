# The machine under the plans: the kernel tables in use, the parallel region, memory of arrays.

cimport numpy as cnp

from lstmcore._lstm cimport lstm_cell, lstm_kernels
from lstmcore._team cimport team_barrier, team_fn

cdef enum: MAX_TEAM = 1024

cdef const lstm_kernels *kernels_of(str format) except NULL
cdef str format_of(a)
cdef const lstm_cell *cell_of(const lstm_kernels *k, name)
cdef Py_ssize_t cache_bytes() noexcept nogil
cdef forced_plan()
cdef void run_team(int n, team_fn *fn, void *arg) noexcept nogil
cdef void wait(team_barrier *barrier, int size) noexcept nogil


cdef inline char *address(a):
    return NULL if a is None else <char *>cnp.PyArray_DATA(a)


cdef inline bint overlap(a, b):
    """Whether two contiguous arrays have memory in common."""
    cdef char *p = <char *>cnp.PyArray_DATA(a)
    cdef char *q = <char *>cnp.PyArray_DATA(b)
    return p < q + cnp.PyArray_NBYTES(b) and q < p + cnp.PyArray_NBYTES(a)
