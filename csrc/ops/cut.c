#include "experts.h"

#include "../base/real.h"

int64_t
mli_lower_bound(const int64_t *a, int64_t lo, int64_t hi, int64_t value)
{
    while (lo < hi) {
        const int64_t mid = lo + (hi - lo) / 2;
        if (a[mid] < value)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

/* Step in which n is cut into the fewest parts of at most `most`, all but the last equal; a
 * multiple of `grain`, which divides `most`. */
static int64_t
even_step(int64_t n, int64_t most, int64_t grain)
{
    const int64_t parts = mli_ceil_div(n, most);

    return parts <= 1 ? most : mli_ceil_div(mli_ceil_div(n, parts), grain) * grain;
}

void
mli_pieces_cut(mli_pieces *list, mli_piece piece, int64_t rows, int64_t cols)
{
    const int64_t r1 = piece.r0 + piece.nr, c1 = piece.nc;

    rows = even_step(piece.nr, rows, MLI_STREAM_ROWS);
    cols = even_step(piece.nc, cols, MLI_FINE);
    for (int64_t r = piece.r0; r < r1; r += rows)
        for (int64_t c = 0; c < c1; c += cols) {
            piece.r0 = r;
            piece.nr = MLI_MIN(rows, r1 - r);
            piece.c0 = c;
            piece.nc = MLI_MIN(cols, c1 - c);
            mli_pieces_add(list, piece);
        }
}

int64_t
mli_pieces_room(const molae_experts *l, int64_t N, int64_t K)
{
    const int64_t G = MLI_MAX(MLI_MAX(l->gate.G, l->up.G), l->down.G);
    const int64_t units = l->E + G + MLI_ROLES; /* each may have one block that is not full */
    const int64_t rows = mli_ceil_div(N * K, MLI_ROWS) + mli_ceil_div(N, MLI_SCATTER);
    const int64_t spans = mli_ceil_div(N, MLI_SPAN);
    const int64_t cols = mli_ceil_div(MLI_MAX(l->D, l->F), MLI_FINE) + 1;

    return MLI_ROLES * (units * MLI_MAX(spans, 1) + rows) * cols;
}

int64_t
molae_projection_width(const molae_projection *p, int64_t K)
{
    int64_t sum = 0, most = 0;

    for (int64_t g = 0; g < p->G; g++)
        if (p->rank[g] > 0) {
            sum += p->rank[g];
            most = MLI_MAX(most, p->rank[g]);
        }
    return MLI_MIN(sum, most * K);
}

static molae_status
check_perm(const int32_t *perm, int64_t D)
{
    uint32_t largest = 0;

    for (int64_t j = 0; j < D; j++)
        largest = MLI_MAX(largest, (uint32_t)perm[j]);
    return (int64_t)largest < D ? MOLAE_OK : MOLAE_E_ARG;
}

static molae_status
check_projection(const molae_experts *l, const molae_projection *p, molae_dtype own,
                 molae_errinfo *err)
{
    err->what = "dtype: expected the arithmetic's own, or bfloat16 for float32";
    if (p->dtype != own && !(own == MOLAE_F32 && p->dtype == MOLAE_BF16))
        return MOLAE_E_ARG;
    err->what = "groups: expected G >= 1 groups with a rank each";
    if (p->G < 1 || p->rank == NULL || (p->group_of == NULL && p->G != 1))
        return MOLAE_E_SHAPE;
    for (int64_t g = 0; g < p->G; g++) {
        const int64_t R = p->rank[g];
        err->group = g;
        err->what = "rank: expected -1 (dense) or 0 <= R <= D";
        if (R < -1 || R > l->D)
            return MOLAE_E_ARG;
        if (R < 1)
            continue;
        err->what = "shared, perm: missing, or perm is not a permutation of 0 to D - 1";
        if (p->form == MOLAE_FORM_GAUGE) {
            if (p->perm == NULL || p->perm[g] == NULL || check_perm(p->perm[g], l->D) < 0)
                return MOLAE_E_ARG;
            if (R == l->D)
                continue;
        }
        if (p->shared == NULL || p->shared[g] == NULL)
            return MOLAE_E_ARG;
    }
    err->group = -1;
    for (int64_t e = 0; e < l->E; e++) {
        const int64_t g = mli_group(p, e);
        err->expert = e;
        err->what = "group_of: expected a group of 0 to G - 1";
        if (g < 0 || g >= p->G)
            return MOLAE_E_ARG;
        err->what = "private: missing";
        if (p->rank[g] != 0 && (p->private_ == NULL || p->private_[e] == NULL))
            return MOLAE_E_ARG;
    }
    err->expert = -1;
    err->what = NULL;
    return MOLAE_OK;
}

molae_status
mli_experts_check(const molae_experts *l, molae_dtype own, int64_t N, int64_t K, molae_errinfo *err)
{
    molae_status rc;

    *err = (molae_errinfo){NULL, -1, -1, -1};
    if (l->E < 1 || l->D < 1 || l->F < 1 || N < 0 || K < 1) {
        err->what = "expected E, D, F, K >= 1 and N >= 0";
        return MOLAE_E_SHAPE;
    }
    if (l->io != own && !(own == MOLAE_F32 && l->io == MOLAE_BF16)) {
        err->what = "x: expected the arithmetic's own dtype, or bfloat16 for float32";
        return MOLAE_E_ARG;
    }
    if (l->activation < MOLAE_ACT_SILU || l->activation > MOLAE_ACT_SWIGLU_CLAMPED) {
        err->what = "activation: not one of molae_activation";
        return MOLAE_E_ARG;
    }
    if (l->compressed.n != 0) {
        const molae_compressed *c = &l->compressed;
        err->what = "compressed experts: expected 0 to K - 1 of them, with vectors in the stride";
        if (c->n < 0 || c->n >= K || c->vectors == NULL || c->e2 < l->D ||
            c->e2 + l->F > c->stride || c->e3 < l->D || c->e3 + l->D > c->stride ||
            c->e2 + l->F > c->e3)
            return MOLAE_E_ARG;
        err->what =
            "compressed experts: expected the arithmetic's own dtype, or bfloat16 for float32";
        if (c->dtype != own && !(own == MOLAE_F32 && c->dtype == MOLAE_BF16))
            return MOLAE_E_ARG;
        err->what = NULL;
    }
    for (int role = 0; role < MLI_ROLES; role++) {
        rc = check_projection(l, mli_projection(l, role), own, err);
        if (rc < 0)
            return rc;
    }
    return MOLAE_OK;
}
