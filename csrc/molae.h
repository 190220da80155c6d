/* molae: mixture-of-experts models made smaller.
 *
 * The public C header. It includes nothing but <stddef.h> and <stdint.h>, and no
 * function behind it prints, exits, aborts or reads the environment.
 *
 * Letters, the same in C, Python, docs and tests:
 *   E experts      F expert width (intermediate_size)   D model width (hidden_size)
 *   G groups of experts that share a factor             k experts of one group
 *   R latent rank
 * Matrices are C-contiguous, last axis fastest.
 */
#ifndef MOLAE_H
#define MOLAE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ------------------------------------------------------------------ status */

/* Negative: no result. Positive: a result with a caveat. Never renumbered. */
typedef enum {
    MOLAE_OK = 0,
    MOLAE_E_SHAPE = -1,
    MOLAE_E_ARG = -2,
    MOLAE_E_NOMEM = -3,
    MOLAE_E_TOO_LARGE = -4,
    MOLAE_E_NONFINITE = -5,
    MOLAE_E_LAPACK = -6,
    MOLAE_E_ISA = -7,
    MOLAE_W_NOT_CONVERGED = 1,
    MOLAE_W_RANK_DEFICIENT = 2,
    MOLAE_W_PRECISION = 3 /* the Gram matrix was too coarse; a direct SVD was used */
} molae_status;

/* Filled by the function that failed; -1 where an index does not apply. */
typedef struct {
    const char *what; /* static text: what went wrong */
    int64_t expert;   /* index into the experts as the caller passed them; -1: none */
    int64_t group;
    int64_t info; /* LAPACK's info, or a count */
} molae_errinfo;

/* ----------------------------------------------------------------- context */

typedef struct {
    int32_t num_threads; /* >= 1 */
} molae_ctx;

/* Storage types. Arithmetic is f64 for f64 input and f32 for all others. */
typedef enum { MOLAE_F32 = 0, MOLAE_F64 = 1, MOLAE_F16 = 2, MOLAE_BF16 = 3 } molae_dtype;

/* ------------------------------------------------- fit: shared low-rank factors */

/* The side on which the experts of a group share their factor. X_i below is W_i for the input
 * side and W_i^T for the output side, so that all mathematics is written once, for X_i (F,D). */
typedef enum { MOLAE_SIDE_INPUT = 0, MOLAE_SIDE_OUTPUT = 1 } molae_side;

/* Plain: B (R,D). Gauge: B[:, perm] = [I | M] with M (R,D-R). */
typedef enum { MOLAE_FORM_PLAIN = 0, MOLAE_FORM_GAUGE = 1 } molae_form;

/* Experts' matrices of one type, in the order of their groups. */
typedef struct {
    int64_t E;
    int64_t F; /* private dimension: rows of W_i (input side) or columns (output side) */
    int64_t D; /* shared dimension: columns of W_i (input side) or rows (output side) */
    molae_dtype dtype;
    molae_side side;
    const void *const *W; /* E pointers: (F,D) input side, (D,F) output side */
    int64_t G;
    const int64_t *group_ptr; /* (G+1): group g holds experts group_ptr[g] .. group_ptr[g+1]-1 */
} molae_stack;

/* What molae_factor_shared writes. No pointer may overlap another or the input. */
typedef struct {
    void *const *shared;   /* G pointers, stack dtype: M (R,D-R) or B (R,D); ignored where R = 0 */
    int32_t *const *perm;  /* G pointers (D,); gauge form only, else NULL */
    void *const *private_; /* G pointers, stack dtype: A (k,F,R) input side, (k,R,F) output side */
    double *spectrum;      /* (G,D): singular values of the stacked group, descending, 0 padded */
    double *energy;        /* (E,): ||W_i||^2 */
    double *residual;      /* (E,): ||W_i - What_i||^2 of the factors as stored; NULL: not wanted */
    int32_t *used_svd;     /* (G,): 1 where the Gram matrix was too coarse */
} molae_factors;

