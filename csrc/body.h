/* body.h: the kernels of one (instruction set, dtype), declared in lstm.h; DOUBLE says which dtype.

   Everything is one register tile: up to MR rows times a panel of up to four vectors, where a panel
   holds the packed operand as panel[k][vector][lane].  In the forward step the four vectors of a panel
   are the four gates of the same units, so that a finished tile is all the cell needs.

   A group of rows passes over a panel, KC deep at a time, so that the block of the panel stays in a
   near cache; between tile and epilogue the sums of the group lie in `acc`, 12 KB of stack. */

#include "simd.h"
#include "activations.h"
#include "cell.h"

#ifndef GROUP
#define GROUP (8 * MR)  /* rows per group */
#define KC 512          /* k per block of a panel: KC·4·VECTOR_BYTES is 128 KB with AVX-512 */
#define KW 256          /* k per block of a weight gradient: part of the definition of its bits */
#ifdef __GNUC__
#define PREFETCH(p) __builtin_prefetch(p, 0, 2)
#else
#define PREFETCH(p) (void)(p)
#endif
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define EACH(x, n) _Pragma("GCC unroll 6") for (int x = 0; x < (n); x++)
#endif

typedef vec F(row4)[4];

/* ---- the tile: acc[r][v] += Σ_k a[r][k·step] panel[k][v] for rows r < mr, vectors v < nv --------- */

INLINE void F(tile)(const int mr, const int nv, const ptrdiff_t step, ptrdiff_t K,
                    const R *const *a, const R *restrict panel, const char *ahead,
                    F(row4) *restrict out) {
    vec acc[MR][4];
    EACH(r, mr) EACH(v, nv) acc[r][v] = out[r][v];
    for (ptrdiff_t k = 0; k < K; k++, panel += nv * VL, ahead += 64) {
        vec w[4];
        PREFETCH(ahead);
        EACH(v, nv) w[v] = F(v_load)(panel + v * VL);
        EACH(r, mr) {
            vec x = F(v_set1)(a[r][k * step]);
            EACH(v, nv) acc[r][v] = v_fma(x, w[v], acc[r][v]);
        }
    }
    EACH(r, mr) EACH(v, nv) out[r][v] = acc[r][v];
}

typedef void F(tile_fn)(ptrdiff_t K, const R *const *a, const R *panel, const char *ahead,
                        F(row4) *out);

#define TILE(mr, nv)                                                                                 \
    static void F(tile_##mr##_##nv)(ptrdiff_t K, const R *const *a, const R *panel,                  \
                                    const char *ahead, F(row4) *out) {                               \
        F(tile)(mr, nv, 1, K, a, panel, ahead, out);                                                 \
    }
#define TILES(mr) TILE(mr, 1) TILE(mr, 2) TILE(mr, 3) TILE(mr, 4)
#define TILE_NAMES(mr) {0, F(tile_##mr##_1), F(tile_##mr##_2), F(tile_##mr##_3), F(tile_##mr##_4)}
TILES(1) TILES(2)
#if MR > 2
TILES(3)
#endif
#if MR > 3
TILES(4) TILES(5)
#endif
#if MR > 5
TILES(6)
#endif

static F(tile_fn) *const F(tiles)[MR + 1][5] = {{0}, TILE_NAMES(1), TILE_NAMES(2),
#if MR > 2
    TILE_NAMES(3),
#endif
#if MR > 3
    TILE_NAMES(4), TILE_NAMES(5),
#endif
#if MR > 5
    TILE_NAMES(6),
#endif
};

/* ---- panels --------------------------------------------------------------------------------------- */

typedef struct {
    ptrdiff_t col, stride, end; /* column of vector 0, distance of the vectors, end of the last one */
    int nv, neighbors;          /* vectors; whether they are next to one another */
} F(panel);

INLINE ptrdiff_t F(n_panels)(int panels, ptrdiff_t j0, ptrdiff_t j1) {
    ptrdiff_t width = panels == PANEL_GATES ? VL : 4 * VL;
    return (j1 - j0 + width - 1) / width;
}

