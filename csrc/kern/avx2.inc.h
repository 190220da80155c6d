/* Vectors of 8 floats, for the kernels that are written once for all vectors (rows_*.inc.h and
 * stream.inc.h). The includer has immintrin.h. Loads and stores ask for no alignment. */

#define V __m256
#define VL 8

static inline V
v_zero(void)
{
    return _mm256_setzero_ps();
}

static inline V
v_set1(float x)
{
    return _mm256_set1_ps(x);
}

static inline V
v_load(const float *x)
{
    return _mm256_loadu_ps(x);
}

/* The first n <= VL; the other lanes are zeros. Masks are slow on some CPUs, so that whole vectors
 * do without. */
static inline V
v_load_part(const float *x, int64_t n)
{
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);

    if (n >= VL)
        return v_load(x);
    return _mm256_maskload_ps(x, _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), lane));
}

static inline void
v_store(float *y, V x)
{
    _mm256_storeu_ps(y, x);
}

/* In pieces, for the same reason. */
static inline void
v_store_part(float *y, V x, int64_t n)
{
    __m128 h = _mm256_castps256_ps128(x);

    if (n >= VL) {
        v_store(y, x);
        return;
    }
    if (n & 4) {
        _mm_storeu_ps(y, h);
        h = _mm256_extractf128_ps(x, 1);
        y += 4;
    }
    if (n & 2) {
        _mm_storel_pi((__m64 *)(void *)y, h);
        h = _mm_movehl_ps(h, h);
        y += 2;
    }
    if (n & 1)
        _mm_store_ss(y, h);
}

static inline V
v_add(V a, V b)
{
    return _mm256_add_ps(a, b);
}

static inline V
v_fma(V a, V b, V c)
{
    return _mm256_fmadd_ps(a, b, c);
}

/* The lanes' sum, in halves. */
static inline float
v_sum(V x)
{
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}

/* VL rows of VL words become columns. */
static inline __attribute__((always_inline)) void
v_transpose(V r[VL])
{
    V s[8];

    for (int i = 0; i < 8; i += 2) {
        s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    /* r[4 i + c] has columns c and c + 4 of rows 4 i .. 4 i + 3. */
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm256_shuffle_ps(s[i + j], s[i + 2 + j], 0x44);
            r[i + 2 * j + 1] = _mm256_shuffle_ps(s[i + j], s[i + 2 + j], 0xEE);
        }
    for (int c = 0; c < 4; c++) {
        s[c] = _mm256_permute2f128_ps(r[c], r[4 + c], 0x20);
        s[4 + c] = _mm256_permute2f128_ps(r[c], r[4 + c], 0x31);
    }
    for (int c = 0; c < 8; c++)
        r[c] = s[c];
}
