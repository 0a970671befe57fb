/* cell_norm.h: the LSTM with layer normalization of its two products and of c (Ba et al. 2016), in the
   letters of lstmcore/reference.py.  A step waits for all units twice, so it comes in parts, each for some
   rows and the units [j0, j1) of each; the means of a row are taken over all of it, by every thread alike. */

#define NORM_EPSILON 1e-5

/* norm(v) = (v - mean) · scale */
typedef struct {
    R mean, scale;
} F(moments);

INLINE R F(lanes_sum)(vec a) {
    R lanes[VL], sum = 0;
    F(v_store)(lanes, a);
    for (int q = 0; q < VL; q++) sum += lanes[q];
    return sum;
}

/* A row v, or v + more where there is more. */
INLINE vec F(v_sum_n)(const R *v, const R *more, ptrdiff_t n) {
    return more ? F(v_load_n)(v, n) + F(v_load_n)(more, n) : F(v_load_n)(v, n);
}

INLINE F(moments) F(moments_of)(const R *v, const R *more, ptrdiff_t n) {
    ptrdiff_t whole = n - n % VL, j;
    vec sum = F(v_set1)(0), squares = sum;
    for (j = 0; j < n; j += VL) sum += F(v_sum_n)(v + j, more ? more + j : NULL, MIN(VL, n - j));
    R mean = F(lanes_sum)(sum) / (R)n;
    for (j = 0; j < whole; j += VL) {
        vec d = F(v_sum_n)(v + j, more ? more + j : NULL, VL) - mean;
        squares = v_fma(d, d, squares);
    }
    R total = F(lanes_sum)(squares);
    for (; j < n; j++) {
        R d = v[j] + (more ? more[j] : 0) - mean;
        total += d * d;
    }
    return (F(moments)){mean, (R)(1 / sqrt((double)(total / (R)n) + NORM_EPSILON))};
}

INLINE vec F(v_normed)(const R *v, const R *more, F(moments) m, ptrdiff_t n) {
    return (F(v_sum_n)(v, more, n) - m.mean) * m.scale;
}

/* What comes back through norm(v), of which g ∘ gamma reaches it: scale (g ∘ gamma - first - norm(v) second),
   with the means first of g ∘ gamma and second of g ∘ gamma ∘ norm(v). */
typedef struct {
    R first, second;
} F(returned);

INLINE F(returned) F(returned_of)(const R *g, const R *gamma, const R *v, const R *more, F(moments) m,
                                  ptrdiff_t n) {
    vec first = F(v_set1)(0), second = first;
    for (ptrdiff_t j = 0; j < n; j += VL) {
        ptrdiff_t w = MIN(VL, n - j);
        vec product = F(v_load_n)(g + j, w) * F(v_load_n)(gamma + j, w);
        first += product;
        second = v_fma(product, F(v_normed)(v + j, more ? more + j : NULL, m, w), second);
    }
    return (F(returned)){F(lanes_sum)(first) / (R)n, F(lanes_sum)(second) / (R)n};
}

INLINE vec F(v_returned)(const R *g, const R *gamma, const R *v, const R *more, F(moments) m, F(returned) r,
                         ptrdiff_t n) {
    vec product = F(v_load_n)(g, n) * F(v_load_n)(gamma, n);
    return (product - r.first - F(v_normed)(v, more, m, n) * r.second) * m.scale;
}

/* The gates of a, kept, and f ∘ c_{t-1} + i ∘ g of l units, where the rows begin with them. */
INLINE vec F(gates_to_c)(const vec *a, R *gates, const R *c_prev, ptrdiff_t H, ptrdiff_t l) {
    F(gates)
    s = {F(v_sigmoid)(a[0]), F(v_sigmoid)(a[1]), F(v_tanh)(a[2]), F(v_sigmoid)(a[3])};
    F(gates_store)(gates, &s, H, l);
    return v_fma(s.f, F(v_load_n)(c_prev, l), s.i * s.g);
}

