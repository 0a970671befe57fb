/* simd.h: the vector type of one (instruction set, number format), and the few operations that the
   kernels need.

   Included once per format by body.h; the file of the instruction set has defined ISA_AVX512, ISA_AVX2,
   ISA_NEON or ISA_BASE, and instances.h F, DOUBLE and BELOW.  Arithmetic, comparison and shifts are GCC's
   vector extensions; only what these lack (fused multiply-add, min, max, partial load and store) is an
   intrinsic.  A compiler without the extensions gets vectors of one lane. */

#undef R
#undef VL
#undef vec
#undef ivec
#undef bits
#undef int_t
#undef uint_t
#undef v_fma
#undef v_min
#undef v_max

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

#if DOUBLE
#define R double
#define int_t int64_t
#define uint_t uint64_t
#else
#define R float
#define int_t int32_t
#define uint_t uint32_t
#endif
#define vec F(vec)
#define ivec F(ivec)  /* what a comparison gives: all bits of a lane, or none */
#define bits F(bits)  /* without sign, so that no shift overflows */

#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

#if defined(ISA_AVX512) || defined(ISA_AVX2) || defined(ISA_NEON)
#define FUSED           /* a multiply-add is one instruction, with one rounding */
#endif
#if defined(ISA_AVX512)
#define VECTOR_BYTES 64
#define ROWS 6          /* of a register tile, 6 x 4 accumulators + 4 of the panel + 1 broadcast: 29 of 32 registers */
#elif defined(ISA_AVX2)
#define VECTOR_BYTES 32
#define ROWS 6          /* 6 x 2 accumulators + 2 of the panel + 1 broadcast: 15 of 16 registers */
#define AT_ONCE(mr) ((mr) > 3 - BELOW ? 2 : 4)  /* few rows would have too few chains of sums */
#elif defined(ISA_NEON)
#define VECTOR_BYTES 16
#define ROWS 5
#elif defined(__GNUC__)
#define VECTOR_BYTES 16
#define ROWS 2
#else
#define ROWS 2
#endif
#ifdef ISA_AMX
#define MR 16           /* rows that are multiplied at a time */
/* Where the word of k of vector v lies in a panel of K numbers, a multiple of those of a tile: tile after
   tile, of two neighboring vectors together, or of three; words of so many numbers. */
#define NEIGHBORS(nv) ((nv) == 4 ? 2 : (nv))
#define AMX_AT(K, nv, v, k, numbers)                                                                 \
    (((v) / NEIGHBORS(nv) * ((K) / (numbers)) * NEIGHBORS(nv) +                                      \
      (k) / (16 * (numbers)) * 16 * NEIGHBORS(nv) + (v) % NEIGHBORS(nv) * 16 + (k) / (numbers) % 16) * \
     VL * (ptrdiff_t)sizeof(R) / (ptrdiff_t)sizeof(PACKED))
#else
#define MR ROWS
#endif
#ifndef AT_ONCE         /* vectors of a panel that a tile of mr rows takes together */
#define AT_ONCE(mr) 4
#endif

#ifdef __GNUC__
#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
typedef R vec __attribute__((vector_size(VECTOR_BYTES)));
typedef R F(uvec) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(R)), may_alias));
typedef int_t ivec __attribute__((vector_size(VECTOR_BYTES)));
typedef uint_t bits __attribute__((vector_size(VECTOR_BYTES)));
#define VL ((ptrdiff_t)(VECTOR_BYTES / sizeof(R)))
#else
#define INLINE static __inline
#define NOINLINE
#define restrict __restrict
#define VL ((ptrdiff_t)1)
#define VECTOR_BYTES sizeof(R)
typedef R vec;
typedef int_t ivec;
typedef uint_t bits;
#endif

/* fma, and min and max that return the second operand if one is nan */
#if defined(ISA_AVX512) && DOUBLE
#define v_fma(a, b, c) ((vec)_mm512_fmadd_pd(a, b, c))
#define v_min(a, b) ((vec)_mm512_min_pd(a, b))
#define v_max(a, b) ((vec)_mm512_max_pd(a, b))
#elif defined(ISA_AVX512)
#define v_fma(a, b, c) ((vec)_mm512_fmadd_ps(a, b, c))
#define v_min(a, b) ((vec)_mm512_min_ps(a, b))
#define v_max(a, b) ((vec)_mm512_max_ps(a, b))
#elif defined(ISA_AVX2) && DOUBLE
#define v_fma(a, b, c) ((vec)_mm256_fmadd_pd(a, b, c))
#define v_min(a, b) ((vec)_mm256_min_pd(a, b))
#define v_max(a, b) ((vec)_mm256_max_pd(a, b))
#elif defined(ISA_AVX2)
#define v_fma(a, b, c) ((vec)_mm256_fmadd_ps(a, b, c))
#define v_min(a, b) ((vec)_mm256_min_ps(a, b))
#define v_max(a, b) ((vec)_mm256_max_ps(a, b))
#elif defined(ISA_NEON) && DOUBLE
#define v_fma(a, b, c) ((vec)vfmaq_f64((float64x2_t)(c), (float64x2_t)(a), (float64x2_t)(b)))
#elif defined(ISA_NEON)
#define v_fma(a, b, c) ((vec)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#elif BELOW
#define v_fma(a, b, c) F(v_fma_lanes)(a, b, c)
#else
#define v_fma(a, b, c) ((a) * (b) + (c))  /* two roundings; the build forbids contraction */
#endif
#ifndef v_min
#define v_min(a, b) F(v_select)((a) < (b), a, b)
#define v_max(a, b) F(v_select)((a) > (b), a, b)
#endif

