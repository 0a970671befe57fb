/* lstm.h: the C contract. What a kernel is given, what it writes, and what it refuses to know.

   Sizes:  I inputs, H hidden units, K length of a dot product, n rows.  All are ptrdiff_t.
   Arrays: row-major; a row pointer points at the first element of one row of numbers of the format.
           Gates rows hold the gates of H units one gate after the other: 4H numbers i, f, g, o.
   Rows:   kernels see rows, never time or batch: the plan (lstmcore/_forward.pyx, _backward.pyx) says
           where the row of each sequence lies at each step, so dense, ragged and reversed are the same
           to a kernel.
   Products: of a format without `lower`, rows are multiplied as they are. Of the others, each row that
           is multiplied is first lowered: a row of the format's own, made by `lower`. Those of a call
           lie at equal distances, and the memory up to a multiple of MR rows can be read. Sums, states
           and all that is written are numbers of the arrays.
   Units:  a kernel computes the columns [j0, j1) and writes nothing else.
   Bits:   every output element is one chain of multiply-adds over k in ascending order, or what its
           format says instead, whatever tile, row group or thread computes it: results do not depend on
           n, j0, j1 or the other rows.
   Memory: the caller owns everything; kernels allocate nothing, keep nothing, and run under any
           thread.  Outputs may alias nothing but what is said to be updated in place.

   One table of kernels stands for one instruction set and one number format.  It lists its cells, a row
   each: that row is all that a plan knows of a cell. */

#ifndef LSTMCORE_LSTM_H
#define LSTMCORE_LSTM_H

#include <stddef.h>
#include <stdint.h>

/* What an activation computes, with A->alpha and A->beta: SIGMOID σ(x), TANH α tanh(β x), AFFINE α x + β,
   HARD_SIGMOID α x + β in 0..1, LEAKY_RELU x or, below 0, α x, THRESHOLDED_RELU x or, up to α, 0,
   SOFTSIGN x / (1 + |x|), ELU β x or, below 0, β α (e^x - 1).  None of them may fall. */
enum { SIGMOID, TANH, AFFINE, HARD_SIGMOID, LEAKY_RELU, THRESHOLDED_RELU, SOFTSIGN, ELU };

typedef struct {
    int kind;
    double alpha, beta;
} lstm_activation;

/* In what a cell differs from the usual one, of cells that ask. */
typedef struct {
    lstm_activation gate, candidate, cell; /* of i, f and o; of g; of c before o multiplies it */
    int clips;           /* 1: pre-activations are limited to -clip..clip */
    double clip;
    int coupled;         /* 1: f = 1 - i */
    int zones;           /* 1: zoneout; zone_h and zone_c where rows have no masks of their own */
    double zone_h, zone_c;
} lstm_variant;

/* The weights of a step, packed for the units from j0 on. */
typedef struct {
    ptrdiff_t I, K, H;   /* I = 0: gates hold x W_ihᵀ + b already; K = 0: the recurrent part is zero */
    const void *ih, *hh; /* forward both packed with the gates that they feed; backward hh alone, K
                            wide, with 1 */
    const void *bias;    /* a row of gates or NULL; read if I > 0 */
    const void *peepholes; /* (3, H) or NULL; of cells that have them */
    int no_tape;         /* 1 if nobody asks for the gates: whether they are written is the cell's affair */
    const lstm_variant *variant; /* of cells that have some */
    const void *norms;   /* (rows, H) of cells that normalize, which say what they are */
} lstm_weights;

