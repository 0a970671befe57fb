# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False
"""The plan of the backward pass: the time loop, last step first; then what has no recurrence, over all
tokens at once.
"""

from libc.string cimport memcpy
cimport numpy as cnp

from lstmcore._grid cimport Grid, choose_grid
from lstmcore._kernels cimport address, wait
from lstmcore._lstm cimport START_ADD, START_ZERO, lstm_back_row, lstm_normed, lstm_product, lstm_rows, \
    lstm_weights
from lstmcore._memory cimport Arena, take
from lstmcore._products cimport (Engine, Operand, Part, Plan, Sums, Widths, choose_engine,
                                 lay_out_operand, lowered, lowered_rows, lowered_stride, operand, packed_at,
                                 run_plan, unit_range)
from lstmcore._recurrence cimport (Group, Member, Problem, Steps, active, fill_problem, h_seen, initial,
                                   lay_out_problem, loop_of, note_plan, place, rows_of, scratch_of,
                                   share_lowering)

cnp.import_array()


cdef enum: NORM_BLOCK = 48         # tokens: 1.2 MB at H = 512


cdef struct Backward:
    Problem p
    bint apart                     # whether a step's product and cell are not one tile
    Operand ih, hh, hr
    Operand alone                  # the rows of W_ih for gates that x feeds alone; ih holds the others
    const char *dy
    const char *dy_last            # (B, K): dy of each row's last step, plus dh_n
    char *dx
    char *dtable                   # for token ids: the gradient of their table (V, G)
    char *dW_ih
    char *dW_hh
    char *dW_hr
    char *db
    char *dpeepholes
    char *dh0
    char *dm0                      # with a mask: of what the first product sees
    char *dc0
    # workspace
    lstm_back_row *rows            # (B) of each thread
    char *low                      # (B) lowered rows of da, of each thread
    const void **a                 # row pointers for products, (B) of each thread
    void **C
    const void **da                # row pointers of all tokens, in the order of steps
    const void **da_of_h           # the same, from the gates that h feeds on
    const void **x_rows
    const void **h_prev
    const void **c_prev
    const void **c_rows
    const void **m_rows
    const void **dh_rows
    void **dx_rows
    char *m                        # (tokens, H): o ∘ tanh(c), with a projection
    char *dh                       # (tokens, K) with a projection, else (B, K)
    char *dm                       # (B, H)
    # of cells that normalize
    lstm_normed *normed            # (tokens), in the order of steps
    const void **dax               # rows of ax, which become its gradient, or of dah, which is the same
    char *dah                      # (tokens, G)
    char *dn                       # (tokens, H)
    char *dnorms                   # as norms


cdef void lay_out(Plan *plan, Arena *arena) noexcept nogil:
    cdef Backward *f = <Backward *>plan
    cdef Problem *p = &f.p
    cdef Py_ssize_t threads = plan.n_threads, B = p.steps.B, tokens = p.steps.tokens
    cdef Py_ssize_t pointers = tokens * sizeof(void *)
    cdef Widths widths
    widths.row, widths.M = max(max(p.G, p.H), max(p.I, p.K)), max(p.G, p.K)
    lay_out_problem(p, arena, widths)
    f.rows = <lstm_back_row *>take(arena, threads * B * sizeof(lstm_back_row))
    f.low = take(arena, threads * lowered_rows(plan.e.k, B) * lowered_stride(plan.e.k, p.heard))
    f.a = <const void **>take(arena, threads * B * sizeof(void *))
    f.C = <void **>take(arena, threads * B * sizeof(void *))
    f.da = <const void **>take(arena, pointers)
    f.da_of_h = <const void **>take(arena, pointers)
    f.x_rows = <const void **>take(arena, pointers)
    f.h_prev = <const void **>take(arena, pointers)
    if f.dx != NULL:
        f.dx_rows = <void **>take(arena, pointers)
    if p.cell.has_c:
        f.c_prev = <const void **>take(arena, pointers)
        f.c_rows = <const void **>take(arena, pointers)
    lay_out_operand(plan, arena, &f.ih)
    lay_out_operand(plan, arena, &f.alone)
    lay_out_operand(plan, arena, &f.hh)
    lay_out_operand(plan, arena, &f.hr)
    if not p.cell.keeps_gates:
        p.gates = take(arena, tokens * p.G * p.item)
    if p.projected or p.cell.later:
        f.m = take(arena, tokens * p.H * p.item)
        f.m_rows = <const void **>take(arena, pointers)
        f.dm = take(arena, B * p.H * p.item)
    if p.projected:
        f.dh_rows = <const void **>take(arena, pointers)
    if p.norms != NULL:
        f.normed = <lstm_normed *>take(arena, tokens * sizeof(lstm_normed))
        f.dax = <const void **>take(arena, pointers)
        f.dah = take(arena, tokens * p.G * p.item)
        f.dn = take(arena, tokens * p.H * p.item)
    if f.apart:
        f.dh = take(arena, (tokens if p.projected else B) * p.K * p.item)


