/* Products with few rows on one side, whose cost is the reading of W: included once per type of W
 * by a file that defines
 *
 *   V, VL               a vector of VL floats, and v_zero v_set1 v_load v_load_part v_store
 *                       v_fma v_sum on it (part: the first n < VL lanes, others 0)
 *   W, w_load, w_load_part  the stored type of W, and VL of its values widened
 *   NAME(f)             the name of f for this type
 *   NT_MAX, NT_TILES(T) rows of X that a tile of nt takes at most; T(n, r) for n = 1..NT_MAX,
 *                       where r divides ROWS: n * r sums stay in registers
 *   NN_ROWS             rows of W that a tile of nn takes, at most ROWS
 *
 * Sizes are constants so that loops unroll. Rows of X and of Y that lie a power of two apart fall
 * on the same few lines of a cache: hence the copies of pieces of them, kept side by side. W is
 * read in pieces of ROWS rows by some columns, each as the piece before it is worked on. */

/* s (r,n,VL) += lanes of sums over k of x (k/VL,n,VL) and w (r,k). */
static inline __attribute__((always_inline)) void
NAME(nt_tile)(const int n, const int r, float *restrict sums, const float *restrict x,
              const W *restrict w, int64_t ldw, int64_t k, ptrdiff_t ahead)
{
    V s[32], b[ROWS];
    int64_t i = 0;

    UNROLL
    for (int j = 0; j < n * r; j++)
        s[j] = v_load(sums + j * VL);
    for (; i + VL <= k; i += VL, x += n * VL) {
        UNROLL
        for (int p = 0; p < r; p++) {
            MLI_PREFETCH(w + p * ldw + i, ahead, 2);
            b[p] = w_load(w + p * ldw + i);
        }
        UNROLL
        for (int j = 0; j < n; j++) {
            V a = v_load(x + j * VL);
            UNROLL
            for (int p = 0; p < r; p++)
                s[p * n + j] = v_fma(a, b[p], s[p * n + j]);
        }
    }
    if (i < k) {
        UNROLL
        for (int p = 0; p < r; p++)
            b[p] = w_load_part(w + p * ldw + i, k - i);
        UNROLL
        for (int j = 0; j < n; j++) {
            V a = v_load(x + j * VL);
            UNROLL
            for (int p = 0; p < r; p++)
                s[p * n + j] = v_fma(a, b[p], s[p * n + j]);
        }
    }
    UNROLL
    for (int j = 0; j < n * r; j++)
        v_store(sums + j * VL, s[j]);
}

/* The same for n <= NT_MAX and any number of rows of W. Each of the passes over the same W asks for
 * its share of the next piece. */
static void
NAME(nt_rows)(int64_t n, int64_t rows, float *sums, const float *x, const W *w, int64_t ldw,
              int64_t k, ptrdiff_t ahead, int64_t pass, int64_t passes)
{
    int64_t i = 0, tile = pass;

    switch (n) {
#define TILE(N_, R_)                                                                 \
    case N_:                                                                         \
        for (; i + R_ <= rows; i += R_, tile++)                                      \
            NAME(nt_tile)(N_, R_, sums + i * N_ * VL, x, w + i * ldw, ldw, k,        \
                          tile % passes ? 0 : ahead);                                \
        for (; i < rows; i++)                                                        \
            NAME(nt_tile)(N_, 1, sums + i * N_ * VL, x, w + i * ldw, ldw, k, ahead); \
        break;
        NT_TILES(TILE)
#undef TILE
    default:
        break;
    }
}

/* x (k/VL,n,VL) from X (n,k), the last vectors filled with zeros. */
static void
NAME(nt_gather)(float *restrict x, const float *restrict X, int64_t ldx, int64_t n, int64_t k)
{
    int64_t i = 0;

    for (; i + VL <= k; i += VL)
        for (int64_t j = 0; j < n; j++, x += VL)
            v_store(x, v_load(X + j * ldx + i));
    if (i < k)
        for (int64_t j = 0; j < n; j++, x += VL)
            v_store(x, v_load_part(X + j * ldx + i, k - i));
}

static void
NAME(nt)(float *Y, int64_t ldy, const float *X, int64_t ldx, const W *Wt, int64_t ldw, int64_t N,
         int64_t r, int64_t k, int accumulate)
{
    enum { PASSES = (N_MAX + NT_MAX - 1) / NT_MAX };
    _Alignas(64) float sums[PASSES][ROWS * NT_MAX * VL];
    _Alignas(64) float x[NT_MAX * NT_BYTES / sizeof(W)];

    for (int64_t r0 = 0; r0 < r; r0 += ROWS) {
        const int64_t rows = r - r0 < ROWS ? r - r0 : ROWS;
        for (int64_t n0 = 0; n0 < N; n0 += N_MAX) {
            const int64_t m = N - n0 < N_MAX ? N - n0 : N_MAX;
            const int64_t passes = (m + NT_MAX - 1) / NT_MAX;
            const int64_t piece = mli_piece(k, (int64_t)(NT_BYTES / sizeof(W)));
            for (int64_t q = 0; q < passes; q++)
                for (int64_t j = 0; j < ROWS * NT_MAX; j++)
                    v_store(sums[q] + j * VL, v_zero());
            for (int64_t i = 0; i < k; i += piece) {
                const int64_t cols = k - i < piece ? k - i : piece;
                const int64_t ahead = i + piece < k ? piece : ROWS * ldw - i;
                for (int64_t q = 0; q < passes; q++) {
                    const int64_t n1 = m * q / passes, n = m * (q + 1) / passes - n1;
                    NAME(nt_gather)(x, X + (n0 + n1) * ldx + i, ldx, n, cols);
                    NAME(nt_rows)(n, rows, sums[q], x, Wt + r0 * ldw + i, ldw, cols,
                                  (ptrdiff_t)sizeof(W) * ahead, q, passes);
                }
            }
            for (int64_t q = 0; q < passes; q++) {
                const int64_t n1 = m * q / passes, n = m * (q + 1) / passes - n1;
                for (int64_t p = 0; p < rows; p++)
                    for (int64_t j = 0; j < n; j++) {
                        float *y = Y + (n0 + n1 + j) * ldy + r0 + p;
                        float sum = v_sum(v_load(sums[q] + (p * n + j) * VL));
                        *y = accumulate ? *y + sum : sum;
                    }
            }
        }
    }
}

