#include "test.h"

#include "../../csrc/base/mem.h"
#include "../../csrc/molae.h"

#include <math.h>
#include <string.h>

enum { E = 3, N = 21, ROWS = 9 };

/* U^T U is M + r I, and what is solved by it and multiplied by that is W again, from either side;
 * an expert without moments gives 0. */
static void
solves_are_undone(void)
{
    static double M[E * N * N], U[E * N * N], W[E * ROWS * N], out[E * ROWS * N],
        first[E * ROWS * N];
    const int64_t rows[E] = {ROWS, 1, 4}, square[E] = {N, N, N};
    const void *m[E], *root[E], *w[E];
    void *u[E], *o[E];
    const double ridge = 0.01;
    uint64_t seed = 5;
    molae_errinfo err;

    memset(M, 0, sizeof M);
    for (int e = 0; e < E - 1; e++)
        for (int t = 0; t < 2 * N; t++) {
            double x[N];
            for (int i = 0; i < N; i++)
                x[i] = test_random(&seed);
            for (int i = 0; i < N; i++)
                for (int j = 0; j < N; j++)
                    M[(e * N + i) * N + j] += x[i] * x[j];
        }
    for (int i = 0; i < E * ROWS * N; i++)
        W[i] = test_random(&seed);
    for (int e = 0; e < E; e++) {
        m[e] = M + e * N * N;
        root[e] = u[e] = U + e * N * N;
        w[e] = W + e * ROWS * N;
        o[e] = out + e * ROWS * N;
    }
    for (int32_t threads = 1; threads <= 3; threads += 2) {
        const molae_ctx ctx = {threads, NULL};
        const size_t need = molae_moments_product_ws(&ctx, MOLAE_MOMENTS_ROOT, E, square, N);
        void *ws = mli_alloc(need);
        CHECK(ws != NULL);
        CHECK(molae_moments_product(&ctx, MOLAE_MOMENTS_ROOT, 0, u, NULL, MOLAE_F64, m, MOLAE_F64,
                                    0, E, square, N, ws, need, &err) == MOLAE_E_ARG);
        CHECK(molae_moments_product(&ctx, MOLAE_MOMENTS_ROOT, 0, u, NULL, MOLAE_F64, m, MOLAE_F64,
                                    ridge, E, square, N, ws, need - 1, &err) == MOLAE_E_ARG);
        CHECK(molae_moments_product(&ctx, MOLAE_MOMENTS_ROOT, 0, u, NULL, MOLAE_F64, m, MOLAE_F64,
                                    ridge, E, square, N, ws, need, &err) == MOLAE_OK);
        mli_free(ws);
    }
    for (int left = 0; left < 2; left++) {
        for (int32_t threads = 1; threads <= 3; threads += 2) {
            const molae_ctx ctx = {threads, NULL};
            const size_t need = molae_moments_product_ws(&ctx, MOLAE_MOMENTS_SOLVE, E, rows, N);
            void *ws = mli_alloc(need);
            CHECK(ws != NULL);
            W[ROWS * N] = NAN; /* of expert 1 */
            CHECK(molae_moments_product(&ctx, MOLAE_MOMENTS_SOLVE, left, o, w, MOLAE_F64, root,
                                        MOLAE_F64, 0, E, rows, N, ws, need,
                                        &err) == MOLAE_E_NONFINITE &&
                  err.expert == 1);
            W[ROWS * N] = 0.5;
            CHECK(molae_moments_product(&ctx, MOLAE_MOMENTS_SOLVE, left, o, w, MOLAE_F64, root,
                                        MOLAE_F32, 0, E, rows, N, ws, need, &err) == MOLAE_E_ARG);
            CHECK(molae_moments_product(&ctx, MOLAE_MOMENTS_SOLVE, left, o, w, MOLAE_F64, root,
                                        MOLAE_F64, 0, E, rows, N, ws, need, &err) == MOLAE_OK);
            mli_free(ws);
            if (threads == 1)
                memcpy(first, out, sizeof out);
            CHECK(memcmp(first, out, sizeof out) == 0);
        }
        for (int e = 0; e < E; e++) {
            const int64_t step = left ? rows[e] : 1, line = left ? 1 : N;
            double trace = 0, worst = 0;
            for (int i = 0; i < N; i++)
                trace += M[(e * N + i) * N + i];
            for (int r = 0; r < rows[e]; r++)
                for (int j = 0; j < N; j++) {
                    const double *row = out + e * ROWS * N + r * line;
                    double sum = ridge * trace / N * row[j * step];
                    for (int i = 0; i < N; i++)
                        sum += row[i * step] * M[(e * N + i) * N + j];
                    sum -= e < E - 1 ? W[e * ROWS * N + r * line + j * step] : 0;
                    worst = fmax(worst, fabs(sum));
                }
            CHECK(worst < 1e-12);
            CHECK(e < E - 1 || out[e * ROWS * N] == 0);
        }
    }
    for (int i = 1; i < N; i++)
        CHECK(U[i * N] == 0);
}

