/* The symmetric eigenproblem with a range of its eigenvectors: all a factorization needs are
 * those it keeps or those it discards, and turning back the others is a third of the work. */
#ifndef MOLAE_FIT_EIGEN_H
#define MOLAE_FIT_EIGEN_H

#include "../molae.h"

/* w (n,): eigenvalues, ascending, of the row-major upper triangle of A (n,n). Rows lo ..
 * lo+count-1 of A become the unit eigenvectors of w[lo] .. w[lo+count-1], the rest of A is
 * overwritten. Householder tridiagonalization, divide and conquer, and the Householder vectors
 * applied in blocks to the range alone. work: mli_eigen_work(n, count) bytes, 64-byte aligned.
 * NONFINITE where A holds a NaN or Inf. Flops: 4/3 n^3 + <= 4/3 n^3 + 2 n^2 count. */
molae_status mli_eigen_f32(int64_t n, float *A, float *w, int64_t lo, int64_t count, void *work,
                           size_t work_bytes, int64_t *info);
molae_status mli_eigen_f64(int64_t n, double *A, double *w, int64_t lo, int64_t count, void *work,
                           size_t work_bytes, int64_t *info);
size_t mli_eigen_work_f32(int64_t n, int64_t count);
size_t mli_eigen_work_f64(int64_t n, int64_t count);

#endif
