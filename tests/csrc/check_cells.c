/* check_cells.c: every cell of the table: its step forward and backward, and what else its row has.

   A cell is known here by its equations on one unit, in doubles; one without them is an error, so that a
   new cell cannot go unchecked. */

#include <math.h>
#include <stdio.h>
#include <string.h>
#include "check.h"

enum { MOST_GATES = 4 };

/* One unit of one row. */
typedef struct {
    double a[MOST_GATES], gates[MOST_GATES];  /* before activation and after; backward, a are da */
    double p[3];                              /* its peepholes, zero where there are none */
    double h_prev, c_prev, h, c;
    double dh, dc;  /* backward: what reaches h_t and c_t; then, but through a, h_{t-1} and c_{t-1} */
} unit;

typedef struct {
    const char *name;
    int gates, apart, later, keeps_gates, has_c, reads_h, has_peepholes, has_output;
    void (*forward)(unit *u);
    void (*backward)(unit *u);
} equations;

static double sigmoid(double a) { return 1 / (1 + exp(-a)); }

static void lstm_forward(unit *u) {
    double i = sigmoid(u->a[0] + u->p[0] * u->c_prev), f = sigmoid(u->a[1] + u->p[1] * u->c_prev);
    double g = tanh(u->a[2]);
    u->c = f * u->c_prev + i * g;
    double o = sigmoid(u->a[3] + u->p[2] * u->c);
    u->h = o * tanh(u->c);
    u->gates[0] = i, u->gates[1] = f, u->gates[2] = g, u->gates[3] = o;
}

static void lstm_backward(unit *u) {
    double i = u->gates[0], f = u->gates[1], g = u->gates[2], o = u->gates[3], t = tanh(u->c);
    u->a[3] = u->dh * t * o * (1 - o);
    double dc = u->dc + u->dh * o * (1 - t * t) + u->p[2] * u->a[3];
    u->a[0] = dc * g * i * (1 - i);
    u->a[1] = dc * u->c_prev * f * (1 - f);
    u->a[2] = dc * i * (1 - g * g);
    u->dc = dc * f + u->p[0] * u->a[0] + u->p[1] * u->a[1];
}

static const lstm_variant variants[] = {
    {{SIGMOID, 0, 0}, {TANH, 1, 1}, {TANH, 1, 1}, 0, 0, 0, 0, 0, 0},
    {{HARD_SIGMOID, 0.2, 0.5}, {SOFTSIGN, 0, 0}, {TANH, 1.5, 0.7}, 1, 0.9, 1, 0, 0, 0},
    {{SIGMOID, 0, 0}, {LEAKY_RELU, 0.1, 0}, {THRESHOLDED_RELU, 0.2, 0}, 0, 0, 0, 1, 0.2, 0.4},
    {{HARD_SIGMOID, 0.3, 0.4}, {ELU, 0.8, 1.2}, {AFFINE, 0.5, 0.1}, 1, 1.5, 0, 1, 0.5, 0},
};
static const lstm_variant *variant = variants;      /* of the cell that varies, in this check */

static double activation(const lstm_activation *A, double x) {
    switch (A->kind) {
    case SIGMOID: return sigmoid(x);
    case TANH: return A->alpha * tanh(A->beta * x);
    case AFFINE: return A->alpha * x + A->beta;
    case HARD_SIGMOID: return fmax(0, fmin(1, A->alpha * x + A->beta));
    case LEAKY_RELU: return x > 0 ? x : A->alpha * x;
    case THRESHOLDED_RELU: return x > A->alpha ? x : 0;
    case SOFTSIGN: return x / (1 + fabs(x));
    default: return A->beta * (x > 0 ? x : A->alpha * expm1(x));
    }
}

/* A'(x), where y = A(x). */
static double slope(const lstm_activation *A, double y) {
    switch (A->kind) {
    case SIGMOID: return y * (1 - y);
    case TANH: return A->beta * (A->alpha - y * y / A->alpha);
    case AFFINE: return A->alpha;
    case HARD_SIGMOID: return y > 0 && y < 1 ? A->alpha : 0;
    case LEAKY_RELU: return y > 0 ? 1 : A->alpha;
    case THRESHOLDED_RELU: return y > 0;
    case SOFTSIGN: return (1 - fabs(y)) * (1 - fabs(y));
    default: return y > 0 ? A->beta : y + A->alpha * A->beta;
    }
}

static double clipped(const lstm_activation *A, double x) {
    return activation(A, variant->clips ? fmax(-variant->clip, fmin(variant->clip, x)) : x);
}

