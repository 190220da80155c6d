/* For one precision: shapes, sides, forms and storage types, with results checked by loops. */
#include "../../csrc/base/real.h"

/* Stores n values in a storage type; what is read back goes to `exact`. */
static void
FN(store)(void *to, double *exact, const double *x, int64_t n, molae_dtype dtype)
{
    const mli_kernels *k = mli_kernels_named("ref");

    for (int64_t i = 0; i < n; i++) {
        float f = (float)x[i], back = f;
        if (dtype == MOLAE_F64) {
            ((double *)to)[i] = exact[i] = x[i];
            continue;
        }
        if (dtype == MOLAE_F32)
            ((float *)to)[i] = f;
        else if (dtype == MOLAE_BF16) {
            k->f32_to_bf16((uint16_t *)to + i, &f, 1);
            k->bf16_to_f32(&back, (uint16_t *)to + i, 1);
        } else {
            k->f32_to_f16((uint16_t *)to + i, &f, 1);
            k->f16_to_f32(&back, (uint16_t *)to + i, 1);
        }
        exact[i] = (double)back;
    }
}

static double
FN(load)(const void *from, int64_t i, molae_dtype dtype)
{
    const mli_kernels *k = mli_kernels_named("ref");
    float y;

    if (dtype == MOLAE_F64)
        return ((const double *)from)[i];
    if (dtype == MOLAE_F32)
        return (double)((const float *)from)[i];
    if (dtype == MOLAE_BF16)
        k->bf16_to_f32(&y, (const uint16_t *)from + i, 1);
    else
        k->f16_to_f32(&y, (const uint16_t *)from + i, 1);
    return (double)y;
}

static void
FN(factor)(const shape_t *c, molae_dtype dtype, molae_side side, molae_form form)
{
    const size_t item = dtype == MOLAE_F64 ? 8 : (dtype == MOLAE_F32 ? 4 : 2);
    const int64_t FD = c->F * c->D;
    const int gauge = form == MOLAE_FORM_GAUGE;
    double *exact = mli_alloc((size_t)(c->E * FD) * sizeof *exact);
    double *x = mli_alloc((size_t)(c->E * FD) * sizeof *x);
    char *W = mli_alloc((size_t)(c->E * FD) * item);
    const void *w[8];
    void *shared[3], *private_[3], *kept[3] = {NULL};
    int32_t *perm[3], used_svd[3];
    double *spectrum = mli_alloc((size_t)(c->G * c->D) * sizeof *spectrum);
    double energy[8], residual[8], first[8];
    uint64_t seed = 21;
    molae_errinfo err = {0};
    molae_stack s = {c->E, c->F, c->D, dtype, side, w, c->G, c->ptr};
    molae_factors out = {shared,  gauge ? perm : NULL, private_, spectrum, energy, residual,
                         used_svd};

    for (int64_t i = 0; i < c->E * FD; i++)
        x[i] = test_random(&seed);
    FN(store)(W, exact, x, c->E * FD, dtype);
    for (int64_t e = 0; e < c->E; e++)
        w[e] = W + (size_t)(e * FD) * item;
    for (int64_t g = 0; g < c->G; g++) {
        const int64_t k = c->ptr[g + 1] - c->ptr[g], R = c->rank[g];
        shared[g] = mli_alloc((size_t)(R * c->D) * item);
        private_[g] = mli_alloc((size_t)(k * c->F * R) * item);
        perm[g] = mli_alloc((size_t)c->D * sizeof(int32_t));
    }
    for (int32_t threads = 1; threads <= 3; threads += 2) {
        molae_ctx ctx = {threads, NULL};
        size_t bytes = FN(molae_factor_ws)(&ctx, &s, c->rank);
        void *ws = mli_alloc(bytes);
        molae_status rc = FN(molae_factor_shared)(&ctx, &out, &s, c->rank, form, ws, bytes, &err);
        CHECK(rc == MOLAE_OK || rc == MOLAE_W_PRECISION);
        CHECK(FN(molae_factor_shared)(&ctx, &out, &s, c->rank, form, ws, 0, &err) == MOLAE_E_ARG);
        mli_free(ws);
        for (int64_t g = 0; g < c->G; g++) { /* the same bits with any number of threads */
            const size_t n = (size_t)((c->ptr[g + 1] - c->ptr[g]) * c->F * c->rank[g]) * item;
            if (threads == 1) {
                kept[g] = mli_alloc(n);
                memcpy(kept[g], private_[g], n);
            } else {
                CHECK(memcmp(kept[g], private_[g], n) == 0);
                mli_free(kept[g]);
            }
        }
        if (threads == 1)
            memcpy(first, residual, sizeof first);
    }
    CHECK(memcmp(first, residual, (size_t)c->E * sizeof *first) == 0);

    for (int64_t g = 0; g < c->G; g++) {
        const int64_t R = c->rank[g], D = c->D, F = c->F, M = D - R;
        double *B = mli_alloc((size_t)(R * D) * sizeof *B), all = 0, sigma = 0;
        int64_t seen = 0;
        if (R > 0 && gauge) {
            for (int64_t j = 0; j < D; j++) {
                CHECK(perm[g][j] >= 0 && perm[g][j] < D);
                seen += perm[g][j];
                for (int64_t r = 0; r < R; r++)
                    B[r * D + perm[g][j]] =
                        j < R ? (j == r ? 1.0 : 0.0) : FN(load)(shared[g], r * M + j - R, dtype);
            }
            CHECK(seen == D * (D - 1) / 2);
        } else {
            for (int64_t i = 0; i < R * D; i++)
                B[i] = FN(load)(shared[g], i, dtype);
        }
        for (int64_t e = c->ptr[g]; e < c->ptr[g + 1]; e++) {
            const int64_t at = (e - c->ptr[g]) * F * R;
            double left = 0, norm = 0;
            for (int64_t f = 0; f < F; f++)
                for (int64_t d = 0; d < D; d++) {
                    const double v =
                        exact[e * FD + (side == MOLAE_SIDE_INPUT ? f * D + d : d * F + f)];
                    double sum = v;
                    for (int64_t r = 0; r < R; r++)
                        sum -= B[r * D + d] *
                               FN(load)(private_[g],
                                        at + (side == MOLAE_SIDE_INPUT ? f * R + r : r * F + f),
                                        dtype);
                    left += sum * sum;
                    norm += v * v;
                }
            CHECK(fabs(norm - energy[e]) <= 1e-12 * norm);
            CHECK(fabs(left - residual[e]) <= 64 * EPS * norm);
            all += norm;
        }
        for (int64_t j = 0; j < D; j++) {
            CHECK(j == 0 || spectrum[g * D + j] <= spectrum[g * D + j - 1]);
            sigma += spectrum[g * D + j] * spectrum[g * D + j];
        }
        CHECK(fabs(sigma - all) <= 64 * EPS * all * (double)D);
        mli_free(B);
    }
    for (int64_t g = 0; g < c->G; g++) {
        mli_free(shared[g]);
        mli_free(private_[g]);
        mli_free(perm[g]);
    }
    mli_free(exact);
    mli_free(x);
    mli_free(W);
    mli_free(spectrum);
}

