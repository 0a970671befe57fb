# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False
"""The plans of what stands beside the recurrence: a dense layer, a loss, a step of an optimizer.

The dense layer: x (n,I), W (O,I), y (n,O); its rows are shared out among the threads.
"""

from libc.stdint cimport int64_t
from libc.string cimport memset
cimport numpy as cnp

from lstmcore._kernels cimport address, format_of, kernels_of, run_team, team_barrier, wait
from lstmcore._lstm cimport START_BIAS, START_ZERO, lstm_adam, lstm_kernels, lstm_product, lstm_rows
from lstmcore._memory cimport Arena, padded, take
from lstmcore._products cimport (Operand, Packed, Part, Plan, Sums, Widths, choose_engine,
                                 lay_out_operand, operand, run_plan, unit_range)

cnp.import_array()


# ---- a dense layer -----------------------------------------------------------------------------------

cdef struct Linear:
    Plan plan
    Py_ssize_t n, I, O, item
    Operand W
    const char *x
    const char *b
    char *y
    const char *dy
    char *dx
    char *dW
    char *db
    # workspace
    const void **x_rows            # row pointers (n)
    const void **dy_rows
    void **out_rows                # of y or dx
    team_barrier *barrier
    char *scratch                  # of each thread
    Py_ssize_t scratch_bytes


cdef void lay_out(Plan *plan, Arena *arena) noexcept nogil:
    cdef Linear *f = <Linear *>plan
    cdef Py_ssize_t pointers = f.n * sizeof(void *)
    cdef Widths widths
    widths.row, widths.M = max(f.I, f.O), f.O if f.dW != NULL else 0
    f.x_rows = <const void **>take(arena, pointers)
    f.dy_rows = <const void **>take(arena, pointers)
    f.out_rows = <void **>take(arena, pointers)
    f.barrier = <team_barrier *>take(arena, sizeof(team_barrier))
    lay_out_operand(plan, arena, &f.W)
    f.scratch_bytes = padded(plan.e.by.scratch_bytes(plan.e.k, &widths))
    f.scratch = take(arena, plan.n_threads * f.scratch_bytes)


cdef void prepare(Plan *plan) noexcept nogil:
    memset((<Linear *>plan).barrier, 0, sizeof(team_barrier))


cdef void forward(void *arg, int me, int team) noexcept nogil:
    """y = x Wᵀ + b        (n,I) (I,O)"""
    cdef Linear *f = <Linear *>arg
    cdef Py_ssize_t k, k0, k1
    cdef Part whole
    cdef lstm_rows rows
    whole.part, whole.parts, whole.scratch = 0, 1, f.scratch + me * f.scratch_bytes
    f.plan.e.by.pack(f.plan.e.k, &f.W, &whole, me, team)
    unit_range(f.n, 1, me, team, &k0, &k1)
    for k in range(k0, k1):
        f.x_rows[k] = f.x + k * f.I * f.item
        f.out_rows[k] = f.y + k * f.O * f.item
    wait(f.barrier, team)
    rows.start, rows.bias = START_BIAS if f.b != NULL else START_ZERO, f.b
    rows.n, rows.a, rows.C = k1 - k0, f.x_rows + k0, f.out_rows + k0
    f.plan.e.by.multiply(f.plan.e.k, &f.W, &whole, &rows)


