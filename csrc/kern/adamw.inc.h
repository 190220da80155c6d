/* A step of AdamW for one precision: included with REAL, SFX and LIBM set. Plain C, as act.inc.h.
 * Roots and quotients are rounded as IEEE 754 has it: every instruction set gives the same bits. */
#include "../base/real.h"

static void
FN(adamw)(REAL *restrict w, REAL *restrict m, REAL *restrict v, const REAL *restrict g, int64_t n,
          const mli_adamw_step *how)
{
    const REAL beta1 = (REAL)how->beta1, beta2 = (REAL)how->beta2, eps = (REAL)how->eps;
    const REAL rate = (REAL)how->rate, root = (REAL)how->root;
    const REAL keep = (REAL)how->keep, scale = (REAL)how->scale;

    for (int64_t i = 0; i < n; i++) {
        const REAL d = scale * g[i];
        m[i] = beta1 * m[i] + (1 - beta1) * d;
        v[i] = beta2 * v[i] + (1 - beta2) * d * d;
        w[i] = keep * w[i] - rate * m[i] / (LIBM(sqrt)(v[i]) * root + eps);
    }
}