/* Panel p of the columns [j0, j1), counted from j0. */
INLINE F(panel) F(panel_at)(int panels, ptrdiff_t p, ptrdiff_t H, ptrdiff_t j0, ptrdiff_t j1) {
    F(panel) g;
    g.neighbors = panels == PANEL_PLAIN;
    if (panels == PANEL_GATES) {
        g.col = j0 + p * VL;
        g.stride = H;
        g.nv = 4;
        g.end = MIN(VL, j1 - g.col);
    } else {
        g.col = j0 + p * 4 * VL;
        g.stride = VL;
        g.nv = (int)MIN(4, (j1 - g.col + VL - 1) / VL);
        g.end = MIN(VL, j1 - g.col - (g.nv - 1) * VL);
    }
    return g;
}

/* Lanes of vector v that are columns: of neighboring vectors, only the last can lack some. */
INLINE ptrdiff_t F(lanes)(const F(panel) *g, int v) {
    return g->neighbors && v < g->nv - 1 ? VL : g->end;
}

/* out[k·out_stride + l] = in[l·in_stride + k] for k, l < VL.  Interleaving the two halves of the rows
   log2(VL) times transposes them. */
INLINE void F(transpose)(const R *in, ptrdiff_t in_stride, R *out, ptrdiff_t out_stride) {
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
    for (int k = 0; k < VL; k++) F(v_store)(out + k * out_stride, row[k]);
}

static void F(pack)(int panels, ptrdiff_t K, ptrdiff_t H, ptrdiff_t j0, ptrdiff_t j1, ptrdiff_t first,
                    ptrdiff_t last, const void *W_, ptrdiff_t k_stride, ptrdiff_t col_stride,
                    void *out_) {
    enum { BLOCK = 16 };  /* k at a time, so that the written lines stay in L1 */
    for (ptrdiff_t p = first; p < last; p++) {
        F(panel) g = F(panel_at)(panels, p, H, j0, j1);
        R *out = (R *)out_ + p * K * 4 * VL;
        for (int v = 0; v < g.nv; v++) {
            ptrdiff_t n = F(lanes)(&g, v);
            const R *W = (const R *)W_ + (g.col + v * g.stride) * col_stride;
            for (ptrdiff_t k0 = 0; k0 < K; k0 += BLOCK) {
                ptrdiff_t k1 = MIN(K, k0 + BLOCK);
                if (n < VL)
                    for (ptrdiff_t k = k0; k < k1; k++)
                        F(v_store)(out + (k * g.nv + v) * VL, F(v_set1)(0));
                if (col_stride == 1)
                    for (ptrdiff_t k = k0; k < k1; k++)
                        F(v_store_n)(out + (k * g.nv + v) * VL, F(v_load_n)(W + k * k_stride, n), n);
                else if (n == VL && k1 - k0 == BLOCK && k_stride == 1)
                    for (ptrdiff_t k = k0; k < k1; k += VL)
                        F(transpose)(W + k, col_stride, out + (k * g.nv + v) * VL, g.nv * VL);
                else
                    for (ptrdiff_t l = 0; l < n; l++)
                        for (ptrdiff_t k = k0; k < k1; k++)
                            out[(k * g.nv + v) * VL + l] = W[k * k_stride + l * col_stride];
            }
        }
    }
}

/* ---- rows over a panel ---------------------------------------------------------------------------- */

/* acc[r] += a[r] · panel for n <= GROUP rows, in tiles of nearly equal height.  Meanwhile the tiles
   fetch the next panel, a line per k: its first use by the first tile of the next group would wait for
   the third-level cache (6 % of inference at (35,20,650,650)). */
