/* immintrin.h: stands before the compiler's own where a CPU without AVX-512 is to run isa_avx512.c.

   The file's text is compiled as it is, for AVX2: the compiler splits vectors of 64 bytes, and the few
   _mm512 operations that csrc/simd.h asks for are two of 256 bits or a loop over lanes.  Every one rounds
   as the instruction does, so the bits are those of AVX-512; the speed is not.
   Whoever includes it for another instruction set gets the compiler's header alone.

   A build of it, the Python extension's or any other, needs this folder before the system's and a CPU
   that has AVX2 and answers yes:

       CFLAGS="-I$PWD/tests/csrc/avx512 -D__builtin_cpu_supports(feature)=1" pip install .

   lstmcore.info() then names avx512 among the instruction sets, and LSTMCORE_ISA=avx512 runs it. */

#ifdef ISA_AVX512
/* instances.h has asked for AVX-512: take that back, before the compiler's header sees it. */
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

#if defined(ISA_AVX512) && !defined(EMULATED_AVX512)
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

/* ---- integers, and what VNNI and BF16 add ---- */

typedef union {
    __m512i whole;
    __m256i half[2];
    int32_t words[16];
    uint8_t bytes[64];
    int8_t signed_bytes[64];
} emulated_integers;

EMULATED(__m512i) emulated_set1_epi32(int word) {
    emulated_integers a;
    for (int q = 0; q < 2; q++) a.half[q] = _mm256_set1_epi32(word);
    return a.whole;
}
EMULATED(emulated_ps) emulated_cvtepi32_ps(__m512i a) {
    emulated_integers x = {a};
    emulated_halves_ps out;
    for (int q = 0; q < 2; q++) out.half[q] = _mm256_cvtepi32_ps(x.half[q]);
    return out.whole;
}
EMULATED(__m512i) emulated_cvtepi8_epi16(__m256i a) {
    emulated_integers out;
    out.half[0] = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(a));
    out.half[1] = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(a, 1));
    return out.whole;
}
EMULATED(__m512i) emulated_madd_epi16(__m512i a, __m512i b) {
    emulated_integers x = {a}, y = {b};
    for (int q = 0; q < 2; q++) x.half[q] = _mm256_madd_epi16(x.half[q], y.half[q]);
    return x.whole;
}
EMULATED(__m512i) emulated_or_si512(__m512i a, __m512i b) {
    emulated_integers x = {a}, y = {b};
    for (int q = 0; q < 2; q++) x.half[q] = _mm256_or_si256(x.half[q], y.half[q]);
    return x.whole;
}
EMULATED(__m512i) emulated_srli_epi64(__m512i a, int n) {
    emulated_integers x = {a};
    for (int q = 0; q < 2; q++) x.half[q] = _mm256_srli_epi64(x.half[q], n);
    return x.whole;
}
EMULATED(__m256i) emulated_cvtepi64_epi32(__m512i a) {
    emulated_integers x = {a}, out;
    for (int l = 0; l < 8; l++) out.words[l] = x.words[2 * l];
    return out.half[0];
}
EMULATED(__m256i) emulated_cvtepi32_epi16(__m512i a) {
    emulated_integers x = {a};
    union { __m256i whole; int16_t lanes[16]; } out;
    for (int l = 0; l < 16; l++) out.lanes[l] = (int16_t)x.words[l];
    return out.whole;
}
EMULATED(__m128i) emulated_cvtepi32_epi8(__m512i a) {
    emulated_integers x = {a};
    union { __m128i whole; int8_t lanes[16]; } out;
    for (int l = 0; l < 16; l++) out.lanes[l] = (int8_t)x.words[l];
    return out.whole;
}
EMULATED(void) emulated_mask_storeu_epi32(void *p, __mmask8 mask, __m256i a) {
    union { __m256i whole; int32_t lanes[8]; } x = {a};
    for (int l = 0; l < 8; l++)
        if (mask >> l & 1) ((int32_t *)p)[l] = x.lanes[l];
}
EMULATED(__m512i) emulated_dpbusd_epi32(__m512i c, __m512i a, __m512i b) {
    emulated_integers sums = {c}, x = {a}, y = {b};
    for (int l = 0; l < 64; l++) sums.words[l / 4] += x.bytes[l] * y.signed_bytes[l];
    return sums.whole;
}
/* Two chained multiply-adds, the high halves first; what is below normal numbers counts as 0. */
static __attribute__((noinline, unused)) __m512 emulated_dpbf16_ps(__m512 c, __m512bh a, __m512bh b) {
    union { __m512 whole; __m256 half[2]; } sums = {c};
    emulated_integers x, y;
    memcpy(&x, &a, sizeof x), memcpy(&y, &b, sizeof y);
    unsigned mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040);
    const __m256i high = _mm256_set1_epi32((int)0xFFFF0000u);
    for (int q = 0; q < 2; q++) {
        sums.half[q] = _mm256_fmadd_ps((__m256)_mm256_and_si256(x.half[q], high),
                                       (__m256)_mm256_and_si256(y.half[q], high), sums.half[q]);
        sums.half[q] = _mm256_fmadd_ps((__m256)_mm256_slli_epi32(x.half[q], 16),
                                       (__m256)_mm256_slli_epi32(y.half[q], 16), sums.half[q]);
    }
    _mm_setcsr(mode);
    return sums.whole;
}

#define _mm512_set1_epi32 emulated_set1_epi32
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#define _mm512_cvtepi8_epi16 emulated_cvtepi8_epi16
#define _mm512_madd_epi16 emulated_madd_epi16
#define _mm512_or_si512 emulated_or_si512
#define _mm512_srli_epi64 emulated_srli_epi64
#define _mm512_cvtepi64_epi32 emulated_cvtepi64_epi32
#define _mm512_cvtepi32_epi16 emulated_cvtepi32_epi16
#define _mm512_cvtepi32_epi8 emulated_cvtepi32_epi8
#define _mm256_mask_storeu_epi32 emulated_mask_storeu_epi32
#define _mm512_dpbusd_epi32 emulated_dpbusd_epi32
#define _mm512_dpbf16_ps emulated_dpbf16_ps

#endif
