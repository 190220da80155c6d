/* Streaming products for AVX-512 F, BW, VL and DQ. */
#include "stream.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>

#include "avx512.inc.h"

static inline V
widen(__m256i h)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

static inline V
h_load(const uint16_t *x)
{
    return widen(_mm256_loadu_si256((const __m256i *)(const void *)x));
}

static inline V
h_load_part(const uint16_t *x, int64_t n)
{
    return widen(_mm256_maskz_loadu_epi16(first_lanes(n), x));
}

/* n r + r + 1 registers of 32. */
#define NT_MAX 6
#define NT_TILES(T) T(1, 6) T(2, 6) T(3, 6) T(4, 6) T(5, 4) T(6, 4)
#define NN_ROWS 8

#define W float
#define NAME(f) f##_f32
#define w_load v_load
#define w_load_part v_load_part
#include "stream.inc.h"
#undef W
#undef NAME
#undef w_load
#undef w_load_part

#define W uint16_t
#define NAME(f) f##_bf16
#define w_load h_load
#define w_load_part h_load_part
#include "stream.inc.h"

void
mli_stream_nt_bf16__avx512(float *Y, int64_t ldy, const float *X, int64_t ldx, const uint16_t *Wt,
                           int64_t ldw, int64_t N, int64_t r, int64_t k, int accumulate)
{
    nt_bf16(Y, ldy, X, ldx, Wt, ldw, N, r, k, accumulate);
}

int
mli_kernels_add_avx512_stream(mli_kernels *t)
{
    t->stream_nt_f32 = nt_f32;
    t->stream_nn_f32 = nn_f32;
    t->stream_nt_bf16 = nt_bf16;
    t->stream_nn_bf16 = nn_bf16;
    return 1;
}

#else

int
mli_kernels_add_avx512_stream(mli_kernels *t)
{
    (void)t;
    return 0;
}

#endif
