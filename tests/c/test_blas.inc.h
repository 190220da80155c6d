/* For one precision; sums are checked against loops in double. */
#include "../../csrc/base/real.h"

static void
FN(fill)(REAL *a, int64_t n, uint64_t seed)
{
    for (int64_t i = 0; i < n; i++)
        a[i] = (REAL)test_random(&seed);
}

static int
FN(near)(double a, double b, double scale)
{
    return fabs(a - b) <= 32 * EPS * scale;
}

static void
FN(products)(void)
{
    enum { M = 5, N = 7, K = 3 };
    REAL A[M * K], At[K * M], B[K * N], Bt[N * K], C[M * N], S[M * M];

    FN(fill)(A, M * K, 1);
    FN(fill)(B, K * N, 2);
    for (int i = 0; i < M; i++)
        for (int l = 0; l < K; l++)
            At[l * M + i] = A[i * K + l];
    for (int j = 0; j < N; j++)
        for (int l = 0; l < K; l++)
            Bt[j * K + l] = B[l * N + j];
    for (int way = 0; way < 4; way++) {
        int ta = way & 1, tb = way >> 1;
        for (int i = 0; i < M * N; i++)
            C[i] = (REAL)NAN; /* beta == 0 never reads */
        CHECK(FN(mli_gemm)(ta, tb, M, N, K, (REAL)2, ta ? At : A, ta ? M : K, tb ? Bt : B,
                           tb ? K : N, (REAL)0, C, N) == MOLAE_OK);
        for (int i = 0; i < M; i++)
            for (int j = 0; j < N; j++) {
                double sum = 0;
                for (int l = 0; l < K; l++)
                    sum += 2.0 * (double)A[i * K + l] * (double)B[l * N + j];
                CHECK(FN(near)((double)C[i * N + j], sum, K));
            }
    }
    for (int trans = 0; trans < 2; trans++) {
        for (int i = 0; i < M * M; i++)
            S[i] = (REAL)9;
        CHECK(FN(mli_syrk)(trans, M, K, (REAL)1, trans ? At : A, trans ? M : K, (REAL)0, S, M) ==
              MOLAE_OK);
        for (int i = 0; i < M; i++)
            for (int j = 0; j < M; j++) {
                double sum = 0;
                for (int l = 0; l < K; l++)
                    sum += (double)A[i * K + l] * (double)A[j * K + l];
                if (j >= i)
                    CHECK(FN(near)((double)S[i * M + j], sum, K));
                else
                    CHECK((double)S[i * M + j] == 9.0); /* the other triangle stays */
            }
    }
    /* no inner dimension: the product is zero */
    CHECK(FN(mli_gemm)(0, 0, M, N, 0, (REAL)1, A, 0, B, N, (REAL)0, C, N) == MOLAE_OK);
    for (int i = 0; i < M * N; i++)
        CHECK((double)C[i] == 0.0);
}

/* T's upper triangle, at (i,j) of op(T). */
static double
FN(upper_at)(const REAL *T, int n, int trans, int i, int j)
{
    const int r = trans ? j : i, c = trans ? i : j;

    return r <= c ? (double)T[r * n + c] : 0.0;
}

