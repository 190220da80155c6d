#include "test.h"

#include "../../csrc/base/mem.h"
#include "../../csrc/molae.h"

#include <math.h>
#include <string.h>

enum { E = 3, F = 9, D = 13, G = 2 };

static const int64_t group_ptr[] = {0, 2, 3};
static float weights[E * F * D], moments[E * D * D];
static const void *W[E], *C[E];

/* Expert 1 has no moments. */
static void
fill(int64_t width)
{
    uint64_t seed = 11;

    for (int i = 0; i < E * F * D; i++)
        weights[i] = (float)test_random(&seed) - 0.5f;
    memset(moments, 0, sizeof moments);
    for (int e = 0; e < E; e++) {
        W[e] = weights + e * F * D;
        C[e] = moments + e * width * width;
        for (int r = 0; e != 1 && r < 20; r++) {
            float x[D];
            for (int64_t i = 0; i < width; i++)
                x[i] = ((float)test_random(&seed) - 0.5f) / (float)(1 + i);
            for (int64_t i = 0; i < width; i++)
                for (int64_t j = 0; j < width; j++)
                    moments[(e * width + i) * width + j] += x[i] * x[j];
        }
    }
}

static void
every_rank(molae_side side, molae_form form)
{
    const int64_t width = side == MOLAE_SIDE_INPUT ? D : F;
    const molae_stack s = {E, F, D, MOLAE_F32, side, W, G, group_ptr};
    const molae_metric metric = {C, NULL, MOLAE_F32, 0.05, 1e-4};
    double before = INFINITY;

    fill(width);
    for (int64_t R = 0; R <= F; R++) {
        const int64_t rank[G] = {2 * R < D ? 2 * R : D, R};
        static float shared[G][D * D], private_[G][2 * F * D], again[G][2 * F * D];
        static int32_t perm[G][D];
        void *const sp[] = {shared[0], shared[1]}, *const pp[] = {private_[0], private_[1]};
        int32_t *const np[] = {perm[0], perm[1]};
        double spectrum[G * D], energy[E], residual[E], sum = 0;
        int32_t used_svd[G] = {0};
        const molae_factors out = {sp, np, pp, spectrum, energy, residual, used_svd};
        molae_errinfo err;
        for (int32_t threads = 1; threads <= 3; threads += 2) {
            const molae_ctx ctx = {threads, NULL};
            const size_t need = molae_factor_weighted_ws(&ctx, &s, &metric, rank);
            void *ws = mli_alloc(need);
            CHECK(molae_factor_weighted(&ctx, &out, &s, &metric, rank, form, ws, need - 1, &err) ==
                  MOLAE_E_ARG);
            CHECK(molae_factor_weighted(&ctx, &out, &s, &metric, rank, form, ws, need, &err) ==
                  MOLAE_OK);
            mli_free(ws);
            if (threads == 1)
                memcpy(again, private_, sizeof again);
        }
        CHECK(memcmp(again[1], private_[1], (size_t)(F * R) * sizeof(float)) == 0);
        for (int e = 0; e < E; e++) {
            CHECK(residual[e] >= -1e-9 * energy[e] && residual[e] <= energy[e] * (1 + 1e-9));
            sum += residual[e];
        }
        CHECK(side == MOLAE_SIDE_INPUT || sum <= before * (1 + 1e-6) + 1e-9);
        CHECK(R == 0 || spectrum[0] > 0);
        before = sum;
    }
}

/* A group given again at another rank has the spectrum and the energies of the first. */
static void
several_ranks(molae_side side)
{
    static const int64_t ptr[] = {0, 2, 4};
    const int64_t width = side == MOLAE_SIDE_INPUT ? D : F, rank[2] = {3, 8};
    const void *w[4], *c[4];
    const molae_stack s = {4, F, D, MOLAE_F32, side, w, 2, ptr};
    const molae_metric metric = {c, NULL, MOLAE_F32, 0.05, 1e-4};
    static float shared[2][D * D], private_[2][2 * F * D];
    static int32_t perm[2][D];
    void *const sp[] = {shared[0], shared[1]}, *const pp[] = {private_[0], private_[1]};
    int32_t *const np[] = {perm[0], perm[1]};
    double spectrum[2 * D], energy[4], residual[4];
    int32_t used_svd[2] = {0};
    const molae_factors out = {sp, np, pp, spectrum, energy, residual, used_svd};
    const molae_ctx ctx = {3, NULL};
    molae_errinfo err;
    size_t need;
    void *ws;

    fill(width);
    for (int e = 0; e < 4; e++) {
        w[e] = W[e % 2];
        c[e] = C[e % 2];
    }
    need = molae_factor_weighted_ws(&ctx, &s, &metric, rank);
    ws = mli_alloc(need);
    CHECK(molae_factor_weighted(&ctx, &out, &s, &metric, rank, MOLAE_FORM_GAUGE, ws, need, &err) ==
          MOLAE_OK);
    CHECK(memcmp(spectrum, spectrum + D, D * sizeof(double)) == 0);
    for (int e = 0; e < 2; e++) {
        CHECK(energy[e] == energy[e + 2]);
        CHECK(residual[e + 2] <= residual[e] * (1 + 1e-9));
    }
    mli_free(ws);
}

static void
refusals(void)
{
    const molae_stack s = {E, F, D, MOLAE_F32, MOLAE_SIDE_INPUT, W, G, group_ptr};
    const int64_t rank[G] = {14, 1};
    const molae_ctx ctx = {1, NULL};
    molae_metric metric = {C, NULL, MOLAE_F32, 0.05, 1e-4};
    const molae_factors out = {0};
    molae_errinfo err;

    CHECK(molae_factor_weighted_ws(&ctx, &s, &metric, rank) == 0);
    CHECK(molae_factor_weighted(&ctx, &out, &s, &metric, rank, MOLAE_FORM_PLAIN, NULL, 0, &err) ==
          MOLAE_E_ARG);
    CHECK(err.group == 0);
    metric.ridge = 0;
    CHECK(molae_factor_weighted(&ctx, &out, &s, &metric, NULL, MOLAE_FORM_PLAIN, NULL, 0, &err) ==
          MOLAE_E_ARG);
    CHECK(strstr(err.what, "ridge") != NULL);
}

void
test_weighted(void)
{
    every_rank(MOLAE_SIDE_INPUT, MOLAE_FORM_GAUGE);
    every_rank(MOLAE_SIDE_INPUT, MOLAE_FORM_PLAIN);
    every_rank(MOLAE_SIDE_OUTPUT, MOLAE_FORM_GAUGE);
    every_rank(MOLAE_SIDE_OUTPUT, MOLAE_FORM_PLAIN);
    several_ranks(MOLAE_SIDE_INPUT);
    several_ranks(MOLAE_SIDE_OUTPUT);
    refusals();
}
