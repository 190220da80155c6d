/* Sums over long vectors, in an order that depends on their length alone; the contracts are those
 * of molae_dot_f32 and molae_row_lengths_f32 in molae.h. */
#include "../base/par.h"
#include "../base/real.h"
#include "../kern/kern.h"

enum { LANES = 16, ROWS = 256 /* of a task */ };

double
molae_dot_f32(const float *a, const float *b, int64_t n)
{
    double lane[LANES] = {0};
    int64_t i = 0;

    if (a == b)
        return mli_kernels_get()->f32_sumsq(a, n); /* the same order */
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++)
            lane[j] += (double)a[i + j] * (double)b[i + j];
    for (int j = 0; i < n; i++, j++)
        lane[j] += (double)a[i] * (double)b[i];
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int j = 0; j < half; j++)
            lane[j] += lane[j + half];
    return lane[0];
}

typedef struct {
    double *out;
    const float *x;
    int64_t rows, n;
} lengths;

static molae_status
lengths_task(void *arg, int64_t index, int32_t worker)
{
    const lengths *q = arg;
    const int64_t end = MLI_MIN((index + 1) * ROWS, q->rows);

    (void)worker;
    for (int64_t r = index * ROWS; r < end; r++)
        q->out[r] = mli_kernels_get()->f32_sumsq(q->x + r * q->n, q->n);
    return MOLAE_OK;
}

molae_status
molae_row_lengths_f32(const molae_ctx *ctx, double *out, const float *x, int64_t rows, int64_t n)
{
    lengths q = {out, x, rows, n};

    if (rows < 0 || n < 0)
        return MOLAE_E_SHAPE;
    return mli_parallel_for(ctx, (rows + ROWS - 1) / ROWS, lengths_task, &q);
}
