/* check_pointwise.c: softmax cross-entropy, Adam, and the activations. */

#include <math.h>
#include <stdlib.h>
#include "check.h"

/* Row r of logits is moved by shift, which changes neither softmax nor loss. */
static void check_cross_entropy(ptrdiff_t n, ptrdiff_t V, double scale, double shift) {
    const lstm_kernels *k = under_test;
    matrix weight = new_matrix(1, n), loss = new_matrix(1, n), loss_too = new_matrix(1, n);
    char *z = room(n * V * k->item + k->item), *dz = room(n * V * k->item + k->item);
    matrix rows = new_matrix(n, V), got = new_matrix(n, V), want = new_matrix(n, V);
    int64_t *target = malloc((size_t)(n + 1) * sizeof *target);
    double *want_dz = doubles(&want), *want_loss = doubles(&loss);
    if (n > 1) set(&weight, 0, 1, 0);
    for (ptrdiff_t r = 0; r < n; r++) {
        double sum = 0, top = -INFINITY;
        target[r] = pick(V);
        for (ptrdiff_t j = 0; j < V; j++) {
            set(&rows, r, j, scale * draw() + shift);
            top = fmax(top, get(&rows, r, j));
        }
        for (ptrdiff_t j = 0; j < V; j++) sum += exp(get(&rows, r, j) - top);
        want_loss[r] = log(sum) - (get(&rows, r, target[r]) - top);
        for (ptrdiff_t j = 0; j < V; j++)
            want_dz[r * V + j] = get(&weight, 0, r) *
                (exp(get(&rows, r, j) - top) / sum - (j == target[r]));
    }
    char *z_too = room(n * V * k->item + k->item);
    matrix flat = {1, n * V, (void *[]){z}}, flat_too = {1, n * V, (void *[]){z_too}};
    matrix other_loss = new_matrix(1, n);
    for (ptrdiff_t q = 0; q < n * V; q++) set(&flat, 0, q, get(&rows, q / V, q % V));
    k->cross_entropy(n, V, z, target, weight.row[0], loss.row[0], dz);
    for (ptrdiff_t q = 0; q < n * V; q++)
        check_true(get(&flat, 0, q) == get(&rows, q / V, q % V), "logits are not written to");
    k->cross_entropy(n, V, z, target, weight.row[0], loss_too.row[0], z);  /* dz is z */
    for (ptrdiff_t r = 0; r < n; r++) set(&other_loss, 0, r, -1);
    for (ptrdiff_t q = 0; q < n * V; q++) set(&flat_too, 0, q, get(&rows, q / V, q % V));
    k->cross_entropy(n, V, z_too, target, weight.row[0], other_loss.row[0], NULL);
    check_same(&loss, &other_loss, "the loss alone");
    matrix other = {1, n * V, (void *[]){dz}};
    for (ptrdiff_t q = 0; q < n * V; q++) {
        check_true(get(&flat, 0, q) == get(&other, 0, q), "dz in place or not");
        set(&got, q / V, q % V, get(&other, 0, q));
        if (want_dz[q] == 0) want_dz[q] = fabs(get(&other, 0, q)) == 0 ? get(&other, 0, q) : 0;
    }
    check_close(&got, want_dz, 64, "dz");
    check_close(&loss, want_loss, 64, "loss");
    check_same(&loss, &loss_too, "loss in place or not");
    free_matrix(&weight), free_matrix(&loss), free_matrix(&loss_too), free_matrix(&rows);
    free_matrix(&got), free_matrix(&want);
    free_matrix(&other_loss);
    free(z), free(z_too), free(dz), free(target), free(want_dz), free(want_loss);
}

/* Logits of -inf have no part, nan spoils its row, and a weight of 0 lets nothing through. */
static void check_cross_entropy_edges(ptrdiff_t V, ptrdiff_t at) {
    const int64_t target[] = {0};
    for (int q = 0; q < 3; q++) {
        matrix z = new_matrix(1, V), weight = new_matrix(1, 1), loss = new_matrix(1, 1);
        set(&weight, 0, 0, q < 2);
        set(&z, 0, at, q ? NAN : -INFINITY);
        under_test->cross_entropy(1, V, z.row[0], target, weight.row[0], loss.row[0], z.row[0]);
        for (ptrdiff_t j = 0; j < V; j++)
            check_true(q == 1 ? isnan(get(&z, 0, j)) : isfinite(get(&z, 0, j)), "dz is a number");
        if (q != 1) check_true(get(&z, 0, at) == 0, "dz of what has no part");
        check_true(q == 0 ? isfinite(get(&loss, 0, 0)) : isnan(get(&loss, 0, 0)), "loss is a number");
        free_matrix(&z), free_matrix(&weight), free_matrix(&loss);
    }
}

