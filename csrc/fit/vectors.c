/* Sums over long vectors, in an order that depends on their length alone, and rows by number; the
 * contracts are those of molae_dot_f32, molae_row_lengths_f32 and molae_take_rows in molae.h. */
#include <string.h>

#include "../base/par.h"
#include "../base/real.h"
#include "../kern/kern.h"

enum {
    LANES = 16,
    ROWS = 256,   /* of a task */
    TAKEN = 64,   /* the same, of rows by number */
    AHEAD = 4,    /* rows that are asked for before their turn */
    ASKED = 1024, /* bytes of each; the rest is found by itself */
    LINE = 64
};

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

typedef struct {
    char *out;
    const char *src;
    const int64_t *index;
    int64_t n, bytes;
} taking;

static molae_status
take_task(void *arg, int64_t task, int32_t worker)
{
    const taking *q = arg;
    const int64_t first = task * TAKEN, last = MLI_MIN(first + TAKEN, q->n);
    const int64_t asked = MLI_MIN(q->bytes, (int64_t)ASKED);

    (void)worker;
    for (int64_t i = first; i < last; i++) {
        const char *next = q->src + q->index[MLI_MIN(i + AHEAD, last - 1)] * q->bytes;
        for (int64_t at = 0; at < asked; at += LINE)
            __builtin_prefetch(next + at);
        memcpy(q->out + i * q->bytes, q->src + q->index[i] * q->bytes, (size_t)q->bytes);
    }
    return MOLAE_OK;
}

molae_status
molae_take_rows(const molae_ctx *ctx, void *out, const void *src, int64_t rows,
                const int64_t *index, int64_t n, int64_t bytes, molae_errinfo *err)
{
    taking q = {out, src, index, n, bytes};

    *err = (molae_errinfo){NULL, -1, -1, -1};
    if (rows < 0 || n < 0 || bytes < 0) {
        err->what = "take_rows: a size is negative";
        return MOLAE_E_SHAPE;
    }
    for (int64_t i = 0; i < n; i++)
        if (index[i] < 0 || index[i] >= rows) {
            err->what = "index: out of range";
            err->info = i;
            return MOLAE_E_ARG;
        }
    if (bytes == 0)
        return MOLAE_OK;
    return mli_parallel_for(ctx, (n + TAKEN - 1) / TAKEN, take_task, &q);
}
