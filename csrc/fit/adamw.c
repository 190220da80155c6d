/* AdamW on some arrays at once; the contract is that of molae_adamw_f32 in molae.h. */
#include <math.h>

#include "../base/mem.h"
#include "../base/par.h"
#include "../base/real.h"
#include "../kern/kern.h"

enum { BLOCK = 16384, LANES = 16 /* numbers of a task; partial sums of its norm */ };

/* A task: a block of an array, and the squares of its gradient. */
typedef struct {
    int64_t array, from;
    double squares;
} block;

static int64_t
count_blocks(const molae_adamw_array *arrays, int64_t count)
{
    int64_t n = 0;

    for (int64_t i = 0; i < count; i++)
        n += arrays[i].n > 0 ? (arrays[i].n + BLOCK - 1) / BLOCK : 0;
    return n;
}

static size_t
cut(block **blocks, char **p, int64_t n)
{
    size_t bytes = 0;

    MLI_CUT(bytes, p, *blocks, (size_t)n, sizeof(block));
    return bytes;
}

size_t
molae_adamw_ws(const molae_adamw_array *arrays, int64_t count)
{
    block *none;

    return cut(&none, NULL, count_blocks(arrays, count));
}

static molae_status
check(const molae_adamw_array *arrays, int64_t count, const molae_adamw *how, int64_t step,
      molae_errinfo *err)
{
    int good = how->decay >= 0 && how->eps > 0 && how->beta1 >= 0 && how->beta1 < 1 &&
               how->beta2 >= 0 && how->beta2 < 1 && how->max_norm >= 0;

    *err = (molae_errinfo){NULL, -1, -1, -1};
    for (int64_t i = 0; i < count; i++)
        good = good && arrays[i].n >= 0 && arrays[i].lr >= 0 && arrays[i].lr * how->decay <= 1;
    if (good && step >= 1)
        return MOLAE_OK;
    err->what = "adamw: expected n >= 0, step >= 1, lr, decay, max_norm >= 0, lr decay <= 1, "
                "eps > 0 and betas in [0, 1)";
    return MOLAE_E_ARG;
}

/* The norm of all gradients, once each block has its squares. */
static molae_status
sum_up(const block *blocks, int64_t n, double *norm, molae_errinfo *err)
{
    double sum = 0;

    for (int64_t i = 0; i < n; i++)
        sum += blocks[i].squares;
    *norm = sqrt(sum);
    if (isfinite(sum))
        return MOLAE_OK;
    err->what = "NaN or Inf in the gradient";
    for (int64_t i = 0; i < n && err->info < 0; i++)
        if (!isfinite(blocks[i].squares))
            err->info = blocks[i].array;
    return MOLAE_E_NONFINITE;
}

static double
squares_f32(const float *g, int64_t n)
{
    return mli_kernels_get()->f32_sumsq(g, n);
}

static double
squares_f64(const double *g, int64_t n)
{
    double lane[LANES] = {0};
    int64_t i = 0;

    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++)
            lane[j] += g[i + j] * g[i + j];
    for (int j = 0; i < n; i++, j++)
        lane[j] += g[i] * g[i];
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int j = 0; j < half; j++)
            lane[j] += lane[j + half];
    return lane[0];
}

#define REAL float
#define SFX f32
#define ADAMW adamw_f32
#include "adamw.inc.h"
#undef REAL
#undef SFX
#undef ADAMW

#define REAL double
#define SFX f64
#define ADAMW adamw_f64
#include "adamw.inc.h"
