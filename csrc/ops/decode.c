/* Weights of a few bits as numbers; the contracts are in molae.h. */
#include "../base/par.h"
#include "../kern/kern.h"

#include <math.h>
#include <stddef.h>

enum {
    TASK_ROWS = 64, /* of a task */
    GROUP = 32,     /* MXFP4 values of a scale */
    LINE = 256      /* numbers that are rounded at once, a multiple of GROUP */
};

/* A matrix at work. value: what each byte, or each half of one, stands for. */
typedef struct {
    void *out;
    molae_dtype type;
    const uint8_t *w, *scales;
    const float *scale;
    int64_t rows, cols, block_rows, block_cols;
    float value[256];
} decoding;

/* Numbers j0 .. j0+n-1 of a row into y. */
static void
fp8_some(const decoding *q, int64_t row, int64_t j0, int64_t n, float *restrict y)
{
    const int64_t across = (q->cols + q->block_cols - 1) / q->block_cols;
    const float *scale = q->scale + row / q->block_rows * across;
    const uint8_t *w = q->w + row * q->cols + j0;

    for (int64_t j = 0; j < n;) {
        const int64_t block = (j0 + j) / q->block_cols, end = (block + 1) * q->block_cols - j0;
        const float s = scale[block];
        for (const int64_t stop = end < n ? end : n; j < stop; j++)
            y[j] = q->value[w[j]] * s;
    }
}

static void
mxfp4_some(const decoding *q, int64_t row, int64_t j0, int64_t n, float *restrict y)
{
    const uint8_t *w = q->w + (row * q->cols + j0) / 2;
    const uint8_t *scales = q->scales + (row * q->cols + j0) / GROUP;

    for (int64_t j = 0; j < n; j += GROUP) {
        const uint8_t e = scales[j / GROUP];
        const float s = e == 255 ? NAN : ldexpf(1, e - 127);
        for (int64_t b = j / 2; b < (j + GROUP) / 2; b++) {
            y[2 * b] = q->value[w[b] & 15] * s;
            y[2 * b + 1] = q->value[w[b] >> 4] * s;
        }
    }
}

/* Decodes some rows; where a result is not finite returns its place, else -1. */
static int64_t
decode_rows(const decoding *q, int64_t first, int64_t last)
{
    const mli_kernels *kern = mli_kernels_get();
    float line[LINE], back[LINE];

    for (int64_t i = first; i < last; i++)
        for (int64_t j0 = 0; j0 < q->cols; j0 += LINE) {
            const int64_t n = q->cols - j0 < LINE ? q->cols - j0 : LINE, at = i * q->cols + j0;
            int finite;
            if (q->scales != NULL)
                mxfp4_some(q, i, j0, n, line);
            else
                fp8_some(q, i, j0, n, line);
            if (q->type == MOLAE_BF16) {
                kern->f32_to_bf16((uint16_t *)q->out + at, line, n);
                finite = kern->bf16_to_f32(back, (const uint16_t *)q->out + at, n);
            } else {
                finite = kern->f32_check((float *)q->out + at, line, n);
            }
            for (int64_t j = 0; !finite && j < n; j++)
                if (!isfinite(q->type == MOLAE_BF16 ? back[j] : line[j]))
                    return at + j;
        }
    return -1;
}

static molae_status
decode_task(void *arg, int64_t index, int32_t worker)
{
    const decoding *q = arg;
    const int64_t first = index * TASK_ROWS, end = first + TASK_ROWS;

    (void)worker;
    return decode_rows(q, first, end < q->rows ? end : q->rows) < 0 ? MOLAE_OK : MOLAE_E_NONFINITE;
}

/* The arguments were checked. */
static molae_status
decode(const molae_ctx *ctx, decoding *q, molae_errinfo *err)
{
    const int64_t tasks = (q->rows + TASK_ROWS - 1) / TASK_ROWS;
    const molae_status rc = mli_parallel_for(ctx, tasks, decode_task, q);

    if (rc == MOLAE_E_NONFINITE) { /* the first of all, whatever the threads have met */
        err->what = "NaN or Inf in the weights";
        err->info = decode_rows(q, 0, q->rows);
    }
    return rc;
}

static molae_status
check(const decoding *q, molae_errinfo *err)
{
    *err = (molae_errinfo){.expert = -1, .group = -1, .info = -1};
    if (q->type != MOLAE_F32 && q->type != MOLAE_BF16) {
        err->what = "type: expected float32 or bfloat16";
        return MOLAE_E_ARG;
    }
    if (q->rows < 0 || q->cols < 0 || q->block_rows < 1 || q->block_cols < 1) {
        err->what = "w: expected sizes of 0 and more, and blocks of 1 and more";
        return MOLAE_E_SHAPE;
    }
    return MOLAE_OK;
}

molae_status
molae_decode_fp8(const molae_ctx *ctx, void *out, molae_dtype type, const uint8_t *w,
                 const float *scale, int64_t rows, int64_t cols, int64_t block_rows,
                 int64_t block_cols, molae_errinfo *err)
{
    decoding q = {.out = out, .type = type, .w = w, .scale = scale, .rows = rows, .cols = cols};
    molae_status rc;

    q.block_rows = block_rows;
    q.block_cols = block_cols;
    rc = check(&q, err);
    if (rc < 0)
        return rc;
    for (int i = 0; i < 128; i++) { /* (8 + m) 2^(e - 10), without the hidden bit where e is 0 */
        const int e = i >> 3, m = i & 7;
        const float v = e ? ldexpf((float)(8 + m), e - 10) : ldexpf((float)m, -9);
        q.value[i] = i == 127 ? NAN : v;
        q.value[i + 128] = -q.value[i];
    }
    return decode(ctx, &q, err);
}

molae_status
molae_decode_mxfp4(const molae_ctx *ctx, void *out, molae_dtype type, const uint8_t *blocks,
                   const uint8_t *scales, int64_t rows, int64_t groups, molae_errinfo *err)
{
    static const float value[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
    decoding q = {.out = out, .type = type, .w = blocks, .scales = scales, .rows = rows};
    molae_status rc;

    q.cols = GROUP * groups;
    q.block_rows = q.block_cols = 1;
    rc = check(&q, err);
    if (rc < 0)
        return rc;
    for (int i = 0; i < 8; i++) {
        q.value[i] = value[i];
        q.value[i + 8] = -value[i];
    }
    return decode(ctx, &q, err);
}
