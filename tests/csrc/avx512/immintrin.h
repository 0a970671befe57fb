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

#endif
