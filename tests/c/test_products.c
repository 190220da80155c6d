/* The products of every table against plain loops in double, on blocks of the exact size, so that
 * AddressSanitizer and valgrind see a value read past the end. */
#include "test.h"

#include "../../csrc/base/mem.h"
#include "../../csrc/kern/kern.h"

#include <math.h>
#include <string.h>

static const char *const isas[] = {"ref", "avx2", "avx512", "avx512bf16", "amx"};
static const int64_t shapes[][3] = {
    /* rows, columns, k */
    {0, 5, 3},    {3, 0, 2},     {2, 3, 0},    {1, 1, 1},     {1, 13, 300},
    {2, 24, 31},  {3, 700, 9},   {4, 17, 257}, {5, 33, 16},   {6, 11, 65},
    {7, 40, 33},  {16, 31, 129}, {17, 12, 8},  {33, 47, 63},  {40, 33, 64},
    {65, 10, 10}, {9, 97, 400},  {32, 32, 32}, {49, 53, 273}, {80, 49, 17},
};

static float
widen(uint16_t h)
{
    uint32_t u = (uint32_t)h << 16;
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

/* Random matrices of one shape, with two elements between rows that are NaN. W is (columns,k) for
 * nt and (k,columns) for nn; h has the values of x and w, which are bf16. */
typedef struct {
    int64_t m, n, k, ldx, ldw, ldy;
    int nn;
    float *x, *w, *y;
    uint16_t *hx, *hw;
    double *dx, *dw, *dy;
} problem;

static void
fill(float *f, double *d, uint16_t *h, int64_t rows, int64_t cols, int64_t ld, uint64_t *seed)
{
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < ld && i * ld + j < (rows - 1) * ld + cols; j++) {
            const int64_t at = i * ld + j;
            float v = j < cols ? (float)test_random(seed) : NAN;
            uint32_t u;
            memcpy(&u, &v, sizeof u);
            h[at] = (uint16_t)(u >> 16);
            f[at] = widen(h[at]);
            d[at] = (double)f[at];
        }
}

static size_t
count(int64_t rows, int64_t cols, int64_t ld)
{
    return rows > 0 ? (size_t)((rows - 1) * ld + cols) : 0;
}

static problem
make(int64_t m, int64_t n, int64_t k, int nn, uint64_t *seed)
{
    const int64_t rows = nn ? k : n, cols = nn ? n : k;
    problem p = {.m = m, .n = n, .k = k, .ldx = k + 2, .ldw = cols + 2, .ldy = n + 2, .nn = nn};
    const size_t nx = count(m, k, p.ldx), nw = count(rows, cols, p.ldw), ny = count(m, n, p.ldy);

    p.x = mli_alloc(nx * sizeof *p.x);
    p.hx = mli_alloc(nx * sizeof *p.hx);
    p.dx = mli_alloc(nx * sizeof *p.dx);
    p.w = mli_alloc(nw * sizeof *p.w);
    p.hw = mli_alloc(nw * sizeof *p.hw);
    p.dw = mli_alloc(nw * sizeof *p.dw);
    p.y = mli_alloc(ny * sizeof *p.y);
    p.dy = mli_alloc(ny * sizeof *p.dy);
    fill(p.x, p.dx, p.hx, m, k, p.ldx, seed);
    fill(p.w, p.dw, p.hw, rows, cols, p.ldw, seed);
    return p;
}

static void
drop(problem *p)
{
    void *all[] = {p->x, p->hx, p->dx, p->w, p->hw, p->dw, p->y, p->dy};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        mli_free(all[i]);
}

/* Outputs start as 2, or as NaN where they are to be overwritten; between rows stands 9. */
static void
start(problem *p, int accumulate)
{
    for (int64_t i = 0; i < p->m; i++)
        for (int64_t j = 0; j < p->ldy && (i < p->m - 1 || j < p->n); j++) {
            double v = j >= p->n ? 9.0 : accumulate ? 2.0 : (double)NAN;
            p->y[i * p->ldy + j] = (float)v;
            p->dy[i * p->ldy + j] = v;
        }
}