/* Back from dc, which reaches that sum: da_i, da_f, da_g in the place of the gates, and dc_{t-1}. */
INLINE void F(c_to_gates)(vec dc, R *gates, const R *c_prev, R *dc_prev, ptrdiff_t H, ptrdiff_t l) {
    vec i = F(v_load_n)(gates, l), f = F(v_load_n)(gates + H, l), g = F(v_load_n)(gates + 2 * H, l);
    F(v_store_n)(gates, dc * g * (i * (1 - i)), l);
    F(v_store_n)(gates + H, dc * F(v_load_n)(c_prev, l) * (f * (1 - f)), l);
    F(v_store_n)(gates + 2 * H, dc * i * v_fma(-g, g, F(v_set1)(1)), l);
    F(v_store_n)(dc_prev, dc * f, l);
}

/* The two parts of a step forward: the gates and c; then h.  norms: gamma of x W_ihᵀ (4H) and of h W_hhᵀ
   (4H), gamma and beta of c (H). */
static void F(norm_step)(const lstm_weights *w, int part, ptrdiff_t n, ptrdiff_t j0, ptrdiff_t j1,
                         const lstm_row *rows) {
    ptrdiff_t H = w->H;
    const R *norms = w->norms, *b = w->bias;
    for (ptrdiff_t r = 0; r < n; r++) {
        const lstm_row *row = rows + r;
        R *gates = row->gates, *c = row->c;
        F(moments) *kept = row->moments;
        if (part == 0) {
            const R *ax = row->ax, *ah = row->ah, *c_prev = row->c_prev;
            F(moments)
            of_x = F(moments_of)(ax, NULL, 4 * H),
            of_h = F(moments_of)(ah, NULL, 4 * H);
            if (kept && j0 == 0) kept[0] = of_x, kept[1] = of_h;
            for (ptrdiff_t j = j0; j < j1; j += VL) {
                ptrdiff_t l = MIN(VL, j1 - j);
                vec a[4];
                for (int k = 0; k < 4; k++) {
                    ptrdiff_t at = k * H + j;
                    a[k] = b ? F(v_load_n)(b + at, l) : F(v_set1)(0);
                    a[k] = v_fma(F(v_load_n)(norms + at, l), F(v_normed)(ax + at, NULL, of_x, l), a[k]);
                    a[k] = v_fma(F(v_load_n)(norms + 4 * H + at, l), F(v_normed)(ah + at, NULL, of_h, l), a[k]);
                }
                F(v_store_n)(c + j, F(gates_to_c)(a, gates + j, c_prev + j, H, l), l);
            }
        } else {
            F(moments)
            of_c = F(moments_of)(c, NULL, H);
            if (kept && j0 == 0) kept[2] = of_c;
            for (ptrdiff_t j = j0; j < j1; j += VL) {
                ptrdiff_t l = MIN(VL, j1 - j);
                vec n_c = v_fma(F(v_load_n)(norms + 8 * H + j, l), F(v_normed)(c + j, NULL, of_c, l),
                                F(v_load_n)(norms + 9 * H + j, l));
                F(v_store_n)((R *)row->h + j, F(v_load_n)(gates + 3 * H + j, l) * F(v_tanh)(n_c), l);
            }
        }
    }
}

#if TRAINS
/* The three parts of a step back: da_o and what reaches norm(c); the other da and dc; what reaches
   h W_hhᵀ.  dy is all that reaches h. */
