/* check_formats.c: the number formats below float32, whose bits every instruction set shares.

   A product of them is compared with plain sums, bit by bit: of bfloat16 those of format_bfloat16.h, one
   fmaf for each k on rounded operands, of int8 one fmaf for each block of 65,536 k on an exact sum.  A step is compared with
   products and then the cell; what the steps hash to is printed, for tests/csrc/run to compare between
   instruction sets and machines. */

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include "check.h"

static int is_int8(void) { return strcmp(under_test->format, "int8") == 0; }

static uint32_t bits_of(float a) {
    uint32_t b;
    memcpy(&b, &a, sizeof b);
    return b;
}

static float flushed(float a) { return fabsf(a) < 0x1p-126f ? copysignf(0, a) : a; }

/* To nearest of the two neighbors among numbers of 8 bits, to the even one halfway. */
static float to_bfloat16(float a) {
    uint32_t b = bits_of(a), rest = b & 0xFFFF;
    if (isnan(a)) return a;
    b -= rest;
    if (rest > 0x8000 || (rest == 0x8000 && b & 0x10000)) b += 0x10000;
    memcpy(&a, &b, sizeof a);
    return a;
}

/* What is hard to round or to multiply, and otherwise rough numbers of all sizes about 1. */
static float hard(int tame) {
    const float some[] = {0, -0.0f, 1, -1, 1.00390625f, 1.01171875f, -1.00390631f, 0x1p-126f, 0x1p-130f,
                          -0x1.8p-127f, 0x1p-70f, -0x1.8p-64f, 0x1.01p-63f, 3e38f, INFINITY, NAN};
    const uint32_t all_ones = 0x7FFFFFFF;  /* the nan that rounding up would make -0 */
    if (!tame && pick(60) == 0) {
        float a;
        memcpy(&a, &all_ones, sizeof a);
        return a;
    }
    ptrdiff_t q = tame == 3 ? 60 : pick(tame ? 60 : 24);
    if (q < (tame ? 14 : 16)) return some[q] > 1e30f ? (tame ? 0.5f : some[q]) : some[q];
    float fraction = (float)pick(1 << 24) / (1 << 23) - 1;  /* drawn first, in every compiler's order */
    return ldexpf(fraction, (int)pick(9) - 4);
}

/* W[k, column] in three orders of memory, as plain numbers, and packed. */
typedef struct {
    ptrdiff_t K, columns;
    float *W, *scales;  /* W[column·K + k] */
    packed panels;
    void *raw;
} operand;

static operand new_operand(int gates, ptrdiff_t K, ptrdiff_t H, ptrdiff_t j0, ptrdiff_t j1, int order,
                           int tame) {
    ptrdiff_t columns = gates * H, k_stride = order ? 1 : columns, col_stride = order ? K : 1;
    operand w = {K, columns, malloc(sizeof(float) * (size_t)(K * columns + 1)),
                 malloc(sizeof(float) * (size_t)columns), {.bytes = 0}, NULL};
    size_t item = is_int8() ? 1 : sizeof(float);
    w.raw = malloc(item * (size_t)(K * columns + 1));
    for (ptrdiff_t j = 0; j < columns; j++) {
        w.scales[j] = ldexpf((float)(1 + pick(999)) / 1000, -7);
        for (ptrdiff_t k = 0; k < K; k++) {
            ptrdiff_t at = k * k_stride + j * col_stride;
            int top = tame == 2;  /* the largest sums that there can be */
            int8_t q = (int8_t)(top ? (j % 2 ? -127 : 127) : pick(9) ? pick(255) - 127 : 127);
            w.W[j * K + k] = is_int8() ? q : hard(tame);
            if (is_int8()) ((int8_t *)w.raw)[at] = q;
            else ((float *)w.raw)[at] = w.W[j * K + k];
        }
    }
    ptrdiff_t width = panel_width(gates), n = (j1 - j0 + width - 1) / width;
    ptrdiff_t vectors = gates == 1 ? (j1 - j0 + under_test->VL - 1) / under_test->VL : n * gates;
    w.panels.bytes = (size_t)(vectors * under_test->vector_bytes(K));
    w.panels.panels = room((ptrdiff_t)w.panels.bytes + 1);
    memset(w.panels.panels, 0xA5, w.panels.bytes);
    w.panels.w = (lstm_operand){gates, K, H, w.raw, k_stride, col_stride, w.panels.panels,
                                is_int8() ? w.scales : NULL, gates > 1 ? (int)pick(gates) : 0};
    under_test->pack(&w.panels.w, j0, j1, 0, n);
    return w;
}

