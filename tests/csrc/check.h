/* check.h: what the checks of the kernels share: arrays with guards, and comparison with plain loops.

   A check runs one kernel of the table under test on rows of random numbers and on the same numbers as
   doubles.  Numbers are multiples of 1/16, so that products and sums of them are exact in every format
   and need no tolerance; `rough` ones are not, and show in which order a sum was taken.  A row has guards
   on both sides: they must not be written, and under the address sanitizer not be read. */

#ifndef CHECK_H
#define CHECK_H

#include <stdint.h>
#include <stdlib.h>
#include "lstm.h"

#ifdef _WIN32   /* what is aligned has a free of its own there: it stays until the end */
#include <malloc.h>
#define free(p) ((void)(p))
#define posix_memalign(p, alignment, bytes) (!(*(p) = _aligned_malloc((bytes), (alignment))))
#endif

extern const lstm_kernels *under_test;

typedef struct {
    ptrdiff_t rows, columns;
    void **row;
} matrix;

double draw(void);                        /* a multiple of 1/16 in [-1, 1] */
void restart(void);                       /* the numbers drawn begin anew */
ptrdiff_t pick(ptrdiff_t n);              /* one of 0..n-1 */
matrix new_matrix(ptrdiff_t rows, ptrdiff_t columns);
matrix rough_matrix(ptrdiff_t rows, ptrdiff_t columns);
matrix copy_of(const matrix *a);
void free_matrix(matrix *a);
double get(const matrix *a, ptrdiff_t r, ptrdiff_t j);
void set(matrix *a, ptrdiff_t r, ptrdiff_t j, double value);
double as_number(double value);           /* rounded to the format under test */

/* a[r][j] must be want[r·columns + j], nan for nan, within `ulps` of the format at 1 + |want|; 0: exactly,
   the sign of zero too.  Exits with 1 at the first difference, here and below. */
void check_close(const matrix *a, const double *want, double ulps, const char *what);
void check_same(const matrix *a, const matrix *b, const char *what);  /* bit by bit */
void check_true(int holds, const char *what);
double *doubles(const matrix *a);         /* its numbers; the caller frees */

/* A packed operand: W[k, column] of K rows is element k·k_stride + column·col_stride of W's only row. */
typedef struct {
    lstm_operand w;
    void *panels;
    size_t bytes;
} packed;
packed pack(int gates, ptrdiff_t K, ptrdiff_t N, ptrdiff_t j0, ptrdiff_t j1, const matrix *W,
            ptrdiff_t k_stride, ptrdiff_t col_stride);
/* The first K numbers of every row as products take them. */
const void **lowered(const matrix *a, ptrdiff_t K);
void free_lowered(const matrix *a, const void **rows);
void *room(ptrdiff_t bytes);              /* 64-byte aligned, of exactly this size */
ptrdiff_t panel_width(int gates);         /* columns of a panel, of one gate */

static inline const void **rows_of(const matrix *a) { return (const void **)a->row; }
static inline ptrdiff_t least(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }

void check_products(void);
void check_cells(void);
void check_norm(void);
void check_pointwise(void);
void check_formats(void);                 /* below float32; prints what their steps hash to */

#endif