/* Where one sequence's forward step lives. */
typedef struct {
    const void *x;       /* (I)   x_t, lowered; not read if I = 0 */
    const void *h_low;   /* (K)   h_{t-1}, lowered; not read if K = 0 */
    const void *h_prev;  /* (H)   h_{t-1}, of cells that read h */
    const void *c_prev;  /* (H)   c_{t-1}, of cells with c; may be the same row as c */
    void *gates;         /* in: the pre-activations without the recurrent part; out: the gates, of cells
                                  that keep them; of others it may be the same row as h */
    void *c;             /* (H)   out: c_t, of cells with c */
    void *h;             /* (H)   out: h_t, before any projection */
    void *m;             /* (H)   out: what the later product multiplies, of cells with one; or h ∘ mask */
    const void *mask;    /* (H)   what the next step's product sees of h, or NULL for all */
    const void *zone;    /* (2, H) what h and c keep of their last values, or NULL */
    const void *ax, *ah; /* (4H) each, of cells that normalize: x_t W_ihᵀ and h_{t-1} W_hhᵀ */
    void *raw;           /* (H)   out: c_t before it is normalized, of cells whose c goes on normalized */
    void *moments;       /* out: pairs of mean and scale of what is normalized, or NULL */
} lstm_row;

/* Where one sequence's backward step lives. */
typedef struct {
    const void *da_next; /* da_{t+1}, the gates that h feeds, lowered; not read if K = 0 */
    void *gates;         /* in: the gates, of cells that keep them; out: da_t */
    const void *h;       /* (H)   h_t, of cells that do not keep their gates */
    const void *c;       /* (H)   c_t, of cells with c */
    const void *c_prev;  /* (H)   c_{t-1}, of cells with c */
    const void *dy;      /* (H)   what reaches h_t from above; may be the same row as gates if there is
                                  one gate */
    const void *h_prev;  /* (H)   h_{t-1}, of cells that read it */
    void *dh;            /* (H)   of cells that read h; in: what reaches h_t beside dy and the product;
                                  out: the same for h_{t-1} */
    void *dc;            /* (H)   of cells with c; in: what reaches c_t from step t+1; out: c_{t-1} */
    void *m;             /* (H)   out: what the later product multiplied, of cells with one */
    const void *mask;    /* (H)   as forward; then dy is a row of zeros, and the product is ∂L/∂(h ∘ mask) */
    const void *dy_apart; /* (H)  what reaches h_t from above, with a mask */
    const void *zone;    /* (2, H) as forward */
    const void *ax, *ah; /* (4H)  as forward */
    void *dah;           /* (4H)  out: what reaches ah */
    void *dn;            /* (H)   out: what reaches the normalized c */
    const void *raw, *moments; /* as forward */
} lstm_back_row;

/* What a token's step has left to the gradients of `norms`, which lstm_weights has. */
typedef struct {
    const void *da;
    void *ax;            /* out of norm_inputs: what reaches it */
    const void *ah, *raw, *dn, *moments; /* raw: c before it is normalized */
} lstm_normed;

