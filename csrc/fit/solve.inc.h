/* Body of solve.c for one precision: what works on the matrices as they are. */

/* W_e (U^T U)^-1 or (U^T U)^-1 W_e in X, which may be where it is to end. */
static molae_status
FN(solve_one)(const job *q, int64_t e, REAL *X, molae_errinfo *err)
{
    const int64_t n = q->n, rows = q->rows[e];
    const REAL *U = q->M[e];
    molae_status rc = MOLAE_OK;

    err->what = bad_input;
    if (!FN(mli_widen)(X, q->W[e], q->type, 0, rows * n))
        return MOLAE_E_NONFINITE;
    err->what = "triangular solve failed";
    if (U[0] == 0) { /* no row has reached it */
        memset(X, 0, (size_t)(rows * n) * sizeof(REAL));
    } else if (q->left) {
        MLI_TRY(FN(mli_trsm)(1, n, rows, U, n, X, rows));
        MLI_TRY(FN(mli_trsm)(0, n, rows, U, n, X, rows));
    } else {
        MLI_TRY(FN(mli_trsm_right)(0, rows, n, U, n, X, n));
        MLI_TRY(FN(mli_trsm_right)(1, rows, n, U, n, X, n));
    }
    err->what = bad_result;
    if (!FN(mli_round)(q->out[e], q->type, X, rows * n))
        return MOLAE_E_NONFINITE;
done:
    return rc;
}

static molae_status
FN(times_one)(const job *q, int64_t e, molae_errinfo *err)
{
    const int64_t n = q->n, rows = q->rows[e];
    const REAL *W = q->W[e], *M = q->M[e];
    REAL *Z = q->out[e];
    molae_status rc = MOLAE_OK;

    err->what = "matrix product failed";
    if (q->left)
        MLI_TRY(FN(mli_gemm)(0, 0, n, rows, n, 1, M, n, W, rows, 0, Z, rows));
    else
        MLI_TRY(FN(mli_gemm)(0, 0, rows, n, n, 1, W, n, M, n, 0, Z, n));
    err->what = bad_input;
    if (!FN(mli_round)(Z, q->type, Z, rows * n))
        return MOLAE_E_NONFINITE;
done:
    return rc;
}
