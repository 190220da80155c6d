/* rows_f32, gauge_f32, gather_f32 and tn_f32 of a table (kern.h), for the vectors and TALL of the
 * includer. */
#include "rows_tile.inc.h"
#include "rows_turn.inc.h"

/* products */
#include "rows_small.inc.h"
#include "rows_nn.inc.h"
#include "rows_nt.inc.h"

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