cdef void backward(void *arg, int me, int team) noexcept nogil:
    cdef Backward *f = <Backward *>arg
    cdef Problem *p = &f.p
    cdef Grid grid = choose_grid(loop_of(p), team)
    cdef int group = me // grid.units
    cdef Py_ssize_t low_bytes
    cdef bint idle = group >= grid.rows
    cdef Part whole, share
    cdef Member m
    whole.part, whole.parts, whole.scratch = 0, 1, scratch_of(p, me)
    share.part, share.parts, share.scratch = me, team, whole.scratch
    m.slab.part, m.slab.parts, m.slab.scratch = me % grid.units, grid.units, whole.scratch
    if me == 0:
        p.grid = grid
    list_tokens(f, me, team)
    if not idle:
        p.plan.e.by.pack(p.plan.e.k, &f.hh, &m.slab, group, grid.rows)
        p.plan.e.by.pack(p.plan.e.k, &f.hr, &m.slab, group, grid.rows)
    p.plan.e.by.pack(p.plan.e.k, &f.ih, &whole, me, team)
    p.plan.e.by.pack(p.plan.e.k, &f.alone, &whole, me, team)
    wait(&p.shared.barriers[0], team)
    if not idle:
        m.own, m.barrier = rows_of(&p.steps, group, grid.rows), &p.shared.barriers[1 + group]
        m.products.a, m.products.C = f.a + me * p.steps.B, f.C + me * p.steps.B
        low_bytes = lowered_rows(p.plan.e.k, p.steps.B) * lowered_stride(p.plan.e.k, p.heard)
        m.products.bias = NULL
        m.low, m.low_shared = f.low + me * low_bytes, f.low + group * grid.units * low_bytes
        backward_rows(f, &m, f.rows + me * p.steps.B)
    wait(&p.shared.barriers[0], team)
    if p.norms != NULL:
        norm_gradients(f, &share)
    if f.dx != NULL:
        input_gradient(f, &share)
    add_up_gradients(f, &share)