static double clipped_slope(const lstm_activation *A, double y) {
    int inside = !variant->clips ||
                 (y > activation(A, -variant->clip) && y < activation(A, variant->clip));
    return inside ? slope(A, y) : 0;
}

static void varied_forward(unit *u) {
    double i = clipped(&variant->gate, u->a[0] + u->p[0] * u->c_prev);
    double f = variant->coupled ? 1 - i : clipped(&variant->gate, u->a[1] + u->p[1] * u->c_prev);
    double g = clipped(&variant->candidate, u->a[2]), c = f * u->c_prev + i * g;
    double o = clipped(&variant->gate, u->a[3] + u->p[2] * c), h = o * activation(&variant->cell, c);
    double z_h = variant->zones ? variant->zone_h : 0, z_c = variant->zones ? variant->zone_c : 0;
    u->c = z_c * u->c_prev + (1 - z_c) * c, u->h = z_h * u->h_prev + (1 - z_h) * h;
    u->gates[0] = i, u->gates[1] = f, u->gates[2] = g, u->gates[3] = o;
}

static void varied_backward(unit *u) {
    double i = u->gates[0], f = u->gates[1], g = u->gates[2], o = u->gates[3];
    double z_h = variant->zones ? variant->zone_h : 0, z_c = variant->zones ? variant->zone_c : 0;
    double t = activation(&variant->cell, f * u->c_prev + i * g), dh = (1 - z_h) * u->dh;
    u->a[3] = dh * t * clipped_slope(&variant->gate, o);
    double dc = (1 - z_c) * u->dc + dh * o * slope(&variant->cell, t) + u->p[2] * u->a[3];
    u->a[0] = dc * (variant->coupled ? g - u->c_prev : g) * clipped_slope(&variant->gate, i);
    u->a[1] = variant->coupled ? 0 : dc * u->c_prev * clipped_slope(&variant->gate, f);
    u->a[2] = dc * i * clipped_slope(&variant->candidate, g);
    u->dc = z_c * u->dc + dc * f + u->p[0] * u->a[0] + u->p[1] * u->a[1];
    u->dh *= z_h;
}

static void tanh_forward(unit *u) { u->h = tanh(u->a[0]); }

static void tanh_backward(unit *u) { u->a[0] = u->dh * (1 - u->h * u->h); }

static void relu_forward(unit *u) { u->h = u->a[0] > 0 ? u->a[0] : 0; }

static void relu_backward(unit *u) { u->a[0] = u->h > 0 ? u->dh : 0; }

static void gru_forward(unit *u) {
    double r = sigmoid(u->a[1]), z = sigmoid(u->a[2]), q = u->a[3], n = tanh(u->a[0] + r * q);
    u->h = (1 - z) * n + z * u->h_prev;
    u->gates[0] = n, u->gates[1] = r, u->gates[2] = z, u->gates[3] = q;
}

static void gru_backward(unit *u) {
    double n = u->gates[0], r = u->gates[1], z = u->gates[2], q = u->gates[3];
    u->a[0] = u->dh * (1 - z) * (1 - n * n);
    u->a[1] = u->a[0] * q * r * (1 - r);
    u->a[2] = u->dh * (u->h_prev - n) * z * (1 - z);
    u->a[3] = u->a[0] * r;
    u->dh *= z;
}

/* Of a cell with a later product these are the first of its two steps, whose h is m; see check_later. */
static void gru_before_forward(unit *u) {
    u->gates[0] = sigmoid(u->a[0]), u->gates[1] = sigmoid(u->a[1]), u->gates[2] = u->a[2];
    u->h = u->gates[0] * u->h_prev;
}

static void gru_before_backward(unit *u) {
    double r = u->gates[0], z = u->gates[1], n = u->gates[2];
    u->a[0] = r;
    u->a[1] = u->dh * (u->h_prev - n) * z * (1 - z);
    u->a[2] = u->dh * (1 - z) * (1 - n * n);
    u->dh *= z;
}

static const equations known[] = {
    {"lstm", 4, 0, 0, 1, 1, 0, 1, 1, lstm_forward, lstm_backward},
    {"lstm_varied", 4, 0, 0, 1, 1, 1, 1, 0, varied_forward, varied_backward},
    {"tanh", 1, 0, 0, 0, 0, 0, 0, 0, tanh_forward, tanh_backward},
    {"relu", 1, 0, 0, 0, 0, 0, 0, 0, relu_forward, relu_backward},
    {"gru", 4, 1, 0, 1, 0, 1, 0, 0, gru_forward, gru_backward},
    {"gru_before", 3, 0, 1, 1, 0, 1, 0, 0, gru_before_forward, gru_before_backward},
};
enum { N_KNOWN = sizeof known / sizeof known[0] };

