# The decisions of a plan, as pure functions of sizes, caches and threads: see _grid.pyx.

cdef struct Grid:                  # how the threads share the recurrent loop
    int rows, units                # row groups x unit slabs


cdef struct Loop:                  # what a decision depends on
    Py_ssize_t steps, rows         # of the batch
    Py_ssize_t vectors             # of hidden units
    Py_ssize_t tile_rows           # of a full tile
    Py_ssize_t input_bytes         # of W_ih
    Py_ssize_t recurrent_bytes     # of W_hh
    Py_ssize_t gate_bytes          # of a row of gates
    Py_ssize_t cache_bytes         # of a core's second level


cpdef Grid choose_grid(Loop loop, int team) noexcept nogil
cpdef bint choose_fused(Loop loop, int team) noexcept nogil
cpdef Py_ssize_t choose_chunk(Loop loop, bint fused) noexcept nogil
