/* What the two halves of rows_f32 share: a matrix read number by number against panels of columns,
 * sums in registers. The includer defines V, a vector of floats, v_load, v_spread and v_fma. */

/* s (rows,panels) += A (rows, columns i .. end-1) times panels that stand `apart`, each with one
 * vector a column, `step` after the last one's; q is at column i. Returns where it ends. */
static inline __attribute__((always_inline)) const float *
add_columns(const int rows, const int panels, V s[24], const float *A, int64_t lda, const float *q,
            int64_t apart, int64_t step, int64_t i, int64_t end)
{
    for (; i < end; i++, q += step) {
        V b[3];
        UNROLL
        for (int p = 0; p < panels; p++)
            b[p] = v_load(q + p * apart);
        UNROLL
        for (int r = 0; r < rows; r++) {
            const V a = v_spread(A[r * lda + i]);
            UNROLL
            for (int p = 0; p < panels; p++)
                s[r * panels + p] = v_fma(a, b[p], s[r * panels + p]);
        }
    }
    return q;
}