/* y (n,u VL) += x (n,rows) w (rows,u VL), leading dimensions ldy, ROWS, ldw; if part > 0 (u = 1)
 * only that many columns of w are there. */
static inline __attribute__((always_inline)) void
NAME(nn_tile)(const int rows, const int u, float *restrict y, int64_t ldy, const float *restrict x,
              const W *restrict w, int64_t ldw, int64_t n, int64_t part, ptrdiff_t ahead)
{
    V b[2 * ROWS], s[2];

    UNROLL
    for (int p = 0; p < rows; p++) {
        UNROLL
        for (int j = 0; j < u; j++) {
            MLI_PREFETCH(w + p * ldw + j * VL, ahead, 3);
            b[p * u + j] = part ? w_load_part(w + p * ldw, part) : w_load(w + p * ldw + j * VL);
        }
    }
    for (int64_t i = 0; i < n; i++, y += ldy, x += ROWS) {
        UNROLL
        for (int j = 0; j < u; j++)
            s[j] = v_load(y + j * VL);
        UNROLL
        for (int p = 0; p < rows; p++) {
            V a = v_set1(x[p]);
            UNROLL
            for (int j = 0; j < u; j++)
                s[j] = v_fma(a, b[p * u + j], s[j]);
        }
        UNROLL
        for (int j = 0; j < u; j++)
            v_store(y + j * VL, s[j]);
    }
}

static inline __attribute__((always_inline)) void
NAME(nn_rows)(const int rows, float *y, int64_t ldy, const float *x, const W *w, int64_t ldw,
              int64_t n, int64_t c, ptrdiff_t ahead)
{
    int64_t j = 0;

    for (; j + 2 * VL <= c; j += 2 * VL)
        NAME(nn_tile)(rows, 2, y + j, ldy, x, w + j, ldw, n, 0, ahead);
    for (; j + VL <= c; j += VL)
        NAME(nn_tile)(rows, 1, y + j, ldy, x, w + j, ldw, n, 0, ahead);
    if (j < c)
        NAME(nn_tile)(rows, 1, y + j, ldy, x, w + j, ldw, n, c - j, ahead);
}

static void
NAME(nn)(float *Y, int64_t ldy, const float *X, int64_t ldx, const W *Wt, int64_t ldw, int64_t N,
         int64_t c, int64_t k, int accumulate)
{
    _Alignas(64) float y[PIECE];
    _Alignas(64) float x[N_MAX * ROWS];

    for (int64_t n0 = 0; n0 < N; n0 += N_MAX) {
        const int64_t n = N - n0 < N_MAX ? N - n0 : N_MAX;
        const int64_t piece = mli_piece(c, PIECE / (n <= NN_FEW ? NN_FEW : n));
        for (int64_t c0 = 0; c0 < c; c0 += piece) {
            const int64_t cols = c - c0 < piece ? c - c0 : piece;
            const W *w = Wt + c0;
            for (int64_t j = 0; j < n; j++)
                for (int64_t q = 0; q < piece; q++)
                    y[j * piece + q] = accumulate && q < cols ? Y[(n0 + j) * ldy + c0 + q] : 0.0f;
            for (int64_t i = 0; i < k;) {
                const int64_t rows = k - i < NN_ROWS ? 1 : NN_ROWS;
                const int64_t next = i + rows < k ? rows * ldw : piece - i * ldw;
                const ptrdiff_t ahead = n <= NN_FEW ? NN_AHEAD : (ptrdiff_t)sizeof(W) * next;
                for (int64_t j = 0; j < n; j++)
                    for (int64_t p = 0; p < rows; p++)
                        x[j * ROWS + p] = X[(n0 + j) * ldx + i + p];
                if (rows == NN_ROWS)
                    NAME(nn_rows)(NN_ROWS, y, piece, x, w + i * ldw, ldw, n, cols, ahead);
                else
                    NAME(nn_rows)(1, y, piece, x, w + i * ldw, ldw, n, cols, ahead);
                i += rows;
            }
            for (int64_t j = 0; j < n; j++)
                for (int64_t q = 0; q < cols; q++)
                    Y[(n0 + j) * ldy + c0 + q] = y[j * piece + q];
        }
    }
}
