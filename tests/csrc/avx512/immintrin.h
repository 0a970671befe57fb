/* immintrin.h: stands before the compiler's own where a CPU without AVX-512 is to run isa_avx512*.c, one
   without AVX-VNNI isa_avxvnni.c, and one without AMX isa_amx.c.

   The file's text is compiled as it is, for AVX2: the compiler splits vectors of 64 bytes, and the few
   _mm512 operations that csrc/simd.h asks for are two of 256 bits or a loop over lanes.  Every one rounds
   as the instruction does, so the bits are those of AVX-512; the speed is not.
   Whoever includes it for another instruction set gets the compiler's header alone.

   A build of it, the Python extension's or any other, needs this folder before the system's and a CPU
   that has AVX2 and answers yes:

       CFLAGS="-I$PWD/tests/csrc/avx512 -D__builtin_cpu_supports(feature)=1" pip install .

   lstmcore.info() then names avx512 among the instruction sets, and LSTMCORE_ISA=avx512 runs it. */

#if defined(ISA_AVX512) || defined(ISA_VNNI)
/* instances.h has asked for more than AVX2: take that back, before the compiler's header sees it. */
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC reset_options
#pragma GCC target("avx2,fma")
#pragma GCC diagnostic ignored "-Wpsabi"  /* no 64-byte vector crosses to another file */
#endif
#endif

#include_next <immintrin.h>

#if (defined(ISA_AVX512) || defined(ISA_VNNI)) && !defined(EMULATED_AVX512)
#define EMULATED_AVX512

#define EMULATED(type) static inline __attribute__((always_inline)) type

typedef float emulated_ps __attribute__((vector_size(64)));
typedef double emulated_pd __attribute__((vector_size(64)));
typedef union { emulated_ps whole; __m256 half[2]; } emulated_halves_ps;
typedef union { emulated_pd whole; __m256d half[2]; } emulated_halves_pd;

#define EMULATED_OPERATIONS(suffix, R, mask_t)                                                       \
    EMULATED(emulated_##suffix)                                                                      \
    emulated_fmadd_##suffix(emulated_##suffix a, emulated_##suffix b, emulated_##suffix c) {         \
        emulated_halves_##suffix x = {a}, y = {b}, z = {c};                                          \
        for (int q = 0; q < 2; q++)                                                                  \
            z.half[q] = _mm256_fmadd_##suffix(x.half[q], y.half[q], z.half[q]);                      \
        return z.whole;                                                                              \
    }                                                                                                \
    EMULATED(emulated_##suffix)                                                                      \
    emulated_min_##suffix(emulated_##suffix a, emulated_##suffix b) {                                \
        emulated_halves_##suffix x = {a}, y = {b};                                                   \
        for (int q = 0; q < 2; q++) x.half[q] = _mm256_min_##suffix(x.half[q], y.half[q]);           \
        return x.whole;                                                                              \
    }                                                                                                \
    EMULATED(emulated_##suffix)                                                                      \
    emulated_max_##suffix(emulated_##suffix a, emulated_##suffix b) {                                \
        emulated_halves_##suffix x = {a}, y = {b};                                                   \
        for (int q = 0; q < 2; q++) x.half[q] = _mm256_max_##suffix(x.half[q], y.half[q]);           \
        return x.whole;                                                                              \
    }                                                                                                \
    EMULATED(emulated_##suffix) emulated_sqrt_##suffix(emulated_##suffix a) {                        \
        emulated_halves_##suffix x = {a};                                                            \
        for (int q = 0; q < 2; q++) x.half[q] = _mm256_sqrt_##suffix(x.half[q]);                     \
        return x.whole;                                                                              \
    }                                                                                                \
    static __attribute__((noinline, unused)) emulated_##suffix                                       \
    emulated_maskz_loadu_##suffix(mask_t mask, const R *p) {                                         \
        emulated_##suffix a = {0};                                                                   \
        for (int l = 0; l < (int)(64 / sizeof(R)); l++)                                              \
            if (mask >> l & 1) a[l] = p[l];                                                          \
        return a;                                                                                    \
    }                                                                                                \
    static __attribute__((noinline, unused)) void                                                    \
    emulated_mask_storeu_##suffix(R *p, mask_t mask, emulated_##suffix a) {                          \
        for (int l = 0; l < (int)(64 / sizeof(R)); l++)                                              \
            if (mask >> l & 1) p[l] = a[l];                                                          \
    }

EMULATED_OPERATIONS(ps, float, __mmask16)
EMULATED_OPERATIONS(pd, double, __mmask8)

