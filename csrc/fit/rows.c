#include "rows.h"

#include <math.h>
#include <string.h>

#include "../base/real.h"
#include "../kern/kern.h"

size_t
mli_dtype_size(molae_dtype t)
{
    switch (t) {
    case MOLAE_F64:
        return 8;
    case MOLAE_F32:
        return 4;
    case MOLAE_F16:
    case MOLAE_BF16:
        return 2;
    }
    return 0;
}

int
mli_widen_f32(float *y, const void *x, molae_dtype t, int64_t at, int64_t n)
{
    const mli_kernels *kern = mli_kernels_get();

    switch (t) {
    case MOLAE_BF16:
        return kern->bf16_to_f32(y, (const uint16_t *)x + at, n);
    case MOLAE_F16:
        return kern->f16_to_f32(y, (const uint16_t *)x + at, n);
    case MOLAE_F32:
        return kern->f32_check(y, (const float *)x + at, n);
    case MOLAE_F64:
        break; /* f64 has functions of its own */
    }
    return 0;
}

int
mli_widen_f64(double *y, const void *x, molae_dtype t, int64_t at, int64_t n)
{
    const double *src = (const double *)x + at;
    float part[256];
    int finite = 1;

    if (t != MOLAE_F64) {
        for (int64_t i = 0; i < n; i += 256) {
            const int64_t m = MLI_MIN((int64_t)256, n - i);
            finite &= mli_widen_f32(part, x, t, at + i, m);
            for (int64_t j = 0; j < m; j++)
                y[i + j] = part[j];
        }
        return finite;
    }
    for (int64_t i = 0; i < n; i++) {
        y[i] = src[i];
        finite &= isfinite(src[i]) != 0;
    }
    return finite;
}

double
mli_sumsq_f32(const float *x, int64_t n)
{
    return mli_kernels_get()->f32_sumsq(x, n);
}

double
mli_sumsq_f64(const double *x, int64_t n)
{
    double sum[8] = {0};

    for (int64_t i = 0; i < n; i++)
        sum[i % 8] += x[i] * x[i];
    return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

int
mli_round_f32(void *dst, molae_dtype t, float *x, int64_t n)
{
    const mli_kernels *kern = mli_kernels_get();

    switch (t) {
    case MOLAE_BF16:
        kern->f32_to_bf16(dst, x, n);
        return kern->bf16_to_f32(x, dst, n);
    case MOLAE_F16:
        kern->f32_to_f16(dst, x, n);
        return kern->f16_to_f32(x, dst, n);
    case MOLAE_F32:
        return kern->f32_check(dst, x, n);
    case MOLAE_F64:
        break;
    }
    return 0;
}

int
mli_round_f64(void *dst, molae_dtype t, double *x, int64_t n)
{
    const size_t size = mli_dtype_size(t);
    float part[256];
    int finite = 1;

    if (t == MOLAE_F64)
        return mli_widen_f64(dst, x, t, 0, n);
    for (int64_t i = 0; i < n; i += 256) { /* to f32 first: rounded twice where t is narrower */
        const int64_t m = MLI_MIN((int64_t)256, n - i);
        for (int64_t j = 0; j < m; j++)
            part[j] = (float)x[i + j];
        finite &= mli_round_f32((char *)dst + (size_t)i * size, t, part, m);
        for (int64_t j = 0; j < m; j++)
            x[i + j] = part[j];
    }
    return finite;
}

#define REAL float
#define SFX f32
#include "rows.inc.h"
#undef REAL
#undef SFX

#define REAL double
#define SFX f64
#include "rows.inc.h"
