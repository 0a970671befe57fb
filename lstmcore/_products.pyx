# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False
"""Products of rows with an operand, and sums over tokens: by the register tiles, or over BLAS.

A way to multiply is a row of `Products`. Plans ask the row; they do not know which one it is. What
runs a plan, finding its memory and letting the team loose on it, is here too, because BLAS is held
to one thread meanwhile. Nothing here knows a cell, a step or a sequence.
"""

from libc.string cimport memcpy, memset
cimport numpy as cnp

from lstmcore.threads import look_for_blas, one_blas_thread

from lstmcore._kernels cimport MAX_TEAM, address, forced_plan, kernels_of, run_team
from lstmcore._lstm cimport (KW, START_ADD, START_BIAS, lstm_kernels, lstm_operand, lstm_product,
                             lstm_rows)
from lstmcore._memory cimport Arena, Workspace, arena_of, give_back, padded, take, take_workspace

cnp.import_array()


cdef enum: LOWERED_ROWS = 192  # rows per block of a product: as many as an input projection has


cdef Operand operand(const lstm_kernels *k, int gates, W, bint transposed):
    """W (columns, K) as W[k, column] = W[column, k], or transposed: W (K, columns) as it stands.

    Of several gates each has its share of the columns. An absent W has none. W is a matrix of the
    arrays' numbers, or the int8 numbers and the scales (columns,) of `reference.quantize`.
    """
    cdef Operand w
    cdef Py_ssize_t rows, columns
    memset(&w, 0, sizeof(Operand))
    if W is None:
        return w
    if isinstance(W, tuple):
        W, scales = W
        w.w.scales = <const float *>address(scales)
    rows, columns = cnp.PyArray_DIM(W, 0), cnp.PyArray_DIM(W, 1)
    w.w.gates, w.w.W, w.cut = gates, address(W), k.VL
    w.w.K, w.w.N = columns, rows // gates
    w.w.k_stride, w.w.col_stride = 1, columns
    if transposed:
        w.w.K, w.w.N = rows, columns // gates
        w.w.k_stride, w.w.col_stride = columns, 1
    w.lane_bytes = k.vector_bytes(w.w.K) // k.VL
    return w


# ---- the tiles ---------------------------------------------------------------------------------------

cdef Py_ssize_t tile_packed_bytes(const lstm_kernels *k, const Operand *w) noexcept nogil:
    cdef Py_ssize_t vectors = (w.w.N + k.VL - 1) // k.VL
    return vectors * k.VL * w.lane_bytes * w.w.gates


