#include "test.h"

#include "../../csrc/molae.h"

#include <math.h>
#include <string.h>

enum { N = 40001 };

/* Two steps by the formulas, in any number of threads; what is wrong is refused. */
void
test_adamw(void)
{
    static double w[N], m[N], v[N], g[N], first[N];
    const molae_adamw how = {0.01, 0.9, 0.99, 1e-8, 0.1};
    molae_adamw wrong = how;
    molae_errinfo err;

    for (int32_t threads = 1; threads <= 3; threads += 2) {
        const molae_ctx ctx = {threads, NULL};
        uint64_t seed = 3;
        double worst = 0;

        memset(m, 0, sizeof m);
        memset(v, 0, sizeof v);
        for (int i = 0; i < N; i++) {
            w[i] = test_random(&seed);
            g[i] = test_random(&seed);
        }
        for (int step = 1; step <= 2; step++)
            CHECK(molae_adamw_f64(&ctx, w, m, v, g, N, &how, step, 0.5, &err) == MOLAE_OK);
        seed = 3;
        for (int i = 0; i < N; i++) { /* a gradient that stays is its own mean */
            const double from = test_random(&seed), d = 0.5 * test_random(&seed);
            const double move = 0.01 * d / (fabs(d) + 1e-8);
            double want = from * (1 - 0.001) - move;
            want = want * (1 - 0.001) - move;
            worst = fmax(worst, fabs(w[i] - want));
        }
        CHECK(worst < 1e-12);
        if (threads == 1)
            memcpy(first, w, sizeof w);
        CHECK(memcmp(first, w, sizeof w) == 0);
    }
    {
        const molae_ctx ctx = {2, NULL};
        g[N - 2] = INFINITY;
        CHECK(molae_adamw_f64(&ctx, w, m, v, g, N, &how, 1, 1, &err) == MOLAE_E_NONFINITE);
        CHECK(err.info == N - 2);
        CHECK(molae_adamw_f64(&ctx, w, m, v, g, 4, &how, 1, NAN, &err) == MOLAE_E_NONFINITE);
        CHECK(molae_adamw_f64(&ctx, w, m, v, g, 4, &how, 0, 1, &err) == MOLAE_E_ARG);
        CHECK(molae_adamw_f64(&ctx, w, m, v, g, -1, &how, 1, 1, &err) == MOLAE_E_ARG);
        wrong.beta2 = 1;
        CHECK(molae_adamw_f64(&ctx, w, m, v, g, 4, &wrong, 1, 1, &err) == MOLAE_E_ARG);
        CHECK(molae_adamw_f64(&ctx, w, m, v, g, 0, &how, 1, 1, &err) == MOLAE_OK);
    }
}
