/* Groups of experts factored in the metric of what they read; the contract is that of
 * molae_factor_weighted in molae.h. All in f64: moments have eigenvalues of many magnitudes. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "../base/blas.h"
#include "../base/mem.h"
#include "../base/par.h"
#include "../base/real.h"
#include "eigen.h"
#include "gauge.h"
#include "rows.h"
#include "stack.h"

/* A group, from its shared factor to its experts' private ones. */
typedef struct {
    double *C; /* (W,W): pooled moments */
    double *B; /* (R,D), as stored */
    double *Q; /* (R,D), output side: (B B^T)^-1 B */
    double trace;
    molae_status status;
    const char *what;
    int64_t expert, info;
} group;

/* What a worker has to itself. */
typedef struct {
    double *L, *T, *Z;     /* (D,D) */
    double *w;             /* (D,) */
    double *H;             /* (W,W): moments of one expert, shrunk */
    double *S;             /* (F,F): the metric on the side of F */
    double *X, *E, *Y, *V; /* (F,D) */
    double *A;             /* (F,R) */
    double *tmp;
    char *work; /* of LAPACK */
    size_t work_bytes;
} scratch;

typedef struct {
    const molae_stack *s;
    const molae_factors *out;
    const molae_metric *metric;
    const int64_t *rank;
    molae_form form;
    int64_t W, max_R; /* width of the moments */
    int64_t *group_of;
    double *trace;      /* (E,) of the moments */
    molae_status *load; /* (E,) */
    group *groups;
    scratch *workers;
} job;

static int64_t
rank_of(const job *q, int64_t g)
{
    return q->rank != NULL ? q->rank[g] : 0;
}

static size_t
job_cut(job *q, char **p, int64_t workers)
{
    const molae_stack *s = q->s;
    const size_t D = (size_t)s->D, F = (size_t)s->F, W = (size_t)q->W, R = (size_t)q->max_R;
    const size_t square = mli_size_mul(D, D), rows = mli_size_mul(F, D);
    size_t n = 0, work = mli_eigen_work_f64(s->D, s->D);

    work = MLI_MAX(work, molae_gauge_ws_f64(MLI_MAX(q->max_R, 1), s->D));
    for (int64_t g = 0; g < s->G; g++)
        if (rank_of(q, g) > 0 && rank_of(q, g) < s->D)
            work = MLI_MAX(work, mli_gauge_complement_ws_f64(rank_of(q, g), s->D));
    MLI_CUT(n, p, q->group_of, (size_t)s->E, sizeof(int64_t));
    MLI_CUT(n, p, q->trace, (size_t)s->E, sizeof(double));
    MLI_CUT(n, p, q->load, (size_t)s->E, sizeof(molae_status));
    MLI_CUT(n, p, q->groups, (size_t)s->G, sizeof(group));
    MLI_CUT(n, p, q->workers, (size_t)workers, sizeof(scratch));
    for (int64_t g = 0; g < s->G; g++) {
        group none, *o = p ? &q->groups[g] : &none;
        const size_t B = mli_size_mul((size_t)rank_of(q, g), D);
        MLI_CUT(n, p, o->C, mli_size_mul(W, W), sizeof(double));
        MLI_CUT(n, p, o->B, B, sizeof(double));
        MLI_CUT(n, p, o->Q, s->side == MOLAE_SIDE_OUTPUT ? B : 0, sizeof(double));
    }
    for (int64_t t = 0; t < workers; t++) {
        scratch none, *o = p ? &q->workers[t] : &none;
        MLI_CUT(n, p, o->L, square, sizeof(double));
        MLI_CUT(n, p, o->T, square, sizeof(double));
        MLI_CUT(n, p, o->Z, square, sizeof(double));
        MLI_CUT(n, p, o->w, D, sizeof(double));
        MLI_CUT(n, p, o->H, mli_size_mul(W, W), sizeof(double));
        MLI_CUT(n, p, o->S, mli_size_mul(F, F), sizeof(double));
        MLI_CUT(n, p, o->X, rows, sizeof(double));
        MLI_CUT(n, p, o->E, rows, sizeof(double));
        MLI_CUT(n, p, o->Y, rows, sizeof(double));
        MLI_CUT(n, p, o->V, rows, sizeof(double));
        MLI_CUT(n, p, o->A, mli_size_mul(F, R), sizeof(double));
        MLI_CUT(n, p, o->tmp, mli_size_mul(MLI_ROWS_TILE, F), sizeof(double));
        MLI_CUT(n, p, o->work, work, 1);
        o->work_bytes = work;
    }
    return n;
}

