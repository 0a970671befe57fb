/* cell_varied.h: the LSTM of cell_lstm.h with what `lstm_variant` says: other activations, pre-activations
   clipped, f = 1 - i, zoneout, and h multiplied by a mask before the next product.

       ĉ = f ∘ c_{t-1} + i ∘ g                    ĥ = o ∘ A_c(ĉ)
       c = z_c ∘ c_{t-1} + (1 - z_c) ∘ ĉ          h = z_h ∘ h_{t-1} + (1 - z_h) ∘ ĥ

   Slopes are told from the values of the activations, which never fall. */

/* A(x) of a kind; docs/layers.md has the table. */
static NOINLINE vec F(v_activation)(const lstm_activation *A, vec x) {
    vec alpha = F(v_set1)((R)A->alpha), beta = F(v_set1)((R)A->beta), zero = F(v_set1)(0), one = zero + 1;
    switch (A->kind) {
    case SIGMOID: return F(v_sigmoid)(x);
    case TANH: return alpha * F(v_tanh)(beta * x);
    case AFFINE: return v_fma(alpha, x, beta);
    case HARD_SIGMOID: return v_max(zero, v_min(one, v_fma(alpha, x, beta)));
    case LEAKY_RELU: return F(v_select)(x >= zero, x, alpha * x);
    case THRESHOLDED_RELU: return F(v_select)(x <= alpha, zero, x);
    case SOFTSIGN: return x / (one + F(v_abs)(x));
    default: { /* ELU: β x, and β α (e^x - 1) below 0 */
        vec q, s;
        F(exp_parts)(v_max(F(v_set1)(EXP_MIN), v_min(zero, x)), &q, &s);
        return beta * F(v_select)(x > zero, x, alpha * v_fma(s, q, s - 1));
    }
    }
}

/* A'(x), where y = A(x). */
static NOINLINE vec F(v_slope)(const lstm_activation *A, vec y) {
    vec alpha = F(v_set1)((R)A->alpha), beta = F(v_set1)((R)A->beta), zero = F(v_set1)(0), one = zero + 1;
    switch (A->kind) {
    case SIGMOID: return y * (one - y);
    case TANH: return beta * v_fma(-y, y / alpha, alpha);
    case AFFINE: return alpha;
    case HARD_SIGMOID: return F(v_select)(y > zero, F(v_select)(y < one, alpha, zero), zero);
    case LEAKY_RELU: return F(v_select)(y > zero, one, alpha);
    case THRESHOLDED_RELU: return F(v_select)(y > zero, one, zero);
    case SOFTSIGN: return (one - F(v_abs)(y)) * (one - F(v_abs)(y));
    default: return F(v_select)(y > zero, beta, v_fma(alpha, beta, y));
    }
}

/* A(x) with x in -clip..clip. */
INLINE vec F(v_clipped)(const lstm_variant *v, const lstm_activation *A, vec x) {
    R clip = (R)v->clip;
    if (v->clips) x = v_max(F(v_set1)(-clip), v_min(F(v_set1)(clip), x));
    return F(v_activation)(A, x);
}

/* Its slope, 0 where x was clipped. */
INLINE vec F(v_clipped_slope)(const lstm_variant *v, const lstm_activation *A, vec y) {
    vec slope = F(v_slope)(A, y), zero = F(v_set1)(0);
    if (v->clips) {
        vec low = F(v_activation)(A, F(v_set1)((R)-v->clip)), high = F(v_activation)(A, F(v_set1)((R)v->clip));
        slope = F(v_select)(y > low, F(v_select)(y < high, slope, zero), zero);
    }
    return slope;
}

/* z of h or, the second row, of c: the masks of a token, or what they are in the mean. */
INLINE vec F(zone_of)(const void *zone, double mean, ptrdiff_t at, ptrdiff_t n) {
    return zone ? F(v_load_n)((const R *)zone + at, n) : F(v_set1)((R)mean);
}

