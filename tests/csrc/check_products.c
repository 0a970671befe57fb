/* check_products.c: packing, gemm, gradients of weights and sums of rows. */

#include <string.h>
#include "check.h"

static double element(const void *p, ptrdiff_t q) {
    return under_test->item == 8 ? ((const double *)p)[q] : (double)((const float *)p)[q];
}

/* Panels [first, last) hold what they should, and nothing else is written. */
static void check_pack(int gates, ptrdiff_t K, ptrdiff_t j0, ptrdiff_t j1, int order) {
    const lstm_kernels *k = under_test;
    ptrdiff_t VL = k->VL, width = panel_width(gates), n = (j1 - j0 + width - 1) / width;
    ptrdiff_t H = j1 + 3, columns = gates * H, first = pick(n), last = first + 1 + pick(n - first);
    ptrdiff_t k_stride = order == 0 ? columns + 1 : order == 1 ? 1 : 2;
    ptrdiff_t col_stride = order == 0 ? 1 : order == 1 ? K + 2 : 2 * K + 1;
    matrix W = new_matrix(1, (K - 1) * k_stride + (columns - 1) * col_stride + 1);
    ptrdiff_t numbers = n * K * (gates == 1 ? 4 : gates) * VL;
    char *out = room(numbers * k->packed), *before = room(numbers * k->packed);
    memset(out, 0xA5, (size_t)(numbers * k->packed));
    memcpy(before, out, (size_t)(numbers * k->packed));
    k->pack(&(lstm_operand){.gates = gates, .K = K, .N = H, .W = W.row[0], .k_stride = k_stride,
                            .col_stride = col_stride, .packed = out}, j0, j1, first, last);
    for (ptrdiff_t p = 0; p < n; p++) {
        ptrdiff_t left = j1 - j0 - p * width;
        ptrdiff_t vectors = gates > 1 ? gates : least(4, (left + VL - 1) / VL);
        ptrdiff_t full = p * (gates == 1 ? 4 : gates) * K * VL;
        for (ptrdiff_t q = 0; q < (gates == 1 ? 4 : gates) * K * VL; q++) {
            ptrdiff_t lane = q % VL, v = q / VL % vectors, row = q / VL / vectors;
            ptrdiff_t unit = p * width + lane + (gates == 1 ? v * VL : 0);
            const char *at = out + (full + q) * k->packed;
            if (p < first || p >= last || row >= K)
                check_true(memcmp(at, before, (size_t)k->packed) == 0, "pack writes its panels alone");
            else if (unit >= j1 - j0)
                check_true(element(at, 0) == 0, "panels are padded with zeros");
            else
                check_true(element(at, 0) == get(&W, 0, row * k_stride + (j0 + unit + (gates == 1 ? 0 :
                           v * H)) * col_stride), "a panel holds the operand");
        }
    }
    free_matrix(&W), free(out), free(before);
}

/* C on the columns [j0, j1), each against a plain loop; then in slabs and row by row, to the bit. */
static void check_gemm(int gates, int start, ptrdiff_t n, ptrdiff_t K, ptrdiff_t j0, ptrdiff_t j1) {
    const lstm_kernels *k = under_test;
    ptrdiff_t H = j1 + 2, columns = gates * H, width = panel_width(gates);
    for (int rough = 0; rough < 2; rough++) {
        matrix (*make)(ptrdiff_t, ptrdiff_t) = rough ? rough_matrix : new_matrix;
        matrix a = make(n, K), W = make(1, K * columns + 1), bias = make(1, columns);
        matrix C = make(n, columns), cut = copy_of(&C);
        const void *b = start == START_BIAS ? bias.row[0] : NULL;
        double *want = doubles(&C);
        for (ptrdiff_t r = 0; r < n; r++)
            for (int v = 0; v < gates; v++)
                for (ptrdiff_t j = v * H + j0; j < v * H + j1; j++) {
                    double *c = &want[r * columns + j];
                    *c = start == START_BIAS ? get(&bias, 0, j) : start == START_ADD ? *c : 0;
                    for (ptrdiff_t q = 0; q < K; q++)
                        *c += get(&a, r, q) * get(&W, 0, q * columns + j);
                }
        packed w = pack(gates, K, H, j0, j1, &W, columns, 1);
        const void **low = lowered(&a, K);
        k->gemm(&w.w, j0, j1, &(lstm_rows){start, n, low, b, C.row});
        free(w.panels);
        if (!rough) check_close(&C, want, 0, "C");
        for (ptrdiff_t s = j0; s < j1; s += width) {
            ptrdiff_t e = least(s + width, j1);
            w = pack(gates, K, H, s, e, &W, columns, 1);
            for (ptrdiff_t r = 0; r < n; r++)
                k->gemm(&w.w, s, e, &(lstm_rows){start, 1, low + r, b, cut.row + r});
            free(w.panels);
        }
        check_same(&C, &cut, "C, whole or cut");
        free_lowered(&a, low);
        free_matrix(&a), free_matrix(&W), free_matrix(&bias), free_matrix(&C), free_matrix(&cut);
        free(want);
    }
}