cdef void tile_pack(const lstm_kernels *k, const Operand *w, const Part *mine, int share,
                    int shares) noexcept nogil:
    """Packs a share of the panels of the columns of one part."""
    cdef Py_ssize_t j0, j1, panels, width = k.VL if w.w.gates > 1 else 4 * k.VL
    cdef lstm_operand packed = w.w
    if share >= shares or w.w.W == NULL:
        return
    unit_range(w.w.N, w.cut, mine.part, mine.parts, &j0, &j1)
    panels = (j1 - j0 + width - 1) // width
    packed.packed = packed_at(k, w, j0)
    k.pack(&packed, j0, j1, panels * share // shares, panels * (share + 1) // shares)


cdef void tile_multiply(const lstm_kernels *k, const Operand *w, const Part *mine,
                        const lstm_rows *rows) noexcept nogil:
    """Rows are lowered by each thread that multiplies them: a product of N columns takes N / 8 times as
    long as that, and more."""
    cdef Py_ssize_t j0, j1, r, done = 0, stride = lowered_stride(k, w.w.K)
    cdef lstm_operand packed = w.w
    cdef lstm_rows block = rows[0]
    cdef char *low = mine.scratch + padded(LOWERED_ROWS * sizeof(void *))
    unit_range(w.w.N, w.cut, mine.part, mine.parts, &j0, &j1)
    packed.packed = packed_at(k, w, j0)
    if k.lower == NULL:
        k.gemm(&packed, j0, j1, rows)
        return
    block.a = <const void **>mine.scratch
    while done < rows.n:
        block.n, block.C = min(<Py_ssize_t>LOWERED_ROWS, rows.n - done), rows.C + done
        for r in range(block.n):
            block.a[r] = low + r * stride
            k.lower(w.w.K, rows.a[done + r], low + r * stride)
        k.gemm(&packed, j0, j1, &block)
        done += block.n


cdef Py_ssize_t lowered_stride(const lstm_kernels *k, Py_ssize_t K) noexcept nogil:
    """Bytes from a lowered row to the next; 0 where rows are taken as they are.

    An odd number of cache lines: rows a power of two apart share few sets of the first-level cache.
    """
    return padded(k.lowered_bytes(K)) | 64 if k.lower != NULL else 0


cdef void tile_add_up(const lstm_kernels *k, const Sums *sums, const Part *mine) noexcept nogil:
    cdef Py_ssize_t m0, m1
    unit_range(sums.last - sums.first, k.MR, mine.part, mine.parts, &m0, &m1)
    if m0 < m1:
        k.weight_gradient(sums.tokens, sums.first + m0, sums.first + m1, sums.da, sums.n_products,
                          sums.products, sums.add, sums.db, mine.scratch)


cdef Py_ssize_t tile_scratch_bytes(const lstm_kernels *k, const Widths *widths) noexcept nogil:
    cdef Py_ssize_t bytes = 0
    if k.lower != NULL:
        # LOWERED_ROWS is a multiple of MR, as lowered_rows has it
        bytes = padded(LOWERED_ROWS * sizeof(void *)) + LOWERED_ROWS * lowered_stride(k, widths.row)
    return max(bytes, k.weight_gradient_work(widths.M) if widths.M else 0)


cdef Products tiles
tiles.name, tiles.in_step, tiles.over_blas = b"tiles", True, False
tiles.packed_bytes, tiles.pack, tiles.multiply = tile_packed_bytes, tile_pack, tile_multiply
tiles.add_up, tiles.scratch_bytes = tile_add_up, tile_scratch_bytes


# ---- BLAS --------------------------------------------------------------------------------------------
# A row's bits may depend neither on the other rows nor on its place among them, but a BLAS sums a
# row as the kernel does that the row's place in the matrix selects. OpenBLAS's float kernel for
# Haswell and Zen takes rows by 12, then by 4. In the first and the last 8 of its columns, cut at 320,
# 6 of the 12 rows sum odd and even k apart, the other 6 do not; of the 4 rows, all do. Its double
# kernel for AVX-512 sums k in 2 or 4 parts for 12 rows, for the last columns if N is no multiple of
# 8, and in one part for fewer rows. So every product has 36 rows, thus 12 at a time throughout, and
# at most 256 columns, a multiple of 8, between two edges of zeros where the sums may differ.
# `_blas.rows_are_alike` asks any other BLAS, and the tiles stand in for one that says no.

ctypedef void gemm_fn(bint is_double, bint trans_a, bint trans_b, int m, int n, int k, double alpha,
                      const void *a, int lda, const void *b, int ldb, double beta, void *c,
                      int ldc) noexcept nogil

cdef gemm_fn *blas_gemm = NULL
_fit = {}                      # number format -> whether the BLAS may be used; once it was asked

cdef enum: BLAS_ROWS = 36      # rows of every BLAS product, so that all are summed alike
cdef enum: BLAS_WIDTH = 256    # most columns of a BLAS product, without its edges
cdef enum: BLAS_EDGE = 8       # columns of zeros at each side, float only
cdef enum: BLAS_COLUMNS = 64   # rows of a weight gradient per BLAS call, so that threads change no bit


cdef bint blas_is_fit(str format, Py_ssize_t item) except -1:
    """Loads SciPy's BLAS and asks once whether a row's bits there depend on its place."""
    global blas_gemm
    if format not in _fit:
        from lstmcore import _blas
        look_for_blas()
        with one_blas_thread():
            _fit[format] = _blas.rows_are_alike(format, BLAS_ROWS, blas_edge(item), BLAS_WIDTH)
        blas_gemm = <gemm_fn *><size_t>_blas.gemm_address()
    return _fit[format]


def blas_fits():
    """Whether SciPy's BLAS may be used for every number format: whether it treats all rows alike."""
    return bool(blas_is_fit("float32", 4)) and bool(blas_is_fit("float64", 8))


cdef inline Py_ssize_t blas_edge(Py_ssize_t item) noexcept nogil:
    return BLAS_EDGE if item == 4 else 0


cdef inline Py_ssize_t blas_width(Py_ssize_t item, Py_ssize_t n) noexcept nogil:
    """Columns of a product of which n are wanted."""
    return (n + 7) // 8 * 8 + 2 * blas_edge(item)


cdef inline Py_ssize_t blas_rows_bytes(Py_ssize_t item, Py_ssize_t n) noexcept nogil:
    return padded(BLAS_ROWS * n * item)


cdef inline bint lies_transposed(const Operand *w) noexcept nogil:
    return w.w.k_stride == 1 and w.w.col_stride >= w.w.K


cdef Py_ssize_t blas_packed_bytes(const lstm_kernels *k, const Operand *w) noexcept nogil:
    cdef Py_ssize_t N = w.w.gates * w.w.N, item = k.item
    return (N // BLAS_WIDTH * blas_width(item, BLAS_WIDTH) + blas_width(item, N % BLAS_WIDTH)) \
        * w.w.K * item


cdef void blas_pack(const lstm_kernels *k, const Operand *w, const Part *mine, int share,
                    int shares) noexcept nogil:
    """Every shares-th block of columns, with its edges: (width, K) if W lies so, or (K, width), which
    has no turn."""
    cdef Py_ssize_t N = w.w.gates * w.w.N, K = w.w.K, item = k.item, edge = blas_edge(item)
    cdef Py_ssize_t j = share * BLAS_WIDTH, n, width, t, first = w.w.turn * w.w.N
    cdef const char *W = <const char *>w.w.W
    cdef char *block
    if W == NULL:
        return
    while j < N:
        n = min(<Py_ssize_t>BLAS_WIDTH, N - j)
        width = blas_width(item, n)
        block = <char *>w.w.packed + j // BLAS_WIDTH * blas_width(item, BLAS_WIDTH) * K * item
        memset(block, 0, width * K * item)
        if lies_transposed(w):
            for t in range(n):
                memcpy(block + (edge + t) * K * item, W + (j + t + first) % N * w.w.col_stride * item,
                       K * item)
        else:
            for t in range(K):
                memcpy(block + (t * width + edge) * item, W + (t * w.w.k_stride + j) * item, n * item)
        j += shares * BLAS_WIDTH


cdef void blas_multiply(const lstm_kernels *k, const Operand *w, const Part *mine,
                        const lstm_rows *rows) noexcept nogil:
    """All columns: `mine` is the whole."""
    cdef Py_ssize_t N = w.w.gates * w.w.N, K = w.w.K, item = k.item, edge = blas_edge(item)
    cdef Py_ssize_t r0 = 0, j, r, m, width, columns
    cdef bint transposed = lies_transposed(w)
    cdef char *A = mine.scratch
    cdef char *out = A + blas_rows_bytes(item, K)
    cdef char *row
    cdef char *W
    memset(out, 0, blas_rows_bytes(item, blas_width(item, BLAS_WIDTH)))  # no row of it is random
    while r0 < rows.n:
        m = min(<Py_ssize_t>BLAS_ROWS, rows.n - r0)
        for r in range(m):
            memcpy(A + r * K * item, rows.a[r0 + r], K * item)
        memset(A + m * K * item, 0, (BLAS_ROWS - m) * K * item)
        W, j = <char *>w.w.packed, 0
        while j < N:
            columns = min(<Py_ssize_t>BLAS_WIDTH, N - j)
            width = blas_width(item, columns)
            for r in range(m):
                row = out + (r * width + edge) * item
                if rows.start == START_ADD:
                    memcpy(row, <char *>rows.C[r0 + r] + j * item, columns * item)
                elif rows.start == START_BIAS:
                    memcpy(row, <const char *>rows.bias + j * item, columns * item)
                else:
                    memset(row, 0, columns * item)
            # out = out + A W        (36,width) (36,K) (K,width)
            blas_gemm(item == 8, False, transposed, BLAS_ROWS, <int>width, <int>K, 1.0, A, <int>K, W,
                      <int>(K if transposed else width), 1.0, out, <int>width)
            for r in range(m):
                memcpy(<char *>rows.C[r0 + r] + j * item, out + (r * width + edge) * item,
                       columns * item)
            W += width * K * item
            j += BLAS_WIDTH
        r0 += BLAS_ROWS


cdef void blas_add_up(const lstm_kernels *k, const Sums *sums, const Part *mine) noexcept nogil:
    """In pieces of BLAS_COLUMNS rows of dW; db by the kernels."""
    cdef Py_ssize_t m0, m1, start, end, q
    unit_range(sums.last - sums.first, BLAS_COLUMNS, mine.part, mine.parts, &start, &end)
    start, end = sums.first + start, sums.first + end
    while start < end:
        m0, m1 = start, min(start + BLAS_COLUMNS, end)
        if sums.db != NULL:
            k.weight_gradient(sums.tokens, m0, m1, sums.da, 0, NULL, sums.add, sums.db, mine.scratch)
        for q in range(sums.n_products):
            blas_weight_gradient(k, sums, &sums.products[q], m0, m1, mine.scratch)
        start = m1


cdef void blas_weight_gradient(const lstm_kernels *k, const Sums *sums, const lstm_product *product,
                               Py_ssize_t m0, Py_ssize_t m1, char *scratch) noexcept nogil:
    """Rows [m0, m1) of one gradient, in blocks of KW tokens."""
    cdef Py_ssize_t t, k0 = 0, kn, m = m1 - m0, N = product.N, item = k.item
    cdef char *A = scratch
    cdef char *X = A + KW * BLAS_COLUMNS * item
    while k0 < sums.tokens:
        kn = min(<Py_ssize_t>KW, sums.tokens - k0)
        for t in range(kn):
            memcpy(A + t * m * item, <char *>sums.da[k0 + t] + m0 * item, m * item)
            memcpy(X + t * N * item, product.x[k0 + t], N * item)
        # dW[m0:m1] += Aᵀ X        (m,N) (kn,m)ᵀ (kn,N)
        blas_gemm(item == 8, True, False, <int>m, <int>N, <int>kn, 1.0, A, <int>m, X,
                  <int>N, 1.0 if k0 or sums.add else 0.0, <char *>product.dW + m0 * N * item, <int>N)
        k0 += kn


cdef Py_ssize_t blas_scratch_bytes(const lstm_kernels *k, const Widths *widths) noexcept nogil:
    cdef Py_ssize_t bytes = blas_rows_bytes(k.item, widths.row) \
        + blas_rows_bytes(k.item, blas_width(k.item, BLAS_WIDTH))
    if widths.M:
        bytes = max(bytes, KW * (BLAS_COLUMNS + widths.row) * k.item)
        bytes = max(bytes, k.weight_gradient_work(BLAS_COLUMNS))
    return bytes


cdef Products blas
blas.name, blas.in_step, blas.over_blas = b"blas", False, True
blas.packed_bytes, blas.pack, blas.multiply = blas_packed_bytes, blas_pack, blas_multiply
blas.add_up, blas.scratch_bytes = blas_add_up, blas_scratch_bytes


# ---- the choice, and what runs a plan ----------------------------------------------------------------

cdef int choose_engine(Engine *e, str format) except -1:
    """The kernels of a number format; BLAS instead of the tiles only where a vector has one lane, and
    never a BLAS whose rows differ by their place, nor for operands that are not packed as they are.

    Not by the shape, or a row's bits would depend on the other rows of its batch. Without fused
    multiply-adds the tiles win against a BLAS that has none either, by 1.1x to 1.4x from 50 rows on,
    and take 1.4x to 1.9x the time of one that has them (training, ten shapes from H = 64 to 650).
    """
    plan = forced_plan()
    e.k = kernels_of(format)
    e.by = &tiles
    if (e.k.VL == 1 if plan is None else plan == "blas") and e.k.packed == e.k.item \
            and blas_is_fit(format, e.k.item):
        e.by = &blas
    return 0


cdef int run_plan(Plan *plan) except -1:
    """Finds memory for the plan and lets the team loose on it."""
    cdef Workspace work
    cdef Arena arena
    arena.base, arena.used = NULL, 0
    plan.n_threads = min(plan.n_threads, MAX_TEAM)
    plan.lay_out(plan, &arena)
    work = take_workspace(arena.used)
    arena = arena_of(work)
    plan.lay_out(plan, &arena)
    if plan.e.by.over_blas:
        with one_blas_thread(), nogil:
            plan.prepare(plan)
            run_team(plan.n_threads, plan.work, plan)
    else:
        with nogil:
            plan.prepare(plan)
            run_team(plan.n_threads, plan.work, plan)
    give_back(work)
    return 0


cdef class Packed:
    """The weights of one layer and direction, or of a dense layer (W_ih alone), as they were when this
    was made, packed by the tiles for many calls: packing costs more than one step, and 2 % of a batch.

    It remembers of which arrays, `origin` (W_ih, W_hh, W_hr), and their shapes, strides and dtypes then, for
    calls to compare.
    """

    def __init__(self, str cell, gates, str format, weights, origin, int turn=0):
        """weights: W_ih, W_hh and W_hr or the rows of a later product, contiguous or None, of int8 as
        `operand` takes it, with so many gates; origin: the arrays of the caller; turn: of W_ih, see
        lstm_operand."""
        cdef Part whole
        cdef Arena arena
        cdef int q
        cdef Operand *w
        self.cell, self.origin = cell, tuple(origin)
        self.shapes = tuple(None if a is None else (a.shape, a.strides, a.dtype) for a in self.origin)
        self.e.k, self.e.by, self.format = kernels_of(format), &tiles, format
        self.quantized = tuple(weights) if format == "int8" else None
        for q in range(3):
            self.operands[q] = operand(self.e.k, gates[q], weights[q], False)
        self.operands[0].w.turn = turn
        arena.base, arena.used = NULL, 0
        for q in range(3):
            take(&arena, self.e.by.packed_bytes(self.e.k, &self.operands[q]))
        self.work = Workspace(arena.used)
        arena = arena_of(self.work)
        whole.part, whole.parts, whole.scratch = 0, 1, NULL
        for q in range(3):
            w = &self.operands[q]
            if w.w.gates == 1:
                w.cut = 4 * self.e.k.VL  # its panels are counted from column 0: parts must start on one
            w.w.packed = take(&arena, self.e.by.packed_bytes(self.e.k, w))
            self.e.by.pack(self.e.k, w, &whole, 0, 1)
            w.w.W = NULL               # all later use is of the packed copy

    @property
    def nbytes(self):
        """Bytes of the packed weights."""
        return self.work.size

    @property
    def isa(self):
        """The instruction set that it is packed for, and that every call with it runs on."""
        return self.e.k.isa.decode()

    def __reduce__(self):
        return type(None), ()          # a copy or pickle of a frozen layer is one that is not
