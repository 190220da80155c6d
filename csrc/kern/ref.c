/* Portable kernels: the definition of what the others compute, bit for bit where sums have a
 * fixed order (all but symv). */
#include "table.h"

#include <math.h>
#include <string.h>

#define REAL float
#define SFX f32__ref
#define LIBM(name) name##f
#define VECTOR_EXP 1
#include "act.inc.h"
#include "adamw.inc.h"
#undef REAL
#undef SFX
#undef LIBM
#undef VECTOR_EXP

#define REAL double
#define SFX f64__ref
#define LIBM(name) name
#define VECTOR_EXP 0
#include "act.inc.h"
#include "adamw.inc.h"
#undef REAL
#undef SFX

static inline uint32_t
bits_of(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static inline float
float_of(uint32_t u)
{
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

int
mli_bf16_to_f32__ref(float *y, const uint16_t *x, int64_t n)
{
    int finite = 1;
    for (int64_t i = 0; i < n; i++) {
        y[i] = float_of((uint32_t)x[i] << 16);
        finite &= (x[i] & 0x7F80u) != 0x7F80u;
    }
    return finite;
}

static inline float
widen_f16(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t exponent = (h >> 10) & 0x1Fu;
    uint32_t mantissa = h & 0x3FFu;

    if (exponent == 0x1Fu) /* Inf, or NaN made quiet as the hardware does */
        return float_of(sign | 0x7F800000u | (mantissa << 13) | (mantissa ? 0x400000u : 0u));
    if (exponent == 0) { /* mantissa * 2^-24 is exact */
        float v = (float)mantissa * 0x1p-24f;
        return float_of(sign | bits_of(v));
    }
    return float_of(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

int
mli_f16_to_f32__ref(float *y, const uint16_t *x, int64_t n)
{
    int finite = 1;
    for (int64_t i = 0; i < n; i++) {
        y[i] = widen_f16(x[i]);
        finite &= (x[i] & 0x7C00u) != 0x7C00u;
    }
    return finite;
}

int
mli_f32_check__ref(float *y, const float *x, int64_t n)
{
    int finite = 1;
    for (int64_t i = 0; i < n; i++) {
        uint32_t u = bits_of(x[i]);
        y[i] = float_of(u);
        finite &= (u & 0x7F800000u) != 0x7F800000u;
    }
    return finite;
}

void
mli_f32_to_bf16__ref(uint16_t *y, const float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        uint32_t u = bits_of(x[i]);
        if ((u & 0x7FFFFFFFu) > 0x7F800000u)
            y[i] = (uint16_t)((u >> 16) | 0x40u);
        else
            y[i] = (uint16_t)((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
    }
}

static inline uint16_t
narrow_f16(float x)
{
    uint32_t u = bits_of(x);
    uint32_t sign = (u >> 16) & 0x8000u;
    uint32_t magnitude = u & 0x7FFFFFFFu;

    if (magnitude > 0x7F800000u) /* NaN */
        return (uint16_t)(sign | 0x7E00u | ((magnitude >> 13) & 0x3FFu));
    if (magnitude >= 0x477FF000u) /* rounds to 2^16 or more: Inf */
        return (uint16_t)(sign | 0x7C00u);
    if (magnitude >= 0x38800000u) { /* normal: round the 13 bits that go */
        uint32_t v = magnitude - (112u << 23);
        return (uint16_t)(sign | ((v + 0xFFFu + ((v >> 13) & 1u)) >> 13));
    }
    /* Subnormal: the addition to 0.5 rounds to a multiple of 2^-24. */
    return (uint16_t)(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u));
}

void
mli_f32_to_f16__ref(uint16_t *y, const float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        y[i] = narrow_f16(x[i]);
}

static double
f32_sumsq__ref(const float *x, int64_t n)
{
    double s[16] = {0};
    int64_t i = 0;

    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++)
            s[j] += (double)x[i + j] * (double)x[i + j];
    return mli_sumsq_finish(s, x + i, n - i);
}

#define ISA __ref
#define VECTOR_BYTES 16
#define BAND 4
#define REAL float
#define SFX f32
#include "symv.inc.h"
#undef REAL
#undef SFX
#define REAL double
#define SFX f64
#include "symv.inc.h"

void
mli_kernels_fill_ref(mli_kernels *t)
{
    t->isa = "ref";
    t->bf16_to_f32 = mli_bf16_to_f32__ref;
    t->f16_to_f32 = mli_f16_to_f32__ref;
    t->f32_check = mli_f32_check__ref;
    t->f32_to_bf16 = mli_f32_to_bf16__ref;
    t->f32_to_f16 = mli_f32_to_f16__ref;
    t->f32_sumsq = f32_sumsq__ref;
    t->f32_symv = symv_f32__ref;
    t->f64_symv = symv_f64__ref;
    t->act_f32 = act_f32__ref;
    t->act_f64 = act_f64__ref;
    t->act_grad_f32 = act_grad_f32__ref;
    t->act_grad_f64 = act_grad_f64__ref;
    t->adamw_f32 = adamw_f32__ref;
    t->adamw_f64 = adamw_f64__ref;
}