/* Products from one side, and from both. */
static void
products_are_sums(void)
{
    static double M[E * N * N], W[E * ROWS * N], out[E * ROWS * N], both[E * ROWS * ROWS],
        behind[E * ROWS * N];
    const int64_t rows[E] = {ROWS, 0, 4};
    const void *m[E], *w[E];
    void *o[E], *p[E], *l[E];
    const molae_ctx ctx = {2, NULL};
    const size_t need = molae_moments_product_ws(&ctx, MOLAE_MOMENTS_PROJECT, E, rows, N);
    void *ws = mli_alloc(need);
    uint64_t seed = 7;
    molae_errinfo err;
    double worst = 0;

    for (int e = 0; e < E; e++)
        for (int i = 0; i < N; i++)
            for (int j = 0; j <= i; j++)
                M[(e * N + i) * N + j] = M[(e * N + j) * N + i] = test_random(&seed);
    for (int i = 0; i < E * ROWS * N; i++)
        W[i] = test_random(&seed);
    for (int e = 0; e < E; e++) {
        m[e] = M + e * N * N;
        w[e] = W + e * ROWS * N;
        o[e] = out + e * ROWS * N;
        p[e] = both + e * ROWS * ROWS;
        l[e] = behind + e * ROWS * N;
    }
    CHECK(ws != NULL);
    CHECK(molae_moments_product(&ctx, MOLAE_MOMENTS_TIMES, 0, o, w, MOLAE_F64, m, MOLAE_F64, 0, E,
                                rows, N, ws, need, &err) == MOLAE_OK);
    CHECK(molae_moments_product(&ctx, MOLAE_MOMENTS_TIMES, 1, l, w, MOLAE_F64, m, MOLAE_F64, 0, E,
                                rows, N, ws, need, &err) == MOLAE_OK);
    CHECK(molae_moments_product(&ctx, MOLAE_MOMENTS_PROJECT, 0, p, w, MOLAE_F64, m, MOLAE_F64, 0, E,
                                rows, N, ws, need, &err) == MOLAE_OK);
    CHECK(molae_moments_product(&ctx, MOLAE_MOMENTS_PROJECT, 1, p, w, MOLAE_F64, m, MOLAE_F64, 0, E,
                                rows, N, ws, need, &err) == MOLAE_E_ARG);
    CHECK(molae_moments_product(&ctx, MOLAE_MOMENTS_PROJECT, 0, p, w, MOLAE_F64, m, MOLAE_F64, 0, E,
                                rows, N, ws, need - 1, &err) == MOLAE_E_ARG);
    for (int e = 0; e < E; e++)
        for (int r = 0; r < rows[e]; r++) {
            double line[N];
            for (int j = 0; j < N; j++) {
                line[j] = 0;
                for (int i = 0; i < N; i++)
                    line[j] += W[(e * ROWS + r) * N + i] * M[(e * N + i) * N + j];
                worst = fmax(worst, fabs(line[j] - out[(e * ROWS + r) * N + j]));
            }
            for (int j = 0; j < N; j++) { /* W read as (N,rows) */
                double sum = 0;
                for (int i = 0; i < N; i++)
                    sum += M[(e * N + j) * N + i] * W[e * ROWS * N + i * rows[e] + r];
                worst = fmax(worst, fabs(sum - behind[e * ROWS * N + j * rows[e] + r]));
            }
            for (int s = 0; s < rows[e]; s++) {
                double sum = 0;
                for (int j = 0; j < N; j++)
                    sum += line[j] * W[(e * ROWS + s) * N + j];
                worst = fmax(worst, fabs(sum - both[e * ROWS * ROWS + r * rows[e] + s]));
            }
        }
    CHECK(worst < 1e-13 * N * N);
    mli_free(ws);
}

/* More numbers than a piece, in pieces of all threads, are those of single calls. */
static void
activations_of_many(void)
{
    enum { COUNT = 40001 };
    static double gate[COUNT], up[COUNT], h[COUNT], dgate[COUNT], dup[COUNT], alone[COUNT];
    const molae_ctx one = {1, NULL}, three = {3, NULL};
    uint64_t seed = 11;

    for (int i = 0; i < COUNT; i++) {
        gate[i] = 4 * test_random(&seed);
        up[i] = test_random(&seed);
    }
    CHECK(molae_activate_f64(&three, h, dgate, dup, gate, up, COUNT, MOLAE_ACT_SILU, 0, 0) ==
          MOLAE_OK);
    CHECK(molae_activate_f64(&one, alone, NULL, NULL, gate, up, COUNT, MOLAE_ACT_SILU, 0, 0) ==
          MOLAE_OK);
    CHECK(memcmp(alone, h, sizeof h) == 0);
    for (int i = 0; i < COUNT; i += 997) {
        const double s = 1 / (1 + exp(-gate[i]));
        CHECK(fabs(h[i] - gate[i] * s * up[i]) < 1e-14);
        CHECK(fabs(dup[i] - gate[i] * s) < 1e-14);
        CHECK(fabs(dgate[i] - up[i] * s * (1 + gate[i] * (1 - s))) < 1e-14);
    }
    CHECK(molae_activate_f64(&three, h, NULL, NULL, gate, up, 0, MOLAE_ACT_SILU, 0, 0) == MOLAE_OK);
}

void
test_solve(void)
{
    solves_are_undone();
    products_are_sums();
    activations_of_many();
}
