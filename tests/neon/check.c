/* check.c: the kernels of every instruction set that can run here, against plain loops.

   Sizes around the vector width and the tile; every output row has guards on both sides, which must not
   be written.  Prints one line per instruction set and dtype; exits with 1 at the first difference. */

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "lstm.h"

enum { GUARD = 24, ROWS = 64 };
static const double GUARD_VALUE = 12345.0;

static double draw(void) {  /* uniform in (-1, 1) */
    static uint64_t state = 88172645463325252u;
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (double)(state >> 11) / (1u << 26) / (1u << 26) - 1;
}

/* A matrix of the dtype under test, with guards before and after every row. */
typedef struct {
    ptrdiff_t rows, columns;
    int is_double;
    char *data;
    void *row[ROWS];
} matrix;

static double get(const matrix *a, ptrdiff_t r, ptrdiff_t j) {
    return a->is_double ? ((double *)a->row[r])[j] : ((float *)a->row[r])[j];
}

static void set(matrix *a, ptrdiff_t r, ptrdiff_t j, double value) {
    if (a->is_double) ((double *)a->row[r])[j] = value;
    else ((float *)a->row[r])[j] = (float)value;
}

static matrix new_matrix(ptrdiff_t rows, ptrdiff_t columns, int is_double) {
    size_t item = is_double ? 8 : 4, stride = (size_t)(columns + 2 * GUARD) * item;
    matrix a = {rows, columns, is_double, malloc((size_t)rows * stride), {0}};
    for (ptrdiff_t r = 0; r < rows; r++) {
        a.row[r] = a.data + (size_t)r * stride + GUARD * item;
        for (ptrdiff_t j = -GUARD; j < columns + GUARD; j++)
            set(&a, r, j, j < 0 || j >= columns ? GUARD_VALUE : draw());
    }
    return a;
}

/* Compares with want[r·columns + j], looks at the guards, and frees. */
static void check(matrix *a, const double *want, const char *isa, const char *what) {
    double limit = a->is_double ? 1e-12 : 1e-5;
    for (ptrdiff_t r = 0; r < a->rows; r++)
        for (ptrdiff_t j = -GUARD; j < a->columns + GUARD; j++) {
            int guard = j < 0 || j >= a->columns;
            double expected = guard ? GUARD_VALUE : want[r * a->columns + j];
            if (!(fabs(get(a, r, j) - expected) <= (guard ? 0 : limit * (1 + fabs(expected))))) {
                printf("%s f%d: %s (%td of %td, %td of %td) is %.17g, not %.17g\n", isa,
                       a->is_double ? 64 : 32, what, r, a->rows, j, a->columns, get(a, r, j), expected);
                exit(1);
            }
        }
    free(a->data);
}

static double sigmoid(double a) { return 1 / (1 + exp(-a)); }

/* n numbers of the dtype, and the same as doubles. */
static void *weights(ptrdiff_t n, int is_double, double **values) {
    void *W = malloc((size_t)n * (is_double ? 8 : 4));
    *values = malloc((size_t)n * sizeof(double));
    for (ptrdiff_t q = 0; q < n; q++) {
        float v = (float)draw();
        (*values)[q] = v;
        if (is_double) ((double *)W)[q] = v;
        else ((float *)W)[q] = v;
    }
    return W;
}

/* W[k·k_stride + column·col_stride], packed; the caller frees *block. */
static void *pack(const lstm_kernels *k, int panels, ptrdiff_t K, ptrdiff_t N, const void *W,
                  ptrdiff_t k_stride, ptrdiff_t col_stride, void **block) {
    ptrdiff_t width = panels == PANEL_GATES ? k->VL : 4 * k->VL, n = (N + width - 1) / width;
    *block = malloc((size_t)(n * K * 4 * k->VL) * (k->is_double ? 8 : 4) + 64);
    void *out = (void *)(((uintptr_t)*block + 63) & ~(uintptr_t)63);
    k->pack(panels, K, N, 0, N, 0, n, W, k_stride, col_stride, out);
    return out;
}

