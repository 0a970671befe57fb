/* panels.h: how an operand W[k, column] is cut into panels, packed, and passed over by rows.

   Panels of `gates` >= 2 hold one vector of units from each gate, so that a finished tile is all that a
   cell needs; panels of 1 hold up to four neighboring vectors.  Panels are counted from j0.  What the
   columns mean, and what becomes of the sums, is none of its business. */

#define GROUP (8 * MR)  /* rows per group */

typedef struct {
    ptrdiff_t col, stride, end; /* column of vector 0, distance of the vectors, end of the last one */
    int nv, neighbors;          /* vectors; whether they are next to one another */
} F(panel);

INLINE ptrdiff_t F(n_panels)(int gates, ptrdiff_t j0, ptrdiff_t j1) {
    ptrdiff_t width = gates == 1 ? 4 * VL : VL;
    return (j1 - j0 + width - 1) / width;
}

/* Panel p of the columns [j0, j1). */
INLINE F(panel) F(panel_at)(int gates, ptrdiff_t p, ptrdiff_t H, ptrdiff_t j0, ptrdiff_t j1) {
    F(panel) g;
    g.neighbors = gates == 1;
    if (g.neighbors) {
        g.col = j0 + p * 4 * VL;
        g.stride = VL;
        g.nv = (int)MIN(4, (j1 - g.col + VL - 1) / VL);
        g.end = MIN(VL, j1 - g.col - (g.nv - 1) * VL);
    } else {
        g.col = j0 + p * VL;
        g.stride = H;
        g.nv = gates;
        g.end = MIN(VL, j1 - g.col);
    }
    return g;
}

/* Lanes of vector v that are columns: of neighboring vectors, only the last can lack some. */
INLINE ptrdiff_t F(lanes)(const F(panel) *g, int v) {
    return g->neighbors && v < g->nv - 1 ? VL : g->end;
}

/* Where panel p of a packed operand lies; an operand of no k may be NULL. */
INLINE const PACKED *F(packed_panel)(int gates, const void *packed, ptrdiff_t K, ptrdiff_t p) {
    ptrdiff_t vectors = gates == 1 ? 4 : gates;
    return K ? (const PACKED *)((const char *)packed + p * vectors * F(vector_bytes)(K)) : NULL;
}

static void F(pack)(const lstm_operand *w, ptrdiff_t j0, ptrdiff_t j1, ptrdiff_t first,
                    ptrdiff_t last) {
    if (w->K == 0) return;
    for (ptrdiff_t p = first; p < last; p++) {
        F(panel) g = F(panel_at)(w->gates, p, w->N, j0, j1);
        PACKED *panel = (PACKED *)F(packed_panel)(w->gates, w->packed, w->K, p);
        for (int v = 0; v < g.nv; v++)
            F(pack_vector)(w, g.col + (v + w->turn) % g.nv * g.stride, F(lanes)(&g, v), g.nv, v, panel);
    }
}

#if ROWS > 0
/* acc[r] += a[r] · panel for n <= GROUP rows, in register tiles of nearly equal height.  Meanwhile they
   fetch the next panel, a line per k: its first use by the first tile of the next group would wait for
   the third-level cache (6 % of inference at (35,20,650,650)).  The sums lie on the stack, 12 KB. */
static void F(register_group)(ptrdiff_t n, ptrdiff_t K, int nv, const LEFT *const *a, const PACKED *panel,
                              const PACKED *next, F(row4) *acc) {
    uintptr_t ahead = (uintptr_t)next;
    TILE_MODE_BEGIN
    for (ptrdiff_t k = 0; k < K; k += KC) {
        ptrdiff_t kn = MIN(KC, K - k);
        for (ptrdiff_t r = 0, tiles = (n + ROWS - 1) / ROWS; tiles > 0; tiles--) {
            ptrdiff_t mr = (n - r + tiles - 1) / tiles;
            F(tiles)[mr][nv](k, kn, a + r, panel, ahead, acc + r);
            r += mr;
            ahead += (uintptr_t)(kn + STEP - 1) / STEP * 64 * ((nv + AT_ONCE(mr) - 1) / AT_ONCE(mr));
        }
    }
    TILE_MODE_END
}
#endif

#ifdef ISA_AMX
#include "amx.h"        /* its F(group) */
#else

#define TILES_BEGIN(n, K)       /* in a kernel, around all that multiplies n rows of up to K numbers */
#define TILES_END(n, K)

INLINE void F(group)(ptrdiff_t n, ptrdiff_t K, int nv, const LEFT *const *a, const PACKED *panel,
                     const PACKED *next, F(row4) *acc) {
    F(register_group)(n, K, nv, a, panel, next, acc);
}

#endif

#ifndef STAYS
#define STAYS(bytes) 0          /* whether panels of so many bytes need not be fetched ahead */
#endif

/* acc += x · ih, and acc_h, which is acc or within it, += h · hh. */
INLINE void F(groups)(ptrdiff_t n, ptrdiff_t I, ptrdiff_t K, int nv_ih, int nv_hh, const LEFT *const *x,
                      const LEFT *const *h, const PACKED *ih, const PACKED *hh, const PACKED *next,
                      F(row4) *acc, F(row4) *acc_h) {
#ifdef JOINS
    if (I && K && nv_ih == nv_hh && acc == acc_h) {
        F(joined_group)(n, I, K, nv_ih, x, h, ih, hh, next, acc);
        return;
    }
#endif
    F(group)(n, I, nv_ih, x, ih, hh, acc);
    F(group)(n, K, nv_hh, h, hh, next, acc_h);
}

/* The size of equal groups of n >= 1 rows, for K numbers k. */
INLINE ptrdiff_t F(group_size)(ptrdiff_t n, ptrdiff_t K) {
#ifdef ISA_AMX
    /* sums of 32 KB leave a short panel no room in the first-level cache (3 % at (50,256,64,64)), a long one
       has none anyway, and serves more rows (int8 +8 %, bfloat16 +2 % at (50,128,1024,1024)) */
    const ptrdiff_t most = K < 512 ? GROUP / 2 : GROUP;
#else
    const ptrdiff_t most = GROUP;
    (void)K;
#endif
    ptrdiff_t groups = (n + most - 1) / most;
    return (n + groups - 1) / groups;
}
