# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False
"""The plan of the forward pass: who computes which rows and units, step after step."""

from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset
cimport numpy as cnp

from lstmcore._grid cimport Grid, choose_chunk, choose_fused, choose_grid
from lstmcore._kernels cimport address, forced_plan, overlap, wait
from lstmcore._lstm cimport START_ADD, START_BIAS, START_ZERO, lstm_kernels, lstm_row, lstm_weights
from lstmcore._memory cimport Arena, take
from lstmcore._products cimport (Engine, Operand, Packed, Part, Plan, Widths, choose_engine,
                                 lay_out_operand, lowered, lowered_rows, lowered_stride, operand,
                                 packed_at, run_plan, unit_range)
from lstmcore._recurrence cimport (Member, Problem, Steps, active, fill_problem, h_seen, initial,
                                   lay_out_problem, loop_of, note_plan, place, rows_of, scratch_of,
                                   share_lowering)

cnp.import_array()


cdef struct Forward:
    Problem p
    bint keep                      # whether gates and c are the tape's
    bint fused                     # whether a step multiplies x
    bint descending                # whether step 0 goes through the panels last first
    Py_ssize_t chunk               # steps per input projection
    Operand ih, hh
    Operand hr                     # of the product with m: W_hr, or the last gate's rows of W_hh
    const char *b
    const char *table              # (V, G): what each token id projects to, bias included
    char *h_n
    char *c_n
    # workspace
    lstm_row *rows                 # (B) of each thread
    char *low                      # (B) lowered rows of h and, if fused, x, of each thread
    const void **a                 # row pointers for products, (chunk·B) of each thread
    void **C
    char *m                        # (B, H): o ∘ tanh(c), with a projection; or of a later product


cdef void lay_out(Plan *plan, Arena *arena) noexcept nogil:
    cdef Forward *f = <Forward *>plan
    cdef Problem *p = &f.p
    cdef Py_ssize_t threads = plan.n_threads, B = p.steps.B
    cdef Widths widths
    widths.row, widths.M = max(p.G, max(p.I, p.K)), 0
    lay_out_problem(p, arena, widths)
    f.rows = <lstm_row *>take(arena, threads * B * sizeof(lstm_row))
    f.a = <const void **>take(arena, threads * f.chunk * B * sizeof(void *))
    f.C = <void **>take(arena, threads * f.chunk * B * sizeof(void *))
    f.low = take(arena, threads * low_bytes(p))
    lay_out_operand(plan, arena, &f.ih)
    lay_out_operand(plan, arena, &f.hh)
    lay_out_operand(plan, arena, &f.hr)
    if p.projected or p.cell.later:
        f.m = take(arena, B * p.H * p.item)
    if p.cell.keeps_gates and not f.keep:
        p.gates = take(arena, f.chunk * B * p.G * p.item)
    if p.norms != NULL and not f.keep:
        p.ax = take(arena, f.chunk * B * p.G * p.item)
        p.ah = take(arena, B * p.G * p.item)
        p.raw = take(arena, B * p.H * p.item) if p.cell.keeps_raw else NULL


cdef inline Py_ssize_t low_bytes(const Problem *p) noexcept nogil:
    """Of the lowered rows of h and x of one thread."""
    cdef const lstm_kernels *k = p.plan.e.k
    return lowered_rows(k, p.steps.B) * (lowered_stride(k, p.K) + lowered_stride(k, p.I))


cdef void forward(void *arg, int me, int team) noexcept nogil:
    cdef Forward *f = <Forward *>arg
    cdef Problem *p = &f.p
    cdef Grid grid = choose_grid(loop_of(p), team)
    cdef int group = me // grid.units
    cdef Member m
    m.slab.part, m.slab.parts, m.slab.scratch = me % grid.units, grid.units, scratch_of(p, me)
    if me == 0:
        p.grid = grid
    p.plan.e.by.pack(p.plan.e.k, &f.ih, &m.slab, group, grid.rows)
    p.plan.e.by.pack(p.plan.e.k, &f.hh, &m.slab, group, grid.rows)
    p.plan.e.by.pack(p.plan.e.k, &f.hr, &m.slab, group, grid.rows)
    wait(&p.shared.barriers[0], team)
    if group < grid.rows:
        m.own, m.barrier = rows_of(&p.steps, group, grid.rows), &p.shared.barriers[1 + group]
        m.products.a = f.a + me * f.chunk * p.steps.B
        m.products.C = f.C + me * f.chunk * p.steps.B
        m.products.bias = NULL
        m.low, m.low_shared = f.low + me * low_bytes(p), f.low + group * grid.units * low_bytes(p)
        forward_rows(f, &m, f.rows + me * p.steps.B)


