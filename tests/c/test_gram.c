#include "test.h"

#include "../../csrc/base/mem.h"
#include "../../csrc/molae.h"

#include <math.h>
#include <string.h>

enum { N = 300, K = 3, E = 4, W = 37, SLOTS = N * K };

static double x[SLOTS * W], weight[SLOTS];
static float xf[SLOTS * W], weightf[SLOTS];
static int64_t route[SLOTS];

/* Expert 1 gets one token in eight, expert 2 none, the sentinel some. */
static void
fill(void)
{
    uint64_t seed = 7;

    for (int i = 0; i < SLOTS * W; i++)
        xf[i] = (float)(x[i] = (double)(float)test_random(&seed));
    for (int i = 0; i < SLOTS; i++) {
        weightf[i] = (float)(weight[i] = (double)(float)test_random(&seed));
        route[i] = i % 8 == 0 ? 1 : i % 5 == 0 ? E : i % 2 == 0 ? 3 : 0;
    }
}

/* How far C is from the definition, over the largest sum. */
static double
off(const double *C, int e, int per_slot)
{
    double worst = 0, top = 1e-300;

    for (int i = 0; i < W; i++)
        for (int j = 0; j < W; j++) {
            double sum = 0;
            for (int s = 0; s < SLOTS; s++)
                if (route[s] == e) {
                    const double *row = x + (per_slot ? s : s / K) * W;
                    sum += weight[s] * weight[s] * row[i] * row[j];
                }
            worst = fmax(worst, fabs(sum - C[i * W + j]));
            top = fmax(top, fabs(sum));
        }
    return worst / top;
}

static void
against_the_definition(int per_slot)
{
    static double C[E * W * W], wide[W * W];
    static float Cf[E * W * W], again[E * W * W];
    double mass[E] = {0}, massf[E] = {0};
    int64_t count[E] = {0}, countf[E] = {0};
    molae_errinfo err;

    memset(C, 0, sizeof C);
    for (int32_t threads = 1; threads <= 3; threads += 2) {
        const molae_ctx ctx = {threads, NULL};
        const size_t need = molae_second_moments_ws_f32(&ctx, N, K, E, W);
        void *ws = mli_alloc(need);
        memset(Cf, 0, sizeof Cf);
        CHECK(molae_second_moments_f32(&ctx, Cf, massf, countf, xf, MOLAE_F32, per_slot, route,
                                       weightf, N, K, E, W, ws, need, &err) == MOLAE_OK);
        mli_free(ws);
        if (threads == 1)
            memcpy(again, Cf, sizeof Cf);
    }
    CHECK(memcmp(again, Cf, sizeof Cf) == 0);
    {
        const molae_ctx ctx = {2, NULL};
        const size_t need = molae_second_moments_ws_f64(&ctx, N, K, E, W);
        void *ws = mli_alloc(need);
        CHECK(molae_second_moments_f64(&ctx, C, mass, count, x, MOLAE_F64, per_slot, route, weight,
                                       N, K, E, W, ws, need - 1, &err) == MOLAE_E_ARG);
        CHECK(molae_second_moments_f64(&ctx, C, mass, count, x, MOLAE_F64, per_slot, route, weight,
                                       N, K, E, W, ws, need, &err) == MOLAE_OK);
        mli_free(ws);
    }
    for (int e = 0; e < E; e++) {
        for (int i = 0; i < W * W; i++)
            wide[i] = (double)Cf[e * W * W + i];
        CHECK(off(C + e * W * W, e, per_slot) < 1e-13);
        CHECK(off(wide, e, per_slot) < 1e-5);
        CHECK(countf[e] == 2 * count[e]); /* two calls added to it */
        CHECK(fabs(massf[e] - 2 * mass[e]) <= 1e-12 * mass[e]);
    }
    CHECK(count[2] == 0 && mass[2] == 0 && count[1] == (SLOTS + 7) / 8);
    C[0] *= 1.001; /* the check tells a wrong answer */
    CHECK(off(C, 0, per_slot) > 1e-5);
}

static void
refusals(void)
{
    static float C[E * W * W];
    double mass[E] = {0};
    int64_t count[E] = {0};
    const molae_ctx ctx = {2, NULL};
    const size_t need = molae_second_moments_ws_f32(&ctx, N, K, E, W);
    void *ws = mli_alloc(need);
    molae_errinfo err;
    const float was = xf[17 * W + 5], weight_was = weightf[21];

    xf[17 * W + 5] = NAN;
    CHECK(molae_second_moments_f32(&ctx, C, mass, count, xf, MOLAE_F32, 0, route, weightf, N, K, E,
                                   W, ws, need, &err) == MOLAE_E_NONFINITE);
    CHECK(err.info == 17);
    xf[17 * W + 5] = was;
    weightf[21] = INFINITY;
    CHECK(molae_second_moments_f32(&ctx, C, mass, count, xf, MOLAE_F32, 0, route, weightf, N, K, E,
                                   W, ws, need, &err) == MOLAE_E_NONFINITE);
    CHECK(err.info == 21);
    weightf[21] = weight_was;
    route[4] = E + 1;
    CHECK(molae_second_moments_f32(&ctx, C, mass, count, xf, MOLAE_F32, 0, route, weightf, N, K, E,
                                   W, ws, need, &err) == MOLAE_E_ARG);
    route[4] = 3;
    CHECK(molae_second_moments_f32(&ctx, C, mass, count, xf, MOLAE_F32, 0, route, weightf, N, K, E,
                                   0, ws, need, &err) == MOLAE_E_SHAPE);
    for (int i = 0; i < E * W * W; i++)
        if (C[i] != 0)
            mass[0] = 1;
    CHECK(mass[0] == 0 && count[0] == 0); /* nothing was added */
    CHECK(molae_second_moments_f32(&ctx, C, mass, count, xf, MOLAE_F32, 0, route, weightf, 0, K, E,
                                   W, ws, need, &err) == MOLAE_OK);
    mli_free(ws);
}

void
test_gram(void)
{
    fill();
    against_the_definition(0);
    against_the_definition(1);
    refusals();
}