static void F(group)(ptrdiff_t n, ptrdiff_t K, int nv, const R *const *a, const R *panel,
                     const R *next, F(row4) *acc) {
    const char *ahead = (const char *)next;
    for (ptrdiff_t k = 0; k < K; k += KC) {
        ptrdiff_t kn = MIN(KC, K - k);
        const R *ak[MR];
        for (ptrdiff_t r = 0, tiles = (n + MR - 1) / MR; tiles > 0; tiles--) {
            ptrdiff_t mr = (n - r + tiles - 1) / tiles;
            for (ptrdiff_t q = 0; q < mr; q++) ak[q] = a[r + q] + k;
            F(tiles)[mr][nv](kn, ak, panel + k * nv * VL, ahead, acc + r);
            r += mr;
            ahead += kn * 64;
        }
    }
}

/* The size of equal groups of n rows. */
INLINE ptrdiff_t F(group_size)(ptrdiff_t n) {
    ptrdiff_t groups = (n + GROUP - 1) / GROUP;
    return (n + groups - 1) / groups;
}

static void F(gemm)(int panels, int start, ptrdiff_t n, ptrdiff_t K, ptrdiff_t H, ptrdiff_t j0,
                    ptrdiff_t j1, const void *const *a, const void *packed, const void *bias_,
                    void *const *C) {
    F(row4) acc[GROUP];
    const R *bias = bias_;
    if (n == 0) return;
    ptrdiff_t size = F(group_size)(n);
    for (ptrdiff_t p = 0; p < F(n_panels)(panels, j0, j1); p++) {
        F(panel) g = F(panel_at)(panels, p, H, j0, j1);
        for (ptrdiff_t r0 = 0; r0 < n; r0 += size) {
            ptrdiff_t m = MIN(size, n - r0);
            for (int v = 0; v < g.nv; v++) {
                ptrdiff_t j = g.col + v * g.stride, w = F(lanes)(&g, v);
                vec from = start == START_BIAS ? F(v_load_n)(bias + j, w) : F(v_set1)(0);
                for (ptrdiff_t r = 0; r < m; r++)
                    acc[r][v] = start == START_ADD ? F(v_load_n)((R *)C[r0 + r] + j, w) : from;
            }
            F(group)(m, K, g.nv, (const R *const *)a + r0, (const R *)packed + p * K * 4 * VL,
                     (const R *)packed + (p + 1) * K * 4 * VL, acc);
            for (ptrdiff_t r = 0; r < m; r++)
                for (int v = 0; v < g.nv; v++)
                    F(v_store_n)((R *)C[r0 + r] + g.col + v * g.stride, acc[r][v], F(lanes)(&g, v));
        }
    }
}

/* ---- one time step -------------------------------------------------------------------------------- */

static void F(lstm_step)(const lstm_weights *w, int descending, ptrdiff_t n, ptrdiff_t j0,
                         ptrdiff_t j1, const lstm_row *rows) {
    F(row4) acc[GROUP];
    const R *x[GROUP], *h[GROUP], *bias = w->bias;
    ptrdiff_t I = w->I, K = w->K, H = w->H, panels = F(n_panels)(PANEL_GATES, j0, j1);
    if (n == 0) return;
    ptrdiff_t size = F(group_size)(n);
    for (ptrdiff_t q = 0; q < panels; q++) {
        ptrdiff_t p = descending ? panels - 1 - q : q, next = descending ? MAX(p - 1, 0) : p + 1;
        ptrdiff_t j = j0 + p * VL, lanes = MIN(VL, j1 - j);
        const R *peep = w->peepholes ? (const R *)w->peepholes + j : NULL;
        const R *ih = (const R *)w->ih + p * I * 4 * VL, *hh = (const R *)w->hh + p * K * 4 * VL;
        for (ptrdiff_t r0 = 0; r0 < n; r0 += size) {
            ptrdiff_t m = MIN(size, n - r0);
            const lstm_row *row = rows + r0;
            for (ptrdiff_t r = 0; r < m; r++) {
                const R *start = I ? bias : row[r].gates;
                x[r] = row[r].x, h[r] = row[r].h_prev;
                for (int v = 0; v < 4; v++)
                    acc[r][v] = start ? F(v_load_n)(start + j + v * H, lanes) : F(v_set1)(0);
            }
            F(group)(m, I, 4, x, ih, hh, acc);
            F(group)(m, K, 4, h, hh, I ? (const R *)w->ih + next * I * 4 * VL
                                       : (const R *)w->hh + next * K * 4 * VL, acc);
            for (ptrdiff_t r = 0; r < m; r++) {
                F(gates) s = {acc[r][0], acc[r][1], acc[r][2], acc[r][3]};
                R *gates = (R *)row[r].gates + j;
                vec c, m_t, c_prev = F(v_load_n)((const R *)row[r].c_prev + j, lanes);
                F(cell_forward)(&s, c_prev, peep, H, lanes, &c, &m_t);
                F(v_store_n)(gates, s.i, lanes);
                F(v_store_n)(gates + H, s.f, lanes);
                F(v_store_n)(gates + 2 * H, s.g, lanes);
                F(v_store_n)(gates + 3 * H, s.o, lanes);
                F(v_store_n)((R *)row[r].c + j, c, lanes);
                F(v_store_n)((R *)row[r].h + j, m_t, lanes);
            }
        }
    }
}