/* (k + 2) u (sum |x||w| + |y|); both are at most 1 and 2 in size. */
static void
check(const problem *p, int accumulate, int in_double)
{
    const double u = in_double ? 0x1p-53 : 0x1p-24;
    int wrong = 0;

    for (int64_t i = 0; i < p->m; i++)
        for (int64_t j = 0; j < p->ldy && (i < p->m - 1 || j < p->n); j++) {
            double got = in_double ? p->dy[i * p->ldy + j] : (double)p->y[i * p->ldy + j];
            double want = accumulate ? 2.0 : 0.0, size = want;
            if (j >= p->n) {
                wrong += got != 9.0;
                continue;
            }
            for (int64_t q = 0; q < p->k; q++) {
                double v = p->dx[i * p->ldx + q] * p->dw[p->nn ? q * p->ldw + j : j * p->ldw + q];
                want += v;
                size += fabs(v);
            }
            wrong += !(fabs(got - want) <= (double)(p->k + 2) * u * size);
        }
    CHECK(wrong == 0);
}

static void
products(const mli_kernels *t, problem *p, int accumulate)
{
    const size_t bytes = t->gemm_bf16_ws(p->m, p->n, p->k);
    void *ws = mli_alloc(bytes);
    void *rows = mli_alloc(t->rows_f32_ws(p->m, p->k));

    start(p, accumulate);
    t->rows_f32(p->nn ? MLI_NN : MLI_NT, p->y, p->ldy, p->x, p->ldx, p->w, p->ldw, p->m, p->n, p->k,
                accumulate, rows);
    check(p, accumulate, 0);
    mli_free(rows);
    start(p, accumulate);
    (p->nn ? t->stream_nn_f32 : t->stream_nt_f32)(p->y, p->ldy, p->x, p->ldx, p->w, p->ldw, p->m,
                                                  p->n, p->k, accumulate);
    check(p, accumulate, 0);
    start(p, accumulate);
    (p->nn ? t->stream_nn_bf16 : t->stream_nt_bf16)(p->y, p->ldy, p->x, p->ldx, p->hw, p->ldw, p->m,
                                                    p->n, p->k, accumulate);
    check(p, accumulate, 0);
    start(p, accumulate);
    (p->nn ? t->stream_nn_f64 : t->stream_nt_f64)(p->dy, p->ldy, p->dx, p->ldx, p->dw, p->ldw, p->m,
                                                  p->n, p->k, accumulate);
    check(p, accumulate, 1);
    start(p, accumulate);
    t->gemm_bf16(p->nn ? MLI_NN : MLI_NT, p->y, p->ldy, p->hx, p->ldx, p->hw, p->ldw, p->m, p->n,
                 p->k, accumulate, ws);
    check(p, accumulate, 0);
    mli_free(ws);
}

/* y[:, column] += [own | rest]: one addition a number, so to the bit. Of the rows of y one has
 * nothing added to it. */
static void
scatter(const mli_kernels *t, const problem *p, const int64_t *row, const int32_t *column, void *ws)
{
    const int64_t D = p->k, R = D / 2, k = D - R, N = p->m > 0 ? p->m - 1 : 0;
    const size_t ny = (size_t)(p->m * D);
    float *y = mli_alloc(ny * sizeof *y), *own = mli_alloc((size_t)(N * R) * sizeof *own);
    float *rest = mli_alloc((size_t)(N * k) * sizeof *rest), *want = mli_alloc(ny * sizeof *want);
    uint64_t seed = 11;

    for (size_t i = 0; i < ny; i++)
        want[i] = y[i] = (float)test_random(&seed);
    for (int64_t i = 0; i < N * R; i++)
        own[i] = (float)test_random(&seed);
    for (int64_t i = 0; i < N * k; i++)
        rest[i] = (float)test_random(&seed);
    for (int64_t i = 0; i < N; i++)
        for (int64_t j = 0; j < D; j++)
            want[row[i] * D + column[j]] += j < R ? own[i * R + j] : rest[i * k + j - R];
    t->scatter_f32(y, D, row, N, own, R, rest, column, ws);
    CHECK(ny == 0 || memcmp(y, want, ny * sizeof *y) == 0);
    mli_free(want);
    mli_free(rest);
    mli_free(own);
    mli_free(y);
}

