/* The f32 product Y (n,c) [+]= X (n,k) W (k,c) for some tens or hundreds of rows. BLAS packs W,
 * which comes from memory and is used once, and waits for it; here a block of W is packed and the
 * next one asked for while this one is multiplied. */

enum {
    NN_BLOCK = 8 * WIDE, /* columns of W that are packed at once */
    NN_DEEP = 128,       /* rows of W that are packed at once: 192 KiB, or 96 of vectors of 8 */
    NN_STEPS = 16        /* of k between two requests for memory */
};

/* The next block of W, to be asked for in runs of WIDE numbers: `left` of them, of which the next
 * is number `at` of `across` in its row. */
typedef struct {
    const float *W;
    int64_t ldw, across, row, at, left;
} fetch;

static inline int64_t
runs(int64_t cols)
{
    return (cols + WIDE - 1) / WIDE;
}

static inline __attribute__((always_inline)) void
fetch_some(fetch *f, int64_t n)
{
    for (; n > 0 && f->left > 0; n--, f->left--) {
        const int64_t first = f->row * f->ldw + f->at * WIDE;
        for (int64_t i = first; i < first + WIDE; i += 64 / (int64_t)sizeof *f->W)
            MLI_PREFETCH(f->W, i * (int64_t)sizeof *f->W, 2);
        if (++f->at == f->across) {
            f->at = 0;
            f->row++;
        }
    }
}

/* Y (rows,VL panels) [+]= X (rows,k) q (k,VL panels); the last panel has `last` columns. */
static inline __attribute__((always_inline)) void
nn_tile(const int rows, const int panels, float *Y, int64_t ldy, const float *X, int64_t ldx,
        const float *q, int64_t k, int64_t last, int accumulate, fetch *f, int64_t per_step)
{
    V s[TALL * PANELS];

    UNROLL
    for (int i = 0; i < rows * panels; i++)
        s[i] = v_zero();
    for (int64_t i = 0, end; i < k; i = end) {
        end = k - i < NN_STEPS ? k : i + NN_STEPS;
        fetch_some(f, per_step);
        q = add_columns(rows, panels, s, X, ldx, q, VL, VL * panels, i, end);
    }
    store_tile(rows, panels, Y, ldy, s, last, accumulate);
}

typedef void (*nn_tile_fn)(float *, int64_t, const float *, int64_t, const float *, int64_t,
                           int64_t, int, fetch *, int64_t);

#define TILE(ROWS_, PANELS_)                                                                    \
    static void nn_##ROWS_##_##PANELS_(float *Y, int64_t ldy, const float *X, int64_t ldx,      \
                                       const float *q, int64_t k, int64_t last, int accumulate, \
                                       fetch *f, int64_t per_step)                              \
    {                                                                                           \
        nn_tile(ROWS_, PANELS_, Y, ldy, X, ldx, q, k, last, accumulate, f, per_step);           \
    }
ALL_TILES
#undef TILE

static const nn_tile_fn nn_tiles[TALL][PANELS] = TABLE_OF(nn);

/* q[tile][k][VL panels] from W (k,c), c <= NN_BLOCK. */
static void
nn_pack(float *q, const float *W, int64_t ldw, int64_t c, int64_t k)
{
    for (int64_t i = 0; i < k; i++, W += ldw)
        for (int64_t j = 0, panels; j < c; j += VL * panels) {
            int64_t last;
            float *to = q + j * k;
            panels = panels_of(c - j, &last);
            for (int64_t p = 0; p < panels; p++)
                v_store(to + (i * panels + p) * VL,
                        v_load_part(W + j + VL * p, p == panels - 1 ? last : VL));
        }
}

/* A packed block of W (k,c) times all rows of X. */
static void
nn_multiply(float *Y, int64_t ldy, const float *X, int64_t ldx, const float *q, int64_t n,
            int64_t c, int64_t k, int accumulate, fetch *f)
{
    const int64_t tall = (n + TALL - 1) / TALL;
    const int64_t steps = tall * runs(c) * ((k + NN_STEPS - 1) / NN_STEPS);
    const int64_t per_step = steps > 0 ? (f->left + steps - 1) / steps : 0;

    for (int64_t j = 0, panels; j < c; j += VL * panels) {
        int64_t last;
        panels = panels_of(c - j, &last);
        for (int64_t t = tall, i = 0, rows; t > 0; t--, i += rows) {
            rows = (n - i + t - 1) / t; /* even parts */
            nn_tiles[rows - 1][panels - 1](Y + i * ldy + j, ldy, X + i * ldx, ldx, q + j * k, k,
                                           last, accumulate, f, per_step);
        }
    }
}

static size_t
nn_ws(void)
{
    return (size_t)NN_BLOCK * NN_DEEP * sizeof(float);
}

static void
nn(float *Y, int64_t ldy, const float *X, int64_t ldx, const float *W, int64_t ldw, int64_t n,
   int64_t c, int64_t k, int accumulate, void *ws)
{
    const int64_t piece = mli_piece(k, NN_DEEP);

    for (int64_t j = 0; j < c; j += NN_BLOCK) {
        const int64_t cols = c - j < NN_BLOCK ? c - j : NN_BLOCK;
        for (int64_t i = 0; i == 0 || i < k; i += piece) {
            const int64_t deep = k - i < piece ? k - i : piece;
            fetch f = {W + i * ldw + j, ldw, runs(cols), 0, 0, 0};
            nn_pack(ws, f.W, ldw, cols, deep);
            if (i + piece < k) { /* the rows below */
                f.W += piece * ldw;
                f.left = f.across * (k - i - piece < piece ? k - i - piece : piece);
            } else if (j + NN_BLOCK < c) { /* the columns beside */
                f.W = W + j + NN_BLOCK;
                f.across = runs(c - j - NN_BLOCK < NN_BLOCK ? c - j - NN_BLOCK : NN_BLOCK);
                f.left = f.across * (k < piece ? k : piece);
            }
            nn_multiply(Y + j, ldy, X + i, ldx, ws, n, cols, deep, accumulate || i > 0, &f);
        }
    }
}
