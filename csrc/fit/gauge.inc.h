/* Body of gauge.c for one precision. */

void
FN(mli_transpose)(REAL *dst, const REAL *src, int64_t rows, int64_t cols, REAL scale)
{
    for (int64_t r0 = 0; r0 < rows; r0 += 16) /* strips that stay in cache */
        for (int64_t c = 0; c < cols; c++)
            for (int64_t r = r0; r < MLI_MIN(r0 + 16, rows); r++)
                dst[c * rows + r] = scale * src[r * cols + c];
}

size_t
FN(molae_gauge_ws)(int64_t R, int64_t D)
{
    size_t n = mli_carve_size(mli_size_mul((size_t)R, (size_t)D), sizeof(REAL));

    n = mli_size_add(n, mli_carve_size(mli_size_mul((size_t)R, (size_t)R), sizeof(REAL)));
    n = mli_size_add(n, mli_carve_size((size_t)R, sizeof(REAL)));
    return mli_size_add(n, mli_carve_size(FN(mli_geqp3_work)(R, D), 1));
}

molae_status
FN(mli_gauge)(REAL *M, int32_t *perm, const REAL *B, int64_t R, int64_t D, char *ws, int64_t *info)
{
    const size_t work_bytes = FN(mli_geqp3_work)(R, D);
    REAL *Q = mli_carve(&ws, (size_t)R * (size_t)D, sizeof(REAL)); /* column-major (R,D) */
    REAL *T = mli_carve(&ws, (size_t)R * (size_t)R, sizeof(REAL));
    REAL *tau = mli_carve(&ws, (size_t)R, sizeof(REAL));
    void *work = mli_carve(&ws, work_bytes, 1);
    molae_status rc;

    FN(mli_transpose)(Q, B, R, D, 1);
    rc = FN(mli_geqp3)(R, D, Q, R, perm, tau, work, work_bytes, info);
    if (rc < 0)
        return rc;

    /* B P = Q [T | N]: the same rows are spanned by [I | T^-1 N] */
    for (int64_t r = 0; r < R; r++) {
        if (fabs((double)Q[r * R + r]) <= (double)R * (double)REAL_EPSILON * fabs((double)Q[0]))
            return MOLAE_E_ARG;
        memset(T + r * R, 0, (size_t)r * sizeof(REAL));
        for (int64_t c = r; c < R; c++)
            T[r * R + c] = Q[c * R + r];
    }
    FN(mli_transpose)(M, Q + R * R, D - R, R, 1);
    return FN(mli_trsm)(1, 0, R, D - R, T, R, M, D - R);
}

size_t
FN(mli_gauge_complement_ws)(int64_t R, int64_t D)
{
    const size_t n = mli_size_mul((size_t)(D - R), (size_t)R);

    return mli_size_add(
        FN(molae_gauge_ws)(D - R, D),
        mli_size_add(mli_carve_size(n, sizeof(REAL)), mli_carve_size((size_t)D, sizeof(int32_t))));
}

molae_status
FN(mli_gauge_complement)(REAL *M, int32_t *perm, const REAL *N, int64_t R, int64_t D, char *ws,
                         int64_t *info)
{
    const int64_t rest = D - R;
    REAL *Z = mli_carve(&ws, (size_t)rest * (size_t)R, sizeof(REAL));
    int32_t *picked = mli_carve(&ws, (size_t)D, sizeof(int32_t));
    const molae_status rc = FN(mli_gauge)(Z, picked, N, rest, D, ws, info);

    if (rc < 0)
        return rc;
    /* N x = 0 is x_picked = -Z x_others: the others carry the identity */
    for (int64_t j = 0; j < R; j++)
        perm[j] = picked[rest + j];
    for (int64_t j = 0; j < rest; j++)
        perm[R + j] = picked[j];
    FN(mli_transpose)(M, Z, rest, R, -1);
    return MOLAE_OK;
}

void
FN(mli_ungauge)(REAL *B, const REAL *M, const int32_t *perm, int64_t R, int64_t D)
{
    memset(B, 0, (size_t)R * (size_t)D * sizeof(REAL));
    for (int64_t r = 0; r < R; r++) {
        REAL *b = B + r * D;
        b[perm[r]] = 1;
        for (int64_t c = R; c < D; c++)
            b[perm[c]] = M[r * (D - R) + c - R];
    }
}

molae_status
FN(molae_gauge)(REAL *M, int32_t *perm, const REAL *B, int64_t R, int64_t D, void *ws,
                size_t ws_bytes, molae_errinfo *err)
{
    molae_status rc;

    err->expert = err->group = -1;
    if (R < 1 || D < R) {
        err->what = "B: expected shape (R, D) with 1 <= R <= D";
        return MOLAE_E_SHAPE;
    }
    if (ws_bytes < FN(molae_gauge_ws)(R, D)) {
        err->what = "ws: too small";
        return MOLAE_E_ARG;
    }
    for (int64_t i = 0; i < R * D; i++)
        if (!isfinite(B[i])) {
            err->what = "B: NaN or Inf";
            return MOLAE_E_NONFINITE;
        }
    rc = FN(mli_gauge)(M, perm, B, R, D, ws, &err->info);
    if (rc == MOLAE_E_ARG)
        err->what = "B: its rows are linearly dependent";
    else if (rc < 0)
        err->what = "pivoted QR failed";
    return rc;
}