/* A cell: everything that a plan asks of it. */
typedef struct {
    const char *name;
    int gates;           /* numbers of a row of gates for one unit, gate after gate */
    int apart;           /* of these, x alone feeds the first so many, h alone the last so many: W_ih and
                            W_hh have gates - apart rows for one unit.  0 if it keeps no gates */
    int later;           /* 1 if the last gate's product is with m, which the step makes of h_{t-1},
                            and so has a step of its own */
    int keeps_gates;     /* whether the tape keeps them, for da to take their place */
    int has_c;           /* whether a state c goes from step to step beside h; the tape keeps it too */
    int reads_h;         /* whether a unit reads its own h_{t-1} too; it has no projection then */
    int varies;          /* whether it asks for lstm_variant, and for masks */

    /* One time step of n sequences on the units [j0, j1): the pre-activations, then the cell.
       descending: last panel first; every other step is, to begin with the panels that the step
       before left in the cache. */
    void (*step)(const lstm_weights *w, int descending, ptrdiff_t n, ptrdiff_t j0, ptrdiff_t j1,
                 const lstm_row *rows);

    /* One time step backward: dh = dy + da_next W_hh, then the gradient of the cell. */
    void (*back_step)(const lstm_weights *w, int descending, ptrdiff_t n, ptrdiff_t j0, ptrdiff_t j1,
                      const lstm_back_row *rows);

    /* Of cells with a later product, what follows once all units are done.  Rows' gates then begin
       with the last one; h_low is m, lowered, and hh one gate.  Back, da_next are those gates, dy is
       zero, and hh is H wide. */
    void (*later_step)(const lstm_weights *w, int descending, ptrdiff_t n, ptrdiff_t j0, ptrdiff_t j1,
                       const lstm_row *rows);
    void (*later_back_step)(const lstm_weights *w, int descending, ptrdiff_t n, ptrdiff_t j0,
                            ptrdiff_t j1, const lstm_back_row *rows);

    int norms, moments;  /* of cells that normalize, rows of `norms` and numbers of `moments`, else 0 */
    int keeps_raw;       /* whether its c goes on normalized, and the tape keeps what it was before too */

    /* Of cells that normalize, in the place of step and back_step: `part` counts the parts of a step,
       between which all units are waited for; then what has no recurrence. NULL elsewhere; norm_inputs
       also where the same reaches x W_ihᵀ as h W_hhᵀ. */
    void (*norm_step)(const lstm_weights *w, int part, ptrdiff_t n, ptrdiff_t j0, ptrdiff_t j1,
                      const lstm_row *rows);
    void (*norm_back_step)(const lstm_weights *w, int part, ptrdiff_t n, ptrdiff_t j0, ptrdiff_t j1,
                           const lstm_back_row *rows);
    void (*norm_gradient)(ptrdiff_t n, ptrdiff_t H, ptrdiff_t j0, ptrdiff_t j1,
                          const lstm_normed *tokens, void *dnorms);
    void (*norm_inputs)(ptrdiff_t n, ptrdiff_t H, const lstm_normed *tokens, const void *norms);

    /* h (before projection) again, from the gates and c: what a projection's gradient needs.  NULL if
       the cell has no projection. */
    void (*output)(ptrdiff_t n, ptrdiff_t H, ptrdiff_t j0, ptrdiff_t j1, const void *const *gates,
                   const void *const *c, void *const *h);
    /* dp (3, H), columns [j0, j1): Σ_k da_i ∘ c_{t-1}, Σ_k da_f ∘ c_{t-1}, Σ_k da_o ∘ c_t.  NULL if the
       cell has no peepholes. */
    void (*peephole_gradient)(ptrdiff_t K, ptrdiff_t H, ptrdiff_t j0, ptrdiff_t j1,
                              const void *const *da, const void *const *c_prev,
                              const void *const *c, void *dp);
} lstm_cell;

/* The right side W[k, column] of a product.  Packed, its columns are grouped into panels of vectors:
       gates >= 2:  one vector of units from each of so many gates, whose columns are N apart;
       gates == 1:  up to four neighboring vectors of columns.
   A vector takes vector_bytes(K), in an order that is the format's own.  Panels are counted from the
   first column of a range [j0, j1) (of each gate), where `packed` of that range begins, 64-byte
   aligned. */
typedef struct {
    int gates;
    ptrdiff_t K, N;                 /* N columns, of each gate */
    const void *W;                  /* W[k·k_stride + column·col_stride]; read by pack alone */
    ptrdiff_t k_stride, col_stride;
    void *packed;
    const float *scales;            /* of each column, where W is of int8_t: the format int8 */
    int turn;                       /* vector v of a panel is of gate v + turn, modulo gates */
} lstm_operand;

/* What an output row holds before the sum is added. */
enum { START_ZERO = 0, START_BIAS = 1, START_ADD = 2 };

/* The rows of a product. */
typedef struct {
    int start;
    ptrdiff_t n;
    const void **a;        /* (K) each, lowered */
    const void *bias;      /* indexed by column; read if start is START_BIAS */
    void **C;              /* a number for each column */
} lstm_rows;