cdef void backward(void *arg, int me, int team) noexcept nogil:
    """dx = dy W        (n,O) (O,I);  dW = dyᵀ x        (O,n) (n,I);  db = Σ dy"""
    cdef Linear *f = <Linear *>arg
    cdef Py_ssize_t k, k0, k1
    cdef Part whole, share
    cdef lstm_rows rows
    cdef Sums sums
    cdef lstm_product product
    whole.part, whole.parts, whole.scratch = 0, 1, f.scratch + me * f.scratch_bytes
    share.part, share.parts, share.scratch = me, team, whole.scratch
    unit_range(f.n, 1, me, team, &k0, &k1)
    for k in range(k0, k1):
        f.x_rows[k] = f.x + k * f.I * f.item
        f.dy_rows[k] = f.dy + k * f.O * f.item
    f.plan.e.by.pack(f.plan.e.k, &f.W, &whole, me, team)
    wait(f.barrier, team)
    if f.dx != NULL:
        for k in range(k0, k1):
            f.out_rows[k] = f.dx + k * f.I * f.item
        rows.start, rows.bias = START_ZERO, NULL
        rows.n, rows.a, rows.C = k1 - k0, f.dy_rows + k0, f.out_rows + k0
        f.plan.e.by.multiply(f.plan.e.k, &f.W, &whole, &rows)
    product.x, product.N, product.dW = f.x_rows, f.I, f.dW
    sums.tokens, sums.first, sums.last, sums.da, sums.db = f.n, 0, f.O, f.dy_rows, f.db
    sums.n_products, sums.products = 1, &product
    f.plan.e.by.add_up(f.plan.e.k, &sums, &share)


cdef int fill(Linear *f, x, W, int n_threads, str format) except -1:
    memset(f, 0, sizeof(Linear))
    choose_engine(&f.plan.e, format)
    f.plan.n_threads = n_threads
    f.plan.lay_out, f.plan.prepare = lay_out, prepare
    f.n, f.I, f.O = cnp.PyArray_DIM(x, 0), cnp.PyArray_DIM(x, 1), cnp.PyArray_DIM(W, 0)
    f.item, f.x = f.plan.e.k.item, address(x)
    return 0


def run_forward(x, W, b, y, *, n_threads, format, Packed packed=None):
    """y (n,O) = x (n,I) Wᵀ + b, with W (O,I); n >= 1. packed: of W, and of this format."""
    cdef Linear f
    fill(&f, x, W, n_threads, format)
    f.b, f.y, f.plan.work = address(b), address(y), forward
    if packed is None or f.plan.e.by.over_blas:
        f.W = operand(f.plan.e.k, 1, W, False)
    else:
        f.plan.e, f.W = packed.e, packed.operands[0]
    run_plan(<Plan *>&f)


def run_backward(x, W, dy, g, *, n_threads, format):
    """g: dx (n,I) = dy W, or None; dW (O,I) = dyᵀ x; db (O) = Σ dy; n >= 1."""
    cdef Linear f
    fill(&f, x, W, n_threads, format)
    f.dy, f.plan.work = address(dy), backward
    f.dx, f.dW, f.db = address(g.dx), address(g.dW), address(g.db)
    f.W = operand(f.plan.e.k, 1, None if g.dx is None else W, True)
    run_plan(<Plan *>&f)


# ---- a loss: rows of a softmax cross-entropy ---------------------------------------------------------

cdef struct Loss:
    const lstm_kernels *k
    Py_ssize_t n, V
    const char *z
    const int64_t *targets
    const char *weights
    char *losses
    char *dz


cdef void cross_entropy(void *arg, int me, int team) noexcept nogil:
    cdef Loss *f = <Loss *>arg
    cdef Py_ssize_t r, end, item = f.k.item
    unit_range(f.n, 1, me, team, &r, &end)
    f.k.cross_entropy(end - r, f.V, f.z + r * f.V * item, f.targets + r, f.weights + r * item,
                      f.losses + r * item, f.dz + r * f.V * item)


def run_cross_entropy(z, targets, weights, out, *, n_threads):
    """out: losses (n,) and dz (n, V) of logits z (n, V), V >= 1, and int64 targets (n,) in 0..V-1."""
    cdef Loss f
    cdef int team = n_threads
    losses, dz = out
    f.n, f.V, f.k = cnp.PyArray_DIM(z, 0), cnp.PyArray_DIM(z, 1), kernels_of(format_of(z))
    f.z, f.targets, f.weights = address(z), <int64_t *>address(targets), address(weights)
    f.losses, f.dz = address(losses), address(dz)
    with nogil:
        run_team(team, cross_entropy, &f)


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