cdef void list_tokens(Backward *f, int me, int team) noexcept nogil:
    """Row pointers of every token, for the sums over time; tokens are in the order of steps."""
    cdef Problem *p = &f.p
    cdef Steps *steps = &p.steps
    cdef Py_ssize_t s, r, n = steps.B, k = 0, at, token
    cdef Group all_rows = rows_of(steps, 0, 1)
    cdef Py_ssize_t row_h = p.K * p.item, row_c = p.H * p.item
    for s in range(steps.count):
        n = active(steps, s, &all_rows, n)
        if s % team == me:
            for r in range(n):
                at, token = place(steps, s, r), steps.start[s] + r
                if p.ids == NULL:
                    f.x_rows[k + r] = p.x + at * p.I * p.item
                else:
                    f.x_rows[k + r] = f.dtable + p.ids[at] * p.G * p.item
                f.da[k + r], f.da_of_h[k + r] = p.gates + token * p.G * p.item, fed_by_h(f, token)
                if p.norms != NULL:
                    f.dax[k + r] = (f.dah if p.cell.norm_inputs == NULL else p.ax) + token * p.G * p.item
                    f.normed[k + r].da, f.normed[k + r].ax = f.da[k + r], p.ax + token * p.G * p.item
                    f.normed[k + r].ah = p.ah + token * p.G * p.item
                    f.normed[k + r].moments = p.moments + token * p.cell.moments * p.item
                    f.normed[k + r].raw = (p.raw if p.cell.keeps_raw else p.c) + token * row_c
                    f.normed[k + r].dn = f.dn + token * row_c
                f.h_prev[k + r] = h_before(p, s, r) if p.mask == NULL else h_seen(p, s, r)
                if p.cell.has_c:
                    f.c_rows[k + r] = p.c + token * row_c
                    f.c_prev[k + r] = c_before(p, s, r)
                if p.projected or p.cell.later:
                    f.m_rows[k + r] = f.m + (k + r) * row_c
                if p.projected:
                    f.dh_rows[k + r] = f.dh + (k + r) * row_h
        k += n


cdef inline const char *h_before(const Problem *p, Py_ssize_t s, Py_ssize_t r) noexcept nogil:
    """h_{t-1} of step s of row r."""
    if s > 0:
        return p.y + place(&p.steps, s - 1, r) * p.K * p.item
    return initial(p, p.h0, r, p.K * p.item)


cdef inline const char *c_before(const Problem *p, Py_ssize_t s, Py_ssize_t r) noexcept nogil:
    """c_{t-1} of step s of row r."""
    if s > 0:
        return p.c + (p.steps.start[s - 1] + r) * p.H * p.item
    return initial(p, p.c0, r, p.H * p.item)


# ---- the time loop -----------------------------------------------------------------------------------

cdef void backward_rows(Backward *f, Member *m, lstm_back_row *rows) noexcept nogil:
    """Last step first, for the rows of a group and one slab of their units."""
    cdef Problem *p = &f.p
    cdef Steps *steps = &p.steps
    cdef Py_ssize_t s, q, r, n, going_on = 0
    for s in range(steps.count - 1, -1, -1):
        n = active(steps, s, &m.own, m.own.n)  # of these, the first `going_on` have a step s + 1
        for q in range(n):
            place_row(f, s, m.own.first + q * m.own.stride, q < going_on, &rows[q])
        if f.apart:
            multiply_apart(f, s, n, going_on, m, rows)
            if p.norms != NULL:
                normed_step(f, n, m, rows)
            else:
                step(f, s, n, 0, m, rows)
        else:
            step(f, s, n, going_on, m, rows)
        if p.cell.later:
            wait(m.barrier, m.slab.parts)
            later_step(f, s, n, m, rows)
        going_on = n
        wait(m.barrier, m.slab.parts)
    # dh0 = da_0 W_hh        (n,heard) (heard,K), to which a cell that reads h has added already
    for q in range(going_on):
        r = m.own.first + q * m.own.stride
        m.products.a[q] = fed_by_h(f, steps.start[0] + r)
        m.products.C[q] = (f.dh0 if p.mask == NULL else f.dm0) + steps.order[r] * p.K * p.item
    m.products.start = START_ADD if p.cell.reads_h and p.mask == NULL else START_ZERO
    m.products.n = going_on
    p.plan.e.by.multiply(p.plan.e.k, &f.hh, &m.slab, &m.products)


cdef inline const char *fed_by_h(const Backward *f, Py_ssize_t token) noexcept nogil:
    """What reaches h W_hhᵀ of a token: its gates from the first that h feeds on."""
    cdef const Problem *p = &f.p
    if p.norms != NULL:
        return f.dah + token * p.G * p.item
    return p.gates + (token * p.G + p.G - p.fed) * p.item


