/* format_int8.h: products of 8-bit integers, with exact sums: for inference.

   W is of integers q_w with a scale for each column.  A row is lowered to integers q_a with a scale of its
   own, and a product adds to what a column holds

       fma(Σ_k q_w q_a, scale_w scale_a, ·),   scale_a = max|a| / 127,   q_a = rint(a (127 / max|a|))

   once for KC numbers k: so far an int32 holds every sum exactly, whatever instructions compute it.
   Rows below 2^-100 are zero; one with nan or inf has the scale nan, which all that reads it becomes.

   Packed, a panel is the scales of its columns; then, for each block of KC, with VNNI what its sums start
   from, and STEP numbers k of each lane together:
       VNNI, 4 bytes a step: it multiplies unsigned by signed bytes, so rows are q_a + 128, and sums start
           from -128 Σ q_w
       NEON's dot product, 4 bytes a step, both signed
       AVX2 and AVX-512 without it, 2 a step: bytes are widened, rows are of int16
       others: 1 a step, rows of int32 */

#define PACKED int8_t
#define PACKED_NUMBERS 1
#define LEFT int32_t    /* a row: its scale, then from HEAD on a word for each step */
#define KC 65536
#define LOWERS 1
#define TRAINS 0
#define TILE_MODE_BEGIN
#define TILE_MODE_END
#if defined(ISA_VNNI) || defined(ISA_NEON_DOT)
#define STEP 4
#elif defined(ISA_AVX512) || defined(ISA_AVX2)
#define STEP 2
#else
#define STEP 1
#endif
#ifdef ISA_AMX
#define HEAD 16
#define WHOLE 64        /* numbers k: a packed block is filled up to a multiple of it */
#else
#define HEAD 1
#define WHOLE STEP
#endif
#ifdef ISA_VNNI
#define ZERO 128        /* what stands for zero in a row */
#else
#define ZERO 0
#endif

#if defined(ISA_AVX512)
INLINE vec F(v_number)(ivec a) { return (vec)_mm512_cvtepi32_ps((__m512i)a); }
#elif defined(ISA_AVX2)
INLINE vec F(v_number)(ivec a) { return (vec)_mm256_cvtepi32_ps((__m256i)a); }
#elif defined(ISA_NEON)
INLINE vec F(v_number)(ivec a) { return (vec)vcvtq_f32_s32((int32x4_t)a); }
#else
INLINE vec F(v_number)(ivec a) {
    int32_t in[VECTOR_BYTES / sizeof(R)];
    R out[VECTOR_BYTES / sizeof(R)];
    memcpy(in, &a, sizeof in);
    for (ptrdiff_t l = 0; l < VL; l++) out[l] = (R)in[l];
    return F(v_load)(out);
}
#endif

/* One step of a vector: c + what the lanes of the word x, the same in each lane, and w multiply to. */
INLINE ivec F(v_dot)(ivec c, ivec x, ivec w) {
#if defined(ISA_VNNI) && defined(ISA_AVX512)
    return (ivec)_mm512_dpbusd_epi32((__m512i)c, (__m512i)x, (__m512i)w);
#elif defined(ISA_VNNI)
    return (ivec)_mm256_dpbusd_avx_epi32((__m256i)c, (__m256i)x, (__m256i)w);
#elif defined(ISA_NEON_DOT)
    return (ivec)vdotq_s32((int32x4_t)c, (int8x16_t)x, (int8x16_t)w);
#elif defined(ISA_AVX512)
    return c + (ivec)_mm512_madd_epi16((__m512i)x, (__m512i)w);
#elif defined(ISA_AVX2)
    return c + (ivec)_mm256_madd_epi16((__m256i)x, (__m256i)w);
#else
    return c + x * w;
#endif
}

/* A step of a packed vector, as v_dot takes it. */
INLINE ivec F(v_step)(const PACKED *p) {
#if defined(ISA_VNNI) || defined(ISA_NEON_DOT)
    return (ivec)F(v_bits)(F(v_load)((const R *)(const void *)p));
#elif defined(ISA_AVX512)
    return (ivec)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(const void *)p));
#elif defined(ISA_AVX2)
    return (ivec)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)p));
#else
    int32_t lanes[VECTOR_BYTES / sizeof(R)];
    ivec w;
    for (ptrdiff_t l = 0; l < VL; l++) lanes[l] = p[l];
    memcpy(&w, lanes, sizeof w);
    return w;
#endif
}

INLINE ivec F(v_words)(int32_t word) {
#if defined(ISA_AVX512)
    return (ivec)_mm512_set1_epi32(word);
#elif defined(ISA_AVX2)
    return (ivec)_mm256_set1_epi32(word);
#elif defined(__GNUC__)
    return word - (ivec){0};
#else
    return word;
#endif
}

