/* Rows that become columns, and columns that become rows, VL by VL. */

/* A panel, T (D,VL) = up to VL rows of x from n on, as columns; missing ones, and rows of T up to a
 * multiple of VL, are zeros. */
static inline void
turn(float *T, const mli_rows_f32 *x, int64_t n)
{
    for (int64_t i = 0; i < x->D; i += VL, T += VL * VL) {
        const int64_t cols = x->D - i < VL ? x->D - i : VL;
        V r[VL];
        for (int64_t p = 0; p < VL; p++)
            r[p] = n + p < x->N ? v_load_part(mli_row_f32(x, n + p) + i, cols) : v_zero();
        v_transpose(r);
        for (int64_t p = 0; p < VL; p++)
            v_store(T + VL * p, r[p]);
    }
}

/* X (rows,cols), of at most VL rows = columns of such a T as rows. */
static inline void
turn_back(float *X, int64_t ldx, const float *T, int64_t rows, const int32_t *column, int64_t cols)
{
    for (int64_t j = 0; j < cols; j += VL) {
        const int64_t some = cols - j < VL ? cols - j : VL;
        V r[VL];
        for (int64_t c = 0; c < VL; c++)
            r[c] = c < some ? v_load(T + VL * column[j + c]) : v_zero();
        v_transpose(r);
        for (int64_t p = 0; p < VL && p < rows; p++)
            v_store_part(X + p * ldx + j, r[p], some);
    }
}

/* All panels of B (n,k), panel_floats(k) apart: its rows become columns. */
static inline void
pack_rows(float *q, const float *B, int64_t ldb, int64_t n, int64_t k)
{
    for (int64_t j = 0; j < n; j += VL)
        for (int64_t i = 0; i < k; i += VL, q += VL * VL) {
            const int64_t cols = k - i < VL ? k - i : VL;
            V r[VL];
            for (int64_t p = 0; p < VL; p++)
                r[p] = j + p < n ? v_load_part(B + (j + p) * ldb + i, cols) : v_zero();
            v_transpose(r);
            for (int64_t p = 0; p < VL; p++)
                v_store(q + VL * p, r[p]);
        }
}

/* C (n,m) [+]= T (m,n)^T for one tile of m, n <= VL; VL rows of T, ldt apart, are read. */
static inline void
store_turned(float *C, int64_t ldc, const float *T, int64_t ldt, int64_t m, int64_t n,
             int accumulate)
{
    V r[VL];

    for (int i = 0; i < VL; i++)
        r[i] = v_load(T + ldt * i);
    v_transpose(r);
    for (int64_t i = 0; i < n; i++) {
        V t = r[i];
        if (accumulate)
            t = v_add(t, v_load_part(C + i * ldc, m));
        v_store_part(C + i * ldc, t, m);
    }
}

/* Up to VL rows of a (rows,cols) become columns of T, each where `column` says. */
static inline void
turn_to(float *T, const float *a, int64_t rows, int64_t cols, const int32_t *column)
{
    for (int64_t i = 0; i < cols; i += VL) {
        const int64_t some = cols - i < VL ? cols - i : VL;
        V r[VL];
        for (int64_t p = 0; p < VL; p++)
            r[p] = p < rows ? v_load_part(a + p * cols + i, some) : v_zero();
        v_transpose(r);
        for (int64_t p = 0; p < some; p++)
            v_store(T + VL * column[i + p], r[p]);
    }
}

/* Rows of y += columns of T (D,VL). */
static inline void
add_back(float *y, int64_t D, const int64_t *row, const float *T, int64_t rows)
{
    for (int64_t j = 0; j < D; j += VL) {
        const int64_t some = D - j < VL ? D - j : VL;
        V r[VL];
        for (int64_t c = 0; c < VL; c++)
            r[c] = c < some ? v_load(T + VL * (j + c)) : v_zero();
        v_transpose(r);
        for (int64_t p = 0; p < VL && p < rows; p++) {
            float *to = y + row[p] * D + j;
            v_store_part(to, v_add(v_load_part(to, some), r[p]), some);
        }
    }
}

/* See mli_kernels; ws takes a panel. */
static inline void
gather_f32(float *X, int64_t ldx, const mli_rows_f32 *x, const int32_t *column, int64_t cols,
           void *ws)
{
    /* As columns first, of which any follow any: no number is moved alone. */
    for (int64_t n = 0; n < x->N; n += VL) {
        turn(ws, x, n);
        turn_back(X + n * ldx, ldx, ws, x->N - n, column, cols);
    }
}

/* See mli_kernels; ws takes a panel. */
static inline void
scatter_f32(float *y, int64_t D, const int64_t *row, int64_t N, const float *own, int64_t cols,
            const float *rest, const int32_t *column, void *ws)
{
    const int64_t k = D - cols;
    int64_t n = 0;

    for (; N - n > VL / 4; n += VL) {
        const int64_t rows = N - n < VL ? N - n : VL;
        turn_to(ws, own + n * cols, rows, cols, column);
        turn_to(ws, rest + n * k, rows, k, column + cols);
        add_back(y, D, row + n, ws, rows);
    }
    for (; n < N; n++) { /* too few to be worth it */
        float *to = y + row[n] * D;
        for (int64_t j = 0; j < cols; j++)
            to[column[j]] += own[n * cols + j];
        for (int64_t j = 0; j < k; j++)
            to[column[cols + j]] += rest[n * k + j];
    }
}
