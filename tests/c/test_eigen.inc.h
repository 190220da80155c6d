/* For one precision: every eigenpair is put into A v = w v, and the vectors against each other. */
#include "../../csrc/base/real.h"

/* Symmetric matrices (n,n), whole, that take the different ways through divide and conquer. */
static void
FN(matrix)(REAL *A, int64_t n, int kind)
{
    uint64_t seed = 40 + (uint64_t)kind;

    for (int64_t i = 0; i < n; i++)
        for (int64_t j = i; j < n; j++) {
            const double noise = test_random(&seed);
            double a = 0;
            switch (kind) {
            case 0: /* nothing to deflate */
                a = noise;
                break;
            case 1: /* everything deflates */
                a = i == j ? noise : 0;
                break;
            case 2:
                a = i == j;
                break;
            case 3: /* zero */
                break;
            case 4: /* two eigenvalues, many times each */
                a = (i == j) - 2.0 / (double)n;
                break;
            case 5: /* n alike but for one */
                a = (i == j) + (i == 0 && j == n - 1);
                break;
            case 6: /* second differences */
                a = i == j ? 2 : j == i + 1 ? -1 : 0;
                break;
            case 7: /* squares of it would vanish */
                a = noise * TINY;
                break;
            default: /* squares of it would overflow */
                a = noise / TINY;
            }
            A[i * n + j] = A[j * n + i] = (REAL)a;
        }
}

static double
FN(dot)(const REAL *x, const REAL *y, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += (double)x[i] * (double)y[i];
    return sum;
}

/* The worst of |A v - w v| / |A| and |V V^T - I| over rows lo .. lo+count-1 of V. */
static double
FN(defect)(const REAL *A, const REAL *V, const REAL *w, int64_t n, int64_t lo, int64_t count)
{
    double worst = 0, norm = 0;

    for (int64_t i = 0; i < n * n; i++)
        norm = fmax(norm, fabs((double)A[i]));
    norm = norm > 0 ? norm : 1;
    for (int64_t k = lo; k < lo + count; k++) {
        for (int64_t i = 0; i < n; i++) {
            const double Av = FN(dot)(A + i * n, V + k * n, n);
            const double wv = (double)w[k] * (double)V[k * n + i];
            worst = fmax(worst, fabs(Av / norm - wv / norm));
        }
        for (int64_t l = lo; l <= k; l++)
            worst = fmax(worst, fabs(FN(dot)(V + k * n, V + l * n, n) - (k == l)));
    }
    return worst;
}

static void
FN(eigenproblem)(int64_t n, int kind, int64_t lo, int64_t count)
{
    const size_t square = (size_t)(n * n + 1), bytes = FN(mli_eigen_work)(n, count);
    REAL *A = mli_alloc(square * sizeof(REAL)), *V = mli_alloc(square * sizeof(REAL));
    REAL *w = mli_alloc((size_t)(n + 1) * sizeof(REAL));
    char *work = mli_alloc(bytes);
    int64_t info = -1;
    double trace = 0, scale = 0;

    memset(work, 0xFF, bytes); /* NaN */
    FN(matrix)(A, n, kind);
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < n; j++)
            V[i * n + j] = j >= i ? A[i * n + j] : (REAL)NAN; /* the other triangle is not read */
    CHECK(FN(mli_eigen)(n, V, w, lo, count, work, bytes, &info) == MOLAE_OK && info == 0);
    for (int64_t k = 0; k < n; k++) {
        CHECK(k == 0 || w[k] >= w[k - 1]);
        trace += (double)w[k] - (double)A[k * n + k];
        scale = fmax(scale, fabs((double)w[k]));
    }
    CHECK(fabs(trace) <= 32 * EPS * (double)n * scale);
    CHECK(FN(defect)(A, V, w, n, lo, count) <= 32 * EPS * (double)(n + 1));
    if (count > 1) { /* the check sees a wrong vector */
        V[lo * n] += (REAL)0.125;
        CHECK(FN(defect)(A, V, w, n, lo, count) > 32 * EPS * (double)(n + 1));
    }
    if (n > 0)
        CHECK(FN(mli_eigen)(n, V, w, lo, count, work, bytes - 1, &info) == MOLAE_E_ARG);
    mli_free(A);
    mli_free(V);
    mli_free(w);
    mli_free(work);
}

static void
FN(eigenproblem_refusals)(void)
{
    REAL A[4] = {1, 0, 0, (REAL)NAN}, w[2];
    int64_t info;
    const size_t bytes = FN(mli_eigen_work)(2, 2);
    void *work = mli_alloc(bytes);

    CHECK(FN(mli_eigen)(2, A, w, 0, 2, work, bytes, &info) == MOLAE_E_NONFINITE);
    A[3] = (REAL)INFINITY;
    CHECK(FN(mli_eigen)(2, A, w, 0, 2, work, bytes, &info) == MOLAE_E_NONFINITE);
    CHECK(FN(mli_eigen)(2, A, w, 1, 2, work, bytes, &info) == MOLAE_E_ARG);
    CHECK(FN(mli_eigen)(2, A, w, -1, 2, work, bytes, &info) == MOLAE_E_ARG);
    CHECK(FN(mli_eigen)(-1, A, w, 0, 0, work, bytes, &info) == MOLAE_E_ARG);
    CHECK(FN(mli_eigen_work)((int64_t)1 << 33, 1) == SIZE_MAX);
    mli_free(work);
}

static void
FN(eigenproblems)(void)
{
    const int64_t sizes[] = {0, 1, 2, 3, 4, 5, 17, 64, 65, 66, 130};

    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        const int64_t n = sizes[i];
        for (int kind = 0; kind < KINDS; kind++) {
            FN(eigenproblem)(n, kind, 0, n);
            FN(eigenproblem)(n, kind, 0, 0);
            FN(eigenproblem)(n, kind, 0, n / 3);
            FN(eigenproblem)(n, kind, n - n / 3, n / 3);
            FN(eigenproblem)(n, kind, n / 3, n / 2);
        }
    }
    FN(eigenproblem_refusals)();
}