static const equations *of_cell(const lstm_cell *cell) {
    for (int q = 0; q < N_KNOWN; q++)
        if (strcmp(known[q].name, cell->name) == 0) return &known[q];
    check_true(0, "the equations of every cell are known here");
    return NULL;
}

/* ---- forward -------------------------------------------------------------------------------------- */

/* A step's operands, and the states before it. */
typedef struct {
    const lstm_cell *cell;
    ptrdiff_t n, I, K, H;
    int with_bias, with_peepholes;
    matrix W_ih, W_hh, bias, peepholes;  /* W_ih (fed·H, I) and W_hh (fed·H, K) in one row each */
    matrix x, h_prev, c_prev;            /* h_prev has K columns, and H if the cell reads h */
} forward_problem;

static int fed(const lstm_cell *cell) { return cell->gates - cell->apart; }
static int heard(const lstm_cell *cell) { return fed(cell) - cell->later; }

/* What a step writes: the gates, c and h; backward da, dc and dh in their place. */
typedef struct {
    matrix gates, c, h;
} states;

static states new_states(const lstm_cell *cell, ptrdiff_t n, ptrdiff_t H, int rough) {
    matrix (*make)(ptrdiff_t, ptrdiff_t) = rough ? rough_matrix : new_matrix;
    return (states){make(n, cell->gates * H), make(n, H), make(n, H)};
}

static states copy_states(const states *s) {
    return (states){copy_of(&s->gates), copy_of(&s->c), copy_of(&s->h)};
}

static void free_states(states *s) { free_matrix(&s->gates), free_matrix(&s->c), free_matrix(&s->h); }

static void check_same_states(const states *a, const states *b, const char *what) {
    check_same(&a->gates, &b->gates, what);
    check_same(&a->c, &b->c, what);
    check_same(&a->h, &b->h, what);
}

enum { FUSED = 1, DESCENDING = 2, C_IN_PLACE = 4, H_IN_PLACE = 8, NO_TAPE = 16 };

/* The rows [r0, r1) and units [j0, j1) of a step.  C_IN_PLACE: c holds c_prev already and is both;
   H_IN_PLACE: the pre-activations are in h; NO_TAPE: nobody asks for the gates. */
static void step(const forward_problem *f, int how, ptrdiff_t r0, ptrdiff_t r1, ptrdiff_t j0,
                 ptrdiff_t j1, states *out) {
    const lstm_cell *cell = f->cell;
    packed ih = pack(fed(cell), how & FUSED ? f->I : 0, f->H, j0, j1, &f->W_ih, 1, f->I);
    packed hh = pack(heard(cell), f->K, f->H, j0, j1, &f->W_hh, 1, f->K);
    lstm_weights w = {how & FUSED ? f->I : 0, f->K, f->H, ih.panels, hh.panels,
                      f->with_bias ? f->bias.row[0] : NULL,
                      f->with_peepholes ? f->peepholes.row[0] : NULL, !!(how & NO_TAPE), variant, NULL};
    lstm_row *rows = calloc((size_t)(r1 - r0 + 1), sizeof *rows);
    const void **x = lowered(&f->x, f->I), **h = lowered(&f->h_prev, f->K);
    for (ptrdiff_t r = r0; r < r1; r++)
        rows[r - r0] = (lstm_row){
            .x = how & FUSED ? x[r] : NULL,
            .h_low = f->K ? h[r] : NULL,
            .h_prev = cell->reads_h ? f->h_prev.row[r] : NULL,
            .c_prev = !cell->has_c ? NULL : how & C_IN_PLACE ? out->c.row[r] : f->c_prev.row[r],
            .gates = how & FUSED && !cell->keeps_gates ? NULL
                     : how & H_IN_PLACE ? out->h.row[r] : out->gates.row[r],
            .c = cell->has_c ? out->c.row[r] : NULL,
            .h = cell->later ? NULL : out->h.row[r],
            .m = cell->later ? out->h.row[r] : NULL};
    cell->step(&w, !!(how & DESCENDING), r1 - r0, j0, j1, rows);
    free_lowered(&f->x, x), free_lowered(&f->h_prev, h);
    free(rows), free(ih.panels), free(hh.panels);
}

