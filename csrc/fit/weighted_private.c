/* The experts' private factors in the metric, and what they lose; see molae_factor_weighted.
 * The columns are in the order of the gauge form throughout, in which B = [I | N] spares the
 * products with the identity. */
#include <string.h>

#include "../base/blas.h"
#include "../base/real.h"
#include "rows.h"
#include "weighted.h"

/* Rows of S = Q B^T that are computed at once; the half below the diagonal is not. */
enum { PANEL = 256 };

/* Share of the energy below which a residual as the difference of two sums has lost too many
 * digits and is measured directly: with sums in f64, and with some of it in f32. */
static const double CANCELLED = 1e-5, CANCELLED_32 = 1e-3;

/* Columns of X (n,D) in the order of perm. row: (D,). */
static void
permute_columns(double *X, int64_t n, const int32_t *perm, int64_t D, double *row)
{
    for (int64_t r = 0; perm != NULL && r < n; r++) {
        double *x = X + r * D;
        for (int64_t c = 0; c < D; c++)
            row[c] = x[perm[c]];
        memcpy(x, row, (size_t)D * sizeof(double));
    }
}

/* The expert's shrunk moments, input side, rows and columns in the order of perm: in T or H. */
static const double *
ordered_moments(const mli_weighted *q, int64_t e, const mli_weighted_scratch *t)
{
    const mli_weighted_group *o = &q->groups[q->group_of[e]];
    const int64_t D = q->s->D;

    mli_weighted_moments(q, e, t->H);
    if (o->perm == NULL)
        return t->H;
    for (int64_t r = 0; r < D; r++) {
        const double *from = t->H + o->perm[r] * D;
        double *to = t->T + r * D;
        for (int64_t c = 0; c < D; c++)
            to[c] = from[o->perm[c]];
    }
    return t->T;
}

/* Upper triangle of S (R,R) = Q B^T for Q (R,D). */
static molae_status
times_basis(const mli_weighted_group *o, const double *Q, double *S, int64_t R, int64_t D)
{
    const int64_t n = D - o->lead;
    molae_status rc = MOLAE_OK;

    for (int64_t i0 = 0; i0 < R; i0 += PANEL) {
        const int64_t ni = MLI_MIN((int64_t)PANEL, R - i0);
        for (int64_t i = i0; o->lead > 0 && i < i0 + ni; i++)
            memcpy(S + i * R + i0, Q + i * D + i0, (size_t)(R - i0) * sizeof(double));
        MLI_TRY(mli_gemm_f64(0, 1, ni, R - i0, n, 1, Q + i0 * D + o->lead, D, o->N + i0 * n, n,
                             o->lead > 0, S + i0 * R + i0, R));
    }
done:
    return rc;
}

/* G (F,R) = X Q^T for Q (R,D) in Z. T is overwritten. */
static molae_status
times_moments(const mli_weighted *q, const mli_weighted_scratch *t, double *G, int64_t R)
{
    const int64_t F = q->s->F, D = q->s->D;
    float *X32 = (float *)t->E, *Q32 = (float *)t->T, *G32 = (float *)t->V;
    double scale;
    molae_status rc = MOLAE_OK;

    if (!q->narrow)
        return mli_gemm_f64(0, 1, F, R, D, 1, t->X, D, t->Z, D, 0, G, R);
    scale = mli_weighted_narrow(X32, t->X, F * D);
    scale *= mli_weighted_narrow(Q32, t->Z, R * D);
    MLI_TRY(mli_gemm_f32(0, 1, F, R, D, 1, X32, D, Q32, D, 0, G32, R));
    for (int64_t i = 0; i < F * R; i++)
        G[i] = scale * (double)G32[i];
done:
    return rc;
}

/* G = X C B^T, (F,R), and *U with U^T U = B C B^T, C the expert's shrunk moments; on the output
 * side, where they drop out, C = I. */
static molae_status
normal_equations(const mli_weighted *q, int64_t e, const mli_weighted_scratch *t, double *G,
                 const double **U)
{
    const mli_weighted_group *o = &q->groups[q->group_of[e]];
    const int64_t F = q->s->F, D = q->s->D, R = q->rank[q->group_of[e]], n = D - o->lead;
    const double *C;
    double *Q = t->Z;
    int64_t info;
    molae_status rc = MOLAE_OK;

    if (q->s->side == MOLAE_SIDE_OUTPUT) {
        for (int64_t r = 0; o->lead > 0 && r < F; r++)
            memcpy(G + r * R, t->X + r * D, (size_t)R * sizeof(double));
        MLI_TRY(mli_gemm_f64(0, 1, F, R, n, 1, t->X + o->lead, D, o->N, n, o->lead > 0, G, R));
        *U = o->U;
        goto done;
    }
    C = ordered_moments(q, e, t);
    if (o->lead > 0)
        memcpy(Q, C, (size_t)(R * D) * sizeof(double));
    MLI_TRY(mli_gemm_f64(0, 0, R, D, n, 1, o->N, n, C + o->lead * D, D, o->lead > 0, Q, D));
    MLI_TRY(times_basis(o, Q, t->L, R, D));
    MLI_TRY(mli_potrf_f64(R, t->L, R, &info));
    MLI_TRY(times_moments(q, t, G, R));
    *U = t->L;
done:
    return rc;
}

