/* The top-R right singular subspace of a tall stack X (m,D): from its Gram matrix, or, where that
 * is too coarse, from an SVD of its triangular factor, which is built a few rows at a time. */
#ifndef MOLAE_FIT_BASIS_H
#define MOLAE_FIT_BASIS_H

#include "../molae.h"

/* Rows of a stack that are read and folded in at a time. */
enum { MLI_CHUNK = 1024 };

/* w: eigenvalues of the Gram matrix, ascending (p,). True if the energy that rank R discards is
 * so small that rounding in the Gram matrix could raise it by more than a hundredth.
 *
 * The top-R eigenvectors of G + Delta capture at least the optimum less 2 R ||Delta||_2 (Ky Fan),
 * and rounding makes ||Delta||_2 about eps * lambda_1. Proof and test: docs/theory.md. */
int mli_gram_too_coarse_f32(const float *w, int64_t p, int64_t R);
int mli_gram_too_coarse_f64(const double *w, int64_t p, int64_t R);

/* The triangular factor of a stack of rows of length D, built by orthogonal reduction. */
#define MLI_TSQR_DECLARE(REAL, SFX)                                                          \
    typedef struct {                                                                         \
        int64_t D;                                                                           \
        int64_t used; /* rows held */                                                        \
        REAL *rows;   /* (D + MLI_CHUNK, D): write new rows at rows + used * D, then push */ \
        REAL *tau;    /* (D,) */                                                             \
        REAL *s;      /* (D,): singular values, descending, after finish */                  \
        REAL *V;      /* (p, D): row j is the right singular vector of s[j], after finish */ \
        void *work;                                                                          \
        size_t work_bytes;                                                                   \
        int64_t info; /* LAPACK's */                                                         \
    } mli_tsqr_##SFX;                                                                        \
    size_t mli_tsqr_ws_##SFX(int64_t m, int64_t D);                                          \
    void mli_tsqr_init_##SFX(mli_tsqr_##SFX *t, int64_t m, int64_t D, char *ws);             \
    molae_status mli_tsqr_push_##SFX(mli_tsqr_##SFX *t, int64_t nr); /* nr <= MLI_CHUNK */   \
    molae_status mli_tsqr_finish_##SFX(mli_tsqr_##SFX *t);

MLI_TSQR_DECLARE(float, f32)
MLI_TSQR_DECLARE(double, f64)
#undef MLI_TSQR_DECLARE

#endif
