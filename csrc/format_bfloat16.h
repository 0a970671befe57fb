/* format_bfloat16.h: products of float32 numbers rounded to bfloat16, with float32 sums.

   The operands are rounded to nearest, ties to even, when packed or lowered; a product of two of them is
   exact in float32.  A sum goes by blocks of 32 numbers k: the even ones of a block are one chain of
   multiply-adds in ascending order, from zero, the odd ones another, and what the sum holds gets

       out += Σ_even + Σ_odd

   where the last block is filled up with zeros.  That is what the AMX instruction does, and blocks keep
   the error of long sums small.  Numbers below the smallest normal one count as zero and become zero, as
   in the instructions that multiply bfloat16: the others flush them meanwhile.  So the bits are the same
   on every instruction set.

   Packed, a word holds two numbers.
       AMX: k in its low half, k+1 in its high half, whole blocks of them; see amx.h
       AVX512_BF16: k in its high half, k+2 in its low half, the order in which that instruction adds;
           then a word of k+1 and k+3
       others: k in its high half, k+1 in its low half.  Rows are lowered to rounded float32 numbers, so
           that the packed operand alone has to be expanded */

#define PACKED uint32_t
#define PACKED_NUMBERS 2
#define BLOCK 32        /* numbers k: a block of a sum */
#define KC 1024         /* KC·4·VECTOR_BYTES/2 is 128 KB with AVX-512 */
#define LOWERS 1
#define TRAINS 1
#if defined(ISA_AMX)
#define STEP 2
#define WHOLE BLOCK     /* numbers k: what is packed and lowered is filled up to a multiple of it */
#undef ROWS
#define ROWS 0          /* a tile of one row takes as long as that of AMX */
#define LEFT uint32_t
#define LEFT_OF(K) ((K) / 2)  /* LEFT of K numbers, a multiple of STEP */
#elif defined(ISA_BF16)
#define STEP 4
#define WHOLE STEP
#define LEFT uint32_t
#define LEFT_OF(K) ((K) / 2)
#else
#define STEP 2
#define WHOLE STEP
#define LEFT R
#define LEFT_OF(K) (K)
#endif

#if defined(ISA_AMX)
#define TILE_MODE_BEGIN
#define TILE_MODE_END
#elif defined(__SSE__) || defined(_M_X64)
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

/* K filled up. */
INLINE ptrdiff_t F(whole)(ptrdiff_t K) { return (K + WHOLE - 1) / WHOLE * WHOLE; }

static ptrdiff_t F(vector_bytes)(ptrdiff_t K) { return F(whole)(K) / 2 * VL * (ptrdiff_t)sizeof(uint32_t); }

static ptrdiff_t F(lowered_bytes)(ptrdiff_t K) { return LEFT_OF(F(whole)(K)) * (ptrdiff_t)sizeof(LEFT); }

/* A rounded number in the high half of each word, its low half zero; nan stays nan. */
INLINE bits F(v_rounded)(vec a) {
    bits b = F(v_bits)(a), even = b + 0x7FFF + (b >> 16 & 1);
    return F(v_bits)(F(v_select)(a == a, F(v_from_bits)(even), F(v_from_bits)(b | 0x400000))) & 0xFFFF0000u;
}

#ifdef ISA_AMX
/* Rounded, a in the low half of each word and b in the high half. */
INLINE vec F(v_pair)(vec a, vec b) {
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)a));
    __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)b));
    return F(v_from_bits)((bits)low | (bits)high << 16);
}
#endif

/* Where the word of k of vector v lies in a panel of nv vectors of K numbers. */
#ifdef ISA_AMX
#define AT(K, nv, v, k) AMX_AT(F(whole)(K), nv, v, k, 2)
#else
#define AT(K, nv, v, k) (((k) / 2 * (nv) + (v)) * VL)
#endif

INLINE void F(pack_step)(PACKED *panel, ptrdiff_t K, int nv, int v, ptrdiff_t k, const vec *w) {
    R *out = (R *)panel + AT(K, nv, v, k);
    (void)K;
#if defined(ISA_AMX)
    F(v_store)(out, F(v_pair)(w[0], w[1]));
#elif defined(ISA_BF16)
    F(v_store)(out, F(v_from_bits)(F(v_rounded)(w[0]) | F(v_rounded)(w[2]) >> 16));
    F(v_store)(out + nv * VL, F(v_from_bits)(F(v_rounded)(w[1]) | F(v_rounded)(w[3]) >> 16));
#else
    F(v_store)(out, F(v_from_bits)(F(v_rounded)(w[0]) | F(v_rounded)(w[1]) >> 16));
#endif
}

#include "pack_floats.h"

static void F(lower)(ptrdiff_t K, const void *a_, void *row_) {
    const R *a = a_;
    LEFT *row = row_;
#if defined(ISA_AMX)
    for (ptrdiff_t k = 0; k < F(whole)(K); k += VL) {
        vec x = k < K ? F(v_load_n)(a + k, MIN(VL, K - k)) : F(v_set1)(0);
        _mm256_storeu_si256((__m256i *)(void *)(row + k / 2), (__m256i)_mm512_cvtneps_pbh((__m512)x));
    }
#elif defined(ISA_BF16)
    for (ptrdiff_t k = 0; k < K; k += VL) {
        bits x = F(v_rounded)(F(v_load_n)(a + k, MIN(VL, K - k)));
        ptrdiff_t words = F(whole)(MIN(VL, K - k)) / 2;
        /* of each four, the first two get the halves of the last two */
        x |= (bits)_mm512_shuffle_epi32((__m512i)x, 0xEE) >> 16;
        _mm512_mask_compressstoreu_epi32(row + k / 2, (__mmask16)(0x3333 & ((1u << 2 * words) - 1)),
                                         (__m512i)x);
    }
#else
    for (ptrdiff_t k = 0; k < K; k += VL) {
        ptrdiff_t n = MIN(VL, K - k);
        F(v_store_n)(row + k, F(v_from_bits)(F(v_rounded)(F(v_load_n)(a + k, n))), n);
    }
    if (K % 2) row[K] = 0;
#endif
}