/* The same by a plain loop; `want` are the states before as doubles, and then those after. */
static void plain_step(const forward_problem *f, const equations *e, int how, ptrdiff_t j0, ptrdiff_t j1,
                       const states *before, double *want_gates, double *want_c, double *want_h) {
    ptrdiff_t H = f->H, G = e->gates * H;
    for (ptrdiff_t r = 0; r < f->n; r++)
        for (ptrdiff_t j = j0; j < j1; j++) {
            unit u = {.c_prev = get(&f->c_prev, r, j)};
            if (e->reads_h) u.h_prev = get(&f->h_prev, r, j);
            for (int v = 0; v < e->gates; v++) {
                ptrdiff_t m = v * H + j, m_hh = m - e->apart * H;
                u.a[v] = how & FUSED ? (f->with_bias ? get(&f->bias, 0, m) : 0)
                                     : get(how & H_IN_PLACE ? &before->h : &before->gates, r, m);
                for (ptrdiff_t q = 0; how & FUSED && v < e->gates - e->apart && q < f->I; q++)
                    u.a[v] += get(&f->x, r, q) * get(&f->W_ih, 0, m * f->I + q);
                for (ptrdiff_t q = 0; v >= e->apart && v < e->gates - e->later && q < f->K; q++)
                    u.a[v] += get(&f->h_prev, r, q) * get(&f->W_hh, 0, m_hh * f->K + q);
            }
            for (int q = 0; q < 3 && f->with_peepholes; q++) u.p[q] = get(&f->peepholes, 0, q * H + j);
            e->forward(&u);
            want_h[r * H + j] = u.h;
            if (e->has_c) want_c[r * H + j] = u.c;
            for (int v = 0; v < e->gates && e->keeps_gates; v++)
                want_gates[r * G + v * H + j] = u.gates[v];
        }
}

static forward_problem new_forward(const lstm_cell *cell, const equations *e, ptrdiff_t n, ptrdiff_t I,
                                   ptrdiff_t K, ptrdiff_t H, int rough) {
    matrix (*make)(ptrdiff_t, ptrdiff_t) = rough ? rough_matrix : new_matrix;
    ptrdiff_t rows = fed(cell) * H;
    variant = variants + pick(sizeof variants / sizeof *variants);
    return (forward_problem){
        cell, n, I, K, H, (int)pick(2), e->has_peepholes && pick(2), make(1, rows * I + 1),
        make(1, rows * K + 1), make(1, cell->gates * H), make(1, 3 * H), make(n, I),
        make(n, e->reads_h && K < H ? H : K), make(n, H)};
}

static void free_forward(forward_problem *f) {
    free_matrix(&f->W_ih), free_matrix(&f->W_hh), free_matrix(&f->bias), free_matrix(&f->peepholes);
    free_matrix(&f->x), free_matrix(&f->h_prev), free_matrix(&f->c_prev);
}

static void check_forward(const lstm_cell *cell, const equations *e, ptrdiff_t n, ptrdiff_t I,
                          ptrdiff_t K, ptrdiff_t H, int how) {
    if (!e->has_c) how &= ~C_IN_PLACE;
    if (e->gates > 1 || how & FUSED) how &= ~H_IN_PLACE;
    forward_problem f = new_forward(cell, e, n, I, K, H, 0);
    states got = new_states(cell, n, H, 0);
    for (ptrdiff_t r = 0; r < n && how & C_IN_PLACE; r++)
        for (ptrdiff_t j = 0; j < H; j++) set(&got.c, r, j, get(&f.c_prev, r, j));
    double *gates = doubles(&got.gates), *c = doubles(&got.c), *h = doubles(&got.h);
    ptrdiff_t width = panel_width(cell->gates), j0 = pick((H + width - 1) / width) * width;
    ptrdiff_t j1 = pick(2) ? H : j0 + 1 + pick(H - j0);
    plain_step(&f, e, how, j0, j1, &got, gates, c, h);
    step(&f, how, 0, n, j0, j1, &got);
    check_close(&got.gates, gates, 16, "gates");
    check_close(&got.c, c, 16, "c");
    check_close(&got.h, h, strcmp(e->name, "relu") ? 16 : 0, "h");
    free_states(&got), free_forward(&f), free(gates), free(c), free(h);
}

/* To the bit: x in the step or before it, rows together or alone, units together or in slabs, from
   either end, states in place or not; and h again from the gates and c. */
