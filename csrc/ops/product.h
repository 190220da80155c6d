/* The products of ops: every use of a weight goes through these, which choose how it is done.
 *
 *   nt   Y (n,r) (+)= X (n,k) W (r,k)^T
 *   nn   Y (n,c) (+)= X (n,k) W (k,c)
 *   tn   dW (r,k) (+)= dY (n,r)^T X (n,k)
 *
 * Row-major with leading dimensions; n is at most MLI_PRODUCT_ROWS for nt and nn. W has its storage
 * type: REAL, or BF16 for f32. With add == 0 Y is overwritten and never read. Any size may be 0 (W
 * is then not read).
 *
 *   up to MLI_STREAM_ROWS rows, f32   the table's streaming kernels, which read W once (nn that may
 *                                     be rounded: up to 8)
 *   up to MLI_MANY_ROWS_*, f32        the table's product for such, where it is native
 *   bf16, and X may be rounded        the table's bf16 product, where it is native
 *   bf16                              tiles of W widened, then BLAS
 *   else                              BLAS
 *
 *   gauge form, f32                   more than MLI_STREAM_ROWS rows: the table's gauge_f32, where
 *                                     native; else a gather and nt
 *   tn of small matrices, f32         the table's tn_f32, where native
 *
 * Which one depends on shapes, types and the table alone. */
#ifndef MOLAE_OPS_PRODUCT_H
#define MOLAE_OPS_PRODUCT_H

#include "../kern/kern.h"
#include "../molae.h"

enum {
    MLI_STREAM_ROWS = 16,
    MLI_MANY_ROWS_NT = 384,
    MLI_MANY_ROWS_NN = 192,
    MLI_PRODUCT_ROWS = 512
};

/* What a product needs. `narrow`: X may be rounded to bf16, as in a layer whose
 * activations are. */
typedef struct {
    int narrow;
    float *tile;    /* W, widened */
    uint16_t *rows; /* X, rounded */
    void *work;     /* of the bf16 product */
    void *many;     /* of the f32 product, and of gathers */
} mli_product_scratch;

/* Cuts the scratch for weights of at most r rows and k columns (or the other way round) from *p;
 * with p == NULL it only adds up the size. f32, bf16: weights so stored are met in f32. */
size_t mli_product_cut(mli_product_scratch *s, char **p, int f32, int bf16, int narrow, int64_t r,
                       int64_t k);

#define MLI_PRODUCT_DECLARE(REAL, SFX)                                                             \
    molae_status mli_product_nt_##SFX(REAL *Y, int64_t ldy, int add, const REAL *X, int64_t ldx,   \
                                      const void *W, int64_t ldw, molae_dtype dtype, int64_t n,    \
                                      int64_t r, int64_t k, const mli_product_scratch *s);         \
    molae_status mli_product_nn_##SFX(REAL *Y, int64_t ldy, int add, const REAL *X, int64_t ldx,   \
                                      const void *W, int64_t ldw, molae_dtype dtype, int64_t n,    \
                                      int64_t c, int64_t k, const mli_product_scratch *s);         \
    molae_status mli_product_tn_##SFX(REAL *dW, int64_t ldw, int add, const REAL *dY, int64_t ldy, \
                                      const REAL *X, int64_t ldx, int64_t n, int64_t r,            \
                                      int64_t k);                                                  \
    /* Z (n,cols) = x[:, own] + x[:, rest] M (cols,k)^T; X has room for (n,k) */                   \
    molae_status mli_product_gauge_##SFX(REAL *Z, int64_t ldz, const mli_rows_##SFX *x,            \
                                         const int32_t *own, int64_t cols, const int32_t *rest,    \
                                         int64_t k, const void *M, molae_dtype dtype, REAL *X,     \
                                         const mli_product_scratch *s);                            \
    /* y[:, column] += [own (n,cols) | rest]: see scatter_f32 of the table */                      \
    void mli_scatter_##SFX(REAL *y, int64_t D, const int64_t *row, int64_t n, const REAL *own,     \
                           int64_t cols, const REAL *rest, const int32_t *column,                  \
                           const mli_product_scratch *s);                                          \
    /* X (n,cols) = x[:, column] */                                                                \
    void mli_gather_##SFX(REAL *X, int64_t ldx, const mli_rows_##SFX *x, const int32_t *column,    \
                          int64_t cols, const mli_product_scratch *s);

MLI_PRODUCT_DECLARE(float, f32)
MLI_PRODUCT_DECLARE(double, f64)
#undef MLI_PRODUCT_DECLARE

/* Bytes of one number in storage. */
static inline size_t
mli_item_size(molae_dtype t)
{
    return t == MOLAE_F64 ? 8 : (t == MOLAE_F32 ? 4 : 2);
}

/* &W[row][col]. NULL stays NULL: a matrix without numbers. */
static inline const void *
mli_weight_at(const void *W, molae_dtype t, int64_t ld, int64_t row, int64_t col)
{
    return W == NULL ? NULL : (const char *)W + (size_t)(row * ld + col) * mli_item_size(t);
}

#endif
