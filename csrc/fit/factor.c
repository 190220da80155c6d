#include <math.h>
#include <string.h>

#include "../base/blas.h"
#include "../base/mem.h"
#include "../base/par.h"
#include "../base/real.h"
#include "basis.h"
#include "eigen.h"
#include "gauge.h"
#include "rows.h"

/* Units of work: fixed by shape, never by the thread count. */
enum {
    LOAD_ROWS = 128, /* rows read by one task */
    LOADS = MLI_CHUNK / LOAD_ROWS,
    PANEL = 512,        /* rows of a Gram matrix computed by one task */
    PRIVATE_ROWS = 512, /* rows of A_i computed by one task */
};

static int64_t
ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

static molae_status
check_stack(const molae_stack *s, const int64_t *rank, molae_errinfo *err)
{
    err->expert = err->group = -1;
    err->what = "expected E, F, D >= 1 and G >= 1 groups";
    if (s->E < 1 || s->F < 1 || s->D < 1 || s->G < 1 || s->W == NULL || s->group_ptr == NULL)
        return MOLAE_E_SHAPE;
    err->what = "group_ptr: expected to rise from 0 to E, with no empty group";
    if (s->group_ptr[0] != 0 || s->group_ptr[s->G] != s->E)
        return MOLAE_E_SHAPE;
    for (int64_t g = 0; g < s->G; g++) {
        const int64_t k = s->group_ptr[g + 1] - s->group_ptr[g];
        err->group = g;
        if (k < 1)
            return MOLAE_E_SHAPE;
        if (rank != NULL && (rank[g] < 0 || rank[g] > MLI_MIN(k * s->F, s->D))) {
            err->what = "rank: expected 0 <= R <= min(k F, D)";
            return MOLAE_E_ARG;
        }
    }
    err->group = -1;
    err->what = NULL;
    return MOLAE_OK;
}

#define REAL float
#define SFX f32
#include "factor.inc.h"
#undef REAL
#undef SFX

#define REAL double
#define SFX f64
#include "factor.inc.h"
