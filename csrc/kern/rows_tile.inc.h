/* Tiles of sums in registers, for rows_*.inc.h. The includer has the vectors of its instruction set
 * and TALL, the rows of a tile: TALL by PANELS sums, and PANELS + 1 vectors besides.
 *
 * A panel is VL columns of a matrix, one vector each k: q[panel][k][VL], aligned, with zeros in the
 * columns that are missing. */

enum { PANELS = 3, WIDE = VL * PANELS };

/* s (panels) += a b, for one row of a tile. */
static inline __attribute__((always_inline)) void
add_row(const int panels, V *s, float a, const V *b)
{
    const V all = v_set1(a);

    UNROLL
    for (int p = 0; p < panels; p++)
        s[p] = v_fma(all, b[p], s[p]);
}

/* s (rows,panels) += A (rows, columns i .. end-1) times panels that stand `apart`, each with one
 * vector a column, `step` after the last one's; q is at column i. Returns where it ends. */
static inline __attribute__((always_inline)) const float *
add_columns(const int rows, const int panels, V *s, const float *A, int64_t lda, const float *q,
            int64_t apart, int64_t step, int64_t i, int64_t end)
{
    for (; i < end; i++, q += step) {
        V b[PANELS];
        UNROLL
        for (int p = 0; p < panels; p++)
            b[p] = v_load(q + p * apart);
        UNROLL
        for (int r = 0; r < rows; r++)
            add_row(panels, s + r * panels, A[r * lda + i], b);
    }
    return q;
}

/* Y (rows,VL panels) [+]= s; the last panel has `last` columns. */
static inline __attribute__((always_inline)) void
store_tile(const int rows, const int panels, float *Y, int64_t ldy, const V s[TALL * PANELS],
           int64_t last, int accumulate)
{
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
    for (int p = 0; p < panels; p++) {
        const int64_t n = p == panels - 1 ? last : VL;
        put(Y + r * ldy + VL * p, s[r * panels + p], n, accumulate);
    }
}

/* Panels of a tile that begins `cols` columns, and how many columns the last one has. Of four left
 * it takes two, since one alone would leave the units waiting. */
static inline int64_t
panels_of(int64_t cols, int64_t *last)
{
    const int64_t all = (cols + VL - 1) / VL;
    const int64_t panels = all == PANELS + 1 ? 2 : (all < PANELS ? all : PANELS);
    const int64_t left = cols - VL * (panels - 1);

    *last = left < VL ? left : VL;
    return panels;
}

/* TILE(rows, panels) for every size of a tile, and a table of what these have defined. */
#define TILES_OF(ROWS_) TILE(ROWS_, 1) TILE(ROWS_, 2) TILE(ROWS_, 3)
#define SIZES_OF(F, ROWS_) {F##_##ROWS_##_1, F##_##ROWS_##_2, F##_##ROWS_##_3}
#define TILES_TO_4 TILES_OF(1) TILES_OF(2) TILES_OF(3) TILES_OF(4)
#define SIZES_TO_4(F) SIZES_OF(F, 1), SIZES_OF(F, 2), SIZES_OF(F, 3), SIZES_OF(F, 4)
#if TALL == 4
#define ALL_TILES TILES_TO_4
#define TABLE_OF(F) {SIZES_TO_4(F)}
#elif TALL == 8
#define ALL_TILES TILES_TO_4 TILES_OF(5) TILES_OF(6) TILES_OF(7) TILES_OF(8)
#define TABLE_OF(F) {SIZES_TO_4(F), SIZES_OF(F, 5), SIZES_OF(F, 6), SIZES_OF(F, 7), SIZES_OF(F, 8)}
#endif
