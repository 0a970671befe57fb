/* step.h: one time step of a cell, forward and backward: a template that each cell's file includes.

   That file has defined
       CELL(name)  the cell's own names
       GATES       how many gates a unit has: 1 to 4
       APART       if any: how many of them x feeds alone, the first ones, and h, the last ones
       LATER       1 if the last gate waits for a product of its own, in a step that follows
   and, for the units j..j+n of one row, where n <= VL,
       void CELL(forward)(const lstm_weights *w, const lstm_row *row, ptrdiff_t j, ptrdiff_t n,
                          const vec *a)         a[gate]: the pre-activations
       void CELL(backward)(const lstm_weights *w, const lstm_back_row *row, ptrdiff_t j, ptrdiff_t n,
                           vec dh)              what reaches h_t, from above and from step t+1
   which load what else they need and store what they find.  In return they get CELL(step) and
   CELL(back_step) of lstm.h.  No equation stands here, and no number of gates. */

#ifndef APART
#define APART 0
#endif
#ifndef LATER
#define LATER 0
#endif
#define FED (GATES - APART)    /* by x */
#define HEARD (FED - LATER)    /* by h */
#ifdef __GNUC__
_Static_assert(2 * APART <= GATES && (HEARD > 1 || GATES == 1), "panels of one gate are another kind");
#endif

static void CELL(step)(const lstm_weights *weights, int descending, ptrdiff_t n, ptrdiff_t j0,
                       ptrdiff_t j1, const lstm_row *rows) {
    F(row4) acc[GROUP];
    const LEFT *x[GROUP], *h[GROUP];
    const lstm_weights w = *weights;  /* a copy, which no store can change */
    ptrdiff_t panels = F(n_panels)(GATES, j0, j1);
    if (n == 0) return;
    TILES_BEGIN(n, MAX(w.I, w.K))
    ptrdiff_t size = F(group_size)(n, w.I + w.K);
    const int stays = STAYS(panels * (FED * F(vector_bytes)(w.I) + HEARD * F(vector_bytes)(w.K)));
    for (ptrdiff_t q = 0; q < panels; q++) {
        ptrdiff_t p = descending ? panels - 1 - q : q, next = descending ? MAX(p - 1, 0) : p + 1;
        F(panel) g = F(panel_at)(GATES, p, w.H, j0, j1);
        const PACKED *ih = F(packed_panel)(FED, w.ih, w.I, p);
        const PACKED *hh = F(packed_panel)(HEARD, w.hh, w.K, p);
        const PACKED *ahead = stays ? NULL
                              : w.I ? F(packed_panel)(FED, w.ih, w.I, next)
                                    : F(packed_panel)(HEARD, w.hh, w.K, next);
        for (ptrdiff_t r0 = 0; r0 < n; r0 += size) {
            ptrdiff_t m = MIN(size, n - r0);
            const lstm_row *row = rows + r0;
            for (ptrdiff_t r = 0; r < m; r++) {
                const R *start = w.I ? w.bias : row[r].gates;
                x[r] = row[r].x, h[r] = row[r].h_low;
                for (int v = 0; v < g.nv; v++)
                    acc[r][v] = start ? F(v_load_n)(start + g.col + v * g.stride, F(lanes)(&g, v))
                                      : F(v_set1)(0);
            }
            /* a = start + x W_ihᵀ + h_prev W_hhᵀ       (m,I) (I,nv·VL), (m,K) (K,nv·VL) */
            F(groups)(m, w.I, w.K, g.nv - APART, g.nv - APART - LATER, x, h, ih, hh, ahead, acc,
                      (F(row4) *)&acc[0][APART]);
            for (ptrdiff_t r = 0; r < m; r++)
                for (int u = 0; u < (GATES == 1 ? g.nv : 1); u++) {
                    ptrdiff_t j = g.col + u * VL, lanes = F(lanes)(&g, u);
                    if (lanes < VL) CELL(forward)(&w, &row[r], j, lanes, acc[r] + u);
                    else CELL(forward)(&w, &row[r], j, VL, acc[r] + u);
                }
        }
    }
    TILES_END(n, MAX(w.I, w.K))
}

#if TRAINS
static void CELL(back_step)(const lstm_weights *weights, int descending, ptrdiff_t n, ptrdiff_t j0,
                            ptrdiff_t j1, const lstm_back_row *rows) {
    F(row4) acc[GROUP];
    const LEFT *da[GROUP];
    const lstm_weights w = *weights;
    ptrdiff_t panels = F(n_panels)(1, j0, j1);
    if (n == 0) return;
    TILES_BEGIN(n, w.K)
    ptrdiff_t size = F(group_size)(n, w.K);
    for (ptrdiff_t q = 0; q < panels; q++) {
        ptrdiff_t p = descending ? panels - 1 - q : q, next = descending ? MAX(p - 1, 0) : p + 1;
        F(panel) g = F(panel_at)(1, p, w.H, j0, j1);
        const PACKED *hh = F(packed_panel)(1, w.hh, w.K, p);
        for (ptrdiff_t r0 = 0; r0 < n; r0 += size) {
            ptrdiff_t m = MIN(size, n - r0);
            const lstm_back_row *row = rows + r0;
            for (ptrdiff_t r = 0; r < m; r++) {
                da[r] = row[r].da_next;
                for (int v = 0; v < g.nv; v++)
                    acc[r][v] = F(v_load_n)((const R *)row[r].dy + g.col + v * VL, F(lanes)(&g, v));
            }
            /* dh = dy + da_next W_hh       (m,K) (K,nv·VL) */
            F(group)(m, w.K, g.nv, da, hh, F(packed_panel)(1, w.hh, w.K, next), acc);
            for (ptrdiff_t r = 0; r < m; r++)
                for (int v = 0; v < g.nv; v++) {
                    ptrdiff_t j = g.col + v * VL, lanes = F(lanes)(&g, v);
                    if (lanes < VL) CELL(backward)(&w, &row[r], j, lanes, acc[r][v]);
                    else CELL(backward)(&w, &row[r], j, VL, acc[r][v]);
                }
        }
    }
    TILES_END(n, w.K)
}

#endif

#undef CELL
#undef GATES
#undef APART
#undef LATER
#undef FED
#undef HEARD
