/* Kernels for AVX2, FMA and F16C. */
#include "table.h"

#if defined(__AVX2__) && defined(__F16C__)
#include <immintrin.h>
#include <math.h>
#include <string.h>

/* Plain C, for the compiler to vectorize with this file's flags. */
#define REAL float
#define SFX f32__avx2
#define LIBM(name) name##f
#define VECTOR_EXP 1
#include "act.inc.h"
#include "adamw.inc.h"
#undef REAL
#undef SFX

/* All ones in the lanes whose exponent is all ones: Inf or NaN. */
static inline __m256i
not_finite(__m256i u)
{
    const __m256i mask = _mm256_set1_epi32(0x7F800000);
    return _mm256_cmpeq_epi32(_mm256_and_si256(u, mask), mask);
}

static int
bf16_to_f32__avx2(float *y, const uint16_t *x, int64_t n)
{
    __m256i bad = _mm256_setzero_si256();
    int64_t i = 0;

    for (; i + 8 <= n; i += 8) {
        __m128i h = _mm_loadu_si128((const __m128i *)(const void *)(x + i));
        __m256i u = _mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16);
        bad = _mm256_or_si256(bad, not_finite(u));
        _mm256_storeu_si256((__m256i *)(void *)(y + i), u);
    }
    return mli_bf16_to_f32__ref(y + i, x + i, n - i) & _mm256_testz_si256(bad, bad);
}

static int
f16_to_f32__avx2(float *y, const uint16_t *x, int64_t n)
{
    __m256i bad = _mm256_setzero_si256();
    int64_t i = 0;

    for (; i + 8 <= n; i += 8) {
        __m128i h = _mm_loadu_si128((const __m128i *)(const void *)(x + i));
        __m256 v = _mm256_cvtph_ps(h);
        bad = _mm256_or_si256(bad, not_finite(_mm256_castps_si256(v)));
        _mm256_storeu_ps(y + i, v);
    }
    return mli_f16_to_f32__ref(y + i, x + i, n - i) & _mm256_testz_si256(bad, bad);
}

static int
f32_check__avx2(float *y, const float *x, int64_t n)
{
    __m256i bad = _mm256_setzero_si256();
    int64_t i = 0;

    for (; i + 8 <= n; i += 8) {
        __m256i u = _mm256_loadu_si256((const __m256i *)(const void *)(x + i));
        bad = _mm256_or_si256(bad, not_finite(u));
        _mm256_storeu_si256((__m256i *)(void *)(y + i), u);
    }
    return mli_f32_check__ref(y + i, x + i, n - i) & _mm256_testz_si256(bad, bad);
}

/* Eight floats to bf16 in the low halves of 32-bit lanes. */
static inline __m256i
narrow_bf16(__m256i u)
{
    const __m256i low = _mm256_set1_epi32(0x7FFFFFFF), inf = _mm256_set1_epi32(0x7F800000);
    __m256i high = _mm256_srli_epi32(u, 16);
    __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    __m256i step = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(u, step), 16);
    __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    __m256i nan = _mm256_cmpgt_epi32(_mm256_and_si256(u, low), inf);
    return _mm256_blendv_epi8(rounded, quiet, nan);
}

static void
f32_to_bf16__avx2(uint16_t *y, const float *x, int64_t n)
{
    int64_t i = 0;

    for (; i + 16 <= n; i += 16) {
        __m256i a = narrow_bf16(_mm256_loadu_si256((const __m256i *)(const void *)(x + i)));
        __m256i b = narrow_bf16(_mm256_loadu_si256((const __m256i *)(const void *)(x + i + 8)));
        __m256i h = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xD8);
        _mm256_storeu_si256((__m256i *)(void *)(y + i), h);
    }
    mli_f32_to_bf16__ref(y + i, x + i, n - i);
}

static void
f32_to_f16__avx2(uint16_t *y, const float *x, int64_t n)
{
    int64_t i = 0;

    for (; i + 8 <= n; i += 8) {
        __m128i h = _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128((__m128i *)(void *)(y + i), h);
    }
    mli_f32_to_f16__ref(y + i, x + i, n - i);
}

static double
f32_sumsq__avx2(const float *x, int64_t n)
{
    __m256d acc[4];
    double s[16];
    int64_t i = 0;

    for (int j = 0; j < 4; j++)
        acc[j] = _mm256_setzero_pd();
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 4; j++) {
            __m256d v = _mm256_cvtps_pd(_mm_loadu_ps(x + i + 4 * j));
            acc[j] = _mm256_fmadd_pd(v, v, acc[j]); /* the product is exact */
        }
    for (int j = 0; j < 4; j++)
        _mm256_storeu_pd(s + 4 * j, acc[j]);
    return mli_sumsq_finish(s, x + i, n - i);
}

#define ISA __avx2
#define VECTOR_BYTES 32
#define BAND 4
#define REAL float
#define SFX f32
#include "symv.inc.h"
#undef REAL
#undef SFX
#define REAL double
#define SFX f64
#include "symv.inc.h"

int
mli_kernels_add_avx2(mli_kernels *t)
{
    t->isa = "avx2";
    t->bf16_to_f32 = bf16_to_f32__avx2;
    t->f16_to_f32 = f16_to_f32__avx2;
    t->f32_check = f32_check__avx2;
    t->f32_to_bf16 = f32_to_bf16__avx2;
    t->f32_to_f16 = f32_to_f16__avx2;
    t->f32_sumsq = f32_sumsq__avx2;
    t->f32_symv = symv_f32__avx2;
    t->f64_symv = symv_f64__avx2;
    t->act_f32 = act_f32__avx2;
    t->act_grad_f32 = act_grad_f32__avx2;
    t->adamw_f32 = adamw_f32__avx2;
    return 1;
}

#else

int
mli_kernels_add_avx2(mli_kernels *t)
{
    (void)t;
    return 0;
}

#endif
