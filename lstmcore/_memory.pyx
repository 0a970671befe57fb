# cython: language_level=3, boundscheck=False, wraparound=False
"""Workspaces that calls hand to one another, and large arrays in the memory of earlier ones.

Nothing here knows what the memory is for.
"""

from libc.stdlib cimport free
cimport numpy as cnp

import numpy as np

cnp.import_array()

cdef extern from "pages.h" nogil:
    void *pages_malloc(size_t size)


cdef class Workspace:
    """A block of memory."""

    def __cinit__(self, size_t size):
        self.data = <char *>pages_malloc(size + 64)
        self.size = size
        if self.data == NULL:
            raise MemoryError(f"no {size} bytes for the workspace")

    def __dealloc__(self):
        free(self.data)


cdef list spare = []               # blocks that wait for reuse: a few, and not too large
cdef enum: SPARE_BLOCKS = 16
cdef size_t SPARE_BYTES = 512 << 20
cdef size_t SMALL = 1 << 20        # below it, malloc has its memory at hand


cdef Workspace best_spare(size_t size, size_t most):
    """The smallest spare block that is large enough, of at most `most` bytes, or a new one."""
    cdef Workspace w, best = None
    for w in spare:
        if size <= w.size <= most and (best is None or w.size < best.size):
            best = w
    if best is None:
        return Workspace(size + size // 8)
    spare.remove(best)
    return best


cdef Workspace take_workspace(size_t size):
    """A block of at least this size, for one call: however large, it comes back at once."""
    return best_spare(size, SPARE_BYTES)


cdef void give_back(Workspace w):
    """Keeps a block unless that makes too much; of too many, the smallest goes."""
    cdef Workspace other, smallest = w
    cdef size_t total = w.size
    for other in spare:
        total += other.size
        if other.size < smallest.size:
            smallest = other
    if total <= SPARE_BYTES:
        spare.append(w)
        if len(spare) > SPARE_BLOCKS:
            spare.remove(smallest)


cdef class Lent:
    """A block behind arrays; it is spare again when the last of them is gone."""
    cdef Workspace work

    def __init__(self, size_t size):
        self.work = best_spare(size, 2 * size)  # it may be kept for long: not a much larger one

    def __del__(self):
        if self.work is not None:
            give_back(self.work)


def empty(shape, dtype):
    """np.empty, for large arrays in memory that earlier ones had.

    Fresh memory would have to be cleared by the system in every call: 6 % of a training pass at
    (100,64,128,512) for the tape.
    """
    cdef cnp.npy_intp sizes[3]
    cdef size_t size = dtype.itemsize
    cdef int d, n = len(shape)
    cdef Lent block
    for d in range(n):
        sizes[d] = shape[d]
        size *= sizes[d]
    if size < SMALL:
        return np.empty(shape, dtype)
    block = Lent(size)
    a = cnp.PyArray_SimpleNewFromData(n, sizes, dtype.num, arena_of(block.work).base)
    cnp.set_array_base(a, block)
    return a