static double
dot(const double *x, const double *y, int64_t rows, int64_t n)
{
    double sum = 0;

    for (int64_t r = 0; r < rows; r++) {
        double part = 0;
        for (int64_t c = 0; c < n; c++)
            part += x[r * n + c] * y[r * n + c];
        sum += part;
    }
    return sum;
}

/* *sum = squared norm of X - A B in the expert's metric. */
static molae_status
measure(const mli_weighted *q, int64_t e, const mli_weighted_scratch *t, double *sum)
{
    const mli_weighted_group *o = &q->groups[q->group_of[e]];
    const int64_t F = q->s->F, D = q->s->D, R = q->rank[q->group_of[e]], n = D - o->lead;
    const double *Y, *Z = t->E;
    molae_status rc = MOLAE_OK;

    memcpy(t->E, t->X, (size_t)(F * D) * sizeof(double));
    for (int64_t r = 0; r < F; r++)
        for (int64_t c = 0; c < o->lead; c++)
            t->E[r * D + c] -= t->A[r * R + c];
    MLI_TRY(mli_gemm_f64(0, 0, F, n, R, -1, t->A, R, o->N, n, 1, t->E + o->lead, D));
    MLI_TRY(mli_weighted_rows(q, e, t->E, D, t->S, t->Y, &Y));
    if (q->s->side == MOLAE_SIDE_INPUT) {
        const double *C = ordered_moments(q, e, t);
        MLI_TRY(mli_gemm_f64(0, 0, F, D, D, 1, t->E, D, C, D, 0, t->V, D));
        Z = t->V;
    }
    *sum = dot(Y, Z, F, D);
done:
    return rc;
}

/* With S the metric of the rows, C' that of the columns, B C' B^T = U^T U and K = X C' B^T U^-1,
 * a private factor A, whatever its rounding, loses
 *
 *   <S X C', X> - <S P, 2 K - P>     P = A U^T
 */
static molae_status
residual_of(const mli_weighted *q, int64_t e, const mli_weighted_scratch *t, const double *K,
            const double *U, double *P, double *sum)
{
    const int64_t F = q->s->F, R = q->rank[q->group_of[e]];
    const double *Y;
    const float *Y32;
    float *P32 = (float *)t->V;
    double scale, part = 0;
    molae_status rc = MOLAE_OK;

    memcpy(P, t->A, (size_t)(F * R) * sizeof(double));
    MLI_TRY(mli_trmm_right_f64(1, F, R, U, R, P, R));
    if (!q->narrow) {
        MLI_TRY(mli_weighted_rows(q, e, P, R, t->S, t->V, &Y));
        *sum = q->energy[e] - 2 * dot(Y, K, F, R) + dot(Y, P, F, R);
        goto done;
    }
    scale = mli_weighted_narrow(P32, P, F * R);
    MLI_TRY(mli_weighted_rows_narrow(q, e, P32, R, t, P32 + F * R, &Y32, &part));
    *sum = q->energy[e];
    for (int64_t r = 0; r < F; r++) {
        double row = 0;
        for (int64_t c = 0; c < R; c++)
            row += (double)Y32[r * R + c] * (2 * K[r * R + c] - P[r * R + c]);
        *sum -= scale * part * row;
    }
done:
    return rc;
}

molae_status
mli_weighted_private(const mli_weighted *q, int64_t e, const mli_weighted_scratch *t)
{
    const molae_stack *s = q->s;
    const int64_t g = q->group_of[e], R = q->rank[g], F = s->F, D = s->D;
    const mli_weighted_group *o = &q->groups[g];
    const size_t at = (size_t)((e - s->group_ptr[g]) * F * R) * mli_dtype_size(s->dtype);
    const double cancelled = q->narrow ? CANCELLED_32 : CANCELLED;
    double *K = t->Y, sum = q->energy[e];
    const double *U = NULL;
    molae_status rc = MOLAE_OK;

    if (R > 0) {
        (void)mli_rows_load_f64(t->X, s, e, 0, F, t->tmp, NULL); /* found finite before */
        permute_columns(t->X, F, o->perm, D, t->w);
        if (R == D) {
            memcpy(t->A, t->X, (size_t)(F * D) * sizeof(double));
        } else {
            MLI_TRY(normal_equations(q, e, t, K, &U));
            MLI_TRY(mli_trsm_right_f64(0, F, R, U, R, K, R));
            memcpy(t->A, K, (size_t)(F * R) * sizeof(double));
            MLI_TRY(mli_trsm_right_f64(1, F, R, U, R, t->A, R));
        }
        MLI_TRY(mli_rows_store_f64((char *)q->out->private_[g] + at, s, 0, F, R, t->A, t->tmp));
    }
    if (q->out->residual == NULL)
        goto done;
    if (R > 0 && R < D)
        MLI_TRY(residual_of(q, e, t, K, U, t->E, &sum));
    if (R == D || (R > 0 && sum < cancelled * q->energy[e]))
        MLI_TRY(measure(q, e, t, &sum));
    q->out->energy[e] = q->energy[e];
    q->out->residual[e] = MLI_MAX(sum, 0.0);
done:
    return rc;
}
