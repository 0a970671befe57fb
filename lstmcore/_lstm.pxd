# csrc/lstm.h, the C contract, as Cython sees it. Shapes and meaning stand there.

from libc.stdint cimport int64_t


cdef extern from *:
    """
    #undef I  /* complex.h, which NumPy includes, claims the letter */
    """


cdef extern from "lstm.h" nogil:
    enum: START_ZERO
    enum: START_BIAS
    enum: START_ADD
    enum: KW
    ctypedef struct lstm_activation:
        int kind
        double alpha
        double beta
    ctypedef struct lstm_variant:
        lstm_activation gate
        lstm_activation candidate
        lstm_activation cell
        bint clips
        double clip
        bint coupled
        bint zones
        double zone_h
        double zone_c
    ctypedef struct lstm_weights:
        Py_ssize_t I
        Py_ssize_t K
        Py_ssize_t H
        const void *ih
        const void *hh
        const void *bias
        const void *peepholes
        bint no_tape
        const lstm_variant *variant
        const void *norms
    ctypedef struct lstm_row:
        const void *x
        const void *h_low
        const void *h_prev
        const void *c_prev
        void *gates
        void *c
        void *h
        void *m
        const void *mask
        const void *zone
        const void *ax
        const void *ah
        void *raw
        void *moments
    ctypedef struct lstm_back_row:
        const void *da_next
        void *gates
        const void *h
        const void *c
        const void *c_prev
        const void *dy
        const void *h_prev
        void *dh
        void *dc
        void *m
        const void *mask
        const void *dy_apart
        const void *zone
        const void *ax
        const void *ah
        void *dah
        void *dn
        const void *raw
        const void *moments
    ctypedef struct lstm_normed:
        const void *da
        void *ax
        const void *ah
        const void *raw
        const void *dn
        const void *moments
    ctypedef struct lstm_cell:
        const char *name
        int gates
        int apart
        int later
        bint keeps_gates
        bint has_c
        bint reads_h
        bint varies
        int norms
        int moments
        bint keeps_raw
        void (*step)(const lstm_weights *w, bint descending, Py_ssize_t n, Py_ssize_t j0,
                     Py_ssize_t j1, const lstm_row *rows) noexcept nogil
        void (*back_step)(const lstm_weights *w, bint descending, Py_ssize_t n, Py_ssize_t j0,
                          Py_ssize_t j1, const lstm_back_row *rows) noexcept nogil
        void (*later_step)(const lstm_weights *w, bint descending, Py_ssize_t n, Py_ssize_t j0,
                           Py_ssize_t j1, const lstm_row *rows) noexcept nogil
        void (*later_back_step)(const lstm_weights *w, bint descending, Py_ssize_t n, Py_ssize_t j0,
                                Py_ssize_t j1, const lstm_back_row *rows) noexcept nogil
        void (*norm_step)(const lstm_weights *w, int part, Py_ssize_t n, Py_ssize_t j0, Py_ssize_t j1,
                          const lstm_row *rows) noexcept nogil
        void (*norm_back_step)(const lstm_weights *w, int part, Py_ssize_t n, Py_ssize_t j0,
                               Py_ssize_t j1, const lstm_back_row *rows) noexcept nogil
        void (*norm_gradient)(Py_ssize_t n, Py_ssize_t H, Py_ssize_t j0, Py_ssize_t j1,
                              const lstm_normed *tokens, void *dnorms) noexcept nogil
        void (*norm_inputs)(Py_ssize_t n, Py_ssize_t H, const lstm_normed *tokens,
                            const void *norms) noexcept nogil
        void (*output)(Py_ssize_t n, Py_ssize_t H, Py_ssize_t j0, Py_ssize_t j1, const void **gates,
                       const void **c, void **h) noexcept nogil
        void (*peephole_gradient)(Py_ssize_t K, Py_ssize_t H, Py_ssize_t j0, Py_ssize_t j1,
                                  const void **da, const void **c_prev, const void **c,
                                  void *dp) noexcept nogil
    ctypedef struct lstm_operand:
        int gates
        Py_ssize_t K
        Py_ssize_t N
        const void *W
        Py_ssize_t k_stride
        Py_ssize_t col_stride
        const float *scales
        int turn
        void *packed
    ctypedef struct lstm_rows:
        int start
        Py_ssize_t n
        const void **a
        const void *bias
        void **C
    ctypedef struct lstm_product:
        const void **x
        Py_ssize_t N
        void *dW
    ctypedef struct lstm_adam:
        double b1
        double b2
        double rate
        double eps
        double decay
        double keep
    ctypedef struct lstm_kernels:
        const char *isa
        const char *format
        Py_ssize_t item
        Py_ssize_t packed
        Py_ssize_t VL
        Py_ssize_t MR
        const lstm_cell *cells
        Py_ssize_t (*vector_bytes)(Py_ssize_t K) noexcept nogil
        Py_ssize_t (*lowered_bytes)(Py_ssize_t K) noexcept nogil
        void (*lower)(Py_ssize_t K, const void *a, void *row) noexcept nogil
        void (*pack)(const lstm_operand *w, Py_ssize_t j0, Py_ssize_t j1, Py_ssize_t first,
                     Py_ssize_t last) noexcept nogil
        void (*gemm)(const lstm_operand *w, Py_ssize_t j0, Py_ssize_t j1,
                     const lstm_rows *rows) noexcept nogil
        void (*weight_gradient)(Py_ssize_t K, Py_ssize_t m0, Py_ssize_t m1, const void **da,
                                int n_products, const lstm_product *products, bint add,
                                void *db, void *work) noexcept nogil
        Py_ssize_t (*weight_gradient_work)(Py_ssize_t M) noexcept nogil
        void (*add_rows)(Py_ssize_t n, Py_ssize_t j0, Py_ssize_t j1, const void **a,
                         void **out) noexcept nogil
        void (*cross_entropy)(Py_ssize_t n, Py_ssize_t V, const void *z, const int64_t *target,
                              const void *weight, void *loss, void *dz) noexcept nogil
        void (*adam)(Py_ssize_t n, const lstm_adam *rule, void *p, const void *g, void *m,
                     void *v) noexcept nogil
        void (*sigmoid)(Py_ssize_t n, const void *x, void *out) noexcept nogil
        void (*tanh)(Py_ssize_t n, const void *x, void *out) noexcept nogil
    const lstm_kernels *lstm_kernels_for(const char *isa, const char *format)
    const char *lstm_isa(int k)
    const lstm_cell *lstm_cell_of(const lstm_kernels *k, const char *name)
    Py_ssize_t lstm_l2_bytes()
