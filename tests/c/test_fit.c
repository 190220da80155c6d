/* csrc/fit with workspaces of exactly the size asked for, filled with NaN, so that a sanitizer sees
 * each byte beyond and each value read before it was written. */
#include "test.h"

#include "../../csrc/base/mem.h"
#include "../../csrc/base/real.h"
#include "../../csrc/kern/kern.h"
#include "../../csrc/molae.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_E = 6, MAX_G = 3 };

/* malloc, not mli_alloc: that one rounds up, and a sanitizer guards only what lies beyond. */
static void *
exact(size_t bytes)
{
    void *p = aligned_alloc(64, (bytes + 63) / 64 * 64);

    if (p != NULL)
        memset(p, 0xff, bytes); /* NaN in every type */
    return p;
}

static size_t
item(molae_dtype t)
{
    return t == MOLAE_F64 ? 8 : t == MOLAE_F32 ? 4 : 2;
}

static double
value(const void *a, molae_dtype t, int64_t i)
{
    float y;

    if (t == MOLAE_F64)
        return ((const double *)a)[i];
    if (t == MOLAE_F32)
        return (double)((const float *)a)[i];
    if (t == MOLAE_BF16)
        mli_kernels_get()->bf16_to_f32(&y, (const uint16_t *)a + i, 1);
    else
        mli_kernels_get()->f16_to_f32(&y, (const uint16_t *)a + i, 1);
    return (double)y;
}

static void
put(void *a, molae_dtype t, int64_t i, double x)
{
    float y = (float)x;

    if (t == MOLAE_F64)
        ((double *)a)[i] = x;
    else if (t == MOLAE_F32)
        ((float *)a)[i] = y;
    else if (t == MOLAE_BF16)
        mli_kernels_get()->f32_to_bf16((uint16_t *)a + i, &y, 1);
    else
        mli_kernels_get()->f32_to_f16((uint16_t *)a + i, &y, 1);
}

typedef struct {
    int64_t E, F, D, G, ptr[MAX_G + 1], rank[MAX_G];
    int64_t common; /* 0: general matrices; else all rows in a space of this dimension */
} plan;

typedef struct {
    molae_stack s;
    void *W[MAX_E], *shared[MAX_G], *private_[MAX_G];
    int32_t *perm[MAX_G], used_svd[MAX_G];
    double *spectrum, energy[MAX_E], residual[MAX_E];
    molae_factors out;
} run;

static void
run_new(run *r, const plan *p, molae_dtype t, molae_side side, molae_form form)
{
    uint64_t seed = 7;
    double *basis = exact((size_t)(p->common * p->D) * sizeof(double) + 64);

    *r = (run){0};
    for (int64_t i = 0; i < p->common * p->D; i++)
        basis[i] = test_random(&seed);
    for (int64_t e = 0; e < p->E; e++) {
        r->W[e] = exact((size_t)(p->F * p->D) * item(t));
        for (int64_t f = 0; f < p->F; f++) {
            double row[64] = {0}; /* D <= 64 here */
            for (int64_t c = 0; c < p->common; c++) {
                const double a = test_random(&seed);
                for (int64_t d = 0; d < p->D; d++)
                    row[d] += a * basis[c * p->D + d];
            }
            for (int64_t d = 0; d < p->D; d++) {
                const double x = p->common ? row[d] : test_random(&seed);
                put(r->W[e], t, side == MOLAE_SIDE_INPUT ? f * p->D + d : d * p->F + f, x);
            }
        }
    }
    free(basis);
    for (int64_t g = 0; g < p->G; g++) {
        const int64_t R = p->rank[g], k = p->ptr[g + 1] - p->ptr[g];
        const int64_t width = form == MOLAE_FORM_GAUGE ? p->D - R : p->D;
        r->shared[g] = exact((size_t)(R * width) * item(t));
        r->private_[g] = exact((size_t)(k * p->F * R) * item(t));
        r->perm[g] = exact((size_t)p->D * sizeof(int32_t));
    }
    r->spectrum = exact((size_t)(p->G * p->D) * sizeof(double));
    r->s = (molae_stack){p->E, p->F, p->D, t, side, (const void *const *)r->W, p->G, p->ptr};
    r->out = (molae_factors){r->shared,   form == MOLAE_FORM_GAUGE ? r->perm : NULL,
                             r->private_, r->spectrum,
                             r->energy,   r->residual,
                             r->used_svd};
}

static void
run_free(run *r)
{
    for (int i = 0; i < MAX_E; i++)
        free(r->W[i]);
    for (int g = 0; g < MAX_G; g++) {
        free(r->shared[g]);
        free(r->private_[g]);
        free(r->perm[g]);
    }
    free(r->spectrum);
}

