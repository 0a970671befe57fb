/* activations.h: branch-free sigmoid and tanh on vectors.

       e^z = 2^n e^r,  n = round(z / ln 2),  r = z - n ln 2 in [-ln2/2, ln2/2]
       e^r - 1 = r + r² P(r),  P the Chebyshev fit of (e^r - 1 - r)/r² on that interval
       σ(x)    = 1 / (1 + e^-x)
       tanh(x) = -E / (E + 2), E = e^(-2|x|) - 1, with the sign of x

   Largest error against a correctly rounded result (tests/test_activations.py): float32 within 4 ulp,
   float64 within 2 ulp, wherever the result is a normal number; σ(x) far below the smallest normal
   number, from x = -709 (float64) or -89 (float32) on, is 0.  nan gives nan; ±inf give the limits; ±0
   keep their sign in tanh. */

#undef EXP_SHIFT
#undef EXP_ONE
#undef EXP_ROUND
#undef EXP_MAX
#undef EXP_MIN
#undef LN2_HI
#undef LN2_LO
#undef TANH_ONE
#if DOUBLE
#define EXP_SHIFT 52
#define EXP_ONE UINT64_C(0x3FF0000000000000)
#define EXP_ROUND 6755399441055744.0      /* 1.5·2^52: adding it rounds to an integer */
#define EXP_MAX 709.0                     /* n = 1023: e^z is finite, which v_quotient needs */
#define EXP_MIN -708.0                    /* n = -1021: 2^n is still a normal number */
#define LN2_HI 6.93147180369123816490e-01 /* ln 2 to 33 bits: n·LN2_HI is exact */
#define LN2_LO 1.90821492927058770002e-10
#define TANH_ONE 20.0                     /* tanh rounds to 1 from 19.1 on */
#else
#define EXP_SHIFT 23
#define EXP_ONE 0x3F800000u
#define EXP_ROUND 12582912.0f             /* 1.5·2^23 */
#define EXP_MAX 89.0f                     /* n = 128, so 2^n = inf and σ = 0 */
#define EXP_MIN -87.0f                    /* n = -126 */
#define LN2_HI 0.693359375f               /* ln 2 to 10 bits */
#define LN2_LO -2.12194440e-4f
#define TANH_ONE 10.0f                    /* tanh rounds to 1 from 9.02 on */
#endif

/* z -> q = e^r - 1 and s = 2^n, so that e^z = s (q + 1) and e^z - 1 = s q + (s - 1). */
INLINE void F(exp_parts)(vec z, vec *q, vec *s) {
#if DOUBLE
    static const R P[] = {0.5, 0.1666666666666667103, 0.041666666666666669783,
        0.0083333333333260831202, 0.0013888888888883711167, 0.00019841269875002278793,
        0.0000248015873256774619, 2.7557255170000887438e-6, 2.7557273478718580474e-7,
        2.5105312729622101787e-8, 2.09147553258932022e-9};
#else
    static const R P[] = {0.5f, 0.16666576666119928305f, 0.041666554212984150314f,
        0.0083632328836826182041f, 0.0013926250831497611718f};
#endif
    const int degree = (int)(sizeof P / sizeof P[0]) - 1;
    vec t = v_fma(z, F(v_set1)((R)1.4426950408889634074), F(v_set1)(EXP_ROUND));
    vec n = t - EXP_ROUND;
    vec r = v_fma(n, F(v_set1)((R)-LN2_LO), v_fma(n, F(v_set1)((R)-LN2_HI), z));
    vec p = F(v_set1)(P[degree]);
    for (int j = degree - 1; j >= 0; j--) p = v_fma(p, r, F(v_set1)(P[j]));
    *q = v_fma(r * r, p, r);
    *s = F(v_from_bits)((F(v_bits)(t) << EXP_SHIFT) + EXP_ONE);
}

/* (a + a_lost) / (D + D_lost).  In float64 the plain quotient would cost up to 2.6 ulp in all: one step
   with its remainder repairs what the sums and the division lost. */
INLINE vec F(v_quotient)(vec a, vec a_lost, vec D, vec D_lost) {
#if DOUBLE
    vec inverse = 1 / D, t = a * inverse;
    return v_fma(v_fma(-t, D, a) + v_fma(-t, D_lost, a_lost), inverse, t);
#else
    (void)a_lost, (void)D_lost;
    return a / D;
#endif
}

INLINE vec F(v_sigmoid)(vec x) {
    vec q, s;
    vec z = v_max(F(v_set1)(EXP_MIN), v_min(F(v_set1)(EXP_MAX), -x));
    F(exp_parts)(z, &q, &s);
    vec e = s * (q + 1), D = e + 1;
    vec y = F(v_quotient)(F(v_set1)(1), F(v_set1)(0), D, DOUBLE ? 1 - (D - e) : D);
    return DOUBLE ? F(v_select)(-x > EXP_MAX, F(v_set1)(0), y) : y;
}

INLINE vec F(v_tanh)(vec x) {
    vec q, s;
    vec z = v_min(F(v_set1)(TANH_ONE), F(v_abs)(x)) * -2;
    F(exp_parts)(z, &q, &s);
    vec E = v_fma(s, q, s - 1), E_lost = v_fma(s, q, (s - 1) - E), D = E + 2;
    return F(v_copysign)(F(v_quotient)(-E, -E_lost, D, E - (D - 2) + E_lost), x);
}

/* The same on arrays, for tests. */
#define ACTIVATION(name)                                                                             \
    static void F(array_##name)(ptrdiff_t n, const void *x, void *out) {                             \
        for (ptrdiff_t j = 0; j < n; j += VL) {                                                      \
            ptrdiff_t w = MIN(VL, n - j);                                                            \
            F(v_store_n)((R *)out + j, F(v_##name)(F(v_load_n)((const R *)x + j, w)), w);            \
        }                                                                                            \
    }
ACTIVATION(sigmoid)
ACTIVATION(tanh)
