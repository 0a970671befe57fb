/* pack_floats.h: a vector of columns of W, numbers of the arrays, packed: for formats that round them on
   the way, or not at all.  The format's pack_step says how STEP numbers k lie. */

/* VL vectors, transposed: by interleaving the two halves log2(VL) times. */
INLINE void F(turn)(vec *row) {
    for (int width = 1; width < VL; width *= 2) {
        vec next[VECTOR_BYTES / sizeof(R)];
        for (int l = 0; l < VL / 2; l++) {
            next[2 * l] = F(v_interleave)(row[l], row[l + VL / 2], 0);
            next[2 * l + 1] = F(v_interleave)(row[l], row[l + VL / 2], 1);
        }
        for (int l = 0; l < VL; l++) row[l] = next[l];
    }
}

/* The VL·VL numbers in[l·in_stride + k], packed from k0 on. */
INLINE void F(transpose)(const R *in, ptrdiff_t in_stride, PACKED *panel, ptrdiff_t K, int nv, int v,
                         ptrdiff_t k0) {
    vec row[VECTOR_BYTES / sizeof(R)];
    for (int l = 0; l < VL; l++) row[l] = F(v_load)(in + l * in_stride);
    F(turn)(row);
    for (int k = 0; k < VL; k += STEP) F(pack_step)(panel, K, nv, v, k0 + k, row + k);
}

/* The n <= VL columns from `column` on, as vector v of the nv of a panel. */
INLINE void F(pack_vector)(const lstm_operand *w, ptrdiff_t column, ptrdiff_t n, int nv, int v,
                           PACKED *panel) {
    enum { AT_A_TIME = 16 };  /* k at a time, so that the written lines stay in L1 */
    const ptrdiff_t K = w->K, k_stride = w->k_stride, col_stride = w->col_stride;
    const R *W = (const R *)w->W + column * col_stride;
    for (ptrdiff_t k0 = 0; k0 < F(whole)(K); k0 += AT_A_TIME) {
        ptrdiff_t k1 = MIN(F(whole)(K), k0 + AT_A_TIME);
        if (col_stride != 1 && n == VL && VL >= STEP && k0 + AT_A_TIME <= K && k_stride == 1) {
            for (ptrdiff_t k = k0; k < k1; k += VL) F(transpose)(W + k, col_stride, panel, K, nv, v, k);
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
            F(pack_step)(panel, K, nv, v, k, row);
        }
    }
}