static molae_status
factor(run *r, const int64_t *rank, molae_form form, int32_t threads, molae_errinfo *err)
{
    const molae_ctx ctx = {threads};
    const int wide = r->s.dtype == MOLAE_F64;
    const size_t n =
        wide ? molae_factor_ws_f64(&ctx, &r->s, rank) : molae_factor_ws_f32(&ctx, &r->s, rank);
    void *ws = exact(n);
    const molae_status rc =
        wide ? molae_factor_shared_f64(&ctx, &r->out, &r->s, rank, form, ws, n, err)
             : molae_factor_shared_f32(&ctx, &r->out, &r->s, rank, form, ws, n, err);

    free(ws);
    return rc;
}

/* ||X_e - A_e B||^2, entry by entry. */
static double
residual(const run *r, int64_t g, int64_t e, int64_t R, molae_form form)
{
    const molae_stack *s = &r->s;
    const int64_t D = s->D, F = s->F, i = e - s->group_ptr[g];
    double sum = 0, b[64];

    for (int64_t f = 0; f < F; f++) {
        memset(b, 0, sizeof b);
        for (int64_t j = 0; j < R; j++) {
            const int64_t at =
                s->side == MOLAE_SIDE_INPUT ? (i * F + f) * R + j : (i * R + j) * F + f;
            const double a = value(r->private_[g], s->dtype, at);
            if (form == MOLAE_FORM_GAUGE) {
                b[r->perm[g][j]] += a;
                for (int64_t c = R; c < D; c++)
                    b[r->perm[g][c]] += a * value(r->shared[g], s->dtype, j * (D - R) + c - R);
            } else {
                for (int64_t c = 0; c < D; c++)
                    b[c] += a * value(r->shared[g], s->dtype, j * D + c);
            }
        }
        for (int64_t d = 0; d < D; d++) {
            const double x =
                value(r->W[e], s->dtype, s->side == MOLAE_SIDE_INPUT ? f * D + d : d * F + f);
            sum += (x - b[d]) * (x - b[d]);
        }
    }
    return sum;
}

static void
check_factors(const plan *p, molae_dtype t, molae_side side, molae_form form, int svd)
{
    /* relative to the energy: storage roundoff squared, arithmetic roundoff */
    const double tol = t == MOLAE_F64 ? 1e-13 : t == MOLAE_F32 ? 1e-5 : 1e-4;
    molae_errinfo err = {0};
    run r;

    run_new(&r, p, t, side, form);
    CHECK(factor(&r, p->rank, form, 2, &err) == (svd ? MOLAE_W_PRECISION : MOLAE_OK));
    for (int64_t g = 0; g < p->G; g++) {
        double found = 0, best = 0, total = 0;
        CHECK(r.used_svd[g] == svd);
        for (int64_t j = 0; j < p->D; j++) {
            const double sigma = r.spectrum[g * p->D + j];
            total += sigma * sigma;
            best += j >= p->rank[g] ? sigma * sigma : 0;
        }
        for (int64_t e = p->ptr[g]; e < p->ptr[g + 1]; e++) {
            const double here = residual(&r, g, e, p->rank[g], form);
            CHECK(fabs(here - r.residual[e]) <= tol * r.energy[e]);
            found += here;
        }
        CHECK(fabs(found - best) <= tol * total);
    }
    run_free(&r);
}

static void
refusals(void)
{
    const plan p = {.E = 3, .F = 5, .D = 7, .G = 2, .ptr = {0, 2, 3}, .rank = {4, 2}};
    const int64_t too_large[] = {8, 2}, negative[] = {-1, 2};
    const int64_t broken[] = {0, 3, 3};
    molae_errinfo err = {0};
    run r;
    char small[64];
    const molae_ctx ctx = {1};

    run_new(&r, &p, MOLAE_F32, MOLAE_SIDE_INPUT, MOLAE_FORM_GAUGE);
    CHECK(factor(&r, too_large, MOLAE_FORM_GAUGE, 1, &err) == MOLAE_E_ARG && err.group == 0);
    CHECK(factor(&r, negative, MOLAE_FORM_GAUGE, 1, &err) == MOLAE_E_ARG);
    CHECK(molae_factor_shared_f32(&ctx, &r.out, &r.s, p.rank, MOLAE_FORM_GAUGE, small, 1, &err) ==
          MOLAE_E_ARG);
    r.s.group_ptr = broken;
    CHECK(factor(&r, p.rank, MOLAE_FORM_GAUGE, 1, &err) == MOLAE_E_SHAPE);
    r.s.group_ptr = p.ptr;
    ((float *)r.W[2])[11] = NAN;
    CHECK(factor(&r, p.rank, MOLAE_FORM_GAUGE, 2, &err) == MOLAE_E_NONFINITE && err.expert == 2);
    CHECK(factor(&r, NULL, MOLAE_FORM_PLAIN, 2, &err) == MOLAE_E_NONFINITE);
    run_free(&r);
}

