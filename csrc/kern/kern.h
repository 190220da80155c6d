/* Small inner loops behind one table. The table starts as the portable kernels of ref.c and
 * better ones for the CPU overwrite its entries, so nothing can be missing. */
#ifndef MOLAE_KERN_H
#define MOLAE_KERN_H

#include "../molae.h"

/* An activation with its parameters. */
typedef struct {
    molae_activation kind;
    double alpha, limit;
} mli_act;
/* A step of AdamW: w = keep w - rate m / (sqrt(v) root + eps), with m and v of scale g. */
typedef struct {
    double beta1, beta2, eps, rate, root, keep, scale;
} mli_adamw_step;

/* How the second matrix of a product lies: nt (columns of the result, k), nn (k, columns). */
enum { MLI_NT = 0, MLI_NN = 1 };

/* Streaming products, for few rows N of X: the cost is the reading of W, once for 16 rows of X.
 *   nt: Y (N,r) [+]= X (N,k) W (r,k)^T      nn: Y (N,c) [+]= X (N,k) W (k,c)
 * ldy, ldx, ldw: distances of rows in elements, at least the row's length; a range of columns of
 * W (k,c) is a pointer to its first and the whole's ldw. No alignment is asked for. accumulate 0:
 * Y is overwritten and not read. Y overlaps nothing. Sums are f32 (f64: double); bf16 values are
 * widened exactly. Each element's sum has an order that depends on k and the table alone, so the
 * same rows give the same bits in any batch and any split of rows or columns over calls; but
 * stream_nt_bf16 of the table amx has one order for N <= 4 and another for more.
 * Error of an element: (k + 2) u (sum |x||w| + |y|), u = 2^-24 (2^-53). For N > 4 stream_nt_bf16 of
 * amx cuts x into three bf16 numbers, which is exact, but takes subnormal values for zeros: its
 * bound is 1 + 2^-6 times that and 2^-126 (3 k + 2 sum |w| + sum |x|) besides, and an Inf may come
 * out as NaN. It takes 250 KiB of stack. */
typedef void (*mli_stream_f32)(float *Y, int64_t ldy, const float *X, int64_t ldx, const float *W,
                               int64_t ldw, int64_t N, int64_t columns, int64_t k, int accumulate);
typedef void (*mli_stream_bf16)(float *Y, int64_t ldy, const float *X, int64_t ldx,
                                const uint16_t *W, int64_t ldw, int64_t N, int64_t columns,
                                int64_t k, int accumulate);
typedef void (*mli_stream_f64)(double *Y, int64_t ldy, const double *X, int64_t ldx,
                               const double *W, int64_t ldw, int64_t N, int64_t columns, int64_t k,
                               int accumulate);

/* N rows of a matrix with rows of D numbers: by number, or (row NULL) the first. */
typedef struct {
    const float *src;
    int64_t D, N;
    const int64_t *row;
} mli_rows_f32;
typedef struct {
    const double *src;
    int64_t D, N;
    const int64_t *row;
} mli_rows_f64;

static inline const float *
mli_row_f32(const mli_rows_f32 *x, int64_t n)
{
    return x->src + (x->row != NULL ? x->row[n] : n) * x->D;
}

