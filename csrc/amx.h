/* amx.h: rows times a panel by the tiles of AMX: in place of the register tiles of the format.

   A tile is 16 rows of 64 bytes: of the left side 16 rows times a block of numbers k, of a packed vector
   the words of such a block times 16 columns, as they lie in the panel, of sums 16 rows times 16 columns.
   There are eight; a product of two takes 16 cycles whatever is in them, a load 8 or 9 from the first-level
   cache, so that loads of up to two tiles hide behind a product.

   Left rows lie at equal distances, and the memory of rows up to a multiple of 16 can be read: what comes
   of rows that are none is written to places that nobody reads.

   The format has said what multiplies, DOT, and when it is worth it, BY_TILES. */

static const struct {
    uint8_t palette, start, none[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} F(tile_shapes) = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

#define TILES_BEGIN(n, K) \
    if (BY_TILES(n, K)) _tile_loadconfig(&F(tile_shapes));
#define TILES_END(n, K) \
    if (BY_TILES(n, K)) _tile_release();
#define IN_ORDER __asm__ volatile("" ::: "memory")  /* the compiler does not see what tiles read and write */

/* The two sides of a product: left rows, `a_row` bytes from one to the next and `a_block` from a block to
   the next; the tiles of a panel, `b_block` from a block to the next, and the third vector of four `b_half`
   from the first. */
typedef struct {
    ptrdiff_t blocks;
    const char *a;
    ptrdiff_t a_row, a_block;
    const char *b;
    ptrdiff_t b_block, b_half;
} F(sides);
#define sides F(sides)

/* clang-format off */
#define A(tile, r) _tile_loadd(tile, a + 16 * (r) * p->a_row, p->a_row);
#define B(tile, v) _tile_loadd(tile, b + 1024 * (v), 64);
#define HALF(tile, v) _tile_loadd(tile, b + p->b_half + 1024 * (v), 64);
#define FROM(tile, r, v) _tile_loadd(tile, from + 16 * (r) * from_row + 64 * (v), from_row);
#define TO(tile, r, v) _tile_stored(tile, &sums[16 * (r)][v], sizeof(F(row4)));

/* Tiles of rows times vectors of a panel: sums = what lies at `from`, rows `from_row` bytes apart, + the
   products of `parts`, one after the other.  Tiles 0 to 5 hold the sums. */
#define TIMES(rows, vectors, BEGIN, EACH_BLOCK, END)                                                 \
    static void F(times_##rows##_##vectors)(int parts, const sides *p, const char *from,             \
                                            ptrdiff_t from_row, F(row4) *sums) {                     \
        BEGIN                                                                                        \
        for (; parts > 0; parts--, p++) {                                                            \
            const char *a = p->a, *b = p->b;                                                         \
            for (ptrdiff_t q = p->blocks; q > 0; q--, a += p->a_block, b += p->b_block) {            \
                EACH_BLOCK                                                                           \
            }                                                                                        \
        }                                                                                            \
        END                                                                                          \
    }
TIMES(1, 1, FROM(0, 0, 0), A(6, 0) B(7, 0) DOT(0, 6, 7), TO(0, 0, 0))
TIMES(1, 2, FROM(0, 0, 0) FROM(1, 0, 1),
      A(6, 0) B(7, 0) DOT(0, 6, 7) B(5, 1) DOT(1, 6, 5),
      TO(0, 0, 0) TO(1, 0, 1))
TIMES(1, 3, FROM(0, 0, 0) FROM(1, 0, 1) FROM(2, 0, 2),
      A(6, 0) B(7, 0) DOT(0, 6, 7) B(5, 1) DOT(1, 6, 5) B(4, 2) DOT(2, 6, 4),
      TO(0, 0, 0) TO(1, 0, 1) TO(2, 0, 2))
TIMES(1, 4, FROM(0, 0, 0) FROM(1, 0, 1) FROM(2, 0, 2) FROM(3, 0, 3),
      A(6, 0) B(7, 0) DOT(0, 6, 7) B(5, 1) DOT(1, 6, 5) HALF(4, 0) DOT(2, 6, 4) HALF(7, 1) DOT(3, 6, 7),
      TO(0, 0, 0) TO(1, 0, 1) TO(2, 0, 2) TO(3, 0, 3))
TIMES(2, 1, FROM(0, 0, 0) FROM(1, 1, 0),
      B(7, 0) A(6, 0) DOT(0, 6, 7) A(5, 1) DOT(1, 5, 7),
      TO(0, 0, 0) TO(1, 1, 0))
#define FROM_2_2 FROM(0, 0, 0) FROM(1, 0, 1) FROM(2, 1, 0) FROM(3, 1, 1)
#define BLOCK_2_2 B(7, 0) A(6, 0) DOT(0, 6, 7) B(5, 1) DOT(1, 6, 5) A(4, 1) DOT(2, 4, 7) DOT(3, 4, 5)
#define TO_2_2 TO(0, 0, 0) TO(1, 0, 1) TO(2, 1, 0) TO(3, 1, 1)
TIMES(2, 2, FROM_2_2, BLOCK_2_2, TO_2_2)
TIMES(2, 3, FROM(0, 0, 0) FROM(1, 0, 1) FROM(2, 0, 2) FROM(3, 1, 0) FROM(4, 1, 1) FROM(5, 1, 2),
      A(6, 0) B(7, 0) DOT(0, 6, 7) B(7, 1) DOT(1, 6, 7) B(7, 2) DOT(2, 6, 7)
      A(6, 1) DOT(5, 6, 7) B(7, 1) DOT(4, 6, 7) B(7, 0) DOT(3, 6, 7),
      TO(0, 0, 0) TO(1, 0, 1) TO(2, 0, 2) TO(3, 1, 0) TO(4, 1, 1) TO(5, 1, 2))

/* sums[r][v] of n rows, of `vectors` <= 4, with 1 or 2 parts. */
static void F(times)(ptrdiff_t n, int vectors, int parts, const sides *p, const char *from,
                     ptrdiff_t from_row, F(row4) *sums) {
    static void (*const shapes[2][5])(int, const sides *, const char *, ptrdiff_t, F(row4) *) = {
        {0, F(times_1_1), F(times_1_2), F(times_1_3), F(times_1_4)},
        {0, F(times_2_1), F(times_2_2), F(times_2_3)}};
    const ptrdiff_t pairs = (n + 15) / 32;  /* of tiles of rows; then one may be left */
    sides s[2];
    for (int v = 0; v < vectors && pairs;) {
        int together = vectors - v == 4 ? 2 : vectors - v;
        for (ptrdiff_t r = 0; r < pairs; r++) {
            for (int q = 0; q < parts; q++) {
                s[q] = p[q];
                s[q].a += 32 * r * p[q].a_row, s[q].b += v / 2 * p[q].b_half;
            }
            shapes[1][together](parts, s, from + 32 * r * from_row + 64 * v, from_row,
                                (F(row4) *)&sums[32 * r][v]);
        }
        v += together;
    }
    if (n > 32 * pairs) {
        for (int q = 0; q < parts; q++) s[q] = p[q], s[q].a += 32 * pairs * p[q].a_row;
        shapes[0][vectors](parts, s, from + 32 * pairs * from_row, from_row, sums + 32 * pairs);
    }
}

enum { F(MOST) = 16, F(PIECE) = 12 };  /* blocks that need not be cut, and those of a piece */

/* The same by pieces of which both sides stay in the first-level cache: 17 % faster at K = 640 to 1,408,
   no faster at 512, where sums go to memory and back more often than that. */
static void F(times_long)(ptrdiff_t n, int vectors, int parts, const sides *p, const char *from,
                          ptrdiff_t from_row, F(row4) *sums) {
    const int at_once = p[0].blocks + (parts > 1 ? p[1].blocks : 0) <= F(MOST);
    IN_ORDER;
    if (at_once) F(times)(n, vectors, parts, p, from, from_row, sums);
    for (; !at_once && parts > 0; parts--, p++) {
        const ptrdiff_t pieces = p->blocks <= F(MOST) ? 1 : (p->blocks + F(PIECE) - 1) / F(PIECE);
        for (ptrdiff_t q = 0; q < pieces; q++) {
            const ptrdiff_t first = p->blocks * q / pieces;
            sides s = *p;
            s.blocks = p->blocks * (q + 1) / pieces - first;
            s.a += first * p->a_block, s.b += first * p->b_block;
            F(times)(n, vectors, 1, &s, from, from_row, sums);
            from = (const char *)sums, from_row = sizeof(F(row4));
        }
    }
    IN_ORDER;
}

#if TRAINS
/* sums += the products of n > GROUP - 16 rows with four vectors, by pieces.  Meanwhile the panel `ahead` comes
   into the second-level cache: a block is passed over 8 times, each time for 8 lines, a block of that one. */
static void F(times_ahead)(const sides *p, const char *ahead, F(row4) *sums_) {
    const ptrdiff_t pieces = (p->blocks + F(PIECE) - 1) / F(PIECE);
    const ptrdiff_t from_row = sizeof(F(row4));
    IN_ORDER;
    for (ptrdiff_t piece = 0; piece < pieces; piece++)
        for (int pass = 0; pass < 8; pass++) {
            const ptrdiff_t first = p->blocks * piece / pieces, last = p->blocks * (piece + 1) / pieces;
            const char *a = p->a + first * p->a_block + 32 * (pass % 4) * p->a_row;
            const char *b = p->b + first * p->b_block + pass / 4 * p->b_half;
            F(row4) *sums = (F(row4) *)&sums_[32 * (pass % 4)][2 * (pass / 4)];
            const char *from = (const char *)sums;
            FROM_2_2
            for (ptrdiff_t q = first; q < last; q++, a += p->a_block, b += p->b_block) {
                BLOCK_2_2
                for (int line = 0; line < 8; line++, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
            }
            TO_2_2
        }
    IN_ORDER;
}
#endif

#undef A
#undef B
#undef HALF
#undef FROM
#undef TO
#undef TIMES
#undef FROM_2_2
#undef BLOCK_2_2
#undef TO_2_2

/* n rows, and a panel of K numbers k. */
INLINE sides F(sides_of)(ptrdiff_t n, const LEFT *const *a, ptrdiff_t K, const PACKED *panel, int nv) {
    const int g = NEIGHBORS(nv);
    return (sides){(K + WHOLE - 1) / WHOLE, (const char *)a[0],
                   n > 1 ? (const char *)a[1] - (const char *)a[0] : 0, 64, (const char *)panel, 1024 * g,
                   AT(K, nv, g % nv, 0) * (ptrdiff_t)sizeof(PACKED)};
}

#if TRAINS

/* acc[r] += a[r] · panel for n <= GROUP rows. */
static void F(group)(ptrdiff_t n, ptrdiff_t K, int nv, const LEFT *const *a, const PACKED *panel,
                     const PACKED *next, F(row4) *acc) {
    (void)next;
    if (K == 0) return;
    sides s = F(sides_of)(n, a, K, panel, nv);
    F(times_long)(n, nv, 1, &s, (const char *)acc, sizeof(F(row4)), acc);
}

/* acc[r] += x[r] · ih + h[r] · hh, one after the other: the sums stay in tiles meanwhile. */
#define JOINS
#define STAYS(bytes) ((bytes) <= 1 << 21)  /* the second-level cache has 2 MB on every CPU with tiles */
static void F(joined_group)(ptrdiff_t n, ptrdiff_t I, ptrdiff_t K, int nv, const LEFT *const *x,
                            const LEFT *const *h, const PACKED *ih, const PACKED *hh, const PACKED *next,
                            F(row4) *acc) {
    sides s[2] = {F(sides_of)(n, x, I, ih, nv), F(sides_of)(n, h, K, hh, nv)};
    /* -7 % at (50,128,1024,1024); with 64 rows a block would fetch twice as many lines: +10 to 20 % */
    if (next && n > GROUP - 16 && nv == 4 && MIN(s[0].blocks, s[1].blocks) > F(MOST)) {
        F(times_ahead)(&s[0], (const char *)hh, acc);
        F(times_ahead)(&s[1], (const char *)next, acc);
        return;
    }
    F(times_long)(n, nv, 2, s, (const char *)acc, sizeof(F(row4)), acc);
}

/* acc = a panel for 16 rows, of which `a` holds blocks of k one after the other. */
INLINE void F(packed_tile)(int nv, ptrdiff_t K, const LEFT *a, const PACKED *panel, F(row4) *acc) {
    sides s = F(sides_of)(1, &a, K, panel, nv);
    s.a_row = 64, s.a_block = 1024;
    for (int r = 0; r < MR; r++)
        for (int v = 0; v < nv; v++) acc[r][v] = F(v_set1)(0);
    F(times_long)(MR, nv, 1, &s, (const char *)acc, sizeof(F(row4)), acc);
}

#else

static void F(group)(ptrdiff_t n, ptrdiff_t K, int nv, const LEFT *const *a, const PACKED *panel,
                     const PACKED *next, F(row4) *acc) {
    F(row4) sums[GROUP];
    if (!BY_TILES(n, K)) {
        F(register_group)(n, K, nv, a, panel, next, acc);
        return;
    }
    for (ptrdiff_t k0 = 0; k0 < K; k0 += KC) {
        ptrdiff_t kn = MIN(KC, K - k0);
        const PACKED *block = F(block_at)(panel, nv, k0);
        sides s = F(sides_of)(n, a, kn, block + 64 * nv, nv);
        s.a += (HEAD + k0 / STEP) * (ptrdiff_t)sizeof(LEFT);
        F(times_long)(n, nv, 1, &s, (const char *)block, 0, sums);
        F(add_scaled)(n, nv, a, panel, (const F(row4) *)sums, acc);
    }
}

#endif

#undef sides
