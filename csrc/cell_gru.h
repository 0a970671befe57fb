/* cell_gru.h: the gated recurrent unit on vectors of units, its reset gate applied after the product
   with W_hh, or before it: two cells.  Time, batch and where the pre-activations come from are not
   their business.

       r = σ(a_r)        z = σ(a_z)        n = tanh(a_n + r ∘ q)        h = (1 - z) ∘ n + z ∘ h_{t-1}

   After the product gates lie in the order n, r, z, q: x alone feeds a_n, the first, h alone feeds q,
   the last, and both feed a_r and a_z, so that each product is one run of gates. */

INLINE void F(gru_store)(R *gates, vec n, vec r, vec z, vec q, ptrdiff_t H, ptrdiff_t lanes) {
    F(v_store_n)(gates, n, lanes);
    F(v_store_n)(gates + H, r, lanes);
    F(v_store_n)(gates + 2 * H, z, lanes);
    F(v_store_n)(gates + 3 * H, q, lanes);
}

INLINE void F(gru_forward)(const lstm_weights *w, const lstm_row *row, ptrdiff_t j, ptrdiff_t lanes,
                           const vec *a) {
    vec r = F(v_sigmoid)(a[1]), z = F(v_sigmoid)(a[2]), q = a[3];
    vec n = F(v_tanh)(v_fma(r, q, a[0])), h_prev = F(v_load_n)((const R *)row->h_prev + j, lanes);
    if (!w->no_tape) F(gru_store)((R *)row->gates + j, n, r, z, q, w->H, lanes);
    F(v_store_n)((R *)row->h + j, v_fma(z, h_prev - n, n), lanes);
}

INLINE void F(gru_backward)(const lstm_weights *w, const lstm_back_row *row, ptrdiff_t j,
                            ptrdiff_t lanes, vec dh) {
    R *gates = (R *)row->gates + j, *dh_row = (R *)row->dh + j;
    vec n = F(v_load_n)(gates, lanes), r = F(v_load_n)(gates + w->H, lanes);
    vec z = F(v_load_n)(gates + 2 * w->H, lanes), q = F(v_load_n)(gates + 3 * w->H, lanes);
    vec h_prev = F(v_load_n)((const R *)row->h_prev + j, lanes);
    dh += F(v_load_n)(dh_row, lanes);
    vec da_n = dh * (1 - z) * v_fma(-n, n, F(v_set1)(1));
    vec da_r = da_n * q * (r * (1 - r)), da_z = dh * (h_prev - n) * (z * (1 - z));
    F(gru_store)(gates, da_n, da_r, da_z, da_n * r, w->H, lanes);
    F(v_store_n)(dh_row, dh * z, lanes);
}

#define CELL(name) F(gru_##name)
#define GATES 4
#define APART 1
#include "step.h"

/* Before the product:

       r = σ(a_r)        z = σ(a_z)        m = r ∘ h_{t-1}
       n = tanh(a_n)                       h = (1 - z) ∘ n + z ∘ h_{t-1}

   Gates lie in the order r, z, n: h feeds a_r and a_z, and then m, of all units, feeds a_n. */

INLINE void F(gru_before_forward)(const lstm_weights *w, const lstm_row *row, ptrdiff_t j,
                                  ptrdiff_t lanes, const vec *a) {
    R *gates = (R *)row->gates + j;
    vec r = F(v_sigmoid)(a[0]);
    F(v_store_n)(gates, r, lanes);
    F(v_store_n)(gates + w->H, F(v_sigmoid)(a[1]), lanes);
    F(v_store_n)(gates + 2 * w->H, a[2], lanes);
    F(v_store_n)((R *)row->m + j, r * F(v_load_n)((const R *)row->h_prev + j, lanes), lanes);
}

INLINE void F(gru_before_backward)(const lstm_weights *w, const lstm_back_row *row, ptrdiff_t j,
                                   ptrdiff_t lanes, vec dh) {
    R *gates = (R *)row->gates + j, *dh_row = (R *)row->dh + j;
    vec z = F(v_load_n)(gates + w->H, lanes), n = F(v_load_n)(gates + 2 * w->H, lanes);
    vec h_prev = F(v_load_n)((const R *)row->h_prev + j, lanes);
    dh += F(v_load_n)(dh_row, lanes);
    F(v_store_n)(gates + w->H, dh * (h_prev - n) * (z * (1 - z)), lanes);
    F(v_store_n)(gates + 2 * w->H, dh * (1 - z) * v_fma(-n, n, F(v_set1)(1)), lanes);
    F(v_store_n)(dh_row, dh * z, lanes);
}

#define CELL(name) F(gru_before_##name)
#define GATES 3
#define LATER 1
#include "step.h"

INLINE void F(gru_later_forward)(const lstm_weights *w, const lstm_row *row, ptrdiff_t j,
                                 ptrdiff_t lanes, const vec *a) {
    R *gate = (R *)row->gates + j;
    vec z = F(v_load_n)(gate - w->H, lanes), n = F(v_tanh)(a[0]);
    vec h_prev = F(v_load_n)((const R *)row->h_prev + j, lanes);
    F(v_store_n)(gate, n, lanes);
    F(v_store_n)((R *)row->h + j, v_fma(z, h_prev - n, n), lanes);
}

INLINE void F(gru_later_backward)(const lstm_weights *w, const lstm_back_row *row, ptrdiff_t j,
                                  ptrdiff_t lanes, vec dm) {
    R *gate = (R *)row->gates - 2 * w->H + j, *dh_row = (R *)row->dh + j;
    vec r = F(v_load_n)(gate, lanes), h_prev = F(v_load_n)((const R *)row->h_prev + j, lanes);
    F(v_store_n)(gate, dm * h_prev * (r * (1 - r)), lanes);
    F(v_store_n)((R *)row->m + j, r * h_prev, lanes);
    F(v_store_n)(dh_row, v_fma(dm, r, F(v_load_n)(dh_row, lanes)), lanes);
}

#define CELL(name) F(gru_later_##name)
#define GATES 1
#include "step.h"