cdef inline void place_row(const Backward *f, Py_ssize_t s, Py_ssize_t r, bint goes_on,
                           lstm_back_row *row) noexcept nogil:
    """Where step s of row r reads and writes."""
    cdef const Problem *p = &f.p
    cdef const Steps *steps = &p.steps
    cdef Py_ssize_t token = steps.start[s] + r, at = place(steps, s, r), row_h = p.K * p.item
    row.gates = p.gates + token * p.G * p.item
    row.dy = f.dy + at * row_h
    if goes_on:
        row.da_next = fed_by_h(f, steps.start[s + 1] + r)
    elif f.dy_last != NULL:
        row.dy = f.dy_last + steps.order[r] * row_h
    if p.cell.varies:
        row.mask = p.mask + steps.order[r] * row_h if p.mask != NULL else NULL
        row.zone = p.zone + at * 2 * row_h if p.zone != NULL else NULL
        if p.mask != NULL:
            row.dy, row.dy_apart = p.shared.zeros, row.dy
    if p.norms != NULL:
        row.ax, row.ah = p.ax + token * p.G * p.item, p.ah + token * p.G * p.item
        row.dah, row.dn = f.dah + token * p.G * p.item, f.dn + token * p.H * p.item
        row.moments = p.moments + token * p.cell.moments * p.item
        row.raw = p.raw + token * p.H * p.item if p.cell.keeps_raw else NULL
    if not p.cell.keeps_gates:
        row.h = p.y + at * row_h
    if p.cell.reads_h:
        row.h_prev, row.dh = h_before(p, s, r), f.dh0 + steps.order[r] * row_h
    if p.cell.has_c:
        row.c, row.c_prev = p.c + token * p.H * p.item, c_before(p, s, r)
        row.dc = f.dc0 + steps.order[r] * p.H * p.item


cdef inline void step(const Backward *f, Py_ssize_t s, Py_ssize_t n, Py_ssize_t multiplied, Member *m,
                      lstm_back_row *rows) noexcept nogil:
    """dh = dy + da_next W_hh for the first rows, dh = dy for the others, then the cell's gradient."""
    cdef const Problem *p = &f.p
    cdef Py_ssize_t q, j0, j1, q0, q1
    cdef char *low
    cdef bint together
    cdef lstm_weights w
    w.no_tape, w.variant = False, &p.variant
    unit_range(p.H, p.plan.e.k.VL, m.slab.part, m.slab.parts, &j0, &j1)
    together = share_lowering(p.plan.e.k, m, multiplied, p.heard, &low, &q0, &q1)
    for q in range(multiplied):
        rows[q].da_next = lowered(p.plan.e.k, p.heard, rows[q].da_next, low, q, q0 <= q < q1)
    if together:
        wait(m.barrier, m.slab.parts)
    w.I, w.H, w.ih, w.bias, w.peepholes = 0, p.H, NULL, NULL, p.peepholes
    if multiplied:
        w.K, w.hh = p.heard, packed_at(p.plan.e.k, &f.hh, j0)
        p.cell.back_step(&w, s & 1, multiplied, j0, j1, rows)
    w.K, w.hh = 0, NULL
    p.cell.back_step(&w, s & 1, n - multiplied, j0, j1, rows + multiplied)


cdef void normed_step(const Backward *f, Py_ssize_t n, Member *m, lstm_back_row *rows) noexcept nogil:
    """The gradient of a cell that normalizes, in parts between which all units are waited for."""
    cdef const Problem *p = &f.p
    cdef Py_ssize_t j0, j1
    cdef int part
    cdef lstm_weights w
    unit_range(p.H, p.plan.e.k.VL, m.slab.part, m.slab.parts, &j0, &j1)
    w.H, w.norms = p.H, p.norms
    for part in range(3):
        wait(m.barrier, m.slab.parts)
        p.cell.norm_back_step(&w, part, n, j0, j1, rows)