enum { KW = 256 };  /* k per block of a sum over time and batch: part of the definition of its bits */

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

typedef struct {
    const char *isa;
    const char *format;  /* the number format of its products: "float32", "float64", "bfloat16", "int8" */
    ptrdiff_t item;      /* bytes of a number in the arrays */
    ptrdiff_t packed;    /* bytes of a number in a packed operand */
    ptrdiff_t VL;        /* lanes of a vector */
    ptrdiff_t MR;        /* rows of a full tile */
    const lstm_cell *cells;  /* the last one has no name */

    /* Bytes of a vector of columns of K numbers, packed. */
    ptrdiff_t (*vector_bytes)(ptrdiff_t K);
    /* Bytes of a lowered row of K numbers, and a lowered row.  Both NULL where rows are taken as they
       are. */
    ptrdiff_t (*lowered_bytes)(ptrdiff_t K);
    void (*lower)(ptrdiff_t K, const void *a, void *row);

    /* Packs the panels [first, last) of the columns [j0, j1), padded with zeros. */
    void (*pack)(const lstm_operand *w, ptrdiff_t j0, ptrdiff_t j1, ptrdiff_t first, ptrdiff_t last);

    /* C[r, columns] = start + Σ_k a[r][k] W[k, column] for the rows, on the columns [j0, j1). */
    void (*gemm)(const lstm_operand *w, ptrdiff_t j0, ptrdiff_t j1, const lstm_rows *rows);

    /* dW[m, n] = Σ_k da[k][m] x[k][n] of each product and, if db is not NULL, db[m] = Σ_k da[k][m],
       for m in [m0, m1) and K >= 1.  Sums are cut into blocks of KW k and added in order; add: to what
       dW and db hold.  da and x are not lowered.  work: weight_gradient_work(m1 - m0) bytes, 64-byte
       aligned.  NULL, as back_step, where the format does not train. */
    void (*weight_gradient)(ptrdiff_t K, ptrdiff_t m0, ptrdiff_t m1, const void *const *da,
                            int n_products, const lstm_product *products, int add, void *db,
                            void *work);
    ptrdiff_t (*weight_gradient_work)(ptrdiff_t M);

    /* out[k] += a[k] on the columns [j0, j1), for k < n in ascending order; rows of out may repeat. */
    void (*add_rows)(ptrdiff_t n, ptrdiff_t j0, ptrdiff_t j1, const void *const *a, void *const *out);

    /* Softmax cross-entropy of n rows z (V) with their targets, V >= 1:  loss[r] = log Σ e^z - z_k;
       dz[r] = weight[r] (softmax(z) - [j = k]), of weight 0 whatever z is.  dz may be z, or NULL.
       NULL, as adam, in formats below float32. */
    void (*cross_entropy)(ptrdiff_t n, ptrdiff_t V, const void *z, const int64_t *target,
                          const void *weight, void *loss, void *dz);

    /* m += (1 - b1)(g - m);  v += (1 - b2)(g² - v);  p -= rate m / (√v + eps), for n numbers each. */
    void (*adam)(ptrdiff_t n, const lstm_adam *rule, void *p, const void *g, void *m, void *v);

    /* The activations on an array, for tests. */
    void (*sigmoid)(ptrdiff_t n, const void *x, void *out);
    void (*tanh)(ptrdiff_t n, const void *x, void *out);
} lstm_kernels;

/* The table of this number format for the best instruction set of this CPU, or the one named; NULL if
   that one can't run here or has no such table. */
const lstm_kernels *lstm_kernels_for(const char *isa, const char *format);
/* Name k of the instruction sets that this CPU can run, best first; NULL past the last. */
const char *lstm_isa(int k);
/* The cell of this name, or NULL. */
const lstm_cell *lstm_cell_of(const lstm_kernels *k, const char *name);
/* Size of a core's second-level cache; 1 MB where the system does not say. */
ptrdiff_t lstm_l2_bytes(void);

#endif
