# _forward.pxi: the plan of the forward pass.
# Part of _kernels.pyx, which includes it.

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
    cdef Py_ssize_t s0, s, q, r, at, token, j0, j1
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
        if not f.fused:
            project(f, s0, &mine, running, slab, slabs, a, C, scratch)
        for s in range(s0, min(f.steps, s0 + f.chunk)):
            running = active(f, s, &mine, running)
            for q in range(running):
                r = mine.first + q * mine.stride
                token = f.start[s] + r
                at = place(f, s, r)
                rows[q].h = f.y + at * row_h
                if f.ids == NULL:
                    rows[q].x = f.x + at * row_x
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


cdef inline bint choose_fused(const Pass *f):
    """Whether a step itself multiplies x, instead of one product for a chunk of steps.

    For a single step: it reads all weights once, in one order, and the next one can start with those
    that are still in the cache. And where all weights of a thread stay there, because the
    pre-activations need not be stored and loaded in between: inference +3 to 8 % at (50,256,64,64),
    (50,50,128,128), (20,8,16,32), +2 to 3 % at four shapes with 0.8 to 1 MB a thread.
    """
    if f.ids != NULL or f.rnn or f.blas:
        return False
    if plan is not None:
        return plan == "fused"
    cdef int units = choose_grid(f, f.n_threads).units
    return f.T == 1 or f.G * (f.I + f.K) * f.item // units <= L2_BYTES


cdef void project(const Pass *f, Py_ssize_t s0, const Rows *mine, Py_ssize_t n, int slab, int slabs,
                  const void **a, void **C, char *scratch) noexcept nogil:
    """a = x W_ihᵀ + b        (n,I) (I,G) for all steps of the chunk that starts at s0, n rows there."""
    cdef Py_ssize_t s, q, r, at, j0, j1, count = 0
    unit_range(f.H, f.k.VL, slab, slabs, &j0, &j1)
    for s in range(s0, min(f.steps, s0 + f.chunk)):
        n = active(f, s, mine, n)
        for q in range(n):
            r = mine.first + q * mine.stride
            at = place(f, s, r)
            if f.ids == NULL:
                a[count] = f.x + at * f.I * f.item
            else:
                a[count] = f.table + f.ids[at] * f.G * f.item
            if f.rnn:
                C[count] = f.y + at * f.K * f.item
            else:
                C[count] = f.gates + (f.start[s] + r if f.keep else (s - s0) * f.B + r) * f.G * f.item
            count += 1
    if f.ids == NULL:
        multiply(f, &f.ih, slab, slabs, START_BIAS if f.b != NULL else START_ZERO, count, a, f.b, C,
                 scratch)
    else:
        for q in range(count):
            copy_units(f, C[q], <const char *>a[q], j0, j1)


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
    cdef lstm_weights w
    w.I, w.K, w.H = f.I if f.fused else 0, 0 if from_zero or f.blas else f.K, f.H
    w.ih, w.hh, w.bias = packed_at(f, &f.ih, j0), packed_at(f, &f.hh, j0), f.b
    w.peepholes = f.peepholes
    if f.rnn or f.blas:
        for q in range(n):
            a[q] = rows[q].h_prev
            C[q] = rows[q].h if f.rnn else rows[q].gates
        if not from_zero:
            multiply(f, &f.hh, slab, slabs, START_ADD, n, a, NULL, C, scratch)
    if f.rnn:
        f.k.rnn_cell(f.relu, n, j0, j1, C)
    else:
        f.k.lstm_step(&w, (s & 1) != f.descending, n, j0, j1, rows)
