/* format_float.h: products of the arrays' own numbers, float32 or float64.

   What a format is, to the files after it:
       LEFT, PACKED    the numbers of a lowered row and of a packed operand, as they lie in memory
       STEP            numbers k that are packed, and multiplied, together
       whole           K filled up with the zeros that are packed and lowered too
       KC              numbers k per block of a panel
       vector_bytes    bytes of a packed vector of columns
       lowered_bytes, lower        a row as products take it; LOWERS 0 if that is the row itself
       pack_vector     packs a vector of columns; through pack_step, if W holds numbers of the arrays
       tile            the register tile
       TILE_MODE_BEGIN, TILE_MODE_END      around calls of tiles, that are not inlined
       TRAINS          whether it has gradients; then also pack_left, for those of weights */

#define LEFT R
#define PACKED R
#define PACKED_NUMBERS 1
#define STEP 1
#define KC 512          /* KC·4·VECTOR_BYTES is 128 KB with AVX-512 */
#define LOWERS 0
#define TRAINS 1
#define TILE_MODE_BEGIN
#define TILE_MODE_END

INLINE ptrdiff_t F(whole)(ptrdiff_t K) { return K; }

static ptrdiff_t F(vector_bytes)(ptrdiff_t K) { return K * VL * (ptrdiff_t)sizeof(R); }

/* The vectors w of STEP numbers from k on become lanes of vector v of nv. */
INLINE void F(pack_step)(PACKED *panel, ptrdiff_t K, int nv, int v, ptrdiff_t k, const vec *w) {
    (void)K;
    F(v_store)(panel + (k * nv + v) * VL, w[0]);
}

#include "pack_floats.h"

/* Turns the numbers A[k][r], k < K, r < MR, into what a tile takes. */
INLINE void F(pack_left)(ptrdiff_t K, R *A) { (void)K, (void)A; }

/* out[r][v] += Σ_k a[r][k·step] panel[k][v] for rows r < mr, vectors v < nv and K numbers k from k0 on.
   Every lane is one chain of fma over k in ascending order, from what `out` holds on.  Meanwhile it
   fetches the lines from the address `ahead` on, one per step; nobody reads there, so it may lie past
   the end. */
INLINE void F(tile)(const int mr, const int nv, const ptrdiff_t step, ptrdiff_t k0, ptrdiff_t K,
                    const LEFT *const *rows, const PACKED *restrict panel, uintptr_t ahead,
                    F(row4) *restrict out) {
    for (int first = 0; first < nv; first += AT_ONCE(mr)) {
        const int n = MIN(AT_ONCE(mr), nv - first);
        const PACKED *restrict p = panel + (k0 * nv + first) * VL;
        const R *a[MR];
        vec acc[MR][4];
        EACH(r, mr) a[r] = rows[r] + k0 * step;
        EACH(r, mr) EACH(v, n) acc[r][v] = out[r][first + v];
        for (ptrdiff_t k = 0; k < K; k++, p += nv * VL, ahead += 64) {
            vec w[4];
            PREFETCH(ahead);
            EACH(v, n) w[v] = F(v_load)(p + v * VL);
            EACH(r, mr) {
                vec x = F(v_set1)(a[r][k * step]);
                EACH(v, n) acc[r][v] = v_fma(x, w[v], acc[r][v]);
            }
        }
        EACH(r, mr) EACH(v, n) out[r][first + v] = acc[r][v];
    }
}
