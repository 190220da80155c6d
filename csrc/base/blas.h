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
    /* B (m,n) = op(T)^-1 B for upper (upper != 0) or lower triangular T (m,m), row-major. */      \
    molae_status mli_trsm_##SFX(int upper, int trans, int64_t m, int64_t n, const REAL *T,         \
                                int64_t ldt, REAL *B, int64_t ldb);                                \
    /* Cholesky of the row-major upper triangle: A = U^T U. info > 0: not positive definite. */    \
    molae_status mli_potrf_##SFX(int64_t n, REAL *A, int64_t lda, int64_t *info);                  \
    /* Symmetric eigenproblem of the row-major upper triangle. w ascending. With vectors, row j    \
     * of A becomes the unit eigenvector of w[j]. work: mli_syevd_work_SFX(n, vectors) bytes,      \
     * 64-byte aligned. */                                                                         \
    molae_status mli_syevd_##SFX(int vectors, int64_t n, REAL *A, int64_t lda, REAL *w,            \
                                 void *work, size_t work_bytes, int64_t *info);                    \
    size_t mli_syevd_work_##SFX(int vectors, int64_t n);                                           \
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
