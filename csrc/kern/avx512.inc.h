/* Vectors of 16 floats, for the kernels that are written once for all vectors (rows_*.inc.h and
 * stream.inc.h). The includer has immintrin.h. Loads and stores ask for no alignment. */

#define V __m512
#define VL 16

static inline __mmask16
first_lanes(int64_t n)
{
    return (__mmask16)((1u << n) - 1u);
}

static inline V
v_zero(void)
{
    return _mm512_setzero_ps();
}

static inline V
v_set1(float x)
{
    return _mm512_set1_ps(x);
}

static inline V
v_load(const float *x)
{
    return _mm512_loadu_ps(x);
}

/* The first n <= VL; the other lanes are zeros. */
static inline V
v_load_part(const float *x, int64_t n)
{
    return _mm512_maskz_loadu_ps(first_lanes(n), x);
}

static inline void
v_store(float *y, V x)
{
    _mm512_storeu_ps(y, x);
}

static inline void
v_store_part(float *y, V x, int64_t n)
{
    _mm512_mask_storeu_ps(y, first_lanes(n), x);
}

static inline V
v_add(V a, V b)
{
    return _mm512_add_ps(a, b);
}

static inline V
v_fma(V a, V b, V c)
{
    return _mm512_fmadd_ps(a, b, c);
}

/* The lanes' sum, in halves. */
static inline float
v_sum(V x)
{
    __m256 h = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}

/* VL rows of VL words become columns. */
static inline __attribute__((always_inline)) void
v_transpose(V rows[VL])
{
    __m512i r[16], s[16];

    for (int i = 0; i < 16; i++)
        r[i] = _mm512_castps_si512(rows[i]);
    for (int i = 0; i < 16; i += 2) {
        s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(s[i + j], s[i + 2 + j]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(s[i + j], s[i + 2 + j]);
        }
    /* r[4 i + c] has columns c, c + 4, c + 8, c + 12 of rows 4 i .. 4 i + 3. */
    for (int c = 0; c < 4; c++) {
        s[c] = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
        s[4 + c] = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xDD);
        s[8 + c] = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
        s[12 + c] = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xDD);
    }
    for (int c = 0; c < 4; c++) {
        rows[c] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(s[c], s[8 + c], 0x88));
        rows[8 + c] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(s[c], s[8 + c], 0xDD));
        rows[4 + c] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(s[4 + c], s[12 + c], 0x88));
        rows[12 + c] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(s[4 + c], s[12 + c], 0xDD));
    }
}
