/* cell_norm_gates.h: the LSTM whose gates are normalized, each over its units, and whose c goes on normalized
   (as TensorFlow's LayerNormBasicLSTMCell), in the letters of lstmcore/reference.py.  In parts, as in
   cell_norm.h, whose means and gates it takes.  s = x W_ihᵀ + h W_hhᵀ; norms: gamma of each gate (4H), gamma and beta
   of c (H). */

/* Four gates' moments, then those of ĉ. */
enum { F(of_raw) = 4 };

/* The two parts of a step forward: the gates and ĉ; then c and h. */
static void F(norm_gates_step)(const lstm_weights *w, int part, ptrdiff_t n, ptrdiff_t j0, ptrdiff_t j1,
                               const lstm_row *rows) {
    ptrdiff_t H = w->H;
    const R *norms = w->norms, *b = w->bias;
    for (ptrdiff_t r = 0; r < n; r++) {
        const lstm_row *row = rows + r;
        R *gates = row->gates, *c = row->c, *raw = row->raw;
        const R *ax = row->ax, *ah = row->ah, *c_prev = row->c_prev;
        F(moments) *kept = row->moments;
        if (part == 0) {
            F(moments)
            m[4];
            for (int k = 0; k < 4; k++) m[k] = F(moments_of)(ax + k * H, ah + k * H, H);
            for (int k = 0; kept && j0 == 0 && k < 4; k++) kept[k] = m[k];
            for (ptrdiff_t j = j0; j < j1; j += VL) {
                ptrdiff_t l = MIN(VL, j1 - j);
                vec a[4];
                for (int k = 0; k < 4; k++) {
                    ptrdiff_t at = k * H + j;
                    a[k] = b ? F(v_load_n)(b + at, l) : F(v_set1)(0);
                    a[k] = v_fma(F(v_load_n)(norms + at, l), F(v_normed)(ax + at, ah + at, m[k], l), a[k]);
                }
                F(v_store_n)(raw + j, F(gates_to_c)(a, gates + j, c_prev + j, H, l), l);
            }
        } else {
            F(moments)
            m = F(moments_of)(raw, NULL, H);
            if (kept && j0 == 0) kept[F(of_raw)] = m;
            for (ptrdiff_t j = j0; j < j1; j += VL) {
                ptrdiff_t l = MIN(VL, j1 - j);
                vec n_c = v_fma(F(v_load_n)(norms + 4 * H + j, l), F(v_normed)(raw + j, NULL, m, l),
                                F(v_load_n)(norms + 5 * H + j, l));
                F(v_store_n)(c + j, n_c, l);
                F(v_store_n)((R *)row->h + j, F(v_load_n)(gates + 3 * H + j, l) * F(v_tanh)(n_c), l);
            }
        }
    }
}

#if TRAINS
/* The three parts of a step back: da_o and what reaches c; the other da and dc; what reaches s. */
static void F(norm_gates_back_step)(const lstm_weights *w, int part, ptrdiff_t n, ptrdiff_t j0, ptrdiff_t j1,
                                    const lstm_back_row *rows) {
    ptrdiff_t H = w->H;
    const R *norms = w->norms;
    for (ptrdiff_t r = 0; r < n; r++) {
        const lstm_back_row *row = rows + r;
        R *gates = row->gates, *dn = row->dn, *dc = row->dc, *ds = row->dah;
        const R *ax = row->ax, *ah = row->ah, *raw = row->raw, *c = row->c, *c_prev = row->c_prev;
        const F(moments) *m = row->moments;
        F(returned)
        back[4] = {{0, 0}};
        if (part == 1) back[0] = F(returned_of)(dn, norms + 4 * H, raw, NULL, m[F(of_raw)], H);
        for (int k = 0; part == 2 && k < 4; k++)
            back[k] = F(returned_of)(gates + k * H, norms + k * H, ax + k * H, ah + k * H, m[k], H);
        for (ptrdiff_t j = j0; j < j1; j += VL) {
            ptrdiff_t l = MIN(VL, j1 - j);
            if (part == 0) {
                vec o = F(v_load_n)(gates + 3 * H + j, l), t = F(v_tanh)(F(v_load_n)(c + j, l));
                vec dh = F(v_load_n)((const R *)row->dy + j, l);
                F(v_store_n)(gates + 3 * H + j, dh * t * (o * (1 - o)), l);
                F(v_store_n)(dn + j, v_fma(dh * o, v_fma(-t, t, F(v_set1)(1)), F(v_load_n)(dc + j, l)), l);
            } else if (part == 1) {
                vec draw = F(v_returned)(dn + j, norms + 4 * H + j, raw + j, NULL, m[F(of_raw)], back[0], l);
                F(c_to_gates)(draw, gates + j, c_prev + j, dc + j, H, l);
            } else {
                for (int k = 0; k < 4; k++) {
                    ptrdiff_t at = k * H + j;
                    F(v_store_n)(ds + at, F(v_returned)(gates + at, norms + at, ax + at, ah + at, m[k], back[k], l), l);
                }
            }
        }
    }
}

/* Adds to the gradient (6, H) of norms, units [j0, j1), in the order of the tokens. */
static void F(norm_gates_gradient)(ptrdiff_t n, ptrdiff_t H, ptrdiff_t j0, ptrdiff_t j1,
                                   const lstm_normed *tokens, void *dnorms) {
    for (ptrdiff_t j = j0; j < j1; j += VL) {
        ptrdiff_t l = MIN(VL, j1 - j);
        vec sums[6];
        for (int q = 0; q < 6; q++) sums[q] = F(v_load_n)((const R *)dnorms + q * H + j, l);
        for (ptrdiff_t k = 0; k < n; k++) {
            const F(moments) *m = tokens[k].moments;
            const R *da = (const R *)tokens[k].da + j, *ax = (const R *)tokens[k].ax + j;
            const R *ah = (const R *)tokens[k].ah + j;
            for (int q = 0; q < 4; q++)
                sums[q] = v_fma(F(v_load_n)(da + q * H, l), F(v_normed)(ax + q * H, ah + q * H, m[q], l), sums[q]);
            vec dn = F(v_load_n)((const R *)tokens[k].dn + j, l);
            sums[4] = v_fma(dn, F(v_normed)((const R *)tokens[k].raw + j, NULL, m[F(of_raw)], l), sums[4]);
            sums[5] += dn;
        }
        for (int q = 0; q < 6; q++) F(v_store_n)((R *)dnorms + q * H + j, sums[q], l);
    }
}
#endif
