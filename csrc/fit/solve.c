/* Matrices times moments or their inverses; the contract is that of molae_moments_product in
 * molae.h. Moments have eigenvalues of many magnitudes: their roots are found in f64. */
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
    double *Z; /* (rows,n) */
    double *P; /* (rows,rows) */
} scratch;

typedef struct {
    molae_moments_op op;
    int left;
    void *const *out;
    const void *const *W, *const *M;
    molae_dtype type, metric;
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
    const int root = q->op == MOLAE_MOMENTS_ROOT, both = q->op == MOLAE_MOMENTS_PROJECT;
    const int solve = q->op == MOLAE_MOMENTS_SOLVE;
    const size_t square = mli_size_mul((size_t)q->n, (size_t)q->n);
    size_t matrix = 0, outer = 0, n = 0;

    for (int64_t e = 0; e < q->E; e++) {
        const size_t rows = (size_t)q->rows[e];
        matrix = MLI_MAX(matrix, mli_size_mul(rows, (size_t)q->n));
        outer = MLI_MAX(outer, mli_size_mul(rows, rows));
    }
    MLI_CUT(n, p, q->found, (size_t)q->E, sizeof(molae_errinfo));
    MLI_CUT(n, p, q->status, (size_t)q->E, sizeof(molae_status));
    MLI_CUT(n, p, q->workers, (size_t)workers, sizeof(scratch));
    for (int64_t t = 0; t < workers; t++) {
        scratch none, *o = p ? &q->workers[t] : &none;
        MLI_CUT(n, p, o->M, root || both ? square : 0, sizeof(double));
        MLI_CUT(n, p, o->W, solve || both ? matrix : 0, sizeof(double));
        MLI_CUT(n, p, o->Z, both ? matrix : 0, sizeof(double));
        MLI_CUT(n, p, o->P, both ? outer : 0, sizeof(double));
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

static const char bad_input[] = "NaN or Inf in the matrices or the moments";
static const char bad_result[] = "the matrix overflows its type";

#define REAL float
#define SFX f32
#include "solve.inc.h"
#undef REAL
#undef SFX

#define REAL double
#define SFX f64
#include "solve.inc.h"

static molae_status
root_one(const job *q, int64_t e, const scratch *t, molae_errinfo *err)
{
    const int64_t n = q->n;
    double *U = t->M, trace = 0;
    molae_status rc = MOLAE_OK;

    err->what = bad_input;
    if (!mli_widen_f64(U, q->M[e], q->metric, 0, n * n))
        return MOLAE_E_NONFINITE;
    for (int64_t i = 0; i < n; i++)
        trace += U[i * n + i];
    if (trace > 0) {
        for (int64_t i = 0; i < n; i++)
            U[i * n + i] += q->ridge * trace / (double)n;
        err->what = "the moments leave the matrix open: the ridge is too small for them";
        MLI_TRY(mli_potrf_f64(n, U, n, &err->info));
        for (int64_t i = 1; i < n; i++)
            memset(U + i * n, 0, (size_t)i * sizeof(double));
    } else { /* no row has reached it */
        memset(U, 0, (size_t)(n * n) * sizeof(double));
    }
    err->what = bad_result;
    if (!mli_round_f64(q->out[e], q->type, U, n * n))
        return MOLAE_E_NONFINITE;
done:
    return rc;
}

static molae_status
project_one(const job *q, int64_t e, const scratch *t, molae_errinfo *err)
{
    const int64_t n = q->n, rows = q->rows[e];
    molae_status rc = MOLAE_OK;

    err->what = bad_input;
    if (!mli_widen_f64(t->W, q->W[e], q->type, 0, rows * n) ||
        !mli_widen_f64(t->M, q->M[e], q->metric, 0, n * n))
        return MOLAE_E_NONFINITE;
    err->what = "matrix product failed";
    MLI_TRY(mli_gemm_f64(0, 0, rows, n, n, 1, t->W, n, t->M, n, 0, t->Z, n));
    MLI_TRY(mli_gemm_f64(0, 1, rows, rows, n, 1, t->Z, n, t->W, n, 0, t->P, rows));
    err->what = bad_result;
    if (!mli_round_f64(q->out[e], q->type, t->P, rows * rows))
        return MOLAE_E_NONFINITE;
done:
    return rc;
}

static molae_status
product_one(const job *q, int64_t e, const scratch *t)
{
    molae_errinfo *err = &q->found[e];

    if (q->rows[e] == 0)
        return MOLAE_OK;
    switch (q->op) {
    case MOLAE_MOMENTS_ROOT:
        return root_one(q, e, t, err);
    case MOLAE_MOMENTS_SOLVE:
        if (q->metric == MOLAE_F32)
            return solve_one_f32(q, e, q->out[e], err);
        if (q->type == MOLAE_F64)
            return solve_one_f64(q, e, q->out[e], err);
        return solve_one_f64(q, e, t->W, err);
    case MOLAE_MOMENTS_TIMES:
        return q->type == MOLAE_F32 ? times_one_f32(q, e, err) : times_one_f64(q, e, err);
    case MOLAE_MOMENTS_PROJECT:
        break;
    }
    return project_one(q, e, t, err);
}

static molae_status
product_task(void *arg, int64_t e, int32_t worker)
{
    const job *q = arg;

    q->status[e] = product_one(q, e, &q->workers[worker]);
    return MOLAE_OK;
}

/* What is wrong with a call, or NULL. */
static const char *
refused(const job *q)
{
    const int wide = q->op == MOLAE_MOMENTS_SOLVE && q->metric == MOLAE_F64;

    for (int i = 0; i < 2; i++)
        if ((i ? q->type : q->metric) != MOLAE_F32 && (i ? q->type : q->metric) != MOLAE_F64)
            return "W, moments: expected float32 or float64";
    if (q->type != q->metric && q->op != MOLAE_MOMENTS_ROOT && !wide)
        return "moments: expected the dtype of W";
    if (q->op == MOLAE_MOMENTS_ROOT && !(q->ridge > 0))
        return "ridge: expected more than 0";
    if (q->left && q->op != MOLAE_MOMENTS_SOLVE && q->op != MOLAE_MOMENTS_TIMES)
        return "left: no such product";
    return NULL;
}

molae_status
molae_moments_product(const molae_ctx *ctx, molae_moments_op op, int left, void *const *out,
                      const void *const *W, molae_dtype type, const void *const *M,
                      molae_dtype metric, double ridge, int64_t E, const int64_t *rows, int64_t n,
                      void *ws, size_t ws_bytes, molae_errinfo *err)
{
    job q = {.op = op, .left = left, .out = out, .W = W, .M = M, .type = type, .metric = metric};
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
    err->what = refused(&q);
    if (err->what == NULL && ws_bytes < job_cut(&q, NULL, ctx->num_threads))
        err->what = "ws: too small";
    if (err->what != NULL)
        return MOLAE_E_ARG;
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
