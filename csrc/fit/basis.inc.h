/* Body of basis.c for one precision. */

int
FN(mli_gram_too_coarse)(const REAL *w, int64_t p, int64_t R)
{
    double tail = 0;
    const double top = p > 0 ? MLI_MAX((double)w[p - 1], 0.0) : 0.0;

    if (R == 0 || top == 0)
        return 0;
    for (int64_t j = 0; j < p - R; j++)
        tail += MLI_MAX((double)w[j], 0.0);
    /* 2 R eps lambda_1 <= tail / 100 */
    return tail < 200.0 * (double)R * (double)REAL_EPSILON * top;
}

size_t
FN(mli_tsqr_ws)(int64_t m, int64_t D)
{
    const int64_t p = MLI_MIN(m, D);
    const size_t reduce = FN(mli_gelqf_work)(D, D + MLI_CHUNK);
    const size_t svd = FN(mli_gesdd_work)(D, p);
    size_t n = mli_carve_size(mli_size_mul((size_t)(D + MLI_CHUNK), (size_t)D), sizeof(REAL));

    n = mli_size_add(n, mli_carve_size((size_t)D, sizeof(REAL)));
    n = mli_size_add(n, mli_carve_size((size_t)D, sizeof(REAL)));
    n = mli_size_add(n, mli_carve_size(mli_size_mul((size_t)p, (size_t)D), sizeof(REAL)));
    return mli_size_add(n, mli_carve_size(MLI_MAX(reduce, svd), 1));
}

void
FN(mli_tsqr_init)(FN(mli_tsqr) * t, int64_t m, int64_t D, char *ws)
{
    const int64_t p = MLI_MIN(m, D);

    t->D = D;
    t->used = 0;
    t->info = 0;
    t->rows = mli_carve(&ws, (size_t)(D + MLI_CHUNK) * (size_t)D, sizeof(REAL));
    t->tau = mli_carve(&ws, (size_t)D, sizeof(REAL));
    t->s = mli_carve(&ws, (size_t)D, sizeof(REAL));
    t->V = mli_carve(&ws, (size_t)p * (size_t)D, sizeof(REAL));
    t->work_bytes = MLI_MAX(FN(mli_gelqf_work)(D, D + MLI_CHUNK), FN(mli_gesdd_work)(D, p));
    t->work = mli_carve(&ws, t->work_bytes, 1);
}

/* Rows beyond D are folded in. Row-major rows (used,D) are the column-major (D,used) matrix of
 * their transpose, and X^T = L Q keeps X^T X = L L^T. */
static molae_status
FN(tsqr_reduce)(FN(mli_tsqr) * t)
{
    const int64_t D = t->D;
    molae_status rc;

    rc = FN(mli_gelqf)(D, t->used, t->rows, D, t->tau, t->work, t->work_bytes, &t->info);
    if (rc < 0)
        return rc;
    t->used = D;
    for (int64_t c = 1; c < D; c++) /* LAPACK keeps Q above the diagonal */
        memset(t->rows + c * D, 0, (size_t)c * sizeof(REAL));
    return MOLAE_OK;
}

molae_status
FN(mli_tsqr_push)(FN(mli_tsqr) * t, int64_t nr)
{
    t->used += nr;
    return t->used > t->D ? FN(tsqr_reduce)(t) : MOLAE_OK;
}

molae_status
FN(mli_tsqr_finish)(FN(mli_tsqr) * t)
{
    return FN(mli_gesdd)(t->D, t->used, t->rows, t->D, t->s, t->V, t->D, t->work, t->work_bytes,
                         &t->info);
}
