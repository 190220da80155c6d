/* The bf16 matrix product for AMX (AMX_TILE, AMX_BF16), with the packing of AVX-512.
 *
 * A tile product takes 16 rows of 32 values as they lie in memory, P, by 32 by 16 values packed in
 * pairs, Q. The smaller matrix is packed: for few rows of A, B (n,k) is P and the result is C^T. */
#include "pack.h"
#include "table.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include "../base/mem.h"

#include <immintrin.h>
#include <stdatomic.h>
#include <string.h>

enum {
    SIDE = 32,     /* rows of P by columns of Q that four tiles of sums hold */
    TILE = 256,    /* floats, or pairs, of a tile */
    DEPTH = 512,   /* of k at a time, at most: 32 KiB of P, so that Q streams past it */
    COLUMNS = 1024 /* of Q at a time, at most: 1 MiB, which stays in the second cache */
};

typedef struct {
    int64_t columns; /* of Q at a time, a multiple of SIDE */
    int64_t depth;   /* of k at a time, a multiple of SIDE */
    int transposed;
} plan;

/* n in the fewest parts of at most `most`, which SIDE divides: what all but the last have. */
static int64_t
even_part(int64_t n, int64_t most)
{
    const int64_t units = n > 0 ? (n + SIDE - 1) / SIDE : 1;
    const int64_t parts = (units * SIDE + most - 1) / most;

    return (units + parts - 1) / parts * SIDE;
}

static plan
make_plan(int layout, int64_t m, int64_t n, int64_t k)
{
    plan s;

    /* Packing costs a transposition a tile of Q, and C^T one a tile of C. */
    s.transposed = layout == MLI_NT && (double)m * (double)(k + 2 * n) < (double)n * (double)k;
    s.columns = even_part(s.transposed ? m : n, COLUMNS);
    s.depth = even_part(k, DEPTH);
    return s;
}

static size_t
gemm_bf16_ws(int64_t m, int64_t n, int64_t k)
{
    const int64_t columns = (m > n ? m : n) + SIDE, depth = k + SIDE;
    size_t total = mli_carve_size(
        mli_panels_bytes(columns < COLUMNS ? columns : COLUMNS, depth < DEPTH ? depth : DEPTH), 1);

    total = mli_size_add(total, mli_carve_size(SIDE * DEPTH, sizeof(uint16_t)));
    return mli_size_add(total, mli_carve_size(4 * TILE, sizeof(float)));
}

void
mli_tiles_begin__amx(void)
{
    struct {
        uint8_t palette, start, zero[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } c;

    memset(&c, 0, sizeof c);
    c.palette = 1;
    for (int i = 0; i < 8; i++) {
        c.bytes[i] = 64;
        c.rows[i] = 16;
    }
    atomic_signal_fence(memory_order_seq_cst);
    _tile_loadconfig(&c);
}

void
mli_tiles_end__amx(void)
{
    _tile_release();
}

/* Rows of P that come next, which are fetched while tiles multiply: memory is slow to answer, and
 * the hardware does not foresee short pieces of many rows. */
typedef struct {
    const uint16_t *at;
    int64_t ld, rows;
} ahead;

/* sums (4 tiles) = P (32,k) by two panels of Q, both as tiles one after another; `high` and
 * `wide` say whether the second half of P's rows and of Q's columns is there. */
static inline __attribute__((always_inline)) void
tiles(const int high, const int wide, float *sums, const uint16_t *p, const uint32_t *q,
      int64_t stride, int64_t k, const ahead *next)
{
    const uint16_t *f = next->at;

    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < k; i += 32, p += 4 * TILE, q += TILE, f += 32) {
        _tile_loadd(4, p, 64);
        if (high)
            _tile_loadd(5, p + 2 * TILE, 64);
        _tile_stream_loadd(6, q, 64);
        if (wide)
            _tile_stream_loadd(7, q + stride, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (wide)
            _tile_dpbf16ps(1, 4, 7);
        if (high)
            _tile_dpbf16ps(2, 5, 6);
        if (high && wide)
            _tile_dpbf16ps(3, 5, 7);
        for (int64_t r = 0; r < next->rows; r++)
            _mm_prefetch((const char *)(f + r * next->ld), _MM_HINT_T1);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + TILE, 64);
    _tile_stored(2, sums + 2 * TILE, 64);
    _tile_stored(3, sums + 3 * TILE, 64);
}

/* C (rows,cols) [+]= the four tiles of sums. */
static void
write_out(float *C, int64_t ldc, const float *sums, int64_t rows, int64_t cols, int accumulate)
{
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j += 16) {
            const int64_t n = cols - j;
            const __mmask16 mask = (__mmask16)(n < 16 ? (1u << n) - 1u : 0xFFFFu);
            float *c = C + i * ldc + j;
            __m512 t = _mm512_load_ps(sums + (i / 16 * 2 + j / 16) * TILE + i % 16 * 16);
            if (accumulate)
                t = _mm512_add_ps(t, _mm512_maskz_loadu_ps(mask, c));
            _mm512_mask_storeu_ps(c, mask, t);
        }
}

