/* Body of activate.c for one precision. */

typedef struct {
    REAL *h, *dgate, *dup;
    const REAL *gate, *up;
    int64_t n;
    mli_act act;
} FN(activate);

static molae_status
FN(activate_task)(void *arg, int64_t index, int32_t worker)
{
    const FN(activate) *q = arg;
    const mli_kernels *kern = mli_kernels_get();
    const int64_t at = index * PIECE, end = MLI_MIN(at + PIECE, q->n);
    REAL ones[ONES];

    (void)worker;
    if (q->dgate == NULL) {
        kern->ACT(q->h + at, q->gate + at, q->up + at, end - at, &q->act);
        return MOLAE_OK;
    }
    for (int64_t i = 0; i < ONES; i++)
        ones[i] = 1;
    for (int64_t i = at; i < end; i += ONES)
        (void)kern->ACT_GRAD(q->dgate + i, q->dup + i, q->h + i, ones, q->gate + i, q->up + i, 1,
                             MLI_MIN((int64_t)ONES, end - i), &q->act);
    return MOLAE_OK;
}

molae_status
FN(molae_activate)(const molae_ctx *ctx, REAL *h, REAL *dgate, REAL *dup, const REAL *gate,
                   const REAL *up, int64_t n, molae_activation activation, double alpha,
                   double limit)
{
    FN(activate) q = {.h = h, .dgate = dgate, .dup = dup, .gate = gate, .up = up, .n = n};

    q.act = (mli_act){.kind = activation, .alpha = alpha, .limit = limit};
    return mli_parallel_for(ctx, (n + PIECE - 1) / PIECE, FN(activate_task), &q);
}
