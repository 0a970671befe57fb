# _dense.pxi: the plans of what stands beside the recurrence: dense layer, loss, optimizer.
# Part of _kernels.pyx, which includes it.

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
    if f.ih.W != NULL and not f.prepacked:
        f.ih.packed = take(arena, packed_bytes(f, &f.ih))
    f.thread_bytes = max(weight_gradient_bytes(f), multiply_bytes(f))
    f.thread_bytes = (f.thread_bytes + 63) & ~<size_t>63
    f.thread = take(arena, f.n_threads * f.thread_bytes)


cdef void linear_forward(void *arg, int me, int team) noexcept nogil:
    cdef Pass *f = <Pass *>arg
    cdef Py_ssize_t k, k0 = f.tokens * me // team, k1 = f.tokens * (me + 1) // team
    if not f.prepacked:
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


# ---- a loss: rows of a softmax cross-entropy ---------------------------------------------------------

cdef struct Loss:
    const lstm_kernels *k
    Py_ssize_t n, V, item
    const char *z
    const int64_t *targets
    const char *weights
    char *losses
    char *dz


cdef void cross_entropy(void *arg, int me, int team) noexcept nogil:
    cdef Loss *f = <Loss *>arg
    cdef Py_ssize_t r = f.n * me // team, end = f.n * (me + 1) // team
    f.k.cross_entropy(end - r, f.V, f.z + r * f.V * f.item, f.targets + r, f.weights + r * f.item,
                      f.losses + r * f.item, f.dz + r * f.V * f.item)


# ---- an optimizer: a step of Adam --------------------------------------------------------------------

cdef struct AdamStep:
    const lstm_kernels *k
    Py_ssize_t n, item
    lstm_adam rule
    char *p
    const char *g
    char *m
    char *v


cdef void adam(void *arg, int me, int team) noexcept nogil:
    cdef AdamStep *f = <AdamStep *>arg
    cdef Py_ssize_t start, end
    unit_range(f.n, f.k.VL, me, team, &start, &end)
    f.k.adam(end - start, &f.rule, f.p + start * f.item, f.g + start * f.item,
             f.m + start * f.item, f.v + start * f.item)
