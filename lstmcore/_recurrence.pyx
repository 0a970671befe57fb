# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False
"""The problem that the plans over time solve, and its rows and steps.

One call is one parallel region. Its threads form a grid of row groups x unit slabs: a thread runs the
time loop for the rows and hidden units that it owns. With one unit slab there is no barrier in the
loop at all; with more, the threads of a row group meet once per step. Which grid is used follows from
the shape and the size of the cache (_grid.pyx) and changes no bit of the result.

Rows and steps: row r is the r-th longest sequence (`order[r]` its place in the batch), so the rows
that are still running at step s are the first ones. Step s of a row is time s, or lengths-1-s in
reverse. A token is one (step, row); in the tape it lies at `start[s] + r`: a dense tape is (T, B), a
ragged one holds the real tokens only.

Letters are those of lstmcore/reference.py, and: K is the width of h, over which the recurrent product
sums (H, or P with a projection); G is the width of a row of gates, as many times H as the cell has, of
which x feeds `fed` and h `heard`; W_ih and W_hh have `fed` rows each, and if h feeds fewer, the last
ones of W_hh are those of the later product, with m. The rows of both begin with the gates that both
feed, but a row of gates begins with what x feeds alone: so W_ih is packed from its gate `turn` on.
"""

from collections import namedtuple

from libc.stdint cimport int64_t
from libc.string cimport memset
cimport numpy as cnp

from lstmcore import _kernels as machine

from lstmcore._grid cimport Loop
from lstmcore._kernels cimport address, cache_bytes, cell_of, kernels_of, team_barrier
from lstmcore._lstm cimport lstm_cell, lstm_variant
from lstmcore._memory cimport Arena, padded, take
from lstmcore._products cimport Engine, Plan, Widths

cnp.import_array()

Cell = namedtuple("Cell", "name gates fed heard later turn keeps_gates has_c reads_h varies norms moments "
                          "keeps_raw has_projection has_peepholes",
                  module=__name__)  # which a compiled module's frame does not tell
cells = {}                         # name -> Cell, of those that were asked for


def cell(name):
    """The row of a cell, as far as Python asks it; ValueError for a name that no row has."""
    cdef const lstm_cell *row
    if not isinstance(name, str):
        raise TypeError(f"cell must be a name, got {type(name).__name__}")
    if name not in cells:
        row = cell_of(kernels_of("float64"), name)
        if row == NULL:
            raise ValueError(f"no cell is named {name!r}")
        fed = row.gates - row.apart
        cells[name] = Cell(name, row.gates, fed, fed - row.later, bool(row.later),
                           (fed - row.apart) % fed, bool(row.keeps_gates), bool(row.has_c),
                           bool(row.reads_h), bool(row.varies), row.norms, row.moments,
                           bool(row.keeps_raw), row.output != NULL, row.peephole_gradient != NULL)
    return cells[name]


cdef int fill_problem(Problem *p, Engine e, cell, weights, batch, tape) except -1:
    """From named arrays, all C-contiguous, of one dtype, found to fit one another; T, B >= 1.

    weights: W_ih, W_hh, W_hr, peepholes, norms; batch: x, h0, c0, order, lengths, reverse; tape: y, gates,
    c, m, ax, ah, moments, raw.
    order and lengths (int64) are sorted by length, longest first, or None. x may be token ids (T, B),
    int64.
    """
    cdef Steps *steps = &p.steps
    memset(p, 0, sizeof(Problem))
    x, W_hh = batch.x, weights.W_hh
    p.plan.e, p.plan.prepare = e, number_tokens
    p.cell = cell_of(p.plan.e.k, cell.name)
    p.item = p.plan.e.k.item
    p.fed, p.K = cnp.PyArray_DIM(W_hh, 0), cnp.PyArray_DIM(W_hh, 1)
    p.H, p.projected = p.fed // cell.fed, weights.W_hr is not None
    p.G, p.heard = p.H * cell.gates, p.H * cell.heard
    if cnp.PyArray_NDIM(x) == 2:
        p.ids = <int64_t *>address(x)
    else:
        p.x, p.I = address(x), cnp.PyArray_DIM(x, 2)
    p.h0, p.c0, p.peepholes = address(batch.h0), address(batch.c0), address(weights.peepholes)
    p.y, p.gates, p.c = address(tape.y), address(tape.gates), address(tape.c)
    if cell.varies:
        fill_variant(p, batch.variant, tape.m)
    p.norms, p.ax, p.ah = address(weights.norms), address(tape.ax), address(tape.ah)
    p.moments, p.raw = address(tape.moments), address(tape.raw)
    steps.T, steps.B = cnp.PyArray_DIM(x, 0), cnp.PyArray_DIM(x, 1)
    steps.ragged, steps.reverse = batch.order is not None, batch.reverse
    steps.count, steps.tokens = steps.T, steps.T * steps.B
    if steps.ragged:
        steps.order = <int64_t *>address(batch.order)
        steps.lengths = <int64_t *>address(batch.lengths)
        steps.count, steps.tokens = steps.lengths[0], batch.lengths.sum()
    return 0