static void check_forward_bits(const lstm_cell *cell, const equations *e, ptrdiff_t n, ptrdiff_t I,
                               ptrdiff_t K, ptrdiff_t H) {
    forward_problem f = new_forward(cell, e, n, I, K, H, 1);
    states blank = new_states(cell, n, H, 1), whole = copy_states(&blank), other = copy_states(&blank);
    step(&f, FUSED, 0, n, 0, H, &whole);

    step(&f, FUSED | DESCENDING, 0, n, 0, H, &other);
    check_same_states(&whole, &other, "a step from either end");
    free_states(&other), other = copy_states(&blank);

    step(&f, FUSED | NO_TAPE, 0, n, 0, H, &other);
    check_same(&whole.h, &other.h, "h without a tape");
    check_same(&whole.c, &other.c, "c without a tape");
    free_states(&other), other = copy_states(&blank);

    ptrdiff_t width = panel_width(cell->gates);
    for (ptrdiff_t j = 0; j < H; j += width)
        for (ptrdiff_t r = 0; r < n; r++) step(&f, FUSED, r, r + 1, j, least(j + width, H), &other);
    check_same_states(&whole, &other, "a step, whole or cut");
    free_states(&other), other = copy_states(&blank);

    packed ih = pack(fed(cell), I, H, 0, H, &f.W_ih, 1, I);
    int in_place = e->keeps_gates ? 0 : H_IN_PLACE;
    const void **x = lowered(&f.x, I);
    under_test->gemm(&ih.w, 0, H, &(lstm_rows){f.with_bias ? START_BIAS : START_ZERO, n, x,
                                               f.bias.row[0],
                                               (in_place ? &other.h : &other.gates)->row});
    free(ih.panels), free_lowered(&f.x, x);
    for (ptrdiff_t r = 0; r < n; r++)
        for (ptrdiff_t j = fed(cell) * H; j < cell->gates * H; j++)
            set(&other.gates, r, j, f.with_bias ? get(&f.bias, 0, j) : 0);
    step(&f, in_place, 0, n, 0, H, &other);
    check_same_states(&whole, &other, "x in the step or before it");
    free_states(&other), other = copy_states(&blank);

    if (e->has_c) {
        free_matrix(&other.c), other.c = copy_of(&f.c_prev);
        step(&f, FUSED | C_IN_PLACE, 0, n, 0, H, &other);
        check_same_states(&whole, &other, "c in place or not");
        free_states(&other), other = copy_states(&blank);
    }
    if (e->has_output) {
        ptrdiff_t j0 = pick(H), j1 = j0 + 1 + pick(H - j0);
        for (ptrdiff_t r = 0; r < n; r++)
            for (ptrdiff_t j = 0; j < H; j++)
                if (j < j0 || j >= j1) set(&other.h, r, j, get(&whole.h, r, j));
        cell->output(n, H, j0, j1, rows_of(&whole.gates), rows_of(&whole.c), other.h.row);
        check_same(&whole.h, &other.h, "h again");
    }
    free_states(&blank), free_states(&whole), free_states(&other), free_forward(&f);
}

/* ---- backward ------------------------------------------------------------------------------------- */

typedef struct {
    const lstm_cell *cell;
    ptrdiff_t n, K, H;
    int with_peepholes;
    matrix W_hh, peepholes;  /* W_hh (K, H) in one row */
    matrix da_next, h, h_prev, c, c_prev, dy;
} backward_problem;

enum { DY_IN_PLACE = 4 };  /* dy is the row of gates */

static void back_step(const backward_problem *b, int how, ptrdiff_t r0, ptrdiff_t r1, ptrdiff_t j0,
                      ptrdiff_t j1, states *out) {
    const lstm_cell *cell = b->cell;
    packed hh = pack(1, b->K, b->H, j0, j1, &b->W_hh, b->H, 1);
    lstm_weights w = {0, b->K, b->H, NULL, hh.panels, NULL,
                      b->with_peepholes ? b->peepholes.row[0] : NULL, 0, variant, NULL};
    lstm_back_row *rows = calloc((size_t)(r1 - r0 + 1), sizeof *rows);
    const void **da = lowered(&b->da_next, b->K);
    for (ptrdiff_t r = r0; r < r1; r++)
        rows[r - r0] = (lstm_back_row){
            .da_next = b->K ? da[r] : NULL,
            .gates = out->gates.row[r],
            .h = cell->keeps_gates ? NULL : b->h.row[r],
            .c = cell->has_c ? b->c.row[r] : NULL,
            .c_prev = cell->has_c ? b->c_prev.row[r] : NULL,
            .dy = how & DY_IN_PLACE ? out->gates.row[r] : b->dy.row[r],
            .h_prev = cell->reads_h ? b->h_prev.row[r] : NULL,
            .dh = cell->reads_h ? out->h.row[r] : NULL,
            .dc = cell->has_c ? out->c.row[r] : NULL};
    cell->back_step(&w, !!(how & DESCENDING), r1 - r0, j0, j1, rows);
    free_lowered(&b->da_next, da), free(rows), free(hh.panels);
}