cdef void forward_rows(Forward *f, Member *m, lstm_row *rows) noexcept nogil:
    """The time loop for the rows of a group and one slab of their units.

    The threads of a group fill the same rows with the same values: each writes its own copy.
    """
    cdef Problem *p = &f.p
    cdef Steps *steps = &p.steps
    cdef Py_ssize_t s0, s, q, r, running = m.own.n
    cdef Py_ssize_t row_h = p.K * p.item, row_c = p.H * p.item
    for q in range(m.own.n):
        r = m.own.first + q * m.own.stride
        rows[q].h_prev, rows[q].c_prev = initial(p, p.h0, r, row_h), initial(p, p.c0, r, row_c)
    s0 = -f.chunk
    while s0 + f.chunk < steps.count:
        s0 += f.chunk
        if not f.fused:
            project_inputs(f, s0, running, m)
        for s in range(s0, min(steps.count, s0 + f.chunk)):
            running = active(steps, s, &m.own, running)
            for q in range(running):
                place_row(f, s, s0, m.own.first + q * m.own.stride, &rows[q])
            if p.norms != NULL:
                normed_step(f, s, running, m, rows)
            else:
                step(f, s, running, m, rows)
            if p.cell.later:
                wait(m.barrier, m.slab.parts)
                later_step(f, s, running, m, rows)
            if p.projected:
                wait(m.barrier, m.slab.parts)
                project_outputs(f, s, running, m, rows)
            for q in range(running):
                rows[q].h_prev, rows[q].c_prev = rows[q].h, rows[q].c
            wait(m.barrier, m.slab.parts)
    if m.slab.part == 0:
        for q in range(m.own.n):
            r = steps.order[m.own.first + q * m.own.stride]
            memcpy(f.h_n + r * row_h, rows[q].h_prev, row_h)
            if p.cell.has_c and rows[q].c_prev != f.c_n + r * row_c:
                memcpy(f.c_n + r * row_c, rows[q].c_prev, row_c)


cdef inline void place_row(const Forward *f, Py_ssize_t s, Py_ssize_t s0, Py_ssize_t r,
                           lstm_row *row) noexcept nogil:
    """Where step s of row r reads and writes."""
    cdef const Problem *p = &f.p
    cdef Py_ssize_t at = place(&p.steps, s, r)
    row.h = f.m + r * p.H * p.item if p.projected else p.y + at * p.K * p.item
    row.gates = gates_at(f, p.gates, s, s0, r) if p.cell.keeps_gates else row.h
    if p.cell.later:
        row.m = f.m + r * p.H * p.item
    if p.ids == NULL:
        row.x = p.x + at * p.I * p.item
    if p.cell.varies:
        row.mask = p.mask + p.steps.order[r] * p.H * p.item if p.mask != NULL else NULL
        row.zone = p.zone + at * 2 * p.H * p.item if p.zone != NULL else NULL
        row.m = p.m + (p.steps.start[s] + r) * p.H * p.item
    if p.norms != NULL:
        row.ax = gates_at(f, p.ax, s, s0, r)
        row.ah = p.ah + (p.steps.start[s] + r if f.keep else r) * p.G * p.item
        row.moments = p.moments + (p.steps.start[s] + r) * p.cell.moments * p.item if f.keep else NULL
        row.raw = p.raw + (p.steps.start[s] + r if f.keep else r) * p.H * p.item if p.cell.keeps_raw else NULL
    if p.cell.has_c:
        row.c = p.c + (p.steps.start[s] + r) * p.H * p.item if f.keep \
            else f.c_n + p.steps.order[r] * p.H * p.item