static job
job_of(const molae_stack *s, const molae_metric *metric, const int64_t *rank)
{
    job q = {.s = s, .metric = metric, .rank = rank};

    q.W = s->side == MOLAE_SIDE_INPUT ? s->D : s->F;
    for (int64_t g = 0; rank != NULL && g < s->G; g++)
        q.max_R = MLI_MAX(q.max_R, rank[g]);
    return q;
}

size_t
molae_factor_weighted_ws(const molae_ctx *ctx, const molae_stack *s, const molae_metric *metric,
                         const int64_t *rank)
{
    molae_errinfo err;
    job q;

    if (mli_stack_check(s, rank, &err) < 0)
        return 0; /* the call itself says what is wrong */
    q = job_of(s, metric, rank);
    return job_cut(&q, NULL, ctx->num_threads);
}

/* --------------------------------------------------------------- moments */

static int
is_finite(const double *A, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        if (!isfinite(A[i]))
            return 0;
    return 1;
}

/* H = moments of expert e, widened. */
static void
load_moments(const job *q, int64_t e, double *H)
{
    (void)mli_widen_f64(H, q->metric->moment[e], q->metric->dtype, 0, q->W * q->W);
}

static double
trace_of(const double *A, int64_t n)
{
    double sum = 0;

    for (int64_t i = 0; i < n; i++)
        sum += A[i * n + i];
    return sum;
}

static void
add_ridge(const job *q, int64_t e, double *H)
{
    const double more = q->metric->ridge * q->trace[e] / (double)q->W;

    for (int64_t i = 0; i < q->W; i++)
        H[i * q->W + i] += more;
}

/* C = sum of the group's moments; the identity where no row reached any of them. */
static molae_status
pool(const job *q, group *o, int64_t g, double *H, double *S)
{
    const int64_t W = q->W, F = q->s->F;

    memset(o->C, 0, (size_t)(W * W) * sizeof(double));
    o->trace = 0;
    for (int64_t e = q->s->group_ptr[g]; e < q->s->group_ptr[g + 1]; e++) {
        load_moments(q, e, H);
        q->trace[e] = trace_of(H, W);
        if (!is_finite(H, W * W) || q->trace[e] < 0) {
            o->expert = e;
            o->what = "moments: NaN, Inf or a negative trace";
            return MOLAE_E_NONFINITE;
        }
        if (q->metric->rows != NULL &&
            (!mli_widen_f64(S, q->metric->rows[e], q->metric->dtype, 0, F * F) ||
             trace_of(S, F) < 0)) {
            o->expert = e;
            o->what = "row_metric: NaN, Inf or a negative trace";
            return MOLAE_E_NONFINITE;
        }
        o->trace += q->trace[e];
        add_ridge(q, e, H);
        for (int64_t i = 0; i < W * W; i++)
            o->C[i] += H[i];
    }
    for (int64_t i = 0; o->trace == 0 && i < W; i++)
        o->C[i * W + i] = 1;
    return MOLAE_OK;
}

/* Share of the pooled moments that is added to an expert's own. */
static double
borrowed(const job *q, const group *o, int64_t e)
{
    return o->trace == 0 ? 1 : q->metric->shrinkage * q->trace[e] / o->trace + q->metric->ridge;
}

/* H = moments of expert e, shrunk towards the pooled ones. */
static void
shrunk_moments(const job *q, const group *o, int64_t e, double *H)
{
    const double share = borrowed(q, o, e);

    load_moments(q, e, H);
    add_ridge(q, e, H);
    for (int64_t i = 0; i < q->W * q->W; i++)
        H[i] += share * o->C[i];
}