static void
reductions(void)
{
    const plan shapes[] = {
        {.E = 2, .F = 9, .D = 14, .G = 1, .ptr = {0, 2}},
        {.E = 2, .F = 14, .D = 9, .G = 1, .ptr = {0, 2}},
        {.E = 2, .F = 12, .D = 16, .G = 1, .ptr = {0, 2}, .common = 3},
    };

    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const plan *p = &shapes[i];
        const molae_ctx ctx = {2};
        const int64_t R = p->common ? p->common : 4;
        molae_errinfo err = {0};
        int32_t used_svd[2];
        double *out = exact((size_t)(2 * p->F * p->D) * sizeof(double));
        size_t n;
        void *ws;
        molae_status rc;
        run r;

        run_new(&r, p, MOLAE_F64, MOLAE_SIDE_INPUT, MOLAE_FORM_PLAIN);
        n = molae_reduce_rank_ws_f64(&ctx, &r.s);
        ws = exact(n);
        rc = molae_reduce_rank_f64(&ctx, out, used_svd, &r.s, R, ws, n, &err);
        CHECK(rc == (p->common ? MOLAE_W_PRECISION : MOLAE_OK));
        for (int64_t e = 0; e < 2; e++) {
            double gap = 0, energy = 0, kept = 0;
            for (int64_t j = 0; j < p->F * p->D; j++) {
                const double x = ((double *)r.W[e])[j], y = out[e * p->F * p->D + j];
                gap += (x - y) * (x - y);
                energy += x * x;
                kept += y * y;
            }
            /* a projection: the parts are orthogonal; and exact where the rank is there */
            CHECK(fabs(gap + kept - energy) <= 1e-12 * energy);
            CHECK(p->common ? gap <= 1e-24 * energy : gap > 1e-3 * energy);
        }
        CHECK(molae_reduce_rank_f64(&ctx, out, used_svd, &r.s, 10, ws, n, &err) == MOLAE_E_ARG ||
              MLI_MIN(p->F, p->D) >= 10);
        free(ws);
        free(out);
        run_free(&r);
    }
}

static void
gauges(void)
{
    const double B[] = {0, 2, 1, 4, 0, 0}, same[] = {1, 2, 3, 2, 4, 6};
    double M[2];
    int32_t perm[3];
    molae_errinfo err = {0};
    const size_t n = molae_gauge_ws_f64(2, 3);
    void *ws = exact(n);

    CHECK(molae_gauge_f64(M, perm, B, 2, 3, ws, n, &err) == MOLAE_OK);
    CHECK(perm[0] == 0 && perm[1] == 1 && perm[2] == 2);
    CHECK(fabs(M[0]) < 1e-15 && fabs(M[1] - 0.5) < 1e-15);
    CHECK(molae_gauge_f64(M, perm, same, 2, 3, ws, n, &err) == MOLAE_E_ARG && err.what != NULL);
    CHECK(molae_gauge_f64(M, perm, B, 3, 2, ws, n, &err) == MOLAE_E_SHAPE);
    CHECK(molae_gauge_f64(M, perm, B, 2, 3, ws, 8, &err) == MOLAE_E_ARG);
    free(ws);
}

void
test_fit(void)
{
    const plan plans[] = {
        {.E = 1, .F = 1, .D = 2, .G = 1, .ptr = {0, 1}, .rank = {0}},
        {.E = 4, .F = 17, .D = 23, .G = 2, .ptr = {0, 2, 4}, .rank = {9, 5}},
        {.E = 6, .F = 131, .D = 64, .G = 3, .ptr = {0, 3, 4, 6}, .rank = {31, 1, 64}},
        {.E = 2, .F = 300, .D = 19, .G = 1, .ptr = {0, 2}, .rank = {7}},
        {.E = 2, .F = 6, .D = 40, .G = 1, .ptr = {0, 2}, .rank = {5}}, /* short: kF < D */
    };
    const plan low = {
        .E = 4, .F = 30, .D = 41, .G = 2, .ptr = {0, 3, 4}, .rank = {6, 6}, .common = 6};

    for (int t = MOLAE_F32; t <= MOLAE_BF16; t++)
        for (int side = 0; side < 2; side++)
            for (int form = 0; form < 2; form++)
                for (size_t i = 0; i < sizeof plans / sizeof *plans; i++)
                    check_factors(&plans[i], (molae_dtype)t, (molae_side)side, (molae_form)form, 0);
    check_factors(&low, MOLAE_F64, MOLAE_SIDE_INPUT, MOLAE_FORM_GAUGE, 1);
    check_factors(&low, MOLAE_F32, MOLAE_SIDE_OUTPUT, MOLAE_FORM_PLAIN, 1);
    refusals();
    reductions();
    gauges();
}