/* ---- where things lie ---- */

/* Bytes of the block of K <= KC numbers of a vector: what its sums start from, then the numbers. */
INLINE ptrdiff_t F(block_bytes)(ptrdiff_t K) {
    return VL * ((ZERO ? (ptrdiff_t)sizeof(int32_t) : 0) + (K + WHOLE - 1) / WHOLE * WHOLE);
}

static ptrdiff_t F(vector_bytes)(ptrdiff_t K) {
    return VL * (ptrdiff_t)sizeof(R) + K / KC * F(block_bytes)(KC) + (K % KC ? F(block_bytes)(K % KC) : 0);
}

/* The block that begins at k0 in a panel of nv vectors. */
INLINE PACKED *F(block_at)(const PACKED *panel, int nv, ptrdiff_t k0) {
    return (PACKED *)panel + nv * (VL * (ptrdiff_t)sizeof(R) + k0 / KC * F(block_bytes)(KC));
}

/* A lowered row is written by whole vectors. */
static ptrdiff_t F(lowered_bytes)(ptrdiff_t K) {
    ptrdiff_t whole = MAX(WHOLE, VL);
    return HEAD * (ptrdiff_t)sizeof(LEFT) + (K + whole - 1) / whole * whole * (ptrdiff_t)sizeof(LEFT) / STEP;
}

/* Where the step of k of vector v lies in a block of K numbers of a panel of nv vectors. */
#ifdef ISA_AMX
#define AT(K, nv, v, k) AMX_AT(((K) + WHOLE - 1) / WHOLE * WHOLE, nv, v, k, 4)
#else
#define AT(K, nv, v, k) (((k) / STEP * (nv) + (v)) * VL * STEP)
#endif

/* ---- packing and lowering ---- */

INLINE void F(pack_vector)(const lstm_operand *w, ptrdiff_t column, ptrdiff_t n, int nv, int v,
                           PACKED *panel) {
    const int8_t *W = (const int8_t *)w->W + column * w->col_stride;
    F(v_store)((R *)(void *)panel + v * VL, F(v_load_n)((const R *)w->scales + column, n));
    for (ptrdiff_t k0 = 0; k0 < w->K; k0 += KC) {
        ptrdiff_t K = MIN(KC, w->K - k0);
        PACKED *out = F(block_at)(panel, nv, k0);
#if ZERO
        int32_t *start = (int32_t *)(void *)out + v * VL;
        memset(start, 0, VL * sizeof *start);
        out += nv * VL * sizeof *start;
#endif
        for (ptrdiff_t k = 0; k < (K + WHOLE - 1) / WHOLE * WHOLE; k += STEP)
            for (ptrdiff_t l = 0; l < VL; l++)
                for (ptrdiff_t s = 0; s < STEP; s++) {
                    int8_t q = l < n && k + s < K
                                   ? W[(k0 + k + s) * w->k_stride + l * w->col_stride] : 0;
                    out[AT(K, nv, v, k) + l * STEP + s] = q;
#if ZERO
                    start[l] -= ZERO * q;
#endif
                }
    }
}

/* Writes the integers of a vector as words of STEP numbers have them. */
INLINE void F(narrow)(char *row, bits q) {
#if defined(ISA_AVX512) && STEP == 4
    _mm_storeu_si128((__m128i *)(void *)row, _mm512_cvtepi32_epi8((__m512i)q));
#elif defined(ISA_AVX512)
    _mm256_storeu_si256((__m256i *)(void *)row, _mm512_cvtepi32_epi16((__m512i)q));
#elif defined(ISA_AVX2)
    __m128i low = _mm256_castsi256_si128((__m256i)q), high = _mm256_extracti128_si256((__m256i)q, 1);
    __m128i halves = _mm_packs_epi32(low, high);
#if STEP == 4
    _mm_storel_epi64((__m128i *)(void *)row, _mm_packus_epi16(halves, halves));
#else
    _mm_storeu_si128((__m128i *)(void *)row, halves);
#endif
#else
    uint32_t lanes[VECTOR_BYTES / sizeof(R)];
    memcpy(lanes, &q, sizeof lanes);
#if STEP == 4
    for (ptrdiff_t l = 0; l < VL; l++) row[l] = (char)lanes[l];
#else
    memcpy(row, lanes, sizeof lanes);
#endif
#endif
}

/* The largest lane of a, none below zero; nan if a lane of `bad` is, the others of which are zero. */
INLINE R F(v_most)(vec a, vec bad) {
    R lanes[VECTOR_BYTES / sizeof(R)];
    EACH(q, 4) {    /* 16 lanes at most */
        const int by = VL >> (q + 1);
        if (by) a = v_max(a, F(v_rotate)(a, by)), bad += F(v_rotate)(bad, by);
    }
    F(v_store)(lanes, a + bad);
    return lanes[0];
}