static backward_problem new_backward(const lstm_cell *cell, const equations *e, ptrdiff_t n, ptrdiff_t K,
                                     ptrdiff_t H, int rough) {
    matrix (*make)(ptrdiff_t, ptrdiff_t) = rough ? rough_matrix : new_matrix;
    variant = variants + pick(sizeof variants / sizeof *variants);
    return (backward_problem){
        cell, n, K, H, e->has_peepholes && pick(2), make(1, K * H + 1), make(1, 3 * H), make(n, K),
        make(n, H), make(n, H), make(n, H), make(n, H), make(n, H)};
}

static void free_backward(backward_problem *b) {
    free_matrix(&b->W_hh), free_matrix(&b->peepholes), free_matrix(&b->da_next), free_matrix(&b->h);
    free_matrix(&b->h_prev), free_matrix(&b->c), free_matrix(&b->c_prev), free_matrix(&b->dy);
}

static void check_backward(const lstm_cell *cell, const equations *e, ptrdiff_t n, ptrdiff_t K,
                           ptrdiff_t H, int how) {
    if (e->gates > 1) how &= ~DY_IN_PLACE;
    ptrdiff_t G = e->gates * H, j0 = pick((H + 4 * under_test->VL - 1) / (4 * under_test->VL));
    j0 *= 4 * under_test->VL;
    ptrdiff_t j1 = pick(2) ? H : j0 + 1 + pick(H - j0);
    backward_problem b = new_backward(cell, e, n, K, H, 0);
    states got = new_states(cell, n, H, 0);
    double *want = doubles(&got.gates), *want_dc = doubles(&got.c), *want_dh = doubles(&got.h);
    for (ptrdiff_t r = 0; r < n; r++)
        for (ptrdiff_t j = j0; j < j1; j++) {
            unit u = {.h_prev = get(&b.h_prev, r, j), .c_prev = get(&b.c_prev, r, j),
                      .h = get(&b.h, r, j), .c = get(&b.c, r, j), .dc = get(&got.c, r, j)};
            u.dh = get(how & DY_IN_PLACE ? &got.gates : &b.dy, r, j);
            for (ptrdiff_t q = 0; q < K; q++)
                u.dh += get(&b.da_next, r, q) * get(&b.W_hh, 0, q * H + j);
            if (e->reads_h) u.dh += get(&got.h, r, j);
            for (int v = 0; v < e->gates; v++) u.gates[v] = get(&got.gates, r, v * H + j);
            for (int q = 0; q < 3 && b.with_peepholes; q++) u.p[q] = get(&b.peepholes, 0, q * H + j);
            e->backward(&u);
            for (int v = 0; v < e->gates; v++) want[r * G + v * H + j] = u.a[v];
            if (e->has_c) want_dc[r * H + j] = u.dc;
            if (e->reads_h) want_dh[r * H + j] = u.dh;
        }
    back_step(&b, how, 0, n, j0, j1, &got);
    check_close(&got.gates, want, 32, "da");
    check_close(&got.c, want_dc, 32, "dc");
    check_close(&got.h, want_dh, 32, "dh");
    free_states(&got), free_backward(&b), free(want), free(want_dc), free(want_dh);
}

static void check_backward_bits(const lstm_cell *cell, const equations *e, ptrdiff_t n, ptrdiff_t K,
                                ptrdiff_t H) {
    backward_problem b = new_backward(cell, e, n, K, H, 1);
    states whole = new_states(cell, n, H, 1), cut = copy_states(&whole), turned = copy_states(&whole);
    ptrdiff_t width = panel_width(1);
    back_step(&b, 0, 0, n, 0, H, &whole);
    back_step(&b, DESCENDING, 0, n, 0, H, &turned);
    for (ptrdiff_t j = 0; j < H; j += width)
        for (ptrdiff_t r = 0; r < n; r++) back_step(&b, 0, r, r + 1, j, least(j + width, H), &cut);
    check_same_states(&whole, &turned, "a step back from either end");
    check_same_states(&whole, &cut, "a step back, whole or cut");
    free_states(&whole), free_states(&cut), free_states(&turned), free_backward(&b);
}

