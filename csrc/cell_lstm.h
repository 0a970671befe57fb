/* cell_lstm.h: the LSTM on vectors of units, in the letters of lstmcore/reference.py: its equations,
   forward and backward, then what they load and store.  p points at one unit's place in the peepholes
   (3, H), or is NULL.  Time, batch and where the pre-activations come from are not its business. */

typedef struct { vec i, f, g, o; } F(gates);

/* in: a = pre-activations; out: gates, c and m = o ∘ tanh(c). */
INLINE void F(cell_forward)(F(gates) *a, vec c_prev, const R *p, ptrdiff_t H, ptrdiff_t n, vec *c,
                            vec *m) {
    if (p) {
        a->i = v_fma(F(v_load_n)(p, n), c_prev, a->i);
        a->f = v_fma(F(v_load_n)(p + H, n), c_prev, a->f);
    }
    a->i = F(v_sigmoid)(a->i);
    a->f = F(v_sigmoid)(a->f);
    a->g = F(v_tanh)(a->g);
    *c = v_fma(a->f, c_prev, a->i * a->g);
    if (p) a->o = v_fma(F(v_load_n)(p + 2 * H, n), *c, a->o);
    a->o = F(v_sigmoid)(a->o);
    *m = a->o * F(v_tanh)(*c);
}

/* in: gates, dm = ∂L/∂m, dc = ∂L/∂c; out: gates = da, dc = ∂L/∂c_{t-1}. */
INLINE void F(cell_backward)(F(gates) *a, vec c, vec c_prev, const R *p, ptrdiff_t H, ptrdiff_t n,
                             vec dm, vec *dc) {
    vec i = a->i, f = a->f, g = a->g, o = a->o, tanh_c = F(v_tanh)(c);
    a->o = dm * tanh_c * (o * (1 - o));
    *dc = v_fma(dm * o, v_fma(-tanh_c, tanh_c, F(v_set1)(1)), *dc);
    if (p) *dc = v_fma(F(v_load_n)(p + 2 * H, n), a->o, *dc);
    a->i = *dc * g * (i * (1 - i));
    a->f = *dc * c_prev * (f * (1 - f));
    a->g = *dc * i * v_fma(-g, g, F(v_set1)(1));
    *dc = *dc * f;
    if (p) {
        *dc = v_fma(F(v_load_n)(p, n), a->i, *dc);
        *dc = v_fma(F(v_load_n)(p + H, n), a->f, *dc);
    }
}

/* gates points at one unit's place in a row of gates (4, H). */
INLINE void F(gates_store)(R *gates, const F(gates) *a, ptrdiff_t H, ptrdiff_t n) {
    F(v_store_n)(gates, a->i, n);
    F(v_store_n)(gates + H, a->f, n);
    F(v_store_n)(gates + 2 * H, a->g, n);
    F(v_store_n)(gates + 3 * H, a->o, n);
}

INLINE void F(lstm_forward)(const lstm_weights *w, const lstm_row *row, ptrdiff_t j, ptrdiff_t n,
                            const vec *a) {
    F(gates) s = {a[0], a[1], a[2], a[3]};
    vec c, m, c_prev = F(v_load_n)((const R *)row->c_prev + j, n);
    F(cell_forward)(&s, c_prev, w->peepholes ? (const R *)w->peepholes + j : NULL, w->H, n, &c, &m);
    if (!w->no_tape) F(gates_store)((R *)row->gates + j, &s, w->H, n);
    F(v_store_n)((R *)row->c + j, c, n);
    F(v_store_n)((R *)row->h + j, m, n);
}

INLINE void F(lstm_backward)(const lstm_weights *w, const lstm_back_row *row, ptrdiff_t j, ptrdiff_t n,
                             vec dm) {
    R *gates = (R *)row->gates + j, *dc_row = (R *)row->dc + j;
    F(gates) s = {F(v_load_n)(gates, n), F(v_load_n)(gates + w->H, n),
                  F(v_load_n)(gates + 2 * w->H, n), F(v_load_n)(gates + 3 * w->H, n)};
    vec dc = F(v_load_n)(dc_row, n);
    F(cell_backward)(&s, F(v_load_n)((const R *)row->c + j, n),
                     F(v_load_n)((const R *)row->c_prev + j, n),
                     w->peepholes ? (const R *)w->peepholes + j : NULL, w->H, n, dm, &dc);
    F(gates_store)(gates, &s, w->H, n);
    F(v_store_n)(dc_row, dc, n);
}

static void F(lstm_output)(ptrdiff_t n, ptrdiff_t H, ptrdiff_t j0, ptrdiff_t j1,
                           const void *const *gates, const void *const *c, void *const *m) {
    for (ptrdiff_t r = 0; r < n; r++)
        for (ptrdiff_t j = j0; j < j1; j += VL) {
            ptrdiff_t w = MIN(VL, j1 - j);
            vec o = F(v_load_n)((const R *)gates[r] + 3 * H + j, w);
            F(v_store_n)((R *)m[r] + j, o * F(v_tanh)(F(v_load_n)((const R *)c[r] + j, w)), w);
        }
}

static void F(peephole_gradient)(ptrdiff_t K, ptrdiff_t H, ptrdiff_t j0, ptrdiff_t j1,
                                 const void *const *da, const void *const *c_prev,
                                 const void *const *c, void *dp_) {
    for (ptrdiff_t j = j0; j < j1; j += VL) {
        ptrdiff_t w = MIN(VL, j1 - j);
        vec dp_i = F(v_set1)(0), dp_f = dp_i, dp_o = dp_i;
        for (ptrdiff_t k = 0; k < K; k++) {
            const R *a = (const R *)da[k] + j;
            vec prev = F(v_load_n)((const R *)c_prev[k] + j, w);
            dp_i = v_fma(F(v_load_n)(a, w), prev, dp_i);
            dp_f = v_fma(F(v_load_n)(a + H, w), prev, dp_f);
            dp_o = v_fma(F(v_load_n)(a + 3 * H, w), F(v_load_n)((const R *)c[k] + j, w), dp_o);
        }
        R *dp = (R *)dp_ + j;
        F(v_store_n)(dp, dp_i, w);
        F(v_store_n)(dp + H, dp_f, w);
        F(v_store_n)(dp + 2 * H, dp_o, w);
    }
}

#define CELL(name) F(lstm_##name)
#define GATES 4
#include "step.h"
