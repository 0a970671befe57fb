# cython: language_level=3, cdivision=True
"""Which threads share what, how many steps are projected at once, and whether x is multiplied in
the step: pure functions of sizes, caches and threads. No choice changes a bit of a result.

From Python a `Loop` is a dict of its fields, and so is the `Grid` that comes back.
"""

cdef enum: MANY_ROWS = 16          # of a tile whose products are so fast that all else counts
cdef enum: CHUNK_ROWS = 192        # rows per input projection: enough to reuse a panel, few enough for L2


cpdef Grid choose_grid(Loop loop, int team) noexcept nogil:
    """Row groups x unit slabs for the recurrent loop.

    Rows alone need no barrier, but then every thread reads all of W_hh in every step; that is right
    while it stays in its second-level cache, or while there are rows enough to hide the reading.

    >>> choose_grid(dict(steps=35, rows=20, vectors=82, tile_rows=3, input_bytes=6760000,
    ...                  recurrent_bytes=6760000, gate_bytes=10400, cache_bytes=512 << 10), 2)
    {'rows': 1, 'units': 2}
    """
    cdef Grid grid
    grid.units = 1
    while grid.units < team and loop.recurrent_bytes // grid.units > loop.cache_bytes * 3 // 4 \
            and loop.rows < 32 * loop.tile_rows * team // grid.units:
        grid.units += 1
    if loop.rows < team // grid.units:
        grid.units = team // <int>max(1, loop.rows)
    while team % grid.units:
        grid.units += 1
    grid.units = <int>min(grid.units, loop.vectors)
    grid.rows = <int>min(team // grid.units, loop.rows)
    return grid


cpdef bint choose_fused(Loop loop, int team) noexcept nogil:
    """Whether a step itself multiplies x, instead of one product for a chunk of steps.

    For a single step: it reads all weights once, in one order, and the next one can start with those
    that are still in the cache. Else where the pre-activations' way to memory and back is dearer than to
    read W_ih in every step instead of once in a chunk, whose bytes take an eighth of the time: in float32
    from 15 rows on at H = 128, from 28 on at H = 256. With fewer to multiply ahead is up to twice as fast
    (1.2 times at B = 1 and 12, 2 at 2, 1.4 at 8, H = 256; 0.96 at (100,8,128,128)); with enough of them in
    the step is +3 to 8 % at (50,256,64,64), (50,50,128,128), (20,8,16,32). Weights that do not fit the
    cache are read at their price: there only AMX multiplies x in the step, 1.0 to 1.36 times as fast at
    eight shapes of 32 to 128 rows.
    """
    cdef int units = choose_grid(loop, team).units
    cdef Py_ssize_t chunk = choose_chunk(loop, False)
    cdef bint fits = (loop.input_bytes + loop.recurrent_bytes) // units <= loop.cache_bytes
    return loop.steps == 1 or (fits or loop.tile_rows >= MANY_ROWS) and \
        8 * loop.rows * loop.gate_bytes >= loop.input_bytes - loop.input_bytes // chunk


cpdef Py_ssize_t choose_chunk(Loop loop, bint fused) noexcept nogil:
    """Steps per input projection; 1 where the steps multiply x themselves."""
    return 1 if fused else min(max(1, loop.steps), (CHUNK_ROWS + loop.rows - 1) // loop.rows)
