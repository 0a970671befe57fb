# Products: operands, and the two ways to multiply by them. See _products.pyx.

from lstmcore._kernels cimport team_fn
from lstmcore._lstm cimport lstm_kernels, lstm_operand, lstm_product, lstm_rows
from lstmcore._memory cimport Arena, Workspace, take


cdef struct Operand:               # the right side W[k, column] of products
    lstm_operand w
    Py_ssize_t cut                 # parts of its columns end at multiples of it
    Py_ssize_t lane_bytes          # bytes of a packed column: those of a vector divided by its lanes


cdef struct Part:                  # a thread's part of the columns, and its scratch
    int part, parts
    char *scratch


cdef struct Sums:                  # dW = daᵀ x of each product and db = Σ da over tokens,
    Py_ssize_t tokens, first, last # rows [first, last)
    const void **da
    int n_products
    const lstm_product *products
    bint add                       # to what dW and db hold
    char *db


cdef struct Widths:                # the longest operand row, and the most rows of a gradient: for scratch
    Py_ssize_t row, M


cdef struct Products:              # a way to multiply: a row of the table
    const char *name
    bint in_step                   # whether a cell's step multiplies by itself
    bint over_blas
    Py_ssize_t (*packed_bytes)(const lstm_kernels *k, const Operand *w) noexcept nogil
    void (*pack)(const lstm_kernels *k, const Operand *w, const Part *mine, int share,
                 int shares) noexcept nogil
    void (*multiply)(const lstm_kernels *k, const Operand *w, const Part *mine,
                     const lstm_rows *rows) noexcept nogil
    void (*add_up)(const lstm_kernels *k, const Sums *sums, const Part *mine) noexcept nogil
    Py_ssize_t (*scratch_bytes)(const lstm_kernels *k, const Widths *widths) noexcept nogil


cdef struct Engine:                # what computes: the kernels, and the products over them
    const lstm_kernels *k
    const Products *by


cdef struct Plan                   # what every plan begins with
ctypedef void plan_fn(Plan *plan) noexcept nogil
ctypedef void lay_out_fn(Plan *plan, Arena *arena) noexcept nogil
cdef struct Plan:
    Engine e
    int n_threads
    lay_out_fn *lay_out            # says what memory it needs; called twice
    plan_fn *prepare               # before the region
    team_fn *work                  # what each thread does


cdef int choose_engine(Engine *e, str format) except -1
cdef Operand operand(const lstm_kernels *k, int gates, W, bint transposed)
cdef Py_ssize_t lowered_stride(const lstm_kernels *k, Py_ssize_t K) noexcept nogil
cdef int run_plan(Plan *plan) except -1


cdef class Packed:
    cdef Workspace work
    cdef Engine e
    cdef Operand operands[3]
    cdef bint descending           # which way the next single step goes through them
    cdef readonly str cell, format
    cdef readonly tuple origin, shapes
    cdef readonly tuple quantized  # of format int8: the weights that it was made of


cdef inline void unit_range(Py_ssize_t N, Py_ssize_t cut, int part, int parts, Py_ssize_t *j0,
                            Py_ssize_t *j1) noexcept nogil:
    """Columns [j0, j1) of part of N columns, cut at multiples of `cut`."""
    cdef Py_ssize_t pieces = (N + cut - 1) // cut
    j0[0] = min(N, pieces * part // parts * cut)
    j1[0] = min(N, pieces * (part + 1) // parts * cut)


cdef inline char *packed_at(const lstm_kernels *k, const Operand *w, Py_ssize_t j0) noexcept nogil:
    """Where the panels of the columns from j0 on begin."""
    return <char *>w.w.packed + j0 * w.lane_bytes * w.w.gates


cdef inline const void *lowered(const lstm_kernels *k, Py_ssize_t K, const void *a, char *rows,
                                Py_ssize_t q, bint mine) noexcept nogil:
    """a (K) as products take it: itself, or lowered as row q of rows, by this thread if it is mine."""
    cdef char *row
    if k.lower == NULL or K == 0:
        return a
    row = rows + q * lowered_stride(k, K)
    if mine:
        k.lower(K, a, row)
    return row


cdef inline Py_ssize_t lowered_rows(const lstm_kernels *k, Py_ssize_t n) noexcept nogil:
    """Rows that n lowered ones have room for, as products may read them."""
    return (n + k.MR - 1) // k.MR * k.MR


cdef inline void lay_out_operand(const Plan *plan, Arena *arena, Operand *w) noexcept nogil:
    """Room to pack it, unless it is absent or packed already."""
    if w.w.W != NULL:
        w.w.packed = take(arena, plan.e.by.packed_bytes(plan.e.k, w))
