/* BLAS and LAPACK: sizes are int64_t and are refused (MOLAE_E_TOO_LARGE) past INT_MAX.
 *
 * BLAS calls are row-major. LAPACK calls are column-major: a row-major (m, n) array is the
 * column-major (n, m) array of its transpose, and the callers think in those terms.
 * Every routine exists for both precisions, with the suffix _f32 or _f64; MLI_BLAS_DECLARE
 * spells the prototypes once. */
#ifndef MOLAE_BASE_BLAS_H
#define MOLAE_BASE_BLAS_H

#include "../molae.h"

#define MLI_BLAS_DECLARE(REAL, SFX)                                                                \
    /* C (m,n) = alpha op(A) op(B) + beta C; op transposes where the flag is set.                  \
     * beta == 0 never reads C. */                                                                 \
    molae_status mli_gemm_##SFX(int ta, int tb, int64_t m, int64_t n, int64_t k, REAL alpha,       \
                                const REAL *A, int64_t lda, const REAL *B, int64_t ldb, REAL beta, \
                                REAL *C, int64_t ldc);                                             \
    /* C (n,n), upper triangle = alpha A A^T + beta C for A (n,k); with trans A^T A, A (k,n). */   \
    molae_status mli_syrk_##SFX(int trans, int64_t n, int64_t k, REAL alpha, const REAL *A,        \
                                int64_t lda, REAL beta, REAL *C, int64_t ldc);                     \
    /* C (n,n), upper triangle = alpha (A^T B + B^T A) + beta C for A, B (k,n). */                 \
    molae_status mli_syr2k_##SFX(int64_t n, int64_t k, REAL alpha, const REAL *A, int64_t lda,     \
                                 const REAL *B, int64_t ldb, REAL beta, REAL *C, int64_t ldc);     \
    /* y = alpha op(A) x + beta y for A (m,n). */                                                  \
    molae_status mli_gemv_##SFX(int trans, int64_t m, int64_t n, REAL alpha, const REAL *A,        \
                                int64_t lda, const REAL *x, REAL beta, REAL *y);                   \
    /* B (m,n) = op(T)^-1 B for upper triangular T (m,m), row-major. */                            \
    molae_status mli_trsm_##SFX(int trans, int64_t m, int64_t n, const REAL *T, int64_t ldt,       \
                                REAL *B, int64_t ldb);                                             \
    /* B (m,n) = B op(T)^-1 for upper triangular T (n,n), row-major. */                            \
    molae_status mli_trsm_right_##SFX(int trans, int64_t m, int64_t n, const REAL *T, int64_t ldt, \
                                      REAL *B, int64_t ldb);                                       \
    /* B (m,n) = op(T) B for upper triangular T (m,m), and B op(T) for T (n,n), row-major. */      \
    molae_status mli_trmm_##SFX(int trans, int64_t m, int64_t n, const REAL *T, int64_t ldt,       \
                                REAL *B, int64_t ldb);                                             \
    molae_status mli_trmm_right_##SFX(int trans, int64_t m, int64_t n, const REAL *T, int64_t ldt, \
                                      REAL *B, int64_t ldb);                                       \
    /* Upper triangle of symmetric A (n,n) = that of U A U^T for upper triangular U, row-major. */ \
    molae_status mli_sygst_##SFX(int64_t n, REAL *A, int64_t lda, const REAL *U, int64_t ldu,      \
                                 int64_t *info);                                                   \
    /* Cholesky of the row-major upper triangle: A = U^T U. info > 0: not positive definite. */    \
    molae_status mli_potrf_##SFX(int64_t n, REAL *A, int64_t lda, int64_t *info);                  \
    /* The same with diagonal pivoting until the largest pivot left is tol: A P = U^T U on the     \
     * first *rank rows of U. piv (n) is 0-based on return. */                                     \
    molae_status mli_pstrf_##SFX(int64_t n, REAL *A, int64_t lda, int32_t *piv, int64_t *rank,     \
                                 REAL tol, void *work, size_t work_bytes, int64_t *info);          \
    size_t mli_pstrf_work_##SFX(int64_t n);                                                        \
    /* Column-major A (n,n) is factored and B (n,nrhs) becomes A^-1 B. info > 0: singular. */      \
    molae_status mli_gesv_##SFX(int64_t n, int64_t nrhs, REAL *A, int64_t lda, int32_t *piv,       \
                                REAL *B, int64_t ldb, int64_t *info);                              \
    /* Eigenvalues of the tridiagonal matrix d (n), e (n-1), both overwritten; d ascending. */     \
    molae_status mli_sterf_##SFX(int64_t n, REAL *d, REAL *e, int64_t *info);                      \
    /* The same with eigenvectors, by divide and conquer: row j of Z (n,n) is that of d[j]. */     \
    molae_status mli_stedc_##SFX(int64_t n, REAL *d, REAL *e, REAL *Z, int64_t ldz, void *work,    \
                                 size_t work_bytes, int64_t *info);                                \
    size_t mli_stedc_work_##SFX(int64_t n);                                                        \
    /* First half of a merge of divide and conquer, LAPACK's laed2: rows of Z (n,n) are the        \
     * eigenvectors of two tridiagonal halves of orders n1 and n-n1, d (n) their eigenvalues,      \
     * ascending in each half, *rho the entry that was torn out and z (n) the last and first       \
     * components. Leaves k roots to find, with poles (k), weights (k) and *rho of their equation; \
     * vectors of half 1 (n12 rows of n1) and then of half 2 (n23 rows of n-n1) in Q2              \
     * (n^2); order (k), 0-based: row i of the roots' vectors multiplies Q2's rows in              \
     * this order, n12 from 0 and n23 from first2; and n-k vectors that need nothing in rows k..   \
     * of Z with d[k..], descending. */                                                            \
    molae_status mli_laed2_##SFX(int64_t n, int64_t n1, REAL *d, REAL *Z, REAL *rho, REAL *z,      \
                                 REAL *poles, REAL *weights, REAL *Q2, int32_t *order, int64_t *k, \
                                 int64_t *n12, int64_t *first2, int64_t *n23, void *work,          \
                                 size_t work_bytes, int64_t *info);                                \
    size_t mli_laed2_work_##SFX(int64_t n);                                                        \
    /* Root j of 1 + rho sum_i weights_i^2 / (poles_i - x): delta_i = poles_i - x (for k <= 2 the  \
     * vector itself). */                                                                          \
    molae_status mli_laed4_##SFX(int64_t k, int64_t j, const REAL *poles, const REAL *weights,     \
                                 REAL rho, REAL *delta, REAL *x, int64_t *info);                   \
    /* Column-major A (m,n), column pivoting: A P = Q R. jpvt (n) is 0-based on return. */         \
    molae_status mli_geqp3_##SFX(int64_t m, int64_t n, REAL *A, int64_t lda, int32_t *jpvt,        \
                                 REAL *tau, void *work, size_t work_bytes, int64_t *info);         \
    size_t mli_geqp3_work_##SFX(int64_t m, int64_t n);                                             \
    /* Column-major A (m,n) = L Q; L in the lower triangle. tau: min(m,n). */                      \
    molae_status mli_gelqf_##SFX(int64_t m, int64_t n, REAL *A, int64_t lda, REAL *tau,            \
                                 void *work, size_t work_bytes, int64_t *info);                    \
    size_t mli_gelqf_work_##SFX(int64_t m, int64_t n);                                             \
    /* Column-major A (m,n) = U S V^T, destroyed: s descending (min(m,n)), U (m,min(m,n)) with     \
     * leading dimension ldu; V^T is computed into work and dropped. */                            \
    molae_status mli_gesdd_##SFX(int64_t m, int64_t n, REAL *A, int64_t lda, REAL *s, REAL *U,     \
                                 int64_t ldu, void *work, size_t work_bytes, int64_t *info);       \
    size_t mli_gesdd_work_##SFX(int64_t m, int64_t n);

MLI_BLAS_DECLARE(float, f32)
MLI_BLAS_DECLARE(double, f64)
#undef MLI_BLAS_DECLARE

/* What is linked. Strings are static or owned by the library. */
const char *mli_blas_config(void); /* OpenBLAS's own config string */
const char *mli_blas_core(void);   /* core type in use, such as "SkylakeX" */
const char *mli_blas_prefix(void); /* symbol prefix, "scipy_" or "" */
int mli_blas_vendored(void);       /* 1: molae's own copy */
const char *mli_blas_path(void);   /* file of the shared library, or "" */
int mli_blas_get_num_threads(void);
void mli_blas_set_num_threads(int n);

/* Around every call that computes: BLAS runs on one thread in between, since molae threads over
 * groups and experts. The first of overlapping calls sets the count, the last restores it. The
 * count is the process's own where the library is shared with others (a system's OpenBLAS). */
void mli_blas_enter(void);
void mli_blas_leave(void);

#endif
