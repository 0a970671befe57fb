/* check.c: the kernels of every instruction set that can run here, against plain loops.

   Every kernel of the table and every function of every cell's row is checked, in sizes around the width
   of a vector and the height of a tile; then that bits do not depend on how the work is cut.  Prints a
   line per instruction set and number format; exits with 1 at the first difference. */

#include <math.h>
#include <stdio.h>
#include <string.h>
#include "check.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

enum { GUARD = 256 };  /* bytes: four of the longest vectors */

const lstm_kernels *under_test;

static int is_double(void) { return under_test->item == 8; }

static uint64_t state = 88172645463325252u;

void restart(void) { state = 88172645463325252u; }

static uint64_t random_bits(void) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state >> 11;
}

ptrdiff_t pick(ptrdiff_t n) { return (ptrdiff_t)(random_bits() % (uint64_t)n); }
double draw(void) { return (double)(pick(33) - 16) / 16; }
double as_number(double value) { return is_double() ? value : (double)(float)value; }

double get(const matrix *a, ptrdiff_t r, ptrdiff_t j) {
    return is_double() ? ((double *)a->row[r])[j] : (double)((float *)a->row[r])[j];
}

void set(matrix *a, ptrdiff_t r, ptrdiff_t j, double value) {
    if (is_double()) ((double *)a->row[r])[j] = value;
    else ((float *)a->row[r])[j] = (float)value;
}

static size_t row_bytes(const matrix *a) { return (size_t)(a->columns * under_test->item); }

/* With ASan the guards cannot be touched at all; without, they are looked at. */
static void guard(const matrix *a, int check) {
    static unsigned char untouched[GUARD];
    memset(untouched, 0xA5, GUARD);
    for (ptrdiff_t r = 0; r < a->rows; r++) {
        unsigned char *sides[] = {(unsigned char *)a->row[r] - GUARD,
                                  (unsigned char *)a->row[r] + row_bytes(a)};
        for (int s = 0; s < 2; s++) {
            if (check) {
                ASAN_UNPOISON_MEMORY_REGION(sides[s], GUARD);
                check_true(memcmp(sides[s], untouched, GUARD) == 0, "a guard is untouched");
            } else memcpy(sides[s], untouched, GUARD);
            ASAN_POISON_MEMORY_REGION(sides[s], GUARD);
        }
    }
}

static matrix blank_matrix(ptrdiff_t rows, ptrdiff_t columns) {
    matrix a = {rows, columns, malloc((size_t)(rows + 1) * sizeof(void *))};
    for (ptrdiff_t r = 0; r < rows; r++)
        a.row[r] = (char *)malloc(2 * GUARD + row_bytes(&a)) + GUARD;
    guard(&a, 0);
    return a;
}

matrix new_matrix(ptrdiff_t rows, ptrdiff_t columns) {
    matrix a = blank_matrix(rows, columns);
    for (ptrdiff_t r = 0; r < rows; r++)
        for (ptrdiff_t j = 0; j < columns; j++) set(&a, r, j, draw());
    return a;
}

matrix rough_matrix(ptrdiff_t rows, ptrdiff_t columns) {
    matrix a = blank_matrix(rows, columns);
    for (ptrdiff_t r = 0; r < rows; r++)
        for (ptrdiff_t j = 0; j < columns; j++)
            set(&a, r, j, (double)random_bits() / (1u << 26) / (1u << 26) - 1);
    return a;
}

matrix copy_of(const matrix *a) {
    matrix b = blank_matrix(a->rows, a->columns);
    for (ptrdiff_t r = 0; r < a->rows; r++) memcpy(b.row[r], a->row[r], row_bytes(a));
    return b;
}

void free_matrix(matrix *a) {
    guard(a, 1);
    for (ptrdiff_t r = 0; r < a->rows; r++) {
        ASAN_UNPOISON_MEMORY_REGION((char *)a->row[r] - GUARD, 2 * GUARD + row_bytes(a));
        free((char *)a->row[r] - GUARD);
    }
    free(a->row);
}

static void wrong(const char *what) {
    if (under_test) printf("%s %s: ", under_test->isa, under_test->format);
    printf("%s", what);
}

void check_true(int holds, const char *what) {
    if (holds) return;
    wrong("not so: ");
    puts(what);
    exit(1);
}

void check_close(const matrix *a, const double *want, double ulps, const char *what) {
    double ulp = is_double() ? 0x1p-53 : 0x1p-24;
    guard(a, 1);
    for (ptrdiff_t r = 0; r < a->rows; r++)
        for (ptrdiff_t j = 0; j < a->columns; j++) {
            double got = get(a, r, j), expected = want[r * a->columns + j];
            int same = got == expected && !signbit(got) == !signbit(expected);
            if (same || (isnan(got) && isnan(expected)) ||
                (ulps > 0 && fabs(got - expected) <= ulps * ulp * (1 + fabs(expected))))
                continue;
            wrong(what);
            printf(" (%td of %td, %td of %td) is %.17g, not %.17g\n", r, a->rows, j, a->columns, got,
                   expected);
            exit(1);
        }
}

