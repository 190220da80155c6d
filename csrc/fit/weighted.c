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
#include "weighted.h"

typedef mli_weighted job;
typedef mli_weighted_group group;
typedef mli_weighted_scratch scratch;

/* Smallest eigenvalue, over the largest, down to which a Gram matrix of the stack's rows tells the
 * directions of its columns. */
static const double ROWS_TELL = 1e-10;

static int64_t
rank_of(const job *q, int64_t g)
{
    return q->rank != NULL ? q->rank[g] : 0;
}

/* Whether group g is of the same experts as the one before it. */
static int
goes_on(const job *q, int64_t g)
{
    const molae_stack *s = q->s;
    const int64_t at = s->group_ptr[g], k = s->group_ptr[g + 1] - at;

    if (g == 0 || at - s->group_ptr[g - 1] != k)
        return 0;
    for (int64_t e = at; e < at + k; e++)
        if (s->W[e] != s->W[e - k] || q->metric->moment[e] != q->metric->moment[e - k] ||
            (q->metric->rows != NULL && q->metric->rows[e] != q->metric->rows[e - k]))
            return 0;
    return 1;
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
    MLI_CUT(n, p, q->first, (size_t)s->G + 1, sizeof(int64_t));
    MLI_CUT(n, p, q->trace, (size_t)s->E, sizeof(double));
    MLI_CUT(n, p, q->energy, (size_t)s->E, sizeof(double));
    MLI_CUT(n, p, q->load, (size_t)s->E, sizeof(molae_status));
    MLI_CUT(n, p, q->groups, (size_t)s->G, sizeof(group));
    MLI_CUT(n, p, q->workers, (size_t)workers, sizeof(scratch));
    for (int64_t g = 0; g < s->G; g++) {
        group none, *o = p ? &q->groups[g] : &none;
        const size_t r = (size_t)rank_of(q, g);
        MLI_CUT(n, p, o->C, goes_on(q, g) ? 0 : mli_size_mul(W, W), sizeof(double));
        MLI_CUT(n, p, o->N, mli_size_mul(r, D), sizeof(double));
        MLI_CUT(n, p, o->U, s->side == MOLAE_SIDE_OUTPUT ? mli_size_mul(r, r) : 0, sizeof(double));
    }
    for (int64_t t = 0; t < workers; t++) {
        scratch none, *o = p ? &q->workers[t] : &none;
        MLI_CUT(n, p, o->L, square, sizeof(double));
        MLI_CUT(n, p, o->T, square, sizeof(double));
        MLI_CUT(n, p, o->Z, square, sizeof(double));
        MLI_CUT(n, p, o->Q, square, sizeof(double));
        MLI_CUT(n, p, o->w, D, sizeof(double));
        MLI_CUT(n, p, o->H, mli_size_mul(W, W), sizeof(double));
        MLI_CUT(n, p, o->S, mli_size_mul(F, F), sizeof(double));
        MLI_CUT(n, p, o->X, rows, sizeof(double));
        MLI_CUT(n, p, o->E, rows, sizeof(double));
        MLI_CUT(n, p, o->Y, rows, sizeof(double));
        MLI_CUT(n, p, o->V, rows, sizeof(double));
        MLI_CUT(n, p, o->A, mli_size_mul(F, R), sizeof(double));
        MLI_CUT(n, p, o->S32, q->narrow ? mli_size_mul(F, F) : 0, sizeof(float));
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
    q.narrow = s->dtype != MOLAE_F64 && metric->dtype == MOLAE_F32;
    for (int64_t g = 0; rank != NULL && g < s->G; g++)
        q.max_R = MLI_MAX(q.max_R, rank[g]);
    return q;
}

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

size_t
molae_factor_weighted_ws(const molae_ctx *ctx, const molae_stack *s, const molae_metric *metric,
                         const int64_t *rank)
{
    molae_errinfo err;
    job q;

    q = job_of(s, metric, rank);
    if (mli_stack_check(s, rank, &err) < 0 || metric_check(&q, &err) < 0)
        return 0; /* the call itself says what is wrong */
    return job_cut(&q, NULL, ctx->num_threads);
}

/* ---------------------------------------------------------- shared factor */

/* L with C + a I = L^T L, upper triangular. a is 0 unless rounding of the moments, more than their
 * ridge, has left C indefinite: then it is tried from rounding up to the trace. */
static molae_status
whitening(group *o, int64_t D, scratch *t)
{
    double more = 0;
    molae_status rc;

    for (;;) {
        memcpy(t->L, o->C, (size_t)(D * D) * sizeof(double));
        for (int64_t j = 0; j < D; j++)
            t->L[j * D + j] += more;
        rc = mli_potrf_f64(D, t->L, D, &o->info);
        if (rc != MOLAE_E_LAPACK || more >= o->trace)
            break;
        more = more > 0 ? 8 * more : o->trace * DBL_EPSILON;
    }
    if (rc == MOLAE_E_LAPACK)
        o->what = "the pooled moments are not positive definite; take a larger ridge";
    return rc;
}

/* Rows of A (n,D) become orthonormal and span the same space: Cholesky, and again for accuracy
 * where that counts. S: (n,n). */
static molae_status
orthonormalize(double *A, int64_t n, int64_t D, int times, double *S, int64_t *info)
{
    molae_status rc = MOLAE_OK;

    for (int time = 0; time < times; time++) {
        MLI_TRY(mli_syrk_f64(0, n, D, 1, A, D, 0, S, n));
        MLI_TRY(mli_potrf_f64(n, S, n, info));
        MLI_TRY(mli_trsm_f64(1, n, D, S, n, A, D));
    }
done:
    return rc;
}

static void
spectrum_of(const job *q, int64_t g, const double *w, int64_t n)
{
    double *spectrum = q->out->spectrum + g * q->s->D;

    for (int64_t j = 0; j < q->s->D; j++)
        spectrum[j] = j < n ? sqrt(MLI_MAX(w[n - 1 - j], 0.0)) : 0;
}

/* Output side where the group has fewer rows than columns: the spectrum, and in the last R rows of
 * T (n,n), n the rows, what turns the stack Z (n,D) into its first R directions, by way of the
 * rows' Gram matrix Z Z^T. *found is 0 where that way is closed: where some H'_e is indefinite, or
 * the R-th eigenvalue is lost in rounding. */
static molae_status
by_rows(const job *q, group *o, int64_t g, scratch *t, int64_t R, int *found)
{
    const int64_t D = q->s->D, n = (q->s->group_ptr[g + 1] - q->s->group_ptr[g]) * q->s->F;
    double *U = t->T + (n - R) * n;
    molae_status rc = mli_weighted_stack(q, o, g, t);

    *found = 0;
    if (rc == MOLAE_E_LAPACK)
        return MOLAE_OK;
    MLI_TRY(rc);
    MLI_TRY(mli_syrk_f64(0, n, D, 1, t->Z, D, 0, t->T, n));
    MLI_TRY(mli_eigen_f64(n, t->T, t->w, n - R, R, t->work, t->work_bytes, &o->info));
    if (R > 0 && !(t->w[n - R] > ROWS_TELL * t->w[n - 1]))
        goto done;
    *found = 1;
    spectrum_of(q, g, t->w, n);
    for (int64_t j = 0; j < R; j++)
        for (int64_t c = 0; c < n; c++)
            U[j * n + c] /= sqrt(t->w[n - R + j]);
done:
    return rc;
}

/* Eigenvectors as rows lo .. of T, of the group's Gram matrix in the metric; the spectrum. */
static molae_status
eigenvectors(const job *q, group *o, int64_t g, scratch *t, int64_t lo, int64_t count)
{
    const int64_t D = q->s->D;
    molae_status rc = MOLAE_OK;

    MLI_TRY(mli_weighted_gram(q, o, g, t));
    if (q->s->side == MOLAE_SIDE_INPUT) {
        MLI_TRY(whitening(o, D, t));
        MLI_TRY(mli_sygst_f64(D, t->T, D, t->L, D, &o->info));
    }
    MLI_TRY(mli_eigen_f64(D, t->T, t->w, lo, count, t->work, t->work_bytes, &o->info));
    spectrum_of(q, g, t->w, D);
done:
    return rc;
}

/* Whether the rank is better reached by what it leaves out. */
static int
is_narrow(const job *q, int64_t R)
{
    return q->form == MOLAE_FORM_GAUGE && q->s->D - R < R;
}

/* What the ranks of a run share: moments, spectrum, and as many eigenvectors as one of them needs,
 * in T. *rows is 1 where they are those of the rows. */
static molae_status
decompose(const job *q, group *o, int64_t run, scratch *t, int *rows)
{
    const molae_stack *s = q->s;
    const int64_t D = s->D, g = q->first[run];
    int64_t most = 0, lo = D, hi = 0;
    molae_status rc = MOLAE_OK;

    *rows = 0;
    o->what = "matrix product failed";
    MLI_TRY(mli_weighted_pool(q, o, g, t->H, t->S));
    o->what = "eigenvalues of the moments did not converge";
    for (int64_t i = g; i < q->first[run + 1]; i++) {
        const int64_t R = rank_of(q, i);
        most = MLI_MAX(most, R);
        if (R == 0 || R == D)
            continue;
        lo = MLI_MIN(lo, is_narrow(q, R) ? 0 : D - R);
        hi = MLI_MAX(hi, is_narrow(q, R) ? D - R : D);
    }
    if (s->side == MOLAE_SIDE_OUTPUT && s->F * (s->group_ptr[g + 1] - s->group_ptr[g]) < D)
        MLI_TRY(by_rows(q, o, g, t, most, rows));
    if (!*rows)
        MLI_TRY(eigenvectors(q, o, g, t, MLI_MIN(lo, hi), MLI_MAX(hi - lo, 0)));
done:
    return rc;
}

/* B (R,D), orthonormal, of the R last eigenvectors; or, for narrow, D-R rows that span what is left
 * out. To `to`. */
static molae_status
basis(const job *q, group *o, int64_t g, scratch *t, int rows, int narrow, double *to)
{
    const int64_t D = q->s->D, R = q->rank[g], n = narrow ? D - R : R, lo = narrow ? 0 : D - R;
    const double *u = t->T + lo * D;
    int times = q->form == MOLAE_FORM_GAUGE ? 1 : 2; /* the gauge wants a span alone */
    molae_status rc = MOLAE_OK;

    if (rows) {
        const int64_t all = (q->s->group_ptr[g + 1] - q->s->group_ptr[g]) * q->s->F;
        times = 1;
        MLI_TRY(mli_gemm_f64(0, 0, R, D, all, 1, t->T + (all - R) * all, all, t->Z, D, 0, to, D));
    } else {
        for (int64_t j = 0; j < n; j++) /* largest first */
            memcpy(to + j * D, u + (n - 1 - j) * D, (size_t)D * sizeof(double));
        if (q->s->side == MOLAE_SIDE_OUTPUT)
            goto done;
        if (narrow) /* B L^T = U: what B leaves out is spanned by U L of the others */
            MLI_TRY(mli_trmm_right_f64(0, n, D, t->L, D, to, D));
        else
            MLI_TRY(mli_trsm_right_f64(1, n, D, t->L, D, to, D));
    }
    MLI_TRY(orthonormalize(to, n, D, times, t->Q, &o->info));
done:
    return rc;
}

/* The identity, in which nothing is left out. */
static void
whole_basis(const job *q, group *o, int64_t g)
{
    const int64_t D = q->s->D;

    if (q->form == MOLAE_FORM_GAUGE)
        return;
    memset(o->N, 0, (size_t)(D * D) * sizeof(double));
    for (int64_t j = 0; j < D; j++)
        o->N[j * D + j] = 1;
    (void)mli_round_f64(q->out->shared[g], q->s->dtype, o->N, D * D);
}

/* U of B B^T = U^T U. */
static molae_status
output_normal(group *o, int64_t R, int64_t D)
{
    const int64_t n = D - o->lead;
    molae_status rc = MOLAE_OK;

    MLI_TRY(mli_syrk_f64(0, R, n, 1, o->N, n, 0, o->U, R));
    for (int64_t j = 0; o->lead > 0 && j < R; j++)
        o->U[j * R + j] += 1;
    MLI_TRY(mli_potrf_f64(R, o->U, R, &o->info));
done:
    return rc;
}

/* The shared factor of one group, from what its run has found. */
static molae_status
shared_factor(const job *q, group *o, int64_t g, scratch *t, int rows)
{
    const int64_t D = q->s->D, R = rank_of(q, g);
    const int gauge = q->form == MOLAE_FORM_GAUGE, narrow = !rows && is_narrow(q, R);
    int finite;
    molae_status rc = MOLAE_OK;

    o->perm = NULL;
    o->lead = q->rank != NULL && gauge ? R : 0;
    if (q->rank != NULL && gauge) {
        for (int64_t j = 0; j < D; j++)
            q->out->perm[g][j] = (int32_t)j;
        o->perm = q->out->perm[g];
    }
    if (R == 0 || R == D) {
        if (R == D)
            whole_basis(q, o, g);
        goto done;
    }
    o->what = "the basis is not of full rank";
    MLI_TRY(basis(q, o, g, t, rows, narrow, narrow ? t->Z : o->N));
    o->what = "pivoted QR of the basis failed";
    if (gauge) {
        int32_t *perm = q->out->perm[g];
        if (narrow) {
            MLI_TRY(mli_gauge_complement_f64(o->N, perm, t->Z, R, D, t->work, &o->info));
        } else {
            MLI_TRY(mli_gauge_f64(t->Q, perm, o->N, R, D, t->work, &o->info));
            memcpy(o->N, t->Q, (size_t)(R * (D - R)) * sizeof(double));
        }
    }
    finite = mli_round_f64(q->out->shared[g], q->s->dtype, o->N, R * (D - o->lead));
    o->what = "the shared factor overflows the storage type";
    MLI_TRY(finite ? MOLAE_OK : MOLAE_E_NONFINITE);
    o->what = "the basis is not of full rank";
    if (q->s->side == MOLAE_SIDE_OUTPUT)
        MLI_TRY(output_normal(o, R, D));
done:
    return rc;
}

/* What the first group of a run knows of its experts goes to another. */
static void
take_over(const job *q, int64_t from, int64_t g)
{
    const molae_stack *s = q->s;
    const int64_t a = s->group_ptr[from], b = s->group_ptr[g], k = s->group_ptr[g + 1] - b;

    q->groups[g].C = q->groups[from].C;
    q->groups[g].trace = q->groups[from].trace;
    memcpy(q->trace + b, q->trace + a, (size_t)k * sizeof(double));
    memcpy(q->energy + b, q->energy + a, (size_t)k * sizeof(double));
    memcpy(q->out->spectrum + g * s->D, q->out->spectrum + from * s->D,
           (size_t)s->D * sizeof(double));
}

static molae_status
shared_task(void *arg, int64_t run, int32_t worker)
{
    const job *q = arg;
    const int64_t first = q->first[run];
    scratch *t = &q->workers[worker];
    int rows;

    q->groups[first].status = decompose(q, &q->groups[first], run, t, &rows);
    for (int64_t g = first; q->groups[first].status >= 0 && g < q->first[run + 1]; g++) {
        if (g > first)
            take_over(q, first, g);
        q->groups[g].status = shared_factor(q, &q->groups[g], g, t, rows);
    }
    return MOLAE_OK;
}

static molae_status
private_task(void *arg, int64_t e, int32_t worker)
{
    const job *q = arg;

    q->load[e] = mli_weighted_private(q, e, &q->workers[worker]);
    return MOLAE_OK;
}

/* -------------------------------------------------------------- the whole */

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
        if (!goes_on(&q, g))
            q.first[q.runs++] = g;
        q.first[q.runs] = g + 1;
        q.groups[g].status = MOLAE_OK;
        q.groups[g].expert = -1;
        for (int64_t e = s->group_ptr[g]; e < s->group_ptr[g + 1]; e++)
            q.group_of[e] = g;
    }
    MLI_TRY(mli_parallel_for(ctx, q.runs, shared_task, &q));
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