/* Trace of an expert's moments, shrunk, over that of the pooled ones. */
static double
omega(const job *q, const group *o, int64_t e)
{
    return (o->trace == 0 ? 0 : q->trace[e] / o->trace) + borrowed(q, o, e);
}

/* ---------------------------------------------------------- shared factor */

static void
mirror(double *A, int64_t n)
{
    for (int64_t j0 = 0; j0 < n; j0 += 16) /* strips that stay in cache */
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = MLI_MAX(j0, i + 1); j < MLI_MIN(j0 + 16, n); j++)
                A[j * n + i] = A[i * n + j];
}

/* Y = S X with the metric of the expert's rows on the other side: H_e on the output side, S_e on
 * the input side, where it may be left out. Returns Y, or X. H: scratch for the metric. */
static molae_status
weigh_rows(const job *q, const group *o, int64_t e, const double *X, double *H, double *Y,
           const double **weighed)
{
    const molae_stack *s = q->s;
    const int64_t D = s->D, F = s->F;

    *weighed = X;
    if (s->side == MOLAE_SIDE_OUTPUT)
        shrunk_moments(q, o, e, H);
    else if (q->metric->rows != NULL)
        (void)mli_widen_f64(H, q->metric->rows[e], q->metric->dtype, 0, F * F);
    else
        return MOLAE_OK;
    *weighed = Y;
    return mli_gemm_f64(0, 0, F, D, F, 1, H, F, X, D, 0, Y, D);
}

/* T = sum of X_e^T S_e X_e, full; input side: times omega_e. */
static molae_status
gram(const job *q, group *o, int64_t g, scratch *t)
{
    const molae_stack *s = q->s;
    const int64_t D = s->D, F = s->F, first = s->group_ptr[g];
    molae_status rc = MOLAE_OK;

    for (int64_t e = first; e < s->group_ptr[g + 1]; e++) {
        const double part = s->side == MOLAE_SIDE_INPUT ? omega(q, o, e) : 1;
        const double *Y;
        if (mli_rows_load_f64(t->X, s, e, 0, F, t->tmp, NULL) < 0) {
            o->expert = e;
            o->what = "NaN or Inf in the weights";
            return MOLAE_E_NONFINITE;
        }
        MLI_TRY(weigh_rows(q, o, e, t->X, t->S, t->Y, &Y));
        if (Y == t->X)
            MLI_TRY(mli_syrk_f64(1, D, F, part, t->X, D, e > first, t->T, D));
        else
            MLI_TRY(mli_gemm_f64(1, 0, D, D, F, part, t->X, D, Y, D, e > first, t->T, D));
    }
    if (s->side == MOLAE_SIDE_INPUT && q->metric->rows == NULL)
        mirror(t->T, D);
done:
    return rc;
}

/* L with C = L^T L; w: the eigenvalues, none below rounding. */
static molae_status
whitening(group *o, int64_t D, scratch *t)
{
    molae_status rc = MOLAE_OK;
    double least;

    memcpy(t->L, o->C, (size_t)(D * D) * sizeof(double));
    MLI_TRY(mli_eigen_f64(D, t->L, t->w, 0, D, t->work, t->work_bytes, &o->info));
    least = DBL_EPSILON * (double)D * t->w[D - 1];
    for (int64_t j = 0; j < D; j++) {
        t->w[j] = MLI_MAX(t->w[j], least);
        for (int64_t c = 0; c < D; c++)
            t->L[j * D + c] *= sqrt(t->w[j]);
    }
done:
    return rc;
}

/* Rows of A (n,D) become orthonormal and span the same space: Cholesky, twice for accuracy. S:
 * (n,n). */
static molae_status
orthonormalize(double *A, int64_t n, int64_t D, double *S, int64_t *info)
{
    molae_status rc = MOLAE_OK;

    for (int time = 0; time < 2; time++) {
        MLI_TRY(mli_syrk_f64(0, n, D, 1, A, D, 0, S, n));
        MLI_TRY(mli_potrf_f64(n, S, n, info));
        MLI_TRY(mli_trsm_f64(1, 1, n, D, S, n, A, D));
    }
done:
    return rc;
}

