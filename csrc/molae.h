/* molae: mixture-of-experts models made smaller.
 *
 * The public C header. It includes nothing but <stddef.h> and <stdint.h>, and no
 * function behind it prints, exits, aborts or reads the environment.
 *
 * Letters, the same in C, Python, docs and tests:
 *   E experts      F expert width (intermediate_size)   D model width (hidden_size)
 *   G groups of experts that share a factor             k experts of one group
 *   R latent rank      N tokens of a call               K experts a token is sent to
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

/* Somebody's threads, lent for a while: calls fn(arg) at the same time on at most num_threads
 * threads, the caller's among them, and returns when all are done. The type of OpenMP's
 * GOMP_parallel (its flags: 0). */
typedef void (*molae_team)(void (*fn)(void *), void *arg, unsigned num_threads, unsigned flags);

typedef struct {
    int32_t num_threads; /* >= 1 */
    molae_team team;     /* NULL: molae's own threads */
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
 * c = R; in gauge form with R > D/2 c = D-R and 4 k F R (D-R) [+ at most 2 k F D R (residual)].
 * Errors: NONFINITE with the expert's index, LAPACK, SHAPE, ARG. Source: MoLAE, arXiv 2503.23100
 * (joint factorization); gauge form docs/theory.md. */
size_t molae_factor_ws_f32(const molae_ctx *ctx, const molae_stack *s, const int64_t *rank);
size_t molae_factor_ws_f64(const molae_ctx *ctx, const molae_stack *s, const int64_t *rank);
molae_status molae_factor_shared_f32(const molae_ctx *ctx, const molae_factors *out,
                                     const molae_stack *s, const int64_t *rank, molae_form form,
                                     void *ws, size_t ws_bytes, molae_errinfo *err);
molae_status molae_factor_shared_f64(const molae_ctx *ctx, const molae_factors *out,
                                     const molae_stack *s, const int64_t *rank, molae_form form,
                                     void *ws, size_t ws_bytes, molae_errinfo *err);

/* The metric of a fit: second moments of what the experts read, see molae_second_moments. */
typedef struct {
    const void *const *moment; /* E pointers: C_i (D,D) input side, H_i (F,F) output side */
    const void *const *rows;   /* E pointers: S_i (F,F) symmetric, input side only; NULL: all I */
    molae_dtype dtype;         /* of both: F32 or F64 */
    double shrinkage, ridge;   /* >= 0 and > 0, see below */
} molae_metric;

/* As molae_factor_shared in the metric of the moments: X_i ~ A_i B with a small
 *
 *   input side    sum_i tr(S_i (X_i - A_i B) C'_i (X_i - A_i B)^T)
 *   output side   sum_i tr((X_i - A_i B)^T H'_i (X_i - A_i B))
 *
 * Each C_i gets ridge tr(C_i)/D on its diagonal, C is the sum of the group's, and
 * C'_i = C_i + (shrinkage tr(C_i)/tr(C) + ridge) C: an expert of few rows leans on its group, one
 * of none has next to no say. Where no row reached the group at all C = C'_i = I. H likewise.
 *
 *   B   input side: with C = L^T L, the top-R eigenvectors U of L (sum_i w_i X_i^T S_i X_i) L^T,
 *       w_i = tr(C'_i)/tr(C), and B L^T = U: exact where the C'_i are multiples of C, as for one
 *       expert. Output side: the top-R eigenvectors of sum_i X_i^T H'_i X_i, the global optimum.
 *       Then brought to `form` and rounded to the storage type;
 *   A_i = X_i C'_i B^T (B C'_i B^T)^-1, output side X_i B^T (B B^T)^-1: least squares against the
 *       rounded B, then rounded.
 *
 * out: as there, but spectrum is the roots of the eigenvalues, whose squares beyond R are the
 * objective that is lost (input side: of the pooled problem); energy and residual are in the
 * metric, and neither is written where residual is NULL; used_svd is not written. rank NULL:
 * spectrum only. Arithmetic is f64, but where the weights are narrower and the moments f32 the
 * products that no small direction feels are f32: the Gram matrix (D,D), X_i C'_i B^T,
 * S_i A_i. A residual below 1e-3 of the energy (1e-5 without f32) is measured on X_i - A_i B,
 * others by expansion. Groups are independent, and any thread count gives the same bits.
 * Groups that follow each other and point to the same matrices and moments, one rank each, share
 * all that does not depend on it, up to the eigenvectors. Threads over such runs, then experts.
 * ws: molae_factor_weighted_ws() bytes, 64-byte aligned: about (4 D^2 + W^2 + F^2 + 4 F D + F R)
 * numbers and LAPACK's a thread, W^2 + R D a group.
 * Flops, R <= D/2 (else D-R instead of R for B). Input side: k (2 F^2 D with S_i + F D^2) + D^3/3
 * + D^3 + an eigenproblem (8/3 D^3 + 2 R D^2) + R D^2 + 2 R^2 D and the gauge a group,
 * 2 R (D-R) D + R^2 (D-R) + 2 F R D + 2 F R^2 an expert, 2 F^2 R + F R^2 more for its residual.
 * Output side where k F < D: k (F^3/3 + F^2 D) + (k F)^2 D + an eigenproblem of order k F +
 * 2 R k F D + 2 R^2 D a group, else k (2 F^2 D + F D^2) + an eigenproblem of order D; 2 F R (D-R) +
 * 2 F R^2 an expert and its residual as above. Errors: NONFINITE with the expert (weights or
 * moments), LAPACK, SHAPE, ARG. Sources: SVD-LLM, arXiv 2403.07378 (one expert); docs/theory.md. */
size_t molae_factor_weighted_ws(const molae_ctx *ctx, const molae_stack *s,
                                const molae_metric *metric, const int64_t *rank);
molae_status molae_factor_weighted(const molae_ctx *ctx, const molae_factors *out,
                                   const molae_stack *s, const molae_metric *metric,
                                   const int64_t *rank, molae_form form, void *ws, size_t ws_bytes,
                                   molae_errinfo *err);

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

/* Second moments of what the experts of a layer read, weighted as the layer weighs them:
 *
 *   C_e += sum over slots (t,k) with index[t,k] = e of weight[t,k]^2 x x^T
 *
 * where x is row t of x (N,W), or with per_slot row t K + k of x (N K, W), such as the intermediate
 * of each slot. C: (E,W,W), symmetric, ADDED to, as are count: (E,), the rows, and mass: (E,), the
 * sums of weight^2. x is of type io: F32 or BF16, F64 for _f64. index: (N,K), E means "not here".
 * ws: molae_second_moments_ws_<real>() bytes, 64-byte aligned. C overlaps nothing. Any thread
 * count gives the same bits; a call's rows are added in blocks, so that how tokens are cut into
 * calls shows in the last bits.
 * Flops: rows W^2. Errors: NONFINITE (x or weight; info is the row or the slot; nothing is added),
 * SHAPE, ARG. */
size_t molae_second_moments_ws_f32(const molae_ctx *ctx, int64_t N, int64_t K, int64_t E,
                                   int64_t W);
size_t molae_second_moments_ws_f64(const molae_ctx *ctx, int64_t N, int64_t K, int64_t E,
                                   int64_t W);
molae_status molae_second_moments_f32(const molae_ctx *ctx, float *C, double *mass, int64_t *count,
                                      const void *x, molae_dtype io, int per_slot,
                                      const int64_t *index, const float *weight, int64_t N,
                                      int64_t K, int64_t E, int64_t W, void *ws, size_t ws_bytes,
                                      molae_errinfo *err);
molae_status molae_second_moments_f64(const molae_ctx *ctx, double *C, double *mass, int64_t *count,
                                      const void *x, molae_dtype io, int per_slot,
                                      const int64_t *index, const double *weight, int64_t N,
                                      int64_t K, int64_t E, int64_t W, void *ws, size_t ws_bytes,
                                      molae_errinfo *err);

/* Each expert's matrix times its moments, or times their inverse:
 *
 *   ROOT      out_e = U_e, upper triangular with 0 below, U_e^T U_e = M_e + r I,
 *             r = ridge tr(M_e) / n; 0 where tr(M_e) is 0
 *   SOLVE     out_e = W_e (U_e^T U_e)^-1, with U_e in the place of M_e; 0 where U_e is 0
 *   TIMES     out_e = W_e M_e
 *   PROJECT   out_e = W_e M_e W_e^T
 *
 * E pointers each: W (rows[e],n), M (n,n) symmetric, out (rows[e],n), for ROOT (n,n) and no W, for
 * PROJECT (rows[e],rows[e]). With `left` SOLVE and TIMES multiply from the left, W and out
 * (n,rows[e]). W and out are of type `type`, M of `metric`, each F32 or F64: SOLVE works in
 * `metric`, which is `type` or F64; TIMES in `type`, which is `metric`; ROOT and PROJECT in F64.
 * For SOLVE out_e may be W_e; an M may serve several; rows[e] may be 0. Threads over experts. ws:
 * molae_moments_product_ws() bytes, 64-byte aligned, a thread: ROOT n^2 doubles, SOLVE max(rows) n,
 * PROJECT n^2 + 2 max(rows) n + max(rows)^2. Flops an expert: ROOT n^3 / 3, SOLVE and TIMES
 * 2 rows n^2, PROJECT 2 rows n^2 + 2 rows^2 n. Errors: NONFINITE, LAPACK, each with the expert. */
typedef enum {
    MOLAE_MOMENTS_ROOT = 0,
    MOLAE_MOMENTS_SOLVE = 1,
    MOLAE_MOMENTS_TIMES = 2,
    MOLAE_MOMENTS_PROJECT = 3
} molae_moments_op;

size_t molae_moments_product_ws(const molae_ctx *ctx, molae_moments_op op, int64_t E,
                                const int64_t *rows, int64_t n);
molae_status molae_moments_product(const molae_ctx *ctx, molae_moments_op op, int left,
                                   void *const *out, const void *const *W, molae_dtype type,
                                   const void *const *M, molae_dtype metric, double ridge,
                                   int64_t E, const int64_t *rows, int64_t n, void *ws,
                                   size_t ws_bytes, molae_errinfo *err);

/* One step of AdamW on all numbers of some arrays, with decoupled decay:
 *
 *   m = beta1 m + (1 - beta1) c g,   v = beta2 v + (1 - beta2) (c g)^2
 *   w = w - lr (m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps) + decay w)
 *
 * Of each array w, m, v: (n,), read and written; g: (n,), the gradient; none overlap. step counts
 * from 1. *norm is that of all gradients together, and c is max_norm / *norm where max_norm is more
 * than 0 and less than that, else 1. The norm is summed in double, in an order that depends on the
 * arrays' lengths alone, and all else is done number by number, so that any thread count gives the
 * same bits. ws: molae_adamw_ws() bytes, 64-byte aligned. 22 n flops, 8 n numbers moved. Errors:
 * ARG; NONFINITE (g; info is the array): nothing has moved. */
typedef struct {
    double beta1, beta2, eps, decay, max_norm;
} molae_adamw;

typedef struct {
    void *w, *m, *v; /* of the arithmetic's type */
    const void *g;
    int64_t n;
    double lr;
} molae_adamw_array;

size_t molae_adamw_ws(const molae_adamw_array *arrays, int64_t count);
molae_status molae_adamw_f32(const molae_ctx *ctx, double *norm, const molae_adamw_array *arrays,
                             int64_t count, const molae_adamw *how, int64_t step, void *ws,
                             size_t ws_bytes, molae_errinfo *err);
molae_status molae_adamw_f64(const molae_ctx *ctx, double *norm, const molae_adamw_array *arrays,
                             int64_t count, const molae_adamw *how, int64_t step, void *ws,
                             size_t ws_bytes, molae_errinfo *err);

/* Sum of a[i] b[i] for i < n, in double: 16 partial sums, lane j takes i = j, j + 16, ...; folded
 * in halves. Serial: 2 n flops, 2 n numbers read. */
double molae_dot_f32(const float *a, const float *b, int64_t n);

/* out[r] = sum of the squares of row r of x (rows,n), in double, in the order of molae_dot_f32.
 * 2 rows n flops. Errors: SHAPE. */
molae_status molae_row_lengths_f32(const molae_ctx *ctx, double *out, const float *x, int64_t rows,
                                   int64_t n);

/* Row i of out (n,bytes) = row index[i] of src (rows,bytes); they may not overlap. Rows far apart
 * are asked for ahead. Errors: SHAPE; ARG, an index is out of range (err->info: which). */
molae_status molae_take_rows(const molae_ctx *ctx, void *out, const void *src, int64_t rows,
                             const int64_t *index, int64_t n, int64_t bytes, molae_errinfo *err);

/* --------------------------------------------------------- ops: expert layers */

/* Which rows go to which expert: a stable counting sort of top_k_index by expert.
 *
 * index: (N,K), 0 .. E; E means "not here" and gives no row; the same expert twice in a token
 * gives two rows. expert_ptr: (E+1), rows: (N K), both overwritten: rows[expert_ptr[e] ..
 * expert_ptr[e+1]-1] are the slots t K + k of expert e, ascending. ARG for another index. */
molae_status molae_route(int64_t *expert_ptr, int64_t *rows, const int64_t *index, int64_t N,
                         int64_t K, int64_t E, molae_errinfo *err);

/* Which tokens go to which group, each once. group_of: (E,), a group of 0 .. G-1 or -1 (an expert
 * of no group). group_ptr: (G+1), tokens: (min(N K, N G)), slot_row: (N,K), all overwritten:
 * tokens[group_ptr[g] .. group_ptr[g+1]-1] ascend; slot_row says at which of them a slot's token
 * is, -1 for a slot of no group. ws: molae_route_groups_ws() bytes, 64-byte aligned. */
size_t molae_route_groups_ws(int64_t G);
molae_status molae_route_groups(int64_t *group_ptr, int64_t *tokens, int64_t *slot_row,
                                const int64_t *index, const int64_t *group_of, int64_t N, int64_t K,
                                int64_t E, int64_t G, void *ws, size_t ws_bytes,
                                molae_errinfo *err);

/* Slots that run and slots that do not: of each token's K slots, in the order of their weights
 * (equal ones by index, then by slot), the last n are compressed.
 *
 * main_, aux: (N,K), overwritten: index, but E in main_ where a slot is compressed, and E in aux
 * where it is not. 0 <= n < K. Serial: N K^2 comparisons. Errors: SHAPE, ARG. */
molae_status molae_split_slots_f32(int64_t *main_, int64_t *aux, const int64_t *index,
                                   const float *weight, int64_t N, int64_t K, int64_t E, int64_t n,
                                   molae_errinfo *err);
molae_status molae_split_slots_f64(int64_t *main_, int64_t *aux, const int64_t *index,
                                   const double *weight, int64_t N, int64_t K, int64_t E, int64_t n,
                                   molae_errinfo *err);

/* h = act(gate) up; clamped (gpt-oss): g = min(gate, limit), u = min(max(up, -limit), limit),
 * h = g sigmoid(alpha g) (u + 1). */
typedef enum {
    MOLAE_ACT_SILU = 0,
    MOLAE_ACT_GELU = 1,      /* erf */
    MOLAE_ACT_GELU_TANH = 2, /* tanh form */
    MOLAE_ACT_RELU = 3,
    MOLAE_ACT_RELU2 = 4, /* relu squared */
    MOLAE_ACT_SWIGLU_CLAMPED = 5
} molae_activation;

/* The experts' matrices of one role. W_i is (F,D) for gate and up, (D,F) for down.
 * Group g is dense where rank[g] is -1: private_[e] is W_e. Else it is latent of rank R:
 * W_e = A_e B for gate and up, A_e (F,R); W_e = B^T A_e for down, A_e (R,F); B (R,D) in plain form,
 * B[:, perm] = [I | M] with M (R,D-R) in gauge form. R = 0: W_e = 0, and no pointer is read. */
typedef struct {
    molae_dtype dtype; /* of private_, shared and bias: F32 or BF16, F64 for _f64 */
    molae_form form;
    int64_t G;
    const int64_t *group_of;     /* (E,); NULL: all in group 0 */
    const int64_t *rank;         /* (G,): -1 dense, else 0 <= R <= D */
    const void *const *private_; /* (E,) */
    const void *const *shared;   /* (G,): M or B; NULL where no group is latent */
    const int32_t *const *perm;  /* (G,): (D,) each; gauge form only */
    const void *bias;            /* (E,F), down (E,D); or NULL */
} molae_projection;

/* Of each token's K slots, in the order of their weights (equal ones by index, then by slot), the
 * last n do not run. They act through three vectors of their experts alone,
 *
 *   theta_t = sum_k share_k (e1, e2, e3)_k,   share_k = weight[t,k] over the sum of those n,
 *
 * equal shares where that sum is 0, and theta_t = 1 where all of them are sentinels; and each
 * expert that runs, with its weight as it is, gives
 *
 *   W_down (h * theta2) + b_down,   h = act(W_gate (x * theta1) + b_gate, W_up (x * theta3) + b_up)
 */
typedef struct {
    int64_t n;           /* 0 <= n < K; 0: all run, and no pointer is read */
    const void *vectors; /* (E,stride): e1 (D) first */
    molae_dtype dtype;   /* as of a projection */
    int64_t stride;      /* numbers from one expert to the next */
    int64_t e2, e3;      /* where e2 (F) and e3 (D) begin */
} molae_compressed;

typedef struct {
    int64_t E, D, F;
    molae_dtype io; /* of x, y and dy: F32 or BF16, F64 for _f64 */
    molae_activation activation;
    double alpha, limit; /* of the clamped activation */
    molae_projection gate, up, down;
    molae_compressed compressed;
} molae_experts;

/* Latent numbers of a token, at most: min(sum of ranks, K max rank). The width of z and u below. */
int64_t molae_projection_width(const molae_projection *p, int64_t K);

/* h[i] = act(gate[i], up[i]) for i < n, and where dgate is not NULL its derivatives by both in
 * dgate and dup. No two arrays overlap. alpha, limit: of the clamped activation. */
molae_status molae_activate_f32(const molae_ctx *ctx, float *h, float *dgate, float *dup,
                                const float *gate, const float *up, int64_t n,
                                molae_activation activation, double alpha, double limit);
molae_status molae_activate_f64(const molae_ctx *ctx, double *h, double *dgate, double *dup,
                                const double *gate, const double *up, int64_t n,
                                molae_activation activation, double alpha, double limit);

/* Tokens that are worked on at once. */
enum { MOLAE_EXPERTS_CHUNK = 2048 };

/* What backward needs of forward; written in pieces of MOLAE_EXPERTS_CHUNK tokens, in each piece in
 * the order of molae_route (gate, up) and molae_route_groups (z, u). Rows of sentinel slots stay
 * unwritten. gate and up take N K F numbers each: 134 MB at N=4096, K=8, F=1024 in f32. */
typedef struct {
    float *gate, *up;     /* (N K, F): before the activation, with bias */
    float *z_gate, *z_up; /* (N, width): x B^T of each token and latent group */
    float *u;             /* (N, width of down): sum_k g_k A_k h_k of each token and latent group */
    int known;            /* molae_experts_known: what forward finds there and does not compute */
} molae_experts_saved_f32;
typedef struct {
    double *gate, *up, *z_gate, *z_up, *u;
    int known;
} molae_experts_saved_f64;

/* What an earlier call on the same x and index has left; gate known leaves z_gate as it is, up
 * known z_up. */
typedef enum { MOLAE_KNOWN_GATE = 1, MOLAE_KNOWN_UP = 2, MOLAE_KNOWN_Z_UP = 4 } molae_experts_known;

/* One layer of routed experts:
 *
 *   y_t = sum_k weight[t,k] (W_down h + b_down),  h = act(W_gate x_t + b_gate, W_up x_t + b_up)
 *
 * with the matrices of expert index[t,k]; slots with index E add nothing.
 * x: (N,D), y: (N,D) overwritten, both of type io. index: (N,K). weight: (N,K). saved: NULL, or
 * overwritten, but for what is known. ws: molae_experts_forward_ws_<real>() bytes, 64-byte aligned,
 * a function of shapes alone. Outputs overlap nothing. Arithmetic is f32 (_f32) or f64 (_f64).
 *
 * In a latent group x is projected once a token, experts work on z = x B^T, and the experts'
 * outputs are added in latent space before one B^T lifts them; the identity of the gauge form is
 * never multiplied. y = dense experts and biases in expert order, then latent groups in order.
 * Flops, with T_g the tokens of group g and n_e the rows of expert e: per dense matrix 2 n_e F D;
 * per latent 2 n_e F R, and 2 T_g R D a group (gauge form 2 T_g R (D-R)).
 * Bytes: the weights of experts with rows once a chunk; ws about chunk K (F + D / 4) numbers.
 * Errors: SHAPE, ARG with what and, where it applies, expert or group. */
size_t molae_experts_forward_ws_f32(const molae_ctx *ctx, const molae_experts *l, int64_t N,
                                    int64_t K);
size_t molae_experts_forward_ws_f64(const molae_ctx *ctx, const molae_experts *l, int64_t N,
                                    int64_t K);
molae_status molae_experts_forward_f32(const molae_ctx *ctx, void *y,
                                       const molae_experts_saved_f32 *saved, const void *x,
                                       const int64_t *index, const float *weight,
                                       const molae_experts *l, int64_t N, int64_t K, void *ws,
                                       size_t ws_bytes, molae_errinfo *err);
molae_status molae_experts_forward_f64(const molae_ctx *ctx, void *y,
                                       const molae_experts_saved_f64 *saved, const void *x,
                                       const int64_t *index, const double *weight,
                                       const molae_experts *l, int64_t N, int64_t K, void *ws,
                                       size_t ws_bytes, molae_errinfo *err);

/* Gradients of one projection, in the arithmetic's type whatever the storage: f32 for bf16. Shapes
 * are those of the weights; in gauge form shared has dM. Any pointer may be NULL: not wanted. */
typedef struct {
    float *const *private_; /* (E,) */
    float *const *shared;   /* (G,) */
    float *bias;
} molae_projection_grads_f32;
typedef struct {
    double *const *private_;
    double *const *shared;
    double *bias;
} molae_projection_grads_f64;

typedef struct {
    float *dx;      /* (N,D) */
    float *dweight; /* (N,K); slots with index E get nothing */
    molae_projection_grads_f32 gate, up, down;
    float *vectors; /* (E,stride), of compressed experts */
    int overwrite;  /* set all of them, which spares reading; else add to them */
} molae_experts_grads_f32;
typedef struct {
    double *dx, *dweight;
    molae_projection_grads_f64 gate, up, down;
    double *vectors;
    int overwrite;
} molae_experts_grads_f64;

/* The gradients of sum(dy * y) with respect to all inputs, ADDED to what d points to unless
 * d->overwrite is set; NULL saves its cost. dy: (N,D) of type io. saved, x, index, weight, l: as
 * forward had and left them. Each gradient has one owner and a fixed order of additions. Flops: at
 * most twice forward's. ws about chunk K (3 F + D / 4) numbers. */
size_t molae_experts_backward_ws_f32(const molae_ctx *ctx, const molae_experts *l, int64_t N,
                                     int64_t K);
size_t molae_experts_backward_ws_f64(const molae_ctx *ctx, const molae_experts *l, int64_t N,
                                     int64_t K);
molae_status molae_experts_backward_f32(const molae_ctx *ctx, const molae_experts_grads_f32 *d,
                                        const void *dy, const molae_experts_saved_f32 *saved,
                                        const void *x, const int64_t *index, const float *weight,
                                        const molae_experts *l, int64_t N, int64_t K, void *ws,
                                        size_t ws_bytes, molae_errinfo *err);
molae_status molae_experts_backward_f64(const molae_ctx *ctx, const molae_experts_grads_f64 *d,
                                        const void *dy, const molae_experts_saved_f64 *saved,
                                        const void *x, const int64_t *index, const double *weight,
                                        const molae_experts *l, int64_t N, int64_t K, void *ws,
                                        size_t ws_bytes, molae_errinfo *err);

/* ------------------------------------------------ ops: weights of a few bits, decoded */

/* out[i,j] = value(w[i,j]) scale[i / block_rows, j / block_cols], the product in float32 and, for
 * BF16, rounded to nearest even. w: (rows,cols), FP8 e4m3 without infinities: a sign, 4 bits of
 * exponent with bias 7, 3 of mantissa, 0x7F and 0xFF NaN. scale: (ceil(rows / block_rows),
 * ceil(cols / block_cols)). out: (rows,cols) of `type`, F32 or BF16, overwritten; overlaps nothing.
 * One multiplication a number, 1 byte read and 4 or 2 written. Errors: NONFINITE where a result is
 * not finite, info is its place i cols + j; SHAPE, ARG. */
molae_status molae_decode_fp8(const molae_ctx *ctx, void *out, molae_dtype type, const uint8_t *w,
                              const float *scale, int64_t rows, int64_t cols, int64_t block_rows,
                              int64_t block_cols, molae_errinfo *err);

/* MXFP4: out[i, 32 g + 2 b] is the low four bits of blocks[i,g,b], out[i, 32 g + 2 b + 1] the high
 * ones, as FP4 e2m1 (a sign, then 0 0.5 1 1.5 2 3 4 6), times 2^(scales[i,g] - 127); 255 is NaN.
 * blocks: (rows,groups,16), scales: (rows,groups). out: (rows, 32 groups) as above; each is exact
 * in either type. Errors as above. */
molae_status molae_decode_mxfp4(const molae_ctx *ctx, void *out, molae_dtype type,
                                const uint8_t *blocks, const uint8_t *scales, int64_t rows,
                                int64_t groups, molae_errinfo *err);

#ifdef __cplusplus
}
#endif
#endif /* MOLAE_H */
