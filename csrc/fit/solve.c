/* Matrices times moments or their inverses; the contract is that of molae_moments_product in
 * molae.h. All in f64: moments have eigenvalues of many magnitudes. */
#include <string.h>

#include "../base/blas.h"
#include "../base/mem.h"
#include "../base/par.h"
#include "../base/real.h"
#include "rows.h"

/* What a worker has to itself. */
typedef struct {
    double *M; /* (n,n) */
    double *W; /* (rows,n) */
    double *Z; /* (n,rows), (rows,n) */
    double *P; /* (rows,rows) */
} scratch;

typedef struct {
    molae_moments_op op;
    void *const *out;
    const void *const *W, *const *M;
    molae_dtype type;
    double ridge;
    const int64_t *rows; /* (E,) */
    int64_t E, n;
    molae_errinfo *found; /* (E,) what went wrong */
    molae_status *status; /* (E,) */
    scratch *workers;
} job;

static size_t
job_cut(job *q, char **p, int64_t workers)
{
    const size_t square = mli_size_mul((size_t)q->n, (size_t)q->n);
    size_t matrix = 0, outer = 0, n = 0;

    for (int64_t e = 0; e < q->E; e++) {
        const size_t rows = (size_t)q->rows[e];
        matrix = MLI_MAX(matrix, mli_size_mul(rows, (size_t)q->n));
        if (q->op == MOLAE_MOMENTS_PROJECT)
            outer = MLI_MAX(outer, mli_size_mul(rows, rows));
    }

    MLI_CUT(n, p, q->found, (size_t)q->E, sizeof(molae_errinfo));
    MLI_CUT(n, p, q->status, (size_t)q->E, sizeof(molae_status));
    MLI_CUT(n, p, q->workers, (size_t)workers, sizeof(scratch));
    for (int64_t t = 0; t < workers; t++) {
        scratch none, *o = p ? &q->workers[t] : &none;
        MLI_CUT(n, p, o->M, square, sizeof(double));
        MLI_CUT(n, p, o->W, matrix, sizeof(double));
        MLI_CUT(n, p, o->Z, matrix, sizeof(double));
        MLI_CUT(n, p, o->P, outer, sizeof(double));
    }
    return n;
}

size_t
molae_moments_product_ws(const molae_ctx *ctx, molae_moments_op op, int64_t E, const int64_t *rows,
                         int64_t n)
{
    job q = {.op = op, .E = E, .rows = rows, .n = n};

    return E < 1 || n < 1 ? 0 : job_cut(&q, NULL, ctx->num_threads);
}

/* To (n,m) = From (m,n) turned. */
static void
turn(double *to, const double *from, int64_t m, int64_t n)
{
    for (int64_t j0 = 0; j0 < n; j0 += 16) /* strips that stay in cache */
        for (int64_t i = 0; i < m; i++)
            for (int64_t j = j0; j < MLI_MIN(j0 + 16, n); j++)
                to[j * m + i] = from[i * n + j];
}

/* Of one expert, what is in W times the inverse of what is in M. The matrix is turned, so that both
 * solves are from the left. */
static molae_status
solve_one(const job *q, int64_t rows, const scratch *t, molae_errinfo *err)
{
    const int64_t n = q->n;
    molae_status rc = MOLAE_OK;
    double trace = 0, more;

    for (int64_t i = 0; i < n; i++)
        trace += t->M[i * n + i];
    if (trace <= 0) { /* no row has reached it */
        memset(t->W, 0, (size_t)(rows * n) * sizeof(double));
        goto done;
    }
    more = q->ridge * trace / (double)n;
    for (int64_t i = 0; i < n; i++)
        t->M[i * n + i] += more;
    turn(t->Z, t->W, rows, n);
    err->what = "the moments leave the matrix open: the ridge is too small for them";
    MLI_TRY(mli_potrf_f64(n, t->M, n, &err->info));
    err->what = "triangular solve failed";
    MLI_TRY(mli_trsm_f64(1, 1, n, rows, t->M, n, t->Z, rows));
    MLI_TRY(mli_trsm_f64(1, 0, n, rows, t->M, n, t->Z, rows));
    turn(t->W, t->Z, n, rows);
done:
    return rc;
}

static molae_status
product_one(const job *q, int64_t e, const scratch *t)
{
    const int64_t n = q->n, rows = q->rows[e];
    double *found = t->W;
    int64_t count = rows * n;
    molae_errinfo *err = &q->found[e];
    molae_status rc = MOLAE_OK;

    if (rows == 0)
        goto done;
    err->what = "NaN or Inf in the matrices or the moments";
    if (!mli_widen_f64(t->W, q->W[e], q->type, 0, rows * n) ||
        !mli_widen_f64(t->M, q->M[e], q->type, 0, n * n))
        return MOLAE_E_NONFINITE;
    if (q->op == MOLAE_MOMENTS_SOLVE) {
        MLI_TRY(solve_one(q, rows, t, err));
    } else {
        err->what = "matrix product failed";
        MLI_TRY(mli_gemm_f64(0, 0, rows, n, n, 1, t->W, n, t->M, n, 0, t->Z, n));
        found = t->Z;
    }
    if (q->op == MOLAE_MOMENTS_PROJECT) {
        MLI_TRY(mli_gemm_f64(0, 1, rows, rows, n, 1, t->Z, n, t->W, n, 0, t->P, rows));
        found = t->P;
        count = rows * rows;
    }
    err->what = "the matrix overflows its type";
    if (!mli_round_f64(q->out[e], q->type, found, count))
        return MOLAE_E_NONFINITE;
done:
    return rc;
}

static molae_status
product_task(void *arg, int64_t e, int32_t worker)
{
    const job *q = arg;

    q->status[e] = product_one(q, e, &q->workers[worker]);
    return MOLAE_OK;
}

molae_status
molae_moments_product(const molae_ctx *ctx, molae_moments_op op, void *const *out,
                      const void *const *W, const void *const *M, molae_dtype type, double ridge,
                      int64_t E, const int64_t *rows, int64_t n, void *ws, size_t ws_bytes,
                      molae_errinfo *err)
{
    job q = {.op = op, .out = out, .W = W, .M = M, .type = type};
    char *p = ws;
    molae_status rc;

    *err = (molae_errinfo){NULL, -1, -1, -1};
    q.ridge = ridge;
    q.E = E;
    q.rows = rows;
    q.n = n;
    if (E < 1 || n < 1) {
        err->what = "W: expected matrices that are not empty";
        return MOLAE_E_SHAPE;
    }
    if ((op == MOLAE_MOMENTS_SOLVE && !(ridge > 0)) ||
        ws_bytes < job_cut(&q, NULL, ctx->num_threads)) {
        err->what = ridge > 0 || op != MOLAE_MOMENTS_SOLVE ? "ws: too small"
                                                           : "ridge: expected more than 0";
        return MOLAE_E_ARG;
    }
    (void)job_cut(&q, &p, ctx->num_threads);
    for (int64_t e = 0; e < E; e++)
        q.found[e] = *err; /* nothing */
    rc = mli_parallel_for(ctx, E, product_task, &q);
    for (int64_t e = 0; rc == MOLAE_OK && e < E; e++)
        if (q.status[e] < 0) {
            *err = q.found[e];
            err->expert = e;
            rc = q.status[e];
        }
    return rc;
}
