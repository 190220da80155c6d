/* Packing and transposing for the products. */
#include "pack.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>

#include "avx512.inc.h"
#include "rows_turn.inc.h"

void
mli_pack_nt__avx512(uint32_t *q, const uint16_t *B, int64_t ldb, int64_t n, int64_t k)
{
    for (int64_t j = 0; j < n; j += 16)
        for (int64_t i = 0; i < k; i += 32, q += 256) {
            const __mmask32 cols = k - i < 32 ? (1u << (k - i)) - 1u : ~0u;
            const uint16_t *b = B + j * ldb + i;
            V r[VL];
            for (int64_t p = 0; p < 16; p++)
                r[p] = j + p < n ? _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(cols, b + p * ldb))
                                 : v_zero();
            v_transpose(r);
            for (int64_t p = 0; p < 16; p++)
                _mm512_store_ps(q + 16 * p, r[p]);
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
mli_store_transposed__avx512(float *C, int64_t ldc, const float *T, int64_t ldt, int64_t m,
                             int64_t n, int accumulate)
{
    store_turned(C, ldc, T, ldt, m, n, accumulate);
}

#endif
