/* The f32 product Y (N,r) [+]= X (N,k) W (r,k)^T for some tens or hundreds of rows, for AVX-512:
 * BLAS packs W, which comes from memory and is used once; here X is packed, and W is read where it
 * lies, the next piece while this one is multiplied. */
#include "pack.h"
#include "stream.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>

#define V __m512
#define v_load _mm512_load_ps
#define v_spread _mm512_set1_ps
#define v_fma _mm512_fmadd_ps
#include "rows.inc.h"

enum {
    BAND = 48,   /* rows of W that are taken through all of k before the next; 16 divides it */
    DEEP = 256,  /* of k at a time: three panels are 48 KiB */
    ROWS_1 = 12, /* of W by 1, 2 and 3 panels: up to 24 sums stay in registers */
    ROWS_2 = 12,
    ROWS_3 = 8
};

/* T (rows,16 panels) [+]= W (rows,k) times panels of q, `stride` apart. Asks for what stands
 * `ahead` bytes after W. */
static inline __attribute__((always_inline)) void
tile(const int rows, const int panels, float *T, int64_t ldt, const float *W, int64_t ldw,
     const float *q, int64_t stride, int64_t k, int accumulate, ptrdiff_t ahead)
{
    __m512 s[24];

    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
    for (int p = 0; p < panels; p++)
        s[r * panels + p] = accumulate ? _mm512_load_ps(T + r * ldt + 16 * p) : _mm512_setzero_ps();
    for (int64_t i = 0, end; i < k; i = end) {
        end = k - i < 16 ? k : i + 16;
        UNROLL
        for (int r = 0; r < rows; r++)
            MLI_PREFETCH(W + r * ldw + i, ahead, 2);
        q = add_columns(rows, panels, s, W, ldw, q, stride, 16, i, end);
    }
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
    for (int p = 0; p < panels; p++)
        _mm512_store_ps(T + r * ldt + 16 * p, s[r * panels + p]);
}

/* The same for any number m of rows. Of the tiles every `passes`-th asks ahead, from `pass` on. */
#define COLUMN(PANELS, ROWS_)                                                                  \
    static void column_##PANELS(float *T, int64_t ldt, const float *W, int64_t ldw,            \
                                const float *q, int64_t stride, int64_t m, int64_t k,          \
                                int accumulate, ptrdiff_t ahead, int64_t pass, int64_t passes) \
    {                                                                                          \
        int64_t i = 0, at = passes - pass;                                                     \
        for (; i + ROWS_ <= m; i += ROWS_, at++)                                               \
            tile(ROWS_, PANELS, T + i * ldt, ldt, W + i * ldw, ldw, q, stride, k, accumulate,  \
                 at % passes == 0 ? ahead : 0);                                                \
        for (; i + 4 <= m; i += 4, at++)                                                       \
            tile(4, PANELS, T + i * ldt, ldt, W + i * ldw, ldw, q, stride, k, accumulate,      \
                 at % passes == 0 ? ahead : 0);                                                \
        for (; i < m; i++, at++)                                                               \
            tile(1, PANELS, T + i * ldt, ldt, W + i * ldw, ldw, q, stride, k, accumulate,      \
                 at % passes == 0 ? ahead : 0);                                                \
    }
COLUMN(1, ROWS_1)
COLUMN(2, ROWS_2)
COLUMN(3, ROWS_3)
#undef COLUMN

static int64_t
panel_floats(int64_t k)
{
    return (k + 15) / 16 * 256;
}

/* Whether to pack W rather than X. Either way a number's sum is the same. */
static int
is_small(int64_t N, int64_t r, int64_t k)
{
    return r <= N && k <= DEEP;
}

static size_t
nt_ws(int64_t N, int64_t k)
{
    const size_t panels = (size_t)((N + 15) / 16), deep = (size_t)(k / 16 + (k % 16 > 0));

    return mli_size_mul(mli_size_mul(panels, mli_size_add(mli_size_mul(deep, 256), BAND * 16)),
                        sizeof(float));
}

