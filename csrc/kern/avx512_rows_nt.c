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

static size_t
nt_ws(int64_t N, int64_t k)
{
    const size_t panels = (size_t)((N + 15) / 16), deep = (size_t)(k / 16 + (k % 16 > 0));

    return mli_size_mul(mli_size_mul(panels, mli_size_add(mli_size_mul(deep, 256), BAND * 16)),
                        sizeof(float));
}

static void
nt(float *Y, int64_t ldy, const float *X, int64_t ldx, const float *W, int64_t ldw, int64_t N,
   int64_t r, int64_t k, int accumulate, void *ws)
{
    const int64_t panels = (N + 15) / 16, passes = (panels + 2) / 3, ldt = 16 * panels;
    const int64_t stride = panel_floats(k), piece = mli_piece(k, DEEP);
    float *q = ws, *t = q + panels * stride;

    mli_pack_f32__avx512(q, X, ldx, N, k);
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
