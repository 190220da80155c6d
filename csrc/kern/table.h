/* How a table is put together. Each function overwrites the entries it has a better kernel for
 * and returns 1, or returns 0 where the compiler was not given the instruction set. */
#ifndef MOLAE_KERN_TABLE_H
#define MOLAE_KERN_TABLE_H

#include "kern.h"

void mli_kernels_fill_ref(mli_kernels *t);
void mli_kernels_fill_ref_stream(mli_kernels *t);
int mli_kernels_add_avx2(mli_kernels *t);
int mli_kernels_add_avx2_stream(mli_kernels *t);
int mli_kernels_add_avx2_rows(mli_kernels *t);
int mli_kernels_add_avx512(mli_kernels *t);
int mli_kernels_add_avx512_stream(mli_kernels *t);
int mli_kernels_add_avx512_rows(mli_kernels *t);
int mli_kernels_add_avx512bf16(mli_kernels *t);
int mli_kernels_add_amx(mli_kernels *t);
int mli_kernels_add_amx_stream(mli_kernels *t);

/* The portable kernels, for the tails of the others. */
int mli_bf16_to_f32__ref(float *y, const uint16_t *x, int64_t n);
int mli_f16_to_f32__ref(float *y, const uint16_t *x, int64_t n);
int mli_f32_check__ref(float *y, const float *x, int64_t n);
void mli_f32_to_bf16__ref(uint16_t *y, const float *x, int64_t n);
void mli_f32_to_f16__ref(uint16_t *y, const float *x, int64_t n);
void mli_scatter_f32__ref(float *y, int64_t D, const int64_t *row, int64_t N, const float *own,
                          int64_t cols, const float *rest, const int32_t *column, void *ws);

/* Asks for what stands `bytes` after p, into the cache of that level (3: the first). No pointer is
 * formed, since it may lie past the end. */
#define MLI_PREFETCH(p, bytes, level) \
    __builtin_prefetch((const void *)((uintptr_t)(p) + (uintptr_t)(bytes)), 0, (level))

/* For few rows AMX has nothing better. */
void mli_stream_nt_bf16__avx512(float *Y, int64_t ldy, const float *X, int64_t ldx,
                                const uint16_t *W, int64_t ldw, int64_t N, int64_t r, int64_t k,
                                int accumulate);

/* Adds the last n < 16 squares to the 16 partial sums and folds them in halves. */
static inline double
mli_sumsq_finish(double s[16], const float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        s[i] += (double)x[i] * (double)x[i];
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            s[i] += s[i + half];
    return s[0];
}

#endif
