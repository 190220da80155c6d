/* Kernels for AVX-512 F, BW, VL and DQ. */
#include "table.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>
#include <math.h>
#include <string.h>

/* Plain C, for the compiler to vectorize with this file's flags. */
#define REAL float
#define SFX f32__avx512
#define LIBM(name) name##f
#define VECTOR_EXP 1
#include "act.inc.h"
#include "adamw.inc.h"
#undef REAL
#undef SFX

/* Lanes whose exponent is all ones: Inf or NaN. */
static inline __mmask16
not_finite(__m512i u)
{
    const __m512i mask = _mm512_set1_epi32(0x7F800000);
    return _mm512_cmpeq_epi32_mask(_mm512_and_si512(u, mask), mask);
}

static int
bf16_to_f32__avx512(float *y, const uint16_t *x, int64_t n)
{
    __mmask16 bad = 0;
    int64_t i = 0;

    for (; i + 16 <= n; i += 16) {
        __m256i h = _mm256_loadu_si256((const __m256i *)(const void *)(x + i));
        __m512i u = _mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
        bad = _kor_mask16(bad, not_finite(u));
        _mm512_storeu_si512(y + i, u);
    }
    return mli_bf16_to_f32__ref(y + i, x + i, n - i) & (bad == 0);
}

static int
f16_to_f32__avx512(float *y, const uint16_t *x, int64_t n)
{
    __mmask16 bad = 0;
    int64_t i = 0;

    for (; i + 16 <= n; i += 16) {
        __m256i h = _mm256_loadu_si256((const __m256i *)(const void *)(x + i));
        __m512 v = _mm512_cvtph_ps(h);
        bad = _kor_mask16(bad, not_finite(_mm512_castps_si512(v)));
        _mm512_storeu_ps(y + i, v);
    }
    return mli_f16_to_f32__ref(y + i, x + i, n - i) & (bad == 0);
}

static int
f32_check__avx512(float *y, const float *x, int64_t n)
{
    __mmask16 bad = 0;
    int64_t i = 0;

    for (; i + 16 <= n; i += 16) {
        __m512i u = _mm512_loadu_si512(x + i);
        bad = _kor_mask16(bad, not_finite(u));
        _mm512_storeu_si512(y + i, u);
    }
    return mli_f32_check__ref(y + i, x + i, n - i) & (bad == 0);
}

static void
f32_to_bf16__avx512(uint16_t *y, const float *x, int64_t n)
{
    const __m512i low = _mm512_set1_epi32(0x7FFFFFFF), inf = _mm512_set1_epi32(0x7F800000);
    const __m512i one = _mm512_set1_epi32(1), half = _mm512_set1_epi32(0x7FFF);
    const __m512i quiet = _mm512_set1_epi32(0x40);
    int64_t i = 0;

    /* vcvtneps2bf16 would flush subnormals to zero, so this rounds with integers. */
    for (; i + 16 <= n; i += 16) {
        __m512i u = _mm512_loadu_si512(x + i);
        __m512i high = _mm512_srli_epi32(u, 16);
        __m512i step = _mm512_add_epi32(_mm512_and_si512(high, one), half);
        __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, step), 16);
        __mmask16 nan = _mm512_cmpgt_epi32_mask(_mm512_and_si512(u, low), inf);
        r = _mm512_mask_or_epi32(r, nan, high, quiet);
        _mm256_storeu_si256((__m256i *)(void *)(y + i), _mm512_cvtepi32_epi16(r));
    }
    mli_f32_to_bf16__ref(y + i, x + i, n - i);
}

static void
f32_to_f16__avx512(uint16_t *y, const float *x, int64_t n)
{
    int64_t i = 0;

    for (; i + 16 <= n; i += 16) {
        __m256i h = _mm512_cvtps_ph(_mm512_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
        _mm256_storeu_si256((__m256i *)(void *)(y + i), h);
    }
    mli_f32_to_f16__ref(y + i, x + i, n - i);
}

static double
f32_sumsq__avx512(const float *x, int64_t n)
{
    __m512d a = _mm512_setzero_pd(), b = _mm512_setzero_pd();
    double s[16];
    int64_t i = 0;

    for (; i + 16 <= n; i += 16) {
        __m512d v = _mm512_cvtps_pd(_mm256_loadu_ps(x + i));
        __m512d w = _mm512_cvtps_pd(_mm256_loadu_ps(x + i + 8));
        a = _mm512_fmadd_pd(v, v, a); /* the product is exact */
        b = _mm512_fmadd_pd(w, w, b);
    }
    _mm512_storeu_pd(s, a);
    _mm512_storeu_pd(s + 8, b);
    return mli_sumsq_finish(s, x + i, n - i);
}

#define ISA __avx512
#define VECTOR_BYTES 64
#define BAND 8
#define REAL float
#define SFX f32
#include "symv.inc.h"
#undef REAL
#undef SFX
#define REAL double
#define SFX f64
#include "symv.inc.h"

int
mli_kernels_add_avx512(mli_kernels *t)
{
    t->isa = "avx512";
    t->bf16_to_f32 = bf16_to_f32__avx512;
    t->f16_to_f32 = f16_to_f32__avx512;
    t->f32_check = f32_check__avx512;
    t->f32_to_bf16 = f32_to_bf16__avx512;
    t->f32_to_f16 = f32_to_f16__avx512;
    t->f32_sumsq = f32_sumsq__avx512;
    t->f32_symv = symv_f32__avx512;
    t->f64_symv = symv_f64__avx512;
    t->act_f32 = act_f32__avx512;
    t->act_grad_f32 = act_grad_f32__avx512;
    t->adamw_f32 = adamw_f32__avx512;
    return 1;
}

#else

int
mli_kernels_add_avx512(mli_kernels *t)
{
    (void)t;
    return 0;
}

#endif