static void check_forward(const lstm_kernels *k, ptrdiff_t n, ptrdiff_t H) {
    int d = k->is_double;
    matrix h_prev = new_matrix(n, H, d), c_prev = new_matrix(n, H, d), gates = new_matrix(n, 4 * H, d);
    matrix c = new_matrix(n, H, d), h = new_matrix(n, H, d);
    double *want = malloc(sizeof(double) * (size_t)(n * 6 * H)), *want_c = want + n * 4 * H;
    double *want_h = want_c + n * H, *W_, *p;
    void *W = weights(4 * H * H, d, &W_), *peepholes = weights(3 * H, d, &p), *block;
    lstm_row rows[ROWS];
    for (ptrdiff_t r = 0; r < n; r++) {
        rows[r] = (lstm_row){NULL, h_prev.row[r], c_prev.row[r], gates.row[r], c.row[r], h.row[r]};
        for (ptrdiff_t j = 0; j < H; j++) {
            double a[4];
            for (int v = 0; v < 4; v++) {
                a[v] = get(&gates, r, v * H + j);
                for (ptrdiff_t q = 0; q < H; q++) a[v] += get(&h_prev, r, q) * W_[(v * H + j) * H + q];
            }
            double before = get(&c_prev, r, j), i = sigmoid(a[0] + p[j] * before);
            double f = sigmoid(a[1] + p[H + j] * before), g = tanh(a[2]), now = f * before + i * g;
            double o = sigmoid(a[3] + p[2 * H + j] * now);
            want[r * 4 * H + j] = i, want[r * 4 * H + H + j] = f;
            want[r * 4 * H + 2 * H + j] = g, want[r * 4 * H + 3 * H + j] = o;
            want_c[r * H + j] = now, want_h[r * H + j] = o * tanh(now);
        }
    }
    void *packed = pack(k, PANEL_GATES, H, H, W, 1, H, &block);
    lstm_weights w = {0, H, H, NULL, packed, NULL, peepholes};
    k->lstm_step(&w, n % 2, n, 0, H, rows);
    check(&gates, want, k->isa, "gates");
    check(&c, want_c, k->isa, "c");
    check(&h, want_h, k->isa, "h");
    free(h_prev.data), free(c_prev.data), free(want), free(W_), free(W), free(p), free(peepholes);
    free(block);
}

static void check_gemm(const lstm_kernels *k, ptrdiff_t n, ptrdiff_t K, ptrdiff_t N) {
    matrix a = new_matrix(n, K, k->is_double);
    matrix C = new_matrix(n, N, k->is_double);
    double *W_;
    void *W = weights(K * N, k->is_double, &W_), *block;
    double *want = malloc(sizeof(double) * (size_t)(n * N));
    for (ptrdiff_t r = 0; r < n; r++)
        for (ptrdiff_t j = 0; j < N; j++) {
            want[r * N + j] = get(&C, r, j);
            for (ptrdiff_t q = 0; q < K; q++) want[r * N + j] += get(&a, r, q) * W_[q * N + j];
        }
    void *packed = pack(k, PANEL_PLAIN, K, N, W, N, 1, &block);
    k->gemm(PANEL_PLAIN, START_ADD, n, K, 0, 0, N, (const void *const *)a.row, packed, NULL, C.row);
    check(&C, want, k->isa, "C");
    free(a.data), free(W), free(W_), free(want), free(block);
}

static void check_backward(const lstm_kernels *k, ptrdiff_t n, ptrdiff_t H) {
    int d = k->is_double;
    matrix da = new_matrix(n, 4 * H, d), gates = new_matrix(n, 4 * H, d), c = new_matrix(n, H, d);
    matrix c_prev = new_matrix(n, H, d), dy = new_matrix(n, H, d), dc = new_matrix(n, H, d);
    double *W_;
    void *W = weights(4 * H * H, d, &W_), *block;
    double *want = malloc(sizeof(double) * (size_t)(n * 5 * H)), *want_dc = want + n * 4 * H;
    lstm_back_row rows[ROWS];
    for (ptrdiff_t r = 0; r < n; r++) {
        rows[r] = (lstm_back_row){da.row[r],     gates.row[r], c.row[r],
                                  c_prev.row[r], dy.row[r],    dc.row[r]};
        for (ptrdiff_t j = 0; j < H; j++) {
            double dh = get(&dy, r, j), i = get(&gates, r, j), f = get(&gates, r, H + j);
            double g = get(&gates, r, 2 * H + j), o = get(&gates, r, 3 * H + j);
            double t = tanh(get(&c, r, j));
            for (ptrdiff_t q = 0; q < 4 * H; q++) dh += get(&da, r, q) * W_[q * H + j];
            double dc_t = get(&dc, r, j) + dh * o * (1 - t * t);
            want[r * 4 * H + j] = dc_t * g * i * (1 - i);
            want[r * 4 * H + H + j] = dc_t * get(&c_prev, r, j) * f * (1 - f);
            want[r * 4 * H + 2 * H + j] = dc_t * i * (1 - g * g);
            want[r * 4 * H + 3 * H + j] = dh * t * o * (1 - o);
            want_dc[r * H + j] = dc_t * f;
        }
    }
    void *packed = pack(k, PANEL_PLAIN, 4 * H, H, W, H, 1, &block);
    lstm_weights w = {0, 4 * H, H, NULL, packed, NULL, NULL};
    k->lstm_back_step(&w, n % 2, n, 0, H, rows);
    check(&gates, want, k->isa, "da");
    check(&dc, want_dc, k->isa, "dc");
    free(da.data), free(c.data), free(c_prev.data), free(dy.data), free(W), free(W_), free(want);
    free(block);
}

