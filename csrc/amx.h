/* amx.h: rows times a panel by the tiles of AMX: in place of the register tiles of the format.

   A tile is 16 rows of 64 bytes: of the left side 16 rows times a block of numbers k, of a packed vector
   the words of such a block times 16 columns, as they lie in the panel, of sums 16 rows times 16 columns.
   There are eight; a product of two takes 16 cycles whatever is in them, and its sum is there after 52, so
   that four sums or more are in the making at a time.  Loads take 8 from the first-level cache.

   Left rows lie at equal distances, and the memory of rows up to a multiple of 16 can be read: what comes
   of rows that are none is written to places that nobody reads.

   The format has said where sums begin and what to multiply with: SUMS_FROM and DOT. */

static const struct {
    uint8_t palette, start, none[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} F(tile_shapes) = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

#define TILES_BEGIN _tile_loadconfig(&F(tile_shapes));
#define TILES_END _tile_release();
#define IN_ORDER __asm__ volatile("" ::: "memory")  /* the compiler does not see what tiles read and write */

/* The two sides of a product, and its sums: the left rows, `a_row` bytes from one to the next and `a_block`
   from a block to the next; the tiles of a panel, `b_block` from a block to the next, and the third vector
   of four `b_half` from the first. */
typedef struct {
    const char *a;
    ptrdiff_t a_row, a_block;
    const char *b;
    ptrdiff_t b_block, b_half;
    const char *start;
    F(row4) *sums;
} F(sides);

#define A(tile, r) _tile_loadd(tile, s.a + 16 * (r) * s.a_row, s.a_row);
#define B(tile, v) _tile_loadd(tile, s.b + 1024 * (v), 64);
#define HALF(tile, v) _tile_loadd(tile, s.b + s.b_half + 1024 * (v), 64);
#define FROM(tile, r, v) SUMS_FROM(tile, r, v)
#define TO(tile, r, v) _tile_stored(tile, &s.sums[16 * (r)][v], sizeof(F(row4)));
#define SHAPE(rows, vectors, BEGIN, EACH_BLOCK, END)                                                 \
    static void F(times_##rows##_##vectors)(ptrdiff_t blocks, F(sides) s) {                          \
        BEGIN                                                                                        \
        for (; blocks > 0; blocks--, s.a += s.a_block, s.b += s.b_block) {                           \
            EACH_BLOCK                                                                               \
        }                                                                                            \
        END                                                                                          \
    }
/* tiles 0 to 5 hold sums */
SHAPE(1, 1, FROM(0, 0, 0), A(6, 0) B(7, 0) DOT(0, 6, 7), TO(0, 0, 0))
SHAPE(1, 2, FROM(0, 0, 0) FROM(1, 0, 1),
      A(6, 0) B(7, 0) DOT(0, 6, 7) B(5, 1) DOT(1, 6, 5),
      TO(0, 0, 0) TO(1, 0, 1))
SHAPE(1, 3, FROM(0, 0, 0) FROM(1, 0, 1) FROM(2, 0, 2),
      A(6, 0) B(7, 0) DOT(0, 6, 7) B(5, 1) DOT(1, 6, 5) B(4, 2) DOT(2, 6, 4),
      TO(0, 0, 0) TO(1, 0, 1) TO(2, 0, 2))
SHAPE(1, 4, FROM(0, 0, 0) FROM(1, 0, 1) FROM(2, 0, 2) FROM(3, 0, 3),
      A(6, 0) B(7, 0) DOT(0, 6, 7) B(5, 1) DOT(1, 6, 5) HALF(4, 0) DOT(2, 6, 4) HALF(7, 1) DOT(3, 6, 7),
      TO(0, 0, 0) TO(1, 0, 1) TO(2, 0, 2) TO(3, 0, 3))
SHAPE(2, 1, FROM(0, 0, 0) FROM(1, 1, 0),
      B(7, 0) A(6, 0) DOT(0, 6, 7) A(5, 1) DOT(1, 5, 7),
      TO(0, 0, 0) TO(1, 1, 0))
SHAPE(2, 2, FROM(0, 0, 0) FROM(1, 0, 1) FROM(2, 1, 0) FROM(3, 1, 1),
      B(7, 0) A(6, 0) DOT(0, 6, 7) B(5, 1) DOT(1, 6, 5) A(4, 1) DOT(2, 4, 7) DOT(3, 4, 5),
      TO(0, 0, 0) TO(1, 0, 1) TO(2, 1, 0) TO(3, 1, 1))
SHAPE(2, 3, FROM(0, 0, 0) FROM(1, 0, 1) FROM(2, 0, 2) FROM(3, 1, 0) FROM(4, 1, 1) FROM(5, 1, 2),
      A(6, 0) B(7, 0) DOT(0, 6, 7) B(7, 1) DOT(1, 6, 7) B(7, 2) DOT(2, 6, 7)
      A(6, 1) DOT(5, 6, 7) B(7, 1) DOT(4, 6, 7) B(7, 0) DOT(3, 6, 7),
      TO(0, 0, 0) TO(1, 0, 1) TO(2, 0, 2) TO(3, 1, 0) TO(4, 1, 1) TO(5, 1, 2))

/* sums[r][v] of n rows, of `vectors` <= 4. */
static void F(times)(ptrdiff_t n, int vectors, ptrdiff_t blocks, F(sides) s) {
    static void (*const shapes[2][5])(ptrdiff_t, F(sides)) = {
        {0, F(times_1_1), F(times_1_2), F(times_1_3), F(times_1_4)},
        {0, F(times_2_1), F(times_2_2), F(times_2_3)}};
    const ptrdiff_t pairs = (n + 15) / 32;  /* of tiles of rows; then one may be left */
    for (int v = 0; v < vectors;) {
        int together = vectors - v == 4 ? 2 : vectors - v;
        for (ptrdiff_t r = 0; r < pairs; r++) {
            F(sides) part = s;
            part.a += 32 * r * s.a_row, part.b += v / 2 * s.b_half, part.start += 64 * v;
            part.sums = (F(row4) *)&s.sums[32 * r][v];
            shapes[1][together](blocks, part);
        }
        v += together;
    }
    if (n > 32 * pairs) {
        s.a += 32 * pairs * s.a_row, s.sums += 32 * pairs;
        shapes[0][vectors](blocks, s);
    }
}

#undef A
#undef B
#undef HALF
#undef FROM
#undef TO
#undef SHAPE

/* Those of a panel of K numbers from k0 on, as AT says where its words lie. */
INLINE F(sides) F(sides_of)(const PACKED *panel, int nv, ptrdiff_t K, ptrdiff_t k0) {
    const int g = NEIGHBORS(nv);
    F(sides) s = {0};
    s.b = (const char *)panel + AT(K, nv, 0, k0) * (ptrdiff_t)sizeof(PACKED);
    s.b_block = 1024 * g;
    s.b_half = (AT(K, nv, g % nv, 0) - AT(K, nv, 0, 0)) * (ptrdiff_t)sizeof(PACKED);
    return s;
}

/* acc[r] += a[r] · panel for n <= GROUP rows. */
static void F(group)(ptrdiff_t n, ptrdiff_t K, int nv, const LEFT *const *a, const PACKED *panel,
                     const PACKED *next, F(row4) *acc) {
    const ptrdiff_t stride = n > 1 ? (const char *)a[1] - (const char *)a[0] : 0;
    (void)next;
    for (ptrdiff_t k0 = 0; k0 < K; k0 += KC) {
        ptrdiff_t kn = MIN(KC, K - k0), blocks = (kn + WHOLE - 1) / WHOLE;
#if TRAINS
        F(sides) s = F(sides_of)(panel, nv, K, k0);
        s.a = (const char *)(a[0] + LEFT_OF(k0)), s.a_row = stride, s.a_block = 64, s.sums = acc;
        IN_ORDER;
        F(times)(n, nv, blocks, s);
        IN_ORDER;
#else
        if (n == 1) {  /* which is faster by registers: a tile of AMX takes the time of two */
            F(tiles)[1][nv](k0, kn, a, panel, (uintptr_t)next, acc);
            continue;
        }
        F(row4) sums[GROUP];
        const char *block = (const char *)F(block_at)(panel, nv, k0);
        F(sides) s = F(sides_of)((const PACKED *)block + 64 * nv, nv, kn, 0);
        s.a = (const char *)(a[0] + HEAD + k0 / STEP), s.a_row = stride, s.a_block = 64;
        s.start = block, s.sums = sums;
        IN_ORDER;
        F(times)(n, nv, blocks, s);
        IN_ORDER;
        F(add_scaled)(n, nv, a, panel, sums, acc);
#endif
    }
}

#if TRAINS

/* acc = a panel for 16 rows, of which `a` holds blocks of k one after the other. */
INLINE void F(packed_tile)(int nv, ptrdiff_t K, const LEFT *a, const PACKED *panel, F(row4) *acc) {
    F(sides) s = F(sides_of)(panel, nv, K, 0);
    s.a = (const char *)a, s.a_row = 64, s.a_block = 1024, s.sums = acc;
    for (int r = 0; r < MR; r++)
        for (int v = 0; v < nv; v++) acc[r][v] = F(v_set1)(0);
    IN_ORDER;
    F(times)(MR, nv, F(whole)(K) / WHOLE, s);
    IN_ORDER;
}

#endif
