/* The products of ops: every use of a weight goes through these, so that kernels for few rows or
 * for narrow types have one place to be called from.
 *
 *   nt   Y (n,r) (+)= X (n,k) W (r,k)^T
 *   nn   Y (n,c) (+)= X (n,k) W (k,c)
 *   tn   dW (r,k) += dY (n,r)^T X (n,k)
 *
 * Row-major with leading dimensions. W has its storage type: REAL, or BF16 for f32, which is
 * widened by tiles; `tile` is scratch of MLI_PRODUCT_TILE numbers, unused for REAL. With add == 0
 * Y is overwritten and never read. Any size may be 0 (W is then not read). */
#ifndef MOLAE_OPS_PRODUCT_H
#define MOLAE_OPS_PRODUCT_H

#include "../molae.h"

/* A tile of W: this many rows by this many columns. */
enum { MLI_TILE_ROWS = 256, MLI_TILE_COLS = 512, MLI_PRODUCT_TILE = MLI_TILE_ROWS * MLI_TILE_COLS };

#define MLI_PRODUCT_DECLARE(REAL, SFX)                                                           \
    molae_status mli_product_nt_##SFX(REAL *Y, int64_t ldy, int add, const REAL *X, int64_t ldx, \
                                      const void *W, int64_t ldw, molae_dtype dtype, int64_t n,  \
                                      int64_t r, int64_t k, REAL *tile);                         \
    molae_status mli_product_nn_##SFX(REAL *Y, int64_t ldy, int add, const REAL *X, int64_t ldx, \
                                      const void *W, int64_t ldw, molae_dtype dtype, int64_t n,  \
                                      int64_t c, int64_t k, REAL *tile);                         \
    molae_status mli_product_tn_##SFX(REAL *dW, int64_t ldw, const REAL *dY, int64_t ldy,        \
                                      const REAL *X, int64_t ldx, int64_t n, int64_t r,          \
                                      int64_t k);

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