#define _mm512_fmadd_ps emulated_fmadd_ps
#define _mm512_fmadd_pd emulated_fmadd_pd
#define _mm512_min_ps emulated_min_ps
#define _mm512_min_pd emulated_min_pd
#define _mm512_max_ps emulated_max_ps
#define _mm512_max_pd emulated_max_pd
#define _mm512_sqrt_ps emulated_sqrt_ps
#define _mm512_sqrt_pd emulated_sqrt_pd
#define _mm512_maskz_loadu_ps emulated_maskz_loadu_ps
#define _mm512_maskz_loadu_pd emulated_maskz_loadu_pd
#define _mm512_mask_storeu_ps emulated_mask_storeu_ps
#define _mm512_mask_storeu_pd emulated_mask_storeu_pd

/* Integers: a loop over lanes each. */
typedef union {
    __m512i whole;
    __m256i half[2];
    int8_t i8[64];
    uint8_t u8[64];
    int16_t i16[32];
    int32_t i32[16];
    uint16_t u16[32];
    uint32_t u32[16];
    uint64_t u64[8];
    float f32[16];
} emulated_numbers;

EMULATED(__m512i) emulated_set1(int32_t a) {
    emulated_numbers x;
    for (int l = 0; l < 16; l++) x.i32[l] = a;
    return x.whole;
}

EMULATED(emulated_ps) emulated_numbers_of(__m512i a) {
    emulated_numbers x = {a}, out;
    for (int l = 0; l < 16; l++) out.f32[l] = (float)x.i32[l];
    return (emulated_ps)out.whole;
}

EMULATED(__m512i) emulated_madd(__m512i a, __m512i b) {
    emulated_numbers x = {a}, y = {b};
    for (int q = 0; q < 2; q++) x.half[q] = _mm256_madd_epi16(x.half[q], y.half[q]);
    return x.whole;
}

EMULATED(__m512i) emulated_widen(__m256i a) {
    emulated_numbers out;
    out.half[0] = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(a));
    out.half[1] = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(a, 1));
    return out.whole;
}

EMULATED(__m128i) emulated_bytes(__m512i a) {
    emulated_numbers x = {a}, out = {0};
    for (int l = 0; l < 16; l++) out.u8[l] = (uint8_t)x.u32[l];
    return _mm256_castsi256_si128(out.half[0]);
}

EMULATED(__m256i) emulated_shorts(__m512i a) {
    emulated_numbers x = {a}, out = {0};
    for (int l = 0; l < 16; l++) out.i16[l] = (int16_t)x.u32[l];
    return out.half[0];
}

/* Of each four words the last two in the place of the first two too. */
EMULATED(__m512i) emulated_last_two(__m512i a) {
    emulated_numbers x = {a}, out;
    for (int l = 0; l < 16; l++) out.u32[l] = x.u32[l | 2];
    return out.whole;
}

static __attribute__((noinline, unused)) void emulated_store_those(void *p, __mmask16 mask, __m512i a) {
    emulated_numbers x = {a};
    for (int l = 0; l < 16; l++)
        if (mask >> l & 1) __builtin_memcpy(p, &x.u32[l], 4), p = (char *)p + 4;
}

/* To bfloat16, to nearest, ties to even; what is below the smallest normal number is zero. */
EMULATED(__m256i) emulated_bfloat16(emulated_ps a) {
    emulated_numbers x = {(__m512i)a}, out = {0};
    for (int l = 0; l < 16; l++) {
        uint32_t b = x.u32[l], size = b & 0x7FFFFFFF;
        if (size < 0x800000) b &= 0x80000000;
        out.u16[l] = (uint16_t)(size > 0x7F800000 ? b >> 16 | 0x40 : (b + 0x7FFF + (b >> 16 & 1)) >> 16);
    }
    return out.half[0];
}

EMULATED(__m512i) emulated_words(__m256i a) {
    emulated_numbers x = {0}, out;
    x.half[0] = a;
    for (int l = 0; l < 16; l++) out.u32[l] = x.u16[l];
    return out.whole;
}

/* Four unsigned bytes times four signed ones, added to each of the lanes. */
EMULATED(__m256i) emulated_dot_256(__m256i c, __m256i a, __m256i b) {
    emulated_numbers x = {0}, y = {0}, sum = {0};
    x.half[0] = a, y.half[0] = b, sum.half[0] = c;
    for (int l = 0; l < 32; l++) sum.u32[l / 4] += (uint32_t)(x.u8[l] * y.i8[l]);
    return sum.half[0];
}

EMULATED(__m512i) emulated_dot(__m512i c, __m512i a, __m512i b) {
    emulated_numbers x = {a}, y = {b}, sum = {c};
    for (int q = 0; q < 2; q++) sum.half[q] = emulated_dot_256(sum.half[q], x.half[q], y.half[q]);
    return sum.whole;
}

/* What is below the smallest normal number is zero, and keeps its sign. */
EMULATED(__m256) emulated_flushed(__m256 a) {
    __m256 sign = _mm256_set1_ps(-0.0f), least = _mm256_set1_ps(0x1p-126f);
    __m256 tiny = _mm256_cmp_ps(_mm256_andnot_ps(sign, a), least, _CMP_LT_OQ);
    return _mm256_blendv_ps(a, _mm256_and_ps(a, sign), tiny);
}

