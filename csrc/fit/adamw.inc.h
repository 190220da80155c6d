/* Body of adamw.c for one precision. */

typedef struct {
    const molae_adamw_array *arrays;
    block *blocks;
    const molae_adamw *how;
    double left1, left2, scale; /* 1 - beta^step, and c: see molae_adamw_f32 */
} FN(adamw_job);

static molae_status
FN(squares_task)(void *arg, int64_t index, int32_t worker)
{
    const FN(adamw_job) *q = arg;
    block *b = &q->blocks[index];
    const molae_adamw_array *a = &q->arrays[b->array];

    (void)worker;
    b->squares = FN(squares)((const REAL *)a->g + b->from, MLI_MIN(BLOCK, a->n - b->from));
    return MOLAE_OK;
}

static molae_status
FN(step_task)(void *arg, int64_t index, int32_t worker)
{
    const FN(adamw_job) *q = arg;
    const block *b = &q->blocks[index];
    const molae_adamw_array *a = &q->arrays[b->array];
    const mli_adamw_step step = {.beta1 = q->how->beta1,
                                 .beta2 = q->how->beta2,
                                 .eps = q->how->eps,
                                 .rate = a->lr / q->left1,
                                 .root = 1 / sqrt(q->left2),
                                 .keep = 1 - a->lr * q->how->decay,
                                 .scale = q->scale};

    (void)worker;
    mli_kernels_get()->ADAMW((REAL *)a->w + b->from, (REAL *)a->m + b->from, (REAL *)a->v + b->from,
                             (const REAL *)a->g + b->from, MLI_MIN(BLOCK, a->n - b->from), &step);
    return MOLAE_OK;
}

molae_status
FN(molae_adamw)(const molae_ctx *ctx, double *norm, const molae_adamw_array *arrays, int64_t count,
                const molae_adamw *how, int64_t step, void *ws, size_t ws_bytes, molae_errinfo *err)
{
    FN(adamw_job) q = {.arrays = arrays, .how = how, .scale = 1};
    molae_status rc = check(arrays, count, how, step, err);
    char *p = ws;
    int64_t n = 0;

    if (rc < 0)
        return rc;
    if (ws_bytes < molae_adamw_ws(arrays, count)) {
        err->what = "ws: too small";
        return MOLAE_E_ARG;
    }
    (void)cut(&q.blocks, &p, count_blocks(arrays, count));
    for (int64_t i = 0; i < count; i++)
        for (int64_t from = 0; from < arrays[i].n; from += BLOCK)
            q.blocks[n++] = (block){.array = i, .from = from};
    q.left1 = 1 - pow(how->beta1, (double)step);
    q.left2 = 1 - pow(how->beta2, (double)step);
    MLI_TRY(mli_parallel_for(ctx, n, FN(squares_task), &q));
    MLI_TRY(sum_up(q.blocks, n, norm, err));
    if (how->max_norm > 0 && *norm > how->max_norm)
        q.scale = how->max_norm / *norm;
    MLI_TRY(mli_parallel_for(ctx, n, FN(step_task), &q));
done:
    return rc;
}