static void
FN(triangular)(void)
{
    enum { M = 6, N = 4 };
    REAL T[M * M], X[M * N], B[M * N], Y[N * M], C[N * M], A[M * M], U[M * M];
    int64_t info = -1;

    FN(fill)(T, M * M, 13);
    FN(fill)(X, M * N, 14);
    FN(fill)(Y, N * M, 15);
    for (int i = 0; i < M; i++)
        T[i * M + i] = (REAL)3;
    for (int trans = 0; trans < 2; trans++) {
        memcpy(B, X, sizeof B);
        memcpy(C, Y, sizeof C);
        CHECK(FN(mli_trmm)(trans, M, N, T, M, B, N) == MOLAE_OK);
        CHECK(FN(mli_trmm_right)(trans, N, M, T, M, C, M) == MOLAE_OK);
        for (int i = 0; i < M; i++)
            for (int j = 0; j < N; j++) {
                double left = 0, right = 0;
                for (int l = 0; l < M; l++) {
                    left += FN(upper_at)(T, M, trans, i, l) * (double)X[l * N + j];
                    right += (double)Y[j * M + l] * FN(upper_at)(T, M, trans, l, i);
                }
                CHECK(FN(near)((double)B[i * N + j], left, 16));
                CHECK(FN(near)((double)C[j * M + i], right, 16));
            }
        CHECK(FN(mli_trsm)(trans, M, N, T, M, B, N) == MOLAE_OK);
        CHECK(FN(mli_trsm_right)(trans, N, M, T, M, C, M) == MOLAE_OK);
        for (int i = 0; i < N * M; i++) {
            CHECK(FN(near)((double)B[i], (double)X[i], 16));
            CHECK(FN(near)((double)C[i], (double)Y[i], 16));
        }
    }
    FN(fill)(U, M * M, 16);
    for (int i = 0; i < M; i++)
        for (int j = 0; j < M; j++)
            A[i * M + j] = j >= i ? U[i * M + j] : (REAL)9;
    CHECK(FN(mli_sygst)(M, A, M, T, M, &info) == MOLAE_OK && info == 0);
    for (int i = 0; i < M; i++)
        for (int j = 0; j < M; j++) {
            double sum = 0;
            for (int k = 0; k < M; k++)
                for (int l = 0; l < M; l++)
                    sum += FN(upper_at)(T, M, 0, i, k) * FN(upper_at)(T, M, 0, j, l) *
                           (double)(k <= l ? U[k * M + l] : U[l * M + k]);
            if (j >= i)
                CHECK(FN(near)((double)A[i * M + j], sum, 64));
            else
                CHECK((double)A[i * M + j] == 9.0); /* the other triangle stays */
        }
}

static void
FN(cholesky)(void)
{
    enum { N = 5 };
    REAL A[N * N], B[N * N];
    int64_t info = -1;

    FN(fill)(B, N * N, 5);
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) {
            double sum = i == j ? 1.0 : 0.0;
            for (int l = 0; l < N; l++)
                sum += (double)B[i * N + l] * (double)B[j * N + l];
            A[i * N + j] = j >= i ? (REAL)sum : (REAL)NAN; /* the upper triangle alone is read */
        }
    CHECK(FN(mli_potrf)(N, A, N, &info) == MOLAE_OK && info == 0);
    for (int i = 0; i < N; i++)
        for (int j = i; j < N; j++) {
            double want = i == j ? 1.0 : 0.0, sum = 0;
            for (int l = 0; l < N; l++)
                want += (double)B[i * N + l] * (double)B[j * N + l];
            for (int l = 0; l <= i; l++)
                sum += (double)A[l * N + i] * (double)A[l * N + j];
            CHECK(FN(near)(sum, want, N));
        }
    memset(A, 0, sizeof A);
    A[0] = (REAL)1;
    CHECK(FN(mli_potrf)(N, A, N, &info) == MOLAE_E_LAPACK && info == 2);
}

static void
FN(pivoted_qr)(void)
{
    enum { M = 6, N = 4 }; /* column-major */
    REAL A[M * N], Q[M * N], tau[N];
    int32_t jpvt[N], seen = 0;
    size_t bytes = FN(mli_geqp3_work)(M, N);
    void *work = mli_alloc(bytes);
    int64_t info = -1;

    FN(fill)(A, M * N, 7);
    memcpy(Q, A, sizeof A);
    CHECK(FN(mli_geqp3)(M, N, Q, M, jpvt, tau, work, bytes, &info) == MOLAE_OK && info == 0);
    for (int j = 0; j < N; j++) {
        CHECK(jpvt[j] >= 0 && jpvt[j] < N);
        seen |= 1 << jpvt[j];
        /* the diagonal falls, and column j of R has the length of column jpvt[j] of A */
        CHECK(j == 0 ||
              fabs((double)Q[j * M + j]) <= fabs((double)Q[(j - 1) * M + j - 1]) * (1 + 8 * EPS));
        double a = 0, r = 0;
        for (int i = 0; i < M; i++)
            a += (double)A[jpvt[j] * M + i] * (double)A[jpvt[j] * M + i];
        for (int i = 0; i <= j; i++)
            r += (double)Q[j * M + i] * (double)Q[j * M + i];
        CHECK(FN(near)(a, r, M));
    }
    CHECK(seen == (1 << N) - 1);
    CHECK(FN(mli_geqp3)(0, 3, Q, 1, jpvt, tau, work, bytes, &info) == MOLAE_OK && jpvt[2] == 2);
    mli_free(work);
}