cdef void later_step(Backward *f, Py_ssize_t s, Py_ssize_t n, Member *m,
                     lstm_back_row *rows) noexcept nogil:
    """dm = da W_hh of the last gate        (n,H) (H,H), then the rest of the cell's gradient."""
    cdef const Problem *p = &f.p
    cdef Py_ssize_t q, r, j0, j1
    cdef lstm_weights w
    w.no_tape, w.variant = False, NULL
    unit_range(p.H, f.hr.cut, m.slab.part, m.slab.parts, &j0, &j1)
    w.I, w.K, w.H, w.ih, w.bias, w.peepholes = 0, p.H, p.H, NULL, NULL, NULL
    w.hh = packed_at(p.plan.e.k, &f.hr, j0)
    for q in range(n):
        r = m.own.first + q * m.own.stride
        rows[q].gates = <char *>rows[q].gates + (p.G - p.H) * p.item
        rows[q].m = <void *>f.m_rows[p.steps.first[s] + r]
        rows[q].dy = p.shared.zeros
        m.products.a[q], m.products.C[q] = rows[q].gates, f.dm + r * p.H * p.item
        if p.plan.e.by.in_step:
            rows[q].da_next = lowered(p.plan.e.k, p.H, rows[q].gates, m.low, q, True)
        else:
            rows[q].dy = m.products.C[q]
    if not p.plan.e.by.in_step:
        w.K = 0
        m.products.start, m.products.n = START_ZERO, n
        p.plan.e.by.multiply(p.plan.e.k, &f.hr, &m.slab, &m.products)
    p.cell.later_back_step(&w, s & 1, n, j0, j1, rows)


cdef void multiply_apart(Backward *f, Py_ssize_t s, Py_ssize_t n, Py_ssize_t going_on, Member *m,
                         lstm_back_row *rows) noexcept nogil:
    """What a step would multiply, in rows of dh; with a projection, then through it: into dm."""
    cdef Problem *p = &f.p
    cdef Py_ssize_t q, r, p0, p1, j0, j1, row_h = p.K * p.item
    unit_range(p.K, f.hh.cut, m.slab.part, m.slab.parts, &p0, &p1)
    for q in range(n):  # dh = dy + da_next W_hh        (n,heard) (heard,K)
        r = m.own.first + q * m.own.stride
        m.products.a[q] = rows[q].da_next
        m.products.C[q] = f.dh + (p.steps.first[s] + r if p.projected else r) * row_h
        memcpy(<char *>m.products.C[q] + p0 * p.item, <const char *>rows[q].dy + p0 * p.item,
               (p1 - p0) * p.item)
        rows[q].dy = m.products.C[q]
    m.products.start, m.products.n = START_ADD, going_on
    p.plan.e.by.multiply(p.plan.e.k, &f.hh, &m.slab, &m.products)
    if not p.projected:
        return
    wait(m.barrier, m.slab.parts)
    unit_range(p.H, p.plan.e.k.VL, m.slab.part, m.slab.parts, &j0, &j1)
    for q in range(n):  # o ∘ tanh(c) for dW_hr, while the gates are there;  dm = dh W_hr  (n,P) (P,H)
        r = m.own.first + q * m.own.stride
        p.cell.output(1, p.H, j0, j1, <const void **>&rows[q].gates, &rows[q].c,
                      <void **>&f.m_rows[p.steps.first[s] + r])
        m.products.a[q] = m.products.C[q]
        m.products.C[q] = f.dm + r * p.H * p.item
        rows[q].dy = m.products.C[q]
    m.products.start, m.products.n = START_ZERO, n
    p.plan.e.by.multiply(p.plan.e.k, &f.hr, &m.slab, &m.products)


# ---- what has no recurrence --------------------------------------------------------------------------

