/* tile.h: the register tile, which does all the multiplying there is.

   Up to MR rows times a panel of up to four vectors, whose row k is panel[k][vector][lane].  Every lane
   is one chain of fma over k in ascending order, from what `out` holds on.  It knows neither what the
   columns are nor where the rows go: that is panels.h. */

#ifdef __GNUC__
#define PREFETCH(p) __builtin_prefetch((const void *)(p), 0, 2)
#define EACH(x, n) _Pragma("GCC unroll 6") for (int x = 0; x < (n); x++)
#else
#define PREFETCH(p) (void)(p)
#define EACH(x, n) for (int x = 0; x < (n); x++)
#endif

typedef vec F(row4)[4];

/* out[r][v] += Σ_k a[r][k·step] panel[k][v] for rows r < mr, vectors v < nv.  Meanwhile it fetches the
   lines from the address `ahead` on, one per k; nobody reads there, so it may lie past the end. */
INLINE void F(tile)(const int mr, const int nv, const ptrdiff_t step, ptrdiff_t K,
                    const R *const *a, const PACKED *restrict panel, uintptr_t ahead,
                    F(row4) *restrict out) {
    vec acc[MR][4];
    EACH(r, mr) EACH(v, nv) acc[r][v] = out[r][v];
    for (ptrdiff_t k = 0; k < K; k++, panel += nv * VL, ahead += 64) {
        vec w[4];
        PREFETCH(ahead);
        EACH(v, nv) w[v] = F(v_unpack)(panel + v * VL);
        EACH(r, mr) {
            vec x = F(v_broadcast)(a[r][k * step]);
            EACH(v, nv) acc[r][v] = v_fma(x, w[v], acc[r][v]);
        }
    }
    EACH(r, mr) EACH(v, nv) out[r][v] = acc[r][v];
}

typedef void F(tile_fn)(ptrdiff_t K, const R *const *a, const PACKED *panel, uintptr_t ahead,
                        F(row4) *out);

#define TILE(mr, nv)                                                                                 \
    static void F(tile_##mr##_##nv)(ptrdiff_t K, const R *const *a, const PACKED *panel,             \
                                    uintptr_t ahead, F(row4) *out) {                                 \
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