static void free_operand(operand *w) {
    free(w->W), free(w->scales), free(w->raw), free(w->panels.panels);
}

/* out + a block of K <= 32 numbers of a and b, rounded to bfloat16: the even ones, the odd ones, both. */
static float block(ptrdiff_t K, const float *a, const float *b, float out) {
    float sums[2] = {0, 0};
    for (ptrdiff_t k = 0; k < 32; k++) {
        float x = k < K ? to_bfloat16(a[k]) : 0, y = k < K ? to_bfloat16(b[k]) : 0;
        sums[k % 2] = flushed(fmaf(flushed(x), flushed(y), sums[k % 2]));
    }
    return flushed(flushed(out) + flushed(sums[0] + sums[1]));
}

/* start + Σ_k a[k] W[k, column], a column of the product: W begins with another gate. */
static float plain(const float *a, const operand *w, ptrdiff_t column, float start) {
    column = (column + w->panels.w.turn * w->panels.w.N) % w->columns;
    const float *W = w->W + column * w->K;
    if (!is_int8()) {
        for (ptrdiff_t k = 0; k < w->K; k += 32) start = block(least(32, w->K - k), a + k, W + k, start);
        return start;
    }
    float top = 0, scale;
    int fit = 1;
    for (ptrdiff_t k = 0; k < w->K; k++) {
        if (!isfinite(a[k])) fit = 0;
        top = fmaxf(top, fabsf(a[k]));
    }
    scale = !fit ? NAN : top < 0x1p-100f ? 0 : top / 127;
    for (ptrdiff_t k = 0; k < w->K; k += 65536) {
        int64_t sum = 0;
        for (ptrdiff_t q = k; q < least(k + 65536, w->K) && fit && scale > 0; q++)
            sum += (int64_t)rintf(a[q] * (127 / top)) * (int64_t)W[q];
        start = fmaf((float)sum, scale * w->scales[column], start);
    }
    return start;
}

static void check_denormals(void) {
    volatile float tiny = 0x1p-130f;
    check_true(tiny * 0.5f != 0, "denormals are numbers after a product");
}

/* Blocks of 256 k, each a chain from zero. */
static void check_gradient(ptrdiff_t K, ptrdiff_t M, ptrdiff_t N) {
    matrix da = new_matrix(K, M), x = new_matrix(K, N), dW = new_matrix(1, M * N);
    double *want = doubles(&dW);
    for (ptrdiff_t k = 0; k < K; k++) {
        for (ptrdiff_t m = 0; m < M; m++) set(&da, k, m, hard(1));
        for (ptrdiff_t j = 0; j < N; j++) set(&x, k, j, hard(1));
    }
    for (ptrdiff_t q = 0; q < M * N; q++)
        for (ptrdiff_t k0 = 0; k0 < K; k0 += 256) {
            float sum = 0, left[32], right[32];
            for (ptrdiff_t k = k0; k < least(k0 + 256, K); k += 32) {
                for (ptrdiff_t s = 0; s < least(32, K - k); s++)
                    left[s] = (float)get(&da, k + s, q / N), right[s] = (float)get(&x, k + s, q % N);
                sum = block(least(32, K - k), left, right, sum);
            }
            want[q] = k0 ? (float)want[q] + sum : sum;
        }
    void *work = room(under_test->weight_gradient_work(M));
    under_test->weight_gradient(K, 0, M, rows_of(&da), 1,
                                &(lstm_product){rows_of(&x), N, dW.row[0]}, 0, NULL, work);
    check_close(&dW, want, 0, "dW of rounded numbers");
    for (ptrdiff_t k0 = 0; k0 < K; k0 += 256)
        under_test->weight_gradient(least(256, K - k0), 0, M, rows_of(&da) + k0, 1,
                                    &(lstm_product){rows_of(&x) + k0, N, dW.row[0]}, k0 > 0, NULL,
                                    work);
    check_close(&dW, want, 0, "dW of rounded numbers, each block added to what is there");
    check_denormals();
    free(work), free(want), free_matrix(&da), free_matrix(&x), free_matrix(&dW);
}

