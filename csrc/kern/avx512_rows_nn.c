/* The f32 product Y (n,c) [+]= X (n,k) W (k,c) for some tens or hundreds of rows, for AVX-512. BLAS
 * packs W, which comes from memory and is used once, and waits for it; here a block of W is packed
 * and the next one asked for while this one is multiplied. */
#include "pack.h"
#include "stream.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>

#define V __m512
#define v_load _mm512_load_ps
#define v_spread _mm512_set1_ps
#define v_fma _mm512_fmadd_ps
#define MASK __mmask16
#define v_add _mm512_add_ps
#define v_load_some _mm512_maskz_loadu_ps
#define v_store_some _mm512_mask_storeu_ps
#include "rows.inc.h"
#include "tile.inc.h"

enum {
    BLOCK = 8 * WIDE, /* columns of W that are packed at once */
    DEEP = 128,       /* rows of W that are packed at once: 192 KiB */
    STEPS = 16        /* of k between two requests for memory */
};

/* Runs of WIDE numbers of the next block of W, to be asked for: from `at` to `end`, of `across` a
 * row. */
typedef struct {
    const float *W;
    int64_t ldw, across, at, end;
} fetch;

static inline int64_t
runs(int64_t cols)
{
    return (cols + WIDE - 1) / WIDE;
}

static inline __attribute__((always_inline)) void
fetch_some(fetch *f, int64_t upto)
{
    for (; f->at < upto; f->at++) {
        const float *w = f->W + f->at / f->across * f->ldw + f->at % f->across * WIDE;
        for (int64_t line = 0; line < WIDE * (int64_t)sizeof *w; line += 64)
            MLI_PREFETCH(w, line, 2);
    }
}

/* Y (rows,16 panels) [+]= X (rows,k) q (k,16 panels); the last panel has the columns of `last`. */
static inline __attribute__((always_inline)) void
tile(const int rows, const int panels, float *Y, int64_t ldy, const float *X, int64_t ldx,
     const float *q, int64_t k, __mmask16 last, int accumulate, fetch *f, int64_t per_step)
{
    __m512 s[TALL * PANELS];

    UNROLL
    for (int i = 0; i < rows * panels; i++)
        s[i] = _mm512_setzero_ps();
    for (int64_t i = 0, end; i < k; i = end) {
        const int64_t upto = f->at + per_step;
        end = k - i < STEPS ? k : i + STEPS;
        fetch_some(f, upto < f->end ? upto : f->end);
        q = add_columns(rows, panels, s, X, ldx, q, 16, 16 * panels, i, end);
    }
    store_tile(rows, panels, Y, ldy, s, last, accumulate);
}

typedef void (*tile_fn)(float *, int64_t, const float *, int64_t, const float *, int64_t, __mmask16,
                        int, fetch *, int64_t);

#define TILE(ROWS_, PANELS)                                                                        \
    static void tile_##ROWS_##_##PANELS(float *Y, int64_t ldy, const float *X, int64_t ldx,        \
                                        const float *q, int64_t k, __mmask16 last, int accumulate, \
                                        fetch *f, int64_t per_step)                                \
    {                                                                                              \
        tile(ROWS_, PANELS, Y, ldy, X, ldx, q, k, last, accumulate, f, per_step);                  \
    }
ALL_TILES
#undef TILE

static const tile_fn tiles[TALL][PANELS] = TABLE_OF(tile);

/* q[run of WIDE columns][k][16 panels] from W (k,c), c <= BLOCK. */
static void
pack(float *q, const float *W, int64_t ldw, int64_t c, int64_t k)
{
    for (int64_t i = 0; i < k; i++, W += ldw)
        for (int64_t j = 0; j < c; j += 16) {
            const int64_t run = j / WIDE * WIDE, left = c - run;
            const int64_t width = left < WIDE ? (left + 15) / 16 * 16 : WIDE;
            const __mmask16 cols = (__mmask16)(c - j < 16 ? (1u << (c - j)) - 1u : 0xFFFFu);
            _mm512_store_ps(q + run * k + i * width + j - run, _mm512_maskz_loadu_ps(cols, W + j));
        }
}

/* A packed block of W (k,c) times all rows of X. */
static void
multiply(float *Y, int64_t ldy, const float *X, int64_t ldx, const float *q, int64_t n, int64_t c,
         int64_t k, int accumulate, fetch *f)
{
    const int64_t tall = (n + TALL - 1) / TALL;
    const int64_t steps = tall * runs(c) * ((k + STEPS - 1) / STEPS);
    const int64_t per_step = steps > 0 ? (f->end + steps - 1) / steps : 0;

    for (int64_t j = 0; j < c; j += WIDE) {
        __mmask16 last;
        const int64_t panels = panels_of(c - j, &last);
        for (int64_t t = tall, i = 0, rows; t > 0; t--, i += rows) {
            rows = (n - i + t - 1) / t; /* even parts */
            tiles[rows - 1][panels - 1](Y + i * ldy + j, ldy, X + i * ldx, ldx, q + j * k, k, last,
                                        accumulate, f, per_step);
        }
    }
}

size_t
mli_rows_nn_ws__avx512(void)
{
    return (size_t)BLOCK * DEEP * sizeof(float);
}

void
mli_rows_nn__avx512(float *Y, int64_t ldy, const float *X, int64_t ldx, const float *W, int64_t ldw,
                    int64_t n, int64_t c, int64_t k, int accumulate, void *ws)
{
    const int64_t piece = mli_piece(k, DEEP);

    for (int64_t j = 0; j < c; j += BLOCK) {
        const int64_t cols = c - j < BLOCK ? c - j : BLOCK;
        for (int64_t i = 0; i == 0 || i < k; i += piece) {
            const int64_t deep = k - i < piece ? k - i : piece;
            fetch f = {W + i * ldw + j, ldw, runs(cols), 0, 0};
            pack(ws, f.W, ldw, cols, deep);
            if (i + piece < k) { /* the rows below */
                f.W += piece * ldw;
                f.end = f.across * (k - i - piece < piece ? k - i - piece : piece);
            } else if (j + BLOCK < c) { /* the columns beside */
                f.W = W + j + BLOCK;
                f.across = runs(c - j - BLOCK < BLOCK ? c - j - BLOCK : BLOCK);
                f.end = f.across * (k < piece ? k : piece);
            }
            multiply(Y + j, ldy, X + i, ldx, ws, n, cols, deep, accumulate || i > 0, &f);
        }
    }
}

#endif
