# _backward.pxi: the plan of the backward pass.
# Part of _kernels.pyx, which includes it.

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
    cdef Py_ssize_t s, q, r, at, j0, j1, n, going_on = 0
    cdef Rows mine = rows_of(f, group, groups)
    cdef Py_ssize_t row_h = f.K * f.item, row_c = f.H * f.item, row_g = f.G * f.item
    cdef team_barrier *barrier = &f.barriers[1 + group]
    cdef lstm_back_row *row
    cdef lstm_weights w
    unit_range(f.H, f.k.VL, slab, slabs, &j0, &j1)
    w.H, w.hh, w.peepholes = f.H, packed_at(f, &f.hh, j0), f.peepholes
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
            w.K = f.G
            f.k.lstm_back_step(&w, s & 1, going_on, j0, j1, rows)
            w.K = 0
            f.k.lstm_back_step(&w, s & 1, n - going_on, j0, j1, rows + going_on)
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
    cdef lstm_weights w
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
    w.K, w.H, w.hh, w.peepholes = 0, f.H, NULL, f.peepholes
    f.k.lstm_back_step(&w, False, n, j0, j1, rows)


cdef void input_gradient(Pass *f, int me, int team, char *scratch) noexcept nogil:
    """dx = da W_ih        (n,G) (G,I), for a share of the tokens."""
    cdef Py_ssize_t k0 = f.tokens * me // team, k1 = f.tokens * (me + 1) // team, k
    for k in range(k0, k1):
        f.C[k] = f.dx + (<const char *>f.x_rows[k] - f.x)
    multiply(f, &f.ih, 0, 1, START_ZERO, k1 - k0, f.da + k0, NULL, f.C + k0, scratch)
