/* check_norm.c: cells that normalize: a step there and back, in slabs of units, and what has no recurrence. */

#include <math.h>
#include <stdio.h>
#include "check.h"

/* norm(v) of a row of a matrix in doubles, and its scale. */
static double normed(const matrix *a, ptrdiff_t r, ptrdiff_t n, double *out) {
    double mean = 0, squares = 0;
    for (ptrdiff_t j = 0; j < n; j++) mean += get(a, r, j) / (double)n;
    for (ptrdiff_t j = 0; j < n; j++) squares += (get(a, r, j) - mean) * (get(a, r, j) - mean);
    double scale = 1 / sqrt(squares / (double)n + 1e-5);
    for (ptrdiff_t j = 0; j < n; j++) out[j] = (get(a, r, j) - mean) * scale;
    return scale;
}

/* What reaches v, where g ∘ gamma reaches norm(v). */
static void returned(const double *g, const double *gamma, const double *norm, double scale, ptrdiff_t n,
                     double *out) {
    double first = 0, second = 0;
    for (ptrdiff_t j = 0; j < n; j++)
        first += g[j] * gamma[j] / (double)n, second += g[j] * gamma[j] * norm[j] / (double)n;
    for (ptrdiff_t j = 0; j < n; j++) out[j] = scale * (g[j] * gamma[j] - first - norm[j] * second);
}

