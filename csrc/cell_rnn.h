/* cell_rnn.h: the vanilla RNN with tanh and with relu, on vectors of units: two cells of one gate.

       h = tanh(a)          da = dh ∘ (1 - h²)
       h = max(0, a)        da = dh ∘ [h > 0]

   The tape keeps h alone.  Time, batch and where a comes from are not its business. */

INLINE void F(tanh_forward)(const lstm_weights *w, const lstm_row *row, ptrdiff_t j, ptrdiff_t n,
                            const vec *a) {
    (void)w;
    F(v_store_n)((R *)row->h + j, F(v_tanh)(a[0]), n);
}

INLINE void F(tanh_backward)(const lstm_weights *w, const lstm_back_row *row, ptrdiff_t j, ptrdiff_t n,
                             vec dh) {
    vec h = F(v_load_n)((const R *)row->h + j, n);
    (void)w;
    F(v_store_n)((R *)row->gates + j, dh * v_fma(-h, h, F(v_set1)(1)), n);
}

#define CELL(name) F(tanh_##name)
#define GATES 1
#include "step.h"

INLINE void F(relu_forward)(const lstm_weights *w, const lstm_row *row, ptrdiff_t j, ptrdiff_t n,
                            const vec *a) {
    (void)w;
    F(v_store_n)((R *)row->h + j, v_max(F(v_set1)(0), a[0]), n);
}

INLINE void F(relu_backward)(const lstm_weights *w, const lstm_back_row *row, ptrdiff_t j, ptrdiff_t n,
                             vec dh) {
    vec h = F(v_load_n)((const R *)row->h + j, n);
    (void)w;
    F(v_store_n)((R *)row->gates + j, F(v_select)(h > 0, dh, F(v_set1)(0)), n);
}

#define CELL(name) F(relu_##name)
#define GATES 1
#include "step.h"