/* Eigenvectors as rows lo .. of T, of the group's Gram matrix in the metric; the spectrum. */
static molae_status
eigenvectors(const job *q, group *o, int64_t g, scratch *t, int64_t lo, int64_t count)
{
    const int64_t D = q->s->D;
    double *v = t->w, *spectrum = q->out->spectrum + g * D;
    molae_status rc = MOLAE_OK;

    MLI_TRY(gram(q, o, g, t));
    if (q->s->side == MOLAE_SIDE_INPUT) {
        MLI_TRY(whitening(o, D, t));
        MLI_TRY(mli_gemm_f64(0, 0, D, D, D, 1, t->L, D, t->T, D, 0, t->Z, D));
        MLI_TRY(mli_gemm_f64(0, 1, D, D, D, 1, t->Z, D, t->L, D, 0, t->T, D));
        v = t->Z; /* w is still needed */
    }
    MLI_TRY(mli_eigen_f64(D, t->T, v, lo, count, t->work, t->work_bytes, &o->info));
    for (int64_t j = 0; j < D; j++)
        spectrum[j] = sqrt(MLI_MAX(v[D - 1 - j], 0.0));
done:
    return rc;
}

/* B (R,D) orthonormal, of the R last eigenvectors; or, for narrow, D-R rows of Z that span what is
 * left out. */
static molae_status
basis(const job *q, group *o, int64_t g, scratch *t, int narrow)
{
    const int64_t D = q->s->D, R = q->rank[g], n = narrow ? D - R : R, lo = narrow ? 0 : D - R;
    const int output = q->s->side == MOLAE_SIDE_OUTPUT;
    double *rows = narrow ? t->Z : o->B, *u = t->T + lo * D;
    molae_status rc = MOLAE_OK;

    MLI_TRY(eigenvectors(q, o, g, t, lo, n));
    if (output) {
        for (int64_t j = 0; j < n; j++) /* largest first */
            memcpy(rows + j * D, u + (n - 1 - j) * D, (size_t)D * sizeof(double));
        goto done;
    }
    if (!narrow) /* B L^T = U: B = U w^-1 L. What B leaves out is spanned by U L of the others */
        for (int64_t j = 0; j < n; j++)
            for (int64_t c = 0; c < D; c++)
                u[j * D + c] /= t->w[c];
    MLI_TRY(mli_gemm_f64(0, 0, n, D, D, 1, u, D, t->L, D, 0, rows, D));
    MLI_TRY(orthonormalize(rows, n, D, t->L, &o->info));
done:
    return rc;
}

/* The identity, in which nothing is left out. */
static void
whole_basis(const job *q, group *o, int64_t g)
{
    const int64_t D = q->s->D;

    memset(o->B, 0, (size_t)(D * D) * sizeof(double));
    for (int64_t j = 0; j < D; j++)
        o->B[j * D + j] = 1;
    if (q->form == MOLAE_FORM_PLAIN)
        (void)mli_round_f64(q->out->shared[g], q->s->dtype, o->B, D * D);
}

