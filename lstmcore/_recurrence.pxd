# What forward and backward have in common: the problem, its rows and steps. See _recurrence.pyx.

from libc.stdint cimport int64_t

from lstmcore._grid cimport Grid, Loop
from lstmcore._kernels cimport team_barrier
from lstmcore._lstm cimport lstm_cell, lstm_kernels, lstm_rows, lstm_variant
from lstmcore._memory cimport Arena
from lstmcore._products cimport Engine, Part, Plan, Widths, unit_range


cdef struct Steps:                 # which rows run when, and where their tokens lie
    bint ragged, reverse
    Py_ssize_t T, B, count, tokens
    const int64_t *order           # (B)
    const int64_t *lengths         # (B), descending
    Py_ssize_t *start              # (count): tape index of the first token of a step
    Py_ssize_t *first              # (count): tokens before a step, in the order of steps


cdef struct Shared:                # memory of all threads, and of each
    char *zeros                    # a row of zeros
    team_barrier *barriers         # [0] all threads; [1 + g] row group g
    char *scratch
    Py_ssize_t scratch_bytes       # of each thread


cdef struct Problem:               # one layer in one direction; the arrays are the caller's, or NULL
    Plan plan
    const lstm_cell *cell
    Py_ssize_t I, H, K, G, item    # K: width of h; G: width of a row of gates; item: bytes of a number
    Py_ssize_t fed                 # numbers of a row of gates that x feeds: the first ones
    Py_ssize_t heard               # numbers of a row of gates that h feeds, from number G - fed on
    bint projected                 # whether h is (o ∘ tanh(c)) W_hrᵀ
    lstm_variant variant           # of cells that vary
    const char *mask               # (B, H): what products see of h, or NULL
    const char *zone               # (T, B, 2, H): what h and c keep, or NULL
    char *m                        # (tokens, H): h ∘ mask, with a mask
    const char *m0                 # (B, H): h0 ∘ mask
    const char *norms              # (rows, H) of cells that normalize, else NULL
    char *ax                       # (tokens, G): x W_ihᵀ of those; without a tape, of a chunk
    char *ah                       # (tokens, G): h W_hhᵀ; without a tape (B, G)
    char *moments                  # (tokens, the cell's), or NULL
    char *raw                      # (tokens, H): c before it is normalized; without a tape (B, H)
    Steps steps
    const char *x
    const int64_t *ids             # (T, B): token ids in place of x
    const char *h0
    const char *c0
    const char *peepholes
    char *y
    char *gates
    char *c
    Shared shared
    Grid grid                      # of the last run, for tests


cdef struct Group:                 # the rows of a row group: first, first + stride, ... (n of them)
    Py_ssize_t first, stride, n


cdef struct Member:                # a thread in the time loop: its row group, and its slab of units
    Group own
    Part slab
    team_barrier *barrier          # of the row group
    lstm_rows products             # with room for its row pointers
    char *low                      # room for its lowered rows
    char *low_shared               # for those of its row group


cdef int fill_problem(Problem *p, Engine e, cell, weights, batch, tape) except -1
cdef Loop loop_of(const Problem *p) noexcept nogil
cdef void lay_out_problem(Problem *p, Arena *arena, Widths widths) noexcept nogil
cdef void number_tokens(Plan *plan) noexcept nogil
cdef int note_plan(const Problem *p, bint fused) except -1


cdef inline Group rows_of(const Steps *steps, int group, int groups) noexcept nogil:
    """Neighbors if all are equally long (interleaved rows cost 1.2x at (50,50,128,128): each core
    prefetches the other's lines); dealt in turn, longest first, if not."""
    cdef Group mine
    if steps.ragged:
        mine.first, mine.stride = group, groups
        mine.n = (steps.B - group + groups - 1) // groups
    else:
        mine.first, mine.stride = steps.B * group // groups, 1
        mine.n = steps.B * (group + 1) // groups - mine.first
    return mine


cdef inline Py_ssize_t active(const Steps *steps, Py_ssize_t s, const Group *mine,
                              Py_ssize_t guess) noexcept nogil:
    """How many of the rows run at step s; guess >= the answer."""
    while guess > 0 and steps.lengths[mine.first + (guess - 1) * mine.stride] <= s:
        guess -= 1
    return guess


cdef inline Py_ssize_t place(const Steps *steps, Py_ssize_t s, Py_ssize_t r) noexcept nogil:
    """Where step s of row r lies in a (T, B) array."""
    return (steps.lengths[r] - 1 - s if steps.reverse else s) * steps.B + steps.order[r]


cdef inline char *scratch_of(const Problem *p, int me) noexcept nogil:
    return p.shared.scratch + me * p.shared.scratch_bytes


cdef inline const char *h_seen(const Problem *p, Py_ssize_t s, Py_ssize_t r) noexcept nogil:
    """h_{t-1} of step s of row r as products see it, which have a mask."""
    if s > 0:
        return p.m + (p.steps.start[s - 1] + r) * p.H * p.item
    return initial(p, p.m0, r, p.H * p.item)


cdef inline const char *initial(const Problem *p, const char *state, Py_ssize_t r,
                                Py_ssize_t row) noexcept nogil:
    """Row r of an initial state, zeros where there is none."""
    return state + p.steps.order[r] * row if state != NULL else p.shared.zeros


cdef enum: SHARED = 1 << 14        # numbers whose lowering takes longer than threads to meet


cdef inline bint share_lowering(const lstm_kernels *k, const Member *m, Py_ssize_t n, Py_ssize_t K,
                                char **low, Py_ssize_t *q0, Py_ssize_t *q1) noexcept nogil:
    """Where n rows of K numbers are lowered to, and which of them, q0 to q1, by this thread.

    True if the threads of its row group share them out: then they meet before they multiply.
    """
    cdef bint together = k.lower != NULL and m.slab.parts > 1 and n * K >= SHARED
    low[0], q0[0], q1[0] = m.low, 0, n
    if together:
        low[0] = m.low_shared
        unit_range(n, 1, m.slab.part, m.slab.parts, q0, q1)
    return together