/* Of each word the high number is multiplied and added first. */
EMULATED(__m512) emulated_pairs(__m512 c, __m512i a, __m512i b) {
    emulated_numbers x = {a}, y = {b};
    emulated_halves_ps sum = {(emulated_ps)c};
    const __m256i high = _mm256_set1_epi32((int)0xFFFF0000u);
    for (int q = 0; q < 2; q++)
        for (int low = 0; low < 2; low++) {
            __m256i u = low ? _mm256_slli_epi32(x.half[q], 16) : _mm256_and_si256(x.half[q], high);
            __m256i v = low ? _mm256_slli_epi32(y.half[q], 16) : _mm256_and_si256(y.half[q], high);
            sum.half[q] = emulated_flushed(_mm256_fmadd_ps(
                emulated_flushed(_mm256_castsi256_ps(u)), emulated_flushed(_mm256_castsi256_ps(v)),
                emulated_flushed(sum.half[q])));
        }
    return (__m512)sum.whole;
}

#ifdef ISA_AMX
static emulated_numbers emulated_tile[8][16];

EMULATED(void) emulated_load_tile(int tile, const void *p, ptrdiff_t stride) {
    for (int r = 0; r < 16; r++) __builtin_memcpy(&emulated_tile[tile][r], (const char *)p + r * stride, 64);
}

EMULATED(void) emulated_store_tile(int tile, void *p, ptrdiff_t stride) {
    for (int r = 0; r < 16; r++) __builtin_memcpy((char *)p + r * stride, &emulated_tile[tile][r], 64);
}

EMULATED(void) emulated_tile_of_bytes(int sums, int left, int panel) {
    for (int r = 0; r < 16; r++)
        for (int q = 0; q < 16; q++)
            emulated_tile[sums][r].whole = emulated_dot(emulated_tile[sums][r].whole,
                emulated_set1(emulated_tile[left][r].i32[q]), emulated_tile[panel][q].whole);
}

/* Of each row the low numbers of the words are one chain from zero, the high ones another. */
EMULATED(void) emulated_tile_of_pairs(int sums, int left, int panel) {
    for (int r = 0; r < 16; r++) {
        emulated_halves_ps chain[2] = {0}, out = {(emulated_ps)emulated_tile[sums][r].whole};
        for (int q = 0; q < 16; q++)
            for (int h = 0; h < 2; h++)
                for (int high = 0; high < 2; high++) {
                    __m256i u = _mm256_set1_epi32(emulated_tile[left][r].i32[q]);
                    __m256i v = emulated_tile[panel][q].half[h], mask = _mm256_set1_epi32((int)0xFFFF0000u);
                    u = high ? _mm256_and_si256(u, mask) : _mm256_slli_epi32(u, 16);
                    v = high ? _mm256_and_si256(v, mask) : _mm256_slli_epi32(v, 16);
                    chain[high].half[h] = emulated_flushed(_mm256_fmadd_ps(
                        emulated_flushed(_mm256_castsi256_ps(u)), emulated_flushed(_mm256_castsi256_ps(v)),
                        chain[high].half[h]));
                }
        for (int h = 0; h < 2; h++)
            out.half[h] = emulated_flushed(_mm256_add_ps(emulated_flushed(out.half[h]),
                emulated_flushed(_mm256_add_ps(chain[0].half[h], chain[1].half[h]))));
        emulated_tile[sums][r].whole = (__m512i)out.whole;
    }
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbusd
#define _tile_loadconfig(shapes) (void)(shapes)
#define _tile_release() (void)0
#define _tile_loadd emulated_load_tile
#define _tile_stored emulated_store_tile
#define _tile_dpbf16ps emulated_tile_of_pairs
#define _tile_dpbusd emulated_tile_of_bytes
#endif

#define __m512bh __m512i
#define _mm512_dpbf16_ps emulated_pairs
#define _mm512_dpbusd_epi32 emulated_dot
#define _mm256_dpbusd_avx_epi32 emulated_dot_256
#define _mm512_madd_epi16 emulated_madd
#define _mm512_set1_epi32 emulated_set1
#undef _mm512_shuffle_epi32
#define _mm512_shuffle_epi32(a, which) emulated_last_two(a)
#define _mm512_cvtneps_pbh(a) emulated_bfloat16((emulated_ps)(a))
#define _mm512_cvtepu16_epi32 emulated_words
#define _mm512_cvtepi32_ps emulated_numbers_of
#define _mm512_cvtepi8_epi16 emulated_widen
#define _mm512_cvtepi32_epi8 emulated_bytes
#define _mm512_cvtepi32_epi16 emulated_shorts
#define _mm512_mask_compressstoreu_epi32 emulated_store_those

#endif