/* Of two planted directions per expert, rank 2 keeps all. */
static void
FN(reduce)(void)
{
    enum { E = 3, F = 9, D = 6 };
    REAL W[E * F * D], out[E * F * D], first[E * F * D];
    const void *w[E] = {W, W + F * D, W + 2 * F * D};
    const int64_t ptr[2] = {0, E};
    int32_t used_svd[E];
    uint64_t seed = 31;
    molae_errinfo err = {0};
    molae_stack s = {E, F, D, OWN, MOLAE_SIDE_INPUT, w, 1, ptr};

    for (int e = 0; e < E; e++) {
        double u[F * 2], v[2 * D];
        for (int i = 0; i < F * 2; i++)
            u[i] = test_random(&seed);
        for (int i = 0; i < 2 * D; i++)
            v[i] = test_random(&seed);
        for (int f = 0; f < F; f++)
            for (int d = 0; d < D; d++)
                W[e * F * D + f * D + d] = (REAL)(u[2 * f] * v[d] + u[2 * f + 1] * v[D + d]);
    }
    for (int32_t threads = 1; threads <= 2; threads++) {
        molae_ctx ctx = {threads, NULL};
        size_t bytes = FN(molae_reduce_rank_ws)(&ctx, &s);
        void *ws = mli_alloc(bytes);
        molae_status rc = FN(molae_reduce_rank)(&ctx, out, used_svd, &s, 2, ws, bytes, &err);
        CHECK(rc == MOLAE_OK || rc == MOLAE_W_PRECISION);
        mli_free(ws);
        for (int i = 0; i < E * F * D; i++)
            CHECK(fabs((double)(out[i] - W[i])) <= 64 * EPS);
        if (threads == 1)
            memcpy(first, out, sizeof out);
    }
    CHECK(memcmp(first, out, sizeof out) == 0);
}

