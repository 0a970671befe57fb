/* check_below.c: products below float32 against plain loops, bit by bit, and a step of the LSTM, whose bits
   are those of the first instruction set that was asked. */

#include <math.h>
#include <string.h>
#include "check.h"

static float rounded(float value) {        /* to bfloat16, ties to even; below the smallest normal one 0 */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000u;
    memcpy(&value, &bits, sizeof bits);
    return fabsf(value) < 0x1p-126f ? 0 : value;
}

static float rough(void) { return (float)(draw() * (1 + draw() / 3) * (pick(9) ? 1 : 30)); }

static float scale_of(ptrdiff_t K, const float *a, ptrdiff_t stride, int8_t *q) {
    float most = 0;
    for (ptrdiff_t k = 0; k < K; k++) most = fmaxf(most, fabsf(a[k * stride]));
    for (ptrdiff_t k = 0; k < K; k++) {
        volatile float in_units = a[k * stride] * (127 / most);   /* rounded to a float first */
        q[k] = most < 0x1p-100f ? 0 : (int8_t)rintf(in_units);
    }
    return most < 0x1p-100f ? 0 : most / 127;
}

/* Columns [0, J) of n rows: W (J, K), as rows of k. */
static void check_rows(ptrdiff_t K, ptrdiff_t J, ptrdiff_t n) {
    const lstm_kernels *k = under_test;
    const int integers = strcmp(k->format, "int8") == 0;
    ptrdiff_t panels = (J + 4 * k->VL - 1) / (4 * k->VL);
    ptrdiff_t vectors = (J + k->VL - 1) / k->VL, stride = (k->lowered_bytes(K) + 63) / 64 * 64;
    float *W = room(J * K * 4), *a = room(n * K * 4), *C = room(n * J * 4), *scales = room(J * 4);
    int8_t *q = room(J * K), *q_a = room(n * K);
    char *low = room(n * stride), *panel = room(vectors * k->vector_bytes(K));
    const void **rows = room(n * (ptrdiff_t)sizeof(void *));
    void **out = room(n * (ptrdiff_t)sizeof(void *));
    for (ptrdiff_t j = 0; j < J * K; j++) W[j] = j / K == 2 && integers ? 0x1p-120f : rough();
    for (ptrdiff_t r = 0; r < n * K; r++) a[r] = r / K == 1 ? 0 : rough();
    for (ptrdiff_t r = 0; r < n; r++) {
        rows[r] = low + r * stride, out[r] = C + r * J;
        memset(low + r * stride, 0xA5, (size_t)stride);
        k->lower(K, a + r * K, low + r * stride);
    }
    for (ptrdiff_t j = 0; j < J; j++) scales[j] = scale_of(K, W + j * K, 1, q + j * K);
    lstm_operand w = {1, K, J, integers ? (void *)q : W, 1, K, panel, scales};
    lstm_rows product = {START_ZERO, n, rows, NULL, out};
    k->pack(&w, 0, J, 0, panels);
    k->gemm(&w, 0, J, &product);
    for (ptrdiff_t r = 0; r < n; r++) {
        float scale_a = scale_of(K, a + r * K, 1, q_a + r * K);
        for (ptrdiff_t j = 0; j < J; j++) {
            float sum = 0;
            if (integers)
                for (ptrdiff_t k0 = 0; k0 < K; k0 += 65536) {
                    int64_t whole = 0;
                    for (ptrdiff_t t = k0; t < least(K, k0 + 65536); t++)
                        whole += q[j * K + t] * q_a[r * K + t];
                    sum = fmaf((float)whole, scales[j] * scale_a, sum);
                }
            else
                for (ptrdiff_t t = 0; t < K; t++)
                    sum = fmaf(rounded(a[r * K + t]), rounded(W[j * K + t]), sum);
            check_true(C[r * J + j] == sum, "a product below float32 has the bits of plain loops");
        }
    }
    a[0] = NAN;                            /* what is no number reaches all that reads it, and no more */
    k->lower(K, a, low);
    k->gemm(&w, 0, J, &product);
    for (ptrdiff_t j = 0; j < J; j++)
        check_true(isnan(C[j]) && !(n > 1 && isnan(C[J + j])), "nan stays in its row");
    free(W), free(a), free(C), free(scales), free(q), free(q_a), free(low), free(panel);
    free(rows), free(out);
}