/* A cell that normalizes: a step of n rows there and back, in slabs of units, and the gradient of norms. */
static void check_step(const lstm_cell *cell, ptrdiff_t n, ptrdiff_t H) {
    ptrdiff_t G = 4 * H, cut = 1 + pick(H);
    matrix ax = new_matrix(n, G), ah = new_matrix(n, G), b = new_matrix(1, G), norms = new_matrix(1, 10 * H);
    matrix c_prev = new_matrix(n, H), gates = new_matrix(n, G), c = new_matrix(n, H), h = new_matrix(n, H);
    matrix moments = new_matrix(n, 6), dy = new_matrix(n, H), dc = new_matrix(n, H), dn = new_matrix(n, H);
    matrix dah = new_matrix(n, G), dnorms = new_matrix(1, 10 * H);
    double *of_x = malloc((size_t)G * 6 * sizeof(double)), *of_h = of_x + G, *of_c = of_h + G;
    double *da = of_c + G, *back = da + G, *dn_c = back + G, *gamma = doubles(&norms);
    double *want_g = doubles(&gates), *want_c = doubles(&c), *want_h = doubles(&h), *want_dc = doubles(&dc);
    double *want_da = doubles(&gates), *want_dah = doubles(&dah), *want_dax = doubles(&ax);
    double *want_norms = doubles(&dnorms);
    lstm_row *rows = calloc((size_t)n + 1, sizeof *rows);
    lstm_back_row *backs = calloc((size_t)n + 1, sizeof *backs);
    lstm_normed *tokens = calloc((size_t)n + 1, sizeof *tokens);
    lstm_weights w = {.H = H, .bias = b.row[0], .norms = norms.row[0]};
    for (ptrdiff_t r = 0; r < n; r++) {
        double scale_x = normed(&ax, r, G, of_x), scale_h = normed(&ah, r, G, of_h);
        for (ptrdiff_t j = 0; j < H; j++) {
            double a[4];
            for (int k = 0; k < 4; k++) {
                ptrdiff_t m = k * H + j;
                a[k] = gamma[m] * of_x[m] + gamma[G + m] * of_h[m] + get(&b, 0, m);
                a[k] = k == 2 ? tanh(a[k]) : 1 / (1 + exp(-a[k]));
                want_g[r * G + m] = a[k];
            }
            want_c[r * H + j] = a[1] * get(&c_prev, r, j) + a[0] * a[2];
        }
        matrix exact = new_matrix(1, H);
        for (ptrdiff_t j = 0; j < H; j++) set(&exact, 0, j, want_c[r * H + j]);
        double scale_c = normed(&exact, 0, H, of_c);
        free_matrix(&exact);
        for (ptrdiff_t j = 0; j < H; j++) {
            double o = want_g[r * G + 3 * H + j], t = tanh(gamma[2 * G + j] * of_c[j] + gamma[2 * G + H + j]);
            want_h[r * H + j] = o * t;
            da[3 * H + j] = get(&dy, r, j) * t * o * (1 - o);
            dn_c[j] = get(&dy, r, j) * o * (1 - t * t);
            want_norms[2 * G + j] = (r ? want_norms[2 * G + j] : 0) + dn_c[j] * of_c[j];
            want_norms[2 * G + H + j] = (r ? want_norms[2 * G + H + j] : 0) + dn_c[j];
        }
        returned(dn_c, gamma + 2 * G, of_c, scale_c, H, back);
        for (ptrdiff_t j = 0; j < H; j++) {
            double i = want_g[r * G + j], f = want_g[r * G + H + j], g = want_g[r * G + 2 * H + j];
            double d = get(&dc, r, j) + back[j];
            da[j] = d * g * i * (1 - i), da[H + j] = d * get(&c_prev, r, j) * f * (1 - f);
            da[2 * H + j] = d * i * (1 - g * g), want_dc[r * H + j] = d * f;
        }
        for (ptrdiff_t m = 0; m < G; m++) {
            want_da[r * G + m] = da[m];
            want_norms[m] = (r ? want_norms[m] : 0) + da[m] * of_x[m];
            want_norms[G + m] = (r ? want_norms[G + m] : 0) + da[m] * of_h[m];
        }
        returned(da, gamma + G, of_h, scale_h, G, want_dah + r * G);
        returned(da, gamma, of_x, scale_x, G, want_dax + r * G);
        rows[r] = (lstm_row){.c_prev = c_prev.row[r], .gates = gates.row[r], .c = c.row[r], .h = h.row[r], .ax = ax.row[r], .ah = ah.row[r], .moments = moments.row[r]};
        backs[r] = (lstm_back_row){.gates = gates.row[r], .c = c.row[r], .c_prev = c_prev.row[r], .dy = dy.row[r], .dc = dc.row[r], .ah = ah.row[r], .dah = dah.row[r], .dn = dn.row[r], .moments = moments.row[r]};
        tokens[r] = (lstm_normed){gates.row[r], ax.row[r], ah.row[r], c.row[r], dn.row[r], moments.row[r]}; /* raw is c */
    }
    for (int part = 0; part < 2; part++)
        cell->norm_step(&w, part, n, 0, cut, rows), cell->norm_step(&w, part, n, cut, H, rows);
    check_close(&gates, want_g, 256, "normalized gates");
    check_close(&c, want_c, 256, "c of normalized gates");
    check_close(&h, want_h, 1024, "h of a normalized c");
    for (int part = 0; part < 3; part++)
        cell->norm_back_step(&w, part, n, 0, cut, backs), cell->norm_back_step(&w, part, n, cut, H, backs);
    check_close(&gates, want_da, 8192, "da, normalized");
    check_close(&dc, want_dc, 8192, "dc, normalized");
    check_close(&dah, want_dah, 8192, "what reaches h W_hh");
    for (ptrdiff_t j = 0; j < 10 * H; j++) set(&dnorms, 0, j, 0);
    cell->norm_gradient(n, H, 0, cut, tokens, dnorms.row[0]);
    cell->norm_gradient(n, H, cut, H, tokens, dnorms.row[0]);
    if (n) check_close(&dnorms, want_norms, 8192, "the gradient of norms");
    cell->norm_inputs(n, H, tokens, norms.row[0]);
    check_close(&ax, want_dax, 8192, "what reaches x W_ih");
    matrix *all[] = {&ax, &ah, &b, &norms, &c_prev, &gates, &c, &h, &moments, &dy, &dc, &dn, &dah, &dnorms};
    for (size_t q = 0; q < sizeof all / sizeof *all; q++) free_matrix(all[q]);
    free(of_x), free(gamma), free(want_g), free(want_c), free(want_h), free(want_dc), free(want_da);
    free(want_dah), free(want_dax), free(want_norms), free(rows), free(backs), free(tokens);
}

