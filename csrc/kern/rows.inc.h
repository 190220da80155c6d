/* rows_f32, gauge_f32, gather_f32, scatter_f32 and tn_f32 of a table (kern.h), for the vectors and
 * TALL of the includer. */
#include "rows_turn.inc.h"
#include "rows_tile.inc.h"

/* products */
#include "rows_small.inc.h"
#include "rows_nn.inc.h"
#include "rows_nt.inc.h"

/* See mli_kernels; ws takes a panel. */
static void
gather_f32(float *X, int64_t ldx, const mli_rows_f32 *x, const int32_t *column, int64_t cols,
           void *ws)
{
    /* As columns first, of which any follow any: no number is moved alone. */
    for (int64_t n = 0; n < x->N; n += VL) {
        turn(ws, x, n, x->D, NULL);
        turn_back(X + n * ldx, ldx, ws, x->N - n, column, cols);
    }
}

/* See mli_kernels; ws takes a panel. */
static void
scatter_f32(float *y, int64_t D, const int64_t *row, int64_t N, const float *own, int64_t cols,
            const float *rest, const int32_t *column, void *ws)
{
    const mli_rows_f32 a = {own, cols, N, NULL}, b = {rest, D - cols, N, NULL};
    int64_t n = 0;

    for (; N - n > VL / 4; n += VL) {
        turn(ws, &a, n, a.D, column);
        turn(ws, &b, n, b.D, column + cols);
        add_back(y, D, row + n, ws, N - n);
    }
    if (n < N) /* too few to be worth it */
        mli_scatter_f32__ref(y, D, row + n, N - n, own + n * a.D, cols, rest + n * b.D, column, ws);
}

static size_t
rows_f32_ws(int64_t N, int64_t k)
{
    const size_t a = nt_ws(N, k), b = nn_ws();

    return a > b ? a : b;
}

static void
rows_f32(int layout, float *Y, int64_t ldy, const float *X, int64_t ldx, const float *W,
         int64_t ldw, int64_t N, int64_t cols, int64_t k, int accumulate, void *ws)
{
    (layout == MLI_NN ? nn : nt)(Y, ldy, X, ldx, W, ldw, N, cols, k, accumulate, ws);
}

static void
add_rows(mli_kernels *t)
{
    t->rows_f32_ws = rows_f32_ws;
    t->rows_f32 = rows_f32;
    t->rows_f32_native = 1;
    t->gauge_f32_ws = gauge_ws;
    t->gather_f32 = gather_f32;
    t->scatter_f32 = scatter_f32;
    t->gauge_f32 = gauge_f32;
    t->tn_f32 = tn_f32;
}
