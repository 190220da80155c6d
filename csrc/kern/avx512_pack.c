/* Packing and transposing for the products. */
#include "pack.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>

/* 16 rows of 16 words become columns. */
static inline __attribute__((always_inline)) void
transpose(__m512i r[16])
{
    __m512i s[16];

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
        r[c] = _mm512_shuffle_i32x4(s[c], s[8 + c], 0x88);
        r[8 + c] = _mm512_shuffle_i32x4(s[c], s[8 + c], 0xDD);
        r[4 + c] = _mm512_shuffle_i32x4(s[4 + c], s[12 + c], 0x88);
        r[12 + c] = _mm512_shuffle_i32x4(s[4 + c], s[12 + c], 0xDD);
    }
}

void
mli_pack_nt__avx512(uint32_t *q, const uint16_t *B, int64_t ldb, int64_t n, int64_t k)
{
    for (int64_t j = 0; j < n; j += 16)
        for (int64_t i = 0; i < k; i += 32, q += 256) {
            const __mmask32 cols = k - i < 32 ? (1u << (k - i)) - 1u : ~0u;
            const uint16_t *b = B + j * ldb + i;
            __m512i r[16];
            for (int64_t p = 0; p < 16; p++)
                r[p] = j + p < n ? _mm512_maskz_loadu_epi16(cols, b + p * ldb)
                                 : _mm512_setzero_si512();
            transpose(r);
            for (int64_t p = 0; p < 16; p++)
                _mm512_store_si512(q + 16 * p, r[p]);
        }
}

void
mli_pack_nn__avx512(uint32_t *q, const uint16_t *B, int64_t ldb, int64_t n, int64_t k)
{
    const __m512i halves = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    const int64_t pairs = mli_pairs(k);

    /* Few rows at a time, along them: the hardware fetches those ahead. */
    for (int64_t p0 = 0; p0 < pairs; p0 += 8)
        for (int64_t j = 0; j < n; j += 32) {
            const __mmask32 cols = n - j < 32 ? (1u << (n - j)) - 1u : ~0u;
            uint32_t *to = q + j * pairs + 16 * p0;
            for (int64_t p = 2 * p0; p < 2 * p0 + 16; p += 2, to += 16) {
                const uint16_t *b = B + p * ldb + j;
                __m512i even = _mm512_setzero_si512(), odd = even;
                if (p < k)
                    even = _mm512_permutexvar_epi64(halves, _mm512_maskz_loadu_epi16(cols, b));
                if (p + 1 < k)
                    odd = _mm512_permutexvar_epi64(halves, _mm512_maskz_loadu_epi16(cols, b + ldb));
                _mm512_store_si512(to, _mm512_unpacklo_epi16(even, odd));
                if (n - j > 16) /* a second panel */
                    _mm512_store_si512(to + 16 * pairs, _mm512_unpackhi_epi16(even, odd));
            }
        }
}

void
mli_pack_f32__avx512(float *q, const float *B, int64_t ldb, int64_t n, int64_t k)
{
    /* A number is a pair of halves, and is moved as one. */
    mli_pack_nt__avx512((uint32_t *)(void *)q, (const uint16_t *)(const void *)B, 2 * ldb, n,
                        2 * k);
}

void
mli_store_transposed__avx512(float *C, int64_t ldc, const float *T, int64_t ldt, int64_t m,
                             int64_t n, int accumulate)
{
    const __mmask16 cols = (__mmask16)((1u << m) - 1u);
    __m512i r[16];

    for (int i = 0; i < 16; i++)
        r[i] = _mm512_load_si512(T + ldt * i);
    transpose(r);
    for (int64_t i = 0; i < n; i++) {
        __m512 t = _mm512_castsi512_ps(r[i]);
        if (accumulate)
            t = _mm512_add_ps(t, _mm512_maskz_loadu_ps(cols, C + i * ldc));
        _mm512_mask_storeu_ps(C + i * ldc, cols, t);
    }
}

void
mli_turn__avx512(float *T, const mli_rows_f32 *x, int64_t n)
{
    for (int64_t i = 0; i < x->D; i += 16, T += 256) {
        const __mmask16 cols = (__mmask16)(x->D - i < 16 ? (1u << (x->D - i)) - 1u : 0xFFFFu);
        __m512i r[16];
        for (int64_t p = 0; p < 16; p++)
            r[p] = n + p < x->N ? _mm512_maskz_loadu_epi32(cols, mli_row_f32(x, n + p) + i)
                                : _mm512_setzero_si512();
        transpose(r);
        for (int64_t p = 0; p < 16; p++)
            _mm512_store_si512(T + 16 * p, r[p]);
    }
}

void
mli_turn_back__avx512(float *X, int64_t ldx, const float *T, int64_t rows, const int32_t *column,
                      int64_t cols)
{
    for (int64_t j = 0; j < cols; j += 16) {
        const int64_t wide = cols - j < 16 ? cols - j : 16;
        const __mmask16 some = (__mmask16)((1u << wide) - 1u);
        __m512i r[16];
        for (int64_t c = 0; c < 16; c++)
            r[c] = c < wide ? _mm512_load_si512(T + 16 * column[j + c]) : _mm512_setzero_si512();
        transpose(r);
        for (int64_t p = 0; p < 16 && p < rows; p++)
            _mm512_mask_storeu_epi32(X + p * ldx + j, some, r[p]);
    }
}

void
mli_gather_f32__avx512(float *X, int64_t ldx, const mli_rows_f32 *x, const int32_t *column,
                       int64_t cols, void *ws)
{
    /* As columns first, of which any follow any: no number is moved alone. */
    for (int64_t n = 0; n < x->N; n += 16) {
        mli_turn__avx512(ws, x, n);
        mli_turn_back__avx512(X + n * ldx, ldx, ws, x->N - n, column, cols);
    }
}

#endif
