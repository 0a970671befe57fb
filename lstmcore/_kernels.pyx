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

Letters are those of lstmcore/reference.py, and: K is the width of h, over which the recurrent product
sums (H, or P with a projection); G is the width of a row of pre-activations (4H, or H for the RNN).
"""

from libc.stdint cimport int64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
cimport numpy as cnp

import os

import numpy as np

from lstmcore.threads import cpus, look_for_blas, one_blas_thread

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
    ctypedef struct lstm_weights:
        Py_ssize_t I
        Py_ssize_t K
        Py_ssize_t H
        const void *ih
        const void *hh
        const void *bias
        const void *peepholes
    ctypedef struct lstm_row:
        const void *x
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
    ctypedef struct lstm_adam:
        double b1
        double b2
        double rate
        double eps
        double decay
        double keep
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
        void (*lstm_step)(const lstm_weights *, bint, Py_ssize_t, Py_ssize_t, Py_ssize_t,
                          const lstm_row *) noexcept nogil
        void (*lstm_back_step)(const lstm_weights *, bint, Py_ssize_t, Py_ssize_t, Py_ssize_t,
                               const lstm_back_row *) noexcept nogil
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
        void (*cross_entropy)(Py_ssize_t, Py_ssize_t, const void *, const int64_t *, const void *,
                              void *, void *) noexcept nogil
        void (*adam)(Py_ssize_t, const lstm_adam *, void *, const void *, void *,
                     void *) noexcept nogil
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
    void team_set_cpus(int n)


# ---- the machine -----------------------------------------------------------------------------------

cdef const lstm_kernels *tables[2]
cdef Py_ssize_t L2_BYTES
cdef enum: BLAS_ROWS = 32      # every BLAS product has this many rows: a row's bits depend on no other
cdef enum: BLAS_COLUMNS = 64   # rows of a weight gradient per BLAS call, so that threads change no bit
cdef enum: BLAS_TOKENS = 256   # tokens per BLAS call of a weight gradient
cdef enum: CHUNK_ROWS = 192    # rows per input projection: enough to reuse a panel, few enough for L2
cdef enum: MAX_TEAM = 1024

cdef gemm_fn *blas_gemm = NULL

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


def share_cpus(int n):
    """Calls that run at once divide n CPUs among them; 0: each gets the threads that it asks for."""
    team_set_cpus(n)


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


cdef inline bint overlap(a, b):
    """Whether two contiguous arrays have memory in common."""
    cdef char *p = <char *>cnp.PyArray_DATA(a)
    cdef char *q = <char *>cnp.PyArray_DATA(b)
    return p < q + cnp.PyArray_NBYTES(b) and q < p + cnp.PyArray_NBYTES(a)


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
cdef enum: SPARE_BLOCKS = 16
cdef size_t SPARE_BYTES = 512 << 20
cdef size_t SMALL = 1 << 20        # below it, malloc has its memory at hand


cdef Workspace take_workspace(size_t size, size_t most):
    """The smallest spare block that is large enough, of at most `most` bytes, or a new one."""
    cdef Workspace w, best = None
    for w in spare:
        if size <= w.size <= most and (best is None or w.size < best.size):
            best = w
    if best is None:
        return Workspace(size + size // 8)
    spare.remove(best)
    return best


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
        self.work = take_workspace(size, 2 * size)  # it may be kept for long: not a much larger one

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
    a = cnp.PyArray_SimpleNewFromData(n, sizes, dtype.num,
                                      <char *>((<size_t>block.work.data + 63) & ~<size_t>63))
    cnp.set_array_base(a, block)
    return a


cdef struct Arena:
    char *base                     # NULL: only count
    size_t used


cdef inline char *take(Arena *arena, size_t bytes) noexcept nogil:
    cdef char *p = arena.base + arena.used
    arena.used += (bytes + 63) & ~<size_t>63
    return p


# ---- the plans --------------------------------------------------------------------------------------

include "_pass.pxi"
include "_forward.pxi"
include "_backward.pxi"
include "_dense.pxi"


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
    work = take_workspace(arena.used, SPARE_BYTES)
    arena.base, arena.used = <char *>((<size_t>work.data + 63) & ~<size_t>63), 0
    lay_out(f, &arena)
    if f.blas:
        if blas_gemm == NULL:
            from lstmcore import _blas
            blas_gemm = <gemm_fn *><size_t>_blas.gemm_address()
            look_for_blas()
        with one_blas_thread(), nogil:
            number_tokens(f)
            team_run(f.n_threads, fn, f)
    else:
        with nogil:
            number_tokens(f)
            team_run(f.n_threads, fn, f)
    give_back(work)
    if f.grid.rows:
        last_plan = ("blas" if f.blas else "fused" if f.fused else "tiles", f.grid.rows, f.grid.units)


cdef void forward_operands(Pass *f, W_ih, W_hh, W_hr):
    cdef int panels = PANEL_PLAIN if f.rnn else PANEL_GATES
    f.ih = operand(panels, f.I, f.H, f.H, W_ih, 1, f.I)  # W[k, column] = W_ih[column, k]
    f.hh = operand(panels, f.K, f.H, f.H, W_hh, 1, f.K)
    f.hr = operand(PANEL_PLAIN, f.H, f.K, 0, W_hr, 1, f.H)


cdef class Packed:
    """The weights of one layer and direction, or of a dense layer (W_ih alone), as they were when this
    was made, packed for many calls: packing costs more than one step, and 2 % of a batch."""
    cdef Workspace work
    cdef Operand ih, hh, hr
    cdef const lstm_kernels *k
    cdef bint descending           # which way the next single step goes through them
    cdef readonly tuple weights    # the operands point into them

    def __init__(self, cell, W_ih, W_hh=None, W_hr=None):
        cdef Pass f
        cdef Arena arena
        cdef Grid one
        if W_hh is None:
            fill_linear(&f, W_ih[:1], W_ih.shape[0], 1)
            linear_operand(&f, W_ih)
        else:
            fill(&f, cell, W_ih[None, :1], W_ih, W_hh, W_hr, None, None, None, None, None, False, None,
                 None, None, 1)
            forward_operands(&f, W_ih, W_hh, W_hr)
        f.blas = False
        arena.base, arena.used = NULL, 0
        lay_out_weights(&f, &arena)
        self.work = Workspace(arena.used)
        arena.base, arena.used = <char *>((<size_t>self.work.data + 63) & ~<size_t>63), 0
        lay_out_weights(&f, &arena)
        one.rows = one.units = 1
        pack_weights(&f, &one, 0, 0)
        self.k, self.ih, self.hh, self.hr, self.weights = f.k, f.ih, f.hh, f.hr, (W_ih, W_hh, W_hr)


    def __reduce__(self):
        return type(None), ()      # a copy or pickle of a frozen layer is one that is not


cdef void use_packed(Pass *f, Packed packed):
    f.k, f.ih, f.hh, f.hr, f.prepacked = packed.k, packed.ih, packed.hh, packed.hr, True
    f.descending = packed.descending


def run_forward(cell, x, W_ih, W_hh, b, W_hr, h0, c0, peepholes, order, lengths, reverse, y, h_n, c_n,
                gates, c, n_threads, Packed packed=None):
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
    f.fused = choose_fused(&f)
    f.chunk = 1 if f.fused else min(max(1, f.steps), (CHUNK_ROWS + f.B - 1) // f.B)
    if packed is None or f.blas:
        forward_operands(&f, W_ih, W_hh, W_hr)
    else:
        use_packed(&f, packed)
    run(&f, lay_out_forward, forward)


def run_step(cell, x, W_ih, W_hh, b, W_hr, peepholes, h, c, y, n_threads, Packed packed):
    """One step of `run_forward` on x (B, I), or token ids (B,): the state h, c is updated in place."""
    cdef Pass f
    if overlap(x, y):  # y is written while x is still read
        x = x.copy()
    memset(&f, 0, sizeof(Pass))
    fill_weights(&f, cell, W_ih, W_hh, x, cnp.PyArray_NDIM(x) == 1, n_threads)
    f.T = f.steps = f.chunk = 1
    f.B = f.tokens = cnp.PyArray_DIM(x, 0)
    f.h0, f.h_n, f.c0, f.c_n = address(h), address(h), address(c), address(c)
    f.peepholes, f.y, f.b, f.table = address(peepholes), address(y), address(b), address(b)
    use_packed(&f, packed)
    f.fused = choose_fused(&f)
    packed.descending = not packed.descending
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


cdef void linear_operand(Pass *f, W):
    f.ih = operand(PANEL_PLAIN, f.I, f.G, 0, W, 1, f.I)  # W[k, column] = W[column, k]


def run_linear_forward(x, W, b, y, n_threads, Packed packed=None):
    """y (n,O) = x (n,I) Wᵀ + b, with W (O,I); n >= 1."""
    cdef Pass f
    fill_linear(&f, x, W.shape[0], n_threads)
    f.b, f.y = address(b), address(y)
    if packed is None or f.blas:
        linear_operand(&f, W)
    else:
        use_packed(&f, packed)
    run(&f, lay_out_linear, linear_forward)


def run_linear_backward(x, W, dy, dx, dW, db, n_threads):
    """dx (n,I) = dy W, dW (O,I) = dyᵀ x, db (O) = Σ dy; dx may be None; n >= 1."""
    cdef Pass f
    fill_linear(&f, x, W.shape[0], n_threads)
    f.dy, f.dx, f.dW_ih, f.db = address(dy), address(dx), address(dW), address(db)
    f.ih = operand(PANEL_PLAIN, f.G, f.I, 0, W, f.I, 1)
    run(&f, lay_out_linear, linear_backward)


def run_cross_entropy(z, targets, weights, losses, dz, n_threads):
    """losses (n,) and dz (n, V) of logits z (n, V), V >= 1, and int64 targets (n,) in 0..V-1."""
    cdef Loss f
    f.n, f.V, f.item = cnp.PyArray_DIM(z, 0), cnp.PyArray_DIM(z, 1), cnp.PyArray_ITEMSIZE(z)
    f.k = tables[f.item == 8]
    f.z, f.targets, f.weights = address(z), <int64_t *>address(targets), address(weights)
    f.losses, f.dz = address(losses), address(dz)
    cdef int team = n_threads
    with nogil:
        team_run(team, cross_entropy, &f)


def run_adam(p, g, m, v, double b1, double b2, double rate, double eps, double decay, double keep,
             n_threads):
    """A step of Adam on p, with its averages m and v; all contiguous and of one size."""
    cdef AdamStep f
    cdef int team = n_threads
    f.n, f.item = cnp.PyArray_SIZE(p), cnp.PyArray_ITEMSIZE(p)
    f.k = tables[f.item == 8]
    f.rule.b1, f.rule.b2, f.rule.rate, f.rule.eps = b1, b2, rate, eps
    f.rule.decay, f.rule.keep = decay, keep
    f.p, f.g, f.m, f.v = address(p), address(g), address(m), address(v)
    with nogil:
        team_run(team, adam, &f)


use_isa(os.environ.get("LSTMCORE_ISA") or None)
L2_BYTES = lstm_l2_bytes()
share_cpus(cpus())