static void
FN(lq)(void)
{
    enum { M = 3, N = 8 }; /* column-major */
    REAL A[M * N], L[M * N], tau[M];
    size_t bytes = FN(mli_gelqf_work)(M, N);
    void *work = mli_alloc(bytes);
    int64_t info = -1;

    FN(fill)(A, M * N, 8);
    memcpy(L, A, sizeof A);
    CHECK(FN(mli_gelqf)(M, N, L, M, tau, work, bytes, &info) == MOLAE_OK && info == 0);
    for (int i = 0; i < M; i++) /* L L^T = A A^T */
        for (int j = 0; j < M; j++) {
            double a = 0, l = 0;
            for (int k = 0; k < N; k++)
                a += (double)A[k * M + i] * (double)A[k * M + j];
            for (int k = 0; k <= (i < j ? i : j); k++)
                l += (double)L[k * M + i] * (double)L[k * M + j];
            CHECK(FN(near)(a, l, N));
        }
    mli_free(work);
}

static void
FN(svd)(int64_t m, int64_t n)
{
    int64_t k = m < n ? m : n, info = -1;
    size_t bytes = FN(mli_gesdd_work)(m, n);
    REAL *A = mli_alloc((size_t)(m * n) * sizeof(REAL));
    REAL *X = mli_alloc((size_t)(m * n) * sizeof(REAL));
    REAL *U = mli_alloc((size_t)(m * k) * sizeof(REAL));
    REAL *s = mli_alloc((size_t)k * sizeof(REAL));
    void *work = mli_alloc(bytes);

    FN(fill)(A, m * n, 9);
    memcpy(X, A, (size_t)(m * n) * sizeof(REAL));
    CHECK(FN(mli_gesdd)(m, n, X, m, s, U, m, work, bytes, &info) == MOLAE_OK && info == 0);
    for (int64_t j = 0; j < k; j++) { /* |A^T u| = s, |u| = 1 */
        double square = 0, length = 0;
        CHECK(j == 0 || s[j] <= s[j - 1]);
        for (int64_t c = 0; c < n; c++) {
            double sum = 0;
            for (int64_t i = 0; i < m; i++)
                sum += (double)A[c * m + i] * (double)U[j * m + i];
            square += sum * sum;
        }
        for (int64_t i = 0; i < m; i++)
            length += (double)U[j * m + i] * (double)U[j * m + i];
        CHECK(FN(near)(length, 1.0, 4));
        CHECK(FN(near)(square, (double)s[j] * (double)s[j], (double)(m * n)));
    }
    mli_free(A);
    mli_free(X);
    mli_free(U);
    mli_free(s);
    mli_free(work);
}

