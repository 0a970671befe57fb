/* products.h: rows times a packed operand, and the sums over time and batch that are gradients.

   Every element of C is one chain over k; a sum over time and batch is cut into blocks of KW, added in
   order, whoever computes it.  It knows nothing of cells. */

static void F(gemm)(const lstm_operand *w, ptrdiff_t j0, ptrdiff_t j1, const lstm_rows *rows) {
    F(row4) acc[GROUP];
    const LEFT *a[GROUP];
    const R *bias = rows->bias;
    const ptrdiff_t n = rows->n, K = w->K;
    const int gates = w->gates, start = rows->start;
    if (n == 0) return;
    TILES_BEGIN(n, K)
    ptrdiff_t size = F(group_size)(n, K);
    for (ptrdiff_t p = 0; p < F(n_panels)(gates, j0, j1); p++) {
        F(panel) g = F(panel_at)(gates, p, w->N, j0, j1);
        const PACKED *panel = F(packed_panel)(gates, w->packed, K, p);
        for (ptrdiff_t r0 = 0; r0 < n; r0 += size) {
            ptrdiff_t m = MIN(size, n - r0);
            void *const *C = rows->C + r0;
            for (ptrdiff_t r = 0; r < m; r++) a[r] = rows->a[r0 + r];
            for (int v = 0; v < g.nv; v++) {
                ptrdiff_t j = g.col + v * g.stride, lanes = F(lanes)(&g, v);
                vec from = start == START_BIAS ? F(v_load_n)(bias + j, lanes) : F(v_set1)(0);
                for (ptrdiff_t r = 0; r < m; r++)
                    acc[r][v] = start == START_ADD ? F(v_load_n)((R *)C[r] + j, lanes) : from;
            }
            F(group)(m, K, g.nv, a, panel, F(packed_panel)(gates, w->packed, K, p + 1), acc);
            for (ptrdiff_t r = 0; r < m; r++)
                for (int v = 0; v < g.nv; v++)
                    F(v_store_n)((R *)C[r] + g.col + v * g.stride, acc[r][v], F(lanes)(&g, v));
        }
    }
    TILES_END(n, K)
}

#if TRAINS

static ptrdiff_t F(weight_gradient_work)(ptrdiff_t M) {
    return ((M + MR - 1) / MR * MR + 16) * KW * (ptrdiff_t)sizeof(R) + 4 * F(vector_bytes)(KW);
}

#ifndef ISA_AMX

/* acc[r][v] += Σ_k a[LEFT_K(k)·MR + r] panel[k][v]: both operands packed. */
#define GRADIENT_TILE(nv)                                                                            \
    NOINLINE static void F(gradient_tile_##nv)(ptrdiff_t K, const LEFT *const *rows,                 \
                                               const PACKED *panel, F(row4) *acc) {                  \
        F(tile)(MR, nv, MR, 0, K, rows, panel, (uintptr_t)rows[0], acc);                             \
    }
GRADIENT_TILE(1) GRADIENT_TILE(2) GRADIENT_TILE(3) GRADIENT_TILE(4)

INLINE void F(packed_tile)(int nv, ptrdiff_t K, const LEFT *a, const PACKED *panel, F(row4) *acc) {
    static void (*const tiles[])(ptrdiff_t, const LEFT *const *, const PACKED *, F(row4) *) = {
        0, F(gradient_tile_1), F(gradient_tile_2), F(gradient_tile_3), F(gradient_tile_4)};
    const LEFT *rows[MR];
    for (int r = 0; r < MR; r++) {
        rows[r] = a + r;
        for (int v = 0; v < nv; v++) acc[r][v] = F(v_set1)(0);
    }
    TILE_MODE_BEGIN
    tiles[nv](K, rows, panel, acc);
    TILE_MODE_END
}

#endif

/* A[tile][k][r] = da[k][m0 + tile·MR + r] as the tiles take it, the last tile and the last step padded
   with zeros; db += Σ_k da[k] */
