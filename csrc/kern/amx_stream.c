/* The streaming product with bf16 rows of W for AMX, which has the time for 16 rows of X: each of
 * its values is cut into three bf16 numbers whose sum it is, to the last bit, x = h + m + l, and W
 * is multiplied with all three. Sums of h and of m and l are kept apart, so that the error is that
 * of one sum. */
#include "pack.h"
#include "table.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#include <stdatomic.h>

enum {
    FEW = 4,      /* rows of X for which AVX-512 is fast enough */
    PIECE = 2048, /* of k for each cutting of X: 192 KiB of stack, in the second cache */
    ROWS = 256,   /* of W for each cutting of X, where k is longer */
    AHEAD = 256,  /* columns by which W is asked for before its use */
    TILE = 256    /* floats, or pairs, of a tile */
};

/* p (16,32) from W (rows,k), rows <= 16, k <= 32, filled with zeros. Read like this, by vectors and
 * asked for well before, W comes faster than by loads of tiles. */
static inline __attribute__((always_inline)) void
fetch(uint16_t *p, const uint16_t *w, int64_t ldw, int64_t rows, int64_t k, int64_t ahead)
{
    const __mmask32 mask = k < 32 ? (1u << k) - 1u : ~0u;

    for (int64_t j = 0; j < rows; j++) {
        MLI_PREFETCH(w + j * ldw, (int64_t)sizeof *w * ahead, 2);
        _mm512_store_si512(p + 32 * j, _mm512_maskz_loadu_epi16(mask, w + j * ldw));
    }
    for (int64_t j = rows; j < 16; j++)
        _mm512_store_si512(p + 32 * j, _mm512_setzero_si512());
}

/* q[k / 32][part][pair][n] from X (n,k), n <= 16, filled with zeros. */
static void
cut(uint32_t *q, const float *X, int64_t ldx, int64_t n, int64_t k)
{
    uint16_t part[3][16 * 32] __attribute__((aligned(64)));
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    /* Of two vectors the high halves, the 16-bit words 1, 3, 5 and so on. */
    const __m512i odd = _mm512_add_epi32(_mm512_set1_epi32(0x30001),
                                         _mm512_mullo_epi32(_mm512_set1_epi32(0x40004), lane));

    for (int64_t i = 0; i < k; i += 32, q += 3 * TILE) {
        const int64_t cols = k - i;
        const __mmask16 low = (__mmask16)(cols < 16 ? (1u << cols) - 1u : 0xFFFFu);
        const __mmask16 high = (__mmask16)(cols >= 32  ? 0xFFFFu
                                           : cols > 16 ? (1u << (cols - 16)) - 1u
                                                       : 0u);
        for (int64_t j = 0; j < n; j++) {
            __m512 x[2] = {_mm512_maskz_loadu_ps(low, X + j * ldx + i),
                           _mm512_maskz_loadu_ps(high, X + j * ldx + i + 16)};
            const __m512i top = _mm512_set1_epi32((int)0xFFFF0000u);
            __m512i h[2], m[2], l[2];
            for (int v = 0; v < 2; v++) {
                const __mmask16 finite = _knot_mask16(_mm512_fpclass_ps_mask(x[v], 0x99));
                const __mmask16 nan = _mm512_fpclass_ps_mask(x[v], 0x81);
                __m512 rest;
                h[v] = _mm512_and_si512(_mm512_castps_si512(x[v]), top);
                h[v] = _mm512_mask_or_epi32(h[v], nan, h[v], _mm512_set1_epi32(0x400000));
                rest = _mm512_maskz_sub_ps(finite, x[v], _mm512_castsi512_ps(h[v]));
                m[v] = _mm512_and_si512(_mm512_castps_si512(rest), top);
                rest = _mm512_sub_ps(rest, _mm512_castsi512_ps(m[v]));
                l[v] = _mm512_castps_si512(rest);
            }
            _mm512_store_si512(part[0] + 32 * j, _mm512_permutex2var_epi16(h[0], odd, h[1]));
            _mm512_store_si512(part[1] + 32 * j, _mm512_permutex2var_epi16(m[0], odd, m[1]));
            _mm512_store_si512(part[2] + 32 * j, _mm512_permutex2var_epi16(l[0], odd, l[1]));
        }
        for (int p = 0; p < 3; p++)
            mli_pack_nt__avx512(q + p * TILE, part[p], 32, n, 32);
    }
}

