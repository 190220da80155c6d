/* Body of householder.c for one precision. */

/* x (m,) becomes v with v[0] = 1, H x = (I - tau v v^T) x = beta e_1; returns beta. A tail that
 * rounding cannot tell from zero is left where it is, with tau = 0. */
static REAL
FN(reflector)(REAL *x, int64_t m, REAL *tau)
{
    const REAL alpha = x[0];
    double sum = 0, beta;

    for (int64_t i = 1; i < m; i++)
        sum += (double)x[i] * (double)x[i];
    x[0] = 1;
    *tau = 0;
    if (sqrt(sum) < (double)(REAL_MIN / REAL_EPSILON))
        return alpha;
    beta = -copysign(sqrt((double)alpha * (double)alpha + sum), (double)alpha);
    *tau = (REAL)((beta - (double)alpha) / beta);
    for (int64_t i = 1; i < m; i++)
        x[i] = (REAL)((double)x[i] / ((double)alpha - beta));
    return (REAL)beta;
}

/* y (m,) -= V^T W x' + W^T V x', for V and W (k,m) with rows ld apart; t is scratch (k,). */
static molae_status
FN(subtract_updates)(REAL *y, const REAL *V, const REAL *W, int64_t k, int64_t m, int64_t ld,
                     const REAL *x, REAL *t)
{
    molae_status rc = MOLAE_OK;

    MLI_TRY(FN(mli_gemv)(0, k, m, 1, W, ld, x, 0, t));
    MLI_TRY(FN(mli_gemv)(1, k, m, -1, V, ld, t, 1, y));
    MLI_TRY(FN(mli_gemv)(0, k, m, 1, V, ld, x, 0, t));
    MLI_TRY(FN(mli_gemv)(1, k, m, -1, W, ld, t, 1, y));
done:
    return rc;
}

/* Rows j0 .. j0+k-1 of A become Householder vectors V, and W gets what turns the update of the
 * rest into A -= V^T W + W^T V. Within the panel the rest stays as it was, and what it lacks is
 * subtracted from each product with it. */
static molae_status
FN(panel)(int64_t n, REAL *A, int64_t j0, int64_t k, REAL *d, REAL *e, REAL *tau, REAL *W)
{
    const mli_kernels *kern = mli_kernels_get();
    REAL t[MLI_PANEL];
    molae_status rc = MOLAE_OK;

    for (int64_t i = 0; i < k; i++) {
        const int64_t j = j0 + i, m = n - j - 1;
        REAL *a = A + j * n, *v = a + j + 1, *w = W + i * n + j + 1;
        double dot = 0;

        if (i > 0) { /* row j as the panel's updates leave it */
            const REAL *V0 = A + j0 * n + j, *W0 = W + j;
            for (int64_t r = 0; r < i; r++)
                t[r] = W0[r * n];
            MLI_TRY(FN(mli_gemv)(1, i, m + 1, -1, V0, n, t, 1, a + j));
            for (int64_t r = 0; r < i; r++)
                t[r] = V0[r * n];
            MLI_TRY(FN(mli_gemv)(1, i, m + 1, -1, W0, n, t, 1, a + j));
        }
        d[j] = a[j];
        e[j] = FN(reflector)(v, m, &tau[j]);
        kern->SYMV(w, v + n, n, v, m, (int)(i & 1));
        MLI_TRY(FN(subtract_updates)(w, A + j0 * n + j + 1, W + j + 1, i, m, n, v, t));
        for (int64_t c = 0; c < m; c++) {
            w[c] *= tau[j];
            dot += (double)w[c] * (double)v[c];
        }
        for (int64_t c = 0; c < m; c++)
            w[c] -= (REAL)(0.5 * (double)tau[j] * dot) * v[c];
    }
done:
    return rc;
}

molae_status
FN(mli_tridiagonalize)(int64_t n, REAL *A, REAL *d, REAL *e, REAL *tau, REAL *W)
{
    molae_status rc = MOLAE_OK;

    for (int64_t j0 = 0; j0 < n - 1; j0 += MLI_PANEL) {
        const int64_t k = MLI_MIN((int64_t)MLI_PANEL, n - 1 - j0), j1 = j0 + k;
        MLI_TRY(FN(panel)(n, A, j0, k, d, e, tau, W));
        MLI_TRY(FN(mli_syr2k)(n - j1, k, -1, A + j0 * n + j1, n, W + j1, n, 1, A + j1 * n + j1, n));
    }
    if (n > 0)
        d[n - 1] = A[n * n - 1];
done:
    return rc;
}

/* H_j0 .. H_j0+m-1 = I - V^T T V: fills V (m,len) and T^T, lower triangle; S (m,m) is scratch. */
static molae_status
FN(block_reflector)(int64_t n, const REAL *A, const REAL *tau, int64_t j0, int64_t m, REAL *V,
                    REAL *S, REAL *T)
{
    const int64_t len = n - j0 - 1;
    molae_status rc;

    for (int64_t i = 0; i < m; i++) {
        memset(V + i * len, 0, (size_t)i * sizeof(REAL));
        memcpy(V + i * len + i, A + (j0 + i) * n + j0 + i + 1, (size_t)(len - i) * sizeof(REAL));
    }
    rc = FN(mli_syrk)(0, m, len, 1, V, len, 0, S, m);
    if (rc < 0)
        return rc;
    for (int64_t j = 0; j < m; j++) { /* T[:j,j] = -tau_j T[:j,:j] S[:j,j] */
        REAL *t = T + j * m;
        memset(t, 0, (size_t)m * sizeof(REAL));
        for (int64_t i = 0; i < j; i++) {
            const REAL *ti = T + i * m, s = -tau[j0 + j] * S[i * m + j];
            for (int64_t r = 0; r <= i; r++)
                t[r] += s * ti[r];
        }
        t[j] = tau[j0 + j];
    }
    return MOLAE_OK;
}

molae_status
FN(mli_turn_back)(int64_t n, const REAL *A, const REAL *tau, REAL *Z, int64_t count, REAL *scratch)
{
    REAL *V = scratch, *S = V + MLI_REFLECTORS * n, *T = S + MLI_REFLECTORS * MLI_REFLECTORS;
    REAL *U = T + MLI_REFLECTORS * MLI_REFLECTORS, *UT = U + MLI_REFLECTORS * count;
    molae_status rc = MOLAE_OK;

    for (int64_t j0 = (n - 2) / MLI_REFLECTORS * MLI_REFLECTORS; j0 >= 0; j0 -= MLI_REFLECTORS) {
        const int64_t m = MLI_MIN((int64_t)MLI_REFLECTORS, n - 1 - j0), len = n - j0 - 1;
        REAL *z = Z + j0 + 1; /* Z -= Z V^T T^T V */
        MLI_TRY(FN(block_reflector)(n, A, tau, j0, m, V, S, T));
        MLI_TRY(FN(mli_gemm)(0, 1, count, m, len, 1, z, n, V, len, 0, U, m));
        MLI_TRY(FN(mli_gemm)(0, 0, count, m, m, 1, U, m, T, m, 0, UT, m));
        MLI_TRY(FN(mli_gemm)(0, 0, count, len, m, -1, UT, m, V, len, 1, z, n));
    }
done:
    return rc;
}
