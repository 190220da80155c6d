/* The f32 products of rows with a small matrix, for AVX-512: W is packed and stays in the first
 * caches, and X is read number by number where it lies, in any order of rows and columns. */
#include "pack.h"
#include "stream.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>

#define V __m512
#define MASK __mmask16
#define v_add _mm512_add_ps
#define v_load_some _mm512_maskz_loadu_ps
#define v_store_some _mm512_mask_storeu_ps
#include "tile.inc.h"

/* What a tile multiplies. */
typedef struct {
    const int32_t *rest; /* columns of x; NULL: 0 .. k-1 */
    int64_t k, stride;   /* stride: of panels of q */
    int accumulate;
} small;

/* taken (rows,WIDE) = columns of rows of x. Number by number: AVX-512's gather is no faster on some
 * CPUs, and much slower on others. */
static inline void
take(float *taken, int rows, const float *const *x, const int32_t *own, int64_t cols)
{
    for (int64_t j = 0; j < cols; j++)
        for (int r = 0; r < rows; r++)
            taken[r * WIDE + j] = x[r][own[j]];
}

/* Y (rows,16 panels) [+]= rows of x times panels of q, plus the `own` columns of x unless NULL; the
 * last panel has the columns of `last`. */
static inline __attribute__((always_inline)) void
tile(const int rows, const int panels, float *Y, int64_t ldy, const float *const x[TALL],
     const float *q, const small *how, const int32_t *own, __mmask16 last)
{
    const int32_t *rest = how->rest;
    const int64_t k = how->k, stride = how->stride;
    _Alignas(64) float taken[TALL * WIDE];
    __m512 s[TALL * PANELS];

    UNROLL
    for (int i = 0; i < rows * panels; i++)
        s[i] = _mm512_setzero_ps();
    for (int64_t i = 0; i < k; i++, q += 16) {
        const int64_t at = rest != NULL ? rest[i] : i;
        __m512 b[PANELS];
        UNROLL
        for (int p = 0; p < panels; p++)
            b[p] = _mm512_load_ps(q + p * stride);
        UNROLL
        for (int r = 0; r < rows; r++) {
            const __m512 a = _mm512_set1_ps(x[r][at]);
            UNROLL
            for (int p = 0; p < panels; p++)
                s[r * panels + p] = _mm512_fmadd_ps(a, b[p], s[r * panels + p]);
        }
    }
    if (own != NULL) {
        take(taken, rows, x, own, 16 * (panels - 1) + __builtin_popcount(last));
        UNROLL
        for (int r = 0; r < rows; r++)
            UNROLL
        for (int p = 0; p < panels; p++)
            s[r * panels + p] =
                _mm512_add_ps(s[r * panels + p], _mm512_load_ps(taken + r * WIDE + 16 * p));
    }
    store_tile(rows, panels, Y, ldy, s, last, how->accumulate);
}

/* dW (rows,16 panels) [+]= dY (N,rows)^T times columns c0 .. of x. */
static inline __attribute__((always_inline)) void
tile_tn(const int rows, const int panels, float *dW, int64_t ldw, const float *dY, int64_t ldy,
        const mli_rows_f32 *x, int64_t c0, __mmask16 last, int accumulate)
{
    __m512 s[TALL * PANELS];

    UNROLL
    for (int i = 0; i < rows * panels; i++)
        s[i] = _mm512_setzero_ps();
    for (int64_t n = 0; n < x->N; n++, dY += ldy) {
        const float *from = mli_row_f32(x, n) + c0;
        __m512 b[PANELS];
        UNROLL
        for (int p = 0; p < panels; p++)
            b[p] = p == panels - 1 ? _mm512_maskz_loadu_ps(last, from + 16 * p)
                                   : _mm512_loadu_ps(from + 16 * p);
        UNROLL
        for (int r = 0; r < rows; r++) {
            const __m512 a = _mm512_set1_ps(dY[r]);
            UNROLL
            for (int p = 0; p < panels; p++)
                s[r * panels + p] = _mm512_fmadd_ps(a, b[p], s[r * panels + p]);
        }
    }
    store_tile(rows, panels, dW, ldw, s, last, accumulate);
}

#define TILE(ROWS_, PANELS_)                                                                   \
    static void tile_##ROWS_##_##PANELS_(float *Y, int64_t ldy, const float *const *x,         \
                                         const float *q, const small *how, const int32_t *own, \
                                         __mmask16 last)                                       \
    {                                                                                          \
        tile(ROWS_, PANELS_, Y, ldy, x, q, how, own, last);                                    \
    }                                                                                          \
    static void tn_##ROWS_##_##PANELS_(float *dW, int64_t ldw, const float *dY, int64_t ldy,   \
                                       const mli_rows_f32 *x, int64_t c0, __mmask16 last,      \
                                       int accumulate)                                         \
    {                                                                                          \
        tile_tn(ROWS_, PANELS_, dW, ldw, dY, ldy, x, c0, last, accumulate);                    \
    }
ALL_TILES
#undef TILE

static void (*const tiles[TALL][PANELS])(float *, int64_t, const float *const *, const float *,
                                         const small *, const int32_t *,
                                         __mmask16) = TABLE_OF(tile);
static void (*const tiles_tn[TALL][PANELS])(float *, int64_t, const float *, int64_t,
                                            const mli_rows_f32 *, int64_t, __mmask16,
                                            int) = TABLE_OF(tn);

void
mli_rows_small__avx512(float *Y, int64_t ldy, const mli_rows_f32 *x, const int32_t *own,
                       int64_t cols, const int32_t *rest, int64_t k, const float *W, int64_t ldw,
                       int accumulate, void *ws)
{
    const small how = {rest, k, (k + 15) / 16 * 256, accumulate};
    const int64_t tall = (x->N + TALL - 1) / TALL;

    mli_pack_f32__avx512(ws, W, ldw, cols, k);
    for (int64_t j = 0; j < cols; j += WIDE) {
        const float *q = (const float *)ws + j / 16 * how.stride;
        __mmask16 last;
        const int64_t panels = panels_of(cols - j, &last);
        for (int64_t t = tall, n = 0, rows; t > 0; t--, n += rows) {
            const float *from[TALL];
            rows = (x->N - n + t - 1) / t; /* even parts */
            for (int64_t r = 0; r < rows; r++)
                from[r] = mli_row_f32(x, n + r);
            tiles[rows - 1][panels - 1](Y + n * ldy + j, ldy, from, q, &how,
                                        own != NULL ? own + j : NULL, last);
        }
    }
}

void
mli_tn_f32__avx512(float *dW, int64_t ldw, const float *dY, int64_t ldy, const mli_rows_f32 *x,
                   int64_t r, int64_t k, int accumulate)
{
    const int64_t tall = (r + TALL - 1) / TALL;

    for (int64_t j = 0; j < k; j += WIDE) {
        __mmask16 last;
        const int64_t panels = panels_of(k - j, &last);
        for (int64_t t = tall, i = 0, rows; t > 0; t--, i += rows) {
            rows = (r - i + t - 1) / t;
            tiles_tn[rows - 1][panels - 1](dW + i * ldw + j, ldw, dY + i, ldy, x, j, last,
                                           accumulate);
        }
    }
}

#endif
