/* Packing for the bf16 products of AVX512_BF16 and AMX, which multiply pairs: panels of 16 columns
 * by all pairs of k, q[panel][pair][column] with the pair's two values in one 32-bit word. k is
 * filled with zeros to a multiple of 32, columns to a multiple of 16. Both need AVX-512. */
#ifndef MOLAE_KERN_PACK_H
#define MOLAE_KERN_PACK_H

#include "kern.h"

#include "../base/mem.h"

/* Pairs of a panel, and bytes of n columns. */
static inline int64_t
mli_pairs(int64_t k)
{
    return (k + 31) / 32 * 16;
}

static inline size_t
mli_panels_bytes(int64_t n, int64_t k)
{
    return mli_size_mul(mli_size_mul((size_t)((n + 15) / 16), (size_t)mli_pairs(k)), 64);
}

/* From B (n,k), the rows of which become columns. */
void mli_pack_nt__avx512(uint32_t *q, const uint16_t *B, int64_t ldb, int64_t n, int64_t k);

/* From B (k,n). */
void mli_pack_nn__avx512(uint32_t *q, const uint16_t *B, int64_t ldb, int64_t n, int64_t k);

/* For the f32 product, from B (n,k): q[panel][k][16], k and columns filled to multiples of 16. */
void mli_pack_f32__avx512(float *q, const float *B, int64_t ldb, int64_t n, int64_t k);

/* C (n,m) [+]= T (m,n)^T for one tile of m, n <= 16; 16 aligned rows of T, ldt apart, are read. */
void mli_store_transposed__avx512(float *C, int64_t ldc, const float *T, int64_t ldt, int64_t m,
                                  int64_t n, int accumulate);

/* T (D,16) = up to 16 rows of x from n on, as columns; missing ones, and rows of T up to a
 * multiple of 16, are zeros. */
void mli_turn__avx512(float *T, const mli_rows_f32 *x, int64_t n);

/* X (rows,cols), of at most 16 rows = columns of such a T as rows. */
void mli_turn_back__avx512(float *X, int64_t ldx, const float *T, int64_t rows,
                           const int32_t *column, int64_t cols);

/* See mli_kernels; ws takes T. */
void mli_gather_f32__avx512(float *X, int64_t ldx, const mli_rows_f32 *x, const int32_t *column,
                            int64_t cols, void *ws);

/* gauge_f32 and, without own and rest, the nt half of rows_f32 where W is small: ws takes it. */
void mli_rows_small__avx512(float *Y, int64_t ldy, const mli_rows_f32 *x, const int32_t *own,
                            int64_t cols, const int32_t *rest, int64_t k, const float *W,
                            int64_t ldw, int accumulate, void *ws);

/* See mli_kernels. */
void mli_tn_f32__avx512(float *dW, int64_t ldw, const float *dY, int64_t ldy, const mli_rows_f32 *x,
                        int64_t r, int64_t k, int accumulate);

/* Gives the calling thread AMX tiles of 16 rows of 64 bytes, and takes them back. */
void mli_tiles_begin__amx(void);
void mli_tiles_end__amx(void);

#endif