typedef struct {
    const char *isa; /* "ref", "avx2", "avx512", "avx512bf16", "amx" */
    /* y[i] = x[i] widened; returns 1 if all n values are finite, else 0 (y is written anyway). */
    int (*bf16_to_f32)(float *y, const uint16_t *x, int64_t n);
    int (*f16_to_f32)(float *y, const uint16_t *x, int64_t n);
    int (*f32_check)(float *y, const float *x, int64_t n); /* a checked copy */
    /* y[i] = x[i] rounded to nearest, ties to even. NaN stays NaN. */
    void (*f32_to_bf16)(uint16_t *y, const float *x, int64_t n);
    void (*f32_to_f16)(uint16_t *y, const float *x, int64_t n);
    /* sum of x[i]^2 in double, in an order that depends on n alone and is the same for every
     * table (16 partial sums, lane i takes x[i], x[i+16], ...; folded in halves). */
    double (*f32_sumsq)(const float *x, int64_t n);
    /* y (m,) = A x for the row-major upper triangle of A (m,m) with rows lda apart, in bands of
     * rows, from the last to the first if backwards is set. y is overwritten and may not overlap
     * A or x. The order of sums depends on m, backwards, the table and how A lies to a cache
     * line. 2 m^2 flops; A is read once. */
    void (*f32_symv)(float *y, const float *A, int64_t lda, const float *x, int64_t m,
                     int backwards);
    void (*f64_symv)(double *y, const double *A, int64_t lda, const double *x, int64_t m,
                     int backwards);
    /* h[i] = act(gate[i], up[i]), see molae_activation. h may be gate or up. */
    void (*act_f32)(float *h, const float *gate, const float *up, int64_t n, const mli_act *act);
    void (*act_f64)(double *h, const double *gate, const double *up, int64_t n, const mli_act *act);
    /* From dh[i], the cotangent of h[i] before the routing weight w: dgate[i] and dup[i] with w,
     * and hw[i] = w h[i] (unless hw is NULL). Returns sum dh[i] h[i], in the order of f32_sumsq.
     * No two arrays overlap. */
    float (*act_grad_f32)(float *dgate, float *dup, float *hw, const float *dh, const float *gate,
                          const float *up, float w, int64_t n, const mli_act *act);
    double (*act_grad_f64)(double *dgate, double *dup, double *hw, const double *dh,
                           const double *gate, const double *up, double w, int64_t n,
                           const mli_act *act);
    /* In place on w, m and v, number by number: every table gives the same bits. No two arrays
     * overlap. */
    void (*adamw_f32)(float *w, float *m, float *v, const float *g, int64_t n,
                      const mli_adamw_step *how);
    void (*adamw_f64)(double *w, double *m, double *v, const double *g, int64_t n,
                      const mli_adamw_step *how);
    mli_stream_f32 stream_nt_f32, stream_nn_f32;
    mli_stream_bf16 stream_nt_bf16, stream_nn_bf16;
    mli_stream_f64 stream_nt_f64, stream_nn_f64; /* plain C in every table */
    /* The streaming product of that layout for some tens or hundreds of rows of X. ws takes X or
     * pieces of W in another order: rows_f32_ws bytes of these sizes or larger ones, 64-byte
     * aligned (SIZE_MAX: overflow). W is read once from memory. Rows of X do not change each
     * other's sums. rows_f32_native: 0 where this is the portable version, and BLAS is faster. */
    size_t (*rows_f32_ws)(int64_t N, int64_t k);
    void (*rows_f32)(int layout, float *Y, int64_t ldy, const float *X, int64_t ldx, const float *W,
                     int64_t ldw, int64_t N, int64_t cols, int64_t k, int accumulate, void *ws);
    int rows_f32_native;
    /* Rows that meet a shared factor in gauge form. gather: X (N,cols) = x[:, column].
     * gauge: Z (N,cols) = x[:, own] + x[:, rest] M (cols,k)^T, in the order of sums of rows_f32
     * with accumulate: the product first. Native as rows_f32 is; ws: gauge_f32_ws bytes, cols + k
     * <= D, 64-byte aligned. */
    size_t (*gauge_f32_ws)(int64_t N, int64_t D);
    void (*gather_f32)(float *X, int64_t ldx, const mli_rows_f32 *x, const int32_t *column,
                       int64_t cols, void *ws);
    void (*gauge_f32)(float *Z, int64_t ldz, const mli_rows_f32 *x, const int32_t *own,
                      int64_t cols, const int32_t *rest, int64_t k, const float *M, int64_t ldm,
                      void *ws);
    /* y[:, column] += [own (N,cols) | rest], where `column` has each of 0 .. D-1 once, and rows of
     * y (..,D) go by number, none twice. ws as of gather, for D columns. */
    void (*scatter_f32)(float *y, int64_t D, const int64_t *row, int64_t N, const float *own,
                        int64_t cols, const float *rest, const int32_t *column, void *ws);
    /* dW (r,k) [+]= dY (N,r)^T x[:, :k], for small r and k. Native as rows_f32 is. */
    void (*tn_f32)(float *dW, int64_t ldw, const float *dY, int64_t ldy, const mli_rows_f32 *x,
                   int64_t r, int64_t k, int accumulate);
    /* C (m,n) f32 [+]= A (m,k) B, all of it bf16, with B (n,k) for MLI_NT and (k,n) for MLI_NN;
     * leading dimensions, accumulate and alignment as above. One thread; ws: gemm_bf16_ws bytes
     * of these sizes or larger ones, 64-byte aligned (SIZE_MAX: overflow). Products are
     * exact and sums f32, so the error of an element is (k + 2) u sum |a||b| [+ u |c|] as above,
     * and where native, since AVX512_BF16 and AMX take subnormal values and results for zeros,
     * 2^-126 (k + sum |a| + sum |b|) besides. The order of a sum depends on m, n, k alone.
     * gemm_bf16_native: 0 where this is the portable version, and widening for a f32 product of
     * BLAS is faster. */
    size_t (*gemm_bf16_ws)(int64_t m, int64_t n, int64_t k);
    void (*gemm_bf16)(int layout, float *C, int64_t ldc, const uint16_t *A, int64_t lda,
                      const uint16_t *B, int64_t ldb, int64_t m, int64_t n, int64_t k,
                      int accumulate, void *ws);
    int gemm_bf16_native;
} mli_kernels;

/* Best table for this CPU less the ISAs named by mli_kernels_disable; chosen once. */
const mli_kernels *mli_kernels_get(void);

/* For tests: the table named, or NULL if the build or the CPU lacks it. */
const mli_kernels *mli_kernels_named(const char *isa);

/* Comma-separated ISA names not to use ("avx512"), before the first mli_kernels_get; those that
 * come after one in the order above are left out with it. Called by the glue with the text of
 * MOLAE_DISABLE_ISA: kernels read no environment. */
void mli_kernels_disable(const char *isas);

#endif