INLINE void F(varied_forward)(const lstm_weights *w, const lstm_row *row, ptrdiff_t j, ptrdiff_t n,
                              const vec *a) {
    const lstm_variant *v = w->variant;
    const R *p = w->peepholes ? (const R *)w->peepholes + j : NULL;
    ptrdiff_t H = w->H;
    F(gates)
    s = {a[0], a[1], a[2], a[3]};
    vec c, h, c_prev = F(v_load_n)((const R *)row->c_prev + j, n);
    if (p) {
        s.i = v_fma(F(v_load_n)(p, n), c_prev, s.i);
        s.f = v_fma(F(v_load_n)(p + H, n), c_prev, s.f);
    }
    s.i = F(v_clipped)(v, &v->gate, s.i);
    s.f = v->coupled ? 1 - s.i : F(v_clipped)(v, &v->gate, s.f);
    s.g = F(v_clipped)(v, &v->candidate, s.g);
    c = v_fma(s.f, c_prev, s.i * s.g);
    if (p) s.o = v_fma(F(v_load_n)(p + 2 * H, n), c, s.o);
    s.o = F(v_clipped)(v, &v->gate, s.o);
    h = s.o * F(v_activation)(&v->cell, c);
    if (v->zones) {
        c = v_fma(F(zone_of)(row->zone, v->zone_c, H + j, n), c_prev - c, c);
        h = v_fma(F(zone_of)(row->zone, v->zone_h, j, n), F(v_load_n)((const R *)row->h_prev + j, n) - h, h);
    }
    if (!w->no_tape) F(gates_store)((R *)row->gates + j, &s, H, n);
    F(v_store_n)((R *)row->c + j, c, n);
    F(v_store_n)((R *)row->h + j, h, n);
    if (row->mask) F(v_store_n)((R *)row->m + j, h * F(v_load_n)((const R *)row->mask + j, n), n);
}

/* dh = ∂L/∂h beside what zoneout passes on; with a mask, ∂L/∂m. */
INLINE void F(varied_backward)(const lstm_weights *w, const lstm_back_row *row, ptrdiff_t j, ptrdiff_t n,
                               vec dh) {
    const lstm_variant *v = w->variant;
    const R *p = w->peepholes ? (const R *)w->peepholes + j : NULL;
    ptrdiff_t H = w->H;
    R *gates = (R *)row->gates + j, *dc_row = (R *)row->dc + j, *dh_row = (R *)row->dh + j;
    vec i = F(v_load_n)(gates, n), f = F(v_load_n)(gates + H, n);
    vec g = F(v_load_n)(gates + 2 * H, n), o = F(v_load_n)(gates + 3 * H, n);
    vec dc = F(v_load_n)(dc_row, n), c_prev = F(v_load_n)((const R *)row->c_prev + j, n);
    vec c = v_fma(f, c_prev, i * g), u = F(v_activation)(&v->cell, c), kept = F(v_set1)(0), passed = kept;
    F(gates)
    s;
    if (row->mask) dh = v_fma(F(v_load_n)((const R *)row->mask + j, n), dh, F(v_load_n)((const R *)row->dy_apart + j, n));
    dh += F(v_load_n)(dh_row, n);
    if (v->zones) {
        kept = F(zone_of)(row->zone, v->zone_h, j, n) * dh;
        passed = F(zone_of)(row->zone, v->zone_c, H + j, n) * dc;
        dh -= kept;
        dc -= passed;
    }
    F(v_store_n)(dh_row, kept, n);
    s.o = dh * u * F(v_clipped_slope)(v, &v->gate, o);
    dc = v_fma(dh * o, F(v_slope)(&v->cell, u), dc);
    if (p) dc = v_fma(F(v_load_n)(p + 2 * H, n), s.o, dc);
    s.i = dc * (v->coupled ? g - c_prev : g) * F(v_clipped_slope)(v, &v->gate, i);
    s.f = v->coupled ? F(v_set1)(0) : dc * c_prev * F(v_clipped_slope)(v, &v->gate, f);
    s.g = dc * i * F(v_clipped_slope)(v, &v->candidate, g);
    dc = v_fma(dc, f, passed);
    if (p) {
        dc = v_fma(F(v_load_n)(p, n), s.i, dc);
        dc = v_fma(F(v_load_n)(p + H, n), s.f, dc);
    }
    F(gates_store)(gates, &s, H, n);
    F(v_store_n)(dc_row, dc, n);
}

#define CELL(name) F(varied_##name)
#define GATES 4
#include "step.h"