/* The second step of a GRU whose reset gate comes first, there and back. */
static void check_later(const lstm_cell *cell, ptrdiff_t n, ptrdiff_t H, int descending) {
    matrix gates = new_matrix(n, 3 * H), m = new_matrix(n, H), h_prev = new_matrix(n, H);
    matrix h = new_matrix(n, H), zero = new_matrix(n, H), W = new_matrix(1, H * H + 1);
    double *want = doubles(&gates), *want_h = doubles(&h), *want_m = doubles(&m);
    ptrdiff_t j0 = pick((H + panel_width(1) - 1) / panel_width(1)) * panel_width(1);
    ptrdiff_t j1 = pick(2) ? H : j0 + 1 + pick(H - j0);
    const void **low = lowered(&m, H);
    lstm_row *rows = calloc((size_t)n + 1, sizeof *rows);
    lstm_back_row *back = calloc((size_t)n + 1, sizeof *back);
    packed hh = pack(1, H, H, j0, j1, &W, 1, H);
    for (ptrdiff_t r = 0; r < n; r++) {
        void *gate = (char *)gates.row[r] + 2 * H * under_test->item;
        rows[r] = (lstm_row){.gates = gate, .h_low = low[r], .h_prev = h_prev.row[r], .h = h.row[r]};
        for (ptrdiff_t j = j0; j < j1; j++) {
            double z = get(&gates, r, H + j), a = get(&gates, r, 2 * H + j);
            for (ptrdiff_t k = 0; k < H; k++) a += get(&m, r, k) * get(&W, 0, j * H + k);
            want[r * 3 * H + 2 * H + j] = tanh(a);
            want_h[r * H + j] = (1 - z) * tanh(a) + z * get(&h_prev, r, j);
        }
    }
    cell->later_step(&(lstm_weights){.K = H, .H = H, .hh = hh.panels}, descending, n, j0, j1, rows);
    check_close(&gates, want, 16, "the last gate");
    check_close(&h, want_h, 16, "h after it");
    free(hh.panels), free_lowered(&m, low), free(want), free(want_h);
    if (!cell->later_back_step) goto done;

    for (ptrdiff_t r = 0; r < n; r++)
        for (ptrdiff_t j = 0; j < 3 * H; j++) set(&gates, r, j, draw());
    want = doubles(&gates), want_h = doubles(&h);
    hh = pack(1, H, H, j0, j1, &W, H, 1);
    matrix da = new_matrix(n, H);
    low = lowered(&da, H);
    for (ptrdiff_t r = 0; r < n; r++) {
        void *gate = (char *)gates.row[r] + 2 * H * under_test->item;
        back[r] = (lstm_back_row){.gates = gate, .da_next = low[r], .dy = zero.row[r],
                                  .h_prev = h_prev.row[r], .dh = h.row[r], .m = m.row[r]};
        for (ptrdiff_t j = 0; j < H; j++) set(&zero, r, j, 0);
        for (ptrdiff_t j = j0; j < j1; j++) {
            double v = get(&gates, r, j), p = get(&h_prev, r, j), dm = 0;
            for (ptrdiff_t k = 0; k < H; k++) dm += get(&da, r, k) * get(&W, 0, k * H + j);
            want[r * 3 * H + j] = dm * p * v * (1 - v);
            want_h[r * H + j] += dm * v;
            want_m[r * H + j] = v * p;
        }
    }
    cell->later_back_step(&(lstm_weights){.K = H, .H = H, .hh = hh.panels}, descending, n, j0, j1, back);
    check_close(&gates, want, 32, "da of the reset gate");
    check_close(&h, want_h, 32, "dh past the reset gate");
    check_close(&m, want_m, 16, "m again");
    free(hh.panels), free_lowered(&da, low), free_matrix(&da), free(want), free(want_h);
done:
    free(rows), free(back), free(want_m), free_matrix(&gates), free_matrix(&m), free_matrix(&h_prev);
    free_matrix(&h), free_matrix(&zero), free_matrix(&W);
}

