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
    SIDE = 32,            /* rows of P by columns of Q that four tiles of sums hold */
    TILE = 256,           /* floats, or pairs, of a tile */
    PIECE = 512,          /* of k at a time: SIDE rows of P stay in the first cache */
    BLOCK_BYTES = 1 << 20 /* of packed Q: it stays in the second cache */
};

typedef struct {
    int64_t columns; /* of Q at a time, a multiple of SIDE */
    int transposed;
    size_t q, p, tail, sums; /* bytes */
} plan;

static plan
make_plan(int layout, int64_t m, int64_t n, int64_t k)
{
    const int64_t deep = 2 * mli_pairs(k) > 32 ? 2 * mli_pairs(k) : 32;
    plan s;
    int64_t columns;

    /* Packing costs a transposition a tile of Q, and C^T one a tile of C. */
    s.transposed = layout == MLI_NT && (double)m * (double)(k + 2 * n) < (double)n * (double)k;
    columns = s.transposed ? m : n;
    s.columns = BLOCK_BYTES / 2 / deep / SIDE * SIDE;
    if (s.columns < SIDE)
        s.columns = SIDE;
    if (columns < s.columns)
        s.columns = (columns + SIDE - 1) / SIDE * SIDE;
    s.q = mli_panels_bytes(s.columns, k);
    s.p = (size_t)(SIDE * deep) * sizeof(uint16_t);
    s.tail = SIDE * 32 * sizeof(uint16_t);
    s.sums = (size_t)(SIDE * s.columns) * sizeof(float);
    return s;
}

static size_t
gemm_bf16_ws(int layout, int64_t m, int64_t n, int64_t k)
{
    const plan s = make_plan(layout, m, n, k);
    size_t total = mli_carve_size(s.q, 1);

    total = mli_size_add(total, mli_carve_size(s.p, 1));
    total = mli_size_add(total, mli_carve_size(s.tail, 1));
    return mli_size_add(total, mli_carve_size(s.sums, 1));
}

/* All eight tiles are 16 rows of 64 bytes. */
static void
configure(void)
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

/* One step in k of the sums in tiles 0 to 3: P in 4 and 5, Q in 6 and 7. */
static inline __attribute__((always_inline)) void
step(const int high, const int wide, const uint16_t *p, size_t bytes, const uint32_t *q,
     int64_t stride)
{
    _tile_loadd(4, p, bytes);
    _tile_loadd(6, q, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (wide) {
        _tile_loadd(7, q + stride, 64);
        _tile_dpbf16ps(1, 4, 7);
    }
    if (high) {
        _tile_loadd(5, (const char *)p + 16 * bytes, bytes);
        _tile_dpbf16ps(2, 5, 6);
        if (wide)
            _tile_dpbf16ps(3, 5, 7);
    }
}

/* sums (4 tiles) [+]= P (32,k) by two panels of Q. The last k % 32 columns of P are in `tail`. */
static inline __attribute__((always_inline)) void
tiles(const int high, const int wide, float *sums, const uint16_t *P, int64_t ldp,
      const uint16_t *tail, const uint32_t *q, int64_t stride, int64_t k, int first)
{
    int64_t i = 0;

    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + TILE, 64);
        _tile_loadd(2, sums + 2 * TILE, 64);
        _tile_loadd(3, sums + 3 * TILE, 64);
    }
    for (; i + 32 <= k; i += 32)
        step(high, wide, P + i, (size_t)ldp * 2, q + 8 * i, stride);
    if (i < k)
        step(high, wide, tail, 64, q + 8 * i, stride);
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
                                         rows - i < 16 ? rows - i : 16,
                                         cols - j < 16 ? cols - j : 16, accumulate);
}

/* rows (at most SIDE) of P by k columns, filled up with zeros to SIDE by a multiple of 32. */
static void
copy_rows(uint16_t *to, const uint16_t *P, int64_t ldp, int64_t rows, int64_t k)
{
    const int64_t deep = (k + 31) / 32 * 32;

    for (int64_t i = 0; i < SIDE; i++)
        for (int64_t j = 0; j < deep; j += 32) {
            const int64_t n = i < rows ? k - j : 0;
            const __mmask32 mask = n < 32 ? (1u << n) - 1u : ~0u;
            _mm512_store_si512(to + i * deep + j, _mm512_maskz_loadu_epi16(mask, P + i * ldp + j));
        }
}

/* SIDE rows of P by all columns of a block of Q. */
static void
strip(const plan *s, float *C, int64_t ldc, const uint16_t *P, int64_t ldp, const uint16_t *tail,
      const uint32_t *q, float *sums, int64_t rows, int64_t cols, int64_t k, int accumulate)
{
    const int64_t stride = 16 * mli_pairs(k);

    for (int64_t i = 0; i == 0 || i < k; i += PIECE) {
        const int64_t deep = k - i < PIECE ? k - i : PIECE;
        for (int64_t j = 0; j < cols; j += SIDE) {
            const int64_t n = cols - j < SIDE ? cols - j : SIDE;
            const uint32_t *b = q + j / 16 * stride + 8 * i;
            float *t = sums + j * SIDE;
            if (rows > 16 && n > 16)
                tiles(1, 1, t, P + i, ldp, tail, b, stride, deep, i == 0);
            else if (rows > 16)
                tiles(1, 0, t, P + i, ldp, tail, b, stride, deep, i == 0);
            else if (n > 16)
                tiles(0, 1, t, P + i, ldp, tail, b, stride, deep, i == 0);
            else
                tiles(0, 0, t, P + i, ldp, tail, b, stride, deep, i == 0);
            if (i + PIECE < k)
                continue;
            if (s->transposed)
                write_out_transposed(C + j * ldc, ldc, t, rows, n, accumulate);
            else
                write_out(C + j, ldc, t, rows, n, accumulate);
        }
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
    uint32_t *q = mli_carve(&cut, s.q, 1);
    uint16_t *copy = mli_carve(&cut, s.p, 1), *tail = mli_carve(&cut, s.tail, 1);
    float *sums = mli_carve(&cut, s.sums, 1);

    if (m == 0 || n == 0)
        return;
    configure();
    for (int64_t j = 0; j < columns; j += s.columns) {
        const int64_t cols = columns - j < s.columns ? columns - j : s.columns;
        if (layout == MLI_NN)
            mli_pack_nn__avx512(q, Q + j, ldq, cols, k);
        else
            mli_pack_nt__avx512(q, Q + j * ldq, ldq, cols, k);
        for (int64_t i = 0; i < rows; i += SIDE) {
            const int64_t high = rows - i < SIDE ? rows - i : SIDE;
            const uint16_t *p = P + i * ldp;
            float *c = s.transposed ? C + j * ldc + i : C + i * ldc + j;
            int64_t ld = ldp, deep = k;
            if (high < SIDE) { /* tiles have 16 rows: none may lie past the end */
                copy_rows(copy, p, ldp, high, k);
                p = copy;
                ld = deep = 2 * mli_pairs(k);
            } else if (k % 32 != 0) {
                copy_rows(tail, p + k / 32 * 32, ldp, high, k % 32);
            }
            atomic_signal_fence(memory_order_seq_cst); /* what tiles load has been written */
            strip(&s, c, ldc, p, ld, tail, q, sums, high, cols, deep, accumulate);
        }
    }
    _tile_release();
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