void check_same(const matrix *a, const matrix *b, const char *what) {
    guard(a, 1), guard(b, 1);
    for (ptrdiff_t r = 0; r < a->rows; r++)
        for (ptrdiff_t j = 0; j < a->columns; j++)
            if (memcmp((char *)a->row[r] + j * under_test->item,
                       (char *)b->row[r] + j * under_test->item, (size_t)under_test->item)) {
                wrong(what);
                printf(" (%td of %td, %td of %td) is %.17g or %.17g\n", r, a->rows, j, a->columns,
                       get(a, r, j), get(b, r, j));
                exit(1);
            }
}

double *doubles(const matrix *a) {
    double *values = malloc((size_t)(a->rows * a->columns + 1) * sizeof(double));
    for (ptrdiff_t r = 0; r < a->rows; r++)
        for (ptrdiff_t j = 0; j < a->columns; j++) values[r * a->columns + j] = get(a, r, j);
    return values;
}

void *room(ptrdiff_t bytes) {
    void *p = NULL;
    if (posix_memalign(&p, 64, (size_t)bytes)) abort();
    return p;
}

const void **lowered(const matrix *a, ptrdiff_t K) {
    const void **rows = malloc((size_t)(a->rows + 1) * sizeof *rows);
    ptrdiff_t MR = under_test->MR, room_for = (a->rows + MR - 1) / MR * MR;
    ptrdiff_t stride = under_test->lower ? (under_test->lowered_bytes(K) + 63) / 64 * 64 : 0;
    char *all = room(room_for * stride + 1);
    memset(all, 0xFF, (size_t)(room_for * stride));  /* nan, where nothing is written */
    for (ptrdiff_t r = 0; r < a->rows; r++) {
        rows[r] = a->row[r];
        if (!under_test->lower) continue;
        rows[r] = all + r * stride;
        under_test->lower(K, a->row[r], all + r * stride);
    }
    rows[a->rows] = all;
    return rows;
}

void free_lowered(const matrix *a, const void **rows) {
    free((void *)rows[a->rows]);
    free(rows);
}

ptrdiff_t panel_width(int gates) { return gates == 1 ? 4 * under_test->VL : under_test->VL; }

packed pack(int gates, ptrdiff_t K, ptrdiff_t N, ptrdiff_t j0, ptrdiff_t j1, const matrix *W,
            ptrdiff_t k_stride, ptrdiff_t col_stride) {
    ptrdiff_t VL = under_test->VL, width = panel_width(gates), n = (j1 - j0 + width - 1) / width;
    ptrdiff_t vectors = gates == 1 ? (j1 - j0 + VL - 1) / VL : n * gates;
    packed w = {{.gates = gates, .K = K, .N = N, .W = W->row[0], .k_stride = k_stride,
                 .col_stride = col_stride}, NULL, (size_t)(vectors * under_test->vector_bytes(K))};
    if (K == 0) return w;
    w.w.packed = w.panels = room((ptrdiff_t)w.bytes);
    memset(w.panels, 0xA5, w.bytes);
    under_test->pack(&w.w, j0, j1, 0, n);
    return w;
}

/* What dispatch.c promises of the tables. */
static void check_table(const char *isa, const char *format) {
    const lstm_kernels *k = under_test;
    int trains = strcmp(format, "int8") != 0, below = !trains || !strcmp(format, "bfloat16");
    check_true(strcmp(k->isa, isa) == 0 && strcmp(k->format, format) == 0,
               "a table is what was asked for");
    check_true(lstm_kernels_for(NULL, format) == lstm_kernels_for(lstm_isa(0), format),
               "without a name the best instruction set is meant");
    check_true(k->item == (strcmp(format, "float64") ? 4 : 8) &&
               k->packed == (!trains ? 1 : below ? 2 : k->item),
               "numbers have the size of their format");
    check_true((k->lower != NULL) == below && (k->lowered_bytes != NULL) == below && (k->adam != NULL) == !below &&
               (k->cross_entropy != NULL) == !below && (k->weight_gradient != NULL) == trains,
               "a table has what its format needs");
    check_true(k->VL >= 1 && k->MR >= 1, "vectors and tiles have a size");
    for (const lstm_cell *cell = k->cells; cell->name; cell++)
        check_true(lstm_cell_of(k, cell->name) == cell && !cell->step == !!cell->norm_step &&
                   (cell->norm_step ? cell->norm_back_step && !below
                                    : (cell->back_step != NULL) == trains) &&
                   cell->gates >= 1 && cell->gates <= 4, "a cell is found by its name");
    check_true(!lstm_cell_of(k, "none"), "no cell has another name");
    check_true(!lstm_kernels_for("none", format) && !lstm_kernels_for(isa, "none"),
               "there are no other tables");
    check_true(lstm_l2_bytes() > 0, "the second-level cache has a size");
}

int main(void) {
    const char *formats[] = {"float32", "float64", "bfloat16", "int8"};
    for (int f = 0; f < 4; f++)
        for (int q = 0; lstm_isa(q); q++) {
            under_test = lstm_kernels_for(lstm_isa(q), formats[f]);
            check_true(under_test != NULL, "every instruction set has all formats");
            if (strcmp(under_test->isa, lstm_isa(q))) continue;  /* it has the next one's */
            check_table(lstm_isa(q), formats[f]);
            if (under_test->weight_gradient) check_products(), check_cells(), check_norm();
            if (under_test->adam) check_pointwise();
            if (under_test->lower) check_formats();
            printf("%s %s: agrees\n", under_test->isa, under_test->format);
        }
    return 0;
}