static void check_product(int gates, int start, ptrdiff_t n, ptrdiff_t K, ptrdiff_t j0, ptrdiff_t j1,
                          int order, int tame) {
    ptrdiff_t H = j1 + 2, columns = gates * H;
    operand w = new_operand(gates, K, H, j0, j1, order, tame);
    matrix a = new_matrix(n, K), bias = new_matrix(1, columns), C = new_matrix(n, columns);
    for (ptrdiff_t r = 0; r < n; r++) {
        float size = r % 4 == 1 ? 0x1p-101f : r % 4 == 2 ? 0 : 1;  /* of int8: tiny and zero rows */
        for (ptrdiff_t k = 0; k < K; k++) {
            float x = tame == 2 ? (k % 7 ? -1 : 1) : hard(is_int8() || tame);
            if (is_int8() && tame == 1 && k % 3 == 0) x = ((float)pick(253) - 126 + 0.5f) / 127;
            if (is_int8() && isfinite(x)) x *= tame == 2 ? 1 : size;
            set(&a, r, k, x);
        }
        if (is_int8() && tame < 2 && pick(8) == 0) set(&a, r, pick(K), pick(2) ? NAN : -INFINITY);
    }
    for (ptrdiff_t j = 0; j < columns; j++) set(&bias, 0, j, hard(1));
    double *want = doubles(&C);
    for (ptrdiff_t r = 0; r < n; r++)
        for (int v = 0; v < gates; v++)
            for (ptrdiff_t j = v * H + j0; j < v * H + j1; j++)
                want[r * columns + j] = plain(a.row[r], &w, j,
                    start == START_BIAS ? ((float *)bias.row[0])[j]
                    : start == START_ADD ? ((float *)C.row[r])[j] : 0);
    const void **low = lowered(&a, K);
    under_test->gemm(&w.panels.w, j0, j1, &(lstm_rows){start, n, low, bias.row[0], C.row});
    check_close(&C, want, 0, "a product of rounded numbers");
    check_denormals();
    free_lowered(&a, low), free(want), free_operand(&w);
    free_matrix(&a), free_matrix(&bias), free_matrix(&C);
}

static uint64_t hashed(uint64_t hash, const matrix *a) {
    for (ptrdiff_t r = 0; r < a->rows; r++)
        for (ptrdiff_t j = 0; j < a->columns; j++)
            hash = (hash ^ bits_of((float)get(a, r, j))) * UINT64_C(0x100000001B3);
    return hash;
}