static void
FN(bad_weights)(void)
{
    enum { E = 3, F = 4, D = 5 };
    REAL W[E * F * D] = {0}, shared[2 * D], private_[E * F * 2];
    const void *w[E] = {W, W + F * D, W + 2 * F * D};
    void *sp[1] = {shared}, *pp[1] = {private_};
    const int64_t ptr[2] = {0, E}, rank[1] = {2}, over[1] = {D + 1};
    double spectrum[D], energy[E], residual[E];
    int32_t used_svd[1];
    molae_ctx ctx = {2, NULL};
    molae_stack s = {E, F, D, OWN, MOLAE_SIDE_INPUT, w, 1, ptr};
    molae_factors out = {sp, NULL, pp, spectrum, energy, residual, used_svd};
    size_t bytes = FN(molae_factor_ws)(&ctx, &s, rank);
    void *ws = mli_alloc(bytes);
    molae_errinfo err = {0};

    for (int e = 0; e < E; e++) {
        W[e * F * D + 7] = e % 2 ? (REAL)INFINITY : (REAL)NAN;
        CHECK(FN(molae_factor_shared)(&ctx, &out, &s, rank, MOLAE_FORM_PLAIN, ws, bytes, &err) ==
              MOLAE_E_NONFINITE);
        CHECK(err.expert == e);
        W[e * F * D + 7] = 0;
    }
    CHECK(FN(molae_factor_shared)(&ctx, &out, &s, over, MOLAE_FORM_PLAIN, ws, bytes, &err) < 0);
    /* all zeros: every answer is exact */
    CHECK(FN(molae_factor_shared)(&ctx, &out, &s, rank, MOLAE_FORM_PLAIN, ws, bytes, &err) >= 0);
    for (int e = 0; e < E; e++)
        CHECK(energy[e] == 0.0 && residual[e] == 0.0);
    mli_free(ws);
}

static void
FN(dependent_basis)(void)
{
    enum { R = 2, D = 5 };
    REAL B[R * D], M[R * (D - R)];
    int32_t perm[D];
    size_t bytes = FN(molae_gauge_ws)(R, D);
    void *ws = mli_alloc(bytes);
    molae_errinfo err = {0};
    uint64_t seed = 41;

    for (int j = 0; j < D; j++)
        B[j] = B[D + j] = (REAL)test_random(&seed);
    CHECK(FN(molae_gauge)(M, perm, B, R, D, ws, bytes, &err) == MOLAE_E_ARG);
    B[0] += (REAL)1;
    CHECK(FN(molae_gauge)(M, perm, B, R, D, ws, bytes, &err) == MOLAE_OK);
    for (int i = 0; i < R * (D - R); i++)
        CHECK(isfinite((double)M[i]));
    mli_free(ws);
}

/* Rows of N (3,10), orthonormal but for a factor on the first. */
static void
FN(some_rows)(REAL *N, double first)
{
    double v[3][10];
    uint64_t seed = 43;

    for (int i = 0; i < 3; i++) {
        double length = 0;
        for (int j = 0; j < 10; j++)
            v[i][j] = test_random(&seed);
        for (int l = 0; l < i; l++) {
            double dot = 0;
            for (int j = 0; j < 10; j++)
                dot += v[i][j] * v[l][j];
            for (int j = 0; j < 10; j++)
                v[i][j] -= dot * v[l][j];
        }
        for (int j = 0; j < 10; j++)
            length += v[i][j] * v[i][j];
        for (int j = 0; j < 10; j++)
            v[i][j] /= sqrt(length);
        for (int j = 0; j < 10; j++)
            N[i * 10 + j] = (REAL)(v[i][j] * (i == 0 ? first : 1.0));
    }
}

/* [I | M] from the complement N annihilates N, and the columns are those of a pivoted QR of N,
 * also where its projector is too coarse to choose them (first == 1e-6). */
static void
FN(complement)(double first)
{
    enum { R = 7, D = 10, REST = D - R };
    REAL N[REST * D], M[R * REST], Z[REST * R];
    int32_t perm[D], picked[D];
    const size_t bytes = FN(mli_gauge_complement_ws)(R, D);
    char *ws = mli_alloc(bytes);
    int64_t info;

    FN(some_rows)(N, first);
    CHECK(FN(mli_gauge_complement)(M, perm, N, R, D, ws, &info) == MOLAE_OK);
    for (int i = 0; i < REST; i++)
        for (int r = 0; r < R; r++) {
            double sum = (double)N[i * D + perm[r]];
            for (int c = 0; c < REST; c++)
                sum += (double)M[r * REST + c] * (double)N[i * D + perm[R + c]];
            CHECK(fabs(sum) <= 64 * EPS);
        }
    CHECK(FN(mli_gauge)(Z, picked, N, REST, D, ws, &info) == MOLAE_OK);
    for (int c = 0; c < REST; c++)
        CHECK(perm[R + c] == picked[c]);
    mli_free(ws);
}
