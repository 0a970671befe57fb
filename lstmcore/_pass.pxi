# _pass.pxi: a pass, that is, everything a thread needs to know; its rows, steps and products.
# Part of _kernels.pyx, which includes it.

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
    bint rnn, relu, ragged, reverse, keep, blas, fused, prepacked
    bint descending                # whether step 0 goes through the panels last first
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
    """BLAS instead of the tiles: only where a vector has one lane, for want of a compiler with vectors.

    Not by the shape, or a row's bits would depend on the other rows of its batch. Without fused
    multiply-adds the tiles win against a BLAS that has none either, by 1.1x to 1.4x from 50 rows on,
    and take 1.4x to 1.9x the time of one that has them (training, ten shapes from H = 64 to 650).
    """
    return f.k.VL == 1 if plan is None else plan == "blas"


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