/* As that of format_float.h, of K filled-up numbers. */
INLINE void F(pack_left)(ptrdiff_t K, R *A) {
#if defined(ISA_AMX)
    uint32_t *out = (uint32_t *)(void *)A;
    for (ptrdiff_t k = 0; k < K; k += BLOCK, A += BLOCK * MR, out += BLOCK / 2 * MR) {
        vec pairs[BLOCK / 2];
        for (int q = 0; q < BLOCK / 2; q++)
            pairs[q] = F(v_pair)(F(v_load)(A + 2 * q * MR), F(v_load)(A + (2 * q + 1) * MR));
        F(turn)(pairs);
        for (int r = 0; r < MR; r++) F(v_store)((R *)(void *)out + r * (BLOCK / 2), pairs[r]);
    }
#else
    for (ptrdiff_t k = 0; k < K * MR; k += VL) {
        ptrdiff_t n = MIN(VL, K * MR - k);
        F(v_store_n)(A + k, F(v_from_bits)(F(v_rounded)(F(v_load_n)(A + k, n))), n);
    }
#endif
#ifdef ISA_BF16
    for (ptrdiff_t k = 0; k < K; k += 4)
        for (ptrdiff_t r = 0; r < MR; r++) {
            uint32_t x[4];
            for (int s = 0; s < 4; s++) memcpy(&x[s], A + (k + s) * MR + r, sizeof x[s]);
            x[0] |= x[2] >> 16, x[1] |= x[3] >> 16;
            memcpy(A + k / 2 * MR + r, &x[0], sizeof x[0]);
            memcpy(A + (k / 2 + 1) * MR + r, &x[1], sizeof x[1]);
        }
#endif
}

#ifdef ISA_AMX

#define DOT(sums, left, panel) _tile_dpbf16ps(sums, left, panel);
#define BY_TILES(n, K) 1

#else

/* acc = the chain over the even (odd = 0) or the odd ones of a block of K numbers. */
INLINE void F(chain)(const int mr, const int n, const int nv, const int odd, const ptrdiff_t step,
                     ptrdiff_t K, const LEFT *const *a, const PACKED *restrict p, vec (*restrict acc)[4]) {
    EACH(r, mr) EACH(v, n) acc[r][v] = F(v_set1)(0);
    for (ptrdiff_t q = 0; q < (K + STEP - 1) / STEP; q++) {
        vec w[4];
#ifdef ISA_BF16
        EACH(v, n) w[v] = F(v_load)((const R *)p + ((2 * q + odd) * nv + v) * VL);
        EACH(r, mr) {
            __m512bh x = (__m512bh)_mm512_set1_epi32((int)a[r][(2 * q + odd) * step]);
            EACH(v, n) acc[r][v] = (vec)_mm512_dpbf16_ps((__m512)acc[r][v], x, (__m512bh)w[v]);
        }
#else
        EACH(v, n) {
            bits pair = F(v_bits)(F(v_load)((const R *)p + (q * nv + v) * VL));
            w[v] = F(v_from_bits)(odd ? pair << 16 : pair & 0xFFFF0000u);
        }
        EACH(r, mr) {
            vec x = F(v_set1)(a[r][(2 * q + odd) * step]);
            EACH(v, n) acc[r][v] = v_fma(x, w[v], acc[r][v]);
        }
#endif
    }
    if (K < BLOCK - !odd)  /* the zeros that fill it up make +0 of -0 */
        EACH(r, mr) EACH(v, n) acc[r][v] += 0;
}

/* As that of format_float.h, by blocks. */
INLINE void F(tile)(const int mr, const int nv, const ptrdiff_t step, ptrdiff_t k0, ptrdiff_t K,
                    const LEFT *const *rows, const PACKED *restrict panel, uintptr_t ahead,
                    F(row4) *restrict out) {
    for (int first = 0; first < nv; first += AT_ONCE(mr)) {
        const int n = MIN(AT_ONCE(mr), nv - first);
        const PACKED *restrict p = panel + AT(K, nv, first, k0);
        const LEFT *a[MR];
        EACH(r, mr) a[r] = rows[r] + LEFT_OF(k0) * step;
        for (ptrdiff_t k = 0; k < K; k += BLOCK, p += BLOCK / 2 * nv * VL) {
            const ptrdiff_t left = MIN(BLOCK, K - k);
            vec even[MR][4], odd[MR][4];
            for (int line = 0; line < BLOCK / 2; line++, ahead += 64) PREFETCH(ahead);
            F(chain)(mr, n, nv, 0, step, left, a, p, even);
            F(chain)(mr, n, nv, 1, step, left, a, p, odd);
            EACH(r, mr) {
                EACH(v, n) out[r][first + v] += even[r][v] + odd[r][v];
                a[r] += LEFT_OF(BLOCK) * step;
            }
        }
    }
}

#endif
