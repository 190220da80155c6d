/* Body of reduce.c for one precision. */

/* One worker's scratch, for a matrix X (rows, cols). */
typedef struct {
    REAL *X;
    REAL *gram; /* (p,p), p = min(rows, cols); then eigenvectors as rows */
    REAL *w;    /* (p,) */
    REAL *C;    /* (R,cols) or (rows,R): the projected matrix */
    REAL *V;    /* (p,cols): right singular vectors, where the Gram matrix is too coarse */
    REAL *tmp;
    char *work;
    size_t work_bytes;
} FN(scratch);

typedef struct {
    const molae_stack *s;
    int64_t rank, rows, cols;
    REAL *out;
    int32_t *used_svd;
    FN(scratch) * scratch; /* one a worker */
    molae_status *status;  /* (E,) */
    int64_t *info;         /* (E,) */
} FN(reduce_job);

static size_t
FN(scratch_cut)(FN(scratch) * q, char **p, int64_t rows, int64_t cols)
{
    const int64_t small = MLI_MIN(rows, cols);
    size_t n = 0;

    q->work_bytes = MLI_MAX(FN(mli_eigen_work)(small, small), FN(mli_tsqr_ws)(rows, cols));
    MLI_CUT(n, p, q->X, mli_size_mul((size_t)rows, (size_t)cols), sizeof(REAL));
    MLI_CUT(n, p, q->gram, mli_size_mul((size_t)small, (size_t)small), sizeof(REAL));
    MLI_CUT(n, p, q->w, (size_t)small, sizeof(REAL));
    MLI_CUT(n, p, q->C, mli_size_mul((size_t)small, (size_t)MLI_MAX(rows, cols)), sizeof(REAL));
    MLI_CUT(n, p, q->V, mli_size_mul((size_t)small, (size_t)cols), sizeof(REAL));
    MLI_CUT(n, p, q->tmp, mli_size_mul((size_t)rows, MLI_ROWS_TILE), sizeof(REAL));
    MLI_CUT(n, p, q->work, q->work_bytes, 1);
    return n;
}

size_t
FN(molae_reduce_rank_ws)(const molae_ctx *ctx, const molae_stack *s)
{
    const size_t E = (size_t)s->E, T = (size_t)ctx->num_threads;
    FN(scratch) q;
    size_t n = mli_size_mul(T, FN(scratch_cut)(&q, NULL, s->side == MOLAE_SIDE_INPUT ? s->F : s->D,
                                               s->side == MOLAE_SIDE_INPUT ? s->D : s->F));

    n = mli_size_add(n, mli_carve_size(T, sizeof(FN(scratch))));
    n = mli_size_add(n, mli_carve_size(E, sizeof(molae_status)));
    return mli_size_add(n, mli_carve_size(E, sizeof(int64_t)));
}

/* V (R,cols): the top-R right singular vectors of X from its triangular factor. */
static molae_status
FN(right_vectors)(const FN(reduce_job) * job, FN(scratch) * q, REAL *V, int64_t *info)
{
    const int64_t rows = job->rows, cols = job->cols;
    FN(mli_tsqr) t;
    molae_status rc = MOLAE_OK;

    FN(mli_tsqr_init)(&t, rows, cols, q->work);
    for (int64_t r0 = 0; r0 < rows; r0 += MLI_CHUNK) {
        const int64_t nr = MLI_MIN((int64_t)MLI_CHUNK, rows - r0);
        memcpy(t.rows + t.used * cols, q->X + r0 * cols, (size_t)(nr * cols) * sizeof(REAL));
        MLI_TRY(FN(mli_tsqr_push)(&t, nr));
    }
    MLI_TRY(FN(mli_tsqr_finish)(&t));
    memcpy(V, t.V, (size_t)(job->rank * cols) * sizeof(REAL));
done:
    *info = t.info;
    return rc;
}

/* Y = best rank-R approximation of the expert's matrix: projected on its R leading left
 * (rows <= cols) or right singular vectors. */
