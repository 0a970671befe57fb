/* lstm.h: the C contract. What a kernel is given, what it writes, and what it refuses to know.

   Sizes:  I inputs, H hidden units, K length of a dot product, n rows.  All are ptrdiff_t.
   Arrays: row-major; a row pointer points at the first element of one row of floats or doubles.
           Gates rows hold 4H numbers in the order i, f, g, o.
   Rows:   kernels see rows, never time or batch: the plan (lstmcore/_kernels.pyx) says where the row
           of each sequence lies at each step, so dense, ragged and reversed are the same to a kernel.
   Units:  a kernel computes the columns [j0, j1) and writes nothing else.
   Bits:   every output element is one chain of multiply-adds over k in ascending order, whatever tile,
           row group or thread computes it: results do not depend on n, j0, j1 or the other rows.
   Memory: the caller owns everything; kernels allocate nothing, keep nothing, and run under any
           thread.  Outputs may alias nothing but what is said to be updated in place. */

#ifndef LSTMCORE_LSTM_H
#define LSTMCORE_LSTM_H

#include <stddef.h>
#include <stdint.h>

/* The weights of a step, packed for the units from j0 on. */
typedef struct {
    ptrdiff_t I, K, H;   /* I = 0: gates hold x W_ihᵀ + b already; K = 0: the recurrent part is zero */
    const void *ih, *hh; /* forward both in PANEL_GATES, backward hh (K = 4H) in PANEL_PLAIN */
    const void *bias;    /* (4H) or NULL; read if I > 0 */
    const void *peepholes; /* (3, H) or NULL */
} lstm_weights;

/* Where one sequence's forward step lives. */
typedef struct {
    const void *x;       /* (I)   x_t; not read if I = 0 */
    const void *h_prev;  /* (K)   h_{t-1}; not read if K = 0 */
    const void *c_prev;  /* (H)   c_{t-1}; may be the same row as c */
    void *gates;         /* (4H)  in: the pre-activations without the recurrent part; out: i, f, g, o */
    void *c;             /* (H)   out: c_t */
    void *h;             /* (H)   out: o ∘ tanh(c_t) */
} lstm_row;

/* Where one sequence's backward step lives. */
typedef struct {
    const void *da_next; /* (4H)  da_{t+1}; not read if K = 0 */
    void *gates;         /* (4H)  in: i, f, g, o; out: da_t */
    const void *c;       /* (H)   c_t */
    const void *c_prev;  /* (H)   c_{t-1} */
    const void *dy;      /* (H)   what reaches h_t from above */
    void *dc;            /* (H)   in: what reaches c_t from step t+1; out: what reaches c_{t-1} */
} lstm_back_row;

/* One gradient dW (M, N) = daᵀ x among several that share da. */
typedef struct {
    const void *const *x;  /* a row (N) for each k */
    ptrdiff_t N;
    void *dW;
} lstm_product;

/* A step of Adam; the corrections for the first steps are in rate and eps. */
typedef struct {
    double b1, b2, rate, eps;
    double decay, keep;  /* g + decay·p takes the place of g, and keep·p that of p before the step */
} lstm_adam;

/* How the columns of a packed operand are grouped into panels of up to four vectors. */
enum { PANEL_PLAIN = 0,  /* vectors 4p..4p+3: neighboring columns, counted from j0 */
       PANEL_GATES = 1 };/* vector p of each of the four gates: a row of the panel is i, f, g, o */

/* What an output row holds before the sum is added. */
enum { START_ZERO = 0, START_BIAS = 1, START_ADD = 2 };

