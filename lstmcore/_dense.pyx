# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False
"""The plans of what stands beside the recurrence: a loss, a dense layer, a step of an optimizer.

The dense layer: x (n,I), W (O,I), y (n,O); its rows are shared out among the threads. As the head of
a softmax it and the loss run over blocks of rows, so that a block of logits is all there ever is.
"""

from libc.stdint cimport int64_t
from libc.string cimport memset
cimport numpy as cnp

from lstmcore._kernels cimport address, format_of, kernels_of, run_team, team_barrier, wait
from lstmcore._lstm cimport (KW, START_ADD, START_BIAS, START_ZERO, lstm_adam, lstm_kernels,
                             lstm_product, lstm_rows)
from lstmcore._memory cimport Arena, padded, take
from lstmcore._products cimport (Operand, Packed, Part, Plan, Sums, Widths, choose_engine,
                                 operand, run_plan, unit_range)

cnp.import_array()


# ---- a loss: rows of a softmax cross-entropy ---------------------------------------------------------

cdef struct Loss:
    const lstm_kernels *k          # of the numbers in the arrays
    Py_ssize_t n, V
    const int64_t *targets
    const char *weights
    char *losses
    const char *z
    char *dz


cdef Loss loss_of(a, Py_ssize_t V, targets, weights, losses) except *:
    """Of rows of V logits, numbers like those of a."""
    cdef Loss f
    f.k, f.n, f.V, f.z, f.dz = kernels_of(format_of(a)), cnp.PyArray_SIZE(targets), V, NULL, NULL
    f.targets, f.weights = <const int64_t *>address(targets), address(weights)
    f.losses = address(losses)
    return f


cdef void loss_of_rows(const Loss *f, Py_ssize_t r, Py_ssize_t end, const char *z,
                       char *dz) noexcept nogil:
    """Of the rows [r, end), which lie at z; dz may be NULL."""
    cdef Py_ssize_t item = f.k.item
    f.k.cross_entropy(end - r, f.V, z, f.targets + r, f.weights + r * item, f.losses + r * item, dz)


cdef void cross_entropy(void *arg, int me, int team) noexcept nogil:
    cdef Loss *f = <Loss *>arg
    cdef Py_ssize_t r, end, row = f.V * f.k.item
    unit_range(f.n, 1, me, team, &r, &end)
    loss_of_rows(f, r, end, f.z + r * row, f.dz + r * row)


def run_cross_entropy(z, targets, weights, out, *, n_threads):
    """out: losses (n,) and dz (n, V) of logits z (n, V), V >= 1, and int64 targets (n,) in 0..V-1."""
    losses, dz = out
    cdef int team = n_threads
    cdef Loss f = loss_of(z, cnp.PyArray_DIM(z, 1), targets, weights, losses)
    f.z, f.dz = address(z), address(dz)
    with nogil:
        run_team(team, cross_entropy, &f)


# ---- a dense layer -----------------------------------------------------------------------------------

cdef enum: CHUNK = 512             # columns of y at a time, so that those of a thread's rows stay in L2

# Bytes of logits that are one block where no gradients follow: to pack W for each of 3 blocks took
# 2 to 12 % of 700 rows, I = 650, O = 10,000.
cdef enum: FEW = 32 << 20

cdef struct Linear:
    Plan plan
    Py_ssize_t n, I, O, item
    Py_ssize_t block               # rows of y that there are: row k lies in k mod block
    Py_ssize_t chunks              # of the columns of y
    Operand W, Wt                  # for y; for dx, if anybody wants it
    const char *x
    const char *b
    char *y                        # or dy, or a block of one and then the other
    char *dx
    char *dW
    char *db
    bint add                       # to what dW and db hold
    Loss loss                      # of a softmax over y
    # workspace
    const void **x_rows            # row pointers (n)
    void **y_rows
    void **dx_rows
    void **chunk_rows              # of y, from the first column of a chunk on
    team_barrier *barrier
    char *scratch                  # of each thread
    char *packed                   # two chunks of W: one is multiplied by while the next is packed
    Py_ssize_t scratch_bytes, packed_bytes