static void check_cross_entropy(const lstm_kernels *k, ptrdiff_t n, ptrdiff_t V) {
    int d = k->is_double;
    matrix z = new_matrix(n, V, d), weight = new_matrix(1, n, d), loss = new_matrix(1, n, d);
    double *want = malloc(sizeof(double) * (size_t)(n * V + n)), *want_loss = want + n * V;
    int64_t target[ROWS];
    for (ptrdiff_t r = 0; r < n; r++) {
        double sum = 0;
        target[r] = (r * 7 + V / 2) % V;
        for (ptrdiff_t j = 0; j < V; j++) sum += exp(get(&z, r, j));
        want_loss[r] = log(sum) - get(&z, r, target[r]);
        for (ptrdiff_t j = 0; j < V; j++)
            want[r * V + j] = get(&weight, 0, r) * (exp(get(&z, r, j)) / sum - (j == target[r]));
    }
    for (ptrdiff_t r = 0; r < n; r++) {
        ptrdiff_t at = r * (d ? 8 : 4);
        k->cross_entropy(1, V, z.row[r], target + r, (char *)weight.row[0] + at,
                         (char *)loss.row[0] + at, z.row[r]);
    }
    check(&z, want, k->isa, "dz");
    check(&loss, want_loss, k->isa, "loss");
    free(weight.data), free(want);
}

static void check_adam(const lstm_kernels *k, ptrdiff_t n) {
    int d = k->is_double;
    matrix p = new_matrix(1, n, d), g = new_matrix(1, n, d), m = new_matrix(1, n, d);
    matrix v = new_matrix(1, n, d);
    double *want = malloc(sizeof(double) * (size_t)(3 * n)), *want_m = want + n, *want_v = want_m + n;
    lstm_adam rule = {0.75, 0.875, 0.5, 1.5, 0.25, 0.75};
    for (ptrdiff_t j = 0; j < n; j++) {
        set(&v, 0, j, fabs(get(&v, 0, j)));
        double decayed = get(&g, 0, j) + 0.25 * get(&p, 0, j);
        want_m[j] = 0.75 * get(&m, 0, j) + 0.25 * decayed;
        want_v[j] = 0.875 * get(&v, 0, j) + 0.125 * decayed * decayed;
        want[j] = 0.75 * get(&p, 0, j) - 0.5 * want_m[j] / (sqrt(want_v[j]) + 1.5);
    }
    k->adam(n, &rule, p.row[0], g.row[0], m.row[0], v.row[0]);
    check(&p, want, k->isa, "p");
    check(&m, want_m, k->isa, "m");
    check(&v, want_v, k->isa, "v");
    free(g.data), free(want);
}

int main(void) {
    for (int q = 0; lstm_isa(q); q++)
        for (int is_double = 0; is_double < 2; is_double++) {
            const lstm_kernels *k = lstm_kernels_for(lstm_isa(q), is_double);
            const ptrdiff_t VL = k->VL, widths[] = {1, VL - 1, VL, VL + 1, 2 * VL + 1, 4 * VL + 1};
            for (size_t w = 0; w < sizeof widths / sizeof widths[0]; w++)
                for (ptrdiff_t n = 1; n <= 2 * k->MR + 1 && widths[w] > 0; n++) {
                    check_forward(k, n, widths[w]);
                    check_backward(k, n, widths[w]);
                    check_gemm(k, n, 2 * n + 1, widths[w]);
                    check_cross_entropy(k, n, widths[w]);
                    check_adam(k, widths[w]);
                }
            printf("%s f%d: agrees\n", k->isa, is_double ? 64 : 32);
        }
    return 0;
}