typedef struct {
    const char *isa;
    int is_double;
    ptrdiff_t VL;        /* lanes of a vector */
    ptrdiff_t MR;        /* rows of a full tile */

    /* Packs the operand W[k, column] = W[k·k_stride + column·col_stride] into panels [first, last) of
       the columns [j0, j1) (of one gate if PANEL_GATES, where H is the distance of the gates), as
       panel[k][vector][lane], padded with zeros.  out points at panel 0, 64-byte aligned. */
    void (*pack)(int panels, ptrdiff_t K, ptrdiff_t H, ptrdiff_t j0, ptrdiff_t j1, ptrdiff_t first,
                 ptrdiff_t last, const void *W, ptrdiff_t k_stride, ptrdiff_t col_stride, void *out);

    /* C[r, columns] = start + Σ_k a[r][k] W[k, column] for n rows; the bias is indexed by column. */
    void (*gemm)(int panels, int start, ptrdiff_t n, ptrdiff_t K, ptrdiff_t H, ptrdiff_t j0,
                 ptrdiff_t j1, const void *const *a, const void *packed, const void *bias,
                 void *const *C);

    /* One time step of n sequences on the units [j0, j1): the gates' pre-activations, then the cell.
       descending: last panel first; every other step is, to begin with the panels that the step
       before left in the cache. */
    void (*lstm_step)(const lstm_weights *w, int descending, ptrdiff_t n, ptrdiff_t j0, ptrdiff_t j1,
                      const lstm_row *rows);

    /* One time step backward: dh = dy + da_next W_hh, then the gradient of the cell. */
    void (*lstm_back_step)(const lstm_weights *w, int descending, ptrdiff_t n, ptrdiff_t j0,
                           ptrdiff_t j1, const lstm_back_row *rows);

    /* dW[m, n] = Σ_k da[k][m] x[k][n] of each product and, if db is not NULL, db[m] = Σ_k da[k][m],
       for m in [m0, m1) and K >= 1.  Sums are cut into blocks of a fixed number of k and added in order.
       work: weight_gradient_work(m1 - m0) bytes, 64-byte aligned. */
    void (*weight_gradient)(ptrdiff_t K, ptrdiff_t m0, ptrdiff_t m1, const void *const *da,
                            int n_products, const lstm_product *products, void *db, void *work);
    ptrdiff_t (*weight_gradient_work)(ptrdiff_t M);

    /* dp (3, H), columns [j0, j1): Σ_k da_i ∘ c_{t-1}, Σ_k da_f ∘ c_{t-1}, Σ_k da_o ∘ c_t. */
    void (*peephole_gradient)(ptrdiff_t K, ptrdiff_t H, ptrdiff_t j0, ptrdiff_t j1,
                              const void *const *da, const void *const *c_prev,
                              const void *const *c, void *dp);

    /* out[k] += a[k] on the columns [j0, j1), for k < n in ascending order; rows of out may repeat. */
    void (*add_rows)(ptrdiff_t n, ptrdiff_t j0, ptrdiff_t j1, const void *const *a, void *const *out);

    /* The vanilla cell on the columns [j0, j1) of n rows: h = tanh(h) or relu(h) in place, and
       da = dh ∘ (1 - h²) or dh ∘ [h > 0] in place of dh. */
    void (*rnn_cell)(int relu, ptrdiff_t n, ptrdiff_t j0, ptrdiff_t j1, void *const *h);
    void (*rnn_back_cell)(int relu, ptrdiff_t n, ptrdiff_t j0, ptrdiff_t j1, const void *const *h,
                          void *const *dh);

    /* m = o ∘ tanh(c) on the columns [j0, j1) of n rows, for the gradient of a projection. */
    void (*cell_output)(ptrdiff_t n, ptrdiff_t H, ptrdiff_t j0, ptrdiff_t j1,
                        const void *const *gates, const void *const *c, void *const *m);

    /* Softmax cross-entropy of n rows z (V) with their targets, V >= 1:  loss[r] = log Σ e^z - z_k;
       dz[r] = weight[r] (softmax(z) - [j = k]), of weight 0 whatever z is.  dz may be z. */
    void (*cross_entropy)(ptrdiff_t n, ptrdiff_t V, const void *z, const int64_t *target,
                          const void *weight, void *loss, void *dz);

    /* m += (1 - b1)(g - m);  v += (1 - b2)(g² - v);  p -= rate m / (√v + eps), for n numbers each. */
    void (*adam)(ptrdiff_t n, const lstm_adam *rule, void *p, const void *g, void *m, void *v);

    /* The activations on an array, for tests. */
    void (*sigmoid)(ptrdiff_t n, const void *x, void *out);
    void (*tanh)(ptrdiff_t n, const void *x, void *out);
} lstm_kernels;

/* The best table for this CPU, or the one named; NULL if that one can't run here. */
const lstm_kernels *lstm_kernels_for(const char *isa, int is_double);
/* Name k of the instruction sets that this CPU can run, best first; NULL past the last. */
const char *lstm_isa(int k);
/* Size of a core's second-level cache; 1 MB where the system does not say. */
ptrdiff_t lstm_l2_bytes(void);

#endif
