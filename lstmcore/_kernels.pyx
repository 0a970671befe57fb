# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False
"""The plans: who computes what, when, on which thread. No checks (functional.py), no maths (csrc/).

One call is one parallel region. Its threads form a grid of row groups x unit slabs: a thread runs the
time loop for the rows and hidden units that it owns. With one unit slab there is no barrier in the
loop at all; with more, the threads of a row group meet once per step. Which grid is used follows from
the shape and the size of the cache (`choose_grid`) and changes no bit of the result.

Rows and steps: row r is the r-th longest sequence (`order[r]` its place in the batch), so the rows
that are still running at step s are the first ones. Step s of a row is time s, or lengths-1-s in
reverse. A token is one (step, row); in the tape it lies at `start[s] + r`: a dense tape is (T, B), a
ragged one holds the real tokens only.

Letters: DESIGN of the arrays in lstmcore/reference.py; K is what the recurrent product sums over: the
width of h. G is the width of a row of pre-activations: 4H, or H for the vanilla RNN.
"""

from libc.stdint cimport int64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
cimport numpy as cnp

import os

import numpy as np

from lstmcore.threads import one_blas_thread

cdef extern from *:
    """
    #undef I  /* complex.h, which NumPy includes, claims the letter */
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

ctypedef void gemm_fn(bint, bint, bint, int, int, int, double, const void *, int, const void *, int,
                      double, void *, int) noexcept nogil


cdef extern from "lstm.h" nogil:
    ctypedef struct lstm_row:
        const void *h_prev
        const void *c_prev
        void *gates
        void *c
        void *h
    ctypedef struct lstm_back_row:
        const void *da_next
        void *gates
        const void *c
        const void *c_prev
        const void *dy
        void *dc
    ctypedef struct lstm_product:
        const void **x
        Py_ssize_t N
        void *dW
    enum: PANEL_PLAIN
    enum: PANEL_GATES
    enum: START_ZERO
    enum: START_BIAS
    enum: START_ADD
    ctypedef struct lstm_kernels:
        const char *isa
        int is_double
        Py_ssize_t VL
        Py_ssize_t MR
        void (*pack)(int, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t,
                     const void *, Py_ssize_t, Py_ssize_t, void *) noexcept nogil
        void (*gemm)(int, int, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t,
                     const void **, const void *, const void *, void **) noexcept nogil
        void (*lstm_step)(Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t,
                          const lstm_row *, const void *, const void *) noexcept nogil
        void (*lstm_back_step)(Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t,
                               const lstm_back_row *, const void *, const void *) noexcept nogil
        void (*weight_gradient)(Py_ssize_t, Py_ssize_t, Py_ssize_t, const void **, int,
                                const lstm_product *, void *, void *) noexcept nogil
        Py_ssize_t (*weight_gradient_work)(Py_ssize_t) noexcept nogil
        void (*peephole_gradient)(Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, const void **,
                                  const void **, const void **, void *) noexcept nogil
        void (*add_rows)(Py_ssize_t, Py_ssize_t, Py_ssize_t, const void **, void **) noexcept nogil
        void (*rnn_cell)(int, Py_ssize_t, Py_ssize_t, Py_ssize_t, void **) noexcept nogil
        void (*rnn_back_cell)(int, Py_ssize_t, Py_ssize_t, Py_ssize_t, const void **,
                              void **) noexcept nogil
        void (*cell_output)(Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, const void **,
                            const void **, void **) noexcept nogil
        void (*sigmoid)(Py_ssize_t, const void *, void *) noexcept nogil
        void (*tanh)(Py_ssize_t, const void *, void *) noexcept nogil
    const lstm_kernels *lstm_kernels_for(const char *isa, int is_double)
    const char *lstm_isa(int k)
    Py_ssize_t lstm_l2_bytes()

cdef extern from "team.h" nogil:
    ctypedef void team_fn(void *arg, int me, int team) noexcept nogil
    void team_run(int n, team_fn *fn, void *arg)
    ctypedef struct team_barrier:
        pass
    void team_wait(team_barrier *barrier, int size)
    long team_regions()
    int team_has_openmp()
    int team_forked()


# ---- the machine -----------------------------------------------------------------------------------

cdef const lstm_kernels *tables[2]
cdef Py_ssize_t L2_BYTES
cdef enum: BLAS_ROWS = 32      # every BLAS product has this many rows: a row's bits depend on no other
cdef enum: BLAS_COLUMNS = 64   # rows of a weight gradient per BLAS call, for the same reason
cdef enum: BLAS_TOKENS = 256
cdef enum: CHUNK_ROWS = 192    # rows per input projection: enough to reuse a panel, few enough for L2
cdef enum: MAX_TEAM = 1024

cdef gemm_fn *blas_gemm = NULL

plan = None                    # tests: force "tiles" or "blas"
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
    cdef bytes chosen = (name or available_isas()[0]).encode()
    tables[0] = lstm_kernels_for(chosen, 0)
    tables[1] = lstm_kernels_for(chosen, 1)


def isa():
    """The instruction set in use."""
    return tables[0].isa.decode()


def compiler():
    """Name and version of the C compiler that built this."""
    return COMPILER.decode()


def has_openmp():
    return bool(team_has_openmp())


def is_forked():
    return bool(team_forked())


def regions():
    """Parallel regions opened so far."""
    return team_regions()


def _activation(x, bint tanh):
    out = np.empty_like(x)
    cdef const lstm_kernels *k = tables[x.dtype == np.float64]
    cdef Py_ssize_t n = x.size
    (k.tanh if tanh else k.sigmoid)(n, address(x), address(out))
    return out


def sigmoid(x):
    """The kernels' σ on a contiguous array, for tests."""
    return _activation(x, False)


def tanh(x):
    """The kernels' tanh on a contiguous array, for tests."""
    return _activation(x, True)


def fits(a, shape, bint is_double):
    """Whether a is a C-contiguous, aligned array of native floats or doubles of this shape."""
    cdef int d
    cdef int number = <int>(cnp.NPY_DOUBLE if is_double else cnp.NPY_FLOAT)
    if not cnp.PyArray_Check(a) or cnp.PyArray_TYPE(a) != number:
        return False
    if cnp.PyArray_NDIM(a) != len(<tuple>shape) or not cnp.PyArray_ISCARRAY_RO(a):
        return False
    for d in range(cnp.PyArray_NDIM(a)):
        if cnp.PyArray_DIM(a, d) != <Py_ssize_t>(<tuple>shape)[d]:
            return False
    return True


cdef inline char *address(a):
    return NULL if a is None else <char *>cnp.PyArray_DATA(a)


# ---- memory ----------------------------------------------------------------------------------------

