/* tile.h: the register tile of the format, for every number of rows and vectors.

   Up to ROWS rows times a panel of up to four vectors.  It knows neither what the columns are nor where
   the rows go: that is panels.h. */

#ifdef __GNUC__
#define PREFETCH(p) __builtin_prefetch((const void *)(p), 0, 2)
#define EACH(x, n) _Pragma("GCC unroll 6") for (int x = 0; x < (n); x++)
#else
#define PREFETCH(p) (void)(p)
#define EACH(x, n) for (int x = 0; x < (n); x++)
#endif

typedef vec F(row4)[4];

#include PRODUCTS

#if ROWS > 0

typedef void F(tile_fn)(ptrdiff_t k0, ptrdiff_t K, const LEFT *const *rows, const PACKED *panel,
                        uintptr_t ahead, F(row4) *out);

#define TILE(mr, nv)                                                                                 \
    static void F(tile_##mr##_##nv)(ptrdiff_t k0, ptrdiff_t K, const LEFT *const *rows,              \
                                    const PACKED *panel, uintptr_t ahead, F(row4) *out) {            \
        F(tile)(mr, nv, 1, k0, K, rows, panel, ahead, out);                                          \
    }
#define TILES(mr) TILE(mr, 1) TILE(mr, 2) TILE(mr, 3) TILE(mr, 4)
#define TILE_NAMES(mr) {0, F(tile_##mr##_1), F(tile_##mr##_2), F(tile_##mr##_3), F(tile_##mr##_4)}
TILES(1)
#if ROWS > 1
TILES(2)
#endif
#if ROWS > 2
TILES(3)
#endif
#if ROWS > 3
TILES(4) TILES(5)
#endif
#if ROWS > 5
TILES(6)
#endif

static F(tile_fn) *const F(tiles)[ROWS + 1][5] = {{0}, TILE_NAMES(1),
#if ROWS > 1
    TILE_NAMES(2),
#endif
#if ROWS > 2
    TILE_NAMES(3),
#endif
#if ROWS > 3
    TILE_NAMES(4), TILE_NAMES(5),
#endif
#if ROWS > 5
    TILE_NAMES(6),
#endif
};

#endif