static molae_status
shared_factor(const job *q, group *o, int64_t g, scratch *t)
{
    const int64_t D = q->s->D, R = rank_of(q, g);
    const int gauge = q->form == MOLAE_FORM_GAUGE, narrow = gauge && D - R < R;
    molae_status rc = MOLAE_OK;
    int finite = 1;

    o->what = "matrix product failed";
    MLI_TRY(pool(q, o, g, t->H, t->S));
    o->what = "eigenvalues of the moments did not converge";
    if (q->rank != NULL && gauge)
        for (int64_t j = 0; j < D; j++)
            q->out->perm[g][j] = (int32_t)j;
    if (R == 0 || R == D) {
        MLI_TRY(eigenvectors(q, o, g, t, 0, 0));
        if (R == D)
            whole_basis(q, o, g);
        goto done;
    }
    MLI_TRY(basis(q, o, g, t, narrow));
    o->what = "pivoted QR of the basis failed";
    if (gauge) {
        double *M = t->T;
        int32_t *perm = q->out->perm[g];
        if (narrow)
            MLI_TRY(mli_gauge_complement_f64(M, perm, t->Z, R, D, t->work, &o->info));
        else
            MLI_TRY(mli_gauge_f64(M, perm, o->B, R, D, t->work, &o->info));
        finite = mli_round_f64(q->out->shared[g], q->s->dtype, M, R * (D - R));
        mli_ungauge_f64(o->B, M, perm, R, D);
    } else {
        finite = mli_round_f64(q->out->shared[g], q->s->dtype, o->B, R * D);
    }
    o->what = "the shared factor overflows the storage type";
    MLI_TRY(finite ? MOLAE_OK : MOLAE_E_NONFINITE);
    if (q->s->side == MOLAE_SIDE_OUTPUT) {
        o->what = "the basis is not of full rank";
        memcpy(o->Q, o->B, (size_t)(R * D) * sizeof(double));
        MLI_TRY(mli_syrk_f64(0, R, D, 1, o->B, D, 0, t->L, R));
        MLI_TRY(mli_potrf_f64(R, t->L, R, &o->info));
        MLI_TRY(mli_trsm_f64(1, 1, R, D, t->L, R, o->Q, D));
        MLI_TRY(mli_trsm_f64(1, 0, R, D, t->L, R, o->Q, D));
    }
done:
    return rc;
}

static molae_status
shared_task(void *arg, int64_t g, int32_t worker)
{
    const job *q = arg;

    q->groups[g].status = shared_factor(q, &q->groups[g], g, &q->workers[worker]);
    return MOLAE_OK;
}

/* -------------------------------------------------------- private factors */

/* A = X C B^T (B C B^T)^-1 with the expert's shrunk moments C. */
static molae_status
input_private(const group *o, const scratch *t, int64_t R, int64_t F, int64_t D)
{
    double *Q = t->T, *S = t->Z;
    int64_t info;
    molae_status rc = MOLAE_OK;

    MLI_TRY(mli_gemm_f64(0, 0, R, D, D, 1, o->B, D, t->H, D, 0, Q, D));
    MLI_TRY(mli_gemm_f64(0, 1, R, R, D, 1, Q, D, o->B, D, 0, S, R));
    MLI_TRY(mli_potrf_f64(R, S, R, &info));
    MLI_TRY(mli_trsm_f64(1, 1, R, D, S, R, Q, D));
    MLI_TRY(mli_trsm_f64(1, 0, R, D, S, R, Q, D));
    MLI_TRY(mli_gemm_f64(0, 1, F, R, D, 1, t->X, D, Q, D, 0, t->A, R));
done:
    return rc;
}

/* *sum = squared norm of E (F,D) in the expert's metric, whose moments are in H. */
static molae_status
weighted_norm(const job *q, int64_t e, const double *E, const scratch *t, double *sum)
{
    const int64_t F = q->s->F, D = q->s->D;
    const double *Y, *Z = E;
    molae_status rc = MOLAE_OK;

    MLI_TRY(weigh_rows(q, &q->groups[q->group_of[e]], e, E, t->S, t->Y, &Y));
    if (q->s->side == MOLAE_SIDE_INPUT) {
        MLI_TRY(mli_gemm_f64(0, 0, F, D, D, 1, E, D, t->H, D, 0, t->V, D));
        Z = t->V;
    }
    *sum = 0;
    for (int64_t r = 0; r < F; r++) {
        double row = 0;
        for (int64_t c = 0; c < D; c++)
            row += Y[r * D + c] * Z[r * D + c];
        *sum += row;
    }
done:
    return rc;
}