#ifdef __GNUC__
INLINE vec F(v_set1)(R a) { return a - (vec){0}; }
INLINE vec F(v_load)(const R *p) { return (vec)*(const F(uvec) *)p; }
INLINE void F(v_store)(R *p, vec a) { *(F(uvec) *)p = (F(uvec))a; }
INLINE vec F(v_select)(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }
INLINE vec F(v_abs)(vec a) { return (vec)((ivec)a & ~(ivec)(-(vec){0})); }
INLINE vec F(v_copysign)(vec a, vec s) { return F(v_select)((ivec)(-(vec){0}), s, a); }
/* half 0 or 1 of a[0], b[0], a[1], b[1], ... */
INLINE vec F(v_interleave)(vec a, vec b, const int half) {
    ivec pick;
    for (int l = 0; l < VL; l++) pick[l] = l % 2 * VL + half * (VL / 2) + l / 2;
#ifdef __clang__
    vec out;
    for (int l = 0; l < VL; l++) out[l] = pick[l] < VL ? a[pick[l]] : b[pick[l] - VL];
    return out;
#else
    return __builtin_shuffle(a, b, pick);
#endif
}
/* a[by], a[by + 1], ... and then from a[0] on */
INLINE vec F(v_rotate)(vec a, const int by) {
#ifdef __clang__
    vec out;
    for (int l = 0; l < VL; l++) out[l] = a[(l + by) % VL];
    return out;
#else
    ivec pick;
    for (int l = 0; l < VL; l++) pick[l] = (l + by) % VL;
    return __builtin_shuffle(a, pick);
#endif
}
INLINE vec F(v_from_bits)(bits a) { return (vec)a; }
INLINE bits F(v_bits)(vec a) { return (bits)a; }
#else
INLINE vec F(v_set1)(R a) { return a; }
INLINE vec F(v_load)(const R *p) { return *p; }
INLINE void F(v_store)(R *p, vec a) { *p = a; }
INLINE vec F(v_select)(int mask, vec a, vec b) { return mask ? a : b; }
INLINE vec F(v_interleave)(vec a, vec b, int half) { return half ? b : a; }
INLINE vec F(v_rotate)(vec a, int by) { return (void)by, a; }
INLINE vec F(v_abs)(vec a) { return (vec)fabs(a); }
INLINE vec F(v_copysign)(vec a, vec s) { return (vec)copysign(a, s); }
INLINE vec F(v_from_bits)(bits a) { vec v; memcpy(&v, &a, sizeof v); return v; }
INLINE bits F(v_bits)(vec a) { bits v; memcpy(&v, &a, sizeof v); return v; }
#endif

#if BELOW && !defined(FUSED)
/* Below float32 every instruction set has the same bits, so one rounding here too, slowly. */
INLINE vec F(v_fma_lanes)(vec a, vec b, vec c) {
    R x[VECTOR_BYTES / sizeof(R)], y[VECTOR_BYTES / sizeof(R)], z[VECTOR_BYTES / sizeof(R)];
    F(v_store)(x, a), F(v_store)(y, b), F(v_store)(z, c);
    for (ptrdiff_t l = 0; l < VL; l++) z[l] = (R)fmaf((float)x[l], (float)y[l], (float)z[l]);
    return F(v_load)(z);
}
#endif

INLINE vec F(v_sqrt)(vec a) {
#if defined(ISA_AVX512) && DOUBLE
    return (vec)_mm512_sqrt_pd(a);
#elif defined(ISA_AVX512)
    return (vec)_mm512_sqrt_ps(a);
#elif defined(ISA_AVX2) && DOUBLE
    return (vec)_mm256_sqrt_pd(a);
#elif defined(ISA_AVX2)
    return (vec)_mm256_sqrt_ps(a);
#elif defined(ISA_NEON) && DOUBLE
    return (vec)vsqrtq_f64((float64x2_t)a);
#elif defined(ISA_NEON)
    return (vec)vsqrtq_f32((float32x4_t)a);
#else
    R lanes[VECTOR_BYTES / sizeof(R)];
    F(v_store)(lanes, a);
    for (ptrdiff_t l = 0; l < VL; l++) lanes[l] = DOUBLE ? (R)sqrt(lanes[l]) : (R)sqrtf((float)lanes[l]);
    return F(v_load)(lanes);
#endif
}

/* The first n <= VL lanes; the others read as zero and are not written. */
INLINE vec F(v_load_n)(const R *p, ptrdiff_t n) {
    if (n == VL) return F(v_load)(p);
#if defined(ISA_AVX512) && DOUBLE
    return _mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
#elif defined(ISA_AVX512)
    return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
    R lanes[VECTOR_BYTES / sizeof(R)] = {0};
    for (ptrdiff_t l = 0; l < n; l++) lanes[l] = p[l];
    return F(v_load)(lanes);
#endif
}

INLINE void F(v_store_n)(R *p, vec a, ptrdiff_t n) {
    if (n == VL) { F(v_store)(p, a); return; }
#if defined(ISA_AVX512) && DOUBLE
    _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), a);
#elif defined(ISA_AVX512)
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), a);
#else
    R lanes[VECTOR_BYTES / sizeof(R)];
    F(v_store)(lanes, a);
    for (ptrdiff_t l = 0; l < n; l++) p[l] = lanes[l];
#endif
}
