/* Body of adamw.c for one precision. */

typedef struct {
    REAL *w, *m, *v;
    const REAL *g;
    int64_t n;
    REAL beta1, beta2, step1, step2, eps, keep, scale; /* see FN(molae_adamw) */
} FN(adamw_job);

static molae_status
FN(adamw_task)(void *arg, int64_t index, int32_t worker)
{
    const FN(adamw_job) *q = arg;
    const int64_t from = index * BLOCK, end = MLI_MIN(from + BLOCK, q->n);
    const REAL beta1 = q->beta1, beta2 = q->beta2, step1 = q->step1, step2 = q->step2;
    const REAL eps = q->eps, keep = q->keep, scale = q->scale;
    REAL *restrict w = q->w, *restrict m = q->m, *restrict v = q->v;
    const REAL *restrict g = q->g;
    int bad = 0;

    (void)worker;
    for (int64_t i = from; i < end; i++)
        bad |= !(g[i] - g[i] == 0);
    if (bad)
        return MOLAE_E_NONFINITE;
    for (int64_t i = from; i < end; i++) {
        const REAL d = scale * g[i];
        m[i] = beta1 * m[i] + (1 - beta1) * d;
        v[i] = beta2 * v[i] + (1 - beta2) * d * d;
        w[i] = keep * w[i] - step1 * m[i] / (SQRT(v[i]) * step2 + eps);
    }
    return MOLAE_OK;
}

molae_status
FN(molae_adamw)(const molae_ctx *ctx, REAL *w, REAL *m, REAL *v, const REAL *g, int64_t n,
                const molae_adamw *how, int64_t step, double scale, molae_errinfo *err)
{
    const double left1 = 1 - pow(how->beta1, (double)step),
                 left2 = 1 - pow(how->beta2, (double)step);
    FN(adamw_job) q = {.w = w, .m = m, .v = v, .g = g, .n = n};
    molae_status rc = check(n, how, step, scale, err);

    if (rc < 0)
        return rc;
    q.beta1 = (REAL)how->beta1;
    q.beta2 = (REAL)how->beta2;
    q.step1 = (REAL)(how->lr / left1);
    q.step2 = (REAL)(1 / sqrt(left2));
    q.eps = (REAL)how->eps;
    q.keep = (REAL)(1 - how->lr * how->decay);
    q.scale = (REAL)scale;
    rc = mli_parallel_for(ctx, (n + BLOCK - 1) / BLOCK, FN(adamw_task), &q);
    if (rc == MOLAE_E_NONFINITE) {
        err->what = "NaN or Inf in the gradient";
        for (int64_t i = 0; i < n && err->info < 0; i++)
            if (!isfinite(g[i]))
                err->info = i;
    }
    return rc;
}
