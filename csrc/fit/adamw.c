/* AdamW on numbers that lie behind each other; the contract is that of molae_adamw_f32 in molae.h.
 */
#include <math.h>

#include "../base/par.h"
#include "../base/real.h"

enum { BLOCK = 16384 }; /* numbers of a task */

static molae_status
check(int64_t n, const molae_adamw *how, int64_t step, double scale, molae_errinfo *err)
{
    const int good = how->lr >= 0 && how->decay >= 0 && how->lr * how->decay <= 1 && how->eps > 0 &&
                     how->beta1 >= 0 && how->beta1 < 1 && how->beta2 >= 0 && how->beta2 < 1;

    *err = (molae_errinfo){NULL, -1, -1, -1};
    if (n < 0 || step < 1 || !good) {
        err->what = "adamw: expected n >= 0, step >= 1, lr, decay >= 0, lr decay <= 1, eps > 0 and "
                    "betas in [0, 1)";
        return MOLAE_E_ARG;
    }
    if (!isfinite(scale)) {
        err->what = "adamw: scale is not finite";
        return MOLAE_E_NONFINITE;
    }
    return MOLAE_OK;
}

#define REAL float
#define SFX f32
#define SQRT sqrtf
#include "adamw.inc.h"
#undef REAL
#undef SFX
#undef SQRT

#define REAL double
#define SFX f64
#define SQRT sqrt
#include "adamw.inc.h"
