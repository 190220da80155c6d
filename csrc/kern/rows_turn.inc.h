/* Rows that become columns, and columns that become rows, VL by VL. */

/* Floats of a panel that turns VL columns at a time. */
static inline int64_t
panel_floats(int64_t k)
{
    return (k + VL - 1) / VL * VL * VL;
}

/* y (n) [+]= x, n <= VL. */
static inline __attribute__((always_inline)) void
put(float *y, V x, int64_t n, int accumulate)
{
    v_store_part(y, accumulate ? v_add(v_load_part(y, n), x) : x, n);
}

/* T (cols,VL) = the first numbers of up to VL rows of x from n on, as columns, missing ones as
 * zeros. Number i goes to row column[i] of T; without `column` to row i, and rows of T up to a
 * multiple of VL are zeros: a panel. */
static inline void
turn(float *T, const mli_rows_f32 *x, int64_t n, int64_t cols, const int32_t *column)
{
    for (int64_t i = 0; i < cols; i += VL) {
        const int64_t some = cols - i < VL ? cols - i : VL;
        V r[VL];
        for (int64_t p = 0; p < VL; p++)
            r[p] = n + p < x->N ? v_load_part(mli_row_f32(x, n + p) + i, some) : v_zero();
        v_transpose(r);
        for (int64_t p = 0; p < (column != NULL ? some : VL); p++)
            v_store(T + VL * (column != NULL ? column[i + p] : i + p), r[p]);
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
    const mli_rows_f32 b = {B, ldb, n, NULL};

    for (int64_t j = 0; j < n; j += VL)
        turn(q + j / VL * panel_floats(k), &b, j, k, NULL);
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
    for (int64_t i = 0; i < n; i++)
        put(C + i * ldc, r[i], m, accumulate);
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
        for (int64_t p = 0; p < VL && p < rows; p++)
            put(y + row[p] * D + j, r[p], some, 1);
    }
}