cdef void norm_gradients(Backward *f, const Part *share) noexcept nogil:
    """The gradient of `norms`, this thread's share of its units, and what reaches x W_ihᵀ, its share of the
    tokens: a block after the other, which stays in the cache in between."""
    cdef Problem *p = &f.p
    cdef Py_ssize_t k, n, k0, k1, j0, j1
    unit_range(p.H, p.plan.e.k.VL, share.part, share.parts, &j0, &j1)
    k = 0
    while k < p.steps.tokens:
        n = min(<Py_ssize_t>NORM_BLOCK, p.steps.tokens - k)
        p.cell.norm_gradient(n, p.H, j0, j1, f.normed + k, f.dnorms)
        if p.cell.norm_inputs != NULL:
            wait(&p.shared.barriers[0], share.parts)
            unit_range(n, 1, share.part, share.parts, &k0, &k1)
            p.cell.norm_inputs(k1 - k0, p.H, f.normed + k + k0, p.norms)
        k += n
    wait(&p.shared.barriers[0], share.parts)


cdef void input_gradient(Backward *f, const Part *share) noexcept nogil:
    """dx = da W_ih        (n,fed) (fed,I), for a share of the tokens; what x feeds alone comes last."""
    cdef Problem *p = &f.p
    cdef Py_ssize_t k, k0, k1
    cdef Part whole
    cdef lstm_rows rows
    unit_range(p.steps.tokens, 1, share.part, share.parts, &k0, &k1)
    for k in range(k0, k1):
        f.dx_rows[k] = f.dx + (<const char *>f.x_rows[k] - p.x)
    whole.part, whole.parts, whole.scratch = 0, 1, share.scratch
    rows.n, rows.bias, rows.C = k1 - k0, NULL, f.dx_rows + k0
    rows.start, rows.a = START_ZERO, f.da_of_h + k0 if p.norms == NULL else f.dax + k0
    p.plan.e.by.multiply(p.plan.e.k, &f.ih, &whole, &rows)
    if p.cell.apart:
        rows.start, rows.a = START_ADD, f.da + k0
        p.plan.e.by.multiply(p.plan.e.k, &f.alone, &whole, &rows)


cdef void add_up_gradients(Backward *f, const Part *share) noexcept nogil:
    """The gradients of the weights, this thread's share of their rows."""
    cdef Problem *p = &f.p
    cdef Py_ssize_t j0, j1, apart = p.G - p.fed
    cdef lstm_product products[2]
    cdef Sums sums
    sums.tokens, sums.da, sums.products = p.steps.tokens, f.da, products
    sums.add = False
    products[0].x, products[0].N = f.h_prev, p.K
    products[1].x, products[1].N = f.x_rows, p.I
    # rows are counted as those of da, which begin with what x feeds alone; in W it comes last
    products[0].dW = f.dW_hh - apart * p.K * p.item
    products[1].dW, sums.db = f.dW_ih - apart * p.I * p.item, f.db - apart * p.item
    sums.first, sums.last = apart, min(p.fed, apart + p.heard)
    sums.n_products = 2 if p.ids == NULL else 1
    if p.norms != NULL:  # three gradients of three sums
        sums.n_products = 0
        p.plan.e.by.add_up(p.plan.e.k, &sums, share)
        sums.da, sums.n_products, sums.db = f.da_of_h, 1, NULL
        p.plan.e.by.add_up(p.plan.e.k, &sums, share)
        sums.da, sums.products = f.dax, products + 1
        sums.n_products = 1 if p.ids == NULL else 0
    if sums.n_products or sums.db != NULL:
        p.plan.e.by.add_up(p.plan.e.k, &sums, share)
    if p.cell.later:
        products[0].x = f.m_rows
        sums.first, sums.last = p.heard, p.fed
        p.plan.e.by.add_up(p.plan.e.k, &sums, share)
    if apart:  # what h feeds alone, then what x feeds alone
        sums.first, sums.last, sums.n_products, sums.db = p.fed, p.G, 1, f.db
        p.plan.e.by.add_up(p.plan.e.k, &sums, share)
        products[1].dW = f.dW_ih + (p.fed - apart) * p.I * p.item
        sums.first, sums.last, sums.products = 0, apart, products + 1
        sums.n_products, sums.db = 1 if p.ids == NULL else 0, f.db + (p.fed - apart) * p.item
        p.plan.e.by.add_up(p.plan.e.k, &sums, share)
    if p.ids != NULL:  # dtable[id] += da
        unit_range(p.G, p.plan.e.k.VL, share.part, share.parts, &j0, &j1)
        p.plan.e.k.add_rows(p.steps.tokens, j0, j1, f.da if p.norms == NULL else f.dax, <void **>f.x_rows)
    if f.dpeepholes != NULL:
        unit_range(p.H, p.plan.e.k.VL, share.part, share.parts, &j0, &j1)
        p.cell.peephole_gradient(p.steps.tokens, p.H, j0, j1, f.da, f.c_prev, f.c_rows, f.dpeepholes)
    if p.projected:
        products[0].x, products[0].N, products[0].dW = f.m_rows, p.H, f.dW_hr
        sums.first, sums.last, sums.products = 0, p.K, products
        sums.da, sums.n_products, sums.db = f.dh_rows, 1, NULL
        p.plan.e.by.add_up(p.plan.e.k, &sums, share)


