/* The f32 products of rows with a small matrix: W is packed and stays in the first caches, and X is
 * read number by number where it lies, in any order of rows and columns. */

/* What a tile multiplies. */
typedef struct {
    const int32_t *rest; /* columns of x; NULL: 0 .. k-1 */
    int64_t k, stride;   /* stride: of panels of q */
    int accumulate;
} small_how;

/* taken (rows,WIDE) = columns of rows of x. Number by number: a gather of vectors is no faster on
 * some CPUs, and much slower on others. */
static inline void
take(float *taken, int rows, const float *const *x, const int32_t *own, int64_t cols)
{
    for (int64_t j = 0; j < cols; j++)
        for (int r = 0; r < rows; r++)
            taken[r * WIDE + j] = x[r][own[j]];
}

/* Y (rows,VL panels) [+]= rows of x times panels of q, plus the `own` columns of x unless NULL; the
 * last panel has `last` columns. */
static inline __attribute__((always_inline)) void
small_tile(const int rows, const int panels, float *Y, int64_t ldy, const float *const x[TALL],
           const float *q, const small_how *how, const int32_t *own, int64_t last)
{
    const int32_t *rest = how->rest;
    const int64_t k = how->k, stride = how->stride;
    V s[TALL * PANELS];

    UNROLL
    for (int i = 0; i < rows * panels; i++)
        s[i] = v_zero();
    for (int64_t i = 0; i < k; i++, q += VL) {
        const int64_t at = rest != NULL ? rest[i] : i;
        V b[PANELS];
        UNROLL
        for (int p = 0; p < panels; p++)
            b[p] = v_load(q + p * stride);
        UNROLL
        for (int r = 0; r < rows; r++)
            add_row(panels, s + r * panels, x[r][at], b);
    }
    if (own != NULL) {
        float taken[TALL * WIDE] = {0};
        take(taken, rows, x, own, VL * (panels - 1) + last);
        UNROLL
        for (int r = 0; r < rows; r++)
            UNROLL
        for (int p = 0; p < panels; p++)
            s[r * panels + p] = v_add(s[r * panels + p], v_load(taken + r * WIDE + VL * p));
    }
    store_tile(rows, panels, Y, ldy, s, last, how->accumulate);
}

/* dW (rows,VL panels) [+]= dY (N,rows)^T times columns c0 .. of x; the last panel has `last`. */
static inline __attribute__((always_inline)) void
tn_tile(const int rows, const int panels, float *dW, int64_t ldw, const float *dY, int64_t ldy,
        const mli_rows_f32 *x, int64_t c0, int64_t last, int accumulate)
{
    /* Some CPUs load under a mask slowly. Where there are columns before them, the last ones are
     * read as the end of a whole vector. */
    const int64_t at = VL * (panels - 1), back = c0 + at >= VL - last ? VL - last : 0;
    const int64_t wide = back > 0 ? VL : last;
    V s[TALL * PANELS];

    UNROLL
    for (int i = 0; i < rows * panels; i++)
        s[i] = v_zero();
    for (int64_t n = 0; n < x->N; n++, dY += ldy) {
        const float *from = mli_row_f32(x, n) + c0;
        V b[PANELS];
        UNROLL
        for (int p = 0; p < panels - 1; p++)
            b[p] = v_load(from + VL * p);
        b[panels - 1] = v_load_part(from + at - back, wide);
        UNROLL
        for (int r = 0; r < rows; r++)
            add_row(panels, s + r * panels, dY[r], b);
    }
    if (back > 0) {
        UNROLL
        for (int r = 0; r < rows; r++) {
            float end[2 * VL];
            v_store(end, s[(r + 1) * panels - 1]);
            s[(r + 1) * panels - 1] = v_load_part(end + back, last);
        }
    }
    store_tile(rows, panels, dW, ldw, s, last, accumulate);
}

#define TILE(ROWS_, PANELS_)                                                                 \
    static void small_##ROWS_##_##PANELS_(float *Y, int64_t ldy, const float *const *x,      \
                                          const float *q, const small_how *how,              \
                                          const int32_t *own, int64_t last)                  \
    {                                                                                        \
        small_tile(ROWS_, PANELS_, Y, ldy, x, q, how, own, last);                            \
    }                                                                                        \
    static void tn_##ROWS_##_##PANELS_(float *dW, int64_t ldw, const float *dY, int64_t ldy, \
                                       const mli_rows_f32 *x, int64_t c0, int64_t last,      \
                                       int accumulate)                                       \
    {                                                                                        \
        tn_tile(ROWS_, PANELS_, dW, ldw, dY, ldy, x, c0, last, accumulate);                  \
    }
ALL_TILES
#undef TILE

static void (*const small_tiles[TALL][PANELS])(float *, int64_t, const float *const *,
                                               const float *, const small_how *, const int32_t *,
                                               int64_t) = TABLE_OF(small);
static void (*const tn_tiles[TALL][PANELS])(float *, int64_t, const float *, int64_t,
                                            const mli_rows_f32 *, int64_t, int64_t,
                                            int) = TABLE_OF(tn);

static void
small(float *Y, int64_t ldy, const mli_rows_f32 *x, const int32_t *own, int64_t cols,
      const int32_t *rest, int64_t k, const float *W, int64_t ldw, int accumulate, void *ws)
{
    const small_how how = {rest, k, panel_floats(k), accumulate};
    const int64_t tall = (x->N + TALL - 1) / TALL;

    pack_rows(ws, W, ldw, cols, k);
    for (int64_t j = 0, panels; j < cols; j += VL * panels) {
        const float *q = (const float *)ws + j / VL * how.stride;
        int64_t last;
        panels = panels_of(cols - j, &last);
        for (int64_t t = tall, n = 0, rows; t > 0; t--, n += rows) {
            const float *from[TALL];
            rows = (x->N - n + t - 1) / t; /* even parts */
            for (int64_t r = 0; r < rows; r++)
                from[r] = mli_row_f32(x, n + r);
            small_tiles[rows - 1][panels - 1](Y + n * ldy + j, ldy, from, q, &how,
                                              own != NULL ? own + j : NULL, last);
        }
    }
}

static void
tn_f32(float *dW, int64_t ldw, const float *dY, int64_t ldy, const mli_rows_f32 *x, int64_t r,
       int64_t k, int accumulate)
{
    const int64_t tall = (r + TALL - 1) / TALL;

    for (int64_t j = 0, panels; j < k; j += VL * panels) {
        int64_t last;
        panels = panels_of(k - j, &last);
        for (int64_t t = tall, i = 0, rows; t > 0; t--, i += rows) {
            rows = (r - i + t - 1) / t;
            tn_tiles[rows - 1][panels - 1](dW + i * ldw + j, ldw, dY + i, ldy, x, j, last,
                                           accumulate);
        }
    }
}