cdef class Workspace:
    """A block of memory that calls hand to one another."""
    cdef char *data
    cdef size_t size

    def __cinit__(self, size_t size):
        self.data = <char *>malloc(size + 64)
        self.size = size
        if self.data == NULL:
            raise MemoryError(f"no {size} bytes for the workspace")

    def __dealloc__(self):
        free(self.data)


cdef list spare = []               # blocks that wait for reuse: a few, and not too large
cdef enum: SPARE_BLOCKS = 4
cdef size_t SPARE_BYTES = 512 << 20
cdef size_t SMALL = 1 << 20        # below it, malloc has its memory at hand


cdef Workspace take_workspace(size_t size):
    """The smallest spare block that is large enough, or a new one."""
    cdef Workspace w, best = None
    for w in spare:
        if w.size >= size and (best is None or w.size < best.size):
            best = w
    if best is None:
        return Workspace(size + size // 8)
    spare.remove(best)
    return best


cdef void give_back(Workspace w):
    cdef Workspace other
    cdef size_t total = w.size
    for other in spare:
        total += other.size
    if total <= SPARE_BYTES:
        spare.append(w)
        if len(spare) > SPARE_BLOCKS:
            spare.sort(key=block_size)
            del spare[0]


def block_size(Workspace w):
    return w.size


cdef class Lent:
    """A block behind arrays; it is spare again when the last of them is gone."""
    cdef Workspace work

    def __init__(self, size_t size):
        self.work = take_workspace(size)

    def __del__(self):
        if self.work is not None:
            give_back(self.work)


def tape_arrays(Py_ssize_t tokens, Py_ssize_t H, dtype):
    """Arrays (tokens, 4H) and (tokens, H) for a tape, uninitialized.

    Fresh memory would have to be cleared by the system in every call: 6 % of a training pass at
    (100,64,128,512).
    """
    cdef size_t c_bytes = tokens * H * dtype.itemsize
    if 5 * c_bytes < SMALL:
        return np.empty((tokens, 4 * H), dtype), np.empty((tokens, H), dtype)
    cdef Lent block = Lent(5 * c_bytes + 128)
    cdef char *data = <char *>((<size_t>block.work.data + 63) & ~<size_t>63)
    return (lent_array(block, data, tokens, 4 * H, dtype),
            lent_array(block, data + ((4 * c_bytes + 63) & ~<size_t>63), tokens, H, dtype))


cdef lent_array(Lent block, void *data, Py_ssize_t rows, Py_ssize_t columns, dtype):
    cdef cnp.npy_intp shape[2]
    shape[0], shape[1] = rows, columns
    a = cnp.PyArray_SimpleNewFromData(2, shape, dtype.num, data)
    cnp.set_array_base(a, block)
    return a


cdef struct Arena:
    char *base                     # NULL: only count
    size_t used


cdef inline char *take(Arena *arena, size_t bytes) noexcept nogil:
    cdef char *p = arena.base + arena.used
    arena.used += (bytes + 63) & ~<size_t>63
    return p


# ---- a pass: everything a thread needs to know -----------------------------------------------------

cdef struct Operand:               # the right side W[k, column] of a product
    int panels
    Py_ssize_t K, N, H             # N columns (of one gate, if PANEL_GATES; H their distance)
    const char *W
    Py_ssize_t k_stride, col_stride
    char *packed


cdef struct Grid:
    int rows, units


cdef struct Pass:
    const lstm_kernels *k
    bint rnn, relu, ragged, reverse, keep, blas, prepacked
    Py_ssize_t T, B, I, H, K, G, item, steps, tokens
    int n_threads
    Grid grid
    Py_ssize_t chunk               # steps per input projection
    Operand ih, hh, hr
    # arrays of the caller; NULL where absent
    const char *x
    const int64_t *ids             # (T, B): token ids in place of x,
    const char *table              # with what each projects to: W_ihᵀ + b (I, G),
    char *dtable                   # and the gradient of that
    const char *b
    const char *h0
    const char *c0
    const char *peepholes
    char *y
    char *h_n
    char *c_n
    char *gates
    char *c
    const char *dy
    const char *dy_last            # (B, K): dy of each row's last step, plus dh_n
    char *dx
    char *dW_ih
    char *dW_hh
    char *db
    char *dpeepholes
    char *dh0
    char *dc0
    char *dW_hr
    # rows and steps
    const int64_t *order           # (B)
    const int64_t *lengths         # (B), descending
    Py_ssize_t *start              # (steps): tape index of the first token of a step
    Py_ssize_t *first              # (steps): tokens before a step, in the order of steps
    # workspace
    char *zeros                    # a row of zeros
    lstm_row *rows                 # (B)
    lstm_back_row *back_rows       # (B)
    char *m                        # (B, H) or, backward, (tokens, H): o ∘ tanh(c), with a projection
    char *dh                       # (tokens, K): gradient of h, with a projection; da of the RNN
    char *dm                       # (B, H)
    const void **a                 # row pointers for products, (2, chunk·B) or (2, tokens)
    void **C
    const void **da                # row pointers of all tokens
    const void **x_rows
    const void **h_prev
    const void **c_prev
    const void **c_rows
    const void **m_rows
    const void **dh_rows
    char *thread                   # scratch of each thread
    size_t thread_bytes
    team_barrier *barriers         # [0] all threads; [1 + g] row group g


cdef struct Rows:                  # the rows of a row group: first, first + stride, ... (n of them)
    Py_ssize_t first, stride, n


cdef inline Rows rows_of(const Pass *f, int group, int groups) noexcept nogil:
    """Neighbors if all are equally long (interleaved rows cost 1.2x at (50,50,128,128): each core
    prefetches the other's lines); dealt in turn, longest first, if not."""
    cdef Rows mine
    if f.ragged:
        mine.first, mine.stride = group, groups
        mine.n = (f.B - group + groups - 1) // groups
    else:
        mine.first, mine.stride = f.B * group // groups, 1
        mine.n = f.B * (group + 1) // groups - mine.first
    return mine


cdef inline Py_ssize_t active(const Pass *f, Py_ssize_t s, const Rows *mine,
                              Py_ssize_t guess) noexcept nogil:
    """How many of the rows run at step s; guess >= the answer."""
    while guess > 0 and f.lengths[mine.first + (guess - 1) * mine.stride] <= s:
        guess -= 1
    return guess


cdef inline Py_ssize_t place(const Pass *f, Py_ssize_t s, Py_ssize_t r) noexcept nogil:
    """Where step s of row r lies in a (T, B) array."""
    return (f.lengths[r] - 1 - s if f.reverse else s) * f.B + f.order[r]


cdef inline void unit_range(Py_ssize_t N, Py_ssize_t VL, int part, int parts, Py_ssize_t *j0,
                            Py_ssize_t *j1) noexcept nogil:
    """Columns [j0, j1) of part of N columns, cut between vectors."""
    cdef Py_ssize_t vectors = (N + VL - 1) // VL
    j0[0] = min(N, vectors * part // parts * VL)
    j1[0] = min(N, vectors * (part + 1) // parts * VL)


cdef Grid choose_grid(const Pass *f, int team) noexcept nogil:
    """Row groups x unit slabs for the recurrent loop.

    Rows alone need no barrier, but then every thread reads all of W_hh in every step; that is right
    while it stays in its second-level cache, or while there are rows enough to hide the reading.
    """
    cdef Grid grid
    cdef Py_ssize_t weights = f.G * f.K * f.item
    cdef Py_ssize_t vectors = (f.H + f.k.VL - 1) // f.k.VL
    grid.units = 1
    # plain panels are counted from the first column of a slab: packed ahead, there is one slab
    if not f.blas and not (f.prepacked and (f.rnn or f.hr.W != NULL)):
        while grid.units < team and weights // grid.units > L2_BYTES * 3 // 4 \
                and f.B < 32 * f.k.MR * team // grid.units:
            grid.units += 1
        if f.B < team // grid.units:
            grid.units = team // <int>max(1, f.B)
        while team % grid.units:
            grid.units += 1
        grid.units = <int>min(grid.units, vectors)
    grid.rows = <int>min(team // grid.units, f.B)
    return grid


cdef inline bint choose_blas(const Pass *f):
    """BLAS instead of the tiles: only where the tiles have no FMA and the products are large."""
    if plan is not None:
        return plan == "blas"
    return f.k.VL * f.item <= 16 and f.k.MR == 2 and f.G * f.K >= 128 * 128 and f.B >= 16


# ---- products --------------------------------------------------------------------------------------

cdef void pack(const Pass *f, const Operand *w, int part, int parts, int share,
               int shares) noexcept nogil:
    """Packs a share of the panels of the columns of one part."""
    cdef Py_ssize_t j0, j1, panels, width = f.k.VL * (1 if w.panels == PANEL_GATES else 4)
    if f.blas or share >= shares:
        return
    unit_range(w.N, f.k.VL, part, parts, &j0, &j1)
    panels = (j1 - j0 + width - 1) // width
    f.k.pack(w.panels, w.K, w.H, j0, j1, panels * share // shares, panels * (share + 1) // shares,
             w.W, w.k_stride, w.col_stride, packed_at(f, w, j0))


cdef inline char *packed_at(const Pass *f, const Operand *w, Py_ssize_t j0) noexcept nogil:
    return w.packed + j0 * w.K * f.item * (4 if w.panels == PANEL_GATES else 1)


cdef size_t packed_bytes(const Pass *f, const Operand *w) noexcept nogil:
    cdef Py_ssize_t vectors = (w.N + f.k.VL - 1) // f.k.VL
    return 0 if f.blas else vectors * f.k.VL * w.K * f.item * (4 if w.panels == PANEL_GATES else 1)


cdef void multiply(const Pass *f, const Operand *w, int part, int parts, int start, Py_ssize_t n,
                   const void **a, const char *bias, void **C, char *scratch) noexcept nogil:
    """C[r] = start + a[r] W on the columns of one part, for n rows."""
    cdef Py_ssize_t j0, j1, r, r0, j, m, N
    cdef char *A = scratch
    cdef char *out
    cdef bint transposed = w.k_stride == 1 and w.col_stride >= w.K
    if not f.blas:
        unit_range(w.N, f.k.VL, part, parts, &j0, &j1)
        f.k.gemm(w.panels, start, n, w.K, w.H, j0, j1, a, packed_at(f, w, j0), bias, C)
        return
    N = 4 * w.N if w.panels == PANEL_GATES else w.N
    out = A + BLAS_ROWS * w.K * f.item
    r0 = -BLAS_ROWS
    while r0 + BLAS_ROWS < n:
        r0 += BLAS_ROWS
        m = min(<Py_ssize_t>BLAS_ROWS, n - r0)
        for r in range(m):
            memcpy(A + r * w.K * f.item, a[r0 + r], w.K * f.item)
            if start == START_ADD:
                memcpy(out + r * N * f.item, C[r0 + r], N * f.item)
            elif start == START_BIAS:
                memcpy(out + r * N * f.item, bias, N * f.item)
            else:
                memset(out + r * N * f.item, 0, N * f.item)
        memset(A + m * w.K * f.item, 0, (BLAS_ROWS - m) * w.K * f.item)
        # out = out + A W        (32,N) (32,K) (K,N)
        blas_gemm(f.k.is_double, False, transposed, BLAS_ROWS, <int>N, <int>w.K, 1.0, A, <int>w.K,
                  w.W, <int>(w.col_stride if transposed else w.k_stride), 1.0, out, <int>N)
        for r in range(m):
            memcpy(C[r0 + r], out + r * N * f.item, N * f.item)


cdef size_t multiply_bytes(const Pass *f) noexcept nogil:
    """Scratch of a product: no operand is deeper or wider than G, I, H or K."""
    return 2 * BLAS_ROWS * max(f.G, max(f.I, f.K)) * f.item if f.blas else 0


cdef void weight_gradient(const Pass *f, Py_ssize_t M, const void **da, int n_products,
                          const lstm_product *products, char *db, char *scratch, int me,
                          int team) noexcept nogil:
    """dW (M,N) = daᵀ x of each product and db = Σ da; this thread owns a share of the M rows."""
    cdef Py_ssize_t cut = BLAS_COLUMNS if f.blas else f.k.MR
    cdef Py_ssize_t tiles = (M + cut - 1) // cut
    cdef Py_ssize_t t0 = tiles * me // team, t1 = tiles * (me + 1) // team, t, q
    if t0 == t1:
        return
    if not f.blas:
        f.k.weight_gradient(f.tokens, t0 * cut, min(M, t1 * cut), da, n_products, products, db,
                            scratch)
        return
    for t in range(t0, t1):
        if db != NULL:
            f.k.weight_gradient(f.tokens, t * cut, min(M, (t + 1) * cut), da, 0, NULL, db, scratch)
        for q in range(n_products):
            blas_weight_gradient(f, t * cut, min(M, (t + 1) * cut), da, &products[q], scratch)


cdef void blas_weight_gradient(const Pass *f, Py_ssize_t m0, Py_ssize_t m1, const void **da,
                               const lstm_product *product, char *scratch) noexcept nogil:
    """Rows [m0, m1) of one gradient, in blocks of BLAS_TOKENS."""
    cdef Py_ssize_t k, k0 = 0, kn, m = m1 - m0, N = product.N
    cdef char *A = scratch
    cdef char *X = A + BLAS_TOKENS * BLAS_COLUMNS * f.item
    while k0 < f.tokens:
        kn = min(<Py_ssize_t>BLAS_TOKENS, f.tokens - k0)
        for k in range(kn):
            memcpy(A + k * m * f.item, <char *>da[k0 + k] + m0 * f.item, m * f.item)
            memcpy(X + k * N * f.item, product.x[k0 + k], N * f.item)
        # dW[m0:m1] += Aᵀ X        (m,N) (kn,m)ᵀ (kn,N)
        blas_gemm(f.k.is_double, True, False, <int>m, <int>N, <int>kn, 1.0, A, <int>m, X, <int>N,
                  1.0 if k0 else 0.0, <char *>product.dW + m0 * N * f.item, <int>N)
        k0 += kn


cdef size_t weight_gradient_bytes(const Pass *f) noexcept nogil:
    cdef size_t blas = BLAS_TOKENS * (BLAS_COLUMNS + max(f.I, max(f.H, f.K))) * f.item
    return max(blas, <size_t>f.k.weight_gradient_work(max(f.G, f.K)))


# ---- rows and steps --------------------------------------------------------------------------------

cdef void lay_out_rows(Pass *f, Arena *arena) noexcept nogil:
    f.start = <Py_ssize_t *>take(arena, f.steps * sizeof(Py_ssize_t))
    f.first = <Py_ssize_t *>take(arena, f.steps * sizeof(Py_ssize_t))
    if not f.ragged:
        f.order = <int64_t *>take(arena, f.B * sizeof(int64_t))
        f.lengths = <int64_t *>take(arena, f.B * sizeof(int64_t))


cdef void number_tokens(Pass *f) noexcept nogil:
    cdef Py_ssize_t s, r, n = f.B, tokens = 0
    cdef Rows all_rows = rows_of(f, 0, 1)
    memset(f.zeros, 0, max(f.H, f.K) * f.item)
    memset(f.barriers, 0, (f.n_threads + 1) * sizeof(team_barrier))
    if not f.ragged:
        for r in range(f.B):
            (<int64_t *>f.order)[r] = r
            (<int64_t *>f.lengths)[r] = f.T
    for s in range(f.steps):
        n = active(f, s, &all_rows, n)
        f.first[s] = tokens
        f.start[s] = tokens if f.ragged else (f.T - 1 - s if f.reverse else s) * f.B
        tokens += n


# ---- forward ---------------------------------------------------------------------------------------

cdef void lay_out_forward(Pass *f, Arena *arena) noexcept nogil:
    f.zeros = take(arena, max(f.H, f.K) * f.item)
    lay_out_rows(f, arena)
    f.barriers = <team_barrier *>take(arena, (f.n_threads + 1) * sizeof(team_barrier))
    f.rows = <lstm_row *>take(arena, f.n_threads * f.B * sizeof(lstm_row))
    f.a = <const void **>take(arena, f.n_threads * f.chunk * f.B * sizeof(void *))
    f.C = <void **>take(arena, f.n_threads * f.chunk * f.B * sizeof(void *))
    if not f.prepacked:
        lay_out_weights(f, arena)
    if f.hr.W != NULL:
        f.m = take(arena, f.B * f.H * f.item)
    if not f.keep and not f.rnn:
        f.gates = take(arena, f.chunk * f.B * f.G * f.item)
    f.thread_bytes = multiply_bytes(f)
    f.thread = take(arena, f.n_threads * f.thread_bytes)


cdef void lay_out_weights(Pass *f, Arena *arena) noexcept nogil:
    f.ih.packed = take(arena, packed_bytes(f, &f.ih))
    f.hh.packed = take(arena, packed_bytes(f, &f.hh))
    if f.hr.W != NULL:
        f.hr.packed = take(arena, packed_bytes(f, &f.hr))


cdef void pack_weights(const Pass *f, const Grid *grid, int group, int slab) noexcept nogil:
    """Packs this thread's share of the weights of its slab of units."""
    if group >= grid.rows or f.prepacked:
        return
    pack(f, &f.ih, slab, grid.units, group, grid.rows)
    pack(f, &f.hh, slab, grid.units, group, grid.rows)
    if f.hr.W != NULL:
        pack(f, &f.hr, slab, grid.units, group, grid.rows)


cdef void forward(void *arg, int me, int team) noexcept nogil:
    cdef Pass *f = <Pass *>arg
    cdef Grid grid = choose_grid(f, team)
    cdef int group = me // grid.units, slab = me % grid.units
    if me == 0:
        f.grid = grid
    pack_weights(f, &grid, group, slab)
    team_wait(&f.barriers[0], team)
    if group < grid.rows:
        forward_rows(f, group, grid.rows, slab, grid.units, f.thread + me * f.thread_bytes,
                     f.rows + me * f.B, f.a + me * f.chunk * f.B, f.C + me * f.chunk * f.B)


cdef void forward_rows(Pass *f, int group, int groups, int slab, int slabs, char *scratch,
                       lstm_row *rows, const void **a, void **C) noexcept nogil:
    """The time loop for the rows of a group and one slab of their units.

    The threads of a group fill the same rows with the same values: each writes its own copy.
    """
    cdef Py_ssize_t s0, s, q, r, at, token, n, count, j0, j1
    cdef Rows mine = rows_of(f, group, groups)
    cdef Py_ssize_t running = mine.n
    cdef Py_ssize_t row_x = f.I * f.item, row_h = f.K * f.item, row_c = f.H * f.item
    cdef Py_ssize_t row_g = f.G * f.item
    cdef team_barrier *barrier = &f.barriers[1 + group]
    cdef bint projected = f.hr.W != NULL
    unit_range(f.H, f.k.VL, slab, slabs, &j0, &j1)
    for q in range(mine.n):
        r = f.order[mine.first + q * mine.stride]
        rows[q].h_prev = f.h0 + r * row_h if f.h0 != NULL else f.zeros
        rows[q].c_prev = f.c0 + r * row_c if f.c0 != NULL else f.zeros
    s0 = -f.chunk
    while s0 + f.chunk < f.steps:
        s0 += f.chunk
        # a = x W_ihᵀ + b        (n,I) (I,G) for all steps of the chunk
        count, n = 0, running
        for s in range(s0, min(f.steps, s0 + f.chunk)):
            n = active(f, s, &mine, n)
            for q in range(n):
                r = mine.first + q * mine.stride
                at = place(f, s, r)
                a[count] = f.x + at * row_x if f.ids == NULL else f.table + f.ids[at] * row_g
                if f.rnn:
                    C[count] = f.y + at * row_h
                else:
                    C[count] = f.gates + (f.start[s] + r if f.keep else (s - s0) * f.B + r) * row_g
                count += 1
        if f.ids != NULL:
            for q in range(count):
                copy_units(f, C[q], <const char *>a[q], j0, j1)
        else:
            multiply(f, &f.ih, slab, slabs, START_BIAS if f.b != NULL else START_ZERO, count, a, f.b,
                     C, scratch)
        for s in range(s0, min(f.steps, s0 + f.chunk)):
            running = active(f, s, &mine, running)
            for q in range(running):
                r = mine.first + q * mine.stride
                token = f.start[s] + r
                rows[q].h = f.y + place(f, s, r) * row_h
                if not f.rnn:
                    rows[q].gates = f.gates + (token if f.keep else (s - s0) * f.B + r) * row_g
                    rows[q].c = f.c + token * row_c if f.keep else f.c_n + f.order[r] * row_c
                if projected:
                    rows[q].h = f.m + r * row_c
            step(f, s, running, j0, j1, slab, slabs, rows, a, C, scratch)
            if projected:  # h = (o ∘ tanh(c)) W_hrᵀ        (n,H) (H,P)
                team_wait(barrier, slabs)
                for q in range(running):
                    a[q] = rows[q].h
                    C[q] = rows[q].h = f.y + place(f, s, mine.first + q * mine.stride) * row_h
                multiply(f, &f.hr, slab, slabs, START_ZERO, running, a, NULL, C, scratch)
            for q in range(running):
                rows[q].h_prev = rows[q].h
                rows[q].c_prev = rows[q].c
            team_wait(barrier, slabs)
    if slab == 0:
        for q in range(mine.n):
            r = f.order[mine.first + q * mine.stride]
            memcpy(f.h_n + r * row_h, rows[q].h_prev, row_h)
            if not f.rnn and rows[q].c_prev != f.c_n + r * row_c:
                memcpy(f.c_n + r * row_c, rows[q].c_prev, row_c)


cdef inline void copy_units(const Pass *f, void *out, const char *row, Py_ssize_t j0,
                            Py_ssize_t j1) noexcept nogil:
    """The pre-activations of the units [j0, j1), all gates."""
    cdef Py_ssize_t gate
    for gate in range(f.G // f.H):
        memcpy(<char *>out + (gate * f.H + j0) * f.item, row + (gate * f.H + j0) * f.item,
               (j1 - j0) * f.item)


cdef inline void step(const Pass *f, Py_ssize_t s, Py_ssize_t n, Py_ssize_t j0, Py_ssize_t j1,
                      int slab, int slabs, lstm_row *rows, const void **a, void **C,
                      char *scratch) noexcept nogil:
    """One step of n rows on one slab of units: a += h_prev W_hhᵀ, then the cell."""
    cdef bint from_zero = s == 0 and f.h0 == NULL
    cdef Py_ssize_t q
    if f.rnn or f.blas:
        for q in range(n):
            a[q] = rows[q].h_prev
            C[q] = rows[q].h if f.rnn else rows[q].gates
        if not from_zero:
            multiply(f, &f.hh, slab, slabs, START_ADD, n, a, NULL, C, scratch)
        if f.rnn:
            f.k.rnn_cell(f.relu, n, j0, j1, C)
        else:
            f.k.lstm_step(n, 0, f.H, j0, j1, rows, NULL, f.peepholes)
    else:
        f.k.lstm_step(n, 0 if from_zero else f.K, f.H, j0, j1, rows, packed_at(f, &f.hh, j0),
                      f.peepholes)


# ---- backward --------------------------------------------------------------------------------------

cdef void lay_out_backward(Pass *f, Arena *arena) noexcept nogil:
    cdef size_t pointers = f.tokens * sizeof(void *)
    f.zeros = take(arena, max(f.H, f.K) * f.item)
    lay_out_rows(f, arena)
    f.barriers = <team_barrier *>take(arena, (f.n_threads + 1) * sizeof(team_barrier))
    f.back_rows = <lstm_back_row *>take(arena, f.n_threads * f.B * sizeof(lstm_back_row))
    f.a = <const void **>take(arena, f.n_threads * f.B * sizeof(void *))
    f.C = <void **>take(arena, max(f.n_threads * f.B * sizeof(void *), pointers))
    f.da = <const void **>take(arena, pointers)
    f.x_rows = <const void **>take(arena, pointers)
    f.h_prev = <const void **>take(arena, pointers)
    if not f.rnn:
        f.c_prev = <const void **>take(arena, pointers)
        f.c_rows = <const void **>take(arena, pointers)
    f.ih.packed = take(arena, packed_bytes(f, &f.ih) if f.dx != NULL else 0)
    f.hh.packed = take(arena, packed_bytes(f, &f.hh))
    if f.rnn:
        f.gates = take(arena, f.tokens * f.G * f.item)
    if f.hr.W != NULL:
        f.hr.packed = take(arena, packed_bytes(f, &f.hr))
        f.m = take(arena, f.tokens * f.H * f.item)
        f.dh = take(arena, f.tokens * f.K * f.item)
        f.m_rows = <const void **>take(arena, pointers)
        f.dh_rows = <const void **>take(arena, pointers)
        f.dm = take(arena, f.B * f.H * f.item)
    elif f.blas and not f.rnn:
        f.dh = take(arena, f.B * f.K * f.item)
    f.thread_bytes = max(weight_gradient_bytes(f), multiply_bytes(f))
    f.thread_bytes = (f.thread_bytes + 63) & ~<size_t>63
    f.thread = take(arena, f.n_threads * f.thread_bytes)


cdef void backward(void *arg, int me, int team) noexcept nogil:
    cdef Pass *f = <Pass *>arg
    cdef Grid grid = choose_grid(f, team)
    cdef int group = me // grid.units, slab = me % grid.units
    cdef bint idle = group >= grid.rows
    cdef char *scratch = f.thread + me * f.thread_bytes
    cdef Py_ssize_t j0, j1
    cdef lstm_product products[3]
    if me == 0:
        f.grid = grid
    list_tokens(f, me, team)
    if not idle:
        pack(f, &f.hh, slab, grid.units, group, grid.rows)
        if f.hr.W != NULL:
            pack(f, &f.hr, slab, grid.units, group, grid.rows)
    if f.dx != NULL:
        pack(f, &f.ih, 0, 1, me, team)
    team_wait(&f.barriers[0], team)
    if not idle:
        backward_rows(f, group, grid.rows, slab, grid.units, scratch, f.back_rows + me * f.B,
                      f.a + me * f.B, f.C + me * f.B)
    team_wait(&f.barriers[0], team)
    # what has no recurrence, over all tokens at once
    if f.dx != NULL:
        input_gradient(f, me, team, scratch)
    products[0].x, products[0].N, products[0].dW = f.h_prev, f.K, f.dW_hh
    products[1].x, products[1].N, products[1].dW = f.x_rows, f.I, f.dW_ih
    products[2].x, products[2].N, products[2].dW = f.m_rows, f.H, f.dW_hr
    weight_gradient(f, f.G, f.da, 2 if f.ids == NULL else 1, products, f.db, scratch, me, team)
    if f.ids != NULL:  # dtable[id] += da
        unit_range(f.G, f.k.VL, me, team, &j0, &j1)
        f.k.add_rows(f.tokens, j0, j1, f.da, <void **>f.x_rows)
    if f.dpeepholes != NULL:
        unit_range(f.H, f.k.VL, me, team, &j0, &j1)
        f.k.peephole_gradient(f.tokens, f.H, j0, j1, f.da, f.c_prev, f.c_rows, f.dpeepholes)
    if f.hr.W != NULL:
        weight_gradient(f, f.K, f.dh_rows, 1, products + 2, NULL, scratch, me, team)


cdef void list_tokens(Pass *f, int me, int team) noexcept nogil:
    """Row pointers of every token, for the products over time; tokens are in the order of steps."""
    cdef Py_ssize_t s, r, n, k, at, before
    cdef Rows all_rows = rows_of(f, 0, 1)
    cdef Py_ssize_t row_h = f.K * f.item, row_c = f.H * f.item
    n, k = f.B, 0
    for s in range(f.steps):
        n = active(f, s, &all_rows, n)
        if s % team == me:
            for r in range(n):
                at = place(f, s, r)
                if f.ids == NULL:
                    f.x_rows[k + r] = f.x + at * f.I * f.item
                else:
                    f.x_rows[k + r] = f.dtable + f.ids[at] * f.G * f.item
                f.da[k + r] = f.gates + (f.start[s] + r) * f.G * f.item
                before = place(f, s - 1, r)
                if s > 0:
                    f.h_prev[k + r] = f.y + before * row_h
                else:
                    f.h_prev[k + r] = f.h0 + f.order[r] * row_h if f.h0 != NULL else f.zeros
                if f.hr.W != NULL:
                    f.m_rows[k + r] = f.m + (k + r) * row_c
                    f.dh_rows[k + r] = f.dh + (k + r) * row_h
                if not f.rnn:
                    f.c_rows[k + r] = f.c + (f.start[s] + r) * row_c
                    if s > 0:
                        f.c_prev[k + r] = f.c + (f.start[s - 1] + r) * row_c
                    else:
                        f.c_prev[k + r] = f.c0 + f.order[r] * row_c if f.c0 != NULL else f.zeros
        k += n


cdef void backward_rows(Pass *f, int group, int groups, int slab, int slabs, char *scratch,
                        lstm_back_row *rows, const void **a, void **C) noexcept nogil:
    """The time loop, last step first, for the rows of a group and one slab of their units."""
    cdef Py_ssize_t s, q, r, at, j0, j1, p0, p1, n, going_on = 0
    cdef Rows mine = rows_of(f, group, groups)
    cdef Py_ssize_t row_h = f.K * f.item, row_c = f.H * f.item, row_g = f.G * f.item
    cdef team_barrier *barrier = &f.barriers[1 + group]
    cdef lstm_back_row *row
    unit_range(f.H, f.k.VL, slab, slabs, &j0, &j1)
    unit_range(f.K, f.k.VL, slab, slabs, &p0, &p1)
    for s in range(f.steps - 1, -1, -1):
        n = active(f, s, &mine, mine.n)  # of these, the first `going_on` have a step s + 1
        for q in range(n):
            r = mine.first + q * mine.stride
            at = f.start[s] + r
            row = &rows[q]
            row.gates = f.gates + at * row_g
            if q < going_on:
                row.da_next = f.gates + (f.start[s + 1] + r) * row_g
            row.dy = f.dy + place(f, s, r) * row_h
            if f.dy_last != NULL and q >= going_on:
                row.dy = f.dy_last + f.order[r] * row_h
            if not f.rnn:
                row.c = f.c + at * row_c
                row.dc = f.dc0 + f.order[r] * row_c
                if s > 0:
                    row.c_prev = f.c + (f.start[s - 1] + r) * row_c
                else:
                    row.c_prev = f.c0 + f.order[r] * row_c if f.c0 != NULL else f.zeros
        if f.rnn or f.blas or f.hr.W != NULL:
            back_step(f, s, n, going_on, &mine, barrier, slab, slabs, rows, a, C, scratch)
        else:
            f.k.lstm_back_step(going_on, f.G, f.H, j0, j1, rows, packed_at(f, &f.hh, j0),
                               f.peepholes)
            f.k.lstm_back_step(n - going_on, 0, f.H, j0, j1, rows + going_on, NULL, f.peepholes)
        going_on = n
        team_wait(barrier, slabs)
    # dh0 = da_0 W_hh        (n,G) (G,K)
    for q in range(going_on):
        r = mine.first + q * mine.stride
        a[q] = f.gates + (f.start[0] + r) * row_g
        C[q] = f.dh0 + f.order[r] * row_h
    multiply(f, &f.hh, slab, slabs, START_ZERO, going_on, a, NULL, C, scratch)


cdef void back_step(Pass *f, Py_ssize_t s, Py_ssize_t n, Py_ssize_t going_on, const Rows *mine,
                    team_barrier *barrier, int slab, int slabs, lstm_back_row *rows, const void **a,
                    void **C, char *scratch) noexcept nogil:
    """One step whose product and cell are not one tile: RNN, BLAS, projection."""
    cdef Py_ssize_t q, r, j0, j1, p0, p1, row_h = f.K * f.item
    cdef bint projected = f.hr.W != NULL
    unit_range(f.H, f.k.VL, slab, slabs, &j0, &j1)
    unit_range(f.K, f.k.VL, slab, slabs, &p0, &p1)
    for q in range(n):  # dh = dy + da_next W_hh        (n,G) (G,K)
        r = mine.first + q * mine.stride
        a[q] = rows[q].da_next
        if f.rnn:
            C[q] = rows[q].gates
        else:
            C[q] = f.dh + (f.first[s] + r if projected else r) * row_h
        memcpy(<char *>C[q] + p0 * f.item, <const char *>rows[q].dy + p0 * f.item,
               (p1 - p0) * f.item)
        rows[q].dy = C[q]
    multiply(f, &f.hh, slab, slabs, START_ADD, going_on, a, NULL, C, scratch)
    if f.rnn:
        for q in range(n):
            a[q] = f.y + place(f, s, mine.first + q * mine.stride) * row_h
        f.k.rnn_back_cell(f.relu, n, j0, j1, a, C)
        return
    if projected:  # m for dW_hr, before the gates become da;  dm = dh W_hr        (n,P) (P,H)
        team_wait(barrier, slabs)
        for q in range(n):
            r = mine.first + q * mine.stride
            f.k.cell_output(1, f.H, j0, j1, <const void **>&rows[q].gates, &rows[q].c,
                            <void **>&f.m_rows[f.first[s] + r])
            a[q] = C[q]
            C[q] = f.dm + (mine.first + q * mine.stride) * f.H * f.item
            rows[q].dy = C[q]
        multiply(f, &f.hr, slab, slabs, START_ZERO, n, a, NULL, C, scratch)
    f.k.lstm_back_step(n, 0, f.H, j0, j1, rows, NULL, f.peepholes)


cdef void input_gradient(Pass *f, int me, int team, char *scratch) noexcept nogil:
    """dx = da W_ih        (n,G) (G,I), for a share of the tokens."""
    cdef Py_ssize_t k0 = f.tokens * me // team, k1 = f.tokens * (me + 1) // team, k
    for k in range(k0, k1):
        f.C[k] = f.dx + (<const char *>f.x_rows[k] - f.x)
    multiply(f, &f.ih, 0, 1, START_ZERO, k1 - k0, f.da + k0, NULL, f.C + k0, scratch)


# ---- a dense layer: the same products without a recurrence ------------------------------------------
# It shares the letters of a pass: x (tokens, I), W_ih (G, I), y (tokens, G), da = dy.

cdef void lay_out_linear(Pass *f, Arena *arena) noexcept nogil:
    cdef size_t pointers = f.tokens * sizeof(void *)
    lay_out_rows(f, arena)
    f.zeros = take(arena, max(f.H, f.K) * f.item)
    f.barriers = <team_barrier *>take(arena, (f.n_threads + 1) * sizeof(team_barrier))
    f.x_rows = <const void **>take(arena, pointers)
    f.da = <const void **>take(arena, pointers)
    f.C = <void **>take(arena, pointers)
    f.ih.packed = take(arena, packed_bytes(f, &f.ih) if f.ih.W != NULL else 0)
    f.thread_bytes = max(weight_gradient_bytes(f), multiply_bytes(f))
    f.thread_bytes = (f.thread_bytes + 63) & ~<size_t>63
    f.thread = take(arena, f.n_threads * f.thread_bytes)


cdef void linear_forward(void *arg, int me, int team) noexcept nogil:
    cdef Pass *f = <Pass *>arg
    cdef Py_ssize_t k, k0 = f.tokens * me // team, k1 = f.tokens * (me + 1) // team
    pack(f, &f.ih, 0, 1, me, team)
    for k in range(k0, k1):
        f.x_rows[k] = f.x + k * f.I * f.item
        f.C[k] = f.y + k * f.G * f.item
    team_wait(&f.barriers[0], team)
    # y = x Wᵀ + b        (n,I) (I,G)
    multiply(f, &f.ih, 0, 1, START_BIAS if f.b != NULL else START_ZERO, k1 - k0, f.x_rows + k0, f.b,
             f.C + k0, f.thread + me * f.thread_bytes)


cdef void linear_backward(void *arg, int me, int team) noexcept nogil:
    cdef Pass *f = <Pass *>arg
    cdef Py_ssize_t k, k0 = f.tokens * me // team, k1 = f.tokens * (me + 1) // team
    cdef char *scratch = f.thread + me * f.thread_bytes
    cdef lstm_product product
    for k in range(k0, k1):
        f.x_rows[k] = f.x + k * f.I * f.item
        f.da[k] = f.dy + k * f.G * f.item
    if f.dx != NULL:
        pack(f, &f.ih, 0, 1, me, team)
    team_wait(&f.barriers[0], team)
    if f.dx != NULL:
        input_gradient(f, me, team, scratch)
    product.x, product.N, product.dW = f.x_rows, f.I, f.dW_ih
    weight_gradient(f, f.G, f.da, 1, &product, f.db, scratch, me, team)


# ---- entry points ----------------------------------------------------------------------------------

cdef Operand operand(int panels, Py_ssize_t K, Py_ssize_t N, Py_ssize_t H, W, Py_ssize_t k_stride,
                     Py_ssize_t col_stride):
    cdef Operand w
    w.panels, w.K, w.N, w.H, w.W = panels, K, N, H, address(W)
    w.k_stride, w.col_stride, w.packed = k_stride, col_stride, NULL
    return w


cdef void fill_weights(Pass *f, cell, W_ih, W_hh, x, bint ids, int n_threads):
    """What the weights say of a pass, and x or the token ids."""
    f.rnn, f.relu = cell != "lstm", cell == "relu"
    f.G, f.K, f.I = cnp.PyArray_DIM(W_hh, 0), cnp.PyArray_DIM(W_hh, 1), cnp.PyArray_DIM(W_ih, 1)
    f.H = f.G if f.rnn else f.G // 4
    f.item = cnp.PyArray_ITEMSIZE(W_hh)
    f.k = tables[f.item == 8]
    f.n_threads = min(n_threads, MAX_TEAM)
    if ids:
        f.ids = <int64_t *>address(x)
    else:
        f.x = address(x)


cdef void fill(Pass *f, cell, x, W_ih, W_hh, W_hr, h0, c0, peepholes, order, lengths, bint reverse,
               y, gates, c, int n_threads):
    """What forward and backward have in common."""
    memset(f, 0, sizeof(Pass))
    fill_weights(f, cell, W_ih, W_hh, x, cnp.PyArray_NDIM(x) == 2, n_threads)
    f.T, f.B = cnp.PyArray_DIM(x, 0), cnp.PyArray_DIM(x, 1)
    f.h0, f.c0, f.peepholes = address(h0), address(c0), address(peepholes)
    f.y, f.gates, f.c = address(y), address(gates), address(c)
    f.ragged, f.reverse = order is not None, reverse
    f.steps, f.tokens = f.T, f.T * f.B
    if f.ragged:
        f.order, f.lengths = <int64_t *>address(order), <int64_t *>address(lengths)
        f.steps = f.lengths[0]
        f.tokens = lengths.sum()
    f.blas = choose_blas(f)


cdef run(Pass *f, void (*lay_out)(Pass *, Arena *) noexcept nogil, team_fn *fn):
    """Finds memory for the pass and lets the team loose on it."""
    global last_plan, blas_gemm
    cdef Arena arena
    cdef Workspace work
    arena.base, arena.used = NULL, 0
    lay_out(f, &arena)
    work = take_workspace(arena.used)
    arena.base, arena.used = <char *>((<size_t>work.data + 63) & ~<size_t>63), 0
    lay_out(f, &arena)
    if f.blas:
        if blas_gemm == NULL:
            from lstmcore import _blas
            blas_gemm = <gemm_fn *><size_t>_blas.gemm_address()
        with one_blas_thread(), nogil:
            number_tokens(f)
            team_run(f.n_threads, fn, f)
    else:
        with nogil:
            number_tokens(f)
            team_run(f.n_threads, fn, f)
    give_back(work)
    if f.grid.rows:
        last_plan = ("blas" if f.blas else "tiles", f.grid.rows, f.grid.units)


cdef void forward_operands(Pass *f, W_ih, W_hh, W_hr):
    cdef int panels = PANEL_PLAIN if f.rnn else PANEL_GATES
    f.ih = operand(panels, f.I, f.H, f.H, W_ih, 1, f.I)  # W[k, column] = W_ih[column, k]
    f.hh = operand(panels, f.K, f.H, f.H, W_hh, 1, f.K)
    f.hr = operand(PANEL_PLAIN, f.H, f.K, 0, W_hr, 1, f.H)


cdef class Packed:
    """The weights of one layer and direction as they were when this was made, packed for `run_step`.

    Packing costs more than a single step, so a stream of steps does it once.
    """
    cdef Workspace work
    cdef Operand ih, hh, hr
    cdef const lstm_kernels *k
    cdef object weights            # the operands point into them

    def __init__(self, cell, W_ih, W_hh, W_hr):
        cdef Pass f
        cdef Arena arena
        cdef Grid one
        x = np.empty((1, 1, W_ih.shape[1]), W_ih.dtype)
        fill(&f, cell, x, W_ih, W_hh, W_hr, None, None, None, None, None, False, None, None, None, 1)
        f.blas = False
        forward_operands(&f, W_ih, W_hh, W_hr)
        arena.base, arena.used = NULL, 0
        lay_out_weights(&f, &arena)
        self.work = Workspace(arena.used)
        arena.base, arena.used = <char *>((<size_t>self.work.data + 63) & ~<size_t>63), 0
        lay_out_weights(&f, &arena)
        one.rows = one.units = 1
        pack_weights(&f, &one, 0, 0)
        self.k, self.ih, self.hh, self.hr, self.weights = f.k, f.ih, f.hh, f.hr, (W_ih, W_hh, W_hr)


def run_forward(cell, x, W_ih, W_hh, b, W_hr, h0, c0, peepholes, order, lengths, reverse, y, h_n, c_n,
                gates, c, n_threads):
    """Fills y, h_n, c_n and, if given, the tape's gates and c. cell: "lstm", "tanh" or "relu".

    All arrays are C-contiguous of one dtype; order and lengths (int64) are sorted by length, longest
    first; y is zero where no row runs. T, B >= 1.
    x may be token ids (T, B), int64; then b is the table W_ihᵀ + b (I, G).
    """
    cdef Pass f
    fill(&f, cell, x, W_ih, W_hh, W_hr, h0, c0, peepholes, order, lengths, reverse, y, gates, c,
         n_threads)
    if f.ids != NULL:
        f.table = address(b)
    f.b, f.h_n, f.c_n, f.keep = address(b), address(h_n), address(c_n), gates is not None
    f.chunk = min(max(1, f.steps), (CHUNK_ROWS + f.B - 1) // f.B)
    forward_operands(&f, W_ih, W_hh, W_hr)
    run(&f, lay_out_forward, forward)


def run_step(cell, x, W_ih, W_hh, b, W_hr, peepholes, h, c, y, n_threads, Packed packed):
    """One step of `run_forward` on x (B, I), or token ids (B,): the state h, c is updated in place."""
    cdef Pass f
    memset(&f, 0, sizeof(Pass))
    fill_weights(&f, cell, W_ih, W_hh, x, cnp.PyArray_NDIM(x) == 1, n_threads)
    f.T = f.steps = f.chunk = 1
    f.B = f.tokens = cnp.PyArray_DIM(x, 0)
    f.h0, f.h_n, f.c0, f.c_n = address(h), address(h), address(c), address(c)
    f.peepholes, f.y, f.b, f.table = address(peepholes), address(y), address(b), address(b)
    f.k, f.ih, f.hh, f.hr, f.prepacked = packed.k, packed.ih, packed.hh, packed.hr, True
    run(&f, lay_out_forward, forward)


def run_backward(cell, x, W_ih, W_hh, W_hr, h0, c0, peepholes, order, lengths, reverse, y, gates, c,
                 dy, dy_last, dx, dW_ih, dW_hh, db, dpeepholes, dh0, dc0, dW_hr, n_threads):
    """Fills the gradients from the tape, whose gates become da.

    For token ids, dx is None and dW_ih is the gradient of the table (I, G), zero on entry.
    dh0 and dc0 hold dh_n and dc_n on entry; dy_last (B, K) is dy of each row's last step plus dh_n,
    or None if there is no dh_n.
    """
    cdef Pass f
    fill(&f, cell, x, W_ih, W_hh, W_hr, h0, c0, peepholes, order, lengths, reverse, y, gates, c,
         n_threads)
    f.dy, f.dy_last, f.dx = address(dy), address(dy_last), address(dx)
    f.dtable = address(dW_ih)
    f.dW_ih, f.dW_hh, f.db, f.dW_hr = address(dW_ih), address(dW_hh), address(db), address(dW_hr)
    f.dpeepholes, f.dh0, f.dc0 = address(dpeepholes), address(dh0), address(dc0)
    f.ih = operand(PANEL_PLAIN, f.G, f.I, 0, W_ih, f.I, 1)  # W[k, column] = W_ih[k, column]
    f.hh = operand(PANEL_PLAIN, f.G, f.K, 0, W_hh, f.K, 1)
    f.hr = operand(PANEL_PLAIN, f.K, f.H, 0, W_hr, f.H, 1)
    run(&f, lay_out_backward, backward)


cdef void fill_linear(Pass *f, x, Py_ssize_t outputs, int n_threads):
    memset(f, 0, sizeof(Pass))
    f.rnn, f.tokens, f.I, f.G = True, cnp.PyArray_DIM(x, 0), cnp.PyArray_DIM(x, 1), outputs
    f.B = f.T = f.steps = 1
    f.H = f.K = 1
    f.item, f.n_threads, f.x = cnp.PyArray_ITEMSIZE(x), min(n_threads, MAX_TEAM), address(x)
    f.k = tables[f.item == 8]
    f.blas = choose_blas(f)


def run_linear_forward(x, W, b, y, n_threads):
    """y (n,O) = x (n,I) Wᵀ + b, with W (O,I); n >= 1."""
    cdef Pass f
    fill_linear(&f, x, W.shape[0], n_threads)
    f.b, f.y = address(b), address(y)
    f.ih = operand(PANEL_PLAIN, f.I, f.G, 0, W, 1, f.I)
    run(&f, lay_out_linear, linear_forward)


def run_linear_backward(x, W, dy, dx, dW, db, n_threads):
    """dx (n,I) = dy W, dW (O,I) = dyᵀ x, db (O) = Σ dy; dx may be None; n >= 1."""
    cdef Pass f
    fill_linear(&f, x, W.shape[0], n_threads)
    f.dy, f.dx, f.dW_ih, f.db = address(dy), address(dx), address(dW), address(db)
    f.ih = operand(PANEL_PLAIN, f.G, f.I, 0, W, f.I, 1)
    run(&f, lay_out_linear, linear_backward)


use_isa(os.environ.get("LSTMCORE_ISA") or None)
L2_BYTES = lstm_l2_bytes()
