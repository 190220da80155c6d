/* y = A x for a symmetric matrix, once an ISA and precision: REAL, SFX, ISA (a suffix such as
 * __avx2), VECTOR_BYTES, and BAND, the rows read side by side.
 *
 * A band of rows is read once and used twice, for its rows' products with x and for its columns'
 * share of y. The product is bound by memory, and the bands may be taken from the last to the
 * first: a caller that turns round each time finds the end of the previous pass in its cache. */

#define SYMV_CAT_(a, b, c, d) a##b##c##d
#define SYMV_CAT(a, b, c, d) SYMV_CAT_(a, b, c, d)
#define SYMV(name) SYMV_CAT(name, _, SFX, ISA)
#define LANES ((int)(VECTOR_BYTES / sizeof(REAL)))

typedef REAL SYMV(vector) __attribute__((vector_size(VECTOR_BYTES)));

static inline SYMV(vector) SYMV(load)(const REAL *p)
{
    SYMV(vector) v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* Columns c0 .. c1-1 of the rows a[0], a[1], .. of a band, one at a time. */
static inline void
SYMV(columns)(REAL *y, const REAL *const *a, int64_t rows, const REAL *x, int64_t r0, int64_t c0,
              int64_t c1)
{
    for (int64_t r = 0; r < rows; r++) {
        const REAL xr = x[r0 + r];
        REAL sum = 0;
        for (int64_t c = c0; c < c1; c++) {
            sum += a[r][c] * x[c];
            y[c] += a[r][c] * xr;
        }
        y[r0 + r] += sum;
    }
}

static void
SYMV(band)(REAL *y, const REAL *A, int64_t lda, const REAL *x, int64_t m, int64_t r0, int64_t rows)
{
    const REAL *a[BAND] = {0};
    int64_t c = r0 + rows, aligned;

    for (int64_t r = 0; r < rows; r++) { /* the triangle on the diagonal */
        const int64_t i = r0 + r;
        a[r] = A + i * lda;
        y[i] += a[r][i] * x[i];
        SYMV(columns)(y, a + r, 1, x, i, i + 1, c);
    }
    aligned = c + (int64_t)((0 - (uintptr_t)(a[0] + c) / sizeof(REAL)) % (unsigned)LANES);
    aligned = rows < BAND || aligned > m ? m : aligned;
    SYMV(columns)(y, a, rows, x, r0, c, aligned);
    c = aligned;
    if (c + LANES <= m) {
        SYMV(vector) sum[BAND], xr[BAND];
        for (int r = 0; r < BAND; r++) {
            sum[r] = (SYMV(vector)){0};
            xr[r] = x[r0 + r] - sum[r];
        }
        for (; c + LANES <= m; c += LANES) {
            const SYMV(vector) xc = SYMV(load)(x + c);
            SYMV(vector) even = SYMV(load)(y + c), odd = {0};
            for (int r = 0; r < BAND; r += 2) {
                const SYMV(vector) v = SYMV(load)(a[r] + c), w = SYMV(load)(a[r + 1] + c);
                sum[r] += v * xc;
                sum[r + 1] += w * xc;
                even += v * xr[r];
                odd += w * xr[r + 1];
            }
            even += odd;
            memcpy(y + c, &even, sizeof even);
        }
        for (int r = 0; r < BAND; r++)
            for (int i = 0; i < LANES; i++)
                y[r0 + r] += sum[r][i];
    }
    SYMV(columns)(y, a, rows, x, r0, c, m);
}

static void
SYMV(symv)(REAL *y, const REAL *A, int64_t lda, const REAL *x, int64_t m, int backwards)
{
    const int64_t bands = (m + BAND - 1) / BAND;

    memset(y, 0, (size_t)m * sizeof(REAL));
    for (int64_t i = 0; i < bands; i++) {
        const int64_t r0 = (backwards ? bands - 1 - i : i) * BAND;
        SYMV(band)(y, A, lda, x, m, r0, r0 + BAND <= m ? BAND : m - r0);
    }
}

#undef SYMV_CAT_
#undef SYMV_CAT
#undef SYMV
#undef LANES
