/* Body of product.c for one precision. */

/* Nothing to add up: Y is 0, or stays as it is. */
static void
FN(no_terms)(REAL *Y, int64_t ldy, int add, int64_t n, int64_t c)
{
    for (int64_t i = 0; !add && i < n; i++)
        memset(Y + i * ldy, 0, (size_t)c * sizeof(REAL));
}

molae_status
FN(mli_product_nt)(REAL *Y, int64_t ldy, int add, const REAL *X, int64_t ldx, const void *W,
                   int64_t ldw, molae_dtype dtype, int64_t n, int64_t r, int64_t k,
                   const mli_product_scratch *s)
{
    const mli_kernels *kern = mli_kernels_get();
    molae_status rc = MOLAE_OK;

    if (k == 0) {
        FN(no_terms)(Y, ldy, add, n, r);
        return MOLAE_OK;
    }
    if (n == 0 || r == 0)
        return MOLAE_OK;
    if (dtype == OWN) {
#if NARROW_STORAGE
        if (n > STREAM_UP_TO && n <= MLI_MANY_ROWS_NT && kern->rows_f32_native) {
            kern->rows_f32(MLI_NT, Y, ldy, X, ldx, W, ldw, n, r, k, add, s->many);
            return MOLAE_OK;
        }
#endif
        if (n > STREAM_UP_TO)
            return FN(mli_gemm)(0, 1, n, r, k, 1, X, ldx, W, ldw, add ? 1 : 0, Y, ldy);
        kern->STREAM_NT(Y, ldy, X, ldx, W, ldw, n, r, k, add);
        return MOLAE_OK;
    }
#if NARROW_STORAGE
    if (n <= STREAM_UP_TO) {
        kern->stream_nt_bf16(Y, ldy, X, ldx, W, ldw, n, r, k, add);
        return MOLAE_OK;
    }
    if (s->narrow) {
        narrow_product(MLI_NT, Y, ldy, add, X, ldx, W, ldw, n, r, k, s);
        return MOLAE_OK;
    }
    for (int64_t r0 = 0; r0 < r; r0 += TILE_ROWS)
        for (int64_t k0 = 0; k0 < k; k0 += TILE_COLS) {
            const int64_t nr = MLI_MIN((int64_t)TILE_ROWS, r - r0);
            const int64_t nk = MLI_MIN((int64_t)TILE_COLS, k - k0);
            FN(widen_tile)(s->tile, W, ldw, dtype, r0, nr, k0, nk);
            MLI_TRY(FN(mli_gemm)(0, 1, n, nr, nk, 1, X + k0, ldx, s->tile, nk,
                                 add || k0 > 0 ? 1 : 0, Y + r0, ldy));
        }
done:
    return rc;
#else
    (void)s;
    rc = MOLAE_E_ARG;
    return rc;
#endif
}

molae_status
FN(mli_product_nn)(REAL *Y, int64_t ldy, int add, const REAL *X, int64_t ldx, const void *W,
                   int64_t ldw, molae_dtype dtype, int64_t n, int64_t c, int64_t k,
                   const mli_product_scratch *s)
{
    const mli_kernels *kern = mli_kernels_get();
    molae_status rc = MOLAE_OK;

    if (k == 0) {
        FN(no_terms)(Y, ldy, add, n, c);
        return MOLAE_OK;
    }
    if (n == 0 || c == 0)
        return MOLAE_OK;
    if (dtype == OWN) {
#if NARROW_STORAGE
        if (n > STREAM_UP_TO && n <= MLI_MANY_ROWS_NN && kern->rows_f32_native) {
            kern->rows_f32(MLI_NN, Y, ldy, X, ldx, W, ldw, n, c, k, add, s->many);
            return MOLAE_OK;
        }
#endif
        if (n > STREAM_UP_TO)
            return FN(mli_gemm)(0, 0, n, c, k, 1, X, ldx, W, ldw, add ? 1 : 0, Y, ldy);
        kern->STREAM_NN(Y, ldy, X, ldx, W, ldw, n, c, k, add);
        return MOLAE_OK;
    }
#if NARROW_STORAGE
    if (n <= (s->narrow ? NARROW_FROM : STREAM_UP_TO)) {
        kern->stream_nn_bf16(Y, ldy, X, ldx, W, ldw, n, c, k, add);
        return MOLAE_OK;
    }
    if (s->narrow) {
        narrow_product(MLI_NN, Y, ldy, add, X, ldx, W, ldw, n, c, k, s);
        return MOLAE_OK;
    }
    for (int64_t c0 = 0; c0 < c; c0 += TILE_COLS)
        for (int64_t k0 = 0; k0 < k; k0 += TILE_ROWS) {
            const int64_t nk = MLI_MIN((int64_t)TILE_ROWS, k - k0);
            const int64_t nc = MLI_MIN((int64_t)TILE_COLS, c - c0);
            FN(widen_tile)(s->tile, W, ldw, dtype, k0, nk, c0, nc);
            MLI_TRY(FN(mli_gemm)(0, 0, n, nc, nk, 1, X + k0, ldx, s->tile, nc,
                                 add || k0 > 0 ? 1 : 0, Y + c0, ldy));
        }
done:
    return rc;
#else
    (void)s;
    rc = MOLAE_E_ARG;
    return rc;
#endif
}

molae_status
FN(mli_product_tn)(REAL *dW, int64_t ldw, int add, const REAL *dY, int64_t ldy, const REAL *X,
                   int64_t ldx, int64_t n, int64_t r, int64_t k)
{
    if (r == 0 || k == 0)
        return MOLAE_OK;
    if (n == 0) {
        FN(no_terms)(dW, ldw, add, r, k);
        return MOLAE_OK;
    }
    return FN(mli_gemm)(1, 0, r, k, n, 1, dY, ldy, X, ldx, add ? 1 : 0, dW, ldw);
}
