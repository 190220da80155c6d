/* Body of rows.c for one precision. */

molae_status
FN(mli_rows_load)(REAL *X, const molae_stack *s, int64_t e, int64_t r0, int64_t nr, REAL *tmp,
                  double *sumsq)
{
    const int64_t D = s->D, F = s->F;
    int finite = 1;

    if (s->side == MOLAE_SIDE_INPUT) {
        finite = FN(mli_widen)(X, s->W[e], s->dtype, r0 * D, nr * D);
    } else {
        /* X[r][d] = W[d][r0+r], a tile of columns of X at a time so that writes stay in lines */
        for (int64_t d0 = 0; d0 < D; d0 += MLI_ROWS_TILE) {
            const int64_t nd = MLI_MIN((int64_t)MLI_ROWS_TILE, D - d0);
            for (int64_t d = 0; d < nd; d++)
                finite &= FN(mli_widen)(tmp + d * nr, s->W[e], s->dtype, (d0 + d) * F + r0, nr);
            for (int64_t r = 0; r < nr; r++)
                for (int64_t d = 0; d < nd; d++)
                    X[r * D + d0 + d] = tmp[d * nr + r];
        }
    }
    if (sumsq != NULL)
        *sumsq = FN(mli_sumsq)(X, nr * D);
    return finite ? MOLAE_OK : MOLAE_E_NONFINITE;
}

molae_status
FN(mli_rows_store)(void *dst, const molae_stack *s, int64_t r0, int64_t nr, int64_t R, REAL *A,
                   REAL *tmp)
{
    const size_t size = mli_dtype_size(s->dtype);
    int finite = 1;

    if (s->side == MOLAE_SIDE_INPUT) {
        finite = FN(mli_round)((char *)dst + (size_t)(r0 * R) * size, s->dtype, A, nr * R);
    } else {
        for (int64_t j = 0; j < R; j++) {
            for (int64_t r = 0; r < nr; r++)
                tmp[r] = A[r * R + j];
            finite &=
                FN(mli_round)((char *)dst + (size_t)(j * s->F + r0) * size, s->dtype, tmp, nr);
            for (int64_t r = 0; r < nr; r++)
                A[r * R + j] = tmp[r];
        }
    }
    return finite ? MOLAE_OK : MOLAE_E_NONFINITE;
}
