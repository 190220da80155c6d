/* Activations for one precision: included with REAL, SFX, LIBM and VECTOR_EXP set.
 *
 * Plain C without branches in the loops, so that the compiler vectorizes it with the flags of the
 * file that includes it. Products and sums are not contracted (-ffp-contract=off): every
 * instruction set gives the same bits. */
#include "../base/real.h"

#define INLINE static inline __attribute__((always_inline))

#if VECTOR_EXP
/* e^x for x <= 0, to 2 units in the last place: x = n ln 2 + r with |r| <= ln 2 / 2, the Taylor
 * series of degree 7 in r (its rest is 5e-9), and 2^n by its bits. x is held above -87.3, so that
 * 2^n is a normal number. NaN stays NaN. */
INLINE REAL
FN(exp)(REAL x)
{
    const REAL magic = 0x1.8p23f; /* adding it rounds to a whole number, in the low bits */
    REAL n, r, p, scale;
    int32_t bits;

    x = x < -87.3f ? -87.3f : x;
    n = x * 0x1.715476p+0f + magic;
    memcpy(&bits, &n, sizeof bits);
    n -= magic;
    r = x - n * 0x1.62e4p-1f; /* ln 2 in two parts; n times the first is exact */
    r = r - n * 0x1.7f7d1cp-20f;
    p = 0x1.a01a02p-13f;
    p = p * r + 0x1.6c16c2p-10f;
    p = p * r + 0x1.111112p-7f;
    p = p * r + 0x1.555556p-5f;
    p = p * r + 0x1.555556p-3f;
    p = p * r + 0.5f;
    p = p * r * r + r;
    bits = (int32_t)((uint32_t)bits << 23) + 0x3F800000;
    memcpy(&scale, &bits, sizeof scale);
    return p * scale + scale;
}
#else
INLINE REAL
FN(exp)(REAL x)
{
    return LIBM(exp)(x);
}
#endif

/* 1 / (1 + e^-x), from the exponential that does not overflow. */
INLINE REAL
FN(sigmoid)(REAL x)
{
    const REAL e = FN(exp)(-LIBM(fabs)(x));
    return (x < 0 ? e : (REAL)1) / (1 + e);
}

/* *a = act(g) and, for gradients, *da = act'(g). */
INLINE void
FN(gate_value)(molae_activation kind, REAL g, REAL alpha, REAL limit, REAL *a, REAL *da)
{
    const REAL c = (REAL)0.7978845608028653559; /* sqrt(2 / pi) */
    const REAL d = (REAL)0.044715;
    REAL s, t;

    switch (kind) {
    case MOLAE_ACT_SILU:
        s = FN(sigmoid)(g);
        *a = g * s;
        *da = s + g * (s * (1 - s));
        break;
    case MOLAE_ACT_GELU:
        s = (REAL)0.5 * LIBM(erfc)(-g * (REAL)0.7071067811865475244);
        *a = g * s;
        *da = s + g * ((REAL)0.3989422804014326779 * FN(exp)((REAL)-0.5 * g * g));
        break;
    case MOLAE_ACT_GELU_TANH: /* (1 + tanh v) / 2 = sigmoid(2 v) */
        s = FN(sigmoid)(2 * c * (g + d * g * g * g));
        *a = g * s;
        *da = s + g * (s * (1 - s)) * (2 * c * (1 + 3 * d * g * g));
        break;
    case MOLAE_ACT_RELU:
        *a = g < 0 ? 0 : g;
        *da = g > 0 ? 1 : 0;
        break;
    case MOLAE_ACT_RELU2:
        s = g < 0 ? 0 : g;
        *a = s * s;
        *da = 2 * s;
        break;
    case MOLAE_ACT_SWIGLU_CLAMPED:
        t = g > limit ? limit : g;
        s = FN(sigmoid)(alpha * t);
        *a = t * s;
        *da = g > limit ? 0 : s + t * (alpha * (s * (1 - s)));
        break;
    }
}

/* *b = what act(g) is multiplied with, and its derivative. */
INLINE void
FN(up_value)(molae_activation kind, REAL u, REAL limit, REAL *b, REAL *db)
{
    if (kind == MOLAE_ACT_SWIGLU_CLAMPED) {
        REAL t = u < -limit ? -limit : u;
        *db = t > limit || u < -limit ? 0 : 1;
        t = t > limit ? limit : t;
        *b = t + 1;
    } else {
        *b = u;
        *db = 1;
    }
}