/* Joint factorization of each group: X_i ~ A_i B with B (R,D) shared.
 *
 *   B   spans the top-R right singular subspace of stack(X_1 .. X_k), from the eigenvectors of
 *       sum_i X_i^T X_i (or of the stack's small side where kF < D); where the energy beyond R is
 *       too small for that (docs/theory.md, "When the Gram matrix is enough") from an SVD of the
 *       stack's triangular factor, with MOLAE_W_PRECISION;
 *   B   is brought to `form` and rounded to the storage type;
 *   A_i = X_i B^T (B B^T)^-1, least squares against the rounded B, then rounded.
 *
 * rank: (G,), 0 <= rank[g] <= min(k F, D). rank NULL: spectrum, energy and used_svd only (the
 * latter by the rule for rank 0). Outputs are overwritten. Groups are independent: any partition
 * of the groups over calls and any thread count give the same bits.
 * ws: molae_factor_ws_<real>() bytes, 64-byte aligned. Use _f64 for f64 stacks, _f32 for others.
 * Flops for a group: k F D^2 (Gram) + 5/3 D^3 + 3 D^2 c (c eigenvectors) + 2 k F D R (private),
 * c = R; in gauge form with R > D/2 c = D-R and 4 k F R (D-R) [+ at most 2 k F D R (residual)]. Errors: NONFINITE with the expert's
 * index, LAPACK, SHAPE, ARG. Source: MoLAE, arXiv 2503.23100 (joint factorization); gauge form
 * docs/theory.md. */
size_t molae_factor_ws_f32(const molae_ctx *ctx, const molae_stack *s, const int64_t *rank);
size_t molae_factor_ws_f64(const molae_ctx *ctx, const molae_stack *s, const int64_t *rank);
molae_status molae_factor_shared_f32(const molae_ctx *ctx, const molae_factors *out,
                                     const molae_stack *s, const int64_t *rank, molae_form form,
                                     void *ws, size_t ws_bytes, molae_errinfo *err);
molae_status molae_factor_shared_f64(const molae_ctx *ctx, const molae_factors *out,
                                     const molae_stack *s, const int64_t *rank, molae_form form,
                                     void *ws, size_t ws_bytes, molae_errinfo *err);

/* Best approximation of rank R of each expert's matrix on its own (Eckart-Young):
 * out (E, rows, cols) in f32 (f64 for f64 stacks), overwritten. Groups and side are only read for
 * the matrices' shape. used_svd: (E,). Threads over experts. Source: MoLAE, step 1. */
size_t molae_reduce_rank_ws_f32(const molae_ctx *ctx, const molae_stack *s);
size_t molae_reduce_rank_ws_f64(const molae_ctx *ctx, const molae_stack *s);
molae_status molae_reduce_rank_f32(const molae_ctx *ctx, float *out, int32_t *used_svd,
                                   const molae_stack *s, int64_t rank, void *ws, size_t ws_bytes,
                                   molae_errinfo *err);
molae_status molae_reduce_rank_f64(const molae_ctx *ctx, double *out, int32_t *used_svd,
                                   const molae_stack *s, int64_t rank, void *ws, size_t ws_bytes,
                                   molae_errinfo *err);

/* Gauge form of one basis: B (R,D) of full row rank -> M (R,D-R) and perm (D,) with
 * B = T [I | M] P for an invertible T, that is [I | M] spans the rows of B.
 * Column-pivoted QR keeps |M| small. ARG if the rows of B are dependent to working precision. */
size_t molae_gauge_ws_f32(int64_t R, int64_t D);
size_t molae_gauge_ws_f64(int64_t R, int64_t D);
molae_status molae_gauge_f32(float *M, int32_t *perm, const float *B, int64_t R, int64_t D,
                             void *ws, size_t ws_bytes, molae_errinfo *err);
molae_status molae_gauge_f64(double *M, int32_t *perm, const double *B, int64_t R, int64_t D,
                             void *ws, size_t ws_bytes, molae_errinfo *err);

#ifdef __cplusplus
}
#endif
#endif /* MOLAE_H */
