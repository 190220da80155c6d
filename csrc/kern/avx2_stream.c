/* Streaming products for AVX2 and FMA. */
#include "stream.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

#include "avx2.inc.h"

static inline V
h_load(const uint16_t *x)
{
    __m128i h = _mm_loadu_si128((const __m128i *)(const void *)x);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

static inline V
h_load_part(const uint16_t *x, int64_t n)
{
    uint16_t all[VL] = {0};

    for (int64_t i = 0; i < n; i++)
        all[i] = x[i];
    return h_load(all);
}

/* n r + r + 1 registers of 16. */
#define NT_MAX 6
#define NT_TILES(T) T(1, 6) T(2, 4) T(3, 3) T(4, 2) T(5, 2) T(6, 2)
#define NN_ROWS 4

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

int
mli_kernels_add_avx2_stream(mli_kernels *t)
{
    t->stream_nt_f32 = nt_f32;
    t->stream_nn_f32 = nn_f32;
    t->stream_nt_bf16 = nt_bf16;
    t->stream_nn_bf16 = nn_bf16;
    return 1;
}

#else

int
mli_kernels_add_avx2_stream(mli_kernels *t)
{
    (void)t;
    return 0;
}

#endif
