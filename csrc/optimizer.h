/* optimizer.h: a step of Adam on arrays of numbers.  Which parameter they are, and which step it is, is
   not its business: the corrections for the first steps are in the rule. */

static void F(adam)(ptrdiff_t n, const lstm_adam *rule, void *p_, const void *g_, void *m_, void *v_) {
    R *p = p_, *m = m_, *v = v_;
    const vec to_m = F(v_set1)((R)(1 - rule->b1)), to_v = F(v_set1)((R)(1 - rule->b2));
    const vec decay = F(v_set1)((R)rule->decay), keep = F(v_set1)((R)rule->keep);
    const vec rate = F(v_set1)((R)rule->rate), eps = F(v_set1)((R)rule->eps);
    for (ptrdiff_t j = 0; j < n; j += VL) {
        ptrdiff_t w = MIN(VL, n - j);
        vec p_j = F(v_load_n)(p + j, w), m_j = F(v_load_n)(m + j, w), v_j = F(v_load_n)(v + j, w);
        vec g = v_fma(decay, p_j, F(v_load_n)((const R *)g_ + j, w));
        m_j = v_fma(to_m, g - m_j, m_j);
        v_j = v_fma(to_v, v_fma(g, g, -v_j), v_j);
        F(v_store_n)(m + j, m_j, w);
        F(v_store_n)(v + j, v_j, w);
        F(v_store_n)(p + j, v_fma(-rate, m_j / (F(v_sqrt)(v_j) + eps), keep * p_j), w);
    }
}