INLINE void
FN(act_loop)(molae_activation kind, REAL *h, const REAL *gate, const REAL *up, int64_t n,
             REAL alpha, REAL limit)
{
    for (int64_t i = 0; i < n; i++) {
        REAL a, da, b, db;
        FN(gate_value)(kind, gate[i], alpha, limit, &a, &da);
        FN(up_value)(kind, up[i], limit, &b, &db);
        h[i] = a * b;
    }
}

/* Sixteen neighbours; the sums go to s[0 .. 15]. */
INLINE void
FN(act_grad_some)(molae_activation kind, REAL *restrict dgate, REAL *restrict dup,
                  REAL *restrict hw, const REAL *restrict dh, const REAL *restrict gate,
                  const REAL *restrict up, REAL w, int64_t n, REAL alpha, REAL limit,
                  REAL *restrict s)
{
    for (int64_t i = 0; i < n; i++) {
        REAL a, da, b, db, h;
        FN(gate_value)(kind, gate[i], alpha, limit, &a, &da);
        FN(up_value)(kind, up[i], limit, &b, &db);
        h = a * b;
        s[i] += dh[i] * h;
        hw[i] = w * h;
        dgate[i] = w * dh[i] * (da * b);
        dup[i] = w * dh[i] * (a * db);
    }
}

INLINE REAL
FN(act_grad_loop)(molae_activation kind, REAL *dgate, REAL *dup, REAL *hw, const REAL *dh,
                  const REAL *gate, const REAL *up, REAL w, int64_t n, REAL alpha, REAL limit)
{
    REAL s[16] = {0}, unused[16];
    int64_t i = 0;

    for (; i + 16 <= n; i += 16)
        FN(act_grad_some)(kind, dgate + i, dup + i, hw ? hw + i : unused, dh + i, gate + i, up + i,
                          w, 16, alpha, limit, s);
    FN(act_grad_some)(kind, dgate + i, dup + i, hw ? hw + i : unused, dh + i, gate + i, up + i, w,
                      n - i, alpha, limit, s);
    for (int half = 8; half > 0; half /= 2)
        for (int j = 0; j < half; j++)
            s[j] += s[j + half];
    return s[0];
}

/* A loop of its own for each kind. */
#define EACH_KIND(DO)                 \
    switch (act->kind) {              \
    case MOLAE_ACT_SILU:              \
        DO(MOLAE_ACT_SILU);           \
        break;                        \
    case MOLAE_ACT_GELU:              \
        DO(MOLAE_ACT_GELU);           \
        break;                        \
    case MOLAE_ACT_GELU_TANH:         \
        DO(MOLAE_ACT_GELU_TANH);      \
        break;                        \
    case MOLAE_ACT_RELU:              \
        DO(MOLAE_ACT_RELU);           \
        break;                        \
    case MOLAE_ACT_RELU2:             \
        DO(MOLAE_ACT_RELU2);          \
        break;                        \
    case MOLAE_ACT_SWIGLU_CLAMPED:    \
        DO(MOLAE_ACT_SWIGLU_CLAMPED); \
        break;                        \
    }

static void
FN(act)(REAL *h, const REAL *gate, const REAL *up, int64_t n, const mli_act *act)
{
    const REAL alpha = (REAL)act->alpha, limit = (REAL)act->limit;

#define DO(kind) FN(act_loop)(kind, h, gate, up, n, alpha, limit)
    EACH_KIND(DO)
#undef DO
}

static REAL
FN(act_grad)(REAL *dgate, REAL *dup, REAL *hw, const REAL *dh, const REAL *gate, const REAL *up,
             REAL w, int64_t n, const mli_act *act)
{
    const REAL alpha = (REAL)act->alpha, limit = (REAL)act->limit;
    REAL sum = 0;

#define DO(kind) sum = FN(act_grad_loop)(kind, dgate, dup, hw, dh, gate, up, w, n, alpha, limit)
    EACH_KIND(DO)
#undef DO
    return sum;
}

#undef INLINE
#undef EACH_KIND
