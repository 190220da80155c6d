/* The bf16 matrix product for AVX512_BF16. */
#include "pack.h"
#include "table.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include "../base/mem.h"

#include <immintrin.h>
#include <string.h>

enum {
    ROWS = 8, /* of A in registers, by PANELS panels: 24 sums */
    PANELS = 3,
    PIECE = 256,          /* of k at a time: three panels are 24 KiB */
    BLOCK_BYTES = 1 << 19 /* of packed B: it stays in the second cache */
};

/* Columns of a block of B. */
static int64_t
block_columns(int64_t n, int64_t k)
{
    int64_t most = BLOCK_BYTES / 64 / (mli_pairs(k) > 0 ? mli_pairs(k) : 1) / PANELS;

    most = (most < 1 ? 1 : most) * PANELS * 16;
    return n < most ? n : most;
}

static size_t
gemm_bf16_ws(int64_t m, int64_t n, int64_t k)
{
    const size_t least = mli_panels_bytes(PANELS * 16, k), all = mli_panels_bytes(n, k);
    const size_t block = least > BLOCK_BYTES ? least : BLOCK_BYTES;

    (void)m;
    return mli_carve_size(all < block ? all : block, 1);
}

/* C (rows,cols) [+]= A (rows,k) times panels of q, for cols in the last of `panels` panels. */
static inline __attribute__((always_inline)) void
tile(const int rows, const int panels, float *C, int64_t ldc, const uint16_t *A, int64_t lda,
     const uint32_t *q, int64_t stride, int64_t k, int64_t cols, int accumulate)
{
    const __mmask16 last = (__mmask16)((1u << (cols - 16 * (panels - 1))) - 1u);
    __m512 s[ROWS * PANELS];
    int64_t i = 0;

#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int p = 0; p < panels; p++)
            s[r * panels + p] =
                accumulate ? _mm512_maskz_loadu_ps(p == panels - 1 ? last : (__mmask16)0xFFFF,
                                                   C + r * ldc + 16 * p)
                           : _mm512_setzero_ps();
    for (; i < k; i += 2, q += 16) {
        __m512bh b[PANELS];
#pragma GCC unroll 3
        for (int p = 0; p < panels; p++)
            b[p] = (__m512bh)_mm512_load_si512(q + p * stride);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            uint32_t pair = 0;
            __m512bh a;
            if (i + 1 < k)
                memcpy(&pair, A + r * lda + i, 4);
            else
                pair = A[r * lda + i]; /* an odd k: the other value is not there */
            a = (__m512bh)_mm512_set1_epi32((int)pair);
#pragma GCC unroll 3
            for (int p = 0; p < panels; p++)
                s[r * panels + p] = _mm512_dpbf16_ps(s[r * panels + p], a, b[p]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int p = 0; p < panels; p++)
            _mm512_mask_storeu_ps(C + r * ldc + 16 * p, p == panels - 1 ? last : (__mmask16)0xFFFF,
                                  s[r * panels + p]);
}

static inline __attribute__((always_inline)) void
column(const int panels, float *C, int64_t ldc, const uint16_t *A, int64_t lda, const uint32_t *q,
       int64_t stride, int64_t m, int64_t k, int64_t cols, int accumulate)
{
    int64_t i = 0;

    for (; i + ROWS <= m; i += ROWS)
        tile(ROWS, panels, C + i * ldc, ldc, A + i * lda, lda, q, stride, k, cols, accumulate);
    for (; i < m; i++)
        tile(1, panels, C + i * ldc, ldc, A + i * lda, lda, q, stride, k, cols, accumulate);
}

static void
gemm_bf16(int layout, float *C, int64_t ldc, const uint16_t *A, int64_t lda, const uint16_t *B,
          int64_t ldb, int64_t m, int64_t n, int64_t k, int accumulate, void *ws)
{
    const int64_t block = block_columns(n, k), stride = 16 * mli_pairs(k);
    uint32_t *q = ws;

    for (int64_t j0 = 0; j0 < n; j0 += block) {
        const int64_t wide = n - j0 < block ? n - j0 : block;
        if (layout == MLI_NN)
            mli_pack_nn__avx512(q, B + j0, ldb, wide, k);
        else
            mli_pack_nt__avx512(q, B + j0 * ldb, ldb, wide, k);
        for (int64_t i = 0; i == 0 || i < k; i += PIECE) {
            const int64_t deep = k - i < PIECE ? k - i : PIECE;
            for (int64_t j = 0; j < wide; j += 16 * PANELS) {
                const int64_t cols = wide - j < 16 * PANELS ? wide - j : 16 * PANELS;
                const uint32_t *b = q + j / 16 * stride + 8 * i;
                float *c = C + j0 + j;
                if (cols > 32)
                    column(3, c, ldc, A + i, lda, b, stride, m, deep, cols, accumulate || i > 0);
                else if (cols > 16)
                    column(2, c, ldc, A + i, lda, b, stride, m, deep, cols, accumulate || i > 0);
                else
                    column(1, c, ldc, A + i, lda, b, stride, m, deep, cols, accumulate || i > 0);
            }
        }
    }
}

int
mli_kernels_add_avx512bf16(mli_kernels *t)
{
    t->isa = "avx512bf16";
    t->gemm_bf16_ws = gemm_bf16_ws;
    t->gemm_bf16 = gemm_bf16;
    t->gemm_bf16_native = 1;
    return 1;
}

#else

int
mli_kernels_add_avx512bf16(mli_kernels *t)
{
    (void)t;
    return 0;
}

#endif