cdef Operand forward_chunk(Linear *f, Py_ssize_t c) noexcept nogil:
    """The columns of chunk c in y = x Wᵀ."""
    cdef Operand w = f.W
    w.w.N = min(<Py_ssize_t>CHUNK, f.O - c * CHUNK)
    w.w.W = <const char *>w.w.W + c * CHUNK * w.w.col_stride * f.item
    w.w.packed = f.packed + c % 2 * f.packed_bytes
    return w


cdef Operand backward_chunk(Linear *f, Py_ssize_t c) noexcept nogil:
    """The k of chunk c in dx = dy W."""
    cdef Operand w = f.Wt
    w.w.K = min(<Py_ssize_t>CHUNK, f.O - c * CHUNK)
    w.w.W = <const char *>w.w.W + c * CHUNK * w.w.k_stride * f.item
    w.w.packed = f.packed + (f.chunks + c) % 2 * f.packed_bytes
    return w


cdef void lay_out(Plan *plan, Arena *arena) noexcept nogil:
    cdef Linear *f = <Linear *>plan
    cdef Py_ssize_t pointers = f.n * sizeof(void *)
    cdef Operand w
    cdef Widths widths
    f.packed_bytes = 0
    if f.W.w.W != NULL:
        w = forward_chunk(f, 0)
        f.packed_bytes = padded(plan.e.by.packed_bytes(plan.e.k, &w))
    if f.Wt.w.W != NULL:
        w = backward_chunk(f, 0)
        f.packed_bytes = max(f.packed_bytes, <Py_ssize_t>padded(plan.e.by.packed_bytes(plan.e.k, &w)))
    widths.row = max(f.I, min(f.O, <Py_ssize_t>CHUNK))
    widths.M = min(f.O, CHUNK + plan.e.k.MR) if f.dW != NULL else 0
    f.scratch_bytes = padded(plan.e.by.scratch_bytes(plan.e.k, &widths))
    f.x_rows = <const void **>take(arena, pointers)
    f.y_rows = <void **>take(arena, pointers)
    f.dx_rows = <void **>take(arena, pointers)
    f.chunk_rows = <void **>take(arena, pointers)
    f.barrier = <team_barrier *>take(arena, sizeof(team_barrier))
    f.scratch = take(arena, plan.n_threads * f.scratch_bytes)
    f.packed = take(arena, 2 * f.packed_bytes)
    if f.loss.k != NULL:
        f.y = take(arena, f.block * f.O * f.item)


cdef void prepare(Plan *plan) noexcept nogil:
    memset((<Linear *>plan).barrier, 0, sizeof(team_barrier))


cdef Part begin(Linear *f, int me, int team) noexcept nogil:
    """Points at the rows, each thread at a share of them; this thread's part of whatever is shared."""
    cdef Py_ssize_t k, k0, k1
    cdef Part mine
    mine.part, mine.parts, mine.scratch = me, team, f.scratch + me * f.scratch_bytes
    unit_range(f.n, 1, me, team, &k0, &k1)
    for k in range(k0, k1):
        f.x_rows[k] = f.x + k * f.I * f.item
        f.y_rows[k] = f.y + k % f.block * f.O * f.item
        f.dx_rows[k] = f.dx + k * f.I * f.item if f.dx != NULL else NULL
    wait(f.barrier, team)
    return mine


cdef void pack_chunk(Linear *f, const Operand *w, Py_ssize_t c, bint first, const Part *whole,
                     const Part *mine) noexcept nogil:
    """Unless it is the only one, and not the first time.

    Who packs a chunk has seen all wait for the one before, done with what was packed in this place.
    """
    if first or f.chunks > 1:
        f.plan.e.by.pack(f.plan.e.k, w, whole, <int>((mine.part + c) % mine.parts), mine.parts)
        wait(f.barrier, mine.parts)


cdef void chunk_of_rows(Linear *f, Py_ssize_t k0, Py_ssize_t k1, Py_ssize_t c) noexcept nogil:
    cdef Py_ssize_t k
    for k in range(k0, k1):
        f.chunk_rows[k] = <char *>f.y_rows[k] + c * CHUNK * f.item