static void
write_out_transposed(float *C, int64_t ldc, const float *sums, int64_t rows, int64_t cols,
                     int accumulate)
{
    for (int64_t i = 0; i < rows; i += 16)
        for (int64_t j = 0; j < cols; j += 16)
            mli_store_transposed__avx512(C + j * ldc + i, ldc, sums + (i / 16 * 2 + j / 16) * TILE,
                                         16, rows - i < 16 ? rows - i : 16,
                                         cols - j < 16 ? cols - j : 16, accumulate);
}

/* p[k / 32][SIDE][32] from P (rows,k), filled with zeros: tiles of the whole, one after another.
 * Rows of P a power of two apart would fall on the same few lines of the first cache. */
static void
gather(uint16_t *p, const uint16_t *P, int64_t ldp, int64_t rows, int64_t k)
{
    for (int64_t i = 0; i < SIDE; i++)
        for (int64_t j = 0; j < k; j += 32) {
            const __mmask32 mask = k - j < 32 ? (1u << (k - j)) - 1u : ~0u;
            __m512i v = _mm512_setzero_si512();
            if (i < rows)
                v = _mm512_maskz_loadu_epi16(mask, P + i * ldp + j);
            _mm512_store_si512(p + (j + i) * 32, v);
        }
}

/* SIDE rows of P, or fewer, by all columns of a block of Q. */
static void
strip(const plan *s, float *C, int64_t ldc, const uint16_t *p, const uint32_t *q, float *sums,
      int64_t rows, int64_t cols, int64_t k, int accumulate, ahead next)
{
    const int64_t stride = 16 * mli_pairs(k), calls = (cols + SIDE - 1) / SIDE;
    const int64_t share = (next.rows + calls - 1) / calls;
    int64_t left = next.rows;

    for (int64_t j = 0; j < cols; j += SIDE) {
        const int64_t n = cols - j < SIDE ? cols - j : SIDE;
        const uint32_t *b = q + j / 16 * stride;
        next.rows = left < share ? left : share;
        if (rows > 16 && n > 16)
            tiles(1, 1, sums, p, b, stride, k, &next);
        else if (rows > 16)
            tiles(1, 0, sums, p, b, stride, k, &next);
        else if (n > 16)
            tiles(0, 1, sums, p, b, stride, k, &next);
        else
            tiles(0, 0, sums, p, b, stride, k, &next);
        atomic_signal_fence(memory_order_seq_cst); /* what tiles stored is read */
        if (s->transposed)
            write_out_transposed(C + j * ldc, ldc, sums, rows, n, accumulate);
        else
            write_out(C + j, ldc, sums, rows, n, accumulate);
        next.at += next.rows * next.ld;
        left -= next.rows;
    }
}

static void
gemm_bf16(int layout, float *C, int64_t ldc, const uint16_t *A, int64_t lda, const uint16_t *B,
          int64_t ldb, int64_t m, int64_t n, int64_t k, int accumulate, void *ws)
{
    const plan s = make_plan(layout, m, n, k);
    const uint16_t *P = s.transposed ? B : A, *Q = s.transposed ? A : B;
    const int64_t ldp = s.transposed ? ldb : lda, ldq = s.transposed ? lda : ldb;
    const int64_t rows = s.transposed ? n : m, columns = s.transposed ? m : n;
    char *cut = ws;
    uint32_t *q = mli_carve(&cut, mli_panels_bytes(s.columns, s.depth), 1);
    uint16_t *p = mli_carve(&cut, (size_t)(SIDE * s.depth), sizeof(uint16_t));
    float *sums = mli_carve(&cut, 4 * TILE, sizeof(float));

    if (m == 0 || n == 0)
        return;
    mli_tiles_begin__amx();
    for (int64_t j = 0; j < columns; j += s.columns)
        for (int64_t d = 0; d == 0 || d < k; d += s.depth) {
            const int64_t cols = columns - j < s.columns ? columns - j : s.columns;
            const int64_t deep = k - d < s.depth ? k - d : s.depth;
            if (layout == MLI_NN)
                mli_pack_nn__avx512(q, Q + d * ldq + j, ldq, cols, deep);
            else
                mli_pack_nt__avx512(q, Q + j * ldq + d, ldq, cols, deep);
            for (int64_t i = 0; i < rows; i += SIDE) {
                const int64_t high = rows - i < SIDE ? rows - i : SIDE, left = rows - i - high;
                const ahead next = {P + (i + high) * ldp + d, ldp, left < SIDE ? left : SIDE};
                float *c = s.transposed ? C + j * ldc + i : C + i * ldc + j;
                gather(p, P + i * ldp + d, ldp, high, deep);
                atomic_signal_fence(memory_order_seq_cst); /* what tiles load has been written */
                strip(&s, c, ldc, p, q, sums, high, cols, deep, accumulate || d > 0, next);
            }
        }
    mli_tiles_end__amx();
}

int
mli_kernels_add_amx(mli_kernels *t)
{
    t->isa = "amx";
    t->gemm_bf16_ws = gemm_bf16_ws;
    t->gemm_bf16 = gemm_bf16;
    t->gemm_bf16_native = 1;
    return 1;
}

#else

int
mli_kernels_add_amx(mli_kernels *t)
{
    (void)t;
    return 0;
}

#endif
