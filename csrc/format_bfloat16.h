/* format_bfloat16.h: products of float32 numbers rounded to bfloat16, with float32 sums.

   The operands are rounded to nearest, ties to even, when packed or lowered.  A product of two of them is
   exact in float32, and each sum is one chain of multiply-adds over k in ascending order: its bits are
   those of the float32 kernels on rounded operands, on every instruction set.  But numbers below the
   smallest normal one count as zero, as in the instruction that multiplies bfloat16: the others flush
   them meanwhile.

   Packed, a word holds two numbers: k in its high half, k+1 in its low half, the order in which that
   instruction adds; the last one of an odd K is zero.  Where there is none, rows are lowered to rounded
   float32 numbers, so that the packed operand alone has to be expanded: 2 loads, a mask and a shift for
   two vectors, beside 2·MR multiply-adds (AVX2: 92 Gop/s of 95, where float32 has 83 to 90). */

#define PACKED uint32_t
#define PACKED_NUMBERS 2
#define STEP 2
#define KC 1024         /* KC·4·VECTOR_BYTES/2 is 128 KB with AVX-512 */
#define LOWERS 1
#define TRAINS 1
#ifdef ISA_BF16
#define LEFT uint32_t
#define LEFT_STEP 1     /* LEFT in a step */
#else
#define LEFT R
#define LEFT_STEP 2
#endif

#if defined(ISA_BF16)
#define TILE_MODE_BEGIN
#define TILE_MODE_END
#elif defined(__SSE__)
#define TILE_MODE_BEGIN unsigned mode = _mm_getcsr(); _mm_setcsr(mode | 0x8040);  /* DAZ, FTZ */
#define TILE_MODE_END _mm_setcsr(mode);
#elif defined(__aarch64__)
#define TILE_MODE_BEGIN                                                                              \
    uint64_t mode;                                                                                   \
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode) : : "memory");                                      \
    __asm__ volatile("msr fpcr, %0" : : "r"(mode | UINT64_C(1) << 24) : "memory");  /* FZ */
#define TILE_MODE_END __asm__ volatile("msr fpcr, %0" : : "r"(mode) : "memory");
#else
#define TILE_MODE_BEGIN
#define TILE_MODE_END
#endif

static ptrdiff_t F(vector_bytes)(ptrdiff_t K) {
    return (K + 1) / 2 * VL * (ptrdiff_t)sizeof(uint32_t);
}

/* A rounded number in the high half of each word, its low half zero; nan stays nan. */
INLINE bits F(v_rounded)(vec a) {
    bits b = F(v_bits)(a), even = b + 0x7FFF + (b >> 16 & 1);
    return F(v_bits)(F(v_select)(a == a, F(v_from_bits)(even), F(v_from_bits)(b | 0x400000))) & 0xFFFF0000u;
}

INLINE void F(pack_step)(PACKED *panel, int nv, int v, ptrdiff_t k, const vec *w) {
    bits pair = F(v_rounded)(w[0]) | F(v_rounded)(w[1]) >> 16;
    F(v_store)((R *)panel + (k / 2 * nv + v) * VL, F(v_from_bits)(pair));
}

#include "pack_floats.h"

static ptrdiff_t F(lowered_bytes)(ptrdiff_t K) { return (K + 1) / 2 * LEFT_STEP * (ptrdiff_t)sizeof(LEFT); }

static void F(lower)(ptrdiff_t K, const void *a_, void *row_) {
    const R *a = a_;
    LEFT *row = row_;
    for (ptrdiff_t k = 0; k < K; k += VL) {
        ptrdiff_t n = MIN(VL, K - k);
        vec x = F(v_from_bits)(F(v_rounded)(F(v_load_n)(a + k, n)));
#ifdef ISA_BF16
        /* neighbors in one word: the even lanes of x | (x one lane on) >> 16 */
        __m512i even = _mm512_or_si512((__m512i)x, _mm512_srli_epi64((__m512i)x, 48));
        _mm256_mask_storeu_epi32(row + k / 2, (__mmask8)((1u << (n + 1) / 2) - 1), _mm512_cvtepi64_epi32(even));
#else
        F(v_store_n)(row + k, x, n);
#endif
    }
#ifndef ISA_BF16
    if (K % 2) row[K] = 0;
#endif
}

INLINE void F(pack_left)(ptrdiff_t K, R *A) {
    for (ptrdiff_t k = 0; k < K * MR; k += VL) {
        ptrdiff_t n = MIN(VL, K * MR - k);
        F(v_store_n)(A + k, F(v_from_bits)(F(v_rounded)(F(v_load_n)(A + k, n))), n);
    }
#ifdef ISA_BF16
    for (ptrdiff_t k = 0; k < K / 2; k++)
        for (ptrdiff_t r = 0; r < MR; r++) {
            uint32_t first, second, pair;
            memcpy(&first, A + 2 * k * MR + r, sizeof first);
            memcpy(&second, A + (2 * k + 1) * MR + r, sizeof second);
            pair = first | second >> 16;
            memcpy(A + k * MR + r, &pair, sizeof pair);
        }
#endif
}

/* As that of format_float.h, over k and k+1 together. */
INLINE void F(tile)(const int mr, const int nv, const ptrdiff_t step, ptrdiff_t k0, ptrdiff_t K,
                    const LEFT *const *rows, const PACKED *restrict panel, uintptr_t ahead,
                    F(row4) *restrict out) {
    for (int first = 0; first < nv; first += AT_ONCE(mr)) {
        const int n = MIN(AT_ONCE(mr), nv - first);
        const PACKED *restrict p = panel + (k0 / 2 * nv + first) * VL;
        const LEFT *a[MR];
        vec acc[MR][4];
        EACH(r, mr) a[r] = rows[r] + k0 / 2 * LEFT_STEP * step;
        EACH(r, mr) EACH(v, n) acc[r][v] = out[r][first + v];
        for (ptrdiff_t q = 0; q < (K + 1) / 2; q++, p += nv * VL, ahead += 64) {
            vec w[4];
            PREFETCH(ahead);
#ifdef ISA_BF16
            EACH(v, n) w[v] = F(v_load)((const R *)p + v * VL);
            EACH(r, mr) {
                __m512bh x = (__m512bh)_mm512_set1_epi32((int)a[r][q * step]);
                EACH(v, n) acc[r][v] = (vec)_mm512_dpbf16_ps((__m512)acc[r][v], x, (__m512bh)w[v]);
            }
#else
            EACH(v, n) w[v] = F(v_from_bits)(F(v_bits)(F(v_load)((const R *)p + v * VL)) & 0xFFFF0000u);
            EACH(r, mr) {
                vec x = F(v_set1)(a[r][2 * q * step]);
                EACH(v, n) acc[r][v] = v_fma(x, w[v], acc[r][v]);
            }
            EACH(v, n) w[v] = F(v_from_bits)(F(v_bits)(F(v_load)((const R *)p + v * VL)) << 16);
            EACH(r, mr) {
                vec x = F(v_set1)(a[r][(2 * q + 1) * step]);
                EACH(v, n) acc[r][v] = v_fma(x, w[v], acc[r][v]);
            }
#endif
        }
        EACH(r, mr) EACH(v, n) out[r][first + v] = acc[r][v];
    }
}
