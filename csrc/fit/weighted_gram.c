/* A group's moments and Gram matrix, and the metric of an expert's rows; see weighted.h. */
#include <math.h>
#include <string.h>

#include "../base/blas.h"
#include "../base/real.h"
#include "rows.h"
#include "weighted.h"

typedef mli_weighted job;
typedef mli_weighted_group group;
typedef mli_weighted_scratch scratch;

/* Rows of the Gram matrix that are computed at once; the half below the diagonal is not. */
enum { PANEL = 128 };

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

molae_status
mli_weighted_pool(const job *q, group *o, int64_t g, double *H, double *S)
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

void
mli_weighted_moments(const job *q, int64_t e, double *H)
{
    const group *o = &q->groups[q->group_of[e]];
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

/* ------------------------------------------------------- the group's Gram matrix */

/* S = the metric of an expert's rows; 0 where there is none. */
static int
row_metric(const job *q, int64_t e, double *S)
{
    if (q->s->side == MOLAE_SIDE_OUTPUT)
        mli_weighted_moments(q, e, S);
    else if (q->metric->rows != NULL)
        (void)mli_widen_f64(S, q->metric->rows[e], q->metric->dtype, 0, q->s->F * q->s->F);
    else
        return 0;
    return 1;
}

molae_status
mli_weighted_rows(const job *q, int64_t e, const double *X, int64_t n, double *S, double *Y,
                  const double **weighed)
{
    const int64_t F = q->s->F;

    *weighed = X;
    if (!row_metric(q, e, S))
        return MOLAE_OK;
    *weighed = Y;
    return mli_gemm_f64(0, 0, F, n, F, 1, S, F, X, n, 0, Y, n);
}

double
mli_weighted_narrow(float *y, const double *x, int64_t n)
{
    double tops[8] = {0}, top = 0, down; /* several at once, which the compiler makes a vector */
    int exponent;

    for (int64_t i = 0; i < n / 8 * 8; i += 8)
        for (int64_t j = 0; j < 8; j++)
            tops[j] = fabs(x[i + j]) > tops[j] ? fabs(x[i + j]) : tops[j];
    for (int64_t i = n / 8 * 8; i < n; i++)
        tops[0] = MLI_MAX(tops[0], fabs(x[i]));
    for (int64_t j = 0; j < 8; j++)
        top = MLI_MAX(top, tops[j]);
    (void)frexp(top, &exponent);
    exponent = MLI_MAX(exponent - 1, -1000); /* the inverse is finite too */
    down = ldexp(1, -exponent);
    for (int64_t i = 0; i < n; i++)
        y[i] = (float)(x[i] * down);
    return ldexp(1, exponent);
}

molae_status
mli_weighted_rows_narrow(const job *q, int64_t e, const float *X, int64_t n, const scratch *t,
                         float *Y, const float **G, double *s)
{
    const int64_t F = q->s->F;

    *G = X;
    *s = 1;
    if (!row_metric(q, e, t->S))
        return MOLAE_OK;
    *G = Y;
    *s = mli_weighted_narrow(t->S32, t->S, F * F);
    return mli_gemm_f32(0, 0, F, n, F, 1, t->S32, F, X, n, 0, Y, n);
}

static molae_status
load_rows(const job *q, group *o, int64_t e, double *X, double *tmp)
{
    const molae_status rc = mli_rows_load_f64(X, q->s, e, 0, q->s->F, tmp, NULL);

    if (rc < 0) {
        o->expert = e;
        o->what = "NaN or Inf in the weights";
    }
    return rc;
}

/* What row i of G = X_e^T S_e X_e and its image below the diagonal add to the energy: on the input
 * side to <G, C'_e>, where C'_e is the expert's own moments, some of the identity and a share of
 * the pooled ones, on the output side to the trace. row: from the diagonal on. own: (D,). */
static double
energy_of_row(const job *q, int64_t e, const double *row, int64_t i, double *own)
{
    const group *o = &q->groups[q->group_of[e]];
    const int64_t at = i * q->s->D + i, n = q->s->D - i;
    const double *C = o->C + at;
    const double share = borrowed(q, o, e);
    double sum = 0;

    if (q->s->side == MOLAE_SIDE_OUTPUT)
        return row[0];
    (void)mli_widen_f64(own, q->metric->moment[e], q->metric->dtype, at, n);
    for (int64_t j = 1; j < n; j++)
        sum += row[j] * (own[j] + share * C[j]);
    own[0] += q->metric->ridge * q->trace[e] / (double)q->W;
    return row[0] * (own[0] + share * C[0]) + 2 * sum;
}

/* X (F,D), Y = S X and what their product is to be multiplied with, in one of the precisions. */
typedef struct {
    const double *X, *Y;
    const float *X32, *Y32;
    double scale;
} weighed;

static molae_status
weigh(const job *q, int64_t e, const scratch *t, weighed *w)
{
    const int64_t F = q->s->F, D = q->s->D;
    double x, y;
    molae_status rc;

    *w = (weighed){.X = t->X, .X32 = (float *)t->E, .scale = 1};
    if (!q->narrow)
        return mli_weighted_rows(q, e, t->X, D, t->S, t->Y, &w->Y);
    x = mli_weighted_narrow((float *)t->E, t->X, F * D);
    rc = mli_weighted_rows_narrow(q, e, w->X32, D, t, (float *)t->Y, &w->Y32, &y);
    w->scale = x * x * y;
    return rc;
}

/* Rows i0 .. i0+ni-1 of X^T Y from the diagonal on, into P (ni,D-i0). */
static molae_status
gram_panel(const job *q, const weighed *w, int64_t i0, int64_t ni, double *P, float *P32)
{
    const int64_t D = q->s->D, F = q->s->F, n = D - i0;
    molae_status rc = MOLAE_OK;

    if (!q->narrow)
        return mli_gemm_f64(1, 0, ni, n, F, 1, w->X + i0, D, w->Y + i0, D, 0, P, n);
    MLI_TRY(mli_gemm_f32(1, 0, ni, n, F, 1, w->X32 + i0, D, w->Y32 + i0, D, 0, P32, n));
    for (int64_t i = 0; i < ni * n; i++)
        P[i] = w->scale * (double)P32[i];
done:
    return rc;
}

molae_status
mli_weighted_gram(const job *q, group *o, int64_t g, scratch *t)
{
    const molae_stack *s = q->s;
    const int64_t D = s->D, first = s->group_ptr[g];
    const int measured = q->rank != NULL && q->out->residual != NULL;
    molae_status rc = MOLAE_OK;

    for (int64_t e = first; e < s->group_ptr[g + 1]; e++) {
        const double part = s->side == MOLAE_SIDE_INPUT ? omega(q, o, e) : 1;
        double energy = 0;
        weighed w;
        MLI_TRY(load_rows(q, o, e, t->X, t->tmp));
        MLI_TRY(weigh(q, e, t, &w));
        for (int64_t i0 = 0; i0 < D; i0 += PANEL) {
            const int64_t n = D - i0, ni = MLI_MIN((int64_t)PANEL, n);
            double *P = t->Z;
            MLI_TRY(gram_panel(q, &w, i0, ni, P, (float *)t->L));
            for (int64_t i = 0; i < ni; i++) {
                const double *row = P + i * n + i;
                double *to = t->T + (i0 + i) * D + i0 + i;
                if (measured)
                    energy += energy_of_row(q, e, row, i0 + i, t->w);
                for (int64_t j = 0; j < n - i; j++)
                    to[j] = (e > first ? to[j] : 0) + part * row[j];
            }
        }
        q->energy[e] = energy;
    }
done:
    return rc;
}

molae_status
mli_weighted_stack(const job *q, group *o, int64_t g, scratch *t)
{
    const molae_stack *s = q->s;
    const int64_t D = s->D, F = s->F;
    double *Z = t->Z;
    molae_status rc = MOLAE_OK;

    for (int64_t e = s->group_ptr[g]; e < s->group_ptr[g + 1]; e++, Z += F * D) {
        MLI_TRY(load_rows(q, o, e, Z, t->tmp));
        mli_weighted_moments(q, e, t->H);
        MLI_TRY(mli_potrf_f64(F, t->H, F, &o->info));
        MLI_TRY(mli_trmm_f64(0, F, D, t->H, F, Z, D));
        q->energy[e] = mli_sumsq_f64(Z, F * D);
    }
done:
    return rc;
}