static void F(pack_gradient)(ptrdiff_t K, ptrdiff_t m0, ptrdiff_t M, const void *const *da, R *A, R *db) {
    const ptrdiff_t padded = F(whole)(K);
    for (ptrdiff_t k = 0; k < padded; k++) {
        const R *row = (const R *)da[MIN(k, K - 1)] + m0;
        R *out = A + k * MR;
        ptrdiff_t m = 0, columns = k < K ? M : 0;
        for (; m + MR <= columns; m += MR, out += padded * MR) memcpy(out, row + m, MR * sizeof(R));
        for (; m < M; m += MR, out += padded * MR)
            for (ptrdiff_t r = 0; r < MR; r++) out[r] = m + r < columns ? row[m + r] : 0;
        for (m = 0; db && m < columns; m++) db[m0 + m] += row[m];
    }
    for (ptrdiff_t m = 0; m < M; m += MR, A += padded * MR) F(pack_left)(padded, A);
}

/* The columns of a panel of K rows x, packed. */
INLINE void F(pack_rows)(const F(panel) *g, ptrdiff_t K, const void *const *x, PACKED *panel) {
    for (ptrdiff_t k = 0; k < F(whole)(K); k += STEP)
        for (int v = 0; v < g->nv; v++) {
            vec row[STEP];
            for (int s = 0; s < STEP; s++)
                row[s] = k + s < K ? F(v_load_n)((const R *)x[k + s] + g->col + v * VL, F(lanes)(g, v))
                                   : F(v_set1)(0);
            F(pack_step)(panel, K, g->nv, v, k, row);
        }
}

static void F(weight_gradient)(ptrdiff_t K, ptrdiff_t m0, ptrdiff_t m1, const void *const *da,
                               int n_products, const lstm_product *products, int add, void *db_,
                               void *work) {
    F(row4) acc[MR];
    ptrdiff_t M = m1 - m0, tiles = (M + MR - 1) / MR;
    PACKED *panel = work;
    R *A = (R *)((char *)work + 4 * F(vector_bytes)(KW)), *db = db_;
    for (ptrdiff_t m = m0; db && !add && m < m1; m++) db[m] = 0;
    TILES_BEGIN(MR, KW)
    for (ptrdiff_t k0 = 0; k0 < K; k0 += KW) {
        ptrdiff_t kn = MIN(KW, K - k0);
        F(pack_gradient)(kn, m0, M, da + k0, A, db);
        for (int s = 0; s < n_products; s++) {
            const lstm_product *q = &products[s];
            for (ptrdiff_t p = 0; p < F(n_panels)(1, 0, q->N); p++) {
                F(panel) g = F(panel_at)(1, p, 0, 0, q->N);
                F(pack_rows)(&g, kn, q->x + k0, panel);
                for (ptrdiff_t t = 0; t < tiles; t++) {
                    F(packed_tile)(g.nv, kn, (const LEFT *)(A + t * F(whole)(kn) * MR), panel, acc);
                    for (ptrdiff_t r = 0; r < MIN(MR, M - t * MR); r++)
                        for (int v = 0; v < g.nv; v++) {
                            R *out = (R *)q->dW + (m0 + t * MR + r) * q->N + g.col + v * VL;
                            ptrdiff_t w = F(lanes)(&g, v);
                            if (k0 || add) acc[r][v] += F(v_load_n)(out, w);
                            F(v_store_n)(out, acc[r][v], w);
                        }
                }
            }
        }
    }
    TILES_END(MR, KW)
}

static void F(add_rows)(ptrdiff_t n, ptrdiff_t j0, ptrdiff_t j1, const void *const *a,
                        void *const *out) {
    for (ptrdiff_t k = 0; k < n; k++)
        for (ptrdiff_t j = j0; j < j1; j++) ((R *)out[k])[j] += ((const R *)a[k])[j];
}

#endif
