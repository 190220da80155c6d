/* The f32 product Y (N,r) [+]= X (N,k) W (r,k)^T for some tens or hundreds of rows. BLAS packs W,
 * which comes from memory and is used once; here X is packed, and W is read where it lies, the next
 * piece while this one is multiplied. */

enum {
    NT_BAND = 48,  /* rows of W that are taken through all of k before the next; VL divides it */
    NT_DEEP = 256, /* of k at a time: three panels are 48 KiB, or 24 of vectors of 8 */
    /* of W by 1, 2 and 3 panels, as many sums as stay in registers */
    NT_ROWS_1 = 12,
    NT_ROWS_2 = TALL * PANELS / 2,
    NT_ROWS_3 = TALL
};

/* T (rows,VL panels) [+]= W (rows,k) times panels of q, `stride` apart. Asks for what stands
 * `ahead` bytes after W. */
static inline __attribute__((always_inline)) void
nt_tile(const int rows, const int panels, float *T, int64_t ldt, const float *W, int64_t ldw,
        const float *q, int64_t stride, int64_t k, int accumulate, ptrdiff_t ahead)
{
    V s[TALL * PANELS];

    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
    for (int p = 0; p < panels; p++)
        s[r * panels + p] = accumulate ? v_load(T + r * ldt + VL * p) : v_zero();
    for (int64_t i = 0, end; i < k; i = end) {
        end = k - i < 16 ? k : i + 16;
        UNROLL
        for (int r = 0; r < rows; r++)
            MLI_PREFETCH(W + r * ldw + i, ahead, 2);
        q = add_columns(rows, panels, s, W, ldw, q, stride, VL, i, end);
    }
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
    for (int p = 0; p < panels; p++)
        v_store(T + r * ldt + VL * p, s[r * panels + p]);
}

/* The same for any number m of rows. Of the tiles every `passes`-th asks ahead, from `pass` on. */
#define COLUMN(PANELS, ROWS_)                                                                    \
    static void column_##PANELS(float *T, int64_t ldt, const float *W, int64_t ldw,              \
                                const float *q, int64_t stride, int64_t m, int64_t k,            \
                                int accumulate, ptrdiff_t ahead, int64_t pass, int64_t passes)   \
    {                                                                                            \
        int64_t i = 0, at = passes - pass;                                                       \
        for (; i + ROWS_ <= m; i += ROWS_, at++)                                                 \
            nt_tile(ROWS_, PANELS, T + i * ldt, ldt, W + i * ldw, ldw, q, stride, k, accumulate, \
                    at % passes == 0 ? ahead : 0);                                               \
        for (; i + 4 <= m; i += 4, at++)                                                         \
            nt_tile(4, PANELS, T + i * ldt, ldt, W + i * ldw, ldw, q, stride, k, accumulate,     \
                    at % passes == 0 ? ahead : 0);                                               \
        for (; i < m; i++, at++)                                                                 \
            nt_tile(1, PANELS, T + i * ldt, ldt, W + i * ldw, ldw, q, stride, k, accumulate,     \
                    at % passes == 0 ? ahead : 0);                                               \
    }
COLUMN(1, NT_ROWS_1)
COLUMN(2, NT_ROWS_2)
COLUMN(3, NT_ROWS_3)
#undef COLUMN

/* Whether to pack W rather than X. Either way a number's sum is the same. */
static int
is_small(int64_t N, int64_t r, int64_t k)
{
    return r <= N && k <= NT_DEEP;
}

static size_t
nt_ws(int64_t N, int64_t k)
{
    const size_t panels = (size_t)((N + VL - 1) / VL), deep = (size_t)(k / VL + (k % VL > 0));
    const size_t panel = mli_size_add(mli_size_mul(deep, VL * VL), NT_BAND * VL);

    return mli_size_mul(mli_size_mul(panels, panel), sizeof(float));
}

/* Y (N,r) [+]= panels of q times W (r,k)^T, by way of t (NT_BAND,VL panels). */
static void
nt_multiply(float *Y, int64_t ldy, const float *q, const float *W, int64_t ldw, int64_t N,
            int64_t r, int64_t k, int accumulate, float *t)
{
    const int64_t panels = (N + VL - 1) / VL, passes = (panels + 2) / 3, ldt = VL * panels;
    const int64_t stride = panel_floats(k), piece = mli_piece(k, NT_DEEP);

    for (int64_t j = 0; j < r; j += NT_BAND) {
        const int64_t rows = r - j < NT_BAND ? r - j : NT_BAND;
        for (int64_t i = 0; i == 0 || i < k; i += piece) {
            const int64_t deep = k - i < piece ? k - i : piece;
            const int64_t next = i + piece < k ? piece : NT_BAND * ldw - i;
            const ptrdiff_t ahead = (ptrdiff_t)sizeof(float) * next;
            for (int64_t p = 0; p < passes; p++) {
                const int64_t p0 = panels * p / passes, wide = panels * (p + 1) / passes - p0;
                (wide == 3   ? column_3
                 : wide == 2 ? column_2
                             : column_1)(t + VL * p0, ldt, W + j * ldw + i, ldw,
                                         q + p0 * stride + VL * i, stride, rows, deep, i > 0, ahead,
                                         p, passes);
            }
        }
        for (int64_t p = 0; p < N; p += VL)
            for (int64_t i = 0; i < rows; i += VL)
                store_turned(Y + p * ldy + j + i, ldy, t + i * ldt + p, ldt,
                             rows - i < VL ? rows - i : VL, N - p < VL ? N - p : VL, accumulate);
    }
}

static void
nt(float *Y, int64_t ldy, const float *X, int64_t ldx, const float *W, int64_t ldw, int64_t N,
   int64_t r, int64_t k, int accumulate, void *ws)
{
    const mli_rows_f32 x = {X, ldx, N, NULL};
    float *q = ws;

    if (is_small(N, r, k)) {
        small(Y, ldy, &x, NULL, r, NULL, k, W, ldw, accumulate, ws);
        return;
    }
    pack_rows(q, X, ldx, N, k);
    nt_multiply(Y, ldy, q, W, ldw, N, r, k, accumulate, q + (N + VL - 1) / VL * panel_floats(k));
}

/* As nt_ws, and one panel of all columns of x. */
static size_t
gauge_ws(int64_t N, int64_t D)
{
    return mli_size_add(nt_ws(N, D), mli_size_mul((size_t)panel_floats(D), sizeof(float)));
}

static void
gauge_f32(float *Z, int64_t ldz, const mli_rows_f32 *x, const int32_t *own, int64_t cols,
          const int32_t *rest, int64_t k, const float *M, int64_t ldm, void *ws)
{
    const int64_t panels = (x->N + VL - 1) / VL, stride = panel_floats(k);
    float *q = ws, *t = q + panels * stride, *turned = t + NT_BAND * VL * panels;

    if (is_small(x->N, cols, k)) {
        small(Z, ldz, x, own, cols, rest, k, M, ldm, 0, ws);
        return;
    }
    for (int64_t p = 0; p < panels; p++) {
        turn(turned, x, VL * p, x->D, NULL);
        turn_back(Z + VL * p * ldz, ldz, turned, x->N - VL * p, own, cols);
        for (int64_t i = 0; i < k; i++)
            v_store(q + p * stride + VL * i, v_load(turned + VL * rest[i]));
    }
    nt_multiply(Z, ldz, q, M, ldm, x->N, cols, k, 1, t);
}
