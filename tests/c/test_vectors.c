#include "test.h"

#include "../../csrc/molae.h"

#include <math.h>

enum { ROWS = 700, N = 37 };

/* Every row, from the last to the first, into b; and numbers that are out of range. */
static void
rows_by_number(const molae_ctx *ctx, const float *a, float *b)
{
    static int64_t index[ROWS];
    molae_errinfo err;
    int wrong = 0;

    for (int r = 0; r < ROWS; r++)
        index[r] = ROWS - 1 - r;
    CHECK(molae_take_rows(ctx, b, a, ROWS, index, ROWS, N * sizeof *a, &err) == MOLAE_OK);
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < N; i++)
            wrong += b[r * N + i] != a[index[r] * N + i];
    CHECK(wrong == 0);
    index[3] = ROWS;
    CHECK(molae_take_rows(ctx, b, a, ROWS, index, ROWS, N * sizeof *a, &err) == MOLAE_E_ARG);
    CHECK(err.info == 3);
    CHECK(molae_take_rows(ctx, b, a, -1, index, ROWS, N * sizeof *a, &err) == MOLAE_E_SHAPE);
}

/* Sums of every length, against plain ones; rows in any number of threads. */
void
test_vectors(void)
{
    static float a[ROWS * N], b[ROWS * N];
    static double first[ROWS], out[ROWS];
    uint64_t seed = 8;

    for (int i = 0; i < ROWS * N; i++) {
        a[i] = (float)test_random(&seed);
        b[i] = (float)test_random(&seed);
    }
    for (int n = 0; n < 70; n++) {
        double want = 0, size = 0;
        for (int i = 0; i < n; i++) {
            want += (double)a[i] * b[i];
            size += fabs((double)a[i] * b[i]);
        }
        CHECK(fabs(molae_dot_f32(a, b, n) - want) <= 1e-14 * size);
    }
    for (int32_t threads = 1; threads <= 3; threads += 2) {
        const molae_ctx ctx = {threads, NULL};
        CHECK(molae_row_lengths_f32(&ctx, out, a, ROWS, N) == MOLAE_OK);
        for (int r = 0; r < ROWS; r++) {
            CHECK(fabs(out[r] - molae_dot_f32(a + r * N, a + r * N, N)) <= 1e-14 * out[r]);
            if (threads == 1)
                first[r] = out[r];
            CHECK(out[r] == first[r]);
        }
        CHECK(molae_row_lengths_f32(&ctx, out, a, -1, N) == MOLAE_E_SHAPE);
        rows_by_number(&ctx, a, b);
    }
}