static void check_adam(ptrdiff_t n) {
    matrix p = new_matrix(1, n), g = new_matrix(1, n), m = new_matrix(1, n), v = new_matrix(1, n);
    double *want = doubles(&p), *want_m = doubles(&m), *want_v = doubles(&v);
    const lstm_adam rule = {0.75, 0.875, 0.5, 1.5, 0.25, 0.75};
    for (ptrdiff_t j = 0; j < n; j++) {
        set(&v, 0, j, fabs(get(&v, 0, j)));
        double decayed = get(&g, 0, j) + 0.25 * want[j];
        want_m[j] = 0.75 * want_m[j] + 0.25 * decayed;
        want_v[j] = 0.875 * get(&v, 0, j) + 0.125 * decayed * decayed;
        want[j] = 0.75 * want[j] - 0.5 * want_m[j] / (sqrt(want_v[j]) + 1.5);
    }
    matrix p1 = copy_of(&p), m1 = copy_of(&m), v1 = copy_of(&v);
    under_test->adam(n, &rule, p.row[0], g.row[0], m.row[0], v.row[0]);
    check_close(&p, want, 8, "p");
    check_close(&m, want_m, 8, "m");
    check_close(&v, want_v, 8, "v");
    for (ptrdiff_t j = 0; j < n; j++) {
        ptrdiff_t at = j * under_test->item;
        under_test->adam(1, &rule, (char *)p1.row[0] + at, (char *)g.row[0] + at,
                         (char *)m1.row[0] + at, (char *)v1.row[0] + at);
    }
    check_same(&p, &p1, "p, whole or cut"), check_same(&m, &m1, "m, whole or cut");
    check_same(&v, &v1, "v, whole or cut");
    free_matrix(&p), free_matrix(&g), free_matrix(&m), free_matrix(&v), free_matrix(&p1);
    free_matrix(&m1), free_matrix(&v1), free(want), free(want_m), free(want_v);
}

/* Within 4 ulp in float32, 2 ulp in float64, of long double; limits, zeros and nan exactly. */
static void check_activation(int is_tanh, ptrdiff_t n, double reach) {
    const double special[] = {0.0, -0.0, INFINITY, -INFINITY, NAN, 1e30, -1e30};
    const ptrdiff_t n_special = sizeof special / sizeof special[0];
    int wide = under_test->item == 8, digits = wide ? 53 : 24;
    double smallest = wide ? 0x1p-1022 : 0x1p-126;
    matrix x = rough_matrix(1, n), y = new_matrix(1, n);
    for (ptrdiff_t j = 0; j < n; j++)
        set(&x, 0, j, j < n_special && n > n_special ? special[j] : reach * get(&x, 0, j));
    (is_tanh ? under_test->tanh : under_test->sigmoid)(n, x.row[0], y.row[0]);
    for (ptrdiff_t j = 0; j < n; j++) {
        double a = get(&x, 0, j), got = get(&y, 0, j);
        long double want = is_tanh ? tanhl(a) : 1 / (1 + expl(-(long double)a));
        int exponent;
        frexpl(want, &exponent);
        if (isnan(a)) check_true(isnan(got), "nan gives nan");
        else if (isinf(a) || a == 0)
            check_true(got == (double)want && !signbit(got) == !signbit(want), "limits and zeros");
        else if (fabsl(want) < smallest) check_true(got >= 0 && got <= smallest, "far below");
        else if (fabsl(got - want) > (wide ? 2.1L : 4) * ldexpl(1, exponent - digits))
            check_close(&y, (double[]){(double)want}, 0, is_tanh ? "tanh" : "sigmoid");
    }
    free_matrix(&x), free_matrix(&y);
}

void check_pointwise(void) {
    const ptrdiff_t VL = under_test->VL;
    const ptrdiff_t widths[] = {1, VL - 1, VL, VL + 1, 2 * VL + 1, 4 * VL + 3};
    const double far = under_test->item == 8 ? 1e300 : 1e37;
    for (size_t w = 0; w < sizeof widths / sizeof widths[0]; w++) {
        ptrdiff_t n = widths[w];
        if (n < 1) continue;
        check_cross_entropy(3, n, 1, 0);
        check_cross_entropy(2, n, 4, 50);
        check_cross_entropy(2, n, 16, -1000);
        check_cross_entropy(2, n, 2000, -5000);  /* most of e^z is no normal number */
        check_cross_entropy(1, n, far / 64, -far);
        check_cross_entropy(0, n, 1, 0);
        if (n > 1) check_cross_entropy_edges(n, n - 1);
        check_adam(n);
        for (int is_tanh = 0; is_tanh < 2; is_tanh++)
            for (int q = 0; q < 4; q++) check_activation(is_tanh, n + 7, q % 2 ? 1 : 20);
    }
    for (int is_tanh = 0; is_tanh < 2; is_tanh++)
        for (double reach = 0x1p-40; reach < 1e4; reach *= 4) check_activation(is_tanh, 2000, reach);
}
