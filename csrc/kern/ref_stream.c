/* Portable products: streaming ones, and the bf16 matrix product that is made of them. */
#include "table.h"

#include "../base/mem.h"

#include <string.h>

enum { LANES = 16 };

static inline float
widen(uint16_t h)
{
    uint32_t u = (uint32_t)h << 16;
    float x;

    memcpy(&x, &u, sizeof x);
    return x;
}

#define REAL float
#define W float
#define WIDEN(w) (w)
#define NAME(f) f##_f32
#include "ref_stream.inc.h"
#undef W
#undef WIDEN
#undef NAME

#define W uint16_t
#define WIDEN(w) widen(w)
#define NAME(f) f##_bf16
#include "ref_stream.inc.h"
#undef REAL
#undef W
#undef WIDEN
#undef NAME

#define REAL double
#define W double
#define WIDEN(w) (w)
#define NAME(f) f##_f64
#include "ref_stream.inc.h"

static size_t
rows_f32_ws(int64_t N, int64_t k)
{
    (void)N;
    (void)k;
    return 0;
}

static void
rows_f32(int layout, float *Y, int64_t ldy, const float *X, int64_t ldx, const float *Wt,
         int64_t ldw, int64_t N, int64_t cols, int64_t k, int accumulate, void *ws)
{
    (void)ws;
    (layout == MLI_NN ? nn_f32 : nt_f32)(Y, ldy, X, ldx, Wt, ldw, N, cols, k, accumulate);
}

static size_t
gauge_f32_ws(int64_t N, int64_t D)
{
    (void)N;
    (void)D;
    return 0;
}

static void
gather_f32(float *X, int64_t ldx, const mli_rows_f32 *x, const int32_t *column, int64_t cols,
           void *ws)
{
    (void)ws;
    for (int64_t n = 0; n < x->N; n++)
        for (int64_t j = 0; j < cols; j++)
            X[n * ldx + j] = mli_row_f32(x, n)[column[j]];
}

void
mli_scatter_f32__ref(float *y, int64_t D, const int64_t *row, int64_t N, const float *own,
                     int64_t cols, const float *rest, const int32_t *column, void *ws)
{
    (void)ws;
    for (int64_t n = 0; n < N; n++, own += cols, rest += D - cols) {
        float *to = y + row[n] * D;
        for (int64_t j = 0; j < cols; j++)
            to[column[j]] += own[j];
        for (int64_t j = cols; j < D; j++)
            to[column[j]] += rest[j - cols];
    }
}

static void
gauge_f32(float *Z, int64_t ldz, const mli_rows_f32 *x, const int32_t *own, int64_t cols,
          const int32_t *rest, int64_t k, const float *M, int64_t ldm, void *ws)
{
    gather_f32(Z, ldz, x, own, cols, ws);
    for (int64_t n = 0; n < x->N; n++)
        for (int64_t j = 0; j < cols; j++)
            for (int64_t i = 0; i < k; i++)
                Z[n * ldz + j] += mli_row_f32(x, n)[rest[i]] * M[j * ldm + i];
}

static void
tn_f32(float *dW, int64_t ldw, const float *dY, int64_t ldy, const mli_rows_f32 *x, int64_t r,
       int64_t k, int accumulate)
{
    for (int64_t p = 0; p < r; p++)
        for (int64_t i = 0; i < k; i++) {
            float s = 0;
            for (int64_t n = 0; n < x->N; n++)
                s += dY[n * ldy + p] * mli_row_f32(x, n)[i];
            dW[p * ldw + i] = accumulate ? dW[p * ldw + i] + s : s;
        }
}

enum { GEMM_ROWS = 16 };

static size_t
gemm_bf16_ws(int64_t m, int64_t n, int64_t k)
{
    (void)m;
    (void)n;
    return mli_carve_size(mli_size_mul(GEMM_ROWS, (size_t)k), sizeof(float));
}

static void
gemm_bf16(int layout, float *C, int64_t ldc, const uint16_t *A, int64_t lda, const uint16_t *B,
          int64_t ldb, int64_t m, int64_t n, int64_t k, int accumulate, void *ws)
{
    float *a = ws;

    for (int64_t i = 0; i < m; i += GEMM_ROWS) {
        const int64_t rows = m - i < GEMM_ROWS ? m - i : GEMM_ROWS;
        for (int64_t j = 0; j < rows; j++)
            mli_bf16_to_f32__ref(a + j * k, A + (i + j) * lda, k);
        if (layout == MLI_NN)
            nn_bf16(C + i * ldc, ldc, a, k, B, ldb, rows, n, k, accumulate);
        else
            nt_bf16(C + i * ldc, ldc, a, k, B, ldb, rows, n, k, accumulate);
    }
}

void
mli_kernels_fill_ref_stream(mli_kernels *t)
{
    t->stream_nt_f32 = nt_f32;
    t->stream_nn_f32 = nn_f32;
    t->stream_nt_bf16 = nt_bf16;
    t->stream_nn_bf16 = nn_bf16;
    t->stream_nt_f64 = nt_f64;
    t->stream_nn_f64 = nn_f64;
    t->rows_f32_ws = rows_f32_ws;
    t->rows_f32 = rows_f32;
    t->rows_f32_native = 0;
    t->gauge_f32_ws = gauge_f32_ws;
    t->gather_f32 = gather_f32;
    t->scatter_f32 = mli_scatter_f32__ref;
    t->gauge_f32 = gauge_f32;
    t->tn_f32 = tn_f32;
    t->gemm_bf16_ws = gemm_bf16_ws;
    t->gemm_bf16 = gemm_bf16;
    t->gemm_bf16_native = 0;
}