static molae_status
private_factor(const job *q, int64_t e, const scratch *t)
{
    const molae_stack *s = q->s;
    const int64_t g = q->group_of[e], R = rank_of(q, g), F = s->F, D = s->D;
    const group *o = &q->groups[g];
    const size_t at = (size_t)((e - s->group_ptr[g]) * F * R) * mli_dtype_size(s->dtype);
    molae_status rc = MOLAE_OK;

    (void)mli_rows_load_f64(t->X, s, e, 0, F, t->tmp, NULL); /* found finite before */
    if (s->side == MOLAE_SIDE_INPUT)
        shrunk_moments(q, o, e, t->H);
    if (R == D)
        memcpy(t->A, t->X, (size_t)(F * D) * sizeof(double));
    else if (R > 0 && s->side == MOLAE_SIDE_INPUT)
        MLI_TRY(input_private(o, t, R, F, D));
    else if (R > 0)
        MLI_TRY(mli_gemm_f64(0, 1, F, R, D, 1, t->X, D, o->Q, D, 0, t->A, R));
    if (R > 0)
        MLI_TRY(mli_rows_store_f64((char *)q->out->private_[g] + at, s, 0, F, R, t->A, t->tmp));
    if (q->out->residual == NULL)
        goto done;
    MLI_TRY(weighted_norm(q, e, t->X, t, &q->out->energy[e]));
    memcpy(t->E, t->X, (size_t)(F * D) * sizeof(double));
    if (R > 0)
        MLI_TRY(mli_gemm_f64(0, 0, F, D, R, -1, t->A, R, o->B, D, 1, t->E, D));
    MLI_TRY(weighted_norm(q, e, t->E, t, &q->out->residual[e]));
done:
    return rc;
}

static molae_status
private_task(void *arg, int64_t e, int32_t worker)
{
    const job *q = arg;

    q->load[e] = private_factor(q, e, &q->workers[worker]);
    return MOLAE_OK;
}

/* -------------------------------------------------------------- the whole */

static molae_status
metric_check(const job *q, molae_errinfo *err)
{
    const molae_metric *m = q->metric;

    err->what = "moments: expected float32 or float64, one matrix an expert";
    if (m->moment == NULL || (m->dtype != MOLAE_F32 && m->dtype != MOLAE_F64))
        return MOLAE_E_ARG;
    err->what = "shrinkage, ridge: expected finite numbers, shrinkage >= 0 and ridge > 0";
    if (!(m->shrinkage >= 0 && isfinite(m->shrinkage) && m->ridge > 0 && isfinite(m->ridge)))
        return MOLAE_E_ARG;
    err->what = "row_metric: for the input side alone";
    if (m->rows != NULL && q->s->side == MOLAE_SIDE_OUTPUT)
        return MOLAE_E_ARG;
    err->what = NULL;
    return MOLAE_OK;
}

molae_status
molae_factor_weighted(const molae_ctx *ctx, const molae_factors *out, const molae_stack *s,
                      const molae_metric *metric, const int64_t *rank, molae_form form, void *ws,
                      size_t ws_bytes, molae_errinfo *err)
{
    char *p = ws;
    job q;
    molae_status rc = mli_stack_check(s, rank, err);

    if (rc < 0)
        return rc;
    q = job_of(s, metric, rank);
    MLI_TRY(metric_check(&q, err));
    if (ws_bytes < molae_factor_weighted_ws(ctx, s, metric, rank)) {
        err->what = "ws: too small";
        return MOLAE_E_ARG;
    }
    q.out = out;
    q.form = form;
    (void)job_cut(&q, &p, ctx->num_threads);
    for (int64_t g = 0; g < s->G; g++) {
        q.groups[g].expert = -1;
        for (int64_t e = s->group_ptr[g]; e < s->group_ptr[g + 1]; e++)
            q.group_of[e] = g;
    }
    MLI_TRY(mli_parallel_for(ctx, s->G, shared_task, &q));
    for (int64_t g = 0; g < s->G; g++)
        if (q.groups[g].status < 0) {
            *err = (molae_errinfo){q.groups[g].what, q.groups[g].expert, g, q.groups[g].info};
            return q.groups[g].status;
        }
    if (rank == NULL)
        goto done;
    MLI_TRY(mli_parallel_for(ctx, s->E, private_task, &q));
    for (int64_t e = 0; e < s->E; e++)
        if (q.load[e] < 0) {
            err->expert = e;
            err->what = q.load[e] == MOLAE_E_NONFINITE
                            ? "the private factor overflows the storage type"
                            : "the moments leave the private factor open; take a larger ridge";
            return q.load[e];
        }
done:
    return rc;
}