static molae_status
FN(reduce_expert)(FN(reduce_job) * job, int64_t e, FN(scratch) * q)
{
    const int64_t rows = job->rows, cols = job->cols, R = job->rank;
    const int64_t p = MLI_MIN(rows, cols);
    REAL *Y = job->out + e * rows * cols;
    molae_stack as_stored = *job->s; /* rank reduction does not care about sides */
    molae_status rc = MOLAE_OK;
    REAL *top; /* leading vectors as rows: left (R,rows) or right (R,cols) */
    int left = rows <= cols;

    as_stored.side = MOLAE_SIDE_INPUT;
    as_stored.F = rows;
    as_stored.D = cols;
    job->used_svd[e] = 0;
    MLI_TRY(FN(mli_rows_load)(q->X, &as_stored, e, 0, rows, q->tmp, NULL));
    if (R == 0) {
        memset(Y, 0, (size_t)(rows * cols) * sizeof(REAL));
        goto done;
    }
    if (R == p) {
        memcpy(Y, q->X, (size_t)(rows * cols) * sizeof(REAL));
        goto done;
    }
    MLI_TRY(FN(mli_syrk)(!left, p, left ? cols : rows, 1, q->X, cols, 0, q->gram, p));
    MLI_TRY(FN(mli_eigen)(p, q->gram, q->w, p - R, R, q->work, q->work_bytes, &job->info[e]));
    top = q->gram + (p - R) * p;
    if (FN(mli_gram_too_coarse)(q->w, p, R)) {
        left = 0;
        top = q->V;
        job->used_svd[e] = 1;
        MLI_TRY(FN(right_vectors)(job, q, top, &job->info[e]));
        rc = MOLAE_W_PRECISION;
    }
    if (left) {
        MLI_TRY(FN(mli_gemm)(0, 0, R, cols, rows, 1, top, p, q->X, cols, 0, q->C, cols));
        MLI_TRY(FN(mli_gemm)(1, 0, rows, cols, R, 1, top, p, q->C, cols, 0, Y, cols));
    } else {
        MLI_TRY(FN(mli_gemm)(0, 1, rows, R, cols, 1, q->X, cols, top, cols, 0, q->C, R));
        MLI_TRY(FN(mli_gemm)(0, 0, rows, cols, R, 1, q->C, R, top, cols, 0, Y, cols));
    }
done:
    return rc;
}

static molae_status
FN(reduce_task)(void *arg, int64_t e, int32_t worker)
{
    FN(reduce_job) *job = arg;

    job->status[e] = FN(reduce_expert)(job, e, &job->scratch[worker]);
    return MOLAE_OK;
}

molae_status
FN(molae_reduce_rank)(const molae_ctx *ctx, REAL *out, int32_t *used_svd, const molae_stack *s,
                      int64_t rank, void *ws, size_t ws_bytes, molae_errinfo *err)
{
    const int input = s->side == MOLAE_SIDE_INPUT;
    FN(reduce_job) job = {.s = s, .rank = rank, .out = out, .used_svd = used_svd};
    char *p = ws;
    molae_status rc;

    err->expert = err->group = -1;
    if (s->E < 1 || s->F < 1 || s->D < 1) {
        err->what = "W: expected at least one expert with a matrix that is not empty";
        return MOLAE_E_SHAPE;
    }
    if (rank < 0 || rank > MLI_MIN(s->F, s->D)) {
        err->what = "rank: expected 0 <= R <= min(rows, cols)";
        return MOLAE_E_ARG;
    }
    if (ws_bytes < FN(molae_reduce_rank_ws)(ctx, s)) {
        err->what = "ws: too small";
        return MOLAE_E_ARG;
    }
    job.rows = input ? s->F : s->D;
    job.cols = input ? s->D : s->F;
    job.scratch = mli_carve(&p, (size_t)ctx->num_threads, sizeof(FN(scratch)));
    job.status = mli_carve(&p, (size_t)s->E, sizeof(molae_status));
    job.info = mli_carve(&p, (size_t)s->E, sizeof(int64_t));
    for (int32_t t = 0; t < ctx->num_threads; t++)
        (void)FN(scratch_cut)(&job.scratch[t], &p, job.rows, job.cols);
    memset(job.info, 0, (size_t)s->E * sizeof(int64_t));

    rc = mli_parallel_for(ctx, s->E, FN(reduce_task), &job);
    for (int64_t e = 0; rc >= 0 && e < s->E; e++)
        if (job.status[e] < 0 || (job.status[e] > 0 && rc == MOLAE_OK)) {
            rc = job.status[e];
            err->expert = e;
            err->info = job.info[e];
            err->what = rc == MOLAE_E_NONFINITE ? "NaN or Inf in the weights"
                        : rc < 0 ? "the eigenproblem did not converge"
                                 : "the Gram matrix is too coarse for the energy beyond this "
                                   "rank; a direct SVD was used";
        }
    return rc;
}
