/* Tiles of Y in registers: what the products share that pack W. The includer defines V, a vector of
 * 16 floats, MASK, a bit for each of them, v_add, v_load_some and v_store_some. */

/* Rows, panels of 16 columns, and columns of Y in registers: up to 24 sums. */
enum { TALL = 8, PANELS = 3, WIDE = 16 * PANELS };

/* Y (rows,16 panels) [+]= s; the last panel has the columns of `last`. */
static inline __attribute__((always_inline)) void
store_tile(const int rows, const int panels, float *Y, int64_t ldy, const V s[TALL * PANELS],
           MASK last, int accumulate)
{
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
    for (int p = 0; p < panels; p++) {
        const MASK m = p == panels - 1 ? last : (MASK)0xFFFF;
        float *y = Y + r * ldy + 16 * p;
        V v = s[r * panels + p];
        if (accumulate)
            v = v_add(v_load_some(m, y), v);
        v_store_some(y, m, v);
    }
}

/* Panels of up to `cols` columns, and which columns the last one has. */
static inline int64_t
panels_of(int64_t cols, MASK *last)
{
    const int64_t panels = cols < WIDE ? (cols + 15) / 16 : PANELS;
    const int64_t left = cols - 16 * (panels - 1);

    *last = (MASK)(left < 16 ? (1u << left) - 1u : 0xFFFFu);
    return panels;
}

/* TILE(rows, panels) for every size of a tile, and a table of what these have defined. */
#define TILES_OF(ROWS_) TILE(ROWS_, 1) TILE(ROWS_, 2) TILE(ROWS_, 3)
#define ALL_TILES \
    TILES_OF(1) TILES_OF(2) TILES_OF(3) TILES_OF(4) TILES_OF(5) TILES_OF(6) TILES_OF(7) TILES_OF(8)
#define TABLE_OF(F)                                                                                \
    {                                                                                              \
        {F##_1_1, F##_1_2, F##_1_3}, {F##_2_1, F##_2_2, F##_2_3}, {F##_3_1, F##_3_2, F##_3_3},     \
            {F##_4_1, F##_4_2, F##_4_3}, {F##_5_1, F##_5_2, F##_5_3}, {F##_6_1, F##_6_2, F##_6_3}, \
            {F##_7_1, F##_7_2, F##_7_3},                                                           \
        {                                                                                          \
            F##_8_1, F##_8_2, F##_8_3                                                              \
        }                                                                                          \
    }