cdef int fill_variant(Problem *p, variant, m) except -1:
    """From an `arguments.Varied` whose arrays were found to fit; m: (tokens, H) with a mask."""
    cdef lstm_variant *v = &p.variant
    v.gate.kind, v.gate.alpha, v.gate.beta = variant.gate
    v.candidate.kind, v.candidate.alpha, v.candidate.beta = variant.candidate
    v.cell.kind, v.cell.alpha, v.cell.beta = variant.cell
    v.clips, v.coupled, v.zones = variant.clip is not None, variant.coupled, variant.zones is not None
    if v.clips:
        v.clip = variant.clip
    if v.zones:
        v.zone_h, v.zone_c = variant.zones
    p.mask, p.zone = address(variant.mask), address(variant.zone)
    p.m, p.m0 = address(m), address(variant.m0)
    return 0


cdef Loop loop_of(const Problem *p) noexcept nogil:
    """The problem as _grid.pyx sees it; products that cannot share out units have one piece."""
    cdef Loop loop
    cdef Py_ssize_t VL = p.plan.e.k.VL
    loop.steps, loop.rows, loop.tile_rows = p.steps.count, p.steps.B, p.plan.e.k.MR
    loop.vectors = (p.H + VL - 1) // VL if p.plan.e.by.in_step else 1
    loop.input_bytes = p.fed * p.I * p.plan.e.k.packed
    loop.recurrent_bytes = p.fed * p.K * p.plan.e.k.packed
    loop.gate_bytes, loop.cache_bytes = p.G * p.item, cache_bytes()
    return loop


cdef void lay_out_problem(Problem *p, Arena *arena, Widths widths) noexcept nogil:
    """Memory for the steps, and for what threads share and have."""
    cdef Steps *steps = &p.steps
    steps.start = <Py_ssize_t *>take(arena, steps.count * sizeof(Py_ssize_t))
    steps.first = <Py_ssize_t *>take(arena, steps.count * sizeof(Py_ssize_t))
    if not steps.ragged:
        steps.order = <int64_t *>take(arena, steps.B * sizeof(int64_t))
        steps.lengths = <int64_t *>take(arena, steps.B * sizeof(int64_t))
    p.shared.zeros = take(arena, max(p.H, p.K) * p.item)
    p.shared.barriers = <team_barrier *>take(arena, (p.plan.n_threads + 1) * sizeof(team_barrier))
    p.shared.scratch_bytes = padded(p.plan.e.by.scratch_bytes(p.plan.e.k, &widths))
    p.shared.scratch = take(arena, p.plan.n_threads * p.shared.scratch_bytes)


cdef void number_tokens(Plan *plan) noexcept nogil:
    cdef Problem *p = <Problem *>plan
    cdef Steps *steps = &p.steps
    cdef Py_ssize_t s, r, n = steps.B, tokens = 0
    cdef Group all_rows = rows_of(steps, 0, 1)
    memset(p.shared.zeros, 0, max(p.H, p.K) * p.item)
    memset(p.shared.barriers, 0, (plan.n_threads + 1) * sizeof(team_barrier))
    if not steps.ragged:
        for r in range(steps.B):
            (<int64_t *>steps.order)[r] = r
            (<int64_t *>steps.lengths)[r] = steps.T
    for s in range(steps.count):
        n = active(steps, s, &all_rows, n)
        steps.first[s] = tokens
        steps.start[s] = tokens if steps.ragged else (steps.T - 1 - s if steps.reverse else s) * steps.B
        tokens += n


cdef int note_plan(const Problem *p, bint fused) except -1:
    """What ran, for tests to look at."""
    name = "fused" if fused else p.plan.e.by.name.decode()
    machine.last_plan = name, p.grid.rows, p.grid.units
    return 0