static void F(lstm_back_step)(const lstm_weights *w, int descending, ptrdiff_t n, ptrdiff_t j0,
                              ptrdiff_t j1, const lstm_back_row *rows) {
    F(row4) acc[GROUP];
    const R *a[GROUP], *hh = w->hh, *peepholes = w->peepholes;
    ptrdiff_t K = w->K, H = w->H, panels = F(n_panels)(PANEL_PLAIN, j0, j1);
    if (n == 0) return;
    ptrdiff_t size = F(group_size)(n);
    for (ptrdiff_t q = 0; q < panels; q++) {
        ptrdiff_t p = descending ? panels - 1 - q : q, next = descending ? MAX(p - 1, 0) : p + 1;
        F(panel) g = F(panel_at)(PANEL_PLAIN, p, H, j0, j1);
        for (ptrdiff_t r0 = 0; r0 < n; r0 += size) {
            ptrdiff_t m = MIN(size, n - r0);
            const lstm_back_row *row = rows + r0;
            for (ptrdiff_t r = 0; r < m; r++) {
                const R *dy = (const R *)row[r].dy + g.col;
                a[r] = row[r].da_next;
                for (int v = 0; v < g.nv; v++) acc[r][v] = F(v_load_n)(dy + v * VL, F(lanes)(&g, v));
            }
            F(group)(m, K, g.nv, a, hh + p * K * 4 * VL, hh + next * K * 4 * VL, acc);
            for (ptrdiff_t r = 0; r < m; r++)
                for (int v = 0; v < g.nv; v++) {
                    ptrdiff_t j = g.col + v * VL, lanes = F(lanes)(&g, v);
                    R *gates = (R *)row[r].gates + j, *dc_row = (R *)row[r].dc + j;
                    F(gates) s = {
                        F(v_load_n)(gates, lanes), F(v_load_n)(gates + H, lanes),
                        F(v_load_n)(gates + 2 * H, lanes), F(v_load_n)(gates + 3 * H, lanes)};
                    vec dc = F(v_load_n)(dc_row, lanes);
                    F(cell_backward)(&s, F(v_load_n)((const R *)row[r].c + j, lanes),
                                     F(v_load_n)((const R *)row[r].c_prev + j, lanes),
                                     peepholes ? peepholes + j : NULL, H, lanes, acc[r][v], &dc);
                    F(v_store_n)(gates, s.i, lanes);
                    F(v_store_n)(gates + H, s.f, lanes);
                    F(v_store_n)(gates + 2 * H, s.g, lanes);
                    F(v_store_n)(gates + 3 * H, s.o, lanes);
                    F(v_store_n)(dc_row, dc, lanes);
                }
        }
    }
}

/* ---- sums over time and batch --------------------------------------------------------------------- */