/* Y = X[:, own] + X[:, rest] W^T and dW = Y^T X, against the same in double. x has k columns, of
 * which the first half, backwards, is its own and the others meet W. */
static void
by_number(const mli_kernels *t, problem *p)
{
    const int64_t R = p->k / 2, k = p->k - R, N = p->m;
    float *whole = mli_alloc((size_t)(N * p->k) * sizeof *whole); /* nothing between its rows */
    int64_t *row = mli_alloc((size_t)N * sizeof *row);
    int32_t *column = mli_alloc((size_t)p->k * sizeof *column);
    float *z = mli_alloc((size_t)(N * R) * sizeof *z), *m = mli_alloc((size_t)(R * k) * sizeof *m);
    float *d = mli_alloc((size_t)(R * k) * sizeof *d);
    void *ws = mli_alloc(t->gauge_f32_ws(N, p->k));
    const mli_rows_f32 x = {whole, p->k, N, row};
    uint64_t seed = 9;
    int wrong = 0;

    for (int64_t i = 0; i < N; i++)
        row[i] = N - 1 - i; /* the last has no numbers after its own */
    for (int64_t i = 0; i < N * p->k; i++)
        whole[i] = p->x[i / p->k * p->ldx + i % p->k];
    for (int64_t i = 0; i < p->k; i++)
        column[i] = (int32_t)(p->k - 1 - i);
    for (int64_t i = 0; i < R * k; i++)
        m[i] = (float)test_random(&seed);
    t->gauge_f32(z, R, &x, column, R, column + R, k, m, k, ws);
    for (int64_t i = 0; i < N; i++)
        for (int64_t j = 0; j < R; j++) {
            const float *from = whole + row[i] * p->k;
            double want = (double)from[column[j]], size = fabs(want);
            for (int64_t q = 0; q < k; q++) {
                const double v = (double)from[column[R + q]] * (double)m[j * k + q];
                want += v;
                size += fabs(v);
            }
            wrong += !(fabs((double)z[i * R + j] - want) <= (double)(k + 2) * 0x1p-24 * size);
        }
    CHECK(wrong == 0);
    t->tn_f32(d, k, z, R, &x, R, k, 0);
    for (int64_t j = 0; j < R; j++)
        for (int64_t q = 0; q < k; q++) {
            double want = 0, size = 0;
            for (int64_t i = 0; i < N; i++) {
                const double v = (double)z[i * R + j] * (double)whole[row[i] * p->k + q];
                want += v;
                size += fabs(v);
            }
            wrong += !(fabs((double)d[j * k + q] - want) <= (double)(N + 2) * 0x1p-24 * size);
        }
    CHECK(wrong == 0);
    scatter(t, p, row, column, ws);
    mli_free(ws);
    mli_free(d);
    mli_free(m);
    mli_free(z);
    mli_free(column);
    mli_free(row);
    mli_free(whole);
}

void
test_products(void)
{
    uint64_t seed = 5;
    int found = 0;

    for (size_t i = 0; i < sizeof isas / sizeof *isas; i++) {
        const mli_kernels *t = mli_kernels_named(isas[i]);
        if (t == NULL) /* not in this CPU, or, under valgrind, not known to it */
            continue;
        found++;
        CHECK(t->gemm_bf16_native == (i >= 3));
        CHECK(t->rows_f32_native == (i >= 1));
        CHECK(!t->rows_f32_native || t->rows_f32_ws(1, INT64_MAX) == SIZE_MAX);
        for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
            for (int which = 0; which < 4; which++) {
                problem p = make(shapes[s][0], shapes[s][1], shapes[s][2], which % 2, &seed);
                products(t, &p, which / 2);
                by_number(t, &p);
                drop(&p);
            }
    }
    CHECK(found >= 1);
    CHECK(mli_kernels_named("ref")->gemm_bf16_ws(1, 1, INT64_MAX) == SIZE_MAX);
}
