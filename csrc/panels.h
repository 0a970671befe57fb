/* panels.h: how an operand W[k, column] is cut into panels, packed, and passed over by rows.

   Panels of `gates` >= 2 hold one vector of units from each gate, so that a finished tile is all that a
   cell needs; panels of 1 hold up to four neighboring vectors.  Panels are counted from j0.  What the
   columns mean, and what becomes of the sums, is none of its business. */

#define GROUP (8 * MR)  /* rows per group */
#define KC 512          /* k per block of a panel: KC·4·VECTOR_BYTES is 128 KB with AVX-512 */

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
    return K ? (const PACKED *)packed + p * K * (gates == 1 ? 4 : gates) * VL : NULL;
}

/* out[k·out_stride + l] = in[l·in_stride + k] for k, l < VL, packed.  Interleaving the two halves of
   the rows log2(VL) times transposes them. */
INLINE void F(transpose)(const R *in, ptrdiff_t in_stride, PACKED *out, ptrdiff_t out_stride) {
    vec row[VECTOR_BYTES / sizeof(R)];
    for (int l = 0; l < VL; l++) row[l] = F(v_load)(in + l * in_stride);
    for (int width = 1; width < VL; width *= 2) {
        vec next[VECTOR_BYTES / sizeof(R)];
        for (int l = 0; l < VL / 2; l++) {
            next[2 * l] = F(v_interleave)(row[l], row[l + VL / 2], 0);
            next[2 * l + 1] = F(v_interleave)(row[l], row[l + VL / 2], 1);
        }
        for (int l = 0; l < VL; l++) row[l] = next[l];
    }
    for (int k = 0; k < VL; k++) F(v_pack)(out + k * out_stride, row[k]);
}

static void F(pack)(const lstm_operand *w, ptrdiff_t j0, ptrdiff_t j1, ptrdiff_t first,
                    ptrdiff_t last) {
    enum { BLOCK = 16 };  /* k at a time, so that the written lines stay in L1 */
    const ptrdiff_t K = w->K, k_stride = w->k_stride, col_stride = w->col_stride;
    if (K == 0) return;
    for (ptrdiff_t p = first; p < last; p++) {
        F(panel) g = F(panel_at)(w->gates, p, w->N, j0, j1);
        PACKED *out = (PACKED *)F(packed_panel)(w->gates, w->packed, K, p);
        for (int v = 0; v < g.nv; v++) {
            ptrdiff_t n = F(lanes)(&g, v);
            const R *W = (const R *)w->W + (g.col + v * g.stride) * col_stride;
            for (ptrdiff_t k0 = 0; k0 < K; k0 += BLOCK) {
                ptrdiff_t k1 = MIN(K, k0 + BLOCK);
                if (col_stride == 1)
                    for (ptrdiff_t k = k0; k < k1; k++)
                        F(v_pack)(out + (k * g.nv + v) * VL, F(v_load_n)(W + k * k_stride, n));
                else if (n == VL && k1 - k0 == BLOCK && k_stride == 1)
                    for (ptrdiff_t k = k0; k < k1; k += VL)
                        F(transpose)(W + k, col_stride, out + (k * g.nv + v) * VL, g.nv * VL);
                else
                    for (ptrdiff_t k = k0; k < k1; k++) {
                        R lanes[VECTOR_BYTES / sizeof(R)] = {0};
                        for (ptrdiff_t l = 0; l < n; l++) lanes[l] = W[k * k_stride + l * col_stride];
                        F(v_pack)(out + (k * g.nv + v) * VL, F(v_load)(lanes));
                    }
            }
        }
    }
}

/* acc[r] += a[r] · panel for n <= GROUP rows, in tiles of nearly equal height.  Meanwhile the tiles
   fetch the next panel, a line per k: its first use by the first tile of the next group would wait for
   the third-level cache (6 % of inference at (35,20,650,650)).  The sums lie on the stack, 12 KB. */
static void F(group)(ptrdiff_t n, ptrdiff_t K, int nv, const R *const *a, const PACKED *panel,
                     const PACKED *next, F(row4) *acc) {
    uintptr_t ahead = (uintptr_t)next;
    for (ptrdiff_t k = 0; k < K; k += KC) {
        ptrdiff_t kn = MIN(KC, K - k);
        const R *ak[MR];
        for (ptrdiff_t r = 0, tiles = (n + MR - 1) / MR; tiles > 0; tiles--) {
            ptrdiff_t mr = (n - r + tiles - 1) / tiles;
            for (ptrdiff_t q = 0; q < mr; q++) ak[q] = a[r + q] + k;
            F(tiles)[mr][nv](kn, ak, panel + k * nv * VL, ahead, acc + r);
            r += mr;
            ahead += (uintptr_t)kn * 64;
        }
    }
}

/* The size of equal groups of n >= 1 rows. */
INLINE ptrdiff_t F(group_size)(ptrdiff_t n) {
    ptrdiff_t groups = (n + GROUP - 1) / GROUP;
    return (n + groups - 1) / groups;
}
