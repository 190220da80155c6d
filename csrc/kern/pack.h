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

/* C (n,m) [+]= T (m,n)^T for one tile of m, n <= 16; 16 aligned rows of T, ldt apart, are read. */
void mli_store_transposed__avx512(float *C, int64_t ldc, const float *T, int64_t ldt, int64_t m,
                                  int64_t n, int accumulate);

/* Gives the calling thread AMX tiles of 16 rows of 64 bytes, and takes them back. */
void mli_tiles_begin__amx(void);
void mli_tiles_end__amx(void);

#endif