static ptrdiff_t F(weight_gradient_work)(ptrdiff_t M) {
    return (((M + MR - 1) / MR * MR + 16) * KW + KW * 4 * VL) * (ptrdiff_t)sizeof(R);
}

/* acc[r][v] = Σ_k a[k·MR + r] panel[k][v]: both operands packed. */
static void F(packed_tile)(int nv, ptrdiff_t K, const R *a, const R *panel, F(row4) *acc) {
    const R *rows[MR];
    for (int r = 0; r < MR; r++) {
        rows[r] = a + r;
        for (int v = 0; v < nv; v++) acc[r][v] = F(v_set1)(0);
    }
    if (nv == 4) F(tile)(MR, 4, MR, K, rows, panel, (const char *)a, acc);
    else if (nv == 3) F(tile)(MR, 3, MR, K, rows, panel, (const char *)a, acc);
    else if (nv == 2) F(tile)(MR, 2, MR, K, rows, panel, (const char *)a, acc);
    else F(tile)(MR, 1, MR, K, rows, panel, (const char *)a, acc);
}

/* A[tile][k][r] = da[k][m0 + tile·MR + r], the last tile padded with zeros; db += Σ_k da[k] */
static void F(pack_gradient)(ptrdiff_t K, ptrdiff_t m0, ptrdiff_t M, const void *const *da, R *A, R *db) {
    for (ptrdiff_t k = 0; k < K; k++) {
        const R *row = (const R *)da[k] + m0;
        R *out = A + k * MR;
        ptrdiff_t m = 0;
        for (; m + MR <= M; m += MR, out += K * MR) memcpy(out, row + m, MR * sizeof(R));
        for (ptrdiff_t r = 0; m < M && r < MR; r++) out[r] = m + r < M ? row[m + r] : 0;
        for (m = 0; db && m < M; m++) db[m0 + m] += row[m];
    }
}

static void F(weight_gradient)(ptrdiff_t K, ptrdiff_t m0, ptrdiff_t m1, const void *const *da,
                               int n_products, const lstm_product *products, void *db_, void *work) {
    F(row4) acc[MR];
    ptrdiff_t M = m1 - m0, tiles = (M + MR - 1) / MR;
    R *panel = work, *A = panel + KW * 4 * VL, *db = db_;
    for (ptrdiff_t m = m0; db && m < m1; m++) db[m] = 0;
    for (ptrdiff_t k0 = 0; k0 < K; k0 += KW) {
        ptrdiff_t kn = MIN(KW, K - k0);
        F(pack_gradient)(kn, m0, M, da + k0, A, db);
        for (const lstm_product *q = products; q < products + n_products; q++)
            for (ptrdiff_t p = 0; p < F(n_panels)(PANEL_PLAIN, 0, q->N); p++) {
                F(panel) g = F(panel_at)(PANEL_PLAIN, p, 0, 0, q->N);
                for (ptrdiff_t k = 0; k < kn; k++)
                    for (int v = 0; v < g.nv; v++)
                        F(v_store)(panel + (k * g.nv + v) * VL,
                                   F(v_load_n)((const R *)q->x[k0 + k] + g.col + v * VL,
                                               F(lanes)(&g, v)));
                for (ptrdiff_t t = 0; t < tiles; t++) {
                    F(packed_tile)(g.nv, kn, A + t * kn * MR, panel, acc);
                    for (ptrdiff_t r = 0; r < MIN(MR, M - t * MR); r++)
                        for (int v = 0; v < g.nv; v++) {
                            R *out = (R *)q->dW + (m0 + t * MR + r) * q->N + g.col + v * VL;
                            ptrdiff_t w = F(lanes)(&g, v);
                            if (k0) acc[r][v] += F(v_load_n)(out, w);
                            F(v_store_n)(out, acc[r][v], w);
                        }
                }
            }
    }
}