cdef void multiply_forward(Linear *f, Py_ssize_t k0, Py_ssize_t k1, bint first,
                           const Part *mine) noexcept nogil:
    """y = x Wᵀ + b        (n,I) (I,O), for rows [k0, k1)"""
    cdef Py_ssize_t c
    cdef Part whole = mine[0]
    cdef Operand w
    cdef lstm_rows rows
    whole.part, whole.parts = 0, 1
    rows.start, rows.bias = START_BIAS if f.b != NULL else START_ZERO, f.b
    rows.n, rows.a, rows.C = k1 - k0, f.x_rows + k0, f.y_rows + k0
    if f.W.w.W == NULL:            # packed for many calls
        f.plan.e.by.multiply(f.plan.e.k, &f.W, &whole, &rows)
        return
    rows.C = f.chunk_rows + k0
    for c in range(f.chunks):
        w = forward_chunk(f, c)
        pack_chunk(f, &w, c, first, &whole, mine)
        chunk_of_rows(f, k0, k1, c)
        if f.b != NULL:
            rows.bias = f.b + c * CHUNK * f.item
        f.plan.e.by.multiply(f.plan.e.k, &w, &whole, &rows)


cdef void multiply_backward(Linear *f, Py_ssize_t k0, Py_ssize_t k1, bint first,
                            const Part *mine) noexcept nogil:
    """dx = dy W        (n,O) (O,I), for rows [k0, k1)"""
    cdef Py_ssize_t c
    cdef Part whole = mine[0]
    cdef Operand w
    cdef lstm_rows rows
    whole.part, whole.parts = 0, 1
    rows.start, rows.bias = START_ZERO, NULL
    rows.n, rows.a, rows.C = k1 - k0, <const void **>f.chunk_rows + k0, f.dx_rows + k0
    for c in range(f.chunks):
        w = backward_chunk(f, c)
        pack_chunk(f, &w, c, first, &whole, mine)
        chunk_of_rows(f, k0, k1, c)
        f.plan.e.by.multiply(f.plan.e.k, &w, &whole, &rows)
        rows.start = START_ADD


cdef void add_up(Linear *f, Py_ssize_t k0, Py_ssize_t k1, bint add, const Part *mine) noexcept nogil:
    """dW = dyᵀ x        (O,n) (n,I);  db = Σ dy: over rows [k0, k1), this thread's share of dW."""
    cdef Sums sums
    cdef lstm_product product
    product.x, product.N, product.dW = f.x_rows + k0, f.I, f.dW
    sums.tokens, sums.da, sums.db = k1 - k0, <const void **>f.y_rows + k0, f.db
    sums.n_products, sums.products, sums.add, sums.first = 1, &product, add, 0
    while sums.first < f.O:        # of each thread so many rows of dW that its part of dy stays in L2
        sums.last = min(f.O, sums.first + CHUNK * mine.parts)
        f.plan.e.by.add_up(f.plan.e.k, &sums, mine)
        sums.first = sums.last


cdef void forward(void *arg, int me, int team) noexcept nogil:
    cdef Linear *f = <Linear *>arg
    cdef Part mine = begin(f, me, team)
    cdef Py_ssize_t k0, k1
    unit_range(f.n, 1, me, team, &k0, &k1)
    multiply_forward(f, k0, k1, True, &mine)


cdef void backward(void *arg, int me, int team) noexcept nogil:
    cdef Linear *f = <Linear *>arg
    cdef Part mine = begin(f, me, team)
    cdef Py_ssize_t k0, k1
    unit_range(f.n, 1, me, team, &k0, &k1)
    if f.dx != NULL:
        multiply_backward(f, k0, k1, True, &mine)
    add_up(f, 0, f.n, f.add, &mine)


cdef void head(void *arg, int me, int team) noexcept nogil:
    """One block of rows after another: logits y, their loss, dy in their place, dx and dW."""
    cdef Linear *f = <Linear *>arg
    cdef Part mine = begin(f, me, team)
    cdef Py_ssize_t k0, k1, start = 0, end
    cdef char *y
    while start < f.n:
        end = min(f.n, start + f.block)
        unit_range(end - start, 1, me, team, &k0, &k1)
        y = f.y + k0 * f.O * f.item
        k0, k1 = start + k0, start + k1
        multiply_forward(f, k0, k1, start == 0, &mine)
        loss_of_rows(&f.loss, k0, k1, y, y if f.dW != NULL else NULL)
        if f.dW != NULL:
            multiply_backward(f, k0, k1, start == 0, &mine)
            wait(f.barrier, team)
            add_up(f, start, end, f.add or start > 0, &mine)
        wait(f.barrier, team)      # the rows of the next block may be shared out otherwise
        start = end


