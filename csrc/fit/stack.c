#include "stack.h"

#include "../base/real.h"

molae_status
mli_stack_check(const molae_stack *s, const int64_t *rank, molae_errinfo *err)
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
