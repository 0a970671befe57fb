# cython: language_level=3, boundscheck=False, wraparound=False
"""Row-major matrix products over SciPy's Fortran BLAS, float and double.

A module of its own, because importing it loads SciPy: `_kernels` takes the address of `gemm` when the
BLAS plan is first used.
"""

from scipy.linalg.cython_blas cimport dgemm, sgemm

import numpy as np


cdef void gemm(bint is_double, bint trans_a, bint trans_b, int m, int n, int k, double alpha,
               const void *a, int lda, const void *b, int ldb, double beta, void *c,
               int ldc) noexcept nogil:
    """C (m,n) = alpha op(A) op(B) + beta C; op(A) is (m,k), op(B) (k,n); lda, ldb, ldc: row lengths.

    Fortran sees every row-major matrix as its transpose, so it is asked for Cᵀ = op(B)ᵀ op(A)ᵀ.
    """
    cdef char ta = b"T" if trans_a else b"N"
    cdef char tb = b"T" if trans_b else b"N"
    cdef float alpha_f = <float>alpha
    cdef float beta_f = <float>beta
    if is_double:
        dgemm(&tb, &ta, &n, &m, &k, &alpha, <double *>b, &ldb, <double *>a, &lda, &beta,
              <double *>c, &ldc)
    else:
        sgemm(&tb, &ta, &n, &m, &k, &alpha_f, <float *>b, &ldb, <float *>a, &lda, &beta_f,
              <float *>c, &ldc)


def gemm_address():
    """The address of the C function `gemm`."""
    return <size_t>&gemm


def matrix_product(double alpha, a, bint trans_a, b, bint trans_b, double beta, c):
    """c = alpha op(a) op(b) + beta c in place, on C-contiguous arrays: `gemm` for its tests."""
    cdef size_t pa = a.ctypes.data, pb = b.ctypes.data, pc = c.ctypes.data
    m, n = c.shape
    gemm(c.dtype == "float64", trans_a, trans_b, m, n, a.shape[0 if trans_a else 1], alpha,
         <void *>pa, a.shape[1], <void *>pb, b.shape[1], beta, <void *>pc, n)


def rows_are_alike(dtype, int rows, int edge, int width):
    """Whether a product of that many rows gives equal rows equal bits wherever they stand.

    Asked of up to `width` columns between two edges, with sums that random numbers round differently
    in any other order; K from where small kernels end to where K is cut. 10 to 15 ms (Zen 3).
    """
    numbers = np.random.default_rng(0).standard_normal(900 * (width + 2 * edge)).astype(dtype)
    for K in 7, 33, 130, 450, 900:
        a = np.repeat(numbers[-K:][None], rows, 0)
        for n in 8, 16, 40, 64, 104, width:
            columns = n + 2 * edge
            b = numbers[:K * columns]
            for shape, transposed in ((K, columns), False), ((columns, K), True):
                out = np.repeat(numbers[:columns][None], rows, 0)
                matrix_product(1.0, a, False, b.reshape(shape), transposed, 1.0, out)
                if (out != out[0])[:, edge:columns - edge].any():
                    return False
    return True