# ---- entry point -------------------------------------------------------------------------------------

def run(cell, weights, batch, tape, upstream, g, *, n_threads, dtable=None):
    """Fills the gradients g from a tape (y, gates, c), whose gates become da.

    See fill_problem for weights and batch. upstream: dy and dy_last (B, K), dy of each row's last step
    plus dh_n, or None if there is no dh_n or the cell reads h, which finds dh_n in dh0; dm0 (B, H), to be
    filled with the gradient of h0 ∘ mask, if there is a mask. g: dx, dW_ih,
    dW_hh, db, dpeepholes, dh0, dc0, dW_hr, of which dh0 and dc0 hold dh_n and dc_n on entry. For token
    ids g.dx is None, and dtable (V, G), zero on entry, takes the place of g.dW_ih.
    """
    cdef Backward f
    cdef Engine e
    choose_engine(&e, weights.format)
    fill_problem(&f.p, e, cell, weights, batch, tape)
    f.p.plan.lay_out, f.p.plan.work, f.p.plan.n_threads = lay_out, backward, n_threads
    f.apart = f.p.projected or not f.p.plan.e.by.in_step or f.p.norms != NULL
    f.dnorms = address(g.dnorms)
    f.dy, f.dy_last, f.dx = address(upstream.dy), address(upstream.dy_last), address(g.dx)
    f.dtable, f.dW_ih, f.dW_hh = address(dtable), address(g.dW_ih), address(g.dW_hh)
    f.dW_hr, f.db, f.dpeepholes = address(g.dW_hr), address(g.db), address(g.dpeepholes)
    f.dh0, f.dc0, f.dm0 = address(g.dh0), address(g.dc0), address(upstream.dm0)
    W_ih, W_hh = None if g.dx is None else weights.W_ih, weights.W_hh
    f.alone = operand(e.k, 1, None, True)
    if W_ih is not None and f.p.cell.apart:
        f.alone = operand(e.k, 1, W_ih[cell.turn * f.p.H:], True)
        W_ih = W_ih[:cell.turn * f.p.H]
    f.ih = operand(e.k, 1, W_ih, True)
    f.hh = operand(e.k, 1, W_hh[:f.p.heard], True)
    f.hr = operand(e.k, 1, W_hh[f.p.heard:] if cell.later else weights.W_hr, True)
    run_plan(<Plan *>&f)
    note_plan(&f.p, False)