static void F(norm_back_step)(const lstm_weights *w, int part, ptrdiff_t n, ptrdiff_t j0, ptrdiff_t j1,
                              const lstm_back_row *rows) {
    ptrdiff_t H = w->H;
    const R *norms = w->norms;
    for (ptrdiff_t r = 0; r < n; r++) {
        const lstm_back_row *row = rows + r;
        R *gates = row->gates, *dn = row->dn;
        const R *c = row->c;
        const F(moments) *kept = row->moments;
        F(moments)
        of_h = kept[1],
        of_c = kept[2];
        F(returned)
        back = {0, 0};
        if (part == 1) back = F(returned_of)(dn, norms + 8 * H, c, NULL, of_c, H);
        if (part == 2) back = F(returned_of)(gates, norms + 4 * H, row->ah, NULL, of_h, 4 * H);
        for (ptrdiff_t j = j0; j < j1; j += VL) {
            ptrdiff_t l = MIN(VL, j1 - j);
            if (part == 0) {
                vec n_c = v_fma(F(v_load_n)(norms + 8 * H + j, l), F(v_normed)(c + j, NULL, of_c, l),
                                F(v_load_n)(norms + 9 * H + j, l));
                vec o = F(v_load_n)(gates + 3 * H + j, l), t = F(v_tanh)(n_c);
                vec dh = F(v_load_n)((const R *)row->dy + j, l);
                F(v_store_n)(gates + 3 * H + j, dh * t * (o * (1 - o)), l);
                F(v_store_n)(dn + j, dh * o * v_fma(-t, t, F(v_set1)(1)), l);
            } else if (part == 1) {
                vec dc = F(v_load_n)((R *)row->dc + j, l) +
                         F(v_returned)(dn + j, norms + 8 * H + j, c + j, NULL, of_c, back, l);
                F(c_to_gates)(dc, gates + j, (const R *)row->c_prev + j, (R *)row->dc + j, H, l);
            } else {
                for (ptrdiff_t at = j; at < 4 * H; at += H)
                    F(v_store_n)((R *)row->dah + at, F(v_returned)(gates + at, norms + 4 * H + at, (const R *)row->ah + at, NULL, of_h, back, l), l);
            }
        }
    }
}

/* Adds to the gradient (10, H) of norms, units [j0, j1), in the order of the tokens. */
static void F(norm_gradient)(ptrdiff_t n, ptrdiff_t H, ptrdiff_t j0, ptrdiff_t j1, const lstm_normed *tokens,
                             void *dnorms) {
    for (ptrdiff_t j = j0; j < j1; j += VL) {
        ptrdiff_t l = MIN(VL, j1 - j);
        vec sums[10];
        for (int q = 0; q < 10; q++) sums[q] = F(v_load_n)((const R *)dnorms + q * H + j, l);
        for (ptrdiff_t k = 0; k < n; k++) {
            const F(moments) *m = tokens[k].moments;
            const R *da = (const R *)tokens[k].da + j, *ax = (const R *)tokens[k].ax + j;
            const R *ah = (const R *)tokens[k].ah + j;
            for (int q = 0; q < 4; q++) {
                vec d = F(v_load_n)(da + q * H, l);
                sums[q] = v_fma(d, F(v_normed)(ax + q * H, NULL, m[0], l), sums[q]);
                sums[4 + q] = v_fma(d, F(v_normed)(ah + q * H, NULL, m[1], l), sums[4 + q]);
            }
            vec dn = F(v_load_n)((const R *)tokens[k].dn + j, l);
            sums[8] = v_fma(dn, F(v_normed)((const R *)tokens[k].raw + j, NULL, m[2], l), sums[8]);
            sums[9] += dn;
        }
        for (int q = 0; q < 10; q++) F(v_store_n)((R *)dnorms + q * H + j, sums[q], l);
    }
}

/* What reaches x W_ihᵀ of each token, in the place of that product. */
static void F(norm_inputs)(ptrdiff_t n, ptrdiff_t H, const lstm_normed *tokens, const void *norms) {
    for (ptrdiff_t k = 0; k < n; k++) {
        R *ax = tokens[k].ax;
        F(moments)
        of_x = *(const F(moments) *)tokens[k].moments;
        F(returned)
        back = F(returned_of)(tokens[k].da, norms, ax, NULL, of_x, 4 * H);
        for (ptrdiff_t j = 0; j < 4 * H; j += VL) {
            ptrdiff_t l = MIN(VL, 4 * H - j);
            F(v_store_n)(ax + j, F(v_returned)((const R *)tokens[k].da + j, (const R *)norms + j, ax + j, NULL, of_x, back, l), l);
        }
    }
}
#endif
