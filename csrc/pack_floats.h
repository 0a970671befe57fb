/* pack_floats.h: a vector of columns of W, numbers of the arrays, packed: for formats that round them on
   the way, or not at all.  The format's pack_step says how STEP numbers k lie. */

/* The VL·VL numbers in[l·in_stride + k], packed from k0 on.  Interleaving the two halves of the rows
   log2(VL) times transposes them. */
INLINE void F(transpose)(const R *in, ptrdiff_t in_stride, PACKED *panel, int nv, int v, ptrdiff_t k0) {
    vec row[VECTOR_BYTES / sizeof(R)];
    for (int l = 0; l < VL; l++) row[l] = F(v_load)(in + l * in_stride);
    for (int width = 1; width < VL; width *= 2) {
        vec next[VECTOR_BYTES / sizeof(R)];
        for (int l = 0; l < VL / 2; l++) {
            next[2 * l] = F(v_interleave)(row[l], row[l + VL / 2], 0);
            next[2 * l + 1] = F(v_interleave)(row[l], row[l + VL / 2], 1);
        }
        for (int l = 0; l < VL; l++) row[l] = next[l];
    }
    for (int k = 0; k < VL; k += STEP) F(pack_step)(panel, nv, v, k0 + k, row + k);
}

/* The n <= VL columns from `column` on, as vector v of the nv of a panel. */
INLINE void F(pack_vector)(const lstm_operand *w, ptrdiff_t column, ptrdiff_t n, int nv, int v,
                           PACKED *panel) {
    enum { BLOCK = 16 };  /* k at a time, so that the written lines stay in L1 */
    const ptrdiff_t K = w->K, k_stride = w->k_stride, col_stride = w->col_stride;
    const R *W = (const R *)w->W + column * col_stride;
    for (ptrdiff_t k0 = 0; k0 < K; k0 += BLOCK) {
        ptrdiff_t k1 = MIN(K, k0 + BLOCK);
        if (col_stride != 1 && n == VL && VL >= STEP && k1 - k0 == BLOCK && k_stride == 1) {
            for (ptrdiff_t k = k0; k < k1; k += VL) F(transpose)(W + k, col_stride, panel, nv, v, k);
            continue;
        }
        for (ptrdiff_t k = k0; k < k1; k += STEP) {
            vec row[STEP];
            for (int s = 0; s < STEP; s++) {
                R lanes[VECTOR_BYTES / sizeof(R)] = {0};
                row[s] = F(v_set1)(0);
                if (k + s >= K) continue;
                if (col_stride == 1) {
                    row[s] = F(v_load_n)(W + (k + s) * k_stride, n);
                    continue;
                }
                for (ptrdiff_t l = 0; l < n; l++) lanes[l] = W[(k + s) * k_stride + l * col_stride];
                row[s] = F(v_load)(lanes);
            }
            F(pack_step)(panel, nv, v, k, row);
        }
    }
}
