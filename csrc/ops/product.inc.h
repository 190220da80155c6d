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
#if NARROW_STORAGE
    if (r <= SMALL_TN && k <= SMALL_TN && mli_kernels_get()->rows_f32_native) {
        const mli_rows_f32 x = {X, ldx, n, NULL};
        mli_kernels_get()->tn_f32(dW, ldw, dY, ldy, &x, r, k, add);
        return MOLAE_OK;
    }
#endif
    return FN(mli_gemm)(1, 0, r, k, n, 1, dY, ldy, X, ldx, add ? 1 : 0, dW, ldw);
}

/* Four rows for each reading of `column`. */
static void
FN(gather_plainly)(REAL *restrict X, int64_t ldx, const FN(mli_rows) * x, const int32_t *column,
                   int64_t cols)
{
    const REAL *restrict src = x->src;
    const int64_t *row = x->row, D = x->D;
    int64_t i = 0;

    for (; i + 4 <= x->N; i += 4) {
        const REAL *a = src + row[i] * D, *b = src + row[i + 1] * D;
        const REAL *c = src + row[i + 2] * D, *d = src + row[i + 3] * D;
        REAL *to = X + i * ldx;
        for (int64_t j = 0; j < cols; j++) {
            const int64_t at = column[j];
            to[j] = a[at];
            to[ldx + j] = b[at];
            to[2 * ldx + j] = c[at];
            to[3 * ldx + j] = d[at];
        }
    }
    for (; i < x->N; i++)
        for (int64_t j = 0; j < cols; j++)
            X[i * ldx + j] = src[row[i] * D + column[j]];
}

void
FN(mli_gather)(REAL *X, int64_t ldx, const FN(mli_rows) * x, const int32_t *column, int64_t cols,
               const mli_product_scratch *s)
{
#if NARROW_STORAGE
    const mli_kernels *kern = mli_kernels_get();

    if (x->N > STREAM_UP_TO && kern->rows_f32_native) {
        kern->gather_f32(X, ldx, x, column, cols, s->many);
        return;
    }
#endif
    (void)s;
    FN(gather_plainly)(X, ldx, x, column, cols);
}

void
FN(mli_scatter)(REAL *y, int64_t D, const int64_t *row, int64_t n, const REAL *own, int64_t cols,
                const REAL *rest, const int32_t *column, const mli_product_scratch *s)
{
#if NARROW_STORAGE
    mli_kernels_get()->scatter_f32(y, D, row, n, own, cols, rest, column, s->many);
#else
    (void)s;
    for (int64_t i = 0; i < n; i++, own += cols, rest += D - cols) {
        REAL *to = y + row[i] * D;
        for (int64_t j = 0; j < cols; j++)
            to[column[j]] += own[j];
        for (int64_t j = cols; j < D; j++)
            to[column[j]] += rest[j - cols];
    }
#endif
}

molae_status
FN(mli_product_gauge)(REAL *Z, int64_t ldz, const FN(mli_rows) * x, const int32_t *own,
                      int64_t cols, const int32_t *rest, int64_t k, const void *M,
                      molae_dtype dtype, REAL *X, const mli_product_scratch *s)
{
#if NARROW_STORAGE
    const mli_kernels *kern = mli_kernels_get();

    if (dtype == OWN && x->N > STREAM_UP_TO && kern->rows_f32_native) {
        kern->gauge_f32(Z, ldz, x, own, cols, rest, k, M, k, s->many);
        return MOLAE_OK;
    }
#endif
    FN(mli_gather)(Z, ldz, x, own, cols, s); /* the identity */
    if (k == 0)
        return MOLAE_OK;
    FN(mli_gather)(X, k, x, rest, k, s);
    return FN(mli_product_nt)(Z, ldz, 1, X, k, M, k, dtype, x->N, cols, k, s);
}