static void
FN(refusals)(void)
{
    const int64_t big = (int64_t)INT32_MAX + 1;
    REAL a[4] = {0}, c[4] = {0};
    int64_t info = -1, rank;
    int32_t pivots[4];

    CHECK(FN(mli_gemm)(0, 0, big, 1, 1, (REAL)1, a, 1, a, 1, (REAL)0, c, 1) == MOLAE_E_TOO_LARGE);
    CHECK(FN(mli_gemm)(0, 0, 1, 1, 1, (REAL)1, a, big, a, 1, (REAL)0, c, 1) == MOLAE_E_TOO_LARGE);
    CHECK(FN(mli_gemm)(0, 0, -1, 1, 1, (REAL)1, a, 1, a, 1, (REAL)0, c, 1) == MOLAE_E_ARG);
    CHECK(FN(mli_gemm)(0, 0, 2, 2, 2, (REAL)1, a, 1, a, 2, (REAL)0, c, 2) == MOLAE_E_ARG);
    CHECK(FN(mli_gemm)(0, 0, 0, 2, 2, (REAL)1, a, 2, a, 2, (REAL)0, c, 2) == MOLAE_OK);
    CHECK(FN(mli_syrk)(0, big, 1, (REAL)1, a, 1, (REAL)0, c, 1) == MOLAE_E_TOO_LARGE);
    CHECK(FN(mli_syrk)(0, 2, 2, (REAL)1, a, 1, (REAL)0, c, 2) == MOLAE_E_ARG);
    CHECK(FN(mli_trsm)(0, 2, 2, a, 1, c, 2) == MOLAE_E_ARG);
    CHECK(FN(mli_trsm)(0, big, 2, a, 1, c, 2) == MOLAE_E_TOO_LARGE);
    CHECK(FN(mli_trsm_right)(0, 2, 2, a, 1, c, 2) == MOLAE_E_ARG);
    CHECK(FN(mli_trmm)(0, 2, 2, a, 1, c, 2) == MOLAE_E_ARG);
    CHECK(FN(mli_trmm_right)(0, big, 2, a, 2, c, 2) == MOLAE_E_TOO_LARGE);
    CHECK(FN(mli_trmm_right)(0, 0, 2, a, 2, c, 2) == MOLAE_OK);
    CHECK(FN(mli_sygst)(2, a, 1, c, 2, &info) == MOLAE_E_ARG);
    CHECK(FN(mli_sygst)(big, a, big, c, big, &info) == MOLAE_E_TOO_LARGE);
    CHECK(FN(mli_sygst)(0, a, 0, c, 0, &info) == MOLAE_OK);
    CHECK(FN(mli_potrf)(2, a, 1, &info) == MOLAE_E_ARG);
    CHECK(FN(mli_potrf)(0, a, 1, &info) == MOLAE_OK);
    CHECK(FN(mli_syr2k)(2, 2, 1, a, 1, c, 2, 0, c, 2) == MOLAE_E_ARG);
    CHECK(FN(mli_syr2k)(big, 2, 1, a, big, c, big, 0, c, big) == MOLAE_E_TOO_LARGE);
    CHECK(FN(mli_gemv)(0, 2, 2, 1, a, 1, c, 0, c) == MOLAE_E_ARG);
    CHECK(FN(mli_gemv)(0, big, 2, 1, a, 2, c, 0, c) == MOLAE_E_TOO_LARGE);
    CHECK(FN(mli_sterf)(big, a, c, &info) == MOLAE_E_TOO_LARGE);
    CHECK(FN(mli_stedc_work)(50000) == SIZE_MAX); /* n^2 numbers do not fit an int32 */
    CHECK(FN(mli_stedc)(2, a, a, c, 1, a, 0, &info) == MOLAE_E_ARG);
    CHECK(FN(mli_pstrf)(2, a, 1, pivots, &rank, 0, c, 0, &info) == MOLAE_E_ARG);
    CHECK(FN(mli_pstrf)(big, a, big, pivots, &rank, 0, c, 0, &info) == MOLAE_E_TOO_LARGE);
    CHECK(FN(mli_gesv)(2, 1, a, 1, pivots, c, 2, &info) == MOLAE_E_ARG);
    CHECK(FN(mli_gesv)(big, 1, a, big, pivots, c, big, &info) == MOLAE_E_TOO_LARGE);
    CHECK(FN(mli_geqp3_work)(big, 1) == SIZE_MAX);
    CHECK(FN(mli_gelqf_work)(1, big) == SIZE_MAX);
    CHECK(FN(mli_gesdd_work)(40000, 40000) == SIZE_MAX);
    CHECK(FN(mli_gesdd)(0, 4, a, 1, c, a, 1, c, 0, &info) == MOLAE_OK);
}

static void
FN(routines)(void)
{
    FN(products)();
    FN(triangular)();
    FN(cholesky)();
    FN(pivoted_qr)();
    FN(lq)();
    FN(svd)(1, 1);
    FN(svd)(12, 5);
    FN(svd)(5, 12);
    FN(refusals)();
}