cdef int fill(Linear *f, x, W, int n_threads, str format) except -1:
    memset(f, 0, sizeof(Linear))
    choose_engine(&f.plan.e, format)
    f.plan.n_threads = n_threads
    f.plan.lay_out, f.plan.prepare = lay_out, prepare
    f.n, f.I, f.O = cnp.PyArray_DIM(x, 0), cnp.PyArray_DIM(x, 1), cnp.PyArray_DIM(W, 0)
    f.item, f.x = f.plan.e.k.item, address(x)
    f.block, f.chunks = f.n, (f.O + CHUNK - 1) // CHUNK
    return 0


cdef int fill_forward(Linear *f, W, b, Packed packed) except -1:
    f.b = address(b)
    if packed is None or f.plan.e.by.over_blas:
        f.W = operand(f.plan.e.k, 1, W, False)
    else:
        f.plan.e, f.W = packed.e, packed.operands[0]
    return 0


cdef int fill_backward(Linear *f, W, g, bint add) except -1:
    f.dx, f.dW, f.db, f.add = address(g.dx), address(g.dW), address(g.db), add
    f.Wt = operand(f.plan.e.k, 1, None if g.dx is None else W, True)
    return 0


def run_forward(x, W, b, y, *, n_threads, format, Packed packed=None):
    """y (n,O) = x (n,I) Wᵀ + b, with W (O,I); n >= 1. packed: of W, and of this format."""
    cdef Linear f
    fill(&f, x, W, n_threads, format)
    fill_forward(&f, W, b, packed)
    f.y, f.plan.work = address(y), forward
    run_plan(<Plan *>&f)


def run_backward(x, W, dy, g, *, n_threads, format, add=False):
    """g: dx (n,I) = dy W, or None; dW (O,I) = dyᵀ x; db (O) = Σ dy; n >= 1. add: to dW and db."""
    cdef Linear f
    fill(&f, x, W, n_threads, format)
    fill_backward(&f, W, g, add)
    f.y, f.plan.work = address(dy), backward
    run_plan(<Plan *>&f)


def run_head(x, W, b, targets, weights, losses, g, *, n_threads, format, add=False,
             Packed packed=None):
    """The losses (n,) of the logits x Wᵀ + b, and g as above with their gradient for dy, or None.

    Of a format that does not train, g is None.
    """
    cdef Linear f
    fill(&f, x, W, n_threads, format)
    fill_forward(&f, W, b, packed)
    if g is not None:
        fill_backward(&f, W, g, add)
    f.loss = loss_of(x, f.O, targets, weights, losses)
    f.block, f.plan.work = f.n, head
    if g is not None or f.n * f.O * f.item > FEW:
        # KW rows, or gradients would have other bits; 64 rows for each thread to share a chunk.
        f.block = min(f.n, <Py_ssize_t>KW * ((n_threads + 3) // 4))
    run_plan(<Plan *>&f)


# ---- an optimizer: a step of Adam --------------------------------------------------------------------

cdef struct AdamStep:
    const lstm_kernels *k
    Py_ssize_t n
    lstm_adam rule
    char *p
    const char *g
    char *m
    char *v


cdef void adam(void *arg, int me, int team) noexcept nogil:
    cdef AdamStep *f = <AdamStep *>arg
    cdef Py_ssize_t start, end, item = f.k.item
    unit_range(f.n, f.k.VL, me, team, &start, &end)
    f.k.adam(end - start, &f.rule, f.p + start * item, f.g + start * item, f.m + start * item,
             f.v + start * item)


def run_adam(p, g, m, v, rule, *, n_threads):
    """A step of Adam on p, with its averages m and v; all contiguous and of one size.

    rule: a mapping of b1, b2, rate, eps, decay, keep.
    """
    cdef AdamStep f
    cdef int team = n_threads
    f.n, f.k, f.rule = cnp.PyArray_SIZE(p), kernels_of(format_of(p)), rule
    f.p, f.g, f.m, f.v = address(p), address(g), address(m), address(v)
    with nogil:
        run_team(team, adam, &f)
