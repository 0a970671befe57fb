/* loss.h: softmax cross-entropy of rows of logits, with its gradient.

   A row is read and written by one thread in one fixed order.  What a row stands for, and why its weight
   is what it is, is not its business. */

/* e^z for z <= 0: 0 where that is no normal number, nan for nan. */
INLINE vec F(v_exp_below_0)(vec z) {
    vec q, s, least = F(v_set1)(EXP_MIN);
    F(exp_parts)(v_max(least, z), &q, &s);
    return F(v_select)(z < least, F(v_set1)(0), s * (q + 1));
}

static void F(cross_entropy)(ptrdiff_t n, ptrdiff_t V, const void *z_, const int64_t *target,
                             const void *weight_, void *loss_, void *dz_) {
    for (ptrdiff_t r = 0; r < n; r++) {
        const R *z = (const R *)z_ + r * V, weight = ((const R *)weight_)[r], z_k = z[target[r]];
        R *dz = dz_ ? (R *)dz_ + r * V : NULL, lanes[VECTOR_BYTES / sizeof(R)], top = z[0], sum = 0;
        vec many = F(v_set1)(top);
        ptrdiff_t j = 0;
        for (; j + VL <= V; j += VL) many = v_max(many, F(v_load)(z + j));
        F(v_store)(lanes, many);
        for (; j < V; j++) top = z[j] > top ? z[j] : top;
        for (ptrdiff_t l = 0; l < VL; l++) top = lanes[l] > top ? lanes[l] : top;
        many = F(v_set1)(0);
        for (j = 0; j < V; j += VL) {
            ptrdiff_t w = MIN(VL, V - j);
            R *e = dz ? dz + j : lanes;
            F(v_store_n)(e, F(v_exp_below_0)(F(v_load_n)(z + j, w) - top), w);
            many += F(v_load_n)(e, w);
        }
        F(v_store)(lanes, many);
        for (ptrdiff_t l = 0; l < VL; l++) sum += lanes[l];
        ((R *)loss_)[r] = (R)log(sum) - (z_k - top);
        for (j = 0; dz && j < V; j += VL) {
            ptrdiff_t w = MIN(VL, V - j);
            F(v_store_n)(dz + j, weight ? F(v_load_n)(dz + j, w) * (weight / sum) : F(v_set1)(0), w);
        }
        if (dz) dz[target[r]] -= weight;
    }
}