/* Likewise a cell that normalizes gates, and whose c goes on normalized. */
static void check_gates_step(const lstm_cell *cell, ptrdiff_t n, ptrdiff_t H) {
    ptrdiff_t G = 4 * H, cut = 1 + pick(H);
    matrix ax = new_matrix(n, G), ah = new_matrix(n, G), b = new_matrix(1, G), norms = new_matrix(1, 6 * H);
    matrix c_prev = new_matrix(n, H), gates = new_matrix(n, G), c = new_matrix(n, H), h = new_matrix(n, H);
    matrix moments = new_matrix(n, 10), dy = new_matrix(n, H), dc = new_matrix(n, H), dn = new_matrix(n, H);
    matrix raw = new_matrix(n, H), dah = new_matrix(n, G), dnorms = new_matrix(1, 6 * H);
    double *of_s = malloc((size_t)G * 5 * sizeof(double)), *da = of_s + G, *of_c = da + G, *back = of_c + G;
    double *dn_c = back + G, *gamma = doubles(&norms), *want_dc = doubles(&dc), *want_norms = doubles(&dnorms);
    double *want_g = doubles(&gates), *want_raw = doubles(&raw), *want_c = doubles(&c), *want_h = doubles(&h);
    double *want_da = doubles(&gates), *want_dah = doubles(&dah);
    lstm_row *rows = calloc((size_t)n + 1, sizeof *rows);
    lstm_back_row *backs = calloc((size_t)n + 1, sizeof *backs);
    lstm_normed *tokens = calloc((size_t)n + 1, sizeof *tokens);
    lstm_weights w = {.H = H, .bias = b.row[0], .norms = norms.row[0]};
    for (ptrdiff_t r = 0; r < n; r++) {
        double scales[4], scale_c;
        for (int k = 0; k < 4; k++) {
            matrix sum = new_matrix(1, H);
            for (ptrdiff_t j = 0; j < H; j++) set(&sum, 0, j, get(&ax, r, k * H + j) + get(&ah, r, k * H + j));
            scales[k] = normed(&sum, 0, H, of_s + k * H);
            free_matrix(&sum);
        }
        for (ptrdiff_t m = 0; m < G; m++) {
            double a = gamma[m] * of_s[m] + get(&b, 0, m);
            want_g[r * G + m] = m / H == 2 ? tanh(a) : 1 / (1 + exp(-a));
        }
        matrix exact = new_matrix(1, H);
        for (ptrdiff_t j = 0; j < H; j++) {
            const double *g = want_g + r * G + j;
            want_raw[r * H + j] = g[H] * get(&c_prev, r, j) + g[0] * g[2 * H];
            set(&exact, 0, j, want_raw[r * H + j]);
        }
        scale_c = normed(&exact, 0, H, of_c);
        free_matrix(&exact);
        for (ptrdiff_t j = 0; j < H; j++) {
            double o = want_g[r * G + 3 * H + j], n_c = gamma[G + j] * of_c[j] + gamma[G + H + j], t = tanh(n_c);
            want_c[r * H + j] = n_c, want_h[r * H + j] = o * t;
            da[3 * H + j] = get(&dy, r, j) * t * o * (1 - o);
            dn_c[j] = get(&dc, r, j) + get(&dy, r, j) * o * (1 - t * t);
            want_norms[G + j] = (r ? want_norms[G + j] : 0) + dn_c[j] * of_c[j];
            want_norms[G + H + j] = (r ? want_norms[G + H + j] : 0) + dn_c[j];
        }
        returned(dn_c, gamma + G, of_c, scale_c, H, back);
        for (ptrdiff_t j = 0; j < H; j++) {
            double i = want_g[r * G + j], f = want_g[r * G + H + j], g = want_g[r * G + 2 * H + j], d = back[j];
            da[j] = d * g * i * (1 - i), da[H + j] = d * get(&c_prev, r, j) * f * (1 - f);
            da[2 * H + j] = d * i * (1 - g * g), want_dc[r * H + j] = d * f;
        }
        for (int k = 0; k < 4; k++)
            returned(da + k * H, gamma + k * H, of_s + k * H, scales[k], H, want_dah + r * G + k * H);
        for (ptrdiff_t m = 0; m < G; m++) {
            want_da[r * G + m] = da[m];
            want_norms[m] = (r ? want_norms[m] : 0) + da[m] * of_s[m];
        }
        rows[r] = (lstm_row){.c_prev = c_prev.row[r], .gates = gates.row[r], .c = c.row[r], .h = h.row[r], .ax = ax.row[r], .ah = ah.row[r], .raw = raw.row[r], .moments = moments.row[r]};
        backs[r] = (lstm_back_row){.gates = gates.row[r], .c = c.row[r], .c_prev = c_prev.row[r], .dy = dy.row[r], .dc = dc.row[r], .ax = ax.row[r], .ah = ah.row[r], .dah = dah.row[r], .dn = dn.row[r], .raw = raw.row[r], .moments = moments.row[r]};
        tokens[r] = (lstm_normed){gates.row[r], ax.row[r], ah.row[r], raw.row[r], dn.row[r], moments.row[r]};
    }
    for (int part = 0; part < 2; part++)
        cell->norm_step(&w, part, n, 0, cut, rows), cell->norm_step(&w, part, n, cut, H, rows);
    check_close(&gates, want_g, 256, "gates normalized one by one");
    check_close(&raw, want_raw, 256, "c before it is normalized");
    check_close(&c, want_c, 1024, "a c that goes on normalized");
    check_close(&h, want_h, 1024, "h of a c that goes on normalized");
    for (int part = 0; part < 3; part++)
        cell->norm_back_step(&w, part, n, 0, cut, backs), cell->norm_back_step(&w, part, n, cut, H, backs);
    check_close(&gates, want_da, 8192, "da of gates normalized one by one");
    check_close(&dc, want_dc, 8192, "dc, through a normalized c");
    check_close(&dah, want_dah, 8192, "what reaches the sums");
    for (ptrdiff_t j = 0; j < 6 * H; j++) set(&dnorms, 0, j, 0);
    cell->norm_gradient(n, H, 0, cut, tokens, dnorms.row[0]);
    cell->norm_gradient(n, H, cut, H, tokens, dnorms.row[0]);
    if (n) check_close(&dnorms, want_norms, 8192, "the gradient of the gates' norms");
    matrix *all[] = {&ax, &ah, &b, &norms, &c_prev, &gates, &c, &h, &moments, &dy, &dc, &dn, &raw, &dah, &dnorms};
    for (size_t q = 0; q < sizeof all / sizeof *all; q++) free_matrix(all[q]);
    free(of_s), free(gamma), free(want_dc), free(want_norms), free(want_g), free(want_raw), free(want_c);
    free(want_h), free(want_da), free(want_dah), free(rows), free(backs), free(tokens);
}

void check_norm(void) {
    const ptrdiff_t VL = under_test->VL;
    const ptrdiff_t widths[] = {2, VL - 1, VL, VL + 1, 2 * VL + 1, 4 * VL, 4 * VL + 1, 9 * VL - 1};
    for (const lstm_cell *cell = under_test->cells; cell->name; cell++) {
        if (!cell->norm_step) continue;
        void (*check)(const lstm_cell *, ptrdiff_t, ptrdiff_t) = cell->keeps_raw ? check_gates_step : check_step;
        for (size_t w = 0; w < sizeof widths / sizeof widths[0]; w++)
            if (widths[w] > 1) check(cell, 1 + pick(7), widths[w]);
        check(cell, 0, VL + 1);
    }
}
