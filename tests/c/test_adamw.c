#include "test.h"

#include "../../csrc/molae.h"

#include <math.h>
#include <string.h>

enum { N = 40001, FIRST = 17000 };

/* Two steps by the formulas, on two arrays, in any number of threads; what is wrong is refused. */
void
test_adamw(void)
{
    static double w[N], m[N], v[N], g[N], first[N];
    static _Alignas(64) char ws[4096];
    const molae_adamw how = {0.9, 0.99, 1e-8, 0.1, 0};
    molae_adamw wrong = how;
    molae_adamw_array arrays[2] = {{w, m, v, g, FIRST, 0.01},
                                   {w + FIRST, m + FIRST, v + FIRST, g + FIRST, N - FIRST, 0.02}};
    double norm = 0;
    molae_errinfo err;

    CHECK(molae_adamw_ws(arrays, 2) <= sizeof ws);
    for (int32_t threads = 1; threads <= 3; threads += 2) {
        const molae_ctx ctx = {threads, NULL};
        uint64_t seed = 3;
        double worst = 0, sum = 0;

        memset(m, 0, sizeof m);
        memset(v, 0, sizeof v);
        for (int i = 0; i < N; i++) {
            w[i] = test_random(&seed);
            g[i] = test_random(&seed);
            sum += g[i] * g[i];
        }
        for (int step = 1; step <= 2; step++)
            CHECK(molae_adamw_f64(&ctx, &norm, arrays, 2, &how, step, ws, sizeof ws, &err) ==
                  MOLAE_OK);
        CHECK(fabs(norm - sqrt(sum)) < 1e-9 * norm);
        seed = 3;
        for (int i = 0; i < N; i++) { /* a gradient that stays is its own mean */
            const double from = test_random(&seed), d = test_random(&seed);
            const double rate = i < FIRST ? 0.01 : 0.02, move = rate * d / (fabs(d) + 1e-8);
            double want = from * (1 - rate * 0.1) - move;
            want = want * (1 - rate * 0.1) - move;
            worst = fmax(worst, fabs(w[i] - want));
        }
        CHECK(worst < 1e-12);
        if (threads == 1)
            memcpy(first, w, sizeof w);
        CHECK(memcmp(first, w, sizeof w) == 0);
    }
    {
        const molae_ctx ctx = {2, NULL};
#define STEP(how, step, bytes) molae_adamw_f64(&ctx, &norm, arrays, 2, how, step, ws, bytes, &err)
        g[N - 2] = INFINITY;
        CHECK(STEP(&how, 1, sizeof ws) == MOLAE_E_NONFINITE);
        CHECK(err.info == 1 && memcmp(first, w, sizeof w) == 0);
        CHECK(STEP(&how, 0, sizeof ws) == MOLAE_E_ARG);
        CHECK(STEP(&how, 1, 8) == MOLAE_E_ARG);
        wrong.beta2 = 1;
        CHECK(STEP(&wrong, 1, sizeof ws) == MOLAE_E_ARG);
        arrays[1].n = -1;
        CHECK(STEP(&how, 1, sizeof ws) == MOLAE_E_ARG);
        arrays[1].n = arrays[0].n = 0;
        CHECK(STEP(&how, 1, sizeof ws) == MOLAE_OK && norm == 0);
#undef STEP
    }
}
