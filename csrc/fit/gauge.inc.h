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
    return FN(mli_trsm)(0, R, D - R, T, R, M, D - R);
}

typedef struct {
    REAL *P;         /* (D,D): N^T N, upper triangle */
    REAL *T;         /* (D-R,D-R): picked columns of N, as rows; then scratch of the QR */
    REAL *Z;         /* (R,D-R) */
    int32_t *picked; /* (D,): columns in the order of their pivots */
    int32_t *swaps;  /* (D-R,) */
    char *work;
    size_t work_bytes;
} FN(complement);

static size_t
FN(complement_cut)(FN(complement) * q, char **p, int64_t R, int64_t D)
{
    const size_t rest = (size_t)(D - R), d = (size_t)D;
    size_t n = 0;

    q->work_bytes = MLI_MAX(FN(mli_pstrf_work)(D), FN(molae_gauge_ws)(D - R, D));
    MLI_CUT(n, p, q->P, mli_size_mul(d, d), sizeof(REAL));
    MLI_CUT(n, p, q->T, mli_size_mul(rest, rest), sizeof(REAL));
    MLI_CUT(n, p, q->Z, mli_size_mul(rest, (size_t)R), sizeof(REAL));
    MLI_CUT(n, p, q->picked, d, sizeof(int32_t));
    MLI_CUT(n, p, q->swaps, rest, sizeof(int32_t));
    MLI_CUT(n, p, q->work, q->work_bytes, 1);
    return n;
}

size_t
FN(mli_gauge_complement_ws)(int64_t R, int64_t D)
{
    FN(complement) q;

    return FN(complement_cut)(&q, NULL, R, D);
}

/* Row i of out (count,rest) = column columns[i] of N (rest,D). */
static void
FN(take_columns)(REAL *out, const REAL *N, const int32_t *columns, int64_t count, int64_t rest,
                 int64_t D)
{
    for (int64_t i0 = 0; i0 < count; i0 += 16) /* strips that stay in cache */
        for (int64_t r = 0; r < rest; r++)
            for (int64_t i = i0; i < MLI_MIN(i0 + 16, count); i++)
                out[i * rest + r] = N[r * D + columns[i]];
}

molae_status
FN(mli_gauge_complement)(REAL *M, int32_t *perm, const REAL *N, int64_t R, int64_t D, char *ws,
                         int64_t *info)
{
    const int64_t rest = D - R;
    const REAL tol = (REAL)sqrt((double)REAL_EPSILON); /* of squared pivots, all <= 1 */
    FN(complement) q;
    int64_t rank;
    molae_status rc = MOLAE_OK;

    (void)FN(complement_cut)(&q, &ws, R, D);
    MLI_TRY(FN(mli_syrk)(1, D, rest, 1, N, D, 0, q.P, D));
    MLI_TRY(FN(mli_pstrf)(D, q.P, D, q.picked, &rank, tol, q.work, q.work_bytes, info));
    /* N x = 0 is x_picked = -Z x_others: the others carry the identity */
    if (rank == rest) {
        FN(take_columns)(q.T, N, q.picked, rest, rest, D);
        FN(take_columns)(M, N, q.picked + rest, R, rest, D);
        MLI_TRY(FN(mli_gesv)(rest, R, q.T, rest, q.swaps, M, rest, info));
        for (int64_t i = 0; i < R * rest; i++)
            M[i] = -M[i];
    } else {
        MLI_TRY(FN(mli_gauge)(q.Z, q.picked, N, rest, D, q.work, info));
        FN(mli_transpose)(M, q.Z, rest, R, -1);
    }
    memcpy(perm, q.picked + rest, (size_t)R * sizeof(int32_t));
    memcpy(perm + R, q.picked, (size_t)rest * sizeof(int32_t));
done:
    return rc;
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