/* dW lies in the only row of a matrix. */
static void check_weight_gradient(ptrdiff_t K, ptrdiff_t M, ptrdiff_t m0, ptrdiff_t m1, int n_products,
                                  int with_db) {
    const lstm_kernels *k = under_test;
    const ptrdiff_t N[] = {k->VL + 1, 1, 4 * k->VL + 3}, block = 256;
    for (int rough = 0; rough < 2; rough++) {
        matrix (*make)(ptrdiff_t, ptrdiff_t) = rough ? rough_matrix : new_matrix;
        matrix da = make(K, M), db = make(1, M), x[3], dW[3], cut[3], cut_db = copy_of(&db);
        lstm_product products[3], cut_products[3];
        void *work = room(k->weight_gradient_work(m1 - m0));
        for (int s = 0; s < n_products; s++) {
            x[s] = make(K, N[s]), dW[s] = make(1, M * N[s]), cut[s] = copy_of(&dW[s]);
            products[s] = (lstm_product){rows_of(&x[s]), N[s], dW[s].row[0]};
            cut_products[s] = (lstm_product){rows_of(&x[s]), N[s], cut[s].row[0]};
        }
        double *want_db = doubles(&db), *want[3];
        for (int s = 0; s < n_products; s++) want[s] = doubles(&dW[s]);
        for (ptrdiff_t m = m0; m < m1; m++) {
            want_db[m] = with_db ? 0 : want_db[m];
            for (ptrdiff_t q = 0; with_db && q < K; q++) want_db[m] += get(&da, q, m);
            for (int s = 0; s < n_products; s++)
                for (ptrdiff_t j = 0; j < N[s]; j++) {
                    double *sum = &want[s][m * N[s] + j];
                    *sum = 0;
                    for (ptrdiff_t q = 0; q < K; q++) *sum += get(&da, q, m) * get(&x[s], q, j);
                }
        }
        k->weight_gradient(K, m0, m1, rows_of(&da), n_products, products, 0,
                           with_db ? db.row[0] : NULL, work);
        free(work);
        if (!rough) check_close(&db, want_db, 0, "db");
        for (int s = 0; s < n_products && !rough; s++) check_close(&dW[s], want[s], 0, "dW");

        /* the same in two ranges of m, and product by product */
        ptrdiff_t ends[] = {m0, m0 + (m1 - m0) / 2, m1};
        for (int e = 0; e < 2; e++)
            for (int s = 0; s < (n_products ? n_products : 1) && ends[e] < ends[e + 1]; s++) {
                work = room(k->weight_gradient_work(ends[e + 1] - ends[e]));
                k->weight_gradient(K, ends[e], ends[e + 1], rows_of(&da), n_products ? 1 : 0,
                                   n_products ? &cut_products[s] : NULL, 0,
                                   with_db ? cut_db.row[0] : NULL, work);
                free(work);
            }
        check_same(&db, &cut_db, "db, whole or cut");
        for (int s = 0; s < n_products; s++) check_same(&dW[s], &cut[s], "dW, whole or cut");

        /* blocks of 256, added in order */
        if (K > block && n_products) {
            double *sum = NULL;
            work = room(k->weight_gradient_work(m1 - m0));
            for (ptrdiff_t q = 0; q < K; q += block) {
                k->weight_gradient(least(block, K - q), m0, m1, rows_of(&da) + q, 1,
                                   &(lstm_product){rows_of(&x[0]) + q, N[0], cut[0].row[0]}, 0, NULL,
                                   work);
                double *part = doubles(&cut[0]);
                for (ptrdiff_t e = m0 * N[0]; sum && e < m1 * N[0]; e++)
                    part[e] = as_number(sum[e] + part[e]);
                free(sum);
                sum = part;
            }
            check_close(&dW[0], sum, 0, "dW in blocks");
            free(sum);
            for (ptrdiff_t q = 0; q < K; q += block)
                k->weight_gradient(least(block, K - q), m0, m1, rows_of(&da) + q, 1,
                                   &(lstm_product){rows_of(&x[0]) + q, N[0], cut[0].row[0]}, q > 0,
                                   with_db ? cut_db.row[0] : NULL, work);
            check_same(&dW[0], &cut[0], "dW, each block added to what is there");
            check_same(&db, &cut_db, "db, each block added to what is there");
            free(work);
        }
        for (int s = 0; s < n_products; s++)
            free_matrix(&x[s]), free_matrix(&dW[s]), free_matrix(&cut[s]), free(want[s]);
        free_matrix(&da), free_matrix(&db), free_matrix(&cut_db), free(want_db);
    }
}