/* Y (N,r) [+]= panels of q times W (r,k)^T, by way of t (BAND,16 panels). */
static void
multiply(float *Y, int64_t ldy, const float *q, const float *W, int64_t ldw, int64_t N, int64_t r,
         int64_t k, int accumulate, float *t)
{
    const int64_t panels = (N + 15) / 16, passes = (panels + 2) / 3, ldt = 16 * panels;
    const int64_t stride = panel_floats(k), piece = mli_piece(k, DEEP);

    for (int64_t j = 0; j < r; j += BAND) {
        const int64_t rows = r - j < BAND ? r - j : BAND;
        for (int64_t i = 0; i == 0 || i < k; i += piece) {
            const int64_t deep = k - i < piece ? k - i : piece;
            const int64_t next = i + piece < k ? piece : BAND * ldw - i;
            const ptrdiff_t ahead = (ptrdiff_t)sizeof(float) * next;
            for (int64_t p = 0; p < passes; p++) {
                const int64_t p0 = panels * p / passes, wide = panels * (p + 1) / passes - p0;
                (wide == 3   ? column_3
                 : wide == 2 ? column_2
                             : column_1)(t + 16 * p0, ldt, W + j * ldw + i, ldw,
                                         q + p0 * stride + 16 * i, stride, rows, deep, i > 0, ahead,
                                         p, passes);
            }
        }
        for (int64_t p = 0; p < N; p += 16)
            for (int64_t i = 0; i < rows; i += 16)
                mli_store_transposed__avx512(Y + p * ldy + j + i, ldy, t + i * ldt + p, ldt,
                                             rows - i < 16 ? rows - i : 16, N - p < 16 ? N - p : 16,
                                             accumulate);
    }
}

static void
nt(float *Y, int64_t ldy, const float *X, int64_t ldx, const float *W, int64_t ldw, int64_t N,
   int64_t r, int64_t k, int accumulate, void *ws)
{
    const mli_rows_f32 x = {X, ldx, N, NULL};
    float *q = ws;

    if (is_small(N, r, k)) {
        mli_rows_small__avx512(Y, ldy, &x, NULL, r, NULL, k, W, ldw, accumulate, ws);
        return;
    }
    mli_pack_f32__avx512(q, X, ldx, N, k);
    multiply(Y, ldy, q, W, ldw, N, r, k, accumulate, q + (N + 15) / 16 * panel_floats(k));
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
    const int64_t panels = (x->N + 15) / 16, stride = panel_floats(k);
    float *q = ws, *t = q + panels * stride, *turned = t + BAND * 16 * panels;

    if (is_small(x->N, cols, k)) {
        mli_rows_small__avx512(Z, ldz, x, own, cols, rest, k, M, ldm, 0, ws);
        return;
    }
    for (int64_t p = 0; p < panels; p++) {
        mli_turn__avx512(turned, x, 16 * p);
        mli_turn_back__avx512(Z + 16 * p * ldz, ldz, turned, x->N - 16 * p, own, cols);
        for (int64_t i = 0; i < k; i++)
            _mm512_store_ps(q + p * stride + 16 * i, v_load(turned + 16 * rest[i]));
    }
    multiply(Z, ldz, q, M, ldm, x->N, cols, k, 1, t);
}

static size_t
rows_ws(int64_t N, int64_t k)
{
    const size_t nt = nt_ws(N, k), nn = mli_rows_nn_ws__avx512();

    return nt > nn ? nt : nn;
}

static void
rows_f32(int layout, float *Y, int64_t ldy, const float *X, int64_t ldx, const float *W,
         int64_t ldw, int64_t N, int64_t cols, int64_t k, int accumulate, void *ws)
{
    (layout == MLI_NN ? mli_rows_nn__avx512 : nt)(Y, ldy, X, ldx, W, ldw, N, cols, k, accumulate,
                                                  ws);
}

int
mli_kernels_add_avx512_rows(mli_kernels *t)
{
    t->rows_f32_ws = rows_ws;
    t->rows_f32 = rows_f32;
    t->rows_f32_native = 1;
    t->gauge_f32_ws = gauge_ws;
    t->gather_f32 = mli_gather_f32__avx512;
    t->gauge_f32 = gauge_f32;
    t->tn_f32 = mli_tn_f32__avx512;
    return 1;
}

#else

int
mli_kernels_add_avx512_rows(mli_kernels *t)
{
    (void)t;
    return 0;
}

#endif
