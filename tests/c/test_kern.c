#include "test.h"

#include "../../csrc/base/mem.h"
#include "../../csrc/kern/kern.h"

#include <math.h>
#include <string.h>

static const int64_t sizes[] = {0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 61, 257};
static const char *const isas[] = {"ref", "avx2", "avx512", "avx512bf16", "amx"};

static uint32_t
bits(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static float
from_bits(uint32_t u)
{
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

/* Every 16-bit pattern through both wideners, in pieces of 37 so that tails are met. */
static void
widen(const mli_kernels *t, const mli_kernels *ref)
{
    static uint16_t x[65536];
    static float y[65536], z[65536];

    for (int i = 0; i < 65536; i++)
        x[i] = (uint16_t)i;
    for (int i = 0; i < 65536; i += 37) {
        int64_t n = i + 37 <= 65536 ? 37 : 65536 - i;
        CHECK(t->bf16_to_f32(y + i, x + i, n) == ref->bf16_to_f32(z + i, x + i, n));
    }
    CHECK(memcmp(y, z, sizeof y) == 0);
    for (int i = 0; i < 65536; i += 37) {
        int64_t n = i + 37 <= 65536 ? 37 : 65536 - i;
        CHECK(t->f16_to_f32(y + i, x + i, n) == ref->f16_to_f32(z + i, x + i, n));
    }
    CHECK(memcmp(y, z, sizeof y) == 0);
}

/* Floats around every rounding boundary of both 16-bit types, and what was widened back. */
static void
narrow(const mli_kernels *t, const mli_kernels *ref)
{
    enum { N = 65536 * 3 };
    float *x = mli_alloc(N * sizeof *x);
    uint16_t *y = mli_alloc(N * sizeof *y), *z = mli_alloc(N * sizeof *z);
    const uint32_t low[3] = {0x7FFF, 0x8000, 0x8001};

    for (uint32_t i = 0; i < 65536; i++)
        for (uint32_t k = 0; k < 3; k++)
            x[3 * i + k] = from_bits(i << 16 | low[k]);
    t->f32_to_bf16(y, x, N);
    ref->f32_to_bf16(z, x, N);
    CHECK(memcmp(y, z, N * sizeof *y) == 0);
    t->f32_to_f16(y, x, N);
    ref->f32_to_f16(z, x, N);
    CHECK(memcmp(y, z, N * sizeof *y) == 0);
    for (uint32_t i = 0; i < 65536; i++) {
        uint16_t h = (uint16_t)i;
        float v;
        ref->f16_to_f32(&v, &h, 1);
        x[3 * i] = v;
        x[3 * i + 1] = from_bits(bits(v) + 0x1000u); /* half way to the next */
        x[3 * i + 2] = from_bits(bits(v) + 0x1001u);
        if (v - v == 0.0f) { /* finite values come back as they were */
            uint16_t back;
            t->f32_to_f16(&back, &v, 1);
            CHECK(back == h);
        }
    }
    t->f32_to_f16(y, x, N);
    ref->f32_to_f16(z, x, N);
    CHECK(memcmp(y, z, N * sizeof *y) == 0);
    mli_free(x);
    mli_free(y);
    mli_free(z);
}

static void
check_and_sum(const mli_kernels *t, const mli_kernels *ref)
{
    float x[257], y[257];
    uint64_t seed = 11;

    for (int i = 0; i < 257; i++)
        x[i] = (float)test_random(&seed);
    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
        int64_t n = sizes[k];
        double a = t->f32_sumsq(x, n), b = ref->f32_sumsq(x, n), plain = 0;
        CHECK(memcmp(&a, &b, sizeof a) == 0);
        for (int64_t i = 0; i < n; i++)
            plain += (double)x[i] * (double)x[i];
        CHECK(fabs(a - plain) <= 1e-14 * (double)(n + 1));
        memset(y, 0, sizeof y);
        CHECK(t->f32_check(y, x, n) == 1);
        CHECK(memcmp(x, y, (size_t)n * sizeof *x) == 0);
        CHECK(n == 257 || y[n] == 0.0f); /* nothing is written past the end */
        for (int64_t i = 0; i < n; i++) {
            float keep = x[i];
            x[i] = i % 2 ? INFINITY : NAN;
            CHECK(t->f32_check(y, x, n) == 0); /* wherever it stands */
            x[i] = keep;
        }
    }
}

static void
by_hand(const mli_kernels *t)
{
    const float x[] = {1.0f, -2.5f, 65504.0f, 65520.0f, 0x1p-24f, 0x1p-25f, 0x1.8p-25f, -0.0f};
    const uint16_t f16[] = {0x3C00, 0xC100, 0x7BFF, 0x7C00, 0x0001, 0x0000, 0x0001, 0x8000};
    const float b[] = {1.0f, 0x1.01p0f, 0x1.03p0f, 0x1.fffp127f, 3.3895314e38f, INFINITY};
    const uint16_t bf16[] = {0x3F80, 0x3F80, 0x3F82, 0x7F80, 0x7F7F, 0x7F80};
    uint16_t y[8];

    t->f32_to_f16(y, x, 8);
    CHECK(memcmp(y, f16, sizeof f16) == 0);
    t->f32_to_bf16(y, b, 6);
    CHECK(memcmp(y, bf16, sizeof bf16) == 0);
}

/* A x for an upper triangle at any offset in memory, whose other half is NaN. */
#define SYMV_TEST(REAL, SFX, EPS)                                                            \
    static void symv_##SFX(const mli_kernels *t)                                             \
    {                                                                                        \
        enum { LDA = 75 };                                                                   \
        REAL *const memory = mli_alloc((LDA * LDA + 16) * sizeof(REAL)), x[LDA], y[LDA + 1]; \
        uint64_t seed = 12;                                                                  \
        for (int64_t m = 0; m <= 70; m++)                                                    \
            for (int backwards = 0; backwards < 2; backwards++) {                            \
                REAL *A = memory + m % 16;                                                   \
                for (int64_t i = 0; i < m; i++) {                                            \
                    x[i] = (REAL)test_random(&seed);                                         \
                    for (int64_t j = 0; j < LDA; j++)                                        \
                        A[i * LDA + j] = (REAL)(j < i || j >= m ? NAN : test_random(&seed)); \
                }                                                                            \
                y[m] = 7;                                                                    \
                t->SFX##_symv(y, A, LDA, x, m, backwards);                                   \
                CHECK(y[m] == 7); /* nothing is written past the end */                      \
                for (int64_t i = 0; i < m; i++) {                                            \
                    double sum = 0;                                                          \
                    for (int64_t j = 0; j < m; j++)                                          \
                        sum += (double)A[i < j ? i * LDA + j : j * LDA + i] * (double)x[j];  \
                    CHECK(fabs(sum - (double)y[i]) <= 4 * EPS * (double)m);                  \
                }                                                                            \
            }                                                                                \
        mli_free(memory);                                                                    \
    }
SYMV_TEST(float, f32, 0x1p-23)
SYMV_TEST(double, f64, 0x1p-52)

/* A step of AdamW of every table, to the bit. */
static void
adamw(const mli_kernels *t, const mli_kernels *ref)
{
    const mli_adamw_step how = {0.9, 0.99, 1e-8, 0.01, 1.1, 0.999, 0.7};
    float a[4][257], b[4][257]; /* w, m, v, g */
    uint64_t seed = 13;

    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
        const int64_t n = sizes[k];
        for (int j = 0; j < 4; j++)
            for (int i = 0; i < 257; i++)
                b[j][i] = a[j][i] = (float)test_random(&seed) + (j == 2); /* v is not negative */
        t->adamw_f32(a[0], a[1], a[2], a[3], n, &how);
        ref->adamw_f32(b[0], b[1], b[2], b[3], n, &how);
        CHECK(memcmp(a, b, sizeof a) == 0); /* and nothing past the end */
        CHECK(n == 0 || a[1][n - 1] != 0);
    }
}

void
test_kern(void)
{
    const mli_kernels *ref = mli_kernels_named("ref"), *best;
    int found = 0;

    CHECK(ref != NULL);
    CHECK(mli_kernels_named("none") == NULL);
    for (size_t i = 0; i < sizeof isas / sizeof *isas; i++) {
        const mli_kernels *t = mli_kernels_named(isas[i]);
        if (t == NULL)
            continue;
        found++;
        CHECK(strcmp(t->isa, isas[i]) == 0);
        widen(t, ref);
        narrow(t, ref);
        check_and_sum(t, ref);
        by_hand(t);
        adamw(t, ref);
        symv_f32(t);
        symv_f64(t);
    }
    CHECK(found >= 1);
    best = mli_kernels_get();
    CHECK(mli_kernels_named(best->isa) == best);
    CHECK(best != ref || found == 1);
    mli_kernels_disable("none, avx2,avx512"); /* too late: chosen once */
    CHECK(mli_kernels_get() == best);
}