/* A step, and the same as two products and a step without any. */
static uint64_t check_step(const lstm_cell *cell, ptrdiff_t n, ptrdiff_t I, ptrdiff_t K, ptrdiff_t H,
                           uint64_t hash) {
    int fed = cell->gates - cell->apart, heard = fed - cell->later;
    operand ih = new_operand(fed, I, H, 0, H, 1, 3), hh = new_operand(heard, K, H, 0, H, 1, 3);
    matrix x = rough_matrix(n, I), h_prev = rough_matrix(n, K < H ? H : K), c_prev = rough_matrix(n, H);
    matrix gates = new_matrix(n, cell->gates * H), c = new_matrix(n, H), h = new_matrix(n, H);
    matrix other = copy_of(&gates), other_c = copy_of(&c), other_h = copy_of(&h);
    matrix bias = rough_matrix(1, cell->gates * H);
    const void **x_low = lowered(&x, I), **h_low = lowered(&h_prev, K);
    lstm_row *rows = calloc((size_t)n, sizeof *rows);
    void **from = malloc((size_t)n * sizeof *from);
    for (ptrdiff_t r = 0; r < n; r++) {
        from[r] = (float *)other.row[r] + cell->apart * H;
        for (ptrdiff_t j = 0; j < cell->gates * H; j++) set(&other, r, j, get(&bias, 0, j));
        rows[r] = (lstm_row){.x = x_low[r], .h_low = h_low[r], .h_prev = h_prev.row[r],
                             .c_prev = c_prev.row[r], .gates = gates.row[r], .c = c.row[r],
                             .h = h.row[r], .m = h.row[r]};
    }
    const lstm_variant variant = {{HARD_SIGMOID, 0.2, 0.5}, {ELU, 0.8, 1.2}, {SOFTSIGN, 0, 0},
                                  1, 1.5, 0, 1, 0.2, 0.4};
    cell->step(&(lstm_weights){.I = I, .K = K, .H = H, .ih = ih.panels.panels, .hh = hh.panels.panels,
                               .bias = bias.row[0], .variant = &variant}, 0, n, 0, H, rows);
    under_test->gemm(&ih.panels.w, 0, H, &(lstm_rows){START_ADD, n, x_low, NULL, other.row});
    under_test->gemm(&hh.panels.w, 0, H, &(lstm_rows){START_ADD, n, h_low, NULL, from});
    for (ptrdiff_t r = 0; r < n; r++)
        rows[r].gates = other.row[r], rows[r].c = other_c.row[r],
        rows[r].h = rows[r].m = other_h.row[r];
    cell->step(&(lstm_weights){.H = H, .variant = &variant}, 0, n, 0, H, rows);
    check_same(&h, &other_h, "h of a step, or of its products");
    if (cell->has_c) check_same(&c, &other_c, "c of a step, or of its products");
    if (cell->keeps_gates) check_same(&gates, &other, "gates of a step, or of its products");
    hash = hashed(hash, &h);
    if (cell->has_c) hash = hashed(hash, &c);
    free(rows), free(from), free_lowered(&x, x_low), free_lowered(&h_prev, h_low);
    free_operand(&ih), free_operand(&hh), free_matrix(&x), free_matrix(&h_prev), free_matrix(&c_prev);
    free_matrix(&gates), free_matrix(&c), free_matrix(&h), free_matrix(&bias);
    free_matrix(&other), free_matrix(&other_c), free_matrix(&other_h);
    return hash;
}

void check_formats(void) {
    const ptrdiff_t VL = under_test->VL, MR = under_test->MR;
    const ptrdiff_t depths[] = {1, 2, 3, 4, 5, 7, 15, 16, 17, 33, 67};
    for (size_t d = 0; d < sizeof depths / sizeof depths[0]; d++)
        for (int gates = 1; gates <= 4; gates++)
            for (int tame = 0; tame < 2; tame++)
                check_product(gates, (int)pick(3), 1 + pick(2 * MR + 2), depths[d],
                              pick(2) * panel_width(gates),
                              panel_width(gates) * (1 + pick(2)) + 1 + pick(VL), (int)pick(2), tame);
    check_product(1, START_BIAS, MR + 1, 1027, 0, 4 * VL + 1, 0, 1);  /* longer than a block */
    check_product(3, START_ADD, MR + 2, 2051, 0, VL + 1, 1, 1);
    check_product(4, START_ADD, 4 * MR, 70, 0, VL + 1, 1, 1);         /* several tiles of rows */
    check_product(4, START_BIAS, 3 * MR + 1, 1100, 0, VL, 0, 1);
    if (is_int8())
        for (int tame = 1; tame <= 2; tame++) {
            check_product(1, START_BIAS, MR + 1, 65536 + 5, 0, VL + 1, 0, tame);
            check_product(2, START_ADD, 2, 131072, 0, VL, 1, tame);
        }
    for (ptrdiff_t K = 1; K < 600 && under_test->weight_gradient; K += 85)
        check_gradient(K, MR + 2, VL + 3);
    uint64_t hash = UINT64_C(0xCBF29CE484222325);
    restart();
    for (const lstm_cell *cell = under_test->cells; cell->name; cell++)
        for (ptrdiff_t H = 1; H < 80; H += 13) hash = check_step(cell, 1 + H % 9, H + 1, H, H, hash);
    /* so large that the next panel is fetched meanwhile */
    if (strcmp(under_test->isa, "amx") == 0 && !is_int8())
        check_step(lstm_cell_of(under_test, "lstm"), 117, 4160, 4100, 17, hash);
    printf("the steps of %s: %016" PRIx64 "\n", under_test->format, hash);
}