static void F(lower)(ptrdiff_t K, const void *a_, void *row_) {
    const R *a = a_;
    char *row = (char *)row_ + HEAD * sizeof(LEFT);
    vec most = F(v_set1)(0), bad = most;
    for (ptrdiff_t k = 0; k < K; k += VL) {
        vec x = F(v_load_n)(a + k, MIN(VL, K - k));
        most = v_max(most, F(v_abs)(x));
        bad += x - x;               /* nan if x is nan or inf */
    }
    const R top = F(v_most)(most, bad);
    const int fit = top == top, counts = top >= 0x1p-100f;
    R scale = counts ? top / 127 : fit ? 0 : top, inverse = counts ? 127 / top : 0;
    memcpy(row_, &scale, sizeof scale);
    for (ptrdiff_t k = 0; k < K; k += VL, row += VL * sizeof(LEFT) / STEP) {
        /* adding 1.5·2^23 rounds to an integer, which then stands in the low bits */
        vec x = fit ? F(v_load_n)(a + k, MIN(VL, K - k)) * inverse : F(v_set1)(0);
        F(narrow)(row, F(v_bits)(x + 12582912.0f) - 0x4B400000u + ZERO);
    }
}

/* out[r][v] = fma(Σ_k q_a[r][k] q_w[k][v], scale_a[r] scale_w[v], out[r][v]) over K <= KC numbers k from k0
   on; see format_float.h. */
INLINE void F(tile)(const int mr, const int nv, const ptrdiff_t step, ptrdiff_t k0, ptrdiff_t K,
                    const LEFT *const *rows, const PACKED *restrict panel, uintptr_t ahead,
                    F(row4) *restrict out) {
    const R *scales = (const R *)(const void *)panel;
    (void)step;
    panel = F(block_at)(panel, nv, k0);
    for (int first = 0; first < nv; first += AT_ONCE(mr)) {
        const int n = MIN(AT_ONCE(mr), nv - first);
        const PACKED *restrict p = panel;
        const LEFT *a[MR];
        ivec acc[MR][4];
        EACH(r, mr) a[r] = rows[r] + HEAD + k0 / STEP;
        EACH(v, n) {
#if ZERO
            const PACKED *starts = panel + (first + v) * VL * (ptrdiff_t)sizeof(int32_t);
            ivec start = (ivec)F(v_bits)(F(v_load)((const R *)(const void *)starts));
#else
            ivec start = F(v_words)(0);
#endif
            EACH(r, mr) acc[r][v] = start;
        }
#if ZERO
        p += nv * VL * (ptrdiff_t)sizeof(int32_t);
#endif
        for (ptrdiff_t q = 0; q < (K + STEP - 1) / STEP; q++, ahead += 64) {
            ivec w[4];
            PREFETCH(ahead);
            EACH(v, n) w[v] = F(v_step)(p + AT(K, nv, first + v, q * STEP));
            EACH(r, mr) {
                ivec x = F(v_words)(a[r][q]);
                EACH(v, n) acc[r][v] = F(v_dot)(acc[r][v], x, w[v]);
            }
        }
        EACH(r, mr) {
            R scale_a;
            memcpy(&scale_a, rows[r], sizeof scale_a);
            EACH(v, n) {
                vec scale = F(v_load)(scales + (first + v) * VL) * scale_a;
                out[r][first + v] = v_fma(F(v_number)(acc[r][v]), scale, out[r][first + v]);
            }
        }
    }
}

#ifdef ISA_AMX

#define DOT(sums, left, panel) _tile_dpbusd(sums, left, panel);
/* A row alone is faster by registers, and so are few short ones: 32 at K = 32, 4 at 128, 2 at 512 took 0.80,
   0.84 and 0.79 of the time, 8 at 128 the same. */
#define BY_TILES(n, K) ((n) > 1 && (n) * (K) > 1024)

/* As the last lines of a tile. */
INLINE void F(add_scaled)(ptrdiff_t n, int nv, const LEFT *const *a, const PACKED *panel,
                          const F(row4) *sums, F(row4) *out) {
    const R *scales = (const R *)(const void *)panel;
    for (ptrdiff_t r = 0; r < n; r++) {
        R scale_a;
        memcpy(&scale_a, a[r], sizeof scale_a);
        for (int v = 0; v < nv; v++) {
            vec scale = F(v_load)(scales + v * VL) * scale_a;
            out[r][v] = v_fma(F(v_number)((ivec)sums[r][v]), scale, out[r][v]);
        }
    }
}

#endif