static void F(peephole_gradient)(ptrdiff_t K, ptrdiff_t H, ptrdiff_t j0, ptrdiff_t j1,
                                 const void *const *da, const void *const *c_prev,
                                 const void *const *c, void *dp_) {
    for (ptrdiff_t j = j0; j < j1; j += VL) {
        ptrdiff_t w = MIN(VL, j1 - j);
        vec dp_i = F(v_set1)(0), dp_f = dp_i, dp_o = dp_i;
        for (ptrdiff_t k = 0; k < K; k++) {
            const R *a = (const R *)da[k] + j;
            vec prev = F(v_load_n)((const R *)c_prev[k] + j, w);
            dp_i = v_fma(F(v_load_n)(a, w), prev, dp_i);
            dp_f = v_fma(F(v_load_n)(a + H, w), prev, dp_f);
            dp_o = v_fma(F(v_load_n)(a + 3 * H, w), F(v_load_n)((const R *)c[k] + j, w), dp_o);
        }
        R *dp = (R *)dp_ + j;
        F(v_store_n)(dp, dp_i, w);
        F(v_store_n)(dp + H, dp_f, w);
        F(v_store_n)(dp + 2 * H, dp_o, w);
    }
}

static void F(add_rows)(ptrdiff_t n, ptrdiff_t j0, ptrdiff_t j1, const void *const *a,
                        void *const *out) {
    for (ptrdiff_t k = 0; k < n; k++)
        for (ptrdiff_t j = j0; j < j1; j++) ((R *)out[k])[j] += ((const R *)a[k])[j];
}

/* ---- pointwise ------------------------------------------------------------------------------------ */

static void F(rnn_cell)(int relu, ptrdiff_t n, ptrdiff_t j0, ptrdiff_t j1, void *const *h) {
    for (ptrdiff_t r = 0; r < n; r++)
        for (ptrdiff_t j = j0; j < j1; j += VL) {
            R *row = (R *)h[r] + j;
            vec a = F(v_load_n)(row, MIN(VL, j1 - j));
            F(v_store_n)(row, relu ? v_max(F(v_set1)(0), a) : F(v_tanh)(a), MIN(VL, j1 - j));
        }
}

static void F(rnn_back_cell)(int relu, ptrdiff_t n, ptrdiff_t j0, ptrdiff_t j1, const void *const *h,
                             void *const *dh) {
    for (ptrdiff_t r = 0; r < n; r++)
        for (ptrdiff_t j = j0; j < j1; j += VL) {
            R *row = (R *)dh[r] + j;
            ptrdiff_t w = MIN(VL, j1 - j);
            vec h_t = F(v_load_n)((const R *)h[r] + j, w), dh_t = F(v_load_n)(row, w);
            vec da = relu ? F(v_select)(h_t > 0, dh_t, F(v_set1)(0))
                          : dh_t * v_fma(-h_t, h_t, F(v_set1)(1));
            F(v_store_n)(row, da, w);
        }
}

static void F(cell_output)(ptrdiff_t n, ptrdiff_t H, ptrdiff_t j0, ptrdiff_t j1,
                           const void *const *gates, const void *const *c, void *const *m) {
    for (ptrdiff_t r = 0; r < n; r++)
        for (ptrdiff_t j = j0; j < j1; j += VL) {
            ptrdiff_t w = MIN(VL, j1 - j);
            vec o = F(v_load_n)((const R *)gates[r] + 3 * H + j, w);
            F(v_store_n)((R *)m[r] + j, o * F(v_tanh)(F(v_load_n)((const R *)c[r] + j, w)), w);
        }
}

/* e^z for z <= 0: 0 where that is no normal number, nan for nan. */
INLINE vec F(v_exp_below_0)(vec z) {
    vec q, s, least = F(v_set1)(EXP_MIN);
    F(exp_parts)(v_max(least, z), &q, &s);
    return F(v_select)(z < least, F(v_set1)(0), s * (q + 1));
}

