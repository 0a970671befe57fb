/* cell.h: the equations of the cell on vectors of units, forward and backward, in the letters of
   lstmcore/reference.py.  p points at one unit's place in the peepholes (3, H), or is NULL. */

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
