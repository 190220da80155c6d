#include "product.h"

#include <string.h>

#include "../base/blas.h"
#include "../base/mem.h"
#include "../base/real.h"
#include "../kern/kern.h"

/* A tile of W: this many rows by this many columns. */
enum { TILE_ROWS = 256, TILE_COLS = 512 };

/* Rows from which a narrow nn product beats streaming, whose sums then fill the registers. */
enum { NARROW_FROM = 8 };

/* Up to so many rows and columns of dW BLAS has no advantage. */
enum { SMALL_TN = 256 };

size_t
mli_product_cut(mli_product_scratch *s, char **p, int f32, int bf16, int narrow, int64_t r,
                int64_t k)
{
    const mli_kernels *kern = mli_kernels_get();
    const int64_t most = MLI_MAX(r, k);
    size_t n = 0;

    s->narrow = narrow && kern->gemm_bf16_native;
    s->many = NULL;
    if ((f32 || bf16) && kern->rows_f32_native) { /* bf16: gathers alone */
        const int64_t rows = f32 ? MLI_MANY_ROWS_NT : 0;
        const size_t gauge = kern->gauge_f32_ws(rows, most), plain = kern->rows_f32_ws(rows, most);
        MLI_CUT(n, p, s->many, MLI_MAX(plain, gauge), 1);
    }
    if (bf16)
        MLI_CUT(n, p, s->tile, TILE_ROWS * TILE_COLS, sizeof(float));
    if (bf16 && s->narrow) {
        MLI_CUT(n, p, s->rows, mli_size_mul(MLI_PRODUCT_ROWS, (size_t)most), sizeof(uint16_t));
        MLI_CUT(n, p, s->work, kern->gemm_bf16_ws(MLI_PRODUCT_ROWS, most, most), 1);
    }
    return n;
}

/* Y (n,cols) [+]= X (n,k) rounded, times W of bf16. */
static void
narrow_product(int layout, float *Y, int64_t ldy, int add, const float *X, int64_t ldx,
               const uint16_t *W, int64_t ldw, int64_t n, int64_t cols, int64_t k,
               const mli_product_scratch *s)
{
    const mli_kernels *kern = mli_kernels_get();

    for (int64_t i = 0; i < n; i++)
        kern->f32_to_bf16(s->rows + i * k, X + i * ldx, k);
    kern->gemm_bf16(layout, Y, ldy, s->rows, k, W, ldw, n, cols, k, add, s->work);
}

/* tile (nr,nc) = W[r0 ..][c0 ..] widened. */
static void
widen_tile_f32(float *tile, const void *W, int64_t ldw, molae_dtype t, int64_t r0, int64_t nr,
               int64_t c0, int64_t nc)
{
    const mli_kernels *kern = mli_kernels_get();
    const uint16_t *w = mli_weight_at(W, t, ldw, r0, c0);

    if (nc == ldw) {
        (void)kern->bf16_to_f32(tile, w, nr * nc);
        return;
    }
    for (int64_t r = 0; r < nr; r++)
        (void)kern->bf16_to_f32(tile + r * nc, w + r * ldw, nc);
}

#define REAL float
#define SFX f32
#define OWN MOLAE_F32
#define NARROW_STORAGE 1
#define STREAM_NT stream_nt_f32
#define STREAM_NN stream_nn_f32
#define STREAM_UP_TO MLI_STREAM_ROWS
#include "product.inc.h"
#undef REAL
#undef SFX
#undef OWN
#undef NARROW_STORAGE
#undef STREAM_NT
#undef STREAM_NN
#undef STREAM_UP_TO

#define REAL double
#define SFX f64
#define OWN MOLAE_F64
#define NARROW_STORAGE 0
#define STREAM_NT stream_nt_f64
#define STREAM_NN stream_nn_f64
#define STREAM_UP_TO 0 /* plain C: BLAS is faster */
#include "product.inc.h"