static void check_peephole_gradient(const lstm_cell *cell, ptrdiff_t K, ptrdiff_t H) {
    matrix da = new_matrix(K, 4 * H), c_prev = new_matrix(K, H), c = new_matrix(K, H);
    matrix dp = new_matrix(1, 3 * H);
    double *want = doubles(&dp);
    ptrdiff_t j0 = pick(H), j1 = j0 + 1 + pick(H - j0);
    for (ptrdiff_t j = j0; j < j1; j++) {
        want[j] = want[H + j] = want[2 * H + j] = 0;
        for (ptrdiff_t k = 0; k < K; k++) {
            want[j] += get(&da, k, j) * get(&c_prev, k, j);
            want[H + j] += get(&da, k, H + j) * get(&c_prev, k, j);
            want[2 * H + j] += get(&da, k, 3 * H + j) * get(&c, k, j);
        }
    }
    cell->peephole_gradient(K, H, j0, j1, rows_of(&da), rows_of(&c_prev), rows_of(&c), dp.row[0]);
    check_close(&dp, want, 0, "dp");
    free_matrix(&da), free_matrix(&c_prev), free_matrix(&c), free_matrix(&dp), free(want);
}

/* relu: 0 for what is below zero and for -inf; nan stays nan, forward; backward nothing passes at 0. */
static void check_relu_edges(const lstm_cell *cell) {
    const double a[] = {-INFINITY, -1, 0, 1, INFINITY, NAN}, h[] = {0, 0, 0, 1, INFINITY, NAN};
    matrix row = new_matrix(1, 6), da = new_matrix(1, 6), dy = new_matrix(1, 6);
    double *want = doubles(&dy);
    lstm_weights w = {.H = 6};
    for (int j = 0; j < 6; j++) set(&row, 0, j, a[j]);
    cell->step(&w, 0, 1, 0, 6, &(lstm_row){.gates = row.row[0], .h = row.row[0]});
    check_close(&row, h, 0, "relu");
    cell->back_step(&w, 0, 1, 0, 6, &(lstm_back_row){.gates = da.row[0], .h = row.row[0],
                                                    .dy = dy.row[0]});
    want[0] = want[1] = want[2] = want[5] = 0;
    check_close(&da, want, 0, "relu backward");
    free_matrix(&row), free_matrix(&da), free_matrix(&dy), free(want);
}

void check_cells(void) {
    const ptrdiff_t VL = under_test->VL, MR = under_test->MR;
    const ptrdiff_t widths[] = {1, VL - 1, VL, VL + 1, 2 * VL + 1, 4 * VL, 4 * VL + 1, 9 * VL - 1};
    const ptrdiff_t heights[] = {1, 2, MR, MR + 1, 2 * MR + 1, 8 * MR + 1};
    int found = 0;
    for (const lstm_cell *cell = under_test->cells; cell->name; cell++, found++) {
        if (cell->norm_step) {  /* check_norm.c */
            found--;
            continue;
        }
        const equations *e = of_cell(cell);
        check_true(cell->gates == e->gates && cell->apart == e->apart && cell->later == e->later &&
                   !!cell->later_step == e->later &&
                   cell->keeps_gates == e->keeps_gates && cell->has_c == e->has_c &&
                   cell->reads_h == e->reads_h && !!cell->output == e->has_output &&
                   !!cell->peephole_gradient == e->has_peepholes, "a cell's row says what it is");
        for (size_t w = 0; w < sizeof widths / sizeof widths[0]; w++) {
            ptrdiff_t H = widths[w];
            for (size_t q = 0; H > 0 && q < sizeof heights / sizeof heights[0]; q++) {
                ptrdiff_t n = heights[q];
                for (int how = 0; how < 16; how++) {
                    check_forward(cell, e, n, 1 + pick(9), pick(9), H, how);
                    check_backward(cell, e, n, pick(9), H, how);
                }
                check_forward(cell, e, n, 3, 0, H, DESCENDING);  /* neither x nor h */
                check_forward_bits(cell, e, n, 1 + pick(9), 1 + pick(9), H);
                check_backward_bits(cell, e, n, 1 + pick(9), H);
                if (e->has_peepholes) check_peephole_gradient(cell, n - 1, H);
                if (e->later) check_later(cell, n, H, (int)pick(2));
            }
        }
        check_forward_bits(cell, e, 3, 515, 516, VL + 1);  /* longer than the block of a panel */
        check_backward_bits(cell, e, 3, 1027, VL + 1);
        check_forward(cell, e, 0, 3, 3, VL, FUSED);
        check_backward(cell, e, 0, 3, VL, 0);
    }
    check_true(found == N_KNOWN, "every cell is in the table");
    check_relu_edges(lstm_cell_of(under_test, "relu"));
}