static void F(cross_entropy)(ptrdiff_t n, ptrdiff_t V, const void *z_, const int64_t *target,
                             const void *weight_, void *loss_, void *dz_) {
    for (ptrdiff_t r = 0; r < n; r++) {
        const R *z = (const R *)z_ + r * V, weight = ((const R *)weight_)[r], z_k = z[target[r]];
        R *dz = (R *)dz_ + r * V, lanes[VECTOR_BYTES / sizeof(R)], top = z[0], sum = 0;
        vec many = F(v_set1)(top);
        ptrdiff_t j = 0;
        for (; j + VL <= V; j += VL) many = v_max(many, F(v_load)(z + j));
        F(v_store)(lanes, many);
        for (; j < V; j++) top = z[j] > top ? z[j] : top;
        for (ptrdiff_t l = 0; l < VL; l++) top = lanes[l] > top ? lanes[l] : top;
        many = F(v_set1)(0);
        for (j = 0; j < V; j += VL) {
            ptrdiff_t w = MIN(VL, V - j);
            F(v_store_n)(dz + j, F(v_exp_below_0)(F(v_load_n)(z + j, w) - top), w);
            many += F(v_load_n)(dz + j, w);
        }
        F(v_store)(lanes, many);
        for (ptrdiff_t l = 0; l < VL; l++) sum += lanes[l];
        ((R *)loss_)[r] = (R)log(sum) - (z_k - top);
        for (j = 0; j < V; j += VL) {
            ptrdiff_t w = MIN(VL, V - j);
            F(v_store_n)(dz + j, weight ? F(v_load_n)(dz + j, w) * (weight / sum) : F(v_set1)(0), w);
        }
        dz[target[r]] -= weight;
    }
}

static void F(adam)(ptrdiff_t n, const lstm_adam *rule, void *p_, const void *g_, void *m_, void *v_) {
    R *p = p_, *m = m_, *v = v_;
    const vec to_m = F(v_set1)((R)(1 - rule->b1)), to_v = F(v_set1)((R)(1 - rule->b2));
    const vec decay = F(v_set1)((R)rule->decay), keep = F(v_set1)((R)rule->keep);
    const vec rate = F(v_set1)((R)rule->rate), eps = F(v_set1)((R)rule->eps);
    for (ptrdiff_t j = 0; j < n; j += VL) {
        ptrdiff_t w = MIN(VL, n - j);
        vec p_j = F(v_load_n)(p + j, w), m_j = F(v_load_n)(m + j, w), v_j = F(v_load_n)(v + j, w);
        vec g = v_fma(decay, p_j, F(v_load_n)((const R *)g_ + j, w));
        m_j = v_fma(to_m, g - m_j, m_j);
        v_j = v_fma(to_v, v_fma(g, g, -v_j), v_j);
        F(v_store_n)(m + j, m_j, w);
        F(v_store_n)(v + j, v_j, w);
        F(v_store_n)(p + j, v_fma(-rate, m_j / (F(v_sqrt)(v_j) + eps), keep * p_j), w);
    }
}

#define ACTIVATION(name)                                                                             \
    static void F(array_##name)(ptrdiff_t n, const void *x, void *out) {                             \
        for (ptrdiff_t j = 0; j < n; j += VL) {                                                      \
            ptrdiff_t w = MIN(VL, n - j);                                                            \
            F(v_store_n)((R *)out + j, F(v_##name)(F(v_load_n)((const R *)x + j, w)), w);            \
        }                                                                                            \
    }
ACTIVATION(sigmoid)
ACTIVATION(tanh)

#define NAME_(isa) #isa
#define NAME(isa) NAME_(isa)

static const lstm_kernels F(kernels) = {
    NAME(ISA), DOUBLE, VECTOR_BYTES / sizeof(R), MR, F(pack), F(gemm), F(lstm_step),
    F(lstm_back_step), F(weight_gradient), F(weight_gradient_work), F(peephole_gradient), F(add_rows),
    F(rnn_cell),
    F(rnn_back_cell), F(cell_output), F(cross_entropy), F(adam), F(array_sigmoid), F(array_tanh)};