cdef inline char *gates_at(const Forward *f, char *gates, Py_ssize_t s, Py_ssize_t s0,
                           Py_ssize_t r) noexcept nogil:
    """A row of gates of step s of row r: in the tape or, without one, in the chunk that starts at s0."""
    cdef Py_ssize_t token = f.p.steps.start[s] + r if f.keep else (s - s0) * f.p.steps.B + r
    return gates + token * f.p.G * f.p.item


cdef void project_inputs(const Forward *f, Py_ssize_t s0, Py_ssize_t n, Member *m) noexcept nogil:
    """a = x W_ihᵀ + b        (n,I) (I,fed) for all steps of the chunk that starts at s0, n rows there.

    Without b, in the rows of ax, for cells that normalize.
    """
    cdef const Problem *p = &f.p
    cdef Py_ssize_t s, q, r, at, count = 0
    for s in range(s0, min(p.steps.count, s0 + f.chunk)):
        n = active(&p.steps, s, &m.own, n)
        for q in range(n):
            r = m.own.first + q * m.own.stride
            at = place(&p.steps, s, r)
            m.products.a[count] = p.x + at * p.I * p.item if p.ids == NULL \
                else f.table + p.ids[at] * p.G * p.item
            m.products.C[count] = gates_at(f, p.gates if p.norms == NULL else p.ax, s, s0, r) \
                if p.cell.keeps_gates else p.y + at * p.K * p.item
            count += 1
    if p.ids != NULL:
        for q in range(count):
            copy_units(f, m.products.C[q], <const char *>m.products.a[q], 0, &m.slab)
        return
    m.products.n, m.products.bias = count, f.b
    m.products.start = START_BIAS if f.b != NULL and p.norms == NULL else START_ZERO
    p.plan.e.by.multiply(p.plan.e.k, &f.ih, &m.slab, &m.products)
    for q in range(count if p.cell.apart else 0):
        copy_units(f, m.products.C[q], f.b, p.fed // p.H, &m.slab)


cdef inline void copy_units(const Forward *f, void *out, const char *row, Py_ssize_t gate,
                            const Part *slab) noexcept nogil:
    """The pre-activations of this thread's units from a gate on; row is NULL for zeros."""
    cdef Py_ssize_t j0, j1, H = f.p.H, item = f.p.item
    unit_range(H, f.hh.cut, slab.part, slab.parts, &j0, &j1)
    for gate in range(gate, f.p.cell.gates):
        if row == NULL:
            memset(<char *>out + (gate * H + j0) * item, 0, (j1 - j0) * item)
        else:
            memcpy(<char *>out + (gate * H + j0) * item, row + (gate * H + j0) * item,
                   (j1 - j0) * item)


cdef inline void step(const Forward *f, Py_ssize_t s, Py_ssize_t n, Member *m,
                      lstm_row *rows) noexcept nogil:
    """One step of n rows on one slab of units: a += h_prev W_hhᵀ, then the cell."""
    cdef const Problem *p = &f.p
    cdef bint in_step = p.plan.e.by.in_step, from_zero = s == 0 and p.h0 == NULL
    cdef Py_ssize_t q, j0, j1, q0, q1
    cdef const void *seen
    cdef char *low
    cdef char *x_low
    cdef lstm_weights w
    cdef bint together
    unit_range(p.H, f.hh.cut, m.slab.part, m.slab.parts, &j0, &j1)
    w.I, w.K, w.H = p.I if f.fused else 0, 0 if from_zero or not in_step else p.K, p.H
    w.ih, w.hh = packed_at(p.plan.e.k, &f.ih, j0), packed_at(p.plan.e.k, &f.hh, j0)
    w.bias, w.peepholes, w.no_tape, w.variant = f.b, p.peepholes, not f.keep, &p.variant
    together = share_lowering(p.plan.e.k, m, n, w.K + w.I, &low, &q0, &q1)
    x_low = low + lowered_rows(p.plan.e.k, p.steps.B) * lowered_stride(p.plan.e.k, p.K)
    for q in range(n if in_step else 0):
        seen = rows[q].h_prev if p.mask == NULL else h_seen(p, s, m.own.first + q * m.own.stride)
        rows[q].h_low = lowered(p.plan.e.k, w.K, seen, low, q, q0 <= q < q1)
        rows[q].x = lowered(p.plan.e.k, w.I, rows[q].x, x_low, q, q0 <= q < q1)
    if together:
        wait(m.barrier, m.slab.parts)
    if not in_step and not from_zero:
        for q in range(n):
            m.products.a[q] = rows[q].h_prev if p.mask == NULL else h_seen(p, s, m.own.first + q * m.own.stride)
            m.products.C[q] = <char *>rows[q].gates + (p.G - p.fed) * p.item
        m.products.start, m.products.n = START_ADD, n
        p.plan.e.by.multiply(p.plan.e.k, &f.hh, &m.slab, &m.products)
    p.cell.step(&w, (s & 1) != f.descending, n, j0, j1, rows)


cdef void normed_step(const Forward *f, Py_ssize_t s, Py_ssize_t n, Member *m,
                      lstm_row *rows) noexcept nogil:
    """One step of a cell that normalizes: ah = h_prev W_hhᵀ, gates and c, h; between them, all units."""
    cdef const Problem *p = &f.p
    cdef Py_ssize_t q, j0, j1
    cdef lstm_weights w
    unit_range(p.H, f.hh.cut, m.slab.part, m.slab.parts, &j0, &j1)
    w.I, w.K, w.H, w.ih, w.hh, w.bias = 0, 0, p.H, NULL, NULL, f.b
    w.peepholes, w.no_tape, w.variant, w.norms = NULL, not f.keep, NULL, p.norms
    for q in range(n):
        m.products.a[q], m.products.C[q] = rows[q].h_prev, <void *>rows[q].ah
        if s == 0 and p.h0 == NULL:
            copy_units(f, <void *>rows[q].ah, NULL, 0, &m.slab)
    m.products.start, m.products.n = START_ZERO, n
    if s > 0 or p.h0 != NULL:
        p.plan.e.by.multiply(p.plan.e.k, &f.hh, &m.slab, &m.products)
    wait(m.barrier, m.slab.parts)
    p.cell.norm_step(&w, 0, n, j0, j1, rows)
    wait(m.barrier, m.slab.parts)
    p.cell.norm_step(&w, 1, n, j0, j1, rows)


cdef void later_step(const Forward *f, Py_ssize_t s, Py_ssize_t n, Member *m,
                     lstm_row *rows) noexcept nogil:
    """a += m W_hhᵀ of the last gate, then the rest of the cell        (n,H) (H,H)"""
    cdef const Problem *p = &f.p
    cdef bint in_step = p.plan.e.by.in_step, from_zero = s == 0 and p.h0 == NULL
    cdef Py_ssize_t q, j0, j1
    cdef lstm_weights w
    unit_range(p.H, f.hr.cut, m.slab.part, m.slab.parts, &j0, &j1)
    w.I, w.K, w.H = 0, 0 if from_zero or not in_step else p.H, p.H
    w.ih, w.hh, w.bias, w.peepholes = NULL, packed_at(p.plan.e.k, &f.hr, j0), NULL, NULL
    w.no_tape, w.variant = not f.keep, NULL
    for q in range(n):
        rows[q].gates = <char *>rows[q].gates + (p.G - p.H) * p.item
        rows[q].h_low = lowered(p.plan.e.k, w.K, rows[q].m, m.low, q, True)
        m.products.a[q], m.products.C[q] = rows[q].m, rows[q].gates
    if not in_step and not from_zero:
        m.products.start, m.products.n = START_ADD, n
        p.plan.e.by.multiply(p.plan.e.k, &f.hr, &m.slab, &m.products)
    p.cell.later_step(&w, (s & 1) != f.descending, n, j0, j1, rows)


cdef void project_outputs(const Forward *f, Py_ssize_t s, Py_ssize_t n, Member *m,
                          lstm_row *rows) noexcept nogil:
    """h = (o ∘ tanh(c)) W_hrᵀ        (n,H) (H,P)"""
    cdef const Problem *p = &f.p
    cdef Py_ssize_t q
    for q in range(n):
        m.products.a[q] = rows[q].h
        rows[q].h = p.y + place(&p.steps, s, m.own.first + q * m.own.stride) * p.K * p.item
        m.products.C[q] = rows[q].h
    m.products.start, m.products.n = START_ZERO, n
    p.plan.e.by.multiply(p.plan.e.k, &f.hr, &m.slab, &m.products)


# ---- entry points ----------------------------------------------------------------------------------

cdef int fill(Forward *f, cell, weights, batch, room, Packed packed, int n_threads) except -1:
    """What one run needs, but for the memory."""
    cdef Engine e
    cdef bint prepacked
    choose_engine(&e, weights.format)
    prepacked = packed is not None and not e.by.over_blas
    fill_problem(&f.p, packed.e if prepacked else e, cell, weights, batch, room)
    f.p.plan.lay_out, f.p.plan.work, f.p.plan.n_threads = lay_out, forward, n_threads
    f.keep, f.descending = room.gates is not None, False
    f.h_n, f.c_n = address(room.h_n), address(room.c_n)
    f.b, f.table = address(weights.b), address(batch.table)
    if prepacked:
        f.ih, f.hh, f.hr = packed.operands[0], packed.operands[1], packed.operands[2]
    else:
        # token ids look their products up: W_ih is not read
        f.ih = operand(e.k, cell.fed, weights.W_ih if f.p.ids == NULL else None, False)
        f.ih.w.turn = cell.turn
        f.hh = operand(e.k, cell.heard, weights.W_hh[:f.p.heard], False)
        f.hr = operand(e.k, 1, weights.W_hh[f.p.heard:] if cell.later else weights.W_hr, False)
    f.fused = f.p.ids == NULL and f.p.plan.e.by.in_step and f.p.norms == NULL
    if f.fused:
        forced = forced_plan()
        f.fused = choose_fused(loop_of(&f.p), n_threads) if forced is None else forced == "fused"
    f.chunk = choose_chunk(loop_of(&f.p), f.fused)
    return 0


def run(cell, weights, batch, room, *, n_threads, Packed packed=None):
    """Fills room.y, h_n, c_n and, if given, the tape's room.gates and c.

    See fill_problem for weights and batch; also weights.b, and batch.table (V, G) for token ids: what
    each projects to, bias included. y is zero on entry where no row runs. packed: of these weights.
    """
    cdef Forward f
    fill(&f, cell, weights, batch, room, packed, n_threads)
    run_plan(<Plan *>&f)
    note_plan(&f.p, f.fused)


cdef class Stepper:
    """One step per call on weights packed once: the state room.h_n, room.c_n is updated in place.

    As `run` for a batch of one step, B rows; all arrays but x and y stay, and so does what was found
    out about them.
    """
    cdef Forward f
    cdef Packed packed
    cdef object kept
    cdef bint running

    def __init__(self, cell, weights, batch, room, Packed packed):
        self.kept, self.packed = (cell, weights, batch, room), packed
        self.again(1)

    cdef int again(self, int n_threads) except -1:
        cell, weights, batch, room = self.kept
        fill(&self.f, cell, weights, batch, room, self.packed, n_threads)
        self.f.p.h0, self.f.p.c0 = self.f.h_n, self.f.c_n
        return 0

    def __call__(self, x, y, int n_threads, table=None):
        """x (B, I), or token ids (B,) int64 with their table -> y (B, K): all found to fit."""
        cdef Forward f = self.f
        if self.running:
            raise RuntimeError("this step is running in another thread: a stream is one sequence, so each "
                               "thread needs one of its own")
        if overlap(x, y):          # y is written while x is still read
            x = x.copy()
        f.p.plan.n_threads = n_threads
        f.p.y = address(y)
        if table is None:
            f.p.x = address(x)
        else:
            f.p.x, f.p.ids, f.table, f.fused = NULL, <int64_t *>address(x), address(table), False
        f.descending = self.packed.descending
        self.packed.descending = not self.packed.descending
        self.running = True
        try:
            run_plan(<Plan *>&f)
        finally:
            self.running = False