static void check_add_rows(ptrdiff_t n, ptrdiff_t N) {
    matrix a = rough_matrix(n, N), out = rough_matrix(3, N);
    void **row = malloc((size_t)n * sizeof *row);
    double *want = doubles(&out);
    ptrdiff_t j0 = pick(N), j1 = j0 + pick(N - j0 + 1);
    for (ptrdiff_t q = 0; q < n; q++) {
        ptrdiff_t r = q < 2 ? 1 : pick(3);
        row[q] = out.row[r];
        for (ptrdiff_t j = j0; j < j1; j++)
            want[r * N + j] = as_number(want[r * N + j] + get(&a, q, j));
    }
    under_test->add_rows(n, j0, j1, rows_of(&a), row);
    check_close(&out, want, 0, "added rows");
    free_matrix(&a), free_matrix(&out), free(row), free(want);
}

void check_products(void) {
    const ptrdiff_t VL = under_test->VL, MR = under_test->MR;
    const ptrdiff_t widths[] = {1, VL - 1, VL, VL + 1, 2 * VL + 1, 4 * VL, 4 * VL + 1, 9 * VL - 1};
    const ptrdiff_t depths[] = {1, 15, 16, 17, 40}, heights[] = {1, 2, MR, MR + 1, 2 * MR + 1, 8 * MR + 1};
    for (size_t w = 0; w < sizeof widths / sizeof widths[0]; w++) {
        if (widths[w] < 1) continue;
        for (int gates = 1; gates <= 4; gates++)
            for (ptrdiff_t j0 = 0; j0 <= panel_width(gates); j0 += panel_width(gates)) {
                for (size_t d = 0; !under_test->lower && d < sizeof depths / sizeof depths[0]; d++)
                    for (int order = 0; order < 3; order++)
                        check_pack(gates, depths[d], j0, j0 + widths[w], order);
                for (size_t h = 0; h < sizeof heights / sizeof heights[0]; h++)
                    for (int start = START_ZERO; start <= START_ADD; start++)
                        check_gemm(gates, start, heights[h], pick(20), j0, j0 + widths[w]);
            }
        check_add_rows(1 + pick(9), widths[w]);
    }
    check_gemm(1, START_BIAS, 3, 513, 0, 5 * VL + 1);  /* longer than the block of a panel */
    check_gemm(3, START_ADD, 2 * MR, 1030, 0, VL + 1);
    check_gemm(1, START_BIAS, 0, 3, 0, VL);
    under_test->pack(&(lstm_operand){.gates = 1}, 0, VL, 0, 1);
    const ptrdiff_t lengths[] = {1, 3, 255, 256, 257, 700};
    for (size_t q = 0; q < sizeof lengths / sizeof lengths[0]; q++)
        for (int n_products = 0; n_products <= 3; n_products++) {
            ptrdiff_t M = 1 + pick(4 * MR), m0 = pick(M), m1 = m0 + 1 + pick(M - m0);
            check_weight_gradient(lengths[q], M, m0, m1, n_products, 1);
            check_weight_gradient(lengths[q], M, 0, M, n_products, n_products == 0);
            check_weight_gradient(lengths[q], 2 * MR + 3, 1, 2 * MR + 2, n_products, q % 2 == 0);
        }
}