/* sums (2,TILE) [+]= W (rows,k), rows <= 16, by the parts of X: those of h, and of m and l. A step
 * of W is fetched while the one before it is multiplied. */
static void
block(float *sums, const uint16_t *w, int64_t ldw, const uint32_t *q, int64_t rows, int64_t k,
      int first)
{
    uint16_t p[2][2 * TILE] __attribute__((aligned(64)));

    if (first) {
        _tile_zero(0);
        _tile_zero(1);
    } else {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + TILE, 64);
    }
    for (int64_t i = 0; i < k + 32; i += 32) {
        /* In the end ask for the next 16 rows. */
        const int64_t ahead = i + AHEAD < k ? AHEAD : 16 * ldw - k + AHEAD;
        if (i < k)
            fetch(p[i / 32 % 2], w + i, ldw, rows, k - i, ahead);
        atomic_signal_fence(memory_order_seq_cst); /* what tiles load has been written */
        if (i == 0)
            continue;
        _tile_loadd(4, p[(i / 32 - 1) % 2], 64);
        _tile_loadd(5, q, 64);
        _tile_loadd(6, q + TILE, 64);
        _tile_loadd(7, q + 2 * TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(0, 4, 5);
        _tile_dpbf16ps(1, 4, 6);
        q += 3 * TILE;
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + TILE, 64);
    atomic_signal_fence(memory_order_seq_cst); /* and what they stored is read */
}

/* Y (n,rows) [+]= the two sums. */
static void
write_out(float *Y, int64_t ldy, float *sums, int64_t rows, int64_t n, int accumulate)
{
    for (int v = 0; v < TILE; v += 16)
        _mm512_store_ps(sums + v,
                        _mm512_add_ps(_mm512_load_ps(sums + v), _mm512_load_ps(sums + TILE + v)));
    mli_store_transposed__avx512(Y, ldy, sums, 16, rows, n, accumulate);
}

static void
nt_bf16(float *Y, int64_t ldy, const float *X, int64_t ldx, const uint16_t *W, int64_t ldw,
        int64_t N, int64_t r, int64_t k, int accumulate)
{
    uint32_t q[PIECE / 32 * 3 * TILE] __attribute__((aligned(64)));
    float sums[ROWS / 16][2 * TILE] __attribute__((aligned(64)));
    const int64_t most = k > PIECE ? ROWS : r;

    if (N <= FEW) {
        mli_stream_nt_bf16__avx512(Y, ldy, X, ldx, W, ldw, N, r, k, accumulate);
        return;
    }
    mli_tiles_begin__amx();
    for (int64_t r0 = 0; r0 < r; r0 += most) {
        const int64_t end = r - r0 < most ? r : r0 + most;
        for (int64_t n0 = 0; n0 < N; n0 += 16) {
            const int64_t n = N - n0 < 16 ? N - n0 : 16;
            for (int64_t i = 0; i == 0 || i < k; i += PIECE) {
                const int64_t deep = k - i < PIECE ? k - i : PIECE;
                cut(q, X + n0 * ldx + i, ldx, n, deep);
                for (int64_t j = r0; j < end; j += 16) {
                    const int64_t rows = end - j < 16 ? end - j : 16;
                    float *s = sums[k > PIECE ? (j - r0) / 16 : 0];
                    block(s, W + j * ldw + i, ldw, q, rows, deep, i == 0);
                    if (i + PIECE >= k)
                        write_out(Y + n0 * ldy + j, ldy, s, rows, n, accumulate);
                }
            }
        }
    }
    mli_tiles_end__amx();
}

int
mli_kernels_add_amx_stream(mli_kernels *t)
{
    t->stream_nt_bf16 = nt_bf16;
    return 1;
}

#else

int
mli_kernels_add_amx_stream(mli_kernels *t)
{
    (void)t;
    return 0;
}

#endif