/* dW and db of the formats that train: da and x rounded, db not. */
static void check_gradient(ptrdiff_t K) {
    const lstm_kernels *k = under_test;
    ptrdiff_t M = 2 * k->MR + 1, N = 5 * k->VL + 3;
    float *da = room(K * M * 4), *x = room(K * N * 4), *dW = room(M * N * 4), *db = room(M * 4);
    void *work = room(k->weight_gradient_work(M));
    const void **da_rows = room(K * (ptrdiff_t)sizeof(void *)), **x_rows = room(K * (ptrdiff_t)sizeof(void *));
    for (ptrdiff_t j = 0; j < K * M; j++) da[j] = rough();
    for (ptrdiff_t j = 0; j < K * N; j++) x[j] = rough();
    for (ptrdiff_t t = 0; t < K; t++) da_rows[t] = da + t * M, x_rows[t] = x + t * N;
    lstm_product product = {x_rows, N, dW};
    k->weight_gradient(K, 0, M, da_rows, 1, &product, db, work);
    for (ptrdiff_t m = 0; m < M; m++) {
        float bias = 0;
        for (ptrdiff_t t = 0; t < K; t++) bias += da[t * M + m];
        check_true(db[m] == bias, "db is a sum of numbers that are not rounded");
        for (ptrdiff_t j = 0; j < N; j++) {
            float total = 0;
            for (ptrdiff_t k0 = 0; k0 < K; k0 += 256) {
                float sum = 0;
                for (ptrdiff_t t = k0; t < least(K, k0 + 256); t++)
                    sum = fmaf(rounded(da[t * M + m]), rounded(x[t * N + j]), sum);
                total = k0 ? sum + total : sum;
            }
            check_true(dW[m * N + j] == total, "a gradient below float32 has the bits of plain loops");
        }
    }
    free(da), free(x), free(dW), free(db), free(work), free(da_rows), free(x_rows);
}

enum { I = 5, H = 37, N = 3 };

static void check_step(void) {
    static float first[2][N * H];
    static int known[2];
    const lstm_kernels *k = under_test;
    const int integers = strcmp(k->format, "int8") == 0;
    float W_ih[4 * H * I], W_hh[4 * H * H], x[N * I], h[N * H], c[N * H], gates[N * 4 * H], out[N * H];
    float s_ih[4 * H], s_hh[4 * H], b[4 * H];
    int8_t q_ih[4 * H * I], q_hh[4 * H * H];
    ptrdiff_t panels = (H + k->VL - 1) / k->VL, columns = 4 * panels;
    for (int j = 0; j < 4 * H; j++) {
        b[j] = (float)(j % 7) / 8;
        for (int t = 0; t < I; t++) W_ih[j * I + t] = (float)sin(j * 3 + t) / 2;
        for (int t = 0; t < H; t++) W_hh[j * H + t] = (float)sin(j * 5 + t) / 3;
        s_ih[j] = scale_of(I, W_ih + j * I, 1, q_ih + j * I);
        s_hh[j] = scale_of(H, W_hh + j * H, 1, q_hh + j * H);
    }
    for (int j = 0; j < N * I; j++) x[j] = (float)sin(j);
    for (int j = 0; j < N * H; j++) h[j] = (float)sin(j + 1) / 2, c[j] = (float)sin(j + 2);
    char *low = room(2 * N * 1024);
    void *ih = room(columns * k->vector_bytes(I)), *hh = room(columns * k->vector_bytes(H));
    lstm_operand p = {4, I, H, integers ? (void *)q_ih : W_ih, 1, I, ih, s_ih};
    lstm_operand r = {4, H, H, integers ? (void *)q_hh : W_hh, 1, H, hh, s_hh};
    k->pack(&p, 0, H, 0, panels), k->pack(&r, 0, H, 0, panels);
    lstm_weights w = {I, H, H, ih, hh, b, NULL};
    lstm_row rows[N];
    for (int n = 0; n < N; n++) {
        k->lower(I, x + n * I, low + 2 * n * 1024), k->lower(H, h + n * H, low + (2 * n + 1) * 1024);
        rows[n] = (lstm_row){.x = low + 2 * n * 1024, .h_low = low + (2 * n + 1) * 1024,
                             .c_prev = c + n * H, .gates = gates + n * 4 * H, .c = c + n * H,
                             .h = out + n * H};
    }
    lstm_cell_of(k, "lstm")->step(&w, 0, N, 0, H, rows);
    if (!known[integers]++) memcpy(first[integers], out, sizeof out);
    check_true(memcmp(first[integers], out, sizeof out) == 0,
               "a step below float32 has the same bits on every instruction set");
    free(low), free(ih), free(hh);
}

void check_below(void) {
    const ptrdiff_t VL = under_test->VL, MR = under_test->MR, lengths[] = {1, 2, 3, 4, 5, 37, 64, 1027};
    for (size_t q = 0; q < sizeof lengths / sizeof lengths[0]; q++)
        for (ptrdiff_t J = 3; J < 5 * VL + 3; J += 2 * VL - 1) check_rows(lengths[q], J, 2 * MR + 1);
    if (!under_test->weight_gradient) {
        check_rows(65536 + 3, 3, 2);       /* longer than what an int32 surely holds */
    } else {
        check_gradient(1), check_gradient(37), check_gradient(259);
    }
    check_step();
}
